"""The settings of a script: a dataclass whose every field is a flag, described by `option`."""
import dataclasses
import os
import sys
import types
import typing
from dataclasses import dataclass


class UserError(Exception):
    """A mistake the user can mend, in one sentence: what is wrong, where, what was expected."""


Size = typing.NewType("Size", tuple)  # (height, width), written `360x480`, or `320` for a square
ANY = object()  # in `needs`: any value but None, False, 0 or an empty one


def option(default, help, choices=None, group=None, within=None, needs=None, replaces=None,
           free=False, scoring=False):
    """A dataclass field that is a flag.

    group: heading in --help, for this field and the next ones. within: (smallest, largest) allowed
    number; None: no limit. needs: {other field: the value, tuple of values or ANY that it must
    have}, otherwise the flag has no effect and is refused. replaces: the field that becomes None
    if this flag is given. free: may be changed when a run is resumed. scoring: the flag has an
    effect with --evaluate and --predict.
    """
    return dataclasses.field(default=default, metadata=dict(
        help=help, choices=choices, group=group, within=within, needs=needs or {},
        replaces=replaces, free=free, scoring=scoring))


POSITIVE = (1, None)
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")


@dataclass
class BaseConfig:
    """The flags that no paper decides. Every script's Config adds those of its own paper."""
    data: str = option("shapes", "dataset", group="run", scoring=True)
    root: str = option("data", "folder of the data: the dataset's own or its parent", free=True,
                       scoring=True)
    download: bool = option(False, "let torchvision download VOC 2012 and SBD", free=True,
                            needs=dict(data="voc"))
    labeled: str = option("all", "labelled images: a count (1464), a fraction (1/8) or all")
    split: str = option("", "file that lists the labelled images, or orders all (.pkl), instead "
                           "of a seeded draw")
    seed: int = option(0, "seed of draw, initialisation and augmentation",
                       within=(0, 2**32 - 1))
    supervised: bool = option(False, "the baseline: labelled images only, same network, same steps")
    released: bool = option(False, "settings of the authors' code; other flags override them")
    steps: int | None = option(None, "training steps", within=POSITIVE, replaces="epochs")
    out: str = option("", "run folder [runs/<script>-<data>-<labeled>-seed<k>-<settings>]; the "
                          "same command resumes the run in it", free=True, scoring=True)
    evaluate: str = option("", "score this checkpoint and exit", free=True, scoring=True,
                           replaces="predict")
    predict: str = option("", "write palette PNGs of --images with this checkpoint and exit",
                          free=True, scoring=True)
    images: str = option("", "folder of images for --predict", needs=dict(predict=ANY), free=True,
                         scoring=True)
    format: str = option("palette", "files of --predict: palette PNGs, or what a test server takes",
                         ("palette", "voc", "cityscapes", "bdd100k"), needs=dict(predict=ANY),
                         free=True, scoring=True)

    size: Size | None = option(None, "resize every image to this size", group="images",
                               replaces="long_side", scoring=True)
    crop: Size | None = option(None, "random crop")
    flip: bool = option(False, "random horizontal flip")
    eval_size: str = option("full", "score at the original size (full) or at --size (train)",
                            ("full", "train"), scoring=True)

    weights: str = option("imagenet", "backbone weights: imagenet (torchvision), none, or a "
                                      "state-dict file", group="network")
    backbone: str = option("resnet50", "encoder", RESNETS)
    backbone_layers: int = option(4, "keep the first 2 or 3 layers of the ResNet, for small images",
                                  (2, 3, 4))

    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"), group="machine",
                         free=True, scoring=True)
    precision: str = option("auto", "auto is bf16 (fp16 on old GPUs) on CUDA and fp32 on CPU",
                            ("auto", "fp32", "bf16", "fp16"), scoring=True)
    compile: bool = option(False, "torch.compile the heavy parts of a step", free=True)
    workers: int = option(min(8, os.cpu_count() or 1), "processes that decode and augment, per "
                          "stream; 0: the main one does", within=(0, 256), free=True, scoring=True)
    cache: str = option("", "folder of the images that were decoded at --size; none: decode them "
                            "anew each time [.cache, beside the run folder]", needs=dict(size=ANY),
                        free=True)
    eval_every: int = option(1000, "steps between evaluations", within=POSITIVE, free=True)
    save_every: int = option(500, "steps between checkpoints", within=POSITIVE, free=True)
    log_every: int = option(20, "steps between log lines", within=POSITIVE, free=True)

    @property
    def scoring_size(self):
        """Size at which images are scored; None: each at its own"""
        return self.size if self.eval_size == "train" else None


def kinds_of(config_class):
    """{field: its type}, of `X | None` the X"""
    kinds = typing.get_type_hints(config_class)
    for name, kind in kinds.items():
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            kinds[name] = next(k for k in typing.get_args(kind) if k is not type(None))
    return kinds


def is_list(kind):
    return typing.get_origin(kind) is tuple and typing.get_args(kind)[-1] is Ellipsis


def flag(name):
    """backbone_lr_mult -> --backbone-lr-mult"""
    return "--" + name.replace("_", "-")


def show(value, kind):
    """A value as its flag takes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if not isinstance(value, (tuple, list)):
        return str(value)
    separator = " "
    if kind is Size:
        separator = "x"
    elif is_list(kind):
        separator = ","
    return separator.join(map(str, value)) or "none"


NOT_SAVED = ("download", "evaluate", "predict", "images", "format", "out")  # no settings of a run


def to_save(config):
    """The settings as config.json and checkpoints hold them."""
    settings = dataclasses.asdict(config)
    return {name: value for name, value in settings.items() if name not in NOT_SAVED}


def from_saved(config_class, saved, given=()):
    """A config from what `to_save` gave, perhaps by way of JSON, with the flags `given` on top."""
    names = {field.name for field in dataclasses.fields(config_class)}
    values = {name: tuple(value) if isinstance(value, list) else value
              for name, value in saved.items() if name in names}
    return config_class(**{**values, **dict(given)})


def say(text):
    """Print a line for the user."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(str(text).encode(encoding, "replace").decode(encoding), flush=True)  # names of files
    except OSError:  # `| head`, a terminal that is gone: the run goes on, and its files have it all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
