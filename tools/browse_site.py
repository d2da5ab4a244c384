"""Looks at the pages that `make docs` has built, in a browser without a window.

    python tools/browse_site.py docs/_build/html

needs Playwright and a Chromium: that of `playwright install chromium`, or the program that CHROMIUM
names. On every page there is no error in the console, and at 390 pixels nothing but code and tables
scrolls sideways. Dark mode is dark. The search finds what readers look for. Problems are printed,
and any problem fails.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import pathlib
import sys
import threading
from collections.abc import Iterator

from check_site import SEARCHES
from playwright.sync_api import Browser, sync_playwright

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
COLOURS = """() => [getComputedStyle(document.body).backgroundColor,
    getComputedStyle(document.querySelector("article p")).color]"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def served(site: pathlib.Path) -> Iterator[str]:
    """Serves a folder, because browsers do not let pages in files read others."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def look_at_pages(browser: Browser, url: str, names: list[str]) -> Iterator[str]:
    """Opens every page on a wide and on a narrow screen."""
    page = browser.new_page(viewport=WIDE)
    errors: list[str] = []
    page.on(
        "console", lambda message: errors.append(message.text) if message.type == "error" else None
    )
    page.on("pageerror", lambda error: errors.append(str(error)))
    for name in names:
        page.set_viewport_size(WIDE)
        page.goto(f"{url}/{name}")
        page.set_viewport_size(NARROW)
        if (beyond := page.evaluate(OVERFLOW)) > 0:
            yield f"{name}: at 390 pixels the page is {beyond} pixels too wide"
        yield from (f"{name}: {error}" for error in errors)
        errors.clear()
    page.close()


def brightness(colour: str) -> float:
    """Of a colour such as `rgb(19, 20, 22)`, from 0 to 255."""
    return sum(float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]) / 3


def look_at_dark_mode(browser: Browser, url: str) -> Iterator[str]:
    page = browser.new_page(color_scheme="dark")
    page.goto(f"{url}/index.html")
    background, text = map(brightness, page.evaluate(COLOURS))
    if background > 64 or text < 160:
        yield f"dark mode has text of brightness {text:.0f} on {background:.0f}"
    page.close()


def search(browser: Browser, url: str) -> Iterator[str]:
    page = browser.new_page()
    for query in SEARCHES:
        page.goto(f"{url}/search.html?q={query.replace(' ', '+')}")
        try:
            page.wait_for_selector("#search-results ul.search li a", timeout=20_000)
        except Exception:
            yield f'a search for "{query}" shows nothing'
    page.close()


def problems(site: pathlib.Path) -> list[str]:
    """What a reader with a browser stumbles over."""
    paths = sorted(p.relative_to(site) for p in site.rglob("*.html") if "_static" not in p.parts)
    with served(site) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ.get("CHROMIUM"))
        found = [
            *look_at_pages(browser, url, [path.as_posix() for path in paths]),
            *look_at_dark_mode(browser, url),
            *search(browser, url),
        ]
        browser.close()
    print(f"{len(paths)} pages", file=sys.stderr)
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("Usage: python tools/browse_site.py docs/_build/html")
    wrong = problems(pathlib.Path(sys.argv[1]))
    raise SystemExit("\n".join(wrong) or 0)
