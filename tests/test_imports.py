"""The package's order: imports point one way, importing changes nothing, public names are declared and described."""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import importlib
import inspect
import json
import pathlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

import pyro_lvm

PACKAGE = pathlib.Path(pyro_lvm.__file__).parent
REPOSITORY = pathlib.Path(__file__).parent.parent

# A module may import those that stand before it. One entry stands for a file or for a whole folder.
ORDER = (
    "errors",
    "memory",
    "prefetch",
    "storage",
    "declaration",
    "schedules",
    "networks",
    "likelihoods",
    "prior_distributions",
    "side_by_side",
    "program",
    "function_parameters",
    "parameters",
    "arrays",
    "data",
    "missing",
    "blocks",
    "columns",
    "priors",
    "exact",
    "structure",
    "dependencies",
    "guides",
    "per_datum",
    "walk",
    "elbo",
    "owners",
    "preflight",
    "evaluation",
    "models",
    "posterior",
    "to_arviz",
    "label_switching",
    "criticism",
    "capture",
    "inference",
    "ranks",
    "named_tensors",
    "lightning",
    "figures",
    "diagnosis_panels",
    "graph",
    "plots",
    "datasets",
    "testing",
)

# Methods that only hand on to a later module, for a user who does not know its name: {from: {to, ...}}. The import
# stands inside the method.
HANDED_ON: dict[str, set[str]] = {}

# What a layer does without although it comes later: a built-in model enjoys nothing that a user's program lacks.
WITHOUT = {"models": {"elbo", "preflight", "evaluation", "inference"}}

# Loaded on first use, by the function that needs it.
HEAVY = {"arviz", "h5netcdf", "lightning", "matplotlib", "sklearn", "torchvision"}

# A module that nobody else imports may import its library at once: whoever imports the one wants the other.
BY_NAME = {"pyro_lvm.lightning": "lightning"}


@dataclasses.dataclass(frozen=True)
class Import:
    source: str  # dotted name of the importing module
    target: str  # dotted name of what it imports
    where: str
    deferred: bool  # inside a function
    typing_only: bool  # under `if TYPE_CHECKING:`

    @property
    def library(self) -> str:
        return self.target.split(".")[0]

    @property
    def layers(self) -> tuple[str, str]:
        """The entries of ORDER that an import inside the package joins; "" is the package's front door."""
        return (*self.source.split("."), "")[1], (*self.target.split("."), "")[1]


def imports_of(file: pathlib.Path) -> Iterator[Import]:
    relative = file.relative_to(PACKAGE.parent)
    source = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")

    def walk(node: ast.AST, deferred: bool, typing_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            names = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                names = [module_or_its_folder(child.module or "", alias.name) for alias in child.names]
            for name in dict.fromkeys(names):
                yield Import(source, name, f"{relative}:{child.lineno} imports {name}", deferred, typing_only)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            yield from walk(child, deferred or inside, typing_only or guarded)

    return walk(ast.parse(file.read_text(encoding="utf-8")), False, False)


def module_or_its_folder(folder: str, name: str) -> str:
    """`from pyro_lvm.elbo import renyi` imports the module pyro_lvm.elbo.renyi if there is one."""
    path = PACKAGE.parent / pathlib.Path(*folder.split(".")) / name
    return f"{folder}.{name}" if path.is_dir() or path.with_suffix(".py").exists() else folder


IMPORTS = [found for file in sorted(PACKAGE.rglob("*.py")) for found in imports_of(file)]
WITHIN = [found for found in IMPORTS if found.library == "pyro_lvm"]
FOUND = sorted(found.name for found in pkgutil.walk_packages([str(PACKAGE)], "pyro_lvm."))
MODULES = ["pyro_lvm", *(name for name in FOUND if "._" not in name)]


def none_of(wrong: list[Import]) -> None:
    assert not wrong, "\n".join(found.where for found in wrong)


def test_the_imports_were_found():
    assert len(WITHIN) > 10
    assert any(found.deferred for found in IMPORTS)


def test_every_module_has_a_place_in_the_order():
    without = {name.split(".")[1] for name in MODULES[1:]} - set(ORDER)
    assert not without, f"give these a place in ORDER: {sorted(without)}"


def test_imports_point_one_way():
    def looks_forward(found: Import) -> bool:
        source, target = found.layers
        if source in ("", target) or (found.deferred and target in HANDED_ON.get(source, ())):
            return False
        return target == "" or ORDER.index(target) > ORDER.index(source)

    none_of([found for found in WITHIN if looks_forward(found)])


def test_no_imports_in_a_circle():
    graph: dict[str, set[str]] = {}
    for found in WITHIN:
        if found.source not in ("pyro_lvm", found.target) and not found.deferred:
            graph.setdefault(found.source, set()).add(found.target)
    graphlib.TopologicalSorter(graph).prepare()  # its CycleError names the circle


def test_models_do_without_what_comes_for_everybody():
    none_of([found for found in WITHIN if found.layers[1] in WITHOUT.get(found.layers[0], ())])


def test_only_the_front_door_imports_models():
    none_of([found for found in WITHIN if found.layers[1] == "models" and found.layers[0] not in ("", "models")])


def test_only_to_arviz_imports_arviz():
    none_of([found for found in IMPORTS if found.library.startswith("arviz") and found.source != "pyro_lvm.to_arviz"])


def test_heavy_libraries_are_imported_where_they_are_used():
    at_once = [found for found in IMPORTS if found.library in HEAVY and not (found.deferred or found.typing_only)]
    none_of([found for found in at_once if BY_NAME.get(found.source) != found.library])
    none_of([found for found in WITHIN if found.target in BY_NAME and found.source not in BY_NAME])


def test_oracles_do_not_know_the_library():
    tree = ast.parse((REPOSITORY / "tests" / "oracles.py").read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not {name.split(".")[0] for name in names} & {"pyro", "pyro_lvm", "torch"}


IMPORT_AND_COMPARE = """
import gc, json, logging, random, sys, warnings
import numpy, pyro, torch

def state():
    return {
        "python's random state": random.getstate(),
        "numpy's random state": numpy.random.get_state()[1].tolist(),
        "torch's random state": torch.random.get_rng_state().tolist(),
        "pyro's random state": repr(pyro.util.get_rng_state()),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "torch's validation": torch.distributions.Distribution._validate_args,
        "pyro's validation": pyro.poutine.util.is_validation_enabled(),
        "pyro's settings": repr(pyro.settings.get()),
        "param store": list(pyro.get_param_store().keys()),
        "handlers on the stack": len(pyro.poutine.runtime._PYRO_STACK),
        "tensors alive": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
        "log handlers": repr(logging.getLogger().handlers),
        "warning filters": repr(warnings.filters),
    }

before, loaded = state(), set(sys.modules)
import pyro_lvm
after = state()
print(json.dumps({
    "changed": [name for name in before if before[name] != after[name]],
    "loaded": sorted({name.split(".")[0] for name in set(sys.modules) - loaded}),
}))
"""


@pytest.fixture(scope="module")
def fresh_import() -> dict[str, list[str]]:
    run = subprocess.run([sys.executable, "-c", IMPORT_AND_COMPARE], capture_output=True, text=True, cwd=REPOSITORY)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_importing_changes_nothing(fresh_import: dict[str, list[str]]):
    assert fresh_import["changed"] == []


def test_importing_loads_nothing_heavy(fresh_import: dict[str, list[str]]):
    assert "pyro_lvm" in fresh_import["loaded"]
    heavy = {name for name in fresh_import["loaded"] if name in HEAVY or name.startswith("arviz")}
    assert not heavy


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_declared_and_described(name: str):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    assert isinstance(getattr(module, "__all__", None), list | tuple), f"{name} has no __all__"
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        thing = getattr(module, public)
        if inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing):
            assert inspect.getdoc(thing), f"{name}.{public} has no docstring"


def test_the_front_door_names_what_it_shows():
    shown = {name for name, thing in vars(pyro_lvm).items() if not (name.startswith("_") or inspect.ismodule(thing))}
    assert shown - {"annotations"} <= set(pyro_lvm.__all__)


def test_the_reference_page_shows_every_public_name():
    page = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^\.\. auto\w+:: pyro_lvm\.(\w+)$", page, re.MULTILINE))
    public = {name for name in pyro_lvm.__all__ if not name.startswith("_")}
    assert shown == public, f"docs/api.md lacks {sorted(public - shown)} and has {sorted(shown - public)} too much"
