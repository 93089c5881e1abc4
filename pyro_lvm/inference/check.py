"""The pre-flight by itself: everything that `fit` looks at before its first step, and a report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.infer import ELBO
from pyro.infer.autoguide import AutoGuide

from pyro_lvm.data import as_rows
from pyro_lvm.guides import GuideKind
from pyro_lvm.inference.prepare import Request, placed, prepare, resolve
from pyro_lvm.parameters import Untouched, isolated
from pyro_lvm.preflight.pair import dependencies
from pyro_lvm.preflight.report import Report, make_report
from pyro_lvm.preflight.suspicions import suspicions

__all__ = ["check"]


def check(
    program: Any,
    data: Any,
    elbo: ELBO | type[ELBO] | None = None,
    *,
    guide: GuideKind | type[AutoGuide] | Callable[..., Any] | None = None,
    batch_size: int | None = None,
) -> Report:
    """Look at a program before it is fitted, as `fit` does by itself.

    Guide and model run on the first rows, without gradients and under a random state of their own; nothing moves.

    Args:
        program: as for `fit`.
        data: as for `fit`.
        elbo: as for `fit`; None chooses, and the report says what and why.
        guide: as for `fit`.
        batch_size: as for `fit`: whether the program scales its plates is seen only where it gets a part of the rows.

    Returns:
        A `Report`: a table of the sites (declaration, plates, shapes, support, enumeration, scale, guide, KL). What
        may be meant but seldom is stands in its ``warnings``; `fit` gives them as `ProgramWarning`.

    Raises:
        ProgramError: if the program cannot mean what its author meant: names the site, its line, the numbers, and one
            edit.
        ValueError: if the data hold NaN, infinite values, or no rows.
        TypeError: if program or data are of another kind than `fit` takes.

    Not seen: a wrong model that is a consistent program; control flow that the first rows do not take; parts of the
    data that a `DataLoader` gives later.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> report = lvm.check(lvm.PPCA(num_features=3, latent_dim=1), x, batch_size=20)
        >>> [(site.name, site.role, site.scale, site.kl) for site in report.sites]
        [('z', 'latent', '5', 'closed form'), ('x', 'observed', '5', '')]
        >>> print(report.diagram())
        ┌─ data: 20 of 100 ──────────┐
        │ z ~ Normal                 │
        │ x | z ~ Normal  (observed) │
        └────────────────────────────┘
    """
    resolved, recipe = resolve(program, guide)
    untouched = Untouched(resolved.modules.values())
    try:
        with isolated(0, validate=True):
            rows, _, cast = placed(resolved, as_rows(data), None, None)
            request = Request(resolved, rows, None, recipe, elbo, batch_size, 0, True, False)
            prepared = prepare(request, untouched, cast)
            bound, structure, batch = prepared.bound, prepared.structure, request.first()
            found = suspicions(bound, structure, batch)
            of_model, _ = dependencies(bound, structure, batch)
            return make_report(structure, prepared.estimator, batch, of_model, tuple(found))
    finally:
        untouched.restore()
