"""Closed forms, written with numpy, scipy and scikit-learn alone: what the library is measured against."""

from __future__ import annotations

from collections.abc import Callable

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


# --- coordinate ascent: the variational Gaussian mixture ----------------------------------------------------------


def variational_mixture_bound(
    x: np.ndarray,
    responsibilities: np.ndarray,
    q: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    prior: tuple[np.ndarray, np.ndarray, float, float, np.ndarray],
) -> float:
    """The bound of a mixture with full covariances, term by term as in Bishop (2006), equations 10.70 to 10.77.

    ``q`` is alpha (K,), m (K, D), beta (K,), nu (K,) and the inverses of W (K, D, D); ``prior`` the same without K.
    """
    alpha, m, beta, nu, inverse_w = q
    alpha0, m0, beta0, nu0, inverse_w0 = prior
    k, d = m.shape
    w = np.linalg.inv(inverse_w)
    counts = responsibilities.sum(0)
    log_pi = scipy.special.digamma(alpha) - scipy.special.digamma(alpha.sum())
    halves = (nu[:, None] - np.arange(d)) / 2
    log_lambda = scipy.special.digamma(halves).sum(1) + d * np.log(2) + np.linalg.slogdet(w)[1]

    def log_b(inverse: np.ndarray, degrees: float) -> float:
        half = degrees / 2
        return float(half * np.linalg.slogdet(inverse)[1] - half * d * np.log(2) - scipy.special.multigammaln(half, d))

    likelihood = prior_of_theta = entropy_of_theta = 0.0
    for j in range(k):
        deviation = x - m[j]
        squares = np.einsum("nd,de,ne->n", deviation, w[j], deviation)
        per_row = log_lambda[j] - d / beta[j] - nu[j] * squares - d * np.log(2 * np.pi)
        likelihood += 0.5 * (responsibilities[:, j] * per_row).sum()
        shift = m[j] - m0
        prior_of_theta += 0.5 * (d * np.log(beta0 / (2 * np.pi)) + log_lambda[j] - d * beta0 / beta[j])
        prior_of_theta -= 0.5 * beta0 * nu[j] * shift @ w[j] @ shift
        prior_of_theta += log_b(inverse_w0, nu0) + 0.5 * (nu0 - d - 1) * log_lambda[j]
        prior_of_theta -= 0.5 * nu[j] * np.trace(inverse_w0 @ w[j])
        entropy_of_lambda = -log_b(inverse_w[j], nu[j]) - 0.5 * (nu[j] - d - 1) * log_lambda[j] + 0.5 * nu[j] * d
        entropy_of_theta -= 0.5 * log_lambda[j] + 0.5 * d * np.log(beta[j] / (2 * np.pi)) - 0.5 * d - entropy_of_lambda
    labels = counts @ log_pi - scipy.special.xlogy(responsibilities, responsibilities).sum()

    def log_dirichlet(concentration: np.ndarray) -> float:
        norm = scipy.special.gammaln(concentration.sum()) - scipy.special.gammaln(concentration).sum()
        return float(norm + (concentration - 1) @ log_pi)

    return float(likelihood + labels + log_dirichlet(alpha0) - log_dirichlet(alpha) + prior_of_theta + entropy_of_theta)


def variational_mixture_scikit_learn(
    x: np.ndarray,
    responsibilities: np.ndarray,
    rounds: int,
    kind: str,
    prior: tuple[float, np.ndarray, float, float, np.ndarray | float],
) -> tuple[object, np.ndarray]:
    """scikit-learn's variational mixture after ``rounds`` from responsibilities, and the last log responsibilities.

    ``prior`` is the concentration, the mean, its precision, the degrees of freedom, and the scale matrix (full, tied),
    its diagonal (diag) or one number (spherical).
    """
    from sklearn.mixture import BayesianGaussianMixture

    concentration, mean, precision, degrees, scale = prior
    mixture = BayesianGaussianMixture(
        n_components=responsibilities.shape[1],
        covariance_type=kind,
        reg_covar=0,
        weight_concentration_prior_type="dirichlet_distribution",
        weight_concentration_prior=concentration,
        mean_prior=mean,
        mean_precision_prior=precision,
        degrees_of_freedom_prior=degrees,
        covariance_prior=scale,
    )
    mixture._check_parameters(x)
    mixture._initialize(x, responsibilities)
    for _ in range(rounds):
        mixture._m_step(x, mixture._e_step(x)[1])
    return mixture, mixture._e_step(x)[1]


def normal_inverse_gamma_evidence(x: np.ndarray, mean: float, kappa: float, degrees: float, psi: float) -> float:
    """Log p(x_1, ..., x_n) of one feature, x_i ~ N(m, s), m ~ N(mean, s / kappa), s ~ InverseGamma(degrees/2, psi/2).

    One datum after the other, each from the Student t that the data before it predict.
    """
    total = 0.0
    for value in x:
        scale = np.sqrt(psi * (kappa + 1) / (degrees * kappa))
        total += scipy.stats.t(degrees, mean, scale).logpdf(value)
        psi += kappa / (kappa + 1) * (value - mean) ** 2
        mean = (kappa * mean + value) / (kappa + 1)
        kappa, degrees = kappa + 1, degrees + 1
    return float(total)


# --- coordinate ascent: Bayesian PPCA ------------------------------------------------------------------------------


def bayesian_ppca_rounds(
    u: np.ndarray, loadings: np.ndarray, noise: float, rounds: int, shape: float, rate: float, beta: float
) -> tuple[dict[str, np.ndarray], float]:
    """Bishop's variational principal components (1999), row by row, from given loadings; q and its bound.

    The start: loadings known up to noise / n, the mean at the data's, the noise variance as given, relevances at their
    best. Rounds go through factors, mean, loadings, relevances, noise. The bound is E[log p] plus scipy's entropies.
    """
    (n, d), k = u.shape, loadings.shape[1]
    w, w_cov, mu, mu_var = loadings, noise / n * np.eye(k), u.mean(0), 1 / (beta + n / noise)
    gamma = scipy.stats.gamma
    noise_shape, relevance_shape = shape + n * d / 2, shape + d / 2
    noise_rate = noise_shape * noise

    def factors() -> tuple[np.ndarray, np.ndarray]:
        tau = noise_shape / noise_rate
        cov = np.linalg.inv(np.eye(k) + tau * (w.T @ w + d * w_cov))
        return np.stack([tau * cov @ w.T @ (row - mu) for row in u]), cov

    def relevance_rates() -> np.ndarray:
        return np.array([rate + 0.5 * (w[:, j] @ w[:, j] + d * w_cov[j, j]) for j in range(k)])

    def residual(z: np.ndarray, z_cov: np.ndarray) -> float:
        w_square = w.T @ w + d * w_cov
        total = 0.0
        for row, factor in zip(u, z, strict=True):
            total += (row - mu) @ (row - mu) + d * mu_var - 2 * (row - mu) @ w @ factor
            total += np.trace(w_square @ (np.outer(factor, factor) + z_cov))
        return float(total)

    relevance_rate = relevance_rates()
    for _ in range(rounds):
        tau, alpha = noise_shape / noise_rate, relevance_shape / relevance_rate
        z, z_cov = factors()
        mu_var = 1 / (beta + n * tau)
        mu = mu_var * tau * (u - z @ w.T).sum(0)
        w_cov = np.linalg.inv(np.diag(alpha) + tau * (n * z_cov + z.T @ z))
        w = np.stack([tau * w_cov @ (z * (u[:, [j]] - mu[j])).sum(0) for j in range(d)])
        relevance_rate = relevance_rates()
        noise_rate = rate + 0.5 * residual(z, z_cov)
    z, z_cov = factors()
    tau, alpha = noise_shape / noise_rate, relevance_shape / relevance_rate
    log_tau = scipy.special.digamma(noise_shape) - np.log(noise_rate)
    log_alpha = scipy.special.digamma(relevance_shape) - np.log(relevance_rate)

    def log_gamma(mean: np.ndarray, log_mean: np.ndarray) -> float:
        return float(np.sum(shape * np.log(rate) - scipy.special.gammaln(shape) + (shape - 1) * log_mean - rate * mean))

    log2pi = np.log(2 * np.pi)
    bound = 0.5 * n * d * (log_tau - log2pi) - 0.5 * tau * residual(z, z_cov)
    bound += -0.5 * (n * k * log2pi + (z**2).sum() + n * np.trace(z_cov))
    bound += 0.5 * d * (log_alpha.sum() - k * log2pi) - 0.5 * (alpha * np.diag(w.T @ w + d * w_cov)).sum()
    bound += 0.5 * d * np.log(beta / (2 * np.pi)) - 0.5 * beta * (mu @ mu + d * mu_var)
    bound += log_gamma(alpha, log_alpha) + log_gamma(np.array(tau), np.array(log_tau))
    bound += n * scipy.stats.multivariate_normal(np.zeros(k), z_cov).entropy()
    bound += d * scipy.stats.multivariate_normal(np.zeros(k), w_cov).entropy()
    bound += d * scipy.stats.norm(0, np.sqrt(mu_var)).entropy()
    bound += gamma(relevance_shape, scale=1 / relevance_rate).entropy().sum()
    bound += gamma(noise_shape, scale=1 / noise_rate).entropy()
    q = {"loadings": w, "loadings_covariance": w_cov, "mean": mu, "mean_scale": np.sqrt(mu_var)}
    q |= {"relevance_rate": relevance_rate, "precision_rate": np.array(noise_rate)}
    return q, float(bound)


# --- evidence by other routes, and bits ---------------------------------------------------------------------------


def half_normal_evidence(x: np.ndarray, prior_scale: float, scale: float) -> np.ndarray:
    """Log of the integral over s > 0 of 2 N(s; 0, prior_scale) N(x; s, scale), for each x, shape (n,)."""
    precision = prior_scale**-2 + scale**-2
    loc = x / scale**2 / precision
    inside = scipy.stats.norm.logcdf(loc * np.sqrt(precision))
    return np.log(2) + scipy.stats.norm.logpdf(x, 0, np.hypot(prior_scale, scale)) + inside


def beta_bernoulli_evidence(counts: np.ndarray, trials: int, a: float, b: float) -> np.ndarray:
    """Log probability of a sequence of ``trials`` coin throws with ``counts`` heads, its bias from Beta(a, b)."""
    return scipy.special.betaln(a + counts, b + trials - counts) - scipy.special.betaln(a, b)


def categorical_kl(q: np.ndarray, p: np.ndarray) -> np.ndarray:
    """KL(q || p) of every row of probabilities, shape (n,)."""
    return scipy.special.rel_entr(q, p).sum(-1)


# ---- the importance-weighted bound of a program with one Normal latent for each datum


def importance_weighted_bound(
    x: np.ndarray, theta: float, loc: np.ndarray, scale: float, num_particles: int, nodes: int = 60
) -> np.ndarray:
    """E_q[log mean_k w_k] of each datum for z ~ N(theta, 1), x | z ~ N(z, 1/2^2), q(z | x) = N(loc, scale^2).

    By Gauss-Hermite quadrature over all particles; ``nodes`` ** ``num_particles`` points.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / weights.sum()
    z = loc[:, None] + scale * points
    log_w = (
        scipy.stats.norm.logpdf(z, theta, 1.0)
        + scipy.stats.norm.logpdf(x[:, None], z, 0.5)
        - scipy.stats.norm.logpdf(z, loc[:, None], scale)
    )
    grids = np.meshgrid(*[np.arange(nodes)] * num_particles, indexing="ij")
    chosen = np.stack([log_w[:, grid.ravel()] for grid in grids])  # (K, n, points)
    joint = np.prod([weights[grid.ravel()] for grid in grids], axis=0)
    return (scipy.special.logsumexp(chosen, axis=0) - np.log(num_particles)) @ joint


def central_difference(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """The gradient of ``function`` at a vector."""
    steps = step * np.eye(len(at))
    return np.array([(function(at + h) - function(at - h)) / (2 * step) for h in steps])


# --- weighted bounds ---------------------------------------------------------------------------------------------


def linear_gaussian_bound_parts(
    x: np.ndarray, loadings: np.ndarray, mean: np.ndarray, noise_scale: float, loc: np.ndarray, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """E_q[log N(x; W z + mean, noise^2 I)] (n,) and KL(q || N(0, I)) (n, L) under q = N(loc, diag scale^2), (n, L)."""
    residual = x - loc @ loadings.T - mean
    spread = (scale**2) @ (loadings**2).T  # the variance that z's spread gives to each feature
    density = -0.5 * np.log(2 * np.pi * noise_scale**2) - 0.5 * (residual**2 + spread) / noise_scale**2
    return density.sum(-1), normal_kl(loc, scale, np.zeros(1), np.ones(1))


def codewords_log_density(x: np.ndarray, codewords: np.ndarray, flip: float) -> np.ndarray:
    """Log p of rows of bits (n, D): one of the codewords (K, D), all alike, each bit flipped with chance ``flip``."""
    wrong = (x[:, None] != codewords[None]).sum(-1)
    log_joint = wrong * np.log(flip) + (x.shape[1] - wrong) * np.log1p(-flip)
    return np.asarray(scipy.special.logsumexp(log_joint, axis=1) - np.log(len(codewords)))


# --- gradients of bounds, one datum --------------------------------------------------------------------------------


def categorical_bound(logits: np.ndarray, locs: np.ndarray, x: float) -> tuple[float, np.ndarray, np.ndarray]:
    """The bound of y uniform, x | y ~ N(locs[y], 1), q = softmax(logits), and its gradients in logits and locs."""
    q = scipy.special.softmax(logits)
    locs = np.asarray(locs)
    f = scipy.stats.norm(locs, 1.0).logpdf(x) - np.log(len(q)) - np.log(q)
    return float(q @ f), q * (f - q @ f), q * (x - locs)


def normal_bound(m: float, log_scale: float, w: float, x: float, noise: float) -> float:
    """The bound of z ~ N(0, 1), x | z ~ N(w z, noise), q = N(m, exp(log_scale))."""
    variance = np.exp(2 * log_scale)
    expected = -0.5 * ((x - w * m) ** 2 + w**2 * variance) / noise**2 - np.log(noise) - 0.5 * np.log(2 * np.pi)
    return float(expected - 0.5 * (variance + m**2 - 1) + log_scale)


def two_particle_bound(m: float, log_scale: float, w: float, x: float, noise: float, nodes: int = 80) -> float:
    """The importance-weighted bound with K = 2 of the same program, by Gauss-Hermite quadrature over both draws."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / weights.sum()
    z = m + np.exp(log_scale) * points
    log_w = scipy.stats.norm(0, 1).logpdf(z) + scipy.stats.norm(w * z, noise).logpdf(x)
    log_w -= scipy.stats.norm(m, np.exp(log_scale)).logpdf(z)
    pairs = np.logaddexp(log_w[:, None], log_w[None, :]) - np.log(2)
    return float(weights @ pairs @ weights)


def slopes(function: Callable[..., float], at: dict[str, float], step: float = 1e-5) -> dict[str, float]:
    """Central differences of a function of named numbers."""

    def moved(name: str, by: float) -> float:
        return function(**{**at, name: at[name] + by})

    return {name: (moved(name, step) - moved(name, -step)) / (2 * step) for name in at}


def posterior_moments(log_joint: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> tuple[float, float]:
    """Mean and standard deviation of a density on a line, known up to a factor, by a fine grid."""
    z = np.linspace(low, high, 20_001)
    p = scipy.special.softmax(log_joint(z))
    mean = float(p @ z)
    return mean, float(np.sqrt(p @ (z - mean) ** 2))


# --- gradients of a shared normal guide ----------------------------------------------------------------------------


def shared_normal_gradient(x: np.ndarray, a: float, s: float, b: float) -> dict[tuple[str, str], tuple[float, float]]:
    """Mean and variance of the gradient of the loss per datum, x_i ~ N(z_i + b, 1), z_i ~ N(0, 1), q(z_i) = N(a, s).

    One draw z_i = a + s e_i for each of n rows. "path": log q is sampled, "closed": its KL is in closed form.
    d/da of -log p(x|z) is z + b - x, of -log p(z) is z, of log q at a + s e nought; d/da of the KL is a.
    """
    n = len(x)
    return {
        ("a", "path"): (float((2 * a + b - x).mean()), 4 * s**2 / n),
        ("a", "closed"): (float((2 * a + b - x).mean()), s**2 / n),
        ("b", "path"): (float((a + b - x).mean()), s**2 / n),
        ("b", "closed"): (float((a + b - x).mean()), s**2 / n),
    }


# --- a guide's tails, units and information -------------------------------------------------------------------------


def normal_tail_index(guide_scale: float, target_scale: float) -> float:
    """Pareto index k of w = N(z; 0, t) / N(z; 0, s), z ~ N(0, s^2), for s < t.

    log w = a z^2 + c with a = (1 / s^2 - 1 / t^2) / 2, and P(z^2 > v) falls like exp(-v / 2 s^2), so that
    P(w > u) falls like u^(-1 / (2 a s^2)): k = 2 a s^2 = 1 - s^2 / t^2.
    """
    return 1 - (guide_scale / target_scale) ** 2


def ppca_unit_kl(variance: np.ndarray) -> np.ndarray:
    """Mean KL of each unit's posterior N(m, v) from N(0, 1) at the maximum of PPCA, where m has variance 1 - v."""
    return -0.5 * np.log(variance)


def normal_pair_distinctness(distance: float) -> float:
    """Jensen-Shannon divergence of N(0, 1) and N(distance, 1) over log 2, by quadrature."""
    from scipy.integrate import quad

    def integrand(x: float) -> float:
        p, q = scipy.stats.norm.pdf(x), scipy.stats.norm.pdf(x, distance)
        return float(0.5 * (scipy.special.rel_entr(p, (p + q) / 2) + scipy.special.rel_entr(q, (p + q) / 2)))

    return quad(integrand, -10, 10 + distance, limit=200)[0] / np.log(2)


def coverage_of_a_stretched_normal(level: float, stretch: float) -> float:
    """How often the central interval of N(m, (stretch s)^2) that claims ``level`` holds a draw of N(m, s^2)."""
    return float(2 * scipy.stats.norm.cdf(stretch * scipy.stats.norm.ppf(0.5 + level / 2)) - 1)
