"""Run every notebook with nbdev_test, each in a fresh process, and count them.

nbdev_test also exits 0 when it runs nothing, so a notebook counts only when nbdev_test says that it
completed. Usage: python tools/notebooks.py [--workers 2] [--timeout 900] [--flags gpu], anywhere in
the project (FFP_PROFILE: smoke). Cells marked with one of settings.ini's tst_flags, such as
`#| gpu`, run only where the flag is given, and then only the notebooks with such cells do."""
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from fastcore.script import call_parse
from nbdev.config import get_config
from nbdev.doclinks import nbglob

# One thread a notebook: two of them on two cores are slower when each starts a thread a core.
ENV = {'OMP_NUM_THREADS': '1', 'FFP_PROFILE': 'smoke'} | os.environ

def run(
    nb:Path, # notebook
    timeout:int, # seconds until it is stopped
    flags:str='' # of cells that run, too
): # (what went wrong or None, seconds, the output of nbdev_test)
    "Run one notebook"
    start = time.time()
    cmd = [Path(sys.executable).with_name('nbdev_test'), '--path', nb, '--do_print',
           '--flags', flags]
    try:
        p = subprocess.run(cmd, env=ENV, timeout=timeout, text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired as e:
        out = e.stdout or ''
        out = out if isinstance(out, str) else out.decode(errors='replace')
        return f'stopped after {timeout} s', timeout, out
    completed = f'- Completed {nb}' in p.stdout
    why = f'exit status {p.returncode}' if p.returncode else None if completed else 'was not run'
    return why, time.time()-start, p.stdout

def marked(nb, flags):
    "Has a notebook cells with one of these flags?"
    code = (''.join(c['source']) for c in json.loads(nb.read_text(encoding='utf-8'))['cells']
            if c['cell_type'] == 'code')
    return any(re.search(rf'^#\| *{flag}\b', s, re.M) for s in code for flag in flags)

@call_parse
def main(
    workers:int=2, # notebooks at once
    timeout:int=900, # seconds a notebook may take
    flags:str='' # such as gpu: only notebooks with cells marked so, and these cells, too
):
    "Test all notebooks; exit 1 when one fails, is not run, or when there are none"
    nbs = get_config().nbs_path
    found = {f for f in nbs.rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts}
    todo = sorted(f.absolute() for f in nbglob(as_path=True))
    bad = [f'{f.relative_to(nbs)}: nbdev does not see it' for f in sorted(found - set(todo))]
    if flags:
        todo = [f for f in todo if marked(f, flags.split())]
    with ThreadPoolExecutor(workers) as ex:
        jobs = {ex.submit(run, f, timeout, flags): f.relative_to(nbs) for f in todo}
        for i, job in enumerate(as_completed(jobs), 1):
            why, secs, out = job.result()
            print(f'  [{i}/{len(todo)}] {"FAIL" if why else "ok  "} {jobs[job]} {secs:.1f} s',
                  flush=True)
            if why:
                bad.append(f'{jobs[job]}: {why}')
                print(out[-8000:], flush=True)
    if not todo:
        bad.append(f'no notebooks in {nbs.name}/{flags and f" with cells marked {flags}"}')
    if bad:
        sys.exit('\n'.join(['Notebook tests failed:', *bad]))
    print(f'{len(todo)} of {len(found)} notebooks passed', flush=True)
