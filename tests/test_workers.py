"""Policies measured by Ray actors, and models split over memory and disk: the same figures as in
one process from one memory"""
import errno
import json
import os
import pickle
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ffp_nb.core import families
from ffp_nb.core.criteria import taylor_scores, unit_order
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import FAMILIES, FIVE, Layout, is_on_disk, load_model, on_disk
from ffp_nb.core.perplexity import block_nll
from ffp_nb.core.ridge import Calibrator, sequential_calibrate
from ffp_nb.core.stats import collect_stats
from ffp_nb.core.text import Blocks
from ffp_nb.pipeline import bench as benches, prune
from ffp_nb.pipeline.config import Profile, PruneConfig
from ffp_nb.search.loop import Search, SearchConfig
from ffp_nb.search.workers import WorkerEvaluator, Workers, replica_of

# Ray's own workers would wait behind everything else on a busy machine
os.environ.setdefault('RAY_worker_niceness', '0')
ray = pytest.importorskip('ray')
BLOCKS = Blocks(torch.randint(0, 211, (6, 32), generator=torch.Generator().manual_seed(0)), 31)


@pytest.fixture(scope='module')
def cluster():
    "Two CPUs for all tests but the one that lets the command start Ray"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level='error')
    yield
    ray.shutdown()


def fake(folder, dies=lambda widths, folder: False):
    "A function that makes an evaluator without a model, which notes each call"
    class Fake:
        forward_tokens = 0
        def __call__(self, widths, idx):
            with open(f'{folder}/calls', 'a') as f:
                f.write(f'{widths}\n')
            if widths < 0: raise ValueError(f'width {widths}')
            if dies(widths, folder):
                os._exit(1)
            time.sleep(0.1)
            self.forward_tokens += len(idx)
            return widths * 10
    return Fake


def calls(folder):
    return Counter(Path(folder, 'calls').read_text().splitlines())


def dying(make, folder, at):
    """What `make` gives, in a process that ends itself in the measurement number `at` of all
    workers, after it and before it answers"""
    def first():  # two may ask at once
        try:
            os.close(os.open(f'{folder}/died', os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def remake():
        evaluator = make()
        class Mortal(type(evaluator)):
            def __call__(self, widths, idx):
                with open(f'{folder}/calls', 'a') as f:
                    f.write(f'{np.asarray(widths).tolist()} {idx}\n')
                nats = super().__call__(widths, idx)
                if len(Path(folder, 'calls').read_text().splitlines()) >= at and first():
                    os._exit(1)
                return nats
        evaluator.__class__ = Mortal
        return evaluator
    return remake


def replica(bench):
    "What makes the evaluator of a bench in a worker"
    c = bench.config
    return replica_of(bench.evaluator(), c.model, c.dtype, bench.how, bench.fingerprint)


def test_a_replica_is_the_evaluator(bench):
    """Without Ray: what a worker makes from a pickle measures what the bench measures; other
    weights are refused"""
    made = pickle.loads(pickle.dumps(replica(bench)))
    far, near = made(), bench.evaluator()
    policies = [np.maximum(bench.elastic.layout.full * k // 10, 1) for k in (3, 6, 9, 10)]
    assert np.array_equal(far.rewards(policies, [0, 2, 5]), near.rewards(policies, [0, 2, 5]))
    assert far.forward_tokens == near.forward_tokens and len(far.pool) == len(near.pool)
    with pytest.raises(ValueError, match='other weights .*fingerprint.*Copy the same model'):
        replace(made, fingerprint='0' * 16)()


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason='two workers of one CPU each')
def test_the_command_gives_the_same_files(family_folder, ffp, tmp_path):
    """Ray is started and ended by the command; no file says that there were workers, so either run
    may go on with the other's"""
    folder = family_folder('qwen2')
    options = ['--model', folder / 'dense', '--text', folder / 'text.txt', '--profile', 'smoke',
               '--dtype', 'float32', '--sparsity', 0.4]
    for name, more in (('alone', []), ('spread', ['--workers', 2])):
        result = ffp('search', *options, *more, '--out', tmp_path / name)
        assert result.exit_code == 0, f'{result.output}\n{result.exception!r}'
    assert not ray.is_initialized()
    names = {p.relative_to(tmp_path / 'alone') for p in (tmp_path / 'alone').rglob('*.json*')}
    assert {Path('widths.json'), Path('search/policies.jsonl')} <= names
    for name in names:
        alone, spread = (tmp_path / d / name for d in ('alone', 'spread'))
        assert alone.read_bytes() == spread.read_bytes(), name
    assert json.loads((tmp_path / 'spread' / 'widths.json').read_text())['forward_tokens'] > 0


def test_a_search_loses_nothing_with_a_worker(bench, cluster, tmp_path):
    "A worker ends itself in the middle: the same search, and one measurement more"
    c = replace(bench.config, sparsity=0.4).search_config()
    want = Search(bench.evaluator(), bench.cost, c).run(progress=False)
    local = bench.evaluator()
    spread = WorkerEvaluator(bench.evaluator(), dying(replica(bench), tmp_path, 9), 2)
    try:
        got = Search(spread, bench.cost, c).run(progress=False)
    finally:
        spread.close()
    assert (got.log == want.log and got.reward == want.reward
            and np.array_equal(got.widths, want.widths))
    assert got.forward_tokens == want.forward_tokens and spread.workers.lost == 1
    drop = lambda updates: [{k: v for k, v in u.items() if k != 'wall_s'} for u in updates]
    assert drop(got.updates) == drop(want.updates)
    class Noting(type(local)):
        def __call__(self, widths, idx):
            noted.append(f'{np.asarray(widths).tolist()} {[int(i) for i in idx]}')
            return super().__call__(widths, idx)
    noted, local.__class__ = [], Noting
    Search(local, bench.cost, c).run(progress=False)
    extra = calls(tmp_path) - Counter(noted)
    assert sum(extra.values()) == 1 and not Counter(noted) - calls(
        tmp_path), 'each policy once, the lost one twice'


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason='two workers of one CPU each')
@pytest.mark.parametrize('method, agent', [('gradient', {}), ('gradient', dict(loss='kl')),
                                           ('pathwise', dict(mix=0.5))])
def test_workers_follow_the_same_slopes(method, agent, bench, cluster):
    "A search by slopes is the same, bit for bit"
    c = SearchConfig(0.4, method, 1, episodes=12, batch=4, blocks=2, step=(1, 8), agent=agent)
    want = Search(bench.evaluator(), bench.cost, c).run(progress=False)
    spread = WorkerEvaluator(bench.evaluator(), replica(bench), 2)
    try:
        got = Search(spread, bench.cost, c).run(progress=False)
    finally:
        spread.close()
    drop = lambda updates: [{k: v for k, v in u.items() if k != 'wall_s'} for u in updates]
    assert got.log == want.log and drop(got.updates) == drop(want.updates)
    assert np.array_equal(got.widths, want.widths) and got.reward == want.reward
    assert got.forward_tokens == want.forward_tokens


def test_a_worker_killed_from_outside(cluster, tmp_path):
    "Answers that are there are kept, the job in flight is done again, an exception is not retried"
    workers = Workers(fake(tmp_path), 1)
    def kill():
        while not (tmp_path / 'calls').exists() or sum(calls(tmp_path).values()) < 3:
            time.sleep(0.01)
        (worker, job), = workers._busy.values()
        ray.kill(worker)
    killer = threading.Thread(target=kill)
    killer.start()
    assert workers.map([(w, [0]) for w in range(6)]) == [(10 * w, 1) for w in range(6)]
    killer.join()
    assert (workers.lost == 1 and sum(calls(tmp_path).values()) == 7
            and max(calls(tmp_path).values()) == 2)
    with pytest.raises(ValueError, match='width -1'):
        workers.map([(-1, [0])])
    assert calls(tmp_path)[
        '-1'] == 1 and workers._kind is None, 'an error of its own ends the workers'


def test_retries_end(cluster, tmp_path):
    workers = Workers(fake(tmp_path, lambda widths, _: widths == 1), 1, retries=1)
    with pytest.raises(RuntimeError,
                       match='2 workers in a row died on the same policy.*fewer workers'):
        workers.map([(0, []), (1, [])])
    assert calls(tmp_path) == {'0': 1, '1': 2}
    with pytest.raises(RuntimeError, match='1 workers in a row died while it loaded'):
        Workers(lambda: os._exit(1), 1, retries=0).map([(0, [])])


def test_without_ray(monkeypatch, family_folder, ffp, tmp_path):
    monkeypatch.setitem(sys.modules, 'ray', None)
    monkeypatch.setattr(benches, 'load_model', lambda *a, **kw: 1 / 0)
    folder = family_folder('llama')
    for command in ('search', 'prune'):
        result = ffp(command, '--model', folder / 'dense', '--text', folder / 'text.txt',
                     '--workers', 2, '--out', tmp_path / 'out')
        assert (result.exit_code == 1 and 'pip install "ffp_nb[ray]"' in result.stderr
                and not (tmp_path / 'out').exists())


def split(folder, family, device='disk'):
    "A device map: the first layer, the norm and OPT's positions in memory, the rest on disk"
    names = FAMILIES[family].layers.rpartition('.')[0]
    backbone = f'model.{names}'.rstrip('.')
    model = load_model(str(folder / 'dense'), 'float32')[0]
    parts = {f'{backbone}.{n}': 'cpu' for n, _ in model.get_submodule(backbone).named_children()
             if n != 'layers'}
    return (parts | {f'{backbone}.layers.{i}': device if i else 'cpu' for i in range(3)}
            | {f'{backbone}.embed_tokens': device, 'lm_head': device})


def everything(model):
    "What the pipeline takes from a model, as one list of tensors"
    layout = Layout(model)
    stats = collect_stats(model, layout, BLOCKS, progress=False)
    taylor = taylor_scores(model, layout, BLOCKS[:2], progress=False)
    em = ElasticModel(model, unit_order(layout, stats))
    static = Calibrator(em, stats.permute(em.columns), 0.1)
    widths = np.random.default_rng(0).integers(1, em.layout.full)
    widths[0, 0] = widths[1, 1] = widths[2, 0] = 0
    out = [*stats.gram.values(), *stats.total.values(), *taylor.values()]
    repairs = [None, static,
               *(sequential_calibrate(em, widths, BLOCKS, 0.1, static, t, progress=False)
                 for t in ('module', 'residual'))]
    for weights in repairs:
        with em.at(widths, weights), torch.inference_mode():
            own, nll = em.sliced(), torch.from_numpy(block_nll(model, BLOCKS))
            out += [model(BLOCKS.ids).logits, own(BLOCKS.ids).logits, nll,
                    *own.state_dict().values()]
            assert not any(is_on_disk(p) for p in own.parameters())
    with torch.inference_mode():
        return [*out, em.restore().model(BLOCKS.ids).logits], em


@pytest.mark.parametrize('family', FIVE)
def test_a_split_model_is_the_same_model(family, family_folder):
    folder = family_folder(family)
    load = lambda **kw: load_model(str(folder / 'dense'),
                                   'bfloat16' if family == 'mistral' else 'float32', **kw)[0]
    (whole, _), (parts, em) = everything(load()), everything(load(device_map=split(folder, family)))
    assert len(whole) == len(parts) and all(torch.equal(a, b) for a, b in zip(whole, parts))
    # sorted weights are on disk again, and no other
    for (layer, _), m in em.layout.modules.items():
        assert all(is_on_disk(lin.weight) == (layer > 0) and not lin.weight.is_meta
                   for lin in (m.out, *(l for l, _ in m.rows)))


def test_a_split_model_is_pruned_to_the_same_files(family_folder, tmp_path):
    folder = family_folder('llama')
    # not by slopes: they need every weight on a device that computes
    config = PruneConfig(str(folder / 'dense'), str(folder / 'text.txt'), sparsity=0.4,
                         method='ffp', dtype='float32', step=(1, 4),
                         profile=Profile(32, 4, 2, 8, 4, 1, 2, 2))
    how = dict(whole={}, split=dict(device_map=split(folder, 'llama')))
    tables = [prune.prune(config, tmp_path / name, progress=False, **kw)
              for name, kw in how.items()]
    assert tables[0].equals(tables[1])
    for name in ('model/model.safetensors', 'model/config.json', 'search/policies.jsonl'):
        one, many = (tmp_path / d / name for d in ('whole', 'split'))
        assert one.read_bytes() == many.read_bytes(), name
    ids = {json.loads(next((tmp_path / n).glob('prune-*.json')).read_text())['config_id']
           for n in ('whole', 'split')}
    assert len(ids) == 1


def test_tied_embeddings_stay_tied(tmp_path, word_tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=211, hidden_size=64, num_hidden_layers=2, num_attention_heads=8,
                         intermediate_size=96, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    places = {'model.embed_tokens': 'disk', 'lm_head': 'disk', 'model.layers': 'disk',
              'model.norm': 'cpu', 'model.rotary_emb': 'cpu'}
    whole = load_model(str(tmp_path), 'float32')[0]
    parts = load_model(str(tmp_path), 'float32', device_map=places)[0]
    assert (parts.lm_head.weight is parts.model.embed_tokens.weight
            and is_on_disk(parts.lm_head.weight))
    with torch.inference_mode():
        assert torch.equal(whole(BLOCKS.ids).logits, parts(BLOCKS.ids).logits)


def test_device_auto_and_both(family_folder, monkeypatch):
    folder, asked = str(family_folder('llama') / 'dense'), []
    load = families.AutoModelForCausalLM.from_pretrained
    def spy(*a, **kw):
        asked.append(kw['device_map'])
        return load(*a, **kw)
    monkeypatch.setattr(families.AutoModelForCausalLM, 'from_pretrained', spy)
    auto = load_model(folder, 'float32', device='auto')[0]
    cpu = load_model(folder, 'float32', 'cpu')[0]
    assert asked == ['auto', None]
    with torch.inference_mode():
        torch.testing.assert_close(auto(BLOCKS.ids.to(auto.device)).logits.cpu(),
                                   cpu(BLOCKS.ids).logits, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match='give one of the two'):
        load_model(folder, device='cpu', device_map='auto')


def test_weights_on_disk(monkeypatch):
    t = torch.randn(5, 7).bfloat16()
    stored = on_disk(t)
    assert (torch.equal(stored, t) and is_on_disk(stored) and is_on_disk(stored[:2, :3])
            and not is_on_disk(t))
    assert not os.path.exists(stored.untyped_storage().filename), 'the file has no name any more'
    def full(*a):
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(families.os, 'posix_fallocate', full)
    with pytest.raises(OSError, match='do not fit in .*TMPDIR'):
        on_disk(t)


def test_slopes_of_a_split_model_are_refused_at_once(family_folder, tmp_path, monkeypatch):
    "The default needs the whole model on devices that compute; it says what does not"
    folder = family_folder('llama')
    monkeypatch.setattr(benches, 'cached_stats', lambda *a: pytest.fail('it reads the text'))
    config = PruneConfig(str(folder / 'dense'), str(folder / 'text.txt'), sparsity=0.4,
                         dtype='float32', step=(1, 4), profile=Profile(32, 4, 2, 8, 4, 1, 2, 2))
    with pytest.raises(ValueError, match='--method ffp'):
        prune.prune(config, tmp_path / 'out', progress=False, device_map=split(folder, 'llama'))
