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
