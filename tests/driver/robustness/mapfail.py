"""A System in memory that refuses one store after the other of a map: what is told is so."""

from smmufast import Caches, Features, Memory
from smmufast.iommu import System

BASE, SIZE, M = 0x4000_0000, 1 << 22, 1 << 20


class Medium:
    def __init__(self):
        self.ram, self.left = bytearray(SIZE), None
        memory = Memory()
        memory.add_callback(BASE, SIZE, self.read, self.write)
        features = Features.full().replace(sidsize=8)
        self.system = System(
            memory=memory, pages=(BASE, SIZE), features=features, caches=Caches.server)
        self.device = self.system.device(8)
        self.domain = self.device.paging_domain()
        self.device.attach(self.domain)

    def read(self, address, n):
        return bytes(self.ram[address - BASE :][:n])

    def write(self, address, data):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                return None
        self.ram[address - BASE : address - BASE + len(data)] = data
        return True


def play(medium):
    x = medium.domain
    for left in range(12):
        x.map(2 * M, 0x8000_0000, 4096)
        x.unmap(2 * M, 4096)
        medium.left = left
        failed = False
        try:
            x.map(2 * M, 0x8000_0000, 8 * M)
        except Exception:
            failed = True
        medium.left = None
        there = [at for at in range(2 * M, 10 * M, 2 * M) if x.iova_to_phys(at)]
        assert x.mapped == 2 * M * len(there) == (0 if failed else 8 * M), (left, x.mapped, there)
        for at in range(2 * M, 10 * M, 2 * M):
            assert bool(medium.device.translate(at)) == (at in there)
        assert not medium.system.stale()
        x.unmap(2 * M, 8 * M)


if __name__ == "__main__":
    play(Medium())
