"""How fast vae_nb trains and evaluates on this machine, beside others, in one interleaved run.

    python benchmarks/speed.py --data-dir DIR      (DIR holds torchvision's MNIST; without it, MNIST is downloaded)

Each workload gives all contenders the same images, batches, layer sizes and rate of Adam (1e-3):

  ours      Trainer.fit: an epoch, its validation (100 images) included; evaluate.
  example   PyTorch's VAE example, in our own words: torchvision's MNIST, which makes a picture of each image and a
            tensor of that, a DataLoader, Adam with its defaults, a sigmoid and its cross-entropy, .item() in each
            step; on a GPU one loading process and pinned memory, as there. We binarise each batch: ours does, too.
  pythae    its BaseTrainer with VAE (k = 1) or IWAE, and get_nll, where it is installed. Its images are binarised
            before the clock starts, and what it writes after the epoch is not timed: both favour it.
  products  only the matrix products and convolutions that a step cannot do without, forward and backward, in float32
            and into memory allocated before: no loss, noise, bias or optimiser. They are read off the model's layers
            in a real forward pass.

Every round runs each contender once, in an order that rotates; one untimed run of each comes first. A ratio is taken
within a round; minimum, median and maximum are over rounds. Peak memory is measured apart, in a fresh process for each,
above what imports and images take; so is each point of `growth` (with k, batch, images, processes). Ours bends by SiLU,
the others by ReLU; all keep their rate.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import logging
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from vae_nb import (
    VAE,
    Data,
    OptimizerConfig,
    TrainConfig,
    Trainer,
    build_vae,
    evaluate,
    load_data,
    log_weights,
)
from vae_nb.base.files import write_json
from vae_nb.derivation.figures import new_figure

ROOT = Path(__file__).resolve().parent.parent
STATUS = Path("/proc/self/status")
LR = 1e-3
VALID = 100
LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class Workload:
    "What is trained (or evaluated), on how many images by kind of device."

    title: str
    hidden: tuple[int, ...]
    latent_dim: int
    batch: int
    images: dict[str, int] = field(default_factory=dict)
    k: int = 1
    network: str = "mlp"
    evaluates: bool = False


WORKLOADS = {
    "mlp": Workload("784-400-20-400-784", (400,), 20, 128, {"cpu": 60_000, "cuda": 60_000}),
    "burda-1": Workload(
        "784-200-200-50, k = 1", (200, 200), 50, 20, {"cpu": 20_000, "cuda": 60_000}
    ),
    "burda-50": Workload(
        "784-200-200-50, k = 50", (200, 200), 50, 20, {"cpu": 4_000, "cuda": 60_000}, k=50
    ),
    "conv": Workload(
        "convolutions 32, 64", (32, 64), 20, 128, {"cpu": 6_000, "cuda": 60_000}, network="conv"
    ),
    "evaluate": Workload(
        "784-200-200-50, log p(x), k = 1000",
        (200, 200),
        50,
        5,
        {"cpu": 200, "cuda": 10_000},
        k=1000,
        evaluates=True,
    ),
}
GOALS = {  # by device, workload and ratio; for "ours" in seconds
    ("cpu", "mlp", "example / ours"): (">=", 4.5),
    ("cpu", "mlp", "pythae / ours"): (">=", 2.0),
    ("cpu", "mlp", "ours / products"): ("<=", 1.5),
    ("cpu", "burda-50", "ours / products"): ("<=", 1.7),
    ("cpu", "evaluate", "ours / products"): ("<=", 2.2),
    ("cuda", "mlp", "ours"): ("<=", 0.060),
    ("cuda", "mlp", "example / ours"): (">=", 50.0),
}


def now(device: torch.device) -> float:
    "Seconds, when the device has done what it was told."
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def synthetic(n: int) -> Data:
    "n training images of uint8 noise, 100 binary ones to validate, 10,000 to test."
    torch.manual_seed(0)
    few = torch.randint(0, 2, (VALID, 28, 28), dtype=torch.uint8)
    return Data(
        "synthetic",
        torch.randint(0, 256, (n, 28, 28), dtype=torch.uint8),
        few,
        few.repeat(100, 1, 1),
        likelihood="bernoulli",
        grayscale=True,
        dynamic_binarisation=True,
    )


def mnist(data_dir: str | None) -> Data:
    "MNIST with 60,000 training images (the 10,000 meant for validation in black and white); else synthetic ones."
    try:
        data = load_data("mnist", root=data_dir)
    except FileNotFoundError as e:
        if data_dir is not None:
            raise SystemExit(f"--data-dir: {e}") from e
        print(
            f"MNIST is not available: synthetic images take its place, and no losses are compared.\n  ({e})"
        )
        return synthetic(60_000)
    return replace(
        data,
        train=torch.cat([data.train, (data.valid * 255).to(torch.uint8)]),
        valid=data.valid[:VALID],
        train_labels=None,
        valid_labels=None,
        test_labels=None,
    )


def our_model(w: Workload) -> VAE:
    torch.manual_seed(0)
    return build_vae(
        (28, 28),
        latent_dim=w.latent_dim,
        hidden=w.hidden,
        likelihood="bernoulli",
        network=w.network,
    )


def fit(w: Workload, data: Data, device: torch.device, epochs: int) -> tuple[VAE, list[float]]:
    "Our trained model, and the seconds at the end of each epoch."
    model = our_model(w)
    config = TrainConfig(
        epochs=epochs,
        batch_size=w.batch,
        lr=LR,
        k=w.k,
        objective="elbo" if w.k == 1 else "iwae",
        optimizer=OptimizerConfig(schedule="constant"),
        device=str(device),
        seed=0,
    )
    return model, [record["seconds"] for record in Trainer(model, data, config).fit(progress=False)]


def ours(w: Workload, data: Data, device: torch.device) -> dict[str, float]:
    "On a GPU, an epoch after the first; that one, with all that is done only once, is given beside it."
    first, *later = fit(w, data, device, 5 if device.type == "cuda" else 1)[1]
    if not later:
        return {"ours": first}
    return {"ours": (later[-1] - first) / len(later), "ours, first epoch": first}


def our_evaluation(w: Workload, data: Data, device: torch.device) -> dict[str, float]:
    model, start = our_model(w).to(device), now(device)
    evaluate(model, data.test, k=w.k)
    return {"ours": now(device) - start}


class Pictures(datasets.MNIST):
    "torchvision's MNIST, item by item its own, of the images (n, 28, 28) given."

    def __init__(self, images: Tensor) -> None:
        self.data, self.targets = images, torch.zeros(len(images), dtype=torch.long)
        self.transform, self.target_transform = transforms.ToTensor(), None


def conv_layer(n_in: int, n_out: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(n_in, n_out, 3, stride, padding=1), nn.ReLU()]


def dense_layers(*widths: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return layers


def bodies(w: Workload) -> tuple[nn.Module, int, nn.Module]:
    "The encoder up to its last layer, the width there, and the decoder to logits (n, 784); ReLU between."
    if w.network == "conv":
        a, b = w.hidden
        up = nn.Upsample(scale_factor=2)
        decoder = nn.Sequential(
            nn.Linear(w.latent_dim, b * 49),
            nn.ReLU(),
            nn.Unflatten(1, (b, 7, 7)),
            up,
            *conv_layer(b, a),
            up,
            *conv_layer(a, a),
            conv_layer(a, 1)[0],
            nn.Flatten(),
        )
        encoder = nn.Sequential(*conv_layer(1, a, 2), *conv_layer(a, b, 2), nn.Flatten())
        return encoder, b * 49, decoder
    encoder = nn.Sequential(nn.Flatten(), *dense_layers(784, *w.hidden))
    decoder = nn.Sequential(*dense_layers(w.latent_dim, *w.hidden[::-1], 784)[:-1])
    return encoder, w.hidden[-1], decoder


class ExampleVAE(nn.Module):
    def __init__(self, w: Workload) -> None:
        super().__init__()
        self.encoder, width, self.decoder = bodies(w)
        self.mean = nn.Linear(width, w.latent_dim)
        self.log_var = nn.Linear(width, w.latent_dim)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encoder(x)
        return self.mean(hidden), self.log_var(hidden)

    def loss(self, x: Tensor) -> Tensor:
        "Minus the ELBO, summed over images; the Kullback-Leibler divergence in closed form."
        mean, log_var = self.encode(x)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_var)
        missed = F.binary_cross_entropy(
            torch.sigmoid(self.decoder(z)), x.flatten(1), reduction="sum"
        )
        return missed - 0.5 * torch.sum(1 + log_var - mean.pow(2) - log_var.exp())

    def log_weights(self, x: Tensor, k: int) -> Tensor:
        "(k, n) nats: log p(x|z) + log p(z) - log q(z|x)."
        mean, log_var = self.encode(x)
        noise = torch.randn(k, *mean.shape, device=x.device)
        z = mean + noise * torch.exp(0.5 * log_var)
        p = torch.sigmoid(self.decoder(z.flatten(0, 1))).unflatten(0, (k, len(x)))
        missed = F.binary_cross_entropy(p, x.flatten(1).expand_as(p), reduction="none").sum(-1)
        return 0.5 * (noise.pow(2) + log_var - z.pow(2)).sum(-1) - missed


def fit_example(
    w: Workload, data: Data, device: torch.device, epochs: int = 1
) -> tuple[ExampleVAE, float]:
    "The example's model, and its seconds for an epoch."
    torch.manual_seed(0)
    options = {"num_workers": 1, "pin_memory": True} if device.type == "cuda" else {}
    loader = DataLoader(Pictures(data.train), batch_size=w.batch, shuffle=True, **options)
    model = ExampleVAE(w).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    start = now(device)
    total = 0.0
    for _ in range(epochs):
        for x, _ in loader:
            x = torch.bernoulli(x.to(device))
            optimizer.zero_grad()
            if w.k == 1:
                loss = model.loss(x)
            else:
                loss = (math.log(w.k) - model.log_weights(x, w.k).logsumexp(0)).sum()
            loss.backward()
            total += loss.item()
            optimizer.step()
    return model, (now(device) - start) / epochs


def example(w: Workload, data: Data, device: torch.device) -> dict[str, float]:
    return {"example": fit_example(w, data, device)[1]}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    "Nothing printed, nothing logged."
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def without_pythae() -> str | None:
    "Why pythae is left out; None if it is here."
    try:
        with quiet():
            importlib.import_module("pythae.models")
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return None


def pythae_model(w: Workload) -> nn.Module:
    from pythae.models import IWAE, IWAEConfig, VAEConfig
    from pythae.models import VAE as PythaeVAE  # noqa: N811
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    torch.manual_seed(0)

    class Encoder(BaseEncoder):
        def __init__(self, body: nn.Module, width: int) -> None:
            super().__init__()
            self.body = body
            self.mean = nn.Linear(width, w.latent_dim)
            self.log_var = nn.Linear(width, w.latent_dim)

        def forward(self, x: Tensor) -> ModelOutput:
            hidden = self.body(x)
            return ModelOutput(embedding=self.mean(hidden), log_covariance=self.log_var(hidden))

    class Decoder(BaseDecoder):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=torch.sigmoid(self.body(z)).unflatten(1, (1, 28, 28)))

    *encoder, decoder = bodies(w)
    options = {"input_dim": (1, 28, 28), "latent_dim": w.latent_dim, "reconstruction_loss": "bce"}
    if w.k == 1 or w.evaluates:
        return PythaeVAE(VAEConfig(**options), Encoder(*encoder), Decoder(decoder))
    return IWAE(IWAEConfig(number_samples=w.k, **options), Encoder(*encoder), Decoder(decoder))


def pythae(w: Workload, data: Data, device: torch.device) -> dict[str, float]:
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    times = []

    class Clock(TrainingCallback):
        def on_epoch_begin(self, training_config: Any, **kwargs: Any) -> None:
            times.append(now(device))

        def on_epoch_end(self, training_config: Any, **kwargs: Any) -> None:
            times.append(now(device))

    with quiet(), tempfile.TemporaryDirectory() as folder:
        config = BaseTrainerConfig(
            output_dir=folder,
            num_epochs=1,
            per_device_train_batch_size=w.batch,
            learning_rate=LR,
            no_cuda=device.type == "cpu",
        )
        images = BaseDataset(data.to_model_input(data.train)[:, None], torch.ones(len(data.train)))
        BaseTrainer(pythae_model(w), images, training_config=config, callbacks=[Clock()]).train()
    return {"pythae": times[1] - times[0]}


def pythae_evaluation(w: Workload, data: Data, device: torch.device) -> dict[str, float]:
    model = pythae_model(w).to(device).eval()
    x = data.test[:, None].float().to(device)
    start = now(device)
    with torch.no_grad():
        model.get_nll(x, n_samples=w.k, batch_size=w.k)
    return {"pythae": now(device) - start}


def layer_products(
    layer: nn.Module, given: Tensor, output: Tensor, backward: bool
) -> list[Callable[[], Any]]:
    "What a layer multiplies in a step, as functions to call; the gradient of its input only where that wants one."
    x, y = given.detach(), output.detach()
    if isinstance(layer, nn.Linear):
        return linear_products(layer.weight.detach(), x, y, given.requires_grad, backward)
    return convolution_products(layer, x, y, given.requires_grad, backward)


def convolution_products(
    layer: nn.Module, x: Tensor, y: Tensor, wants_gradient: bool, backward: bool
) -> list[Callable[[], Any]]:
    aten, weight = torch.ops.aten, layer.weight.detach()
    sizes = (layer.stride, layer.padding, layer.dilation)
    how = (*sizes, layer.transposed, layer.output_padding, layer.groups)
    masks = (wants_gradient, True, False)
    dy = torch.randn_like(y)
    jobs = [partial(aten.convolution, x, weight, None, *how)]
    if backward:
        jobs.append(partial(aten.convolution_backward, dy, x, weight, None, *how, masks))
    return jobs


def linear_products(
    weight: Tensor, x: Tensor, y: Tensor, wants_gradient: bool, backward: bool
) -> list[Callable[[], Any]]:
    x = x.reshape(-1, x.shape[-1])
    y = torch.empty_like(y.reshape(-1, y.shape[-1]))
    jobs = [partial(torch.mm, x, weight.t(), out=y)]
    if backward:
        dy = torch.randn_like(y)
        jobs.append(partial(torch.mm, dy.t(), x, out=torch.empty_like(weight)))
    if backward and wants_gradient:
        jobs.append(partial(torch.mm, dy, weight, out=torch.empty_like(x)))
    return jobs


def step_products(model: nn.Module, x: Tensor, k: int, backward: bool) -> list[Callable[[], Any]]:
    "The products of one step on images x with k samples. Raises RuntimeError where a layer was not seen at work."
    jobs: list[Callable[[], Any]] = []
    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    called = set()

    def note(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        called.add(layer)
        jobs.extend(layer_products(layer, given[0], output, backward))

    hooks = [layer.register_forward_hook(note) for layer in layers]
    with torch.set_grad_enabled(backward):
        log_weights(model, x, k)
    for hook in hooks:
        hook.remove()
    missed = [layer for layer in layers if layer not in called]
    if missed:
        raise RuntimeError(f"not called, so their products cannot be counted: {missed}")
    return jobs


def products(w: Workload, data: Data, device: torch.device) -> dict[str, float]:
    images = data.test if w.evaluates else data.train
    batch = images[: w.batch].float() if w.evaluates else data.to_model_input(images[: w.batch])
    jobs = step_products(our_model(w).to(device), batch.to(device), w.k, not w.evaluates)
    steps = math.ceil(len(images) / w.batch)
    start = now(device)
    with torch.no_grad():
        for _ in range(steps):
            for job in jobs:
                job()
    share = len(images) / (steps * w.batch)  # the last batch is a smaller one
    return {"products": (now(device) - start) * share}


def contenders(w: Workload) -> dict[str, Callable[..., dict[str, float]]]:
    "By name; pythae only where it is installed."
    if w.evaluates:
        runs = {"ours": our_evaluation, "pythae": pythae_evaluation, "products": products}
    else:
        runs = {"ours": ours, "example": example, "pythae": pythae, "products": products}
    if without_pythae():
        del runs["pythae"]
    return runs


def cut(w: Workload, data: Data, device: torch.device, quick: bool) -> Data:
    "The data with as many images as the workload wants, or a tenth."
    n = max(w.images[device.type] // (10 if quick else 1), w.batch)
    return replace(data, test=data.test[:n]) if w.evaluates else replace(data, train=data.train[:n])


def spread(values: list[float]) -> dict[str, Any]:
    return {
        "rounds": values,
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
    }


def ratios(
    seconds: dict[str, list[float]], name: str, device: torch.device
) -> dict[str, dict[str, Any]]:
    "Round by round: the others' time over ours, ours over the products; goals, and whether the medians meet them."
    pairs = [(name, "ours") for name in ("example", "pythae") if name in seconds]
    found = {}
    for a, b in [*pairs, ("ours", "products")]:
        rounds = zip(seconds[a], seconds[b], strict=True)
        found[f"{a} / {b}"] = spread([above / below for above, below in rounds])
    for (kind, workload, ratio), (sign, goal) in GOALS.items():
        if (kind, workload) != (device.type, name) or ratio not in {"ours", *found}:
            continue
        value = found.setdefault(ratio, {"median": statistics.median(seconds["ours"])})["median"]
        met = value >= goal if sign == ">=" else value <= goal
        found[ratio] |= {"goal": f"{sign} {goal:g}", "met": met}
    return found


def measured(
    name: str, data: Data, device: torch.device, args: argparse.Namespace
) -> dict[str, Any]:
    "A workload: a run of each contender to warm up, the rounds, then the memory of each in a process of its own."
    w = WORKLOADS[name]
    part = cut(w, data, device, args.quick)
    runs = contenders(w)
    n = len(part.test if w.evaluates else part.train)
    batch = None if w.evaluates else w.batch
    title = f"\n{name}: {w.title}, {n} images"
    print(f"{title}, batch {batch}" if batch else title, flush=True)
    seconds: dict[str, list[float]] = {}
    for run in runs.values():
        run(w, part, device)
    for turn in range(args.rounds):
        for other in [*runs][turn % len(runs) :] + [*runs][: turn % len(runs)]:
            for label, s in runs[other](w, part, device).items():
                seconds.setdefault(label, []).append(s)
    spec = {
        "workload": name,
        "data_dir": args.data_dir,
        "quick": args.quick,
        "device": device.type,
        "synthetic": data.name == "synthetic",
    }
    peaks = {other: point(spec | {"contender": other})["peak_mib"] for other in runs}
    found = {
        "title": w.title,
        "images": n,
        "batch": batch,
        "k": w.k,
        "peak_mib": peaks,
        "seconds": {other: spread(s) for other, s in seconds.items()},
        "ratios": ratios(seconds, name, device),
    }
    for label, v in found["seconds"].items():
        print(line(label, v, f"s   peak {peaks.get(label, math.nan):.1f} MiB"))
    for label, v in found["ratios"].items():
        print(line(label, v), flush=True)
    return found


def line(label: str, v: dict[str, Any], more: str = "") -> str:
    "A line of the table: median, least and most, the goal."
    between = f"  ({v['min']:.4f} … {v['max']:.4f}) " if "min" in v else " s"
    text = f"  {label:18}{v['median']:10.4f}{between}{more}"
    if "goal" in v:
        text += f"  goal {v['goal']}: {'met' if v['met'] else 'NOT met'}"
    return text


def same_loss(data: Data, device: torch.device, quick: bool) -> dict[str, Any]:
    """After three epochs of the small network, the ELBO of the test images, by one sample each: ours, the example, and
    the difference. Standard errors are over images: those of seeds come on top."""
    w = WORKLOADS["mlp"]
    epochs = 3
    x = data.test.float().to(device)
    found: dict[str, Any] = {}
    part = cut(w, data, device, quick)
    models = {
        "ours": fit(w, part, device, epochs)[0].to(device),
        "example": fit_example(w, part, device, epochs)[0],
    }
    for name, model in models.items():
        torch.manual_seed(0)
        weights = log_weights if name == "ours" else ExampleVAE.log_weights
        with torch.no_grad():
            found[name] = weights(model.eval(), x, 1)[0]
    found |= {f"ours - {name}": found["ours"] - found[name] for name in [*models][1:]}
    found = {
        name: {"mean": v.mean().item(), "se": v.std().item() / math.sqrt(len(v))}
        for name, v in found.items()
    }
    print(f"\nELBO of {len(x)} test images after {epochs} epochs of {len(part.train)}, nats")
    for name, v in found.items():
        print(f"  {name:24}{v['mean']:9.2f} ± {v['se']:.2f}", flush=True)
    return {"epochs": epochs, "train_images": len(part.train), "test_images": len(x), "elbo": found}


def memory(device: torch.device, peak: bool = False) -> float:
    """MiB in use (forgetting earlier peaks), or the peak since then.

    On Linux not by getrusage, which also counts what the process that started this one had.
    """
    if device.type == "cuda":
        if peak:
            return torch.cuda.max_memory_allocated(device) / 2**20
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    if not STATUS.exists():
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if not peak:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines["VmHWM" if peak else "VmRSS"].split()[0]) / 2**10


def run_point(spec: dict[str, Any]) -> dict[str, Any]:
    "In the fresh process: what one contender needs, or the time for each image at one point of growth."
    device = torch.device(spec["device"])
    found = {}
    if "workload" in spec:
        w = WORKLOADS[spec["workload"]]
        everything = synthetic(60_000) if spec["synthetic"] else mnist(spec["data_dir"])
        data = cut(w, everything, device, spec["quick"])
        run = contenders(w)[spec["contender"]]
        before = memory(device)
        run(w, data, device)
    else:
        names = ("hidden", "latent_dim", "batch", "k", "evaluates")
        w = Workload(title="", **{name: spec[name] for name in names})
        data = synthetic(spec["images"])
        if w.evaluates:
            data = replace(data, test=data.to_model_input(data.train))
        before = memory(device)
        if w.evaluates:
            times = [our_evaluation(w, data, device)["ours"] for _ in range(3)]
        else:
            times = [b - a for a, b in itertools.pairwise(fit(w, data, device, spec["epochs"])[1])]
        each = 1e6 * statistics.median(times) / spec["images"]
        found = {"us_per_image": each, "threads": torch.get_num_threads()}
    return found | {"peak_mib": memory(device, peak=True) - before, "before_mib": before}


def point(spec: dict[str, Any], processes: int = 0) -> dict[str, Any]:
    "What `run_point` says in a fresh process, or in so many by torchrun. Raises RuntimeError with what it printed."
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes)]
    command += [__file__, "--point", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the point {spec} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def growth(device: torch.device, quick: bool) -> dict[str, list[dict[str, Any]]]:
    "Time for each image (of epochs after the first) and peak memory, by samples, batch, images and processes."
    burda = {
        "hidden": (200, 200),
        "latent_dim": 50,
        "batch": 20,
        "k": 1,
        "images": 1000,
        "epochs": 4,
        "evaluates": 0,
    }
    small = burda | {"hidden": (400,), "latent_dim": 20, "batch": 128, "images": 12_800}
    tiny = burda | {"hidden": (32,), "latent_dim": 2, "batch": 100}
    judged = burda | {"evaluates": 1}
    axes = {
        "train, k": [burda | {"k": k, "epochs": 3 + 40 // k} for k in (1, 5, 50, 500)],
        "train, batch": [small | {"batch": b} for b in (32, 128, 512, 2048)],
        "train, images": [
            tiny | {"images": 10**i, "epochs": 2 + 20_000 // 10**i} for i in (3, 4, 5, 6)
        ],
        "train, processes": [small | {"processes": p} for p in (1, 2)],
        "evaluate, k": [judged | {"k": k} for k in (1, 5, 50, 500)],
        "evaluate, images": [judged | {"images": 10**i, "k": 50} for i in (2, 3, 4)],
    }
    most = torch.cuda.device_count() if device.type == "cuda" else os.cpu_count() or 1
    found: dict[str, list[dict[str, Any]]] = {title: [] for title in axes}
    for title, specs in axes.items():
        print(f"\n{title}")
        for spec in specs[:2] if quick else specs:
            processes = spec.get("processes", 0)
            if processes > most:
                continue
            x = spec[title.split(", ")[1]]
            p = point(spec | {"device": device.type}, processes)
            found[title].append({"at": x} | p)
            time_and_memory = (
                f"{p['us_per_image']:12.2f} μs / image   peak {p['peak_mib']:8.1f} MiB"
            )
            print(f"  {x:>9}{time_and_memory}", flush=True)
    return found


def about(args: argparse.Namespace, device: torch.device, data: Data) -> dict[str, Any]:
    "What was run on what."

    def git(*words: str) -> str | None:
        run = subprocess.run(
            ["git", "--no-optional-locks", *words], cwd=ROOT, capture_output=True, text=True
        )
        return run.stdout.strip() if run.returncode == 0 else None

    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    words = [a.replace(args.data_dir, "DIR") if args.data_dir else a for a in sys.argv[1:]]
    why = without_pythae()
    return {
        "command": shlex.join(["python", "benchmarks/speed.py", *words]),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "quick": args.quick,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rounds": args.rounds,
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
        "cpu": next(
            (s.split(":")[1].strip() for s in info if s.startswith("model name")),
            platform.processor(),
        ),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "data": data.name,
        "validation_images": VALID,
        "left_out": {"pythae": why} if why else {},
    }


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write(found: dict[str, Any], out: Path) -> None:
    "The file whole or not at all, and the picture beside it."
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, rounded(found))
    if found["workloads"]:
        draw(found, out.with_suffix(".png"))


GOAL_COLOR = "#D55E00"


def draw_bars(ax: Axes, bars: list[tuple[str, dict[str, Any]]], color: str, title: str) -> None:
    "A bar for each ratio: the median, a line from least to most, a red mark for the goal."
    for i, (_, ratio) in enumerate(bars):
        ax.barh(i, ratio["median"], height=0.62, color=color)
        ax.plot([ratio["min"], ratio["max"]], [i, i], color="black", linewidth=1)
        where = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "size": 8}
        ax.annotate(f"{ratio['median']:.2f}", (ratio["max"], i), **where)
        if "goal" in ratio:
            goal = float(ratio["goal"][3:])
            ax.plot([goal, goal], [i - 0.42, i + 0.42], color=GOAL_COLOR, linewidth=2)
    ax.set(yticks=range(len(bars)), yticklabels=[label for label, _ in bars])
    ax.set_xlabel("ratio of times")
    ax.set_title(title, loc="left", fontsize=9)
    ax.axvline(1, color="#999999", linewidth=0.8)
    ax.margins(x=0.18)
    ax.grid(visible=False, axis="y")


def draw(found: dict[str, Any], path: Path) -> None:
    "The ratios of each workload as bars: left the others', right those to the products alone."
    others, floors = [], []
    for name, workload in found["workloads"].items():
        for label, ratio in workload["ratios"].items():
            if label.endswith("/ ours"):
                others.append((f"{name}: {label.removesuffix(' / ours')}", ratio))
            elif label != "ours":
                floors.append((name, ratio))
    fig, (left, right) = new_figure(2, 9.0, 1.2 + 0.26 * max(len(others), 3))
    draw_bars(left, others[::-1], "#0072B2", "Time of the others / ours (more is better)")
    title = "Ours / its matrix products alone (1 is the floor)"
    draw_bars(right, floors[::-1], "#E69F00", title)
    machine = f"{found['gpu'] or found['cpu']}, {found['threads']} threads, torch {found['torch']}"
    legend = f"Bars: medians of {found['rounds']} rounds; black: least to most; red: goals"
    fig.suptitle(f"{machine}. {legend}", fontsize=8, x=0.01, ha="left")
    fig.savefig(path, dpi=90)


def arguments() -> argparse.Namespace:
    own = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own.add_argument(
        "--data-dir",
        help="folder with torchvision's MNIST; default: download, or else synthetic images",
    )
    own.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: cuda where there is one",
    )
    own.add_argument("--rounds", type=int, default=5, help="rounds of each workload (default 5)")
    own.add_argument("--only", help=f"some of {','.join([*WORKLOADS, 'growth'])} (default all)")
    own.add_argument(
        "--quick",
        action="store_true",
        help="a tenth of the images, shorter growth: to see that it works",
    )
    own.add_argument(
        "--out",
        type=Path,
        help="the JSON; the picture goes beside it (default: in the repository "
        "results/speed-DEVICE.json, speed-DEVICE-quick.json with --quick)",
    )
    own.add_argument("--point", help=argparse.SUPPRESS)
    args = own.parse_args()
    names = [*WORKLOADS, "growth"]
    args.only = args.only.split(",") if args.only else names
    wrong = set(args.only) - set(names)
    if wrong:
        own.error(f"--only: choose from {','.join(names)}, got {','.join(wrong)}")
    if args.rounds < 1:
        own.error("--rounds is at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        own.error("--device cuda: there is none here")
    return args


def main() -> None:
    args = arguments()
    if args.point:
        result = run_point(json.loads(args.point))
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(result))
        return
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    name = f"speed-{device.type}-quick.json" if args.quick else f"speed-{device.type}.json"
    out = args.out or ROOT / "results" / name
    data = mnist(args.data_dir)
    found = about(args, device, data) | {"workloads": {}, "same_loss": None, "growth": None}
    for name, why in found["left_out"].items():
        print(f"{name} is left out ({why})")
    for name in [name for name in WORKLOADS if name in args.only]:
        found["workloads"][name] = measured(name, data, device, args)
        write(found, out)
    if "mlp" in args.only and data.name != "synthetic":
        found["same_loss"] = same_loss(data, device, args.quick)
    if "growth" in args.only:
        found["growth"] = growth(device, args.quick)
    write(found, out)
    print(f"\n{out}")


if __name__ == "__main__":
    main()
