"""Does a prefill keep its promise? The measured time as the budget, against removed MACs.

    python benchmarks/latency.py --threads 1    SmolLM2-135M, a quarter of an hour on a quiet core
    python benchmarks/latency.py --quick        a tiny random model: only shows that it runs

For PyTorch (bfloat16 where the CPU has it, else float32) and llama.cpp (F16, with the package
xllamacpp) the prefill of one prompt is timed at a few designs and fitted (ffp_nb.core.latency).
The scores of the searched policies in nbs/runs/slopes (the default search, seed 0) then become
widths that shall take 0.2, 0.3 and 0.5 less time than the dense model:

fit         with the fitted time as the budget
settled     the same, after the chosen widths were timed and the target was moved by what the fit
            missed, as `ffp prune --speedup` does
macs        with multiply-accumulates as the budget: the whole prefill, with the head once, has as
            many fewer of them as the time should be shorter

Each is saved, opened again, and takes turns with the dense model; a speed-up is the median over the
turns of the ratio within a turn. In PyTorch the weights are those of the dense model, sliced: what
they are does not matter for speed.

Results go to a JSON record under benchmarks/results/ (with --quick under runs/, which git ignores).
Close other programs first: the load of the machine at the start and at the end is recorded.
"""
import importlib.util
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from common import ROOT, arguments, load_at_start
from speed import GOAL, context_size, prompt_ids, tiny_tokenizer

from ffp_nb.core.budget import Cost, bounds, feasible_range, random_scores, solve
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import has_bfloat16, load_model, tiny_model
from ffp_nb.core.latency import Prefill, fit_latency, prefill_of, settle
from ffp_nb.core.runs import load_records, save_record
from ffp_nb.export.gguf import export_gguf
from ffp_nb.export.hf import load_pruned, save_pruned


@dataclass(frozen=True)
class Size:
    "What is measured"
    model: str | None = 'smollm2'  # None: a tiny random LLaMA
    targets: tuple[float, ...] = (0.2, 0.3, 0.5)  # of the prefill time
    prompt: int = 512  # tokens
    step: tuple[int, int] = (1, 32)
    fit_turns: int = 3
    turns: int = 5
    engines: tuple[str, ...] = ('bfloat16', 'llama.cpp')


QUICK = Size(None, (0.3,), 64, (1, 8), 1, 2, ('float32', 'llama.cpp'))


class Torch:
    "PyTorch in one type"
    def __init__(self, size: Size, dtype: str, folder: Path):
        model, tokenizer = ((tiny_model(vocab=258), tiny_tokenizer()) if size.model is None
                            else load_model(size.model, dtype, 'cpu'))
        self.elastic, self.size, self.folder = ElasticModel(model), size, folder / dtype
        self.tokenizer, self.name, self.made = tokenizer, f'PyTorch {dtype}', 0
        self.measure = prefill_of(self.elastic, size.prompt)
        self.dense = Prefill(model, size.prompt)

    def save(self, widths) -> Path:
        self.made += 1
        with self.elastic.at(widths):
            return save_pruned(self.elastic, self.tokenizer, self.folder / str(self.made))

    def again(self, widths):
        "The clock of a saved model that was opened again"
        return Prefill(load_pruned(self.save(widths))[0], self.size.prompt)


class Llama(Torch):
    "llama.cpp, whose every design is a file"
    def __init__(self, size: Size, folder: Path, threads: int):
        super().__init__(size, 'float32', folder)
        self.folder, self.name, self.threads = folder / 'llama', 'llama.cpp F16', threads
        self.ids, self.held = prompt_ids(size.prompt), {}
        self.measure = lambda widths: self.clock(widths)()
        self.dense = self.clock(self.elastic.layout.full)

    def clock(self, widths):
        from llamacpp import LlamaCpp
        if (key := np.asarray(widths).tobytes()) not in self.held:
            path = export_gguf(self.save(widths), self.folder / f'{self.made}.gguf', 'f16')
            self.held[key] = LlamaCpp(path, self.threads, context_size(Places(self.size.prompt)))
        return lambda: self.held[key].prefill(self.ids)

    def again(self, widths):
        return self.clock(widths)

    def forget(self):
        "Let go of all but the dense model"
        self.held = dict(list(self.held.items())[:1])


@dataclass
class Places:
    prompt: int
    context: int = 0
    decoded: int = 1


def scores_of(size: Size, target: float, shape) -> tuple[np.ndarray, str | None]:
    "Scores of the default search at a target, and the id of its record"
    if size.model is None: return random_scores(0, shape), None
    t = load_records(ROOT / 'nbs' / 'runs' / 'slopes')
    row, = t[(t['config.name'] == f'smollm2-gradient-{target}-0')
             & t['environment.hardware.gpu'].isna()].itertuples()
    row = t.loc[row.Index]
    return np.array(row['result.search.scores']), row.config_id


def prefill_macs(elastic, prompt: int) -> Cost:
    "MACs of a whole prefill, with the head once"
    layout, head = elastic.layout, elastic.model.get_output_embeddings().weight
    return Cost(prompt * layout.unit_macs(prompt), layout.full, head.numel(), 'MACs of a prefill')


def speed_ups(engine, policies: dict, turns: int) -> dict[str, list[float]]:
    "Dense over pruned of each turn, for saved models that take turns"
    clocks = dict(dense=engine.dense) | {n: engine.again(w) for n, w in policies.items()}
    rows = [{n: c() for n, c in clocks.items()} for _ in range(turns + 1)][1:]
    return {n: [r['dense'] / r[n] for r in rows] for n in policies}


def part(engine, size: Size) -> tuple[list[dict], dict]:
    "Rows of one engine, and its fit"
    layout = engine.elastic.layout
    fit = fit_latency(engine.measure, layout, size.step, turns=size.fit_turns)
    print(f'{engine.name}: {fit.say()}', flush=True)
    if hasattr(engine, 'forget'):
        engine.forget()
    costs = dict(fit=fit.cost(layout), macs=prefill_macs(engine.elastic, size.prompt))
    rows = []
    for target in size.targets:
        if size.model is None:  # overheads are most of the time of a tiny model
            target = min(target, 0.8 * feasible_range(
                costs['fit'], *bounds(costs['fit'], size.step))[1])
        scores, source = scores_of(size, target, layout.full.shape)
        limits = feasible_range(costs['fit'], *bounds(costs['fit'], size.step))
        at = {n: lambda s, c=c: solve(scores, c, s, size.step) for n, c in costs.items()}
        policies = {n: f(target) for n, f in at.items()}
        policies['settled'], tried = settle(engine.measure, at['fit'], layout.full, target, limits)
        found = speed_ups(engine, policies, size.turns)
        for name, ratios in found.items():
            speed, promised = float(np.median(ratios)), 1 / (1 - target)
            rows.append(dict(
                engine=engine.name, target=target, budget=name, promised=promised,
                measured=speed, low=min(ratios), high=max(ratios), reached=speed / promised,
                met=speed / promised >= GOAL, within=abs(speed / promised - 1) <= 1 - GOAL,
                widths=policies[name], scores=source, ratios=ratios,
                **dict(tried=tried) if name == 'settled' else {}))
            print(f"  {target:.0%} less time by {name}: {speed:.3f} x of {promised:.3f} x "
                  f'promised, {speed / promised:.1%}', flush=True)
        if hasattr(engine, 'forget'):
            engine.forget()
    return rows, fit.plain


def main(argv=None):
    args = arguments(__doc__, 'a tiny random model', argv)
    size, start = QUICK if args.quick else Size(), time.perf_counter()
    load = load_at_start(args)
    rows, fits = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in size.engines:
            if name == 'llama.cpp' and importlib.util.find_spec('xllamacpp') is None: continue
            if name == 'bfloat16' and not has_bfloat16('cpu'):
                name = 'float32'
            engine = (Llama(size, Path(folder), args.threads) if name == 'llama.cpp'
                      else Torch(size, name, Path(folder)))
            found, fits[engine.name] = part(engine, size)
            rows += found
            del engine
    config = dict(name='latency', threads=args.threads, **asdict(size))
    path = save_record(args.out, config,
                       dict(rows=rows, fits=fits, load_at_start=load, load_at_end=os.getloadavg()),
                       wall_s=round(time.perf_counter() - start, 1))
    shown = pd.DataFrame(rows)[['engine', 'target', 'budget', 'promised', 'measured', 'reached']]
    print('\n' + shown.round(3).to_string(index=False))
    if args.quick:
        print('A quick run: these figures of a tiny model mean nothing.')
    for name, group in pd.DataFrame(rows).groupby('budget'):
        print(f'{name}: {group.met.sum()} of {len(group)} reach {GOAL:.0%} of what was promised, '
              f'{group.within.sum()} are within {1 - GOAL:.0%}')
    print(f'record: {os.path.relpath(path)}')


if __name__ == '__main__':
    main()
