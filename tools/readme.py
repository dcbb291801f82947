"""Write README.md from the README notebook (`readme_nb` in settings.ini), which nbdev_readme cannot
do without Quarto.

Directives work as on the site: `hide` and `include: false` drop a cell, `echo: false` its code,
`output: false` its output. Links are made to start at the top level of the project; one that leads
nowhere is an error. Usage: python tools/readme.py, anywhere in the project."""
import json
import posixpath
import re
import sys

from fastcore.script import call_parse
from nbdev.config import get_config

# relative targets in Markdown and in HTML
LINK = re.compile(r'(\]\(|\b(?:src|href)=")(?!\w+:|[#/])([^)"#\s]+)')
TEXT = 'text/markdown', 'text/plain'

def join(s):
    return s if isinstance(s, str) else ''.join(s)

def output(o):
    """Markdown of one output: text only, as Markdown cannot carry pictures (save those under
    nbs/images, and link them)"""
    if o['output_type'] == 'stream':
        mime, text = 'text/plain', join(o['text'])
    else:
        mime, text = next(((m, join(o['data'][m])) for m in TEXT if m in o.get('data', {})),
                          ('', ''))
    text = text.strip('\n')
    return f'```text\n{text}\n```' if mime == 'text/plain' and text else text

def cell_parts(c):
    "Markdown blocks of one cell"
    src = join(c['source'])
    if c['cell_type'] == 'markdown': return [src]
    flags = {m.replace(' ', '') for m in re.findall(r'^#\|\s*(.+?)\s*$', src, flags=re.M)}
    if c['cell_type'] == 'raw' or flags & {'hide', 'include:false', 'export'}: return []
    code = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip('\n')
    shown = [f'```python\n{code}\n```'] if code and 'echo:false' not in flags else []
    return shown + [output(o) for o in c['outputs'] if 'output:false' not in flags]

@call_parse
def main():
    "Write README.md"
    cfg = get_config()
    cells = json.loads((cfg.nbs_path/cfg.readme_nb).read_text(encoding='utf-8'))['cells']
    text = '\n\n'.join(p for c in cells for p in cell_parts(c) if p.strip())
    up = lambda m: m[1] + posixpath.normpath(f'{cfg.nbs_path.name}/{m[2]}')
    # odd parts are code: left alone
    prose = re.split(r'(^```.*?^```$)', text, flags=re.M|re.S)
    prose[::2] = [LINK.sub(up, p) for p in prose[::2]]
    lost = sorted({m[2] for p in prose[::2] for m in LINK.finditer(p)
                   if not (cfg.config_path/m[2]).exists()})
    if lost:
        sys.exit(f'{cfg.readme_nb} links to what is not there: {", ".join(lost)}')
    head = (f'<!-- Made from {cfg.nbs_path.name}/{cfg.readme_nb} by tools/readme.py: edit the '
            'notebook -->\n\n')
    (cfg.config_path/'README.md').write_text(head + ''.join(prose).strip() + '\n', encoding='utf-8')
