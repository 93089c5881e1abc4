"""Guides and chains on disk: what is made on the way is made again, and what cannot be is refused when it is saved."""

from __future__ import annotations

import json
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from saved_programs import NETS, deep, deep_guide
from small_programs import Amortised, data, guide_of_mean, model_of_mean, nothing, rows, same_tensors
from torch import nn

import pyro_lvm as lvm
from pyro_lvm import guides
from pyro_lvm.storage.folder import sealed

TRAIN = {"steps": 4, "seed": 1}


def drawn(record, x, num_draws, seed=1):
    posterior = record.posterior(x, num_draws, seed=seed)
    return {name: posterior[name] for name in posterior}


def two_latents(x, size=None):
    loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 10.0))
    scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


@pytest.mark.parametrize("name", guides.AUTOGUIDES)
def test_guides_of_pyros_classes(name, tmp_path):
    x = data(dtype=torch.float32)
    fit = lvm.fit(two_latents, x, guide=guides.AUTOGUIDES[name], **TRAIN)
    fit.save(tmp_path / "fit")
    assert json.loads((tmp_path / "fit" / "config.json").read_text())["guide"] == {"kind": "recipe", "recipe": name}
    for _ in range(2):
        loaded = lvm.load(tmp_path / "fit", two_latents)
        loaded.save(tmp_path / "fit")  # not asked anything yet
    same_tensors(drawn(loaded, x, 5), drawn(fit, x, 5))
    same_tensors(loaded._bound.snapshot(), dict(fit._snapshot))
    loaded.save(tmp_path / "fit")
    loaded = lvm.load(tmp_path / "fit", two_latents)
    assert torch.equal(loaded.log_prob(x, 5, seed=1), fit.log_prob(x, 5, seed=1))


def test_a_recipe_in_the_place_of_a_pairs_own_guide(tmp_path):
    x = data()
    fit = lvm.fit((model_of_mean, guide_of_mean), x, guide="mean_field", **TRAIN)
    fit.save(tmp_path / "fit")
    loaded = lvm.load(tmp_path / "fit", (model_of_mean, guide_of_mean))
    assert torch.equal(loaded.log_prob(x, 5, seed=1), fit.log_prob(x, 5, seed=1))


Mine = type("Mine", (pyro.infer.autoguide.AutoNormal,), {})
Namesake = type("AutoNormal", (pyro.infer.autoguide.AutoNormal,), {})


@pytest.mark.parametrize("kind", [Mine, Namesake])
def test_what_cannot_be_made_again_is_refused_when_saved(kind, tmp_path):
    x, name = data(), kind.__name__
    words = r"was made from a class that a file may not name: .*AutoStructured, or pass an object, guide="
    fit = lvm.fit(model_of_mean, x, guide=kind, **TRAIN)
    with pytest.raises(lvm.StorageError, match=rf"guide {name} {words}{name}\(model\), which is handed to lvm.load"):
        fit.save(tmp_path / "fit")
    assert not list(tmp_path.iterdir())
    fit = lvm.fit(model_of_mean, x, guide=kind(model_of_mean), **TRAIN)
    fit.save(tmp_path / "fit")
    loaded = lvm.load(tmp_path / "fit", (model_of_mean, kind(model_of_mean)))
    assert torch.equal(loaded.log_prob(x, 5, seed=1), fit.log_prob(x, 5, seed=1))


@pytest.mark.parametrize("name", ["AutoGuideList", "AutoNormalizingFlow", "Mine", "os.system", "map_", ""])
def test_a_file_names_no_guide_but_those_of_the_table(name, tmp_path):
    lvm.fit(model_of_mean, data(), guide="map", **TRAIN).save(tmp_path / "fit")
    config = json.loads((tmp_path / "fit" / "config.json").read_text())
    config["guide"]["recipe"] = name
    del config["sha256"]
    (tmp_path / "fit" / "config.json").write_text(json.dumps({**config, "sha256": sealed(config)}))
    with pytest.raises(lvm.StorageError, match=rf"a guide 'recipe' of '{name}' is not known"):
        lvm.load(tmp_path / "fit", model_of_mean)


# -------------------------------------------------------------------------------------------- parameters for each datum


class Shares(Amortised):
    """A latent for each datum and one for all."""

    def model(self, x, size=None):
        pyro.sample("shift", dist.Normal(x.new_zeros(()), 1.0))
        super().model(x, size)

    def guide(self, x, size=None):
        pyro.sample("shift", dist.Normal(self.log_scale[0], 0.5))
        super().guide(x, size)


def shared_guide(x, size=None):
    middle = pyro.param("middle", x.new_zeros(()))
    pyro.sample("shift", dist.Normal(middle, 0.5))
    weight = pyro.param("weight", x.new_ones(3, 2))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("z", dist.Normal(x @ weight, 0.5).to_event(1))


def guide_of_z(x, size=None):
    weight = pyro.param("weight", x.new_ones(3, 2))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("z", dist.Normal(x @ weight, 0.5).to_event(1))


FREED = {
    "vae": (lambda: lvm.VAE(3, 2, hidden=(4,), likelihood="normal"), rows, None, "nowhere"),
    "ppca": (lambda: lvm.PPCA(3, 1), rows, None, "nowhere"),
    "a pair": (lambda: (deep, deep_guide), data, None, "nowhere"),
    "a latent for all": (Shares, rows, None, "own"),
    "a guide beside, a latent for all": (Shares, rows, shared_guide, "beside"),
    "a guide beside": (Amortised, rows, guide_of_z, "nowhere"),
}


@pytest.mark.parametrize("name", FREED)
def test_guides_with_parameters_for_each_datum(name, tmp_path):
    make, draw, guide, kind = FREED[name]
    NETS["live"] = nn.Linear(1, 1)
    x = draw()
    fit = lvm.fit(make(), x, guide=guide, amortized=False, batch_size=13, **TRAIN)
    fit.save(tmp_path / "fit")
    assert json.loads((tmp_path / "fit" / "config.json").read_text())["guide"]["kind"] == kind
    handed = None if name in ("vae", "ppca") else (make(), guide) if kind == "beside" else make()
    for _ in range(2):
        loaded = lvm.load(tmp_path / "fit", handed)
        loaded.save(tmp_path / "fit")
    same_tensors(drawn(loaded, x, 3), drawn(fit, x, 3))
    assert torch.equal(loaded.log_prob(x, 3, seed=1), fit.log_prob(x, 3, seed=1))
    assert loaded.elbo == fit.elbo
    for kept in (fit, loaded):
        with pytest.raises(lvm.ProgramError, match="parameters for each of the 40 rows it was fitted to"):
            kept.posterior(x[:7], 3)


# ------------------------------------------------------------------------------------------------------------- chains


def chains_of(program, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lvm.ProgramWarning)  # few draws are not to be trusted
        return lvm.mcmc(program, x, num_draws=6, num_warmup=6, num_chains=2, seed=0)


def by_component(x, size=None):
    locs = pyro.sample("locs", dist.Normal(x.new_tensor([-1.0, 1.0]), 1.0).to_event(1))
    scale = pyro.param("scale", torch.tensor(0.8), constraint=dist.constraints.positive)
    with pyro.plate("data", size or len(x), subsample=x):
        component = pyro.sample("component", dist.Categorical(x.new_ones(2)))
        pyro.sample("x", dist.Normal(locs[component], scale), obs=x)


def of_each(x, size=None):
    loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def mixture():
    return lvm.GaussianMixture(2, 3, prior=lvm.priors.weakly_informative(rows(), 2))


CHAINS = {
    "a built-in program": (mixture, rows, None),
    "summed out": (lambda: by_component, data, by_component),
    "a value for each datum": (lambda: of_each, lambda: data(9), of_each),
    "a pair": (lambda: (two_latents, nothing), data, (two_latents, nothing)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains(name, tmp_path):
    make, draw, handed = CHAINS[name]
    x = draw()
    chains = chains_of(make(), x)
    chains.save(tmp_path / "chains")
    config = json.loads((tmp_path / "chains" / "config.json").read_text())
    assert (config["record"], config["estimator"], config["seed"], config["n"]) == ("chains", "NUTS", 0, len(x))
    for _ in range(2):
        loaded = lvm.load(tmp_path / "chains", handed)
        loaded.save(tmp_path / "chains")
    assert repr(loaded) == repr(chains)
    assert loaded.info == chains.info
    assert loaded.sites == chains.sites
    same_tensors(dict(loaded.draws), dict(chains.draws))
    same_tensors(dict(loaded.statistics), dict(chains.statistics))
    with pytest.raises(lvm.ProgramError, match="chains from a file bring no data along: pass x"):
        loaded.posterior()
    for number in (None, 4):
        same_tensors(drawn(loaded, x, number), drawn(chains, None, number))
    assert loaded.to_arviz(x, ("posterior", "log_likelihood"), num_samples=3, seed=2) is not None
    if name == "a value for each datum":
        same_tensors(drawn(loaded, x.clone(), 4), drawn(chains, x, 4))
        for kept in (chains, loaded):
            with pytest.raises(lvm.ProgramError, match=r"site 'z' has a value for each of the 9 rows .* rows \(9\)"):
                kept.posterior(x + 1.0)
    else:
        same_tensors(drawn(loaded, x[:5], 4), drawn(chains, x[:5], 4))


def test_chains_of_another_program_are_refused(tmp_path):
    width = 2

    def wide(x, size=None):
        loc = pyro.sample("loc", dist.Normal(x.new_zeros(width), 10.0).to_event(1))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(loc.sum(), 1.0), obs=x)

    x = data()
    chains_of(wide, x).save(tmp_path / "chains")
    with pytest.raises(lvm.StorageError, match=r"'wide' \(from .*is code, which no file holds: pass program=\.\.\."):
        lvm.load(tmp_path / "chains")
    with pytest.raises(lvm.StorageError, match="holds a fit of 'wide', and program is of_each"):
        lvm.load(tmp_path / "chains", of_each)
    loaded = lvm.load(tmp_path / "chains", wide)
    width = 3
    with pytest.raises(lvm.StorageError, match=r"holds draws of 'loc' of shape \(2,\), and wide has shape \(3,\)"):
        loaded.posterior(x)
    width = 2
    assert loaded.posterior(x).num_draws == 12
