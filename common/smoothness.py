"""The maps of the cluster assumption (CCT, Fig. 2 and 7): how far is every position from its 8
neighbours, in the image and in a network's features? Boundaries of classes should be far."""
import numpy as np
import torch
import torch.nn.functional as F

OFFSETS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]


def neighbour_distance(x, size, patch=1):
    """Mean Euclidean distance between the patches [C, patch, patch] around a position and around
    its 8 neighbours, at the size (H, W), to which x is resized. x: [1, C, h, w] -> [H, W]"""
    squares = 0
    for channels in x.float().split(64, 1):  # all at once, 2048 of them, would be gigabytes
        channels = F.interpolate(channels, size, mode="bilinear", align_corners=False)
        padded = F.pad(channels, (1, 1, 1, 1), mode="replicate")
        neighbours = (padded[:, :, 1 + dy:1 + dy + size[0], 1 + dx:1 + dx + size[1]]
                      for dy, dx in OFFSETS)
        squares = squares + torch.stack([(channels - other).square().sum(1)
                                         for other in neighbours], 1)
    before = patch // 2
    after = patch - 1 - before
    padded = F.pad(squares, (before, after, before, after), mode="replicate")
    sums = F.avg_pool2d(padded, patch, stride=1) * patch ** 2
    return sums.sqrt().mean(1)[0]


def smoothness_picture(image, x, features):
    """image | distances between its patches of 20x20 pixels | between features. Dark is far.

    image: uint8 [H, W, 3]; x [1, 3, h, w]: the same for the network; features [1, C, h/8, w/8].
    -> uint8 [H, 3 W, 3]
    """
    size = image.shape[:2]
    pictures = [image]
    for distance in (neighbour_distance(x, size, patch=20), neighbour_distance(features, size)):
        gray = 255 * (1 - distance / distance.max().clamp(min=1e-12))
        gray = gray.round().byte().cpu().numpy()
        pictures.append(np.stack([gray] * 3, 2))
    return np.concatenate(pictures, 1)
