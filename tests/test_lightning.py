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


def on_two_processes(case: str, batch_size: int, out: Path, *folder: str) -> dict:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    run = subprocess.run(
        [sys.executable, *launcher, str(HERE / "process_of_several.py"), case, str(batch_size), str(out), *folder],
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


OF_THE_MIXTURE = {"batch_size": 16, "lr": 0.05, "seed": 0}


def our_fit(epochs=4, **options):
    options = {**OF_THE_MIXTURE, "capture": "auto", **options}
    return lvm.fit((several.mixture, several.nothing), several.rows(), epochs=epochs, **options)


def left_after(epoch, folder, **options):
    """A fit of four epochs that broke off after ``epoch``, in the folder."""

    def break_off(end):
        if end.epoch == epoch:
            raise RuntimeError("break off")

    with pytest.raises(RuntimeError, match="break off"):
        our_fit(checkpoint=folder, callbacks=[break_off], **options)


def assert_same_fit(left, right):
    assert left.params.keys() == right.params.keys()
    for name, value in right.params.items():
        torch.testing.assert_close(left.params[name], value, rtol=0, atol=1e-10)
    for column in ("loss", "elbo"):
        assert left.history[column] == pytest.approx(right.history[column], abs=1e-9)
    assert left.info["steps"] == right.info["steps"] == 12


@pytest.mark.parametrize("schedule", ["constant", "one cycle"])
def test_lightning_goes_on_from_our_checkpoint_and_we_from_its(schedule, tmp_path):
    rate = {"lr": 0.05 if schedule == "constant" else None}
    undisturbed = our_fit(**rate)
    left_after(2, tmp_path / "ours", **rate)
    trainer, module = several.train("mixture", 16, devices=1, checkpoint=tmp_path / "ours", **rate)
    assert trainer.current_epoch == 4
    assert trainer.global_step == 12
    assert_same_fit(module.to_fit(), undisturbed)

    lightnings = {"checkpoint": tmp_path / "lightnings", "total_steps": 12, **rate}
    several.train("mixture", 16, devices=1, epochs=3, **lightnings)
    resumed = our_fit(checkpoint=tmp_path / "lightnings", **rate)
    assert resumed.info["resumed_at"] == 9
    assert_same_fit(resumed, undisturbed)


def test_two_processes_go_on_from_our_checkpoint(tmp_path):
    undisturbed = our_fit()
    left_after(2, tmp_path / "ours")
    two = on_two_processes("mixture", 8, tmp_path / "two.pt", str(tmp_path / "ours"))
    assert two["steps"] == 12
    for name, value in undisturbed._snapshot.items():
        torch.testing.assert_close(two["state"][name], value, rtol=0, atol=1e-10)
    assert our_fit(checkpoint=tmp_path / "ours").info["resumed_at"] == 12  # it was finished there


def test_what_lightning_left_finished_is_not_trained_on(tmp_path):
    trainer, first = several.train("mixture", 16, devices=1, checkpoint=tmp_path / "run")
    trainer, again = several.train("mixture", 16, devices=1, checkpoint=tmp_path / "run")
    assert trainer.global_step == 12
    assert_same_fit(again.to_fit(), first.to_fit())


def test_lightnings_own_checkpoint_goes_on_to_the_same_end(tmp_path):
    _, undisturbed = several.train("drawn", 4, devices=1, total_steps=8)
    trainer, _ = several.train("drawn", 4, devices=1, epochs=2, total_steps=8)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    module = several.module_for("drawn", 4, total_steps=8)
    several.trainer_for(1, 4).fit(module, ckpt_path=tmp_path / "half.ckpt")
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(module.state_dict()[name], value)


def test_a_checkpoint_within_an_epoch_is_refused(tmp_path):
    left_after(2, tmp_path / "run", checkpoint_every=5)
    with pytest.raises(lvm.StorageError, match=r"is of step 5, 2 steps into an epoch.*pyro_lvm\.fit.*checkpoint_every"):
        several.train("mixture", 16, devices=1, checkpoint=tmp_path / "run")


def test_another_runs_checkpoint_is_refused(tmp_path):
    left_after(2, tmp_path / "run")
    with pytest.raises(lvm.StorageError, match="batch_size is 16 there and 8 here"):
        several.train("mixture", 8, devices=1, checkpoint=tmp_path / "run")


def test_batches_of_a_loader():
    x = several.rows()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=16)
    module = SVIModule((several.mixture, several.nothing), data=loader, lr=0.05, seed=0)
    trainer = several.trainer_for(1, 4)
    trainer.fit(module)
    fit = lvm.fit((several.mixture, several.nothing), loader, epochs=4, lr=0.05, seed=0, capture=False)
    assert_same_fit(module.to_fit(), fit)
    with pytest.raises(ValueError, match=r"changes a DataLoader's order.*pass arrays"):
        SVIModule((several.mixture, several.nothing), data=loader, checkpoint="here")


def test_a_row_that_is_not_finite_is_told_of_and_no_parameter_hears_of_it():
    class Late(torch.utils.data.Dataset):
        """Rows whose 20th is spoilt once it has been looked at."""

        reads = 0

        def __len__(self):
            return several.ROWS

        def __getitem__(self, row):
            self.reads += row == 20
            return several.rows()[row] * (torch.nan if row == 20 and self.reads > 3 else 1.0)

    module = SVIModule((several.mixture, several.nothing), data=Late(), batch_size=16, lr=0.05, seed=0)
    with pytest.raises(lvm.NonFiniteError, match=r"step \d: loss became NaN.*x.*NaN"):
        several.trainer_for(1, 9).fit(module)
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    assert torch.get_default_dtype() == torch.float32


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
