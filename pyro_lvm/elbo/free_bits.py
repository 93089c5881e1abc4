r"""Free bits: a KL that costs nothing below a floor.

.. math:: E_q[\log p(x \mid z)] - \sum_j \max(\lambda, \mathrm{KL}_j)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pyro.infer import ELBO, TraceMeanField_ELBO
from torch import Tensor

from pyro_lvm.elbo.parts import Parts
from pyro_lvm.elbo.reweighted import Reweighted
from pyro_lvm.schedules import Schedule, Scheduled

__all__ = ["FreeBits"]


class FreeBits(Reweighted):
    r"""The bound, with no reward for pressing the KL of a latent unit below a floor.

    .. math:: \mathcal L_\lambda = \sum_i E_{q(z_i \mid x_i)}[\log p(x_i \mid z_i)]
              - n \sum_j \max\Bigl(\lambda,\; \frac1n \sum_i \mathrm{KL}(q(z_{ij} \mid x_i) \,\|\, p(z_{ij}))\Bigr)

    A unit j with less than :math:`\lambda` nats per datum feels no pull towards the prior, only the reconstruction,
    and so cannot collapse for the KL's sake. This is the form of Kingma et al. (2016, appendix C8): the maximum is of
    the mean over the batch, not the mean of each datum's maximum. A unit is one coordinate of a site's event (of a
    site with plates of its own, one for each of their rows); ``per="site"`` takes all coordinates of a site as one
    group, whose floor is lambda together. A site whose distribution ties its coordinates (`MultivariateNormal`), or
    that the guide enumerates, is one unit anyway.

    Sites: all latent sites in the data plate, or those in ``sites``; latents shared by all data keep their plain KL,
    as do local sites not named. Enumerated sites are treated as in `KLWeighted`; the KL of a site given an enumerated
    one is averaged over it before the maximum is taken.

    When it is wrong: below the floor the objective is no longer the bound's shape, and a model whose best use of a
    unit is none wastes lambda nats on it (lower `fit.elbo`, which is the plain bound). The maximum of a minibatch's
    mean has a mean above the whole data's, the more so where a KL is taken at the draw (``base=Trace_ELBO()``); prefer
    closed forms and batches of some size.

    Source: Kingma et al., 2016, Improving variational inference with inverse autoregressive flow,
    https://arxiv.org/abs/1606.04934.

    Args:
        base: as in `KLWeighted`.
        nats: lambda, nats per datum and unit, 0 or more, or a function of the fraction of training.
        per: "unit" or "site".
        sites: names of the latent sites with a floor; None for all in the data plate.

    Raises:
        TypeError: if ``base`` is none of those, or ``nats`` no number.
        ValueError: if ``nats`` is negative, or ``per`` is unknown.
        ProgramError: from a fit, before the first step: if no latent site has a value for each datum, or a guide site
            is drawn without a path for gradients.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> free = lvm.elbo.FreeBits(nats=0.3)
        >>> fit = lvm.fit(lvm.PPCA(num_features=3, latent_dim=1), x, elbo=free, steps=300, seed=0)
        >>> fit.history["kl"]["z"][-1] > 0.29
        True
    """

    def __init__(
        self,
        base: ELBO | type[ELBO] = TraceMeanField_ELBO,
        *,
        nats: float | Schedule,
        per: Literal["unit", "site"] = "unit",
        sites: Sequence[str] | None = None,
    ) -> None:
        super().__init__(base, sites)
        if per not in ("unit", "site"):
            raise ValueError(f"per={per!r} is not known: use 'unit' or 'site'")
        self.nats = Scheduled(nats, "nats", lambda value: value >= 0, "0 or more nats per datum and unit")
        self.per = per

    def schedules(self) -> tuple[Scheduled, ...]:
        """Lambda."""
        return (self.nats,)

    def options(self) -> list[str]:
        """The group, where it is not the unit."""
        return [] if self.per == "unit" else [f"per={self.per!r}"]

    def objective(self, parts: Parts) -> Tensor:
        """Reconstruction - n sum_j max(lambda, KL_j / n), nats of the whole data set."""
        plate = parts.data_plate()
        names = self.chosen(parts, per_datum=True)
        result = parts.reconstruction
        for name, kl in parts.kl.items():
            if name not in names:
                result = result - kl
                continue
            units = parts.units(name, plate) if self.per == "unit" else kl
            floor = self.nats.now().to(units)
            # below the floor the gradient is nought, and not a half as torch has it where both are equal
            charged = torch.where(units > plate.size * floor, units, plate.size * floor)
            result = result - charged.sum()
        return result
