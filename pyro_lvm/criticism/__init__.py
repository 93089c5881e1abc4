"""How good a fit is: evidence, predictives, and estimators compared."""

from __future__ import annotations

__all__: list[str] = []
