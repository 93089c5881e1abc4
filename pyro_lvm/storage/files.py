"""Files that are there whole or not at all, and that say when a bit of them has turned."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pyro_lvm.errors import StorageError
from pyro_lvm.storage.tree import pack, unpack

__all__ = ["decode_tree", "digest", "encode_tree", "flush_folder", "read_file", "read_tree", "write_file", "write_tree"]

_CONTENT, _DIGEST = "content", "sha256"


def write_file(path: Path, content: bytes) -> None:
    """Write under a temporary name, wait for the disk, and rename: ``path`` holds the old content or the new one.

    Raises:
        StorageError: if the system refuses, with its words; the temporary file is gone, ``path`` is as it was.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            flush_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}): see to room and permissions on that disk, or name "
            "another folder"
        ) from error


def flush_folder(folder: Path) -> None:
    """Wait until the disk knows of the new name."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_file(path: Path) -> bytes:
    """The content of a file.

    Raises:
        StorageError: if it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror or error}): check the path") from error


def write_tree(path: Path, tree: Any) -> None:
    """Write a tree of plain values and tensors as one file.

    Raises:
        StorageError: if the system refuses, or something in the tree is neither a plain value nor a tensor.
    """
    write_file(path, encode_tree(tree))


def read_tree(path: Path) -> Any:
    """The tree that `write_tree` wrote; its tensors lie on the CPU.

    Raises:
        StorageError: if the file cannot be read, is cut short, or differs by a bit from what was written.
    """
    return decode_tree(read_file(path), path)


def encode_tree(tree: Any) -> bytes:
    """A tree of plain values and tensors as safetensors, whose header holds the plain values.

    Raises:
        StorageError: if something in the tree is neither a plain value nor a tensor.
    """
    plain, tensors = pack(tree, "")
    content = json.dumps(plain)
    return save(tensors, {_CONTENT: content, _DIGEST: digest(content, tensors)})


def decode_tree(data: bytes, path: Path) -> Any:
    """The tree that `encode_tree` encoded.

    Args:
        data: the content of a file.
        path: the file, for errors.

    Raises:
        StorageError: if it is cut short, or differs by a bit from what was written.
    """
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        content, expected = header["__metadata__"][_CONTENT], header["__metadata__"][_DIGEST]
        if digest(content, tensors) != expected:
            raise StorageError(f"its content is not what its {_DIGEST} says")
        return unpack(json.loads(content), tensors)
    except (SafetensorError, StorageError, ValueError, LookupError, TypeError, RecursionError, AttributeError) as error:
        raise StorageError(
            f"{path} is damaged, or no file of this library ({error}): take a copy of it, or the one before it"
        ) from error


def digest(content: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the plain values and over names, kinds, shapes and bytes of the tensors."""
    found = hashlib.sha256(content.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        found.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
