"""Endless streams of training samples: order and augmentation are pure functions of (seed, stream,
position).

So a run does not depend on the number of workers or processes, resumes exactly at any step, and two
streams never draw the same random numbers by accident.
"""
import atexit
import multiprocessing.util  # imported early: its exit handler then runs after kill_workers
import signal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common.random import mix
from common.settings import UserError
from common.transforms import normalise


class Stream(Dataset):
    """Position p is image `order(epoch)[p mod n]` of epoch p // n; each epoch has a fresh order."""

    def __init__(self, split, indices, transform, seed, name, labelled):
        """split: of a dataset; transform: (image, mask or None, rng) -> (tensor, tensor or None)"""
        self.split = split
        self.indices = np.asarray(indices)
        self.transform = transform
        self.seed = seed
        self.name = name
        self.labelled = labelled
        self._epoch = None
        self._order = None

    def index(self, position):
        """Which image of the split stands at this position."""
        epoch, k = divmod(position, len(self.indices))
        if epoch != self._epoch:
            rng = np.random.default_rng(mix(self.seed, self.name, "order", epoch))
            self._epoch = epoch
            self._order = rng.permutation(self.indices)
        return int(self._order[k])

    def __getitem__(self, position):
        i = self.index(position)
        rng = np.random.default_rng(mix(self.seed, self.name, "sample", position))
        mask = self.split.mask(i) if self.labelled else None  # an unlabelled stream opens no mask
        image, mask = self.transform(self.split.image(i), mask, rng)
        return (image, mask) if self.labelled else image


def positions(step, batch, rank, world):
    """Batch sampler: this process's positions of every global batch, from a step on."""
    while True:
        first = (step * world + rank) * batch
        yield list(range(first, first + batch))
        step += 1


def endless(stream, batch, start_step, workers, ctx):
    """Iterator of device batches of the stream, from step `start_step` on. batch: per process."""
    steps = positions(start_step, batch, ctx.rank, ctx.world)
    for samples in load(stream, workers, ctx, batch_sampler=steps):
        torch.backends.cudnn.benchmark = True  # its choice is for one size, as all batches have
        yield samples


def load(dataset, workers, ctx, **order):
    """Yield a DataLoader's batches, on the device. Its workers start with these signals blocked: if
    a signal goes to all processes, only the main one handles it, and ends its workers when it
    stops. They are forked, where Python 3.14 would start them from a process without this mask."""
    loader = DataLoader(dataset, num_workers=workers, pin_memory=ctx.device.type == "cuda",
                        multiprocessing_context="fork" if workers else None, **order)
    signals = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    try:
        for samples in iterator:
            yield to_device(samples, ctx.device)
    except RuntimeError as error:
        if "shared memory" in str(error) or "</torch_" in str(error):
            raise UserError("shared memory (/dev/shm) is too small for the batches of --workers: "
                            "enlarge it (docker run --shm-size=8g), or give --workers 0"
                            ) from error
        if "equal size" in str(error) or "not resizable" in str(error):  # in making a batch
            raise UserError("a batch has images of different sizes: give a --crop, or one --size "
                            "for all") from error
        raise


@atexit.register
def kill_workers():
    """Runs whenever the process exits. multiprocessing itself would send the workers SIGTERM, which
    is blocked in them, and then wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report a killed worker
    for worker in multiprocessing.active_children():
        worker.kill()


def to_device(samples, device):
    """Images, uint8 [B, 3, H, W], become normalised floats in channels_last order, masks, uint8
    [B, H, W], int64; all else stays as it is."""
    if isinstance(samples, (list, tuple)):
        return [to_device(part, device) for part in samples]
    samples = samples.to(device, non_blocking=True)
    if samples.dtype == torch.uint8 and samples.dim() == 4:
        return normalise(samples).contiguous(memory_format=torch.channels_last)
    if samples.dtype == torch.uint8 and samples.dim() == 3:
        return samples.long()
    return samples


class Scored(Dataset):
    """A split as pairs (image tensor, mask)"""

    def __init__(self, split, transform):
        self.split = split
        self.transform = transform

    def __getitem__(self, i):
        return self.transform(self.split.image(i), self.split.mask(i))


def once(split, transform, batch, workers, ctx):
    """Iterator of device batches over this process's share of a split, each image exactly once;
    batch 1 unless all its images have one size."""
    mine = range(ctx.rank, len(split), ctx.world)
    torch.backends.cudnn.benchmark = batch > 1
    scored = Scored(split, transform)
    yield from load(scored, min(workers, len(mine)), ctx, batch_size=batch, sampler=mine)
