"""common/datasets on small trees in the real formats; every error names the file and the cause."""
import codecs
import os
import pickle
import shutil
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torchvision
from conftest import error_of
from PIL import Image

from common.datasets import SegmentationData, choose_labelled, open_dataset
from common.datasets.labelled import read_list
from common.datasets.masks import find_files, read_image, read_mat
from common.datasets.tags import Tagged, read_tags
from common.datasets.voc import voc_palette
from common.settings import say
from fixtures import (BDD, CAMVID, CAMVID_COLOURS, CITY_IDS, CITY_TRAIN, CITY_VAL, PCONTEXT, SBD_ONLY,
                      SUN_37_TO_13, VOC_TRAIN, VOC_VAL, blocks, make_bdd100k, make_camvid,
                      make_cityscapes, make_folder, make_pcontext, make_sbd, make_sunrgbd,
                      make_voc, save_gray, save_lines, save_palette, save_picture, sbd_only_masks)

MAKERS = {"voc": make_sbd, "cityscapes": make_cityscapes, "camvid": make_camvid, "sunrgbd": make_sunrgbd,
          "sunrgbd13": make_sunrgbd, "pcontext": make_pcontext, "pcontext59": make_pcontext,
          "bdd100k": make_bdd100k, "folder": make_folder}
OWN = {"voc": "VOCdevkit/VOC2012", "camvid": "CamVid", "pcontext": "VOCdevkit/VOC2010",
       "pcontext59": "VOCdevkit/VOC2010", "bdd100k": "bdd100k"}


def masked(split):
    return [i for i in range(len(split)) if split.has_mask(i)]


@pytest.mark.parametrize("name", MAKERS)
def test_every_dataset_has_the_promised_types_sizes_and_values(tmp_path, name):
    """Its root may be its own folder or its parent; a wrong one is refused."""
    root = MAKERS[name](tmp_path)
    data, own = open_dataset(name, str(root)), open_dataset(name, root / OWN.get(name, ""))
    assert own.train.keys == data.train.keys and own.train.masks == data.train.masks
    assert own.val.keys == data.val.keys
    message = error_of(open_dataset, name, tmp_path / "nowhere")
    assert f"{tmp_path / 'nowhere'}: no {name} there. Expected: " in message
    assert data.palette.shape == (len(data.classes), 3) and data.palette.dtype == np.uint8
    seen = set()
    for split in (data.train, data.val):
        assert len(split) == len(split.keys) >= 2 and split.keys == sorted(split.keys)
        for i in range(len(split)):
            image = split.image(i)
            assert image.dtype == np.uint8 and image.flags.writeable and image.shape[2:] == (3,)
            if split.has_mask(i):
                mask = split.mask(i)
                assert mask.dtype == np.uint8 and mask.flags.writeable and mask.shape == image.shape[:2]
                seen |= set(np.unique(mask).tolist())
    assert seen <= {*range(len(data.classes)), 255} and len(seen) >= 4
    assert (255 in seen) == (name != "pcontext")


VOC, CITY = "VOCdevkit/VOC2012", "leftImg8bit gtFine".split()


@pytest.mark.parametrize("name, places", [
    ("voc", {VOC: "VOC2012", "benchmark_RELEASE/dataset": ""}),
    ("voc", {VOC: f"VOCtrainval_11-May-2012/{VOC}", "benchmark_RELEASE/dataset": "VOCaug/dataset"}),
    ("cityscapes", {folder: f"{folder}_trainvaltest/{folder}" for folder in CITY}),
    ("sunrgbd", {"": "SUNRGBD"})])
def test_data_are_found_where_archives_unpack(tmp_path, name, places):
    made = open_dataset(name, MAKERS[name](tmp_path / "made"))
    for old, new in places.items():
        shutil.copytree(tmp_path / "made" / old, tmp_path / "data" / new, dirs_exist_ok=True)
    data = open_dataset(name, tmp_path / "data")
    assert data.train.keys == made.train.keys and data.val.keys == made.val.keys
    assert all(np.array_equal(data.train.mask(i), made.train.mask(i)) for i in masked(made.train))


@pytest.mark.parametrize("name, lost, wrong", [
    ("voc", f"JPEGImages/{SBD_ONLY[2]}.jpg", f"1 of 10 listed images are missing ({SBD_ONLY[2]})"),
    ("voc", f"SegmentationClass/{VOC_VAL[0]}.png", "1 of 3 val images have no mask (2007_000033)"),
    ("voc", "ImageSets/Segmentation/val.txt", "val.txt: cannot be read as a text file"),
    ("cityscapes", "gtFine/train/aachen", "leftImg8bit/train/aachen: 2 images without"),
    ("folder", "masks/train", "no training image has a mask. Expected: "),
    ("folder", "images/val", "no folder there. Expected: ")])
def test_incomplete_data_is_refused(tmp_path, name, lost, wrong):
    """SBD has a mask of the first val image of VOC, too, but without borders: not for scoring."""
    path = MAKERS[name](tmp_path) / OWN.get(name, "") / lost
    os.remove(path) if path.is_file() else shutil.rmtree(path)
    assert wrong in error_of(open_dataset, name, tmp_path)


def test_masks_of_0_and_255_and_images_in_both_lists_are_told(tmp_path):
    root = make_folder(tmp_path / "folder")
    save_lines(root / "classes.txt", ["ground", "road"])
    for path in (root / "masks/train").rglob("*.png"):
        save_gray(path, 255 * (np.array(Image.open(path)) > 0))
    assert "the masks hold only 0 and 255" in error_of(open_dataset, "folder", root)
    lists = make_pcontext(tmp_path) / OWN["pcontext"] / "ImageSets/Main"
    shutil.copy(lists / "train.txt", lists / "val.txt")
    assert "6 images in train and val" in error_of(open_dataset, "pcontext", tmp_path)


def test_trainaug_is_derived_and_masks_come_from_the_best_source(tmp_path):
    data = open_dataset("voc", make_sbd(tmp_path))
    assert data.train.keys == sorted(VOC_TRAIN + SBD_ONLY)  # not VOC_VAL[0], in SBD's list
    assert data.val.keys == VOC_VAL and data.voc_train == set(VOC_TRAIN) and data.scored_on == "val"
    sources = [Path(path).parent.name for path in data.train.masks]
    assert sources == ["SegmentationClass"] * 6 + ["cls"] * 4
    for key, mask in sbd_only_masks().items():
        assert np.array_equal(data.train.mask(data.train.keys.index(key)), mask)
    own = np.unique(data.train.mask(1))  # SBD has it, too, as class 3 throughout
    assert 255 in own and 3 not in own
    os.remove(data.train.masks[1])
    assert (open_dataset("voc", tmp_path).train.mask(1) == 3).all()
    save_palette(Path(data.train.masks[1]), np.full((61, 77), 15))
    shutil.rmtree(tmp_path / "benchmark_RELEASE")
    assert open_dataset("voc", tmp_path).train.keys == VOC_TRAIN
    assert data.classes[3] == "bird" and data.classes[20] == "tvmonitor" and len(data.classes) == 21
    assert data.palette[[1, 6, 15]].tolist() == [[128, 0, 0], [0, 128, 128], [192, 128, 128]]
    assert "voc train: 10 images" in data.notes[0] and "the published list has 10582" in data.notes[0]


def test_segmentation_class_aug_stands_in_for_what_is_missing(tmp_path):
    voc = make_voc(tmp_path) / VOC
    for key, mask in sbd_only_masks().items():
        save_gray(voc / f"SegmentationClassAug/{key}.png", mask)
    for path in (voc / "SegmentationClass").glob("*.png"):
        save_gray(voc / f"SegmentationClassAug/{path.name}", Image.open(path))
    data = open_dataset("voc", tmp_path)
    assert data.train.keys == sorted(VOC_TRAIN + SBD_ONLY)
    assert all("Aug" not in path for path in data.train.masks[:6] + data.val.masks)
    from_voc = data.train.mask(0)
    shutil.rmtree(voc / "SegmentationClass")  # now it serves VOC's own images and val as well
    data = open_dataset("voc", tmp_path)
    assert "Aug" in data.train.masks[0] and "Aug" in data.val.masks[0] and len(data.train) == 10
    assert np.array_equal(data.train.mask(0), from_voc)


VOC_TAR, SBD_TGZ = "VOCtrainval_11-May-2012.tar", "benchmark.tgz"


def test_download_fetches_what_is_missing_once_and_an_interrupted_one_is_no_dataset(tmp_path, monkeypatch):
    """torchvision's classes stay; fetching is replaced: an archive comes from a tree made here."""
    made, root = make_sbd(tmp_path / "made"), tmp_path / "data"
    fetched = []

    def fetch(url, root, filename, md5):
        fetched.append(filename)
        os.makedirs(root, exist_ok=True)
        open(os.path.join(root, filename), "wb").close()
        if filename == VOC_TAR:
            shutil.copytree(made / "VOCdevkit", os.path.join(root, "VOCdevkit"))
        else:
            unpacked = os.path.join(root, "benchmark_RELEASE/dataset")
            shutil.copytree(made / "benchmark_RELEASE/dataset", unpacked)
            os.mkdir(os.path.join(unpacked, "img"))
            os.mkdir(os.path.join(unpacked, "inst"))
        if filename == broken:
            raise URLError("connection reset")
    monkeypatch.setattr(torchvision.datasets.voc, "download_and_extract_archive", fetch)
    monkeypatch.setattr(torchvision.datasets.sbd, "download_and_extract_archive", fetch)
    for broken in (VOC_TAR, SBD_TGZ):
        message = error_of(open_dataset, "voc", root, True)
        assert "connection reset" in message and SBD_TGZ in message and str(root) in message
    assert (root / VOC).exists() and not (root / "SBD").exists()
    broken = ""
    with ThreadPoolExecutor(2) as pool:  # as the processes of a torchrun
        opened = list(pool.map(lambda _: open_dataset("voc", root, download=True), range(2)))
    assert [len(masked(data.train)) for data in opened] == [10, 10]
    assert fetched == [VOC_TAR, VOC_TAR, SBD_TGZ, SBD_TGZ]
    assert sorted(os.listdir(root)) == [".download.lock", "SBD", "VOCdevkit"]


def test_cityscapes_ids_are_mapped_and_train_ids_are_known_by_their_name_and_come_second(tmp_path):
    root = make_cityscapes(tmp_path)
    data = open_dataset("cityscapes", root)
    assert data.train.keys == list(CITY_TRAIN) and data.val.keys == list(CITY_VAL)
    expected = [CITY_IDS.index(k) if k in CITY_IDS else 255 for k in range(34)]
    assert data.train.mask(2)[0, :34].tolist() == expected  # the first row holds the ids 0..33
    assert len(data.classes) == 19 and data.classes[0] == "road" and data.classes[18] == "bicycle"
    path = Path(data.train.masks[0])
    save_gray(path.with_name(path.name.replace("labelIds", "labelTrainIds")), np.full((64, 128), 5))
    assert open_dataset("cityscapes", root).train.masks == data.train.masks
    os.remove(path)
    assert (open_dataset("cityscapes", root).train.mask(0) == 5).all()


@pytest.mark.parametrize("lists", [True, False])
def test_camvid_is_scored_on_test_if_it_is_there(tmp_path, lists):
    base = make_camvid(tmp_path) / "CamVid"
    if not lists:
        for split in CAMVID:
            os.remove(base / f"{split}.txt")
    data = open_dataset("camvid", tmp_path)
    assert data.train.keys == list(CAMVID["train"]) and data.val.keys == list(CAMVID["test"])
    assert data.train.mask(0)[0, :12].tolist() == [*range(11), 255]
    assert len(data.classes) == 11 and data.classes[4] == "Pavement"
    shutil.rmtree(base / "testannot")
    data = open_dataset("camvid", tmp_path)
    assert data.scored_on == "val" and data.val.keys == list(CAMVID["val"])


@pytest.mark.parametrize("layout", ["kaggle", "cambridge"])
def test_camvid_of_32_colours_is_read_as_segnets_11_classes(tmp_path, layout):
    data = open_dataset("camvid", make_camvid(tmp_path, layout))
    assert data.train.keys == list(CAMVID["train"]) and data.val.keys == list(CAMVID["test"])
    assert data.scored_on == "test" and masked(data.train) == [*range(6)]
    path = Path(data.train.masks[0])
    assert data.train.mask(0)[0].tolist() == [*CAMVID_COLOURS.values()] * 3
    picture = Image.open(data.train.masks[1])
    picture.resize((96, 72), Image.Resampling.BILINEAR, (0, 0, 90, 70)).save(path)
    message = error_of(data.train.mask, 0)
    assert f"{path}: holds the colours " in message and "resized" in message


def test_camvid_of_cambridge_is_split_as_published(tmp_path):
    root = make_camvid(tmp_path, "cambridge")
    frames = {"0001TP_{:06d}": range(6690, 10381, 30), "0006R0_f{:05d}": range(930, 3931, 30),
              "0016E5_{:05d}": range(7959, 8160, 2), "Seq05VD_f{:05d}": range(0, 5101, 30)}
    for key in [form.format(k) for form, numbers in frames.items() for k in numbers]:
        (root / f"CamVid/701_StillsRaw_full/{key}.png").touch()
        (root / f"CamVid/LabeledApproved_full/{key}_L.png").touch()
    data = open_dataset("camvid", root)
    assert len(data.val) == 233 and not any("camvid test" in note for note in data.notes)
    assert len(data.train) == 62 + 101 + 2  # of 204, the third drive has two here


@pytest.mark.parametrize("renumbered", [False, True])
def test_sunrgbd_pairs_and_classes(tmp_path, renumbered):
    """Each image has a size of its own, so that a mask of another image would be refused."""
    root = make_sunrgbd(tmp_path, renumbered)
    fine, coarse = open_dataset("sunrgbd", root), open_dataset("sunrgbd13", root)
    assert fine.train.keys == coarse.train.keys == [f"train/{k:06d}" for k in range(1, 7)]
    assert fine.val.keys == ["test/000001", "test/000002"] and fine.scored_on == "test"
    assert fine.train.mask(2)[0, :38].tolist() == [255, *range(37)]
    assert len(fine.classes) == 37 and (fine.classes[0], fine.classes[36]) == ("wall", "bag")
    assert len(coarse.classes) == 13 and coarse.classes[12] == "window"
    merged = np.array([label - 1 for label in SUN_37_TO_13[1:]] + [255] * 219)
    expected = [merged[fine.train.mask(i)] for i in range(6)]
    assert all("13" in path for path in coarse.train.masks)
    assert all(np.array_equal(coarse.train.mask(i), expected[i]) for i in range(6))
    for path in coarse.train.masks + coarse.val.masks:
        os.remove(path)
    derived = open_dataset("sunrgbd13", root).train  # from the masks of 37 classes
    assert derived.masks == fine.train.masks
    assert all(np.array_equal(derived.mask(i), expected[i]) for i in range(6))


CONTEXT_TO_SORTED = [int(word) for word in """
    1 6 7 8 10 12 14 15 17 20 50 23 31 34 37 40 43 49 52 55 2 3 5 9 11 13 16 18 19 21 24 25 26 27
    28 29 30 32 33 35 36 22 39 46 38 41 42 44 45 47 48 4 51 53 54 56 57 58 59""".split()]


def test_pcontext_classes_with_and_without_background(tmp_path):
    """An image of 20x23 pixels holds the numbers 0..459 in turn."""
    root = make_pcontext(tmp_path)
    data, without = open_dataset("pcontext", root), open_dataset("pcontext59", root)
    assert data.train.keys == without.train.keys == PCONTEXT["train"] and data.val.keys == PCONTEXT["val"]
    save_picture(Path(data.train.images[0]), np.zeros((20, 23, 3), np.uint8))
    scipy.io.savemat(data.train.masks[0], {"LabelMap": np.arange(460).reshape(20, 23)})
    mask = data.train.mask(0).ravel()
    found = [data.classes[mask[number]] for number in (2, 19, 360, 397, 440)]
    assert found == ["aeroplane", "bedclothes", "sky", "table", "wall"]
    alphabetical = mask[mask > 0].tolist()  # by their numbers among the 459
    assert [alphabetical.index(k) + 1 for k in range(1, 60)] == CONTEXT_TO_SORTED
    assert np.array_equal(without.train.mask(0).ravel(), np.where(mask > 0, mask.astype(int) - 1, 255))
    assert data.classes == ("background", *without.classes)
    assert np.array_equal(data.palette, voc_palette()[:60])


@pytest.mark.parametrize("old", [False, True])
def test_bdd100k_holds_train_ids_of_cityscapes_classes(tmp_path, old):
    data = open_dataset("bdd100k", make_bdd100k(tmp_path, old))
    assert data.train.keys == BDD["train"] and data.val.keys == BDD["val"]
    assert data.train.mask(0)[0, :20].tolist() == [*range(19), 255]
    cities = open_dataset("cityscapes", make_cityscapes(tmp_path / "cityscapes"))
    assert data.classes == cities.classes and np.array_equal(data.palette, cities.palette)


def test_folder_pairs_by_path_and_keeps_train_and_val_apart(tmp_path):
    data = open_dataset("folder", make_folder(tmp_path))
    assert data.train.keys == [*(f"train/img{k}" for k in range(5)), "train/more/img0",
                               *(f"unlabeled/new{k}" for k in range(3))]
    assert data.val.keys == ["val/img0", "val/img1"]  # other images than those in train
    assert masked(data.train) == list(range(6)) and data.notes == ()
    assert np.array_equal(data.train.mask(5), np.array(Image.open(tmp_path / "masks/train/more/img0.png")))
    assert data.classes == ("ground", "tall tree", "car", "sky")
    assert data.palette.tolist() == [[0, 0, 0], [0, 128, 0], [0, 128, 0], [70, 130, 180]]
    os.rename(tmp_path / "masks/train/img1.png", tmp_path / "masks/train/img1_mask.png")
    data = open_dataset("folder", tmp_path)
    assert masked(data.train) == [0, 2, 3, 4, 5] and "img1_mask" in data.notes[0]
    shutil.copy(tmp_path / "images/train/img0.jpg", tmp_path / "images/train/img0.jpeg")
    assert "have one name" in error_of(open_dataset, "folder", tmp_path)


def test_class_lists_may_come_from_any_editor_and_wrong_ones_are_refused(tmp_path):
    make_folder(tmp_path)
    text = "# name r g b\r\nground\r\n\r\nHäuser  1 2 3\r\nsky 7\r\ncar"
    (tmp_path / "classes.txt").write_bytes(codecs.BOM_UTF8 + text.encode())
    assert open_dataset("folder", tmp_path).classes == ("ground", "Häuser", "sky 7", "car")
    for lines in (["one"], [], ["a", "b", "a"], [f"c{k} 1 2 3" for k in range(300)]):
        save_lines(tmp_path / "classes.txt", lines)
        assert "classes.txt: expected 2 to 254 names" in error_of(open_dataset, "folder", tmp_path)


def test_images_are_rgb_as_stored_and_16_bits_become_8(tmp_path):
    """Pillow's own conversion to RGB would cut off all that is brighter than 255."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees", which the mask would not follow
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels).convert("RGBA").save(tmp_path / "alpha.png")
    assert np.array_equal(read_image(tmp_path / "turned.png"), pixels)
    assert np.array_equal(read_image(tmp_path / "turned.png", upright=True), np.rot90(pixels, -1))
    assert np.array_equal(read_image(tmp_path / "alpha.png"), pixels)
    values = np.array([[0, 128, 129, 257, 1000, 32896, 65406, 65407, 65535]], np.uint16)
    expected = np.array([[0, 0, 1, 1, 4, 128, 254, 255, 255]])
    for name in ("gray.png", "gray.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert np.array_equal(read_image(tmp_path / name), np.stack([expected] * 3, 2))


def test_images_that_cannot_be_read_are_named_in_one_sentence(tmp_path):
    Image.fromarray(np.ones((4, 5), np.float32)).save(tmp_path / "float.tif")
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (40, 50)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:50])
    (tmp_path / "foreign.jpg").write_bytes(b"%PDF-1.7 and more")
    for name in ("folder.png/inside.png", "__MACOSX/stray.png", "._hidden.png"):
        save_picture(tmp_path / name, np.zeros((4, 5, 3), np.uint8))
    (tmp_path / "loop").symlink_to("loop")
    assert sorted(find_files(tmp_path, [".png"])) == ["bomb", "cut", "inside"]
    assert "loop: this folder cannot be read (Too many" in error_of(find_files, tmp_path / "loop", [".png"])
    for name, wrong in {"float.tif": "8 or 16 bits", "bomb.png": "exceeds limit", "cut.png": "",
                        "foreign.jpg": "identify", "gone.png": ""}.items():
        message = error_of(read_image, tmp_path / name)
        assert message.startswith(f"{tmp_path / name}: cannot be read as an image (")
        assert wrong in message and "\n" not in message


def test_gray_and_palette_masks_keep_their_values_and_gray_ones_of_2_bits_are_refused(tmp_path):
    train = open_dataset("folder", make_folder(tmp_path)).train
    path, values = Path(train.masks[0]), np.arange(64)[:, None].repeat(80, 1) % 4
    for save in (save_gray, save_palette):
        save(path, values)
        assert np.array_equal(train.mask(0), values)
    picture = Image.open(path)
    picture.save(path, bits=2)
    assert np.array_equal(train.mask(0), values)
    stored = bytearray(path.read_bytes())
    stored[25] = 0  # the header's colour type, now gray, of which Pillow makes 0, 85, 170, 255
    stored[29:33] = struct.pack(">I", zlib.crc32(stored[12:29]))
    path.write_bytes(stored)
    assert np.array(Image.open(path)).max() == 255
    assert f"{path}: a PNG file of mode L, 2 bits" in error_of(train.mask, 0)


@pytest.mark.parametrize("name, kind, mode, values, wrong, cause", [
    ("cityscapes", "PNG", "L", [255], "holds 255, but only 0..33 are", "trainIds under the name of labelIds"),
    ("bdd100k", "PNG", "L", [26], "holds 26, but only 0..18 and 255 are", "called .._labelIds.png"),
    ("sunrgbd", "PNG", "L", [255], "holds 255, but only 0..37 are", "shifted already"),
    ("sunrgbd13", "PNG", "L", [14], "holds 14, but only 0..13 are", "labels of 37 classes"),
    ("camvid", "PNG", "L", [12], "holds 12, but only 0..11 and 255 are", "start at 1 instead of 0"),
    ("folder", "PNG", "L", [9, 38, 75, 147], "holds 9, 38, 75, .., but only 0..3 and 255 are", "brightness"),
    ("folder", "PNG", "RGB", [0], "a PNG file of mode RGB", ""),
    ("folder", "JPEG", "L", [0], "a JPEG file of mode L", "")])
def test_a_mask_error_names_file_fault_and_cause(tmp_path, name, kind, mode, values, wrong, cause):
    train = open_dataset(name, MAKERS[name](tmp_path)).train
    stored = np.resize(values, train.mask(0).shape).astype(np.uint8)
    Image.fromarray(stored).convert(mode).save(train.masks[0], format=kind)
    message = error_of(train.mask, 0)
    assert f"{train.masks[0]}: {wrong}" in message and cause in message


def test_masks_of_a_wrong_size_and_damaged_ones_are_refused(tmp_path):
    train = open_dataset("folder", make_folder(tmp_path)).train
    path = Path(train.masks[0])
    stored = path.read_bytes()
    for damaged in (b"", stored[:20], stored[:len(stored) // 2]):
        path.write_bytes(damaged)
        assert f"{path}: cannot be read as a mask" in error_of(train.mask, 0)
    save_gray(path, np.zeros((80, 64)))
    wrong = f"{path}: the mask has (height, width) (80, 64), its image {train.images[0]} (64, 80)"
    assert wrong in error_of(train.mask, 0)


@pytest.mark.parametrize("compressed", [True, False])
def test_damaged_mat_files_are_refused(tmp_path, compressed):
    rng, path = np.random.default_rng(0), tmp_path / "a.mat"
    mask = blocks(rng, (64, 80), (0, 1, 15))
    edges = np.empty((2, 1), object)
    edges[:, 0] = [scipy.sparse.csc_matrix(mask == k) for k in (1, 15)]
    scipy.io.savemat(path, {"GTcls": {"Boundaries": edges, "Segmentation": mask}}, do_compression=compressed)
    assert np.array_equal(read_mat(path, "GTcls.Segmentation"), mask)
    stored = path.read_bytes()
    for damaged in (stored[:len(stored) // 2], stored[:140] + bytes(len(stored) - 140)):
        path.write_bytes(damaged)
        message = error_of(read_mat, path, "GTcls.Segmentation")
        assert message.startswith(f"{path}: cannot be read as a MAT file of GTcls.Segm")
    for wrong in (0.5, -1.0, np.nan, 65536):
        scipy.io.savemat(path, {"LabelMap": mask.astype(float) + wrong})
        assert "not whole numbers from 0 to 65535" in error_of(read_mat, path, "LabelMap")


class Names(list):
    """A split of nothing but sorted names, all of which have a mask"""
    keys = property(lambda self: self)

    def has_mask(self, i):
        return True


CITIES = {"aachen": 174, "bochum": 96, "bremen": 316, "cologne": 154, "darmstadt": 85, "dusseldorf": 221,
          "erfurt": 109, "hamburg": 248, "hanover": 196, "jena": 119, "krefeld": 99, "monchengladbach": 94,
          "strasbourg": 365, "stuttgart": 196, "tubingen": 144, "ulm": 95, "weimar": 142, "zurich": 122}


def test_published_cityscapes_draws_are_repeated():
    """The pairs below are published; in their cities, sequences are numbered from 0 without gaps,
    so that names can be built. In a few others the real names differ, but not their order."""
    keys = [f"{city}_{k:06d}_000019" for city, count in CITIES.items() for k in range(count)]
    data = SegmentationData("cityscapes", (), None, Names(sorted(keys)), Names(), "val")
    published = {12345: {"jena_000088_000019", "stuttgart_000066_000019"},
                 34567: {"cologne_000110_000019", "weimar_000097_000019"},
                 56789: {"cologne_000142_000019", "jena_000079_000019"}}
    for seed, names in published.items():
        assert {data.train[i] for i in choose_labelled(data, "2", "", seed)[0]} == names
    for labeled, count in {"1/2": 1488, "1/8": 372, "1/30": 100, "372": 372, "all": 2975}.items():
        order = np.random.RandomState(7).permutation(2975).tolist()
        assert choose_labelled(data, labeled, "", 7) == (sorted(order[:count]), sorted(order[count:]))


def test_voc_counts_are_drawn_from_its_own_list_and_fractions_from_trainaug():
    keys = [f"2008_{k:06d}" for k in range(10582)]
    data = SegmentationData("voc", (), None, Names(keys), Names(), "val", voc_train=frozenset(keys[:1464]))
    for labeled, count, pool in (("1/8", 1323, 10582), ("1/50", 212, 10582), ("732", 732, 1464),
                                 ("1464", 1464, 1464), ("1465", 1465, 10582), ("all", 10582, 10582)):
        expected = np.random.RandomState(3).permutation(pool)[:count]
        assert choose_labelled(data, labeled, "", 3)[0] == sorted(expected.tolist())


def test_images_without_a_mask_are_never_drawn(tmp_path):
    data = open_dataset("folder", make_folder(tmp_path))
    os.remove(data.train.masks[2])
    data = open_dataset("folder", tmp_path)
    assert choose_labelled(data, "5", "", 0) == ([0, 1, 3, 4, 5], [2, 6, 7, 8])
    for labeled in ("6", "4/3"):
        assert "only 5 can be labelled" in error_of(choose_labelled, data, labeled, "", 0)
    for labeled in ("0", "-4", "1/0", "0.5", "half", ""):
        assert f"--labeled {labeled}: expected a count" in error_of(choose_labelled, data, labeled, "", 0)


@pytest.mark.parametrize("name, line", [  # {0} is the key, {1} the city, {2} the last six digits
    ("voc", "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png"), ("voc", "{} -1"),
    ("voc", "JPEGImages/{0}.jpg, SegmentationClass/{0}.png"), ("voc", "JPEGImages\\{}.jpg"),
    ("cityscapes", "leftImg8bit/train/{1}/{0}_leftImg8bit.png gtFine/{0}_gtFine_labelTrainIds.png"),
    ("cityscapes", "/images/train/{0}.png\t/segmentation/train/{0}_gtFine.png"),
    ("camvid", "/SegNet/CamVid/train/{0}.png /SegNet/CamVid/trainannot/{0}.png"), ("camvid", "{}_L.png"),
    ("bdd100k", "seg/images/train/{0}.jpg seg/labels/train/{0}_train_id.png"),
    ("sunrgbd", "image/train/img-{2}.jpg depth/train/00{2}.png label37/train/00{2}.png"),
    ("sunrgbd13", "SUNRGBD-train_images/img-{2}.jpg train13labels/img13labels-{2}.png"), ("sunrgbd", "{}"),
    ("pcontext59", "JPEGImages/{0}.jpg x/{0}.png"), ("folder", "images\\{}.jpg")])
def test_every_line_format_of_published_lists_is_read(tmp_path, name, line):
    data, file = open_dataset(name, MAKERS[name](tmp_path / "data")), tmp_path / "list.txt"
    keys = [data.train.keys[2], data.train.keys[0]]
    rows = [line.format(key, key.split("_")[0], key[-6:]) for key in keys]
    for text in ("\n".join(rows), "\ufeff\r\n# a comment\r\n" + "  \r\n".join(rows) + "\t\r\n\r\n"):
        file.write_bytes(text.encode())
        assert read_list(file, data) == keys
    labelled, unlabelled = choose_labelled(data, "no count", str(file), 0)  # the file overrides it
    assert labelled == [0, 2] and sorted(labelled + unlabelled) == list(range(len(data.train)))


def test_folder_keys_may_hold_blanks_commas_and_dots(tmp_path):
    root, file = make_folder(tmp_path / "data"), tmp_path / "list.txt"
    for stem in ("two words", "a, b", "frame.0001", "more/img1", "name.png"):
        save_picture(root / f"images/train/{stem}.jpg", np.zeros((20, 30, 3), np.uint8))
    data = open_dataset("folder", root)
    save_lines(file, data.train.keys[::-1])
    assert read_list(file, data) == data.train.keys[::-1]
    own = data.train.keys.index("train/img3")
    save_lines(file, ["more/img0.jpg", "/elsewhere//images/train/img0.png",
                      "images/train/two words.jpg\tmasks/train/two words.png",
                      f"{data.train.images[own]}\t{data.train.masks[own]}"])
    assert read_list(file, data) == ["train/more/img0", "train/img0", "train/two words", "train/img3"]


@pytest.mark.parametrize("name, rows, wrong", [  # {0} and {1} are images of train, {2} one of val
    ("voc", ["2099_000001", "nonsense", "2099_000003 -1", "{0}", "{0} {1},"],
     "4 lines name no image of voc, as {0} does (line 3: 2099_000001, line 4: nonsense, line 5: 2099_"),
    ("voc", ["{0}", "{0}.jpg"], "1 images are listed twice ({0})"), ("voc", [], "the list is empty"),
    ("voc", ["{0}", "{2}"], "1 images belong to val, which is scored ({2})"),
    ("folder", ["{0}", "unlabeled/new2"], "1 of the 2 images have no mask (unlabeled/new2)"),
    ("folder", ["{0}", ","], "line 4: ,")])
def test_lists_that_do_not_fit_are_refused(tmp_path, name, rows, wrong):
    data, file = open_dataset(name, MAKERS[name](tmp_path / "data")), tmp_path / "list.txt"
    names = (data.train.keys[0], data.train.keys[1], data.val.keys[0])
    save_lines(file, ["# a comment", "", *(row.format(*names) for row in rows)])
    message = error_of(choose_labelled, data, "all", file, 0)
    assert message.startswith(str(file)) and wrong.format(*names) in message


ORDER = np.random.RandomState(0).permutation(6)
OF_PYTHON_2 = (  # which keeps the bytes of an array as a string
    b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R"
    b"(K\x01K\x06\x85cnumpy\ndtype\nU\x02i8K\0K\x01\x87R"
    b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89U\x30"
    + ORDER.astype("<i8").tobytes() + b"tb.")


@pytest.mark.parametrize("stored", [*(pickle.dumps(ORDER, protocol) for protocol in range(6)),
                                    pickle.dumps(ORDER.tolist()), OF_PYTHON_2])
def test_pickled_permutations_label_their_first_images(tmp_path, stored):
    data, file = open_dataset("voc", make_voc(tmp_path / "data")), tmp_path / "split_0.pkl"
    file.write_bytes(stored)
    for labeled, count in {"3": 3, "1/4": 2, "all": 6}.items():
        assert choose_labelled(data, labeled, file, 99)[0] == sorted(ORDER[:count].tolist())
    assert "only 6" in error_of(choose_labelled, data, "7", file, 0)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


NO_PERMUTATION = "expected a permutation of 0..5"


@pytest.mark.parametrize("stored, wrong", [
    (pickle.dumps([Evil()]), "a permutation does not need"),
    (b"\x80\x02K\x01r\xff\xff\xff\x7f.", NO_PERMUTATION),  # a place of 2**31 in the memo
    (b"\x80\x04\x8e" + struct.pack("<Q", 2 ** 40) + b"a.", "cannot be read"),  # 1 TB of bytes
    (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
     b"\x8a\x06\0\0\0\0\0\x01\x85U\x01b\x87R.", NO_PERMUTATION),  # an array of 8 TB
    (bytes(5000), "cannot be read"),
    (b"", "cannot be read"), (pickle.dumps(ORDER)[:-1], "cannot be read"),
    *((pickle.dumps(order), NO_PERMUTATION) for order in (
        np.arange(5), np.arange(7), np.array([0, 1, 2, 3, 4, 4]), np.arange(1, 7), np.arange(6.0), "text"))])
def test_hostile_and_damaged_pickles_are_refused_and_take_no_memory(tmp_path, monkeypatch, stored, wrong):
    data, file = open_dataset("voc", make_voc(tmp_path / "data")), tmp_path / "split.pickle"
    monkeypatch.chdir(tmp_path)
    file.write_bytes(stored)
    tracemalloc.start()
    message = error_of(choose_labelled, data, "all", file, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message.startswith(f"{file}: ") and wrong in message
    assert peak < 2 ** 22 and not Path("evil").exists()


@pytest.mark.parametrize("name, names", [("voc", ("bird", "person")), ("folder", ("tall tree", "car"))])
def test_tags_of_a_file_are_read(tmp_path, name, names):
    data, file = open_dataset(name, MAKERS[name](tmp_path / "data")), tmp_path / "tags.txt"
    one, two, three = data.train.keys[:3]
    a, b = names
    rows = [f"images\\{two}.jpg ,{a},  {b}, ,", f'{one},"{b}",{b}', f"{three},{a}"]
    a, b = (data.classes.index(word) for word in names)
    for text in ("\n".join(rows), "\ufeff\r\n# a comment\r\n" + "  \r\n".join(rows) + "\t\r\n\r\n"):
        file.write_bytes(text.encode())
        tags = read_tags(file, data)
        assert {i: set(np.flatnonzero(tags[i])) for i in tags} == {0: {b}, 1: {a, b}, 2: {a}}
        tags = read_tags(file, data, always=(0,))
        assert {i: set(np.flatnonzero(tags[i])) for i in tags} == {0: {0, b}, 1: {0, a, b}, 2: {0, a}}
        assert {(tag.dtype, tag.shape) for tag in tags.values()} == {(np.dtype(bool), (len(data.classes),))}


def test_names_with_a_comma_stand_in_quotes_in_tags(tmp_path):
    root, file = make_folder(tmp_path / "data"), tmp_path / "tags.txt"
    save_picture(root / "unlabeled/a, b.jpg", np.zeros((20, 30, 3), np.uint8))
    save_lines(root / "classes.txt", ["car", "tree, tall", "sky", "road"])
    save_lines(file, ['"unlabeled/a, b", "tree, tall", sky'])
    assert [*read_tags(file, open_dataset("folder", root)).values()][0].tolist() == [False, True, True, False]


@pytest.mark.parametrize("rows, wrong", [  # {0} and {1} are images of train, {2} one of val
    (["{0}, car", "img9, car"], "tags.txt, line 3: img9 is no training image of folder, as train/img0 is"),
    (["{2}, car"], "line 2: val/img0 is no"),
    (["{0}, car", "{0}.jpg, sky"], "line 3: train/img0 has a line already"),
    (["{0},"], "train/img0 has no tags"), ([","], "line 2: , is no training image"),
    (["{0}, Car, bus"], "line 2: Car, bus: no such class; folder has ground, tall tree, car, sky"),
    ([], "tags.txt: the list is empty")])
def test_wrong_tags_are_refused(tmp_path, rows, wrong):
    data, file = open_dataset("folder", make_folder(tmp_path / "data")), tmp_path / "tags.txt"
    save_lines(file, ["# tags", *(row.format(*data.train.keys[:2], data.val.keys[0]) for row in rows)])
    assert wrong in error_of(read_tags, file, data)


def test_tags_are_those_of_the_file_or_of_a_mask_that_may_be_opened(tmp_path):
    data, file = open_dataset("folder", make_folder(tmp_path / "data")), tmp_path / "tags.txt"
    mask = np.full(data.train.image(1).shape[:2], 255, np.uint8)
    mask[5, 7] = 2  # a single pixel
    save_gray(Path(data.train.masks[1]), mask)
    for i in (0, 2, 3, 4, 5):
        data.train.masks[i] = str(tmp_path / "nowhere.png")  # opened, it would raise
    lines = [f"{key}, sky" for key in data.train.keys]
    save_lines(file, [*lines[:1], *lines[2:]])
    tagged = Tagged(data, [0, 1], file)  # of which image 1 has no line
    assert [tagged.mask(i).tolist() for i in range(9)] == [[False, False, k == 1, k != 1] for k in range(9)]
    assert np.array_equal(tagged.image(8), data.train.image(8))
    save_lines(file, lines[:5])
    message = error_of(Tagged, data, [0, 1], file)
    assert "tags.txt: 4 of 9 training images have no tags (train/more/img0, " in message
    assert "--weak: 3 of 9 training images have no tags (unlabeled/" in error_of(Tagged, data, [0, 1])
    assert Tagged(data, [0, 1], needed=[0, 1]).mask(1).tolist() == [False, False, True, False]


def test_names_of_files_need_not_be_utf8(tmp_path, capsys):
    root = make_folder(tmp_path / "data")
    before = open_dataset("folder", root).train.fingerprint
    for path in (root / "images/train/img0.jpg", root / "masks/train/img0.png"):
        path.rename(os.fsdecode(os.fsencode(path.parent) + b"/caf\xe9" + os.fsencode(path.suffix)))
    data = open_dataset("folder", root)
    assert len(data.train.fingerprint) == 16 and data.train.fingerprint != before
    say(data.train.keys[0])
    assert capsys.readouterr().out == "train/caf?\n"
