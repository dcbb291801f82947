"All methods on several models: a deep twin goes through the plan, and models are the clusters"
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from ffp_nb.core.perplexity import perplexity
from ffp_nb.pipeline.config import Profile
from ffp_nb.pipeline.tasks import SEVEN, TASKS
from ffp_nb.search.gates import grasprune
from ffp_nb.studies import distillation, methods, twins
from ffp_nb.studies.cells import Lab, base_config, known_models, planned_tokens
from ffp_nb.studies.distillation import other_text
from ffp_nb.studies.methods import STUDY, against_default, wanted
from ffp_nb.studies.study import (
    count_records, find_measured, half_width, p_value, read_records, run_study, walk)
from ffp_nb.studies.twins import DEEP, SETUPS, Setup

ROOT = Path(__file__).parent.parent
TOY = dict(text='pydoc', tokens=20_000, batch=8, lr=6e-3, vocab=400, hidden=48, layers=2,
           block_len=32)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(SETUPS, 'smoke', Setup(TOY, Profile(32, 50, 8, 8, 4, 1, 2, 8, 2), (1, 8),
                                               deep=dict(layers=3)))
    monkeypatch.setattr(methods, 'DONE', {'mistral-deep': [
        (('default', 'EvoPress', 'OWL', 'even FFN cut'), (0.3,), 1)]})
    monkeypatch.setattr(methods, 'LEARNED', {'mistral-deep': ((0.3,), 1)})
    monkeypatch.setattr(methods, 'LIMIT', {'mistral-deep': 3000})
    monkeypatch.setattr('ffp_nb.studies.slopes.grasprune',
                        lambda p: replace(grasprune(p, steps=4), wall_s=12.34))


def test_a_deep_twin_goes_through_the_plan(toy, tmp_path, capsys):
    lab = Lab(tmp_path, 'smoke', runs=tmp_path, work=tmp_path)
    run_study(STUDY, lab)
    names = {r['config']['name'] for r in read_records(tmp_path / 'methods')}
    assert names == {'train-mistral', 'dense-mistral-deep', 'mistral-deep-gradient-0.3-0',
                     'mistral-deep-evopress-0.3-0-none', 'mistral-deep-owl-0.3-0',
                     'mistral-deep-uniform-ffn-0.3-0', 'mistral-deep-grasprune-0.3-0'}
    table, tasks, _ = STUDY.read(tmp_path)
    assert set(table.method) == {'default', 'EvoPress', 'OWL', 'even FFN cut', 'GRASPrune', 'dense'}
    assert set(table[table.method == 'GRASPrune'].calibration) == {'none', 'static', 'sequential',
                                                                   'scales'}
    layers = read_records(tmp_path / 'methods', 'mistral-deep-owl')[0]['result']['widths']
    assert len(layers) == 3 and not tasks
    assert (table.seconds[table.method == 'GRASPrune'] == 12.3).all()
    assert count_records(STUDY, lab) == (7, 7)
    fig = methods.draw(table)
    assert [a.get_title() for a in fig.axes if a.get_visible()] == ['deep Mistral']


@pytest.mark.parametrize('lacking', [('none',), ('sequential',), ('none', 'sequential')])
def test_a_repair_that_a_record_lacks_is_measured_apart(lacking, toy, tmp_path, monkeypatch):
    "Policies of other studies have no figures without repair; nothing is searched again"
    monkeypatch.setattr(methods, 'DONE', {'mistral-deep': [(('even FFN cut',), (0.3,), 1)]})
    monkeypatch.setattr(methods, 'LEARNED', {})
    lab = Lab(tmp_path, 'smoke', runs=tmp_path, work=tmp_path)
    run_study(STUDY, lab)
    (path,) = (tmp_path / 'methods').glob('mistral-deep-uniform-ffn*.json')
    record = json.loads(path.read_text())
    nats = {m: record['result']['nll'].pop(m) for m in lacking}
    path.write_text(json.dumps(record))
    own = lambda: STUDY.read(tmp_path)[0].query("method == 'even FFN cut'").set_index(
        'calibration').nll
    assert set(own().index) == {'none', 'static', 'sequential'} - {*lacking}
    assert count_records(STUDY, lab) == (3, 4)
    run_study(STUDY, lab)
    (more,) = read_records(tmp_path / 'methods', '-'.join(lacking))
    assert more['result'] == dict(nll=nats)
    assert len(own()) == 3 and all(np.isclose(own()[m], np.mean(v)) for m, v in nats.items())


def test_a_policy_is_judged_on_another_text_with_the_repair_of_its_own(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, 'DONE', {'mistral-deep': [(('even FFN cut',), (0.3, 0.5), 1)]})
    monkeypatch.setattr(methods, 'LEARNED', {})
    monkeypatch.setattr(methods, 'ELSEWHERE', {'mistral-deep': (0.3,)})
    lab = Lab(tmp_path, 'smoke', runs=tmp_path, work=tmp_path)
    run_study(STUDY, lab)
    (record,) = read_records(tmp_path / 'methods', 'other-')  # not of the other target
    (policy,) = read_records(tmp_path / 'methods', 'mistral-deep-uniform-ffn-0.3')
    assert record['config']['of'] == policy['config_id']
    bench, widths = lab.bench('mistral-deep'), np.array(policy['result']['widths'])
    with bench.elastic.at(widths, bench.sequential(widths, progress=False)):
        own = perplexity(bench.elastic.model, other_text(bench).test[:24]).nll
    nats = record['result']['nll']['sequential']
    assert np.allclose(nats, own, atol=1e-4)
    assert not np.allclose(np.mean(nats), np.mean(policy['result']['nll']['sequential']), atol=0.01)
    t = STUDY.read(tmp_path)[0].set_index(['sparsity', 'calibration']).other
    assert np.isclose(t[0.3, 'sequential'], np.mean(nats))
    assert t.drop((0.3, 'sequential')).isna().all()


def test_deep_models_are_told_from_the_others():
    shallow, deep = SETUPS['cpu'].settings('opt'), SETUPS['cpu'].settings('opt-deep')
    assert shallow == dict(family='opt') and deep['layers'] >= 24 and deep['family'] == 'opt'
    assert twins.twin_config('opt').model != twins.twin_config('opt-deep').model
    assert {c.model for *_, c in wanted('smollm2')} == {'smollm2'}
    assert not set(DEEP) & {*twins.NAMES}


@pytest.mark.parametrize('model', ['smollm2', 'gemma3-270m', *DEEP])
def test_rivals_may_read_what_the_default_reads(model):
    c = replace(base_config(model), method='gradient', criterion='greedy')
    assert planned_tokens(c, 10**6) == methods.LIMIT[model]


def rows(model, sparsity, **nll):
    return [dict(model=model, sparsity=sparsity, method=m.replace('_', ' '), seed=s, nll=x,
                 calibration='sequential') for m, v in nll.items() for s, x in enumerate(v)]


def test_models_are_the_clusters():
    "Common seeds and targets are averaged first; a method of one model alone is left out"
    t = pd.DataFrame(rows('a', 0.3, default=[3.0, 3.2], EAS=[3.3], OWL=[3.5])
                     + rows('a', 0.5, default=[4.0], EAS=[4.4])
                     + rows('b', 0.3, default=[2.0], EAS=[2.1], FLAP=[9.0]))
    found = against_default(t).set_index('method')
    assert [*found.index] == ['EAS'] and found.over['EAS'] == '2 models'
    assert np.isclose(found.difference['EAS'], (0.35 + 0.1) / 2)  # a: (0.3 + 0.4) / 2
    assert against_default(t[t.model == 'a']).empty


def test_without_the_terms_of_gemma_the_rest_goes_on(toy, tmp_path, monkeypatch):
    "One warning that says what to do; nothing is opened"
    monkeypatch.delenv('FFP_GEMMA_TERMS', raising=False)
    monkeypatch.setattr(methods, 'DONE', {'gemma3-270m': [(('even FFN cut',), (0.3,), 1)]})
    with pytest.warns(UserWarning, match='Gemma 3 270M is left out: .*(FFP_GEMMA_TERMS|installed)'):
        run_study(STUDY, Lab(tmp_path, 'smoke', runs=tmp_path, work=tmp_path))
    assert not (tmp_path / 'methods').exists()


def test_records_of_another_training_are_not_continued(toy, tmp_path, monkeypatch):
    lab = Lab(tmp_path, 'smoke', runs=tmp_path, work=tmp_path)
    monkeypatch.setattr(methods, 'DONE', {'mistral-deep': [(('even FFN cut',), (0.3,), 1)]})
    monkeypatch.setattr(methods, 'LEARNED', {})
    run_study(STUDY, lab)
    (path,) = (tmp_path / 'methods').glob('dense-*.json')
    record = json.loads(path.read_text())
    record['result']['weights'] = 'others'
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match='records of another mistral-deep .weights others, here'):
        run_study(STUDY, lab)


def test_rivals_are_taught_from_their_own_widths(monkeypatch):
    "Each seed starts from its own policy; a start without widths is no even cut"
    monkeypatch.setattr(methods, 'DISTILLED', {
        'smollm2': ({'CMA-ES': (0.5,)}, 3),
        'gemma3-270m': (dict.fromkeys(('default', 'CMA-ES'), (0.5,)), 1)})
    lab, asked = Lab(ROOT / 'nbs', dry=True), []
    walk(STUDY.plan(lab), lambda m: asked.append(m.config) or find_measured(
        lab.runs / 'methods', m.config))
    taught = [c for c in asked if c['name'].startswith('distillation-cma-')]
    assert [c['name'].removeprefix('distillation-cma-') for c in taught] == [
        '0.5-0', '0.5-1', '0.5-2', *(f'0.5-distil-own-{i}' for i in range(3))]
    before, after = taught[:3], taught[3:]
    assert len({str(c['widths']) for c in before}) == 3
    assert [str(c['widths']) for c in before] == [str(c['widths']) for c in after]
    other = {c['name']: c for c in asked if c['name'].startswith('distillation-gemma3-270m-')}
    assert {(name, c['model'], c['criterion']) for name, c in other.items()} == {
        (f'distillation-gemma3-270m-{start}-0.5-{end}', 'gemma3-270m', order)
        for start, order in (('gradient', 'greedy'), ('cma', 'wanda'))
        for end in ('0', 'distil-own-0')}  # of one seed
    (own,) = read_records(lab.runs / 'methods', 'gemma3-270m-cma-0.5-0')
    assert np.array_equal(other['distillation-gemma3-270m-cma-0.5-0']['widths'],
                          own['result']['widths'])
    desk = distillation.Desk(lab, 'wanda', 0, {(0.5, 'cma', 0): before[0]['widths']}, 'smollm2')
    with pytest.raises(KeyError, match='no widths are given for eas, sparsity 0.5, seed 0'):
        desk.widths(0.5, 'eas', 0)


def test_a_training_among_the_records_says_nothing_of_the_model(tmp_path):
    "Trainings name a model, but not how its text is read"
    (tmp_path / 'methods').mkdir()
    known = dict(name='cell', model='smollm2', text='wikitext2', dtype='bfloat16',
                 text_sha256={'test': 'a'}, convention=dict(bos=True))
    for c in (known, dict(name='distillation-EAS-0.5-0', model='smollm2', dtype='float32',
                          text_sha256={'test': 'b'})):
        path = tmp_path / 'methods' / f'{c["name"]}.json'
        path.write_text(json.dumps(dict(config=c, result=dict(weights='w'))))
    assert known_models(tmp_path) == {
        ('smollm2', 'wikitext2'): ({'test': 'a'}, 'w', 'bfloat16', True)}


def test_a_lone_point_far_above_is_told_at_the_edge():
    "It would flatten the lines; one that is near, or a line, is drawn where it is"
    nll = {'dense': {0.0: 3.0}, 'default': {0.3: 3.4, 0.5: 4.0}, 'GRASPrune': {0.5: 5.26},
           'FLAP': {0.5: 4.1}}
    table = pd.DataFrame([
        dict(model='smollm2', method=m, sparsity=s, calibration='sequential', nll=v)
        for m, t in nll.items() for s, v in t.items()])
    ax = methods.draw(table).axes[0]
    assert [t.get_text() for t in ax.texts] == ['GRASPrune: 2.3 ↑']
    assert ax.get_ylim()[1] < 1.2 and len(ax.lines) == 3
    assert not methods.draw(table[table.method != 'GRASPrune']).axes[0].texts


@pytest.fixture
def made():
    "Figures of SmolLM2 at half size: a constant lead over blocks that seeds do not agree on"
    rng, base = np.random.default_rng(0), 4 + np.linspace(0, 1, 24)
    rows = [dict(model='smollm2', method='dense', sparsity=0.0, seed=0, calibration='none',
                 nll=3.0)]

    def add(method, offsets, noise=0.0, tokens=100, episodes=320, sparsity=0.5):
        for seed, d in enumerate(offsets):
            v = base + d + noise * rng.standard_normal(24)
            rows.append(dict(model='smollm2', method=method, sparsity=sparsity, seed=seed,
                             calibration='sequential', nll=v.mean(), ppl=np.exp(v.mean()), blocks=v,
                             forward_tokens=tokens, seconds=10.0 + seed, gone=0, other=np.nan,
                             other_blocks=np.array([]), episodes=episodes,
                             widths=(method, seed)))

    def table():
        return pd.DataFrame(rows)

    add('default', [0, 0.3, -0.3])
    add("default, Wanda's order", [-0.2, 0.1, 0.4])
    return SimpleNamespace(add=add, table=table, rows=rows)


def test_a_lead_is_told_over_blocks_and_over_seeds(made):
    made.add('CMA-ES', [0.5, 0.8, 0.2])
    none = pd.DataFrame(columns=['model', 'sparsity'])
    line = next(x for x in methods.findings(made.table(), [], none)
                if "Wanda's order is above the greedy" in x)
    assert 'in 1 of 1 pairs' in line and 'Over seeds, in 0 of 1 pairs' in line
    assert methods.part_table(made.table(), 'seeds')["order, under the default's search"].tolist(
        ) == ['0.100 ± 1.291']
    t = methods.leads(made.table()).iloc[0]
    assert t.rival == 'CMA-ES' and np.allclose(t['lead by seed'], 0.5) and len(t.lead) == 24
    assert t['even by seed'] is None is t.even


def test_what_reads_more_is_a_rival_and_is_named(made):
    made.add("paper's recipe", [0.6], tokens=99, episodes=80)
    made.add("paper's recipe, 320 episodes", [0.4], tokens=400)
    made.add('agent, 320 episodes', [0.3, 0.5, 0.0], tokens=400)
    made.add('even FFN cut', [0.7])
    table = made.table()
    assert methods.best_rival(table, 'smollm2', 0.5) == 'agent, 320 episodes'
    held, recipe, agent = methods._held(table)
    assert recipe.endswith('400 forward tokens, is above the default by 0.400 (σ = 0.5) nats '
                           '(intervals over seeds; one seed has none).')
    assert 'has 80 episodes (the paper: 5,000) and ends -0.100 (σ = 0.5)' in held
    assert agent.startswith('- *agent, 320 episodes*, 400 forward tokens, is above the default by '
                            '0.267 ± ')
    shown = methods.headline(table, pd.DataFrame(
        columns=['model', 'method', 'sparsity', 'nll', 'before']))
    of = lambda v: f'{np.exp(4.5 + v):.1f}'
    assert f'{of(0.6)} ({of(0.4)})' in shown and f'**{of(0)}**' in shown
    taught = pd.DataFrame([dict(model='smollm2', method='default', forward_tokens=5000, seconds=x)
                           for x in (7, 9)])
    cost, _, said = methods.costs(table, taught).rpartition('\n\n')
    cells = [[v.strip() for v in line.split('|')[2:-1]] for line in cost.splitlines()[2:]]
    assert cells == [['default', '100', '10 to 12'],
                     ["paper's recipe, 80 episodes", '99', '10'],
                     ["paper's recipe, 320 episodes", '400', '10'],
                     ['agent, 320 episodes', '400', '10 to 12'],
                     ['distilling the default', '5,000', '7 to 9']]
    assert 'same order (below 0: less loss): SmolLM2-135M -0.100 (σ = 0.5).' in said


def test_a_family_of_leads_is_corrected():
    "What a single interval shows need not hold with others beside it"
    weak = 0.1 + 0.16 * np.array([1, -1, 0.2, -0.2, 0.9, -0.9, 0.1, 0.4])
    none = np.array([1, -1, 2, -2, 3, -3, 1, -1.1])
    assert 0.025 < p_value(weak) < 0.05 and methods.ahead([weak]) == [True]
    assert methods.ahead([weak, none, None]) == [False, False, False]
    assert methods.ahead([weak, 5 + weak, -5 - weak]) == [True, True, False]
    assert methods.ahead([np.array([1.0])]) == [False]  # a single seed


def test_a_lead_that_is_not_shown_is_not_bold(made):
    made.add('EAS', [0.01], noise=0.5)
    none = pd.DataFrame(columns=['model', 'method', 'sparsity', 'nll', 'before'])
    shown = methods.headline(made.table(), none)
    assert '(EAS)' in shown and '**' not in shown
    made.rows[-1]['blocks'] = made.rows[-1]['blocks'] + 2  # over the blocks, but of a single seed
    made.rows[-1]['nll'] += 2
    assert '**' not in methods.headline(made.table(), none)
    made.add('EAS', [2.0, 2.3, 1.7])
    del made.rows[-4]
    assert '**' in methods.headline(made.table(), none)


def test_what_distillation_changes_is_told_of_the_same_seeds(made):
    made.add('EAS', [2.0])
    taught = pd.DataFrame([dict(model='smollm2', method='default', sparsity=0.5, seed=k,
                                nll=4.0, before=b)
                           for k, b in enumerate((4.1, 4.3))])
    assert f'| {np.expm1(-0.2):+.0%} ' in methods.headline(made.table(), taught)


def test_two_repairs_of_a_policy_are_compared_on_the_same_blocks(made):
    before = [r['blocks'].mean() + d for r, d in zip(made.rows[1:], (0.001, -0.004, 0.002))]
    made.rows[1]['blocks'] = np.append(made.rows[1]['blocks'], [99, 99])  # not judged there
    taught = pd.DataFrame([dict(model='smollm2', method='default', sparsity=0.5, seed=k, before=b)
                           for k, b in enumerate(before)])
    (line,) = methods._again(made.table(), taught)
    assert 'differ by up to 0.004 nats (3 policies' in line


def test_a_policy_that_breaks_on_single_blocks_is_named(made):
    assert methods._broken(made.table()) == []
    made.rows[2]['blocks'][5] += 3.8
    made.rows[3]['other_blocks'] = np.array([4, 4, 4, 9.0])
    (line,) = methods._broken(made.table())
    assert line.endswith('default, seed 1, SmolLM2-135M at 0.5 (1 of 24, WikiText-2); default, '
                         'seed 2, SmolLM2-135M at 0.5 (1 of 4, help topics).')
    made.rows[2]['model'] = 'opt-deep'  # its text is another one
    (line,) = methods._broken(made.table())
    assert 'seed 1, deep OPT at 0.5 (1 of 24, the text of the twins);' in line


def test_the_better_repair_is_told(made):
    made.add('EAS', [0.5, 0.8, 0.2])
    assert methods._repairs(made.table()) == []  # sequential alone
    for row in made.rows[1:]:  # the default's own are 0.1 nats better, of one seed worse
        by = {'default': (-0.1, -0.1, 0.3)}.get(row['method'], (-0.4,) * 3)[row['seed']]
        made.rows.append(row | dict(calibration='static', nll=row['nll'] + by,
                                    blocks=row['blocks'] + by))
    first, lead = methods._repairs(made.table())
    assert first.endswith('in 2 of 3 policies of the default; in all seeds of no pair of model and '
                          'target.')
    assert 'is above the default in 1 of 1 pairs' in lead and 'by 0.067 (SmolLM2' in lead
    made.rows += [r | dict(calibration='none', blocks=r['blocks'] + (r['method'] == 'default'))
                  for r in made.rows[1:] if r['calibration'] == 'sequential']
    bare = methods._repairs(made.table())[2]
    assert bare.startswith('- Without any repair, the best other method') and (
        'in 0 of 1 pairs' in bare and 'below it in 1' in bare)
    assert methods.lead_table(made.table(), 'none')['is above by'].tolist()[0].startswith('-0.500')
    made.add('GRASPrune', [1.0])
    made.rows.append(made.rows[-1] | dict(calibration='scales', blocks=made.rows[-1]['blocks']
                                          - 0.25))
    line = methods._repairs(made.table())[-1]
    assert 'by 0.750 to 0.750 nats' in line and 'by 1.000 to 1.000; ' in line
    assert line.endswith('in 1 of 1 pairs of model and target.')
    assert methods.scale_table(made.table()).iloc[0].tolist() == [
        'SmolLM2-135M', '0.5', 1, '0.750', '1.000']
    made.rows[:] = [r for r in made.rows if r['seed'] < 2]
    assert 'in 2 of 2 policies of the default; in all seeds of SmolLM2-135M at 0.5 (+0.100).' in (
        methods._repairs(made.table())[0])


def test_readme_names_who_is_ahead_without_repair():
    t = methods.leads(STUDY.read(ROOT / 'nbs' / 'runs')[0], 'none')
    t = t[t.model.isin(methods.REAL)].set_index(['model', 'sparsity'])
    assert len(t) == 6 and all(d.mean() < -half_width(d) for d in t.lead)
    assert t.lead['smollm2', 0.5].mean() < -1
    own = t.rival['smollm2']
    assert all(m.startswith('agent, ') for m in own[:0.3]) and own[0.5] == 'EAS'
    assert {*t.rival['gemma3-270m']} == {'GRASPrune'}
    assert not any(abs(np.mean(d)) > half_width(d) for d in t['lead by seed'] if d is not None)
    assert ('at every target: on SmolLM2-135M the agent, or EAS, on Gemma 3 270M GRASPrune.'
            ) in (ROOT / 'README.md').read_text()


def test_readme_says_how_the_default_stands_on_another_text():
    t = methods.on_other_text(STUDY.read(ROOT / 'nbs' / 'runs')[0]).set_index('method')
    t = t[(t.model == 'smollm2') & ~t.index.isin(methods.OURS)]
    far, sure = t.other.map(np.mean), t.holm < 0.05
    assert [*t.index[sure & (far > 0)]] == ['FLAP'] and not (sure & (far < 0)).any()
    single = far.abs() > t.other.map(half_width)
    behind = {*t.index[single & (far < 0)]}
    assert behind == {'agent, 320 episodes', 'CMA-ES, 320 episodes'}
    assert (f'ahead of FLAP alone of {len(t)} other methods, and behind none; by single intervals '
            f'over seeds ahead of {(single & (far > 0)).sum()}, and behind two'
            ) in (ROOT / 'README.md').read_text()


def test_readme_says_what_tasks_tell():
    tasks = STUDY.read(ROOT / 'nbs' / 'runs')[1]
    gaps, text = methods.task_gaps(tasks), (ROOT / 'README.md').read_text()
    text = text[text.index('**The lead is one in perplexity; '):]
    all_, most = gaps[gaps.documents < 400], gaps[gaps.documents == 400]
    assert {*zip(all_.documents, all_.model)} == {(50, 'smollm2'), (100, 'gemma3-270m')}
    t = all_[all_.measure == 'accuracy']
    assert (t.holm > 0.05).all() and f'tells none of {len(t)} from the default' in text
    t = all_[all_.measure == 'LAMBADA']
    worse = t[(t.holm < 0.05) & (t.difference < 0)]
    assert not ((t.holm < 0.05) & (t.difference > 0)).any()
    assert f'tells none as better and {len(worse)} as worse' in text
    assert {*worse.method[worse.model == 'smollm2']} == {'FLAP', 'OWL', 'AlphaPruning', 'even cut',
                                                         'GRASPrune'}
    assert {"paper's recipe", 'CMA-ES', 'EAS', 'EvoPress'} <= {
        *worse.method[(worse.model != 'smollm2') & (worse.sparsity == 0.5)]}
    single = t[t.difference > t.interval]
    assert f'it has {len(single)} as better' in text
    t = all_[all_.measure == 'accuracy']
    t = t[t.difference.abs() > t.interval]
    better, rest = t[t.difference > 0], t[t.difference < 0]
    assert {*better.sparsity} == {0.2} and {*rest.sparsity} == {0.5}
    assert {*t.model} == {'gemma3-270m'}
    assert (f'accuracy {len(better)} at σ = 0.2 on Gemma, and {len(rest)} as worse at 0.5'
            ) in text
    assert [*single.method[single.sparsity == 0.5]] == ['CMA-ES']
    assert {*single.model[single.sparsity == 0.5]} == {'smollm2'}
    assert {*most.method} == {"paper's recipe"} and len(most) == 4
    more = most[most.measure == 'accuracy']
    assert ((more.difference > 0) & (more.holm < 0.05)).all()
    by = methods.task_by_task(tasks)
    by = by[by.documents == 400]['shown on']
    assert len(by) == 2 and all(v.startswith('boolq +') and ', ' not in v for v in by)
    sign = most[most.measure == 'LAMBADA'].set_index('sparsity').difference
    assert sign[0.3] > 0 > sign[0.5]


def test_blocks_that_follow_each_other_count_for_less(made):
    assert methods._neighbours(methods.leads(made.table())) == []  # no rival yet
    made.add('EAS', [0.01, 0.31, -0.29])  # apart by a constant: nothing to correlate
    assert methods._neighbours(methods.leads(made.table())) == []
    for row in made.rows[-3:]:
        row['blocks'] = row['blocks'] + 0.04 + 0.1 * np.sin(2 * np.pi * np.arange(24) / 24)
    (line,) = methods._neighbours(methods.leads(made.table()))
    assert 'correlate by 0.97 to 0.97' in line
    assert line.endswith('0 of the 1 differences are shown; with single blocks 1.')


def test_methods_with_one_policy_are_named(made):
    assert methods._alike(made.table()) == []
    made.add('EAS', [0.3], noise=0.1)
    # measured apart, so the losses are not the same to the last digit
    made.rows.append(made.rows[-1] | dict(method='EvoPress', blocks=made.rows[-1]['blocks'] + 1e-4))
    made.rows.append(made.rows[-1] | dict(method='OWL'))  # has no seed
    made.rows.append(made.rows[-1] | dict(method='OWL', sparsity=0.3))  # another target
    assert methods._alike(made.table()) == [
        '- One policy with several names, as the widths are the same: EAS and EvoPress and OWL '
        '(SmolLM2-135M at 0.5, seed 0).']
    made.add('default', [0], sparsity=0.3)
    made.rows[-1]['widths'] = made.rows[-2]['widths']  # in another order: not the same units
    assert len(methods._alike(made.table())[0].split(' and ')) == 3


def test_only_the_seeds_that_both_have_are_compared(made):
    "One seed of a rival says nothing beside the mean of the default's three"
    made.add('default, attention may go', [0.1])  # the default's own: 0.0, 0.3, -0.3
    made.add('agent, 80 episodes', [-0.1])
    made.add("paper's recipe", [0.5, 0.1])
    made.add('even FFN cut, greedy', [0.2])
    made.rows[1]['blocks'] = made.rows[1]['blocks'] + 0.6  # seed 0 of the default is bad
    made.rows[1]['nll'] += 0.6
    t = methods.leads(made.table()).iloc[0]
    assert t.rival == 'agent, 80 episodes' and np.allclose(t.lead, -0.7)
    assert np.allclose(t.paper, (-0.1 - 0.2) / 2) and np.allclose(t['paper by seed'], [-0.1, -0.2])
    assert np.allclose(t.even, 0)  # has no seed: beside all three, 0.6, 0.3, -0.3
    (line,) = methods._attention(made.table())
    assert 'is -0.500 nats from' in line and line.endswith('(seeds of both: 1).')
    made.add('even FFN cut', [0.0])
    line = next(x for x in methods._held(made.table()) if '*agent, 80' in x)
    assert 'by -0.700 (σ = 0.5)' in line
    for row in made.rows:
        row['seed'] += 7 * row['method'].startswith('agent')  # no seed is the default's
    assert not any('*agent, 80' in x for x in methods._held(made.table()))


def test_a_lead_is_told_without_pairs_of_seeds_too(made):
    made.add('EAS', [0.5, 0.8, 0.2])  # apart by 0.5 in each pair, and the seeds far from each other
    (line,) = methods._unpaired(made.table(), methods.leads(made.table()))
    assert methods.ahead(methods.leads(made.table())['lead by seed']) == [True]
    assert line.endswith('over seeds in 0 of 1 pairs, 0 with Holm.')
    for row in made.rows[-3:]:
        row['nll'] += 3
        row['blocks'] = row['blocks'] + 3
    (line,) = methods._unpaired(made.table(), methods.leads(made.table()))
    assert line.endswith('over seeds in 1 of 1 pairs, 1 with Holm.')


def _judged(name, shift=0.0, limit=400, model='smollm2', sparsity=0.3, nats=0.0, seed=0):
    "A made-up record of tasks: `shift` of the documents more are right than are for the default"
    rng, scores = np.random.default_rng(7), {}
    for task in TASKS:
        luck = rng.random(limit)
        own = np.random.default_rng(seed).random(limit) < 0.02  # answers that differ at random
        right = np.where(own, ~(luck < 0.4), luck < 0.4 + shift).astype(float).tolist()
        scores[task] = dict(acc=right) | (
            dict(loglikelihood=(-9 * luck + nats + own).tolist()) if task == 'lambada_openai'
            else dict(acc_norm=right))
    about = dict(data=dict.fromkeys(TASKS, f'{limit}'), chance=dict.fromkeys(TASKS, 0.25))
    return dict(about=(model, name, sparsity), result=dict(scores=scores, about=about),
                config=dict(limit=limit, calibration='sequential'), forward_tokens=1, wall_s=1.0)


def test_tasks_tell_what_differs_and_nothing_else():
    tasks = [_judged('default'), _judged("paper's recipe", shift=0.1, nats=-0.5, seed=1),
             _judged('CMA-ES', seed=2), _judged('dense', 0.2, sparsity=0.0)]
    gaps = methods.task_gaps(tasks).set_index(['method', 'measure'])
    assert {*gaps.index.get_level_values(0)} == {"paper's recipe", 'CMA-ES'}  # dense: no target
    told = gaps.loc["paper's recipe"]
    assert 0.07 < told.difference['accuracy'] < 0.13
    assert -0.55 < told.difference['LAMBADA'] < -0.45
    assert told.holm['accuracy'] < 1e-6 and (gaps.loc['CMA-ES'].holm > 0.05).all()
    line, by_task, ranked = methods._accuracy(tasks)
    assert line == (
        '- Zero-shot, SmolLM2-135M, policies of seed 0, 400 documents of each task (Holm over the '
        "2 differences of each measure): accuracy on the seven tasks tells 1 (paper's recipe at "
        "0.3) of 2 other policies as better than the default and 0 as worse; LAMBADA's "
        "log-likelihood tells 0 of 2 other policies as better than the default and 1 (paper's "
        'recipe at 0.3) as worse.')
    assert 'told from the default in 1 of 2 comparisons: boolq +0.' in by_task
    assert by_task.endswith("(paper's recipe, SmolLM2-135M at 0.3).")
    by = methods.task_by_task(tasks).set_index('method')
    assert by['shown on']['CMA-ES'] == '' != by['mean of the others']['CMA-ES']
    assert by['shown on']["paper's recipe"].startswith('boolq +0.')
    assert by.documents.tolist() == [400, 400]
    assert '(SmolLM2-135M at 0.3, 400 documents of each task: 2 of 2 others above it, de' in ranked
    other = _judged('default', limit=50, model='gemma3-270m')
    table = methods.by_task_table([*tasks, _judged('EAS', limit=50), other])
    assert [*table[table.documents == 50].model] == ['Gemma 3 270M']  # has no more
    table = table[table.documents == 400]
    assert set(table.method) == {'default', "paper's recipe", 'CMA-ES', 'dense'}
    default = methods._scores(tasks[:1])[400, 'smollm2', 'default', 0.3]
    assert [*table.columns[-2:]] == ['average of seven', 'LAMBADA']
    assert (table['average of seven'][table.method == 'default'].item()
            == f'{default.value.iloc[-1]:.3f}')


def test_tasks_are_compared_with_the_same_documents_of_the_same_model():
    "A record of fifty documents has its own default, and so has another model"
    tasks = [_judged('default'), _judged('EAS', limit=50, seed=1),
             _judged('EAS', model='gemma3-270m')]
    assert methods.task_gaps(tasks).empty and not methods._accuracy(tasks[1:])
    assert not methods.zero_shot_table(tasks)['σ = 0.3'].str.contains('±').any()
    tasks.append(_judged('default', shift=0.2, limit=50))
    own = methods.task_gaps(tasks)
    assert [*own.documents] == [50, 50] and own.difference.iloc[0] < -0.1
    assert [*methods.zero_shot_table(tasks).documents] == [400, 400, 50, 50]


def test_accuracy_over_targets_is_that_of_the_same_documents():
    "Where a method has all the targets of the default: the mean of each document's scores"
    at = lambda s, **kw: _judged('EAS', sparsity=s, seed=1, **kw)
    tasks = [_judged('default'), _judged('default', sparsity=0.5), _judged('dense', sparsity=0.0),
             at(0.3, shift=0.1), at(0.5, shift=0.04, nats=-1.0), _judged('FLAP', seed=2)]
    gaps = methods.task_gaps(tasks).set_index(['method', 'sparsity', 'measure'])
    both = methods.task_gaps(tasks, over_targets=True).set_index(['method', 'measure'])
    assert [*both.index] == [('EAS', 'accuracy'), ('EAS', 'LAMBADA')]  # FLAP has one target
    for measure in 'accuracy', 'LAMBADA':
        own = gaps.loc['EAS'].xs(measure, level='measure')
        assert np.isclose(both.difference['EAS', measure], own.difference.mean())
    # tasks have documents of their own: their errors add up
    by = [[r['result']['scores'][k]['acc_norm'] for r in tasks] for k in SEVEN]
    d = [np.add(a, b) / 2 - np.add(x, y) / 2 for x, y, _, a, b, _ in by]
    error = np.sqrt(sum(v.var(ddof=1) / len(v) for v in d)) / 7
    assert np.isclose(both.interval['EAS', 'accuracy'], 1.96 * error)
    above, below = methods.draw_tasks(tasks).axes
    for ax, measure in (above, 'accuracy'), (below, 'LAMBADA'):
        (point,) = [line for line in ax.lines if line.get_marker() == 'o']
        assert np.isclose(point.get_xdata(), both.difference['EAS', measure])
        assert [t.get_text() for t in ax.get_yticklabels()] == ['EAS']
    t = methods.zero_shot_table(tasks).set_index('method')
    assert [*t.columns] == ['documents', 'model', 'σ = 0.3', 'σ = 0.5', 'mean']
    assert t.loc['dense'].iloc[2:].nunique() == 1
    assert t['mean']['FLAP'] == '' == t['σ = 0.5']['FLAP']
    assert t['mean']['EAS'].endswith('**') and ', **+0.0' in t['mean']['EAS']
    t = methods.zero_shot_table(tasks, 'LAMBADA').set_index('method')
    assert t['σ = 0.5']['EAS'].startswith('**-1.0') and '±' not in t['mean']['default']
    line = methods._accuracy(tasks)[1]
    assert line.startswith('- Over their targets together, SmolLM2-135M, 400 documents (Holm over')
    assert 'tells 1 (EAS) of 1 methods as better than the default and 0 as worse; LAMB' in line


def test_holm_counts_the_policies_of_a_model():
    one = [_judged('default'), _judged('EAS', shift=0.01, seed=5)]
    rest = [_judged(m, seed=k) for k, m in enumerate(('CMA-ES', 'FLAP', 'OWL'), 1)]
    p = lambda tasks: methods.task_gaps(tasks).set_index(['method', 'measure']).holm[
        'EAS', 'accuracy']
    assert np.isclose(p(one + rest), min(1, 4 * p(one)))


def test_tasks_are_asked_of_the_dense_model_and_of_policies(toy, tmp_path, monkeypatch):
    "With as many documents as the study asks for of each; the records are read back by policy"
    monkeypatch.setattr(methods, 'DONE', {'mistral-deep': [(('even FFN cut', 'OWL'), (0.3,), 1)]})
    monkeypatch.setattr(methods, 'LEARNED', {})
    monkeypatch.setattr(methods, 'TASKS_OF', {
        3: {'mistral-deep': {'even FFN cut': (0.3,)}},
        5: {'mistral-deep': {'dense': (0.0,), 'even FFN cut': (0.3,), 'OWL': (0.5,)}}})
    asked = []

    def answer(lab, widths, key, model, order):
        asked.append((key['limit'], widths is None, model))
        return _judged('', limit=key['limit'])['result'] | dict(forward_tokens=1)
    monkeypatch.setattr(methods.allocation, 'measure_zero_shot', answer)
    lab = Lab(tmp_path, 'smoke', runs=tmp_path, work=tmp_path)
    assert count_records(STUDY, lab) == (1, 4)  # a training, which needs none of the others
    run_study(STUDY, lab)
    assert asked == [(5, True, 'mistral-deep'), (3, False, 'mistral-deep'),
                     (5, False, 'mistral-deep')]
    tasks = STUDY.read(tmp_path)[1]
    assert {(r['config']['limit'], *r['about']) for r in tasks} == {
        (5, 'mistral-deep', 'dense', 0.0), (3, 'mistral-deep', 'even FFN cut', 0.3),
        (5, 'mistral-deep', 'even FFN cut', 0.3)}


def test_tasks_of_grasprune_are_those_of_its_own_order(toy, tmp_path, monkeypatch):
    "Which no record has: it is learned again, and then repaired gives the record's loss"
    monkeypatch.setattr(methods, 'DONE', {'mistral-deep': []})
    monkeypatch.setattr(methods, 'LEARNED', {'mistral-deep': ((0.3, 0.5), 1)})
    monkeypatch.setattr(methods, 'TASKS_OF', {5: {'mistral-deep': {'GRASPrune': (0.3,)}}})
    losses = []

    def answer(bench, widths, key):
        repair = bench.sequential(widths, progress=False)
        losses.append(bench.perplexity(widths, bench.text.test, repair).nll.mean())
        return _judged('', limit=key['limit'])['result'] | dict(forward_tokens=7)
    monkeypatch.setattr(methods.allocation, 'judge_tasks', answer)
    run_study(STUDY, Lab(tmp_path, 'smoke', runs=tmp_path, work=tmp_path))
    table, (task,), _ = STUDY.read(tmp_path)
    assert task['about'] == ('mistral-deep', 'GRASPrune', 0.3)
    own = table[(table.method == 'GRASPrune') & (table.sparsity == 0.3)]
    own = own.set_index('calibration').loc['sequential']
    assert np.isclose(losses, own.nll, atol=1e-5).all() and len(losses) == 1
    assert task['result']['alike'] == 1 and tuple(np.ravel(task['result']['widths'])) == own.widths
    assert task['forward_tokens'] == 7 + own.forward_tokens
    (line,) = methods._learned_again([task])
    assert line.endswith('in 1 of 1 policies they ended at the widths of the record.')
    assert methods.cost_of([task]).startswith(f'GRASPrune read {task["forward_tokens"]:,} tokens')
    task['result']['alike'] = 0.25
    (line,) = methods._learned_again([task])
    assert 'in 0 of 1 policies' in line and 'at least 25% of the modules' in line


def test_a_policy_is_repaired_behind_its_norms(toy, tmp_path, monkeypatch):
    "Mistral has none there, so that this is sequential repair to the last digit"
    monkeypatch.setattr(methods, 'DONE', {'mistral-deep': [(('even FFN cut',), (0.3, 0.5), 1)]})
    monkeypatch.setattr(methods, 'LEARNED', {})
    monkeypatch.setattr(methods, 'BEHIND', {'mistral-deep': {'even FFN cut': (0.3,)}})
    lab = Lab(tmp_path, 'smoke', runs=tmp_path, work=tmp_path)
    run_study(STUDY, lab)
    (record,) = read_records(tmp_path / 'methods', 'normed-')  # not of the other target
    assert record['config']['target'] == 'normed' and record['forward_tokens'] > 0
    t = STUDY.read(tmp_path)[0].set_index(['sparsity', 'calibration']).nll
    assert t[0.3, 'normed'] == t[0.3, 'sequential'] != t[0.3, 'static']
    spent = STUDY.read(tmp_path)[0].set_index(['sparsity', 'calibration']).repair_s.dropna()
    assert spent.to_dict() == {(0.3, 'normed'): record['wall_s']}
    assert (0.5, 'normed') not in t


def test_what_a_fit_behind_norms_gains_is_told(made):
    made.add('even FFN cut, greedy', [1.0])
    assert methods._normed(made.table()) == []  # not measured
    for row in made.rows[1:]:
        own = row['method'] == 'default'
        for repair, by in (('static', 0.05), ('normed', (-0.1, -0.2, 0.06)[row['seed']] * own)):
            made.rows.append(row | dict(calibration=repair, nll=row['nll'] + by,
                                        repair_s=90.0 + row['seed']))
    (line,) = methods._normed(made.table())
    assert 'in 2 of 7 policies, by 0.080 (default at 0.5), 0.000 (default, Wanda' in line
    assert 'than static repair in 6.' in line
    assert 'above the default by +1.080 ± 0.424 at 0.5, over seeds.' in line
    assert line.endswith('a repair took 90 to 92 s, beside other runs.')
