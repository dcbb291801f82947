"""GRASPrune: its projection against a slow one, gradients against differences, all families, exact
budgets, and a model that is left as it was"""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from test_workers import split

from ffp_nb.core.budget import Cost, InfeasibleBudget, bounds, param_cost, solve
from ffp_nb.core.criteria import unit_order
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import FIVE, KINDS, Layout, load_model, tiny_model
from ffp_nb.core.perplexity import block_loss, perplexity
from ffp_nb.core.ridge import Calibrator
from ffp_nb.core.stats import collect_stats
from ffp_nb.core.text import Blocks
from ffp_nb.search import gates
from ffp_nb.search.gates import ScaledWeights, gated, grasprune, project, straight_through
from ffp_nb.search.heuristics import BASELINES, HEURISTICS, Problem, step_widths
from ffp_nb.search.loop import Evaluator
from ffp_nb.search.rivals import SEARCHERS


def make_bench(family='llama', criterion='wanda', dtype=torch.float32, model=None):
    g = torch.Generator().manual_seed(0)
    text = lambda n: Blocks(torch.randint(0, 211, (n, 24), generator=g), 23)
    model, calibration, search = model or tiny_model(family).to(dtype), text(5), text(4)
    layout = Layout(model)
    stats = collect_stats(model, layout, calibration, progress=False)
    elastic = ElasticModel(model, unit_order(layout, stats, criterion))
    stats = stats.permute(elastic.columns)
    static, cost = Calibrator(elastic, stats, 0.1), param_cost(elastic.layout)
    evaluator = lambda: Evaluator(elastic, search, static)
    def problem(sparsity=0.4, **kw):
        own = dict(step=(1, 8)) | kw
        return Problem(elastic, stats, cost, calibration, evaluator, sparsity, **own)
    return SimpleNamespace(elastic=elastic, cost=cost, static=static, search=search,
                           problem=problem)


def fresh(family, found, dtype=torch.float32):
    "The dense model again, sorted by what was learned"
    return ElasticModel(tiny_model(family).to(dtype), found.order)


def state(elastic):
    "Everything of a model that a method might leave changed"
    return [t.clone() for t in elastic.model.state_dict().values()], elastic.widths.copy()


def unchanged(elastic, before):
    tensors, widths = state(elastic)
    assert all(map(torch.equal, tensors, before[0])) and (widths == before[1]).all()
    lins = [m.out for m in elastic.layout.modules.values()]
    assert not any(lin._forward_hooks or lin._forward_pre_hooks for lin in lins)
    assert not any(p.requires_grad or p.grad is not None for p in elastic.model.parameters())
    return True


def same(a, b):
    return ((a.widths == b.widths).all() and (a.losses == b.losses).all()
            and (a.scale_losses == b.scale_losses).all()
            and all(torch.equal(a.order[k], b.order[k]) and torch.equal(a.scales[k], b.scales[k])
                    for k in a.order))


def slow_projection(p, module, cost, least, room):
    "Unit by unit, as it is described"
    order, kept = sorted(range(len(p)), key=lambda i: -p[i]), set()
    for m, n in enumerate(least):
        kept |= set([i for i in order if module[i] == m][:n])
    for i in [i for i in order if i not in kept]:
        if cost[i] > room: break
        room -= cost[i]
        kept.add(i)
    return kept


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_projection_is_the_greedy_rule(data):
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    unit = data.draw(st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes)))
    least = [data.draw(st.integers(0, n)) for n in sizes]
    module, cost = (np.repeat(x, sizes).tolist() for x in (range(len(sizes)), unit))
    few = st.lists(st.integers(0, 5), min_size=len(module), max_size=len(module))
    p, room = [x / 5 for x in data.draw(few)], data.draw(st.integers(0, 40))
    mixed = data.draw(st.permutations(range(len(module))))  # units need not lie together
    p, module, cost = ([x[i] for i in mixed] for x in (p, module, cost))
    keep = project(*map(torch.tensor, (p, module, cost, least)), room)
    assert set(keep.nonzero().flatten().tolist()) == slow_projection(p, module, cost, least, room)
    held = np.bincount(np.array(module)[keep.numpy()], minlength=len(sizes))
    assert (held >= least).all()
    assert (held * unit).sum() <= room + (np.array(least) * unit).sum()


def test_projection_in_words():
    "The dearest unit goes by its probability alone, and the first that does not fit ends the list"
    units = [torch.tensor(x) for x in ([0.8, 0.9, 0.3, 0.7], [0, 1, 0, 0], [1, 5, 1, 1])]
    keep = lambda room, least=(0, 0): project(*units, torch.tensor(least), room).tolist()
    assert keep(5) == [False, True, False, False]
    assert keep(4) == [False, False, False, False]
    assert keep(7) == [True, True, False, True]
    assert keep(0, (1, 1)) == [True, True, False, False]
    assert keep(1, (2, 0)) == [True, False, False, True]


@pytest.mark.parametrize('family', ['opt', 'qwen3'])
def test_gradient_is_that_of_the_gates(family):
    "Straight through: the derivative of the loss by the gate, times p (1 - p) / T"
    b = make_bench(family, dtype=torch.float64)
    layout, model, g = b.elastic.layout, b.elastic.model, torch.Generator().manual_seed(0)
    scores = {k: torch.randn(m.units, generator=g, dtype=torch.float64)
              for k, m in layout.modules.items()}
    keep = {k: s > -0.2 for k, s in scores.items()}
    fixed = {k: m.double() for k, m in keep.items()}
    def loss(key, gate):
        with gated(layout, fixed | {key: gate}):
            return block_loss(model, b.search.ids[:1], b.search.scored)
    for key in ((0, 'attn'), (1, 'ffn')):
        s, z = scores[key].clone().requires_grad_(), fixed[key].clone().requires_grad_()
        grad, = torch.autograd.grad(loss(key, straight_through(s, keep[key], 1.5)), s)
        slope, = torch.autograd.grad(loss(key, z), z)
        p, eps = torch.sigmoid(scores[key] / 1.5), 1e-5
        torch.testing.assert_close(grad, slope * p * (1 - p) / 1.5, rtol=1e-9, atol=1e-12)
        # a unit that is off can come back; a ReLU may be 0 on all of this text
        assert (slope[~keep[key]] != 0).double().mean() > 0.8
        if family != 'opt': continue  # an RMS norm computes in float32: too coarse for differences
        for i in range(0, len(s), 7):
            up, down = (fixed[key].clone() for _ in range(2))
            up[i], down[i] = up[i] + eps, down[i] - eps
            with torch.no_grad():
                want = (loss(key, up) - loss(key, down)) / (2 * eps)
            torch.testing.assert_close(slope[i], want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize('family', FIVE)
def test_every_family(family):
    b = make_bench(family, dtype=torch.float64)
    before, p = state(b.elastic), b.problem()
    found = grasprune(p, steps=40, scale_steps=20, blocks=3)
    assert unchanged(b.elastic, before)
    assert found.forward_tokens == 3 * 24 * 60 and found.wall_s > 0
    assert found.losses.shape == (40,) and found.scale_losses.shape == (20,)
    # on budget as the solver fills it: there is no room for one more step
    lower, upper = bounds(b.cost, (1, 8))
    assert (lower <= found.widths).all() and b.cost.sparsity(found.widths) >= 0.4 - 1e-12
    zero = np.zeros(b.cost.full.shape)
    again = solve(zero, b.cost, 0.4, (1, 8), lower=found.widths, upper=upper)
    assert (again == found.widths).all()
    for (i, kind), m in b.elastic.layout.modules.items():
        k = found.widths[i, KINDS.index(kind)]
        assert sorted(found.order[i, kind].tolist()) == list(range(m.units))
        assert (np.diff(found.p[i, kind]) <= 0).all() and found.scales[i, kind].shape == (k,)
        assert ((0.5 < found.scales[i, kind]) & (found.scales[i, kind] < 1.5)).all()
    # its text: the mask is better than the one at the start, the scales are better than none
    text = b.search[[0, 2, 3]]
    def nats(found, repair):
        em = fresh(family, found, torch.float64)
        with em.at(found.widths, ScaledWeights(em, found) if repair else None):
            return perplexity(em.model, text).mean_nll
    start = grasprune(p, steps=1, scale_steps=0, lr=0)
    assert nats(start, True) == nats(start, False)  # scales of 1
    assert nats(start, False) > nats(found, False) + 0.1
    assert nats(found, False) > nats(found, True) + 0.02


@pytest.mark.parametrize('family', FIVE)
def test_folded_scales_are_the_gates(family):
    b = make_bench(family, 'magnitude', torch.float64)
    p = b.problem(0.3)
    found = grasprune(p, steps=6, scale_steps=6, lr=0.3)
    em, layout, now = fresh(family, found, torch.float64), b.elastic.layout, {}
    for key, m in layout.modules.items():
        full = torch.zeros(m.units)
        k = len(found.scales[key])
        full[found.order[key][:k]] = found.scales[key]
        now[key] = full[b.elastic.columns[key][::m.cols] // m.cols]
    with torch.inference_mode():
        with gated(layout, now):
            gates_on = b.elastic.model(b.search.ids).logits
        with em.at(found.widths, ScaledWeights(em, found)):
            folded = em.model(b.search.ids).logits
        with em.at(found.widths):
            plain = em.model(b.search.ids).logits
    torch.testing.assert_close(folded, gates_on, rtol=1e-5, atol=1e-5)
    assert (plain - folded).abs().max() > 1e-3


def test_scales_belong_to_their_order_and_width():
    b = make_bench()
    found = grasprune(b.problem(), steps=3, scale_steps=1)
    with pytest.raises(ValueError, match=r'layer 0 attn: the elastic model has another order of '
                                         r'units than the scales. Make it with order='):
        ScaledWeights(ElasticModel(tiny_model(), {k: o.flip(0) for k, o in found.order.items()}),
                      found)
    em = fresh('llama', found)
    weights, k = ScaledWeights(em, found), int(found.widths[0, 1])
    assert weights(0, 'ffn', k - 1)[0].shape == (64, k - 1)
    with pytest.raises(ValueError, match=f'width {k + 1}; scales were learned for {k} units'):
        weights(0, 'ffn', k + 1)


@pytest.mark.parametrize('step, p_min, sigma', [
    ((2, 32), 0.1, 0.3), ((1, 1), 0, 0.6), ((1, 7), (0.5, 0), 0.4), ((4, 96), 0, 0.5)])
def test_steps_and_bounds(step, p_min, sigma):
    b = make_bench('opt')
    found = grasprune(b.problem(sigma, step=step, p_min=p_min), steps=3)
    lower, upper = bounds(b.cost, step, p_min)
    assert (lower <= found.widths).all() and (found.widths <= upper).all()
    assert ((found.widths % step == 0) | (found.widths == upper)).all()
    again = solve(np.zeros(lower.shape), b.cost, sigma, step, lower=found.widths, upper=upper)
    assert (again == found.widths).all() and b.cost.sparsity(found.widths) >= sigma - 1e-12
    em = fresh('opt', found)
    with em.at(found.widths, ScaledWeights(em, found)):
        assert np.isfinite(perplexity(em.model, b.search).mean_nll)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.1, 0.35, 0.6]), st.sampled_from([0, 0.2]))
def test_step_widths_fill_the_budget_in_the_order_of_means(seed, sigma, p_min):
    rng = np.random.default_rng(seed)
    cost = Cost(rng.integers(1, 40, (3, 2)) * [[8, 1]], rng.integers(4, 30, (3, 2)))
    p = {(i, k): rng.random(cost.full[i, j]) for i in range(3) for j, k in enumerate(KINDS)}
    try:
        widths = step_widths(p, cost, sigma, (1, 4), p_min)
    except InfeasibleBudget:
        return
    lower, upper = bounds(cost, (1, 4), p_min)
    spare = (1 - sigma) * cost.dense - cost.total(widths)
    means = {}  # of the next step of a module, or the last one that it kept
    for which, edge in (('next', widths), ('last', np.maximum(widths - 1, 0) // (1, 4) * (1, 4))):
        for i, j in np.argwhere((widths < upper) if which == 'next' else (widths > lower)):
            start = max(int(edge[i, j]), int(lower[i, j]))
            size = (1, 4)[j]
            end = min((start // size + 1) * size, int(upper[i, j]))
            best = np.sort(p[i, KINDS[j]])[::-1][start:end]
            means[which, i, j] = best.mean(), cost.unit[i, j] * len(best)
    assert spare >= -1e-9
    for (which, i, j), (mean, c) in means.items():
        if which == 'next':
            assert c > spare  # no step fits
            # what was taken after it was refused is cheaper than it
            assert all(m >= mean or o < c for (w, *_), (m, o) in means.items() if w == 'last')


def test_the_seed_decides_and_the_order_of_the_bench_does_not():
    one, other = (make_bench('opt', c, torch.float64) for c in ('wanda', 'magnitude'))
    found = [grasprune(b.problem(seed=3), steps=8) for b in (one, one)]
    assert same(*found)
    moved = grasprune(other.problem(seed=3), steps=8)
    assert all(torch.equal(found[0].order[k], moved.order[k]) for k in moved.order)
    np.testing.assert_allclose(found[0].losses, moved.losses, rtol=1e-9)
    assert (grasprune(one.problem(seed=4), steps=8).losses != found[0].losses).any()


def test_each_pass_reads_the_chosen_blocks_once(monkeypatch):
    b, seen = make_bench(), []
    def spy(model, ids, scored):
        seen.append(b.search.ids.tolist().index(ids[0].tolist()))
        return block_loss(model, ids, scored)
    monkeypatch.setattr(gates, 'block_loss', spy)
    grasprune(b.problem(), steps=8, scale_steps=4, blocks=2)
    assert [sorted(seen[i:i + 2]) for i in range(0, 12, 2)] == [[0, 3]] * 6
    seen.clear()
    grasprune(b.problem(), steps=8)  # a quarter of the steps: four passes and a half of one
    assert len(seen) == 10 and set(seen) == {0, 3}


@pytest.mark.parametrize('step', [1, 3, 7])
def test_an_exception_leaves_the_model_as_it_was(step, monkeypatch):
    b = make_bench('opt')
    half, calls = b.cost.full // 2, []
    def broken(*args):
        calls.append(1)
        if len(calls) == step: raise KeyboardInterrupt
        return block_loss(*args)
    monkeypatch.setattr(gates, 'block_loss', broken)
    with b.elastic.at(half, b.static):  # the widths of the caller come back too
        before = state(b.elastic)
        with pytest.raises(KeyboardInterrupt):
            grasprune(b.problem(), steps=5, scale_steps=3)
        assert unchanged(b.elastic, before)


@pytest.mark.parametrize('step, name', [(2, 'gates, step 2'), (6, 'scales, step 1')])
def test_nan_is_one_clear_line(step, name, monkeypatch):
    b, calls = make_bench(), []
    def broken(*args):
        calls.append(1)
        return block_loss(*args) * (np.nan if len(calls) == step else 1)
    monkeypatch.setattr(gates, 'block_loss', broken)
    before = state(b.elastic)
    with pytest.raises(ValueError, match=f'^{name}: the loss or a gradient is NaN or infinite.*'
                                         '--dtype') as e:
        grasprune(b.problem(), steps=5, scale_steps=3)
    assert '\n' not in str(e.value) and unchanged(b.elastic, before)


def test_bad_settings_before_any_pass(monkeypatch):
    monkeypatch.setattr(gates, 'block_loss', lambda *a: 1 / 0)
    b = make_bench()
    for kw, match in ((dict(steps=0), 'steps is 0'), (dict(scale_steps=-1), 'scale_steps is -1'),
                      (dict(blocks=5), 'blocks is 5; the search text has 4 blocks'),
                      (dict(blocks=0), 'blocks is 0')):
        with pytest.raises(ValueError, match=match):
            grasprune(b.problem(), **kw)
    with pytest.raises(InfeasibleBudget):
        grasprune(b.problem(0.99))


def test_bfloat16():
    b = make_bench('qwen2', dtype=torch.bfloat16)
    found = grasprune(b.problem(), steps=30, blocks=2)
    assert np.isfinite(found.losses).all() and found.losses[-8:].mean() < found.losses[:8].mean()
    em = fresh('qwen2', found, torch.bfloat16)
    assert ScaledWeights(em, found)(0, 'ffn', 8)[0].dtype == torch.bfloat16


def test_is_neither_a_searcher_nor_an_allocation():
    "It learns units, so neither registry can hold it"
    assert not any('grasp' in n for n in (*SEARCHERS, *HEURISTICS, *BASELINES))


@pytest.mark.parametrize('family', ['llama', 'opt'])
def test_a_split_model_is_the_same_model(family, family_folder):
    folder, found = family_folder(family), []
    for where in (None, split(folder, family)):
        b = make_bench(model=load_model(str(folder / 'dense'), 'float32', device_map=where)[0])
        found.append(grasprune(b.problem(), steps=4, scale_steps=2))
    assert same(*found)


def test_a_bench_with_this_order(tiny_folder):
    from ffp_nb.pipeline.bench import Bench
    from ffp_nb.pipeline.config import Profile, PruneConfig
    profile = Profile(block_len=32, calibration_blocks=8, sequential_blocks=4, episodes=8, batch=4,
                      blocks=2, final_blocks=3, test_blocks=4)
    config = PruneConfig(str(tiny_folder / 'dense'), str(tiny_folder / 'text.txt'),
                         dtype='float32', step=(1, 8), profile=profile, sparsity=0.4)
    load = lambda **kw: Bench.load(config, progress=False, **kw)
    first = load()
    found = grasprune(first.problem(), steps=8)
    bench = load(order=found.order)
    for key, m in bench.elastic.layout.modules.items():
        assert torch.equal(bench.elastic.columns[key][::m.cols] // m.cols, found.order[key])
    text, own = bench.text.selection[:2], ScaledWeights(bench.elastic, found)
    repairs = None, own, bench.static, bench.sequential(found.widths, progress=False)
    nats = [bench.perplexity(found.widths, text, weights).mean_nll for weights in repairs]
    assert np.isfinite(nats).all() and len(set(nats)) == 4
    # statistics follow the units: at full width the repair is none
    full = bench.cost.full
    assert np.isclose(bench.perplexity(full, text, bench.static).mean_nll,
                      first.perplexity(full, text).mean_nll, rtol=1e-4)
    # the paper's units under another order are refused
    with pytest.raises(ValueError, match='another order'):
        ScaledWeights(first.elastic, found)
