"""Model and guide: the same latent sites, with the same shapes, supports, plates, rows and weights."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor

from pyro_lvm.errors import ProgramError
from pyro_lvm.structure import Plate, Site, Structure, support_of_entry

__all__ = ["check_pairing"]


def check_pairing(structure: Structure) -> None:
    """Raise where guide and model do not have the same latent sites in the same place.

    Raises:
        ProgramError: naming the site, the numbers, and one edit.
    """
    if not structure.observed:
        names = ", ".join(repr(name) for name in structure.model) or "none"
        raise ProgramError(
            f"no site of the model observes data (its sites: {names}): pass the data to one, pyro.sample(..., obs=x)"
        )
    for site in structure.guide.values():
        if site.observed:
            raise ProgramError(
                f"guide {site} is observed: a guide has only latent sites. Take obs= away from "
                f"pyro.sample({site.name!r}, ...) in the guide"
            )
    for site in structure.latent:
        if site.name in structure.guide or site.enumerated:
            continue
        if not site.discrete or _near(site, structure):  # else it is a matter of enumeration
            raise ProgramError(
                f"{site} of the model has no site in the guide{_near(site, structure)}: it would be drawn from its "
                f"prior and never learned. {_edit_of_missing(site, structure)}"
            )
    latent = [site.name for site in structure.latent]
    for site in structure.guide.values():
        model_site = structure.model.get(site.name)
        if model_site is not None and model_site.observed:
            raise ProgramError(
                f"guide {site}: the model has no such latent site, it observes {model_site}. Take "
                f"pyro.sample({site.name!r}, ...) out of the guide"
            )
        if not site.auxiliary and model_site is None:
            raise ProgramError(
                f"guide {site}{_did_you_mean(site.name, latent)}: the model has no such latent site. Take it out of "
                "the guide, or mark it infer={'is_auxiliary': True} if the guide needs it to make another"
            )
    for name, guide_site in structure.guide.items():
        if name in structure.model:
            _check_same_shape(structure.model[name], guide_site)
            _check_same_plates(structure.model[name], guide_site)
            _check_same_support(structure.model[name], guide_site)
            _check_same_weight(structure.model[name], guide_site)
    _check_same_rows(structure)


def _near(site: Site, structure: Structure) -> str:
    extra = [g.name for g in structure.guide.values() if g.name not in structure.model and not g.auxiliary]
    return _did_you_mean(site.name, extra)


def _edit_of_missing(site: Site, structure: Structure) -> str:
    extra = [g.name for g in structure.guide.values() if g.name not in structure.model and not g.auxiliary]
    close = _close(site.name, extra)
    if not close:
        return f"Add pyro.sample({site.name!r}, ...) to the guide"
    return f"Rename pyro.sample({close[0]!r}, ...) of the guide to pyro.sample({site.name!r}, ...)"


def _close(name: str, candidates: list[str]) -> list[str]:
    return difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)


def _did_you_mean(name: str, candidates: list[str]) -> str:
    close = _close(name, candidates)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _check_same_shape(model_site: Site, guide_site: Site) -> None:
    in_model, in_guide = tuple(model_site.fn.event_shape), tuple(guide_site.fn.event_shape)
    if in_model == in_guide:
        return
    shorter, longer = sorted((in_model, in_guide), key=len)
    if len(shorter) != len(longer):
        where = "guide" if shorter == in_guide else "model"
        edit = f"add .to_event({len(longer) - len(shorter)}) to it in the {where}"
    else:
        edit = f"make the guide's as large as the model's, {in_model}"
    raise ProgramError(
        f"{model_site} has event shape {in_model} in the model and {in_guide} in the guide"
        f"{f' ({guide_site.declared})' if guide_site.declared else ''}: {edit}"
    )


def _check_same_plates(model_site: Site, guide_site: Site) -> None:
    model_plates, guide_plates = (
        {plate.dim: plate for plate in site.plates if plate.rows > 1} for site in (model_site, guide_site)
    )
    if {d: (p.rows, p.size) for d, p in model_plates.items()} != {d: (p.rows, p.size) for d, p in guide_plates.items()}:
        told = [
            ", ".join(f"{p.name!r} of {p.size}" for p in plates.values()) or "no plate"
            for plates in (model_plates, guide_plates)
        ]
        raise ProgramError(
            f"{model_site} is in {told[0]} in the model and in {told[1]} in the guide"
            f"{f' ({guide_site.declared})' if guide_site.declared else ''}: its terms would be counted a different "
            f"number of times. {_edit_of_plates(model_plates, guide_plates)}"
        )


def _edit_of_plates(in_model: dict[int, Plate], in_guide: dict[int, Plate]) -> str:
    lacking = [plate.name for dim, plate in in_model.items() if dim not in in_guide]
    if lacking:
        return f"Sample it inside of plate {lacking[0]!r} in the guide"
    beyond = [plate.name for dim, plate in in_guide.items() if dim not in in_model]
    if beyond:
        return f"Sample it outside of plate {beyond[0]!r} in the guide"
    return "Give the guide's plates the sizes of the model's"


def _bounds(support: Any) -> tuple[str, Any, Any]:
    """A support as a kind and two ends: every half-line, interval and the line itself are of one kind."""
    base = support_of_entry(support)
    lower, upper = getattr(base, "lower_bound", None), getattr(base, "upper_bound", None)
    discrete = bool(getattr(support, "is_discrete", False))
    if lower is None and upper is None and type(base).__name__ not in ("_Real", "_RealVector", "_Circular"):
        return type(base).__name__, None, None
    return "discrete" if discrete else "real", _end(lower, -torch.inf), _end(upper, torch.inf)


def _end(bound: Any, otherwise: float) -> Any:
    if bound is None:
        return otherwise
    bound = torch.as_tensor(bound)
    return float(bound.flatten()[0]) if bool((bound == bound.flatten()[:1]).all()) else "varying"


def _check_same_support(model_site: Site, guide_site: Site) -> None:
    if model_site.enumerable and guide_site.enumerable:
        if model_site.num_values != guide_site.num_values:
            raise ProgramError(
                f"{model_site} has {model_site.num_values} values in the model and {guide_site.num_values} in the "
                f"guide: give the guide's {guide_site.kind} {model_site.num_values}"
            )
        return
    if isinstance(guide_site.base, Delta):
        _check_point(model_site, guide_site)
        return
    in_model, in_guide = _bounds(model_site.fn.support), _bounds(guide_site.fn.support)
    circular = "Circular" in type(model_site.base.support).__name__ or model_site.discrete != guide_site.discrete
    if in_model == in_guide or "varying" in (*in_model, *in_guide) or (circular and not model_site.discrete):
        return
    raise ProgramError(
        f"{model_site} has the support {model_site.support} in the model ({model_site.kind}) but "
        f"{guide_site.support} in the guide ({guide_site.kind}): {_edit_of_support(model_site)}"
    )


def _edit_of_support(model_site: Site) -> str:
    kind, lower, upper = _bounds(model_site.fn.support)
    if (kind, lower, upper) == ("real", 0.0, torch.inf):
        return "use a positive guide such as dist.LogNormal(loc, scale)"
    if (kind, lower, upper) == ("real", 0.0, 1.0):
        return "use a guide on (0, 1) such as dist.Beta(a, b)"
    if (kind, lower, upper) == ("real", -torch.inf, torch.inf):
        return "use a guide on the whole line such as dist.Normal(loc, scale)"
    if kind == "_Simplex":
        return "use a guide on the simplex such as dist.Dirichlet(concentration)"
    return "transform the guide, dist.TransformedDistribution(dist.Normal(loc, scale), biject_to(the model's support))"


def _check_point(model_site: Site, guide_site: Site) -> None:
    inside = torch.as_tensor(model_site.fn.support.check(guide_site.value))
    if not bool(inside.all()):
        raise ProgramError(
            f"{model_site} is put at {guide_site.value.flatten()[:3].tolist()} by the guide, outside the support "
            f"{model_site.support} of the model ({model_site.kind}): declare the guide's parameter with a constraint"
        )


def _check_same_weight(model_site: Site, guide_site: Site) -> None:
    ours, theirs = (
        float(s.scale) / s.plate_scale if not isinstance(s.scale, Tensor) or s.scale.numel() == 1 else None
        for s in (model_site, guide_site)
    )
    if ours is not None and theirs is not None and abs(ours - theirs) > 1e-6 * max(abs(ours), abs(theirs)):
        raise ProgramError(
            f"{model_site} is weighted {ours:g} in the model and {theirs:g} in the guide (poutine.scale, beside the "
            "plates): log p and log q would no longer belong together. Scale it alike in both"
        )


def _check_same_rows(structure: Structure) -> None:
    """A plate that both open holds the same rows: else every datum trains the latent of another."""
    for name, in_model in structure.model_rows.items():
        in_guide = structure.guide_rows.get(name)
        if not (isinstance(in_model, Tensor) and isinstance(in_guide, Tensor)):
            continue
        if in_model.is_floating_point() or in_guide.is_floating_point():
            continue  # data, which only tell how many rows there are
        if in_model.shape == in_guide.shape and not torch.equal(in_model, in_guide):
            raise ProgramError(
                f"plate {name!r} holds other rows in the model ({in_model.flatten()[:3].tolist()}, ...) than in the "
                f"guide ({in_guide.flatten()[:3].tolist()}, ...): pass subsample=index (or subsample=x) to both"
            )
