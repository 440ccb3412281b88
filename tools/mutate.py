"""Break the functions that compute in small ways, and count how often a cell of a notebook turns red.

    tools/mutate.py                                all of them (most of an hour); writes tools/mutants.md
    tools/mutate.py --only checks,elbo.log_terms   some modules or functions; prints the report, writes nothing
    tools/mutate.py --list                         the mutants, without running any

The functions are those of the exported cells of NOTEBOOKS: the derivation (00 to 09, 12, 13), and of the library the
likelihoods (20), flows (21), posteriors (22), priors (23), objectives (27) and the evaluation (35 to 38). A mutant is one of them with one change:

    sign flip         a + b ↔ a - b; += ↔ -=; -a → a; not a → a; < ↔ >=, > ↔ <=, == ↔ !=, is ↔ is not, in ↔ not in
    swapped operands  the two sides of - / // % ** @ and shifts; the first two arguments of a call (not where their
                      order means nothing: max, transpose, ...)
    dropped term      a + b → a, b; a * b → a, b; a - b, a / b, a ** b → a; one side of `and`, `or`; a call that
                      computes something from one thing, as in a.log() → a and math.sqrt(a) → a (for the names in
                      DROPPED_CALLS); a statement that is nothing but a call
    wrong axis        0 → -1 and others → 0, for dim=, axis=, the axis of a reduction, and shape[...];
                      a[i, j] → a[j, i]; .T and .mT dropped
    changed constant  integers c → c + 1, others c → 2c, 0.0 → 1.0, True ↔ False; also in default values
    dropped detach    a.detach() → a; a detach= argument dropped; `with torch.no_grad():` and its like without effect

Left alone are docstrings, type hints, decorators, f-strings, and what stands behind `raise`, though not the condition
that leads there. A mutant is caught where any cell of a notebook raises an exception, or the notebook takes ten times
its usual processor time: first the function's own notebook, then the others whose cells call the function, by number.
Nothing in the checkout is touched: modules are compiled from the notebooks' text, in forked processes (on Linux).
The package's other modules come from their files; they, too, are given the mutant by whatever they import.

A survivor may be equivalent: no caller could tell it from the original. tools/mutants_equivalent.json says why, one
sentence for each; two shares are reported, of all mutants and of those not argued equivalent.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import configparser
import importlib.abc
import importlib.util
import json
import linecache
import math
import multiprocessing
import os
import pickle
import re
import resource
import select
import signal
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vae_nb"
# In nbs.
NOTEBOOKS = (
    "derivation/0*",
    "derivation/12*",
    "derivation/13*",
    "model/20*",
    "model/21*",
    "model/22*",
    "model/23*",
    "model/27*",
    "evaluation/3*",
)
REPORT = ROOT / "tools" / "mutants.md"
REASONS = ROOT / "tools" / "mutants_equivalent.json"
CHUNK = 20  # mutants of one cell that share one run of the cells before it
PATIENCE = 10  # a run that computes so many times as long as the clean one counts as caught
LONGEST = 72  # of the expressions that a report shows, as far as the change itself is shorter
MEMORY = 16 * 2**30  # bytes that a mutant may ask for
HEAVY = (
    "torch.distributions",
    "torch.nn.functional",
    "numpy",
    "matplotlib.pyplot",
    "scipy.stats",
    "scipy.integrate",
    "sklearn.datasets",
    "sklearn.decomposition",
    "IPython.display",
    "ipywidgets",
)


# ---- the notebooks


class Notebook(NamedTuple):
    folder: Path  # where it runs
    stem: str  # 04_elbo
    module: str  # vae_nb.derivation.elbo
    cells: list[str]  # the code cells that run by default
    exported: list[int]  # which of them are exported

    @property
    def name(self) -> str:
        """elbo: the module's name, which no other folder has."""
        return self.module.rpartition(".")[2]


class Mutant(NamedTuple):
    notebook: str  # its stem
    module: str  # vae_nb.derivation.elbo
    function: str  # check_eq, or Terms.log_w
    operator: str
    before: str
    after: str
    cell: int
    source: str  # of the whole cell, with the change

    @property
    def place(self) -> str:
        """elbo.log_terms: how reports and --only call the function."""
        return f"{self.module.rpartition('.')[2]}.{self.function}"

    @property
    def id(self) -> str:
        return f"{self.place}: {self.before} → {self.after}"


def directives(source: str) -> list[list[str]]:
    """The words of the lines `#| ...` at the head of a cell."""
    head = re.match(r"(?:[ \t]*#[ \t]*\|.*\n?|\s*\n)*", source)[0]
    return [line.split("|", 1)[1].split() for line in head.splitlines() if "|" in line]


def read_notebook(path: Path, flags: set[str]) -> Notebook:
    """The code cells of a notebook, less those with a test flag and less lines that only IPython reads."""
    cells, exported, module = [], [], ""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        source = re.sub(r"(?m)^[%!].*", "", "".join(cell["source"]))
        marks = directives(source)
        if flags & {words[0] for words in marks if words}:
            continue
        for words in marks:
            if words[:1] == ["default_exp"]:
                module = f"{PACKAGE}.{words[1]}"
            if words[:1] == ["export"]:
                exported.append(len(cells))
        cells.append(source)
    return Notebook(path.parent, path.stem, module, cells, exported)


def read_notebooks(left_out: set[str]) -> list[Notebook]:
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    flags = set(settings["DEFAULT"].get("tst_flags", "").split())
    paths = [path for some in NOTEBOOKS for path in sorted((ROOT / "nbs").glob(some + ".ipynb"))]
    return [read_notebook(path, flags) for path in paths if path.stem[:2] not in left_out]


# ---- the operators: from one node of a syntax tree to others

MODULES = {"torch", "np", "F", "math", "plt"}
OPPOSITE = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ORDERED = (ast.Sub, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult, ast.LShift, ast.RShift)
SYMMETRIC = {
    "max",
    "min",
    "maximum",
    "minimum",
    "transpose",
    "logaddexp",
    "equal",
    "hypot",
    "broadcast_shapes",
}
# Whose axis is the first argument, as a method, or the second, as a function.
REDUCTIONS = set(
    [
        "all",
        "amax",
        "amin",
        "any",
        "argmax",
        "argmin",
        "cat",
        "cumprod",
        "cumsum",
        "diff",
        "flatten",
        "flip",
        "index_select",
        "log_softmax",
        "logcumsumexp",
        "logsumexp",
        "max",
        "mean",
        "median",
        "min",
        "prod",
        "select",
        "size",
        "softmax",
        "sort",
        "split",
        "squeeze",
        "stack",
        "std",
        "sum",
        "unbind",
        "unsqueeze",
        "var",
    ]
)
DROPPED_CALLS = REDUCTIONS - {
    "cat",
    "stack",
    "size",
    "split",
    "unbind",
    "select",
    "index_select",
} | set(
    [
        "abs",
        "broadcast_to",
        "ceil",
        "clamp",
        "clamp_min",
        "clamp_max",
        "clip",
        "clone",
        "contiguous",
        "copy",
        "cos",
        "cpu",
        "diagonal",
        "double",
        "exp",
        "expand",
        "expand_as",
        "expm1",
        "float",
        "floor",
        "lgamma",
        "log",
        "log1p",
        "log2",
        "log10",
        "logdet",
        "logsigmoid",
        "masked_fill",
        "neg",
        "numpy",
        "reciprocal",
        "relu",
        "reshape",
        "round",
        "rsqrt",
        "sigmoid",
        "sign",
        "sin",
        "softplus",
        "sqrt",
        "square",
        "tanh",
        "to",
        "tolist",
        "transpose",
        "tril",
        "triu",
        "view",
    ]
)
NO_GRADIENT = {"no_grad", "inference_mode", "set_grad_enabled"}


def axis_mutants(node: ast.expr) -> Iterator[ast.expr]:
    """Other axes for a literal axis, or for each of a tuple of them; nothing for other expressions."""
    match node:
        case ast.Constant(value=int()):
            yield ast.parse("-1" if node.value == 0 else "0", mode="eval").body
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int())):
            yield ast.Constant(0)
        case ast.Tuple(elts=elts) | ast.List(elts=elts):
            for i, element in enumerate(elts):
                for other in axis_mutants(element):
                    yield type(node)([*elts[:i], other, *elts[i + 1 :]], ast.Load())


def call_mutants(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    """What a call can be changed to."""
    func, args, keywords = node.func, node.args, node.keywords
    name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
    is_library = is_library_call(func)
    is_method = isinstance(func, ast.Attribute) and not is_library
    yield from keyword_mutants(node)
    axis = 1 if is_library else 0  # the place of a reduction's axis
    if name in REDUCTIONS and isinstance(func, ast.Attribute) and len(args) > axis:
        for other in axis_mutants(args[axis]):
            yield "wrong axis", ast.Call(func, [*args[:axis], other, *args[axis + 1 :]], keywords)
    has_two = len(args) > 1 and not any(isinstance(arg, ast.Starred) for arg in args[:2])
    if has_two and name not in SYMMETRIC:
        yield "swapped operands", ast.Call(func, [args[1], args[0], *args[2:]], keywords)
    if is_method and name == "detach":
        yield "dropped detach", func.value
    if is_method and name in DROPPED_CALLS:
        yield "dropped term", func.value
    if is_library and args and name in DROPPED_CALLS:
        yield "dropped term", args[0]


def is_library_call(func: ast.expr) -> bool:
    """Whether this is torch.something, math.something and so on, and not a method."""
    module = func.value if isinstance(func, ast.Attribute) else None
    return isinstance(module, ast.Name) and module.id in MODULES


def keyword_mutants(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    """What a call's keyword arguments can be changed to."""
    func, args, keywords = node.func, node.args, node.keywords
    for i, keyword in enumerate(keywords):
        before, after = keywords[:i], keywords[i + 1 :]
        if keyword.arg == "detach":
            yield "dropped detach", ast.Call(func, args, before + after)
        if keyword.arg in ("dim", "axis", "dim1", "dim2", "dims"):
            for other in axis_mutants(keyword.value):
                changed = ast.keyword(keyword.arg, other)
                yield "wrong axis", ast.Call(func, args, [*before, changed, *after])


def binary_mutants(node: ast.BinOp) -> Iterator[tuple[str, ast.AST]]:
    left, op, right = node.left, node.op, node.right
    if type(op) in OPPOSITE:
        yield "sign flip", ast.BinOp(left, OPPOSITE[type(op)](), right)
    if isinstance(op, ORDERED):
        yield "swapped operands", ast.BinOp(right, op, left)
    if isinstance(op, (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)):
        yield "dropped term", left
    if isinstance(op, (ast.Add, ast.Mult)):
        yield "dropped term", right


def comparison_mutants(node: ast.Compare) -> Iterator[tuple[str, ast.AST]]:
    for i, op in enumerate(node.ops):
        ops = [*node.ops[:i], OPPOSITE[type(op)](), *node.ops[i + 1 :]]
        yield "sign flip", ast.Compare(node.left, ops, node.comparators)


def boolean_mutants(node: ast.BoolOp) -> Iterator[tuple[str, ast.AST]]:
    for i in range(len(node.values)):
        rest = node.values[:i] + node.values[i + 1 :]
        yield "dropped term", rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)


def subscript_mutants(node: ast.Subscript) -> Iterator[tuple[str, ast.AST]]:
    match node:
        case ast.Subscript(value=ast.Attribute(attr="shape"), slice=axis):
            for other in axis_mutants(axis):
                yield "wrong axis", ast.Subscript(node.value, other, node.ctx)
        case ast.Subscript(value=array, slice=ast.Tuple(elts=[i, j, *rest])):
            swapped = ast.Tuple([j, i, *rest], ast.Load())
            yield "wrong axis", ast.Subscript(array, swapped, node.ctx)


def constant_mutants(node: ast.Constant) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node.value, bool):
        yield "changed constant", ast.Constant(not node.value)
    elif isinstance(node.value, int):
        yield "changed constant", ast.Constant(node.value + 1)
    elif isinstance(node.value, float):
        yield "changed constant", ast.Constant(2 * node.value or 1.0)


def statement_mutants(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What statements, signs and transpositions can be changed to."""
    match node:
        case ast.AugAssign(target=target, op=op, value=value) if type(op) in OPPOSITE:
            yield "sign flip", ast.AugAssign(target, OPPOSITE[type(op)](), value)
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            yield "sign flip", operand
        case ast.Attribute(value=matrix, attr="T" | "mT"):
            yield "wrong axis", matrix
        case ast.Expr(value=ast.Call()):
            yield "dropped term", ast.Pass()
        case ast.With(items=items, body=body):
            rest = [item for item in items if not no_gradient(item.context_expr)]
            if not rest:
                yield "dropped detach", ast.If(ast.Constant(True), body, [])
            elif len(rest) < len(items):
                yield "dropped detach", ast.With(rest, body)


BY_NODE: dict[type[ast.AST], Callable[..., Iterator[tuple[str, ast.AST]]]] = {
    ast.BinOp: binary_mutants,
    ast.Compare: comparison_mutants,
    ast.BoolOp: boolean_mutants,
    ast.Call: call_mutants,
    ast.Subscript: subscript_mutants,
    ast.Constant: constant_mutants,
}


def mutants_of(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The operators: (name, what the node becomes)."""
    return BY_NODE.get(type(node), statement_mutants)(node)


def no_gradient(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in NO_GRADIENT
    )


# ---- every mutant of a notebook


def functions(tree: ast.AST, outer: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions and methods with their names; a function in a function counts as part of it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield outer + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from functions(node, outer + node.name + ".")


def places(
    node: ast.AST, above: tuple[ast.AST, ...] = ()
) -> Iterator[tuple[ast.AST, str, int | None, tuple]]:
    """All (parent, field, index or None, parents) under a node where something stands that may be changed."""
    above = (*above, node)
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or isinstance(
                child, (ast.arg, ast.JoinedStr, ast.Raise)
            ):
                continue
            yield node, field, i, above
            yield from places(child, above)


def put(parent: ast.AST, field: str, index: int | None, child: ast.AST) -> None:
    if index is None:
        setattr(parent, field, child)
    else:
        getattr(parent, field)[index] = child


def child_of(parent: ast.AST, field: str, index: int | None) -> ast.AST:
    child = getattr(parent, field)
    return child if index is None else child[index]


def shown(
    parent: ast.AST, field: str, index: int | None, old: ast.AST, above: tuple
) -> Callable[[], str]:
    """How a report writes the place: the largest part of the statement around it that is short enough."""
    if isinstance(parent, ast.arguments):
        names = parent.kwonlyargs
        if field == "defaults":
            names = [*parent.posonlyargs, *parent.args][-len(parent.defaults) :]
        return lambda: f"{names[index].arg}={ast.unparse(getattr(parent, field)[index])}"
    if isinstance(old, ast.With):
        return lambda: ast.unparse(child_of(parent, field, index)).splitlines()[0]
    largest: ast.AST | None = None
    for node in reversed(above):
        if hasattr(node, "body") and not isinstance(node, (ast.IfExp, ast.Lambda)):
            break
        if not isinstance(node, (ast.expr, ast.stmt, ast.keyword)):
            continue
        if len(ast.unparse(node)) > LONGEST or "\n" in ast.unparse(node):
            break
        largest = node
    return lambda: ast.unparse(largest or child_of(parent, field, index))


def cell_mutants(notebook: Notebook, cell: int) -> Iterator[Mutant]:
    """Every mutant of an exported cell that compiles; of several with the same text, the first."""
    tree = ast.parse(notebook.cells[cell])
    seen = {ast.unparse(tree)}
    for name, function in functions(tree):
        numbered: Counter[tuple[str, str]] = Counter()
        for parent, field, index, above in list(places(function)):
            old = child_of(parent, field, index)
            text = shown(parent, field, index, old, above)
            before = text()
            for operator, new in mutants_of(old):
                put(parent, field, index, ast.copy_location(new, old))
                source, after = ast.unparse(ast.fix_missing_locations(tree)), text()
                put(parent, field, index, old)
                try:
                    compile(source, "mutant", "exec")
                except (SyntaxError, ValueError):
                    continue
                if source in seen:
                    continue
                seen.add(source)
                numbered[before, after] += 1
                if numbered[before, after] > 1:
                    after += f"  [{numbered[before, after]}]"
                yield Mutant(
                    notebook.stem, notebook.module, name, operator, before, after, cell, source
                )


# ---- running notebooks


class Modules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the package's modules from the exported cells of notebooks instead of the files."""

    def __init__(self, notebooks: list[Notebook]) -> None:
        self.cells = {nb.module: {i: nb.cells[i] for i in nb.exported} for nb in notebooks}

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(name, self) if name in self.cells else None

    def exec_module(self, module: types.ModuleType) -> None:
        for i, source in self.cells[module.__name__].items():
            run_cell(source, module.__dict__, f"<{module.__name__} {i}>")

    def replace(self, mutant: Mutant) -> None:
        name = mutant.module
        self.cells[name] = {**self.cells[name], mutant.cell: mutant.source}
        sys.modules.pop(name, None)


def run_cell(source: str, names: dict[str, Any], title: str) -> None:
    # For code that looks at its own source.
    linecache.cache[title] = len(source), None, source.splitlines(True), title
    exec(compile(source, title, "exec"), names)


def start(notebooks: list[Notebook], notebook: Notebook) -> tuple[Modules, dict[str, Any]]:
    """Make this (forked) process look like a fresh kernel in the notebook's folder."""
    os.chdir(notebook.folder)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Open for as long as the process lives.
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    modules, kernel = Modules(notebooks), types.ModuleType("__main__")
    sys.meta_path.insert(0, modules)
    sys.modules["__main__"] = kernel
    kernel.display = lambda *args, **kwargs: None
    return modules, kernel.__dict__


def in_child(job: Callable[[], Any], limit: float | None) -> Any:
    """What job() returns in a forked copy of this process; a str says how it ended otherwise.

    The limit is in seconds of computing, which depend less on what else the machine does; waiting may take longer.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        if limit:
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 1))
        try:
            answer = job()
        except BaseException as e:
            answer = f"{type(e).__name__}: {e}"[:500]
        with os.fdopen(writer, "wb") as file:
            pickle.dump(answer, file)
        os._exit(0)
    os.close(writer)
    if not select.select([reader], [], [], limit and 10 * limit)[0]:
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(reader, "rb") as file:
        answer = file.read()
    ended_by = os.waitpid(pid, 0)[1] & 127
    if answer:
        return pickle.loads(answer)
    return "it takes too long" if ended_by in (signal.SIGKILL, signal.SIGXCPU) else "it crashes"


def note_calls(notebook: Notebook) -> Notebook:
    """The notebook with exported functions that note when they are called."""
    cells = list(notebook.cells)
    for i in notebook.exported:
        tree = ast.parse(cells[i])
        for name, function in functions(tree):
            place = 1 if ast.get_docstring(function) is not None else 0
            function.body[place:place] = ast.parse(
                f"__called__.add('{notebook.module}.{name}')"
            ).body
        cells[i] = ast.unparse(ast.fix_missing_locations(tree))
    return notebook._replace(cells=cells)


def clean_run(notebooks: list[Notebook], notebook: Notebook) -> tuple[float, set[str]] | str:
    """The seconds that a notebook takes as it is, and the exported functions that it calls; or what goes wrong."""

    def job() -> tuple[float, set[str]]:
        builtins.__called__ = set()
        _, names = start([note_calls(nb) for nb in notebooks], notebook)
        began = time.process_time()
        for i, source in enumerate(note_calls(notebook).cells):
            run_cell(source, names, f"<cell {i}>")
        return time.process_time() - began, builtins.__called__

    return in_child(job, None)


def own_runs(
    notebooks: list[Notebook], notebook: Notebook, mutants: list[Mutant], limit: float
) -> list[str | None]:
    """For each mutant of one cell, how its own notebook fails, or None. The cells before it run once."""
    cell = mutants[0].cell

    def all_of_them() -> list[str | None]:
        modules, names = start(notebooks, notebook)
        for i, source in enumerate(notebook.cells[:cell]):
            run_cell(source, names, f"<cell {i}>")
        # Who had imported it by now would go on with the original.
        if notebook.module in sys.modules:
            raise ImportError("a notebook's own module was imported")
        rests = [partial(rest, mutant, modules, names) for mutant in mutants]
        return [in_child(job, limit) for job in rests]

    def rest(mutant: Mutant, modules: Modules, names: dict[str, Any]) -> None:
        modules.replace(mutant)
        run_cell(mutant.source, names, f"<cell {cell}>")
        for i, source in enumerate(notebook.cells[cell + 1 :], cell + 1):
            run_cell(source, names, f"<cell {i}>")

    answers = in_child(all_of_them, None)
    if isinstance(answers, str):
        raise RuntimeError(f"{notebook.stem}, before its cell {cell}: {answers}")
    return answers


def other_run(
    notebooks: list[Notebook], notebook: Notebook, mutant: Mutant, limit: float
) -> str | None:
    """How a notebook fails that imports the mutant's module, or None."""

    def job() -> None:
        modules, names = start(notebooks, notebook)
        modules.replace(mutant)
        for i, source in enumerate(notebook.cells):
            run_cell(source, names, f"<cell {i}>")

    return in_child(job, limit)


def prepare() -> None:
    """Import what notebooks import, once for all processes to come, and keep each of them to one thread."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["MPLBACKEND"] = "agg"
    os.environ.pop("VAE_NB_SEED_OFFSET", None)
    sys.path.insert(0, str(ROOT))
    sys.dont_write_bytecode = True
    for name in HEAVY:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)


# ---- the report

OPERATORS = [
    "sign flip",
    "swapped operands",
    "dropped term",
    "wrong axis",
    "changed constant",
    "dropped detach",
]


def share(caught: int, count: int) -> str:
    return f"{100 * caught / count:.1f} %" if count else ""


def counts(mutants: list[Mutant], caught: set[str]) -> str:
    return f"{sum(m.id in caught for m in mutants)} / {len(mutants)}" if mutants else ""


def table(mutants: list[Mutant], caught: set[str], argued: set[str]) -> Iterator[str]:
    """Caught of all, by module and operator, and in sum for each folder and altogether."""
    yield "| module | " + " | ".join(OPERATORS) + " | all | share caught | less equivalent |"
    n_columns = len(OPERATORS) + 3
    yield "|---|" + "|".join(["---:"] * n_columns) + "|"
    groups: dict[str, list[Mutant]] = {}
    for m in mutants:
        groups.setdefault(m.place.partition(".")[0], []).append(m)
    for m in mutants:
        groups.setdefault("**derivation**" if m.notebook < "1" else "**library**", []).append(m)
    for title, rows in {**groups, "**all**": mutants}.items():
        by_operator = [[m for m in rows if m.operator == operator] for operator in OPERATORS]
        cells = [counts(some, caught) for some in [*by_operator, rows]]
        n_caught = sum(m.id in caught for m in rows)
        n_equivalent = sum(m.id in argued - caught for m in rows)
        shares = [share(n_caught, len(rows)), share(n_caught, len(rows) - n_equivalent)]
        yield "| " + " | ".join([title, *cells, *shares]) + " |"


def report(mutants: list[Mutant], caught: set[str], reasons: dict[str, str]) -> str:
    """The table and the survivors, as Markdown; nothing in it depends on the day or the machine."""
    left = [m for m in mutants if m.id not in caught]
    lines = [
        "# Mutants",
        "",
        "What `tools/mutate.py` found when it ran last: how many small changes to exported functions of the",
        "derivation, and of the library's densities, objectives and evaluation (the operators are listed at",
        "its head), turn a cell of some notebook red. In the last column, mutants that are argued to be",
        "equivalent don't count.",
        "",
        *table(mutants, caught, set(reasons)),
        "",
        "## Survivors",
        "",
    ]
    for notebook, place in dict.fromkeys((m.notebook, m.place) for m in left):
        lines += [f"### {notebook}: `{place}`", ""]
        for m in left:
            if m.place == place:
                reason = reasons.get(m.id, "**not argued**")
                lines.append(f"- {m.operator}: `{m.before}` → `{m.after}`  \n  {reason}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def stale(
    mutants: list[Mutant], caught: set[str], reasons: dict[str, str], modules: set[str]
) -> list[str]:
    """Reasons for mutants that do not exist or that are caught after all, and so are not equivalent."""
    existing = {m.id for m in mutants}
    return [
        f"{REASONS.name} argues about a mutant that {'is caught' if id in caught else 'does not exist'}: {id}"
        for id in reasons
        if id in caught or (id not in existing and id.split(".")[0] in modules)
    ]


# ---- all together


def chosen(mutants: list[Mutant], only: str | None) -> list[Mutant]:
    """Those of the modules and functions (with a class, all its methods) in a list with commas; all for None."""
    wanted = only.split(",") if only else [""]
    return [m for m in mutants if any(f"{m.place}.".startswith(w and w + ".") for w in wanted)]


def run_clean(
    notebooks: list[Notebook], workers: ProcessPoolExecutor
) -> tuple[dict[str, float], dict[str, set[str]]]:
    """Each notebook's time limit, and the functions it calls. Exits where a notebook fails without any change."""
    runs = workers.map(clean_run, [notebooks] * len(notebooks), notebooks)
    answers = list(tqdm(runs, "as they are", len(notebooks)))
    clean = {nb.stem: answer for nb, answer in zip(notebooks, answers, strict=True)}
    failed = [f"{stem}: {answer}" for stem, answer in clean.items() if isinstance(answer, str)]
    if failed:
        sys.exit("mutants say nothing while a notebook fails as it is:\n" + "\n".join(failed))
    return (
        {stem: PATIENCE * (seconds + 1) for stem, (seconds, _) in clean.items()},
        {stem: called for stem, (_, called) in clean.items()},
    )


def run_all(
    notebooks: list[Notebook], mutants: list[Mutant], jobs: int
) -> dict[str, tuple[str, str] | None]:
    """For every mutant's id, which notebook caught it and with what words, or None."""
    prepare()
    by_name, found = {nb.stem: nb for nb in notebooks}, {}
    by_cell: dict[tuple[str, int], list[Mutant]] = {}
    for mutant in mutants:
        by_cell.setdefault((mutant.notebook, mutant.cell), []).append(mutant)
    chunks = [cell[i : i + CHUNK] for cell in by_cell.values() for i in range(0, len(cell), CHUNK)]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as workers:
        limits, calls = run_clean(notebooks, workers)
        tasks = {}
        for chunk in chunks:
            own = chunk[0].notebook
            tasks[workers.submit(own_runs, notebooks, by_name[own], chunk, limits[own])] = chunk
        with tqdm(total=len(mutants), desc="their own notebooks") as bar:
            for task in as_completed(tasks):
                for mutant, answer in zip(tasks[task], task.result(), strict=True):
                    found[mutant.id] = answer and (mutant.notebook, answer)
                bar.update(len(tasks[task]))
        for stem, notebook in by_name.items():
            left = [
                m
                for m in mutants
                if found[m.id] is None
                and m.notebook != stem
                and f"{m.module}.{m.function}" in calls[stem]
            ]
            count = len(left)
            runs = workers.map(
                other_run, [notebooks] * count, [notebook] * count, left, [limits[stem]] * count
            )
            answers = list(tqdm(runs, f"survivors in {stem}", count))
            for mutant, answer in zip(left, answers, strict=True):
                found[mutant.id] = answer and (stem, answer)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        metavar="MODULE[.FUNCTION],...",
        help="just these; prints the report and writes nothing",
    )
    parser.add_argument(
        "--skip",
        metavar="NN,...",
        default="",
        help="as if these notebooks did not exist, such as 07,08; writes nothing either",
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--verbose", action="store_true", help="print also what caught each mutant")
    options = parser.parse_args()

    notebooks = read_notebooks(set(options.skip.split(",")))
    everything = [m for nb in notebooks for cell in nb.exported for m in cell_mutants(nb, cell)]
    mutants = chosen(everything, options.only)
    if not mutants:
        parser.error(f"nothing to change in {options.only}")
    if options.list:
        for m in mutants:
            print(f"{m.operator:17} {m.id}")
        print(f"{len(mutants)} mutants")
        return 0
    results = run_all(notebooks, mutants, options.jobs)
    if options.verbose:
        for id, answer in results.items():
            print(id, "\n   ", *(answer or ["SURVIVED"]))
    caught = {id for id, answer in results.items() if answer}
    reasons = json.loads(REASONS.read_text(encoding="utf-8")) if REASONS.exists() else {}
    text = report(mutants, caught, reasons)
    print(text)
    if not (options.only or options.skip):
        REPORT.write_text(text, encoding="utf-8")
    faults = stale(everything, caught, reasons, {nb.name for nb in notebooks})
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
