"""Imports go downward, and the generated pages are up to date."""

import importlib
import pathlib
import pkgutil
import re
import sys
import types
import xml.etree.ElementTree as ET

import pytest

import fax

ROOT = pathlib.Path(__file__).parent.parent
SOURCE = pathlib.Path(fax.__file__).parent.parent
sys.path.append(str(ROOT / "tools"))
import api  # noqa: E402
import house  # noqa: E402

CORE = {
    "fax/__init__.py": (
        "from typing import TYPE_CHECKING\n"
        "from fax._ops import f as f\n"
        "if TYPE_CHECKING:\n    from fax import algorithms as algorithms"
    ),
    "fax/_ops.py": "from fax.primitives import _map",
    "fax/_place.py": "import jax",
    "fax/primitives/__init__.py": "",
    "fax/primitives/_map.py": "from fax import _place",
    "fax/algorithms/__init__.py": "import optax, fax",
}
# What is added to CORE, and what is wrong with it.
WRONG = {
    "upward": (
        {"fax/primitives/_map.py": "def rule():\n    from fax import _ops"},
        "fax.primitives._map imports fax._ops, which is upward: primitives is below operators",
    ),
    "a circle of modules": (
        {"fax/data/__init__.py": "import fax.data._a", "fax/data/_a.py": "from fax import data"},
        "imports between modules go in a circle: fax.data -> fax.data._a -> fax.data",
    ),
    "a circle of parts": (
        {
            "fax/data/__init__.py": "",
            "fax/data/_a.py": "from fax.metrics import _a",
            "fax/data/_b.py": "",
            "fax/metrics/__init__.py": "",
            "fax/metrics/_a.py": "from fax.data import _b",
        },
        "imports between parts go in a circle: data -> metrics -> data",
    ),
    "a part that is on no floor": (
        {"fax/extra/__init__.py": ""},
        "fax/extra/ is on no floor: name it in FLOORS of tools/house.py",
    ),
    "a package that the core may not need": (
        {"fax/primitives/_map.py": "try:\n    import optax.tree\nfinally:\n    pass"},
        "fax.primitives._map imports optax, but import fax may need jax and numpy alone",
    ),
}


def built(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return house.House(folder)


def test_the_house_stands():
    of_fax = house.House(SOURCE)
    assert of_fax.problems() == []
    drawing = (ROOT / house.DRAWING).read_text(encoding="utf-8")
    assert drawing == house.draw(of_fax), "run make pages"
    ET.fromstring(drawing)


def test_a_house_that_stands(tmp_path):
    found = built(tmp_path, CORE)
    assert found.problems() == []
    assert found.stories() == ["foundations", "primitives", "operators", "fax", "algorithms"]
    assert found.uses["operators"] == {"primitives"}
    assert found.uses["primitives"] == {"foundations"}
    assert found.packages["fax.algorithms"] == {"optax"}
    assert found.packages["fax._place"] == {"jax"}


@pytest.mark.parametrize("name", WRONG)
def test_a_house_that_does_not(name, tmp_path):
    files, message = WRONG[name]
    assert message in built(tmp_path, CORE | files).problems()


def test_a_package_that_a_function_imports_is_not_needed_at_import(tmp_path):
    found = built(tmp_path, CORE | {"fax/_place.py": "def f():\n    import flax"})
    assert found.problems() == []


def public_names():
    """By importing; `tools/api.py` reads the source instead."""
    inside = [module.name for module in pkgutil.walk_packages(fax.__path__, "fax.")]
    for name in ["fax", *(m for m in inside if not any(p[0] == "_" for p in m.split(".")))]:
        home = importlib.import_module(name)
        for own in dir(home):
            value = getattr(home, own)
            where = getattr(value, "__module__", "")
            there = where.startswith("fax") if hasattr(home, "__path__") else where == name
            if own[0] != "_" and there and not isinstance(value, types.ModuleType):
                yield f"{name}.{own}"


def test_the_list_of_public_names_is_complete():
    page = (ROOT / api.PAGE).read_text(encoding="utf-8")
    listed = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `fax.")]
    assert sorted(listed) == sorted(public_names()), "run make pages"
    assert page == api.page(SOURCE), "run make pages"


def test_every_public_name_has_an_entry_on_the_page_of_its_module(tmp_path):
    pages = ROOT / "docs" / "reference"
    assert api.undocumented(SOURCE, pages) == {}
    removed = {}
    for page in sorted(pages.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        entry = re.search(r"^\.\. auto(?!module)\w+:: (\S+)\n", text, re.MULTILINE)
        (tmp_path / page.name).write_text(text.replace(entry[0], "", 1), encoding="utf-8")
        removed[entry[1]] = page.name
    assert api.undocumented(SOURCE, tmp_path) == removed
