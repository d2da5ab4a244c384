"""Checks the pages that `make docs` has built, without a browser.

    python tools/check_site.py docs/_build/html

Links within the site lead to pages and anchors that exist, images exist and have a text, the search
finds what readers look for, pages fit narrow screens, and lines of code fit the page. Each problem
is printed, and any problem fails. `tools/browse_site.py` looks at the same pages in a browser.
"""

from __future__ import annotations

import html.parser
import json
import pathlib
import sys
import urllib.parse

COLUMNS = 88  # of a line of code, on the pages that one learns from
GUIDES = ("how_to", "start", "tutorials", "understand")
SEARCHES = ("checkpoint", "pandas", "TensorBoard", "early stopping")


class Page(html.parser.HTMLParser):
    """What is checked of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.images: list[tuple[str, str]] = []
        self.viewport = False
        self.tables_outside = 0
        self.code: list[str] = []
        self._open: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = {name: value or "" for name, value in attrs}
        self.anchors |= {own[name] for name in ("id", "name") if name in own}
        if tag == "a" and "href" in own:
            self.links.append(own["href"])
        elif tag == "img":
            self.images.append((own.get("src", ""), own.get("alt", "")))
        elif tag == "meta" and own.get("name") == "viewport":
            self.viewport = "width=device-width" in own.get("content", "")
        elif tag == "table" and "index" not in own.get("class", "") and not self._wrapped():
            self.tables_outside += 1
        if tag == "pre":
            self.code.append("")
        if tag in ("div", "pre"):
            self._open.append((tag, own.get("class", "")))

    def _wrapped(self) -> bool:
        return any("table-wrapper" in style for _, style in self._open)

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1][0] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] == "pre":
            self.code[-1] += data


def read(site: pathlib.Path) -> dict[pathlib.Path, Page]:
    """All pages of a site, by their resolved paths."""
    paths = [p.resolve() for p in sorted(site.rglob("*.html")) if "_static" not in p.parts]
    return {path: Page(path.read_text(encoding="utf-8")) for path in paths}


def dead_links(pages: dict[pathlib.Path, Page], path: pathlib.Path) -> list[str]:
    """Links and images of a page that lead nowhere within the site."""
    found = []
    for link in [*pages[path].links, *(source for source, _ in pages[path].images)]:
        parts = urllib.parse.urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = path.parent.joinpath(urllib.parse.unquote(parts.path)).resolve()
        target = target if parts.path else path
        anchor = urllib.parse.unquote(parts.fragment)
        if not target.exists():
            found.append(f"{link} does not exist")
        elif anchor and target in pages and anchor not in pages[target].anchors:
            found.append(f"{link} has no such anchor")
    return found


def problems_of(pages: dict[pathlib.Path, Page], path: pathlib.Path) -> list[str]:
    page = pages[path]
    found = dead_links(pages, path)
    found += [f"image {source} has no text" for source, text in page.images if not text]
    if not page.viewport:
        found.append("no viewport: telephones show the page as on a wide screen")
    if page.tables_outside:
        found.append("a table does not scroll on a narrow screen")
    lines = [line for block in page.code for line in block.splitlines()]
    long = [line for line in lines if len(line) > COLUMNS and path.parent.name in GUIDES]
    return found + [f"{len(line)} columns: {line}" for line in long]


def searched(site: pathlib.Path) -> dict[str, set[str]]:
    """For each search, the pages that have all of its words."""
    import snowballstemmer

    text = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").rstrip().removesuffix(")"))
    stem = snowballstemmer.stemmer("english").stemWord  # as Sphinx does

    def pages(word: str) -> set[int]:
        numbers = index["terms"].get(stem(word), [])
        return {numbers} if isinstance(numbers, int) else set(numbers)

    found = {}
    for query in SEARCHES:
        common = set.intersection(*(pages(word) for word in query.lower().split()))
        found[query] = {index["docnames"][number] for number in common}
    return found


def problems(site: pathlib.Path) -> list[str]:
    """What is wrong with a site."""
    pages = read(site)
    found = [
        f"{path.relative_to(site.resolve())}: {problem}"
        for path in pages
        for problem in problems_of(pages, path)
    ]
    for query, names in searched(site).items():
        if not names:
            found.append(f'a search for "{query}" finds no page')
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("Usage: python tools/check_site.py docs/_build/html")
    wrong = problems(pathlib.Path(sys.argv[1]))
    raise SystemExit("\n".join(wrong) or 0)
