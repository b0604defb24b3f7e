"""The documentation as a site, of Markdown: sphinx-build -W docs OUT (extra `docs`). A link to nothing is an error."""
from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

project, author, copyright = "xencrash", "the xencrash authors", "the xencrash authors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "xencrash"
html_copy_source = html_show_sourcelink = False
myst_heading_anchors = 3
default_role = "code"  # docstrings are plain text: `name` is code
nitpicky = False  # a signature may name types that have no page
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 90


def setup(app):
    """A record's fields are in its signature: of each alone autodoc knows no more than its number."""
    app.connect("autodoc-skip-member", lambda app, what, name, member, skip, options: (
        skip or (getattr(member, "__doc__", None) or "").startswith("Alias for field number")
    ))  # fmt: skip
