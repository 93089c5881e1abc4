"""Estimators of our own; each is a Pyro ELBO."""

from __future__ import annotations

from pyro_lvm.elbo.importance_weighted import ImportanceWeighted

__all__ = ["ImportanceWeighted"]
