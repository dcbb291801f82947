"""Tokens a second and memory of training a pruned model: on text, or taught by the dense model.

    python benchmarks/distill.py --threads 1       SmolLM2, half of its blocks, steps of 2 blocks
    python benchmarks/distill.py --device cuda     the same on a GPU
    python benchmarks/distill.py --quick           a tiny model, seconds: only shows that it runs

Every job is two steps of training from the same pruned model, with AdamW. `text` is the loss of
the text itself, `distill` the divergence from the dense model; both train all weights.
`checkpointing` keeps one state a layer, `chunks` makes logits for 64 positions at a time (by
default as many as fit in `MOST_LOGITS`), `lora` trains low-rank additions to weights that are views
of the dense model's.
Jobs alternate; `tokens_s` is the median over the turns, and `times_text` the median of the ratio to
`text` within a turn. `peak_bytes` is what a job needs at its peak above what was held before, the
dense model: the allocator's figure on a GPU, the resident memory of the process on the CPU (Linux).

Results go to a JSON record under benchmarks/results/ (with --quick under runs/, which git ignores).
Close other programs first: the load of the machine at the start is recorded. """
import os
import time
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
from common import arguments, load_at_start
from slopes import peak_of

from ffp_nb.core.budget import param_cost, uniform
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import load_model, tiny_model
from ffp_nb.core.runs import save_record
from ffp_nb.core.text import Blocks, Convention, load_corpus, token_blocks
from ffp_nb.recover import distill as distilling
from ffp_nb.recover.distill import Distillation, distill

@dataclass(frozen=True)
class Size:
    "What is measured"
    model: str | None = 'smollm2'  # None: a tiny random LLaMA
    dtype: str = 'auto'
    block_len: int = 512
    batch: int = 2
    steps: int = 2
    sparsity: float = 0.5
    turns: int = 2


QUICK = Size(None, 'float32', 32, 2, 2, turns=1)
JOBS = {'text': dict(truth=1.0), 'distill': {}, 'chunks': {},
        'checkpointing': dict(checkpointing=True), 'hidden': dict(hidden=1.0),
        'text lora': dict(method='lora', truth=1.0),
        'lora': dict(method='lora'),
        'lora checkpointing': dict(method='lora', checkpointing=True)}


def jobs(size: Size, device: str) -> dict:
    "Name -> function to be timed"
    if size.model is None:
        model, g = tiny_model().to(device), torch.Generator().manual_seed(0)
        text = Blocks(torch.randint(0, 211, (8, size.block_len), generator=g), size.block_len - 1)
    else:
        model, tokenizer = load_model(size.model, size.dtype, device=device)
        how = Convention(size.block_len, size.block_len)
        text = token_blocks(load_corpus('pydoc')['calibration'], tokenizer, how,
                            n=size.batch * size.steps)
    em = ElasticModel(model)
    cost = param_cost(em.layout)
    widths = uniform(cost, size.sparsity, ('ffn',), (1, 8))
    def run(name, settings):
        whole = distilling.MOST_LOGITS
        recipe = Distillation(**dict(tokens=size.steps * size.batch * size.block_len, lr=1e-5,
                                     batch=size.batch) | settings)
        try:
            if name == 'chunks':
                distilling.MOST_LOGITS = 64 * model.config.vocab_size
            distill(em, widths, text, recipe, progress=False)
        finally:
            distilling.MOST_LOGITS = whole
    return {name: lambda name=name, s=s: run(name, s) for name, s in JOBS.items()}


def measure(size, device) -> list[dict]:
    "A row for each job: seconds of all turns, as ratios, and memory"
    todo, seconds, peaks = jobs(size, device), {}, {}
    for name, job in todo.items():  # the first call fills caches
        peaks[name] = peak_of(job, device)
    for _ in range(size.turns):
        for name, job in todo.items():
            start = time.perf_counter()
            job()  # ends with a loss on the CPU
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    tokens = size.steps * size.batch * size.block_len
    return [dict(what=name, seconds=s, tokens_s=tokens / float(np.median(s)),
                 times_text=float(np.median([a / b for a, b in zip(s, seconds['text'])])),
                 peak_bytes=peaks[name]) for name, s in seconds.items()]


def main(argv=None):
    args = arguments(__doc__, 'a tiny model', argv, device=True)
    size = QUICK if args.quick else Size()
    load, start = load_at_start(args), time.perf_counter()
    rows = measure(size, args.device)
    config = dict(name='distill', device=args.device, threads=args.threads, **asdict(size))
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
