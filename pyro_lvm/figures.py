"""Figures without pyplot: no window opens, no global state changes, and a notebook shows them all the same."""

from __future__ import annotations

import io
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["new_figure"]


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty figure of ``width`` × ``height`` inches."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(width, height), layout=layout, dpi=120, facecolor="white")
    # IPython draws figures by itself only once pyplot has been imported
    figure._repr_png_ = partial(_png, figure)
    return figure  # type: ignore[no-any-return]


def _png(figure: Figure) -> bytes:
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return written.getvalue()
