"""`--dtype auto`: bfloat16 where a device has it, float32 elsewhere, and the records say which"""
import os
import subprocess
import sys

import pytest
import torch
from conftest import worked
from safetensors.torch import load_file

from ffp_nb.core import families
from ffp_nb.core.families import find_dtype, has_bfloat16
from ffp_nb.core.runs import read_json
from ffp_nb.export.hf import open_model
from ffp_nb.pipeline.config import PruneConfig, run_config


@pytest.fixture
def cpu(monkeypatch):
    "`cpu(True)`: this machine's processor has bfloat16 instructions, whatever it is; no GPU"
    def be(able):
        monkeypatch.setattr(families.torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: able)
        monkeypatch.setattr(families.torch.cuda, 'is_available', lambda: False)
    return be


def test_cpu(cpu):
    for able, want in ((True, torch.bfloat16), (False, torch.float32)):
        cpu(able)
        assert find_dtype() == find_dtype('auto') == find_dtype('auto', 'cpu') == want
        assert find_dtype('auto', 'auto') == want
        assert find_dtype('bfloat16', 'cpu') == find_dtype(torch.bfloat16) == torch.bfloat16
        assert find_dtype('auto', 'mps') == torch.float32


@pytest.mark.parametrize('able', [True, False])
def test_gpu(cpu, monkeypatch, able):
    "A GPU is asked for its own instructions, not whether PyTorch can emulate them"
    cpu(not able)
    monkeypatch.setattr(families.torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(families.torch.cuda, 'is_bf16_supported',
                        lambda including_emulation=True: including_emulation or able)
    for device in (None, 'auto', 'cuda', 'cuda:1'):
        assert has_bfloat16(device) == able
    assert has_bfloat16('cpu') != able


def test_the_real_processor():
    "oneDNN held to AVX2, as on a machine without the instructions; not patched"
    env = os.environ | dict(ONEDNN_MAX_CPU_ISA='AVX2')
    code = ('import torch; from ffp_nb.core.families import has_bfloat16; '
            'print(has_bfloat16("cpu"), torch.backends.cpu.get_cpu_capability())')
    out = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True,
                         check=True).stdout.split()
    assert out[0] == 'False'


@pytest.mark.parametrize('able, dtype', [(True, 'bfloat16'), (False, 'float32')])
def test_what_a_run_says(cpu, tiny_folder, ffp, able, dtype):
    "The resolved type is in the run's configuration, its record, its card and its weights"
    cpu(able)
    out = tiny_folder / 'out'
    worked(ffp('prune', '--model', tiny_folder / 'dense', '--text', tiny_folder / 'text.txt',
               '--profile', 'smoke', '--sparsity', 0.3, '--out', out))
    record = read_json(next(out.glob('prune-*.json')))
    assert record['config']['dtype'] == read_json(out / 'search' / 'config.json')['dtype'] == dtype
    weights = load_file(out / 'model' / 'model.safetensors')
    assert {str(t.dtype) for t in weights.values()} == {f'torch.{dtype}'}
    assert f'{dtype};' in (out / 'model' / 'README.md').read_text()
    # the same command goes on, also where it is asked for by its name
    worked(ffp('prune', '--model', tiny_folder / 'dense', '--text', tiny_folder / 'text.txt',
               '--profile', 'smoke', '--sparsity', 0.3, '--out', out, '--overwrite', '--dtype',
               dtype))
    assert str(open_model(str(out / 'model'))[0].dtype) == f'torch.{dtype}'


def test_a_configuration_names_no_auto(cpu):
    cpu(False)
    assert run_config(PruneConfig(), {})['dtype'] == 'float32'
    cpu(True)
    assert run_config(PruneConfig(), {})['dtype'] == 'bfloat16'
    assert run_config(PruneConfig(dtype='float32'), {})['dtype'] == 'float32'
