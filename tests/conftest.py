"Fixtures that several test files share"
import os

import pytest
import torch

os.environ.setdefault('TQDM_DISABLE', '1')
# no test needs a hub, and a wrong name should not wait for one
os.environ.setdefault('HF_HUB_OFFLINE', '1')
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line('markers', 'gpu: shows what only a CUDA GPU can show (make gpu)')


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available(): return
    for item in items:
        if item.get_closest_marker('gpu'):
            item.add_marker(pytest.mark.skip(reason='no CUDA GPU here'))


def make_qwen2_tokenizer():
    """Single characters: transformers reads every tokenizer of a Qwen2 folder as byte-level BPE,
    never as words"""
    from transformers import Qwen2Tokenizer
    vocab = {c: i + 3 for i, c in enumerate('w0123456789ĠĊ')} | {'<unk>': 0, '<bos>': 1, '<eos>': 2}
    return Qwen2Tokenizer(vocab=vocab, merges=[], unk_token='<unk>', bos_token='<bos>',
                          eos_token='<eos>', pad_token='<eos>')


def make_folder(folder, family='llama'):
    "A dense tiny model folder `dense` and a text file `text.txt`, all that the CLI needs"
    import numpy as np

    from ffp_nb.core.families import tiny_model, tiny_tokenizer
    tiny_model(family, seed=1).save_pretrained(folder / 'dense')
    (make_qwen2_tokenizer if family == 'qwen2'
     else tiny_tokenizer)().save_pretrained(folder / 'dense')
    rng = np.random.default_rng(0)
    paragraphs = [' '.join(f'w{i}' for i in rng.integers(0, 211, 60)) for _ in range(120)]
    (folder / 'text.txt').write_text('\n\n'.join(paragraphs))
    return folder


def worked(result):
    "The result of a command that ended well"
    assert result.exit_code == 0, f'{result.output}\n{result.exception!r}'
    return result


@pytest.fixture
def word_tokenizer():
    "A tokenizer of 211 words, as many as `tiny_model` knows; every word is one token"
    from ffp_nb.core.families import tiny_tokenizer
    return tiny_tokenizer()


@pytest.fixture
def tiny_folder(tmp_path):
    "A dense model folder and a text file in a folder of this test's own"
    return make_folder(tmp_path)


@pytest.fixture(scope='session')
def family_folder(tmp_path_factory):
    "`family_folder(name)`: the same for any family, made once and only read"
    made = {}
    def get(family):
        if family not in made:
            made[family] = make_folder(tmp_path_factory.mktemp(family), family)
        return made[family]
    return get


@pytest.fixture(scope='session')
def ffp():
    """`ffp('prune', '--out', folder)`: the command, with a smaller smoke profile and, unless asked
    for, no pictures"""
    from typer.testing import CliRunner

    from ffp_nb.core import runs
    from ffp_nb.pipeline import cli, config, prune
    from ffp_nb.search import diagnose
    def run(*args, pictures=False):
        with pytest.MonkeyPatch.context() as m:
            m.setitem(config.PROFILES, 'smoke', config.Profile(32, 4, 2, 8, 4, 1, 2, 2))
            m.setenv('COLUMNS', '300')
            if not pictures:
                for module in (prune, diagnose):
                    for name in ('plot_retention', 'plot_search', 'plot_slopes'):
                        m.setattr(module, name, lambda *a, **kw: None)
                for module in (prune, runs):
                    m.setattr(module, 'save_figure',
                              lambda fig, path: runs.atomic_write(path, b'picture'))
            return CliRunner().invoke(cli.app, [str(a) for a in args])
    return run


@pytest.fixture(scope='module')
def bench(tmp_path_factory):
    "A tiny LLaMA with its text, elastic and with statistics: what studies are made of"
    from ffp_nb.pipeline.bench import Bench
    from ffp_nb.pipeline.config import Profile, PruneConfig
    folder = make_folder(tmp_path_factory.mktemp('study'))
    profile = Profile(block_len=32, calibration_blocks=8, sequential_blocks=4, episodes=8, batch=4,
                      blocks=2, final_blocks=3, test_blocks=4)
    config = PruneConfig(str(folder / 'dense'), str(folder / 'text.txt'), method='ffp',
                         criterion='wanda', dtype='float32', step=(1, 8), profile=profile)
    return Bench.load(config, progress=False)
