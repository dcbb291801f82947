"""A recovered model is trained from the pruned one, is the same for the same seed, and goes
wherever a pruned model goes"""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import UnsupportedModel, load_model, tiny_model
from ffp_nb.core.perplexity import block_nll
from ffp_nb.core.ridge import Calibrator
from ffp_nb.core.runs import ConfigMismatch, RunDir
from ffp_nb.core.stats import collect_stats
from ffp_nb.core.text import Blocks
from ffp_nb.export.gguf import export_gguf
from ffp_nb.export.hf import load_pruned
from ffp_nb.export.vllm import parallel_sizes
from ffp_nb.recover import train
from ffp_nb.recover.train import LR, Recipe, recover, save_recovered

STRANGER = '''
import sys
sys.modules['ffp_nb'] = sys.modules['peft'] = None  # any import of them fails
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folder, data = sys.argv[1:]
ids, logits = torch.load(data)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
with torch.inference_mode(): print('RESULT', float((model(ids).logits - logits).abs().max()))
'''


@pytest.fixture(scope='module')
def text():
    return Blocks(torch.randint(0, 211, (8, 32), generator=torch.Generator().manual_seed(0)), 31)


def pruned(family, text, **size):
    em = ElasticModel(tiny_model(family, **size))
    widths = np.random.default_rng(0).integers(1, em.layout.full)
    widths[0, 0] = widths[1, 1] = 0
    return em, Calibrator(em, collect_stats(em.model, em.layout, text, progress=False), 0.1), widths


def small(method, **kw):
    return Recipe(method, **dict(tokens=512, rank=4) | kw)


@pytest.mark.parametrize('family', ['llama', 'opt'])
@pytest.mark.parametrize('method', ['lora', 'finetune'])
def test_a_saved_one_opens_without_this_package_and_peft(family, method, text, tmp_path):
    em, static, widths = pruned(family, text)
    found = recover(em, widths, text, small(method), static, progress=False)
    folder = save_recovered(found, None, tmp_path / 'model', files={'note.txt': 'trained'})
    with torch.inference_mode():
        logits = found.model(text.ids).logits
    torch.save((text.ids, logits), tmp_path / 'data.pt')
    run = subprocess.run([sys.executable, '-c', STRANGER, str(folder), str(tmp_path / 'data.pt')],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert float(run.stdout.split('RESULT')[1]) == 0.0
    config = json.loads((folder / 'config.json').read_text())
    rows = config['pruned_widths']  # what is removed is one unit of zeros
    assert ([0 if 'ffn' in w.get('zero', ()) else w['ffn'] for w in rows] == widths[:, 1].tolist()
            and (folder / 'note.txt').exists())
    assert not [f.name for f in folder.iterdir() if 'adapter' in f.name]
    # training moved the weights: the folder is not that of the model before it
    with em.at(widths, static), torch.inference_mode():
        assert (em.model(text.ids).logits - logits).abs().max() > 1e-3


@pytest.mark.parametrize('method', ['lora', 'finetune'])
def test_a_saved_one_becomes_a_gguf(method, text, tmp_path):
    pytest.importorskip('xllamacpp')
    from test_gguf import byte_tokenizer

    from ffp_nb.export.gguf import LlamaCpp, export_gguf
    em, static, widths = pruned('llama', text, vocab=300)
    found = recover(em, widths, text, small(method), static, progress=False)
    path = export_gguf(save_recovered(found, byte_tokenizer(), tmp_path / 'model'),
                       tmp_path / 'model.gguf', 'f32')
    ids = text.ids[:1, :12]
    with torch.inference_mode():
        want = -found.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(LlamaCpp(path).nll(ids[0].tolist()), want.numpy(), atol=5e-4)


def test_tied_embeddings_stay_tied(text, tmp_path):
    model = tiny_model('llama')
    model.config.tie_word_embeddings = True
    model.tie_weights()
    em = ElasticModel(model)
    assert em.model.lm_head.weight is em.model.model.embed_tokens.weight
    found = recover(em, em.layout.full // 2, text, small('finetune'), progress=False)
    assert found.model.lm_head.weight is found.model.model.embed_tokens.weight
    assert not torch.equal(found.model.lm_head.weight, em.model.lm_head.weight)
    again, _ = load_pruned(save_recovered(found, None, tmp_path / 'model'))
    with torch.inference_mode():
        assert torch.equal(again(text.ids).logits, found.model(text.ids).logits)


@pytest.mark.parametrize('family', ['llama', 'opt', 'gpt2', 'phi3', 'gemma'])
def test_an_adapter_is_saved_for_transformers_alone(family, text, tmp_path):
    em, static, widths = pruned(family, text)
    found = recover(em, widths, text, small('adapter'), static, progress=False)
    with torch.inference_mode():
        logits = found.model(text.ids).logits
    folder = save_recovered(found, None, tmp_path / 'model')
    torch.save((text.ids, logits), tmp_path / 'data.pt')
    run = subprocess.run([sys.executable, '-c', STRANGER, str(folder), str(tmp_path / 'data.pt')],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert float(run.stdout.split('RESULT')[1]) < 1e-5
    again, _ = load_pruned(folder)
    modules = [m for m in again.modules() if isinstance(m, train.Adapted)]
    assert len(modules) == (widths > 0).sum() and parallel_sizes(folder) == []
    with pytest.raises(UnsupportedModel, match='has adapters beside its projections'):
        load_model(str(folder))
    if family == 'llama':
        with pytest.raises(UnsupportedModel, match='llama.cpp has no such layer'):
            export_gguf(folder, tmp_path / 'model.gguf')


def test_what_is_there_is_not_replaced(text, tmp_path):
    em, static, widths = pruned('llama', text)
    found = recover(em, widths, text, small('finetune'), static, progress=False)
    (tmp_path / 'model').mkdir()
    (tmp_path / 'model' / 'mine').write_text('old')
    for overwrite in (False, True):
        with pytest.raises(FileExistsError):
            save_recovered(found, None, tmp_path / 'model', overwrite=overwrite)
    assert (tmp_path / 'model' / 'mine').read_text() == 'old'


@pytest.mark.parametrize('method', LR)
def test_a_seed_decides(method, text):
    em, static, widths = pruned('llama', text)
    make = lambda **kw: recover(em, widths, text, small(method, **kw), static, progress=False)
    torch.manual_seed(5)
    a = make()
    torch.manual_seed(6)  # the caller's stream has no part in it
    b, c = make(), make(seed=1)
    assert a.losses == b.losses and a.losses != c.losses
    assert all(torch.equal(p, q)
               for p, q in zip(a.model.state_dict().values(), b.model.state_dict().values()))


@pytest.mark.parametrize('method', LR)
def test_equal_tokens_for_all(method, text):
    em, static, widths = pruned('opt', text)
    seen, forward = [], em.model.base_model.__class__.forward
    with pytest.MonkeyPatch.context() as m:
        m.setattr(em.model.base_model.__class__, 'forward',
                  lambda self, ids, *a, **kw: (seen.append(ids.clone()),
                                               forward(self, ids, *a, **kw))[1])
        found = recover(em, widths, text, small(method, tokens=700, batch=3), static,
                        progress=False)
    seen = seen[:-1]  # the last pass sees whether the last step has broken the model
    assert found.tokens == 672 == sum(o.numel() for o in seen) and len(found.losses) == 7
    # blocks come once each before any comes again
    first = torch.cat(seen)[:8]
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, text.ids.tolist()))


@pytest.mark.parametrize('method', LR)
def test_scored_tokens_alone_are_trained_on(method, text):
    em, static, widths = pruned('llama', text)
    part = Blocks(text.ids, 10)
    found = recover(em, widths, part, small(method, tokens=256, batch=8), static, progress=False)
    with em.at(widths, static):
        want = block_nll(em.model, part).sum() / 80
    assert found.losses[0] == pytest.approx(want, abs=1e-4)


def test_every_setting_is_used(text):
    em, static, widths = pruned('llama', text)
    make = lambda **kw: recover(em, widths, text, small('lora', **dict(lr=1e-2) | kw), static,
                                progress=False).losses
    base = make()
    for kw in (dict(lr=2e-2), dict(rank=2), dict(batch=2), dict(warmup=0.6), dict(clip=1e-3),
               dict(weight_decay=5.0), dict(seed=3)):
        assert make(**kw) != base, kw
    assert make(tokens=384) != base[:3]  # the learning rate falls over the tokens that there are


def test_a_blow_up_names_the_step_and_breaks_nothing(text, tmp_path):
    em, static, widths = pruned('llama', text)
    em.set(widths, static)
    before = {n: p.clone() for n, p in em.model.state_dict().items()}
    with pytest.raises(ValueError, match=r'broke down at step 2 of 4: loss (nan|inf).*Use a lr '
                                         r'below 1e\+30'):
        recover(em, widths, text, small('finetune', lr=1e30, warmup=0.0), static, progress=False)
    assert ((em.widths == widths).all()
            and all(torch.equal(before[n], p) for n, p in em.model.state_dict().items()))
    # the last step, too: it has no loss behind it
    with pytest.raises(ValueError, match='broke down at step 1 of 1'):
        recover(em, widths, text, small('finetune', lr=1e30, tokens=128, warmup=0.0), static,
                progress=False)


def test_bad_input(text):
    em, static, widths = pruned('llama', text)
    go = lambda blocks=text, w=widths, **kw: recover(em, w, blocks, Recipe(**kw), static,
                                                     progress=False)
    for match, call in {'100 tokens; one step of 4 blocks of 32 takes 128': lambda: go(tokens=100),
                        'no blocks to train on': lambda: go(text[:0]),
                        'gives token 999': lambda: go(Blocks(text.ids.clone().fill_(999), 31)),
                        "method 'lorra'": lambda: go(method='lorra'), 'lr -1': lambda: go(lr=-1),
                        'expected integers of shape': lambda: go(w=widths[:2]),
                        'nothing to train': lambda: go(w=widths * 0)}.items():
        with pytest.raises(ValueError, match=match):
            call()
    assert (em.widths == em.layout.full).all()


def test_without_peft(text, monkeypatch):
    em, static, widths = pruned('llama', text)
    monkeypatch.setitem(sys.modules, 'peft', None)
    with pytest.raises(ImportError, match='pip install'):
        recover(em, widths, text, small('lora'), progress=False)
    recover(em, widths, text, small('adapter'), progress=False)


def test_a_run_folder_belongs_to_its_settings(text, tmp_path):
    em, static, widths = pruned('llama', text)
    recipe = small('lora')
    a = recover(em, widths, text, recipe, static, RunDir(tmp_path, vars(recipe)), every=3,
                progress=False)
    # finished: read, not trained
    b = recover(em, widths, text, recipe, static, RunDir(tmp_path, vars(recipe)), progress=False)
    assert (a.losses == b.losses
            and all(torch.equal(p, q)
                    for p, q in zip(a.model.state_dict().values(), b.model.state_dict().values())))
    with pytest.raises(ConfigMismatch, match='lr'):
        RunDir(tmp_path, vars(small('lora', lr=1e-5)))


def split(folder):
    "The model of a folder with its last layers in memory and on disk, as accelerate splits it"
    places = {f'model.{n}': 'cpu' for n in ('embed_tokens', 'rotary_emb', 'norm', 'layers.0')}
    places |= {'lm_head': 'cpu', 'model.layers.1': 'cpu', 'model.layers.2': 'disk'}
    return ElasticModel(load_model(str(folder / 'dense'), 'float32', device_map=places)[0])


@pytest.mark.parametrize('method', LR)
def test_a_split_model_is_trained_like_a_whole_one(method, text, family_folder):
    folder = family_folder('llama')
    whole = ElasticModel(load_model(str(folder / 'dense'), 'float32', device='cpu')[0])
    widths = whole.layout.full // 2
    a, b = (recover(em, widths, text, small(method), progress=False)
            for em in (whole, split(folder)))
    assert a.losses == b.losses
    assert all(torch.equal(p, q)
               for p, q in zip(a.model.state_dict().values(), b.model.state_dict().values()))


def test_a_split_model_that_computes_on_a_gpu_is_never_trained_on_the_cpu(text, family_folder,
                                                                          monkeypatch):
    em, went = split(family_folder('llama')), []
    widths = em.layout.full // 2
    em.model._hf_hook.execution_device = 'meta'  # no GPU is needed to see where the copy goes
    settle, steps = train._settle, []
    monkeypatch.setattr(train, '_train', lambda *a: steps.append(0) or [])
    monkeypatch.setattr(train, '_settle',
                        lambda own, *a: (settle(own, *a), went.append(own.device)))
    monkeypatch.setattr(train, 'spare_bytes', lambda device: 10**9)
    recover(em, widths, text, small('lora'), progress=False)
    assert [d.type for d in went] == ['meta'] and steps
    # it does not fit: 16 bytes for each of the numbers that finetune trains, and nothing is trained
    with em.at(widths):
        count = sum(p.numel() for p in em.sliced().parameters())
    monkeypatch.setattr(train, 'spare_bytes', lambda device: 16 * count - 1)
    del steps[:]
    with pytest.raises(ValueError, match=r'^training with finetune takes \d.\d GB, and meta has '
                                         r"\d.\d GB to spare.*Use a larger GPU.*device='cpu'"):
        recover(em, widths, text, small('finetune'), progress=False)
    assert not steps
    monkeypatch.setattr(train, 'spare_bytes', lambda device: 16 * count)
    recover(em, widths, text, small('finetune'), progress=False)
    assert steps


def test_new_weights_are_drawn_on_the_cpu_for_every_device():
    "A seed gives a GPU what it gives a CPU"
    torch.manual_seed(0)
    before, model = torch.get_rng_state(), tiny_model().to('meta')
    train._adapter(model, [], ['model.layers.0.mlp.down_proj'], small('adapter'))
    adapted = model.model.layers[0].mlp.down_proj
    assert {p.device.type for p in adapted.parameters()} == {'meta'}
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize('method', ['adapter', 'lora', 'finetune'])
def test_a_folder_is_what_was_trained_in_bfloat16(method, text, tmp_path):
    "Rotary frequencies stay in float32, as a loaded folder has them"
    model = tiny_model('llama')
    for p in model.parameters():
        p.data = p.data.bfloat16()
    em = ElasticModel(model)
    widths = np.maximum(em.layout.full // 2, 1)
    found = recover(em, widths, text, small(method), progress=False)
    kept = {k: b for k, b in found.model.named_buffers() if 'inv_freq' in k}
    assert kept and all(b.dtype == torch.float32 for b in kept.values())
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}
    loaded, _ = load_pruned(save_recovered(found, None, tmp_path / 'model'), 'bfloat16', 'cpu')
    with torch.inference_mode():
        assert torch.equal(found.model(text.ids).logits, loaded(text.ids).logits)
