"""A VAE on scikit-learn's digits with an encoder of one's own; swap the estimator, look at the evidence."""

from __future__ import annotations

from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyro_lvm as lvm


def main(epochs: int = 60, num_samples: int = 200) -> dict[str, float]:
    """Test evidence (nats per datum) of one architecture under three estimators."""
    data = lvm.datasets.digits()
    evidence = {}
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO(), Trace_ELBO(num_particles=5, vectorize_particles=True)):
        encoder = lvm.networks.ConvEncoder(num_features=64, latent_dim=8, hidden_channels=(16, 32))
        vae = lvm.VAE(num_features=64, latent_dim=8, hidden=(100,), likelihood="normal", encoder=encoder)
        fit = lvm.fit(vae, data.train.x, elbo=elbo, epochs=epochs, batch_size=100, seed=0)
        test = lvm.log_evidence(fit, data.test.x, num_samples=num_samples, seed=0).mean().item()
        evidence[fit.info["estimator"]] = test
        print(f"{fit.info['estimator']:<45} ELBO {fit.elbo:.3f}, test evidence {test:.3f} nats/datum")
    return evidence


if __name__ == "__main__":
    main()
