"""Seconds and memory of a gradient block against a pruned and a dense forward block.

    python benchmarks/slopes.py --threads 1       SmolLM2 in float32, sparsity 0.5, blocks of 512
    python benchmarks/slopes.py --device cuda     the same on a GPU
    python benchmarks/slopes.py --quick           a tiny model, seconds: only shows that it runs

`dense` and `pruned` are block_nll of the dense model and of the elastic one at half its
parameters, with repaired weights from the cache, as in the episodes of a search. `slopes` is
measure_slopes at the same widths with the span of a search, `kl` the same with the divergence from
the dense model's hidden states, kept before, and `all units` has no span. Turns alternate, and a
ratio is the median over the turns of the ratio within a turn to `pruned`. `peak_bytes` is what a
job needs at its peak above what was held before: the allocator's figure on a GPU, on the CPU the
resident memory of the process, after free memory was given back (Linux only).

Results go to a JSON record under benchmarks/results/ (with --quick under runs/, which git ignores).
Close other programs first: the load of the machine at the start is recorded. """
import ctypes
import gc
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import arguments, load_at_start

from ffp_nb.core.budget import param_cost, solve
from ffp_nb.core.criteria import unit_order
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import Layout, load_model, tiny_model
from ffp_nb.core.perplexity import block_nll
from ffp_nb.core.ridge import Calibrator
from ffp_nb.core.runs import save_record
from ffp_nb.core.slopes import default_span, dense_states, measure_slopes
from ffp_nb.core.stats import collect_stats
from ffp_nb.core.text import Blocks, Convention, load_corpus, token_blocks

@dataclass(frozen=True)
class Size:
    "What is measured"
    model: str | None = 'smollm2'  # None: a tiny random LLaMA
    block_len: int = 512
    step: tuple[int, int] = (1, 32)
    start: float = 2.0  # head start of the attention, as in a search by slopes
    sparsity: float = 0.5
    turns: int = 5
    calibration: int = 4  # blocks


QUICK = Size(None, 32, (1, 8), turns=2)


def jobs(size: Size, device: str) -> dict:
    "Name -> function to be timed, each on one block of text"
    if size.model is None:
        model, g = tiny_model().to(device), torch.Generator().manual_seed(0)
        text = Blocks(torch.randint(0, 211, (5, size.block_len), generator=g), size.block_len - 1)
        calibration, block = text[:4], text[4]
    else:
        model, tokenizer = load_model(size.model, 'float32', device=device)
        corpus, how = load_corpus('pydoc'), Convention(size.block_len, size.block_len)
        calibration = token_blocks(corpus['calibration'], tokenizer, how, n=size.calibration)
        block = token_blocks(corpus['search'], tokenizer, how, n=1)
    layout = Layout(model)
    stats = collect_stats(model, layout, calibration, progress=False)
    em = ElasticModel(model, unit_order(layout, stats))
    static = Calibrator(em, stats.permute(em.columns)).prepare(progress=False)
    cost = param_cost(layout)
    widths = solve(np.tile([size.start, 0.0], (len(layout.full), 1)), cost, size.sparsity,
                   size.step)
    span, states = default_span(layout.full), dense_states(em, block.ids, int(block.counts.max()))
    def forward(w, weights):
        with em.at(w, weights):
            block_nll(model, block)
    follow = lambda *how: [*measure_slopes(em, widths, block, static, 1, *how)]
    return {'dense': lambda: forward(layout.full, None), 'pruned': lambda: forward(widths, static),
            'slopes': lambda: follow(span), 'kl': lambda: follow(span, states),
            'all units': lambda: follow(None)}


def peak_of(job, device) -> int | None:
    "Bytes that a job needs at its peak above what was held before; None: not known here"
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return torch.cuda.max_memory_allocated() - before
    status = lambda key: int(next(line.split()[1] for line in open('/proc/self/status')
                                  if line.startswith(key))) * 1024
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free is given back, or a job would reuse it
        Path('/proc/self/clear_refs').write_text('5')  # forgets the peak before
        before = status('VmRSS')
    except (OSError, AttributeError):
        return None
    job()
    return status('VmHWM') - before


def measure(size, device) -> list[dict]:
    "A row for each job: seconds of all turns, as ratios, and memory"
    todo, seconds = jobs(size, device), {}
    sync = torch.cuda.synchronize if device == 'cuda' else lambda: None
    for job in todo.values():  # the first call fills caches and loads kernels
        job()
    for _ in range(size.turns):
        for name, job in todo.items():
            sync()
            start = time.perf_counter()
            job()
            sync()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    ratio = lambda s, name: float(np.median([a / b for a, b in zip(s, seconds[name])]))
    return [dict(what=name, seconds=s, median_s=float(np.median(s)),
                 times_pruned=ratio(s, 'pruned'), times_dense=ratio(s, 'dense'),
                 peak_bytes=peak_of(todo[name], device)) for name, s in seconds.items()]


def main(argv=None):
    args = arguments(__doc__, 'a tiny model', argv, device=True)
    size = QUICK if args.quick else Size()
    load = load_at_start(args)
    start = time.perf_counter()
    rows = measure(size, args.device)
    config = dict(name='slopes', device=args.device, threads=args.threads, **asdict(size))
    path = save_record(args.out, config, dict(rows=rows, load_at_start=load),
                       wall_s=round(time.perf_counter() - start, 1))
    table = pd.DataFrame(rows).drop(columns='seconds')
    table['peak_MB'] = table.pop('peak_bytes') / 1e6
    with pd.option_context('display.width', 200):
        print('\n' + table.round(3).to_string(index=False))
    if args.quick:
        print('A quick run: these figures of a tiny model mean nothing.')
    print(f'record: {os.path.relpath(path)}')


if __name__ == '__main__':
    main()
