"""`ffp report`: what it says of real run folders, whatever state they are in, and what it never
touches"""
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import make_folder, worked
from test_bad_input import COMMON, changed, files, flip, refused
from test_tasks import line, write

from ffp_nb.core.runs import config_id, read_json, write_json
from ffp_nb.pipeline import bench as benches
from ffp_nb.pipeline.tasks import load_tasks
from ffp_nb.search.diagnose import tiny_run
from ffp_nb.search.report import findings, log_cost, read_run, reward_frame


@pytest.fixture(scope='module')
def world(tmp_path_factory, ffp):
    "A finished `ffp prune`, a finished `ffp search` with another seed, a uniform run; only read"
    folder = make_folder(tmp_path_factory.mktemp('report'))
    base = ('--model', folder / 'dense', '--text', folder / 'text.txt', '--sparsity', 0.4,
            '--method', 'ffp', '--criterion', 'wanda', *COMMON)
    worked(ffp('prune', *base, '--out', folder / 'pruned'))
    worked(ffp('search', *changed(base, seed=1), '--out', folder / 'searched'))
    worked(ffp('prune', *changed(base, method='uniform'), '--out', folder / 'uniform'))
    return folder


@pytest.fixture
def pruned(world, tmp_path):
    "A copy of the finished run, to be put in danger"
    return shutil.copytree(world / 'pruned', tmp_path / 'pruned')


def test_finished_run(world, pruned, ffp):
    before = files(pruned)
    out = worked(ffp('report', pruned)).stdout
    now = files(pruned)
    assert {k: v for k, v in now.items()
            if not k.startswith('report/')} == before, 'a report changes nothing of the run'
    assert {k for k in now if k.startswith('report/')} == {f'report/{n}' for n in (
        # two updates at one target do not tell what a step costs
        'report.md', 'measured.json', 'rewards.png', 'exploration.png')}
    assert all(now[k].startswith(b'\x89PNG') for k in now
               if k.startswith('report/') and k.endswith('.png'))
    text = now['report/report.md'].decode()
    record = read_json(next(pruned.glob('prune-*.json')))['result']
    for words in ('Finished: 2 of 2 updates', '0 of 8 policies spent too much',
                  'None of 8 gave NaN', f"gets {record['reward']:.3f}",
                  'Did the reward rise? Too early'):
        assert words in text, words
        assert words in ' '.join(out.split()), words


def test_figures_are_those_of_the_log(world):
    "Against the log read with nothing but json"
    run = read_run(world / 'pruned')
    rows = [json.loads(line)
            for line in (world / 'pruned' / 'search' / 'policies.jsonl').read_text().splitlines()]
    frame = reward_frame(run).set_index('update')
    for u in (0, 1):
        rewards = [r['reward'] for r in rows if r['update'] == u]
        assert np.allclose(frame.loc[u, ['mean', 'best', 'worst', 'spread']].astype(float),
                           [np.mean(rewards), max(rewards), min(rewards), np.std(rewards)])
    assert frame.forward_tokens.tolist() == [rows[0]['forward_tokens'], rows[-1]['forward_tokens']]
    assert findings(run)[0]['forward_tokens'] == rows[-1]['forward_tokens']
    # the winner is the search's own, not the best of its log
    assert (run.result['widths']
            == read_json(next((world / 'pruned').glob('prune-*.json')))['result']['widths'])


def test_seeds_are_compared(world, ffp, tmp_path):
    out = tmp_path / 'both'
    worked(ffp('report', world / 'pruned', world / 'searched', '--out', out, '--measure',
               '--points', 1, '--blocks', 1))
    text = (out / 'report.md').read_text()
    assert ({'seeds.png', '1-rewards.png', '2-rewards.png'} <= set(files(out))
            and '## Agreement' in text and '| shuffled' in text)
    assert 'seed 0' in text and 'seed 1' in text and 'widths of the runs: result.' in text


def test_unfinished_run(world, pruned, ffp):
    "Killed in its second update: the log of the first is there, and its checkpoint"
    run, log = read_run(pruned), pruned / 'search' / 'policies.jsonl'
    shutil.move(pruned / 'search' / 'checkpoint.prev', pruned / 'search' / 'checkpoint.pt')
    # two rows behind it, and a torn one
    log.write_text('\n'.join(log.read_text().splitlines()[:6]) + '\n{"episode": 6, "upd')
    half = read_run(pruned)
    assert half.log == run.log[:4] and half.updates == run.updates[:1] and half.result is None
    assert 'Unfinished: 1 of 2' in worked(ffp('report', pruned)).stdout


def test_measured(world, pruned, ffp, monkeypatch):
    worked(ffp('report', pruned, '--measure', '--points', 2, '--blocks', 2))
    now = files(pruned / 'report')
    assert ({'trace.png', 'gain.png', 'slack.png', 'retention.png'} <= set(now)
            and '8 of 8 policies are exactly on it' in now['report.md'].decode())
    m = next(iter(json.loads(now['measured.json']).values()))
    assert (set(m['uniforms']) == {'uniform', 'uniform-ffn'}
            and [t['update'] for t in m['trace']] == [0, 1] and len(m['gain']) == 6)
    # the bench is that of the run: the winner gets there what it got in the search
    run = read_run(pruned)
    bench = benches.load_bench(run, progress=False)
    idx = sorted(int(i)
                 for i in np.random.default_rng([0, 2]).permutation(len(bench.text.search))[:2])
    assert np.isclose(bench.evaluator().reward(np.array(run.result['widths']), idx),
                      run.result['reward'])
    assert m['cost']['full'] == bench.cost.full.tolist() and log_cost(run.log) is None
    # kept for a report without the model
    monkeypatch.setattr(benches, 'load_model', lambda *a, **kw: pytest.fail('the model was loaded'))
    worked(ffp('report', pruned))
    assert ('uniform-ffn gets' in (pruned / 'report' / 'report.md').read_text()
            and files(pruned / 'report') == now)


@pytest.mark.parametrize('change, words', [
    (lambda o: o / 'nowhere', ('nowhere is no run', 'search/config.json', '--out')),
    (lambda o: o / 'dense', ('dense is no run', '--out')),
    (lambda o: o / 'text.txt', ('text.txt is no run',)),
    (lambda o: o / 'uniform', ("method 'uniform'", 'not searched for', 'nothing to report')),
])
def test_no_search_there(world, ffp, tmp_path, change, words):
    refused(ffp('report', change(world), '--out', tmp_path / 'out'), *words)
    assert not (tmp_path / 'out').exists()


def test_a_heuristic_left_no_search_either(world, ffp, tmp_path):
    shutil.copytree(world / 'uniform', tmp_path / 'flap')
    for f in (tmp_path / 'flap').rglob('config.json'):
        f.write_text(f.read_text().replace('"method": "uniform"', '"method": "flap"'))
    refused(ffp('report', tmp_path / 'flap'), "method 'flap'", 'not searched for')


def cut(path):
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 3])


@pytest.mark.parametrize('names, damage, words',
                         [(['config.json'], cut, ('config.json', 'restore')),
                          (['checkpoint.pt', 'checkpoint.prev'], flip,
                           ('no checkpoint can be read', 'checkpoint.prev')),
                          (['policies.jsonl'], cut, ('policies.jsonl', 'rows', 'restore')),
                          (['policies.jsonl'],
                           lambda o: o.write_bytes(o.read_bytes().replace(b'{"episode": 2',
                                                                          b'\x00"', 1)),
                           ('line 3', 'policies.jsonl')),
                          (['policies.jsonl'],
                           lambda o: o.write_bytes(o.read_bytes().replace(b'"reward"', b'"r"')),
                           ('line 1', 'reward')),
                          (['policies.jsonl'], lambda o: o.write_bytes(b'[1, 2]\n' * 8),
                           ('line 1', '[1, 2]')),])
def test_damaged_run(pruned, ffp, names, damage, words):
    worked(ffp('report', pruned))
    for name in names:
        damage(pruned / 'search' / name)
    before = files(pruned)
    refused(ffp('report', pruned), *words)
    assert files(pruned) == before, 'the report of before stays'


def test_newest_checkpoint_damaged(pruned, ffp):
    flip(pruned / 'search' / 'checkpoint.pt')
    before = files(pruned)
    assert 'Unfinished: 1 of 2' in worked(ffp('report', pruned)).stdout
    assert {k: v for k, v in files(pruned).items()
            if not k.startswith('report/')} == before, 'reading moves nothing away'


@pytest.mark.parametrize('what, words',
                         [('text', ('text', 'not what the run read')),
                          ('weights', ('weights', 'not those of the run'))])
def test_measured_on_something_else(world, ffp, tmp_path, what, words):
    folder = shutil.copytree(world, tmp_path / 'copy')
    config = folder / 'pruned' / 'search' / 'config.json'
    c = read_json(config)
    c |= (dict(text_sha256={**c['text_sha256'], 'search': 'another'}) if what == 'text'
          else dict(weights='another'))
    config.write_text(json.dumps(c))
    refused(ffp('report', folder / 'pruned', '--measure'), *words, '--measure')
    worked(ffp('report', folder / 'pruned'))


def test_out_cannot_be_made(world, ffp, tmp_path):
    (tmp_path / 'file').write_text('mine')
    refused(ffp('report', world / 'pruned', '--out', tmp_path / 'file'),
            'a part of this path is a file')
    refused(ffp('report', world / 'pruned', '--out', tmp_path / 'out', '--points', 0), 'points 0')
    assert (tmp_path / 'file').read_text() == 'mine' and not (tmp_path / 'out').exists()


# The options of `ffp eval` that choose documents and metrics

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    for task in ('piqa', 'boolq'):
        write(folder, task, [line(task, rng) for _ in range(20)])
    return folder


def test_eval_part_and_metric(world, ffp, data, tmp_path):
    def table(*options):
        worked(ffp('eval', '--model', world / 'dense', '--dtype', 'float32', '--data', data,
                   '--tasks', 'piqa,boolq', '--csv', tmp_path / 't.csv', *options))
        return pd.read_csv(tmp_path / 't.csv').set_index(['task', 'metric'])
    whole, halves = table(), {part: table('--part', part) for part in ('dev', 'test')}
    sizes = {part: len(load_tasks(['piqa'], part=part, data=data).tasks['piqa'].eval_docs)
             for part in halves}
    assert ({p: t.documents['piqa', 'acc_norm'] for p, t in halves.items()} == sizes
            and min(sizes.values()) > 0)
    # right answers of the parts add up to those of all
    for key in (('piqa', 'acc_norm'), ('boolq', 'acc')):
        assert np.isclose(sum(t.value[key] * t.documents[key] for t in halves.values()),
                          whole.value[key] * whole.documents[key])
    assert (whole.index[-1] == ('average', 'acc_norm of 2')
            and table('--metric', 'acc').index.tolist()[-1] == ('average', 'acc of 2'))
    assert ([m for t, m in table('--metric', 'all', '--part', 'dev').index if t == 'piqa']
            == ['acc_norm', 'acc'])


@pytest.mark.parametrize('options, words', [
    (('--tasks', 'piqa', '--part', 'train'), ("part 'train'", "'dev', 'test'")),
    (('--tasks', 'piqa', '--metric', 'f1'), ("metric 'f1'", 'acc_norm, acc, all')),
    (('--part', 'dev'), ('--part', '--tasks')),
    (('--metric', 'acc'), ('--metric', '--tasks')),
])
def test_eval_bad_part_and_metric(world, ffp, data, monkeypatch, options, words):
    from ffp_nb.export import hf
    monkeypatch.setattr(hf, 'open_model',
                        lambda *a, **kw: pytest.fail('the model was loaded first'))
    refused(ffp('eval', '--model', world / 'dense', '--data', data, *options), *words)


def test_a_result_is_that_of_this_very_search(tmp_path):
    "Widths that another search left in the folder are not its result, and the test text is no part"
    tiny_run(tmp_path)
    result = lambda: read_run(tmp_path).result
    assert result() is None
    path = tmp_path / 'widths.json'
    write_json(path, dict(widths=[[1, 2]], search='another'))
    assert result() is None
    write_json(path, dict(widths=[[1, 2]], search=config_id(read_run(tmp_path).config)))
    assert result()['widths'] == [[1, 2]]
    write_json(path, dict(widths=[[3, 4]]))  # of an earlier version
    assert result()['widths'] == [[3, 4]]
    config = read_run(tmp_path).config
    run = tmp_path / 'search' / 'config.json'
    held = read_json(run)
    part = dict(calibration='1', search='2')
    write_json(run, held | dict(text_sha256=part))
    record = dict(config | dict(text_sha256=part | dict(test='3')))
    write_json(tmp_path / 'prune-x.json', dict(config=record, created='1', result=dict(ppl=5)))
    assert result() == dict(ppl=5)
