"""The conformance kit: a program measured against every law."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyro.infer import ELBO, RenyiELBO
from pyro.infer.autoguide import AutoGuide

from pyro_lvm.data import Rows, as_rows
from pyro_lvm.guides import GuideKind
from pyro_lvm.inference.check import check
from pyro_lvm.inference.prepare import Prepared, Request, placed, prepare, resolve
from pyro_lvm.parameters import Untouched, isolated
from pyro_lvm.preflight.report import Report
from pyro_lvm.program import Program
from pyro_lvm.testing.enumeration import enumeration
from pyro_lvm.testing.laws import batch_rows, batch_scale, gradients, prior_draws, row_order
from pyro_lvm.testing.record import Conformance, Law, holds, running
from pyro_lvm.testing.seeds import repeats, seeds
from pyro_lvm.testing.setting import Setting, generators_stay, make_setting

__all__ = ["check_program"]


def check_program(
    program: Any,
    data: Any,
    elbo: ELBO | type[ELBO] | None = None,
    *,
    guide: GuideKind | type[AutoGuide] | Callable[..., Any] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Conformance:
    r"""Measure a program against the laws that every program obeys; for your own test suite.

    .. math:: \sum_b \frac{B_b}{n} L_b = L, \qquad L_{\pi(x)} = L_x, \qquad
              L_{\text{enumerated}} = -\sum_i \log \sum_k p(x_i, k), \qquad |\nabla L| < \infty

    with L the plain loss of all n rows (nats of the whole data set), L_b that of a batch of B_b rows, and one draw of
    the guide held in all of them. The laws:

    - **pre-flight**: `pyro_lvm.check` passes; its warnings stand in the report.
    - **gradients**: loss and gradients of a first step, under the estimator that was asked for, are finite. Parameters
      without a gradient, or with one of noughts, are named.
    - **prior draws**: the model without data has the same sites and shapes, with as many rows as asked for.
    - **rows**: in another order the rows have the same loss.
    - **batch scale**: batches have the full loss for their weighted mean.
    - **enumeration**: what enumeration sums out is what a loop over the values sums, up to 64 assignments.
    - **seeds**: two fits of two steps under one seed are equal to the bit, and Python's, NumPy's and torch's global
      generators stay where they were.

    The laws about the loss are measured in eval mode, with every parameter moved a little from its start, where zeros
    and symmetries would hide what depends on what. Modules are as they were afterwards, and nothing is left in Pyro's
    parameter store.

    Args:
        program: as for `fit`.
        data: as for `fit`, but no `DataLoader`. Some dozens of rows tell as much as many; float64 tells most: relative
            differences above 1e-8 are then no rounding (1.2e-5 for float32).
        elbo: as for `fit`; of pre-flight, gradients and seeds. The other laws are those of the plain bound.
        guide: as for `fit`.
        batch_size: as for `fit`; None takes all rows in a step, and two fifths of them in a batch of the batch law.
        seed: of everything random.

    Returns:
        A `Conformance`: what was measured of each law; of one that does not apply, why.

    Raises:
        ProgramError: if a law is broken: which, the numbers on both sides, and one edit.
        TypeError: if data are a `DataLoader`, or program or data of another kind than `fit` takes.
        ValueError: if the data do not fit the program.

    Not seen: a wrong model that is a consistent program; what layers do in training mode alone (dropout, batch
    normalisation, which does mix rows); faults smaller than the tolerance.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> mixture = lvm.GaussianMixture(num_components=2, num_features=2)
        >>> conformance = lvm.testing.check_program(mixture, x)
        >>> for law in conformance.laws:
        ...     print(f"{law.name}: {law.outcome} ({law.reason})")
        pre-flight: holds (2 sites, no warnings)
        gradients: holds (3 parameters under TraceEnum_ELBO())
        prior draws: holds (component, x with 3 and 7 rows (x=None, size=m))
        rows: holds (19 of 20 rows in another order)
        batch scale: holds (20 rows in batches of 8, 8, 4)
        enumeration: holds ('component': 2 assignments summed by hand)
        seeds: holds (two fits of 2 steps are equal to the bit; the process's generators stay)
    """
    rows = as_rows(data)
    if rows.loader is not None:
        raise TypeError(
            "data is a DataLoader, which cannot be asked for the same rows twice: pass its dataset, or the arrays"
        )
    with generators_stay():
        report = check(program, rows, elbo, guide=guide, batch_size=batch_size)
        resolved, recipe = resolve(program, guide)
        trial = _Trial(resolved, rows, recipe, elbo, batch_size, seed, Untouched(resolved.modules.values()))
        try:
            setting = trial.setting()
            laws = [_preflight(report), gradients(setting, trial.step_rows)]
            repeats(setting)
            rows_at_once, reason = batch_rows(setting, batch_size)
            if reason is None and trial.step_rows is None:
                what = f"the pre-flight in batches of {rows_at_once} of {len(rows)} rows"
                edit = "a model that names `size` takes rows in batches: make it do so, or drop `size`"
                kind = elbo if inspect.isclass(elbo) else type(elbo)
                # this one refuses batches whatever the program, and the law is that of the plain bound
                in_batches = None if issubclass(kind, RenyiELBO) else elbo
                with running("batch scale", what, edit):
                    check(program, rows, in_batches, guide=guide, batch_size=rows_at_once)
            laws += [prior_draws(setting), row_order(setting), batch_scale(setting, batch_size), enumeration(setting)]
            laws.append(seeds(trial.start, trial.placed_rows, seed, trial.step_rows))
        finally:
            trial.untouched.restore()
    return Conformance(resolved.name, tuple(laws), report)


def _preflight(report: Report) -> Law:
    warnings = "; ".join(report.warnings) or "no warnings"
    return holds("pre-flight", f"{len(report.sites)} sites, {warnings}")


@dataclass
class _Trial:
    """A program that is started several times from the same start."""

    program: Program
    rows: Rows
    recipe: Any
    elbo: ELBO | type[ELBO] | None
    batch_size: int | None
    seed: int
    untouched: Untouched

    @property
    def step_rows(self) -> int | None:
        """Rows in a step; None for all."""
        part = self.batch_size is not None and self.batch_size < len(self.rows)
        return self.batch_size if part else None

    def setting(self) -> Setting:
        """The program at a point to measure at."""
        return make_setting(self.start(), self.placed_rows(), self.seed)

    def start(self) -> Prepared:
        """Put the modules back, and make the program ready as a fit does."""
        self.untouched.restore()
        with isolated(self.seed, validate=True):
            rows, _, cast = placed(self.program, self.rows, None, None)
            request = Request(self.program, rows, None, self.recipe, self.elbo, self.step_rows, self.seed, False, False)
            return prepare(request, self.untouched, cast)

    def placed_rows(self) -> Rows:
        """The rows, cast and placed like the modules."""
        return placed(self.program, self.rows, None, None)[0]
