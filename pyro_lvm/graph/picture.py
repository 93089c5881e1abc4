"""A program's graphical model as a figure: sites, what they are computed from, and plates as nested boxes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from pyro.infer.inspect import render_model
from torch import nn

from pyro_lvm.data import as_rows
from pyro_lvm.evaluation import batch_to_trace
from pyro_lvm.figures import new_figure
from pyro_lvm.graph.arrows import along, arrows
from pyro_lvm.graph.layout import DIAMETER, PLATE_SIZE, SITE_SIZE, Box, Edge, layout, plate_text, text_width
from pyro_lvm.inference.check import check
from pyro_lvm.inference.prepare import placed
from pyro_lvm.parameters import BoundProgram, Untouched, isolated
from pyro_lvm.preflight.report import Report, SiteReport
from pyro_lvm.program import as_program

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["graph"]

MARGIN = 0.12  # inches
TEXT_SIZE, LINE = 9.0, 0.19  # of letters beside the graph, in points; height of a line of them, in inches
INK, SHADE = "black", "0.8"


@overload
def graph(program: Any, data: Any = None, *, engine: Literal["matplotlib"] = "matplotlib") -> Figure: ...
@overload
def graph(program: Any, data: Any = None, *, engine: Literal["graphviz"]) -> Any: ...
def graph(program: Any, data: Any = None, *, engine: Literal["matplotlib", "graphviz"] = "matplotlib") -> Any:
    """The graphical model of a program: circles for sites, arrows from parents, boxes for plates.

    Shaded sites are observed, white ones latent, and those with a double edge are summed out. A plate's box says its
    name and size; where plates cross instead of lying one in the other, a box is drawn again. Beside the graph stand
    the sites' distributions. What only the guide has is not drawn.

    Args:
        program: a `Report`, as `pyro_lvm.check` returns it, or a program, which is then checked with its own guide.
        data: as for `fit`; for a program only, a report needs none.
        engine: "matplotlib", or "graphviz" for the drawing of `pyro.render_model`, which needs a program and data.

    Returns:
        A figure; for "graphviz" a ``graphviz.Digraph``: ``.source`` is its text, and the program ``dot`` draws it.

    Raises:
        TypeError: if a program comes without data, a report with data, or a report is to be drawn with graphviz.
        ValueError: if the engine is unknown.
        ImportError: if graphviz is asked for and the Python package is missing.
        ProgramError: if the program is one that `pyro_lvm.check` refuses.

    Not seen: a dependence through Python numbers (``.item()``), and control flow that the first rows do not take.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> figure = lvm.plots.graph(lvm.PPCA(num_features=3, latent_dim=1), x)
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['data: 100', 'z', 'x', 'z ~ Normal', 'x ~ Normal', 'latent', 'observed']
    """
    if engine not in ("matplotlib", "graphviz"):
        raise ValueError(f"engine={engine!r} is unknown: choose 'matplotlib' or 'graphviz'")
    if isinstance(program, Report):
        if data is not None:
            raise TypeError("graph got a report and data, but a report is drawn as it is: write graph(report)")
        if engine == "graphviz":
            raise TypeError("engine='graphviz' runs the program, and a report holds none: write graph(program, data)")
        return _drawn(program)
    if data is None:
        raise TypeError(
            f"graph got a {type(program).__name__} without data, and a program shows its sites only when it runs: "
            "write graph(program, data), or graph(lvm.check(program, data))"
        )
    return _drawn(check(program, data)) if engine == "matplotlib" else _rendered_by_pyro(program, data)


def _rendered_by_pyro(program: Any, data: Any) -> Any:
    try:
        importlib.import_module("graphviz")
    except ImportError as error:
        raise ImportError(
            "engine='graphviz' needs the Python package graphviz, which is not installed: run `pip install graphviz`, "
            "or leave engine at 'matplotlib'"
        ) from error
    check(program, data)  # says what is wrong with a program better than its trace would
    resolved = as_program(program)
    untouched = Untouched(resolved.modules.values())
    try:
        with isolated(0):
            rows, _, _ = placed(resolved, as_rows(data), None, None)

            def meet(module: nn.Module) -> None:
                untouched.remember(module)
                module.to(device=rows.device, dtype=rows.dtype)

            batch = rows.first(batch_to_trace(resolved, rows))
            bound = BoundProgram(resolved.with_guide(_empty_guide), None, rows.dtype, rows.device, meet)
            return render_model(
                bound.model, model_args=batch.args, model_kwargs=batch.named(), render_distributions=True
            )
    finally:
        untouched.restore()


def _empty_guide(*args: Any, **kwargs: Any) -> None:
    """Stands for a guide where only the model is run."""


def _drawn(report: Report) -> Figure:
    sites = [site for site in report.sites if site.role != "auxiliary"]
    found = layout(sites, report.parents)
    statements = [f"{site.name} ~ {site.distribution}" for site in sites]
    states = {_state(site): site for site in sites}
    shown = [state for state in ("latent", "summed out", "observed") if state in states]
    curves = arrows(found)
    radii = {name: np.array([width, DIAMETER]) / 2 for name, width in found.widths.items()}
    corners = [np.reshape(sides, (2, 2)) for _, sides in found.boxes]
    corners += [
        np.stack([found.centres[name] - radius, found.centres[name] + radius]) for name, radius in radii.items()
    ]
    corners += [along(curve, np.linspace(0.0, 1.0, 41)) for curve in curves.values()]
    (left, bottom), (right, top) = np.concatenate(corners).min(0), np.concatenate(corners).max(0)
    beside = right + 0.35
    width = max(text_width(text, TEXT_SIZE) for text in (*statements, *shown))
    floor = min(bottom, top - LINE * (len(statements) + 0.6 + 1.2 * len(shown)))
    limits = (left - MARGIN, beside + width + 0.25 + MARGIN), (floor - MARGIN, top + MARGIN)
    size = [high - low for low, high in limits]
    figure = new_figure(size[0], size[1], layout=None)
    panel = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    panel.set(xlim=limits[0], ylim=limits[1])
    panel.set_axis_off()
    for box, sides in found.boxes:
        _draw_box(panel, box, sides)
    for edge, curve in curves.items():
        _draw_arrow(panel, edge, curve)
    for site in sites:
        x, y = found.centres[site.name]
        _draw_site(panel, (float(x), float(y)), found.widths[site.name], DIAMETER, _state(site), f"site:{site.name}")
        _write(panel, (float(x), float(y)), site.name, SITE_SIZE, ha="center", va="center_baseline")
    for number, text in enumerate(statements):
        _write(panel, (beside, top - LINE * (number + 0.5)), text, TEXT_SIZE, va="center")
    for number, state in enumerate(shown, start=1):
        height = floor + LINE * (0.6 + 1.2 * (len(shown) - number))
        _draw_site(panel, (beside + 0.08, height), 0.16, 0.16, state, f"legend:{state}")
        _write(panel, (beside + 0.25, height), state, TEXT_SIZE, va="center")
    return figure


def _state(site: SiteReport) -> str:
    return "observed" if site.role == "observed" else "summed out" if site.kl == "summed out" else "latent"


def _draw_box(panel: Axes, box: Box, sides: tuple[float, float, float, float]) -> None:
    from matplotlib.patches import FancyBboxPatch

    assert box.plate is not None
    left, bottom, right, top = sides
    style = "round,pad=0,rounding_size=0.1"
    panel.add_patch(
        FancyBboxPatch(
            (left, bottom),
            right - left,
            top - bottom,
            boxstyle=style,
            facecolor="none",
            edgecolor=INK,
            lw=0.9,
            gid=f"plate:{box.plate.name}",
        )
    )
    _write(panel, (right - 0.1, bottom + 0.12), plate_text(box.plate), PLATE_SIZE, ha="right", va="center")


def _draw_arrow(panel: Axes, edge: Edge, curve: np.ndarray) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    path = Path(curve, [Path.MOVETO, Path.CURVE3, Path.CURVE3])
    arrow = FancyArrowPatch(path=path, arrowstyle="-|>", mutation_scale=11, color=INK, lw=0.9, zorder=2)
    arrow.set_gid(f"edge:{edge[0]}:{edge[1]}")
    panel.add_patch(arrow)


def _draw_site(panel: Axes, centre: tuple[float, float], width: float, height: float, state: str, gid: str) -> None:
    from matplotlib.patches import Ellipse

    colour = SHADE if state == "observed" else "white"
    panel.add_patch(Ellipse(centre, width, height, facecolor=colour, edgecolor=INK, lw=1.0, zorder=3, gid=gid))
    if state == "summed out":
        inner = (width - 0.15 * height, 0.85 * height)
        panel.add_patch(Ellipse(centre, *inner, facecolor="none", edgecolor=INK, lw=0.8, zorder=4))


def _write(panel: Axes, place: tuple[float, float], text: str, size: float, **where: Any) -> None:
    # a dollar sign in a name begins no formula
    panel.text(*place, text, fontsize=size, color=INK, zorder=5, parse_math=False, **where)
