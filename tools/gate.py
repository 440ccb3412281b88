#!/usr/bin/env python3
"""The gate: everything that must hold before a change is accepted, tried in a fresh copy of what is committed.

    tools/gate.py                        all checks, in a temporary folder and a new virtual environment
    tools/gate.py --only sync,readme     some of them: tests main notebooks sync readme package requirements browser
    tools/gate.py --also shipped         all of them, and one that takes as long as the tests once more
    tools/gate.py --keep FOLDER          work in FOLDER, leave it there, and use its environment again the next time
    tools/gate.py --python PATH          with this interpreter for `python3`

The two commands under test are read from README.md: of its ```bash blocks, the one that contains `nbdev_test` and
the one that contains `vae_nb train`, each a single line. Every notebook counts as one test, every other check as one.
Needs Python 3.10 or later, git and bash, and no packages.
"""
from __future__ import annotations

import argparse
import ast
import configparser
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vae_nb"
# Where a distribution is not called what is imported from it.
DISTRIBUTION = {"sklearn": "scikit-learn", "PIL": "pillow"}
# Run in the environment where the wheel is installed, outside the checkout.
IMPORT_LIGHT = f"""
import sys, {PACKAGE}
assert {PACKAGE}.__file__.startswith(sys.prefix), f'imported from {{{PACKAGE}.__file__}}, not from the wheel in {{sys.prefix}}'
heavy = {{'torch', 'matplotlib', 'sklearn', 'ipywidgets'}} & set(sys.modules)
assert not heavy, f'`import {PACKAGE}` alone loads {{heavy}}'
"""
IMPORT_ALL = f"""
import importlib, pkgutil, sys, {PACKAGE}
names = sorted(m.name for m in pkgutil.iter_modules({PACKAGE}.__path__))
assert names, 'the wheel holds no module'
for name in names: assert importlib.import_module('{PACKAGE}.' + name).__file__.startswith(sys.prefix), name
print('imported', *names)
"""
LAY_DOWN = f"import {PACKAGE}.widgets, sys; {PACKAGE}.widgets.copy_notebooks(sys.argv[1])"
# Arguments: a notebook, and the flags of cells to leave out. The first cell sees to it that the kernel has the wheel, too.
RUN_NOTEBOOK = f"""
import re, sys, nbformat
from nbclient import NotebookClient
path, flags = sys.argv[1], '|'.join(sys.argv[2:])
nb = nbformat.read(path, as_version=4)
for cell in nb.cells:
    if cell.cell_type == 'code' and re.match(rf'(\\s*#\\|.*\\n)*?\\s*#\\|\\s*({{flags}})\\b', cell.source): cell.metadata['tags'] = ['skip-execution']
nb.cells.insert(0, nbformat.v4.new_code_cell('import sys, {PACKAGE}; assert {PACKAGE}.__file__.startswith(sys.prefix), {PACKAGE}.__file__'))
NotebookClient(nb, timeout=900, kernel_name='python3', resources={{'metadata': {{'path': path.rpartition('/')[0]}}}}).execute()
"""
# Nobody listens there: what asks another machine fails at once.
NO_NETWORK = {name: "http://127.0.0.1:9" for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")} | {"NO_PROXY": "127.0.0.1,localhost"}
BROWSER_NOTEBOOK = "nbs/library/37_browser.ipynb"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


class Failed(Exception):
    """A check did not hold; the message says why."""


class Gate:
    """The folder that the checks work in, and how they run commands there."""

    def __init__(self, folder: Path, python: str | None) -> None:
        self.folder = folder.resolve()
        self.clone = self.folder / "checkout"
        self.env = clean_environment()
        if python: self.put_first(python)

    def put_first(self, python: str) -> None:
        """Make `python3` mean this interpreter. A script, not a link: through a link Python may not find its library."""
        bin_ = self.folder / "bin"
        bin_.mkdir(exist_ok=True)
        (bin_ / "python3").write_text(f'#!/bin/sh\nexec {shlex.quote(os.path.abspath(python))} "$@"\n')
        (bin_ / "python3").chmod(0o755)
        self.env["PATH"] = f"{bin_}{os.pathsep}{self.env['PATH']}"

    def run(self, *command: str | Path, cwd: Path | None = None, quiet: bool = False) -> None:
        """Print a command and run it in the clone; raises Failed where it doesn't end with 0. If quiet, only then show its output."""
        words = [str(word) for word in command]
        shown = shlex.join(word if "\n" not in word else "..." for word in words)
        print("$ " + shown)
        done = subprocess.run(words, cwd=cwd or self.clone, env=self.env, stdin=subprocess.DEVNULL, text=True, errors="replace",
                              stdout=subprocess.PIPE if quiet else None, stderr=subprocess.STDOUT if quiet else None)
        if done.returncode: raise Failed(f"exit code {done.returncode} from {shown}" + (f"\n{done.stdout}" if quiet else ""))

    def run_within(self, seconds: float, *command: str | Path, **environment: str) -> None:
        """Run a command in the clone; raises Failed where it doesn't end with 0, or in time. Then all that it started is ended."""
        words = [str(word) for word in command]
        print("$ " + shlex.join(words))
        job = subprocess.Popen(words, cwd=self.clone, env={**self.env, **environment}, stdin=subprocess.DEVNULL, start_new_session=True)
        try: code = job.wait(seconds)
        except BaseException as error:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
            if not isinstance(error, subprocess.TimeoutExpired): raise
            raise Failed(f"it took more than {seconds:.0f} s: {shlex.join(words)}") from None
        if code: raise Failed(f"exit code {code} from {shlex.join(words)}")

    def install(self, *what: str) -> None:
        """Install into the environment that README's commands made, or make it."""
        if not (self.clone / ".venv").exists(): self.run("python3", "-m", "venv", ".venv")
        self.run(".venv/bin/pip", "install", "--quiet", *what)

    def tool(self, name: str) -> Path:
        """A command of the environment that README's commands made."""
        path = self.clone / ".venv" / "bin" / name
        if not path.exists(): raise Failed(f"there is no .venv/bin/{name}: the check `tests` makes it")
        return path

    def output(self, *command: str | Path) -> str:
        """What a command prints in the clone; raises CalledProcessError where it fails."""
        return subprocess.run(command, cwd=self.clone, env=self.env, check=True, stdout=subprocess.PIPE, text=True).stdout

    def git(self, *words: str) -> str:
        return self.output("git", *words)

    def fetch(self) -> None:
        """Bring the clone to the checkout's last commit, whether the clone is new or not."""
        self.clone.mkdir(parents=True, exist_ok=True)
        self.git("init", "--quiet")
        # A depth of 1 also works where the checkout is itself shallow, as it is on build machines.
        self.git("fetch", "--quiet", "--depth", "1", ROOT.as_uri(), "HEAD")
        self.git("checkout", "--quiet", "--force", "FETCH_HEAD")
        self.restore()

    def restore(self) -> None:
        """Undo what a check did to the clone, so that one failure doesn't cause the next."""
        self.git("reset", "--quiet", "--hard")
        # An older pip's editable install lives in the egg-info folder.
        self.git("clean", "-ffdxq", "--exclude", ".venv", "--exclude", "*.egg-info")

    def must_be_unchanged(self, after: str) -> None:
        """Nothing in the clone may differ from the commit; new files count."""
        if changed := self.git("status", "--porcelain"):
            print(self.git("--no-pager", "diff", "--stat"))
            raise Failed(f"{after} changes what is committed:\n{changed.rstrip()}")

    def run_timed(self, command: str) -> tuple[int, list[str], float | None]:
        """Run a shell line; its exit code, its output, and the seconds since the part of it that names nbdev_test began."""
        print("$ " + command)
        # -x: bash says which part of the line it begins, so that the tests' own time can be told from the installation's.
        job = subprocess.Popen(["bash", "-xc", command], cwd=self.clone, env=self.env, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        lines, began = [], None
        for line in job.stdout:
            print(line, end="")
            lines.append(line.rstrip("\n"))
            if line.startswith("+ ") and "nbdev_test" in line: began = time.monotonic()
        return job.wait(), lines, began and time.monotonic() - began


def clean_environment() -> dict[str, str]:
    """The caller's environment, less what would point Python or git somewhere else, and less nbdev's own switch."""
    dropped = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "IN_TEST", "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"}
    return {name: value for name, value in os.environ.items() if name not in dropped}


def readme_command(readme: Path, mark: str) -> str:
    """The one line in the one ```bash block of README.md that contains `mark`."""
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    blocks = [block.strip() for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S) if mark in block]
    if len(blocks) != 1: raise Failed(f"README.md must have one ```bash block with `{mark}`, and has {len(blocks)}")
    if "\n" in blocks[0]: raise Failed(f"README.md: the block with `{mark}` must be a single line:\n{blocks[0]}")
    return blocks[0]


def notebook_results(lines: list[str]) -> tuple[list[str], list[str]]:
    """The notebooks that nbdev_test says it timed (which it does when all pass), and those it lists, behind tabs, as failed."""
    timed = [line for line in lines if re.fullmatch(r"\S+\.ipynb: \d+ secs", line)]
    heading = [i for i, line in enumerate(lines) if line.startswith("nbdev Tests Failed On The Following Notebooks:")]
    failed = [line.strip() for line in lines[heading[-1]:] if line.startswith("\t")] if heading else []
    return timed, failed


# ---- the checks, in their order

def tests(gate: Gate) -> tuple[int, int]:
    """README's test command; every notebook counts as one test."""
    command = readme_command(gate.clone / "README.md", "nbdev_test")
    code, lines, seconds = gate.run_timed(command)
    if seconds is not None: print(f"nbdev_test took {seconds:.0f} s")
    timed, failed = notebook_results(lines)
    for name in failed: print(f"FAILED {name}")
    if code and not failed: raise Failed(f"the test command ended with {code}")
    # Counted by nbdev itself. A command that leaves notebooks out, or finds none, would end with 0 as well.
    total = int(gate.output(gate.tool("python"), "-c", "from nbdev.doclinks import nbglob; print(len(nbglob()))"))
    if not total: raise Failed("there are no notebooks")
    if not failed and len(timed) != total: raise Failed(f"of {total} notebooks, nbdev_test --timing lists {len(timed)}")
    return total - len(failed), len(failed)


def main_job(gate: Gate) -> None:
    """README's main command; it must leave a report."""
    gate.run("bash", "-c", readme_command(gate.clone / "README.md", f"{PACKAGE} train"))
    folders = [path for path in gate.clone.glob("runs/*") if path.is_dir()]
    if not folders: raise Failed("it left no folder in runs/")
    report = max(folders, key=lambda path: path.stat().st_mtime) / "report.json"
    if not report.exists(): raise Failed(f"{report.relative_to(gate.clone)} is missing")
    print(json.dumps(json.loads(report.read_text())))


def notebooks(gate: Gate) -> None:
    """The notebooks keep the rules, and cleaning them changes nothing."""
    gate.run(gate.tool("python"), "tools/notebooks.py", "check")
    gate.run(gate.tool("python"), "tools/notebooks.py", "clean")
    gate.must_be_unchanged("tools/notebooks.py clean")


def sync(gate: Gate) -> None:
    """The modules are what the notebooks export: no other, none missing, none left over."""
    for path in (gate.clone / PACKAGE).glob("*.py"):
        if path.name == "_modidx.py" or "# AUTOGENERATED! DO NOT EDIT!" in path.read_text(encoding="utf-8"): path.unlink()
    gate.run(gate.tool("nbdev_export"))
    gate.must_be_unchanged("nbdev_export")


def readme(gate: Gate) -> None:
    """README.md and its pictures are what nbs/index.ipynb says."""
    gate.run(gate.tool("python"), "tools/readme.py")
    gate.must_be_unchanged("tools/readme.py")


@contextmanager
def installed_wheel(gate: Gate) -> Iterator[tuple[Path, Path]]:
    """A folder outside the checkout, and in it an environment with the wheel, which is built from the source archive."""
    with tempfile.TemporaryDirectory(dir=gate.folder) as folder:
        outside = Path(folder)
        # A copy: an egg-info folder from the editable install lists files that a stranger's build would not find.
        gate.run("git", "checkout-index", "--all", f"--prefix={outside}/source/")
        gate.run(gate.tool("python"), "-m", "build", "--outdir", outside, outside / "source", quiet=True)
        (wheel,) = outside.glob("*.whl")
        if f"{PACKAGE}/py.typed" not in zipfile.ZipFile(wheel).namelist(): raise Failed(f"{wheel.name} has no {PACKAGE}/py.typed")
        shutil.rmtree(outside / "source")

        other = outside / "other"
        gate.run(gate.tool("python"), "-m", "venv", other)
        gate.run(other / "bin" / "pip", "install", "--quiet", "--no-deps", wheel)
        # Borrow the first environment's packages rather than install them again. Its own .pth files, such as that of
        # the editable install, are not read this way, and the scripts below see to it that the wheel is what is imported.
        (borrowed,) = (gate.clone / ".venv").glob("lib/python*/site-packages")
        (own,) = other.glob("lib/python*/site-packages")
        (own / "borrowed.pth").write_text(f"{borrowed}\n")
        for part in ("share", "etc"):  # JupyterLab, Voila and their extensions look for their files there
            if not (other / part).exists(): (other / part).symlink_to(gate.clone / ".venv" / part)
        yield outside, other


def run_shipped(gate: Gate, outside: Path, other: Path, chosen: Callable[[Path], bool]) -> tuple[int, int]:
    """Lay the wheel's notebooks down and run the chosen ones top to bottom, without a network, two at a time; how many pass and fail."""
    python, laid = other / "bin" / "python", outside / "laid"
    gate.run(python, "-c", LAY_DOWN, laid, cwd=outside)
    paths = sorted(path for path in laid.rglob("*.ipynb") if chosen(path))
    if not paths: raise Failed("the wheel lays down no such notebooks")
    environment = {**gate.env, **NO_NETWORK, "OMP_NUM_THREADS": "1", "VAE_NB_CACHE": str(outside / "no-data")}
    flags = settings(gate)["tst_flags"].split()

    def run(path: Path) -> str:
        began = time.monotonic()
        done = subprocess.run([python, "-c", RUN_NOTEBOOK, path, *flags], cwd=outside, env=environment, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        name = path.relative_to(laid)
        print(f"{name}: {time.monotonic() - began:.0f} s" if not done.returncode else f"FAILED {name}\n{done.stdout[-3000:]}")
        return name if done.returncode else ""

    with ThreadPoolExecutor(2) as pool: failed = [name for name in pool.map(run, paths) if name]
    return len(paths) - len(failed), len(failed)


def package(gate: Gate) -> None:
    """The wheel works in another environment and outside the checkout, and so do notebooks that it holds."""
    with installed_wheel(gate) as (outside, other):
        for script in (IMPORT_LIGHT, IMPORT_ALL): gate.run(other / "bin" / "python", "-c", script, cwd=outside)
        gate.run(other / "bin" / PACKAGE, "--help", cwd=outside)
        if run_shipped(gate, outside, other, lambda path: path.stem in {"index", "05_gap"}) != (2, 0): raise Failed("see above")


def shipped(gate: Gate) -> tuple[int, int]:
    """Every notebook that the wheel holds runs from it, without a network; each counts as one test. Not among the usual checks."""
    gate.install("-e", ".[dev]")
    with installed_wheel(gate) as (outside, other): return run_shipped(gate, outside, other, lambda path: True)


def browser(gate: Gate) -> None:
    """In Chromium: every widget in JupyterLab; `vae_nb lab` and `vae_nb explore` of the wheel; every page of the site."""
    chromium = find_chromium(gate.env)
    if not chromium:
        print("no Chromium here: not run")
        return
    if not (gate.clone / BROWSER_NOTEBOOK).exists(): raise Failed(f"{BROWSER_NOTEBOOK} is missing")
    gate.install("-e", ".[dev,docs]", "playwright")
    with installed_wheel(gate) as (_, other):
        gate.run_within(1200, gate.tool("nbdev_test"), "--flags", "browser", "--path", BROWSER_NOTEBOOK, OMP_NUM_THREADS="1",
                        VAE_NB_COMMAND=str(other / "bin" / PACKAGE), CHROMIUM=chromium)


def find_chromium(environment: dict[str, str]) -> str | None:
    """The program that the variable CHROMIUM names, one on the path, or the newest that `playwright install chromium` left."""
    found = [environment.get("CHROMIUM"), *(shutil.which(name, path=environment.get("PATH")) for name in CHROMIUM)]
    kept = Path(environment.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache" / "ms-playwright")
    newest = sorted(kept.glob("chromium-*/chrome-linux*/chrome"), key=lambda path: path.stat().st_mtime, reverse=True)
    return next(filter(None, [*found, *map(str, newest)]), None)


def requirements(gate: Gate) -> None:
    """What the modules import is what settings.ini requires: what only developers have must not leak in."""
    declared = {distribution(re.split(r"[<>=!~;\[]", word)[0]) for word in settings(gate)["requirements"].split()}
    allowed = declared | set(sys.stdlib_module_names) | {PACKAGE}
    modules = sorted((gate.clone / PACKAGE).glob("*.py"))
    strangers = [f"{path.name} imports {name}" for path in modules for name in imported(path)
                 if name not in allowed and distribution(name) not in allowed]
    if strangers: raise Failed("not among the requirements in settings.ini: " + ", ".join(strangers))
    if not modules: raise Failed(f"{PACKAGE}/ has no modules")
    print(f"{len(modules)} modules import only the standard library and {', '.join(sorted(declared))}")


def settings(gate: Gate) -> configparser.SectionProxy:
    """What the clone's settings.ini says."""
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(gate.clone / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


def distribution(name: str) -> str:
    """The name, in one spelling, of the distribution that a name in an import or a requirement means."""
    return DISTRIBUTION.get(name, name).lower().replace("_", "-")


def imported(path: Path) -> set[str]:
    """The top-level packages that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level: names.add(node.module.split(".")[0])
    return names


CHECKS: dict[str, Callable[[Gate], tuple[int, int] | None]] = {
    "tests": tests, "main": main_job, "notebooks": notebooks, "sync": sync, "readme": readme, "package": package,
    "requirements": requirements, "shipped": shipped, "browser": browser,
}
USUAL = [name for name in CHECKS if name != "shipped"]


def run_check(gate: Gate, name: str) -> tuple[int, int]:
    """How many passed and how many failed; whatever goes wrong is one failure, and the next check goes on."""
    print(f"\n==== {name}: {CHECKS[name].__doc__.splitlines()[0]}")
    try: passed, failed = CHECKS[name](gate) or (1, 0)
    except Exception as error:
        print(f"FAILED {name}: {error}" if isinstance(error, Failed) else f"FAILED {name}: {type(error).__name__}: {error}")
        passed, failed = 0, 1
    else: print(f"ok {name}" if not failed else f"FAILED {name}: {failed} of {passed + failed}")
    gate.restore()
    return passed, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME[,NAME]", default=",".join(USUAL), help="run just these checks")
    parser.add_argument("--also", metavar="NAME", action="append", choices=CHECKS, default=[], help="and this one: shipped")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="work in FOLDER and leave it there")
    parser.add_argument("--python", metavar="PATH", help="the interpreter to use as python3")
    options = parser.parse_args()
    names = options.only.split(",") + options.also
    sys.stdout.reconfigure(line_buffering=True)  # so that our lines and the commands' stay in order in a log
    if unknown := set(names) - set(CHECKS): parser.error(f"unknown checks {', '.join(unknown)}; there are {', '.join(CHECKS)}")

    if subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, env=clean_environment(), capture_output=True).stdout:
        print("NOTE: the working tree has changes that are not committed. What is committed is tested, not they.")
    if options.keep: options.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{PACKAGE}-gate-") as temporary:
        gate = Gate(options.keep or Path(temporary), options.python)
        gate.fetch()
        counts = [run_check(gate, name) for name in CHECKS if name in names]
    passed, failed = (sum(column) for column in zip(*counts))
    print(f"\n{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__": sys.exit(main())
