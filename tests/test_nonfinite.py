"""No NaN and no infinity reaches a parameter, and what it came from is named."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from small_programs import Normed, data, rows
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.data import Batch
from pyro_lvm.inference import guard, nonfinite
from pyro_lvm.inference.adam import FusedAdam
from pyro_lvm.inference.buffers import Buffers
from pyro_lvm.missing import ObservedPart
from pyro_lvm.structure import trace_structure

LEVELS = [False, "graph"]


class Drawn:
    """Rows that are drawn anew in every epoch; in the second one a value is not finite, which no check can foresee."""

    def __init__(self, x, bad=True):
        self.x, self.bad = x, bad

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]

    def redraw(self, epoch, seed):
        x = self.x.clone()
        if epoch == 1 and self.bad:
            x[1400, 1] = torch.nan
        return Drawn(x)


def with_a_bad_row():
    return Drawn(rows(1500))


def autoencoder():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return lvm.VAE(3, 2, (8,), likelihood="normal").double()


def values(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(one, other):
    return [name for name in one if not torch.equal(one[name], other[name])] == []


class Scaled(nn.Module):
    """A Normal whose scale is the exponential of a parameter: constant data drive it to nought."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(x.new_zeros(2), self.log_scale.exp()).to_event(1), obs=x)

    def guide(self, x, size=None):
        """Nothing is latent."""


@pytest.mark.parametrize("capture", LEVELS)
@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD])
def test_nan_in_a_batch_is_found_and_the_parameters_are_those_before_it(capture, optimizer):
    options = {"batch_size": 100, "lr": 1e-4, "seed": 4, "capture": capture, "optimizer": optimizer}
    vae = autoencoder()
    words = r"step (\d+): loss became NaN.*data holds NaN or infinite values in 1 of 100 rows \(column 1 of 3\), the"
    words += " first in row 1400 of"
    with pytest.raises(lvm.NonFiniteError, match=rf"{words}.*drop or impute such rows") as error:
        lvm.fit(vae, with_a_bad_row(), epochs=2, **options)
    step = int(str(error.value).split(":")[0].removeprefix("step "))
    assert 15 < step <= 30
    before = autoencoder()
    lvm.fit(before, Drawn(rows(1500), bad=False), steps=step - 1, **options)
    assert same(values(vae), values(before))
    assert vae.training == before.training


def test_compiled_steps_are_guarded_too():
    vae = autoencoder()
    with pytest.raises(lvm.NonFiniteError, match="the first in row 1400 of the data"):
        lvm.fit(vae, with_a_bad_row(), epochs=2, batch_size=100, lr=1e-4, seed=4, capture="compiled")
    assert all(torch.isfinite(value).all() for value in vae.state_dict().values())


def test_nan_in_a_weight_is_named():
    class Broken(Scaled):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.tensor([0.0, torch.nan], dtype=torch.float64))

        def model(self, x, size=None):
            with pyro.plate("data", size or len(x), subsample=x):
                loc = self.shift if len(x) < 40 else self.shift.nan_to_num()  # what is traced first is sound
                pyro.sample("x", dist.Normal(loc, self.log_scale.exp()).to_event(1), obs=x)

    broken = Broken()
    words = r"parameter shift is not finite \(from \S+ to \S+, 1 of 2 not finite\).*site 'x' .*its loc.*fresh=True"
    with pytest.raises(lvm.NonFiniteError, match=words):
        lvm.fit(broken, rows(42, 2), epochs=1, batch_size=40, seed=0, check=False)
    assert torch.isfinite(broken.log_scale).all()


@pytest.mark.parametrize("capture", LEVELS)
def test_a_scale_that_goes_to_nought_is_named_with_its_column(capture):
    """Two constant columns: the likelihood has no bound, and the scale falls until its square is nought."""
    scaled = Scaled()
    words = (
        r"step \d+: .*site 'x' \(test_nonfinite\.py:\d+\): .*Normal with loc from 0 to 0, scale from .*The rows of the"
    )
    with pytest.raises(
        lvm.NonFiniteError, match=rf"{words}.*scale of site 'x'.*put a floor under it, or drop a column"
    ):
        lvm.fit(scaled, torch.zeros(20, 2, dtype=torch.float64), steps=2000, lr=2.0, seed=0, capture=capture)
    assert torch.isfinite(scaled.log_scale).all()
    assert (scaled.log_scale < -100).all()


class ScaledColumns(Scaled):
    """The same with a scale for each of five columns."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(x.new_zeros(5), self.log_scale.exp()).to_event(1), obs=x)


@pytest.mark.parametrize("constant", [[3], [1, 3]])
def test_the_constant_columns_are_named(constant):
    x = rows(20, 5)
    x[:, constant] = 0.0
    entries = "entry 3 of 5" if constant == [3] else r"entries \[1, 3\] of 5"
    columns = entries.replace("entry", "column").replace("entries", "columns")
    with pytest.raises(
        lvm.NonFiniteError,
        match=rf"(its log-probability|the gradient of its log-probability in scale) \({entries}\) not finite.*"
        rf"; its scale is \S+ \({entries}\).*scale of site 'x' \S+ has come down to \S+ \({entries}\): put a floor.*"
        rf"that does not vary \(constant in all 20 rows of data, at 0: {columns}\)",
    ):
        lvm.fit(ScaledColumns(), x, steps=2000, lr=2.0, seed=0, capture=False)


def test_entries_of_arguments_and_values_are_named():
    def site(fn, value):
        def model(**_):
            pyro.sample("x", fn, obs=value)

        return trace_structure(model, lambda **_: None, Batch((), {}, 1, None)).model["x"]

    loc = torch.zeros(4, 7)
    loc[2, 5] = torch.nan
    told = nonfinite._of_site(site(dist.Normal(loc, 1.0, validate_args=False).to_event(1), torch.zeros(4, 7)))
    assert "its loc (entry 5 of 7) not finite" in told
    tril = torch.eye(3)
    tril[1, 0] = torch.inf
    fn = dist.MultivariateNormal(torch.zeros(3), scale_tril=tril, validate_args=False)
    assert "its scale_tril (entry 1 of 3) not finite" in nonfinite._of_site(site(fn, torch.zeros(3)))
    fn = dist.Normal(torch.zeros(2, 3), 1.0).to_event(2)
    value = torch.full((2, 3), torch.inf)
    assert "its value (all 6 entries) not finite" in nonfinite._of_site(site(fn, value))
    value[:, 1:] = 0.0
    assert "its value (entries [(0, 0), (1, 0)] of 6)" in nonfinite._of_site(site(fn, value))
    value = torch.full((20,), torch.inf)
    value[:3] = 0.0
    told = nonfinite._of_site(site(dist.Normal(torch.zeros(20), 1.0).to_event(1), value))
    assert "its value (entries [3, 4, 5, 6, 7, ...] of 20, 17 in all)" in told
    assert "its value not finite" in nonfinite._of_site(site(dist.Normal(0.0, 1.0), torch.tensor(torch.nan)))
    observed = ObservedPart(dist.Normal(torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]), validate_args=False).to_event(1))
    told = nonfinite._of_site(site(observed, torch.tensor([0.0, 1.0, torch.nan])))
    assert "its log-probability (entry 1 of 3) not finite" in told
    assert "its scale is 0 (entry 1 of 3)" in told


@pytest.mark.parametrize("capture", LEVELS)
def test_a_rate_of_a_million_is_named(capture):
    vae = autoencoder()
    with pytest.raises(lvm.NonFiniteError, match=r"step \d+: .*site '\w+' .*smaller rate|put a floor under it"):
        lvm.fit(vae, rows(200), steps=200, lr=1e6, optimizer=torch.optim.SGD, seed=0, capture=capture)
    assert all(torch.isfinite(value).all() for value in vae.state_dict().values())


def test_a_column_without_variance_in_a_mixture_is_sound():
    """The floor of the mixture keeps it finite: no false alarm."""
    x = rows(60, 2)
    x[:, 1] = 3.0
    fit = lvm.fit(lvm.GaussianMixture(2, 2, "diag"), x, steps=300, seed=0)
    assert fit.info["stopped"] == "finished"


def test_what_torch_refuses_to_decompose_is_named():
    class Covariance(nn.Module):
        def __init__(self):
            super().__init__()
            self.entry = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def model(self, x, size=None):
            covariance = torch.stack(
                [torch.stack([x.new_ones(()), self.entry]), torch.stack([self.entry, x.new_ones(())])]
            )
            with pyro.plate("data", size or len(x), subsample=x):
                pyro.sample(
                    "x", dist.MultivariateNormal(x.new_zeros(2), scale_tril=torch.linalg.cholesky(covariance)), obs=x
                )

        def guide(self, x, size=None):
            """Nothing is latent."""

    module = Covariance()
    x = rows(30, 2)
    x[:, 1] = x[:, 0]
    before = module.entry.item()
    # the matrix is finite, so that torch's own words are the right ones
    with pytest.raises(torch.linalg.LinAlgError, match="positive-definite"):
        lvm.fit(module, x, steps=500, lr=0.3, seed=0, capture=False)
    assert torch.isfinite(module.entry)
    assert module.entry.item() != before


# --------------------------------------------------------------------------------------------------------- modes


def test_a_skipped_step_is_counted_and_changes_nothing(monkeypatch):
    taken = []
    step = FusedAdam.step

    def counting(self, closure=None):
        taken.append(float(next(iter(self.state.values()))["step"]) if self.state else 0.0)
        return step(self, closure)

    monkeypatch.setattr(FusedAdam, "step", counting)
    fit = lvm.fit(autoencoder(), with_a_bad_row(), epochs=3, batch_size=100, lr=1e-4, seed=4, on_nonfinite="skip")
    assert fit.history["skipped"] == [0, 1, 0]
    assert "restores" not in fit.history
    assert taken == [float(count) for count in range(44)]
    assert all(torch.isfinite(value).all() for value in fit.params.values())
    assert all(abs(value) < 100 for value in fit.history["elbo"])


def test_where_one_step_after_the_other_is_left_out_the_fit_ends():
    scaled = Scaled()
    with torch.no_grad():
        scaled.log_scale.fill_(-400.0)
    with pytest.raises(lvm.NonFiniteError, match=r"step 20 \(the 20th in a row\): .*site 'x'.*put a floor under it"):
        lvm.fit(scaled, rows(20, 2), steps=50, lr=0.1, seed=0, on_nonfinite="skip", check=False)


class Steep(nn.Module):
    """log p has a slope of one, and ends at nought: a step of more than the way there is not finite."""

    def __init__(self):
        super().__init__()
        self.root = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(self.root.sqrt(), 1.0), obs=x)

    def guide(self, x, size=None):
        """Nothing is latent."""


STEEP = {"steps": 60, "seed": 0, "optimizer": torch.optim.SGD, "lr": 8.0, "capture": False}


def test_restoring_halves_the_rate_until_it_is_small_enough():
    steep = Steep()
    fit = lvm.fit(steep, data() * 0.1 + 0.4, on_nonfinite="restore", **STEEP)
    assert fit.info["restores"] == sum(fit.history["restores"]) > 0
    assert "skipped" not in fit.history  # a restore undoes more than a step
    assert torch.isfinite(steep.root)
    with pytest.raises(
        lvm.NonFiniteError, match=r"step \d+ \(after 1 restores at lower and lower rates\): loss became"
    ):
        lvm.fit(Steep(), data() * 0.1 + 0.4, on_nonfinite=("restore", 1), **STEEP)


class Outlying:
    """Rows of which those of epoch 40 lie far off: the step they ask for leaves nothing finite."""

    def __init__(self, x, ends_at=None):
        self.x, self.ends_at = x, ends_at

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]

    def redraw(self, epoch, seed):
        if epoch == self.ends_at:
            raise InterruptedError
        return Outlying(self.x - 100.0 if epoch == 40 else self.x, self.ends_at)


@pytest.mark.parametrize("every", [1, 7, 41])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, None])
def test_checkpoints_do_not_change_where_a_restore_goes(every, optimizer, tmp_path):
    x = data() * 0.1 + 0.4

    def run(ends_at=None, **more):
        options = STEEP | {"optimizer": optimizer, "lr": 0.1 if optimizer else 0.8}
        return lvm.fit(Steep(), Outlying(x, ends_at), on_nonfinite="restore", **(options | more))

    def equal(one, other):
        return one.history == other.history and same(dict(one.params), dict(other.params))

    alone = run()
    assert alone.info["restores"] > 0
    assert equal(run(checkpoint=tmp_path / "beside", checkpoint_every=every), alone)
    for ends_at in (39, 41, 42, 45):
        there = {"checkpoint": tmp_path / f"until {ends_at}", "checkpoint_every": every}
        with pytest.raises(InterruptedError):
            run(ends_at, **there)
        resumed = run(**there)
        assert (resumed.info["resumed_at"] or 0) == ends_at // every * every
        assert equal(resumed, alone)


@pytest.mark.parametrize("words", ["ignore", ("restore", 1, 2), None])
def test_unknown_modes_are_refused(words):
    with pytest.raises(ValueError, match="is not known: use 'raise', 'skip', 'restore', or"):
        lvm.fit(autoencoder(), rows(), steps=1, on_nonfinite=words)


def test_skipping_goes_on_from_a_checkpoint(tmp_path):
    def run(**more):
        options = {"epochs": 3, "batch_size": 100, "lr": 1e-4, "seed": 4, "on_nonfinite": "skip"} | more
        return lvm.fit(autoencoder(), with_a_bad_row(), **options)

    class Interrupted(Exception):
        pass

    def end(epoch):
        if epoch.epoch == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(checkpoint=tmp_path, checkpoint_every=7, callbacks=[end])
    resumed, undisturbed = run(checkpoint=tmp_path, checkpoint_every=7), run()
    assert resumed.info["resumed_at"] == 28
    assert resumed.history == undisturbed.history
    assert same(dict(resumed.params), dict(undisturbed.params))


def test_another_default_dtype_is_no_matter():
    torch.set_default_dtype(torch.float64)
    try:
        fit = lvm.fit(autoencoder(), rows(), steps=3, seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert fit.info["steps"] == 3


# ------------------------------------------------------------------------------------------------ the deferred way


@pytest.mark.parametrize("capture", LEVELS)
def test_where_the_flag_is_read_later_nothing_has_moved_since(capture, monkeypatch):
    def ended(every):
        monkeypatch.setitem(guard.STEPS_BETWEEN_READS, "cpu", every)
        vae = autoencoder()
        with pytest.raises(lvm.NonFiniteError) as error:
            lvm.fit(vae, with_a_bad_row(), epochs=2, batch_size=100, lr=1e-3, seed=4, capture=capture)
        return str(error.value), values(vae)

    (at_once, there), (later, also_there) = ended(1), ended(50)
    assert at_once == later
    assert same(there, also_there)


def test_a_masked_update_leaves_moments_and_counter(monkeypatch):
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    adam = FusedAdam(weights, 0.1)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.full_like(weight, 0.5)
        adam.step()
    before = copy.deepcopy(adam.state_dict()), [weight.detach().clone() for weight in weights]
    adam.step()  # makes the lists anew after they have been read
    adam.load_state_dict(copy.deepcopy(before[0]))
    with torch.no_grad():
        for weight, value in zip(weights, before[1], strict=True):
            weight.copy_(value)
    for found in (1.0, 1.0):
        adam.found_inf = torch.tensor(found)
        for weight in weights:
            weight.grad = torch.full_like(weight, torch.nan)
        adam.step()
    del adam.found_inf
    after = adam.state_dict()
    for number, state in before[0]["state"].items():
        assert all(torch.equal(value, after["state"][number][name]) for name, value in state.items())
    assert all(torch.equal(weight, value) for weight, value in zip(weights, before[1], strict=True))


def test_batch_norm_keeps_what_it_knew():
    def batches_seen(data):
        normed = Normed().double()
        lvm.fit(normed, data, epochs=2, batch_size=100, lr=1e-3, seed=4, on_nonfinite="skip")
        norm = normed.network[1]
        assert torch.isfinite(norm.running_mean).all()
        return norm.num_batches_tracked

    assert batches_seen(with_a_bad_row()) == batches_seen(Drawn(rows(1500), bad=False)) - 1


class Keeping(nn.Module):
    """Buffers that a forward pass changes in every way there is, and one that it leaves alone."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.register_buffer("total", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("old", torch.zeros(3, dtype=torch.float64), persistent=False)
        self.register_buffer("late", torch.zeros((), dtype=torch.float64))
        self.register_buffer("constant", torch.ones(3, dtype=torch.float64))

    def model(self, x, size=None):
        if self.training:
            self.seen += len(x)
            self.total = self.total + x.detach().sum(0)
            self.old.data.add_(x.detach().sum(0))
            if self.seen > 450:
                self.late.add_(1.0)
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(self.loc, self.constant).to_event(1), obs=x)

    def guide(self, x, size=None):
        """Nothing is latent."""


def buffers_after(data, steps, mode, every, monkeypatch):
    monkeypatch.setitem(guard.STEPS_BETWEEN_READS, "cpu", every)
    keeping = Keeping()
    options = {"steps": steps, "batch_size": 100, "lr": 1e-4, "seed": 4, "on_nonfinite": mode, "capture": False}
    if mode == "raise" and data.bad:
        with pytest.raises(lvm.NonFiniteError):
            lvm.fit(keeping, data, **options)
    else:
        lvm.fit(keeping, data, **options)
    return {name: buffer.clone() for name, buffer in keeping.named_buffers()}


@pytest.mark.parametrize("every", [1, 50])
def test_every_buffer_that_a_step_changed_is_put_back(every, monkeypatch):
    steps = next(n for n in range(16, 31) if bad_rows_in(n))
    found = buffers_after(with_a_bad_row(), 30, "raise", every, monkeypatch)
    before = buffers_after(Drawn(rows(1500), bad=False), steps - 1, "raise", every, monkeypatch)
    assert found["late"] > 0
    assert same(found, before)


def bad_rows_in(steps):
    """Whether so many steps see the row that is not finite."""
    try:
        lvm.fit(autoencoder(), with_a_bad_row(), steps=steps, batch_size=100, lr=1e-4, seed=4, capture=False)
    except lvm.NonFiniteError:
        return True
    return False


@pytest.mark.parametrize("capture", [False, "graph", "compiled"])
def test_a_skipped_step_leaves_no_mark_in_a_buffer(capture):
    class Counting(Keeping):
        def model(self, x, size=None):
            if self.training:
                self.total.add_(x.detach().sum(0))
                self.seen.add_(len(x))
            with pyro.plate("data", size or len(x), subsample=x):
                pyro.sample("x", dist.Normal(self.loc, self.constant).to_event(1), obs=x)

    def after(data):
        counting = Counting()
        options = {"epochs": 2, "batch_size": 100, "lr": 1e-4, "seed": 4, "on_nonfinite": "skip", "capture": capture}
        fit = lvm.fit(counting, data, **options)
        assert fit.info["capture"] == (capture or "eager")
        assert torch.isfinite(counting.total).all()
        return counting.seen

    assert after(with_a_bad_row()) == after(Drawn(rows(1500), bad=False)) - 100


def test_buffers_at_rest_are_copied_once():
    keeping = Keeping()
    buffers = Buffers([keeping, keeping])
    first = {known.name: known.values for known in buffers.remember()}
    assert len(first) == 5
    keeping.seen += 1
    second = {known.name: known.values for known in buffers.remember()}
    third = {known.name: known.values for known in buffers.remember()}
    assert all(second[name] is third[name] for name in first if name != "seen")
    assert second["seen"] is not third["seen"]
    keeping.constant.fill_(5.0)
    buffers.start_anew()
    known = next(known for known in buffers.remember() if known.name == "constant")
    assert not known.changed()
    keeping.constant.fill_(6.0)
    known.put_back()
    assert keeping.constant.tolist() == [5.0] * 3
