r"""Components of a mixture that are empty, or say the same as another.

.. math::
    n_k = \sum_i r_{ik}, \qquad
    D_{kl} = \frac{H(\bar s) - \sum_i v_i H(s_i) / \sum_i v_i}{H(\bar s)}, \qquad
    v_i = r_{ik} + r_{il}, \quad s_i = \frac{r_{ik}}{v_i}, \quad \bar s = \frac{n_k}{n_k + n_l}

with responsibilities r and H the entropy of a coin. D is the share of the doubt between k and l that a datum of theirs
resolves: 0 if their densities are equal, 1 if no datum could be of both. (H(s̄) - mean H is the Jensen-Shannon
divergence of the two, weighted.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lvm.criticism.findings import Finding, Verdict

__all__ = ["distinctness", "find_components"]

EQUAL, ALIKE = 0.05, 0.2
"""D of two normals of equal weight and scale whose locations are 0.5 and 1.1 standard deviations apart."""


def distinctness(responsibilities: Tensor) -> Tensor:
    """D of every pair of components, shape (K, K), from responsibilities (n, K); 1 on the diagonal.

    A pair without any datum is 0.
    """
    r = responsibilities.double()
    together = r[:, :, None] + r[:, None, :]
    share = r[:, :, None] / together.clamp_min(torch.finfo(torch.float64).tiny)
    counts = r.sum(0)
    pairs = counts[:, None] + counts[None, :]
    mean = counts[:, None] / pairs.clamp_min(torch.finfo(torch.float64).tiny)
    doubt = _coin(mean)
    left = (together * _coin(share)).sum(0) / pairs.clamp_min(torch.finfo(torch.float64).tiny)
    found = torch.where(doubt > 0, (doubt - left) / doubt, torch.zeros_like(doubt))
    return found.fill_diagonal_(1.0)


def _coin(p: Tensor) -> Tensor:
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))


def find_components(name: str, site: str, responsibilities: Tensor) -> Finding:
    """Finding ``name``, about the components of one enumerated site, from responsibilities (n, K)."""
    counts = responsibilities.double().sum(0)
    pairs = distinctness(responsibilities)
    empty = (counts < 1).nonzero().flatten().tolist()
    full = [k for k in range(len(counts)) if k not in empty]
    upper = torch.ones_like(pairs).triu(1).bool()
    occupied = torch.zeros(len(counts), dtype=torch.bool)
    occupied[full] = True
    upper &= occupied[:, None] & occupied[None, :]
    closest = pairs.masked_fill(~upper, torch.inf)
    least = closest.min().item() if len(full) > 1 else 1.0
    equal = (closest < EQUAL).nonzero().tolist()
    verdict: Verdict = "wrong" if empty or equal else "look" if least < ALIKE else "fine"
    words = []
    if empty:
        words.append(f"components {empty} of {site!r} have less than one datum each")
    if equal:
        words.append("; ".join(f"components {k} and {j} of {site!r} say the same" for k, j in equal))
    if verdict == "wrong":
        advice = ", and ".join(words) + ": try fewer components, or another start (k-means++, several seeds)"
    elif verdict == "look":
        k, j = divmod(int(closest.argmin()), len(counts))
        advice = f"components {k} and {j} of {site!r} overlap so much that few data tell them apart: compare with one "
        advice += "component less by lvm.select"
    else:
        advice = "every component has data of its own"
    numbers = {
        "components": float(len(counts)),
        "empty": float(len(empty)),
        "duplicate_pairs": float(len(equal)),
        "least_count": counts.min().item(),
        "least_distinctness": least,
    }
    return Finding(name, verdict, numbers, advice, {"counts": counts, "distinctness": pairs})
