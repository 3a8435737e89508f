"""Decoded images that are kept: the same pixels, whatever happened before."""
import os
import shutil
from collections import namedtuple

import numpy as np
import pytest
from conftest import CTX, last, run_here, same_state
from PIL import Image

from common import cache
from common import transforms as T
from common.datasets import open_dataset
from common.settings import BaseConfig, UserError


@pytest.fixture
def data(folder_data, tmp_path):
    root = shutil.copytree(folder_data, tmp_path / "data")
    return open_dataset("folder", str(root))


def keep(data, tmp_path, **values):
    cfg = BaseConfig(size=(40, 56), eval_size="train", out=str(tmp_path / "runs/a"), **values)
    return cache.cached(data, (40, 56), cfg, CTX)


def assert_same_pixels(kept, split, with_masks):
    for i in range(len(split)):
        image, mask = T.to_tensors(split.image(i), split.mask(i) if with_masks else None)
        image, mask = T.resize(image, mask, (40, 56))
        assert np.array_equal(kept.image(i), image.permute(1, 2, 0))
        assert not with_masks or np.array_equal(kept.mask(i), mask)


def test_pixels_are_those_of_resize_and_files_are_read_once(data, tmp_path):
    for _ in range(2):
        kept = keep(data, tmp_path)
        assert_same_pixels(kept.val, data.val, True)
        assert_same_pixels(kept.train, data.train, False)
    names = {path.name for path in (tmp_path / "runs/.cache").rglob("*.npy")}
    assert names == {f"{i}-image.npy" for i in range(len(data.train))} | {"0-mask.npy", "1-mask.npy"}
    for path in data.train.images:
        age = os.stat(path).st_mtime_ns
        with open(path, "wb"):
            pass  # it is not opened any more
        os.utime(path, ns=(age, age))
    kept = keep(data, tmp_path)
    for path in kept.train.folder.glob("*-image.npy"):  # as on a file system that keeps whole seconds
        seconds = os.stat(path).st_mtime_ns // 10**9 * 10**9
        os.utime(path, ns=(seconds, seconds))
    assert {kept.train.image(i).shape for i in range(len(data.train))} == {(40, 56, 3)}


def test_a_replaced_image_is_read_again(data, tmp_path):
    kept = keep(data, tmp_path).train
    before = np.array(kept.image(0))
    Image.fromarray(255 - data.train.image(0)).save(data.train.images[0], quality=95)
    assert not np.array_equal(kept.image(0), before)
    assert_same_pixels(kept, data.train, False)
    for content in (b"", b"\x93NUMPY"):  # as a power failure leaves it
        age = os.stat(data.train.images[2]).st_mtime_ns
        kept.image(2)
        (kept.folder / "2-image.npy").write_bytes(content)
        os.utime(kept.folder / "2-image.npy", ns=(age, age))
        assert_same_pixels(kept, data.train, False)
    os.remove(data.train.images[1])
    with pytest.raises(UserError, match=os.path.basename(data.train.images[1])):
        kept.image(1)


def test_other_sizes_roots_and_sizes_of_scoring_are_kept_apart(data, folder_data, tmp_path):
    train = keep(data, tmp_path).train.folder
    other = keep(open_dataset("folder", str(folder_data)), tmp_path).train.folder
    larger = cache.cached(data, (48, 56), BaseConfig(size=(48, 56), out=str(tmp_path / "runs/b")), CTX)
    assert len({train, other, larger.train.folder}) == 3
    assert larger.val is data.val  # scored at the original size


def test_no_room_none_and_a_folder_that_cannot_be_written(data, tmp_path, monkeypatch, capsys):
    assert keep(data, tmp_path, cache="none") is data
    kept = keep(data, tmp_path).train
    shutil.rmtree(kept.folder)
    with pytest.raises(UserError, match="image.npy cannot be written"):
        kept.image(0)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--cache"):
        keep(data, tmp_path, cache=str(tmp_path / "file/x"))
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(50000))
    capsys.readouterr()
    assert keep(data, tmp_path) is data
    assert "no room" in capsys.readouterr().out


@pytest.mark.parametrize("script, flags", [("c3_semiseg", "--scales 1 1 1"), ("three_stage", "--stages 2")])
def test_runs_with_and_without_are_the_same(tiny, tmp_path, script, flags):
    for name in ("none", str(tmp_path / "kept")):
        unsized = [flag for flag in tiny[script] if flag not in ("--long-side", "48")]
        run_here(script, *unsized, "--size", "40x48", *flags.split(), "--cache", name, "--out",
                 tmp_path / os.path.basename(name) / "run")
    a, b = (last(tmp_path / name / "run") for name in ("none", "kept"))
    assert a["config"].pop("cache") != b["config"].pop("cache")
    assert same_state(a, b) and any((tmp_path / "kept").rglob("*-image.npy"))
