r"""The units of a latent variable: what each knows of the data, and how the posteriors together cover the prior.

.. math::
    \text{activity}_u = \frac{\operatorname{Var}_x E_q[z_u \mid x]}{\operatorname{Var}_p[z_u]}, \qquad
    \frac1n \sum_i \mathrm{KL}\bigl(q(z_u \mid x_i) \Vert p(z_u)\bigr) =
    I_q(i; z_u) + \mathrm{KL}\bigl(\bar q(z_u) \Vert p(z_u)\bigr), \qquad \bar q(z) = \frac1n \sum_i q(z \mid x_i)

The KL of a unit is what it knows of the data (the mutual information between it and the number i of a row, at most
log n) and how far the aggregate posterior, the mean of all posteriors, is from the prior.

Sources: Burda, Grosse and Salakhutdinov, 2016, https://arxiv.org/abs/1509.00519 (a unit is active if the variance is
above 0.01, with a prior of variance one); Hoffman and Johnson, 2016,
http://approximateinference.org/accepted/HoffmanJohnson2016.pdf (the two parts of the KL).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import IndependentTransform, TransformedDistribution, biject_to, constraints

from pyro_lvm.criticism.judged_rows import JudgedRows
from pyro_lvm.dependencies import parents
from pyro_lvm.elbo.terms import closed_form_kl
from pyro_lvm.evaluation import Evaluation
from pyro_lvm.structure import Site, base_of, support_of_entry

__all__ = ["Units", "units_of"]

DRAWS = 4
"""Draws of each row's latent; averaged over the rows, they are many."""

_Real = type(constraints.real)

ENTRIES = 2**23
"""Numbers in one table of densities, rows by draws by units; memory only."""


@dataclass(frozen=True)
class Units:
    """One latent site of every datum, entry by entry of its event; U entries, n rows.

    Attributes:
        site: its name.
        activity: variance over data of the posterior mean, in units of the prior's variance, shape (U,).
        kl: mean KL from the prior, nats per datum, shape (U,).
        mutual_information: nats between the number of a row and the unit, at most log n, shape (U,).
        aggregate_kl: nats from the mean of all posteriors to the prior, shape (U,).
        aggregate_mean: of that mean of posteriors, in the prior's standard deviations from its mean, shape (U,).
        aggregate_sd: of the same, shape (U,).
        means: posterior means, shape (n, U).
        draws: one draw of each row, shape (n, U).
        total_information: nats between the number of a row and all units together, at most log n.
    """

    site: str
    activity: Tensor
    kl: Tensor
    mutual_information: Tensor
    aggregate_kl: Tensor
    aggregate_mean: Tensor
    aggregate_sd: Tensor
    means: Tensor
    draws: Tensor
    total_information: float


@torch.no_grad()
def units_of(evaluation: Evaluation, rows: JudgedRows) -> tuple[list[Units], dict[str, str]]:
    """The units of every continuous latent site of a datum, and why sites were left out.

    What all data share is drawn once from its guide.
    """
    structure, bound, batch = evaluation.structure, evaluation.bound, rows.whole
    with poutine.block():
        guide_trace = poutine.trace(bound.guide).get_trace(*batch.args, **batch.named())
        model_trace = poutine.trace(poutine.replay(bound.model, trace=guide_trace)).get_trace(
            *batch.args, **batch.named()
        )
    values = {name: node["value"] for name, node in guide_trace.nodes.items() if node["type"] == "sample"}
    of_model, of_guide = (parents(function, batch, values) for function in (bound.model, bound.guide))
    local = {site.name for site in structure.local_latent}
    found: list[Units] = []
    skipped: dict[str, str] = {}
    for site in structure.local_latent:
        if site.name not in guide_trace.nodes:
            continue
        if site.discrete:
            skipped[site.name] = "it is discrete"
            continue
        pair = _marginals(site, guide_trace, model_trace, len(rows))
        between = ((of_model.get(site.name, frozenset()) | of_guide.get(site.name, frozenset())) & local) - {site.name}
        if between:
            skipped[site.name] = f"it depends on {', '.join(sorted(between))}, so that it has no one prior"
        elif pair is None:
            skipped[site.name] = "its distribution cannot be taken apart entry by entry, or lies in a further plate"
        else:
            found.append(_units(site.name, *pair, len(rows)))
    return found, skipped


def _marginals(site: Site, guide_trace: Any, model_trace: Any, rows: int) -> tuple[Any, Any] | None:
    """Distributions of the single entries under guide and model, batch shape (rows, *event) each."""
    if len(site.plates) != 1:
        return None
    node, event = guide_trace.nodes[site.name], site.fn.event_shape
    auxiliary = guide_trace.nodes.get(f"{site.name}_unconstrained")
    if auxiliary is None:
        guide = _entries(node["fn"])
    else:  # an autoguide's site is a point; the spread is the auxiliary's, on the real line
        guide, transform = _entries(auxiliary["fn"]), biject_to(site.fn.support)
        if auxiliary["fn"].event_shape != event or transform.domain.event_dim > len(event):
            return None
        if guide is not None and not isinstance(support_of_entry(site.fn.support), _Real):
            guide = TransformedDistribution(guide, [_by_entry(transform)])
    prior = _entries(model_trace.nodes[site.name]["fn"])
    if guide is None or prior is None:
        return None
    shape = (rows, *event)
    if any(len(part.batch_shape) > len(shape) for part in (guide, prior)):
        return None
    return guide.expand(shape), prior.expand(shape)


def _by_entry(transform: Any) -> Any:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform


def _entries(fn: Any) -> Any | None:
    base = base_of(fn)
    if isinstance(base, dist.Delta):
        return None
    if isinstance(base, torch.distributions.MultivariateNormal | torch.distributions.LowRankMultivariateNormal):
        return dist.Normal(base.mean, base.variance.sqrt())
    return base if not base.event_shape else None


def _units(name: str, guide: Any, prior: Any, rows: int) -> Units:
    draws = guide.sample((DRAWS,)).reshape(DRAWS, rows, -1)  # (draws, rows, units)
    event = guide.batch_shape[1:]
    shaped = draws.reshape(DRAWS, rows, *event)
    log_q = guide.log_prob(shaped).reshape(draws.shape).double()
    log_p = prior.log_prob(shaped).reshape(draws.shape).double()
    closed = closed_form_kl(guide, prior)
    kl = (log_q - log_p).mean((0, 1)) if closed is None else closed.reshape(rows, -1).double().mean(0)
    by_unit, together = _mutual_information(guide, draws, log_q)
    means = _moment(guide, "mean", draws.mean(0))
    middle = _moment(prior, "mean", None)
    variance = _moment(prior, "variance", None)
    middle = torch.zeros_like(means) if middle is None else middle
    variance = torch.ones_like(means) if variance is None else variance
    spread = variance.mean(0).sqrt()
    every = (draws - middle) / spread
    return Units(
        name,
        (means.var(0) / variance.mean(0)).double().cpu(),
        kl.cpu(),
        by_unit.cpu(),
        (kl - by_unit).cpu(),
        every.mean((0, 1)).double().cpu(),
        every.flatten(0, 1).std(0).double().cpu(),
        means.cpu(),
        draws[0].cpu(),
        together,
    )


def _moment(fn: Any, name: str, otherwise: Tensor | None) -> Any:
    """A moment of every entry, shape (rows, units), where the distribution knows it and it is finite."""
    try:
        value: Tensor = getattr(fn, name)
    except NotImplementedError:
        return otherwise
    return value.reshape(len(value), -1) if bool(value.isfinite().all()) else otherwise


def _mutual_information(guide: Any, draws: Tensor, log_q: Tensor) -> tuple[Tensor, float]:
    """I(i; z_u) of each unit, shape (U,), and I(i; z) of all together: E[log q(z | x_i) - log mean_j q(z | x_j)]."""
    _, rows, units = draws.shape
    event = guide.batch_shape[1:]
    flat, own = draws.reshape(-1, units), log_q.reshape(-1, units)
    step = max(1, ENTRIES // (rows * units))
    by_unit = torch.zeros(units, dtype=torch.float64, device=draws.device)
    together = 0.0
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        table = guide.log_prob(flat[part].reshape(-1, 1, *event)).reshape(-1, rows, units).double()
        by_unit += (own[part] - table.logsumexp(1) + math.log(rows)).sum(0)
        joint = own[part].sum(-1) - table.sum(-1).logsumexp(1) + math.log(rows)
        together += joint.sum().item()
    return by_unit / len(flat), together / len(flat)
