"""One process of several: what `test_lightning.py` launches by torchrun. Rank 0 writes what was found.

torchrun --standalone --nproc-per-node 2 tests/process_of_several.py CASE BATCH_SIZE OUT [FOLDER_OF_CHECKPOINTS]
"""

from __future__ import annotations

import sys
import warnings

import lightning.pytorch as pl
import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import constraints

warnings.simplefilter("error")
warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)  # Lightning's
torch.set_num_threads(1)

from pyro_lvm.lightning import SVIModule  # noqa: E402  a warning of its import is an error too

ROWS = 37  # with 8 rows to each of two ranks the last batch has 5: 3 and 2


def rows() -> torch.Tensor:
    return torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def noise() -> torch.Tensor:
    return torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class NoiseOfTheRow(nn.Module):
    """q(z | x) = N(encoder(x), scale), drawn by noise that belongs to the row; a shared location with a point guide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder, self.decoder = nn.Linear(3, 2).double(), nn.Linear(2, 3).double()
        self.noise = noise()

    def model(self, x, size=None, index=None):
        scale = pyro.param("noise.scale", torch.tensor(1.0), constraint=constraints.positive)
        shift = pyro.sample("shift", dist.Normal(torch.tensor(0.0, dtype=x.dtype), 1.0))
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) + shift, scale).to_event(1), obs=x)

    def guide(self, x, size=None, index=None):
        pyro.sample("shift", dist.Delta(pyro.param("at.shift", torch.tensor(0.5))))
        width = pyro.param("width", torch.ones(2), constraint=constraints.positive)
        with pyro.plate("data", size or len(x), subsample=x):
            loc = self.encoder(x)
            index = torch.arange(len(x)) if index is None else index
            z = loc + width * self.noise[index]
            log_q = dist.Normal(loc, width).log_prob(z).sum(-1)
            pyro.sample("z", dist.Delta(z, log_density=log_q, event_dim=1))


def mixture(x, size=None):
    logits = pyro.param("logits", torch.tensor([0.3, 0.0]))
    locs = pyro.param("locs", torch.tensor([[-1.0, 0.0, 0.5], [1.0, 0.3, 0.0]]))
    with pyro.plate("data", size or len(x), subsample=x):
        component = pyro.sample("component", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[component], 1.0).to_event(1), obs=x)


def nothing(x, size=None):
    pass


def drawn(x, size=None):
    """A location whose gradient is the noise that a rank draws."""
    with pyro.plate("data", size or len(x), subsample=x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def drawn_guide(x, size=None):
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("z", dist.Normal(loc.expand(len(x)), 1.0))


class Drawn(SVIModule):
    """Keeps what each rank's loss was."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen = [*getattr(self, "seen", []), loss.item()]
        return loss


def module_for(case: str, batch_size: int | None, **more: object) -> SVIModule:
    options = {"batch_size": batch_size, "lr": 0.05, "seed": 0, **more}
    if case == "noise of the row":
        return SVIModule(NoiseOfTheRow(), data=rows(), check=False, **options)
    if case == "mixture":
        return SVIModule((mixture, nothing), data=rows(), **options)
    same = rows()[:1].expand(8, 3).contiguous()
    return Drawn((drawn, drawn_guide), data=same, **options)


def train(
    case: str, batch_size: int | None, devices: int, epochs: int = 4, **more: object
) -> tuple[pl.Trainer, SVIModule]:
    module = module_for(case, batch_size, **more)
    trainer = trainer_for(devices, epochs)
    trainer.fit(module)
    return trainer, module


def trainer_for(devices: int, epochs: int) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def found(trainer: pl.Trainer, module: SVIModule) -> dict:
    seen = torch.tensor(getattr(module, "seen", [0.0]), dtype=torch.float64)
    of_each_rank = torch.zeros(trainer.world_size, len(seen), dtype=torch.float64)
    of_each_rank[trainer.global_rank] = seen
    return {
        "state": module.state_dict(),
        "history": module.to_fit().history,
        "steps": trainer.global_step,
        "seen": trainer.strategy.reduce(of_each_rank, reduce_op="sum"),
        "left in the store": list(pyro.get_param_store()),
    }


if __name__ == "__main__":
    case, batch_size, out, *folder = sys.argv[1:]
    trainer, module = train(case, int(batch_size), devices=2, checkpoint=folder[0] if folder else None)
    result = found(trainer, module)
    if trainer.is_global_zero:
        torch.save(result, out)
