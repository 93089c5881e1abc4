"""A folder with a text that people can read and a file of tensors, which turns from old to new in one moment.

``config.json`` names the file of tensors, which is called after its content, and is renamed into its place last: until
then the folder holds what it held, from then on all that is new. Digests notice accidents, not forgery.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyro_lvm.errors import StorageError
from pyro_lvm.storage.files import decode_tree, encode_tree, flush_folder, read_file, write_file

__all__ = ["CONFIG", "FORMAT", "read_folder", "sealed", "write_folder"]

CONFIG = "config.json"
LIBRARY = "pyro_lvm"
FORMAT = 2
"""What is written. All from 1 on are read: format 1 had `TENSORS_OF_FORMAT_1`, and its digest for ``tensors``."""

TENSORS_OF_FORMAT_1 = "tensors.safetensors"
_TENSORS = re.compile(r"tensors-[0-9a-f]{16}\.safetensors")
_OURS = re.compile(rf"({re.escape(CONFIG)}|{_TENSORS.pattern})(\.\d+\.part)?")


def write_folder(folder: Path, content: Mapping[str, Any], tree: Any) -> None:
    """Write a folder, or replace one that was written here. What a process that died left in it is removed.

    Args:
        folder: new, empty, or with what was written here.
        content: plain values by name.
        tree: a tree of plain values and tensors.

    Raises:
        StorageError: if the folder holds something else, or the system refuses; what was there is as it was.
    """
    _refuse_foreign(folder)
    data = encode_tree(tree)
    digest = hashlib.sha256(data).hexdigest()
    name = f"tensors-{digest[:16]}.safetensors"
    whole = {"library": LIBRARY, "format": FORMAT, **content, "tensors": {"file": name, "sha256": digest}}
    text = json.dumps({**whole, "sha256": sealed(whole)}, indent=1)
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with _alone_in(folder):
                _put(folder, name, data, text.encode())
            if new:
                flush_folder(folder.parent)
        except BaseException:
            if new:
                with suppress(OSError):  # another process may have begun to write there
                    folder.rmdir()
            raise
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written ({error.strerror or error}): see to room and permissions on that disk, or "
            "name another folder"
        ) from error


def read_folder(folder: Path) -> tuple[dict[str, Any], Any]:
    """The plain values and the tree that `write_folder` wrote; its tensors lie on the CPU.

    Raises:
        StorageError: if a file is missing, damaged, of a later format, or of another folder, naming it.
    """
    while True:
        text = read_file(folder / CONFIG)
        try:
            return _read(folder, text)
        except StorageError:
            if read_file(folder / CONFIG) == text:
                raise
            # it was saved over in between, and the file of tensors that belonged to the text has gone


def sealed(content: Mapping[str, Any]) -> str:
    """SHA-256 of what the text says, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _put(folder: Path, name: str, data: bytes, text: bytes) -> None:
    """The tensors beside the old ones, then the text in the place of the old one; then the old ones go."""
    try:
        write_file(folder / name, data)
        write_file(folder / CONFIG, text)
    except BaseException:
        there = (folder / CONFIG).read_bytes() if (folder / CONFIG).exists() else b""
        if name.encode() not in there:
            (folder / name).unlink(missing_ok=True)
        raise
    for entry in folder.iterdir():
        if entry.name not in (CONFIG, name):
            with suppress(OSError):  # what is left over does no harm
                entry.unlink()


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait for other processes that write to this folder; where the system has no such locks, do not."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some disks on networks know no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StorageError(f"{folder} is a file: name a folder that is not there yet")
    found = {entry.name for entry in folder.iterdir()}
    strange = sorted(name for name in found - {TENSORS_OF_FORMAT_1} if not _OURS.fullmatch(name))
    if CONFIG in found and not strange:
        with suppress(StorageError, ValueError, RecursionError):
            config = json.loads(read_file(folder / CONFIG))
            if isinstance(config, dict) and config.get("library") == LIBRARY:
                return
        strange = [CONFIG]
    elif TENSORS_OF_FORMAT_1 in found:  # without its text, anybody's
        strange.append(TENSORS_OF_FORMAT_1)
    if strange:
        raise StorageError(
            f"{folder} holds something other than a saved fit ({strange[0]}): name an empty folder, or one not there"
        )


def _read(folder: Path, text: bytes) -> tuple[dict[str, Any], Any]:
    try:
        config = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{CONFIG} is damaged ({error}): take a copy of it") from error
    if not isinstance(config, dict) or config.get("library") != LIBRARY:
        raise StorageError(f"{CONFIG} is no saved fit of pyro_lvm: check the path")
    written = config.get("format")
    if type(written) is not int or not 1 <= written <= FORMAT:
        raise StorageError(
            f"{CONFIG} has format {written!r:.40}, and this version reads formats 1 to {FORMAT}: update pyro_lvm"
        )
    expected = config.pop("sha256", None)
    try:
        found = sealed(config)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{CONFIG} is damaged ({error}): take a copy of it") from error
    if found != expected:
        raise StorageError(f"{CONFIG} is damaged: its content is not what its sha256 says; take a copy of it")
    name, digest = _named(config.pop("tensors", None), written)
    data = read_file(folder / name)
    if hashlib.sha256(data).hexdigest() != digest:
        raise StorageError(f"{name} is damaged, or belongs to another {CONFIG}: take a copy of both")
    return config, decode_tree(data, folder / name)


def _named(tensors: Any, written: int) -> tuple[str, str]:
    """Name and digest of the file of tensors; no name leads out of the folder."""
    if written == 1:
        tensors = {"file": TENSORS_OF_FORMAT_1, "sha256": tensors}
    name, digest = (tensors.get("file"), tensors.get("sha256")) if isinstance(tensors, dict) else (None, None)
    if not isinstance(name, str) or not (written == 1 or _TENSORS.fullmatch(name)) or not isinstance(digest, str):
        raise StorageError(f"{CONFIG} names no file of tensors under its key 'tensors': take a copy of both")
    return name, digest
