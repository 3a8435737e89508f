"""PASCAL-Context, 59 classes in the official order, and background, which is all else:

  VOCdevkit/VOC2010/JPEGImages/2008_000002.jpg
  VOCdevkit/VOC2010/ImageSets/Main/{train,val}.txt
  trainval/2008_000002.mat
How to get it: VOCtrainval_03-May-2010.tar of host.robots.ox.ac.uk/pascal/VOC/voc2010 and
trainval.tar.gz of cs.stanford.edu/~roozbeh/pascal-context
"""
from common.datasets.masks import (Encoding, SegmentationData, Split, find_files, find_folder,
                                   not_found, read_lines)
from common.datasets.voc import KEY, voc_palette
from common.transforms import IGNORE

CONTEXT_59 = [entry.split() for entry in """
    aeroplane 2, bicycle 23, bird 25, boat 31, bottle 34, bus 45, car 59, cat 65, chair 72, cow 98,
    table 397, dog 113, horse 207, motorbike 258, person 284, pottedplant 308, sheep 347, sofa 368,
    train 416, tvmonitor 427, bag 9, bed 18, bench 22, book 33, building 44, cabinet 46, ceiling 68,
    cloth 80, computer 85, cup 104, door 115, fence 144, floor 158, flower 159, food 162, grass 187,
    ground 189, keyboard 220, light 232, mountain 259, mouse 260, curtain 105, platform 296,
    sign 355, plate 295, road 324, rock 326, shelves 349, sidewalk 354, sky 360, snow 366,
    bedclothes 19, track 415, tree 420, truck 424, wall 440, water 445, window 454, wood 458
""".split(",")]  # name, number in the .mat files, whose others (up to 459) are background
OTHER = {"the numbers end at 459: these are labels of another kind": range(460, 2 ** 16)}
PUBLISHED = {"train": (4998, "39028f7eef6877ca"), "val": (5105, "565c8cf894c032bb")}


def open_pcontext(root, background=True):
    """background: a class of its own, else ignored.

    Weights trained on VOC's trainaug have seen 4,116 of the 5,105 val images.
    """
    name = "pcontext" if background else "pcontext59"
    places = ("", "VOC2010", "VOCdevkit/VOC2010", "VOCtrainval_03-May-2010/VOCdevkit/VOC2010")
    voc = find_folder([root], places, "JPEGImages")
    images = find_files(voc / "JPEGImages", [".jpg"])
    if not images:
        raise not_found(name, root, __doc__)
    places = ("trainval", "pascal-context/trainval", "PASCAL-Context/trainval")
    bases = (root, voc, voc.parent, voc.parent.parent)
    masks = find_files(find_folder(bases, places), [".mat"])
    first = 0 if background else 1  # of the 60 classes
    classes = dict.fromkeys(range(460), 0 if background else IGNORE)
    for k, (_, number) in enumerate(CONTEXT_59):
        classes[int(number)] = k + 1 - first
    encodings = {"": Encoding(classes, OTHER, "LabelMap")}
    splits = [Split(images, masks, encodings, read_lines(voc / f"ImageSets/Main/{part}.txt"))
              for part in ("train", "val")]
    names = ("background", *(label for label, _ in CONTEXT_59))
    notes = (f"{name}: background is " + ("one of the 60 classes" if background else "ignored"),)
    return SegmentationData(name, names[first:], voc_palette()[first:60], *splits, "val", notes,
                            __doc__, KEY, PUBLISHED)
