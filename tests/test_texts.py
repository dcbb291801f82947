"The study of calibration texts: policies are calibrated on one text and judged on two"
import json

import numpy as np
import pandas as pd
import pytest
import torch

from ffp_nb.core.text import Blocks, Corpus, split_text
from ffp_nb.pipeline.config import Profile
from ffp_nb.studies import methods, texts
from ffp_nb.studies.cells import Lab, known_models, repairs
from ffp_nb.studies.distillation import other_text
from ffp_nb.studies.methods import method_cell
from ffp_nb.studies.study import count_records, read_records, run_study
from ffp_nb.studies.twins import SETUPS, Setup

TOY = dict(text='pydoc', tokens=20_000, batch=8, lr=6e-3, vocab=400, hidden=48, layers=2,
           block_len=32)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setitem(SETUPS, 'smoke', Setup(TOY, Profile(32, 50, 8, 8, 4, 1, 2, 8, 2), (1, 8)))
    monkeypatch.setattr(texts, 'MODEL', 'llama')
    monkeypatch.setattr(texts, 'FIRST', 6)
    monkeypatch.setattr(texts, 'SEEDS', {'even FFN cut': (1, 1)})
    monkeypatch.setattr(texts, 'EVEN', 'even FFN cut')
    monkeypatch.setattr(texts, 'HERE', 0)  # searches at another target
    return Lab(tmp_path, 'smoke', runs=tmp_path, work=tmp_path)


def test_a_policy_is_judged_on_both_texts_with_the_repair_of_its_calibration(
        lab, tmp_path, monkeypatch):
    words = 'a pruned model forgets what its calibration never read', 'and more of the same'
    (second := tmp_path / 'second.txt').write_text('\n\n'.join(
        f'{i} {words[i % 2]} {i * i}' for i in range(3000)))
    monkeypatch.setattr(texts, 'TEXTS', {str(second): 'second', 'pydoc': 'help topics'})
    monkeypatch.setattr(texts, 'OWN', str(second))
    run_study(texts.STUDY, lab)
    (record,), (pilot,) = (read_records(tmp_path / 'texts', start) for start in ('llama', 'pilot'))
    nll, widths = record['result']['nll'], np.array(record['result']['widths'])
    bench = lab.bench('llama', 'wanda')
    fitted = repairs(bench, widths)['sequential']
    for name in (str(second), 'pydoc'):
        want = bench.perplexity(widths, other_text(bench, name).test[:6], fitted).nll
        np.testing.assert_allclose(nll[name], want, atol=1e-4)
    assert abs(np.mean(nll[str(second)]) - np.mean(nll['pydoc'])) > 0.1
    assert pilot['result']['nll'].keys() == {f'{t}{s}' for t in nll for s in ('', ' selection')}
    assert pilot['result']['nll']['pydoc'] == nll['pydoc']
    have, wanted = count_records(texts.STUDY, lab)
    assert have == wanted
    # the same policy on a text that nothing has seen
    corpus = Corpus('made', split_text('\n\n'.join(f'{i * 7} {words[i % 2]}' for i in range(3000))))
    monkeypatch.setattr(texts, 'JUDGED', ('even FFN cut',))
    monkeypatch.setattr(texts, 'UNSEEN', {'made': 'a made text'})
    monkeypatch.setattr(texts, 'unseen', lambda name, folder: corpus)
    monkeypatch.setattr(texts, 'wanted', lambda text: [
        ('even FFN cut', *method_cell('llama', 'even FFN cut', 0.5, 0))])
    monkeypatch.setattr(methods, 'find_policies', lambda runs: lambda order, cell: record)
    run_study(texts.STUDY, lab)
    (judged,) = read_records(tmp_path / 'texts', 'unseen')
    assert judged['config']['of'] == record['config_id']
    want = bench.perplexity(widths, other_text(bench, corpus).test[:6], fitted).nll
    np.testing.assert_allclose(judged['result']['nll']['made'], want, atol=1e-4)
    assert judged['result']['test_sha256'] == {'made': corpus.sha256['test']}
    # what is left at the first token is what a pass over a whole block has there
    (first,) = (r['result'] for r in read_records(tmp_path / 'texts', 'first'))
    at = {str(second): 'own', 'pydoc': 'other', 'made': 'unseen'}
    assert first['first'].keys() == first['lost'].keys() == at.keys()
    for name in at:
        blocks = other_text(bench, corpus if name == 'made' else name).test[:6]
        norms = []
        for policy, weights in ((widths, fitted), (bench.cost.full, None)):
            with bench.elastic.at(policy, weights), torch.inference_mode():
                found = bench.elastic.model(blocks.ids, output_hidden_states=True).hidden_states
            norms.append(torch.stack(found[1:-1])[:, :, 0].float().norm(dim=-1).amax(0).numpy())
        np.testing.assert_allclose(first['first'][name], norms[0] / norms[1], atol=0.01)
    ids = other_text(bench, corpus).test[:6].ids
    bos = torch.full((6, 1), bench.tokenizer.bos_token_id)
    want = bench.perplexity(widths, Blocks(torch.cat([bos, ids], 1), ids.shape[1] - 1), fitted).nll
    np.testing.assert_allclose(first['nll']['made'], want, atol=1e-4)
    # texts begun at places of a token that is said to have lost its norm
    gone, flat, n = ids.flatten().mode().values, ids.flatten(), ids.shape[1]
    monkeypatch.setattr(texts, '_norms', lambda bench, widths, weights, tokens: np.where(
        (tokens == gone) & (weights is not None), 0.1, 1.0))
    monkeypatch.setattr(texts, 'STARTS', 5)
    found = texts._measure_starts(bench, widths, 6, tmp_path)
    places = [i for i in range(len(flat) - n + 1) if flat[i] == gone]
    assert len(places) > 5 == len(found['alone'])
    assert found['tokens'] == [bench.tokenizer.decode([gone])] * 5
    for j, i in ((0, places[0]), (-1, places[-1])):  # from the first place to the last
        row = flat[None, i:i + n]
        for k, x in (('alone', row), ('behind', torch.cat([bos[:1], row], 1))):
            want = bench.perplexity(widths, Blocks(x, n - 1), fitted).nll
            np.testing.assert_allclose(found[k][j], want, atol=1e-4)
    monkeypatch.setattr(texts, '_norms', lambda *a: np.ones(len(a[-1])))
    assert texts._measure_starts(bench, widths, 6, tmp_path) == dict(tokens=[])


def test_a_lab_knows_a_model_on_each_text(tmp_path):
    def write(folder, text, sha):
        (tmp_path / folder).mkdir()
        config = dict(model='smollm2', text=text, text_sha256=sha, dtype='bfloat16',
                      convention=dict(bos=False))
        (tmp_path / folder / 'a.json').write_text(json.dumps(
            dict(config=config, result=dict(weights='w'))))
    write('main', 'wikitext2', dict(test='1'))
    write('texts', 'pydoc', dict(test='2'))
    assert known_models(tmp_path)['smollm2', 'pydoc'] == (dict(test='2'), 'w', 'bfloat16', False)
    lab = Lab(tmp_path, runs=tmp_path, dry=True)
    other = lab.like(text='pydoc', calibration_blocks=64)
    assert lab.facts('smollm2').text_sha256 == dict(test='1')
    facts = other.facts('smollm2')
    assert facts.text_sha256 == dict(test='2') and facts.config.text == 'pydoc'
    assert facts.config.profile.calibration_blocks == 64
    assert lab.config('smollm2').text == 'wikitext2'  # the first lab is as it was


def test_an_unseen_text_that_is_not_here_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv('FFP_DATA_DIR', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='lambada_openai.jsonl is not here. Set FFP_DATA_D'):
        texts.unseen('lambada', tmp_path)
    (tmp_path / 'zero-shot').mkdir()
    rows = [dict(context=f'passage {i} of a', continuation='novel') for i in range(400)]
    (tmp_path / 'zero-shot' / 'lambada_openai.jsonl').write_text(
        '\n'.join(map(json.dumps, rows)))
    assert texts.unseen('lambada', tmp_path)['test'].startswith('passage ')
    assert ' of a novel\n\npassage ' in texts.unseen('lambada', tmp_path)['test']


def test_comparisons_are_told_without_the_blocks_that_break_a_policy():
    rows, base = [], np.linspace(4, 5, 10)
    for name, offsets in (('default', [0, 0]), (texts.DAMPED, [-0.1, -0.1]),
                          (texts.PAPER, [0.2, 0.3])):
        for seed, d in enumerate(offsets):
            rows.append(dict(calibrated='wikitext2', judged='pydoc', method=name, seed=seed,
                             blocks=base + d))
    more = pd.DataFrame(columns=[*rows[0], 'sparsity'])
    assert texts._broken(pd.DataFrame(rows), more) == []
    rows[1]['blocks'] = base + np.where(np.arange(10) == 3, 5.0, 0)  # seed 1 of the default
    first, second = texts._broken(pd.DataFrame(rows), more)
    assert 'Of 6 judgements that is so in 1: default, σ = 0.5, calibrated on WikiText-2, seed 1: ' \
           '1 of 10 blocks (help topics).' in first
    assert "*default* against *paper's recipe* 0.250 ± 0.635 (help topics)" in second
    assert '*default, damped order* against *default* 0.100 ± 0.000 (help topics)' in second


def test_blocks_that_break_are_traced_to_their_first_token():
    base, rows = np.linspace(4, 5, 8), []
    for name, seed, judged in ((m, s, j) for m in (texts.PAPER, 'default') for s in (0, 1)
                               for j in ('wikitext2', 'lambada')):
        up = 0.3 * (name == texts.PAPER) + 0.01 * seed
        rows.append(dict(method=name, seed=seed, judged=judged, kept=np.ones(8), lost=0.0, bos=1.0,
                         dense=24_000.0, blocks=base + up,
                         behind=base + up + 0.02 if judged == 'lambada' else None))
    (why, behind) = texts._why(pd.DataFrame(rows))
    assert ('24,000 at the median first token, a massive activation. Of 64 judged blocks of 4 '
            'policies, 0 begin') in why and '0 of these break, and 0 of the 64 others' in why
    assert "0 of the 32 blocks of novels and Django's manual break, without it 0" in behind
    assert 'change by +0.020 nats' in behind
    assert "*default* against *paper's recipe* 0.300 ± 0.000 (novels)" in behind
    rows[7] |= dict(lost=0.1, kept=np.where(np.arange(8) < 2, 0.1, 1),  # two tokens, one block
                    blocks=base + np.where(np.arange(8) == 1, 5.0, 0))
    (why, behind) = texts._why(pd.DataFrame(rows))
    assert '2 begin with a token' in why and '1 of these break, and 0 of the 62 others' in why
    assert why.endswith("*paper's recipe* 0.0% / 0.0%; *default* 0.0% / 5.0%.")
    assert "0 of the 32 blocks of novels and Django's manual break, without it 1" in behind
    assert 'Policies of which a block breaks: 1.' in why
    assert texts._why(pd.DataFrame(rows[:0])) == []
    shown = texts.draw_first(pd.DataFrame(rows)).axes[0]
    assert [len(c.get_offsets()) for c in shown.collections] == [32, 32]


def test_texts_that_begin_with_a_lost_token_are_compared_with_the_same_behind_bos():
    none = pd.DataFrame(columns=['method', 'seed', 'tokens', 'alone', 'behind'])
    assert texts._begun(none) == []
    base = np.linspace(4, 5, 3)
    rows = pd.DataFrame([
        dict(method='default', seed=2, tokens=['\n', ' "', '\n'], alone=base + [5, 0, 4],
             behind=base),
        dict(method=texts.DAMPED, seed=1, tokens=[], alone=np.array([]), behind=np.array([]))])
    (line,) = texts._begun(rows)
    assert line.endswith("behind BOS: default, seed 2: +3.00 nats, more than 3 at 2 of 3 places "
                         "(`'\\n'`, `' \"'`).")
