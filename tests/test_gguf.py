"""GGUF files say in llama.cpp what PyTorch says of the folder, or are refused; nothing that was
there is lost"""
import json
import os
import random
import resource
import shutil
import signal
from importlib.util import find_spec

import gguf
import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors,
    trainers)

from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import UnsupportedModel, tiny_model
from ffp_nb.core.runs import CorruptFile
from ffp_nb.core.text import Convention, load_corpus, token_blocks
from ffp_nb.export.gguf import (
    KQUANTS, LlamaCpp, block_nll, check_gguf, describe_gguf, export_gguf)
from ffp_nb.export.hf import load_pruned, save_pruned

llamacpp = pytest.mark.skipif(find_spec('xllamacpp') is None, reason='needs xllamacpp')
posix = pytest.mark.skipif(os.name != 'posix', reason='needs limits on file size')
SPECIALS = '<|bos|>', '<|eos|>', '<|pad|>'
TEXT = 'the cat sat on the mat in 1998, and then 12 dogs ran to the man'
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
         r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
WORDS, BYTES = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=o)
                for o in (True, False))
PRE = {'gpt-2': WORDS,
       'smollm': pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS]),
       'llama-bpe': pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), 'isolated'),
                                             BYTES])}


def wrapped(core, **kw):
    names = dict(zip(('bos_token', 'eos_token', 'pad_token'), SPECIALS))
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, **{**names, **kw})


def byte_tokenizer(kind='gpt-2', size=300, text=TEXT):
    "Byte-level BPE trained on a text, of a kind that llama.cpp knows"
    core = Tokenizer(models.BPE(ignore_merges=kind == 'llama-bpe'))
    core.pre_tokenizer, core.decoder = PRE.get(kind, WORDS), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIALS),
                                  show_progress=False, initial_alphabet=alphabet)
    core.train_from_iterator([text], trainer)
    if kind != 'qwen2': return wrapped(core)
    bpe = json.loads(core.to_str())['model']
    return tf.Qwen2Tokenizer(vocab=bpe['vocab'], merges=[tuple(m) for m in bpe['merges']],
                             bos_token=SPECIALS[0], eos_token=SPECIALS[1], unk_token=SPECIALS[1],
                             pad_token=SPECIALS[2])


@pytest.fixture(scope='module')
def tokenizers():
    return {kind: byte_tokenizer(kind) for kind in ('gpt-2', 'qwen2')}


@pytest.fixture(scope='module')
def make(tmp_path_factory, tokenizers):
    "`make(model, widths)`: its folder and the model that PyTorch makes of it; widths None: dense"
    def make(model, widths=None, folder=None, tokenizer=None):
        folder = folder or tmp_path_factory.mktemp('model') / 'saved'
        tokenizer = (tokenizer
                     or tokenizers['qwen2' if model.config.model_type == 'qwen2' else 'gpt-2'])
        if widths is not None:
            save_pruned(ElasticModel(model).set(np.array(widths)), tokenizer, folder)
            return folder, load_pruned(folder, 'float32')[0]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder, model.float()
    return make


@pytest.fixture
def pruned(make, tmp_path):
    "A pruned folder of this test's own"
    return make(tiny_model('llama', vocab=300), MIXED, tmp_path / 'saved')[0]


def logprobs(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()


def nll(model, ids):
    return -logprobs(model, ids)[np.arange(len(ids) - 1), ids[1:]]


def greedy(model, ids, n):
    return model.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False,
                          pad_token_id=2)[0, len(ids):].tolist()


def agree(folder, model, repeat=1):
    "An F32 file of the folder in llama.cpp agrees with the model: summary of the file"
    path = export_gguf(folder, folder.parent / 'out.gguf', 'f32', overwrite=True)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    served, ids = LlamaCpp(path), tokenizer(TEXT).input_ids * repeat
    assert served.tokenize(TEXT) == tokenizer(TEXT).input_ids
    np.testing.assert_allclose(served.nll(ids), nll(model, ids), atol=5e-5)
    np.testing.assert_allclose(served.logprobs(ids), logprobs(model, ids)[-1], atol=5e-5)
    assert served.generate(ids, 24) == greedy(model, ids, 24)
    return check_gguf(path)


# The same model

MIXED = [[2, 50], [4, 33], [1, 96]]
GONE = dict(ffn=[[2, 0], [4, 33], [1, 0]], attention=[[2, 50], [0, 33], [0, 96]],
            first_attention=[[0, 50], [4, 33], [1, 96]], last_layer=[[2, 50], [4, 33], [0, 0]],
            first_layer=[[0, 0], [0, 33], [2, 0]], all_but_one=[[0, 0], [0, 32], [0, 0]],
            everywhere=[[0, 50], [2, 0], [0, 0], [0, 33], [3, 96], [0, 0]])


@pytest.mark.parametrize('family, arch',
                         [('llama', 'llama'), ('mistral', 'llama'), ('qwen2', 'qwen2'),
                          ('qwen3', 'qwen3')])
def test_dense(make, family, arch):
    about = agree(*make(tiny_model(family, vocab=300)))
    assert about['arch'] == arch and about['widths'].values.tolist() == [[8, 4, 96]] * 3


@pytest.mark.parametrize('family', ['llama', 'mistral', 'qwen2'])
def test_pruned(make, family):
    about = agree(*make(tiny_model(family, vocab=300), MIXED))
    assert (about['arch'] == 'deci'
            and about['widths'].values.tolist() == [[4, 2, 50], [8, 4, 33], [2, 1, 96]])
    assert about['file_type'] == 'F32' and about['layers'] == 3


@pytest.mark.parametrize('family', ['llama', 'mistral', 'qwen2', 'qwen3'])
def test_pruned_alike_in_every_layer(make, family):
    assert (agree(*make(tiny_model(family, vocab=300), [[2, 40]] * 3))['arch']
            == ('qwen3' if family == 'qwen3' else 'deci'))


@pytest.mark.parametrize('family, arch',
                         [('llama', 'llama'), ('qwen2', 'qwen2'), ('qwen3', 'qwen3')])
def test_layers_gone(make, family, arch):
    "Depth pruning leaves a shorter model of the family's own architecture"
    about = agree(*make(tiny_model(family, vocab=300), [[4, 96], [0, 0], [4, 96]]))
    assert about['arch'] == arch and about['layers'] == 2


@pytest.mark.parametrize('widths', GONE.values(), ids=GONE)
@pytest.mark.parametrize('family', ['llama', 'qwen2'])
def test_modules_gone(make, family, widths):
    about = agree(*make(tiny_model(family, layers=len(widths), vocab=300), widths))
    assert about['layers'] == sum(map(any, widths))


@pytest.mark.parametrize('widths', [MIXED, *GONE.values()], ids=['mixed', *GONE])
def test_qwen3_by_layer(make, widths):
    "In llama.cpp's openelm, long enough for positions to count; q and k norms that are not all 1"
    model = tiny_model('qwen3', layers=len(widths), vocab=300, tie_word_embeddings=True)
    for name, p in model.named_parameters():
        if name.endswith(('q_norm.weight', 'k_norm.weight')):
            p.data = 1 + 0.3 * torch.randn(p.shape, generator=torch.manual_seed(len(name)))
    folder, pruned = make(model, widths)
    about = agree(folder, pruned, repeat=6)
    left = [w for w in widths if any(w)]
    assert about['widths'].ffn.tolist() == [w[1] or 32 for w in left]
    assert about['widths'].kv_heads.tolist() == [w[0] or 1 for w in left]
    assert about['arch'] == ('openelm' if len({*map(tuple, left)}) > 1 else 'qwen3')


def random_llama(**kw):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**dict(vocab_size=300, hidden_size=64,
                                                      num_hidden_layers=3, num_attention_heads=8,
                                                      num_key_value_heads=4, intermediate_size=96,
                                                      max_position_embeddings=512, bos_token_id=0,
                                                      eos_token_id=1, pad_token_id=2)
                                               | kw)).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.normal_(float(name.endswith('norm.weight')), 0.15)
    return model


LINEAR = dict(rope_type='linear', rope_theta=5e5, factor=4.0)
LLAMA3 = dict(rope_type='llama3', rope_theta=1e4, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=64)
VARIANTS = dict(tied=dict(tie_word_embeddings=True),
                biases=dict(attention_bias=True, mlp_bias=True), wide_heads=dict(head_dim=16),
                llama3=dict(rope_parameters=LLAMA3), linear=dict(rope_parameters=LINEAR))


@pytest.mark.parametrize('widths', [None, MIXED, GONE['first_layer']],
                         ids=['dense', 'mixed', 'gone'])
@pytest.mark.parametrize('variant', VARIANTS)
def test_variants(make, variant, widths):
    "What else the configuration may ask for; long enough for the scaling of positions to count"
    agree(*make(random_llama(**VARIANTS[variant]), widths), repeat=6)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_folders(make, dtype):
    model = tiny_model('llama', vocab=300).to(getattr(torch, dtype))
    agree(*make(model, MIXED))


def test_shards(make):
    folder, model = make(tiny_model('llama', vocab=300), MIXED)
    state = load_file(folder / 'model.safetensors')
    parts = [dict(list(state.items())[i::2]) for i in range(2)]
    for i, part in enumerate(parts):
        save_file(part, folder / f'part{i}.safetensors', metadata=dict(format='pt'))
    (folder / 'model.safetensors').unlink()
    index = dict(metadata={},
                 weight_map={n: f'part{i}.safetensors' for i, part in enumerate(parts)
                             for n in part})
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    agree(folder, model)
    (folder / 'part1.safetensors').unlink()
    with pytest.raises(CorruptFile, match='part1.safetensors cannot be read'):
        export_gguf(folder, folder.parent / 'no.gguf')


# Number formats

def tensors(path):
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def dequantised(t):
    return gguf.quants.dequantize(t.data, t.tensor_type)


def test_f16_rounds_and_nothing_else(pruned, tmp_path):
    full, half = (tensors(export_gguf(pruned, tmp_path / f'{q}.gguf', q)) for q in ('f32', 'f16'))
    assert full.keys() == half.keys()
    for name, t in half.items():
        norm = name.endswith('norm.weight')
        assert t.tensor_type.name == ('F32' if norm else 'F16')
        np.testing.assert_array_equal(t.data,
                                      full[name].data if norm
                                      else full[name].data.astype(np.float16))


def test_q8_0_pads_with_zeros(pruned, tmp_path):
    full, small = (tensors(export_gguf(pruned, tmp_path / f'{q}.gguf', q)) for q in ('f32', 'q8_0'))
    for name, t in small.items():
        want, have = full[name].data, dequantised(t)
        inside = tuple(slice(0, n) for n in want.shape)
        rest = have.copy()
        rest[inside] = 0
        assert not rest.any()
        step = 0.57 * np.abs(want).max() / 127  # half a step, and the scale is F16
        np.testing.assert_allclose(have[inside], want,
                                   atol=0 if name.endswith('norm.weight') else step)
    assert check_gguf(tmp_path / 'q8_0.gguf')['widths'].ffn.tolist() == [64, 64, 96]
    others = {t.name for t in small.values()
              if t.tensor_type.name != 'Q8_0' and not t.name.endswith('norm.weight')}
    assert others == {'blk.2.attn_output.weight'}  # two heads of 8


def test_q8_0_keeps_rows_that_do_not_fit_in_f16(make, tmp_path):
    folder, model = make(tiny_model('llama', vocab=300, hidden=48, heads=6, kv_heads=2),
                         [[1, 50], [2, 33], [0, 96]])
    path = export_gguf(folder, tmp_path / 'a.gguf', 'q8_0')
    kinds = {n: t.tensor_type.name for n, t in tensors(path).items()}
    assert ((kinds['token_embd.weight'], kinds['blk.0.attn_q.weight'],
             kinds['blk.0.ffn_down.weight']) == ('F16', 'F16', 'Q8_0'))
    assert LlamaCpp(path).nll([5, 6, 7, 8]) == pytest.approx(nll(model, [5, 6, 7, 8]), abs=0.3)


@pytest.mark.parametrize('quant, close', [('f16', 0.02), ('q8_0', 0.3)])
def test_rounded_formats_in_llamacpp(make, tmp_path, quant, close):
    folder, model = make(tiny_model('llama', vocab=300), GONE['first_attention'])
    ids = tf.AutoTokenizer.from_pretrained(folder)(TEXT * 3).input_ids
    difference = (LlamaCpp(export_gguf(folder, tmp_path / 'a.gguf', quant)).nll(ids)
                  - nll(model, ids))
    assert np.abs(difference).max() < close and abs(difference.mean()) < close / 10


@pytest.mark.parametrize('quant, value', [('f16', 7e4), ('q8_0', 1e7)])
def test_values_out_of_range(pruned, tmp_path, quant, value):
    state = load_file(pruned / 'model.safetensors')
    state['model.layers.1.mlp.up_proj.weight'][3, 5] = value
    save_file(state, pruned / 'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(ValueError, match="blk.1.ffn_up.weight holds a value .* Use quant f32"):
        export_gguf(pruned, tmp_path / 'a.gguf', quant)
    assert not list(tmp_path.glob('*.gguf')) and not list(tmp_path.glob('.*'))
    export_gguf(pruned, tmp_path / 'a.gguf', 'f32')


# K-quants

@pytest.fixture(scope='module')
def wide(make):
    "Rows of 256: those of the hidden size; in the second layer 480 channels, which pay to pad"
    model = tiny_model('llama', hidden=256, heads=4, kv_heads=2, ffn=512, vocab=300)
    return make(model, [[2, 512], [1, 480], [2, 40]])


CHOSEN = {'q4_k_m': ('Q4_K', 'Q5_0'), 'q5_k_m': ('Q5_K', 'Q5_1'), 'q6_k': ('Q6_K', 'Q8_0')}


@llamacpp
@pytest.mark.parametrize('quant', KQUANTS)
def test_k_quants(wide, tmp_path, quant):
    "Formats as llama-quantize chooses them, values near those of the folder, zeros where padded"
    folder, model = wide
    path, (base, other) = export_gguf(folder, tmp_path / 'a.gguf', quant), CHOSEN[quant]
    have, want = tensors(path), tensors(export_gguf(folder, tmp_path / 'f32.gguf', 'f32'))
    about, kinds = check_gguf(path), {n: t.tensor_type.name for n, t in have.items()}
    padded = quant != 'q5_k_m'  # where 480 channels of 6 bits are less than 512 of 5.5
    assert about['widths'].ffn.tolist() == [512, 512 if padded else 480, 64]
    assert about['file_type'] == quant.upper()
    assert kinds['token_embd.weight'] == base and kinds['output.weight'] == 'Q6_K'
    # the third of three layers keeps more bits: Q6_K, or Q8_0 in its place
    assert [kinds[f'blk.{i}.attn_v.weight'] for i in range(3)] == [base, base, 'Q6_K']
    assert [kinds[f'blk.{i}.attn_q.weight'] for i in range(3)] == [base] * 3
    assert [kinds[f'blk.{i}.attn_output.weight'] for i in range(3)] == [base, other, base]
    assert ([kinds[f'blk.{i}.ffn_down.weight'] for i in range(3)]
            == [base, base if padded else other, 'Q8_0'])
    assert set(about['fell_back']) == {'blk.1.attn_output.weight', 'blk.2.ffn_down.weight',
                                       *['blk.1.ffn_down.weight'] * (not padded)}
    for name, t in have.items():
        true, rounded = want[name].data, dequantised(t)
        inside = tuple(slice(0, n) for n in true.shape)
        assert np.abs(rounded[inside] - true).max() <= 0.13 * np.abs(true).max(), name
        rounded = rounded.copy()
        rounded[inside] = 0
        assert not rounded.any()
    said = describe_gguf(path)
    assert f'MB, {quant.upper()}; rows that are no multiple of 256 fell back to ' in said
    assert '1 attn_output' in said and 'FFNs padded with zeros' in said
    # 24 channels of the third layer, gate and up of 256 weights each and Q8_0's down
    bits, low = dict(q4_k_m=(4.5, 4.5), q5_k_m=(5.5, 6), q6_k=(6.5625, 6.5625))[quant]
    assert about['padded_bytes'] == pytest.approx(
        (24 * 256 * (2 * bits + 8.5) + padded * 32 * 256 * (2 * bits + low)) / 8, abs=4)
    ids = tf.AutoTokenizer.from_pretrained(folder)(TEXT * 3).input_ids
    near = np.corrcoef(LlamaCpp(path).nll(ids), nll(model, ids))[0, 1]  # random weights amplify
    assert near > dict(q6_k=0.97, q5_k_m=0.9, q4_k_m=0.75)[quant]


@llamacpp
def test_padding_makes_the_file_smaller(wide, tmp_path, monkeypatch):
    from ffp_nb.export import gguf as module
    small = export_gguf(wide[0], tmp_path / 'a.gguf', 'q4_k_m').stat().st_size
    monkeypatch.setattr(module, '_pad_ffns', lambda layers, quant, D: layers)
    assert small < export_gguf(wide[0], tmp_path / 'b.gguf', 'q4_k_m').stat().st_size


@llamacpp
@pytest.mark.parametrize('family', ['llama', 'qwen2', 'qwen3'])
def test_k_quants_of_small_hidden_sizes(make, tmp_path, family):
    "64 channels fill no block: all matrices fall back, and llama.cpp reads them; removed parts too"
    model = tiny_model(family, vocab=300, tie_word_embeddings=True)
    folder, model = make(model, [[2, 50], [0, 33], [4, 0]])
    path = export_gguf(folder, tmp_path / 'a.gguf', 'q4_k_m')
    about = check_gguf(path)
    assert about['formats'].keys() == {'F32', 'Q5_0', 'Q8_0'} | ({'F16'} & about['formats'].keys())
    assert about['arch'] == ('openelm' if family == 'qwen3' else 'deci')
    ids = tf.AutoTokenizer.from_pretrained(folder)(TEXT * 3).input_ids
    assert LlamaCpp(path).nll(ids).mean() == pytest.approx(nll(model, ids).mean(), abs=0.1)


def test_no_quantiser(pruned, untouched, monkeypatch):
    from ffp_nb.export import gguf as module
    def missing():
        raise ImportError('no module xllamacpp')
    monkeypatch.setattr(module, '_llamacpp', missing)
    with pytest.raises(ImportError, match=r"quant 'q5_k_m' needs .*pip install 'ffp_nb\[gguf\]'.*"
                                          "llama-quantize FILE OUT Q5_K_M"):
        export_gguf(pruned, untouched, 'q5_k_m', overwrite=True)
    export_gguf(pruned, untouched.with_name('b.gguf'), 'f16').unlink()  # needs none


@llamacpp
def test_blocks_at_once(wide, tmp_path):
    "The same figures as one token after the other, but for a cache in F16"
    folder, model = wide
    path = export_gguf(folder, tmp_path / 'a.gguf', 'f32')
    blocks = np.random.default_rng(0).integers(5, 290, (3, 24)).tolist()
    found = block_nll(path, blocks)
    assert found.shape == (3, 23)
    np.testing.assert_allclose(found, [nll(model, o) for o in blocks], atol=0.02)
    (tmp_path / 'text.gguf').write_text('no model')
    with pytest.raises(CorruptFile, match='cannot load'):
        block_nll(tmp_path / 'text.gguf', blocks)


# Tokenizers

@pytest.fixture(scope='module')
def texts():
    "Prose, oddities, and noise"
    words, rng = load_corpus('pydoc')['selection'], random.Random(0)
    odd = ["naïve 東京 🙂 don't DON'T  x\t\ty\n\n\n zz   1998 12345 ½ ٣٤ Ⅷ", ' leading',
           'trailing ', '\n', '  ', 'a\r\nb\r\n\r\n  c', 'x  5']
    noise = [''.join(rng.choice(' \n\tabcdeABC0123.,!é東🙂-\'"½') for _ in range(40))
             for _ in range(100)]
    return [words[i:i + 300] for i in range(0, 15_000, 300)] + odd + noise


def exported(make, tmp_path, tokenizer, family='llama'):
    "llama.cpp with this tokenizer, and what transformers makes of the folder"
    folder, _ = make(tiny_model(family, layers=1, vocab=len(tokenizer) + 5),
                     folder=tmp_path / 'tok', tokenizer=tokenizer)
    path = export_gguf(folder, tmp_path / 'tok.gguf')
    return LlamaCpp(path), tf.AutoTokenizer.from_pretrained(folder), check_gguf(path)['tokenizer']


@pytest.mark.parametrize('kind', ['gpt-2', 'smollm', 'llama-bpe', 'qwen2'])
def test_byte_level_tokenizers(make, tmp_path, texts, kind):
    tokenizer = byte_tokenizer(kind, 1500, load_corpus('pydoc')['calibration'][:100_000])
    served, tokenizer, name = exported(make, tmp_path, tokenizer,
                                       'qwen2' if kind == 'qwen2' else 'llama')
    assert name == f'gpt2, {kind}'
    assert [t for t in texts if served.tokenize(t) != tokenizer(t).input_ids] == []
    chat = '<|bos|>user\nHi 12<|eos|>\n'
    assert served.tokenize(chat, special=True) == tokenizer(chat).input_ids
    assert served.tokenize(chat) != tokenizer(chat).input_ids  # as plain text


def piece_tokenizer(text, size=800, prepend=True):
    """BPE with characters as bytes where there is no token, as transformers converts SentencePiece
    models"""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='always')
    core.train_from_iterator([text], trainers.BpeTrainer(vocab_size=size, show_progress=False))
    pieces = sorted(core.get_vocab().items(), key=lambda o: o[1])
    vocab = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256)), *(p for p, _ in pieces)]
    ids = {t: i for i, t in enumerate(vocab)}
    merges = [(t[:i], t[i:]) for t, _ in pieces for i in range(1, len(t))
              if t[:i] in ids and t[i:] in ids]
    out = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token='<unk>', fuse_unk=True,
                               byte_fallback=True))
    out.normalizer = normalizers.Sequence([normalizers.Prepend('▁')] * prepend
                                          + [normalizers.Replace(' ', '▁')])
    out.post_processor = processors.TemplateProcessing(single='<s> $A', pair='<s> $A <s> $B',
                                                       special_tokens=[('<s>', 1)])
    out.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(),
                                     decoders.Fuse()])
    return wrapped(out, bos_token='<s>', eos_token='</s>', unk_token='<unk>', pad_token='</s>')


@pytest.mark.parametrize('prepend', [True, False])
def test_sentencepiece_tokenizers(make, tmp_path, texts, prepend):
    source = piece_tokenizer(load_corpus('pydoc')['calibration'][:50_000], prepend=prepend)
    served, tokenizer, name = exported(make, tmp_path, source, 'mistral')
    assert name == 'llama, default'
    assert ([t for t in texts
             if served.tokenize(t) != tokenizer(t, add_special_tokens=False).input_ids] == [])
    assert served.tokenize('Hi there', special=True) == tokenizer('Hi there').input_ids  # with BOS
    assert served.tokenize('Hi </s> there', special=True) == tokenizer('Hi </s> there').input_ids


def test_a_space_before_the_first_word_only(make, tmp_path, texts):
    "What llama.cpp does otherwise is said"
    source = piece_tokenizer(load_corpus('pydoc')['calibration'][:50_000])
    core = json.loads(source.backend_tokenizer.to_str())
    core |= dict(normalizer=None,
                 pre_tokenizer=dict(type='Metaspace', replacement='▁', prepend_scheme='first',
                                    split=False))
    source = wrapped(Tokenizer.from_str(json.dumps(core)), bos_token='<s>', eos_token='</s>',
                     unk_token='<unk>', pad_token='</s>')
    with pytest.warns(UserWarning, match='one token more'):
        served, tokenizer, _ = exported(make, tmp_path, source)
    wrong = [t for t in texts
             if served.tokenize(t) != tokenizer(t, add_special_tokens=False).input_ids]
    assert all(t.startswith(' ') for t in wrong)


def test_unmergeable_pairs_are_refused(make, tmp_path):
    source = piece_tokenizer(TEXT)
    core = json.loads(source.backend_tokenizer.to_str())
    core['model']['merges'].pop()
    source = wrapped(Tokenizer.from_str(json.dumps(core)), unk_token='<unk>')
    with pytest.raises(UnsupportedModel, match='never merges'):
        exported(make, tmp_path, source)


def test_special_tokens_and_chat(make, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken('<tool>', special=False)])
    tokenizer.chat_template = '{% for m in messages %}<|bos|>{{ m.content }}<|eos|>{% endfor %}'
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single='<|bos|> $A <|eos|>', pair='<|bos|> $A $B <|eos|>',
        special_tokens=[('<|bos|>', 0), ('<|eos|>', 1)])
    served, tokenizer, _ = exported(make, tmp_path, tokenizer)
    assert served.tokenize('a<tool>b', special=True) == tokenizer('a<tool>b').input_ids
    assert tokenizer('a').input_ids[0] == 0 and tokenizer('a').input_ids[-1] == 1
    fields = gguf.GGUFReader(tmp_path / 'tok.gguf').fields
    get = lambda key: fields[f'tokenizer.{key}'].contents()
    assert [get(f'ggml.{k}_token_id') for k in ('bos', 'eos', 'padding')] == [0, 1, 2]
    assert get('ggml.add_bos_token') is get('ggml.add_eos_token') is True
    assert get('chat_template') == tokenizer.chat_template
    kinds = [gguf.TokenType(t).name for t in get('ggml.token_type')]
    assert ((kinds[0], kinds[5], *kinds[len(tokenizer) - 1:][:2])
            == ('CONTROL', 'NORMAL', 'USER_DEFINED', 'UNUSED'))


def add_stripping(t):
    t.add_tokens([AddedToken('<mask>', lstrip=True)])


def add_word_split(t):
    parts = [pre_tokenizers.Whitespace(), WORDS]
    t.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)


def add_prefix(t):
    t.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def add_lower_case(t):
    t.backend_tokenizer.normalizer = normalizers.Lowercase()


def add_padding_first(t):
    t.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single='<|pad|> $A', special_tokens=[('<|pad|>', 2)])


@pytest.mark.parametrize('change, says',
                         [(add_stripping, 'take the spaces'), (add_word_split, 'not known here'),
                          (add_prefix, 'not known here'), (add_lower_case, 'not known here'),
                          (add_padding_first, 'BOS and EOS only')])
def test_tokenizers_that_llamacpp_does_not_have(make, tmp_path, change, says):
    tokenizer = byte_tokenizer()
    change(tokenizer)
    with pytest.raises(UnsupportedModel, match=says):
        exported(make, tmp_path, tokenizer)
    assert not list(tmp_path.glob('*.gguf'))


def test_word_tokenizers_are_refused(make, tmp_path, word_tokenizer):
    with pytest.raises(UnsupportedModel, match="type 'WordLevel'"):
        exported(make, tmp_path, word_tokenizer)


@pytest.mark.parametrize('family', ['llama', 'mistral', 'qwen2'])
def test_no_tokenizer(make, tmp_path, family):
    folder, _ = make(tiny_model(family, vocab=300), MIXED, tmp_path / 'saved')
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        (folder / name).unlink()
    with pytest.raises(OSError, match='no tokenizer'):
        export_gguf(folder, tmp_path / 'a.gguf')


def test_tokenizer_of_another_model(make, tmp_path):
    folder, _ = make(tiny_model('llama', vocab=270), MIXED, tmp_path / 'saved')
    with pytest.raises(CorruptFile, match='but the model only 270 embeddings'):
        export_gguf(folder, tmp_path / 'a.gguf')


# What llama.cpp cannot express

@pytest.mark.parametrize('family, widths, says', [
    ('opt', None, 'no architecture'), ('opt', [[2, 50], [8, 33], [1, 96]], 'no architecture'),
    ('qwen3', MIXED, 'does not have a head of its own .tie_word_embeddings is false.')])
def test_families_without_an_architecture(make, tmp_path, family, widths, says):
    folder, _ = make(tiny_model(family, vocab=300), widths)
    with pytest.raises(UnsupportedModel, match=says):
        export_gguf(folder, tmp_path / 'a.gguf')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('settings, widths, says', [
    (dict(attention_bias=True), MIXED, 'does not have biases'),
    (dict(attention_bias=True), None, 'does not have biases. Keep to'),  # nor has qwen3
    (dict(rope_parameters=LINEAR), MIXED, 'does not have rope scaling')])
def test_a_qwen3_that_openelm_does_not_compute(make, tmp_path, settings, widths, says):
    model = tiny_model('qwen3', vocab=300, tie_word_embeddings=True, **settings)
    folder, _ = make(model, widths)
    with pytest.raises(UnsupportedModel, match=says):
        export_gguf(folder, tmp_path / 'a.gguf')


def edit(folder, **changes):
    path = folder / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


YARN = dict(rope_type='yarn', rope_theta=1e4, factor=4.0, original_max_position_embeddings=128)


@pytest.mark.parametrize('family, changes, says',
                         [('llama', dict(rope_parameters=YARN), "rope scaling 'yarn'"),
                          ('llama',
                           dict(rope_parameters=dict(rope_type='dynamic', rope_theta=1e4,
                                                     factor=2.0)), "rope scaling 'dynamic'"),
                          ('llama', dict(hidden_act='gelu'), "activation 'gelu'"),
                          ('llama', dict(quantization_config=dict(quant_method='fp8')),
                           'quantised weights'),
                          ('mistral', dict(sliding_window=100), 'max_position_embeddings to 100'),
                          ('qwen2',
                           dict(use_sliding_window=True, sliding_window=100, max_window_layers=1,
                                layer_types=None), 'sliding window of 100'),
                          ('llama', dict(model_type='bert'), "model type 'bert'")])
def test_configurations_that_would_be_ignored(make, tmp_path, family, changes, says):
    folder, _ = make(tiny_model(family, vocab=300), MIXED)
    edit(folder, **changes)
    with pytest.raises(UnsupportedModel, match=says):
        export_gguf(folder, tmp_path / 'a.gguf')
    assert not list(tmp_path.iterdir())


def test_a_window_that_is_never_reached(make):
    folder, model = make(tiny_model('mistral', vocab=300), MIXED)
    edit(folder, sliding_window=512)
    agree(folder, model)


# Bad input

@pytest.fixture
def old(pruned, tmp_path):
    "A file that is there already"
    return export_gguf(pruned, tmp_path / 'out' / 'model.gguf', 'q8_0')


@pytest.fixture
def untouched(old):
    "After the test the old file is what it was, and nothing lies beside it"
    before = old.read_bytes()
    yield old
    assert old.read_bytes() == before and [o.name for o in old.parent.iterdir()] == [old.name]


def test_an_existing_file_is_kept(pruned, untouched):
    with pytest.raises(FileExistsError, match='overwrite=True'):
        export_gguf(pruned, untouched)


def test_overwrite(pruned, old):
    assert check_gguf(export_gguf(pruned, old, 'f16', overwrite=True))['file_type'] == 'F16'
    assert [o.name for o in old.parent.iterdir()] == [old.name]


def cut(folder):
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-1000])


def cut_to_nothing(folder):
    (folder / 'model.safetensors').write_bytes(b'')


def drop_weights(folder):
    (folder / 'model.safetensors').unlink()


def change_weights(change):
    def apply(folder):
        state = load_file(folder / 'model.safetensors')
        change(state)
        save_file(state, folder / 'model.safetensors', metadata=dict(format='pt'))
    return apply


def widths(change):
    def apply(folder):
        rows = json.loads((folder / 'config.json').read_text())['pruned_widths']
        change(rows)
        edit(folder, pruned_widths=rows)
    return apply


NAME = 'model.layers.1.mlp.down_proj.weight'
BROKEN = dict(truncated=(cut, CorruptFile, 'model.safetensors cannot be read'),
              empty=(cut_to_nothing, CorruptFile, 'cannot be read'),
              no_weights=(drop_weights, FileNotFoundError, 'has no weights'),
              tensor_missing=(change_weights(lambda s: s.pop(NAME)), CorruptFile,
                              f'{NAME} .* is missing'),
              tensor_too_many=(change_weights(lambda s: s.update(other=torch.ones(3))), CorruptFile,
                               'other .* is unexpected'),
              tensor_of_other_width=(change_weights(lambda s: s.update(
    {NAME: s[NAME][:, :20].clone()})), CorruptFile, r'is \(64, 20\), expected \(64, 33\)'),
              nan=(change_weights(lambda s: s[NAME].fill_(float('nan'))), CorruptFile,
                   f'{NAME} holds NaN'),
              width=(widths(lambda w: w[1].update(ffn=40)), CorruptFile, r'expected \(40, 64\)'),
              width_too_large=(widths(lambda w: w[1].update(ffn=400)), CorruptFile,
                               'describes no model'),
              heads=(widths(lambda w: w[0].update(heads=3)), CorruptFile, 'describes no model'),
              key=(widths(lambda w: w[0].pop('ffn')), CorruptFile, 'describes no model'),
              layer_too_few=(widths(lambda w: w.pop()), CorruptFile, 'describes no model'),
              vocabulary=(lambda f: edit(f, vocab_size=310), CorruptFile, r'expected \(310, 64\)'),
              no_config=(lambda f: (f / 'config.json').unlink(), FileNotFoundError,
                         'needs a config.json'),
              config_cut=(lambda f: (f / 'config.json').write_text('{"model_type": "lla'),
                          CorruptFile, 'not valid JSON'),
              tied_head=(lambda f: edit(f, tie_word_embeddings=True), CorruptFile,
                         'the head differs'))


@pytest.mark.parametrize('damage, error, says', BROKEN.values(), ids=BROKEN)
def test_broken_folders(pruned, untouched, damage, error, says):
    damage(pruned)
    with pytest.raises(error, match=says):
        export_gguf(pruned, untouched, 'q8_0', overwrite=True)


def test_dense_folder_of_other_sizes(make, untouched):
    folder, _ = make(tiny_model('llama', vocab=300))
    edit(folder, intermediate_size=100)
    with pytest.raises(CorruptFile, match=r'is \(64, 96\), expected \(64, 100\)'):
        export_gguf(folder, untouched, overwrite=True)


def test_nothing_is_left(make, tmp_path):
    folder, _ = make(tiny_model('llama', vocab=300), [[0, 0]] * 3)
    with pytest.raises(ValueError, match='no module is left'):
        export_gguf(folder, tmp_path / 'a.gguf')


def test_arguments(pruned, tmp_path):
    with pytest.raises(ValueError, match="quant 'q4_0'; expected one of f32, f16, q8_0"):
        export_gguf(pruned, tmp_path / 'a.gguf', 'q4_0')
    with pytest.raises(IsADirectoryError, match='Name a file'):
        export_gguf(pruned, tmp_path)
    with pytest.raises(FileNotFoundError, match='no model folder'):
        export_gguf(tmp_path / 'nowhere', tmp_path / 'a.gguf')
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='cannot write .* choose another path'):
        export_gguf(pruned, tmp_path / 'file' / 'a.gguf')


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors', 'tokenizer.json', 'link'])
def test_the_source_is_never_replaced(pruned, tmp_path, name):
    "with the flag neither; an earlier GGUF file in the model's folder is no part of the source"
    os.link(pruned / 'model.safetensors', tmp_path / 'link')
    before = {o: o.read_bytes() for o in pruned.iterdir()}
    with pytest.raises((ValueError, FileExistsError), match='is read|no GGUF file'):
        export_gguf(pruned, tmp_path / name if name == 'link' else pruned / '.' / name, 'f32', True)
    assert {o: o.read_bytes() for o in pruned.iterdir()} == before
    for _ in range(2):
        export_gguf(pruned, pruned / 'model-f32.gguf', 'f32', overwrite=True)


def test_only_gguf_files_are_replaced(pruned, tmp_path):
    (tmp_path / 'thesis.tex').write_text('x')
    with pytest.raises(FileExistsError, match='thesis.tex is no GGUF file'):
        export_gguf(pruned, tmp_path / 'thesis.tex', overwrite=True)
    assert (tmp_path / 'thesis.tex').read_text() == 'x'


@posix
@pytest.mark.parametrize('limit', [100, 5_000, 40_000, 100_000],
                         ids=['metadata', 'tokenizer', 'weights', 'more weights'])
def test_no_space(pruned, untouched, limit):
    "The system itself stops the write; nothing is simulated"
    before = signal.signal(signal.SIGXFSZ,
                           signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1][1]))
        # NumPy does not pass the number of the error on
        with pytest.raises(OSError, match='cannot write .* an earlier one is untouched. To go on: '
                                          '(free some space|choose a disk)'):
            export_gguf(pruned, untouched, 'f32', overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
        signal.signal(signal.SIGXFSZ, before[0])


# Reading back

@pytest.fixture(scope='module')
def whole(make):
    folder, _ = make(tiny_model('llama', vocab=300), MIXED)
    return export_gguf(folder, folder.parent / 'whole.gguf', 'f32')


@pytest.mark.parametrize('share', [0, 0.001, 0.01, 0.05, 0.1, 0.5, 0.9, 0.9999])
def test_cut_files(whole, tmp_path, share):
    data = whole.read_bytes()
    (tmp_path / 'cut.gguf').write_bytes(data[:int(share * len(data))])
    with pytest.raises(CorruptFile, match='cut.gguf is cut off.* Export it again'):
        check_gguf(tmp_path / 'cut.gguf')


def test_other_files(tmp_path):
    (tmp_path / 'text.gguf').write_text('no model at all, but long enough for a header')
    with pytest.raises(CorruptFile, match='no file of export_gguf'):
        check_gguf(tmp_path / 'text.gguf')
    with pytest.raises(CorruptFile):
        LlamaCpp(tmp_path / 'text.gguf')
    with pytest.raises(FileNotFoundError):
        check_gguf(tmp_path / 'nothing.gguf')


@pytest.mark.parametrize('key, says',
                         [('attention.head_count',
                           r'attn_q.weight is \(64, 64\), expected \(64, 56\)'),
                          ('feed_forward_length',
                           r'ffn_gate.weight is \(64, 33\), expected \(64, 7\)')])
def test_metadata_of_another_model(whole, tmp_path, key, says):
    path = tmp_path / 'other.gguf'
    shutil.copy(whole, path)
    reader = gguf.GGUFReader(path, 'r+')
    field = reader.fields[f'deci.{key}']
    field.parts[field.data[1]][0] = 7  # layer 1
    reader.data.flush()
    with pytest.raises(CorruptFile, match=says):
        check_gguf(path)


# SmolLM2

@pytest.fixture(scope='module')
def smollm2(tmp_path_factory):
    "SmolLM2 with 30 % of every module gone, and some modules whole, repaired"
    from ffp_nb.core.budget import uniform
    from ffp_nb.pipeline.bench import Bench
    from ffp_nb.pipeline.config import Profile, PruneConfig
    config = PruneConfig(text='pydoc', sparsity=0.3, criterion='wanda', dtype='float32',
                         profile=Profile(64, 6, 4, 8, 4, 1, 2, 3))
    bench = Bench.load(config, progress=False)
    widths = uniform(bench.cost, 0.3)
    widths[22, 0] = widths[24, 1] = widths[26, 0] = widths[26, 1] = 0
    folder = save_pruned(bench.elastic.set(widths, bench.static), bench.tokenizer,
                         tmp_path_factory.mktemp('smollm2') / 'pruned')
    model, tokenizer = load_pruned(folder)
    return folder, model, tokenizer, token_blocks(bench.corpus['selection'], tokenizer,
                                                  Convention(96, 96), n=2).ids.tolist()


# llama.cpp rounds activations too
@pytest.mark.parametrize('quant, ppl_close', [('f32', 1e-3), ('f16', 0.01), ('q8_0', 0.15)])
def test_smollm2(smollm2, tmp_path, texts, quant, ppl_close):
    folder, model, tokenizer, blocks = smollm2
    path = export_gguf(folder, tmp_path / 'a.gguf', quant)
    about, served = check_gguf(path), LlamaCpp(path)
    assert about['arch'] == 'deci' and about['layers'] == 29
    # and the tokenizer
    assert about['bytes'] < 1.02 * dict(f32=4, f16=2, q8_0=34 / 32)[quant] * about['params'] + 3e6
    have, want = (np.mean([one(o) for o in blocks])
                  for one in (served.nll, lambda ids: nll(model, ids)))
    assert np.exp(have - want) == pytest.approx(1, abs=ppl_close)
    if quant != 'f32': return
    prompt = tokenizer('The capital of France is').input_ids
    assert served.generate(prompt, 24) == greedy(model, prompt, 24)
    assert [t for t in texts if served.tokenize(t) != tokenizer(t).input_ids] == []
