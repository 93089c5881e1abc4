"""A fit on disk: what comes back is the fit that was saved, to the bit, or an error that names the folder."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import pathlib
import platform
import subprocess
import sys

import pytest
import saved_programs
import torch
from saved_programs import NETS, deep, deep_guide
from small_programs import rows, same_tensors
from torch import nn

import pyro_lvm as lvm
from pyro_lvm import likelihoods, networks
from pyro_lvm.storage import classes
from pyro_lvm.storage.folder import FORMAT, sealed

SAVED = pathlib.Path(__file__).parent / "saved"


def binary(n=40, columns=4, seed=0):
    return (rows(n, columns, seed, torch.float32) > 0).float()


def with_gaps():
    x = rows(40, 3)
    x[::5, 0] = torch.nan
    return x


def prior(num_components=2):
    return lvm.priors.weakly_informative(rows(), num_components)


def labelled():
    y = torch.arange(40) % 3 - 1
    return binary(), y


TRAIN = {"steps": 4, "seed": 1}

BUILT_IN = {
    **{
        f"mixture, {kind}": (lambda kind=kind: lvm.GaussianMixture(2, 3, kind), rows, {})
        for kind in ("full", "tied", "diag", "spherical")
    },
    **{
        f"mixture with a prior, {kind}": (lambda kind=kind: lvm.GaussianMixture(2, 3, kind, prior()), rows, {})
        for kind in ("full", "tied", "diag", "spherical")
    },
    "mixture with a prior, map": (lambda: lvm.GaussianMixture(2, 3, prior=prior()), rows, {"guide": "map"}),
    "mixture with gaps": (lambda: lvm.GaussianMixture(2, 3), with_gaps, {"missing": "marginalize"}),
    "ppca": (lambda: lvm.PPCA(3, 2), rows, {}),
    "ppca, full": (lambda: lvm.PPCA(3, 2, "full"), lambda: rows(dtype=torch.float32), {}),
    "ppca with gaps": (lambda: lvm.PPCA(3, 1), with_gaps, {"missing": "marginalize"}),
    "factor analysis": (lambda: lvm.FactorAnalysis(3, 1), rows, {}),
    "bayesian ppca": (lambda: lvm.BayesianPPCA(3, 2, shape=0.1), rows, {}),
    "vae": (lambda: lvm.VAE(4, 2, hidden=(5, 3)), binary, {"batch_size": 10}),
    "vae, others' parts": (
        lambda: lvm.VAE(
            4,
            2,
            likelihood=likelihoods.Normal(4, floor=0.01),
            encoder=networks.MLP(4, (3,), 4, nn.Tanh),
            decoder=networks.MLP(2, (), 4),
            learn_prior_scale=True,
        ),
        lambda: rows(40, 4),
        {},
    ),
    "semi-supervised vae": (lambda: lvm.SemiSupervisedVAE(4, 2, 2, hidden=(5,)), labelled, {}),
}


def asked(fit, x):
    """What a fit can be asked, with fixed seeds."""
    answers = {"elbo": torch.tensor(fit.elbo), **{f"params {name}": value for name, value in fit.params.items()}}
    posterior = fit.posterior(x, num_draws=3, seed=5)
    answers.update({f"posterior {name}": posterior[name] for name in posterior})
    answers["log_prob"] = fit.log_prob(x, num_samples=3, seed=6)
    if "map" not in fit.info["guide"]:
        answers["evidence"] = lvm.log_evidence(fit, x, num_samples=3, seed=7)
    if fit.info["program"] == "GaussianMixture":
        answers["responsibilities"] = fit.responsibilities(x, num_samples=3, seed=8)
    return answers


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_is_loaded_answers_as_what_was_saved(name, tmp_path):
    make, draw, options = BUILT_IN[name]
    x = draw()
    fit = lvm.fit(make(), x, **TRAIN, **options)
    fit.save(tmp_path / "fit")
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    loaded = lvm.load(tmp_path / "fit")
    assert torch.equal(before, torch.random.get_rng_state())
    assert loaded.program is not fit.program
    assert repr(loaded.program) == repr(fit.program)
    assert repr(loaded) == repr(fit)
    assert loaded.history == dict(fit.history)
    assert loaded.info == fit.info
    assert loaded.sites == fit.sites
    same_tensors(asked(loaded, x), asked(fit, x))


def test_a_fit_that_was_loaded_can_be_saved_again(tmp_path):
    x = rows()
    for make, options in ((lambda: lvm.PPCA(3, 1), {}), (lambda: lvm.GaussianMixture(2, 3, prior=prior()), {})):
        fit = lvm.fit(make(), x, **TRAIN, **options)
        fit.save(tmp_path / "fit")
        lvm.load(tmp_path / "fit").save(tmp_path / "fit")
        same_tensors(asked(lvm.load(tmp_path / "fit"), x), asked(fit, x))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["fit"]


def test_closed_forms(tmp_path):
    x = rows()
    fits = (
        lvm.em(lvm.GaussianMixture(2, 3), x, seed=0),
        lvm.em(lvm.GaussianMixture(2, 3, prior=prior()), x, seed=0),
        lvm.em(lvm.PPCA(3, 1), x, seed=0),
        lvm.coordinate_ascent(lvm.GaussianMixture(2, 3, prior=prior()), x, seed=0, max_iter=5),
        lvm.coordinate_ascent(lvm.BayesianPPCA(3, 2), x, seed=0, max_iter=5),
    )
    for number, fit in enumerate(fits):
        fit.save(tmp_path / f"{number}")
        same_tensors(asked(lvm.load(tmp_path / f"{number}"), x), asked(fit, x))


IN_A_NEW_PROCESS = """
import sys, torch, pyro_lvm as lvm
from safetensors.torch import load_file, save_file
fit = lvm.load(sys.argv[1])
x = load_file(sys.argv[2])["x"]
save_file({"drawn": fit.posterior(x, num_draws=3, seed=5)["z"].clone(), "log_prob": fit.log_prob(x, 3, 6)}, sys.argv[3])
"""


def test_a_new_process_needs_nothing_but_the_folder(tmp_path):
    from safetensors.torch import load_file, save_file

    x = binary()
    fit = lvm.fit(lvm.VAE(4, 2, hidden=(5,)), x, **TRAIN)
    fit.save(tmp_path / "fit")
    save_file({"x": x}, tmp_path / "x")
    arguments = [str(tmp_path / name) for name in ("fit", "x", "out")]
    run = subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = load_file(tmp_path / "out")
    assert torch.equal(found["drawn"], fit.posterior(x, num_draws=3, seed=5)["z"])
    assert torch.equal(found["log_prob"], fit.log_prob(x, 3, 6))


def test_the_text_says_what_was_fitted_with_what_to_what(tmp_path):
    fit = lvm.fit(lvm.GaussianMixture(2, 3, "diag", prior()), rows(), steps=4, seed=7)
    fit.save(tmp_path / "fit")
    config = json.loads((tmp_path / "fit" / "config.json").read_text())
    assert config["format"] == 2
    assert config["program"]["class"] == "GaussianMixture"
    assert config["program"]["arguments"]["num_components"] == 2
    assert (config["estimator"], config["seed"], config["n"]) == ("TraceEnum_ELBO()", 7, 40)
    assert config["versions"] == {
        **{name: importlib.metadata.version(name) for name in ("torch", "pyro-ppl", "pyro-lvm")},
        "python": platform.python_version(),
    }
    assert not set(config["info"]) & {"estimator", "seed", "n", "versions"}
    by_name = {site["name"]: site for site in config["sites"]["model"]}
    assert by_name["weights"] == {
        "name": "weights",
        "kind": "latent",
        "distribution": "Dirichlet",
        "plates": {},
        "event_shape": [2],
        "enumerated": None,
    }
    assert {name: site["kind"] for name, site in by_name.items()} == {
        **dict.fromkeys(("weights", "scales", "locs", "component"), "latent"),
        "x": "observed",
    }
    assert by_name["component"]["enumerated"] == "parallel"
    assert by_name["x"]["plates"] == {"data": 40}
    assert by_name["x"]["event_shape"] == [3]
    of_guide = {site["name"] for site in config["sites"]["guide"] if site["kind"] == "latent"}
    assert of_guide == {"weights", "scales", "locs"}


def test_every_key_of_the_text_is_missed_by_name(tmp_path):
    lvm.fit(lvm.PPCA(3, 1), rows(), **TRAIN).save(tmp_path / "fit")
    config = json.loads((tmp_path / "fit" / "config.json").read_text())
    del config["sha256"]
    for key in [key for key in config if key not in ("library", "format")]:
        without = {name: value for name, value in config.items() if name != key}
        (tmp_path / "fit" / "config.json").write_text(json.dumps({**without, "sha256": sealed(without)}))
        with pytest.raises(lvm.StorageError, match=rf"config\.json (lacks|names no file of tensors).*'{key}'"):
            lvm.load(tmp_path / "fit")


# ------------------------------------------------------------------------------------------- networks of a user's own


def test_a_network_of_ones_own_has_to_be_brought_along(tmp_path):
    def make():
        return lvm.VAE(4, 2, encoder=nn.Sequential(nn.Linear(4, 4)))

    x = binary()
    fit = lvm.fit(make(), x, **TRAIN)
    fit.save(tmp_path / "fit")
    with pytest.raises(lvm.StorageError, match=r"'VAE' .* is code, which no file holds"):
        lvm.load(tmp_path / "fit")
    vae = make()
    loaded = lvm.load(tmp_path / "fit", vae)
    same_tensors(asked(loaded, x), asked(fit, x))
    assert torch.equal(vae.encode(x).mean, fit.program.encode(x).mean)


def test_a_network_that_was_exchanged_has_to_be_brought_along(tmp_path):
    vae = lvm.VAE(4, 2, hidden=(5,))
    vae.decoder.layers[1] = nn.Tanh()
    lvm.fit(vae, binary(), **TRAIN).save(tmp_path / "fit")
    with pytest.raises(lvm.StorageError, match=r"is code, which no file holds"):
        lvm.load(tmp_path / "fit")


# ------------------------------------------------------------------------------------------------------------- refusals


def test_only_a_saved_fit_is_written_over(tmp_path):
    fit = lvm.fit(lvm.PPCA(3, 1), rows(), **TRAIN)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(lvm.StorageError, match="mine holds something other than a saved fit"):
        fit.save(tmp_path / "mine")
    with pytest.raises(lvm.StorageError, match=r"thesis\.tex is a file"):
        fit.save(tmp_path / "mine" / "thesis.tex")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"
    (tmp_path / "empty").mkdir()
    fit.save(tmp_path / "empty")
    fit.save(tmp_path / "empty")
    (tmp_path / "empty" / "tensors-0123456789abcdef.safetensors.77.part").write_text("of a process that died")
    fit.save(tmp_path / "empty")
    config, tensors = sorted(p.name for p in (tmp_path / "empty").iterdir())
    assert config == "config.json"
    assert json.loads((tmp_path / "empty" / config).read_text())["tensors"]["file"] == tensors
    (tmp_path / "empty" / "config.json").unlink()
    fit.save(tmp_path / "empty")  # what a first save leaves that dies
    assert lvm.load(tmp_path / "empty").elbo == fit.elbo
    (tmp_path / "empty" / "tensors.safetensors").write_text("x")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(lvm.StorageError, match=r"something other than a saved fit \(config\.json\)"):
        fit.save(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").unlink()
    with pytest.raises(lvm.StorageError, match=r"something other than a saved fit \(tensors\.safetensors\)"):
        fit.save(tmp_path / "empty")


def test_a_folder_that_is_none_of_ours(tmp_path):
    with pytest.raises(lvm.StorageError, match=r"config\.json cannot be read"):
        lvm.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(lvm.StorageError, match=r"is no saved fit of pyro_lvm"):
        lvm.load(tmp_path)
    reads = r"config\.json has format .*, and this version reads formats 1 to 2: update pyro_lvm"
    for written in (3, 0, True, "2", None):
        (tmp_path / "config.json").write_text(json.dumps({"library": "pyro_lvm", "format": written}))
        with pytest.raises(lvm.StorageError, match=reads):
            lvm.load(tmp_path)


# --------------------------------------------------------------------------------------------------------------- tables

EXAMPLES = [
    lvm.GaussianMixture(2, 3, "diag", prior(), 1e-3),
    lvm.PPCA(3, 1, "full"),
    lvm.FactorAnalysis(3, 2),
    lvm.BayesianPPCA(4, 2, 0.1, 0.2, 0.3),
    lvm.VAE(16, 2, (3,), "poisson", learn_prior_scale=True),
    lvm.VAE(16, 2, encoder=networks.ConvEncoder(16, 2, (2,)), decoder=networks.ConvDecoder(2, 16, 1, (2,))),
    lvm.SemiSupervisedVAE(4, 2, 2, (3,), labelled_share=0.1, encoder_sees_label=False),
    networks.LabelledMLP(3, 2, (4,), 2, nn.Softplus),
    networks.MLP(3, (2,), 1, nn.Tanh, True),
    networks.ConvEncoder(16, 2, (2,)),
    networks.ConvDecoder(2, 16, 1, (2,)),
    *(kind(3) for kind in (likelihoods.Bernoulli, likelihoods.NormalPerFeature, likelihoods.ContinuousBernoulli)),
    likelihoods.Normal(3, 2.0, 0.1),
    likelihoods.NormalFixed(3, 2.0),
    likelihoods.NormalPerDatum(3, 0.1),
    likelihoods.Poisson(3, 0.1),
    likelihoods.Categorical(3, 5),
]


@pytest.mark.parametrize("thing", EXAMPLES, ids=lambda thing: type(thing).__name__)
def test_constructor_arguments_are_found_again(thing):
    tree = classes.described(thing, "it")
    again = classes.built(tree, 10_000)
    assert repr(classes.described(again, "it")) == repr(tree)
    assert repr(again) == repr(thing)
    assert set(tree["arguments"]) == set(inspect.signature(type(thing)).parameters)


def test_every_class_of_the_table_has_an_example():
    assert set(classes._ALLOWED) == {type(thing).__name__ for thing in EXAMPLES} | {"NormalInverseWishart"}


# ------------------------------------------------------------------------------------------------------------- for ever


KEPT_PROGRAMS = {"pair": (deep, deep_guide), "by_row": (saved_programs.by_row, saved_programs.guide_by_row)}
"""Those of kept fits that are not built in, by the end of the file's name."""


def said_today(name, record, x):
    """What a kept record says today, by name."""
    if name.endswith("vae"):
        return {"all": record.program.encode(x).mean}
    if name == "gaussian_mixture":
        return {"all": record.log_prob(x)}
    posterior = record.posterior(x, 8, seed=0)
    return {site: posterior[site] for site in record.draws} if "chains" in name else record._bound.constrained()


@pytest.mark.parametrize("name", sorted(path.stem for path in SAVED.glob("*.json")))
def test_what_is_kept_loads_for_ever(name):
    NETS["live"] = nn.Linear(1, 1)
    program = next((program for end, program in KEPT_PROGRAMS.items() if name.endswith(end)), None)
    record = lvm.load(SAVED / name, program)
    expected = json.loads((SAVED / f"{name}.json").read_text())
    assert getattr(record, "elbo", None) == expected["elbo"]
    found = said_today(name, record, torch.tensor(expected["x"]))
    kept = expected["found"] if isinstance(expected["found"], dict) else {"all": expected["found"]}
    assert found.keys() == kept.keys()
    for key, value in kept.items():
        torch.testing.assert_close(found[key], torch.tensor(value), rtol=1e-4, atol=1e-5)


def test_something_of_every_format_is_kept():
    kept = [json.loads((path.with_suffix("") / "config.json").read_text())["format"] for path in SAVED.glob("*.json")]
    assert set(kept) == set(range(1, FORMAT + 1))


def test_a_built_in_program_with_other_arguments_is_refused(tmp_path):
    x = torch.rand(30, 3, generator=torch.Generator().manual_seed(0)).round()
    fit = lvm.fit(lvm.VAE(3, 1, (4,)), x, steps=2, seed=0)
    fit.save(tmp_path / "fit")
    other = lvm.VAE(3, 1, (4,), likelihood="continuous_bernoulli")
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(
        lvm.StorageError, match=r"a fit of VAE with likelihood=.*, and program has likelihood=.*: pass what"
    ):
        lvm.load(tmp_path / "fit", program=other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    same = lvm.load(tmp_path / "fit", program=lvm.VAE(3, 1, (4,)))
    assert torch.equal(lvm.log_evidence(same, x, seed=0), lvm.log_evidence(fit, x, seed=0))
