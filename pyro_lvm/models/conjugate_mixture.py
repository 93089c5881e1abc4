r"""The conjugate family of a Bayesian Gaussian mixture: its updates in closed form, and its bound.

.. math::
    q(\pi, \mu, \Sigma) = \mathrm{Dir}(\pi \mid \alpha) \prod_k \mathcal{N}(\mu_k \mid m_k, \Sigma_k / \kappa_k)
    \, \mathcal{IW}(\Sigma_k \mid \nu_k, \Psi_k), \qquad q(k_i) = \mathrm{Categorical}(r_i)

Coordinate ascent sets each factor to :math:`\log q^* = E_{-}[\log p] + \text{const}` in turn (Attias, 2000,
https://papers.nips.cc/paper/1726; Bishop, 2006, section 10.2, https://www.microsoft.com/en-us/research/publication/pattern-recognition-machine-learning/).
With :math:`N_k, \bar x_k, S_k` the counts, means and scatter matrices that the responsibilities give,

.. math::
    \log r_{ik} &= E[\log \pi_k] + \tfrac12 E[\log |\Sigma_k^{-1}|] - \tfrac{D}{2} \log 2\pi
        - \tfrac12 \bigl(D / \kappa_k + \nu_k (x_i - m_k)^\top \Psi_k^{-1} (x_i - m_k)\bigr) + \text{const} \\
    \alpha_k &= \alpha + N_k, \quad \kappa_k = \kappa + N_k, \quad \nu_k = \nu + N_k, \quad
        m_k = (\kappa m + N_k \bar x_k) / \kappa_k \\
    \Psi_k &= \Psi + S_k + \tfrac{\kappa N_k}{\kappa_k} (\bar x_k - m)(\bar x_k - m)^\top

"tied" mixtures have one :math:`\Sigma`, to which all rows belong: :math:`\nu + n` degrees of freedom, and :math:`\Psi`
plus the sum over k of what is added above. "diag" and "spherical" ones have the same with the diagonal, or its sum
(:math:`\nu + D N_k`), in place of the matrix. All four are exact: with one component the bound is the log evidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_lvm.models.mixture_densities import Covariance, mixture_log_joint

__all__ = [
    "ConjugateFactors",
    "Moments",
    "absorb",
    "divergences",
    "expected_log_joint",
    "expected_log_weights",
    "weighted_moments",
]


@dataclass(frozen=True)
class Moments:
    """What a mixture has to know of the data.

    Attributes:
        counts: sums of the responsibilities, shape (K,).
        means: weighted means, shape (K, D); where a count is zero, the centre of the data.
        scatter: weighted sums of squares about them: matrices (K, D, D) for "full" and, summed over the components,
            (D, D) for "tied"; their diagonals (K, D) for "diag"; the sums of these (K,) for "spherical".
    """

    counts: Tensor
    means: Tensor
    scatter: Tensor


def weighted_moments(blocks: Iterable[tuple[Tensor, Tensor]], center: Tensor, covariance: Covariance) -> Moments:
    """Counts, means and scatter from blocks of rows and their responsibilities.

    Sums of squares are taken about `center`, by matrix products, and moved to the means at the end: about the origin of
    the data they would lose the digits that a large mean takes up.

    Args:
        blocks: pairs of rows (b, D) and responsibilities (b, K).
        center: any point amid the data, shape (D,).
        covariance: "full", "tied", "diag" or "spherical".
    """
    counts = sums = squares = torch.zeros((), dtype=center.dtype, device=center.device)
    num_features = len(center)
    for x, responsibilities in blocks:
        deviation = x - center
        counts = counts + responsibilities.sum(0)
        sums = sums + responsibilities.mT @ deviation
        if covariance == "full":
            outer = (deviation.unsqueeze(-1) * deviation.unsqueeze(-2)).flatten(1)
            squares = squares + (responsibilities.mT @ outer).unflatten(-1, (num_features, num_features))
        elif covariance == "tied":
            squares = squares + deviation.mT @ (responsibilities.sum(-1, keepdim=True) * deviation)
        else:
            squares = squares + responsibilities.mT @ deviation.square()
    shifts = sums / counts.clamp_min(torch.finfo(counts.dtype).tiny).unsqueeze(-1)
    if covariance in ("full", "tied"):
        between = counts[:, None, None] * shifts.unsqueeze(-1) * shifts.unsqueeze(-2)
        scatter = squares - (between if covariance == "full" else between.sum(0))
        scatter = (scatter + scatter.mT) / 2
    else:
        scatter = (squares - counts.unsqueeze(-1) * shifts.square()).clamp_min(0)
        scatter = scatter if covariance == "diag" else scatter.sum(-1)
    return Moments(counts, center + shifts, scatter)


@dataclass(frozen=True)
class ConjugateFactors:
    r"""Numbers of a Dirichlet and K normal-inverse-Wisharts: of the prior, of q, or of anything between.

    Attributes:
        covariance: "full", "tied", "diag" or "spherical".
        concentration: :math:`\alpha`, shape (K,).
        mean: :math:`m`, shape (K, D).
        mean_precision: :math:`\kappa`, shape (K,).
        degrees_of_freedom: :math:`\nu`, shape (K,), or () for "tied"; for "diag" and "spherical" those of a variance.
        root: square root of :math:`\Psi`: Cholesky factors (K, D, D) or (D, D), or roots of the sums of squares (K, D)
            or (K,).
    """

    covariance: Covariance
    concentration: Tensor
    mean: Tensor
    mean_precision: Tensor
    degrees_of_freedom: Tensor
    root: Tensor

    @property
    def num_components(self) -> int:
        """K."""
        return self.mean.shape[0]

    @property
    def num_features(self) -> int:
        """D."""
        return self.mean.shape[1]

    @property
    def is_matrix(self) -> bool:
        """Whether the covariances are matrices and not variances."""
        return self.covariance in ("full", "tied")

    @property
    def scale(self) -> Tensor:
        r"""Root of :math:`\Psi / \nu`, the inverse of the mean precision; shaped as in `mixture_densities`."""
        return self.root / _beside(self.degrees_of_freedom, self.root).sqrt()


def _beside(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers (K,) or () with dims of size one on the right, to go with (K, ...) or (D, D)."""
    return numbers.reshape(numbers.shape + (1,) * (like.dim() - numbers.dim()))


def expected_log_weights(q: ConjugateFactors) -> Tensor:
    r""":math:`E_q[\log \pi_k] = \psi(\alpha_k) - \psi(\sum_j \alpha_j)`, shape (K,)."""
    return q.concentration.digamma() - q.concentration.sum(-1, keepdim=True).digamma()


def _digammas(q: ConjugateFactors) -> Tensor:
    r""":math:`E_q[\log |\Sigma^{-1}|]` less the log determinant of the root's inverse square; (K,), () or (K, 1).

    One variance is a matrix of one feature.
    """
    half = q.degrees_of_freedom / 2
    if not q.is_matrix:
        return half.digamma() + math.log(2)
    halves = half.unsqueeze(-1) - torch.arange(q.num_features, dtype=half.dtype, device=half.device) / 2
    return (halves.digamma() + math.log(2)).sum(-1)


def expected_log_joint(x: Tensor, q: ConjugateFactors) -> Tensor:
    r""":math:`E_q[\log \pi_k + \log \mathcal{N}(x_i \mid \mu_k, \Sigma_k)]`, shape (n, K); keeps gradients.

    Its softmax over k is the optimal q of the label.

    Args:
        x: data, shape (n, D).
        q: of the parameters.
    """
    # The density at the mean precision, and what it overstates: the log of a mean is not the mean of the log.
    features = q.num_features
    at_mean = mixture_log_joint(x, torch.ones_like(q.concentration), q.mean, q.scale, q.covariance)
    log_degrees = q.degrees_of_freedom.log()
    overstated = _digammas(q) - features * log_degrees if q.is_matrix else features * (_digammas(q) - log_degrees)
    return at_mean + expected_log_weights(q) + 0.5 * (overstated - features / q.mean_precision)


def absorb(prior: ConjugateFactors, data: Moments) -> ConjugateFactors:
    """The conjugate update: q of the parameters given responsibilities, exactly.

    Args:
        prior: of the parameters.
        data: counts, means and scatter with these responsibilities.

    Raises:
        ValueError: if the scale matrix is lost in the rounding of the data's own.
    """
    kappa = prior.mean_precision + data.counts
    shift = data.means - prior.mean
    pulled = prior.mean_precision * data.counts / kappa  # how many data's worth the prior pulls at each mean
    features = prior.num_features
    if prior.is_matrix:
        pull = pulled[:, None, None] * shift.unsqueeze(-1) * shift.unsqueeze(-2)
        added = data.scatter + (pull if prior.covariance == "full" else pull.sum(0))
        root, info = torch.linalg.cholesky_ex(prior.root @ prior.root.mT + added)
        if bool((info != 0).any()):
            raise ValueError(
                "a component's scale matrix is not positive definite: the prior's scale_matrix is smaller than the "
                "rounding of the data's squares. Give it a wider scale_matrix, or leave out features that repeat others"
            )
        gained = data.counts if prior.covariance == "full" else data.counts.sum()
    else:
        pull = pulled.unsqueeze(-1) * shift.square()
        added = data.scatter + (pull if prior.covariance == "diag" else pull.sum(-1))
        root = (prior.root.square() + added).sqrt()
        gained = data.counts if prior.covariance == "diag" else features * data.counts
    return ConjugateFactors(
        prior.covariance,
        concentration=prior.concentration + data.counts,
        mean=prior.mean + (data.counts / kappa).unsqueeze(-1) * shift,
        mean_precision=kappa,
        degrees_of_freedom=prior.degrees_of_freedom + gained,
        root=root,
    )


def divergences(q: ConjugateFactors, prior: ConjugateFactors) -> tuple[Tensor, Tensor, Tensor]:
    """KL(q || prior) of the weights, of the covariances, and of the means given the covariances; nats, shape ()."""
    weights = torch.distributions.kl_divergence(
        torch.distributions.Dirichlet(q.concentration, validate_args=False),
        torch.distributions.Dirichlet(prior.concentration, validate_args=False),
    )
    return weights, _covariance_divergence(q, prior), _mean_divergence(q, prior)


def _covariance_divergence(q: ConjugateFactors, prior: ConjugateFactors) -> Tensor:
    r"""Between inverse Wisharts, as between the Wisharts of the precisions."""
    features = q.num_features if q.is_matrix else 1
    nu, nu_prior = q.degrees_of_freedom, prior.degrees_of_freedom
    if q.is_matrix:
        log_ratio = 2 * (_log_diagonal(q.root) - _log_diagonal(prior.root))  # log |Psi_q| - log |Psi_p|
        trace = torch.linalg.solve_triangular(q.root, prior.root, upper=False).square().sum((-2, -1))
        digammas = _digammas(q)
    else:
        nu, nu_prior = _beside(nu, q.root), _beside(nu_prior, q.root)
        log_ratio = 2 * (q.root.log() - prior.root.log())
        trace = (prior.root / q.root).square()
        digammas = _beside(_digammas(q), q.root)
    log_gammas = torch.special.multigammaln(nu_prior / 2, features) - torch.special.multigammaln(nu / 2, features)
    normalisers = 0.5 * nu_prior * log_ratio - 0.5 * (nu - nu_prior) * features * math.log(2) + log_gammas
    each: Tensor = normalisers + 0.5 * (nu - nu_prior) * digammas + 0.5 * nu * (trace - features)
    return each.sum()


def _mean_divergence(q: ConjugateFactors, prior: ConjugateFactors) -> Tensor:
    shift = q.mean - prior.mean
    if q.is_matrix:
        scale = q.scale if q.covariance == "full" else q.scale.expand(q.num_components, *q.scale.shape)
        whitened = torch.linalg.solve_triangular(scale, shift.unsqueeze(-1), upper=False).squeeze(-1)
    else:
        whitened = shift / _beside(q.scale, shift)
    ratio = prior.mean_precision / q.mean_precision
    per_component: Tensor = q.num_features * (ratio - 1 - ratio.log()) + prior.mean_precision * whitened.square().sum(
        -1
    )
    return 0.5 * per_component.sum()


def _log_diagonal(root: Tensor) -> Tensor:
    return root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
