"Every searcher runs in the one loop, resumes bit for bit, and refuses what it cannot use"
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from ffp_nb.core.budget import param_cost
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import tiny_model
from ffp_nb.core.runs import RunDir
from ffp_nb.core.text import Blocks
from ffp_nb.search.agent import Searcher
from ffp_nb.search.loop import Evaluator, Search, SearchConfig
from ffp_nb.search.rivals import SEARCHERS

# small settings: every one is past its warm-up, and its model in use, before the search is cut
RIVALS = dict(eas={}, cma={}, tpe=dict(startup=8), ddpg=dict(hidden=(16, 16), warmup=8, steps=2))
CONFIG = SearchConfig(0.4, episodes=48, batch=8, blocks=1, step=(1, 4), final_blocks=4)


@pytest.fixture(scope='module')
def model():
    return ElasticModel(tiny_model('llama', seed=1))


def make(model, name, run=None, seed=3, config=CONFIG, **kw):
    pool = Blocks(torch.randint(0, 211, (12, 32), generator=torch.Generator().manual_seed(0)), 31)
    cost = param_cost(model.layout)
    # as AMC: those of the cost model
    shares = dict(share=cost.unit * cost.full) if name == 'ddpg' else {}
    searcher = SEARCHERS[name](len(cost.full), seed=seed, **shares | RIVALS.get(name, {}) | kw)
    return Search(Evaluator(model, pool), cost, config, run, searcher=searcher)


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
    assert result.broken == 32 and result.reward > 0
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


@pytest.mark.parametrize('name', ['eas', 'cma'])
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
