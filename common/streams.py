"""Endless streams of training samples whose order and augmentation are pure functions of (seed, stream, position).

So a run does not depend on the number of workers or processes, resumes exactly at any step, and two streams never
draw the same random numbers by accident.
"""
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common.runtime import mix


class Stream(Dataset):
    """Position p of the stream is image `order(epoch)[p mod n]` of the epoch p // n, in a fresh order every epoch."""

    def __init__(self, split, indices, transform, seed, name, labelled):
        """split: a datasets.Split; transform: (image, mask or None, rng) -> (tensor, tensor or None)"""
        self.split, self.indices, self.transform = split, np.asarray(indices), transform
        self.seed, self.name, self.labelled = seed, name, labelled
        self._epoch, self._order = None, None

    def index(self, position):
        """Which image of the split stands at this position."""
        epoch, k = divmod(position, len(self.indices))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng(mix(self.seed, self.name, "order", epoch)).permutation(self.indices)
        return int(self._order[k])

    def __getitem__(self, position):
        i, rng = self.index(position), np.random.default_rng(mix(self.seed, self.name, "sample", position))
        mask = self.split.mask(i) if self.labelled else None  # an unlabelled stream never opens a mask
        image, mask = self.transform(self.split.image(i), mask, rng)
        return (image, mask.long()) if self.labelled else image


class Steps:
    """Batch sampler: this process's positions of every global batch, from `start` (in steps) on, without end."""

    def __init__(self, start, batch, rank, world):
        self.start, self.batch, self.rank, self.world = start, batch, rank, world

    def __iter__(self):
        step = self.start
        while True:
            first = (step * self.world + self.rank) * self.batch
            yield list(range(first, first + self.batch))
            step += 1


def endless(stream, batch, start_step, workers, ctx):
    """Iterator of device batches of the stream, from step `start_step` on. batch: images per process."""
    loader = DataLoader(stream, batch_sampler=Steps(start_step, batch, ctx.rank, ctx.world), num_workers=workers,
                        pin_memory=ctx.device.type == "cuda", prefetch_factor=4 if workers else None)
    for samples in loader:
        yield to_device(samples, ctx.device)


def to_device(samples, device):
    """Images go to the device in channels_last order, masks as they are; copies from pinned memory do not block."""
    if isinstance(samples, (list, tuple)):
        return [to_device(part, device) for part in samples]
    if samples.dim() == 4:
        return samples.to(device, non_blocking=True, memory_format=torch.channels_last)
    return samples.to(device, non_blocking=True)


class Scored(Dataset):
    """A validation split: (image tensor, mask) of this process's share of its images, each image exactly once."""

    def __init__(self, split, transform, ctx):
        self.split, self.transform = split, transform
        self.mine = range(ctx.rank, len(split), ctx.world)

    def __len__(self):
        return len(self.mine)

    def __getitem__(self, i):
        i = self.mine[i]
        image, mask = self.transform(self.split.image(i), self.split.mask(i), None)
        return image, mask.long()


def once(scored, batch, workers, ctx):
    """Iterator of device batches over a validation split; batch 1 unless all its images have one size."""
    loader = DataLoader(scored, batch_size=batch, num_workers=min(workers, len(scored)),
                        pin_memory=ctx.device.type == "cuda")
    for samples in loader:
        yield to_device(samples, ctx.device)
