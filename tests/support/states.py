"""Saved states opened and sealed again, and an Smmu that C holds."""

import ctypes
import json
import struct
import zlib

import smmufast


class Handle:
    """A Smmu through the C interface."""

    def __init__(self, smmu):
        from smmufast._device import smmu as compiled

        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        table = get(compiled._C_API, b"smmufast._smmu._C_API")
        acquire, release, run = (ctypes.c_void_p * 3).from_address(table + 8)
        self.handle = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(acquire)(smmu)
        self.free = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(release)
        pointers = [ctypes.c_void_p] * 3
        self.run = ctypes.PYFUNCTYPE(ctypes.c_int, *pointers)(run)

    def translate(self, sid, iova):
        """Returns the status."""
        request = struct.pack("<QIIII", iova, sid, smmufast.NO_SUBSTREAM, 0, 0)
        return self.run(self.handle, request, ctypes.create_string_buffer(1024))

    def release(self):
        self.free(self.handle)


def sealed(parsed, contents, version=2):
    text = json.dumps(parsed).encode() if not isinstance(parsed, bytes) else parsed
    data = b"smmufast" + version.to_bytes(4, "little") + len(text).to_bytes(4, "little")
    data += text + contents
    return data + zlib.crc32(data).to_bytes(4, "little")


def opened(saved):
    end = 16 + int.from_bytes(saved[12:16], "little")
    return json.loads(saved[16:end]), saved[end:-4]
