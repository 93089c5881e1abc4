r"""EM for a Gaussian mixture, with or without a prior and missing values; K-means as its limit.

.. math::
    \text{E: } \tau_{ik} = \frac{\pi_k \mathcal{N}(x_i \mid \mu_k, \Sigma_k)}
                                {\sum_j \pi_j \mathcal{N}(x_i \mid \mu_j, \Sigma_j)}, \qquad
    \text{M: } \pi_k = \frac{N_k}{n}, \quad \mu_k = \frac{1}{N_k} \sum_i \tau_{ik} x_i, \quad
    \Sigma_k = \frac{1}{N_k} \sum_i \tau_{ik} (x_i - \mu_k)(x_i - \mu_k)^\top, \quad N_k = \sum_i \tau_{ik}

Sums over rows are taken block by block: as products with the statistics of `mixture_statistics` where those keep enough
digits; where they do not, and in the first walk over the data, in units of each component,
:math:`y = L_k^{-1} (x - \mu_k)`, with second moments about a mean close to the one they are for: nothing cancels.

A covariance with a direction below the floor r is raised to it in that direction, which is the maximum under the
constraint :math:`\Sigma_k \succeq r I`, and the bound never falls (adding r to every covariance in every step, as
scikit-learn does, maximises nothing).

With a prior, normal-inverse-Wishart and Dirichlet, the M-step finds the joint mode of :math:`\pi, \mu, \Sigma`:

.. math::
    \pi_k \propto N_k + \alpha_k - 1, \quad
    \mu_k = \frac{N_k \bar x_k + \kappa m}{N_k + \kappa}, \quad
    \Sigma_k = \frac{\Psi + S_k + \frac{\kappa N_k}{\kappa + N_k} (\bar x_k - m)(\bar x_k - m)^\top}{\nu + N_k + D + 2}

Dempster, Laird and Rubin (1977), https://doi.org/10.1111/j.2517-6161.1977.tb01600.x; Fraley and Raftery (2007),
https://doi.org/10.1007/s00357-007-0004-5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.blocks import Blocks
from pyro_lvm.exact import Expectation, Parameters
from pyro_lvm.models.mixture_densities import Covariance
from pyro_lvm.models.mixture_initialization import best_of_short_runs
from pyro_lvm.models.mixture_missing import conditionals
from pyro_lvm.models.mixture_mode import log_prior, posterior_mode
from pyro_lvm.models.mixture_statistics import QuadraticStatistics
from pyro_lvm.priors import NormalInverseWishart

__all__ = ["MixtureEM", "Moments", "nearest"]

_SAMPLE = 20_000  # rows to find a start on
_ELEMENTS = 2**23  # of one block: 64 MiB


@dataclass(frozen=True)
class Moments:
    """Weighted moments of the rows of each component.

    Attributes:
        counts: sums of responsibilities, (K,).
        means: weighted means, (K, D).
        scatters: weighted sums of squares about these means: matrices (K, D, D), or diagonals (K, D).
    """

    counts: Tensor
    means: Tensor
    scatters: Tensor


class MixtureEM:
    """The steps of EM for one mixture and one data set.

    Args:
        data: the rows; NaN where a value is missing.
        num_components: K.
        covariance: "full", "tied", "diag" or "spherical".
        reg_covar: the floor under every variance; not used with a prior.
        prior: of the parameters, or None for maximum likelihood.
        write: takes the weights, means and covariances that were found.
    """

    def __init__(
        self,
        data: Blocks,
        num_components: int,
        covariance: Covariance,
        reg_covar: float,
        prior: NormalInverseWishart | None,
        write: Callable[[Parameters], None],
    ) -> None:
        self.num_components, self.covariance = num_components, covariance
        self.prior, self.apply = prior, write
        self.has_matrices = covariance in ("full", "tied")
        self.sample = data.sample(max(_SAMPLE, 20 * num_components), seed=0)
        self.center = torch.nanmean(self.sample, 0).nan_to_num(0.0)
        deviation = self.sample - self.center
        self.variances = torch.nanmean(deviation.square(), 0).nan_to_num(0.0)
        widest = self.variances.max().item()
        unit = torch.where(self.variances > 0, self.variances, torch.ones_like(self.variances)).sqrt()
        farthest = float((deviation / unit).nan_to_num(0.0).square().sum(-1).max())
        self.statistics = QuadraticStatistics(self.center, unit, farthest, self.has_matrices)
        # what a row takes where it is measured in every component, or conditioned on what is seen of it
        features = len(self.center)
        per_row = num_components * features * (features if bool(self.sample.isnan().any()) else 1)
        self.data = replace(data, rows_at_once=min(data.rows_at_once, max(1, _ELEMENTS // per_row)))
        # rounding alone makes the covariance of collinear features indefinite by about this much
        self.floor, self.reg_covar = max(reg_covar, 1e-12 * widest, 1e-300), reg_covar
        self._has_missing: bool | None = None  # the first walk over the data will tell
        self._rooms = [self.center.new_empty(0), self.center.new_empty(0)]

    # ---------------------------------------------------------------------------------------------------- the start

    def start(self, init: Any, seed: int) -> Parameters:
        """From the best of short runs seeded by k-means++, or from means, responsibilities or parameters."""
        k, features = self.num_components, len(self.center)
        if init is None:
            filled = torch.where(self.sample.isnan(), self.center, self.sample)
            found = best_of_short_runs(filled, k, self.covariance, self.floor, seed)
            return dict(zip(("weights", "locs", "covariances"), found, strict=True))
        if isinstance(init, Mapping):
            given = _natural(init, self.covariance)
            return given | {"covariances": self._above_floor(given["covariances"])}
        table = torch.as_tensor(init).detach().to(self.center)
        if table.shape == (k, features) and table.shape != (len(self.data), k):
            return self.given(lambda x, _: nearest(x, table)[0])
        if table.shape == (len(self.data), k):
            return self.given(lambda x, first: table[first : first + len(x)].mT)
        raise ValueError(
            f"init has shape {tuple(table.shape)}: pass means of shape ({k}, {features}), responsibilities of shape "
            f"({len(self.data)}, {k}), a dict with weights, locs and covariances, or None for k-means++"
        )

    def given(self, assign: Callable[[Tensor, int], Tensor]) -> Parameters:
        """The M-step for given responsibilities; ``assign`` gives those (K, b) of rows and the number of the first."""
        zero = self.center.new_zeros(self.num_components, len(self.center))
        unit = {"locs": zero + self.center, "factor": self._unit(zero)}
        first = 0

        def part(x: Tensor) -> tuple[Tensor, ...]:
            nonlocal first
            if bool(x.isnan().any()):
                raise ValueError(
                    "x has missing values, and init gives no covariances to expect them from: pass init=None, or a "
                    "dict with weights, locs and covariances"
                )
            first += len(x)
            return self._sums(self._deviations(x, unit), assign(x, first - len(x)))

        # the first walk finds the means, about which the second measures
        for _ in range(2):
            first = 0
            moments = self._moments(self.data.total(part), unit)
            unit["locs"] = torch.where(moments.counts.unsqueeze(-1) > 0, moments.means, unit["locs"])
        weights = moments.counts / moments.counts.sum()
        spread = self._shape(self.variances.clamp_min(self.floor))
        whole = {"weights": weights, "locs": unit["locs"], "covariances": spread}
        return self._maximised(moments, whole)

    def _unit(self, like: Tensor) -> Tensor:
        ones = torch.ones_like(like)
        return ones.diag_embed() if self.has_matrices else ones

    def _shape(self, variances: Tensor) -> Tensor:
        """Variances by feature as covariances of every component, in this mixture's shape."""
        if self.covariance == "spherical":
            return variances.mean().expand(self.num_components)
        if self.covariance == "tied":
            return variances.diag()
        each = variances.diag() if self.covariance == "full" else variances
        return each.expand(self.num_components, *each.shape)

    # --------------------------------------------------------------------------------------------------- the E-step

    def expectation(self, parameters: Parameters) -> Expectation:
        """Responsibilities, and sums of rows weighted by them; log p(x) + log p(theta), nats of the data set."""
        state = self._whitened(parameters)
        penalty = 0.0 if self.prior is None else float(log_prior(parameters, self.prior, self.covariance))
        fits = self.statistics.count * self.data.rows_at_once <= _ELEMENTS
        if self._has_missing is False and fits and self.statistics.is_exact_enough(state["inverse"]):
            coefficients = self.statistics.coefficients(state["constant"].squeeze(-1), state["locs"], state["inverse"])
            log_evidence, summed = self.data.total(lambda x: self._product(x, coefficients))
            return Expectation(float(log_evidence) + penalty, Moments(*self.statistics.moments(summed)))
        self._has_missing = False
        log_evidence, *sums = self.data.total(lambda x: self._block(x, state))
        return Expectation(float(log_evidence) + penalty, self._moments(tuple(sums), state))

    def _product(self, x: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        table = self.statistics.of(x)
        log_evidence, responsibilities = _normalised(coefficients @ table)
        return log_evidence, responsibilities @ table.mT

    def _whitened(self, parameters: Parameters) -> Parameters:
        """Factors of the covariances, their inverses, and the part of log p(x, k) that x has no part in, (K, 1)."""
        locs, covariances = parameters["locs"], parameters["covariances"]
        features = locs.shape[-1]
        state = {"locs": locs}
        if self.has_matrices:
            factor = _cholesky(covariances, self.reg_covar).expand(len(locs), features, features)
            identity = torch.eye(features, dtype=locs.dtype, device=locs.device).expand_as(factor)
            state["inverse"] = torch.linalg.solve_triangular(factor, identity, upper=False).contiguous()
            state["shift"] = -(state["inverse"] @ (locs - self.center).unsqueeze(-1))
        else:
            each = covariances.unsqueeze(-1).expand_as(locs) if self.covariance == "spherical" else covariances
            factor = each.sqrt()
            state["inverse"] = 1 / factor
        state["factor"] = factor
        state["log_weights"] = parameters["weights"].log()
        state["constant"] = (state["log_weights"] - self._log_det(factor)).unsqueeze(-1)
        return state

    def _block(self, x: Tensor, state: Parameters) -> tuple[Tensor, ...]:
        if bool(x.isnan().any()):
            self._has_missing = True
            return self._block_with_missing(x, state)
        y = self._deviations(x, state)
        squares = torch.mul(y, y, out=self._room(1, y.shape))
        log_joint = torch.add(state["constant"], squares.sum(1), alpha=-0.5)  # (K, b)
        log_evidence, responsibilities = _normalised(log_joint)
        constant = 0.5 * x.shape[-1] * math.log(2 * math.pi)
        return log_evidence - len(x) * constant, *self._sums(y, responsibilities)

    def _deviations(self, x: Tensor, state: Parameters) -> Tensor:
        """Rows in units of each component, (K, D, b)."""
        if "shift" in state:
            k, features, _ = state["inverse"].shape
            rows = (x - self.center).mT
            flat = self._room(0, torch.Size((k * features, len(x))))
            torch.mm(state["inverse"].view(-1, features), rows, out=flat)
            return flat.add_(state["shift"].view(-1, 1)).view(k, features, -1)
        factor = state["factor"].diagonal(dim1=-2, dim2=-1) if self.has_matrices else state["factor"]
        return (x.mT - state["locs"].unsqueeze(-1)) / factor.unsqueeze(-1)

    def _sums(self, y: Tensor, responsibilities: Tensor) -> tuple[Tensor, ...]:
        """Counts (K,), first moments (K, D), and second ones, of rows (K, D, b) weighted by (K, b)."""
        weighted = torch.mul(y, responsibilities.unsqueeze(1), out=self._room(1, y.shape))
        second = torch.bmm(weighted, y.mT) if self.has_matrices else (weighted * y).sum(-1)
        return responsibilities.sum(-1), weighted.sum(-1), second

    def _room(self, which: int, shape: torch.Size) -> Tensor:
        """Memory that every block uses anew: to ask the system for it each time takes as long as the arithmetic."""
        if self._rooms[which].numel() < shape.numel():
            self._rooms[which] = self.center.new_empty(shape.numel())
        return self._rooms[which][: shape.numel()].view(shape)

    def _block_with_missing(self, x: Tensor, state: Parameters) -> tuple[Tensor, ...]:
        scale = state["factor"]
        found = conditionals(x, state["locs"], scale, "full" if self.has_matrices else "diag")
        log_evidence, responsibilities = _normalised((found.log_density + state["log_weights"]).mT)
        deviation = found.deviation.permute(1, 2, 0)  # (K, D, b)
        in_pattern = torch.zeros(len(found.covariance), self.num_components, dtype=x.dtype, device=x.device)
        in_pattern.index_add_(0, found.pattern, responsibilities.mT.contiguous())
        if not self.has_matrices:
            counts, first, second = self._sums(deviation / scale.unsqueeze(-1), responsibilities)
            spread = torch.einsum("pk,pkd->kd", in_pattern, found.covariance)
            return log_evidence, counts, first, second + spread / scale.square()
        inverse = state["inverse"]
        counts, first, second = self._sums(inverse @ deviation, responsibilities)
        spread = torch.einsum("pk,pkde->kde", in_pattern, found.covariance)
        return log_evidence, counts, first, second + inverse @ spread @ inverse.mT

    def _log_det(self, scale: Tensor) -> Tensor:
        diagonal = scale.diagonal(dim1=-2, dim2=-1) if self.has_matrices else scale
        log_det: Tensor = diagonal.log().sum(-1)
        return log_det

    def _moments(self, sums: tuple[Tensor, ...], state: Parameters) -> Moments:
        """From sums in units of the components to moments in units of the data."""
        counts, first, second = sums
        mean = first / counts.clamp_min(1e-300).unsqueeze(-1)
        factor = state["factor"]
        if self.has_matrices:
            about_mean = second - counts[:, None, None] * mean.unsqueeze(-1) * mean.unsqueeze(-2)
            scatters = factor @ about_mean @ factor.mT
            return Moments(counts, state["locs"] + (factor @ mean.unsqueeze(-1)).squeeze(-1), scatters)
        about_mean = (second - counts.unsqueeze(-1) * mean.square()).clamp_min(0)
        return Moments(counts, state["locs"] + factor * mean, factor.square() * about_mean)

    # --------------------------------------------------------------------------------------------------- the M-step

    def maximisation(self, parameters: Parameters, statistics: Moments) -> tuple[Parameters, float]:
        """The maximum of the expected log joint density; the gain is in nats of the data set."""
        found = self._maximised(statistics, parameters)
        return found, float(self._expected(found, statistics) - self._expected(parameters, statistics))

    def _maximised(self, moments: Moments, before: Parameters) -> Parameters:
        if self.prior is not None:
            return posterior_mode(moments.counts, moments.means, moments.scatters, self.prior, self.covariance)
        counts = moments.counts
        owned = counts > 1e-12  # rows; who owns less than that has no moments, and keeps what it had
        locs = torch.where(owned.unsqueeze(-1), moments.means, before["locs"])
        if self.covariance == "tied":
            covariances = moments.scatters.sum(0) / counts.sum()
        elif self.covariance == "spherical":
            covariances = moments.scatters.mean(-1) / counts
        else:
            covariances = moments.scatters / counts.view(-1, *[1] * (moments.scatters.dim() - 1))
        covariances = self._above_floor(covariances.nan_to_num(0.0))
        if self.covariance != "tied":
            covariances = torch.where(
                owned.view(-1, *[1] * (covariances.dim() - 1)), covariances, before["covariances"]
            )
        return {"weights": counts / counts.sum(), "locs": locs, "covariances": covariances}

    def _above_floor(self, covariances: Tensor) -> Tensor:
        if not self.has_matrices:
            return covariances.clamp_min(self.floor)
        covariances = (covariances + covariances.mT) / 2
        identity = torch.eye(covariances.shape[-1], dtype=covariances.dtype, device=covariances.device)
        if not bool(torch.linalg.cholesky_ex(covariances - self.floor * identity).info.any()):
            return covariances
        values, vectors = torch.linalg.eigh(covariances)
        raised: Tensor = vectors * values.clamp_min(self.floor).unsqueeze(-2) @ vectors.mT
        return raised

    def _expected(self, parameters: Parameters, moments: Moments) -> Tensor:
        """Expected log joint density, nats of the data set, without the constant of the normals."""
        counts, covariances = moments.counts, parameters["covariances"]
        offset = moments.means - parameters["locs"]
        labels = torch.xlogy(counts, parameters["weights"]).sum()
        if self.has_matrices:
            factor = _cholesky(covariances, self.reg_covar).expand(len(counts), *covariances.shape[-2:])
            about = moments.scatters + counts[:, None, None] * offset.unsqueeze(-1) * offset.unsqueeze(-2)
            distance = torch.cholesky_solve(about, factor).diagonal(dim1=-2, dim2=-1).sum(-1)
            log_det = 2 * self._log_det(factor)
        else:
            each = covariances.unsqueeze(-1).expand_as(offset) if self.covariance == "spherical" else covariances
            distance = ((moments.scatters + counts.unsqueeze(-1) * offset.square()) / each).sum(-1)
            log_det = self._log_det(each)
        expected: Tensor = labels - 0.5 * (counts * log_det + distance).sum()
        if self.prior is not None:
            return expected + log_prior(parameters, self.prior, self.covariance)
        return expected


def nearest(x: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """One for the nearest mean of each row, else nought, (K, b), and the squared distance to it, (b,)."""
    distances = torch.cdist(means, x, compute_mode="donot_use_mm_for_euclid_dist")
    smallest, which = distances.min(0)
    return torch.zeros_like(distances).scatter_(0, which.unsqueeze(0), 1.0), smallest.square()


def _normalised(log_joint: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of log p(x), and responsibilities, of a joint density (K, b)."""
    largest = log_joint.amax(0)
    # next to nothing is nothing: products with denormal numbers take a processor many times as long
    joint = torch.threshold_((log_joint - largest).exp_(), 1e-250, 0.0)
    total = joint.sum(0)
    return (largest + total.log()).sum(), joint.div_(total)


def _cholesky(covariances: Tensor, reg_covar: float) -> Tensor:
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(covariances)
    if bool(info.any()):
        which = info.nonzero().flatten().tolist()
        raise ValueError(
            f"the covariance of component {which} is not positive definite: it holds fewer rows than it has "
            f"directions, or features that repeat each other. Build the mixture with reg_covar above {reg_covar:.3g}, "
            'a prior, or covariance="tied"'
        )
    return factor


def _natural(init: Mapping[str, Tensor], covariance: Covariance) -> Parameters:
    """Weights, means and covariances, from them or from the mixture's sites."""
    site = "scale_tril" if covariance in ("full", "tied") else "scales"
    if not {"weights", "locs"} <= set(init) or not {"covariances", site} & set(init):
        raise ValueError(
            f"init has {', '.join(init) or 'nothing'}: pass weights (K,), locs (K, D) and covariances (or {site}), as "
            "mixture.constrained() gives"
        )
    found = {name: init[name].detach().double() for name in ("weights", "locs")}
    if "covariances" in init:
        return found | {"covariances": init["covariances"].detach().double()}
    scale = init[site].detach().double()
    return found | {"covariances": scale @ scale.mT if site == "scale_tril" else scale.square()}
