#!/usr/bin/env python3
"""Make the model of a run part of the package: tools/ship.py RUN NAME

Copies config.json, weights, model card and report of RUN to vae_nb/pretrained/NAME, which `pretrained(NAME)` finds.
config.json there does not say where the data lay on this machine.
"""
import json
import shutil
import sys
from pathlib import Path

FILES = ("model.safetensors", "README.md", "report.json")


def main() -> None:
    if len(sys.argv) != 3: sys.exit(__doc__)
    run, folder = Path(sys.argv[1]), Path(__file__).resolve().parent.parent / "vae_nb" / "pretrained" / sys.argv[2]
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    config["data"]["root"] = None
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES: shutil.copyfile(run / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(folder, sum(path.stat().st_size for path in folder.iterdir()) // 1024, "kB")


if __name__ == "__main__":
    main()
