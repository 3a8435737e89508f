"""BDD100K's 10k images, Cityscapes' 19 classes; masks hold trainIds:

  bdd100k/images/10k/{train,val}/0004a4c0-d4dff0ad.jpg
  bdd100k/labels/sem_seg/masks/{train,val}/0004a4c0-d4dff0ad.png
  or bdd100k/seg/{images,labels}/{train,val}: 0004a4c0-d4dff0ad.jpg, 0004a4c0-d4dff0ad_train_id.png
How to get it: '10K Images' and 'Semantic Segmentation' of dl.cv.ethz.ch/bdd100k/data
"""
from common.datasets.cityscapes import CLASSES, PALETTE, TRAIN_IDS
from common.datasets.masks import SegmentationData, Split, find_files, find_folder, paired

KEY = r"[0-9A-Fa-f]{8}-[0-9A-Fa-f]{8}"
PUBLISHED = {"train": (7000, "8911216f9ec35cb5"), "val": (1000, "b4237a4a2b2bf9eb")}


def open_bdd100k(root):
    """The few images without a mask and masks without an image of a release are left out."""
    bases = (root, root / "bdd100k")
    image_folder = find_folder(bases, ("images/10k", "seg/images", "images"), "train")
    mask_folder = find_folder(bases, ("labels/sem_seg/masks", "seg/labels", "labels"), "train")
    ending = ".png" if mask_folder.name == "masks" else "_train_id.png"
    splits = []
    for name in ("train", "val"):
        images = find_files(image_folder / name, [".jpg"])
        masks = find_files(mask_folder / name, [ending])
        splits.append(Split(images, masks, {"": TRAIN_IDS}, paired(images, masks, spare=10)))
    return SegmentationData("bdd100k", CLASSES, PALETTE, *splits, "val", layout=__doc__,
                            key_pattern=KEY, published=PUBLISHED)
