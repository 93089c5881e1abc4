r"""The bound's parts, read off the traces that an estimator makes anyway.

.. math:: \mathrm{ELBO} = \sum_{\text{observed } s} E_q[\log p(x_s \mid \cdot)]
          - \sum_{\text{latent } s} E_q[\log q(z_s \mid \cdot) - \log p(z_s \mid \cdot)]

For a site that enumeration sums out, the expectations are under its exact conditional :math:`q(k \mid x)`. They come
from one fact: an enumerated bound is (log-)linear in each factor, so its gradient with respect to a factor
:math:`\log p(s \mid k)` is the weight that factor carries, :math:`q(k \mid x)` times the plate's scale.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.traceenum_elbo import TraceEnum_ELBO
from pyro.ops.provenance import detach_provenance
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Independent, kl_divergence

__all__ = ["Terms", "closed_form_kl", "is_random", "read_terms"]


@dataclass(frozen=True)
class Terms:
    """The plain bound of one step and its parts, in nats of the whole data set (plates scaled).

    Attributes:
        reconstruction: E_q[log p(x)] by observed site.
        kl: E_q[log q - log p] by latent site. Sites that share one joint term appear as "a+b".
    """

    reconstruction: dict[str, Tensor]
    kl: dict[str, Tensor]

    @property
    def elbo(self) -> Tensor:
        """The plain lower bound: reconstruction minus KL."""
        zero = torch.zeros(())
        return sum(self.reconstruction.values(), zero) - sum(self.kl.values(), zero)

    def map(self, function: Any) -> Terms:
        """The terms with ``function`` applied to each."""
        return Terms(
            {k: function(v) for k, v in self.reconstruction.items()}, {k: function(v) for k, v in self.kl.items()}
        )

    @staticmethod
    def mean(parts: Iterable[Terms], weights: Iterable[float]) -> Terms:
        """The weighted mean of several steps' terms; the weights sum to one."""
        total: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        for terms, weight in zip(parts, weights, strict=True):
            for sums, values in zip(total, (terms.reconstruction, terms.kl), strict=True):
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + weight * value
        return Terms(*total)


def is_random(node: Any) -> bool:
    """Whether a trace's node is a sample statement that carries probability."""
    return (
        node["type"] == "sample"
        and not isinstance(node["fn"], _Subsample)
        and not node["infer"].get("_deterministic", False)
    )


def closed_form_kl(guide_fn: Any, model_fn: Any) -> Tensor | None:
    """KL(guide || model) where torch has a closed form for the pair and it is exact, else None."""
    base = guide_fn
    while isinstance(base, Independent):
        base = base.base_dist
    if isinstance(base, Delta):
        return None  # Pyro's entry for Delta forgets the log-density that autoguides put there
    try:
        kl: Tensor = kl_divergence(guide_fn, model_fn)
    except NotImplementedError:
        return None
    return kl


def read_terms(estimator: Any, traces: list[tuple[Any, Any]], loss: Tensor | None) -> Terms:
    """The plain bound's parts from the traces of one step.

    Args:
        estimator: the Pyro ELBO that made them.
        traces: (model trace, guide trace) for each particle, or one vectorised pair.
        loss: the estimator's loss with its graph alive; needed where sites were enumerated.
    """
    if isinstance(estimator, TraceEnum_ELBO):
        if loss is None:
            raise TypeError("the parts of an enumerated bound need its loss with the graph alive")
        return _enumerated_terms(traces, loss)
    analytic = isinstance(estimator, TraceMeanField_ELBO)
    parts = [_sampled_terms(model_trace, guide_trace, analytic) for model_trace, guide_trace in traces]
    return Terms.mean(parts, [1.0 / estimator.num_particles] * len(parts))


def _sampled_terms(model_trace: Any, guide_trace: Any, analytic: bool) -> Terms:
    reconstruction: dict[str, Tensor] = {}
    model_latent: dict[str, Tensor] = {}
    closed: dict[str, Tensor] = {}
    for name, node in model_trace.nodes.items():
        if not is_random(node):
            continue
        if node["is_observed"]:
            reconstruction[name] = _value(node["log_prob_sum"])
            continue
        guide_node = guide_trace.nodes.get(name)
        kl = closed_form_kl(guide_node["fn"], node["fn"]) if analytic and guide_node is not None else None
        if kl is not None:
            closed[name] = _value(scale_and_mask(kl, guide_node["scale"], guide_node["mask"]).sum())
        else:
            model_latent[name] = _value(node["log_prob_sum"])
    guide_latent = {
        name: _value(node["log_prob_sum"])
        for name, node in guide_trace.nodes.items()
        if is_random(node) and name not in closed
    }
    return Terms(reconstruction, {**closed, **_pair_up(model_latent, guide_latent)})


def _pair_up(model: dict[str, Tensor], guide: dict[str, Tensor]) -> dict[str, Tensor]:
    """log q - log p by site; auxiliary guide sites go to the site they transform, else to all sites jointly."""
    kl = {name: -value for name, value in model.items()}
    unplaced = []
    for name, value in guide.items():
        target = name if name in kl else name.removesuffix("_unconstrained")
        if target in kl:
            kl[target] = kl[target] + value
        else:
            unplaced.append(value)
    if unplaced and kl:
        return {"+".join(kl): sum(kl.values(), sum(unplaced, torch.zeros(())))}
    return kl


def watch_factors(model_trace: Any, guide_trace: Any) -> None:
    """Make every log-factor of an enumerated pair differentiable, also where no parameter stands behind it."""
    for trace in (model_trace, guide_trace):
        for node in trace.nodes.values():
            if is_random(node):
                for factor in _factors(node):
                    if not factor.requires_grad:
                        factor.requires_grad_()


def _factors(node: Any) -> list[Tensor]:
    """The two forms in which a site's log-probability may enter an enumerated bound: scaled, else unscaled."""
    forms = (node["packed"].get("log_prob"), node["packed"].get("unscaled_log_prob"))
    return [form for form in forms if isinstance(form, Tensor)]


def _enumerated_terms(traces: list[tuple[Any, Any]], loss: Tensor) -> Terms:
    """Expected log-factors by gradient; the log q of enumerated sites by the identity of the bound."""
    nodes = [
        (name, node, guide_trace)
        for model_trace, guide_trace in traces
        for name, node in model_trace.nodes.items()
        if is_random(node)
    ]
    sampled = [(name, guide.nodes[name]) for name, node, guide in nodes if name in guide.nodes and not node["is_observed"]]
    watched = {id(f): f for node in [n for _, n, _ in nodes] + [n for _, n in sampled] for f in _factors(node)}
    gradients = torch.autograd.grad(loss, list(watched.values()), retain_graph=True, allow_unused=True)
    gradient_of = dict(zip(watched, gradients, strict=True))

    def expected(node: Any) -> Tensor:
        """E_q[log-factor], scaled: minus the loss's gradient is the weight that the factor carries."""
        for factor in _factors(node):
            gradient = gradient_of[id(factor)]
            if gradient is not None:
                # a factor of weight nought may be -inf (a clamped label): it says nothing
                return torch.where(gradient == 0, 0.0, -gradient * factor.detach()).sum()
        return torch.zeros((), dtype=loss.dtype, device=loss.device)

    reconstruction: dict[str, Tensor] = {}
    kl: dict[str, Tensor] = {}
    summed_out: dict[str, None] = {}
    for name, node, guide_trace in nodes:
        guide_node = guide_trace.nodes.get(name)
        if node["is_observed"]:
            reconstruction[name] = reconstruction.get(name, torch.zeros(())) + expected(node)
        elif guide_node is None or {"_enumerate_dim", "_enum_total"} & set(guide_node["infer"]):
            summed_out[name] = None
        else:
            kl[name] = kl.get(name, torch.zeros(())) - expected(guide_node) - expected(node)
    if summed_out:
        zero = torch.zeros(())
        kl["+".join(summed_out)] = sum(reconstruction.values(), zero) - sum(kl.values(), zero) + loss.detach()
    return Terms(reconstruction, kl)


def _value(tensor: Any) -> Tensor:
    return torch.as_tensor(detach_provenance(tensor)).detach()
