#!/usr/bin/env python3
"""Keep what came of a run of `vae_nb train --recipe`: tools/keep.py RUN [--ship NAME]

Copies RUN/result.json to results/ROW.json, and of RUN/metrics.jsonl what pictures need to results/ROW.metrics.jsonl: the
latents' divergences as their number above 0.1 nats. With --ship the model becomes part of the package, in
vae_nb/pretrained/NAME, without a word about where the data lay on this machine.
"""
import argparse
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SPEAKS = 0.1     # nats


def ship(run: Path, folder: Path) -> None:
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    config["data"]["root"] = None
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "README.md", "report.json"): shutil.copyfile(run / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(folder, sum(path.stat().st_size for path in folder.iterdir()) // 1024, "kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--ship", metavar="NAME")
    asked = parser.parse_args()
    if asked.ship: ship(asked.run, ROOT / "vae_nb" / "pretrained" / asked.ship)
    row = json.loads((asked.run / "result.json").read_text(encoding="utf-8"))["row"]
    if row == "R7": return                                   # benchmarks/parts.py makes that one
    shutil.copyfile(asked.run / "result.json", ROOT / "results" / f"{row}.json")
    lines = []
    for line in (asked.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        kls = record.pop("kl_by_latent")
        lines.append(json.dumps({**record, "speaking": kls and sum(kl > SPEAKS for kl in kls)}) + "\n")
    (ROOT / "results" / f"{row}.metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    print(ROOT / "results" / f"{row}.json")


if __name__ == "__main__":
    main()
