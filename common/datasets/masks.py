"""Images and masks on disk: finding them, what their values mean, reading and checking them."""
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha1
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from common.settings import UserError
from common.transforms import IGNORE

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
INVALID = 254  # in a table: a value that a mask file must not hold


@dataclass
class Encoding:
    """What the values stored in mask files mean."""
    classes: dict                               # {stored value: class 0..C-1 or IGNORE}, no others
    causes: dict = field(default_factory=dict)  # {likely cause: the wrong values that it explains}
    variable: str = ""                          # of .mat files: `LabelMap`, `GTcls.Segmentation`
    colours: bool = False                       # values are colours, 0xrrggbb

    @cached_property
    def table(self):
        """uint8 [65536], or [2^24] of colours: stored value -> class, IGNORE or INVALID"""
        table = np.full(2 ** (24 if self.colours else 16), INVALID, np.uint8)
        table[list(self.classes.keys())] = list(self.classes.values())
        return table


def unchanged(classes):
    """{0: 0, .. C-1: C-1, 255: 255}, for masks that hold classes already."""
    return {value: value for value in (*range(classes), IGNORE)}


class Split:
    """Images and the files of their masks, sorted by key. Only image(i) and mask(i) open files."""

    def __init__(self, images, masks, encodings, keys=None):
        """images, masks: {key: path}; an image without a mask is an unlabelled one.
        encodings: {part of a mask file's name: Encoding}; the first part that fits counts.
        keys: of a list, by default those of all images. UserError if images lack some of them."""
        self.keys = sorted(images if keys is None else set(keys))
        if lost := [key for key in self.keys if key not in images]:
            folder = os.path.dirname(next(iter(images.values()), "no image found/"))
            raise UserError(f"{folder}: {len(lost)} of {len(self.keys)} listed images are missing "
                            f"({few(lost)}); unpack their archive again")
        self.images = [images[key] for key in self.keys]
        self.masks = [masks.get(key) for key in self.keys]
        self.encodings = encodings

    def __len__(self):
        return len(self.keys)

    @property
    def fingerprint(self):
        """16 hexadecimal digits that tell this list of images from others"""
        return sha1("\n".join(self.keys).encode(errors="surrogateescape")).hexdigest()[:16]

    def has_mask(self, i):
        return self.masks[i] is not None

    def image(self, i):
        """uint8 [H, W, 3], RGB"""
        return read_image(self.images[i])

    def mask(self, i):
        """uint8 [H, W], 0..C-1 and 255. UserError names the file, what is wrong, and why."""
        path = self.masks[i]
        name = os.path.basename(path)
        encoding = next(self.encodings[part] for part in self.encodings if part in name)
        if name.endswith(".mat"):
            raw = read_mat(path, encoding.variable)
        else:
            raw = read_png(path, encoding.colours)
        _compare_size(path, raw.shape, self.images[i])
        mask = encoding.table[raw]
        if (mask == INVALID).any():
            raise UserError(_explain_values(path, np.unique(raw), encoding))
        return mask

    def check_sizes(self):
        """Raises UserError if a mask has not the size of its image. Reads their headers only."""
        for image, path in zip(self.images, self.masks):
            if not path.endswith(".mat"):  # whose header does not tell
                with _opened(path, "a mask") as picture:
                    size = picture.size[::-1]
                _compare_size(path, size, image)


@dataclass
class SegmentationData:
    name: str
    classes: tuple[str, ...]
    palette: np.ndarray                 # uint8 [C, 3]
    train: Split                        # every training image, those without a mask included
    val: Split                          # the split that is scored
    scored_on: str                      # its name: "val" or "test"
    notes: tuple[str, ...] = ()         # facts that a run prints once
    layout: str = ""                    # the files that are expected, and where they are from
    key_pattern: str = ""               # regex of a key in a path; groups, if any, make it up
    published: dict = field(default_factory=dict)  # {split: (number of images, fingerprint)}
    voc_train: frozenset = frozenset()  # voc: the keys of its own list train.txt
    one_size: bool = False              # have all scored images one size?
    labelled: list[int] = field(default_factory=list)  # set by choose_labelled


def check_classes(flag, ids, data):
    """Raises UserError if --flag names a class that the dataset does not have."""
    last = len(data.classes) - 1
    if ids and max(ids) > last:
        raise UserError(f"--{flag} {max(ids)}: {data.name} has the classes 0 to {last}")


def not_found(name, root, layout):
    return UserError(f"--root {root}: no {name} there. Expected: {layout}")


def find_folder(bases, places, inside=""):
    """The first folder base/place that has the folder `inside`; if none has, the first of all."""
    folders = [base / place for place in places for base in bases]
    return next((folder for folder in folders if (folder / inside).is_dir()), folders[0])


def find_files(folder, endings, with_folders=False):
    """{name without its ending: path} of the files at any depth below a folder, if it exists.

    with_folders: names are paths below the folder. What archives and file browsers leave there is
    passed over: names with a leading dot, and __MACOSX. Raises UserError for a folder that cannot
    be read, which os.walk would take for an empty one.
    """
    def refuse(error):
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise UserError(f"{error.filename}: this folder cannot be read ({error.strerror})")
    found = {}
    endings = tuple(end.lower() for end in endings)
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        for name in names:
            ending = next((end for end in endings if name.lower().endswith(end)), None)
            if ending is None or name.startswith("."):
                continue
            path = os.path.join(here, name)
            key = Path(path).relative_to(folder).as_posix() if with_folders else name
            key = key.removesuffix(name[-len(ending):])
            if key in found:
                raise UserError(f"{path} and {found[key]} have one name; remove one")
            found[key] = path
    return found


def paired(images, masks, spare=0):
    """The keys of images, {key: path}, and masks, {key: path}, that have both. UserError if more
    than `spare` lack one of them."""
    single = sorted(images.keys() ^ masks.keys())
    if images and masks and len(single) > spare:
        folder = os.path.dirname((images | masks)[single[0]])
        raise UserError(f"{folder}: {len(single)} images without a mask, or masks without an image "
                        f"({few(single)}); unpack the images and the masks again")
    return images.keys() & masks.keys()


def numbered_lines(path):
    """[(number from 1, line)] of a text file, stripped, without blank lines and comments (#)."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file in UTF-8 ({error})") from error
    lines = [line.strip() for line in text.splitlines()]
    return [(i + 1, line) for i, line in enumerate(lines) if line and not line.startswith("#")]


def read_lines(path):
    return [line for _, line in numbered_lines(path)]


def few(items):
    """The first three, for a message."""
    return ", ".join(map(str, items[:3])) + (", .." if len(items) > 3 else "")


@contextmanager
def _opened(path, what):
    try:
        with Image.open(path) as picture:
            yield picture
    except Exception as error:  # of Pillow: which one it is depends on the damage
        raise UserError(f"{path}: cannot be read as {what} ({error})") from error


def read_image(path, upright=False):
    """uint8 [H, W, 3], RGB. upright: turned as EXIF says, unlike masks. UserError names a file."""
    with _opened(path, "an image") as picture:
        if upright:
            picture = ImageOps.exif_transpose(picture)
        if picture.mode in ("I", "F"):
            raise ValueError(f"mode {picture.mode} has 32 bits; expected 8 or 16 bits")
        if picture.mode.startswith("I;16"):
            gray = np.round(np.array(picture) / 257).astype(np.uint8)  # 65535 / 255
            return np.stack([gray] * 3, 2)
        return np.array(picture.convert("RGB"))


def read_png(path, colours=False):
    """[H, W]: the values stored in an 8-bit gray or a palette PNG, or its colours, 0xrrggbb."""
    with _opened(path, "a mask") as picture:
        raw = np.array(picture.convert("RGB") if colours else picture)
    with open(path, "rb") as file:
        bits, colour_type = file.read(26)[24:]  # colour type 0 is gray, 3 palette
    readable = colour_type == 3 or (colour_type == 0 and bits == 8)  # Pillow rescales fewer bits
    if picture.format != "PNG" or not (colours or readable):
        raise UserError(f"{path}: a {picture.format} file of mode {picture.mode}, {bits} bits; "
                        f"expected a PNG of class ids, 8-bit gray or with a palette")
    return raw @ np.array([0x10000, 0x100, 1], np.uint32) if colours else raw


def read_mat(path, variable):
    """uint16 [H, W]: a variable of a MAT 5 file, or (`struct.field`) the field of one."""
    import scipy.io  # takes most of a second, and few datasets need it
    try:
        name, _, field = variable.partition(".")
        found = scipy.io.loadmat(path, variable_names=[name])[name]
        if field:
            found = found[field][0, 0]
        with np.errstate(invalid="ignore"):
            mask = found.astype(np.uint16)
        if (mask != found).any():
            raise ValueError("its values are not whole numbers from 0 to 65535")
        return mask
    except Exception as error:  # which one it is depends on the damage
        raise UserError(f"{path}: cannot be read as a MAT file of {variable} ({error})") from error


def _compare_size(path, size, image):
    with _opened(image, "an image") as picture:
        width, height = picture.size  # of the header: no pixel is decoded
    if size != (height, width):
        raise UserError(f"{path}: the mask has (height, width) {size}, its image {image} "
                        f"{(height, width)}; they must have one size")


def _explain_values(path, values, encoding):
    wrong = [value for value in values.tolist() if value not in encoding.classes]
    if encoding.colours:
        return (f"{path}: holds the colours {few([f'{value:06x}' for value in wrong])}, which no "
                f"class has; likely cause: it was resized or compressed, or holds class ids")
    last = min(set(range(2 ** 16)) - set(encoding.classes)) - 1  # from 0 on without a gap
    allowed = f"0..{last}" + (" and 255" if last < IGNORE and IGNORE in encoding.classes else "")
    cause = "brightness or colour instead of class ids, or classes missing in the class list"
    if wrong == [last + 1]:
        cause = "labels that start at 1 instead of 0, or a class missing in the class list"
    for text, explained in encoding.causes.items():
        if set(wrong) <= set(explained):
            cause = text
    return f"{path}: holds {few(wrong)}, but only {allowed} are allowed; likely cause: {cause}"
