"""Weights on the KL: values by hand, gradients of what they say, the plain bound beside them, and collapse mended."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
import torch
from pyro import poutine
from pyro.distributions.transforms import ExpTransform
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from small_programs import Amortised, guide_of_mean, mixture, model_of_mean, nothing, rows, same_state, state_of
from torch import nn
from torch.distributions import constraints

import pyro_lvm as lvm
from pyro_lvm.elbo import Capacity, Entropy, FreeBits, KLWeighted
from pyro_lvm.errors import ProgramError
from pyro_lvm.inference import bound as evaluation

N = 40
X = rows(N)
LATENT = 3
BASES = (Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO)
QUIET = {"strict_enumeration_warning": False}


class Program(Amortised):
    """q(z | x) = N(encoder(x), scale) with units of very different KL; remembers its draws."""

    def __init__(self):
        torch.manual_seed(5)
        super().__init__(3, LATENT)
        self.double()
        with torch.no_grad():
            self.encoder.weight.mul_(torch.tensor([[0.05], [1.0], [3.0]]))
            self.encoder.bias.mul_(torch.tensor([0.1, 1.0, 3.0]))
            self.log_scale.copy_(torch.tensor([-0.05, -0.4, -1.0]))
        self.drawn = []

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(self.encoder(x), self.log_scale.exp()).to_event(1))
        self.drawn.append(z.detach().numpy())

    def kl(self, x=X):
        """KL of every datum and unit, (n, L)."""
        loc, scale = self.encoder(x).detach().numpy(), self.log_scale.exp().detach().numpy()
        return oracles.normal_kl(loc, scale, np.zeros(1), np.ones(1))

    def reconstruction(self, z, x=X):
        loc = z @ self.decoder.weight.detach().numpy().T + self.decoder.bias.detach().numpy()
        return oracles.normal_logpdf(x.numpy(), loc, 1.0).sum(-1)

    def ignoring(self):
        """The same with a decoder that does not look at z, so that the reconstruction is no matter of chance."""
        with torch.no_grad():
            self.decoder.weight.zero_()
        return self


def evaluated(elbo, program, *args, seed=1, **kwargs):
    """Loss, gradient by parameter, and terms of one evaluation."""
    pyro.set_rng_seed(seed)
    found = elbo.estimate(program.model, program.guide, args, kwargs)
    parameters = dict(program.named_parameters())
    gradients = torch.autograd.grad(found.surrogate, list(parameters.values()), allow_unused=True)
    zero = torch.zeros(())
    return found.loss.item(), dict(zip(parameters, (zero if g is None else g for g in gradients), strict=True)), found


def base_loss(base, program, *args, seed=1):
    pyro.set_rng_seed(seed)
    loss = base.differentiable_loss(program.model, program.guide, *args)
    gradients = torch.autograd.grad(loss, list(program.parameters()), allow_unused=True)
    return loss.item(), gradients


class Labels(nn.Module):
    """y of 3 classes, enumerated in the guide and known for some rows; z drawn for each class."""

    def __init__(self, mark="parallel", columns=2):
        super().__init__()
        torch.manual_seed(2)
        self.mark = mark
        self.classifier, self.encoder = nn.Linear(3, 3).double(), nn.Linear(3, columns).double()
        self.by_class = nn.Parameter(torch.tensor([-1.0, 0.1, 2.0], dtype=torch.float64))
        self.decoder = nn.Linear(columns, 3).double()
        self.drawn = []

    def model(self, x, y, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            label = pyro.sample("y", dist.Categorical(logits=x.new_tensor([0.5, 0.0, -0.5])))
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = self.decoder(z) + label.unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, 0.8).to_event(1), obs=x)

    def guide(self, x, y, size=None):
        known = torch.where(torch.arange(3) == y.unsqueeze(-1), 0.0, -torch.inf).to(x)
        logits = torch.where((y >= 0).unsqueeze(-1), known, self.classifier(x))
        with pyro.plate("data", size or len(x), subsample=x):
            label = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": self.mark})
            loc = self.encoder(x) + self.by_class[label].unsqueeze(-1)
            self.drawn.append(pyro.sample("z", dist.Normal(loc, 0.6).to_event(1)).detach())

    def by_hand(self, x, y):
        """Reconstruction, KL of y, sampled KL of z by unit (2,), E[log p(y, z)] and H[z | y]: sums over rows."""
        q = scipy.special.softmax(self.classifier(x).detach().numpy(), -1)
        q = np.where(y.numpy()[:, None] >= 0, np.arange(3) == y.numpy()[:, None], q)  # (n, 3)
        prior = scipy.special.log_softmax([0.5, 0.0, -0.5])
        z = self.drawn[-1].numpy()  # (3, n, 2)
        labels = np.arange(3)[:, None, None]
        decoded = z @ self.decoder.weight.detach().numpy().T + self.decoder.bias.detach().numpy() + labels
        reconstruction = (q.T * oracles.normal_logpdf(x.numpy(), decoded, 0.8).sum(-1)).sum()
        loc = self.encoder(x).detach().numpy() + self.by_class.detach().numpy()[:, None, None]
        log_ratio = oracles.normal_logpdf(z, loc, 0.6) - oracles.normal_logpdf(z, 0.0, 1.0)
        kl_z = (q.T[..., None] * log_ratio).sum((0, 1))
        kl_y = (scipy.special.xlogy(q, q) - q * prior).sum()
        negative_entropy = -len(x) * 2 * (0.5 * np.log(2 * np.pi * np.e) + np.log(0.6))
        log_prior_z = (q.T[..., None] * oracles.normal_logpdf(z, 0.0, 1.0)).sum()
        return reconstruction, kl_y, kl_z, negative_entropy - log_prior_z


Y = torch.tensor([-1, 2, -1, 0, 1, -1, -1, -1])


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
    [KLWeighted(beta=3.0), KLWeighted(Trace_ELBO(), beta=0.0), Capacity(capacity=0.0, gamma=2.0), FreeBits(nats=1e-4)],
)
def test_minibatches_average_to_the_whole(elbo):
    """The batches' losses, weighted by rows, are the loss: exactly, as the decoder ignores z. The last is short."""
    program = Program().ignoring()
    with torch.no_grad():
        program.encoder.bias.fill_(0.7)  # every batch's mean KL is above the floor
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
    ends = []
    for capture in (False, "graph"):
        program = Program()
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


# --- refusals


def test_other_bases_and_arguments_are_refused():
    for base in (RenyiELBO(), TraceGraph_ELBO, "Trace_ELBO", None):
        with pytest.raises(TypeError, match=r"base must be one of Trace_ELBO\(\), TraceMeanField_ELBO\(\), TraceEnum"):
            KLWeighted(base, beta=1.0)
    with pytest.raises(TypeError, match=r"KLWeighted rests on 4\.0: .*a number has a name, KLWeighted\(beta=4\)"):
        KLWeighted(4.0, beta=1.0)
    with pytest.raises(TypeError, match=r"sites is 'z': name the sites in a list, \['z'\]"):
        KLWeighted(beta=1.0, sites="z")
    with pytest.raises(ValueError, match="beta is -1: it must be 0 or more"):
        KLWeighted(beta=-1)
    with pytest.raises(ValueError, match="gamma is 0: it must be positive"):
        Capacity(capacity=1.0, gamma=0)
    with pytest.raises(ValueError, match="capacity is -1"):
        Capacity(capacity=-1)
    with pytest.raises(ValueError, match="per='group' is not known"):
        FreeBits(nats=1.0, per="group")


def test_what_it_looks_like():
    shown = KLWeighted(Trace_ELBO(num_particles=3), beta=2.0, sites=["z"])
    assert repr(shown) == "KLWeighted(Trace_ELBO(num_particles=3), beta=2, sites=['z'])"
    assert repr(Capacity(capacity=25.0)) == "Capacity(TraceMeanField_ELBO(), capacity=25, gamma=1000)"
    assert repr(FreeBits(nats=0.5, per="site")) == "FreeBits(TraceMeanField_ELBO(), nats=0.5, per='site')"


@pytest.mark.usefixtures("few_passes")
def test_a_given_base_stays_as_it_is():
    base = TraceMeanField_ELBO()
    lvm.fit(Program(), X, elbo=KLWeighted(base, beta=2.0), steps=2, seed=0)
    assert base.max_plate_nesting == float("inf")


def test_a_site_that_the_model_sums_out_alone_has_nothing_to_weigh():
    x = X[:, 0]
    for elbo in (KLWeighted(TraceEnum_ELBO(), beta=2.0), FreeBits(TraceEnum_ELBO(), nats=1.0)):
        with pytest.raises(ProgramError, match=r"'component' is summed out exactly and has no KL.*use elbo=None"):
            lvm.fit((mixture, nothing), x, elbo=elbo, steps=1)
    with pytest.raises(ProgramError, match=r"cannot sum it out: use base=TraceEnum_ELBO\(\)"):
        lvm.fit((mixture, nothing), x, elbo=KLWeighted(beta=2.0), steps=1)


def mixture_with_a_prior(x, size=None):
    loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 3.0))
    with pyro.plate("data", size or len(x), subsample=x):
        k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.3)), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc * k, 1.0), obs=x)


def guide_of_loc(x, size=None):
    pyro.sample("loc", dist.Normal(pyro.param("m", x.new_tensor(0.5)), x.new_tensor(0.7)))


def test_beside_a_site_that_the_model_sums_out_the_others_are_weighed():
    x = X[:, 0]
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(1)
        loc = poutine.trace(guide_of_loc).get_trace(x).nodes["loc"]["value"].item()
        pyro.set_rng_seed(1)
        found = KLWeighted(TraceEnum_ELBO(max_plate_nesting=1), beta=2.5).estimate(
            mixture_with_a_prior, guide_of_loc, (x,), {}
        )
        pyro.set_rng_seed(1)
        entropy = Entropy(TraceEnum_ELBO(max_plate_nesting=1)).estimate(mixture_with_a_prior, guide_of_loc, (x,), {})
    joint = np.log([0.7, 0.3])[:, None] + oracles.normal_logpdf(x.numpy(), np.array([[0.0], [loc]]), 1.0)
    evidence = scipy.special.logsumexp(joint, axis=0).sum()
    log_prior = oracles.normal_logpdf(loc, 0.0, 3.0)
    kl = oracles.normal_logpdf(loc, 0.5, 0.7) - log_prior
    assert -found.loss.item() == pytest.approx(evidence - 2.5 * kl, rel=1e-10)
    assert found.terms.elbo.item() == pytest.approx(evidence - kl, rel=1e-10)
    bound = evidence + log_prior + 0.5 * np.log(2 * np.pi * np.e * 0.49)
    assert -entropy.loss.item() == pytest.approx(bound, rel=1e-10)
    assert entropy.terms.elbo.item() == pytest.approx(bound, rel=1e-10)


def test_a_prior_that_hangs_on_what_is_summed_out_has_no_kl_of_its_own():
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.3)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(3 * k, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(pyro.param("a", x.new_tensor(0.5)) * x, 0.7))

    with pytest.raises(ProgramError, match=r"prior of site 'z' hangs on 'k'.*give 'k' a guide site"):
        lvm.fit((model, guide), X[:, 0], elbo=KLWeighted(TraceEnum_ELBO(), beta=2.0), steps=1)


def test_a_draw_without_a_path_is_refused_in_a_fit_and_in_plain_pyro():
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            rate = pyro.sample("rate", dist.Poisson(x.new_ones(())))
            pyro.sample("x", dist.Normal(rate, 1.0), obs=x)

    def guide(x, size=None):
        rate = pyro.param("r", x.new_tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("rate", dist.Poisson(rate))

    words = r"site 'rate'.*Poisson.*cannot be reparameterised.*make it a distribution with rsample"
    with pytest.raises(ProgramError, match=words):
        lvm.fit((model, guide), X[:, 0], elbo=KLWeighted(Trace_ELBO(), beta=2.0), steps=1)
    with pyro.get_param_store().scope(), pytest.raises(ProgramError, match=words):
        KLWeighted(Trace_ELBO(), beta=2.0).loss(model, guide, X[:, 0])
    program, x = Labels(mark=None), X[: len(Y)]
    with pytest.raises(ProgramError, match=r"mark it infer=.*in the guide and use base=TraceEnum_ELBO\(\)"):
        KLWeighted(Trace_ELBO(), beta=2.0).loss(program.model, program.guide, x, Y)
    for elbo in (KLWeighted(beta=2.0), KLWeighted(TraceEnum_ELBO(), beta=2.0)):
        with pytest.raises(ProgramError, match="nobody sums it out"):
            lvm.fit(program, (x, Y), elbo=elbo, steps=1)


def test_one_label_after_another_is_refused():
    program, x = Labels(mark="sequential"), X[: len(Y)]
    with pytest.raises(ProgramError, match=r'enumerated "sequential".*mark it "parallel"'):
        lvm.fit(program, (x, Y), elbo=KLWeighted(TraceEnum_ELBO(), beta=2.0), steps=1)
    with pytest.raises(ProgramError, match="one value after another"):
        KLWeighted(TraceEnum_ELBO(max_plate_nesting=1), beta=2.0).loss(program.model, program.guide, x, Y)


def test_nats_per_datum_need_data_and_latents_of_their_own():
    x = X[:, 0]
    with pytest.raises(ProgramError, match="weighs nats per datum, and loc is shared by all data"):
        lvm.fit((model_of_mean, guide_of_mean), x, elbo=FreeBits(nats=1.0), steps=1)

    def model(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(N), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(ProgramError, match="no plate holds the data"):
        Capacity(capacity=1.0).loss(model, guide, x)


def test_a_mean_field_base_must_meet_the_order_of_sites():
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x, size=None):
        scale = pyro.param("s", x.new_tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", size or len(x), subsample=x):
            b = pyro.sample("b", dist.Normal(x, scale))
            pyro.sample("a", dist.Normal(b, 1.0))

    with pytest.raises(ProgramError, match=r"reorder the guide, or use base=Trace_ELBO\(\)"):
        lvm.fit((model, guide), X[:, 0], elbo=KLWeighted(beta=2.0), steps=1)
    lvm.fit((model, guide), X[:, 0], elbo=KLWeighted(Trace_ELBO(), beta=2.0), steps=1)


# --- posterior collapse


def codewords():
    """Eight codewords of seven bits, any two bits of which are independent: no pair of features betrays a code."""
    return (scipy.linalg.hadamard(8)[:, 1:] > 0).astype(float)


def noisy_codewords(n=400, flip=0.1):
    generator = torch.Generator().manual_seed(0)
    clean = torch.as_tensor(codewords(), dtype=torch.float32)[torch.randint(0, 8, (n,), generator=generator)]
    flips = torch.rand(clean.shape, generator=generator) < flip
    return torch.where(flips, 1 - clean, clean)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_collapse_is_mended_by_free_bits_and_by_warm_up(seed):
    """Early on codes say nothing of single bits, so the KL pays for nothing: plain training gives them up for good."""
    x = noisy_codewords()
    bits = x.mean(0).double().numpy()
    independent = -scipy.stats.bernoulli(bits).entropy().sum()  # the best that a decoder without z can do
    found = {}
    for name, elbo in (
        ("plain", None),
        ("free", FreeBits(nats=0.5)),
        ("warm", KLWeighted(beta=lvm.schedules.linear(0.0, 1.0, until=0.5))),
    ):
        torch.manual_seed(seed)
        vae = lvm.VAE(7, 2, hidden=(16, 16, 16))
        fit = lvm.fit(vae, x, elbo=elbo, steps=400, lr=0.01, seed=seed, progress=False)
        found[name] = fit.elbo, float(np.mean(fit.history["kl"]["z"][-20:]))
    assert found["plain"][1] < 0.06
    assert found["plain"][0] == pytest.approx(independent, abs=0.05)
    truth = oracles.codewords_log_density(x.numpy(), codewords(), 0.1).mean()
    for name in ("free", "warm"):
        bound, kl = found[name]
        assert kl > 1.0, name
        assert found["plain"][0] + 0.2 < bound < truth + 0.1, name
