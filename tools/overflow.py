"""Look at every page of the site in a headless Chromium: no page may scroll sideways, and nothing
may be cut off.

Says that nothing was measured where there is no Chromium. The browser stays offline, so that the
result is the same everywhere: a display formula stands as its source on one line, which is wider
than the formula.
Usage: python tools/overflow.py [--site _site] [--widths 1400,390] [--browser PATH], anywhere in
the project, after tools/docs.py."""
import shutil
import sys

from fastcore.script import call_parse
from nbdev.config import get_config

BROWSERS = 'google-chrome', 'chromium', 'chromium-browser', 'chrome'
# Playwright itself says --no-first-run and its like
QUIET = '--disable-gpu', '--disable-quic', '--disable-sync'
FORMULAS = '.math.display { white-space: nowrap }'

# Runs in the page. A box is the nearest ancestor that hides or scrolls what is wider than itself.
MEASURE = """() => {
  const root = document.documentElement
  const main = document.querySelector('main') ?? document.body
  const found = []
  const box = e => {
    let a = e.parentElement
    while (a && getComputedStyle(a).overflowX == 'visible') a = a.parentElement
    return a ?? root
  }
  const outside = (e, b) => {
    const r = e.getBoundingClientRect(), left = b.getBoundingClientRect().left + b.clientLeft
    return r.width > 0 && (r.right > left + b.clientWidth + 1 || r.left < left - 1)
  }
  const text = e => e.alt || e.getAttribute('src') || e.textContent
  const name = e => text(e).trim().replace(/\\s+/g, ' ').slice(0, 60)
  const say = (what, e, b) => {
    const width = Math.ceil(e.getBoundingClientRect().width)
    found.push(`${what}, ${width} px in ${b.clientWidth} px: <${e.localName}> ${name(e)}`)
  }

  if (root.scrollWidth > innerWidth) {
    found.push(`the page scrolls sideways, ${root.scrollWidth} px in ${innerWidth} px`)
  }
  for (const e of document.querySelectorAll('img, svg')) {
    if (e.complete && !e.naturalWidth) found.push(`a picture cannot be shown: ${name(e)}`)
    if (outside(e, box(e))) say('a figure is cut off', e, box(e))
  }
  const all = [...main.querySelectorAll('*')]
  const out = all.filter(e => outside(e, main) && box(e).contains(main))
  const outermost = out.filter(e => !out.includes(e.parentElement))
  for (const e of outermost) say('sticks out of its column', e, main)
  return found
}"""

def find_browser():
    return next(filter(None, map(shutil.which, BROWSERS)), None)

def look(
    pages:list, # HTML files
    widths:list, # of the window, pixels
    browser:str # path of a Chromium
)->list: # (page, width, what is wrong)
    "What sticks out or is cut off, page by page, in one browser"
    from playwright.sync_api import sync_playwright
    found = []
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=browser, args=QUIET)
        page = chromium.new_context(offline=True).new_page()
        for f in pages:
            page.goto(f.as_uri())
            page.add_style_tag(content=FORMULAS)
            for w in widths:
                page.set_viewport_size({'width': w, 'height': 900})
                found += [(f, w, what) for what in page.evaluate(MEASURE)]
        chromium.close()
    return found

@call_parse
def main(
    site:str='_site', # folder of the site, at the top level
    widths:str='1400,390', # of the window, pixels
    browser:str='' # path of a Chromium (default: the first on the PATH)
):
    "Exit 1 with the list of what sticks out, or when there are no pages"
    site = (get_config().config_path/site).resolve()
    pages, widths = sorted(site.rglob('*.html')), [int(w) for w in widths.split(',')]
    browser = browser or find_browser()
    if not pages:
        sys.exit(f'there are no pages in {site.name}/')
    if not browser:
        looked = ', '.join(BROWSERS)
        print(f'SKIPPED, no page was measured: no Chromium here (looked for {looked})', flush=True)
        return
    bad = [f'{f.relative_to(site)} at {w} px: {s}' for f, w, s in look(pages, widths, browser)]
    if bad:
        sys.exit('\n'.join([*bad, f'{len(pages)} pages, {len(bad)} things are too wide']))
    shown = ' and '.join(map(str, widths))
    said = f'{len(pages)} pages at {shown} px: none scrolls sideways, nothing is cut off'
    print(said, flush=True)
