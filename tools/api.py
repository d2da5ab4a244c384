"""Lists the public names of fax and what each is for, from the docstrings in its source.

    python tools/api.py

writes docs/api.md and needs only Python. The pages in docs/reference/, one for each module, are
written by hand; `undocumented` finds the names that they lack.

The public names are those that the `__init__.py` of fax and of its packages export by
`from ... import x as x`, and those that a module without a leading underscore defines. The first
sentence of a docstring says what the name is for.
"""

from __future__ import annotations

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
PAGE = "docs/api.md"
INTRODUCTION = """# Public names

This page lists all public names and what each is for. Everything else is private and may change in
any release; see [versions and compatibility](versions.md). The [reference](reference.md) has the
details. Classes whose names end in `State` are public so that code can name what it restores from a
checkpoint.

`make pages` generates this page from the docstrings.
"""


def home(root: pathlib.Path, module: str) -> pathlib.Path:
    """The file of a module or package."""
    path = root.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def public_modules(root: pathlib.Path) -> list[str]:
    """fax and all of its modules without a leading underscore."""
    found = []
    for path in sorted((root / "fax").rglob("*.py")):
        names = path.relative_to(root).with_suffix("").parts
        names = names[:-1] if names[-1] == "__init__" else names
        if not any(name.startswith("_") for name in names):
            found.append(".".join(names))
    return found


def definition(root: pathlib.Path, module: str, name: str) -> ast.FunctionDef | ast.ClassDef:
    """The definition of a name, which the module may import from another one."""
    body = ast.parse(home(root, module).read_text(encoding="utf-8")).body
    body += [each for node in body if isinstance(node, ast.If) for each in node.body]
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return definition(root, str(node.module), alias.name)
    raise LookupError(f"{module} defines no function or class {name}")


def exported(root: pathlib.Path, module: str) -> list[str]:
    """The public functions and classes of a module, in the order of the source."""
    path, names = home(root, module), []
    body = ast.parse(path.read_text(encoding="utf-8")).body
    # What is imported when it is first used is written down for type checkers.
    body += [each for node in body if isinstance(node, ast.If) for each in node.body]
    for node in body:
        if path.name == "__init__.py" and isinstance(node, ast.ImportFrom):
            names += [
                alias.name
                for alias in node.names
                if alias.asname == alias.name
                and not home(root, f"{node.module}.{alias.name}").exists()
            ]
        elif path.name != "__init__.py" and isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
    return [name for name in names if not name.startswith("_")]


def purpose(root: pathlib.Path, module: str, name: str) -> str:
    """The first sentence of a docstring."""
    text = ast.get_docstring(definition(root, module, name))
    if not text:
        raise LookupError(f"{module}.{name} has no docstring")
    first = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z0-9`])", first)[0]


def page(root: pathlib.Path) -> str:
    """The page, in Markdown."""
    parts = [INTRODUCTION]
    for module in public_modules(root):
        names = exported(root, module)
        if names:
            rows = [f"| `{module}.{n}` | {purpose(root, module, n)} |" for n in names]
            parts += [f"## {module}\n", "| name | what it is for |", "|---|---|", *rows, ""]
    return "\n".join(parts)


def reference_page(module: str) -> str:
    """The file with the entries of a module: data_partition.md for fax.data.partition."""
    return f"{module.removeprefix('fax.').replace('.', '_')}.md"


def undocumented(root: pathlib.Path, pages: pathlib.Path) -> dict[str, str]:
    """The public names that have no entry, and the page in docs/reference/ that should have it."""
    missing = {}
    for module in public_modules(root):
        page = pages / reference_page(module)
        text = page.read_text(encoding="utf-8") if page.exists() else ""
        entries = set(re.findall(r"^\.\. auto(?:function|class|exception):: (\S+)$", text, re.M))
        names = [f"{module}.{name}" for name in exported(root, module)]
        missing |= {name: page.name for name in names if name not in entries}
    return missing


if __name__ == "__main__":
    (ROOT / PAGE).write_text(page(ROOT), encoding="utf-8")
