"""Sphinx configuration: `make docs` builds, and fails on every warning."""

import pathlib
import re
import sys

import fax

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tools"))
from public_reference import INVENTORIES

project = "fax"
author = "the fax authors"
copyright = "the fax authors, Apache License 2.0"
version = release = fax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "public_reference",
    "sphinx_copybutton",
    "sphinx_design",
]
html_theme = "furo"
html_title = "fax"
html_static_path = ["_static"]
html_css_files = ["fax.css"]
pygments_dark_style = "github-dark"  # furo's default underlines the names of modules
copybutton_prompt_text = r">>> |\.\.\. |\$ "  # what is copied has no prompts and no output
copybutton_prompt_is_regexp = True
exclude_patterns = ["_build"]
default_role = "code"
nitpicky = False
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]
autosummary_generate = False  # entries are on the pages of modules
autodoc_typehints = "none"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
intersphinx_mapping = {name: (url, None) for name, url in INVENTORIES.items()}
intersphinx_timeout = 5


def without_last_blank_lines(app, name, source):
    """Removes the blank line at the end of a block of code, which only doctest needs."""
    source[0] = re.sub(r"\n\n```\n", "\n```\n", source[0])


def setup(app):
    app.connect("source-read", without_last_blank_lines)
