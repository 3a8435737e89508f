"""The datasets, one file each. To add one is to add its file, and its name to DATASETS.

    data = open_dataset("voc", "data")                               # reads folders and lists only
    labelled, unlabelled = choose_labelled(data, "1/8", "", seed=0)  # indices into data.train
    image, mask = data.train.image(i), data.train.mask(i)            # uint8 [H, W, 3]; [H, W]
"""
from functools import partial
from pathlib import Path

from common.datasets.bdd100k import open_bdd100k
from common.datasets.camvid import open_camvid
from common.datasets.cityscapes import open_cityscapes
from common.datasets.folder import open_folder
from common.datasets.labelled import choose_labelled
from common.datasets.masks import SegmentationData, check_classes, few, not_found
from common.datasets.pcontext import open_pcontext
from common.datasets.shapes import open_shapes
from common.datasets.sunrgbd import open_sunrgbd
from common.datasets.voc import download_voc, open_voc
from common.settings import UserError

__all__ = ["DATASETS", "SegmentationData", "check_classes", "choose_labelled", "open_dataset"]

DATASETS = {
    "shapes": open_shapes,
    "voc": open_voc,
    "cityscapes": open_cityscapes,
    "camvid": open_camvid,
    "sunrgbd": open_sunrgbd,
    "sunrgbd13": partial(open_sunrgbd, coarse=True),
    "pcontext": open_pcontext,
    "pcontext59": partial(open_pcontext, background=False),
    "bdd100k": open_bdd100k,
    "folder": open_folder,
}


def open_dataset(name, root, download=False):
    """Open one of DATASETS in `root`, its own folder or its parent. -> SegmentationData

    download: fetch what is missing (voc only). Raises UserError, with the layout that is expected,
    if the data is not there or not complete.
    """
    if name not in DATASETS:
        raise UserError(f"unknown dataset {name!r}; known are {', '.join(DATASETS)}")
    root = Path(root).expanduser()
    if download and name == "voc":
        download_voc(root)
    data = DATASETS[name](root)
    train, val = data.train, data.val
    if not train.keys or not val.keys:
        raise not_found(name, root, data.layout)
    for part, split in (("train", train), (data.scored_on, val)):
        bare = [key for i, key in enumerate(split.keys) if not split.has_mask(i)]
        if bare and (name != "folder" or split is val):
            raise UserError(f"{root}: {len(bare)} of {len(split)} {part} images have no mask "
                            f"({few(bare)}), and each needs one: unpack the masks again")
        if len(bare) == len(split):
            raise UserError(f"{root}: no training image has a mask. Expected: {data.layout}")
        here = len(split), split.fingerprint
        published = data.published.get(part, here)
        if here != published:
            data.notes += (f"{name} {part}: {here[0]} images, fingerprint {here[1]}; the published "
                           f"list has {published[0]}, {published[1]}",)
    if shared := sorted(set(train.keys) & set(val.keys)):
        raise UserError(f"{root}: {len(shared)} images in train and {data.scored_on} "
                        f"({few(shared)})")
    return data
