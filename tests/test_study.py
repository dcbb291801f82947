"`ffp study`: a made study is listed, run, and reported; what a user can mend is told in one line"
import json
from pathlib import Path

import nbformat
import pytest

import ffp_nb
from ffp_nb import study
from ffp_nb.studies.registry import Study, count_records


def notebook(title, *codes):
    cells = [nbformat.v4.new_markdown_cell(f'# {title}\n\n> made'),
             *(nbformat.v4.new_code_cell(c) for c in codes)]
    return nbformat.writes(nbformat.v4.new_notebook(cells=cells))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder of notebooks with one study that has one of its two records, and the command that
    only knows this study"""
    nbs = tmp_path / 'nbs'
    (nbs / 'studies').mkdir(parents=True)
    (nbs / 'runs/made').mkdir(parents=True)
    (nbs / 'studies/made.ipynb').write_text(
        notebook('A made study', 'import os',
                 "print('profile', os.environ['FFP_PROFILE'], os.path.basename(os.getcwd()))"))
    (nbs / 'runs/made/one-0123456789.json').write_text('{}')
    monkeypatch.setattr(study, 'STUDIES',
                        {'made': Study('made', 'runs/made', lambda: ['one', 'two'])})
    monkeypatch.setattr(study, 'CONCLUSIONS', {'made': lambda nbs: ['- it works']})
    monkeypatch.setattr(study, 'CLAIMS',
                        (('FFP', 'made', 'made', lambda nbs: ('in part', '3 of 5')),))
    monkeypatch.chdir(tmp_path)
    return nbs


def test_list_says_what_is_whole(project, ffp):
    done = ffp('study', 'list', '--nbs', project)
    assert (done.exit_code == 0
            and all(x in done.output for x in ('A made study', '1 of 2', 'nbs/studies/made.ipynb')))
    (project / 'runs/made/two-0123456789.json').write_text('{}')
    assert 'whole' in ffp('study', 'list', '--nbs', project).output
    for f in (project / 'runs/made').iterdir():
        f.unlink()
    assert 'none yet' in ffp('study', 'list', '--nbs', project).output


def test_run_executes_a_copy_with_the_profile(project, ffp, tmp_path):
    page = (project / 'studies/made.ipynb').read_bytes()
    done = ffp('study', 'run', 'made', '--nbs', project, '--profile', 'demo', '--out',
               tmp_path / 'out')
    assert done.exit_code == 0, done.output
    copy = nbformat.read(tmp_path / 'out/made.ipynb', 4)
    assert copy.cells[2].outputs[0].text == 'profile demo studies\n'
    assert ((project / 'studies/made.ipynb').read_bytes() == page
            and [f.name for f in (tmp_path / 'out').iterdir()] == ['made.ipynb'])


def test_a_cell_that_fails_is_named_and_the_old_copy_stays(project, ffp, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/made.ipynb').write_text('old')
    (project
     / 'studies/made.ipynb').write_text(notebook('Broken', 'x = 1',
                                                 "#| hide\nopen('no such file')"))
    done = ffp('study', 'run', 'made', '--nbs', project, '--out', tmp_path / 'out')
    assert done.exit_code == 1 and 'Traceback' not in done.output
    assert "made.ipynb, cell 2 (`open('no such file')`): FileNotFoundError" in done.output
    assert ((tmp_path / 'out/made.ipynb').read_text() == 'old'
            and len(list((tmp_path / 'out').iterdir())) == 1)


def test_records_are_made_first_and_in_the_project(project, ffp, tmp_path, monkeypatch):
    """Every folder that a maker may ask for lies in the project of the notebooks, wherever the
    command is run"""
    seen = []
    def run_study(records='x', work='x', models='x', profile='cpu', seeds=(0,)):
        seen.append((records, work, models, profile, seeds))

    def run_more(runs, policies='x'):
        seen.append((runs, policies))
    fake = type('module', (),
                dict(run_study=staticmethod(run_study), run_more=staticmethod(run_more)))
    monkeypatch.setattr(study, 'import_module',
                        lambda name: fake if name == 'ffp_nb.studies.made' else None)
    monkeypatch.setattr(study, 'STUDIES',
                        {'made': Study('made', 'runs/made', lambda: ['one'],
                                       ('run_study', 'run_more'), dict(policies='runs/spine'))})
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    # only when asked
    assert ffp('study', 'run', 'made', '--nbs', project).exit_code == 0 and not seen
    done = ffp('study', 'run', 'made', '--nbs', project, '--records', '--profile', 'gpu')
    assert done.exit_code == 0, done.output
    assert (seen
            == [(project / 'runs/made', tmp_path / 'runs/work', tmp_path / 'runs/models', 'gpu',
                 (0,)), (project / 'runs', project / 'runs/spine')])
    done = ffp('study', 'run', 'made', '--nbs', project, '--records', '--profile', 'smoke')
    assert done.exit_code == 1 and 'not kept' in done.output and len(seen) == 2


def test_report(project, ffp, tmp_path):
    done = ffp('study', 'report', '--nbs', project, '--out', tmp_path / 'all.md')
    text = (tmp_path / 'all.md').read_text()
    assert done.exit_code == 0 and ('## A made study\n\n- *1 of 2 records are there.*\n- it '
                                    'works\n') in text
    assert '| FFP: [made](nbs/studies/made.ipynb) | **in part** | 3 of 5 (1 of 2 records) |' in text
    assert 'it works' in ffp('study', 'report', '--nbs', project).output


@pytest.mark.parametrize('error', [KeyError, IndexError, ValueError, AttributeError])
def test_half_made_records_give_no_conclusion_and_whole_ones_must(project, monkeypatch, error):
    def breaks(nbs):
        raise error('half')
    monkeypatch.setattr(study, 'CONCLUSIONS', {'made': breaks})
    assert study.conclusions('made', project) == ['- 1 of 2 records are there: no conclusion yet.']
    (project / 'runs/made/two-0123456789.json').write_text('{}')
    with pytest.raises(error):
        study.conclusions('made', project)


def test_from_a_wheel_the_notebooks_are_asked_for(project, ffp, tmp_path, monkeypatch):
    monkeypatch.setattr(ffp_nb, '__file__', str(tmp_path / 'site-packages/ffp_nb/__init__.py'))
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


def test_the_records_of_this_project_are_those_that_studies_want():
    """Names in the registry are names that the studies write: every study has a record that is
    wanted, or none at all"""
    nbs = Path(ffp_nb.__file__).parents[1] / 'nbs'
    for s in study.STUDIES.values():
        have, of = count_records(s, nbs)
        assert 0 <= have <= of and of
        if s.folder != 'runs/main' and (nbs / s.folder).is_dir():
            assert have or not any(json.loads(f.read_text())['config'].get('study') == s.name
                                   for f in (nbs / s.folder).glob('*.json')), s.name
