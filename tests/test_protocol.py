"""The tables of the field: their text, their models in small, one command each that says what it
needs, refuses, goes on, and is honest about what was not run"""
import json
import os
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM

import ffp_nb
from ffp_nb.core import text as texts
from ffp_nb.core.families import tiny_tokenizer
from ffp_nb.core.runs import read_json
from ffp_nb.core.text import Convention, load_corpus, split_text, token_blocks
from ffp_nb.pipeline.config import PROFILES, PruneConfig, run_config
from ffp_nb.search.loop import Search
from ffp_nb.studies import protocol, registry
from ffp_nb.studies.answers import ANSWERS
from ffp_nb.studies.cells import MODES, Lab
from ffp_nb.studies.protocol import MODELS, PROTOCOLS, RECIPES, STUDY, made_rows, random_model
from ffp_nb.studies.scaling import newest
from ffp_nb.studies.study import count_records

NBS = Path(ffp_nb.__file__).parents[1] / 'nbs'
PARTS = [f'paragraph number {i}, and some more of it' for i in range(200)]


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    "A machine without FFP_DATA_DIR, with a cache of this test's own"
    monkeypatch.delenv('FFP_DATA_DIR', raising=False)
    monkeypatch.setenv('FFP_CACHE_DIR', str(tmp_path / 'cache'))
    return tmp_path


@pytest.fixture
def hub(no_data, monkeypatch):
    "Stands for the hub: `hub.rows` by split; the calls it got"
    class Hub:
        rows, calls = dict(train=PARTS), []
        @classmethod
        def load(cls, name, config=None, split=None, streaming=False, **pin):
            cls.calls.append((name, config, split, streaming, pin))
            return (dict(text=t) for t in cls.rows[split])
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', lambda self, name, timeout: None)
    monkeypatch.setattr(datasets, 'load_dataset', Hub.load)
    Hub.calls = []
    return Hub


# Text

def test_fineweb_is_one_revision_and_is_kept(hub, no_data):
    corpus = load_corpus('fineweb-edu')
    assert corpus.texts == split_text('\n\n'.join(PARTS)) and corpus.name == 'fineweb-edu'
    (name, config, split, streaming, pin), = hub.calls
    assert (name, config, split, streaming) == ('HuggingFaceFW/fineweb-edu', 'sample-10BT',
                                                'train', True)
    assert len(pin['revision']) == 40
    hub.rows = dict(train=['gone'])
    assert load_corpus('fineweb-edu').sha256 == corpus.sha256 and len(hub.calls) == 1
    assert [f.suffix for f in (no_data / 'cache').iterdir()] == ['.txt']  # nothing half written


def test_any_data_set_can_be_pinned_and_one_that_is_not_is_read_again(hub):
    load_corpus('owner/set:small@v1.0')
    load_corpus('owner/set:small')
    load_corpus('owner/set:small')
    assert [c[-1] for c in hub.calls] == [dict(revision='v1.0'), {}, {}]
    assert {c[:2] for c in hub.calls} == {('owner/set', 'small')}


def test_no_more_than_is_asked_for_is_read(hub):
    read = []
    def rows():
        for i in range(10**6):
            read.append(i)
            yield f'{i} ' + 'x' * 1000
    hub.rows = dict(train=rows())
    assert 30_000 <= sum(map(len, load_corpus('fineweb-edu', 30_000).texts.values())) < 33_000
    assert len(read) < 40


def test_a_folder_in_the_same_layout_stands_for_the_hub(no_data, monkeypatch):
    rows = made_rows(no_data / 'data/fineweb-edu')
    assert [f.name for f in sorted(rows.iterdir())] == ['000_00000.parquet', '001_00000.parquet']
    monkeypatch.setenv('FFP_DATA_DIR', str(no_data / 'data'))
    first = pd.read_parquet(rows / '000_00000.parquet').text[0]
    corpus = load_corpus('fineweb-edu', 50_000)
    assert corpus['calibration'].startswith(first[:50])
    assert 40_000 < sum(map(len, corpus.texts.values())) < 60_000
    assert load_corpus(str(rows), 50_000).texts == corpus.texts


def test_wikitext_has_the_line_ends_of_published_perplexities(hub, no_data, monkeypatch):
    lines = ['', ' = One = \n', '', ' text of it \n', '', ' = Two = \n', '', ' more \n']
    hub.rows = dict(train=lines * 5, validation=lines, test=lines)
    corpus = load_corpus('wikitext2-full')
    assert corpus['test'] == '\n\n'.join(lines)
    assert corpus['calibration'] + corpus['search'] == '\n\n'.join(lines * 5)
    assert {c[2] for c in hub.calls} == {'train', 'validation', 'test'}
    assert len({c[-1]['revision'] for c in hub.calls}) == 1
    folder = no_data / 'data/wikitext2-full'
    folder.mkdir(parents=True)
    for split, rows in hub.rows.items():
        pd.DataFrame(dict(text=rows)).to_parquet(folder / f'{split}.parquet')
    monkeypatch.undo()  # `datasets` reads local files too
    monkeypatch.setenv('FFP_DATA_DIR', str(no_data / 'data'))
    assert load_corpus('wikitext2-full').texts == corpus.texts


def test_the_calibration_text_suffices_for_four_million_tokens(monkeypatch):
    from ffp_nb.pipeline import bench
    asked = []
    monkeypatch.setattr(bench, 'load_corpus', lambda name, chars=None: asked.append((name, chars))
                        or texts.Corpus(name, dict(test=name)))
    p = PROFILES['field']
    assert p.block_len * p.calibration_blocks == 4_194_304
    corpus = bench.read_corpus(PruneConfig(text='a', eval_text='b', profile=p))
    assert asked == [('a', int(6 * 4_194_304 / 0.45)), ('b', None)]
    assert corpus['test'] == 'b' == corpus.test_name and corpus.name == 'a'
    bench.read_corpus(PruneConfig(text='a'))
    assert asked[2:] == [('a', texts.MOST_CHARS)]


# Figures on another text

def test_figures_of_another_text_with_longer_blocks(tiny_folder, ffp):
    text = (tiny_folder / 'text.txt').read_text().split('\n\n')
    (tiny_folder / 'other.txt').write_text('\n\n'.join(text[::-1]))
    def table(out, *args):
        done = ffp('prune', '--model', tiny_folder / 'dense', '--text', tiny_folder / 'text.txt',
                   '--profile', 'smoke', '--method', 'uniform', '--out', tiny_folder / out, *args)
        assert done.exit_code == 0, done.output
        (record,) = (tiny_folder / out).glob('prune-*.json')
        return pd.read_csv(tiny_folder / out / 'table.csv'), read_json(record), done.output
    away = ['--eval-text', tiny_folder / 'other.txt', '--eval-length', '48']
    there, record, said = table('away', *away)
    here, plain, _ = table('here')
    assert record['result']['widths'] == plain['result']['widths']
    assert 'other.txt' in said
    assert {k: record['config'][k] for k in ('eval_len',)} == dict(eval_len=48)
    assert 'eval_len' not in plain['config'] and 'eval_text' not in plain['config']
    net = AutoModelForCausalLM.from_pretrained(tiny_folder / 'dense', dtype=torch.bfloat16)
    blocks = token_blocks(load_corpus(str(tiny_folder / 'other.txt'))['test'], tiny_tokenizer(),
                          Convention(48, 48, max_blocks=2))
    logits = net(blocks.ids).logits.float()
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1),
                                            blocks.ids[:, 1:].flatten())
    assert there.nll[0] == pytest.approx(nll.item(), abs=2e-3) and here.nll[0] != there.nll[0]
    card = (tiny_folder / 'away/model/README.md').read_text()
    assert 'Test split of other.txt, the first 2 blocks of 48 tokens' in card


@pytest.mark.parametrize('args, said', [
    (['--eval-text', 'nosuch.txt'], "text 'nosuch.txt': no such file"),
    (['--eval-length', '4096'], 'blocks of 4096'),
    (['--eval-length', '1'], 'greater than or equal to 2')])
def test_a_text_for_the_figures_that_cannot_be_read_is_refused_first(tiny_folder, ffp, args, said):
    done = ffp('prune', '--model', tiny_folder / 'dense', '--text', tiny_folder / 'text.txt',
               '--profile', 'smoke', '--out', tiny_folder / 'out', *args)
    assert done.exit_code and said in done.output and 'Traceback' not in done.output
    assert not (tiny_folder / 'out/search/log.jsonl').exists()


def test_records_of_before_are_the_same():
    c = run_config(PruneConfig(), {})
    assert not {'eval_text', 'eval_len'} & set(c)
    assert run_config(PruneConfig(eval_text='a'), {})['eval_text'] == 'a'


# Models of the hub, in small

VARIANTS = {name: (t.config, 32 if t.config['hidden_size'] == 4096 else 8)
            for name, t in MODELS.items()}
VARIANTS['opt-125m'] = (MODELS['opt-125m'].config, 6)
# Instruct models end in several ways
VARIANTS['llama-3.1-8b'] = (MODELS['llama-3.1-8b'].config
                            | dict(eos_token_id=[128001, 128008, 128009]), 32)


@pytest.mark.parametrize('name', VARIANTS)
def test_models_of_the_hub_are_pruned_and_load_elsewhere(name, tmp_path, ffp):
    config, shrink = VARIANTS[name]
    folder = random_model(config, tmp_path / 'dense', layers=2, shrink=shrink)
    kept = read_json(folder / 'config.json')
    assert kept.get('rope_scaling') == config.get('rope_scaling')
    made_rows(tmp_path / 'rows')
    (tmp_path / 'text.txt').write_text('\n\n'.join(
        pd.read_parquet(tmp_path / 'rows/000_00000.parquet').text[:12]))
    done = ffp('prune', '--model', folder, '--text', tmp_path / 'text.txt', '--profile', 'smoke',
               '--sparsity', '0.3', '--ffn-step', '8', '--out', tmp_path / 'out')
    assert done.exit_code == 0, done.output
    own, _ = ffp_nb.load_pruned(tmp_path / 'out/model')
    foreign = AutoModelForCausalLM.from_pretrained(tmp_path / 'out/model', trust_remote_code=True,
                                                   dtype=own.dtype)
    ids = torch.arange(3, 203)[None] % 259
    with torch.no_grad():
        a, b = own(ids).logits, foreign(ids).logits
    assert torch.equal(a, b) and a.isfinite().all()
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=own.dtype)
    assert foreign.num_parameters() < dense.num_parameters()
    assert foreign.config.tie_word_embeddings == dense.config.tie_word_embeddings
    if config['model_type'] == 'opt':
        names = dict(foreign.named_parameters())
        assert sum(n.endswith('fc1.bias') for n in names) == 2
        assert foreign.config.do_layer_norm_before == config['do_layer_norm_before']
    else:
        ours, theirs = (m.model.rotary_emb.inv_freq for m in (foreign, dense))
        assert torch.equal(ours, theirs)
        plain = 1 / config.get('rope_theta', 10000.0) ** (torch.arange(len(ours)) / len(ours))
        assert torch.allclose(ours, plain) == ('rope_scaling' not in config)
        groups = config['num_attention_heads'] // config['num_key_value_heads']
        attn = foreign.model.layers[0].self_attn
        d = dense.config.head_dim
        assert attn.q_proj.out_features == groups * attn.k_proj.out_features
        assert attn.k_proj.out_features % d == 0


def test_opt_350m_is_refused_by_name(tmp_path, ffp):
    "Its norms stand behind the modules, and its embeddings have another width"
    folder = random_model(MODELS['opt-125m'].config | dict(
        do_layer_norm_before=False, hidden_size=1024, ffn_dim=4096, num_attention_heads=16,
        word_embed_proj_dim=512), tmp_path / 'dense', 2, 8)
    done = ffp('prune', '--model', folder, '--text', 'pydoc', '--profile', 'smoke', '--out',
               tmp_path / 'out')
    assert done.exit_code == 1 and 'as OPT-350m' in done.output


def test_a_tokenizer_that_adds_a_first_token_and_has_no_padding():
    "As that of Llama-3: blocks of text are the same as without it"
    from tokenizers.processors import TemplateProcessing
    plain, adds = tiny_tokenizer(0), tiny_tokenizer(0)
    adds.backend_tokenizer.post_processor = TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', 0)])
    assert adds('ab')['input_ids'][0] == 0 and adds.pad_token is None
    cut = lambda t: token_blocks('some text ' * 50, t, Convention(16, 16)).ids
    assert torch.equal(cut(adds), cut(plain))


def test_the_commands_name_what_exists():
    lines = protocol.commands()
    assert len(lines) == len(MODELS) and len({t.hub for t in MODELS.values()}) == len(MODELS)
    for line, (name, target) in zip(lines, MODELS.items()):
        words = line.split()
        option = lambda o: words[words.index(o) + 1]
        assert option('--model') == target.hub and option('--profile') in PROFILES
        assert option('--text') in texts.NAMED and option('--out') == f'runs/{name}'
    assert '--eval-text wikitext2-full --eval-length 4096 --sparsity 0.5' in lines[0]


def test_shapes_are_those_of_the_hub():
    "The number of parameters is the known one"
    for name, millions in (('llama-2-7b', 6738), ('llama-7b', 6738), ('llama-3.1-8b', 8030),
                           ('tinyllama', 1100), ('opt-125m', 125)):
        c = MODELS[name].config
        with torch.device('meta'):
            net = AutoModelForCausalLM.from_config(AutoConfig.for_model(**c))
        assert net.num_parameters() / 1e6 == pytest.approx(millions, abs=0.6), name


# One command

def test_a_rehearsal_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys, no_data):
    run = lambda out: protocol.rehearse('llama-2-7b', tmp_path / out, shrink=32, layers=2,
                                        recipes=('default', 'even'), sparsities=(0.5,),
                                        progress=False, force=True)
    whole = run('whole')
    assert [r['config']['name'].split('-2-32-')[1] for r in whole] == [
        'dense', 'gradient-0.5-0', 'uniform-0.5-0']
    step, steps = Search.step, []
    def stops(self, *args):
        if len(steps) == 1: raise KeyboardInterrupt
        steps.append(1)
        return step(self, *args)
    with monkeypatch.context() as m:
        m.setattr(Search, 'step', stops)
        with pytest.raises(KeyboardInterrupt):
            run('cut')
    (dense,) = (tmp_path / 'cut/records/protocol').glob('*.json')
    made = dense.stat().st_mtime_ns
    counted = []
    with monkeypatch.context() as m:
        m.setattr(Search, 'step', lambda self, *a: counted.append(1) or step(self, *a))
        again = run('cut')
    assert dense.stat().st_mtime_ns == made and len(counted) == 1  # of two updates
    assert [r['result']['nll'] for r in again] == [r['result']['nll'] for r in whole]
    assert capsys.readouterr().out.count('Estimated hours') == 3
    # the text came from rows, figures are of another text with longer blocks
    c = whole[1]['config']
    assert (c['eval_text'], c['eval_len'], c['profile']['block_len']) == ('auto', 128, 64)
    assert c['model'] == 'rehearsal/llama-2-7b-2-32' and c['dtype'] == 'bfloat16'
    assert set(whole[1]['result']['nll']) == {'none', 'static', 'sequential'}


def test_every_recipe_and_the_paper_s_model(tmp_path, ffp, no_data):
    done = ffp('study', 'protocol', 'opt-125m', '--rehearse', '--shrink', '12', '--layers', '2',
               '--force', '--out', tmp_path)
    assert done.exit_code == 0, done.output
    assert 'opt-125m: 5 policies. Estimated GB' in done.output and '6 records' in done.output
    records = [read_json(f) for f in (tmp_path / 'records/protocol').glob('*.json')]
    assert {r['config'].get('sparsity') for r in records if 'cell' in r['config']} == {0.2}
    modes = {r['config']['method']: set(r['result']['nll']) for r in records
             if 'cell' in r['config']}
    assert modes['flap'] == {'none', 'bias', 'sequential'} and set(modes) == {
        r.method for r in RECIPES.values()}
    (agent,) = [r['config']['search']['agent'] for r in records
                if 'cell' in r['config'] and r['config']['method'] == 'ffp']
    assert agent['lr'] == 1e-4 and agent['advantage'] == 'value'  # the published settings


def test_what_cannot_be_run_is_said_in_a_line(ffp, monkeypatch, tmp_path):
    monkeypatch.setattr(protocol, 'run_study', lambda *a, **kw: pytest.fail('nothing may start'))
    monkeypatch.setattr(protocol, 'spare_bytes', lambda device: 0)
    for args, said in ((['llama-3'], "model 'llama-3'; expected one of llama-2-7b"),
                       (['llama-2-7b', '--only', 'sorcery'], "recipe 'sorcery'"),
                       (['llama-2-7b', '--force', '--sparsity', '25'], 'sparsity 25.0; expected'),
                       (['llama-2-7b', '--device', 'cpu'], 'GB of RAM (free here'),
                       (['llama-2-7b', '--shrink', '2'], 'no effect without --rehearse')):
        done = ffp('study', 'protocol', *args, '--out', tmp_path)
        assert done.exit_code == 1 and said in done.output and 'Traceback' not in done.output
        assert done.output.count('error:') == 1
    started = []
    monkeypatch.setattr(protocol, 'run_study', lambda *a, **kw: started.append(kw) or [])
    done = ffp('study', 'protocol', 'llama-2-7b', '--device', 'cpu', '--force', '--sparsity', '0.5',
               '--only', 'default, even-ffn', '--out', tmp_path)
    assert done.exit_code == 0, done.output
    assert started == [dict(names=('llama-2-7b',), recipes=('default', 'even-ffn'),
                            sparsities=(0.5,))]


def test_an_estimate_counts_what_was_asked_for():
    record = newest(NBS.parent / 'benchmarks/results')
    say = lambda *a, name='llama-2-7b': protocol.estimate(
        name, record, *a, benchmarks=NBS.parent / 'benchmarks/results')
    whole, one = say(), say(['default'], (0.5,))
    assert (whole['policies'], one['policies']) == (15, 1)
    assert whole['hours']['statistics'] == one['hours']['statistics'] > 0
    assert whole['hours']['repair'] == pytest.approx(15 * one['hours']['repair'])
    assert say(['even'])['hours']['search'] == 0 == say(['paper'])['GB']['backward']
    # a third of the KV groups' width does not change them; wider FFNs do
    assert say(name='llama-3.1-8b')['GB']['factors'] > one['GB']['factors'] > 20
    assert protocol.estimate('llama-2-7b', None) is None
    assert 'nothing is estimated' in protocol.say_need('x', None)[0]


def test_an_estimate_says_what_it_was_measured_on():
    results = NBS.parent / 'benchmarks/results'
    cpu, gpu = (protocol.estimate('llama-2-7b', newest(results, d), benchmarks=results)
                for d in ('cpu', 'cuda'))
    assert cpu['GB'] == pytest.approx(gpu['GB'], rel=1e-2)  # the same numbers are held
    assert sum(gpu['hours'].values()) < sum(cpu['hours'].values()) / 20
    both, one = protocol.say_need('it', cpu, gpu)[1], protocol.say_need('it', cpu)[1]
    assert both.startswith(one[:-1]) and f'on {gpu["on"]} (' in both
    assert 'cores of a CPU' in one and gpu['on'].startswith('one NVIDIA') and gpu['on'] not in one


# The page

def test_published_figures_name_their_sources():
    bib = (NBS / 'references.bib').read_text()
    assert all(f'{{{key},' in bib for key in set(protocol.PUBLISHED.source))
    t = protocol.PUBLISHED.set_index(['name', 'method', 'sparsity']).ppl
    assert t['llama-2-7b', 'Týr-the-Pruner'].to_dict() == {0.25: 7.51, 0.375: 10.3, 0.5: 16.2}
    assert t['llama-2-7b', 'dense', 0.0] == 5.12 and len(t) == 16
    assert protocol.PUBLISHED.accuracy.dropna().tolist() == [61.89]


def test_what_was_not_run_stays_on_the_page(tmp_path):
    have, of = count_records(STUDY, Lab(tmp_path, dry=True))
    assert have == 0 and of == 2 * (1 + 3 * 5) + 2 * (1 + 5 + 3)
    lines = STUDY.conclusions(tmp_path)
    assert len(lines) == 5 and sum(line.count('not run') for line in lines) == 3 + 3 + 1 + 1
    found, dense = STUDY.read(tmp_path)
    for name, t in MODELS.items():
        if t.protocol:
            table = protocol.side_by_side(found, dense, name)
            ours = table[~table.index.str.startswith('published')]
            assert len(ours) == len(RECIPES) and (ours == 'not run').all(axis=None)
    with pytest.raises(ValueError, match='ffp study protocol llama-2-7b'):
        registry.make_records(STUDY, tmp_path, 'gpu')


def test_a_record_of_a_model_stands_beside_the_published_figures(tmp_path, no_data):
    """Measured on a random model that takes the place of the real one: what the plan wants is what
    the command keeps"""
    small = random_model(MODELS['opt-125m'].config, tmp_path / 'small', 2, 12)
    target = MODELS['opt-125m']
    rows = made_rows(tmp_path / 'rows')
    settings = dict(text=str(rows), eval_text='pydoc', eval_len=128, dtype='bfloat16',
                    profile=protocol.REHEARSED)
    made = replace(PROTOCOLS['paper'], settings=settings, tasks=())
    lab = Lab(tmp_path, runs=tmp_path / 'runs', work=tmp_path)
    records = protocol.run_protocol('opt-125m', lab, ('even',), weights=str(small), target=target,
                                    protocol=made, progress=False, force=True)
    found, dense = STUDY.read(tmp_path / 'runs')
    ppl = float(np.exp(np.mean(records[1]['result']['nll']['sequential'])))
    table = protocol.side_by_side(found, dense, 'opt-125m')
    assert table.loc['ours: even, sequential', 'σ = 0.2'] == f'{ppl:.2f}'
    assert table.loc['ours: default, any repair'].tolist()[1] == 'not run'
    assert table.loc['published: FastForward Pruning', 'σ = 0.2'] == '30.67'
    assert str(tmp_path) not in json.dumps([r['config']['model'] for r in records])
    # a dry lab finds them again, by text and weights that the records name
    own = protocol.FieldLab(Lab(tmp_path, runs=tmp_path / 'runs', dry=True), target, made)
    wanted = count_records(replace(STUDY, plan=lambda _: protocol.plan(
        own, ('opt-125m',), ('even',))), own)
    assert wanted == (2, 2)


@pytest.mark.skipif('FFP_DATA_DIR' not in os.environ, reason='no zero-shot tasks here')
def test_the_paper_s_average_is_measured(tmp_path, monkeypatch):
    few = replace(PROTOCOLS['paper'], tasks=('piqa', 'openbookqa'))
    monkeypatch.setitem(PROTOCOLS, 'paper', few)
    records = protocol.rehearse('opt-125m', tmp_path, shrink=12, layers=2, recipes=('default',),
                                progress=False, force=True)
    scores = {r['config']['name']: r['result'] for r in records if 'accuracy' in r['result']}
    assert len(scores) == 2
    for r in scores.values():
        assert 0 <= r['accuracy'] <= 100 and set(r['about']['data']) == {'piqa', 'openbookqa'}


def test_the_answer_counts_measured_policies():
    t = pd.DataFrame([dict(name='llama-2-7b', sparsity=s, recipe=r, repair=m)
                      for s in (0.25, 0.5) for r in ('default', 'paper') for m in MODES])
    assert ANSWERS['protocol'](t, None).startswith('4 of the wanted policies are measured')
