"""RandAugment with its index map, to the pixel: against Pillow and the published levels."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ids
from PIL import Image

from common import randaugment
from common.randaugment import GEOMETRIC, PHOTOMETRIC, draw_operations, source_map, strong, warp

C = 5  # classes


@pytest.mark.parametrize("name", GEOMETRIC)
def test_source_map_is_pillows(name):
    """A few pixels of a rotation may differ: Pillow rounds its matrix to 15 digits."""
    numbers = Image.fromarray(np.arange(61 * 47, dtype=np.int32).reshape(47, 61) + 1)
    for level in (-9, -5, 2, 9):
        amount = level * GEOMETRIC[name]
        matrix = dict(shear_x=(1, amount, 0, 0, 1, 0), shear_y=(1, 0, 0, amount, 1, 0),
                      translate_x=(1, 0, amount, 0, 1, 0), translate_y=(1, 0, 0, 0, 1, amount))
        if name == "rotate":
            moved = numbers.rotate(amount)
        else:
            moved = numbers.transform(numbers.size, Image.Transform.AFFINE, matrix[name])
        wrong = np.array(moved) - 1 != source_map(name, amount, 47, 61).numpy()
        assert wrong.sum() <= 3 * (name == "rotate")


def forced(monkeypatch, *operations):
    monkeypatch.setattr(randaugment, "draw_operations", lambda rng, draws: list(operations))


def painted(mask):
    """-> (an image that has one colour per class, these colours)"""
    palette = torch.tensor([[10, 200, 60], [250, 30, 90], [0, 0, 0], [255, 255, 255], [127, 3, 5]]).byte()
    return palette[mask.long()].permute(2, 0, 1), palette


def test_image_and_mask_move_together_to_the_pixel(monkeypatch):
    """One operation or three: where the map has a source, the moved image is the painted moved mask;
    elsewhere the mask is 255 and the image grey. Soft masks move as hard ones do."""
    single = [[(name, level, sign)] for name in GEOMETRIC for level in (1, 5, 9) for sign in (1, -1)]
    rng = np.random.default_rng(0)
    triple = [[(list(GEOMETRIC)[k], level, 1) for k, level in rng.integers(1, 5, (3, 2))] for _ in range(20)]
    mask = ids(0, 37, 50, high=C).byte()
    image, palette = painted(mask)
    soft_mask = F.one_hot(mask.long(), C).permute(2, 0, 1).float()
    for operations in single + triple:
        forced(monkeypatch, *operations)
        x, index = strong(image, rng, cutouts=0)
        moved = warp(mask, index, 255)
        valid = index >= 0
        assert not valid.all()
        assert torch.equal(x.permute(1, 2, 0)[valid], palette[moved[valid].long()])
        assert (moved[~valid] == 255).all() and (x[:, ~valid] == 127).all()
        soft = warp(soft_mask, index, 0.0)
        assert torch.equal(soft.argmax(0)[valid], moved[valid].long()) and not soft[:, ~valid].any()


def test_operations_follow_each_other_as_drawn_and_see_grey_corners(monkeypatch):
    image = (60 + ids(1, 3, 30, 41, high=40)).byte()
    forced(monkeypatch, ("rotate", 9, 1), ("auto_contrast", 1, 1), ("shear_x", 8, -1))
    x, index = strong(image, np.random.default_rng(0), cutouts=0)
    rotated = warp(image, source_map("rotate", 27, 30, 41), 127)
    expected = warp(PHOTOMETRIC["auto_contrast"](rotated, 1), source_map("shear_x", -0.24, 30, 41), 127)
    assert torch.equal(x[:, index >= 0], expected[:, index >= 0])


@pytest.mark.parametrize("name", PHOTOMETRIC)
def test_photometric_operations_and_cutouts_do_not_move_pixels(monkeypatch, name):
    image = (90 + ids(0, 3, 40, 50, high=110)).byte()
    forced(monkeypatch, (name, 9, 1))
    for cutouts in (0, 3):
        x, index = strong(image, np.random.default_rng(0), 10, cutouts)
        assert torch.equal(index, torch.arange(2000).view(40, 50))
        assert torch.equal(x, image) == (name == "identity" and cutouts == 0)


def test_levels():
    ramp = torch.arange(256).byte().view(1, 16, 16).expand(3, 16, 16).clone()
    solarize = (231, 205, 180, 154, 128, 103, 77, 52, 26)
    bits = (4, 4, 3, 3, 2, 2, 2, 1, 1)
    factors = (0.28, 0.46, 0.64, 0.82, 1.0, 1.18, 1.36, 1.54, 1.72)
    for level in range(1, 10):
        expected = torch.where(ramp >= solarize[level - 1], 255 - ramp, ramp)
        assert torch.equal(PHOTOMETRIC["solarize"](ramp, level), expected)
        step = 2 ** (8 - bits[level - 1])
        assert torch.equal(PHOTOMETRIC["posterize"](ramp, level), ramp // step * step)
        bright = (factors[level - 1] * ramp).clamp(max=255)
        assert (PHOTOMETRIC["brightness"](ramp, level) - bright).abs().max() <= 1
    colours = ids(1, 3, 9, 9, high=256).byte()
    for name in ("color", "contrast", "brightness", "sharpness"):
        assert torch.equal(PHOTOMETRIC[name](colours, 5), colours)
        assert not torch.equal(PHOTOMETRIC[name](colours, 1), colours)
    assert GEOMETRIC == dict(rotate=3, shear_x=0.03, shear_y=0.03, translate_x=1, translate_y=1)


def test_statistics_of_the_draws():
    rng = np.random.default_rng(0)
    drawn = [operation for _ in range(12000) for operation in draw_operations(rng, 3)]
    names, levels, signs = zip(*drawn)
    assert len(drawn) / 36000 == pytest.approx(0.5, abs=0.01)
    for name in (*PHOTOMETRIC, *GEOMETRIC):  # 9 and 5
        assert names.count(name) / len(drawn) == pytest.approx(1 / 14, abs=0.006)
    assert np.bincount(levels) / len(drawn) == pytest.approx([0, *[1 / 9] * 9], abs=0.008)
    assert set(signs) == {1, -1} and np.mean(signs) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("size, share", [((321, 321), 0.0281), ((256, 512), 0.0222)])
def test_coverage_of_the_cutouts(size, share):
    rng = np.random.default_rng(0)
    image = torch.zeros(3, *size, dtype=torch.uint8)
    areas = [(strong(image, rng, draws=0)[0][0] == 127).sum().item() for _ in range(120)]
    assert max(areas) <= 3 * 32 * 32 and np.mean(areas) / image[0].numel() == pytest.approx(share, abs=0.0008)
