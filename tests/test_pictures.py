"""Label maps written and read back, the geometry and colours of panels, what line plots draw."""
import math
import os

import numpy as np
import pytest
from PIL import Image, ImageDraw

from common import pictures
from common.pictures import VOID, colour, line_plot, prediction_panel, save_mask, short

PALETTE = np.array([(0, 0, 0), (200, 10, 20), (30, 40, 250)], np.uint8)


# ------------------------------------------------------------------------------------------ label maps

@pytest.mark.parametrize("classes", [2, 3, 60, 255])  # two colours would fit 1-bit pixels: not wanted
def test_mask_round_trip(tmp_path, classes):
    rng = np.random.RandomState(classes)
    palette = rng.randint(0, 256, (classes, 3)).astype(np.uint8)
    ids = rng.randint(0, classes, (13, 17))
    ids[2:4] = 255
    save_mask(ids, palette, tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as picture:
        assert picture.mode == "P" and picture.format == "PNG" and picture.size == (17, 13)
        assert np.array_equal(np.array(picture), ids)
        stored = np.array(picture.getpalette(), np.uint8).reshape(-1, 3)
        assert np.array_equal(stored[:classes], palette) and tuple(stored[255]) == VOID
        assert np.array_equal(np.array(picture.convert("RGB")), colour(ids, palette))
    assert (tmp_path / "mask.png").read_bytes()[24:26] == bytes([8, 3])  # the header: 8 bits, palette
    assert os.listdir(tmp_path) == ["mask.png"]  # no temporary file is left


def test_a_failed_write_leaves_the_old_mask(tmp_path, monkeypatch):
    save_mask(np.ones((2, 2), int), PALETTE, tmp_path / "mask.png")

    def killed(self, path, format):
        path.write_bytes(b"half a fi")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save_mask(np.zeros((2, 2), int), PALETTE, tmp_path / "mask.png")
    assert (np.array(Image.open(tmp_path / "mask.png")) == 1).all()


def test_colour():
    assert colour(np.array([[0, 1], [2, 255]]), PALETTE).tolist() == [
        [[0, 0, 0], [200, 10, 20]], [[30, 40, 250], list(VOID)]]
    assert colour(np.zeros((2, 3), np.uint8), PALETTE).dtype == np.uint8


@pytest.mark.parametrize("wrong", [3, 254, 256, -1])
def test_an_id_without_a_colour_is_refused(tmp_path, wrong):
    ids = np.array([[0, wrong]])
    with pytest.raises(ValueError, match=rf"\[{wrong}\].*0\.\.2"):
        colour(ids, PALETTE)
    with pytest.raises(ValueError, match=rf"\[{wrong}\]"):
        save_mask(ids, PALETTE, tmp_path / "mask.png")
    assert not os.listdir(tmp_path)


# ------------------------------------------------------------------------------------------ panel

def example(height, width):
    """A green image; truth: left half class 1, right half 2, first row void; prediction: class 0."""
    image = np.full((height, width, 3), (20, 160, 60), np.uint8)
    truth = np.where(np.arange(width) < width // 2, 1, 2) * np.ones((height, 1), int)
    truth[0] = 255
    return image, truth, np.zeros((height, width), int)


def blocks(panel, colour_):
    """Bounding boxes (left, top, right, bottom) of the runs of rows that hold the colour."""
    hit = (np.array(panel) == colour_).all(2)
    rows = np.flatnonzero(np.diff(np.concatenate([[0], hit.any(1), [0]])))
    boxes = []
    for top, bottom in rows.reshape(-1, 2):
        columns = np.flatnonzero(hit[top:bottom].any(0))
        boxes.append((columns[0], top, columns[-1] + 1, bottom))
    return boxes


@pytest.mark.parametrize("size, shown", [
    ((64, 64), (256, 256)), ((60, 100), (120, 200)), ((128, 64), (256, 128)), ((200, 256), (200, 256)),
    ((300, 400), (300, 400)), ((360, 480), (360, 480)), ((1024, 2048), (240, 480)), ((500, 334), (360, 240))])
def test_panel_sizes_keep_the_aspect_ratio(size, shown):
    panel = prediction_panel([example(*size)], PALETTE, ["a", "b", "c"])
    left, top, right, bottom = blocks(panel, (20, 160, 60))[0]
    assert (bottom - top, right - left) == shown


def test_panel_shows_image_truth_and_prediction_side_by_side():
    panel = prediction_panel([example(64, 64), example(32, 64)], PALETTE, ["a", "b", "c"])
    pixels, factor = np.array(panel), 4
    for row, (left, top, right, bottom) in enumerate(blocks(panel, (20, 160, 60))):
        assert (right - left, bottom - top) == (256, (256, 128)[row])
        pitch = 256 + pictures.GAP
        truth = pixels[top:bottom, left + pitch:right + pitch]
        assert (truth[:factor] == VOID).all()  # enlarged by whole pixels: no mixed colours
        assert (truth[factor:, :128] == PALETTE[1]).all() and (truth[factor:, 128:] == PALETTE[2]).all()
        assert (pixels[top:bottom, left + 2 * pitch:right + 2 * pitch] == PALETTE[0]).all()
        assert (pixels[top:bottom, right:right + pictures.GAP] == 255).all()
    assert row == 1


def test_a_panel_may_have_other_columns(monkeypatch):
    texts, draw_text = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text",
                        lambda self, xy, text, *rest, **words: (texts.append(text), draw_text(self, xy, text, *rest, **words)))
    image, maps = np.full((64, 64, 3), (20, 160, 60), np.uint8), [np.full((64, 64), k) for k in (0, 1, 2, 1)]
    titles = ["image", "Stage 1", "Stage 2", "Stage 3", "truth"]
    panel = np.array(prediction_panel([(image, *maps)], PALETTE, ["a", "b", "c"], titles))
    assert texts == [*titles, "a", "b", "c"]
    (left, top, right, bottom), = blocks(panel, (20, 160, 60))
    for k, ids in enumerate(maps, 1):
        x = k * (256 + pictures.GAP)
        assert (panel[top:bottom, left + x:right + x] == PALETTE[ids[0, 0]]).all()
    with pytest.raises(ValueError):
        prediction_panel([(image, *maps[:2])], PALETTE, ["a", "b", "c"], titles)


def test_shrunk_label_maps_show_no_colour_but_the_classes():
    rng = np.random.RandomState(0)
    ids = rng.randint(0, 3, (700, 900))
    image = np.zeros((700, 900, 3), np.uint8)
    panel = np.array(prediction_panel([(image, ids, ids)], PALETTE, ["a", "b", "c"]))
    left = 2 * pictures.GAP + 463  # 360 / 700 of 900: the second column
    cell = panel[38:38 + 360, left:left + 463].reshape(-1, 3)
    assert set(map(tuple, cell.tolist())) == set(map(tuple, PALETTE.tolist()))


@pytest.mark.parametrize("classes, side", [(2, 20), (9, 64), (21, 64), (60, 300)])
def test_legend_names_every_class_beside_its_colour_and_nothing_is_clipped(monkeypatch, classes, side):
    texts, draw_text = [], ImageDraw.ImageDraw.text

    def text(self, xy, text, fill, font, anchor):
        texts.append((text, self.textbbox(xy, text, font, anchor=anchor), self.im.size))
        draw_text(self, xy, text, fill, font, anchor=anchor)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    names = [f"class with a name {i}" if i % 3 else f"c{i}" for i in range(classes)]
    palette = np.random.RandomState(0).randint(0, 256, (classes, 3)).astype(np.uint8)
    image = np.zeros((side, side, 3), np.uint8)
    with_void, without = np.full((side, side), 255), np.zeros((side, side), int)
    prediction_panel([(image, without, without)], palette, names)
    assert [t for t, _, _ in texts] == ["image", "truth", "prediction", *names]  # no void, none explained
    texts.clear()
    panel = prediction_panel([(image, with_void, without)], palette, names)
    assert [t for t, _, _ in texts] == ["image", "truth", "prediction", *names, "ignored"]
    for (_, (left, top, right, bottom), (width, height)), rgb in zip(texts[3:], [*palette.tolist(), VOID]):
        assert panel.getpixel((int(left) - 17, int(top + bottom) // 2)) == tuple(rgb)
        assert 0 <= left and 0 <= top and right <= width and bottom <= height
    boxes = [(left - 26, *rest) for _, (left, *rest), _ in texts]  # with the swatches
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])


def test_names_and_palette_must_agree():
    with pytest.raises(ValueError):
        prediction_panel([example(8, 8)], PALETTE, ["a", "b"])


# ------------------------------------------------------------------------------------------ line plot

def plotted(tmp_path, *panels):
    """The picture's plotting areas, left of the legend: one array per panel."""
    line_plot(list(panels), tmp_path / "plot.png")
    pixels, areas, y = np.array(Image.open(tmp_path / "plot.png").convert("RGB")), [], 0
    axis = (pixels == pictures.GREY).all(2)
    left = int(axis.sum(0).argmax())  # the vertical axes stand one above the other
    for _, series in panels:
        height = max(pictures.PLOT[1], len(series) * pictures.ENTRY) // 2
        y += pictures.ABOVE // 2
        areas.append(pixels[y:y + height, left + 1:left + pictures.PLOT[0] // 2])
        y += height + pictures.BELOW // 2
    return areas


def drawn(area, i):
    """(columns, rows) of the pixels that show the i-th series' colour."""
    rows, columns = np.nonzero((area == pictures._series_colour(i)).all(2))
    return columns, rows


def test_line_plot_draws_rising_and_falling_series_in_their_colours(tmp_path):
    series = {"up": [(s, s) for s in range(101)], "down": [(s, 100 - s) for s in range(101)]}
    area, = plotted(tmp_path, ("two", series))
    for i, sign in ((0, -1), (1, 1)):
        columns, rows = drawn(area, i)
        assert len(columns) > 300 and np.corrcoef(columns, rows)[0, 1] * sign > 0.99
        assert columns.min() < 10 and columns.max() > area.shape[1] - 10


def test_the_x_axis_may_be_no_step(tmp_path, monkeypatch):
    texts, draw_text = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text",
                        lambda self, xy, text, *rest, **words: (texts.append(text), draw_text(self, xy, text, *rest, **words)))
    line_plot([("roc", {"a": [(0.0, 0.0), (0.3, 1.0), (1.0, 1.0)]})], tmp_path / "roc.png", "false positive rate")
    assert "false positive rate" in texts and "step" not in texts and "0.5" in texts


def test_a_value_is_drawn_at_its_place(tmp_path):
    area, = plotted(tmp_path, ("dots", {"frame": [(0, 0.0), (10, 100.0)], "dot": [(5, 25.0)]}))
    columns, rows = drawn(area, 1)
    height, width = area.shape[:2]
    assert abs(columns.mean() - width / 2) < 2 and np.ptp(columns) < 8
    assert abs(rows.mean() - (height - 25 / 104 * height)) < 2  # 4 percent of air above 100


def test_the_axis_starts_at_zero_unless_that_wastes_half_of_it():
    assert pictures._span([2.0, 10.0]) == (0, 10) and pictures._span([8.0, 10.0]) == (8, 10)
    assert pictures._span([-1.0, 10.0]) == (-1, 10) and pictures._span([]) == (0, 1)


def test_series_have_distinct_colours():
    colours = [pictures._series_colour(i) for i in range(16)]
    distance = min(sum(abs(x - y) for x, y in zip(a, b)) for i, a in enumerate(colours) for b in colours[:i])
    assert distance > 40
    assert all(sum(c) < 3 * 190 for c in colours)  # dark enough to be seen on white


def test_values_that_are_not_finite_leave_a_gap(tmp_path):
    values = [1.0] * 100
    values[40:60] = [math.nan, math.inf, -math.inf, math.nan] * 5
    area, whole = plotted(tmp_path, ("gap", {"a": list(enumerate(values))}),
                          ("none", {"a": [(step, 1.0) for step in range(100)]}))
    missing = set(drawn(whole, 0)[0]) - set(drawn(area, 0)[0])
    width = area.shape[1]
    assert missing and min(missing) >= 39 / 99 * width - 1 and max(missing) <= 60 / 99 * width + 1
    assert len(missing) > 0.18 * width


def test_a_point_between_gaps_is_a_dot(tmp_path):
    values = [math.nan if step % 2 else 1.0 for step in range(99)]  # not one line, and more than 60 points
    area, = plotted(tmp_path, ("dots", {"a": list(enumerate(values))}))
    assert len(set(drawn(area, 0)[0])) > 50 * 4


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5, 1e-9, 1e12])
def test_constant_series_run_straight_through_the_middle(tmp_path, value):
    area, = plotted(tmp_path, ("constant", {"a": [(step, value) for step in range(0, 1000, 10)]}))
    columns, rows = drawn(area, 0)
    assert len(set(columns)) > 0.95 * area.shape[1] and np.ptp(rows) <= 2
    assert abs(rows.mean() / area.shape[0] - 0.5) < 0.03


@pytest.mark.parametrize("panels", [
    [("no series", {})], [("empty", {"a": []})], [("nan", {"a": [(1, math.nan), (2, math.inf)]})]])
def test_nothing_to_show_is_said(tmp_path, monkeypatch, panels):
    texts, draw_text = [], ImageDraw.ImageDraw.text

    def text(self, xy, text, *rest, **more):
        texts.append(text)
        draw_text(self, xy, text, *rest, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    area, = plotted(tmp_path, *panels)
    assert "nothing to show yet" in texts
    assert not len(drawn(area, 0)[0])
    line_plot([("full", {"a": [(1, 1.0)]})], tmp_path / "other.png")
    assert texts.count("nothing to show yet") == 1


def test_a_small_series_beside_a_large_one_is_enlarged_and_the_legend_says_so(tmp_path):
    line = [(0, 0.0), (100, 1.0)]
    large, lr, close = ([(step, value * size) for step, value in line] for size in (30, 0.01, 2))
    entries = pictures._legible({"large": large, "lr": lr, "close": close, "none": [], "zero": [(0, 0.0)]})
    notes = [note for _, note, _ in entries]
    assert notes == ["last 30", "last 0.01, drawn x 1000", "last 2", "no data", "last 0"]
    assert entries[1][2] == [(0, 0.0), (100, 10.0)] and entries[2][2] == close
    area, = plotted(tmp_path, ("both", {"w": large, "lr": lr}))
    assert np.ptp(drawn(area, 1)[1]) > 0.25 * area.shape[0]  # a third of the height, not flat on the axis


@pytest.mark.parametrize("low, high, texts", [
    (0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1"]), (0, 45600, ["0", "10k", "20k", "30k", "40k"]),
    (0, 2.5e-6, ["0", "5e-7", "1e-6", "1.5e-6", "2e-6", "2.5e-6"]), (-3, 4, ["-2", "0", "2", "4"]),
    (995, 1005, ["996", "998", "1000", "1002", "1004"]), (0, 7e6, ["0", "2M", "4M", "6M"]),
    (0.1, 0.75, ["0.2", "0.4", "0.6"])])
def test_ticks_are_round_numbers(low, high, texts):
    ticks = pictures._ticks(low, high, 5)
    assert [text for _, text in ticks] == texts
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick, _ in ticks)


def test_ticks_are_few_and_distinct_at_any_scale():
    rng = np.random.RandomState(0)
    for _ in range(300):
        low = float(rng.randn() * 10 ** rng.uniform(-8, 8))
        high = low + float(abs(low) * 10 ** rng.uniform(-3, 3))
        ticks = pictures._ticks(low, high, 5)
        assert 2 <= len(ticks) <= 6 and len({text for _, text in ticks}) == len(ticks)


def test_texts_of_a_plot_are_inside_it_and_do_not_overlap(tmp_path, monkeypatch):
    texts, draw_text = [], ImageDraw.ImageDraw.text

    def text(self, xy, text, fill, font, anchor):
        texts.append((text, self.textbbox(xy, text, font, anchor=anchor), self.im.size))
        draw_text(self, xy, text, fill, font, anchor=anchor)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    line_plot([("losses", {f"loss_with_a_long_name_{i}": [(s, -12345.6 * i * s) for s in range(1, 99)]
                           for i in range(9)}),
               ("mIoU", {"miou": [(98, 0.123456)]}), ("rest", {"lr": [(s, 1e-7 * s) for s in range(99)]})],
              tmp_path / "plot.png")
    assert {"losses", "mIoU", "rest", "step", "miou", "last 0.123"} <= {t for t, _, _ in texts}
    for i, (_, a, (width, height)) in enumerate(texts):
        assert 0 <= a[0] and 0 <= a[1] and a[2] <= width and a[3] <= height
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for _, b, _ in texts[:i])
    assert os.listdir(tmp_path) == ["plot.png"]


def test_short_numbers():
    numbers = [0.8123, 0.01234, 3.111, 45600, 1e-5, 0, 123.4, 2.5e7, -0.5, math.nan, math.inf]
    assert [short(n) for n in numbers] == [
        "0.812", "0.0123", "3.11", "45600", "1e-5", "0", "123", "2.5e+7", "-0.5", "nan", "inf"]
