"""Pictures hold what they say they hold, and making one changes nothing outside it."""

from __future__ import annotations

import math
import pickle
import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import pyro_lvm as lvm


class Painter:
    """Stands for a model: what it draws is known."""

    def sample(self, n: int, seed: int | None = None, *, mean: bool = False) -> torch.Tensor:
        assert mean
        return torch.arange(n * 16.0).reshape(n, 16)

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        return -x

    def interpolate(self, start: torch.Tensor, end: torch.Tensor, steps: int) -> torch.Tensor:
        return torch.stack([torch.lerp(start, end, t) for t in torch.linspace(0, 1, steps)])


def picture(figure: Figure) -> np.ndarray:
    return np.asarray(figure.axes[0].images[0].get_array())


def tile(sheet: np.ndarray, row: int, column: int, side: int = 4) -> np.ndarray:
    pitch = side + 2
    return sheet[row * pitch + 1 : row * pitch + 1 + side, column * pitch + 1 : column * pitch + 1 + side]


def test_samples_stand_row_by_row() -> None:
    sheet = picture(lvm.plots.samples(Painter(), num=6))
    assert sheet.shape == (2 * 6, 3 * 6)
    for k in range(6):
        np.testing.assert_allclose(tile(sheet, k // 3, k % 3), np.arange(16.0).reshape(4, 4) + 16 * k)


def test_reconstructions_stand_under_their_originals() -> None:
    x = torch.rand(18, 16, generator=torch.Generator().manual_seed(0))
    sheet = np.ma.filled(picture(lvm.plots.reconstructions(Painter(), x)), np.nan)
    for k in (0, 15, 16, 17):
        row, column = 2 * (k // 16), k % 16
        np.testing.assert_allclose(tile(sheet, row, column), x[k].reshape(4, 4).numpy())
        np.testing.assert_allclose(tile(sheet, row + 1, column), -x[k].reshape(4, 4).numpy())
    assert np.isnan(tile(sheet, 2, 5)).all()


def canvas(figure) -> FigureCanvasAgg:
    drawn = FigureCanvasAgg(figure)
    drawn.draw()
    return drawn


def test_data_of_numpy_are_shown_as_tensors_are() -> None:
    x = torch.rand(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vae, gmm = lvm.VAE(4, 1, (3,)), lvm.GaussianMixture(2, 4)
    gmm.initialize(x.float(), seed=0)
    for plot, model, at_most in ((lvm.plots.reconstructions, vae, 30), (lvm.plots.mixture, gmm, 60)):
        of_tensor, of_array = (plot(model, data[:at_most]) for data in (x.float(), x.numpy()))
        pixels = [np.asarray(canvas(figure).buffer_rgba()).astype(float) for figure in (of_tensor, of_array)]
        np.testing.assert_allclose(*pixels, atol=2)


def test_interpolation_has_a_row_for_each_pair() -> None:
    start, end = torch.zeros(2, 16), torch.stack([torch.ones(16), 2 * torch.ones(16)])
    sheet = picture(lvm.plots.interpolation(Painter(), start, end, steps=5))
    np.testing.assert_allclose(tile(sheet, 1, 2), np.full((4, 4), 1.0))
    np.testing.assert_allclose(tile(sheet, 0, 4), np.full((4, 4), 1.0))


def test_images_may_be_oblong_but_must_fit() -> None:
    assert picture(lvm.plots.image_grid(torch.zeros(2, 6), columns=2, shape=(2, 3))).shape == (4, 10)
    with pytest.raises(ValueError, match=r"6 numbers are no square.*shape"):
        lvm.plots.image_grid(torch.zeros(2, 6), columns=2)
    with pytest.raises(ValueError, match=r"6 numbers are not shape=\(2, 2\)"):
        lvm.plots.image_grid(torch.zeros(2, 6), columns=2, shape=(2, 2))
    with pytest.raises(ValueError, match="at most 32"):
        lvm.plots.reconstructions(Painter(), torch.zeros(33, 16))


def test_latent_scatter_has_one_colour_for_each_class() -> None:
    z, y = torch.randn(30, 3), torch.arange(30) % 3
    panel = lvm.plots.latent(z, y, axes=(2, 0)).axes[0]
    assert len(panel.collections) == 3
    np.testing.assert_allclose(panel.collections[1].get_offsets(), z[y == 1][:, [2, 0]].numpy())
    assert len(lvm.plots.latent(z).axes[0].collections) == 1
    with pytest.raises(ValueError, match=r"\(30, 3\).*\(0, 3\)"):
        lvm.plots.latent(z, axes=(0, 3))


@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
def test_ellipses_lie_one_and_two_standard_deviations_from_the_centre(covariance: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator, dtype=torch.float64) @ torch.randn(3, 3, generator=generator).double()
    gmm = lvm.GaussianMixture(2, 3, covariance).double()  # type: ignore[arg-type]
    gmm.initialize(x, seed=0)
    panel = lvm.plots.mixture(gmm, x, axes=(0, 2)).axes[0]
    chol = gmm.scale_tril.expand(2, -1, -1).detach().numpy()
    for k in range(2):
        cov = (chol[k] @ chol[k].T)[np.ix_([0, 2], [0, 2])]
        centre = gmm.locs[k].detach().numpy()[[0, 2]]
        for radius in (1, 2):
            points = panel.lines[2 * k + radius - 1].get_xydata() - centre
            distance = np.einsum("ni,ij,nj->n", points, np.linalg.inv(cov), points)
            np.testing.assert_allclose(distance, radius**2, rtol=1e-8)
    assert sum(len(dots.get_offsets()) for dots in panel.collections) == 200
    with pytest.raises(ValueError, match=r"\(200, 3\).*\(0, 3\)"):
        lvm.plots.mixture(gmm, x, axes=(0, 3))


def test_loss_shows_the_bound_and_its_parts() -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    fit = lvm.fit(lvm.PPCA(3, 1), x, steps=12, seed=0, validation=x[:10])
    figure = lvm.plots.loss(fit)
    whole, parts, beside = figure.axes
    assert [line.get_label() for line in whole.lines] == ["ELBO", "validation ELBO"]
    np.testing.assert_allclose(whole.lines[0].get_ydata(), fit.history["elbo"])
    np.testing.assert_allclose(parts.lines[0].get_ydata(), fit.history["reconstruction"]["x"])
    np.testing.assert_allclose(beside.lines[0].get_ydata(), fit.history["kl"]["z"])


def test_loss_of_a_program_without_latents_has_no_kl() -> None:
    gmm = lvm.GaussianMixture(1, 2, "diag")
    fit = lvm.fit(gmm, torch.randn(20, 2, generator=torch.Generator().manual_seed(0)), steps=3, seed=0)
    figure = lvm.plots.loss(fit)
    assert all(math.isfinite(v) for v in figure.axes[0].get_ylim())


def test_plots_neither_open_windows_nor_touch_pyplot() -> None:
    before = dict(mpl.rcParams)
    known = "matplotlib.pyplot" in sys.modules
    assert isinstance(lvm.plots.latent(torch.zeros(3, 2)), Figure)
    assert dict(mpl.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == known


def test_a_figure_shows_itself_in_a_notebook_that_has_not_imported_pyplot():
    figure = pickle.loads(pickle.dumps(lvm.plots.image_grid(torch.rand(4, 9), columns=2)))
    assert figure._repr_png_().startswith(b"\x89PNG")
