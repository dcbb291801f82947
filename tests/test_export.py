"""A saved model opens in a process that has transformers and not this package, and is the model
that was saved"""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import ffp_nb
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import FAMILIES, UnsupportedModel, load_model, smollm2_path, tiny_model
from ffp_nb.export.hf import load_pruned, save_pruned

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


@pytest.mark.parametrize('family', FAMILIES)
def test_opens_without_this_package(family, tmp_path):
    em = ElasticModel(tiny_model(family, layers=4, seed=3))
    own = em.set(random_widths(em.layout.full)).sliced()
    ids = torch.randint(3, 211, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0  # the second prompt is shorter: left padding
    seen = stranger(save_pruned(em, None, tmp_path / 'model'), tmp_path, own, ids, mask)
    assert seen['sdpa'] == seen['eager'] == seen['auto'] == seen['again'] == 0.0
    assert seen['plain'] == seen['cache'] == seen['static'] and len(seen['plain'][0]) == 19
    assert seen['beams'][0] == seen['beams'][1]
    assert seen['bf16'] == ['torch.bfloat16', True]
    assert (seen['class'].lower() == f'pruned{family}forcausallm'
            and seen['parameters'] == sum(p.numel() for p in own.parameters()))
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
            * (em.layout.unit_params * (em.layout.full - widths)).sum() + 200_000)
    again, words = ffp_nb.load_pruned(folder)
    with torch.inference_mode():
        own.set_attn_implementation('sdpa')
        assert torch.equal(again(ids).logits, own(ids).logits)
    assert words('a b c') == tokenizer('a b c')


def test_a_pruned_folder_is_not_pruned_again(tmp_path):
    em = ElasticModel(tiny_model())
    folder = save_pruned(em.set(em.layout.full // 2), None, tmp_path / 'model')
    for refused in (lambda: load_model(str(folder)), lambda: ElasticModel(load_pruned(folder)[0])):
        with pytest.raises(UnsupportedModel, match='pruned already.*dense source'):
            refused()


def test_overwriting_replaces_the_folder_whole(tmp_path):
    em = ElasticModel(tiny_model())
    folder = save_pruned(em, None, tmp_path / 'model', files={'note.txt': 'first'})
    save_pruned(em.set(em.layout.full // 2), None, folder, overwrite=True,
                files={'README.md': 'second'})
    assert not (folder / 'note.txt').exists() and (folder / 'README.md').read_text() == 'second'
    assert load_pruned(folder)[0].config.pruned_widths[0] == dict(heads=4, kv_heads=2, ffn=48)
    assert [o.name for o in tmp_path.iterdir()] == ['model']


@pytest.mark.parametrize('error',
                         [OSError(28, 'No space left on device'),
                          RuntimeError('safetensors: I/O error')])
def test_a_failed_save_leaves_the_old_folder(tmp_path, monkeypatch, error):
    em = ElasticModel(tiny_model())
    folder = save_pruned(em, None, tmp_path / 'model')
    before = {o.name: o.read_bytes() for o in folder.iterdir()}
    def fail(*a, **kw):
        raise error
    monkeypatch.setattr('transformers.PreTrainedModel.save_pretrained', fail)
    with pytest.raises(OSError, match='an earlier one is untouched'):
        save_pruned(em, None, folder, overwrite=True)
    assert ({o.name: o.read_bytes() for o in folder.iterdir()} == before
            and [o.name for o in tmp_path.iterdir()] == ['model'])
