"""What may be meant but seldom is: warnings, not errors."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lvm.data import Batch
from pyro_lvm.parameters import BoundProgram
from pyro_lvm.structure import Site, Structure, trace_structure

__all__ = ["suspicions"]


def suspicions(bound: BoundProgram, structure: Structure, batch: Batch) -> list[str]:
    """Sentences that name the site, the numbers, and the edit for the case that it was not meant."""
    return [
        *_labels_of_everything(structure),
        *_weights(structure, batch),
        *_rows_alike(bound, structure, batch),
    ]


def _labels_of_everything(structure: Structure) -> list[str]:
    """A label drawn outside the plate is one label for all data, where one for each datum is the rule."""
    observed = [site for site in structure.observed if site.inside(structure.data_plate)]
    if not observed:
        return []
    rows = next(plate.size for plate in observed[0].plates if plate.name == structure.data_plate)
    if not any(_same_for_all(site, structure.data_plate) for site in observed):
        return []  # the rows differ by something else, such as a time before or after a point of change
    return [
        f"{site} ({site.kind}) is summed out outside of plate {structure.data_plate!r}: all {rows} rows have one value "
        "of it in common. If each has its own, move it into the plate"
        for site in structure.enumerated_in_model
        if not site.inside(structure.data_plate)
    ]


def _weights(structure: Structure, batch: Batch) -> list[str]:
    if batch.weight is not None:
        return []
    found = []
    for site in structure.latent:
        scale = float(site.scale) if not isinstance(site.scale, Tensor) or site.scale.numel() == 1 else None
        if scale is not None and abs(scale / site.plate_scale - 1.0) > 1e-6:
            found.append(
                f"{site} is weighted {scale / site.plate_scale:g} (poutine.scale, beside the plates): what is "
                "optimised and reported as ELBO is then not the bound, which has the weight 1"
            )
    return found


def _rows_alike(bound: BoundProgram, structure: Structure, batch: Batch) -> list[str]:
    """Latents in the data plate whose guide is one and the same for every row, whatever its parameters are."""
    local = [s.name for s in structure.local_latent if s.name in structure.guide and not s.observed]
    if not local or len(batch) < 2 or _all_rows_equal(batch):
        return []
    generator = torch.Generator().manual_seed(0)
    shaken = {
        # a network may start with a last layer of zeros, and per-datum parameters at one value
        name: value + 0.1 * torch.randn(value.shape, generator=generator).to(value)
        if value.is_floating_point()
        else value
        for name, value in bound.snapshot().items()
    }
    with bound.holding(shaken):
        try:
            guide = trace_structure(bound.guide, None, batch).model
        except (ValueError, RuntimeError):
            return []  # a parameter that has no room to be shaken says nothing of the rows
    found = []
    for name in local:
        site = guide.get(name)
        if site is not None and _same_for_all(site, structure.data_plate):
            found.append(_of_rows_alike(structure.guide[name], structure, batch, bound.has_network()))
    return found


def _of_rows_alike(site: Site, structure: Structure, batch: Batch, network: bool) -> str:
    if network:
        return (
            f"guide {site} ({site.kind}) does not depend on the data: all {batch.size} rows get one q({site.name}). "
            f"Compute its parameters from x, or give each row its own with `index`"
        )
    return (
        f"{site} ({site.kind}) lies in plate {structure.data_plate!r}, so that each of {batch.size} rows has a value "
        "of its own, but the guide gives all rows one distribution: if all rows share it, sample it before the plate, "
        "in model and guide"
    )


def _same_for_all(site: Site, plate: str | None) -> bool:
    dim = next(p.dim for p in site.plates if p.name == plate) if site.inside(plate) else None
    events = len(site.fn.event_shape)
    if dim is None or site.value.dim() < events - dim:
        return False
    rows = site.value.shape[dim - events]
    common = site.value.narrow(site.value.dim() + dim - events, 0, 1).expand_as(site.value)
    try:
        log_prob = site.fn.log_prob(common)
    except (KeyError, NotImplementedError):
        return False  # a flow without an inverse has no density for a value of another row
    if log_prob.dim() < -dim or log_prob.shape[dim] != rows:
        return True
    first = log_prob.narrow(log_prob.dim() + dim, 0, 1)
    return bool(torch.isclose(log_prob, first, rtol=1e-9, atol=1e-12, equal_nan=True).all())


def _all_rows_equal(batch: Batch) -> bool:
    return all(bool((value == value[:1]).all()) for value in batch.tensors().values())
