"""`shapes`: a small segmentation benchmark drawn in memory, the embedded default. No files, no network.

64x64 images, background plus 8 object classes. A class is a shape; its hue is only a hint (it is spread so widely
that neighbouring classes share hues), size, turn and brightness vary, objects overlap, and the background is cluttered
with texture and with strokes in the objects' colours. 640 training images, 160 for validation.
"""
import colorsys

import numpy as np

from common.datasets import SegmentationData

CLASSES = ("background", "disc", "square", "triangle", "ring", "cross", "star", "crescent", "bar")
SIZE, TRAIN, VAL = 64, 640, 160


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


def colour_of(rng, hue):
    return np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.45, 0.95), rng.uniform(0.5, 1.0))) * 255


def draw(rng):
    """One image uint8 [64, 64, 3] and its mask uint8 [64, 64]."""
    yy, xx = np.mgrid[:SIZE, :SIZE].astype(float)
    image = np.full((SIZE, SIZE, 3), 0.0) + rng.uniform(60, 190, 3)
    for _ in range(4):  # slow waves of colour
        kx, ky = rng.normal(0, 0.12, 2)
        image += rng.normal(0, 22, 3) * np.sin(kx * xx + ky * yy + rng.uniform(0, 6.3))[..., None]
    for _ in range(rng.integers(4, 9)):  # clutter: thin strokes and specks in any hue
        x, y, turn = rng.uniform(0, SIZE, 2).tolist() + [rng.uniform(0, 3.2)]
        u, v = (xx - x) * np.cos(turn) + (yy - y) * np.sin(turn), (yy - y) * np.cos(turn) - (xx - x) * np.sin(turn)
        image[(abs(u) < rng.uniform(1, 12)) & (abs(v) < rng.uniform(0.6, 1.8))] = colour_of(rng, rng.uniform())
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for _ in range(rng.integers(2, 5)):
        label = int(rng.integers(1, len(CLASSES)))
        radius, x, y, turn = rng.uniform(6, 14), rng.uniform(6, SIZE - 6), rng.uniform(6, SIZE - 6), rng.uniform(0, 6.3)
        u = ((xx - x) * np.cos(turn) + (yy - y) * np.sin(turn)) / radius
        v = ((yy - y) * np.cos(turn) - (xx - x) * np.sin(turn)) / radius
        where = inside(CLASSES[label], u, v)
        shade = 1 + 0.25 * rng.normal() * u[where] + 0.15 * rng.normal() * v[where]
        image[where] = colour_of(rng, (label - 1) / 8 + rng.normal(0, 0.08)) * shade[:, None]
        mask[where] = label
    image += rng.normal(0, 14, image.shape)
    return image.clip(0, 255).astype(np.uint8), mask


def open_shapes():
    """The benchmark, the same pixels on every machine and for every seed of a run."""
    hues = [(40, 40, 40)] + [tuple(int(255 * v) for v in colorsys.hsv_to_rgb(k / 8, 0.75, 0.95)) for k in range(8)]
    return SegmentationData("shapes", CLASSES, np.array(hues, np.uint8), Drawn("train", TRAIN, 1), Drawn("val", VAL, 2),
                            "val", ())
