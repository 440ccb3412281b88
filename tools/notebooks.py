#!/usr/bin/env python3
"""Look after the notebooks: clean them, check them, run them again.

tools/notebooks.py clean              strip what changes from run to run and tells a reader nothing
tools/notebooks.py check              exit 1, naming notebook and cell, where one breaks the rules
tools/notebooks.py refresh [PATHS]    run notebooks in place and store their outputs, then clean
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

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
Cell = dict[str, Any]


def notebooks() -> list[Path]:
    """All notebooks in reading order: by number, the index last, since it tells about the others."""
    return sorted(nbglob(as_path=True), key=lambda path: (not path.name[0].isdigit(), path.name))


def number_and_name(path: Path) -> tuple[str, str]:
    """("25", "vae") for 25_vae.ipynb; the number is empty where there is none."""
    match = re.fullmatch(r"(?:(\d+)_)?(.*)", path.stem)
    return match[1] or "", match[2]


def module_name(path: Path) -> str:
    """The module that a notebook may export, below the package: model.vae for nbs/model/25_vae.ipynb."""
    return f"{path.parent.name}.{number_and_name(path)[1]}"


def source(cell: Cell) -> str:
    return "".join(cell["source"])


def directives(cell: Cell) -> list[str]:
    """The texts after `#|` in the lines at the head of a code cell; nbdev reads no further down."""
    texts = []
    for line in source(cell).splitlines() if cell["cell_type"] == "code" else []:
        match = DIRECTIVE.match(line)
        if match:
            texts.append(match[1].strip())
        elif line.strip() and not line.lstrip().startswith("%%"):
            break
    return texts


def alt_texts(output: dict[str, Any]) -> dict[str, str]:
    """The alt text of each picture in an output, empty where it has none: {"image/png": "…"}."""
    metadata = output.get("metadata", {})
    pictures = [kind for kind in PICTURES if kind in output.get("data", {})]
    return {kind: metadata.get(kind, {}).get("alt", "") for kind in pictures}


# ---- clean


def clean_outputs(outputs: list[dict[str, Any]]) -> None:
    """Empty, in place, what a front end or a kernel adds to outputs; alt texts stay.

    Gone are a widget's view, which shows nothing without its kernel, and stderr: warnings, with
    the paths of the machine.
    """
    outputs[:] = [
        output
        for output in outputs
        if WIDGET_VIEW not in output.get("data", {}) and output.get("name") != "stderr"
    ]
    for output in outputs:
        if "metadata" in output:
            texts = alt_texts(output)
            output["metadata"] = {kind: {"alt": text} for kind, text in texts.items() if text}
        if "execution_count" in output:
            output["execution_count"] = None


def clean(paths: list[Path]) -> None:
    """Do what nbdev_clean does, and strip what it leaves: widget state, metadata of outputs."""
    for path in paths:
        # Called with no argument from a script, nbdev's commands read that script's command line.
        nbdev_clean.__wrapped__(str(path))
        nb = json.loads(path.read_text(encoding="utf-8"))
        nb["metadata"].pop("widgets", None)
        for cell in nb["cells"]:
            clean_outputs(cell.get("outputs", []))
        write_nb(nb, path)


# ---- check


def output_faults(cell: Cell) -> Iterator[str]:
    """What is wrong with the stored outputs of one cell."""
    for output in cell.get("outputs", []):
        if WIDGET_VIEW in output.get("data", {}):
            yield "shows a widget, which is dead on a page: run tools/notebooks.py clean"
        if not all(alt_texts(output).values()):
            yield "shows a picture without alt text: make it with new_figure or Image(..., alt=...)"
        if output["output_type"] == "error":
            yield f"shows an error: {output['ename']}: {output['evalue']}"


def cell_faults(cell: Cell) -> Iterator[str]:
    """What is wrong with one cell."""
    if not cell.get("id"):
        yield "has no id: nbdev_export would invent a new one every time"
    if cell["cell_type"] != "code":
        return
    texts = directives(cell)
    if any(re.match(r"eval\s*:\s*false", text, re.IGNORECASE) for text in texts):
        yield "is marked `#| eval: false`, so nothing tests it"
    if len(texts) < sum(bool(DIRECTIVE.match(line)) for line in source(cell).splitlines()):
        yield "has a `#|` line below other lines, where nbdev does not see it"
    yield from output_faults(cell)


def notebook_faults(path: Path, nb: dict[str, Any]) -> Iterator[str]:
    """What is wrong with one notebook."""
    cells = nb["cells"]
    if "widgets" in nb["metadata"]:
        yield "carries widget state: run tools/notebooks.py clean"
    first = cells[0] if cells else {"cell_type": "", "source": ""}
    if first["cell_type"] != "markdown" or not TITLE_CELL.fullmatch(source(first)):
        yield "cell 0 must be `# Title` and `> one-line summary` alone: nbdev drops the rest"
    for i, cell in enumerate(cells):
        for fault in cell_faults(cell):
            yield f"cell {i} (id {cell.get('id')}): {fault}"
    for cell_id, count in Counter(cell.get("id") for cell in cells).items():
        if cell_id and count > 1:
            yield f"{count} cells have the id {cell_id}"
    for module in exported_modules(nb):
        if module != module_name(path):
            yield f"`default_exp {module}` should be {module_name(path)}, as the file is called"


def exported_modules(nb: dict[str, Any]) -> list[str]:
    """The modules that a notebook says it exports to; it should be one or none."""
    texts = [text for cell in nb["cells"] for text in directives(cell)]
    return [text.split()[1] for text in texts if re.match(r"default_exp\s+\S", text)]


def check(paths: list[Path]) -> int:
    """Print every fault; 1 if there are any."""
    faults: list[str] = []
    exporters = defaultdict(list)
    for path in paths:
        nb = json.loads(path.read_text(encoding="utf-8"))
        faults += [f"{path}: {fault}" for fault in notebook_faults(path, nb)]
        for module in exported_modules(nb):
            exporters[module].append(str(path))
        if (path.parent / ".notest").exists():
            faults.append(f"{path}: nbdev_test skips it: there is a {path.parent / '.notest'}")
    for module, names in exporters.items():
        if len(names) > 1:
            faults.append(f"{' and '.join(names)}: both `default_exp {module}`; the last one wins")
    print("\n".join(faults) or f"{len(paths)} notebooks keep the rules")
    return 1 if faults or not paths else 0


# ---- refresh


def run(path: Path, flags: set[str]) -> None:
    """Run one notebook in its own folder and store the outputs.

    Cells that carry a test flag (slow, gpu, ...) that is not in `flags` keep the outputs that they
    have. Raises CellExecutionError, and writes nothing, if a cell fails.
    """
    nb = nbformat.read(path, as_version=4)
    left_out = set(get_config().tst_flags.split()) - flags
    for cell in nb.cells:
        if left_out & {text.split()[0] for text in directives(cell) if text}:
            cell.metadata["tags"] = ["skip-execution"]
    client = NotebookClient(
        nb,
        timeout=None,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    nbformat.write(nb, path)


def runs(path: Path, flags: set[str]) -> bool:
    """Run a notebook, then clean it; whether all its cells passed."""
    print(f"running {path}", flush=True)
    try:
        run(path, flags)
    except CellExecutionError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return False
    clean([path])
    return True


def refresh(paths: list[Path], flags: set[str], workers: int) -> int:
    """Run the notebooks, so many at a time; 1 if any fails."""
    # This checkout's modules, whichever one the environment has installed.
    path_of_modules = [str(ROOT), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path_of_modules))
    # Processes, not threads: each notebook's client has an event loop of its own.
    with ProcessPoolExecutor(workers) as pool:
        jobs = [pool.submit(runs, path, flags) for path in paths]
        return 0 if all([job.result() for job in jobs]) else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("clean", help="strip metadata, counters and widget state")
    commands.add_parser("check", help="exit 1 where a notebook breaks the rules")
    again = commands.add_parser("refresh", help="run notebooks in place, then clean them")
    again.add_argument("paths", nargs="*", type=Path, metavar="PATHS", help="default: all")
    again.add_argument("--flags", default="", help="test flags whose cells run too: 'slow gpu'")
    again.add_argument("--workers", type=int, default=1, help="so many at a time (default: 1)")
    options = parser.parse_args()

    chosen = [path.resolve() for path in getattr(options, "paths", [])]
    os.chdir(ROOT)
    # Short names in messages, and nbdev finds settings.ini from the working directory.
    paths = [Path(os.path.relpath(path, ROOT)) for path in chosen or notebooks()]
    if options.command == "clean":
        clean(paths)
        return 0
    if options.command == "check":
        return check(paths)
    return refresh(paths, set(options.flags.split()), options.workers)


if __name__ == "__main__":
    sys.exit(main())
