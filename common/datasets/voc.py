"""PASCAL VOC 2012, 21 classes, with the further masks of SBD:

  VOCdevkit/VOC2012/{JPEGImages/2007_000032.jpg,SegmentationClass/2007_000032.png}
  VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val}.txt
  SBD/{cls/2008_000002.mat,train.txt,val.txt}     or VOCdevkit/VOC2012/SegmentationClassAug/*.png
How to get it: --download fetches VOC 2012 and SBD (3.5 GB); by hand, VOCtrainval_11-May-2012.tar of
host.robots.ox.ac.uk/pascal/VOC/voc2012 and benchmark.tgz (SBD) of Berkeley's semantic_contours page
"""
import fcntl
import os
import shutil

import numpy as np
import torchvision

from common.datasets.masks import (Encoding, SegmentationData, Split, find_files, find_folder,
                                   not_found, read_lines, unchanged)
from common.settings import UserError

KEY = r"(?<!\d)\d{4}_\d{6}(?!\d)"
CLASSES = tuple("""
    background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse
    motorbike person pottedplant sheep sofa train tvmonitor""".split())
PUBLISHED = {"train": (10582, "5b12fb32d8deda0c"), "val": (1449, "93298139809de695")}


def open_voc(root):
    """Training images = (VOC train + SBD train + SBD val) - VOC val, 10,582 in all ("trainaug").

    A mask is VOC's own PNG if there is one, else SBD's .mat, else that of SegmentationClassAug.
    """
    voc, sbd, aug = _find(root)
    images = find_files(voc / "JPEGImages", [".jpg"])
    if not images:
        raise not_found("voc", root, __doc__)
    lists = voc / "ImageSets/Segmentation"
    own = set(read_lines(lists / "train.txt"))
    val = set(read_lines(lists / "val.txt"))
    from_voc = find_files(voc / "SegmentationClass", [".png"])
    from_sbd = find_files(sbd / "cls", [".mat"])
    from_aug = find_files(aug, [".png"])
    train = own | from_aug.keys()
    notes = ()
    if from_sbd:
        train = own | set(read_lines(sbd / "train.txt")) | set(read_lines(sbd / "val.txt"))
    elif not from_aug:
        notes = ("voc: neither SBD nor SegmentationClassAug is there; --download fetches SBD",)
    encodings = {"": Encoding(unchanged(21), variable="GTcls.Segmentation")}
    train_split = Split(images, from_aug | from_sbd | from_voc, encodings, train - val)
    val_split = Split(images, from_aug | from_voc, encodings, val)
    return SegmentationData("voc", CLASSES, voc_palette()[:21], train_split, val_split, "val",
                            notes, __doc__, KEY, PUBLISHED, frozenset(own))


def _find(root):
    """-> the folders of VOC 2012, SBD and SegmentationClassAug"""
    places = ("VOCdevkit/VOC2012", "VOC2012", "", "VOCtrainval_11-May-2012/VOCdevkit/VOC2012")
    voc = find_folder([root], places, "JPEGImages")
    bases = (root, voc, voc.parent, voc.parent.parent)
    places = ("", "SBD", "dataset", "benchmark_RELEASE/dataset", "VOCaug/dataset")
    return voc, find_folder(bases, places, "cls"), find_folder(bases, ["SegmentationClassAug"])


def voc_palette():
    """uint8 [256, 3]: an index's bits, in threes, are those of R, G, B from the highest down."""
    index = np.arange(256)[:, None]
    palette = np.zeros((256, 3), int)
    for k in range(8):
        palette |= ((index >> (3 * k + np.arange(3))) & 1) << (7 - k)
    return palette.astype(np.uint8)


def download_voc(root):
    """By torchvision, VOC 2012 to root/VOCdevkit and SBD to root/SBD, each if it is not there yet.

    Each is unpacked in a folder of its own, renamed when it is complete, so that what an
    interrupted download leaves is never taken for a dataset. Processes of a torchrun take turns.
    """
    if not _missing(root):
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / ".download.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            part = root / "download.part"
            for name in _missing(root):  # now that another process may have fetched them
                shutil.rmtree(part, ignore_errors=True)
                if name == "VOCdevkit":
                    torchvision.datasets.VOCSegmentation(part, "2012", "val", download=True)
                    os.renames(part / "VOCdevkit/VOC2012", root / "VOCdevkit/VOC2012")
                else:
                    torchvision.datasets.SBDataset(part, "train", "segmentation", download=True)
                    (part / "benchmark.tgz").unlink(missing_ok=True)
                    os.rename(part, root / "SBD")
            shutil.rmtree(part, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # network, disk; torchvision's checksum error
        raise UserError(f"the download to {root} failed ({error}); expected: {__doc__}") from error


def _missing(root):
    voc, sbd, aug = _find(root)
    missing = [] if (voc / "JPEGImages").is_dir() else ["VOCdevkit"]
    return missing if (sbd / "cls").is_dir() or aug.is_dir() else [*missing, "SBD"]
