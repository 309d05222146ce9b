"""A PCIe device with an address translation cache, for hosts to reuse.

Not architectural but for what it exchanges with the SMMU: ATS requests and Translated
transactions, page requests, invalidations and page request group responses (IHI 0070 3.9, 4.5, 8).
What the cache keeps and for how long, and when the device asks again, is this file's choice.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex

from smmufast._arguments import integer, must_be
from smmufast.faults import AtsFault, AtsResponse

if TYPE_CHECKING:
    from collections.abc import Callable

    from smmufast._device.smmu import Result, Smmu

RESPONSES = ("failure", "invalid", "success")
"""What answers a page request group, by the code of CMD_PRI_RESP."""

_Key = tuple[int | None, bool, int, int]  # PASID, privileged, size, address


class AtcEntry(NamedTuple):
    """A translation in the ATC of a device.

    The `size` bytes from the untranslated address `start` on are those from `address` on, an
    intermediate physical address if `ipa`.  `read`, `write` and `execute` are granted, as
    privileged if `priv`.
    """

    start: int
    address: int
    size: int
    sid: int
    ssid: int | None
    read: bool
    write: bool
    execute: bool
    priv: bool
    ipa: bool


class PageRequest:
    """A page request that a device made, a group of its own.

    `sid`, `ssid`, `address`, `read`, `write`, `execute`, `priv` and `prg_index` are what was asked.
    `answer` is one of RESPONSES, "dropped" if the message was lost without an answer, and None
    while it is outstanding.
    """

    __slots__ = (
        "address", "answer", "execute", "prg_index", "priv", "read", "sid", "ssid", "write",
    )  # fmt: skip

    def __init__(
        self, sid: int, ssid: int | None, address: int, prg_index: int, *,
        read: bool, write: bool, execute: bool, priv: bool,
    ) -> None:  # fmt: skip
        """Keep what is asked; nobody was asked yet."""
        self.sid = sid
        self.ssid = ssid
        self.address = address
        self.prg_index = prg_index
        self.read = read
        self.write = write
        self.execute = execute
        self.priv = priv
        self.answer: str | None = None

    def _repr_html_(self) -> str:
        from smmufast._html import fields

        return fields(self)

    def __repr__(self) -> str:
        """What it asks for, and its answer."""
        asked = "".join(
            letter
            for letter, wanted in zip(
                "rwxp", (self.read, self.write, self.execute, self.priv), strict=True
            )
            if wanted
        )
        ssid = "" if self.ssid is None else f" ssid={self.ssid:#x}"
        return (
            f"<PageRequest sid={self.sid:#x}{ssid} address={self.address:#x} {asked} "
            f"prg={self.prg_index} {self.answer or 'outstanding'}>"
        )


class AtsDevice:
    """A device with an ATC: it asks once for each page and uses the answer until told not to.

    It enters itself into ``smmu.devices``, by which CMD_ATC_INV and CMD_PRI_RESP reach it.

    Parameters
    ----------
    smmu : Smmu
        The SMMU that it is behind.
    sid : int
        Its StreamID.
    entries : int
        Translations that the ATC holds; the one that was not used for longest makes room.
        0: every access asks.
    stu : int
        Smallest translation unit in bytes, a power of two from 4096 on.
    on_page_request : callable, optional
        With it the device makes page requests (PRI) for pages that lack a permission, and calls
        it with the `PageRequest`: the host runs software until CMD_PRI_RESP came.  What is not
        answered when it returns stays outstanding, and the access fails meanwhile.
    credits : int
        Page requests that may be outstanding, 512 at most.

    `hits`, `misses`, `requests`, `page_requests` and `invalidations` count.  `responsive` is True;
    a device for which it is set to False lets invalidations time out.

    `Smmu.save` holds nothing of it: an Smmu that is restored gets a new device, with an empty ATC.

    >>> from smmufast import Memory, Smmu, layout
    >>> memory = Memory()
    >>> memory.add_private()
    >>> memory.write(0x4000_0000, layout.to_bytes("STE", layout.pack(
    ...     "STE", V=1, Config=0b101, EATS=1, S1CDMax=1, S1DSS=1, S1ContextPtr=0x5000_0000)))
    >>> smmu = Smmu(memory, strtab_base=0x4000_0000, cr0=0b10101)    # CR0.ATSCHK is 1
    >>> device = AtsDevice(smmu, 0)
    >>> device.access(0x1234, write=True)    # stage 1 is bypassed without a PASID: S1DSS
    <Result bypass sid=0x0 iova=0x1234 pa=0x1234>
    >>> device.access(0x1238).pa, device.hits, device.misses
    (4664, 1, 1)
    >>> smmu.command("ATC_INV", StreamID=0, Size=52)
    >>> len(device), device.invalidations
    (0, 1)
    """

    def __init__(
        self, smmu: Smmu, sid: SupportsIndex, *, entries: int = 64, stu: int = 4096,
        on_page_request: Callable[[PageRequest], object] | None = None, credits: int = 32,
    ) -> None:  # fmt: skip
        """Attach the device to its SMMU; ValueError if the StreamID has a device."""
        sid = integer("sid", sid, 0xFFFFFFFF)
        entries = integer("entries", entries)
        stu = integer("stu", stu, 1 << 43, 4096)
        if stu & (stu - 1):
            raise ValueError(must_be("stu", "a power of two", stu))
        credits = integer("credits", credits, 512)
        if sid in smmu.devices:
            raise ValueError(f"sid {sid:#x} has a device already")
        self.smmu = smmu
        self.sid = sid
        self.entries = entries
        self.stu = stu
        self.on_page_request = on_page_request
        self.credits = credits
        self.responsive = True
        self.pri_enabled = on_page_request is not None
        self.hits = 0
        self.misses = 0
        self.requests = 0
        self.page_requests = 0
        self.invalidations = 0
        self._cache: OrderedDict[_Key, AtsResponse] = OrderedDict()
        self._sizes: Counter[int] = Counter()
        self._outstanding: dict[int, PageRequest] = {}
        self._free = deque(range(512))
        smmu.devices[sid] = self

    def __len__(self) -> int:
        """How many translations the ATC holds."""
        return len(self._cache)

    def _repr_html_(self) -> str:
        from smmufast._html import entries

        return entries(repr(self), AtcEntry._fields, self.held(), len(self))

    def __repr__(self) -> str:
        """Stream, occupancy and what is outstanding."""
        return (
            f"<AtsDevice sid={self.sid:#x} {len(self)} of {self.entries} entries, "
            f"{len(self._outstanding)} page requests outstanding>"
        )

    @property
    def outstanding(self) -> list[PageRequest]:
        """The page requests that wait for an answer, in the order in which they were made."""
        return list(self._outstanding.values())

    # --- the cache ---

    def held(self) -> list[AtcEntry]:
        """The translations that the ATC holds, the one that was not used for longest first."""
        return [
            AtcEntry(
                start, found.address or 0, size, self.sid, ssid, found.read, found.write,
                found.execute, priv, found.ipa,
            )
            for (ssid, priv, size, start), found in self._cache.items()
        ]  # fmt: skip

    def _find(self, ssid: int | None, priv: bool, iova: int) -> AtsResponse | None:
        """The translation that the ATC has of an address; it is the latest used then."""
        for size in self._sizes:
            key = ssid, priv, size, iova & -size
            found = self._cache.get(key)
            if found is not None:
                self._cache.move_to_end(key)
                return found
        return None

    def _drop(self, key: _Key) -> None:
        del self._cache[key]
        self._sizes[key[2]] -= 1
        if not self._sizes[key[2]]:
            del self._sizes[key[2]]

    def _drop_overlaps(
        self, ssid: int | None, address: int, size: int, pasids: bool, priv: bool | None = None
    ) -> None:
        """Drop what translates one of the bytes, of a PASID or of all."""
        for key in list(self._cache):
            mine, privileged, span, start = key
            if not (mine is not None if pasids else mine == ssid):
                continue
            if priv is not None and priv != privileged:
                continue
            if start < address + size and address < start + span:
                self._drop(key)

    def _keep(self, ssid: int | None, priv: bool, iova: int, response: AtsResponse) -> None:
        """Let the ATC have a translation; older ones of the same bytes end."""
        if not self.entries:
            return
        start = iova & -response.size
        self._drop_overlaps(ssid, start, response.size, False, priv)
        while len(self._cache) >= self.entries:
            self._drop(next(iter(self._cache)))
        self._cache[ssid, priv, response.size, start] = response
        self._sizes[response.size] += 1

    def clear(self) -> None:
        """Empty the ATC, as a reset of the device does."""
        self._cache.clear()
        self._sizes.clear()

    # --- accesses ---

    def _ask(
        self, ssid: int | None, iova: int, write: bool, execute: bool, priv: bool
    ) -> AtsResponse:
        """Make one ATS request; what it grants is kept."""
        self.requests += 1
        before = self.invalidations
        response = self.smmu.ats_request(
            self.sid, iova, ssid=ssid, no_write=not write, execute=execute, priv=priv,
            stu=self.stu,
        )  # fmt: skip
        # an invalidation that came meanwhile may be of this page
        if response.address is not None and before == self.invalidations:
            self._keep(ssid, priv, iova, response)
        return response

    # S3.9.1-10
    def translate(
        self, iova: SupportsIndex, *, ssid: int | None = None, write: bool = False,
        execute: bool = False, priv: bool = False,
    ) -> AtsResponse:  # fmt: skip
        """Get the translation of a page: from the ATC, by an ATS request, or after a page request.

        Parameters
        ----------
        iova : int
            Untranslated address, 64 bits.
        ssid : int, optional
            PASID; without one, execute and priv have no meaning.
        write, execute, priv : bool
            The permission that is needed, for an access that is privileged or not.

        Returns
        -------
        AtsResponse
            ``permits(write, execute)`` says whether it grants that: page requests may be off, out
            of credits, unanswered or refused.

        Raises
        ------
        ValueError, TypeError, Exception
            As for `Smmu.ats_request`, and whatever on_page_request raises.
        """
        iova = iova.__index__()
        priv = priv and ssid is not None
        execute = execute and ssid is not None and not write
        found = self._find(ssid, priv, iova)
        if found is not None and found.permits(write, execute):
            self.hits += 1
            return found
        self.misses += 1
        response = self._ask(ssid, iova, write, execute, priv)
        if response.permits(write, execute) or response.status != "success":
            return response
        if not self.pri_enabled or len(self._outstanding) >= self.credits:
            return response
        asked = self.request_page(
            iova & -4096, ssid=ssid, read=not write, write=write, execute=execute, priv=priv
        )
        if asked.answer is None and self.on_page_request is not None:
            self.on_page_request(asked)
        if asked.answer == "success":
            return self._ask(ssid, iova, write, execute, priv)
        return response

    def access(
        self, iova: SupportsIndex, *, ssid: int | None = None, write: bool = False,
        execute: bool = False, priv: bool = False,
    ) -> Result:  # fmt: skip
        """Access an address: `translate` it, then send a Translated transaction.

        Returns
        -------
        Result
            Of the Translated transaction: its `iova` is the translated address.

        Raises
        ------
        AtsFault
            No translation permits the access.
        ValueError, TypeError, Exception
            As for `translate`.
        """
        iova = iova.__index__()
        response = self.translate(iova, ssid=ssid, write=write, execute=execute, priv=priv)
        if response.address is None or not response.permits(write, execute and ssid is not None):
            wanted = "write" if write else "execute" if execute else "read"
            raise AtsFault(
                f"sid {self.sid:#x} iova {iova:#x}: {wanted} not granted ({response.status})",
                response,
            )
        address = response.address | iova & (response.size - 1)
        return self.smmu.ats_translated(
            self.sid, address, ssid=ssid, write=write, priv=priv, instr=execute
        )

    # --- page requests ---

    # S3.9.1-11
    def request_page(
        self, address: SupportsIndex, *, ssid: int | None = None, read: bool = True,
        write: bool = False, execute: bool = False, priv: bool = False,
    ) -> PageRequest:  # fmt: skip
        """Ask software for a page, as a group of one request; the answer comes later.

        Raises
        ------
        BufferError
            As many requests are outstanding as there are credits.
        ValueError, TypeError, Exception
            As for `Smmu.page_request`.
        """
        address = address.__index__()
        if len(self._outstanding) >= self.credits:
            raise BufferError(f"page requests: {self.credits} outstanding, no credit is left")
        group = self._free[0]
        asked = PageRequest(
            self.sid, ssid, address, group, read=read, write=write, execute=execute, priv=priv
        )
        # entered before it is sent: whoever reads the queue may answer at once
        self._outstanding[group] = asked
        self._free.popleft()
        try:
            answer = self.smmu.page_request(
                self.sid, address, ssid=ssid, read=read, write=write, execute=execute,
                priv=priv, last=True, prg_index=group,
            )  # fmt: skip
        except BaseException:
            self._end(group, "dropped")
            raise
        self.page_requests += 1
        if answer.action != "queued":
            self._end(group, answer.action)
        return asked

    def stop(self, ssid: int) -> None:
        """Stop using a PASID: its translations are dropped, and a stop marker is sent.

        The marker tells software that no request of the PASID is behind it in the queue.
        """
        self._drop_overlaps(ssid, 0, 1 << 64, False)
        self.smmu.page_request(self.sid, 0, ssid=ssid, last=True)

    def _end(self, group: int, answer: str) -> None:
        """A group is answered; its index is free, to be used again as late as possible."""
        asked = self._outstanding.pop(group, None)
        if asked is None:
            return
        asked.answer = answer
        self._free.append(group)
        if answer == "failure":
            self.pri_enabled = False

    # --- what the SMMU tells it ---

    # S3.9.1-7, S4.5.1-10
    def atc_invalidate(self, ssid: int | None, address: int, size: int, global_: bool) -> bool:
        """Drop the translations of some bytes: of a PASID, of no PASID, or `global_` of all PASIDs.

        Called for CMD_ATC_INV.  Returns whether the device answers in time.
        """
        if not self.responsive:
            return False
        self.invalidations += 1
        self._drop_overlaps(ssid, address, size, global_)
        return True

    def pri_response(self, ssid: int | None, prg_index: int, code: int) -> None:
        """Take the answer to a page request group, as a code of CMD_PRI_RESP.

        Without a PASID it answers any request with that index; with one, only a request that has
        it.  Others are ignored.  After a failure the device makes no more page requests of its
        own, until `pri_enabled` is set again.
        """
        asked = self._outstanding.get(prg_index)
        if asked is not None and ssid in (None, asked.ssid):
            self._end(prg_index, RESPONSES[code])
