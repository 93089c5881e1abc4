"""Folders that an accident or an enemy has been at: an error of ours or the right answer, and never their code."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import shutil
import warnings

import pytest
import torch
from safetensors.torch import save_file
from small_programs import rows

import pyro_lvm as lvm
from pyro_lvm.storage.files import read_tree, write_tree
from pyro_lvm.storage.folder import CONFIG, sealed

SPRUNG: list[str] = []


def spring(word):
    SPRUNG.append(word)


class Trap:
    def __reduce__(self):
        return spring, ("sprung",)


HOSTILE = [
    None,
    True,
    -1,
    0,
    10**12,
    2**200,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "$tensor",
    "os.system",
    "../../etc/passwd",
    "x" * 10_000,
    [],
    {},
    [[[[[]]]]],
    {"$tensor": "nowhere"},
    {"$tuple": 3},
    {"$items": [[[], 1]]},
    {"class": "os.system", "arguments": {"command": "true"}},
    {"class": "VAE", "arguments": {"num_features": 10**6, "latent_dim": 10**6}},
    {"class": ["PPCA"], "arguments": {}},
    {"activation": "ReLU"},
    {"activation": []},
    [10**5] * 5,
    [0] * 100,
]


CENTRAL = ("format", "record", "program", "guide", "declared", "estimator", "seed", "n", "versions", "data", "tensors")
"""Keys whose values are each tried in every place; of the others some are drawn."""

USED_LATER = ("guide", "declared", "sites", "info", "data")
"""Keys whose values are used by the first evaluation."""


X = rows(30, 4, dtype=torch.float32)


def fits():
    x = X
    prior = lvm.priors.weakly_informative(x, 2)
    yield lvm.fit(lvm.PPCA(4, 2), x, steps=2, seed=0)
    yield lvm.em(lvm.GaussianMixture(2, 4), x, seed=0, missing="marginalize")
    yield lvm.fit(lvm.GaussianMixture(2, 4, prior=prior), x, steps=2, seed=0)
    yield lvm.fit(lvm.VAE(4, 2, hidden=(3,), likelihood="normal"), x, steps=2, seed=0)
    yield lvm.fit(lvm.VAE(4, 2, hidden=(3,), likelihood="normal"), x, steps=2, seed=0, amortized=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lvm.ProgramWarning)  # few draws are not to be trusted
        yield lvm.mcmc(lvm.GaussianMixture(2, 4, prior=prior), x, num_draws=6, num_warmup=6, num_chains=2, seed=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    found = []
    for number, fit in enumerate(fits()):
        fit.save(folder / f"{number}")
        found.append((fit, {entry.name: entry.read_bytes() for entry in (folder / f"{number}").iterdir()}))
    return found


def judge(folder, fit=None, x=None):
    """Load it, and look at ``x`` with it: an error of ours, or a fit; unless sealed anew, the one that was saved."""
    try:
        loaded = lvm.load(folder)
        if x is not None:
            loaded.posterior(x, 1, seed=0)
    except lvm.StorageError as error:
        if str(folder) not in str(error):
            pytest.fail(f"the folder is not named: {error}")
        return False
    except lvm.ProgramError:  # what a forger says of plates and rows is told as of any program
        return False
    if fit is not None:
        assert type(loaded) is type(fit)
        assert getattr(loaded, "elbo", None) == getattr(fit, "elbo", None)
        assert loaded.info == fit.info
        assert loaded._snapshot.keys() == fit._snapshot.keys()
        assert all(torch.equal(value, fit._snapshot[name]) for name, value in loaded._snapshot.items())
    repr(loaded)
    return True


def tensors_of(files):
    """The name of the file of tensors."""
    return next(name for name in files if name != CONFIG)


def put(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def damaged(content, draw):
    kind = draw.randrange(4)
    at = draw.randrange(len(content))
    if kind == 0:
        return content[:at]
    changed = bytearray(content)
    if kind == 1:
        changed[at] ^= 1 << draw.randrange(8)
    elif kind == 2:
        changed[at : at + draw.randrange(1, 20)] = draw.randbytes(draw.randrange(20))
    else:
        changed += draw.randbytes(draw.randrange(1, 9))
    return bytes(changed)


def test_accidents(saved, tmp_path):
    draw, loaded = random.Random(0), 0
    for number in range(1600):
        fit, files = saved[number % len(saved)]
        name = draw.choice((CONFIG, tensors_of(files)))
        put(tmp_path / "fit", files | {name: damaged(files[name], draw)})
        loaded += judge(tmp_path / "fit", fit)
    assert loaded < 160  # a blank more or less between words of JSON is no damage


def test_files_that_are_exchanged_or_gone(saved, tmp_path):
    for i, (_, one) in enumerate(saved):
        for j, (_, other) in enumerate(saved):
            put(tmp_path / "fit", {CONFIG: one[CONFIG], tensors_of(one): other[tensors_of(other)]})
            assert judge(tmp_path / "fit") == (i == j)
        for name in one:
            put(tmp_path / "fit", one)
            (tmp_path / "fit" / name).unlink()
            assert not judge(tmp_path / "fit")
            (tmp_path / "fit" / name).mkdir()
            assert not judge(tmp_path / "fit")
            (tmp_path / "fit" / name).rmdir()
    shutil.rmtree(tmp_path / "fit")
    assert not judge(tmp_path / "fit")


def places(tree, path=()):
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:2]) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def changed(tree, path, value):
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = changed(tree[path[0]], path[1:], value)
    return copy


def seal(config):
    if isinstance(config, dict):
        config.pop("sha256", None)
        config["sha256"] = sealed(config)
    return json.dumps(config).encode()


def test_hostile_values_with_digests_of_their_own(saved, tmp_path):
    draw, count = random.Random(1), 0
    for fit, files in saved:
        config = json.loads(files[CONFIG])
        put(tmp_path / "fit", files | {CONFIG: seal(json.loads(files[CONFIG]))})
        assert judge(tmp_path / "fit", fit)
        every = list(places(config))
        central = [
            path for path in every if path[:1] in (("program",), ("guide",), ("format",), ("library",), ("tensors",))
        ]
        for path, value in [(p, v) for p in central for v in HOSTILE] + [
            (draw.choice(every), draw.choice(HOSTILE)) for _ in range(100)
        ]:
            (tmp_path / "fit" / CONFIG).write_bytes(seal(changed(config, path, value)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says that a layer without numbers has nothing to initialise
                judge(tmp_path / "fit", x=X if path and path[0] in USED_LATER else None)
            count += 1
    assert count > 1500


def test_trees_with_digests_of_their_own(saved, tmp_path):
    draw = random.Random(2)
    for _, files in saved:
        for _ in range(60):
            put(tmp_path / "fit", files)
            file = tmp_path / "fit" / tensors_of(files)
            tree = read_tree(file)
            path = draw.choice(list(places(tree)))
            other = draw.choice([None, 3, "word", {}, [], torch.ones(2), torch.ones(2).half(), {"a": {"b": 1}}, (1,)])
            tree = changed(tree, path, other)
            write_tree(file, tree)
            reseal(file)
            judge(tmp_path / "fit")


def test_names_of_tensors_exchanged(saved, tmp_path):
    for _, files in saved:
        put(tmp_path / "fit", files)
        file = tmp_path / "fit" / tensors_of(files)
        tree = read_tree(file)
        names = list(tree["snapshot"])
        shapes = {name: tree["snapshot"][name].shape for name in names}
        one, other = next((a, b) for a in names for b in names if shapes[a] != shapes[b])
        snapshot = tree["snapshot"]
        snapshot[one], snapshot[other] = snapshot[other], snapshot[one]
        write_tree(file, tree)
        reseal(file)
        with pytest.raises(lvm.StorageError) as raised:
            lvm.load(tmp_path / "fit").posterior(rows(30, 4, dtype=torch.float32), 1)
        assert one in str(raised.value) or other in str(raised.value)


def reseal(file):
    """Give the text the digest that its file of tensors has now."""
    config = json.loads((file.parent / CONFIG).read_bytes())
    config["tensors"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (file.parent / CONFIG).write_bytes(seal(config))


def test_traps_are_not_sprung(saved, tmp_path):
    trap = pickle.dumps(Trap())
    pickle.loads(trap)
    assert SPRUNG == ["sprung"]  # it would be
    SPRUNG.clear()
    torch.save(Trap(), tmp_path / "torch")
    for _, files in saved:
        for content in (trap, (tmp_path / "torch").read_bytes()):
            for name in files:
                put(tmp_path / "fit", files | {name: content})
                assert not judge(tmp_path / "fit")
            put(tmp_path / "fit", files | {tensors_of(files): content})
            reseal(tmp_path / "fit" / tensors_of(files))
            assert not judge(tmp_path / "fit")
        put(tmp_path / "fit", files)
        file = tmp_path / "fit" / tensors_of(files)
        save_file({"trap": torch.frombuffer(bytearray(trap), dtype=torch.uint8)}, file)
        reseal(file)
        assert not judge(tmp_path / "fit")
    assert SPRUNG == []


def test_brackets_without_end(saved, tmp_path):
    _, files = saved[0]
    for content in (b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000):
        put(tmp_path / "fit", files | {CONFIG: content})
        assert not judge(tmp_path / "fit")
    text = files[CONFIG].decode().rstrip().removesuffix("}") + ', "a": ' + "[" * 900 + "]" * 900 + "}"
    put(tmp_path / "fit", files | {CONFIG: text.encode()})
    assert not judge(tmp_path / "fit")


def test_no_name_leads_out_of_the_folder(saved, tmp_path):
    for _, files in saved:
        put(tmp_path / "fit", files)
        (tmp_path / "outside").write_bytes(files[tensors_of(files)])
        for name in ("../outside", str(tmp_path / "outside"), "config.json", "tensors.safetensors"):
            (tmp_path / "fit" / "tensors.safetensors").write_bytes(files[tensors_of(files)])
            config = json.loads(files[CONFIG])
            config["tensors"]["file"] = name
            (tmp_path / "fit" / CONFIG).write_bytes(seal(config))
            with pytest.raises(lvm.StorageError, match="names no file of tensors under its key 'tensors'"):
                lvm.load(tmp_path / "fit")
