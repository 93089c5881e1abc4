"""Trees on disk: what comes back is what was written, or an error that names the file."""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import save

from pyro_lvm.errors import StorageError
from pyro_lvm.storage.files import read_file, read_tree, write_file, write_tree
from pyro_lvm.storage.tree import pack, unpack

TREE = {
    "numbers": [1, 0.1, -math.inf, True, None, "word"],
    "nested": ({"a": torch.arange(3)}, {}),
    "by number": {0: {"step": torch.tensor(3.0)}, "$tensor": "a key that looks like a mark"},
    "milestones": Counter({10: 1, 20: 2}),
    "number of NumPy": 2.5,
    "kinds": [torch.ones(2, dtype=kind) for kind in (torch.bool, torch.uint8, torch.bfloat16, torch.float64)],
    "empty": torch.empty(0, 3),
    "a.b": torch.zeros(1),
    "a": {"b": torch.ones(1)},
}


def same(left, right):
    if isinstance(left, torch.Tensor):
        return type(left) is type(right) and left.dtype == right.dtype and bool((left == right).all())
    if isinstance(left, dict):
        return type(left) is type(right) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return left == right


def test_a_tree_comes_back_from_disk_as_it_was(tmp_path):
    write_tree(tmp_path / "tree", TREE | {"number of NumPy": np.float64(2.5)})
    assert same(read_tree(tmp_path / "tree"), TREE)


def test_a_float_keeps_every_digit(tmp_path):
    numbers = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    write_tree(tmp_path / "tree", numbers)
    assert read_tree(tmp_path / "tree") == numbers


def test_what_was_packed_does_not_move_with_its_source():
    weights = torch.ones(2)
    _, tensors = pack([weights, weights[:1]], "state")
    weights.zero_()
    assert torch.equal(tensors["state.0"], torch.ones(2))
    assert torch.equal(tensors["state.1"], torch.ones(1))


def test_what_would_need_code_to_come_back_is_refused_by_its_place():
    with pytest.raises(StorageError, match=r"state\.optimizer\.0 is a function: only numbers, strings, tensors"):
        pack({"optimizer": [lambda: 0]}, "state")


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        ({"$tensor": "absent"}, "tensor 'absent' is missing"),
        ({"$tensor": ["absent"]}, "is missing"),
        ({"$tensor": "a", "$tuple": []}, "no mark that a file has"),
        ({"$code": "import os"}, "no mark that a file has"),
        ({"$items": [1]}, "pairs of a key and a value"),
        ({"$items": [[[], 1]]}, "pairs of a key and a value"),
    ],
)
def test_marks_that_nobody_wrote_are_refused(plain, words):
    with pytest.raises(StorageError, match=words):
        unpack(plain, {})


def test_every_bit_that_turns_is_noticed(tmp_path):
    path = tmp_path / "tree"
    write_tree(path, {"weights": torch.arange(5.0), "rate": 0.1})
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for place in generator.choice(len(whole) * 8, 300, replace=False):
        turned = bytearray(whole)
        turned[place // 8] ^= 1 << (place % 8)
        path.write_bytes(turned)
        with pytest.raises(StorageError, match="is damaged, or no file of this library"):
            read_tree(path)


@pytest.mark.parametrize("length", [0, 1, 8, 20, -1])
def test_a_file_that_is_cut_short_is_noticed(tmp_path, length):
    path = tmp_path / "tree"
    write_tree(path, {"weights": torch.arange(5.0)})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(StorageError, match="is damaged"):
        read_tree(path)


def test_foreign_files_are_no_trees_and_run_nothing(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").write_text, ("",))

    foreign = [
        pickle.dumps(Trap()),
        save({"weights": torch.ones(2)}),
        save({"weights": torch.ones(2)}, {"content": "{}", "sha256": "0"}),
        json.dumps({"__metadata__": {}}).encode(),
        b"\xff" * 100,
    ]
    for content in foreign:
        (tmp_path / "tree").write_bytes(content)
        with pytest.raises(StorageError, match="no file of this library"):
            read_tree(tmp_path / "tree")
    assert not (tmp_path / "sprung").exists()


def test_a_refused_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_file(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match=r"file cannot be written \(No space left on device\): see to room"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"absent cannot be read \(No such file or directory\): check the path"):
        read_file(tmp_path / "absent")
