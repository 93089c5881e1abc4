"""The arrows of a graphical model's picture: straight where they can be, bent around what stands in their way."""

from __future__ import annotations

import numpy as np

from pyro_lvm.graph.layout import DIAMETER, PLATE_SIZE, Box, Edge, Layout, hits, plate_text, text_width

__all__ = ["along", "arrows"]


def arrows(layout: Layout) -> dict[Edge, np.ndarray]:
    """By edge, the three points of a quadratic Bézier curve from one ellipse to the other."""
    drawn: dict[Edge, np.ndarray] = {}
    traces: dict[Edge, np.ndarray] = {}
    labels = [_label_area(box, sides) for box, sides in layout.boxes]
    # short arrows have less room to bend in and choose first; then each may make room for those that came later
    for edge in 2 * sorted(layout.edges, key=lambda edge: _length(layout, edge)):
        traces.pop(edge, None)
        best, least = None, np.inf
        for bend in (0.0, 0.3, -0.3, 0.42, -0.42, 0.55, -0.55, 0.75, -0.75, 1.0, -1.0, 1.4, -1.4, 1.9, -1.9):
            if abs(bend) >= least:
                break
            curve = _clipped(layout, edge, bend)
            points = along(curve, np.linspace(0.0, 1.0, 41))
            cost = abs(bend)
            cost += 100.0 * sum(
                bool(hits(points, layout.centres[n], layout.widths[n])) for n in layout.centres if n not in edge
            )
            cost += 5.0 * sum(bool(_within(points, area).any()) for area in labels)
            cost += 4.0 * sum(
                not _within(points, sides).all() for box, sides in layout.boxes if set(edge) <= set(box.all_sites())
            )
            for trace in traces.values() if cost < least else ():
                distance = np.abs(points[:, None] - trace[None]).sum(-1)
                cost += 0.03 * int((distance.min(-1) < 0.06).sum())
                # two heads in one place look like one
                cost += 1.0 * float(np.linalg.norm(points[-1] - trace[-1]) < 0.11)
            if cost < least:
                best, least = curve, cost
        assert best is not None
        drawn[edge] = best
        traces[edge] = along(best, np.linspace(0.0, 1.0, 41))
    return drawn


def _length(layout: Layout, edge: Edge) -> float:
    return float(np.linalg.norm(layout.centres[edge[0]] - layout.centres[edge[1]]))


def _clipped(layout: Layout, edge: Edge, bend: float) -> np.ndarray:
    """The curve that leaves the straight line by ``bend`` in its middle, without what lies inside its two sites."""
    start, end = (layout.centres[name] for name in edge)
    across = np.array([start[1] - end[1], end[0] - start[0]])
    across = across / np.linalg.norm(across)
    whole = np.stack([start, (start + end) / 2 + 2 * bend * across, end])
    steps = np.linspace(0.0, 1.0, 401)
    points = along(whole, steps)
    outside = np.ones(len(steps), bool)
    for name, gap in zip(edge, (0.0, 0.025), strict=True):
        radii = np.array([layout.widths[name] / 2, DIAMETER / 2]) + gap
        outside &= np.square((points - layout.centres[name]) / radii).sum(-1) >= 1
    first, last = steps[outside][[0, -1]]
    middle = (1 - first) * (1 - last) * whole[0] + first * last * whole[2]
    middle = middle + ((1 - first) * last + first * (1 - last)) * whole[1]
    return np.stack([along(whole, np.array([first]))[0], middle, along(whole, np.array([last]))[0]])


def along(curve: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Points of a Bézier curve at ``steps``, shape (n,) from 0 to 1; shape (n, 2)."""
    t = steps[:, None]
    points: np.ndarray = (1 - t) ** 2 * curve[0] + 2 * t * (1 - t) * curve[1] + t**2 * curve[2]
    return points


def _within(points: np.ndarray, sides: tuple[float, float, float, float]) -> np.ndarray:
    left, bottom, right, top = sides
    inside = (points > (left, bottom)) & (points < (right, top))
    return np.asarray(inside.all(-1))


def _label_area(box: Box, sides: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    assert box.plate is not None
    _, bottom, right, _ = sides
    return right - 0.14 - text_width(plate_text(box.plate), PLATE_SIZE), bottom, right, bottom + 0.24
