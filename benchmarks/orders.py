"""Seconds of an order by greedy elimination against those of the ridge's own factorisation.

    python benchmarks/orders.py --threads 1       SmolLM2's FFN, and a random one of 4,096 channels
    python benchmarks/orders.py --device cuda     also 11,008 and 14,336 channels (7B and 8B models)
    python benchmarks/orders.py --quick           tiny matrices, seconds: only shows that it runs

Both start from the same Gram matrix and weights. `ridge` is ridge_factors: one Cholesky
factorisation, its inverse and one product. `greedy`, `forward` and `fisher` are whole calls of
obs_order; `steps` is greedy without blocks, for the first size only. Turns alternate, and a ratio
is the median over the turns of the ratio within a turn. SmolLM2's matrices come from four blocks of
Python's help topics, the others from random numbers.

Results go to a JSON record under benchmarks/results/ (with --quick under runs/, which git ignores).
Close other programs first: the load of the machine at the start is recorded. """
import os
import time
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from common import arguments, load_at_start

from ffp_nb.core.families import Layout, Module, load_model
from ffp_nb.core.orders import ORDERS, _groups, obs_order
from ffp_nb.core.ridge import ridge_factors, ridge_matrix
from ffp_nb.core.runs import save_record
from ffp_nb.core.stats import GramStats, collect_stats
from ffp_nb.core.text import load_corpus, token_blocks

KEY, ALPHA = (10, 'ffn'), 0.1


@dataclass(frozen=True)
class Size:
    "What is measured: columns n and outputs D of a random projection; None: SmolLM2's"
    sizes: tuple[tuple[int, int] | None, ...] = (None, (4096, 4096))
    turns: int = 3
    steps: bool = True  # greedy without blocks, for the first size


def problem(size, device) -> tuple[Module, GramStats]:
    "An FFN's output projection and its statistics"
    if size is None:
        model, tokenizer = load_model('smollm2', 'float32', device=device)
        layout = Layout(model)
        blocks = token_blocks(load_corpus('pydoc')['calibration'], tokenizer, n=4)
        stats = collect_stats(model, layout, blocks, progress=False)
        return layout.modules[KEY], GramStats({KEY: stats.gram[KEY]}, {KEY: stats.total[KEY]},
                                              stats.tokens)
    n, D = size
    g = torch.Generator(device).manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=g, device=device)
    out = torch.nn.Linear(n, D, bias=False, device=device).requires_grad_(False)
    out.weight.copy_(random(D, n))
    x = random(2 * n, n) * torch.logspace(-1, 1, n, device=device) + random(2 * n, 1)
    return (Module(*KEY, n, (), out, 1),
            GramStats({KEY: (x.T @ x).cpu()}, {KEY: x.sum(0).cpu()}, 2 * n))


def jobs(module, stats, steps) -> dict:
    "Name -> function to be timed"
    W, gram, layout = module.out.weight.float(), stats.gram[KEY], SimpleNamespace(
        modules={KEY: module})
    g = torch.randn(1024, len(W), generator=torch.Generator().manual_seed(1))
    fisher = {KEY: g.T @ g}
    order = lambda how: obs_order(layout, stats, ALPHA, how, fisher, progress=False)
    found = dict(ridge=lambda: ridge_factors(W, gram, ALPHA))
    found |= {how: lambda how=how: order(how) for how in ORDERS}
    if steps:
        def slowly():
            C = torch.cholesky_inverse(torch.linalg.cholesky(ridge_matrix(gram.to(W.device),
                                                                          ALPHA)))
            V = W.double()
            return _groups(C, V.T @ V, 1, False)
        found['steps'] = slowly
    return found


def measure(size, device, turns, steps) -> list[dict]:
    "A row for each job: seconds of all turns, and how many times the ridge's they are"
    module, stats = problem(size, device)
    sync = torch.cuda.synchronize if device == 'cuda' else lambda: None
    seconds, memory, todo = {}, {}, jobs(module, stats, steps)
    if device == 'cuda':  # the first call of every kernel loads it
        for job in todo.values():
            job()
    for turn in range(turns):
        for name, job in todo.items():
            if name == 'steps' and turn: continue
            sync()
            if device == 'cuda':
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            job()
            sync()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
            if device == 'cuda':
                memory[name] = torch.cuda.max_memory_allocated()
    shape = dict(model='SmolLM2-135M' if size is None else 'random', n=module.out.in_features,
                 D=module.out.out_features)
    ratio = lambda s: float(np.median([a / b for a, b in zip(s, seconds['ridge'])]))
    return [dict(**shape, what=name, seconds=s, median_s=float(np.median(s)), times_ridge=ratio(s),
                 peak_bytes=memory.get(name)) for name, s in seconds.items()]


def main(argv=None):
    args = arguments(__doc__, 'tiny matrices', argv, device=True)
    size = Size(((96, 24), (160, 32)), 2) if args.quick else Size()
    if args.device == 'cuda' and not args.quick:
        size = Size((*size.sizes, (11008, 4096), (14336, 4096)))
    load = load_at_start(args)
    start, rows = time.perf_counter(), []
    for i, what in enumerate(size.sizes):
        print(f'{what or "SmolLM2"}: measuring', flush=True)
        rows += measure(what, args.device, size.turns, size.steps and i == 0)
    config = dict(name='orders', device=args.device, threads=args.threads, alpha=ALPHA,
                  **asdict(size))
    path = save_record(args.out, config, dict(rows=rows, load_at_start=load),
                       wall_s=round(time.perf_counter() - start, 1))
    table = pd.DataFrame(rows).drop(columns='seconds')
    with pd.option_context('display.width', 200):
        print('\n' + table.dropna(axis=1).round(3).to_string(index=False))
    if args.quick:
        print('A quick run: these figures of tiny matrices mean nothing.')
    print(f'record: {os.path.relpath(path)}')


if __name__ == '__main__':
    main()
