"""Predictors and the search that learns on them: what is counted, what is learned from, and what
survives a kill"""
from dataclasses import asdict
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from ffp_nb.core.budget import param_cost
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import tiny_model
from ffp_nb.core.runs import RunDir, cached
from ffp_nb.core.text import Blocks
from ffp_nb.search.loop import Evaluator, Search, SearchConfig
from ffp_nb.search.predict import PREDICTORS, Folds, GridCNN, PredictedSearch, Prediction, features
from ffp_nb.studies import cells, prediction
from ffp_nb.studies.study import run_study

CONFIG = SearchConfig(0.4, episodes=24, batch=6, step=(1, 4), final_blocks=6)
SMALL = Prediction('ridge', warmup=2, inner=2, batch=8, pool=16)


class Counting(Evaluator):
    "Notes what really goes through the model"
    seen = 0
    def _measure(self, idx):
        self.seen += len(idx) * self.pool.ids.shape[1]
        return super()._measure(idx)


def search(folder=None, config=CONFIG, p=SMALL, make=PredictedSearch, **kw):
    em = ElasticModel(tiny_model('llama', seed=1))
    pool = Blocks(torch.randint(0, 211, (12, 32), generator=torch.Generator().manual_seed(0)), 31)
    run = None if folder is None else RunDir(folder, asdict(config) | asdict(p))
    args = ((Counting(em, pool), param_cost(em.layout), config)
            + ((p,) if make is PredictedSearch else ()))
    return make(*args, run, **kw)


def same(a, b):
    updates = lambda r: [{k: v for k, v in u.items() if k != 'wall_s'} for u in r.updates]
    return (a.log == b.log and (a.scores == b.scores).all() and a.reward == b.reward
            and a.forward_tokens == b.forward_tokens and updates(a) == updates(b))


def test_the_count_is_what_the_model_read():
    s = search()
    r = s.run(progress=False)
    assert r.forward_tokens == s.evaluator.seen
    assert len(r.log) == CONFIG.episodes
    x = features([row['widths'] for row in r.log], s.cost.full, [row['sparsity'] for row in r.log],
                 False)
    assert ((np.array(s.searcher.X) == x).all()
            and np.allclose(np.exp(-np.array(s.searcher.y)), [row['reward'] for row in r.log]))


def test_a_warm_up_is_a_search():
    "Until the first prediction nothing differs from `Search`; afterwards the policies do"
    mine, plain = search(), search(make=Search)
    for _ in range(3):
        mine.step()
        plain.step()
    n = 2 * CONFIG.batch
    assert mine.log[:n] == plain.log[:n] and mine.log[n:] != plain.log[n:]
    assert ([r['blocks'] for r in mine.log] == [r['blocks'] for r in plain.log]
            and [set(r) for r in mine.log] == [set(r) for r in plain.log])


@pytest.mark.parametrize('name', PREDICTORS)
def test_a_killed_search_goes_on_bit_for_bit(tmp_path, monkeypatch, name):
    config = SearchConfig(0.4, episodes=18, batch=6, step=(1, 4), final_blocks=6)
    p = Prediction(name, 1, 2, 8, pool=16)
    # the same, sooner
    monkeypatch.setitem(PREDICTORS, 'cnn', partial(Folds, partial(GridCNN, epochs=20)))
    whole, save = search(config=config, p=p).run(progress=False), RunDir.save_checkpoint
    def killed(self, state):
        save(self, state)
        raise KeyboardInterrupt
    monkeypatch.setattr(RunDir, 'save_checkpoint', killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / 'a', config, p).run(progress=False)
    monkeypatch.setattr(RunDir, 'save_checkpoint', save)
    again = search(tmp_path / 'a', config, p)
    assert again.update == 2 and same(again.run(progress=False), whole)


def test_killed_between_log_and_checkpoint(tmp_path, monkeypatch):
    whole, save = search().run(progress=False), RunDir.save_checkpoint
    def lost(self, state):
        if state['update'] == 3: raise KeyboardInterrupt
        save(self, state)
    monkeypatch.setattr(RunDir, 'save_checkpoint', lost)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / 'a').run(progress=False)
    monkeypatch.setattr(RunDir, 'save_checkpoint', save)
    assert len(RunDir(tmp_path / 'a', asdict(CONFIG) | asdict(SMALL)).rows()) == 18
    again = search(tmp_path / 'a')
    assert again.update == 2 and same(again.run(progress=False), whole)
    assert RunDir(tmp_path / 'a', asdict(CONFIG) | asdict(SMALL)).rows() == whole.log


class Known:
    """A model that knows the truth: the FFN of layer 0 costs, nothing else does; sure of narrow
    first layers, unsure of the rest"""
    def __init__(self, seed=0):
        pass

    def fit(self, X, y):
        return self

    def predict(self, X):
        return 1 - X[:, 1], X[:, 1] + 0.1


def test_the_agent_learns_what_the_predictor_says(monkeypatch):
    monkeypatch.setitem(PREDICTORS, 'known', Known)
    config = SearchConfig(0.4, episodes=36, batch=6, step=(1, 4), final_blocks=6,
                          sparsity_start=0.4, balance=(0,))
    ratio = lambda s: s.solve(s.guess(), 0.4)[0, 1] / s.cost.full[0, 1]
    s, still = (search(config=config, p=Prediction('known', 1, inner, 32, pool=64))
                for inner in (20, 0))
    for o in (s, still):
        while o.update < 6:
            o.step()
    assert ratio(s) > 0.9 > ratio(still) + 0.1


def test_what_is_measured_promises_most_or_is_known_least(monkeypatch):
    monkeypatch.setitem(PREDICTORS, 'known', Known)
    s = search(p=Prediction('known', 1, 0, pool=64, explore=1 / 3))
    s.step()
    before = s.searcher.recommend(0.4)
    s.step()
    assert (s.searcher.recommend(0.4)
            == before).all(), 'a selected sample is no lesson for the agent'
    pool = s.describe(s.searcher.agent.ask(0.4, 64), 0.4)
    chosen = s.searcher.choose(Known(), 0.4, 6)
    x = s.describe(chosen, 0.4)
    assert len(np.unique(x, axis=0)) == 6, 'no policy twice while there are others'
    assert (np.diff(x[:4, 1]) <= 0).all() and x[:4, 1].min() >= np.quantile(pool[:, 1], 0.8)
    s.searcher.agent.log_std.data.fill_(np.log(0.2))  # a pool of some twenty different policies
    assert all(len(np.unique(s.describe(s.searcher.choose(Known(), 0.4, 6), 0.4), axis=0)) == 6
               for _ in range(5))
    s.searcher.agent.log_std.data.fill_(0)
    # explored alone, the order is that of the uncertainty
    s.searcher.config = Prediction('known', 1, 0, pool=64, explore=1.0)
    assert (s.describe(s.searcher.choose(Known(), 0.4, 6), 0.4)[:, 1]
            >= np.quantile(pool[:, 1], 0.8)).all()


def test_other_searchers_can_learn_on_predictions():
    for method in ('eas', 'random-search'):
        r = search(config=SearchConfig(0.4, method, episodes=18, batch=6, step=(1, 4),
                                       final_blocks=6)).run(progress=False)
        assert len(r.log) == 18 and r.reward > 0
    # CMA-ES cannot: its batches have one size
    with pytest.raises(ValueError, match='keep the batch constant'):
        search(config=SearchConfig(0.4, 'cma', episodes=18, batch=6, step=(1, 4),
                                   final_blocks=6)).run(progress=False)


def test_a_searcher_keeps_its_start():
    config = SearchConfig(0.4, 'evopress', episodes=12, batch=6, step=(1, 4), final_blocks=6)
    s = search(config=config)
    s.run(progress=False)
    assert s.start != 0 and s.searcher.agent.start == s.start


@pytest.mark.parametrize('method', ['gradient', 'pathwise'])
def test_slopes_are_not_predicted(method):
    with pytest.raises(ValueError, match=f"method '{method}' follows slopes"):
        search(config=SearchConfig(0.4, method, episodes=12, batch=6, step=(1, 4), final_blocks=6))


DESIGN = dict(targets=[0.2, 0.3, 0.5, 0.6], each=10, head_starts=[0, 2], scale=1.5, seed=0)
CHOSEN = dict(methods=['ffp'], sparsity=0.5, seeds=[0], each=6, tokens=None)
SMALLER = dict(MODEL='toy', DESIGN=DESIGN, VISITED=CHOSEN, BLOCKS=4, SEEDS=(0, 1),
               GROWTH=(10, None), FOLDS=2, NOISE=prediction.NOISE | dict(seeds=()),
               PREDICTORS=dict(ridge=PREDICTORS['ridge']), TOKENS=6_000, MEASURED=3, SELECTION=4,
               KINDS=dict(model=None, predicted=Prediction('ridge', 1, 2, 8, pool=16)))


@pytest.fixture(scope='module')
def lab(bench, tmp_path_factory):
    "The study at a tiny size, and a lab whose only model is the tiny one"
    folder = tmp_path_factory.mktemp('data')
    tiny = cells.Lab(folder, runs=folder, work=folder)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(tiny, 'bench', lambda *a: bench)
        for name, value in SMALLER.items():
            m.setattr(prediction, name, value)
        yield tiny


@pytest.fixture(scope='module')
def data(bench, lab):
    "The study's data set, and its `record`"
    records, wanted = lab.runs / 'prediction', next(prediction.plan(lab))
    measure = lambda: cached(records, wanted.config, lambda _: wanted.measure(records))
    with pytest.MonkeyPatch.context() as m:
        cells.run_cell(bench, cells.Cell('toy', 0.5, 'ffp', 0, modes=('static',)),
                       lab.runs / 'main', lab.work)
        calls, perplexity = [], bench.perplexity
        def dies(*a):
            calls.append(a)
            if len(calls) == 12: raise KeyboardInterrupt
            return perplexity(*a)
        m.setattr(bench, 'perplexity', dies)
        with pytest.raises(KeyboardInterrupt):
            measure()
        assert not records.exists()
        record = measure()
    return prediction.load_data(record, records) | dict(calls=len(calls), record=record)


def test_data_is_measured_once_and_is_what_it_says(bench, data):
    rows = prediction.designed(bench, DESIGN)
    assert (len(data['y']) == 46 and (data['source'] == 'ffp').sum() == 6
            and data['calibrated'][data['source'] == 'ffp'].all())
    different = {(w.tobytes(), c) for w, c in zip(data['widths'], data['calibrated'])}
    assert data['calls'] == len(
        different) + 2, 'the dense model, and the one that died, come on top'
    assert data['record']['result']['forward_tokens'] == (len(different) + 1) * 4 * 32
    text = bench.text.search
    blocks = text[np.linspace(0, len(text) - 1, 4).round().astype(int)]
    for i in (0, 5, 39):
        w = np.array(rows[i]['widths'])
        assert (data['widths'][i] == w).all()
        nll = bench.perplexity(w, blocks, bench.static if rows[i]['calibrated'] else None).mean_nll
        assert data['y'][i] == pytest.approx(nll, abs=1e-5)
    by = [data['calibrated'][(data['target'] == t) & (data['source'] == 'designed')].mean()
          for t in DESIGN['targets']]
    assert by == [0.5] * 4
    assert (data['X']
            == features(data['widths'], bench.cost.full, data['X'][:, -2],
                        data['calibrated'])).all()
    assert np.allclose(data['X'][:, -2], bench.cost.sparsity(data['widths']), atol=1e-6)


def test_a_search_without_a_record_is_an_error(lab, data):
    with pytest.raises(ValueError, match='1 of the 2 searches'):
        prediction.visited(CHOSEN | dict(seeds=[0, 1]), lab.runs / 'main')


def test_study_records(lab, data, monkeypatch):
    found = run_study(prediction.STUDY, lab)
    assert found[0] == data['record']
    assert run_study(prediction.STUDY, lab) == found
    line = data | dict(y=data['X'][:, 1], source=np.array(['ffp'] * 46), target=np.full(46, 0.5))
    noisy = pd.DataFrame(prediction.measure_noisy(line, ('ridge',), (0, 1), 4, 0.1, 0.0)['rows'])
    assert len(noisy) == 4 and (noisy.spearman > 0.7).all(), ('one column decides, and a line '
                                                              'follows it through the noise')
    judged, timing, searches = prediction.STUDY.read(lab.runs)
    assert (set(judged.split) == {'random', 'middle', 'highest', 'visited', 'final'}
            and len(judged) == 12)
    assert (sorted(judged[judged.split == 'random'].train) == [10, 10, 32, 32]
            and np.isfinite(judged.mse).all() and (judged.us > 0).all())
    assert timing['model_s'] > 0 and timing['blocks'] == 4
    assert sorted(searches.kind) == ['model', 'model', 'predicted', 'predicted']
    assert (searches.measured > 0).all()
    for r in found[-4:]:
        assert 0.8 * 6_000 < r['result']['forward_tokens'] <= 6_000
        assert r['config']['search']['agent']['std'] == 0.5
    others = dict(model=None, predicted=Prediction('gp'))
    monkeypatch.setattr(prediction, 'KINDS', others)
    assert list(prediction.STUDY.read(lab.runs)[2].kind) == [
        'model', 'model'], 'searches with other settings are not shown'
    monkeypatch.setattr(prediction, 'read_records', lambda *a: [
        r | dict(config_id='another') if r is found[0] else r for r in found])
    assert prediction.STUDY.read(lab.runs)[0].empty, 'nor what was learned from other data'
