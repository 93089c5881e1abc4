"""How a broken program is written down, and how plain Pyro is asked about it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.optim import Adam

from pyro_lvm.program import row_keywords

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
"""Twenty rows of three columns."""

COLUMN = X[:, 0].contiguous()

LABELS = torch.arange(20) % 3


@dataclass(frozen=True)
class Mistake:
    """One broken program.

    Attributes:
        model: the model.
        guide: the guide; None for a lone model.
        says: regular expressions that the message matches, in this order: site, number, edit.
        pyro: what plain Pyro 1.9.2 does with it: "silent", "warns" or "raises".
        data: what it is fitted to: a tensor, or a tuple of them.
        elbo: the estimator; None for Trace_ELBO in Pyro and the chosen one here.
        batch_size: rows in a step.
        warned: whether it is a warning here, and not an error.
    """

    model: Callable[..., Any]
    guide: Any
    says: tuple[str, ...]
    pyro: str
    data: Any = field(default_factory=lambda: X)
    elbo: Any = None
    batch_size: int | None = None
    warned: bool = False

    @property
    def message(self) -> re.Pattern[str]:
        """The pieces that the message must have, in their order."""
        return re.compile(".*".join(self.says), re.DOTALL)


BROKEN: dict[str, Callable[[], Mistake]] = {}


def broken(make: Callable[[], Mistake]) -> Callable[[], Mistake]:
    """Enter a broken program into the corpus; the first line of its docstring names the mistake."""
    BROKEN[make.__name__] = make
    return make


def nothing(*args: Any, **kwargs: Any) -> None:
    """A guide without sites."""


def plain_pyro(mistake: Mistake) -> str:
    """What three steps of `pyro.infer.SVI` do: "silent", "warns" or "raises"."""
    args = mistake.data if isinstance(mistake.data, tuple) else (mistake.data,)
    n, rows = len(args[0]), mistake.batch_size or len(args[0])
    model = with_keywords(mistake.model)
    guide = pyro.infer.autoguide.AutoNormal(model) if mistake.guide is None else with_keywords(mistake.guide)
    asked = mistake.elbo or Trace_ELBO()
    elbo = asked() if isinstance(asked, type) else asked
    if isinstance(elbo, TraceEnum_ELBO):
        elbo.max_plate_nesting = 2
    with warnings.catch_warnings(record=True) as caught, pyro.get_param_store().scope():
        warnings.simplefilter("always")
        pyro.set_rng_seed(0)
        try:
            svi = SVI(model, guide, Adam({"lr": 1e-3}), elbo)
            for index in (torch.arange(rows), torch.arange(n - rows, n).flip(0), torch.arange(n - n % rows, n)):
                if len(index):
                    svi.step(*(a[index] for a in args), size=n, index=index)
        except Exception:
            return "raises"
    return "warns" if any(issubclass(w.category, UserWarning) for w in caught) else "silent"


def with_keywords(function: Any) -> Any:
    """A callable that takes `size` and `index` and passes on those that ``function`` names."""
    names = row_keywords(function)

    def call(*args: Any, size: Any = None, index: Any = None) -> Any:
        row = {"size": size, "index": index}
        return function(*args, **{name: value for name, value in row.items() if name in names})

    return call
