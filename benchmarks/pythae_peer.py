"""Pythae's VAE, stepped by torch: its own trainer is for whole runs, with files and progress bars."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from benchmarks.by_hand import by_hand
from benchmarks.stock import slices
from benchmarks.timing import Burst


def pythae_vae(x: Tensor, sizes: tuple[int, int, int], batch_size: int) -> Burst:
    """A burst over all of x with networks of the given widths."""
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    features, hidden, latent = sizes

    class Encoder(BaseEncoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(features, hidden), nn.ReLU())
            self.loc, self.log_variance = nn.Linear(hidden, latent), nn.Linear(hidden, latent)

        def forward(self, x: Tensor) -> Any:
            h = self.body(x)
            return ModelOutput(embedding=self.loc(h), log_covariance=self.log_variance(h))

    class Decoder(BaseDecoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, features), nn.Sigmoid())

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.body(z))

    config = VAEConfig(input_dim=(features,), latent_dim=latent, reconstruction_loss="bce")
    vae = VAE(config, Encoder(), Decoder())
    return by_hand(lambda rows: vae({"data": rows}).loss, vae.parameters(), slices(batch_size, x))
