r"""What unlabelled data can tell a classifier without a generative model: decide, evenly, and do not change your mind.

.. math::
    R = \operatorname{mean}_i \max_{\lVert d \rVert \le r} \mathrm{KL}\big(q(y \mid x_i) \,\|\, q(y \mid x_i + d)\big)
        + \lambda \big( \operatorname{mean}_i H[q(y \mid x_i)] - \mu\, H[\operatorname{mean}_i q(y \mid x_i)] \big)

The first term is virtual adversarial training (Miyato et al., 2018, https://arxiv.org/abs/1704.03976): the label may
not change within a distance r. The second asks for sure labels of every class alike. Together they are information
maximising self-augmented training (Hu et al., 2017, https://arxiv.org/abs/1702.08720), whose :math:`\mu = 4` is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["classifier_smoothness"]

RADIUS, PROBE = 0.35, 1.2
"""The radius r, and the length of the random step that looks for the worst direction, in units of the data's spread."""

CERTAINTY, BALANCE = 0.2, 4.0
"""The weights lambda and mu."""


def classifier_smoothness(classifier: Callable[[Tensor], Tensor], x: Tensor, unlabelled: Tensor) -> Tensor:
    """The regulariser R on one batch, nats per datum.

    Args:
        classifier: maps (n, D) to logits (n, C).
        x: data, shape (n, D); their spread, the root of the summed variances of the features, is the unit of length.
        unlabelled: which rows the second term takes, bool, shape (n,).

    Returns:
        Shape (), differentiable.
    """
    log_q = classifier(x).log_softmax(-1)
    spread = x.var(0, correction=0).sum().sqrt()
    direction = _worst_direction(classifier, x, log_q.detach(), PROBE * spread)
    change = _divergence(log_q.detach(), classifier(x + RADIUS * spread * direction).log_softmax(-1))
    share = unlabelled.to(x.dtype) / unlabelled.sum().clamp(min=1)
    uncertainty = -(share * (log_q.exp() * log_q).sum(-1)).sum()
    mean_q = (share.unsqueeze(-1) * log_q.exp()).sum(0)
    # clamped, because the logarithm of nought has no gradient, and without unlabelled rows all of it is nought
    evenness = -(mean_q * mean_q.clamp(min=torch.finfo(x.dtype).tiny).log()).sum()
    regulariser: Tensor = change + CERTAINTY * (uncertainty - BALANCE * evenness)
    return regulariser


def _divergence(log_q: Tensor, log_moved: Tensor) -> Tensor:
    divergence: Tensor = (log_q.exp() * (log_q - log_moved)).sum(-1)
    return divergence.mean()


def _worst_direction(classifier: Callable[[Tensor], Tensor], x: Tensor, log_q: Tensor, length: Tensor) -> Tensor:
    """One step of power iteration from a random direction; unit rows (n, D), no gradient."""
    with torch.enable_grad():
        step = (length * normalize(torch.randn_like(x), dim=-1)).requires_grad_()
        moved = classifier(x + step).log_softmax(-1)
        (gradient,) = torch.autograd.grad(_divergence(log_q, moved), step)
    direction: Tensor = normalize(gradient, dim=-1)
    return direction.detach()
