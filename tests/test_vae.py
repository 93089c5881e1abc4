"""The VAE against closed forms: a linear decoder is PPCA, one latent dimension can be integrated."""

from __future__ import annotations

import numpy as np
import pyro
import pytest
import torch
from oracles import ppca_log_density, vae_bound_of_one_draw
from pyro import poutine
from torch import nn

import pyro_lvm as lvm


def rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny(**options: object) -> lvm.VAE:
    torch.manual_seed(0)
    return lvm.VAE(4, 2, hidden=(5,), **options).double()  # type: ignore[arg-type]


def test_loss_of_one_draw_equals_numpy() -> None:
    vae, x = tiny(), (rows(7, 4) > 0.5).double()
    guide = poutine.trace(vae.guide).get_trace(x)
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
    drawn = guide.nodes["z"]["value"].detach().numpy()
    encoded, decoded = vae.encode(x), vae.decode(torch.as_tensor(drawn))
    logits = decoded.base_dist.logits.numpy()
    expected = vae_bound_of_one_draw(x.numpy(), drawn, encoded.mean.numpy(), encoded.stddev.numpy(), logits)
    found = model.log_prob_sum() - guide.log_prob_sum()
    np.testing.assert_allclose(found.item(), expected, rtol=1e-12)


def test_linear_decoder_with_one_noise_scale_is_ppca() -> None:
    x = rows(150, 5) @ torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    vae = lvm.VAE(5, 2, hidden=(), likelihood="normal")
    fit = lvm.fit(vae, x, steps=3000, seed=0, optimizer=torch.optim.Adam, lr=1e-2)
    affine = vae.decoder.layers[0]
    exact = ppca_log_density(
        x.numpy(), affine.weight.detach().numpy(), affine.bias.detach().numpy(), vae.likelihood.scale.item()
    )
    evidence = lvm.log_evidence(fit, x, num_samples=2000, seed=0, return_diagnostics=True)
    error = evidence.standard_error.square().sum().sqrt().item() / len(x)
    assert abs(evidence.log_evidence.mean().item() - exact.mean()) < 4 * error + 1e-4
    assert fit.elbo < exact.mean() + 3 * fit.info["elbo_se"]
    assert exact.mean() > lvm.PPCA.closed_form(x, 2).log_prob(x).mean().item() - 0.02


def test_learned_prior_scale_equals_a_wider_prior() -> None:
    torch.manual_seed(0)
    vae = lvm.VAE(4, 2, hidden=(5,), learn_prior_scale=True).double()
    with torch.no_grad():
        vae.prior_scale.log_scale.fill_(np.log(3.0))
    assert vae.prior().stddev.tolist() == pytest.approx([3.0, 3.0])
    x = (rows(50, 4) > 0.5).double()
    fit = lvm.fit(vae, x, steps=5, seed=0)
    assert fit.params["prior_scale.log_scale"].item() != pytest.approx(np.log(3.0))
    vae.prior_scale.reset_parameters()
    assert vae.prior().stddev.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("likelihood", "data"),
    [
        ("bernoulli", lambda x: (x > 0.5).double()),
        ("continuous_bernoulli", lambda x: x),
        ("normal", lambda x: x),
        ("normal_fixed", lambda x: x),
        ("normal_per_feature", lambda x: x),
        ("normal_per_datum", lambda x: x),
        ("categorical", lambda x: (5 * x).floor()),
        ("poisson", lambda x: (5 * x).floor()),
    ],
)
def test_every_likelihood_trains(likelihood: str, data: object) -> None:
    vae, x = tiny(likelihood=likelihood), data(rows(60, 4))  # type: ignore[operator]
    fit = lvm.fit(vae, x, steps=40, batch_size=25, seed=0)
    assert np.isfinite(fit.elbo)
    assert np.mean(fit.history["elbo"][-5:]) > np.mean(fit.history["elbo"][:3])


def test_encode_decode_and_sample_leave_mode_and_random_state_alone() -> None:
    vae, x = tiny(), rows(6, 4)
    vae.train()
    state = torch.get_rng_state()
    first, again = vae.sample(5, seed=1), vae.sample(5, seed=1)
    assert torch.equal(first, again)
    assert set(first.flatten().tolist()) <= {0.0, 1.0}
    assert vae.sample(3, seed=1, mean=True).max() < 1
    assert vae.encode(x.float()).mean.dtype == torch.float64
    assert vae.reconstruct(x).shape == x.shape
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.training
    assert not vae.encode(x).mean.requires_grad


def test_binarised_data_and_arrays_are_encoded_as_their_tensors_are() -> None:
    vae = lvm.VAE(4, 2, hidden=(5,))
    grey = (255 * rows(9, 4)).to(torch.uint8)
    x = lvm.datasets.Binarized(grey)
    torch.testing.assert_close(vae.encode(x).mean, vae.encode(x[:]).mean)
    torch.testing.assert_close(vae.reconstruct(x), vae.reconstruct(x[:]))
    torch.testing.assert_close(vae.encode(x[:].numpy()).mean, vae.encode(x[:]).mean)


def test_interpolation_ends_at_the_reconstructions() -> None:
    vae, x = tiny(), rows(2, 4)
    path = vae.interpolate(x[0], x[1], steps=5)
    torch.testing.assert_close(path[[0, -1]], vae.reconstruct(x))


def test_prior_draws_have_the_size_asked_for() -> None:
    vae = tiny()
    trace = poutine.trace(vae.model).get_trace(None, size=9)
    assert trace.nodes["x"]["value"].shape == (9, 4)
    assert trace.nodes["z"]["cond_indep_stack"][0].name == "data"


def test_particles_vectorise() -> None:
    vae, x = tiny(), (rows(7, 4) > 0.5).double()
    with pyro.plate("particles", 3, dim=-2):
        trace = poutine.trace(vae.guide).get_trace(x)
        model = poutine.trace(poutine.replay(vae.model, trace=trace)).get_trace(x)
    model.compute_log_prob()
    assert model.nodes["x"]["log_prob"].shape == (3, 7)


class Reader(nn.Module):
    """A user's encoder: any module will do."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).tanh()


def test_own_encoder_and_decoder() -> None:
    vae = lvm.VAE(4, 2, encoder=Reader(4), decoder=nn.Linear(2, 4), likelihood="normal").double()
    fit = lvm.fit(vae, rows(30, 4), steps=3, seed=0)
    assert "encoder.network.linear.weight" in fit.params


@pytest.mark.parametrize(
    ("likelihood", "outside", "mend"),
    [
        ("bernoulli", 0.37, "binarize.*continuous_bernoulli"),
        ("continuous_bernoulli", 1.5, "scale the data"),
        ("categorical", 300.0, "number the categories"),
        ("poisson", 0.5, "counts"),
    ],
)
def test_one_value_outside_the_support_is_found_in_the_last_row(likelihood: str, outside: float, mend: str) -> None:
    x = torch.zeros(3000, 4)
    x[-1, 2] = outside
    vae = lvm.VAE(4, 2, hidden=(5,), likelihood=likelihood)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    with pytest.raises(ValueError, match=rf"(?is)site 'x'.*{outside:g}.*row 2999.*{mend}"):
        lvm.fit(vae, x, epochs=1, batch_size=100)
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())


def test_errors() -> None:
    with pytest.raises(ValueError, match="num_features=0"):
        lvm.VAE(0, 2)
    with pytest.raises(ValueError, match="latent_dim=-1"):
        lvm.VAE(3, -1)
    with pytest.raises(ValueError, match=r"\(20, 3\).*num_features=5"):
        lvm.fit(lvm.VAE(5, 2, likelihood="normal"), rows(20, 3), epochs=1)
    with pytest.raises(ValueError, match=r"\(20,\).*num_features=5"):
        lvm.VAE(5, 2).model(rows(20, 1)[:, 0])
    with pytest.raises(ValueError, match=r"encoder gave 3 numbers.*latent_dim=2 needs 4"):
        lvm.fit(lvm.VAE(4, 2, encoder=Reader(3), likelihood="normal"), rows(20, 4), epochs=1)
    with pytest.raises(ValueError, match=r"(?i)bernoulli"):
        lvm.fit(lvm.VAE(4, 2), rows(20, 4), epochs=1)
