#!/usr/bin/env python3
"""Try everything that must hold before a change is accepted, in a fresh copy of what is committed.

    tools/gate.py                        all usual checks, in a temporary folder and a new environment
    tools/gate.py --only lint,types      some of them; what they need is installed
    tools/gate.py --also shipped         the usual ones, and one that takes as long as the tests again
    tools/gate.py --keep FOLDER          work in FOLDER, leave it there, use its environment next time
    tools/gate.py --python PATH          with this interpreter for `python3`

The two commands under test are read from README.md: of its ```bash blocks, the one that contains
`nbdev_test` and the one that contains `vae_nb train`, each a single line. Every notebook counts as
one test, every other check as one. Needs Python 3.10 or later, git and bash, and no packages.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vae_nb"
BROWSER_NOTEBOOK = "nbs/quality/62_browser.ipynb"
BROWSER_LIMIT = 1200  # seconds
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# Nobody listens there: a request to another machine fails at once.
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
NO_NETWORK = dict.fromkeys(PROXIES, "http://127.0.0.1:9") | {"NO_PROXY": "127.0.0.1,localhost"}

# The following programs run in the environment of the wheel, outside the checkout.
IMPORT_ALL = f"""
import importlib, pkgutil, sys, {PACKAGE}
assert {PACKAGE}.__file__.startswith(sys.prefix), {PACKAGE}.__file__ + " is not the wheel's"
assert "torch" not in sys.modules, "`import {PACKAGE}` alone loads torch"
names = [m.name for m in pkgutil.walk_packages({PACKAGE}.__path__, "{PACKAGE}.")]
for name in names:
    importlib.import_module(name)
for name in {PACKAGE}.__all__:
    getattr({PACKAGE}, name)
print("imported", len(names), "modules and", len({PACKAGE}.__all__), "public names")
"""
COPY_NOTEBOOKS = f"""
import sys
from {PACKAGE}.app.notebooks import copy_notebooks
copy_notebooks(sys.argv[1])
"""
# Arguments: a notebook, and the flags of the cells to leave out. The first cell sees to it that the
# kernel, too, imports the wheel.
RUN_NOTEBOOK = f"""
import re, sys, nbformat
from nbclient import NotebookClient
path, flags = sys.argv[1], "|".join(sys.argv[2:])
nb = nbformat.read(path, as_version=4)
for cell in nb.cells:
    if re.match(rf"(\\s*#\\|.*\\n)*?\\s*#\\|\\s*({{flags}})\\b", cell.source):
        cell.metadata["tags"] = ["skip-execution"]
first = "import sys, {PACKAGE}; assert {PACKAGE}.__file__.startswith(sys.prefix), {PACKAGE}.__file__"
nb.cells.insert(0, nbformat.v4.new_code_cell(first))
folder = {{"metadata": {{"path": path.rpartition("/")[0]}}}}
NotebookClient(nb, timeout=900, kernel_name="python3", resources=folder).execute()
"""


class CheckError(Exception):
    """A check did not hold; the message says why."""


class Gate:
    """The folder that the checks work in, and how they run commands there."""

    def __init__(self, folder: Path, python: str | None) -> None:
        self.folder = folder.resolve()
        self.clone = self.folder / "checkout"
        self.env = clean_environment()
        if python:
            self.put_first(python)

    def put_first(self, python: str) -> None:
        """Make `python3` mean this interpreter.

        A script, not a link: through a link Python may not find its library.
        """
        folder = self.folder / "bin"
        folder.mkdir(exist_ok=True)
        script = f'#!/bin/sh\nexec {shlex.quote(os.path.abspath(python))} "$@"\n'
        (folder / "python3").write_text(script)
        (folder / "python3").chmod(0o755)
        self.env["PATH"] = f"{folder}{os.pathsep}{self.env['PATH']}"

    def run(self, *command: str | Path, cwd: Path | None = None, quiet: bool = False) -> None:
        """Run a command in the clone and print it; if quiet, its output is shown only when it fails.

        Raises CheckError for any exit code but 0.
        """
        words = [str(word) for word in command]
        shown = shlex.join(word if "\n" not in word else "..." for word in words)
        print("$ " + shown)
        done = subprocess.run(
            words,
            cwd=cwd or self.clone,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if quiet else None,
            stderr=subprocess.STDOUT if quiet else None,
            text=True,
            errors="replace",
        )
        if done.returncode:
            output = f"\n{done.stdout}" if quiet else ""
            raise CheckError(f"exit code {done.returncode} from {shown}{output}")

    def run_within(self, seconds: float, *command: str | Path, **environment: str) -> None:
        """Run a command in the clone; afterwards, or after so many seconds, all it started is ended.

        Raises CheckError where it does not end with 0, or in time.
        """
        words = [str(word) for word in command]
        print("$ " + shlex.join(words))
        job = subprocess.Popen(
            words,
            cwd=self.clone,
            env={**self.env, **environment},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = job.wait(seconds)
        except subprocess.TimeoutExpired:
            raise CheckError(f"more than {seconds:.0f} s: {shlex.join(words)}") from None
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
        if code:
            raise CheckError(f"exit code {code} from {shlex.join(words)}")

    def install(self, *what: str) -> None:
        """Install into the environment that README's commands use, and make it if need be."""
        if not (self.clone / ".venv").exists():
            self.run("python3", "-m", "venv", ".venv")
        self.run(".venv/bin/pip", "install", "--quiet", *what)

    def tool(self, name: str) -> Path:
        """A command of that environment, installed with the extra "dev" where it is missing."""
        path = self.clone / ".venv" / "bin" / name
        if not path.exists():
            self.install("-e", ".[dev]")
        return path

    def git(self, *words: str) -> str:
        """What git prints in the clone; raises CalledProcessError where it fails."""
        done = subprocess.run(
            ["git", *words],
            cwd=self.clone,
            env=self.env,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        return done.stdout

    def fetch(self) -> None:
        """Bring the clone to the checkout's last commit, whether the clone is new or not."""
        self.clone.mkdir(parents=True, exist_ok=True)
        self.git("init", "--quiet")
        # A depth of 1 also works where the checkout is itself shallow, as on build machines.
        self.git("fetch", "--quiet", "--depth", "1", ROOT.as_uri(), "HEAD")
        self.git("checkout", "--quiet", "--force", "FETCH_HEAD")
        self.restore()

    def restore(self) -> None:
        """Undo what a check did to the clone, so that one failure does not cause the next."""
        self.git("reset", "--quiet", "--hard")
        # An older pip's editable install lives in the egg-info folder.
        keep = [f"--exclude={name}" for name in (".venv", "*.egg-info", ".mypy_cache")]
        self.git("clean", "-ffdxq", *keep)

    def must_be_unchanged(self, after: str) -> None:
        """Raises CheckError where anything in the clone differs from the commit; new files count."""
        changed = self.git("status", "--porcelain")
        if changed:
            print(self.git("--no-pager", "diff", "--stat"))
            raise CheckError(
                f"after {after} these files differ from the commit:\n{changed.rstrip()}"
            )

    def settings(self) -> configparser.SectionProxy:
        """The clone's settings.ini."""
        ini = configparser.ConfigParser(delimiters=["="])
        ini.read(self.clone / "settings.ini", encoding="utf-8")
        return ini["DEFAULT"]


def clean_environment() -> dict[str, str]:
    """The environment without what would point Python or git elsewhere, or is nbdev's own switch."""
    python = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "IN_TEST"}
    git = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"}
    return {name: value for name, value in os.environ.items() if name not in python | git}


def readme_command(readme: Path, mark: str) -> str:
    """The one line in the one ```bash block of README.md that contains `mark`."""
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    commands = [block.strip() for block in blocks if mark in block]
    if len(commands) != 1:
        raise CheckError(f"README.md must have one ```bash block with `{mark}`: {len(commands)}")
    if "\n" in commands[0]:
        raise CheckError(f"README.md: the block with `{mark}` must be one line:\n{commands[0]}")
    return commands[0]


# ---- the checks, in their order


def tests(gate: Gate) -> tuple[int, int]:
    """README's test command; every notebook counts as one test."""
    # Counted here: nbdev_test would also end with 0 if it found no notebook.
    count = sum(".ipynb_checkpoints" not in p.parts for p in (gate.clone / "nbs").rglob("*.ipynb"))
    if not count:
        raise CheckError("there are no notebooks")
    gate.run("bash", "-c", readme_command(gate.clone / "README.md", "nbdev_test"))
    return count, 0


def main_job(gate: Gate) -> None:
    """README's main command; it must leave a report."""
    gate.run("bash", "-c", readme_command(gate.clone / "README.md", f"{PACKAGE} train"))
    reports = list(gate.clone.glob("runs/*/report.json"))
    if len(reports) != 1:
        raise CheckError(f"it should leave one report.json in runs/: {reports}")
    print(json.dumps(json.loads(reports[0].read_text())))


def formatted(gate: Gate) -> None:
    """`ruff format` has nothing to change: modules, notebooks, tools, benchmarks."""
    gate.run(gate.tool("ruff"), "format", "--check", "--quiet", ".")


def lint(gate: Gate) -> None:
    """`ruff check` finds nothing."""
    gate.run(gate.tool("ruff"), "check", "--quiet", ".")


def types(gate: Gate) -> None:
    """`mypy` accepts the package, which says of itself that it is typed (py.typed)."""
    gate.run(gate.tool("mypy"))


def requirements(gate: Gate) -> None:
    """`deptry`: the modules import what settings.ini requires, and nothing else."""
    listed = gate.folder / "requirements.txt"
    listed.write_text("\n".join(gate.settings()["requirements"].split()) + "\n")
    gate.run(gate.tool("deptry"), PACKAGE, "--requirements-files", listed)


def notebooks(gate: Gate) -> None:
    """The notebooks keep the rules, and cleaning them changes nothing."""
    gate.run(gate.tool("python"), "tools/notebooks.py", "check")
    gate.run(gate.tool("python"), "tools/notebooks.py", "clean")
    gate.must_be_unchanged("tools/notebooks.py clean")


def sync(gate: Gate) -> None:
    """The modules are what the notebooks export: no other, none missing, none left over."""
    for path in (gate.clone / PACKAGE).rglob("*.py"):
        if "# AUTOGENERATED! DO NOT EDIT!" in path.read_text(encoding="utf-8"):
            path.unlink()
    gate.run(gate.tool("nbdev_export"))
    gate.must_be_unchanged("nbdev_export")


def readme(gate: Gate) -> None:
    """README.md and its pictures are what nbs/index.ipynb says."""
    gate.run(gate.tool("python"), "tools/readme.py")
    gate.must_be_unchanged("tools/readme.py")


@contextmanager
def installed_wheel(gate: Gate) -> Iterator[tuple[Path, Path]]:
    """A folder outside the checkout, and in it an environment with the wheel.

    The wheel is built from the source archive, which is built from the files that git knows.
    """
    with tempfile.TemporaryDirectory(dir=gate.folder) as folder:
        outside = Path(folder)
        # A copy: an egg-info folder from the editable install lists files that a stranger's build
        # would not find.
        gate.run("git", "checkout-index", "--all", f"--prefix={outside}/source/")
        build = [gate.tool("python"), "-m", "build", "--outdir", outside, outside / "source"]
        gate.run(*build, quiet=True)
        (wheel,) = outside.glob("*.whl")
        shutil.rmtree(outside / "source")

        other = outside / "other"
        gate.run(gate.tool("python"), "-m", "venv", other)
        gate.run(other / "bin" / "pip", "install", "--quiet", "--no-deps", wheel)
        # Borrow the first environment's packages rather than install them again. Its own .pth
        # files, such as that of the editable install, are not read this way.
        (borrowed,) = (gate.clone / ".venv").glob("lib/python*/site-packages")
        (own,) = other.glob("lib/python*/site-packages")
        (own / "borrowed.pth").write_text(f"{borrowed}\n")
        # JupyterLab, Voila and their extensions look for their files there.
        for part in ("share", "etc"):
            if not (other / part).exists():
                (other / part).symlink_to(gate.clone / ".venv" / part)
        yield outside, other


def run_shipped(
    gate: Gate, outside: Path, other: Path, is_chosen: Callable[[Path], bool]
) -> tuple[int, int]:
    """Run the wheel's own notebooks, top to bottom, two at a time, without a network.

    Returns how many passed and how many failed.
    """
    python, folder = other / "bin" / "python", outside / "copied"
    gate.run(python, "-c", COPY_NOTEBOOKS, folder, cwd=outside)
    paths = sorted(path for path in folder.rglob("*.ipynb") if is_chosen(path))
    if not paths:
        raise CheckError("the wheel holds no such notebooks")
    cache = {"OMP_NUM_THREADS": "1", "VAE_NB_CACHE": str(outside / "no-data")}
    environment = {**gate.env, **NO_NETWORK, **cache}
    flags = gate.settings()["tst_flags"].split()

    def passes(path: Path) -> bool:
        began = time.monotonic()
        done = subprocess.run(
            [python, "-c", RUN_NOTEBOOK, path, *flags],
            cwd=outside,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        name = path.relative_to(folder)
        if done.returncode:
            print(f"FAILED {name}\n{done.stdout[-3000:]}")
        else:
            print(f"{name}: {time.monotonic() - began:.0f} s")
        return done.returncode == 0

    with ThreadPoolExecutor(2) as pool:
        passed = sum(pool.map(passes, paths))
    return passed, len(paths) - passed


def package(gate: Gate) -> None:
    """The wheel is sound, and works in another environment, as do notebooks that it holds."""
    with installed_wheel(gate) as (outside, other):
        archives = sorted([*outside.glob("*.whl"), *outside.glob("*.tar.gz")])
        gate.run(gate.tool("twine"), "check", "--strict", *archives)
        (wheel,) = outside.glob("*.whl")
        gate.run(gate.tool("check-wheel-contents"), "--toplevel", PACKAGE, wheel)
        if f"{PACKAGE}/py.typed" not in zipfile.ZipFile(wheel).namelist():
            raise CheckError(f"{wheel.name} has no {PACKAGE}/py.typed")
        gate.run(other / "bin" / "python", "-c", IMPORT_ALL, cwd=outside)
        gate.run(other / "bin" / PACKAGE, "--help", cwd=outside)
        _, failed = run_shipped(gate, outside, other, lambda path: path.stem in {"index", "05_gap"})
        if failed:
            raise CheckError("a notebook does not run from the wheel: see above")


def shipped(gate: Gate) -> tuple[int, int]:
    """Every notebook that the wheel holds runs from it, without a network; each is one test."""
    gate.install("-e", ".[dev]")
    with installed_wheel(gate) as (outside, other):
        return run_shipped(gate, outside, other, lambda path: True)


def browser(gate: Gate) -> None:
    """In Chromium: every widget in JupyterLab; the wheel's `lab` and `explore`; the whole site."""
    chromium = find_chromium(gate.env)
    if not chromium:
        print("no Chromium here: not run")
        return
    if not (gate.clone / BROWSER_NOTEBOOK).exists():
        raise CheckError(f"{BROWSER_NOTEBOOK} is missing")
    gate.install("-e", ".[dev,docs]", "playwright")
    command = [gate.tool("nbdev_test"), "--flags", "browser", "--path", BROWSER_NOTEBOOK]
    with installed_wheel(gate) as (_, other):
        gate.run_within(
            BROWSER_LIMIT,
            *command,
            OMP_NUM_THREADS="1",
            VAE_NB_COMMAND=str(other / "bin" / PACKAGE),
            CHROMIUM=chromium,
        )


def find_chromium(environment: dict[str, str]) -> str | None:
    """The program named by CHROMIUM, one on the path, or playwright's own (newest first)."""
    if environment.get("CHROMIUM"):
        return environment["CHROMIUM"]
    for name in CHROMIUM:
        program = shutil.which(name, path=environment.get("PATH"))
        if program:
            return program
    folder = environment.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache" / "ms-playwright"
    programs = list(Path(folder).glob("chromium-*/chrome-linux*/chrome"))
    return str(max(programs, key=lambda path: path.stat().st_mtime)) if programs else None


CHECKS: dict[str, Callable[[Gate], tuple[int, int] | None]] = {
    "tests": tests,
    "main": main_job,
    "format": formatted,
    "lint": lint,
    "types": types,
    "requirements": requirements,
    "notebooks": notebooks,
    "sync": sync,
    "readme": readme,
    "package": package,
    "shipped": shipped,
    "browser": browser,
}
USUAL = [name for name in CHECKS if name != "shipped"]


def run_check(gate: Gate, name: str) -> tuple[int, int]:
    """How many passed and failed; whatever goes wrong is one failure, and the next check goes on."""
    check, began = CHECKS[name], time.monotonic()
    print(f"\n==== {name}: {(check.__doc__ or '').splitlines()[0]}")
    try:
        passed, failed = check(gate) or (1, 0)
        outcome = f"ok {name}" if not failed else f"FAILED {name}: {failed} of {passed + failed}"
    except CheckError as error:
        passed, failed, outcome = 0, 1, f"FAILED {name}: {error}"
    except Exception as error:
        passed, failed, outcome = 0, 1, f"FAILED {name}: {type(error).__name__}: {error}"
    print(f"{outcome} ({time.monotonic() - began:.0f} s)")
    gate.restore()
    return passed, failed


def parse_arguments() -> tuple[list[str], argparse.Namespace]:
    """The names of the checks to run, and the other options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", metavar="NAME[,NAME]", default=",".join(USUAL), help="run just these checks"
    )
    parser.add_argument(
        "--also",
        metavar="NAME",
        action="append",
        choices=CHECKS,
        default=[],
        help="and this one: shipped",
    )
    parser.add_argument(
        "--keep", metavar="FOLDER", type=Path, help="work in FOLDER and leave it there"
    )
    parser.add_argument("--python", metavar="PATH", help="the interpreter to use as python3")
    options = parser.parse_args()
    names = options.only.split(",") + options.also
    unknown = set(names) - set(CHECKS)
    if unknown:
        parser.error(f"unknown checks {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    return [name for name in CHECKS if name in names], options


def main() -> int:
    names, options = parse_arguments()
    # So that our lines and those of the commands stay in order in a log.
    sys.stdout.reconfigure(line_buffering=True)
    status = ["git", "status", "--porcelain"]
    if subprocess.run(status, cwd=ROOT, env=clean_environment(), capture_output=True).stdout:
        print("NOTE: the working tree has changes; what is committed is tested, not they.")
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{PACKAGE}-gate-") as temporary:
        gate = Gate(options.keep or Path(temporary), options.python)
        gate.fetch()
        counts = [run_check(gate, name) for name in names]
    passed = sum(count[0] for count in counts)
    failed = sum(count[1] for count in counts)
    print(f"\n{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
