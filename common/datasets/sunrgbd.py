"""SUN RGB-D, 37 or 13 classes, scored on test:

  SUNRGBD-{train,test}_images/img-000001.jpg                  or image/{train,test}/img-000001.jpg
  sunrgbd_train_test_labels/img-{000001..010335}.png   (37)   or label37/{train,test}/00000001.png
  {train,test}13labels/img13labels-000001.png          (13)   or label13/{train,test}/..
How to get it: the two archives of images, sunrgbd_train_test_labels.tar.gz and
{train,test}13labels.tgz, to which github.com/ankurhanda/sunrgbd-meta-data links
"""
import numpy as np

from common.datasets.masks import (IMAGE_SUFFIXES, Encoding, SegmentationData, Split, find_files,
                                   find_folder)
from common.transforms import IGNORE

SUN_13 = [entry.split() for entry in """
    bed 0000ff, books e8582f, ceiling 00d900, chair 9400f0, floor def117, furniture ffcdcd,
    objects 00dfe4, picture 6a87cc, sofa 741c29, table f023eb, tv 00a69c, wall f98b00, window e1e4c2
""".split(",")]  # name, colour
SUN_37 = [entry.split() for entry in """
    wall 777777 wall, floor f4f383 floor, cabinet 891c9d furniture, bed 96ffff bed,
    chair 367271 chair, sofa 0000b0 sofa, table ff4500 table, door 5770ff wall,
    window 00a321 window, bookshelf ff96ff furniture, picture ffb40a picture,
    counter 654656 furniture, blinds 26e600 window, desk ff7846 table, shelves 752979 furniture,
    curtain 96ff00 window, dresser 8400ff furniture, pillow 18d1ff objects,
    mirror bf8223 objects, floor_mat dbc86d floor, clothes 9a3e56 objects,
    ceiling ffbebe ceiling, books ff00ff books, fridge 98a337 furniture, tv c04fd4 tv,
    paper e6e6e6 objects, towel 358240 objects, shower_curtain 9bf998 objects,
    box 574022 objects, whiteboard d6d1af objects, person aa003b objects,
    night_stand ff0000 furniture, toilet c1c3ea objects, sink 464873 objects,
    lamp ffff00 objects, bathtub 343983 objects, bag 0c532d objects
""".split(",")]  # name, colour, which of the 13 it belongs to
KEY = r"(train|test)\w*/(?:img(?:13labels)?-|00)?(\d{6})(?!\d)"
PUBLISHED = {"train": (5285, "0e86024e8cd189b0"), "test": (5050, "82d7676a1af54c48")}
SHIFTED = {"labels that have been shifted already: here 0 is void, and classes start at 1": [255]}
OF_37 = {"labels of 37 classes under the name of those of 13": range(14, 38)}


def open_sunrgbd(root, coarse=False):
    """37 classes, or (coarse) 13. Keys: train/000001, test/000001.

    Masks of 13 classes are img13labels-*.png, else made of those of 37. Images are numbered from 1
    in both splits; so are masks, but that of the training image k is 5050 + k in the folder of both
    splits, sunrgbd_train_test_labels, and in a folder labels/train that starts at 5051.
    """
    bases = (root, root / "sunrgbd", root / "SUNRGBD")
    splits = []
    for name in ("train", "test"):
        places = (f"SUNRGBD-{name}_images", f"image/{name}", f"images/{name}")
        images = _numbered(name, find_folder(bases, places), IMAGE_SUFFIXES)
        places = ("sunrgbd_train_test_labels", f"labels/{name}", f"label37/{name}")
        folder = find_folder(bases, places)
        masks = _numbered(name, folder, [".png"])
        both = folder.name == "sunrgbd_train_test_labels"
        if name == "train" and (both or min(masks, default="") > "train/005050"):
            masks = _numbered(name, folder, [".png"], offset=5050)
        if coarse:
            folder = find_folder(bases, (f"{name}13labels", f"label13/{name}"))
            masks |= _numbered(name, folder, [".png"])
        splits.append(Split(images, masks, _encodings(coarse)))
    name, entries = ("sunrgbd13", SUN_13) if coarse else ("sunrgbd", SUN_37)
    classes = tuple(entry[0] for entry in entries)
    palette = np.array([list(bytes.fromhex(entry[1])) for entry in entries], np.uint8)
    return SegmentationData(name, classes, palette, *splits, "test", (), __doc__, KEY, PUBLISHED)


def _numbered(name, folder, endings, offset=0):
    """{train/000001: path} of files such as img-000001.jpg, img13labels-000001.png, 00000001.png"""
    files = {stem.rpartition("-")[2]: path for stem, path in find_files(folder, endings).items()}
    return {f"{name}/{int(number) - offset:06d}": path for number, path in files.items()
            if number.isdigit()}


def _encodings(coarse):
    """In the files 0 is void, and classes start at 1."""
    if not coarse:
        return {"": Encoding({0: IGNORE, **{k + 1: k for k in range(37)}}, SHIFTED)}
    names = [name for name, _ in SUN_13]
    merged = {k + 1: names.index(group) for k, (_, _, group) in enumerate(SUN_37)}
    of_13 = Encoding({0: IGNORE, **{k + 1: k for k in range(13)}}, SHIFTED | OF_37)
    return {"img13labels": of_13, "": Encoding({0: IGNORE, **merged}, SHIFTED)}
