"""Whatever is wrong, the user reads one line that says what and what to do, and nothing that was
there is lost"""
import errno
import json
import os
import resource
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_folder, worked
from safetensors.torch import load_file, save_file

from ffp_nb.core import perplexity, runs
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import Layout, load_model, tiny_model, tiny_tokenizer
from ffp_nb.core.stats import collect_stats
from ffp_nb.core.text import Blocks, load_corpus
from ffp_nb.export.hf import load_pruned, save_pruned
from ffp_nb.pipeline import bench
from ffp_nb.pipeline.config import Profile, PruneConfig
from ffp_nb.pipeline.recover import RecoverConfig
from ffp_nb.search import loop

COMMON = '--profile', 'smoke', '--dtype', 'float32'


def files(folder):
    return {str(o.relative_to(folder)): o.read_bytes() for o in sorted(Path(folder).rglob('*'))
            if o.is_file()}


def kept(before, folder):
    "Earlier files are byte for byte what they were, and no half-written one is left"
    now = files(folder)
    assert [k for k in before if now.get(k) != before[k]] == []
    assert [k for k in now if k.endswith(('.tmp', '.old'))] == []


def refused(result, *words, status=1):
    "One line on stderr that holds these words, exit status 1, no traceback"
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == status, result.output
    message = result.stderr.partition('error: ')[2].strip()
    assert message and '\n' not in message, result.stderr
    assert 'Traceback' not in result.output
    for word in words:
        assert word in message, f'{word!r} not in: {message}'
    return message


@pytest.fixture(scope='module')
def world(tmp_path_factory, ffp):
    "A model, a text and a search that ran undisturbed; only read"
    folder = make_folder(tmp_path_factory.mktemp('world'))
    base = '--model', folder / 'dense', '--text', folder / 'text.txt', '--sparsity', 0.4, *COMMON
    worked(ffp('search', *base, '--out', folder / 'out'))
    worked(ffp('prune', *base, '--out', folder / 'whole'))
    return folder, base


@pytest.fixture
def searched(world, tmp_path):
    "A copy of the finished search, to be put in danger"
    shutil.copytree(world[0] / 'out', tmp_path / 'out')
    return tmp_path / 'out'


def changed(base, **options):
    "A command's options with others in their place"
    base = list(base)
    for k, v in options.items():
        name = '--' + k.replace('_', '-')
        if name in base:
            base[base.index(name) + 1] = v
        else:
            base += [name, v]
    return base


def same_search(a, b):
    for name in ('policies.jsonl', 'config.json'):
        assert (a / name).read_bytes() == (b / name).read_bytes()


# Options

@pytest.mark.parametrize('command', ['search', 'prune'])
@pytest.mark.parametrize('options, words', [
    (dict(sparsity=1.5), ('1.5', 'above 0 and below 1')),
    (dict(sparsity=1), ('1.0', 'above 0 and below 1')),
    (dict(sparsity=0), ('0.0', 'above 0 and below 1')),
    (dict(sparsity=-0.2), ('-0.2', 'above 0 and below 1')),
    (dict(sparsity='nan'), ('nan', 'above 0 and below 1')),
    (dict(sparsity=0.95), ('0.95', 'infeasible', '0.0000 to', 'change the target')),
    (dict(sparsity=0.95, method='uniform'), ('0.95', 'infeasible', 'change the target')),
    (dict(dtype='float8'), ('float8', 'bfloat16, float32, float16')),
    (dict(seed=-1), ('seed', '-1')),
])
def test_options(world, searched, ffp, command, options, words):
    before = files(searched)
    refused(ffp(command, *changed(world[1], **options), '--out', searched), *words)
    kept(before, searched)


@pytest.mark.parametrize('command', ['search', 'prune'])
def test_infeasible_target_leaves_no_trace(world, searched, ffp, tmp_path, command):
    "It does not claim a new folder, and --no-resume does not put a good search away for it"
    before, high = files(searched), changed(world[1], sparsity=0.95)
    refused(ffp(command, *high, '--no-resume', '--out', searched), '0.95', 'infeasible')
    assert files(searched) == before
    refused(ffp(command, *high, '--out', tmp_path / 'new'), '0.95', 'infeasible')
    worked(ffp('search', *world[1], '--out', tmp_path / 'new'))
    same_search(tmp_path / 'new' / 'search', world[0] / 'out' / 'search')


@pytest.mark.parametrize('options, words',
                         [(dict(alpha=0), ('alpha', '0', '0.1')),
                          (dict(alpha='nan'), ('alpha', 'nan')),
                          ({'order-alpha': 0}, ('order_alpha 0', '0.1')),
                          ({'order-alpha': 1, 'criterion': 'wanda'},
                           ('order_alpha 1', "'wanda'", 'Leave order_alpha out'))])
def test_alpha(world, searched, ffp, options, words):
    before = files(searched)
    refused(ffp('prune', *changed(world[1], **options), '--out', searched), *words)
    kept(before, searched)


@pytest.mark.parametrize('option, known',
                         [('method', 'uniform-ffn'), ('criterion', 'wanda'), ('profile', 'smoke'),
                          ('calibration', 'sequential')])
def test_choices(world, searched, ffp, option, known):
    "Choices are checked by the command line itself, with its own status 2"
    before = files(searched)
    result = ffp('prune', *changed(world[1], **{option: 'nosuch'}), '--out', searched)
    assert result.exit_code == 2 and 'nosuch' in result.output and known in result.output
    assert 'Traceback' not in result.output
    kept(before, searched)


@pytest.mark.parametrize('name, value',
                         [('method', 'nosuch'), ('criterion', 'nosuch'), ('calibration', 'nosuch'),
                          ('dtype', 'int4'), ('sequential_target', 'nosuch')])
def test_choices_in_python(name, value):
    with pytest.raises(ValueError, match=f'{name}.*{value}.*expected'):
        PruneConfig(**{name: value})


@pytest.mark.parametrize('given, words', [
    (dict(sparsity='0.3'), "sparsity '0.3'.*a share"), (dict(seed=1.5), 'seed 1.5.*whole'),
    (dict(step=32), 'step 32.*two whole'), (dict(step=(0, 32)), r'step \(0, 32\).*at least 1'),
    (dict(p_min=2), 'p_min 2.*from 0 to 1'), (dict(p_min=(0.1, -1)), 'p_min.*from 0 to 1'),
    (dict(eval_len=1), 'eval_len 1.*at least 2'), (dict(profile='cpu'), "profile 'cpu'.*PROFILES"),
    (dict(budget='macs'), "budget 'macs'.*Budget"),
])
def test_values_in_python(given, words):
    with pytest.raises(ValueError, match=words):
        PruneConfig(**given)


@pytest.mark.parametrize('name, value', [('block_len', 1), ('batch', 0), ('episodes', 2.5),
                                         ('test_blocks', 0), ('blocks', None)])
def test_profiles_in_python(name, value):
    with pytest.raises(ValueError, match=f'{name} {value}; expected a whole number of at least'):
        Profile(**{name: value})
    assert Profile(test_blocks=None).test_blocks is None


def test_paths_in_python(tiny_folder, monkeypatch):
    "Models, texts and folders may be paths, with a ~, too"
    model, text = tiny_folder / 'dense', tiny_folder / 'text.txt'
    own = PruneConfig(model, text, eval_text=text)
    assert own == PruneConfig(str(model), str(text), eval_text=str(text))
    json.dumps(own.model)
    net, tokenizer = load_model(model, 'float32')
    assert load_corpus(text).sha256 == load_corpus(str(text)).sha256
    save_pruned(ElasticModel(net), tokenizer, tiny_folder / 'pruned')
    monkeypatch.setenv('HOME', str(tiny_folder))
    assert load_pruned('~/pruned')[0].config.pruned_widths
    assert (RecoverConfig(tiny_folder / 'pruned', text)
            == RecoverConfig(str(tiny_folder / 'pruned'), {str(text): 1.0}))
    with pytest.raises(ValueError, match='text.txt.*: -1}; expected texts with a weight above 0'):
        RecoverConfig('pruned', {text: -1})


def test_message_with_brackets_is_printed_whole(world, ffp, tmp_path):
    "Terminal markup in a name is neither obeyed nor a crash"
    for name in ('[bold]', '[/tmp]'):
        refused(ffp('eval', '--model', world[0] / 'dense', '--text', tmp_path / name / 'text.txt'),
                name)


# Text

def paragraphs(n, words=3):
    return '\n\n'.join(f'w{i % 211} ' * words + f'w{i // 211}' for i in range(n)).encode()


@pytest.mark.parametrize('content, words', [
    (b'', ('text.txt', 'is empty', 'Give')),
    (b' \n\n \n', ('text.txt', 'is empty', 'Give')),
    (paragraphs(3), ('3 different paragraphs', '16', 'Give more text')),
    (b'w1 w2\n\n' * 500, ('1 different paragraphs', 'Give more text')),
    (paragraphs(20), ('blocks', 'Give more text')),
    (b'\xe9t\xe9: not text' * 100, ('text.txt', 'not UTF-8', 'iconv', 'Convert')),
    (b'%PDF-1.7 not text' * 100, ('text.txt', 'a PDF file', 'Unpack or export')),
    (b'w1 w2\n' * 500, ('1 different paragraphs', 'blank lines')),
    (None, ('text.txt', 'no such file', 'Give')),
])
def test_text(world, searched, ffp, tmp_path, content, words):
    text, before = tmp_path / 'text.txt', files(searched)
    if content is not None:
        text.write_bytes(content)
    for command in ('search', 'prune'):
        refused(ffp(command, *changed(world[1], text=text), '--out', searched), *words)
    refused(ffp('eval', '--model', world[0] / 'dense', '--text', text, '--block-len', 128),
            *words[:-1])
    kept(before, searched)


def test_text_is_a_folder(world, ffp, tmp_path):
    (texts := tmp_path / 'texts').mkdir()
    refused(ffp('search', *changed(world[1], text=texts), '--out', tmp_path / 'out'),
            str(texts), 'a folder without text', 'Give')
    (texts / 'data.jsonl').write_text('{"body": "w1 w2"}\n' * 50)
    refused(ffp('search', *changed(world[1], text=texts), '--out', tmp_path / 'out'),
            'data.jsonl', 'no column "text" among body')


def test_same_text_in_other_files_gives_the_same_figures(world, ffp, tmp_path):
    rows = (world[0] / 'text.txt').read_text().split('\n\n')
    (tmp_path / 'rows').mkdir()
    (tmp_path / 'rows' / 'a.jsonl').write_text('\n'.join(json.dumps(dict(text=r)) for r in rows))
    (tmp_path / 'wide.txt').write_text('\n \n'.join(rows), encoding='utf-16-le')
    base = ('eval', '--model', world[0] / 'dense', '--block-len', 32, '--stride', 8,
            '--max-blocks', 3)
    tables = []
    for name in (world[0] / 'text.txt', tmp_path / 'rows', tmp_path / 'wide.txt'):
        worked(ffp(*base, '--text', name, '--csv', tmp_path / 'a.csv'))
        tables.append((tmp_path / 'a.csv').read_text().splitlines()[1].split(',')[2:])
    assert tables[0] == tables[1] == tables[2] and str(31 + 2 * 8) in tables[0]


@pytest.mark.skipif(os.name != 'posix', reason='pipes with a name')
@pytest.mark.parametrize('command', ['search', 'eval'])
def test_text_from_a_pipe_would_lose_its_beginning(world, ffp, tmp_path, command):
    os.mkfifo(tmp_path / 'pipe')
    out = ('--out', tmp_path / 'out') * (command == 'search')
    refused(ffp(command, '--model', world[0] / 'dense', '--text', tmp_path / 'pipe', *out),
            str(tmp_path / 'pipe'), 'only once', 'to a file')


@pytest.mark.parametrize('option', ['--text', '--model'])
def test_an_empty_name_is_not_this_folder(world, ffp, option, monkeypatch):
    monkeypatch.chdir(world[0])
    refused(ffp('eval', *changed(('--model', 'dense', '--text', 'text.txt'),
                                 **{option[2:]: ''})), f"{option[2:]} ''", 'empty', 'Give')
    result = ffp('search', *world[1], '--out', '')
    assert result.exit_code == 2 and 'an empty path' in result.output


@pytest.mark.parametrize('name', ['data/my.txt', 'nosuch/thing', 'corpora/wiki/a'])
def test_misspelt_text(world, ffp, tmp_path, name):
    start = time.perf_counter()
    refused(ffp('eval', '--model', world[0] / 'dense', '--text', name), name, 'no such file',
            "'owner/name'")
    assert time.perf_counter() - start < 10


def test_empty_last_split_is_found_before_the_search(world, ffp, tmp_path):
    "A text whose test split is empty must not cost the hours of a search first"
    rng = np.random.default_rng(0)
    # the long paragraph begins in the selection split and fills the test split too
    sizes = [60] * 80 + [1000]
    text = '\n\n'.join(' '.join(f'w{i}' for i in rng.integers(0, 211, n)) for n in sizes)
    (tmp_path / 'text.txt').write_text(text)
    message = refused(ffp('prune', *changed(world[1], text=tmp_path / 'text.txt'), '--out',
                          tmp_path / 'out'), 'Give more text')
    assert 'test' in message
    assert [o.name for o in (tmp_path / 'out' / 'search').iterdir()] == ['.lock']  # not begun


# Models

def bloom(folder):
    from transformers import BloomConfig, BloomForCausalLM
    BloomForCausalLM(BloomConfig(vocab_size=211, hidden_size=32, n_layer=1,
                                 n_head=2)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def edited_config(folder, **kw):
    config = json.loads((folder / 'config.json').read_text()) | kw
    (folder / 'config.json').write_text(json.dumps(config))


def poison(folder, name, value=float('nan')):
    weights = load_file(folder / 'model.safetensors')
    next(v for k, v in weights.items() if name in k).view(-1)[7] = value
    save_file(weights, folder / 'model.safetensors', metadata=dict(format='pt'))


def cut(folder, part=0.7):
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:int(part * path.stat().st_size)])


def no_tokenizer(folder):
    for o in folder.glob('tokenizer*'):
        o.unlink()


FINITE = 'NaN or infinity'
BROKEN = {'bloom': (bloom, ('bloom', 'llama, mistral, qwen2, qwen3, opt')),
          'type unknown to transformers': (lambda o: edited_config(o, model_type='nosuch'),
                                           ('nosuch', 'llama, mistral, qwen2, qwen3, opt')),
          'encoder-decoder': (lambda o: edited_config(o, model_type='t5'),
                              ('t5', 'llama, mistral, qwen2, qwen3, opt')),
          'post-norm opt': (lambda o: (tiny_model('opt').save_pretrained(o),
                                       edited_config(o, do_layer_norm_before=False)),
                            ('do_layer_norm_before', 'pre-norm')),
          'no config': (lambda o: (o / 'config.json').unlink(), ('dense', 'config.json', 'Give')),
          'config is no json': (lambda o: (o / 'config.json').write_text('{"model_type": "lla'),
                                ('config.json',)),
          'no weights': (lambda o: (o / 'model.safetensors').unlink(),
                         ('dense', 'could not be loaded')),
          'no tokenizer': (no_tokenizer, ('dense', 'tokenizer')),
          'weights cut': (cut, ('dense', 'again')),
          'weights empty': (lambda o: cut(o, 0), ('dense', 'again')),
          'nan in first layer': (lambda o: poison(o, 'layers.0.self_attn.q_proj'),
                                 (FINITE, 'again')),
          'nan in last projection': (lambda o: poison(o, 'layers.2.mlp.down_proj'),
                                     (FINITE, 'again')),
          'inf in head': (lambda o: poison(o, 'lm_head', float('inf')), (FINITE, 'again')),
          'nan in embedding': (lambda o: poison(o, 'embed_tokens'), (FINITE, 'again')),}


@pytest.mark.parametrize('case', BROKEN)
def test_model(world, searched, ffp, tmp_path, case):
    "Found before any search, by every command, whatever the method"
    damage, words = BROKEN[case]
    shutil.copytree(world[0] / 'dense', tmp_path / 'dense')
    damage(tmp_path / 'dense')
    before, options = files(searched), changed(world[1], model=tmp_path / 'dense')
    refused(ffp('search', *options, '--out', searched), *words)
    refused(ffp('prune', *changed(options, method='uniform'), '--out', searched), *words)
    refused(ffp('eval', '--model', tmp_path / 'dense', '--text', world[0] / 'text.txt',
                '--block-len', 32), *words)
    kept(before, searched)


def test_model_that_is_not_there(world, searched, ffp, tmp_path):
    before = files(searched)
    refused(ffp('search', *changed(world[1], model=tmp_path / 'nosuch'), '--out', searched),
            'nosuch', 'save_pretrained')
    refused(ffp('search', *changed(world[1], model='nosuch/model'), '--out', searched),
            'nosuch/model', 'smollm2')
    kept(before, searched)


def test_tokenizer_of_another_model(world, ffp, tmp_path):
    "More words than embeddings: an error, not an index out of range"
    shutil.copytree(world[0] / 'dense', tmp_path / 'dense')
    tiny_tokenizer(400).save_pretrained(tmp_path / 'dense')
    (tmp_path
     / 'text.txt').write_bytes((world[0] / 'text.txt').read_bytes().replace(b'w21 ', b'w321 '))
    options = changed(world[1], model=tmp_path / 'dense', text=tmp_path / 'text.txt')
    refused(ffp('search', *options, '--out', tmp_path / 'out'), 'tokenizer', '211')
    refused(ffp('eval', '--model', tmp_path / 'dense', '--text', tmp_path / 'text.txt',
                '--block-len', 32), 'tokenizer', '211')


def test_dropout_of_a_model_in_training_mode_is_off():
    "What is measured is the model, not a draw of it; its mode is the user's own"
    model = tiny_model('opt', seed=1)
    for m in model.modules():
        if isinstance(getattr(m, 'dropout', None), float):
            m.dropout = 0.5
    pool = Blocks(torch.randint(0, 211, (4, 16), generator=torch.Generator().manual_seed(0)), 15)
    layout, nats = Layout(model), perplexity.perplexity(model, pool).nll
    gram = collect_stats(model, layout, pool, progress=False).gram
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(pool.ids).logits, model(pool.ids).logits)
    np.testing.assert_array_equal(perplexity.perplexity(model, pool).nll, nats)
    again = collect_stats(model, layout, pool, progress=False).gram
    assert all(torch.equal(again[k], g) for k, g in gram.items())
    assert all(m.training for m in model.modules())
    assert not any(m.training for m in ElasticModel(model).model.modules())


def test_a_model_with_a_removed_module_is_not_pruned_again(world, searched, ffp, tmp_path):
    before, gone = files(searched), tmp_path / 'gone'
    em = ElasticModel(tiny_model())
    save_pruned(em.set([[4, 96], [0, 50], [4, 96]]), tiny_tokenizer(), gone)
    for command in ('search', 'prune'):
        refused(ffp(command, *changed(world[1], model=gone), '--out', searched), 'pruned already',
                'layer 1', 'dense')
    kept(before, searched)


PRUNED = {'weights cut': (cut, ('model.safetensors', 'again')),
          'weights empty': (lambda o: cut(o, 0), ('model.safetensors', 'again')),
          'no weights': (lambda o: (o / 'model.safetensors').unlink(), ('weights', 'again')),
          'no tokenizer': (no_tokenizer, ('no tokenizer', 'Copy')),
          'dense weights': (
              lambda o: save_file(tiny_model('llama').state_dict(), o / 'model.safetensors'),
              ('pruned_widths', 'again')),
          'widths of another model': (
              lambda o: edited_config(o, pruned_widths=[dict(heads=2, kv_heads=1, ffn=3)]),
              ('pruned_widths',)),
          'widths without names': (lambda o: edited_config(o, pruned_widths=[[1, 2]] * 3),
                                   ('pruned_widths',)),
          'config is no json': (lambda o: (o / 'config.json').write_text('{"pruned_widths": ['),
                                ('config.json',)),
          'nan': (lambda o: poison(o, 'lm_head'), (FINITE,)),}


@pytest.mark.parametrize('case', PRUNED)
def test_pruned_folder(world, ffp, tmp_path, case):
    damage, words = PRUNED[case]
    shutil.copytree(world[0] / 'whole' / 'model', tmp_path / 'model')
    damage(tmp_path / 'model')
    refused(ffp('eval', '--model', tmp_path / 'model', '--text', world[0] / 'text.txt',
                '--block-len', 32), *words)


@pytest.mark.parametrize('options, words', [
    (dict(split='train'), ('train', 'calibration, search, selection, test')),
    (dict(dtype='float8'), ('float8', 'bfloat16')),
    (dict(dtype='manual_seed'), ('manual_seed', 'bfloat16')),
    (dict(block_len=1), ('block_len 1', 'block_len >= 2')),
    (dict(block_len=10**6), ('1000000', 'smaller block_len')),
    (dict(stride=600, block_len=512), ('600', 'stride')),
    (dict(stride=0), ('stride 0', '1 <= stride')),
    (dict(max_blocks=0), ('max_blocks 0',)),
    (dict(max_blocks=-1), ('max_blocks -1',)),
    (dict(batch=0), ('batch 0',)),
    (dict(device='nosuch'), ('nosuch',)),
])
def test_eval_options(world, ffp, options, words):
    base = '--model', world[0] / 'dense', '--text', world[0] / 'text.txt', '--block-len', 32
    message = refused(ffp('eval', *changed(base, **options)), *words)
    assert not message.startswith('"'), 'a KeyError shows its message in quotes'


def test_blocks_longer_than_the_model_reads(family_folder, ffp):
    folder = family_folder('opt')  # its position table ends at 512
    refused(ffp('eval', '--model', folder / 'dense', '--text', folder / 'text.txt', '--block-len',
                600), '600', '512')


# Folders

@pytest.mark.parametrize('command', ['search', 'prune'])
def test_folder_of_another_run(world, searched, ffp, command):
    before = files(searched)
    message = refused(ffp(command, *changed(world[1], seed=7), '--out', searched), 'seed', '0', '7',
                      '--out', '--no-resume')
    assert 'config.json' not in message or 'seed' in message
    kept(before, searched)
    worked(ffp('search', *world[1], '--out', searched))
    assert {k: v for k, v in files(searched).items()} == before
    worked(ffp('search', *changed(world[1], seed=7), '--no-resume', '--out', searched))
    same_search(searched / 'search' / 'old-1', world[0] / 'out' / 'search')  # put away, not lost


def test_nothing_is_written_into_a_folder_of_text(world, ffp, tmp_path):
    "The next run would read it"
    (tmp_path / 'corpus').mkdir()
    shutil.copy(world[0] / 'text.txt', tmp_path / 'corpus')
    shutil.copytree(world[0] / 'whole' / 'model', tmp_path / 'model')
    before, inside = files(tmp_path), tmp_path / 'corpus' / 'a'
    for command in ('search', 'prune', 'elastic'):
        base = world[1] if command != 'elastic' else (*world[1][:2], *world[1][2:4], *COMMON)
        refused(ffp(command, *changed(base, text=tmp_path / 'corpus'), '--out', inside),
                str(inside), 'read as text', 'another place')
    refused(ffp('recover', tmp_path / 'model', '--text', tmp_path / 'corpus', '--out', inside),
            'read as text')
    refused(ffp('eval', '--model', world[0] / 'dense', '--text', tmp_path / 'corpus', '--csv',
                tmp_path / 'corpus' / 'a.csv'), 'read as text')
    assert files(tmp_path) == before


@pytest.mark.skipif(os.name != 'posix', reason='pipes with a name')
@pytest.mark.parametrize('command', ['eval', 'study'])
def test_a_table_replaces_nothing_but_a_table(world, ffp, tmp_path, command, monkeypatch):
    monkeypatch.setattr('ffp_nb.studies.registry.write_report', lambda folder: 'what records say')
    suffix = '.csv' if command == 'eval' else '.md'
    (tmp_path / 'notes.txt').write_text('mine')
    (tmp_path / f'folder{suffix}').mkdir()
    os.mkfifo(tmp_path / f'pipe{suffix}')
    option = (('eval', '--model', world[0] / 'dense', '--text', world[0] / 'text.txt',
               '--block-len', 32, '--csv') if command == 'eval' else ('study', 'report', '--out'))
    for name in ('notes.txt', f'folder{suffix}', f'pipe{suffix}'):
        refused(ffp(*option, tmp_path / name), name, f'no {suffix} file', 'another name')
    assert (tmp_path / 'notes.txt').read_text() == 'mine'
    (tmp_path / f'old{suffix}').write_text('of an earlier run')
    worked(ffp(*option, tmp_path / f'old{suffix}'))
    assert 'earlier' not in (tmp_path / f'old{suffix}').read_text()


@pytest.mark.parametrize('command', ['search', 'prune'])
def test_an_infeasible_target_costs_no_statistics(world, ffp, tmp_path, command, monkeypatch):
    monkeypatch.setattr(bench, 'cached_stats', lambda *a: pytest.fail('statistics were read'))
    refused(ffp(command, *changed(world[1], sparsity=0.95), '--out', tmp_path / 'new'),
            '0.95', 'infeasible', 'change the target')


def test_a_dollar_in_a_name_is_no_formula(world, ffp, tmp_path):
    "It would be one that cannot be drawn, after the search"
    shutil.copytree(world[0] / 'dense', tmp_path / 'a$_{b$')
    base = changed(world[1], model=tmp_path / 'a$_{b$')
    worked(ffp('search', *base, '--out', tmp_path / 'out', pictures=True))
    worked(ffp('report', tmp_path / 'out', '--out', tmp_path / 'report', pictures=True))
    assert (tmp_path / 'out' / 'retention.png').read_bytes()[:4] == b'\x89PNG'


def test_a_run_is_not_compared_with_itself(searched, ffp):
    refused(ffp('report', searched, searched / '..' / 'out'), 'the same run twice', 'once')


def test_a_loss_that_is_no_number_is_an_error_after_its_table(world, ffp, tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity, 'block_nll', lambda m, blocks, *a, **k:
                        np.full(len(blocks), np.nan))
    result = ffp('eval', '--model', world[0] / 'dense', '--text', world[0] / 'text.txt',
                 '--block-len', 32, '--csv', tmp_path / 'a.csv')
    refused(result, 'NaN or infinite', '--dtype float32')
    assert 'perplexity' in result.output and (tmp_path / 'a.csv').exists()


def test_model_in_out(world, ffp, tmp_path):
    shutil.copytree(world[0] / 'whole', tmp_path / 'out')
    before = files(tmp_path)
    for more in ((), ('--no-resume',)):
        refused(ffp('prune', *world[1], *more, '--out', tmp_path / 'out'), 'model', 'exists',
                '--overwrite')
        assert files(tmp_path) == before
    worked(ffp('prune', *world[1], '--overwrite', '--out', tmp_path / 'out'))
    assert ({k: v for k, v in files(tmp_path / 'out' / 'model').items()}
            == files(world[0] / 'whole' / 'model'))


def test_overwrite_that_fails_brings_the_old_model_back(world, ffp, tmp_path, monkeypatch):
    shutil.copytree(world[0] / 'whole', tmp_path / 'out')
    before, replace = files(tmp_path / 'out' / 'model'), os.replace
    def fails(a, b):
        if Path(b) == tmp_path / 'out' / 'model' and str(a).endswith('.tmp'):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(a, b)
    monkeypatch.setattr(os, 'replace', fails)
    refused(ffp('prune', *world[1], '--overwrite', '--out', tmp_path / 'out'), 'No space left',
            'free some space')
    assert files(tmp_path / 'out' / 'model') == before
    assert not list((tmp_path / 'out').glob('.model*'))


@pytest.mark.parametrize('command', ['search', 'prune'])
def test_out_cannot_be_made(world, ffp, tmp_path, command, monkeypatch):
    (tmp_path / 'file').write_text('mine')
    monkeypatch.setattr(bench, 'load_model',
                        lambda *a, **kw: pytest.fail('the model was loaded first'))
    for out in (tmp_path / 'file', tmp_path / 'file' / 'out'):
        refused(ffp(command, *world[1], '--out', out), str(out), 'a part of this path is a file')
    def denied(path, *a, **kw):
        raise PermissionError(errno.EACCES, 'Permission denied', str(path))
    monkeypatch.setattr(runs, 'open', denied, raising=False)  # the superuser may write anywhere
    refused(ffp(command, *world[1], '--out', tmp_path / 'out'), str(tmp_path / 'out'),
            'choose a folder that you may write to')
    assert (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.skipif(os.geteuid() == 0, reason='the superuser may write anywhere')
def test_no_permission_for_real(world, ffp, tmp_path):
    (tmp_path / 'locked').mkdir(mode=0o500)
    refused(ffp('search', *world[1], '--out', tmp_path / 'locked' / 'out'),
            'choose a folder that you may write to')


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize('damage',
                         [flip, lambda o: o.write_bytes(b''),
                          lambda o: o.write_bytes(o.read_bytes()[:-9])])
def test_corrupt_checkpoint_falls_back_to_the_one_before(world, searched, ffp, damage):
    damage(searched / 'search' / 'checkpoint.pt')
    with pytest.warns(UserWarning, match='is damaged.*checkpoint before it'):
        worked(ffp('search', *world[1], '--out', searched))
    same_search(searched / 'search', world[0] / 'out' / 'search')
    assert ((searched / 'widths.json').read_bytes()
            == (world[0] / 'out' / 'widths.json').read_bytes())


@pytest.mark.parametrize('names, words',
                         [(('checkpoint.pt', 'checkpoint.prev'),
                           ('no checkpoint can be read', 'checkpoint.pt', '--no-resume')),
                          (('config.json',), ('config.json', 'restore')),
                          (('policies.jsonl',), ('policies.jsonl', 'restore')),])
def test_damaged_run(world, searched, ffp, names, words):
    good = files(searched)
    for name in names:
        path = searched / 'search' / name
        path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 3])
    before = files(searched)
    refused(ffp('search', *world[1], '--out', searched), *words)
    kept(before, searched)
    for name in names:
        (searched / 'search' / name).write_bytes(good[f'search/{name}'])  # from a backup
    worked(ffp('search', *world[1], '--out', searched))
    assert files(searched) == good


def test_damaged_log_row(world, searched, ffp):
    log = searched / 'search' / 'policies.jsonl'
    log.write_bytes(log.read_bytes().replace(b'{"episode": 1', b'\x00\xff\x00"', 1))
    before = files(searched)
    refused(ffp('search', *world[1], '--out', searched), 'line 2', 'policies.jsonl', 'restore')
    kept(before, searched)


# Full disks

def full_after(monkeypatch, n):
    "The disk is full at the n-th file"
    fsync, calls = os.fsync, []
    def full(fd):
        if not os.path.isdir(f'/proc/self/fd/{fd}'):
            calls.append(fd)
        if len(calls) > n: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fsync(fd)
    monkeypatch.setattr(os, 'fsync', full)


def full_then_free(ffp, monkeypatch, n, command, world, folder):
    "The command runs into a full disk, is refused, and with the space back goes on to its end"
    out = folder / 'out'
    with monkeypatch.context() as m:
        full_after(m, n)
        result = ffp(command, *world[1], '--out', out)
    refused(result, 'No space left on device', 'free some space', str(folder))
    kept({}, folder)
    worked(ffp(command, *world[1], '--resume', '--out', out))
    return out


@pytest.mark.parametrize('n', range(8))
def test_disk_full_in_search(world, ffp, tmp_path, monkeypatch, n):
    out, whole = full_then_free(ffp, monkeypatch, n, 'search', world, tmp_path), world[0] / 'out'
    same_search(out / 'search', whole / 'search')
    assert (out / 'widths.json').read_bytes() == (whole / 'widths.json').read_bytes()


@pytest.mark.parametrize('n', [0, 1, 4, 6, 7, 8, 9])
def test_disk_full_in_prune(world, ffp, tmp_path, monkeypatch, n):
    "With the space back, the same command goes on to the same files"
    out, whole = full_then_free(ffp, monkeypatch, n, 'prune', world, tmp_path), world[0] / 'whole'
    same_search(out / 'search', whole / 'search')
    assert files(out / 'model') == files(whole / 'model')
    assert (out / 'table.csv').read_bytes() == (whole / 'table.csv').read_bytes()


def in_child(fn):
    "What `fn` returns (JSON) in a forked process"
    back, to = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        pid = os.fork()
    if not pid:
        try:
            os.write(to, json.dumps(fn()).encode())
        except BaseException as e:
            os.write(to, json.dumps(dict(raised=repr(e))).encode())
        finally:
            os._exit(0)
    os.close(to)
    os.waitpid(pid, 0)
    with open(back, 'rb') as f:
        return json.loads(f.read())


def test_weights_do_not_fit_on_the_disk(world, ffp, tmp_path):
    "The system itself stops the write of the weights; nothing is simulated"
    options = changed(world[1], method='uniform')
    worked(ffp('prune', *options, '--out', tmp_path / 'want'))
    shutil.copytree(tmp_path / 'want', tmp_path / 'out')
    before = files(tmp_path / 'out' / 'model')
    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        r = ffp('prune', *options, '--overwrite', '--out', tmp_path / 'out')
        return dict(status=r.exit_code, stderr=r.stderr, error=repr(r.exception))
    r = in_child(child)
    assert r.get('status') == 1 and 'SystemExit' in r['error'], r
    message = r['stderr'].partition('error: ')[2].strip()
    assert ('cannot write' in message and 'out/model' in message and '\n' not in message
            and 'a disk that takes files of this size' in message)
    assert (files(tmp_path / 'out' / 'model') == before
            and not list((tmp_path / 'out').glob('.model*')))
    worked(ffp('prune', *options, '--overwrite', '--out', tmp_path / 'out'))
    assert files(tmp_path / 'out' / 'model') == files(tmp_path / 'want' / 'model')


def test_tokenizer_does_not_fit_on_the_disk(world, ffp, tmp_path, monkeypatch):
    "The tokenizers library reports a full disk as a bare Exception"
    def full(*a, **kw):
        raise Exception('No space left on device (os error 28)')
    shutil.copytree(world[0] / 'whole', tmp_path / 'out')
    before = files(tmp_path / 'out' / 'model')
    with monkeypatch.context() as m:
        m.setattr('transformers.PreTrainedTokenizerFast.save_pretrained', full)
        result = ffp('prune', *world[1], '--overwrite', '--out', tmp_path / 'out')
    refused(result, 'cannot write', 'No space left', 'free some space')
    assert (files(tmp_path / 'out' / 'model') == before
            and not list((tmp_path / 'out').glob('.model*')))


# NaN

def breaking(monkeypatch, which):
    """Pruned models break down on the measurements for which `which(number)` holds; the dense one
    is well"""
    measure, calls = loop.Evaluator.__call__, []
    def broken(self, widths, idx):
        calls.append(1)
        out = measure(self, widths, idx)
        return np.full_like(out, np.nan) if which(len(calls)) else out
    monkeypatch.setattr(loop.Evaluator, '__call__', broken)


@pytest.mark.parametrize('method', ['ffp', 'random-search'])
def test_nan_in_pruned_policies_is_counted_and_penalised(world, ffp, tmp_path, monkeypatch, method):
    # measurements before the first episode: head starts of the attention
    start = len(loop.SearchConfig(0.4).balance)
    breaking(monkeypatch, lambda n: n in (start + 2, start + 3, start + 7))
    worked(ffp('search', *changed(world[1], method=method), '--out', tmp_path / 'out'))
    rows = [json.loads(o)
            for o in (tmp_path / 'out' / 'search' / 'policies.jsonl').read_text().splitlines()]
    assert [r['episode'] for r in rows if r['reward'] == 0] == [1, 2, 6]
    found = json.loads((tmp_path / 'out' / 'widths.json').read_text())
    assert (found['broken'] == 3 and found['reward'] > 0
            and found['source'] not in ('episode 1', 'episode 2', 'episode 6'))


@pytest.mark.parametrize('method', ['ffp', 'random-search'])
def test_nothing_but_nan_is_an_error(world, ffp, tmp_path, monkeypatch, method):
    with monkeypatch.context() as m:
        breaking(m, lambda n: True)
        result = ffp('search', *changed(world[1], method=method), '--out', tmp_path / 'out')
    refused(result, 'every episode gave NaN or infinity', 'Check the weights')
    assert len((tmp_path / 'out' / 'search' / 'policies.jsonl').read_text().splitlines()) == 8


def test_overflow_of_a_pruned_policy_is_a_broken_episode(family_folder):
    "Real infinities, not simulated ones"
    from ffp_nb.core.elastic import ElasticModel
    em = ElasticModel(tiny_model('llama'))
    em.dense_out((2, 'ffn'))[0][:, :48] *= 1e30
    em.dense_out((2, 'ffn'))[0][:, 48:] = 0
    pool = Blocks(torch.randint(0, 211, (2, 16), generator=torch.Generator().manual_seed(0)), 15)
    ev = loop.Evaluator(em, pool)
    ev._dense[:] = 5.0
    em.dense_out((2, 'ffn'))[0][:, :48] *= 1e30
    assert ev.reward(em.layout.full, [0, 1]) == 0.0
    assert perplexity.perplexity(em.model, pool).ppl == float('inf')


# One writer

@pytest.mark.skipif(os.name != 'posix', reason='forks')
@pytest.mark.parametrize('command', ['search', 'prune'])
@pytest.mark.parametrize('more', [(), ('--no-resume',)])
def test_two_writers(world, searched, ffp, command, more):
    "The second process stops before it loads anything, and names the folder and the first"
    held = runs.lock_folder(searched / 'search')
    before, holder = files(searched), os.getpid()
    def child():
        result = ffp(command, *world[1], *more, '--out', searched)
        refused(result, f"{searched / 'search'} is being written by process {holder}", '--out')
        return 'refused'
    assert in_child(child) == 'refused' and files(searched) == before
    del held
    worked(ffp(command, *world[1], '--out', searched))
    same_search(searched / 'search', world[0] / 'out' / 'search')


@pytest.mark.skipif(os.name != 'posix', reason='forks')
@pytest.mark.parametrize('command', ['search', 'prune', 'recover'])
def test_one_command_at_a_time_writes_a_folder(world, searched, ffp, command):
    "Pruning and recovery log in different folders, but both write the model"
    held = runs.lock_folder(searched)
    args = world[1] if command != 'recover' else (world[0] / 'whole' / 'model', '--text',
                                                  world[0] / 'text.txt', '--profile', 'smoke')
    def child():
        refused(ffp(command, *args, '--out', searched), f'{searched} is being written by process')
        return 'refused'
    assert in_child(child) == 'refused' and held


def test_readers_need_no_lock(world, searched, ffp, tmp_path):
    held = runs.lock_folder(searched / 'search')
    report = 'report', searched, '--out', tmp_path / 'report'
    assert in_child(lambda: worked(ffp(*report)).exit_code) == 0 and held


def test_another_version_resumes_and_says_so(world, searched, ffp):
    path = searched / 'search' / 'config.json'
    code = runs.code_hash()
    path.write_text(path.read_text().replace(code, '0' * 16))
    with pytest.warns(UserWarning, match=f'{"0" * 16}.*{code}.*--no-resume'):
        worked(ffp('search', *world[1], '--out', searched))
    log = 'search/policies.jsonl'
    assert (searched / log).read_bytes() == (world[0] / 'out' / log).read_bytes()
