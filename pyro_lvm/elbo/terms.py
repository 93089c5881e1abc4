r"""The bound's parts, read off the traces that an estimator makes anyway.

.. math:: \mathrm{ELBO} = \sum_{\text{observed } s} E_q[\log p(x_s \mid \cdot)]
          - \sum_{\text{latent } s} E_q[\log q(z_s \mid \cdot) - \log p(z_s \mid \cdot)]

For a site that enumeration sums out, the expectations are under its exact conditional :math:`q(k \mid x)`. They come
from one fact: an enumerated bound is (log-)linear in each factor, so its gradient with respect to a factor
:math:`\log p(s \mid k)` is the weight that factor carries, :math:`q(k \mid x)` times the plate's scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from torch.distributions import kl_divergence

from pyro_lvm.structure import base_of

__all__ = ["Terms", "closed_form_kl", "is_random", "latent_kl", "read_terms", "sampled_terms", "watch_factors"]


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

    def map(self, function: Callable[[Tensor], Tensor]) -> Terms:
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
    if guide_fn.event_shape != model_fn.event_shape:
        return None  # torch would broadcast them, or fail
    if isinstance(base_of(guide_fn), Delta):
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
    parts = [sampled_terms(*pair, analytic).map(Tensor.detach) for pair in traces]
    return Terms.mean(parts, [1.0 / estimator.num_particles] * len(parts))


def sampled_terms(model_trace: Any, guide_trace: Any, analytic: bool) -> Terms:
    """The parts at one pair's draws, with their graph.

    Args:
        model_trace: the model's trace, log-probabilities computed.
        guide_trace: the guide's.
        analytic: whether a KL stands in closed form where there is one, or at the draw like every other.
    """
    reconstruction = {
        name: _summed(node) for name, node in model_trace.nodes.items() if is_random(node) and node["is_observed"]
    }
    closed_form = _closed if analytic else None
    return Terms(reconstruction, latent_kl(model_trace, guide_trace, _summed, closed_form=closed_form))


def latent_kl(
    model_trace: Any,
    guide_trace: Any,
    expected: Callable[[Any], Tensor],
    *,
    negative_entropy: Callable[[Any], Tensor] | None = None,
    closed_form: Callable[[Any, Any], Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """E_q[log q - log p] by latent site, nats of the whole data set, with its graph.

    Args:
        model_trace: the model's trace. Sites that it sums out have no KL of their own and are passed over.
        guide_trace: the guide's.
        expected: gives E_q[log p] of a node, scaled.
        negative_entropy: gives E_q[log q] of a guide's node, scaled; None is ``expected``.
        closed_form: gives the KL of the guide's node from the model's at once, scaled, or None where it cannot.
    """
    closed: dict[str, Tensor] = {}
    model_latent: dict[str, Tensor] = {}
    for name, node in model_trace.nodes.items():
        if not is_random(node) or node["is_observed"]:
            continue
        guide_node = guide_trace.nodes.get(name)
        if guide_node is None and node["infer"].get("_enumerate_dim") is not None:
            continue
        kl = closed_form(guide_node, node) if closed_form is not None and guide_node is not None else None
        if kl is not None:
            closed[name] = kl
        else:
            model_latent[name] = expected(node)
    guide_latent = {
        name: (negative_entropy or expected)(node)
        for name, node in guide_trace.nodes.items()
        if is_random(node) and name not in closed
    }
    return {**closed, **_pair_up(model_latent, guide_latent)}


def _summed(node: Any) -> Tensor:
    return torch.as_tensor(detach_provenance(node["log_prob_sum"]))


def _closed(guide_node: Any, node: Any) -> Tensor | None:
    kl = closed_form_kl(guide_node["fn"], node["fn"])
    if kl is None:
        return None
    total: Tensor = scale_and_mask(detach_provenance(kl), guide_node["scale"], guide_node["mask"]).sum()
    return total


def _pair_up(model: dict[str, Tensor], guide: dict[str, Tensor]) -> dict[str, Tensor]:
    """Log q - log p by site; auxiliary guide sites go to the site they transform, else to all sites jointly."""
    kl = {name: -value for name, value in model.items()}
    unplaced: dict[str, Tensor] = {}
    for name, value in guide.items():
        target = name if name in kl else name.removesuffix("_unconstrained")
        if target in kl:
            kl[target] = kl[target] + value
        else:
            unplaced[name] = value
    if unplaced and kl:
        return {"+".join(kl): sum((*kl.values(), *unplaced.values()), torch.zeros(()))}
    return kl or unplaced


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
    expected = _expectations(traces, loss)
    reconstruction: dict[str, Tensor] = {}
    model_latent: dict[str, Tensor] = {}
    guide_latent: dict[str, Tensor] = {}
    summed_out: dict[str, None] = {}

    def add(sums: dict[str, Tensor], node: Any) -> None:
        sums[node["name"]] = sums.get(node["name"], torch.zeros(())) + expected(node)

    for model_trace, guide_trace in traces:
        for name, node in model_trace.nodes.items():
            if not is_random(node):
                continue
            if node["is_observed"]:
                add(reconstruction, node)
            elif name not in guide_trace or _is_listed(guide_trace.nodes[name]):
                summed_out[name] = None
            else:
                add(model_latent, node)
        for name, node in guide_trace.nodes.items():
            if is_random(node) and _is_listed(node):
                summed_out[name] = None
            elif is_random(node):
                add(guide_latent, node)
    kl = _pair_up(model_latent, guide_latent)
    if summed_out:
        zero = torch.zeros(())
        kl["+".join(summed_out)] = sum(reconstruction.values(), zero) - sum(kl.values(), zero) + loss.detach()
    return Terms(reconstruction, kl)


def _is_listed(guide_node: Any) -> bool:
    """Whether enumeration lists a guide site's values, all at once or one after another."""
    return bool({"_enumerate_dim", "_enum_total"} & set(guide_node["infer"]))


def _expectations(traces: list[tuple[Any, Any]], loss: Tensor) -> Callable[[Any], Tensor]:
    """A function that gives E_q[log-factor] of a node, scaled: the loss's gradient is the weight a factor carries."""
    nodes = [node for pair in traces for trace in pair for node in trace.nodes.values() if is_random(node)]
    factors = {id(factor): factor for node in nodes for factor in _factors(node)}
    gradients = torch.autograd.grad(loss, list(factors.values()), retain_graph=True, allow_unused=True)
    weights = {key: gradient.abs() for key, gradient in zip(factors, gradients, strict=True) if gradient is not None}

    def expected(node: Any) -> Tensor:
        weighted = [(weights[id(factor)], factor.detach()) for factor in _factors(node) if id(factor) in weights]
        # a factor of weight nought may be -inf (a clamped label): it says nothing
        parts = [torch.where(weight == 0, 0.0, weight * factor).sum() for weight, factor in weighted]
        return sum(parts, torch.zeros(()))

    return expected
