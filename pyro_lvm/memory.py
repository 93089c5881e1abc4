"""What memory the process may still take, and the refusal of what would not fit."""

from __future__ import annotations

import ctypes
import os
import pathlib

from pyro_lvm.errors import NotEnoughMemoryError

__all__ = ["available", "require_room"]

_CGROUPS = pathlib.Path("/sys/fs/cgroup")


def available() -> int | None:
    """Bytes that the process can still take: the least of what machine, container and limits leave; None if unknown.

    Example:
        >>> room = available()
        >>> room is None or room >= 0
        True
    """
    found = [left for left in (_of_machine(), *_of_containers(), *_of_limits()) if left is not None]
    return max(min(found), 0) if found else None


def require_room(needed: int, what: str, edit: str) -> None:
    """Refuse what would not fit, before any of it is made.

    Args:
        needed: bytes it takes at its largest.
        what: it is, for the message.
        edit: what the caller can change.

    Raises:
        NotEnoughMemoryError: if it needs more than is `available`.

    Example:
        >>> require_room(1000, "a thousand bytes", "ask for fewer")
    """
    room = available()
    if room is not None and needed > room:
        raise NotEnoughMemoryError(f"{what} would take {_in_words(needed)}, and {_in_words(room)} are free: {edit}")


def _in_words(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _of_machine() -> int | None:
    found = _fields("/proc/meminfo").get("MemAvailable")
    if found is not None:
        return found
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # a system that does not say
        return None


def _of_limits() -> list[int]:
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return []
    used = _fields("/proc/self/status")
    left = []
    for limit, field in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY and field in used:
            left.append(soft - used[field] + _free_in_heap())
    return left


class _Heap(ctypes.Structure):
    """What glibc's ``mallinfo2`` tells: ten numbers, of which the ninth is what is free."""

    _fields_ = [
        *((f"other{i}", ctypes.c_size_t) for i in range(8)),
        ("free", ctypes.c_size_t),
        ("top", ctypes.c_size_t),
    ]


def _free_in_heap() -> int:
    """Bytes that malloc has taken from the system and lent to nobody; none where it does not say."""
    try:
        tell = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError, TypeError):  # glibc has had it since 2.33
        return 0
    tell.restype = _Heap
    return int(tell().free)


def _of_containers() -> list[int]:
    """What is left to each control group that the process is in; pages of files can be given back."""
    left = []
    for line in _text(pathlib.Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _CGROUPS, ("memory.max", "memory.current", "file")
        elif "memory" in controllers.split(","):
            root, names = _CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
        else:
            continue
        inside = root / path.lstrip("/")
        for folder in (inside, *inside.parents):
            if not folder.is_relative_to(root):
                break
            limit, used = (_text(folder / name).strip() for name in names[:2])
            if limit.isdigit() and used.isdigit():
                statistics = dict(pair.split()[:2] for pair in _text(folder / "memory.stat").splitlines())
                left.append(int(limit) - int(used) + int(statistics.get(names[2], 0)))
    return left


def _fields(path: str) -> dict[str, int]:
    """Lines such as ``VmData:  100 kB``, in bytes."""
    found = {}
    for line in _text(pathlib.Path(path)).splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            found[name] = int(words[0]) * 1024
    return found


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
