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
    "sphinx_copybutton",
    "sphinx_design",
]
html_theme = "furo"
html_title = "fax"
html_static_path = ["_static"]
html_css_files = ["fax.css"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "  # what is copied has no prompts and no output
copybutton_prompt_is_regexp = True
exclude_patterns = ["_build"]
default_role = "code"
nitpicky = False
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
intersphinx_mapping: dict = {}
