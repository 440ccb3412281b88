"""What each part of the library adds on the digits, and how near a linear VAE comes to probabilistic PCA (row R7).

    python benchmarks/parts.py                   writes results/R7.json (some 30 minutes on one core)
    python benchmarks/parts.py --seeds 1 --epochs 3 --out FILE      a brief run, to see that it works

(a) A linear VAE with one learned sigma, on grey values (counts divided by 16), trained by `Trainer`; scikit-learn's
    PCA.score on the same training images is what it can reach. Held-out mean log p(x), exact for both.
(b) The default of `vae_nb train` on the digits, and that default with one thing changed at a time, the last lines with
    several. Held-out log p(x), as the bound with 5,000 samples of q, and the ELBO. A gain is taken image by image against
    the default with the same seed; its standard error is over the test images, of their means over seeds; the spread of the seeds' own gains stands beside it.

The weights are those that are best on the validation images; nothing is chosen on the test images.
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
from vae_nb.all import (RECIPES, KLWeight, LinearGaussian, OptimizerConfig, Trainer, build_vae, load_data,
                        per_image, provenance, write_json)

ROOT = Path(__file__).resolve().parent.parent
WIDER = {"latent_dim": 16}
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {        # what is changed: model, training
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
    "16 latents, prior flow, dreg, k = 8": (WIDER | {"prior": "flow"}, {"objective": "dreg", "k": 8}),
}


def of(values: Tensor) -> dict[str, float]:
    """Mean over images and its standard error."""
    return {"mean": values.mean().item(), "se": (values.std() / len(values) ** 0.5).item()}


def linear(epochs: int) -> dict[str, Any]:
    """(a): what a linear VAE reaches, and what it could."""
    counts, vectors = load_data("digits"), lambda images: images.flatten(1).float() / 16
    data = replace(counts, train=vectors(counts.train), valid=vectors(counts.train), test=vectors(counts.test),
                   likelihood="gaussian", total=None, source=None)     # the optimum is that of the training images
    torch.manual_seed(0)
    vae = build_vae(**data.spec, latent_dim=7, hidden=())
    config = replace(RECIPES["digits"].train, epochs=epochs, batch_size=256, lr=2e-2, objective="stl", k=4, device="cpu")
    Trainer(vae, data, config).fit(progress=False)
    out = vae.likelihood.network.out
    model = LinearGaussian(out.weight.detach().double(), out.bias.detach().double(), vae.likelihood.std)
    ours = model.log_evidence(data.test.double())
    theirs = torch.as_tensor(PCA(7, svd_solver="full").fit(data.train.double().numpy()).score_samples(data.test.double().numpy()))
    return {"latents": 7, "epochs": epochs, "ours": of(ours), "pca": of(theirs), "ours_less_pca": of(ours - theirs)}


def one(change: str, seed: int, epochs: int | None) -> tuple[Tensor, Tensor]:
    """(300,) log p(x) by 5,000 samples, and ELBO, of the digits' default with this change."""
    recipe, (model_changes, train_changes) = RECIPES["digits"], CHANGES[change]
    data, config = recipe.load(), replace(recipe.train, **train_changes, seed=seed, device="cpu")
    if epochs: config = replace(config, epochs=epochs, beta=replace(config.beta, warmup=min(epochs, config.beta.warmup)))
    torch.manual_seed(seed)
    model = build_vae(**data.spec | recipe.model | model_changes)
    Trainer(model, data, config).fit(progress=False)
    found = per_image(model, data.test, 5000, seed)
    return found.log_px, found.elbo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, help="of (b); default: the recipe's")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "R7.json")
    asked, start, table = parser.parse_args(), time.perf_counter(), []
    a = linear(asked.epochs or 600)
    print(json.dumps(a))
    for change in CHANGES:
        log_px, elbos = (torch.stack(found) for found in zip(*(one(change, seed, asked.epochs) for seed in range(asked.seeds))))
        if not table: default = log_px
        gain = log_px - default
        table.append({"change": change, "log_px": of(log_px.mean(0)), "elbo": of(elbos.mean(0)), "gain": of(gain.mean(0)),
                      "gain_by_seed": gain.mean(1).tolist()})
        print(f"{change:36} log p(x) {table[-1]['log_px']['mean']:9.3f}   ELBO {table[-1]['elbo']['mean']:9.3f}   gain "
              f"{table[-1]['gain']['mean']:+7.3f} ± {table[-1]['gain']['se']:.3f}   {time.perf_counter() - start:.0f} s", flush=True)
    options = [f" --{name} {value}" for name in ("seeds", "epochs") if (value := getattr(asked, name)) != parser.get_default(name)]
    write_json(asked.out, {"row": "R7", "command": "python benchmarks/parts.py" + "".join(options), **provenance(), "seeds": asked.seeds,
                           "seconds": time.perf_counter() - start, "test_images": 300, "k": 5000, "a": a, "b": table})


if __name__ == "__main__":
    main()
