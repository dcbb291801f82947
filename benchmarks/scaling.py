"""Time and memory of every stage against the size of the model, and what that means for 7, 13 and
70 billion parameters.

    python benchmarks/scaling.py --threads 2      six shapes measured or projected
    python benchmarks/scaling.py --device cuda    the same on a GPU, 13B measured, too
    python benchmarks/scaling.py --quick          tiny shapes, seconds: only shows that it runs

The weights are random: neither time nor memory depends on their values. All layers of a model are
alike, so each shape is measured at two depths, and a line through the two gives the cost of a layer
and of the rest (embeddings, head). The shapes of SmolLM2 135M, 360M and 1.7B and of LLaMA-7B are
measured, on a GPU that of 13B, too; larger ones are projected: a stage's work is counted (`work` in
the page of the scaling study), and the rate at the largest measured shape is taken. How well that
works is measured too: that shape is projected from the one before and compared.

Stages: statistics of calibration text, factors of all modules, setting a policy with new calibrated
weights and with weights from the cache, pruned forward pass (sparsity 0.5), sequential calibration.
Memory: bytes of the tensors that a stage holds, counted from the objects themselves.

Results go to a JSON record under benchmarks/results/ (with --quick under runs/, which git ignores).
Close other programs first: the load of the machine at the start is recorded. """
import gc
import os
import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
import torch
from common import arguments, load_at_start

from ffp_nb.core.budget import param_cost, random_scores, solve
from ffp_nb.core.criteria import unit_order
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import Layout, tiny_model
from ffp_nb.core.perplexity import block_nll
from ffp_nb.core.ridge import Calibrator, sequential_calibrate
from ffp_nb.core.runs import save_record
from ffp_nb.core.stats import collect_stats
from ffp_nb.core.text import Blocks
from ffp_nb.studies.scaling import Shape, project, totals

SHAPES = {'135M': Shape(30, 576, 9, 3, 1536, 49152), '360M': Shape(32, 960, 15, 5, 2560, 49152),
          '1.7B': Shape(24, 2048, 32, 32, 8192, 49152), '7B': Shape(32, 4096, 32, 32, 11008),
          '13B': Shape(40, 5120, 40, 40, 13824), '70B': Shape(80, 8192, 64, 8, 28672)}
SMALL = {'a': Shape(4, 32, 4, 2, 64, 211), 'b': Shape(6, 64, 8, 4, 96, 211),
         'c': Shape(8, 96, 8, 4, 160, 211)}


@dataclass(frozen=True)
class Size:
    "How much is measured"
    measured: tuple[str, ...] = ('135M', '360M', '1.7B', '7B')
    depths: tuple[int, int] = (1, 2)
    block_len: int = 256
    blocks: int = 2
    turns: int = 3
    sparsity: float = 0.5


# a GPU is idle at the blocks of a CPU: four of 2,048 tokens, as in the tables of the field
GPU = Size(('135M', '360M', '1.7B', '7B', '13B'), block_len=2048, blocks=4)


def tensors(*values) -> int:
    "Bytes of all tensors in nested dicts, lists and tuples, each storage once"
    seen = {}
    def walk(v):
        if torch.is_tensor(v):
            seen[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        elif isinstance(v, dict):
            [walk(x) for x in v.values()]
        elif isinstance(v, (list, tuple)):
            [walk(x) for x in v]
    walk(values)
    return sum(seen.values())


def measure(shape: Shape, layers: int, size: Size, device: str = 'cpu') -> dict:
    "Seconds (a list over turns) and bytes of each stage of a model with this many layers"
    with torch.device(device):
        model = tiny_model('llama', layers, shape.hidden, shape.heads, shape.kv_heads, shape.ffn,
                           shape.vocab).bfloat16()
    layout, seconds = Layout(model), {}
    ids = torch.randint(3, shape.vocab, (size.blocks, size.block_len),
                        generator=torch.Generator().manual_seed(0))
    blocks = Blocks(ids, size.block_len - 1)
    def timed(stage, fn):
        start = time.perf_counter()
        out = fn()
        if device == 'cuda':
            torch.cuda.synchronize()
        seconds.setdefault(stage, []).append(time.perf_counter() - start)
        return out
    for _ in range(size.turns):
        stats = timed('statistics', lambda: collect_stats(model, layout, blocks, progress=False))
    elastic = ElasticModel(model, unit_order(layout, stats))
    stats, cost = stats.permute(elastic.columns), param_cost(layout)
    # holds all policies, whatever memory is free: their size is measured
    calibrator = timed('factors', lambda: Calibrator(elastic, stats, cache_bytes=float('inf'))
                       .prepare(progress=False))
    step = (1, max(1, shape.ffn // 48))
    policies = [solve(random_scores(i, cost.full.shape), cost, size.sparsity, step)
                for i in range(size.turns)]
    for w in policies:
        timed('new_policy', lambda: elastic.set(w, calibrator))
    for w in policies:
        timed('cached_policy', lambda: elastic.set(w, calibrator))
    for w in policies:
        timed('forward', lambda: block_nll(elastic.model, blocks))
    elastic.restore()
    timed('sequential',
          lambda: sequential_calibrate(elastic, policies[0], blocks, 1.0, calibrator, 'residual',
                                       progress=False))
    parts = dict(weights_GB=tensors(*model.parameters()), gram_GB=tensors(stats.gram, stats.total),
                 factors_GB=tensors(calibrator._factors),
                 policy_GB=calibrator._held // len(policies))
    return dict(seconds=seconds, bytes=parts)


def fit(shape: Shape, size: Size, device: str = 'cpu') -> list[dict]:
    """For each stage a row with the time of a layer and of the rest, and for each kind of memory
    one with bytes"""
    a, b = size.depths
    lo, hi = (measure(shape, d, size, device) for d in (a, b))
    gc.collect()
    torch.cuda.empty_cache()  # nothing without a GPU
    rows = []
    for stage in lo['seconds']:
        x, y = (float(np.median(m['seconds'][stage])) for m in (lo, hi))
        rows.append(dict(what=stage, unit='s', layer=max(y - x, 0.0) / (b - a),
                         rest=max(x - a * max(y - x, 0.0) / (b - a), 0.0)))
    for part in lo['bytes']:
        x, y = lo['bytes'][part], hi['bytes'][part]
        rows.append(dict(what=part, unit='bytes', layer=(y - x) / (b - a),
                         rest=x - a * (y - x) / (b - a)))
    return rows


def run(shapes: dict, size: Size, device: str = 'cpu') -> dict:
    "Measure, project, and compare a projection with a measurement"
    measured, tokens = {}, size.blocks * size.block_len
    if device == 'cuda':  # its libraries load what they need at the first call
        measure(SMALL['a'], 1, size, device)
    for name in size.measured:
        print(f'{name}: measuring {size.depths[0]} and {size.depths[1]} layers', flush=True)
        measured[name] = fit(shapes[name], size, device)
    last, before = size.measured[-1], size.measured[-2]
    rows = [dict(model=n, how='measured', **totals(measured[n], shapes[n], tokens))
            for n in size.measured]
    larger = [n for n in shapes if n not in size.measured]
    rows += [dict(model=n, how='projected',
                  **totals(project(measured[last], shapes[last], shapes[n], tokens), shapes[n],
                           tokens))
             for n in larger]
    guess = totals(project(measured[before], shapes[before], shapes[last], tokens), shapes[last],
                   tokens)
    known = totals(measured[last], shapes[last], tokens)
    check = {k: float(guess[k] / known[k]) for k in known if known[k] > 0}
    return dict(rows=rows, layers=measured, check=dict(projected=last, of=before, ratio=check))


def main(argv=None):
    args = arguments(__doc__, 'tiny shapes', argv, device=True)
    size = GPU if args.device == 'cuda' else Size()
    if args.quick:
        size = replace(size, measured=('a', 'b'), block_len=32, turns=2)
    load = load_at_start(args)
    start = time.perf_counter()
    shapes = SMALL if args.quick else SHAPES
    found = run(shapes, size, args.device)
    config = dict(name='scaling', threads=args.threads,
                  shapes={k: asdict(v) for k, v in shapes.items()}, **asdict(size))
    if args.device != 'cpu':
        config['device'] = args.device
    path = save_record(args.out, config, found | dict(load_at_start=load),
                       wall_s=round(time.perf_counter() - start, 1))
    with pd.option_context('display.width', 200):
        print('\n' + pd.DataFrame(found['rows']).set_index('model').round(3).T.to_string())
    print('\nprojection / measurement:',
          {k: round(v, 2) for k, v in found['check']['ratio'].items()})
    if args.quick:
        print('A quick run: these figures of tiny models mean nothing.')
    print(f'record: {os.path.relpath(path)}')


if __name__ == '__main__':
    main()
