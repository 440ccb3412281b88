"""How fast vae_nb trains and evaluates on this machine, beside others, in one interleaved run.

    python benchmarks/speed.py --data-dir DIR      (DIR holds torchvision's MNIST; without it, MNIST is downloaded)
    python benchmarks/speed.py --profile mlp       (where the time of our step goes)
    python benchmarks/speed.py --data-dir DIR --keep PART.json         (go on where a run was cut off)

Each workload gives all contenders the same images, batches, layer sizes and rate of Adam (1e-3):

  ours           Trainer.fit: an epoch after the first, its validation (100 images) included; evaluate. The first epoch,
                 with all that is done only once, is given beside it.
  ours-compiled  the same, its steps compiled (Trainer's compile="on"), where there is a C++ compiler; compiled once, before
                 the clock starts.
  bare           the loop that anybody would write by hand: images as bytes in one tensor, index_select, one noise
                 tensor, PyTorch's cross-entropy from logits, fused Adam. Our layers, activation function (SiLU), first
                 weights, binarisation, number of threads and, on a GPU, precision. One sample: the ELBO with the
                 closed-form KL divergence, which saves two log densities; more: the importance-weighted bound. It
                 draws its noise from one seed, where ours can be resumed at any step, and validates, saves and checks
                 nothing. To evaluate: log weights of k samples, logsumexp.
  bare-compiled  the same, a whole step (binarisation, loss, gradient, Adam) in one function by torch.compile, where
                 it has a C++ compiler; softplus and Adam are written out, so that they fuse.
  jax            the same in JAX, where it is installed: an epoch in one compiled call (jax_loop.py). Not with
                 convolutions on a CPU, where an epoch takes it more than ten minutes.
  example        PyTorch's VAE example, in our own words: torchvision's MNIST, which makes a picture of each image and
                 a tensor of that, a DataLoader, Adam with its defaults, a sigmoid and its cross-entropy, .item() in
                 each step; on a GPU one loading process and pinned memory, as there. We binarise each batch: ours
                 does, too. ReLU.
  pythae         its BaseTrainer with VAE (k = 1) or IWAE, and get_nll, where it is installed. Its images are
                 binarised before the clock starts, and what it writes after the epoch is not timed: both favour it.
                 ReLU.
  products       only the matrix products and convolutions that a step cannot do without, forward and backward, into
                 memory allocated before: no loss, noise, bias or optimiser. They are read off the model's layers in a
                 real forward pass; on a CPU all threads work, on a GPU they are captured as a CUDA graph, as our step
                 is, with our precision.

Every round runs each contender once, in an order that rotates; one untimed run of each comes first. Compilation is not
timed but given apart, for a machine that has compiled nothing before. A ratio is taken within a round; minimum, median
and maximum are over rounds, of which there should be five at least.

The goals, for medians: ours takes at most 1.1 times as long as bare; ours-compiled (in an evaluation, ours) at most 1.5
times as long as jax, with burda-1 twice; pythae takes at least twice as long as ours with mlp, else 1.3 times. Those for example and products are older.

That the contenders do the same is checked, too (`same`): from the same first weights, but with orders and noise of
several seeds, ours, bare, bare-compiled and jax reach the same bound within a few steps, and the same log p(x) in an
evaluation, within five standard errors; the exit status is 1 if not.

Peak memory is measured apart, in a fresh process for each, above what imports and images take, compilers included; so
is each point of `growth` (with k, batch, images, processes). Ours asks the C library to keep freed memory, for the
whole process: the others have that, too.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
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
from vae_nb.base.devices import resolve_precision, tuned_runtime
from vae_nb.base.files import write_json
from vae_nb.derivation.figures import new_figure
from vae_nb.training.compilation import resolve_compile

ROOT = Path(__file__).resolve().parent.parent
STATUS = Path("/proc/self/status")
LR = 1e-3
VALID = 100
LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
COMPILATION = ", compilation"  # ends the label of seconds that are no contender's
LABELS = (
    "ours",
    "ours, first epoch",
    "ours-compiled",
    "bare",
    "bare-compiled",
    "jax",
    "example",
    "pythae",
    "products",
)


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
    ("cpu", "mlp", "ours / products"): ("<=", 1.5),
    ("cpu", "burda-50", "ours / products"): ("<=", 1.7),
    ("cpu", "evaluate", "ours / products"): ("<=", 2.2),
    ("cuda", "mlp", "ours"): ("<=", 0.060),
    ("cuda", "mlp", "example / ours"): (">=", 50.0),
}
for kind in ("cpu", "cuda"):
    for name in WORKLOADS:
        GOALS[kind, name, "ours / bare"] = ("<=", 1.1)
        GOALS[kind, name, "pythae / ours"] = (">=", 2.0 if name == "mlp" else 1.3)
    for name in ("mlp", "burda-1", "burda-50", "evaluate"):
        ours_there = "ours" if name == "evaluate" else "ours-compiled"
        GOALS[kind, name, f"{ours_there} / jax"] = ("<=", 2.0 if name == "burda-1" else 1.5)


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


@dataclass
class Fit:
    "Our trained model, the seconds at the end of each epoch, and how many threads the steps had."

    model: VAE
    seconds: list[float]
    threads: int


def our_trainer(
    w: Workload,
    data: Data,
    device: torch.device,
    epochs: int,
    seed: int,
    compile: str = "off",
) -> Trainer:
    config = TrainConfig(
        epochs=epochs,
        batch_size=w.batch,
        lr=LR,
        k=w.k,
        objective="elbo" if w.k == 1 else "iwae",
        optimizer=OptimizerConfig(schedule="constant"),
        device=str(device),
        seed=seed,
    )
    return Trainer(our_model(w), data, config, compile=compile)


def fit(w: Workload, data: Data, device: torch.device, epochs: int, seed: int = 0) -> Fit:
    trainer = our_trainer(w, data, device, epochs, seed)
    threads: list[int] = []
    history = trainer.fit(
        progress=False, on_epoch=lambda record: threads.append(torch.get_num_threads())
    )
    # of several processes only the first calls on_epoch
    n_threads = threads[-1] if threads else torch.get_num_threads()
    return Fit(trainer.model, [record["seconds"] for record in history], n_threads)


def ours(w: Workload, data: Data, device: torch.device) -> dict[str, float]:
    "An epoch after the first; that one, with all that is done only once, is given beside it."
    first, *later = fit(w, data, device, 5 if device.type == "cuda" else 2).seconds
    return {"ours": (later[-1] - first) / len(later), "ours, first epoch": first}


def ours_compiled(w: Workload, data: Data, device: torch.device) -> dict[str, float]:
    "An epoch of a trainer that is compiled once and then used in all rounds."
    key = (f"{w.title}, ours", our_threads(w, data, device))
    with our_settings(w, data, device):
        if key not in COMPILED:
            COMPILED[key] = compiled_trainer(w, data, device)
        trainer, compilation = COMPILED[key]
        start = now(device)
        trainer.train_epoch()
        trainer.finish_epoch(trainer.validate())
        seconds = now(device) - start
    return {"ours-compiled": seconds, f"ours-compiled{COMPILATION}": compilation}


def compiled_trainer(w: Workload, data: Data, device: torch.device) -> tuple[Trainer, float]:
    "A trainer after a step that compiled, and the seconds of that step."
    trainer = our_trainer(w, data, device, 1000, 0, compile="on")
    trainer.setup()
    batch, batch_weight = next(iter(trainer.minibatches.epoch_batches(1, 0)))
    start = now(device)
    trainer.prepare_step()
    trainer.step(batch, batch_weight)
    return trainer, now(device) - start


THREADS: dict[str, int] = {}  # of our steps, by the workload's title


def our_threads(w: Workload, data: Data, device: torch.device) -> int:
    "The threads of our step, found out by taking a few."
    if w.evaluates:
        return torch.get_num_threads()
    if w.title not in THREADS:
        few = replace(data, train=data.train[: 2 * w.batch])
        THREADS[w.title] = fit(w, few, device, 1).threads
    return THREADS[w.title]


@contextlib.contextmanager
def our_settings(w: Workload, data: Data, device: torch.device) -> Iterator[None]:
    "The threads and the precision of products that our training has; evaluation has torch's own."
    if w.evaluates:
        yield
        return
    threads = our_threads(w, data, device)
    with tuned_runtime(device, precision=resolve_precision("auto", device)):
        torch.set_num_threads(threads)
        yield


def our_evaluation(w: Workload, data: Data, device: torch.device) -> dict[str, float]:
    model, start = our_model(w).to(device), now(device)
    evaluate(model, data.test, k=w.k)
    return {"ours": now(device) - start}


# --- the bare loop: what anybody would write by hand


def layers_of(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, LAYERS)]


class BareVAE(nn.Module):
    "Our layers with nothing round them, and our first weights."

    def __init__(self, w: Workload) -> None:
        super().__init__()
        body, width, self.decoder = bodies(w, nn.SiLU)
        self.encoder = nn.Sequential(body, nn.Linear(width, 2 * w.latent_dim))
        model = our_model(w)
        parts = ((self.encoder, model.posterior), (self.decoder, model.likelihood))
        for bare, theirs in parts:
            for layer, first in zip(layers_of(bare), layers_of(theirs), strict=True):
                layer.weight.data.copy_(first.weight.data)
                # ours adds a bias for each pixel, zero at first, behind the last convolution
                layer.bias.data.copy_(torch.zeros(1) if first.bias is None else first.bias.data)

    def sample(self, x: Tensor, k: int) -> tuple[Tensor, ...]:
        "Mean and log standard deviation, (n, d), noise and z, (k, n, d), and logits, (k, n, 784), of x (n, 784)."
        mean, log_std = self.encoder(x.view(-1, 1, 28, 28)).chunk(2, dim=-1)
        noise = torch.randn(k, *mean.shape, device=x.device)
        z = mean + log_std.exp() * noise
        return mean, log_std, noise, z, self.decoder(z.flatten(0, 1)).view(k, *x.shape)

    def loss(self, x: Tensor, k: int) -> Tensor:
        "Minus the ELBO, its divergence in closed form; for k > 1 minus the importance-weighted bound."
        if k > 1:
            return (math.log(k) - self.log_weights(x, k).logsumexp(0)).mean()
        mean, log_std, _, _, logits = self.sample(x, 1)
        missed = F.binary_cross_entropy_with_logits(logits[0], x, reduction="sum")
        divergence = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).sum()
        return (missed + divergence) / len(x)

    def log_weights(self, x: Tensor, k: int) -> Tensor:
        "(k, n) nats: log p(x|z) + log p(z) - log q(z|x)."
        _, log_std, noise, z, logits = self.sample(x, k)
        missed = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        return 0.5 * (noise.square() - z.square()).sum(-1) + log_std.sum(-1) - missed.sum(-1)


def binarised(pixels: Tensor) -> Tensor:
    "A one with the probability of the grey level 0 … 255."
    return (255 * torch.rand(pixels.shape, device=pixels.device) < pixels).float()


class SampledVAE(BareVAE):
    "With the divergence of the ELBO by its sample, as ours has it: for `same_steps`, not timed."

    def loss(self, x: Tensor, k: int) -> Tensor:
        return (math.log(k) - self.log_weights(x, k).logsumexp(0)).mean()


def fit_bare(
    w: Workload,
    data: Data,
    device: torch.device,
    epochs: int = 1,
    seed: int = 0,
    kind: type[BareVAE] = BareVAE,
) -> tuple[BareVAE, float]:
    "The bare loop's model, and its seconds for an epoch."
    model = kind(w).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    images = data.train.flatten(1).to(device)
    torch.manual_seed(seed)
    with our_settings(w, data, device):
        start = now(device)
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).to(device).split(w.batch):
                loss = model.loss(binarised(images.index_select(0, rows)), w.k)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        seconds = (now(device) - start) / epochs
    return model, seconds


def bare(w: Workload, data: Data, device: torch.device) -> dict[str, float]:
    return {"bare": fit_bare(w, data, device)[1]}


def bare_log_evidence(
    w: Workload, data: Data, device: torch.device, seed: int = 0
) -> tuple[Tensor, float]:
    "The k-sample bound of each test image, (n,) nats, under the first weights, and the seconds for all."
    model = BareVAE(w).to(device)
    images = data.test.flatten(1).float().to(device)
    torch.manual_seed(seed)
    with torch.no_grad():
        start = now(device)
        bounds = [model.log_weights(x, w.k).logsumexp(0) for x in images.split(w.batch)]
        found = torch.cat(bounds) - math.log(w.k)
        seconds = now(device) - start
    return found, seconds


def bare_evaluation(w: Workload, data: Data, device: torch.device) -> dict[str, float]:
    return {"bare": bare_log_evidence(w, data, device)[1]}


# --- the same step compiled, and the same in JAX


class FusableVAE(BareVAE):
    "With the cross-entropy written out: the compiler makes a slow call of PyTorch's log1p, and a fast loop of this."

    def loss(self, x: Tensor, k: int) -> Tensor:
        mean, log_std, noise, z, logits = self.sample(x, k)
        softplus = logits.relu() - logits.abs().sigmoid().log()
        log_lik = (x * logits - softplus).sum(-1)
        if k > 1:
            log_prior_over_q = 0.5 * (noise.square() - z.square()).sum(-1) + log_std.sum(-1)
            return (math.log(k) - (log_lik + log_prior_over_q).logsumexp(0)).mean()
        divergence = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).sum(-1)
        return (divergence - log_lik[0]).mean()


@dataclass
class AdamTensors:
    "What a compiled step changes (the tensors in the state of a torch.optim.Adam), and two numbers that it reads."

    parameters: list[nn.Parameter]
    means: list[Tensor]
    squares: list[Tensor]
    steps: list[Tensor]
    size: Tensor
    correction: Tensor

    @classmethod
    def of(cls, optimizer: torch.optim.Adam) -> "AdamTensors":
        parameters = optimizer.param_groups[0]["params"]
        for p in parameters:
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
        kept = ("exp_avg", "exp_avg_sq", "step")
        states = [[optimizer.state[p][name] for p in parameters] for name in kept]
        numbers = torch.zeros(2, device=parameters[0].device)
        return cls(parameters, *states, numbers[0], numbers[1])

    def set_step(self, step: int) -> None:
        "Set the numbers of a step, from 1: computed here, as a compiled step would do it anew for each entry."
        self.size.fill_(LR / (1 - 0.9**step))
        self.correction.fill_(1 / math.sqrt(1 - 0.999**step))

    def reset(self, first: list[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(self.parameters, first, strict=True):
                p.copy_(value)
            for t in self.means + self.squares + self.steps:
                t.zero_()


def whole_step(model: FusableVAE, adam: AdamTensors, pixels: Tensor, k: int) -> Tensor:
    "Binarisation, loss, gradient and Adam; returns the loss."
    loss = model.loss(binarised(pixels), k)
    gradient = torch.autograd.grad(loss, adam.parameters)
    with torch.no_grad():
        tensors = zip(adam.parameters, gradient, adam.means, adam.squares, adam.steps, strict=True)
        for p, g, mean, square, step in tensors:
            step.add_(1)
            mean.lerp_(g, 0.1)
            square.mul_(0.999).addcmul_(g, g, value=0.001)
            p.sub_(adam.size * mean / (square.sqrt() * adam.correction + 1e-8))
    return loss.detach()


class CompiledLoop:
    "Compiled once, for each size of a minibatch, and then used in all rounds."

    def __init__(self, w: Workload, device: torch.device) -> None:
        self.model = FusableVAE(w).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LR, fused=True)
        self.adam = AdamTensors.of(self.optimizer)
        self.first = [p.detach().clone() for p in self.model.parameters()]
        self.k = w.k
        self.batch = w.batch
        # fallback_random: PyTorch's own noise, that of the eager step with the same seed
        options = {"fallback_random": True, "cpp_wrapper": device.type == "cpu"}
        self.step = torch.compile(whole_step, fullgraph=True, dynamic=False, options=options)
        self.sizes: set[int] = set()
        self.compile_seconds = 0.0

    def fit(self, images: Tensor, epochs: int, seed: int) -> float:
        "Seconds for an epoch on images (n, 784), from the first weights on."
        self._compile(images)
        self.adam.reset(self.first)
        torch.manual_seed(seed)
        start = now(images.device)
        step = 0
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).to(images.device).split(self.batch):
                step += 1
                self.adam.set_step(step)
                self.step(self.model, self.adam, images.index_select(0, rows), self.k)
        return (now(images.device) - start) / epochs

    def _compile(self, images: Tensor) -> None:
        "Take one step of each size of a minibatch, which compiles it."
        sizes = {min(self.batch, len(images)), len(images) % self.batch} - {0} - self.sizes
        start = now(images.device)
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            for size in sizes:
                self.step(self.model, self.adam, images[:size], self.k)
        self.compile_seconds += now(images.device) - start
        self.sizes |= sizes


COMPILED: dict[tuple[str, int], Any] = {}  # by what it was compiled for


def fit_compiled(
    w: Workload, data: Data, device: torch.device, epochs: int = 1, seed: int = 0
) -> tuple[CompiledLoop, float]:
    "The compiled loop, its model trained, and its seconds for an epoch."
    key = (f"{w.title}, torch", our_threads(w, data, device))
    images = data.train.flatten(1).to(device)
    with our_settings(w, data, device):
        if key not in COMPILED:
            COMPILED[key] = CompiledLoop(w, device)
        return COMPILED[key], COMPILED[key].fit(images, epochs, seed)


def compiled(w: Workload, data: Data, device: torch.device) -> dict[str, float]:
    loop, seconds = fit_compiled(w, data, device)
    return {"bare-compiled": seconds, "bare-compiled, compilation": loop.compile_seconds}


def jax_loop(w: Workload, data: Data, device: torch.device) -> Any:
    "A `JaxLoop` with our first weights, compiled once for a number of images."
    from jax_loop import JaxLoop

    images = data.test if w.evaluates else data.train
    key = (f"{w.title}, jax", len(images))
    if key not in COMPILED:
        model = BareVAE(w)
        parts = (layers_of(model.encoder), layers_of(model.decoder))
        layers = tuple(
            [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in part]
            for part in parts
        )
        rate = None if w.evaluates else LR
        COMPILED[key] = JaxLoop(layers, images.numpy(), w.batch, w.k, rate, device.type)
    return COMPILED[key]


def fit_jax(
    w: Workload, data: Data, device: torch.device, epochs: int = 1, seed: int = 0
) -> tuple[BareVAE, float]:
    "JAX's weights in a bare model, and the seconds for an epoch."
    parts, seconds = jax_loop(w, data, device).fit(epochs, seed)
    model = BareVAE(w)
    for module, trained in zip((model.encoder, model.decoder), parts, strict=True):
        for layer, arrays in zip(layers_of(module), trained, strict=True):
            for name, array in zip(("weight", "bias"), arrays, strict=True):
                getattr(layer, name).data.copy_(torch.tensor(array))
    return model.to(device), seconds


def in_jax(w: Workload, data: Data, device: torch.device) -> dict[str, float]:
    loop = jax_loop(w, data, device)
    seconds = loop.evaluate(0)[1] if w.evaluates else loop.fit(1, 0)[1]
    return {"jax": seconds, "jax, compilation": loop.compile_seconds}


# --- PyTorch's example, and pythae


class Pictures(datasets.MNIST):
    "torchvision's MNIST, item by item its own, of the images (n, 28, 28) given."

    def __init__(self, images: Tensor) -> None:
        self.data, self.targets = images, torch.zeros(len(images), dtype=torch.long)
        self.transform, self.target_transform = transforms.ToTensor(), None


def conv_layer(bend: type[nn.Module], n_in: int, n_out: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(n_in, n_out, 3, stride, padding=1), bend()]


def dense_layers(bend: type[nn.Module], *widths: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out), bend()]
    return layers


def bodies(w: Workload, bend: type[nn.Module]) -> tuple[nn.Module, int, nn.Module]:
    "The encoder up to its last layer, the width there, and the decoder to logits (n, 784); `bend` between layers."
    if w.network == "conv":
        a, b = w.hidden
        up = nn.Upsample(scale_factor=2)
        decoder = nn.Sequential(
            nn.Linear(w.latent_dim, b * 49),
            bend(),
            nn.Unflatten(1, (b, 7, 7)),
            up,
            *conv_layer(bend, b, a),
            up,
            *conv_layer(bend, a, a),
            conv_layer(bend, a, 1)[0],
            nn.Flatten(),
        )
        layers = conv_layer(bend, 1, a, 2) + conv_layer(bend, a, b, 2)
        return nn.Sequential(*layers, nn.Flatten()), b * 49, decoder
    encoder = nn.Sequential(nn.Flatten(), *dense_layers(bend, 784, *w.hidden))
    decoder = nn.Sequential(*dense_layers(bend, w.latent_dim, *w.hidden[::-1], 784)[:-1])
    return encoder, w.hidden[-1], decoder


class ExampleVAE(nn.Module):
    def __init__(self, w: Workload) -> None:
        super().__init__()
        self.encoder, width, self.decoder = bodies(w, nn.ReLU)
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


def without_pythae(device: torch.device) -> None:
    "Raise whatever keeps pythae from running."
    with quiet():
        importlib.import_module("pythae.models")


def without_jax(device: torch.device) -> None:
    "Raise whatever keeps JAX from running on a kind of device."
    importlib.import_module("jax").devices(device.type)


def without_compiler(device: torch.device) -> None:
    "Raise whatever keeps torch.compile from compiling a step: an older torch, no C++ compiler."
    if not hasattr(importlib.import_module("torch._dynamo.config"), "trace_autograd_ops"):
        raise RuntimeError("this version of torch does not compile a gradient")
    with quiet():
        torch.compile(torch.sin, fullgraph=True)(torch.ones(3, device=device))


def without_our_compilation(device: torch.device) -> None:
    "Raise where our step cannot be compiled."
    resolve_compile("on", device, n_processes=1, n_steps=1)


@functools.cache
def left_out(device: torch.device) -> dict[str, str]:
    "Contenders that cannot run here, and why."
    trials = {
        "ours-compiled": without_our_compilation,
        "pythae": without_pythae,
        "jax": without_jax,
        "bare-compiled": without_compiler,
    }
    found = {}
    for name, try_it in trials.items():
        try:
            try_it(device)
        except Exception as e:
            found[name] = f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200]}"
    return found


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

    *encoder, decoder = bodies(w, nn.ReLU)
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


def as_one_call(jobs: list[Callable[[], Any]], device: torch.device) -> Callable[[], Any]:
    "A function that does all jobs: on CUDA by replaying a graph of them, as ours replays its step."

    def do_all() -> None:
        for job in jobs:
            job()

    if device.type != "cuda":
        return do_all
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            do_all()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        do_all()
    return graph.replay


def products(w: Workload, data: Data, device: torch.device) -> dict[str, float]:
    images = data.test if w.evaluates else data.train
    batch = images[: w.batch].float() if w.evaluates else data.to_model_input(images[: w.batch])
    all_threads = torch.get_num_threads()
    with our_settings(w, data, device), torch.no_grad():
        torch.set_num_threads(all_threads)
        jobs = step_products(our_model(w).to(device), batch.to(device), w.k, not w.evaluates)
        take_step = as_one_call(jobs, device)
        steps = math.ceil(len(images) / w.batch)
        start = now(device)
        for _ in range(steps):
            take_step()
        seconds = now(device) - start
    share = len(images) / (steps * w.batch)  # the last batch is a smaller one
    return {"products": seconds * share}


TRAIN = {
    "ours": ours,
    "ours-compiled": ours_compiled,
    "bare": bare,
    "bare-compiled": compiled,
    "jax": in_jax,
    "example": example,
    "pythae": pythae,
    "products": products,
}
# XLA's convolutions on a CPU: the gradient by the weights took ten minutes an epoch and more, where ours takes seconds.
TOO_SLOW = {("cpu", "conv"): ("jax",)}
EVALUATE = {
    "ours": our_evaluation,
    "bare": bare_evaluation,
    "jax": in_jax,
    "pythae": pythae_evaluation,
    "products": products,
}


def contenders(w: Workload, device: torch.device) -> dict[str, Callable[..., dict[str, float]]]:
    "Those that can run here, by name."
    runs = EVALUATE if w.evaluates else TRAIN
    return {
        name: run
        for name, run in runs.items()
        if name not in left_out(device) and name not in too_slow(w, device)
    }


def too_slow(w: Workload, device: torch.device) -> tuple[str, ...]:
    "Contenders that would take hours with a workload."
    return TOO_SLOW.get((device.type, w.network), ())


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


RATIOS = [
    ("example", "ours"),
    ("pythae", "ours"),
    ("ours", "bare"),
    ("ours", "ours-compiled"),
    ("ours", "jax"),
    ("ours-compiled", "bare"),
    ("ours-compiled", "bare-compiled"),
    ("ours-compiled", "jax"),
    ("ours", "products"),
    ("bare", "bare-compiled"),
]


def ratios(
    seconds: dict[str, list[float]], name: str, device: torch.device
) -> dict[str, dict[str, Any]]:
    "Round by round, for the contenders that ran; goals, and whether the medians meet them."
    found = {}
    for a, b in RATIOS:
        if a in seconds and b in seconds:
            rounds = zip(seconds[a], seconds[b], strict=True)
            found[f"{a} / {b}"] = spread([above / below for above, below in rounds])
    for (kind, workload, ratio), (sign, goal) in GOALS.items():
        if (kind, workload) != (device.type, name) or ratio not in {"ours", *found}:
            continue
        value = found.setdefault(ratio, {"median": statistics.median(seconds["ours"])})["median"]
        met = value >= goal if sign == ">=" else value <= goal
        found[ratio] |= {"goal": f"{sign} {goal:g}", "met": met}
    return found


def timed_rounds(
    w: Workload, data: Data, device: torch.device, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    "Seconds of each contender, by round, after a run of each to warm up; and what was compiled, in seconds."
    runs = contenders(w, device)
    seconds: dict[str, list[float]] = {}
    compilation: dict[str, float] = {}
    for run in runs.values():
        run(w, data, device)
    for turn in range(rounds):
        for other in [*runs][turn % len(runs) :] + [*runs][: turn % len(runs)]:
            for label, s in runs[other](w, data, device).items():
                if label.endswith(COMPILATION):
                    compilation[label.removesuffix(COMPILATION)] = s
                else:
                    seconds.setdefault(label, []).append(s)
    return {label: seconds[label] for label in sorted(seconds, key=LABELS.index)}, compilation


def measured(
    name: str, data: Data, device: torch.device, args: argparse.Namespace
) -> dict[str, Any]:
    "A workload: the rounds, then the memory of each contender in a process of its own."
    w = WORKLOADS[name]
    part = cut(w, data, device, args.quick)
    n = len(part.test if w.evaluates else part.train)
    batch = None if w.evaluates else w.batch
    title = f"\n{name}: {w.title}, {n} images"
    print(f"{title}, batch {batch}" if batch else title, flush=True)
    seconds, compilation = timed_rounds(w, part, device, args.rounds)
    spec = {
        "workload": name,
        "data_dir": args.data_dir,
        "quick": args.quick,
        "device": device.type,
        "synthetic": data.name == "synthetic",
    }
    runs = contenders(w, device)
    peaks = {other: point(spec | {"contender": other})["peak_mib"] for other in runs}
    found = {
        "title": w.title,
        "images": n,
        "batch": batch,
        "k": w.k,
        "threads": our_threads(w, part, device),
        "peak_mib": peaks,
        "compile_seconds": compilation,
        "seconds": {other: spread(s) for other, s in seconds.items()},
        "ratios": ratios(seconds, name, device),
    }
    for label, v in found["seconds"].items():
        memory = f"   peak {peaks[label]:.1f} MiB" if label in peaks else ""
        compiling = f"   compiled in {compilation[label]:.1f} s" if label in compilation else ""
        print(line(label, v, f"s{memory}{compiling}"))
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
    """After three epochs of the small network, the ELBO of the test images, by one sample each: of each contender, and
    the differences from ours. Standard errors are over images: those of seeds come on top."""
    w = WORKLOADS["mlp"]
    epochs = 3
    x = data.test.float().to(device)
    part = cut(w, data, device, quick)
    models = {name: trained(name, w, part, device, epochs) for name in trainable(device)}
    models["example"] = fit_example(w, part, device, epochs)[0]
    found: dict[str, Any] = {}
    for name, model in models.items():
        torch.manual_seed(0)
        found[name] = weights_of(model, x, 1)[0]
    found |= {f"ours - {name}": found["ours"] - found[name] for name in [*models][1:]}
    found = {
        name: {"mean": v.mean().item(), "se": v.std().item() / math.sqrt(len(v))}
        for name, v in found.items()
    }
    print(f"\nELBO of {len(x)} test images after {epochs} epochs of {len(part.train)}, nats")
    for name, v in found.items():
        print(f"  {name:24}{v['mean']:9.2f} ± {v['se']:.2f}", flush=True)
    return {"epochs": epochs, "train_images": len(part.train), "test_images": len(x), "elbo": found}


def trainable(device: torch.device) -> list[str]:
    "Contenders that begin with our weights and take our steps."
    names = ("ours", "bare", "bare-compiled", "jax")
    return [name for name in names if name not in left_out(device)]


def trained(
    name: str, w: Workload, data: Data, device: torch.device, epochs: int, seed: int = 0
) -> nn.Module:
    "A contender's model after some epochs, on the device."
    if name == "ours":
        return fit(w, data, device, epochs, seed).model.to(device)
    if name == "bare-compiled":
        return fit_compiled(w, data, device, epochs, seed)[0].model
    if name == "sampled":
        return fit_bare(w, data, device, epochs, seed, SampledVAE)[0]
    fit_other = fit_jax if name == "jax" else fit_bare
    return fit_other(w, data, device, epochs, seed)[0]


@torch.no_grad()
def weights_of(model: nn.Module, x: Tensor, k: int) -> Tensor:
    "(k, n) log weights, nats, of images (n, 28, 28)."
    model.eval()
    if isinstance(model, BareVAE):
        return model.log_weights(x.flatten(1), k)
    if isinstance(model, ExampleVAE):
        return model.log_weights(x, k)
    return log_weights(model, x, k)


STEPS = 100  # after which contenders are compared; a tenth with convolutions, a third with --quick


def bound_reached(
    name: str, w: Workload, data: Data, device: torch.device, seed: int, steps: int
) -> float:
    "The mean bound of test images, nats: after some steps, or what an evaluation of the first weights says."
    if not w.evaluates:
        part = replace(data, train=data.train[: steps * w.batch])
        model = trained(name, w, part, device, 1, seed)
        torch.manual_seed(0)
        log_w = weights_of(model, data.test[:500].float().to(device), w.k)
        return (log_w.logsumexp(0) - math.log(w.k)).mean().item()
    part = replace(data, test=data.test[:20])
    if name == "ours":
        return evaluate(our_model(w).to(device), part.test, k=w.k, seed=seed).log_px
    if name == "bare":
        return bare_log_evidence(w, part, device, seed)[0].mean().item()
    return float(jax_loop(w, part, device).evaluate(seed)[0].mean())


def same_steps(data: Data, device: torch.device, quick: bool) -> dict[str, dict[str, Any]]:
    """For each workload, whether contenders reach the same bound from the same weights, in as many steps, with other
    orders and noise. Standard errors are those of seeds, pooled over contenders.

    Adam's path depends on the variance of the gradient. So with one sample, where the others have the divergence in
    closed form, ours is compared with a bare loop that samples it, too.
    """
    found: dict[str, dict[str, Any]] = {}
    seeds = range(3 if quick else 6)
    print(
        "\nThe bound after a few steps from the same weights, nats; differences in standard errors"
    )
    for title, w in WORKLOADS.items():
        like_ours = "sampled" if w.k == 1 else "bare"
        pairs = [("ours", like_ours)]
        runs = contenders(w, device)
        pairs += [(name, "bare") for name in ("bare-compiled", "jax") if name in runs]
        names = dict.fromkeys(name for pair in pairs for name in pair)
        steps = (STEPS // 10 if w.network == "conv" else STEPS) // (3 if quick else 1)
        bounds = {
            n: [bound_reached(n, w, data, device, seed, steps) for seed in seeds] for n in names
        }
        means = {n: statistics.fmean(values) for n, values in bounds.items()}
        pooled = math.sqrt(statistics.fmean(statistics.variance(v) for v in bounds.values()))
        se = pooled * math.sqrt(2 / len(seeds))
        apart = {f"{a} - {b}": (means[a] - means[b]) / se for a, b in pairs}
        agree = all(abs(z) <= 5 for z in apart.values())
        found[title] = {
            "seeds": len(seeds),
            "steps": None if w.evaluates else steps,
            "bounds": means,
            "se": se,
            "differences": apart,
            "agree": agree,
        }
        reached = "   ".join(f"{n} {mean:.2f}" for n, mean in means.items())
        differences = "   ".join(f"{pair}: {z:+.1f}" for pair, z in apart.items())
        print(f"  {title:10}{reached}   ± {se:.2f}")
        print(f"  {'':10}{differences}   {'the same' if agree else 'NOT the same'}", flush=True)
    return found


def profile(name: str, data: Data, device: torch.device, quick: bool) -> None:
    "Print where the time of our step goes: operations by self time, and what is left between them."
    w = WORKLOADS[name]
    part = cut(w, data, device, quick)
    n = len(part.test if w.evaluates else part.train)
    steps = math.ceil(n / w.batch)
    plain = (our_evaluation if w.evaluates else ours)(w, part, device)["ours"]
    profiler = torch.profiler.profile()
    if w.evaluates:
        with profiler:
            our_evaluation(w, part, device)
    else:
        profile_second_epoch(our_trainer(w, part, device, 2, 0), profiler)
    table = profiler.key_averages()
    kind = "device" if device.type == "cuda" else "cpu"
    busy = sum(getattr(event, f"self_{kind}_time_total") for event in table) / steps
    step = 1e6 * plain / steps
    print(f"\n{name}: {w.title}, {steps} steps, {our_threads(w, part, device)} threads")
    print(table.table(sort_by=f"self_{kind}_time_total", row_limit=25, max_name_column_width=50))
    print(
        f"A step takes {step:.0f} μs without the profiler. With it, operations take {busy:.0f} μs of a step "
        f"({100 * busy / step:.0f} %); the rest is Python between them."
    )


def profile_second_epoch(trainer: Trainer, profiler: torch.profiler.profile) -> None:
    "Train two epochs, and watch the second: in the first one things are done only once."

    def switch(record: dict[str, Any]) -> None:
        if record["epoch"] == 1:
            profiler.start()
        else:
            profiler.stop()

    trainer.fit(progress=False, on_epoch=switch)


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
        run = (EVALUATE if w.evaluates else TRAIN)[spec["contender"]]
        our_threads(w, data, device)
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
            ends = fit(w, data, device, spec["epochs"]).seconds
            times = [b - a for a, b in itertools.pairwise(ends)]
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
        "jax": version("jax"),
        "pythae": version("pythae"),
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
        "left_out": left_out(device),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
    "The ratios of each workload as bars: the others', those to the same loop written by hand, those to the products."
    others, loops, floors = [], [], []
    for name, workload in found["workloads"].items():
        for label, ratio in workload["ratios"].items():
            above, _, below = label.partition(" / ")
            if below == "ours":
                others.append((f"{name}: {above}", ratio))
            elif above == "ours" and below == "products":
                floors.append((name, ratio))
            elif above == "ours" and below == "bare":
                loops.append((f"{name}: bare", ratio))
            elif above == "ours-compiled" and below in ("bare-compiled", "jax"):
                loops.append((f"{name}: compiled, {below}", ratio))
            elif name == "evaluate" and below == "jax":
                loops.append((f"{name}: jax", ratio))
    bars = max(len(others), len(loops), 3)
    fig, (left, middle, right) = new_figure(3, 12.0, 1.2 + 0.24 * bars)
    draw_bars(left, others[::-1], "#0072B2", "Time of the others / ours (more is better)")
    draw_bars(middle, loops[::-1], "#009E73", "Ours / the same loop by hand (less is better)")
    title = "Ours / its matrix products alone (1 is the floor)"
    draw_bars(right, floors[::-1], "#E69F00", title)
    machine = f"{found['gpu'] or found['cpu']}, {found['threads']} threads, torch {found['torch']}"
    legend = f"Bars: medians of {found['rounds']} rounds; black: least to most; red: goals"
    fig.suptitle(f"{machine}. {legend}", fontsize=8, x=0.01, ha="left")
    fig.savefig(path, dpi=90)


TASKS = [*WORKLOADS, "same", "growth"]


def chosen(
    own: argparse.ArgumentParser, option: str, value: str | None, names: list[str]
) -> list[str]:
    "The names in a list with commas; all of them without one. Ends the program for another name."
    picked = value.split(",") if value else names
    wrong = set(picked) - set(names)
    if wrong:
        own.error(f"{option}: choose from {','.join(names)}, got {','.join(wrong)}")
    return picked


KEEP_HELP = """take the workloads in this file as measured: a run of the same package, machine and versions that was cut
off"""


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
    own.add_argument("--only", help=f"some of {','.join(TASKS)} (default all)")
    own.add_argument(
        "--profile",
        metavar="WORKLOADS",
        help="print where the time of our step goes with these workloads; nothing else is run",
    )
    own.add_argument(
        "--quick",
        action="store_true",
        help="a tenth of the images, less of the rest: to see that it works",
    )
    own.add_argument(
        "--out",
        type=Path,
        help="the JSON; the picture goes beside it (default: in the repository "
        "results/speed-DEVICE.json, speed-DEVICE-quick.json with --quick)",
    )
    own.add_argument("--keep", type=Path, metavar="JSON", help=KEEP_HELP)
    own.add_argument("--point", help=argparse.SUPPRESS)
    args = own.parse_args()
    args.only = chosen(own, "--only", args.only, TASKS)
    args.profile = chosen(own, "--profile", args.profile, [*WORKLOADS]) if args.profile else []
    if args.rounds < 1:
        own.error("--rounds is at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        own.error("--device cuda: there is none here")
    return args


def below_goals(workloads: dict[str, Any]) -> list[str]:
    "Names of the workloads that miss a goal."
    return [
        name
        for name, workload in workloads.items()
        if not all(ratio.get("met", True) for ratio in workload["ratios"].values())
    ]


SAME_RUN = (
    "quick",
    "rounds",
    "python",
    "torch",
    "jax",
    "pythae",
    "cpu",
    "cores",
    "threads",
    "data",
)


def kept_workloads(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    "The workloads of a run that was cut off. Ends the program where package, machine or versions are others."
    before = json.loads(path.read_text())
    different = [key for key in SAME_RUN if before[key] != now[key]]
    changed = subprocess.run(
        ["git", "diff", "--quiet", before["commit"], now["commit"], "--", "vae_nb"], cwd=ROOT
    )
    if changed.returncode:
        different.append("the package")
    if different:
        sys.exit(f"{path} is of another run: {', '.join(different)}")
    return before["workloads"]


def run_all(args: argparse.Namespace, device: torch.device, data: Data, out: Path) -> bool:
    "Measure what was asked for and write it; whether contenders that do the same came to the same."
    nothing = {"workloads": {}, "same_loss": None, "same_steps": None, "growth": None}
    found = about(args, device, data) | nothing
    for name, why in found["left_out"].items():
        print(f"{name} is left out ({why})")
    if args.keep:
        found["workloads"] = kept_workloads(args.keep, found)
    for name in [name for name in WORKLOADS if name in args.only]:
        if name in found["workloads"]:
            continue
        found["workloads"][name] = measured(name, data, device, args)
        write(found, out)
    if "same" in args.only:
        found["same_steps"] = same_steps(data, device, args.quick)
        if data.name != "synthetic":
            found["same_loss"] = same_loss(data, device, args.quick)
    if "growth" in args.only:
        found["growth"] = growth(device, args.quick)
    write(found, out)
    print(f"\n{out}")
    missed = below_goals(found["workloads"])
    if missed:
        print(f"A goal is missed. Where the time goes: --profile {','.join(missed)}")
    return all(same["agree"] for same in (found["same_steps"] or {}).values())


def main() -> None:
    args = arguments()
    if args.point:
        result = run_point(json.loads(args.point))
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(result))
        return
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    data = mnist(args.data_dir)
    if args.profile:
        for name in args.profile:
            profile(name, data, device, args.quick)
        return
    name = f"speed-{device.type}-quick.json" if args.quick else f"speed-{device.type}.json"
    out = args.out or ROOT / "results" / name
    with tempfile.TemporaryDirectory() as cache:  # compilation is timed as on a new machine
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        agree = run_all(args, device, data, out)
    if not agree:
        sys.exit("Contenders that should do the same do not: see above")


if __name__ == "__main__":
    main()
