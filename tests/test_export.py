"""A saved model opens in a process that has transformers and not this package, and is the model
that was saved"""
import errno
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_qwen2_tokenizer
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

import ffp_nb
from ffp_nb.core import modeling
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import (
    FIVE, Layout, UnsupportedModel, load_model, smollm2_path, tiny_model, tiny_tokenizer)
from ffp_nb.export import hf
from ffp_nb.export.hf import load_pruned, model_card, put_right, save_pruned
from ffp_nb.export.vllm import parallel_sizes

# Runs without ffp_nb; prints one JSON object: the largest difference in logits, and what
# generation gave
STRANGER = '''
import json, sys
sys.modules['ffp_nb'] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)  # as in the tests: sums in another order are not equal bit for bit
folder, data = sys.argv[1:]
held = torch.load(data)
load = lambda **kw: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kw)
out = {}
with torch.inference_mode():
    for attention in ('sdpa', 'eager'):
        model = load(attn_implementation=attention)
        out[attention] = float((model(held['ids']).logits - held[attention]).abs().max())
    def generate(model, **kw):
        own = dict(attention_mask=held['mask'], do_sample=False, max_new_tokens=8, pad_token_id=2)
        return model.generate(held['ids'], **own, **kw).tolist()
    model = load()
    # eager on purpose: with left padding a static cache has more masked positions, which sdpa may
    # sum in another order
    out['plain'], out['cache'], out['static'] = (generate(model, **kw) for kw in (
        dict(use_cache=False), {}, dict(cache_implementation='static', disable_compile=True)))
    out['beams'] = generate(model, num_beams=3), generate(model, num_beams=3, use_cache=False)
    low = load(dtype=torch.bfloat16)
    out['bf16'] = str(low.dtype), bool(torch.isfinite(low(held['ids']).logits).all())
    spread = load(device_map='auto')(held['ids']).logits.cpu()
    out['auto'] = float((spread - held['sdpa']).abs().max())
    model.save_pretrained(folder + '-again')  # a copy carries the code too
again = AutoModelForCausalLM.from_pretrained(folder + '-again', trust_remote_code=True)
out['again'] = float((again(held['ids']).logits - held['sdpa']).abs().max())
out['class'], out['parameters'] = type(model).__name__, sum(p.numel() for p in model.parameters())
try: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False); out['stock'] = 'loaded'
except Exception as e: out['stock'] = str(e)
print('RESULT' + json.dumps(out))
'''


def random_widths(full, seed=0):
    "Random widths; the first attention, an FFN and a whole layer are removed"
    widths = np.random.default_rng(seed).integers(1, full + 1)
    widths[0, 0] = widths[1, 1] = widths[2] = 0
    widths[-1] = np.maximum(widths[-1], 1)
    return widths


def stranger(folder, tmp_path, own, ids, mask):
    "What the other process sees, and this one's logits"
    held = dict(ids=ids, mask=mask)
    with torch.inference_mode():
        for attention in ('sdpa', 'eager'):
            own.set_attn_implementation(attention)
            held[attention] = own(ids).logits
    torch.save(held, tmp_path / 'held.pt')
    run = subprocess.run([sys.executable, '-c', STRANGER, str(folder), str(tmp_path / 'held.pt')],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.split('RESULT')[1])


@pytest.mark.parametrize('family', FIVE)
def test_opens_without_this_package(family, tmp_path):
    em = ElasticModel(tiny_model(family, layers=4, seed=3))
    widths = random_widths(em.layout.full)
    own = em.set(widths).sliced()
    ids = torch.randint(3, 211, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0  # the second prompt is shorter: left padding
    seen = stranger(save_pruned(em, None, tmp_path / 'model'), tmp_path, own, ids, mask)
    assert seen['sdpa'] == seen['eager'] == seen['auto'] == seen['again'] == 0.0
    assert seen['plain'] == seen['cache'] == seen['static'] and len(seen['plain'][0]) == 19
    assert seen['beams'][0] == seen['beams'][1]
    assert seen['bf16'] == ['torch.bfloat16', True]
    zeros = (em.layout.unit_params * (widths == 0)).sum()  # one unit for each removed module
    if family == 'qwen3':  # and the norms of its queries and keys
        zeros += 2 * em.layout.head_dim * (widths[:, 0] == 0).sum()
    assert (seen['class'] == modeling.PRUNED[family].__name__
            and seen['parameters'] == sum(p.numel() for p in own.parameters()) + zeros)
    assert 'size' in seen['stock'] and 'mismatch' in seen['stock']
    assert (not list((tmp_path / 'model').glob('*.bin'))
            and list((tmp_path / 'model').glob('*.safetensors')))


@pytest.mark.parametrize('name', ['smollm2', 'smollm2-mistral'])
def test_smollm2_for_real(name, tmp_path):
    "135 million parameters with grouped heads, one attention and one FFN removed"
    smollm2_path()
    model, tokenizer = load_model(name, 'float32', 'cpu')
    dense_bytes = sum(p.numel() for p in model.parameters()) * 4
    em = ElasticModel(model)
    widths = np.random.default_rng(1).integers([1, 320], em.layout.full + 1)
    widths[11, 0] = widths[20, 1] = 0
    own = em.set(widths).sliced()
    ids = tokenizer('The first thing that one learns about pruning is',
                    return_tensors='pt')['input_ids']
    folder = save_pruned(em, tokenizer, tmp_path / 'model')
    seen = stranger(folder, tmp_path, own, ids, torch.ones_like(ids))
    assert (seen['sdpa'] == seen['eager'] == seen['auto'] == 0.0
            and seen['plain'] == seen['cache'] == seen['static'])
    assert ((folder / 'model.safetensors').stat().st_size < dense_bytes - 4
            * (em.layout.unit_params * (em.layout.full - np.maximum(widths, 1))).sum() + 200_000)
    again, words = ffp_nb.load_pruned(folder)
    with torch.inference_mode():
        own.set_attn_implementation('sdpa')
        assert torch.equal(again(ids).logits, own(ids).logits)
    assert words('a b c') == tokenizer('a b c')


SERVED = dict(
    llama=[dict(num_attention_heads=2, num_key_value_heads=1, intermediate_size=37),
           dict(num_attention_heads=2, num_key_value_heads=1, intermediate_size=96),
           dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=1)],
    opt=[dict(num_attention_heads=1, ffn_dim=37), dict(num_attention_heads=1, ffn_dim=96),
         dict(num_attention_heads=2, ffn_dim=1)])


@pytest.mark.parametrize('family', SERVED)
def test_the_configuration_says_what_servers_read(family, tmp_path):
    "The sizes of each layer by transformers' own names, a removed module as one unit of zeros"
    em = ElasticModel(tiny_model(family, 3, 64, 4, 2)).set([[1, 37], [0, 96], [2, 0]])
    folder = save_pruned(em, None, tmp_path / 'model')
    held = [dict(zero=['attn']) if i == 1 else dict(zero=['ffn']) if i == 2 else {}
            for i in range(3)]
    for made in (folder, saved_again(folder)):
        config = json.loads((made / 'config.json').read_text())
        dense = {name: config[name] for name in SERVED[family][0]}  # what a copy leaves out
        assert [dense | config['per_layer_config'].get(str(i), {})
                for i in range(3)] == SERVED[family]
        assert made != folder or len(config['per_layer_config']['1']) == len(dense)
        assert config['head_dim'] == em.layout.head_dim
        assert config['allow_global_per_layer_attribute_access'] is True
        name = dict(llama='Llama', opt='OPT')[family]
        assert config['auto_map'] == dict(
            AutoModelForCausalLM=f'modeling.Pruned{name}ForCausalLM',
            AutoModel=f'modeling.Pruned{name}Model')
        assert [{k: v for k, v in w.items() if k == 'zero'}
                for w in config['pruned_widths']] == held
        # the dense sizes stay: they say what a head and a group are
        assert config['num_attention_heads'] == 4


def saved_again(folder):
    "A copy by transformers' own `save_pretrained`"
    again = folder.with_name('again')
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).save_pretrained(again)
    return again


@pytest.mark.parametrize('family', FIVE)
def test_backbone_copy_and_biases_are_equal_bit_for_bit(family, tmp_path):
    """Of a folder with removed modules: the logits, those of a copy, and the hidden states of
    `AutoModel`"""
    em = ElasticModel(tiny_model(family, layers=4, seed=5))
    em.set(random_widths(em.layout.full, 2))
    ids = torch.randint(3, 211, (2, 9), generator=torch.Generator().manual_seed(0))
    folder = save_pruned(em, None, tmp_path / 'model')
    load = lambda auto, place: auto.from_pretrained(place, trust_remote_code=True)
    with torch.inference_mode():
        logits = em.model(ids).logits
        hidden = em.model.base_model(ids).last_hidden_state
        for place in (folder, saved_again(folder)):
            assert torch.equal(load(AutoModelForCausalLM, place)(ids).logits, logits)
            backbone = load(AutoModel, place)
            assert torch.equal(backbone(ids).last_hidden_state, hidden)
            assert not hasattr(backbone, 'lm_head')


@pytest.mark.parametrize('family', [*FIVE, 'phi3', 'gpt2', 'gpt_neox', 'olmo2', 'gemma3_text'])
def test_a_pruned_folder_is_pruned_again(family, tmp_path):
    "Its units are those that are left; what is saved says the new widths in every way"
    em, ids = ElasticModel(tiny_model(family)), torch.arange(3, 20)[None]
    full = int(em.layout.full[0, 0])
    first = np.array([[max(1, full - 1), 64], [full, 37], [max(1, full // 2), 96]])
    tokenizer = make_qwen2_tokenizer() if family == 'qwen2' else tiny_tokenizer()
    folder = save_pruned(em.set(first), tokenizer, tmp_path / 'once')
    with torch.inference_mode():
        want = em.model(ids).logits
        model, _ = load_model(str(folder), 'float32', 'cpu')
        assert torch.equal(model(ids).logits, want)
        again = ElasticModel(model, {k: torch.arange(m.units).flip(0)
                                     for k, m in Layout(model).modules.items()})
        assert (again.layout.full == first).all()
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)
        widths = np.array([[1, 9], [full, 0], [0, 50]])
        want = again.set(widths).model(ids).logits
        twice = save_pruned(again, None, tmp_path / 'twice')
        for load in (lambda: load_pruned(twice)[0],
                     lambda: AutoModelForCausalLM.from_pretrained(twice, trust_remote_code=True)):
            torch.testing.assert_close(load()(ids).logits, want, rtol=1e-5, atol=1e-5)
    config = json.loads((twice / 'config.json').read_text())
    assert [w['ffn'] for w in config['pruned_widths']] == [9, 1, 50]
    if 'per_layer_config' in config:
        name = 'ffn_dim' if family == 'opt' else 'intermediate_size'
        assert [config['per_layer_config'][str(i)][name] for i in range(3)] == [9, 1, 50]
    with pytest.raises(UnsupportedModel, match='pruned already, and a module of layer 1 is gone'):
        load_model(str(twice))


def half(family='llama', **kw):
    em = ElasticModel(tiny_model(family, **kw))
    return em.set(em.layout.full // 2)


def content(folder):
    return {str(o.relative_to(folder)): o.read_bytes() for o in folder.rglob('*') if o.is_file()}


# The other generation

LLAMA3 = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
ROPES = dict(plain=dict(rope_type='default', rope_theta=1e6), llama3=LLAMA3 | dict(rope_theta=1e6))


def variant(family, tied=False, rope=None):
    "A model with modules removed, tied or not, and with other rotary frequencies"
    model = tiny_model(family, layers=4, seed=3)
    config = model.config
    config.tie_word_embeddings = tied
    if rope is not None and family != 'opt':
        config.rope_parameters = dict(rope)
    made = type(model)(config).eval().requires_grad_(False)
    torch.manual_seed(1)
    for name, p in made.named_parameters():
        p.normal_(float('norm' in name and name.endswith('weight')), 0.15)
    em = ElasticModel(made)
    return em.set(random_widths(em.layout.full))


def test_the_configuration_says_it_in_both_ways(tmp_path):
    for name, rope in ROPES.items():
        folder = save_pruned(variant('llama', rope=rope), None, tmp_path / name)
        config = json.loads((folder / 'config.json').read_text())
        assert config['rope_theta'] == 1e6 and config['rope_parameters'] == rope
        assert config['rope_scaling'] == (LLAMA3 if name == 'llama3' else None)
        assert config['dtype'] == config['torch_dtype'] == 'float32'
        assert load_pruned(folder)[0].config.rope_parameters == rope
    config = json.loads((save_pruned(half('opt'), None, tmp_path / 'opt')
                         / 'config.json').read_text())
    assert not {'rope_theta', 'rope_scaling'} & config.keys()


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('family', ['llama', 'opt'])
def test_the_weights_say_whether_the_head_is_tied(family, tied, tmp_path):
    "whatever the flag says"
    em, ids = variant(family, tied), torch.arange(3, 20)[None]
    want = em.model(ids).logits
    em.model.config.tie_word_embeddings = not tied
    folder = save_pruned(em, None, tmp_path / 'model')
    assert json.loads((folder / 'config.json').read_text())['tie_word_embeddings'] is tied
    assert ('lm_head.weight' in load_file(folder / 'model.safetensors')) is not tied
    assert torch.equal(load_pruned(folder)[0](ids).logits, want)
    assert em.model.config.tie_word_embeddings is not tied  # the caller's is as it was


def test_the_tokenizer_has_names_of_both_generations(tmp_path):
    words = tiny_tokenizer(0)
    words.add_special_tokens(dict(additional_special_tokens=['<a>']))
    save_pruned(half(vocab=len(words)), words, tmp_path / 'model')
    config = json.loads((tmp_path / 'model' / 'tokenizer_config.json').read_text())
    assert config['tokenizer_class'] == 'PreTrainedTokenizerFast'
    assert config['additional_special_tokens'] == ['<a>'] and 'extra_special_tokens' not in config
    again = load_pruned(tmp_path / 'model')[1]
    assert type(again) is type(words) and again('b <a>').input_ids == words('b <a>').input_ids
    assert '<a>' in again.all_special_tokens


# Runs with another transformers, without ffp_nb
OLD = '''
import json, sys, torch, transformers
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
out = dict(version=transformers.__version__)
for folder in map(Path, sys.argv[1:]):
    held = torch.load(folder.with_suffix('.pt'))
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        far = float((model(held['ids']).logits - held['logits']).abs().max())
        def generate(**kw):
            return model.generate(held['ids'], do_sample=False, max_new_tokens=6, pad_token_id=2,
                                  **kw).tolist()
        plain = generate(use_cache=False)
        static = dict(cache_implementation='static', disable_compile=True)
        cached = [generate(), generate(**static)] == [plain, plain]
        words = AutoTokenizer.from_pretrained(folder)('w3 w11 w4 w5').input_ids
        model.save_pretrained(str(folder) + '-again')
    out[folder.name] = dict(far=far, cached=cached, same=plain == held['tokens'],
                            words=words == held['words'])
print('RESULT' + json.dumps(out))
'''


@pytest.mark.skipif('FFP_OLD_TRANSFORMERS' not in os.environ,
                    reason='FFP_OLD_TRANSFORMERS is no Python that has transformers 4.57')
def test_transformers_4_computes_the_same(tmp_path):
    "All families, tied and not, rotary frequencies with and without scaling; also saved again"
    folders, ids = [], torch.randint(3, 211, (2, 40), generator=torch.Generator().manual_seed(0))
    for family in FIVE:
        tokenizer = make_qwen2_tokenizer() if family == 'qwen2' else tiny_tokenizer()
        for tied in (False, True):
            for name, rope in ROPES.items():
                em = variant(family, tied, rope)
                folder = save_pruned(em, tokenizer, tmp_path / f'{family}-{tied}-{name}')
                tokens = em.sliced().generate(ids, do_sample=False, max_new_tokens=6,
                                              pad_token_id=2, use_cache=False).tolist()
                held = dict(ids=ids, logits=em.model(ids).logits, tokens=tokens,
                            words=tokenizer('w3 w11 w4 w5').input_ids)
                folders.append(folder)
                torch.save(held, folder.with_suffix('.pt'))
    for family in modeling.IN_4 - {*FIVE}:
        em = ElasticModel(tiny_model(family, layers=4))
        em.set(random_widths(em.layout.full))
        folders.append(save_pruned(em, tiny_tokenizer(), tmp_path / family))
        tokens = em.sliced().generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=2,
                                      use_cache=False).tolist()
        torch.save(dict(ids=ids, logits=em.model(ids).logits, tokens=tokens,
                        words=tiny_tokenizer()('w3 w11 w4 w5').input_ids),
                   folders[-1].with_suffix('.pt'))
    # one that this transformers has saved again has names of version 5 only
    copy = tmp_path / 'copy'
    load_pruned(folders[1])[0].save_pretrained(copy)
    tiny_tokenizer().save_pretrained(copy)
    config = json.loads((copy / 'tokenizer_config.json').read_text())
    config['tokenizer_class'] = 'PreTrainedTokenizerFast'
    (copy / 'tokenizer_config.json').write_text(json.dumps(config))
    shutil.copy(folders[1].with_suffix('.pt'), tmp_path / 'copy.pt')
    assert 'rope_theta' not in json.loads((copy / 'config.json').read_text())
    run = subprocess.run([os.environ['FFP_OLD_TRANSFORMERS'], '-c', OLD,
                          *map(str, (*folders, copy))],
                         capture_output=True, text=True, env=os.environ | {'PYTHONPATH': ''})
    assert run.returncode == 0, run.stderr[-3000:]
    seen = json.loads(run.stdout.split('RESULT')[1])
    assert seen.pop('version').startswith('4.')
    assert len(seen) == 21 + len(modeling.IN_4) - len(FIVE)
    bad = {k: v for k, v in seen.items()
           if v['far'] > 1e-5 or not (v['cached'] and v['same'] and v['words'])}
    assert not bad
    for folder in folders:  # and back
        held = torch.load(folder.with_suffix('.pt'))
        again = load_pruned(f'{folder}-again')[0]
        torch.testing.assert_close(again(ids).logits, held['logits'], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif('FFP_OLD_TRANSFORMERS' not in os.environ,
                    reason='FFP_OLD_TRANSFORMERS is no Python that has transformers 4.57')
@pytest.mark.parametrize('family', ['gpt_neox', 'gemma2', 'gemma3_text', 'stablelm'])
def test_transformers_4_refuses_what_it_computes_otherwise(family, tmp_path):
    folder = save_pruned(half(family), tiny_tokenizer(), tmp_path / family)
    job = f"""
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)"""
    run = subprocess.run([os.environ['FFP_OLD_TRANSFORMERS'], '-c', job], capture_output=True,
                         text=True, env=os.environ | {'PYTHONPATH': ''})
    assert f'a pruned {family} model needs transformers 5' in run.stderr


def test_older_transformers_are_refused_by_name(monkeypatch):
    monkeypatch.setattr('importlib.metadata.version', lambda name: '4.50.3')
    with pytest.raises(ImportError, match=r'transformers>=4.57 .* found transformers==4.50.3'):
        runpy.run_path(modeling.__file__, run_name='travelling')


def test_nothing_foreign_travels(tmp_path):
    """A source whose configurations name code of its own: the snippet of the model card works, and
    what described the source's files is gone"""
    tiny_model().save_pretrained(tmp_path / 'dense')
    tiny_tokenizer().save_pretrained(tmp_path / 'dense')
    for name, more in (('config.json', dict(auto_map=dict(
            AutoConfig='configuration_odd.OddConfig',
            AutoModelForCausalLM='modeling_odd.OddForCausalLM'))),
            ('tokenizer_config.json', dict(auto_map=dict(
                AutoTokenizer=['tokenization_odd.OddTokenizer', None])))):
        path = tmp_path / 'dense' / name
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    model, tokenizer = load_model(str(tmp_path / 'dense'), 'float32', 'cpu')
    assert 'OddConfig' in str(model.config.auto_map)
    model.config.quantization_config = dict(quant_method='fp8')
    card = model_card('dense', 0.5, (2, 1), pd.DataFrame([dict(ppl=1.0)]), '', 'x')
    em = ElasticModel(model)
    folder = save_pruned(em.set(em.layout.full // 2), tokenizer, tmp_path / 'model',
                         files={'README.md': card})
    config = json.loads((folder / 'config.json').read_text())
    assert config['auto_map'] == {'AutoModelForCausalLM': 'modeling.PrunedLlamaForCausalLM',
                                  'AutoModel': 'modeling.PrunedLlamaModel'}
    assert 'quantization_config' not in config
    assert 'auto_map' not in json.loads((folder / 'tokenizer_config.json').read_text())
    snippet = re.search(r'```python\n(.*?)```', (folder / 'README.md').read_text(), re.S)[1]
    code = f'folder = {str(folder)!r}\n{snippet}\nprint(type(model).__name__, tokenizer("w7"))'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert 'PrunedLlamaForCausalLM' in run.stdout and '[7]' in run.stdout


@pytest.mark.parametrize('family', ['qwen2', 'opt'])
def test_a_folder_of_an_earlier_version_opens(family, tmp_path):
    "There a removed module had no unit at all, and nothing was said to servers"
    em = ElasticModel(tiny_model(family)).set([[1, 37], [0, 96], [2, 0]])
    own, rep = em.sliced(), em.layout.q_per_kv
    own.config.pruned_widths = [dict(heads=int(a) * rep, kv_heads=int(a), ffn=int(f))
                                for a, f in em.widths]
    own.__class__ = modeling.PRUNED[family]
    own.save_pretrained(tmp_path / 'model')
    ids = torch.randint(3, 211, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(load_pruned(tmp_path / 'model')[0](ids).logits, em.model(ids).logits)
    with pytest.raises(ValueError, match='earlier version.*Save the model again'):
        parallel_sizes(tmp_path / 'model')


# What is there already

def test_overwriting_replaces_the_folder_whole(tmp_path):
    em = ElasticModel(tiny_model())
    folder = save_pruned(em, None, tmp_path / 'model', files={'note.txt': 'first'})
    with pytest.raises(FileExistsError, match='note.txt.*would be lost'):
        save_pruned(em, None, folder, overwrite=True)
    (folder / 'note.txt').unlink()
    save_pruned(em.set(em.layout.full // 2), None, folder, overwrite=True,
                files={'README.md': 'second'})
    assert (folder / 'README.md').read_text() == 'second'
    assert load_pruned(folder)[0].config.pruned_widths[0] == dict(heads=4, kv_heads=2, ffn=48)
    assert [o.name for o in tmp_path.iterdir()] == ['model']


def test_a_link_to_a_saved_folder_stays_a_link(tmp_path):
    save_pruned(half(), None, tmp_path / 'disk' / 'model')
    (tmp_path / 'model').symlink_to(tmp_path / 'disk' / 'model')
    em = ElasticModel(tiny_model())
    save_pruned(em, None, tmp_path / 'model', overwrite=True)
    assert (tmp_path / 'model').is_symlink() and os.listdir(tmp_path / 'disk') == ['model']
    assert load_pruned(tmp_path / 'disk' / 'model')[0].config.pruned_widths[0]['ffn'] == 96


@pytest.mark.parametrize('where', ['.', '..', '../../mine/model', 'link', 'up'])
def test_the_source_is_never_replaced(tmp_path, monkeypatch, where):
    "however its path, or that of a folder around it, is written; the flag makes no difference"
    source = tmp_path / 'mine' / 'model'
    tiny_model().save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    (tmp_path / 'link').symlink_to(source)
    (tmp_path / 'up').symlink_to(tmp_path / 'mine')
    monkeypatch.chdir(source)
    out = tmp_path / where if where in ('link', 'up') else Path(where)
    model, tokenizer = load_model('../model', 'float32', 'cpu')
    em, before = ElasticModel(model), content(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match='which is read'):
            save_pruned(em, tokenizer, out, overwrite)
    # the configuration of a model built in memory names no source: then the caller does
    with pytest.raises(ValueError, match='which is read'):
        save_pruned(half(), tokenizer, out, True, source=source)
    assert content(tmp_path) == before


@pytest.mark.parametrize('make, says', [
    (lambda o: tiny_model().save_pretrained(o), 'no model that was saved by ffp_nb'),
    (lambda o: (o.mkdir(), (o / 'thesis.tex').write_text('x')), 'no model that was saved'),
    (lambda o: (save_pruned(half(), None, o), (o / 'model-f16.gguf').write_text('x')),
     'model-f16.gguf'),
    (lambda o: (save_pruned(half(), None, o), (o / 'mine').mkdir()), 'mine'),
    (lambda o: o.write_text('x'), 'no model that was saved by ffp_nb')],
    ids=['dense', 'other', 'gguf', 'subfolder', 'file'])
def test_overwrite_replaces_saved_models_only(tmp_path, make, says):
    make(tmp_path / 'there')
    before = content(tmp_path)
    with pytest.raises(FileExistsError, match=says):
        save_pruned(half(), None, tmp_path / 'there', overwrite=True)
    assert content(tmp_path) == before


def test_an_empty_folder_may_be_used(tmp_path):
    (tmp_path / 'model').mkdir()
    load_pruned(save_pruned(half(), None, tmp_path / 'model', overwrite=True))


@pytest.mark.parametrize('error, remedy', [
    (OSError(errno.ENOSPC, 'No space left on device'), 'free some space'),
    (OSError(errno.EDQUOT, 'Quota exceeded'), 'free some of your quota'),
    (RuntimeError('I/O error: No space left on device (os error 28)'), 'free some space'),
    (PermissionError(errno.EACCES, 'Permission denied'), 'that you may write to'),
    (OSError(errno.EROFS, 'Read-only file system'), 'writable file system'),
    (OSError(errno.EIO, 'Input/output error'), None),
    (KeyError('lm_head.weight'), None), (ValueError('GenerationConfig is invalid'), None)],
    ids=lambda o: str(o)[:20])
def test_a_failed_save_leaves_the_old_folder(tmp_path, monkeypatch, error, remedy):
    "The message has the cause and the remedy of that cause, and no other"
    em = ElasticModel(tiny_model())
    folder = save_pruned(em, None, tmp_path / 'model')
    before = content(folder)
    def fail(*a, **kw):
        raise error
    monkeypatch.setattr('transformers.PreTrainedModel.save_pretrained', fail)
    with pytest.raises(OSError, match='an earlier one is untouched') as caught:
        save_pruned(em, None, folder, overwrite=True)
    said = str(caught.value)
    assert (remedy or '') in said and ('space' in said.split('To go on')[-1]) is (
        remedy == 'free some space')
    assert remedy or 'To go on' not in said and str(error.args[-1]) in said
    assert content(folder) == before and [o.name for o in tmp_path.iterdir()] == ['model']


# Killed while saving

def child(action):
    "Run it in a forked process, and leave that as soon as it is done"
    pid = os.fork()
    if not pid:
        try:
            action()
        finally:
            os._exit(0)
    return pid


def kill(*a, **kw):
    os.kill(os.getpid(), signal.SIGKILL)


posix = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')


@posix
@pytest.mark.parametrize('renames', [None, 1, 2])
@pytest.mark.parametrize('again', [False, True])
def test_killed_while_saving(tmp_path, monkeypatch, renames, again):
    """In the middle of the weights, between the two renames, and after them: the earlier model or
    the new one is there, and the next save finds its way"""
    folder, done = save_pruned(half(), None, tmp_path / 'model'), []
    before = content(folder)
    def replace(a, b, replace=os.replace):
        replace(a, b)
        done.append('.model.' in f'{a}{b}' and '.tmp/' not in f'{b}')
        if sum(done) == renames:
            kill()
    def act():
        if renames is None:
            monkeypatch.setattr(hf, '_sync', kill)
        else:
            monkeypatch.setattr(os, 'replace', replace)
        save_pruned(ElasticModel(tiny_model()), None, folder, overwrite=True)
    assert os.WTERMSIG(os.waitpid(child(act), 0)[1]) == signal.SIGKILL
    monkeypatch.undo()
    assert len(list(tmp_path.glob('.model.*'))) >= 2
    assert folder.exists() is (renames != 1)
    if renames == 1:
        with pytest.warns(UserWarning, match='the earlier model is back'):
            put_right(folder)
    else:
        put_right(folder)
    assert os.listdir(tmp_path) == ['model']
    assert (content(folder) == before) is (renames != 2)
    load_pruned(folder)
    if again:
        save_pruned(half(), None, folder, overwrite=True)
        assert content(folder) == before and os.listdir(tmp_path) == ['model']


@posix
def test_what_a_running_process_writes_is_left_alone(tmp_path, monkeypatch):
    write, go = hf._sync, tmp_path / 'go'
    def slow(tmp):
        while not go.exists():
            time.sleep(0.01)
        write(tmp)
    def act():
        monkeypatch.setattr(hf, '_sync', slow)
        save_pruned(half(), None, tmp_path / 'model')
    pid = child(act)
    try:
        until = time.time() + 30
        while not list(tmp_path.glob('.model.*.tmp/model.safetensors')):
            assert time.time() < until
            time.sleep(0.01)
        left = sorted(tmp_path.glob('.model.*'))
        for o in left:
            os.utime(o, (0, 0))  # however old it looks
        put_right(tmp_path / 'model')
        assert sorted(tmp_path.glob('.model.*')) == left
    finally:
        go.write_text('')
        os.waitpid(pid, 0)
    go.unlink()
    assert os.listdir(tmp_path) == ['model']
    load_pruned(tmp_path / 'model')


def test_leftovers_of_earlier_versions(tmp_path):
    "With the number of a process and no lock: old ones go, and what was moved away is back"
    em = half()
    save_pruned(em, None, tmp_path / '.model.17.old')
    for pid, age in ((17, 0), (18, 7200), (19, 0)):
        (tmp_path / f'.model.{pid}.tmp').mkdir()
        os.utime(tmp_path / f'.model.{pid}.tmp', (time.time() - age,) * 2)
    (tmp_path / '.modeling.0123abcd.tmp').mkdir()  # another one's
    with pytest.warns(UserWarning, match='is back'):
        put_right(tmp_path / 'model')
    load_pruned(tmp_path / 'model')
    assert (sorted(os.listdir(tmp_path))
            == ['.model.17.tmp', '.model.19.tmp', '.modeling.0123abcd.tmp', 'model'])
    os.utime(tmp_path / '.model.17.tmp', (0, 0))
    save_pruned(em, None, tmp_path / 'model', overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ['.model.19.tmp', '.modeling.0123abcd.tmp', 'model']
