"""Draws: their names and shapes, enumerated sites from the exact conditional, densities by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.ops.indexing import Vindex

import pyro_lvm as lvm
from pyro_lvm.criticism.predictive import draw_posterior, draw_prior, site_dims, site_shape
from pyro_lvm.evaluation import Evaluation
from pyro_lvm.posterior import Posterior

N, DRAWS = 4, 600
X = torch.tensor([-1.2, 0.1, 0.9, 2.5], dtype=torch.float64)
WEIGHTS, LOCS, SCALES = np.array([0.2, 0.5, 0.3]), np.array([-1.0, 0.0, 2.0]), np.array([0.5, 1.0, 0.7])
TRUTH = scipy.special.softmax(oracles.mixture_log_joint(X.numpy(), WEIGHTS, LOCS, SCALES), -1)


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def no_guide(*args: Any, size: int | None = None) -> None:
    pass


def mixture(x: torch.Tensor, size: int | None = None) -> None:
    with pyro.plate("data", size or len(x), subsample=x):
        k = pyro.sample("k", dist.Categorical(tensor(WEIGHTS)), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(tensor(LOCS)[k], tensor(SCALES)[k]), obs=x)


def draws_of(
    program: Any, x: Any, num_draws: int, predictive: bool = False
) -> tuple[Posterior, dict[str, torch.Tensor]]:
    evaluation = Evaluation.of(program, x)
    with evaluation.running(0):
        return draw_posterior(evaluation, num_draws, predictive)


def test_an_enumerated_site_is_drawn_from_its_exact_conditional():
    posterior, _ = draws_of((mixture, no_guide), X, DRAWS)
    counts = np.stack([np.bincount(posterior["k"][:, i].numpy(), minlength=3) for i in range(N)])
    for i in range(N):
        assert np.all(np.abs(counts[i] / DRAWS - TRUTH[i]) < 4 * np.sqrt(TRUTH[i] * (1 - TRUTH[i]) / DRAWS) + 1e-12)
    assert scipy.stats.chisquare(counts.sum(0), counts.sum() * TRUTH.mean(0)).pvalue > 1e-3
    for i in (0, 2, 3):  # and not from its prior, which says another thing of these rows
        assert scipy.stats.chisquare(counts[i], WEIGHTS * DRAWS).pvalue < 1e-6


def test_log_densities_by_hand():
    posterior, _ = draws_of((mixture, no_guide), X, 20)
    k = posterior["k"].numpy()
    joint = oracles.mixture_log_joint(X.numpy(), WEIGHTS, LOCS, SCALES)
    assert posterior.log_p.numpy() == pytest.approx(joint[np.arange(N), k].sum(-1), rel=1e-10)
    assert posterior.log_q.numpy() == pytest.approx(np.log(TRUTH)[np.arange(N), k].sum(-1), rel=1e-10)


@pytest.mark.parametrize("rows", [1, N])
@pytest.mark.parametrize("components", [1, 3])
def test_one_row_or_one_component(rows, components):
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            weights = tensor(WEIGHTS[:components])
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(tensor(LOCS)[k], 1.0), obs=x)

    posterior, predicted = draws_of((model, no_guide), X[:rows], 3, predictive=True)
    assert posterior["k"].shape == predicted["x"].shape == (3, rows)


class Views:
    """Labels of data, labels of their measurements that depend on them, and a label that all share."""

    shared = np.array([0.7, 0.3])
    table = np.array([[0.9, 0.1], [0.3, 0.7]])

    def model(self, x: torch.Tensor, size: int | None = None) -> None:
        g = pyro.sample("g", dist.Categorical(tensor(self.shared)), infer={"enumerate": "parallel"})
        with pyro.plate("data", size or len(x), subsample=x, dim=-1):
            k = pyro.sample("k", dist.Categorical(Vindex(tensor(self.table))[g]), infer={"enumerate": "parallel"})
            with pyro.plate("views", 2, dim=-3):
                j = pyro.sample("j", dist.Bernoulli(0.2 + 0.5 * k.to(x)), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(2.0 * j - g.to(x), 0.8), obs=x.T.unsqueeze(-2))

    def guide(self, x: torch.Tensor, size: int | None = None) -> None:
        pass

    def log_joint(self, x: np.ndarray) -> np.ndarray:
        """Log p(x, g, k_1, k_2, j) of two data with two views each, one axis per label."""
        labels = np.indices((2,) * 7)
        g, k, j = labels[0], labels[1:3], labels[3:].reshape(2, 2, *labels.shape[1:])
        total = np.log(self.shared)[g]
        for i in range(2):
            total = total + np.log(self.table)[g, k[i]]
            for v in range(2):
                p = 0.2 + 0.5 * k[i]
                total = total + np.where(j[i, v] == 1, np.log(p), np.log(1 - p))
                total = total + oracles.normal_logpdf(x[i, v], 2.0 * j[i, v] - g, 0.8)
        return total


def test_labels_at_three_levels_are_drawn_jointly():
    x = torch.tensor([[0.5, 1.5], [-0.4, 0.9]], dtype=torch.float64)
    program = Views()
    posterior, _ = draws_of(program, x, DRAWS)
    assert {name: tuple(value.shape[1:]) for name, value in posterior.items()} == {"g": (), "k": (2,), "j": (2, 2)}
    assert posterior.dims["j"] == ("views", "data")
    log_joint = program.log_joint(x.numpy())
    g, k, j = (posterior[name].long().numpy() for name in "gkj")
    index = (g, k[:, 0], k[:, 1], j[:, 0, 0], j[:, 1, 0], j[:, 0, 1], j[:, 1, 1])
    assert posterior.log_p.numpy() == pytest.approx(log_joint[index], rel=1e-6)
    posterior_probability = log_joint - scipy.special.logsumexp(log_joint)
    assert posterior.log_q.numpy() == pytest.approx(posterior_probability[index], rel=1e-6, abs=1e-6)
    counts = np.zeros_like(log_joint)
    np.add.at(counts, index, 1)
    expected = DRAWS * np.exp(posterior_probability)
    likely = expected > 5
    assert (
        scipy.stats.chisquare(
            [*counts[likely], counts[~likely].sum()], [*expected[likely], expected[~likely].sum()]
        ).pvalue
        > 1e-3
    )


def local(x: torch.Tensor, size: int | None = None) -> None:
    m = pyro.sample("m", dist.Normal(x.new_tensor(0.0), 2.0))
    with pyro.plate("data", size or len(x), subsample=x):
        z = pyro.sample("z", dist.Normal(m.unsqueeze(-1), x.new_ones(2)).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x)


def local_guide(x: torch.Tensor, size: int | None = None) -> None:
    pyro.sample("m", dist.Normal(x.new_tensor(0.3), 0.2))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("z", dist.Normal(0.4 * x.unsqueeze(-1), x.new_tensor([0.3, 0.6])).to_event(1))


def test_sampled_sites_come_from_the_guide_with_their_densities():
    posterior, predicted = draws_of((local, local_guide), X, 500, predictive=True)
    m, z = posterior["m"].numpy(), posterior["z"].numpy()
    assert (m.shape, z.shape, predicted["x"].shape) == ((500,), (500, N, 2), (500, N))
    x = X.numpy()
    log_p = oracles.normal_logpdf(m, 0.0, 2.0) + oracles.normal_logpdf(z, m[:, None, None], 1.0).sum((1, 2))
    log_p += oracles.normal_logpdf(x, z.sum(-1), 0.5).sum(-1)
    log_q = oracles.normal_logpdf(m, 0.3, 0.2) + oracles.normal_logpdf(z, 0.4 * x[:, None], [0.3, 0.6]).sum((1, 2))
    assert posterior.log_p.numpy() == pytest.approx(log_p, rel=1e-10)
    assert posterior.log_q.numpy() == pytest.approx(log_q, rel=1e-10)
    error = np.array([0.3, 0.6]) / math.sqrt(500)
    assert np.all(np.abs(z.mean(0) - 0.4 * x[:, None]) < 4.5 * error)
    residual = predicted["x"].numpy() - z.sum(-1)  # predictions follow their own draw of z
    assert abs(residual.std() - 0.5) < 0.05
    assert posterior.mean("z").numpy() == pytest.approx(z.mean(0))


def test_the_weights_average_to_the_bound():
    """log p - log q of a draw is an unbiased plain bound, as the estimators give it."""
    posterior, _ = draws_of((local, local_guide), X, 500)
    weights = (posterior.log_p - posterior.log_q).numpy()
    table = lvm.compare_elbos((local, local_guide), X, [TraceMeanField_ELBO], num_draws=200)
    error = math.hypot(weights.std() / math.sqrt(500), N * table[0].standard_error)
    assert abs(weights.mean() - N * table[0].value) < 4 * error


def test_a_site_enumerated_in_the_guide_is_drawn_from_it_and_the_rest_follows():
    def guide(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            k = dist.Categorical(tensor(WEIGHTS[::-1].copy()))
            pyro.sample("k", k, infer={"enumerate": "parallel"})

    posterior, _ = draws_of((mixture, guide), X, 500)
    share = np.stack([(posterior["k"].numpy() == c).mean() for c in range(3)])
    assert np.all(np.abs(share - WEIGHTS[::-1]) < 4 * np.sqrt(WEIGHTS * (1 - WEIGHTS) / (500 * N)).max())
    k = posterior["k"].numpy()
    assert posterior.log_q.numpy() == pytest.approx(np.log(WEIGHTS[::-1])[k].sum(-1), rel=1e-10)


def test_labels_enumerated_on_both_sides_are_drawn_together():
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            a = pyro.sample("a", dist.Bernoulli(x.new_tensor(0.3)), infer={"enumerate": "parallel"})
            b = pyro.sample("b", dist.Bernoulli(x.new_tensor(0.6)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(a - b, 1.0), obs=x)

    def guide(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("a", dist.Bernoulli(x.new_tensor(0.5)), infer={"enumerate": "parallel"})

    posterior, _ = draws_of((model, guide), X, 300)
    a, b = (posterior[name].numpy() for name in "ab")
    prior = np.log([0.4, 0.6])
    joint = np.stack([prior[v] + oracles.normal_logpdf(X.numpy(), a - v, 1.0) for v in (0, 1)])
    given = np.exp(joint[1] - scipy.special.logsumexp(joint, 0))
    assert abs((b - given).mean()) < 4 * math.sqrt((given * (1 - given)).mean() / b.size)
    log_b = np.where(b == 1, np.log(given), np.log1p(-given))
    assert posterior.log_q.numpy() == pytest.approx(N * np.log(0.5) + log_b.sum(-1), rel=1e-8)


def test_masked_rows_have_no_density():
    seen = torch.tensor([True, True, False, True])

    def model(x, size=None):
        with poutine.mask(mask=seen):
            mixture(x, size)

    posterior, _ = draws_of((model, no_guide), X, 10)
    k, rows = posterior["k"].numpy(), np.array([0, 1, 3])
    joint = oracles.mixture_log_joint(X.numpy(), WEIGHTS, LOCS, SCALES)
    assert posterior.log_p.numpy() == pytest.approx(joint[rows, k[:, rows]].sum(-1), rel=1e-10)
    assert posterior.log_q.numpy() == pytest.approx(np.log(TRUTH)[rows, k[:, rows]].sum(-1), rel=1e-10)


def test_a_positive_enumerable_support_other_than_labels():
    """A binomial count of shape (): its values are listed from its own support."""

    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            c = pyro.sample("c", dist.Binomial(3, x.new_tensor(0.5)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(c, 0.1), obs=x)

    posterior, _ = draws_of((model, no_guide), torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64), 20)
    assert posterior["c"].unique(dim=0).tolist() == [[0.0, 1.0, 3.0]]


def test_factors_count_and_are_no_predictions():
    def model(x, size=None):
        mixture(x, size)
        pyro.factor("penalty", x.new_tensor(-2.0))

    posterior, predicted = draws_of((model, no_guide), X, 3, predictive=True)
    joint = oracles.mixture_log_joint(X.numpy(), WEIGHTS, LOCS, SCALES)
    assert list(predicted) == ["x"]
    expected = joint[np.arange(N), posterior["k"].numpy()].sum(-1) - 2.0
    assert posterior.log_p.numpy() == pytest.approx(expected, rel=1e-10)


def test_draws_from_the_prior():
    evaluation = Evaluation.of((mixture, no_guide), X)
    with evaluation.running(0):
        prior, predicted = draw_prior(evaluation, 500)
    assert (prior["k"].shape, predicted["x"].shape) == ((500, N), (500, N))
    share = np.stack([(prior["k"].numpy() == c).mean() for c in range(3)])
    assert np.all(np.abs(share - WEIGHTS) < 4 * np.sqrt(WEIGHTS * (1 - WEIGHTS) / (500 * N)))
    x = predicted["x"].numpy()
    variance = WEIGHTS @ (SCALES**2 + LOCS**2) - (WEIGHTS @ LOCS) ** 2
    assert abs(x.mean() - WEIGHTS @ LOCS) < 4 * math.sqrt(variance / x.size)


def test_names_and_shapes_of_dims():
    evaluation = Evaluation.of(lvm.PPCA(3, 2), torch.zeros(5, 3))
    x = evaluation.structure.model["x"]
    assert (site_dims(x), site_shape(x)) == (("data", "feature"), (5, 3))
    evaluation = Evaluation.of((local, local_guide), X)
    assert site_dims(evaluation.structure.model["z"]) == ("data", "z_dim_0")
    assert site_dims(evaluation.structure.model["m"]) == ()


def test_a_posterior_is_a_mapping_that_prints():
    posterior = Posterior(
        {"z": torch.ones(3, 2), "m": torch.zeros(3)}, {"z": ("data",), "m": ()}, torch.zeros(3), torch.zeros(3)
    )
    assert repr(posterior).splitlines() == ["Posterior of 3 draws:", "  z (data: 2)", "  m ()"]
    assert (len(posterior), list(posterior), posterior.num_draws) == (2, ["z", "m"], 3)
    with pytest.raises(KeyError, match="no site 'w' in this posterior; it has z, m"):
        posterior["w"]
    other = Posterior(dict(posterior), posterior.dims, posterior.log_p, posterior.log_q)
    assert posterior == posterior
    assert posterior != other
    assert len({posterior, other}) == 2
    assert repr(Posterior({}, {}, torch.zeros(1), torch.zeros(1))) == "Posterior of 1 draws:"
