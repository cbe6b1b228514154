"""How `make docs` builds the site: Sphinx over these Markdown pages (MyST), the API page from docstrings."""

from pathlib import Path

import pensieve

ROOT = Path(__file__).resolve().parent.parent

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

ROOT_PAGES = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md", "security": "SECURITY.md"}


def setup(app):
    """Show the pages that live at the repository's root, with their links turned to this folder."""
    app.connect("source-read", _read_root_page)


def _read_root_page(app, page, source):
    if page in ROOT_PAGES:
        text = (ROOT / ROOT_PAGES[page]).read_text(encoding="utf-8").replace("](docs/", "](")
        for name, file in ROOT_PAGES.items():
            text = text.replace(f"]({file}", f"]({name}.md")
        source[0] = text
