"""Estimators: how a fit chooses one, and what a step of it says about the bound's parts."""

from __future__ import annotations

from pyro_lvm.elbo.estimator import Estimator, make_estimator
from pyro_lvm.elbo.terms import Terms

__all__ = ["Estimator", "Terms", "make_estimator"]
