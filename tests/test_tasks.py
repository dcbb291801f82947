"""Zero-shot evaluation: the right prompts, the right score, the right documents, and nothing else
touched"""
import json
import random

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import tiny_model, tiny_tokenizer
from ffp_nb.core.runs import CorruptFile, cached
from ffp_nb.export.hf import open_model, save_pruned
from ffp_nb.pipeline.tasks import (
    DEV_SHARE, SEVEN, TASKS, TaskSet, load_tasks, paired, part_of, score_table, zero_shot)

NAMES = dict(openbookqa='openbook_qa')


def words(rng, n):
    return ' '.join(f'w{i}' for i in rng.integers(3, 211, n))


def line(task, rng):
    "A random document as the local files have it"
    text, choices = words(rng, 9), [words(rng, k) for k in rng.permutation(5)[:4] + 1]
    gold = int(rng.integers(2))
    if task == 'boolq':
        return dict(query=f'Passage: {text}\nQuestion: {words(rng, 3)}?', choices=['no', 'yes'],
                    gold=gold)
    if task == 'piqa': return dict(query=f'Question: {text}\n', choices=choices[:2], gold=gold)
    if task == 'hellaswag':
        return dict(query=f'Label {text[:4]}: {text}. {words(rng, 2)}', choices=choices, gold=gold)
    if task == 'winogrande':
        return dict(context_options=[f'{text} {c}' for c in choices[:2]],
                    continuation=words(rng, 3), gold=gold)
    if task == 'lambada_openai': return dict(context=text, continuation=words(rng, 1))
    return dict(query='Question: ' * task.startswith('arc') + text, choices=choices, gold=gold)


def write(folder, task, lines):
    path = folder / 'zero-shot' / f'{NAMES.get(task, task)}.jsonl'
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(''.join(json.dumps(o) + '\n' for o in lines))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    for task in TASKS:
        write(folder, task, [line(task, rng) for _ in range(12)])
    return folder


@pytest.fixture(scope='module')
def model():
    return tiny_model('llama', seed=1)


def run(model, tasks=TASKS, tokenizer=None, **kw):
    return zero_shot(model, tokenizer or tiny_tokenizer(), tasks, **dict(progress=False) | kw)


def scores(t):
    return t.attrs['scores']


def docs(tasks):
    return {n: list(t.eval_docs) for n, t in tasks.tasks.items()}


# Scores

def likelihood(model, context, answer):
    "Written from the definition"
    tokenizer = tiny_tokenizer()
    ids, n = tokenizer(context + answer).input_ids, len(tokenizer(context).input_ids)
    logp = F.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    steps = [logp[i - 1, ids[i]].item() for i in range(n, len(ids))]
    greedy = all(logp[i - 1].argmax() == ids[i] for i in range(n, len(ids)))
    return sum(steps), greedy


def prompts(task, r):
    "Contexts, continuations and what a length is taken of, as lm-eval's task files describe them"
    if task == 'winogrande': return [(c, ' ' + r['continuation'], c) for c in r['context_options']]
    if task == 'lambada_openai': return [(r['context'], ' ' + r['continuation'], '')]
    query = r['query']
    if task == 'boolq':
        query = query.removeprefix('Passage: ') + '\nAnswer:'
    elif task == 'piqa':
        query = query + 'Answer:'
    elif task.startswith('arc'):
        query += '\nAnswer:'
    elif task == 'hellaswag':
        query = '. W'.join(query.rsplit('. w', 1))  # every word begins with w
    return [(query, ' ' + c, c) for c in r['choices']]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('task', TASKS)
def test_scores_by_hand(data, task, dtype):
    "bfloat16 too: lm-eval alone would round the log-likelihoods to three digits"
    model, loaded = tiny_model('llama', seed=1).to(dtype), load_tasks([task], data=data)
    found = scores(run(model, loaded))[task]
    lines = [json.loads(o)
             for o in (data / 'zero-shot'
                       / f'{NAMES.get(task, task)}.jsonl').read_text().splitlines()]
    want = {m: [] for m in found}
    assert ([o.args for o in loaded.tasks[task].instances]
            == [p[:2] for r in lines for p in prompts(task, r)])
    for r in lines:
        ask = prompts(task, r)
        ll, greedy = zip(*(likelihood(model, context, answer) for context, answer, _ in ask))
        if task == 'lambada_openai':
            want['loglikelihood'].append(ll[0])
            want['acc'].append(greedy[0])
            continue
        want['acc'].append(np.argmax(ll) == r['gold'])
        if 'acc_norm' in want:
            want['acc_norm'].append(np.argmax([v / len(c) for v, (*_, c) in zip(ll, ask)])
                                    == r['gold'])
    assert ('acc_norm' in want) == (task not in ('boolq', 'winogrande', 'lambada_openai'))
    for m in want:
        np.testing.assert_allclose(found[m], np.array(want[m], float),
                                   rtol=1e-5 if dtype == torch.float32 else 5e-3)
    if task == 'lambada_openai':  # more digits than bfloat16 has
        assert all(torch.tensor(v).bfloat16().item() != v for v in found['loglikelihood'])


def test_metrics_and_average(data, model):
    t = run(model, data=data)
    assert t.task.tolist() == [*SEVEN, 'lambada_openai', 'lambada_openai', 'average']
    norm = 'acc_norm'
    assert (t.metric.tolist()
            == ['acc', norm, norm, 'acc', norm, norm, norm, 'acc', 'perplexity', 'acc_norm of 7'])
    assert (t.chance.tolist()[:7] == [.5, .5, .25, .5, .25, .25, .25]
            and t.documents.tolist() == [12] * 9 + [84])
    assert np.isclose(t.value.iloc[-1], t.value[:7].mean())
    assert np.isclose(t.stderr.iloc[-1], np.sqrt((t.stderr[:7]**2).sum()) / 7)
    plain = score_table(**t.attrs, metric='acc')
    assert (plain.value[2] == np.mean(scores(t)['hellaswag']['acc'])
            and (plain.value[:7] != t.value[:7]).any())
    assert (plain.metric.iloc[-1] == 'acc of 7'
            and np.isclose(plain.value.iloc[-1], plain.value[:7].mean()))
    pd.testing.assert_frame_equal(plain, run(model, data=data, metric='acc'))


def test_one_task_has_no_average(data, model):
    assert run(model, ['piqa'], data=data).task.tolist() == ['piqa']
    assert run(model, 'lambada_openai', data=data).task.tolist() == ['lambada_openai'] * 2


def test_one_document_has_no_error(data, model):
    t = run(model, ['piqa', 'boolq'], limit=1, data=data)
    assert t.stderr.isna().all() and t.value.isin([0, .5, 1]).all()


def test_paired_difference(data, model):
    a, b = (run(m, SEVEN, data=data) for m in (model, tiny_model('llama', seed=2)))
    d = paired(a, b).set_index('task')
    delta = np.subtract(scores(b)['piqa']['acc_norm'], scores(a)['piqa']['acc_norm'])
    assert (d.difference['piqa'] == delta.mean()
            and np.isclose(d.stderr['piqa'], delta.std(ddof=1) / np.sqrt(12)))
    assert np.isclose(d.difference['average'], b.value.iloc[-1] - a.value.iloc[-1])
    assert np.isclose(d.interval['average'], 1.96 * d.stderr['average'])
    words = paired(*(run(m, 'lambada_openai', data=data)
                     for m in (model, tiny_model('llama', seed=2)))).set_index('metric')
    assert (words.index.tolist() == ['acc', 'loglikelihood']
            and words.difference['loglikelihood'] != 0)
    assert (paired(a, a).difference == 0).all() and (paired(a, a).stderr == 0).all()
    with pytest.raises(ValueError, match='not of the same documents'):
        paired(a, run(model, SEVEN, limit=4, data=data))


# Models

WIDTHS = np.array([[2, 40], [0, 96], [4, 0]])


@pytest.mark.parametrize('family', ['llama', 'qwen3', 'opt'])
def test_widths_in_memory_and_saved(data, family, tmp_path):
    """An elastic model at any widths, its sliced copy and its saved folder score alike, and the
    elastic one is left as it was"""
    some = load_tasks(['boolq', 'hellaswag', 'winogrande', 'lambada_openai'], data=data)
    dense = run(tiny_model(family, seed=1), some)
    em = ElasticModel(tiny_model(family, seed=1))
    where = [p.data_ptr() for p in em.model.parameters()]
    full = em.widths.copy()
    widths = WIDTHS if family != 'opt' else WIDTHS * [[2, 1]]  # OPT has a KV group a head
    with em.at(widths):
        before = {k: v.clone() for k, v in em.model.state_dict().items()}
        t = run(em.model, some)
        assert all(torch.equal(v, before[k]) for k, v in em.model.state_dict().items())
        save_pruned(em, tiny_tokenizer(), tmp_path / 'model')
        pd.testing.assert_frame_equal(t, run(em.sliced(), some), rtol=1e-4)
    pd.testing.assert_frame_equal(t,
                                  run(open_model(str(tmp_path / 'model'), 'float32', 'cpu')[0],
                                      some), rtol=1e-4)
    assert t.value[4] != dense.value[4], 'the perplexity of LAMBADA'
    assert (em.widths == full).all() and [p.data_ptr() for p in em.model.parameters()] == where
    pd.testing.assert_frame_equal(run(em.model, some), dense, rtol=1e-4)


@pytest.mark.parametrize('batch', [1, 5])
def test_broken_model(data, batch):
    "NaN is no answer: without care the first choice would win"
    model = tiny_model('llama', seed=1)
    model.lm_head.weight[7] = float('nan')
    t = run(model, ['arc_easy', 'lambada_openai'], data=data, batch=batch)
    assert (t.value.isna().all() and t.stderr.isna().all()
            and t.attrs['about']['broken'] == dict(arc_easy=12, lambada_openai=12))


@pytest.mark.parametrize('batch', [1, 4])
def test_head_sees_answers_only(data, batch):
    "Logits of whole prompts would be most of the memory"
    model, seen = tiny_model('llama', seed=1), []
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    loaded, length = load_tasks(['piqa'], data=data), lambda s: len(tiny_tokenizer()(s).input_ids)
    run(model, loaded, batch=batch)
    pairs = [(length(o.args[0]), length(o.args[0] + o.args[1]) - 1)
             for o in loaded.tasks['piqa'].instances]
    answer = max(whole - context + 1 for context, whole in pairs)
    padding = 0 if batch == 1 else max(n for _, n in pairs) - min(n for _, n in pairs)
    assert (answer <= max(seen) <= answer + padding
            and min(seen) < min(context for context, _ in pairs))
    # lm-eval's batches, longest first: logits from the first answer of a batch on
    rows = sorted((-whole, tiny_tokenizer()(o.args[0] + o.args[1]).input_ids, whole - context + 1)
                  for o, (context, whole) in zip(loaded.tasks['piqa'].instances, pairs))
    chunks = [rows[i:i + batch] for i in range(0, len(rows), batch)]
    assert seen == [-c[0][0] - min(-n - answer for n, _, answer in c) for c in chunks]



@pytest.mark.parametrize('short', [True, False])
def test_prompts_that_do_not_fit(data, tmp_path, short):
    rng = np.random.default_rng(1)
    long = [dict(query=f'Question: {words(rng, n)}\n', choices=[words(rng, 2), words(rng, 3)],
                 gold=0) for n in (1200, 1300)]
    write(tmp_path, 'piqa', [*long, *([line('piqa', rng)] * short)])
    model = tiny_model('opt')  # its position table ends at 512
    with pytest.warns(UserWarning, match='piqa: 4 prompts are longer than the 512 tokens'):
        t = run(model, ['piqa'], data=tmp_path)
    assert t.attrs['about']['cut'] == dict(piqa=4) and t.value.notna().all()
    with pytest.warns(UserWarning):
        pd.testing.assert_frame_equal(run(model, ['piqa'], data=tmp_path, batch=4), t)


# Documents

def test_hub_and_files_are_asked_the_same(data, model, monkeypatch):
    """Without a data folder, lm-eval's names go to the hub library; the same documents give the
    same hash and scores"""
    local = load_tasks(TASKS, data=data)
    hub, asked = docs(local), {}
    for d in hub['hellaswag']:
        for k in ('query', 'choices', 'gold'):
            del d[k]  # lm-eval makes them of the rest
    def load_dataset(path=None, name=None, **kw):
        asked[path, name] = kw
        task = next(t for t in TASKS
                    if (local.tasks[t].config.dataset_path, local.tasks[t].config.dataset_name)
                    == (path, name))
        return {s: datasets.Dataset.from_list(hub[task]) for s in ('train', 'validation', 'test')}
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    monkeypatch.delenv('FFP_DATA_DIR', raising=False)
    a, b = run(model, TASKS), run(model, local)
    assert (asked.keys()
            == {('aps/super_glue', 'boolq'), ('baber/piqa', None), ('Rowan/hellaswag', None),
                ('allenai/winogrande', 'winogrande_xl'), ('allenai/openbookqa', 'main'),
                ('allenai/ai2_arc', 'ARC-Easy'), ('allenai/ai2_arc', 'ARC-Challenge'),
                ('EleutherAI/lambada_openai', 'default')})
    assert (a.attrs['about']['source'], b.attrs['about']['source']) == ('hub', 'local')
    assert a.attrs['about']['data'] == b.attrs['about']['data'] and scores(a) == scores(b)


def test_environment_names_the_folder(data, model, monkeypatch):
    monkeypatch.setenv('FFP_DATA_DIR', str(data))
    assert run(model, ['piqa']).attrs['about']['source'] == 'local'


def test_no_hub(model, monkeypatch):
    monkeypatch.delenv('FFP_DATA_DIR', raising=False)
    with pytest.raises(OSError, match='piqa: its data set could not be read from the '
                                      'hub.*FFP_DATA_DIR'):
        run(model, ['piqa'])


def test_limit_draws_nested_samples(data):
    take = lambda **kw: [d['goal'] for d in docs(load_tasks(['piqa'], data=data, **kw))['piqa']]
    everything = take()
    assert len(everything) == 12 and take(limit=100) == everything
    assert (len(take(limit=5)) == 5 and take(limit=5) == take(limit=8)[:5]
            and set(take(limit=5)) <= set(everything))
    assert (take(limit=5) != take(limit=5, seed=1)
            and take(limit=5, seed=None) == everything[:5] != take(limit=5))


def test_dev_and_test(tmp_path):
    """Disjoint, together all, near the share, blind to order; related documents stay together;
    nested limits stay inside"""
    rng = np.random.default_rng(2)
    lines = [line('boolq', rng) for _ in range(400)]
    lines += [o | dict(query=o['query'].partition('\n')[0] + f'\nQuestion: {words(rng, 3)}?')
              for o in lines[:200]]
    write(tmp_path, 'boolq', lines)
    take = lambda **kw: [(d['passage'], d['question'])
                         for d in docs(load_tasks(['boolq'], data=tmp_path, **kw))['boolq']]
    dev, test = take(part='dev'), take(part='test')
    assert (not set(dev) & set(test) and len(dev) + len(test) == 600
            and abs(len(dev) / 600 - DEV_SHARE) < 0.08)
    assert not {p for p, _ in dev} & {p for p, _ in test}
    assert set(take(part='dev', limit=50)) < set(dev)
    random.Random(0).shuffle(lines)
    write(tmp_path, 'boolq', lines)
    assert set(take(part='dev')) == set(dev)


TEA = ('Tea is a drink of leaves and water. It is made with hot water, and drunk hot or cold, '
       'with milk or without.')


@pytest.mark.parametrize('task, a, b', [
    ('winogrande', dict(sentence='Ann met Jo at the old house, for _ was in.'),
     dict(sentence='Ann met Jo at the old house, but _ left.')),
    ('hellaswag', dict(activity_label='Rowing', query='Rowing: A boat. It'),
     dict(activity_label='Rowing', query='Rowing: Men row. They')),
    ('boolq', dict(passage=f'Tea -- {TEA}'), dict(passage=TEA)),
    ('arc_easy', dict(question='Which falls down?'), dict(question='Which falls  down? ')),
])
def test_related_documents_share_a_part(task, a, b):
    assert part_of(task, a) == part_of(task, b)
    many = [dict.fromkeys(a, f'{i}: How to do {i}. Do it. {i * 7919}') for i in range(60)]
    assert {part_of(task, d) for d in many} == {'dev', 'test'}


# What identifies an evaluation

def test_about_and_record(data, model, tmp_path):
    t = run(model, ['piqa', 'winogrande'], limit=7, part='test', data=data)
    about = t.attrs['about']
    assert (about.items()
            >= dict(limit=7, part='test', seed=0, batch=1, dtype='float32', source='local').items())
    assert (about['lm_eval'] and about['forward_tokens'] > 0
            and about['data'].keys() == {'piqa', 'winogrande'})
    record = cached(tmp_path, dict(name='tasks'), lambda c: t.attrs)
    pd.testing.assert_frame_equal(score_table(**record['result']), t)


@pytest.mark.parametrize('task', TASKS)
def test_hash_sees_every_part_of_a_document(data, model, task, tmp_path):
    lines = [json.loads(o)
             for o in (data / 'zero-shot'
                       / f'{NAMES.get(task, task)}.jsonl').read_text().splitlines()][:2]
    def changed(**kw):
        write(tmp_path, task, [lines[0], lines[1] | kw])
        return run(model, [task], data=tmp_path).attrs['about']['data'][task]
    other = dict(query=lines[1].get('query', '')[::-1].replace('?', 'x') + '?' if task != 'boolq'
                 else 'Passage: a\nQuestion: b?', gold=1 - lines[1].get('gold', 0), context='w9 w9',
                 continuation='w8')
    hashes = [changed()] + [changed(**{k: v}) for k, v in other.items() if k in lines[1]]
    assert len(set(hashes)) == len(hashes) >= 2 and changed() == hashes[0]


# Manners

def test_nothing_else_is_touched(data, model, capfd, recwarn, monkeypatch):
    monkeypatch.setattr('lm_eval.api.task.tqdm',
                        # a bar without a switch
                        lambda *a, **kw: tqdm(*a, **kw | dict(disable=False)))
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    loaded = load_tasks(['piqa', 'hellaswag'], limit=5, data=data)
    a = run(model, loaded, tokenizer)
    for other in (run(model, loaded, tokenizer),
                  run(model, ['piqa', 'hellaswag'], limit=5, data=data)):
        pd.testing.assert_frame_equal(a, other)
        assert a.attrs == other.attrs
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    assert tokenizer.pad_token is None
    assert capfd.readouterr() == ('', '') and not [w for w in recwarn if w.category is UserWarning]
    assert datasets.is_progress_bar_enabled()


def test_progress_counts_requests(data, model, capfd, monkeypatch):
    monkeypatch.setattr('ffp_nb.pipeline.tasks.tqdm', lambda **kw: tqdm(**kw | dict(disable=False)))
    run(model, ['arc_easy'], data=data)
    assert 'arc_easy: 100%' in (err := capfd.readouterr().err) and '48/48' in err


# Bad input

@pytest.mark.parametrize('content, message',
                         [(b'', 'piqa.jsonl is empty'), (b'\n\n', 'piqa.jsonl is empty'),
                          (b'{"query": "a", "choices": ["b", "c"], "gold": 0}\n{"query"',
                           'line 2 of .*piqa.jsonl is no piqa document'),
                          (b'{"query": "a", "gold": 0}', 'line 1 of '),
                          (b'{"query": "a", "choices": ["b", "c"], "gold": 2}',
                           'line 1 of .*gold 2 with 2 choices'),
                          (b'{"query": "a", "choices": ["b", "c", "d"], "gold": 0}', 'line 1 of '),
                          (b'{"query": 5, "choices": ["b", "c"], "gold": 0}', 'line 1 of '),
                          (b'[1, 2]', 'line 1 of '), (b'\xff\xfe', 'line 1 of '),])
def test_bad_files(model, tmp_path, content, message):
    (tmp_path / 'zero-shot').mkdir()
    (tmp_path / 'zero-shot' / 'piqa.jsonl').write_bytes(content)
    with pytest.raises(CorruptFile, match=message):
        run(model, ['piqa'], data=tmp_path)


def test_file_of_another_task(data, model, tmp_path):
    write(tmp_path, 'winogrande', [line('piqa', np.random.default_rng(0))])
    with pytest.raises(CorruptFile, match='is no winogrande document.*context_options'):
        run(model, ['winogrande'], data=tmp_path)


@pytest.mark.parametrize('options, message', [
    (dict(tasks=['mmlu']), "'mmlu'; expected 'seven', 'all', or some of boolq"),
    (dict(tasks='piqa,'), "task ''"),
    (dict(tasks=[]), 'no tasks'),
    (dict(limit=0), 'limit 0; expected.*at least 1'),
    (dict(limit=-3), 'limit -3'),
    (dict(limit=True), 'limit True'),
    (dict(batch=0), 'batch 0; expected.*at least 1'),
    (dict(part='train'), "part 'train'; expected 'dev', 'test'"),
    (dict(metric='f1'), "metric 'f1'; expected one of acc_norm, acc"),
    (dict(tokenizer=None), 'tokenizer None; expected the tokenizer of the model'),
    (dict(tokenizer='gpt2'), "tokenizer 'gpt2'; expected"),
])
def test_options(data, model, options, message):
    with pytest.raises(ValueError, match=message):
        zero_shot(model, **dict(tokenizer=tiny_tokenizer(), data=data, progress=False) | options)


def test_missing_folder(model, tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.*no boolq.jsonl.*FFP_DATA_DIR.*--data'):
        run(model, data=tmp_path / 'nowhere')


def test_part_that_is_empty(model, tmp_path):
    write(tmp_path, 'piqa', [line('piqa', np.random.default_rng(0))])
    task = load_tasks(['piqa'], data=tmp_path).tasks['piqa']
    empty = dict(dev='test', test='dev')[part_of('piqa', task.eval_docs[0])]
    with pytest.raises(ValueError, match=f"piqa has no documents in part '{empty}'"):
        load_tasks(['piqa'], part=empty, data=tmp_path)


def test_tokenizer_of_another_model(data, model, tmp_path):
    write(tmp_path, 'piqa', [dict(query='Question: w300\n', choices=['w4', 'w5'], gold=0)])
    with pytest.raises(ValueError, match='token 300, the model has 211 embeddings'):
        run(model, ['piqa'], tiny_tokenizer(400), data=tmp_path)


def test_tokenizer_without_special_tokens(data, model):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match='neither a BOS nor an EOS'):
        run(model, ['piqa'], tokenizer, data=data)


def test_tasks_that_are_loaded_have_their_own_options(tmp_path):
    given = TaskSet({}, 'local', None, None, 0)
    model, tokenizer = tiny_model('llama'), tiny_tokenizer()
    for odd in (dict(limit=3), dict(seed=1), dict(part='dev')):
        with pytest.raises(ValueError, match='limit, data, part and seed belong to load_tasks'):
            zero_shot(model, tokenizer, given, **odd)
