"""A folder of arrays on disk, seen as one array."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["FolderOfArrays", "folder"]


class FolderOfArrays:
    """The rows of several ``.npy`` files, one file after the other; only what is asked for is read.

    Attributes:
        files: the files, in the order of their rows.
        shape: of all rows together.
        dtype: of every file.
        read_ahead: rows may be read by another thread.
    """

    read_ahead = True

    def __init__(self, files: list[pathlib.Path]) -> None:
        self.files = files
        self._parts = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
        first = self._parts[0]
        for file, part in zip(files, self._parts, strict=True):
            if part.ndim == 0:
                raise ValueError(f"{file} holds a single number of shape (): save an array with one row per datum")
            if part.shape[1:] != first.shape[1:] or part.dtype != first.dtype:
                raise ValueError(
                    f"{files[0]} has rows of shape {first.shape[1:]} and dtype {first.dtype}, but {file} has rows of "
                    f"shape {part.shape[1:]} and dtype {part.dtype}: save all files with the same shape and dtype"
                )
        self._ends = np.cumsum([len(part) for part in self._parts])
        self.shape = (int(self._ends[-1]), *first.shape[1:])
        self.dtype: np.dtype[Any] = first.dtype

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, rows: Any) -> Tensor:
        """Rows by number, slice, or tensor of numbers."""
        index = np.arange(len(self))[rows.numpy() if isinstance(rows, Tensor) else rows]
        wanted = np.atleast_1d(index)
        # torch knows only the byte order of the machine
        found = np.empty((len(wanted), *self.shape[1:]), self.dtype.newbyteorder("="))
        which = np.searchsorted(self._ends, wanted, side="right")
        for number in np.unique(which):
            here = which == number
            start = self._ends[number] - len(self._parts[number])
            found[here] = self._parts[number][wanted[here] - start]
        return torch.from_numpy(found if np.ndim(index) else found[0])

    def __repr__(self) -> str:
        return f"FolderOfArrays of {len(self.files)} files, shape {self.shape}, dtype {self.dtype}"


def folder(path: str | os.PathLike[str]) -> FolderOfArrays:
    """The ``.npy`` files of a folder as one array of rows, which need not fit in memory.

    Args:
        path: the folder; its files follow each other in the order of their names.

    Returns:
        An array that `fit` and every evaluation take as data: it has ``len``, and ``x[rows]`` gives a tensor.

    Raises:
        FileNotFoundError: if there is no such folder, or no ``.npy`` file in it.
        ValueError: if the files do not agree in dtype or in the shape of a row.

    Example:
        >>> import numpy as np, tempfile
        >>> with tempfile.TemporaryDirectory() as path:
        ...     np.save(f"{path}/a.npy", np.zeros((3, 2), np.float32))
        ...     np.save(f"{path}/b.npy", np.ones((2, 2), np.float32))
        ...     x = folder(path)
        ...     len(x), x[2:4]
        (5, tensor([[0., 0.],
                [1., 1.]]))
    """
    where = pathlib.Path(path)
    files = sorted(where.glob("*.npy"))
    if not files:
        missing = "holds no .npy file" if where.is_dir() else "is no folder"
        raise FileNotFoundError(f"{where} {missing}: save arrays there with np.save, one row per datum")
    return FolderOfArrays(files)
