"""Measure what each part of the library adds on the digits (row R7).

    python benchmarks/parts.py                   writes results/R7.json (some 30 minutes on one core)
    python benchmarks/parts.py --seeds 1 --epochs 3 --out FILE      a brief run, to see that it works

(a) A linear VAE with one learned sigma, on grey values (counts divided by 16), trained by `Trainer`;
    scikit-learn's PCA.score on the same training images is what it can reach. Held-out mean
    log p(x), exact for both.
(b) The default of `vae_nb train` on the digits, and that default with one thing changed at a time,
    the last lines with several. Held-out log p(x), as the bound with 5,000 samples of q, and the
    ELBO. A gain is taken image by image against the default with the same seed; its standard error
    is over the test images, of their means over seeds; beside it stand the seeds' own gains.

The weights are those that are best on the validation set; nothing is chosen on the test set.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sklearn.decomposition import PCA
from torch import Tensor

from vae_nb import (
    RECIPES,
    KLWeight,
    LinearGaussian,
    OptimizerConfig,
    Trainer,
    build_vae,
    load_data,
    per_example,
)
from vae_nb.base.files import write_json
from vae_nb.base.provenance import provenance
from vae_nb.evaluation.estimates import standard_error

ROOT = Path(__file__).resolve().parent.parent
WIDER = {"latent_dim": 16}
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what is changed: model, training
    "nothing: the default": ({}, {}),
    "posterior full": ({"posterior": "full"}, {}),
    "posterior iaf": ({"posterior": "iaf"}, {}),
    "posterior nsf": ({"posterior": "nsf"}, {}),
    "prior mixture": ({"prior": "mixture"}, {}),
    "prior vamp": ({"prior": "vamp"}, {}),
    "prior flow": ({"prior": "flow"}, {}),
    "network gated": ({"network": "gated", "hidden": (256, 256)}, {}),
    "network conv": ({"network": "conv", "hidden": (32, 64)}, {}),
    "objective stl": ({}, {"objective": "stl"}),
    "objective iwae, k = 8": ({}, {"objective": "iwae", "k": 8}),
    "objective dreg, k = 8": ({}, {"objective": "dreg", "k": 8}),
    "constant learning rate": ({}, {"optimizer": OptimizerConfig(schedule="constant")}),
    "averaged weights": ({}, {"ema": 0.995}),
    "weight decay 0.1": ({}, {"optimizer": OptimizerConfig("adamw", weight_decay=0.1)}),
    "warm-up of the rate, 100 epochs": ({}, {"beta": KLWeight(warmup=100)}),
    "16 latents": (WIDER, {}),
    "16 latents, warm-up": (WIDER, {"beta": KLWeight(warmup=100)}),
    "16 latents, dreg, k = 8": (WIDER, {"objective": "dreg", "k": 8}),
    "16 latents, prior flow, dreg, k = 8": (
        WIDER | {"prior": "flow"},
        {"objective": "dreg", "k": 8},
    ),
}


def mean_and_se(values: Tensor) -> dict[str, float]:
    """The mean of (n,) values over images and its standard error."""
    return {"mean": values.mean().item(), "se": standard_error(values)}


def grey_values(counts: Tensor) -> Tensor:
    """(n, 8, 8) counts 0 … 16 → (n, 64) in [0, 1]."""
    return counts.flatten(1).float() / 16


def linear(epochs: int) -> dict[str, Any]:
    """(a): what a linear VAE reaches, and what it could."""
    counts = load_data("digits")
    data = replace(
        counts,
        train=grey_values(counts.train),
        valid=grey_values(counts.train),  # the optimum is that of the training images
        test=grey_values(counts.test),
        likelihood="gaussian",
        total=None,
        source=None,
    )
    torch.manual_seed(0)
    vae = build_vae(**data.spec, latent_dim=7, hidden=())
    config = replace(
        RECIPES["digits"].train,
        epochs=epochs,
        batch_size=256,
        lr=2e-2,
        objective="stl",
        k=4,
        device="cpu",
    )
    Trainer(vae, data, config).fit(progress=False)
    layer = vae.likelihood.network.out
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    ours = LinearGaussian(weight, bias, vae.likelihood.std).log_evidence(data.test.double())
    pca = PCA(7, svd_solver="full").fit(data.train.double().numpy())
    theirs = torch.as_tensor(pca.score_samples(data.test.double().numpy()))
    return {
        "latents": 7,
        "epochs": epochs,
        "ours": mean_and_se(ours),
        "pca": mean_and_se(theirs),
        "ours_less_pca": mean_and_se(ours - theirs),
    }


def train_changed(change: str, seed: int, epochs: int | None) -> tuple[Tensor, Tensor]:
    """(300,) log p(x) by 5,000 samples, and ELBO, of the digits' default with this change."""
    recipe = RECIPES["digits"]
    model_changes, train_changes = CHANGES[change]
    data = recipe.load()
    config = replace(recipe.train, **train_changes, seed=seed, device="cpu")
    if epochs:
        beta = replace(config.beta, warmup=min(epochs, config.beta.warmup))
        config = replace(config, epochs=epochs, beta=beta)
    torch.manual_seed(seed)
    model = build_vae(**data.spec | recipe.model | model_changes)
    Trainer(model, data, config).fit(progress=False)
    estimates = per_example(model, data.test, 5000, seed)
    return estimates.log_px, estimates.elbo


def compare(seeds: int, epochs: int | None) -> list[dict[str, Any]]:
    """(b): a row for each change, the default first."""
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for change in CHANGES:
        results = [train_changed(change, seed, epochs) for seed in range(seeds)]
        log_px = torch.stack([result[0] for result in results])  # (seeds, 300)
        elbos = torch.stack([result[1] for result in results])
        if not rows:
            default = log_px
        gain = log_px - default
        row = {
            "change": change,
            "log_px": mean_and_se(log_px.mean(0)),
            "elbo": mean_and_se(elbos.mean(0)),
            "gain": mean_and_se(gain.mean(0)),
            "gain_by_seed": gain.mean(1).tolist(),
        }
        rows.append(row)
        print(
            f"{change:36} log p(x) {row['log_px']['mean']:9.3f}   ELBO {row['elbo']['mean']:9.3f}   "
            f"gain {row['gain']['mean']:+7.3f} ± {row['gain']['se']:.3f}   "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, help="of (b); default: the recipe's")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "R7.json")
    options = parser.parse_args()
    start = time.perf_counter()
    linear_vae = linear(options.epochs or 600)
    print(json.dumps(linear_vae))
    rows = compare(options.seeds, options.epochs)
    command = "python benchmarks/parts.py"
    for name in ("seeds", "epochs"):
        if getattr(options, name) != parser.get_default(name):
            command += f" --{name} {getattr(options, name)}"
    result = {
        "row": "R7",
        "command": command,
        **provenance(),
        "seeds": options.seeds,
        "seconds": time.perf_counter() - start,
        "test_images": 300,
        "k": 5000,
        "a": linear_vae,
        "b": rows,
    }
    write_json(options.out, result)


if __name__ == "__main__":
    main()
