"""Joint operations on an image and its mask. Image: tensor [3, H, W], uint8 until `normalise`; mask: uint8 [H, W] or
None for an unlabelled image. `rng` is a numpy Generator that belongs to this one sample (see streams.py)."""
import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IGNORE = 255


def to_tensors(image, mask=None):
    """numpy uint8 [H, W, 3] and [H, W] -> tensors [3, H, W] and [H, W] (without copying the mask's values anywhere)"""
    return torch.from_numpy(image).permute(2, 0, 1), None if mask is None else torch.from_numpy(mask)


def resize(image, mask, size, interpolation=InterpolationMode.BILINEAR):
    """To `size` = (H, W): image interpolated (antialiased), mask by the nearest pixel centre, as Pillow does it."""
    if tuple(image.shape[1:]) == tuple(size):
        return image, mask
    image = tvf.resize(image, list(size), interpolation, antialias=True)
    if mask is not None:
        mask = tvf.resize(mask[None], list(size), InterpolationMode.NEAREST_EXACT)[0]
    return image, mask


def resize_long_side(image, mask, length, interpolation=InterpolationMode.BICUBIC):
    """Longer side to `length`, aspect ratio kept."""
    height, width = image.shape[1:]
    scale = length / max(height, width)
    return resize(image, mask, (max(1, round(height * scale)), max(1, round(width * scale))), interpolation)


def normalise(image, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """uint8 [3, H, W] in 0..255 -> float32 with zero mean and unit variance per channel."""
    return tvf.normalize(tvf.to_dtype(image, torch.float32, scale=True), list(mean), list(std))


def denormalise(image, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """The inverse, for pictures: float [3, H, W] -> numpy uint8 [H, W, 3]."""
    mean, std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    return ((image.cpu().float() * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def pad_to(image, mask, size):
    """Pad bottom and right up to `size`: a normalised image with 0 (the mean colour), its mask with 255 (ignore)."""
    bottom, right = max(0, size[0] - image.shape[1]), max(0, size[1] - image.shape[2])
    if bottom or right:
        image = tvf.pad(image, [0, 0, right, bottom], fill=0)
        mask = mask if mask is None else tvf.pad(mask[None], [0, 0, right, bottom], fill=IGNORE)[0]
    return image, mask


def random_crop(image, mask, size, rng):
    """A window of `size` at a uniform place; the image must be at least that large (see pad_to)."""
    top = int(rng.integers(image.shape[1] - size[0] + 1))
    left = int(rng.integers(image.shape[2] - size[1] + 1))
    window = np.s_[..., top:top + size[0], left:left + size[1]]
    return image[window], mask if mask is None else mask[window]


def random_flip(image, mask, rng):
    """Mirror left-right with probability 1/2."""
    if rng.random() < 0.5:
        image, mask = tvf.horizontal_flip(image), mask if mask is None else tvf.horizontal_flip(mask)
    return image, mask


def random_shift(image, mask, pixels, rng):
    """Translate a normalised image by up to `pixels` each way; what enters is 0 / ignore."""
    dy, dx = (int(v) for v in rng.integers(-pixels, pixels + 1, 2))
    height, width = image.shape[1:]
    edges = [max(dx, 0), max(dy, 0), max(-dx, 0), max(-dy, 0)]  # left, top, right, bottom
    window = np.s_[..., max(-dy, 0):max(-dy, 0) + height, max(-dx, 0):max(-dx, 0) + width]
    image = tvf.pad(image, edges, fill=0)[window]
    return image, mask if mask is None else tvf.pad(mask[None], edges, fill=IGNORE)[0][window]


class ForScoring:
    """Evaluation transform: normalised, at the original size, or with `size` resized to it (mask: nearest pixel)."""

    def __init__(self, size=None):
        self.size = size

    def __call__(self, image, mask, rng=None):
        image, mask = to_tensors(image, mask)
        if self.size:
            image, mask = resize(image, mask, self.size)
        return normalise(image), mask
