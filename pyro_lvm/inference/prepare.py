"""Before the first step: place, trace, check, initialise. What raises here has moved nothing in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_lvm.data import Batch, Rows
from pyro_lvm.elbo.estimator import Estimator, make_estimator
from pyro_lvm.errors import ProgramError
from pyro_lvm.evaluation import batch_to_trace
from pyro_lvm.function_parameters import bind
from pyro_lvm.guides import is_recipe, make_guide
from pyro_lvm.inference.epochs import Order, strata_of
from pyro_lvm.memory import available
from pyro_lvm.parameters import BoundProgram, Untouched
from pyro_lvm.per_datum import freed, nothing_to_replace
from pyro_lvm.preflight.observations import check_support
from pyro_lvm.preflight.pair import check_pair
from pyro_lvm.preflight.rows import check_rows
from pyro_lvm.preflight.tracing import traced
from pyro_lvm.preflight.trial import try_estimator
from pyro_lvm.program import Program, as_program, floating_dtype, row_keywords
from pyro_lvm.structure import Structure

__all__ = [
    "Prepared",
    "Request",
    "guide_in_words",
    "initialize",
    "place",
    "placed",
    "prepare",
    "reset",
    "resolve",
]


BYTES_TO_START_FROM = 2**28
"""Of rows not in memory yet that a start looks at; hooks make copies of what they get."""


@dataclass(frozen=True)
class Request:
    """What is to be fitted to what.

    Attributes:
        program: the program; its guide is None where one has to be built.
        rows: the data, cast and placed.
        held_out: validation data, or None.
        recipe: the guide to build, as `make_guide` takes it, or None.
        elbo: the estimator asked for.
        batch_size: rows in a step; None for all.
        seed: of initialisation.
        check: whether to check pair and data.
        fresh: whether modules that functions register are to be initialised again.
        amortized: whether the guide stays as it is; else each datum gets parameters of its own.
    """

    program: Program
    rows: Rows
    held_out: Rows | None
    recipe: Any
    elbo: ELBO | type[ELBO] | None
    batch_size: int | None
    seed: int
    check: bool
    fresh: bool
    amortized: bool = True

    @property
    def minibatches(self) -> bool:
        """Whether a step may see a part of the rows."""
        return self.rows.loader is not None or (self.batch_size is not None and self.batch_size < len(self.rows))

    def first(self) -> Batch:
        """Rows to trace the program on."""
        if self.minibatches and self.batch_size is not None:
            return self.rows.first(self.batch_size)
        return self.rows.first(batch_to_trace(self.program, self.rows))


@dataclass(frozen=True)
class Prepared:
    """All that the loop needs, checked; strata are those of its batches, as `Order` takes them."""

    bound: BoundProgram
    structure: Structure
    estimator: Estimator
    auxiliary_loss: Callable[..., Tensor] | None
    strata: list[tuple[Tensor, int]] | None


def resolve(program: Any, guide: Any) -> tuple[Program, Any]:
    """The program, and the recipe where ``guide`` says how to build one: then the program is without."""
    if not is_recipe(guide):
        return as_program(program, guide), None
    return replace(as_program(program), guide=None), guide


def guide_in_words(recipe: Any, guide: Any, amortized: bool | None) -> str:
    """What a record says of the guide."""
    if recipe is not None:
        return recipe if isinstance(recipe, str) else str(recipe.__name__)
    if guide is None:
        return "mean_field"
    return "per datum" if amortized is False else "given"


def placed(
    program: Program, rows: Rows, held_out: Rows | None, device: torch.device | str | None
) -> tuple[Rows, Rows | None, list[str]]:
    """Send modules and rows to one device and one floating dtype, the data's; say what was cast."""
    tensors = [value for value in rows.first(1).tensors().values() if isinstance(value, Tensor)]
    dtype = floating_dtype(tensors)
    where = torch.device(device) if device is not None else tensors[0].device if tensors else torch.device("cpu")
    rows = replace(rows, dtype=dtype, device=where)
    cast: list[str] = []
    for module in program.modules.values():
        place(module, rows, cast)
    return rows, None if held_out is None else replace(held_out, dtype=dtype, device=where), cast


def place(module: nn.Module, rows: Rows, cast: list[str]) -> None:
    """Send one module to where the rows are, and note in ``cast`` what was cast."""
    before = floating_dtype(module.parameters())
    module.to(device=rows.device, dtype=rows.dtype)
    text = f"parameters {before} -> {rows.dtype}"
    if rows.dtype is not None and before not in (None, rows.dtype) and text not in cast:
        cast.append(text)


def reset(modules: Iterable[nn.Module]) -> None:
    """Initialise modules again.

    Raises:
        ValueError: if a parameter belongs to no layer that can be, naming it.
    """
    for module in modules:
        whole: Any = module
        if callable(getattr(whole, "reset_parameters", None)):
            whole.reset_parameters()
            continue
        done: set[int] = set()
        layers: list[Any] = list(module.modules())
        for layer in layers:
            if callable(getattr(layer, "reset_parameters", None)):
                layer.reset_parameters()
                done |= {id(parameter) for parameter in layer.parameters()}
        left = [name for name, parameter in nn.Module.named_parameters(module) if id(parameter) not in done]
        if left:
            raise ValueError(
                f"fresh=True cannot initialise {', '.join(left)} of {type(module).__name__} again: give the module a "
                "reset_parameters() method, or make a new one"
            )


def prepare(request: Request, untouched: Untouched, cast: list[str]) -> Prepared:
    """Trace, check, initialise, and build a guide where there is none.

    Args:
        request: what is to be fitted.
        untouched: is shown the modules that functions register before anything happens to them.
        cast: is told what was cast.

    Raises:
        ProgramError: if model, guide and estimator do not belong together.
        ValueError: if the data do not fit the program.
        TypeError: if model or guide cannot be called with the data.
    """
    program, rows = request.program, request.rows
    if request.minibatches and not program.names("size"):
        raise ProgramError(
            f"{program.name} is to be fitted {request.batch_size or 'some'} rows at a time out of {len(rows)}, but its "
            "signature does not name `size`, by which its plate is scaled: write model(x, size=None) and "
            'pyro.plate("data", size or len(x), subsample=x)'
        )

    def meet(module: nn.Module) -> None:
        untouched.remember(module)
        place(module, rows, cast)
        if request.fresh:
            reset([module])

    rows.refuse_non_finite("data")
    first = request.first()
    program.require_arguments(*first.data())
    bound, structure = _bind(request, first, meet)
    estimator = make_estimator(request.elbo, structure)
    for module in estimator.modules:
        meet(module)
    if request.check:
        check_pair(bound, structure, estimator, first)
        check_support(bound, structure, first, rows)
        check_rows(bound, structure, first, rows, request.batch_size)
    if request.held_out is not None:
        _refuse_rows_unknown(request.held_out, len(rows), bound, structure)
        _check_held_out(request.held_out, bound, request.check)
    if program.guide is not None and request.amortized:
        initialize(program, rows, request.seed)
    if not bound.trainable():
        raise ProgramError(
            f"{program.name} has no parameter to train: declare one with pyro.param, or pass the module that holds "
            "them as the program (or register it with pyro.module)"
        )
    strata = strata_of(program, rows, request.batch_size)
    if request.check:
        tried = first if strata is None else next(Order(rows, request.batch_size, strata, request.seed).epoch(0))[0]
        try_estimator(bound, structure, estimator, tried)
    bound.functions.meet = None
    return Prepared(bound, structure, estimator, _auxiliary(bound, first), strata)


def _bind(request: Request, first: Batch, meet: Callable[[nn.Module], None]) -> tuple[BoundProgram, Structure]:
    program, rows = request.program, request.rows
    if program.guide is not None:
        bound = BoundProgram(program, None, rows.dtype, rows.device, meet)
        structure = traced(bound.model, bound.guide, first)
        if request.amortized:
            return bound, structure
        if request.check:  # while its lines are the user's
            check_pair(bound, structure, make_estimator(request.elbo, structure), first)
        initialize(program, rows, request.seed)
        program = program.with_guide(freed(bound, structure, first, rows))
        bound = BoundProgram(program, None, rows.dtype, rows.device)
        return bound, traced(bound.model, bound.guide, first)
    if not request.amortized:
        raise nothing_to_replace(program.name, "its guide is made from the model and is no function of the data")
    alone = BoundProgram(program.with_guide(lambda *args, **kwargs: None), None, rows.dtype, rows.device, meet)
    model_only = traced(alone.model, None, first)
    initialize(program, rows, request.seed)
    start = program.hook("initial_values")

    def build(model: Callable[..., Any]) -> Callable[..., Any]:
        return make_guide(
            model,
            model_only,
            request.recipe or "mean_field",
            names_index=program.names("index"),
            minibatches=request.minibatches,
            start=start() if start is not None else None,
        )

    bound = BoundProgram(program, build, rows.dtype, rows.device, meet)
    return bound, traced(bound.model, bound.guide, first)


def _refuse_rows_unknown(held_out: Rows, size: int, bound: BoundProgram, structure: Structure) -> None:
    """Refuse validation with a guide that has parameters for each row: it would give one row's to another."""
    guide = bound.program.guide
    local = [site.name for site in structure.local_latent if site not in structure.enumerated_in_model]
    by_row = [name for name, p in bound.functions.unconstrained.items() if size in p.shape]
    if local and isinstance(guide, AutoGuide):
        what = f"site {local[0]!r} has parameters for each datum in guide {type(guide).__name__}"
    elif local and by_row and "index" in bound.program.keywords["guide"]:
        what = f"parameter {by_row[0]!r} has a value for each of the {size} rows, and the guide takes `index`"
    else:
        return
    raise ProgramError(
        f"{what}, so it knows nothing of the {len(held_out)} rows of validation data: fit without validation=, or "
        "write a guide that is a function of x"
    )


def _check_held_out(held_out: Rows, bound: BoundProgram, check: bool) -> None:
    held_out.refuse_non_finite("validation")
    first = held_out.first(batch_to_trace(bound.program, held_out))
    bound.program.require_arguments(*first.data())
    try:
        structure = traced(bound.model, bound.guide, first)
        if check:
            check_support(bound, structure, first, held_out)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"validation does not fit the program: {error}") from error


def initialize(program: Program, rows: Rows, seed: int) -> None:
    """Call the program's `initialize` hook with all rows (a sample of many that are not in memory)."""
    hook = program.hook("initialize")
    # a guide that is a module of its own starts after the program: it may ask where that starts
    of_guide = getattr(program.guide, "initialize", None) if isinstance(program.guide, nn.Module) else None
    started = [each for each in (hook, of_guide) if callable(each)]
    if started:
        room = available()
        batch = rows.at_most(BYTES_TO_START_FROM if room is None else min(BYTES_TO_START_FROM, room // 4), seed)
        batch = batch if program.missing is None else program.missing.filled(batch)
        for each in dict.fromkeys(started):
            each(*batch.args, **batch.kwargs, seed=seed)


def _auxiliary(bound: BoundProgram, first: Batch) -> Callable[..., Tensor] | None:
    """The program's `auxiliary_loss` with the fit's parameters, tried once."""
    hook = bound.program.hook("auxiliary_loss")
    if hook is None:
        return None
    loss = bind(hook, row_keywords(hook), bound.functions)
    if bound.program.missing is not None and bound.program.missing.active:
        loss = bound.program.missing.guide(loss)  # it sees what the guide sees
    with torch.no_grad():
        value = loss(*first.args, **first.named())
    if not isinstance(value, Tensor) or value.shape != ():
        came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ProgramError(
            f"auxiliary_loss must give one number, a tensor of shape () in nats per datum; it gave {came}"
        )
    return loss
