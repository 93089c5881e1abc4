"""What lies on disk: trees of plain values and tensors, files that are whole or not there, no pickle."""

from __future__ import annotations

__all__: list[str] = []
