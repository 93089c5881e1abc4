"""The SVI loop: one function in, one frozen record out."""

from __future__ import annotations

import inspect
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_lvm.check import check_pair, check_support, traced
from pyro_lvm.data import Batch, Rows, as_rows
from pyro_lvm.elbo.estimator import Estimator, make_estimator
from pyro_lvm.errors import NonFiniteError, ProgramError
from pyro_lvm.evaluation import batch_to_trace, fresh_seed
from pyro_lvm.guides import GuideKind, is_recipe, make_guide
from pyro_lvm.inference.bound import mean_elbo, validation_elbo
from pyro_lvm.inference.early_stopping import EarlyStopping
from pyro_lvm.inference.epochs import Order, strata_of
from pyro_lvm.inference.history import HistoryRecorder
from pyro_lvm.inference.optimisation import make_optimizer
from pyro_lvm.inference.progress import EpochEnd, Progress
from pyro_lvm.inference.record import Fit
from pyro_lvm.parameters import BoundProgram, isolated
from pyro_lvm.program import Program, as_program, floating_dtype, restore_mode, training_mode
from pyro_lvm.structure import Structure

__all__ = ["fit"]

STEPS_BETWEEN_READOUTS = 50
"""Losses stay on the device for about so many steps; each read-out also keeps the parameters to fall back on."""


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
) -> Fit:
    r"""Fit a program to data by stochastic variational inference.

    .. math:: \max_{\theta, \phi}\; \sum_{i=1}^n E_{q_\phi(z \mid x_i)}
              \left[\log p_\theta(x_i, z) - \log q_\phi(z \mid x_i)\right]

    Args:
        program: a ``(model, guide)`` tuple, an object with ``.model`` and ``.guide``, or a lone model.
        data: a tensor, array or memmap with a datum in each row; a tuple or dict of them, passed to the program by
            position or by name; a torch `Dataset` or `DataLoader`.
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
        scheduler: a factory that takes the optimiser; stepped after every step.
        seed: of initialisation, data order and noise, each with a stream of its own; None for a fresh one, recorded.
        validation: a fraction of the rows to hold out, or data like ``data``.
        callbacks: called after each epoch with an `EpochEnd`; returning True stops.
        grad_clip_norm: the largest joint norm of all gradients, of the loss per datum.
        early_stopping: an `EarlyStopping`, or True for its defaults.
        check: whether to check the pair and the data before the first step.
        fresh: whether to initialise modules again; otherwise they continue from where they are.
        progress: a progress bar; None shows one on a terminal.
        device: where to compute; None is where the data lie.

    Returns:
        A `Fit`. Modules are trained in place; the record keeps a snapshot of its own.

    Raises:
        ProgramError: if model, guide and estimator do not belong together (before any step).
        ValueError: if the data do not fit the program, or an argument is out of range (before any step).
        NonFiniteError: if the loss became NaN or infinite; the last finite parameters are restored.

    Units: ``fit.elbo`` and the parts in ``fit.history`` are nats per datum; ``history["loss"]`` is nats of the whole
    data set.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> fit = lvm.fit(lvm.PPCA(num_features=3, latent_dim=1), x, steps=20, seed=0)
        >>> len(fit.history["elbo"])
        20
    """
    started = time.perf_counter()
    total_steps_or_epochs(epochs, steps)
    _check_positive("batch_size", batch_size)
    _check_positive("grad_clip_norm", grad_clip_norm)
    recipe = guide if is_recipe(guide) else None
    resolved = as_program(program, None if recipe is not None else guide)  # type: ignore[arg-type]
    if recipe is not None:
        resolved = replace(resolved, guide=None, modules=dict(resolved.modules))
    seed = fresh_seed() if seed is None else seed
    seeds = dict(zip(("initialisation", "order", "noise", "evaluation"), _streams(seed), strict=True))
    rows = as_rows(data)
    held_out: Rows | None = None
    if isinstance(validation, float):
        rows, held_out = rows.split(validation, torch.Generator().manual_seed(seeds["order"]))
    elif validation is not None:
        held_out = as_rows(validation, "validation")
    rows, held_out, cast = _placed(resolved, rows, held_out, device)
    with isolated(seeds["initialisation"], validate=check):
        if fresh:
            _reset(resolved)
        prepared = _prepare(resolved, rows, recipe, elbo, batch_size, seeds["initialisation"], check)
    order = Order(rows, batch_size, strata_of(resolved, rows, batch_size), seeds["order"])
    total_steps = steps if steps is not None else (epochs or 0) * order.steps_per_epoch
    parameters = prepared.bound.trainable()
    torch_optimizer, schedule, described = make_optimizer(
        parameters.values(),
        optimizer=optimizer,
        scheduler=scheduler,
        lr=lr,
        total_steps=total_steps,
        has_network=resolved.has_network(),
    )
    loop = _Loop(prepared, order, torch_optimizer, schedule, list(parameters.values()), grad_clip_norm, total_steps)
    watch = _Watch(callbacks, _stopping(early_stopping, held_out), held_out, seeds["evaluation"], progress)
    with isolated(seeds["noise"], validate=False):
        stopped = loop.run(watch)
        evaluated = mean_elbo(prepared.bound, prepared.structure, rows, batch_size, seeds["evaluation"])
    info = {
        "program": resolved.name,
        "guide": recipe or ("mean_field" if resolved.guide is None else "given"),
        "estimator": repr(prepared.estimator),
        "estimator_reason": prepared.estimator.reason,
        "optimizer": described,
        "seed": seed,
        "n": len(rows),
        "batch_size": batch_size,
        "epochs": loop.history.epochs,
        "steps": loop.steps_done,
        "seconds": time.perf_counter() - started,
        "stopped": stopped,
        "elbo_se": evaluated.standard_error,
        "elbo_passes": evaluated.passes,
        "cast": cast,
        "dtype": str(rows.dtype),
        "device": str(rows.device),
        "versions": {name: version(name) for name in ("torch", "pyro-ppl")} | {"python": platform.python_version()},
    }
    return Fit(
        program=program,
        params=prepared.bound.constrained(),
        history=loop.history.columns,
        elbo=evaluated.elbo,
        info=info,
        _bound=prepared.bound,
        _snapshot=prepared.bound.snapshot(),
    )


def total_steps_or_epochs(epochs: int | None, steps: int | None) -> None:
    """Raise unless exactly one of the two says how long to train."""
    if (epochs is None) == (steps is None):
        given = "neither" if epochs is None else "both"
        raise ValueError(f"say how long to train with either epochs=... or steps=...; {given} was given")
    _check_positive("epochs", epochs)
    _check_positive("steps", steps)


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"{name} is {value}: it must be positive")


def _streams(seed: int) -> list[int]:
    """Independent seeds for initialisation, order, noise and evaluation."""
    generator = torch.Generator().manual_seed(seed)
    return [int(s) for s in torch.randint(2**31, (4,), generator=generator)]


def _stopping(early_stopping: EarlyStopping | bool | None, held_out: Rows | None) -> EarlyStopping | None:
    if not early_stopping:
        return None
    rule = EarlyStopping() if early_stopping is True else early_stopping
    if rule.monitor == "validation_elbo" and held_out is None:
        raise ValueError("early_stopping monitors 'validation_elbo', but there is no validation data: pass validation=")
    if rule.monitor == "auto":
        rule = replace(rule, monitor="elbo" if held_out is None else "validation_elbo")
    return rule


def _placed(
    program: Program, rows: Rows, held_out: Rows | None, device: torch.device | str | None
) -> tuple[Rows, Rows | None, str | None]:
    """Send modules and rows to one device and one floating dtype, the data's; say what was cast."""
    sample = rows.first(1).tensors().values()
    tensors = [value for value in sample if isinstance(value, Tensor)]
    dtype = floating_dtype(tensors)
    place = torch.device(device) if device is not None else tensors[0].device if tensors else torch.device("cpu")
    cast = None
    for module in program.modules.values():
        before = floating_dtype(module.parameters())
        module.to(device=place, dtype=dtype)
        if dtype is not None and before not in (None, dtype):
            cast = f"parameters {before} -> {dtype}"
    rows = replace(rows, dtype=dtype, device=place)
    return rows, None if held_out is None else replace(held_out, dtype=dtype, device=place), cast


def _reset(program: Program) -> None:
    for module in program.modules.values():
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
            continue
        reset: set[int] = set()
        for inner in module.modules():
            if callable(getattr(inner, "reset_parameters", None)):
                inner.reset_parameters()
                reset |= {id(parameter) for parameter in inner.parameters()}
        left = [name for name, parameter in nn.Module.named_parameters(module) if id(parameter) not in reset]
        if left:
            raise ValueError(
                f"fresh=True cannot initialise {', '.join(left)} of {type(module).__name__} again: give the module a "
                "reset_parameters() method, or make a new one"
            )


@dataclass(frozen=True)
class _Prepared:
    """All that the loop needs, checked."""

    bound: BoundProgram
    structure: Structure
    estimator: Estimator
    auxiliary_loss: Callable[..., Tensor] | None


def _prepare(
    program: Program,
    rows: Rows,
    recipe: Any,
    elbo: ELBO | type[ELBO] | None,
    batch_size: int | None,
    seed: int,
    check: bool,
) -> _Prepared:
    """Trace, check, initialise and build a guide where there is none; nothing has moved if it raises."""
    minibatches = rows.loader is not None or (batch_size is not None and batch_size < len(rows))
    if minibatches and not program.names("size"):
        raise ProgramError(
            f"{program.name} is to be fitted {batch_size or 'some'} rows at a time out of {len(rows)}, but its signature "
            'does not name `size`, by which its plate is scaled: write model(x, size=None) and pyro.plate("data", '
            "size or len(x), subsample=x)"
        )
    first = rows.first(batch_size if minibatches and batch_size else batch_to_trace(program, rows))
    untouched = {name: m.state_dict() for name, m in program.modules.items()}
    before = {name: {k: v.clone() for k, v in state.items()} for name, state in untouched.items()}
    try:
        bound, structure = _bind(program, rows, first, recipe, minibatches, seed)
        estimator = make_estimator(elbo, structure)
        if check:
            check_pair(structure, estimator, first)
            check_support(structure, first, rows, batch_size or len(rows))
        if program.guide is not None and recipe is None:
            _initialize(program, rows, seed)
        if not bound.trainable():
            raise ProgramError(
                f"{program.name} has no parameter to train: declare one with pyro.param, or pass the module that holds "
                "them as the program (or register it with pyro.module)"
            )
    except Exception:
        for name, state in before.items():
            program.modules[name].load_state_dict(state)
        raise
    return _Prepared(bound, structure, estimator, _auxiliary(program))


def _bind(
    program: Program, rows: Rows, first: Batch, recipe: Any, minibatches: bool, seed: int
) -> tuple[BoundProgram, Structure]:
    dtype, device = rows.dtype, rows.device
    if program.guide is not None and recipe is None:
        bound = BoundProgram(program, None, dtype, device)
        return bound, traced(bound.model, bound.guide, first)
    alone = BoundProgram(program.with_guide(lambda *args, **kwargs: None), None, dtype, device)
    model_only = traced(alone.model, None, first)
    _initialize(program, rows, seed)
    start = program.hook("initial_values")

    def build(model: Callable[..., Any]) -> Callable[..., Any]:
        return make_guide(
            model,
            model_only,
            recipe or "mean_field",
            names_index=program.names("index"),
            minibatches=minibatches,
            start=start() if start is not None else None,
        )

    bound = BoundProgram(program, build, dtype, device)
    return bound, traced(bound.model, bound.guide, first)


def _initialize(program: Program, rows: Rows, seed: int) -> None:
    hook = program.hook("initialize")
    if hook is not None:
        batch = rows.whole()
        hook(*batch.args, **batch.kwargs, seed=seed)


def _auxiliary(program: Program) -> Callable[..., Tensor] | None:
    hook = program.hook("auxiliary_loss")
    if hook is None:
        return None
    named = frozenset(inspect.signature(hook).parameters)

    def loss(batch: Batch) -> Tensor:
        keywords = {k: v for k, v in batch.named().items() if k in batch.kwargs or k in named}
        value: Tensor = hook(*batch.args, **keywords)
        return value

    return loss


@dataclass(frozen=True)
class _Watch:
    """Who looks on while the loop runs."""

    callbacks: Iterable[Callable[[EpochEnd], Any]]
    stopping: EarlyStopping | None
    held_out: Rows | None
    seed: int
    progress: bool | None


class _Loop:
    """Steps, epoch after epoch."""

    def __init__(
        self,
        prepared: _Prepared,
        order: Order,
        optimizer: Optimizer,
        schedule: LRScheduler | ReduceLROnPlateau | None,
        parameters: list[nn.Parameter],
        grad_clip_norm: float | None,
        total_steps: int,
    ) -> None:
        self.prepared, self.order = prepared, order
        self.optimizer, self.schedule, self.parameters = optimizer, schedule, parameters
        self.grad_clip_norm, self.total_steps = grad_clip_norm, total_steps
        self.steps_done = 0
        self.history = HistoryRecorder(len(order.rows))
        self.last_finite = prepared.bound.snapshot()

    def run(self, watch: _Watch) -> str:
        """Train; the outcome in words."""
        bound = self.prepared.bound
        epochs = -(-self.total_steps // self.order.steps_per_epoch)
        every_epoch = bool(watch.stopping or watch.held_out or tuple(watch.callbacks)) or isinstance(
            self.schedule, ReduceLROnPlateau
        )
        readout = 1 if every_epoch else max(1, STEPS_BETWEEN_READOUTS // self.order.steps_per_epoch)
        before = training_mode(bound.program.modules.values(), True)
        try:
            with Progress(epochs, watch.progress) as bar:
                for epoch in range(epochs):
                    self._epoch(epoch)
                    if (epoch + 1) % readout == 0 or epoch + 1 == epochs:
                        self._read_out()
                        if self._watched(watch, epoch):
                            return f"early stopping after {epoch + 1} epochs"
                        bar.show(epoch + 1, self.history.columns)
        except KeyboardInterrupt:
            self.history.abandon_epoch()
            self._read_out()
            return f"interrupted after {self.history.epochs} epochs"
        finally:
            restore_mode(before)
        return "finished"

    def _epoch(self, number: int) -> None:
        estimator, bound = self.prepared.estimator, self.prepared.bound
        size = len(self.order.rows)
        for batch, share in self.order.epoch(number):
            if self.steps_done == self.total_steps:
                break
            self.optimizer.zero_grad(set_to_none=True)
            auxiliary = None if self.prepared.auxiliary_loss is None else self.prepared.auxiliary_loss(batch)
            loss, terms = estimator.step(bound, batch, self.parameters, auxiliary, size)
            if self.grad_clip_norm is not None:
                clip_grad_norm_(self.parameters, self.grad_clip_norm)
            self.optimizer.step()
            if self.schedule is not None and not isinstance(self.schedule, ReduceLROnPlateau):
                self.schedule.step()
            self.steps_done += 1
            self.history.add_step(loss, terms, share, None if auxiliary is None else auxiliary.detach())
        self.history.end_epoch()

    def _read_out(self) -> None:
        try:
            self.history.flush()
        except NonFiniteError:
            self.prepared.bound.load(self.last_finite)
            raise
        self.last_finite = self.prepared.bound.snapshot()

    def _watched(self, watch: _Watch, epoch: int) -> bool:
        """Validate, tell the callbacks, and say whether to stop; none of it touches the noise of the steps."""
        columns = self.history.columns
        if watch.held_out is not None:
            value = validation_elbo(self.prepared.bound, self.prepared.structure, watch.held_out, watch.seed)
            columns.setdefault("validation_elbo", []).append(value)
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(-columns.get("validation_elbo", columns["elbo"])[-1])
        stop = watch.stopping is not None and watch.stopping.should_stop(columns[watch.stopping.monitor])
        for callback in watch.callbacks:
            with isolated(None):
                stop = callback(EpochEnd(epoch + 1, columns, self.prepared.bound.program.source)) is True or stop
        return stop
