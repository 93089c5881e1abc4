"""The variational autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_lvm.likelihoods import make_likelihood
from pyro_lvm.models.amortised import DiagonalNormal, PriorScale, evaluating, matching, require_columns
from pyro_lvm.networks import MLP
from pyro_lvm.storage.classes import storable
from pyro_lvm.walk import by_rows

__all__ = ["VAE"]


@storable
class VAE(nn.Module):
    r"""A variational autoencoder: a deep latent variable model with an amortised guide.

    .. math::
        z_i \sim N(0, \sigma_z^2 I_L), \qquad x_i \mid z_i \sim p(x \mid f_\theta(z_i)), \qquad
        q_\phi(z_i \mid x_i) = N\big(\mu_\phi(x_i), \operatorname{diag} \sigma_\phi^2(x_i)\big)

    Sites: ``z`` (plate "data"; event (L,), dimension "latent"), ``x`` (plate "data"; event (D,), dimension
    "feature"; observed). Estimators: any; the KL has a closed form. :math:`\sigma_z` is 1 unless it is learned.

    When it is wrong: the guide ignores posterior correlation, so the ELBO lies below the evidence also at its best;
    a decoder strong enough to do without z leaves z unused (posterior collapse); with a Normal likelihood the scale
    decides how much of the data counts as noise, so learn it.

    Source: Kingma & Welling, 2014, Auto-encoding variational Bayes, https://arxiv.org/abs/1312.6114.

    Args:
        num_features: D, numbers per datum.
        latent_dim: L, latent coordinates.
        hidden: widths of the encoder's hidden layers; the decoder has them in reverse.
        likelihood: a name of `pyro_lvm.likelihoods.make_likelihood` or a likelihood module.
        encoder: any module from (..., D) to (..., 2 L): location, raw scale. None makes an `MLP`.
        decoder: any module from (..., L) to (..., D * the likelihood's `num_parameters`). None makes an `MLP`.
        learn_prior_scale: whether :math:`\sigma_z` is a parameter.

    Raises:
        ValueError: if a size is below 1 or the likelihood is unknown; from `model`, if x has not D columns, naming
            ``num_features``.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = lvm.datasets.digits().train.x
        >>> vae = lvm.VAE(num_features=64, latent_dim=2, hidden=(32,), likelihood="normal")
        >>> fit = lvm.fit(vae, x, steps=10, batch_size=100, seed=0)
        >>> vae.encode(x[:5]).mean.shape, vae.reconstruct(x[:5]).shape
        (torch.Size([5, 2]), torch.Size([5, 64]))
    """

    def __init__(
        self,
        num_features: int,
        latent_dim: int,
        hidden: Sequence[int] = (400,),
        likelihood: str | nn.Module = "bernoulli",
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        learn_prior_scale: bool = False,
    ) -> None:
        super().__init__()
        if num_features < 1 or latent_dim < 1:
            raise ValueError(f"num_features={num_features} and latent_dim={latent_dim} must both be at least 1")
        self.num_features, self.latent_dim = num_features, latent_dim
        self._given = {
            "hidden": tuple(hidden),
            "encoder": encoder,
            "decoder": decoder,
            "learn_prior_scale": learn_prior_scale,
        }
        self.likelihood: Any = make_likelihood(likelihood, num_features)
        num_outputs = num_features * self.likelihood.num_parameters
        self.encoder = DiagonalNormal(encoder or MLP(num_features, hidden, 2 * latent_dim), latent_dim, "encoder")
        self.decoder = decoder or MLP(latent_dim, tuple(reversed(hidden)), num_outputs)
        self.prior_scale = PriorScale(learn_prior_scale)

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The generative story; x: rows (batch, D), or None to draw ``size`` rows."""
        require_columns(x, self.num_features)
        with pyro.plate("data", size or len(x), subsample=x):  # type: ignore[arg-type]
            z = pyro.sample("z", self.prior(), infer={"event_dims": ("latent",)})  # type: ignore[arg-type]
            return pyro.sample("x", self.likelihood(self.decoder(z)), obs=x, infer={"event_dims": ("feature",)})  # type: ignore[arg-type]

    def guide(self, x: Tensor, size: int | None = None) -> Tensor:
        """The encoder's Normal for every row of x (batch, D)."""
        require_columns(x, self.num_features)
        with pyro.plate("data", size or len(x), subsample=x):
            return pyro.sample("z", self.encoder(x))

    def prior(self) -> TorchDistribution:
        """p(z), event shape (L,)."""
        scale = self.prior_scale()
        prior: TorchDistribution = dist.Normal(torch.zeros_like(scale), scale).expand([self.latent_dim]).to_event(1)
        return prior

    @by_rows()
    def encode(self, x: Any) -> TorchDistribution:
        """q(z | x) for rows x (n, D), any data: batch shape (n,), event shape (L,)."""
        with evaluating(self):
            encoded: TorchDistribution = self.encoder(matching(self, x))
            return encoded

    def decode(self, z: Tensor) -> TorchDistribution:
        """p(x | z) for latents z (..., L): batch shape (...), event shape (D,)."""
        with evaluating(self):
            decoded: TorchDistribution = self.likelihood(self.decoder(matching(self, z)))
            return decoded

    @by_rows()
    def reconstruct(self, x: Any) -> Tensor:
        """E[x' | z = E_q[z | x]] of rows x, any data, shape (n, D)."""
        return self.decode(self.encode(x).mean).mean

    def sample(self, n: int, seed: int | None = None, *, mean: bool = False) -> Tensor:
        """Draw n data from the model, shape (n, D); with ``mean``, E[x | z] in place of a draw of x."""
        with evaluating(self, seed):
            decoded = self.decode(self.prior().sample((n,)))
            return decoded.mean if mean else decoded.sample()

    def interpolate(self, start: Tensor, end: Tensor, steps: int = 10) -> Tensor:
        """E[x | z] along the straight line between the codes of two data (D,); shape (steps, D)."""
        first, last = self.encode(torch.stack([start, end])).mean
        fraction = torch.linspace(0, 1, steps, dtype=first.dtype, device=first.device).unsqueeze(-1)
        return self.decode(first + fraction * (last - first)).mean
