"Pruned folders in an unmodified vLLM, which lives in an environment of its own."
import os

import numpy as np
import pytest
import torch

from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import FAMILIES, Layout, load_model, smollm2_path, tiny_model
from ffp_nb.export.hf import UNSERVED, load_pruned, save_pruned
from ffp_nb.export.vllm import VLLM, parallel_sizes

PYTHON = os.environ.get('FFP_VLLM_PYTHON')
pytestmark = pytest.mark.skipif(not PYTHON, reason='FFP_VLLM_PYTHON names no interpreter with vLLM')


def same(folder, prompts, n=12, **options):
    "The same greedy tokens as transformers, and the prompt's log-probabilities within 1e-3 nats"
    model, _ = load_pruned(folder)
    with torch.inference_mode():
        log_p = model(prompts).logits.float().log_softmax(-1)
        want = log_p[:, :-1].gather(2, prompts[:, 1:, None])[..., 0].numpy()
        tokens = model.generate(prompts, max_new_tokens=n, min_new_tokens=n, do_sample=False,
                                eos_token_id=None, pad_token_id=2)[:, prompts.shape[1]:]
    seen = VLLM(PYTHON).complete(folder, prompts.tolist(), n, **options)
    np.testing.assert_allclose([o['logprobs'] for o in seen], want, atol=1e-3)
    assert [o['tokens'] for o in seen] == tokens.tolist()


def made(family, tmp_path, widths, **settings):
    if tiny_model(family).config.to_dict().get('head_dim'):
        settings = dict(head_dim=32) | settings
    em = ElasticModel(tiny_model(family, 4, 128, 4, 2, seed=3, **settings))
    em.set(widths)
    return save_pruned(em, None, tmp_path / family)


PROMPTS = torch.randint(3, 211, (3, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('family', [f for f in FAMILIES if f not in UNSERVED])
def test_each_family_at_unequal_widths(family, tmp_path):
    "Unequal FFNs and KV groups, an attention and an FFN removed, a layer as it was"
    most = int(Layout(tiny_model(family, 4, 128, 4, 2)).full[0, 0])
    same(made(family, tmp_path, [[1, 37], [0, 96], [most, 0], [most, 96]]), PROMPTS)


@pytest.mark.parametrize('family', UNSERVED)
def test_what_it_cannot_serve_is_not_announced(family, tmp_path):
    "If one of these passes some day, its line in UNSERVED goes"
    folder = made(family, tmp_path, [[1, 37], [2, 96], [2, 64], [2, 96]])
    assert parallel_sizes(folder) == []
    with pytest.raises(RuntimeError, match='vLLM could not serve'):
        VLLM(PYTHON).complete(folder, PROMPTS.tolist(), 1)


@pytest.mark.parametrize('eager', [True, False], ids=['eager', 'compiled'])
def test_sliding_and_full_layers_and_a_compiled_graph(eager, tmp_path):
    "Compiling needs a C++ compiler and takes two minutes on two cores"
    kinds = ['sliding_attention', 'full_attention'] * 2
    folder = made('qwen3', tmp_path, [[1, 37], [2, 64], [2, 17], [1, 96]], sliding_window=5,
                  use_sliding_window=True, layer_types=kinds)
    same(folder, PROMPTS, enforce_eager=eager)


def test_two_devices_share_it(tmp_path):
    "Tensor parallelism, on a CPU as two processes"
    folder = made('llama', tmp_path, [[2, 48], [2, 96], [2, 16], [2, 96]])
    assert parallel_sizes(folder) == [1, 2]
    same(folder, PROMPTS, tensor_parallel_size=2)


def test_smollm2_for_real(tmp_path):
    smollm2_path()
    model, tokenizer = load_model('smollm2', 'float32', 'cpu')
    em = ElasticModel(model)
    widths = np.random.default_rng(1).integers([1, 320], em.layout.full + 1)
    em.set(widths)
    folder = save_pruned(em, tokenizer, tmp_path / 'smollm2')
    text = 'The first thing that one learns about pruning is'
    same(folder, tokenizer(text, return_tensors='pt')['input_ids'], 24)


def test_a_folder_that_vllm_cannot_serve_is_named(tmp_path):
    folder = made('llama', tmp_path, [[1, 37], [2, 96], [2, 64], [2, 96]])
    next(folder.glob('*.safetensors')).unlink()
    with pytest.raises(RuntimeError, match='vLLM could not serve .*llama'):
        VLLM(PYTHON).complete(folder, PROMPTS.tolist(), 1)
