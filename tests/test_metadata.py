"""What the project says of itself in more than one place says the same in each."""

from __future__ import annotations

import importlib.metadata
import pathlib
import re
import tomllib

import pyro_lvm

REPOSITORY = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def words(file: str) -> str:
    return (REPOSITORY / file).read_text(encoding="utf-8")


def test_one_version():
    assert pyro_lvm.__version__ == PROJECT["version"] == importlib.metadata.version("pyro-lvm")
    assert re.search(rf"^version: {re.escape(PROJECT['version'])}$", words("CITATION.cff"), re.MULTILINE)
    assert f"## [{PROJECT['version']}]" in words("CHANGELOG.md")


def test_the_lowest_versions_tested_are_the_lower_bounds():
    tested = dict(line.split("==") for line in words(".ci/lowest.txt").splitlines() if "==" in line)
    promised = dict(requirement.split(">=") for requirement in PROJECT["dependencies"])
    assert {name: (tested[name] + ".0").startswith(bound + ".") for name, bound in promised.items()} == dict.fromkeys(
        promised, True
    )


def test_the_typed_marker_is_shipped():
    assert (pathlib.Path(pyro_lvm.__file__).parent / "py.typed").exists()
