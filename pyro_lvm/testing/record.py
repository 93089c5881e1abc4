"""What was measured of each law, and the words for a law that is broken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from pyro_lvm.errors import ProgramError
from pyro_lvm.preflight.report import Report

__all__ = ["Conformance", "Law", "broken", "does_not_apply", "holds", "running"]


@dataclass(frozen=True)
class Law:
    """One law and what was measured of it.

    Attributes:
        name: "pre-flight", "gradients", "prior draws", "rows", "batch scale", "enumeration" or "seeds".
        outcome: "holds", or "does not apply".
        reason: what was compared; for a law that does not apply, why.
        deviation: the largest relative difference of the two sides; None where nothing is compared as numbers.
        tolerance: how large it may be; None where ``deviation`` is.
    """

    name: str
    outcome: Literal["holds", "does not apply"]
    reason: str
    deviation: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Conformance:
    """A program that breaks no law; ``str(conformance)`` is a table.

    Attributes:
        program: its name.
        laws: one entry for each law.
        report: what the pre-flight found, its warnings included.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> conformance = lvm.testing.check_program(lvm.PPCA(num_features=3, latent_dim=1), x)
        >>> conformance["enumeration"].outcome, conformance["enumeration"].reason
        ('does not apply', 'no site is summed out')
    """

    program: str
    laws: tuple[Law, ...]
    report: Report

    def __getitem__(self, name: str) -> Law:
        for law in self.laws:
            if law.name == name:
                return law
        raise KeyError(f"no law is called {name!r}: the laws are {', '.join(law.name for law in self.laws)}")

    def __str__(self) -> str:
        table = [("law", "outcome", "deviation", "measured")]
        table += [
            (law.name, law.outcome, "" if law.deviation is None else f"{law.deviation:.1e}", law.reason)
            for law in self.laws
        ]
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in table]
        return "\n".join([self.program, *(line.rstrip() for line in lines)])


def holds(name: str, reason: str, deviation: float | None = None, tolerance: float | None = None) -> Law:
    """A law that was measured and holds."""
    return Law(name, "holds", reason, deviation, tolerance)


def does_not_apply(name: str, reason: str) -> Law:
    """A law of which there is nothing to measure."""
    return Law(name, "does not apply", reason)


def broken(name: str, found: str, edit: str) -> ProgramError:
    """The error for a broken law: which, the numbers, and one edit."""
    return ProgramError(f"the law {name!r} is broken: {found}. {edit[:1].upper()}{edit[1:]}")


@contextmanager
def running(name: str, what: str, edit: str) -> Iterator[None]:
    """Say which law was being measured when the program raised something."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError, AssertionError) as error:
        if isinstance(error, ProgramError) and str(error).startswith("the law"):
            raise
        raise broken(name, f"{what} raised {type(error).__name__}: {str(error).rstrip('. ')}", edit) from error
