"""What the last positions' logits cost: a slice of hidden states as transformers gives it to the
head, against the same slice with the strides of one matrix.

    python benchmarks/head.py --threads 1      heads of three models, a minute or two
    python benchmarks/head.py --device cuda    the same on a GPU
    python benchmarks/head.py --quick          tiny heads, seconds: only shows that it runs

`sliced` is head(hidden[:, -k:]), which `logits_to_keep=k` computes; `one matrix` the same inside
ffp_nb.core.perplexity.sliced_head, as zero-shot tasks compute it; `all` the head on all positions.
The weights are random, in bfloat16 where the machine has it, else in float32. Turns alternate, and
a ratio is the median over the turns of the ratio within a turn.

Results go to a JSON record under benchmarks/results/ (with --quick under runs/, which git ignores).
Close other programs first: the load of the machine at the start is recorded.
"""
import os
import time
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from common import arguments, load_at_start

from ffp_nb.core.families import has_bfloat16
from ffp_nb.core.perplexity import sliced_head
from ffp_nb.core.runs import save_record


@dataclass(frozen=True)
class Size:
    "What is measured: heads by vocabulary and hidden size"
    heads: tuple[tuple[str, int, int], ...] = (('SmolLM2-135M', 49152, 576),
                                               ('Gemma 3 270M', 262144, 640),
                                               ('Llama-3.1-8B', 128256, 4096))
    batches: tuple[int, ...] = (1, 4)
    tokens: int = 128  # of a sequence
    keep: int = 16  # positions at its end
    turns: int = 5


def measure(size: Size, name, vocab, d, dtype, device) -> list[dict]:
    "A row for each batch and way: seconds of all turns, and how many times `one matrix` they are"
    rows, g = [], torch.Generator(device).manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=g, device=device, dtype=dtype)
    head = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
    head.weight = torch.nn.Parameter(random(vocab, d), requires_grad=False)
    model = SimpleNamespace(get_output_embeddings=lambda: head)
    sync = torch.cuda.synchronize if device == 'cuda' else lambda: None
    for batch in size.batches:
        hidden = random(batch, size.tokens, d)
        def one_matrix():
            with sliced_head(model):
                return head(hidden[:, -size.keep:])
        ways = {'sliced': lambda: head(hidden[:, -size.keep:]), 'one matrix': one_matrix,
                'all': lambda: head(hidden)}
        want, seconds = one_matrix(), {}
        far = {n: float((w()[:, -size.keep:] - want).abs().max()) for n, w in ways.items()}
        for _ in range(size.turns):
            for way, f in ways.items():
                sync()
                start = time.perf_counter()
                f()
                sync()
                seconds.setdefault(way, []).append(time.perf_counter() - start)
        ratio = lambda s: float(np.median([a / b for a, b in zip(s, seconds['one matrix'])]))
        rows += [dict(head=name, batch=batch, what=way, seconds=s, median_s=float(np.median(s)),
                      times_one_matrix=ratio(s), furthest_logit=far[way])
                 for way, s in seconds.items()]
    return rows


@torch.inference_mode()
def main(argv=None):
    args = arguments(__doc__, 'tiny heads', argv, device=True)
    size = Size((('tiny', 211, 32),), tokens=24, keep=5, turns=2) if args.quick else Size()
    dtype = 'bfloat16' if has_bfloat16(args.device) else 'float32'
    load, start, rows = load_at_start(args), time.perf_counter(), []
    for what in size.heads:
        print(f'{what[0]}: measuring', flush=True)
        rows += measure(size, *what, getattr(torch, dtype), args.device)
    config = dict(name='head', device=args.device, threads=args.threads, dtype=dtype,
                  **asdict(size))
    path = save_record(args.out, config, dict(rows=rows, load_at_start=load),
                       wall_s=round(time.perf_counter() - start, 1))
    with pd.option_context('display.width', 200):
        print('\n' + pd.DataFrame(rows).drop(columns='seconds').round(3).to_string(index=False))
    if args.quick:
        print('A quick run: these figures of tiny heads mean nothing.')
    print(f'record: {os.path.relpath(path)}')


if __name__ == '__main__':
    main()
