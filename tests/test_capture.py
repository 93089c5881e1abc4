"""A captured step gives what Pyro gives: parameters, history and bound are the same to the bit under one seed."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import AffineCoupling, affine_autoregressive
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from small_programs import (
    Amortised,
    data,
    guide_of_mean,
    mixture,
    model_of_mean,
    nothing,
    process_left_alone,
    rows,
    same_state,
    state_of,
)
from torch import nn
from torch.distributions import constraints
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

import pyro_lvm as lvm
from pyro_lvm.capture.graph import CapturedStep
from pyro_lvm.capture.step import Step
from pyro_lvm.data import as_rows
from pyro_lvm.datasets.binarized import Binarized
from pyro_lvm.elbo.estimator import make_estimator
from pyro_lvm.inference import bound
from pyro_lvm.parameters import BoundProgram
from pyro_lvm.program import as_program
from pyro_lvm.structure import trace_structure


@pytest.fixture(autouse=True)
def few_passes(monkeypatch):
    """How well the bound is known in the end is another test's affair."""
    monkeypatch.setattr(bound, "MAX_PASSES", 2)


def fitted(capture, make, x, callbacks=(), **options):
    """A fit of the program that ``make`` makes, new and from one start, and the program."""
    torch.manual_seed(7)
    program = make()
    options = {"steps": 12, "batch_size": 10, "seed": 3, "progress": False} | options
    if "epochs" in options:
        del options["steps"]
    followed = [callback(program) for callback in callbacks]
    return lvm.fit(program, x, capture=capture, callbacks=followed, **options), program


def both(make, x, level="graph", **options):
    """The eager and the captured fit, with their programs; the second at the level that was asked for."""
    eager, program = fitted(False, make, x, **options)
    captured, other = fitted(level, make, x, **options)
    assert eager.info["capture"] == "eager"
    assert captured.info["capture"] == level, captured.info["capture_reason"]
    return eager, captured, program, other


def agree(make, x, **options):
    """Both fits, once all that they tell is found to be the same to the bit."""
    eager, captured, program, other = both(make, x, **options)
    assert eager.params.keys() == captured.params.keys()
    for name, value in eager.params.items():
        assert torch.equal(value, captured.params[name]), name
    assert eager.history == captured.history
    assert eager.elbo == captured.elbo
    for key in ("stopped", "epochs", "steps", "elbo_se", "elbo_passes", "estimator"):
        assert eager.info[key] == captured.info[key]
    if isinstance(program, nn.Module):
        assert same_state(other, state_of(program))
    return eager, captured


def pair(*functions):
    return lambda: functions


def local_model(x, size=None, index=None):
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, pyro.param("noise", torch.tensor(0.7), constraints.positive)), obs=x)


def local_guide(x, size=None, index=None):
    with pyro.plate("data", size or len(x), subsample=index):
        loc = pyro.param("loc", torch.zeros(size or len(x)), event_dim=0)
        pyro.sample("z", dist.Normal(loc, 0.5))


class Coded(Amortised):
    """Bits of a code drawn without a gradient: score functions."""

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((len(x), self.latent), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x) + self.log_scale).to_event(1))


class Dropping(Amortised):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Dropout(0.3), self.encoder)


class Normed(Amortised):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.BatchNorm1d(3), self.encoder)


class Weighed(Amortised):
    """A KL weight that changes while training: in a buffer filled in place, or a Python number."""

    def __init__(self, buffered):
        super().__init__()
        self.buffered = buffered
        self.register_buffer("held", torch.tensor(0.1))
        self.weight = 0.1

    def scaled(self):
        return poutine.scale(scale=self.held if self.buffered else self.weight)

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            with self.scaled():
                z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).expand([len(x), 2]).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x), self.scaled():
            pyro.sample("z", dist.Normal(self.encoder(x), self.log_scale.exp()).to_event(1))


def masked(x, known, size=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=x), poutine.mask(mask=known), poutine.scale(scale=0.5):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def guide_of_loc(x, known, size=None):
    pyro.sample("loc", dist.Normal(pyro.param("m", torch.tensor(0.0)), 0.3))


class Flowing(nn.Module):
    """A flow in the guide, of one latent vector for all rows."""

    def __init__(self, coupled):
        super().__init__()
        net = pyro.nn.DenseNN(1, [4], [1, 1])
        self.flow = AffineCoupling(1, net) if coupled else affine_autoregressive(2, hidden_dims=[4])

    def model(self, x, size=None):
        loc = pyro.sample("loc", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(loc[..., 0] * loc[..., 1], 1.0), obs=x)

    def guide(self, x, size=None):
        base = dist.Normal(x.new_zeros(2), 1.0).to_event(1)
        pyro.sample("loc", dist.TransformedDistribution(base, [self.flow]))


def three_normals(x, size=None):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


def bits(n=40, columns=5):
    return (rows(n, columns) > 0).double()


def labels(n=40):
    known = torch.randint(3, (n,), generator=torch.Generator().manual_seed(1))
    return torch.where(torch.arange(n) % 4 == 0, known, -1)


ONE = {"elbo": Trace_ELBO()}
SEVERAL = {"elbo": Trace_ELBO(num_particles=3)}
VECTORISED = {"elbo": Trace_ELBO(num_particles=3, vectorize_particles=True)}
MEAN_FIELD = {"elbo": TraceMeanField_ELBO(num_particles=2)}
GRAPH = {"elbo": TraceGraph_ELBO()}

CASES = {
    "functions": (pair(model_of_mean, guide_of_mean), data(), {}),
    "functions-trace": (pair(model_of_mean, guide_of_mean), data(), ONE),
    "functions-all": (pair(model_of_mean, guide_of_mean), data(), {"batch_size": None}),
    "functions-short": (pair(model_of_mean, guide_of_mean), data(37), {}),
    "functions-enum": (pair(mixture, nothing), data(), {}),
    "functions-enum-particles": (pair(mixture, nothing), data(), {"elbo": TraceEnum_ELBO(num_particles=2)}),
    "module": (Amortised, rows(), {}),
    "module-trace": (Amortised, rows(), ONE),
    "module-particles": (Amortised, rows(), SEVERAL),
    "module-vectorised": (Amortised, rows(), VECTORISED),
    "module-mean-field": (Amortised, rows(), MEAN_FIELD),
    "module-graph": (Amortised, rows(), GRAPH),
    "module-short": (Amortised, rows(37), {}),
    "module-float32": (Amortised, rows(dtype=torch.float32), {}),
    "module-float32-trace": (Amortised, rows(37, dtype=torch.float32), ONE),
    "module-float32-particles": (Amortised, rows(dtype=torch.float32), SEVERAL),
    "module-float32-vectorised": (Amortised, rows(dtype=torch.float32), VECTORISED),
    "module-float32-mean-field": (Amortised, rows(dtype=torch.float32), MEAN_FIELD),
    "module-float32-graph": (Amortised, rows(dtype=torch.float32), GRAPH),
    "score-function": (Coded, rows(), {}),
    "score-function-graph": (Coded, rows(), GRAPH),
    "score-function-float32": (Coded, rows(dtype=torch.float32), GRAPH),
    "vae": (lambda: lvm.VAE(5, 2, (6,)), bits(), {}),
    "vae-float32-trace": (lambda: lvm.VAE(5, 2, (6,)), bits().float(), ONE),
    "gaussian-mixture": (lambda: lvm.GaussianMixture(2, 3), rows(), {}),
    "gaussian-mixture-float32": (lambda: lvm.GaussianMixture(2, 3), rows(dtype=torch.float32), {}),
    "gaussian-mixture-prior": (
        lambda: lvm.GaussianMixture(2, 3, prior=lvm.priors.NormalInverseWishart(torch.zeros(3), torch.eye(3), 5.0)),
        rows(),
        {},
    ),
    "ppca": (lambda: lvm.PPCA(3, 1), rows(), {}),
    "factor-analysis": (lambda: lvm.FactorAnalysis(3, 1), rows(), ONE),
    "dropout": (Dropping, rows(), {}),
    "batch-norm": (Normed, rows(), {}),
    "scale-and-mask": (pair(masked, guide_of_loc), (data(), data(seed=1) > 1.0), {}),
    "parameters-of-each-row": (pair(local_model, local_guide), data(), {}),
    "flow-autoregressive": (lambda: Flowing(False), data(), {}),
    "flow-coupling": (lambda: Flowing(True), data(), VECTORISED),
    "sgd-scheduled-clipped": (
        Amortised,
        rows(),
        {
            "optimizer": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
            "scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
            "grad_clip_norm": 0.1,
        },
    ),
    "plateau": (
        Amortised,
        rows(),
        {"lr": 0.05, "scheduler": lambda o: ReduceLROnPlateau(o, patience=0), "epochs": 6},
    ),
    "adamw": (Amortised, rows(), {"optimizer": torch.optim.AdamW, "lr": 0.05}),
    "stopping": (
        Amortised,
        rows(),
        {"lr": 0.5, "epochs": 30, "validation": 0.25, "early_stopping": lvm.EarlyStopping(patience=5)},
    ),
    "loader": (
        Amortised,
        DataLoader(TensorDataset(rows(37)), batch_size=10),
        {"batch_size": None, "epochs": 3},
    ),
    "data-set": (Amortised, TensorDataset(rows(37)), {}),
    "redrawn": (
        lambda: lvm.VAE(5, 2, (6,)),
        Binarized((255 * torch.rand(40, 5, generator=torch.Generator().manual_seed(0))).to(torch.uint8)),
        {"epochs": 4},
    ),
} | {
    f"autoguide-{kind}": (lambda: three_normals, rows(), {"guide": kind})
    for kind in ("mean_field", "full_rank", "low_rank", "map")
}


@pytest.mark.parametrize("case", CASES)
def test_a_graph_gives_what_pyro_gives_to_the_bit(case):
    make, x, options = CASES[case]
    agree(make, x, **options)


def test_batch_norm_keeps_count():
    _, _, program, other = both(Normed, rows(37))
    norm = other.encoder[0]
    assert int(norm.num_batches_tracked) == int(program.encoder[0].num_batches_tracked)
    assert torch.equal(norm.running_mean, program.encoder[0].running_mean)
    assert torch.equal(norm.running_var, program.encoder[0].running_var)


SEMI_SUPERVISED_ROUNDING = 1e-12
"""Relative: an unlikely label of probability nought is added as a nought, where Pyro leaves it out."""


@pytest.mark.parametrize("batch_size", [None, 12])
def test_partly_labelled_rows_with_strata_and_auxiliary_loss(batch_size):
    def make():
        return lvm.SemiSupervisedVAE(5, 3, 2, hidden=(6,), classifier_weight=2.0, smoothness_weight=1.0)

    # plain steps: Adam would divide gradients that are nought but for rounding by their own size
    options = {"optimizer": torch.optim.SGD, "lr": 1e-3, "batch_size": batch_size}
    eager, captured, *_ = both(make, (bits(), labels()), **options)
    close = {"rtol": SEMI_SUPERVISED_ROUNDING, "atol": SEMI_SUPERVISED_ROUNDING}
    for name, value in eager.params.items():
        torch.testing.assert_close(captured.params[name], value, **close)
    assert captured.elbo == pytest.approx(eager.elbo, rel=SEMI_SUPERVISED_ROUNDING)
    assert eager.history.keys() == captured.history.keys() >= {"auxiliary_loss"}
    for column in ("loss", "elbo", "auxiliary_loss"):
        assert captured.history[column] == pytest.approx(eager.history[column], rel=SEMI_SUPERVISED_ROUNDING)
    for group in ("reconstruction", "kl"):
        assert captured.history[group].keys() == eager.history[group].keys()
        for site, values in eager.history[group].items():
            assert captured.history[group][site] == pytest.approx(values, rel=1e-10)


def test_batches_of_one_shape_that_are_split_otherwise_have_graphs_of_their_own():
    torch.manual_seed(0)
    program = as_program(lvm.SemiSupervisedVAE(5, 3, 2, hidden=(6,)).double())
    x, y = bits(), labels()
    data, known, unknown = as_rows((x, y)), (y >= 0).nonzero().squeeze(-1), (y < 0).nonzero().squeeze(-1)
    bound_program = BoundProgram(program, None, x.dtype)
    estimator = make_estimator(None, trace_structure(bound_program.model, bound_program.guide, data.whole()))
    step = Step(bound_program, estimator, None, list(bound_program.trainable().values()), len(x))
    captured = CapturedStep(step, "graph", "to see")
    for count in (5, 2):
        batch = data.take(torch.cat([known[:count], unknown[: 8 - count]]), None, (count, 8 - count))
        losses = []
        for take in (captured, step):
            torch.manual_seed(1)
            losses.append(take(batch).values)
        assert captured.level == "graph", captured.reason
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch_size", [10, None])
@pytest.mark.parametrize("buffered", [True, False])
def test_a_weight_that_changes_while_training_counts_at_once(buffered, batch_size):
    def warm(program):
        def callback(end):
            program.weight = min(1.0, program.weight + 0.2)
            program.held.fill_(program.weight)

        return callback

    options = {"epochs": 6, "batch_size": batch_size, "check": False}
    eager, _ = agree(lambda: Weighed(buffered), rows(), callbacks=[warm], **options)
    constant, _ = fitted("graph", lambda: Weighed(buffered), rows(), **options)
    assert eager.history["loss"][0] == constant.history["loss"][0]
    assert eager.history["loss"][3] != constant.history["loss"][3]  # else nothing has changed at all


def test_an_interrupted_fit_ends_where_the_eager_one_does():
    def stop(_):
        def callback(end):
            if end.epoch == 3:
                raise KeyboardInterrupt

        return callback

    eager, _ = agree(Amortised, rows(), epochs=50, callbacks=[stop], validation=rows(5))
    assert eager.info["stopped"] == "interrupted after 3 epochs"


def test_a_loss_that_is_not_finite_stops_at_the_same_epoch_and_parameters_are_back():
    class Exploding(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(1.0))

        def model(self, x, size=None):
            with pyro.plate("data", size or len(x), subsample=x):
                pyro.sample("x", dist.Normal(0.0, self.a), obs=x)

        guide = staticmethod(nothing)

    def attempt(capture):
        module = Exploding()
        with pytest.raises(lvm.NonFiniteError) as error:
            lvm.fit(
                module,
                data() * 0.0,
                epochs=100,
                batch_size=10,
                seed=0,
                optimizer=torch.optim.SGD,
                lr=0.1,
                capture=capture,
                callbacks=[lambda end: None],
            )
        return str(error.value), module.a.detach()

    (said, a), (also_said, also) = attempt(False), attempt("graph")
    assert said == also_said
    assert torch.equal(a, also)
    assert torch.isfinite(a)


def test_a_second_fit_continues_as_pyro_would():
    def twice(capture):
        torch.manual_seed(7)
        module = Normed()
        options = {"batch_size": 10, "progress": False, "capture": capture}
        lvm.fit(module, rows(), steps=7, seed=0, **options)
        return lvm.fit(module, rows(37, seed=2), steps=7, seed=1, **options), module

    (eager, program), (captured, other) = twice(False), twice("graph")
    assert captured.info["capture"] == "graph"
    assert eager.history == captured.history
    assert same_state(other, state_of(program))


@pytest.mark.parametrize("capture", ["graph", False])
def test_the_process_and_its_random_numbers_are_left_alone(capture):
    module = Dropping()
    with process_left_alone():
        lvm.fit(module, rows(), steps=3, batch_size=10, seed=0, capture=capture, progress=False)
