"""`shapes`: a small segmentation benchmark drawn in memory, the embedded default.

640 training and 160 validation images of 96x96 pixels, background plus 8 object classes. A class
has a shape and a texture of its own; its hue is only a hint, spread so widely that neighbouring
classes share hues. Size, turn, shading and number of the objects vary, they overlap, and the
background is cluttered with waves, noise and strokes in the objects' colours.
"""
import colorsys
from functools import cache

import numpy as np

from common.datasets.masks import SegmentationData, Split

SHAPES = {  # is (x, y) inside? Relative to the centre and turn, in units of the radius
    "disc": lambda x, y: np.hypot(x, y) < 0.9,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.8,
    "triangle": lambda x, y: (y < 0.55) & (y > 1.73 * abs(x) - 1.05),
    "ring": lambda x, y: (np.hypot(x, y) < 1.0) & (np.hypot(x, y) > 0.55),
    "cross": lambda x, y: ((abs(x) < 0.3) & (abs(y) < 1)) | ((abs(y) < 0.3) & (abs(x) < 1)),
    "star": lambda x, y: np.hypot(x, y) < 0.68 + 0.36 * np.cos(5 * np.arctan2(y, x)),
    "crescent": lambda x, y: (np.hypot(x, y) < 1.0) & (np.hypot(x - 0.55, y) > 0.8),
    "bar": lambda x, y: (abs(y) < 0.28) & (abs(x) < 1.15)}
CLASSES = ("background", *SHAPES)
SIZE = 96


class Drawn(Split):
    """A split held in memory."""

    def __init__(self, name, count, seed):
        rng = np.random.default_rng(seed)
        self.keys = [f"{name}_{i:04d}" for i in range(count)]
        pairs = [draw(rng) for _ in range(count)]
        self.images = np.stack([image for image, _ in pairs])
        self.masks = np.stack([mask for _, mask in pairs])

    def check_sizes(self):
        """Image and mask are drawn with one size."""

    def image(self, i):
        return self.images[i].copy()

    def mask(self, i):
        return self.masks[i].copy()


drawn = cache(Drawn)  # once per process


def texture(name, x, y):
    """Brightness of a class, -1..1, at pixels (x, y) from the centre, in the shape's own turn."""
    a = 2 * np.pi / 9 * x
    b = 2 * np.pi / 9 * y
    waves = {
        "disc": 0 * a, "square": np.sin(a), "triangle": np.sin(b), "ring": np.sin(a) * np.sin(b),
        "cross": np.sin(0.7 * (a + b)), "star": np.sin(np.hypot(a, b)),
        "bar": np.sin(0.7 * (a - b)), "crescent": np.sin(a) * np.sin(b) - 0.4}
    return np.sign(waves[name])


def turned(x, y, turn):
    return x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)


def colour_of(rng, hue):
    colour = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.45, 0.95), rng.uniform(0.5, 1.0))
    return np.array(colour) * 255


def draw(rng):
    """One image uint8 [96, 96, 3] and its mask uint8 [96, 96]."""
    yy, xx = np.mgrid[:SIZE, :SIZE].astype(float)
    image = np.zeros((SIZE, SIZE, 3)) + rng.uniform(60, 190) + rng.normal(0, 10, 3)
    for _ in range(4):  # slow waves, grey with a tint
        kx, ky = rng.normal(0, 0.12, 2)
        wave = np.sin(kx * xx + ky * yy + rng.uniform(0, 6.3))
        image += (rng.normal(0, 18) + rng.normal(0, 5, 3)) * wave[..., None]
    for _ in range(rng.integers(3, 6)):  # clutter: thin strokes of any hue
        x, y = rng.uniform(0, SIZE, 2)
        u, v = turned(xx - x, yy - y, rng.uniform(0, 3.2))
        colour = colour_of(rng, rng.uniform())
        image[(abs(u) < rng.uniform(1, 12)) & (abs(v) < rng.uniform(0.6, 1.8))] = colour
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for _ in range(rng.integers(1, 4)):
        label = int(rng.integers(1, len(CLASSES)))
        radius = rng.uniform(20, 35)
        x, y = rng.uniform(15, SIZE - 15, 2)
        u, v = turned(xx - x, yy - y, rng.normal(0, 0.3))
        where = SHAPES[CLASSES[label]](u / radius, v / radius)
        u, v = u[where], v[where]
        shade = 1 + 0.3 * texture(CLASSES[label], u, v)
        shade += (0.25 * rng.normal() * u + 0.15 * rng.normal() * v) / radius
        image[where] = colour_of(rng, (label - 1) / 8 + rng.normal(0, 0.11)) * shade[:, None]
        mask[where] = label
    image += rng.normal(0, 8, image.shape)
    return image.clip(0, 255).astype(np.uint8), mask


def open_shapes(root=None):
    """The same pixels on every machine and for every seed of a run; nothing is read from `root`."""
    hues = [colorsys.hsv_to_rgb(k / 8, 0.75, 0.95) for k in range(8)]
    palette = np.concatenate([[[40, 40, 40]], 255 * np.array(hues)]).astype(np.uint8)
    return SegmentationData("shapes", CLASSES, palette, drawn("train", 640, (1, 5)),
                            drawn("val", 160, (2, 3)), "val", one_size=True)
