"""The command queue of an SMMU, as a driver sees it (IHI 0070 3.5 and 4)."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from smmufast import layout
from smmufast.errors import InputOutput, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smmufast._smmu import Smmu

_ALL: Final = (1 << 64) - 1
_CMDQ_RA: Final = layout.mask("CMDQ_BASE", "RA")
_SYNC: Final = layout.pack("SYNC")
_CERRORS: Final = {
    0: "no error", 1: "illegal command", 2: "abort of a command fetch", 3: "ATC timeout",
}  # fmt: skip


class CommandQueue:
    """The driver's end of a command queue: commands gather until one CMD_SYNC.

    Parameters
    ----------
    smmu : Smmu
    base : int
        Address of the ring in the SMMU's memory, aligned to its size.
    size_lg2 : int
        log2 of the number of commands of 16 bytes.

    Attributes
    ----------
    issued, syncs : int
        Commands so far, and how many of them were CMD_SYNC.
    log : list or None
        A list gets (name, fields) of every command.
    lock : RLock
        Held from a batch's first command to its CMD_SYNC.
    """

    def __init__(self, smmu: Smmu, base: int, size_lg2: int) -> None:
        self.smmu = smmu
        self.memory = smmu.memory
        self.base = base
        self.size_lg2 = size_lg2
        self.prod = 0
        self.issued = 0
        self.syncs = 0
        self.log: list[tuple[str, dict[str, int]]] | None = None
        self.lock = threading.RLock()
        self._size = 1 << size_lg2
        self._mask = 2 * self._size - 1
        self._free = self._size

    def start(self) -> None:
        """Tell the SMMU where the queue is; CR0.CMDQEN must be 0."""
        self.smmu.write("CMDQ_BASE", self.base | _CMDQ_RA | self.size_lg2, 8)
        self.smmu.write("CMDQ_PROD", 0)
        self.smmu.write("CMDQ_CONS", 0)
        self.prod = 0
        self._free = self._size

    def issue(self, name: str, **fields: int) -> None:
        """Put a command into the queue, by its name and fields in `smmufast.layout`.

        Raises
        ------
        ValueError
            No such command or field, or a value that does not fit.
        """
        word = layout.pack(layout.command_record(name), **fields)
        if self.log is not None:
            self.log.append((name, layout.unpack(layout.command_record(name), word)))
        with self.lock:
            self._put((word,))

    def put(self, word0: int, word1: int) -> None:
        """Put a command of two dwords into the queue."""
        if not (0 <= word0 <= _ALL and 0 <= word1 <= _ALL):
            raise InvalidArgument("word0", word0, "dwords of 64 bits")
        with self.lock:
            self._put((word0 | word1 << 64,))

    def _put(self, words: Sequence[int]) -> None:
        """With the lock held: commands into the queue, one write for what lies side by side."""
        done, count = 0, len(words)
        while done < count:
            if not self._free:
                self._ring()
            slot = self.prod & self._mask >> 1
            n = min(count - done, self._free, self._size - slot)
            piece = words if n == count else words[done : done + n]
            data = b"".join([word.to_bytes(16, "little") for word in piece])
            self.memory.write(self.base + 16 * slot, data)
            self.prod = self.prod + n & self._mask
            self._free -= n
            self.issued += n
            done += n

    def _ring(self) -> None:
        """Write PROD, and see that the SMMU has consumed everything."""
        smmu = self.smmu
        smmu.write("CMDQ_PROD", self.prod)
        cons = smmu.read("CMDQ_CONS")
        if cons & self._mask != self.prod:
            if (smmu.read("GERROR") ^ smmu.read("GERRORN")) & 1:
                self._recover(cons)
            raise InputOutput("queue", self, text="the SMMU does not consume commands: CMDQEN?")
        self._free = self._size

    def _recover(self, cons: int) -> None:
        """Put a CMD_SYNC where the error is, acknowledge it, go on, and say what it was."""
        slot = cons & self._mask >> 1
        address = self.base + 16 * slot
        bad = int.from_bytes(self.memory.read(address, 16), "little")
        self.memory.write(address, _SYNC.to_bytes(16, "little"))
        self.smmu.write("GERRORN", self.smmu.read("GERRORN") ^ 1)
        self.smmu.write("CMDQ_PROD", self.prod)
        self._free = self._size
        reason = _CERRORS.get(cons >> 24 & 0x7F, "unknown error")
        raise InputOutput(
            "command", bad, text=f"command {bad & 0xFF:#x} ({bad:#034x}) was refused: {reason}"
        )

    def submit(self) -> None:
        """Let the SMMU consume what was issued, without a CMD_SYNC; errors as `sync`."""
        with self.lock:
            self._ring()

    def sync(self) -> None:
        """Issue CMD_SYNC and wait until everything before it is done.

        Raises
        ------
        InputOutput
            A command was refused; the queue works again.
        Exception
            Whatever a host's callback raises while commands are consumed.
        """
        self.run(())

    def run(self, words: Sequence[int]) -> None:
        """Put commands into the queue, then CMD_SYNC; wait and raise as `sync`."""
        with self.lock:
            words = [*words, _SYNC]
            self._put(words)
            if self.log is not None:
                for word in words:
                    record = layout.command_record(word & 0xFF)
                    self.log.append((record.name, layout.unpack(record, word)))
            self.syncs += 1
            self._ring()
