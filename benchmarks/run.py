"""How fast the search is and how much memory it takes, against the published way of doing the same
(see published.py).

    python benchmarks/run.py
            all parts on SmolLM2-135M: 6 to 7 minutes on two idle cores
    python benchmarks/run.py --only a,c
            some parts
    python benchmarks/run.py --quick
            a tiny random model, seconds: only shows that it runs

What is measured, and the goals:

a   Setting a policy and restoring the dense model: views of the elastic model against clone, slice,
    restore of all prunable weights; and as a share of the forward pass of the same episode (goal:
    under 1 %). Beside them what a model that follows a changing budget waits for: the agent's
    answer to a target and the widths of the budget solver.
b   Calibrated weights of the whole model at widths that are new (nothing cached): two factors a
    module, made once, against one ridge solve a pruned column that forms X^T X again (goal: 1,000
    times faster), and against one solve a module with a given Gram matrix. The factorisation is
    reported on its own, and as part of a second ratio. The column solves are timed on a sample and
    extrapolated by the number of pruned columns.
c   One episode: bf16 on views with calibrated weights, against fp32 with weights reset from disk,
    slicing by copies, NaN hooks and whole logits (goal: 2 times faster). Then one change after
    another: what each contributes, which depends on the order of the changes.
d   Peak resident memory, every alternative in a process of its own: a bf16 search with a small
    cache after 8, 32 and 128 episodes (goal: no growth), a search with every width in its cache
    that it can ever ask for (goal: under 3 GB), and an episode done the published way.

Times are wall times; alternatives take turns, and a ratio is the median over the turns of the ratio
within a turn. The text is WikiText-2 where FFP_DATA_DIR names its folder, else Python's help
topics. Results go to a JSON record under benchmarks/results/ (with --quick under runs/, which git
ignores) with versions, hardware and threads. Close other programs first: the load of the machine at
the start is recorded, and a busy one gives wrong ratios. """
import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import published
import torch

from ffp_nb.core.budget import bounds, random_scores, solve, uniform
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import KINDS, Layout, load_model, tiny_model
from ffp_nb.core.perplexity import block_nll
from ffp_nb.core.ridge import Calibrator
from ffp_nb.core.runs import read_json, save_record, write_json
from ffp_nb.core.text import Convention, load_corpus, token_blocks
from ffp_nb.pipeline.bench import Bench
from ffp_nb.pipeline.config import Profile, PruneConfig
from ffp_nb.search.agent import PPOAgent
from ffp_nb.search.loop import Evaluator, Search, SearchConfig

ROOT = Path(__file__).resolve().parent.parent
PARTS = 'abcd'
MB = 10**6  # decimal: 3 GB are 3,000 of them


@dataclass(frozen=True)
class Size:
    "How much is measured"
    model: str = 'smollm2'
    sparsity: float = 0.2
    step: tuple[int, int] = (1, 32)
    alpha: float = 0.1
    block_len: int = 512
    calibration_blocks: int = 32  # of b: 16,384 tokens
    blocks: int = 4  # of an episode
    turns: int = 3
    inner: int = 50  # repeats within a turn of what takes a millisecond
    layers: int = 3  # b: layers whose column solves are timed
    columns: int = 2  # b: columns of each of their modules in each turn
    episodes: tuple[int, ...] = (8, 32, 128)  # d: where memory is read
    small_cache: int = 256 * MB  # d: cache of the search that is watched for growth
    memory_blocks: int = 4  # d: calibration text; statistics take the same memory for any amount


QUICK = Size(model='tiny', step=(1, 8), block_len=64, calibration_blocks=4, blocks=2, turns=2,
             inner=2, layers=2, columns=1, episodes=(2, 4, 8), small_cache=MB // 16,
             memory_blocks=2)


class Bytes:
    "A tokenizer for the tiny model"
    bos_token_id = 0
    def __call__(self, text, **kw):
        return dict(input_ids=[b % 211 for b in text.encode()])


def open_model(size, dtype):
    if size.model == 'tiny': return tiny_model().to(dtype), Bytes()
    return load_model(size.model, dtype, device='cpu')


def open_bench(size, calibration_blocks, model=None, tokenizer=None) -> Bench:
    if model is None:
        model, tokenizer = open_model(size, torch.bfloat16)
    config = PruneConfig(model=size.model, sparsity=size.sparsity, method='ffp', criterion='wanda',
                         step=size.step, alpha=size.alpha,
                         profile=Profile(size.block_len, calibration_blocks))
    return Bench(model, tokenizer, load_corpus(config.text), config, progress=False)


# --------------------------------------------------------------------------------------------------
# times and results

def take_turns(fns: dict, turns: int, inner: int = 1,
               warm: bool = True,  # go through a first turn that does not count
               ) -> pd.DataFrame:  # a row a turn, a column a function
    "Seconds of each function in each turn"
    times = []
    for turn in range(0 if warm else 1, turns + 1):
        row = {}
        for name, fn in fns.items():
            start = time.perf_counter()
            for _ in range(inner if turn else 1):
                fn()
            row[name] = (time.perf_counter() - start) / (inner if turn else 1)
        if turn:
            times.append(row)
    return pd.DataFrame(times)


class Results:
    """Rows of the table: what was measured, its median over turns with the extremes, the goal and
    whether it was met"""
    def __init__(self):
        self.rows = []

    def add(self, part, what, values, unit, goal=None, at_most=True):
        values = np.atleast_1d(np.asarray(values, dtype=float))
        value = float(np.median(values))
        met = None if goal is None else bool(value <= goal if at_most else value >= goal)
        text = '' if goal is None else f"{'<=' if at_most else '>='} {goal:g} {unit}"
        low, high = float(values.min()), float(values.max())
        self.rows.append(dict(part=part, what=what, value=value, unit=unit, low=low, high=high,
                              goal=text, met=met))

    def frame(self) -> pd.DataFrame:
        "The table for reading"
        df = pd.DataFrame(self.rows)
        number = lambda x: f'{x:,.4g}' if abs(x) < 1000 else f'{x:,.0f}'
        for c in ('value', 'low', 'high'):
            df[c] = df[c].map(number)
        df['what'] = df['what'].str.ljust(df['what'].str.len().max())
        df['met'] = df['met'].map({True: 'yes', False: 'NO'}).fillna('')
        return df


# --------------------------------------------------------------------------------------------------
# a: policies

def part_a(size, out, bench, widths):
    e, layout = bench.elastic, bench.elastic.layout
    g = torch.Generator().manual_seed(0)
    kept = {(i, kind): torch.randperm(int(layout.full[i, j]),
                                      generator=g)[:widths[i, j]].sort().values
            for i in range(len(widths)) for j, kind in enumerate(KINDS)}
    cached = Calibrator(e, bench.stats, size.alpha)
    e.set(widths, cached).restore()  # fills the cache

    def views():
        e.set(widths).restore()

    def calibrated():
        e.set(widths, cached).restore()

    def copies():
        saved = published.clone_weights(layout)
        published.slice_by_copy(layout, kept)
        published.put_back(layout, saved)
    quick = take_turns(dict(views=views, calibrated=calibrated), size.turns, size.inner)
    slow = take_turns(dict(copies=copies), size.turns)
    e.restore()  # the views of the elastic model, not the last clones
    scores = random_scores(0, widths.shape)
    agent = PPOAgent(len(widths))
    budget = take_turns(dict(solve=lambda: solve(scores, bench.cost, size.sparsity, size.step),
                             answer=lambda: agent.recommend(size.sparsity)), size.turns, size.inner)
    blocks = bench.text.search[:size.blocks]
    with e.at(widths, cached):
        forward = take_turns(dict(forward=lambda: block_nll(e.model, blocks)), size.turns)
    out.add('a', 'set + restore, views', 1e3 * quick.views, 'ms')
    out.add('a', 'set + restore, views, calibrated weights from the cache', 1e3 * quick.calibrated,
            'ms')
    out.add('a', 'clone + slice + restore, same weights (bf16)', 1e3 * slow.copies, 'ms')
    out.add('a', f'forward of the episode, {size.blocks} x {size.block_len} tokens',
            1e3 * forward.forward, 'ms')
    out.add('a', 'clone-slice-restore / views', slow.copies / quick.views, 'x')
    out.add('a', 'views, share of the forward', 100 * quick.views / forward.forward, '%', 1)
    out.add('a', 'views with calibrated weights, share of the forward',
            100 * quick.calibrated / forward.forward, '%', 1)
    out.add('a', 'answer of the agent (target to scores)', 1e3 * budget.answer, 'ms')
    out.add('a', 'budget solver (scores to widths)', 1e3 * budget.solve, 'ms')
    out.add('a', 'budget solver, share of the forward', 100 * budget.solve / forward.forward, '%')


# --------------------------------------------------------------------------------------------------
# b: calibration

def capture_inputs(size):
    """A bench, inputs of the modules of some layers (columns in elastic order), seconds of the
    statistics pass"""
    model, tokenizer = open_model(size, torch.bfloat16)
    layout = Layout(model)
    layers = np.linspace(0, layout.n_layers - 1, size.layers).round().astype(int).tolist()
    seen = {(i, kind): [] for i in layers for kind in KINDS}
    keep = lambda key: lambda _, args: seen[key].append(args[0].reshape(-1,
                                                                        args[0].shape[-1]).float())
    hooks = [layout.modules[key].out.register_forward_pre_hook(keep(key)) for key in seen]
    start = time.perf_counter()
    bench = open_bench(size, size.calibration_blocks, model, tokenizer)
    wall_s = time.perf_counter() - start
    for h in hooks:
        h.remove()
    return bench, {key: torch.cat(x)[:, bench.elastic.columns[key]]
                   for key, x in seen.items()}, wall_s


class Columns:
    "Column solves on a sample of columns of some modules"
    def __init__(self, size, bench, inputs, widths):
        e, self.rng, self.n = bench.elastic, np.random.default_rng(0), size.columns
        self.alpha = size.alpha
        self.modules = {}
        for (i, kind), X in inputs.items():
            W = e.dense_out((i, kind))[0].float()
            c = int(widths[i, KINDS.index(kind)]) * e.layout.modules[i, kind].cols
            if c < X.shape[1]:
                self.modules[i, kind] = X[:, :c].contiguous(), X, W, W[:, :c].clone(), c
        self.pruned = {kind: sum(e.layout.modules[i, kind].cols
                                 * int(e.layout.full[i, j] - widths[i, j])
                                 for i in range(len(widths))) for j, kind in enumerate(KINDS)}

    def sample(self) -> dict[str, float]:
        "Median seconds of a column, by kind"
        times = {}
        for (i, kind), (X_kept, X, W, W_kept, c) in self.modules.items():
            for j in self.rng.integers(c, X.shape[1], self.n):
                start = time.perf_counter()
                published.fit_column(X_kept, X[:, j], W_kept, W[:, j], self.alpha)
                times.setdefault(kind, []).append(time.perf_counter() - start)
        return {kind: float(np.median(t)) for kind, t in times.items()}

    def total(self, seconds) -> float:
        "Extrapolated to all pruned columns"
        return sum(seconds.get(kind, 0) * n for kind, n in self.pruned.items())

    def gram(self) -> float:
        "Seconds to form the Gram matrix of every module once, from the sample"
        times = {}
        for (i, kind), (_, X, *_) in self.modules.items():
            start = time.perf_counter()
            X.T @ X
            times.setdefault(kind, []).append(time.perf_counter() - start)
        return sum(float(np.median(t)) for t in times.values())

    def check(self, bench, calibrator, widths):
        "The three ways give the same weights"
        for (i, kind), (X_kept, X, W, _, c) in self.modules.items():
            W_all, coef = published.fit_module(W, bench.stats.gram[i, kind], c, self.alpha)
            ours = calibrator(i, kind, int(widths[i, KINDS.index(kind)]))[0].float()
            one = published.fit_column(X_kept, X[:, c], W[:, :c].clone(), W[:, c], self.alpha)
            for name, a, b in (('calibrator', ours, W_all), ('column solve', one, coef[:, 0])):
                if (a - b).norm() > 0.02 * b.norm():  # bf16 rounds to 0.4 %
                    raise AssertionError(f'layer {i} {kind}: {name} differs by '
                                         f'{(a - b).norm() / b.norm():.2%}')


def no_cache(size, bench) -> Calibrator:
    "A calibrator with its factors made that computes whatever it is asked for"
    return Calibrator(bench.elastic, bench.stats, size.alpha, cache_bytes=0).prepare(progress=False)


def part_b(size, out, bench, widths, inputs, stats_s):
    start = time.perf_counter()
    calibrator = no_cache(size, bench)
    factors_s = time.perf_counter() - start
    columns, keys = Columns(size, bench, inputs, widths), list(np.ndindex(*widths.shape))
    columns.check(bench, calibrator, widths)
    policies = iter([solve(random_scores(s, widths.shape), bench.cost, size.sparsity, size.step)
                     for s in range(size.turns + 1)])

    def ours(w):
        for i, j in keys:
            calibrator(i, KINDS[j], int(w[i, j]))

    def shared():
        for i, j in keys:
            key = i, KINDS[j]
            c = int(widths[i, j]) * bench.elastic.layout.modules[key].cols
            published.fit_module(bench.elastic.dense_out(key)[0], bench.stats.gram[key], c,
                                 size.alpha)
    t = take_turns(dict(ours=lambda: ours(widths), random=lambda: ours(next(policies)),
                        shared=shared), size.turns)
    samples = [columns.sample() for _ in range(size.turns + 1)][1:]
    gram = np.array([columns.gram() for _ in range(size.turns)]) * len(widths)
    total = np.array([columns.total(s) for s in samples])
    tokens, n = bench.stats.tokens, sum(columns.pruned.values())
    out.add('b', f'statistics of {tokens:,} tokens (once; forward pass and set-up included)',
            stats_s, 's')
    out.add('b', 'factorisation of every module (once)', factors_s, 's')
    out.add('b', 'calibrated weights of a new policy (uniform), uncached', t.ours, 's')
    out.add('b', 'calibrated weights of a new policy (random scores), uncached', t.random, 's')
    for kind in KINDS:
        if kind in samples[0]:
            sampled = sum(key[1] == kind for key in columns.modules) * size.columns
            out.add('b', f'one column solve, {kind}, measured on {sampled} columns a turn',
                    [s[kind] for s in samples], 's')
    out.add('b', f'column solves of the model, EXTRAPOLATED to {n:,} pruned columns', total, 's')
    out.add('b', 'one solve a module, Gram matrix given', t.shared, 's')
    out.add('b', 'Gram matrices formed once, EXTRAPOLATED to every layer', gram, 's')
    out.add('b', 'column solves / ours', total / t.ours, 'x', 1000, at_most=False)
    out.add('b', 'column solves / (ours + factorisation), a single policy',
            total / (t.ours + factors_s), 'x')
    out.add('b', 'solve a module, Gram given / ours', t.shared / t.ours, 'x')
    out.add('b', 'solve a module, Gram formed for it / ours', (t.shared + gram) / t.ours, 'x')
    return calibrator


# --------------------------------------------------------------------------------------------------
# c: episodes

def fp32_twin(size, bench) -> ElasticModel:
    "The same elastic model in float32, with its units in the same order"
    e = bench.elastic
    cols = {key: m.cols for key, m in e.layout.modules.items()}
    return ElasticModel(open_model(size, torch.float32)[0],
                        {k: c[::cols[k]] // cols[k] for k, c in e.columns.items()})


def leading(layout, widths) -> dict:
    "Units to keep in a sorted model"
    return {(i, kind): torch.arange(int(widths[i, j])) for i in range(len(widths))
            for j, kind in enumerate(KINDS)}


def part_c(size, out, bench, widths, uncached):
    e16, e32, blocks = bench.elastic, fp32_twin(size, bench), bench.text.search[:size.blocks]
    cached, kept, nll = Calibrator(e16, bench.stats, size.alpha), leading(e16.layout, widths), {}
    cached._factors = uncached._factors  # made once is enough for this comparison
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'dense.pt'
        torch.save(e32.model.state_dict(), path)

        def old(name, hooks):
            nll[name] = published.episode(e32.model, e32.layout, path, kept, blocks, hooks)

        def views_whole():
            with e32.at(widths):
                nll['views'] = published.whole_logits_nll(e32.model, blocks)

        def views(name, e, weights=None):
            with e.at(widths, weights):
                nll[name] = float(block_nll(e.model, blocks).mean() / blocks.scored)
        steps = {'published': lambda: old('published', True),
                 'no hooks': lambda: old('no hooks', False),
                 'views': lambda: (e32.restore(), views_whole()),
                 'chunked': lambda: views('chunked', e32), 'bf16': lambda: views('bf16', e16),
                 'cached': lambda: views('cached', e16, cached),
                 'first': lambda: views('first', e16, uncached)}
        e16.set(widths, cached).restore()  # fills the cache
        # a turn takes half a minute; the median drops a slow first one
        t = take_turns(steps, size.turns, warm=False)
    _check_nll(nll)
    names = {'published': 'published way: fp32, reset from disk, copies, NaN hooks, whole logits',
             'no hooks': '- NaN hooks', 'views': '- reset and copies: views',
             'chunked': '- whole logits: chunks', 'bf16': '- fp32: bf16',
             'cached': '+ calibrated weights, from the cache',
             'first': '+ calibrated weights, computed for the first time'}
    for step, name in names.items():
        out.add('c', f'episode: {name}', t[step], 's')
    for a, b, name in (('published', 'no hooks', 'without NaN hooks'),
                       ('no hooks', 'views', 'slicing by views'),
                       ('views', 'chunked', 'head in chunks'), ('chunked', 'bf16', 'bf16')):
        out.add('c', f'gain: {name}', t[a] / t[b], 'x')
    for step, name in (('cached', 'from the cache'), ('first', 'computed for the first time')):
        out.add('c', f'published episode / ours, weights {name}', t.published / t[step], 'x', 2,
                at_most=False)
    return nll


def _check_nll(nll):
    "All uncalibrated episodes measured the same policy"
    for name, limit in (('no hooks', 1e-3), ('views', 1e-3), ('chunked', 1e-3), ('bf16', 0.05)):
        if not abs(nll[name] - nll['published']) < limit:
            raise AssertionError(f"{name}: {nll[name]:.4f} nats per token, published way: "
                                 f"{nll['published']:.4f}")


# --------------------------------------------------------------------------------------------------
# d: memory

def resident_mb() -> float:
    "Resident memory now (Linux; elsewhere NaN)"
    try:
        return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize() / MB
    except OSError:
        return float('nan')


def peak_mb() -> float:
    "Highest resident memory of this process so far"
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB


def _bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors if t is not None) / MB


def _holds(bench, calibrator) -> dict:
    "What the big parts of a search weigh, in MB"
    weights = {p.data_ptr(): p for p in bench.elastic.model.parameters()}.values()  # tied ones once
    return dict(weights=_bytes(weights), statistics=_bytes(bench.stats.gram.values()),
                cache=calibrator._held / MB,
                factors=_bytes(t for f in calibrator._factors.values() for t in f))


def _search_memory(size, fill: bool) -> list[dict]:
    """Stages of a bf16 search with peak and present memory; `fill`: with every width in the cache
    that it can ask for"""
    rows = [dict(stage='imports', peak=peak_mb(), resident=resident_mb())]
    def stage(name, **kw):
        rows.append(dict(stage=name, peak=peak_mb(), resident=resident_mb()) | kw)
    model, tokenizer = open_model(size, torch.bfloat16)
    stage('model loaded')
    bench = open_bench(size, size.memory_blocks, model, tokenizer)
    stage('statistics')
    weights = (bench.static if fill
               else Calibrator(bench.elastic, bench.stats, size.alpha,
                               cache_bytes=size.small_cache))
    weights.prepare(progress=False)
    stage('factors', **_holds(bench, weights))
    if fill:
        lower, upper = bounds(bench.cost, size.step)
        for i, j in np.ndindex(*lower.shape):
            for k in range(int(lower[i, j]), int(upper[i, j]), size.step[j]):
                weights(i, KINDS[j], k)
        stage('every width cached', **_holds(bench, weights))
    marks = size.episodes[:1] if fill else size.episodes
    config = SearchConfig(size.sparsity, episodes=marks[-1], batch=marks[0], blocks=1,
                          step=size.step)
    search = Search(Evaluator(bench.elastic, bench.text.search, weights), bench.cost, config)
    while search.update < config.updates:
        search.step()
        if len(search.log) in marks:
            stage(f'{len(search.log)} episodes', **_holds(bench, weights))
    return rows


def _published_memory(size) -> list[dict]:
    "An episode done the published way; reset, slice, evaluate"
    model, tokenizer = open_model(size, torch.float32)
    rows = [dict(stage='model loaded', peak=peak_mb(), resident=resident_mb())]
    text, convention = load_corpus('auto')['search'], Convention(size.block_len, size.block_len)
    blocks = token_blocks(text, tokenizer, convention, n=size.blocks)
    layout = Layout(model)
    keep = np.maximum(1, (layout.full * (1 - size.sparsity)).astype(int))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), path := Path(folder) / 'dense.pt')
        published.episode(model, layout, path, leading(layout, keep), blocks)
    return rows + [dict(stage='1 episode', peak=peak_mb(), resident=resident_mb())]


CHILDREN = dict(small=lambda size: _search_memory(size, False),
                full=lambda size: _search_memory(size, True), published=_published_memory)


def part_d(size, out, threads, quick):
    "Must run before this process grows: a child's peak counts from what its parent had resident"
    stages = {}
    for name in CHILDREN:
        print(f'd: memory of a process of its own: {name}', flush=True)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, '--child', name, '--out', folder, '--threads',
                       str(threads)]
            run = subprocess.run(command + ['--quick'] * quick, capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(f'the process of {name} failed:\n{run.stderr[-3000:]}')
            stages[name] = read_json(Path(folder) / 'stages.json')
    table = {name: pd.DataFrame(rows).set_index('stage') for name, rows in stages.items()}
    small, full, cache = table['small'], table['full'], size.small_cache / MB
    for n in size.episodes:
        out.add('d', f'search, cache bound {cache:g} MB: peak after {n} episodes',
                small.peak[f'{n} episodes'], 'MB', 3000)
    first, last = (small.peak[f'{n} episodes'] for n in (size.episodes[0], size.episodes[-1]))
    # fragmentation may move the peak a little; a leak of one policy's weights an episode would be
    # thousands of MB
    out.add('d', f'search: peak after {size.episodes[-1]} / after {size.episodes[0]} episodes',
            last / first, 'x', 1.05)
    out.add('d', 'search, default bound, every width cached: peak', full.peak.iloc[-1], 'MB', 3000)
    held = ('weights', 'statistics', 'factors', 'cache')
    for what in held:
        out.add('d', f'... of which {what}', full[what].iloc[-1], 'MB')
    rest = full.resident.iloc[-1] - sum(full[what].iloc[-1] for what in held)
    out.add('d', '... of which the rest (libraries, buffers, heap that was freed but not given '
                 'back)', rest, 'MB')
    out.add('d', 'calibration only (model, statistics, factors): peak', full.peak['factors'], 'MB')
    out.add('d', 'published way, one episode: peak', table['published'].peak.iloc[-1], 'MB')
    return stages


# --------------------------------------------------------------------------------------------------
# program

def run_parts(size, parts, threads, quick) -> tuple[Results, dict]:
    "Measure; the table's rows and further details"
    out, extra, walls = Results(), {}, {}
    def timed(part, fn, *args):
        print(f'{part}: measuring', flush=True)
        start = time.perf_counter()
        result = fn(size, out, *args)
        walls[part] = round(time.perf_counter() - start, 1)
        return result
    if 'd' in parts:
        extra['stages'] = timed('d', part_d, threads, quick)
    if set(parts) & set('abc'):
        print('loading the model, statistics of the calibration text', flush=True)
        start = time.perf_counter()
        bench, inputs, stats_s = capture_inputs(size)
        walls['setup'] = round(time.perf_counter() - start, 1)
        widths = uniform(bench.cost, size.sparsity, step=size.step)
        extra |= dict(sparsity=bench.cost.sparsity(widths), corpus=bench.corpus.name,
                      corpus_sha256=bench.corpus.sha256)
        uncached = None
        if 'b' in parts:
            uncached = timed('b', part_b, bench, widths, inputs, stats_s)
        inputs.clear()
        if uncached is None:
            uncached = no_cache(size, bench)
        if 'a' in parts:
            timed('a', part_a, bench, widths)
        if 'c' in parts:
            extra['nll'] = timed('c', part_c, bench, widths, uncached)
    out.rows.sort(key=lambda r: r['part'])  # stable: the order within a part stays
    return out, extra | dict(part_wall_s=walls)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true',
                        help='a tiny random model: seconds, and no meaningful figures')
    parser.add_argument('--only', default=','.join(PARTS), help='parts to run, such as a,c')
    parser.add_argument('--out', type=Path, help='folder for the record')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(),
                        help="PyTorch's threads")
    parser.add_argument('--child', choices=CHILDREN, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.parts = [p for p in args.only.replace(' ', '').split(',') if p]
    if not args.parts or set(args.parts) - set(PARTS):
        parser.error(f'--only {args.only}: expected some of a,b,c,d')
    if args.threads < 1:
        parser.error(f'--threads {args.threads}: expected at least 1')
    args.out = args.out or ROOT / ('runs/benchmarks-quick' if args.quick else 'benchmarks/results')
    return args


def main(argv=None):
    args = arguments(argv)
    size = QUICK if args.quick else Size()
    torch.set_num_threads(args.threads)
    if args.child: return write_json(args.out / 'stages.json', CHILDREN[args.child](size))
    load = (os.getloadavg() if hasattr(os, 'getloadavg') else [float('nan')])[0]
    start = time.perf_counter()
    if load > 0.5 and not args.quick:
        print(f'warning: load of the machine is {load:.1f}; ratios may be wrong', flush=True)
    out, extra = run_parts(size, args.parts, args.threads, args.quick)
    wall_s = time.perf_counter() - start
    config = dict(name='benchmarks', parts=sorted(args.parts), threads=args.threads, **asdict(size))
    path = save_record(args.out, config, dict(rows=out.rows, load_at_start=load, **extra),
                       wall_s=round(wall_s, 1))
    with pd.option_context('display.width', 200, 'display.max_colwidth', 90):
        print('\n' + out.frame().to_string(index=False))
    if args.quick:
        print('\nA quick run: these figures of a tiny model mean nothing.')
    goals = [r for r in out.rows if r['met'] is not None]
    print(f"\n{sum(r['met'] for r in goals)} of {len(goals)} goals met; {args.threads} threads, "
          f'{wall_s / 60:.1f} minutes, load at the start {load:.1f}\nrecord: '
          f'{os.path.relpath(path)}')


if __name__ == '__main__':
    main()
