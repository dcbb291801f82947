"""The package as others get it: wheel, sdist, metadata, what is optional, and the files that speak
about it"""
import ast
import email
import importlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ffp_nb

ROOT = Path(__file__).parent.parent
config = ConfigParser(delimiters=['='])
config.read(ROOT / 'settings.ini', encoding='utf-8')
CFG = config['DEFAULT']
EXTRAS = {k.removesuffix('_requirements'): v.split() for k, v in CFG.items()
          if k.endswith('_requirements')}
DISTS = dict(sklearn='scikit-learn', lm_eval='lm-eval')  # import name -> package, where they differ


def sources():
    return sorted(f for f in (ROOT / 'ffp_nb').rglob('*.py'))


def names(requirements):
    return {Requirement(r).name for r in requirements}


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "Paths of an sdist, of the wheel made from it, and of the wheel made from the tree"
    folder = tmp_path_factory.mktemp('build')
    tree, ignore = folder / 'tree', shutil.ignore_patterns('__pycache__')
    for d in ('ffp_nb', 'tests'):
        shutil.copytree(ROOT / d, tree / d, ignore=ignore)
    for f in [*ROOT.glob('*.*'), ROOT / 'LICENSE', ROOT / 'Makefile', ROOT / 'nbs' / 'index.ipynb']:
        if f.is_file():
            (tree / f.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(f, tree / f.relative_to(ROOT))
    for out, options in (('both', []), ('direct', ['--wheel'])):
        done = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', *options,
                               '--outdir', folder / out, tree], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout[-3000:]
    sdist, = (folder / 'both').glob('*.tar.gz')
    (wheel,), (direct,) = ((folder / d).glob('*.whl') for d in ('both', 'direct'))
    return sdist, wheel, direct


def content(wheel):
    with zipfile.ZipFile(wheel) as z:
        return {n: z.read(n) for n in z.namelist()}


def test_wheel_holds_the_package_and_nothing_else(built):
    found = {n for n in content(built[1]) if '.dist-info/' not in n}
    assert found == {f.relative_to(ROOT).as_posix() for f in sources()} | {'ffp_nb/py.typed'}


def test_sdist_is_enough_to_build_the_same_wheel(built):
    from_sdist, from_tree = map(content, built[1:])
    assert from_sdist == from_tree
    with tarfile.open(built[0]) as t:
        inside = {n.partition('/')[2] for n in t.getnames()}
    assert ({'settings.ini', 'setup.py', 'README.md', 'LICENSE', 'CHANGELOG.md', 'CITATION.cff'}
            <= inside)
    assert not [n for n in inside if n.startswith(('tests', 'nbs')) or n.endswith('.ipynb')]


def test_metadata(built):
    files = content(built[1])
    meta = email.message_from_bytes(next(v for k, v in files.items()
                                         if k.endswith('.dist-info/METADATA')))
    assert (meta['Name'], meta['Version']) == ('ffp_nb', ffp_nb.__version__)
    assert (meta['Requires-Python'], meta['License-Expression']) == ('>=3.11', 'Apache-2.0')
    assert (meta.get_payload(decode=True).decode().strip()
            == (ROOT / 'README.md').read_text(encoding='utf-8').strip())
    assert ({u.partition(',')[0] for u in meta.get_all('Project-URL')}
            >= {'Documentation', 'Source', 'Issues', 'Changelog'})
    assert ([c for c in meta.get_all('Classifier') if re.search(r':: 3\.\d+$', c)]
            == [f'Programming Language :: Python :: 3.{n}' for n in (11, 12, 13)])
    assert (set(meta.get_all('Provides-Extra')) == {*EXTRAS}
            >= {'dev', 'docs', 'gguf', 'search', 'recover', 'ray', 'study', 'all'})
    asked = [Requirement(r) for r in meta.get_all('Requires-Dist')]
    assert {r.name for r in asked if not r.marker} == names(CFG['requirements'].split())
    assert b'Apache License' in next(v for k, v in files.items() if k.endswith('/LICENSE'))
    command = next(v for k, v in files.items() if k.endswith('/entry_points.txt')).decode()
    assert 'ffp = ffp_nb:command' in command


def test_extras_that_are_made_of_others_name_only_what_exists():
    own = [Requirement(r) for rs in EXTRAS.values() for r in rs if Requirement(r).name == 'ffp_nb']
    assert own and all(r.extras <= EXTRAS.keys() for r in own)
    assert (next(iter(Requirement(r) for r in EXTRAS['all'])).extras == EXTRAS.keys()
            - {'dev', 'docs', 'all'})


def imported(tree, lazy):
    "Packages that a module imports at once, or (lazy) when a function runs"
    inside = {n for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda))
              for n in ast.walk(f)}
    for n in ast.walk(tree):
        if isinstance(n, ast.Import) and (n in inside) == lazy:
            yield from (a.name.split('.')[0] for a in n.names)
        if isinstance(n, ast.ImportFrom) and not n.level and (n in inside) == lazy:
            yield n.module.split('.')[0]


def test_imports_are_required_and_optional_packages_wait_until_they_are_needed():
    base = names(CFG['requirements'].split())
    optional = {n for rs in EXTRAS.values() for n in names(rs)}
    for f in sources():
        tree = ast.parse(f.read_text(encoding='utf-8'))
        at_once, later = ({DISTS.get(n, n) for n in imported(tree, lazy)} - sys.stdlib_module_names
                          for lazy in (False, True))
        assert at_once <= base | {'ffp_nb'}, (f.name, at_once - base)
        assert later <= base | optional, (f.name, later - base - optional)


def use(module, name):
    "A name of a module that is only imported here: some take seconds"
    return getattr(importlib.import_module(f'ffp_nb.{module}'), name)


@pytest.mark.parametrize('package,extra,call',
                         [('cmaes', 'search', lambda: use('search.rivals', 'CMAES')(2)),
                          ('optuna', 'search', lambda: use('search.rivals', 'TPE')(2)),
                          ('xllamacpp', 'gguf',
                           lambda: use('export.gguf', 'LlamaCpp')('model.gguf')),
                          ('ray', 'ray', lambda: use('search.workers', 'import_ray')()),
                          ('peft', 'recover',
                           lambda: use('recover.train', '_lora')(
                               None, [], [], use('recover.train', 'Recipe')())),
                          ('nbclient', 'study', lambda: use('studies.registry', '_clients')())])
def test_what_is_optional_says_how_to_get_it(package, extra, call, monkeypatch):
    assert package in names(EXTRAS[extra])
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises((ImportError, ValueError), match=rf'pip install .ffp_nb\[{extra}\]'):
        call()


def test_version_and_licence_are_the_same_everywhere():
    cite = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    newest = re.search(r'^## \[([\d.]+)\]', (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8'),
                       re.M)[1]
    assert {ffp_nb.__version__, cite['version'], newest} == {CFG['version']}
    assert cite['license'] == CFG['license_spdx']
    assert ((cite['repository-code'], cite['url'])
            == (CFG['git_url'], CFG['doc_host'] + CFG['doc_baseurl']))


def test_citation_has_what_the_format_asks_for():
    cite = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    assert {'cff-version', 'message', 'title', 'authors'} <= cite.keys()
    assert all({'type', 'title', 'authors'} <= r.keys() for r in cite['references'])
    assert '2511.18977' in cite['references'][0]['url']


def workflow(name):
    return yaml.safe_load((ROOT / '.github' / 'workflows' / name).read_text(encoding='utf-8'))


@pytest.mark.parametrize('name', ['test.yaml', 'newest.yaml', 'deploy.yaml'])
def test_workflows_call_what_exists(name):
    targets = set(re.findall(r'^(\w+):', (ROOT / 'Makefile').read_text(encoding='utf-8'), re.M))
    steps = [s for job in workflow(name)['jobs'].values() for s in job['steps']]
    called = [s['run'].split() for s in steps if 'run' in s]
    assert called and {c[0] for c in called} == {'make'}
    assert all({w for w in c[1:] if '=' not in w} <= targets for c in called)
    assert {s['uses'].partition('/')[0] for s in steps if 'uses' in s} <= {'actions', 'quarto-dev'}


def test_workflow_runs_every_part_of_make_test():
    makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
    parts = re.search(r'^test: (.+)$', makefile, re.M)[1].split()
    steps = [s for job in workflow('test.yaml')['jobs'].values() for s in job['steps']]
    words = ' '.join(s['run'].removeprefix('make ') for s in steps if 'run' in s).split()
    assert sorted(w for w in words if '=' not in w) == sorted(parts)


def test_constraints_are_versions_of_everything_that_is_asked_for():
    lines = (ROOT / 'constraints.txt').read_text(encoding='utf-8').splitlines()
    lines = [x for x in lines if not x.startswith('#')]
    # no address, no path, no local build
    assert all(re.fullmatch(r'[\w.-]+==[\w.]+', x) for x in lines)
    pinned = {canonicalize_name(n): v for n, _, v in (x.partition('==') for x in lines)}
    wanted = [CFG['requirements'].split(), *EXTRAS.values()]
    asked = {canonicalize_name(r.name): r for rs in wanted for r in map(Requirement, rs)}
    assert asked.keys() - pinned.keys() == {'torch', 'ffp-nb'}  # the Makefile pins PyTorch
    assert all(r.specifier.contains(pinned[n]) for n, r in asked.items() if n in pinned)


def test_workflows_agree_with_the_settings():
    test, build = workflow('test.yaml')['jobs']['test'], workflow('deploy.yaml')['jobs']['build']
    assert (test['strategy']['matrix']['python']
            == re.findall(r'Python :: (3\.\d+)$', CFG['classifiers'], re.M))
    assert (next(s['with']['path'] for s in build['steps'] if 'upload-pages' in s.get('uses', ''))
            == CFG['doc_path'])
