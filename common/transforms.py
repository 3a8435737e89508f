"""Joint operations on an image and its mask: uint8 [3, H, W], and uint8 [H, W] or None for an
unlabelled image. `rng` is a numpy Generator that belongs to this one sample (see streams.py, which
normalises images once they are on the device)."""
import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MEAN_COLOUR = [round(255 * value) for value in IMAGENET_MEAN]  # what padding is filled with
IGNORE = 255  # the label of pixels that do not count


def to_tensors(image, mask=None):
    """numpy uint8 [H, W, 3] and [H, W] -> tensors [3, H, W] and [H, W]"""
    mask = None if mask is None else torch.from_numpy(mask)
    return torch.from_numpy(image).permute(2, 0, 1), mask


def resize(image, mask, size, interpolation=InterpolationMode.BILINEAR):
    """To `size` = (H, W): image interpolated (antialiased), mask by the nearest pixel centre."""
    if tuple(image.shape[1:]) != tuple(size):
        image = tvf.resize(image, list(size), interpolation, antialias=True)
    if mask is not None and tuple(mask.shape) != tuple(size):
        mask = tvf.resize(mask[None], list(size), InterpolationMode.NEAREST_EXACT)[0]
    return image, mask


def resize_long_side(image, mask, length):
    """Longer side to `length`, aspect ratio kept, bicubic."""
    height, width = image.shape[1:]
    scale = length / max(height, width)
    size = [max(1, round(side * scale)) for side in (height, width)]
    return resize(image, mask, size, InterpolationMode.BICUBIC)


def mean_and_std(device):
    """Of ImageNet, [3, 1, 1] each. Unlike in torchvision's normalize, the host does not wait for the
    GPU."""
    return [torch.tensor(values)[:, None, None].to(device, non_blocking=True)
            for values in (IMAGENET_MEAN, IMAGENET_STD)]


def normalise(image):
    """[.., 3, H, W], uint8 in 0..255 or float32 in 0..1 -> float32 with zero mean and unit variance
    per channel"""
    mean, std = mean_and_std(image.device)
    return (tvf.to_dtype(image, torch.float32, scale=True) - mean) / std


def denormalise(image):
    """The inverse: float32 [.., 3, H, W] -> float32 in 0..1"""
    mean, std = mean_and_std(image.device)
    return image * std + mean


def pad(image, mask, edges, label=IGNORE):
    """An image with the mean colour, its mask with a label. edges: left, top, right, bottom"""
    if any(edges):
        image = tvf.pad(image, edges, fill=MEAN_COLOUR)
        mask = mask if mask is None else tvf.pad(mask[None], edges, fill=label)[0]
    return image, mask


def random_crop(image, mask, size, rng, label=IGNORE):
    """A window of `size` at a uniform place. A smaller image is first padded, bottom and right."""
    bottom = max(0, size[0] - image.shape[1])
    right = max(0, size[1] - image.shape[2])
    image, mask = pad(image, mask, [0, 0, right, bottom], label)
    top = int(rng.integers(image.shape[1] - size[0] + 1))
    left = int(rng.integers(image.shape[2] - size[1] + 1))
    window = np.s_[..., top:top + size[0], left:left + size[1]]
    return image[window], mask if mask is None else mask[window]


def random_flip(image, mask, rng):
    """Mirror left-right with probability 1/2."""
    if rng.random() < 0.5:
        image = tvf.horizontal_flip(image)
        mask = mask if mask is None else tvf.horizontal_flip(mask)
    return image, mask


def random_shift(image, mask, pixels, rng):
    """Translate by up to `pixels` each way; what enters is the mean colour / ignore."""
    height, width = image.shape[1:]
    top, left = pixels - rng.integers(-pixels, pixels + 1, 2)
    image, mask = pad(image, mask, [pixels] * 4)
    window = np.s_[..., top:top + height, left:left + width]
    return image[window], mask if mask is None else mask[window]


def colour_jitter(image, rng, factor, hue):
    """Brightness, contrast and saturation times U(1 - factor, 1 + factor), hue turned by
    U(-hue, hue), in random order. image: a tensor, or a Pillow image, which is 3 times as fast."""
    adjust = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)
    amount = [*rng.uniform(1 - factor, 1 + factor, 3), rng.uniform(-hue, hue)]
    for i in rng.permutation(4):
        image = adjust[i](image, float(amount[i]))
    return image


def for_scoring(image, mask, size=None):
    """Evaluation transform: the original size, or with `size` resized to it."""
    image, mask = to_tensors(image, mask)
    return resize(image, mask, size or image.shape[1:])


def centre_square(image, mask, side):
    """Evaluation transform: shorter side resized to `side`, then the central square."""
    scale = side / min(mask.shape)
    size = [round(length * scale) for length in mask.shape]
    image, mask = resize(*to_tensors(image, mask), size)
    return tvf.center_crop(image, [side, side]), tvf.center_crop(mask[None], [side, side])[0]
