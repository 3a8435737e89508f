"""Atomic writing: a temporary file in the same folder is written, then renamed."""
import os
from contextlib import contextmanager
from pathlib import Path

from common.settings import UserError


@contextmanager
def replacing(path, mode="w", newline=None):
    """`with replacing(path) as file: ..` writes or replaces `path` atomically.

    Raises UserError when that fails, as on a full disk; the old file is kept then.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")  # after a kill, the next one overwrites it
    try:
        with open(temporary, mode, newline=newline) as file:
            yield file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's own RuntimeError hides the disk's error
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.__context__ or error}): expected a "
                        f"folder with room for it") from error
