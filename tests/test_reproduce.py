"""A record is made again and says the same, and says where its figures come from.

Two processes on one machine must agree bit for bit. Against `data/reproduce-*.json`, which came
from another machine, integers must be equal and figures close: PyTorch picks kernels for the
processor it runs on (AVX2, AVX-512, ...), which sum in another order, so the last bits of a float32
differ from one kind of CPU to the next and no threads or seeds can help. To replace the committed
record after a change that moves figures on purpose: python tests/test_reproduce.py tests/data"""
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent


def words() -> str:
    "The text; the stream of `RandomState` is frozen, whatever the version of NumPy"
    rng = np.random.RandomState(0)
    return '\n\n'.join(' '.join(f'w{i}' for i in rng.randint(0, 211, 60)) for _ in range(120))


def make_record(records: Path):
    """The record of one searched policy of a tiny model: search, repairs, test figures; model, text
    and tokenizer are made here"""
    from ffp_nb.core.families import tiny_model, tiny_tokenizer
    from ffp_nb.pipeline.bench import Bench
    from ffp_nb.pipeline.config import Profile, PruneConfig
    from ffp_nb.studies.cells import Cell, run_cell
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)  # relative names: a record must not depend on where it was made
        tiny_model('llama', seed=1).save_pretrained('tiny')
        tiny_tokenizer().save_pretrained('tiny')
        Path('words.txt').write_text(words())
        profile = Profile(block_len=32, calibration_blocks=8, sequential_blocks=4, episodes=16,
                          batch=4, blocks=2, final_blocks=3, test_blocks=4)
        config = PruneConfig('tiny', 'words.txt', method='ffp', criterion='wanda', dtype='float32',
                             step=(1, 8), profile=profile)
        bench = Bench.load(config, progress=False)
        run_cell(bench, Cell('tiny', 0.3, 'ffp', seed=3), records, 'work')
        os.chdir(HERE)


def read(folder):
    return json.loads(next(Path(folder).glob('tiny-ffp-*.json')).read_text())


def timeless(x):
    "The same without what a clock says"
    if isinstance(x, dict):
        return {k: timeless(v) for k, v in x.items()
                if k not in ('wall_s', 'created', 'environment')}
    return [timeless(v) for v in x] if isinstance(x, list) else x


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Records of two processes, each with one thread"
    folders = [tmp_path_factory.mktemp('record') for _ in range(2)]
    env = os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', TQDM_DISABLE='1')
    env.pop('FFP_RECOMPUTE', None)
    for f in folders:
        subprocess.run([sys.executable, __file__, f], check=True, env=env)
    return folders


def test_two_processes_agree_bit_for_bit(made):
    a, b = map(read, made)
    assert timeless(a) == timeless(b)  # JSON keeps every bit of a float
    logs = [np.load(next(f.glob('*.npz'))) for f in made]
    assert (logs[0].files == logs[1].files
            and all(np.array_equal(logs[0][k], logs[1][k]) for k in logs[0].files))


def test_the_committed_record_is_found_again(made):
    from ffp_nb.core.runs import config_id
    from ffp_nb.pipeline.config import first_form
    from ffp_nb.studies.study import find_measured
    new, old = read(made[0]), read(HERE / 'data')
    # it names only what was given; all other settings are still the ones of its time
    assert first_form(new['config']) == old['config'], 'its settings have changed: make it anew'
    assert config_id(first_form(new['config'])) == old['config_id']
    assert find_measured(HERE / 'data', new['config']) == old
    tried = [np.load(next(Path(f).glob('tiny-ffp-*.npz')))['widths']
             for f in (made[0], HERE / 'data')]
    assert np.array_equal(*tried)  # every policy of the search
    assert (new['result']['widths'] == old['result']['widths']
            and new['forward_tokens'] == old['forward_tokens'])
    for mode, nll in old['result']['nll'].items():
        np.testing.assert_allclose(new['result']['nll'][mode], nll, rtol=0, atol=1e-4)
    np.testing.assert_allclose(new['result']['search']['scores'], old['result']['search']['scores'],
                               rtol=0, atol=1e-3)
    assert new['result']['search']['source'] == old['result']['search']['source']


def test_a_record_says_where_it_comes_from(made):
    import ffp_nb
    from ffp_nb.core.text import split_text
    r = read(made[0])
    assert (r['config']['text_sha256']
            == {k: hashlib.sha256(v.encode()).hexdigest()[:16]
                for k, v in split_text(words()).items()})
    # seed, and a hash of the weights
    assert r['config']['seed'] == 3 and len(r['result']['weights']) == 16
    assert ({'python', 'ffp_nb', 'torch', 'transformers', 'numpy'}
            <= r['environment']['versions'].keys())  # code
    assert r['environment']['hardware']['threads'] == 1
    if (Path(ffp_nb.__file__).parents[1] / '.git').exists():
        assert r['environment']['commit']


if __name__ == '__main__':
    make_record(Path(sys.argv[1]).resolve())
