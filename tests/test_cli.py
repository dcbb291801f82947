"""The shell: any terminal, any name, one line for whatever goes wrong, and nothing is lost on the
way"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
import warnings
from dataclasses import replace
from inspect import signature
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from conftest import make_folder, worked
from typer.testing import CliRunner

from ffp_nb.core.runs import lock_folder
from ffp_nb.export.vllm import parallel_sizes
from ffp_nb.pipeline import cli
from ffp_nb.pipeline.config import PruneConfig
from ffp_nb.search.agent import PUBLISHED
from ffp_nb.studies.cells import VARIANTS

MAIN = 'from ffp_nb.pipeline.cli import app; app()'
QUICK = '--text', 'text.txt', '--block-len', 32, '--max-blocks', 3
NAMES = 'runs [exp1]', 'a[/b]', ':fire: [bold]x'


# a shell's background job, in which tests may run, ignores Ctrl-C, and its children inherit that
MAIN_HEARS = ('import signal; signal.signal(signal.SIGINT, signal.default_int_handler); ' + MAIN)


def start(*args, **env):
    return subprocess.Popen([sys.executable, '-c', MAIN_HEARS, *map(str, args)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | env)


def run(*args, **env):
    "The command in a process of its own: status, output and errors, as bytes"
    child = start(*args, **env)
    out, err = child.communicate()
    return child.returncode, out, err


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with a hostile name that holds a model and a text, and is the working folder"
    folder = tmp_path_factory.mktemp('cli') / 'runs [exp1]' / 'é… a[/b]'
    folder.mkdir(parents=True)
    make_folder(folder)
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.mark.parametrize('env', [dict(PYTHONIOENCODING='ascii'), dict(PYTHONIOENCODING='cp1252'),
                                 dict(LC_ALL='C')])
def test_a_terminal_without_the_characters(place, env):
    "The table is printed and the file is written, whatever the terminal can show"
    table = place / 'ünï…' / 'table.csv'
    status, out, err = run('eval', '--model', place / 'dense', *QUICK, '--csv', table, **env)
    assert status == 0 and b'Traceback' not in err, err
    row = pd.read_csv(table).iloc[0]
    assert row.model == str(place / 'dense')
    assert f'{row.ppl:.4g}'.encode() in out and b'runs [exp1]' in out
    table.unlink()


@pytest.mark.parametrize('name', NAMES)
def test_names_are_no_markup(ffp, tmp_path, name):
    make_folder(tmp_path)
    model = tmp_path / name / 'm'
    model.parent.mkdir(parents=True)
    (tmp_path / 'dense').rename(model)
    quick = '--text', tmp_path / 'text.txt', '--block-len', 32, '--max-blocks', 3
    result = worked(ffp('eval', '--model', model, *quick))
    assert str(model) in result.stdout
    out = tmp_path / 'out' / name
    result = worked(ffp('search', '--model', model, *quick[:2], '--profile', 'smoke', '--method',
                        'uniform', '--out', out))
    assert f'widths.json and pictures are in {out}\n' in result.stdout
    result = ffp('report', out)
    assert result.exit_code == 1 and str(out / 'search') in result.stderr


def test_print_table_is_no_markup(capsys):
    cli.print_table(pd.DataFrame({'a[/b]': ['[bold]x', '[/nothing]', ':smile:']}), '[red]t[/red] [')
    out = capsys.readouterr().out
    for text in ('a[/b]', '[bold]x', '[/nothing]', ':smile:', '[red]t[/red] ['):
        assert text in out


@pytest.mark.parametrize('command', ['search', 'prune'])
def test_help_keeps_its_brackets(command):
    result = worked(CliRunner().invoke(cli.app, [command, '--help']))
    assert 'ffp_nb[ray]' in ' '.join(result.stdout.split())


@pytest.mark.parametrize('command', [cli.prune, cli.search])
def test_the_defaults_are_those_of_python(command):
    found = {k: p.default for k, p in signature(command).parameters.items()}
    assert (found['method'].value, found['criterion'].value) == ('gradient', 'greedy')
    assert (PruneConfig.method, PruneConfig.criterion) == ('gradient', 'greedy')
    for name in ('model', 'text', 'sparsity', 'seed', 'dtype'):
        assert found[name] == getattr(PruneConfig, name), name


def test_wide_tables_are_not_cut_off(capsys):
    "A pipe has no width"
    row = {f'column{i}': ['x' * 30] for i in range(12)}
    cli.print_table(pd.DataFrame(row), 'wide')
    out = capsys.readouterr().out
    assert '…' not in out and out.count('x' * 30) == 12


@pytest.mark.parametrize('args, words', [
    (('eval', '--stride', 0), ('stride 0', '1 <= stride')),
    (('eval', '--stride', -4), ('stride -4',)),
    (('eval', '--stride', 600), ('stride 600',)),
    (('eval', '--max-blocks', 0), ('max_blocks 0',)),
    (('eval', '--limit', 3), ('without --tasks', '--limit')),
    (('eval', '--data', 'x'), ('without --tasks', '--data')),
    (('eval', '--part', 'dev', '--metric', 'acc'), ('without --tasks', '--part, --metric')),
    (('eval', '--tasks', 'piqa', '--limit', 0), ('limit 0', 'at least 1')),
    (('eval', '--tasks', 'piqa', '--limit', -1), ('limit -1',)),
    *(((('eval', '--tasks', 'piqa', *o), ('with --tasks', o[0]))) for o in (
        ('--text', 'auto'), ('--split', 'test'), ('--block-len', 512), ('--stride', 8),
        ('--max-blocks', 3), ('--bos',))),
    (('report', 'x', '--points', 8), ('without --measure', '--points')),
    (('report', 'x', '--blocks', 4, '--device', 'cpu'), ('without --measure', '--blocks, --dev')),
    (('report', 'x', '--measure', '--points', -1), ('points -1',)),
    (('prune', '--calibration', 'static', '--sequential-target', 'normed'),
     ('with --calibration static: --sequential-target',)),
    *(((c, *o), words) for c in ('prune', 'search') for o, words in (
        (('--published',), ('--published with --method gradient', 'Add --method ffp.')),
        (('--method', 'eas', '--published'), ('--published with --method eas',)),
        (('--method', 'uniform', '--workers', 2), ('with --method uniform', '--workers'))))])
def test_options_without_effect(ffp, monkeypatch, args, words):
    "Refused before anything is loaded, even where the value is the default"
    monkeypatch.setattr('ffp_nb.export.hf.open_model', lambda *a: pytest.fail('loaded'))
    result = ffp(*args)
    assert result.exit_code == 1 and result.stderr.count('\n') == 1, result.output
    for word in words:
        assert word in result.stderr


def test_the_recipe_of_the_paper_is_a_command(monkeypatch):
    "As the studies ask for it, and nothing else"
    asked = []

    def note(config, *a, **kw):
        asked.append(config)
        raise ValueError('enough')

    monkeypatch.setattr('ffp_nb.pipeline.prune.prune', note)
    for more in (['--published'], []):
        CliRunner().invoke(cli.app, ['prune', '--method', 'ffp', '--criterion', 'wanda', *more])
    assert asked[0].search == VARIANTS['published'] == {'agent': PUBLISHED}
    assert asked[1].search == {} and replace(asked[0], search={}) == asked[1]
    CliRunner().invoke(cli.app, ['prune', '--sequential-target', 'normed'])
    assert asked[2] == replace(PruneConfig(), sequential_target='normed')


def raising(monkeypatch, error, name='evaluate'):
    def fails(*a, **kw):
        raise error
    monkeypatch.setattr(cli, '_perplexity', fails)
    return CliRunner().invoke(cli.app, ['eval'])


@pytest.mark.parametrize('error, words', [
    (MemoryError(), ('out of memory', '--batch', '--device auto')),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory:\n you tried"),
     ('out of memory', '--dtype bfloat16')),
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB.'),
     ('out of memory', '20.00 GiB', '--batch')),
    (AssertionError('Torch not compiled with CUDA enabled'), ('AssertionError', 'CUDA', '--debug')),
    (RecursionError('maximum recursion depth exceeded'), ('recursion',)),
    (TypeError(), ('TypeError (', '--debug')),
    (Exception('data did not match any variant'), ('variant', '--debug')),
    (KeyError('split'), ('error: split',))])
def test_every_error_is_one_line(monkeypatch, error, words):
    result = raising(monkeypatch, error)
    assert result.exit_code == 1 and result.stderr.count('\n') == 1, result.stderr
    assert isinstance(result.exception, SystemExit)
    for word in words:
        assert word in result.stderr


def test_debug_shows_the_traceback():
    result = CliRunner().invoke(cli.app, ['eval', '--text', './nowhere.txt', '--debug'])
    assert isinstance(result.exception, FileNotFoundError) and 'error:' not in result.stderr


def test_other_commands_name_their_own_options(monkeypatch):
    for command, options in (('prune', cli.prune), ('search', cli.search), ('report', cli.report),
                             ('eval', cli.evaluate), ('export', cli.export),
                             ('elastic', cli.elastic)):
        names = {f'--{o.replace("_", "-")}' for o in options.__annotations__}
        said = {w.strip(',') for text in cli._WORDS[command] for w in text.split()
                if w.startswith('--')}
        assert {o.replace('--no-', '--') for o in said} <= names, command


@pytest.mark.parametrize('command, resumes', [('eval', False), ('export', False), ('report', False),
                                              ('search', True), ('prune', True),
                                              ('elastic', True)])
def test_ctrl_c(monkeypatch, tmp_path, command, resumes):
    "Only a search goes on from its last update, and only without --no-resume"
    def stop(*a, **kw):
        raise KeyboardInterrupt
    for name in ('ffp_nb.pipeline.cli._perplexity', 'ffp_nb.export.gguf.export_gguf',
                 'ffp_nb.search.report.report', 'ffp_nb.pipeline.bench.Bench.load',
                 'ffp_nb.pipeline.prune.prune', 'ffp_nb.pipeline.dynamic.make_elastic'):
        monkeypatch.setattr(name, stop)
    args = dict(export=['m', '--gguf', 'x.gguf'], report=['x'],
                search=['--out', str(tmp_path)]).get(command, [])
    result = CliRunner().invoke(cli.app, [command, *args])
    assert result.exit_code == 130 and result.stderr.startswith('stopped; ')
    assert ('last finished update' in result.stderr) == resumes
    assert ('--no-resume' in result.stderr) == resumes


@pytest.mark.skipif(os.name != 'posix', reason='signals')
def test_ctrl_c_for_real(place, tmp_path):
    args = ('search', '--model', place / 'dense', '--text', 'text.txt', '--profile', 'smoke',
            '--out', tmp_path / 'out')
    child = start(*args)
    while not (tmp_path / 'out' / 'search' / '.lock').exists():
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate()
    assert child.returncode == 130 and b'stopped; the same command' in err, err
    assert b'Traceback' not in err


@pytest.mark.skipif(not Path('/proc/self/maps').exists(), reason='sees what is being loaded')
def test_ctrl_c_while_it_imports():
    code = MAIN_HEARS.replace(MAIN, 'import ffp_nb; ffp_nb.command()')
    assert 'command' in code
    child = subprocess.Popen([sys.executable, '-c', code, '--help'], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    while 'libtorch' not in Path(f'/proc/{child.pid}/maps').read_text():
        assert child.poll() is None, child.communicate()
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate()
    assert (child.returncode, out, err) == (130, b'', b'stopped before it began\n')


def test_a_reader_that_ends_early(monkeypatch):
    result = raising(monkeypatch, BrokenPipeError(32, 'Broken pipe'))
    assert result.exit_code == 1 and result.stderr.startswith('stopped (nobody reads')


@pytest.mark.skipif(os.name != 'posix', reason='pipes')
def test_head(place):
    "`ffp eval ... | head -0`: no traceback, and the file is written"
    child = start('eval', '--model', place / 'dense', *QUICK, '--csv', place / 'head.csv')
    child.stdout.close()
    err = child.stderr.read()
    child.wait()
    assert b'Traceback' not in err and len(pd.read_csv(place / 'head.csv')) == 1, err
    (place / 'head.csv').unlink()


def test_the_table_is_printed_even_if_its_file_cannot_be_written(ffp, tiny_folder, monkeypatch):
    def full(path, text):
        raise OSError(f'cannot write {path}: choose another path')
    monkeypatch.setattr(cli, 'atomic_write', full)
    result = ffp('eval', '--model', tiny_folder / 'dense', '--text', tiny_folder / 'text.txt',
                 *QUICK[2:], '--csv', tiny_folder / 'there.csv')
    assert result.exit_code == 1 and 'choose another path' in result.stderr
    assert 'ppl' in result.stdout and str(tiny_folder / 'dense') in result.stdout


def test_a_csv_that_cannot_be_written_is_refused_before_the_model_is_loaded(ffp, tiny_folder,
                                                                            monkeypatch):
    monkeypatch.setattr('ffp_nb.export.hf.open_model', lambda *a: pytest.fail('loaded'))
    result = ffp('eval', '--model', tiny_folder / 'dense', '--text', tiny_folder / 'text.txt',
                 '--csv', tiny_folder / 'text.txt' / 'table.csv')
    assert result.exit_code == 1 and 'a part of this path is a file' in result.stderr


def test_a_heuristic_promises_no_picture_of_a_search(ffp, tiny_folder):
    common = ('prune', '--model', tiny_folder / 'dense', '--text', tiny_folder / 'text.txt',
              '--profile', 'smoke', '--ffn-step', 8)
    result = worked(ffp(*common, '--method', 'uniform', '--out', tiny_folder / 'a'))
    assert 'retention.png and the record are in' in result.stdout
    assert not (tiny_folder / 'a' / 'search.png').exists()
    result = worked(ffp(*common, '--method', 'random-search', '--out', tiny_folder / 'b'))
    assert 'retention.png, search.png and the record are in' in result.stdout
    assert (tiny_folder / 'b' / 'search.png').exists()
    assert not (tiny_folder / 'b' / 'slopes.png').exists()


@pytest.mark.parametrize('family', ['llama', 'opt'])
def test_widths_that_devices_can_share(family, family_folder, ffp, tmp_path):
    """--tp keeps every layer divisible, and is recorded as the step alone; what cannot be shared is
    refused with the numbers that can"""
    folder, out = family_folder(family), tmp_path / 'out'
    common = ('--model', folder / 'dense', '--text', folder / 'text.txt', '--profile', 'smoke',
              '--ffn-step', 5, '--method', 'random', '--sparsity', 0.3)
    why = dict(llama='a layer has 4 KV groups and 96 FFN channels. Give one of 1, 2, 4.',
               opt='it can only be served on one device. Leave --tp out.')[family]
    for command, tp in (('prune', 3), ('search', 5)):
        result = ffp(command, *common, '--tp', tp, '--out', out)
        # after transformers' own bar
        assert result.exit_code == 1 and result.stderr.splitlines()[-1] == (
            f'error: tp {tp}: {tp} devices cannot share this {family} model equally: {why}')
    result = ffp('prune', *common, '--tp', 2, '--remove', 'ffn', '--out', out)
    assert result.exit_code == 1 and 'Leave one of the two out.' in result.stderr
    assert ffp('prune', *common, '--tp', 0, '--out', out).exit_code == 2
    assert not out.exists() or not list(out.rglob('*.json'))
    tp = 2 if family == 'llama' else 1
    result = worked(ffp('prune', *common, '--tp', tp, '--out', out))
    config = json.loads((out / 'model' / 'config.json').read_text())
    widths = np.array([[w['kv_heads'], w['ffn']] for w in config['pruned_widths']])
    assert not (widths % tp).any() and (widths[:, 1] % 5 == 0)[widths[:, 1] < 96].all()
    sizes = ', '.join(map(str, parallel_sizes(out / 'model')))
    assert f'tensor-parallel sizes that can serve it: {sizes}\n' in result.stdout
    card = (out / 'model' / 'README.md').read_text()
    said = f'`--tensor-parallel-size N` may be {sizes}.' if tp > 1 else 'It needs one device'
    assert said in card and str(tp) in sizes.split(', ')
    record = json.loads(next(out.glob('prune-*.json')).read_text())['config']
    assert record['step'] == [tp, 5 * tp] and 'tp' not in record


def test_a_search_by_slopes_shows_them(ffp, tiny_folder):
    "After `ffp prune` and `ffp search`; the report has its own picture and knows the result"
    common = ('--model', tiny_folder / 'dense', '--text', tiny_folder / 'text.txt', '--profile',
              'smoke', '--ffn-step', 8, '--method', 'gradient')
    result = worked(ffp('prune', *common, '--out', tiny_folder / 'a', pictures=True))
    assert 'retention.png, search.png, slopes.png and the record are in' in result.stdout
    worked(ffp('search', *common, '--out', tiny_folder / 'b', pictures=True))
    for out in (tiny_folder / 'a', tiny_folder / 'b'):
        assert (out / 'slopes.png').read_bytes().startswith(b'\x89PNG')
        for more in ((), ('--measure', '--points', 2, '--blocks', 2)):
            text = ' '.join(worked(ffp('report', out, *more)).stdout.split())
            assert 'Finished: 2 of 2 updates' in text and 'Did the gains settle?' in text
            assert 'which flatters it' in text, 'the winner is known'
        assert (out / 'report' / 'slopes.png').exists()


def test_warnings_are_one_line(monkeypatch):
    before, said = warnings.formatwarning, []
    def warns(*a):
        for kind in (UserWarning, FutureWarning):
            said.append(warnings.formatwarning('the run is old:\n  careful', kind, 'x.py', 1))
        return pd.DataFrame([dict(ppl=1.0)])
    monkeypatch.setattr(cli, '_perplexity', warns)
    worked(CliRunner().invoke(cli.app, ['eval']))
    assert said[0] == 'warning: the run is old: careful\n' and said[1].startswith('x.py:1: Future')
    assert warnings.formatwarning is before


@pytest.mark.parametrize('command', ['search', 'prune'])
def test_a_folder_in_use_is_refused_before_anything_is_loaded(place, tmp_path, command):
    held = lock_folder(tmp_path / 'out' / 'search')
    status, _, err = run(command, '--model', place / 'nowhere', '--text', 'text.txt',
                         '--profile', 'smoke', '--out', tmp_path / 'out', '--no-resume')
    assert status == 1 and held
    assert f'error: {tmp_path / "out" / "search"} is being written by process {os.getpid()}' \
        in err.decode(), err
    assert sorted(o.name for o in (tmp_path / 'out' / 'search').iterdir()) == ['.lock', '.writer']


def test_every_path_knows_the_home_folder():
    "A shell leaves the ~ of `--out=~/models` as it is"
    home = os.path.expanduser('~')
    assert str(cli.path('~/models')) == f'{home}/models'
    asked = {name: args for name, v in vars(cli).items() if len(args := get_args(v)) == 2
             and isinstance(args[1], typer.models.ParameterInfo)}
    paths = {name: info.parser for name, (kind, info) in asked.items() if 'Path' in str(kind)}
    assert len(paths) > 10 and {*paths.values()} == {cli.path}
