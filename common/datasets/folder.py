"""Your own images; a training image without a mask is an unlabelled one:

  classes.txt               a class per line: name, or name r g b
  images/{train,val}/a.jpg  folders inside are allowed
  masks/{train,val}/a.png   8-bit gray or palette PNG of class ids 0, 1, ..; 255 = ignore
  unlabeled/b.jpg           (optional)
"""
import numpy as np

from common.datasets.masks import (IMAGE_SUFFIXES, INVALID, Encoding, SegmentationData, Split, few,
                                   find_files, not_found, read_lines, unchanged)
from common.datasets.voc import voc_palette
from common.settings import UserError
from common.transforms import IGNORE


def open_folder(root):
    """Keys: train/a, val/a, unlabeled/b; a and b are paths without suffix."""
    if not all((root / part).exists() for part in ("classes.txt", "images/train", "images/val")):
        raise not_found("folder", root, __doc__)
    classes, palette = _read_classes(root / "classes.txt")
    splits, notes = [], ()
    for name in ("train", "val"):
        images = _keyed(root / "images", name, IMAGE_SUFFIXES)
        masks = _keyed(root / "masks", name, [".png"])
        if idle := sorted(masks.keys() - images.keys()):
            notes += (f"{root / 'masks'}: {len(idle)} masks belong to no image ({few(idle)})",)
        if name == "train":
            images |= _keyed(root, "unlabeled", IMAGE_SUFFIXES)
        splits.append(Split(images, masks, {"": Encoding(unchanged(len(classes)))}))
    train = splits[0]
    masked = [i for i in range(len(train)) if train.has_mask(i)]
    if len(classes) == 2 and masked:
        some = masked[::1 + len(masked) // 8]
        values = set.union(*(set(np.unique(train.mask(i)).tolist()) for i in some))
        if 1 not in values and IGNORE in values:
            raise UserError(f"{root / 'masks/train'}: the masks hold only 0 and 255, but 255 means "
                            f"'ignore'; save {classes[1]} as 1")
    return SegmentationData("folder", classes, palette, *splits, "val", notes, __doc__)


def _keyed(folder, name, endings):
    """{name/path without suffix: path} of the files in folder/name"""
    files = find_files(folder / name, endings, with_folders=True)
    return {f"{name}/{key}": path for key, path in files.items()}


def _read_classes(path):
    """-> (names, uint8 [C, 3]); a class without a colour gets VOC's colour of its number."""
    names = []
    colours = voc_palette()
    for line in read_lines(path)[:INVALID + 1]:  # one more than are allowed
        words = line.split()
        if len(words) > 3 and all(word.isdigit() and int(word) < 256 for word in words[-3:]):
            colours[len(names)] = [int(word) for word in words[-3:]]
            words = words[:-3]
        names.append(" ".join(words))
    if len(names) not in range(2, INVALID + 1) or len(set(names)) < len(names):
        raise UserError(f"{path}: expected 2 to {INVALID} names of classes, a line each, alone or "
                        f"followed by its colour as three numbers 0..255; found {few(names)}")
    return tuple(names), colours[:len(names)]
