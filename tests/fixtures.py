"""Small datasets in the real formats, whose pictures can be learned: a class has a colour of its own, plus
noise. Each make_* writes one to `root` and returns --root's value."""
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

from common.datasets.voc import voc_palette

SIZES = ((64, 80), (61, 77), (80, 64), (64, 80))  # (height, width), in turn


def blocks(rng, size, classes, void=None):
    """Mask uint8 [H, W]: classes[0] and two rectangles of others, in rings of `void` if given."""
    mask = np.full(size, classes[0], np.uint8)
    for label in rng.choice(classes[1:], 2, replace=len(classes) < 3):
        height, width = (int(rng.integers(side // 4, side // 2)) for side in size)
        top = int(rng.integers(1, size[0] - height - 1))
        left = int(rng.integers(1, size[1] - width - 1))
        if void is not None:
            mask[top - 1:top + height + 1, left - 1:left + width + 1] = void
        mask[top:top + height, left:left + width] = label
    return mask


def picture_of(rng, mask):
    """Image uint8 [H, W, 3]: a fixed colour for each value of the mask, plus noise."""
    colours = np.random.default_rng(5).integers(30, 226, (256, 3))
    return (colours[mask] + rng.normal(0, 10, (*mask.shape, 3))).clip(0, 255).astype(np.uint8)


def save_picture(path, pixels, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette is not None:
        image.putpalette(palette.tobytes())
    image.save(path, quality=95)  # of a JPEG; PNGs have none


def save_gray(path, mask):
    save_picture(path, np.asarray(mask, np.uint8))


def save_palette(path, mask):
    save_picture(path, np.asarray(mask, np.uint8), voc_palette())


def save_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows))


VOC_TRAIN = [f"2007_{k:06d}" for k in (32, 39, 63, 68, 121, 170)]
VOC_VAL = [f"2007_{k:06d}" for k in (33, 42, 61)]
SBD_ONLY = [f"2008_{k:06d}" for k in (2, 3, 7, 8)]


def sbd_only_masks():
    """{key: mask of classes 0, 1 and 15, without 255} of the images that VOC does not label"""
    rng = np.random.default_rng(2)
    return {key: blocks(rng, SIZES[k], (0, 1, 15)) for k, key in enumerate(SBD_ONLY)}


def make_voc(root):
    """VOCdevkit/VOC2012; palette masks of classes 0, 1, 15..17, borders of 255. One picture is gray."""
    root, rng = Path(root), np.random.default_rng(1)
    voc = root / "VOCdevkit/VOC2012"
    for k, key in enumerate(VOC_TRAIN + VOC_VAL):
        mask = blocks(rng, SIZES[k % 4], (0, 1, 15, 16, 17), void=255)
        pixels = picture_of(rng, mask)
        save_picture(voc / f"JPEGImages/{key}.jpg", pixels if k else pixels[..., 0])
        save_palette(voc / f"SegmentationClass/{key}.png", mask)
    for key, mask in sbd_only_masks().items():
        save_picture(voc / f"JPEGImages/{key}.jpg", picture_of(rng, mask))
    save_lines(voc / "ImageSets/Segmentation/train.txt", VOC_TRAIN)
    save_lines(voc / "ImageSets/Segmentation/val.txt", VOC_VAL)
    return root


def make_sbd(root):
    """VOC and SBD: four images of its own; the second image of VOC train, labelled 3 throughout; and the
    first of VOC val, which must not be trained on."""
    sbd = make_voc(root) / "benchmark_RELEASE/dataset"
    masks = {VOC_TRAIN[1]: np.full((61, 77), 3, np.uint8), VOC_VAL[0]: np.full((80, 64), 3, np.uint8)}
    masks |= sbd_only_masks()
    (sbd / "cls").mkdir(parents=True)
    for key, mask in masks.items():
        fields = {"Segmentation": mask, "CategoriesPresent": np.unique(mask[mask > 0])}
        scipy.io.savemat(sbd / f"cls/{key}.mat", {"GTcls": fields}, do_compression=True)
    save_lines(sbd / "train.txt", list(masks)[:-1])
    save_lines(sbd / "val.txt", list(masks)[-1:])
    return Path(root)


CITY_TRAIN = ("aachen_000000_000019", "aachen_000001_000019", "bochum_000000_000313", "jena_000000_000019",
              "zurich_000120_000019", "zurich_000121_000019")
CITY_VAL = ("frankfurt_000000_000294", "lindau_000000_000019")
CITY_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # that are trained
CITY_ROADS = (7, 8, 11, 21, 23, 26)  # ids of road, sidewalk, building, vegetation, sky, car


def make_cityscapes(root):
    """Cityscapes at 64x128: 6 train, 2 val images; the first row of a mask holds 0..33."""
    root, rng = Path(root), np.random.default_rng(3)
    for split, keys in {"train": CITY_TRAIN, "val": CITY_VAL}.items():
        for key in keys:
            mask = blocks(rng, (64, 128), CITY_ROADS)
            mask[0] = np.arange(128) % 34
            city = f"{split}/{key.split('_')[0]}"
            save_picture(root / f"leftImg8bit/{city}/{key}_leftImg8bit.png", picture_of(rng, mask))
            save_gray(root / f"gtFine/{city}/{key}_gtFine_labelIds.png", mask)
            save_picture(root / f"gtFine/{city}/{key}_gtFine_color.png", picture_of(rng, mask))
    return root


CAMVID = {"train": ("0001TP_006690", "0001TP_006720", "0006R0_f00930", "0006R0_f00960", "0016E5_00390",
                    "0016E5_00901"),
          "val": ("0016E5_07959", "0016E5_07961"), "test": ("Seq05VD_f00000", "Seq05VD_f00030")}
CAMVID_COLOURS = {  # of the masks of Cambridge -> SegNet's class
    (128, 128, 128): 0, (64, 64, 128): 7,  # Sky; Fence
    (192, 0, 128): 1, (0, 128, 64): 1, (128, 0, 0): 1, (64, 0, 64): 1, (64, 192, 0): 1,  # Building, ..
    (192, 192, 128): 2, (0, 0, 64): 2,  # Column_Pole, TrafficCone
    (128, 64, 128): 3, (128, 0, 192): 3, (192, 0, 64): 3,  # Road, LaneMkgsDriv, LaneMkgsNonDriv
    (0, 0, 192): 4, (64, 192, 128): 4, (128, 128, 192): 4,  # Sidewalk, ParkingBlock, RoadShoulder
    (128, 128, 0): 5, (192, 192, 0): 5,  # Tree, VegetationMisc
    (192, 128, 128): 6, (128, 128, 64): 6, (0, 64, 64): 6,  # SignSymbol, Misc_Text, TrafficLight
    (64, 0, 128): 8, (64, 128, 192): 8, (192, 128, 192): 8, (192, 64, 128): 8, (128, 64, 64): 8,  # Car, ..
    (64, 64, 0): 9, (192, 128, 64): 9, (64, 0, 192): 9, (64, 128, 64): 9,  # Pedestrian, ..
    (0, 128, 192): 10, (192, 0, 192): 10, (0, 0, 0): 255}  # Bicyclist, MotorcycleScooter; Void


def make_camvid(root, layout="segnet"):
    """CamVid at 72x96: 6 train, 2 val, 2 test images; the first row of a mask holds all that masks hold.
    layout: segnet (class ids, lists with another machine's paths); kaggle or cambridge (32 colours)."""
    root, rng = Path(root), np.random.default_rng(4)
    colours = np.array([*CAMVID_COLOURS], np.uint8)
    for split, keys in CAMVID.items():
        images = "701_StillsRaw_full" if layout == "cambridge" else split
        labels = "LabeledApproved_full" if layout == "cambridge" else f"{split}_labels"
        for key in keys:
            mask = blocks(rng, (72, 96), (3, 0, 1, 5, 8))
            mask[0] = np.arange(96) % (12 if layout == "segnet" else 32)
            save_picture(root / f"CamVid/{images}/{key}.png", picture_of(rng, mask))
            if layout == "segnet":
                save_gray(root / f"CamVid/{split}annot/{key}.png", mask)
            else:
                save_picture(root / f"CamVid/{labels}/{key}_L.png", colours[mask])
        if layout == "segnet":
            row = "/SegNet/CamVid/{0}/{1}.png /SegNet/CamVid/{0}annot/{1}.png"
            save_lines(root / f"CamVid/{split}.txt", [row.format(split, key) for key in keys])
    return root


SUN_37_TO_13 = (0, 12, 5, 6, 1, 4, 9, 10, 12, 13, 6, 8, 6, 13, 10, 6, 13, 6, 7, 7, 5, 7, 3, 2, 6, 11, 7, 7, 7,
                7, 7, 7, 6, 7, 7, 7, 7, 7)  # labels of the 37 -> of the 13; 0 is void


def make_sunrgbd(root, renumbered=False):
    """SUN RGB-D: 6 train, 2 test images of 8 sizes; a 37-class mask's first row holds all labels."""
    root, rng = Path(root), np.random.default_rng(7)
    for split, number in {"train": 6, "test": 2}.items():
        images, coarse, fine = f"SUNRGBD-{split}_images", f"{split}13labels", "sunrgbd_train_test_labels"
        if renumbered:
            images, coarse, fine = f"image/{split}", f"label13/{split}", f"label37/{split}"
        for k in range(1, number + 1):
            size = (44 + 4 * k, 60 + 3 * k) if split == "train" else (64 + k, 80 - k)
            mask = blocks(rng, size, (1, 5, 2, 12, 37), void=0)
            mask[0] = np.arange(size[1]) % 38
            stored = k + 5050 if split == "train" else k
            fine_name = f"{k:08d}" if renumbered else f"img-{stored:06d}"
            save_picture(root / images / f"img-{k:06d}.jpg", picture_of(rng, mask))
            save_gray(root / fine / f"{fine_name}.png", mask)
            save_gray(root / coarse / f"img13labels-{k:06d}.png", np.array(SUN_37_TO_13)[mask])
    return root


PCONTEXT = {"train": [f"2008_{k:06d}" for k in (8, 15, 19, 23, 26, 28)],
            "val": ["2008_000002", "2008_000003"]}


def make_pcontext(root):
    """PASCAL-Context on VOC 2010: 6 train, 2 val images; LabelMaps of four classes and an unknown number."""
    root, rng = Path(root), np.random.default_rng(8)
    voc, numbers = root / "VOCdevkit/VOC2010", np.array([360, 2, 397, 19, 431])
    (root / "trainval").mkdir(parents=True, exist_ok=True)
    for split, keys in PCONTEXT.items():
        for k, key in enumerate(keys):
            mask = numbers[blocks(rng, SIZES[k % 4], range(5))]
            save_picture(voc / f"JPEGImages/{key}.jpg", picture_of(rng, mask % 256))
            scipy.io.savemat(root / f"trainval/{key}.mat", {"LabelMap": mask.astype(np.uint16)})
        save_lines(voc / f"ImageSets/Main/{split}.txt", keys)
    return root


BDD = {"train": ["0004a4c0-d4dff0ad", "00054602-3bf57337", "0a0a0b1a-27d9fd72", "13e7e580-68BC1FE2",
                 "4c1681b2-2D75E377", "7a0ba9d4-c36faa51"], "val": ["7d06fefd-f7be05a6", "b1c66a42-6f7d68ca"]}


def make_bdd100k(root, old=False):
    """BDD100K at 72x128: 6 train, 2 val images; the first row of a mask holds 0..18 and 255. old: seg/."""
    root, rng = Path(root), np.random.default_rng(9)
    images = root / "bdd100k" / ("seg/images" if old else "images/10k")
    labels = root / "bdd100k" / ("seg/labels" if old else "labels/sem_seg/masks")
    for split, keys in BDD.items():
        for key in keys:
            mask = blocks(rng, (72, 128), (0, 2, 8, 10, 13), void=255)
            mask[0] = [*range(19), 255] * 6 + [0] * 8
            save_picture(images / f"{split}/{key}.jpg", picture_of(rng, mask))
            save_gray(labels / f"{split}/{key}{'_train_id' if old else ''}.png", mask)
            if old:
                save_picture(labels / f"{split}/{key}_train_color.png", picture_of(rng, mask))
    return root


def make_folder(root, n_val=2, classes=("ground", "tall tree 0 128 0", "car", "sky 70 130 180")):
    """A user's own data: .jpg and .png images, one in a sub-folder; gray and palette masks; made-up tags."""
    root, rng = Path(root), np.random.default_rng(6)
    names = {"train": [*(f"img{k}" for k in range(5)), "more/img0"], "val": [f"img{k}" for k in range(n_val)]}
    for split, stems in names.items():
        for k, stem in enumerate(stems):
            mask = blocks(rng, SIZES[k % 4], range(len(classes)), void=255)
            suffix = ("jpg", "png")[k % 2]
            save_picture(root / f"images/{split}/{stem}.{suffix}", picture_of(rng, mask))
            (save_gray, save_palette)[k % 2](root / f"masks/{split}/{stem}.png", mask)
    tags = [f"images/train/{stem}.jpg, {classes[0]}" for stem in names["train"]]
    for k in range(3):
        mask = blocks(rng, SIZES[k], range(len(classes)))
        save_picture(root / f"unlabeled/new{k}.jpg", picture_of(rng, mask))
        tags.append(f"unlabeled/new{k}.jpg, {classes[0]}, {classes[2]}")
    save_lines(root / "tags.txt", tags)
    save_lines(root / "classes.txt", classes)
    return root
