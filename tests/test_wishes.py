"""From a wish to a model: every form of a budget, on budget, and checked in the saved files"""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_folder, worked

from ffp_nb.core import latency, wishes
from ffp_nb.core.budget import bounds, param_cost
from ffp_nb.core.families import Layout, load_model, tiny_model
from ffp_nb.core.runs import ConfigMismatch, config_id, read_json
from ffp_nb.core.wishes import Budget
from ffp_nb.export.hf import load_pruned
from ffp_nb.pipeline import bench as benches, cli, prune
from ffp_nb.pipeline.bench import Bench, find_widths
from ffp_nb.pipeline.config import METHODS, Profile, PruneConfig, run_config
from ffp_nb.search.loop import Search
from ffp_nb.studies.speed import kept_promises, promise_table, read_promises

FIT = dict(fixed=50., typical=0.0, worst=0.0, designs=[dict(name='dense', seconds=3e-3)],
           where=dict(device='x', threads=1, dtype='float32'))


def command(folder, *args, out='out', method='uniform', step=8):
    return ['prune', '--model', folder / 'dense', '--text', folder / 'text.txt', '--profile',
            'smoke', '--dtype', 'float32', '--method', method, '--criterion', 'wanda',
            '--ffn-step', step, '--calibration', 'static', '--out', folder / out, *args]


def record(out):
    return read_json(next(out.glob('prune-*.json')))


def flat(result):
    return ' '.join(result.output.split())


@pytest.fixture
def clock(monkeypatch):
    "A device whose prefill takes 50 us, 300 us a group and 4 us a channel, in every model"
    calls = []
    times = dict(fixed=50e-6, group=300e-6, channel=4e-6)
    def seconds(groups, channels):
        calls.append(1)
        return times['fixed'] + times['group'] * groups + times['channel'] * channels
    class Prefill:
        def __init__(self, model, context=512, batch=1, seed=0):
            self.model = model
        def __call__(self, warm=False):
            layers = self.model.model.layers
            return seconds(sum(o.self_attn.k_proj.out_features // 8 for o in layers),
                           sum(o.mlp.down_proj.in_features for o in layers))
    def prefill_of(elastic, context=512, batch=1):
        return lambda w: seconds(w[:, 0].sum(), w[:, 1].sum())
    for module, name, fake in ((wishes, 'prefill_of', prefill_of), (prune, 'Prefill', Prefill),
                               (benches, 'prefill_of', prefill_of)):
        monkeypatch.setattr(module, name, fake)
    return calls, times


# ------------------------------------------------------------------------- each form of a wish

def count(out):
    return sum(p.numel() for p in load_pruned(out / 'model')[0].parameters())


def test_parameters(ffp, tiny_folder):
    result = worked(ffp(*command(tiny_folder, '--params', '80K')))
    found = count(tiny_folder / 'out')
    assert 80_000 - 64 * 3 * 8 < found <= 80_000  # a step is 8 channels of three vectors
    assert f'asked for 80,000 parameters: the folder has {found:,}' in result.output
    wish = record(tiny_folder / 'out')['result']['wish']
    assert (wish['asked'], wish['found'], wish['promised']) == (80_000, found, found)
    # sparsity is what it always was
    table = pd.read_csv(tiny_folder / 'out' / 'table.csv')
    cost = param_cost(Layout(load_model(str(tiny_folder / 'dense'), 'float32')[0]))
    widths = np.array(record(tiny_folder / 'out')['result']['widths'])
    assert np.isclose(table.sparsity.iloc[-1], cost.sparsity(widths))
    assert 'params saved' not in table
    assert f'{found:,}' in (tiny_folder / 'out' / 'model' / 'README.md').read_text()


def test_memory(ffp, tiny_folder):
    args = '--memory', '500KB', '--context', 100, '--batch', 3
    result = worked(ffp(*command(tiny_folder, *args)))
    model, _ = load_pruned(tiny_folder / 'out' / 'model')
    cache = model(torch.arange(20)[None], use_cache=True).past_key_values
    numbers = sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values)) // 20
    held = 4 * (sum(p.numel() for p in model.parameters()) + 300 * numbers)
    assert f'500,000 bytes (500 KB at 3 x 100 tokens): the folder has {held:,}' in result.output
    assert 495_000 < held <= 500_000
    table = pd.read_csv(tiny_folder / 'out' / 'table.csv')
    assert 0 < table['memory saved'].iloc[-1] < 1
    card = (tiny_folder / 'out' / 'model' / 'README.md').read_text()
    assert 'Budget: 500 KB at 3 x 100 tokens.' in card
    assert f'# dense, {table.sparsity.iloc[-1]:.1%} of its decoder blocks pruned' in card


def test_macs(ffp, tiny_folder):
    result = worked(ffp(*command(tiny_folder, '--macs', '70K', '--context', 64)))
    model, _ = load_pruned(tiny_folder / 'out' / 'model')
    rows = model.config.pruned_widths
    # projections, the products of scores and values at (64 + 1) / 2 tokens, and the head
    macs = sum(64 * 8 * (2 * r['heads'] + 2 * r['kv_heads']) + 65 * 8 * r['heads']
               + 3 * 64 * r['ffn'] for r in rows) + 64 * 211
    assert f'the folder has {macs:,}' in result.output and 70_000 - 1536 < macs <= 70_000


def test_speed_up(ffp, tiny_folder, clock):
    result = worked(ffp(*command(tiny_folder, '--speedup', 1.5)))
    rows = np.array(record(tiny_folder / 'out')['result']['widths'])
    times = lambda w: 50 + 300 * w[:, 0].sum() + 4 * w[:, 1].sum()
    own, dense = times(rows), times(np.tile([4, 96], (3, 1)))
    assert 0 <= dense / 1.5 - own < 8 * 4
    r = record(tiny_folder / 'out')
    assert np.isclose(r['result']['wish']['found'], dense / own)
    assert f'measured {dense / own:.3f}' in result.output and 'warning' not in result.output
    assert 'the fit misses' in result.output and len(r['result']['settled']) == 1
    fit = r['config']['budget']['fitted']
    assert np.allclose(fit['unit'], np.tile([300, 4], (3, 1))) and fit['worst'] < 1e-9
    assert fit['where'] == latency.here('cpu') | dict(dtype='float32')


@pytest.mark.parametrize('kind', ['macs', 'memory', 'latency'])
def test_shares_of_another_cost(ffp, tiny_folder, clock, kind):
    worked(ffp(*command(tiny_folder, '--budget', kind, '--sparsity', 0.3, '--context', 200)))
    table = pd.read_csv(tiny_folder / 'out' / 'table.csv')
    assert 0.3 - 1e-9 <= table[f'{kind} saved'].iloc[-1] < 0.33
    c = record(tiny_folder / 'out')['config']
    assert (c['budget']['kind'], c['budget']['context'], c['sparsity']) == (kind, 200, 0.3)
    assert 'wish' not in record(tiny_folder / 'out')['result']


# ------------------------------------------------------------------------- a miss is said

def test_a_slow_model_is_a_warning(ffp, tiny_folder, clock, monkeypatch):
    monkeypatch.setattr(prune, 'speed_up', lambda *a: 1.2)
    with pytest.warns(UserWarning, match='the wish is missed by 20.0%'):
        result = worked(ffp(*command(tiny_folder, '--speedup', 1.5)))
    assert 'measured 1.200 (20.00% below)' in result.output
    card = (tiny_folder / 'out' / 'model' / 'README.md').read_text()
    assert 'measured 1.200 (20.00% below)' in card


def test_removed_modules_are_counted_as_stored(ffp, tiny_folder):
    args = '--params', '40K', '--remove', 'attn', '--remove', 'ffn'
    with pytest.warns(UserWarning, match='a removed module is stored as one unit of zeros'):
        worked(ffp(*command(tiny_folder, *args, method='random')))
    r = record(tiny_folder / 'out')
    gone = (np.array(r['result']['widths']) == 0).sum(0)
    units = param_cost(Layout(tiny_model())).unit[0]
    assert gone.any() and r['result']['wish']['found'] == count(tiny_folder / 'out')
    assert r['result']['wish']['found'] - r['result']['wish']['promised'] == gone @ units


# ------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize('args, words', [
    (('--params', '80K', '--sparsity', 0.2), '--params 80K and --sparsity 0.2: each says'),
    (('--params', '80K', '--memory', '4GiB'), '--params 80K and --memory 4GiB: each says'),
    (('--budget', 'macs', '--params', '1M'), '--budget macs with --params 1M'),
    (('--budget', 'params', '--speedup', 2), '--budget params with --speedup 2'),
    (('--context', 99), 'context 99 has no effect'), (('--batch', 2), 'batch 2 has no effect'),
    (('--params', '1M', '--context', 99), 'context 99 has no effect'),
    (('--macs', '1M', '--batch', 2), 'batch 2 has no effect'),
    (('--params', '-5'), "'-5' is no amount"), (('--params', 0), "'0' is no amount"),
    (('--params', '5cats'), "'5cats' is no amount"), (('--macs', '1G'), "'1G' is no amount"),
    (('--memory', '4'), 'with a unit'), (('--memory', '0GiB'), 'above 0'),
    (('--memory', '4GiB', '--context', -1), 'context -1'),
    (('--speedup', 1), 'speed-up 1; expected'), (('--speedup', 0.5), 'speed-up 0.5; expected'),
    (('--speedup', 'fast'), 'speed-up fast; expected'), (('--speedup', 'nan'), 'speed-up nan'),
    (('--speedup', 2, '--context', 0), 'context 0'), (('--speedup', 2, '--batch', 0), 'batch 0'),
    (('--budget', 'latency', '--sparsity', 1), 'sparsity 1'),
    (('--budget', 'macs', '--sparsity', 0), 'sparsity 0')])
@pytest.mark.parametrize('name', ['prune', 'search'])
def test_contradictions_before_a_model_is_loaded(ffp, tmp_path, args, words, name):
    result = ffp(name, '--model', './nowhere', '--text', './none.txt', '--out', tmp_path / 'o',
                 *args)
    assert result.exit_code == 1 and words in flat(result), result.output
    assert result.output.count('\n') == 1 and not (tmp_path / 'o').exists()


@pytest.mark.parametrize('args, asked, words', [
    (('--params', '20K'), '20K parameters', '.*K to 1.*K;'),
    (('--params', '1B'), '1B parameters', '.*K to 1.*K;'),
    (('--memory', '20KB', '--context', 9), '20 KB at 1 x 9 tokens', '.* KB to .* KB;'),
    (('--memory', '4GiB', '--context', 9), '4 GiB at 1 x 9 tokens', '.* KiB to .* KiB;'),
    (('--speedup', 40), '40 times the speed at 1 x 512 tokens', '1 to .*;'),
    (('--macs', 99), r'0.099K MACs a token at 512 tokens', '.*K to .*K;')])
def test_infeasible_wishes_in_their_own_unit(ffp, tiny_folder, clock, args, asked, words):
    if '--macs' in args:
        args = *args, '--context', 512
    result = ffp(*command(tiny_folder, *args))
    assert result.exit_code == 1 and result.output.count('error') == 1
    match = rf'{asked} is infeasible: these bounds on the widths allow {words}'
    assert pd.Series([flat(result)]).str.contains(match).all(), result.output
    assert not (tiny_folder / 'out' / 'search' / 'config.json').exists()


def test_a_method_that_cannot_meet_it_says_so_in_the_unit(ffp, tiny_folder):
    result = ffp(*command(tiny_folder, '--params', '52K', method='uniform-ffn'))
    assert result.exit_code == 1 and '52K parameters is infeasible' in flat(result)


def test_longer_than_the_model_reads(ffp, tiny_folder):
    result = ffp(*command(tiny_folder, '--memory', '1MB', '--context', 4096))
    assert result.exit_code == 1 and 'the model reads at most 512 tokens' in flat(result)


# ------------------------------------------------------------------------- records and resuming

def test_defaults_keep_their_ids():
    text = dict(test='x')
    assert (config_id(run_config(PruneConfig(), text))
            == config_id(run_config(PruneConfig(budget=Budget('params')), text)))
    assert 'budget' not in run_config(PruneConfig(), text)
    assert 'budget' in run_config(PruneConfig(budget=Budget('macs')), text)


def test_a_resumed_search_keeps_its_latency(ffp, tiny_folder, clock, monkeypatch):
    args = command(tiny_folder, '--speedup', 1.4, method='gradient')
    whole = record(worked_out(ffp, args, tiny_folder / 'out'))
    def stop_after(n):
        def step(self, own=Search.step):
            if self.update == n: raise KeyboardInterrupt
            own(self)
        return step
    args = command(tiny_folder, '--speedup', 1.4, method='gradient', out='again')
    with monkeypatch.context() as m:
        m.setattr(Search, 'step', stop_after(1))
        assert ffp(*args).exit_code == 130
    clock[1]['channel'] *= 1.3  # the machine is slower now
    again = record(worked_out(ffp, args, tiny_folder / 'again'))
    assert again['config'] == whole['config']
    assert again['result']['updates'][-1]['gain'] == whole['result']['updates'][-1]['gain']
    assert again['result']['updates'][-1]['guess'] == whole['result']['updates'][-1]['guess']


def test_a_finished_search_keeps_what_the_clock_settled(ffp, tiny_folder, clock):
    args = command(tiny_folder, '--speedup', 1.4, method='gradient')
    args = [o for o in args if o not in ('--calibration', 'static')]  # a search has none
    worked(ffp('search', *args[1:]))
    found = json.loads((tiny_folder / 'out' / 'widths.json').read_text())['widths']
    clock[1]['channel'] *= 2  # the machine is slower now
    assert record(worked_out(ffp, args, tiny_folder / 'out'))['result']['widths'] == found
    again = worked_out(ffp, (*args, '--overwrite'), tiny_folder / 'out')
    assert record(again)['result']['widths'] == found
    worked(ffp(*args, '--overwrite', '--no-resume'))  # asks the clock
    assert (tiny_folder / 'out' / 'search' / 'old-1' / 'settled.json').exists()
    assert json.loads((tiny_folder / 'out' / 'search' / 'settled.json').read_text())[
        'widths'] != found


def worked_out(ffp, args, out):
    worked(ffp(*args))
    return out


@pytest.mark.parametrize('change, words', [
    (('--dtype', 'bfloat16'), 'dtype float32 there, bfloat16 here'),
    (('--context', 128), 'context 512 there, 128 here'), (('--batch', 2), 'batch 1 there, 2 here')])
def test_other_conditions_cannot_resume(ffp, tiny_folder, clock, change, words):
    args = command(tiny_folder, '--speedup', 1.4)
    worked(ffp(*args))
    again = ffp(*args, '--overwrite', *change)
    assert again.exit_code == 1 and words in flat(again) and '--no-resume' in flat(again)
    worked(ffp(*args, '--overwrite', *change, '--no-resume'))  # measured again
    assert record_of(tiny_folder / 'out', change)


def record_of(out, change):
    name, value = change[0].lstrip('-'), change[1]
    return any(value in (c.get(name), c['budget'].get(name)) for c in (
        read_json(p)['config'] for p in out.glob('prune-*.json')))


def test_threads_and_device_count(tmp_path, monkeypatch):
    c = PruneConfig(dtype='float32', budget=Budget('latency', 1.5))
    fitted = FIT | dict(unit=[[1., 1.]])
    config = dict(budget=replace(c.budget, fitted=fitted).plain)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ConfigMismatch, match='device x there'):
        benches.with_fit(c, tmp_path, 'cpu')
    assert benches.with_fit(c, tmp_path, 'cpu', resume=False) == c
    monkeypatch.setattr(benches, 'here', lambda device: dict(device='x', threads=1))
    assert benches.with_fit(c, tmp_path, 'cpu').budget.fitted == fitted
    monkeypatch.setattr(benches, 'here', lambda device: dict(device='x', threads=2))
    with pytest.raises(ConfigMismatch, match='threads 1 there, 2 here'):
        benches.with_fit(c, tmp_path, 'cpu')


def test_report_reads_other_budgets(ffp, tiny_folder, clock):
    worked(ffp(*command(tiny_folder, '--speedup', 1.3, method='gradient')))
    result = worked(ffp('report', tiny_folder / 'out', '--measure', '--points', 1, '--blocks', 1))
    assert '1.3 times the speed at 1 x 512 tokens' in (
        tiny_folder / 'out' / 'report' / 'report.md').read_text(), result.output


# ------------------------------------------------------------------------- every way to choose

@pytest.fixture(scope='module')
def budgeted(tmp_path_factory):
    "`budgeted(budget)`: a bench of the tiny model with it"
    folder = make_folder(tmp_path_factory.mktemp('wishes'))
    profile = Profile(32, 4, 2, 8, 4, 1, 2, 2)
    made = {}
    def get(name, budget):
        if name not in made:
            made[name] = Bench.load(PruneConfig(
                str(folder / 'dense'), str(folder / 'text.txt'), 0.2 if budget.amount else 0.3,
                criterion='wanda',
                dtype='float32', step=(1, 8), profile=profile, budget=budget), progress=False)
        return made[name]
    return get


BUDGETS = dict(
    memory=Budget('memory', context=512, batch=4), macs=Budget('macs', context=512),
    latency=Budget('latency', fitted=FIT | dict(unit=[[300., 4.]] * 3)),
    # attention costs nothing
    free=Budget('latency', fitted=FIT | dict(unit=[[0., 4.]] * 3)))


@pytest.mark.parametrize('method', [m for m in METHODS if m not in ('cma', 'tpe',
                                                               'uniform-ffn')])
@pytest.mark.parametrize('name', ['memory', 'latency'])
def test_every_method_is_on_budget(budgeted, name, method):
    bench = budgeted(name, BUDGETS[name])
    widths, _ = find_widths(bench, replace(bench.config, method=method), progress=False)
    lower, upper = bounds(bench.cost, (1, 8))
    assert (widths >= lower).all() and (widths <= upper).all()
    assert 0.3 - 1e-9 <= bench.cost.sparsity(widths) < 0.3 + 0.1


@pytest.mark.parametrize('method', ['gradient', 'pathwise', 'ffp', 'flap', 'sensitivity'])
def test_what_costs_nothing_stays(budgeted, method):
    bench = budgeted('free', BUDGETS['free'])
    widths, _ = find_widths(bench, replace(bench.config, method=method), progress=False)
    assert (widths[:, 0] == 4).all() and bench.cost.sparsity(widths) >= 0.3 - 1e-9


def test_tensor_parallel(ffp, tiny_folder):
    worked(ffp(*command(tiny_folder, '--params', '80K', '--tp', 2)))
    widths = np.array(record(tiny_folder / 'out')['result']['widths'])
    assert (widths % [2, 8] == 0).all() and count(tiny_folder / 'out') <= 80_000


def test_workers_see_the_same_budget(ffp, tiny_folder):
    pytest.importorskip('ray')
    args = command(tiny_folder, '--memory', '400KB', '--context', 100, method='random-search')
    worked(ffp(*args))
    worked(ffp(*command(tiny_folder, '--memory', '400KB', '--context', 100, '--workers', 1,
                        method='random-search', out='ray')))
    found = [record(tiny_folder / o)['result']['widths'] for o in ('out', 'ray')]
    assert found[0] == found[1]


# ------------------------------------------------------------------------- steps that devices like

@pytest.mark.parametrize('args, cuda, step', [
    ((), False, 32), ((), True, 32), (('--speedup', '2'), False, 32),
    (('--speedup', '2'), True, 128), (('--speedup', '2', '--device', 'cpu'), True, 32),
    (('--speedup', '2', '--ffn-step', '48'), True, 48),
    (('--budget', 'latency', '--tp', '3'), True, 384)])
def test_the_step_follows_the_device(ffp, monkeypatch, args, cuda, step):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    seen = []
    monkeypatch.setattr(prune, 'prune', lambda config, *a, **kw: seen.append(config) or 1 / 0)
    assert ffp('prune', *args).exit_code == 1 and seen[0].step[1] == step


def test_help_names_every_wish(ffp):
    text = ' '.join(worked(ffp('prune', '--help')).output.split())
    for option in 'budget', 'params', 'macs', 'memory', 'speedup', 'context', 'batch':
        assert f'--{option}' in text
    assert set(cli._WISHES) == set(wishes.BUDGETS)


# ------------------------------------------------------------------------- the benchmark

def test_the_benchmark_writes_a_record(tmp_path):
    script = Path(__file__).resolve().parent.parent / 'benchmarks' / 'latency.py'
    done = subprocess.run([sys.executable, script, '--quick', '--threads', '1', '--out', tmp_path],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows, r = read_promises(tmp_path, None)
    assert set(rows.budget) == {'fit', 'macs', 'settled'}
    assert {'PyTorch float32'} <= set(rows.engine) <= {'PyTorch float32', 'llama.cpp F16'}
    np.testing.assert_allclose(rows.measured, rows.ratios.map(np.median))
    np.testing.assert_allclose(rows.reached, rows.measured / rows.promised)
    np.testing.assert_allclose(rows.promised, 1 / (1 - rows.target))
    assert (rows.met == (rows.reached >= 0.95)).all()
    # as many MACs fewer as was asked for, counted here: four groups of 2 heads of 8, a head of 258
    widths = np.array(rows[rows.budget == 'macs'].widths.iloc[0])
    macs = lambda w: 64 * (w @ [64 * 8 * 6 + 65 * 16, 3 * 64]).sum() + 64 * 258
    saved = 1 - macs(widths) / macs(np.tile([4, 96], (3, 1)))
    assert 0 <= saved - rows.target.iloc[0] < 0.1
    # a tiny model's own target differs by engine
    assert promise_table(rows).notna().sum().sum() == len(rows)
    assert len(kept_promises(rows, r)) == 4


def test_another_configuration_on_a_bench_keeps_its_wish(budgeted):
    bench = budgeted('wish', Budget('params', '80K'))
    share = bench.config.sparsity
    plain = replace(bench.config, budget=Budget('params', '80K'), sparsity=0.2, method='uniform')
    widths, _ = find_widths(bench, plain, progress=False)  # not 20 %
    assert share != 0.2 and share <= bench.cost.sparsity(widths) < share + 0.03
    other = replace(bench.config, budget=Budget('macs', context=64), sparsity=0.2)
    with pytest.raises(ValueError, match='made for 80K parameters'):
        find_widths(bench, other)
