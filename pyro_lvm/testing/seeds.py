"""One seed, one result: evaluations and fits repeat to the bit, and leave the process's generators alone."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_lvm.capture.graph import choose_level
from pyro_lvm.errors import NonFiniteError
from pyro_lvm.inference.epochs import Order
from pyro_lvm.inference.loop import Loop, Watch
from pyro_lvm.inference.optimisation import make_optimizer
from pyro_lvm.inference.prepare import Prepared
from pyro_lvm.parameters import isolated
from pyro_lvm.testing.record import Law, broken, holds, running
from pyro_lvm.testing.setting import Setting

__all__ = ["repeats", "seeds"]

STEPS = 2
"""Steps of the fits that are compared: the second starts from what the first left behind."""

_GENERATORS: dict[str, Callable[[], bytes]] = {
    "Python's random": lambda: pickle.dumps(random.getstate()),
    "NumPy's global": lambda: pickle.dumps(np.random.get_state()),  # noqa: NPY002
    "torch's global": lambda: torch.get_rng_state().numpy().tobytes(),
}

_FROM_PYRO = (
    "draw with pyro.sample or torch's global generator, which the caller seeds, and keep what changes from call to "
    "call in a module's buffers"
)

_FINITE = "keep what is divided by, or taken the logarithm of, away from nought, for example x / (scale + 1e-6)"


@dataclass(frozen=True)
class _Outcome:
    """What a short fit leaves: per-epoch columns and parameters, and the generators that it moved."""

    history: Mapping[str, Any]
    parameters: Mapping[str, Tensor]
    moved: tuple[str, ...]


def repeats(at: Setting) -> None:
    """Raise where one evaluation under one seed has two results, which would make every other law noise."""
    losses, ends = [], []
    for seed in (at.seed, at.seed, at.seed + 1):
        with running("seeds", "the loss of all rows", _FROM_PYRO), at.measuring(seed):
            losses.append(at.loss(at.whole, {})[0])
            ends.append(torch.get_rng_state())
    if losses[0] != losses[1]:
        raise broken(
            "seeds",
            f"two evaluations from one random state have the losses {losses[0]:.10g} and {losses[1]:.10g} nats",
            _FROM_PYRO,
        )
    if torch.equal(ends[0], ends[2]):
        raise broken(
            "seeds",
            f"from the seeds {at.seed} and {at.seed + 1} torch's generator ends in one and the same state: the program "
            "seeds it, and every step has the same noise",
            "drop torch.manual_seed or pyro.set_rng_seed from model and guide, and pass seed= to fit",
        )


def seeds(prepare_anew: Callable[[], Prepared], settle: Callable[[], Any], seed: int, batch_size: int | None) -> Law:
    """Two short fits from one start under one seed.

    Args:
        prepare_anew: puts the modules back and makes the program ready, from the start.
        settle: the rows to fit, cast and placed; called after ``prepare_anew``.
        seed: of noise and order.
        batch_size: rows in a step.
    """
    with running("seeds", f"a fit of {STEPS} steps", "see what changes in the program from its first to its next call"):
        one, other = (_short_fit(prepare_anew(), settle(), seed, batch_size) for _ in range(2))
    if one.moved:
        raise broken(
            "seeds", f"a fit of {STEPS} steps moves the process's random state ({', '.join(one.moved)})", _FROM_PYRO
        )
    for name, values in one.history.items():
        pairs = values if isinstance(values, Mapping) else {"": values}
        again = other.history[name] if isinstance(values, Mapping) else {"": other.history[name]}
        for site, column in pairs.items():
            if list(column) != list(again.get(site, ())):
                where = f"history[{name!r}]" + (f"[{site!r}]" if site else "")
                raise broken(
                    "seeds",
                    f"two fits of {STEPS} steps with seed {seed} from one start have {where} {list(column)} and "
                    f"{list(again.get(site, ()))}",
                    _FROM_PYRO,
                )
    for name, value in one.parameters.items():
        if not torch.equal(value, other.parameters[name]):
            furthest = float((value.double() - other.parameters[name].double()).abs().max())
            raise broken(
                "seeds",
                f"two fits of {STEPS} steps with seed {seed} from one start end with values of {name!r} that are up to "
                f"{furthest:.3g} apart",
                _FROM_PYRO,
            )
    return holds("seeds", f"two fits of {STEPS} steps are equal to the bit; the process's generators stay", 0.0, 0.0)


def _short_fit(prepared: Prepared, rows: Any, seed: int, batch_size: int | None) -> _Outcome:
    """What `fit` does, without the evaluation at its end, which takes as long as it takes."""
    bound = prepared.bound
    before = {name: state() for name, state in _GENERATORS.items()}
    order = Order(rows, batch_size, prepared.strata, seed)
    parameters = list(bound.trainable().values())
    optimizer, schedule, _ = make_optimizer(
        parameters, optimizer=None, scheduler=None, lr=1e-3, total_steps=STEPS, has_network=bound.has_network()
    )
    loop = Loop(prepared, order, optimizer, schedule, parameters, None, STEPS, choose_level(False, STEPS))
    try:
        with isolated(seed, validate=False):
            loop.run(Watch((), None, None, seed, False))
    except NonFiniteError as error:
        raise broken("seeds", f"a fit of {STEPS} steps at the rate 1e-3 ends: {error}", _FINITE) from error
    moved = tuple(name for name, state in _GENERATORS.items() if state() != before[name])
    return _Outcome(loop.history.columns, bound.snapshot(), moved)
