"""The conformance kit: the laws that every program obeys, to be run in your own test suite.

`check_program` raises `pyro_lvm.ProgramError` where a program breaks a law, and else returns a `Conformance` that says
of every law what was measured, or why there was nothing to measure.
"""

from __future__ import annotations

from pyro_lvm.testing.kit import check_program
from pyro_lvm.testing.record import Conformance, Law

__all__ = ["Conformance", "Law", "check_program"]
