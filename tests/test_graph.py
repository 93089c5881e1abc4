"""A drawn model shows every site, plate and arrow once, where nothing hides anything."""

from __future__ import annotations

import itertools
import sys
import types

import matplotlib as mpl
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from pyro.ops.indexing import Vindex
from small_programs import guide_of_mean, model_of_mean, process_left_alone, same_state, state_of

import pyro_lvm as lvm
from pyro_lvm.preflight.report import Report, SiteReport
from pyro_lvm.structure import Plate

DATA = Plate("data", -1, 10, 100)


def site(name, role="latent", plates=(), kl="sampled"):
    return SiteReport(name, "", role, "Normal", tuple(plates), (), (), "Real", "", "1", "", kl)


def report(parents, *sites):
    return Report(sites, {name: frozenset(of.split()) for name, of in parents.items()}, "", None, (), (10, 100))


def eight_schools(y, size=None):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("data", size or len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 10.0), obs=y)


def topics(documents, size=None):
    with pyro.plate("topics", 3):
        weights = pyro.sample("topic_weights", dist.Gamma(0.3, 1.0))
        words = pyro.sample("topic_words", dist.Dirichlet(torch.full((12,), 0.1)))
    with pyro.plate("documents", size or len(documents), subsample=documents):
        share = pyro.sample("document_topics", dist.Dirichlet(weights))
        with pyro.plate("words", documents.shape[1]):
            topic = pyro.sample("word_topics", dist.Categorical(share), infer={"enumerate": "parallel"})
            pyro.sample("document_words", dist.Categorical(Vindex(words)[..., topic, :]), obs=documents.T)


def checked(name):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, generator=generator)
    if name == "eight schools":
        return lvm.check(eight_schools, x[:8, 0])
    if name == "topics":
        return lvm.check(topics, torch.randint(0, 12, (20, 8), generator=generator))
    if name == "semi-supervised":
        ssvae = lvm.SemiSupervisedVAE(2, 3, 1, hidden=(4,), likelihood="normal")
        return lvm.check(ssvae, (x, torch.arange(40) % 4 - 1))
    covariance = name.split()[1]
    return lvm.check(lvm.GaussianMixture(3, 2, covariance, prior=lvm.priors.weakly_informative(x)), x)


def crossed():
    items, people = Plate("items", -2, 5, 5), Plate("people", -1, 50, 50)
    return report(
        {"ability": "scale", "y": "ability difficulty"},
        site("scale"),
        site("difficulty", plates=[items]),
        site("ability", plates=[people]),
        site("y", "observed", [items, people], ""),
    )


def entangled():
    """Everything depends on everything before it, through two plates and out of them again."""
    inner = Plate("a plate with a long name", -2, 3, 3)
    plates = {"a": (), "b": (DATA,), "c": (DATA, inner), "d": (DATA, inner), "e": (DATA,), "f": (), "g": ()}
    names = list(plates)
    return report(
        {name: " ".join(names[:k]) for k, name in enumerate(names)},
        *(site(name, "observed" if name == "g" else "latent", around) for name, around in plates.items()),
    )


def wide():
    names = [f"coefficient_{k}" for k in range(9)]
    return report({"y": " ".join(names)}, *map(site, names), site("y", "observed", [DATA], ""))


def flush():
    """Boxes in boxes that begin and end in one row."""
    inner, innermost = Plate("inner", -2, 3, 3), Plate("innermost", -3, 2, 2)
    return report(
        {"d": "a b c"},
        site("a", plates=[DATA, inner, innermost]),
        site("b", plates=[DATA, inner]),
        site("c", plates=[DATA]),
        site("d", "observed", [DATA, inner, innermost], ""),
    )


def stacked():
    """A box that ends just above where another begins."""
    other, inner = Plate("other", -1, 4, 4), Plate("inner", -2, 3, 3)
    return report({"b": "a"}, site("a", plates=[other, inner]), site("b", "observed", [DATA, inner], ""))


CHECKED = ["eight schools", "topics", "semi-supervised", "mixture diag", "mixture full"]
MADE = {"crossed": crossed, "entangled": entangled, "wide": wide, "flush": flush, "stacked": stacked}


@pytest.fixture(scope="module", params=[*CHECKED, *MADE])
def drawn(request):
    made = MADE[request.param]() if request.param in MADE else checked(request.param)
    return made, lvm.plots.graph(made)


def parts(figure, kind):
    """The patches of one kind with their ids, without the kind's name."""
    patches = [(patch.get_gid() or "", patch) for patch in figure.axes[0].patches]
    return [(gid.removeprefix(kind + ":"), patch) for gid, patch in patches if gid.startswith(kind + ":")]


def ellipses(figure):
    return {name: (np.array(p.center), np.array([p.width, p.height]) / 2) for name, p in parts(figure, "site")}


def boxes(figure):
    found = []
    for name, patch in parts(figure, "plate"):
        low = np.array([patch.get_x(), patch.get_y()])
        found.append((name, low, low + np.array([patch.get_width(), patch.get_height()])))
    return found


def of_model(made):
    return [s for s in made.sites if s.role != "auxiliary"]


def areas(figure, texts):
    """Areas of texts in inches, as the renderer draws them."""
    figure.canvas.draw()
    inverse = figure.axes[0].transData.inverted()
    return [text.get_window_extent().transformed(inverse) for text in texts]


def curve(arrow, steps=200):
    """Points of an arrow's shaft, whose last point is its tip."""
    start, bend, end = arrow._path_original.vertices
    t = np.linspace(0.0, 1.0, steps)[:, None]
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end


def lies_in(points, centre, radii):
    return np.square((points - centre) / radii).sum(-1) < 1


def test_every_site_is_drawn_once_and_shaded_where_it_is_observed(drawn):
    made, figure = drawn
    assert sorted(name for name, _ in parts(figure, "site")) == sorted(s.name for s in of_model(made))
    shade = {patch.get_facecolor()[0] for name, patch in parts(figure, "legend") if name == "observed"}
    assert len(shade) == 1
    assert 0.5 < min(shade) < 0.95
    for name, patch in parts(figure, "site"):
        role = next(s.role for s in made.sites if s.name == name)
        assert {patch.get_facecolor()[0]} == (shade if role == "observed" else {1.0})


def test_every_arrow_is_drawn_once_and_joins_its_sites(drawn):
    made, figure = drawn
    expected = sorted((source, target) for target, sources in made.parents.items() for source in sources)
    assert sorted(tuple(gid.split(":")) for gid, _ in parts(figure, "edge")) == expected
    at = ellipses(figure)
    for gid, arrow in parts(figure, "edge"):
        source, target = gid.split(":")
        shaft = curve(arrow)
        for name, point in ((source, shaft[0]), (target, shaft[-1])):
            centre, radii = at[name]
            assert not lies_in(point, centre, radii - 0.01), f"{gid} ends under {name}"
            assert lies_in(point, centre, radii + 0.06), f"{gid} does not reach {name}"
        assert at[source][0][1] > at[target][0][1], f"{gid} points upwards"


def test_no_arrow_runs_under_a_site(drawn):
    _, figure = drawn
    for (gid, arrow), (name, (centre, radii)) in itertools.product(parts(figure, "edge"), ellipses(figure).items()):
        if name not in gid.split(":"):
            assert not lies_in(curve(arrow), centre, radii).any(), f"{gid} runs under {name}"


def test_sites_keep_apart(drawn):
    _, figure = drawn
    for (first, (a, r)), (second, (b, s)) in itertools.combinations(ellipses(figure).items(), 2):
        assert (np.abs(a - b) > r + s).any(), f"{first} and {second} overlap"


def test_boxes_hold_their_sites_and_no_others(drawn):
    made, figure = drawn
    at = ellipses(figure)
    for s in of_model(made):
        centre, radii = at[s.name]
        around = [name for name, low, high in boxes(figure) if ((low < centre - radii) & (centre + radii < high)).all()]
        assert sorted(around) == sorted(plate.name for plate in s.plates)
        touched = [
            name for name, low, high in boxes(figure) if ((low < centre + radii) & (centre - radii < high)).all()
        ]
        assert sorted(touched) == sorted(around), f"a box runs through {s.name}"


def test_boxes_are_nested_or_apart(drawn):
    _, figure = drawn
    for (first, a, b), (second, c, d) in itertools.combinations(boxes(figure), 2):
        apart = (b <= c).any() or (d <= a).any()
        nested = ((a < c).all() and (d < b).all()) or ((c < a).all() and (b < d).all())
        assert apart or nested, f"{first} and {second} overlap"


def test_names_fit_where_they_stand(drawn):
    made, figure = drawn
    texts = figure.axes[0].texts
    at, held = ellipses(figure), {name: (low, high) for name, low, high in boxes(figure)}
    names = {text.get_text(): area for text, area in zip(texts, areas(figure, texts), strict=True)}
    for name, (centre, radii) in at.items():
        # letters that stick out above and below are in the area, so only its width is sharp
        assert names[name].width < 2 * radii[0] - 0.1
        assert lies_in(np.array([names[name].x0, centre[1]]), centre, radii)
    for plate in {plate for s in of_model(made) for plate in s.plates}:
        area = names[f"{plate.name}: {plate.size}"]
        assert any(
            ((low < (area.x0, area.y0)) & ((area.x1, area.y1) < high)).all()
            for name, low, high in boxes(figure)
            if name == plate.name
        )
        assert held[plate.name]
        for centre, radii in at.values():
            nearest = np.clip(centre, (area.x0, area.y0), (area.x1, area.y1))
            assert not lies_in(nearest, centre, radii)


def test_nothing_is_cut_off_and_texts_do_not_meet(drawn):
    _, figure = drawn
    panel = figure.axes[0]
    low, high = (np.array(corner) for corner in zip(panel.get_xlim(), panel.get_ylim(), strict=True))
    np.testing.assert_allclose(high - low, figure.get_size_inches())  # a unit is an inch
    written = areas(figure, panel.texts)
    for area in written:
        assert (low < (area.x0, area.y0)).all()
        assert ((area.x1, area.y1) < high).all()
    for _, arrow in parts(figure, "edge"):
        assert ((low < curve(arrow)) & (curve(arrow) < high)).all()
    for one, other in itertools.combinations(written, 2):
        assert not (one.x0 < other.x1 and other.x0 < one.x1 and one.y0 < other.y1 - 0.03 and other.y0 < one.y1 - 0.03)


def test_the_same_report_gives_the_same_picture(drawn):
    made, figure = drawn
    again = lvm.plots.graph(made)
    assert [p.get_path().vertices.tolist() for p in again.axes[0].patches] == [
        p.get_path().vertices.tolist() for p in figure.axes[0].patches
    ]


def test_words_stand_in_documents_whatever_dims_they_have():
    figure = lvm.plots.graph(checked("topics"))
    held = {name: (low, high) for name, low, high in boxes(figure)}
    assert (held["documents"][0] < held["words"][0]).all()
    assert (held["words"][1] < held["documents"][1]).all()


def test_plates_that_cross_are_drawn_again():
    names = sorted(name for name, _, _ in boxes(lvm.plots.graph(crossed())))
    assert names == ["items", "items", "people"] or names == ["items", "people", "people"]


def test_summed_out_sites_have_a_double_edge():
    made = checked("mixture diag")
    figure = lvm.plots.graph(made)
    at = ellipses(figure)
    unnamed = [patch for patch in figure.axes[0].patches if not patch.get_gid()]
    inner = [patch for patch in unnamed if np.allclose(patch.center, at["component"][0])]
    assert len(inner) == 1
    assert inner[0].width < 2 * at["component"][1][0]
    assert len(unnamed) == 2  # the other stands in the legend
    assert [name for name, _ in parts(figure, "legend")] == ["latent", "summed out", "observed"]


def test_distributions_stand_beside_the_graph_and_the_legend_names_what_occurs():
    written = [text.get_text() for text in lvm.plots.graph(checked("eight schools")).axes[0].texts]
    assert {"mu ~ Normal", "tau ~ HalfCauchy", "theta ~ Normal", "y ~ Normal", "latent", "observed"} <= set(written)
    assert "summed out" not in written
    assert "data: 8" in written


def test_sites_of_the_guide_alone_are_not_drawn():
    made = report({"x": "z"}, site("z"), site("x", "observed", [DATA], ""), site("noise", "auxiliary", kl=""))
    assert sorted(ellipses(lvm.plots.graph(made))) == ["x", "z"]


def test_dollars_in_names_are_no_formula():
    figure = lvm.plots.graph(report({"x": "$a$"}, site("$a$"), site("x", "observed", [DATA], "")))
    figure.canvas.draw()
    text = next(text for text in figure.axes[0].texts if text.get_text() == "$a$")
    assert not text.get_parse_math()


def test_a_program_is_checked_and_drawn():
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ppca = lvm.PPCA(2, 1)
    before, settings = state_of(ppca), dict(mpl.rcParams)
    known = "matplotlib.pyplot" in sys.modules
    with process_left_alone():
        figure = lvm.plots.graph(ppca, x)
    assert isinstance(figure, Figure)
    assert sorted(ellipses(figure)) == ["x", "z"]
    assert same_state(ppca, before)
    assert dict(mpl.rcParams) == settings
    assert ("matplotlib.pyplot" in sys.modules) == known


def test_what_cannot_be_drawn_is_refused():
    made = crossed()
    with pytest.raises(TypeError, match=r"a report and data.*write graph\(report\)"):
        lvm.plots.graph(made, torch.zeros(3))
    with pytest.raises(TypeError, match=r"got a PPCA without data.*graph\(program, data\)"):
        lvm.plots.graph(lvm.PPCA(2, 1))
    with pytest.raises(TypeError, match=r"engine='graphviz' runs the program.*graph\(program, data\)"):
        lvm.plots.graph(made, engine="graphviz")
    with pytest.raises(ValueError, match=r"engine='dot' is unknown: choose 'matplotlib' or 'graphviz'"):
        lvm.plots.graph(made, engine="dot")  # type: ignore[call-overload]
    with pytest.raises(lvm.ProgramError):
        lvm.plots.graph(lambda x: None, torch.zeros(3))


class Digraph:
    """Stands for `graphviz.Digraph`, which need not be installed: keeps what is put into it."""

    def __init__(self, name=None):
        self.name, self.nodes, self.edges, self.inner, self.attributes = name, {}, [], [], {}

    def attr(self, **attributes):
        self.attributes |= attributes

    def node(self, name, **attributes):
        self.nodes[name] = attributes

    def edge(self, source, target):
        self.edges.append((source, target))

    def subgraph(self, graph):
        self.inner.append(graph)


@pytest.fixture
def graphviz(monkeypatch):
    module = types.ModuleType("graphviz")
    module.Digraph = Digraph  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "graphviz", module)


@pytest.mark.usefixtures("graphviz")
def test_pyro_draws_with_graphviz_and_leaves_everything_as_it_was():
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ppca = lvm.PPCA(2, 1)  # float32: the model runs only where it is cast to the data's dtype
    before = state_of(ppca)
    with process_left_alone():
        drawing = lvm.plots.graph(ppca, x, engine="graphviz")
    assert same_state(ppca, before)
    assert drawing.edges == [("z", "x")]
    (plate,) = drawing.inner
    assert plate.attributes["label"] == "data"
    assert {name: node["fillcolor"] for name, node in plate.nodes.items()} == {"z": "white", "x": "gray"}
    assert "z ~ Normal" in drawing.nodes["distribution_description_node"]["label"]


@pytest.mark.usefixtures("graphviz")
def test_graphviz_draws_functions_with_parameters_and_without_a_guide():
    x = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with process_left_alone():
        drawing = lvm.plots.graph((model_of_mean, guide_of_mean), x, engine="graphviz")
        assert lvm.plots.graph(model_of_mean, x, engine="graphviz").edges == drawing.edges
    assert drawing.edges == [("loc", "x")]
    with pytest.raises(lvm.ProgramError):
        lvm.plots.graph(lambda x: None, x, engine="graphviz")


def test_graphviz_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "graphviz", None)
    with pytest.raises(ImportError, match="pip install graphviz"):
        lvm.plots.graph(lvm.PPCA(2, 1), torch.zeros(3, 2), engine="graphviz")
