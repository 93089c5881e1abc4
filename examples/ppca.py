"""Probabilistic PCA by gradients against its closed form, and factor analysis beside it."""

from __future__ import annotations

import torch
from sklearn.datasets import load_iris

import pyro_lvm as lvm


def main(epochs: int = 2000) -> tuple[float, float, float]:
    """Log-likelihood per datum of iris: PPCA by SVI, PPCA in closed form, factor analysis by SVI."""
    x = torch.tensor(load_iris().data, dtype=torch.float64)
    ppca = lvm.PPCA(num_features=4, latent_dim=2)
    fit = lvm.fit(ppca, x, epochs=epochs, seed=0)
    exact = lvm.PPCA.closed_form(x, latent_dim=2)
    factors = lvm.FactorAnalysis(num_features=4, latent_dim=1)
    lvm.fit(factors, x, epochs=epochs, seed=0)
    by_svi, by_formula, by_factors = (m.log_prob(x).mean().item() for m in (ppca, exact, factors))
    print(f"PPCA by SVI {by_svi:.4f} (ELBO {fit.elbo:.4f}), closed form {by_formula:.4f} nats/datum")
    print(f"factor analysis, one factor {by_factors:.4f} nats/datum")
    print("principal axes, by SVI and in closed form:")
    print(torch.cat([ppca.principal_axes(), exact.principal_axes()], dim=-1).round(decimals=3))
    return by_svi, by_formula, by_factors


if __name__ == "__main__":
    main()
