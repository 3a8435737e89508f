"""RandAugment and Cutout, with a map of where every pixel comes from. Only three_stage.py uses it;
it is of general use, and can be copied on its own.

strong: image -> (augmented image, I). I [H, W] holds for every pixel the place it comes from, as
y * W + x, or -1 for outside. warp moves anything that belongs to the image with this one map, so
that no pixel of a mask can disagree with its image. Operations and levels are those of the code of
Ke et al. (Three-Stage Self-Training), which differ from torchvision's RandAugment: every operation
has a random level, runs with probability 1/2, shears about a corner and shifts by a few pixels.
"""
import math

import numpy as np
import torch
from torchvision.transforms.v2 import functional as tvf

GREY = 127  # what is filled in


def enhance(level):
    """Factor of Pillow's enhancers: 0.28, 0.46, .., 1.72; level 5 changes nothing"""
    return 0.1 + 0.18 * level


SOLARIZE = (231, 205, 180, 154, 128, 103, 77, 52, 26)  # thresholds of the levels 1 to 9
POSTERIZE = (4, 4, 3, 3, 2, 2, 2, 1, 1)  # bits that are kept
PHOTOMETRIC = {  # (image uint8 [3, H, W], level 1..9) -> image
    "identity": lambda x, level: x,
    "auto_contrast": lambda x, level: tvf.autocontrast(x),
    "equalize": lambda x, level: tvf.equalize(x),
    "solarize": lambda x, level: tvf.solarize(x, SOLARIZE[level - 1]),
    "posterize": lambda x, level: tvf.posterize(x, POSTERIZE[level - 1]),
    "color": lambda x, level: tvf.adjust_saturation(x, enhance(level)),
    "contrast": lambda x, level: tvf.adjust_contrast(x, enhance(level)),
    "brightness": lambda x, level: tvf.adjust_brightness(x, enhance(level)),
    "sharpness": lambda x, level: tvf.adjust_sharpness(x, enhance(level))}
GEOMETRIC = {  # degrees, slope or pixels of one level
    "rotate": 3, "shear_x": 0.03, "shear_y": 0.03, "translate_x": 1, "translate_y": 1}
OPERATIONS = (*PHOTOMETRIC, *GEOMETRIC)


def source_map(name, amount, height, width):
    """I of one geometric operation, int64 [H, W]: every pixel takes the one that its centre (x, y)
    is moved to, as in Pillow's nearest-neighbour transforms. amount: degrees, slope or pixels."""
    x = np.arange(width) + 0.5
    y = np.arange(height)[:, None] + 0.5
    match name:
        case "rotate":
            cos = math.cos(math.radians(amount))
            sin = math.sin(math.radians(amount))
            u = x - width / 2
            v = y - height / 2
            x = cos * u - sin * v + width / 2
            y = sin * u + cos * v + height / 2
        case "shear_x": x = x + amount * y
        case "shear_y": y = y + amount * x
        case "translate_x": x = x + amount
        case "translate_y": y = y + amount
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    place = np.floor(y) * width + np.floor(x)
    return torch.from_numpy(np.where(inside, place, -1).astype(np.int64))


def warp(x, index, outside):
    """x [.., H, W] at the places I [.., H, W] (broadcast to x's shape), `outside` where I is -1"""
    index = index.expand(x.shape)
    taken = x.flatten(-2).gather(-1, index.flatten(-2).clamp(min=0).long())
    return torch.where(index < 0, outside, taken.view(x.shape))


def draw_operations(rng, draws):
    """RandAugment: [(name, level 1..9, sign)] of those drawn operations that are carried out, each
    with probability 1/2"""
    names = rng.integers(len(OPERATIONS), size=draws)
    levels = rng.integers(1, 10, size=draws)
    signs = 1 - 2 * rng.integers(2, size=draws)
    fires = rng.random(draws) < 0.5
    return [(OPERATIONS[names[k]], int(levels[k]), int(signs[k])) for k in range(draws) if fires[k]]


def strong(image, rng, cutout=32, cutouts=3, draws=3):
    """uint8 [3, H, W] -> (augmented uint8 [3, H, W], I int32 [H, W]). Operations run in the order
    drawn; cutouts touch the image only; what comes from outside the image is grey at the end."""
    height, width = image.shape[1:]
    index = torch.arange(height * width).view(height, width)
    for name, level, sign in draw_operations(rng, draws):
        if name in PHOTOMETRIC:
            image = PHOTOMETRIC[name](image, level)
        else:
            source = source_map(name, sign * level * GEOMETRIC[name], height, width)
            image = warp(image, source, GREY)
            index = warp(index, source, -1)
    hidden = index < 0
    rows = rng.integers(height, size=cutouts)
    columns = rng.integers(width, size=cutouts)
    for top, left in zip(rows - cutout // 2, columns - cutout // 2):
        hidden[max(top, 0):top + cutout, max(left, 0):left + cutout] = True
    return torch.where(hidden, GREY, image), index.int()
