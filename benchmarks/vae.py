"""The VAE of the tutorials, 784-400-20, on binary data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import JitTraceMeanField_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

import pyro_lvm as lvm
from benchmarks.by_hand import by_hand
from benchmarks.numpyro_peers import numpyro_contenders
from benchmarks.ours import ours
from benchmarks.pythae_peer import pythae_vae
from benchmarks.stock import loaded, slices, stock
from benchmarks.timing import Burst, Comparison, Contender

REFERENCE = "hand-written torch"


class Networks(nn.Module):
    """Encoder and decoder with one hidden layer each."""

    def __init__(self, features: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, features))
        self.latent = latent

    def loss(self, x: Tensor) -> Tensor:
        """Minus the ELBO per datum, with the KL in closed form."""
        loc, raw = self.encoder(x).chunk(2, -1)
        scale = softplus(raw)
        logits = self.decoder(loc + scale * torch.randn_like(scale))
        divergence = 0.5 * (loc.square() + scale.square() - 1).sum() - scale.log().sum()
        return (binary_cross_entropy_with_logits(logits, x, reduction="sum") + divergence) / len(x)

    def model(self, x: Tensor) -> None:
        """As in Pyro's tutorial."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            prior = dist.Normal(x.new_zeros(len(x), self.latent), x.new_ones(len(x), self.latent))
            z = pyro.sample("z", prior.to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """As in Pyro's tutorial."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, softplus(raw)).to_event(1))


def of_numpyro(features: int, hidden: int, latent: int) -> Any:
    """The same in NumPyro, with matrices as parameters."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as ndist
    from numpyro.infer import TraceMeanField_ELBO as Loss

    def dense(name: str, rows: int, columns: int, x: Any) -> Any:
        draw = lambda key: jax.random.normal(key, (rows, columns)) / rows**0.5  # noqa: E731
        return x @ numpyro.param(name, draw) + numpyro.param(f"{name}_bias", jnp.zeros(columns))

    def model(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", ndist.Normal(jnp.zeros(latent), jnp.ones(latent)).to_event(1))
            logits = dense("decoder2", hidden, features, jax.nn.relu(dense("decoder1", latent, hidden, z)))
            numpyro.sample("x", ndist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            out = dense("encoder2", hidden, 2 * latent, jax.nn.relu(dense("encoder1", features, hidden, x)))
            loc, raw = jnp.split(out, 2, axis=-1)
            numpyro.sample("z", ndist.Normal(loc, jax.nn.softplus(raw)).to_event(1))

    return model, guide, Loss()


def comparisons(tiny: bool = False, everything: bool = False) -> Iterator[Comparison]:
    """One for each batch size; a burst is an epoch of a hundred steps, so that what ends an epoch has its share."""
    sizes = (30, 8, 2) if tiny else (784, 400, 20)
    steps = 2 if tiny else 100
    for batch_size in (16,) if tiny else (64, 128, 512):
        x = torch.bernoulli(torch.full((batch_size * steps, sizes[0]), 0.3), generator=torch.Generator().manual_seed(0))
        title = f"VAE {'-'.join(map(str, sizes))}, batch {batch_size}"
        yield Comparison(title, REFERENCE, list(_contenders(x, sizes, batch_size, steps)))


def _contenders(x: Tensor, sizes: tuple[int, int, int], batch_size: int, steps: int) -> Iterator[Contender]:
    def hand(compiled: bool) -> Burst:
        networks = Networks(*sizes)
        return by_hand(networks.loss, networks.parameters(), slices(batch_size, x), compiled=compiled)

    def pyros(elbo: Any, batches: Any, validate: bool = True) -> Burst:
        networks = Networks(*sizes)
        return stock(networks.model, networks.guide, elbo, batches, validate=validate)

    in_memory = slices(batch_size, x)
    yield Contender(REFERENCE, lambda: hand(False), steps)
    yield Contender("hand-written, torch.compile", lambda: hand(True), steps, ("compiler",))
    yield Contender("stock Pyro", lambda: pyros(TraceMeanField_ELBO(), in_memory), steps)
    yield Contender("stock Pyro, no validation", lambda: pyros(TraceMeanField_ELBO(), in_memory, False), steps)
    yield Contender("stock Pyro, DataLoader", lambda: pyros(TraceMeanField_ELBO(), loaded(batch_size, x)), steps)
    yield Contender(
        "Pyro JitTraceMeanField_ELBO",
        lambda: pyros(JitTraceMeanField_ELBO(ignore_jit_warnings=True), in_memory, False),
        steps,
        ("compiler",),  # torch.jit does without, but deprecated as it is, a test need not run it
    )
    yield from numpyro_contenders("", lambda: of_numpyro(*sizes), (x,), steps, batch_size=batch_size)
    yield Contender("pythae's VAE, fused Adam", lambda: pythae_vae(x, sizes, batch_size), steps, ("pythae",))
    features, hidden, latent = sizes
    yield from ours(lambda: lvm.VAE(features, latent, (hidden,)), x, steps, batch_size=batch_size)
