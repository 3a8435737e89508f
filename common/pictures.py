"""Pictures by Pillow alone: palette PNGs of label maps, panels image | truth | prediction, line plots."""
import colorsys
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

VOID = (224, 224, 192)  # the colour of 255, as in VOC's own masks
INK, GREY, FAINT = (32, 32, 32), (110, 110, 110), (226, 226, 226)


def _save(picture, path):
    """Write a PNG so that `path` is always a whole file: beside it first, then renamed."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    picture.save(temporary, format="PNG")
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------ label maps

def _full_palette(ids, palette):
    """256 colours: the classes', unused black ones, VOID for 255. ValueError if `ids` has other ids."""
    used = np.unique(ids)
    wrong = used[((used < 0) | (used >= len(palette))) & (used != 255)]
    if wrong.size:
        raise ValueError(f"ids {wrong[:5].tolist()} are neither a class 0..{len(palette) - 1} nor 255")
    colours = np.zeros((256, 3), np.uint8)
    colours[:len(palette)] = palette
    colours[255] = VOID
    return colours


def save_mask(ids, palette, path):
    """Write a label map as an 8-bit palette PNG whose pixel values are the class ids: it reads back exactly.

    ids: integers [H, W], 0..C-1 or 255 (void), ValueError otherwise; palette: uint8 [C, 3].
    """
    ids = np.asarray(ids)
    picture = Image.fromarray(ids.astype(np.uint8))
    picture.putpalette(_full_palette(ids, palette).tobytes())  # 256 entries, lest Pillow packs to fewer bits
    _save(picture, path)


def colour(ids, palette):
    """Label map, integers [H, W] in 0..C-1 or 255 (ValueError otherwise) -> its colours, uint8 [H, W, 3]."""
    return _full_palette(ids, palette)[np.asarray(ids)]


# ------------------------------------------------------------------------------------------ panel

CELL = 480, 360  # larger pictures are shrunk to fit into this width and height
ENLARGED = 256   # smaller ones grow by a whole factor, to at most this side
GAP, LINE = 10, 24


def _cell_size(height, width):
    """(width, height) at which a picture is shown, its aspect ratio kept."""
    if max(height, width) <= ENLARGED:
        factor = ENLARGED // max(height, width)
        return width * factor, height * factor
    scale = min(1, CELL[0] / width, CELL[1] / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def prediction_panel(rows, palette, names, titles=("image", "truth", "prediction")):
    """One row per example in the columns image | truth | prediction, and the colours of all classes below.

    rows: list of (image uint8 [H, W, 3], truth int [H, W], prediction int [H, W]); sizes may differ per row.
    titles: of the columns; with others, a row has as many label maps, in their order.
    palette: uint8 [C, 3]; names: C strings. Label maps are resized by nearest neighbour: every colour shown
    is a class's own, or VOID where the truth is 255. Returns a PIL image.
    """
    title, label = ImageFont.load_default(18), ImageFont.load_default(15)
    sizes = [_cell_size(*image.shape[:2]) for image, *_ in rows]
    column = max([140, *(width for width, _ in sizes)])
    entries = [(name, tuple(int(v) for v in rgb)) for name, rgb in zip(names, palette, strict=True)]
    if any((np.asarray(ids) == 255).any() for _, *maps in rows for ids in maps):
        entries.append(("ignored", VOID))

    entry = math.ceil(max(label.getlength(name) for name, _ in entries)) + 46  # swatch, name and space
    across = len(titles) * (column + GAP) - GAP
    width = max(across + 2 * GAP, entry + GAP)
    lines = math.ceil(len(entries) / ((width - GAP) // entry))
    top = 18 + 2 * GAP
    legend = top + sum(height + GAP for _, height in sizes) + GAP
    panel = Image.new("RGB", (width, legend + lines * LINE + GAP), "white")
    draw, y = ImageDraw.Draw(panel), top

    lefts = [(width - across) // 2 + i * (column + GAP) for i in range(len(titles))]
    for x, text in zip(lefts, titles):
        draw.text((x + column // 2, top // 2), text, INK, title, anchor="mm")
    for (image, *maps), size in zip(rows, sizes):
        nearest, shrunk = Image.Resampling.NEAREST, size[0] < image.shape[1]
        cells = [Image.fromarray(image).resize(size, Image.Resampling.LANCZOS if shrunk else nearest)]
        cells += [Image.fromarray(colour(ids, palette)).resize(size, nearest) for ids in maps]
        for x, cell in zip(lefts, cells, strict=True):
            panel.paste(cell, (x + (column - size[0]) // 2, y))
        y += size[1] + GAP
    for i, (name, rgb) in enumerate(entries):  # down its columns, as one reads a list
        x, y = GAP + i // lines * entry, legend + i % lines * LINE
        draw.rectangle((x, y, x + 18, y + 18), rgb, GREY)
        draw.text((x + 26, y + 9), name, INK, label, anchor="lm")
    return panel


# ------------------------------------------------------------------------------------------ line plot
# Sizes are in half pixels: a plot is drawn twice as large and halved at the end, which smooths its lines.

PLOT, ENTRY, ABOVE, BELOW, MARGIN = (1440, 460), 76, 80, 56, 28
SERIES = [(0, 104, 178), (214, 84, 0), (0, 148, 108), (190, 80, 150), (110, 110, 110), (196, 150, 0),
          (70, 170, 225)]


def short(value):
    """A number for the eye, three digits or the whole integer part: 0.0123, 3.11, 45600, 1e-5."""
    if 1000 <= abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e+")


def _ticks(low, high, about):
    """[(tick, its text)]: multiples of 1, 2 or 5 times a power of ten in [low, high], at most about + 1."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 5) if m * power >= raw * 0.999), 10 * power)
    ticks = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    top = max(abs(tick) for tick in ticks)
    unit, suffix = (1e6, "M") if 1e6 <= top < 1e10 else (1e3, "k") if 1e4 <= top < 1e6 else (1, "")
    return [(t, f"{t / unit:.9g}".replace("e-0", "e-") + suffix if t else "0") for t in ticks]


def _span(values):
    """(low, high) around finite values: from zero if that leaves them half the room or more; never empty."""
    low, high = min(values, default=0), max(values, default=1)
    if 0 < low <= high / 2:
        low = 0
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(low) / 2 or 1
        low, high = low - pad, high + pad
    return low, high


def _series_colour(i):
    hue = colorsys.hsv_to_rgb(i * 0.618 % 1, 0.8, 0.75)
    return SERIES[i] if i < len(SERIES) else tuple(round(255 * v) for v in hue)


def _legible(series):
    """[(name, note, points)]: what is drawn of one panel. A series that would lie flat on the axis beside
    a much larger one is multiplied by 10, 100, ...; its note in the legend says so, after the last value."""
    peaks = [max((abs(v) for _, v in points if math.isfinite(v)), default=0) for points in series.values()]
    entries = []
    for (name, points), peak in zip(series.items(), peaks):
        factor = 10 ** math.floor(math.log10(max(peaks) / peak)) if 0 < peak < max(peaks) / 20 else 1
        note = f"last {short(points[-1][1])}" if points else "no data"
        note += f", drawn x {short(factor)}" if factor > 1 else ""
        entries.append((name, note, [(step, value * factor) for step, value in points]))
    return entries


def _draw_series(draw, pixels, rgb):
    """pixels: [(x, y)], None for a value that is not finite: a gap. Few or lone points are also dots."""
    run = []
    for point in [*pixels, None]:
        if point:
            run.append(point)
            continue
        if len(run) > 1:
            draw.line(run, rgb, 4, joint="curve")
        for x, y in run if len(pixels) <= 60 or len(run) == 1 else ():
            draw.ellipse((x - 6, y - 6, x + 6, y + 6), rgb)
        run = []


def line_plot(panels, path, x_label="step"):
    """Write a PNG with one line plot per panel, stacked, on equal step axes.

    panels: list of (title, {series name: [(step, value), ...]}); values that are not finite leave a gap. A
    series much smaller than its neighbours is drawn enlarged by a power of ten, named in the legend.
    """
    title, label, small = (ImageFont.load_default(2 * size) for size in (17, 14, 13))
    x_low, x_high = _span([step for _, series in panels for points in series.values() for step, _ in points])
    drawn = []  # per panel: title, entries, range of y, ticks
    for text, series in panels:
        entries = _legible(series)
        if x_label != "step":  # a last value means something in time only
            entries = [(name, "", points) for name, _, points in entries]
        low, high = _span([v for _, _, points in entries for _, v in points if math.isfinite(v)])
        air = 0.04 * (high - low)  # keeps the curves off the frame, but leaves zero on it
        low, high = low - air * (low != 0), high + air
        drawn.append((text, entries, low, high, _ticks(low, high, 5)))

    left = 2 * round(max(label.getlength(word) for *_, ticks in drawn for _, word in ticks) / 2) + MARGIN + 18
    right = left + PLOT[0]
    words = [max(label.getlength(name), small.getlength(note)) for _, es, *_ in drawn for name, note, _ in es]
    heights = [max(PLOT[1], len(entries) * ENTRY) for _, entries, *_ in drawn]
    width = right + 2 * MARGIN + 52 + math.ceil(max(words, default=0))
    picture = Image.new("RGB", (width, sum(heights) + len(drawn) * (ABOVE + BELOW) + 48), "white")
    draw, bottom = ImageDraw.Draw(picture), 0
    for (text, entries, low, high, ticks), height in zip(drawn, heights):
        top, bottom = bottom + ABOVE, bottom + ABOVE + height

        def at(step, value):
            x, y = (step - x_low) / (x_high - x_low), (value - low) / (high - low)
            return (left + x * PLOT[0], bottom - y * height) if math.isfinite(value) else None

        draw.text((left, top - 24), text, INK, title, anchor="ls")
        for tick, word in ticks:
            y = 2 * round(at(x_low, tick)[1] / 2)  # a whole pixel, or it would be smeared over two
            draw.line((left, y, right, y), FAINT, 2)
            draw.text((left - 16, y), word, GREY, label, anchor="rm")
        for tick, word in _ticks(x_low, x_high, min(8, x_high - x_low) if x_label == "step" else 8):
            x = 2 * round(at(tick, low)[0] / 2)
            draw.line((x, top, x, bottom), FAINT, 2)
            draw.text((x, bottom + 16), word, GREY, label, anchor="mt")
        draw.line((left, top, left, bottom, right, bottom), GREY, 2)
        for i, (name, note, points) in reversed(list(enumerate(entries))):  # the first one on top
            _draw_series(draw, [at(*point) for point in points], _series_colour(i))
            x, y = right + MARGIN, top + i * ENTRY + ENTRY // 4
            draw.line((x, y, x + 36, y), _series_colour(i), 8)
            draw.text((x + 52, y), name, INK, label, anchor="lm")
            draw.text((x + 52, y + 34), note, GREY, small, anchor="lm")
        if not any(math.isfinite(v) for _, _, points in entries for _, v in points):
            middle = (left + right) / 2, top + height * 0.7
            draw.text(middle, "nothing to show yet", GREY, label, anchor="mm")
        bottom += BELOW
    draw.text((right, bottom), x_label, GREY, label, anchor="rt")
    _save(picture.reduce(2), path)
