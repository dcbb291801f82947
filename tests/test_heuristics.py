"""Allocation heuristics: all families, on budget like the solver, nothing left behind, and errors
that name what is wrong"""
import copy
import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from ffp_nb.core.budget import Cost, InfeasibleBudget, bounds, feasible_range, param_cost, solve
from ffp_nb.core.criteria import unit_order
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import FIVE, KINDS, Layout, tiny_model
from ffp_nb.core.ridge import Calibrator
from ffp_nb.core.stats import collect_stats
from ffp_nb.core.text import Blocks
from ffp_nb.search.heuristics import (
    HEURISTICS, BiasCompensation, Problem, alpha_retention, choose, flap_widths, gate_saliency,
    knapsack, layer_alphas, outlier_share, output_biases, owl_retention, proportional_retention,
    retention_scores, sensitivity_table)
from ffp_nb.search.loop import Evaluator

NAMES = ('gate', 'flap', 'owl', 'alpha', 'sensitivity')


def make_bench(family='llama', step=(1, 8), p_min=0.1, criterion='wanda', dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    text = lambda n: Blocks(torch.randint(0, 211, (n, 24), generator=g), 23)
    model, calibration, search = tiny_model(family).to(dtype), text(5), text(4)
    stats = collect_stats(model, Layout(model), calibration, progress=False)
    elastic = ElasticModel(model, unit_order(Layout(model), stats, criterion))
    stats = stats.permute(elastic.columns)
    static = Calibrator(elastic, stats, 0.1)
    cost, evaluator = param_cost(elastic.layout), lambda: Evaluator(elastic, search, static)
    def problem(sparsity, **kw):
        own = dict(step=step, p_min=p_min) | kw
        return Problem(elastic, stats, cost, calibration, evaluator, sparsity, **own)
    return SimpleNamespace(elastic=elastic, stats=stats, cost=cost, static=static, search=search,
                           calibration=calibration, evaluator=evaluator, problem=problem)


@pytest.fixture(scope='module')
def benches():
    "`benches(family)`, made once: heuristics must leave a bench as it was"
    made = {}
    def get(family):
        if family not in made:
            made[family] = make_bench(family)
        return made[family]
    return get


def on_budget(cost, widths, sigma, step, p_min):
    "At least sigma, within the bounds, and no step still fits"
    lower, upper = bounds(cost, step, p_min)
    assert widths.dtype == np.int64 and (lower <= widths).all() and (widths <= upper).all()
    assert ((widths % step == 0) | (widths == upper)).all()
    spare = (cost.sparsity(widths) - sigma) * cost.dense
    size = np.minimum((widths // step + 1) * step, upper) - widths
    return -1e-6 <= spare < min((cost.unit * size)[widths < upper], default=np.inf)


def test_names():
    assert tuple(HEURISTICS) == NAMES


@pytest.mark.parametrize('family, name', list(itertools.product(FIVE, NAMES)))
def test_on_budget_and_nothing_left_behind(family, name, benches):
    b = benches(family)
    with torch.inference_mode():
        before = b.elastic.model(b.search.ids).logits.clone()
    for sigma in (0.2, 0.5):
        widths, tokens = HEURISTICS[name](b.problem(sigma))
        assert on_budget(b.cost, widths, sigma, (1, 8), 0.1) and isinstance(tokens, int)
        again = HEURISTICS[name](b.problem(sigma))
        assert (again[0] == widths).all() and again[1] == tokens
    assert (np.ptp(widths / b.cost.full, axis=0) > 0).any()  # it has an opinion
    with torch.inference_mode():
        assert torch.equal(b.elastic.model(b.search.ids).logits, before)
    lins = [m.out for m in b.elastic.layout.modules.values()]
    assert not any(lin._forward_hooks or lin._forward_pre_hooks for lin in lins)
    assert not any(p.requires_grad or p.grad is not None for p in b.elastic.model.parameters())


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('step, p_min, sigma', [
    ((2, 32), 0.1, 0.3), ((1, 1), 0, 0.6), ((1, 7), (0.5, 0), 0.4), ((4, 96), 0, 0.5)])
def test_steps_and_bounds_of_the_bench_are_kept(name, step, p_min, sigma, benches):
    b = benches('opt')
    problem = b.problem(sigma, step=step, p_min=p_min, blocks=1)
    assert on_budget(b.cost, HEURISTICS[name](problem)[0], sigma, step, p_min)


@pytest.mark.parametrize('name, options, importance', [
    ('gate', {}, lambda b: gate_saliency(b.elastic.model, b.elastic.layout, b.calibration)[:, 1]),
    ('owl', dict(M=2.0), lambda b: outlier_share(b.elastic.layout, b.stats, 2.0)),
    ('alpha', {}, lambda b: -layer_alphas(b.elastic.layout))])
def test_more_importance_keeps_more(name, options, importance, benches):
    "Layers in the order of what a method measures keep ever more channels"
    b = benches('llama')
    order = np.argsort(importance(b))
    widths = HEURISTICS[name](b.problem(0.4, step=(1, 1)), **options)[0][order, 1]
    assert (np.diff(widths) > 0).all(), widths


def test_sensitivity_reads_blocks_spread_over_the_text(benches):
    b, seen = benches('llama'), []
    class Spy(Evaluator):
        def dense(self, idx):
            seen.append(idx)
            return super().dense(idx)
    spy = lambda: Spy(b.elastic, b.search, b.static)
    problem = replace(b.problem(0.3), evaluator=spy, blocks=2)
    HEURISTICS['sensitivity'](problem, points=1)
    assert seen == [[0, 3]]


@pytest.mark.parametrize('name', NAMES)
def test_impossible_targets(name, benches):
    b = benches('llama')
    with pytest.raises(InfeasibleBudget, match='infeasible'):
        HEURISTICS[name](b.problem(0.97))
    for bad in (-0.1, 1.0, float('nan')):
        with pytest.raises(ValueError, match=r'sparsity'):
            HEURISTICS[name](b.problem(bad))
    assert (b.elastic.widths == b.cost.full).all()


def test_forward_tokens_are_counted(benches, monkeypatch):
    b = benches('llama')
    assert [HEURISTICS[n](b.problem(0.3))[1] for n in ('flap', 'owl', 'alpha')] == [0, 0, 0]
    seen = []
    hook = b.elastic.model.base_model.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].numel()))
    try:
        assert HEURISTICS['gate'](b.problem(0.3), blocks=2)[1] == 3 * sum(seen) == 3 * 48
        seen.clear()
        assert (HEURISTICS['sensitivity'](b.problem(0.3), points=2)[1] == sum(seen) == (1 + 6 * 2)
                * 2 * 24)
    finally:
        hook.remove()


@pytest.mark.parametrize('family', FIVE)
def test_bfloat16(family):
    b = make_bench(family, dtype=torch.bfloat16)
    for name in NAMES:
        assert on_budget(b.cost, HEURISTICS[name](b.problem(0.3))[0], 0.3, (1, 8), 0.1)
    moved = BiasCompensation(b.elastic, b.stats)
    half = b.elastic.at(b.cost.full // 2, moved)
    with output_biases(b.elastic), half, torch.inference_mode():
        low = b.elastic.model(b.search.ids).logits
        want = copy.deepcopy(b.elastic.model).float()(b.search.ids).logits
    assert (low - want).abs().max() < 0.05 * want.abs().max()


def test_every_gate_stands_for_its_own_module():
    "A module that is cut off has a saliency of 0, and no other has"
    for family, (i, j) in itertools.product(FIVE, ((0, 0), (2, 1))):
        model = tiny_model(family)
        layout = Layout(model)
        for p in layout.modules[i, KINDS[j]].out.parameters():
            p.data.zero_()
        s = gate_saliency(model, layout,
                          Blocks(torch.randint(0, 211, (2, 16),
                                               generator=torch.Generator().manual_seed(0)), 15))
        assert np.argwhere(s == 0).tolist() == [[i, j]]


def test_saliency_is_a_mean_over_blocks():
    model = tiny_model()
    layout = Layout(model)
    text = Blocks(torch.randint(0, 211, (3, 16), generator=torch.Generator().manual_seed(0)), 15)
    with torch.inference_mode():
        whole = gate_saliency(model, layout, text)  # a caller's mode does not matter
    np.testing.assert_allclose(whole,
                               np.mean([gate_saliency(model, layout, text[i]) for i in range(3)],
                                       0), rtol=1e-4)


@given(st.integers(0, 10**6), st.floats(0.05, 0.8))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_retentions_come_back(seed, sigma):
    "Widths that the solver chose, given to it as retentions, are chosen again"
    rng = np.random.default_rng(seed)
    cost = Cost(rng.integers(1, 50, (5, 2)) * [[8, 1]], np.tile([6, 64], (5, 1)))
    lo, hi = feasible_range(cost, *bounds(cost, (1, 4)))
    sigma = lo + (hi - lo) * sigma
    widths = solve(rng.normal(size=(5, 2)), cost, sigma, (1, 4))
    sigma = cost.sparsity(widths)  # on budget to the unit
    assert (solve(retention_scores(widths / cost.full, cost, (1, 4)), cost, sigma, (1, 4))
            == widths).all()


@given(st.integers(0, 10**6), st.floats(0, 0.85))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_proportional_retention_is_on_budget_and_in_order(seed, sigma):
    rng = np.random.default_rng(seed)
    cost = Cost(rng.integers(1, 50, (5, 2)), np.tile([6, 64], (5, 1)), fixed=10)
    g = rng.gamma(0.5, size=(5, 2)) + 1e-3
    least = bounds(cost, (1, 4))[0] / cost.full
    if sigma > cost.sparsity(least * cost.full): return
    r = proportional_retention(g, cost, sigma, (1, 4))
    assert (abs(cost.sparsity(cost.full * r) - sigma) < 1e-9 and (least <= r).all()
            and (r <= 1).all())
    for j in range(2):
        assert (np.diff(r[np.argsort(g[:, j]), j]) >= -1e-12).all()


def test_layer_shares_of_owl_and_alpha():
    """More outliers keep more; a larger exponent keeps less; means are exact while nothing is
    clipped"""
    x = np.array([3., 1., 2., 7.])
    for r, sign in ((owl_retention(x, 0.4), 1), (alpha_retention(x, 0.4), -1)):
        assert (r[:, 0] == r[:, 1]).all() and abs(r.mean() - 0.6) < 1e-12
        assert (np.argsort(sign * r[:, 0]) == np.argsort(x)).all()
    assert (0 <= alpha_retention(x, 0.95)).all()


def test_flap_counts_the_cost_of_a_unit(benches):
    "Were channels as dear as heads, the same scores would give other widths; both are on budget"
    b = benches('llama')
    dear = Cost(np.full_like(b.cost.unit, 7), b.cost.full)
    widths = [flap_widths(b.elastic.layout, b.stats, c, 0.4, (1, 1)) for c in (b.cost, dear)]
    assert ((widths[0] != widths[1]).any()
            and all(on_budget(c, w, 0.4, (1, 1), 0.1) for c, w in zip((b.cost, dear), widths)))



def test_lent_biases_go_back_after_an_error(benches):
    em = benches('llama').elastic
    with pytest.raises(RuntimeError, match='stop'):
        with output_biases(em):
            assert all(m.out.bias is not None for m in em.layout.modules.values())
            raise RuntimeError('stop')
    assert (all(m.out.bias is None for m in em.layout.modules.values())
            and em.dense_out((0, 'ffn'))[1] is None)
    assert not any('bias' in n for n, _ in em.model.named_parameters())


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=150, derandomize=True)
def test_choose_is_the_best_choice(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, rng.integers(1, 5))
    losses = [rng.integers(-9, 9, n) / 4 for n in sizes]
    costs = [rng.integers(0, 8, n) for n in sizes]
    capacity = int(rng.integers(0, 25))
    add = lambda table, pick: sum(t[o] for t, o in zip(table, pick))
    fits = [p for p in itertools.product(*map(range, sizes)) if add(costs, p) <= capacity]
    if not fits:
        with pytest.raises(ValueError, match='no choice'):
            choose(losses, costs, capacity)
        return
    pick = choose(losses, costs, capacity)
    assert add(costs, pick) <= capacity and add(losses, pick) == min(add(losses, p) for p in fits)


class Additive:
    "An evaluator whose loss really is additive"
    def __init__(self, full, seed):
        rng = np.random.default_rng(seed)
        self.full, self.weight = full, rng.gamma(1, size=full.shape)
        self.power = rng.uniform(0.5, 3, full.shape)

    def dense(self, idx):
        return np.ones(len(idx))

    def __call__(self, widths, idx):
        return np.full(len(idx), 1 + (self.weight * (1 - widths / self.full)**self.power).sum())


@pytest.mark.parametrize('seed', range(4))
def test_nothing_beats_the_knapsack_where_losses_add_up(seed):
    cost = Cost(np.tile([90, 4], (4, 1)), np.tile([3, 128], (4, 1)))
    ev = Additive(cost.full, seed)
    table = sensitivity_table(ev, cost, [0], (1, 16), points=99)  # every width
    assert (len(table) == 4 * (2 + 7)
            and (table.groupby(['layer', 'kind']).width.nunique() > 1).all())
    widths = knapsack(table, cost, 0.4, (1, 16))
    assert on_budget(cost, widths, 0.4, (1, 16), 0.1)
    best, rng = ev(widths, [0])[0], np.random.default_rng(seed)
    for _ in range(500):
        assert ev(solve(rng.normal(0, 2, (4, 2)), cost, 0.4, (1, 16)), [0])[0] >= best - 1e-9
    coarse = knapsack(table, cost, 0.4, (1, 16), cells=20)
    assert on_budget(cost, coarse, 0.4, (1, 16), 0.1)


def test_a_broken_width_is_avoided():
    cost = Cost(np.tile([90, 4], (2, 1)), np.tile([3, 128], (2, 1)))
    class Broken(Additive):
        def __call__(self, w, idx):
            return super().__call__(w, idx) * (np.nan if w[1, 0] < 3 else 1)
    table = sensitivity_table(Broken(cost.full, 0), cost, [0], (1, 16))
    assert np.isfinite(table.loss).all() and knapsack(table, cost, 0.4, (1, 16))[1, 0] == 3


def test_bad_input_is_named():
    cost = Cost(np.ones((2, 2)), np.full((2, 2), 64))
    with pytest.raises(ValueError, match=r'\(2, 2\), got shape \(3, 2\)'):
        retention_scores(np.ones((3, 2)), cost)
    with pytest.raises(ValueError, match='from 0.5 to 1.5'):
        retention_scores(np.array([[0.5, 1.5]] * 2), cost)
    with pytest.raises(ValueError, match='not all 0'):
        proportional_retention(np.zeros((2, 2)), cost, 0.3)
    with pytest.raises(ValueError, match='points is 0'):
        sensitivity_table(Additive(cost.full, 0), cost, [0], points=0)
    empty = pd.DataFrame(columns=['layer', 'kind', 'width', 'loss'])
    with pytest.raises(ValueError, match='layer 0 attn'):
        knapsack(empty, cost, 0.3)


def test_flap_takes_what_hardly_changes():
    """24 channels of one FFN that never change are the first to go, and the only ones where that is
    enough"""
    b = make_bench()
    n, mean = b.stats.tokens, b.stats.mean((1, 'ffn'))
    b.stats.gram[1,
                 'ffn'] = (n
                           * (torch.outer(mean, mean)
                              + torch.diag(torch.where(torch.arange(96) < 72, 100.0, 0.0))))
    lin = b.elastic.layout.modules[1, 'ffn'].out
    lin.weight.data = torch.ones_like(lin.weight)
    want = b.cost.full.copy()
    want[1, 1] = 72
    assert (flap_widths(b.elastic.layout, b.stats, b.cost, 0.05, (1, 8)) == want).all()


def test_a_projection_without_a_spectrum_is_named():
    model = tiny_model('llama')
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    with pytest.raises(ValueError, match='layer 1 mlp.down_proj: 0 eigenvalues.*another --method'):
        layer_alphas(Layout(model))
