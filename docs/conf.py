"""How the pages are built: every code cell is run, and one that fails, or warns, fails the build."""

import os
import re
import tomllib
import warnings
from pathlib import Path

_project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = "pyro_lvm"
author = copyright = "The pyro_lvm developers"
release = version = _project["version"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

default_role = "py:obj"  # `Fit` in a docstring is a link where there is something to link to

html_theme = "furo"
html_title = f"pyro_lvm {release}"
html_show_copyright = False

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 300
nb_execution_in_temp = True
nb_output_stderr = "warn"  # and so, with -W, whatever a cell writes to stderr fails the build too
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a page says the same wherever it is built
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's advice to those without ipywidgets

# ArviZ 0.23 greets once a day; it does so here and not on a page.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz  # noqa: F401


def _stars_of_shapes(app, what, name, obj, options, lines):
    """A shape such as (num_draws, *plates, *event) is no emphasis."""
    for number, line in enumerate(lines):
        if "``" not in line:
            lines[number] = re.sub(r"(?<=[(, ])\*(?=\w+( \w+)*[,)])", r"\\*", line)


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _stars_of_shapes)
