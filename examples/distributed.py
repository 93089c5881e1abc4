"""Several processes: a VAE under PyTorch Lightning, which averages the gradients of all of them.

On one machine, two processes::

    torchrun --nproc-per-node 2 examples/distributed.py

On a cluster with SLURM, two machines with four processes each, in a script for ``sbatch``::

    #SBATCH --nodes=2
    #SBATCH --ntasks-per-node=4
    #SBATCH --gpus-per-node=4
    #SBATCH --time=01:00:00
    srun python examples/distributed.py

Lightning finds out by itself which of these started it.
"""

from __future__ import annotations

import os
import warnings

import lightning.pytorch as pl

import pyro_lvm as lvm
from pyro_lvm.lightning import SVIModule


def main(epochs: int = 20) -> lvm.Fit:
    """Train, and leave on rank 0 the record that `pyro_lvm.fit` would leave."""
    x = lvm.datasets.digits().train.x
    vae = lvm.VAE(num_features=64, latent_dim=2, hidden=(64,), likelihood="normal")
    module = SVIModule(vae, data=x, batch_size=100, seed=0)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1)
    machines = int(os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("SLURM_NNODES") or 1)
    trainer = pl.Trainer(
        accelerator="auto" if processes * machines > 1 else "cpu",
        devices=processes,
        num_nodes=machines,
        strategy="ddp" if processes * machines > 1 else "auto",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # Lightning's own
        trainer.fit(module)
    fit = module.to_fit()
    if trainer.is_global_zero:
        print(fit)
        print(f"{fit.info['devices']} processes, {fit.info['steps']} steps, {fit.info['seconds']:.1f} s")
    return fit


if __name__ == "__main__":
    main()
