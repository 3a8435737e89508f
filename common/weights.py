"""Weights that a backbone begins with, --weights: ImageNet's, or a file in one of many namings."""
import re
from pathlib import Path

import torch
import torchvision

from common import checkpoint
from common.settings import UserError

DEEP_STEM = {  # names of torchcv's 3x3resnet50: ours
    "conv1": "conv1.0", "bn1": "conv1.1", "conv2": "conv1.3", "bn2": "conv1.4", "conv3": "conv1.6",
    "bn3": "bn1"}
WRAPPER = re.compile(r"^(module|model|backbone|encoder|resnet|base|body|Scale|net|prefix)\.")


def load_weights(backbone, name, weights, say=print, flag="--weights"):
    """Fill a backbone from `imagenet` (torchvision's, downloaded), a state-dict file, or `none`.

    Raises UserError for a file that is missing, no state dict, or lacks a tensor of the backbone.
    """
    if weights == "none":
        return
    if weights == "imagenet":
        kind = torchvision.models.get_model_weights(name).IMAGENET1K_V1  # the papers' features
        try:
            state = kind.get_state_dict(progress=True, check_hash=True)
        except OSError as error:
            raise UserError(f"{flag} imagenet: torchvision could not download {name} ({error}); "
                            f"give a {flag} FILE, or {flag} none") from error
    else:
        state = read_weights(weights, flag)
    load_matching(backbone, state, weights, say, flag)


def read_weights(path, flag="--weights"):
    """{name less wrapper prefixes: tensor} of a file, the deep stem's with our names.

    Raises UserError for a file that is missing, or no state dict.
    """
    if not Path(path).is_file():
        raise UserError(f"{flag} {path}: no such file; expected imagenet, none, or a file")
    state = checkpoint.load(path)
    if not isinstance(state, dict):
        raise UserError(f"{flag} {path}: expected a state dict (names and tensors)")
    inner = [state[k] for k in ("state_dict", "model", "net") if isinstance(state.get(k), dict)]
    state = {unwrapped(name): tensor for name, tensor in (inner[0] if inner else state).items()}
    if "conv3.weight" not in state:
        return state
    renamed = {}
    for name, tensor in state.items():
        part, dot, rest = name.partition(".")
        renamed[DEEP_STEM.get(part, part) + dot + rest] = tensor
    return renamed


def unwrapped(name):
    while WRAPPER.match(name):
        name = WRAPPER.sub("", name, count=1)
    return name


def stem_of(weights):
    """The stem of the ResNet in a file of --weights: 7x7 or deep. Raises as read_weights does."""
    if weights in ("imagenet", "none"):
        return "7x7"
    return "deep" if "conv1.0.weight" in read_weights(weights) else "7x7"


def load_matching(module, state, source, say=print, flag="--weights"):
    """Copy the tensors of `state` whose name and shape fit `module`.

    Says what was matched, skipped and missing. Raises UserError if a tensor is missing.
    """
    own = module.state_dict()
    matched = {}
    skipped = []
    for name, tensor in state.items():
        if name in own and isinstance(tensor, torch.Tensor) and tensor.shape == own[name].shape:
            matched[name] = tensor
        else:
            skipped.append(name)
    missing = [n for n in own if n not in matched and not n.endswith("num_batches_tracked")]
    say(f"weights {source}: {len(matched)} tensors matched, {len(skipped)} skipped{_few(skipped)}, "
        f"{len(missing)} missing{_few(missing)}")
    if missing:
        raise UserError(f"{flag} {source}: {len(missing)} tensors are missing or differ in shape"
                        f"{_few(missing)}: expected those of the --backbone that was chosen")
    module.load_state_dict(matched, strict=False)


def _few(names):
    shown = [*names[:3], ".."] if len(names) > 3 else names
    return f" ({', '.join(shown)})" if names else ""
