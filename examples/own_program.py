"""Declare a program from nothing: robust regression with a random effect for each group, as plain Pyro functions."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from torch import Tensor

import pyro_lvm as lvm


def model(x: Tensor, group: Tensor, y: Tensor, size: int | None = None) -> None:
    """y = a_group + b x + Student-t noise; the noise scale is a parameter, a and b have priors."""
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
    offsets = pyro.sample("offsets", dist.Normal(torch.zeros(4), 5.0).to_event(1), infer={"event_dims": ("group",)})
    with pyro.plate("data", size or len(y), subsample=y):
        pyro.sample("y", dist.StudentT(4.0, offsets[..., group] + slope * x, scale), obs=y)


def main(epochs: int = 1000) -> lvm.Fit:
    """Fit with the guide that is built from the model; print the posterior beside the truth."""
    generator = torch.Generator().manual_seed(0)
    x, group = torch.randn(400, generator=generator), torch.randint(4, (400,), generator=generator)
    offsets = torch.tensor([-2.0, 0.0, 1.0, 3.0])
    y = offsets[group] + 1.5 * x + 0.3 * torch.randn(400, generator=generator)
    data = {"x": x, "group": group, "y": y}
    fit = lvm.fit(model, data, epochs=epochs, lr=0.02, seed=0)
    posterior = fit.posterior(data, num_draws=500, seed=0)
    print(fit)
    print(f"slope   {posterior.mean('slope'):.3f} (truth 1.500)")
    print(f"offsets {posterior.mean('offsets').round(decimals=3).tolist()} (truth {offsets.tolist()})")
    print(lvm.compare_elbos(fit, data, [Trace_ELBO(), TraceGraph_ELBO()], num_draws=50, seed=0))
    return fit


if __name__ == "__main__":
    main()
