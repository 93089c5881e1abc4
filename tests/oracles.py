"""Closed forms, written with numpy, scipy and scikit-learn alone: what the library is measured against."""

from __future__ import annotations

import numpy as np
import scipy.special
import scipy.stats

# --- linear-Gaussian models: PPCA and factor analysis -------------------------------------------------------------


def linear_gaussian_log_density(x: np.ndarray, loadings: np.ndarray, mean: np.ndarray, psi: np.ndarray) -> np.ndarray:
    """Log density of rows x (n, D) under N(mean, W W^T + diag(psi)); psi are variances, (D,) or a number."""
    covariance = loadings @ loadings.T + np.diag(np.broadcast_to(psi, mean.shape))
    return scipy.stats.multivariate_normal(mean, covariance).logpdf(x)


def linear_gaussian_posterior(
    x: np.ndarray, loadings: np.ndarray, mean: np.ndarray, psi: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Means (n, L) and covariance (L, L) of z given x, by conditioning the joint normal of (z, x) on x."""
    covariance = loadings @ loadings.T + np.diag(np.broadcast_to(psi, mean.shape))
    gain = loadings.T @ np.linalg.inv(covariance)
    return (x - mean) @ gain.T, np.eye(loadings.shape[1]) - gain @ loadings


def linear_gaussian_elbo(
    x: np.ndarray, loadings: np.ndarray, mean: np.ndarray, psi: np.ndarray, loc: np.ndarray, covariance: np.ndarray
) -> np.ndarray:
    """ELBO per row (n,) for q(z) = N(loc_n, covariance): E log p(x|z) + E log p(z) + entropy, each term by hand."""
    psi = np.broadcast_to(psi, mean.shape)
    residual = x - mean - loc @ loadings.T
    spread = np.diag(loadings @ covariance @ loadings.T)
    expected_likelihood = -0.5 * (np.log(2 * np.pi * psi) + (residual**2 + spread) / psi).sum(-1)
    expected_prior = -0.5 * (np.log(2 * np.pi) * loc.shape[1] + (loc**2).sum(-1) + np.trace(covariance))
    entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance)[1]
    return expected_likelihood + expected_prior + entropy


def gaussian_kl(
    loc: np.ndarray, covariance: np.ndarray, other_loc: np.ndarray, other_covariance: np.ndarray
) -> np.ndarray:
    """KL(N(loc_n, covariance) || N(other_loc_n, other_covariance)) for every row n, shape (n,)."""
    precision = np.linalg.inv(other_covariance)
    shift = other_loc - loc
    log_volumes = np.linalg.slogdet(other_covariance)[1] - np.linalg.slogdet(covariance)[1]
    square = np.einsum("nl,lk,nk->n", shift, precision, shift)
    return 0.5 * (np.trace(precision @ covariance) - loc.shape[1] + log_volumes + square)


def ppca_maximum(x: np.ndarray, latent_dim: int) -> tuple[float, float]:
    """Maximum of PPCA's log-likelihood over all rows, and the noise variance there (Tipping & Bishop, 1999, eq. 8)."""
    n, d = x.shape
    eigenvalues = np.zeros(d)
    singular_values = np.linalg.svd(x - x.mean(0), compute_uv=False)  # eigvalsh of the covariance loses the small ones
    eigenvalues[: len(singular_values)] = singular_values**2 / n
    noise = eigenvalues[latent_dim:].mean()
    log_determinant = np.log(eigenvalues[:latent_dim]).sum() + (d - latent_dim) * np.log(noise)
    return float(-0.5 * n * (d * np.log(2 * np.pi) + log_determinant + d)), float(noise)


def factor_analysis_maximum(x: np.ndarray, latent_dim: int) -> float:
    """Factor analysis' log-likelihood over all rows where scikit-learn's EM ends."""
    from sklearn.decomposition import FactorAnalysis

    oracle = FactorAnalysis(latent_dim, tol=1e-8, max_iter=50_000, svd_method="lapack").fit(x)
    return float(oracle.score(x) * len(x))


# --- likelihoods -------------------------------------------------------------------------------------------------


def bernoulli_logpmf(x: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Log probability of bits; written with log_expit, since scipy's bernoulli.logpmf takes a probability."""
    return np.where(x == 1, scipy.special.log_expit(logits), scipy.special.log_expit(-logits))


def continuous_bernoulli_logpdf(x: np.ndarray, natural: np.ndarray) -> np.ndarray:
    """Log density on [0, 1] proportional to exp(natural x): a truncated exponential, seen from the favoured end."""
    x, natural = np.broadcast_arrays(np.asarray(x, float), np.asarray(natural, float))
    rate = np.where(natural == 0, 1.0, np.abs(natural))
    from_end = np.where(natural > 0, 1 - x, x)
    return np.where(natural == 0, 0.0, scipy.stats.truncexpon.logpdf(from_end, b=rate, scale=1 / rate))


def categorical_logpmf(x: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Log probability of integers x, shape (...), under logits, shape (..., number of categories)."""
    log_probabilities = scipy.special.log_softmax(logits, axis=-1)
    places = np.broadcast_to(x.astype(int), logits.shape[:-1])[..., None]
    return np.take_along_axis(log_probabilities, places, axis=-1)[..., 0]


def softplus(raw: np.ndarray) -> np.ndarray:
    """log(1 + exp(raw)) without overflow."""
    return np.logaddexp(0.0, raw)


# ---------------------------------------------------------------------------------------------- amortised programs


def vae_bound_of_one_draw(
    x: np.ndarray, z: np.ndarray, loc: np.ndarray, scale: np.ndarray, logits: np.ndarray
) -> float:
    """log p(x | z) + log p(z) - log q(z | x), summed over rows, for a Bernoulli VAE; x (n, D), z, loc, scale (n, L)."""
    log_likelihood = -np.logaddexp(0.0, np.where(x == 1, -logits, logits)).sum()
    log_prior = scipy.stats.norm.logpdf(z).sum()
    return float(log_likelihood + log_prior - scipy.stats.norm.logpdf(z, loc, scale).sum())


def ppca_log_density(x: np.ndarray, loadings: np.ndarray, mean: np.ndarray, noise_scale: float) -> np.ndarray:
    """log N(x; mean, W W' + s^2 I) of each row of x (n, D)."""
    covariance = loadings @ loadings.T + noise_scale**2 * np.eye(len(mean))
    return np.asarray(scipy.stats.multivariate_normal(mean, covariance).logpdf(x))


def mixture_of_labels_log_evidence(log_joint: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """log sum_y int p(x, y, z) dz by quadrature: log_joint (classes, nodes, n) at nodes with ``weights`` (nodes,)."""
    shifted = log_joint + np.log(weights)[None, :, None]
    peak = shifted.max((0, 1))
    return np.asarray(np.log(np.exp(shifted - peak).sum((0, 1))) + peak)


# --- bounds and evidence -----------------------------------------------------------------------------------------


def normal_logpdf(x: np.ndarray, loc: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Log density of every entry."""
    return scipy.stats.norm.logpdf(x, loc, scale)


def normal_kl(loc: np.ndarray, scale: np.ndarray, other_loc: np.ndarray, other_scale: np.ndarray) -> np.ndarray:
    """KL(N(loc, scale) || N(other_loc, other_scale)) of every entry."""
    ratio = (scale / other_scale) ** 2
    return 0.5 * (ratio + ((loc - other_loc) / other_scale) ** 2 - 1 - np.log(ratio))


def conjugate_normal_evidence(x: np.ndarray, prior_loc: float, prior_scale: float, scale: float) -> float:
    """Log p(x_1, ..., x_n) where x_i ~ N(m, scale) and m ~ N(prior_loc, prior_scale): one correlated normal."""
    covariance = scale**2 * np.eye(len(x)) + prior_scale**2
    return float(scipy.stats.multivariate_normal(np.full(len(x), prior_loc), covariance).logpdf(x))


def conjugate_normal_posterior(
    x: np.ndarray, prior_loc: float, prior_scale: float, scale: float
) -> tuple[float, float]:
    """Location and scale of p(m | x_1, ..., x_n) in the same model."""
    precision = 1 / prior_scale**2 + len(x) / scale**2
    return (prior_loc / prior_scale**2 + x.sum() / scale**2) / precision, precision**-0.5


def mixture_log_joint(x: np.ndarray, weights: np.ndarray, locs: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Log p(x_i, k) of a mixture of normals on the line, shape (n, K)."""
    return np.log(weights) + scipy.stats.norm.logpdf(x[:, None], locs, scales)


def log_integral(log_values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Log of the integral over the last axis by the trapezoidal rule, which is all but exact for smooth bumps."""
    weights = np.gradient(grid)
    weights[[0, -1]] /= 2
    return scipy.special.logsumexp(log_values, axis=-1, b=weights)


# --- fitting: Adam and the likelihood of a small mixture, by hand -------------------------------------------------


def two_normals(x: np.ndarray, logit: float, locs: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean negative log-likelihood of x (n,) under (1-p) N(m0, 1) + p N(m1, 1), and its gradient by (logit, m0, m1)."""
    p = scipy.special.expit(logit)
    joint = np.log([1 - p, p]) + scipy.stats.norm.logpdf(x[:, None], locs, 1.0)
    evidence = scipy.special.logsumexp(joint, axis=1)
    responsibility = np.exp(joint - evidence[:, None])
    by_logit = responsibility[:, 1] - p
    by_locs = responsibility * (x[:, None] - locs)
    return float(-evidence.mean()), -np.concatenate([[by_logit.mean()], by_locs.mean(0)])


def adam_on_two_normals(x: np.ndarray, start: np.ndarray, lr: float, steps: int) -> tuple[list[float], np.ndarray]:
    """Losses before each step and the parameters (logit, m0, m1) after the last, Adam with its usual constants."""
    theta, first, second, losses = start.astype(float).copy(), np.zeros(3), np.zeros(3), []
    for t in range(1, steps + 1):
        loss, gradient = two_normals(x, theta[0], theta[1:])
        losses.append(loss)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        theta = theta - lr * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
    return losses, theta


def normal_normal_evidence(x: np.ndarray, prior_scale: float, scale: float) -> float:
    """log p(x) of n data N(m, scale^2) with m ~ N(0, prior_scale^2), summed over the data set."""
    n = len(x)
    covariance = scale**2 * np.eye(n) + prior_scale**2
    return float(scipy.stats.multivariate_normal(np.zeros(n), covariance).logpdf(x))


# --- Gaussian mixtures and their conjugate prior -----------------------------------------------------------------


def gaussian_mixture_matrices(covariances: np.ndarray, kind: str, num_components: int, d: int) -> np.ndarray:
    """Covariances in scikit-learn's four shapes as K matrices, (K, D, D)."""
    expand = {
        "full": lambda: covariances,
        "tied": lambda: np.repeat(covariances[None], num_components, axis=0),
        "diag": lambda: np.stack([np.diag(row) for row in covariances]),
        "spherical": lambda: np.stack([v * np.eye(d) for v in covariances]),
    }
    return expand[kind]()


def gaussian_mixture_log_joint(
    x: np.ndarray, weights: np.ndarray, locs: np.ndarray, covariances: np.ndarray, kind: str
) -> np.ndarray:
    """Log p(x_i, k), shape (n, K), one scipy normal per component."""
    matrices = gaussian_mixture_matrices(covariances, kind, len(weights), x.shape[1])
    columns = [
        np.log(w) + scipy.stats.multivariate_normal(m, c).logpdf(x).reshape(-1)
        for w, m, c in zip(weights, locs, matrices, strict=True)
    ]
    return np.stack(columns, axis=-1)


def gaussian_mixture_scikit_learn(weights: np.ndarray, locs: np.ndarray, covariances: np.ndarray, kind: str) -> object:
    """scikit-learn's mixture with these parameters, as if it had been fitted."""
    from sklearn.mixture import GaussianMixture

    precisions = np.linalg.inv(covariances) if kind in ("full", "tied") else 1 / covariances
    mixture = GaussianMixture(len(weights), covariance_type=kind)
    mixture.weights_, mixture.means_, mixture.covariances_ = weights, locs, covariances
    if kind in ("full", "tied"):
        mixture.precisions_cholesky_ = np.linalg.cholesky(precisions)
    else:
        mixture.precisions_cholesky_ = np.sqrt(precisions)
    return mixture


def inverse_wishart_cholesky_log_density(factor: np.ndarray, degrees: float, psi: np.ndarray) -> float:
    """Log density of the Cholesky factor of Sigma ~ IW(degrees, psi); the Jacobian by finite differences."""
    d = len(psi)
    below = np.tril_indices(d)

    def free_entries(entries: np.ndarray) -> np.ndarray:
        matrix = np.zeros((d, d))
        matrix[below] = entries
        return (matrix @ matrix.T)[below]

    at, step = factor[below], 1e-6
    moved = [free_entries(at + step * e) - free_entries(at - step * e) for e in np.eye(len(at))]
    log_jacobian = np.linalg.slogdet(np.stack(moved) / (2 * step))[1]
    return float(scipy.stats.invwishart(degrees, psi).logpdf(factor @ factor.T) + log_jacobian)


def deviation_log_density(deviation: np.ndarray, degrees: float, psi: np.ndarray) -> np.ndarray:
    """Log density of sigma where sigma^2 ~ InverseGamma(degrees / 2, psi / 2)."""
    return scipy.stats.invgamma(degrees / 2, scale=psi / 2).logpdf(deviation**2) + np.log(2 * deviation)


def normal_inverse_wishart_update(
    x: np.ndarray, mean: np.ndarray, kappa: float, degrees: float, psi: np.ndarray
) -> tuple[np.ndarray, float, float, np.ndarray]:
    """Posterior (mean, kappa, degrees, psi) of one Gaussian's NIW prior (Murphy, 2012, section 4.6.3.3)."""
    n, average = len(x), x.mean(0)
    scatter = (x - average).T @ (x - average)
    shift = np.outer(average - mean, average - mean)
    return (
        (kappa * mean + n * average) / (kappa + n),
        kappa + n,
        degrees + n,
        psi + scatter + kappa * n / (kappa + n) * shift,
    )


def normal_inverse_wishart_evidence(
    x: np.ndarray, mean: np.ndarray, kappa: float, degrees: float, psi: np.ndarray
) -> float:
    """Log p(x) of all rows, mean and covariance integrated out (Murphy, 2012, eq. 5.30)."""
    n, d = x.shape
    _, kappa_n, degrees_n, psi_n = normal_inverse_wishart_update(x, mean, kappa, degrees, psi)
    log_gamma = scipy.special.multigammaln(degrees_n / 2, d) - scipy.special.multigammaln(degrees / 2, d)
    log_dets = degrees * np.linalg.slogdet(psi)[1] - degrees_n * np.linalg.slogdet(psi_n)[1]
    return float(-n * d / 2 * np.log(np.pi) + log_gamma + 0.5 * log_dets + d / 2 * np.log(kappa / kappa_n))


# --- expectation maximisation and missing values -------------------------------------------------------------------


def scikit_learn_em(x: np.ndarray, responsibilities: np.ndarray, kind: str, num_steps: int) -> tuple[object, float]:
    """scikit-learn's mixture after `num_steps` M-steps from these responsibilities, floor off, and its log p(x)."""
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(responsibilities.shape[1], covariance_type=kind, reg_covar=0.0)
    mixture._initialize(x, responsibilities)
    for _ in range(num_steps - 1):
        _, log_responsibilities = mixture._e_step(x)
        mixture._m_step(x, log_responsibilities)
    return mixture, float(mixture.score_samples(x).sum())


def mixture_kl_to_posterior(before: np.ndarray, after: np.ndarray) -> float:
    """KL(q || p(k | x)) summed over rows, q being the softmax of log joints `before`, p of `after`; (n, K) each."""
    log_q, log_p = (scipy.special.log_softmax(log_joint, axis=1) for log_joint in (before, after))
    return float((np.exp(log_q) * (log_q - log_p)).sum())


def mixture_log_prior(
    weights: np.ndarray,
    locs: np.ndarray,
    covariances: np.ndarray,
    kind: str,
    concentration: float,
    prior: tuple[np.ndarray, float, float, np.ndarray],
) -> float:
    """Log density of weights, means and covariances under (mean, kappa, degrees, psi) and a Dirichlet."""
    mean, kappa, degrees, psi = prior
    k, d = locs.shape
    total = scipy.stats.dirichlet(np.full(k, concentration)).logpdf(weights)
    matrices = gaussian_mixture_matrices(covariances, kind, k, d)
    for loc, matrix in zip(locs, matrices, strict=True):
        total += scipy.stats.multivariate_normal(mean, matrix / kappa).logpdf(loc)
    if kind in ("full", "tied"):
        distinct = matrices if kind == "full" else matrices[:1]
        return float(total + sum(scipy.stats.invwishart(degrees, psi).logpdf(matrix) for matrix in distinct))
    shape, scale = (degrees - d + 1) / 2, np.diag(psi) if kind == "diag" else np.diag(psi).mean()
    return float(total + scipy.stats.invgamma(shape, scale=scale / 2).logpdf(covariances).sum())


def normal_of_observed(x: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Log density of what is not NaN in each row, shape (n,)."""
    found = np.zeros(len(x))
    for i, row in enumerate(x):
        seen = ~np.isnan(row)
        if seen.any():
            marginal = scipy.stats.multivariate_normal(mean[seen], covariance[np.ix_(seen, seen)])
            found[i] = marginal.logpdf(row[seen])
    return found


def conditional_normal(row: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of what is NaN in one row given the rest."""
    gone = np.isnan(row)
    regression = covariance[np.ix_(gone, ~gone)] @ np.linalg.inv(covariance[np.ix_(~gone, ~gone)])
    conditional = mean[gone] + regression @ (row[~gone] - mean[~gone])
    return conditional, covariance[np.ix_(gone, gone)] - regression @ covariance[np.ix_(~gone, gone)]


def lloyd(x: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, float]:
    """scikit-learn's K-means from these means: centres and inertia."""
    from sklearn.cluster import KMeans

    found = KMeans(len(means), init=means, n_init=1, tol=0.0, max_iter=1000, algorithm="lloyd").fit(x)
    return found.cluster_centers_, float(found.inertia_)


# ---------------------------------------------------------------------------------- Normal with mean and precision


def normal_gamma_posterior(x, loc, weight, shape, rate):
    """Posterior mean and variance of "loc" and "precision", whose prior is Normal-Gamma (Murphy 2007, section 3)."""
    n = len(x)
    weight_n, shape_n = weight + n, shape + n / 2
    loc_n = (weight * loc + x.sum()) / weight_n
    rate_n = rate + 0.5 * ((x - x.mean()) ** 2).sum() + 0.5 * weight * n * (x.mean() - loc) ** 2 / weight_n
    of_loc = scipy.stats.t(2 * shape_n, loc_n, np.sqrt(rate_n / (shape_n * weight_n)))
    of_precision = scipy.stats.gamma(shape_n, scale=1 / rate_n)
    return {"loc": of_loc.stats("mv"), "precision": of_precision.stats("mv")}
