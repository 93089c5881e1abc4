"""Estimators of our own; each is a Pyro ELBO."""

from __future__ import annotations

from pyro_lvm.elbo.capacity import Capacity
from pyro_lvm.elbo.entropy import Entropy
from pyro_lvm.elbo.free_bits import FreeBits
from pyro_lvm.elbo.importance_weighted import ImportanceWeighted
from pyro_lvm.elbo.kl_weighted import KLWeighted
from pyro_lvm.elbo.relaxed import Relaxed
from pyro_lvm.elbo.score_function import ScoreFunction
from pyro_lvm.elbo.wake_sleep import WakeSleep

__all__ = [
    "Capacity",
    "Entropy",
    "FreeBits",
    "ImportanceWeighted",
    "KLWeighted",
    "Relaxed",
    "ScoreFunction",
    "WakeSleep",
]
