"""The benchmarks run and write a valid record, and what they compare with computes the same; never
timings"""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import KINDS, Layout, tiny_model
from ffp_nb.core.runs import load_records
from ffp_nb.core.text import Blocks

FOLDER = Path(__file__).resolve().parent.parent / 'benchmarks'
sys.path.insert(0, str(FOLDER))
import published  # noqa: E402


def bench(*args):
    return subprocess.run([sys.executable, FOLDER / 'run.py', *args], capture_output=True,
                          text=True)


def test_quick_run_writes_a_record(tmp_path):
    done = bench('--quick', '--threads', '1', '--out', tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    records = load_records(tmp_path)
    assert len(records) == 1 and records['environment.hardware.threads'][0] == 1
    rows = records['result.rows'][0]
    assert {r['part'] for r in rows} == set('abcd')
    assert all(np.isfinite([r['value'], r['low'], r['high']]).all() for r in rows)
    goals = [r for r in rows if r['goal']]
    assert {r['part'] for r in goals} == set('abcd')
    for r in goals:  # such as '<= 1 %'
        sign, bound, unit = r['goal'].split(maxsplit=2)
        at_most, at_least = r['value'] <= float(bound), r['value'] >= float(bound)
        assert r['met'] is {'<=': at_most, '>=': at_least}[sign] and r['unit'] == unit
    assert 'goals met' in done.stdout and 'record:' in done.stdout


def test_unknown_part_is_refused(tmp_path):
    done = bench('--only', 'a,x', '--out', tmp_path)
    assert done.returncode == 2 and 'a,b,c,d' in done.stderr


@pytest.mark.parametrize('family', ['llama', 'qwen2', 'qwen3', 'opt'])
def test_published_episode_equals_views(family, tmp_path):
    model = tiny_model(family, layers=2)
    blocks = Blocks(torch.randint(3, 211, (2, 24), generator=torch.Generator().manual_seed(0)), 23)
    layout, g = Layout(model), torch.Generator().manual_seed(1)
    order = {key: torch.randperm(m.units, generator=g) for key, m in layout.modules.items()}
    widths = np.array([[2, 40], [3, 96]]) if family != 'opt' else np.array([[5, 40], [8, 17]])
    kept = {(i, k): order[i, k][:widths[i, j]].sort().values for i in range(2)
            for j, k in enumerate(KINDS)}
    dense = published.whole_logits_nll(model, blocks)
    torch.save(model.state_dict(), tmp_path / 'dense.pt')
    copied = published.episode(model, layout, tmp_path / 'dense.pt', kept, blocks)
    again = published.episode(model, layout, tmp_path / 'dense.pt', kept, blocks, hooks=False)
    published.reset_from_disk(model, layout, tmp_path / 'dense.pt')
    assert published.whole_logits_nll(model, blocks) == dense
    saved = published.clone_weights(layout)
    published.slice_by_copy(layout, kept)
    assert abs(published.whole_logits_nll(model, blocks) - copied) < 1e-5
    published.put_back(layout, saved)
    assert published.whole_logits_nll(model, blocks) == dense
    views = ElasticModel(model, order).set(widths)
    assert (abs(published.whole_logits_nll(views.model, blocks) - copied) < 1e-4
            and copied == again != dense)


def test_nan_hooks_see_a_nan():
    model = tiny_model(layers=1)
    model.model.layers[0].mlp.down_proj.weight[3, 3] = float('nan')
    published.nan_hooks(model)
    with pytest.raises(FloatingPointError, match='Linear'):
        model(torch.arange(5)[None])


def test_column_solves_equal_module_solve():
    g = torch.Generator().manual_seed(0)
    X, W, c = torch.randn(200, 12, generator=g), torch.randn(5, 12, generator=g), 8
    all_at_once, coef = published.fit_module(W, X.T @ X, c, 0.1)
    one_by_one = W[:, :c].clone()
    for j in range(c, 12):
        column = published.fit_column(X[:, :c], X[:, j], one_by_one, W[:, j], 0.1)
        torch.testing.assert_close(column, coef[:, j - c], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one_by_one, all_at_once, rtol=1e-3, atol=1e-4)


def test_scaling_measures_and_projects(tmp_path):
    import scaling
    done = subprocess.run([sys.executable, FOLDER / 'scaling.py', '--quick', '--threads', '1',
                           '--out', tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {r['model']: r for r in load_records(tmp_path)['result.rows'][0]}
    assert [r['how'] for r in rows.values()] == ['measured', 'measured', 'projected']
    # memory has no noise: a projection of the larger shape counts what is really there
    big, size = scaling.SMALL['c'], scaling.Size(block_len=32, turns=2)
    real = scaling.totals(scaling.fit(big, size), big, size.blocks * size.block_len)
    for part in ('gram_GB', 'factors_GB'):
        assert rows['c'][part] == pytest.approx(real[part], rel=0.05), part
    weights = (sum(p.numel()
                   for p in tiny_model('llama', big.layers, big.hidden, big.heads, big.kv_heads,
                                       big.ffn, big.vocab).parameters()) * 2 / 1e9)
    assert real['weights_GB'] == pytest.approx(weights, rel=1e-6)


def test_scaling_counts_the_work():
    from ffp_nb.studies.scaling import Shape, work
    s = Shape(1, 8, 4, 2, 24)
    params = sum(m.out.in_features * m.out.out_features
                 + sum(l.in_features * l.out_features for l, _ in m.rows)
                 for m in Layout(tiny_model('llama', 1, 8, 4, 2, 24)).modules.values())
    assert s.layer_params == params and work('forward', s, 10) == params * 10 / 2
    assert work('factors', s, 10) == 8**3 + 24**3 + 8 * (8**2 + 24**2)


def test_head_measures_three_ways(tmp_path):
    done = subprocess.run([sys.executable, FOLDER / 'head.py', '--quick', '--threads', '1',
                           '--out', tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = load_records(tmp_path)['result.rows'][0]
    assert [(r['batch'], r['what']) for r in rows] == [
        (b, w) for b in (1, 4) for w in ('sliced', 'one matrix', 'all')]
    for r in rows:  # of the same logits
        assert len(r['seconds']) == 2 and min(r['seconds']) > 0 and r['furthest_logit'] < 0.1
    assert 'mean nothing' in done.stdout and 'record:' in done.stdout


def test_slopes_measures_its_jobs(tmp_path):
    done = subprocess.run([sys.executable, FOLDER / 'slopes.py', '--quick', '--threads', '1',
                           '--out', tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {r['what']: r for r in load_records(tmp_path)['result.rows'][0]}
    assert list(rows) == ['dense', 'pruned', 'slopes', 'kl', 'all units']
    for r in rows.values():
        assert len(r['seconds']) == 2 and min(r['seconds']) > 0 and (r['peak_bytes'] or 0) >= 0
    assert rows['pruned']['times_pruned'] == rows['dense']['times_dense'] == 1
    assert 'mean nothing' in done.stdout and 'record:' in done.stdout


@pytest.mark.skipif('FFP_VLLM_PYTHON' not in os.environ,
                    reason='FFP_VLLM_PYTHON names no interpreter with vLLM')
def test_serving_measures_three_folders(tmp_path):
    done = subprocess.run([sys.executable, FOLDER / 'serving.py', '--quick', '--threads', '1',
                           '--out', tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {(r['part'], r['model']): r for r in load_records(tmp_path)['result.rows'][0]}
    assert set(rows) == {(part, name) for part in ('prefill', 'decode')
                         for name in ('dense', 'full', 'pruned')}
    assert all(len(r['seconds']) == 2 and np.isfinite(r['tokens_s']) for r in rows.values())
    assert rows['prefill', 'dense']['times_dense'] == rows['decode', 'dense']['times_dense'] == 1
    assert 'mean nothing' in done.stdout and 'record:' in done.stdout


def test_distill_measures_its_jobs(tmp_path):
    done = subprocess.run([sys.executable, FOLDER / 'distill.py', '--quick', '--threads', '1',
                           '--out', tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {r['what']: r for r in load_records(tmp_path)['result.rows'][0]}
    assert list(rows)[:3] == ['text', 'distill', 'chunks'] and rows['text']['times_text'] == 1
    assert all(r['tokens_s'] > 0 for r in rows.values())


def test_elastic_compares_one_folder_with_many(tmp_path):
    done = subprocess.run([sys.executable, FOLDER / 'elastic.py', '--quick', '--threads', '1',
                           '--out', tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {r['what']: r for r in load_records(tmp_path)['result.rows'][0]}
    assert all(np.isfinite(r['value']) for r in rows.values())
    disk = lambda what: rows[f'{what} on disk']['value']
    assert disk('elastic folder') > disk('dense model') + disk('repairs') * 0.9
    assert disk('repairs') <= 2.1 * disk('dense model')
    for what in ('switch', 'first token after a switch'):
        assert rows[f'{what}, warm']['of'] == 2 * rows[f'{what}, cold']['of'] == 4
    assert 'mean nothing' in done.stdout and 'record:' in done.stdout
