"""What a diagnosis says: findings with numbers, a verdict, and one sentence with what to try."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

__all__ = ["VERDICTS", "Diagnosis", "Finding", "Verdict", "judged"]

Verdict = Literal["fine", "look", "wrong"]

VERDICTS: tuple[Verdict, ...] = ("fine", "look", "wrong")
"""From good to bad."""


@dataclass(frozen=True, eq=False)
class Finding:
    """One thing that was looked at.

    ``finding["max"]`` gives a number or an array by its name.

    Attributes:
        name: what was looked at.
        verdict: "fine", "look" (at the numbers, before you rely on this) or "wrong".
        numbers: the summary, by name.
        advice: one sentence: what the numbers mean, and what to try.
        arrays: what the summary was made from, by name; see the diagnosis' own page for their shapes.
    """

    name: str
    verdict: Verdict
    numbers: Mapping[str, float]
    advice: str
    arrays: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> float | Tensor:
        if name in self.numbers:
            return self.numbers[name]
        if name in self.arrays:
            return self.arrays[name]
        raise KeyError(f"finding {self.name!r} has no {name!r}; it has {', '.join((*self.numbers, *self.arrays))}")

    def __str__(self) -> str:
        numbers = "  ".join(f"{name} {_short(value)}" for name, value in self.numbers.items())
        advice = textwrap.wrap(self.advice, 108, initial_indent=" " * 9, subsequent_indent=" " * 9)
        return "\n".join([f"{self.verdict:<7}  {self.name}: {numbers}", *advice])


@dataclass(frozen=True, repr=False, eq=False)
class Diagnosis(Mapping[str, Finding]):
    """What `diagnose` found; a mapping from a finding's name to it, which prints as a table.

    Attributes:
        findings: by name.
        skipped: what was not looked at, by name, and why.
    """

    findings: Mapping[str, Finding]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Finding:
        if name in self.findings:
            return self.findings[name]
        if name in self.skipped:
            raise KeyError(f"{name!r} was not looked at: {self.skipped[name]}")
        raise KeyError(f"no finding {name!r}; there are {', '.join(self.findings)}")

    def __contains__(self, name: object) -> bool:
        return name in self.findings

    def __iter__(self) -> Iterator[str]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    @property
    def verdict(self) -> Verdict:
        """The worst of the findings' verdicts."""
        return max((finding.verdict for finding in self.findings.values()), key=VERDICTS.index, default="fine")

    def __repr__(self) -> str:
        counts = ", ".join(
            f"{sum(finding.verdict == verdict for finding in self.findings.values())} {verdict}" for verdict in VERDICTS
        )
        lines = [f"Diagnosis: {self.verdict} ({counts})"]
        lines += [str(finding) for finding in self.findings.values()]
        for name, why in self.skipped.items():
            lines += textwrap.wrap(f"skipped  {name}: {why}", 117, subsequent_indent=" " * 9)
        return "\n".join(lines)


def judged(value: float, look: float, wrong: float) -> Verdict:
    """The verdict "fine" up to ``look``, "look" up to ``wrong``, else (also for NaN) "wrong"."""
    return "fine" if value <= look else "look" if value <= wrong else "wrong"


def _short(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.3g}"
