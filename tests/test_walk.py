"""Closed forms of the built-in programs on any data: walked in parts, what they say of the same rows as a tensor."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from small_programs import rows
from torch.utils.data import DataLoader, Dataset, IterableDataset

import pyro_lvm as lvm
from pyro_lvm.data import Rows
from pyro_lvm.walk import Joined

pytestmark = pytest.mark.usefixtures("few_passes")

N, D = 23, 4


class Pairs(Dataset):
    """Rows of one array, or of two."""

    def __init__(self, *arrays):
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays[0])

    def __getitem__(self, i):
        return tuple(array[i] for array in self.arrays)


class Stream(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x)

    def __len__(self):
        return len(self.x)


@pytest.fixture(autouse=True)
def parts_of_seven(monkeypatch):
    monkeypatch.setattr("pyro_lvm.walk.ROWS_AT_A_TIME", 7)


@pytest.fixture
def x():
    return rows(N, D)


def all_kinds(x, path):
    """The same rows in every form that `fit` takes."""
    np.save(path / "a.npy", x[:9].numpy())
    np.save(path / "b.npy", x[9:].numpy())
    np.save(path / "whole.npy.array", x.numpy())
    np.save(path / "swapped.array", x.numpy().astype(">f8"))
    yield "memmap", np.load(path / "whole.npy.array.npy", mmap_mode="r")
    yield "memmap of another byte order", np.load(path / "swapped.array.npy", mmap_mode="r")
    for name in ("whole.npy.array.npy", "swapped.array.npy"):
        (path / name).rename(path / name.removesuffix(".npy"))
    yield "folder", lvm.datasets.folder(path)
    yield "array", x.numpy()
    yield "dataset", Pairs(x)
    yield "loader", DataLoader(Pairs(x), batch_size=5)
    yield "stream", Stream(x)
    yield "tuple", (x,)
    yield "dict", {"x": x}


def started(program, x):
    program = program.to(x.dtype)
    program.initialize(x, seed=0)
    return program


def programs(x):
    torch.manual_seed(0)
    mixture = started(lvm.GaussianMixture(2, D), x)
    ppca = started(lvm.PPCA(D, 2), x)
    full = started(lvm.FactorAnalysis(D, 2, "full"), x)
    bayes = started(lvm.BayesianPPCA(D, 2), x)
    vae = lvm.VAE(D, 2, (8,), likelihood="normal").double()
    ssvae = lvm.SemiSupervisedVAE(D, 3, 2, (8,), likelihood="normal").double()
    return [
        *((program, name) for program in (ppca, full) for name in ("encode", "log_prob", "posterior")),
        *((mixture, name) for name in ("log_prob", "responsibilities")),
        (bayes, "encode"),
        *((vae, name) for name in ("encode", "reconstruct")),
        *((ssvae, name) for name in ("encode", "classify", "reconstruct")),
        *((program, name) for program in (mixture, ppca) for name in ("aic", "bic")),
    ]


def tensors_of(found):
    if isinstance(found, float):
        return [torch.tensor(found, dtype=torch.float64)]
    if isinstance(found, torch.Tensor):
        return [found]
    return [found.mean, found.variance, getattr(found, "covariance_matrix", found.stddev)]


def test_any_data_give_what_a_tensor_gives(x, tmp_path):
    kinds = list(all_kinds(x, tmp_path))
    for program, name in programs(x):
        method = getattr(program, name)
        with torch.no_grad():
            whole = method(x)
        for kind, data in kinds:
            found = method(data)
            if isinstance(whole, torch.distributions.Distribution):
                assert (found.batch_shape, found.event_shape) == (whole.batch_shape, whole.event_shape)
            for here, there in zip(tensors_of(found), tensors_of(whole), strict=True):
                assert here.dtype == there.dtype
                assert torch.allclose(here, there, rtol=1e-12, atol=1e-13), (type(program), name, kind)
            assert not any(tensor.requires_grad for tensor in tensors_of(found))


def test_parts_of_the_same_rows_are_the_same_to_the_bit(x):
    ppca = started(lvm.PPCA(D, 2), x)
    with torch.no_grad():
        parts = torch.cat([ppca.log_prob(part) for part in x.split(7)])
    assert torch.equal(ppca.log_prob(x.numpy()), parts)


def test_gradients_of_tensors_flow(x):
    x = x.requires_grad_()
    for program in (lvm.GaussianMixture(2, D), lvm.PPCA(D, 2)):
        program = started(program, x.detach())
        assert torch.autograd.grad(program.log_prob(x).sum(), x)[0].abs().sum() > 0


def test_data_are_taken_in_the_precision_of_the_program(x):
    ppca = started(lvm.PPCA(D, 2), x.float())
    mixture = started(lvm.GaussianMixture(2, D), x.float())
    assert [program.log_prob(x.numpy()).dtype for program in (ppca, mixture)] == [torch.float32] * 2


def test_labels_among_the_data(x):
    torch.manual_seed(0)
    ssvae = lvm.SemiSupervisedVAE(D, 3, 2, (8,), likelihood="normal").double()
    y = torch.arange(N) % 4 - 1
    best = ssvae.classify(x).argmax(-1)
    completed = torch.where(y >= 0, y, best)
    whole = ssvae.encode(x, completed).mean
    for data in ((x, y), {"x": x.numpy(), "y": y.numpy()}, Pairs(x, y), DataLoader(Pairs(x, y), batch_size=4)):
        assert torch.allclose(ssvae.encode(data).mean, whole)
        assert torch.allclose(ssvae.classify(data), ssvae.classify(x))
    assert torch.allclose(ssvae.encode(x.numpy(), y.numpy()).mean, whole)
    assert torch.allclose(ssvae.encode(x, y).mean, whole)


def test_arrays_that_the_model_does_not_take_are_refused(x):
    words = r"the data have 2 arrays \(data\[0\], data\[1\]\), but the model of PPCA takes x: pass these"
    with pytest.raises(ValueError, match=words):
        lvm.PPCA(D, 2).log_prob((x, torch.arange(N)))
    with pytest.raises(ValueError, match=r"the data have 1 arrays \(rows\), but the model of PPCA takes x"):
        lvm.PPCA(D, 2).log_prob({"rows": x})
    with pytest.raises(TypeError, match="x is a list: pass a tensor or an array"):
        lvm.PPCA(D, 2).log_prob([1.0, 2.0])


def test_a_covariance_that_is_one_for_all_rows_is_kept_once(x):
    found = started(lvm.PPCA(D, 2), x).posterior(x.numpy())
    assert found.scale_tril.stride(0) == 0
    assert found.scale_tril.untyped_storage().nbytes() == 4 * 8


def test_a_covariance_that_is_one_until_values_are_missing(x):
    x[15, 2] = torch.nan
    ppca = started(lvm.PPCA(D, 2), x.nan_to_num(0.0))
    whole = ppca.posterior(x, missing="marginalize")
    found = ppca.posterior(x.numpy(), missing="marginalize")
    assert torch.allclose(found.scale_tril, whole.scale_tril, rtol=1e-10)
    assert torch.allclose(found.mean, whole.mean, rtol=1e-10)
    assert torch.allclose(ppca.log_prob(x.numpy(), missing="marginalize"), ppca.log_prob(x, missing="marginalize"))
    with pytest.raises(ValueError, match="x holds NaN values"):
        ppca.log_prob(x.numpy())


def test_a_loader_that_gives_other_rows_than_its_dataset(x):
    ppca = started(lvm.PPCA(D, 2), x)
    numbers = [*range(N), *range(N)]
    twice = ppca.log_prob(DataLoader(Pairs(x), batch_size=5, sampler=numbers))
    assert torch.allclose(twice, ppca.log_prob(x)[numbers])
    assert torch.allclose(ppca.log_prob(DataLoader(Pairs(x), batch_size=5, drop_last=True)), ppca.log_prob(x)[:20])


def test_what_would_not_fit_is_refused(x, monkeypatch):
    monkeypatch.setattr("pyro_lvm.memory.available", lambda: 300)
    vae = lvm.VAE(D, 2, (8,), likelihood="normal").double()
    words = r"encode\(\) for 23 rows would take 0.000736 MB, and 0.0003 MB are free: ask for some of the rows at a time"
    with pytest.raises(lvm.NotEnoughMemoryError, match=words):
        vae.encode(x.numpy())
    assert vae.encode(x).mean.shape == (N, 2)  # a tensor is the caller's own affair
    monkeypatch.setattr("pyro_lvm.memory.available", lambda: 736)
    assert vae.encode(x.numpy()).mean.shape == (N, 2)


def test_rows_are_put_where_they_belong():
    whole = torch.arange(24.0).reshape(2, 4, 3)
    joined = Joined(4, "draws")
    for start in (0, 1, 3):
        joined.add({"z": whole[:, start : min(start + 2, 4) if start else 1]}, {"z": 1})
    assert torch.equal(joined.result()["z"], whole)


def test_a_mixture_with_given_parameters(x, tmp_path):
    mixture = lvm.GaussianMixture(3, D, "diag")
    mixture.to(x.dtype)
    weights, locs, scales = rows(10, 3).softmax(-1), rows(30, D), 1.0 + rows(30, D, seed=1).abs()
    sites = {
        "weights": weights.reshape(2, 5, 3),
        "locs": locs.reshape(2, 5, 3, D),
        "scales": scales.reshape(2, 5, 3, D),
    }
    right = mixture.log_joint_given(x, sites)
    assert right.shape == (2, 5, N, 3)
    for _, data in all_kinds(x, tmp_path):
        torch.testing.assert_close(mixture.log_joint_given(data, sites), right)


# ------------------------------------------------------------------------------------------------- evaluations


def sharing(kind, x):
    """A fit with latents that all data share: labels summed out, or factors of each row."""
    if kind == "factors":
        return lvm.fit(lvm.BayesianPPCA(D, 2), x, steps=20, seed=0)
    mixture = lvm.GaussianMixture(2, D, "diag", prior=lvm.priors.weakly_informative(x, 2))
    return lvm.fit(mixture, x, guide=None if kind == "mean field" else mixture.conjugate_guide(), steps=20, seed=0)


@pytest.fixture
def sizes(monkeypatch):
    """Rows of every batch that an evaluation looked at."""
    seen = []
    take = Rows.take

    def watching(self, index, weight=None):
        seen.append(len(index))
        return take(self, index, weight)

    monkeypatch.setattr(Rows, "take", watching)
    return seen


@pytest.mark.parametrize("kind", ["mean field", "conjugate", "factors"])
def test_what_all_data_share_is_drawn_once_and_the_rows_are_walked(kind, x, sizes):
    fit = sharing(kind, x)
    trace = lvm.evaluation.batch_to_trace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_lvm.evaluation.batch_to_trace", lambda *_: min(trace(*_), 7))
        sizes.clear()
        draws = fit.posterior(x.numpy(), 4, seed=0)
        assert max(sizes) == 7
    guide = fit.program.guide if kind == "factors" else None
    for number in range(4):
        sites = {name: draws[name][number] for name in draws.draws}
        with torch.no_grad():
            joint = poutine.trace(poutine.condition(fit.program.model, data=sites)).get_trace(x).log_prob_sum()
            assert torch.allclose(draws.log_p[number], joint, rtol=1e-10)
            if guide is not None:
                held = poutine.Trace()
                for name, value in sites.items():
                    held.add_node(name, type="sample", name=name, value=value, is_observed=False, infer={})
                density = poutine.trace(poutine.replay(guide, trace=held)).get_trace(x).log_prob_sum()
                assert torch.allclose(draws.log_q[number], density, rtol=1e-10)


@pytest.mark.parametrize("kind", ["mean field", "factors"])
def test_averages_over_what_is_shared_are_those_of_all_rows(kind, x, monkeypatch):
    fit = sharing(kind, x)
    walked = fit.log_prob(x.numpy(), 100, seed=0)
    table = fit.responsibilities(x.numpy(), 100, seed=0) if kind != "factors" else None
    monkeypatch.setattr("pyro_lvm.walk.ROWS_AT_A_TIME", N)
    assert (walked - fit.log_prob(x, 100, seed=1)).abs().max() < 0.5
    if table is not None:
        # the draws of what is shared are the first part's, the same as those of all rows
        assert torch.allclose(table, fit.responsibilities(x, 100, seed=0), rtol=1e-10)
        assert torch.allclose(walked, fit.log_prob(x, 100, seed=0), rtol=1e-10)


def test_a_guide_that_looks_at_all_rows_for_what_they_share_is_shown_them_all(x, sizes):
    def model(x, size=None):
        loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 10.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0).expand([len(x), D]).to_event(1), obs=x)

    def guide(x, size=None):
        pyro.sample("loc", dist.Normal(x.mean(), pyro.param("s", torch.tensor(0.1).double())))

    fit = lvm.fit((model, guide), x, steps=2, seed=0)
    sizes.clear()
    draws = fit.posterior(x.numpy(), 400, seed=0)
    assert sizes[-1] == N
    assert abs(draws["loc"].mean() - x.mean()) < 4.5 * 0.2 / 20
    assert draws["loc"].shape == (400,)


def with_holes(x):
    x = x.clone()
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.3] = torch.nan
    x[:8] = x[:8].nan_to_num(0.0)  # a part without any
    return x


@pytest.mark.parametrize("program", [lambda: lvm.PPCA(D, 2), lambda: lvm.GaussianMixture(2, D), None])
def test_imputations_of_parts(program, x, monkeypatch):
    x = with_holes(x)
    if program is None:  # no conditional in closed form
        torch.manual_seed(0)
        program = lambda: lvm.VAE(D, 2, (8,), likelihood="normal").double()  # noqa: E731
    fit = lvm.fit(program(), x, steps=20, seed=0, missing="marginalize")
    draws = 300
    parts = fit.impute(x.numpy(), draws, seed=0)
    assert parts.shape == (draws, N, D)
    seen = ~x.isnan()
    assert torch.equal(parts[:, seen], x[seen].expand(draws, -1))
    holes = parts[:, ~seen]
    assert (holes.std(0) > 0).all()
    correlation = torch.corrcoef(holes.T) - torch.eye(holes.shape[1])
    rows_of = (~seen).nonzero()[:, 0]
    assert correlation[rows_of[:, None] != rows_of].abs().max() < 5.5 / draws**0.5  # no two rows share their noise
    monkeypatch.setattr("pyro_lvm.walk.ROWS_AT_A_TIME", N)
    together = fit.impute(x, draws, seed=1)[:, ~seen]
    error = ((holes.var(0) + together.var(0)) / draws).sqrt()
    assert ((holes.mean(0) - together.mean(0)) / error).abs().max() < 4.5


def test_imputing_by_a_program_takes_any_data(x):
    x = with_holes(x)
    ppca = started(lvm.PPCA(D, 2), x.nan_to_num(0.0))
    parts = ppca.impute(x.numpy(), 300, seed=0)
    assert torch.equal(parts[:, :7], x[:7].expand(300, -1, -1))
    assert torch.equal(parts, ppca.impute(Pairs(x), 300, seed=0))
    together = ppca.impute(x, 300, seed=1)
    error = ((parts.var(0) + together.var(0)) / 300).sqrt() + 1e-9
    assert ((parts.mean(0) - together.mean(0)) / error).abs().max() < 4.5


def test_imputations_that_would_not_fit_are_refused_before_any_is_drawn(x, monkeypatch):
    x = with_holes(x)
    vae = lvm.VAE(D, 2, (8,), likelihood="normal").double()
    fits = [lvm.fit(program, x, steps=2, seed=0, missing="marginalize") for program in (lvm.PPCA(D, 2), vae)]
    monkeypatch.setattr("pyro_lvm.memory.available", lambda: 10_000)
    monkeypatch.setattr("pyro_lvm.criticism.predictive._one_draw", None)
    for fit in fits:
        words = r"100 draws of (23 rows|x for 23 rows) would take 0.0736 MB, and 0.01 MB are free: ask for fewer draws"
        with pytest.raises(lvm.NotEnoughMemoryError, match=words):
            fit.impute(x, 100)
    for program in (fits[0].program, started(lvm.GaussianMixture(2, D), x.nan_to_num(0.0))):
        with pytest.raises(lvm.NotEnoughMemoryError, match="100 draws of 23 rows would take"):
            program.impute(x, 100)


def test_evidence_that_would_not_fit_is_refused(x, monkeypatch):
    ppca = started(lvm.PPCA(D, 2), x)
    monkeypatch.setattr("pyro_lvm.memory.available", lambda: 1000)
    for method in ("exact", "importance", "annealed"):
        with pytest.raises(
            lvm.NotEnoughMemoryError, match="the log evidence of 23 rows, and how far to trust it, would"
        ):
            lvm.log_evidence(ppca, x, 2, method=method)
    monkeypatch.setattr("pyro_lvm.memory.available", lambda: 6 * 8 * N)
    assert torch.allclose(lvm.log_evidence(ppca, x.numpy(), batch_size=5), ppca.log_prob(x))


# ------------------------------------------------------------------------------------------ a folder of pictures


@pytest.fixture
def pictures(tmp_path):
    """Torchvision's `ImageFolder` over 12 PNGs, half of them labelled, and the same in tensors."""
    from PIL import Image
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import to_tensor

    grey = np.random.default_rng(0).integers(0, 256, (12, 4, 4), dtype=np.uint8)
    labels = torch.where(torch.arange(12) < 6, -1, 1)
    for number, picture in enumerate(grey):
        where = tmp_path / ("0 unknown" if number < 6 else "1 known")
        where.mkdir(exist_ok=True)
        Image.fromarray(picture).save(where / f"{number:02}.png")

    def row(picture):
        return to_tensor(picture.convert("L")).flatten()

    x = torch.from_numpy(grey.astype(np.float32) / 255).flatten(1)
    return ImageFolder(str(tmp_path), transform=row, target_transform=lambda label: label or -1), x, labels


def semi_supervised():
    torch.manual_seed(0)
    return lvm.SemiSupervisedVAE(16, 2, 2, (8,), likelihood="normal")


def test_a_folder_of_pictures_is_fitted_as_its_pixels_are(pictures):
    folder, x, labels = pictures
    options = {"epochs": 3, "batch_size": 5, "seed": 0, "capture": False}
    from_folder = lvm.fit(semi_supervised(), folder, **options)
    from_tensors = lvm.fit(semi_supervised(), Pairs(x, labels), **options)
    assert from_folder.info["n"] == 12
    assert from_folder.elbo == from_tensors.elbo
    for name, value in from_tensors.params.items():
        assert torch.equal(from_folder.params[name], value)


def test_a_folder_of_pictures_is_walked_as_its_pixels_are(pictures):
    folder, x, labels = pictures
    program = semi_supervised()
    fit = lvm.fit(program, (x, labels), steps=3, seed=0)
    assert torch.allclose(program.classify(folder), program.classify(x))
    assert torch.allclose(program.encode(folder).mean, program.encode(x, labels).mean)
    assert torch.allclose(program.reconstruct(folder), program.reconstruct(x))
    data = (x, labels)
    assert torch.allclose(lvm.log_evidence(fit, folder, 20, seed=0), lvm.log_evidence(fit, data, 20, seed=0))
    draws = fit.posterior(folder, 3, seed=0)
    assert draws["z"].shape == (3, 12, 2)
    assert (draws["y"][:, 6:] == 1).all()


def test_a_program_without_labels_says_that_pictures_come_with_them(pictures):
    folder, _, _ = pictures
    vae = lvm.VAE(16, 2, (8,), likelihood="normal")
    with pytest.raises(
        TypeError, match=r"the data give 2 arguments by position, but model .* cannot be called with them"
    ):
        lvm.fit(vae, folder, steps=1)
    with pytest.raises(
        ValueError, match=r"the data have 2 arrays .*, but the model of VAE takes x: pass these, or a Data"
    ):
        vae.encode(folder)
