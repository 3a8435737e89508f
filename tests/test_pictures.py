"""Label maps written and read back, what panels show, what line plots draw."""
import math

import numpy as np
import pytest
from PIL import Image, ImageColor

from common import pictures
from common.pictures import VOID, join_panels, line_plot, prediction_panel, save_mask
from common.schedules import RAMPS, draw_ramps

PALETTE = np.array([(0, 0, 0), (200, 10, 20), (30, 40, 250)], np.uint8)


@pytest.mark.parametrize("classes", [2, 255])  # two colours would fit 1-bit pixels: not wanted
def test_a_mask_reads_back_exactly_with_its_colours(tmp_path, classes):
    rng = np.random.default_rng(classes)
    palette = rng.integers(0, 256, (classes, 3)).astype(np.uint8)
    ids = rng.integers(0, classes, (13, 17))
    ids[2:4] = 255
    save_mask(ids, palette, tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as picture:
        assert picture.mode == "P" and np.array_equal(np.array(picture), ids)
        colours = np.array(picture.convert("RGB"))
        assert np.array_equal(colours[ids < 255], palette[ids[ids < 255]]) and (colours[2:4] == VOID).all()
    assert (tmp_path / "mask.png").read_bytes()[24] == 8  # bits per pixel, in the PNG's header


def test_a_panel_shows_each_picture_at_its_place_in_no_colour_but_the_classes():
    image = np.full((300, 600, 3), (20, 160, 60), np.uint8)  # shown with 480 x 240 pixels
    truth = np.random.default_rng(0).integers(0, 2, (300, 600))
    panel = np.array(prediction_panel([(image, truth, np.full((300, 600), 255))], PALETTE, "abc"))
    for i, colours in enumerate([{(20, 160, 60)}, {(0, 0, 0), (200, 10, 20)}, {VOID}]):
        left = pictures.GAP + i * (480 + pictures.GAP)
        cell = panel[pictures.LINE + 8:pictures.LINE + 248, left:left + 480]
        assert {*map(tuple, cell.reshape(-1, 3).tolist())} == colours


@pytest.mark.parametrize("classes", [2, 60])
def test_the_legend_has_the_colour_of_every_class(classes):
    palette = np.random.default_rng(0).integers(0, 256, (classes, 3)).astype(np.uint8)
    names = [f"class with a name {i}" for i in range(classes)]
    ids = np.full((64, 64), 255)
    panel = prediction_panel([(np.zeros((64, 64, 3), np.uint8), ids, ids)], palette, names)
    legend = panel.crop((0, pictures.LINE + pictures.CELL[1], *panel.size))
    shown = [colour for count, colour in legend.getcolors(10 ** 6) if count > 14 * 14]
    assert {*map(tuple, palette.tolist()), VOID} <= {*shown}


@pytest.mark.parametrize("rows, classes", [(1, 2), (3, 60)])
def test_joined_panels_show_the_pictures_once_and_every_prediction(rows, classes):
    palette = np.random.default_rng(0).integers(0, 256, (classes, 3)).astype(np.uint8)
    image, truth = np.full((128, 240, 3), 90, np.uint8), np.zeros((128, 240), int)
    panels = [prediction_panel([(image, truth, np.full((128, 240), k))] * rows, palette, ["name"] * classes)
              for k in (1, 0, 1)]
    joined = np.array(join_panels(panels, "abc"))
    one, step, gap = np.array(panels[0]), 480 + pictures.GAP, pictures.GAP
    assert joined.shape == (one.shape[0], one.shape[1] + 2 * step, 3)
    top, bottom = pictures.LINE, pictures.LINE + rows * (pictures.CELL[1] + gap)
    assert (joined[:, :gap + 2 * step] == one[:, :gap + 2 * step]).all()
    for i, panel in enumerate(panels, 2):
        column = joined[:, gap + i * step:gap + (i + 1) * step]
        assert (column[top:bottom] == np.array(panel)[top:bottom, -step:]).all()
        assert (column[:top] < 100).any()  # its title
    assert (joined[bottom:, one.shape[1]:] == 255).all()  # there is one legend
    other = prediction_panel([(image + 1, truth, truth)] * rows, palette, ["name"] * classes)
    with pytest.raises(ValueError, match="different images"):
        join_panels([panels[0], other], "ab")


def test_a_value_is_drawn_at_its_place_and_one_that_is_not_finite_nowhere(tmp_path):
    line = [(0, 0.0), (5, 50.0), (6, math.nan), (7, math.inf), (8, 80.0), (10, 100.0)]
    line_plot([("one", {"line": line, "dot": [(2, 75.0)]}), ("empty", {})], tmp_path / "plot.png")
    axes = np.array(Image.open(tmp_path / "plot.png"))[pictures.LINE:pictures.LINE + 240, 80:800]
    rows, columns = np.nonzero((axes == ImageColor.getrgb(pictures.SERIES[0])).all(2))
    assert np.abs(rows - (240 - columns / 3)).max() < 5
    assert {*columns * 10 // 720} == {0, 1, 2, 3, 4, 5, 7, 8, 9}  # around the points 5 and 8
    rows, columns = np.nonzero((axes == ImageColor.getrgb(pictures.SERIES[1])).all(2))
    assert abs(columns.mean() - 0.2 * 720) < 2 and abs(rows.mean() - 0.25 * 240) < 2


def test_every_ramp_is_drawn(tmp_path):
    draw_ramps(tmp_path / "ramps.png")
    axes = Image.open(tmp_path / "ramps.png").crop((80, pictures.LINE, 800, pictures.LINE + 240))
    drawn = {rgb for _, rgb in axes.getcolors()}
    assert {ImageColor.getrgb(name) for name in pictures.SERIES[:len(RAMPS)]} <= drawn
