r"""What every site adds to the bound, row by row, from one draw of the guide.

For a site that is summed out, the expectation is under its exact conditional given the draw (or under what the guide
lists it with). The weight of each of its values is a derivative of the sum, :math:`\partial \log \sum_k e^{f_k + t_k} /
\partial t_k` at :math:`t = 0`, so that one backward pass through the contraction gives the weights of all factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.ops import packed
from torch import Tensor

from pyro_lvm.criticism.weights import Draw, in_order, is_listed
from pyro_lvm.elbo.factors import Factors, in_plate, log_factors
from pyro_lvm.elbo.terms import closed_form_kl, is_random
from pyro_lvm.errors import ProgramError
from pyro_lvm.structure import Structure

__all__ = ["Parts", "parts_of"]


@dataclass(frozen=True)
class Parts:
    """Expected log-probabilities of one draw, or of several side by side; shape (particles, rows), nats.

    Without a data plate there is one row, all data together.

    Attributes:
        observed: log p of the data, by observed site.
        latent: log p of the draw, by latent site of the model; expected for a site that is summed out.
        guide: log q of the draw, by the model's site that a guide's site belongs to; sites that belong to none have
            the name of all, "a+b".
        listed: log q of the sites that are summed out, jointly; None where there are none.
        kl: KL of the guide's distribution to the prior, given what both are computed from, where it has a closed form.
        entropy: of the guide's distribution, given what it is computed from, where it has a closed form.
        names_listed: the sites that are summed out.
    """

    observed: dict[str, Tensor]
    latent: dict[str, Tensor]
    guide: dict[str, Tensor]
    listed: Tensor | None
    kl: dict[str, Tensor]
    entropy: dict[str, Tensor]
    names_listed: tuple[str, ...]

    @property
    def kl_by_site(self) -> dict[str, Tensor]:
        """Log q - log p by latent site, in closed form where it has one."""
        found, taken = dict(self.kl), set(self.kl)
        for name, log_q in self.guide.items():
            if name in found:
                continue
            sites = name.split("+") if name not in self.latent else [name]
            taken.update(sites)
            found[name] = log_q - sum((self.latent[site] for site in sites if site not in found), _nought(log_q))
        if self.listed is not None:
            taken.update(self.names_listed)
            prior = sum((self.latent[site] for site in self.names_listed), _nought(self.listed))
            found["+".join(self.names_listed)] = self.listed - prior
        return found

    @property
    def reconstruction(self) -> Tensor:
        """Log p of all data given the latent sites."""
        return torch.stack(list(self.observed.values())).sum(0)

    @property
    def joint(self) -> Tensor:
        """Log p of data and latent sites."""
        return self.reconstruction + sum(self.latent.values(), _nought(self.reconstruction))

    @property
    def log_q(self) -> Tensor:
        """Log q of all latent sites."""
        found = sum(self.guide.values(), _nought(self.reconstruction))
        return found if self.listed is None else found + self.listed

    @property
    def entropies(self) -> Tensor:
        """The entropy of the guide, in closed form site by site where there is one, else minus log q."""
        found = _nought(self.reconstruction)
        for name, log_q in self.guide.items():
            found = found + self.entropy.get(name, -log_q)
        return found if self.listed is None else found - self.listed


def _nought(like: Tensor) -> Tensor:
    return torch.zeros_like(like)


def parts_of(draw: Draw, structure: Structure, plate: str | None) -> Parts:
    """Read the parts off a draw.

    Args:
        draw: the draw.
        structure: of the program.
        plate: the plate of the rows, of which only what lies inside it is read; None for everything in one row.

    Raises:
        ProgramError: if both model and guide list sites.
    """
    reader = _Reader(draw, structure, plate)
    observed: dict[str, Tensor] = {}
    latent: dict[str, Tensor] = {}
    for name, node in reader.model.items():
        (observed if node["is_observed"] else latent)[name] = reader.expected(node, of_model=True)
    guide: dict[str, Tensor] = {}
    loose: list[Tensor] = []
    owners: dict[str, str] = {}
    for name, node in reader.guide.items():
        if is_listed(node):
            continue
        owner = name if name in latent else name.removesuffix("_unconstrained")
        if owner in latent:
            owners.setdefault(owner, name)
            guide[owner] = guide.get(owner, 0.0) + reader.expected(node)
        else:
            loose.append(reader.expected(node))
    from_prior = [name for name in latent if name not in draw.guide_trace and not is_listed(reader.model[name])]
    from_prior = [] if loose else from_prior
    guide |= {name: latent[name] for name in from_prior}
    if loose:  # one site of the guide stands for several of the model
        drawn = [name for name in latent if not is_listed(reader.model[name])]
        guide = {"+".join(drawn): torch.stack([*guide.values(), *loose]).sum(0)}
    kl = {name: torch.zeros_like(latent[name]) for name in from_prior}
    entropy = {}
    same_order = [n for n in reader.model if n in reader.guide] == [n for n in reader.guide if n in reader.model]
    for name in guide:
        if name not in reader.guide or owners.get(name) != name or f"{name}_unconstrained" in reader.guide:
            continue
        closed = closed_form_kl(reader.guide[name]["fn"], reader.model[name]["fn"]) if same_order else None
        found = None if closed is None else reader.closed(closed, reader.guide[name])
        if found is not None:
            kl[name] = found
        found = reader.entropy(reader.guide[name])
        if found is not None:
            entropy[name] = found
    return Parts(observed, latent, guide, reader.listed(latent, observed), kl, entropy, reader.names_listed)


class _Reader:
    """Expectations of packed tensors under the weights of what is listed."""

    def __init__(self, draw: Draw, structure: Structure, plate: str | None) -> None:
        self.draw, self.plate = draw, plate
        traces = draw.model_trace, draw.guide_trace
        self.model, self.guide = (
            {
                name: node
                for name, node in trace.nodes.items()
                if is_random(node) and (not plate or in_plate(node, plate))
            }
            for trace in traces
        )
        symbols = draw.model_trace.plate_to_symbol
        self.symbols = [*draw.particle_symbols, *([symbols[plate]] if plate else [])]
        self.plates = set(symbols.values())
        self.sizes: dict[str, int] = {}
        for node in (*self.model.values(), *self.guide.values()):
            self.sizes |= {symbols[f.name]: int(f.size) for f in node["cond_indep_stack"] if f.vectorized}
        in_guide = [name for name, node in self.guide.items() if is_listed(node)]
        in_model = [name for name, node in self.model.items() if is_listed(node) and name not in in_guide]
        if in_guide and in_model:
            raise ProgramError(
                f"the guide enumerates site {in_guide[0]!r} and the model site {in_model[0]!r}: what each row adds to "
                "such a bound cannot be told. Enumerate both in the model, or both in the guide"
            )
        self.names_listed = tuple(in_guide or in_model)
        self.by_guide = bool(in_guide)
        self.weights: dict[int, Tensor] = {}
        self.log_sum: Tensor | None = None
        if self.names_listed:
            self._weigh()

    def _weigh(self) -> None:
        base = self.draw.model_trace
        if self.by_guide:
            base = poutine.Trace()
            base.plate_to_symbol = self.draw.model_trace.plate_to_symbol
            for name in self.names_listed:
                base.add_node(name, **self.guide[name])
        factors = log_factors(base, None, self.plate)
        taps: dict[int, Tensor] = {}
        nodes = [*self.model.values(), *self.guide.values()]
        with torch.enable_grad():
            for node in nodes:
                value = node["packed"]["unscaled_log_prob"]
                tap = torch.zeros_like(value, requires_grad=True)
                tap._pyro_dims = value._pyro_dims  # type: ignore[attr-defined]
                taps[id(node)] = tap
                frames = [frame for frame in node["cond_indep_stack"] if frame.vectorized]
                plates = frozenset(base.plate_to_symbol[frame.name] for frame in frames)
                factors.tree.setdefault(plates, []).append(tap)
                factors.dims.update({base.plate_to_symbol[frame.name]: frame.dim for frame in frames})
                factors.sizes.update({base.plate_to_symbol[frame.name]: int(frame.size) for frame in frames})
            log_sum = in_order(Factors(factors.tree, factors.summed, factors.dims, factors.sizes), self.symbols)
            gradients = torch.autograd.grad(log_sum.sum(), list(taps.values()), allow_unused=True)
        for key, gradient in zip(taps, gradients, strict=True):
            if gradient is not None:
                self.weights[key] = gradient
        self.log_sum = log_sum.detach()

    def expected(self, node: Any, *, of_model: bool = False) -> Tensor:
        """E log-probability of a node, shape (particles, rows)."""
        unmasked = of_model and is_listed(node)  # a masked row's label still has a prior
        value = packed.scale_and_mask(
            node["packed"]["unscaled_log_prob"], mask=None if unmasked else node["packed"]["mask"]
        )
        return self._reduced(value, self.weights.get(id(node)))

    def _reduced(self, value: Any, weight: Tensor | None) -> Tensor:
        names = value._pyro_dims
        value = value.detach()
        if weight is not None:
            # a value of weight nought may be -inf (a clamped label): it says nothing
            value = torch.where(weight == 0, 0.0, weight * value)
        others = [dim for dim, name in enumerate(names) if name not in self.symbols]
        value = value.sum(others) if others else value
        left = [name for name in names if name in self.symbols]
        value = value.permute([left.index(name) for name in self.symbols if name in left])
        shape = [self.sizes[name] if name in left else 1 for name in self.symbols]
        reduced: Tensor = value.reshape(shape).expand([self.sizes[name] for name in self.symbols])
        return reduced.reshape(self.draw.particles, -1)

    def closed(self, value: Tensor, node: Any) -> Tensor | None:
        """A closed form of a node, shape (particles, rows); None where it is another one for each listed value."""
        mask = node["mask"]
        if mask is not None and mask is not True:
            value = torch.where(torch.as_tensor(mask), value, 0.0)
        found = packed.pack(value.detach(), node["infer"]["_dim_to_symbol"])
        listed = set(found._pyro_dims) - self.plates
        if listed and not self.by_guide:
            return None
        weight = self.weights.get(id(node)) if listed else None
        if weight is not None and found._pyro_dims != node["packed"]["unscaled_log_prob"]._pyro_dims:
            return None
        return self._reduced(found, weight)

    def entropy(self, node: Any) -> Tensor | None:
        """The closed-form entropy of a node's distribution, shape (particles, rows), or None."""
        try:
            return self.closed(node["fn"].entropy(), node)
        except NotImplementedError:
            return None

    def listed(self, latent: dict[str, Tensor], observed: dict[str, Tensor]) -> Tensor | None:
        """E log q of what is summed out, shape (particles, rows), or None."""
        if not self.names_listed:
            return None
        if self.by_guide:
            return torch.stack([self.expected(self.guide[name]) for name in self.names_listed]).sum(0)
        assert self.log_sum is not None, "what is listed has been weighed"
        expected = torch.stack([*latent.values(), *observed.values()]).sum(0)
        return expected - self.log_sum.reshape(self.draw.particles, -1)
