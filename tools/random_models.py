"""Replace the model of a derivation page by random numbers, and see which of its claims notice.

    tools/random_models.py              all pages (minutes); writes tools/random_models.md
    tools/random_models.py --only 04    some pages, as 04,05; prints and writes nothing
    tools/random_models.py --check      all of them, and compares with the table that is committed

A claim is true of a model, so it has to turn red when the model is nothing but random numbers of the same shapes. A
claim that stays green is true of any numbers: it tests the program, or it never was about the model.

Each page runs once as it is, and DRAWS times with replacements, statement by statement. Nothing that fails
stops it: a check notes where it was called and what it found. Then

    red        it fails in at least one draw (one inequality of random numbers holds every second time)
    unstated   it never fails, but in some draw it was not reached: what it needs could not be computed
    green      it holds in every draw

Replaced by standard normal numbers, new ones at every call, which keep a gradient (scaled at random), are

    the logarithms of densities, and divergences, of 02 (DENSITIES) and those of a page itself (OF_PAGES)
    log_prob and rsample_and_log_prob (the density, not the sample) of every distribution defined in 02, 03 or the page
    of every class with likelihood(): log_evidence and log_joint, and log_prob of what prior, likelihood and posterior return;
    a posterior that is Gaussian or a table has random parameters, too

Samples and data are left alone, and so is what a page computes by other means (torch's own distributions and
divergences, matrices, numbers). tools/random_models_reasons.json says of each check that stays green why it may:
a kind (KINDS) and a sentence.
"""

from __future__ import annotations

import argparse
import ast
import functools
import io
import json
import multiprocessing
import sys
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from typing import Any, NamedTuple

import mutate

PAGES = ("02", "03", "04", "05", "06", "07", "08", "09", "11", "12", "13")
DRAWS = 3
LIMIT = 300.0  # seconds of computing for a page
REPORT = mutate.ROOT / "tools" / "random_models.md"
REASONS = mutate.ROOT / "tools" / "random_models_reasons.json"
VERBS = ("check_eq", "check_ge", "check_mc")
KINDS = {
    "program": "tests the program",
    "no model": "does not involve the model",
    "replace": "to be replaced",
}
REPLACED_METHODS = (
    "log_prob",
    "log_prob_by_block",
    "rsample_and_log_prob",
    "log_evidence",
    "log_joint",
)
DENSITIES = [
    "log_normal",
    "log_standard_normal",
    "log_bernoulli_trials",
    "log_bernoulli",
    "log_binomial",
    "kl_normal",
    "kl_gaussian",
]
OF_PAGES = {
    "02": ["log_mean_exp", "kl_bernoulli", "divergence", "kl_on_line"],
    "07": ["log_joint"],
    "08": ["bits_log_q", "log_density"],
    "09": ["valley", "standard_normal", "truncated"],
    "11": ["log_bits", "kl"],
    "12": ["log_joint"],
    "13": ["kl_tables", "halves"],
}


class Page(NamedTuple):
    stem: str  # 04_elbo
    cells: dict[str, str]  # id → source, of the code cells that run by default


class Check(NamedTuple):
    page: str  # 04
    cell: str  # its id
    line: int  # in the cell, of the statement's call
    source: str

    @property
    def key(self) -> str:
        return f"{self.page} {self.cell} {self.source}"


Found = dict[Check, bool]  # whether it held, each time it was called


def read_page(number: str) -> Page:
    (path,) = (mutate.ROOT / "nbs" / "derivation").glob(f"{number}_*.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return Page(
        path.stem,
        {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"},
    )


# ---- random numbers for the model


class Randomness:
    """Replaces what functions return, by numbers that depend on nothing but shapes and a seed."""

    def __init__(self, seed: int) -> None:
        import torch

        self.torch = torch
        self.generator = torch.Generator().manual_seed(seed)

    def like(self, value: Any) -> Any:
        """Random numbers of the shape and dtype of a tensor, with a gradient where it has one."""
        if not (isinstance(value, self.torch.Tensor) and value.is_floating_point()):
            return value
        noise, scale = self.torch.randn(
            (2, *value.shape), generator=self.generator, dtype=self.torch.float64
        ).to(value.dtype)
        if not value.requires_grad:
            return noise
        return noise + scale * (value - value.detach()).nan_to_num(0.0, 0.0, 0.0)

    def values(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with random results; of a pair (samples, densities) the second is replaced."""

        @functools.wraps(function)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            value = function(*args, **kwargs)
            if isinstance(value, tuple):
                return (*value[:-1], self.like(value[-1]))
            return self.like(value)

        replaced.is_random = True  # type: ignore[attr-defined]
        return replaced

    def distributions(self, function: Callable[..., Any], is_posterior: bool) -> Callable[..., Any]:
        """The function with random densities in the distributions that it returns."""

        @functools.wraps(function)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            dist = function(*args, **kwargs)
            if is_posterior:
                dist = self.another(dist)
            if hasattr(dist, "log_prob") and not is_random(type(dist).log_prob):
                dist.log_prob = self.values(dist.log_prob)
            return dist

        replaced.is_random = True  # type: ignore[attr-defined]
        return replaced

    def another(self, dist: Any) -> Any:
        """A distribution of the same kind and shape with random parameters, where the kind is known."""
        if hasattr(dist, "scale_tril"):
            scale = self.torch.diag_embed(self.like(dist.mean).exp())
            return type(dist)(self.like(dist.mean), scale_tril=scale)
        if hasattr(dist, "log_probs") and hasattr(dist, "states"):
            return type(dist)(dist.states, self.like(dist.log_probs).log_softmax(-1))
        if type(dist).__name__ == "DiagonalNormal":
            return type(dist)(self.like(dist.mean), self.like(dist.stddev).exp())
        return dist

    def replace_in(self, names: dict[str, Any], functions: list[str], module: str) -> None:
        """Replace the functions of these names, and the methods of models and distributions."""
        for name, value in list(names.items()):
            if getattr(value, "__module__", None) != module or is_random(value):
                continue
            if isinstance(value, types.FunctionType) and name in functions:
                names[name] = self.values(value)
            if isinstance(value, type):
                self.replace_methods(value)

    def replace_methods(self, kind: type) -> None:
        is_model = hasattr(kind, "likelihood")
        for name, method in list(vars(kind).items()):
            if not isinstance(method, types.FunctionType) or is_random(method):
                continue
            if name in REPLACED_METHODS:
                setattr(kind, name, self.values(method))
            if is_model and name in ("prior", "likelihood", "posterior"):
                setattr(kind, name, self.distributions(method, name == "posterior"))


def is_random(function: Any) -> bool:
    return getattr(function, "is_random", False)


# ---- running a page


class Recorder:
    """Stands in for the verbs of 00: notes what each check finds, and never raises."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.found: list[tuple[Check, bool]] = []
        self.expected_errors = (
            0  # how many `check_error` blocks are open: in them, a check may raise
        )

    def place(self) -> Check | None:
        """The line of the cell that is being executed, not of a helper that it calls."""
        frame, outermost = sys._getframe(1), None
        while frame is not None:
            if frame.f_code.co_filename.startswith("<cell "):
                outermost = frame
            frame = frame.f_back  # type: ignore[assignment]
        if outermost is None:
            return None
        cell, line = outermost.f_code.co_filename[6:-1], outermost.f_lineno
        source = self.page.cells[cell].splitlines()[line - 1].strip()
        return Check(self.page.stem[:2], cell, line, source)

    def wrap(self, verb: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(verb)
        def noted(*args: Any, **kwargs: Any) -> None:
            if self.expected_errors:
                return verb(*args, **kwargs)
            place = self.place()
            try:
                with redirect_stdout(io.StringIO()):
                    verb(*args, **kwargs)
                holds = True
            except Exception:  # red, or it cannot even be stated
                holds = False
            if place is not None:
                self.found.append((place, holds))

        return noted

    def expect(self, check_error: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def expecting(*args: Any, **kwargs: Any) -> Iterator[None]:
            self.expected_errors += 1
            try:
                with check_error(*args, **kwargs):
                    yield
            finally:
                self.expected_errors -= 1

        return expecting


def statements(cell: str, source: str) -> list[types.CodeType]:
    """A cell's statements, each to be executed even where the one before has failed."""
    tree = ast.parse(source)
    title = f"<cell {cell}>"
    return [compile(ast.Module([node], []), title, "exec") for node in tree.body]


def run_page(page: Page, draw: int | None) -> dict[tuple[Any, ...], bool]:
    """What each check of a page found, in this process; draw None is the page as it is."""
    folder = mutate.ROOT / "nbs" / "derivation"
    _, names = mutate.start([], mutate.Notebook(folder, page.stem, "", [], []))
    recorder = Recorder(page)
    assertions = __import__("vae_nb.derivation.assertions", fromlist=["x"])
    for name in VERBS:
        setattr(assertions, name, recorder.wrap(getattr(assertions, name)))
    assertions.check_error = recorder.expect(assertions.check_error)
    randomness = None if draw is None else Randomness(draw)
    functions = DENSITIES + OF_PAGES.get(page.stem[:2], [])
    if randomness:
        for module in (
            "vae_nb.derivation.densities",
            "vae_nb.derivation.evidence",
        ):
            parts = vars(__import__(module, fromlist=["x"]))
            randomness.replace_in(parts, DENSITIES, module)
    for cell, source in page.cells.items():
        for code in statements(cell, source):
            try:
                exec(code, names)
            except Exception:
                if draw is None:
                    raise
            if randomness:
                randomness.replace_in(names, functions, "__main__")
    answers: dict[tuple[Any, ...], bool] = {}
    for check, holds in recorder.found:
        answers[tuple(check)] = answers.get(tuple(check), True) and holds
    return answers  # plain tuples: this process has another __main__, and could not name Check


def run(page: Page, draw: int | None) -> Found:
    answer = mutate.in_child(functools.partial(run_page, page, draw), LIMIT)
    if isinstance(answer, str):
        sys.exit(f"{page.stem}, {'as it is' if draw is None else f'draw {draw}'}: {answer}")
    return {Check(*place): holds for place, holds in answer.items()}


# ---- the report


def verdict(check: Check, draws: list[Found]) -> str:
    if any(draw.get(check) is False for draw in draws):
        return "red"
    return "green" if all(check in draw for draw in draws) else "unstated"


def judge(pages: list[Page], jobs: int) -> dict[str, dict[Check, str]]:
    """For every page, each check's verdict."""
    mutate.prepare()
    tasks = [(page, draw) for page in pages for draw in (None, *range(DRAWS))]
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, mp_context=fork) as workers:
        answers = list(workers.map(run, *zip(*tasks, strict=True)))
    by_page: dict[str, list[Found]] = defaultdict(list)
    for (page, _), answer in zip(tasks, answers, strict=True):
        by_page[page.stem].append(answer)
    verdicts = {}
    for stem, (clean, *draws) in by_page.items():
        failed = [check for check, holds in clean.items() if not holds]
        if failed:
            sys.exit(f"{stem} fails as it is: {failed}")
        verdicts[stem] = {check: verdict(check, draws) for check in clean}
    return verdicts


def summary(verdicts: dict[str, dict[Check, str]], reasons: dict[str, list[str]]) -> list[str]:
    """A line for each page."""
    heads = ["checks", "red", "unstated", *KINDS.values(), "**not explained**"]
    lines = ["| page | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    total = [0] * len(heads)
    for stem, found in verdicts.items():
        green = [check for check, says in found.items() if says == "green"]
        kinds = [reasons.get(check.key, ["none"])[0] for check in green]
        row = [len(found), *(list(found.values()).count(v) for v in ("red", "unstated"))]
        row += [kinds.count(kind) for kind in (*KINDS, "none")]
        total = [a + b for a, b in zip(total, row, strict=True)]
        lines.append(f"| {stem} | " + " | ".join(map(str, row)) + " |")
    return [*lines, "| **all** | " + " | ".join(map(str, total)) + " |"]


def report(verdicts: dict[str, dict[Check, str]], reasons: dict[str, list[str]]) -> str:
    """The table, and the checks that stay green, as Markdown."""
    lines = [
        "# Random models",
        "",
        "What `tools/random_models.py` found when it ran last: how many checks of the derivation turn red when the",
        "page's model is replaced by random numbers of the same shapes (its head says of what), and why the others",
        "may stay green. *Unstated* are checks that were not reached, since what they need could not be computed.",
        "",
        *summary(verdicts, reasons),
    ]
    for stem, found in verdicts.items():
        lines += ["", f"## {stem}"]
        green = [check for check, says in found.items() if says == "green"]
        for kind, title in {**KINDS, "none": "**not explained**"}.items():
            some = [check for check in green if reasons.get(check.key, ["none"])[0] == kind]
            lines += ["", f"{title[0].upper()}{title[1:]}:", ""] if some else []
            for check in some:
                reason = reasons.get(check.key, ["", "?"])[1]
                lines.append(f"- {check.cell}: `{check.source}`  \n  {reason}")
    return "\n".join(lines) + "\n"


def faults(verdicts: dict[str, dict[Check, str]], reasons: dict[str, list[str]]) -> list[str]:
    """Checks that stay green for no known reason, and reasons that nothing needs."""
    pages = {stem[:2] for stem in verdicts}
    green = {c.key for found in verdicts.values() for c, says in found.items() if says == "green"}
    unexplained = [
        f"stays green, and nobody says why: {key}" for key in sorted(green - set(reasons))
    ]
    unneeded = [key for key in reasons if key[:2] in pages and key not in green]
    return unexplained + [
        f"{REASONS.name}: not a check that stays green: {key}" for key in unneeded
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NN,...", default="", help="just these pages")
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    options = parser.parse_args()

    numbers = options.only.split(",") if options.only else PAGES
    verdicts = judge([read_page(number) for number in numbers], options.jobs)
    reasons = json.loads(REASONS.read_text(encoding="utf-8")) if REASONS.exists() else {}
    text = report(verdicts, reasons)
    wrong = faults(verdicts, reasons)
    if options.only:
        print(text)
    elif options.check:
        committed = REPORT.read_text(encoding="utf-8") if REPORT.exists() else ""
        wrong += [f"{REPORT.name} is not what this run says"] if text != committed else []
    else:
        REPORT.write_text(text, encoding="utf-8")
        print("\n".join(summary(verdicts, reasons)))
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
