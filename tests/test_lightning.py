"""`pyro_lvm.lightning`: two processes are one process with the doubled batch, and parameters go both ways."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import process_of_several as several
import pyro
import pytest
import torch
from pyro.infer import RenyiELBO

import pyro_lvm as lvm
from pyro_lvm.lightning import SVIModule

HERE = Path(__file__).parent


def on_two_processes(case: str, batch_size: int, out: Path) -> dict:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    run = subprocess.run(
        [sys.executable, *launcher, str(HERE / "process_of_several.py"), case, str(batch_size), str(out)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    return torch.load(out, weights_only=True)


def assert_same(left: dict, right: dict) -> None:
    assert left["state"].keys() == right["state"].keys()
    for name, value in left["state"].items():
        torch.testing.assert_close(value, right["state"][name], rtol=0, atol=1e-5)
    torch.testing.assert_close(left["history"]["loss"], right["history"]["loss"], rtol=0, atol=1e-5)
    torch.testing.assert_close(left["history"]["elbo"], right["history"]["elbo"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["mixture", "noise of the row"])
def test_two_processes_are_one_with_the_doubled_batch(case, tmp_path):
    two = on_two_processes(case, 8, tmp_path / "two.pt")
    one = several.found(*several.train(case, 16, devices=1))
    assert two["steps"] == one["steps"] == 12
    assert two["left in the store"] == []
    assert_same(two, one)


def test_each_rank_draws_noise_of_its_own_and_again_the_same(tmp_path):
    first = on_two_processes("drawn", 4, tmp_path / "first.pt")
    again = on_two_processes("drawn", 4, tmp_path / "again.pt")
    assert first["seen"].shape == (2, 4)
    assert (first["seen"][0] != first["seen"][1]).all()  # the rows are all alike: only the noise can differ
    assert first["seen"].flatten().unique().numel() == 8
    assert torch.equal(first["seen"], again["seen"])


def test_one_process_is_our_fit():
    _, module = several.train("mixture", 16, devices=1)
    options = {"epochs": 4, "batch_size": 16, "lr": 0.05, "seed": 0, "capture": False}
    fit = lvm.fit((several.mixture, several.nothing), several.rows(), **options)
    found = module.to_fit()
    assert found.elbo == pytest.approx(fit.elbo, abs=1e-10)
    assert found.params.keys() == fit.params.keys()
    for name, value in fit.params.items():
        torch.testing.assert_close(found.params[name], value, rtol=0, atol=1e-10)
    for column in ("loss", "elbo"):
        assert found.history[column] == pytest.approx(fit.history[column], abs=1e-9)
    assert found.info["steps"] == 12
    assert found.info["stopped"] == "finished"


def test_the_process_is_left_as_it_was():
    before = torch.random.get_rng_state()
    several.train("drawn", 4, devices=1, epochs=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(pyro.get_param_store()) == 0


def test_parameters_go_both_ways(tmp_path):
    fit = lvm.fit((several.mixture, several.nothing), several.rows(), steps=3, seed=1)
    module = several.module_for("mixture", 8).start_from(fit)
    state = module.state_dict()
    assert state.keys() == fit._snapshot.keys()
    assert all(torch.equal(state[name], fit._snapshot[name]) for name in state)
    trainer, trained = several.train("mixture", 8, devices=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    fit._bound.load(stored)
    for name, value in fit._bound.constrained().items():
        assert torch.equal(value, trained.to_fit().params[name])


def test_foreign_parameters_are_refused():
    module = several.module_for("mixture", 8)
    with pytest.raises(RuntimeError, match=r"missing \['locs'\], unknown \['other'\].*what the same program left"):
        module.load_state_dict({"logits": torch.zeros(2), "other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"of another shape \['logits \(3,\) for \(2,\)'\]"):
        module.load_state_dict({"logits": torch.zeros(3)}, strict=False)


def test_every_trainable_parameter_is_the_modules():
    module = several.module_for("noise of the row", 8)
    registered = {id(parameter) for parameter in module.parameters()}
    trained = module.prepared.bound.trainable()
    assert {"at.shift", "noise.scale", "width"} <= trained.keys()
    assert {id(parameter) for parameter in trained.values()} == registered


def test_an_estimator_that_takes_its_own_gradients_is_refused():
    with pytest.raises(TypeError, match=r"RenyiELBO.*own gradients.*ImportanceWeighted"):
        SVIModule(lvm.PPCA(num_features=3, latent_dim=1), RenyiELBO(num_particles=2), data=several.rows())


def test_a_misspelt_site_is_an_error_before_any_process_starts():
    def guide(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("zz", pyro.distributions.Normal(pyro.param("loc", torch.zeros(())).expand(len(x)), 1.0))

    with pytest.raises(lvm.ProgramError, match="zz"):
        SVIModule((several.drawn, guide), data=several.rows())
