"""A fit that is interrupted ends where the undisturbed one ends, to the bit, and no good checkpoint is ever lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from filelock import FileLock
from small_programs import Normed, data, guide_of_mean, mixture, model_of_mean, nothing, rows
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

import pyro_lvm as lvm
from pyro_lvm.errors import StorageError
from pyro_lvm.inference.checkpoint import Checkpoints
from pyro_lvm.storage.files import read_tree, write_tree

pytestmark = pytest.mark.usefixtures("few_passes")

REPOSITORY = Path(__file__).parent.parent


class Interrupted(Exception):
    """Stands for the end of a process."""


@pytest.fixture
def interrupt(monkeypatch):
    """A function that lets checkpoints be written, and ends the fit right after the n-th of them."""
    save = Checkpoints.save

    def after(count):
        written = []

        def save_and_end(self, state):
            save(self, state)
            written.append(state["steps"])
            if len(written) == count:
                raise Interrupted

        monkeypatch.setattr(Checkpoints, "save", save_and_end)

    yield after
    monkeypatch.setattr(Checkpoints, "save", save)


def autoencoder(likelihood="normal"):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return lvm.VAE(3, 2, (8,), likelihood=likelihood)


def loader(generator=None):
    x = rows(20)
    return DataLoader(TensorDataset(x), batch_size=6, shuffle=True, generator=generator)


def labelled():
    x = torch.rand(40, 4, generator=torch.Generator().manual_seed(1)).round()
    y = torch.full((40,), -1)
    y[:6] = torch.arange(6) % 2
    return x, y


def half_supervised():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return lvm.SemiSupervisedVAE(4, num_classes=2, latent_dim=1, hidden=(6,))


class Baseline(nn.Module):
    """A line in x, trained beside the program."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(1, 1)
        with torch.no_grad():
            self.line.weight.fill_(0.1)
            self.line.bias.zero_()

    def forward(self, x, **_):
        return self.line(x[:, None])[:, 0]


CASES = {
    "mixture on all rows": lambda: {"program": (mixture, nothing), "data": data(), "steps": 23},
    "graph": lambda: {"program": autoencoder(), "data": rows(), "epochs": 4, "batch_size": 16, "capture": "graph"},
    "minibatches, last one short": lambda: {"program": autoencoder(), "data": rows(), "epochs": 5, "batch_size": 16},
    "an epoch cut short": lambda: {"program": autoencoder(), "data": rows(), "steps": 14, "batch_size": 16},
    "dropout and batch norm": lambda: {"program": Normed(dropout=0.3), "data": rows(), "epochs": 5, "batch_size": 16},
    "strata": lambda: {"program": half_supervised(), "data": labelled(), "epochs": 4, "batch_size": 10},
    "loader, global order": lambda: {"program": autoencoder(), "data": loader(), "epochs": 4},
    "loader, own order": lambda: {
        "program": autoencoder(),
        "data": loader(torch.Generator().manual_seed(3)),
        "epochs": 4,
    },
    "momentum and milestones": lambda: {
        "program": autoencoder(),
        "data": rows(),
        "epochs": 5,
        "batch_size": 16,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
        "scheduler": lambda optimizer: MultiStepLR(optimizer, [4, 9], 0.5),
    },
    "plateau and validation": lambda: {
        "program": autoencoder(),
        "data": rows(),
        "epochs": 8,
        "batch_size": 16,
        "lr": 0.05,
        "validation": 0.2,
        "scheduler": lambda optimizer: ReduceLROnPlateau(optimizer, patience=0),
    },
    "stopped early": lambda: {
        "program": (model_of_mean, guide_of_mean),
        "data": data(),
        "epochs": 200,
        "lr": 0.1,
        "early_stopping": lvm.EarlyStopping(patience=5, min_delta=1.0),
    },
    "in turns": lambda: {
        "program": autoencoder(),
        "data": rows(),
        "steps": 70,
        "batch_size": 16,
        "alternate": "until-converged",
    },
    "schedule of the estimator": lambda: {
        "program": autoencoder(),
        "data": rows(),
        "epochs": 5,
        "batch_size": 16,
        "elbo": lvm.elbo.KLWeighted(beta=lvm.schedules.linear(0, 1, until=0.8)),
    },
    "learned baselines": lambda: {
        "program": half_bernoulli,
        "data": data(),
        "steps": 20,
        "elbo": lvm.elbo.ScoreFunction(baseline=Baseline(), num_particles=2),
    },
}


def _bernoulli_model(x, size=None):
    with pyro.plate("data", size or len(x), subsample=x):
        k = pyro.sample("k", dist.Bernoulli(x.new_full((len(x),), 0.5)))
        pyro.sample("x", dist.Normal(2 * k, 1.0), obs=x)


def _bernoulli_guide(x, size=None):
    slope = pyro.param("slope", torch.tensor(0.1))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("k", dist.Bernoulli(logits=slope * x))


half_bernoulli = (_bernoulli_model, _bernoulli_guide)


def run(case, **more):
    options = CASES[case]() | more
    return lvm.fit(options.pop("program"), options.pop("data"), seed=11, **options)


def assert_same(one, other):
    assert one.params.keys() == other.params.keys()
    assert [name for name in one.params if not torch.equal(one.params[name], other.params[name])] == []
    assert one.history == other.history
    assert one.elbo == other.elbo
    assert one.info["stopped"] == other.info["stopped"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::pyro_lvm.ProgramWarning")
def test_an_interrupted_fit_ends_where_the_undisturbed_one_ends(case, interrupt, tmp_path):
    undisturbed = run(case)
    for written in (1, 2, 4):
        interrupt(written)
        with pytest.raises(Interrupted):
            run(case, checkpoint=tmp_path, checkpoint_every=2)
    interrupt(0)
    resumed = run(case, checkpoint=tmp_path, checkpoint_every=2)
    assert resumed.info["resumed_at"] == min(14, resumed.info["steps"])
    assert_same(resumed, undisturbed)


def test_killed_processes_go_on_to_the_same_end():
    command = [sys.executable, "-m", "benchmarks.kills", "--kills", "10"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=environment)
    assert told.returncode == 0, told.stdout + told.stderr
    found = json.loads(told.stdout.splitlines()[-1])
    assert sum(each["kills"] for each in found.values()) == 10
    assert all(each["different"] == 0 and each["runs"] >= 1 for each in found.values())


def test_a_compiled_fit_goes_on_in_another_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, pyro_lvm as lvm\n"
        "x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))\n"
        "torch.manual_seed(1)\n"
        "options = dict(epochs=6, batch_size=20, seed=2, capture='compiled', checkpoint_every=2)\n"
        "if sys.argv[2] == 'killed':\n"
        "    import os\n"
        "    from pyro_lvm.inference.checkpoint import Checkpoints\n"
        "    save = Checkpoints.save\n"
        "    def save_and_die(self, state):\n"
        "        save(self, state)\n"
        "        if state['steps'] == 10:\n"
        "            os.kill(os.getpid(), 9)\n"
        "    Checkpoints.save = save_and_die\n"
        "fit = lvm.fit(lvm.VAE(3, 1, (4,), likelihood='normal'), x, checkpoint=sys.argv[1], **options)\n"
        "print(fit.info['capture'], fit.info['resumed_at'], fit.elbo, {k: v.tolist() for k, v in fit.params.items()})\n"
    )

    def process(folder, how):
        command = [sys.executable, str(script), str(tmp_path / folder), how]
        return subprocess.run(command, capture_output=True, text=True, timeout=200)

    undisturbed = process("one", "whole").stdout.split(maxsplit=2)
    assert process("two", "killed").returncode == -signal.SIGKILL
    resumed = process("two", "whole").stdout.split(maxsplit=2)
    assert (undisturbed[1], resumed[1]) == ("None", "10")
    assert (undisturbed[0], undisturbed[2]) == (resumed[0], resumed[2])


def test_the_last_two_are_kept(tmp_path):
    run("graph", checkpoint=tmp_path, checkpoint_every=5)
    assert sorted(file.name for file in tmp_path.glob("step-*")) == [
        "step-000000000010.safetensors",
        "step-000000000012.safetensors",
    ]


def test_a_finished_fit_is_read_and_not_repeated(tmp_path):
    first = run("graph", checkpoint=tmp_path)
    steps = []
    again = run("graph", checkpoint=tmp_path, callbacks=[lambda end: steps.append(end.epoch)])
    assert steps == []
    assert again.info["resumed_at"] == 12
    assert_same(again, first)


def test_a_seed_that_nobody_named_is_that_of_the_checkpoint(interrupt, tmp_path):
    def unseeded():
        return lvm.fit(autoencoder(), rows(), epochs=3, batch_size=16, checkpoint=tmp_path, checkpoint_every=2)

    interrupt(2)
    with pytest.raises(Interrupted):
        unseeded()
    interrupt(0)
    resumed = unseeded()
    undisturbed = lvm.fit(autoencoder(), rows(), epochs=3, batch_size=16, seed=resumed.info["seed"])
    assert_same(resumed, undisturbed)


@pytest.mark.parametrize(
    ("epochs", "batch_size", "every"), [(5, 10, 4), (1000, None, 10), (250, 10, 10), (50, None, 1), (130, None, 2)]
)
def test_how_often_where_nobody_says(epochs, batch_size, every, tmp_path):
    checkpoints = Checkpoints(tmp_path, None, "auto", "warn")
    steps_per_epoch = 1 if batch_size is None else 40 // batch_size
    checkpoints.begin({}, epochs * steps_per_epoch, steps_per_epoch)
    with checkpoints.held():
        assert [step for step in range(1, 100) if checkpoints.due(step)] == list(range(every, 100, every))


# ------------------------------------------------------------------------------------------------- signals


def test_sigterm_writes_a_checkpoint_and_leaves_with_143(tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    def terminate(end):
        if end.epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as left:
        run("graph", checkpoint=tmp_path, checkpoint_every=100, callbacks=[terminate])
    assert left.value.code == 143
    assert [file.name for file in tmp_path.glob("step-*")] == ["step-000000000007.safetensors"]
    assert signal.getsignal(signal.SIGTERM) is before
    assert_same(run("graph", checkpoint=tmp_path, checkpoint_every=100), run("graph"))


def test_a_handler_that_was_there_is_asked_after_the_checkpoint(tmp_path):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(len(list(tmp_path.glob("step-*")))))
    try:
        fit = run(
            "graph",
            checkpoint=tmp_path,
            checkpoint_every=100,
            callbacks=[lambda end: os.kill(os.getpid(), signal.SIGTERM) if end.epoch == 2 else None],
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [1]
    assert_same(fit, run("graph"))


def test_ctrl_c_leaves_the_last_checkpoint_to_go_on_from(tmp_path):
    def interrupted(end):
        if end.epoch == 2:
            raise KeyboardInterrupt

    part = run("graph", checkpoint=tmp_path, checkpoint_every=2, callbacks=[interrupted])
    assert part.info["stopped"] == "interrupted after 2 epochs"
    assert_same(run("graph", checkpoint=tmp_path, checkpoint_every=2), run("graph"))


# ------------------------------------------------------------------------------------------------- refusals


def full_after(monkeypatch, count):
    sync, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > count:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_is_told_of_and_the_fit_goes_on(tmp_path, monkeypatch):
    undisturbed = run("graph")
    full_after(monkeypatch, 4)  # two files, and their names
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit = run("graph", checkpoint=tmp_path, checkpoint_every=3)
    words = [str(warning.message) for warning in told if warning.category is RuntimeWarning]
    assert [each.split(":")[0] for each in words] == [f"no checkpoint of step {step}" for step in (9, 12, 12)]
    assert all("cannot be written (No space left on device): see to room" in each for each in words)
    assert_same(fit, undisturbed)
    assert sorted(file.name[-14:-12] for file in tmp_path.glob("step-*")) == ["03", "06"]
    monkeypatch.undo()
    assert_same(run("graph", checkpoint=tmp_path, checkpoint_every=3), undisturbed)


def test_a_full_disk_ends_the_fit_where_that_is_asked(tmp_path, monkeypatch):
    full_after(monkeypatch, 4)
    with pytest.raises(StorageError, match=r"step-0+9\.safetensors cannot be written \(No space left on device\)"):
        run("graph", checkpoint=tmp_path, checkpoint_every=3, on_checkpoint_error="raise")
    monkeypatch.undo()
    assert_same(run("graph", checkpoint=tmp_path, checkpoint_every=3), run("graph"))


def test_a_folder_that_cannot_be_written_to_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    vae = autoencoder()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    with pytest.raises(StorageError, match=r"file is a file: name a folder"):
        lvm.fit(vae, rows(), steps=3, checkpoint=tmp_path / "file")
    with pytest.raises(StorageError, match=r"cannot be written to \(Not a directory\): name a folder that can"):
        lvm.fit(vae, rows(), steps=3, checkpoint=tmp_path / "file" / "folder")
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_two_fits_do_not_share_a_folder(tmp_path):
    with FileLock(tmp_path / "lock"), pytest.raises(StorageError, match="belongs to a fit that is running"):
        run("graph", checkpoint=tmp_path)
    run("graph", checkpoint=tmp_path)


def test_a_folder_is_given_up_when_the_fit_fails(tmp_path):
    def fail(end):
        raise Interrupted

    with pytest.raises(Interrupted):
        run("graph", checkpoint=tmp_path, callbacks=[fail])
    run("graph", checkpoint=tmp_path)


def turn_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(interrupt, tmp_path):
    interrupt(3)
    with pytest.raises(Interrupted):
        run("graph", checkpoint=tmp_path, checkpoint_every=2)
    interrupt(0)
    turn_a_bit(tmp_path / "step-000000000006.safetensors")
    with pytest.warns(RuntimeWarning, match=r"step-0+6\.safetensors is damaged.*The fit goes on from step 4"):
        fit = run("graph", checkpoint=tmp_path, checkpoint_every=2)
    assert fit.info["resumed_at"] == 4
    assert_same(fit, run("graph"))


def test_where_none_can_be_read_nothing_is_begun_anew(tmp_path):
    run("graph", checkpoint=tmp_path, checkpoint_every=5)
    files = sorted(tmp_path.glob("step-*"))
    for file in files:
        turn_a_bit(file)
    with pytest.raises(StorageError, match=r"no checkpoint in .* can be read: .*step-0+12\.safetensors is damaged"):
        run("graph", checkpoint=tmp_path, checkpoint_every=5)
    assert sorted(tmp_path.glob("step-*")) == files


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    (tmp_path / "step-000000000004.safetensors.1.part").write_bytes(b"half")
    run("graph", checkpoint=tmp_path)
    assert not list(tmp_path.glob("*.part"))


DIFFERENT = {
    "batch": ({"batch_size": 10}, r"batch_size is 16 there and 10 here"),
    "rate": ({"lr": 0.5}, r"optimizer is Adam\(lr=0\.002\), OneCycleLR over 12 steps there and Adam\(lr=0\.5\)"),
    "length": ({"epochs": 6}, r"total_steps is 12 there and 18 here"),
    "estimator": ({"elbo": pyro.infer.Trace_ELBO()}, r"estimator is TraceMeanField_ELBO\(\) there and Trace_ELBO"),
    "data": ({"data": rows(seed=4)}, r"data is \w{64} there and \w{64} here"),
    "program": ({"program": lvm.VAE(3, 1, (8,), likelihood="normal")}, r"tensors '[\w.]+' is torch.float64 \(4, 8\)"),
    "validation": ({"validation": rows(seed=4)}, r"validation is None there"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_fit_does_not_go_on_from_a_checkpoint(name, tmp_path):
    more, words = DIFFERENT[name]
    run("graph", checkpoint=tmp_path)
    files = {file: file.read_bytes() for file in tmp_path.glob("step-*")}
    with pytest.raises(StorageError, match=f"holds checkpoints of another fit .*{words}.*repeat the call"):
        run("graph", checkpoint=tmp_path, **more)
    assert {file: file.read_bytes() for file in tmp_path.glob("step-*")} == files


def test_another_seed_is_another_fit(tmp_path):
    run("graph", checkpoint=tmp_path)
    with pytest.raises(StorageError, match="seed is 11 there and 12 here"):
        lvm.fit(autoencoder(), rows(), epochs=4, batch_size=16, capture="graph", seed=12, checkpoint=tmp_path)


def test_other_versions_are_warned_of(tmp_path):
    run("graph", checkpoint=tmp_path)
    last = max(tmp_path.glob("step-*"))
    tree = read_tree(last)
    tree["made"]["surroundings"]["torch"] = "1.0"
    write_tree(last, tree)
    with pytest.warns(
        lvm.ProgramWarning, match=rf"was written with torch 1\.0 there, {torch.__version__.split('+')[0]}"
    ):
        run("graph", checkpoint=tmp_path)


def test_what_resume_promises_is_kept(tmp_path):
    with pytest.raises(StorageError, match="holds no checkpoint to go on from: check the path"):
        run("graph", checkpoint=tmp_path, resume=True)
    run("graph", checkpoint=tmp_path, resume=False)
    with pytest.raises(StorageError, match="holds checkpoints, the last of step 12, and resume=False would write over"):
        run("graph", checkpoint=tmp_path, resume=False)
    assert run("graph", checkpoint=tmp_path, resume=True).info["resumed_at"] == 12


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"checkpoint_every": 3}, ValueError, "checkpoint_every is given, but no folder"),
        ({"resume": True}, ValueError, "resume is given, but no folder"),
        ({"checkpoint": 3}, TypeError, "checkpoint is 3: it must be the path of a folder"),
        ({"checkpoint": "a", "resume": "yes"}, ValueError, "resume='yes' is not known"),
        ({"checkpoint": "a", "on_checkpoint_error": "skip"}, ValueError, "on_checkpoint_error='skip' is not known"),
        ({"checkpoint": "a", "checkpoint_every": 0}, ValueError, "checkpoint_every is 0: it must be positive"),
    ],
)
def test_arguments_are_looked_at_first(options, error, words):
    with pytest.raises(error, match=words):
        run("graph", **options)


def test_a_number_of_the_program_that_has_changed_is_warned_of(interrupt, tmp_path):
    class Weighted(Normed):
        weight = 1.0

        def __init__(self):
            super().__init__()
            self.times = 0.5

        def guide(self, x, size=None):
            with pyro.plate("data", size or len(x), subsample=x):
                pyro.sample("z", dist.Normal(self.times * self.network(x)[:, 0], 0.5))

    program = Weighted()

    def more(end):
        program.times += 0.25

    options = {"program": program, "callbacks": [more], "checkpoint": tmp_path, "checkpoint_every": 4}
    interrupt(1)
    with pytest.raises(Interrupted):
        run("dropout and batch norm", **options)
    interrupt(0)
    program.times = 0.5
    with pytest.warns(
        lvm.ProgramWarning, match=r"times was 0\.75 when the checkpoint was written and is 0\.5 now: set"
    ):
        run("dropout and batch norm", **options)


@pytest.mark.parametrize("more", [{"callbacks": [lambda end: torch.rand(3)]}, {"progress": True}, {"checkpoint": True}])
def test_looking_on_changes_no_weight(more, tmp_path):
    if "checkpoint" in more:
        more = {"checkpoint": tmp_path, "checkpoint_every": 1}
    looked_at, alone = run("minibatches, last one short", **more), run("minibatches, last one short")
    assert_same(looked_at, alone)


def test_validation_rows_of_their_own_change_no_weight():
    looked_at = run("minibatches, last one short", validation=rows(seed=9))
    alone = run("minibatches, last one short")
    assert all(torch.equal(value, alone.params[name]) for name, value in looked_at.params.items())
