"""Pictures by Pillow alone: palette PNGs of label maps, panels of examples, plots of curves."""
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.files import make_folder, replacing
from common.transforms import IGNORE

VOID = (224, 224, 192)  # the colour of 255, as in VOC's own masks
SERIES = ("royalblue", "orangered", "seagreen", "orchid", "dimgray", "goldenrod", "deepskyblue")
CELL = 480, 256  # the largest width and height of one picture in a panel
PLOT = 720, 240  # width and height of one plot's axes
LINE = 24        # height of a line of text
GAP = 12


def save_picture(picture, path):
    """Write a PNG, and its folder if there is none, so that `path` is always a whole file. Raises
    UserError if that fails."""
    make_folder(Path(path).parent, "folder")
    with replacing(path, "wb") as file:
        picture.save(file, format="PNG")


def coloured(ids, palette):
    """Label map, integers [H, W] in 0..C-1 or 255 -> palette picture whose pixel values are the
    class ids. palette: uint8 [C, 3]; 255 has the colour VOID."""
    colours = np.zeros((256, 3), np.uint8)  # Pillow would pack the pixels of fewer colours
    colours[:len(palette)] = palette
    colours[IGNORE] = VOID
    picture = Image.fromarray(np.asarray(ids).astype(np.uint8))
    picture.putpalette(colours.tobytes())
    return picture


def save_mask(ids, palette, path):
    """Write a label map as an 8-bit palette PNG, see `coloured`."""
    save_picture(coloured(ids, palette), path)


def prediction_panel(rows, palette, names, titles=("image", "truth", "prediction")):
    """One row of pictures per example, and the colours of all classes below. -> PIL image

    rows: list of (image uint8 [H, W, 3], label map [H, W] of 0..C-1 or 255, ..), one picture for
    each of `titles`; sizes may differ between rows. palette: uint8 [C, 3]; names: C strings.
    """
    font = ImageFont.load_default(16)
    widths = [ImageOps.contain(Image.fromarray(image), CELL).width for image, *_ in rows]
    entries = [*zip(names, np.asarray(palette).tolist(), strict=True), ("ignored", VOID)]
    entry = math.ceil(max(font.getlength(name) for name, _ in entries)) + 40  # swatch and space
    cell = max(100, entry // len(titles), *widths), CELL[1]
    width = len(titles) * (cell[0] + GAP) + GAP
    lines = math.ceil(len(entries) / (width // entry))
    legend = LINE + len(rows) * (cell[1] + GAP)  # its upper edge
    panel = Image.new("RGB", (width, legend + lines * LINE), "white")
    draw = ImageDraw.Draw(panel)
    for i, title in enumerate(titles):
        x = GAP + i * (cell[0] + GAP)
        draw.text((x + cell[0] // 2, LINE // 2), title, "black", font, "mm")
        for row, example in enumerate(rows):
            picture = Image.fromarray(example[0])
            if i > 0:
                picture = coloured(example[i], palette).convert("RGB")
            method = Image.Resampling.BICUBIC if i == 0 else Image.Resampling.NEAREST
            picture = ImageOps.pad(picture, cell, method, "white")
            panel.paste(picture, (x, LINE + row * (cell[1] + GAP)))
    for i, (name, rgb) in enumerate(entries):
        x = GAP + i // lines * entry  # the legend is filled column by column
        y = legend + i % lines * LINE
        draw.rectangle((x, y, x + 16, y + 16), tuple(rgb), "gray")
        draw.text((x + 24, y + 8), name, "black", font, "lm")
    return panel


def join_panels(panels, titles):
    """The first panel, and to its right the predictions of the others -> PIL image

    panels: pictures by prediction_panel, three columns wide; titles: one for each prediction.
    Raises ValueError if they show different images.
    """
    first = panels[0]
    column = (first.width - GAP) // 3
    lines = next(n for n in range(first.height)  # of the legend: whole rows are left above it
                 if (first.height - (1 + n) * LINE) % (CELL[1] + GAP) == 0)
    bottom = first.height - lines * LINE
    images_and_truth = GAP, LINE, 2 * column, bottom
    joined = Image.new("RGB", (first.width + (len(panels) - 1) * column, first.height), "white")
    joined.paste(first)
    draw = ImageDraw.Draw(joined)
    font = ImageFont.load_default(16)
    for i, (panel, title) in enumerate(zip(panels, titles, strict=True), 2):
        if panel.crop(images_and_truth).tobytes() != first.crop(images_and_truth).tobytes():
            raise ValueError("these panels show different images")
        x = GAP + i * column
        joined.paste("white", (x, 0, x + column, LINE))
        joined.paste(panel.crop((GAP + 2 * column, LINE, 3 * column, bottom)), (x, LINE))
        draw.text((x + (column - GAP) // 2, LINE // 2), title, "black", font, "mm")
    return joined


def short(value):
    """A number for the eye, three digits or the whole integer part: 0.0123, 3.11, 45600, 1e-05."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def line_plot(panels, path, x_label="step", ticks=None):
    """Write a PNG with one plot per panel, stacked; all have the same x axis, which begins at 0.

    panels: list of (title, {series name: [(x, y), ..]}); a y that is not finite leaves a gap; a
    point (x, y, spread) has a bar from y - spread to y + spread. ticks: {x: text}. If x_label is
    `step`, the legend also has the last value of every series.
    """
    font = ImageFont.load_default(14)
    width, height = PLOT
    left, right = 80, 80 + width  # of the axes
    curves = [(name, points) for _, series in panels for name, points in series.items()]
    legend = math.ceil(max([font.getlength(name) for name, _ in curves], default=0)) + 120
    x_high = max([x for _, points in curves for x, *_ in points], default=0) or 1
    ticks = ticks or {i / 4 * x_high: f"{i / 4 * x_high:g}" for i in range(5)}
    picture = Image.new("RGB", (right + legend, len(panels) * (height + 3 * LINE)), "white")
    draw = ImageDraw.Draw(picture)
    for number, (title, series) in enumerate(panels):
        top = number * (height + 3 * LINE) + LINE
        bottom = top + height
        ys = [end for points in series.values() for _, y, *spread in points if math.isfinite(y)
              for end in (y - sum(spread), y + sum(spread))] or [0, 1]
        unit = 10 ** math.floor(math.log10(max(ys) - min(ys) or abs(ys[0]) or 1))
        low = math.floor(min(ys) / unit)  # the axis goes from one multiple of the unit to another
        high = max(math.ceil(max(ys) / unit), low + 1)
        draw.text((left, top - 4), title, "black", font, "lb")
        draw.text((right, bottom + LINE), x_label, "gray", font, "rt")
        for i, y in enumerate(np.linspace(bottom, top, high - low + 1), low):
            draw.line((left, y, right, y), "lightgray")
            draw.text((left - 8, y), f"{i * unit:g}", "gray", font, "rm")
        free = left - 40  # from here on there is room for the text of a tick
        for x, text in sorted(ticks.items()):
            x = left + x / x_high * width
            draw.line((x, top, x, bottom), "lightgray")
            if x - font.getlength(text) / 2 > free:
                draw.text((x, bottom + 6), text, "gray", font, "mt")
                free = x + font.getlength(text) / 2 + 4
        for i, (name, points) in reversed([*enumerate(series.items())]):  # the first one on top
            rgb = SERIES[i % len(SERIES)]
            y = top + i * LINE + LINE // 2
            draw.rectangle((right + 16, y - 2, right + 36, y + 2), rgb)
            last = f"  {short(points[-1][1])}" if points and x_label == "step" else ""
            draw.text((right + 44, y), name + last, "black", font, "lm")
            bars = any(len(point) == 3 for point in points)
            origin = left + bars * 4 * (i - (len(series) - 1) / 2)  # bars stand side by side
            step = height / (high - low)
            pixels = [(origin + x / x_high * width, bottom - (y / unit - low) * step)
                      for x, y, *_ in points]
            for here, after, (_, _, *bar) in zip(pixels, pixels[1:] + pixels[-1:], points):
                if math.isfinite(here[1]):
                    draw.circle(here, 3 if len(points) < 50 else 1, rgb)  # seen if it is alone
                    if math.isfinite(after[1]):
                        draw.line((*here, *after), rgb, 2)
                    for spread in (*bar, *(-spread for spread in bar)):
                        end = here[1] + spread / unit * step
                        draw.line((*here, here[0], end), rgb)
                        draw.line((here[0] - 3, end, here[0] + 3, end), rgb)
    save_picture(picture, path)
