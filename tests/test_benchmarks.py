"""Every comparison runs, with tiny sizes and one round, as far as it needs neither another library nor a compiler."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
NAMES = ("vae", "semi_supervised", "mixture", "ppca", "eight_schools", "em", "growth", "checkpoints")


@pytest.fixture
def comparisons(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))  # the folder is no part of the package
    main = pytest.importorskip("benchmarks.__main__", reason="the benchmarks are in the repository only")
    return main.comparisons()


@pytest.mark.parametrize("name", NAMES)
def test_comparison_runs_with_tiny_sizes(name, comparisons, tmp_path):
    from benchmarks import report
    from benchmarks.timing import measure

    assert tuple(comparisons) == NAMES
    outcomes = []
    for comparison in comparisons[name](tiny=True):
        comparison.contenders[:] = [c for c in comparison.contenders if not c.needs]
        outcomes.append(measure(comparison, rounds=1))
        assert not outcomes[-1].skipped
        assert all(line.median_ms > 0 for line in outcomes[-1].lines)
        assert all(line.name in report.table(outcomes[-1]) for line in outcomes[-1].lines)
    for path in report.write(outcomes, tmp_path, 1, []):
        assert path.stat().st_size > 0
    written = json.loads((tmp_path / "benchmarks.json").read_text())
    assert [o["title"] for o in written["comparisons"]] == [o.title for o in outcomes]
    assert {"versions", "cpus", "torch_threads"} <= set(written["surroundings"])


def test_skipped_contender_is_named_with_its_reason(comparisons, capsys):
    from benchmarks.timing import Comparison, Contender, measure

    absent = Contender("peer", lambda: print, 1, needs=("no_such_package",))
    outcome = measure(Comparison("title", "peer", [absent]), rounds=1)
    assert outcome.skipped == {"peer": "needs no_such_package"}
    assert "skipped: peer: needs no_such_package" in capsys.readouterr().out
