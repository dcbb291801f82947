"""Orders by elimination: every step is the best one, in blocks or not, in float32 too; the output
gradients are those of the model; the pipeline and the statistics know the criteria"""
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import worked
from test_pipeline import SMALL_UNITS, base, record
from test_workers import split

from ffp_nb.core import orders, ridge
from ffp_nb.core.criteria import CRITERION_NAMES, obs, unit_order
from ffp_nb.core.families import FIVE, Layout, Module, load_model, tiny_model
from ffp_nb.core.orders import ORDERS, error_curve, obs_order, output_fisher
from ffp_nb.core.perplexity import block_loss
from ffp_nb.core.ridge import ridge_factors, ridge_matrix
from ffp_nb.core.runs import load_records
from ffp_nb.core.stats import GramStats, collect_stats
from ffp_nb.core.text import Blocks
from ffp_nb.pipeline import bench as benches
from ffp_nb.pipeline.config import PruneConfig
from ffp_nb.studies import criteria

FOLDER = Path(__file__).resolve().parent.parent / 'benchmarks'
TEXT = Blocks(torch.randint(0, 211, (4, 32), generator=torch.Generator().manual_seed(0)), 31)
ALPHA = 0.1


def problem(n=8, D=5, cols=1, tokens=200, seed=0, shared=2.0, bias=False):
    "A module of correlated inputs with unequal scales, and its statistics"
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=g)
    x = x + shared * torch.randn(tokens, n // 3 + 1, generator=g) @ torch.randn(n // 3 + 1, n,
                                                                                generator=g)
    x = x * torch.logspace(-1, 1, n)[torch.randperm(n, generator=g)] + 3.0 * bias
    out = torch.nn.Linear(n, D, bias=bias).requires_grad_(False)
    out.weight.copy_(torch.randn(D, n, generator=g))
    module = Module(0, 'ffn', n // cols, (), out, cols)
    stats = GramStats({(0, 'ffn'): x.T @ x}, {(0, 'ffn'): x.sum(0)}, tokens)
    return SimpleNamespace(modules={(0, 'ffn'): module}), module, stats, x.double()


def matrix(x, bias, alpha=ALPHA):
    "The matrix of the ridge by its definition"
    x = x - x.mean(0) if bias else x
    G = x.T @ x
    return G + alpha * G.diagonal().diag()


def left_error(W, H, stay):
    "What the best weights on the columns that stay cannot explain, by least squares on a root of H"
    root = torch.linalg.cholesky(H).T  # |root (w - v)|^2 = (w - v) H (w - v)
    y = root @ W.T
    if not stay: return float(y.square().sum())
    fit = root[:, stay] @ torch.linalg.lstsq(root[:, stay], y).solution
    return float((y - fit).square().sum())


def slowly(W, H, cols, forward=False):
    "Elimination or selection by definition: every candidate's problem solved from scratch"
    columns = lambda units: [u * cols + i for u in units for i in range(cols)]
    rest, found = list(range(len(H) // cols)), []
    while rest:
        stay = lambda u: [*found, u] if forward else [v for v in rest if v != u]
        best = min(rest, key=lambda u: left_error(W, H, columns(stay(u))))
        rest.remove(best)
        found.append(best)
    return found if forward else found[::-1]


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize(('n', 'cols'), [(8, 1), (12, 3)])
def test_every_step_is_the_best(n, cols, bias, seed):
    layout, m, stats, x = problem(n, cols=cols, seed=seed, bias=bias)
    W, H = m.out.weight.double(), matrix(x, bias)
    for how in ('greedy', 'forward'):
        order = obs_order(layout, stats, ALPHA, how, progress=False)[0, 'ffn']
        assert order.dtype == torch.int64 and order.tolist() == slowly(W, H, cols, how == 'forward')
    g = torch.randn(60, 5, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-1, 1, 5)
    F = g.T @ g / 60
    order = obs_order(layout, stats, ALPHA, 'fisher', {(0, 'ffn'): F}, progress=False)[0, 'ffn']
    R = torch.linalg.cholesky(F.double() + 0.05 * torch.linalg.eigvalsh(F.double()).mean()
                              * torch.eye(5)).T
    assert order.tolist() == slowly(R @ W, H, cols)


@pytest.mark.parametrize(('n', 'cols'), [(12, 1), (24, 3)])
def test_a_large_penalty_leaves_a_score_of_each_unit(n, cols):
    layout, m, stats, x = problem(n, cols=cols)
    score = (m.out.weight.double().square().sum(0) * matrix(x, False, 0).diagonal())
    score = score.view(-1, cols).sum(1)
    found = obs_order(layout, stats, 1e6, progress=False)[0, 'ffn'].tolist()
    assert found == score.argsort(descending=True).tolist()
    assert found != obs_order(layout, stats, ALPHA, progress=False)[0, 'ffn'].tolist()


def test_the_penalty_of_the_order_is_its_own(tiny_folder, tmp_path):
    "It changes the order and nothing else; a cache does not mix orders up"
    config = PruneConfig(str(tiny_folder / 'dense'), str(tiny_folder / 'text.txt'), **SMALL_UNITS)
    load = lambda **kw: benches.Bench.load(replace(config, **kw), tmp_path, progress=False)
    plain, damped, same = load(), load(order_alpha=10.0), load(order_alpha=config.alpha)
    both = load(alpha=10.0)
    columns = lambda b: [v.tolist() for v in b.elastic.columns.values()]
    assert columns(plain) == columns(same) != columns(damped) == columns(both)
    assert damped.static.alpha == plain.static.alpha == config.alpha != both.static.alpha


def test_the_shell_and_the_card_name_the_penalty(family_folder, ffp, tmp_path):
    options = base(family_folder('llama'), method='uniform-ffn')
    worked(ffp('prune', *options, '--order-alpha', 2, '--out', tmp_path / 'out'))
    assert record(tmp_path / 'out')['config']['order_alpha'] == 2.0
    card = (tmp_path / 'out' / 'model' / 'README.md').read_text()
    assert 'by the criterion "greedy" with the penalty 2. Test split' in card
    worked(ffp('prune', *options, '--out', tmp_path / 'plain'))
    assert 'order_alpha' not in record(tmp_path / 'plain')['config']


def test_orders_differ():
    "Or the tests above could not tell them apart"
    layout, m, stats, _ = problem(40, seed=1)
    g = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 5)
    F = {(0, 'ffn'): g.T @ g}
    found = [obs_order(layout, stats, a, how, F, progress=False)[0, 'ffn'].tolist()
             for how, a in (*((how, ALPHA) for how in ORDERS), ('greedy', 10.0))]
    found += [unit_order(layout, stats, c)[0, 'ffn'].tolist() for c in ('wanda', 'obs')]
    assert len({*map(tuple, found)}) == len(found)


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('cols', [1, 3])
def test_error_curve_is_the_restricted_ridge_error(cols, bias):
    layout, m, stats, x = problem(12, cols=cols, bias=bias)
    units = torch.randperm(m.units, generator=torch.Generator().manual_seed(3))
    curve = error_curve(m, stats, units, ALPHA)
    W, H = m.out.weight.double(), matrix(x, bias)
    for k in range(m.units + 1):
        stay = [u * cols + i for u in units[:k].tolist() for i in range(cols)]
        assert float(curve[k]) == pytest.approx(left_error(W, H, stay), rel=1e-4,
                                                abs=1e-6 * float(curve[0]))
    assert len(curve) == m.units + 1 and curve[-1] == 0


@pytest.mark.parametrize('cols', [1, 4])
def test_first_removal_is_that_of_one_shot_obs(cols):
    "With the same matrix: that of `obs` has an equal penalty on all inputs, so scales are equal"
    layout, m, stats, x = problem(32, cols=cols, seed=2)
    G = stats.gram[0, 'ffn']
    G /= G.diagonal().sqrt().outer(G.diagonal().sqrt())
    scores = obs(m.out.weight, G, None, 200, cols=cols, damp=ALPHA)
    order = obs_order(layout, stats, ALPHA, progress=False)[0, 'ffn']
    assert order[-1] == scores.argmin()


@pytest.mark.parametrize('cols', [1, 4])
def test_greedy_beats_scores_on_correlated_inputs(cols):
    for seed in range(4):
        layout, m, stats, _ = problem(96, D=24, cols=cols, seed=seed)
        greedy = error_curve(m, stats, obs_order(layout, stats, progress=False)[0, 'ffn'])
        for criterion in ('wanda', 'obs'):
            other = error_curve(m, stats, unit_order(layout, stats, criterion)[0, 'ffn'])
            better = (greedy <= other * (1 + 1e-6))[1:-1].double().mean()
            assert better > 0.9, (criterion, seed, better)
            assert greedy[1:-1].log().mean() < other[1:-1].log().mean()


@pytest.mark.parametrize('largest', [False, True])
@pytest.mark.parametrize('block', [1, 2, 16, 99, 100, 128])
def test_blocks_change_nothing(block, largest):
    _, m, stats, x = problem(100, D=20)
    A, W = matrix(x, False), m.out.weight.double()
    A = A if largest else torch.linalg.inv(A)
    A, K = (A + A.T) / 2, W.T @ W
    before = A.clone(), K.clone()
    plain = orders._groups(A, K, 1, largest)
    assert torch.equal(orders._columns(A, K, largest, block), plain)
    assert torch.equal(A, before[0]) and torch.equal(K, before[1])
    assert sorted(plain.tolist()) == list(range(100))


@pytest.mark.parametrize('how', ORDERS)
@pytest.mark.parametrize('cols', [1, 3])
def test_dead_inputs_go_first(cols, how):
    layout, m, stats, _ = problem(24, cols=cols)
    dead, G = slice(2 * cols, 4 * cols), stats.gram[0, 'ffn']
    G[dead] = 0
    G[:, dead] = 0
    F = {(0, 'ffn'): torch.eye(5)}
    order = obs_order(layout, stats, ALPHA, how, F, progress=False)[0, 'ffn']
    assert sorted(order.tolist()) == list(range(m.units)) and set(order[-2:].tolist()) == {2, 3}
    assert torch.isfinite(error_curve(m, stats, order)).all()
    stats.gram[0, 'ffn'] = torch.zeros(24, 24)  # nothing ever comes
    order = obs_order(layout, stats, ALPHA, how, {(0, 'ffn'): torch.zeros(5, 5)}, progress=False)
    assert sorted(order[0, 'ffn'].tolist()) == list(range(m.units))


@pytest.mark.parametrize('how', ORDERS)
@pytest.mark.parametrize('cols', [1, 4])
def test_float32_is_as_good(cols, how):
    layout, m, stats, _ = problem(96, D=24, cols=cols)
    F = torch.eye(24)
    solve = partial(orders._sequence, m.out.weight, stats.gram[0, 'ffn'], ALPHA, cols=cols, how=how,
                    fisher=F)
    single, double = (error_curve(m, stats, solve(dtype=dtype))
                      for dtype in (torch.float32, torch.float64))
    torch.testing.assert_close(single, double, rtol=0.01, atol=1e-5 * float(double[0]))


def test_a_device_without_float64_computes_in_float32(monkeypatch):
    "And what it cannot do is done on the CPU in float64"
    layout, m, stats, _ = problem(16)
    seen, want = [], obs_order(layout, stats, progress=False)
    def run(W, gram, alpha, dtype):
        seen.append(dtype)
        if dtype == torch.float32: raise RuntimeError('no such operation')
        return orders._sequence(W, gram, alpha, dtype, cols=1, how='greedy', fisher=None)
    monkeypatch.setattr(ridge, '_has_double', lambda device: False)
    there = SimpleNamespace(device=torch.device('mps'), cpu=lambda: m.out.weight)
    got = ridge.where_it_works(run, there, stats.gram[0, 'ffn'], ALPHA)
    assert seen == [torch.float32, torch.float64] and torch.equal(got, want[0, 'ffn'])


def test_float32_that_is_not_precise_is_refused():
    x = torch.randn(400, 1, generator=torch.Generator().manual_seed(0)).expand(400, 64)
    x = x + 2e-3 * torch.randn(400, 64, generator=torch.Generator().manual_seed(1))
    run = partial(orders._sequence, torch.ones(4, 64), x.T @ x, 1e-6, cols=1, how='greedy',
                  fisher=None)
    assert run(dtype=torch.float32) is None and len(run(dtype=torch.float64)) == 64


def test_one_matrix_for_ridge_and_orders():
    layout, m, stats, x = problem(24)
    G = stats.gram[0, 'ffn']
    A = ridge_matrix(G, ALPHA)
    assert A is not G and torch.equal(G, (x.float().T @ x.float()))
    torch.testing.assert_close(A, matrix(x, False), rtol=1e-4, atol=1e-3)
    M, P = ridge_factors(m.out.weight, G, ALPHA)
    L = torch.linalg.cholesky(A)
    torch.testing.assert_close(M, (m.out.weight.double() @ L).float())
    torch.testing.assert_close(P, torch.linalg.inv(L).float())


def test_bad_arguments():
    layout, m, stats, _ = problem()
    for kw, words in ((dict(how='best'), "'best'; expected one of greedy, fisher, forward"),
                      (dict(how='fisher'), 'output_fisher'), (dict(alpha=0), 'alpha 0')):
        with pytest.raises(ValueError, match=words):
            obs_order(layout, stats, **kw)
    stats.gram[0, 'ffn'][3, 3] = -1e6
    for how in ORDERS:
        with pytest.raises(ValueError, match='not positive definite'):
            obs_order(layout, stats, how=how, fisher={(0, 'ffn'): torch.eye(5)}, progress=False)


# Gradients

def explicit(model, layout, blocks):
    "The same with zeros that are added to the outputs"
    found = {}
    for ids in blocks.ids:
        zeros, hooks = {}, []
        for key, m in layout.modules.items():
            z = zeros[key] = torch.zeros(len(ids), m.out.out_features, requires_grad=True)
            hooks.append(m.out.register_forward_hook(
                lambda _, args, out, z=z: out + z.to(out).view_as(out)))
        loss = block_loss(model, ids[None], blocks.scored) * blocks.scored
        for key, g in zip(zeros, torch.autograd.grad(loss, [*zeros.values()])):
            found[key] = found.get(key, 0) + g.T @ g / blocks.n_tokens
        for h in hooks:
            h.remove()
    return found


@pytest.mark.parametrize('family', FIVE)
def test_output_fisher(family):
    model = tiny_model(family)
    layout = Layout(model)
    hooks = lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}, hooks()
    blocks = Blocks(TEXT.ids, 20)  # the first tokens of a block are context
    with torch.inference_mode():  # as in a caller's with block
        got = output_fisher(model, layout, blocks, progress=False)
    want = explicit(model, layout, blocks)
    for key, m in layout.modules.items():
        assert want[key].norm() > 1e-4 and got[key].dtype == torch.float32
        torch.testing.assert_close(got[key], want[key], rtol=1e-3, atol=1e-4 * want[key].norm())
    assert all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())
    assert hooks() == before[1] and not any(p.requires_grad for p in model.parameters())


def test_output_fisher_leaves_no_gradients_of_weights():
    model = tiny_model().requires_grad_(True)
    without = tiny_model()
    frozen = output_fisher(without, Layout(without), TEXT, progress=False)
    got = output_fisher(model, Layout(model), TEXT, progress=False)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for key in got:
        torch.testing.assert_close(got[key], frozen[key], rtol=1e-4, atol=1e-6)


def test_output_fisher_refuses_infinity():
    bad = tiny_model()
    bad.model.layers[1].mlp.down_proj.weight.data[0, 0] = float('inf')
    with pytest.raises(ValueError, match='layer . (attn|ffn): a gradient is NaN or infinite'):
        output_fisher(bad, Layout(bad), TEXT, progress=False)
    assert not any(m._forward_hooks for m in bad.modules())


@pytest.mark.parametrize('family', FIVE)
def test_identity_weighs_nothing(family):
    model = tiny_model(family)
    layout = Layout(model)
    stats = collect_stats(model, layout, TEXT, progress=False)
    run = lambda how, F=None: obs_order(layout, stats, how=how, fisher=F, progress=False)
    greedy, same = run('greedy'), run('fisher', {k: torch.eye(64) for k in layout.modules})
    for key in greedy:
        assert torch.equal(greedy[key], same[key])
        assert sorted(greedy[key].tolist()) == list(range(layout.modules[key].units))


@pytest.mark.parametrize('family', ['llama', 'opt'])
def test_a_split_model_has_the_same_orders(family, family_folder):
    folder = family_folder(family)
    found = []
    for where in (None, split(folder, family)):
        model = load_model(str(folder / 'dense'), 'float32', device_map=where)[0]
        layout = Layout(model)
        stats = collect_stats(model, layout, TEXT, progress=False)
        fisher = output_fisher(model, layout, TEXT, progress=False)
        found.append((fisher, obs_order(layout, stats, how='fisher', fisher=fisher,
                                        progress=False)))
    for key in found[0][0]:
        torch.testing.assert_close(found[0][0][key], found[1][0][key])
        assert torch.equal(found[0][1][key], found[1][1][key])


# The pipeline

@pytest.mark.parametrize('criterion', ORDERS)
def test_the_pipeline_has_the_orders(criterion, family_folder, ffp, tmp_path):
    folder = family_folder('opt')
    paths = str(folder / 'dense'), str(folder / 'text.txt')
    config = PruneConfig(*paths, method='uniform', criterion=criterion, alpha=0.3, **SMALL_UNITS)
    bench = benches.Bench.load(config, progress=False)
    model = load_model(str(folder / 'dense'), 'float32')[0]
    layout, text = Layout(model), bench.text.calibration
    stats = collect_stats(model, layout, text, config.profile.forward_batch, progress=False)
    fisher = output_fisher(model, layout, text[:benches.FISHER_BLOCKS], progress=False)
    want = obs_order(layout, stats, 0.3, criterion, fisher, progress=False)
    for key, m in layout.modules.items():
        assert torch.equal(bench.elastic.columns[key][::m.cols] // m.cols, want[key])
    worked(ffp('prune', *base(folder, method='uniform', criterion=criterion), '--out',
               tmp_path / 'out', pictures=False))
    assert record(tmp_path / 'out')['config']['criterion'] == criterion


def test_the_study_of_criteria_keeps_its_six():
    "Its records are of these, in this order; new criteria must not ask for new ones"
    assert criteria.SIX == ('wanda', 'magnitude', 'fluctuation', 'obs', 'random', 'taylor')
    assert set(CRITERION_NAMES) == {*criteria.SIX, *ORDERS}


@pytest.mark.gpu
@pytest.mark.parametrize('family', FIVE)
def test_orders_on_a_gpu(family):
    model = tiny_model(family)
    layout = Layout(model)
    stats = collect_stats(model, layout, TEXT, progress=False)
    there = tiny_model(family).cuda()
    own = output_fisher(model, layout, TEXT, progress=False)
    F = output_fisher(there, Layout(there), TEXT, progress=False)
    for key in F:
        torch.testing.assert_close(F[key], own[key], rtol=1e-2, atol=1e-3 * own[key].norm())
    for how in ORDERS:
        want = obs_order(layout, stats, how=how, fisher=own, progress=False)
        got = obs_order(Layout(there), stats, how=how, fisher=own, progress=False)
        assert all(torch.equal(got[k], want[k]) for k in want), how


def test_the_benchmark_runs_and_writes_a_record(tmp_path):
    done = subprocess.run([sys.executable, FOLDER / 'orders.py', '--quick', '--threads', '1',
                           '--out', tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = load_records(tmp_path)['result.rows'][0]
    assert [(r['n'], r['what']) for r in rows] == [
        *((96, what) for what in ('ridge', *ORDERS, 'steps')),
        *((160, what) for what in ('ridge', *ORDERS))]
    assert all(r['median_s'] > 0 for r in rows) and 'record:' in done.stdout
