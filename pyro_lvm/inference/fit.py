"""The fit: one function in, one frozen record out."""

from __future__ import annotations

import math
import operator
import os
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from pyro.infer import ELBO
from pyro.infer.autoguide import AutoGuide
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from pyro_lvm.capture.graph import choose_level
from pyro_lvm.capture.hardware import require_autocast, require_cuda_graph
from pyro_lvm.data import Rows, as_rows
from pyro_lvm.declaration import first_line
from pyro_lvm.elbo.estimator import Estimator
from pyro_lvm.errors import ProgramWarning
from pyro_lvm.evaluation import fresh_seed, streams
from pyro_lvm.guides import GuideKind
from pyro_lvm.inference.alternate import Alternate, alternation, require_alternate
from pyro_lvm.inference.bound import MeanElbo, mean_elbo
from pyro_lvm.inference.checkpoint import Resume, checkpoints_of, require_same
from pyro_lvm.inference.early_stopping import EarlyStopping
from pyro_lvm.inference.epochs import Order
from pyro_lvm.inference.guard import OnNonFinite, require_on_nonfinite
from pyro_lvm.inference.iterations import surroundings
from pyro_lvm.inference.loop import Loop, Watch
from pyro_lvm.inference.made_with import arguments_of, made_with
from pyro_lvm.inference.optimisation import make_optimizer
from pyro_lvm.inference.prepare import Request, guide_in_words, placed, prepare, reset, resolve
from pyro_lvm.inference.progress import EpochEnd
from pyro_lvm.inference.record import Fit
from pyro_lvm.inference.sites import site_table
from pyro_lvm.missing import marginalizing, require_missing
from pyro_lvm.parameters import Untouched, isolated
from pyro_lvm.preflight.suspicions import suspicions

__all__ = ["fit"]


def fit(
    program: Any,
    data: Any,
    *,
    guide: GuideKind | type[AutoGuide] | Callable[..., Any] | None = None,
    elbo: ELBO | type[ELBO] | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    optimizer: Callable[..., Optimizer] | None = None,
    lr: float | None = None,
    scheduler: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None = None,
    seed: int | None = None,
    validation: Any = None,
    callbacks: Iterable[Callable[[EpochEnd], Any]] = (),
    grad_clip_norm: float | None = None,
    early_stopping: EarlyStopping | bool | None = None,
    check: bool = True,
    fresh: bool = False,
    progress: bool | None = None,
    device: torch.device | str | None = None,
    missing: Literal["marginalize"] | None = None,
    capture: Literal[False, "auto", "graph", "compiled", "cuda_graph"] = "auto",
    autocast: torch.dtype | None = None,
    alternate: Alternate | None = None,
    amortized: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: Resume = "auto",
    on_checkpoint_error: Literal["warn", "raise"] = "warn",
    on_nonfinite: OnNonFinite = "raise",
    size: int | None = None,
) -> Fit:
    r"""Fit a program to data by stochastic variational inference.

    .. math:: \max_{\theta, \phi}\; \sum_{i=1}^n E_{q_\phi(z \mid x_i)}
              \left[\log p_\theta(x_i, z) - \log q_\phi(z \mid x_i)\right]

    Args:
        program: a ``(model, guide)`` tuple, an object with ``.model`` and ``.guide``, or a lone model.
        data: a tensor, array or memmap with a datum in each row; a tuple or dict of them, passed to the program by
            position or by name; a torch `Dataset` (map-style or iterable) or `DataLoader`; a `datasets.folder`. What
            lies on disk is read batch by batch, the next ones while a step runs. A start that looks at the data
            (k-means++, the mean of `PPCA`) sees a sample of those that are not in memory, where all would take more
            than 256 MB or a quarter of the memory that is left.
        guide: takes the place of the program's guide: a callable, a Pyro autoguide class, or one of "mean_field",
            "full_rank", "low_rank", "map". A program without a guide gets "mean_field".
        elbo: any Pyro ELBO, instance or class; the instance is copied, never changed. None chooses (``fit.info``
            says what and why).
        epochs: passes over the data. Either ``epochs`` or ``steps`` must be given.
        steps: gradient steps, instead of epochs.
        batch_size: rows in a step; None for all. The program's data plate must take ``size`` for its scale.
        optimizer: a torch optimiser class or factory; None is Adam.
        lr: its rate; alone, Adam at this constant rate. With neither, one-cycle Adam peaking at 1e-2 (2e-3 where the
            program holds a neural network).
        scheduler: a factory that takes the optimiser; stepped after every step (`ReduceLROnPlateau`: every epoch).
        seed: of initialisation, data order and noise, each with a stream of its own; None for a fresh one, recorded.
        validation: a fraction of the rows to hold out, or data like ``data``.
        callbacks: called after each epoch with an `EpochEnd`; returning True stops. Raising KeyboardInterrupt, like
            pressing Ctrl-C, ends the fit with what it has.
        grad_clip_norm: the largest joint norm of all gradients, of the loss per datum.
        early_stopping: an `EarlyStopping`, or True for its defaults; it looks at the epochs after an estimator's
            schedule has arrived at its end value.
        check: whether to check the pair and the data before the first step, as `check` does by itself.
        fresh: whether to initialise modules again; otherwise they continue from where they are.
        progress: a progress bar; None shows one on a terminal.
        device: where to compute; None is where the data lie.
        missing: "marginalize" takes NaN in floating data for values missing at random and integrates them out of the
            likelihood; guides see the mean of the feature in their place. None makes NaN an error.
        capture: whether to take the step out of Pyro as a plain graph of tensor operations, which gives the same
            numbers sooner: "auto" by the number of steps, "graph", "compiled" (by inductor, within rounding),
            "cuda_graph" (the same, replayed on a GPU), or False for plain Pyro. What cannot be captured goes through
            Pyro; ``fit.info`` says which and why.
        autocast: torch.bfloat16 multiplies matrices in it during the steps; ``fit.elbo`` is evaluated without.
        alternate: variational EM: ``(phi_steps, theta_steps)`` trains the guide's parameters phi and the model's theta
            in turn, that many steps each; "until-converged" passes the turn on when the loss stands still; None
            trains all at once. ``steps`` and ``epochs`` count every step. Theta is every parameter that the model's
            log joint depends on, as autograd finds: a parameter that model and guide share (the mean of `PPCA`)
            counts as theta. Where the guide has nothing to train the E-step is exact already; a program's
            ``solve_guide()`` hook, which sets its guide to the exact posterior, takes the place of the steps of phi.
            ``fit.info["alternate"]`` names both groups and how the E-step is done.
        amortized: False frees a guide that computes its parameters from the data: each datum gets parameters of its
            own, of the same family, which start at what the guide says and belong to the fit: the guide's modules do
            not move. `amortization_gap` reports what that gains. None and True leave the guide as it is.
        checkpoint: a folder for checkpoints, of which the last two are kept. The call, repeated in any process, goes
            on from the last one and ends where the undisturbed fit ends, to the bit. SIGTERM writes one more and
            exits with status 143.
        checkpoint_every: steps from one to the next; None for every epoch, or every hundredth of the run where that
            is longer.
        resume: "auto" goes on from the last checkpoint if there is one; True raises where there is none; False where
            there is one.
        on_checkpoint_error: "warn" trains on where a checkpoint cannot be written (a full disk), "raise" ends the
            fit. A folder that cannot be written to from the beginning is an error before the first step.
        on_nonfinite: what becomes of a step whose loss or gradient is NaN or infinite; it never reaches a parameter.
            "raise" ends the fit with the sites it came from; "skip" leaves the step out and counts it in
            ``history["skipped"]``; "restore" goes back to the last state that was read out, some 50 steps ago or less,
            halves the rate, counts it in ``history["restores"]`` and goes on, at most ten times, or n times with
            ``("restore", n)``.
        size: rows in one walk over a stream (an `IterableDataset` without ``__len__``, or a `DataLoader` over one). A
            stream that gives fewer or more is an error at the end of the epoch.

    Returns:
        A `Fit`. Modules are trained in place; the record keeps a snapshot of its own.

    Raises:
        ProgramError: if model, guide and estimator do not belong together (before any step).
        ValueError: if the data do not fit the program, or an argument is out of range (before any step).
        TypeError: if an argument is of another kind than described (before any step). After each of these the modules
            are as they were.
        NonFiniteError: if the loss, a gradient or a parameter became NaN or infinite, naming the step, the sites and
            their arguments; the parameters are those of the last finite step.
        StorageError: if the folder of checkpoints is another fit's, or cannot be used.

    Warns:
        ProgramWarning: if the program may mean what it says, but seldom does (before any step); if a checkpoint was
            written with other versions of libraries; if the bound cannot be evaluated after the last step (memory is
            too small, a file is gone): what was trained is returned all the same, with ``elbo`` NaN.
        RuntimeWarning: if a checkpoint cannot be written, or the last one is damaged and the one before it is used.

    Units: ``fit.elbo`` and the parts in ``fit.history`` are nats per datum; ``history["loss"]`` is nats of the whole
    data set.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> fit = lvm.fit(lvm.PPCA(num_features=3, latent_dim=1), x, steps=20, seed=0)
        >>> len(fit.history["elbo"])
        20
    """
    given = dict(locals())
    started = time.perf_counter()
    _require_one_length(epochs, steps)
    counts = {"epochs": epochs, "steps": steps, "batch_size": batch_size, "size": size}
    for name, count in {**counts, "checkpoint_every": checkpoint_every}.items():
        _require_positive(name, count, whole=True)
    _require_positive("grad_clip_norm", grad_clip_norm)
    watching = _callbacks(callbacks)
    alternate = require_alternate(alternate)
    guarded = require_on_nonfinite(on_nonfinite)
    if amortized not in (None, True, False):
        raise TypeError(f"amortized is {amortized!r}: it must be True, False or None")
    resolved, recipe = resolve(program, guide)
    checkpoints = checkpoints_of(checkpoint, checkpoint_every, resume, on_checkpoint_error)
    found = None if checkpoints is None else checkpoints.latest()
    if seed is None:
        seed = fresh_seed() if found is None else found["made"]["seed"]
    initialisation, ordering, noise, evaluation = streams(seed)
    rows, held_out = _rows(data, validation, batch_size, ordering, require_missing(missing), size)
    stopping = _stopping(early_stopping, held_out)
    untouched = Untouched(resolved.modules.values())
    try:
        with isolated(initialisation, validate=check):
            rows, held_out, cast = placed(resolved, rows, held_out, device)
            if missing is not None:
                resolved = marginalizing(resolved, rows, held_out)
            if fresh:
                reset(resolved.modules.values())
            request = Request(resolved, rows, held_out, recipe, elbo, batch_size, initialisation, check, fresh)
            request = replace(request, amortized=amortized is not False)
            prepared = prepare(request, untouched, cast)
            for doubt in suspicions(prepared.bound, prepared.structure, request.first()) if check else ():
                warnings.warn(doubt, ProgramWarning, stacklevel=2)
            _require_arrival(stopping, prepared.estimator)
            order = Order(rows, batch_size, prepared.strata, ordering)
            total_steps = steps if steps is not None else (epochs or 0) * order.steps_per_epoch
            level = choose_level(capture, total_steps)
            require_cuda_graph(capture, rows.device)
            require_autocast(autocast, rows.device)
            turns = alternation(alternate, prepared, request.first(), len(rows))
            parameters = list(prepared.bound.trainable().values())
            parameters += [p for module in prepared.estimator.modules for p in module.parameters()]
            torch_optimizer, schedule, described = make_optimizer(
                parameters,
                optimizer=optimizer,
                scheduler=scheduler,
                lr=lr,
                total_steps=total_steps,
                has_network=prepared.bound.has_network(),
            )
            loop = Loop(
                prepared,
                order,
                torch_optimizer,
                schedule,
                parameters,
                grad_clip_norm,
                total_steps,
                level,
                autocast,
                turns,
                guarded,
            )
            if checkpoints is not None:
                made = made_with(
                    loop,
                    held_out,
                    program=resolved.name,
                    guide=guide_in_words(recipe, resolved.guide, amortized),
                    seed=seed,
                    batch_size=batch_size,
                    optimizer=described,
                    grad_clip_norm=grad_clip_norm,
                    early_stopping=stopping,
                    capture=capture,
                    autocast=autocast,
                    missing=missing,
                    on_nonfinite=on_nonfinite,
                )
                if found is not None:
                    require_same(checkpoints.folder, found["made"], made)
                    loop.load_state(found)
                checkpoints.begin(made, total_steps, order.steps_per_epoch)
    except BaseException:
        untouched.restore()
        raise
    del untouched
    watch = Watch(watching, stopping, held_out, evaluation, progress)
    with isolated(noise, validate=False):
        with checkpoints.held() if checkpoints is not None else nullcontext():
            stopped = loop.run(watch, checkpoints)
        if turns is not None:
            turns.finish()
        try:
            refused = level[0] != "eager" and loop.step.level == "eager"
            captured = capture is not False and not refused
            evaluated = mean_elbo(prepared.bound, prepared.structure, rows, batch_size, evaluation, capture=captured)
        except (Exception, KeyboardInterrupt) as error:  # what was trained for hours outlives the look at it
            evaluated = MeanElbo(math.nan, math.nan, 0)
            warnings.warn(
                "the fit is trained, but its bound could not be evaluated on the data, and fit.elbo is nan: "
                f"{type(error).__name__}: {first_line(error)}. Ask lvm.log_evidence(fit, rows) with fewer rows",
                ProgramWarning,
                stacklevel=2,
            )
    if found is not None and loop.step.level != found["level"][0]:
        warnings.warn(
            f"the fit went on at level {loop.step.level!r} ({loop.step.reason}) from a checkpoint of level "
            f"{found['level'][0]!r}: it ends in other digits than the undisturbed one",
            ProgramWarning,
            stacklevel=2,
        )
    info = {
        "program": resolved.name,
        "guide": guide_in_words(recipe, resolved.guide, amortized),
        "estimator": repr(prepared.estimator),
        "estimator_reason": prepared.estimator.reason,
        "capture": loop.step.level,
        "capture_reason": loop.step.reason,
        "missing": missing,
        "autocast": None if autocast is None else str(autocast),
        "optimizer": described,
        "alternate": None if turns is None else turns.described,
        "seed": seed,
        "n": len(rows),
        "batch_size": batch_size,
        "epochs": loop.history.epochs,
        "steps": loop.steps_done,
        "seconds": time.perf_counter() - started,
        "stopped": stopped,
        "restores": loop.guard.restores,
        "checkpoint": None if checkpoints is None else str(checkpoints.folder),
        "resumed_at": None if found is None else found["steps"],
        "elbo_se": evaluated.standard_error,
        "elbo_passes": evaluated.passes,
    }
    info |= arguments_of(given, seed) | surroundings(rows, cast)
    return Fit(
        program=program,
        params=prepared.bound.constrained(),
        history=loop.history.columns,
        elbo=evaluated.elbo,
        info=info,
        sites=site_table(prepared.structure),
        _bound=prepared.bound,
        _snapshot=prepared.bound.snapshot(),
    )


def _require_one_length(epochs: int | None, steps: int | None) -> None:
    if (epochs is None) == (steps is None):
        given = "neither" if epochs is None else "both"
        raise ValueError(f"say how long to train with either epochs=... or steps=...; {given} was given")


def _require_positive(name: str, value: float | None, *, whole: bool = False) -> None:
    if value is None:
        return
    if whole:
        try:
            operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"{name} is {value!r}: it must be a whole number") from None
    if not value > 0:
        raise ValueError(f"{name} is {value}: it must be positive")


def _callbacks(callbacks: Any) -> tuple[Callable[[EpochEnd], Any], ...]:
    if callable(callbacks) or not isinstance(callbacks, Iterable):
        raise TypeError(f"callbacks must be a sequence of functions, such as [function]; got {callbacks!r}")
    listed = tuple(callbacks)
    for callback in listed:
        if not callable(callback):
            raise TypeError(f"callbacks must be functions of an EpochEnd; {callback!r} cannot be called")
    return listed


def _rows(
    data: Any, validation: Any, batch_size: int | None, seed: int, missing: bool, size: int | None
) -> tuple[Rows, Rows | None]:
    """The rows to train on, and those held out."""
    rows = as_rows(data, missing=missing, size=size, batch_size=batch_size)
    if isinstance(data, DataLoader) and batch_size is not None:
        raise ValueError(f"batch_size={batch_size} says nothing to a DataLoader, which makes its own batches: drop it")
    if validation is None:
        return rows, None
    if isinstance(validation, int | float):
        return rows.split(float(validation), torch.Generator().manual_seed(seed))
    return rows, as_rows(validation, "validation", missing=missing)


def _stopping(early_stopping: EarlyStopping | bool | None, held_out: Rows | None) -> EarlyStopping | None:
    if early_stopping is None or early_stopping is False:
        return None
    rule = EarlyStopping() if early_stopping is True else early_stopping
    if not isinstance(rule, EarlyStopping):
        raise TypeError(f"early_stopping must be True or an EarlyStopping(...); got {rule!r}")
    if rule.monitor == "validation_elbo" and held_out is None:
        raise ValueError("early_stopping monitors 'validation_elbo', but there is no validation data: pass validation=")
    if rule.monitor == "auto":
        rule = replace(rule, monitor="elbo" if held_out is None else "validation_elbo")
    return rule


def _require_arrival(stopping: EarlyStopping | None, estimator: Estimator) -> None:
    if stopping is not None and estimator.arrival >= 1.0:
        raise ValueError(
            f"early_stopping waits until {estimator!r} has arrived at what it ends with, which is at the last step: "
            "let the schedule arrive before the end (until=0.5), or drop early_stopping"
        )
