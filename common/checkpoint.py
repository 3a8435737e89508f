"""Checkpoints that survive a kill at any moment, written beside the target, flushed, renamed; and
opening one to score it or to predict with it."""
import dataclasses
import os
from pathlib import Path

import torch

from common.command_line import check_needs
from common.files import replacing
from common.settings import UserError, flag, from_saved


def save(path, state):
    """Write `state` (nested dicts of tensors, numbers, strings); `path` is always a whole file.

    Raises UserError when it cannot be written, as on a full disk; the old file is kept then.
    """
    with replacing(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(Path(path).parent, os.O_RDONLY)
    os.fsync(folder)  # the rename itself must reach the disk
    os.close(folder)


def load(path, device="cpu"):
    """Read a checkpoint without running any code of it (weights_only).

    Raises UserError for a missing or foreign file.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}: expected a file such as runs/.../last.pt")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a file that is not its own
        raise UserError(f"{path} is not a checkpoint that can be loaded safely "
                        f"({type(error).__name__})") from error


def open_checkpoint(script, path, config_class, given, device):
    """For --evaluate and --predict. -> (config, state): the settings in the checkpoint with the
    flags `given` on top, and its contents. Raises UserError for another script's file, and for
    flags without effect."""
    state = load(path, device)
    if not isinstance(state, dict) or state.get("script") != script or "net" not in state:
        raise UserError(f"{path} is not a checkpoint of {script}.py: expected a file such as "
                        f"runs/.../last.pt")
    useful = {f.name for f in dataclasses.fields(config_class) if f.metadata["scoring"]}
    if useless := sorted(set(given) - useful):
        raise UserError(f"{flag(useless[0])} has no effect on a trained network; {path} brings its "
                        f"own settings")
    try:
        config = from_saved(config_class, state["config"], given)
        state |= state["domains"][0]  # the dataset of all scripts but cct.py, which takes several
        state["step"], state["palette"].tolist(), len(state["classes"])
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged, or of another version ({error})") from error
    check_needs(config, given)
    return config, state


def load_network(net, state, path, device):
    """The network of a checkpoint, on the device. Raises UserError if its weights do not fit."""
    try:
        net.load_state_dict(state["net"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not hold the weights of its own settings: it is damaged, or "
                        f"of another version") from error
    return net.to(device, memory_format=torch.channels_last)


def same_classes(data, state, path):
    """Raises UserError if a checkpoint was trained on other classes than those of the dataset."""
    if list(data.classes) != state["classes"]:
        names = ", ".join(state["classes"][:3])
        raise UserError(f"{path} was trained on {len(state['classes'])} classes ({names}, ..), but "
                        f"--data {data.name} has {len(data.classes)} others: evaluate it on the "
                        f"dataset it was trained on")
