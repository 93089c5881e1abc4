"""Draws with named dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Posterior"]


@dataclass(frozen=True, repr=False, eq=False)
class Posterior(Mapping[str, Tensor]):
    r"""Draws from a posterior; a mapping from site to tensor.

    .. math:: z^{(s)} \sim q(z \mid x), \qquad k^{(s)} \sim p(k \mid x, z^{(s)})

    Draws of a `Fit` are independent; those of `Chains` are not, and come from p(z | x) itself. Sites that enumeration
    summed out are drawn from their exact conditional, never from their prior.

    A site that the guide enumerates is drawn from the guide. ``log_p - log_q`` is the log of a draw's importance
    weight; its mean over draws is the plain ELBO of the data set, in nats.

    Attributes:
        draws: by site, shape (num_draws, *plates, *event).
        dims: by site, names of the dims after the first: the plates, outermost first, then the event's.
        log_p: log p(x, draw), shape (num_draws,), nats of the data set passed.
        log_q: log density of the draw under the posterior that made it, shape (num_draws,), same units; None for draws
            of `Chains`, whose density is known up to a factor only.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> fit = lvm.fit(lvm.PPCA(num_features=3, latent_dim=2), x, steps=20, seed=0)
        >>> posterior = fit.posterior(x, num_draws=10, seed=0)
        >>> posterior
        Posterior of 10 draws:
          z (data: 50, latent: 2)
        >>> posterior["z"].shape
        torch.Size([10, 50, 2])
    """

    draws: Mapping[str, Tensor]
    dims: Mapping[str, tuple[str, ...]]
    log_p: Tensor
    log_q: Tensor | None

    def __getitem__(self, site: str) -> Tensor:
        if site not in self.draws:
            raise KeyError(f"no site {site!r} in this posterior; it has {', '.join(self.draws) or 'none'}")
        return self.draws[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.draws)

    def __len__(self) -> int:
        return len(self.draws)

    # two posteriors are one only if they are the same draws: tensors have no truth value to compare mappings by
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def num_draws(self) -> int:
        """How many draws there are."""
        return len(self.log_p)

    def mean(self, site: str) -> Tensor:
        """The mean over draws of one site, in double precision; shape (*plates, *event)."""
        return self[site].double().mean(0)

    def __repr__(self) -> str:
        lines = [f"Posterior of {self.num_draws} draws:"]
        for site, value in self.draws.items():
            shape = ", ".join(f"{name}: {size}" for name, size in zip(self.dims[site], value.shape[1:], strict=True))
            lines.append(f"  {site} ({shape})")
        return "\n".join(lines)
