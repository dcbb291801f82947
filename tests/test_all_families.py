"""Every family of the table, on a random model of its own classes: the units can be sorted, cut,
removed, repaired and followed along slopes, saved and opened again; what cannot be pruned is
refused by name, with the reason."""
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import worked
from transformers import AutoConfig, AutoModelForCausalLM

from ffp_nb.core.budget import memory_cost, param_cost
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import (
    FAMILIES, KINDS, Fused, Layout, UnsupportedModel, as_stock, check_config, load_model,
    tiny_model, tiny_tokenizer)
from ffp_nb.core.modeling import Family
from ffp_nb.core.orders import obs_order
from ffp_nb.core.perplexity import first_norms, head_of, residual_norms, sliced_head
from ffp_nb.core.ridge import Calibrator, dense_goals, sequential_calibrate
from ffp_nb.core.slopes import measure_slopes
from ffp_nb.core.stats import collect_stats
from ffp_nb.core.text import Blocks
from ffp_nb.core.wishes import folder_amount
from ffp_nb.export.hf import UNSERVED, count_saved, load_pruned, save_pruned

IDS = torch.randint(3, 211, (4, 40), generator=torch.Generator().manual_seed(1))
TEXT = Blocks(IDS, 39)
WHOLE = 'olmo2', 'olmo3'  # all heads are one unit
every = pytest.mark.parametrize('family', FAMILIES)


def shuffled(family, **settings):
    "A model with its units in another order"
    model = tiny_model(family, **settings)
    g = torch.Generator().manual_seed(0)
    return ElasticModel(model, {k: torch.randperm(m.units, generator=g)
                                for k, m in Layout(model).modules.items()})


def some(em):
    "Widths that differ, with a removed attention and a removed FFN"
    full = int(em.layout.full[0, 0])
    return np.array([[max(1, full // 2), 37], [0, 50], [full, 0]])


@torch.inference_mode()
def logits(model):
    return model(IDS).logits


@every
def test_the_residual_stream_is_what_layers_leave(family):
    model, seen = tiny_model(family), []
    layers = next(m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList)
                  and len(m) == model.config.num_hidden_layers)
    for layer in layers[:-1]:
        layer.register_forward_hook(lambda layer, given, out: seen.append(
            (out if torch.is_tensor(out) else out[0]).norm(dim=-1)))
    norms = residual_norms(model, IDS)
    torch.testing.assert_close(norms, torch.stack(seen), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(first_norms(model, IDS[:, 0], batch=3), norms[:, :, 0].amax(0),
                               rtol=1e-3)


@every
def test_units_can_be_sorted_and_cut(family):
    dense = tiny_model(family)
    want = logits(dense)
    em = shuffled(family)
    assert float((logits(em.model) - want).abs().max()) < 1e-5 * max(1, float(want.abs().max()))
    widths = some(em)
    got = logits(em.set(widths).model)
    # the same as zeros in the columns that are left out
    em.restore()
    for (i, kind), m in em.layout.modules.items():
        m.out.weight.data[:, widths[i, KINDS.index(kind)] * m.cols:] = 0
    torch.testing.assert_close(got, logits(em.model), rtol=1e-4, atol=1e-5)
    assert float((got - want).abs().max()) > 1e-3  # and it is not the dense model


@every
def test_the_head_is_that_of_the_model(family):
    model = tiny_model(family)
    with torch.inference_mode():
        hidden = model.base_model(IDS).last_hidden_state
        torch.testing.assert_close(head_of(model)(hidden), logits(model), rtol=0, atol=0)


def test_heads_that_do_more_than_a_product():
    for family in ('gemma2', 'cohere', 'cohere2', 'granite'):
        model = tiny_model(family)
        with torch.inference_mode():
            bare = model.get_output_embeddings()(model.base_model(IDS).last_hidden_state)
        assert float((bare - logits(model)).abs().max()) > 0.01, family


@every
def test_the_table_says_whether_a_layer_is_a_sum(family):
    model, seen = tiny_model(family), {}
    layout = Layout(model)
    layer = layout.layers[1]
    hooks = [layer.register_forward_pre_hook(lambda _, a, kw: seen.update(
                 h=a[0] if a else kw['hidden_states']), with_kwargs=True),
             layer.register_forward_hook(lambda _, a, o: seen.update(
                 out=o[0] if isinstance(o, tuple) else o)),
             *[layout.modules[1, kind].out.register_forward_hook(
                 lambda _, a, o, k=kind: seen.update({k: o.clone()})) for kind in KINDS]]
    logits(model)
    for h in hooks:
        h.remove()
    total = seen['h'] + seen['attn'].view_as(seen['h']) + seen['ffn'].view_as(seen['h'])
    assert torch.allclose(total, seen['out'], atol=1e-4) == FAMILIES[family].sums
    assert bool(layout.norms) == bool(FAMILIES[family].norms)
    if layout.norms:  # with those, it is a sum, and they are RMS norms: a factor and a size
        attn, ffn = (layout.norms[1, kind](seen[kind].view_as(seen['h'])) for kind in KINDS)
        torch.testing.assert_close(seen['h'] + attn + ffn, seen['out'], atol=1e-5, rtol=1e-5)
        y = seen['ffn'].view_as(seen['h'])
        size = y.square().mean(-1, keepdim=True).sqrt()
        factors = layout.norms[1, 'ffn'](torch.ones(y.shape[-1]))
        torch.testing.assert_close(ffn, factors * y / size, atol=1e-3, rtol=1e-3)
    else:  # Granite has a factor instead
        assert FAMILIES[family].sums == (family != 'granite')


@every
def test_repair(family):
    em = shuffled(family)
    stats = collect_stats(em.model, em.layout, TEXT, progress=False)
    order = obs_order(em.layout, stats, 0.1, 'greedy', progress=False)
    assert all(sorted(order[k].tolist()) == [*range(m.units)]
               for k, m in em.layout.modules.items())
    want, static = logits(em.model), Calibrator(em, stats)
    widths = np.array([[em.layout.full[0, 0], 60]] * 3)
    fit = lambda target: sequential_calibrate(em, widths, TEXT, 0.1, static, target,
                                              dense_goals(em, TEXT, target), progress=False)
    found = dict(none=None, static=static, sequential=fit('residual'), normed=fit('normed'))
    error = {name: float((logits(em.set(widths, weights).model) - want).pow(2).mean())
             for name, weights in found.items()}
    assert error['static'] < error['none'] and error['sequential'] < error['none'], error
    if FAMILIES[family].norms:
        assert error['normed'] < error['sequential'], error
        gone = em.layout.full.copy()  # and where modules are removed
        gone[0, 0], gone[1, 1], gone[2, 1] = 0, 0, 60
        left = [float((logits(em.set(gone, fitted).model) - want).pow(2).mean()) for fitted in (
                    sequential_calibrate(em, gone, TEXT, 0.1, static, t, progress=False)
                    for t in ('module', 'normed'))]
        assert left[1] < left[0], left
    else:  # nothing stands there: the same weights, bit for bit
        assert all(torch.equal(found['normed'](i, k, w)[0], found['sequential'](i, k, w)[0])
                   for i in range(3) for k, w in zip(KINDS, widths[i]))
    for target in ('residual', 'normed'):
        same = sequential_calibrate(em, em.layout.full, TEXT, 0.1, target=target, progress=False)
        torch.testing.assert_close(logits(em.set(em.layout.full, same).model), want, rtol=1e-2,
                                   atol=1e-2)


@every
def test_slopes(family):
    em = shuffled(family)
    widths = np.array([[em.layout.full[0, 0], 60.5]] * 3)
    def nats(w):
        [found] = measure_slopes(em, w, TEXT, batch=4)
        return float(found.nats.mean()), found
    _, found = nats(widths)
    for layer in (0, 1):
        near = [widths.copy(), widths.copy()]
        near[0][layer, 1] += 0.05
        near[1][layer, 1] -= 0.05
        slope = (nats(near[0])[0] - nats(near[1])[0]) / 0.1
        np.testing.assert_allclose(found.gates[layer, 'ffn'][60], slope, rtol=0.02, atol=1e-4)


@every
def test_saved_and_opened(family, tmp_path):
    em = shuffled(family)
    widths = some(em)
    want = logits(em.set(widths).model)
    folder = save_pruned(em, None, tmp_path / 'model')
    own, _ = load_pruned(folder)
    assert torch.equal(logits(own), want) and type(own).__name__.startswith('Pruned')
    alone = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)  # the file in it
    assert torch.equal(logits(alone), want)
    how = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(alone.generate(IDS[:, :9], **how),
                       alone.generate(IDS[:, :9], use_cache=False, **how))
    # a stored zero unit costs a unit's parameters, everything else is gone
    cost, zeros = param_cost(em.layout), np.maximum(widths, 1) - widths
    held = sum(p.numel() for p in own.parameters())
    assert count_saved(em, widths) == held
    removed = sum(p.numel() for p in tiny_model(family).parameters()) - held
    assert removed == int((cost.unit * (em.layout.full - widths - zeros)).sum())


@every
def test_read_from_a_folder_saved_and_opened(family, tmp_path):
    "The names in a file can be others than those in the model, which remembers them (GPT-NeoX)"
    tiny_model(family).save_pretrained(tmp_path / 'dense')
    model = AutoModelForCausalLM.from_pretrained(tmp_path / 'dense', dtype=torch.float32)
    em = ElasticModel(model.eval())
    widths = np.maximum(some(em), 1)
    want = logits(em.set(widths).model)
    folder = save_pruned(em, None, tmp_path / 'model')
    for again in (load_pruned(folder)[0],
                  AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)):
        # fused projections round otherwise; a head that was not read is far off
        torch.testing.assert_close(logits(again), want, rtol=1e-4, atol=1e-4)


@every
def test_the_cache_is_what_a_budget_counts(family, tmp_path):
    "Falcon-40B caches a key and a value for every query head"
    em = ElasticModel(tiny_model(family))
    held = lambda model: sum(t[0, :, 0].numel() for layer in model(
        IDS[:1, :6], use_cache=True).past_key_values.layers for t in (layer.keys, layer.values))
    cost = memory_cost(em.layout, 1000, 1)
    cached = (cost.unit - em.layout.unit_params) * em.layout.full
    assert cached.sum() == 1000 * held(em.model), family
    em.set(np.maximum(some(em), 1))
    folder = save_pruned(em, None, tmp_path / 'model')
    own, _ = load_pruned(folder)
    of = lambda n: folder_amount(folder, SimpleNamespace(budget=SimpleNamespace(
        kind='memory', context=n, batch=2)), em.layout)
    assert of(50) - of(0) == 4 * 100 * held(own), family


@pytest.mark.parametrize('family', ['phi3', 'gpt2', 'falcon', 'gpt_neox'])
def test_fused_projections_go_back_into_one(family):
    model = tiny_model(family)
    names, want = {n: p.shape for n, p in model.named_parameters()}, logits(model)
    Layout(model)
    assert any(isinstance(m, Fused) for m in model.modules()) == (family in ('phi3', 'gpt2'))
    Layout(model)  # again: changes nothing
    as_stock(model)
    assert {n: p.shape for n, p in model.named_parameters()} == names
    assert torch.equal(logits(model), want)


@every
def test_last_logits_from_one_matrix(family):
    model, seen = tiny_model(family, layers=1), []
    with torch.no_grad(), sliced_head(model):
        watch = model.get_output_embeddings().register_forward_pre_hook(
            lambda _, args: seen.append(args[0].stride()))
        alone = model(IDS, use_cache=False, logits_to_keep=5).logits
        watch.remove()
        torch.testing.assert_close(alone, model(IDS, use_cache=False).logits[:, -5:])
    d = model.get_output_embeddings().in_features
    assert seen == [(5 * d, d, 1)]


def test_an_attention_that_is_one_unit():
    for family, how in [('olmo2', {}), ('gemma', dict(kv_heads=1)),
                        ('falcon', dict(new_decoder_architecture=False, multi_query=True))]:
        layout = Layout(tiny_model(family, **how))
        assert (layout.full[:, 0] == 1).all(), family
        attn = sum(p.numel() for n, p in tiny_model(family, **how).named_parameters()
                   if '.1.self_att' in n and 'norm' not in n and not n.endswith('dense.bias'))
        assert layout.unit_params[1, 0] == attn, family
        # its keys and values are as many as the model caches for a token of a layer
        cache = tiny_model(family, **how)(IDS[:1], use_cache=True).past_key_values
        held = sum(t[0, :, 0].numel() for t in (cache.layers[1].keys, cache.layers[1].values))
        cost = memory_cost(layout, 1000, 1)
        assert cost.unit[1, 0] - layout.unit_params[1, 0] == 1000 * held, family


def test_windows_of_families_with_one_kind_of_layer():
    for family in ('mistral', 'ministral3', 'phi3', 'starcoder2'):
        assert Layout(tiny_model(family, sliding_window=7)).windows == [7] * 3, family


@pytest.mark.parametrize('family, settings, says', [
    ('cohere', dict(use_qk_norm=True), 'q_norm'), ('falcon', dict(alibi=True), 'alibi'),
    ('stablelm', dict(qk_layernorm=True), 'q_layernorm'),
    ('gemma3_text', dict(use_bidirectional_attention=True), 'looks ahead'),
    ('gpt2', dict(add_cross_attention=True), 'encoder')])
def test_variants_with_weights_for_each_head(family, settings, says):
    with pytest.raises(UnsupportedModel, match=says):
        Layout(tiny_model(family, **settings))


@pytest.mark.parametrize('kind, says', [
    ('mixtral', 'MoE'), ('qwen3_moe', 'MoE'), ('deepseek_v3', 'MLA'), ('gpt_oss', 'MoE'),
    ('mamba2', 'hybrid'), ('jamba', 'hybrid'), ('qwen3_next', 'hybrid'), ('lfm2', 'hybrid'),
    ('recurrent_gemma', 'hybrid'), ('zamba2', 'hybrid'), ('falcon_h1', 'hybrid'),
    ('nemotron_h', 'hybrid'), ('rwkv', 'hybrid'), ('gemma3', 'language model'), ('t5', 'encoder'),
    ('minicpm3', 'MLA'), ('olmoe', 'MoE'), ('granitemoehybrid', 'hybrid'), ('dbrx', 'MoE'),
    ('minimax', 'hybrid'), ('dots3_note_text', 'MLA'), ('bloom', 'not supported')])
def test_what_cannot_be_pruned_says_why(kind, says):
    with pytest.raises(UnsupportedModel, match=f'{kind}.*{says}'):
        how = dict(num_hidden_layers=2, layer_types=['conv', 'full_attention'])
        check_config(AutoConfig.for_model(kind, **how if kind == 'lfm2' else {}))


@pytest.mark.parametrize('family', ['gemma3_text', 'phi3', 'gpt2', 'falcon', 'olmo2', 'granite'])
def test_a_whole_prune(family, family_folder, ffp, tmp_path):
    "From a folder to a folder: search, both repairs, export; Gemma reads its first token always"
    folder, out, bos = family_folder(family), tmp_path / 'out', family == 'gemma3_text'
    worked(ffp('prune', '--model', folder / 'dense', '--text', folder / 'text.txt', '--sparsity',
               0.3, '--profile', 'smoke', '--ffn-step', 8, '--out', out))
    [record] = [json.loads(p.read_text()) for p in out.glob('prune-*.json')]
    assert record['config']['convention']['bos'] == bos
    card = (out / 'model' / 'README.md').read_text()
    assert ('each behind the first token' in card) == bos
    assert ('It does not serve this model.' in card) == (family in UNSERVED)
    csv = tmp_path / 'ppl.csv'
    how = 'eval', '--model', out / 'model', '--text', folder / 'text.txt', '--csv', csv
    for given, want in (((), bos), (('--no-bos',), False), (('--bos',), True)):
        worked(ffp(*how, '--block-len', 64, *given))
        assert bool(pd.read_csv(csv).bos[0]) == want


def test_a_reason_is_given_only_where_it_is_true():
    for kind, how in (('granitemoehybrid', dict(num_local_experts=0, num_hidden_layers=2,
                                                layer_types=['attention'] * 2)), ('doge', {})):
        with pytest.raises(UnsupportedModel) as e:
            check_config(AutoConfig.for_model(kind, **how))
        assert 'hybrid)' not in str(e.value) and 'MoE' not in str(e.value), kind


@pytest.mark.parametrize('family', ['phi3', 'gpt2', 'llama'])
def test_the_attention_can_be_chosen_later(family, tmp_path):
    "A layer with fewer heads follows the model's own configuration"
    em = shuffled(family)
    want = logits(em.set(some(em)).model)
    folder = save_pruned(em, None, tmp_path / 'model')
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True,
                                                 attn_implementation='eager')
    for m in (model, em.model):
        for how in ('eager', 'sdpa'):
            m.set_attn_implementation(how)
            torch.testing.assert_close(logits(m), want, rtol=1e-4, atol=1e-5)
    assert em.restore().layout.modules[0, 'attn'].attn.config is em.model.config


def test_a_family_of_the_users_own(tmp_path, monkeypatch):
    "Its row travels, also through another save, and is known wherever the folder is opened"
    qkv = 'self_attn.query_key_value'
    row = Family(query=qkv, key=qkv, value=qkv, fused='groups', attn_out='self_attn.dense',
                 ffn_in=('mlp.dense_h_to_4h',), ffn_out='mlp.dense_4h_to_h', kv_size=None)
    monkeypatch.setitem(FAMILIES, 'persimmon', row)
    em = shuffled('persimmon')
    want = logits(em.set([[3, 37], [8, 50], [8, 96]]).model)
    folder = save_pruned(em, tiny_tokenizer(), tmp_path / 'model')
    del FAMILIES['persimmon']
    model, _ = load_pruned(folder)
    assert torch.equal(logits(model), want) and FAMILIES['persimmon'] == row
    model.save_pretrained(tmp_path / 'again')
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / 'again', trust_remote_code=True)
    assert torch.equal(logits(alone), want)
    del FAMILIES['persimmon']
    again, _ = load_model(str(folder), 'float32', 'cpu')
    assert torch.equal(logits(again), want) and Layout(again).full[0].tolist() == [3, 37]


def test_numbers_of_single_heads_are_seen_whatever_their_size():
    model = tiny_model('llama')
    model.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(UnsupportedModel, match='layer 1: sinks'):
        Layout(model)
