"""Class ids in MATLAB's files (MAT 5)."""
import numpy as np

from common.settings import UserError


def read_mat(path, variable):
    """uint16 [H, W]: a variable of a MAT file, or (`struct.field`) the field of one."""
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
