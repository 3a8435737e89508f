"""Image-level tags: which classes an image holds, as its mask says, or a file:

  2007_000032, aeroplane, person
  2007_000039, tvmonitor

A line has the name or the path of a training image, then names of classes, with commas between, and
quotes around a name that has a comma. Comments (#) are skipped.
"""
import csv

import numpy as np

from common.datasets.labelled import find_key
from common.datasets.masks import few, numbered_lines
from common.settings import UserError


class Tagged:
    """The training images with their tags in place of their masks, for streams.Stream."""

    def __init__(self, data, labelled, path="", always=(), needed=None):
        """labelled: indices of images whose masks may be opened; without a file, all may.
        always: classes that are added to every line of the file, such as the background.
        needed: indices of images that must have tags, by default all.
        Raises UserError if the file is wrong, or such an image has no tags."""
        self.split = data.train
        self.num_classes = len(data.classes)
        self.tags = read_tags(path, data, always) if path else {}
        masked = labelled if path else range(len(self.split))
        known = self.tags.keys() | {i for i in masked if self.split.has_mask(i)}
        needed = range(len(self.split)) if needed is None else needed
        if bare := [self.split.keys[i] for i in needed if i not in known]:
            wanted = "a line for each" if path else "a mask of each, or --tags FILE"
            raise UserError(f"{path or '--weak'}: {len(bare)} of {len(self.split)} training images "
                            f"have no tags ({few(bare)}); expected {wanted}")

    def image(self, i):
        """uint8 [H, W, 3]"""
        return self.split.image(i)

    def mask(self, i):
        """bool [C]: the classes that image i holds"""
        if i in self.tags:
            return self.tags[i]
        return np.isin(np.arange(self.num_classes), self.split.mask(i))


def read_tags(path, data, always=()):
    """{index of a training image: bool [C]}. UserError names the line that is wrong."""
    keys = {key: i for i, key in enumerate(data.train.keys)}
    known = keys.keys() | set(data.val.keys)  # else val/a could be taken for train/a
    tags = {}
    for number, line in numbered_lines(path):
        parts = [part.strip() for part in next(csv.reader([line], skipinitialspace=True))]
        name, *classes = [part for part in parts if part] or [line]
        key = find_key(name.replace("\\", "/"), data.key_pattern, known)
        unknown = [c for c in classes if c not in data.classes]
        problem = ""
        if key not in keys:
            problem = f"{name} is no training image of {data.name}, as {min(keys)} is"
        elif keys[key] in tags:
            problem = f"{key} has a line already"
        elif not classes:
            problem = f"{key} has no tags; expected names of classes after it, with commas between"
        elif unknown:
            problem = f"{few(unknown)}: no such class; {data.name} has {', '.join(data.classes)}"
        if problem:
            raise UserError(f"{path}, line {number}: {problem}")
        tags[keys[key]] = np.isin(data.classes, [*classes, *(data.classes[c] for c in always)])
    if not tags:
        raise UserError(f"{path}: the list is empty")
    return tags
