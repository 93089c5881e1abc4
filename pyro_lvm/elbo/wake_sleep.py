r"""Wake-sleep: a guide that covers the posterior instead of hiding in it.

The plain bound fits the guide by the *exclusive* divergence :math:`\mathrm{KL}(q \,\|\, p(z \mid x))`, which punishes
mass where the posterior has none: of two modes a narrow guide takes one. The *inclusive* one,
:math:`\mathrm{KL}(p(z \mid x) \,\|\, q) = -E_{p(z \mid x)}[\log q(z \mid x)] + \text{const}`, punishes missing mass:
the guide covers both. It needs draws from the posterior, and there are two ways to come near them. With
:math:`\tilde w_{ik} = w_{ik} / \sum_j w_{ij}`, :math:`w_{ik} = p(x_i, z_k) / q(z_k \mid x_i)`, :math:`z_k \sim q`:

.. math:: \text{wake-}\theta: \quad & \sum_i \sum_k \tilde w_{ik} \nabla_\theta \log p_\theta(x_i, z_k) \\
          \text{wake-}\phi: \quad & \sum_i \sum_k \tilde w_{ik} \nabla_\phi \log q_\phi(z_k \mid x_i) \\
          \text{sleep-}\phi: \quad & n\, E_{p_\theta(x, z)} \bigl[\nabla_\phi \log q_\phi(z \mid x)\bigr]

Wake-theta is the gradient of the importance-weighted bound. Wake-phi looks at the data, with weights that are biased
for finite K (of order 1/K); sleep-phi dreams z and x from the model, without bias, but not where the data are. No draw
is ever differentiated, so every site may be discrete.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_lvm.data import Batch
from pyro_lvm.elbo.objective import Estimate, Objective
from pyro_lvm.elbo.particles import Particles, common_frames, plates_of, subsampling
from pyro_lvm.elbo.terms import is_random, read_terms
from pyro_lvm.errors import ProgramError
from pyro_lvm.program import ROW_KEYWORDS
from pyro_lvm.structure import Structure

__all__ = ["WakeSleep"]


class WakeSleep(Objective):
    r"""Reweighted wake-sleep (Bornschein and Bengio, 2015, https://arxiv.org/abs/1406.2751).

    .. math:: \text{model:} \quad \max_\theta \sum_i E_q\Bigl[\log \frac1K \sum_k w_{ik}\Bigr], \qquad
              \text{guide:} \quad \min_\phi \; a\, \sum_i \mathrm{KL}(p(z \mid x_i) \,\|\, q) +
              b\, n\, E_{p(x)} \mathrm{KL}(p(z \mid x) \,\|\, q)

    with a = ``wake_phi`` and b = ``sleep``; ``WakeSleep(wake_phi=0, sleep=1)`` is the wake-sleep of Hinton, Dayan, Frey
    and Neal (1995, https://doi.org/10.1126/science.7761831) with importance weights in its wake phase, and
    ``WakeSleep(wake_phi=1, sleep=0)`` what Le et al. (2019, https://arxiv.org/abs/1805.10469) find best. Each datum has
    weights of its own. Dreams are as many as the batch has rows; what is dreamt takes the place of the data argument
    that the observed site was given, and other arguments (covariates) stay.

    The loss is minus the importance-weighted bound, nats of the whole data set; the guide's gradient is not that
    of the loss, and a guide that gets better may leave it as it is.

    Args:
        num_particles: K, draws for each datum; with K = 1 all weights are one, and wake-phi would teach the guide
            itself.
        wake_phi: a, 0 or more.
        sleep: b, 0 or more.
        vectorize_particles: whether all K are drawn in one pass with a further dim on the left of every plate; False
            for a program that does not broadcast.
        max_plate_nesting: dims that plates take; `pyro_lvm.fit` knows, `pyro.infer.SVI` finds out.

    Raises:
        ValueError: if ``num_particles`` is below 1, or below 2 with wake_phi; if a weight is negative, or both are 0.
        ProgramError: if the guide has sites that the model has not; if all data share one weight and the batch is a
            part of them; with sleep, if an observed value is none of the data arguments, or the guide is no function of
            it: it would learn the prior.

    When it is wrong: the weights of one batch with few particles degenerate in many dimensions (see the effective
    sample size of `pyro_lvm.log_evidence`), and the guide then follows single draws. A model that reads the data
    besides observing them (an autoregressive one) dreams with real data in hand: use ``sleep=0``.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> elbo = lvm.elbo.WakeSleep(num_particles=5, wake_phi=0.5, sleep=0.5)
        >>> fit = lvm.fit(lvm.PPCA(num_features=3, latent_dim=1), x, elbo=elbo, steps=20, seed=0)
        >>> fit.info["estimator"]
        'WakeSleep(num_particles=5, wake_phi=0.5, sleep=0.5)'
    """

    samples_discrete = True

    def __init__(
        self,
        num_particles: int = 10,
        wake_phi: float = 0.5,
        sleep: float = 0.5,
        *,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
    ) -> None:
        super().__init__(num_particles, vectorize_particles=vectorize_particles, max_plate_nesting=max_plate_nesting)
        for name, weight in (("wake_phi", wake_phi), ("sleep", sleep)):
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name} is {weight}: it must be 0 or more")
        if wake_phi == sleep == 0:
            raise ValueError("wake_phi and sleep are both 0: nothing would train the guide. Give one of them weight 1")
        if wake_phi > 0 and num_particles < 2:
            raise ValueError(
                f"num_particles is {num_particles} with wake_phi={wake_phi:g}: one draw has weight 1 whatever it is, "
                "and the guide would learn itself: use at least 2, or wake_phi=0"
            )
        self.wake_phi, self.sleep = float(wake_phi), float(sleep)
        self._observed_in: dict[str, int | str] | None = None

    def __repr__(self) -> str:
        return f"WakeSleep(num_particles={self.num_particles}, wake_phi={self.wake_phi:g}, sleep={self.sleep:g})"

    def check(self, structure: Structure, batch: Batch) -> None:
        """Raise `ProgramError` where there are no weights, or none that are right."""
        del batch
        for site in structure.guide.values():
            if site.name not in structure.model:
                raise ProgramError(_auxiliary(str(site)))

    def prepared(self, max_plate_nesting: int) -> Self:
        """A copy for one program."""
        own = super().prepared(max_plate_nesting)
        own._observed_in = None
        return own

    def estimate(self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any) -> Estimate:
        """The importance-weighted bound, the gradients of the three phases, and the plain bound of the same draws."""
        with _Detached():
            particles = Particles.of(self, model, guide, args, kwargs)
        model_sites, guide_sites = particles.of_model(), particles.of_guide()
        in_model = {node["name"] for node in model_sites}
        for node in guide_sites:
            if node["name"] not in in_model:
                raise ProgramError(_auxiliary(f"site {node['name']!r}"))
        rows = common_frames([*model_sites, *guide_sites])
        _check_rows([*model_sites, *guide_sites], rows)
        log_joint = _summed(particles, model_sites, rows, _scaled)
        log_guide = _summed(particles, guide_sites, rows, _scaled)
        with torch.no_grad():
            log_weight = _summed(particles, model_sites, rows, _unscaled)
            log_weight = log_weight - _summed(particles, guide_sites, rows, _unscaled)
            weights = torch.softmax(log_weight, 0)
            scale = subsampling(rows.values())
            bound = scale * (torch.logsumexp(log_weight, 0) - math.log(particles.count)).sum()
        surrogate = -(weights * log_joint).sum()
        if self.wake_phi:
            surrogate = surrogate - self.wake_phi * (weights * log_guide).sum()
        if self.sleep:
            surrogate = surrogate - self.sleep * self._dreamt(model, guide, args, kwargs)
        return Estimate(-bound, surrogate, read_terms(self, particles.traces, None))

    def _dreamt(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Tensor:
        """Log q(z | x) of z and x that the model dreams, one of each for every row, scaled to all."""
        with torch.no_grad():
            dream = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
            if self._observed_in is None:
                self._observed_in = _matched(dream, args, kwargs)
                _check_listens(self._observed_in, guide, dream, args, kwargs)
        args, kwargs = _with(dream, self._observed_in, args, kwargs)
        trace = poutine.trace(poutine.replay(guide, trace=_latent(dream))).get_trace(*args, **kwargs)
        trace.compute_log_prob()
        return sum((node["log_prob_sum"] for node in trace.nodes.values() if is_random(node)), torch.zeros(()))


class _Detached(Messenger):
    """What is drawn is data: no gradient goes back through it, and sites after it see it so."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


def _summed(particles: Particles, sites: list[Any], rows: dict[str, Any], what: Callable[[Any], Tensor]) -> Tensor:
    """Log-densities of sites, summed over all plates but ``rows``: shape (K, *rows at their dims)."""
    total: Any = 0.0
    for node in sites:
        value = particles.read(node, what)
        dims = [frame.dim for name, frame in plates_of(node).items() if name not in rows]
        total = total + (value.sum(dims, keepdim=True) if dims else value)
    shape = [particles.count, *[1] * particles.nesting]
    for frame in rows.values():
        shape[frame.dim] = frame.size
    return torch.as_tensor(total).expand(shape)


def _scaled(node: Any) -> Tensor:
    log_prob: Tensor = node["log_prob"]
    return log_prob


def _unscaled(node: Any) -> Tensor:
    log_prob: Tensor = node["unscaled_log_prob"]
    if node["mask"] is None:
        return log_prob
    return torch.where(torch.as_tensor(node["mask"], device=log_prob.device), log_prob, 0.0)


def _check_rows(sites: list[Any], rows: dict[str, Any]) -> None:
    for node in sites:
        for name, frame in plates_of(node).items():
            if name not in rows and subsampling([frame]) != 1.0:
                outside = next(site["name"] for site in sites if name not in plates_of(site))
                raise ProgramError(
                    f"site {outside!r} is outside plate {name!r}, so that all its {frame.full_size} rows have one "
                    f"weight together, and {frame.size} of them say nothing of it: fit with batch_size=None, or use "
                    "elbo=Trace_ELBO() in minibatches"
                )


def _latent(trace: Any) -> Any:
    """The latent sites of a dream: what a guide, or the model again, is to take its values from."""
    kept = poutine.Trace()
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and not node["infer"].get("was_observed", False):
            kept.add_node(name, **node)
    return kept


def _matched(dream: Any, args: Any, kwargs: Any) -> dict[str, int | str]:
    """The argument that each observed site's value is: its position, or its name."""
    places: dict[int | str, Any] = dict(enumerate(args))
    places |= {name: value for name, value in kwargs.items() if name not in ROW_KEYWORDS}
    found: dict[str, int | str] = {}
    for name, node in dream.nodes.items():
        if node["type"] != "sample" or not node["infer"].get("was_observed", False):
            continue
        value = node["infer"]["obs"]
        same = [place for place, data in places.items() if data is value]
        same += [place for place, data in places.items() if _equal(data, value)]
        if not same:
            raise ProgramError(
                f"site {name!r} observes a value of shape {tuple(value.shape)} that is none of the data arguments, so "
                "that what is dreamt in its place cannot be given to the guide: pass the observed value itself as an "
                "argument, or use sleep=0"
            )
        found[name] = same[0]
    if len(set(found.values())) < len(found):
        raise ProgramError(
            f"sites {', '.join(map(repr, found))} observe one and the same argument, and would dream two: use sleep=0"
        )
    return found


def _equal(data: Any, value: Tensor) -> bool:
    return isinstance(data, Tensor) and data.shape == value.shape and bool((data == value).all())


def _with(dream: Any, places: dict[str, int | str], args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The data with what was dreamt in its place, in the dtype of what it replaces."""
    positional, named = list(args), dict(kwargs)
    for name, place in places.items():
        target: Any = positional if isinstance(place, int) else named
        value = dream.nodes[name]["value"].detach()
        target[place] = value.to(target[place].dtype)
    return tuple(positional), named


def _check_listens(places: dict[str, int | str], guide: Any, dream: Any, args: Any, kwargs: Any) -> None:
    """Raise where no way leads from a dream to the density that the guide gives it: it is no function of the data."""
    positional, named = _with(dream, places, args, kwargs)
    dreamt: dict[int | str, Tensor] = {p: positional[p] if isinstance(p, int) else named[p] for p in places.values()}
    if not all(value.is_floating_point() for value in dreamt.values()):
        return  # gradients do not tell
    watched = {place: value.clone().requires_grad_() for place, value in dreamt.items()}
    positional = tuple(watched.get(i, value) for i, value in enumerate(positional))
    named = {name: watched.get(name, value) for name, value in named.items()}
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        trace = poutine.trace(poutine.replay(guide, trace=_latent(dream))).get_trace(*positional, **named)
        trace.compute_log_prob()
        density = sum((node["log_prob_sum"] for node in trace.nodes.values() if is_random(node)), torch.zeros(()))
        ways: Any = [None]
        if density.requires_grad:
            ways = torch.autograd.grad(density, list(watched.values()), allow_unused=True)
    if all(way is None for way in ways):
        raise ProgramError(
            "the guide gives latents the same density whatever the data are, so that dreams would teach it the prior: "
            "make it a function of the data, or use sleep=0"
        )


def _auxiliary(site: str) -> str:
    return (
        f"guide {site}: the model has no such site, and the posterior nothing to say of it, which is what the guide is "
        "fitted to: use elbo=Trace_ELBO(), or a guide without auxiliary sites"
    )
