"""common/datasets.py on small trees in the real formats; every error names the file and the likely cause."""
import codecs
import io
import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torchvision
from PIL import Image

from common import datasets
from common.datasets import (CAMVID_CLASSES, DATASETS, SegmentationData, Split, choose_labelled, identity,
                             open_dataset, read_split, voc_palette, write_split)
from common.settings import UserError
from fixtures import (BDD, CAMVID, CITY_TRAIN, CITY_VAL, PCONTEXT, PCONTEXT_ROW, SBD_ONLY, SUN_37_TO_13,
                      VOC_TRAIN, VOC_VAL, add_junk, make_aug, make_bdd100k, make_camvid, make_cityscapes,
                      make_folder, make_pcontext, make_sbd, make_sunrgbd, make_voc, save_gray, save_lines,
                      save_low_bit_gray, save_palette, save_picture)

MAKERS = {"voc": make_sbd, "cityscapes": make_cityscapes, "camvid": make_camvid, "sunrgbd": make_sunrgbd,
          "sunrgbd13": make_sunrgbd, "pcontext": make_pcontext, "pcontext59": make_pcontext,
          "bdd100k": make_bdd100k, "folder": make_folder}
OWN = {"voc": "VOCdevkit/VOC2012", "camvid": "CamVid", "pcontext": "VOCdevkit/VOC2010",
       "pcontext59": "VOCdevkit/VOC2010", "bdd100k": "bdd100k"}


def at(split, key):
    return split.keys.index(key)


def masked(split):
    return [i for i in range(len(split)) if split.has_mask(i)]


def error_of(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


# ---- opening: what is found where

@pytest.mark.parametrize("name", MAKERS)
def test_interface(tmp_path, name):
    data = open_dataset(name, MAKERS[name](tmp_path))
    assert data.name == name
    assert data.scored_on == ("test" if name in ("camvid", "sunrgbd", "sunrgbd13") else "val")
    assert data.palette.shape == (len(data.classes), 3) and data.palette.dtype == np.uint8
    allowed, seen = {*range(len(data.classes)), 255}, set()
    for split in (data.train, data.val):
        assert len(split) == len(split.keys) >= 2 and split.keys == sorted(split.keys)
        for i in range(len(split)):
            image = split.image(i)
            assert image.dtype == np.uint8 and image.flags.writeable and image.shape[2:] == (3,)
            if split.has_mask(i):
                mask = split.mask(i)
                assert mask.dtype == np.uint8 and mask.shape == image.shape[:2] and mask.flags.writeable
                assert set(np.unique(mask).tolist()) <= allowed
                seen |= set(np.unique(mask).tolist())
    assert len(masked(data.train)) >= 4 and len(masked(data.val)) == len(data.val)
    assert (255 in seen) == (name != "pcontext") and len(seen) >= 4
    labelled, unlabelled = choose_labelled(data, "4", "", 0)
    assert len(labelled) == 4 and len(unlabelled) >= 2


@pytest.mark.parametrize("name", MAKERS)
def test_root_may_be_the_own_folder_or_its_parent(tmp_path, name):
    root = MAKERS[name](tmp_path)
    from_parent, own = open_dataset(name, str(root)), open_dataset(name, root / OWN.get(name, ""))
    assert own.train.keys == from_parent.train.keys and own.val.keys == from_parent.val.keys
    assert masked(own.train) == masked(from_parent.train)


@pytest.mark.parametrize("moved", ["VOC2012", "VOCtrainval_11-May-2012/VOCdevkit/VOC2012"])
def test_voc_root_forms(tmp_path, moved):
    make_voc(tmp_path)
    shutil.move(tmp_path / "VOCdevkit", tmp_path / "elsewhere")
    (tmp_path / moved).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(tmp_path / "elsewhere/VOC2012", tmp_path / moved)
    assert open_dataset("voc", tmp_path).train.keys == VOC_TRAIN[:6]


@pytest.mark.parametrize("place", ["", "SBD", "dataset", "VOCaug/dataset", "VOCdevkit/VOC2012/SBD",
                                   "VOCdevkit/benchmark_RELEASE/dataset"])
@pytest.mark.parametrize("root", ["", "VOCdevkit/VOC2012"])
def test_sbd_root_forms(tmp_path, place, root):
    make_sbd(tmp_path)
    shutil.copytree(tmp_path / "benchmark_RELEASE/dataset", tmp_path / place, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "benchmark_RELEASE")
    assert len(open_dataset("voc", tmp_path / root).train) == 10


@pytest.mark.parametrize("name", MAKERS)
def test_missing_root_shows_layout_and_source(tmp_path, name):
    message = error_of(open_dataset, name, tmp_path / "nowhere")
    assert f"{tmp_path / 'nowhere'}: no {name} there" in message and datasets.LAYOUTS[name][0] in message
    assert datasets.LAYOUTS[name][1] in message and len(message.splitlines()) <= 8


def test_unknown_dataset_and_shapes(tmp_path):
    message = error_of(open_dataset, "vocc", tmp_path)
    assert all(name in message for name in DATASETS)
    shapes = open_dataset("shapes", "no such folder", seed=3)
    labelled, unlabelled = choose_labelled(shapes, "1/8", "", 0)
    assert len(labelled) == len(shapes.train) // 8 and len(labelled) + len(unlabelled) == len(shapes.train)
    write_split(tmp_path / "list.txt", shapes.train.keys[:3])
    assert choose_labelled(shapes, "all", tmp_path / "list.txt", 0)[0] == [0, 1, 2]


@pytest.mark.parametrize("name", MAKERS)
def test_opening_reads_no_picture_and_unlabelled_streams_no_mask(tmp_path, name):
    data = open_dataset(name, MAKERS[name](tmp_path))
    masks = [path for split in (data.train, data.val) for path in split.masks if path]
    for path in masks + data.val.images:
        with open(path, "wb") as file:
            file.write(b"poison")
    data = open_dataset(name, tmp_path)
    labelled, unlabelled = choose_labelled(data, "4", "", 0)
    for path in masks:
        os.remove(path)
    for i in labelled + unlabelled:
        assert data.train.image(i).shape[2] == 3
    assert data.train.has_mask(0) and data.train.masks[0] in error_of(data.train.mask, 0)


def test_splits_go_to_workers(tmp_path):
    for name, make in MAKERS.items():
        data = open_dataset(name, make(tmp_path / name))
        copy = pickle.loads(pickle.dumps(data))
        assert copy.train.keys == data.train.keys and np.array_equal(copy.train.mask(0), data.train.mask(0))


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    roots = {name: make(tmp_path / name) for name, make in MAKERS.items()}
    usual = {name: open_dataset(name, root) for name, root in roots.items()}
    walk = os.walk

    def backwards(*arguments, **options):
        for here, folders, names in walk(*arguments, **options):
            folders.sort(reverse=True)
            yield here, folders, sorted(names, reverse=True)
    monkeypatch.setattr(os, "walk", backwards)
    for name, root in roots.items():
        data = open_dataset(name, root)
        assert (data.train.keys, data.train.images, data.train.masks) == (
            usual[name].train.keys, usual[name].train.images, usual[name].train.masks)


# ---- VOC

def test_trainaug_is_derived_and_masks_come_from_the_best_source(tmp_path):
    data = open_dataset("voc", make_sbd(tmp_path))
    assert data.train.keys == sorted(VOC_TRAIN[:6] + SBD_ONLY[:4])  # but VOC_VAL[0], in SBD's train.txt
    assert data.val.keys == VOC_VAL[:3] and data.voc_train == set(VOC_TRAIN[:6])
    sources = [os.path.basename(os.path.dirname(path)) for path in data.train.masks]
    assert sources == ["SegmentationClass"] * 6 + ["cls"] * 4
    own = np.unique(data.train.mask(at(data.train, VOC_TRAIN[1])))  # SBD has it, too, as class 3 throughout
    assert 255 in own and 3 not in own
    assert 255 not in np.unique(data.train.mask(at(data.train, SBD_ONLY[0])))
    assert "voc: training masks: 6 from SegmentationClass, 4 from cls" in data.notes
    os.remove(tmp_path / f"VOCdevkit/VOC2012/SegmentationClass/{VOC_TRAIN[1]}.png")
    data = open_dataset("voc", tmp_path)
    assert (data.train.mask(at(data.train, VOC_TRAIN[1])) == 3).all()
    assert data.classes[3] == "bird" and data.classes[20] == "tvmonitor" and len(data.classes) == 21


def test_segmentation_class_aug(tmp_path):
    make_aug(tmp_path)
    voc = tmp_path / "VOCdevkit/VOC2012"
    data = open_dataset("voc", tmp_path)
    assert data.train.keys == sorted(VOC_TRAIN[:6] + SBD_ONLY[:4]) and len(masked(data.train)) == 10
    from_voc = data.train.mask(0)
    assert all("Aug" not in path for path in data.train.masks[:6] + data.val.masks)  # VOC's own come first
    shutil.rmtree(voc / "SegmentationClass")  # now it serves VOC's own images and val as well
    data = open_dataset("voc", tmp_path)
    assert "Aug" in data.train.masks[0] and "Aug" in data.val.masks[0]
    assert np.array_equal(data.train.mask(0), from_voc)
    shutil.move(voc / "SegmentationClassAug", voc / "moved")  # an archive unpacked into a folder of its name
    (voc / "SegmentationClassAug").mkdir()
    shutil.move(voc / "moved", voc / "SegmentationClassAug/SegmentationClassAug")
    assert open_dataset("voc", tmp_path).train.keys == data.train.keys


@pytest.mark.parametrize("name", ["train_aug.txt", "trainaug.txt"])
def test_a_list_alone_gives_unlabelled_images(tmp_path, name):
    make_sbd(tmp_path)
    shutil.rmtree(tmp_path / "benchmark_RELEASE")
    assert open_dataset("voc", tmp_path).train.keys == VOC_TRAIN[:6]
    assert any("--download fetches SBD" in note for note in open_dataset("voc", tmp_path).notes)
    rows = [f"/JPEGImages/{key}.jpg /SegmentationClassAug/{key}.png" for key in VOC_TRAIN[:6] + SBD_ONLY[:4]]
    save_lines(tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation" / name, rows)
    data = open_dataset("voc", tmp_path)
    assert len(data.train) == 10 and [data.train.keys[i] for i in masked(data.train)] == VOC_TRAIN[:6]
    assert choose_labelled(data, "all", "", 0) == (list(range(6)), list(range(6, 10)))


def test_voc_incomplete(tmp_path):
    make_sbd(tmp_path)
    voc = tmp_path / "VOCdevkit/VOC2012"
    os.rename(voc / f"JPEGImages/{SBD_ONLY[2]}.jpg", tmp_path / "aside")
    message = error_of(open_dataset, "voc", tmp_path)
    assert SBD_ONLY[2] in message and "1 images" in message
    os.rename(tmp_path / "aside", voc / f"JPEGImages/{SBD_ONLY[2]}.jpg")
    os.rename(voc / f"SegmentationClass/{VOC_VAL[1]}.png", tmp_path / "aside")
    assert VOC_VAL[1] in error_of(open_dataset, "voc", tmp_path)
    os.rename(tmp_path / "aside", voc / f"SegmentationClass/{VOC_VAL[1]}.png")
    (tmp_path / "benchmark_RELEASE/dataset/val.txt").write_text("\n")
    assert "val.txt: expected one image id" in error_of(open_dataset, "voc", tmp_path)
    os.remove(voc / "ImageSets/Segmentation/val.txt")
    assert "val.txt" in error_of(open_dataset, "voc", tmp_path)


def test_torchvision_reads_the_same_voc_and_sbd(tmp_path):
    data = open_dataset("voc", make_sbd(tmp_path))
    for name, split in (("train", data.train), ("val", data.val)):
        theirs = torchvision.datasets.VOCSegmentation(tmp_path, image_set=name)
        assert len(theirs) == {"train": 6, "val": 3}[name]
        for path, (image, mask) in zip(theirs.images, theirs):
            i = at(split, os.path.splitext(os.path.basename(path))[0])
            assert mask.mode == "P" and np.array_equal(np.array(mask), split.mask(i))
            assert np.array_equal(np.array(image), split.image(i))
    theirs = torchvision.datasets.SBDataset(tmp_path / "benchmark_RELEASE/dataset", "val", "segmentation")
    i = at(data.train, SBD_ONLY[3])
    assert len(theirs) == 1 and np.array_equal(np.array(theirs[0][1]), data.train.mask(i))
    assert data.train.masks[i].endswith(".mat")


def test_voc_palette():
    palette = voc_palette()
    assert palette.shape == (256, 3) and len({tuple(colour) for colour in palette.tolist()}) == 256
    for index, colour in {0: (0, 0, 0), 1: (128, 0, 0), 6: (0, 128, 128), 9: (192, 0, 0), 15: (192, 128, 128),
                          19: (128, 192, 0), 20: (0, 64, 128), 255: (224, 224, 192)}.items():
        assert tuple(palette[index]) == colour


# ---- VOC's download

def fake_archives(monkeypatch, made, fail=()):
    """torchvision's classes stay; only fetching is replaced: an 'archive' comes from the tree in `made`."""
    fetched = []

    def fetch(url, root, filename, md5):
        fetched.append(filename)
        time.sleep(0.05)
        os.makedirs(root, exist_ok=True)
        open(os.path.join(root, filename), "wb").close()
        top = "VOCdevkit" if filename.startswith("VOC") else "benchmark_RELEASE"
        shutil.copytree(made / top, os.path.join(root, top), dirs_exist_ok=True)
        if filename in fail:
            raise URLError("connection reset")
    monkeypatch.setattr(torchvision.datasets.voc, "download_and_extract_archive", fetch)
    monkeypatch.setattr(torchvision.datasets.sbd, "download_and_extract_archive", fetch)
    return fetched


def add_inst(made):
    (made / "benchmark_RELEASE/dataset/inst").mkdir()
    return made


def test_download_voc_and_sbd_once(tmp_path, monkeypatch):
    fetched = fake_archives(monkeypatch, add_inst(make_sbd(tmp_path / "made")))
    root = tmp_path / "data"
    for _ in range(2):
        data = open_dataset("voc", root, download=True)
        assert len(data.train) == 10 and len(masked(data.train)) == 10
        assert fetched == ["VOCtrainval_11-May-2012.tar", "benchmark.tgz"]
    assert sorted(os.listdir(root)) == [".download.lock", "SBD", "VOCdevkit"]
    assert not (root / "SBD/benchmark.tgz").exists()
    shutil.rmtree(root / "SBD")
    assert len(open_dataset("voc", root, download=True).train) == 10
    assert fetched[2:] == ["benchmark.tgz"]


def test_processes_that_download_at_once_take_turns(tmp_path, monkeypatch):
    fetched = fake_archives(monkeypatch, add_inst(make_sbd(tmp_path / "made")))
    with ThreadPoolExecutor(2) as pool:
        opened = list(pool.map(lambda _: open_dataset("voc", tmp_path / "data", download=True), range(2)))
    assert [len(data.train) for data in opened] == [10, 10]
    assert fetched == ["VOCtrainval_11-May-2012.tar", "benchmark.tgz"]


def test_interrupted_download_is_never_taken_for_a_dataset(tmp_path, monkeypatch):
    made, root = add_inst(make_sbd(tmp_path / "made")), tmp_path / "data"
    for archive in ("VOCtrainval_11-May-2012.tar", "benchmark.tgz"):
        fake_archives(monkeypatch, made, fail=[archive])
        message = error_of(open_dataset, "voc", root, True)
        assert "connection reset" in message and "benchmark.tgz" in message and str(root) in message
    assert not (root / "SBD").exists()
    shutil.copytree(made / "benchmark_RELEASE/dataset/cls", root / "SBD.part/cls")  # killed while moving it
    fake_archives(monkeypatch, made)
    assert len(open_dataset("voc", root, download=True).train) == 10


def test_download_calls_torchvision_classes(tmp_path, monkeypatch):
    calls = []

    def voc(root, **options):
        calls.append(options)
        make_voc(root)

    def sbd(root, **options):
        calls.append(options)
        raise RuntimeError("File not found or corrupted.")
    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", voc)
    monkeypatch.setattr(torchvision.datasets, "SBDataset", sbd)
    assert "corrupted" in error_of(open_dataset, "voc", tmp_path / "data", True)
    assert calls == [dict(year="2012", image_set="val", download=True),
                     dict(image_set="train", mode="segmentation", download=True)]
    assert len(open_dataset("voc", tmp_path / "data").train) == 6  # VOC is complete and stays


@pytest.mark.parametrize("name", sorted({*DATASETS} - {"voc"}))
def test_nothing_but_voc_is_downloaded(tmp_path, name):
    message = error_of(open_dataset, name, tmp_path, True)
    assert "--download" in message and datasets.LAYOUTS[name][1] in message


# ---- Cityscapes

IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # of the trainIds 0..18


@pytest.mark.parametrize("nested", [False, True])
def test_cityscapes_ids_are_mapped(tmp_path, nested):
    data = open_dataset("cityscapes", make_cityscapes(tmp_path, nested))
    assert data.train.keys == list(CITY_TRAIN) and data.val.keys == list(CITY_VAL)  # test is not used
    first_row = data.train.mask(2)[0]  # holds the ids 0..33
    assert [first_row[k] for k in range(34)] == [IDS.index(k) if k in IDS else 255 for k in range(34)]
    assert data.classes[0] == "road" and data.classes[6] == "traffic light" and data.classes[18] == "bicycle"
    assert len(data.classes) == 19 and data.palette[10].tolist() == [70, 130, 180]
    assert data.palette[[0, 13, 18]].tolist() == [[128, 64, 128], [0, 0, 142], [119, 11, 32]]


def test_cityscapes_label_train_ids_by_suffix(tmp_path):
    root = make_cityscapes(tmp_path)
    before = open_dataset("cityscapes", root).train.mask(0)
    path = root / f"gtFine/train/aachen/{CITY_TRAIN[0]}_gtFine_labelIds.png"
    save_gray(path.with_name(path.name.replace("labelIds", "labelTrainIds")), np.full(before.shape, 5))
    assert np.array_equal(open_dataset("cityscapes", root).train.mask(0), before)  # labelIds come first
    os.remove(path)
    assert (open_dataset("cityscapes", root).train.mask(0) == 5).all()


def test_cityscapes_flat_copy_and_parent(tmp_path):
    made, flat = make_cityscapes(tmp_path / "made"), tmp_path / "flat/cityscapes"
    data = open_dataset("cityscapes", made)
    for name, split in (("train", data.train), ("val", data.val)):
        for i, key in enumerate(split.keys):
            save_picture(flat / f"images/{name}/{key}.png", split.image(i))
            save_gray(flat / f"segmentation/{name}/{key}_gtFine.png", split.mask(i))
    copy = open_dataset("cityscapes", tmp_path / "flat")
    assert copy.train.keys == data.train.keys and np.array_equal(copy.train.mask(1), data.train.mask(1))


def test_cityscapes_wrong_encodings(tmp_path):
    root = make_cityscapes(tmp_path)
    path = root / f"gtFine/train/aachen/{CITY_TRAIN[0]}_gtFine_labelIds.png"
    ids = np.array(Image.open(path))
    save_gray(path, open_dataset("cityscapes", root).train.mask(0))
    message = error_of(open_dataset("cityscapes", root).train.mask, 0)
    assert str(path) in message and "255" in message and "trainIds under the name of labelIds" in message
    os.remove(path)
    path = path.with_name(path.name.replace("labelIds", "labelTrainIds"))
    save_gray(path, ids)
    message = error_of(open_dataset("cityscapes", root).train.mask, 0)
    assert str(path) in message and "19, 20, 21, .." in message
    assert "labelIds" in message.split("likely cause")[1]


def test_torchvision_reads_the_same_cityscapes(tmp_path):
    root = make_cityscapes(tmp_path)
    data = open_dataset("cityscapes", root)
    theirs = torchvision.datasets.Cityscapes(root, split="train", target_type="semantic")
    assert len(theirs) == len(data.train)
    table = {kind.id: kind.train_id for kind in theirs.classes}
    for path, (image, mask) in zip(theirs.images, theirs):
        i = at(data.train, os.path.basename(path).removesuffix("_leftImg8bit.png"))
        assert np.array_equal(np.array(image), data.train.image(i))
        assert np.array_equal(np.vectorize(table.get)(np.array(mask)), data.train.mask(i))


# ---- CamVid

@pytest.mark.parametrize("lists", [True, False])
def test_camvid_is_scored_on_test_if_there(tmp_path, lists):
    data = open_dataset("camvid", make_camvid(tmp_path, lists=lists))
    assert data.train.keys == list(CAMVID["train"]) and data.val.keys == list(CAMVID["test"])
    assert data.train.mask(0)[0, :12].tolist() == [*range(11), 255]
    assert data.classes[:3] == ("Sky", "Building", "Pole") and len(data.classes) == 11
    assert data.palette[4].tolist() == [60, 40, 222] and data.classes[10] == "Bicyclist"
    assert tuple(data.palette[10]) == CAMVID_CLASSES["Bicyclist"] == (0, 128, 192)
    data = open_dataset("camvid", make_camvid(tmp_path / "two", test=False, lists=lists))
    assert data.scored_on == "val" and data.val.keys == list(CAMVID["val"])


def test_camvid_lists_choose_and_pairs_go_by_name(tmp_path):
    root = make_camvid(tmp_path)
    base, keys = root / "CamVid", CAMVID["train"]
    save_lines(base / "train.txt", [f"/SegNet/CamVid/train/{key}.png /SegNet/x.png" for key in keys[1:5]])
    os.rename(base / f"trainannot/{keys[1]}.png", base / f"trainannot/{keys[1]}_L.png")  # as CamVid's own
    Image.open(base / f"train/{keys[2]}.png").save(base / f"train/{keys[2]}.jpg")  # re-encoded
    os.remove(base / f"train/{keys[2]}.png")
    os.remove(base / f"trainannot/{keys[3]}.png")
    data = open_dataset("camvid", root)
    assert data.train.keys == list(keys[1:5]) and masked(data.train) == [0, 1, 3]
    assert data.train.mask(1)[0, 11] == 255
    save_lines(base / "train.txt", ["/SegNet/CamVid/train/gone.png /SegNet/CamVid/trainannot/gone.png"])
    assert "gone" in error_of(open_dataset, "camvid", root)


@pytest.mark.skipif("CAMVID_ROOT" not in os.environ, reason="CAMVID_ROOT is not set")
def test_real_camvid():
    data = open_dataset("camvid", os.environ["CAMVID_ROOT"])
    assert len(data.train) == 367 and data.notes == ()  # the published lists
    pixels = np.zeros(256, np.int64)
    for i in range(len(data.train)):
        assert data.train.has_mask(i)
        mask = data.train.mask(i)
        assert mask.shape == (360, 480)
        pixels += np.bincount(mask.ravel(), minlength=256)
    share = 100 * pixels / pixels.sum()
    published = [16.845, 23.259, 0.983, 31.658, 4.486, 9.724, 1.173, 1.127, 5.866, 0.639, 0.292]
    assert np.allclose(share[:11], published, atol=6e-4) and abs(share[255] - 3.948) < 6e-4


# ---- SUN RGB-D

@pytest.mark.parametrize("renumbered", [False, True])
def test_sunrgbd_pairs_and_classes(tmp_path, renumbered):
    """Each image has a size of its own, so that a mask of another image would be refused."""
    root = make_sunrgbd(tmp_path, renumbered=renumbered)
    fine, coarse = open_dataset("sunrgbd", root), open_dataset("sunrgbd13", root)
    assert fine.train.keys == coarse.train.keys == [f"train/{k:06d}" for k in range(1, 7)]
    assert fine.val.keys == ["test/000001", "test/000002"] and fine.scored_on == "test"
    assert fine.train.mask(2)[0, :38].tolist() == [255, *range(37)]
    expected = [255, *(label - 1 for label in SUN_37_TO_13[1:])]
    assert coarse.val.mask(1)[0, :38].tolist() == expected
    assert "img13labels" in coarse.train.masks[0] and "img13labels" not in fine.train.masks[0]
    for name, labels in (("train", fine.train), ("val", fine.val)):
        for i in range(len(labels)):
            derived = np.array(expected[1:] + [255] * 219)[labels.mask(i)]
            assert np.array_equal(getattr(coarse, name).mask(i), derived)
    assert len(fine.classes) == 37 and (fine.classes[0], fine.classes[36]) == ("wall", "bag")
    assert coarse.classes[0] == "bed" and coarse.classes[12] == "window" and len(coarse.classes) == 13
    assert fine.palette[[0, 30, 36]].tolist() == [[119, 119, 119], [170, 0, 59], [12, 83, 45]]
    assert coarse.palette[[0, 11]].tolist() == [[0, 0, 255], [249, 139, 0]]
    assert len(np.unique(fine.palette, axis=0)) == 37 and len(np.unique(coarse.palette, axis=0)) == 13


def test_sunrgbd_13_classes_are_derived_from_37(tmp_path):
    files, derived = (open_dataset("sunrgbd13", make_sunrgbd(tmp_path / str(kinds), kinds))
                      for kinds in ((37, 13), (37,)))
    assert "img-005051" in derived.train.masks[0] and "img13labels" in files.train.masks[0]
    for split in ("train", "val"):
        for i in range(len(getattr(files, split))):
            assert np.array_equal(getattr(files, split).mask(i), getattr(derived, split).mask(i))
    root = make_sunrgbd(tmp_path / "13", (13,))
    assert len(masked(open_dataset("sunrgbd13", root).train)) == 6
    assert "2 of 2 test images have no mask" in error_of(open_dataset, "sunrgbd", root)


@pytest.mark.parametrize("first", [1, 5051])
def test_sunrgbd_offset_in_a_train_folder_of_its_own(tmp_path, first):
    root = make_sunrgbd(tmp_path / "SUNRGBD", (37,))
    usual = open_dataset("sunrgbd", tmp_path).train
    before = [usual.mask(i) for i in range(6)]
    for split, number in (("train", 6), ("test", 2)):
        (root / "labels" / split).mkdir(parents=True)
        for k in range(1, number + 1):
            stored = f"img-{k + 5050 * (split == 'train'):06d}.png"
            moved = f"img-{k + first - 1 if split == 'train' else k:06d}.png"
            os.rename(root / "sunrgbd_train_test_labels" / stored, root / "labels" / split / moved)
    (root / "sunrgbd_train_test_labels").rmdir()
    data = open_dataset("sunrgbd", tmp_path)
    assert data.train.masks[0].endswith(f"labels/train/img-{first:06d}.png")
    assert all(np.array_equal(data.train.mask(i), before[i]) for i in range(6))
    os.remove(data.train.masks[3])
    assert masked(open_dataset("sunrgbd", tmp_path).train) == [0, 1, 2, 4, 5]


def test_sunrgbd_wrong_values(tmp_path):
    root = make_sunrgbd(tmp_path)
    fine, coarse = open_dataset("sunrgbd", root), open_dataset("sunrgbd13", root)
    labels = fine.train.mask(0)
    save_gray(Path(fine.train.masks[0]), labels)
    message = error_of(fine.train.mask, 0)
    assert fine.train.masks[0] in message and "values 255, but only 0..37 are" in message
    assert "shifted already" in message
    labels[labels == 255] = 0
    save_gray(Path(coarse.train.masks[0]), labels)
    message = error_of(coarse.train.mask, 0)
    assert "values 14, 15, 16, .., but only 0..13 are" in message and "labels of 37 classes" in message
    save_gray(Path(fine.train.masks[0]), np.zeros((9, 9)))
    assert "must have one size" in error_of(fine.train.mask, 0)


# ---- PASCAL-Context

CONTEXT_TO_SORTED = [int(word) for word in """1 6 7 8 10 12 14 15 17 20 50 23 31 34 37 40 43 49 52 55 2 3 5 9 11 13
    16 18 19 21 24 25 26 27 28 29 30 32 33 35 36 22 39 46 38 41 42 44 45 47 48 4 51 53 54 56 57 58 59""".split()]


@pytest.mark.parametrize("pngs", [False, True])
def test_pcontext_classes(tmp_path, pngs):
    root = make_pcontext(tmp_path, pngs)
    data, without = open_dataset("pcontext", root), open_dataset("pcontext59", root)
    assert data.train.keys == without.train.keys == PCONTEXT["train"] and data.val.keys == PCONTEXT["val"]
    assert data.train.masks[0].endswith(".png" if pngs else ".mat")
    expected = [*PCONTEXT_ROW.values()]
    for i in range(6):  # the numbers of sky, aeroplane, table, bedclothes, unknown, another, none, another
        mask = data.train.mask(i)
        assert mask[0, :8].tolist() == expected == [50, 1, 11, 52, 0, 0, 0, 0] and mask.dtype == np.uint8
        assert np.array_equal(without.train.mask(i), np.where(mask > 0, mask.astype(int) - 1, 255))
    assert len(data.classes) == 60 and data.classes[1:] == without.classes and len(set(data.classes)) == 60
    assert [data.classes[k] for k in (0, 1, 11, 20, 21, 50, 52, 59)] == [
        "background", "aeroplane", "table", "tvmonitor", "bag", "sky", "bedclothes", "wood"]
    assert np.array_equal(data.palette, voc_palette()[:60])
    assert np.array_equal(without.palette, voc_palette()[1:60])
    assert "pcontext: background is one of the 60 classes" in data.notes
    assert "pcontext59: background is ignored" in without.notes
    assert [note.split(":")[0] for note in data.notes[1:]] == ["pcontext train", "pcontext val"]


def test_pcontext_every_number_of_the_459(tmp_path):
    """An image of 20x23 pixels holds the numbers 0..459 in turn."""
    data = open_dataset("pcontext", make_pcontext(tmp_path))
    save_picture(Path(data.train.images[0]), np.zeros((20, 23, 3), np.uint8))
    scipy.io.savemat(data.train.masks[0], {"LabelMap": np.arange(460).reshape(20, 23)})
    mask = data.train.mask(0).ravel()
    names = {"sky": 360, "person": 284, "bag": 9, "bedclothes": 19, "cloth": 80, "curtain": 105, "wood": 458}
    assert all(data.classes[mask[number]] == name for name, number in names.items())
    assert sorted(mask[mask > 0]) == list(range(1, 60)) and (mask == 0).sum() == 460 - 59
    alphabetical = mask[mask > 0].tolist()  # by their numbers among the 459
    assert [alphabetical.index(k) + 1 for k in range(1, 60)] == CONTEXT_TO_SORTED


@pytest.mark.parametrize("order", ["official", "sorted"])
def test_pcontext_order_of_pngs_has_to_be_stated(tmp_path, order):
    root = make_pcontext(tmp_path, pngs=True)
    file = root / "VOCdevkit/VOC2010/SegmentationClassContext/order.txt"
    save_lines(file, [order])
    data, without = open_dataset("pcontext", root), open_dataset("pcontext59", root)
    save_picture(Path(data.train.images[0]), np.zeros((3, 20, 3), np.uint8))
    save_gray(Path(data.train.masks[0]), np.arange(60).reshape(3, 20))
    mask = data.train.mask(0).ravel().tolist()
    stored = list(range(1, 60)) if order == "official" else CONTEXT_TO_SORTED
    assert [mask[k] for k in stored] == list(range(1, 60)) and mask[0] == 0
    assert without.train.mask(0).ravel().tolist() == [255, *(k - 1 for k in mask[1:])]
    save_gray(Path(data.train.masks[0]), np.full((3, 20), 60))
    assert "values 60, but only 0..59 and 255" in error_of(without.train.mask, 0)
    for lines in (None, [], ["alphabetical"], ["official", "sorted"]):
        os.remove(file) if lines is None else save_lines(file, lines)
        message = error_of(open_dataset, "pcontext", root)
        assert str(file) in message and "official (1 aeroplane, 2 bicycle" in message
        assert f"found {lines or []}" in message
    make_pcontext(root)  # now the .mat files, which need no word
    assert open_dataset("pcontext", root).train.masks[0].endswith(".mat")


def test_pcontext_lists(tmp_path):
    root = make_pcontext(tmp_path, pngs=True)
    lists = root / "VOCdevkit/VOC2010/ImageSets"
    for split, keys in PCONTEXT.items():
        save_lines(lists / f"SegmentationContext/{split}.txt", keys[:-1])
    assert open_dataset("pcontext", root).train.keys == PCONTEXT["train"][:-1]
    make_pcontext(root)
    assert open_dataset("pcontext", root).train.keys == PCONTEXT["train"]  # .mat files: Main
    os.remove(root / f"trainval/{PCONTEXT['train'][1]}.mat")
    assert masked(open_dataset("pcontext", root).train) == [0, 2, 3, 4, 5]
    os.remove(root / f"VOCdevkit/VOC2010/JPEGImages/{PCONTEXT['train'][2]}.jpg")
    message = error_of(open_dataset, "pcontext", root)
    assert "1 images of" in message and PCONTEXT["train"][2] in message and "03-May-2010.tar" in message
    os.remove(lists / "Main/train.txt")
    assert "train.txt" in error_of(open_dataset, "pcontext", root)
    shutil.rmtree(root / "trainval")
    shutil.rmtree(root / "VOCdevkit/VOC2010/SegmentationClassContext")
    assert datasets.LAYOUTS["pcontext"][0] in error_of(open_dataset, "pcontext", root)


def test_pcontext_wrong_mats(tmp_path):
    data = open_dataset("pcontext59", make_pcontext(tmp_path))
    path, right = data.train.masks[0], np.zeros(data.train.image(0).shape[:2])
    for wrong in (right + 0.5, right - 1, right + np.nan, right + 65536):
        scipy.io.savemat(path, {"LabelMap": wrong})
        assert f"{path}: cannot be read as a MAT file with LabelMap (its values" in error_of(data.train.mask, 0)
    scipy.io.savemat(path, {"LabelMap": right + 460})
    message = error_of(data.train.mask, 0)
    assert f"{path}: holds the values 460, but only 0..459 are" in message and "end at 459" in message
    scipy.io.savemat(path, {"GTcls": {"Segmentation": right.astype(np.uint8)}})
    assert f"{path}: cannot be read as a MAT file with LabelMap" in error_of(data.train.mask, 0)
    scipy.io.savemat(path, {"LabelMap": right[1:]})
    assert "must have one size" in error_of(data.train.mask, 0)
    Path(path).write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    assert "HDF" in error_of(data.train.mask, 0)


# ---- BDD100K

@pytest.mark.parametrize("old", [False, True])
def test_bdd100k(tmp_path, old):
    data = open_dataset("bdd100k", make_bdd100k(tmp_path, old))
    assert data.train.keys == sorted(BDD["train"]) and data.val.keys == BDD["val"]  # test is not used
    assert data.train.mask(0)[0, :20].tolist() == [*range(19), 255]  # trainIds as they are
    assert (data.train.mask(at(data.train, BDD["train"][-1])) == 255).all()
    cities = open_dataset("cityscapes", make_cityscapes(tmp_path / "cityscapes"))
    assert data.classes == cities.classes and np.array_equal(data.palette, cities.palette)
    if old:
        assert all(path.endswith("_train_id.png") for path in data.train.masks)
        seg = open_dataset("bdd100k", tmp_path / "bdd100k/seg")
        assert seg.train.masks == data.train.masks


def test_bdd100k_unpaired_files_are_left_out_and_many_refused(tmp_path):
    root = make_bdd100k(tmp_path)
    masks = root / "bdd100k/labels/sem_seg/masks"
    os.rename(masks / f"train/{BDD['train'][0]}.png", masks / "train/ff1e4d6d-f4d85cfd.png")
    os.remove(masks / f"val/{BDD['val'][1]}.png")
    data = open_dataset("bdd100k", root)
    assert data.train.keys == sorted(BDD["train"][1:]) and data.val.keys == BDD["val"][:1]
    assert len(masked(data.train)) == 5
    assert (f"bdd100k train: 1 images have no mask (*.png) and 1 masks no image ({BDD['train'][0]}, "
            f"ff1e4d6d-f4d85cfd); they are left out") in data.notes
    assert any(note.startswith("bdd100k val: 1 images have no mask") for note in data.notes)
    for k in range(9):
        (masks / f"train/ff1e4d6d-0000000{k}.png").touch()
    message = error_of(open_dataset, "bdd100k", root)
    assert "1 images have no mask (*.png) and 10 masks no image" in message and "unpack" in message
    assert str(root / "bdd100k") in message


def test_bdd100k_wrong_encodings(tmp_path):
    data = open_dataset("bdd100k", make_bdd100k(tmp_path))
    save_gray(Path(data.train.masks[0]), np.full((72, 128), 40))
    message = error_of(data.train.mask, 0)
    assert "values 40, but only 0..18 and 255" in message and "panoptic" in message
    save_picture(Path(data.train.masks[0]), np.zeros((72, 128, 3), np.uint8))
    assert "mode RGB" in error_of(data.train.mask, 0)


# ---- a user's own folder

def test_folder(tmp_path):
    data = open_dataset("folder", make_folder(tmp_path))
    assert data.train.keys == [*(f"train/img{k}" for k in range(5)), "train/more/img0",
                               *(f"unlabeled/new{k}" for k in range(3))]
    assert data.val.keys == ["val/img0", "val/img1"]  # the same file name as in train: another image
    assert masked(data.train) == list(range(6)) and data.notes == ()
    assert data.classes == ("ground", "tall tree", "car", "sky")
    assert data.palette.tolist() == [[0, 0, 0], [0, 128, 0], [0, 128, 0], [70, 130, 180]]  # else VOC's colour
    os.remove(tmp_path / "masks/train/img1.png")
    save_gray(tmp_path / "masks/train/img1_mask.png", np.zeros((61, 77)))
    data = open_dataset("folder", tmp_path)
    assert masked(data.train) == [0, 2, 3, 4, 5] and len(data.notes) == 1 and "img1_mask" in data.notes[0]


def test_folder_of_images_alone_and_of_unmasked_val(tmp_path):
    make_folder(tmp_path)
    os.remove(tmp_path / "masks/val/img1.png")
    assert "val/img1" in error_of(open_dataset, "folder", tmp_path)
    make_folder(tmp_path)
    shutil.rmtree(tmp_path / "masks/train")
    message = error_of(open_dataset, "folder", tmp_path)
    assert "no training image has a mask" in message and "masks/{train,val}/a.png" in message
    shutil.rmtree(tmp_path / "images/val")
    (tmp_path / "images/val").mkdir()
    assert "Expected" in error_of(open_dataset, "folder", tmp_path)


@pytest.mark.parametrize("lines, wrong", [
    (["one"], "two or more"), ([], "two or more"), (["a", "b", "a"], "line 'a'"),
    (["a", "b 1 2 256"], "line 'b 1 2 256'"), ([f"c{k}" for k in range(255)], "line 'c254'")])
def test_folder_classes_errors(tmp_path, lines, wrong):
    make_folder(tmp_path)
    save_lines(tmp_path / "classes.txt", lines)
    message = error_of(open_dataset, "folder", tmp_path)
    assert wrong in message and "classes.txt" in message


def test_folder_classes_text(tmp_path):
    make_folder(tmp_path)
    text = "# name r g b\r\nground\r\n\r\nHäuser  1 2 3\r\nsky 7\r\ncar"
    (tmp_path / "classes.txt").write_bytes(codecs.BOM_UTF8 + text.encode())
    data = open_dataset("folder", tmp_path)
    assert data.classes == ("ground", "Häuser", "sky 7", "car") and data.palette[1].tolist() == [1, 2, 3]
    (tmp_path / "classes.txt").write_bytes("a\nHäuser".encode("utf-16"))
    assert "UTF-8" in error_of(open_dataset, "folder", tmp_path)


def test_two_classes_saved_black_and_white_are_refused(tmp_path):
    make_folder(tmp_path, classes=("background", "cell"))
    assert set(np.unique(open_dataset("folder", tmp_path).train.mask(0))) == {0, 1, 255}
    for path in sorted((tmp_path / "masks/train").rglob("*.png")):
        open_dataset("folder", tmp_path)  # as long as one mask holds class 1
        mask = np.array(Image.open(path))
        save_gray(path, np.where(mask == 1, 255, mask))
    message = error_of(open_dataset, "folder", tmp_path)
    assert "255 means 'ignore'" in message and "save cell as 1" in message


def test_two_images_of_one_name_are_refused(tmp_path):
    make_folder(tmp_path)
    shutil.copy(tmp_path / "images/train/img0.jpg", tmp_path / "images/train/img0.jpeg")
    assert "img0.jpeg" in error_of(open_dataset, "folder", tmp_path)


def test_train_and_val_must_not_share_images(tmp_path):
    make_camvid(tmp_path, test=False)
    key = CAMVID["train"][0]
    for folder in ("", "annot"):
        shutil.copy(tmp_path / f"CamVid/train{folder}/{key}.png", tmp_path / f"CamVid/val{folder}")
    save_lines(tmp_path / "CamVid/val.txt", [f"val/{key}.png"])
    assert f"1 images in train and val ({key})" in error_of(open_dataset, "camvid", tmp_path)


@pytest.mark.parametrize("name", MAKERS)
def test_junk_files_are_ignored(tmp_path, name):
    root = (make_aug if name == "voc" else MAKERS[name])(tmp_path)
    before = open_dataset(name, root)
    files = before.train.images + before.train.masks + before.val.images + before.val.masks
    for folder in {Path(file).parent for file in files if file}:
        add_junk(folder)
    after = open_dataset(name, root)
    assert after.train.keys == before.train.keys and after.train.masks == before.train.masks
    assert after.val.keys == before.val.keys and after.notes == before.notes


def test_images_are_rgb_as_stored(tmp_path):
    make_folder(tmp_path, n_unlabeled=0)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees", which the mask would not follow
    (tmp_path / "unlabeled").mkdir()
    Image.fromarray(pixels).save(tmp_path / "unlabeled/turned.png", exif=exif)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "unlabeled/gray.png")
    Image.fromarray(pixels).convert("RGBA").save(tmp_path / "unlabeled/alpha.png")
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "unlabeled/print.jpg")
    (tmp_path / "unlabeled/cut.jpg").write_bytes((tmp_path / "images/train/img0.jpg").read_bytes()[:900])
    train = open_dataset("folder", tmp_path).train
    assert np.array_equal(train.image(at(train, "unlabeled/turned")), pixels)
    assert np.array_equal(train.image(at(train, "unlabeled/alpha")), pixels)
    assert np.array_equal(train.image(at(train, "unlabeled/gray")), pixels[..., :1].repeat(3, 2))
    assert train.image(at(train, "unlabeled/print")).shape == (20, 30, 3)
    assert "cut.jpg: cannot be read as an image" in error_of(train.image, at(train, "unlabeled/cut"))
    assert "no mask" in error_of(train.mask, at(train, "unlabeled/gray"))


# ---- masks

@pytest.fixture
def one_mask(tmp_path):
    """The path of a 64x80 mask and a function that reads it as one of `classes` classes."""
    path, size = tmp_path / "mask.png", (64, 80)
    save_picture(tmp_path / "image.png", np.zeros((*size, 3), np.uint8))

    def read(classes=4):
        return Split({"a": (str(tmp_path / "image.png"), str(path))}, (("", identity(classes)),)).mask(0)
    return SimpleNamespace(path=path, read=read, rows=np.arange(64)[:, None].repeat(80, 1))


def test_gray_and_palette_masks_keep_their_values(one_mask):
    values = one_mask.rows % 4
    values[0] = 255
    for save in (save_gray, save_palette):
        save(one_mask.path, values)
        assert np.array_equal(one_mask.read(), values)
    picture = Image.fromarray((one_mask.rows % 4).astype(np.uint8))
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.save(one_mask.path, bits=2)
    assert one_mask.path.read_bytes()[24] == 2  # a palette PNG of 2 bits is fine
    assert np.array_equal(one_mask.read(), one_mask.rows % 4)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_low_bit_gray_is_refused(one_mask, bits):
    save_low_bit_gray(one_mask.path, one_mask.rows % 2 ** bits, bits)
    raw = np.array(Image.open(one_mask.path)).astype(int)
    assert np.array_equal(raw, one_mask.rows % 2 ** bits * {1: 1, 2: 85, 4: 17}[bits])  # a valid PNG
    message = error_of(one_mask.read, 16)
    assert str(one_mask.path) in message and f"{bits} bits per pixel" in message and "rescales" in message


@pytest.mark.parametrize("values, classes, wrong, cause", [
    ((0, 85, 170), 4, "85, 170", "divide by 85"), ((17, 34, 0), 4, "17, 34", "divide by 17"),
    ((0, 34), 4, "34", "divide by 17"), ((0, 170, 255), 4, "170", "divide by 85"),
    ((1, 2, 3, 4), 4, "4", "start at 1"), ((0, 1, 4), 4, "4", "start at 1"),
    ((7, 8, 26), 19, "26", "labelIds"), ((0, 38, 75, 147), 21, "38, 75, 147", "brightness or colour"),
    ((0, 254), 4, "254", "brightness or colour")])
def test_wrong_values(one_mask, values, classes, wrong, cause):
    save_gray(one_mask.path, np.array(values)[one_mask.rows % len(values)])
    message = error_of(one_mask.read, classes)
    assert f"{one_mask.path}: holds the values {wrong}, but only 0..{classes - 1} and 255" in message
    assert cause in message.split("likely cause")[1]


@pytest.mark.parametrize("mode, cause", [("RGB", "RGB mask"), ("RGBA", "RGB mask"), ("LA", "RGB mask"),
                                         ("I;16", "more than 8 bits")])
def test_wrong_modes(one_mask, mode, cause):
    Image.new(mode, (80, 64)).save(one_mask.path)
    message = error_of(one_mask.read)
    assert message.startswith(f"{one_mask.path}: mode {mode.split(';')[0]}") and cause in message


def test_wrong_size_and_damage(one_mask):
    save_gray(one_mask.path, np.zeros((80, 64)))
    image = one_mask.path.with_name("image.png")
    assert error_of(one_mask.read).startswith(
        f"{one_mask.path}: the mask is 64x80 (width x height), its image {image} is 80x64")
    save_gray(one_mask.path, np.random.default_rng(0).integers(0, 4, (64, 80)))
    stored = one_mask.path.read_bytes()
    for damaged in (b"", stored[:20], stored[:len(stored) // 2], b"no picture at all, but of some length"):
        one_mask.path.write_bytes(damaged)
        assert f"{one_mask.path}: cannot be read as a mask" in error_of(one_mask.read)
    Image.new("L", (80, 64)).save(one_mask.path, format="jpeg")
    assert f"{one_mask.path}: a JPEG file under the name of a PNG" in error_of(one_mask.read)
    save_gray(one_mask.path, np.zeros((64, 80)))
    image.write_bytes(stored[:20])
    assert "image.png: cannot be read as an image" in error_of(one_mask.read)


def test_damaged_mat(tmp_path):
    data = open_dataset("voc", make_sbd(tmp_path))
    i = at(data.train, SBD_ONLY[0])
    stored = open(data.train.masks[i], "rb").read()
    broken = bytearray(stored)
    broken[160:200] = bytes(40)
    hdf = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    other, wide = io.BytesIO(), io.BytesIO()
    scipy.io.savemat(other, {"GTinst": {"Segmentation": np.zeros((64, 80), np.uint8)}})
    scipy.io.savemat(wide, {"GTcls": {"Segmentation": np.zeros((64, 80))}})
    for damaged in (b"", stored[:50], stored[:127], stored[:200], stored[:-3], bytes(broken), hdf,
                    other.getvalue(), wide.getvalue()):
        with open(data.train.masks[i], "wb") as file:
            file.write(damaged)
        message = error_of(data.train.mask, i)
        assert data.train.masks[i] in message and "GTcls.Segmentation" in message


# ---- which images are labelled

def named(data, indices):
    return [data.train.keys[i] for i in indices]


def test_seeded_draw_is_a_permutation_of_the_sorted_keys(tmp_path):
    data = open_dataset("cityscapes", make_cityscapes(tmp_path))
    for seed in (0, 12345):
        order = np.random.RandomState(seed).permutation(6)
        for count in (1, 3, 5):
            labelled, unlabelled = choose_labelled(data, str(count), "", seed)
            assert labelled == sorted(order[:count].tolist()) and unlabelled == sorted(order[count:].tolist())
    assert len({tuple(choose_labelled(data, "3", "", seed)[0]) for seed in range(10)}) > 3


class Names:
    """A split of nothing but names, all of which have a mask."""

    def __init__(self, keys):
        self.keys = sorted(keys)

    def __len__(self):
        return len(self.keys)

    def has_mask(self, i):
        return True


CITIES = dict(aachen=174, bochum=96, bremen=316, cologne=154, darmstadt=85, dusseldorf=221, erfurt=109,
              hamburg=248, hanover=196, jena=119, krefeld=99, monchengladbach=94, strasbourg=365,
              stuttgart=196, tubingen=144, ulm=95, weimar=142, zurich=122)


def test_published_cityscapes_draws():
    """The pairs below are published; in their cities, sequences are numbered from 0 without gaps, so that the
    names can be built. In a few others the real names differ, but not their places in the order."""
    train = Names(f"{city}_{k:06d}_000019" for city, number in CITIES.items() for k in range(number))
    data = SegmentationData("cityscapes", (), None, train, Names([]), "val", ())
    assert len(data.train) == 2975
    published = {12345: {"jena_000088_000019", "stuttgart_000066_000019"},
                 34567: {"cologne_000110_000019", "weimar_000097_000019"},
                 56789: {"cologne_000142_000019", "jena_000079_000019"}}
    for seed, names in published.items():
        assert set(named(data, choose_labelled(data, "2", "", seed)[0])) == names
        assert names < set(named(data, choose_labelled(data, "100", "", seed)[0]))
    for labeled, count in {"1/2": 1488, "1/4": 744, "1/8": 372, "1/16": 186, "1/20": 149, "1/30": 100,
                           "1/50": 60, "1/100": 30, "372": 372, "all": 2975}.items():
        assert len(choose_labelled(data, labeled, "", 0)[0]) == count


def test_voc_counts_and_fractions(tmp_path):
    data = open_dataset("voc", make_sbd(tmp_path))
    own, everything = list(range(6)), list(range(10))
    assert choose_labelled(data, "1464", "", 0)[0] == own  # VOC's own train list, however long
    assert choose_labelled(data, "6", "", 7)[0] == own  # counts up to its length are drawn from it
    draws = [choose_labelled(data, "3", "", seed)[0] for seed in range(20)]
    assert all(set(draw) <= set(own) for draw in draws) and len(set(map(tuple, draws))) > 5
    assert draws[4] == sorted(np.random.RandomState(4).permutation(6)[:3].tolist())
    assert len(choose_labelled(data, "7", "", 0)[0]) == 7
    assert choose_labelled(data, "all", "", 0)[0] == everything
    fractions = [choose_labelled(data, "1/4", "", seed)[0] for seed in range(20)]
    assert all(len(draw) == 3 for draw in fractions) and any(set(draw) - set(own) for draw in fractions)
    assert fractions[4] == sorted(np.random.RandomState(4).permutation(10)[:3].tolist())
    os.remove(data.train.masks[2])
    shutil.rmtree(tmp_path / "benchmark_RELEASE")
    data = open_dataset("voc", tmp_path)
    assert data.train.keys[2] in error_of(choose_labelled, data, "1464", "", 0)
    assert 2 not in choose_labelled(data, "5", "", 0)[0] and 2 in choose_labelled(data, "5", "", 0)[1]


def test_voc_fractions_at_full_size():
    train = Names(f"2008_{k:06d}" for k in range(10582))
    data = SegmentationData("voc", (), None, train, Names([]), "val", (), None, frozenset(train.keys[:1464]))
    for labeled, count in {"1/2": 5291, "1/4": 2646, "1/8": 1323, "1/16": 662, "1/50": 212}.items():
        assert len(choose_labelled(data, labeled, "", 0)[0]) == count
    assert max(choose_labelled(data, "732", "", 0)[0]) < 1464 < max(choose_labelled(data, "1465", "", 0)[0])


@pytest.mark.parametrize("labeled", ["0", "-4", "1/0", "0/8", "0.5", "1/", "half", "", "1 2", "4/3", "7"])
def test_malformed_counts(tmp_path, labeled):
    data = open_dataset("cityscapes", make_cityscapes(tmp_path))
    message = error_of(choose_labelled, data, labeled, "", 0)
    assert f"--labeled {labeled}: " in message and ("only 6" in message) == (labeled in ("4/3", "7"))


def test_images_without_a_mask_are_never_drawn(tmp_path):
    data = open_dataset("folder", make_folder(tmp_path))
    labelled, unlabelled = choose_labelled(data, "all", "", 0)
    assert labelled == list(range(6))
    assert named(data, unlabelled) == ["unlabeled/new0", "unlabeled/new1", "unlabeled/new2"]
    assert len(choose_labelled(data, "1/3", "", 0)[0]) == 2  # of the six that have one
    assert "only 6 can be labelled" in error_of(choose_labelled, data, "7", "", 0)


# ---- split files

FORMS = {  # spec section 8: (dataset, form of a line, {key: how the line names it})
    "a": ("voc", "{}"), "b": ("voc", "{}.jpg"),
    "c": ("voc", "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png"),
    "d": ("voc", "JPEGImages/{0}.jpg SegmentationClass/{0}.png"),
    "m": ("voc", "{} -1"), "m2": ("voc", "{}  1"),
    "csv": ("voc", "JPEGImages/{0}.jpg, SegmentationClass/{0}.png"), "windows": ("voc", "JPEGImages\\{}.jpg"),
    "dated": ("voc", "/data/2012_050111/VOC2012/JPEGImages/{}.jpg"),
    "e": ("cityscapes", "leftImg8bit/train/{1}/{0}_leftImg8bit.png "
                        "gtFine/train/{1}/{0}_gtFine_labelTrainIds.png"),
    "f": ("cityscapes", "leftImg8bit/train/{1}/{0}_leftImg8bit.png"),
    "g": ("cityscapes", "/images/train/{0}.png\t/segmentation/train/{0}_gtFine.png"),
    "h": ("cityscapes", "train/{1}/{0}_x.png"), "city key": ("cityscapes", "{}"),
    "i": ("camvid", "/SegNet/CamVid/train/{0}.png /SegNet/CamVid/trainannot/{0}.png"),
    "camvid key": ("camvid", "{}"), "camvid mask": ("camvid", "{}_L.png"),
    "j": ("bdd100k", "images/train/{}.jpg"),
    "j2": ("bdd100k", "seg/images/train/{0}.jpg seg/labels/train/{0}_train_id.png"),
    "bdd key": ("bdd100k", "{}"), "bdd 10k": ("bdd100k", "/bdd100k/images/10k/train/{}.jpg"),
    "k": ("sunrgbd", "image/train/img-{2}.jpg depth/train/00000001.png label37/train/00000001.png"),
    "k13": ("sunrgbd13", "SUNRGBD-train_images/img-{2}.jpg train13labels/img13labels-{2}.png"),
    "sun key": ("sunrgbd", "{}"), "context key": ("pcontext", "{}"),
    "context": ("pcontext59", "JPEGImages/{0}.jpg SegmentationClassContext/{0}.png"),
    "l": ("scene", "SUNRGBD/realsense/shr/2014-{}//image/0000063.jpg"),
    "folder": ("folder", "images/{}.jpg"), "folder key": ("folder", "{}"),
    "folder windows": ("folder", "images\\{}.jpg"),
}


def open_like(name, tmp_path):
    """-> (data, two of its keys, not in sorted order); scene: `folder` with names like those of SUN RGB-D"""
    if name in MAKERS:
        data = open_dataset(name, MAKERS[name](tmp_path))
        return data, [data.train.keys[2], data.train.keys[0]]
    make_folder(tmp_path, n_train=1)
    stems = [f"SUNRGBD/realsense/shr/2014-{k}/image/0000063" for k in (2, 1)]
    for stem in stems:
        save_picture(tmp_path / f"images/train/{stem}.jpg", np.zeros((20, 30, 3), np.uint8))
        save_gray(tmp_path / f"masks/train/{stem}.png", np.zeros((20, 30)))
    return open_dataset("folder", tmp_path), [f"train/{stem}" for stem in stems]


@pytest.mark.parametrize("form", FORMS)
def test_every_line_format(tmp_path, form):
    name, line = FORMS[form]
    data, keys = open_like(name, tmp_path / "data")
    short = ["2", "1"] if name == "scene" else keys
    rows = [line.format(key, key.split("_")[0], key[-6:]) for key in short]
    file = tmp_path / "list.txt"
    for text in ("\n".join(rows) + "\n", "\n".join(rows), "\r\n".join(rows) + "\r\n",
                 "\n\n# a comment\n" + "  \n".join(rows) + "\t\n\n", "\ufeff" + "\n".join(rows)):
        file.write_bytes(text.encode())
        assert read_split(file, data) == keys
    labelled, unlabelled = choose_labelled(data, "no count", str(file), 0)  # the file overrides it
    assert set(named(data, labelled)) == set(keys) and labelled == sorted(labelled)
    assert sorted(labelled + unlabelled) == list(range(len(data.train)))


def test_write_split_is_read_back(tmp_path):
    root = make_folder(tmp_path / "data")
    for stem in ("two words", "a, b", "frame.0001", "more/img1", "name.png"):
        save_picture(root / f"images/train/{stem}.jpg", np.zeros((20, 30, 3), np.uint8))
        save_gray(root / f"masks/train/{stem}.png", np.zeros((20, 30)))
    for name in MAKERS:
        data = open_dataset(name, root if name == "folder" else MAKERS[name](tmp_path / name))
        keys = data.train.keys[::-1]
        write_split(tmp_path / "list.txt", keys)
        assert (tmp_path / "list.txt").read_bytes() == ("\n".join(keys) + "\n").encode()
        assert read_split(tmp_path / "list.txt", data) == keys


def test_same_file_name_in_train_and_val(tmp_path):
    data, file = open_dataset("folder", make_folder(tmp_path / "data")), tmp_path / "list.txt"
    save_lines(file, ["img1", "more/img0.jpg", "/elsewhere/images/train/img0.png", "unlabeled/new1"])
    assert read_split(file, data) == ["train/img1", "train/more/img0", "train/img0", "unlabeled/new1"]
    save_lines(file, ["images/val/img1.jpg"])
    assert "belong to val" in error_of(read_split, file, data)


def test_a_mask_that_the_list_names_is_used(tmp_path):
    root = make_aug(make_sbd(tmp_path / "data"))
    voc, keys = root / "VOCdevkit/VOC2012", [VOC_TRAIN[0], SBD_ONLY[0], SBD_ONLY[1]]
    for key in keys[:2]:
        path = voc / f"SegmentationClassAug/{key}.png"
        save_gray(path, np.full(np.array(Image.open(path)).shape, 9))
    data = open_dataset("voc", root)
    file = tmp_path / "list.txt"
    save_lines(file, [f"/JPEGImages/{key}.jpg /SegmentationClassAug/{key}.png" for key in keys[:2]]
               + [f"JPEGImages/{keys[2]}.jpg SegmentationClass/{keys[2]}.png"])  # the last does not exist
    labelled, _ = choose_labelled(data, "", file, 0)
    assert named(data, labelled) == keys
    assert [int(data.train.mask(i).max()) == 9 for i in labelled] == [True, True, False]
    assert data.train.masks[labelled[2]].endswith(".mat")
    assert data.notes[-1].startswith("2 masks are those that")
    data = open_dataset("voc", root)
    save_lines(file, [f"JPEGImages/{keys[0]}.jpg SegmentationClass/{keys[0]}.png"])
    before = data.notes
    labelled, _ = choose_labelled(data, "", file, 0)
    assert 9 not in data.train.mask(labelled[0]) and data.notes == before


@pytest.mark.parametrize("name, row, other", [
    ("sunrgbd", "image/train/img-000001.jpg train13labels/img13labels-000001.png", "13labels"),
    ("sunrgbd13", "SUNRGBD-train_images/img-000001.jpg sunrgbd_train_test_labels/img-005051.png", "img-005051"),
    ("pcontext", "JPEGImages/2008_000008.jpg SegmentationClass/2008_000008.png", "SegmentationClass")])
def test_lists_choose_no_masks_of_another_encoding(tmp_path, name, row, other):
    """sunrgbd and pcontext: such a mask could be read, but as other classes."""
    root, file = MAKERS[name](tmp_path / "data"), tmp_path / "list.txt"
    if name == "pcontext":
        save_palette(root / "VOCdevkit/VOC2010/SegmentationClass/2008_000008.png", np.zeros((64, 80)))
    data = open_dataset(name, root)
    save_lines(file, [row])
    assert datasets._below(data.root, row.split()[1])  # it is there
    assert choose_labelled(data, "all", file, 0)[0] == [0] and other not in data.train.masks[0]


def test_sunrgbd_lists_know_train_from_test(tmp_path):
    data, file = open_dataset("sunrgbd", make_sunrgbd(tmp_path / "data")), tmp_path / "list.txt"
    for row in ("SUNRGBD-test_images/img-000001.jpg", "image/test/img-000001.jpg", "test/000001"):
        save_lines(file, [row])
        assert "1 images belong to test, which is scored (test/000001)" in error_of(read_split, file, data)
    save_lines(file, ["img-000001.jpg"])
    assert "1 lines name no image of sunrgbd" in error_of(read_split, file, data)


def test_columns_of_a_list(tmp_path):
    """Names may hold blanks if tabs or commas separate; a mask is the last column; an image is no mask."""
    root, file = make_folder(tmp_path / "data"), tmp_path / "list.txt"
    for folder in ("images", "masks", "depth", "other"):
        save_gray(root / f"{folder}/train/two words.png", np.full((20, 30), len(folder)))
    for separator in ("\t", ",", " , "):
        data = open_dataset("folder", root)
        save_lines(file, [separator.join(f"{folder}/train/two words.png" for folder in ("images", "depth", "other"))])
        i = choose_labelled(data, "all", file, 0)[0][0]
        assert data.train.masks[i] == str(root / "other/train/two words.png")
    for line in ("images/train/img1.png depth/train/gone.png", "train/img1 images/train/img0.jpg"):
        data = open_dataset("folder", root)
        save_lines(file, [line])
        i = choose_labelled(data, "all", file, 0)[0][0]
        assert data.train.masks[i] == str(root / "masks/train/img1.png")


def test_a_list_may_name_masks_of_images_that_have_none_otherwise(tmp_path):
    root = make_voc(tmp_path / "data")
    voc = root / "VOCdevkit/VOC2012"
    key, path = VOC_TRAIN[0], voc / f"SegmentationClass/{VOC_TRAIN[0]}.png"
    (voc / "Mine").mkdir()
    os.rename(path, voc / f"Mine/{key}.png")
    data = open_dataset("voc", root)
    save_lines(tmp_path / "list.txt", [key])
    assert key in error_of(choose_labelled, data, "all", tmp_path / "list.txt", 0)
    save_lines(tmp_path / "list.txt", [f"JPEGImages/{key}.jpg Mine/{key}.png"])
    labelled, _ = choose_labelled(data, "all", tmp_path / "list.txt", 0)
    assert labelled == [0] and data.train.has_mask(0) and 255 in data.train.mask(0)


def test_all_errors_of_a_list_are_raised_at_once(tmp_path):
    data = open_dataset("voc", make_sbd(tmp_path / "data"))
    save_lines(tmp_path / "list.txt", ["2099_000001", "2099_000002", "nonsense", "2099_000003 -1", VOC_VAL[1],
                                       VOC_TRAIN[0], VOC_TRAIN[1], VOC_TRAIN[0] + ".jpg"])
    message = error_of(read_split, tmp_path / "list.txt", data)
    assert "list.txt" in message and "4 lines name no image of voc" in message and str(data.root) in message
    assert "(2099_000001, 2099_000002, nonsense, ..)" in message
    assert f"a key such as {VOC_TRAIN[0]}" in message
    assert f"1 images stand there more than once ({VOC_TRAIN[0]})" in message
    assert f"1 images belong to val, which is scored ({VOC_VAL[1]})" in message


@pytest.mark.parametrize("text", ["", "\n \r\n", "# nothing but a comment\n", "\ufeff"])
def test_an_empty_list_is_an_error(tmp_path, text):
    data = open_dataset("voc", make_voc(tmp_path / "data"))
    (tmp_path / "list.txt").write_bytes(text.encode())
    assert "list.txt: the list is empty" in error_of(choose_labelled, data, "all", tmp_path / "list.txt", 0)


def test_labelled_images_need_masks(tmp_path):
    data = open_dataset("folder", make_folder(tmp_path / "data"))
    save_lines(tmp_path / "list.txt", ["train/img1", "unlabeled/new2"])
    message = error_of(choose_labelled, data, "all", tmp_path / "list.txt", 0)
    assert "1 of the 2 images have no mask" in message and "unlabeled/new2" in message


def test_unreadable_lists(tmp_path):
    data = open_dataset("voc", make_voc(tmp_path / "data"))
    assert "gone.txt" in error_of(choose_labelled, data, "all", tmp_path / "gone.txt", 0)
    assert "data" in error_of(choose_labelled, data, "all", tmp_path / "data", 0)
    (tmp_path / "list.txt").write_bytes(VOC_TRAIN[0].encode("utf-16"))
    assert "UTF-8" in error_of(choose_labelled, data, "all", tmp_path / "list.txt", 0)


# ---- pickled permutations

@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_pickled_permutation(tmp_path, protocol, module):
    data = open_dataset("voc", make_sbd(tmp_path / "data"))
    order, file = np.random.RandomState(0).permutation(10), tmp_path / "split_0.pkl"
    stored = pickle.dumps(order, protocol)
    if protocol == 3:  # names are lines there, so that the older module name can be put in
        stored = stored.replace(b"numpy._core.multiarray", module)
        assert module in stored
    file.write_bytes(stored)
    assert read_split(file, data) == [data.train.keys[i] for i in order]
    for labeled, count in {"3": 3, "1/4": 3, "all": 10}.items():
        assert choose_labelled(data, labeled, file, 99)[0] == sorted(order[:count].tolist())
    assert "only 10" in error_of(choose_labelled, data, "11", file, 0)
    with open(file, "wb") as handle:
        pickle.dump(order.tolist(), handle)
    assert read_split(file, data) == [data.train.keys[i] for i in order]


class Evil:
    def __reduce__(self):
        return os.mkdir, (self.path,)


class EvilArray(np.ndarray):
    def __reduce__(self):
        return eval, ("__import__('os').mkdir('evil')",)


def test_a_pickle_cannot_run_code(tmp_path, monkeypatch):
    data = open_dataset("voc", make_voc(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    evil, file = Evil(), tmp_path / "split.pickle"
    evil.path = str(tmp_path / "evil")
    for bad in (evil, [evil], np.arange(6).view(EvilArray)):
        file.write_bytes(pickle.dumps(bad))
        message = error_of(choose_labelled, data, "all", file, 0)
        assert "permutation does not need" in message and not (tmp_path / "evil").exists()
    pickle.loads(file.read_bytes())
    assert (tmp_path / "evil").exists()  # the attack is real: an ordinary unpickler falls for it


@pytest.mark.parametrize("order", [np.arange(5), np.arange(7), np.array([0, 1, 2, 3, 4, 4]), np.arange(1, 7),
                                   np.arange(6.0), np.arange(6) == 2, "text", 3, {"a": 1}])
def test_what_is_no_permutation_is_refused(tmp_path, order):
    data = open_dataset("voc", make_voc(tmp_path / "data"))
    (tmp_path / "split.pkl").write_bytes(pickle.dumps(order))
    message = error_of(read_split, tmp_path / "split.pkl", data)
    assert "split.pkl" in message and "expected a permutation of 0..5" in message


def test_damaged_pickles(tmp_path):
    data = open_dataset("voc", make_voc(tmp_path / "data"))
    stored = pickle.dumps(np.random.RandomState(0).permutation(6))
    for damaged in (b"", stored[:-1], stored[:60], b"2007_000032\n", b"\x80\x04."):
        (tmp_path / "split.pkl").write_bytes(damaged)
        assert "split.pkl: cannot be read" in error_of(read_split, tmp_path / "split.pkl", data)
    assert "gone.pkl" in error_of(read_split, tmp_path / "gone.pkl", data)


# ---- fingerprints

def test_fingerprints_of_other_lists_are_noted(tmp_path):
    notes = open_dataset("voc", make_sbd(tmp_path / "voc")).notes
    for name, here, published in (
            ("train", 6, "1464, 6ed871ae2d09c264"), ("val", 3, "1449, 93298139809de695"),
            ("trainaug", 10, "10582, 5b12fb32d8deda0c")):
        assert any(note.startswith(f"voc {name}: {here} images") and published in note for note in notes)
    notes = open_dataset("camvid", make_camvid(tmp_path / "camvid", test=False)).notes
    assert [note.split(":")[0] for note in notes] == ["camvid train", "camvid val"]


def test_a_published_list_is_recognised():
    """The names of CamVid's test set follow from the specification: two runs of every 30th frame."""
    keys = [f"0001TP_{k:06d}" for k in range(8550, 10381, 30)]
    keys += [f"Seq05VD_f{k:05d}" for k in range(0, 5101, 30)]
    assert len(keys) == 233 and datasets._compare("camvid test", keys[::-1]) == []
    assert datasets._compare("camvid test", keys[:-1] + ["Seq05VD_f05101"]) != []
    for split, number in (("train", 5285), ("test", 5050)):  # SUN RGB-D's images have numbers for names
        keys = [f"{split}/{k:06d}" for k in range(1, number + 1)]
        assert datasets._compare(f"sunrgbd {split}", keys) == []
