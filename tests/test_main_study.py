"""Cells of the main study: every method and variant runs, keeps the budget, and is measured once;
the tables read what is there"""

import numpy as np
import pytest

from ffp_nb.core.budget import InfeasibleBudget
from ffp_nb.core.runs import RunDir, cached
from ffp_nb.search.heuristics import HEURISTICS
from ffp_nb.search.rivals import searcher_settings
from ffp_nb.studies import cells
from ffp_nb.studies.cells import (
    VARIANTS, Cell, Facts, Lab, against, cell_settings, clip_in_order, cost_table, fit_episodes,
    plan_cells, plan_selection, planned_tokens, read_cells, read_traces, run_cell, trace_cell)
from ffp_nb.studies.searchers import study_cells
from ffp_nb.studies.study import walk


def run(bench, folder, *a, **kw):
    return run_cell(bench, Cell('toy', *a, **kw), folder / 'records', folder / 'work')


def method_of(variant):
    "The first method whose searcher has the settings of the variant"
    own = VARIANTS[variant].get('agent', {}).keys()
    return next(m for m in ('ffp', 'gradient', 'pathwise')
                if own <= searcher_settings(m, {}).keys())


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_variant_runs_on_budget_and_leaves_the_bench_alone(bench, tmp_path, variant):
    before = bench.config
    r = run(bench, tmp_path, 0.4, method_of(variant), variant=variant, modes=('static',))
    assert bench.config == before
    widths = np.array(r['result']['widths'])
    step = (bench.cost.unit * [1, 8]).max() / bench.cost.dense
    assert -1e-9 <= bench.cost.sparsity(widths) - 0.4 < (step if variant != 'clip' else 1)
    assert r['config']['profile']['batch'] == dict(batch8=8, batch32=32).get(variant, 4)
    assert (r['result']['before'] > 0) == (variant in ('warm', 'transfer', 'refine'))
    assert (len(r['result']['nll']['static']) == 4
            and r['result']['forward_tokens'] > r['result']['before'])


@pytest.mark.parametrize('method', ['ffp', 'random-search', 'eas', 'cma', 'tpe', 'ddpg'])
def test_a_killed_search_of_any_method_goes_on_to_the_same_record(bench, tmp_path, monkeypatch,
                                                                  method):
    whole = run(bench, tmp_path / 'a', 0.4, method, modes=('static',))
    save = RunDir.save_checkpoint
    def killed(self, state):
        save(self, state)
        raise KeyboardInterrupt
    monkeypatch.setattr(RunDir, 'save_checkpoint', killed)
    with pytest.raises(KeyboardInterrupt):
        run(bench, tmp_path / 'b', 0.4, method, modes=('static',))
    assert not list((tmp_path / 'b').glob('records/*.json'))
    monkeypatch.setattr(RunDir, 'save_checkpoint', save)
    again = run(bench, tmp_path / 'b', 0.4, method, modes=('static',))
    found = lambda r: r['result'] | r['result']['search']
    same = lambda r: [found(r)[k] for k in ('widths', 'nll', 'forward_tokens', 'scores', 'reward')]
    assert same(again) == same(whole)


@pytest.mark.parametrize('method', HEURISTICS)
def test_heuristics_are_cells_too(bench, tmp_path, method):
    modes = ('none', 'static', 'sequential') + ('bias',) * (method == 'flap')
    r = run(bench, tmp_path, 0.4, method, modes=modes)
    assert tuple(r['result']['nll']) == modes and 'search' not in r['result']
    assert r['result']['sparsity'] >= 0.4
    if method == 'flap':
        assert r['result']['nll']['bias'] != r['result']['nll']['none']


def test_a_cell_is_measured_once(bench, tmp_path, monkeypatch):
    first = run(bench, tmp_path, 0.4, modes=('static',))
    monkeypatch.setattr(cells, '_searched', lambda *a: pytest.fail('searched again'))
    assert run(bench, tmp_path, 0.4, modes=('static',)) == first
    with pytest.raises(pytest.fail.Exception):
        run(bench, tmp_path, 0.4, seed=1, modes=('static',))


def test_equal_tokens(bench):
    pool = len(bench.text.search)
    for variant in ('default', 'none', 'batch8'):
        c = cell_settings(Cell('toy', 0.4, variant=variant, tokens=20_000), Facts.of(bench))
        assert 0.8 * 20_000 < planned_tokens(c, pool) <= 20_000
    # what is planned is an upper bound: blocks that come twice have their dense reference once
    from ffp_nb.search.loop import Search
    used = Search(bench.evaluator(), bench.cost,
                  c.search_config()).run(progress=False).forward_tokens
    assert 0.9 * planned_tokens(c, pool) < used <= planned_tokens(c, pool)
    with pytest.raises(ValueError, match='10 forward tokens; two updates need'):
        fit_episodes(bench.config, 10, pool)


def test_traces_and_selection(bench, tmp_path):
    records = tmp_path / 'records'
    found = [run(bench, tmp_path, 0.4, m, seed, v, modes=('static',))
             for m in ('ffp', 'random-search', 'eas') for seed in (0, 1)
             for v in ('default', 'none')]
    for r in found:
        t = trace_cell(bench, r, records, points=3, blocks=2)
        assert t.forward_tokens.is_monotonic_increasing and np.isfinite(t.nll).all() and len(t)
    # the last guess of the agent, measured by hand
    guess = np.array(found[0]['result']['search']['updates'][-1]['guess'])
    by_hand = bench.perplexity(guess, bench.text.selection[:2], bench.static).mean_nll
    assert (trace_cell(bench, found[0], records, points=3, blocks=2).nll.iloc[-1]
            == pytest.approx(by_hand))
    table = read_cells(records)
    assert len(table) == len(found) and set(table.policy) == {'ffp', 'random-search', 'eas'}
    cost = cost_table(against(read_traces(table, records), 'eas', 'none'))
    own = cost.set_index(['policy', 'variant']).loc[('eas', 'none')]
    assert own.times_cheaper == own.low == own.high == 1 and own.behind == 0
    lab = Lab(profile='smoke')  # 2 final blocks
    seen = []  # the criterion decides the order that widths are read in
    lab.bench = lambda model, criterion: seen.append(criterion) or bench
    [r] = walk(plan_selection(lab, 'toy', found, 'greedy'),
               lambda wanted: cached(records, wanted.config, lambda _: wanted.measure(records)))
    assert {*seen} == {'greedy'}
    s = {k: np.mean(v) for k, v in r['result'].items()}
    by_hand = bench.perplexity(np.array(found[1]['result']['widths']), bench.text.selection[:2],
                               bench.static).mean_nll
    assert (s[found[1]['config_id']] == pytest.approx(by_hand, abs=1e-4)
            and len(s) == len({r['config_id'] for r in found}))


def test_clipping_serves_the_first_modules_and_never_overspends(bench):
    rng = np.random.default_rng(0)
    for sparsity in (0.1, 0.4, 0.6):
        for scale in (0.1, 1, 5):
            w = clip_in_order(rng.normal(size=bench.cost.full.shape) * scale, bench.cost, sparsity,
                              (1, 8))
            assert bench.cost.sparsity(w) >= sparsity - 1e-9
    with pytest.raises(InfeasibleBudget, match='0.95'):
        clip_in_order(np.zeros(bench.cost.full.shape), bench.cost, 0.95, (1, 8))
    greedy = clip_in_order(np.full(bench.cost.full.shape, 9.0), bench.cost, 0.5, (1, 8))
    assert (greedy[0] == bench.cost.full[0]).all() and greedy[-1, 1] < bench.cost.full[-1, 1]


def test_bad_cells():
    with pytest.raises(ValueError, match="variant 'fancy'; expected one of default"):
        Cell('m', 0.3, variant='fancy')
    with pytest.raises(ValueError, match='expected some of none, static'):
        Cell('m', 0.3, modes=('lora',))
    assert len({c.name for c in study_cells()}) == len(study_cells())
    with pytest.raises(KeyError):
        next(plan_cells(Lab(profile='huge'), [Cell('opt', 0.3)]))
