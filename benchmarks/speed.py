"""How fast and how small pruned models are, against the dense one, in PyTorch and in llama.cpp.

    python benchmarks/speed.py --threads 2
            all parts on SmolLM2-135M: 18 minutes on two idle cores
    python benchmarks/speed.py --only a,d
            some parts
    python benchmarks/speed.py --quick
            a tiny random model, seconds: only shows that it runs

Measured are the searched policies of the first study (nbs/runs/spine, seed 0), repaired in closed
form, saved, and loaded back the way a user does it: AutoModelForCausalLM.from_pretrained in bf16,
and GGUF files in llama.cpp.

a   PyTorch: prefill (one prompt, logits of its last position) and greedy decoding with a cache.
b   llama.cpp, F16 and Q8_0: the same, by llama.cpp's own clock. Needs the package xllamacpp.
c   File sizes, bytes of KV cache a token (read from the caches themselves), and peak resident
    memory, every model in a process of its own.
d   Rounding: prefill of the policies that the same scores give in FFN steps of 1 to 256 channels,
    in PyTorch; of some of them also peak memory, and prefill in llama.cpp.
e   Where the time goes: projections, attention, and the rest, for each model of part a.

What is promised is the ratio of multiply-accumulates (MACs), dense to pruned. A prompt of S tokens
takes S x (projections + attention at S) + head: projections and attention of the decoder blocks are
what ffp_nb.core.budget.mac_cost counts (causal: a token attends to (S + 1) / 2 on average), and the
head, vocabulary x hidden size, is needed once. A decoded token takes all of that once, at its own
context, the head too. Norms, rotary embeddings, softmax and activations have no MACs here, so their
time is part of what can fall short. Goal: prefill reaches 95 % of the promised speed-up.

Times are wall times; alternatives take turns, and a ratio is the median over the turns of the ratio
within a turn. The calibration text is WikiText-2 where FFP_DATA_DIR names its folder, else Python's
help topics; it does not matter for speed. Results go to a JSON record under benchmarks/results/
(with --quick under runs/, which git ignores) with versions, hardware and threads. Close other
programs first: the load of the machine at the start is recorded, and a busy one gives wrong ratios.
"""
import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ffp_nb.core.budget import mac_cost, random_scores, solve
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import load_model, tiny_model
from ffp_nb.core.runs import read_json, save_record, write_json
from ffp_nb.core.text import load_corpus
from ffp_nb.export.gguf import export_gguf
from ffp_nb.export.hf import save_pruned
from ffp_nb.pipeline.bench import Bench
from ffp_nb.pipeline.config import Profile, PruneConfig
from ffp_nb.studies.speed import STEPS, read_policy, round_policy

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler's own messages
PARTS, GOAL = 'abcde', 0.95


@dataclass(frozen=True)
class Size:
    "How much is measured"
    model: str = 'smollm2'
    sparsities: tuple[float, ...] = (0.2, 0.3, 0.5)
    prompt: int = 512  # tokens of a prefill
    context: int = 128  # tokens before decoding
    decoded: int = 64  # tokens
    turns: int = 5
    llama_turns: int = 3
    profile_turns: int = 3
    quants: tuple[str, ...] = ('f16', 'q8_0')
    steps: tuple[int, ...] = STEPS  # d: FFN channels
    # d: of these, for memory and llama.cpp
    saved: tuple[tuple[float, int], ...] = ((0.3, 1), (0.3, 32), (0.3, 128))
    step: int = 32  # that the policies were searched with
    block_len: int = 512
    # what the weights are matters for their quality, not for speed or size
    calibration_blocks: int = 16


QUICK = Size(model='tiny', sparsities=(0.3,), prompt=64, context=16, decoded=4, turns=2,
             llama_turns=1, profile_turns=1, steps=(1, 8, 32), saved=((0.3, 32),), step=8,
             block_len=64, calibration_blocks=2)


# --------------------------------------------------------------------------------------------------
# models and MACs

def tiny_tokenizer():
    "Bytes, in the form of a GPT-2 tokenizer"
    vocab = ({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
             | {'<end>': 256, 'aa': 257})
    core = Tokenizer(models.BPE(vocab, [('a', 'a')]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token='<end>')


def open_bench(size) -> Bench:
    config = PruneConfig(model=size.model, method='ffp', criterion='wanda', dtype='bfloat16',
                         step=(1, size.step),
                         profile=Profile(size.block_len, size.calibration_blocks))
    if size.model == 'tiny':
        model, tokenizer = tiny_model(vocab=258).bfloat16(), tiny_tokenizer()
    else:
        model, tokenizer = load_model(size.model, config.dtype, device='cpu')
    return Bench(model, tokenizer, load_corpus(config.text), config, progress=False)


def find_policy(size, sparsity, cost) -> dict:
    "The record of a searched policy, or for the tiny model something like it"
    if size.model != 'tiny': return read_policy(sparsity, records=ROOT / 'nbs/runs/spine')
    scores = random_scores(0, cost.full.shape)
    return dict(config_id=None, config=dict(sparsity=sparsity), result=dict(
        search=dict(scores=scores), widths=solve(scores, cost, sparsity, (1, size.step))))


def count_macs(layout, widths, tokens: int, seq_len: int, scored: int, head: int) -> dict:
    """MACs of so many tokens at a mean context of (seq_len + 1) / 2; the head is needed by those
    that are scored"""
    if any(layout.windows):
        raise ValueError('layers with a sliding window: their attention does not grow with the '
                         'context. Measure a model of full attention.')
    blocks = mac_cost(layout, seq_len).total(widths)
    # attention grows with seq_len + 1, and nothing else does
    attention = mac_cost(layout, 2 * seq_len + 1).total(widths) - blocks
    return dict(projections=tokens * (blocks - attention) + scored * head,
                attention=tokens * attention)


def describe(size, bench, widths, **kw) -> dict:
    "What a model promises"
    layout, e = bench.elastic.layout, bench.elastic.model.get_output_embeddings().weight
    count = lambda *a: count_macs(layout, widths, *a, e.numel())
    # what pruning leaves alone
    total = sum(p.numel() for p in bench.elastic.model.parameters()) - bench.cost.dense
    # token i of n after a context of c attends to c + i: c + (n + 1) / 2 on average
    return (kw
            | dict(widths=widths, sparsity=bench.cost.sparsity(widths),
                   params=total + bench.cost.total(widths),
                   groups=int(np.asarray(widths)[:, 0].sum()),
                   macs=dict(prefill=count(size.prompt, size.prompt, 1),
                             decode=count(size.decoded, 2 * size.context + size.decoded,
                                          size.decoded))))


def prepare(size, folder, quants) -> dict:
    "Save the models; what they promise, the policies, and the roundings of part d"
    bench = open_bench(size)
    full = bench.elastic.layout.full
    out = dict(models=dict(dense=describe(size, bench, full, target=0.0)), rounded={}, policies={},
               corpus=bench.corpus.name, corpus_sha256=bench.corpus.sha256)
    bench.elastic.restore().sliced().save_pretrained(folder / 'dense')
    bench.tokenizer.save_pretrained(folder / 'dense')
    for target in size.sparsities:
        policy = find_policy(size, target, bench.cost)
        name, widths = f'ffp {target}', np.array(policy['result']['widths'])
        out['policies'][name] = policy['config_id']
        out['models'][name] = describe(size, bench, widths, target=target)
        save(bench, widths, folder / plain(name))
        for step in size.steps:
            label, rounded = f'{name}, step {step}', round_policy(policy, bench.cost, step)
            out['rounded'][label] = describe(size, bench, rounded, target=target, step=step)
            if (target, step) in size.saved:
                save(bench, rounded, folder / plain(label))
                if quants:
                    export_gguf(folder / plain(label), gguf_path(folder, label, 'f16'), 'f16')
    for name in out['models']:
        for quant in quants:
            export_gguf(folder / plain(name), gguf_path(folder, name, quant), quant)
    return out


def save(bench, widths, folder):
    with bench.elastic.at(widths, bench.static):
        save_pruned(bench.elastic, bench.tokenizer, folder)


def plain(name) -> str:
    "A model's name as that of a folder, which transformers makes a Python module's"
    return re.sub(r'\W+', '_', name)


def gguf_path(folder, name, quant) -> Path:
    return Path(folder) / f'{plain(name)}-{quant}.gguf'


# --------------------------------------------------------------------------------------------------
# times and ratios

def take_turns(fns: dict,
               turns: int) -> dict[str,
                                   pd.DataFrame]:  # by figure: a row a turn, a column a function
    "The figures that each function returns in each turn; a first turn does not count"
    rows = [{name: fn() for name, fn in fns.items()} for _ in range(turns + 1)][1:]
    figures = next(iter(rows[0].values()))
    return {k: pd.DataFrame([{name: v[k] for name, v in row.items()} for row in rows])
            for k in figures}


class Ratios:
    """Rows of the table: a figure of the dense and of a pruned model, by how much it is better, and
    what was promised"""
    def __init__(self):
        self.rows = []

    def add(self, part, engine, what, unit, model, dense, pruned, ratio, promised=None, goal=None,
            **extra):
        ratio = np.atleast_1d(np.asarray(ratio, dtype=float))
        value = float(np.median(ratio))
        reached = None if promised is None else float(np.median(ratio) / promised)
        met = None if goal is None else bool(reached >= goal)
        self.rows.append(dict(part=part, engine=engine, what=what, unit=unit, model=model,
                              dense=float(np.median(dense)), pruned=float(np.median(pruned)),
                              ratio=value, low=float(ratio.min()), high=float(ratio.max()),
                              promised=promised, reached=reached, goal=goal, met=met) | extra)

    def speeds(self, part, engine, what, seconds, tokens, info, goal=None):
        "Rows of tokens a second, for every model but the dense one"
        for name in seconds.columns.drop('dense'):
            self.add(part, engine, what, 'tokens/s', name, tokens / seconds.dense,
                     tokens / seconds[name], seconds.dense / seconds[name],
                     promise(info, name, what), goal,
                     **{k: info[name][k] for k in ('target', 'step') if k in info[name]})

    def frame(self) -> pd.DataFrame:
        "The table for reading"
        df = pd.DataFrame(self.rows)
        number = lambda x: f'{x:,.4g}' if abs(x) < 1000 else f'{x:,.0f}'
        df['ratio'] = [f'{r.ratio:.3f}' + f' ({r.low:.3f} to {r.high:.3f})' * (r.low < r.high)
                       for r in df.itertuples()]
        df['promised'] = [f'{x:.3f}' if x == x else '' for x in df.promised.astype(float)]
        df['reached'] = [f'{x:.1%}' if x == x else '' for x in df.reached.astype(float)]
        df['met'] = df.met.map({True: 'yes', False: 'NO'}).fillna('')
        for c in ('dense', 'pruned'):
            df[c] = df[c].map(number)
        return df[['part', 'engine', 'what', 'model', 'dense', 'pruned', 'unit', 'ratio',
                   'promised', 'reached', 'met']]


def promise(info: dict, name: str, phase: str, group: str | None = None) -> float:
    "Ratio of the MACs of a phase, dense to pruned; or of a group of them"
    total = lambda n: info[n]['macs'][phase][group] if group else sum(
        info[n]['macs'][phase].values())
    return total('dense') / total(name)


def prompt_ids(n) -> list[int]:
    "A prompt: any tokens will do"
    return np.random.default_rng(0).integers(3, 250, n).tolist()


# --------------------------------------------------------------------------------------------------
# a: PyTorch

class PyTorch:
    "A model as transformers loads it"
    def __init__(self, model):
        self.model = model

    @classmethod
    def load(cls, folder):
        return cls(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True,
                                                        dtype=torch.bfloat16).eval())

    @torch.inference_mode()
    def prefill(self, ids) -> float:  # seconds
        "Read a prompt; logits of the last position"
        ids, start = torch.tensor([ids]), time.perf_counter()
        self.model(ids, logits_to_keep=1)
        return time.perf_counter() - start

    @torch.inference_mode()
    def read(self, ids):
        "The state after a prompt: the next token and the cache"
        out = self.model(torch.tensor([ids]), logits_to_keep=1)
        return out.logits.argmax(-1), out.past_key_values

    @torch.inference_mode()
    def write(self, state, n) -> float:  # seconds
        "n greedy steps"
        (token, cache), start = state, time.perf_counter()
        for _ in range(n):
            token = self.model(token, past_key_values=cache).logits.argmax(-1)
        return time.perf_counter() - start

    def times(self, size) -> dict[str, float]:
        return dict(prefill=self.prefill(prompt_ids(size.prompt)),
                    decode=self.write(self.read(prompt_ids(size.context)), size.decoded))


def part_a(size, out, work):
    t = take_turns({name: lambda m=m: m.times(size) for name, m in work.loaded().items()},
                   size.turns)
    out.speeds('a', 'PyTorch bf16', 'prefill', t['prefill'], size.prompt, work.info['models'], GOAL)
    out.speeds('a', 'PyTorch bf16', 'decode', t['decode'], size.decoded, work.info['models'])


# --------------------------------------------------------------------------------------------------
# b: llama.cpp

def part_b(size, out, work):
    import xllamacpp
    ids = prompt_ids(max(size.prompt, size.context))
    for quant in size.quants:
        loaded = work.llama(work.info['models'], quant, size)
        times = lambda m: dict(prefill=m.prefill(ids[:size.prompt]),
                               decode=m.decode(ids[:size.context], size.decoded))
        t = take_turns({name: lambda m=m: times(m) for name, m in loaded.items()}, size.llama_turns)
        engine = f'llama.cpp {quant.upper()}'
        out.speeds('b', engine, 'prefill', t['prefill'], size.prompt, work.info['models'], GOAL)
        out.speeds('b', engine, 'decode', t['decode'], size.decoded, work.info['models'])
    return dict(version=metadata.version('xllamacpp'), system=xllamacpp.get_system_info().strip())


def context_size(size) -> int:
    return max(256, 1 << (max(size.prompt, size.context + size.decoded)).bit_length())


# --------------------------------------------------------------------------------------------------
# c: size

def torch_memory(size, folder, quants) -> dict:
    """Memory and bytes of KV cache a token, in a process that loads one model, reads a prompt and
    writes some tokens"""
    from llamacpp import memory_mb
    before, model = memory_mb()['now'], PyTorch.load(folder)
    state = model.read(prompt_ids(size.prompt))
    cache = (sum(t.nbytes for layer in state[1].layers for t in (layer.keys, layer.values))
             / state[1].get_seq_length())
    model.write(state, 4)
    return dict(libraries=before, peak=memory_mb()['peak'], cache=cache)


def llama_memory(size, path, threads) -> dict:
    "The same of llama.cpp"
    from llamacpp import cache_bytes
    numbers = size.prompt, 4, threads, context_size(size)
    run = subprocess.run([sys.executable, Path(__file__).with_name('llamacpp.py'), path,
                          *map(str, numbers)], capture_output=True, text=True)
    if run.returncode: raise RuntimeError(f'llama.cpp failed on {path}:\n{run.stderr[-3000:]}')
    return json.loads(run.stdout) | dict(cache=cache_bytes(run.stderr))


def part_c(size, out, work):
    info, memory = work.info['models'], {}
    figures = (('file', 'file', 'MB', 'params'), ('peak memory', 'peak', 'MB', None),
               ('peak memory less the libraries', 'model', 'MB', None),
               ('KV cache a token', 'cache', 'bytes', 'groups'))
    for engine, quant in ({'PyTorch bf16': None}
                          | {f'llama.cpp {q.upper()}': q for q in work.quants}).items():
        rows = []
        for name in info:
            path = work.gguf(name, quant) if quant else work.saved(name) / 'model.safetensors'
            row = (llama_memory(size, path, work.threads) if quant
                   else work.child('torch_memory', path.parent))
            rows.append(row
                        | dict(file=path.stat().st_size / 10**6,
                               model=row['peak'] - row['libraries']))
        rows = pd.DataFrame(rows, index=list(info))
        memory[engine], dense = rows.to_dict('index'), rows.loc['dense']
        for what, key, unit, part in figures:
            for name, row in rows.drop('dense').iterrows():
                out.add('c', engine, what, unit, name, dense[key], row[key], dense[key] / row[key],
                        info['dense'][part] / info[name][part] if part else None,
                        target=info[name]['target'])
    return memory


# --------------------------------------------------------------------------------------------------
# d: rounding

def part_d(size, out, work):
    elastic = ElasticModel(AutoModelForCausalLM.from_pretrained(work.folder / 'dense',
                                                                dtype=torch.bfloat16).eval())
    # shapes make the speed, not values
    cut = lambda widths: PyTorch(elastic.set(np.array(widths)).sliced())
    dense = PyTorch(elastic.sliced())
    info = work.info['rounded'] | dict(dense=work.info['models']['dense'])
    ids = prompt_ids(size.prompt)
    for target in size.sparsities:
        group = (dict(dense=dense)
                 | {name: cut(i['widths']) for name, i in info.items() if i['target'] == target})
        t = take_turns({name: lambda m=m: dict(prefill=m.prefill(ids))
                        for name, m in group.items()}, size.turns)
        out.speeds('d', 'PyTorch bf16', 'prefill', t['prefill'], size.prompt, info)
    names = ['dense', *(n for n, i in info.items() if (i['target'], i.get('step')) in size.saved)]
    if work.quants:
        loaded = work.llama(names, 'f16', size)
        t = take_turns({name: lambda m=m: dict(prefill=m.prefill(ids))
                        for name, m in loaded.items()}, size.llama_turns)
        out.speeds('d', 'llama.cpp F16', 'prefill', t['prefill'], size.prompt, info)
    if platform.system() != 'Linux': return
    memory = {name: (m := work.child('torch_memory', work.saved(name)))['peak'] - m['libraries']
              for name in names}
    for name in names[1:]:
        out.add('d', 'PyTorch bf16', 'peak memory less the libraries', 'MB', name, memory['dense'],
                memory[name], memory['dense'] / memory[name], target=info[name]['target'],
                step=info[name]['step'])


# --------------------------------------------------------------------------------------------------
# e: where the time goes

def spent(fn) -> dict[str, float]:  # seconds by group
    "What the profiler says of a call"
    with profile(activities=[ProfilerActivity.CPU]) as p:
        fn()
    found = [(e.key, e.self_cpu_time_total / 1e6) for e in p.key_averages()]
    time_of = lambda *names: sum(t for key, t in found if key.startswith(names))
    return dict(projections=time_of('aten::mm', 'aten::addmm', 'mkldnn::'),
                attention=time_of('aten::_scaled_dot_product'))


def part_e(size, out, work):
    """Wall time of a call, and of its parts in a call with the profiler; the rest is all but
    projections and attention. All walls are taken first: between profiles, the rest was the larger
    the later a model came in a turn"""
    info, models = work.info['models'], work.loaded()
    phases = dict(prefill=(size.prompt, lambda m: lambda: m.prefill(prompt_ids(size.prompt))),
                  decode=(size.decoded,
                          lambda m: partial(m.write, m.read(prompt_ids(size.context)),
                                            size.decoded)))
    every = lambda measure: {
        phase: take_turns({name: partial(measure, make, m) for name, m in models.items()},
                          size.profile_turns) for phase, (_, make) in phases.items()}
    walls = every(lambda make, m: dict(all=make(m)()))
    parts = every(lambda make, m: spent(make(m)))  # a call uses its cache up: made for each
    for phase, (tokens, _) in phases.items():
        t = parts[phase]
        t |= dict(rest=walls[phase]['all'] - sum(t.values()), all=walls[phase]['all'])
        for group, s in t.items():
            for name in s.columns.drop('dense'):
                macs = (promise(info, name, phase, group) if group in info[name]['macs'][phase]
                        else None)
                out.add('e', 'PyTorch bf16', f'{phase}: {group}', 'ms/token', name,
                        1e3 * s.dense / tokens, 1e3 * s[name] / tokens, s.dense / s[name], macs,
                        target=info[name]['target'])


# --------------------------------------------------------------------------------------------------
# program

class Work:
    "The folder with the models, what they promise, and what is loaded"
    def __init__(self, folder, args):
        self.folder, self.args, self.threads = Path(folder), args, args.threads
        self.quants, self._loaded = args.quants, {}

    def saved(self, name) -> Path:
        return self.folder / plain(name)

    def gguf(self, name, quant) -> Path:
        return gguf_path(self.folder, name, quant)

    def child(self, name, target) -> dict:
        "What a function of `CHILDREN` returns in a process of its own"
        command = [sys.executable, __file__, '--child', name, '--target', target, '--out',
                   self.folder, '--threads', str(self.threads), '--only', ','.join(self.args.parts)]
        run = subprocess.run(command + ['--quick'] * self.args.quick, capture_output=True,
                             text=True)
        if run.returncode:
            raise RuntimeError(f'the process of {name} failed:\n{run.stderr[-3000:]}')
        return read_json(self.folder / 'child.json')

    def loaded(self) -> dict[str, PyTorch]:
        "The models of part a, kept"
        if not self._loaded:
            self._loaded = {name: PyTorch.load(self.saved(name)) for name in self.info['models']}
        return self._loaded

    def llama(self, names, quant, size) -> dict:
        "Models in llama.cpp"
        from llamacpp import LlamaCpp
        return {name: LlamaCpp(self.gguf(name, quant), self.threads, context_size(size))
                for name in names}


CHILDREN = dict(prepare=prepare, torch_memory=torch_memory)


def run_parts(size, args) -> tuple[Ratios, dict]:
    "Measure; the table's rows and further details"
    out, extra, walls = Ratios(), {}, {}
    def timed(name, fn, *a):
        print(f'{name}: '
              f'{dict(prepare="pruning, repairing and saving the models").get(name, "measuring")}',
              flush=True)
        start = time.perf_counter()
        result = fn(*a)
        walls[name] = round(time.perf_counter() - start, 1)
        return result
    with tempfile.TemporaryDirectory() as folder:
        work = Work(folder, args)
        work.info = timed('prepare', work.child, 'prepare', folder)
        for part in args.parts:
            found = timed(part, globals()[f'part_{part}'], size, out, work)
            if found:
                extra[dict(b='llama_cpp', c='memory')[part]] = found
    return out, extra | work.info | dict(part_wall_s=walls)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true',
                        help='a tiny random model: seconds, and no meaningful figures')
    parser.add_argument('--only', default=','.join(PARTS), help='parts to run, such as a,c')
    parser.add_argument('--out', type=Path, help='folder for the record')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(),
                        help='threads of PyTorch and of llama.cpp')
    for name in ('child', 'target'):
        parser.add_argument(f'--{name}', help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.parts = sorted({p for p in args.only.replace(' ', '').split(',') if p})
    if not args.parts or set(args.parts) - set(PARTS):
        parser.error(f'--only {args.only}: expected some of a,b,c,d,e')
    if args.threads < 1:
        parser.error(f'--threads {args.threads}: expected at least 1')
    if 'c' in args.parts and platform.system() != 'Linux':
        parser.error('part c reads memory from /proc: leave it out with --only')
    size = QUICK if args.quick else Size()
    has_llama = importlib.util.find_spec('xllamacpp') is not None
    if 'b' in args.parts and not has_llama:
        parser.error('part b needs llama.cpp: pip install xllamacpp, or leave it out with --only')
    # c and d can do without
    args.quants = size.quants if has_llama and set(args.parts) & set('bcd') else ()
    args.out = args.out or ROOT / ('runs/benchmarks-quick' if args.quick else 'benchmarks/results')
    return args, size


def main(argv=None):
    args, size = arguments(argv)
    torch.set_num_threads(args.threads)
    if args.child:
        return write_json(args.out / 'child.json',
                          CHILDREN[args.child](size, Path(args.target), args.quants))
    load = (os.getloadavg() if hasattr(os, 'getloadavg') else [float('nan')])[0]
    start = time.perf_counter()
    if load > 0.5 and not args.quick:
        print(f'warning: load of the machine is {load:.1f}; ratios may be wrong', flush=True)
    out, extra = run_parts(size, args)
    wall_s = time.perf_counter() - start
    config = dict(name='speed', parts=args.parts, threads=args.threads, **asdict(size))
    path = save_record(args.out, config, dict(rows=out.rows, load_at_start=load, **extra),
                       wall_s=round(wall_s, 1))
    with pd.option_context('display.width', 200, 'display.max_colwidth', 60, 'display.max_rows',
                           500):
        print('\n' + out.frame().to_string(index=False))
    if args.quick:
        print('\nA quick run: these figures of a tiny model mean nothing.')
    goals = [r for r in out.rows if r['met'] is not None]
    for r in goals:
        print(f"prefill, {r['engine']}, {r['model']}: {r['ratio']:.3f} x of {r['promised']:.3f} "
              f"x promised, {r['reached']:.1%}: {'met' if r['met'] else 'NOT met'}")
    print(f"\n{sum(r['met'] for r in goals)} of {len(goals)} goals met (prefill reaches "
          f"{GOAL:.0%} of the promised speed-up); "
          f'{args.threads} threads, {wall_s / 60:.1f} minutes, load at the start '
          f'{load:.1f}\nrecord: {os.path.relpath(path)}')


if __name__ == '__main__':
    main()
