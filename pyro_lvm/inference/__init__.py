"""Fitting: the SVI loop and the record it leaves."""

from __future__ import annotations

__all__: list[str] = []
