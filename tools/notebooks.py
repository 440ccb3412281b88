"""Look after the notebooks: clean them, check them, run them again.

    tools/notebooks.py clean              strip what changes from run to run and says nothing to a reader
    tools/notebooks.py check              exit 1, naming notebook and cell, where one breaks the rules
    tools/notebooks.py refresh [PATHS]    run notebooks in place and store their outputs, then clean
"""
from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Iterator

import nbformat
from execnb.nbio import write_nb
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbglob

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"\s*#\s*\|\s*(.*)")
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
PICTURES = ("image/png", "image/gif")
TITLE_CELL = re.compile(r"# \S.*\n+> \S.*\n?")


def notebooks() -> list[Path]:
    """All notebooks in reading order: by number, the index last, since it tells about the others."""
    return sorted(nbglob(as_path=True), key=lambda path: (not path.name[0].isdigit(), path.name))


def number_and_stem(path: Path) -> tuple[str, str]:
    """("24", "model") for 24_model.ipynb; the number is empty where there is none."""
    return re.fullmatch(r"(?:(\d+)_)?(.*)", path.stem).groups(default="")


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def directives(cell: dict[str, Any]) -> list[str]:
    """What stands behind `#|` in the lines at the head of a code cell; nbdev reads no further down."""
    found = []
    for line in source(cell).splitlines() if cell["cell_type"] == "code" else []:
        match = DIRECTIVE.match(line)
        if match: found.append(match[1].strip())
        elif line.strip() and not line.lstrip().startswith("%%"): break
    return found


def alts(output: dict[str, Any]) -> dict[str, str]:
    """The alt text of each picture in an output, empty where it has none: {"image/png": "A bell; x: z; y: density"}."""
    said = output.get("metadata", {})
    return {kind: said.get(kind, {}).get("alt", "") for kind in PICTURES if kind in output.get("data", {})}


# ---- clean

def clean_outputs(outputs: list[dict[str, Any]]) -> None:
    """Empty what a front end or a kernel adds to outputs, in place; alt texts stay.

    Gone are a widget's view, which shows nothing without its kernel, and stderr: warnings, with the paths of the machine.
    """
    outputs[:] = [output for output in outputs
                  if WIDGET_VIEW not in output.get("data", {}) and output.get("name") != "stderr"]
    for output in outputs:
        if "metadata" in output: output["metadata"] = {kind: {"alt": alt} for kind, alt in alts(output).items() if alt}
        if "execution_count" in output: output["execution_count"] = None


def clean(paths: list[Path]) -> None:
    """nbdev_clean, and what it leaves behind: widget state (random ids in it) and the metadata of outputs."""
    for path in paths:
        # Called with no argument from a script, nbdev's commands read that script's command line.
        nbdev_clean.__wrapped__(str(path))
        nb = json.loads(path.read_text(encoding="utf-8"))
        nb["metadata"].pop("widgets", None)
        for cell in nb["cells"]: clean_outputs(cell.get("outputs", []))
        write_nb(nb, path)


# ---- check

def cell_faults(cell: dict[str, Any]) -> Iterator[str]:
    """What is wrong with one cell."""
    if not cell.get("id"): yield "has no id: nbdev_export would invent a new one every time"
    if cell["cell_type"] != "code": return
    found = directives(cell)
    if any(re.match(r"eval\s*:\s*false", d, re.I) for d in found): yield "is marked `#| eval: false`, so nothing tests it"
    if len(found) < sum(bool(DIRECTIVE.match(line)) for line in source(cell).splitlines()):
        yield "has a `#|` line below other lines, where nbdev doesn't see it"
    for output in cell.get("outputs", []):
        if WIDGET_VIEW in output.get("data", {}): yield "shows a widget, which is dead on a page: run tools/notebooks.py clean"
        if not all(alts(output).values()):
            yield "shows a picture without alt text: make it with new_figure, or display.Image(..., alt=...), and refresh"
        if output["output_type"] == "error": yield f"shows an error: {output['ename']}: {output['evalue']}"


def notebook_faults(path: Path, nb: dict[str, Any]) -> Iterator[str]:
    """What is wrong with one notebook."""
    cells = nb["cells"]
    if "widgets" in nb["metadata"]: yield "carries widget state: run tools/notebooks.py clean"
    if not cells or cells[0]["cell_type"] != "markdown" or not TITLE_CELL.fullmatch(source(cells[0])):
        yield "cell 0: must be `# Title` and `> one-line summary` and nothing else, because nbdev drops the rest"
    for i, cell in enumerate(cells):
        for fault in cell_faults(cell): yield f"cell {i} (id {cell.get('id')}): {fault}"
    for cell_id, count in Counter(cell.get("id") for cell in cells).items():
        if cell_id and count > 1: yield f"{count} cells have the id {cell_id}"
    for module in default_exps(nb):
        if module != number_and_stem(path)[1]: yield f"`default_exp {module}` differs from the file's name without its number"


def default_exps(nb: dict[str, Any]) -> list[str]:
    """The modules that a notebook says it exports to; it should be one or none."""
    return [d.split()[1] for cell in nb["cells"] for d in directives(cell) if re.match(r"default_exp\s+\S", d)]


def check(paths: list[Path]) -> int:
    """Print every fault; 1 if there are any."""
    faults, exporters = [], {}
    for path in paths:
        nb = json.loads(path.read_text(encoding="utf-8"))
        faults += [f"{path}: {fault}" for fault in notebook_faults(path, nb)]
        for module in default_exps(nb): exporters.setdefault(module, []).append(str(path))
        if (path.parent / ".notest").exists(): faults.append(f"{path}: nbdev_test skips it because of {path.parent / '.notest'}")
    for module, names in exporters.items():
        if len(names) > 1: faults.append(f"{' and '.join(names)}: both `default_exp {module}`; the last one would win silently")
    print("\n".join(faults) or f"{len(paths)} notebooks keep the rules")
    return 1 if faults or not paths else 0


# ---- refresh

def run(path: Path, flags: set[str]) -> None:
    """Run one notebook in its own folder and store the outputs; raises CellExecutionError and writes nothing if a cell fails.

    Cells that carry a test flag (slow, gpu, ...) not in `flags` keep the outputs that they have.
    """
    nb = nbformat.read(path, as_version=4)
    left_out = set(get_config().tst_flags.split()) - flags
    for cell in nb.cells:
        if left_out & {d.split()[0] for d in directives(cell) if d}: cell.metadata["tags"] = ["skip-execution"]
    client = NotebookClient(nb, timeout=None, kernel_name="python3", coalesce_streams=True,
                            resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    nbformat.write(nb, path)


def refresh(paths: list[Path], flags: set[str]) -> int:
    """Run the notebooks one after the other; 1 at the first that fails."""
    # This checkout's modules, whichever one the environment has installed.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for path in paths:
        print(f"running {path}", flush=True)
        try: run(path, flags)
        except CellExecutionError as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 1
        clean([path])
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("clean", help="strip metadata, counters and widget state")
    commands.add_parser("check", help="exit 1 where a notebook breaks the rules")
    again = commands.add_parser("refresh", help="run notebooks in place, then clean them")
    again.add_argument("paths", nargs="*", type=Path, metavar="PATHS", help="notebooks (default: all)")
    again.add_argument("--flags", default="", help="test flags whose cells run too, such as 'slow gpu'")
    options = parser.parse_args()

    given = [path.resolve() for path in getattr(options, "paths", [])]
    os.chdir(ROOT)
    # Short names in messages, and nbdev finds settings.ini from the working directory.
    paths = [Path(os.path.relpath(path, ROOT)) for path in given or notebooks()]
    if options.command == "clean": clean(paths)
    if options.command == "check": return check(paths)
    if options.command == "refresh": return refresh(paths, set(options.flags.split()))
    return 0


if __name__ == "__main__": sys.exit(main())
