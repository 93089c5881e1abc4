"""Closed forms of the built-in programs on any data: walked in parts, what they say of the same rows as a tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_programs import rows
from torch.utils.data import DataLoader, Dataset, IterableDataset

import pyro_lvm as lvm
from pyro_lvm.walk import Joined

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
    assert ppca.log_prob(x.numpy()).dtype == torch.float32


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
