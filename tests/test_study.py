"`ffp study`: a made study is listed, run, and reported; what a user can mend is told in one line"
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

import ffp_nb
from ffp_nb.studies import registry
from ffp_nb.studies.cells import Lab
from ffp_nb.studies.study import (
    Claim, Measurement, Study, count_records, find_measured, run_study, walk)


def notebook(title, *codes):
    cells = [nbformat.v4.new_markdown_cell(f'# {title}\n\n> made'),
             *(nbformat.v4.new_code_cell(c) for c in codes)]
    return nbformat.writes(nbformat.v4.new_notebook(cells=cells))


def made_plan(lab):
    for name in ('one', 'two'):
        yield Measurement(dict(name=name), lambda _: dict(name=name))


def made_study(**changed):
    own = dict(plan=made_plan, tidy=lambda runs: (len([*(runs / 'made').glob('*.json')]),),
               findings=lambda n: ['- it works'],
               claims=(Claim(1, 'FFP', 'made', lambda n: ('in part', '3 of 5')),))
    return Study('made', 'made', **own | changed)


def measured(nbs, *names):
    "Records of the made study with these names; the others are taken away"
    for f in (nbs / 'runs/made').glob('*.json'):
        f.unlink()
    def plan(lab):
        for m in made_plan(lab):
            if m.config['name'] in names:
                yield m
    run_study(made_study(plan=plan), Lab(nbs))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder of notebooks with one study that has one of its two records, and the command that
    only knows this study"""
    nbs = tmp_path / 'nbs'
    (nbs / 'studies').mkdir(parents=True)
    (nbs / 'studies/07_made.ipynb').write_text(
        notebook('A made study', 'import os',
                 "print('profile', os.environ['FFP_PROFILE'], os.path.basename(os.getcwd()))"))
    measured(nbs, 'one')
    monkeypatch.setattr(registry, 'STUDIES', {'made': made_study()})
    monkeypatch.chdir(tmp_path)
    return nbs


def test_list_says_what_is_whole(project, ffp):
    done = ffp('study', 'list', '--nbs', project)
    assert (done.exit_code == 0
            and all(x in done.output
                    for x in ('A made study', '1 of 2', 'nbs/studies/07_made.ipynb')))
    measured(project, 'one', 'two')
    assert 'whole' in ffp('study', 'list', '--nbs', project).output
    # a record of other settings does not count, whatever its file is called
    for f in (project / 'runs/made').glob('*.json'):
        f.rename(f.with_name(f.stem[:-10] + '0123456789.json'))
    assert 'none yet' in ffp('study', 'list', '--nbs', project).output


def test_run_executes_a_copy_with_the_profile(project, ffp, tmp_path):
    page = (project / 'studies/07_made.ipynb').read_bytes()
    done = ffp('study', 'run', 'made', '--nbs', project, '--profile', 'demo', '--out',
               tmp_path / 'out')
    assert done.exit_code == 0, done.output
    copy = nbformat.read(tmp_path / 'out/made.ipynb', 4)
    assert copy.cells[2].outputs[0].text == 'profile demo studies\n'
    assert ((project / 'studies/07_made.ipynb').read_bytes() == page
            and [f.name for f in (tmp_path / 'out').iterdir()] == ['made.ipynb'])


def test_a_cell_that_fails_is_named_and_the_old_copy_stays(project, ffp, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/made.ipynb').write_text('old')
    (project
     / 'studies/07_made.ipynb').write_text(notebook('Broken', 'x = 1',
                                                 "#| hide\nopen('no such file')"))
    done = ffp('study', 'run', 'made', '--nbs', project, '--out', tmp_path / 'out')
    assert done.exit_code == 1 and 'Traceback' not in done.output
    assert "07_made.ipynb, cell 2 (`open('no such file')`): FileNotFoundError" in done.output
    assert ((tmp_path / 'out/made.ipynb').read_text() == 'old'
            and len(list((tmp_path / 'out').iterdir())) == 1)


def test_records_are_made_first_and_in_the_project(project, ffp, tmp_path, monkeypatch):
    "Folders lie in the project of the notebooks, wherever the command is run"
    seen = []
    def plan(lab):
        seen.append((lab.runs, lab.work, lab.profile))
        yield Measurement(dict(name='new'), lambda to: dict(folder=to.name))
    monkeypatch.setattr(registry, 'STUDIES', {'made': made_study(plan=plan)})
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    # only when asked
    assert ffp('study', 'run', 'made', '--nbs', project).exit_code == 0 and not seen
    done = ffp('study', 'run', 'made', '--nbs', project, '--records', '--profile', 'gpu')
    assert done.exit_code == 0, done.output
    assert seen == [(project / 'runs', tmp_path / 'runs', 'gpu')]
    (new,) = (project / 'runs/made').glob('new-*.json')
    assert json.loads(new.read_text())['result'] == dict(folder='made')
    done = ffp('study', 'run', 'made', '--nbs', project, '--records', '--profile', 'smoke')
    assert done.exit_code == 1 and 'not kept' in done.output and len(seen) == 1


def test_report(project, ffp, tmp_path):
    done = ffp('study', 'report', '--nbs', project, '--out', tmp_path / 'all.md')
    text = (tmp_path / 'all.md').read_text()
    assert done.exit_code == 0 and ('## A made study\n\n- *1 of 2 records are there.*\n- it '
                                    'works\n') in text
    row = '| FFP: [made](nbs/studies/07_made.ipynb) | **in part** | 3 of 5 (1 of 2 records) |'
    assert row in text
    assert 'it works' in ffp('study', 'report', '--nbs', project).output


@pytest.mark.parametrize('error', [KeyError, IndexError, ValueError, AttributeError])
def test_half_made_records_give_no_conclusion_and_whole_ones_must(project, monkeypatch, error):
    def breaks(n):
        raise error('half')
    monkeypatch.setattr(registry, 'STUDIES', {'made': made_study(findings=breaks)})
    half = ['- 1 of 2 records are there: no conclusion yet.']
    assert registry.conclusions('made', project) == half
    measured(project, 'one', 'two')
    with pytest.raises(error):
        registry.conclusions('made', project)


def test_from_a_wheel_the_notebooks_are_asked_for(project, ffp, tmp_path, monkeypatch):
    installed = str(tmp_path / 'site-packages/ffp_nb/__init__.py')
    monkeypatch.setattr(registry, 'find_spec', lambda name: SimpleNamespace(origin=installed))
    assert ffp('study', 'list').exit_code == 0  # nbs is here
    (tmp_path / 'empty').mkdir()
    monkeypatch.chdir(tmp_path / 'empty')
    for command in (['list'], ['run', 'made'], ['report']):
        done = ffp('study', *command)
        assert (done.exit_code == 1 and 'git clone https://' in done.output
                and '--nbs' in done.output)


def test_without_jupyter_the_extra_is_named(project, ffp, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'nbclient', None)
    done = ffp('study', 'run', 'made', '--nbs', project)
    assert done.exit_code == 1 and "ffp_nb[study]" in done.output


def test_without_the_studies_the_command_says_so(ffp, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ffp_nb.studies.registry', None)
    done = ffp('study', 'list')
    assert done.exit_code == 1 and 'not in this installation' in done.output


def test_the_records_of_this_project_are_those_that_studies_want():
    """Every study finds its records by their configurations, and no record of a study is one that
    nothing wants"""
    nbs = Path(ffp_nb.__file__).parents[1] / 'nbs'
    lab, wanted = Lab(nbs, dry=True), {}
    for s in registry.STUDIES.values():
        if s.benchmark:
            have, of = count_records(s, lab)
            assert have == of > 0, s.name
        if s.plan:
            records = walk(s.plan(lab), lambda w, s=s: find_measured(lab.runs / s.folder, w.config))
            assert records and (s.command or None not in records), s.name
            wanted.setdefault(s.folder, set()).update(r['config_id'] for r in records if r)
    for folder, ids in wanted.items():
        files = [f.name for f in (lab.runs / folder).glob('*.json') if f.stem[-10:] not in ids]
        if folder == 'main':  # pages show these as well, and their plans make them only when asked
            files = [n for n in files if not re.match('zero-shot-|.*smollm2-|.*-narrow-', n)]
        assert not files, f'nothing wants {folder}/{files}'


def test_a_lab_finds_its_folders_from_a_page(monkeypatch):
    "A page runs in `nbs/studies`, where the notebooks are `..`"
    nbs = Path(ffp_nb.__file__).resolve().parents[1] / 'nbs'
    monkeypatch.chdir(nbs / 'studies')
    for lab in (Lab(), Lab(nbs)):
        assert lab.work.resolve() == nbs.parent / 'runs'
        assert lab.runs.resolve() == nbs / 'runs'
        assert lab.benchmarks.resolve() == nbs.parent / 'benchmarks' / 'results'
