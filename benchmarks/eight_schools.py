"""Eight schools, not centred, with a mean-field Normal guide: hardly any arithmetic, so what remains is overhead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from benchmarks.numpyro_peers import numpyro_contenders
from benchmarks.ours import ours
from benchmarks.stock import repeated, stock
from benchmarks.timing import Burst, Comparison, Contender

REFERENCE = "stock Pyro"
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def model(effect: Tensor, error: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(effect.new_zeros(()), 5.0))
    spread = pyro.sample("spread", dist.HalfCauchy(effect.new_full((), 5.0)))
    with pyro.plate("data", len(effect)):
        z = pyro.sample("z", dist.Normal(effect.new_zeros(()), 1.0))
        pyro.sample("effect", dist.Normal(mean + spread * z, error), obs=effect)


def of_numpyro() -> Any:
    import numpyro
    import numpyro.distributions as ndist
    from numpyro.infer import Trace_ELBO as Loss
    from numpyro.infer.autoguide import AutoNormal as Guide

    def same(effect: Any, error: Any) -> None:
        mean = numpyro.sample("mean", ndist.Normal(0.0, 5.0))
        spread = numpyro.sample("spread", ndist.HalfCauchy(5.0))
        with numpyro.plate("data", len(effect)):
            z = numpyro.sample("z", ndist.Normal(0.0, 1.0))
            numpyro.sample("effect", ndist.Normal(mean + spread * z, error), obs=effect)

    return same, Guide(same), Loss()


def comparisons(tiny: bool = False, everything: bool = False) -> Iterator[Comparison]:
    """One comparison."""
    steps = 3 if tiny else 100

    def pyros(validate: bool) -> Burst:
        return stock(model, AutoNormal(model), Trace_ELBO(), repeated(steps, EFFECTS, ERRORS), validate=validate)

    data = (EFFECTS, ERRORS)
    contenders = [
        Contender(REFERENCE, lambda: pyros(True), steps),
        Contender("stock Pyro, no validation", lambda: pyros(False), steps),
        *numpyro_contenders("", of_numpyro, data, steps),
        *ours(lambda: model, data, steps, guide=AutoNormal, elbo=Trace_ELBO()),
    ]
    yield Comparison("eight schools, AutoNormal", REFERENCE, contenders)
