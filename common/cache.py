"""Images and masks of one size, decoded and resized once, and kept as arrays beside the runs.

An array has a file of its own, which is there whole or not at all: several runs can fill and use
one folder, and a kill loses nothing. Its modification time is set to that of the image or mask, so
that one that was replaced is decoded again.
"""
import dataclasses
import os
import shutil
from hashlib import sha1
from pathlib import Path

import numpy as np

from common.datasets.masks import Split
from common.files import make_folder, replacing
from common.transforms import resize, to_tensors


class Cached(Split):
    """A Split, all of whose images and masks have one size"""

    def __init__(self, split, size, folder):
        vars(self).update(vars(split))
        self.size = size
        self.folder = folder

    def image(self, i):
        """uint8 [*size, 3]"""
        return self.kept(f"{i}-image.npy", self.images[i], lambda: self.decoded(i)[0])

    def mask(self, i):
        """uint8 [*size]"""
        return self.kept(f"{i}-mask.npy", self.masks[i], lambda: self.decoded(i, True)[1])

    def decoded(self, i, with_mask=False):
        image, mask = to_tensors(super().image(i), super().mask(i) if with_mask else None)
        image, mask = resize(image, mask, self.size)
        return image.permute(1, 2, 0).numpy(), None if mask is None else mask.numpy()

    def kept(self, name, source, decode):
        """The array in the file `name`, memory-mapped; if there is none, decode() makes it."""
        path = self.folder / name
        try:
            age = os.stat(source).st_mtime_ns
            if path.stat().st_mtime_ns in (age, age // 10**9 * 10**9):  # some disks: whole seconds
                return np.load(path, mmap_mode="c")
        except (FileNotFoundError, EOFError, ValueError):
            pass  # not there, or cut short; if it is the source that is missing, decode says so
        array = decode()
        with replacing(path, "wb", f".{os.urandom(8).hex()}") as file:
            np.save(file, array)
            file.flush()
            os.utime(file.fileno(), ns=(age, age))
        return array


def cached(data, size, cfg, ctx):
    """The dataset with a Cached training split and, if images are scored at `size`, a Cached scored
    split, in cfg.cache or .cache beside the run folder; unchanged if there is no room."""
    if size is None or cfg.cache == "none" or data.one_size:
        return data
    splits = dict(train=data.train)
    if cfg.scoring_size == size:
        splits["val"] = data.val
    height, width = size
    folder = Path(cfg.cache or Path(cfg.out).absolute().parent / ".cache")  # hidden from runs/*
    caches = {}
    for name, split in splits.items():
        paths = "\n".join(map(os.path.abspath, split.images))
        about = f"{paths} {len(data.classes)}".encode(errors="surrogateescape")
        digest = sha1(about).hexdigest()[:16]
        caches[name] = Cached(split, size, folder / f"{data.name}-{height}x{width}-{digest}")
        make_folder(caches[name].folder, "--cache")
    missing = sum(map(len, splits.values()))
    for cache in caches.values():
        missing -= sum(name.endswith("-image.npy") for name in os.listdir(cache.folder))
    size_gb = 4 * height * width * missing / 1e9  # three colours, and perhaps a mask
    if size_gb > 0.9 * shutil.disk_usage(folder).free / 1e9:
        ctx.say(f"note: images are decoded anew in every epoch, because {folder} has no room for "
                f"{size_gb:.1f} GB: give a --cache folder with more room")
        return data
    ctx.say(f"images of {height}x{width} are decoded once, into {folder}: up to {size_gb:.1f} GB "
            f"more")
    return dataclasses.replace(data, **caches)

