"""The table of the page on the pre-flight, measured. ``python tests/broken/page.py`` writes it into the page."""

from __future__ import annotations

import inspect
import pathlib
import re
import sys
import warnings
from collections import Counter

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import pyro

import pyro_lvm as lvm
from broken import discrete, estimators, pairing, plates, values
from broken.mistake import BROKEN, Mistake, plain_pyro

PAGE = pathlib.Path(__file__).parent.parent.parent / "docs" / "what_the_check_catches.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
THEMES = (pairing, plates, discrete, estimators, values)


def our_words(mistake: Mistake) -> str:
    """What `pyro_lvm.fit` says of a broken program before its first step."""
    program = mistake.model if mistake.guide is None else (mistake.model, mistake.guide)
    options = {"elbo": mistake.elbo, "batch_size": mistake.batch_size}
    with warnings.catch_warnings():
        warnings.simplefilter("error", lvm.ProgramWarning)
        try:
            lvm.fit(program, mistake.data, **options, steps=1, seed=0)
        except (ValueError, lvm.ProgramWarning) as said:
            return str(said)
    return "(nothing)"


def table() -> str:
    """The measured part of the page."""
    outcomes: Counter[str] = Counter()
    parts = []
    for theme in THEMES:
        parts += [f"### {theme.__doc__.strip().rstrip('.')}", "", "| mistake | plain Pyro | here |", "|---|---|---|"]
        for make in BROKEN.values():
            if make.__module__ != theme.__name__:
                continue
            mistake = make()
            outcome = plain_pyro(mistake)
            outcomes[outcome] += 1
            said = re.sub(r"\w+\.py:\d+", "model.py:12", our_words(mistake)).replace("|", "\\|")
            said = said.replace("\n", " ")
            here = "warns" if mistake.warned else "raises"
            parts.append(f"| {inspect.getdoc(make)} | {outcome} | {here}: ``{said}`` |")
        parts.append("")
    total = sum(outcomes.values())
    caught = sum(make().warned for make in BROKEN.values())
    head = [
        f"Of {total} programs with one mistake each, plain Pyro {pyro.__version__} passes {outcomes['silent']} in "
        f"silence, warns of {outcomes['warns']}, and raises for {outcomes['raises']}. Here {total - caught} raise and "
        f"{caught} warn, before a parameter moves.",
        "",
    ]
    return "\n".join([*head, *parts])


def written() -> str:
    """The measured part as it stands in the page."""
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table().strip()}\n\n{END}{after}", encoding="utf-8")
