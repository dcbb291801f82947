"Text that goes in: files, folders, data sets and the hub, and how it is cut into blocks"
import gzip
import json
import math
import os
import socket
import time
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError

from ffp_nb.core import text as texts
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import tiny_model, tiny_tokenizer
from ffp_nb.core.perplexity import paired_interval, perplexity
from ffp_nb.core.text import (
    SPLITS, Blocks, Convention, load_corpus, paragraphs, read_text, split_text, token_blocks)
from ffp_nb.search.loop import Evaluator

PARTS = [f'{i}. Paragraph with é and € of\ntwo lines' for i in range(60)]
TEXT = '\n\n'.join(PARTS)
WANT = split_text(TEXT)


def refused(name, *words, error=(ValueError, OSError)):
    "One line that holds these words"
    with pytest.raises(error) as e:
        load_corpus(str(name))
    assert '\n' not in str(e.value)
    for word in words:
        assert word in str(e.value), f'{word!r} not in: {e.value}'


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail('a local name must not ask the network')
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', refuse)


# Paragraphs

@pytest.mark.parametrize('blank', ['\n\n', '\n \n', '\n\t\n', '\n \t \n', '\n\xa0\n', '\n\u3000\n'])
def test_blank_lines_separate_paragraphs(blank):
    assert split_text(blank.join(PARTS)) == WANT


def test_cuts_of_plain_text_are_as_before():
    "Records hold hashes of the splits"
    for case in ('a\n\n\nb', '\n\na\n\n\n\nb\n', 'a \n\n b', '\n', ''):
        assert paragraphs(case) == case.split('\n\n')
    assert paragraphs('a\n \n \nb') == ['a', ' \nb']


def test_text_without_paragraphs_says_so(tmp_path):
    (tmp_path / 'a.txt').write_text('one line\n' * 500)
    refused(tmp_path / 'a.txt', '1 different paragraphs', 'blank lines')


# Encodings and compression

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be',
                                      'utf-32'])
@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
@pytest.mark.parametrize('packed', [False, True])
def test_encodings(tmp_path, encoding, end, packed):
    data = TEXT.replace('\n', end).encode(encoding)
    path = tmp_path / ('a.txt.gz' if packed else 'a.txt')
    path.write_bytes(gzip.compress(data) if packed else data)
    assert read_text(path) == TEXT and load_corpus(str(path)).texts == WANT


@pytest.mark.parametrize('content, words', [
    (TEXT.encode('latin-1', errors='replace'), ('not UTF-8', 'iconv')),
    (bytes(range(256)) * 20, ('not UTF-8', 'Convert')),
    (TEXT.encode() + b'\0', ('binary file', 'Give')),
    (gzip.compress(TEXT.encode())[:200], ('damaged gzip', 'again')),
    (b'PK\x03\x04' + bytes(100), ('zip archive', 'Unpack')),
    (b'%PDF-1.7 ' + bytes(100), ('PDF', 'Unpack or export')),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n', ('git lfs pull',)),
    (b'', ('empty', 'Give')),
])
def test_what_is_no_text(tmp_path, content, words):
    for name in ('a.txt', 'a.jsonl'):
        (tmp_path / name).write_bytes(content)
    refused(tmp_path / 'a.txt', 'a.txt', *words)
    refused(tmp_path / 'a.jsonl', 'a.jsonl')


# Rows

def write_rows(path, rows):
    frame = pd.DataFrame(rows)
    kind = path.name.removesuffix('.gz').rpartition('.')[2]
    if kind == 'arrow':
        datasets.Dataset.from_pandas(frame).save_to_disk(path.parent / 'saved')
        next((path.parent / 'saved').glob('*.arrow')).rename(path)
    elif kind == 'parquet':
        frame.to_parquet(path)
    elif kind in ('csv', 'tsv'):
        frame.to_csv(path, index=False, sep=',' if kind == 'csv' else '\t')
    else:
        frame.to_json(path, orient='records', lines=kind != 'json')


KINDS = 'parquet', 'arrow', 'jsonl', 'json', 'csv', 'tsv', 'jsonl.gz', 'csv.gz'


@pytest.mark.parametrize('kind', KINDS)
def test_files_of_rows(tmp_path, kind):
    "Also where the name of a folder would be a pattern"
    folder = tmp_path / 'a [1]*'
    folder.mkdir()
    write_rows(folder / f'data.{kind}', dict(id=range(len(PARTS)), text=PARTS))
    assert load_corpus(str(folder / f'data.{kind}')).texts == WANT
    write_rows(folder / f'data.{kind}', dict(title=PARTS, body=PARTS))
    refused(folder / f'data.{kind}', f'data.{kind}', 'no column "text" among title, body', 'Rename')
    write_rows(folder / f'data.{kind}', dict(text=range(60)))
    refused(folder / f'data.{kind}', f'data.{kind}', 'holds int, not text', 'Give')


@pytest.mark.parametrize('kind', ['parquet', 'arrow', 'jsonl', 'json'])
def test_damaged_rows(tmp_path, kind):
    (tmp_path / f'a.{kind}').write_bytes(b'PAR1 {"text": [1, 2' * 9)
    refused(tmp_path / f'a.{kind}', f'a.{kind}', 'cannot be read', 'Mend')


def test_lines_without_text_are_left_out(tmp_path):
    rows = [dict(text=p) if i % 2 else dict(text=p, note=i) for i, p in enumerate(PARTS)]
    rows[3:3] = [dict(text=None, note=1)]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    assert load_corpus(str(tmp_path / 'a.jsonl')).texts == WANT


@pytest.mark.parametrize('kind', ['parquet', 'jsonl', 'txt', 'csv.gz'])
def test_folders(tmp_path, kind, monkeypatch):
    "By absolute path and by a relative one; hidden files and descriptions are no text"
    (tmp_path / 'corpus' / 'data').mkdir(parents=True)
    for i in range(3):
        path, part = tmp_path / 'corpus' / 'data' / f'{i}.{kind}', PARTS[20 * i:20 * i + 20]
        if kind == 'txt':
            path.write_text('\n\n'.join(part))
        else:
            write_rows(path, dict(text=part))
    (tmp_path / 'corpus' / 'README.md').write_text('A data card.')
    (tmp_path / 'corpus' / 'dataset_infos.json').write_text('{"a": 1}')
    (tmp_path / 'corpus' / '.cache').mkdir()
    (tmp_path / 'corpus' / '.cache' / 'a.txt').write_text('not this')
    corpus = load_corpus(str(tmp_path / 'corpus'))
    assert corpus.texts == WANT and corpus.name == 'corpus'
    monkeypatch.chdir(tmp_path)
    for name in ('corpus', './corpus', 'corpus/data'):
        assert load_corpus(name).texts == WANT


def test_data_set_saved_to_disk(tmp_path):
    datasets.Dataset.from_dict(dict(text=PARTS)).save_to_disk(tmp_path / 'saved')
    assert load_corpus(str(tmp_path / 'saved')).texts == WANT


def test_folder_without_text(tmp_path):
    (tmp_path / 'a.py').write_text('1')
    refused(tmp_path, str(tmp_path), 'a folder without text', '.parquet', 'Give')


def test_no_more_than_is_needed_is_read(tmp_path, monkeypatch):
    write_rows(tmp_path / 'a.jsonl', dict(text=PARTS))
    limit = sum(map(len, PARTS[:40]))
    monkeypatch.setattr(texts, 'MOST_CHARS', limit)
    monkeypatch.setattr(texts._texts, '__defaults__', (limit,))
    assert load_corpus(str(tmp_path / 'a.jsonl')).texts == split_text('\n\n'.join(PARTS[:40]))
    (tmp_path / 'b.txt').write_text('not reached')
    assert load_corpus(str(tmp_path)).texts == split_text('\n\n'.join(PARTS[:40]))


# Names

@pytest.mark.parametrize('name, words', [
    ('data/my.txt', ('no folder data',)), ('corpora/wiki.parquet', ('no folder corpora',)),
    ('here/mytext', ('no such file or folder', 'Is it my-text?')), ('a/b/c', ('no folder a/b',)),
    ('./wiki', ('no such file or folder',)), ('~/no/such', ('no such file: there is no folder',)),
    ('/no/such.txt', ('there is no folder /no',)), ('wikitex2', ('Is it wikitext2?',)),
    ('here/my-text/x', ('no such file or folder',)), ('a b/c', ('no folder a b',)),
])
def test_misspelt_paths_do_not_ask_the_hub(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'here').mkdir()
    (tmp_path / 'here' / 'my-text').write_text(TEXT)
    start = time.perf_counter()
    refused(name, name, 'no such file', "Give 'wikitext2', 'pydoc', a text file", *words,
            error=FileNotFoundError)
    assert time.perf_counter() - start < 1


# The hub

class Hub:
    "Stands for the hub: splits of rows, and how many of them were read"
    def __init__(self, monkeypatch, rows, offline=False, error=None):
        self.rows, self.error, self.calls, self.read = rows, error, [], {}
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', offline)
        monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', self.info)
        monkeypatch.setattr(datasets, 'load_dataset', self.load)

    def info(self, name, timeout=None):
        self.calls.append(('info', name, timeout))
        if self.error is not None: raise self.error

    def load(self, name, config=None, split=None, streaming=False):
        self.calls.append(('load', name, config, split, streaming))
        if name != 'owner/set' and name != 'Salesforce/wikitext':
            raise ConnectionError("Couldn't reach it\non the Hub")
        def stream():
            for n, row in enumerate(self.rows[split], 1):
                self.read[split] = n
                yield row
        return stream()


def test_hub_data_sets_are_streamed(monkeypatch):
    hub = Hub(monkeypatch, dict(train=[dict(text=p) for p in PARTS]))
    corpus = load_corpus('owner/set:small')
    assert corpus.texts == WANT and corpus.name == 'owner/set:small'
    assert hub.calls == [('info', 'owner/set', texts.HUB_SECONDS),
                         ('load', 'owner/set', 'small', 'train', True)]
    load_corpus('owner/set')
    assert hub.calls[-1] == ('load', 'owner/set', None, 'train', True)


def test_hub_data_sets_are_read_up_to_what_is_needed(monkeypatch):
    row = 'x' * 10_000
    hub = Hub(monkeypatch, dict(train=({'text': f'{i} {row}'} for i in range(10**9))))
    corpus = load_corpus('owner/set')
    assert 1 <= sum(map(len, corpus.texts.values())) / texts.MOST_CHARS < 1.01
    assert hub.read['train'] <= texts.MOST_CHARS / 10_000


def test_wikitext2_is_read_up_to_what_is_needed(monkeypatch):
    "The result is that of the whole text"
    monkeypatch.delenv('FFP_DATA_DIR', raising=False)
    lines = {s: ['', ' = Heading = \n'] + [f' {s} {i} é and so on \n' for i in range(n)]
             for s, n in dict(train=90_000, validation=9_000, test=2_000).items()}
    hub = Hub(monkeypatch, {s: [dict(text=x) for x in rows] for s, rows in lines.items()})
    hub.rows['train'][50_000:50_000] = [dict(text='\n = Next = \n')]
    found = load_corpus('wikitext2').texts
    train = ''.join(r['text'] for r in hub.rows['train']).encode()[:1_000_000]
    assert (found['calibration'] + found['search']).encode() == train
    assert found['selection'].encode() == ''.join(lines['validation']).encode()[:100_000]
    assert found['test'] == ''.join(lines['test']) and hub.read['test'] == 2_002
    assert hub.read['train'] < 60_000 and hub.read['validation'] < 9_000
    assert all(c[-1] for c in hub.calls if c[0] == 'load')


def missing_repository():
    e = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    Exception.__init__(e, '401 Client Error\nRepository Not Found')
    return e


@pytest.mark.parametrize('error, offline, words', [
    (missing_repository(), False, ('the hub has no such data set', 'private')),
    (OSError('Name or\nservice'), False, ('does not give it (Name or service)',)),
    (TimeoutError(), False, ('does not give it (TimeoutError)',)),
    (None, False, ("Couldn't reach it on the Hub",)),
    (None, True, ('HF_HUB_OFFLINE is set',)),
])
def test_hub_names_that_lead_nowhere(monkeypatch, error, offline, words):
    hub = Hub(monkeypatch, {}, offline, error)
    refused('nosuch/thing', 'nosuch/thing', 'no such file or folder here', "'owner/name'", *words,
            error=FileNotFoundError)
    assert [c[0] for c in hub.calls] == ['info'] * (not offline) + ['load'] * (error is None)
    monkeypatch.delenv('FFP_DATA_DIR', raising=False)
    monkeypatch.setattr(hub, 'load', lambda *a, **kw: pytest.fail('not after the first answer'))
    if error is not None:
        refused('wikitext2', 'FFP_DATA_DIR', 'pydoc', *words, error=FileNotFoundError)


def test_offline_data_sets_come_from_the_cache(monkeypatch):
    hub = Hub(monkeypatch, dict(train=[dict(text=p) for p in PARTS]), offline=True)
    assert load_corpus('owner/set').texts == WANT
    assert hub.calls == [('load', 'owner/set', None, 'train', False)]


def test_columns_of_a_hub_data_set(monkeypatch):
    Hub(monkeypatch, dict(train=[dict(prompt='a', answer='b')]))
    refused('owner/set', 'no column "text" among prompt, answer')


# Blocks that overlap

def by_hand(model, ids, n, stride, bos=None):
    "Nats of every token but the first, each alone, in one long sliding evaluation"
    out, last = {}, 0
    body = n - (bos is not None)
    for start in range(0, len(ids) - body + 1, stride):
        block = ([bos] if bos is not None else []) + ids[start:start + body]
        logp = model(torch.tensor([block])).logits[0].log_softmax(-1)
        for j in range(1, n):
            token = start + j - (bos is not None)
            if token >= last:
                out[token] = -float(logp[j - 1, block[j]])
        last = start + body
    return out


@pytest.mark.parametrize('bos', [False, True])
@pytest.mark.parametrize('n, stride, tokens', [(64, 32, 256), (64, 32, 250), (64, 10, 256),
                                               (64, 1, 80), (64, 63, 256), (16, 5, 16)])
@torch.inference_mode()
def test_every_token_is_predicted_once(n, stride, tokens, bos):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids = torch.randint(3, 211, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    blocks = token_blocks(' '.join(f'w{i}' for i in ids), tokenizer, Convention(n, stride, bos))
    want = by_hand(model, ids, n, min(stride, n - bos), tokenizer.bos_token_id if bos else None)
    read = (len(blocks) - 1) * min(stride, n - bos) + n - bos  # tokens of the text
    assert sorted(want) == list(range(not bos, read)) and read > tokens - min(stride, n - bos)
    for batch in (1, 3):
        found = perplexity(model, blocks, batch)
        assert found.tokens == len(want) == blocks.counts.sum()
        assert found.mean_nll == pytest.approx(np.mean(list(want.values())), rel=1e-5)
        assert found.ppl == pytest.approx(math.exp(found.mean_nll))
    if (n, stride, tokens, bos) == (64, 32, 256, False):
        assert found.tokens == 255  # were 224


@torch.inference_mode()
def test_slices_of_overlapping_blocks():
    "A block keeps its figure in whatever order and company it is measured"
    model, tokenizer = tiny_model(), tiny_tokenizer()
    text = ' '.join(f'w{i * 37 % 208 + 3}' for i in range(300))
    blocks = token_blocks(text, tokenizer, Convention(32, 8), n=12)
    each = perplexity(model, blocks)
    assert each.counts.tolist() == [31] + [8] * 11
    for idx in ([5, 0, 3], np.array([0]), slice(1, 4), slice(None, 2), 7, 0, torch.tensor([2, 0])):
        part = perplexity(model, blocks[idx], batch=2)
        np.testing.assert_allclose(part.nll, np.atleast_1d(each.nll[idx]), rtol=1e-6)
        assert part.tokens == np.sum(each.counts[idx])
    assert blocks[1:][0].counts.tolist() == [8] and len(blocks[0]) == 1
    pool = Evaluator(ElasticModel(model), blocks)
    np.testing.assert_allclose(pool.dense([4, 0, 9]), each.nll[[4, 0, 9]], rtol=1e-6)
    assert paired_interval(each.nll, each.nll) == (0, 0)


@torch.inference_mode()
def test_blocks_that_do_not_overlap_are_as_before():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    text = ' '.join(f'w{i * 37 % 208 + 3}' for i in range(300))
    blocks = token_blocks(text, tokenizer, Convention(32, 32))
    assert blocks.whole is None and blocks.scored == 31 and blocks.counts.tolist() == [31] * 9
    found = perplexity(model, blocks, 2)
    assert found.counts is None and found.tokens == 9 * 31 and type(found.tokens) is int
    assert found.mean_nll == float(np.mean(found.nll))
    np.testing.assert_allclose(
        found.nll, [float(model(i[None], labels=i[None]).loss) for i in blocks.ids], rtol=1e-5)
    some = Blocks(blocks.ids, 10)  # only their last tokens, the first block too
    assert perplexity(model, some).tokens == 90 and some[2:5].counts.tolist() == [10] * 3


@pytest.mark.parametrize('stride', [0, -1, 65])
def test_strides_without_sense(stride):
    with pytest.raises(ValueError, match=f'block_len 64, stride {stride}: expected'):
        Convention(64, stride)


def test_embedded_text_is_the_recorded_one():
    "Plain blank lines only, so the rule for others changes no record"
    from pydoc_data.topics import topics
    whole = '\n\n'.join(topics[k] for k in sorted(topics))
    assert paragraphs(whole) == whole.split('\n\n')
    assert list(load_corpus('pydoc').texts) == list(SPLITS)


@pytest.mark.skipif('FFP_DATA_DIR' not in os.environ, reason='no WikiText-2 here')
def test_wikitext2_is_the_recorded_one():
    runs = Path(__file__).parent.parent / 'nbs/runs/spine'
    record = json.loads(next(runs.glob('spine-ffp-0.3-0*.json')).read_text())
    assert load_corpus('wikitext2').sha256 == record['config']['text_sha256']
