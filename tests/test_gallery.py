"What the pages of the gallery show to copy holds beyond these pages"
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ffp_nb.core.runs import read_json
from ffp_nb.pipeline.bench import Bench, find_widths, open_run
from ffp_nb.pipeline.config import Profile, PruneConfig
from ffp_nb.pipeline.prune import prune
from ffp_nb.search.agent import Searcher
from ffp_nb.search.loop import Search
from ffp_nb.search.rivals import SEARCHERS

GALLERY = Path(__file__).resolve().parent.parent / 'nbs' / 'gallery'
PAGES = sorted(p.name for p in GALLERY.glob('*.ipynb'))


def code_of(page):
    return [''.join(c['source']) for c in json.loads((GALLERY / page).read_text())['cells']
            if c['cell_type'] == 'code']


@pytest.fixture
def climber(monkeypatch):
    "The searcher of the page, under its name"
    [source] = [s for s in code_of('05_add_a_searcher.ipynb') if 'class Climber' in s]
    space = dict(np=np, Searcher=Searcher)
    exec(source, space)
    monkeypatch.setitem(SEARCHERS, 'climber', space['Climber'])
    return space['Climber']


@pytest.fixture
def config(tiny_folder):
    return PruneConfig(str(tiny_folder / 'dense'), str(tiny_folder / 'text.txt'), 0.4, 'climber',
                       criterion='wanda', dtype='float32', step=(1, 4),
                       profile=Profile(32, 8, 4, 24, 4, 1, 3, 4))


def test_a_searcher_of_ones_own_prunes_and_resumes(climber, config, tmp_path, monkeypatch):
    "Under its name, with its settings, in records too; and bit for bit after a stop"
    config = replace(config, search=dict(agent=dict(noise=1.0)))
    table = prune(config, tmp_path / 'out', progress=False)
    record = read_json(next((tmp_path / 'out').glob('prune-*.json')))
    assert record['config']['method'] == 'climber' and 'climber' in set(table.method)
    assert record['config']['search']['agent'] == dict(noise=1.0, grow=1.3)
    assert all('noise' in u for u in record['result']['updates'])
    bench = Bench.load(config, progress=False)
    want = find_widths(bench, progress=False)[0]
    assert want.tolist() == record['result']['widths']
    step = Search.step

    def stopped(self):
        if self.update == 3: raise KeyboardInterrupt
        step(self)
    monkeypatch.setattr(Search, 'step', stopped)
    with pytest.raises(KeyboardInterrupt):
        find_widths(bench, run=open_run(tmp_path / 'stopped', bench), progress=False)
    monkeypatch.setattr(Search, 'step', step)
    run = open_run(tmp_path / 'stopped', bench)
    assert run.load_checkpoint()['update'] == 3
    assert np.array_equal(find_widths(bench, run=run, progress=False)[0], want)


def test_a_name_that_nobody_added_is_refused():
    with pytest.raises(ValueError, match="method 'climber'; expected one of gradient, ffp"):
        PruneConfig(method='climber')


def test_the_searcher_is_as_short_as_the_page_says(climber):
    [source] = [s for s in code_of('05_add_a_searcher.ipynb') if 'class Climber' in s]
    assert len(source.splitlines()) <= 30


@pytest.mark.parametrize('page', PAGES)
def test_a_page_needs_no_network_and_shows_no_place(page):
    "Text and model come from packages; outputs name no folder of the machine that made them"
    cells = json.loads((GALLERY / page).read_text())['cells']
    source = '\n'.join(code_of(page))
    assert not re.search(r"text='(?!pydoc)|pip install|https?://(?!127\.0\.0\.1)", source)
    shown = json.dumps([c.get('outputs', []) for c in cells])
    assert 'output' in shown or page.startswith('00')
    assert not re.search(r'/tmp|/work|/root|/home', shown)
