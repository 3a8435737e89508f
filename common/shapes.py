"""`shapes`: a small segmentation benchmark drawn in memory, the embedded default. No files, no network.

96x96 images, background plus 8 object classes. A class has a shape and a texture of its own; its hue is only a hint,
spread so widely that neighbouring classes share hues. Size, turn, shading and number of the objects vary, they overlap,
and the background is cluttered with waves, noise and strokes in the objects' colours. 640 training and 160 validation
images.
"""
import colorsys
from functools import cache

import numpy as np

from common.datasets import SegmentationData

CLASSES = ("background", "disc", "square", "triangle", "ring", "cross", "star", "crescent", "bar")
SIZE, TRAIN, VAL = 96, 640, 160


class Drawn:
    """A split held in memory, with the interface of datasets.Split."""

    def __init__(self, name, count, seed):
        rng = np.random.default_rng([seed, len(name)])
        self.keys = [f"{name}_{i:04d}" for i in range(count)]
        self.images, self.masks = (np.stack(part) for part in zip(*(draw(rng) for _ in range(count))))

    def __len__(self):
        return len(self.keys)

    def image(self, i):
        return self.images[i].copy()

    def mask(self, i):
        return self.masks[i].copy()

    def has_mask(self, i):
        return True


drawn = cache(Drawn)


def inside(name, x, y):
    """Is (x, y) inside the shape? Coordinates relative to its centre and turn, in units of its radius."""
    r, a = np.hypot(x, y), np.arctan2(y, x)
    if name == "disc":
        return r < 0.9
    if name == "square":
        return np.maximum(abs(x), abs(y)) < 0.8
    if name == "triangle":
        return (y < 0.55) & (y > 1.73 * abs(x) - 1.05)
    if name == "ring":
        return (r < 1.0) & (r > 0.55)
    if name == "cross":
        return ((abs(x) < 0.3) & (abs(y) < 1)) | ((abs(y) < 0.3) & (abs(x) < 1))
    if name == "star":
        return r < 0.68 + 0.36 * np.cos(5 * a)
    if name == "crescent":
        return (r < 1.0) & (np.hypot(x - 0.55, y) > 0.8)
    return (abs(y) < 0.28) & (abs(x) < 1.15)  # bar


def texture(name, x, y):
    """Brightness pattern of a class, in -1..1, at pixels (x, y) from the centre, in the shape's own turn."""
    a, b = 2 * np.pi / 9 * x, 2 * np.pi / 9 * y
    waves = {"disc": 0 * a, "square": np.sin(a), "triangle": np.sin(b), "ring": np.sin(a) * np.sin(b),
             "cross": np.sin(0.7 * (a + b)), "star": np.sin(np.hypot(a, b)), "bar": np.sin(0.7 * (a - b)),
             "crescent": np.where(np.sin(a) * np.sin(b) > 0.4, 1, -1)}[name]
    return np.sign(waves)


def colour_of(rng, hue):
    return np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.45, 0.95), rng.uniform(0.5, 1.0))) * 255


def draw(rng):
    """One image uint8 [96, 96, 3] and its mask uint8 [96, 96]."""
    yy, xx = np.mgrid[:SIZE, :SIZE].astype(float)
    image = np.zeros((SIZE, SIZE, 3)) + rng.uniform(60, 190) + rng.normal(0, 10, 3)
    for _ in range(4):  # slow waves, grey with a tint
        (kx, ky), phase = rng.normal(0, 0.12, 2), rng.uniform(0, 6.3)
        image += (rng.normal(0, 18) + rng.normal(0, 5, 3)) * np.sin(kx * xx + ky * yy + phase)[..., None]
    for _ in range(rng.integers(3, 6)):  # clutter: thin strokes of any hue
        (x, y), turn = rng.uniform(0, SIZE, 2), rng.uniform(0, 3.2)
        u, v = (xx - x) * np.cos(turn) + (yy - y) * np.sin(turn), (yy - y) * np.cos(turn) - (xx - x) * np.sin(turn)
        image[(abs(u) < rng.uniform(1, 12)) & (abs(v) < rng.uniform(0.6, 1.8))] = colour_of(rng, rng.uniform())
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for _ in range(rng.integers(1, 4)):
        label = int(rng.integers(1, len(CLASSES)))
        radius, (x, y), turn = rng.uniform(20, 35), rng.uniform(15, SIZE - 15, 2), rng.normal(0, 0.3)
        u, v = (xx - x) * np.cos(turn) + (yy - y) * np.sin(turn), (yy - y) * np.cos(turn) - (xx - x) * np.sin(turn)
        where = inside(CLASSES[label], u / radius, v / radius)
        u, v = u[where], v[where]
        shade = 1 + 0.3 * texture(CLASSES[label], u, v) + (0.25 * rng.normal() * u + 0.15 * rng.normal() * v) / radius
        image[where] = colour_of(rng, (label - 1) / 8 + rng.normal(0, 0.11)) * shade[:, None]
        mask[where] = label
    image += rng.normal(0, 8, image.shape)
    return image.clip(0, 255).astype(np.uint8), mask


def open_shapes():
    """The benchmark, the same pixels on every machine and for every seed of a run. Drawn once per process."""
    hues = [(40, 40, 40)] + [tuple(int(255 * v) for v in colorsys.hsv_to_rgb(k / 8, 0.75, 0.95)) for k in range(8)]
    return SegmentationData("shapes", CLASSES, np.array(hues, np.uint8), drawn("train", TRAIN, 1), drawn("val", VAL, 2),
                            "val", ())
