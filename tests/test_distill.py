"""The dense model teaches the pruned one: the loss is right, what is frozen is shared, a killed run
goes on, and bad input is one line"""
import json
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from test_gguf import byte_tokenizer

from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import load_model, tiny_model, tiny_tokenizer
from ffp_nb.core.perplexity import first_norms
from ffp_nb.core.text import Blocks
from ffp_nb.export.gguf import export_gguf
from ffp_nb.export.hf import load_pruned, save_pruned
from ffp_nb.pipeline import prune
from ffp_nb.pipeline.cli import app
from ffp_nb.pipeline.config import PROFILES
from ffp_nb.pipeline.recover import RecoverConfig, recover_folder
from ffp_nb.recover import distill as distilling
from ffp_nb.recover.distill import (
    Distillation, check_teacher, distill, distill_loss, distill_student, share_equal)
from ffp_nb.recover.train import Watch, student_from, student_of

CLI = 'from ffp_nb.pipeline.cli import app; app()'


@pytest.fixture(scope='module')
def text():
    return Blocks(torch.randint(0, 211, (8, 32), generator=torch.Generator().manual_seed(0)), 31)


def folders(place, family='llama', removed=True, tokenizer=None, **size):
    "A dense folder and a pruned one of it, with a tokenizer of bytes"
    tokenizer = tokenizer or tiny_tokenizer(0)
    dense = tiny_model(family, **dict(vocab=len(tokenizer), layers=2) | size)
    dense.save_pretrained(place / 'dense')
    tokenizer.save_pretrained(place / 'dense')
    em = ElasticModel(load_model(str(place / 'dense'), 'float32')[0])
    widths = em.layout.full // 2
    if removed:
        widths[0, 1] = widths[1, 0] = 0
    save_pruned(em.set(widths), tokenizer, place / 'pruned')
    return place / 'dense', place / 'pruned'


def say(*args):
    done = CliRunner().invoke(app, [*map(str, args)])
    return done.exit_code, ' '.join(done.stderr.split()), done.output


QUICK = ['--text', 'pydoc', '--profile', 'smoke', '--batch', 4, '--tokens', 2048, '--lr', 3e-3]


def test_a_step_goes_down_the_divergence(text):
    "Gradient descent on the loss, not only its value: finite differences along the gradient"
    dense, small = tiny_model(seed=0).double(), tiny_model(seed=1).double().requires_grad_(True)
    loss = distill_loss(Distillation(temperature=2.0, hidden=0.3, truth=0.25), dense)
    value = loss(small, text.ids[:2], 31)
    value.backward()
    grads = [p.grad.clone() for p in small.parameters()]
    square = float(sum((g**2).sum() for g in grads))
    eps = 1e-5
    with torch.no_grad():
        for p, g in zip(small.parameters(), grads):
            p += eps * g
        ahead = loss(small, text.ids[:2], 31)
    assert abs(float((ahead - value.detach()) / eps) / square - 1) < 1e-3


def test_the_mixture_of_losses_is_linear(text):
    dense, small, ids = tiny_model(seed=0), tiny_model(seed=1), text.ids[:2]
    at = lambda truth: float(distill_loss(Distillation(truth=truth), dense)(small, ids, 31))
    assert at(0.25) == pytest.approx(0.75 * at(0.0) + 0.25 * at(1.0), rel=1e-5)


@pytest.mark.parametrize('family', ['llama', 'opt', 'gpt2', 'phi3', 'gemma2', 'cohere'])
def test_families_learn_by_their_own_head(family, text, monkeypatch):
    "Softcaps and scales of a head are part of both predictions"
    em = ElasticModel(tiny_model(family))
    widths = np.maximum(em.layout.full // 2, 1)
    how = Distillation(lr=1e-3, tokens=2048, batch=4)
    with em.at(widths):
        ours = em.model(text.ids[:4]).logits[:, :-1].log_softmax(-1)
    dense = em.model(text.ids[:4]).logits[:, :-1].log_softmax(-1)
    want = float((dense.exp() * (dense - ours)).sum(-1).mean())
    monkeypatch.setattr(distilling, 'MOST_LOGITS', 5 * 211)  # in pieces
    student = student_of(em, widths)
    first = float(distill_loss(how, em.model)(student.model, text.ids[:4], 31))
    assert first == pytest.approx(want, rel=1e-4)
    found = distill(em, widths, text, how, progress=False)
    assert np.mean(found.losses[-4:]) < np.mean(found.losses[:4])


def test_what_is_frozen_is_shared(text):
    em = ElasticModel(tiny_model(layers=4))
    held = {p.untyped_storage().data_ptr() for p in em.model.parameters()}
    shared, own = (student_of(em, em.layout.full // 2, share=o).model for o in (True, False))
    assert {p.untyped_storage().data_ptr() for p in shared.parameters()} == held
    assert not {p.untyped_storage().data_ptr() for p in own.parameters()} & held
    with torch.inference_mode():
        assert torch.equal(shared(text.ids).logits, own(text.ids).logits)
    before = {n: p.clone() for n, p in em.model.named_parameters()}
    found = distill(em, em.layout.full // 2, text, Distillation('lora', tokens=512), progress=False)
    # merging wrote into weights of its own
    assert all(torch.equal(before[n], p) for n, p in em.model.named_parameters())
    moved = [n for n, p in found.model.named_parameters() if p.untyped_storage().data_ptr() in held]
    assert moved and not any('_proj' in n for n in moved)


def test_two_folders_share_what_is_equal(tmp_path):
    dense, pruned = folders(tmp_path)
    teacher, student = load_model(str(dense), 'float32')[0], load_pruned(pruned)[0]
    names = 'embed', 'norm', 'lm_head'
    want = sum(p.numel() * 4 for n, p in student.named_parameters() if any(o in n for o in names))
    assert share_equal(student, teacher) == want and share_equal(student, teacher) == 0
    blocks = Blocks(torch.randint(0, 211, (8, 32)), 31)
    before = {n: p.clone() for n, p in teacher.named_parameters()}
    for method in ('lora', 'finetune'):  # in float32, where training changes weights in place
        student = load_pruned(pruned)[0]
        how = Distillation(method, lr=1e-2, tokens=512)
        found = distill_student(student_from(student), teacher, blocks, how, progress=False)
        assert all(torch.equal(before[n], p) for n, p in teacher.named_parameters())
        shared = (found.model.get_input_embeddings().weight.data_ptr()
                  == teacher.get_input_embeddings().weight.data_ptr())
        assert shared == (method == 'lora')
    student.requires_grad_(True)
    assert share_equal(student, load_model(str(dense), 'float32')[0]) == 0  # it would be trained


def test_early_stopping_keeps_the_best(text):
    "Measured 4, 3, 5, 6: stopped after the fourth, with the weights of the second"
    values, seen = iter([4.0, 3.0, 5.0, float('nan'), 1.0]), []
    watch = Watch(lambda m: next(values), 10, 5, 2)
    p = torch.nn.Parameter(torch.zeros(2))
    for step in range(11):
        p.data.fill_(step)
        seen.append(watch(None, dict(p=p), step))
        if seen[-1]: break
    assert [s for s, _ in watch.scores] == [0, 2, 4, 6] and seen[-1] and not any(seen[:-1])
    watch.restore(dict(p=p))
    assert p.tolist() == [2.0, 2.0] and watch.scores[-1][1] == float('inf')


@pytest.mark.parametrize('method', ['distill', 'lora', 'finetune', 'adapter'])
def test_every_method_makes_a_folder(method, tmp_path):
    dense, pruned = folders(tmp_path, tokenizer=byte_tokenizer(), vocab=300)
    more = ['--teacher', dense] if method == 'distill' else []
    code, err, out = say('recover', pruned, '--method', method, '--out', tmp_path / 'out', *more,
                         *QUICK)
    assert code == 0, err
    model, tokenizer = load_pruned(tmp_path / 'out/model')
    before, _ = load_pruned(pruned)
    assert model.config.pruned_widths == before.config.pruned_widths and tokenizer is not None
    [record] = [json.loads(f.read_text()) for f in (tmp_path / 'out').glob('recover-*.json')]
    assert record['result']['tokens'] == 2048 and record['config']['text'] == {'pydoc': 1.0}
    card = (tmp_path / 'out/model/README.md').read_text()
    assert '2,048 tokens of pydoc (1)' in card and (tmp_path / 'out/model/recover.png').exists()
    whole = sum(p.numel() for p in load_model(str(dense), 'float32')[0].parameters())
    held = sum(p.numel() for p in model.parameters())  # with zeros and adapters
    assert f'{whole:,} parameters before, {held:,} after' in card
    # removed modules stay zeros
    assert not model.model.layers[0].mlp.down_proj.weight.any()
    if method == 'adapter':
        return
    x = torch.arange(3, 15)[None]
    with torch.inference_mode():
        assert not torch.equal(model(x).logits, before(x).logits)
    pytest.importorskip('gguf')
    assert export_gguf(tmp_path / 'out/model', tmp_path / 'm.gguf', 'f32').stat().st_size > 1000


def test_a_configuration_need_not_say_the_size_of_its_ffns(tmp_path):
    "GPT-2's, as on the hub"
    dense, pruned = folders(tmp_path, 'gpt2', False, byte_tokenizer(), vocab=300, ffn=None)
    assert load_model(str(dense), 'float32')[0].config.n_inner is None
    code, err, _ = say('recover', pruned, '--method', 'lora', '--out', tmp_path / 'out', *QUICK)
    assert code == 0, err
    whole, held = (sum(p.numel() for p in m.parameters()) for m in (
        load_model(str(dense), 'float32')[0], load_pruned(pruned)[0]))
    assert f'{whole:,} parameters before, {held:,} after' in (
        tmp_path / 'out/model/README.md').read_text()


def test_what_the_first_token_has_lost_is_told_after_a_distillation(tmp_path, monkeypatch):
    """The record, the card and a warning agree; without a teacher nothing is known. The taught
    model is compared, neither the pruned one nor the teacher itself"""
    dense, pruned = folders(tmp_path, tokenizer=byte_tokenizer(), vocab=300)
    monkeypatch.setattr(prune, 'MASSIVE', 0)
    monkeypatch.setattr(prune, 'LOST', 1e9)  # so everything is lost
    config = RecoverConfig(str(pruned), {'pydoc': 1.0}, teacher=str(dense), tokens=2048, lr=3e-3,
                           profile=replace(PROFILES['smoke'], block_len=64))
    with pytest.warns(UserWarning, match='As the first of a text, 100.0% of the test text'):
        recover_folder(config, tmp_path / 'out', progress=False)
    [record] = [json.loads(f.read_text()) for f in (tmp_path / 'out').glob('recover-*.json')]
    found = record['result']['first_token']
    assert found['lost'] == 1 and found['tokens'] > 20
    assert 'lose the massive activation' in (tmp_path / 'out/model/README.md').read_text()
    bos = byte_tokenizer().bos_token_id
    norm = lambda model: first_norms(model, torch.tensor([bos]), 0).item()  # of two layers
    taught, own = (load_pruned(f)[0] for f in (tmp_path / 'out/model', pruned))
    assert found['bos'] == pytest.approx(norm(taught) / norm(load_model(str(dense), 'float32')[0]))
    assert norm(taught) != pytest.approx(norm(own))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        recover_folder(replace(config, method='lora', teacher=None), tmp_path / 'lora',
                       progress=False)
    [record] = [json.loads(f.read_text()) for f in (tmp_path / 'lora').glob('recover-*.json')]
    assert 'first_token' not in record['result']


def test_a_mixture_and_a_picture(tmp_path):
    dense, pruned = folders(tmp_path, removed=False)
    other = tmp_path / 'other=1.txt'
    other.write_text('\n\n'.join(f'line {i} of another text, {i * 7919 % 10007}' * 5
                                 for i in range(400)))
    code, err, out = say('recover', pruned, '--teacher', dense, '--out', tmp_path / 'out',
                         '--text', 'pydoc=0.75', '--text', other, *QUICK[2:])
    assert code == 0, err
    table = (tmp_path / 'out/table.csv').read_text()
    assert table.count('pydoc') == 3 == table.count('other=1.txt')  # dense, before, after
    assert not (tmp_path / 'out/train').exists()


@pytest.mark.parametrize('args, message', [
    (['--tokens', '0'], "'0' is no amount; give a number above 0"),
    (['--tokens', 'many'], "'many' is no amount"),
    (['--text', 'pydoc=0'], "text 'pydoc=0': expected each text once"),
    (['--text', 'pydoc=-1'], 'with a weight above 0'),
    (['--temperature', '0'], 'temperature 0.0; expected a number above 0'),
    (['--truth', '2'], 'truth 2.0; expected a number from 0 to 1'),
    (['--lr', '-1'], 'lr -1.0'), (['--patience', '0'], 'patience 0'),
    (['--batch', '0'], 'batch 0'), (['--device', 'auto'], 'training is not split over devices'),
    (['--method', 'lora', '--temperature', '2'], 'no effect with --method lora: --temperature'),
    (['--method', 'finetune', '--teacher', 'smollm2'], 'no effect with --method finetune'),
    (['--method', 'finetune', '--rank', '8'], 'no effect where all weights are trained: --rank'),
    (['--rank', '16'], 'no effect where all weights are trained: --rank'),
    (['--tokens', '100'], '100 tokens; one step of 4 blocks of 64 takes 256'),
    (['--teacher', 'nowhere'], 'nowhere'),
    ([], 'does not name the dense model that it is from. Give it by --teacher')])
def test_bad_input_is_one_line_and_touches_nothing(args, message, tmp_path):
    _, pruned = folders(tmp_path)
    quick = [] if {'--tokens', '--lr', '--batch'} & {*map(str, args)} else QUICK[4:]
    code, err, _ = say('recover', pruned, '--out', tmp_path / 'out', *QUICK[2:4],
                       *(QUICK[:2] if '--text' not in args else []), *quick, *args)
    assert code == 1 and message in err and err.count('error:') == 1, err
    assert not (tmp_path / 'out/model').exists() and (pruned / 'config.json').exists()


def test_a_wrong_folder_or_teacher(tmp_path):
    dense, pruned = folders(tmp_path)
    out = ['--out', tmp_path / 'out', *QUICK]
    code, err, _ = say('recover', dense, *out, '--teacher', dense)
    assert code == 1 and 'has no pruned_widths' in err
    code, err, _ = say('recover', tmp_path / 'nothing', *out, '--teacher', dense)
    assert code == 1 and 'nothing is no folder' in err
    code, err, _ = say('recover', pruned, *out, '--teacher', pruned)
    assert code == 1 and 'is a pruned model. Give the dense one' in err
    other = tiny_model(vocab=300, layers=2)
    other.save_pretrained(tmp_path / 'other')
    tiny_tokenizer(0).save_pretrained(tmp_path / 'other')
    code, err, _ = say('recover', pruned, *out, '--teacher', tmp_path / 'other')
    assert code == 1 and 'the teacher has a vocabulary of 300, the pruned model of' in err
    tiny_model(vocab=259, layers=2).save_pretrained(tmp_path / 'words')
    tiny_tokenizer(259).save_pretrained(tmp_path / 'words')
    code, err, _ = say('recover', pruned, *out, '--teacher', tmp_path / 'words')
    assert code == 1 and 'has another vocabulary than' in err, err
    with pytest.raises(ValueError, match='hidden states of 32, the pruned model of 64'):
        check_teacher(load_pruned(pruned)[0], tiny_model(vocab=259, hidden=32))
    # the output may be neither of the inputs
    code, err, _ = say('recover', pruned, '--out', pruned, *QUICK, '--teacher', dense)
    assert code == 1 and 'which is read' in err, err


def test_too_little_text(tmp_path):
    dense, pruned = folders(tmp_path)
    short = tmp_path / 'short.txt'
    short.write_text('\n\n'.join(f'paragraph {i}' for i in range(40)))
    code, err, _ = say('recover', pruned, '--teacher', dense, '--out', tmp_path / 'out',
                       '--text', short, *QUICK[2:])
    assert code == 1 and 'blocks of 64' in err and 'Give more text' in err, err


def test_training_that_breaks_is_one_line(tmp_path):
    dense, pruned = folders(tmp_path)
    before = (pruned / 'model.safetensors').read_bytes()
    code, err, _ = say('recover', pruned, '--teacher', dense, '--out', tmp_path / 'out', *QUICK,
                       '--lr', 1e30)
    assert code == 1 and 'broke down at step' in err and 'lr below 1e+30' in err, err
    assert (pruned / 'model.safetensors').read_bytes() == before
    assert not (tmp_path / 'out/model').exists()


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    dense, pruned = folders(tmp_path, layers=4)
    args = ['recover', pruned, '--teacher', dense, *QUICK[:6], '--lr', 1e-3, '--tokens', '40K']
    assert say(*args, '--out', tmp_path / 'whole')[0] == 0
    again = [*map(str, args), '--out', str(tmp_path / 'parts')]
    child = subprocess.Popen([sys.executable, '-c', CLI, *again], stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / 'parts/train/checkpoint.pt'
    while not checkpoint.exists() and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / 'parts/model').exists()
    code, err, _ = say(*again, '--seed', 1)
    assert code == 1 and 'seed: 0 there, 1 here' in err  # another run is not mixed in
    assert say(*again)[0] == 0
    a, b = (load_pruned(tmp_path / o / 'model')[0].state_dict() for o in ('whole', 'parts'))
    assert all(torch.equal(a[n], b[n]) for n in a)
    read = lambda o: json.loads(next(Path(tmp_path / o).glob('recover-*.json')).read_text())
    assert read('whole')['result']['losses'] == read('parts')['result']['losses']


def test_a_saved_folder_names_its_source(tmp_path):
    "A public name travels, a path of this machine does not"
    dense, pruned = folders(tmp_path)
    assert 'pruned_from' not in json.loads((pruned / 'config.json').read_text())
    em = ElasticModel(load_model(str(dense), 'float32')[0])
    save_pruned(em.set(em.layout.full // 2), tiny_tokenizer(0), tmp_path / 'named',
                source='owner/name')
    assert json.loads((tmp_path / 'named/config.json').read_text())['pruned_from'] == 'owner/name'
    student = student_from(load_pruned(tmp_path / 'named')[0])
    assert (student.widths == em.layout.full // 2).all()
    with pytest.raises(ValueError, match='needs a teacher'):
        distill_student(student, None, Blocks(torch.zeros(4, 16, dtype=int), 15))
