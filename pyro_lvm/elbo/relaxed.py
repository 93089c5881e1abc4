r"""Discrete guide sites replaced by continuous ones that almost are them: a path for the gradient, at a bias.

A draw of a categorical :math:`y \sim q` is :math:`\operatorname{one\_hot}(\arg\max_k [\log q_k + g_k])` with Gumbel
noise :math:`g_k`. With a softmax in place of the maximum, at temperature :math:`\tau`,

.. math:: y^\tau = \operatorname{softmax}\bigl((\log q + g) / \tau\bigr) \to y \quad (\tau \to 0)

the draw is a differentiable function of q (Gumbel-softmax; Jang, Gu and Poole, 2017, https://arxiv.org/abs/1611.01144;
Maddison, Mnih and Teh, 2017, https://arxiv.org/abs/1611.00712). Its gradient is one of
:math:`E[\log p(x \mid y^\tau)]`, which is not :math:`E[\log p(x \mid y)]`: biased for every :math:`\tau > 0`, while its
variance grows without bound as :math:`\tau \to 0`. *Straight-through*: the model sees :math:`y` itself, and the
gradient goes back as though it had seen :math:`y^\tau`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from pyro import poutine
from pyro.distributions import (
    Bernoulli,
    Independent,
    OneHotCategorical,
    RelaxedBernoulli,
    RelaxedBernoulliStraightThrough,
    RelaxedOneHotCategorical,
    RelaxedOneHotCategoricalStraightThrough,
)
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_lvm.data import Batch
from pyro_lvm.elbo.objective import Estimate, Objective
from pyro_lvm.elbo.terms import Terms, is_random, read_terms
from pyro_lvm.errors import ProgramError
from pyro_lvm.schedules import Schedule, Scheduled
from pyro_lvm.structure import Site, Structure, base_of

__all__ = ["Relaxed"]


class Relaxed(Objective):
    r"""The bound with relaxed draws at the guide's discrete sites.

    .. math:: \sum_i E\bigl[\log p(x_i \mid y_i^\tau)\bigr] - \sum_k q(k \mid x_i) \log \frac{q(k \mid x_i)}{p(k)}

    Guide sites that are ``OneHotCategorical`` or ``Bernoulli`` are drawn relaxed, and the model computes with what was
    drawn: a vector of weights that sum to one, or a number between 0 and 1. The KL of these sites is that of the
    *discrete* distributions, in closed form, not that between relaxed densities (of which a bound can be made, but not
    one on :math:`\log p(x)` of the discrete model). Other latent sites are drawn and reparameterised as in
    ``Trace_ELBO``. What is reported beside the loss is the plain bound at the discrete draws that share the noise.

    Args:
        temperature: :math:`\tau`, positive; a number, or a function of the fraction of training that is done, such as
            `pyro_lvm.schedules.exponential` from 1 to 0.3.
        straight_through: whether the model sees the discrete draw itself.
        sites: names of the guide's sites to relax; None for every discrete one.
        num_particles: draws in every step.
        vectorize_particles: whether all of them are drawn in one pass with a further dim on the left of every plate.
        max_plate_nesting: dims that plates take; `pyro_lvm.fit` knows, `pyro.infer.SVI` finds out.

    Raises:
        ValueError: if ``num_particles`` is below 1, or a temperature is not positive.
        ProgramError: if a site cannot be relaxed (a ``Categorical``, whose integer values pick rows: nothing lies
            between two of them), if nothing is to be relaxed, if no gradient comes back from the model to a relaxed
            draw, or if the KL has no closed form.

    When it is wrong: always by a bias, which grows with the temperature and with how curved the model is in y; measure
    it against ``ScoreFunction``. A model that looks at y with ``if``, ``argmax`` or an index does not see what is
    drawn.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyro_lvm as lvm
        >>> def model(x, size=None):
        ...     locs = pyro.param("locs", torch.tensor([-2.0, 0.0, 2.0]))
        ...     with pyro.plate("data", size or len(x), subsample=x):
        ...         y = pyro.sample("y", dist.OneHotCategorical(torch.ones(3)))
        ...         pyro.sample("x", dist.Normal(y @ locs, 1.0), obs=x)
        >>> def guide(x, size=None):
        ...     weights = pyro.param("weights", torch.zeros(3))
        ...     with pyro.plate("data", size or len(x), subsample=x):
        ...         pyro.sample("y", dist.OneHotCategorical(logits=x[:, None] * weights))
        >>> cooling = lvm.elbo.Relaxed(temperature=lvm.schedules.exponential(1.0, 0.3))
        >>> fit = lvm.fit((model, guide), torch.tensor([-2.0, 0.1, 1.9]), elbo=cooling, steps=20, seed=0)
        >>> lvm.elbo.Relaxed(temperature=0.5, straight_through=True)
        Relaxed(temperature=0.5, straight_through=True)
    """

    samples_discrete = True

    def __init__(
        self,
        temperature: float | Schedule = 0.5,
        straight_through: bool = False,
        sites: Iterable[str] | None = None,
        num_particles: int = 1,
        *,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
    ) -> None:
        super().__init__(num_particles, vectorize_particles=vectorize_particles, max_plate_nesting=max_plate_nesting)
        self.temperature = Scheduled(temperature, "temperature", lambda value: value > 0, "above 0")
        self.straight_through = straight_through
        self.sites = None if sites is None else frozenset(sites)
        self._paths_seen = False

    def __repr__(self) -> str:
        shown = f", num_particles={self.num_particles}" if self.num_particles > 1 else ""
        return f"Relaxed(temperature={self.temperature!r}, straight_through={self.straight_through}{shown})"

    def check(self, structure: Structure, batch: Batch) -> None:
        """Raise `ProgramError` where a site cannot be relaxed, or its KL stands in no closed form."""
        del batch
        chosen = [site for site in structure.guide.values() if self._wants(site.name, site.fn)]
        if not chosen:
            raise ProgramError(_nothing(self, list(structure.guide)))
        for site in chosen:
            if type(site.base) not in _RELAXATIONS:
                raise ProgramError(_not_relaxable(str(site), site.base))
            _check_order(site, structure)
        for site in structure.guide.values():
            if site not in chosen and not site.fn.has_rsample:
                raise ProgramError(
                    f"guide {site} ({site.kind}) is neither relaxed nor reparameterised by {self!r}: add it to sites=, "
                    "or use elbo=lvm.elbo.ScoreFunction()"
                )

    def prepared(self, max_plate_nesting: int) -> Self:
        """A copy for one program, with a temperature of its own."""
        own = super().prepared(max_plate_nesting)
        own.temperature, own._paths_seen = self.temperature.fresh(), False
        return own

    def advance(self, progress: float) -> None:
        """Take the temperature at ``progress``."""
        self.temperature.advance(progress)

    def arrival(self) -> float:
        """The fraction of training from which on the temperature stays the same."""
        return self.temperature.arrival()

    def tensors(self) -> tuple[Tensor, ...]:
        """The temperature."""
        return (self.temperature.tensor,)

    def estimate(self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any) -> Estimate:
        """The relaxed bound, its gradient, and the plain bound at the discrete draws."""
        if self.vectorize_particles:
            if self.max_plate_nesting == math.inf:
                untyped: Any = self
                untyped._guess_max_plate_nesting(model, guide, args, kwargs)
            of_particles: Any = self._vectorized_num_particles
            model, guide = of_particles(model), of_particles(guide)
        loss, parts = torch.zeros(()), []
        runs = 1 if self.vectorize_particles else self.num_particles
        for _ in range(runs):
            value, terms = self._one_run(model, guide, args, kwargs)
            loss = loss + value / self.num_particles
            parts.append(terms)
        return Estimate(loss.detach(), loss, Terms.mean(parts, [1.0] * runs))

    def _one_run(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Tensor, Terms]:
        """Minus the relaxed bound, summed over the particles of one pair of traces, and the plain bound's parts."""
        replaced = _Replaced(self)
        guide_trace = poutine.trace(replaced(guide)).get_trace(*args, **kwargs)
        if not replaced.discrete:
            raise ProgramError(_nothing(self, [name for name, node in guide_trace.nodes.items() if is_random(node)]))
        model_trace = _densities(poutine.replay(model, trace=guide_trace), replaced.discrete, args, kwargs)
        guide_trace = prune_subsample_sites(guide_trace)
        guide_trace.compute_log_prob(lambda name, node: name not in replaced.discrete)
        loss = torch.zeros(())
        for trace, sign in ((model_trace, -1.0), (guide_trace, 1.0)):
            for name, node in trace.nodes.items():
                if is_random(node) and name not in replaced.discrete:
                    loss = loss + sign * node["log_prob_sum"]
        if not self._paths_seen:
            _check_paths(loss, replaced)
            self._paths_seen = True
        for name, fn in replaced.discrete.items():
            node = guide_trace.nodes[name]
            kl = _closed_kl(name, fn, model_trace.nodes[name]["fn"])
            loss = loss + scale_and_mask(kl, node["scale"], node["mask"]).sum()
        return loss, self._plain(model, guide, args, kwargs, replaced)

    def _plain(self, model: Any, guide: Any, args: Any, kwargs: Any, replaced: _Replaced) -> Terms:
        """The plain bound's parts at the discrete draws, as if from one particle, divided by their number."""
        with torch.no_grad():
            discrete = _Given({name: _rounded(replaced.discrete[name], v) for name, v in replaced.drawn.items()})
            pair: Any = Objective._get_trace(self, model, discrete(guide), args, kwargs)
        return read_terms(self, [pair], None)

    def _wants(self, name: str, fn: Any) -> bool:
        if self.sites is not None:
            return name in self.sites
        return bool(getattr(fn.support, "is_discrete", False)) and not fn.has_rsample


_RELAXATIONS: dict[type, tuple[type, type]] = {
    OneHotCategorical: (RelaxedOneHotCategorical, RelaxedOneHotCategoricalStraightThrough),
    Bernoulli: (RelaxedBernoulli, RelaxedBernoulliStraightThrough),
}
"""The relaxation of each distribution, and the one whose draws are rounded."""


class _Replaced(Messenger):
    """Draws the guide's discrete sites relaxed; keeps what they were.

    Attributes:
        discrete: the guide's own distributions by site.
        drawn: the relaxed draws, rounded or not, by site.
    """

    def __init__(self, objective: Relaxed) -> None:
        super().__init__()
        self.objective = objective
        self.discrete: dict[str, Any] = {}
        self.drawn: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        fn, name = msg["fn"], msg["name"]
        if msg["done"] or msg["is_observed"] or msg["infer"].get("_deterministic") or not hasattr(fn, "support"):
            return
        if not self.objective._wants(name, fn):
            return
        base, wrapped = base_of(fn), 0
        while isinstance(fn, Independent):
            fn, wrapped = fn.base_dist, wrapped + fn.reinterpreted_batch_ndims
        if type(base) not in _RELAXATIONS:
            raise ProgramError(_not_relaxable(f"site {name!r}", base))
        kind: Any = _RELAXATIONS[type(base)][self.objective.straight_through]
        temperature = self.objective.temperature.now().to(dtype=base.logits.dtype, device=base.logits.device)
        self.discrete[name] = msg["fn"]
        msg["fn"] = kind(temperature, logits=base.logits, validate_args=False).to_event(wrapped)

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.discrete:
            self.drawn[msg["name"]] = msg["value"]


class _Given(Messenger):
    """Gives sites the values that were drawn before."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def _densities(model: Any, without: Iterable[str], args: Any, kwargs: Any) -> Any:
    """The model's trace with the densities of all sites but the relaxed ones, whose values have none."""
    skipped = frozenset(without)
    trace = prune_subsample_sites(poutine.trace(model).get_trace(*args, **kwargs))
    trace.compute_log_prob(lambda name, node: name not in skipped)
    return trace


def _rounded(fn: Any, value: Tensor) -> Tensor:
    """The discrete draw with the same noise: exactly a draw from the discrete distribution."""
    if isinstance(base_of(fn), Bernoulli):
        return (value > 0.5).to(value.dtype)
    return torch.zeros_like(value).scatter_(-1, value.argmax(-1, keepdim=True), 1.0)


def _closed_kl(name: str, guide_fn: Any, model_fn: Any) -> Tensor:
    try:
        kl: Tensor = kl_divergence(guide_fn, model_fn)
    except NotImplementedError:
        raise ProgramError(
            f"site {name!r} is {type(base_of(guide_fn)).__name__} in the guide and {type(base_of(model_fn)).__name__} "
            "in the model, between which there is no KL in closed form: use one distribution in both"
        ) from None
    return kl


def _check_paths(loss: Tensor, replaced: _Replaced) -> None:
    """Raise where the model, or the rest of the guide, is not a differentiable function of a relaxed draw."""
    moving = {name: value for name, value in replaced.drawn.items() if value.requires_grad}
    if not moving or not torch.is_grad_enabled():
        return
    found: Iterable[Any] = [None] * len(moving)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, list(moving.values()), retain_graph=True, allow_unused=True)
    for name, gradient in zip(moving, found, strict=True):
        if gradient is None:
            raise ProgramError(
                f"site {name!r} is relaxed, but no gradient comes back to its draw: the model uses it as an index, or "
                "in a comparison. Write what follows from it as a product, y @ table in place of table[y.argmax(-1)]"
            )


def _check_order(site: Site, structure: Structure) -> None:
    """The closed form takes what the site hangs on in the model as drawn before it."""
    before_in_guide = list(structure.guide)[: list(structure.guide).index(site.name)]
    for other in structure.latent:
        if other.name == site.name:
            return
        if other.name in structure.guide and other.name not in before_in_guide:
            raise ProgramError(
                f"{site} comes after {other.name!r} in the model and before it in the guide, so that its KL cannot be "
                "taken in closed form given what it hangs on: sample both in one order, or use "
                "elbo=lvm.elbo.ScoreFunction()"
            )


def _not_relaxable(site: str, base: Any) -> str:
    kind = type(base).__name__
    edit = (
        "write OneHotCategorical in model and guide, and y @ table where there is table[y]"
        if base.has_enumerate_support and kind == "Categorical"
        else "use elbo=lvm.elbo.ScoreFunction()"
    )
    return (
        f"{site} ({kind}) cannot be relaxed: OneHotCategorical and Bernoulli have values between their values, and "
        f"{kind} has none: {edit}"
    )


def _nothing(objective: Relaxed, names: list[str]) -> str:
    wanted = "no discrete site" if objective.sites is None else f"none of {', '.join(sorted(objective.sites))}"
    return f"{objective!r} finds {wanted} in the guide (its sites: {', '.join(names) or 'none'}): nothing to relax"
