"""From a folder to a smaller folder, for every family: on budget, the same model after loading,
the same again"""
import json
import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_folder, worked
from transformers import AutoModelForCausalLM, AutoTokenizer

from ffp_nb.core import ridge
from ffp_nb.core.budget import bounds, param_cost, solve
from ffp_nb.core.criteria import taylor_scores, unit_order
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import FIVE, Layout, load_model, tiny_model
from ffp_nb.core.perplexity import perplexity
from ffp_nb.core.stats import collect_stats
from ffp_nb.core.text import Blocks, Convention, load_corpus, token_blocks
from ffp_nb.export.hf import load_pruned
from ffp_nb.pipeline import bench as benches, prune
from ffp_nb.pipeline.config import Profile, PruneConfig
from ffp_nb.search import loop, rivals

SIGMA = 0.4
TINY = Profile(32, 4, 2, 8, 4, 1, 2, 2)  # as in the fixture `ffp`
# finer than the command line's 32 channels
SMALL_UNITS = dict(step=(1, 4), profile=TINY, dtype='float32', sparsity=SIGMA)
PAPER = dict(method='ffp', criterion='wanda')  # the way of the paper; without: the default


def base(folder, **options):
    options = dict(profile='smoke', dtype='float32', sparsity=SIGMA) | options
    return ['--model', folder / 'dense', '--text', folder / 'text.txt',
            *(o for k, v in options.items() for o in ('--' + k.replace('_', '-'), v))]


def record(out):
    return json.loads(next(out.glob('prune-*.json')).read_text())


def on_budget(cost, widths, sigma, step=(1, 32)):
    "At least sigma, and no step still fits"
    spare = (cost.sparsity(widths) - sigma) * cost.dense
    upper = bounds(cost, step)[1]
    open_steps = [cost.unit[i, j] * min(step[j], upper[i, j] - widths[i, j])
                  for i, j in np.argwhere(widths < upper)]
    return -1e-6 <= spare < min(open_steps)


def plain_perplexity(model, text, length=TINY.block_len, n=TINY.test_blocks):
    "Of a folder, on the first blocks of the test split of a file: transformers and a loop"
    net = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True, dtype=torch.float32)
    read = AutoTokenizer.from_pretrained(model)
    words = read(load_corpus(str(text))['test'], add_special_tokens=False)['input_ids']
    blocks = [torch.tensor([words[i * length:(i + 1) * length]]) for i in range(n)]
    with torch.inference_mode():
        losses = [net.eval()(ids, labels=ids).loss for ids in blocks]
    return float(torch.stack(losses).mean().exp())


@pytest.mark.parametrize('family, how', [*((f, {}) for f in FIVE), ('llama', PAPER)])
def test_prune_end_to_end(family, how, family_folder, ffp, tmp_path, monkeypatch):
    folder, out, held = family_folder(family), tmp_path / 'out', {}
    save = prune.save_pruned
    def keep(elastic, *a, **kw):  # the model in memory, at the moment that it is saved
        with torch.inference_mode():
            held.update(logits=elastic.model(ids).logits.clone(), dtype=elastic.dtype)
        return save(elastic, *a, **kw)
    monkeypatch.setattr(prune, 'save_pruned', keep)
    ids = torch.randint(0, 211, (2, 17), generator=torch.Generator().manual_seed(0))
    result = worked(ffp('prune', *base(folder, **how), '--out', out, pictures=family == 'llama'))
    table, found = pd.read_csv(out / 'table.csv'), record(out)['result']
    widths = np.array(found['widths'])

    cost = param_cost(Layout(load_model(str(folder / 'dense'), 'float32')[0]))
    assert on_budget(cost, widths, SIGMA)
    ours = table[table.method == how.get('method', 'gradient')]
    assert np.allclose(ours.sparsity, cost.sparsity(widths))
    assert (table.sparsity[table.method != 'dense'] >= SIGMA - 1e-9).all()
    assert list(ours.calibration) == ['none', 'static', 'sequential']
    assert np.allclose(np.log(table.ppl), table.nll, rtol=1e-12, atol=0)
    assert {'dense', 'uniform'} <= set(table.method) and 'sequential' in result.stdout

    model, tokenizer = load_pruned(out / 'model')
    assert model.dtype == torch.float32
    text = load_corpus(str(folder / 'text.txt'))['test']
    dense = load_model(str(folder / 'dense'), 'float32')[1]
    words = dense(text, add_special_tokens=False)['input_ids']
    assert tokenizer(text, add_special_tokens=False)['input_ids'] == words and len(set(words)) > 10
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, held['logits'])
    rep = Layout(load_model(str(folder / 'dense'), 'float32')[0]).q_per_kv
    assert (model.config.pruned_widths
            == [dict(heads=int(a) * rep, kv_heads=int(a), ffn=int(f)) for a, f in widths])
    small = sum(p.numel() for p in model.parameters())
    dense = sum(p.numel() for p in load_model(str(folder / 'dense'), 'float32')[0].parameters())
    assert dense - small == cost.dense - cost.total(
        widths), 'the folder holds what the budget counts'
    card, made = (out / 'model' / 'README.md').read_text(), record(out)['config']
    assert f'{dense:,} parameters before, {small:,} after' in card
    method, criterion = how.values() or ('gradient', 'greedy')
    assert (made['method'], made['criterion']) == (method, criterion)
    assert f'method "{method}", order of the units by the criterion "{criterion}"' in card
    assert method == 'ffp' or 'agent' not in card + found['source']

    seen = {}
    def spy(*a, **kw):
        seen['p'] = perplexity(*a, **kw)
        return seen['p']
    monkeypatch.setattr('ffp_nb.core.perplexity.perplexity', spy)
    worked(ffp('eval', '--model', out / 'model', '--text', folder / 'text.txt', '--dtype',
               'float32', '--block-len', TINY.block_len, '--max-blocks', TINY.test_blocks))
    last = ours[ours.calibration == 'sequential'].iloc[0]
    assert (seen['p'].ppl == pytest.approx(last.ppl, rel=1e-6)
            and seen['p'].mean_nll == pytest.approx(last.nll, rel=1e-7))
    assert plain_perplexity(out / 'model', folder / 'text.txt') == pytest.approx(last.ppl, rel=1e-5)
    if family == 'llama':
        for name in ('retention.png', 'search.png'):
            assert (out / name).read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('family', ['llama', 'opt'])
def test_whole_modules_may_go(family, family_folder, ffp, tmp_path):
    """A target that is out of reach as long as every module keeps a unit; with --remove it is met,
    and the folder loads"""
    folder, out = family_folder(family), tmp_path / 'out'
    options = base(folder, sparsity=0.85)
    result = ffp('prune', *options, '--out', out)
    assert result.exit_code == 1 and 'feasible' in result.stderr
    worked(ffp('prune', *options, '--remove', 'attn', '--remove', 'ffn', '--out', out))
    widths = np.array(record(out)['result']['widths'])
    cost = param_cost(Layout(load_model(str(folder / 'dense'), 'float32')[0]))
    assert (widths == 0).any() and on_budget(cost, widths, 0.85)
    table = pd.read_csv(out / 'table.csv')
    assert (plain_perplexity(out / 'model', folder / 'text.txt')
            == pytest.approx(table.ppl.iloc[-1], rel=1e-5))


def test_no_output_replaces_what_is_read(tmp_path, ffp, monkeypatch):
    "Refused before anything is loaded, whatever the flags"
    mine = tmp_path / 'mine'
    mine.mkdir()
    make_folder(mine)
    shutil.move(mine / 'dense', mine / 'model')
    shutil.copytree(mine / 'model', mine / 'search')
    shutil.copy(mine / 'text.txt', mine / 'table.csv')
    (tmp_path / 'link').symlink_to(mine)
    before = {o: o.read_bytes() for o in tmp_path.rglob('*') if o.is_file()}
    monkeypatch.setattr(benches.Bench, 'load', lambda *a, **kw: pytest.fail('it loads'))
    monkeypatch.setattr('ffp_nb.export.hf.load_model', lambda *a, **kw: pytest.fail('it loads'))
    text = ('--text', mine / 'text.txt')
    for command in (
            ('prune', '--model', mine / 'model', '--out', mine, '--overwrite', *text),
            ('prune', '--model', mine / 'model', '--out', tmp_path / 'link', '--overwrite', *text),
            ('prune', '--model', mine / 'model', '--out', mine / 'model' / '..', '--overwrite',
             *text),
            ('prune', '--model', mine / 'model', '--out', mine / 'model', *text),
            ('search', '--model', mine / 'search', '--out', mine, '--no-resume', *text),
            ('search', '--model', mine / 'model', '--out', mine, '--text', mine / 'table.csv'),
            ('eval', '--model', mine / 'model', '--csv', mine / 'text.txt', *text),
            ('eval', '--model', mine / 'model', '--csv', mine / 'model' / 'config.json', *text)):
        result = ffp(*command)
        assert result.exit_code == 1 and 'read' in result.stderr, command
        assert 'Choose another' in result.stderr and result.stderr.count('\n') == 1
    assert {o: o.read_bytes() for o in tmp_path.rglob('*') if o.is_file()} == before


def test_no_report_replaces_what_is_read(family_folder, tmp_path, ffp, monkeypatch):
    "Neither the pictures of a run, nor a page of the studies"
    out, nbs = tmp_path / 'out', tmp_path / 'nbs'
    worked(ffp('search', *base(family_folder('llama')), '--out', out))
    (nbs / 'studies').mkdir(parents=True)
    (nbs / 'studies' / 'page.ipynb').write_text('{}')
    monkeypatch.setattr('ffp_nb.studies.registry.find_notebooks', lambda *a: nbs)
    monkeypatch.setattr('ffp_nb.studies.registry.write_report', lambda *a: pytest.fail('it works'))
    before = {o: o.read_bytes() for o in tmp_path.rglob('*') if o.is_file()}
    for command in (('report', out, '--out', out), ('report', out / 'search', '--out', out),
                    ('study', 'report', '--out', nbs / 'studies' / 'page.ipynb')):
        result = ffp(*command)
        assert result.exit_code == 1 and 'Choose another' in result.stderr, command
    assert {o: o.read_bytes() for o in tmp_path.rglob('*') if o.is_file()} == before


def test_overwrite_replaces_saved_models_only(tiny_folder, ffp, monkeypatch):
    out = tiny_folder / 'out'
    (out / 'model').mkdir(parents=True)
    (out / 'model' / 'thesis.tex').write_text('x')
    monkeypatch.setattr(benches.Bench, 'load', lambda *a, **kw: pytest.fail('it loads'))
    result = ffp('prune', *base(tiny_folder), '--out', out, '--overwrite')
    assert result.exit_code == 1 and 'no model that was saved by ffp_nb' in result.stderr
    assert (out / 'model' / 'thesis.tex').read_text() == 'x'


def test_the_table_says_what_folders_give(family_folder, ffp, tmp_path):
    "The dense model and the two uniform policies, each measured on its own folder"
    folder, found = family_folder('llama'), {}
    for method in ('uniform-ffn', 'uniform'):
        worked(ffp('prune', *base(folder, method=method, calibration='static'), '--out',
                   tmp_path / method))
        table = pd.read_csv(tmp_path / method / 'table.csv')
        assert (set(table.method) == {'dense', 'uniform', 'uniform-ffn'}
                and table.calibration[table.method == method].tolist() == ['none', 'static'])
        rows = table[(table.calibration == 'static') | (table.method == 'dense')]
        found[method] = rows.set_index('method').ppl
    pd.testing.assert_series_equal(*(p.sort_index() for p in found.values()))
    models = {m: tmp_path / m / 'model' for m in found} | dict(dense=folder / 'dense')
    for method, model in models.items():
        assert (plain_perplexity(model, folder / 'text.txt')
                == pytest.approx(found['uniform'][method], rel=1e-5)), method


def test_settings_reach_rewards_and_repair(family_folder, tmp_path):
    "The folder is the model that the parts of `core` make of the widths, with these settings"
    folder = family_folder('opt')
    config = PruneConfig(str(folder / 'dense'), str(folder / 'text.txt'), method='ffp',
                         criterion='wanda', alpha=0.5, sequential_alpha=0.2, **SMALL_UNITS)
    table = prune.prune(config, tmp_path / 'out', progress=False)
    widths = np.array(record(tmp_path / 'out')['result']['widths'])
    model, tokenizer = load_model(str(folder / 'dense'), 'float32')
    corpus = load_corpus(str(folder / 'text.txt'))
    cut = lambda split, n=None: token_blocks(corpus[split], tokenizer, Convention(32, 32), n)
    calibration, layout = cut('calibration', TINY.calibration_blocks), Layout(model)
    stats = collect_stats(model, layout, calibration, progress=False)
    em = ElasticModel(model, unit_order(layout, stats))
    static = ridge.Calibrator(em, stats.permute(em.columns), 0.5)
    fitted, other = (ridge.sequential_calibrate(em, widths, calibration[:TINY.sequential_blocks],
                                                0.2, static, target, progress=False)
                     for target in ('residual', 'module'))
    saved, _ = load_pruned(tmp_path / 'out' / 'model')
    test = cut('test', TINY.test_blocks)
    ours = table[table.method == 'ffp'].ppl
    for ppl, weights in zip(ours, (None, static, fitted), strict=True):
        with em.at(widths, weights):
            assert perplexity(em.model, test).ppl == pytest.approx(ppl, rel=1e-5)
    with em.at(widths, fitted), torch.inference_mode():
        torch.testing.assert_close(saved(test.ids).logits, em.model(test.ids).logits, rtol=1e-4,
                                   atol=1e-4)
    # rewards: the search split, the static repair
    text, log = cut('search'), (tmp_path / 'out' / 'search' / 'policies.jsonl').read_text()
    for row in map(json.loads, log.splitlines()[-2:]):
        nll = [0, 0]
        for i, (w, weights) in enumerate(((layout.full, None), (np.array(row['widths']), static))):
            with em.at(w, weights):
                nll[i] = perplexity(em.model, text[row['blocks']]).mean_nll
        assert row['reward'] == pytest.approx(np.exp(nll[0] - nll[1]), rel=1e-5)
    # the other target; what several policies share is what one of them would compute
    bench = benches.Bench.load(replace(config, sequential_target='module'), progress=False)
    own = bench.sequential(widths, False).weights
    given = bench.sequential(widths, False, goals=bench.goals).weights
    for key, (w, _) in own.items():
        assert torch.equal(w, given[key][0])
        torch.testing.assert_close(w, other.weights[key][0], rtol=1e-4, atol=1e-4)


def test_opt_is_calibrated_with_intercept(family_folder, tmp_path, monkeypatch):
    "Biases of the saved OPT are the regression's, not the dense ones; static and sequential"
    folder, fits = family_folder('opt'), []
    refit = ridge._refit
    monkeypatch.setattr(ridge, '_refit', lambda *a: fits.append(a[3] is not None) or refit(*a))
    dense = Layout(load_model(str(folder / 'dense'), 'float32')[0])
    for calibration in ('none', 'static', 'sequential'):
        config = PruneConfig(str(folder / 'dense'), str(folder / 'text.txt'), method='uniform',
                             calibration=calibration, **SMALL_UNITS)
        prune.prune(config, tmp_path / calibration, progress=False)
        model, _ = load_pruned(tmp_path / calibration / 'model')
        bench = benches.Bench.load(config, progress=False)
        widths = benches.find_widths(bench)[0]
        assert fits == [True] * 2 * dense.n_layers * (calibration == 'sequential')
        final = bench.sequential(widths, False) if calibration == 'sequential' else bench.static
        for i, layer in enumerate(model.model.decoder.layers):
            for lin, kind, j in ((layer.self_attn.out_proj, 'attn', 0), (layer.fc2, 'ffn', 1)):
                was, same = dense.modules[i, kind].out.bias, calibration == 'none'
                assert torch.equal(lin.bias, was) == same
                if calibration != 'none':
                    W, b = final(i, kind, int(widths[i, j]))
                    assert torch.equal(lin.weight, W) and torch.equal(lin.bias, b)


def test_static_intercept_keeps_the_mean_output(family_folder):
    "Ridge with intercept leaves no bias on the text that it was fitted on"
    folder = family_folder('opt')
    bench = benches.Bench.load(PruneConfig(str(folder / 'dense'), str(folder / 'text.txt'),
                                         method='uniform', **SMALL_UNITS), progress=False)
    for (i, kind), m in bench.elastic.layout.modules.items():
        W, b = bench.elastic.dense_out((i, kind))
        mean = bench.stats.mean((i, kind))
        Wk, bk = bench.static(i, kind, m.units // 2)
        torch.testing.assert_close(Wk @ mean[:Wk.shape[1]] + bk, W @ mean + b, rtol=1e-3, atol=1e-4)


def test_taylor_order_comes_from_gradients(family_folder, ffp, tmp_path):
    "The bench sorts by gradients of the dense model, and the command line has the criterion"
    folder = family_folder('llama')
    paths = str(folder / 'dense'), str(folder / 'text.txt')
    config = lambda name: PruneConfig(*paths, method='uniform', criterion=name, **SMALL_UNITS)
    load = lambda name: benches.Bench.load(config(name), progress=False)
    bench, other = load('taylor'), load('wanda')
    model = load_model(str(folder / 'dense'), 'float32')[0]
    scores = taylor_scores(model, layout := Layout(model),
                           bench.text.calibration[:benches.TAYLOR_BLOCKS], progress=False)
    for key, m in layout.modules.items():
        sorted_units = bench.elastic.columns[key][::m.cols] // m.cols
        assert torch.equal(sorted_units, scores[key].argsort(descending=True, stable=True))
    assert any(not torch.equal(c, other.elastic.columns[k])
               for k, c in bench.elastic.columns.items())
    worked(ffp('prune', *base(folder, method='uniform', criterion='taylor'), '--out',
               tmp_path / 'out', pictures=False))
    assert record(tmp_path / 'out')['config']['criterion'] == 'taylor'


@pytest.mark.parametrize('method', ['gradient', 'ffp', 'random-search', 'random'])
def test_seeds(family_folder, tmp_path, method):
    "The same seed gives the same widths, another seed others; all on budget"
    folder, found = family_folder('llama'), []
    for i, seed in enumerate((3, 3, 4)):
        config = PruneConfig(str(folder / 'dense'), str(folder / 'text.txt'), method=method,
                             seed=seed, **SMALL_UNITS)
        bench = benches.Bench.load(config, progress=False)
        widths, result = benches.find_widths(bench, run=benches.open_run(tmp_path / str(i), bench),
                                           progress=False)
        assert (on_budget(bench.cost, widths, SIGMA, config.step)
                and abs(bench.cost.sparsity(widths) - SIGMA) < 0.01)
        found.append((widths, [r['scores'] for r in result.log] if result else widths.tolist()))
    assert np.array_equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert not np.array_equal(found[0][0], found[2][0]) and found[0][1] != found[2][1]


def test_same_command_same_files(family_folder, ffp, tmp_path):
    folder = family_folder('qwen2')
    for name in 'ab':
        worked(ffp('prune', *base(folder), '--out', tmp_path / name))
    for name in ('table.csv', 'search/policies.jsonl', 'model/config.json',
                 'model/model.safetensors'):
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes(), name
    a, b = (record(tmp_path / o) for o in 'ab')
    assert a['config_id'] == b['config_id'] and a['forward_tokens'] == b['forward_tokens'] > 0
    strip = lambda r: {**r['result'],
                       'updates': [{k: v for k, v in u.items() if k != 'wall_s'}
                                   for u in r['result']['updates']]}
    assert strip(a) == strip(b)


@pytest.fixture
def steps(monkeypatch):
    "Counts the updates that searches do"
    step, done = loop.Search.step, []
    monkeypatch.setattr(loop.Search, 'step', lambda self: done.append(self.update) or step(self))
    return done


@pytest.mark.parametrize('how, rows', [({}, 2), (PAPER, TINY.episodes)])
def test_resume_and_no_resume(family_folder, ffp, tmp_path, steps, how, rows):
    folder, out = family_folder('llama'), tmp_path / 'out'
    command = base(folder, **how)
    worked(ffp('search', *command, '--out', out))
    assert steps == [0, 1]
    log = (out / 'search' / 'policies.jsonl').read_bytes()
    widths = (out / 'widths.json').read_bytes()
    assert len(log.splitlines()) == rows
    worked(ffp('search', *command, '--resume', '--out', out))
    worked(ffp('prune', *command, '--out', out))  # the same search serves it
    assert steps == [0, 1]
    assert ((out / 'search' / 'policies.jsonl').read_bytes() == log
            and (out / 'widths.json').read_bytes() == widths)
    assert record(out)['result']['widths'] == json.loads(widths)['widths']
    worked(ffp('search', *command, '--no-resume', '--out', out))
    assert steps == [0, 1, 0, 1]
    assert (out / 'search' / 'policies.jsonl').read_bytes() == log  # the same seed
    assert (out / 'search' / 'old-1' / 'policies.jsonl').read_bytes() == log
    worked(ffp('search', *base(folder, **how, seed=1), '--no-resume', '--out', out))
    assert steps == [0, 1] * 3 and (out / 'search' / 'policies.jsonl').read_bytes() != log


@pytest.mark.parametrize('how', [{}, PAPER])
def test_interrupted_by_the_user(family_folder, ffp, tmp_path, steps, monkeypatch, how):
    "Ctrl-C after the first update: status 130, a line, and the same command goes on"
    command = base(family_folder('llama'), **how)
    worked(ffp('search', *command, '--out', tmp_path / 'whole'))
    searcher, asked = rivals.SEARCHERS[how.get('method', 'gradient')], []
    ask = searcher.ask
    def interrupted(self, *a):
        asked.append(1)
        if len(asked) == 2: raise KeyboardInterrupt
        return ask(self, *a)
    with monkeypatch.context() as m:
        m.setattr(searcher, 'ask', interrupted)
        result = ffp('search', *command, '--out', tmp_path / 'out')
    assert (result.exit_code == 130 and 'goes on from the last finished' in result.stderr
            and 'Traceback' not in result.output)
    worked(ffp('search', *command, '--out', tmp_path / 'out'))
    assert steps == [0, 1, 0, 1, 1]
    for name in ('out', 'whole'):  # and so is what is made of it
        worked(ffp('prune', *command, '--out', tmp_path / name))
    for name in ('search/policies.jsonl', 'widths.json', 'table.csv', 'model/model.safetensors'):
        assert (tmp_path / 'out' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()


def test_another_repair_uses_the_same_search(family_folder, ffp, tmp_path, steps):
    "Changing only the calibration of the saved model searches nothing"
    folder, out = family_folder('mistral'), tmp_path / 'out'
    worked(ffp('prune', *base(folder), '--out', out))
    first = pd.read_csv(out / 'table.csv')
    worked(ffp('prune', *base(folder, calibration='static'), '--overwrite', '--out', out))
    unlike = plain_perplexity(out / 'model', folder / 'text.txt')
    second = pd.read_csv(out / 'table.csv')
    assert steps == [0, 1] and len(list(out.glob('prune-*.json'))) == 2
    assert list(second.calibration[second.method == 'gradient']) == ['none', 'static']
    pd.testing.assert_frame_equal(second,
                                  first[first.calibration != 'sequential'].reset_index(drop=True))
    assert unlike == pytest.approx(second.ppl.iloc[-1], rel=1e-5)


def test_a_moved_text_is_another_configuration_only_if_it_differs(tmp_path, ffp):
    """The hash of the text is part of a run's configuration: an edited file does not go on with the
    old search"""
    folder, out = make_folder(tmp_path), tmp_path / 'out'
    worked(ffp('search', *base(folder), '--out', out))
    shutil.copy(folder / 'text.txt', folder / 'copy.txt')
    shutil.move(folder / 'copy.txt', folder / 'text.txt')
    worked(ffp('search', *base(folder), '--out', out))
    text = (folder / 'text.txt').read_text()
    (folder / 'text.txt').write_text('w3 w4 w5\n\n' + text)
    result = ffp('search', *base(folder), '--out', out)
    assert result.exit_code == 1 and 'text_sha256' in result.stderr


def test_changed_weights_under_the_same_name_are_noticed(tmp_path, ffp):
    "A folder that holds another model now must not go on with the old model's search"
    from ffp_nb.core.families import tiny_model
    folder, out = make_folder(tmp_path), tmp_path / 'out'
    worked(ffp('search', *base(folder), '--out', out))
    tiny_model('llama', seed=2).save_pretrained(folder / 'dense')
    result = ffp('search', *base(folder), '--out', out)
    assert result.exit_code == 1 and 'another configuration' in result.stderr


def test_zero_shot_and_export_from_the_shell(family_folder, ffp, tmp_path):
    """`ffp eval --tasks` gives what `zero_shot` gives on the saved folder; `ffp export` says why it
    cannot"""
    from ffp_nb.pipeline.tasks import zero_shot
    folder, out, rng = family_folder('opt'), tmp_path / 'out', np.random.default_rng(0)
    worked(ffp('prune', *base(folder, method='uniform', calibration='static'), '--out', out))
    (tmp_path / 'zero-shot').mkdir()
    words = lambda n: ' '.join(f'w{i}' for i in rng.integers(3, 211, n))
    docs = [dict(query=f'Question: {words(5)}\n', choices=[words(2), words(3)], gold=i % 2)
            for i in range(6)]
    (tmp_path / 'zero-shot' / 'piqa.jsonl').write_text('\n'.join(map(json.dumps, docs)))
    options = ('--model', out / 'model', '--dtype', 'float32', '--data', tmp_path,
               '--csv', tmp_path / 'table.csv')
    result = worked(ffp('eval', *options, '--tasks', 'piqa', '--limit', 4))
    table = pd.read_csv(tmp_path / 'table.csv')
    want = zero_shot(*load_pruned(out / 'model'), 'piqa', limit=4, data=tmp_path, progress=False)
    pd.testing.assert_frame_equal(table.drop(columns='model'), want, check_dtype=False,
                                  check_exact=False)
    assert 'piqa' in result.stdout and table.documents.iloc[0] == 4
    for bad, message in (('boolq', 'boolq.jsonl'), ('chess', 'lambada_openai')):
        result = ffp('eval', *options, '--tasks', bad)
        assert result.exit_code == 1 and message in result.stderr
    result = ffp('export', out / 'model', '--gguf', tmp_path / 'x.gguf')
    assert (result.exit_code == 1 and 'llama.cpp has no architecture' in result.stderr
            and not (tmp_path / 'x.gguf').exists())


def test_a_lost_massive_activation_is_told_and_nothing_else_is_lost(
        family_folder, tmp_path, monkeypatch):
    "A model is saved whatever the check finds; the record, the card and a warning agree"
    folder = family_folder('llama')
    config = PruneConfig(str(folder / 'dense'), str(folder / 'text.txt'), method='uniform-ffn',
                         calibration='none', **SMALL_UNITS)
    prune.prune(config, tmp_path / 'none', progress=False)
    assert 'first_token' not in record(tmp_path / 'none')['result']  # nothing is massive here
    monkeypatch.setattr(prune, 'MASSIVE', 0)
    monkeypatch.setattr(prune, 'LOST', 1e9)  # so everything is lost
    with pytest.warns(UserWarning, match='As the first of a text, 100.0% of the test text'):
        prune.prune(config, tmp_path / 'lost', progress=False)
    found = record(tmp_path / 'lost')['result']['first_token']
    assert found['lost'] == 1 and 0 < found['bos'] < 10
    said = (tmp_path / 'lost' / 'model' / 'README.md').read_text()
    assert 'lose the massive activation, and the model may break down on what follows.' in said
    def full(*a):
        raise torch.OutOfMemoryError
    monkeypatch.setattr(prune, 'first_norms', full)
    with pytest.warns(UserWarning, match='the first token is not checked: the device has no room'):
        prune.prune(config, tmp_path / 'full', progress=False)
    assert (tmp_path / 'full' / 'model' / 'config.json').is_file()


@pytest.mark.parametrize('way', ['the bench', 'the tokenizer'])
def test_where_texts_begin_with_bos_only_that_is_checked(bench, monkeypatch, way):
    widths, own = bench.cost.full, bench.tokenizer
    monkeypatch.setattr(prune, 'MASSIVE', 0)
    found = prune.check_first(bench, widths, None)
    assert found['tokens'] == len(bench.text.test.ids.unique()) > 1 and found['bos'] == 1
    if way == 'the bench':
        monkeypatch.setattr(bench.text, 'convention', replace(bench.text.convention, bos=True))
    else:
        class Own:
            bos_token, bos_token_id = own.bos_token, own.bos_token_id
            def __call__(self, text):
                return dict(input_ids=[self.bos_token_id, *own(text)['input_ids']])
        monkeypatch.setattr(bench, 'tokenizer', Own())
    assert prune.check_first(bench, widths, None) == dict(lost=0, tokens=1, bos=1)
    say = lambda kept: prune.say_first(bench.tokenizer, way == 'the bench',
                                       dict(lost=1.0, tokens=1, bos=kept))
    assert say(0.1).startswith(
        f'Behind {own.bos_token} the model keeps 10% of the massive activation')
    assert 'keeps 0% of' in say(float('nan'))


def test_a_late_layer_does_not_hide_what_is_lost(bench, monkeypatch):
    "What counts is the layer at which the dense model's first token is largest"
    monkeypatch.setattr(prune, 'residual_norms', lambda model, ids: torch.tensor(
        [[10.0, 1, 1], [2000, 1, 1], [1999, 900, 900]])[:, None])
    norms = iter([np.full(9, 2000.0), np.full(9, 50.0)])
    asked = []
    monkeypatch.setattr(prune, 'first_norms', lambda model, tokens, layer: asked.append(layer)
                        or next(norms)[:len(tokens)])
    monkeypatch.setattr(prune, 'FIRST', 8)
    assert prune.check_first(bench, bench.cost.full, None)['lost'] == 1
    assert asked == [1, 1]


def test_a_cache_knows_how_text_is_cut_and_what_the_model_computes(tmp_path):
    model = tiny_model('llama')
    layout = Layout(model)
    ids = torch.randint(0, 211, (4, 32), generator=torch.Generator().manual_seed(0))
    gram = lambda ids: benches.cached_stats(model, layout, Blocks(ids, ids.shape[1] - 1), 1,
                                            tmp_path, progress=False).gram[1, 'ffn']
    once = gram(ids)
    assert torch.equal(gram(ids), once) and len([*tmp_path.iterdir()]) == 1
    assert not torch.allclose(gram(ids.view(2, 64)), once)  # the same tokens in longer blocks
    model.config.rms_norm_eps = 1.0
    gram(ids)
    assert len([*tmp_path.iterdir()]) == 3


def test_a_cache_survives_a_lack_of_memory(tmp_path, monkeypatch):
    make = lambda: dict(x=torch.ones(3))
    benches._kept(tmp_path, 'stats', b'key', make)
    (path,) = tmp_path.iterdir()
    def fail(*a, **kw):
        raise MemoryError
    with monkeypatch.context() as m, pytest.raises(MemoryError):
        m.setattr(torch, 'load', fail)
        benches._kept(tmp_path, 'stats', b'key', make)
    assert path.exists()
    path.write_bytes(b'cut off')  # what cannot be read is made again
    assert torch.equal(benches._kept(tmp_path, 'stats', b'key', make)['x'], torch.ones(3))


@pytest.mark.parametrize('family', ['llama', 'qwen3', 'olmo2'])
def test_the_card_counts_what_is_in_the_folder(family, tmp_path, monkeypatch):
    "Removed modules are stored as zeros; some have norms of their own"
    make_folder(tmp_path, family)
    monkeypatch.chdir(tmp_path)
    config = PruneConfig(str(tmp_path / 'dense'), 'text.txt', 0.3, 'uniform', criterion='wanda',
                         calibration='none', profile=TINY, dtype='float32')
    size = lambda m: sum(p.numel() for p in m.parameters())
    dense = load_model(str(tmp_path / 'dense'), 'float32')[0]
    full = Layout(dense).full
    gone = full.copy()
    gone[1, 0] = gone[2, 1] = 0
    for widths, out in ((gone, 'gone'), (np.maximum(full // 2, 1), 'half')):
        monkeypatch.setattr(prune, 'find_widths', lambda *a, **kw: (widths, None))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            prune.prune(config, tmp_path / out, progress=False)
        card = (tmp_path / out / 'model' / 'README.md').read_text()
        held = size(load_pruned(tmp_path / out / 'model')[0])
        assert f'{size(dense):,} parameters before, {held:,} after' in card
        zeros = Layout(dense).unit_params[1, 0] + Layout(dense).unit_params[2, 1]
        assert (f'zeros each: {zeros:,} parameters' in card) == (out == 'gone')
        said = [w for w in map(str, (w.message for w in said)) if 'zeros that stand for' in w]
        assert [w.split(' param')[0] for w in said] == (
            [f'{zeros:,} of the {held:,}'] if out == 'gone' and zeros > 0.01 * held else [])
        assert out == 'half' or said or family != 'olmo2'


def test_widths_by_the_clock_keep_what_the_search_kept(monkeypatch):
    "With --remove the search may find that no module should go; the clock does not undo that"
    cost = param_cost(Layout(tiny_model('llama')))
    scores = np.zeros(cost.full.shape)
    scores[1] = -9  # by its scores alone, layer 1 would go
    config = SimpleNamespace(step=(1, 8), p_min=(0.0, 0.0), sparsity=0.4)
    chosen = solve(scores, cost, 0.4, (1, 8), (1e-9, 1e-9))
    gone = solve(scores, cost, 0.4, (1, 8), (0.0, 0.0))
    assert (chosen > 0).all() and not (gone > 0).all()
    bench = SimpleNamespace(config=config, cost=cost, elastic=None, price=SimpleNamespace(
        budget=SimpleNamespace(kind='latency', context=8, batch=1)))
    monkeypatch.setattr(benches, 'prefill_of', lambda *a: None)
    monkeypatch.setattr(benches, 'settle', lambda measure, at, full, s, limits: (at(s), []))
    of = lambda widths: benches.settled(
        bench, widths, SimpleNamespace(scores=scores, widths=widths))[0]
    assert (of(chosen) == chosen).all()
    assert (of(gone) == gone).all()  # what it removed stays removed
