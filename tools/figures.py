"""Draws the figures of the documentation.

    python tools/figures.py                          all of them
    python tools/figures.py docs/start/own_data.md   those of one page

Pages save their figures in code that readers see, as `figure.savefig("name.svg")`. This runs the
examples of a page, as the tests do, and puts the figures next to it.
"""

from __future__ import annotations

import contextlib
import doctest
import os
import pathlib
import re
import shutil
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fax",  # the same numbers give the same file
}


def pages() -> list[pathlib.Path]:
    """The pages that draw figures."""
    found = [p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts]
    return [page for page in sorted(found) if '.svg")' in page.read_text(encoding="utf-8")]


def draw(page: pathlib.Path) -> list[pathlib.Path]:
    """Runs a page, and puts what it draws next to it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        if doctest.testfile(str(page), module_relative=False, optionflags=flags).failed:
            raise SystemExit(f"The examples of {page} fail, so its figures are not drawn.")
        figures = sorted(pathlib.Path(folder).glob("*.svg"))
        for figure in figures:
            text = figure.read_text(encoding="utf-8")
            text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
            figure.write_text(re.sub(r"(\.\d\d)\d+", r"\1", text), encoding="utf-8")
            shutil.copy(figure, page.parent)
        return [page.parent / figure.name for figure in figures]


def main(arguments: list[str]) -> None:
    import matplotlib

    os.environ["MPLBACKEND"] = "svg"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    matplotlib.rcParams.update(STYLE)
    for page in [pathlib.Path(name).resolve() for name in arguments] or pages():
        for figure in draw(page):
            print(figure.relative_to(ROOT))


if __name__ == "__main__":
    main(sys.argv[1:])
