r"""A KL with a weight: beta-VAE, warm-up and cyclic annealing.

.. math:: E_q[\log p(x \mid z)] - \beta\, \mathrm{KL}(q(z \mid x) \,\|\, p(z))
"""

from __future__ import annotations

from collections.abc import Sequence

from pyro.infer import ELBO, TraceMeanField_ELBO
from torch import Tensor

from pyro_lvm.elbo.parts import Parts
from pyro_lvm.elbo.reweighted import Reweighted
from pyro_lvm.schedules import Schedule, Scheduled

__all__ = ["KLWeighted"]


class KLWeighted(Reweighted):
    r"""The bound with its KL multiplied by beta, a number or a schedule.

    .. math:: \mathcal L_\beta = \sum_i E_{q(z_i \mid x_i)}[\log p(x_i \mid z_i)]
              - \beta \sum_s \mathrm{KL}(q(z_s) \,\|\, p(z_s))

    Constant :math:`\beta > 1` is the beta-VAE: codes closer to the prior, blunter reconstructions. A schedule from 0 to
    1 is warm-up, which lets the decoder learn to use z before the KL makes z dear, and so keeps the posterior from
    collapsing on the prior; a `schedules.cyclic` one does so again and again. :math:`\beta = 1` is the plain bound.
    Sums over data are scaled by the data plate, so that minibatches average to the whole.

    Sites: every latent site with a KL of its own is weighed, those shared by all data included, or those in ``sites``.
    A site that the guide enumerates is summed over with weights q (``base=TraceEnum_ELBO()``). A site that only the
    model enumerates is summed out exactly inside the reconstruction, has no KL and no weight.

    When it is wrong: for :math:`\beta < 1` the objective is no lower bound (at 0 it is the reconstruction alone, and
    the guide's scales shrink towards none); for :math:`\beta \ne 1` its value says nothing about log p(x). `fit.elbo`
    is the plain bound whatever is optimised. With a likelihood whose scale is learned, beta only trades one scale for
    another (Lucas et al., 2019, https://arxiv.org/abs/1911.02469).

    Source: Higgins et al., 2017, beta-VAE, https://openreview.net/forum?id=Sy2fzU9gl; warm-up: Bowman et al., 2016,
    https://arxiv.org/abs/1511.06349, and Sønderby et al., 2016, https://arxiv.org/abs/1602.02282.

    Args:
        base: `TraceMeanField_ELBO` (a KL stands in closed form where there is one), `Trace_ELBO` (every KL at the
            draw) or `TraceEnum_ELBO` (sites marked for enumeration are summed over); an instance or its class, copied.
        beta: 0 or more, or a function of the fraction of training such as ``schedules.linear(0, 1, until=0.5)``.
        sites: names of the latent sites whose KL is weighed; the others keep weight one. None for all.

    Raises:
        TypeError: if ``base`` is none of these, or ``beta`` is neither a number nor a function.
        ValueError: if beta is negative, at the beginning, middle or end of a schedule.
        ProgramError: from a fit, before the first step: if nothing has a KL, or a guide site is drawn without a path
            for gradients.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> warm_up = lvm.elbo.KLWeighted(beta=lvm.schedules.linear(0.0, 1.0, until=0.5))
        >>> fit = lvm.fit(lvm.PPCA(num_features=3, latent_dim=1), x, elbo=warm_up, steps=20, seed=0)
        >>> fit.info["estimator"]
        'KLWeighted(TraceMeanField_ELBO(), beta=linear(0, 1, until=0.5))'
    """

    def __init__(
        self,
        base: ELBO | type[ELBO] = TraceMeanField_ELBO,
        *,
        beta: float | Schedule,
        sites: Sequence[str] | None = None,
    ) -> None:
        super().__init__(base, sites)
        self.beta = Scheduled(beta, "beta", lambda value: value >= 0, "0 or more")

    def schedules(self) -> tuple[Scheduled, ...]:
        """Beta."""
        return (self.beta,)

    def objective(self, parts: Parts) -> Tensor:
        """Reconstruction - beta KL, nats of the whole data set."""
        names = self.chosen(parts)
        beta = self.beta.now().to(parts.reconstruction)
        result = parts.reconstruction
        for name, kl in parts.kl.items():
            result = result - (beta * kl if name in names else kl)
        return result
