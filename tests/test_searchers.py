"Every searcher runs in the one loop, resumes bit for bit, and refuses what it cannot use"
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy.special import expit

from ffp_nb.core.budget import bounds, param_cost
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import tiny_model
from ffp_nb.core.runs import Checkpoints, RunDir
from ffp_nb.core.text import Blocks
from ffp_nb.search.agent import PPOAgent, Searcher
from ffp_nb.search.loop import Evaluator, Search, SearchConfig
from ffp_nb.search.rivals import BOUND, SEARCHERS, EvoPress, build_searcher

# small settings: every one is past its warm-up, and its model in use, before the search is cut
RIVALS = dict(eas={}, evopress={}, cma={}, tpe=dict(startup=8),
              ddpg=dict(hidden=(16, 16), warmup=8, steps=2))
CONFIG = SearchConfig(0.4, episodes=48, batch=8, blocks=1, step=(1, 4), final_blocks=4)


@pytest.fixture(scope='module')
def model():
    return ElasticModel(tiny_model('llama', seed=1))


def make(model, name, run=None, seed=3, config=CONFIG, **kw):
    pool = Blocks(torch.randint(0, 211, (12, 32), generator=torch.Generator().manual_seed(0)), 31)
    cost = param_cost(model.layout)
    # as AMC: those of the cost model
    shares = dict(share=cost.unit * cost.full) if name in ('ddpg', 'evopress') else {}
    searcher = SEARCHERS[name](len(cost.full), seed=seed, **shares | RIVALS.get(name, {}) | kw)
    return Search(Evaluator(model, pool), cost, replace(config, method=name), run,
                  searcher=searcher)


@pytest.mark.parametrize('name', SEARCHERS)
def test_resume_is_bit_for_bit(model, name, tmp_path):
    whole = make(model, name)
    want = whole.run(progress=False)
    for cut in (1, 3, 5):  # while the target moves, and after
        search = make(model, name, RunDir(tmp_path / str(cut), asdict(CONFIG)))
        for _ in range(cut):
            search.step()
        # all that counts is in the state
        search = make(model, name, RunDir(tmp_path / str(cut), asdict(CONFIG)), seed=99)
        assert search.update == cut
        got = search.run(progress=False)
        assert got.log == want.log and got.reward == want.reward and got.source == want.source
        assert np.array_equal(got.scores, want.scores) and got.forward_tokens == want.forward_tokens
        assert [{k: v for k, v in u.items() if k != 'wall_s'} for u in got.updates] == \
               [{k: v for k, v in u.items() if k != 'wall_s'} for u in want.updates]


@pytest.mark.parametrize('name', RIVALS)
def test_the_seed_decides(model, name):
    first, again, other = (make(model, name, seed=s).run(progress=False).log for s in (3, 3, 4))
    assert first == again and first != other


@pytest.mark.parametrize('name', RIVALS)
def test_a_model_that_breaks_is_survived(model, name):
    "All rewards 0 at first, then good ones: scores stay finite and the search ends"
    search = make(model, name)
    class Broken(Evaluator):
        def __call__(self, widths, idx):
            return super().__call__(widths, idx) * (np.nan if search.update < 4 else 1)
    search.evaluator.__class__ = Broken
    result = search.run(progress=False)
    asked = sum(row['update'] < 4 for row in result.log)
    assert result.broken == asked == (21 if name == 'evopress' else 32) and result.reward > 0
    assert all(np.isfinite(row['scores']).all() for row in result.log)


@pytest.mark.parametrize('name', RIVALS)
def test_a_configuration_names_it(model, name):
    """The way a study and the shell go: method and settings in the configuration, seed from it;
    what walks over the modules sees their costs"""
    config = replace(CONFIG, method=name, seed=3, agent=RIVALS[name])
    a = Search(make(model, name).evaluator, param_cost(model.layout), config)
    a.step()
    b = make(model, name, config=config)
    b.step()
    assert type(a.searcher) is SEARCHERS[name] and a.log == b.log


@pytest.mark.parametrize('name', ['eas', 'evopress', 'cma'])
def test_a_batch_of_one_is_refused(model, name):
    search = make(model, name, config=SearchConfig(0.4, episodes=4, batch=1, blocks=1, step=(1, 4)))
    with pytest.raises(ValueError, match='batch 1: .* expected at least 2'):
        search.run(progress=False)


@pytest.mark.parametrize('name, package', [('cma', 'cmaes'), ('tpe', 'optuna')])
def test_a_missing_package_is_named(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f'the package {package}.*pip install'):
        SEARCHERS[name](4)


@pytest.mark.parametrize('name, bad',
                         [('eas', dict(mutate=2)), ('eas', dict(parents=0)),
                          ('evopress', dict(level=1.5)), ('evopress', dict(survivors=(0.5, 0.5))),
                          ('cma', dict(sigma=float('nan'))), ('tpe', dict(startup=0)),
                          ('ddpg', dict(share=[1, 2, 3])), ('ddpg', dict(share=[[0, 0]] * 4))])
def test_bad_settings_are_refused(name, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SEARCHERS[name](4, **bad)


def test_no_library_is_imported_before_it_is_needed():
    import subprocess
    code = ("import sys, ffp_nb.search.rivals; print(sorted({'optuna', 'cmaes', "
            "'ffp_nb.search.loop'} & set(sys.modules)))")
    assert (subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                           check=True).stdout == '[]\n')


@pytest.mark.parametrize('name', SEARCHERS)
def test_a_searcher_has_every_method_of_its_own(name):
    "One that @patch forgot would only be the protocol's, which raises"
    made = type(SEARCHERS[name](2, seed=0))
    for method in ('ask', 'tell', 'recommend', 'stats', 'state_dict', 'load_state_dict'):
        assert getattr(made, method) is not getattr(Searcher, method), method


def test_a_searcher_that_lacks_a_method_says_so():
    with pytest.raises(NotImplementedError):
        type('Half', (Searcher,), {})().state_dict()


def planned(searcher, reward, updates, batch=16, sparsity=0.45, checkpoint=None):
    """As the search loop drives a searcher with a plan: the plans, what was asked, and the searcher
    at the end. Given a folder, every update goes on from a checkpoint, in a new object"""
    plans, asked = [], []
    for _ in range(updates):
        plans.append(searcher.plan(batch, 2))
        x = searcher.ask(sparsity, plans[-1][0])
        asked.append(x.copy())
        searcher.tell(sparsity, x, reward(x))
        if checkpoint is not None:
            Checkpoints(checkpoint).save(searcher.state_dict())
            searcher = EvoPress(12, seed=99, survivors=searcher.survivors)
            searcher.load_state_dict(Checkpoints(checkpoint).load())
    return plans, asked, searcher


class Hidden:
    """A reward with its largest value, 0, at hidden scores whose cost is on the target of 45 %;
    like a search, it sees no common shift"""
    def __init__(self, seed):
        self.best = EvoPress(12)._fit(np.random.default_rng([seed, 5]).normal(0, 1, 24), 0.45)

    def __call__(self, x):
        fit = EvoPress(12)._fit
        return np.array([-np.square(fit(o.ravel(), 0.45) - self.best).mean() for o in x])


def test_evopress_goes_to_a_hidden_optimum_faster_than_random_search():
    "At equal cost: 30 updates of 16 policies on 2 blocks, or fewer policies on more"
    gaps = []
    for seed in range(3):
        hidden = Hidden(seed)
        plans, _, evo = planned(EvoPress(12, seed), hidden, 30)
        assert max(n * blocks for n, blocks in plans) <= 32
        random = np.random.default_rng(seed).normal(size=(30 * 16, 12, 2))
        gaps.append((hidden(evo.recommend(0.45)[None])[0], hidden(random).max(),
                     hidden(np.zeros((1, 12, 2)))[0]))
    evo, random, even = -np.array(gaps).T
    assert (evo < random / 2).all() and (evo < even / 4).all(), gaps


@pytest.mark.parametrize('survivors', [(1 / 4,), (1 / 4, 1 / 16)])
def test_evopress_resumes_in_the_middle_of_a_generation(survivors, tmp_path):
    make = lambda: EvoPress(12, 3, survivors=survivors)
    plans, asked, end = planned(make(), Hidden(0), 9)
    again = planned(make(), Hidden(0), 9, checkpoint=tmp_path)
    # the last update of every generation but the first measures the parent beside what is left
    step = [(16, 2), (5, 6)] if len(survivors) == 1 else [(16, 2), (4, 8), (2, 16)]
    start = [(16, 2), (4, 8)]
    assert plans == again[0] == (start + step * 4)[:9]
    assert all(np.array_equal(a, b) for a, b in zip(asked, again[1], strict=True))
    assert again[2].state_dict() == end.state_dict() and again[2].stats() == end.stats()
    # killed after `plan`, or after `ask`
    end.plan(16, 2)
    other = EvoPress(12, 99, survivors=survivors)
    other.load_state_dict(end.state_dict())
    x, y = (e.ask(0.45, e.due) for e in (end, other))
    assert np.array_equal(x, y)
    other = EvoPress(12, 99, survivors=survivors)
    other.load_state_dict(end.state_dict())
    end.tell(0.45, x, x[:, 0, 0])
    other.tell(0.45, x, x[:, 0, 0])
    assert end.state_dict() == other.state_dict()


def test_evopress_measures_fewer_policies_on_more_text_in_the_loop(model):
    search = make(model, 'evopress')
    result = search.run(progress=False)
    update = [row['update'] for row in result.log]
    assert np.bincount(update).tolist() == [8, 2, 8, 3, 8, 3]
    assert [u['blocks'] for u in result.updates] == [1, 4, 1, 2, 1, 2]
    assert search.searcher.stats()['generations'] == 3


def test_evopress_keeps_its_parent_unless_a_child_is_better():
    evo = EvoPress(12)
    evo.tell(0.45, np.zeros((1, 12, 2)), np.ones(1))
    distance = lambda x: np.abs(x - x.mean((1, 2), keepdims=True)).max((1, 2))
    planned(evo, lambda x: -distance(x), 8)
    assert np.ptp(evo.recommend(0.45)) < 1e-8 and evo.stats()['won'] == 0
    planned(evo, distance, 2)
    assert np.ptp(evo.recommend(0.45)) > 0.1 and evo.stats()['won'] == 1 / 5


def test_what_evopress_asks_is_on_the_budget_of_the_solver(model):
    "Real-valued widths at these scores, without a shift, cost what the target leaves"
    cost = param_cost(model.layout)
    evo = build_searcher('evopress', cost, 0, dict(p_min=[0.25, 0.125]))
    evo.start = 1.5  # head start of the attention, as a search sets it
    lower, upper = bounds(cost, 1, (0.25, 0.125))
    assert (lower == cost.full * [0.25, 0.125]).all()
    rng = np.random.default_rng(0)
    for sparsity in (0.2, 0.4, 0.4, 0.5):
        x = evo.ask(sparsity, 8)
        assert np.abs(x).max() <= BOUND
        widths = lower + (upper - lower) * expit(x + [evo.start, 0])
        kept = (cost.unit * widths).sum((1, 2)) / (cost.dense - cost.fixed)
        np.testing.assert_allclose(kept, 1 - sparsity, rtol=1e-10)
        evo.tell(sparsity, x, rng.normal(size=8))


def test_a_switch_of_evopress_moves_one_level():
    evo = EvoPress(200, level=0.1, share=[[1, 3]] * 200)
    z = evo._fit(np.zeros(400), 0.45)
    moved = np.array([evo.weight * (evo._child(z) - z) for _ in range(2000)]) * 400 / 0.1
    np.testing.assert_allclose(moved.sum(1), 0, atol=1e-9)
    up = np.where(moved > 0, moved, 0).sum(1)
    np.testing.assert_allclose(up, up.round(), atol=1e-6)  # in levels; few meet in one module
    share = np.bincount(up.round().astype(int), minlength=4)[1:] / 2000
    np.testing.assert_allclose(share, [5 / 9, 3 / 9, 1 / 9], atol=0.035)


def test_epochs_are_steps_that_were_taken():
    agent = PPOAgent(2, epochs=7, target_kl=1e-9)
    rng = np.random.default_rng(0)
    agent.tell(0.5, agent.ask(0.5, 8), rng.uniform(size=8))
    assert agent.stats()['epochs'] == 1  # then the policy has moved too far
    free = PPOAgent(2, epochs=7, target_kl=None)
    free.tell(0.5, free.ask(0.5, 8), rng.uniform(size=8))
    assert free.stats()['epochs'] == 7
