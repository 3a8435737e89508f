"""Pseudo-masks, the labels that a network gave to training images: palette PNGs in a folder."""
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from common.datasets.masks import read_png
from common.miou import ConfusionMatrix
from common.settings import UserError
from common.transforms import IGNORE


def mask_path(folder, split, i):
    return Path(folder) / f"{split.keys[i]}.png"


def read_mask(path, shape, num_classes):
    """uint8 [H, W]. UserError if the file is missing, or classes or shape (None: any) are wrong."""
    mask = read_png(path)
    shape = mask.shape if shape is None else tuple(shape)
    if mask.shape != shape or ((mask >= num_classes) & (mask != IGNORE)).any():
        raise UserError(f"{path}: expected ids 0..{num_classes - 1} of (height, width) = {shape}, "
                        f"found {mask.shape} up to {mask.max()}")
    return torch.from_numpy(mask)


class PseudoLabelled:
    """Training images with the pseudo-masks of a folder in place of their masks, for Stream."""

    def __init__(self, data, folder):
        self.split = data.train
        self.num_classes = len(data.classes)
        self.folder = Path(folder)

    def path(self, i):
        return mask_path(self.folder, self.split, i)

    def image(self, i):
        """uint8 [H, W, 3]"""
        return self.split.image(i)

    def mask(self, i):
        """uint8 [H, W]: 0..C-1 and 255"""
        return read_mask(self.path(i), None, self.num_classes).numpy()

    def write(self, make, indices, workers, ctx):
        """Call make(i), which writes path(i), for each of `indices` whose file is missing. The
        images are divided among the processes, and in each among `workers` threads."""
        missing = [i for i in indices[ctx.rank::ctx.world] if not self.path(i).exists()]
        torch.backends.cudnn.benchmark = False  # images have many sizes
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for first in range(0, len(missing), 100):
                list(pool.map(make, missing[first:first + 100]))  # raises what went wrong
                done = min(first + 100, len(missing)) / len(missing)  # of this process
                ctx.say(f"pseudo-labels: {100 * done:.0f} % written")
        ctx.barrier()

    def compare(self, indices, ctx):
        """With the masks of those images that have one. -> (ConfusionMatrix over the pixels that
        have a pseudo-label, their share, rows of a panel: image, mask, pseudo-label)"""
        indices = [i for i in indices if self.split.has_mask(i)]
        confusion = ConfusionMatrix(self.num_classes, ctx.device)
        share = torch.zeros((), device=ctx.device)
        for i in indices[ctx.rank::ctx.world]:
            label = torch.from_numpy(self.mask(i)).to(ctx.device)
            truth = torch.from_numpy(self.split.mask(i)).to(ctx.device)
            confusion.update(label, truth.masked_fill(label == IGNORE, IGNORE))
            share += (label != IGNORE).float().mean() / len(indices)
        confusion.reduce()
        shown = indices[::1 + len(indices) // 6]
        rows = [(self.image(i), self.split.mask(i), self.mask(i)) for i in shown]
        return confusion, ctx.sum(share).item(), rows
