"""Pictures of fits and models. Every function returns a matplotlib `Figure`; none shows one.

Figures are made without pyplot, so no window opens and no global state changes; in a notebook the returned figure
shows itself, elsewhere ``figure.savefig("name.png")`` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_lvm.arrays import rows_of
from pyro_lvm.diagnosis_panels import diagnosis
from pyro_lvm.figures import new_figure
from pyro_lvm.graph.picture import graph

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "decomposition",
    "diagnosis",
    "graph",
    "image_grid",
    "interpolation",
    "latent",
    "loss",
    "mixture",
    "reconstructions",
    "samples",
    "selection",
]


def loss(fit: Any) -> Figure:
    """The bound of every epoch, and beside it its parts.

    Left: the ELBO (and the validation ELBO), nats per datum. Right: reconstruction by observed site and KL by latent
    site, nats per datum, on two axes. The first tenth of the epochs sets no limits: it would hide the rest. For EM
    the right panel shows the KL that each E-step closed; for K-means the left one shows the inertia, and there is no
    right one.

    Args:
        fit: a `Fit`.

    Returns:
        A figure with two panels, or one.
    """
    history = fit.history
    if "elbo" not in history:
        return _inertia(history["loss"])
    figure = new_figure(10.0, 4.0)
    whole, parts = figure.subplots(1, 2)
    epochs = range(1, len(history["elbo"]) + 1)
    shown = {"ELBO": history["elbo"], "validation ELBO": history.get("validation_elbo", [])}
    for label, values in shown.items():
        if values:
            whole.plot(epochs, values, label=label)
    _limit_to_later(whole, [values for values in shown.values() if values])
    whole.set(xlabel="epoch", ylabel="nats per datum", title="evidence lower bound")
    whole.legend()
    if "kl_closed" in history:
        whole.set(xlabel="iteration")
        _plot_kl_closed(parts, history["kl_closed"])
        return figure
    lines = _plot_named(parts, epochs, "reconstruction", history["reconstruction"], first_colour=0)
    parts.set(xlabel="epoch", ylabel="reconstruction, nats per datum", title="its parts")
    if history["kl"]:
        beside = parts.twinx()
        lines += _plot_named(beside, epochs, "KL", history["kl"], first_colour=len(lines) + 1)
        beside.set_ylabel("KL, nats per datum")
    parts.legend(handles=lines)
    _limit_to_later(parts, list(history["reconstruction"].values()))
    return figure


def decomposition(parts: Any) -> Figure:
    """Every form of the bound as two bars: its first term, and from there to the bound.

    Args:
        parts: a `Decomposition`.

    Returns:
        A figure with one pair of bars for each form, nats per datum; lines at the bound and at the evidence.
    """
    forms = {
        "reconstruction - kl": ("reconstruction", "kl"),
        "joint - log q": ("joint", "log q"),
        "joint + entropy": ("joint", "entropy"),
    }
    ends = {form: parts[form] for form in forms}
    if "kl_to_posterior" in parts:
        known = "log p(x) - KL(q || p(z | x))"
        forms[known] = ("log_evidence", "kl_to_posterior")
        ends[known] = parts["log_evidence"] - parts["kl_to_posterior"]
    figure = new_figure(8.0, 1.2 + 0.9 * len(forms))
    axes = figure.subplots()
    colours: dict[str, str] = {}
    for row, form in enumerate(reversed(forms)):
        start = 0.0
        for name, height, end in zip(forms[form], (0.18, -0.18), (parts[forms[form][0]], ends[form]), strict=True):
            label = None if name in colours else name
            colour = colours.setdefault(name, f"C{len(colours)}")
            axes.barh(row + height, end - start, left=start, height=0.32, color=colour, label=label)
            start = end
    axes.axvline(parts["elbo"], color="grey", linewidth=1.0, linestyle="--", label="elbo")
    axes.axvline(parts["log_evidence"], color="black", linewidth=1.0, label="log p(x)")
    places = [*ends.values(), *(parts[first] for first, _ in forms.values()), parts["log_evidence"]]
    margin = 0.15 * (max(places) - min(places)) or 1.0
    axes.set_xlim(min(places) - margin, max(places) + margin)
    axes.set_yticks(range(len(forms)), list(reversed(forms)))
    axes.set(xlabel="nats per datum", title="every form of the bound")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _inertia(values: Sequence[float]) -> Figure:
    figure = new_figure(5.0, 4.0)
    axes = figure.subplots()
    axes.plot(range(1, len(values) + 1), values)
    axes.set(xlabel="iteration", ylabel="squared units of the data", title="inertia")
    return figure


def _plot_kl_closed(axes: Axes, values: Sequence[float]) -> None:
    """KL by iteration on a logarithmic axis, as far as it is more than rounding."""
    shown = [(iteration, value) for iteration, value in enumerate(values, 1) if value > 1e-13]
    axes.semilogy([iteration for iteration, _ in shown], [value for _, value in shown], marker=".")
    axes.set(xlabel="iteration", ylabel="nats per datum", title="KL(q || p(z | x)) that the E-step closed")


def selection(chosen: Any) -> Figure:
    """Scores of candidates, the best on top, each with the standard error of its difference to the best.

    Args:
        chosen: a `Selection`.

    Returns:
        A figure with one line for each candidate, nats per datum.
    """
    candidates = list(reversed(chosen.candidates))
    figure = new_figure(6.0, 1.0 + 0.4 * len(candidates))
    axes = figure.subplots()
    errors = [candidate.difference_standard_error for candidate in candidates]
    names = [candidate.name for candidate in candidates]
    axes.errorbar([c.difference for c in candidates], range(len(names)), xerr=errors, fmt="o", capsize=3)
    axes.axvline(0.0, color="grey", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="nats per datum below the best", title=f"by {chosen.criterion}")
    return figure


def samples(model: Any, num: int = 64, seed: int | None = None, *, shape: tuple[int, int] | None = None) -> Figure:
    """A grid of data drawn from a model: E[x | z] for z from the prior.

    Args:
        model: has ``sample(n, seed=..., mean=True)`` giving (n, D), as `VAE` and `SemiSupervisedVAE`.
        num: how many.
        seed: of the draws; None for fresh ones.
        shape: height and width of an image; None for a square.

    Returns:
        A figure with one image for each.

    Raises:
        ValueError: if D is not a square and ``shape`` is not given.
    """
    images = model.sample(num, seed=seed, mean=True)
    return image_grid(images, columns=math.ceil(math.sqrt(num)), shape=shape)


def reconstructions(model: Any, x: Any, *, shape: tuple[int, int] | None = None) -> Figure:
    """Data and under each its reconstruction, E[x' | z] at the encoder's mean.

    Args:
        model: has ``reconstruct(x)`` giving (n, D).
        x: data, shape (n, D), at most 32 of them, as a tensor or an array.
        shape: height and width of an image; None for a square.

    Returns:
        A figure with pairs of images, eight (or sixteen) in a row.
    """
    if len(x) > 32:
        raise ValueError(f"{len(x)} reconstructions are too many for one picture: pass at most 32 rows, x[:32]")
    columns, shown = min(len(x), 16), rows_of(x, torch.arange(len(x)))
    made = model.reconstruct(x).to(shown)
    rows: list[Tensor] = []
    for start in range(0, len(x), columns):
        for part in (shown[start : start + columns], made[start : start + columns]):
            rows.append(torch.cat([part, part.new_full((columns - len(part), part.shape[-1]), torch.nan)]))
    return image_grid(torch.cat(rows), columns=columns, shape=shape)


def interpolation(
    model: Any, start: Tensor, end: Tensor, steps: int = 10, *, shape: tuple[int, int] | None = None
) -> Figure:
    """A row of images on the way from one datum to another, straight through the latent space.

    Args:
        model: has ``interpolate(start, end, steps)`` giving (steps, D).
        start: datum, shape (D,), or several, shape (rows, D).
        end: likewise.
        steps: images in a row.
        shape: height and width of an image; None for a square.
    """
    pairs = zip(torch.atleast_2d(start), torch.atleast_2d(end), strict=True)
    images = torch.cat([model.interpolate(first, last, steps) for first, last in pairs])
    return image_grid(images, columns=steps, shape=shape)


def latent(z: Tensor, y: Tensor | None = None, *, axes: tuple[int, int] = (0, 1)) -> Figure:
    """Two latent coordinates of every datum, coloured by class.

    Args:
        z: codes, shape (n, L), such as ``vae.encode(x).mean``.
        y: classes, shape (n,), or None.
        axes: which coordinates.

    Raises:
        ValueError: if z has no such coordinates.
    """
    if z.dim() != 2 or max(axes) >= z.shape[-1]:
        raise ValueError(f"z has shape {tuple(z.shape)}, which has no coordinates {axes}: choose axes below its width")
    figure = new_figure(6.0, 5.0)
    panel = figure.subplots()
    first, second = (z[:, i].detach().cpu().numpy() for i in axes)
    if y is None:
        panel.scatter(first, second, s=8, alpha=0.6)
    else:
        labels = torch.as_tensor(y).cpu()
        for k, label in enumerate(labels.unique().tolist()):
            chosen = (labels == label).numpy()
            panel.scatter(first[chosen], second[chosen], s=8, alpha=0.6, color=f"C{k % 10}", label=str(label))
        panel.legend(title="class", markerscale=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    panel.set(xlabel=f"z[{axes[0]}]", ylabel=f"z[{axes[1]}]", title="latent space")
    return figure


def mixture(gmm: Any, x: Any, *, axes: tuple[int, int] = (0, 1)) -> Figure:
    """Data coloured by their likeliest component, and ellipses of one and two standard deviations.

    Args:
        gmm: a fitted `GaussianMixture` (maximum likelihood).
        x: data, shape (n, D), D at least 2, as a tensor or an array.
        axes: which two features.
    """
    import numpy as np

    if x.ndim != 2 or max(axes) >= x.shape[-1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, which has no features {axes}: choose axes below its width")
    figure = new_figure(6.0, 5.0)
    panel = figure.subplots()
    with torch.no_grad():
        component = gmm.responsibilities(x).argmax(-1)
        shown = rows_of(x, torch.arange(len(x)))
        chol = gmm.scale_tril.expand(gmm.num_components, -1, -1)
        locs = gmm.locs
    angle = np.linspace(0.0, 2 * np.pi, 100)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    for k in range(gmm.num_components):
        chosen = shown[component == k].cpu().numpy()
        panel.scatter(chosen[:, axes[0]], chosen[:, axes[1]], s=8, alpha=0.5, color=f"C{k % 10}")
        covariance = (chol[k] @ chol[k].mT)[list(axes)][:, list(axes)].double().cpu().numpy()
        centre = locs[k][list(axes)].double().cpu().numpy()[:, None]
        for radius in (1.0, 2.0):
            ellipse = centre + radius * np.linalg.cholesky(covariance) @ circle
            panel.plot(ellipse[0], ellipse[1], color=f"C{k % 10}", lw=2.0 / radius)
    panel.set(xlabel=f"x[{axes[0]}]", ylabel=f"x[{axes[1]}]", title=f"{gmm.num_components} components")
    return figure


def image_grid(images: Tensor, columns: int, *, shape: tuple[int, int] | None = None) -> Figure:
    """Images (num, D) row by row in a grid; entries of NaN are left white.

    Numbers about [0, 1] are shown on that scale, 0 white and 1 black, others from their least to their greatest.
    """
    height, width = shape or _square(images.shape[-1])
    if height * width != images.shape[-1]:
        raise ValueError(f"images of {images.shape[-1]} numbers are not shape={(height, width)}")
    rows = math.ceil(len(images) / columns)
    padded = torch.full((rows * columns, height + 2, width + 2), torch.nan)
    padded[: len(images), 1:-1, 1:-1] = images.detach().float().cpu().reshape(-1, height, width)
    sheet = padded.reshape(rows, columns, height + 2, width + 2).permute(0, 2, 1, 3)
    inches = 0.5 / max(height, width)
    figure = new_figure(inches * columns * (width + 2), inches * rows * (height + 2), layout=None)
    panel = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    picture = sheet.reshape(rows * (height + 2), columns * (width + 2)).numpy()
    limits = (0.0, 1.0) if images.min() > -1.0 and images.max() < 2.0 else (None, None)
    panel.imshow(picture, cmap="gray_r", interpolation="nearest", aspect="auto", vmin=limits[0], vmax=limits[1])
    panel.set_axis_off()
    return figure


def _square(num_features: int) -> tuple[int, int]:
    side = math.isqrt(num_features)
    if side * side != num_features:
        raise ValueError(f"{num_features} numbers are no square image: say shape=(height, width)")
    return side, side


def _plot_named(
    panel: Axes, epochs: Sequence[int], group: str, columns: Mapping[str, Sequence[float]], first_colour: int
) -> list[Any]:
    return [
        panel.plot(epochs, values, color=f"C{first_colour + k}", label=f"{group} of {site}")[0]
        for k, (site, values) in enumerate(columns.items())
    ]


def _limit_to_later(panel: Axes, columns: Sequence[Sequence[float]]) -> None:
    later = [value for values in columns for value in values[len(values) // 10 :]]
    if later and max(later) > min(later):
        margin = 0.05 * (max(later) - min(later))
        panel.set_ylim(min(later) - margin, max(later) + margin)
