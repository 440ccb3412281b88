#!/usr/bin/env python3
"""Publish what came of a run of `vae_nb train --recipe`: tools/publish_result.py RUN [--bundle NAME]

Copies RUN/result.json to results/ROW.json, and of RUN/metrics.jsonl what pictures need to
results/ROW.metrics.jsonl: of the latent variables' KL divergences, how many are above 0.1 nats.
With --bundle the model becomes part of the package, in vae_nb/pretrained/NAME, without a word
about where the data lay on this machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ACTIVE = 0.1  # nats


def bundle(run: Path, folder: Path) -> None:
    """Copy a run's model, and the report on it, into the package."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    config["data"]["root"] = None
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "README.md", "report.json"):
        shutil.copyfile(run / name, folder / name)
    text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    print(folder, sum(path.stat().st_size for path in folder.iterdir()) // 1024, "kB")


def summary(record: dict) -> dict:
    """A record of metrics.jsonl with the number of active latent variables in place of all."""
    kls = record.pop("kl_by_latent")
    return {**record, "speaking": kls and sum(kl > ACTIVE for kl in kls)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--bundle", metavar="NAME")
    options = parser.parse_args()
    if options.bundle:
        bundle(options.run, ROOT / "vae_nb" / "pretrained" / options.bundle)
    row = json.loads((options.run / "result.json").read_text(encoding="utf-8"))["row"]
    if row == "R7":
        return  # benchmarks/parts.py makes that one
    result = ROOT / "results" / f"{row}.json"
    shutil.copyfile(options.run / "result.json", result)
    lines = (options.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    text = "".join(json.dumps(summary(json.loads(line))) + "\n" for line in lines)
    (ROOT / "results" / f"{row}.metrics.jsonl").write_text(text, encoding="utf-8")
    print(result)


if __name__ == "__main__":
    main()
