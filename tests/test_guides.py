"""Guides made from the model: what they cover, where they start, and that per-datum parameters follow their rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuide,
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch.utils.data import DataLoader, TensorDataset

import pyro_lvm as lvm
from pyro_lvm.data import Batch
from pyro_lvm.guides import is_recipe, make_guide
from pyro_lvm.parameters import BoundProgram, isolated
from pyro_lvm.preflight.tracing import traced
from pyro_lvm.program import as_program

N = 20
X = torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def shared(x: torch.Tensor, size: int | None = None) -> None:
    m = pyro.sample("m", dist.Normal(x.new_tensor(0.0), 3.0))
    s = pyro.sample("s", dist.LogNormal(x.new_tensor(0.0), 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        k = pyro.sample("k", dist.Categorical(x.new_ones(2)), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(m + k, s), obs=x)


def per_datum(x: torch.Tensor, size: int | None = None, index: torch.Tensor | None = None) -> None:
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def per_datum_without_index(x: torch.Tensor, size: int | None = None) -> None:
    with pyro.plate("data", size or len(x), subsample=x):
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def built(model: Any, kind: Any = "mean_field", minibatches: bool = False, **options: Any) -> Any:
    bound = BoundProgram(as_program((model, lambda *args, **kwargs: None)))
    batch = Batch((X,), {}, N, torch.arange(N))
    with isolated(0, validate=True):
        structure = traced(bound.model, None, batch)
        return make_guide(
            bound.model,
            structure,
            kind,
            names_index=bound.program.names("index"),
            minibatches=minibatches,
            **options,
        )


def sites_of(guide: Any, index: torch.Tensor | None = None) -> dict[str, Any]:
    rows = torch.arange(N) if index is None else index
    with isolated(0):
        trace = pyro.poutine.trace(guide).get_trace(X[rows], size=N, index=rows)
    return {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        ("mean_field", AutoNormal),
        ("full_rank", AutoMultivariateNormal),
        ("low_rank", AutoLowRankMultivariateNormal),
        ("map", AutoDelta),
        (AutoNormal, AutoNormal),
    ],
)
def test_one_word_makes_a_guide_without_the_discrete_sites(kind, made):
    guide = built(shared, kind)
    assert type(guide) is made
    sites = sites_of(guide)
    assert {"m", "s"} <= set(sites)
    assert "k" not in sites
    assert sites["s"]["value"].item() > 0
    assert is_recipe(kind)


def test_words_and_classes_are_recipes_and_guides_are_not():
    assert not is_recipe(AutoNormal(shared))
    assert not is_recipe(shared)
    assert not is_recipe(None)
    with pytest.raises(ValueError, match=r"guide='meanfield' is not known: use one of 'mean_field', 'full_rank'"):
        built(shared, "meanfield")


def test_a_class_that_takes_no_starting_values():
    class Plain(AutoGuide):
        def __init__(self, model):
            super().__init__(model)

        def forward(self, *args, **kwargs):
            return {"m": pyro.sample("m", dist.Normal(0.0, 1.0))}

    assert type(built(shared, Plain)) is Plain
    assert type(built(shared, AutoGuideList)) is AutoGuideList


def test_where_it_starts():
    start = {"m": torch.tensor(7.0, dtype=torch.float64)}
    guide = built(shared, start=start)
    sites_of(guide)
    assert guide.locs.m.item() == pytest.approx(7.0)
    assert abs(guide.locs.s.item()) < 2.0  # the others at a median of prior draws
    assert guide.locs.m.dtype == torch.float64


def test_where_nothing_is_left_the_guide_is_empty():
    def labels(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Categorical(x.new_ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(pyro.param("m", x.new_tensor([0.0, 1.0]))[k], 1.0), obs=x)

    guide = built(labels)
    assert guide(X, size=N, anything=1) is None
    fit = lvm.fit(labels, X, elbo=TraceEnum_ELBO(), steps=3, seed=0)
    assert fit.info["guide"] == "mean_field"


def test_parameters_of_each_datum_follow_its_row():
    guide = built(per_datum, minibatches=True)
    sites_of(guide)
    with torch.no_grad():
        guide.locs.z.copy_(torch.arange(N, dtype=torch.float64))
        guide.scales.z_unconstrained.fill_(-20.0)
    rows = torch.tensor([13, 2, 7])
    assert sites_of(guide, rows)["z"]["value"].detach().numpy() == pytest.approx(rows.numpy(), abs=1e-3)


def test_minibatches_reach_the_exact_posterior_means():
    """Drawn by its own plate, each datum would train another's posterior: correlation 0.08 instead of 1."""
    exact, _ = oracles.linear_gaussian_posterior(X.numpy()[:, None], np.ones((1, 1)), np.zeros(1), np.full(1, 0.25))
    for kind in ("mean_field", "map"):
        fit = lvm.fit(per_datum, X, guide=kind, epochs=60, batch_size=5, lr=0.1, seed=0)
        means = fit.posterior(X, num_draws=20, seed=0).mean("z").numpy()
        assert np.corrcoef(means, exact[:, 0])[0, 1] > 0.85


def test_the_data_plate_may_lie_further_left():
    def model(x, size=None, index=None):
        with pyro.plate("data", size or len(x), subsample=index, dim=-2), pyro.plate("views", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x.unsqueeze(-1).expand(-1, 3))

    guide = built(model, minibatches=True)
    sites_of(guide)
    assert sites_of(guide, torch.tensor([4, 1]))["z"]["value"].shape == (2, 3)


def test_a_model_that_names_index_alone():
    def model(x, index=None):
        with pyro.plate("data", len(x), subsample=index):
            pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(x.new_tensor(0.0), 1.0), obs=x)

    fit = lvm.fit(model, X, steps=2, seed=0)
    assert fit.posterior(X, num_draws=2)["z"].shape == (2, N)


def test_what_could_not_follow_its_rows_is_refused():
    with pytest.raises(lvm.ProgramError, match=r"site 'z' has a value for each datum.*Name `index`.*subsample=index"):
        built(per_datum_without_index, minibatches=True)
    assert isinstance(built(per_datum_without_index), AutoNormal)  # all rows at once are fine
    for kind in ("full_rank", "low_rank"):
        with pytest.raises(lvm.ProgramError, match=r"one joint Normal over all rows of 'z'.*guide='mean_field'"):
            built(per_datum, kind, minibatches=True)
        assert built(per_datum, kind) is not None
    assert built(shared, minibatches=True) is not None  # nothing belongs to one datum
    with pytest.raises(lvm.ProgramError, match="Name `index`"):
        lvm.fit(per_datum_without_index, X, epochs=1, batch_size=5)


def test_an_autoguide_instance_that_draws_rows_of_its_own_is_refused():
    for model in (per_datum, per_datum_without_index):
        with pytest.raises(lvm.ProgramError, match=r"plate 'data' draws rows of its own \(5 of 20\)"):
            lvm.fit(model, X, guide=AutoNormal(model), epochs=1, batch_size=5, seed=0)
    assert lvm.fit(per_datum, X, guide=AutoNormal(per_datum), epochs=1, seed=0).info["n"] == N


def test_a_loader_hides_the_rows():
    with pytest.raises(lvm.ProgramError, match=r"DataLoader|Name `index`"):
        lvm.fit(per_datum, DataLoader(TensorDataset(X), batch_size=5), epochs=1, seed=0)
