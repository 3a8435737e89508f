"""Which training images are labelled: a seeded draw, or a published list."""
import io
import math
import os
import pickle
import re
from collections import Counter
from fractions import Fraction

import numpy as np

from common.datasets.masks import few, numbered_lines
from common.settings import UserError

PICKLES = (".pkl", ".pickle")  # endings of a permutation's file


def choose_labelled(data, labeled, split_file, seed):
    """-> (labelled, unlabelled): sorted indices into data.train, disjoint and together all of it;
    the first are kept as data.labelled.

    labeled: `all`; a count; or a fraction of the images that have a mask, rounded up (1/8 of 10582:
    1323). The first images of RandomState(seed).permutation are labelled.
    voc: `1464` is VOC's own train list, and counts up to its length are drawn from it, as CCT draws
    its pixel labels; larger counts, and fractions, are drawn from all of trainaug.
    split_file: a list of the labelled images, instead of `labeled`; or (.pkl, .pickle) a
    permutation of 0..N-1, whose first images are labelled, as many as `labeled` says.
    Raises UserError for a malformed value, too large a count, a wrong list, a missing mask.
    """
    train = data.train
    able = [i for i in range(len(train)) if train.has_mask(i)]
    if str(split_file).endswith(PICKLES):
        order = read_permutation(split_file, len(train))
        chosen = order[:_count(labeled, len(order))]
    elif split_file:
        index = {key: i for i, key in enumerate(train.keys)}
        chosen = [index[key] for key in read_list(split_file, data)]
    elif labeled == "1464" and data.voc_train:
        chosen = [i for i, key in enumerate(train.keys) if key in data.voc_train]
    else:
        count = _count(labeled, len(able))
        pool = [i for i in able if train.keys[i] in data.voc_train]
        if "/" in labeled or labeled == "all" or count > len(pool):
            pool = able
        order = np.random.RandomState(seed).permutation(len(pool))
        chosen = [pool[k] for k in order[:count]]
    if bare := [train.keys[i] for i in chosen if not train.has_mask(i)]:
        source = split_file or f"--labeled {labeled}"
        raise UserError(f"{source}: {len(bare)} of the {len(chosen)} images have no mask "
                        f"({few(bare)})")
    labelled = set(chosen)
    data.labelled = sorted(labelled)
    return data.labelled, [i for i in range(len(train)) if i not in labelled]


def _count(labeled, total):
    if labeled == "all":
        return total
    if not re.fullmatch(r"[1-9]\d*(/[1-9]\d*)?", labeled):
        raise UserError(f"--labeled {labeled}: expected a count (100), a fraction (1/8), or all")
    count = math.ceil(Fraction(labeled) * total) if "/" in labeled else int(labeled)
    if count > total:
        raise UserError(f"--labeled {labeled}: {count} images, but only {total} can be labelled")
    return count


def read_list(path, data):
    """Keys of training images, in the order of the file. UserError if it does not fit the data.

    A line is a key, or the path of an image, whatever its prefix; the path of its mask may follow
    after a tab, a comma or a blank, but the dataset's own mask is read. Comments (#) are skipped.
    """
    own = set(data.train.keys)
    scored = set(data.val.keys)
    known = own | scored
    keys, strange = [], []
    for number, line in numbered_lines(path):
        separator = r"[\t,]" if re.search(r"[\t,]", line) else r"\s"
        columns = [line] if line in own else re.split(separator, line.replace("\\", "/"))
        first = next((column.strip() for column in columns if column.strip()), "")
        key = find_key(first, data.key_pattern, known)
        keys.append(key)
        if key is None:
            strange.append(f"line {number}: {line}")
    repeated = [key for key, count in Counter(keys).items() if count > 1]
    leaked = [key for key in keys if key in scored]
    for found, text in ((strange, f"lines name no image of {data.name}, as {min(own)} does"),
                        (repeated, "images are listed twice"),
                        (leaked, f"images belong to {data.scored_on}, which is scored")):
        if found:
            raise UserError(f"{path}: {len(found)} {text} ({few(found)})")
    if not keys:
        raise UserError(f"{path}: the list is empty")
    return keys


def find_key(path, pattern, known):
    """The known key in a path, or None: what fits the pattern; without one, the longest end."""
    if pattern:
        found = ["/".join(match.groups()) or match[0] for match in re.finditer(pattern, path)]
        others = [key for key in found[:-1] if key in known and key != found[-1]]
        return found[-1] if found and found[-1] in known and not others else None
    parts = [part for part in path.split("/") if part]
    for k in range(len(parts)):
        tail = "/".join(parts[k:])
        for key in (tail, os.path.splitext(tail)[0]):
            if key in known or f"train/{key}" in known:
                return key if key in known else f"train/{key}"
    return None


NAMES = {  # in the pickle of an array, and what stands for them here
    "multiarray._reconstruct": lambda *_: np.empty(0), "numpy.ndarray": None,
    "numeric._frombuffer": lambda data, kind, *_: np.frombuffer(data, kind),
    "numpy.dtype": np.dtype, "_codecs.encode": lambda text, _: text.encode("latin1")}


class _ArrayUnpickler(pickle._Unpickler):
    """Reads arrays and numbers; looks up nothing else, so that a file cannot call anything. This is
    the unpickler in Python, which takes no memory for what a file only claims to hold."""

    def find_class(self, module, name):
        name = re.sub(r"numpy\._?core\.", "", f"{module}.{name}")
        if name not in NAMES:
            raise pickle.UnpicklingError(f"a permutation does not need {name}")
        return NAMES[name]


def read_permutation(path, total):
    """The pickled order of 0..total-1 as a list. Raises UserError if it is anything else."""
    try:
        with open(path, "rb") as file:
            stored = _ArrayUnpickler(io.BytesIO(file.read()), encoding="latin1").load()
        order = np.asarray(stored).ravel()
    except Exception as error:  # which one it is depends on the damage
        raise UserError(f"{path}: cannot be read as a pickled permutation ({error})") from error
    if order.dtype.kind not in "iu" or not np.array_equal(np.sort(order), np.arange(total)):
        raise UserError(f"{path}: expected a permutation of 0..{total - 1}, one number for each "
                        f"training image; found {len(order)} of {order.dtype}")
    return order.tolist()
