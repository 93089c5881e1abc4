"""The semi-supervised VAE against sums over labels done by hand, and its stratified minibatches."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from oracles import mixture_of_labels_log_evidence
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.models.classifier_smoothness import BALANCE, CERTAINTY, RADIUS, classifier_smoothness
from pyro_lvm.networks import BatchNorm

pytestmark = pytest.mark.usefixtures("few_passes")


def tiny(
    kind: type[lvm.SemiSupervisedVAE] = lvm.SemiSupervisedVAE, *, latent_dim: int = 1, **options: object
) -> lvm.SemiSupervisedVAE:
    torch.manual_seed(0)
    settings = {"likelihood": "normal", "smoothness_weight": 0.0} | options
    return kind(4, 3, latent_dim, hidden=(6,), **settings).double()  # type: ignore[arg-type]


def rows(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Joined(nn.Module):
    """A user's network of data and label."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs + 3, outputs)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        one_hot = nn.functional.one_hot(y, 3).to(x.dtype)
        shape = torch.broadcast_shapes(x.shape[:-1], one_hot.shape[:-1])
        return self.linear(torch.cat([x.expand(*shape, -1), one_hot.expand(*shape, -1)], -1))


def by_hand(ssvae: lvm.SemiSupervisedVAE, x: torch.Tensor, y: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The bound of every datum for standard normal ``noise`` (classes, n, L), label by label."""
    logits = ssvae.classifier(x).log_softmax(-1)
    bounds = []
    for label in range(ssvae.num_classes):
        chosen = torch.full((len(x),), label)
        q = ssvae.encoder(x, chosen) if ssvae.encoder_sees_label else ssvae.encoder(x)
        z = q.mean + q.stddev * noise[label]
        log_p = ssvae.likelihood(ssvae.decoder(z, chosen)).log_prob(x) + ssvae.prior().log_prob(z)
        bounds.append(log_p - q.log_prob(z) - np.log(ssvae.num_classes))
    stacked = torch.stack(bounds, -1)
    unlabelled = (logits.exp() * (stacked - logits)).sum(-1)
    labelled = stacked.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(y >= 0, labelled, unlabelled)


def same_bound_and_gradient(ssvae: lvm.SemiSupervisedVAE, loss: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    parameters = list(ssvae.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    for gradient, by_brute_force in zip(found, wanted, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if gradient is None else gradient,
            zero if by_brute_force is None else by_brute_force,
            rtol=1e-9,
            atol=1e-11,
        )
        assert gradient is None or bool(gradient.isfinite().all())


@pytest.mark.parametrize("encoder_sees_label", [True, False])
def test_enumerated_bound_and_gradient_equal_the_sum_by_hand(encoder_sees_label: bool) -> None:
    ssvae, x = tiny(encoder_sees_label=encoder_sees_label), rows(5)
    y = torch.tensor([-1, 2, -1, 0, -1])
    torch.manual_seed(3)
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(ssvae.model, ssvae.guide, x, y)
    torch.manual_seed(3)
    shape = (3, 5, 1) if encoder_sees_label else (5, 1)
    noise = torch.randn(shape, dtype=torch.float64).expand(3, 5, 1)
    expected = -by_hand(ssvae, x, y, noise).sum()
    same_bound_and_gradient(ssvae, loss, expected)


@pytest.mark.parametrize("encoder_sees_label", [True, False])
@pytest.mark.parametrize("particles", [1, 4])
def test_known_labels_that_stand_first_change_neither_bound_nor_gradient(
    encoder_sees_label: bool, particles: int
) -> None:
    ssvae, x = tiny(encoder_sees_label=encoder_sees_label, latent_dim=2), rows(5)
    y, weight = torch.tensor([2, 0, -1, -1, -1]), torch.tensor([0.5, 0.5, 1.5, 1.5, 1.0]).double()
    elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=particles, vectorize_particles=particles > 1)
    torch.manual_seed(3)
    loss = elbo.differentiable_loss(ssvae.model, ssvae.guide, x, y, weight=weight, strata=(2, 3))
    torch.manual_seed(3)
    shape = (*((3,) if encoder_sees_label else ()), *((4,) if particles > 1 else ()), 5, 2)
    noise = torch.randn(shape, dtype=torch.float64).reshape(-1, particles, 5, 2).expand(3, -1, -1, -1)
    bounds = [by_hand(ssvae, x, y, drawn) for drawn in noise.unbind(1)]
    expected = -(weight * torch.stack(bounds).mean(0)).sum()
    same_bound_and_gradient(ssvae, loss, expected)


def test_what_is_computed_once_for_a_known_label() -> None:
    """Networks see rows of known labels once each, where the table would show them every label."""
    seen: dict[str, list[int]] = {}

    def count(name: str) -> object:
        def hook(module: nn.Module, given: object, output: torch.Tensor) -> None:
            seen.setdefault(name, []).append(output.shape[:-1].numel())

        return hook

    ssvae, x, y = tiny(), rows(8), torch.tensor([0, 1, 2, 0, 1, -1, -1, -1])
    ssvae.encoder.network.register_forward_hook(count("encoder"))
    ssvae.decoder.register_forward_hook(count("decoder"))
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    loss.differentiable_loss(ssvae.model, ssvae.guide, x, y, strata=(5, 3))
    assert seen == {"encoder": [5, 3 * 3], "decoder": [5, 3 * 3]}
    seen.clear()
    loss.differentiable_loss(ssvae.model, ssvae.guide, x, y)
    assert seen == {"encoder": [3 * 8], "decoder": [3 * 8]}


@pytest.mark.parametrize(
    "elbo",
    [
        pytest.param(TraceEnum_ELBO(), id="plain"),
        pytest.param(TraceEnum_ELBO(num_particles=3), id="particles"),
        pytest.param(TraceEnum_ELBO(num_particles=3, vectorize_particles=True), id="particles at once"),
        lvm.elbo.Entropy(TraceEnum_ELBO()),
        lvm.elbo.KLWeighted(TraceEnum_ELBO(), beta=0.5),
        lvm.elbo.FreeBits(TraceEnum_ELBO(), nats=0.3),
        lvm.elbo.Capacity(TraceEnum_ELBO(), capacity=0.2, gamma=2.0),
    ],
)
@pytest.mark.parametrize("holes", [False, True])
def test_every_estimator_takes_known_labels_once(elbo: ELBO | lvm.elbo.Entropy, holes: bool) -> None:
    """Fits in stratified batches are what they are with the table of all labels."""
    x, y = partly_labelled(40)
    if holes:
        x = torch.where(rows(40, seed=1) < 0.1, torch.nan, x)
    options = {"elbo": elbo, "batch_size": 8, "steps": 5, "seed": 0, "missing": "marginalize" if holes else None}
    agree(tiny(latent_dim=3), (x, y), **options)


def partly_labelled(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rows(n), torch.where(torch.arange(n) % 4 == 0, torch.arange(n) % 3, -1)


def agree(ssvae: lvm.SemiSupervisedVAE, data: tuple[torch.Tensor, torch.Tensor], **options: object) -> None:
    """Fit the program, and the same where every row is computed for every label."""
    table = lvm.fit(Table(copy.deepcopy(ssvae)), data, **options)
    once = lvm.fit(ssvae, data, **options)
    assert once.history["loss"] == pytest.approx(table.history["loss"], rel=1e-10)
    for name, value in once.params.items():
        torch.testing.assert_close(value, table.params["inner." + name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("encoder_sees_label", [True, False])
def test_labels_of_every_integer_type(dtype: torch.dtype, encoder_sees_label: bool) -> None:
    x, y = partly_labelled(20)
    options = {"batch_size": 8, "steps": 2, "seed": 0}
    fits = [lvm.fit(tiny(encoder_sees_label=encoder_sees_label), (x, labels), **options) for labels in (y, y.to(dtype))]
    assert fits[0].history["loss"] == fits[1].history["loss"]


class Normalised(Joined):
    """A network whose output for a row hangs on the others of its batch."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.norm = BatchNorm(outputs)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(x, y))


@pytest.mark.parametrize("which", ["encoder", "decoder"])
def test_networks_that_normalise_their_batch_see_it_whole(which: str) -> None:
    inputs, outputs = {"encoder": (4, 2), "decoder": (1, 4)}[which]
    agree(tiny(**{which: Normalised(inputs, outputs)}), partly_labelled(20), batch_size=4, steps=3, seed=0)


class ByClass(lvm.SemiSupervisedVAE):
    """A stratum for every class, the last for rows without a label."""

    def strata(self, x, y, *, batch_size):  # type: ignore[no-untyped-def]
        numbers = [(y == k).nonzero().squeeze(-1) for k in (0, 1, 2, -1)]
        return list(zip(numbers, (1, 1, 1, batch_size - sum(len(n) > 0 for n in numbers[:3])), strict=True))


class UnknownFirst(lvm.SemiSupervisedVAE):
    """Rows without a label stand first."""

    def strata(self, x, y, *, batch_size):  # type: ignore[no-untyped-def]
        return super().strata(x, y, batch_size=batch_size)[::-1]


@pytest.mark.parametrize("present", [(0, 1, 2), (1, 2), (0, 2)])
def test_strata_of_ones_own(present: tuple[int, ...]) -> None:
    """Other known labels behind those of the first stratum, and a first stratum without rows."""
    x, y = partly_labelled(40)
    y = torch.where(torch.isin(y, torch.tensor(present)), y, -1)
    agree(tiny(ByClass), (x, y), batch_size=8, steps=3, seed=0)


@pytest.mark.parametrize("encoder_sees_label", [True, False])
def test_strata_in_another_order_are_refused_and_train_nothing_unchecked(encoder_sees_label: bool) -> None:
    data = partly_labelled(40)
    ssvae = tiny(UnknownFirst, encoder_sees_label=encoder_sees_label)
    before = copy.deepcopy(ssvae.state_dict())
    with pytest.raises(ValueError, match=r"the first 6 labels y are known, but 6 of them are -1: let the rows"):
        lvm.fit(ssvae, data, batch_size=8, steps=3, seed=0)
    with pytest.raises(lvm.NonFiniteError, match="step 1"):
        lvm.fit(ssvae, data, batch_size=8, steps=3, seed=0, check=False)
    for name, value in ssvae.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(value, before[name])


class Table(nn.Module):
    """The program without the keyword: every row is computed for every label."""

    def __init__(self, inner: lvm.SemiSupervisedVAE) -> None:
        super().__init__()
        self.inner = inner

    def model(self, x=None, y=None, size=None, weight=None):  # type: ignore[no-untyped-def]
        return self.inner.model(x, y, size, weight)

    def guide(self, x, y=None, size=None, weight=None):  # type: ignore[no-untyped-def]
        return self.inner.guide(x, y, size, weight)

    def strata(self, *data, batch_size):  # type: ignore[no-untyped-def]
        return self.inner.strata(*data, batch_size=batch_size)

    def auxiliary_loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.inner.auxiliary_loss(x, y)


def test_a_guide_that_does_not_clamp_is_not_taken_to_do_so() -> None:
    """It does not name the strata, so that the model is not told of them either."""
    x = rows(30)
    y = torch.where(torch.arange(30) < 10, torch.arange(30) % 3, -1)

    def fitted(make: type | None) -> lvm.Fit:
        ssvae = tiny()

        def unclamped(x, y=None, size=None, weight=None):  # type: ignore[no-untyped-def]
            return ssvae.guide(x, None, size, weight)

        return lvm.fit(make(ssvae) if make else ssvae, (x, y), guide=unclamped, batch_size=9, steps=3, seed=0)

    assert fitted(None).history["loss"] == fitted(Table).history["loss"]


def test_labelled_rows_do_not_train_the_classifier_through_the_bound() -> None:
    ssvae, x = tiny(), rows(6)
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(ssvae.model, ssvae.guide, x, torch.arange(6) % 3)
    gradients = torch.autograd.grad(loss, list(ssvae.classifier.parameters()), allow_unused=True)
    assert all(gradient is None or not bool(gradient.any()) for gradient in gradients)


def test_evidence_sums_over_unknown_labels_and_keeps_known_ones() -> None:
    ssvae, x = tiny(), rows(3)
    with torch.no_grad():  # the encoder is not trained: a proposal near the posterior keeps the weights even
        ssvae.decoder.rest.layers[-1].weight.mul_(0.3)
        ssvae.encoder.network.rest.layers[-1].weight.mul_(0.1)
        ssvae.encoder.network.rest.layers[-1].bias.copy_(torch.tensor([0.0, 0.6]))
    y = torch.tensor([-1, 2, -1])
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / np.sqrt(2 * np.pi)
    log_joint = np.empty((3, len(nodes), 3))
    with torch.no_grad():
        for label in range(3):
            for k, node in enumerate(nodes):
                z = torch.full((3, 1), node, dtype=torch.float64)
                decoded = ssvae.likelihood(ssvae.decoder(z, torch.full((3,), label)))
                mean, scale = decoded.base_dist.loc.numpy(), ssvae.likelihood.scale.item()
                density = scipy.stats.norm.logpdf(x.numpy(), mean, scale).sum(-1)
                log_joint[label, k] = density - np.log(3)
    unlabelled = mixture_of_labels_log_evidence(log_joint, weights)
    labelled = mixture_of_labels_log_evidence(log_joint[2:], weights)
    found = lvm.log_evidence(ssvae, (x, y), num_samples=2000, seed=0, return_diagnostics=True)
    expected = np.where(y.numpy() >= 0, labelled, unlabelled)
    assert np.all(np.abs(found.log_evidence.numpy() - expected) < 4.5 * found.standard_error.numpy() + 1e-9)
    assert found.standard_error.max() < 0.05


def test_auxiliary_loss_is_the_mean_over_labelled_rows_and_stays_out_of_the_bound() -> None:
    ssvae, x = tiny(classifier_weight=7.0), rows(5)
    y = torch.tensor([-1, 2, -1, 0, 1])
    log_q = ssvae.classifier(x).log_softmax(-1)
    expected = -7.0 * (log_q[1, 2] + log_q[3, 0] + log_q[4, 1]) / 3
    torch.testing.assert_close(ssvae.auxiliary_loss(x, y), expected)
    assert ssvae.auxiliary_loss(x, torch.full((5,), -1)).item() == 0.0
    both = tiny(classifier_weight=7.0, smoothness_weight=3.0)
    torch.manual_seed(1)
    regulariser = classifier_smoothness(both.classifier, x, y < 0)
    torch.manual_seed(1)
    torch.testing.assert_close(both.auxiliary_loss(x, y), expected + 3.0 * regulariser)
    assert tiny(classifier_weight=0.0).auxiliary_loss(x, y).item() == 0.0
    fit = lvm.fit(ssvae, (x, y), steps=2, seed=0)
    assert fit.history["auxiliary_loss"][0] == pytest.approx(expected.item())
    parts = sum(v[0] for v in fit.history["reconstruction"].values()) - sum(v[0] for v in fit.history["kl"].values())
    assert fit.history["elbo"][0] == pytest.approx(parts)
    assert fit.history["loss"][0] == pytest.approx(-5 * fit.history["elbo"][0])


def test_smoothness_of_a_linear_classifier_by_hand() -> None:
    """The worst direction of two linear logits is along the difference of their weights, either way."""
    x = rows(7)
    classifier = nn.Linear(4, 2).double()
    unlabelled = torch.arange(7) > 2
    spread = np.sqrt(x.numpy().var(0).sum())
    weight, bias = classifier.weight.detach().numpy(), classifier.bias.detach().numpy()
    along = (weight[0] - weight[1]) / np.linalg.norm(weight[0] - weight[1])

    def probabilities(points: np.ndarray) -> np.ndarray:
        return scipy.special.softmax(points @ weight.T + bias, -1)

    q = probabilities(x.numpy())
    moved = [probabilities(x.numpy() + sign * RADIUS * spread * along) for sign in (1, -1)]
    divergences = np.stack([(q * np.log(q / p)).sum(-1) for p in moved])
    entropy = scipy.stats.entropy(q[3:], axis=-1).mean()
    evenness = scipy.stats.entropy(q[3:].mean(0))
    rest = CERTAINTY * (entropy - BALANCE * evenness)
    for seed in range(5):
        torch.manual_seed(seed)
        found = classifier_smoothness(classifier, x, unlabelled).item()
        assert divergences.min(0).mean() - 1e-12 <= found - rest <= divergences.max(0).mean() + 1e-12
        picked = classifier_smoothness(classifier, x[:1].expand(7, 4) + 1e-9 * x, unlabelled)
        assert bool(picked.isfinite())


def test_strata_hold_each_row_once_and_every_batch_has_labels() -> None:
    y = torch.tensor([-1] * 90 + [0, 1, 2] * 4)
    (labelled, few), (unlabelled, many) = tiny(labelled_share=0.25).strata(rows(102), y, batch_size=20)
    assert (few, many) == (5, 15)
    assert torch.equal(torch.cat([labelled, unlabelled]).sort().values, torch.arange(102))
    assert bool((y[labelled] >= 0).all())
    (_, few), _ = tiny(labelled_share=0.25).strata(rows(92), y[:92], batch_size=20)
    assert few == 2


def test_stratified_minibatches_are_unbiased() -> None:
    ssvae, x = tiny(), rows(60)
    y = torch.where(torch.arange(60) < 6, torch.arange(60) % 3, -1)
    full = by_hand(ssvae, x, y, torch.zeros(3, 60, 1, dtype=torch.float64)).detach()
    strata = ssvae.strata(x, y, batch_size=10)
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(4000):
        picked = [(rows_[torch.randperm(len(rows_), generator=generator)[:b]], b, len(rows_)) for rows_, b in strata]
        estimates.append(sum((n / b) * full[index].sum() for index, b, n in picked))
    values = torch.stack([torch.as_tensor(value) for value in estimates])
    assert abs(values.mean() - full.sum()) < 4 * values.std() / len(values) ** 0.5


@pytest.mark.parametrize("encoder_sees_label", [True, False])
def test_learns_to_classify_from_a_few_labels(encoder_sees_label: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(300) % 3
    centres = 3 * torch.eye(3, 4, dtype=torch.float64)
    x = centres[truth] + 0.3 * torch.randn(300, 4, generator=generator, dtype=torch.float64)
    y = torch.where(torch.arange(300) < 9, truth, -1)
    ssvae = tiny(encoder_sees_label=encoder_sees_label)
    fit = lvm.fit(ssvae, (x, y), epochs=100, batch_size=50, seed=0)
    assert (ssvae.classify(x).argmax(-1) == truth).double().mean() > 0.95
    assert set(fit.history["kl"]) == {"y", "z"}
    assert ssvae.classify(x).sum(-1).tolist() == pytest.approx([1.0] * 300)


def test_hidden_labels_leak_nothing() -> None:
    x, truth = rows(40), torch.arange(40) % 3
    y = torch.where(torch.arange(40) < 6, truth, -1)
    losses = [lvm.fit(tiny(), (x, y), steps=3, seed=0).history["loss"] for _ in range(2)]
    assert losses[0] == losses[1]


def test_sampling_by_class_and_decoding() -> None:
    ssvae = tiny(latent_dim=2)
    assert ssvae.sample(4, y=1, seed=0).shape == (4, 4)
    assert torch.equal(ssvae.sample(4, seed=0), ssvae.sample(4, seed=0))
    by_label = ssvae.sample(3, y=torch.tensor([0, 1, 2]), seed=0, mean=True)
    assert not torch.equal(by_label[0], by_label[1])
    assert ssvae.reconstruct(rows(5)).shape == (5, 4)
    assert ssvae.encode(rows(5), torch.zeros(5, dtype=torch.long)).mean.shape == (5, 2)
    assert ssvae.encode(rows(5)).mean.shape == (5, 2)
    trace = poutine.trace(ssvae.model).get_trace(None, None, size=6)
    assert trace.nodes["x"]["value"].shape == (6, 4)


def test_own_networks() -> None:
    ssvae = tiny(latent_dim=2, classifier=nn.Linear(4, 3), encoder=Joined(4, 4), decoder=Joined(2, 4))
    fit = lvm.fit(ssvae, (rows(20), torch.arange(20) % 3), steps=2, seed=0)
    assert "encoder.network.linear.weight" in fit.params


def test_errors() -> None:
    x = rows(20)
    with pytest.raises(ValueError, match=r"labels y range from 0 to 3.*num_classes=3 allows -1 to 2"):
        lvm.fit(tiny(), (x, torch.arange(20) % 4), epochs=1)
    late = torch.cat([torch.full((19,), -1), torch.tensor([9])])
    with pytest.raises(ValueError, match=r"labels y range from -1 to 9"):
        lvm.fit(tiny(), (x, late), epochs=1, batch_size=5)
    with pytest.raises(ValueError, match=r"labels y have dtype torch.float64.*integers"):
        lvm.fit(tiny(), (x, torch.zeros(20, dtype=torch.float64)), epochs=1)
    with pytest.raises(ValueError, match="num_classes=0"):
        lvm.SemiSupervisedVAE(4, 0, 2)
    with pytest.raises(ValueError, match="classifier_weight=-1"):
        lvm.SemiSupervisedVAE(4, 3, 2, classifier_weight=-1)
    with pytest.raises(ValueError, match=r"\(20, 4\).*num_features=5"):
        lvm.fit(lvm.SemiSupervisedVAE(5, 3, 2), (x, torch.arange(20) % 3), epochs=1)
    with pytest.raises(lvm.ProgramError, match=r"y.*TraceEnum_ELBO"):
        lvm.fit(tiny(), (x, torch.arange(20) % 3), elbo=Trace_ELBO(), epochs=1)
