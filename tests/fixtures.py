"""Small dataset trees in the real formats. Each make_* writes one to `root` and returns what --root takes.

Pictures can be learned: every class has a colour of its own, plus noise. Sizes are about 64x80, some odd.
"""
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import scipy.io
import scipy.sparse
from PIL import Image

from common.datasets import voc_palette

SIZES = ((64, 80), (61, 77), (80, 64), (64, 80))  # (height, width), in turn


def blocks(rng, size, classes, void=None):
    """Mask uint8 [H, W]: classes[0] and two rectangles of others, each in a ring of `void` if given."""
    mask = np.full(size, classes[0], np.uint8)
    for label in rng.choice(classes[1:], 2, replace=len(classes) < 3):
        height, width = (int(rng.integers(side // 4, side // 2)) for side in size)
        top, left = int(rng.integers(1, size[0] - height - 1)), int(rng.integers(1, size[1] - width - 1))
        if void is not None:
            mask[top - 1:top + height + 1, left - 1:left + width + 1] = void
        mask[top:top + height, left:left + width] = label
    return mask


def picture_of(rng, mask):
    """Image uint8 [H, W, 3]: a fixed colour for each value of the mask, plus noise."""
    colours = np.random.default_rng(5).integers(30, 226, (256, 3))
    return (colours[mask] + rng.normal(0, 10, (*mask.shape, 3))).clip(0, 255).astype(np.uint8)


def save_picture(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def save_gray(path, mask):
    """8-bit gray PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(mask, np.uint8)).save(path)


def save_palette(path, mask):
    """8-bit palette PNG with VOC's colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(mask, np.uint8))
    image.putpalette(voc_palette().tobytes())
    image.save(path)


def save_low_bit_gray(path, mask, bits):
    """Gray PNG of 1, 2 or 4 bits per pixel, which Pillow can read but not write: header, packed rows, end."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    shifts = np.arange(bits - 1, -1, -1)
    rows = [b"\0" + np.packbits((row[:, None] >> shifts) & 1).tobytes() for row in np.asarray(mask, np.uint8)]
    header = struct.pack(">IIBBBBB", mask.shape[1], mask.shape[0], bits, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"".join(rows)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b""))


def save_sbd(path, mask):
    """SBD's cls/*.mat: struct GTcls with Boundaries (20 sparse maps), Segmentation and CategoriesPresent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    boundaries = np.empty((20, 1), object)
    for k in range(20):
        edge = np.zeros(mask.shape, bool)
        edge[:-1] = (mask[:-1] == k + 1) != (mask[1:] == k + 1)
        boundaries[k, 0] = scipy.sparse.csc_matrix(edge)
    present = np.array([[label] for label in np.unique(mask) if label], np.uint8)
    fields = {"Boundaries": boundaries, "Segmentation": mask, "CategoriesPresent": present}
    scipy.io.savemat(path, {"GTcls": fields}, do_compression=True)


def save_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows))


def add_junk(folder):
    """What archives and file browsers leave between the files."""
    (folder / "__MACOSX").mkdir()
    for name in (".DS_Store", "Thumbs.db", "._2007_000032.png", "._2007_000032.jpg", "__MACOSX/._x.png",
                 "__MACOSX/stray.png", "__MACOSX/stray.jpg", "__MACOSX/stray.mat"):
        (folder / name).write_bytes(b"not a picture")


VOC_TRAIN = [f"2007_{number:06d}" for number in (32, 39, 63, 68, 121, 170, 241, 243, 250, 256, 333, 363)]
VOC_VAL = [f"2007_{number:06d}" for number in (33, 42, 61, 123, 129, 175)]
SBD_ONLY = [f"2008_{number:06d}" for number in (2, 3, 7, 8, 9, 16)]


def make_voc(root, n_train=6, n_val=3):
    """VOCdevkit/VOC2012; palette masks of classes 0, 1, 15, 16, 17 and borders of 255. One image is gray."""
    root, rng = Path(root), np.random.default_rng(1)
    voc = root / "VOCdevkit/VOC2012"
    lists = {"train": VOC_TRAIN[:n_train], "val": VOC_VAL[:n_val]}
    for k, key in enumerate(lists["train"] + lists["val"]):
        mask = blocks(rng, SIZES[k % 4], (0, 1, 15, 16, 17), void=255)
        pixels = picture_of(rng, mask)
        save_picture(voc / f"JPEGImages/{key}.jpg", pixels if k else pixels[..., 0])
        save_palette(voc / f"SegmentationClass/{key}.png", mask)
    lists["trainval"] = sorted(lists["train"] + lists["val"])
    for name, keys in lists.items():
        save_lines(voc / f"ImageSets/Segmentation/{name}.txt", keys)
    return root


def add_sbd_only(voc, n_extra):
    """Write the first images that SBD alone labels. -> {key: mask of classes 0, 1 and 15, without 255}"""
    rng, masks = np.random.default_rng(2), {}
    for k, key in enumerate(SBD_ONLY[:n_extra]):
        masks[key] = blocks(rng, SIZES[k % 4], (0, 1, 15))
        save_picture(voc / f"JPEGImages/{key}.jpg", picture_of(rng, masks[key]))
    return masks


def make_sbd(root, n_extra=4):
    """SBD beside VOC (made if it is not there): `n_extra` images of its own; the second image of VOC train,
    labelled 3 throughout; and the first of VOC val, which must not be trained on."""
    root = Path(root)
    voc, sbd = root / "VOCdevkit/VOC2012", root / "benchmark_RELEASE/dataset"
    if not voc.exists():
        make_voc(root)
    masks = {key: np.full(np.array(Image.open(voc / f"SegmentationClass/{key}.png")).shape, 3, np.uint8)
             for key in (VOC_TRAIN[1], VOC_VAL[0])} | add_sbd_only(voc, n_extra)
    for key, mask in masks.items():
        save_sbd(sbd / f"cls/{key}.mat", mask)
        (sbd / "img").mkdir(exist_ok=True)
        shutil.copy(voc / f"JPEGImages/{key}.jpg", sbd / f"img/{key}.jpg")
    save_lines(sbd / "train.txt", list(masks)[:-1])
    save_lines(sbd / "val.txt", list(masks)[-1:])
    return root


def make_aug(root, n_extra=4):
    """SegmentationClassAug in VOC (made if it is not there): gray masks of VOC's ids and `n_extra` others."""
    root = Path(root)
    voc = root / "VOCdevkit/VOC2012"
    if not voc.exists():
        make_voc(root)
    masks = {path.stem: np.array(Image.open(path)) for path in (voc / "SegmentationClass").glob("*.png")}
    for key, mask in (masks | add_sbd_only(voc, n_extra)).items():
        save_gray(voc / f"SegmentationClassAug/{key}.png", mask)
    return root


CITY_TRAIN = ("aachen_000000_000019", "aachen_000001_000019", "bochum_000000_000313", "jena_000000_000019",
              "zurich_000120_000019", "zurich_000121_000019")
CITY_VAL = ("frankfurt_000000_000294", "lindau_000000_000019")
CITY_ROADS = (7, 8, 11, 21, 23, 26)  # ids of road, sidewalk, building, vegetation, sky, car


def make_cityscapes(root, nested=False):
    """Cityscapes at 64x128: 6 train, 2 val, 1 test image; the first row of every mask holds the ids 0..33.
    nested: the two archives unpacked into folders of their own."""
    root, rng = Path(root), np.random.default_rng(3)
    images = root / ("leftImg8bit_trainvaltest/leftImg8bit" if nested else "leftImg8bit")
    truths = root / ("gtFine_trainvaltest/gtFine" if nested else "gtFine")
    for split, keys in (("train", CITY_TRAIN), ("val", CITY_VAL), ("test", ("berlin_000000_000019",))):
        for key in keys:
            mask, where = blocks(rng, (64, 128), CITY_ROADS), f"{split}/{key.split('_')[0]}/{key}"
            mask[0] = np.arange(128) % 34
            save_picture(images / f"{where}_leftImg8bit.png", picture_of(rng, mask))
            save_gray(truths / f"{where}_gtFine_labelIds.png", mask if split != "test" else 0 * mask)
            save_picture(truths / f"{where}_gtFine_color.png", picture_of(rng, mask))
    return root


CAMVID = {"train": ("0001TP_006690", "0001TP_006720", "0006R0_f00930", "0006R0_f00960", "0016E5_00390",
                    "0016E5_00901"),
          "val": ("0016E5_07959", "0016E5_07961"), "test": ("Seq05VD_f00000", "Seq05VD_f00030")}


def make_camvid(root, test=True, lists=True):
    """CamVid at 72x96: 6 train, 2 val and (test) 2 test images; the first row of every mask holds 0..11;
    (lists) train.txt, .. with the absolute paths of another machine."""
    root, rng = Path(root), np.random.default_rng(4)
    for split, keys in CAMVID.items():
        if split == "test" and not test:
            continue
        for key in keys:
            mask = blocks(rng, (72, 96), (3, 0, 1, 5, 8))
            mask[0] = np.arange(96) % 12
            save_picture(root / f"CamVid/{split}/{key}.png", picture_of(rng, mask))
            save_gray(root / f"CamVid/{split}annot/{key}.png", mask)
        if lists:
            rows = [f"/SegNet/CamVid/{split}/{key}.png /SegNet/CamVid/{split}annot/{key}.png" for key in keys]
            save_lines(root / f"CamVid/{split}.txt", rows)
    return root


SUN = {"train": 6, "test": 2}
SUN_37_TO_13 = (0, 12, 5, 6, 1, 4, 9, 10, 12, 13, 6, 8, 6, 13, 10, 6, 13, 6, 7, 7, 5, 7, 3, 2, 6, 11, 7, 7, 7,
                7, 7, 7, 6, 7, 7, 7, 7, 7)  # labels of the 37 -> labels of the 13; 0 is void


def make_sunrgbd(root, kinds=(37, 13), renumbered=False):
    """SUN RGB-D: 6 train, 2 test images, each of a size of its own; the first row of a mask of 37 holds all.
    kinds: the masks that are there. As the archives unpack, or (renumbered) image/, label37/, label13/."""
    root, rng = Path(root), np.random.default_rng(7)
    for split, number in SUN.items():
        for k in range(1, number + 1):
            size = (44 + 4 * k, 60 + 3 * k) if split == "train" else (64 + k, 80 - k)
            mask = blocks(rng, size, (1, 5, 2, 12, 37), void=0)
            mask[0] = np.arange(size[1]) % 38
            images = f"image/{split}" if renumbered else f"SUNRGBD-{split}_images"
            save_picture(root / images / f"img-{k:06d}.jpg", picture_of(rng, mask))
            of_37 = f"sunrgbd_train_test_labels/img-{k + 5050 * (split == 'train'):06d}"
            if 37 in kinds:
                save_gray(root / f"{f'label37/{split}/{k:08d}' if renumbered else of_37}.png", mask)
            if 13 in kinds:
                of_13 = f"label13/{split}" if renumbered else f"{split}13labels"
                save_gray(root / of_13 / f"img13labels-{k:06d}.png", np.array(SUN_37_TO_13)[mask])
    return root


PCONTEXT = {"train": [f"2008_{number:06d}" for number in (8, 15, 19, 23, 26, 28)],
            "val": [f"2008_{number:06d}" for number in (2, 3)]}
PCONTEXT_ROW = {360: 50, 2: 1, 397: 11, 19: 52, 431: 0, 1: 0, 0: 0, 459: 0}  # stored -> class, official order
PCONTEXT_SORTED = {50: 47, 1: 1, 11: 50, 52: 4, 0: 0}                        # class -> class, sorted order


def make_pcontext(root, pngs=False):
    """PASCAL-Context on VOC 2010, 6 train, 2 val images: the release's trainval/*.mat, LabelMap of several
    types; or (pngs) SegmentationClassContext in sorted order. The first row of a mask holds PCONTEXT_ROW in turn."""
    root, rng = Path(root), np.random.default_rng(8)
    voc, row = root / "VOCdevkit/VOC2010", np.array([*PCONTEXT_ROW])
    for split, keys in PCONTEXT.items():
        for k, key in enumerate(keys):
            mask = row[blocks(rng, SIZES[k % 4], range(5))]
            mask[0] = row[np.arange(mask.shape[1]) % len(row)]
            save_picture(voc / f"JPEGImages/{key}.jpg", picture_of(rng, mask % 256))
            if pngs:
                sorted_order = np.vectorize(lambda stored: PCONTEXT_SORTED[PCONTEXT_ROW[stored]])(mask)
                save_gray(voc / f"SegmentationClassContext/{key}.png", sorted_order)
            else:
                (root / "trainval").mkdir(exist_ok=True)
                kind = (np.uint16, np.float64, np.int32)[k % 3]
                scipy.io.savemat(root / f"trainval/{key}.mat", {"LabelMap": mask.astype(kind)})
        save_lines(voc / f"ImageSets/Main/{split}.txt", keys)
        save_lines(voc / f"ImageSets/Main/aeroplane_{split}.txt", [f"{key} -1" for key in keys])
    if pngs:
        save_lines(voc / "SegmentationClassContext/order.txt", ["sorted"])
    return root


BDD = {"train": ["0004a4c0-d4dff0ad", "13e7e580-68BC1FE2", "00054602-3bf57337", "0a0a0b1a-27d9fd72",
                 "4c1681b2-2D75E377", "7a0ba9d4-c36faa51"],
       "val": ["7d06fefd-f7be05a6", "b1c66a42-6f7d68ca"], "test": ["ff55861e-a06b953c"]}


def make_bdd100k(root, old=False):
    """BDD100K's 10k images at 72x128: 6 train, 2 val, 1 test; the first row of a mask holds 0..18 and 255,
    but the mask of the last training image is 255 everywhere. old: the layout seg/, with colours in the way."""
    root, rng = Path(root), np.random.default_rng(9)
    for split, keys in BDD.items():
        for key in keys:
            mask = blocks(rng, (72, 128), (0, 2, 8, 10, 13), void=255)
            mask[0] = [*range(19), 255] * 6 + [0] * 8
            images = root / "bdd100k" / ("seg/images" if old else "images/10k")
            save_picture(images / f"{split}/{key}.jpg", picture_of(rng, mask))
            if key == BDD["train"][-1]:
                mask[:] = 255
            labels = root / "bdd100k" / ("seg/labels" if old else "labels/sem_seg")
            if split != "test" and old:
                save_gray(labels / f"{split}/{key}_train_id.png", mask)
                save_picture(labels / f"{split}/{key}_train_color.png", picture_of(rng, mask))
            elif split != "test":
                save_gray(labels / f"masks/{split}/{key}.png", mask)
                save_picture(labels / f"colormaps/{split}/{key}.png", picture_of(rng, mask))
    return root


def make_folder(root, n_train=6, n_val=2, n_unlabeled=3,
                classes=("ground", "tall tree 0 128 0", "car", "sky 70 130 180")):
    """A user's own data: .jpg and .png images, one in a sub-folder; gray and palette masks with some 255."""
    root, rng = Path(root), np.random.default_rng(6)
    names = {"train": [*(f"img{k}" for k in range(n_train - 1)), "more/img0"],
             "val": [f"img{k}" for k in range(n_val)]}
    for split, stems in names.items():
        for k, stem in enumerate(stems):
            mask = blocks(rng, SIZES[k % 4], range(len(classes)), void=255)
            save_picture(root / f"images/{split}/{stem}.{('jpg', 'png')[k % 2]}", picture_of(rng, mask))
            (save_gray, save_palette)[k % 2](root / f"masks/{split}/{stem}.png", mask)
    for k in range(n_unlabeled):
        mask = blocks(rng, SIZES[k % 4], range(len(classes)))
        save_picture(root / f"unlabeled/new{k}.jpg", picture_of(rng, mask))
    save_lines(root / "classes.txt", classes)
    return root
