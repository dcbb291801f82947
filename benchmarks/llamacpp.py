"""A GGUF file in llama.cpp (the package xllamacpp) at its defaults, timed by llama.cpp's own clock.

    python benchmarks/llamacpp.py FILE PROMPT STEPS THREADS CONTEXT
            memory of a process of its own, as JSON

Only the standard library is imported beside llama.cpp, so that the memory is that of llama.cpp.
"""
import json
import re
import sys
from pathlib import Path

# in llama.cpp's log at verbosity 4
CACHE_LINE = re.compile(r'llama_kv_cache: size =\s*([\d.]+) MiB \(\s*(\d+) cells')


class LlamaCpp:
    "A loaded GGUF file with one slot, on the CPU"
    def __init__(self, path, threads: int, n_ctx: int, verbosity: int = -1):
        import xllamacpp  # here: memory_mb must do without
        p = xllamacpp.CommonParams()
        p.model.path, p.n_ctx, p.n_parallel = str(path), n_ctx, 1
        p.n_gpu_layers, p.verbosity = 0, verbosity
        p.cache_ram_mib = 0  # no copies of earlier prompts' caches
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(p)

    def _times(self, ids: list[int], n: int) -> dict:
        "llama.cpp's timings of a prompt, read from its start, and n tokens"
        ask = dict(prompt=ids, n_predict=n, temperature=0, cache_prompt=False, ignore_eos=True)
        t = self.server.handle_completions(ask)['timings']
        if t['prompt_n'] != len(ids) or t['predicted_n'] != n:
            raise RuntimeError(f"llama.cpp read {t['prompt_n']} of {len(ids)} tokens and wrote "
                               f"{t['predicted_n']} of {n}")
        return t

    def prefill(self, ids: list[int]) -> float:  # seconds
        "Read a prompt; one token falls out"
        return self._times(ids, 1)['prompt_ms'] / 1000

    def decode(self, ids: list[int], n: int) -> float:  # seconds
        "n greedy steps after a prompt. The token that the prompt gives comes first, in no time"
        return self._times(ids, n + 1)['predicted_ms'] / 1000


def memory_mb() -> dict:
    """Resident memory of this process, now and at its highest (Linux). Not of ru_maxrss, which
    starts with the parent's"""
    lines = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
    return {name: int(lines[key].split()[0]) * 1024 / 10**6
            for name, key in (('now', 'VmRSS'), ('peak', 'VmHWM'))}


def cache_bytes(log: str) -> float:
    "Bytes that the KV cache takes for a token, from llama.cpp's log"
    found = CACHE_LINE.search(log)
    if not found:
        raise RuntimeError('llama.cpp did not report the size of its KV cache; its log ends '
                           f'with\n{log[-2000:]}')
    return float(found[1]) * 2**20 / int(found[2])


if __name__ == '__main__':
    path, prompt, steps, threads, n_ctx = sys.argv[1], *map(int, sys.argv[2:])
    import xllamacpp  # noqa: F401  counts as a library
    before = memory_mb()['now']
    model = LlamaCpp(path, threads, n_ctx, verbosity=4)
    model.decode([i % 97 + 3 for i in range(prompt)], steps)
    print(json.dumps(dict(libraries=before, peak=memory_mb()['peak'])))
