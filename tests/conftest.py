"""What holds for every test: its own seed, validation on, and the process left as it was found."""

from __future__ import annotations

import os
import pathlib
import pickle
from collections.abc import Iterator

import numpy as np
import pyro
import pytest
import torch

REPOSITORY = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def the_process_stays_as_it_is() -> Iterator[None]:
    """Seed, validate, and check that parameters belong to fits and not to the process.

    A test that compares with plain Pyro and needs `pyro.param` does so inside `with pyro.get_param_store().scope():`.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield
        left_behind = sorted(pyro.get_param_store().keys())
        validating = (pyro.poutine.util.is_validation_enabled(), pyro.distributions.is_validation_enabled())
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()  # one guilty test is to be reported once
    assert not left_behind, f"the test left parameters in Pyro's global store: {left_behind}"
    assert all(validating), "the test left Pyro's validation switched off"
    assert dtype is torch.float32, f"the test left torch's default dtype at {dtype}"


@pytest.fixture
def few_passes() -> Iterator[None]:
    """For tests of how a fit comes about: to know to 0.01 nats what a few steps reach takes a thousand passes."""
    with pytest.MonkeyPatch.context() as patch:  # a test may undo its own
        patch.setattr("pyro_lvm.inference.bound.MAX_PASSES", 10)
        yield


@pytest.fixture
def global_generators_stay() -> Iterator[None]:
    """For code that has generators of its own: torch's and numpy's global ones end where they began."""

    def states() -> tuple[torch.Tensor, bytes]:
        return torch.get_rng_state(), pickle.dumps(np.random.get_state())  # noqa: NPY002

    torch_before, numpy_before = states()
    yield
    torch_after, numpy_after = states()
    assert torch.equal(torch_before, torch_after), "the test moved torch's global generator"
    assert numpy_before == numpy_after, "the test moved numpy's global generator"


@pytest.fixture(scope="session")
def data_root() -> pathlib.Path:
    """The folder of real data, laid out for torchvision (`MNIST/raw/...`): $LVM_DATA, else ../shared/data."""
    named = os.environ.get("LVM_DATA")
    root = pathlib.Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if named and not root.is_dir():
        pytest.fail(f"LVM_DATA={named} is not a folder: correct it, or unset it to skip the tests on real data")
    if not (root / "MNIST" / "raw" / "train-images-idx3-ubyte").exists():
        pytest.skip(f"REAL DATA ABSENT: no MNIST/raw/train-images-idx3-ubyte under {root}; set LVM_DATA to its folder")
    return root


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say once, at the end and in capitals, that a green run has not seen the real data."""
    skipped = [
        report for report in terminalreporter.stats.get("skipped", []) if "REAL DATA ABSENT" in str(report.longrepr)
    ]
    if skipped:
        terminalreporter.section("REAL DATA ABSENT")
        terminalreporter.line(f"{len(skipped)} tests were skipped: set LVM_DATA to the folder that holds MNIST/raw.")
