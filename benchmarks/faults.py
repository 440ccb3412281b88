"""Hurt runs of `vae_nb train` as a machine may, resume them, and compare with a run to which nothing happened.

    python benchmarks/faults.py                               all kinds, some twelve minutes on two cores
    python benchmarks/faults.py --only kills --kills 100      kills alone, more of them
    python benchmarks/faults.py --out results/faults.json     also writes what happened, trial by trial

kills        SIGKILL at a random moment from config.json to the end; one in eight before config.json. Half of the runs
             save after every step, so that kills fall into writes. A third is killed again after resuming.
corruptions  Checkpoint files cut, altered, swapped: the damaged one must be named, and the one before it used.
disk         A small tmpfs that is full, or fills up on the way. Needs root, which may mount.
readonly     Folders that are, or become, read-only: by a mount, as permission bits do not stop root, which is needed.
interrupts   Ctrl-C once and twice, in runs that save nothing by themselves.

Identical means: the weights byte for byte; metrics.jsonl and report.json but for "seconds"; all figures drawn. A run
that quietly began again would be identical, too: so where a checkpoint is whole, the first line of metrics.jsonl must
stay as it was, seconds and all. A kill loses nothing that the kernel was given, a power cut may: files that end early,
or in zeros, stand for that. Runs are compared within one machine. Linux; exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
TRAIN = [
    "--data",
    "digits",
    "--latent-dim",
    "2",
    "--hidden",
    "32",
    "--epochs",
    "40",
    "--seed",
    "0",
    "--device",
    "cpu",
]
FOREIGN = {
    "of another seed": [*TRAIN, "--seed", "1"],
    "of another model": [*TRAIN, "--hidden", "16"],
}
EVERY_STEP, EVERY_SECOND, NEVER = "0", "1", "9999"  # seconds between checkpoints
KINDS = ["kills", "corruptions", "disk", "readonly", "interrupts"]


@dataclass
class Trial:
    "What was done to a run, and what came of it. exit_codes and stderr have an entry for each process, in order."

    kind: str
    case: str
    # Of signals: seconds, at first after config.json appeared.
    moments: list[float] = field(default_factory=list)
    exit_codes: list[int] = field(default_factory=list)  # -9: killed
    # The last line, or the one that names what is damaged.
    stderr: list[str] = field(default_factory=list)
    found: dict[str, int] = field(default_factory=dict)  # what the fault left in the folder
    identical: bool | None = None
    failed: list[str] = field(default_factory=list)  # expectations that were not met
    skipped: str = ""

    def expect(self, **met: bool) -> None:
        self.failed += [name for name, holds in met.items() if not holds]


@dataclass
class Stage:
    "What the trials share."

    folder: Path
    seed: int
    undisturbed: dict[str, object] = field(default_factory=dict)  # the outcome
    # Seconds to config.json, and from there on.
    times: dict[str, tuple[float, float]] = field(default_factory=dict)

    def half_way(self, case: str = "itself") -> Path:
        return self.folder / f"half-way {case}" / "run"


Act = Callable[[Trial], None]
# What is waited for, and what happens then.
Event = tuple[Callable[[], object], Callable[["Job"], object]]


class Job:
    "A `vae_nb train` in progress: with --resume where the folder holds a config.json, else from the start."

    def __init__(self, run: Path, every: str, options: list[str] = TRAIN) -> None:
        words = ["--resume", run] if (run / "config.json").exists() else [*options, "--out", run]
        if "--out" in words:
            shutil.rmtree(run, ignore_errors=True)  # hurt before it had written anything
        run.parent.mkdir(exist_ok=True)
        # Open for as long as the process lives.
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        vae_nb = Path(sys.executable).with_name("vae_nb")
        env = os.environ | {"OMP_NUM_THREADS": "1", "VAE_NB_CHECKPOINT_SECONDS": every}
        self.process = subprocess.Popen(
            [vae_nb, "train", *words],
            cwd=run.parent,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=self.log,
        )

    def until(self, holds: Callable[[], object]) -> None:
        "Wait until something holds or the process has ended."
        while self.process.poll() is None and not holds():
            time.sleep(0.003)

    def hit(self, seconds: float, sign: int = signal.SIGKILL) -> None:
        "Send a signal after so many seconds, unless the process has ended by then."
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end)
        self.process.send_signal(sign)

    def end(self, trial: Trial, *codes: int) -> list[str]:
        "Wait for the end, five minutes at most, and judge it; returns the lines on stderr, less progress bars."
        self.hit(300)
        self.log.seek(0)
        text = self.log.read()
        lines = [line.strip() for line in text.splitlines() if line.strip() and "%|" not in line]
        code = self.process.wait()
        last = lines[-1] if lines else ""
        trial.exit_codes.append(code)
        trial.stderr.append(last)
        trial.expect(
            exit_code=code in codes,
            clear_error=code not in (1, 2) or last.startswith("Error:"),
            no_traceback="Traceback" not in text and "Exception ignored" not in text,
        )
        return lines


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoint").glob("*.safetensors"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def name_for(step: str, content: bytes) -> str:
    return f"{step}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"


def whole(run: Path) -> list[Path]:
    "Checkpoints whose names tell the digest of their content: judged here, not by the package."
    return [
        p
        for p in checkpoints(run)
        if p.is_file() and p.name == name_for(p.name[:9], p.read_bytes())
    ]


def epochs(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def has_epochs(run: Path, count: int) -> bool:
    return len(epochs(run)) >= count


def state(run: Path) -> dict[str, int]:
    return {
        "epochs": len(epochs(run)),
        "checkpoints": len(checkpoints(run)),
        "whole": len(whole(run)),
        "step": max((int(p.name[:9]) for p in whole(run)), default=-1),
        "parts": len([*run.rglob("*.part")]),
    }


def outcome(run: Path) -> dict[str, object]:
    "What two runs must have in common."

    def timeless(text: str) -> dict:
        return {key: value for key, value in json.loads(text).items() if key != "seconds"}

    return {
        "weights": (run / "model.safetensors").read_bytes(),
        "metrics": [timeless(line) for line in epochs(run)],
        "report": timeless((run / "report.json").read_text()),
        "figures": {
            p.name: p.read_bytes().endswith(b"IEND\xaeB`\x82") for p in run.glob("figures/*")
        },
    }


def undisturbed(stage: Stage, every: str, trial: Trial) -> None:
    run = stage.folder / trial.case / "run"
    begun = time.monotonic()
    job = Job(run, every)
    job.until((run / "config.json").exists)
    startup = time.monotonic() - begun
    job.end(trial, 0)
    stage.times[every] = startup, time.monotonic() - begun - startup
    stage.undisturbed = stage.undisturbed or outcome(run)
    trial.identical = outcome(run) == stage.undisturbed
    trial.expect(identical=trial.identical)  # however often it saves


def hurt(
    run: Path,
    every: str,
    trial: Trial,
    codes: tuple[int, ...],
    *events: Event,
    options: list[str] = TRAIN,
) -> None:
    "A run, what happens to it, and its end with one of the exit codes. Files must survive an error, and be whole."
    before = contents(run)
    job = Job(run, every, options)
    for ready, act in events:
        job.until(ready)
        act(job)
    job.end(trial, *codes)
    trial.found = trial.found or state(run)
    trial.expect(
        untouched=trial.exit_codes[-1] not in (1, 2) or before.items() <= contents(run).items(),
        whole={*checkpoints(run)} - {*whole(run)} <= before.keys(),
    )


def finish(stage: Stage, run: Path, every: str, trial: Trial) -> list[str]:
    "Let a hurt run come to its end, and compare."
    first = epochs(run)[:1]
    far = state(run)["step"] >= 100  # an epoch has fewer steps
    said = Job(run, every).end(trial, 0)
    differ = [name for name, value in outcome(run).items() if value != stage.undisturbed[name]]
    trial.identical = not differ
    trial.expect(
        goes_on=not far or epochs(run)[:1] == first, **{f"same_{name}": False for name in differ}
    )
    return said


def half_way(stage: Stage, options: list[str], trial: Trial) -> None:
    run = stage.folder / trial.case / "run"
    n = 15 if options is TRAIN else 25
    hurt(
        run,
        EVERY_STEP,
        trial,
        (-9,),
        (lambda: len(epochs(run)) >= n, lambda job: job.hit(0)),
        options=options,
    )
    trial.expect(two_whole_checkpoints=len(whole(run)) >= 2)


def kill(stage: Stage, number: int, trial: Trial) -> None:
    rng = random.Random(f"{trial.case} {stage.seed}")
    run = stage.folder / trial.case / "run"
    early = number % 8 == 7
    every = (EVERY_STEP, EVERY_SECOND)[number % 2]
    startup, rest = stage.times[every]
    moment = rng.uniform(0, startup if early else rest)

    def killed(begins: Callable[[], object], seconds: float) -> None:
        hurt(run, every, trial, (-9, 0), (begins, lambda job: job.hit(seconds)))
        trial.moments += [seconds]

    while -9 not in trial.exit_codes:  # one that ended by itself is taken again, and killed sooner
        shutil.rmtree(run, ignore_errors=True)
        trial.moments = []
        trial.exit_codes = []
        trial.stderr = []
        trial.found = {}
        moment *= 0.9
        killed(lambda: early or (run / "config.json").exists(), moment)
    if number % 3 == 0:
        killed(lambda: True, rng.uniform(0, startup + rest / 2))
    finish(stage, run, every, trial)


def interrupt(stage: Stage, epoch: int | None, gap: float | None, trial: Trial) -> None:
    "Ctrl-C in an epoch, or (None) when the report is being made; and once more after `gap` seconds."
    run = stage.folder / trial.case / "run"
    trial.moments = [random.Random(f"{trial.case} {stage.seed}").uniform(0, 0.05)]
    if gap is not None:
        trial.moments.append(gap)

    def ready() -> bool:
        return len(epochs(run)) > epoch if epoch else (run / "model.safetensors").exists()

    hurt(
        run,
        NEVER,
        trial,
        (130,),
        *((ready, lambda job, s=s: job.hit(s, signal.SIGINT)) for s in trial.moments),
    )
    trial.expect(saves=gap is not None or trial.found["step"] > 0)
    finish(stage, run, NEVER, trial)


def damages(stage: Stage) -> dict[str, tuple[str, Callable[[Path], object]]]:
    "What must follow, and what is done to the checkpoint/ of the run that was cut off: where not said, to the newest."
    newest = checkpoints(stage.half_way())[-1].name
    rng = random.Random(stage.seed)
    b = (stage.half_way() / "checkpoint" / newest).read_bytes()
    half, header = len(b) // 2, 8 + int.from_bytes(b[:8], "little")

    def flipped(at: int) -> bytes:
        return b[:at] + bytes([b[at] ^ 4]) + b[at + 1 :]

    opens = b"cbuiltins\nopen\n(S'unpickled'\nS'w'\ntR."  # a pickle: unpickled, it makes a file
    contents = {
        "cut to half": b[:half],
        "a pickle": opens,
        "a text": b"Nothing.",
        "empty": b"",
        "a byte short": b[:-1],
        "ends in zeros": b[:half] + bytes(len(b) - half),
        "random bytes": rng.randbytes(len(b)),
        "bit flipped in the header": flipped(rng.randrange(header)),
        "bit flipped in the tensors": flipped(rng.randrange(header, len(b))),
    }

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
        **{name: ("named", partial(put, content, False)) for name, content in contents.items()},
        **{
            f"{name}, well named": ("named", partial(put, contents[name], True))
            for name in [*contents][:3]
        },
        **{
            f"one {name}": ("named", partial(shutil.copy, whole(stage.half_way(name))[-1]))
            for name in FOREIGN
        },
        "a folder in its place": ("named", replace_by_folder),
        "never renamed": ("ignored", lambda at: (at / newest).rename(at / f"{newest}.part")),
        "metrics.jsonl cut": ("ignored", lambda at: cut(at.parent / "metrics.jsonl")),
        "config.json cut": ("refused", lambda at: cut(at.parent / "config.json")),
        "all checkpoints cut": ("refused", lambda at: cut(*at.glob("*.safetensors"))),
    }


def corruption(stage: Stage, follows: str, act: Callable[[Path], object], trial: Trial) -> None:
    run = shutil.copytree(stage.half_way(), stage.folder / trial.case / "run")
    act(run / "checkpoint")
    trial.found = state(run)
    newest = checkpoints(run)[-1].name
    if follows == "refused":
        hurt(run, EVERY_SECOND, trial, (2,))
        return
    naming = [line for line in finish(stage, run, EVERY_SECOND, trial) if newest in line]
    trial.stderr = naming[:1] or trial.stderr
    trial.expect(
        named=follows == "ignored" or naming != [],
        not_unpickled=not (run.parent / "unpickled").exists(),
    )


@contextmanager
def mounted(place: Path, *words: str | Path) -> Iterator[None]:
    subprocess.run(["mount", *words, place], check=True, stderr=subprocess.PIPE, text=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(path: Path, room: int = 0) -> None:
    "Add to a file until nothing more fits on its disk but `room` bytes."
    with open(path, "ab", buffering=0) as f:
        try:
            while True:
                f.write(bytes(4096))
        except OSError:
            f.truncate(max(0, f.tell() - room))


def disk(
    stage: Stage, every: str, room: float, full: Callable[[Path], bool], resume: bool, trial: Trial
) -> None:
    "A disk with room for so many checkpoints at first, and for nothing once `full` holds of the run's folder."
    place = stage.folder / trial.case
    run = place / "run"
    other = place / "other"
    place.mkdir()
    with mounted(place, "-t", "tmpfs", "-o", "size=16m", "tmpfs"):
        if resume:
            shutil.copytree(stage.half_way(), run)
        fill(other, int(room * whole(stage.half_way())[-1].stat().st_size))
        hurt(
            run,
            every,
            trial,
            (1, 2),
            (lambda: full(run), lambda job: job.until(lambda: fill(other))),
        )
        trial.expect(one_left=room == 0 or trial.found["whole"] > 0)
        other.unlink()
        finish(stage, run, EVERY_SECOND, trial)


def read_only(stage: Stage, epoch: int | None, trial: Trial) -> None:
    "A read-only place, for a new run or (epoch 0) one to go on with; or a checkpoint/ that is so from an epoch on."
    place = stage.folder / trial.case
    run = place / "run"
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
            until = partial(has_epochs, run, epoch)
            events.append((until, lambda job: close(run / "checkpoint")))
        hurt(run, EVERY_STEP, trial, (1, 2), *events)
    finish(stage, run, EVERY_SECOND, trial)


def preparation(stage: Stage) -> Iterator[tuple[str, str, Act]]:
    for s in NEVER, EVERY_STEP, EVERY_SECOND:
        yield "undisturbed", f"saves every {s} s", partial(undisturbed, stage, s)
    for case, options in {"itself": TRAIN, **FOREIGN}.items():
        yield "half-way", f"half-way {case}", partial(half_way, stage, options)


def planned(stage: Stage, kills: int) -> Iterator[tuple[str, str, Act]]:
    "Every trial: its kind, its case, what is to be done."
    for i in range(kills):
        yield "kills", f"kill {i}", partial(kill, stage, i)
    for case, damage in damages(stage).items():
        yield "corruptions", case, partial(corruption, stage, *damage)

    def at(n: int) -> Callable[[Path], bool]:
        return lambda run: len(epochs(run)) > n

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
    for case, epoch in ("a new run", None), ("resuming", 0), ("from epoch 20 on", 20):
        yield "readonly", case, partial(read_only, stage, epoch)
    for epoch, gap in (3, None), (25, None), (10, 0.02), (20, 0.5), (None, None):
        case = f"Ctrl-C in epoch {epoch}" if epoch else "Ctrl-C in the report"
        if gap:
            case += f" and {gap} s on"
        yield "interrupts", case, partial(interrupt, stage, epoch, gap)


def attempt(kind: str, case: str, act: Act) -> Trial:
    "Carry out one trial; an error in it is a failure, and the others go on."
    trial = Trial(kind, case)
    try:
        act(trial)
    except subprocess.CalledProcessError as e:
        trial.skipped = f"skipped: {e.stderr or e}".strip()  # of `mount`
    except Exception as e:
        trial.failed.append(f"{type(e).__name__}: {e}")
    trial.moments = [round(moment, 3) for moment in trial.moments]
    return trial


def carried_out(todo: list[tuple[str, str, Act]]) -> list[Trial]:
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(attempt, *one) for one in todo]
        return [job.result() for job in tqdm(jobs, unit="trial")]


def surroundings() -> dict[str, object]:
    git = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
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
    "What is printed of one trial."
    verdict = f"FAILED ({', '.join(trial.failed)})" if trial.failed else "ok"
    words = max(trial.stderr, key=len, default="")[-120:]
    signals = f"{trial.moments!s:<16} {trial.exit_codes!s:<11}"
    return f"{trial.kind:<11} {trial.case:<32} {signals} {trial.skipped or verdict}  {words}"


def summary_of(trials: list[Trial]) -> dict[str, dict[str, int]]:
    "Counts for each kind of trial."
    summary = {}
    for kind in dict.fromkeys(trial.kind for trial in trials):
        these = [trial for trial in trials if trial.kind == kind]
        summary[kind] = {
            "trials": len(these),
            "failed": sum(trial.failed != [] for trial in these),
            "skipped": sum(trial.skipped != "" for trial in these),
            "identical": sum(trial.identical is True for trial in these),
            "processes killed": sum(trial.exit_codes.count(-9) for trial in these),
        }
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the damage")
    parser.add_argument(
        "--only", default=",".join(KINDS), metavar="KIND[,KIND]", help="these kinds of trial"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    options = parser.parse_args()
    begun = time.monotonic()
    chosen = options.only.split(",")
    unknown = set(chosen) - set(KINDS)
    if unknown:
        parser.error(f"unknown kinds {unknown}: there are {KINDS}")
    # Started with & it would be ignored, by the runs too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="vae_nb-faults-") as folder:
        stage = Stage(Path(folder), options.seed)
        trials = carried_out([*preparation(stage)])
        if not any(t.failed for t in trials):
            todo = [one for one in planned(stage, options.kills) if one[0] in chosen]
            trials += carried_out(todo)
    for trial in trials:
        print(line_about(trial).replace(f"{folder}/", ""))
    summary = summary_of(trials)
    for kind, counts in summary.items():
        print(f"{kind:<11}", ", ".join(f"{count} {name}" for name, count in counts.items()))
    content = {
        **surroundings(),
        "seconds": round(time.monotonic() - begun),
        "summary": summary,
        "trials": [*map(asdict, trials)],
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1).replace(f"{folder}/", "").replace(f"{ROOT}/", "")
        options.out.write_text(text + "\n")
    return int(any(t.failed for t in trials))


if __name__ == "__main__":
    sys.exit(main())
