r"""The importance-weighted bound, a tighter one with every particle, and three gradients of it.

.. math:: \mathcal{L}_K = \sum_i E_{z_1, \ldots, z_K \sim q(z \mid x_i)}
          \left[\log \frac1K \sum_{k=1}^K w_{ik}\right], \qquad w_{ik} = \frac{p(x_i, z_k)}{q(z_k \mid x_i)},
          \qquad \mathcal{L}_1 = \mathrm{ELBO} \le \mathcal{L}_K \le \mathcal{L}_{K+1} \le \sum_i \log p(x_i)

With :math:`\tilde w_k = w_k / \sum_j w_j` and :math:`z_k = g(\epsilon_k, \phi)` its gradient in the guide's
parameters is

.. math:: \nabla_\phi \mathcal{L}_K = E\Bigl[\sum_k \tilde w_k \Bigl(\frac{\partial \log w_k}{\partial z_k}
          \frac{\partial z_k}{\partial \phi} - \nabla_\phi \log q_\phi(z_k) \big|_{z_k}\Bigr)\Bigr]

- "reparam" takes it as it stands. The second term, the score of q at its own draws, has mean nought for K = 1, but
  keeps the gradient noisy where q is exact; and with K the signal falls faster than the noise (Rainforth et al.,
  2018, https://arxiv.org/abs/1802.04537).
- "stl" leaves the score out ("sticking the landing", Roeder, Wu and Duvenaud, 2017,
  https://arxiv.org/abs/1703.09194). Unbiased for K = 1, biased beyond.
- "dreg" reparameterises the score once more (Tucker et al., 2019, https://arxiv.org/abs/1810.04152), which turns
  :math:`\tilde w_k` into :math:`\tilde w_k^2`: unbiased for every K, and no noise where q is exact.

  .. math:: \nabla_\phi \mathcal{L}_K = E\Bigl[\sum_k \tilde w_k^2 \frac{\partial \log w_k}{\partial z_k}
            \frac{\partial z_k}{\partial \phi}\Bigr]

For the model's parameters all three are :math:`\sum_k \tilde w_k \nabla_\theta \log p_\theta(x_i, z_k)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any, Literal

import torch
from pyro.infer import TraceEnum_ELBO
from pyro.ops import packed
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_lvm.data import Batch
from pyro_lvm.elbo.factors import log_factors
from pyro_lvm.elbo.objective import Estimate, Objective
from pyro_lvm.elbo.particles import PARTICLES, common_frames, plates_of
from pyro_lvm.elbo.terms import is_random, read_terms, watch_factors
from pyro_lvm.errors import ProgramError
from pyro_lvm.structure import Structure

__all__ = ["ImportanceWeighted"]


class ImportanceWeighted(Objective):
    r"""The bound of Burda, Grosse and Salakhutdinov (2016, https://arxiv.org/abs/1509.00519).

    .. math:: \mathcal{L}_K = \sum_i E_q\left[\log \frac1K \sum_{k=1}^K \frac{p(x_i, z_k)}{q(z_k \mid x_i)}\right]

    Each datum has weights of its own, and the plate scales their log-mean-exp: a minibatch's loss is an unbiased
    estimate of the full one. Sites that the model enumerates are summed out exactly in every weight. Where a latent
    site lies outside the plate over the data there is one weight for all data, and only the full batch gives a bound.

    Args:
        num_particles: K, draws for each datum.
        gradient: of the guide's parameters: "reparam", "stl" or "dreg", as the module's text derives them.
        vectorize_particles: whether all K are drawn in one pass with a further dim on the left of every plate; False
            for a program that does not broadcast.
        max_plate_nesting: dims that plates take; `pyro_lvm.fit` knows, `pyro.infer.SVI` finds out.

    Raises:
        ValueError: if ``num_particles`` is below 1, or ``gradient`` is not known.
        ProgramError: before a fit, if a guide site cannot be reparameterised or is enumerated in the guide, if sites
            are scaled differently, or if there is one weight for all data and the batch is a part of them.

    When it is wrong: the guide is not fitted to the posterior but to what makes a good proposal; with large K its
    gradient by "reparam" is mostly noise, and `fit.elbo`, the plain bound, may be lower than after a plain fit.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> tighter = lvm.elbo.ImportanceWeighted(num_particles=5, gradient="dreg")
        >>> fit = lvm.fit(lvm.PPCA(num_features=3, latent_dim=1), x, elbo=tighter, steps=20, seed=0)
        >>> fit.info["estimator"]
        "ImportanceWeighted(num_particles=5, gradient='dreg')"
    """

    enumerates = True

    def __init__(
        self,
        num_particles: int = 5,
        gradient: Literal["reparam", "stl", "dreg"] = "reparam",
        *,
        vectorize_particles: bool = True,
        max_plate_nesting: float = float("inf"),
    ) -> None:
        super().__init__(num_particles, vectorize_particles=vectorize_particles, max_plate_nesting=max_plate_nesting)
        if gradient not in ("reparam", "stl", "dreg"):
            raise ValueError(f"gradient={gradient!r} is not known: use 'reparam', 'stl' or 'dreg'")
        self.gradient = gradient

    def __repr__(self) -> str:
        return f"ImportanceWeighted(num_particles={self.num_particles}, gradient={self.gradient!r})"

    def check(self, structure: Structure, batch: Batch) -> None:
        """Raise `ProgramError` where there are no weights, or where they give no bound."""
        for site in structure.guide.values():
            if not site.fn.has_rsample:
                raise ProgramError(
                    f"guide {site} ({site.kind}) cannot be reparameterised, which {self!r} requires: enumerate it in "
                    "the model and leave it out of the guide, or use elbo=TraceGraph_ELBO()"
                )
        sites = [*structure.model.values(), *structure.guide.values()]
        outside = [site for site in sites if not site.inside(structure.data_plate) and not site.observed]
        if outside and len(batch) != batch.size:
            raise ProgramError(_no_bound(str(outside[0]), batch.size / len(batch)))

    def estimate(self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any) -> Estimate:
        """The bound, its gradient, and the plain bound of the same draws."""
        tracer: Any = _Tracer(self)
        traces = list(tracer._get_traces(model, guide, args, kwargs))
        self.max_plate_nesting = tracer.max_plate_nesting
        for _, guide_trace in traces:
            _refuse_listed(guide_trace)
            if self.gradient != "reparam":
                _detach_densities(guide_trace)
        enumerated = any(node["infer"].get("_enumerate_dim") is not None for node in _random(traces[0][0]))
        if enumerated:
            for pair in traces:
                watch_factors(*pair)
        scale = _common_scale(traces[0])
        particles, log_weights = self._log_weights(traces)
        bound = torch.logsumexp(log_weights, particles) - math.log(log_weights.shape[particles])
        loss = -(scale * bound).sum()
        plain = -(scale * log_weights.mean(particles)).sum()
        terms = read_terms(tracer if enumerated else self, traces, plain if enumerated else None)
        if self.gradient == "reparam":
            return Estimate(loss, loss, terms)
        normalised = torch.softmax(log_weights, particles).detach()
        surrogate = -(scale * (normalised * log_weights).sum(particles)).sum()
        each = [normalised] if particles else list(normalised)
        for weights, draws, (_, guide_trace) in zip(each, tracer.draws, traces, strict=True):
            draws.weights = weights  # what comes back to the draws from the model is weighted once more
            of_paths = weights.square() if self.gradient == "dreg" else weights
            surrogate = surrogate + _through_draws(guide_trace, draws, of_paths)
        return Estimate(loss.detach(), surrogate, terms)

    def _log_weights(self, traces: list[tuple[Any, Any]]) -> tuple[int, Tensor]:
        """The dim of the particles and log w, shape (K, *plates that all sites share), plates at their own dims.

        The dim is 0 where every particle has a trace of its own, else that of Pyro's plate, counted from the right.
        """
        each = [_log_weight(*pair) for pair in traces]
        if len(each) > 1 or self.num_particles == 1:
            return 0, torch.stack(each)
        return -int(self.max_plate_nesting), each[0]


class _Tracer(TraceEnum_ELBO):
    """Draws as `TraceEnum_ELBO` does; keeps the guide's draws, and tells what the model does with them apart."""

    def __init__(self, objective: ImportanceWeighted) -> None:
        untyped: Any = super()
        untyped.__init__(strict_enumeration_warning=False)
        self.num_particles = objective.num_particles
        self.vectorize_particles = objective.vectorize_particles
        self.max_plate_nesting = objective.max_plate_nesting
        self.weighted = objective.gradient == "dreg"
        self.apart = objective.gradient != "reparam"
        self.draws: list[_Apart] = []

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        if self.apart:
            self.draws.append(_Apart(self.weighted))
            guide = self.draws[-1](guide)
        untyped: Any = super()
        return untyped._get_trace(model, guide, args, kwargs)


class _Apart(Messenger):
    """Gives the model another name for each draw of the guide than later sites of the guide get.

    The gradient that comes back by that name is the model's alone, and can be weighted.
    """

    def __init__(self, weighted: bool) -> None:
        super().__init__()
        self.weighted = weighted
        self.weights: Tensor | None = None
        self.own: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or not msg["fn"].has_rsample:
            return
        value = msg["fn"](*msg["args"], **msg["kwargs"])
        self.own[msg["name"]] = value
        for_model = value.view_as(value)
        if self.weighted and for_model.requires_grad:
            event_dim = msg["fn"].event_dim
            for_model.register_hook(lambda gradient: gradient * self._weights(event_dim))
        msg["value"], msg["done"] = for_model, True

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.own:  # the trace, outside, has its own note of the other one
            msg["value"] = self.own[msg["name"]]

    def _weights(self, event_dim: int) -> Tensor:
        assert self.weights is not None
        return self.weights.reshape(self.weights.shape + (1,) * event_dim)


def _through_draws(guide_trace: Any, draws: _Apart, weights: Tensor) -> Tensor:
    r"""A sum whose gradient is that of the weighted log q through the draws, not through the parameters of q.

    With :math:`G_i = \partial_{z_i} \sum c \log q`, taken where neither draws nor parameters are variables but z, it
    is :math:`\sum_i G_i \cdot z_i(\phi)`.
    """
    nodes = [node for node in _random(guide_trace) if node["name"] in draws.own]
    values = {node["name"]: node["value"].detach().requires_grad_() for node in nodes}
    log_density = torch.zeros(())
    for node in nodes:
        density = node["fn"].log_prob(values[node["name"]])
        if node["mask"] is not None:
            density = torch.where(torch.as_tensor(node["mask"]), density, 0.0)
        log_density = log_density + (node["scale"] * weights * density).sum()
    names = list(values)
    moving = [name for name in names if draws.own[name].requires_grad]
    wanted = [*(values[name] for name in names), *(draws.own[name] for name in moving)]
    if not wanted or not log_density.requires_grad:
        return torch.zeros(())
    found = torch.autograd.grad(log_density, wanted, retain_graph=True, allow_unused=True)
    # a site's draw counts where its own density is taken, and in the parameters of the sites after it
    of_value = dict(zip(names, found, strict=False))
    of_later = dict(zip(moving, found[len(names) :], strict=True))
    total = torch.zeros(())
    for name in moving:
        gradients = [g for g in (of_value[name], of_later[name]) if g is not None]
        if gradients:
            total = total + (reduce(torch.add, gradients).detach() * draws.own[name]).sum()
    return total


def _refuse_listed(guide_trace: Any) -> None:
    for node in _random(guide_trace):
        if node["infer"].get("_enumerate_dim") is not None:
            raise ProgramError(
                f"guide site {node['name']!r} is enumerated, but importance weights sum it out exactly, so that the "
                "guide's parameters would never hear of it: enumerate it in the model and leave it out of the guide, "
                "or use elbo=TraceEnum_ELBO()"
            )


def _detach_densities(guide_trace: Any) -> None:
    for node in _random(guide_trace):
        parts = node["packed"]
        dims = parts["unscaled_log_prob"]._pyro_dims
        parts["unscaled_log_prob"] = parts["unscaled_log_prob"].detach()
        parts["unscaled_log_prob"]._pyro_dims = dims


def _log_weight(model_trace: Any, guide_trace: Any) -> Tensor:
    """Log w over the plates that all sites share and over particles, each at its own dim."""
    nodes = [*_random(model_trace), *_random(guide_trace)]
    frames = [*common_frames(nodes).values(), *(f for f in nodes[0]["cond_indep_stack"] if f.name == PARTICLES)]
    symbols = {model_trace.plate_to_symbol[frame.name]: frame for frame in frames}
    term = log_factors(model_trace, guide_trace).contract(frozenset(symbols))
    log_weight: Tensor = packed.unpack(term, {symbol: frame.dim for symbol, frame in symbols.items()})
    shape = [1] * -min((frame.dim for frame in frames), default=0)
    for frame in frames:
        shape[frame.dim] = int(frame.size)
    return log_weight.expand(shape)


def _common_scale(pair: tuple[Any, Any]) -> Any:
    """What the log-mean-exp of every row is multiplied with: plates, and whatever scales all sites alike."""
    nodes = [node for trace in pair for node in _random(trace)]
    scale, first = nodes[0]["scale"], nodes[0]["name"]
    for node in nodes:
        if not _same(node["scale"], scale):
            raise ProgramError(
                f"site {first!r} is scaled by {_shown(scale)} and site {node['name']!r} by {_shown(node['scale'])}: "
                "weights of such factors are not those of a bound. Take poutine.scale and plates that subsample one "
                "of them away, or use elbo=Trace_ELBO()"
            )
    if not common_frames(nodes) and not _same(scale, 1.0):
        outside = next(node["name"] for node in nodes if not plates_of(node))
        raise ProgramError(_no_bound(f"site {outside!r}", float(scale)))
    return scale


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        one, other = torch.as_tensor(one), torch.as_tensor(other)
        return one is other or (one.shape == other.shape and bool((one == other).all()))
    return bool(one == other)


def _shown(scale: Any) -> str:
    if not isinstance(scale, Tensor):
        return f"{scale:g}"
    return f"{scale.item():g}" if scale.numel() == 1 else f"values of shape {tuple(scale.shape)}"


def _no_bound(site: str, scale: float) -> str:
    return (
        f"{site} is shared by all data, so that there is one weight for all of them, and the log-mean-exp of weights "
        f"that are scaled by {scale:.4g} is no bound: fit with batch_size=None, or use elbo=Trace_ELBO() in minibatches"
    )


def _random(trace: Any) -> list[Any]:
    return [node for node in trace.nodes.values() if is_random(node)]
