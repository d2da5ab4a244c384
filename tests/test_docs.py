"""Every example in docstrings, README and documentation runs and prints what it says."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re

import jax
import jax.numpy as jnp
import pytest

import fax

ROOT = pathlib.Path(__file__).parent.parent
# Parts that need a package which has an environment of its own.
ELSEWHERE = {
    "fax.deploy._beam_client": "apache_beam",
    "fax.deploy._flower_client": "flwr",
}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = [fax.__name__, *(m.name for m in pkgutil.walk_packages(fax.__path__, "fax."))]
DOCS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", *(page for page in DOCS if not page.startswith("docs/_build"))]
# Pages that one learns from. All of their code runs, and draws their figures.
GUIDES = [p for p in PAGES if re.match("docs/(start|how_to|tutorials|understand)/", p)]
HOMES = [
    fax,
    fax.drjax,
    fax.sharding,
    fax.data,
    fax.data.partition,
    fax.inspect,
    fax.metrics,
    fax.aggregators,
    fax.algorithms,
    fax.deploy,
    fax.experiment,
    fax.models,
    fax.tasks,
]
PUBLIC = {
    f"{home.__name__}.{name}": value
    for home in HOMES
    for name in dir(home)
    for value in [getattr(home, name)]
    if not name.startswith("_") and inspect.isfunction(value) and value.__module__[:4] == "fax."
    if hasattr(home, "__path__") or value.__module__ == home.__name__
}


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.docs
@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    if name in ELSEWHERE:
        pytest.importorskip(ELSEWHERE[name])
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    with jax.enable_x64(False):
        for test in finder.find(module, name, globs={"fax": fax, "jax": jax, "jnp": jnp}):
            runner.run(test)
    assert runner.summarize().failed == 0


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.docs] * (page != "README.md")) for page in PAGES]
)
def test_pages(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jax.devices()  # a page that makes devices finds those of the tests
    with jax.enable_x64(False):
        results = doctest.testfile(str(ROOT / page), module_relative=False, optionflags=FLAGS)
    assert results.failed == 0
    assert results.attempted > 0 or page != "README.md"
    if page in GUIDES:
        figures = set(re.findall(r"!\[[^]]*\]\(([^)]*)\)", read(page)))
        assert {path.name for path in tmp_path.glob("*.svg")} == figures
        assert all((ROOT / page).with_name(name).exists() for name in figures)


@pytest.mark.parametrize("page", GUIDES)
def test_guides_have_no_code_that_does_not_run(page):
    languages = set(re.findall(r"^ *```([\w-]+)$", read(page), re.MULTILINE))
    assert languages <= {"pycon", "text", "console"}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_say_what_they_do(name):
    text = PUBLIC[name].__doc__
    assert "Example:" in text
    assert ">>>" in text
    if name not in ("fax.placements", "fax.min"):
        assert "Returns:" in text or PUBLIC[name].__annotations__["return"] in (
            "None",
            "Iterator[None]",
        )
    if name not in ("fax.placements", "fax.min", "fax.algorithms.fedavg"):
        assert "Raises:" in text
