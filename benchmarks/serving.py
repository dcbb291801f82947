"""Tokens per second in vLLM, of a dense model and of pruned folders.

    python benchmarks/serving.py --threads 2    SmolLM2 in float32 at sparsity 0.5
    python benchmarks/serving.py --quick        a tiny model, a minute: only shows that it runs

FFP_VLLM_PYTHON in the environment names an interpreter that has vLLM. `dense` is a plain folder,
for which vLLM has code of its own. `full` is the same model as `save_pruned` writes it, at full
widths, which vLLM builds from `transformers`: what that costs. `pruned` has half of the decoder
blocks' parameters, by scores drawn at random. Each is loaded in a process of its own, in float32. A
turn goes over the three: prefill is a batch of prompts with one token each, decode the further time
that more tokens take. A ratio is the median over the turns of the ratio within a turn to `dense`.
Prompts are random tokens, without a prefix cache.

Results go to a JSON record under benchmarks/results/ (with --quick under runs/, which git ignores).
Close other programs first: the load of the machine at the start is recorded. """
import json
import os
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from common import arguments, load_at_start

from ffp_nb.core.budget import param_cost, random_scores, solve
from ffp_nb.core.elastic import ElasticModel
from ffp_nb.core.families import load_model, tiny_model
from ffp_nb.core.runs import save_record
from ffp_nb.export.hf import save_pruned
from ffp_nb.export.vllm import ON_CPU

SERVER = """
import json, sys, time

def main():
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    from vllm import LLM, SamplingParams, __version__
    own = LLM(model=folder, trust_remote_code=True, skip_tokenizer_init=True, dtype='float32',
              enable_prefix_caching=False, **options)
    answer = lambda **kw: print('ANSWER' + json.dumps(kw), flush=True)
    answer(version=__version__)
    for line in sys.stdin:
        job = json.loads(line)
        how = SamplingParams(temperature=0, max_tokens=job['n'], detokenize=False, ignore_eos=True)
        start = time.perf_counter()
        done = own.generate([dict(prompt_token_ids=p) for p in job['prompts']], how,
                            use_tqdm=False)
        answer(seconds=time.perf_counter() - start,
               tokens=sum(len(o.outputs[0].token_ids) for o in done))

if __name__ == '__main__':
    main()
"""


@dataclass(frozen=True)
class Size:
    "What is measured"
    model: str | None = 'smollm2'  # None: a tiny random LLaMA
    sparsity: float = 0.5
    step: tuple[int, int] = (1, 32)
    batch: int = 4
    prompt: int = 512  # tokens
    new: int = 64
    turns: int = 5
    eager: bool = False  # without compiling


QUICK = Size(None, step=(1, 8), batch=2, prompt=16, new=4, turns=2, eager=True)


def folders(size: Size, place: Path) -> dict[str, Path]:
    "The models to be served, by name"
    model = (tiny_model('llama', 2, 128, 4, 2) if size.model is None
             else load_model(size.model, 'float32', 'cpu')[0])
    model.save_pretrained(place / 'dense')
    em = ElasticModel(model)
    full, cost = em.layout.full, param_cost(em.layout)
    scores = random_scores(0, full.shape)
    widths = dict(full=full, pruned=solve(scores, cost, size.sparsity, size.step))
    return dict(dense=place / 'dense') | {
        name: save_pruned(em.set(w), None, place / name) for name, w in widths.items()}


@contextmanager
def served(python: str, folder: Path, size: Size, threads: int):
    "A function that sends a job to a vLLM with this model and gives its answer"
    options = dict(max_model_len=size.prompt + size.new, enforce_eager=size.eager)
    log = tempfile.TemporaryFile('w+')
    child = subprocess.Popen([python, '-c', SERVER, str(folder), json.dumps(options)],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                             env=ON_CPU | os.environ | dict(OMP_NUM_THREADS=str(threads),
                                                         VLLM_ENABLE_V1_MULTIPROCESSING='0'))
    def ask(**job):
        if job:
            child.stdin.write(json.dumps(job) + '\n')
            child.stdin.flush()
        for line in child.stdout:  # between vLLM's own lines
            if line.startswith('ANSWER'): return json.loads(line.removeprefix('ANSWER'))
        log.seek(0)
        raise RuntimeError(f'vLLM ended at {folder.name}; its log ends with\n{log.read()[-2000:]}')
    try:
        yield ask
    finally:
        child.stdin.close()  # which ends it
        try:
            child.wait(60)
        except subprocess.TimeoutExpired:
            child.kill()
        log.close()


def measure(python: str, size: Size, threads: int) -> tuple[list[dict], str]:
    "A row for each model and part, and vLLM's version"
    rng, seconds = np.random.default_rng(1), {}
    with ExitStack() as stack:
        made = folders(size, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        ask, version = {}, ''
        for name, folder in made.items():
            ask[name] = stack.enter_context(served(python, folder, size, threads))
            version = ask[name]()['version']  # one after the other: each start takes memory
        for turn in range(-1, size.turns):  # the first warms up
            prompts = rng.integers(3, 200, (size.batch, size.prompt)).tolist()
            for name, job in ask.items():
                short, whole = (job(prompts=prompts, n=n) for n in (1, size.new))
                if (got := whole['tokens']) != size.batch * size.new:
                    raise RuntimeError(f'vLLM wrote {got} tokens for {name}')
                if turn < 0: continue
                seconds.setdefault(('prefill', name), []).append(short['seconds'])
                seconds.setdefault(('decode', name), []).append(
                    whole['seconds'] - short['seconds'])
    tokens = dict(prefill=size.batch * size.prompt, decode=size.batch * (size.new - 1))
    ratio = lambda s, part: float(np.median([b / a for a, b in zip(s, seconds[part, 'dense'])]))
    return [dict(part=part, model=name, seconds=s, tokens_s=tokens[part] / float(np.median(s)),
                 times_dense=ratio(s, part)) for (part, name), s in seconds.items()], version


def main(argv=None):
    args = arguments(__doc__, 'a tiny model', argv)
    python = os.environ.get('FFP_VLLM_PYTHON')
    if not python: raise SystemExit('FFP_VLLM_PYTHON must name an interpreter that has vLLM')
    size = QUICK if args.quick else Size()
    load = load_at_start(args)
    start = time.perf_counter()
    rows, version = measure(python, size, args.threads)
    config = dict(name='serving', threads=args.threads, vllm=version, **asdict(size))
    path = save_record(args.out, config, dict(rows=rows, load_at_start=load),
                       wall_s=round(time.perf_counter() - start, 1))
    print('\n' + pd.DataFrame(rows).drop(columns='seconds').round(3).to_string(index=False))
    if args.quick:
        print('A quick run: these figures of a tiny model mean nothing.')
    print(f'record: {os.path.relpath(path)}')


if __name__ == '__main__':
    main()
