"""The speed benchmark runs and writes a valid record, its promises are what PyTorch counts, and
the study reads it; never timings"""
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import tiny_model
from ffp_nb.core.runs import load_records, read_json, save_record, write_json
from ffp_nb.studies.speed import findings, read_policy, read_speed, summary, weigh, with_speed

FOLDER = Path(__file__).resolve().parent.parent / 'benchmarks'
sys.path.insert(0, str(FOLDER))
import llamacpp  # noqa: E402
import speed as benchmark  # noqa: E402

HAS_LLAMA = importlib.util.find_spec('xllamacpp') is not None


@pytest.fixture(scope='module')
def quick(tmp_path_factory):
    "Output and folder of a quick run"
    out = tmp_path_factory.mktemp('speed')
    only = 'a,b,c,d,e' if HAS_LLAMA else 'a,c,d,e'
    done = subprocess.run([sys.executable, FOLDER / 'speed.py', '--quick', '--threads', '1',
                           '--only', only, '--out', out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, out


def record_of(out):
    records = load_records(out)
    assert len(records) == 1
    return records.iloc[0]


def test_quick_run_writes_a_record(quick):
    stdout, out = quick
    r = record_of(out)
    rows = pd.DataFrame(r['result.rows'])
    assert (r['environment.hardware.threads'] == 1
            and set(rows.part) == set('abcde' if HAS_LLAMA else 'acde'))
    assert np.isfinite(rows[['dense', 'pruned', 'ratio', 'low', 'high']].to_numpy(float)).all()
    # what is better with less is a ratio of dense to pruned; speed has one ratio a turn
    less = rows[rows.unit != 'tokens/s']
    np.testing.assert_allclose(less[['ratio', 'low', 'high']],
                               np.repeat((less.dense / less.pruned).to_numpy()[:, None], 3, 1))
    turns = rows[rows.part == 'a']
    assert (turns.low < turns.ratio).all() and (turns.ratio < turns.high).all()
    # speed is promised by the multiply-accumulates
    macs = lambda model, phase: sum(r[f'result.models.{model}.macs.{phase}.{k}']
                                    for k in ('attention', 'projections'))
    for row in turns.itertuples():
        promised = macs('dense', row.what) / macs(row.model, row.what)
        assert row.promised == pytest.approx(promised) and promised > 1
        assert row.reached == pytest.approx(row.ratio / promised)
    assert (set(rows.engine) == {'PyTorch bf16'}
            | ({'llama.cpp F16', 'llama.cpp Q8_0'} if HAS_LLAMA else set()))
    goals = rows[rows.goal.notna()]
    assert (set(goals.what) == {'prefill'}
            and (goals.met == (goals.ratio / goals.promised >= 0.95)).all())
    assert 'goals met' in stdout and 'record:' in stdout


def test_sizes_are_those_of_the_widths(quick):
    "Cache bytes of a token and file sizes follow from the widths"
    r = record_of(quick[1])
    rows = pd.DataFrame(r['result.rows'])
    models = {n: r[f'result.models.{n}.widths'] for n in ('dense', 'ffp 0.3')}
    rows = rows[rows.part == 'c'].set_index(['engine', 'what'])
    # llama.cpp prints two digits
    for engine, about in [('PyTorch bf16', 0)] + [('llama.cpp F16', 0.1)] * HAS_LLAMA:
        for column, widths in zip(('dense', 'pruned'), models.values()):
            # groups x head size x (keys, values) x bytes
            expected = sum(a for a, _ in widths) * 8 * 2 * 2
            assert abs(rows[column][engine, 'KV cache a token'] / expected - 1) <= about
    size = rows.loc['PyTorch bf16', 'file']
    for column, name in (('dense', 'dense'), ('pruned', 'ffp 0.3')):
        weights = 2 * r[f'result.models.{name}.params']
        assert 0 < size[column] * 10**6 - weights < 20_000  # names and shapes of the tensors


def test_promises_of_the_dense_model(quick):
    "3 layers of 8 heads of size 8: a prompt of 64 tokens, and 4 tokens decoded after 16"
    r = record_of(quick[1])
    attended = dict(prefill=sum(range(1, 65)), decode=sum(range(17, 21)))
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    for phase, projections in dict(prefill=64 * 3 * layer + 258 * 64,
                                   decode=4 * (3 * layer + 258 * 64)).items():
        assert r[f'result.models.dense.macs.{phase}.attention'] == attended[phase] * 3 * 8 * 8 * 2
        assert r[f'result.models.dense.macs.{phase}.projections'] == projections


@pytest.mark.skipif(not HAS_LLAMA, reason='the record has not all parts')
def test_study_reads_the_record(quick):
    table, record = read_speed(quick[1], model='tiny')
    assert 'of 1 cases with PyTorch' in '\n'.join(findings(table, record))
    s = summary(table)
    assert (s.columns.tolist() == [0.3] and s.shape[0] == 6 + 12
            and ('decode', 'llama.cpp Q8_0') in s.index)
    rounded = record['result']['rounded']
    rows = [dict(target=0.3, step=n, widths=rounded[f'ffp 0.3, step {n}']['widths'],
                 cost=0.1 * (n > 1), interval=0.2, holm=0.6) for n in (1, 8, 32)]
    both = with_speed(pd.DataFrame(rows), table, record)
    assert both.step.tolist() == [1, 8, 32] and len(weigh(pd.DataFrame(rows), both)) == 2
    rows[1]['widths'] = rows[0]['widths']
    with pytest.raises(ValueError, match='step 8'):
        with_speed(pd.DataFrame(rows), table, record)


def test_newest_whole_record_is_read(tmp_path):
    whole = dict(name='speed', model='smollm2', parts=list('abcde'))
    for day, other in ((2, dict(threads=1)), (1, dict(threads=2)), (3, dict(parts=['a'])),
                       (4, dict(model='tiny'))):
        config = whole | other
        path = save_record(tmp_path, config, dict(rows=[dict(part='a', ratio=day)]))
        write_json(path, read_json(path) | dict(created=f'2026-01-0{day}'))
        write_json(tmp_path / f'spine-ffp-0.3-0-{day}.json', read_json(path))
    table, record = read_speed(tmp_path)
    assert record['config']['threads'] == 1 and table.ratio.tolist() == [2]
    assert read_policy(0.3, records=tmp_path)['created'] == '2026-01-04'


def test_no_record_is_no_error(tmp_path):
    table, record = read_speed(tmp_path)
    assert record is None and table.empty
    with pytest.raises(FileNotFoundError, match='0.3'):
        read_policy(0.3, records=tmp_path)


@pytest.mark.parametrize('widths', [None, [[1, 40], [4, 17], [2, 96]]])
def test_promises_are_what_pytorch_counts(widths):
    model = tiny_model()
    model.set_attn_implementation('eager')
    elastic = ElasticModel(model)
    layout = elastic.layout
    widths = layout.full if widths is None else np.array(widths)
    elastic.set(widths)
    head, prompt, context, decoded = model.lm_head.weight.numel(), 24, 7, 5

    def counted(fn):  # a multiply-accumulate is two operations
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            fn()
        ops = {str(k): v / 2 for k, v in counter.get_flop_counts()['Global'].items()}
        attention = ops.get('aten.bmm', 0)
        return sum(ops.values()) - attention, attention

    ids = torch.arange(prompt)[None] + 3
    projections, attention = counted(lambda: model(ids, logits_to_keep=1))
    macs = benchmark.count_macs(layout, widths, prompt, prompt, 1, head)
    rotary = projections - macs['projections']
    assert 0 <= rotary <= 8 * prompt  # the angles of the rotary embedding are a product too
    # eager attention does not leave out the future
    assert macs['attention'] == attention * (prompt + 1) / (2 * prompt)

    cache = model(ids[:, :context]).past_key_values
    def decode():
        for i in range(decoded):
            model(ids[:, i:i + 1], past_key_values=cache)
    projections, attention = counted(decode)
    macs = benchmark.count_macs(layout, widths, decoded, 2 * context + decoded, decoded, head)
    assert 0 <= projections - macs['projections'] <= 8 * decoded and macs['attention'] == attention


def test_decoding_is_greedy_generation():
    "What is timed is what generate does"
    model, ids, seen = tiny_model(), list(range(3, 12)), []
    timed, forward = benchmark.PyTorch(model), model.forward
    def spy(input_ids, **kw):
        seen.append(input_ids.tolist())
        return forward(input_ids, **kw)
    model.forward = spy
    assert timed.write(timed.read(ids), 6) > 0
    del model.forward
    model.generation_config.eos_token_id = None
    made = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, 9, dtype=torch.long),
                          do_sample=False, max_new_tokens=6, pad_token_id=2)
    assert seen == [[ids], *([[t]] for t in made[0, 9:].tolist())]


def test_bad_arguments_are_refused(monkeypatch, capsys):
    for argv in (['--only', 'a,x'], ['--threads', '0']):
        with pytest.raises(SystemExit):
            benchmark.arguments(argv)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit):
        benchmark.arguments(['--only', 'b'])
    assert 'pip install xllamacpp' in capsys.readouterr().err
    assert benchmark.arguments(['--only', 'c'])[0].quants == ()


def test_cache_size_comes_from_the_log():
    line = ('llama_kv_cache: size =   22.50 MiB (  1024 cells,  30 layers,  1/1 seqs), K (f16):  '
            ' 11.25 MiB, V (f16):   11.25 MiB')
    assert llamacpp.cache_bytes(f'before\n0.1 I {line}\nafter') == 23040
    with pytest.raises(RuntimeError, match='KV cache'):
        llamacpp.cache_bytes('nothing of it')
