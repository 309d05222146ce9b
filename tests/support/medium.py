"""Memory behind callbacks that refuses a store, and a system in it."""

from smmufast import Features, Memory
from smmufast.iommu import System


class Medium:
    """Memory of which `left` more stores go through: the next one is refused, once.

    With `dead` all are refused from then on, until `left` is None again.  refusal: the exception
    that the callback raises, or None: it returns None.
    """

    def __init__(self, base=0x4000_0000, size=1 << 22, refusal=OSError):
        self.base, self.size, self.refusal = base, size, refusal
        self.bytes = bytearray(size)
        self.left, self.dead = None, False
        self.memory = Memory()
        self.memory.add_callback(base, size, self.read, self.write)

    def read(self, address, size):
        at = address - self.base
        return bytes(self.bytes[at : at + size])

    def write(self, address, data):
        if self.left == 0:
            if not self.dead:
                self.left = None
            if self.refusal is None:
                return None
            raise self.refusal("the medium refuses")
        if self.left is not None:
            self.left -= 1
        at = address - self.base
        self.bytes[at : at + len(data)] = data
        return True


class SystemMedium(Medium):
    """A Medium and a System whose tables lie in it."""

    def __init__(self, refusal=OSError, **more):
        super().__init__(refusal=refusal)
        self.system = System(
            memory=self.memory, pages=(self.base, self.size),
            features=Features.full().replace(sidsize=8), **more,
        )  # fmt: skip
