"""Images with labels, split into a training and a test set: the digits of scikit-learn, MNIST, FashionMNIST."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from pyro_lvm.datasets.binarized import Binarized

__all__ = ["Split", "TrainTest", "digits", "fashion_mnist", "mnist"]

Array = TypeVar("Array", Tensor, Binarized)
Binarization = Literal["dynamic", "static", "threshold"]


@dataclass(frozen=True, eq=False)
class Split(Generic[Array]):
    """Data and labels.

    Attributes:
        x: images as rows, shape (n, num_features): a float32 tensor, or a `Binarized` array.
        y: labels, int64, shape (n,).
    """

    x: Array
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class TrainTest(Generic[Array]):
    """A data set that is split once and for all.

    Attributes:
        train: what to fit.
        test: what to judge by.
    """

    train: Split[Array]
    test: Split[Array]

    @property
    def whole(self) -> Split[Tensor]:
        """Training rows followed by test rows, as plain tensors; bits as their evaluation draw."""
        return Split(torch.cat([self.train.x[:], self.test.x[:]]), torch.cat([self.train.y, self.test.y]))


def digits(test_fraction: float = 0.2, seed: int = 0) -> TrainTest[Tensor]:
    """The 1797 handwritten digits of scikit-learn: 8 by 8 pixels, no network needed.

    The grey levels 0 to 16 are divided by 16. The split is stratified: every class has the same share in both parts,
    as nearly as whole numbers allow.

    Args:
        test_fraction: share of the rows in the test set.
        seed: seed of the split.

    Returns:
        x float32, shape (n, 64), in [0, 1]; y int64, shape (n,), 0 to 9.

    Raises:
        ValueError: test_fraction is not between 0 and 1, or leaves a part with fewer rows than classes.

    Source: Alpaydin and Kaynak (1998), https://doi.org/10.24432/C50P49.

    Example:
        >>> data = digits()
        >>> data.train.x.shape, data.test.x.shape
        (torch.Size([1437, 64]), torch.Size([360, 64]))
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must lie between 0 and 1, but got {test_fraction}. The usual is 0.2.")
    levels, labels = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        levels, labels, test_size=test_fraction, random_state=seed, stratify=labels
    )

    def split(x: Any, y: Any) -> Split[Tensor]:
        return Split(torch.from_numpy(x / 16).float(), torch.from_numpy(y).long())

    return TrainTest(split(x_train, y_train), split(x_test, y_test))


@overload
def mnist(
    root: str | Path = "data",
    binarize: Literal["static", "threshold"] | None = None,
    download: bool = True,
    seed: int = 0,
) -> TrainTest[Tensor]: ...
@overload
def mnist(
    root: str | Path = "data", *, binarize: Literal["dynamic"], download: bool = True, seed: int = 0
) -> TrainTest[Binarized]: ...
def mnist(
    root: str | Path = "data", binarize: Binarization | None = None, download: bool = True, seed: int = 0
) -> TrainTest[Tensor] | TrainTest[Binarized]:
    """MNIST: 60 000 and 10 000 handwritten digits of 28 by 28 pixels, read through torchvision.

    Args:
        root: folder that holds `MNIST/raw/`; made and filled by a download where the files are absent.
        binarize: None gives grey levels in [0, 1]; "threshold" the bits (grey > 0.5); "static" one draw of bits with
            the grey levels as probabilities, fixed by `seed`; "dynamic" a `Binarized` array, which `fit` draws anew
            in every epoch and which otherwise shows the very bits of "static". The static draw is *not* the file of
            Larochelle that published static-MNIST numbers rest on: compare with those only loosely.
        download: download absent files; with False, absent files are an error.
        seed: seed of the static draw and of the evaluation draw; training and test set are drawn independently.

    Returns:
        x float32 (or `Binarized`), shape (60000, 784) and (10000, 784); y int64, 0 to 9.

    Raises:
        RuntimeError: the files are absent and cannot be, or must not be, downloaded; says which files go where.
        ValueError: binarize is none of the above.

    Source: LeCun, Bottou, Bengio and Haffner (1998), https://doi.org/10.1109/5.726791; dynamic binarisation as in
    Burda, Grosse and Salakhutdinov (2016), https://arxiv.org/abs/1509.00519.

    Example (not run, for it may download)::

        data = mnist("data", binarize="dynamic")
        data.train.x.shape  # torch.Size([60000, 784])
    """
    return _read("MNIST", Path(root), binarize, download, seed)


@overload
def fashion_mnist(
    root: str | Path = "data",
    binarize: Literal["static", "threshold"] | None = None,
    download: bool = True,
    seed: int = 0,
) -> TrainTest[Tensor]: ...
@overload
def fashion_mnist(
    root: str | Path = "data", *, binarize: Literal["dynamic"], download: bool = True, seed: int = 0
) -> TrainTest[Binarized]: ...
def fashion_mnist(
    root: str | Path = "data", binarize: Binarization | None = None, download: bool = True, seed: int = 0
) -> TrainTest[Tensor] | TrainTest[Binarized]:
    """FashionMNIST: 60 000 and 10 000 pieces of clothing of 28 by 28 pixels, ten classes, read through torchvision.

    Arguments, returns and errors are those of `mnist`; the files lie in `FashionMNIST/raw/` under root.

    Source: Xiao, Rasul and Vollgraf (2017), https://arxiv.org/abs/1708.07747.

    Example (not run, for it may download)::

        fashion_mnist("data").test.x.shape  # torch.Size([10000, 784])
    """
    return _read("FashionMNIST", Path(root), binarize, download, seed)


def _read(
    name: str, root: Path, binarize: Binarization | None, download: bool, seed: int
) -> TrainTest[Tensor] | TrainTest[Binarized]:
    if binarize not in (None, "dynamic", "static", "threshold"):
        raise ValueError(f"binarize must be None, 'dynamic', 'static' or 'threshold', but got {binarize!r}.")
    (grey_train, y_train), (grey_test, y_test) = (
        _bytes_and_labels(name, root, train, download) for train in (True, False)
    )
    if binarize in ("dynamic", "static"):
        # two seeds from one, so that no training image shares its random numbers with a test image
        seed_train, seed_test = (int(state) for state in np.random.SeedSequence(seed).generate_state(2))
        bits_train, bits_test = Binarized(grey_train, seed=seed_train), Binarized(grey_test, seed=seed_test)
        if binarize == "dynamic":
            return TrainTest(Split(bits_train, y_train), Split(bits_test, y_test))
        return TrainTest(Split(bits_train[:], y_train), Split(bits_test[:], y_test))

    def levels(grey: Tensor) -> Tensor:
        return grey / 255 if binarize is None else (grey > 127).float()

    return TrainTest(Split(levels(grey_train), y_train), Split(levels(grey_test), y_test))


def _bytes_and_labels(name: str, root: Path, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    """Grey levels, uint8, shape (n, 784), and labels, int64, shape (n,)."""
    import torchvision

    reader = getattr(torchvision.datasets, name)
    try:
        images = reader(str(root), train=train, download=download)
    except (RuntimeError, OSError) as error:
        files = ", ".join(
            f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
        )
        tried = "downloading them failed" if download else "download=False forbids to download them"
        raise RuntimeError(
            f"{name} is not in root={str(root)!r}, and {tried} ({type(error).__name__}: {error}). Put the files "
            f"{files}, unpacked, into the folder {root / name / 'raw'}, or give the root under which "
            f"{name}/raw/train-images-idx3-ubyte lies."
        ) from error
    return images.data.flatten(1), images.targets.long()
