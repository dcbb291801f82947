"""Slopes and the searches that follow them: equal however they are measured, nothing left behind,
exact budgets for every cost, and the same search after a kill or with workers. Marked `gpu`: what
only a GPU can show (make gpu)"""
from dataclasses import asdict

import numpy as np
import pytest
import torch

from ffp_nb.core.budget import (
    Cost, bounds, mac_cost, memory_cost, param_cost, relax, relax_grad)
from ffp_nb.core.criteria import unit_order
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import FIVE, Layout, load_model, tiny_model
from ffp_nb.core.perplexity import block_nll
from ffp_nb.core.ridge import Calibrator, sequential_calibrate
from ffp_nb.core.runs import RunDir
from ffp_nb.core.slopes import (
    default_span, dense_states, gated_out, gates, mean_slopes, measure_slopes)
from ffp_nb.core.stats import collect_stats
from ffp_nb.core.text import Blocks
from ffp_nb.search import loop
from ffp_nb.search.gradient import RULES, Feedback, GradientSearch
from ffp_nb.search.loop import Evaluator, Search, SearchConfig

IDS = torch.randint(0, 211, (12, 32), generator=torch.Generator().manual_seed(0))
BLOCKS = Blocks(IDS, 31)
UNEQUAL = Blocks(IDS[:5], 7, torch.tensor([True, False, False, True, False]))
WIDTHS = np.array([[1.4, 30.3], [2.0, 50.0], [0.0, 12.5]])


def tiny(family='llama', repaired=True, dtype=torch.float32, device='cpu'):
    "A tiny elastic model and its calibrator"
    model = tiny_model(family, seed=1).to(device, dtype)
    layout = Layout(model)
    stats = collect_stats(model, layout, BLOCKS[:8], progress=False)
    em = ElasticModel(model, unit_order(layout, stats))
    return em, Calibrator(em, stats.permute(em.columns)) if repaired else None


def slopes(em, static, blocks=BLOCKS[:4], widths=WIDTHS, **kw):
    return mean_slopes([*measure_slopes(em, widths, blocks, static, **kw)])


def alike(a, b, rtol=1e-4):
    "Nats and slopes agree, relative to the largest slope of a module"
    np.testing.assert_allclose(a.nats, b.nats, rtol=rtol)
    for key, g in a.gates.items():
        np.testing.assert_allclose(b.gates[key], g, rtol=0, atol=rtol * np.nanmax(np.abs(g)),
                                   err_msg=str(key))


def state(em):
    "What a measurement must leave as it was"
    return ([(name, p.requires_grad, p.data_ptr(), tuple(p.shape))
             for name, p in em.model.named_parameters()], em.widths.tolist(),
            torch.is_grad_enabled(), torch.is_inference_mode_enabled())


# Slopes

@pytest.mark.parametrize('family', ['llama', 'opt'])
@pytest.mark.parametrize('repaired', [True, False])
def test_batches_and_unequal_blocks(family, repaired):
    "The mean over blocks does not depend on how many are read at once"
    em, static = tiny(family, repaired)
    one = slopes(em, static, UNEQUAL)
    for batch in (2, 5):
        alike(one, slopes(em, static, UNEQUAL, batch=batch))
    alike(one, mean_slopes([slopes(em, static, UNEQUAL[i]) for i in range(5)]))
    whole = np.rint(WIDTHS).astype(int)
    with em.at(whole, static):
        want = block_nll(em.model, UNEQUAL) / UNEQUAL.counts
    np.testing.assert_allclose(slopes(em, static, UNEQUAL, whole, batch=2).nats, want, rtol=1e-5)


@pytest.mark.parametrize('family', ['qwen2', 'opt'])
@pytest.mark.parametrize('repaired', [True, False])
def test_ends_of_the_widths(family, repaired):
    "All modules gone, and the dense model: finite, with every unit measured or the span's"
    em, static = tiny(family, repaired)
    full = em.layout.full
    for widths in (np.zeros_like(full), full, full - 0.5):
        found = slopes(em, static, widths=widths)
        assert all(np.isfinite(g).all() for g in found.gates.values())
        near = slopes(em, static, widths=widths, span=(span := default_span(full)))
        assert np.isfinite(near.at(widths, span)).all()
        np.testing.assert_allclose(near.at(widths, span), found.at(widths, span), rtol=1e-3,
                                   atol=1e-6)
    with em.at(full):
        want = block_nll(em.model, BLOCKS[:4]) / 31
    np.testing.assert_allclose(slopes(em, static, widths=full).nats, want, rtol=1e-4)


def test_bfloat16_is_close():
    (a, x), b = tiny(), tiny(dtype=torch.bfloat16)[0]
    b.model.load_state_dict(a.model.state_dict())  # one order of units
    span = default_span(a.layout.full)
    one, two = slopes(a, x), slopes(b, x)
    np.testing.assert_allclose(one.nats, two.nats, rtol=0.02)
    p, q = one.at(WIDTHS, span), two.at(WIDTHS, span)
    assert np.corrcoef(p.ravel(), q.ravel())[0, 1] > 0.98


def test_float16_does_not_vanish():
    "Its gradients are of a sum: divided by the tokens in float16, the small ones would be 0"
    (a, x), b = tiny(), tiny(dtype=torch.float16)[0]
    with torch.no_grad():
        a.model.lm_head.weight *= 0.003  # the smaller, the smaller the gradients
    b.model.load_state_dict(a.model.state_dict())
    rng = torch.Generator().manual_seed(0)
    long = Blocks(torch.randint(0, 211, (1, 4096), generator=rng), 4095)
    span = default_span(a.layout.full)
    p, q = (slopes(em, x, blocks=long).at(WIDTHS, span) for em in (a, b))
    np.testing.assert_allclose(q, p, atol=0.1 * np.abs(p).max())


@pytest.mark.parametrize('batch', [1, 2, 5])
def test_divergence_from_the_dense_model(batch):
    "Zero slopes at the dense model; elsewhere those of an explicit KL, also with unequal blocks"
    em, static = tiny('opt')
    n = int(UNEQUAL.counts.max())
    states = dense_states(em, UNEQUAL.ids, n)
    at_full = slopes(em, None, UNEQUAL, em.layout.full, dense=states, batch=batch)
    assert max(np.abs(g).max() for g in at_full.gates.values()) < 1e-5
    with torch.no_grad():
        dense = em.model(UNEQUAL.ids).logits[:, :-1].log_softmax(-1)
    def divergence(unit, eps):
        def make(i, kind, k):
            g = gates(WIDTHS[i, int(kind == 'ffn')], k)
            if (i, kind) == (1, 'ffn'):
                g[unit] += eps
            return gated_out(em, static, (i, kind), g)
        with em.at(em.layout.full, make), torch.no_grad():
            own = em.model(UNEQUAL.ids).logits[:, :-1].log_softmax(-1)
        kl = (dense.exp() * (dense - own)).sum(-1)
        return float(np.mean([kl[i, -c:].mean() for i, c in enumerate(UNEQUAL.counts)]))
    found = slopes(em, static, UNEQUAL, dense=states, batch=batch)
    np.testing.assert_allclose(found.nats, slopes(em, static, UNEQUAL).nats, rtol=1e-5)
    for unit in (3, 40, 60):
        want = (divergence(unit, 0.05) - divergence(unit, -0.05)) / 0.1
        assert found.gates[1, 'ffn'][unit] == pytest.approx(want, rel=0.02, abs=1e-4)


def test_nothing_is_left_behind():
    em, static = tiny()
    em.set(np.array([[2, 40], [3, 96], [4, 8]]), static)
    next(em.model.parameters()).requires_grad_(True)
    before = state(em)
    slopes(em, static)
    assert state(em) == before
    part = measure_slopes(em, WIDTHS, BLOCKS[:4], static)
    next(part)
    assert torch.is_grad_enabled() == before[2], 'the mode of the caller is its own'
    part.close()  # the reader had enough
    assert state(em) == before
    part = measure_slopes(em, WIDTHS, BLOCKS[:4], static)
    next(part)
    with pytest.raises(RuntimeError, match='stop'):
        part.throw(RuntimeError('stop'))
    assert state(em) == before
    norm = em.model.model.norm.weight
    kept = norm.data.clone()
    norm.data[:] = float('nan')
    with pytest.raises(ValueError, match='NaN or infinite.*--dtype'):
        slopes(em, static)
    norm.data.copy_(kept)
    assert state(em) == before
    with torch.no_grad():
        found = slopes(em, static)
    alike(found, slopes(em, static))


@pytest.mark.parametrize('family', FIVE)
def test_inside_inference_mode(family):
    "Before 'the head got no gradient' or 'inference tensors cannot be saved for backward'"
    em, static = tiny(family)
    want = slopes(em, static)
    em, static = tiny(family)
    with torch.inference_mode():  # makes the factors, too
        sequential_calibrate(em, em.layout.full // 2, BLOCKS[:2], 0.1, static, progress=False)
        states = dense_states(em, IDS[:4], 31)
        part = measure_slopes(em, WIDTHS, BLOCKS[:4], static)
        first = next(part)
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
        found = mean_slopes([first, *part])
        slopes(em, static, dense=states)
    alike(want, found)
    alike(want, slopes(em, static))
    slopes(em, static, dense=states)


@pytest.mark.parametrize('repaired', [True, False])
def test_one_more_channel(repaired):
    """The change of the loss by a whole channel is the mean of its slope on the way, at four gates
    (midpoint rule), within 5 % of the largest. One gate is not enough in a random model"""
    em, static = tiny('llama', repaired)
    widths = np.array([[2, 40], [3, 60], [2, 30]])
    def loss(w):
        with em.at(w, static):
            return float((block_nll(em.model, BLOCKS) / 31).mean())
    true, found = [], []
    for layer in range(3):
        for k in (10, 41, 80):
            at, more, real = widths.copy(), widths.copy(), widths.astype(float)
            at[layer, 1], more[layer, 1], part = k, k + 1, []
            for gate in (0.125, 0.375, 0.625, 0.875):
                real[layer, 1] = k + gate
                part.append(slopes(em, static, BLOCKS, real, batch=4).gates[layer, 'ffn'][k])
            true.append(loss(more) - loss(at))
            found.append(np.mean(part))
    assert np.abs(np.subtract(true, found)).max() < 0.05 * np.abs(true).max(), (true, found)


# Where the weights are

def test_offloaded_models_are_refused(family_folder):
    folder = family_folder('llama')
    here = ['model.embed_tokens', 'model.layers.0', 'model.norm', 'model.rotary_emb', 'lm_head']
    load = lambda device: load_model(
        str(folder / 'dense'), 'float32',
        device_map=dict.fromkeys(here, 'cpu') | {f'model.layers.{i}': device for i in (1, 2)})[0]
    for made in (load('disk'), tiny_model()):
        made.hf_device_map = getattr(made, 'hf_device_map', {'a': 'cuda:0', 'b': 'cpu'})
        with pytest.raises(ValueError, match='offloaded.*--device cpu.*--method ffp') as e:
            slopes(ElasticModel(made), None, BLOCKS[:1])
        assert '\n' not in str(e.value)
    parts, whole = load('cpu'), load_model(str(folder / 'dense'), 'float32')[0]
    for a, b in zip(*(slopes(ElasticModel(m), None).gates.values() for m in (parts, whole))):
        assert np.array_equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize('family', ['llama', 'opt'])
@pytest.mark.parametrize('repaired', [True, False])
def test_slopes_of_a_gpu(family, repaired):
    "Those of the CPU, for both losses"
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        found = []
        for device in ('cpu', 'cuda'):
            em, static = tiny(family, repaired)
            if device == 'cuda':  # the same order and statistics
                stats = static.stats if repaired else None
                em = ElasticModel(em.model.to('cuda'))
                static = Calibrator(em, stats) if repaired else None
            states = dense_states(em, IDS[:4], 31)
            found.append([slopes(em, static, batch=2), slopes(em, static, dense=states)])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    for a, b in zip(*found):
        alike(a, b, 1e-3)


# Budgets

LAYOUT = Layout(tiny_model())
FREE = Cost(np.array([[0.0, 192.0]] * 3), LAYOUT.full, 1000.0, 'only FFNs')
FREE_FFN = Cost(np.array([[5000.0, 0.0]] * 3), LAYOUT.full, 0.0, 'only attention')
COSTS = dict(params=param_cost(LAYOUT), macs=mac_cost(LAYOUT, 64), memory=memory_cost(LAYOUT, 5000),
             free=FREE, free_ffn=FREE_FFN)


@pytest.mark.parametrize('cost', COSTS.values(), ids=COSTS)
@pytest.mark.parametrize('p_min', [0.1, 0.0, (1.0, 0.1)], ids=['', 'removed', 'pinned'])
def test_budgets_are_exact(cost, p_min):
    "Of real-valued widths for any scores; and the derivative in the scores keeps them"
    if p_min == (1.0, 0.1) and cost is FREE_FFN:
        pytest.skip('nothing that costs can be cut')
    lower, upper = bounds(cost, (1, 8), p_min)
    rng, least = np.random.default_rng(0), cost.sparsity(lower)
    for share in (0.1, 0.5, 0.9):
        sparsity = share * least
        for scale in (0.0, 1.0, 30.0):
            s = rng.normal(0, scale, (3, 2))
            w = relax(s, cost, sparsity, lower, upper)
            assert abs(cost.sparsity(w) - sparsity) < 1e-9
            assert (w >= lower).all() and (w <= upper).all()
            if scale != 1: continue
            f, loss = rng.normal(0, 1, (3, 2)), lambda s: float(
                (f * relax(s, cost, sparsity, lower, upper)).sum())
            grad = relax_grad(f, w, cost, lower, upper)
            for at in np.ndindex(3, 2):
                e = np.zeros((3, 2))
                e[at] = 1e-5
                assert grad[at] == pytest.approx((loss(s + e) - loss(s - e)) / 2e-5, abs=1e-4)


def search(method='gradient', cost=None, folder=None, p_min=0.1, sparsity=0.4, **kw):
    "A search by slopes on a tiny model; with a folder, checkpointed there"
    em, static = tiny()
    cost = cost or param_cost(em.layout)
    config = SearchConfig(sparsity, method, 1, episodes=20, batch=4, blocks=1, step=(1, 8),
                          p_min=p_min, agent=kw)
    run = None if folder is None else RunDir(folder, asdict(config))
    return Search(Evaluator(em, BLOCKS, static), cost, config, run)


@pytest.mark.parametrize('cost', COSTS.values(), ids=COSTS)
@pytest.mark.parametrize('p_min', [0.1, 0.0, (1.0, 0.1), (0.1, 1.0)],
                         ids=['', 'removed', 'pinned', 'pinned_ffn'])
@pytest.mark.parametrize('rule', RULES)
def test_a_search_with_any_cost(cost, p_min, rule, recwarn):
    "On budget in every update, and no figure breaks where a unit costs nothing or may not move"
    lower, upper = bounds(cost, (1, 8), p_min)
    most = cost.sparsity(lower)
    if most < 1e-9:
        pytest.skip('nothing that costs can be cut')
    s = search(cost=cost, p_min=p_min, rule=rule, sparsity=0.6 * most)
    seen, learn = [], s.searcher.learn
    s.searcher.learn = lambda sparsity, scores, found, progress: (
        seen.extend(found), learn(sparsity, scores, found, progress))
    found = s.run(progress=False)
    assert len(seen) == len(found.updates) == 5
    for f in seen:
        assert abs(cost.sparsity(f.widths) - 0.6 * most) < 1e-9
    for row in found.log:
        w = np.array(row['widths'])
        assert cost.sparsity(w) >= 0.6 * most - 1e-9 and (w >= lower).all() and (w <= upper).all()
    assert np.isfinite(s.searcher.scores).all() and np.isfinite(found.scores).all()
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
    for u in found.updates:
        assert np.isfinite([u['price'], u['step'], u['std'], u['nats']]).all()
        # where no gain is above 0, the logarithms of `mirror` are all alike
        assert u['step'] > 0 or rule == 'mirror'


def gated_loss(em, static, units):
    "Nats with so many units in the attention of all layers"
    widths = np.array(em.layout.full, dtype=float)
    widths[:, 0] = units
    return float(slopes(em, static, widths=widths).nats.mean())


def test_behind_a_norm_a_fraction_of_a_unit_is_all_of_it():
    "Gemma 3 normalises what attention gives: slopes see no difference until it is gone"
    em, static = tiny('gemma3_text', repaired=False)
    full, some, none = (gated_loss(em, static, k) for k in (1.0, 0.2, 0.0))
    assert abs(some - full) < 0.02 * abs(none - full)
    em, static = tiny('llama', repaired=False)
    full, some, none = (gated_loss(em, static, k) for k in (1.0, 0.2, 0.0))
    assert abs(some - full) > 0.4 * abs(none - full)


@pytest.mark.parametrize('broken', [True, False])
@pytest.mark.parametrize('method', ['gradient', 'pathwise'])
def test_a_module_is_removed_only_where_that_is_better(method, broken, monkeypatch):
    "What slopes recommend is measured beside the same scores with every module kept"
    s = search(method, p_min=0.0, sparsity=0.5)
    low = np.array([[-9.0, 3.0]] * len(s.cost.full))  # attention goes, FFNs stay
    monkeypatch.setattr(type(s), 'guess', lambda self: low)
    seen = []
    def rewards(policies, idx):
        seen.extend(policies)
        return np.array([0.01 if (w == 0).any() == broken else 0.5 for w in policies])
    monkeypatch.setattr(s.evaluator, 'rewards', rewards)
    found = s.finish()
    assert [(w == 0).any() for w in seen] == [True, False]
    assert (found.widths == 0).any() != broken and found.reward == 0.5
    assert found.source == ('searcher, no module removed' if broken else 'searcher')
    assert s.cost.sparsity(found.widths) >= 0.5


# The same search

@pytest.mark.parametrize('settings', [*(dict(rule=r) for r in RULES), dict(loss='kl'),
                                      dict(average=0.5),
                                      dict(method='pathwise'), dict(method='pathwise', mix=0.5)],
                         ids=str)
def test_killed_after_any_update(settings, tmp_path):
    "Resumed it has the same log, widths and tokens, bit for bit"
    drop = lambda updates: [{k: v for k, v in u.items() if k != 'wall_s'} for u in updates]
    whole = search(**settings, folder=tmp_path / 'whole').run(progress=False)
    assert len(whole.updates) == 5
    for k in (1, 2, 4):
        folder = tmp_path / str(k)
        half = search(**settings, folder=folder)
        for _ in range(k):
            half.step()
        if k == 2:  # killed between the log of the third update and its checkpoint
            half.run_dir.save_checkpoint = lambda state: None
            half.step()
        again = search(**settings, folder=folder)
        assert again.update == k
        got = again.run(progress=False)
        assert got.log == whole.log and drop(got.updates) == drop(whole.updates)
        assert np.array_equal(got.widths, whole.widths) and got.reward == whole.reward
        assert np.array_equal(got.scores, whole.scores)
        assert got.forward_tokens == whole.forward_tokens
        assert RunDir(folder, asdict(again.config)).rows() == whole.log


def test_divergence_in_a_search_on_unequal_blocks():
    "Blocks that score 31 and 7 tokens, in one batch and one by one"
    em, static = tiny()
    found = []
    for batch in (1, 5):
        evaluator = Evaluator(em, UNEQUAL, static, batch)
        found.append(evaluator.slopes([WIDTHS], [4, 0, 3, 1], None, True)[0])
        assert evaluator.forward_tokens == (3 + 1) * 4 * 32
        evaluator.slopes([WIDTHS], [0, 2], None, True)
        assert evaluator.forward_tokens == (16 + 3 * 2 + 1) * 32, 'known states are not paid again'
    alike(*found)
    order = UNEQUAL[[4, 0, 3, 1]]
    alike(found[0], slopes(em, static, order, dense=dense_states(em, order.ids, 31)))


def test_few_dense_states_are_held(monkeypatch):
    "Those used least lately make place, and are paid again; also after a restart"
    em, static = tiny()
    want = Evaluator(em, BLOCKS, static).slopes([WIDTHS], [0, 1, 2], None, True)[0]
    monkeypatch.setattr(loop, 'KEPT', 2 * 31 * em.model.config.hidden_size * 4)  # of two blocks
    few, other = Evaluator(em, BLOCKS, static), Evaluator(em, BLOCKS, static)
    alike(want, few.slopes([WIDTHS], [0, 1, 2], None, True)[0])
    assert [*few._states] == [1, 2] and few.forward_tokens == (9 + 3) * 32
    few.slopes([WIDTHS], [2, 1, 0], None, True)
    assert [*few._states] == [1, 0] and few.forward_tokens == (2 * 9 + 3 + 1) * 32
    other.load_state_dict(few.state_dict())
    alike(want, other.slopes([WIDTHS], [0, 1, 2], None, True)[0])
    few.slopes([WIDTHS], [0, 1, 2], None, True)
    assert other.forward_tokens == few.forward_tokens == (3 * 9 + 3 + 1 + 1) * 32


# Steps

@pytest.mark.parametrize('rule', ['ratio', 'mirror', 'newton'])
def test_what_costs_nothing(rule):
    "It grows where it helps and shrinks where it hurts; what cannot move does not matter"
    s = GradientSearch(3, rule=rule)
    gain = np.array([[np.inf, 1.0], [-np.inf, 2.0], [np.nan, 0.5]])
    for t in range(3):
        s.learn(0.5, s.ask(0.5, 1), [Feedback(np.ones((3, 2)), gain, np.abs(gain),
                                              np.zeros((3, 2)), 1.0)], t / 2)
    assert np.isfinite(s.scores).all()
    assert s.scores[0, 0] == s.scores.max() and s.scores[1, 0] == s.scores.min()
    assert s.scores[2, 0] == s.scores[0, 1], 'no step, as that at the price'
    # FFNs that cost nothing have no price: then it is that of the attention
    s = GradientSearch(2, rule=rule)
    s.learn(0.5, s.ask(0.5, 1), [Feedback(np.ones((2, 2)), np.array([[4.0, np.inf], [1.0, np.inf]]),
                                          np.ones((2, 2)), np.zeros((2, 2)), 1.0)], 0.0)
    assert s.last['price'] == 2.5 and s.scores[0, 0] > s.scores[1, 0]
