"""Class ids in MATLAB's files (MAT 5), read in Python: scipy's reader, in C, can crash on a damaged
file. Found are the numbers of a matrix, or of one in a struct, and nothing else."""
import math
import struct
import zlib

import numpy as np

from common.settings import UserError

TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
COMPRESSED = 15    # a further type of elements
LARGEST = 2 ** 28  # bytes of a file, and of what is compressed in it


def read_mat(path, variable):
    """uint16 [H, W]: a variable of a MAT file, or (`struct.field`) the field of one."""
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST)
        if data[124:128] != b"\0\1IM":
            raise ValueError("it does not begin as MAT 5 does, which MATLAB's save -v7 writes")
        found = {}
        for kind, body in _elements(data[128:]):
            if kind == COMPRESSED:  # it holds the tag and the content of one matrix
                body = zlib.decompressobj().decompress(body, LARGEST)[8:]
            found |= _matrix(body)
        for name in variable.split("."):
            found = found.get(name, {})
        if not isinstance(found, np.ndarray):
            raise ValueError("it does not hold that")
        with np.errstate(invalid="ignore"):
            mask = found.astype(np.uint16)
        if (mask != found).any():
            raise ValueError("its values are not whole numbers from 0 to 65535")
        return mask
    except Exception as error:  # which one it is depends on the damage
        raise UserError(f"{path}: cannot be read as a MAT file of {variable} ({error})") from error


def _elements(data):
    """Yields (type, content) of the elements of which `data` consists."""
    start = 0
    while start < len(data):
        kind, size = struct.unpack_from("<II", data, start)
        start += 8
        if kind >= 2 ** 16:  # up to 4 bytes, kept in place of their number, which is in the type
            size, kind = divmod(kind, 2 ** 16)
            content = data[start - 4:start][:size]
        else:
            content = data[start:start + size]
            start += size if kind == COMPRESSED else math.ceil(size / 8) * 8
        if len(content) < size:
            raise ValueError("it is damaged or cut short")
        yield kind, content


def _matrix(body):
    """{name: array [H, W]}, or of a struct {name: {field: array}}; {} of what is neither."""
    parts = [np.frombuffer(content, "<" + TYPES[kind]) if kind in TYPES else content
             for kind, content in _elements(body)]
    kind = parts[0][0] % 256
    if kind != 2 and kind not in range(6, 16):  # neither a struct nor numbers
        return {}
    shape, name, *parts = parts[1:]
    if kind != 2:
        return {name.tobytes().decode(): parts[0].reshape(shape, order="F")}
    length, names, *fields = parts
    names = [names.tobytes()[i:i + length[0]] for i in range(0, len(names), length[0])]
    contents = [_matrix(field).get("") for field in fields]
    return {name.tobytes().decode(): {key.rstrip(b"\0").decode(): content
                                      for key, content in zip(names, contents)}}
