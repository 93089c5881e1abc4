"""The export works with ArviZ as it is, in both its generations: summary, LOO, predictive plot, netCDF and back."""

from __future__ import annotations

from typing import Any

import arviz as az
import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray

import pyro_lvm as lvm
from pyro_lvm.to_arviz import Groups, loo, to_arviz

OLD = "InferenceData" in vars(az)
ALL = {
    "posterior",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "log_likelihood",
    "observed_data",
    "sample_stats",
}
N, DRAWS = 12, 40
X = torch.randn(N, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module", autouse=True)
def without_a_screen() -> None:
    matplotlib.use("agg")


def bayesian(x: torch.Tensor | None = None, size: int | None = None) -> None:
    """A mixture of two with a posterior over its locations and scale; the labels are summed out."""
    zero = torch.zeros((), dtype=torch.float64)
    with pyro.plate("components", 2, dim=-1):
        locs = pyro.sample("locs", dist.Normal(zero, 2.0).expand([2]).to_event(1), infer={"event_dims": ("feature",)})
    scale = pyro.sample("scale", dist.LogNormal(zero, 0.5))
    with pyro.plate("data", size or len(x), subsample=x, dim=-1):
        k = pyro.sample("component", dist.Categorical(zero.new_ones(2)), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[k], scale).to_event(1), obs=x, infer={"event_dims": ("feature",)})


@pytest.fixture(scope="module")
def bayes() -> tuple[lvm.Fit, Any]:
    fit = lvm.fit(bayesian, X, steps=100, lr=0.05, seed=0)
    return fit, fit.to_arviz(X, num_draws=DRAWS, seed=0)


@pytest.fixture(scope="module")
def ppca() -> tuple[lvm.Fit, Any]:
    fit = lvm.fit(lvm.PPCA(num_features=2, latent_dim=1), X, steps=20, seed=0)
    return fit, fit.to_arviz(X, num_draws=DRAWS, seed=0)


def groups_of(data: Any) -> set[str]:
    return set(data.groups()) if OLD else set(data.children)


def shape_of(data: Any, group: str, name: str) -> dict[str, int]:
    variable = data[group][name]
    return dict(zip(variable.dims, variable.shape, strict=True))


def test_every_group_is_there_with_dims_named_by_plates_and_events(bayes, ppca):
    _, data = bayes
    draws = {"chain": 1, "draw": DRAWS}
    assert groups_of(data) == ALL
    assert shape_of(data, "posterior", "locs") == {**draws, "components": 2, "feature": 2}
    for group in ("posterior", "prior"):
        assert shape_of(data, group, "scale") == draws
        assert shape_of(data, group, "component") == {**draws, "data": N}
    for group in ("posterior_predictive", "prior_predictive"):
        assert shape_of(data, group, "x") == {**draws, "data": N, "feature": 2}
    assert shape_of(data, "log_likelihood", "x") == {**draws, "data": N}
    assert shape_of(data, "observed_data", "x") == {"data": N, "feature": 2}
    assert shape_of(data, "sample_stats", "lp") == shape_of(data, "sample_stats", "lq") == draws
    assert np.array_equal(data["observed_data"]["x"].values, X.numpy())
    assert data["posterior"]["component"].dtype == np.int64
    assert list(data["posterior"].coords["data"].values) == list(range(N))

    _, data = ppca
    assert groups_of(data) == ALL
    assert shape_of(data, "posterior", "z") == {**draws, "data": N, "latent": 1}
    assert shape_of(data, "log_likelihood", "x") == {"chain": 1, "draw": 1, "data": N}


def test_the_numbers_are_those_of_the_posterior(bayes):
    fit, data = bayes
    posterior = fit.posterior(X, num_draws=3, seed=5)
    alone = fit.to_arviz(X, 3, ("posterior", "sample_stats"), seed=5)
    for name, draws in posterior.items():
        assert np.array_equal(alone["posterior"][name].values[0], draws.numpy())
    assert np.array_equal(alone["sample_stats"]["lp"].values[0], posterior.log_p.numpy())
    log_likelihood = data["log_likelihood"]["x"].values[0]
    assert log_likelihood.mean() == pytest.approx(fit.log_prob(X, 100, seed=0).mean().item(), abs=0.5)
    lp, lq = (data["sample_stats"][name].values for name in ("lp", "lq"))
    assert (lp - lq).mean() / N == pytest.approx(fit.elbo, abs=6 * (lp - lq).std() / N / DRAWS**0.5)


def test_log_likelihood_sums_labels_out_by_hand():
    """One location held nearly fixed: the pointwise values are those of the mixture there."""

    def model(x, size=None):
        m = pyro.sample("m", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Categorical(x.new_tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(m, 0.5))
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)

    def guide(x, size=None):
        loc = pyro.param("loc", x.new_tensor(0.2))
        pyro.sample("m", dist.Normal(loc, 1e-9))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(0.2 * x, 0.6))

    x = X[:, 0]
    fit = lvm.fit((model, guide), x, steps=1, lr=1e-12, seed=0)
    data = fit.to_arviz(x, 3, ("log_likelihood",), num_samples=150, seed=0)
    from scipy.special import logsumexp
    from scipy.stats import norm

    by_label = norm.logpdf(x.numpy()[:, None], fit.params["loc"].item() + np.arange(2), 1.25**0.5) + np.log([0.3, 0.7])
    expected = logsumexp(by_label, -1)
    assert data["log_likelihood"]["x"].values[0] == pytest.approx(np.tile(expected, (3, 1)), abs=0.4)
    coarse = fit.to_arviz(x, 3, ("log_likelihood",), num_samples=1, seed=0)["log_likelihood"]["x"].values[0]
    assert np.abs(coarse - expected).mean() > 2 * np.abs(data["log_likelihood"]["x"].values[0] - expected).mean()


def test_summary_runs_unmodified(bayes):
    _, data = bayes
    table = az.summary(data, var_names=["locs", "scale"], kind="stats")
    assert len(table) == 5
    assert "mean" in table.columns


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning")
def test_loo_runs_unmodified_and_through_the_fit(bayes):
    fit, data = bayes
    of_data = az.loo(data)
    through_fit = fit.loo(X, num_draws=DRAWS, seed=0)
    for result in (of_data, through_fit):
        elpd = result["elpd_loo"] if OLD else result.elpd
        assert elpd / N == pytest.approx(data["log_likelihood"]["x"].values.mean(), abs=1.0)
    assert loo(data, pointwise=True) is not None


@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")  # between ArviZ and matplotlib
def test_a_predictive_plot_runs_unmodified(bayes):
    _, data = bayes
    plot = az.plot_ppc(data, num_pp_samples=5, random_seed=0) if OLD else az.plot_ppc_dist(data, num_samples=5)
    assert plot is not None
    import matplotlib.pyplot as plt

    plt.close("all")


def test_net_cdf_and_back(bayes, ppca, tmp_path):
    for number, (_, data) in enumerate((bayes, ppca)):
        file = tmp_path / f"{number}.nc"
        data.to_netcdf(file)
        back = az.from_netcdf(file)
        assert groups_of(back) == ALL
        for group in ALL:
            for name in data[group].data_vars:
                assert np.array_equal(back[group][name].values, data[group][name].values)
                assert back[group][name].dims == data[group][name].dims
        with xarray.open_datatree(file) as tree:
            assert tree.attrs["inference_library"] == "pyro_lvm"
            assert set(tree.children) >= ALL


def test_the_attributes_say_what_loo_means(bayes, ppca):
    assert bayes[1].attrs["loo"] == "pointwise log-likelihood over posterior draws"
    assert bayes[1].attrs["elbo_nats_per_datum"] == bayes[0].elbo
    assert bayes[1].attrs["estimator"].startswith("TraceEnum_ELBO")
    assert ppca[1].attrs["loo"].startswith("refused: the parameters are point estimates")


def test_loo_without_a_posterior_over_parameters_is_refused(ppca):
    with pytest.raises(lvm.ProgramError, match=r"no posterior over parameters.*Give the parameters priors"):
        ppca[0].loo(X)
    point = lvm.fit(bayesian, X, guide="map", steps=2, seed=0)
    with pytest.raises(lvm.ProgramError, match="no posterior over parameters"):
        point.loo(X)
    assert point.to_arviz(X, 2, ("posterior",)).attrs["loo"].startswith("refused")


def test_an_export_that_is_too_large_is_refused_with_its_size_and_the_options(ppca):
    fit, _ = ppca
    message = (
        r"would take 0\.0\d+ GB \(100000 draws of 12 rows; posterior_predictive alone 0\.0192 GB\), more than "
        r"max_bytes=0\.001 GB: pass fewer rows, num_draws=\d+, groups=\.\.\. without 'posterior_predictive'"
    )
    with pytest.raises(ValueError, match=message):
        fit.to_arviz(X, num_draws=100_000, max_bytes=1_000_000)
    assert fit.to_arviz(X, num_draws=2, max_bytes=1_000_000) is not None


def test_groups_by_choice(ppca, bayes):
    fit, _ = ppca
    assert groups_of(fit.to_arviz(X, 2, ("prior",), seed=0)) == {"prior"}
    assert groups_of(fit.to_arviz(X, 2, ["observed_data", "sample_stats"])) == {"observed_data", "sample_stats"}
    with pytest.raises(ValueError, match=r"groups \['predictions'\] are not known: choose from \['posterior'"):
        fit.to_arviz(X, 2, ("predictions",))
    with pytest.raises(ValueError, match="num_draws is 0"):
        fit.to_arviz(X, 0)
    with pytest.raises(ValueError, match="num_samples is 0"):
        fit.to_arviz(X, 1, num_samples=0)


def test_a_program_without_plates_or_latents_or_prior_draws():
    """What cannot be made is left out: no plate over rows, no log-likelihood by row; no latents, no posterior."""

    def model(x, size=None):
        loc = pyro.param("loc", x.new_zeros(2))
        pyro.sample("x", dist.Normal(loc.expand(len(x), 2), 1.0).to_event(2), obs=x)
        pyro.factor("nudge", x.new_tensor(-1.0))

    fit = lvm.fit((model, lambda x, size=None: None), X, steps=1, seed=0)
    data = fit.to_arviz(X, 3)
    assert groups_of(data) == {"posterior_predictive", "prior_predictive", "observed_data", "sample_stats"}
    assert list(data["observed_data"].data_vars) == ["x"]
    assert shape_of(data, "observed_data", "x") == {"x_dim_0": N, "x_dim_1": 2}


def test_two_observed_sites_share_a_log_likelihood():
    def model(x, size=None):
        m = pyro.sample("m", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("a", dist.Normal(m, 1.0), obs=x[:, 0])
            pyro.sample("b", dist.Normal(m, 1.0), obs=x[:, 1])

    fit = lvm.fit(model, X, steps=2, seed=0)
    data = fit.to_arviz(X, 4, ("posterior", "log_likelihood", "observed_data"), seed=0)
    m = data["posterior"]["m"].values
    assert list(data["log_likelihood"].data_vars) == ["a+b"]
    assert set(data["observed_data"].data_vars) == {"a", "b"}
    assert m.shape == (1, 4)


def test_groups_alone():
    data = to_arviz(
        Groups(
            {"posterior": {"z": torch.arange(6.0).reshape(2, 3)}, "observed_data": {"x": torch.tensor([True, False])}},
            {"posterior": {"z": ("data",)}, "observed_data": {"x": ("row",)}},
            {"note": "by hand"},
        )
    )
    assert shape_of(data, "posterior", "z") == {"chain": 1, "draw": 2, "data": 3}
    assert shape_of(data, "observed_data", "x") == {"row": 2}
    assert data.attrs["note"] == "by hand"


def test_a_dim_with_the_name_of_a_site_is_refused():
    values = {"posterior": {"z": torch.zeros(2, 3), "w": torch.zeros(2)}}
    with pytest.raises(ValueError, match=r"'z' names both a site and a dim in group 'posterior'.*event_dims"):
        to_arviz(Groups(values, {"posterior": {"z": ("z",), "w": ()}}))


@pytest.mark.skipif(not OLD, reason="what ArviZ 0.x calls its data")
def test_the_kind_of_data_of_the_old_generation(ppca):
    assert isinstance(ppca[1], az.InferenceData)


@pytest.mark.skipif(OLD, reason="what ArviZ 1.x calls its data")
def test_the_kind_of_data_of_the_new_generation(ppca):
    assert isinstance(ppca[1], xarray.DataTree)
