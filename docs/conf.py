"""Settings of the documentation site; `make docs` builds it into docs/_build/html."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from golddiff import __version__

project = "golddiff"
author = "The golddiff authors"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml", "commands", "docstrings"]
exclude_patterns = ["_build"]
nitpicky = True
# types of other libraries have no pages here, and the site is built without a network
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|numpy|np|collections|pathlib|click|typing|PIL|abc|os|diffusers|deepinv|dinv)\..*"),
    (r"py:class", r"Tensor|UNet2DOutput"),  # of modules whose libraries are not there
]
suppress_warnings = ["config.cache"]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

default_role = "literal"
autodoc_default_options = {
    "members": True,
    "ignore-module-all": True,
    "special-members": "__call__",
    "show-inheritance": True,
    "member-order": "bysource",
}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_mock_imports = ["diffusers", "deepinv"]  # extras that the site is built without
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"golddiff {release}"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
