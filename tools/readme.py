#!/usr/bin/env python3
"""Write README.md, and its pictures to index_files/, from nbs/index.ipynb and its stored outputs.

Nothing is run: the same notebook always gives the same files. nbdev's own command needs quarto.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
from pathlib import Path

import nbformat
from execnb.nbio import NbCell, nb2str, read_nb
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, hide_line, rm_export, strip_ansi
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
IMAGES = "index_files"
HEADER = "<!-- Generated from nbs/index.ipynb by tools/readme.py: do not edit -->\n\n"
# A Markdown link's target, with what may follow it; left alone are an address (https:), an anchor
# (#) and an absolute path.
LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)#\s]+)")
# nbconvert's own template calls each picture "png".
PICTURE = """{% extends "markdown/index.md.j2" %}
{% block data_png %}
![{{ output | get_metadata("alt", "image/png") | alt }}]({{
  output.metadata.filenames["image/png"] | path2url }})
{% endblock data_png %}"""
# What nbdev's directives ask for, in the tags that nbconvert knows.
TAGS = {"echo:": "remove_input", "output:": "remove_output"}


def tag(cell: NbCell) -> None:
    """Note `#| echo: false` and `#| output: false` as tags; drop the lines, which nbdev leaves."""
    if cell.cell_type != "code":
        return
    tags = [tag for name, tag in TAGS.items() if cell.directives_.get(name) == ["false"]]
    cell.metadata = {"tags": tags}
    cell.source = re.sub(r"\A(\s*#\s*\|.*\n?)+", "", cell.source)


def visible(path: Path) -> nbformat.NotebookNode:
    """The notebook as a reader should see it: no exported or hidden cells, no directives."""
    nb = read_nb(path)
    NBProcessor(nb=nb, procs=[strip_ansi, hide_line, rm_export, clean_magics, tag], process=True)
    nb = nbformat.reads(nb2str(nb), as_version=4)
    nb.cells = [cell for cell in nb.cells if cell.source.strip()]
    nb.metadata["language_info"] = {"name": "python"}
    return nb


def relink(markdown: str, folder: str) -> str:
    """Make links that are relative to `folder` relative to the folder above."""

    def moved(match: re.Match[str]) -> str:
        return match[1] + posixpath.normpath(posixpath.join(folder, match[2]))

    return LINK.sub(moved, markdown)


def plain(alt: str | None) -> str:
    """An alt text with nothing in it that Markdown reads as a mark."""
    return re.sub(r"([\\`*_\[\]<$|])", r"\\\1", alt or "")


def exporter() -> MarkdownExporter:
    """nbconvert's exporter: it obeys the tags, names pictures by place, gives them alt texts."""
    config = Config()
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_input_tags = {TAGS["echo:"]}
    config.TagRemovePreprocessor.remove_all_outputs_tags = {TAGS["output:"]}
    template = IMAGES + "/cell_{cell_index}_{index}{extension}"
    config.ExtractOutputPreprocessor.output_filename_template = template
    return MarkdownExporter(config=config, raw_template=PICTURE, filters={"alt": plain})


def main() -> None:
    os.chdir(ROOT)  # nbdev looks for settings.ini from here
    nbs = get_config().nbs_path
    nb = visible(nbs / "index.ipynb")
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source, nbs.name)

    text, resources = exporter().from_notebook_node(nb)
    text = re.sub(r"(?m)^[ \t]+$", "", text)  # nbconvert indents the empty lines around pictures
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    (ROOT / "README.md").write_text(HEADER + text, encoding="utf-8")

    shutil.rmtree(ROOT / IMAGES, ignore_errors=True)  # so that no picture outlives its cell
    for name, data in resources["outputs"].items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(data)


if __name__ == "__main__":
    main()
