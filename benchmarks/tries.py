"""Row R4 (k = 50 samples in training): what was tried, judged on the validation images.

    python benchmarks/tries.py --start R3 --data-dir DIR     writes results/R4-tries.json (15 minutes)
    python benchmarks/tries.py ... --brief --out FILE        a few steps of each, to see that it works

--start is a run of the recipe burda-vae, with whose weights each try begins; --scratch a run of
this training from random weights, finished or cut off. Each try decodes as many samples as two
epochs with k = 50. The figure is the bound with 1,000 samples on the 400 validation images; beside
it stands the gain over the weights of --start, image by image.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from parts import ROOT, mean_and_se
from torch import nn

from vae_nb import RECIPES, OptimizerConfig, Trainer, load, load_data, per_example
from vae_nb.base.files import write_json
from vae_nb.base.provenance import provenance
from vae_nb.training.runs import Run

PLAIN = replace(RECIPES["burda-iwae"].train, epochs=2)
TRIES: dict[str, Any] = {
    "as the recipe: 200 images a step, lr 0.001": PLAIN,
    "lr 0.003": replace(PLAIN, lr=3e-3),
    "lr 0.0003": replace(PLAIN, lr=3e-4),
    "50 images a step, lr 0.0005": replace(PLAIN, batch_size=50, lr=5e-4),
    "k = 10, ten epochs": replace(PLAIN, k=10, epochs=10),
    "constant lr, averaged weights": replace(
        PLAIN, ema=0.998, optimizer=OptimizerConfig(schedule="constant")
    ),
    "the gradient of iwae, not dreg": replace(PLAIN, objective="iwae"),
}


def load_best(run: Path, model: nn.Module) -> int:
    """Give the model the best weights of a run, finished or not; the epoch that it is in."""
    checkpoint = Run(run).latest_checkpoint()
    if checkpoint is None:
        raise SystemExit(f"no checkpoint in {run}")
    best = {name: t for name, t in checkpoint.tensors.items() if name.startswith("best.")}
    model.load_state_dict({name.removeprefix("best."): t for name, t in best.items()})
    return checkpoint.state["epoch"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--brief", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "R4-tries.json")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    data = load_data(**RECIPES["burda-iwae"].data, root=options.data_dir)
    if options.brief:
        data = replace(data, train=data.train[:400], valid=data.valid[:50])
    k = 50 if options.brief else 1000
    model = load(options.start)
    before = per_example(model, data.valid, k).log_px
    results: dict[str, Any] = {
        "the start: k = 1, 1,000 epochs": {"valid": mean_and_se(before)},
    }
    for name, config in TRIES.items():
        trainer = Trainer(model, data, config, start=options.start)
        trainer.fit(progress=False)
        after = per_example(model, data.valid, k).log_px
        results[name] = {
            "valid": mean_and_se(after),
            "gain": mean_and_se(after - before),
            "seconds": trainer.history[-1]["seconds"],
        }
        print(name, results[name], flush=True)
    if options.scratch:
        epoch = load_best(options.scratch, model)
        after = per_example(model, data.valid, k).log_px
        name = f"from random weights, lr 0.002, in epoch {epoch} of 100"
        results[name] = {"valid": mean_and_se(after), "gain": mean_and_se(after - before)}
    content = {
        "row": "R4",
        "command": "python benchmarks/tries.py --start R3 --scratch RUN --data-dir DIR",
        **provenance(),
        "n": len(data.valid),
        "k": 1000,
        "tries": results,
    }
    write_json(options.out, content)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
