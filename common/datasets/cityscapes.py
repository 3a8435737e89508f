"""Cityscapes fine, 19 classes:

  leftImg8bit/{train,val}/aachen/aachen_000000_000019_leftImg8bit.png
  gtFine/{train,val}/aachen/aachen_000000_000019_gtFine_labelIds.png      or .._labelTrainIds.png
How to get it: leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip of www.cityscapes-dataset.com
"""
import numpy as np
from torchvision.datasets import Cityscapes

from common.datasets.masks import (IMAGE_SUFFIXES, Encoding, SegmentationData, Split, find_files,
                                   find_folder, paired, unchanged)

KINDS = [kind for kind in Cityscapes.classes if kind.id >= 0]  # -1, license plate, is never drawn
TRAINED = sorted((kind for kind in KINDS if kind.train_id < 19), key=lambda kind: kind.train_id)
CLASSES = tuple(kind.name for kind in TRAINED)
PALETTE = np.array([kind.color for kind in TRAINED], np.uint8)
LABEL_IDS = Encoding(
    {kind.id: kind.train_id for kind in KINDS},
    {"255 is found in trainIds only: these are trainIds under the name of labelIds": [255]})
TRAIN_IDS = Encoding(unchanged(19), {
    "19..33 are found in Cityscapes' labelIds, and such a file has to be called .._labelIds.png; "
    "19..40 in BDD100K's panoptic masks, which are not those of sem_seg": range(19, 41)})
KEY = r"[a-z]+_\d{6}_\d{6}"
PUBLISHED = {"train": (2975, "2f23650c1c5f0027"), "val": (500, "7a7abbc4dded7845")}


def open_cityscapes(root):
    """Masks are .._labelIds.png, else .._labelTrainIds.png: the name decides, not the content.

    Found, too, are archives unpacked into folders of their own, and the flat copy
    images/train/x.png, segmentation/train/x_gtFine.png (trainIds).
    """
    bases = (root, root / "cityscapes", root / "Cityscapes")
    places = ("leftImg8bit", "leftImg8bit_trainvaltest/leftImg8bit", "images")
    image_folder = find_folder(bases, places, "train")
    places = ("gtFine", "gtFine_trainvaltest/gtFine", "segmentation")
    mask_folder = find_folder(bases, places, "train")
    splits = []
    for name in ("train", "val"):
        images = find_files(image_folder / name, ["_leftImg8bit.png", *IMAGE_SUFFIXES])
        masks = {}
        for ending in ("_gtFine.png", "_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"):
            masks |= find_files(mask_folder / name, [ending])
        encodings = {"_labelIds": LABEL_IDS, "": TRAIN_IDS}
        splits.append(Split(images, masks, encodings, paired(images, masks)))
    return SegmentationData("cityscapes", CLASSES, PALETTE, *splits, "val", layout=__doc__,
                            key_pattern=KEY, published=PUBLISHED)
