#!/usr/bin/env python3
"""Build the site in _site/ from the notebooks and their stored outputs.

    python tools/site.py [--dest FOLDER]

Nothing is run and nothing is fetched: pages, API pages, search, mathematics and pictures are whole
without a network. Needs the extra "docs" (pip install -e '.[docs]'). nbdev's own way needs quarto.
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from execnb.nbio import nb2str, read_nb
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, hide_line, strip_ansi
from notebooks import Cell, alt_texts, directives, module_name, notebooks, number_and_name
from readme import LINK, tag

ROOT = Path(__file__).resolve().parent.parent
THEME = ROOT / "tools" / "site_theme"
# The folders of the notebooks, in reading order, and what the navigation calls them.
FOLDERS = {
    "derivation": "Derivation",
    "base": "Library: base",
    "model": "Library: model",
    "data": "Library: data",
    "evaluation": "Library: evaluation",
    "training": "Library: training",
    "explore": "Library: explore",
    "app": "Library: applications",
    "quality": "Quality",
    "worked": "Worked examples",
}
HEADING = re.compile(r"(?m)^#{1,4} +(.+?)\s*$")
EXPORT = re.compile(r"export\b")
markdown_cell = nbformat.v4.new_markdown_cell


def slug(title: str) -> str:
    """The anchor of a heading, as Jupyter makes it: one link serves JupyterLab, GitHub and the site.

    Sphinx calls this function, too.
    """
    return title.strip().replace(" ", "-")


@dataclass
class ApiEntry:
    """A public name: its signature, its docstring, where it is derived and where it is used."""

    name: str
    signature: str
    doc: str
    line: int  # in the module
    anchor: str = ""  # of the heading above its cell
    methods: list[ApiEntry] = field(default_factory=list)
    used_in: list[Page] = field(default_factory=list)  # worked notebooks


@dataclass
class Page:
    """A notebook, and the public names of the module that it exports."""

    path: Path
    stem: str  # model/25_vae: the path below nbs, without ending
    api: list[ApiEntry] = field(default_factory=list)

    @property
    def cells(self) -> list[Cell]:
        return json.loads(self.path.read_text(encoding="utf-8"))["cells"]

    @property
    def module(self) -> str:
        """model.vae for model/25_vae."""
        return module_name(self.path)

    @property
    def title(self) -> str:
        """The number and the title of the notebook."""
        heading = HEADING.search("".join(self.cells[0]["source"]))[1]
        number = number_and_name(self.path)[0]
        return f"{number} · {heading}" if number else heading

    @property
    def top(self) -> str:
        """The relative path from this page to the site's root."""
        return "".join(["../"] * self.stem.count("/"))


# ---- the public names


def signature(node: ast.AST) -> str:
    """A function's or class's call, with hints and defaults, as it is written."""
    if isinstance(node, ast.ClassDef):
        for inner in node.body:
            if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
                return re.sub(r"^\((self, |self)", "(", signature(inner)).removesuffix(" -> None")
        fields = [ast.unparse(inner) for inner in node.body if isinstance(inner, ast.AnnAssign)]
        return f"({', '.join(fields)})" if fields else ""
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"({ast.unparse(node.args)}){returns}"
    return ""


def assigned_name(node: ast.Assign | ast.AnnAssign) -> str:
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    return ast.unparse(target)


def api_entry(node: ast.stmt) -> ApiEntry:
    """The entry of a definition or an assignment."""
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        return ApiEntry(assigned_name(node), "", f"= {ast.unparse(node.value)}", node.lineno)
    entry = ApiEntry(node.name, signature(node), ast.get_docstring(node) or "", node.lineno)
    for inner in node.body if isinstance(node, ast.ClassDef) else []:
        is_public = isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_")
        if is_public and ast.get_docstring(inner):
            entry.methods.append(api_entry(inner))
    return entry


def public_names(source: Path) -> list[ApiEntry]:
    """The public names of a module, in their order."""
    entries = []
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        is_definition = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        if is_definition or (isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value):
            entry = api_entry(node)
            if entry.name.isidentifier() and not entry.name.startswith("_"):
                entries.append(entry)
    return entries


def defined_names(source: str) -> list[str]:
    """Names that a cell defines at its top level."""
    lines = [x for x in source.splitlines() if not x.lstrip().startswith(("#|", "%", "!"))]
    names = []
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            names.append(assigned_name(node))
    return names


def exported_cells(cells: list[Cell]) -> Iterator[tuple[int, list[str]]]:
    """The exported cells' places, and the names that each defines."""
    for i, cell in enumerate(cells):
        if any(EXPORT.match(text) for text in directives(cell)):
            yield i, defined_names("".join(cell["source"]))


def anchors(cells: list[Cell]) -> dict[str, str]:
    """For each name that exported cells define, the anchor of the heading above."""
    exported = dict(exported_cells(cells))
    result, above = {}, ""
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "markdown":
            for heading in HEADING.findall("".join(cell["source"])):
                above = slug(heading)
        for name in exported.get(i, []):
            result[name] = above
    return result


def read_pages() -> list[Page]:
    """Every notebook in reading order, with the public names of its module."""
    config = get_config()
    pages = []
    for path in notebooks():
        stem = path.resolve().relative_to(config.nbs_path).with_suffix("").as_posix()
        page = Page(path, stem)
        source = ROOT / config.lib_name / f"{page.module.replace('.', '/')}.py"
        if source.exists():
            page.api = public_names(source)
            where = anchors(page.cells)
            for entry in page.api:
                entry.anchor = where.get(entry.name, "")
        pages.append(page)
    note_uses(pages)
    return pages


def note_uses(pages: list[Page]) -> None:
    """Note for each public name the worked notebooks whose code contains it."""
    entries = {entry.name: entry for page in pages for entry in page.api}
    for page in pages:
        if page.path.parent.name == "worked":
            code = ["".join(c["source"]) for c in page.cells if c["cell_type"] == "code"]
            for name in sorted(set(re.findall(r"\b\w+\b", "\n".join(code))) & entries.keys()):
                entries[name].used_in.append(page)


# ---- what Sphinx reads


def link_to_repository(markdown: str, stem: str, repository: str) -> str:
    """Links that leave the notebooks' folder become links to the repository."""

    def replaced(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("nbs", posixpath.dirname(stem), match[2]))
        if target.startswith("nbs/"):
            return match[0]
        return f"{match[1]}{repository}/{target}"

    return LINK.sub(replaced, markdown)


def page_links(page: Page) -> str:
    """The line of links below a page's title."""
    config = get_config()
    path = f"{config.user}/{config.repo}/blob/{config.branch}/{config.nbs_path.name}"
    links = {
        "download the notebook": f'"{page.top}notebooks/{page.stem}.ipynb" download',
        "open in Colab": f'"https://colab.research.google.com/github/{path}/{page.stem}.ipynb"',
        "on GitHub": f'"https://github.com/{path}/{page.stem}.ipynb"',
        "in JupyterLab": f'"{page.top}index.html#Reading-in-JupyterLab"',
    }
    if page.api:
        links["API"] = f'"{page.top}api/{page.module}.html"'
    bar = " · ".join(f"<a href={target}>{text}</a>" for text, target in links.items())
    return f'<p class="page-links">{bar}</p>'


def api_links(page: Page, names: list[str]) -> str:
    """The line of links below an exported cell."""
    target = f"{page.top}api/{page.module}.html"
    links = " · ".join(f'<a href="{target}#{name}">{name}</a>' for name in names)
    return f'<p class="exports">API: {links}</p>'


def as_page(page: Page, repository: str) -> nbformat.NotebookNode:
    """A notebook without directives, with links below its title and its exported cells."""
    nb = read_nb(page.path)
    public = {entry.name for entry in page.api}
    exports = {
        nb.cells[i].id: [name for name in names if name in public]
        for i, names in exported_cells(nb.cells)
    }
    folded = {c.id for c in nb.cells if any(d.startswith("code-fold") for d in directives(c))}
    NBProcessor(nb=nb, procs=[strip_ansi, hide_line, clean_magics, tag], process=True)
    nb = nbformat.reads(nb2str(nb), as_version=4)
    cells = []
    for cell in nb.cells:
        if not cell.source.strip():
            continue
        cells.append(cell)
        if cell.cell_type == "markdown":
            cell.source = link_to_repository(cell.source, page.stem, repository)
            continue
        # MyST-NB's names for the tags that nbconvert knows.
        tags = cell.metadata.get("tags", [])
        tags = [t.replace("_all_outputs", "-output").replace("_", "-") for t in tags]
        cell.metadata = {"tags": [*tags, "hide-input"] if cell.id in folded else tags}
        if exports.get(cell.id):
            cells.append(markdown_cell(api_links(page, exports[cell.id])))
    cells.insert(1, markdown_cell(page_links(page)))
    nb.cells = cells
    nb.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    return nb


def alt_texts_by_hash(nb: nbformat.NotebookNode) -> dict[str, str]:
    """The alt text of each picture in a notebook, by the SHA-256 of the picture's bytes."""
    result = {}
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            for kind, alt in alt_texts(output).items():
                if alt:
                    picture = base64.b64decode(output.data[kind])
                    result[hashlib.sha256(picture).hexdigest()] = alt
    return result


def escaped(text: str) -> str:
    """A docstring as HTML in Markdown; what stands between backticks is code."""
    for sign, entity in {"&": "&amp;", "<": "&lt;", ">": "&gt;"}.items():
        text = text.replace(sign, entity)
    text = text.replace("\n\n", "\n&nbsp;\n")
    for sign in "*_$":
        text = text.replace(sign, f"&#{ord(sign)};")
    return re.sub("`([^`]+)`", r"<code>\1</code>", text).replace("`", "&#96;")


def api_section(page: Page, entry: ApiEntry, repository: str) -> list[str]:
    """The lines of one public name on its module's API page."""
    lines = [f'<span id="{entry.name}"></span>', "", f"## `{entry.name}`", ""]
    for item, name in [(entry, entry.name)] + [
        (m, f"{entry.name}.{m.name}") for m in entry.methods
    ]:
        lines += ["```python", f"{name}{item.signature}", "```", ""]
        if item.doc:
            lines += [f'<div class="doc">{escaped(item.doc)}</div>', ""]
    anchor = f"#{entry.anchor}" if entry.anchor else ""
    source = f"{repository}/vae_nb/{page.module.replace('.', '/')}.py#L{entry.line}"
    links = [f"[where it is derived or made](../{page.stem}.ipynb{anchor})", f"[source]({source})"]
    if entry.used_in:
        uses = ", ".join(f"[{other.title}](../{other.stem}.ipynb)" for other in entry.used_in[:6])
        links.append(f"at work in {uses}")
    return [*lines, " · ".join(links), ""]


def api_page(page: Page, repository: str) -> str:
    """The Markdown of a module's API page."""
    lines = [f"# vae_nb.{page.module}", "", f"From [{page.title}](../{page.stem}.ipynb).", ""]
    for entry in page.api:
        lines += api_section(page, entry, repository)
    return "\n".join(lines)


def navigation(pages: list[Page]) -> list[nbformat.NotebookNode]:
    """Hidden tables of contents, for the index: the folders, then the API."""

    def table(caption: str, entries: list[str]) -> nbformat.NotebookNode:
        head = f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n"
        return markdown_cell(head + "\n".join(entries) + "\n```")

    tables = []
    for folder, caption in FOLDERS.items():
        inside = [page for page in pages if page.path.parent.name == folder]
        tables.append(table(caption, [f"{page.title} <{page.stem}>" for page in inside]))
    return [*tables, table("API", [f"api/{page.module}" for page in pages if page.api])]


def write_sources(folder: Path) -> None:
    """Write what Sphinx reads."""
    config = get_config()
    repository = f"{config.git_url}/blob/{config.branch}"
    pages, words = read_pages(), {}
    for page in pages:
        nb = as_page(page, repository)
        if page.stem == "index":
            nb.cells += navigation(pages)
        words |= alt_texts_by_hash(nb)
        for path in (folder / page.stem, folder / "_extra" / "notebooks" / page.stem):
            path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, folder / f"{page.stem}.ipynb")
        shutil.copyfile(page.path, folder / "_extra" / "notebooks" / f"{page.stem}.ipynb")
        if page.api:
            (folder / "api").mkdir(exist_ok=True)
            text = api_page(page, repository)
            (folder / "api" / f"{page.module}.md").write_text(text, encoding="utf-8")
    site = {"repository": config.git_url, "alt_texts": words}
    (folder / "site.json").write_text(json.dumps(site), encoding="utf-8")
    (folder / "anchors.py").write_text(inspect.getsource(slug), encoding="utf-8")
    shutil.copyfile(THEME / "conf.py", folder / "conf.py")
    (folder / "_static").mkdir()
    shutil.copyfile(THEME / "custom.css", folder / "_static" / "custom.css")
    shutil.copyfile(mathjax(), folder / "_static" / "tex-svg.js")


def mathjax() -> Path:
    """MathJax in one file, from the package sphinx-mathjax-offline."""
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None:
        raise SystemExit("sphinx-mathjax-offline is missing: pip install -e '.[docs]'")
    return Path(spec.origin).parent / "static" / "mathjax" / "tex-svg.js"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dest", type=Path, default=ROOT / "_site")
    dest = parser.parse_args().dest.resolve()
    os.chdir(ROOT)  # nbdev looks for settings.ini from here
    work = ROOT / "_site_src"
    for folder in (work, dest):
        shutil.rmtree(folder, ignore_errors=True)
    work.mkdir()
    write_sources(work)
    sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-j", "2", "-b", "html"]
    code = subprocess.run([*sphinx, str(work), str(dest)]).returncode
    if code == 0:
        print(f"{dest / 'index.html'}: {sum(1 for _ in dest.rglob('*.html'))} pages")
    return code


if __name__ == "__main__":
    sys.exit(main())
