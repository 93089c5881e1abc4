"""The pre-flight: what would train to a wrong number, or fail with a shape, is refused before the first step."""

from __future__ import annotations

__all__: list[str] = []
