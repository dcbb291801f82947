"""One elastic folder against separate pruned models: disk, memory, and times.

    python benchmarks/elastic.py --threads 1    SmolLM2, with the policies of the study `elastic`
    python benchmarks/elastic.py --quick        a tiny model: only shows that it runs

The folder is made from the sweep of the study (nbs/runs/elastic), so nothing is searched. Separate
models are folders that `DynamicModel.save` cut from it. Figures about memory and opening are each
from a process of its own, after its imports. `cold`: the system was asked to drop the pages of the
repairs, and a width is used for the first time; a switch only maps the projections, so their pages
are read by the first token after it, which is timed, too. `warm`: used before.

Results go to a JSON record under benchmarks/results/ (with --quick under runs/, which git ignores).
Close other programs first: the load of the machine at the start is recorded. """
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from common import ROOT, arguments, load_at_start

from ffp_nb.core.families import tiny_model, tiny_tokenizer
from ffp_nb.core.runs import read_json, save_record
from ffp_nb.core.text import Corpus
from ffp_nb.export.hf import load_pruned
from ffp_nb.pipeline.bench import Bench
from ffp_nb.pipeline.config import PROFILES, Profile, PruneConfig
from ffp_nb.pipeline.dynamic import ScorePath, load_elastic, save_elastic


@dataclass(frozen=True)
class Size:
    "What is measured"
    model: str | None = 'smollm2'  # None: a tiny random LLaMA
    numbers: tuple[int, ...] = (5, 9)  # of separate models
    low: float = 0.1
    high: float = 0.5
    prompt: int = 512  # tokens
    new: int = 32
    turns: int = 5


QUICK = Size(None, (2,), prompt=16, new=4, turns=2)


def make_folder(size: Size, out: Path) -> None:
    "The elastic folder"
    if size.model is None:
        rng = np.random.default_rng(0)
        text = {s: '\n\n'.join(''.join(map(chr, rng.integers(97, 122, 300))) for _ in range(40))
                for s in ('calibration', 'search', 'selection', 'test')}
        config = PruneConfig('tiny', 'random', criterion='wanda', dtype='float32', step=(1, 8),
                             profile=Profile(32, 8, 4, 8, 4, 1, 2, 2))
        bench = Bench(tiny_model('llama', vocab=259), tiny_tokenizer(0), Corpus('random', text),
                      config, progress=False)
        path = ScorePath(np.array([size.low, size.high]), rng.normal(size=(2, 3, 2)))
    else:
        config = PruneConfig(size.model, 'wikitext2',
                             profile=replace(PROFILES['cpu'], test_blocks=1))
        bench = Bench.load(config, os.environ.get('FFP_CACHE_DIR'), progress=False, device='cpu')
        [sweep] = [read_json(f) for f in (ROOT / 'nbs/runs/elastic').glob(
            f'{size.model}-slow-0-*.json')]
        path = ScorePath(*(np.array(sweep['result'][k]) for k in ('targets', 'scores')))
    save_elastic(bench, path, out, (size.low, size.high), progress=False)


def weigh(folder: Path) -> int:
    "Bytes of the files of a folder"
    return sum(f.stat().st_size for f in folder.rglob('*') if f.is_file())


def drop(folder: Path) -> None:
    "Ask the system to forget the pages of a folder's files"
    if not hasattr(os, 'posix_fadvise'): return
    for path in folder.rglob('*'):
        if not path.is_file(): continue
        with open(path, 'rb') as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory() -> dict:
    "Of this process, in MB: resident, and how much of that is mapped from files"
    m = psutil.Process().memory_info()
    return dict(rss_MB=m.rss / 1e6, files_MB=getattr(m, 'shared', 0) / 1e6)


@torch.inference_mode()
def once(model, n: int = 8) -> float:
    "Seconds of a forward pass over a few tokens"
    start = time.perf_counter()
    model(torch.arange(3, 3 + n)[None])
    return time.perf_counter() - start


def warm_up() -> None:
    "Import what a model needs"
    once(tiny_model())


# each of these runs in a process of its own

def open_elastic(folder: str, targets: list[float]) -> dict:
    "Open the folder, use every target once"
    warm_up()
    first, start = memory(), time.perf_counter()
    served = load_elastic(folder)
    found = dict(before=first, open_s=time.perf_counter() - start)
    once(served.model)
    found['opened'] = memory()
    for s in targets:
        once(served.to_sparsity(s).model)
    return found | dict(used=memory())


def open_separate(folders: list[str]) -> dict:
    "Open every folder and use it once"
    warm_up()
    first, start = memory(), time.perf_counter()
    models = [load_pruned(f)[0] for f in folders]
    found = dict(before=first, open_s=time.perf_counter() - start)
    for m in models:
        once(m)
    return found | dict(used=memory())


def switch(folder: str, targets: list[float], turns: int, threads: int) -> dict:
    "Milliseconds of a switch and of the first token after it: cold, then warm"
    torch.set_num_threads(threads)
    drop(Path(folder) / 'repair')
    served = load_elastic(folder)
    once(served.model, 1)
    rows = {kind: dict(switch_ms=[], token_ms=[]) for kind in ('cold', 'warm')}
    for turn in range(turns + 1):
        order = np.random.default_rng(turn).permutation(targets)
        for s in order:
            start = time.perf_counter()
            served.to_sparsity(float(s))
            row = rows['warm' if turn else 'cold']
            row['switch_ms'].append(1000 * (time.perf_counter() - start))
            row['token_ms'].append(1000 * once(served.model, 1))
    return rows


def speed(folder: str, cut: str, sparsity: float, size: dict, threads: int) -> dict:
    "Seconds of prefill and of decoding: the elastic model at a target, the separate one, in turns"
    torch.set_num_threads(threads)
    models = dict(elastic=load_elastic(folder).to_sparsity(sparsity).model,
                  separate=load_pruned(cut)[0])
    ids, found = torch.randint(3, 200, (1, size['prompt'])), {}
    for turn in range(-1, size['turns']):
        for name, model in models.items():
            start = time.perf_counter()
            with torch.inference_mode():
                model(ids)
            prefill = time.perf_counter() - start
            how = dict(do_sample=False, pad_token_id=0, eos_token_id=None,
                       attention_mask=torch.ones(1, 8, dtype=torch.long))
            start = time.perf_counter()
            model.generate(ids[:, :8], min_new_tokens=size['new'], max_new_tokens=size['new'],
                           **how)
            if turn < 0: continue
            found.setdefault(f'prefill {name}', []).append(prefill)
            found.setdefault(f'decode {name}', []).append(time.perf_counter() - start)
    return found


JOBS = dict(open_elastic=open_elastic, open_separate=open_separate, switch=switch, speed=speed)


def apart(job: str, **given) -> dict:
    "The answer of a function of `JOBS`, called in a new process"
    done = subprocess.run([sys.executable, __file__, '--job', job, json.dumps(given)], text=True,
                          capture_output=True, cwd=ROOT,
                          env=os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path)))
    if done.returncode: raise RuntimeError(f'{job} ended with\n{done.stderr[-2000:]}')
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: Size, threads: int, place: Path) -> list[dict]:
    "All rows"
    folder, rows = place / 'elastic', []
    row = lambda what, value, unit, **more: rows.append(
        dict(what=what, value=float(value), unit=unit, **more))
    make_folder(size, folder)
    served = load_elastic(folder)
    row('parameters of the dense model', served.memory() / served.elastic.dtype.itemsize, '')
    row('policies of the folder', len(served.policies) - 1, '')
    row('step of the FFN widths', served.facts['step'][1], 'channels')
    row('dense model on disk', (folder / 'model.safetensors').stat().st_size / 1e6, 'MB')
    row('repairs on disk', weigh(folder / 'repair') / 1e6, 'MB')
    row('elastic folder on disk', weigh(folder) / 1e6, 'MB')
    for n in size.numbers:
        targets = [round(float(s), 4) for s in np.linspace(size.low, size.high, n)]
        cuts = [served.to_sparsity(s).save(place / f'cut-{n}-{s}') for s in targets]
        row(f'{n} separate folders on disk', sum(map(weigh, cuts)) / 1e6, 'MB')
        e = apart('open_elastic', folder=str(folder), targets=targets)
        s = apart('open_separate', folders=[str(c) for c in cuts])
        for name, found in (('elastic folder', e), (f'{n} separate models', s)):
            row(f'open: {name}' + f' ({n} targets)' * (found is e), found['open_s'], 's')
            used, first = found['used'], found['before']
            row(f'memory: {name}, {n} targets used', used['rss_MB'] - first['rss_MB'], 'MB',
                of_files=used['files_MB'] - first['files_MB'])
    found = apart('switch', folder=str(folder), targets=targets, turns=size.turns, threads=threads)
    for kind, times in found.items():
        for name, v in times.items():
            what = 'switch' if name == 'switch_ms' else 'first token after a switch'
            row(f'{what}, {kind}', np.median(v), 'ms', most=float(np.max(v)), of=len(v))
    for s in (targets[0], targets[-1]):
        found = apart('speed', folder=str(folder), cut=str(cuts[targets.index(s)]), sparsity=s,
                      size=asdict(size), threads=threads)
        for part, n in (('prefill', size.prompt), ('decode', size.new)):
            a, b = (np.array(found[f'{part} {k}']) for k in ('elastic', 'separate'))
            row(f'{part} at {s:g}: elastic', n / np.median(a), 'tokens/s')
            row(f'{part} at {s:g}: separate', n / np.median(b), 'tokens/s')
            row(f'{part} at {s:g}: elastic over separate, median of turns', np.median(b / a), '')
    return rows


def main(argv=None):
    args = arguments(__doc__, 'a tiny model', argv)
    size, load, start = QUICK if args.quick else Size(), load_at_start(args), time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        rows = measure(size, args.threads, Path(place))
    config = dict(name='elastic', threads=args.threads, **asdict(size))
    path = save_record(args.out, config, dict(rows=rows, load_at_start=load),
                       wall_s=round(time.perf_counter() - start, 1))
    print('\n' + pd.DataFrame(rows)[['what', 'value', 'unit']].round(3).to_string(index=False))
    if args.quick:
        print('A quick run: these figures of a tiny model mean nothing.')
    print(f'record: {os.path.relpath(path)}')


if __name__ == '__main__':
    if sys.argv[1:2] == ['--job']:
        print(json.dumps(JOBS[sys.argv[2]](**json.loads(sys.argv[3]))))
    else:
        main()
