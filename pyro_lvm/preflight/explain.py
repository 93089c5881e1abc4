"""What Pyro or torch said, said again with the site, its line, the numbers, and one edit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from pyro_lvm.data import Batch
from pyro_lvm.declaration import raised_at
from pyro_lvm.structure import Plate, Recorder

__all__ = ["Circumstances", "explained", "plate_of_rows", "wrong_rows"]


@dataclass(frozen=True)
class Circumstances:
    """What is known when an execution fails.

    Attributes:
        batch: the data.
        model: what was seen of the model.
        guide: what was seen of the guide, which runs first.
    """

    batch: Batch
    model: Recorder
    guide: Recorder

    def site(self, name: str, where: str = "") -> str:
        """A site and the line that declares it: of the failing callable, else of the other, else ``where``."""
        lines = [line for seen in (self.model, self.guide) for line in seen.lines.get(name, [])[-1:] if line]
        return f"site {name!r}" + (f" ({lines[0]})" if lines else where)


def plate_of_rows(name: str) -> str:
    """The plate statement that does right in every case."""
    return f'pyro.plate("{name}", size or len(x), subsample=x), with `size=None` in the signatures of model and guide'


def wrong_rows(plate: Plate, site: str, batch: Batch) -> str:
    """The words for a plate over the rows that does not hold the batch's rows."""
    why = ""
    if batch.index is None and len(batch) != batch.size:
        why = " (a DataLoader hides the row numbers, so `index` is None: pass the arrays themselves)"
    return (
        f"plate {plate.name!r} around {site} has {plate.rows} rows, but the data have {len(batch)}{why}: write "
        f"{plate_of_rows(plate.name)}. A guide with parameters for each row fits only the rows it was trained on"
    )


def explained(error: Exception, circumstances: Circumstances) -> str | None:
    """The error in the words of this library; None where it is the author's own affair."""
    text = str(error) or _assertion(error)
    where = raised_at(error)
    for pattern, words in _PATTERNS:
        found = re.search(pattern, text, re.DOTALL)
        if found is not None:
            return words(found, circumstances, f" (at {where})" if where else "")
    return None


def _assertion(error: Exception) -> str:
    """Pyro's bare assertions have no words; the functions that they stand in tell them apart."""
    name, site, step = "", "", error.__traceback__
    while step is not None:
        name = step.tb_frame.f_code.co_name
        if name == "compute_log_prob":
            site = f" of {step.tb_frame.f_locals['name']}"
        step = step.tb_next
    return f"assertion in {name}{site}"


def _shape_in_plate(found: re.Match[str], known: Circumstances, where: str) -> str:
    name, site, dim = found["plate"], found["site"], int(found["dim"])
    rows, shape = int(found["rows"]), int(found["shape"])
    batch = known.batch
    if name == "data" and dim == -1 and rows != len(batch):
        return wrong_rows(Plate(name, dim, rows, rows), known.site(site, where), batch)
    return (
        f"{known.site(site, where)} does not fit plate {name!r}: the plate has {rows} rows in dim {dim}, where the "
        f"distribution's batch shape has {shape}. {_edit_of_dim(shape, rows, name, batch)}"
    )


def _edit_of_dim(shape: int, rows: int, plate: str, batch: Batch) -> str:
    """Which edit it is that sizes tell: another plate, a number of rows, or the shape of one datum."""
    if shape == len(batch) and plate != "data":
        return f"The {shape} are the rows of the batch, whose plate has another dim: transpose the parameters"
    if shape == batch.size and rows == len(batch) != batch.size:
        return (
            f"The distribution has a row for each of the {shape} data and the batch has {rows} of them: take its rows "
            "by number, parameter[index], with `index=None` in the signature"
        )
    return f"The {shape} belong to one datum: declare them an event with .to_event(1)"


def _parameter_in_plate(found: re.Match[str], known: Circumstances, where: str) -> str:
    first = found[0].splitlines()[0]
    return f"{first}. The program has parameters for each row that it was fitted to: pass those rows"


def _collision(found: re.Match[str], known: Circumstances, where: str) -> str:
    first, second, dim = found["first"], found["second"], int(found["dim"])
    return (
        f"plates {first!r} and {second!r}{where} are both at dim {dim}, and would be taken for one: give one of them "
        f'a dim of its own, pyro.plate("{second}", ..., dim={dim - 1})'
    )


def _twice(found: re.Match[str], known: Circumstances, where: str) -> str:
    name = found["name"]
    if name in known.model.rows or name in known.guide.rows:
        made = [line for seen in (known.guide, known.model) for line in seen.lines.get(name, [])]
        return (
            f"plate {name!r} is made twice, at {' and '.join(map(str, made[-2:]))}: make it once, plate = "
            f'pyro.plate("{name}", ...), and write `with plate:` wherever it is needed'
        )
    lines = next((seen.lines[name] for seen in (known.model, known.guide) if len(seen.lines.get(name, [])) > 1), [])
    places = " and ".join(str(line) for line in lines[:2]) or "two places"
    loop = len(lines) > 1 and lines[0] == lines[1]
    edit = f'name them apart, f"{name}_{{i}}", or make one plate of the loop' if loop else "rename one of them"
    return f"site {name!r} is sampled twice, at {places}: {edit}"


def _site_and_parameter(found: re.Match[str], known: Circumstances, where: str) -> str:
    name = found["name"]
    return f"{name!r} names both a site and a {found['kind']}{where}: rename one of them"


def _observed_in_guide(found: re.Match[str], known: Circumstances, where: str) -> str:
    name = found["name"]
    if name in known.guide.params:
        return f"{name!r} names a parameter of the guide and a site or a plate of the model: rename one of them"
    return (
        f"{known.site(name)} is latent in the model but observed in the guide: take obs= away from "
        f"pyro.sample({name!r}, ...) in the guide"
    )


def _parameter_of_distribution(found: re.Match[str], known: Circumstances, where: str) -> str:
    name, kind, constraint = found["name"], found["kind"], found["constraint"]
    positive = "GreaterThan" in constraint
    edit = (
        f"pass it through .exp() or torch.nn.functional.softplus, or declare it with "
        f'pyro.param("{name}", ..., constraint=constraints.positive)'
        if positive
        else f"map it into {constraint} by the transform of pyro.param(..., constraint=...)"
    )
    numbers = re.search(r"-?\d+\.?\d*(?:e[-+]?\d+)?|nan|inf", found["values"])
    shown = f" such as {numbers[0]}" if numbers else ""
    if numbers is not None and numbers[0] == "nan":
        edit = "look for a logarithm or a division that meets zero on its way"
    last = known.model.last or known.guide.last
    after = f", after site {last!r}," if last else ""
    return f"{kind}{where}{after} has a parameter {name!r} outside {constraint}{shown}: {edit}"


def _device(found: re.Match[str], known: Circumstances, where: str) -> str:
    data = next(iter(known.batch.tensors().values()))
    return (
        f"a tensor made in the program{where} is on another device than the data, which are on {data.device} "
        f"({found[0].splitlines()[0]}): make it there, x.new_tensor(...) or torch.zeros(..., device=x.device), or "
        "register it as a buffer of the module"
    )


def _dtype(found: re.Match[str], known: Circumstances, where: str) -> str:
    data = next((v for v in known.batch.tensors().values() if v.is_floating_point()), None)
    told = f", and the data are {data.dtype}" if data is not None else ""
    return (
        f"two tensors of different dtypes meet{where} ({found[0].splitlines()[0]}){told}: make constants with "
        "x.new_tensor(...), or torch.tensor(..., dtype=x.dtype)"
    )


def _no_size(found: re.Match[str], known: Circumstances, where: str) -> str:
    return (
        f"a plate{where} has a subsample but no size, so nothing could scale it to the {known.batch.size} rows of the "
        f"data: write {plate_of_rows('data')}"
    )


def _row_numbers(found: re.Match[str], known: Circumstances, where: str) -> str:
    asked = known.model.params or known.guide.params  # the guide runs first: where the model had begun, it failed there
    name = asked[-1] if asked else "?"
    return (
        f"parameter {name!r}{where} has a value for each of {known.batch.size} rows, but its plate takes its rows by "
        "the values of the data instead of their numbers: write "
        'pyro.plate("data", size or len(x), subsample=index) with `index=None` in the signature'
    )


def _scales(found: re.Match[str], known: Circumstances, where: str) -> str:
    discrete = [name for name, infer in known.model.infer.items() if infer.get("enumerate") == "parallel"]
    outside = [name for name in discrete if not known.model.plates.get(name)]
    if outside:
        return (
            f"{known.site(outside[0])} is summed out outside of the plate that holds {len(known.batch)} of "
            f"{known.batch.size} rows, and a scaled sum is no sum: move it into the plate, or fit with batch_size=None"
        )
    name = discrete[0] if discrete else "?"
    return (
        f"{known.site(name)} is summed out, and the sites that hang on it carry different weights (the plate over the "
        "rows, row weights, or poutine.scale): sum it out in the guide as well, with a site of its own there, or give "
        "all of them one scale"
    )


def _conflict(found: re.Match[str], known: Circumstances, where: str) -> str:
    site = known.site(found["site"] or found["asserted"])
    return (
        f"{site} depends on an enumerated site whose dim has been used again: "
        "let pyro.markov remember as many steps as it looks back, pyro.markov(range(T), history=2)"
    )


def _sizes_of_subsample(found: re.Match[str], known: Circumstances, where: str) -> str:
    return (
        f"a plate{where} has subsample_size {found['told']}, but its rows are {found['rows']}: leave subsample_size "
        "out, as `subsample` says it already; model and guide must hold the same rows"
    )


def _duplicate_plate(found: re.Match[str], known: Circumstances, where: str) -> str:
    return f"plate {found['name']!r}{where} is opened inside itself: open it once around both sites"


_Words = Callable[[re.Match[str], Circumstances, str], str]

_PATTERNS: tuple[tuple[str, _Words], ...] = (
    (
        r"Shape mismatch inside plate\('(?P<plate>.*?)'\) at site (?P<site>\S+) dim (?P<dim>-\d+), "
        r"(?P<rows>\d+) vs (?P<shape>\d+)",
        _shape_in_plate,
    ),
    (r"Inside pyro.plate\(.*invalid shape of pyro.param.*", _parameter_in_plate),
    (r'at plates "(?P<first>.*?)" and "(?P<second>.*?)", collide at dim=(?P<dim>-\d+)', _collision),
    (r"Multiple sample sites named '(?P<name>.*?)'", _twice),
    (r"^(?P<name>\S+) is already in the trace as a (?P<kind>\w+)", _site_and_parameter),
    (r"^site (?P<name>\S+) must be sampled in trace", _observed_in_guide),
    (
        r"Expected parameter (?P<name>\w+) \(.*?\) of distribution (?P<kind>\w+)\(.*?to satisfy the constraint "
        r"(?P<constraint>.*?), but found invalid values:(?P<values>.*)",
        _parameter_of_distribution,
    ),
    (r"Expected all tensors to be on the same device.*|Tensor on device \w+ is not on the expected device.*", _device),
    (r"expected scalar type \w+ but found \w+|.*(?:same dtype|dtypes match).*", _dtype),
    (r"assertion in _subsample", _no_size),
    (r"index_select\(\): .*|index out of range in self", _row_numbers),
    (r"share a common poutine.scale|enumeration only supports scalar poutine.scale", _scales),
    (r'Enumeration dim conflict at site "(?P<site>.*?)"|assertion in log_prob of (?P<asserted>\S+)', _conflict),
    (r"subsample_size does not match len\(subsample\), (?P<told>\d+) vs (?P<rows>\d+)", _sizes_of_subsample),
    (r"duplicate plate '(?P<name>.*?)'", _duplicate_plate),
)
