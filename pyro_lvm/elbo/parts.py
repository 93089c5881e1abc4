r"""The bound in two differentiable pieces, read off the draws of a Pyro ELBO: reconstruction, and KL by site and unit.

.. math:: \mathrm{ELBO} = \underbrace{E_q[\log p(x \mid z)]}_{\text{reconstruction}}
          - \sum_{\text{latent } s} \underbrace{E_q[\log q(z_s \mid \cdot) - \log p(z_s \mid \cdot)]}_{\text{KL of } s}

Where the guide enumerates sites y, every expectation is a sum with the weights :math:`q(y \mid x)`, through which
gradients flow. A site that only the model enumerates is summed out inside the logarithm: it belongs to the
reconstruction, :math:`\log \sum_k p(k)\, p(x \mid k, z)`, and has no KL of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import ELBO, TraceMeanField_ELBO
from pyro.infer.traceenum_elbo import TraceEnum_ELBO, _compute_dice_elbo
from pyro.ops.provenance import detach_provenance
from torch import Tensor

from pyro_lvm.elbo.particles import PARTICLES
from pyro_lvm.elbo.terms import Terms, closed_form_kl, is_random, latent_kl, read_terms, sampled_terms, watch_factors
from pyro_lvm.errors import ProgramError
from pyro_lvm.structure import base_of

__all__ = ["DataPlate", "Parts", "read_parts", "why_no_path"]


@dataclass(frozen=True)
class DataPlate:
    """The plate over the rows: its name, and how many rows the whole data set has."""

    name: str
    size: int


@dataclass(frozen=True)
class Parts:
    """One evaluation of the plain bound in pieces, in nats of the whole data set, averaged over particles.

    Attributes:
        reconstruction: all of the bound that is no latent site's KL, shape (), with its graph.
        kl: E_q[log q - log p] by latent site, with its graph. Sites that share one joint term appear as "a+b".
        terms: the same without graph.
        draws: the traces of model and guide behind it.
        analytic: whether a KL stands in closed form where there is one.
        num_particles: over how many the draws are averaged.
    """

    reconstruction: Tensor
    kl: dict[str, Tensor]
    terms: Terms
    draws: list[tuple[Any, Any]]
    analytic: bool
    num_particles: int

    def data_plate(self) -> DataPlate:
        """The plate called "data", else the leftmost one around what is observed.

        Raises:
            ProgramError: if there is none.
        """
        nodes = [node for node in self.draws[0][0].nodes.values() if is_random(node)]
        frames = [f for node in nodes for f in node["cond_indep_stack"] if f.vectorized and f.name != PARTICLES]
        around = [f for node in nodes if node["is_observed"] for f in node["cond_indep_stack"] if f in frames]
        found = next((f for f in frames if f.name == "data"), min(around, key=lambda f: f.dim, default=None))
        if found is None:
            raise ProgramError(
                "nats per datum need to know what a datum is, and no plate holds the data: write "
                'pyro.plate("data", size or len(x), subsample=x)'
            )
        return DataPlate(found.name, int(found.full_size or found.size))

    def lies_in(self, name: str, plate: DataPlate) -> bool:
        """Whether every site behind a name of ``kl`` lies in the plate.

        Raises:
            ProgramError: if some do and some do not, so that their joint KL belongs to neither.
        """
        model_trace, guide_trace = self.draws[0]
        inside = {}
        for site in name.split("+"):
            node = model_trace.nodes[site] if site in model_trace else guide_trace.nodes[site]
            inside[site] = any(frame.name == plate.name for frame in node["cond_indep_stack"])
        if len(set(inside.values())) > 1:
            raise ProgramError(
                f"the KL of {name} is known only jointly, and {[s for s in inside if inside[s]]} have a value for each "
                f"datum, but {[s for s in inside if not inside[s]]} are shared: give the guide each site under its name"
            )
        return all(inside.values())

    def units(self, name: str, plate: DataPlate) -> Tensor:
        """KL of each coordinate of a site, summed over the data: nats of the whole data set, with its graph.

        The shape is that of the site's event, with the site's other plates before it. A site whose distribution ties
        its coordinates together (`MultivariateNormal`), or whose KL is known only as a whole, is one unit, shape ().
        """
        found = [self._units_of_draw(name, plate, *pair) for pair in self.draws]
        known = [each for each in found if each is not None]
        if len(known) < len(found):
            return self.kl[name]
        return torch.stack(known).sum(0) / self.num_particles

    def _units_of_draw(self, name: str, plate: DataPlate, model_trace: Any, guide_trace: Any) -> Tensor | None:
        if name not in model_trace or name not in guide_trace or f"{name}_unconstrained" in guide_trace:
            return None
        node, guide_node = model_trace.nodes[name], guide_trace.nodes[name]
        q, p = base_of(guide_node["fn"]), base_of(node["fn"])
        if guide_node["fn"].event_shape != node["fn"].event_shape or q.event_dim != p.event_dim:
            return None
        coordinates = guide_node["fn"].event_dim - q.event_dim
        elements = closed_form_kl(q, p) if self.analytic else None
        if elements is not None:
            elements = _scaled(detach_provenance(elements), guide_node, coordinates)
        else:
            of_guide = _scaled(q.log_prob(guide_node["value"]), guide_node, coordinates)
            of_model = _scaled(p.log_prob(node["value"]), node, coordinates)
            # values that a clamped guide excludes have weight nought
            of_guide = torch.where(of_guide == -torch.inf, 0.0, of_guide)
            elements = of_guide - of_model
        elements = torch.broadcast_to(elements, torch.broadcast_shapes(elements.shape, q.batch_shape))
        weight = _weight(guide_trace, guide_node)
        if weight is not None:
            weight = weight.reshape(*weight.shape, *[1] * coordinates)
            elements = weight * torch.where(weight == 0, 0.0, elements)
        kept = {frame.dim - coordinates for frame in guide_node["cond_indep_stack"] if frame.vectorized}
        kept -= {f.dim - coordinates for f in guide_node["cond_indep_stack"] if f.name in (plate.name, PARTICLES)}
        kept |= set(range(-coordinates, 0))
        summed = [dim for dim in range(-elements.dim(), 0) if dim not in kept]
        return elements.sum(summed) if summed else elements


def read_parts(
    base: ELBO,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Any,
    kwargs: Any,
    negative_entropy: Callable[[Any], Tensor | None] | None = None,
) -> Parts:
    """Draw as ``base`` draws, and take the plain bound apart.

    Args:
        base: a `Trace_ELBO`, `TraceMeanField_ELBO` or `TraceEnum_ELBO`.
        model: the model.
        guide: the guide.
        args: what both are called with.
        kwargs: the same by name.
        negative_entropy: E[log q] of a guide's node at every point of its plates, unscaled, to take the place of its
            log q at the draw; None where it is not known.

    Raises:
        ProgramError: if a guide site has no path for gradients, or a latent site's KL cannot be told from a site that
            is summed out.
    """
    pairs: list[tuple[Any, Any]] = list(base._get_traces(model, guide, args, kwargs))
    for model_trace, guide_trace in pairs:
        _refuse_draws(base, model_trace, guide_trace)
    analytic = isinstance(base, TraceMeanField_ELBO) and negative_entropy is None
    share = [1.0 / base.num_particles] * len(pairs)
    found = partial(Parts, draws=pairs, analytic=analytic, num_particles=base.num_particles)
    if not isinstance(base, TraceEnum_ELBO):
        whole = Terms.mean([sampled_terms(*pair, analytic) for pair in pairs], share)
        kl = whole.kl if negative_entropy is None else _mean_kl(pairs, share, negative_entropy)
        terms = Terms(whole.reconstruction, kl).map(Tensor.detach)
        return found(_total(whole.reconstruction), kl, terms)
    for pair in pairs:
        watch_factors(*pair)
    bound = sum((_compute_dice_elbo(*pair) for pair in pairs), torch.zeros(())) / base.num_particles
    kl = _mean_kl(pairs, share)
    reconstruction = bound + _total(kl)
    terms = read_terms(base, pairs, -bound)
    if negative_entropy is not None:
        kl = _mean_kl(pairs, share, negative_entropy)
        terms = Terms(terms.reconstruction, terms.kl | {name: value.detach() for name, value in kl.items()})
    return found(reconstruction, kl, terms)


def _total(parts: dict[str, Tensor]) -> Tensor:
    return sum(parts.values(), torch.zeros(()))


def _mean_kl(
    pairs: list[tuple[Any, Any]], share: list[float], negative_entropy: Callable[[Any], Tensor | None] | None = None
) -> dict[str, Tensor]:
    """E_q[log q - log p] by site, summed over what the guide enumerates and averaged over particles."""
    parts = []
    for model_trace, guide_trace in pairs:
        expected = partial(_expected, guide_trace, None)
        of_guide = partial(_expected, guide_trace, negative_entropy)
        parts.append(Terms({}, latent_kl(model_trace, guide_trace, expected, negative_entropy=of_guide)))
    return Terms.mean(parts, share).kl


def _expected(guide_trace: Any, instead: Callable[[Any], Tensor | None] | None, node: Any) -> Tensor:
    """E_q of a node's log-probability, or of what stands in its place, scaled."""
    value = None if instead is None or _listed(node) else instead(node)
    factor = node["log_prob"] if value is None else scale_and_mask(value, node["scale"], node["mask"])
    factor = torch.as_tensor(detach_provenance(factor))
    weight = _weight(guide_trace, node)
    if weight is None:
        return factor.sum()
    # a factor of weight nought may be -inf (a clamped label): it says nothing
    return (weight * torch.where(weight == 0, 0.0, factor)).sum()


def _weight(guide_trace: Any, node: Any) -> Tensor | None:
    """q of the values that the guide lists around or above a node, which broadcasts with it; None where there are none.

    A listed site that the node's plates do not reach cannot be upstream of it, and one that is not upstream sums to
    one.
    """
    plates = {frame.name for frame in node["cond_indep_stack"] if frame.vectorized}
    log_q = [
        listed["unscaled_log_prob"]
        for listed in guide_trace.nodes.values()
        if is_random(listed)
        and _listed(listed)
        and plates.issuperset(frame.name for frame in listed["cond_indep_stack"] if frame.vectorized)
    ]
    return None if not log_q else sum(log_q[1:], log_q[0]).exp()


def _listed(node: Any) -> bool:
    return node["infer"].get("_enumerate_dim") is not None


def _scaled(elements: Tensor, node: Any, coordinates: int) -> Tensor:
    """Numbers by coordinate, scaled and masked as their node is as a whole."""

    def wider(value: Any) -> Any:
        return value.reshape(*value.shape, *[1] * coordinates) if isinstance(value, Tensor) else value

    scaled: Tensor = scale_and_mask(elements, wider(node["scale"]), wider(node["mask"]))
    return scaled


def why_no_path(site: str, kind: str, enumerable: bool) -> str:
    """The words for a guide site through whose draws no gradient flows."""
    mend = (
        'mark it infer={"enumerate": "parallel"} in the guide and use base=TraceEnum_ELBO()'
        if enumerable
        else "make it a distribution with rsample, or fit with elbo=TraceGraph_ELBO() and no weights"
    )
    return (
        f"guide {site} ({kind}) is drawn and cannot be reparameterised, and a KL that is weighted apart from the "
        f"reconstruction needs a gradient through the draw: {mend}"
    )


def _refuse_draws(base: ELBO, model_trace: Any, guide_trace: Any) -> None:
    summed_out = {
        node["infer"]["_enumerate_symbol"]: name
        for name, node in model_trace.nodes.items()
        if is_random(node) and _listed(node) and name not in guide_trace and "_enumerate_symbol" in node["infer"]
    }
    for name, node in guide_trace.nodes.items():
        if not is_random(node):
            continue
        if "_enum_total" in node["infer"]:
            raise ProgramError(
                f"guide site {name!r} is enumerated one value after another, and {type(base).__name__} here sums over "
                'all at once: mark it infer={"enumerate": "parallel"}'
            )
        fn = node["fn"]
        if not _listed(node) and not is_identically_zero(node["score_parts"].score_function):
            kind = type(base_of(fn)).__name__
            raise ProgramError(why_no_path(f"site {name!r}", kind, bool(fn.has_enumerate_support)))
        if summed_out and name in model_trace:
            _refuse_tied(name, model_trace.nodes[name], summed_out)


def _refuse_tied(name: str, node: Any, summed_out: dict[str, str]) -> None:
    tied = [site for symbol, site in summed_out.items() if symbol in node["packed"]["log_prob"]._pyro_dims]
    if tied:
        raise ProgramError(
            f"the prior of site {name!r} hangs on {tied[0]!r}, which is summed out in the model, so that {name!r} has "
            f'no KL apart from it: give {tied[0]!r} a guide site, marked infer={{"enumerate": "parallel"}}'
        )
