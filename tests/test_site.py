"""The check of built pages finds what is wrong with them, and the gallery is complete."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))
import check_site  # noqa: E402
import gallery  # noqa: E402

HEAD = '<meta name="viewport" content="width=device-width, initial-scale=1">'
GOOD = f"""{HEAD}<h1 id="top">Good</h1>
<a href="#top">up</a> <a href="other.html#there">there</a> <a href="https://example.org/x">away</a>
<img src="figure.svg" alt="A figure">
<div class="table-wrapper"><table><tr><td>1</td></tr></table></div>
<pre>{"x" * 88}
<span>y</span></pre>"""
# What is replaced in a good page, and what the check says about it.
WRONG = {
    "a page that is missing": ('"other.html#there"', '"gone.html"', "gone.html does not exist"),
    "a missing anchor": ("#there", "#here", "other.html#here has no such anchor"),
    "an anchor of the page": ('"#top"', '"#bottom"', "#bottom has no such anchor"),
    "a missing image": ("figure.svg", "gone.svg", "gone.svg does not exist"),
    "an image without text": ("A figure", "", "image figure.svg has no text"),
    "no viewport": (HEAD, "", "no viewport: telephones show the page as on a wide screen"),
    "a bare table": ("table-wrapper", "", "a table does not scroll on a narrow screen"),
    "a long line": ("<span>y", f"<span>{'y' * 89}", f"89 columns: {'y' * 89}"),
}


def problems(folder, text):
    page = folder / "start" / "page.html"
    page.parent.mkdir()
    page.write_text(text, encoding="utf-8")
    page.with_name("figure.svg").touch()
    page.with_name("other.html").write_text(HEAD + '<p id="there"></p>', encoding="utf-8")
    return check_site.problems_of(check_site.read(folder), page.resolve())


def test_a_good_page_has_no_problems(tmp_path):
    assert problems(tmp_path, GOOD) == []


@pytest.mark.parametrize("name", WRONG)
def test_problems_are_found(tmp_path, name):
    old, new, problem = WRONG[name]
    assert old in GOOD
    assert problems(tmp_path, GOOD.replace(old, new)) == [problem]


def test_searches_that_find_nothing_are_problems(tmp_path):
    pytest.importorskip("snowballstemmer")  # comes with Sphinx
    index = '{"docnames":["a","b"],"terms":{"checkpoint":[0,1],"panda":0,"earli":[0],"stop":1}}'
    (tmp_path / "searchindex.js").write_text(f"Search.setIndex({index})", encoding="utf-8")
    found = check_site.searched(tmp_path)
    assert found["checkpoint"] == {"a", "b"}
    assert found["pandas"] == {"a"}
    assert check_site.problems(tmp_path) == [
        f'a search for "{query}" finds no page' for query in ("TensorBoard", "early stopping")
    ]


def test_the_gallery_has_every_example_and_its_figure():
    examples = {path.stem for path in (ROOT / "examples").glob("[a-z]*.py")}
    assert gallery.SHORT.keys() == examples
    assert gallery.times().keys() == examples
    assert gallery.PAGE.read_text(encoding="utf-8") == gallery.page(gallery.times())
    drawn = {name for name in examples if "savefig(" in (ROOT / f"examples/{name}.py").read_text()}
    figures = {path.stem: path.stat().st_size for path in gallery.FIGURES.glob("*.png")}
    assert figures.keys() == drawn
    assert max(figures.values()) < 40_000
