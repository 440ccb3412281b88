"""Sphinx's settings; tools/site.py copies this file beside the pages that it writes."""

import json
import sys
from pathlib import Path

from docutils.nodes import image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
# Written by tools/site.py: the repository's address, and alt texts by the hash of the picture.
SITE = json.loads((HERE / "site.json").read_text(encoding="utf-8"))

project = author = copyright = "vae_nb"
extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
myst_heading_slug_func = "anchors.slug"
mathjax_path = "tex-svg.js"
mathjax3_config = {}
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "misc.highlighting_failure"]
html_theme = "sphinx_book_theme"
html_title = "vae_nb"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_extra_path = ["_extra"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "repository_url": SITE["repository"],
    "use_repository_button": True,
    "show_navbar_depth": 1,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": True,
}


def describe(app, doctree) -> None:
    """Give each picture its alt text.

    MyST-NB knows one alt text for all pictures of a cell, but it names each picture's file by the
    hash of what is in it.
    """
    for node in doctree.findall(image):
        alt = SITE["alt_texts"].get(Path(node["uri"]).stem)
        if alt:
            node["alt"] = alt


def setup(app) -> None:
    app.connect("doctree-read", describe)
