r"""Where a mixture starts: whitened k-means++, many restarts in short runs, the best likelihood kept.

The likelihood of a mixture has many local maxima, and gradient steps climb the one whose foot they stand on. Each
restart is seeded by k-means++ (Arthur and Vassilvitskii, 2007,
https://theory.stanford.edu/~sergei/papers/kMeansPP-soda.pdf) in whitened coordinates, because Euclidean distance in the
units of the data follows whichever feature has the largest numbers. All restarts then take a few steps of soft
assignment together, as one batch, and the better ones run on. A Gaussian's log density is linear in the statistics
:math:`\phi(x) = (1, x, x x^\top)`, so both halves of a step are one matrix product:

.. math::
    \log \pi_k \mathcal{N}(x_i \mid \mu_k, \Sigma_k) = \phi(x_i)^\top \eta_k, \qquad
    t_k = \sum_i \tau_{ik} \, \phi(x_i)
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pyro_lvm.models.mixture_densities import Covariance

__all__ = ["best_of_short_runs"]

_SHORT_STEPS, _LONG_STEPS = 10, 60
_MAX_RESTARTS, _MIN_RESTARTS = 64, 8
_RESTART_BUDGET = 4e8  # multiplications of one step of all restarts: a quarter of a second on one core
_MAX_ROWS = 5_000  # enough to tell a good start from a bad one; the fit itself uses all rows
_MAX_MATRIX_FEATURES = 32  # D^2 statistics per row beyond this cost more than they tell
_MAX_ELEMENTS = 2**22  # of one block of responsibilities, 32 MiB


def best_of_short_runs(
    x: Tensor, num_components: int, covariance: Covariance, reg_covar: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best of several short runs.

    Where the clusters are plain this is the maximum already, and a fit has nothing left to climb.

    Runs that end with a component on too few rows for its covariance, or at the floor in some direction, are taken only
    where no other run is left: their likelihood is high for the wrong reason.

    Args:
        x: data, shape (n, D).
        num_components: K <= n.
        covariance: "full", "tied", "diag" or "spherical".
        reg_covar: added to every variance, squared units of the data.
        seed: of the restarts; nothing else is random.

    Returns:
        weights (K,), locs (K, D) and covariances in scikit-learn's shapes, float64, on the device of x.

    Raises:
        ValueError: if x has no rows, fewer rows than components, or values that are not finite.
    """
    if len(x) < 1:
        raise ValueError("x has no rows, so there is nothing to fit; pass at least one row per component.")
    if len(x) < num_components:
        raise ValueError(f"more components than rows: num_components={num_components}, x has {len(x)} rows.")
    if not bool(x.isfinite().all()):
        not_finite = int((~x.isfinite()).sum())
        raise ValueError(f"x holds {not_finite} values that are not finite; drop or fill those rows first.")
    generator = np.random.default_rng(seed)
    x = x.detach().double()
    max_rows = max(_MAX_ROWS, 20 * num_components)
    if len(x) > max_rows:
        rows = np.sort(generator.choice(len(x), max_rows, replace=False))
        x = x[torch.from_numpy(rows).to(x.device)]
    center = x.mean(0)
    x = x - center
    # Rounding alone makes the covariance of collinear features indefinite by about this much.
    floor = max(reg_covar, 1e-12 * x.square().mean(0).max().item(), 1e-300)
    standardised, whitened = _standardise(x), _whiten(_standardise(x))
    runs = _ShortRuns(x, whitened, covariance, floor)
    affordable = int(_RESTART_BUDGET // (runs.statistics.numel() * num_components))
    num_restarts = min(max(affordable, _MIN_RESTARTS), _MAX_RESTARTS)
    # Whitening undoes correlation, but where the clusters themselves make the correlation it also hides the direction
    # that separates them: every other restart therefore only divides by the standard deviations.
    responsibilities = torch.stack(
        [_seed(whitened if r % 2 == 0 else standardised, num_components, generator) for r in range(num_restarts)]
    )
    score, responsibilities = runs(responsibilities, _SHORT_STEPS)
    responsibilities = responsibilities[score.topk(math.ceil(0.3 * num_restarts)).indices]
    score, responsibilities = runs(responsibilities, _LONG_STEPS)
    weights, locs, covariances = _moments(x, responsibilities[score.argmax()], covariance, floor)
    return weights, locs + center, covariances


def _standardise(x: Tensor) -> Tensor:
    scale = x.square().mean(0).sqrt()
    return x / torch.where(scale > 0, scale, torch.ones_like(scale))


def _whiten(x: Tensor) -> Tensor:
    """Principal coordinates of unit variance; directions in which the data have no width are left out."""
    left, singular, _ = torch.linalg.svd(x, full_matrices=False)
    kept = singular > 1e-6 * singular[0].clamp_min(1e-300)
    return left[:, kept] * len(x) ** 0.5 if bool(kept.any()) else x


def _seed(coordinates: Tensor, num_components: int, generator: np.random.Generator) -> Tensor:
    """Rows to their nearest k-means++ seed, nearly hard, shape (n, K)."""
    from sklearn.cluster import kmeans_plusplus

    random_state = int(generator.integers(2**31))
    seeds, _ = kmeans_plusplus(coordinates.cpu().numpy(), num_components, random_state=random_state)
    distances = torch.cdist(coordinates, torch.from_numpy(np.ascontiguousarray(seeds)).to(coordinates))
    hard = torch.nn.functional.one_hot(distances.argmin(-1), num_components).double()
    return 0.99 * hard + 0.01 / num_components  # a seed that is a duplicate of another would otherwise own no row


class _ShortRuns:
    """Soft assignment and weighted moments, alternately, for a batch of responsibilities (R, n, K)."""

    def __init__(self, x: Tensor, whitened: Tensor, covariance: Covariance, floor: float) -> None:
        self.covariance = covariance
        self.rows_needed = {"full": x.shape[1] + 1, "tied": 1, "diag": 2, "spherical": 2}[covariance]
        if covariance in ("full", "tied"):  # an affine map leaves these families as they are: take the best coordinates
            self.u = whitened[:, :_MAX_MATRIX_FEATURES]
            to_whitened = torch.linalg.lstsq(x, self.u, driver="gelsd" if x.device.type == "cpu" else "gels").solution
            # Differences of second moments are right to about 1e-12 of the data's own.
            rounding = 1e-10 * torch.eye(self.u.shape[1], dtype=x.dtype, device=x.device)
            self.floor = floor * to_whitened.T @ to_whitened + rounding
            second = (self.u.unsqueeze(-1) * self.u.unsqueeze(-2)).flatten(1)
        elif covariance == "diag":
            self.u = _standardise(x)
            self.floor = floor / torch.where(x.square().mean(0) > 0, x.square().mean(0), torch.ones_like(x[0]))
            second = self.u.square()
        else:
            width = x.square().mean().clamp_min(floor)
            self.u, self.floor = x / width.sqrt(), floor / width
            second = self.u.square().mean(-1, keepdim=True)
        self.statistics = torch.cat([torch.ones_like(self.u[:, :1]), self.u, second], -1)

    def __call__(self, responsibilities: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """Score (R,), nats per row up to a constant, and responsibilities (R, n, K) after `num_steps` steps.

        A collapsed run scores below all others.
        """
        at_once = max(1, _MAX_ELEMENTS // responsibilities[0].numel())
        scores, ends = [], []
        for block in responsibilities.split(at_once):
            for _ in range(num_steps):
                natural = self._natural(*self._gaussians(block))
                log_joint = (self.statistics @ natural.flatten(0, 1).T).unflatten(-1, natural.shape[:2]).movedim(1, 0)
                evidence = log_joint.logsumexp(-1, keepdim=True)
                block = (log_joint - evidence).exp()
            scores.append(evidence.mean((-2, -1)) - 1e9 * self._has_collapsed(*self._gaussians(block)))
            ends.append(block)
        return torch.cat(scores), torch.cat(ends)

    def _gaussians(self, responsibilities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Counts (R, K, 1), locs (R, K, D) and (co)variances with these responsibilities, in coordinates `u`."""
        num_rows, num_features = self.u.shape
        totals = responsibilities.mT @ self.statistics
        counts = totals[..., :1] + 10 * torch.finfo(totals.dtype).eps
        loc = totals[..., 1 : num_features + 1] / counts
        second = totals[..., num_features + 1 :] / counts
        if self.covariance in ("full", "tied"):
            matrices = second.unflatten(-1, (num_features, num_features)) - loc.unsqueeze(-1) * loc.unsqueeze(-2)
            if self.covariance == "tied":
                matrices = ((counts / num_rows).unsqueeze(-1) * matrices).sum(-3, keepdim=True)
            return counts, loc, (matrices + matrices.mT) / 2 + self.floor
        squared = loc.square() if self.covariance == "diag" else loc.square().mean(-1, keepdim=True)
        return counts, loc, (second - squared).clamp_min(0) + self.floor

    def _natural(self, counts: Tensor, loc: Tensor, spread: Tensor) -> Tensor:
        """Coefficients of the statistics, (R, K, 1 + D + ...), up to the constant that all Gaussians share."""
        if self.covariance in ("full", "tied"):
            factor = torch.linalg.cholesky(spread)
            precision = torch.cholesky_inverse(factor).expand(*loc.shape, loc.shape[-1])
            linear = (precision @ loc.unsqueeze(-1)).squeeze(-1)
            log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
            quadratic = precision.flatten(-2)
        else:
            linear = loc / spread
            sharing = 1 if self.covariance == "diag" else loc.shape[-1]  # features to one variance
            log_det = 0.5 * sharing * spread.log().sum(-1, keepdim=True)
            quadratic = sharing / spread
        constant = (counts / len(self.u)).log() - log_det - 0.5 * (linear * loc).sum(-1, keepdim=True)
        return torch.cat([constant, linear, -0.5 * quadratic], -1)

    def _has_collapsed(self, counts: Tensor, loc: Tensor, spread: Tensor) -> Tensor:
        """Does some component own too few rows for its covariance, or is it at the floor in some direction? (R,)."""
        if self.covariance in ("full", "tied"):
            to_floor = torch.linalg.inv(torch.linalg.cholesky(self.floor))
            in_floors = torch.linalg.eigvalsh(to_floor @ spread @ to_floor.mT)
        else:
            in_floors = spread / self.floor
        starved, flat = (counts < self.rows_needed).flatten(1).any(-1), (in_floors < 1.5).flatten(1).any(-1)
        return starved.logical_or(flat)


def _moments(
    x: Tensor, responsibilities: Tensor, covariance: Covariance, floor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted moments in the units of the data, from responsibilities (n, K)."""
    counts = responsibilities.sum(0) + 10 * torch.finfo(x.dtype).eps
    weights, locs = counts / counts.sum(), responsibilities.T @ x / counts.unsqueeze(-1)
    if covariance in ("full", "tied"):
        identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        each = []
        for k, loc in enumerate(locs):
            deviation = x - loc
            each.append((responsibilities[:, k : k + 1] * deviation).T @ deviation / counts[k])
        covariances = torch.stack(each)
        if covariance == "tied":
            covariances = (weights[:, None, None] * covariances).sum(0)
        return weights, locs, (covariances + covariances.mT) / 2 + floor * identity
    variances = (responsibilities.T @ x.square() / counts.unsqueeze(-1) - locs.square()).clamp_min(0) + floor
    return weights, locs, variances if covariance == "diag" else variances.mean(-1)
