r"""Importance weights of one draw from the guide, with enumerated sites summed out exactly.

.. math:: w_i = \frac{\sum_k p(x_i, k, z_i \mid \theta)}{q(z_i \mid x_i)}, \qquad E_q[w_i] = p(x_i \mid \theta)

A site that the guide enumerates is summed over too, not weighted by q: its sum is exact whatever q says. A site that
the guide leaves to the model is drawn from its prior, and the prior cancels from the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

from pyro_lvm.data import Batch
from pyro_lvm.elbo.factors import Factors, in_plate, log_factors
from pyro_lvm.elbo.particles import PARTICLES
from pyro_lvm.elbo.terms import is_random
from pyro_lvm.errors import ProgramError
from pyro_lvm.parameters import BoundProgram
from pyro_lvm.structure import Site, Structure

__all__ = [
    "Draw",
    "Source",
    "draw_enumerated",
    "draw_latent",
    "draw_local",
    "enumerated_probabilities",
    "from_guide",
    "from_prior",
    "in_order",
    "is_listed",
    "local_log_weight",
    "log_joint",
    "log_weight",
    "point_estimates",
    "sampled_sites",
    "weighs_rows",
]


@dataclass(frozen=True)
class Draw:
    """One draw of the guide, the model enumerated against it, and plate symbols shared by both.

    Attributes:
        model_trace: the model's trace, tensors packed.
        guide_trace: the guide's trace, tensors packed.
        particles: how many draws it holds side by side, in the plate `PARTICLES` left of all others, if more than one.
    """

    model_trace: Any
    guide_trace: Any
    particles: int = 1

    @property
    def particle_symbols(self) -> list[str]:
        """The symbol of the particles' dim, if there is one."""
        return [self.model_trace.plate_to_symbol[PARTICLES]] if self.particles > 1 else []


@dataclass(frozen=True)
class Source:
    """What draws are made with: a guide that draws, or lists, latent sites, and the model run against it.

    Attributes:
        model: takes a batch's arguments and keywords.
        guide: likewise.
        structure: of the program.
        held: a trace with sites that are held at its values, or None.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    structure: Structure
    held: Any | None = None

    def draw(self, batch: Batch, particles: int = 1) -> Draw:
        """One draw of every sampled site, or several side by side."""
        # around everything, where enumeration has seen the site before its value is given
        replay: Any = nullcontext() if self.held is None else poutine.replay(trace=self.held)
        with poutine.block(), replay:
            return _enumerate(self.model, self.guide, self.structure, batch, particles)

    def holding(self, nodes: Mapping[str, Any], values: Mapping[str, Tensor]) -> Source:
        """The same with sites held at ``values``; ``nodes`` are those of a trace that has them."""
        held = poutine.Trace()
        for name, value in values.items():
            held.add_node(name, **{**nodes[name], "value": value, "infer": {}})
        return replace(self, held=held)


def from_guide(bound: BoundProgram, structure: Structure) -> Source:
    """Draws of the guide.

    Raises:
        ProgramError: if a guide site is enumerated one value at a time.
    """
    for site in structure.enumerated_in_guide:
        if site.enumerated == "sequential":
            raise ProgramError(f"guide site {site.name!r} is enumerated sequentially: mark it 'parallel'")
    return Source(bound.model, bound.guide, structure)


def from_prior(bound: BoundProgram, structure: Structure) -> Source:
    """Draws of the prior. Of the guide only what it lists stays, which may be clamped to what is known."""
    source = from_guide(bound, structure)
    if not structure.enumerated_in_guide:
        return Source(source.model, lambda *_, **__: None, structure)
    listed = [site.name for site in structure.enumerated_in_guide if site.enumerable]
    hidden = [name for name in structure.guide if name not in listed]
    return Source(source.model, poutine.block(source.guide, hide=hidden), structure)


def draw_latent(bound: BoundProgram, structure: Structure, batch: Batch, fixed: Any | None = None) -> Draw:
    """Draw the sampled latents from the guide and enumerate the others.

    Args:
        bound: the program with its parameters.
        structure: its structure.
        batch: the data.
        fixed: a guide trace whose values are used instead of fresh draws, or None.

    Raises:
        ProgramError: if a guide site is enumerated one value at a time.
    """
    source = from_guide(bound, structure)
    guide = source.guide if fixed is None else poutine.replay(source.guide, trace=fixed)
    return replace(source, guide=guide).draw(batch)


def draw_local(bound: BoundProgram, structure: Structure, batch: Batch, draw: Draw) -> Draw:
    """Draw the latents of each datum again, with what all data share held as in ``draw``.

    Where the guide has no density for them by themselves (`weighs_rows`) they are drawn from the model.
    """
    if weighs_rows(structure):
        held = _only(draw.guide_trace, lambda node: not in_plate(node, structure.data_plate))
        return draw_latent(bound, structure, batch, fixed=held)
    shared = {site.name for site in structure.global_latent}
    held = _only(draw.guide_trace, lambda node: node["name"] in shared)
    return Source(poutine.replay(bound.model, trace=held), lambda *_, **__: None, structure).draw(batch)


def sampled_sites(structure: Structure) -> list[Site]:
    """Latent sites that are drawn, where the others are listed and summed out."""
    listed = {site.name for site in (*structure.enumerated_in_model, *structure.enumerated_in_guide) if site.enumerable}
    return [site for site in structure.latent if site.name not in listed]


def weighs_rows(structure: Structure) -> bool:
    """Whether the guide has a density q(z_i | theta) for the latents of each datum by themselves.

    A guide of all data jointly (full rank) has none, and a point (MAP) has no density at all.
    """
    drawn = [site.name for site in structure.local_latent if site.name in structure.guide]
    own = {f"{site.name}_unconstrained" for site in structure.global_latent}
    between = [site.name for site in structure.guide.values() if site.name not in structure.model]
    joint = [name for name in between if not structure.guide[name].inside(structure.data_plate)]
    return not drawn or (own.issuperset(joint) and not set(drawn) & set(point_estimates(structure)))


def point_estimates(structure: Structure) -> list[str]:
    """Latent sites at which the guide has one value and no spread (``guide="map"``)."""
    if any(site.name not in structure.model for site in structure.guide.values()):
        return []  # an auxiliary site carries the spread, and a Delta its transformed value
    return [site.name for site in structure.latent if _is_delta(structure.guide.get(site.name))]


def _is_delta(site: Site | None) -> bool:
    return site is not None and isinstance(site.base, Delta)


def _enumerate(
    model: Callable[..., Any], guide: Callable[..., Any], structure: Structure, batch: Batch, particles: int = 1
) -> Draw:
    estimator = TraceEnum_ELBO(
        num_particles=particles,
        max_plate_nesting=structure.max_plate_nesting,  # to which it adds that of the particles
        vectorize_particles=True,
        strict_enumeration_warning=False,
    )
    configure: Any = poutine.infer_config  # its own types ask for Pyro's messages and nothing less
    model, guide = (configure(function, config_fn=_without_repeats) for function in (model, guide))
    model_trace, guide_trace = next(estimator._get_traces(model, guide, batch.args, batch.named()))
    return Draw(model_trace, guide_trace, particles)


def _without_repeats(site: Any) -> dict[str, Any]:
    """A site that a step draws several times at once is drawn once here, or listed if it can be."""
    if site["infer"].get("num_samples") is None:
        return {}
    return {"num_samples": None} if site["fn"].has_enumerate_support else {"num_samples": None, "enumerate": None}


def _only(trace: Any, wanted: Callable[[Any], bool]) -> Any:
    kept = poutine.Trace()
    for name, node in trace.nodes.items():
        if is_random(node) and wanted(node):
            kept.add_node(name, **node)
    return kept


def local_log_weight(draw: Draw, data_plate: str | None) -> Tensor:
    """Log w of each datum given the shared draws, nats; sites outside the data plate stay out of it.

    Returns:
        Shape (batch,), or (particles, batch) for several draws side by side.

    Raises:
        ProgramError: if there is no plate over the rows, or a site outside it is enumerated.
    """
    if data_plate is None:
        raise ProgramError(
            "the program has no plate over its rows, so nothing can be said per datum: write "
            'with pyro.plate("data", size or len(x), subsample=x) around what belongs to one datum'
        )
    factors = log_factors(draw.model_trace, draw.guide_trace, data_plate)
    _refuse_shared_lists(draw, factors, data_plate)
    return in_order(factors, [*draw.particle_symbols, draw.model_trace.plate_to_symbol[data_plate]])


def in_order(factors: Factors, symbols: list[str]) -> Tensor:
    """All factors contracted to the plates ``symbols``, one dim for each."""
    term: Any = factors.contract(frozenset(symbols))
    return term.permute([term._pyro_dims.index(symbol) for symbol in symbols])  # type: ignore[no-any-return]


def log_weight(draw: Draw) -> Tensor:
    """Log p(x, everything drawn) - log q(everything drawn) of the whole batch, enumerated sites summed.

    Returns:
        Shape (), or (particles,) for several draws side by side.
    """
    return in_order(log_factors(draw.model_trace, draw.guide_trace), draw.particle_symbols)


def log_joint(draw: Draw) -> Tensor:
    """Log p(x, everything drawn) of the whole batch, enumerated sites summed out; shape ()."""
    return log_factors(draw.model_trace, None).contract().reshape(())


def draw_enumerated(bound: BoundProgram, draw: Draw, batch: Batch) -> Any:
    """A trace of the model with its enumerated sites drawn from their exact conditional given the rest of ``draw``."""
    factors = log_factors(draw.model_trace, None)
    drawn = _only(draw.guide_trace, lambda node: True)
    for name, node in _listed_in_model(draw).items():
        logits, symbols = factors.conditional(node)
        choice = torch.distributions.Categorical(logits=logits).sample()
        support = node["fn"].enumerate_support(expand=False)
        event_shape = node["fn"].event_shape
        value = support.reshape((logits.shape[-1], *event_shape))[choice]
        dims = {frame.dim: frame.size for frame in node["cond_indep_stack"] if frame.vectorized}
        batch_shape = [dims.get(dim, 1) for dim in range(min(dims, default=0), 0)]
        infer = {key: what for key, what in node["infer"].items() if key == "event_dims"}
        kept = {**node, "value": value.reshape((*batch_shape, *event_shape)), "infer": infer}
        drawn.add_node(name, **kept)
        choice._pyro_dims = symbols
        factors.fix(node, choice)
    with poutine.block():
        return poutine.trace(poutine.replay(bound.model, trace=drawn)).get_trace(*batch.args, **batch.named())


def enumerated_probabilities(draw: Draw) -> dict[str, Tensor]:
    """P(k | everything drawn, x) of every enumerated site; shape (*plates, K), plates from the left.

    It is the model's conditional, whatever a guide that lists the site says.
    """
    factors = log_factors(draw.model_trace, None)
    return {name: factors.conditional(node)[0].softmax(-1) for name, node in _listed(draw).items()}


def _listed_in_model(draw: Draw) -> dict[str, Any]:
    return {name: node for name, node in _listed(draw).items() if name not in draw.guide_trace}


def _listed(draw: Draw) -> dict[str, Any]:
    return {name: node for name, node in draw.model_trace.nodes.items() if is_random(node) and is_listed(node)}


def is_listed(node: Any) -> bool:
    """Whether a trace's node holds all values of an enumerated site instead of one."""
    return node["infer"].get("_enumerate_dim") is not None


def _refuse_shared_lists(draw: Draw, factors: Factors, data_plate: str) -> None:
    for trace in (draw.model_trace, draw.guide_trace):
        for name, node in trace.nodes.items():
            outside = is_random(node) and not in_plate(node, data_plate)
            if outside and node["infer"].get("_enumerate_symbol") in factors.summed:
                raise ProgramError(
                    f"site {name!r} is enumerated and shared by all data, so that they are not independent given the "
                    "draws and nothing can be said per datum: ask for log_evidence (their joint), leave "
                    "'log_likelihood' out of an export's groups, or sample the site in the guide"
                )
