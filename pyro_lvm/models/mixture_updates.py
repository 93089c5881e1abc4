"""Coordinate ascent's updates of a Bayesian Gaussian mixture: the start, one round, the bound, the guide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.data import Rows
from pyro_lvm.models.conjugate_mixture import (
    ConjugateFactors,
    Moments,
    absorb,
    divergences,
    expected_log_joint,
    expected_log_weights,
    weighted_moments,
)
from pyro_lvm.models.conjugate_mixture_guide import ConjugateMixtureGuide
from pyro_lvm.models.mixture_densities import mixture_log_joint

__all__ = ["MixtureState", "MixtureUpdates"]

BLOCK = 2048
"""Rows at a time: enough for the matrix products, few enough for the processor's cache."""


@dataclass(frozen=True)
class MixtureState:
    """Q of the parameters, and what the labels' best factors under it add up to.

    Attributes:
        factors: q of weights, means and covariances, float64.
        moments: of the data under the responsibilities that go with `factors`.
        center: mean of the data, shape (D,).
        log_normaliser: sum over rows of the log of the labels' normalisers, nats of the data set.
        negative_entropy: sum of r log r, nats of the data set.
    """

    factors: ConjugateFactors
    moments: Moments
    center: Tensor
    log_normaliser: float
    negative_entropy: float


class MixtureUpdates:
    """What `lvm.coordinate_ascent` asks of a program, for the Gaussian mixture.

    Args:
        prior: the factors of the prior.
        start: from data (n, D), a seed, and whether to forget what the mixture has, to weights, locs and scale.
        make_guide: an empty guide.
    """

    def __init__(
        self,
        prior: ConjugateFactors,
        start: Callable[[Tensor, int, bool], tuple[Tensor, Tensor, Tensor]],
        make_guide: Callable[[], ConjugateMixtureGuide],
    ) -> None:
        self.prior = _double(prior)
        self._start, self._make_guide = start, make_guide

    @torch.no_grad()
    def start(self, x: Rows, seed: int, init: Any, fresh: bool) -> MixtureState:
        """One conjugate update from responsibilities.

        Args:
            x: the data, one array of rows (n, D).
            seed: of the mixture's own start.
            init: None for the mixture's own start, responsibilities (n, K), or means (K, D), to the nearest of which,
                with every feature in units of its standard deviation, each row is given.
            fresh: whether to start afresh where the mixture has parameters.

        Raises:
            ValueError: if init has neither shape, is not finite, or its rows are no probabilities.
        """
        center = torch.stack([block.sum(0) for block in _blocks(x)]).sum(0) / len(x)
        given = None if init is None else _checked(init, len(x), self.prior).to(center.device)
        if given is None:
            whole = torch.cat(list(_blocks(x)))
            weights, locs, scale = (part.double() for part in self._start(whole, seed, fresh))

            def responsibilities(block: Tensor, first: int) -> Tensor:
                return mixture_log_joint(block, weights, locs, scale, self.prior.covariance).softmax(-1)

        elif _is_table(given, len(x), self.prior):

            def responsibilities(block: Tensor, first: int) -> Tensor:
                return given[first : first + len(block)]

        else:
            variance = torch.stack([(block - center).square().sum(0) for block in _blocks(x)]).sum(0) / len(x)
            unit = torch.where(variance > 0, variance, torch.ones_like(variance)).sqrt()

            def responsibilities(block: Tensor, first: int) -> Tensor:
                nearest = torch.cdist(block / unit, given / unit).argmin(-1)
                return torch.nn.functional.one_hot(nearest, len(given)).double()

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            first = 0
            for block in _blocks(x):
                yield block, responsibilities(block, first)
                first += len(block)

        return self._labelled(absorb(self.prior, weighted_moments(pairs(), center, self.prior.covariance)), x, center)

    @torch.no_grad()
    def update(self, state: MixtureState, x: Rows) -> MixtureState:
        """Q of the parameters given the labels, then of the labels given the parameters."""
        return self._labelled(absorb(self.prior, state.moments), x, state.center)

    @torch.no_grad()
    def bound(self, state: MixtureState, x: Rows) -> tuple[dict[str, float], dict[str, float]]:
        """The full bound in its parts: what the data give, and what each factor costs; nats of the data set."""
        weights, covariances, means = (float(kl) for kl in divergences(state.factors, self.prior))
        expected = float((state.moments.counts * expected_log_weights(state.factors)).sum())
        labels = state.negative_entropy - expected
        scale_site = "scale_tril" if self.prior.is_matrix else "scales"
        kl = {"weights": weights, scale_site: covariances, "locs": means, "component": labels}
        return {"x": state.log_normaliser + labels}, kl

    def guide(self, state: MixtureState) -> ConjugateMixtureGuide:
        """The guide that holds `state`."""
        guide = self._make_guide()
        guide.set_factors(state.factors)
        return guide

    def _labelled(self, factors: ConjugateFactors, x: Rows, center: Tensor) -> MixtureState:
        """The labels' best factors, in one pass over the data."""
        normalisers, entropies = [], []

        def pairs() -> Iterable[tuple[Tensor, Tensor]]:
            for block in _blocks(x):
                log_joint = expected_log_joint(block, factors)
                normaliser = log_joint.logsumexp(-1, keepdim=True)
                log_label = log_joint - normaliser
                # next to nothing is nothing: products with denormal numbers take a processor many times as long
                label = torch.where(log_label > -600, log_label.exp(), 0.0)
                normalisers.append(normaliser.sum())
                entropies.append((label * log_label).sum())
                yield block, label

        moments = weighted_moments(pairs(), center, factors.covariance)
        return MixtureState(factors, moments, center, float(sum(normalisers)), float(sum(entropies)))


def _blocks(x: Rows) -> Iterator[Tensor]:
    for batch in x.batches(BLOCK):
        yield next(iter((*batch.args, *batch.kwargs.values()))).double()


def _double(factors: ConjugateFactors) -> ConjugateFactors:
    names = ("concentration", "mean", "mean_precision", "degrees_of_freedom", "root")
    return ConjugateFactors(factors.covariance, *(getattr(factors, name).detach().double() for name in names))


def _checked(init: Any, n: int, prior: ConjugateFactors) -> Tensor:
    k, d = prior.mean.shape
    given = torch.as_tensor(init).detach().double()
    if given.shape not in ((n, k), (k, d)):
        raise ValueError(
            f"init has shape {tuple(given.shape)}: pass responsibilities of shape ({n}, {k}), a row for each datum, or "
            f"means of shape ({k}, {d})"
        )
    if not bool(given.isfinite().all()):
        raise ValueError(f"init holds {int((~given.isfinite()).sum())} values that are not finite")
    if given.shape != (k, d) and not _are_probabilities(given):
        sums = given.sum(-1)
        raise ValueError(
            f"init has the shape of responsibilities, ({n}, {k}), but its smallest entry is {given.min().item():.3g} "
            f"and its rows sum to {sums.min().item():.6g} to {sums.max().item():.6g}: every row must be probabilities"
        )
    return given


def _is_table(given: Tensor, n: int, prior: ConjugateFactors) -> bool:
    """Whether these are responsibilities; where means have their shape too, whether they could be."""
    return given.shape != prior.mean.shape or (len(given) == n and _are_probabilities(given))


def _are_probabilities(given: Tensor) -> bool:
    return bool((given >= 0).all()) and bool(((given.sum(-1) - 1).abs() < 1e-6).all())
