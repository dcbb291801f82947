"The tools that make the site and look at it"
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tools'))
import docs
import overflow

LONG = ' '.join(['a_name_that_cannot_be_broken'] * 8)
PICTURE = "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' width='2000' height='100'/>"
ROW = '<tr>' + '<td>a_name_that_cannot_be_broken</td>' * 9 + '</tr>'
# What Quarto writes: no box round a table, and a figure has the size that the notebook stores
PAGES = {
    'table': f'<table>{ROW}</table>',
    'figure': f'<div class="cell-output" style="overflow-x: auto">'
              f'<img width="2000" height="100" src="{PICTURE}"></div>',
    'formula': f'<p><span class="math display">\\[{LONG}\\]</span></p>',
    'code': f'<pre class="sourceCode"><code>{LONG}</code></pre>',
    'frame': f'<div class="cell-output"><table class="dataframe">{ROW}</table></div>'}


def notebook(folder, name, text):
    f = folder / name
    f.parent.mkdir(exist_ok=True)
    f.write_text(json.dumps({'cells': [{'cell_type': 'markdown', 'source': text}]}))


def source(f):
    return json.loads(f.read_text())['cells'][0]['source']


def test_links_lead_to_renamed_pages_of_all_folders(tmp_path):
    "Two folders have a page of the same name; addresses of other sites stay"
    pages = {
        'index.ipynb': '[a](core/01_text.ipynb#x) <a href="studies/09_text.ipynb">b</a>',
        'core/01_text.ipynb': '[a](01_text.ipynb) [b](../studies/09_text.ipynb)',
        'studies/09_text.ipynb': '(https://x.org/core/01_text.ipynb) https://y.org/core/text.html'}
    for f, text in pages.items():
        notebook(tmp_path, f, text)
    names = docs.plain_names(tmp_path)
    assert list(names.values()) == ['core/text.ipynb', 'index.ipynb', 'studies/text.ipynb']
    for f in names.values():
        docs.relink(tmp_path / f, tmp_path, names, 'https://y.org/')
    assert {f: source(tmp_path / f) for f in names.values()} == {
        'index.ipynb': '[a](core/text.ipynb#x) <a href="studies/text.ipynb">b</a>',
        'core/text.ipynb': '[a](text.ipynb) [b](../studies/text.ipynb)',
        'studies/text.ipynb': '(https://x.org/core/01_text.ipynb) ../core/text.html'}


def test_pages_of_one_folder_cannot_get_the_same_name(tmp_path):
    for f in ('01_text.ipynb', '02_text.ipynb'):
        notebook(tmp_path, f, '')
    with pytest.raises(SystemExit, match='02_text.ipynb: another page is already called text'):
        docs.plain_names(tmp_path)


def measured(folder, styles):
    "(exit status, output) of tools/overflow.py on `PAGES`"
    if not overflow.find_browser():
        pytest.skip('there is no Chromium here')
    for name, body in PAGES.items():
        page = f'<style>{styles}</style><main class="content"><p>Text</p>{body}</main>'
        (folder / f'{name}.html').write_text(page)
    command = [sys.executable, ROOT / 'tools' / 'overflow.py', '--site', folder]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    return done.returncode, done.stdout + done.stderr


def test_what_is_wider_than_the_page_is_reported(tmp_path):
    status, said = measured(tmp_path, '')
    assert status == 1
    for width in (1400, 390):
        for name in ('table', 'formula', 'code', 'frame'):
            assert f'{name}.html at {width} px: the page scrolls sideways' in said
        assert f'figure.html at {width} px: a figure is cut off, 2000 px' in said


def test_styles_keep_everything_within_the_page(tmp_path):
    status, said = measured(tmp_path, (ROOT / 'nbs' / 'styles.css').read_text())
    assert status == 0, said
    assert said.startswith('5 pages at 1400 and 390 px: none scrolls sideways')


def test_a_machine_without_a_browser_says_that_nothing_was_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / 'index.html').write_text('<main>Text</main>')
    monkeypatch.setenv('PATH', '')
    overflow.main(site=tmp_path)
    assert capsys.readouterr().out.startswith('SKIPPED, no page was measured')
    (tmp_path / 'index.html').unlink()
    with pytest.raises(SystemExit, match='there are no pages'):
        overflow.main(site=tmp_path)
