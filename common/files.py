"""Atomic writing, by a temporary file in the same folder that is renamed; new folders."""
import os
from contextlib import contextmanager
from pathlib import Path

from common.settings import UserError


@contextmanager
def replacing(path, mode="w", suffix=".tmp"):
    """`with replacing(path) as file: ..` writes or replaces `path` atomically.

    suffix: of the temporary file, which the next writer overwrites if a kill left it; those who may
    write one `path` at the same time need their own. Raises UserError when writing fails,
    as on a full disk; the old file is kept then.
    """
    path = Path(path)
    temporary = path.with_name(path.name + suffix)
    try:
        with open(temporary, mode) as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error}): expected a folder with room for "
                        f"it") from error


def make_folder(path, given_by="--out"):
    """Make a folder. Raises UserError, naming the flag, if it cannot be made or is read-only."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{given_by} {path}: cannot make this folder ({error.strerror})") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"{given_by} {path}: this folder is read-only")
