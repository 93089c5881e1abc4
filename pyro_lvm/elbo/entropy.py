r"""The bound with its entropy in closed form.

.. math:: E_q[\log p(x, z)] + H(q)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyro_lvm.elbo.parts import Parts, read_parts
from pyro_lvm.elbo.reweighted import Reweighted

__all__ = ["Entropy"]


class Entropy(Reweighted):
    r"""The plain bound as expected log joint plus entropy: log p at the draws, H(q) exactly where it is known.

    .. math:: \mathcal L = E_q[\log p(x, z)] + \sum_s H(q(z_s)), \qquad H(q) = -E_q[\log q]

    The same bound as `Trace_ELBO` in expectation, with the noise of log q taken out, and that of log p left in. Where
    q is close to the posterior the two noises would cancel each other: at :math:`q = p(z \mid x)` the estimate
    log p(x, z) - log q(z) is log p(x) for every draw, and this one is not. It shines where log p's own expectation is
    known or nearly constant, and where log q is a rough function of its parameters; `gradient_report` tells.

    Sites: a site whose distribution has no ``entropy()`` (a flow, a mixture) is taken at its draw; one that the guide
    enumerates (``base=TraceEnum_ELBO()``) is summed exactly; one that only the model enumerates is summed out of
    log p(x, z) and has no q.

    When it is wrong: never as a bound; as an estimator, where its variance is larger than that of the other forms.

    Source: the form of Jordan et al., 1999, https://doi.org/10.1023/A:1007665907178; on which form has the least
    noise, Roeder et al., 2017, https://arxiv.org/abs/1703.09194.

    Args:
        base: says how draws are made: `Trace_ELBO`, or `TraceEnum_ELBO` where sites are enumerated; its particles are
            averaged. An instance or its class, copied. `TraceMeanField_ELBO` draws as `Trace_ELBO` does.

    Raises:
        TypeError: if ``base`` is none of these.
        ProgramError: from a fit, before the first step: if nothing is latent in the guide, or a guide site is drawn
            without a path for gradients.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> fit = lvm.fit(lvm.PPCA(num_features=3, latent_dim=1), x, elbo=lvm.elbo.Entropy(), steps=20, seed=0)
        >>> fit.info["estimator"]
        'Entropy(Trace_ELBO())'
    """

    def __init__(self, base: ELBO | type[ELBO] = Trace_ELBO) -> None:
        super().__init__(base)
        self.analytic = False

    def read(self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any) -> Parts:
        """Draw, and take E[log q] in closed form where it is known."""
        return read_parts(self.base, model, guide, args, kwargs, negative_entropy)

    def objective(self, parts: Parts) -> Tensor:
        """E[log p(x | z)] + (E[log p(z)] + H(q)), nats of the whole data set."""
        return parts.reconstruction - sum(parts.kl.values(), parts.reconstruction.new_zeros(()))


def negative_entropy(node: Any) -> Tensor | None:
    """-H(q) of a guide's node at every point of its plates, or None where it has no closed form."""
    try:
        entropy: Tensor = node["fn"].entropy()
    except NotImplementedError:
        return None
    return -entropy
