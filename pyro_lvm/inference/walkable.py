"""Before the first step of a chain: trace, check, find places to start from. What raises here has moved nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_lvm.data import Batch, Rows
from pyro_lvm.elbo.estimator import make_estimator
from pyro_lvm.errors import ProgramError
from pyro_lvm.guides import GivenDraws
from pyro_lvm.inference.density import Density, check_density, make_density
from pyro_lvm.inference.prepare import initialize, place
from pyro_lvm.parameters import BoundProgram, Untouched
from pyro_lvm.preflight.discrete import check_discrete
from pyro_lvm.preflight.observations import check_observations, check_support
from pyro_lvm.preflight.rows import check_rows
from pyro_lvm.preflight.shapes import check_shapes
from pyro_lvm.preflight.tracing import traced
from pyro_lvm.program import Program
from pyro_lvm.structure import Structure

__all__ = ["Walkable", "make_walkable", "missing_unmasked", "walked"]


@dataclass(frozen=True)
class Walkable:
    """A program that chains can walk on, checked.

    Attributes:
        bound: the program with its parameters.
        structure: its structure on all rows.
        density: what the chains walk on.
        positions: two places to start from.
        held: names of the parameters that the density depends on.
    """

    bound: BoundProgram
    structure: Structure
    density: Density
    positions: list[dict[str, Tensor]]
    held: list[str]


def make_walkable(program: Program, rows: Rows, cast: list[str], untouched: Untouched, seed: int) -> Walkable:
    """Trace a model on all rows, check it, and make its density.

    Args:
        program: the program; its guide is without sites, and all enumerable sites are marked.
        rows: the data, cast and placed.
        cast: is told what was cast.
        untouched: is shown the modules that functions register before anything happens to them.
        seed: of initialisation.

    Raises:
        ProgramError: if the model is none that NUTS can sample.
        ValueError: if the data do not fit the program.
        TypeError: if the model cannot be called with the data.
    """

    def meet(module: nn.Module) -> None:
        untouched.remember(module)
        place(module, rows, cast)

    rows.refuse_non_finite("x")
    batch = rows.whole()
    program.require_arguments(*batch.data())
    bound = BoundProgram(program, None, rows.dtype, rows.device, meet)
    with bound.holding(None):
        traced(bound.model, None, batch)  # modules that functions register are met
    start = _start(bound, rows, seed)
    with bound.holding(None):
        structure = traced(bound.model, None, batch)
        _check_latents(structure)
        check_observations(structure, batch)
        check_shapes(structure, batch)
        check_discrete(structure, make_estimator(None, structure))
        _check_weights(bound, structure, batch)
        check_support(bound, structure, batch, rows)
        check_rows(bound, structure, batch, rows, None)
        density = make_density(bound, structure, batch, start)
        with pyro.validation_enabled(False):  # where a chain walks, values that are not finite are no error
            positions = [density.start() for _ in range(2)]
            check_density(density, bound, structure, batch, positions)
            held = _held(bound, density, positions[0])
    bound.functions.meet = None
    return Walkable(bound, structure, density, positions, held)


def _start(bound: BoundProgram, rows: Rows, seed: int) -> Mapping[str, Tensor] | None:
    """Where the program says to start; its parameters stay what they are."""
    hook = bound.program.hook("initial_values")
    if hook is None:
        return None
    before = {name: parameter.detach().clone() for name, parameter in bound.trainable().items()}
    initialize(bound.program, rows, seed)
    start: Mapping[str, Tensor] = hook()
    bound.load(before)
    return start


def _check_latents(structure: Structure) -> None:
    for site in structure.latent:
        if site.discrete and not site.enumerable:
            raise ProgramError(
                f"{site} ({site.kind}) is discrete and its values cannot be listed: NUTS moves continuous sites only "
                "and sums out those of a finite list: truncate it to a Categorical"
            )
    if all(site.enumerable for site in structure.latent):
        summed = [site.name for site in structure.latent]
        what = f"its latents {summed} are summed out exactly" if summed else "it has no latent site"
        raise ProgramError(
            f"the program has no continuous latent site, so there is nothing for NUTS to draw: {what}. Give its "
            "parameters priors (pyro.sample in place of pyro.param), or use fit"
        )


def _check_weights(bound: BoundProgram, structure: Structure, batch: Batch) -> None:
    """The density is that of the program on all its rows: nothing is weighted, and no latent without a prior."""
    with torch.no_grad(), poutine.block():
        nodes = poutine.trace(bound.model).get_trace(*batch.args, **batch.named()).nodes
    for site in structure.model.values():
        for plate in site.plates:
            if plate.rows != plate.size:
                raise ProgramError(
                    f"{site} stands in plate {plate.name!r} with {plate.rows} of {plate.size} rows: a chain needs all "
                    f'of them in every step, pyro.plate("{plate.name}", {plate.rows})'
                )
        scale = torch.as_tensor(site.scale)
        if not bool((scale == 1).all()):
            raise ProgramError(
                f"{site} is weighted {float(scale.flatten()[0]):g} (poutine.scale, or a plate that takes a part of its "
                "rows), and the chains draw from p(latents | x), where every site has the weight 1: take it away"
            )
        mask = nodes[site.name]["mask"]
        if mask is None or site.observed or site.enumerated or bool(torch.as_tensor(mask).all()):
            continue
        raise ProgramError(
            f"{site} is masked in {int((~torch.as_tensor(mask)).sum())} entries, so that it has no prior there and a "
            "chain nothing that holds it: mask what is observed and leave the latent outside the mask"
        )


def _held(bound: BoundProgram, density: Density, position: dict[str, Tensor]) -> list[str]:
    parameters = bound.trainable()
    energy = density.potential(position)
    if not parameters or not energy.requires_grad:
        return []
    gradients = torch.autograd.grad(energy, list(parameters.values()), allow_unused=True)
    return [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


class _MissingUnmasked(Messenger):
    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"].endswith("_unobserved") and not msg["is_observed"]:
            msg["mask"] = None


def walked(program: Program) -> tuple[Program, GivenDraws]:
    """The program as chains walk on it: enumerable sites marked, and a guide that says the draws again."""
    given = GivenDraws()
    sampled = program.with_guide(given)
    return replace(sampled, model=missing_unmasked(config_enumerate(sampled.model))), given


def missing_unmasked(model: Any) -> Callable[..., Any]:
    """The model with a prior also for what ``obs_mask=`` draws in the place of values that are known.

    Nothing depends on those draws, and their density is one in sum; without it a chain would never turn back.
    """
    unmask: Any = _MissingUnmasked()
    wrapped: Callable[..., Any] = unmask(model)
    return wrapped
