"""A search killed with -9 at any moment ends, resumed, bit for bit as an uninterrupted one; one
that is stopped keeps others out"""
import json
import random
import signal
import subprocess
import sys
import time

import pytest

CHILD = '''
import sys
from dataclasses import asdict
import torch
torch.set_num_threads(1)
from ffp_nb.core.budget import param_cost
from ffp_nb.core.ridge import Calibrator
from ffp_nb.core.stats import collect_stats
from ffp_nb.core.text import Blocks
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import tiny_model
from ffp_nb.core.runs import RunDir, write_json
from ffp_nb.search.loop import Evaluator, Search, SearchConfig
em = ElasticModel(tiny_model('llama', seed=1))
pool = Blocks(torch.randint(0, 211, (12, 32), generator=torch.Generator().manual_seed(0)), 31)
config = SearchConfig(0.4, episodes=240, batch=8, step=(1, 4), final_blocks=6)
weights = Calibrator(em, collect_stats(em.model, em.layout, pool, progress=False), 0.1)
run = RunDir(sys.argv[1], asdict(config))
search = Search(Evaluator(em, pool, weights), param_cost(em.layout), config, run)
print('update', search.update, flush=True)
r = search.run(progress=False)
found = dict(widths=r.widths, scores=r.scores, reward=r.reward, source=r.source)
write_json(sys.argv[1] + '/result.json',
           found | dict(tokens=r.forward_tokens, broken=r.broken, std=r.updates[-1]['std']))
'''


def start(folder):
    return subprocess.Popen([sys.executable, '-c', CHILD, str(folder)], stdout=subprocess.PIPE,
                            text=True)


def finished(folder):
    rows = [json.loads(line) for line in (folder / 'policies.jsonl').read_text().splitlines()]
    return json.loads((folder / 'result.json').read_text()), rows


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole') / 'run'
    began = time.time()
    child = start(folder)
    assert child.stdout.readline() == 'update 0\n'
    setup = time.time() - began
    assert child.wait() == 0
    return finished(folder), time.time() - began - setup


def test_killed_anywhere(reference, tmp_path):
    (want, want_rows), seconds = reference
    rng, resumed_at = random.Random(0), []
    for _ in range(6):
        child = start(tmp_path / 'run')
        resumed_at.append(int(child.stdout.readline().split()[1]))
        time.sleep(rng.uniform(0.02, 0.35) * seconds)
        child.send_signal(signal.SIGKILL)
        child.wait()
    child = start(tmp_path / 'run')
    resumed_at.append(int(child.stdout.readline().split()[1]))
    assert child.wait() == 0
    got, rows = finished(tmp_path / 'run')
    assert max(resumed_at) > 0, 'no kill left a checkpoint: the test did not test a resume'
    assert resumed_at == sorted(resumed_at)
    assert got == want and rows == want_rows


def test_killed_between_log_and_checkpoint(reference, tmp_path):
    "Rows behind the last checkpoint are done again, not doubled"
    (want, want_rows), _ = reference
    code = CHILD.replace('r = search.run', '''
import os
save, n = run.save_checkpoint, 0
def save_or_die(state):
    global n
    n += 1
    if n == 4: os.kill(os.getpid(), 9)
    save(state)
run.save_checkpoint = save_or_die
r = search.run''')
    subprocess.run([sys.executable, '-c', code, str(tmp_path / 'run')], stdout=subprocess.DEVNULL)
    assert len((tmp_path / 'run' / 'policies.jsonl').read_text().splitlines()) == 32
    child = start(tmp_path / 'run')
    assert child.stdout.readline() == 'update 3\n' and child.wait() == 0
    assert finished(tmp_path / 'run') == (want, want_rows)


@pytest.mark.skipif(not hasattr(signal, 'SIGSTOP'), reason='signals')
def test_stopped_keeps_others_out(reference, tmp_path):
    "A second process is refused while the first is stopped; continued, that ends as if alone"
    (want, want_rows), _ = reference
    folder = tmp_path / 'run'
    first = start(folder)
    assert first.stdout.readline() == 'update 0\n'
    while not (folder / 'checkpoint.pt').exists():
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    before = {o.name: o.read_bytes() for o in folder.iterdir()}
    second = subprocess.run([sys.executable, '-c', CHILD, str(folder)], capture_output=True,
                            text=True)
    last = second.stderr.strip().splitlines()[-1]
    assert second.returncode == 1 and 'FolderInUse' in last
    assert str(folder) in last and f'process {first.pid}' in last
    assert {o.name: o.read_bytes() for o in folder.iterdir()} == before
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    assert finished(folder) == (want, want_rows)
