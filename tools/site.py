#!/usr/bin/env python3
"""Build the site in _site/ from the notebooks and their stored outputs: python tools/site.py [--dest FOLDER]

Nothing is run and nothing is fetched: pages, API pages, search, mathematics and pictures are whole without a network.
Needs the extra "docs" (pip install -e '.[docs]'). nbdev's own route to a site needs quarto.
"""
from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import importlib.util
import inspect
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from execnb.nbio import nb2str, read_nb
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, hide_line, strip_ansi

from notebooks import alts, directives, notebooks, number_and_stem
from readme import LINK, tag

ROOT = Path(__file__).resolve().parent.parent
CAPTIONS = {"derivation": "Derivation", "library": "Library", "worked": "Worked"}
HEADING = re.compile(r"(?m)^#{1,4} +(.+?)\s*$")
EXPORT = re.compile(r"export\b")
CONF = """
project, author, copyright = "vae_nb", "vae_nb authors", "vae_nb authors"
extensions = ["myst_nb"]
nb_execution_mode, nb_merge_streams, nb_render_markdown_format = "off", True, "myst"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_dmath_double_inline, myst_heading_anchors = True, 4
myst_heading_slug_func = "anchors.slug"
mathjax_path = "tex-svg.js"
mathjax3_config = {}
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "misc.highlighting_failure"]
html_theme, html_title = "sphinx_book_theme", "vae_nb"
html_static_path, html_css_files, html_extra_path = ["_static"], ["custom.css"], ["_extra"]
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_theme_options = {"repository_url": "%(repository)s", "use_repository_button": True, "show_navbar_depth": 1,
                      "use_download_button": False, "use_fullscreen_button": False, "home_page_in_toc": True}
"""
# MyST-NB knows one alt text for all pictures of a cell; but it names each picture's file by the hash of what is in it.
DESCRIBE = """
import json, pathlib
from docutils.nodes import image
ALTS = json.loads((pathlib.Path(__file__).parent / "alts.json").read_text(encoding="utf-8"))
def describe(app, doctree):
    for node in doctree.findall(image):
        if alt := ALTS.get(pathlib.PurePosixPath(node["uri"]).stem): node["alt"] = alt
def setup(app): app.connect("doctree-read", describe)
"""
CSS = """
.bd-header { display: none; }
.page-links { font-size: 0.85rem; }
.exports { font-size: 0.85rem; text-align: right; margin-top: -0.75rem; }
.doc { white-space: pre-line; margin: -0.5rem 0 1rem 1rem; }
.bd-main .bd-content .bd-article-container { max-width: 70rem; }
div.cell div.cell_input pre, div.cell div.cell_output pre { font-size: 0.8em; }
"""


def slug(title: str) -> str:
    """The anchor of a heading, as Jupyter makes it: one link serves JupyterLab, GitHub and the site. Sphinx calls it, too."""
    return title.strip().replace(" ", "-")


@dataclass
class Thing:
    """A public name: where it is derived, what it says of itself."""
    name: str
    signature: str
    doc: str
    module: str
    page: str = ""                   # of its notebook, without ending
    anchor: str = ""                 # of the heading above its cell
    line: int = 0                    # in the module
    parts: list["Thing"] = field(default_factory=list)         # public methods
    used: list[str] = field(default_factory=list)              # pages of worked notebooks that use it


def signature(node: ast.AST) -> str:
    """A function's or class's call, with hints and defaults, as it is written."""
    if isinstance(node, ast.ClassDef):
        for inner in node.body:
            if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
                return re.sub(r"^\((self, |self)", "(", signature(inner)).removesuffix(" -> None")
        fields = [ast.unparse(inner) for inner in node.body if isinstance(inner, ast.AnnAssign)]
        return f"({', '.join(fields)})" if fields else ""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"({ast.unparse(node.args)}){returns}"
    return ""


def documented(node: ast.AST, module: str) -> Thing:
    doc = ast.get_docstring(node) if not isinstance(node, (ast.Assign, ast.AnnAssign)) else f"= {ast.unparse(node.value)}"
    name = node.name if hasattr(node, "name") else ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
    thing = Thing(name, signature(node), doc or "", module, line=node.lineno)
    for inner in node.body if isinstance(node, ast.ClassDef) else []:
        if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_") and ast.get_docstring(inner):
            thing.parts.append(documented(inner, module))
    return thing


def public(package: Path, pages: dict[str, Path]) -> dict[str, list[Thing]]:
    """The public names of each module, in order."""
    found: dict[str, list[Thing]] = {}
    for stem, path in pages.items():
        module = number_and_stem(path)[1]
        source = package / f"{module}.py"
        if not source.exists() or module == "all": continue
        tree = ast.parse(source.read_text(encoding="utf-8"))
        nodes = [n for n in tree.body if hasattr(n, "name") or (isinstance(n, (ast.Assign, ast.AnnAssign)) and n.value)]
        things = [documented(n, module) for n in nodes]
        found[module] = [t for t in things if not t.name.startswith("_") and t.name.isidentifier()]
        where = headings(path)
        for thing in found[module]: thing.page, thing.anchor = stem, where.get(thing.name, "")
    return found


def headings(path: Path) -> dict[str, str]:
    """For each name that a notebook's exported cells define, the anchor of the heading above."""
    found, above = {}, ""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            for title in HEADING.findall(source): above = slug(title)
        elif any(EXPORT.match(d) for d in directives(cell)):
            for name in defined(source): found[name] = above
    return found


def defined(source: str) -> list[str]:
    """Names that a cell defines at its top level."""
    code = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("#|", "%", "!")))
    names = []
    for node in ast.parse(code).body:
        if hasattr(node, "name"): names.append(node.name)
        elif isinstance(node, ast.Assign): names += [t.id for t in node.targets if isinstance(t, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name): names.append(node.target.id)
    return names


def used_in(pages: dict[str, Path], things: dict[str, Thing]) -> None:
    """Note for each thing the worked notebooks whose code names it."""
    for stem, path in pages.items():
        if path.parent.name != "worked": continue
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        for name in set(re.findall(r"\b\w+\b", code)) & things.keys(): things[name].used.append(stem)


# ---- pages

def outside(markdown: str, stem: str, home: str) -> str:
    """Links that leave the notebooks' folder become links to the repository at `home`."""
    def leads(m: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("nbs", posixpath.dirname(stem), m[2]))
        return m[0] if target.startswith("nbs/") else f"{m[1]}{home}/{target}"
    return LINK.sub(leads, markdown)


def page(path: Path, stem: str, module: list[Thing], links: dict[str, str], home: str) -> nbformat.NotebookNode:
    """A notebook as a page: directives gone, a line of links below the title, and below exported cells links to the API."""
    nb = read_nb(path)
    exports = {i: [n for n in defined(c.source) if n in {t.name for t in module}] for i, c in enumerate(nb.cells)
               if c.cell_type == "code" and any(EXPORT.match(d) for d in directives(c))}
    ids = {nb.cells[i].id: names for i, names in exports.items() if names}
    folded = {c.id for c in nb.cells if any(d.startswith("code-fold") for d in directives(c))}
    NBProcessor(nb=nb, procs=[strip_ansi, hide_line, clean_magics, tag], process=True)
    nb = nbformat.reads(nb2str(nb), as_version=4)
    cells = []
    for cell in nb.cells:
        if not cell.source.strip(): continue
        if cell.cell_type == "markdown": cell.source = outside(cell.source, stem, home)
        if cell.cell_type == "code": cell.metadata = {"tags": [t.replace("_all_outputs", "-output").replace("_", "-") for t in cell.metadata.get("tags", [])]}
        if cell.get("id") in folded: cell.metadata["tags"].append("hide-input")
        cells.append(cell)
        if names := ids.get(cell.get("id")):
            up = "../" * stem.count("/")
            said = " · ".join(f'<a href="{up}api/{module[0].module}.html#{name}">{name}</a>' for name in names)
            cells.append(nbformat.v4.new_markdown_cell(f'<p class="exports">API: {said}</p>'))
    bar = " · ".join(f'<a href="{url}"{extra}>{what}</a>' for what, (url, extra) in links.items())
    cells.insert(1, nbformat.v4.new_markdown_cell(f'<p class="page-links">{bar}</p>'))
    nb.cells, nb.metadata["language_info"] = cells, {"name": "python", "pygments_lexer": "ipython3"}
    return nb


def told(nb: nbformat.NotebookNode) -> dict[str, str]:
    """The alt text of each picture in a notebook's outputs, by the SHA-256 of the picture's bytes."""
    return {hashlib.sha256(base64.b64decode(output.data[kind])).hexdigest(): alt for cell in nb.cells
            for output in cell.get("outputs", []) for kind, alt in alts(output).items() if alt}


def api_page(module: str, things: list[Thing], titles: dict[str, str], home: str) -> str:
    """The Markdown of a module's API page."""
    first = things[0].page if things else ""
    lines = [f"# vae_nb.{module}", "", f"From [{titles[first]}](../{first}.ipynb).", ""] if first else [f"# vae_nb.{module}", ""]
    for thing in things:
        lines += [f'<span id="{thing.name}"></span>', "", f"## `{thing.name}`", "", "```python", f"{thing.name}{thing.signature}", "```", ""]
        lines += [f'<div class="doc">{escaped(thing.doc)}</div>', ""] if thing.doc else []
        for part in thing.parts:
            lines += ["```python", f"{thing.name}.{part.name}{part.signature}", "```", "", f'<div class="doc">{escaped(part.doc)}</div>', ""]
        seen = [f"[where it is derived or made](../{thing.page}.ipynb#{thing.anchor})" if thing.anchor else f"[where it is made](../{thing.page}.ipynb)",
                f"[source]({home}/vae_nb/{module}.py#L{thing.line})"]
        seen += ["at work in " + ", ".join(f"[{titles[stem]}](../{stem}.ipynb)" for stem in thing.used[:6])] if thing.used else []
        lines += [" · ".join(seen), ""]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """A docstring as HTML in Markdown; what stands between backticks is code."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = text.replace("\n\n", "\n&nbsp;\n").replace("*", "&#42;").replace("_", "&#95;").replace("$", "&#36;")
    return re.sub("`([^`]+)`", r"<code>\1</code>", text).replace("`", "&#96;")


def toctree(caption: str, pages: list[str]) -> str:
    return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```"


def sources(dest: Path) -> None:
    """What Sphinx reads."""
    cfg = get_config()
    pages = {path.resolve().relative_to(cfg.nbs_path).with_suffix("").as_posix(): path for path in notebooks()}
    titles = {stem: title(path) for stem, path in pages.items()}
    api = public(ROOT / cfg.lib_name, pages)
    used_in(pages, {t.name: t for things in api.values() for t in things})
    by_page = {stem: api.get(number_and_stem(path)[1], []) for stem, path in pages.items()}
    home, words = f"{cfg.git_url}/blob/{cfg.branch}", {}
    for stem, path in pages.items():
        up, raw = "../" * stem.count("/"), f"{cfg.nbs_path.name}/{stem}.ipynb"
        links = {"download the notebook": (f"{up}notebooks/{stem}.ipynb", " download"),
                 "open in Colab": (f"https://colab.research.google.com/github/{cfg.user}/{cfg.repo}/blob/{cfg.branch}/{raw}", ""),
                 "on GitHub": (f"{home}/{raw}", ""),
                 "in JupyterLab": (f"{up}index.html#Reading-in-JupyterLab", "")}
        if by_page[stem]: links["API"] = (f"{up}api/{by_page[stem][0].module}.html", "")
        nb, out = page(path, stem, by_page[stem], links, home), dest / f"{stem}.ipynb"
        if stem == "index":
            for caption in CAPTIONS: nb.cells.append(nbformat.v4.new_markdown_cell(toctree(CAPTIONS[caption], [f"{titles[s]} <{s}>" for s in pages if s.startswith(caption)])))
            nb.cells.append(nbformat.v4.new_markdown_cell(toctree("API", [f"api/{module}" for module in sorted(api)])))
        words |= told(nb)
        out.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, out)
        copy = dest / "_extra" / "notebooks" / f"{stem}.ipynb"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    (dest / "api").mkdir()
    for module, things in api.items():
        (dest / "api" / f"{module}.md").write_text(api_page(module, things, titles, home), encoding="utf-8")
    (dest / "conf.py").write_text("import sys\nsys.path.insert(0, __file__.rpartition('/')[0])" + CONF % {"repository": cfg.git_url} + DESCRIBE, encoding="utf-8")
    (dest / "alts.json").write_text(json.dumps(words), encoding="utf-8")
    (dest / "anchors.py").write_text(inspect.getsource(slug), encoding="utf-8")
    (dest / "_static").mkdir()
    (dest / "_static" / "custom.css").write_text(CSS, encoding="utf-8")
    shutil.copyfile(mathjax(), dest / "_static" / "tex-svg.js")


def title(path: Path) -> str:
    """The number and the title of a notebook."""
    first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    number = number_and_stem(path)[0]
    return f"{number} · {HEADING.search(first)[1]}" if number else HEADING.search(first)[1]


def mathjax() -> Path:
    """MathJax in one file, from the package sphinx-mathjax-offline."""
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None: raise SystemExit("sphinx-mathjax-offline is missing: pip install -e '.[docs]'")
    return Path(spec.origin).parent / "static" / "mathjax" / "tex-svg.js"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dest", type=Path, default=ROOT / "_site")
    dest = parser.parse_args().dest.resolve()
    os.chdir(ROOT)  # nbdev looks for settings.ini from here
    work = ROOT / "_site_src"
    for folder in (work, dest): shutil.rmtree(folder, ignore_errors=True)
    work.mkdir()
    sources(work)
    code = subprocess.run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-j", "2", "-b", "html", str(work), str(dest)]).returncode
    if code == 0: print(f"{dest / 'index.html'}: {sum(1 for _ in dest.rglob('*.html'))} pages")
    return code


if __name__ == "__main__": sys.exit(main())
