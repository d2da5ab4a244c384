"""Lists the public names of fax with what each is there for, from the docstrings in its source.

    python tools/api.py          # writes docs/api.md
    python tools/api.py --check  # says whether the page is of this source

Public is what `fax/__init__.py` and those of its packages export by `from ... import x as x`, and
what a module without an underscore defines. The reason is the first sentence of the docstring.
"""

from __future__ import annotations

import ast
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parent.parent
PAGE = "docs/api.md"
INTRODUCTION = """# Public names

All public names, and what each is there for. Everything else is private and can change at any time; see
[versions and compatibility](versions.md). The [reference](reference.md) has the details. Classes that end in `State` are public
so that code can name what it restores from a checkpoint.

This page is made by `python tools/api.py` from the docstrings.
"""


def home(root: pathlib.Path, module: str) -> pathlib.Path:
    """The file of a module or package."""
    path = root.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def public_modules(root: pathlib.Path) -> list[str]:
    """fax and the modules in it whose names have no underscore."""
    found = []
    for path in sorted((root / "fax").rglob("*.py")):
        names = path.relative_to(root).with_suffix("").parts
        names = names[:-1] if names[-1] == "__init__" else names
        if not any(name.startswith("_") for name in names):
            found.append(".".join(names))
    return found


def definition(root: pathlib.Path, module: str, name: str) -> ast.AST:
    """Where a name is defined, through the modules that it is imported from."""
    for node in ast.parse(home(root, module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return definition(root, str(node.module), alias.name)
    raise LookupError(f"{module} defines no function or class {name}")


def exported(root: pathlib.Path, module: str) -> list[str]:
    """The public names of a module, without the modules among them, in the order of the source."""
    path, names = home(root, module), []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and path.name == "__init__.py":
            for alias in node.names:
                is_module = home(root, f"{node.module}.{alias.name}").exists()
                if alias.asname == alias.name and not is_module:
                    names.append(alias.name)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
            if path.name != "__init__.py":
                names.append(node.name)
    return names


def reason(root: pathlib.Path, module: str, name: str) -> str:
    """The first sentence of a docstring."""
    text = ast.get_docstring(definition(root, module, name))  # type: ignore[arg-type]
    if not text:
        raise LookupError(f"{module}.{name} has no docstring")
    first = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])", first)[0]


def page(root: pathlib.Path) -> str:
    """The page, in Markdown."""
    parts = [INTRODUCTION]
    for module in public_modules(root):
        names = exported(root, module)
        if names:
            rows = [f"| `{module}.{n}` | {reason(root, module, n)} |" for n in names]
            parts.append("\n".join([f"## {module}\n", "| name | what for |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def main() -> int:
    text = page(ROOT)
    if "--check" not in sys.argv:
        (ROOT / PAGE).write_text(text, encoding="utf-8")
    elif (ROOT / PAGE).read_text(encoding="utf-8") != text:
        print(f"{PAGE} is not of this source: run python tools/api.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
