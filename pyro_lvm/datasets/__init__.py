"""Data to learn with: scikit-learn's digits, MNIST and FashionMNIST, and synthetic data whose truth is known.

The digits come with scikit-learn and need no network; MNIST and FashionMNIST are read, and if need be downloaded,
through torchvision. All randomness comes from the `seed` argument: torch's and numpy's global generators stay as
they are.
"""

from __future__ import annotations

from pyro_lvm.datasets.binarized import Binarized
from pyro_lvm.datasets.folder import FolderOfArrays, folder
from pyro_lvm.datasets.images import Split, TrainTest, digits, fashion_mnist, mnist
from pyro_lvm.datasets.labels import hide_labels
from pyro_lvm.datasets.synthetic import (
    GaussianMixtureData,
    LinearGaussianData,
    make_factor_analysis,
    make_gaussian_mixture,
    make_ppca,
)

__all__ = [
    "Binarized",
    "FolderOfArrays",
    "GaussianMixtureData",
    "LinearGaussianData",
    "Split",
    "TrainTest",
    "digits",
    "fashion_mnist",
    "folder",
    "hide_labels",
    "make_factor_analysis",
    "make_gaussian_mixture",
    "make_ppca",
    "mnist",
]
