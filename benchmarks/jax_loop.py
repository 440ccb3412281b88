"""The bare loop in JAX, one compiled call for an epoch: speed.py compares ours with it where JAX is installed.

An epoch draws its order, then scans over its minibatches: binarisation, noise, loss, gradient, Adam. What a step computes
is line by line that of `BareVAE` and `fit_bare` in speed.py. Layers are pairs (weight, bias), exchanged as NumPy arrays
in PyTorch's layout. JAX keeps its own random numbers and its own choice of threads.
"""

import functools
import math
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the others need the GPU, too

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Layer = tuple[Array, Array]
IMAGE = (28, 28)
DECAY_MEAN, DECAY_SQUARE, EPSILON = 0.9, 0.999, 1e-8  # Adam's, as in PyTorch


class Parameters(NamedTuple):
    "The layers of both networks."

    encoder: list[Layer]
    decoder: list[Layer]


class AdamState(NamedTuple):
    "What a step hands to the next one."

    parameters: Parameters
    mean: Parameters
    square: Parameters
    step: Array
    key: Array


def to_jax(layer: Sequence[np.ndarray]) -> Layer:
    "A layer from PyTorch's layout: products from the right, channels last."
    weight, bias = layer
    axes = (2, 3, 1, 0) if weight.ndim == 4 else (1, 0)
    return jnp.asarray(weight.transpose(axes)), jnp.asarray(bias)


def to_torch(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    "A layer in PyTorch's layout."
    weight = np.asarray(layer[0])
    axes = (3, 2, 0, 1) if weight.ndim == 4 else (1, 0)
    return weight.transpose(axes), np.asarray(layer[1])


def affine(layer: Layer, x: Array) -> Array:
    weight, bias = layer
    return x @ weight + bias


def dense(layers: list[Layer], x: Array) -> Array:
    "A multilayer perceptron, SiLU between its layers."
    for layer in layers[:-1]:
        x = jax.nn.silu(affine(layer, x))
    return affine(layers[-1], x)


def convolve(layer: Layer, maps: Array, stride: int = 1) -> Array:
    weight, bias = layer
    around = ((1, 1), (1, 1))
    order = ("NHWC", "HWIO", "NHWC")
    return bias + jax.lax.conv_general_dilated(
        maps, weight, (stride, stride), around, dimension_numbers=order
    )


def doubled(maps: Array) -> Array:
    "Each pixel four times."
    return maps.repeat(2, axis=1).repeat(2, axis=2)


def encode(layers: list[Layer], x: Array) -> Array:
    "Images (n, 784) to (n, 2 d): with convolutions, where the first weight is one."
    if layers[0][0].ndim == 4:
        maps = x.reshape(-1, *IMAGE, 1)
        for layer in layers[:-1]:
            maps = jax.nn.silu(convolve(layer, maps, stride=2))
        x = maps.transpose(0, 3, 1, 2).reshape(len(x), -1)
        layers = layers[-1:]
    return dense(layers, x)


def decode(layers: list[Layer], z: Array) -> Array:
    "Latent variables (m, d) to logits (m, 784)."
    if layers[-1][0].ndim == 2:
        return dense(layers, z)
    channels = layers[1][0].shape[2]
    maps = jax.nn.silu(affine(layers[0], z)).reshape(-1, channels, 7, 7).transpose(0, 2, 3, 1)
    for layer in layers[1:-1]:
        maps = jax.nn.silu(convolve(layer, doubled(maps)))
    return convolve(layers[-1], maps).reshape(len(z), -1)


class Sample(NamedTuple):
    "k latent variables for each of n images, and the log likelihood of each."

    mean: Array
    log_std: Array
    noise: Array
    z: Array
    log_lik: Array


def sample(parameters: Parameters, x: Array, k: int, key: Array) -> Sample:
    mean, log_std = jnp.split(encode(parameters.encoder, x), 2, axis=-1)
    noise = jax.random.normal(key, (k, *mean.shape))
    z = mean + jnp.exp(log_std) * noise
    logits = decode(parameters.decoder, z.reshape(-1, z.shape[-1])).reshape(k, *x.shape)
    log_lik = (x * logits - jax.nn.softplus(logits)).sum(-1)
    return Sample(mean, log_std, noise, z, log_lik)


def log_mean_weight(s: Sample) -> Array:
    "(n,) nats: the importance-weighted bound."
    log_prior_over_q = 0.5 * (s.noise**2 - s.z**2).sum(-1) + s.log_std.sum(-1)
    return jax.nn.logsumexp(s.log_lik + log_prior_over_q, axis=0) - math.log(len(s.z))


def loss(parameters: Parameters, x: Array, k: int, key: Array) -> Array:
    "Minus the ELBO, its divergence in closed form; for k > 1 minus the importance-weighted bound."
    s = sample(parameters, x, k, key)
    if k > 1:
        return -log_mean_weight(s).mean()
    divergence = 0.5 * (s.mean**2 + jnp.exp(2 * s.log_std) - 1).sum(-1) - s.log_std.sum(-1)
    return (divergence - s.log_lik[0]).mean()


def adam(state: AdamState, gradient: Parameters, lr: float, key: Array) -> AdamState:
    step = state.step + 1
    size = lr / (1 - DECAY_MEAN**step)
    correction = 1 / jnp.sqrt(1 - DECAY_SQUARE**step)

    def new_mean(m: Array, g: Array) -> Array:
        return DECAY_MEAN * m + (1 - DECAY_MEAN) * g

    def new_square(v: Array, g: Array) -> Array:
        return DECAY_SQUARE * v + (1 - DECAY_SQUARE) * g * g

    def moved(p: Array, m: Array, v: Array) -> Array:
        return p - size * m / (jnp.sqrt(v) * correction + EPSILON)

    mean = jax.tree.map(new_mean, state.mean, gradient)
    square = jax.tree.map(new_square, state.square, gradient)
    parameters = jax.tree.map(moved, state.parameters, mean, square)
    return AdamState(parameters, mean, square, step, key)


def take_step(
    state: AdamState, rows: Array, images: Array, k: int, lr: float
) -> tuple[AdamState, None]:
    key, pixel_key, noise_key = jax.random.split(state.key, 3)
    pixels = images[rows]
    x = (jax.random.uniform(pixel_key, pixels.shape) * 255 < pixels).astype(jnp.float32)
    gradient = jax.grad(loss)(state.parameters, x, k, noise_key)
    return adam(state, gradient, lr, key), None


@functools.partial(jax.jit, static_argnames=("batch", "k", "lr"))
def run_epoch(state: AdamState, images: Array, batch: int, k: int, lr: float) -> AdamState:
    "All minibatches of a new order; the last one may be smaller."
    key, order_key = jax.random.split(state.key)
    order = jax.random.permutation(order_key, len(images))
    whole = len(images) // batch * batch
    step = functools.partial(take_step, images=images, k=k, lr=lr)
    state, _ = jax.lax.scan(step, state._replace(key=key), order[:whole].reshape(-1, batch))
    if whole < len(images):
        state, _ = step(state, order[whole:])
    return state


@functools.partial(jax.jit, static_argnames=("batch", "k"))
def log_evidence(parameters: Parameters, images: Array, key: Array, batch: int, k: int) -> Array:
    "(n,) nats: the bound with k samples, some images at a time."

    def of_batch(given: tuple[Array, Array]) -> Array:
        x, key = given
        return log_mean_weight(sample(parameters, x.astype(jnp.float32), k, key))

    whole = len(images) // batch * batch
    keys = jax.random.split(key, len(images) // batch + 1)
    parts = [jax.lax.map(of_batch, (images[:whole].reshape(-1, batch, 784), keys[:-1])).ravel()]
    if whole < len(images):
        parts.append(of_batch((images[whole:], keys[-1])))
    return jnp.concatenate(parts)


def missing(device: str) -> str | None:
    "Why JAX cannot run on a kind of device (cpu or cuda); None if it can."
    try:
        jax.devices(device)
    except RuntimeError as e:
        return f"{type(e).__name__}: {e}"
    return None


class JaxLoop:
    """Trains or evaluates, compiled for images of one shape.

    Args:
        layers: of encoder and decoder, each a list of (weight, bias) in PyTorch's layout.
        images: (n, 28, 28), grey levels 0 … 255 to train on, or bits to evaluate.
        batch: images in a minibatch.
        k: samples for each image.
        lr: rate of Adam; None: to evaluate.
        device: cpu or cuda.

    Attributes:
        compile_seconds: what the compiler took.
    """

    def __init__(
        self,
        layers: tuple[list[Any], list[Any]],
        images: np.ndarray,
        batch: int,
        k: int,
        lr: float | None,
        device: str,
    ) -> None:
        self.device = jax.devices(device)[0]
        with jax.default_device(self.device):
            self.parameters = Parameters(*([to_jax(layer) for layer in part] for part in layers))
            self.images = jnp.asarray(images.reshape(len(images), -1))
            start = time.perf_counter()
            if lr is None:
                given = (self.parameters, self.images, jax.random.key(0))
                self.compiled = log_evidence.lower(*given, batch=batch, k=k).compile()
            else:
                given = (self._start(0), self.images)
                self.compiled = run_epoch.lower(*given, batch=batch, k=k, lr=lr).compile()
            self.compile_seconds = time.perf_counter() - start

    def _start(self, seed: int) -> AdamState:
        zeros = jax.tree.map(jnp.zeros_like, self.parameters)
        return AdamState(self.parameters, zeros, zeros, jnp.float32(0), jax.random.key(seed))

    def fit(self, epochs: int, seed: int) -> tuple[tuple[list[Any], ...], float]:
        "The trained layers, as the first ones were given, and the seconds for an epoch."
        with jax.default_device(self.device):
            state = jax.block_until_ready(self._start(seed))
            start = time.perf_counter()
            for _ in range(epochs):
                state = self.compiled(state, self.images)
            jax.block_until_ready(state)
            seconds = (time.perf_counter() - start) / epochs
        return tuple([to_torch(layer) for layer in part] for part in state.parameters), seconds

    def evaluate(self, seed: int) -> tuple[np.ndarray, float]:
        "The bound of each image in nats, (n,), and the seconds for all."
        with jax.default_device(self.device):
            start = time.perf_counter()
            bounds = self.compiled(self.parameters, self.images, jax.random.key(seed))
            bounds.block_until_ready()
            return np.asarray(bounds), time.perf_counter() - start
