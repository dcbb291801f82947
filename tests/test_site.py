"The pages that gather others name all of them: sidebar, reading order, results, references"
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'
ARXIV = re.compile(r'arxiv(?:\.org/abs/|[ :])\s*(\d{4}\.\d{4,5})', re.I)


def cells(page):
    return json.loads((NBS / page).read_text(encoding='utf-8'))['cells']


def source(page, kinds=('markdown', 'code')):
    return '\n'.join(''.join(c['source']) for c in cells(page) if c['cell_type'] in kinds)


def shown(page):
    return '\n'.join(''.join(o['data'].get('text/markdown', '')) for c in cells(page)
                     for o in c.get('outputs', []) if 'data' in o)


def sidebar():
    "Pages in reading order, and the names of the sections"
    found = yaml.safe_load((ROOT / '_quarto.yml').read_text())['website']['sidebar']['contents']
    pages = [p for x in found for p in (x['contents'] if isinstance(x, dict) else [x])]
    return pages, [x['section'] for x in found if isinstance(x, dict)]


@pytest.fixture(scope='module')
def bib():
    "{key: arXiv id or ''}"
    text = (NBS / 'references.bib').read_text()
    return {k: (re.search(r'eprint = \{([\d.]+)\}', body) or ['', ''])[1]
            for k, body in re.findall(r'^@\w+\{(\w+),(.*?)\n(?=\n|\Z)', text, re.M | re.S)}


def test_sidebar_has_every_page_once_in_reading_order():
    pages, sections = sidebar()
    assert (sorted(pages)
            == sorted(f.relative_to(NBS).as_posix() for f in NBS.rglob('*.ipynb')
                      if '.ipynb_checkpoints' not in f.parts))
    assert len(set(pages)) == len(pages)
    assert pages[:2] == ['index.ipynb', 'results.ipynb'] and pages[-1] == 'references.ipynb'
    assert sections == ['Core', 'Search', 'Export', 'Recovery', 'Pipeline', 'Studies',
                        'Open questions', 'Gallery', 'Reference']


def test_navigation_bar_leads_to_the_first_page_of_a_section():
    "Where an entry of the bar and a section of the sidebar have one name"
    def first(x):
        return x if isinstance(x, str) else first(x['contents'][0])
    site = yaml.safe_load((ROOT / '_quarto.yml').read_text())['website']
    pages = {x['section']: first(x) for x in site['sidebar']['contents'] if isinstance(x, dict)}
    leads = {x['text']: x['href'] for x in site['navbar']['left'] if x['text'] in pages}
    assert leads and leads == {name: pages[name] for name in leads}


def test_pages_are_numbered_in_reading_order():
    "From 00 in each folder; and what a page exports uses no page of its folder that comes later"
    for folder in {f.parent for f in NBS.rglob('[0-9][0-9]_*.ipynb')} - {NBS}:
        files = sorted(folder.glob('*.ipynb'))
        assert [f.name[:2] for f in files] == [f'{i:02}' for i in range(len(files))], folder
        names = [f.stem[3:] for f in files]
        for i, f in enumerate(files):
            exported = '\n'.join(''.join(c['source']) for c in cells(f.relative_to(NBS))
                                 if ''.join(c['source']).startswith('#| export'))
            used = re.findall(rf'from ffp_nb\.{folder.name}(?:\.(\w+))? import ([^\n(]+|\([^)]+\))',
                              exported)
            own = [m or n for m, many in used for n in (re.findall(r'\w+', many) if not m else [m])]
            late = [n for n in own if n in names and names.index(n) >= i]
            assert not late, f'{f.relative_to(NBS)} uses {late}'


def test_a_page_has_the_name_of_its_module():
    "In file name, first export line and title, unless a study asks a question there"
    for f in NBS.rglob('[0-9][0-9]_*.ipynb'):
        text = source(f.relative_to(NBS).as_posix())
        room, name = f.parent.name, f.stem[3:]
        if room == 'gallery':  # of use: nothing is exported
            assert 'default_exp' not in text, f
            continue
        assert f'#| default_exp {room}.{name}\n' in text + '\n', f
        if room != 'studies':
            assert text.startswith(f'# {name}\n'), f


def test_reading_order_of_the_first_page():
    "Its table names every page but itself, in the order of the sidebar"
    table = source('index.ipynb')
    table = table[table.index('## Reading order'):]
    linked = re.findall(r'^\|[^|\n]*\| \[[^]]+\]\(([\w/]+\.ipynb)\)', table, re.M)
    assert linked == [p for p in sidebar()[0] if p != 'index.ipynb']


def test_readme_has_what_a_newcomer_looks_for():
    text = (ROOT / 'README.md').read_text()
    heads = re.findall(r'^## (.+)$', text, re.M)
    wanted = ['Two commands', 'What comes out', 'From a shell', 'Your own model and text',
              'From Python', 'Hardware and time to expect', 'Limits', 'Citation']
    assert [h for h in heads if h in wanted] == wanted
    assert text.index('![') < text.index('## Two commands')  # a picture first
    assert all(f'ffp {c}' in text for c in ('prune', 'search', 'eval', 'export', 'report', 'study'))


def test_readme_says_what_a_target_leaves_of_the_whole_model():
    "Half of the decoder blocks is less of all parameters, as embeddings stay"
    from ffp_nb.core.families import Layout, load_model
    model, _ = load_model('smollm2', device='cpu')
    half = Layout(model).block_params / 2 / sum(p.numel() for p in model.parameters())
    (dense,) = (NBS / 'runs' / 'methods').glob('dense-gemma3-270m-*.json')
    blocks = json.loads(dense.read_text())['result']['block_params']
    vocabulary, hidden = 262_144, 640
    other = blocks / 2 / (blocks + (vocabulary + 1) * hidden)  # the last norm, too
    assert (f'σ = 0.5 is {100 * half:.0f} % of all parameters of SmolLM2-135M, and '
            f'{100 * other:.0f} % of those of Gemma 3 270M') in (ROOT / 'README.md').read_text()


def test_every_study_is_among_the_results():
    from ffp_nb.studies.registry import STUDIES
    pages = [p for p in sidebar()[0] if p.startswith('studies/')]
    numbered = [f'studies/{i:02}_{s}.ipynb'
                for i, s in enumerate(['twins', 'study', 'cells', *STUDIES, 'answers', 'registry'])]
    assert pages == numbered
    heads = re.findall(r'^## \[[^]]+\]\((studies/\w+\.ipynb)\)$',
                       source('results.ipynb', ['markdown']), re.M)
    assert heads == numbered[3:-2]
    code = source('results.ipynb', ['code'])
    assert all(f"answer('{s}')" in code for s in STUDIES)


def test_results_hold_no_figure_that_was_typed_in():
    named = r'SmolLM2-135M|WikiText-2|From 135 million to 70 billion|0\.01 nats are 1 %|\w+\.ipynb'
    text = re.sub(named, '', source('results.ipynb', ['markdown']))
    assert not re.search(r'\d', text), re.search(r'.*\d.*', text)[0]
    claims = shown('results.ipynb')
    assert all(v in claims for v in ('**reproduced**', '**in part**', '**not testable here**'))


def test_every_arxiv_id_has_an_entry(bib):
    named = {i: p for p in sidebar()[0] for i in ARXIV.findall(source(p))}
    assert len(named) >= 15 and not {i: p for i, p in named.items() if i not in bib.values()}


def test_every_entry_is_on_the_page_with_a_page_that_uses_it(bib):
    lines = dict(re.findall(r'^- <a id="(\w+)"></a>(.*)$', shown('references.ipynb'), re.M))
    assert len(bib) > 50 and lines.keys() == bib.keys()
    for key, line in lines.items():
        pages = re.findall(r'\]\(([\w/]+\.ipynb)\)', line[line.index('Used in '):])
        assert pages and all((NBS / p).exists() for p in pages), key
        if bib[key]:
            assert bib[key].replace('.', '\\.') in line, key
