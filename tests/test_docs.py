"""Every example in docstrings, README and documentation runs and prints what it says."""

import doctest
import importlib
import pathlib
import pkgutil

import jax
import jax.numpy as jnp
import pytest

import fax

ROOT = pathlib.Path(__file__).parent.parent
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = [fax.__name__, *(m.name for m in pkgutil.walk_packages(fax.__path__, "fax."))]
PAGES = ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
PUBLIC = [name for name in dir(fax) if not name.startswith("_") and callable(getattr(fax, name))]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    with jax.enable_x64(False):
        for test in finder.find(module, name, globs={"fax": fax, "jax": jax, "jnp": jnp}):
            runner.run(test)
    assert runner.summarize().failed == 0


@pytest.mark.parametrize("page", PAGES)
def test_pages(page):
    with jax.enable_x64(False):
        results = doctest.testfile(str(ROOT / page), module_relative=False, optionflags=FLAGS)
    assert results.failed == 0
    assert results.attempted > 0 or page != "README.md"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_say_what_they_do(name):
    text = getattr(fax, name).__doc__
    if name != "PlacementError":
        assert "Example:" in text
        assert ">>>" in text
    if name not in ("PlacementError", "placements", "min"):
        assert "Raises:" in text
        assert "Returns:" in text
