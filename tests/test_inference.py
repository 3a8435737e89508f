"""common/inference: predictions for a folder, what the test servers take, and what is refused."""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common.datasets.cityscapes import PALETTE as CITY_PALETTE
from common.datasets.voc import voc_palette
from common.inference import predict_folder
from common.settings import UserError
from conftest import CTX, error_of, run_here, run_script
from fixtures import CITY_IDS, save_picture

PALETTES = {"palette": np.arange(12, dtype=np.uint8).reshape(4, 3), "voc": voc_palette()[:21],
            "cityscapes": CITY_PALETTE, "bdd100k": CITY_PALETTE}


def network(x):
    """Logits that are largest for class k where the red channel is 10 k; classes: 21"""
    red = (x[:, :1] * 0.229 + 0.485) * 255
    return -(red - 10 * torch.arange(21.0)[:, None, None]) ** 2


def picture(path, classes=4, size=(20, 30), seed=0):
    """An image whose classes are those returned"""
    ids = np.random.default_rng(seed).integers(0, classes, size)
    save_picture(Path(path), np.stack([10 * ids] * 3, 2).astype(np.uint8))
    return ids


def predict(images, out, form="palette"):
    cfg = SimpleNamespace(images=str(images), out=str(out), format=form, scoring_size=None)
    palette = torch.from_numpy(PALETTES[form])
    predict_folder(lambda x: network(x)[:, :len(palette)], cfg, palette, CTX)


def files(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def test_the_tree_of_folders_is_kept_and_each_image_its_size(tmp_path):
    images, out = tmp_path / "images", tmp_path / "new/out"
    expected = {"a.png": picture(images / "a.png"),
                "test/berlin/b.more.png": picture(images / "test/berlin/b.more.png", size=(31, 17)),
                "test/bonn/b.more.png": picture(images / "test/bonn/b.more.png", seed=1)}
    predict(images, out)
    assert files(out) == list(expected)
    for name, ids in expected.items():
        saved = Image.open(out / name)
        assert np.array_equal(np.array(saved), ids) and saved.getpalette()[:12] == list(range(12))


@pytest.mark.parametrize("form, names, folder, mode, classes", [
    ("voc", ["more/2008_000001.png", "2012_004331.png"], "results/VOC2012/Segmentation/comp6_test_cls",
     "P", 21),
    ("bdd100k", ["test/ff55861e-a06b953c.png"], ".", "L", 19)])
def test_servers_get_their_folder_and_kind_of_png(tmp_path, form, names, folder, mode, classes):
    ids = [picture(tmp_path / "images" / name, classes) for name in names]
    predict(tmp_path / "images", tmp_path / "out", form)
    for name, expected in zip(names, ids):
        saved = Image.open(tmp_path / "out" / folder / Path(name).name)
        assert saved.mode == mode and np.array_equal(np.array(saved), expected)
    assert mode == "L" or saved.getpalette()[:63] == voc_palette()[:21].ravel().tolist()


def test_cityscapes_server_gets_ids_at_full_size_from_resized_logits(tmp_path):
    name = "leftImg8bit/test/berlin/berlin_000000_000019_leftImg8bit.png"
    ids = picture(tmp_path / "images" / name, 19, size=(8, 16))
    predict(tmp_path / "images", tmp_path / "out", "cityscapes")
    saved = Image.open(tmp_path / "out" / name)
    assert saved.mode == "L" and saved.size == (2048, 1024)
    logits = -(torch.from_numpy(10.0 * ids) - 10 * torch.arange(19.0)[:, None, None]) ** 2
    large = F.interpolate(logits[None], (1024, 2048), mode="bilinear", align_corners=False)
    expected = np.array(CITY_IDS)[large.argmax(1)[0].numpy()]
    assert (np.array(saved) == expected).mean() > 0.999  # but for ties in rounded colours


@pytest.mark.parametrize("form, names, wrong", [
    ("voc", ["photo.png"], "photo.png: --format voc expected the name of one of its images"),
    ("voc", ["a/2008_000001.png", "b/2008_000001.png"], "--format voc takes one of them only"),
    ("palette", ["a.png", "a.jpg"], "have one name; remove one"),
    ("palette", [], "expected a folder with images (.jpg, ")])
def test_names_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, form, names, wrong):
    for name in names:
        picture(tmp_path / "images" / name)
    assert wrong in error_of(predict, tmp_path / "images", tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_read_or_written_is_named_and_the_rest_predicted(tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    for name in ("a", "c", "more/e"):
        picture(images / f"{name}.png")
    (images / "more/d.jpg").write_bytes(b"no picture")
    (out / "c.png").mkdir(parents=True)
    bad = [f"{images}/{name}" for name in ("c.png", "more/d.jpg")]
    message = f"--images {images}: 2 of 4 images could not be predicted: {', '.join(bad)}"
    assert error_of(predict, images, out) == message
    assert (out / "a.png").is_file() and (out / "more/e.png").is_file()
    assert capsys.readouterr().out.count(f"{images}/more/d.jpg: cannot be read as an image (") == 1


def test_the_images_are_never_overwritten(tmp_path):
    images, link, other = tmp_path / "images", tmp_path / "link", tmp_path / "other"
    picture(images / "a.png")
    link.symlink_to(images)
    for out in (images, images / "new/out", link / "out", tmp_path / "x/../images", tmp_path):
        assert f"--out {out}: expected a folder that is not in --images" in error_of(predict, images, out)
    other.mkdir()
    (other / "a.png").symlink_to(images / "a.png")
    assert f"{other}/a.png is one of the images" in error_of(predict, images, other)


def test_torchrun_predicts_every_image_once_and_names_the_damaged_ones(whole, tmp_path):
    for k in range(3):
        picture(tmp_path / f"images/more/{k}.png", size=(40, 48))
    (tmp_path / "images/bad.png").write_bytes(b"no picture")
    arguments = ["--predict", whole("cct")[0] / "last.pt", "--images", tmp_path / "images",
                 "--out", tmp_path / "out", "--device", "cpu"]
    with pytest.raises(UserError, match="--format voc is for its 21 classes"):
        run_here("cct", *arguments, "--format", "voc")
    output = run_script("cct", *arguments, processes=2, check=1)
    assert "1 of 4 images could not be predicted" in output
    assert output.count("images/bad.png: cannot be read as an image") == 1
    assert files(tmp_path / "out") == [f"more/{k}.png" for k in range(3)]
