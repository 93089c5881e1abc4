"""Every example runs, with every default argument but its length, and says what it promises."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [name for name in NAMES if name != "quickstart"])
def test_example_runs_with_few_steps(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = load(name).main
    assert "epochs" in inspect.signature(main).parameters
    main(epochs=2)
    assert capsys.readouterr().out


def test_mixture_example_writes_its_pictures(tmp_path: Path) -> None:
    load("mixture").main(epochs=2, out=str(tmp_path))
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import arviz

    rows = load("quickstart").main(out=str(tmp_path), epochs_scale=0.01)
    assert len(rows) == 5
    printed = capsys.readouterr().out
    assert "adjusted Rand index" in printed
    assert "test accuracy" in printed
    assert len(list(tmp_path.glob("*.png"))) >= 6
    path = str(tmp_path / "posterior.nc")
    if "InferenceData" in vars(arviz):  # to ask ArviZ 1.x for it by attribute makes it warn
        data = arviz.from_netcdf(path)
    else:
        import xarray

        data = xarray.open_datatree(path)
    assert data["posterior"]["weights"].dims == ("chain", "draw", "cluster")
    data.close()


def test_quickstart_reads_mnist(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVM_DATA", str(data_root))
    images = load("quickstart").load("mnist")
    assert images.x.shape == (60000, 784)
    assert images.on_axes.shape == (60000, 10)
