"""The factors of a repair are right wherever they are computed, and the cache of repaired weights
helps at every size without changing a result. Marked `gpu`: what only a GPU can show (make gpu)"""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import worked

from ffp_nb.core import families, ridge
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import KINDS, seeded, tiny_model
from ffp_nb.core.perplexity import block_nll
from ffp_nb.core.ridge import Calibrator, dense_goals, ridge_factors, sequential_calibrate
from ffp_nb.core.stats import collect_stats
from ffp_nb.core.text import Blocks
from ffp_nb.export.hf import load_pruned
from ffp_nb.recover.train import LR, Recipe, recover
from ffp_nb.search import agent, predict, rivals
from ffp_nb.studies import twins

TEXT = Blocks(torch.randint(0, 211, (8, 32), generator=torch.Generator().manual_seed(0)), 31)


def elastic(family='llama', device='cpu', dtype=torch.float32, **size):
    model = tiny_model(family, **size).to(device, dtype)
    em = ElasticModel(model)
    return em, collect_stats(model, em.layout, TEXT, progress=False)


def gram(n=64, tokens=400, seed=0):
    "A Gram matrix of inputs with scales over four decades, and a projection"
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=g) * torch.logspace(-2, 2, n)
    return torch.randn(16, n, generator=g), x.T @ x


# Where and in which type factors are computed

def test_float32_is_close_where_its_check_passes():
    W, G = gram()
    M, P = ridge._factorise(W, G, 0.1, torch.float64)
    m, p = ridge._factorise(W, G, 0.1, torch.float32)
    for k in (5, 32, 64):
        want = M[:, :k] @ P[:k, :k]
        assert (m[:, :k] @ p[:k, :k] - want).norm() < ridge.PRECISION * want.norm()
    assert torch.equal(G, gram()[1])  # the statistics are read only


def test_float32_that_is_not_precise_is_refused():
    "LL^T = A holds to rounding here, too: the check has to see the condition of A"
    x = torch.randn(400, 1, generator=torch.Generator().manual_seed(0)).expand(400, 64)
    x = x + 2e-3 * torch.randn(400, 64, generator=torch.Generator().manual_seed(1))
    W, G = torch.ones(4, 64), x.T @ x
    A = G + torch.diag(1e-6 * G.diagonal())
    L = torch.linalg.cholesky(A)
    assert (L @ L.T - A).norm() < 1e-6 * A.norm()
    assert ridge._factorise(W, G, 1e-6, torch.float32) is None
    assert ridge._factorise(W, G, 1e-6, torch.float64) is not None
    # neither do numbers that are none pass
    assert ridge._factorise(W, G * float('nan'), 0.1, torch.float32) is None


@pytest.mark.parametrize('double, first, then', [
    (True, ('gpu', torch.float64), None), (False, ('gpu', torch.float32), None),
    (True, ('gpu', torch.float64), 'memory'), (False, ('gpu', torch.float32), 'precision')])
def test_a_device_is_used_as_far_as_it_can(monkeypatch, double, first, then):
    "Weights on a device with or without float64, with or without room for it"
    where = []
    def factorise(W, gram, alpha, dtype):
        where.append((W.device.type, dtype))
        if W.device.type == 'cpu' or then is None: return W, gram
        if then == 'memory': raise torch.cuda.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(ridge, '_factorise', factorise)
    monkeypatch.setattr(ridge, '_has_double', lambda device: double)
    W = SimpleNamespace(device=SimpleNamespace(type='gpu'), cpu=lambda: torch.ones(1, 2))
    ridge_factors(W, torch.eye(2), 0.1)
    assert where == [first] + [('cpu', torch.float64)] * bool(then)


def test_a_bad_matrix_is_named_after_the_cpu_has_tried(monkeypatch):
    W = SimpleNamespace(device=SimpleNamespace(type='gpu'), cpu=lambda: torch.ones(1, 2))
    monkeypatch.setattr(ridge, '_has_double', lambda device: False)
    monkeypatch.setattr(ridge, '_factorise', lambda *a: None)
    with pytest.raises(ValueError, match='not positive definite at alpha=0.1.*larger alpha'):
        ridge_factors(W, torch.eye(2), 0.1)


def test_what_has_no_float64():
    assert ridge._has_double(torch.device('cpu'))
    assert not ridge._has_double(torch.device('meta'))  # no value can be read from it


# The cache

def found(cal, em, widths):
    "Share of a policy's modules that are not computed"
    made, inner = [], cal.factors
    cal.factors = lambda key: (made.append(key), inner(key))[1]
    em.set(widths, cal)
    del cal.factors
    return 1 - len(made) / widths.size


def sized(share, em, stats, widths):
    "A calibrator whose cache holds a share of this policy"
    whole = Calibrator(em, stats, cache_bytes=float('inf'))
    em.set(widths, whole)
    return Calibrator(em, stats, cache_bytes=share * whole._held)


@pytest.mark.parametrize('share, least', [(0.25, 0.15), (0.5, 0.4), (0.9, 0.8), (1, 1)])
def test_a_policy_that_does_not_fit_is_found_as_far_as_it_fits(share, least):
    em, stats = elastic(layers=16)
    widths = em.layout.full // 2
    cal = sized(share, em, stats, widths)
    assert found(cal, em, widths) == 0
    rates = [found(cal, em, widths) for _ in range(4)]
    assert min(rates) >= least and cal._held <= cal.cache_bytes
    # another policy takes its place, and is found as well
    assert found(cal, em, widths - 1) == 0
    found(cal, em, widths - 1)
    assert found(cal, em, widths - 1) >= least


def test_what_is_too_large_for_the_cache_pushes_nothing_out():
    em, stats = elastic()
    cal = Calibrator(em, stats, cache_bytes=20_000)
    small = cal(0, 'ffn', 9)[0]
    for _ in range(20):
        cal(0, 'ffn', 95)
    assert cal(0, 'ffn', 9)[0] is small


class LRU(ridge._Cache):
    "The rule without the exception"
    def put(self, key, out, may_hold):
        self.modules = 0
        super().put(key, out, may_hold)


@pytest.mark.parametrize('share', [0.5, 1.2, 3])
def test_changing_policies_find_as_much_as_in_a_plain_cache(share):
    "A search: every policy keeps three in four of the last one's widths"
    em, stats = elastic(layers=8, ffn=64)
    rng, rates = np.random.default_rng(0), []
    policies = [em.layout.full // 2]
    for _ in range(40):
        fresh = rng.integers(1, em.layout.full)
        policies.append(np.where(rng.random(fresh.shape) < 0.75, policies[-1], fresh))
    for rule in (LRU, ridge._Cache):
        cal = sized(share, em, stats, policies[0])
        cal._caches = {d: rule(c.modules) for d, c in cal._caches.items()}
        rates.append(np.mean([found(cal, em, w) for w in policies[1:]]))
    assert rates[1] >= rates[0] - 0.02
    assert rates[1] > (0.2 if share < 1 else 0.65)


def test_no_result_depends_on_the_cache():
    em, stats = elastic('opt')
    rng = np.random.default_rng(0)
    policies = [rng.integers(0, em.layout.full + 1) for _ in range(4)] * 2
    cals = [Calibrator(em, stats, cache_bytes=b) for b in (0, 20_000, None)]
    for widths in policies:
        for i, j in np.ndindex(*widths.shape):
            out = [cal(i, KINDS[j], int(widths[i, j])) for cal in cals]
            assert all(torch.equal(a, b) for o in out for a, b in zip(o, out[0]))
    assert cals[0]._held == 0 < cals[1]._held <= 20_000 < cals[2]._held


def test_its_size_comes_from_what_is_free(monkeypatch):
    em, stats = elastic()
    policy = sum(W.numel() * 4 for W, _ in (em.dense_out(key) for key in em.layout.modules))
    monkeypatch.setattr(ridge, '_LEAST', policy // 8)
    monkeypatch.setattr(ridge, '_MOST', 0)
    free = 10**9
    monkeypatch.setattr(ridge, 'spare_bytes', lambda device: free)
    cal = Calibrator(em, stats).prepare(progress=False)
    def fill():
        for widths in (em.layout.full * f // 24 for f in range(1, 24)):
            em.set(widths, cal)
        return cal._held
    # memory for many, but no more than some policies are of use
    assert policy < fill() <= ridge._POLICIES * policy
    # memory runs short: the cache gives way
    free = -10**9
    assert fill() <= policy // 8
    # half a policy is free: each look at the memory grants an eighth of that
    free = policy // 2
    before = cal._held
    cal(0, 'ffn', 13)
    assert cal._caches[em.device].limit <= before + policy // 16 + 1


def test_factors_that_are_still_to_come_have_their_room(monkeypatch):
    em, stats = elastic()
    cal = Calibrator(em, stats)
    due = sum(4 * n * (n + 64) for n in (64, 96) for _ in range(3))
    monkeypatch.setattr(ridge, '_LEAST', 0)
    monkeypatch.setattr(ridge, 'spare_bytes', lambda device: due)
    assert cal._may_hold(em.device) == 0
    cal.prepare(progress=False)
    assert cal._may_hold(em.device) == due / 8


def test_a_user_sets_the_size(monkeypatch):
    em, stats = elastic()
    monkeypatch.setenv('FFP_CACHE_GB', '0.5')
    assert Calibrator(em, stats).cache_bytes == 5e8
    assert Calibrator(em, stats, cache_bytes=7).cache_bytes == 7
    monkeypatch.setenv('FFP_CACHE_GB', '')
    assert Calibrator(em, stats).cache_bytes is None
    for bad in ('much', '-1', 'nan'):
        monkeypatch.setenv('FFP_CACHE_GB', bad)
        with pytest.raises(ValueError, match=f"^FFP_CACHE_GB '{bad}': expected a number from 0, "
                                             'such as 2, or nothing$'):
            Calibrator(em, stats)


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    def write(folder, **files):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace('__', '.')).write_text(text)
    own = tmp_path / 'own'
    # version 2: a job in a batch system, whose own group has no limit; 1 GB of its 7 GB are files
    write(tmp_path / 'new' / 'job' / 'a step', memory__max='max\n', memory__current='5\n',
          memory__stat='inactive_file 0\n')
    write(tmp_path / 'new' / 'job', memory__max='8000000000\n', memory__current='7000000000\n',
          memory__stat='anon 5\ninactive_file 1000000000\n')
    own.write_text('0::/job/a step\n')
    assert ridge._limits(tmp_path / 'new', own) == [(8 * 10**9, 6 * 10**9)]
    # version 1: a container that sees itself at the top
    write(tmp_path / 'old' / 'memory', memory__limit_in_bytes='4000000000\n',
          memory__usage_in_bytes='3000000000\n', memory__stat='total_inactive_file 5\n')
    own.write_text('3:cpu,cpuacct:/docker/f00\n2:memory:/docker/f00\n0::/docker/f00\n')
    limits = ridge._limits(tmp_path / 'old', own)
    assert limits == [(4 * 10**9, 3 * 10**9 - 5)]
    assert ridge._limits(tmp_path / 'old', tmp_path / 'nowhere') == []
    # and it is what counts where it is less than the machine has
    monkeypatch.setattr(ridge, '_limits', lambda: [(8000, 1000)])
    assert ridge.spare_bytes(torch.device('cpu')) == 6000


def test_memory_of_a_gpu(monkeypatch):
    "A quarter stays free, and what PyTorch keeps without using it is free"
    fake = SimpleNamespace(mem_get_info=lambda device: (50, 100), memory_reserved=lambda device: 40,
                           memory_allocated=lambda device: 30)
    monkeypatch.setattr(torch, 'cuda', fake)
    assert ridge.spare_bytes(SimpleNamespace(type='cuda')) == 50 + 10 - 25


# Random numbers

BUILDERS = dict(
    tiny_model=lambda: tiny_model(seed=3),
    agent=lambda: agent._nets(3, (8, 8), 3),
    ddpg=lambda: rivals._nets((8, 8), 3),
    predictor=lambda: predict.GridCNN(3, epochs=1).fit(np.eye(4, 14), np.arange(4)).net,
    twin=lambda: twins.build_model(twins.Training('llama', seed=3)),
    **{m: lambda m=m: recover(ElasticModel(tiny_model()), np.full((3, 2), 2), TEXT,
                              Recipe(m, tokens=128, rank=2, seed=3), progress=False).model
       for m in LR})


def numbers(model):
    return torch.cat([p.detach().flatten().float().cpu() for p in model.state_dict().values()])


@pytest.mark.parametrize('name', BUILDERS)
def test_no_stream_of_the_caller_is_touched(name, monkeypatch):
    "`torch.manual_seed` in `fork_rng([])` seeded the caller's stream on a GPU"
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, 'manual_seed_all', lambda seed: pytest.fail('a GPU is seeded'))
    torch.default_generator.manual_seed(5)
    before = torch.get_rng_state()
    first = numbers(BUILDERS[name]())
    assert torch.equal(torch.get_rng_state(), before)
    torch.default_generator.manual_seed(6)
    assert torch.equal(numbers(BUILDERS[name]()), first)


def test_seeded_gives_the_numbers_that_manual_seed_gave():
    for seed in (0, 7, np.int64(7), 2**40):
        with seeded(seed):
            got = torch.rand(4)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            assert torch.equal(got, torch.rand(4))


# What only a GPU can show

@pytest.mark.gpu
@pytest.mark.parametrize('family', ['llama', 'opt'])
def test_factors_of_a_gpu_are_those_of_the_cpu(family):
    em, stats = elastic(family)
    there, _ = elastic(family, 'cuda')
    cpu, gpu = Calibrator(em, stats).prepare(False), Calibrator(there, stats).prepare(False)
    for key, m in em.layout.modules.items():
        assert gpu.factors(key)[0].is_cuda and gpu.factors(key)[1].is_cuda
        for k in range(m.units + 1):
            for a, b in zip(cpu(*key, k), gpu(*key, k)):
                if a is not None:
                    assert b.is_cuda
                    torch.testing.assert_close(a, b.cpu(), atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
def test_float32_on_a_gpu_passes_its_check(monkeypatch):
    monkeypatch.setattr(ridge, '_has_double', lambda device: False)
    W, G = gram(512, 2000)
    (M, P), (m, p) = ridge_factors(W, G, 0.1), ridge_factors(W.cuda(), G, 0.1)
    assert m.is_cuda
    want = M[:, :200] @ P[:200, :200]
    assert ((m[:, :200] @ p[:200, :200]).cpu() - want).norm() < ridge.PRECISION * want.norm()


@pytest.mark.gpu
def test_a_full_gpu_leaves_the_factors_to_the_computer(monkeypatch):
    there, stats = elastic(device='cuda')
    want = Calibrator(there, stats)(1, 'ffn', 40)[0]
    monkeypatch.setattr(ridge, 'spare_bytes', lambda device: -1)
    cal = Calibrator(there, stats)
    got = cal(1, 'ffn', 40)[0]
    assert got.is_cuda and not cal.factors((1, 'ffn'))[0].is_cuda
    torch.testing.assert_close(got, want)


@pytest.mark.gpu
def test_memory_of_a_real_gpu():
    held, device = torch.ones(1 << 28, dtype=torch.uint8, device='cuda'), torch.device('cuda', 0)
    before = ridge.spare_bytes(device)
    del held  # PyTorch keeps it, for the next tensor
    assert ridge.spare_bytes(device) - before > 0.9 * 2**28
    assert ridge.spare_bytes(device) <= torch.cuda.mem_get_info(device)[1]


@pytest.mark.gpu
@pytest.mark.parametrize('name', BUILDERS)
def test_no_gpu_stream_of_the_caller_is_touched(name):
    torch.cuda.manual_seed_all(5)
    before = torch.cuda.get_rng_state()
    BUILDERS[name]()
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.parametrize('family', ['llama', 'opt'])
@pytest.mark.parametrize('target', ['module', 'residual'])
def test_sequential_calibration_on_a_gpu(family, target):
    em, stats = elastic(family)
    there, _ = elastic(family, 'cuda')
    widths = np.maximum(em.layout.full // 2, 1)
    fitted = []
    for e in (em, there):
        static = Calibrator(e, stats)
        goals = dense_goals(e, TEXT, target, 2)
        fitted.append(sequential_calibrate(e, widths, TEXT, 0.1, static, target, goals, 2, False))
        with e.at(widths, fitted[-1]):
            fitted[-1].nll = block_nll(e.model, TEXT).sum() / TEXT.scored / len(TEXT)
    assert fitted[0].nll == pytest.approx(fitted[1].nll, abs=1e-3)
    for key, (W, b) in fitted[0].weights.items():
        assert fitted[1].weights[key][0].is_cuda
        torch.testing.assert_close(W, fitted[1].weights[key][0].cpu(), atol=1e-3, rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize('method', LR)
def test_recovery_trains_on_the_gpu(method):
    em, _ = elastic(device='cuda', dtype=torch.bfloat16)
    found = recover(em, em.layout.full // 2, TEXT, Recipe(method, tokens=3200, batch=8, rank=4),
                    progress=False)
    assert {p.device.type for p in found.model.parameters()} == {'cuda'}
    assert found.losses[-1] < found.losses[0]


@pytest.mark.gpu
def test_a_split_copy_trains_on_the_gpu(family_folder):
    folder = str(family_folder('llama') / 'dense')
    places = {'model.embed_tokens': 0, 'model.rotary_emb': 0, 'model.norm': 0, 'lm_head': 0,
              'model.layers.0': 0, 'model.layers.1': 'cpu', 'model.layers.2': 'disk'}
    em = ElasticModel(families.load_model(folder, 'float32', device_map=places)[0])
    whole = ElasticModel(families.load_model(folder, 'float32', device='cuda')[0])
    recipe, widths = Recipe('finetune', tokens=1024, seed=1), em.layout.full // 2
    a, b = (recover(e, widths, TEXT, recipe, progress=False) for e in (em, whole))
    assert {p.device.type for p in a.model.parameters()} == {'cuda'}
    np.testing.assert_allclose(a.losses, b.losses, atol=1e-4)


@pytest.mark.gpu
def test_a_whole_prune_in_bfloat16(ffp, family_folder, tmp_path):
    folder, nll = family_folder('llama'), {}
    for method, device in (('ffp', 'cuda'), ('uniform', 'cuda'), ('uniform', 'cpu')):
        out = tmp_path / f'{method}-{device}'
        worked(ffp('prune', '--model', folder / 'dense', '--text', folder / 'text.txt', '--profile',
                   'smoke', '--device', device, '--dtype', 'bfloat16', '--method', method,
                   '--sparsity', 0.3, '--out', out))
        model, _ = load_pruned(out / 'model', 'float32', 'cuda')
        nll[method, device] = float(block_nll(model, TEXT).mean()) / TEXT.scored
    assert np.isfinite(nll['ffp', 'cuda'])
    assert nll['uniform', 'cuda'] == pytest.approx(nll['uniform', 'cpu'], rel=0.02)


@pytest.mark.parametrize('asked, says', [
    (dict(target='residual'), 'target module, asked residual'), (dict(batch=2), 'batch 1, asked 2'),
    (dict(blocks=TEXT[:2]), r'blocks \(8, 32\), asked \(2, 32\)'),
    (dict(blocks=Blocks(TEXT.ids.flip(0), TEXT.scored)), r'text \w{8}, asked \w{8}\.')])
def test_goals_of_something_else_are_refused(asked, says):
    em = ElasticModel(tiny_model('llama'))
    goals = dense_goals(em, TEXT)
    how = dict(blocks=TEXT, goals=goals, progress=False)
    sequential_calibrate(em, em.layout.full, **how)
    with pytest.raises(ValueError, match=f'these goals are of {says}'):
        sequential_calibrate(em, em.layout.full, **how | asked)
