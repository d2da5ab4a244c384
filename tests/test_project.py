"""Names and versions agree between files, and the README's promises have tests."""

import ast
import functools
import pathlib
import re
import runpy
import tomllib

import pytest

import fax

ROOT = pathlib.Path(__file__).parent.parent


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


PROJECT = tomllib.loads(read("pyproject.toml"))
EXTRAS = PROJECT["project"]["optional-dependencies"]


def requirement(name, of):
    """The versions that are asked for, as in `>=1,<2`."""
    (found,) = [line for line in of if re.match(rf"{name}(?![\w-])", line)]
    return found.removeprefix(name)


# The distribution


def test_the_distribution_has_a_name_of_its_own():
    """`fax` on the package index is another project, which nobody should install by mistake."""
    assert PROJECT["project"]["name"] == "fax-jax"
    for line in (line for lines in EXTRAS.values() for line in lines):
        assert re.match(r"[\w.-]+", line).group() != "fax"
    pages = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    for text in map(read, [*pages, "Makefile", *(ROOT / "fax").rglob("*.py")]):
        for command in re.findall(r"pip install ([^`\n]*)", text):
            assert not re.search(r"(?<![\w/.-])fax(?![\w-])", command)
        for extras in re.findall(r"fax-jax\[([\w,]+)\]", text):
            assert set(extras.split(",")) <= EXTRAS.keys()


def test_versions_agree():
    oldest = re.match(r">=([\d.]+),<", requirement("jax", PROJECT["project"]["dependencies"]))
    assert f"jax=={oldest[1]}" in read(".ci/run")
    assert f"jax {oldest[1]}" in read("README.md")
    assert f"version: {fax.__version__}\n" in read("CITATION.cff")
    released = re.findall(r"^## \[([^\]]+)\]", read("CHANGELOG.md"), re.M)
    assert released[0] == "Unreleased"
    assert released[1:] in ([], [fax.__version__, *released[2:]])
    ruff = "ruff" + requirement("ruff", EXTRAS["test"])
    assert set(re.findall(r"ruff==[\d.]+", read(".pre-commit-config.yaml"))) == {ruff}


def test_notes_of_a_release():
    found = runpy.run_path(str(ROOT / "tools" / "release_notes.py"))["notes"]
    log = "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2030-01-31\n\n### Added\n\n- [x](y)\n\n"
    log += "## [0.1.0] - 2030-01-01\n\nold\n"
    assert found("v0.2.0", log, "0.2.0") == "### Added\n\n- [x](y)"
    assert found("v0.1.0", log, "0.1.0") == "old"
    for tag, version, message in [
        ("v0.2.0", "0.1.0", "the version of fax is 0.1.0"),
        ("v0.3.0", "0.3.0", r"no section \[0.3.0\]"),
        ("v0.2.0", "0.2.0", r"no date for \[0.2.0\]"),
    ]:
        with pytest.raises(SystemExit, match=message):
            found(tag, log.replace(" - 2030-01-31", ""), version)


def test_changes_are_of_the_kinds_that_the_format_has():
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", read("CHANGELOG.md"), re.M)) <= kinds


# Promises


def promises():
    """The page that a promise is made on, the promise, and its tests."""
    found = []
    for section in read("docs/promises.md").split("\n## ")[1:]:
        page = re.search(r"\n(?:On|In) \[[^]]*\]\(([^)]*)\):\n", section)[1]
        page = "README.md" if page.endswith("/README.md") else f"docs/{page}"
        lines = [line for line in section.splitlines() if line.startswith("| ")]
        cells = [line.strip("| ").split(" | ") for line in lines]
        found += [(page, *cell) for cell in cells if cell != ["promise", "tests"]]
    return found


def plain(text):
    """Markdown as it is read."""
    return " ".join(re.sub(r"\]\([^)]*\)|[\[\]*]", "", text).split())


@functools.cache
def functions(file):
    """The tests of a file, and whether `make test` runs them."""
    found = {}
    for node in ast.parse(read(file)).body:
        if isinstance(node, ast.FunctionDef):
            decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
            found[node.name] = not decorators & {"pytest.mark.long", "pytest.mark.docs"}
    return found


@pytest.mark.parametrize(
    ("page", "promise", "tests"), promises(), ids=[p for _, p, _ in promises()]
)
def test_promises_are_made_and_held(page, promise, tests):
    assert plain(promise) in plain(read(page))
    names = re.findall(r"`(test_\w+\.py)::(\w+)`", tests)
    assert names
    runs = [functions(f"tests/{file}")[name] for file, name in names]
    assert any(runs), "make test runs none of them"
