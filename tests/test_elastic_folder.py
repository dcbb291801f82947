"One folder for every budget: what it serves, what it refuses, and that nothing is lost"
import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_folder, worked
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import ffp_nb
from ffp_nb.core.budget import solve
from ffp_nb.core.families import KINDS, CorruptFile, load_model, tiny_model
from ffp_nb.core.perplexity import residual_norms
from ffp_nb.core.runs import FolderInUse
from ffp_nb.export.gguf import check_gguf
from ffp_nb.export.hf import load_pruned
from ffp_nb.pipeline import dynamic, prune
from ffp_nb.pipeline.config import Profile, PruneConfig
from ffp_nb.pipeline.dynamic import (
    ScorePath, StaleCache, choose_step, list_policies, make_elastic, pick, repair_bytes,
    used_widths)
from ffp_nb.search.loop import Search
from ffp_nb.studies.twins import make_tokenizer

IDS = torch.arange(3, 30)[None]
SMALL = Profile(block_len=32, calibration_blocks=8, sequential_blocks=4, episodes=16, batch=4,
                blocks=2, final_blocks=3, test_blocks=4)


def settings(folder, **kw):
    return PruneConfig(str(folder / 'dense'), str(folder / 'text.txt'),
                       **dict(dtype='float32', step=(1, 8), profile=SMALL) | kw)


def build(folder, out=None, **kw):
    "An elastic folder of the model in `folder`"
    make_elastic(settings(folder), out or folder / 'elastic', progress=False, **kw)
    return out or folder / 'elastic'


@pytest.fixture(scope='module')
def elastic(tmp_path_factory):
    "An elastic folder of a tiny LLaMA; only read"
    return build(make_folder(tmp_path_factory.mktemp('elastic')))


@pytest.fixture
def served(elastic):
    return ffp_nb.load_elastic(elastic)


def fail_with(error):
    "A function that raises"
    def fail(*a):
        raise error
    return fail


@torch.inference_mode()
def logits(model):
    return model(IDS).logits


def line(error) -> str:
    text = str(error.value)
    assert '\n' not in text
    return text


# what the folder is

def test_the_folder_is_the_dense_model_for_everybody_else(elastic, served):
    stock = AutoModelForCausalLM.from_pretrained(elastic, dtype=torch.float32)
    source = load_model(str(elastic.parent / 'dense'), 'float32', 'cpu')[0]
    assert type(stock).__name__ == 'LlamaForCausalLM'
    assert torch.equal(logits(served.model), logits(stock))
    assert torch.allclose(logits(source), logits(stock), atol=1e-4)
    # servers take every safetensors file beside config.json for weights of the model
    assert [f.name for f in elastic.glob('*.safetensors')] == ['model.safetensors']
    was = logits(served.model)
    served.to_sparsity(0.4)
    assert not torch.equal(logits(served.model), was)
    assert torch.equal(logits(served.dense().model), was)
    assert (served.widths == served.cost.full).all() and served.sparsity == 0


@pytest.mark.parametrize('family, settings', [
    ('llama', {}), ('qwen3', dict(tie_word_embeddings=True)), ('opt', {}), ('gpt2', {}),
    ('phi3', {}), ('falcon', {}), ('gemma2', {}), ('olmo2', {})])
def test_a_cut_folder_computes_what_the_elastic_model_does(family, settings, tmp_path):
    make_folder(tmp_path, family)
    if settings:
        tiny_model(family, seed=1, **settings).save_pretrained(tmp_path / 'dense')
    served = ffp_nb.load_elastic(build(tmp_path))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / 'elastic', dtype=torch.float32)
    assert torch.allclose(logits(stock), logits(served.model), atol=1e-4)
    source = load_model(str(tmp_path / 'dense'), 'float32', 'cpu')[0]
    assert torch.allclose(logits(source), logits(served.model), atol=1e-4)
    for target in (0.15, 0.5):
        cut = served.to_sparsity(target).save(tmp_path / f'cut-{target}')
        small = load_pruned(cut)[0]
        assert torch.allclose(logits(small), logits(served.model), atol=1e-5)
        assert sum(p.numel() for p in small.parameters()) == sum(
            p.numel() for p in served.model.parameters())
        assert 'not stated' in (cut / 'README.md').read_text()
    # repaired, with a bias where the family has one
    layer, kind = np.argwhere(served.widths < served.cost.full)[0]
    assert f'{KINDS[kind]}.{served.widths[layer, kind]}.weight' in load_file(
        tmp_path / f'elastic/repair/{layer}.safetensors')
    plain = copy.copy(served.elastic).set(served.widths)
    assert not torch.allclose(logits(plain.model), logits(small), atol=1e-5)


def test_a_model_that_was_pruned_before_is_the_dense_one(tmp_path, served, elastic):
    make_folder(tmp_path)
    shutil.rmtree(tmp_path / 'dense')
    served.to_sparsity(0.2).save(tmp_path / 'dense')
    again = ffp_nb.load_elastic(build(tmp_path, low=0.1, high=0.3))
    assert torch.allclose(logits(again.model), logits(load_pruned(tmp_path / 'dense')[0]),
                          atol=1e-4)
    cut = again.to_sparsity(0.3).save(tmp_path / 'cut')
    assert torch.equal(logits(load_pruned(cut)[0]), logits(again.model))


def test_another_type_is_converted_as_it_is_used(elastic):
    half = ffp_nb.load_elastic(elastic, dtype='bfloat16')
    half.to_sparsity(0.3)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits(half.model)).all()


# budgets

def test_every_target_of_the_range_is_met(served):
    found = []
    for s in np.linspace(0.1, 0.5, 41):
        served.to_sparsity(s)
        assert served.sparsity >= s - 1e-9
        found.append(served.sparsity)
        # no larger policy would do
        larger = served.targets[served.targets < served.sparsity - 1e-12]
        assert not len(larger) or larger.max() < s
    assert (np.diff(found) >= 0).all() and len(set(found)) > 5
    f = served.facts
    path = ScorePath(np.array(f['targets']), np.array(f['scores']))
    for s in (0.1, 0.3, 0.5):
        want = solve(path.at(s), served.cost, s, f['step'], f['p_min'])
        own = served.to_sparsity(s).sparsity
        assert served.cost.sparsity(want) >= own - 1e-9 and own >= s - 1e-9


def test_to_sparsity_names_its_range(served):
    for wish in (0.05, 0.6, -0.1, 1.5, float('nan')):
        with pytest.raises(ValueError, match='0.1 to 0.5') as e:
            served.to_sparsity(wish)
        assert f'{wish:g}' in line(e)
    with pytest.raises(ValueError, match='expected a number'):
        served.to_sparsity('0.3')
    assert served.to_sparsity(0).sparsity == 0


def test_memory_is_what_the_cut_folder_takes(served, tmp_path):
    for s in (0.2, 0.5):
        cut = served.to_sparsity(s).save(tmp_path / str(s))
        tensors = load_file(cut / 'model.safetensors')
        assert served.memory() == sum(t.numel() * t.element_size() for t in tensors.values())
        cache = DynamicCache()
        with torch.inference_mode():
            served.model(IDS, past_key_values=cache)
        held = sum(t.numel() * t.element_size() for o in cache.layers for t in (o.keys, o.values))
        assert served.memory(IDS.shape[1]) == served.memory() + held


def test_to_memory_takes_the_largest_that_fits(served):
    sizes = served.memory(64, served.policies)
    for room in (int(sizes.min()), int(np.median(sizes)), int(sizes.max()), '1GiB'):
        served.to_memory(room, context=64)
        n = room if isinstance(room, int) else 2**30
        assert served.memory(64) <= n
        more = served.policies[served.cost.total(served.policies)
                               > served.cost.total(served.widths)]
        assert (served.memory(64, more) > n).all()
    assert served.sparsity == 0
    with pytest.raises(ValueError, match='too little') as e:
        served.to_memory('1KiB', context=64)
    least = re.search(r'needs ([\d.]+KiB) to ([\d.]+KiB) at a context of 64 tokens', line(e))
    served.to_memory(least[1], context=64)  # what the message names is enough
    assert served.widths.tobytes() == served.policies[-1].tobytes()
    for wrong in ('0GiB', '-1GiB', '3 apples'):
        with pytest.raises(ValueError, match='no amount of memory'):
            served.to_memory(wrong)
    with pytest.raises(ValueError, match='context'):
        served.to_memory('1GiB', context=-1)


def test_a_switch_copies_nothing(served):
    projection = served.model.model.layers[0].mlp.up_proj
    where = projection.weight.data_ptr()
    served.to_sparsity(0.5)
    out = served.model.model.layers[0].mlp.down_proj.weight.data_ptr()
    served.to_sparsity(0.1)
    assert projection.weight.data_ptr() == where
    served.to_sparsity(0.5)
    assert served.model.model.layers[0].mlp.down_proj.weight.data_ptr() == out


def test_a_switch_in_inference_mode_leaves_no_inference_tensors(served):
    with torch.inference_mode():
        served.to_sparsity(0.5)
    x = served.model.get_input_embeddings()(IDS).clone().requires_grad_()
    served.model(inputs_embeds=x).logits.sum().backward()
    assert torch.isfinite(x.grad).all()


# caches of keys and values

def generate(model, ids=IDS, **kw):
    how = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True, pad_token_id=2,
               eos_token_id=None)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **how | kw)


def test_generation_goes_on_at_the_same_widths_and_is_refused_at_others(served, tmp_path):
    served.to_sparsity(0.3)
    first = generate(served.model)
    whole = generate(served.model, max_new_tokens=16).sequences
    kept = first.past_key_values
    served.to_sparsity(0.5)
    with pytest.raises(StaleCache, match='run the tokens again') as e:
        generate(served.model, first.sequences, past_key_values=copy.deepcopy(kept))
    assert isinstance(e.value, ValueError) and line(e)
    served.to_sparsity(0.3)  # back again: the cache is valid
    again = generate(served.model, first.sequences, past_key_values=kept)
    assert torch.equal(again.sequences, whole)
    # after a switch, a fresh generation is that of the cut model
    served.to_sparsity(0.5)
    small = load_pruned(served.save(tmp_path / 'cut'))[0]
    assert torch.equal(generate(served.model).sequences, generate(small).sequences)


@pytest.mark.parametrize('make', [lambda m: DynamicCache(), lambda m: DynamicCache(config=m.config),
                                  lambda m: StaticCache(config=m.config, max_cache_len=64), None])
@pytest.mark.parametrize('part', ['model', 'base_model'])
def test_a_cache_of_other_widths_is_refused(served, make, part):
    call = lambda cache, ids=IDS: (served.model if part == 'model' else served.model.base_model)(
        ids, past_key_values=cache, use_cache=True)
    widths = served.policies
    # two policies with the same heads: every shape fits, but the numbers are others
    a, b = next((w, v) for w in widths for v in widths
                if (w[:, 0] == v[:, 0]).all() and (w != v).any())
    with torch.inference_mode():
        served._to(a)
        cache = call(make and make(served.model)).past_key_values
        held = int(cache.get_seq_length())
        served._to(b)
        with pytest.raises(StaleCache, match='switch back'):
            call(cache, IDS[:, :1])
        assert int(cache.get_seq_length()) == held  # nothing was written
        served._to(a)
        call(cache, IDS[:, :1])
        assert int(cache.get_seq_length()) == held + 1


def test_caches_of_unknown_origin_are_refused(served, elastic):
    other = load_model(str(elastic), 'float32', 'cpu')[0]
    with torch.inference_mode():
        cache = other(IDS, use_cache=True).past_key_values
        with pytest.raises(StaleCache):
            served.model(IDS[:, :1], past_key_values=cache)
        with pytest.raises(StaleCache, match='tuple'):
            served.model(IDS[:, :1], past_key_values=((torch.ones(1), torch.ones(1)),))
        # of the same folder, opened twice
        mine = served.to_sparsity(0.3).model(IDS, use_cache=True).past_key_values
        twin = ffp_nb.load_elastic(elastic).to_sparsity(0.3)
        twin.model(IDS[:, :1], past_key_values=mine)


def test_a_static_generation_across_a_switch(served):
    for s in (0.2, 0.5, 0.2):
        served.to_sparsity(s)
        static = generate(served.model, cache_implementation='static', disable_compile=True)
        assert torch.equal(static.sequences, generate(served.model).sequences)


def test_assisted_generation_with_a_smaller_self(served, elastic):
    small = ffp_nb.load_elastic(elastic).to_sparsity(0.5)
    served.to_sparsity(0.1)
    both = generate(served.model, assistant_model=small.model)
    assert torch.equal(both.sequences, generate(served.model).sequences)


# the shell

def test_from_the_shell(ffp, tmp_path):
    make_folder(tmp_path)
    tokenizer = make_tokenizer([(tmp_path / 'text.txt').read_text()], 300)  # that GGUF knows
    tokenizer.save_pretrained(tmp_path / 'dense')
    tiny_model(vocab=len(tokenizer)).save_pretrained(tmp_path / 'dense')
    out = tmp_path / 'elastic'
    done = worked(ffp('elastic', '--model', tmp_path / 'dense', '--text', tmp_path / 'text.txt',
                      '--profile', 'smoke', '--out', out, '--ffn-step', 8, '--dtype', 'float32'))
    assert 'load_elastic' in done.output and (out / 'elastic.json').exists()
    served = ffp_nb.load_elastic(out).to_sparsity(0.35)
    worked(ffp('export', out, '--sparsity', 0.35, '--out', tmp_path / 'cut', '--gguf',
               tmp_path / 'cut.gguf', '--quant', 'f32'))
    small = load_pruned(tmp_path / 'cut')[0]
    assert torch.equal(logits(small), logits(served.model))
    assert re.search(r'3[56]\.\d% of its decoder blocks', (tmp_path / 'cut/README.md').read_text())
    rows = check_gguf(tmp_path / 'cut.gguf')['widths']
    assert (rows.ffn.to_numpy() == served.widths[:, 1]).all()
    room = f'{int(served.memory(32)) / 1000}KB'
    worked(ffp('export', out, '--memory', room, '--context', 32, '--gguf', tmp_path / 'm.gguf',
               '--quant', 'f32'))
    assert (check_gguf(tmp_path / 'm.gguf')['widths'].ffn.to_numpy() == served.widths[:, 1]).all()
    worked(ffp('export', out, '--gguf', tmp_path / 'dense.gguf', '--quant', 'f32'))
    assert (check_gguf(tmp_path / 'dense.gguf')['widths'].ffn == 96).all()
    again = ffp('elastic', '--model', tmp_path / 'dense', '--text', tmp_path / 'text.txt',
                '--profile', 'smoke', '--out', out, '--ffn-step', 8, '--dtype', 'float32')
    assert again.exit_code == 1 and '--overwrite' in again.output


@pytest.mark.parametrize('options, says', [
    (['--sparsity', 0.05, '--out', 'new'], '0.1 to 0.5'),
    (['--memory', '1KB', '--out', 'new'], 'too little'),
    (['--memory', '1 potato', '--out', 'new'], 'no amount of memory'),
    (['--sparsity', 0.3, '--memory', '1GiB', '--out', 'new'], 'one of the two'),
    (['--sparsity', 0.3, '--context', 8, '--out', 'new'], '--context'),
    (['--sparsity', 0.3], 'nothing to write'), ([], 'nothing to write'),
    (['--out', 'new'], 'how small'), (['--sparsity', 0.3, '--out', 'HERE'], 'which is read'),
    (['--sparsity', 0.3, '--out', 'HERE/repair'], 'exists'),
    (['--sparsity', 0.3, '--quant', 'q8_0', '--out', 'new'], '--quant')])
def test_export_refuses_in_one_line(ffp, elastic, tmp_path, options, says):
    at = [str(elastic) + o[4:] if str(o).startswith('HERE') else tmp_path / o if o == 'new' else o
          for o in options]
    before = sorted(elastic.rglob('*'))
    result = ffp('export', elastic, *at)
    assert result.exit_code == 1 and says in result.output
    said = result.output.strip().splitlines()  # a progress bar may stand before the error
    assert sum(not o.startswith('Loading weights') for o in said) == 1
    assert not (tmp_path / 'new').exists() and sorted(elastic.rglob('*')) == before


def test_what_cannot_be_a_gguf_leaves_no_folder_either(ffp, elastic, tmp_path):
    result = ffp('export', elastic, '--sparsity', 0.3, '--out', tmp_path / 'new', '--gguf',
                 tmp_path / 'x.gguf')
    assert result.exit_code == 1 and 'WordLevel' in result.output  # its tokenizer
    assert list(tmp_path.iterdir()) == []


def test_export_of_a_folder_that_is_not_elastic(ffp, tiny_folder):
    for options in (['--sparsity', 0.3], ['--memory', '1GiB']):
        result = ffp('export', tiny_folder / 'dense', *options, '--out', tiny_folder / 'new')
        assert result.exit_code == 1 and 'no elastic folder' in result.output
    with pytest.raises(ValueError, match='ffp elastic'):
        ffp_nb.load_elastic(tiny_folder / 'nowhere')


@pytest.mark.parametrize('low, high, says', [
    (0.5, 0.1, 'lower one first'), (0.0, 0.5, 'range 0 to'), (0.3, 0.3, 'range 0.3'),
    (-0.1, 0.5, 'range -0.1'), (0.1, 1.0, 'to 1'), (float('nan'), 0.5, 'nan'),
    (0.1, 0.99, 'infeasible')])
def test_ranges_that_cannot_be(tiny_folder, low, high, says):
    with pytest.raises(ValueError, match=says) as e:
        build(tiny_folder, low=low, high=high)
    assert line(e) and not (tiny_folder / 'elastic').exists()


# nothing is lost

def test_a_killed_run_goes_on(tiny_folder, monkeypatch):
    step, taken = Search.step, []
    def counted(self):
        taken.append(self.update)
        if len(taken) == 3: raise KeyboardInterrupt
        step(self)
    monkeypatch.setattr(Search, 'step', counted)
    with pytest.raises(KeyboardInterrupt):
        build(tiny_folder)
    assert not (tiny_folder / 'elastic').exists()
    write = dynamic.write_repairs
    monkeypatch.setattr(dynamic, 'write_repairs', fail_with(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # while the folder is written
        build(tiny_folder)
    assert not (tiny_folder / 'elastic').exists() and taken == [0, 1, 2, *range(2, 12)]
    monkeypatch.setattr(dynamic, 'write_repairs', write)
    build(tiny_folder)
    assert taken == [0, 1, 2, *range(2, 12)]
    whole = build(tiny_folder, tiny_folder / 'whole')
    facts = lambda folder: json.loads((folder / 'elastic.json').read_text())
    read = lambda folder: {k: v for k, v in facts(folder).items()
                           if k not in ('environment', 'record')}
    assert read(whole) == read(tiny_folder / 'elastic')
    for name in ('model.safetensors', 'repair/1.safetensors'):
        assert (whole / name).read_bytes() == (tiny_folder / 'elastic' / name).read_bytes()


def test_an_earlier_folder_stays_until_the_new_one_is_complete(tiny_folder, monkeypatch):
    out = build(tiny_folder)
    before = {p: p.read_bytes() for p in out.rglob('*') if p.is_file()}
    with pytest.raises(FileExistsError, match='--overwrite'):
        build(tiny_folder)
    with monkeypatch.context() as m:
        m.setattr(dynamic, 'write_repairs', fail_with(OSError(28, 'No space')))
        with pytest.raises(OSError, match='free some space|No space'):
            build(tiny_folder, overwrite=True)
    assert {p: p.read_bytes() for p in out.rglob('*') if p.is_file()} == before
    build(tiny_folder, overwrite=True)
    (out / 'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='notes.txt'):
        build(tiny_folder, overwrite=True)
    with pytest.raises(ValueError, match='which is read'):
        make_elastic(settings(tiny_folder), tiny_folder / 'dense', overwrite=True)


def test_what_the_first_token_loses_is_on_every_card(tiny_folder, monkeypatch, elastic):
    """At the end of the range, where most is removed; a folder that is cut from it has the line,
    too. Where nothing is massive, or a folder is older than the check, there is none"""
    monkeypatch.setattr(prune, 'MASSIVE', 0)
    monkeypatch.setattr(prune, 'LOST', 1e9)  # so everything is lost
    with pytest.warns(UserWarning, match='At 50%: As the first of a text, 100.0% of the test text'):
        out = build(tiny_folder)
    served = ffp_nb.load_elastic(out)
    bos = torch.tensor([[served.tokenizer.bos_token_id]])
    dense = residual_norms(served.dense().model, bos).flatten()  # behind each layer but the last
    small = residual_norms(served.to_sparsity(0.5).model, bos).flatten()
    assert any(served.facts['first_token']['bos'] == pytest.approx(r) for r in small / dense)
    served.to_sparsity(0.3).save(tiny_folder / 'cut')
    for card in (out / 'README.md', tiny_folder / 'cut' / 'README.md'):
        assert 'At 50%: As the first of a text, 100.0% of the test' in card.read_text()
    ffp_nb.load_elastic(elastic).to_sparsity(0.3).save(tiny_folder / 'other')
    for card in (elastic / 'README.md', tiny_folder / 'other' / 'README.md'):
        assert 'As the first of a text' not in card.read_text()


def test_one_process_makes_a_folder(tiny_folder):
    program = ('import sys, time; from ffp_nb.core.runs import lock_folder; '
               'held = lock_folder(sys.argv[1]); print("held", flush=True); time.sleep(60)')
    other = subprocess.Popen([sys.executable, '-c', program, tiny_folder / 'elastic.search'],
                             stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == 'held\n'
        with pytest.raises(FolderInUse, match='elastic.search is being written by process'):
            build(tiny_folder)
    finally:
        other.kill()
        other.wait()
    build(tiny_folder)


# damage

@pytest.fixture
def own(elastic, tmp_path):
    "A copy that may be damaged"
    return Path(shutil.copytree(elastic, tmp_path / 'own'))


def change(folder, **kw):
    path = folder / 'elastic.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | kw))


@pytest.mark.parametrize('damage, says', [
    (lambda f: (f / 'elastic.json').write_text('{'), 'not valid JSON'),
    (lambda f: change(f, format=99), 'format 99'), (lambda f: change(f, policies=[]), 'damaged'),
    (lambda f: change(f, policies=[[[1, 2]]]), 'do not fit'),
    (lambda f: change(f, cost={}), 'damaged'),
    (lambda f: change(f, weights='0' * 16), 'other weights'),
    (lambda f: (f / 'repair/1.safetensors').unlink(), '1.safetensors is not there'),
    (lambda f: shutil.copy(f / 'repair/0.safetensors', f / 'model.safetensors'), 'do not fit')])
def test_damage_is_named(own, damage, says):
    damage(own)
    with pytest.raises(CorruptFile, match=says) as e:
        ffp_nb.load_elastic(own)
    assert line(e)


@pytest.mark.parametrize('content', [b'', b'\0' * 100, None])
def test_a_damaged_repair_leaves_the_model_as_it_was(own, content):
    path = own / 'repair/2.safetensors'
    if content is None:  # of another shape
        save_file({k: v[:3].clone() for k, v in load_file(path).items()}, path)
    else:
        path.write_bytes(content)
    served = ffp_nb.load_elastic(own)
    was = logits(served.model)
    with pytest.raises(CorruptFile, match='repair/2.safetensors'):
        served.to_sparsity(0.5)
    assert served.sparsity == 0 and torch.equal(logits(served.model), was)


# parts

def test_repairs_are_those_of_used_widths_alone(elastic, served):
    used = used_widths(served.facts['policies'], served.cost.full)
    size = 0
    for i in range(3):
        tensors = load_file(elastic / f'repair/{i}.safetensors')
        want = {f'{kind}.{k}.weight' for kind in ('attn', 'ffn') for k in used[i, kind]}
        assert set(tensors) == want
        size += sum(t.numel() * t.element_size() for t in tensors.values())
    assert size == served.facts['repair_bytes'] == repair_bytes(served.elastic, used)


def test_the_step_is_the_finest_that_is_small_enough(bench):
    path = ScorePath(np.array([0.1, 0.5]), np.random.default_rng(0).normal(size=(2, 3, 2)))
    full, sizes = bench.cost.full, {}
    for channels in (8, 16, 32, 64):
        policies = list_policies(path, bench.cost, 0.1, 0.5, (1, channels), 0.1)
        sizes[channels] = repair_bytes(bench.elastic, used_widths(policies, full))
    whole = sum(p.numel() * p.element_size() for p in bench.elastic.model.parameters())
    assert sizes[8] > sizes[16] > sizes[32]
    for most, want in ((9, 8), (sizes[16] / whole, 16), (sizes[32] / whole, 32)):
        step, policies = choose_step(bench, path, 0.1, 0.5, most)
        assert step == (1, want) and (policies[:, :, 1] % want == 0).all()
        assert repair_bytes(bench.elastic, used_widths(policies, full)) <= most * whole
        for s in (0.1, 0.23, 0.5):  # no worse than the solver at any target
            own = solve(path.at(s), bench.cost, s, step, 0.1)
            assert bench.cost.total(own) <= bench.cost.total(pick(policies, bench.cost, s)) + 1e-6
            assert bench.cost.sparsity(pick(policies, bench.cost, s)) >= s - 1e-9
    assert choose_step(bench, path, 0.1, 0.5, 0)[0][1] <= 64  # nothing fits: the coarsest
    # FFNs that are narrower than the step
    narrow = SimpleNamespace(config=SimpleNamespace(step=(1, 128), p_min=0.1), cost=bench.cost,
                             elastic=bench.elastic)
    step, policies = choose_step(narrow, path, 0.1, 0.3)
    assert step == (1, 128) and all(bench.cost.sparsity(w) >= 0.1 - 1e-9 for w in policies)


def test_what_is_no_save_is_never_replaced(tmp_path):
    "The function itself asks, not only the command in front of it"
    out = tmp_path / 'mine'
    out.mkdir()
    (out / 'thesis.txt').write_text('years of work')
    bench = SimpleNamespace(config=SimpleNamespace(model='smollm2', text='pydoc'), elastic=None)
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match='mine'):
            dynamic.save_elastic(bench, None, out, (0.1, 0.5), overwrite=overwrite)
    assert (out / 'thesis.txt').read_text() == 'years of work'
