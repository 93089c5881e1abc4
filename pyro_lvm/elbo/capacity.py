r"""A KL held at a capacity.

.. math:: E_q[\log p(x \mid z)] - \gamma\, \lvert \mathrm{KL}(q(z \mid x) \,\|\, p(z)) - C \rvert
"""

from __future__ import annotations

from collections.abc import Sequence

from pyro.infer import ELBO, TraceMeanField_ELBO
from torch import Tensor

from pyro_lvm.elbo.parts import Parts
from pyro_lvm.elbo.reweighted import Reweighted
from pyro_lvm.schedules import Schedule, Scheduled

__all__ = ["Capacity"]


class Capacity(Reweighted):
    r"""The reconstruction, with the KL per datum held at C nats, a number or a schedule.

    .. math:: \mathcal L_C = \sum_i E_{q(z_i \mid x_i)}[\log p(x_i \mid z_i)]
              - n \gamma \,\Bigl\lvert \frac1n \sum_i \mathrm{KL}(q(z_i \mid x_i) \,\|\, p(z_i)) - C \Bigr\rvert

    C is the mean number of nats that the code of a datum may carry. Raised slowly from 0, it lets the latents take on
    what explains the data best, one after another. In a minibatch the mean is over its rows. The absolute value is
    outside of that mean (written for each datum it would force every code to the same length).

    Sites: the KL is the sum over all latent sites in the data plate, or those in ``sites``; latents shared by all data
    keep their plain KL, as do local sites not named. Enumerated sites are treated as in `KLWeighted`.

    When it is wrong: the objective is no bound unless :math:`\gamma = 1` and KL > C; with gamma too small the
    reconstruction wins and the KL stays where it likes. A minibatch's mean KL is noisy, and the mean of absolute
    values over minibatches lies above that of all data: large gamma wants large batches. `fit.elbo` is the plain
    bound.

    Source: Burgess et al., 2018, Understanding disentangling in beta-VAE, https://arxiv.org/abs/1804.03599 (C from 0
    to 25 nats, gamma = 1000).

    Args:
        base: as in `KLWeighted`.
        capacity: C, nats per datum, 0 or more, or a function of the fraction of training.
        gamma: what a nat away from C costs, positive.
        sites: names of the latent sites whose KL is held; None for all in the data plate.

    Raises:
        TypeError: if ``base`` is none of those, or a number is none.
        ValueError: if a number is out of its range.
        ProgramError: from a fit, before the first step: if no latent site has a value for each datum, or a guide site
            is drawn without a path for gradients.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> held = lvm.elbo.Capacity(capacity=0.5, gamma=30.0)
        >>> fit = lvm.fit(lvm.PPCA(num_features=3, latent_dim=1), x, elbo=held, steps=300, lr=0.01, seed=0)
        >>> round(fit.history["kl"]["z"][-1], 1)
        0.5
    """

    def __init__(
        self,
        base: ELBO | type[ELBO] = TraceMeanField_ELBO,
        *,
        capacity: float | Schedule,
        gamma: float = 1000.0,
        sites: Sequence[str] | None = None,
    ) -> None:
        super().__init__(base, sites)
        self.capacity = Scheduled(capacity, "capacity", lambda value: value >= 0, "0 or more nats per datum")
        self.gamma = Scheduled(gamma, "gamma", lambda value: value > 0, "positive")

    def schedules(self) -> tuple[Scheduled, ...]:
        """C and gamma."""
        return (self.capacity, self.gamma)

    def objective(self, parts: Parts) -> Tensor:
        """Reconstruction - n gamma abs(KL / n - C), nats of the whole data set."""
        plate = parts.data_plate()
        names = self.chosen(parts, per_datum=True)
        held = sum((parts.kl[name] for name in names), parts.reconstruction.new_zeros(()))
        others = sum((kl for name, kl in parts.kl.items() if name not in names), parts.reconstruction.new_zeros(()))
        capacity, gamma = (number.now().to(held) for number in self.schedules())
        return parts.reconstruction - others - plate.size * gamma * (held / plate.size - capacity).abs()
