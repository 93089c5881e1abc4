r"""The density that chains walk on: every continuous latent on its unconstrained scale, every discrete one summed out.

.. math:: U(u) = -\log \sum_k p(x, k, z = t(u)) - \log \left|\det \frac{dt}{du}\right|
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.ops.integrator import potential_grad
from torch import Tensor
from torch.distributions import biject_to

from pyro_lvm.capture.potential import Position, Potential
from pyro_lvm.criticism.weights import draw_latent, log_joint
from pyro_lvm.data import Batch
from pyro_lvm.errors import ProgramError
from pyro_lvm.guides import GivenDraws
from pyro_lvm.parameters import BoundProgram
from pyro_lvm.preflight.explain import Circumstances, explained
from pyro_lvm.structure import Recorder, Site, Structure

__all__ = ["Density", "check_density", "make_density"]

TRIES = 100
"""Starting points that are tried before a program is said to have none; as in Pyro."""

WIDTH_OF_START = 2.0
"""Chains start uniformly within so much of nought on the unconstrained scale, as in Pyro and Stan."""

JITTER = 0.1
"""Standard deviation, on the unconstrained scale, about the values that a program says to start from."""


@dataclass(frozen=True)
class Density:
    """A potential and its coordinates.

    Attributes:
        sites: the sites that move.
        transforms: by site, from the unconstrained scale to the site's own.
        potential: -log density on the unconstrained scale, nats of the data set.
        given: by site, unconstrained, where the program says to start.
    """

    sites: tuple[Site, ...]
    transforms: Mapping[str, Any]
    potential: Potential
    given: Position

    def constrained(self, position: Position) -> dict[str, Tensor]:
        """The sites' own values."""
        return {site.name: self.transforms[site.name](position[site.name]) for site in self.sites}

    def start(self) -> dict[str, Tensor]:
        """A starting point at which potential and gradients are finite, from the random state of the caller.

        Raises:
            ProgramError: if none is found.
        """
        energy = torch.tensor(torch.nan)
        for _ in range(TRIES):
            position = {site.name: self._near_start(site) for site in self.sites}
            gradients, energy = potential_grad(self.potential, position)
            if all(bool(torch.isfinite(value).all()) for value in (energy, *gradients.values())):
                return position
        raise ProgramError(
            f"no chain can start: at {TRIES} places log p(x, latents) or its gradient is not finite (the last one "
            f"{-float(energy):.4g} nats). Look which site gives -inf or NaN there, or give the program a method "
            "initial_values() that returns {site: tensor} to start from"
        )

    def _near_start(self, site: Site) -> Tensor:
        if site.name in self.given:
            value = self.given[site.name]
            return value + JITTER * torch.randn_like(value)
        value = self.transforms[site.name].inv(site.value)
        return (2.0 * torch.rand_like(value) - 1.0) * WIDTH_OF_START


def make_density(
    bound: BoundProgram, structure: Structure, batch: Batch, start: Mapping[str, Tensor] | None
) -> Density:
    """Sum the enumerated sites of a model out, and free the others of their constraints.

    Args:
        bound: the program; all its enumerable sites are marked.
        structure: one trace of its model on ``batch``.
        batch: all the data.
        start: constrained starting values by site, or None.

    Raises:
        ProgramError: if the enumerated sites cannot be summed out.
    """
    sites = tuple(site for site in structure.latent if not site.enumerated)
    transforms = {site.name: biject_to(site.fn.support) for site in sites}
    enum: Any = poutine.enum
    model = enum(bound.model, first_available_dim=-1 - structure.max_plate_nesting)

    def trace(values: Mapping[str, Tensor]) -> Any:
        condition: Any = poutine.condition
        return poutine.trace(condition(model, data=dict(values))).get_trace(*batch.args, **batch.named())

    seen = Circumstances(batch, Recorder(), Recorder())
    try:
        with torch.no_grad(), seen.model, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Encountered", UserWarning)  # one draw of the prior may be anywhere
            # values of one trace without enumeration: a site below an enumerated one has one value, not one for each
            first = trace({site.name: site.value for site in sites})
            summed_out = bool(structure.enumerated_in_model)
            evaluator: Any = TraceEinsumEvaluator(first, summed_out, structure.max_plate_nesting)
            evaluator.log_prob(trace({site.name: site.value for site in sites}))
    except (RuntimeError, ValueError, AssertionError, NotImplementedError, KeyError, IndexError) as error:
        if isinstance(error, ProgramError):
            raise
        reason = explained(error, seen)
        if reason is None:
            raise
        raise ProgramError(reason) from error

    def potential(position: Position) -> Tensor:
        values = {site.name: transforms[site.name](position[site.name]) for site in sites}
        log_density = evaluator.log_prob(trace(values))
        for site in sites:
            jacobian = transforms[site.name].log_abs_det_jacobian(position[site.name], values[site.name])
            log_density = log_density + jacobian.sum()
        return -log_density  # type: ignore[no-any-return]

    return Density(sites, transforms, potential, _unconstrained(start or {}, sites, transforms))


def _unconstrained(start: Mapping[str, Tensor], sites: tuple[Site, ...], transforms: Mapping[str, Any]) -> Position:
    given: dict[str, Tensor] = {}
    for site in sites:
        if site.name not in start:
            continue
        value = torch.as_tensor(start[site.name]).to(site.value)
        position = transforms[site.name].inv(value) if value.shape == site.value.shape else None
        if position is None or not bool(torch.isfinite(position).all()):
            came = "outside its support" if position is not None else f"of shape {tuple(value.shape)}"
            raise ProgramError(
                f"initial_values() gives {site} a value {came}: it takes one of shape {tuple(site.value.shape)} inside "
                f"its support {site.support}"
            )
        given[site.name] = position.detach()
    return given


def check_density(
    density: Density, bound: BoundProgram, structure: Structure, batch: Batch, positions: list[dict[str, Tensor]]
) -> None:
    """Raise where a chain would draw from something else than the posterior.

    Args:
        density: what is to be checked.
        bound: its program.
        structure: its structure.
        batch: the data.
        positions: two places with a finite potential.

    Raises:
        ProgramError: if the potential is not a function of the latents, a site's support depends on another latent, or
            the two ways of summing discrete sites disagree.
    """
    here, there = positions
    with torch.no_grad():
        once, again = density.potential(here), density.potential(here)
        if not torch.equal(once, again):
            raise ProgramError(
                f"log p(x, latents) is {-float(once):.6g} nats in one call and {-float(again):.6g} in the next, with "
                "the same latents: every random number of the model must be drawn by a pyro.sample statement"
            )
        for position in positions:
            _check_supports(density, bound, batch, position)
        if structure.enumerated_in_model:
            _check_sums(density, bound, structure, batch, here, there)


def _check_supports(density: Density, bound: BoundProgram, batch: Batch, position: Position) -> None:
    condition: Any = poutine.condition
    with poutine.block():
        model = condition(bound.model, data=density.constrained(position))
        nodes = poutine.trace(model).get_trace(*batch.args, **batch.named()).nodes
    for site in density.sites:
        value = density.transforms[site.name](position[site.name])
        now = biject_to(nodes[site.name]["fn"].support)(position[site.name])
        if now.shape != value.shape or not torch.allclose(now, value, equal_nan=True):
            raise ProgramError(
                f"the support of {site} ({site.kind}) depends on other latents, and a chain would keep to the one that "
                "it started with: draw a site of fixed support, such as Uniform(0, 1), and scale it by hand"
            )


def _check_sums(
    density: Density, bound: BoundProgram, structure: Structure, batch: Batch, here: Position, there: Position
) -> None:
    """The log joint with discrete sites summed out, by Pyro's evaluator and by what draws them: one constant apart."""
    apart, size = [], 0.0
    for position in (here, there):
        given = GivenDraws()
        values = density.constrained(position)
        given.fill(density.sites, {name: value.unsqueeze(0) for name, value in values.items()})
        draw = draw_latent(bound.with_guide(given), structure, batch)
        jacobian = sum(
            density.transforms[name].log_abs_det_jacobian(position[name], value).sum() for name, value in values.items()
        )
        walked, drawn = -density.potential(position) - jacobian, log_joint(draw)
        apart.append(float(walked - drawn))
        size = max(size, abs(float(walked)), abs(float(drawn)))
    tolerance = torch.finfo(density.sites[0].value.dtype).eps ** 0.75
    if not abs(apart[0] - apart[1]) <= tolerance * max(size, 1.0):
        raise ProgramError(
            f"{structure.enumerated_in_model[0]} is summed out under a mask that does not cover all that depends on "
            "it: mask the sites below it as well, or take the mask from it"
        )
