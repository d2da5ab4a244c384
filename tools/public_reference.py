"""What `make docs` adds to Sphinx for the pages in docs/reference/.

- Each group of entries begins with a table of its names.
- Every public name needs an entry, on the page of its module.
- Types are shown under their public names, not under those of the modules that define them.
- Code names in prose, such as `fax.mean` and `jax.grad`, are links.
"""

from __future__ import annotations

import logging
import pathlib
import re
import textwrap
from typing import Any

import api
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.logging import getLogger

LOG = getLogger(__name__)
FOLDER = "reference/"
MODULES = {
    FOLDER + api.reference_page(module).removesuffix(".md"): module
    for module in api.public_modules(api.ROOT)
}
NAMES = {f"{m}.{n}" for m in api.public_modules(api.ROOT) for n in api.exported(api.ROOT, m)}
INVENTORIES = {
    "flax": "https://flax.readthedocs.io/en/stable/",
    "jax": "https://docs.jax.dev/en/latest/",
    "numpy": "https://numpy.org/doc/stable/",
    "optax": "https://optax.readthedocs.io/en/stable/",
    "orbax": "https://orbax.readthedocs.io/en/stable/",
}
BLOCK = re.compile(
    r"^```\{eval-rst\}\n((?:\.\. auto(?:function|class|exception):: .*\n|   .*\n)+)", re.M
)
ENTRY = re.compile(r"^\.\. auto\w+:: (\S+)$", re.M)
RETURNS = re.compile(r"^( *)Returns:$")
PRIVATE_PATH = re.compile(r"\b(fax(?:\.[a-z]\w*)*)(?:\._\w+)+(?:\.\w+)*?\.([A-Za-z]\w*)\b")
ARRAY = re.compile(r"\bjaxlib\.[\w.]+\.Array\b")
# A name in code, which may be called: `fax.program(sensors=3)`.
DOTTED = re.compile(rf"((?:fax|{'|'.join(INVENTORIES)})(?:\.[A-Za-z]\w*)+)(?:\(.*\))?")


def add_tables(app: Sphinx, page: str, source: list[str]) -> None:
    """Puts a table of names and purposes before each group of entries."""

    def with_table(found: re.Match[str]) -> str:
        rows = "".join(f"   {name.rpartition('.')[2]}\n" for name in ENTRY.findall(found[1]))
        return f"```{{eval-rst}}\n.. autosummary::\n   :nosignatures:\n\n{rows}\n{found[1]}"

    if page.startswith(FOLDER):
        source[0] = BLOCK.sub(with_table, source[0])


def keep_returns(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Makes `Returns:` a field, in which napoleon does not take text before a colon for a type."""
    for at, line in enumerate(lines):
        if header := RETURNS.match(line):
            indent, rest = header[1], lines[at + 1 :]
            outside = (
                i for i, text in enumerate(rest) if text and not text.startswith(indent + " ")
            )
            end = next(outside, len(rest))
            first, *more = textwrap.dedent("\n".join(rest[:end])).splitlines()
            field = [
                f"{indent}:returns: {first}",
                *(f"{indent}    {text}".rstrip() for text in more),
            ]
            lines[at : at + 1 + end] = [*field, ""]
            return


def public_path(text: str) -> str:
    """Replaces paths of private modules in a text."""

    def path(found: re.Match[str]) -> str:
        name = f"{found[1]}.{found[2]}"
        return name if name in NAMES else found[2]

    return ARRAY.sub("jax.Array", PRIVATE_PATH.sub(path, text))


def hide_private_paths(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    lines[:] = [public_path(line) for line in lines]


def module_at(node: nodes.Element | None, page: str) -> str:
    """The module that docstrings around a node belong to, or an empty string."""
    while node is not None and not isinstance(node, addnodes.desc):
        node = node.parent
    if node is not None:
        return str(node[0].get("module") or "")
    return MODULES.get(page, "")


def target(text: str, module: str) -> str | None:
    """The full name that a piece of code means. Docstrings also name what is beside them."""
    if f"{module}.{text}" in NAMES:
        return f"{module}.{text}"
    found = DOTTED.fullmatch(text)
    return found[1] if found else None


def link_names(app: Sphinx, doctree: nodes.document) -> None:
    """Makes links of code names. A name that nothing documents stays as it is."""
    within = (nodes.title, nodes.reference, addnodes.pending_xref, addnodes.desc_signature)
    for literal in list(doctree.findall(nodes.literal)):
        parent, inside = literal.parent, False
        while parent is not None and not inside:
            inside, parent = isinstance(parent, within), parent.parent
        name = target(literal.astext(), module_at(literal, app.env.docname))
        if name is None or inside:
            continue
        link = addnodes.pending_xref(
            "",
            refdomain="py",
            reftype="obj",
            reftarget=name,
            refdoc=app.env.docname,
            refexplicit=True,
        )
        literal.replace_self(link)
        link += literal


def find_missing(app: Sphinx, config: Any) -> None:
    """Warns of public names that have no entry, which fails the build."""
    for name, page in api.undocumented(api.ROOT, pathlib.Path(app.srcdir, FOLDER)).items():
        LOG.warning("%s has no entry in docs/%s%s", name, FOLDER, page)


def allow_no_network(record: logging.LogRecord) -> bool:
    """Without network, links to other projects are missing, which fails no build."""
    return "failed to reach any of the inventories" not in str(record.msg)


def setup(app: Sphinx) -> dict[str, bool]:
    app.setup_extension("sphinx.ext.autosummary")
    app.setup_extension("sphinx.ext.intersphinx")
    app.setup_extension("sphinx.ext.napoleon")
    logging.getLogger("sphinx.sphinx.ext.intersphinx").addFilter(allow_no_network)
    app.connect("source-read", add_tables)
    app.connect("autodoc-process-docstring", keep_returns, priority=400)
    app.connect("autodoc-process-docstring", hide_private_paths, priority=600)
    app.connect("doctree-read", link_names)
    app.connect("config-inited", find_missing)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
