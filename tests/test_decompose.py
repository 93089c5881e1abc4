"""Every form of the bound: equal where the guide is exact, each to its own oracle where it is not."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure

import pyro_lvm as lvm
from pyro_lvm.criticism.decompose import FORMS
from pyro_lvm.elbo.estimator import plain_estimator
from pyro_lvm.evaluation import Evaluation

N = 9
X = torch.randn(N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
ROWS = torch.randn(30, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def plated(x, size):
    return pyro.plate("data", size or len(x), subsample=x)


def within(found: lvm.Decomposition, name: str, truth: float, tolerance: float = 1e-10) -> None:
    figure = found.figures[name]
    assert abs(figure.value - truth) < 4.5 * figure.standard_error + tolerance, (name, figure, truth)


def plain_bound(program, data, passes: int = 200) -> tuple[float, float]:
    """What `fit.elbo` is an average of: value and standard error, nats per datum."""
    evaluation = Evaluation.of(program, data)
    estimator = plain_estimator(evaluation.structure)
    with evaluation.running(1):
        losses = [
            float(estimator.evaluate(evaluation.bound, evaluation.rows.whole())[0]) / evaluation.rows.size
            for _ in range(passes)
        ]
    return -float(np.mean(losses)), float(np.std(losses)) / math.sqrt(passes)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_with_the_exact_posterior_all_forms_are_the_evidence(covariance):
    model = lvm.PPCA.closed_form(ROWS, 2, guide_covariance=covariance)
    found = lvm.decompose(model, ROWS, 50, seed=0)
    truth = oracles.linear_gaussian_log_density(
        ROWS.numpy(), model.loadings.detach().numpy(), model.mean.detach().numpy(), model.noise_scale.item() ** 2
    ).mean()
    for name in ("elbo", *FORMS, "log_evidence"):
        assert found[name] == pytest.approx(truth, abs=1e-8), name
    for name in ("gap", "kl_to_posterior", "residual"):
        assert abs(found[name]) < 1e-8, name
    exact = {name for name, figure in found.figures.items() if figure.exact}
    assert exact >= {*FORMS, "elbo", "reconstruction", "kl", "joint", "entropy", "log_evidence", "residual"}
    assert found.figures["log q"].standard_error > 0


@pytest.mark.parametrize("kind", [lvm.PPCA, lvm.FactorAnalysis])
def test_a_linear_gaussian_program_with_any_normal_guide_has_closed_forms(kind):
    model = kind(5, 2).double()
    model.initialize(ROWS, seed=0)
    with torch.no_grad():
        model._standard_guide_weight += 0.3
        model._standard_loadings += 0.3
    psi = np.broadcast_to(model.noise_scale.detach().numpy() ** 2, (5,))
    loadings, mean = model.loadings.detach().numpy(), model.mean.detach().numpy()
    q = model.encode(ROWS)
    loc, covariance = q.mean.detach().numpy(), np.diag(q.variance[0].detach().numpy())
    arguments = (ROWS.numpy(), loadings, mean, psi)
    bound = oracles.linear_gaussian_elbo(*arguments, loc, covariance).mean()
    posterior = oracles.linear_gaussian_posterior(*arguments)
    found = lvm.decompose(model, ROWS, 300, seed=0)
    expected = {
        "reconstruction - kl": bound,
        "joint + entropy": bound,
        "elbo": bound,
        "kl": oracles.gaussian_kl(loc, covariance, np.zeros_like(loc), np.eye(2)).mean(),
        "entropy": 0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance)[1],
        "log_evidence": oracles.linear_gaussian_log_density(*arguments).mean(),
        "kl_to_posterior": oracles.gaussian_kl(loc, covariance, *posterior).mean(),
    }
    expected["reconstruction"] = bound + expected["kl"]
    expected["joint"] = bound - expected["entropy"]
    for name, truth in expected.items():
        assert found.figures[name].exact, name
        assert found[name] == pytest.approx(truth, rel=1e-8), name
    assert expected["kl_to_posterior"] > 0.01
    assert abs(found["residual"]) < 1e-8
    within(found, "joint - log q", bound)
    within(found, "log q", -expected["entropy"])
    assert found.figures["joint - log q"].standard_error > 1e-4


def test_a_mixture_is_summed_exactly():
    model = lvm.GaussianMixture(3, 5).double()
    model.initialize(ROWS, seed=0)
    found = lvm.decompose(model, ROWS, seed=0)
    responsibilities = model.responsibilities(ROWS).detach().numpy()
    log_joint = oracles.gaussian_mixture_log_joint(
        ROWS.numpy(),
        model.weights.detach().numpy(),
        model.locs.detach().numpy(),
        (model.scale_tril @ model.scale_tril.mT).detach().numpy(),
        "full",
    )
    evidence = np.logaddexp.reduce(log_joint, -1).mean()
    expected = {
        **dict.fromkeys((*FORMS, "elbo", "log_evidence"), evidence),
        "kl": oracles.categorical_kl(responsibilities, np.broadcast_to(model.weights.detach().numpy(), (30, 3))).mean(),
        "joint": (responsibilities * log_joint).sum(-1).mean(),
        "entropy": -oracles.categorical_kl(responsibilities, np.ones((30, 3))).mean(),
        "kl_to_posterior": 0.0,
    }
    expected["reconstruction"] = evidence + expected["kl"]
    for name, truth in expected.items():
        assert found.figures[name].exact, name
        assert found[name] == pytest.approx(truth, abs=1e-8), name


def test_a_label_that_the_guide_lists_is_weighed_by_the_guide():
    weights, locs = np.array([0.2, 0.5, 0.3]), np.array([-1.0, 0.0, 2.0])
    q = np.array([0.5, 0.25, 0.25])

    def model(x, size=None):
        with plated(x, size):
            k = pyro.sample("k", dist.Categorical(torch.tensor(weights)))
            pyro.sample("x", dist.Normal(torch.tensor(locs)[k], 0.8), obs=x)

    def guide(x, size=None):
        with plated(x, size):
            pyro.sample("k", dist.Categorical(torch.tensor(q)), infer={"enumerate": "parallel"})

    found = lvm.decompose((model, guide), X, seed=0)
    log_joint = oracles.mixture_log_joint(X.numpy(), weights, locs, np.full(3, 0.8))
    posterior = np.exp(log_joint - np.logaddexp.reduce(log_joint, -1, keepdims=True))
    expected = {
        "elbo": (q * (log_joint - np.log(q))).sum(-1).mean(),
        "entropy": -(q * np.log(q)).sum(),
        "kl": (q * np.log(q / weights)).sum(),
        "log_evidence": np.logaddexp.reduce(log_joint, -1).mean(),
        "kl_to_posterior": oracles.categorical_kl(np.broadcast_to(q, posterior.shape), posterior).mean(),
        "residual": 0.0,
    }
    for name, truth in expected.items():
        assert found[name] == pytest.approx(truth, abs=1e-8), name
    assert expected["kl_to_posterior"] > 0.1


def vae() -> lvm.VAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return lvm.VAE(5, 2, hidden=(6,), likelihood="normal").double()


def ssvae() -> lvm.SemiSupervisedVAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return lvm.SemiSupervisedVAE(5, 3, 2, hidden=(6,)).double()


BITS, LABELS = (ROWS > 0).double(), torch.arange(30) % 4 - 1


@pytest.mark.parametrize(("make", "data"), [(vae, ROWS), (ssvae, (BITS, LABELS))], ids=["vae", "ssvae"])
def test_networks_are_averaged_over_draws_and_agree_with_the_bound_of_a_fit(make, data):
    program = make()
    found = lvm.decompose(program, data, 400, seed=0)
    value, error = plain_bound(program, data)
    for name in ("elbo", *FORMS):
        figure = found.figures[name]
        assert 0 < figure.standard_error < 0.05
        assert abs(figure.value - value) < 4.5 * math.hypot(figure.standard_error, error), name
    assert found.figures["kl"].exact
    assert found["kl"] == pytest.approx(sum(found[name] for name in found if name.startswith("kl[")), rel=1e-10)
    assert found["reconstruction"] == pytest.approx(found["reconstruction[x]"], rel=1e-10)
    assert found["gap"] > 0
    assert "kl_to_posterior" not in found


def test_the_standard_errors_are_those_of_repeated_runs():
    program = vae()
    runs = [lvm.decompose(program, ROWS, 20, seed=seed) for seed in range(40)]
    for name in (*FORMS, "log q", "reconstruction"):
        spread = np.std([run[name] for run in runs], ddof=1)
        claimed = math.sqrt(np.mean([run.figures[name].standard_error ** 2 for run in runs]))
        assert 0.7 < spread / claimed < 1.4, name


def test_what_all_data_share_is_divided_by_their_number():
    loc, scale = oracles.conjugate_normal_posterior(X.numpy(), 0.5, 2.0, 0.8)
    truth = oracles.conjugate_normal_evidence(X.numpy(), 0.5, 2.0, 0.8) / N

    def model(x, size=None):
        m = pyro.sample("m", dist.Normal(x.new_tensor(0.5), 2.0))
        with plated(x, size):
            pyro.sample("x", dist.Normal(m, 0.8), obs=x)

    def guide(x, size=None):
        pyro.sample("m", dist.Normal(x.new_tensor(loc), scale))

    found = lvm.decompose((model, guide), X, 2000, seed=0)
    for name in ("elbo", *FORMS, "log_evidence"):
        within(found, name, truth)
    assert found.figures["elbo"].standard_error < 1e-8
    assert found["kl"] == pytest.approx(oracles.normal_kl(loc, scale, 0.5, 2.0) / N, rel=1e-10)
    assert found["entropy"] == pytest.approx((0.5 * math.log(2 * math.pi * math.e) + math.log(scale)) / N, rel=1e-10)


def test_guides_made_from_the_model_have_their_sites_named_after_it():
    def model(x, size=None, index=None):
        with pyro.plate("data", size or len(x), subsample=x if index is None else index):
            s = pyro.sample("s", dist.HalfNormal(x.new_tensor(1.5)))
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 0.3 + s), obs=x)

    fit = lvm.fit(model, X, steps=30, lr=0.05, seed=0)
    found = lvm.decompose(fit, X, 200, seed=0)
    assert {"kl[s]", "kl[z]"} <= set(found)
    assert found["kl"] == pytest.approx(found["kl[s]"] + found["kl[z]"], rel=1e-10)
    within(found, "elbo", fit.elbo, 4.5 * fit.info["elbo_se"])
    joint = lvm.decompose(lvm.fit(model, X, guide="full_rank", steps=30, lr=0.05, seed=0), X, 50, seed=0)
    assert "kl[s+z]" in joint
    assert joint["gap"] > -4.5 * joint.figures["gap"].standard_error


def test_it_is_a_mapping_that_prints_as_a_table_and_makes_bars():
    found = lvm.decompose(lvm.PPCA.closed_form(ROWS, 2), ROWS, 10, seed=0)
    assert isinstance(found, Mapping)
    assert {"elbo", "reconstruction", "kl", "entropy", "log_evidence"} <= set(found)
    assert len(found) == len(list(found)) == len(repr(found).splitlines()) - 1
    assert "exact" in repr(found)
    assert " ± " in repr(found)
    figure = lvm.plots.decomposition(found)
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    assert len(axes.patches) == 8
    ends = [patch.get_x() + patch.get_width() for patch in axes.patches][1::2]
    assert ends == pytest.approx([found[name] for name in ("elbo", *reversed(FORMS))])


def test_what_has_no_decomposition_is_refused():
    model = lvm.PPCA.closed_form(ROWS, 2)
    with pytest.raises(ValueError, match="num_samples is 1"):
        lvm.decompose(model, ROWS, 1)

    def latent(x, size=None):
        with plated(x, size):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    fit = lvm.fit(latent, X, guide="map", steps=2, seed=0)
    with pytest.raises(lvm.ProgramError, match="the guide of z is a point"):
        lvm.decompose(fit, X)

    def model_of_both(x, size=None):
        with plated(x, size):
            k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.5)), infer={"enumerate": "parallel"})
            j = pyro.sample("j", dist.Bernoulli(x.new_tensor(0.5)))
            pyro.sample("x", dist.Normal(k + j, 1.0), obs=x)

    def lists_one(x, size=None):
        with plated(x, size):
            pyro.sample("j", dist.Bernoulli(x.new_tensor(0.5)), infer={"enumerate": "parallel"})

    with pytest.raises(lvm.ProgramError, match="the guide enumerates site 'j' and the model site 'k'"):
        lvm.decompose((model_of_both, lists_one), X)
