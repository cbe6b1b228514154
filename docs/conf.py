"""How `make docs` builds the site: Sphinx over these Markdown pages (MyST), the API page from docstrings."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import pensieve

project = "Pensieve"
release = version = pensieve.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

# A link to a page, a heading, a picture or a file that is not there is a warning, and warnings are errors.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r".*")]  # types in signatures are not links
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True

html_theme = "furo"
html_title = f"Pensieve {release}"
html_show_copyright = False
pygments_style = "default"
