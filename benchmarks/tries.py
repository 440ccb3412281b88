"""Row R4 (k = 50 samples in training): what was tried, judged on the validation images.

    python benchmarks/tries.py --start R3 --data-dir DIR            writes results/R4-tries.json (15 minutes on one core)
    python benchmarks/tries.py ... --brief --out FILE               a few steps of each, to see that it works

--start is a run of the recipe burda-vae, with whose weights each try begins; --scratch a run of this training from random
weights, finished or cut off. Each try decodes as many samples as two epochs with k = 50. The figure is the bound with 1,000
samples on the 400 validation images; beside it stands the gain over the weights of --start, image by image.
"""
import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from parts import ROOT, of
from torch import nn
from vae_nb.all import RECIPES, OptimizerConfig, Trainer, load, load_data, per_image, provenance, read_config, write_json
from vae_nb.checkpoint import newest_state

PLAIN = replace(RECIPES["burda-iwae"].train, epochs=2)
TRIES: dict[str, Any] = {
    "as the recipe: 200 images a step, lr 0.001": PLAIN,
    "lr 0.003": replace(PLAIN, lr=3e-3),
    "lr 0.0003": replace(PLAIN, lr=3e-4),
    "50 images a step, lr 0.0005": replace(PLAIN, batch_size=50, lr=5e-4),
    "k = 10, ten epochs": replace(PLAIN, k=10, epochs=10),
    "constant lr, averaged weights": replace(PLAIN, ema=0.998, optimizer=OptimizerConfig(schedule="constant")),
    "the gradient of iwae, not dreg": replace(PLAIN, objective="iwae"),
}


def best_so_far(run: Path, model: nn.Module) -> int:
    """Gives the model the best weights of a run, finished or not; the epoch that it is in."""
    found = newest_state(run, read_config(run))
    if found is None: raise SystemExit(f"no checkpoint in {run}")
    model.load_state_dict({name.removeprefix("best."): t for name, t in found[0].items() if name.startswith("best.")})
    return found[1]["epoch"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--brief", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "R4-tries.json")
    asked = parser.parse_args()
    data = load_data(**RECIPES["burda-iwae"].data, root=asked.data_dir)
    if asked.brief: data = replace(data, train=data.train[:400], valid=data.valid[:50])
    model = load(asked.start)
    worth = lambda: per_image(model, data.valid, 50 if asked.brief else 1000).log_px
    before = worth()
    found = {"the start: k = 1, 1,000 epochs": {"valid": of(before)}}
    for name, config in TRIES.items():
        trainer = Trainer(model, data, config, start=asked.start)
        trainer.fit(progress=False)
        found[name] = {"valid": of(worth()), "gain": of(worth() - before), "seconds": trainer.history[-1]["seconds"]}
        print(name, found[name], flush=True)
    if asked.scratch:
        epoch = best_so_far(asked.scratch, model)
        found[f"from random weights, lr 0.002, in epoch {epoch} of 100"] = {"valid": of(worth()), "gain": of(worth() - before)}
    write_json(asked.out, {"row": "R4", "command": "python benchmarks/tries.py --start R3 --scratch RUN --data-dir DIR", **provenance(),
                           "n": len(data.valid), "k": 1000, "tries": found})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
