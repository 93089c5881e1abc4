r"""Several processes, by PyTorch Lightning: ranks, launchers and all-reduce are its business, the bound is ours.

Rank r of R takes the rows :math:`S_r` and has the loss per datum

.. math:: \ell_r = \frac{R\,|S_r|}{\sum_q |S_q|} \cdot \frac1n
          \left( -\frac{n}{|S_r|} \sum_{i \in S_r} \mathcal{L}_i + \mathrm{KL}_\text{global} \right), \qquad
          \frac1R \sum_r \nabla \ell_r = \nabla \ell_{S_1 \cup \dots \cup S_R},

so that the average that DDP takes of the gradients is the gradient on the joined batch, also where the shares of the
last batch differ.
"""

from __future__ import annotations

import atexit
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pyro.infer import ELBO
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_lvm.capture.graph import choose_level
from pyro_lvm.capture.step import Column, StepResult, told
from pyro_lvm.data import Batch, as_rows
from pyro_lvm.errors import NonFiniteError, ProgramWarning
from pyro_lvm.evaluation import fresh_seed, streams
from pyro_lvm.guides import GuideKind
from pyro_lvm.inference.bound import mean_elbo
from pyro_lvm.inference.checkpoint import checkpoints_of
from pyro_lvm.inference.epochs import Order
from pyro_lvm.inference.guard import Guard
from pyro_lvm.inference.history import HistoryRecorder
from pyro_lvm.inference.iterations import require_counts, surroundings
from pyro_lvm.inference.loop import Loop
from pyro_lvm.inference.optimisation import make_optimizer
from pyro_lvm.inference.prepare import Prepared, Request, guide_in_words, placed, prepare, resolve
from pyro_lvm.inference.record import Fit
from pyro_lvm.inference.sites import site_table
from pyro_lvm.inference.whole_epochs import WholeEpochs
from pyro_lvm.missing import marginalizing, require_missing
from pyro_lvm.named_tensors import copy_by_name
from pyro_lvm.parameters import Untouched, isolated
from pyro_lvm.preflight.suspicions import suspicions
from pyro_lvm.ranks import RowNumbers, SharedOrder

try:
    import lightning.pytorch as pl
except ModuleNotFoundError as error:
    raise ImportError(
        "pyro_lvm.lightning needs PyTorch Lightning, which is not installed: pip install 'pyro-lvm[distributed]'"
    ) from error

__all__ = ["SVIModule"]


class SVIModule(pl.LightningModule):
    """A program, an ELBO and data as a `LightningModule`, for any number of processes.

    Everything is checked, initialised and created here, before the optimiser and before any process waits for another:
    parameters that functions declare with `pyro.param` and guides that have still to be built included. Each rank
    holds the data, takes its own rows of one permutation, scales its plate by its own batch, and draws its own noise.
    All parameters take part in every backward pass; `state_dict` has the names of a fit's parameters.

    Args:
        program: as for `pyro_lvm.fit`.
        elbo: as for `pyro_lvm.fit`, without `RenyiELBO`, which takes its own gradients.
        data: as for `pyro_lvm.fit`. Of a `DataLoader`, Lightning changes the sampler: `DistributedSampler` repeats
            rows where the ranks cannot have equally many.
        guide: as for `pyro_lvm.fit`.
        batch_size: rows in a step of one rank; None shares all rows among the ranks.
        optimizer: as for `pyro_lvm.fit`.
        lr: as for `pyro_lvm.fit`.
        scheduler: as for `pyro_lvm.fit`; a `ReduceLROnPlateau` watches the epoch's training bound.
        seed: of initialisation, order and noise; None for a fresh one, which rank 0 tells the others.
        total_steps: the length of the default one-cycle schedule and of an estimator's; None asks the trainer.
        missing: as for `pyro_lvm.fit`.
        check: as for `pyro_lvm.fit`.
        checkpoint: a folder of checkpoints that `pyro_lvm.fit` goes on from, and the other way about: rank 0 writes
            one at the end of each epoch, and where there is one the trainer goes on from it. The same call in both
            needs the same ``seed``, ``total_steps`` and rows in a step of all ranks together.

    Raises:
        ProgramError: if model, guide and estimator do not belong together.
        TypeError: if an argument is of another kind than described, or the estimator takes its own gradients.
        ValueError: if the data do not fit the program, or an argument is out of range.
        StorageError: if the folder of checkpoints is another fit's, was left within an epoch, or cannot be used.

    Warns:
        ProgramWarning: if the program may mean what it says, but seldom does.

    Units: it logs ``elbo`` (the plain bound, nats per datum) and ``loss`` (the estimator's own, nats of the whole data
    set), each the mean of an epoch over all ranks. What is differentiated is the loss per datum.

    Example:
        >>> import lightning.pytorch as pl, torch, pyro_lvm as lvm
        >>> from pyro_lvm.lightning import SVIModule
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> module = SVIModule(lvm.PPCA(num_features=3, latent_dim=1), data=x, batch_size=25, seed=0)
        >>> sorted(module.state_dict())[:2]
        ['_standard_guide_weight', '_standard_loadings']
    """

    def __init__(
        self,
        program: Any,
        elbo: ELBO | type[ELBO] | None = None,
        *,
        data: Any,
        guide: GuideKind | type[AutoGuide] | Callable[..., Any] | None = None,
        batch_size: int | None = None,
        optimizer: Callable[..., Optimizer] | None = None,
        lr: float | None = None,
        scheduler: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None = None,
        seed: int | None = None,
        total_steps: int | None = None,
        missing: Literal["marginalize"] | None = None,
        check: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        counts = {"batch_size": batch_size, "total_steps": total_steps}
        require_counts(**{name: count for name, count in counts.items() if count is not None})
        rows = as_rows(data, missing=require_missing(missing))
        if rows.loader is not None and batch_size is not None:
            raise ValueError(
                f"batch_size={batch_size} says nothing to a DataLoader, which makes its own batches: drop it"
            )
        if rows.loader is not None and checkpoint is not None:
            raise ValueError("Lightning changes a DataLoader's order, which no other fit goes on from: pass arrays")
        folder = checkpoints_of(checkpoint, None, "auto", "raise")
        self._checkpoints = None if folder is None else WholeEpochs(folder)
        if seed is None:
            found = None if self._checkpoints is None else self._checkpoints.found
            seed = fresh_seed() if found is None else found["made"]["seed"]
        self.program, self.batch_size, self.total_steps, self.seed = program, batch_size, total_steps, seed
        self.recorded: dict[str, Any] = {"devices": 1, "strategy": None, "optimizer": None, "stopped": "not trained"}
        self._asked: dict[str, Any] = {"optimizer": optimizer, "lr": lr, "scheduler": scheduler}
        resolved, recipe = resolve(program, guide)
        initialisation = streams(self.seed)[0]
        untouched = Untouched(resolved.modules.values())
        try:
            with isolated(initialisation, validate=check):
                rows, _, self._cast = placed(resolved, rows, None, None)
                if missing is not None:
                    resolved = marginalizing(resolved, rows, None)
                request = Request(resolved, rows, None, recipe, elbo, batch_size, initialisation, check, False)
                self.prepared = prepare(request, untouched, self._cast)
                for doubt in suspicions(self.prepared.bound, self.prepared.structure, request.first()) if check else ():
                    warnings.warn(doubt, ProgramWarning, stacklevel=2)
                _require_differentiable(self.prepared)
                first = request.first()
                make_optimizer(self._parameters_to_train(), **self._asked, total_steps=1, has_network=False)
                self.rows, self._rows_now, self._idle = rows, rows, []
                self._idle = self._without_gradient(first)
        except BaseException:
            untouched.restore()
            raise
        self._guide_in_words = guide_in_words(recipe, resolved.guide, None)
        self._missing = missing
        # modules move their parameters in place and replace their buffers: they have to be here themselves
        self.modules_of_program = nn.ModuleList([*self.prepared.bound.modules, *self.prepared.estimator.modules])
        inside = {id(parameter) for parameter in self.modules_of_program.parameters()}
        loose = [p for p in self.prepared.bound.functions.unconstrained.values() if id(p) not in inside]
        for number, parameter in enumerate(loose):  # their own names may hold dots
            self.register_parameter(f"parameter_{number}", parameter)
        self._loop: Loop | None = None
        self._history = HistoryRecorder(len(rows))
        self._sums: dict[tuple[Column, ...], Tensor] = {}
        self._seconds = 0.0
        self._steps = 0
        self.train()

    def setup(self, stage: str) -> None:
        """Agree on the seed, on the order of rows, and on the checkpoint to go on from."""
        trainer = self.trainer
        self.seed = trainer.strategy.broadcast(self.seed)
        if self._checkpoints is not None:  # the other ranks need not see rank 0's disk
            self._checkpoints.found = trainer.strategy.broadcast(self._checkpoints.found)
        self._joined = None if self.batch_size is None else self.batch_size * trainer.world_size
        self._order = SharedOrder(len(self.rows), self._joined, streams(self.seed)[1])

    def train_dataloader(self) -> Any:
        """This rank's row numbers, step after step; a `DataLoader` that was given as data."""
        return self.rows.loader if self.rows.loader is not None else _RowsOfRank(self)

    def configure_optimizers(self) -> Any:
        """As `pyro_lvm.fit` makes them, and as a checkpoint left them."""
        if self.total_steps is None:
            steps = self.trainer.estimated_stepping_batches
            if not steps < float("inf"):
                raise ValueError("the trainer has no end, which the schedules need: pass total_steps=... to SVIModule")
            self.total_steps = max(int(steps), 1)
        self.rows = self._rows_now = replace(self.rows, device=self.device)  # Lightning's
        parameters = self._parameters_to_train()
        optimizer, schedule, self.recorded["optimizer"] = make_optimizer(
            parameters,
            **self._asked,
            total_steps=self.total_steps,
            has_network=self.prepared.bound.has_network(),
        )
        order = Order(self.rows, self._joined, None, self._order.seed)
        level = choose_level("auto", self.total_steps)
        self._loop = Loop(self.prepared, order, optimizer, schedule, parameters, None, self.total_steps, level)
        self._loop.history = self._history
        if self._checkpoints is not None:
            self._checkpoints.begin(
                self._loop,
                self.trainer.is_global_zero,
                program=self.prepared.bound.program.name,
                guide=self._guide_in_words,
                seed=self.seed,
                batch_size=self._joined,
                optimizer=self.recorded["optimizer"],
                missing=self._missing,
            )
        if schedule is None:
            return optimizer
        if isinstance(schedule, ReduceLROnPlateau):
            watched = "elbo" if schedule.mode == "max" else "loss"
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": watched}}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Follow a checkpoint to its epoch."""
        trainer = self.trainer
        if trainer.world_size > 1:
            atexit.register(_leave_the_group)
        self.recorded |= {"devices": trainer.world_size, "strategy": type(trainer.strategy).__name__}
        self._started = time.perf_counter()
        self.recorded["stopped"] = "interrupted"
        assert self._loop is not None, "configure_optimizers comes first"
        if self._loop.epoch:  # a checkpoint's
            trainer.fit_loop.epoch_progress.increment_by(self._loop.epoch)
            steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
            steps.increment_by(self._loop.steps_done)

    def on_train_epoch_start(self) -> None:
        """Rows that are drawn anew in each epoch are the same on all ranks."""
        self._rows_now = self.rows.redrawn(self.current_epoch, streams(self.seed)[1])
        self._sums.clear()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss per datum of this rank's rows, times their share; backward is Lightning's."""
        rows, world = self._rows_now, self.trainer.world_size
        if isinstance(batch, RowNumbers):
            taken, share = rows.take(batch.rows.cpu()), batch.share
        else:
            taken, share = rows.collated(batch), 1.0
            if world > 1:
                total = self._summed(torch.tensor(float(len(taken)), device=self.device))
                share = world * len(taken) / float(total)
        self.prepared.estimator.advance(min(self.global_step / max((self.total_steps or 1) - 1, 1), 1.0))
        noise = _derived(streams(self.seed)[2], self.trainer.global_rank, self.current_epoch, batch_idx)
        with isolated(noise, validate=False):
            result = self._result = self._guard.take(self.global_step, taken, self._step)
        counted = len(taken) if share else 0
        weighed = torch.cat([result.values, result.values.new_ones(1)]) * counted
        before = self._sums.get(result.columns)
        self._sums[result.columns] = weighed if before is None else before + weighed
        return share * self._loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Let no NaN and no infinity reach a parameter."""
        try:
            self._guard.look(self._result)
            self._guard.read()
        except NonFiniteError as error:
            if self.trainer.world_size == 1:
                raise
            raise NonFiniteError(f"rank {self.trainer.global_rank}, or another: {error}") from error

    def on_train_epoch_end(self) -> None:
        """Join what the ranks saw in this epoch; keep and log it."""
        for columns, sums in self._sums.items():
            joined = self._summed(sums)
            self._history.add_step(StepResult(columns, joined[:-1] / joined[-1]), 1.0)
        if not self._sums:
            return
        self._sums.clear()
        self._history.end_epoch()
        assert self._loop is not None, "configure_optimizers comes first"
        self._loop.read_out()
        if self._checkpoints is not None and self.trainer.is_global_zero:
            done = self.current_epoch + 1
            order, noise = self._order.generator_state(done), _derived(streams(self.seed)[2], done)
            self._checkpoints.save(self._loop, done, order, noise)
        for name in ("elbo", "loss"):
            value = torch.tensor(self._history.columns[name][-1], dtype=torch.float64, device=self.device)
            self.log(name, value.float(), batch_size=1, sync_dist=True, prog_bar=name == "elbo")

    def on_fit_end(self) -> None:
        """Note how long it took."""
        self._seconds += time.perf_counter() - self._started
        self._steps = self.global_step
        self.recorded["stopped"] = "finished"

    def teardown(self, stage: str) -> None:
        """Give the folder of checkpoints up."""
        if self._checkpoints is not None:
            self._checkpoints.checkpoints.give_up()
            self._checkpoints.found = None

    def to_fit(self) -> Fit:
        """The record of what was found, as `pyro_lvm.fit` leaves it; the bound is evaluated here, on all rows.

        No rank waits for another: ask on rank 0 only, or on all.
        """
        bound, rows, structure = self.prepared.bound, self.rows, self.prepared.structure
        rows = rows.like(bound.reference(None))
        seed = streams(self.seed)[3]
        evaluated = mean_elbo(bound, structure, rows, self.batch_size, seed)
        info = {
            "program": bound.program.name,
            "guide": self._guide_in_words,
            "estimator": repr(self.prepared.estimator),
            "estimator_reason": self.prepared.estimator.reason,
            "capture": False,
            "capture_reason": "Lightning takes the steps",
            "missing": self._missing,
            "autocast": None,
            "alternate": None,
            "seed": self.seed,
            "n": len(rows),
            "batch_size": self.batch_size,
            "epochs": self._history.epochs,
            "steps": self._steps,
            "seconds": self._seconds,
            "elbo_se": evaluated.standard_error,
            "elbo_passes": evaluated.passes,
        }
        info |= self.recorded | surroundings(rows, self._cast)
        columns = {k: dict(v) if isinstance(v, dict) else list(v) for k, v in self._history.columns.items()}
        return Fit(
            self.program,
            bound.constrained(),
            columns,
            evaluated.elbo,
            info,
            site_table(structure),
            bound,
            bound.snapshot(),
        )

    def start_from(self, fit: Fit) -> SVIModule:
        """Take the parameters of a fit of the same program, ours or Lightning's.

        Raises:
            RuntimeError: if the parameters are not those of this program.
        """
        self.load_state_dict(fit._snapshot)
        return self

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Unconstrained parameters and buffers under the names that a fit gives them, the estimator's own beside them.

        Args:
            *args: as torch's.
            destination: as torch's.
            prefix: as torch's.
            keep_vars: as torch's.
        """
        state = {} if destination is None else destination
        for name, tensor in (*self.prepared.bound.tensors(), *self._of_estimator()):
            state[prefix + name] = tensor if keep_vars else tensor.detach()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take the values of a `state_dict`, or of the snapshot of a fit.

        Args:
            state_dict: tensors by name.
            strict: whether names must agree; what an estimator trains of its own may be absent.
            assign: must be False: the parameters are the program's and stay so.

        Raises:
            RuntimeError: if a name is missing, unknown, or of another shape.
            ValueError: if ``assign``.
        """
        if assign:
            raise ValueError("assign=True would leave the program with other parameters: drop it")
        own, optional = dict(self.prepared.bound.tensors()), dict(self._of_estimator())
        copy_by_name(state_dict, own, optional, self.prepared.bound.program.name, strict)
        missing, unknown = own.keys() - state_dict.keys(), state_dict.keys() - own.keys() - optional.keys()
        return nn.modules.module._IncompatibleKeys(sorted(missing), sorted(unknown))

    def _of_estimator(self) -> Iterator[tuple[str, Tensor]]:
        for number, module in enumerate(self.prepared.estimator.modules):
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                yield f"estimator.{number}.{name}", tensor

    def _parameters_to_train(self) -> list[nn.Parameter]:
        own = [p for module in self.prepared.estimator.modules for p in module.parameters()]
        return [*self.prepared.bound.trainable().values(), *own]

    def _summed(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks."""
        summed: Tensor = self.trainer.strategy.reduce(tensor.clone(), reduce_op="sum")
        return summed

    def _objective(self, batch: Batch) -> tuple[Tensor, StepResult]:
        bound, auxiliary_loss = self.prepared.bound, self.prepared.auxiliary_loss
        with warnings.catch_warnings():
            # Pyro warns of each such loss; at the end of the epoch it is an error
            warnings.filterwarnings("ignore", r"Encountered (NaN|\+?inf)", UserWarning)
            auxiliary = None if auxiliary_loss is None else auxiliary_loss(*batch.args, **batch.named())
            objective, loss, terms = self.prepared.estimator.objective(bound, batch, auxiliary, len(self.rows))
        for parameter in self._idle:
            objective = objective + 0.0 * parameter.sum()  # DDP waits for every parameter
        return objective, told(loss, terms, auxiliary)

    def _step(self, batch: Batch) -> StepResult:
        self._loss, result = self._objective(batch)
        return result

    @property
    def _guard(self) -> Guard:
        assert self._loop is not None, "configure_optimizers comes first"
        return self._loop.guard

    def _without_gradient(self, first: Batch) -> list[nn.Parameter]:
        """Parameters that the loss does not depend on."""
        parameters = self._parameters_to_train()
        objective, _ = self._objective(first)
        gradients = torch.autograd.grad(objective, parameters, allow_unused=True)
        return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is None]


class _RowsOfRank:
    """What Lightning takes for a loader."""

    def __init__(self, module: SVIModule) -> None:
        self.module = module

    def __len__(self) -> int:
        return self.module._order.steps_per_epoch

    def __iter__(self) -> Iterator[RowNumbers]:
        trainer = self.module.trainer
        return self.module._order.epoch(trainer.current_epoch, trainer.global_rank, trainer.world_size)


def _derived(*numbers: int) -> int:
    """A seed that is another for other numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _leave_the_group() -> None:
    """End the threads of Gloo before the interpreter ends, which Lightning does for NCCL only."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _require_differentiable(prepared: Prepared) -> None:
    if not prepared.estimator.differentiable:
        raise TypeError(
            f"{prepared.estimator!r} takes its own gradients, and DDP could not average them: use "
            "pyro_lvm.elbo.ImportanceWeighted(), which has the same bound"
        )
