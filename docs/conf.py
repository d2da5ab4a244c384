"""Sphinx configuration: `make docs` builds, and fails on every warning."""

import fax

project = "fax"
author = "the fax authors"
version = release = fax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
]
html_theme = "furo"
html_title = "fax"
html_static_path: list[str] = []
exclude_patterns = ["_build"]
default_role = "code"
nitpicky = False
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
intersphinx_mapping: dict = {}


def public_names():
    modules = (
        fax,
        fax.sharding,
        fax.data,
        fax.data.partition,
        fax.metrics,
        fax.algorithms,
        fax.models,
        fax.tasks,
    )
    for module in modules:
        for name, value in vars(module).items():
            own = getattr(value, "__module__", "").startswith("fax") and hasattr(module, "__path__")
            if name[0] != "_" and (own or getattr(value, "__module__", "") == module.__name__):
                yield f"{module.__name__}.{name}"


def _refuse_undocumented(app):
    """A public name that the reference does not list fails the build."""
    page = (app.srcdir / "reference.md").read_text().split()
    missing = [name for name in public_names() if name not in page]
    if missing:
        raise RuntimeError(f"docs/reference.md leaves out {missing}")


def setup(app):
    app.connect("builder-inited", _refuse_undocumented)
