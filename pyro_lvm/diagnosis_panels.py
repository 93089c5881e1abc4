"""The panels of `pyro_lvm.plots.diagnosis`: one for each kind of finding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_lvm.criticism.findings import Diagnosis, Finding
from pyro_lvm.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["diagnosis"]

COLOURS = {"fine": "C2", "look": "C1", "wrong": "C3"}

MOST_UNITS = 40
"""Units that one panel shows, the most active first."""


def diagnosis(report: Diagnosis) -> Figure:
    """A panel for each finding that has something to show; its title bears the verdict, in green, orange or red.

    Tail index and gap by datum; KL and mutual information of every unit, the most active first; mean and standard
    deviation of the aggregate posterior of every unit against the prior's; rows of each component; ranks of the truth;
    bounds of the runs.

    Args:
        report: what `pyro_lvm.diagnose` returned.

    Returns:
        A figure with three panels in a row.

    Raises:
        ValueError: if no finding of the report can be drawn.
    """
    shown = [(panel, report[name]) for name, panel in _panels(report) if _can_be_drawn(report[name])]
    if not shown:
        raise ValueError(f"none of the findings {', '.join(report) or '(there are none)'} can be drawn")
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = new_figure(4.2 * columns, 3.2 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, (panel, finding) in zip(grid.flat, shown, strict=False):
        panel(axes, finding)
        if panel in (_activity, _information, _aggregate, _components, _runs):
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(f"{finding.name}: {finding.verdict}", color=COLOURS[finding.verdict])
    return figure


def _panels(report: Diagnosis) -> list[tuple[str, Callable[[Axes, Finding], None]]]:
    known: dict[str, Callable[[Axes, Finding], None]] = {
        "k_hat": _k_hat,
        "gap": _gap,
        "active_units": _activity,
        "information": _information,
        "aggregate": _aggregate,
        "use_of_latents": _gap,
        "calibration": _calibration,
        "runs": _runs,
    }
    found = [(name, known[name]) for name in report if name in known]
    return found + [(name, _components) for name in report if name.startswith("components")]


def _can_be_drawn(finding: Finding) -> bool:
    return bool(finding.arrays)


def _k_hat(axes: Axes, finding: Finding) -> None:
    values = finding.arrays["by_row"].clamp(-1.0, 3.0)
    axes.hist(values.numpy(), bins=40, color="C0")
    for mark in (0.5, 0.7):
        axes.axvline(mark, color="grey", linestyle="--", linewidth=0.8)
    axes.set(xlabel="Pareto k of a datum", ylabel="data")


def _gap(axes: Axes, finding: Finding) -> None:
    values = finding.arrays["by_row"]
    middle, half = (values.max() + values.min()).item() / 2, (values.max() - values.min()).item() / 2
    half = max(half, 5e-4)  # what is less is rounding, and looks like something when it is enlarged
    axes.hist(values.numpy(), bins=40, range=(middle - half, middle + half), color="C0")
    axes.set(xlabel="nats", ylabel="data")


def _by_unit(finding: Finding, name: str) -> Tensor:
    """The arrays of that name of all sites, one after the other."""
    return torch.cat([value for key, value in finding.arrays.items() if key.endswith(f".{name}")])


def _activity(axes: Axes, finding: Finding) -> None:
    activity = _by_unit(finding, "activity").sort(descending=True).values[:MOST_UNITS].clamp_min(1e-8)
    axes.bar(range(1, len(activity) + 1), activity.numpy(), color="C0")
    axes.axhline(0.01, color="grey", linestyle="--", linewidth=0.8)
    axes.set(yscale="log", xlabel="unit, the most active first", ylabel="variance of E[z | x] / prior's")


def _information(axes: Axes, finding: Finding) -> None:
    kl, information = _by_unit(finding, "kl"), _by_unit(finding, "mutual_information")
    order = kl.argsort(descending=True)[:MOST_UNITS]
    places = range(1, len(order) + 1)
    axes.bar(places, kl[order].numpy(), color="C0", alpha=0.4, label="KL")
    axes.bar(places, information[order].numpy(), color="C0", width=0.4, label="mutual information")
    axes.set(xlabel="unit, the largest KL first", ylabel="nats per datum")
    axes.legend()


def _aggregate(axes: Axes, finding: Finding) -> None:
    means, spreads = (_by_unit(finding, f"aggregate_{name}")[:MOST_UNITS] for name in ("mean", "sd"))
    axes.axhspan(-1.0, 1.0, color="grey", alpha=0.2, label="prior")
    axes.errorbar(range(1, len(means) + 1), means.numpy(), yerr=spreads.numpy(), fmt="o", capsize=3, label="aggregate")
    axes.set(xlabel="unit", ylabel="prior's standard deviations")
    axes.legend()


def _components(axes: Axes, finding: Finding) -> None:
    counts = finding.arrays["counts"]
    nearest = finding.arrays["distinctness"].clone().fill_diagonal_(torch.inf).amin(1)
    colours = ["C3" if count < 1 or near < 0.05 else "C0" for count, near in zip(counts, nearest, strict=True)]
    axes.bar(range(len(counts)), counts.numpy(), color=colours)
    axes.set(xlabel="component (red: empty, or another's double)", ylabel="data")


def _calibration(axes: Axes, finding: Finding) -> None:
    ranks, draws = finding.arrays["ranks"], int(finding.numbers["draws"])
    bins = 20
    places = ((ranks.flatten().double() + 0.5) / (draws + 1) * bins).long()
    heights = torch.bincount(places, minlength=bins).double() / ranks.numel() * bins
    # two standard errors, as if the entries of one datum were one
    error = 2 * math.sqrt(bins / len(ranks))
    axes.axhspan(1 - error, 1 + error, color="grey", alpha=0.2)
    axes.bar([(place + 0.5) / bins for place in range(bins)], heights.numpy(), width=0.95 / bins, color="C0")
    axes.set(xlabel="rank of the truth among the guide's draws", ylabel="relative frequency")


def _runs(axes: Axes, finding: Finding) -> None:
    elbo = finding.arrays["elbo"]
    axes.plot(range(1, len(elbo) + 1), elbo.numpy(), "o")
    axes.set(xlabel="run", ylabel="ELBO, nats per datum")
