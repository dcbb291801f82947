"Models whose layers differ in their masks: what sequential calibration takes from the dense model"
import numpy as np
import pytest
import torch

from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import FIVE, KINDS, tiny_model
from ffp_nb.core.ridge import _first_inputs, dense_goals, sequential_calibrate
from ffp_nb.core.text import Blocks

TEXT = Blocks(torch.randint(0, 211, (3, 64), generator=torch.Generator().manual_seed(0)), 63)
WINDOWS = dict(qwen2=dict(use_sliding_window=True, max_window_layers=2, sliding_window=8),
               qwen3=dict(use_sliding_window=True, max_window_layers=1, sliding_window=8),
               mistral=dict(sliding_window=8))


def make(name):
    "'qwen2', or 'qwen2 window'"
    family, _, window = name.partition(' ')
    return tiny_model(family, layers=4, **WINDOWS[family] if window else {})


MODELS = [f'{f} window' for f in WINDOWS] + list(FIVE)


def true_states(em, ids):
    "Outputs of every module, and the stream before and after it, in the model's own forward pass"
    out, stream, hooks = {}, {}, []
    for key, m in em.layout.modules.items():
        hooks.append(m.out.register_forward_hook(
            lambda _, args, o, key=key: out.__setitem__(key, o.view(*ids.shape, -1))))
    for i, layer in enumerate(em.layout.layers):
        hooks.append(layer.register_forward_hook(
            lambda _, args, o, i=i: stream.__setitem__(i, (args[0], o))))
    with torch.inference_mode():
        em.model(ids, use_cache=False)
    for h in hooks:
        h.remove()
    return out, stream


@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
@pytest.mark.parametrize('name', MODELS)
def test_goals_are_the_states_of_the_models_own_forward_pass(name, attention):
    model = make(name)
    model.set_attn_implementation(attention)
    em = ElasticModel(model)
    out, stream = true_states(em, TEXT.ids)
    for i, goal in enumerate(dense_goals(em, TEXT, batch=2)):
        for kind in KINDS:
            torch.testing.assert_close(torch.cat(goal[kind]), out[i, kind], atol=1e-4, rtol=1e-4)
    for i, goal in enumerate(dense_goals(em, TEXT, 'residual')):
        before, after = stream[i]
        torch.testing.assert_close(torch.cat(goal['attn']), before + out[i, 'attn'], atol=1e-4,
                                   rtol=1e-4)
        torch.testing.assert_close(torch.cat(goal['ffn']), after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('name', MODELS)
def test_unpruned_model_is_left_as_it_is(name):
    "Every projection stays as it is: both halves of a refit see the same"
    em = ElasticModel(make(name))
    same = sequential_calibrate(em, em.layout.full, TEXT, 0.1, target='residual', progress=False)
    for key, m in em.layout.modules.items():
        torch.testing.assert_close(same(*key, m.units)[0], em.dense_out(key)[0], atol=1e-4,
                                   rtol=1e-3)


def test_policies_share_goals_in_a_mixed_model():
    em = ElasticModel(make('qwen2 window'))
    widths = np.maximum(em.layout.full * 6 // 10, 1)
    fit = lambda goals: sequential_calibrate(em, widths, TEXT, 0.1, goals=goals, progress=False)
    a, b = fit(None), fit(dense_goals(em, TEXT))
    assert all(torch.equal(a.weights[k][0], b.weights[k][0]) for k in a.weights)


def test_layers_share_what_is_equal():
    "Four layers and three blocks, two masks: each is held once"
    em = ElasticModel(make('qwen2 window'))
    em.model.set_attn_implementation('eager')
    hidden, calls = _first_inputs(em, TEXT, 1)
    assert len(hidden) == 3 and [len(c) for c in calls] == [3] * 4
    masks = [c['attention_mask'] for layer in calls for c in layer]
    assert len({m.data_ptr() for m in masks}) == 2
    assert not torch.equal(calls[0][0]['attention_mask'], calls[3][0]['attention_mask'])
    assert len({c['position_embeddings'][0].data_ptr() for layer in calls for c in layer}) == 1
    assert not any('forward' in vars(layer) for layer in em.layout.layers)


def test_layers_run_again_after_an_error():
    em = ElasticModel(tiny_model())
    with pytest.raises(IndexError):
        dense_goals(em, Blocks(TEXT.ids + 500, 63))
    with torch.inference_mode():
        assert torch.isfinite(em.model(TEXT.ids).logits).all()
