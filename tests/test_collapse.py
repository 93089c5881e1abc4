"""A decoder that ignores its latents is where plain training ends, and weighted bounds do not."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import scipy.linalg
import scipy.stats
import torch

import pyro_lvm as lvm
from pyro_lvm.elbo import FreeBits, KLWeighted
from pyro_lvm.inference import bound


def codewords():
    """Eight codewords of seven bits, any two bits of which are independent: no pair of features betrays a code."""
    return (scipy.linalg.hadamard(8)[:, 1:] > 0).astype(float)


def noisy_codewords(n=400, flip=0.1):
    generator = torch.Generator().manual_seed(0)
    clean = torch.as_tensor(codewords(), dtype=torch.float32)[torch.randint(0, 8, (n,), generator=generator)]
    flips = torch.rand(clean.shape, generator=generator) < flip
    return torch.where(flips, 1 - clean, clean)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_collapse_is_mended_by_free_bits_and_by_warm_up(seed, monkeypatch):
    """A code pays once the decoder reads all of it; the KL charges at once, and plain training gives it up by then."""
    monkeypatch.setattr(bound, "MAX_PASSES", 8)  # to within a tenth of what is at stake
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
        fit = lvm.fit(vae, x, elbo=elbo, steps=300, lr=0.01, seed=seed, progress=False)
        found[name] = fit.elbo, float(np.mean(fit.history["kl"]["z"][-20:]))
    assert found["plain"][1] < 0.2
    assert found["plain"][0] == pytest.approx(independent, abs=0.05)
    truth = oracles.codewords_log_density(x.numpy(), codewords(), 0.1).mean()
    for name in ("free", "warm"):
        elbo, kl = found[name]
        assert kl > 1.0, name
        assert found["plain"][0] + 0.2 < elbo < truth + 0.1, name
