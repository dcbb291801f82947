"""Files survive what happens to them: kills, full disks, missing rights, damage, another
configuration"""
import errno
import gc
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch

from ffp_nb.core import runs
from ffp_nb.core.runs import (
    Checkpoints, ConfigMismatch, CorruptFile, FolderInUse, PolicyLog, RunDir, atomic_write, cached,
    config_id, environment, find_record, load_records, read_run_config, save_record,
    write_json)

CONFIG = dict(method='ffp', sparsity=0.2, agent=dict(lr=1e-4))
posix = pytest.mark.skipif(os.name != 'posix', reason='forks')


def in_child(fn, kill_after=None):
    """Run `fn` in a forked process, optionally killed with -9 after some seconds; the signal that
    ended it, or None"""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the child uses no threads
        pid = os.fork()
    if not pid:
        try:
            fn()
        except BaseException:
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, 'the child raised'
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None


def die_at(monkeypatch, name, nth):
    "Kill the process with -9 when `os.<name>` is called for the `nth` time"
    original, calls = getattr(os, name), []
    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    monkeypatch.setattr(os, name, dying)


def tear_writes(monkeypatch):
    "Die after half of the data has been written"
    def half(f, data):
        f.write(data[:len(data)//2])
        os.kill(os.getpid(), signal.SIGKILL)
    monkeypatch.setattr(runs, '_write_all', half)


@posix
@pytest.mark.parametrize('moment', ['write', 'fsync', 'replace', 'after'])
def test_kill_in_mid_write_leaves_the_old_or_the_new_file(tmp_path, monkeypatch, moment):
    path = tmp_path/'a.txt'
    atomic_write(path, 'old')
    def child():
        if moment == 'write':
            tear_writes(monkeypatch)
        elif moment == 'after':
            die_at(monkeypatch, 'fsync', 2)  # the folder's
        else:
            die_at(monkeypatch, moment, 1)
        atomic_write(path, 'new'*10_000)
    assert in_child(child) == signal.SIGKILL
    assert path.read_text() == ('new'*10_000 if moment == 'after' else 'old')
    assert atomic_write(path, 'next').read_text() == 'next'


@posix
def test_kill_at_any_time_leaves_whole_files(tmp_path):
    "A process that writes without a pause is killed again and again; every file is whole each time"
    def child():
        run, i = RunDir(folder, CONFIG), 0
        while True:
            i += 1
            run.log([dict(t=i, widths=list(range(2000)))]*3)
            run.save_checkpoint(dict(i=i, weights=torch.full((50_000,), float(i))))
    seen = 0
    for n, delay in enumerate(np.random.default_rng(0).uniform(0.02, 0.25, 12)):
        folder = tmp_path/str(n)
        assert in_child(child, kill_after=delay) == signal.SIGKILL
        run = RunDir(folder, CONFIG)
        rows = run.rows()
        assert all(o['widths'] == list(range(2000)) for o in rows)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # a kill between the two renames goes back by one
            state = run.load_checkpoint() or dict(i=0, weights=torch.zeros(50_000))
        assert torch.equal(state['weights'], torch.full((50_000,), float(state['i'])))
        # what a checkpoint needs is in the log
        assert 3*state['i'] <= len(rows) <= 3*state['i'] + 6
        run.truncate(3*state['i'])
        seen += state['i']
    assert seen, 'the children never came to write'


@posix
@pytest.mark.parametrize('moment, expected', [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_kill_while_saving_a_checkpoint_loses_one_update_at_most(tmp_path, monkeypatch, moment,
                                                                 expected):
    "Renames: temporary file, old to prev, new to its name"
    checkpoints = Checkpoints(tmp_path)
    for i in range(2):
        checkpoints.save(dict(i=i))
    def child():
        die_at(monkeypatch, 'replace', moment)
        checkpoints.save(dict(i=2))
    assert in_child(child) == (signal.SIGKILL if moment < 4 else None)
    between = moment == 3
    with pytest.warns(UserWarning, match='is missing') if between else warnings.catch_warnings():
        assert checkpoints.load()['i'] == expected
    checkpoints.save(dict(i=3))
    assert checkpoints.load()['i'] == 3


@posix
def test_kill_in_mid_append_tears_only_the_last_update(tmp_path, monkeypatch):
    run = RunDir(tmp_path, CONFIG)
    run.log([dict(t=0), dict(t=1)])
    def child():
        tear_writes(monkeypatch)
        run.log([dict(t=2, widths=list(range(100)))])
    assert in_child(child) == signal.SIGKILL
    assert not run.policies.path.read_bytes().endswith(b'\n')
    assert [o['t'] for o in run.rows()] == [0, 1]
    run.log(dict(t=3))
    assert [o['t'] for o in run.rows()] == [0, 1, 3]


@pytest.mark.parametrize('cut', range(1, 12))
def test_a_torn_last_line_is_left_out_wherever_it_is_torn(tmp_path, cut):
    log = PolicyLog(tmp_path/'log.jsonl')
    log.append([dict(t=0), dict(t=1, é=2)])
    data = log.path.read_bytes()
    log.path.write_bytes(data[:-cut])
    assert [o['t'] for o in log.rows()] == [0]
    log.append(dict(t=2))
    assert [o['t'] for o in log.rows()] == [0, 2]


def test_damage_in_the_middle_of_a_log_is_an_error(tmp_path):
    log = PolicyLog(tmp_path/'log.jsonl')
    log.append([dict(t=i) for i in range(3)])
    log.path.write_bytes(log.path.read_bytes().replace(b'{"t": 1}', b'\x00\xff\x00'))
    with pytest.raises(CorruptFile, match=r'line 2 of .*log.jsonl'):
        log.rows()


def full_disk(monkeypatch, after=10):
    "Writes take `after` bytes, then the disk is full"
    def write_all(f, data):
        if callable(data):  # what is large is written as it is made
            data(whole := io.BytesIO())
            data = whole.getvalue()
        f.write(data[:after])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(runs, '_write_all', write_all)


def test_disk_full(tmp_path, monkeypatch):
    run = RunDir(tmp_path, CONFIG)
    run.log(dict(t=0))
    run.save_checkpoint(dict(i=0))
    record = save_record(tmp_path/'records', CONFIG, dict(ppl=1.))
    before = {o: o.read_bytes() for o in tmp_path.rglob('*') if o.is_file()}
    with monkeypatch.context() as m:
        full_disk(m)
        for fn in (lambda: run.log(dict(t=1)), lambda: run.save_checkpoint(dict(i=1)),
                   lambda: save_record(tmp_path/'records', CONFIG, dict(ppl=2.)),
                   lambda: write_json(record, {})):
            with pytest.raises(OSError, match='cannot write .*free some space') as e:
                fn()
            assert e.value.errno == errno.ENOSPC and str(tmp_path) in str(e.value)
    # nothing lost, nothing left
    assert {o: o.read_bytes() for o in tmp_path.rglob('*') if o.is_file()} == before
    run.log(dict(t=1))
    assert len(run.rows()) == 2


@posix
def test_a_real_limit_on_file_size(tmp_path):
    "The system itself stops a write half-way; nothing is simulated"
    run = RunDir(tmp_path, CONFIG)
    run.log([dict(t=t) for t in range(10)])
    run.save_checkpoint(dict(i=0))
    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        for fn in (lambda: run.log(dict(widths=list(range(5000)))),
                   lambda: run.save_checkpoint(np.zeros(10_000))):
            try:
                fn()
            except OSError as e:
                assert e.errno == errno.EFBIG and 'cannot write' in str(e)
            else:
                raise AssertionError('the limit did not hold')
    assert in_child(child) is None
    assert len(run.rows()) == 10 and run.policies.path.read_bytes().endswith(b'}\n')
    assert run.load_checkpoint() == dict(i=0) and not list(tmp_path.glob('.*.tmp'))


def test_no_permission(tmp_path, monkeypatch):
    "Simulated, as the superuser may write anywhere"
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, 'Permission denied', str(args[0]))
    run = RunDir(tmp_path, CONFIG)
    monkeypatch.setattr(runs, 'open', denied, raising=False)
    for fn in (lambda: RunDir(tmp_path/'other', CONFIG), lambda: run.log(dict(t=0)),
               lambda: run.save_checkpoint({}), lambda: save_record(tmp_path, CONFIG, {})):
        with pytest.raises(PermissionError,
                           match='cannot write .*choose a folder that you may write to'):
            fn()


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0,
                    reason='the superuser may write anywhere')
def test_no_permission_for_real(tmp_path):
    (tmp_path/'locked').mkdir(mode=0o500)
    with pytest.raises(PermissionError, match='choose a folder that you may write to'):
        RunDir(tmp_path/'locked'/'run', CONFIG)


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path/'file').write_text('mine')
    for fn in (lambda: RunDir(tmp_path/'file', CONFIG),
               lambda: RunDir(tmp_path/'file'/'run', CONFIG),
               lambda: save_record(tmp_path/'file', CONFIG, {})):
        with pytest.raises(OSError, match='a part of this path is a file'):
            fn()
    assert (tmp_path/'file').read_text() == 'mine'


@pytest.mark.parametrize('damage',
                         [lambda b: b'', lambda b: b[:-1], lambda b: b + b'x', lambda b: b[:200],
                          lambda b: b[:300] + bytes([b[300] ^ 1]) + b[301:], lambda b: b'x' + b,
                          lambda b: np.random.default_rng(0).bytes(1000)])
def test_corrupt_checkpoint(tmp_path, damage):
    run = RunDir(tmp_path, CONFIG)
    run.save_checkpoint(dict(i=0))
    path = tmp_path/'checkpoint.pt'
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptFile, match='checkpoint.pt is damaged.*--no-resume'):
        run.load_checkpoint()
    fresh = RunDir(tmp_path, CONFIG, resume=False)
    for i in (1, 2):
        fresh.save_checkpoint(dict(i=i))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match='is damaged.*checkpoint.prev'):
        assert fresh.load_checkpoint()['i'] == 1
    fresh.save_checkpoint(dict(i=3))  # the damaged file must not push out the good one
    path.write_bytes(b'')
    with pytest.warns(UserWarning):
        assert fresh.load_checkpoint()['i'] == 1


def test_checkpoints_execute_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path/'owned'),)
    with pytest.raises(TypeError, match='store the state of an object'):
        Checkpoints(tmp_path).save(dict(a=Evil()))
    assert not (tmp_path/'owned').exists() and not list(tmp_path.iterdir())


def test_checkpoints_hold_what_searches_need(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    adam = torch.optim.Adam(net.parameters())
    net(torch.ones(4)).sum().backward()
    adam.step()
    rng, gen = np.random.default_rng(1), torch.Generator().manual_seed(2)
    state = dict(net=net.state_dict(), adam=adam.state_dict(), rng=rng.bit_generator.state,
                 torch=gen.get_state(), legacy=np.random.RandomState(0).get_state(),
                 half=torch.ones(2, dtype=torch.bfloat16),
                 best=dict(widths=np.ones((3, 2), int), reward=np.float64(.1)), big=2**100,
                 inf=float('inf'), history=[(0, 1.5, None, True, 'a')])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state)
    back = checkpoints.load()
    adam.load_state_dict(back['adam'])
    again = np.random.default_rng()
    again.bit_generator.state = back['rng']
    assert again.normal() == rng.normal()
    gen2 = torch.Generator()
    gen2.set_state(back['torch'])
    assert torch.equal(torch.rand(3, generator=gen), torch.rand(3, generator=gen2))
    assert (back['history'] == state['history'] and back['big'] == 2**100
            and back['half'].dtype == torch.bfloat16)
    assert back['best']['widths'].dtype == int and isinstance(back['best']['reward'], float)


def test_config_mismatch_names_what_differs(tmp_path):
    RunDir(tmp_path, CONFIG).log(dict(t=0))
    other = dict(method='ffp', sparsity=0.3, agent=dict(lr=1e-4, clip=0.2))
    with pytest.raises(ConfigMismatch) as e:
        RunDir(tmp_path, other)
    assert ('sparsity: 0.2 there, 0.3 here' in str(e.value)
            and 'agent.clip: (not set) there, 0.2 here' in str(e.value))
    assert 'lr' not in str(e.value) and '--out' in str(e.value) and '--no-resume' in str(e.value)
    assert len(RunDir(tmp_path, CONFIG).rows()) == 1
    assert RunDir(tmp_path, other, resume=False).rows() == []
    assert len(PolicyLog(tmp_path/'old-1'/'policies.jsonl').rows()) == 1
    RunDir(tmp_path, CONFIG, resume=False)
    assert read_run_config(tmp_path/'old-2')[0] == other


def test_unreadable_config(tmp_path):
    RunDir(tmp_path, CONFIG)
    (tmp_path/'config.json').write_bytes(b'{"method": "ff\xff')
    with pytest.raises(CorruptFile, match='config.json is not valid JSON'):
        RunDir(tmp_path, CONFIG)


@posix
@pytest.mark.parametrize('moment', range(1, 4))
def test_kill_while_starting_over(tmp_path, monkeypatch, moment):
    run = RunDir(tmp_path, CONFIG)
    run.log(dict(t=0))
    run.save_checkpoint(dict(i=0))
    run.close()  # another process goes on with it
    def child():
        die_at(monkeypatch, 'replace', moment)
        RunDir(tmp_path, CONFIG, resume=False)
    assert in_child(child) == signal.SIGKILL
    assert read_run_config(tmp_path)[0] == CONFIG  # still says whose it is
    assert RunDir(tmp_path, CONFIG, resume=False).rows() == []
    assert sum((o/'policies.jsonl').exists() for o in tmp_path.glob('old-*')) == 1


def test_truncate_then_resume_repeats_the_log(tmp_path):
    rows = [dict(t=t, reward=float(r), nan=float('nan') if t == 2 else 0) for t, r in
            enumerate(np.random.default_rng(0).normal(size=6))]
    run = RunDir(tmp_path/'a', CONFIG)
    run.log(rows)
    whole = run.policies.path.read_bytes()
    run.truncate(3)
    run.log(rows[3:])
    assert run.policies.path.read_bytes() == whole
    with pytest.raises(CorruptFile, match='6 rows, but 7 are needed'):
        run.truncate(7)
    assert run.rows()[0]['reward'] == rows[0]['reward']  # bit for bit


def test_records(tmp_path, monkeypatch):
    monkeypatch.delenv('FFP_RECOMPUTE', raising=False)
    path = save_record(tmp_path, CONFIG | dict(name='spine'),
                       dict(ppl=np.float32(2.5), widths=np.eye(2)), forward_tokens=10, wall_s=1.5,
                       data=dict(test='abc'))
    record = find_record(tmp_path, dict(name='spine') | CONFIG)
    assert path.name == f"spine-{config_id(dict(name='spine') | CONFIG)}.json"
    assert (record['result'] == dict(ppl=2.5, widths=[[1, 0], [0, 1]])
            and record['data'] == dict(test='abc'))
    assert (record['created'].endswith('+00:00')
            and record['environment']['versions']['torch'] == torch.__version__)
    assert load_records(tmp_path).loc[0, 'config.agent.lr'] == 1e-4
    text = path.read_text()
    assert os.uname().nodename not in text and str(tmp_path) not in text and os.getcwd() not in text
    path.write_text(text[:100])
    for fn in (lambda: find_record(tmp_path, CONFIG | dict(name='spine')),
               lambda: load_records(tmp_path)):
        with pytest.raises(CorruptFile, match=path.name):
            fn()
    write_json(path, [1])
    with pytest.raises(CorruptFile, match='no run record'):
        load_records(tmp_path)


def test_cached_computes_once_and_never_stores_a_failure(tmp_path, monkeypatch):
    monkeypatch.delenv('FFP_RECOMPUTE', raising=False)
    calls = []
    def fails(config):
        raise RuntimeError('no')

    def works(config):
        calls.append(config)
        return dict(a=len(calls), forward_tokens=7)
    with pytest.raises(RuntimeError):
        cached(tmp_path, CONFIG, fails)
    assert [cached(tmp_path, CONFIG, works)['result']['a'] for _ in range(3)] == [1, 1, 1]
    monkeypatch.setenv('FFP_RECOMPUTE', '1')
    assert cached(tmp_path, CONFIG, works)['result']['a'] == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_config_id_does_not_change():
    "Committed records are found by it"
    assert config_id(dict(method='ffp', sparsity=0.2, steps=(1, 32), model=None)) == 'c4f0471a9e'
    assert json.dumps(environment())


OTHER = '''
import sys
from ffp_nb.core.runs import RunDir
run = RunDir(sys.argv[1], dict(a=1), resume=sys.argv[2:] != ['--no-resume'])
run.log(dict(t=0))
'''


def other_writer(folder, *args):
    "Another process opens the folder and logs a row; its last line of errors"
    child = subprocess.run([sys.executable, '-c', OTHER, str(folder), *args], text=True,
                           capture_output=True)
    return (child.stderr.strip().splitlines() or [''])[-1]


@pytest.mark.parametrize('args', [(), ('--no-resume',)])
def test_a_second_writer_is_refused(tmp_path, args):
    run = RunDir(tmp_path, dict(a=1))
    run.log([dict(t=5), dict(t=6)])
    before = {o.name: o.read_bytes() for o in tmp_path.iterdir()}
    error = other_writer(tmp_path, *args)
    assert 'FolderInUse' in error and f'process {os.getpid()}' in error
    assert str(tmp_path) in error and '--out' in error
    assert {o.name: o.read_bytes() for o in tmp_path.iterdir()} == before
    again = RunDir(tmp_path, dict(a=1))  # the same process may
    del run
    gc.collect()
    assert 'FolderInUse' in other_writer(tmp_path)  # its last one is still there
    again.close()
    assert other_writer(tmp_path) == ''
    assert [o['t'] for o in PolicyLog(tmp_path/'policies.jsonl').rows()] == [5, 6, 0]
    assert not (tmp_path/'.writer').exists()


@posix
def test_a_killed_writer_holds_nothing(tmp_path):
    def child():
        RunDir(tmp_path, dict(a=1)).log(dict(t=0))
        RunDir(tmp_path, dict(a=1))
        held = RunDir(tmp_path, dict(a=1))
        held.log(dict(t=1))
        time.sleep(60)
    assert in_child(child, kill_after=1.5) == signal.SIGKILL
    assert (tmp_path/'.writer').exists()  # it had no time to clean up
    assert len(RunDir(tmp_path, dict(a=1)).rows()) == 2


@posix
def test_a_forked_child_neither_has_nor_frees_the_lock(tmp_path):
    run = RunDir(tmp_path, dict(a=1))
    def child():
        with pytest.raises(FolderInUse, match=f'process {os.getppid()}'):
            RunDir(tmp_path, dict(a=1))
        run.close()
        gc.collect()
    assert in_child(child) is None
    assert 'FolderInUse' in other_writer(tmp_path)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def no_lock(self, *a, **kw):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(runs.FileLock, 'acquire', no_lock)
    with pytest.warns(UserWarning, match='without locks.*no other process'):
        run = RunDir(tmp_path, dict(a=1))
    run.log(dict(t=0))
    assert len(run.rows()) == 1


def test_a_resume_with_another_version_says_so(tmp_path, monkeypatch):
    run = RunDir(tmp_path, CONFIG)
    config, code = read_run_config(tmp_path)
    assert (config, code) == (CONFIG, runs.code_hash())
    monkeypatch.setattr(runs, 'code_hash', lambda: 'feed'*4)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert RunDir(tmp_path, CONFIG).rows() == []  # there is nothing yet that could mix
        assert read_run_config(tmp_path)[1] == 'feed'*4
    run.log(dict(t=0))
    monkeypatch.setattr(runs, 'code_hash', lambda: 'beef'*4)
    with pytest.warns(UserWarning, match=f'{"feed"*4}.*{"beef"*4}.*--no-resume'):
        again = RunDir(tmp_path, CONFIG)
    assert again.id == run.id == config_id(CONFIG) and len(again.rows()) == 1
    write_json(tmp_path/'config.json', CONFIG)  # as it was before the hash
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(RunDir(tmp_path, CONFIG).rows()) == 1
        RunDir(tmp_path, CONFIG, resume=False)
    assert read_run_config(tmp_path) == (CONFIG, 'beef'*4)


def test_leftovers_of_killed_writers(tmp_path, monkeypatch):
    "Old ones go wherever something is written; young ones and those of others stay"
    names = '.a.json.0123abcd.tmp', '.model.77.tmp', '.report.89abcdef.tmp', '.checkpoint.tmp'
    def leave(folder):
        folder.mkdir(exist_ok=True)
        (folder/names[2]).mkdir()
        (folder/names[2]/'a.png').touch()
        os.utime(folder/names[2]/'a.png', (0, 0))
        for name in (*names, '.mine.tmp'):
            if name != names[2]:
                (folder/name).touch()
            os.utime(folder/name, (0, 0))
    for write in (lambda f: RunDir(f, CONFIG), runs.check_writable,
                  lambda f: save_record(f, CONFIG, {})):
        leave(tmp_path/'a')
        write(tmp_path/'a')
        assert [o.name for o in (tmp_path/'a').glob('.*.tmp')] == ['.mine.tmp']
    (tmp_path/'a'/names[0]).touch()
    runs.check_writable(tmp_path/'a')
    assert (tmp_path/'a'/names[0]).exists()


@posix
def test_large_files_are_written_as_they_come(tmp_path):
    atomic_write(tmp_path/'a.pt', lambda f: torch.save(torch.arange(9), f))
    assert torch.load(tmp_path/'a.pt').tolist() == list(range(9))
    before = (tmp_path/'a.pt').read_bytes()
    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        for write in (lambda f: torch.save(torch.zeros(10_000), f),
                      lambda f: f.write(bytes(10_000))):
            with pytest.raises(OSError, match='cannot write .*a.pt'):
                atomic_write(tmp_path/'a.pt', write)
    assert in_child(child) is None
    assert (tmp_path/'a.pt').read_bytes() == before
    assert [o.name for o in tmp_path.iterdir()] == ['a.pt']
