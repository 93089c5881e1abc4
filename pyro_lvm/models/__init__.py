"""The built-in programs: the generative story and its guide, side by side, one file each."""

from __future__ import annotations

__all__: list[str] = []
