"""Weights on the KL: values by hand, gradients of what they say, and the plain bound beside them."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import ExpTransform
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from small_programs import Amortised, same_state, state_of
from torch import nn
from weighted_programs import LATENT, Labels, N, Program, X, Y, base_loss, evaluated

import pyro_lvm as lvm
from pyro_lvm.elbo import Capacity, Entropy, FreeBits, KLWeighted
from pyro_lvm.errors import ProgramError
from pyro_lvm.inference import bound as evaluation

BASES = (Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO)
QUIET = {"strict_enumeration_warning": False}


@pytest.fixture
def few_passes(monkeypatch):
    """How well the bound is known in the end is another test's affair."""
    monkeypatch.setattr(evaluation, "MAX_PASSES", 2)


# --- weight one is the base


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("base", BASES)
def test_weight_one_is_the_base(base, particles, vectorize):
    options = {
        "num_particles": particles,
        "vectorize_particles": vectorize,
        "max_plate_nesting": 1,
        **QUIET,
    }
    program = Program()
    loss, gradients = base_loss(base(**options), program, X)
    found, ours, _ = evaluated(KLWeighted(base(**options), beta=1), program, X)
    assert found == pytest.approx(loss, rel=1e-12)
    for mine, right in zip(ours.values(), gradients, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("particles", "vectorize"), [(1, False), (2, False), (2, True)])
def test_weight_one_is_the_base_where_the_guide_enumerates(particles, vectorize):
    options = {"num_particles": particles, "vectorize_particles": vectorize, "max_plate_nesting": 1}
    program, x = Labels(), X[: len(Y)]
    loss, gradients = base_loss(TraceEnum_ELBO(**options), program, x, Y)
    for elbo in (KLWeighted(TraceEnum_ELBO(**options), beta=1), FreeBits(TraceEnum_ELBO(**options), nats=0)):
        if isinstance(elbo, FreeBits):
            with torch.no_grad():
                program.by_class.mul_(10)  # no unit is below nought, also as drawn
            loss, gradients = base_loss(TraceEnum_ELBO(**options), program, x, Y)
        found, ours, _ = evaluated(elbo, program, x, Y)
        assert found == pytest.approx(loss, rel=1e-12)
        for mine, right in zip(ours.values(), gradients, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


def test_neither_floor_nor_capacity_is_the_bound():
    program = Program()
    loss, gradients = base_loss(TraceMeanField_ELBO(), program, X)
    for elbo in (FreeBits(nats=0.0), FreeBits(nats=0.0, per="site"), Capacity(capacity=0.0, gamma=1.0)):
        found, ours, _ = evaluated(elbo, program, X)
        assert found == pytest.approx(loss, rel=1e-12)
        for mine, right in zip(ours.values(), gradients, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-11)


# --- values by hand


@pytest.mark.parametrize("beta", [0.0, 0.3, 4.0])
def test_a_weighted_kl_by_hand(beta):
    program = Program()
    loss, _, found = evaluated(KLWeighted(beta=beta), program, X)
    reconstruction, kl = program.reconstruction(program.drawn[0]).sum(), program.kl().sum()
    assert -loss == pytest.approx(reconstruction - beta * kl, rel=1e-12)
    assert found.terms.elbo.item() == pytest.approx(reconstruction - kl, rel=1e-12)
    assert not found.terms.elbo.requires_grad


def test_a_weighted_bound_has_its_closed_form_as_mean():
    program = Program()
    particles = 4000
    loss, _, _ = evaluated(
        KLWeighted(TraceMeanField_ELBO(num_particles=particles, vectorize_particles=True), beta=2.5), program, X
    )
    loc, scale = program.encoder(X).detach().numpy(), program.log_scale.exp().detach().numpy()
    weights = (program.decoder.weight.detach().numpy(), program.decoder.bias.detach().numpy(), 1.0)
    reconstruction, kl = oracles.linear_gaussian_bound_parts(X.numpy(), *weights, loc, scale * np.ones((N, 1)))
    each = program.reconstruction(program.drawn[-1]).sum(-1)  # (particles,)
    assert each.shape == (particles,)
    error = each.std() / math.sqrt(particles)
    assert -loss == pytest.approx(reconstruction.sum() - 2.5 * kl.sum(), abs=4 * error)
    assert error < 0.01 * kl.sum()


def test_free_bits_by_hand():
    program = Program()
    reconstruction = program.reconstruction
    means = program.kl().mean(0)
    assert means[0] < 0.01 < 0.3 < means[1] < 3 < means[2]
    for nats in (0.0, 0.3, 3.0, 100.0):
        loss, _, found = evaluated(FreeBits(nats=nats), program, X)
        recon = reconstruction(program.drawn[-1]).sum()
        assert -loss == pytest.approx(recon - N * np.maximum(means, nats).sum(), rel=1e-12)
        assert found.terms.elbo.item() == pytest.approx(recon - N * means.sum(), rel=1e-12)
        loss, _, _ = evaluated(FreeBits(nats=nats, per="site"), program, X)
        assert -loss == pytest.approx(recon - N * max(means.sum(), nats), rel=1e-12)


def test_below_the_floor_the_kl_has_no_gradient_and_above_its_own():
    program = Program().ignoring()
    _, whole, _ = evaluated(KLWeighted(beta=1), program, X)
    _, found, _ = evaluated(FreeBits(nats=0.3), program, X)
    for name in ("encoder.weight", "encoder.bias", "log_scale"):
        assert (found[name][0] == 0).all()
        assert (whole[name][0] != 0).any()
        torch.testing.assert_close(found[name][1:], whole[name][1:], rtol=1e-12, atol=1e-12)
    _, group, _ = evaluated(FreeBits(nats=100.0, per="site"), program, X)
    assert (group["log_scale"] == 0).all()


def test_on_the_floor_itself_the_gradient_is_nought():
    program = Program().ignoring()
    with torch.no_grad():
        program.log_scale.zero_()
        program.encoder.weight.zero_()
        program.encoder.bias.fill_(1.0)
    _, found, _ = evaluated(FreeBits(nats=0.5), program, X)  # KL(N(1, 1) || N(0, 1)) is a half, exactly
    assert (found["encoder.bias"] == 0).all()


@pytest.mark.parametrize("capacity", [0.1, 30.0])
def test_capacity_by_hand(capacity):
    program = Program()
    gamma = 7.0
    loss, gradients, found = evaluated(Capacity(capacity=capacity, gamma=gamma), program, X)
    recon, kl = program.reconstruction(program.drawn[-1]).sum(), program.kl().sum() / N
    assert -loss == pytest.approx(recon - N * gamma * abs(kl - capacity), rel=1e-12)
    assert found.terms.elbo.item() == pytest.approx(recon - N * kl, rel=1e-12)
    # above the capacity the KL is pressed gamma times as hard as by the bound, below it is lifted as hard
    side = gamma if kl > capacity else -gamma
    _, bent, _ = evaluated(KLWeighted(beta=gamma), program, X)
    _, flat, _ = evaluated(KLWeighted(beta=0), program, X)
    for name, gradient in gradients.items():
        expected = flat[name] + side / gamma * (bent[name] - flat[name])
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


def test_particles_are_averaged_before_the_maximum_is_taken():
    for vectorize in (False, True):
        program = Program()
        base = Trace_ELBO(num_particles=3, vectorize_particles=vectorize, max_plate_nesting=1)
        loc, scale = program.encoder(X).detach().numpy(), program.log_scale.exp().detach().numpy()
        loss, _, _ = evaluated(FreeBits(base, nats=0.3), program, X)
        z = np.stack(program.drawn).reshape(3, N, LATENT)
        kl = (oracles.normal_logpdf(z, loc, scale) - oracles.normal_logpdf(z, 0.0, 1.0)).mean((0, 1))
        recon = program.reconstruction(z).sum() / 3
        assert -loss == pytest.approx(recon - N * np.maximum(kl, 0.3).sum(), rel=1e-12)


def test_entropy_by_hand():
    program = Program()
    loss, _, found = evaluated(Entropy(), program, X)
    z = program.drawn[0]
    entropy = N * (LATENT * 0.5 * np.log(2 * np.pi * np.e) + program.log_scale.sum().item())
    log_prior = oracles.normal_logpdf(z, 0.0, 1.0).sum()
    recon = program.reconstruction(z).sum()
    assert -loss == pytest.approx(recon + log_prior + entropy, rel=1e-12)
    assert found.terms.reconstruction["x"].item() == pytest.approx(recon, rel=1e-12)
    assert found.terms.kl["z"].item() == pytest.approx(-log_prior - entropy, rel=1e-12)


def test_the_entropy_of_a_minibatch_is_scaled_with_it():
    program = Program()
    loss, _, _ = evaluated(Entropy(), program, X[:15], size=N)
    z = program.drawn[0]
    entropy = 15 * (LATENT * 0.5 * np.log(2 * np.pi * np.e) + program.log_scale.sum().item())
    joint = program.reconstruction(z, X[:15]).sum() + oracles.normal_logpdf(z, 0.0, 1.0).sum()
    assert -loss == pytest.approx(N / 15 * (joint + entropy), rel=1e-12)


def test_entropy_has_the_plain_bound_as_mean_and_its_gradient():
    program = Program()
    particles = {"num_particles": 2000, "vectorize_particles": True, "max_plate_nesting": 1}
    loss, gradients, _ = evaluated(Entropy(Trace_ELBO(**particles)), program, X)
    log_q = oracles.normal_logpdf(
        program.drawn[-1], program.encoder(X).detach().numpy(), program.log_scale.exp().detach().numpy()
    ).sum((1, 2))
    plain, right = base_loss(Trace_ELBO(**particles), program, X)
    # same draws: what differs is the mean of log q against its expectation
    entropy = N * (LATENT * 0.5 * np.log(2 * np.pi * np.e) + program.log_scale.sum().item())
    assert plain - loss == pytest.approx(log_q.mean() + entropy, rel=1e-6)
    assert abs(plain - loss) < 4 * log_q.std() / math.sqrt(2000)
    # log q at its own draw moves with the scale alone, by exactly what the entropy does: the same gradient
    for mine, sampled in zip(gradients.values(), right, strict=True):
        torch.testing.assert_close(mine, sampled, rtol=1e-9, atol=1e-9)


def test_an_entropy_without_closed_form_is_taken_at_the_draw():
    class Positive(Program):
        def model(self, x, size=None):
            with pyro.plate("data", size or len(x), subsample=x):
                z = pyro.sample("z", dist.LogNormal(x.new_zeros(LATENT), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

        def guide(self, x, size=None):
            with pyro.plate("data", size or len(x), subsample=x):
                normal = dist.Normal(self.encoder(x), self.log_scale.exp())
                pyro.sample("z", dist.TransformedDistribution(normal, [ExpTransform()]).to_event(1))

    program = Positive()
    with torch.no_grad():
        program.encoder.weight.mul_(0.1)
    loss, gradients = base_loss(Trace_ELBO(), program, X)
    found, ours, _ = evaluated(Entropy(), program, X)
    assert found == pytest.approx(loss, rel=1e-12)
    for mine, right in zip(ours.values(), gradients, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)


# --- sums over what the guide enumerates


def test_a_sum_over_labels_by_hand():
    program, x, n = Labels(), X[: len(Y)], len(Y)
    enumerated = TraceEnum_ELBO(max_plate_nesting=1)
    estimators = {
        "weighted": KLWeighted(enumerated, beta=2.5),
        "only z": KLWeighted(enumerated, beta=2.5, sites=["z"]),
        "free": FreeBits(enumerated, nats=1.0),
        "held": Capacity(enumerated, capacity=9.0, gamma=3.0),
        "entropy": Entropy(enumerated),
    }
    found, terms = {}, {}
    for name, elbo in estimators.items():
        loss, gradients, estimate = evaluated(elbo, program, x, Y)
        found[name], terms[name] = -loss, estimate.terms
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    recon, kl_y, kl_z, entropy_kl_z = program.by_hand(x, Y)
    floors = np.maximum([kl_y / n, *kl_z / n], 1.0)
    assert 0 < (floors > 1).sum() < 3  # some above, some below
    assert found == pytest.approx(
        {
            "weighted": recon - 2.5 * (kl_y + kl_z.sum()),
            "only z": recon - kl_y - 2.5 * kl_z.sum(),
            "free": recon - n * floors.sum(),
            "held": recon - n * 3.0 * abs((kl_y + kl_z.sum()) / n - 9.0),
            "entropy": recon - kl_y - entropy_kl_z,
        },
        rel=1e-11,
    )
    for name, parts in terms.items():
        kl = entropy_kl_z if name == "entropy" else kl_z.sum()
        assert {k: v.item() for k, v in parts.kl.items()} == pytest.approx({"y": kl_y, "z": kl}, rel=1e-10)
        assert parts.reconstruction["x"].item() == pytest.approx(recon, rel=1e-10)


def test_the_gradient_through_the_weights_of_labels():
    """Against finite differences, with the draws of z held."""
    program, x = Labels(), X[: len(Y)]
    elbo = FreeBits(TraceEnum_ELBO(max_plate_nesting=1), nats=1.0)
    _, gradients, _ = evaluated(elbo, program, x, Y)
    for name in ("classifier.bias", "by_class"):
        parameter = program.get_parameter(name)
        for entry in range(3):
            step = torch.zeros(3, dtype=torch.float64)
            step[entry] = 1e-6
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.add_(sign * step)
                sides.append(evaluated(elbo, program, x, Y)[0])
                with torch.no_grad():
                    parameter.sub_(sign * step)
            assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(gradients[name][entry].item(), rel=1e-5, abs=1e-5)


@pytest.mark.usefixtures("few_passes")
def test_the_semi_supervised_vae_with_weighted_rows():
    torch.manual_seed(0)
    x, y = torch.rand(60, 5).round(), torch.arange(60) % 4 - 1
    made = lvm.SemiSupervisedVAE(5, 3, 2, hidden=(8,))
    elbo = KLWeighted(TraceEnum_ELBO(), beta=lvm.schedules.linear(0.0, 2.0))
    fit = lvm.fit(made, (x, y), elbo=elbo, steps=8, batch_size=20, lr=1e-3, seed=0)
    assert fit.history["kl"].keys() == {"y", "z"}
    assert math.isfinite(fit.elbo)


# --- minibatches


@pytest.mark.parametrize(
    "elbo",
    [
        KLWeighted(beta=3.0),
        KLWeighted(Trace_ELBO(), beta=0.0),
        Capacity(capacity=0.2, gamma=2.0),
        FreeBits(nats=1e-4),
        FreeBits(nats=100.0),
    ],
)
def test_minibatches_average_to_the_whole(elbo):
    """The batches' losses, weighted by rows, are the loss: exactly, as the decoder ignores z. The last is short."""
    program = Program().ignoring()
    with torch.no_grad():
        program.encoder.bias.fill_(0.7)  # every batch's mean KL is on the same side of floor and capacity
    whole, gradients, _ = evaluated(elbo, program, X)
    batches = X.split(15)
    assert [len(batch) for batch in batches] == [15, 15, 10]
    parts = [evaluated(elbo, program, batch, size=N) for batch in batches]
    assert sum(len(b) / N * p[0] for b, p in zip(batches, parts, strict=True)) == pytest.approx(whole, rel=1e-12)
    for name in ("encoder.weight", "encoder.bias", "log_scale", "decoder.bias"):
        gradient = gradients[name]
        mean = sum(len(b) / N * p[1][name] for b, p in zip(batches, parts, strict=True))
        torch.testing.assert_close(mean, gradient, rtol=1e-10, atol=1e-10)


# --- sites: shared, named, in plates, with tied coordinates


class Shared(Program):
    """A location shared by all data, a factor for each."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

    def model(self, x, size=None):
        m = pyro.sample("m", dist.Normal(x.new_zeros(()), 2.0))
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) + m, 1.0).to_event(1), obs=x)

    def guide(self, x, size=None):
        self.m = pyro.sample("m", dist.Normal(self.shared, 0.5)).item()
        super().guide(x, size)


def test_what_is_shared_by_all_data_is_weighed_by_beta_and_by_nothing_else():
    program = Shared()
    kl_m = float(oracles.normal_kl(0.4, 0.5, 0.0, 2.0))
    kl_z = program.kl()
    means = kl_z.mean(0)

    def value(elbo):
        loss, _, _ = evaluated(elbo, program, X)
        return -loss - program.reconstruction(program.drawn[-1], X - program.m).sum()

    assert value(KLWeighted(beta=3)) == pytest.approx(-3 * (kl_m + kl_z.sum()), rel=1e-11)
    assert value(KLWeighted(beta=3, sites=["m"])) == pytest.approx(-3 * kl_m - kl_z.sum(), rel=1e-11)
    assert value(FreeBits(nats=0.3)) == pytest.approx(-kl_m - N * np.maximum(means, 0.3).sum(), rel=1e-11)
    held = -kl_m - N * 2 * abs(means.sum() - 1.0)
    assert value(Capacity(capacity=1.0, gamma=2.0)) == pytest.approx(held, rel=1e-11)
    for elbo in (FreeBits(nats=1.0, sites=["m"]), Capacity(capacity=1.0, sites=["m"])):
        with pytest.raises(ProgramError, match=r"site 'm' has no KL of each datum's own.*\['z'\]: correct sites="):
            evaluated(elbo, program, X)
    with pytest.raises(ProgramError, match=r"site 'k' has no KL of its own; those that have are \['m', 'z'\]"):
        evaluated(KLWeighted(beta=1, sites=["k"]), program, X)


def test_units_lie_in_plates_too_and_rows_may_be_masked():
    scales = torch.tensor([0.9, 0.2], dtype=torch.float64)
    seen = torch.arange(N) % 3 > 0
    locs = torch.stack([X[:, 0], 2 * X[:, 1]])

    def model(x):
        with pyro.plate("data", N), poutine.mask(mask=seen):
            with pyro.plate("part", 2):
                pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(x.new_zeros(3), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", N), poutine.mask(mask=seen), pyro.plate("part", 2):
            pyro.sample("z", dist.Normal(locs, scales.unsqueeze(-1)))

    kl = oracles.normal_kl(locs.numpy(), scales.numpy()[:, None], 0.0, 1.0)[:, seen.numpy()].sum(-1)
    recon = oracles.normal_logpdf(X.numpy(), 0.0, 1.0)[seen.numpy()].sum()
    for nats in (0.0, kl.mean() / N, 50.0):
        loss = FreeBits(nats=nats).loss(model, guide, X)
        assert -loss == pytest.approx(recon - N * np.maximum(kl / N, nats).sum(), rel=1e-12)


def test_tied_coordinates_are_one_unit():
    factor = torch.tensor([[0.5, 0.0], [0.4, 0.3]], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.MultivariateNormal(x.new_zeros(2), torch.eye(2, dtype=x.dtype)))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", N):
            drawn.append(pyro.sample("z", dist.MultivariateNormal(x, scale_tril=factor)).numpy())

    drawn = []
    x = X[:, :2]
    covariance = (factor @ factor.T).numpy()
    log_det = np.linalg.slogdet(covariance)[1]
    kl = 0.5 * (np.trace(covariance) - 2 - log_det + (x.numpy() ** 2).sum(-1)).mean()
    for nats in (0.5 * kl, 2 * kl):
        loss = FreeBits(nats=nats).loss(model, guide, x)
        recon = oracles.normal_logpdf(x.numpy(), drawn[-1], 1.0).sum()
        assert -loss == pytest.approx(recon - N * max(kl, nats), rel=1e-12)


@pytest.mark.usefixtures("few_passes")
def test_an_autoguide_has_its_determinant():
    """A site behind an autoguide's transform: joint with its unconstrained twin, one unit."""

    def model(x, size=None, index=None):
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.LogNormal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = X[:, 0]
    plain = lvm.fit(model, x, elbo=Trace_ELBO(), steps=5, lr=0.01, seed=0)
    for elbo in (KLWeighted(beta=1), FreeBits(nats=0.0), Entropy()):
        fit = lvm.fit(model, x, elbo=elbo, steps=5, lr=0.01, seed=0)
        assert fit.history["loss"] != []
        if not isinstance(elbo, Entropy):  # whose noise is another
            assert fit.history["loss"] == pytest.approx(plain.history["loss"], rel=1e-9)


# --- the plain bound beside it


@pytest.mark.parametrize("elbo", [KLWeighted(beta=4.0), FreeBits(nats=3.0), Capacity(capacity=2.0, gamma=5.0)])
def test_the_bound_of_a_fit_is_the_plain_one(elbo):
    torch.manual_seed(0)
    ppca = lvm.PPCA(num_features=3, latent_dim=2)
    x = X @ torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.2]], dtype=X.dtype)
    fit = lvm.fit(ppca, x, elbo=elbo, steps=60, lr=0.02, seed=0)
    with torch.no_grad():
        q = ppca.encode(x)
        values = [value.numpy() for value in (ppca.loadings, ppca.mean, ppca.noise_scale, q.mean, q.stddev)]
    reconstruction, kl = oracles.linear_gaussian_bound_parts(x.numpy(), *values)
    bound = (reconstruction.sum() - kl.sum()) / N
    assert fit.elbo == pytest.approx(bound, abs=4 * fit.info["elbo_se"] + 1e-9)
    assert fit.info["elbo_se"] <= 0.011
    parts = fit.history["reconstruction"]["x"][-1] - fit.history["kl"]["z"][-1]
    assert fit.history["elbo"][-1] == pytest.approx(parts, rel=1e-9)
    assert abs(-fit.history["loss"][-1] / N - fit.history["elbo"][-1]) > 0.1  # the objective is another number


# --- plain Pyro, capture


@pytest.mark.parametrize("elbo", [KLWeighted(beta=3.0), FreeBits(nats=0.3), Capacity(capacity=1.0), Entropy()])
def test_svi_in_plain_pyro_takes_the_same_step(elbo):
    program = Program()
    loss, gradients, _ = evaluated(elbo, program, X)
    before = state_of(program)
    with pyro.get_param_store().scope():

        def guide(x):
            pyro.module("program", program)
            program.guide(x)

        def model(x):
            pyro.module("program", program)
            program.model(x)

        svi = SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), elbo)
        pyro.set_rng_seed(1)
        assert svi.evaluate_loss(X) == pytest.approx(loss, rel=1e-12)
        pyro.set_rng_seed(1)
        assert svi.step(X) == pytest.approx(loss, rel=1e-12)
    for name, value in program.named_parameters():
        torch.testing.assert_close(value.detach(), before[name] - 1e-3 * gradients[name], rtol=1e-10, atol=1e-12)


def test_plain_pyro_evaluates_an_enumerated_bound_without_gradients():
    program, x = Labels(), X[: len(Y)]
    elbo = KLWeighted(TraceEnum_ELBO(max_plate_nesting=1), beta=2.0)
    loss, _, _ = evaluated(elbo, program, x, Y)
    pyro.set_rng_seed(1)
    with torch.no_grad():
        assert elbo.loss(program.model, program.guide, x, Y) == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize(
    "elbo",
    [
        KLWeighted(Trace_ELBO(num_particles=2), beta=lvm.schedules.cyclic(0.0, 2.0)),
        FreeBits(nats=lvm.schedules.linear(1.0, 0.1)),
        Capacity(capacity=lvm.schedules.linear(0.0, 2.0), gamma=lvm.schedules.exponential(1.0, 100.0)),
        Entropy(),
    ],
    ids=lambda elbo: type(elbo).__name__,
)
@pytest.mark.usefixtures("few_passes")
def test_captured_to_the_bit(elbo):
    class Forgetful(Program):
        guide = Amortised.guide  # notes no draws, which no graph could

    ends = []
    for capture in (False, "graph"):
        program = Forgetful()
        fit = lvm.fit(program, X, elbo=elbo, steps=15, batch_size=15, lr=0.01, seed=0, capture=capture)
        assert fit.info["capture"] == ("graph" if capture else "eager"), fit.info["capture_reason"]
        ends.append((program, fit.history))
    assert same_state(ends[0][0], state_of(ends[1][0]))
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize("elbo", [KLWeighted(TraceEnum_ELBO(), beta=2.0), FreeBits(TraceEnum_ELBO(), nats=0.5)])
@pytest.mark.usefixtures("few_passes")
def test_captured_with_labels(elbo):
    losses = []
    for capture in (False, "graph"):
        fit = lvm.fit(Labels(), (X[: len(Y)], Y), elbo=elbo, steps=8, lr=0.01, seed=0, capture=capture)
        assert fit.info["capture"] == ("graph" if capture else "eager"), fit.info["capture_reason"]
        losses.append(fit.history["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
