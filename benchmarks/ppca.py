"""Probabilistic PCA with an amortised guide, on all data at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import constraints

import pyro_lvm as lvm
from benchmarks.by_hand import by_hand
from benchmarks.numpyro_peers import numpyro_contenders
from benchmarks.ours import ours
from benchmarks.stock import repeated, stock
from benchmarks.timing import Burst, Comparison, Contender

REFERENCE = "hand-written torch"


class Functions:
    """The program as plain functions with `pyro.param`."""

    def __init__(self, features: int, latent: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.latent, self.features = latent, features
        self.start = 0.1 * torch.randn(features, latent, generator=generator)

    def model(self, x: Tensor) -> None:
        """Factors make rows."""
        loadings = pyro.param("loadings", self.start.clone)
        noise = pyro.param("noise", x.new_ones(()), constraint=constraints.positive)
        mean = pyro.param("mean", x.new_zeros(self.features))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), x.new_ones(self.latent)).to_event(1))
            pyro.sample("x", dist.Normal(z @ loadings.mT + mean, noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Factors as a linear function of rows, with one scale for all."""
        weight = pyro.param("weight", self.start.clone)
        shift = pyro.param("shift", x.new_zeros(self.latent))
        scale = pyro.param("scale", x.new_ones(self.latent), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ weight + shift, scale).to_event(1))

    def by_hand(self, batches: Any, compiled: bool) -> Burst:
        """The same with the KL in closed form."""
        loadings, weight = self.start.clone().requires_grad_(), self.start.clone().requires_grad_()
        mean = torch.zeros(self.features, requires_grad=True)
        shift = torch.zeros(self.latent, requires_grad=True)
        log_noise = torch.zeros((), requires_grad=True)
        log_scale = torch.zeros(self.latent, requires_grad=True)

        def loss(x: Tensor) -> Tensor:
            loc, scale = x @ weight + shift, log_scale.exp()
            residual = x - mean - (loc + scale * torch.randn_like(loc)) @ loadings.mT
            square = 0.5 * residual.square().sum() * (-2 * log_noise).exp() / len(x)
            divergence = 0.5 * loc.square().sum() / len(x) + (0.5 * (scale.square() - 1) - log_scale).sum()
            return square + self.features * (log_noise + 0.5 * math.log(2 * math.pi)) + divergence

        parameters = [loadings, weight, mean, shift, log_noise, log_scale]
        return by_hand(loss, parameters, batches, compiled=compiled)

    def of_numpyro(self) -> Any:
        """The same in NumPyro."""
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as ndist
        from numpyro.distributions import constraints as of_jax
        from numpyro.infer import TraceMeanField_ELBO as Loss

        start = jnp.asarray(self.start.numpy())

        def model(x: Any) -> None:
            loadings = numpyro.param("loadings", start)
            noise = numpyro.param("noise", jnp.ones(()), constraint=of_jax.positive)
            mean = numpyro.param("mean", jnp.zeros(self.features))
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", ndist.Normal(jnp.zeros(self.latent), jnp.ones(self.latent)).to_event(1))
                numpyro.sample("x", ndist.Normal(z @ loadings.T + mean, noise).to_event(1), obs=x)

        def guide(x: Any) -> None:
            loc = x @ numpyro.param("weight", start) + numpyro.param("shift", jnp.zeros(self.latent))
            scale = numpyro.param("scale", jnp.ones(self.latent), constraint=of_jax.positive)
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", ndist.Normal(loc, scale).to_event(1))

        return model, guide, Loss()


def comparisons(tiny: bool = False, everything: bool = False) -> Iterator[Comparison]:
    """One comparison; 20 features, 5 factors."""
    rows, steps = (40, 3) if tiny else (1_000, 100)
    x = torch.randn(rows, 20, generator=torch.Generator().manual_seed(0))
    yield Comparison(f"PPCA, D=20, L=5, n={rows}", REFERENCE, list(_contenders(x, Functions(20, 5), steps)))


def _contenders(x: Tensor, functions: Functions, steps: int) -> Iterator[Contender]:
    batches = repeated(steps, x)

    def pyros(validate: bool) -> Burst:
        return stock(functions.model, functions.guide, TraceMeanField_ELBO(), batches, validate=validate)

    yield Contender(REFERENCE, lambda: functions.by_hand(batches, False), steps)
    yield Contender("hand-written, torch.compile", lambda: functions.by_hand(batches, True), steps, ("compiler",))
    yield Contender("stock Pyro", lambda: pyros(True), steps)
    yield Contender("stock Pyro, no validation", lambda: pyros(False), steps)
    yield from numpyro_contenders("", functions.of_numpyro, (x,), steps)
    yield from ours(lambda: lvm.PPCA(functions.features, functions.latent), x, steps)
    plain = lambda: (functions.model, functions.guide)  # noqa: E731
    yield from ours(plain, x, steps, label="ours, plain functions", levels=("graph", "compiled"))
