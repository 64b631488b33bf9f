"""Opens every built page in headless Chromium: ``python docs/browse.py build/docs/html [SHOTS]``.

At two widths, each page may have no console message, no failed or foreign request, no link to a
file that is not there, no picture that does not load, and nothing that is cut off. Screenshots go
into the folder SHOTS. Needs playwright, and a Chromium or Chrome on the path.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

from playwright.sync_api import Browser, Page, sync_playwright

WIDTHS = (1280, 390)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

# What reaches beyond the window, unless an element around it scrolls; pictures without pixels.
CUT_OFF = """() => {
  const width = document.documentElement.clientWidth, found = [];
  if (document.documentElement.scrollWidth > width) found.push("the page scrolls sideways");
  const scrolls = e => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
  for (const e of document.querySelectorAll("article *")) {
    let around = e;
    while (around.tagName !== "ARTICLE" && !scrolls(around)) around = around.parentElement;
    const right = e.getBoundingClientRect().right;
    if (around.tagName === "ARTICLE" && right > width + 1)
      found.push(`${e.tagName} is cut off at ${Math.round(right)}: ${e.textContent.slice(0, 60)}`);
  }
  for (const e of document.images) if (!e.naturalWidth) found.push(`no picture: ${e.src}`);
  return found;
}"""


def links_to_nothing(page: Page) -> list[str]:
    """Links of a page to files that are not there."""
    hrefs = page.eval_on_selector_all("a[href]", "all => all.map(e => e.href)")
    files = {href: Path(unquote(urlparse(href).path)) for href in hrefs if href.startswith("file:")}
    return [f"no such file: {href}" for href, path in files.items() if not path.exists()]


def faults(browser: Browser, file: Path, width: int, shot: Path | None) -> list[str]:
    """What is wrong with one page at one width."""
    found: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.on("console", lambda message: found.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: found.append(f"error: {error}"))
    page.on("requestfailed", lambda request: found.append(f"not loaded: {request.url}"))
    page.on("request", lambda request: found.extend(foreign(request.url)))
    page.goto(file.as_uri(), wait_until="load")
    found += page.evaluate(CUT_OFF) + links_to_nothing(page)
    if shot is not None:
        page.screenshot(path=shot, full_page=True)
    page.close()
    return list(dict.fromkeys(found))


def foreign(url: str) -> list[str]:
    """The pages are read without a network."""
    return [] if url.startswith(("file:", "data:")) else [f"asks the network for {url}"]


def main(words: list[str]) -> int:
    """Print what is wrong; 1 if anything is."""
    site, shots = Path(words[0]).resolve(), Path(words[1]) if len(words) > 1 else None
    if shots is not None:
        shots.mkdir(parents=True, exist_ok=True)
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    files, wrong = sorted(site.rglob("*.html")), 0
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for file in files:
            name = "-".join(file.relative_to(site).with_suffix("").parts)
            for width in WIDTHS:
                shot = shots / f"{name}-{width}.png" if shots else None
                for fault in faults(browser, file, width, shot):
                    print(f"{name}, {width} pixels wide: {fault}")
                    wrong += 1
        browser.close()
    print(f"{len(files)} pages at {len(WIDTHS)} widths: {wrong or 'no'} faults")
    return int(bool(wrong) or not files)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
