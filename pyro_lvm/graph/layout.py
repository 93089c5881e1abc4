"""Where the sites and plates of a graphical model stand in its picture.

Lengths are inches. Sites stand in rows, each below its parents; sites in the same plates stand in one box, and boxes
beside each other never overlap. The order from left to right is the one that bends and crosses fewest arrows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise

import numpy as np

from pyro_lvm.preflight.report import SiteReport
from pyro_lvm.structure import Plate

__all__ = ["DIAMETER", "PLATE_SIZE", "SITE_SIZE", "Box", "Edge", "Layout", "hits", "layout", "plate_text", "text_width"]

Edge = tuple[str, str]
"""A parent and its child."""

DIAMETER = 0.6
"""Of a site; a longer name widens its circle to an ellipse."""
SITE_SIZE, PLATE_SIZE = 11.0, 9.0
"""Of the letters of names of sites and plates, in points."""
BETWEEN_ROWS, BETWEEN_BLOCKS = 0.42, 0.3
STEEPNESS = 0.45  # of arrows, the least height for one inch sideways
PADDING, PADDING_BELOW = 0.2, 0.34  # of a plate around what it holds; its name stands below


def text_width(text: str, size: float) -> float:
    """Width of a line of text in letters of ``size`` points."""
    from matplotlib.textpath import TextPath

    # a dollar sign would begin a formula
    return TextPath((0.0, 0.0), text.replace("$", "S"), size=size).get_extents().width / 72 if text.strip() else 0.0


def plate_text(plate: Plate) -> str:
    """What stands in the corner of a plate."""
    return f"{plate.name}: {plate.size}"


@dataclass
class Box:
    """A plate (None: the whole picture) with the sites directly in it and the boxes in it."""

    plate: Plate | None
    sites: list[str] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)

    def all_sites(self) -> list[str]:
        """Names of the sites in it, at whatever depth."""
        return self.sites + [name for box in self.boxes for name in box.all_sites()]

    def all_boxes(self) -> list[Box]:
        """The box itself, then those in it, at whatever depth."""
        return [self] + [inner for box in self.boxes for inner in box.all_boxes()]


@dataclass(frozen=True)
class _Block:
    """A site, or a box with its content, laid out; places are counted from its left edge.

    Attributes:
        rows: its first and its last row.
        width: its width.
        centres: of its sites.
        sides: left and right edge of the boxes in it, with their sites.
    """

    rows: tuple[int, int]
    width: float
    centres: Mapping[str, float]
    sides: Sequence[tuple[Box, float, float]] = ()

    def beside(self, other: _Block) -> bool:
        return self.rows[0] <= other.rows[1] and other.rows[0] <= self.rows[1]


@dataclass(frozen=True)
class Layout:
    """Where everything is: sites by centre and width, boxes by (left, bottom, right, top)."""

    centres: Mapping[str, np.ndarray]
    widths: Mapping[str, float]
    boxes: Sequence[tuple[Box, tuple[float, float, float, float]]]
    edges: Sequence[Edge]


def layout(sites: Sequence[SiteReport], parents: Mapping[str, frozenset[str]]) -> Layout:
    """Place the sites of a model, given in program order, and the plates around them."""
    names = [site.name for site in sites]
    edges = [(source, name) for name in names for source in names if source in parents.get(name, ())]
    widths = {name: max(DIAMETER, text_width(name, SITE_SIZE) + 0.24) for name in names}
    rows = _rows(names, edges)
    tree = _tree(sites)
    spans = {id(box): _span(box, rows) for box in tree.all_boxes()}
    heights = _heights(tree, rows, spans)
    block = _block(tree, rows, heights, widths, edges)
    heights = _steep(heights, rows, block, edges)
    block = _block(tree, rows, heights, widths, edges)
    boxes = []
    for box, left, right in block.sides:
        first, last = spans[id(box)]
        top = heights[first] + DIAMETER / 2 + _above(box, spans)
        boxes.append((box, (left, heights[last] - DIAMETER / 2 - _below(box, spans), right, top)))
    return Layout({n: np.array([block.centres[n], heights[rows[n]]]) for n in names}, widths, boxes, edges)


def _rows(names: Sequence[str], edges: Sequence[Edge]) -> dict[str, int]:
    """Each site below its parents, and what has more children than parents as near to its children as can be."""
    rows: dict[str, int] = {}
    for name in names:
        rows[name] = max((rows[source] + 1 for source, target in edges if target == name), default=0)
    for name in reversed(names):
        children = [target for source, target in edges if source == name]
        if len(children) > sum(target == name for _, target in edges):
            rows[name] = min(rows[child] for child in children) - 1
    return rows


def _tree(sites: Sequence[SiteReport]) -> Box:
    """Boxes in boxes: of two plates around a site the outer is the one that holds more sites."""
    held: dict[str, int] = {}  # where both hold the same, the report's order stays
    for plate in (plate for site in sites for plate in site.plates):
        held[plate.name] = held.get(plate.name, 0) + 1
    order = sorted(held, key=lambda name: -held[name])
    root = Box(None)
    for site in sites:
        box = root
        for plate in sorted(site.plates, key=lambda plate: order.index(plate.name)):
            inner = next((b for b in box.boxes if b.plate is not None and b.plate.name == plate.name), None)
            if inner is None:
                inner = Box(plate)
                box.boxes.append(inner)
            box = inner
        box.sites.append(site.name)
    return root


def _span(box: Box, rows: Mapping[str, int]) -> tuple[int, int]:
    inside = [rows[name] for name in box.all_sites()]
    return min(inside), max(inside)


def _above(box: Box, spans: Mapping[int, tuple[int, int]]) -> float:
    """Room between the uppermost site of a box and the box's edge."""
    same = [_above(inner, spans) for inner in box.boxes if spans[id(inner)][0] == spans[id(box)][0]]
    return PADDING + max(same, default=0.0)


def _below(box: Box, spans: Mapping[int, tuple[int, int]]) -> float:
    same = [_below(inner, spans) for inner in box.boxes if spans[id(inner)][1] == spans[id(box)][1]]
    return PADDING_BELOW + max(same, default=0.0)


def _heights(tree: Box, rows: Mapping[str, int], spans: Mapping[int, tuple[int, int]]) -> list[float]:
    """Height of every row, the last at 0: far enough apart for the boxes that end and begin between two."""
    plates = tree.all_boxes()[1:]
    heights = [0.0]
    for row in range(max(rows.values()), 0, -1):
        ending = max((_below(box, spans) for box in plates if spans[id(box)][1] == row - 1), default=0.0)
        beginning = max((_above(box, spans) for box in plates if spans[id(box)][0] == row), default=0.0)
        heights.append(heights[-1] + DIAMETER + BETWEEN_ROWS + ending + beginning)
    return heights[::-1]


def _steep(heights: Sequence[float], rows: Mapping[str, int], block: _Block, edges: Sequence[Edge]) -> list[float]:
    """Move rows apart until arrows are steep enough to pass the neighbours of the site they come from."""
    gaps = [upper - lower for upper, lower in pairwise(heights)]
    wider = list(gaps)
    for a, b in edges:
        first, last = rows[a], rows[b]
        wanted = min(STEEPNESS * abs(block.centres[a] - block.centres[b]), 5 * DIAMETER)
        for row in range(first, last):
            wider[row] = max(wider[row], gaps[row] + (wanted - sum(gaps[first:last])) / (last - first))
    return [sum(wider[row:]) for row in range(len(heights))]


def _block(
    box: Box,
    rows: Mapping[str, int],
    heights: Sequence[float],
    widths: Mapping[str, float],
    edges: Sequence[Edge],
) -> _Block:
    """Lay a box out, its inner boxes first."""
    parts = [_Block((rows[n], rows[n]), widths[n], {n: widths[n] / 2}) for n in box.sites]
    parts += [_block(inner, rows, heights, widths, edges) for inner in box.boxes]

    def joined(order: Sequence[int]) -> _Block:
        return _joined(box, parts, _lefts(order, parts, edges))

    def cost(order: Sequence[int]) -> float:
        block = joined(order)
        return _cost(
            block, [e for e in edges if e[0] in block.centres and e[1] in block.centres], rows, heights, widths
        )

    return joined(_best_order(len(parts), cost))


def _best_order(count: int, cost: Callable[[Sequence[int]], float]) -> list[int]:
    """From the program's own order, exchange two parts (neighbours, where there are many) while that is better."""
    best = list(range(count))
    least = cost(best) if count > 1 else 0.0
    exchanges = list(combinations(range(count), 2) if count <= 8 else pairwise(range(count)))
    for _ in range(6):
        before = least
        for i, j in exchanges:
            tried = best.copy()
            tried[i], tried[j] = tried[j], tried[i]
            found = cost(tried)
            if found < least - 0.25:
                best, least = tried, found
        if least == before:
            break
    return best


def _lefts(order: Sequence[int], parts: Sequence[_Block], edges: Sequence[Edge]) -> list[float]:
    """Left edges of the parts: each as near to what it is connected with as its neighbours in ``order`` allow."""
    lefts = [0.0] * len(parts)
    for k, part in enumerate(order):
        before = [lefts[i] + parts[i].width + BETWEEN_BLOCKS for i in order[:k] if parts[i].beside(parts[part])]
        lefts[part] = max(before, default=0.0)
    owner = {name: k for k, part in enumerate(parts) for name in part.centres}
    links: list[list[tuple[int, float]]] = [[] for _ in parts]  # by part, to which other, and how far along in both
    for a, b in edges:
        if a in owner and b in owner and owner[a] != owner[b]:
            apart = parts[owner[b]].centres[b] - parts[owner[a]].centres[a]
            links[owner[a]].append((owner[b], apart))
            links[owner[b]].append((owner[a], -apart))
    near = [[i for i in order if i != k and parts[i].beside(part)] for k, part in enumerate(parts)]
    place = {part: k for k, part in enumerate(order)}
    for sweep in range(12):
        for part in order[:: -1 if sweep % 2 else 1]:
            whole = min(lefts), max(left + p.width for left, p in zip(lefts, parts, strict=True))
            wanted = [lefts[other] + apart for other, apart in links[part]]
            wanted = wanted or [(whole[0] + whole[1] - parts[part].width) / 2]
            low = [lefts[i] + parts[i].width + BETWEEN_BLOCKS for i in near[part] if place[i] < place[part]]
            high = [lefts[i] - BETWEEN_BLOCKS - parts[part].width for i in near[part] if place[i] > place[part]]
            lefts[part] = min([max([sum(wanted) / len(wanted), *low]), *high])
    return lefts


def _joined(box: Box, parts: Sequence[_Block], lefts: Sequence[float]) -> _Block:
    start = min(lefts)
    content = max(left + part.width for left, part in zip(lefts, parts, strict=True)) - start
    width = content
    if box.plate is not None:
        width = max(content + 2 * PADDING, text_width(plate_text(box.plate), PLATE_SIZE) + 0.24)
    shifts = [left - start + (width - content) / 2 for left in lefts]
    placed_parts = list(zip(shifts, parts, strict=True))
    centres = {name: shift + x for shift, part in placed_parts for name, x in part.centres.items()}
    sides = [(inner, shift + a, shift + b) for shift, part in placed_parts for inner, a, b in part.sides]
    own = [] if box.plate is None else [(box, 0.0, width)]
    rows = min(part.rows[0] for part in parts), max(part.rows[1] for part in parts)
    return _Block(rows, width, centres, own + sides)


def _cost(
    block: _Block,
    edges: Sequence[Edge],
    rows: Mapping[str, int],
    heights: Sequence[float],
    widths: Mapping[str, float],
) -> float:
    """Sideways length of arrows and width; and far dearer: crossings, arrows through foreign boxes and sites."""
    if not edges:
        return 0.3 * block.width
    names = list(block.centres)
    number = {name: k for k, name in enumerate(names)}
    centres = np.array([(block.centres[name], heights[rows[name]]) for name in names])
    ends = np.array([(number[a], number[b]) for a, b in edges])
    start, end = centres[ends[:, 0]], centres[ends[:, 1]]
    cost = 0.3 * block.width + float(np.abs(start - end)[:, 0].sum()) + 3.0 * _crossings(start, end, ends)
    steps = np.linspace(0.0, 1.0, 25)[:, None, None]
    points = (1 - steps) * start + steps * end  # (25, edges, 2)
    through = np.stack([hits(points, centre, widths[name]) for name, centre in zip(names, centres, strict=True)], 1)
    through[np.arange(len(edges))[:, None], ends] = False
    cost += 10.0 * int(through.sum())
    for box, left, right in block.sides:
        inside = [number[name] for name in box.all_sites()]
        bottom, top = centres[inside, 1].min(), centres[inside, 1].max()
        within = ((points > (left, bottom - 0.1)) & (points < (right, top + 0.1))).all(-1).any(0)
        cost += 2.0 * int((within & ~np.isin(ends, inside).any(-1)).sum())
    return cost


def _crossings(start: np.ndarray, end: np.ndarray, ends: np.ndarray) -> int:
    """How many pairs of straight arrows without a common site cross."""
    away = end - start

    def side(points: np.ndarray) -> np.ndarray:
        """On which side of every arrow (row) each point (column) lies."""
        x, y = np.moveaxis(points[None] - start[:, None], -1, 0)
        return np.asarray(np.sign(away[:, :1] * y - away[:, 1:] * x))

    apart = side(start) * side(end) < 0
    strangers = (ends[:, None, :, None] != ends[None, :, None, :]).all((-1, -2))
    return int((apart & apart.T & strangers).sum()) // 2


def hits(points: np.ndarray, centre: np.ndarray, width: float, clearance: float = 0.07) -> np.ndarray:
    """Whether any of the points, shape (n, ..., 2), lies in the ellipse of a site or close to it, shape (...)."""
    radii = np.array([width / 2, DIAMETER / 2]) + clearance
    return np.asarray((np.square((points - centre) / radii).sum(-1) < 1).any(0))
