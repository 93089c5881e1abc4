"""A program's graphical model, drawn; `pyro_lvm.plots.graph` shows it."""

from __future__ import annotations

__all__: list[str] = []
