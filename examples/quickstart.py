"""Four model/guide pairs and a mean-field baseline on handwriting: fit, judge, draw, hand to ArviZ.

python examples/quickstart.py [--data digits|mnist] [--out runs/quickstart] [--epochs-scale 1.0]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

import pyro_lvm as lvm


@dataclass(frozen=True)
class Handwriting:
    """Images as rows in [0, 1], their classes, and the images on their ten leading principal axes."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    on_axes: Tensor


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    program: str
    fit: lvm.Fit
    evidence: Tensor
    how: str
    note: str = ""

    def __str__(self) -> str:
        """The line; the gap is the evidence minus the ELBO."""
        info, evidence = self.fit.info, self.evidence.mean().item()
        return (
            f"{self.program:<30} {info['estimator']:<22} {self.fit.elbo:>9.3f} {evidence:>10.3f} {self.how:<11} "
            f"{evidence - self.fit.elbo:>7.3f} {info['seconds']:>8.1f}   {self.note}"
        )


def load(name: str) -> Handwriting:
    """Scikit-learn's digits (offline), or MNIST from LVM_DATA or ./data."""
    data = lvm.datasets.digits() if name == "digits" else lvm.datasets.mnist(os.environ.get("LVM_DATA", "data"))
    centred = data.train.x.double() - data.train.x.double().mean(0)
    _, _, axes = torch.linalg.svd(centred[:5000], full_matrices=False)
    return Handwriting(data.train.x, data.train.y, data.test.x, data.test.y, centred @ axes[:10].T)


def main(data: str = "digits", out: str = "runs/quickstart", epochs_scale: float = 1.0) -> list[Row]:
    """Fit the five programs, print the table, write the pictures and ``posterior.nc``."""
    images = load(data)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    batch_size = 100 if data == "digits" else 200

    def epochs(full: int) -> int:
        shortened = full if data == "digits" else max(1, full // 20)
        return max(1, round(shortened * epochs_scale))

    rows = []
    for run in (fit_mixture, fit_ppca, fit_vae, fit_semi_supervised_vae, fit_mean_field):
        print(f"{run.__name__.removeprefix('fit_')} ...", flush=True)
        rows.append(run(images, epochs, batch_size, folder))
    print(f"\n{'program':<30} {'estimator':<22} {'ELBO':>9} {'evidence':>10} {'':<11} {'gap':>7} {'seconds':>8}")
    for row in rows:
        print(row)
    print(f"\nnats per datum; pictures and posterior.nc are in {folder}")
    return rows


def fit_mixture(images: Handwriting, epochs: Callable[[int], int], batch_size: int, folder: Path) -> Row:
    """Ten Gaussians on ten principal axes, the label summed out: the bound is the likelihood."""
    x = images.on_axes
    gmm = lvm.GaussianMixture(num_components=10, num_features=10, covariance="full")
    fit = lvm.fit(gmm, x, epochs=epochs(300), batch_size=None if len(x) < 5000 else 1000, seed=0)
    agreement = adjusted_rand_score(images.y, gmm.responsibilities(x).argmax(-1))
    lvm.plots.mixture(gmm, x[:2000]).savefig(folder / "mixture.png")
    return Row("GaussianMixture", fit, lvm.log_evidence(fit, x), "exact", f"adjusted Rand index {agreement:.3f}")


def fit_ppca(images: Handwriting, epochs: Callable[[int], int], batch_size: int, folder: Path) -> Row:
    """Ten linear factors of the pixels; the maximum has a closed form."""
    x = images.x.double()
    ppca = lvm.PPCA(num_features=x.shape[-1], latent_dim=10)
    fit = lvm.fit(ppca, x, epochs=epochs(150), batch_size=batch_size, seed=0)
    best = lvm.PPCA.closed_form(x, latent_dim=10).log_prob(x).mean().item()
    lvm.plots.latent(ppca.posterior(x[:2000]).mean, images.y[:2000]).savefig(folder / "ppca_latent.png")
    return Row("PPCA", fit, lvm.log_evidence(fit, x), "exact", f"closed form {best:.3f}")


def fit_vae(images: Handwriting, epochs: Callable[[int], int], batch_size: int, folder: Path) -> Row:
    """A VAE with a learned noise scale, judged on images it has not seen."""
    num_features = images.x.shape[-1]
    likelihood = lvm.likelihoods.Normal(num_features, initial_scale=0.2)
    vae = lvm.VAE(num_features, latent_dim=10, hidden=(200,), likelihood=likelihood)
    fit = lvm.fit(vae, images.x, epochs=epochs(200), batch_size=batch_size, seed=0, validation=images.x_test)
    evidence = lvm.log_evidence(fit, images.x[:1000], num_samples=200, seed=0)
    plots = lvm.plots
    plots.loss(fit).savefig(folder / "vae_loss.png")
    plots.samples(vae, num=64, seed=0).savefig(folder / "vae_samples.png")
    plots.reconstructions(vae, images.x_test[:16]).savefig(folder / "vae_reconstructions.png")
    plots.latent(vae.encode(images.x_test).mean, images.y_test).savefig(folder / "vae_latent.png")
    plots.interpolation(vae, images.x_test[:5], images.x_test[5:10]).savefig(folder / "vae_interpolation.png")
    return Row("VAE", fit, evidence, "importance", f"test ELBO {fit.history['validation_elbo'][-1]:.3f}")


def fit_semi_supervised_vae(images: Handwriting, epochs: Callable[[int], int], batch_size: int, folder: Path) -> Row:
    """A hundred labels; the other images' labels are summed out."""
    y = lvm.datasets.hide_labels(images.y, keep=100, seed=0)
    likelihood = lvm.likelihoods.Normal(images.x.shape[-1], initial_scale=0.2)
    ssvae = lvm.SemiSupervisedVAE(images.x.shape[-1], 10, latent_dim=10, hidden=(200,), likelihood=likelihood)
    fit = lvm.fit(ssvae, (images.x, y), epochs=epochs(60), batch_size=batch_size, seed=0)
    evidence = lvm.log_evidence(fit, (images.x[:1000], y[:1000]), num_samples=100, seed=0)
    accuracy = (ssvae.classify(images.x_test).argmax(-1) == images.y_test).double().mean().item()
    by_class = torch.cat([ssvae.sample(10, y=label, seed=label, mean=True) for label in range(10)])
    lvm.plots.image_grid(by_class, columns=10).savefig(folder / "ssvae_by_class.png")
    return Row("SemiSupervisedVAE, 100 labels", fit, evidence, "importance", f"test accuracy {100 * accuracy:.1f} %")


def fit_mean_field(images: Handwriting, epochs: Callable[[int], int], batch_size: int, folder: Path) -> Row:
    """The baseline: a Bayesian mixture under a mean-field guide that is built for it, handed to ArviZ."""
    x = images.on_axes[:2000, :2]
    prior = lvm.priors.weakly_informative(x)
    gmm = lvm.GaussianMixture(num_components=10, num_features=2, covariance="diag", prior=prior)
    fit = lvm.fit(gmm, x, epochs=epochs(600), seed=0)
    fit.to_arviz(x[:200], num_draws=200, seed=0).to_netcdf(str(folder / "posterior.nc"))
    lvm.plots.loss(fit).savefig(folder / "mean_field_loss.png")
    return Row("GaussianMixture, Bayesian", fit, lvm.log_evidence(fit, x, num_samples=100, seed=0), "importance")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--out", default="runs/quickstart")
    parser.add_argument("--epochs-scale", type=float, default=1.0)
    arguments = parser.parse_args()
    main(arguments.data, arguments.out, arguments.epochs_scale)
