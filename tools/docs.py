"""Render the site to _site/ without Quarto, and check its links.

nbdev processes the notebooks (API docs, cross-links), smalldocs renders them. Every link and
picture of the result must lead to a file of the site, and every anchor to an id on that page;
links to other sites are not followed.
Usage: python tools/docs.py [--out _site], anywhere in the project, with the project installed."""
import json
import posixpath
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import yaml
from fastcore.script import call_parse
from nbdev.config import get_config
from nbdev.serve import proc_nbs
from smalldocs.check import scan


def join(s):
    return s if isinstance(s, str) else ''.join(s)

def plain_names(src):
    """Rename pages as Quarto's `output-file` does (00_core.ipynb to core.ipynb); returns {old path:
    new path}"""
    names = {}
    for f in sorted(src.rglob('*.ipynb')):
        new = f.with_name(re.sub(r'^\d+[a-z0-9]*_', '', f.name.lower()))
        if new != f and new.exists():
            sys.exit(f'{f.relative_to(src)}: another page is already called {new.name}')
        f.rename(new)
        names[f.relative_to(src).as_posix()] = new.relative_to(src).as_posix()
    return names

def relink(
    f:Path, # a processed notebook
    src:Path, # the folder of all of them
    names:dict, # from `plain_names`
    site:str # where the site will be published: nbdev's cross-links are absolute
):
    """Point the links of a notebook at the renamed pages, in its own folder and in others, and give
    figures their width"""
    here = f.relative_to(src).parent.as_posix()
    up = '../' * (len(f.relative_to(src).parts) - 1)
    def page(m):
        old = posixpath.normpath(posixpath.join(here, m[0]))
        return posixpath.relpath(names[old], here) if old in names else m[0]

    def fix(s):
        return re.sub(r'(?<=[("])[\w./-]+\.ipynb', page, join(s)).replace(site, up)
    nb = json.loads(f.read_text(encoding='utf-8'))
    for c in nb['cells']:
        if c['cell_type'] == 'markdown':
            c['source'] = fix(c['source'])
        if c['cell_type'] == 'raw':
            c['source'] = re.sub(r'^output-file:.*\n', '', join(c['source']), flags=re.M)
        for o in c.get('outputs', []):
            if 'text/markdown' in o.get('data', {}):
                o['data']['text/markdown'] = fix(o['data']['text/markdown'])
            # Quarto shows a figure at its stored width, half of its pixels; smalldocs does not
            if width := o.get('metadata', {}).get('image/png', {}).get('width'):
                png = join(o['data'].pop('image/png')).replace('\n', '')
                o['data']['text/html'] = (f'<img src="data:image/png;base64,{png}" '
                                          f'width="{width}" class="figure-img">')
    f.write_text(json.dumps(nb), encoding='utf-8')

def quarto_only(f):
    "What smalldocs would print literally in a notebook: @fig- references, citations, grid tables"
    cells = json.loads(f.read_text(encoding='utf-8'))['cells']
    return [f'{f.name}: {msg}' for c in cells if c['cell_type'] == 'markdown'
            for _, msg in scan(join(c['source']))]

def site_config(root, names):
    "The top-level _quarto.yml with the renamed pages, HTML only, without what only pandoc reads"
    text = re.sub(r'[\w./-]+\.ipynb', lambda m: names.get(m[0], m[0]),
                  (root/'_quarto.yml').read_text(encoding='utf-8'))
    cfg = yaml.safe_load(text)
    cfg['project']['output-dir'], cfg['format'] = '_site', {'html': cfg['format']['html']}
    cfg['format']['html'].pop('columns', None)
    return yaml.safe_dump(cfg, sort_keys=False)

class Page(HTMLParser):
    "Collects the ids of a page and what it links to"
    def __init__(self, text):
        super().__init__()
        self.ids, self.links = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for k, v in attrs:
            if k in ('id', 'name') and v:
                self.ids.add(v)
            if (tag, k) in (('a', 'href'), ('img', 'src')) and v:
                self.links.add(v)

def broken(
    out:Path, # rendered site
    site:str # where it will be published
)->list: # one line a bad link
    "Links to missing files and to missing anchors"
    pages = {f.resolve(): Page(f.read_text(encoding='utf-8')) for f in out.rglob('*.html')}
    bad = defaultdict(set)
    for f, page in pages.items():
        for link in page.links:
            url, anchor = urldefrag(link.replace(site, '/'))
            if re.match(r'\w+:|//', url): continue                      # another site, mailto, data
            base = out if url.startswith('/') else f.parent
            to = (base/unquote(url.split('?')[0]).lstrip('/')).resolve() if url else f
            if to.is_dir():
                to = to/'index.html'
            if not to.exists():
                bad[f].add(f'{link} (no such file)')
            elif anchor and to in pages and unquote(anchor) not in pages[to].ids:
                bad[f].add(f'{link} (no such anchor)')
    return [f'{f.relative_to(out)}: {b}' for f in sorted(bad) for b in sorted(bad[f])]

def undocumented(
    out:Path # rendered site
)->list: # one line a page
    "Pages on which nbdev shows a function that has no docstring: it borrows one then"
    borrowed = lambda f: 'Call self as a function.' in f.read_text(encoding='utf-8')
    return [f'{f.relative_to(out)}: a function without docstring'
            for f in sorted(out.rglob('*.html')) if borrowed(f)]

@call_parse
def main(
    out:str='_site' # folder for the site, at the top level
):
    "Render and check; exit 1 on anything smalldocs complains about and on bad links"
    cfg = get_config()
    root, site = cfg.config_path, (cfg.doc_host + cfg.doc_baseurl).rstrip('/') + '/'
    src, out = root/'_proc_smalldocs', (root/out).resolve()
    for d in (src, out):
        shutil.rmtree(d, ignore_errors=True)
    proc = proc_nbs(force=True, n_workers=2)
    shutil.copytree(proc, src, ignore=shutil.ignore_patterns('_docs', '.quarto', '*.yml', '_site'))
    names = plain_names(src)
    for f in src.rglob('*.ipynb'):
        relink(f, src, names, site)
    (src/'_quarto.yml').write_text(site_config(root, names), encoding='utf-8')
    smalldocs = Path(sys.executable).with_name('smalldocs')
    subprocess.run([smalldocs, 'render', src], check=True, capture_output=True)
    odd = subprocess.run([smalldocs, 'check', src]).returncode
    literal = [m for f in sorted(src.rglob('*.ipynb')) for m in quarto_only(f)]
    shutil.move(src/'_site', out)
    for d in (src, proc):
        shutil.rmtree(d)
    pages = {Path(p).with_suffix('.html') for p in names.values()}
    bad = ([f'{p}: was not rendered' for p in sorted(pages) if not (out/p).exists()] + literal
           + broken(out, site) + undocumented(out))
    if odd:
        bad.append('smalldocs check complained: see above')
    if not pages:
        bad.append('there are no pages')
    if bad:
        sys.exit('\n'.join(['The site has problems:', *bad,
                            f'{len(pages)} pages, {len(bad)} problems']))
    print(f'{len(pages)} pages in {out.name}/, all links and anchors lead somewhere', flush=True)
