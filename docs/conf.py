"""Sphinx settings. Build with `nox -s docs`; warnings are errors."""

import importlib.metadata

project = "fastlars"
author = "the fastlars developers"
copyright = "2026, the fastlars developers"
version = release = importlib.metadata.version("fastlars")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "furo"
html_title = f"fastlars {release}"
html_theme_options = {"light_css_variables": {"code-font-size": "0.76rem"}}  # 90 columns of code in a page
html_static_path = ["_static"]
html_css_files = ["pages.css"]

napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_typehints = "none"  # the docstrings say type, range and default; torch's own annotations need the network
autodoc_member_order = "bysource"
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpick_ignore_regex = [("py:.*", r"torch\..*")]
