r"""What annealing walks through: a start that can be drawn from, the joint density, and coordinates without bounds.

.. math:: \log f_\beta(u) = (1 - \beta) \log q_0(z) + \beta \log p(x, z) + \log\left|\frac{dz}{du}\right|,
          \qquad z = T(u)

Chains are rows: a datum that has C chains stands C times in the batch, so that any program takes them that takes
another batch size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from pyro_lvm.criticism.weights import Draw, Source, in_order, sampled_sites
from pyro_lvm.data import Batch
from pyro_lvm.dependencies import parents
from pyro_lvm.elbo.factors import log_factors
from pyro_lvm.errors import ProgramError
from pyro_lvm.evaluation import Evaluation
from pyro_lvm.structure import Structure, support_of_entry

__all__ = ["Level", "Target", "guide_densities", "refuse", "varying_support"]

Start = Literal["guide", "prior"] | None


def refuse(evaluation: Evaluation) -> None:
    """Raise where there is nothing that could be annealed per datum.

    Raises:
        ProgramError: naming the site and what to do instead.
    """
    structure = evaluation.structure
    instead = "use method='importance'"
    if structure.data_plate is None:
        raise ProgramError(f"the program has no plate over its rows, so nothing can be annealed per datum: {instead}")
    if structure.global_latent:
        raise ProgramError(
            f"{structure.global_latent[0]} is shared by all data; annealing goes datum by datum: {instead}, which "
            "gives the joint"
        )
    if evaluation.given is not None:
        raise ProgramError(f"these are draws of chains, without parameters to anneal under: {instead}")
    if structure.enumerated_in_guide:
        raise ProgramError(
            f"the guide lists site {structure.enumerated_in_guide[0].name!r}, which may be clamped to what is known; "
            f"annealing leaves the guide behind: enumerate it in the model, or {instead}"
        )
    sampled = sampled_sites(structure)
    if not sampled:
        raise ProgramError("no latent site is sampled, there is nothing to anneal: use method='exact'")
    for site in sampled:
        if site.discrete:
            raise ProgramError(
                f"{site} is discrete ({site.kind}) and sampled; the transitions follow gradients. "
                'Sum it out, infer={"enumerate": "parallel"} in the model, or ' + instead
            )
        if not site.inside(structure.data_plate) or site.plates[-1].name != structure.data_plate:
            raise ProgramError(f"{site} must lie in the plate over the rows at dim -1: {instead}")


@dataclass(frozen=True)
class Level:
    """The path at one point of every chain.

    Attributes:
        log_density: log f_beta(u), shape (chains · rows,).
        gradient: of it, shape (chains · rows, D).
        work: log p(x, z) - log q_0(z), what a step of beta changes it by, shape (chains · rows,).
    """

    log_density: Tensor
    gradient: Tensor
    work: Tensor


class Target:
    """The path of the rows of one batch, each of them ``chains`` times.

    Args:
        evaluation: the program.
        batch: n rows.
        chains: C, copies of each; copy c of row i is row c·n + i.
        densities: of the guide, to start from (`guide_densities`); None to start from the prior.
    """

    def __init__(
        self, evaluation: Evaluation, batch: Batch, chains: int, densities: Mapping[str, tuple[str, Any]] | None
    ) -> None:
        bound, self.structure = evaluation.bound, evaluation.structure
        self.chains, self.rows, self.densities = chains, len(batch), densities
        self.batch = _copies(batch, chains)
        with torch.no_grad(), poutine.block():
            prior = poutine.trace(bound.model).get_trace(*self.batch.args, **self.batch.named())
        self.nodes: dict[str, Any] = {site.name: prior.nodes[site.name] for site in sampled_sites(self.structure)}
        self.transforms = {name: biject_to(node["fn"].support) for name, node in self.nodes.items()}
        self.source = Source(bound.model, lambda *_, **__: None, self.structure)
        self.values: dict[str, Tensor] = {name: node["value"] for name, node in self.nodes.items()}
        self.shapes = {name: self.transforms[name].inv(value).shape for name, value in self.values.items()}

    def start(self) -> Tensor:
        """A draw of every chain's first point, unconstrained, shape (C · n, D)."""
        if self.densities is None:
            found = {name: self.transforms[name].inv(value) for name, value in self.values.items()}
            return torch.cat([self._by_row(name, u) for name, u in found.items()], -1)
        parts = []
        for name, (of, fn) in self.densities.items():
            drawn = fn.sample((self.chains,))
            event = fn.event_dim
            value = drawn.movedim(0, -2 - event).flatten(-2 - event, -1 - event)
            parts.append(self._by_row(name, value if of != name else self.transforms[name].inv(value)))
        return torch.cat(parts, -1)

    def _event_dim(self, name: str) -> int:
        plates = self.values[name].dim() - int(self.nodes[name]["fn"].event_dim)
        return len(self.shapes[name]) - plates

    def _by_row(self, name: str, u: Tensor) -> Tensor:
        """Shape (..., rows, *event) as (rows, everything else)."""
        return u.movedim(-1 - self._event_dim(name), 0).flatten(1) if u.dim() > 1 else u.unsqueeze(-1)

    def _by_site(self, flat: Tensor) -> dict[str, Tensor]:
        """The inverse of `_by_row`, for all sites."""
        found, first = {}, 0
        for name, shape in self.shapes.items():
            dim = len(shape) - 1 - self._event_dim(name)
            others = [*shape[:dim], *shape[dim + 1 :]]
            width = math.prod(others)
            found[name] = flat[:, first : first + width].reshape(-1, *others).movedim(0, dim)
            first += width
        return found

    def at(self, flat: Tensor, beta: Tensor) -> Level:
        """The path at ``flat`` (C · n, D) and ``beta`` (C · n,)."""
        with torch.enable_grad():
            flat = flat.detach().requires_grad_()
            beginning, end = self._ends(flat)
            log_density = (1 - beta) * beginning + beta * end
            (gradient,) = torch.autograd.grad(log_density.sum(), flat)
        outside = -torch.inf
        return Level(
            log_density.detach().nan_to_num(nan=outside, posinf=outside),
            gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0),
            (end - beginning).detach().nan_to_num(nan=outside, posinf=outside),
        )

    def _ends(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Log q_0 and log p(x, z), both as densities of u, shape (C · n,)."""
        unconstrained = self._by_site(flat)
        volume = torch.zeros_like(flat[:, 0])
        start = torch.zeros_like(volume)
        values: dict[str, Tensor] = {}
        for name, u in unconstrained.items():
            z = self.transforms[name](u)
            jacobian = self._sum_by_row(self.transforms[name].log_abs_det_jacobian(u, z), z.dim(), name)
            volume = volume + jacobian
            values[name] = z
            if self.densities is not None:
                of, fn = self.densities[name]
                start = start + (self._density(fn, z, name) + jacobian if of == name else self._density(fn, u, name))
        draw = self.source.holding(self.nodes, values).draw(self.batch)
        end = self._joint(draw) + volume
        return (self._joint(draw, prior=True) + volume if self.densities is None else start), end

    def _joint(self, draw: Draw, prior: bool = False) -> Tensor:
        trace = without_data(draw.model_trace) if prior else draw.model_trace
        factors = log_factors(trace, None, self.structure.data_plate)
        return in_order(factors, [trace.plate_to_symbol[str(self.structure.data_plate)]])

    def _sum_by_row(self, values: Tensor, dims: int, name: str) -> Tensor:
        """Shape (..., rows, *part of the event) summed to (rows,)."""
        plates = dims - self.nodes[name]["fn"].event_dim
        values = values.flatten(plates).sum(-1) if values.dim() > plates else values
        return values.reshape(-1, values.shape[-1]).sum(0)

    def _density(self, fn: Any, value: Tensor, name: str) -> Tensor:
        """The guide's density at the value of every chain, shape (C · n,)."""
        dim = value.dim() - 1 - fn.event_dim
        by_chain = value.unflatten(dim, (self.chains, self.rows)).movedim(dim, 0)
        log_prob: Tensor = fn.log_prob(by_chain)
        return log_prob.reshape(self.chains, -1, self.rows).sum(1).flatten()


def without_data(trace: Any) -> Any:
    """A packed trace without its observed sites."""
    kept: Any = poutine.Trace()
    kept.plate_to_symbol = trace.plate_to_symbol
    for name, node in trace.nodes.items():
        if not node.get("is_observed"):
            kept.add_node(name, **node)
    return kept


def _copies(batch: Batch, count: int) -> Batch:
    def copied(value: Any) -> Any:
        return value.repeat(count, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) else value

    kwargs = {name: copied(value) for name, value in batch.kwargs.items()}
    index = None if batch.index is None else batch.index.repeat(count)
    return replace(batch, args=tuple(map(copied, batch.args)), kwargs=kwargs, size=batch.size * count, index=index)


def guide_densities(evaluation: Evaluation, batch: Batch) -> dict[str, tuple[str, Any]] | str:
    """The guide's distribution of every sampled site, by that site's name, with the name of the guide's own site.

    A guide made from the model has it for the unconstrained value, under "site_unconstrained". Returned is a string
    that says why where the guide is not of that kind.
    """
    bound, structure = evaluation.bound, evaluation.structure
    with torch.no_grad(), poutine.block():
        trace = poutine.trace(bound.guide).get_trace(*batch.args, **batch.named())
    of_guide = parents(bound.guide, batch, {})
    found: dict[str, tuple[str, Any]] = {}
    for site in sampled_sites(structure):
        name = f"{site.name}_unconstrained" if f"{site.name}_unconstrained" in trace else site.name
        why = _unfit(name, trace, structure, of_guide)
        if why:
            return why
        fn: Any = trace.nodes[name]["fn"]
        try:
            fn.log_prob(fn.sample().clone())
        except (KeyError, NotImplementedError):  # a flow without an inverse knows the density of its latest draw alone
            return f"guide site {name!r} has no density at places it has not drawn itself"
        found[site.name] = name, fn
    return found


def _unfit(name: str, trace: Any, structure: Structure, of_guide: Mapping[str, frozenset[str]]) -> str:
    """Why the guide's site cannot be started from, or nothing."""
    site = structure.guide.get(name)
    if site is None:
        return f"the guide has no density for site {name!r} by itself"
    if not site.inside(structure.data_plate):
        return f"the guide draws site {name!r} of all rows jointly"
    if of_guide.get(name):
        return f"guide site {name!r} is computed from {', '.join(sorted(of_guide[name]))}"
    if trace.nodes[name]["mask"] is not None or site.kind == "Delta":
        return f"guide site {name!r} is masked or a point"
    return ""


def varying_support(target: Target, again: Target) -> str | None:
    """A site whose bounds are not the same in two draws, if there is one."""
    for name, node in target.nodes.items():
        bounds = [vars(support_of_entry(n["fn"].support)) for n in (node, again.nodes[name])]
        for mine, other in zip(bounds[0].values(), bounds[1].values(), strict=True):
            if isinstance(mine, Tensor) and not torch.equal(mine, other):
                return name
    return None
