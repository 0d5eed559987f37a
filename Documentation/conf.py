# SPDX-License-Identifier: GPL-2.0
"""Sphinx's configuration: `make htmldocs` writes build/htmldocs, and a warning is an error."""

import pathlib
import re

_cargo = (pathlib.Path(__file__).parent.parent / "Cargo.toml").read_text()

project = "zdmirror"
author = "zdmirror maintainers"
copyright = "zdmirror maintainers, GPL-2.0"
release = version = re.search(r'^version = "(.*)"$', _cargo, re.M).group(1)

root_doc = "index"
exclude_patterns = ["_build"]
extensions = []
# Code is shown without highlighting unless a block names its language.
highlight_language = "none"
html_theme = "alabaster"
html_theme_options = {
    "description": "ZONE_DEVICE pages are free if and only if their count is zero",
    "page_width": "1100px",
    "sidebar_width": "230px",
    "fixed_sidebar": True,
}
# The output must not depend on the time and place of the build.
html_last_updated_fmt = None
html_show_sphinx = False
