"""Checkpoints that survive a kill at any moment: written beside the target, flushed to the disk, then renamed."""
import os
from pathlib import Path

import torch

from common.settings import UserError


def save(path, state):
    """Write `state` (nested dicts of tensors, numbers, strings) so that `path` is always a whole file, old or new."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")  # left behind by a kill, it is overwritten by the next save
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the rename itself must reach the disk
    os.close(folder)


def load(path, device="cpu"):
    """Read a checkpoint without running any code of it (weights_only). Raises UserError for a missing or foreign file."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}: expected a file such as runs/.../last.pt")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a file that is not its own
        raise UserError(f"{path} is not a checkpoint that can be loaded safely ({type(error).__name__})") from error
