"""Hurt runs of `vae_nb` as a machine may, let them go on, and compare with a run to which nothing happened.

    python benchmarks/faults.py                               all kinds, some 25 minutes on two cores
    python benchmarks/faults.py --quick                       two trials of each kind, to see that all works
    python benchmarks/faults.py --only kills --kills 100      kills alone, more of them
    python benchmarks/faults.py --cases "full disk"           trials whose case has these words
    python benchmarks/faults.py --out results/faults.json     also writes what happened, trial by trial

kills        SIGKILL at a random moment from config.json to the end; one in eight before config.json. Half of the runs
             save after every step, so that kills fall into writes. A third is killed again after resuming. Others are
             killed in a certain phase: in the write of a checkpoint, in the validation, in the report, …
interrupts   Ctrl-C (SIGINT), SIGTERM and SIGHUP, once and twice, in runs that save nothing by themselves: the exit code
             is 128 + the signal's number, model and report are written.
races        Two processes on one run folder at once: one goes on, the other ends with code 2 and one sentence.
strangers    Runs that fail early, beside files of others in their folder: these stay.
outputs      SIGKILL while encode, sample and evaluate write a file: it is whole or not there, and the next try works.
hiccups      Writes that fail for a while and work again: the training goes on. Root for those that mount something.
corruptions  Checkpoint files cut, altered, swapped: the damaged one must be named, and the one before it used.
             A damaged metrics.jsonl costs its damaged lines, with a warning, and not a bit of the weights.
models       Weights and config.json altered, cut, swapped with those of another model: refused in words.
disk         A small tmpfs that is full, or fills up on the way. Needs root, which may mount.
readonly     Folders that are, or become, read-only: by a mount, as permission bits do not stop root, which is needed.

Identical means: the weights byte for byte; metrics.jsonl and report.json but for "seconds"; all figures drawn; no other
files. A run that quietly began again would be identical, too: so the lines of metrics.jsonl that a whole checkpoint
covers must stay as they were, seconds and all. (After damage to metrics.jsonl: identical but for the damaged lines.)
A kill loses nothing that the kernel was given, a power cut may: files that end early, or in zeros, stand for that.
Runs are compared within one machine. Linux; exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 40
STEPS_PER_EPOCH = 19  # 1,197 training examples in minibatches of 64
TRAIN = [
    "train",
    "--data",
    "digits",
    "--latent-dim",
    "2",
    "--hidden",
    "32",
    "--epochs",
    str(EPOCHS),
    "--seed",
    "0",
    "--device",
    "cpu",
]
ITSELF, OTHER_SEED, OTHER_MODEL = "itself", "of another seed", "of another model"
TRAININGS = {
    ITSELF: TRAIN,
    OTHER_SEED: [*TRAIN, "--seed", "1"],
    OTHER_MODEL: [*TRAIN, "--hidden", "16"],
}
FOREIGN = (OTHER_SEED, OTHER_MODEL)
FAILING = [*TRAIN, "--lr", "1e30"]  # not finite in its first epoch
EVERY_STEP, OFTEN, EVERY_SECOND, NEVER = "0", "0.1", "1", "9999"  # seconds between checkpoints
TICK = 0.001  # seconds between two looks at a run
PATIENCE = 600.0  # seconds; what takes longer hangs
# A program that has imported everything, and begins when it gets a line: two of them meet within milliseconds.
WAITING = """
import sys
import torch._dynamo
import vae_nb.app.cli
import vae_nb.explore.plots
import vae_nb.training.trainer
print("ready", flush=True)
sys.stdin.readline()
sys.argv[0] = "vae_nb"
vae_nb.app.cli.main()
"""


@dataclass
class Trial:
    """What was done to a run, and what came of it. exit_codes and stderr have an entry for each process, in order."""

    kind: str
    case: str
    # Of signals: seconds, at first after config.json appeared.
    moments: list[float] = field(default_factory=list)
    exit_codes: list[int] = field(default_factory=list)  # -9: killed
    # The last line, or the one that names what is damaged.
    stderr: list[str] = field(default_factory=list)
    found: dict[str, int] = field(default_factory=dict)  # what the fault left in the folder
    phase: str = ""  # in which the first kill fell, by what it left
    identical: bool | None = None
    failed: list[str] = field(default_factory=list)  # expectations that were not met
    skipped: str = ""

    def expect(self, **met: bool) -> None:
        """Note the expectations that are not met, by name."""
        self.failed += [name for name, holds in met.items() if not holds]

    def begin_again(self) -> None:
        """Forget an attempt that was over before the fault came; what failed in it stays."""
        self.moments = []
        self.exit_codes = []
        self.stderr = []
        self.found = {}
        self.phase = ""


@dataclass
class Stage:
    """What the trials share."""

    folder: Path
    seed: int
    # What comes of the trainings when nothing happens, and what the other commands write.
    undisturbed: dict[str, dict[str, object]] = field(default_factory=dict)
    outputs: dict[str, object] = field(default_factory=dict)
    # Seconds to config.json, and from there on, for each interval of checkpoints.
    times: dict[str, tuple[float, float]] = field(default_factory=dict)

    def run_of(self, trial: Trial) -> Path:
        """The run folder of a trial."""
        return self.folder / trial.case / "run"

    def finished(self, training: str = ITSELF) -> Path:
        """A run to which nothing happened."""
        return self.folder / f"undisturbed {training}, saves every {NEVER} s" / "run"

    def half_way(self, training: str = ITSELF) -> Path:
        """A run that was killed after some epochs."""
        return self.folder / f"half-way {training}" / "run"

    def rng_of(self, trial: Trial) -> random.Random:
        """The random numbers of a trial."""
        return random.Random(f"{trial.case} {self.seed}")


Act = Callable[[Trial], None]
Plan = Iterator[tuple[str, str, Act]]  # kind and case of each trial, and what is to be done
# What is waited for, and what happens then.
Event = tuple[Callable[[], object], Callable[["Job"], object]]


class Job:
    """A process of `vae_nb`.

    Args:
        words: of its command line.
        folder: in which it runs.
        every: seconds between checkpoints.
        waits: whether it begins only when `go` is called.
    """

    def __init__(self, words: list, folder: Path, every: str = NEVER, waits: bool = False) -> None:
        folder.mkdir(exist_ok=True)
        # Open for as long as the process lives.
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        program = [str(Path(sys.executable).with_name("vae_nb"))]
        if waits:
            program = [sys.executable, "-c", WAITING]
        self.process = subprocess.Popen(
            [*program, *words],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "VAE_NB_CHECKPOINT_SECONDS": every},
            stdin=subprocess.PIPE if waits else subprocess.DEVNULL,
            stdout=subprocess.PIPE if waits else subprocess.DEVNULL,
            stderr=self.log,
        )

    def get_ready(self) -> None:
        """Wait until a process that waits has imported everything."""
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def go(self) -> None:
        """Let a process that waits begin."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def is_alive(self) -> bool:
        """Whether the process has not ended."""
        return self.process.poll() is None

    def until(self, holds: Callable[[], object]) -> None:
        """Wait until something holds or the process has ended."""
        while self.is_alive() and not holds():
            time.sleep(TICK)

    def hit(self, seconds: float, sign: int = signal.SIGKILL) -> None:
        """Send a signal after so many seconds, unless the process has ended by then."""
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end)
        self.process.send_signal(sign)

    def stderr(self) -> str:
        """What it has written on stderr until now; it goes on writing at the same place."""
        number = self.log.fileno()
        return os.pread(number, os.fstat(number).st_size, 0).decode(errors="replace")

    def end(self, trial: Trial, *codes: int) -> list[str]:
        """Wait for the end and judge it.

        Args:
            trial: that gets exit code and last line.
            codes: allowed exit codes; -9 for a kill.

        Returns:
            The lines on stderr, less progress bars.
        """
        self.hit(PATIENCE)
        code = self.process.wait()
        text = self.stderr()
        lines = [line.strip() for line in text.splitlines() if line.strip() and "%|" not in line]
        last = lines[-1] if lines else ""
        errors = [line for line in lines if line.startswith("Error:")]
        trial.exit_codes.append(code)
        trial.stderr.append(last)
        trial.expect(
            exit_code=code in codes,
            one_sentence=code not in (1, 2) or errors == [last],
            no_traceback="Traceback" not in text and "Exception ignored" not in text,
        )
        return lines


def train_job(run: Path, every: str, options: list[str] = TRAIN) -> Job:
    """`vae_nb train`: with --resume where the folder holds a config.json, else from the start."""
    words = [*options, "--out", run]
    if (run / "config.json").exists():
        words = ["train", "--resume", run]
    return Job(words, run.parent, every)


# What is in a run folder, judged here and not by the package.


def sha256(content: bytes) -> str:
    """Its digest, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by their names in it."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def checkpoints(run: Path) -> list[Path]:
    """All checkpoints, the newest last."""
    return sorted((run / "checkpoint").glob("*.safetensors"))


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name[:9])


def name_for(step: str, content: bytes) -> str:
    """The name of a checkpoint with this content."""
    return f"{step}-{sha256(content)[:16]}.safetensors"


def intact(run: Path) -> list[Path]:
    """Checkpoints whose names tell the digest of their content, the newest last."""
    paths = []
    for path in checkpoints(run):
        try:
            content = path.read_bytes()
        except OSError:  # a folder, or one that has just been removed
            continue
        if path.name == name_for(path.name[:9], content):
            paths.append(path)
    return paths


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint, damaged or not; -1 if there is none."""
    return max(map(step_of, checkpoints(run)), default=-1)


def epochs(run: Path) -> list[str]:
    """The lines of metrics.jsonl."""
    try:
        return (run / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return []


def has_epochs(run: Path, count: int) -> bool:
    """Whether so many epochs are recorded."""
    return len(epochs(run)) >= count


def covered(run: Path) -> list[str]:
    """The records that the newest intact checkpoint covers: they must never be lost."""
    step = max(map(step_of, intact(run)), default=0)
    return epochs(run)[: max(0, step - 1) // STEPS_PER_EPOCH]


def figures(run: Path) -> dict[str, bool]:
    """The figures by name, and whether they are whole."""
    paths = sorted(run.glob("figures/*"))
    return {path.name: path.read_bytes().endswith(b"IEND\xaeB`\x82") for path in paths}


def has_report(run: Path) -> bool:
    """Whether there are a report and figures, whole."""
    path = run / "report.json"
    if not path.exists() or "log_px" not in json.loads(path.read_text()):
        return False
    drawn = figures(run)
    return len(drawn) > 0 and all(drawn.values())


def has_model(run: Path) -> bool:
    """Whether there are, under one of two names, the weights whose digest is in config.json."""
    digest = json.loads((run / "config.json").read_text()).get("weights_sha256")
    paths = [run / "model.safetensors", run / "model.safetensors.new"]
    return digest in [sha256(path.read_bytes()) for path in paths if path.exists()]


def state(run: Path) -> dict[str, int]:
    """What a fault left, in numbers."""
    return {
        "epochs": len(epochs(run)),
        "checkpoints": len(checkpoints(run)),
        "whole": len(intact(run)),
        "step": max(map(step_of, intact(run)), default=-1),
        "parts": len([*run.rglob("*.part")]),
    }


def timeless(text: str) -> dict:
    """A JSON object without its seconds."""
    return {key: value for key, value in json.loads(text).items() if key != "seconds"}


def outcome(run: Path) -> dict[str, object]:
    """What two runs must have in common."""
    others = [name for name in contents(run) if not name.startswith("checkpoint/")]
    return {
        "weights": (run / "model.safetensors").read_bytes(),
        "model": has_model(run),
        "metrics": [timeless(line) for line in epochs(run)],
        "report": timeless((run / "report.json").read_text()),
        "figures": figures(run),
        "files": sorted(others),
        "parts": len([*run.rglob("*.part")]),
    }


def was_validating(run: Path) -> bool:
    """Whether the last step of an epoch is saved, and not yet its record."""
    step = newest_step(run)
    return step > 0 and step % STEPS_PER_EPOCH == 0 and len(epochs(run)) < step / STEPS_PER_EPOCH


def phase_of(run: Path) -> str:
    """The phase in which a run was killed, by what it left."""
    if not (run / "config.json").exists():
        return "start-up"
    if (run / "report.json").exists():
        return "end"
    if (run / "figures").exists():
        return "figures"
    if (run / "README.md").exists():
        return "report"
    if [*run.glob("model.safetensors*")]:
        return "model"
    if [*run.glob("checkpoint/*.part")]:
        return "checkpoint"
    return "validation" if was_validating(run) else "steps"


# Trials.


def hurt(
    run: Path,
    every: str,
    trial: Trial,
    codes: tuple[int, ...],
    *events: Event,
    options: list[str] = TRAIN,
) -> list[str]:
    """A training, what happens to it, and its end. Files must survive an error, and be whole.

    Args:
        run: its folder.
        every: seconds between checkpoints.
        trial: that gets what was found.
        codes: allowed exit codes.
        events: what is waited for and what happens then, one after the other.
        options: of a new run.

    Returns:
        The lines on stderr.
    """
    before = contents(run)
    damaged = {*checkpoints(run)} - {*intact(run)}
    kept = covered(run)
    job = train_job(run, every, options)
    for is_time, act in events:
        job.until(is_time)
        act(job)
    lines = job.end(trial, *codes)
    trial.found = trial.found or state(run)
    if trial.exit_codes[-1] in (1, 2):
        before.pop("metrics.jsonl", None)  # the records after the checkpoint are made anew
        trial.expect(
            untouched=before.items() <= contents(run).items(),
            records_stay=epochs(run)[: len(kept)] == kept,
        )
    trial.expect(whole={*checkpoints(run)} - {*intact(run)} <= damaged)
    return lines


def compare(stage: Stage, run: Path, trial: Trial, kept: list[str], training: str = ITSELF) -> None:
    """Compare a run that has come to its end with one to which nothing happened.

    Args:
        stage: with the other.
        run: its folder.
        trial: that is judged.
        kept: the first records, which it must still have.
        training: which one it is.
    """
    expected = stage.undisturbed[training]
    differ = [name for name, value in outcome(run).items() if value != expected[name]]
    trial.identical = not differ
    trial.expect(
        goes_on=epochs(run)[: len(kept)] == kept, **{f"same_{name}": False for name in differ}
    )


def finish(stage: Stage, run: Path, every: str, trial: Trial) -> None:
    """Let a hurt run, in which nothing is damaged, come to its end, and compare."""
    kept = covered(run)
    lines = train_job(run, every).end(trial, 0)
    trial.expect(no_warning="Warning" not in " ".join(lines))
    compare(stage, run, trial, kept)


# Preparation.


def undisturbed(stage: Stage, training: str, every: str, trial: Trial) -> None:
    """A run to which nothing happens."""
    run = stage.run_of(trial)
    begun = time.monotonic()
    job = train_job(run, every, TRAININGS[training])
    job.until((run / "config.json").exists)
    startup = time.monotonic() - begun
    job.end(trial, 0)
    if training == ITSELF:
        stage.times[every] = startup, time.monotonic() - begun - startup
    trial.found = state(run)
    expected = stage.undisturbed.setdefault(training, outcome(run))
    trial.identical = outcome(run) == expected  # however often it saves
    trial.expect(
        identical=trial.identical,
        all_epochs=trial.found["step"] == EPOCHS * STEPS_PER_EPOCH,
        model=has_model(run),
        report=has_report(run),
    )


def stop_half_way(stage: Stage, training: str, trial: Trial) -> None:
    """A run that is killed, for the trials to go on from."""
    run = stage.run_of(trial)
    n = 15 if training == ITSELF else 25
    options = TRAININGS[training]
    is_time = partial(has_epochs, run, n)
    hurt(run, EVERY_STEP, trial, (-9,), (is_time, lambda job: job.hit(0)), options=options)
    trial.expect(two_whole_checkpoints=len(intact(run)) >= 2)


def preparation(stage: Stage) -> Plan:
    """The runs that trials compare with, or go on from."""
    saves = [(ITSELF, NEVER), (ITSELF, EVERY_STEP), (ITSELF, EVERY_SECOND)]
    for training, every in [*saves, (OTHER_SEED, NEVER), (OTHER_MODEL, NEVER)]:
        case = f"undisturbed {training}, saves every {every} s"
        yield "undisturbed", case, partial(undisturbed, stage, training, every)
    for training in TRAININGS:
        case = f"half-way {training}"
        yield "half-way", case, partial(stop_half_way, stage, training)


# Kills.


def kill(stage: Stage, number: int, trial: Trial) -> None:
    """A kill at a random moment, perhaps one more after resuming."""
    rng = stage.rng_of(trial)
    run = stage.run_of(trial)
    early = number % 8 == 7
    every = (EVERY_STEP, EVERY_SECOND)[number % 2]
    startup, rest = stage.times[every]
    moment = rng.uniform(0, startup if early else rest)

    def killed(begins: Callable[[], object], seconds: float) -> None:
        hurt(run, every, trial, (-9, 0), (begins, lambda job: job.hit(seconds)))
        trial.moments.append(seconds)
        trial.phase = trial.phase or phase_of(run)

    while -9 not in trial.exit_codes:  # one that ended by itself is taken again, and killed sooner
        shutil.rmtree(run, ignore_errors=True)
        trial.begin_again()
        moment *= 0.9
        killed(lambda: early or (run / "config.json").exists(), moment)
    if number % 3 == 0:
        killed(lambda: True, rng.uniform(0, startup + rest / 2))
    finish(stage, run, every, trial)


def has_arrived(run: Path, phase: str) -> bool:
    """Whether a run is in a phase now."""
    if phase == "start-up":
        return (run / "config.json.part").exists()
    if phase == "checkpoint":
        return any(run.glob("checkpoint/*.part"))
    if phase == "validation":
        return was_validating(run)
    if phase == "model":
        return any(run.glob("model.safetensors*"))
    if phase == "report":
        return (run / "README.md").exists()
    return any(run.glob("figures/*.png"))


EACH_EPOCH = ("checkpoint", "validation")  # phases that come again in each
TRIES = 20  # of a kill that must fall into something short
# Seconds in the phase at most, before the kill: phases are as short as that.
LATEST = {
    "start-up": 0.0,
    "checkpoint": 0.001,
    "validation": 0.002,
    "model": 0.002,
    "report": 0.3,
    "figures": 0.3,
}


def kill_in_phase(stage: Stage, phase: str, trial: Trial) -> None:
    """A kill in a certain phase; tried again where it came too late."""
    rng = stage.rng_of(trial)
    run = stage.run_of(trial)
    for attempt in range(TRIES):
        shutil.rmtree(run, ignore_errors=True)
        trial.begin_again()
        trial.moments = [rng.uniform(0, LATEST[phase]) / (1 + attempt)]  # sooner, after a miss
        events: list[Event] = [
            (partial(has_arrived, run, phase), lambda job: job.hit(trial.moments[0]))
        ]
        if phase in EACH_EPOCH:
            epoch = rng.randrange(1, EPOCHS - 5)
            events.insert(0, (partial(has_epochs, run, epoch), lambda job: None))
        hurt(run, EVERY_STEP, trial, (-9, 0), *events)
        trial.phase = phase_of(run)
        if trial.phase == phase:
            break
    trial.expect(**{f"killed_in_{phase}": trial.phase == phase})
    finish(stage, run, EVERY_SECOND, trial)


def kill_while_replacing(stage: Stage, delay: float, trial: Trial) -> None:
    """A kill while the model of an interrupted run is replaced by a better one."""
    run = stage.run_of(trial)
    ten_epochs = partial(has_epochs, run, 10)
    hurt(run, NEVER, trial, (143,), (ten_epochs, lambda job: job.hit(0, signal.SIGTERM)))
    interrupted = shutil.copytree(run, run.with_name("interrupted"))

    def is_replaced() -> bool:
        return any(run.glob("model.safetensors.new*"))

    for _ in range(TRIES):
        shutil.rmtree(run)
        shutil.copytree(interrupted, run)
        hurt(run, NEVER, trial, (-9, 0), (is_replaced, lambda job: job.hit(delay)))
        if trial.exit_codes[-1] == -9:
            break
    trial.moments = [delay]
    trial.phase = "model"
    trial.found = state(run)
    trial.expect(killed_in_time=trial.exit_codes[-1] == -9, one_model=has_model(run))
    finish(stage, run, EVERY_SECOND, trial)


def planned_kills(stage: Stage, count: int) -> Plan:
    """So many kills at random moments, and those in certain phases."""
    for i in range(count):
        yield "kills", f"kill {i}", partial(kill, stage, i)
    for phase in LATEST:
        for i in range(1, 3):
            yield "kills", f"kill in phase {phase}, {i}", partial(kill_in_phase, stage, phase)
    for delay in (0.0, 0.002):
        case = f"kill while the model is replaced, {delay} s on"
        yield "kills", case, partial(kill_while_replacing, stage, delay)


# Signals.


SIGNAL_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


def interrupt(
    stage: Stage, sign: signal.Signals, place: int | str, gap: float | None, trial: Trial
) -> None:
    """A signal, and its exit code, model and report; then the rest of the run.

    Args:
        stage: with the undisturbed run.
        sign: the signal.
        place: an epoch, or "report" or "figures".
        gap: seconds to one more; None for one only.
        trial: that is judged.
    """
    run = stage.run_of(trial)
    trial.moments = [stage.rng_of(trial).uniform(0, 0.05)]
    if gap is not None:
        trial.moments.append(gap)
    if place == 1:
        is_time = (run / "checkpoint").exists
    elif isinstance(place, int):
        is_time = partial(has_epochs, run, place - 1)
    else:
        is_time = partial(has_arrived, run, place)
    events = [(is_time, partial(Job.hit, seconds=s, sign=sign)) for s in trial.moments]
    hurt(run, NEVER, trial, (128 + sign,), *events)
    trial.expect(saves=trial.found["step"] > 0, model=has_model(run))
    wants_report = (gap is None and isinstance(place, int)) or sign == signal.SIGHUP
    trial.expect(report=not wants_report or has_report(run))
    finish(stage, run, NEVER, trial)


def interrupt_start_up(stage: Stage, sign: signal.Signals, trial: Trial) -> None:
    """A signal before anything is trained; then the run from its beginning."""
    run = stage.run_of(trial)
    startup, _ = stage.times[NEVER]
    trial.moments = [stage.rng_of(trial).uniform(0.1, 0.6) * startup]

    def at_once() -> bool:
        return True

    event = (at_once, partial(Job.hit, seconds=trial.moments[0], sign=sign))
    hurt(run, NEVER, trial, (-sign, 128 + sign), event)
    finish(stage, run, NEVER, trial)


def interrupt_repeatedly(stage: Stage, trial: Trial) -> None:
    """A run that gets SIGTERM each time that it has gone on for some epochs."""
    run = stage.run_of(trial)
    for n in (5, 15, 25):
        is_time = partial(has_epochs, run, n)
        hurt(run, NEVER, trial, (143,), (is_time, partial(Job.hit, seconds=0, sign=signal.SIGTERM)))
        trial.expect(saves=newest_step(run) >= n * STEPS_PER_EPOCH, report=has_report(run))
    finish(stage, run, NEVER, trial)


def planned_interrupts(stage: Stage) -> Plan:
    """Each signal in training and report, once and twice."""
    places: dict[signal.Signals, list[int | str]] = {
        signal.SIGTERM: [1, 2, 5, 9, 14, 18, 23, 29, 34, "report", "figures"],
        signal.SIGHUP: [1, 7, 25, "report"],
        signal.SIGINT: [1, 3, 25, "report"],
    }
    twice = [(signal.SIGINT, 10, 0.02), (signal.SIGINT, 20, 0.5), (signal.SIGTERM, 12, 0.02)]
    for sign, name in SIGNAL_NAMES.items():
        for place in places[sign]:
            where = f"epoch {place}" if isinstance(place, int) else f"the {place}"
            act = partial(interrupt, stage, sign, place, None)
            yield "interrupts", f"{name} in {where}", act
    for sign, place, gap in twice:
        case = f"{SIGNAL_NAMES[sign]} in epoch {place} and {gap} s on"
        yield "interrupts", case, partial(interrupt, stage, sign, place, gap)
    for sign in (signal.SIGTERM, signal.SIGHUP):
        case = f"{SIGNAL_NAMES[sign]} before anything is trained"
        yield "interrupts", case, partial(interrupt_start_up, stage, sign)
    yield (
        "interrupts",
        "SIGTERM three times, resumed each time",
        partial(interrupt_repeatedly, stage),
    )


# Races.


def release(jobs: list[Job], gap: float) -> None:
    """Let processes that wait begin, one after the other."""
    for job in jobs:
        job.get_ready()
    for job in jobs:
        job.go()
        time.sleep(gap)


def race_of_resumes(stage: Stage, gap: float, trial: Trial) -> None:
    """Two processes resume one run at once."""
    run = stage.run_of(trial)
    shutil.copytree(stage.half_way(), run)
    kept = covered(run)
    words = ["train", "--resume", run]
    jobs = [Job(words, run.parent, EVERY_SECOND, waits=True) for _ in range(2)]
    release(jobs, gap)
    for job in jobs:
        job.end(trial, 0, 2)
    trial.expect(one_goes_on=sorted(trial.exit_codes) == [0, 2])
    compare(stage, run, trial, kept)


def race_of_trainings(stage: Stage, pair: tuple[str, str], gap: float, trial: Trial) -> None:
    """Two trainings begin in one new folder at once."""
    run = stage.run_of(trial)
    jobs = []
    for training in pair:
        words = [*TRAININGS[training], "--out", run]
        jobs.append(Job(words, run.parent, EVERY_SECOND, waits=True))
    release(jobs, gap)
    for job in jobs:
        job.end(trial, 0, 2)
    trial.expect(one_goes_on=sorted(trial.exit_codes) == [0, 2])
    compare(stage, run, trial, [], pair[trial.exit_codes.index(0)])


def second_beside_first(stage: Stage, words: list[str], trial: Trial) -> None:
    """A process that wants the folder of a run in progress, or of one that is evaluated."""
    run = stage.run_of(trial)
    first = train_job(run, EVERY_STEP)
    second = Job([*words, run], run.parent, EVERY_STEP, waits=True)
    second.get_ready()
    first.until(partial(has_epochs, run, 5))
    second.go()
    second.end(trial, 2)
    is_beside = first.is_alive()
    first.end(trial, 0)
    trial.expect(beside=is_beside)
    compare(stage, run, trial, [])


def race_with_failing(stage: Stage, failing_first: bool, gap: float, trial: Trial) -> None:
    """Two trainings begin in one new folder at once, and one of them is bound to fail early."""
    run = stage.run_of(trial)
    sound = Job([*TRAIN, "--out", run], run.parent, EVERY_SECOND, waits=True)
    failing = Job([*FAILING, "--out", run], run.parent, EVERY_SECOND, waits=True)
    release([failing, sound] if failing_first else [sound, failing], gap)
    sound.end(trial, 0, 2)
    failing.end(trial, 1, 2)
    trial.expect(one_is_refused=trial.exit_codes in ([0, 2], [2, 1], [0, 1]))
    if trial.exit_codes[0] == 2:
        trial.expect(nothing_left=not run.exists())
        finish(stage, run, EVERY_SECOND, trial)
    else:
        compare(stage, run, trial, [])


def planned_races(stage: Stage) -> Plan:
    """Two processes on one folder, at the same moment or one beside the other."""
    gaps = (0.0, 0.05)
    for gap in gaps:
        case = f"two resumes, {gap} s apart"
        yield "races", case, partial(race_of_resumes, stage, gap)
    for gap in gaps:
        case = f"two trainings, {gap} s apart"
        yield "races", case, partial(race_of_trainings, stage, (ITSELF, ITSELF), gap)
    for gap in gaps:
        case = f"two trainings with other seeds, {gap} s apart"
        yield "races", case, partial(race_of_trainings, stage, (OTHER_SEED, ITSELF), gap)
    for first in (True, False):
        order = "before" if first else "after"
        case = f"a training that fails, begun {order} a sound one"
        yield "races", case, partial(race_with_failing, stage, first, 0.02)
    words = {"a resume": ["train", "--resume"], "a training": [*TRAIN, "--out"]}
    for name, these in words.items():
        yield "races", f"{name} beside a living run", partial(second_beside_first, stage, these)


# Files of others.


STRANGERS = {
    "notes.txt": b"precious",
    "sub/notes.txt": b"precious, too",
    "checkpoint/notes.txt": b"mine",
    "figures/mine.png": b"a picture",
    "tensorboard/notes.txt": b"mine",
}


def put_strangers(run: Path) -> None:
    """Put files into a run folder that are not of the run."""
    for name, content in STRANGERS.items():
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def fail_early(stage: Stage, is_there: bool, strangers: bool, trial: Trial) -> None:
    """A training that fails in its first epoch takes back its own files, and nothing else.

    Args:
        stage: for the folder.
        is_there: whether the run folder is there before, empty.
        strangers: whether others put files into it meanwhile.
        trial: that is judged.
    """
    run = stage.run_of(trial)
    run.parent.mkdir()
    if is_there:
        run.mkdir()
    job = Job([*FAILING, "--out", run], run.parent, EVERY_STEP)
    job.until((run / "config.json").exists)
    job.process.send_signal(signal.SIGSTOP)
    trial.expect(in_time=(run / "config.json").exists())
    if strangers:
        put_strangers(run)
    job.process.send_signal(signal.SIGCONT)
    job.end(trial, 1)
    expected = STRANGERS if strangers else {}
    trial.expect(
        strangers_stay=contents(run) == expected,
        folder_stays=run.exists() == (is_there or strangers),
    )
    if strangers:
        Job([*TRAIN, "--out", run], run.parent).end(trial, 2)
        trial.expect(strangers_stay_again=contents(run) == expected)


def train_over_finished(stage: Stage, options: list[str], trial: Trial) -> None:
    """A training that is to begin where there is a finished run."""
    run = stage.run_of(trial)
    shutil.copytree(stage.finished(), run)
    before = contents(run)
    Job([*options, "--out", run], run.parent).end(trial, 2)
    trial.identical = contents(run) == before
    trial.expect(untouched=trial.identical)


def planned_strangers(stage: Stage) -> Plan:
    """Runs that fail, or may not begin, in folders with and without files of others."""
    for is_there in (False, True):
        for strangers in (False, True):
            folder = "an empty folder" if is_there else "a new folder"
            others = "with" if strangers else "without"
            case = f"fails in {folder}, {others} files of others"
            yield "strangers", case, partial(fail_early, stage, is_there, strangers)
    for name, options in {"a training": TRAIN, "a failing training": FAILING}.items():
        case = f"{name} in the folder of a finished run"
        yield "strangers", case, partial(train_over_finished, stage, options)


# What the other commands write.


N_EXAMPLES = 20_000  # of counts, to encode
OUTPUTS = {  # name of the file: words of the command; RUN and EXAMPLES stand for paths
    "codes.npz": ["encode", "RUN", "--data", "EXAMPLES", "--k", "1", "--out"],
    "codes.csv": ["encode", "RUN", "--data", "EXAMPLES", "--k", "1", "--out"],
    "samples.npz": ["sample", "RUN", "--n", "100000", "--out"],
    "samples.png": ["sample", "RUN", "--out"],
    "evaluated.json": ["evaluate", "RUN", "--k", "10", "--out"],
}


def output_job(stage: Stage, run: Path, out: Path) -> Job:
    """The command that writes this file about a run."""
    paths = {"RUN": run, "EXAMPLES": stage.folder / "examples.npy"}
    words = [paths.get(word, word) for word in OUTPUTS[out.name]]
    return Job([*words, out], out.parent)


def output_of(out: Path) -> object:
    """What a file must have in common with another."""
    return timeless(out.read_text()) if out.suffix == ".json" else out.read_bytes()


def write_undisturbed(stage: Stage, name: str, trial: Trial) -> None:
    """A file that is written while nothing happens."""
    run = stage.finished()
    before = contents(run)
    out = stage.folder / trial.case / name
    output_job(stage, run, out).end(trial, 0)
    stage.outputs[name] = output_of(out)
    trial.found = {"bytes": out.stat().st_size}
    trial.expect(untouched=contents(run) == before)


def write_again(stage: Stage, run: Path, out: Path, trial: Trial) -> None:
    """The next try, after one that failed, and its comparison."""
    trial.expect(nothing_there=not out.exists())
    output_job(stage, run, out).end(trial, 0)
    trial.identical = output_of(out) == stage.outputs[out.name]
    trial.expect(identical=trial.identical, no_parts=not part_of(out).exists())


def part_of(out: Path) -> Path:
    """The name of a file while it is written."""
    return out.with_name(out.name + ".part")


def kill_output(stage: Stage, name: str, latest: float, trial: Trial) -> None:
    """A kill while a file is written; tried again where it came too late."""
    rng = stage.rng_of(trial)
    run = stage.run_of(trial)
    shutil.copytree(stage.finished(), run)
    before = contents(run)
    out = run.parent / name
    for attempt in range(TRIES):
        trial.moments = [rng.uniform(0, latest) / (1 + attempt)]  # sooner, after a miss
        job = output_job(stage, run, out)
        job.until(part_of(out).exists)
        job.hit(trial.moments[0])
        job.end(trial, -9, 0)
        if not out.exists() and part_of(out).exists():
            break
        if out.exists():
            trial.expect(whole=output_of(out) == stage.outputs[name])
            out.unlink()
    was_writing = part_of(out).exists()
    trial.expect(killed_while_writing=was_writing)
    trial.found = {"bytes": part_of(out).stat().st_size if was_writing else 0}
    write_again(stage, run, out, trial)
    trial.expect(untouched=contents(run) == before)


def planned_outputs(stage: Stage) -> Plan:
    """Each command, killed at once and a little later."""
    for name in OUTPUTS:
        for latest in (0.0, 0.03 if name == "samples.npz" else 0.001):
            case = f"kill while {name} is written, up to {latest} s on"
            yield "outputs", case, partial(kill_output, stage, name, latest)


# Damage.


def spoiled(content: bytes, rng: random.Random) -> dict[str, bytes]:
    """What may become of a safetensors file."""
    half, header = len(content) // 2, 8 + int.from_bytes(content[:8], "little")

    def flipped(at: int) -> bytes:
        return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]

    opens = b"cbuiltins\nopen\n(S'unpickled'\nS'w'\ntR."  # a pickle: unpickled, it makes a file
    return {
        "cut to half": content[:half],
        "a pickle": opens,
        "a text": b"Nothing.",
        "empty": b"",
        "a byte short": content[:-1],
        "ends in zeros": content[:half] + bytes(len(content) - half),
        "random bytes": rng.randbytes(len(content)),
        "bit flipped in the header": flipped(rng.randrange(header)),
        "bit flipped in the tensors": flipped(rng.randrange(header, len(content))),
    }


def damages(stage: Stage) -> dict[str, tuple[str, Callable[[Path], object]]]:
    """What must follow, and what is done to the checkpoint/ of the run that was cut off: where not said, to the newest."""
    newest = checkpoints(stage.half_way())[-1].name
    content = (stage.half_way() / "checkpoint" / newest).read_bytes()
    contents_of = spoiled(content, random.Random(stage.seed))

    def put(content: bytes, fits: bool, folder: Path) -> None:
        (folder / newest).unlink()  # fits: under a name with its digest, as a forger would
        (folder / (name_for(newest[:9], content) if fits else newest)).write_bytes(content)

    def cut(*paths: Path) -> None:
        for path in paths:
            path.write_bytes(path.read_bytes()[:-50])

    def replace_by_folder(folder: Path) -> None:
        (folder / newest).unlink()
        (folder / newest).mkdir()

    return {
        **{name: ("named", partial(put, content, False)) for name, content in contents_of.items()},
        **{
            f"{name}, well named": ("named", partial(put, contents_of[name], True))
            for name in [*contents_of][:3]
        },
        **{
            f"one {name}": ("named", partial(shutil.copy, intact(stage.half_way(name))[-1]))
            for name in FOREIGN
        },
        "a folder in its place": ("named", replace_by_folder),
        "never renamed": ("ignored", lambda at: (at / newest).rename(at / f"{newest}.part")),
        "config.json cut": ("refused", lambda at: cut(at.parent / "config.json")),
        "all checkpoints cut": ("refused", lambda at: cut(*at.glob("*.safetensors"))),
    }


def corruption(stage: Stage, follows: str, act: Callable[[Path], object], trial: Trial) -> None:
    """A run that was cut off goes on from damaged files, or is refused."""
    run = stage.run_of(trial)
    shutil.copytree(stage.half_way(), run)
    before_newest = step_of(intact(run)[-2])
    kept = epochs(run)[: (before_newest - 1) // STEPS_PER_EPOCH]
    act(run / "checkpoint")
    trial.found = state(run)
    newest = checkpoints(run)[-1].name
    if follows == "refused":
        hurt(run, EVERY_SECOND, trial, (2,))
        return
    lines = train_job(run, EVERY_SECOND).end(trial, 0)
    naming = [line for line in lines if newest in line]
    trial.stderr = naming[:1] or trial.stderr
    trial.expect(
        named=follows == "ignored" or naming != [],
        not_unpickled=not (run.parent / "unpickled").exists(),
    )
    compare(stage, run, trial, kept)


def history_damages(rng: random.Random) -> dict[str, Callable[[list[str]], list[str] | None]]:
    """What is done to the lines of metrics.jsonl; None removes the file."""
    zeros = bytes(100).decode()

    def number_changed(lines: list[str]) -> list[str]:
        record = json.loads(lines[4])
        record["train_elbo"] += 1
        return [*lines[:4], json.dumps(record), *lines[5:]]

    return {
        "missing": lambda lines: None,
        "empty": lambda lines: [],
        "cut in a line": lambda lines: [*lines[:9], lines[9][:-50]],
        "without its last lines": lambda lines: lines[:6],
        "with a line of zeros": lambda lines: [*lines[:3], zeros, *lines[4:]],
        "with a line of random bytes": lambda lines: [
            *lines[:7],
            rng.randbytes(100).decode("latin-1").replace("\n", ""),
            *lines[8:],
        ],
        "with a line that is JSON but no record": lambda lines: [*lines[:2], "null", *lines[3:]],
        "with a line that is another object": lambda lines: [*lines[:2], '{"a": 1}', *lines[3:]],
        "with a number changed": number_changed,
    }


def history_damage(
    stage: Stage, act: Callable[[list[str]], list[str] | None], trial: Trial
) -> None:
    """A damaged metrics.jsonl: the weights are the same, lines that are not damaged stay, a warning names the file."""
    run = stage.run_of(trial)
    shutil.copytree(stage.half_way(), run)
    path = run / "metrics.jsonl"
    kept = covered(run)
    damaged = act(epochs(run))
    if damaged is None:
        path.unlink()
    else:
        path.write_text("".join(f"{line}\n" for line in damaged), encoding="latin-1")
    sound = [line for line in kept if line in (damaged or [])]
    trial.found = state(run)
    lines = train_job(run, EVERY_SECOND).end(trial, 0)
    naming = [line for line in lines if "metrics.jsonl" in line]
    trial.stderr = naming[:1] or trial.stderr
    compare_but_history(stage, run, sound, len(kept), trial)
    trial.expect(named=naming != [])


def compare_but_history(
    stage: Stage, run: Path, sound: list[str], n_kept: int, trial: Trial
) -> None:
    """Compare a run whose metrics.jsonl was damaged.

    Args:
        stage: with the undisturbed run.
        run: its folder.
        sound: the lines that were not damaged.
        n_kept: the number of epochs that the checkpoint covered.
        trial: that is judged.
    """
    expected = stage.undisturbed[ITSELF]
    now = outcome(run)
    differ = [name for name in expected if name != "metrics" and now[name] != expected[name]]
    lines = epochs(run)
    made_anew = [timeless(line) for line in lines[len(lines) - (EPOCHS - n_kept) :]]
    all_anew = expected["metrics"][n_kept:]  # type: ignore[index]  # a list
    trial.identical = not differ
    trial.expect(
        sound_lines_stay=[line for line in lines if line in sound] == sound,
        later_lines=made_anew == all_anew,
        **{f"same_{name}": False for name in differ},
    )


def planned_corruptions(stage: Stage) -> Plan:
    """Each damage to the checkpoints, config.json and metrics.jsonl of a run that was cut off."""
    for case, damage in damages(stage).items():
        yield "corruptions", case, partial(corruption, stage, *damage)
    for name, act in history_damages(random.Random(stage.seed)).items():
        yield "corruptions", f"metrics.jsonl {name}", partial(history_damage, stage, act)


def model_damages(stage: Stage) -> dict[str, dict[str, bytes | None]]:
    """What the files of a finished run are replaced by; None removes one."""
    weights = (stage.finished() / "model.safetensors").read_bytes()
    config = (stage.finished() / "config.json").read_bytes()
    contents_of = spoiled(weights, random.Random(stage.seed))
    content: dict[str, dict[str, bytes | None]] = {
        f"weights: {name}": {"model.safetensors": content} for name, content in contents_of.items()
    }
    for name in FOREIGN:
        other = stage.finished(name)
        content[f"weights {name}"] = {
            "model.safetensors": (other / "model.safetensors").read_bytes()
        }
        content[f"config.json {name}"] = {"config.json": (other / "config.json").read_bytes()}
    content["no weights"] = {"model.safetensors": None}
    content["config.json cut"] = {"config.json": config[:-50]}
    content["config.json empty"] = {"config.json": b""}
    return content


def refuse_model(
    stage: Stage, words: list[str], replaced: dict[str, bytes | None], trial: Trial
) -> None:
    """A command about a run whose files do not fit: refused in one sentence that names the file.

    Args:
        stage: with the finished run.
        words: of the command; RUN stands for its folder, OUT for what it is to write.
        replaced: what the files are replaced by.
        trial: that is judged.
    """
    run = stage.run_of(trial)
    shutil.copytree(stage.finished(), run)
    for name, content in replaced.items():
        (run / name).unlink()
        if content is not None:
            (run / name).write_bytes(content)
    before = contents(run)
    out = run.parent / ("out" if "train" in words else "out.npz")
    paths = {"RUN": run, "OUT": out}
    Job([paths.get(word, word) for word in words], run.parent).end(trial, 2)
    names = ("model.safetensors", "config.json", "weights")
    trial.expect(
        named=any(name in trial.stderr[-1] for name in names),
        untouched=contents(run) == before,
        nothing_written=not out.exists(),
    )


def planned_models(stage: Stage) -> Plan:
    """Each damage to a model, with the commands in turn; and one as the beginning of a training."""
    commands = [
        ["evaluate", "RUN", "--k", "2"],
        ["sample", "RUN", "--out", "OUT"],
        ["encode", "RUN", "--k", "2", "--out", "OUT"],
        [*TRAIN, "--start", "RUN", "--out", "OUT"],
    ]
    for i, (case, replaced) in enumerate(model_damages(stage).items()):
        words = commands[i % len(commands)]
        yield "models", f"{words[0]}, {case}", partial(refuse_model, stage, words, replaced)


# Disks.


@contextmanager
def mounted(place: Path, *words: str | Path) -> Iterator[None]:
    """Within, something is mounted at a place."""
    subprocess.run(["mount", *words, place], check=True, stderr=subprocess.PIPE, text=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(path: Path, room: int = 0) -> None:
    """Add to a file until nothing more fits on its disk but `room` bytes."""
    with open(path, "ab", buffering=0) as f:
        try:
            while True:
                f.write(bytes(4096))
        except OSError:
            f.truncate(max(0, f.tell() - room))


def checkpoint_size(stage: Stage) -> int:
    """Bytes of a checkpoint."""
    return intact(stage.half_way())[-1].stat().st_size


TMPFS = ("-t", "tmpfs", "-o", "size=64m", "tmpfs")


def disk(
    stage: Stage, every: str, room: float, full: Callable[[Path], bool], resume: bool, trial: Trial
) -> None:
    """A disk with room for so many checkpoints at first, and for nothing once `full` holds of the run's folder."""
    run = stage.run_of(trial)
    place = run.parent
    other = place / "other"
    place.mkdir()
    with mounted(place, *TMPFS):
        if resume:
            shutil.copytree(stage.half_way(), run)
        fill(other, int(room * checkpoint_size(stage)))
        is_full = partial(full, run)
        hurt(run, every, trial, (1, 2), (is_full, lambda job: job.until(lambda: fill(other))))
        trial.expect(one_left=room == 0 or trial.found["whole"] > 0)
        other.unlink()
        finish(stage, run, EVERY_SECOND, trial)


def write_on_full_disk(stage: Stage, name: str, trial: Trial) -> None:
    """A command whose file does not fit onto the disk: nothing is left of it, and the next try works."""
    place = stage.folder / trial.case
    other = place / "other"
    out = place / name
    place.mkdir()
    with mounted(place, *TMPFS):
        fill(other)
        output_job(stage, stage.finished(), out).end(trial, 1)
        trial.expect(no_parts=not part_of(out).exists())
        other.unlink()
        write_again(stage, stage.finished(), out, trial)


def planned_disk(stage: Stage) -> Plan:
    """Disks that are full from the beginning, or at a later moment."""

    def at(n: int) -> Callable[[Path], bool]:
        return lambda run: has_epochs(run, n + 1)

    def reporting(run: Path) -> bool:
        return (run / "model.safetensors").exists()

    for case, every, room, full, resume in (
        ("no room at all", EVERY_SECOND, 0, at(99), False),
        ("no room to resume", EVERY_SECOND, 0, at(99), True),
        ("room for one", EVERY_SECOND, 1.3, at(99), False),
        ("full at epoch 5", EVERY_STEP, 99, at(5), False),
        ("full at epoch 30", EVERY_STEP, 99, at(30), False),
        ("full at the end", EVERY_STEP, 99, reporting, False),
    ):
        yield "disk", case, partial(disk, stage, every, room, full, resume)
    for name in OUTPUTS:
        yield "disk", f"no room for {name}", partial(write_on_full_disk, stage, name)


def read_only(stage: Stage, epoch: int | None, trial: Trial) -> None:
    """A read-only place, for a new run or (epoch 0) one to go on with; or a checkpoint/ that is so from an epoch on."""
    run = stage.run_of(trial)
    place = run.parent
    place.mkdir()
    if epoch == 0:
        shutil.copytree(stage.half_way(), run)
    with ExitStack() as until_here:

        def close(at: Path) -> None:
            until_here.enter_context(mounted(at, "--bind", "-o", "ro", at))

        if not epoch:
            close(place)
        events: list[Event] = []
        if epoch:
            is_time = partial(has_epochs, run, epoch)
            events.append((is_time, lambda job: close(run / "checkpoint")))
        hurt(run, EVERY_STEP, trial, (1, 2), *events)
    finish(stage, run, EVERY_SECOND, trial)


def write_read_only(stage: Stage, name: str, trial: Trial) -> None:
    """A command that is to write into a read-only folder; and the next try, when it is none."""
    out = stage.folder / trial.case / name
    out.parent.mkdir()
    with mounted(out.parent, "--bind", "-o", "ro", out.parent):
        output_job(stage, stage.finished(), out).end(trial, 1, 2)
    write_again(stage, stage.finished(), out, trial)


def planned_readonly(stage: Stage) -> Plan:
    """Read-only folders of runs and of what the other commands write."""
    for case, epoch in ("a new run", None), ("resuming", 0), ("from epoch 20 on", 20):
        yield "readonly", case, partial(read_only, stage, epoch)
    for name in ("codes.csv", "evaluated.json"):
        yield "readonly", f"{name} there", partial(write_read_only, stage, name)


# Writes that fail and work again.


@contextmanager
def small_files(job: Job, stage: Stage) -> Iterator[None]:
    """Within, the process can write no file as large as a checkpoint; all others of a run are smaller."""
    limit = checkpoint_size(stage) * 3 // 4
    resource.prlimit(job.process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        if job.is_alive():
            forever = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(job.process.pid, resource.RLIMIT_FSIZE, forever)


@contextmanager
def full_disk(place: Path, stage: Stage) -> Iterator[None]:
    """Within, no checkpoint fits onto the disk, but other files do."""
    other = place / "other"
    fill(other, checkpoint_size(stage) // 2)
    try:
        yield
    finally:
        other.unlink()


def hiccup(stage: Stage, fault: str, times: int, trial: Trial) -> None:
    """Checkpoints that cannot be written so many times in a row; after three the training ends.

    Args:
        stage: with the undisturbed run.
        fault: "small files", "full disk" or "read-only".
        times: until it works again.
        trial: that is judged.
    """
    run = stage.run_of(trial)
    run.parent.mkdir()
    with ExitStack() as to_the_end, ExitStack() as fault_ends:
        if fault == "full disk":
            to_the_end.enter_context(mounted(run.parent, *TMPFS))

        def begin(job: Job) -> None:
            at = run / "checkpoint"
            contexts: dict[str, Callable[[], AbstractContextManager]] = {
                "small files": partial(small_files, job, stage),
                "full disk": partial(full_disk, run.parent, stage),
                "read-only": partial(mounted, at, "--bind", "-o", "ro", at),
            }
            fault_ends.enter_context(contexts[fault]())
            job.until(lambda: failures(job) >= times)
            fault_ends.close()

        is_fatal = times >= 3
        codes = (1,) if is_fatal else (0,)
        lines = hurt(run, OFTEN, trial, codes, (partial(has_epochs, run, 5), begin))
        warned = " ".join(lines).count(TRIES_AGAIN)
        trial.expect(warned=warned == (2 if is_fatal else times))
        if is_fatal:
            finish(stage, run, EVERY_SECOND, trial)
        else:
            compare(stage, run, trial, [])


TRIES_AGAIN = "the training goes on and tries again later"


def failures(job: Job) -> int:
    """How many checkpoints could not be written until now."""
    text = " ".join(job.stderr().split())
    return text.count(TRIES_AGAIN)


def planned_hiccups(stage: Stage) -> Plan:
    """Each fault, for one write, for two and for three."""
    for fault, counts in {"small files": (1, 2, 3), "full disk": (1, 2), "read-only": (1,)}.items():
        for times in counts:
            case = f"{fault}, {times} checkpoints cannot be written"
            yield "hiccups", case, partial(hiccup, stage, fault, times)


# All of it.


def rehearsal(stage: Stage) -> Plan:
    """The other commands, while nothing happens."""
    for name in OUTPUTS:
        yield "undisturbed", f"undisturbed {name}", partial(write_undisturbed, stage, name)


PLANS: dict[str, Callable[[Stage], Plan]] = {
    "interrupts": planned_interrupts,
    "races": planned_races,
    "strangers": planned_strangers,
    "outputs": planned_outputs,
    "hiccups": planned_hiccups,
    "corruptions": planned_corruptions,
    "models": planned_models,
    "disk": planned_disk,
    "readonly": planned_readonly,
}
KINDS = ["kills", *PLANS]


def spread(trials: list, count: int) -> list:
    """So many of a list, evenly."""
    return [trials[i * len(trials) // count] for i in range(min(count, len(trials)))]


def planned(stage: Stage, options: argparse.Namespace) -> list[tuple[str, str, Act]]:
    """Every trial that the options ask for: its kind, its case, what is to be done."""
    kills = partial(planned_kills, count=options.kills)
    plans: dict[str, Callable[[Stage], Plan]] = {"kills": kills, **PLANS}
    todo: list[tuple[str, str, Act]] = []
    for kind, plan in plans.items():
        if kind not in options.only.split(","):
            continue
        trials = [trial for trial in plan(stage) if options.cases in trial[1]]
        todo += spread(trials, 2) if options.quick else trials
    return todo


def attempt(kind: str, case: str, act: Act) -> Trial:
    """Carry out one trial; an error in it is a failure, and the others go on."""
    trial = Trial(kind, case)
    try:
        act(trial)
    except subprocess.CalledProcessError as e:
        trial.skipped = f"skipped: {e.stderr or e}".strip()  # of `mount`
    except Exception as e:
        trial.failed.append(f"{type(e).__name__}: {e}")
    trial.moments = [round(moment, 4) for moment in trial.moments]
    return trial


def carried_out(todo: list[tuple[str, str, Act]], workers: int) -> list[Trial]:
    """Carry out trials, some at a time."""
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(attempt, *one) for one in todo]
        return [job.result() for job in tqdm(jobs, unit="trial")]


def all_trials(stage: Stage, options: argparse.Namespace) -> list[Trial]:
    """Prepare, then carry out what the options ask for."""
    examples = np.random.default_rng(options.seed).integers(0, 17, (N_EXAMPLES, 8, 8))
    np.save(stage.folder / "examples.npy", examples.astype(np.uint8))
    trials = []
    for plan in (preparation, rehearsal):
        trials += carried_out([*plan(stage)], options.workers)
        if any(trial.failed for trial in trials):
            return trials
    return trials + carried_out(planned(stage, options), options.workers)


def surroundings() -> dict[str, object]:
    """The command, the code and the machine."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "command": " ".join(sys.argv),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "processor": [*cpu, "?"][0],
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def line_about(trial: Trial) -> str:
    """What is printed of one trial."""
    verdict = f"FAILED ({', '.join(trial.failed)})" if trial.failed else "ok"
    words = max(trial.stderr, key=len, default="")[-120:]
    signals = f"{trial.moments!s:<16} {trial.exit_codes!s:<11} {trial.phase:<10}"
    return f"{trial.kind:<11} {trial.case:<48} {signals} {trial.skipped or verdict}  {words}"


def summary_of(trials: list[Trial]) -> dict[str, dict[str, int]]:
    """Counts for each kind of trial."""
    summary = {}
    for kind in dict.fromkeys(trial.kind for trial in trials):
        these = [trial for trial in trials if trial.kind == kind]
        codes = Counter(code for trial in these for code in trial.exit_codes)
        summary[kind] = {
            "trials": len(these),
            "failed": sum(trial.failed != [] for trial in these),
            "skipped": sum(trial.skipped != "" for trial in these),
            "identical": sum(trial.identical is True for trial in these),
            "processes": sum(codes.values()),
            "processes killed": codes[-9],
            **{f"exit code {code}": codes[code] for code in (0, 1, 2, 129, 130, 143)},
        }
    return summary


def answer_signals() -> None:
    """Let the processes get signals that this one was started to ignore: by & Ctrl-C, by nohup SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for sign in (signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(sign) == signal.SIG_IGN:
            signal.signal(sign, lambda *_: None)  # unlike an ignored signal, not handed on


def parse_options() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=24, help="at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the damage")
    parser.add_argument(
        "--only", default=",".join(KINDS), metavar="KIND[,KIND]", help="these kinds of trial"
    )
    parser.add_argument(
        "--cases", default="", metavar="WORDS", help="trials with these in their case"
    )
    parser.add_argument("--quick", action="store_true", help="two trials of each kind")
    parser.add_argument("--workers", type=int, default=2, help="trials at a time")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    options = parser.parse_args()
    unknown = set(options.only.split(",")) - set(KINDS)
    if unknown:
        parser.error(f"unknown kinds {unknown}: there are {KINDS}")
    return options


def main() -> int:
    """Carry out the trials; print and write what happened."""
    options = parse_options()
    begun = time.monotonic()
    answer_signals()
    with tempfile.TemporaryDirectory(prefix="vae_nb-faults-") as folder:
        trials = all_trials(Stage(Path(folder), options.seed), options)
    for trial in trials:
        print(line_about(trial).replace(f"{folder}/", ""))
    summary = summary_of(trials)
    for kind, counts in summary.items():
        words = [f"{count} {name}" for name, count in counts.items() if count or name == "failed"]
        print(f"{kind:<11}", ", ".join(words))
    content = {
        **surroundings(),
        "seconds": round(time.monotonic() - begun),
        "workers": options.workers,
        "summary": summary,
        "phases of kills": dict(Counter(trial.phase for trial in trials if trial.phase)),
        "trials": [*map(asdict, trials)],
    }
    print("kills fell into", content["phases of kills"])
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1).replace(f"{folder}/", "").replace(f"{ROOT}/", "")
        options.out.write_text(text + "\n")
    return int(any(trial.failed for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
