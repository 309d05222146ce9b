"""Commands that get lost on their way to an SMMU."""

from smmufast import layout

NOTHING = layout.to_bytes("SYNC", layout.pack("SYNC"))


class Deaf:
    """An SMMU that does not hear commands of one name: a CMD_SYNC takes the place of each."""

    def __init__(self, queue, name):
        self.smmu, self.queue = queue.smmu, queue
        self.number = layout.pack(name) & 0xFF
        self.lost = 0

    def __getattr__(self, name):
        return getattr(self.smmu, name)

    def write(self, register, value, *more):
        if register == "CMDQ_PROD":
            queue, mask = self.queue, (2 << self.queue.size_lg2) - 1
            at = self.smmu.read("CMDQ_CONS") & mask
            while at != value & mask:
                address = queue.base + 16 * (at & mask >> 1)
                if queue.memory.read(address, 1)[0] == self.number:
                    queue.memory.write(address, NOTHING)
                    self.lost += 1
                at = at + 1 & mask
        self.smmu.write(register, value, *more)


def lose(queue, name):
    """Lose every command of a name that a queue is given from now on; what counts them."""
    queue.smmu = Deaf(queue, name)
    return queue.smmu
