"""Colour jitter and Gaussian blur of a batch on its device, with numbers of its own for every image
(torchvision's have one for all). Only s4gan_mlmt.py uses it; it can be copied on its own."""
import math

import torch
import torch.nn.functional as F


def colour_jitter(x, u, order, factor, hue):
    """Brightness, contrast and saturation times U(1 - factor, 1 + factor), hue turned by
    U(-hue, hue) of its circle. As torchvision's ColorJitter, but for one `order` of 0..3 per batch.

    x [B, 3, H, W] in 0..1; u [B, 4] ~ U[0, 1), an image's four numbers -> x's shape, in 0..1
    """
    brightness, contrast, saturation, turn = (2 * u - 1).T[..., None, None, None]
    for i in order:
        match i:
            case 0: x = blend(x, 0, 1 + factor * brightness)
            case 1: x = blend(x, grey(x).mean((2, 3), keepdim=True), 1 + factor * contrast)
            case 2: x = blend(x, grey(x), 1 + factor * saturation)
            case 3: x = turn_hue(x, hue * turn)
    return x


def blend(x, other, share):
    """A share of x, which may exceed 1, and the rest of the other"""
    return (share * x + (1 - share) * other).clamp(0, 1)


def grey(x):
    """[B, 3, H, W] -> [B, 1, H, W]"""
    red, green, blue = x.split(1, 1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def turn_hue(x, turn):
    """x [B, 3, H, W] to HSV, its hue turned by a share of the circle, [B, 1, 1, 1], and back"""
    red, green, blue = x.split(1, 1)
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    sixths = torch.where(value == red, green - blue,
                         torch.where(value == green, blue - red + 2 * chroma,
                                     red - green + 4 * chroma)) / chroma.clamp(min=1e-6)
    sixths = sixths + 6 * turn
    k = torch.cat([sixths + 5, sixths + 3, sixths + 1], 1) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x, u, low, high):
    """Gaussian blur whose standard deviation is U(low, high) pixels; beyond its edges an image goes
    on as they are. x [B, C, H, W]; u [B] ~ U[0, 1)"""
    sigma = low + (high - low) * u
    radius = math.ceil(3 * high)
    offset = torch.arange(-radius, radius + 1, device=x.device)
    kernel = (-0.5 * (offset / sigma.clamp(min=1e-3)[:, None]) ** 2).softmax(1)  # [B, 2 radius + 1]
    kernel = kernel.repeat_interleave(x.shape[1], 0)[:, None]
    planes = F.pad(x, [radius] * 4, mode="replicate").flatten(0, 1)[None]  # [1, B C, ..]
    planes = F.conv2d(planes, kernel[:, :, :, None], groups=len(kernel))
    return F.conv2d(planes, kernel[:, :, None], groups=len(kernel)).view(x.shape)
