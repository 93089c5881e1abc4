"""A Gaussian mixture, its label summed out, on all data at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor
from torch.distributions import constraints

import pyro_lvm as lvm
from benchmarks.by_hand import by_hand
from benchmarks.mixture_numpyro import enumerated, summed_out
from benchmarks.numpyro_peers import numpyro_contenders
from benchmarks.ours import ours
from benchmarks.stock import repeated, stock
from benchmarks.timing import Burst, Comparison, Contender

REFERENCE = "hand-written torch"


@dataclass(frozen=True)
class Start:
    """Data, and where every contender starts."""

    x: Tensor
    locs: Tensor
    covariance: str

    @property
    def components(self) -> int:
        """K."""
        return len(self.locs)

    def ours(self) -> lvm.GaussianMixture:
        """The built-in mixture."""
        features = self.x.shape[1]
        made = lvm.GaussianMixture(self.components, features, self.covariance)  # type: ignore[arg-type]
        unit = torch.ones(features) if self.covariance == "diag" else torch.eye(features)
        weights = torch.full((self.components,), 1 / self.components)
        made.set_parameters(weights, self.locs, unit.expand(self.components, *unit.shape).clone())
        made.is_initialized.fill_(True)
        return made

    def model(self, x: Tensor) -> None:
        """Plain functions with `pyro.param`, as in Pyro's tutorial on mixtures."""
        k, d = self.locs.shape
        weights = pyro.param("weights", x.new_full((k,), 1 / k), constraint=constraints.simplex)
        locs = pyro.param("locs", self.locs.clone)
        if self.covariance == "diag":
            scales = pyro.param("scales", x.new_ones(k, d), constraint=constraints.positive)
        else:
            scales = pyro.param(
                "scale_tril", torch.eye(d).expand(k, d, d).clone(), constraint=constraints.lower_cholesky
            )
        with pyro.plate("data", len(x)):
            component = pyro.sample("component", dist.Categorical(weights))
            if self.covariance == "diag":
                likelihood: Any = dist.Normal(locs[component], scales[component]).to_event(1)
            else:
                likelihood = dist.MultivariateNormal(locs[component], scale_tril=scales[component])
            pyro.sample("x", likelihood, obs=x)

    def guide(self, x: Tensor) -> None:
        """Nothing is latent but the label."""

    def by_hand(self, steps: int, compiled: bool) -> Burst:
        """log-sum-exp over the components."""
        k, d = self.locs.shape
        logits = torch.zeros(k, requires_grad=True)
        locs = self.locs.clone().requires_grad_()
        shape = (k, d) if self.covariance == "diag" else (k, d, d)
        raw = torch.zeros(shape, requires_grad=True)

        def loss(x: Tensor) -> Tensor:
            if self.covariance == "diag":
                whitened = (x.unsqueeze(1) - locs) * (-raw).exp()
                log_volume = raw.sum(-1)
            else:  # raw holds the factor of the precision, its diagonal in logarithms
                log_diagonal = raw.diagonal(dim1=-2, dim2=-1)
                factor = raw.tril(-1) + log_diagonal.exp().diag_embed()
                whitened = (factor @ x.mT - factor @ locs.unsqueeze(-1)).permute(2, 0, 1)
                log_volume = -log_diagonal.sum(-1)
            log_joint = logits.log_softmax(-1) - log_volume - 0.5 * whitened.square().sum(-1)
            return 0.5 * d * math.log(2 * math.pi) - log_joint.logsumexp(-1).mean()

        return by_hand(loss, [logits, locs, raw], repeated(steps, self.x), compiled=compiled)


def comparisons(tiny: bool = False, everything: bool = False) -> Iterator[Comparison]:
    """Few and many rows; with ``everything`` also many components and full covariance."""
    settings = [("diag", 5, 1_000, 100), ("diag", 5, 100_000, 10)]
    if everything:
        settings += [("diag", 50, 1_000, 40), ("diag", 50, 100_000, 2)]
        settings += [("full", 5, 1_000, 100), ("full", 5, 100_000, 5)]
    for covariance, components, rows, steps in [("diag", 3, 60, 3)] if tiny else settings:
        start = make_start(rows, components, covariance=covariance)
        title = f"mixture, K={components}, D=2, {covariance}, n={rows}"
        yield Comparison(title, REFERENCE, list(_contenders(start, steps)))


def make_start(rows: int, components: int, features: int = 2, covariance: str = "diag") -> Start:
    """Data in as many clusters as there are components."""
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(components, features, generator=generator)
    label = torch.randint(components, (rows,), generator=generator)
    x = centres[label] + torch.randn(rows, features, generator=generator)
    return Start(x, centres + 0.5, covariance)


def _contenders(start: Start, steps: int) -> Iterator[Contender]:
    def pyros(validate: bool) -> Burst:
        model = config_enumerate(start.model)
        elbo = TraceEnum_ELBO(max_plate_nesting=1)
        return stock(model, start.guide, elbo, repeated(steps, start.x), validate=validate)

    yield Contender(REFERENCE, lambda: start.by_hand(steps, False), steps)
    yield Contender("hand-written, torch.compile", lambda: start.by_hand(steps, True), steps, ("compiler",))
    yield Contender("stock Pyro, TraceEnum", lambda: pyros(True), steps)
    yield Contender("stock Pyro, TraceEnum, no validation", lambda: pyros(False), steps)
    arrays = (start.x,)
    locs, covariance = start.locs, start.covariance
    yield from numpyro_contenders("", lambda: summed_out(locs, covariance), arrays, steps)
    yield from numpyro_contenders(" TraceEnum", lambda: enumerated(locs, covariance), arrays, steps)
    yield from ours(start.ours, start.x, steps)
    plain = lambda: (config_enumerate(start.model), start.guide)  # noqa: E731
    yield from ours(plain, start.x, steps, label="ours, plain functions", levels=("graph", "compiled"))
