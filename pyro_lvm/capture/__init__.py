"""A step of training as a plain graph of tensor operations: no handlers, no traces, no Python for each site."""

from __future__ import annotations

__all__: list[str] = []
