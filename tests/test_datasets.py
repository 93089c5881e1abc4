"""Data sets: what is in them, that the seed alone decides, that the draws are exact, that the truth is the truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from pyro_lvm import datasets
from pyro_lvm.datasets import Binarized, hide_labels

pytestmark = pytest.mark.usefixtures("global_generators_stay")


# --- images


def test_digits_are_scikit_learns():
    data = datasets.digits()
    levels, labels = load_digits(return_X_y=True)
    assert data.train.x.dtype is torch.float32
    assert data.train.y.dtype is torch.int64
    assert (len(data.train), len(data.test), len(data.whole)) == (1437, 360, 1797)

    def sorted_rows(x, y):
        table = np.column_stack([np.asarray(x, float), np.asarray(y, float)])
        return table[np.lexsort(table.T)]

    np.testing.assert_array_equal(sorted_rows(data.whole.x, data.whole.y), sorted_rows(levels / 16, labels))
    assert torch.equal(data.whole.x[:1437], data.train.x)


def test_digits_are_split_by_class_and_seed():
    data, again, other = datasets.digits(), datasets.digits(), datasets.digits(seed=1)
    assert torch.equal(data.test.x, again.test.x)
    assert not torch.equal(data.test.x, other.test.x)
    shares = data.test.y.bincount() / data.whole.y.bincount()
    assert ((shares - 360 / 1797).abs() < 0.005).all()
    assert len(datasets.digits(test_fraction=0.5).train) == 898
    with pytest.raises(ValueError, match=r"test_fraction must lie between 0 and 1, but got 1.5"):
        datasets.digits(test_fraction=1.5)


@pytest.fixture(scope="module")
def mnist(data_root):
    return datasets.mnist(root=data_root, download=False)


@pytest.fixture(scope="module")
def dynamic(data_root):
    return datasets.mnist(root=data_root, binarize="dynamic", download=False)


def test_mnist_is_mnist(mnist):
    assert mnist.train.x.shape == (60_000, 784)
    assert mnist.test.x.shape == (10_000, 784)
    assert mnist.train.x.dtype is torch.float32
    assert mnist.train.y.dtype is torch.int64
    assert (mnist.train.x.min(), mnist.train.x.max()) == (0, 1)
    # the mean and the standard deviation by which everybody normalises MNIST
    assert mnist.train.x.mean(dtype=torch.float64).item() == pytest.approx(0.1307, abs=5e-5)
    assert mnist.train.x.std().item() == pytest.approx(0.3081, abs=5e-5)
    assert mnist.train.y.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist.test.y[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]


def test_dynamic_mnist(mnist, dynamic):
    assert isinstance(dynamic.train.x, Binarized)
    assert isinstance(dynamic.test.x, Binarized)
    assert isinstance(dynamic.test.x[:500], torch.Tensor)
    assert dynamic.train.x.shape == (60_000, 784)
    assert torch.equal(dynamic.train.y, mnist.train.y)
    assert torch.equal(dynamic.test.x.grey / 255, mnist.test.x)


def test_epochs_of_mnist_have_the_grey_levels_as_probabilities(mnist, dynamic):
    probability = mnist.test.x.double()
    variance = (probability * (1 - probability)).sum(0)
    draws = dynamic.test.x[:], dynamic.test.x.redraw(0, 0)[:]
    for bits in draws:
        excess = (bits.double() - probability).sum(0)
        assert (excess[variance == 0] == 0).all()
        assert (excess.abs()[variance > 0] / variance[variance > 0].sqrt()).max() < 5.5  # 784 pixels
    differ = draws[0] != draws[1]
    assert not differ[(probability == 0) | (probability == 1)].any()
    assert differ.sum().item() == pytest.approx(2 * variance.sum().item(), rel=0.02)


def test_training_and_test_are_drawn_independently(dynamic):
    # thresholds of a row are shared by nobody: equal grey images get other bits
    train, test = dynamic.train.x, dynamic.test.x
    same = Binarized(test.grey, seed=train._seed)
    assert not torch.equal(same[:100], test[:100])


def test_static_mnist_is_the_evaluation_draw(data_root, dynamic):
    static = datasets.mnist(root=data_root, binarize="static", download=False)
    assert torch.equal(static.test.x, dynamic.test.x[:])
    assert torch.equal(static.train.x[:1000], dynamic.train.x[:1000])
    other = datasets.mnist(root=data_root, binarize="static", download=False, seed=1)
    assert not torch.equal(static.test.x, other.test.x)


def test_thresholded_fashion_mnist(data_root):
    bits = datasets.fashion_mnist(root=str(data_root), binarize="threshold", download=False)
    file = data_root / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte"
    grey = np.fromfile(file, np.uint8, offset=16).reshape(10_000, 784) / 255
    np.testing.assert_array_equal(bits.test.x, grey > 0.5)
    assert bits.train.x.shape == (60_000, 784)
    assert bits.train.y.bincount().tolist() == [6000] * 10


def test_the_whole_of_dynamic_mnist(dynamic):
    whole = dynamic.whole
    assert whole.x.shape == (70_000, 784)
    assert torch.equal(whole.x[60_000:], dynamic.test.x[:])


def test_absent_files_are_named(tmp_path):
    message = (
        r"MNIST is not in root='.*', and download=False.*train-images-idx3-ubyte.*t10k-labels-idx1-ubyte.*MNIST.raw"
    )
    with pytest.raises(RuntimeError, match=message):
        datasets.mnist(root=tmp_path / "nowhere", download=False)
    with pytest.raises(RuntimeError, match=r"FashionMNIST is not in root.*FashionMNIST.raw"):
        datasets.fashion_mnist(root=tmp_path, download=False)


def test_without_network_the_error_says_what_was_tried(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [(tmp_path / "mirror").as_uri() + "/"])
    with pytest.raises(RuntimeError, match=r"(?s)downloading them failed.*Error downloading.*Put the files"):
        datasets.mnist(root=tmp_path)


def test_unknown_binarization_is_refused(tmp_path):
    with pytest.raises(ValueError, match="binarize must be None, 'dynamic', 'static' or 'threshold', but got 'random'"):
        datasets.mnist(root=tmp_path, binarize="random")


# --- labels


def test_hidden_labels_are_balanced():
    y = datasets.digits().train.y
    before = y.clone()
    hidden = hide_labels(y, keep=100, seed=0)
    assert torch.equal(y, before)
    assert hidden.dtype is y.dtype
    kept = hidden >= 0
    assert torch.equal(hidden[kept], y[kept])
    assert (hidden[~kept] == -1).all()
    assert hidden[kept].bincount().tolist() == [10] * 10
    assert torch.equal(hidden, hide_labels(y, keep=100, seed=0))
    assert not torch.equal(hidden, hide_labels(y, keep=100, seed=1))


def test_every_row_may_keep_its_label():
    y = torch.zeros(10, dtype=torch.int64)
    often = sum((hide_labels(y, keep=5, seed=seed) == 0).double() for seed in range(400)) / 400
    assert ((often - 0.5).abs() < 5 * 0.5 / 20).all()


@pytest.mark.parametrize(
    ("counts", "keep", "expected"),
    [
        ([5, 5, 5], 7, [2, 2, 3]),
        ([5, 5, 5], 2, [0, 1, 1]),
        ([5, 5, 5], 0, [0, 0, 0]),
        ([5, 5, 5], 15, [5, 5, 5]),
        ([1, 2, 50, 50], 33, [1, 2, 15, 15]),
        ([1, 2, 50, 50], 34, [1, 2, 15, 16]),
        ([1, 1, 1, 4], 5, [1, 1, 1, 2]),
    ],
)
def test_shares_are_as_even_as_the_classes_allow(counts, keep, expected):
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).int()
    for seed in range(5):
        hidden = hide_labels(y, keep, seed)
        kept = hidden[hidden >= 0].bincount(minlength=len(counts)).tolist()
        assert sorted(kept) == expected
        assert all(share <= count for share, count in zip(kept, counts, strict=True))


def test_odd_labels_go_to_classes_at_random():
    y = torch.arange(3).repeat(5)
    winners = {int(hide_labels(y, 4, seed)[hide_labels(y, 4, seed) >= 0].bincount().argmax()) for seed in range(20)}
    assert winners == {0, 1, 2}


def test_labels_hidden_before_stay_hidden():
    y = torch.tensor([-1, 4, -1, 4, 7, 7])
    hidden = hide_labels(y, keep=2)
    assert (hidden[[0, 2]] == -1).all()
    assert sorted(hidden[hidden >= 0].tolist()) == [4, 7]


@pytest.mark.parametrize(
    ("y", "keep", "error", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), 6, ValueError, r"between 0 and the 5 labels.*got 6"),
        (torch.zeros(5, dtype=torch.int64), -1, ValueError, r"got -1"),
        (torch.zeros(5, 1, dtype=torch.int64), 1, ValueError, r"got shape \(5, 1\)"),
        (torch.zeros(5), 1, TypeError, r"dtype is torch.float32.*y.long"),
        (torch.zeros(5, dtype=torch.uint8), 1, TypeError, r"signed integers"),
    ],
)
def test_labels_that_cannot_be_hidden(y, keep, error, message):
    with pytest.raises(error, match=message):
        hide_labels(y, keep)


# --- synthetic data


def within_standard_errors(estimates, truth, standard_errors, number=5.0):
    np.testing.assert_array_less(np.abs(np.asarray(estimates - truth)), number * np.asarray(standard_errors) + 1e-12)


def covariance_errors(covariance, n):
    """Standard errors of the entries of a normal sample's covariance matrix."""
    diagonal = torch.diagonal(covariance)
    return ((covariance**2 + diagonal[:, None] * diagonal) / n).sqrt()


@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
def test_mixture_data_follow_their_truth(covariance):
    n = 30_000
    data = datasets.make_gaussian_mixture(n, 3, 4, covariance=covariance, seed=1)
    assert data.x.shape == (n, 4)
    assert data.x.dtype is data.covariances.dtype is torch.float64
    assert data.component.dtype is torch.int64
    assert data.weights.sum().item() == pytest.approx(1)
    frequencies = data.component.bincount(minlength=3) / n
    within_standard_errors(frequencies, data.weights, (data.weights * (1 - data.weights) / n).sqrt())
    for k in range(3):
        rows, truth = data.x[data.component == k], data.covariances[k]
        within_standard_errors(rows.mean(0), data.locs[k], (torch.diagonal(truth) / len(rows)).sqrt())
        within_standard_errors(torch.cov(rows.T), truth, covariance_errors(truth, len(rows)))
        deviations = torch.linalg.eigvalsh(truth).sqrt()
        assert (deviations > 0.499).all()
        assert (deviations < 1.501).all()
    off_diagonal = data.covariances - torch.diag_embed(torch.diagonal(data.covariances, dim1=1, dim2=2))
    assert (off_diagonal.abs().max() > 0.01) == (covariance in ("full", "tied"))
    assert torch.equal(data.covariances[0], data.covariances[1]) == (covariance == "tied")
    spread = torch.diagonal(data.covariances, dim1=1, dim2=2).std(-1).max()
    assert (spread < 1e-12) == (covariance == "spherical")


def test_separation_moves_the_means():
    near, far = (datasets.make_gaussian_mixture(10, 3, 2, separation=s, seed=0) for s in (1.0, 10.0))
    torch.testing.assert_close(10 * near.locs, far.locs)


@pytest.mark.parametrize("make", [datasets.make_ppca, datasets.make_factor_analysis])
def test_linear_gaussian_data_follow_their_truth(make):
    n = 40_000
    data = make(n, num_features=5, latent_dim=2, seed=3)
    assert (data.x.shape, data.z.shape, data.loadings.shape) == ((n, 5), (n, 2), (5, 2))
    assert data.loc.shape == data.noise.shape == (5,)
    within_standard_errors(data.x.mean(0), data.loc, (torch.diagonal(data.covariance) / n).sqrt())
    within_standard_errors(torch.cov(data.x.T), data.covariance, covariance_errors(data.covariance, n))
    within_standard_errors(torch.cov(data.z.T), torch.eye(2), covariance_errors(torch.eye(2), n))
    noise = data.x - data.loc - data.z @ data.loadings.T
    truth = torch.diag(data.noise**2)
    within_standard_errors(torch.cov(noise.T), truth, covariance_errors(truth, n))
    assert (len(data.noise.unique()) == 1) == (make is datasets.make_ppca)


def test_noise_is_a_standard_deviation_in_its_range():
    assert datasets.make_ppca(5, 3, 1, noise=0.25).noise.tolist() == pytest.approx([0.25] * 3)
    noise = datasets.make_factor_analysis(5, 500, 1, noise=(0.1, 10.0)).noise
    assert 0.1 <= noise.min() < 0.12
    assert 8 < noise.max() <= 10
    assert noise.median().item() == pytest.approx(1, rel=0.5)


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: datasets.make_gaussian_mixture(20, 2, 3, seed=seed),
        lambda seed: datasets.make_ppca(20, 3, 2, seed=seed),
        lambda seed: datasets.make_factor_analysis(20, 3, 2, seed=seed),
    ],
)
def test_synthetic_data_depend_on_the_seed_alone(make):
    assert torch.equal(make(0).x, make(0).x)
    assert not torch.equal(make(0).x, make(1).x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: datasets.make_gaussian_mixture(0, 2, 3), "n must be at least 1, but got 0"),
        (lambda: datasets.make_gaussian_mixture(9, 0, 3), "num_components must be at least 1, but got 0"),
        (
            lambda: datasets.make_gaussian_mixture(9, 2, 3, separation=-1.0),
            "separation must not be negative, but got -1",
        ),
        (lambda: datasets.make_gaussian_mixture(9, 2, 3, covariance="round"), "covariance must be .* but got 'round'"),
        (lambda: datasets.make_ppca(9, 3, 0), "latent_dim must be at least 1, but got 0"),
        (lambda: datasets.make_ppca(9, 3, 1, noise=0.0), "noise must be positive and finite"),
        (lambda: datasets.make_factor_analysis(9, 3, 1, noise=(2.0, 1.0)), "but got 2.0 and 1.0"),
    ],
)
def test_impossible_synthetic_data_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
