r"""Gradients through draws that cannot be reparameterised, with four baselines.

For a guide site :math:`y` without a path from parameters to draw, the gradient of an expected cost is

.. math:: \nabla_\phi E_{q_\phi}[c(y)] = E_{q_\phi}\bigl[(c(y) - b)\, \nabla_\phi \log q_\phi(y)\bigr]
          + E_{q_\phi}[\nabla_\phi c(y)]

for every :math:`b` that does not depend on the draw :math:`y`, since :math:`E_q[\nabla \log q] = 0`
(REINFORCE; Williams, 1992, https://doi.org/10.1007/BF00992696). :math:`b`, the baseline, changes the variance only.

Of the whole cost, minus the bound, only what can hang on :math:`y` has to be in :math:`c` (Rao-Blackwellisation;
Ranganath, Gerrish and Blei, 2014, https://arxiv.org/abs/1401.0118): the densities at :math:`y` and what model and guide
come to after it (or after a site that the guide draws after it), and of these, in a plate around :math:`y`, those of
the same row:

.. math:: c_i = \log q(y_i \mid x_i) + \sum_{s \text{ after } y} \bigl(\log q(s_i) - \log p(s_i)\bigr)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from pyro_lvm.data import Batch
from pyro_lvm.elbo.objective import Estimate, Objective
from pyro_lvm.elbo.particles import Particles, plates_of, put_at, subsampling
from pyro_lvm.elbo.terms import read_terms
from pyro_lvm.errors import ProgramError
from pyro_lvm.program import ROW_KEYWORDS
from pyro_lvm.structure import Structure

__all__ = ["ScoreFunction", "Signal"]


@dataclass(frozen=True)
class Signal:
    """What a site learns from.

    Attributes:
        site: its name.
        cost: the cost of every draw, shape (K, *plates), nats per row; no gradient flows through it.
        plates: the plates over whose rows it differs.
        scale: all rows of these plates over the rows at hand.
    """

    site: str
    cost: Tensor
    plates: tuple[Any, ...]
    scale: float


class ScoreFunction(Objective):
    r"""The plain bound, with score-function gradients at guide sites that have no others, and only there.

    .. math:: \hat\nabla_\phi = \frac1K \sum_{k=1}^K \sum_i (c_{ik} - b_{ik})\, \nabla_\phi \log q_\phi(y_{ik} \mid x_i)

    where :math:`c_{ik}` is the part of minus the bound that row i adds after draw k of y. Every baseline leaves the
    gradient unbiased:

    - None: :math:`b = 0`.
    - "rloo": :math:`b_{ik} = \frac{1}{K - 1} \sum_{j \ne k} c_{ij}`, the other draws' mean for the same row (Kool, van
      Hoof and Welling, 2019, https://openreview.net/forum?id=r1lgTGL5DE).
    - "average": a decaying mean of what the earlier steps' costs were, over rows and draws, one for each site.
    - a module :math:`b_\psi`: called with the data of the batch (not with ``size`` and its like), it gives a
      cost in nats for each row, shape (batch,). It is trained in the same steps by
      :math:`\sum_i (c_i - b_\psi(x_i))^2`, whose gradient reaches nothing but :math:`\psi` (NVIL; Mnih and Gregor,
      2014, https://arxiv.org/abs/1402.0030).

    Guide sites that can be reparameterised keep their path, and its smaller variance.

    Args:
        num_particles: K, draws in every step; "rloo" needs at least 2.
        baseline: None, "rloo", "average", or a module.
        decay: of "average": what of the old mean is left after a step.
        vectorize_particles: whether all K are drawn in one pass with a further dim on the left of every plate; False
            for a program that does not broadcast.
        max_plate_nesting: dims that plates take; `pyro_lvm.fit` knows, `pyro.infer.SVI` finds out.

    Raises:
        ValueError: if ``num_particles`` is below 1, or below 2 for "rloo"; if ``decay`` is not in [0, 1).
        TypeError: if ``baseline`` is none of the four.
        ProgramError: before a fit, if a module is to be the baseline of a site outside the plate over the data.

    When it is wrong: where rows of a plate are not independent given what stands outside it (a model that mixes
    the rows' latents), costs of other rows are missing from c. With few values, sum: ``TraceEnum_ELBO`` has no noise.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyro_lvm as lvm
        >>> def model(x, size=None):
        ...     rates = pyro.param("rates", torch.tensor([1.0, 4.0, 9.0]))
        ...     with pyro.plate("data", size or len(x), subsample=x):
        ...         y = pyro.sample("y", dist.Categorical(torch.ones(3)))
        ...         pyro.sample("x", dist.Poisson(rates[y]), obs=x)
        >>> def guide(x, size=None):
        ...     weights = pyro.param("weights", torch.zeros(3))
        ...     with pyro.plate("data", size or len(x), subsample=x):
        ...         pyro.sample("y", dist.Categorical(logits=x[:, None] * weights))
        >>> elbo = lvm.elbo.ScoreFunction(num_particles=4, baseline="rloo")
        >>> fit = lvm.fit((model, guide), torch.tensor([0.0, 1.0, 5.0, 9.0]), elbo=elbo, steps=20, seed=0)
        >>> fit.info["estimator"]
        "ScoreFunction(num_particles=4, baseline='rloo')"
    """

    samples_discrete = True

    def __init__(
        self,
        num_particles: int = 1,
        baseline: Literal["rloo", "average"] | nn.Module | None = None,
        *,
        decay: float = 0.9,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
    ) -> None:
        super().__init__(num_particles, vectorize_particles=vectorize_particles, max_plate_nesting=max_plate_nesting)
        if not (baseline in (None, "rloo", "average") or isinstance(baseline, nn.Module)):
            raise TypeError(f"baseline={baseline!r} is not known: use None, 'rloo', 'average', or a torch.nn.Module")
        if baseline == "rloo" and num_particles < 2:
            raise ValueError(
                f"num_particles is {num_particles}, but the baseline of a draw in 'rloo' is the mean of the others: "
                "use at least 2, or baseline='average'"
            )
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay is {decay}: it must be at least 0 and below 1")
        self.baseline, self.decay = baseline, decay
        self._averages: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        baseline = self.baseline
        shown = type(baseline).__name__ if isinstance(baseline, nn.Module) else repr(baseline)
        return f"ScoreFunction(num_particles={self.num_particles}, baseline={shown})"

    def check(self, structure: Structure, batch: Batch) -> None:
        """Raise `ProgramError` where a module cannot be the baseline."""
        del batch
        if not isinstance(self.baseline, nn.Module):
            return
        for site in structure.guide.values():
            if not site.fn.has_rsample and not site.inside(structure.data_plate):
                raise ProgramError(
                    f"guide {site} ({site.kind}) is shared by all data, and {self!r} has a module for its baseline, "
                    "which gives a number for each of them: use baseline='rloo' or 'average'"
                )

    def prepared(self, max_plate_nesting: int) -> Self:
        """A copy for one program; a module stays the same one, trained in place."""
        own = super().prepared(max_plate_nesting)
        own._averages = {}
        return own

    def advance(self, progress: float) -> None:
        """Forget, before the first step, what evaluations before it have left."""
        if progress == 0.0:
            for average in self._averages.values():
                average.zero_()

    def tensors(self) -> tuple[Tensor, ...]:
        """The running means."""
        return tuple(self._averages.values())

    def modules(self) -> tuple[nn.Module, ...]:
        """The learned baseline."""
        return (self.baseline,) if isinstance(self.baseline, nn.Module) else ()

    def estimate(self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any) -> Estimate:
        """The plain bound and its gradient."""
        particles = Particles.of(self, model, guide, args, kwargs)
        model_sites, guide_sites = particles.of_model(), particles.of_guide()
        costs = {("model", node["name"]): -particles.read(node, _log_prob) for node in model_sites}
        costs |= {("guide", node["name"]): particles.read(node, _log_prob) for node in guide_sites}
        scored = [node for node in guide_sites if not node["fn"].has_rsample]
        silent = {("guide", node["name"]) for node in scored}  # the score itself has mean nought
        surrogate: Tensor = sum((cost.sum() for key, cost in costs.items() if key not in silent), torch.zeros(()))
        for node in scored:
            signal = _signal(node, model_sites, guide_sites, costs)
            baseline = self._baseline_of(signal, args, kwargs)
            advantage = signal.scale * (signal.cost - baseline.detach())
            surrogate = surrogate + (advantage * particles.read(node, _unscaled)).sum()
            if isinstance(self.baseline, nn.Module):
                surrogate = surrogate + signal.scale * (signal.cost - baseline).square().sum()
            elif self.baseline == "average":
                self._remember(signal)
        loss = sum((cost.detach().sum() for cost in costs.values()), torch.zeros(()))
        terms = read_terms(self, particles.traces, None)
        return Estimate(loss / particles.count, surrogate / particles.count, terms)

    def _baseline_of(self, signal: Signal, args: Any, kwargs: Any) -> Tensor:
        """B, of a shape that broadcasts against the costs; must not depend on the draw whose cost it is taken from."""
        cost = signal.cost
        if isinstance(self.baseline, nn.Module):
            return self._predicted(self.baseline, signal, args, kwargs)
        if self.baseline == "rloo":
            return (cost.sum(0) - cost) / (len(cost) - 1)
        if self.baseline == "average":
            average = self._averages.setdefault(signal.site, cost.new_zeros(2))
            total, weight = average
            return torch.where(weight > 0, total / weight.clamp(min=torch.finfo(cost.dtype).tiny), 0.0)
        return cost.new_zeros(())

    def _remember(self, signal: Signal) -> None:
        average = self._averages[signal.site]
        new = torch.stack([signal.cost.mean(), torch.ones_like(average[1])])
        average.mul_(self.decay).add_((1.0 - self.decay) * new)

    def _predicted(self, module: nn.Module, signal: Signal, args: Any, kwargs: Any) -> Tensor:
        data = {name: value for name, value in kwargs.items() if name not in ROW_KEYWORDS}
        rows: Tensor = module(*args, **data)
        frames = [frame for frame in signal.plates if frame.name == "data"] or list(signal.plates)
        frame = next((frame for frame in frames if tuple(rows.shape) == (frame.size,)), None)
        if frame is None:
            sizes = {frame.name: frame.size for frame in signal.plates}
            raise ProgramError(
                f"the baseline {type(module).__name__} gave shape {tuple(rows.shape)} for guide site {signal.site!r}, "
                f"whose plates have the rows {sizes}: it must give one number for each row of the data, shape (batch,)"
            )
        return put_at(rows, frame)


def _signal(node: Any, model_sites: list[Any], guide_sites: list[Any], costs: dict[tuple[str, str], Tensor]) -> Signal:
    """All that may hang on a guide site's draw, row by row."""
    after_in_guide = _from({node["name"]}, guide_sites)
    # the model may come first to a site that the guide drew last: its value already tells of this draw
    after_in_model = _from({site["name"] for site in after_in_guide}, model_sites, node["name"])
    plates = plates_of(node)
    for later in after_in_guide:  # what the guide draws later for all rows may carry one row's draw to another
        plates = {name: frame for name, frame in plates.items() if name in plates_of(later)}
    total: Any = 0.0
    for role, sites in (("guide", after_in_guide), ("model", after_in_model)):
        for site in sites:
            cost = costs[role, site["name"]].detach()
            dims = [frame.dim for name, frame in plates_of(site).items() if name not in plates]
            total = total + (cost.sum(dims, keepdim=True) if dims else cost)
    scale = subsampling(plates.values())
    return Signal(node["name"], total / scale, tuple(plates.values()), scale)


def _from(names: set[str], sites: list[Any], needed: str | None = None) -> list[Any]:
    """Sites from the first of ``names`` on; all where ``needed`` is none of them, and its place unknown."""
    positions = {site["name"]: i for i, site in enumerate(sites)}
    if needed is not None and needed not in positions:
        return sites
    return sites[min(positions[name] for name in names if name in positions) :]


def _log_prob(node: Any) -> Tensor:
    log_prob: Tensor = node["log_prob"]
    return log_prob


def _unscaled(node: Any) -> Tensor:
    log_prob: Tensor = node["unscaled_log_prob"]
    return log_prob
