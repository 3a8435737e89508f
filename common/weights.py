"""Weights that a backbone begins with, --weights: ImageNet's, or a file in one of many namings."""
import re
from pathlib import Path

import torch
import torchvision

from common import checkpoint
from common.datasets.masks import few
from common.settings import UserError

DEEP_STEM = {  # names of torchcv's 3x3resnet50: ours
    "conv1": "conv1.0", "bn1": "conv1.1", "conv2": "conv1.3", "bn2": "conv1.4", "conv3": "conv1.6",
    "bn3": "bn1"}
WRAPPERS = re.compile(r"^((module|model|backbone|encoder|resnet|base|body|Scale|net|prefix)\.)+")


def load_weights(backbone, name, weights, say=print):
    """Fill a backbone from `imagenet` (torchvision's, downloaded), a state-dict file, or `none`, by
    names and shapes; say what was matched, skipped and missing.

    Raises UserError for a file that is missing, no state dict, or lacks a tensor of the backbone.
    """
    if weights == "none":
        return
    if weights == "imagenet":
        kind = torchvision.models.get_model_weights(name).IMAGENET1K_V1  # the papers' features
        try:
            state = kind.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:  # no network; a part of the file
            raise UserError(f"--weights imagenet: torchvision could not download {name} ({error}); "
                            f"give a --weights FILE, or --weights none") from error
    else:
        state = read_weights(weights)
    shapes = {key: tensor.shape for key, tensor in backbone.state_dict().items()}
    matched = {key: tensor for key, tensor in state.items()
               if isinstance(tensor, torch.Tensor) and shapes.get(key) == tensor.shape}
    skipped = [key for key in state if key not in matched]
    missing = [key for key in shapes
               if key not in matched and not key.endswith("num_batches_tracked")]
    say(f"weights {weights}: {len(matched)} tensors matched, {len(skipped)} skipped "
        f"({few(skipped) or 'none'}), {len(missing)} missing")
    if missing:
        raise UserError(f"--weights {weights}: {len(missing)} tensors are missing or differ in "
                        f"shape ({few(missing)}): expected those of the --backbone chosen")
    backbone.load_state_dict(matched, strict=False)


def read_weights(path):
    """{name less wrapper prefixes: tensor} of a file, the deep stem's with our names.

    Raises UserError for a file that is missing, or no state dict.
    """
    if not Path(path).is_file():
        raise UserError(f"--weights {path}: no such file; expected imagenet, none, or a file")
    state = checkpoint.load(path)
    if not isinstance(state, dict):
        raise UserError(f"--weights {path}: expected a state dict (names and tensors)")
    inner = [state[k] for k in ("state_dict", "model", "net") if isinstance(state.get(k), dict)]
    state = inner[0] if inner else state
    state = {WRAPPERS.sub("", str(name)): tensor for name, tensor in state.items()}
    if "conv3.weight" not in state:
        return state
    renamed = {}
    for name, tensor in state.items():
        part, dot, rest = name.partition(".")
        renamed[DEEP_STEM.get(part, part) + dot + rest] = tensor
    return renamed


def stem_of(weights):
    """The stem of the ResNet in a file of --weights: 7x7 or deep. Raises as read_weights does."""
    if weights in ("imagenet", "none"):
        return "7x7"
    return "deep" if "conv1.0.weight" in read_weights(weights) else "7x7"
