"""The mixture in NumPyro: summed out by `MixtureSameFamily`, or enumerated, which needs funsor."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.timing import Skip, available


def summed_out(start: Tensor, covariance: str) -> Any:
    """The label never becomes a site."""
    import numpyro
    import numpyro.distributions as ndist
    from numpyro.infer import Trace_ELBO

    def model(x: Any) -> None:
        weights, components = _parameters(start, covariance)
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", ndist.MixtureSameFamily(ndist.Categorical(weights), components()), obs=x)

    return model, _nothing, Trace_ELBO()


def enumerated(start: Tensor, covariance: str) -> Any:
    """The label is a site, summed out by the estimator."""
    if not available("funsor"):
        raise Skip("NumPyro enumerates by funsor, which is not installed")
    import numpyro
    import numpyro.distributions as ndist
    from numpyro.contrib.funsor import config_enumerate
    from numpyro.infer import TraceEnum_ELBO

    @config_enumerate
    def model(x: Any) -> None:
        weights, components = _parameters(start, covariance)
        with numpyro.plate("data", len(x)):
            label = numpyro.sample("component", ndist.Categorical(weights))
            numpyro.sample("x", components(label), obs=x)

    return model, _nothing, TraceEnum_ELBO(max_plate_nesting=1)


def _nothing(x: Any) -> None:
    """A guide without latent sites."""


def _parameters(start: Tensor, covariance: str) -> Any:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as ndist
    from numpyro.distributions import constraints

    k, d = start.shape
    weights = numpyro.param("weights", jnp.full(k, 1 / k), constraint=constraints.simplex)
    locs = numpyro.param("locs", jnp.asarray(start.numpy()))
    if covariance == "diag":
        scales = numpyro.param("scales", jnp.ones((k, d)), constraint=constraints.positive)
        return weights, lambda label=slice(None): ndist.Normal(locs[label], scales[label]).to_event(1)
    eyes = jnp.broadcast_to(jnp.eye(d), (k, d, d))
    tril = numpyro.param("scale_tril", eyes, constraint=constraints.lower_cholesky)
    return weights, lambda label=slice(None): ndist.MultivariateNormal(locs[label], scale_tril=tril[label])
