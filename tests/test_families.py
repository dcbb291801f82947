"""Small models of our own: text that never mixes, trainings that resume, and the pipeline on all
of them"""
import io
import json
import subprocess
import tarfile

import numpy as np
import pytest
import torch

from ffp_nb.core.families import load_model
from ffp_nb.core.runs import CorruptFile, RunDir
from ffp_nb.pipeline.config import Profile
from ffp_nb.studies import families, twins
from ffp_nb.studies.cells import Lab
from ffp_nb.studies.families import STUDY
from ffp_nb.studies.study import run_study
from ffp_nb.studies.twins import (
    NAMES, Setup, django_docs, documents, make_tokenizer, small_model, split_documents,
    study_corpus, token_stream)

TOY = dict(text='pydoc', tokens=60_000, batch=8, lr=6e-3, vocab=400, hidden=48, layers=2,
           block_len=32)
CELLS = [(0.3, 'uniform', 0), (0.3, 'uniform-ffn', 0), (0.3, 'random', 0), (0.3, 'ffp', 0)]


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    "A folder with toy models of all families, their records and the runs of their searches"
    folder = tmp_path_factory.mktemp('families')
    with pytest.MonkeyPatch.context() as m:
        m.setitem(twins.SETUPS, 'smoke',
                  Setup(TOY, Profile(32, 16, 8, 8, 4, 1, 2, 8, 2), (1, 8)))
        run_study(STUDY, lab_in(folder), cells=CELLS)
        yield folder


def lab_in(folder, records=None):
    return Lab(folder, 'smoke', runs=records or folder, work=folder)


def archive(folder, files):
    with tarfile.open(folder / 'django-5.2.tar.gz', 'w:gz') as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f'Django-5.2/{name}')
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))


def killed_after(n):
    "A save of checkpoints that fails after n of them, as if the process had been killed"
    save, left = RunDir.save_checkpoint, [n]
    def saver(self, state):
        save(self, state)
        left[0] -= 1
        if not left[0]: raise KeyboardInterrupt
    return saver


def test_only_the_expected_manual_is_read(tmp_path, monkeypatch):
    files = {'docs/b.txt': 'two', 'docs/a/a.txt': 'one', 'docs/c.py': 'no', 'README.txt': 'no',
             'tests/d.txt': 'no'}
    archive(tmp_path, files)
    with pytest.raises(CorruptFile, match='Delete it'):
        django_docs(tmp_path)
    monkeypatch.setattr(twins, 'DJANGO_SHA256', twins.text_sha256({'a': 'one', 'b': 'two'}))
    assert django_docs(tmp_path) == {'docs/b.txt': 'two', 'docs/a/a.txt': 'one'}
    whole = (tmp_path / 'django-5.2.tar.gz').read_bytes()
    for n in (0, 20, len(whole) // 2):
        (tmp_path / 'django-5.2.tar.gz').write_bytes(whole[:n])
        with pytest.raises(CorruptFile, match='django-5.2.tar.gz.*Delete it'):
            django_docs(tmp_path)


def test_without_a_registry_the_error_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, 'run',
                        lambda
                        *a, **kw: subprocess.CompletedProcess(a, 1, '', 'No matching distribution'))
    with pytest.raises(OSError, match='No matching distribution.*text file of your own') as e:
        django_docs(tmp_path / 'new')
    assert not isinstance(e.value, FileNotFoundError) and not (tmp_path / 'new').exists()
    with pytest.raises(FileNotFoundError, match='no such file'):
        documents(str(tmp_path / 'none.txt'))


def test_nothing_of_a_training_document_is_tested():
    rng = np.random.default_rng(0)
    own = lambda: '\n\n'.join(' '.join(map(str, rng.integers(0, 99, 9))) for _ in range(8))
    docs = {f'd{i}': f'{own()}\n\nsaid\n {i % 7} in  many\n\nand {i}' for i in range(60)}
    train, held = split_documents(docs)
    assert not train.keys() & held.keys() and {**train, **held} == docs
    assert 0.12 <= sum(map(len, held.values())) / sum(map(len, docs.values())) < 0.15
    assert split_documents(docs)[1] == held != split_documents(docs, seed=1)[1]
    corpus = study_corpus(train, held, 'x')
    words = lambda text: {' '.join(p.split()) for p in text.split('\n\n')}
    splits = [words(corpus[s]) for s in corpus.texts]
    for i, a in enumerate(splits):
        for b in splits[:i]:
            assert not a & b
    unseen = words('\n\n'.join(held.values())) - words('\n\n'.join(train.values()))
    # those stand in both
    assert splits[2] | splits[3] == unseen and not any(p.startswith('said') for p in unseen)
    assert splits[0] | splits[1] == words('\n\n'.join(train.values()))


@pytest.mark.parametrize('family', NAMES)
def test_a_killed_training_ends_with_the_same_weights(family, tmp_path, monkeypatch):
    settings = TOY | dict(tokens=12_800)
    # a checkpoint every 20 of 50 steps
    monkeypatch.setattr(twins.train, '__defaults__', (20, True))
    whole = small_model(family, tmp_path / 'a', progress=False, **settings)
    with monkeypatch.context() as m:
        m.setattr(RunDir, 'save_checkpoint', killed_after(1))
        with pytest.raises(KeyboardInterrupt):
            small_model(family, tmp_path / 'b', progress=False, **settings)
    assert not (tmp_path / 'b' / whole.name).exists()
    # and again, when the model is on the disk and its record is not
    with monkeypatch.context() as m:
        m.setattr(twins, 'save_record', lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            small_model(family, tmp_path / 'b', progress=False, **settings)
    assert not (tmp_path / 'b' / whole.name).exists()
    again = small_model(family, tmp_path / 'b', progress=False, **settings)
    assert [p.name for p in (tmp_path / 'b').iterdir()] == [again.name] == [whole.name]
    a, b = (load_model(str(p), 'float32')[0].state_dict() for p in (whole, again))
    assert all(torch.equal(a[k], b[k]) for k in a)
    losses = [json.loads(next(p.glob('train-*.json')).read_text())['result']['losses']
              for p in (whole, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 50


def test_a_text_file_is_known_by_its_content(tmp_path):
    folders = [tmp_path / n for n in 'abc']
    topics = '\n\n'.join(documents('pydoc').values())
    for folder, text in zip(folders, (topics, topics, topics + '\n\nmore')):
        folder.mkdir()
        (folder / 'own.txt').write_text(text)
    settings = TOY | dict(tokens=256, batch=1)
    a, b, c = (small_model('opt', f, progress=False, **(settings | dict(text=str(f / 'own.txt'))))
               for f in folders)
    assert a.name == b.name != c.name
    assert str(tmp_path) not in next(a.glob('train-*.json')).read_text()


@pytest.mark.parametrize('family', NAMES)
def test_pipeline(study, family):
    table, by_name = STUDY.read(study)
    dense, table = by_name[f'{family}-dense']['result'], table[table.family == family]
    # it learned more than frequencies
    assert np.mean(dense['nll']['none']) < np.mean(dense['unigram']) - 0.1
    groups = dict(opt=8, llama=4, mistral=2)[family]
    assert np.array(dense['full'])[:, 0].tolist() == [groups] * 2
    pruned = table[table.policy != 'dense']
    assert (sorted(set(pruned.policy)) == sorted(c[1] for c in CELLS)
            and len(pruned) == 3 * len(CELLS))
    over = pruned.realised - 0.3
    assert (over >= -1e-9).all() and (over < dense['step_share']).all()
    # the repairs differ
    assert np.isfinite(pruned.nll).all() and (pruned.groupby('policy').nll.nunique() == 3).all()
    base = pruned[pruned.policy == 'uniform-ffn']
    assert (base.gain == 0).all() and base.realised.nunique() == 1
    trip = by_name[f'{family}-round-trip']['result']
    assert trip['difference'] == 0 and trip['same_tokens'] and trip['bytes'] < trip['dense_bytes']


def test_nothing_held_out_is_trained_on(study):
    docs = list(split_documents(documents('pydoc'))[0].values())
    tokenizer = make_tokenizer(docs, TOY['vocab'])
    for f in (study / 'models').glob('opt-*'):
        found = json.loads(next(f.glob('train-*.json')).read_text())['result']
        assert load_model(str(f), 'float32')[1].get_vocab() == tokenizer.get_vocab()
        assert (found['text_tokens'] == len(token_stream(tokenizer, docs))
                and len(found['losses']) == TOY['tokens'] // 256)


def test_records_name_no_folder_of_this_machine(study):
    for f in (study / 'families').glob('*.json'):
        assert str(study) not in f.read_text()


def test_the_record_of_a_training_is_kept_as_it_was_made(study):
    for name in NAMES:
        kept = next((study / 'families').glob(f'train-{name}-*.json'))
        made = next((study / 'models').glob(f'{name}-*/{kept.name}'))
        assert kept.read_bytes() == made.read_bytes()
        assert json.loads(kept.read_text())['forward_tokens'] == TOY['tokens'] // 256 * 256


def test_a_second_run_computes_nothing(study, monkeypatch):
    before = {f: f.stat().st_mtime_ns for f in (study / 'families').glob('*.json')
              if not f.name.startswith('train-')}
    monkeypatch.setattr(twins, 'train', lambda *a, **kw: 1 / 0)
    for name in ('find_widths', 'save_pruned'):
        monkeypatch.setattr(families, name, lambda *a, **kw: 1 / 0)
    run_study(STUDY, lab_in(study), cells=CELLS)
    assert ({f: f.stat().st_mtime_ns for f in before} == before
            and len(before) == len(NAMES) * (len(CELLS) + 2))


def test_two_records_of_one_name_are_refused(study, tmp_path):
    f = next((study / 'families').glob('opt-uniform-0.3-0-*.json'))
    (tmp_path / 'families').mkdir()
    (tmp_path / 'families' / f.name).write_bytes(f.read_bytes())
    STUDY.read(tmp_path)
    (tmp_path / 'families/opt-uniform-0.3-0-0000000000.json').write_bytes(f.read_bytes())
    with pytest.raises(ValueError, match='opt-uniform-0.3-0'):
        STUDY.read(tmp_path)


def test_records_of_another_training_are_refused(study, tmp_path):
    f = next((study / 'families').glob('opt-dense-*.json'))
    record = json.loads(f.read_text())
    record['result']['weights'] = '0' * 16
    (tmp_path / 'families').mkdir()
    (tmp_path / 'families' / f.name).write_text(json.dumps(record))
    with pytest.raises(ValueError, match='another opt'):
        run_study(STUDY, lab_in(study, tmp_path), cells=CELLS)
    found = sorted(p.name[:9] for p in (tmp_path / 'families').iterdir())
    assert found == ['opt-dense', 'train-opt']
