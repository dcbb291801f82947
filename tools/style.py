"""Check what ruff cannot tell: the length of exported cells, and statements that share a line.

An exported cell has at most 40 lines, so that a page shows it at once. A compound statement has
its body on lines of its own; only a guard clause (`if x: return y`, or raise, continue, break) may
share the line. Usage: python tools/style.py, anywhere in the project."""
import ast
import json
import sys
from pathlib import Path

from fastcore.script import call_parse
from nbdev.config import get_config

LINES = 40
GUARDS = ast.Return, ast.Raise, ast.Continue, ast.Break


def shared_lines(source: str) -> list[int]:
    "Lines on which the body of a compound statement begins beside its head, guard clauses aside"
    found = []
    for node in ast.walk(ast.parse(source)):
        bodies = [getattr(node, name, None) for name in ('body', 'orelse', 'finalbody')]
        for body in (b for b in bodies if isinstance(b, list) and b and isinstance(b[0], ast.stmt)):
            line = source.splitlines()[body[0].lineno - 1]
            head = line.encode()[:body[0].col_offset].decode()
            guard = (isinstance(node, ast.If) and body is node.body and not node.orelse
                     and len(body) == 1 and isinstance(body[0], GUARDS))
            if head.strip() and not guard:
                found.append(body[0].lineno)
    return found


def complaints(name: str, source: str, exported: bool) -> list[str]:
    "What is wrong with a cell or a file"
    try:
        bad = [f'{name}, line {n}: two statements share a line' for n in shared_lines(source)]
    except SyntaxError:  # a cell with a magic command
        return []
    if exported and (n := source.count('\n') + 1) > LINES:
        bad.append(f'{name}: an exported cell of {n} lines; {LINES} are allowed')
    return bad


def code_cells(path: Path) -> list[tuple[int, str]]:
    "Number and source of every code cell"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [(i, ''.join(c['source'])) for i, c in enumerate(cells) if c['cell_type'] == 'code']


@call_parse
def main():
    "Exit 1 with the list of complaints"
    cfg = get_config()
    root, bad, longest = cfg.config_path, [], 0
    for f in sorted(cfg.nbs_path.rglob('*.ipynb')):
        if '.ipynb_checkpoints' in f.parts: continue
        for i, source in code_cells(f):
            exported = source.startswith('#| export')
            longest = max(longest, (source.count('\n') + 1) * exported)
            bad += complaints(f'{f.relative_to(root)} cell {i}', source, exported)
    for folder in ('tests', 'tools', 'benchmarks'):
        for f in sorted((root / folder).glob('*.py')):
            bad += complaints(f.relative_to(root).as_posix(), f.read_text(encoding='utf-8'), False)
    # nbdev makes them relative, unless the last line of an import is shorter than its module's name
    for f in sorted(cfg.lib_path.rglob('*.py')):
        for n, line in enumerate(f.read_text(encoding='utf-8').splitlines(), 1):
            if line.startswith(f'from {cfg.lib_path.name}.'):
                bad.append(f'{f.relative_to(root)}, line {n}: nbdev left an import absolute; wrap '
                           'its names otherwise')
    if bad:
        sys.exit('\n'.join([*bad, f'{len(bad)} complaints']))
    print(f'longest exported cell: {longest} lines', flush=True)
