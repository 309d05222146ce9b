"""The slow obvious twin of _driver/ring.pyx: a queue of commands, a writer of entries, ranges."""

import struct

from smmufast import layout
from smmufast.errors import CommandError, InputOutput, Refused
from smmufast.iommu.smmu.invalidations import ATS, ATS_FULL, S2_VMID, S2_VMID_S1_CLEAR
from smmufast.iommu.smmu.writer import Update

SYNC = layout.pack("SYNC")
ENTRY = (1 << 512) - 1
DWORDS = struct.Struct("<8Q")


class Queue:
    """A CommandQueue that puts one command at a time."""

    def __init__(self, smmu, base, size_lg2):
        self.smmu, self.memory, self.base = smmu, smmu.memory, base
        self.size = 1 << size_lg2
        self.prod = self.issued = self.syncs = self.began = 0
        self.waiting = 0  # put, and not known to be consumed
        self.log = None
        self.refused = []

    def start(self):
        """Tell the Smmu where the queue is."""
        value = self.base | layout.mask("CMDQ_BASE", "RA") | self.size.bit_length() - 1
        self.smmu.write("CMDQ_BASE", value, 8)

    def note(self, word):
        """Tell the log."""
        if self.log is not None and word & 0xFF == 0xEE:
            self.log.append(("0xee", {}))
        elif self.log is not None:
            record = layout.command_record(word & 0xFF)
            self.log.append((record.name, layout.unpack(record, word)))

    def put(self, word):
        """Put one command; a full queue is consumed first."""
        if self.waiting == self.size:
            self.ring()
        if self.waiting == self.size:
            self.close()
        where = self.base + 16 * (self.prod % self.size)
        self.memory.write(where, word.to_bytes(16, "little"))
        self.prod = (self.prod + 1) % (2 * self.size)
        self.issued += 1
        self.waiting += 1

    def run(self, words):
        """Put commands and CMD_SYNC, and wait."""
        for word in (*words, SYNC):
            self.put(word)
        for word in (*words, SYNC):
            self.note(word)
        self.syncs += 1
        self.finish()

    def submit(self, words):
        """Put commands, and wait."""
        for word in words:
            self.put(word)
            self.note(word)
        self.finish()

    def finish(self):
        """The end of a batch."""
        try:
            self.ring()
        except BaseException:
            self.refused = []
            raise
        finally:
            self.began = self.issued
        self.close()

    def close(self):
        """Raise what was refused."""
        refused, self.refused = self.refused, []
        if refused:
            raise CommandError.of(refused)

    def ring(self):
        """Write PROD; each command that is refused becomes a CMD_SYNC."""
        last = None
        while True:
            self.smmu.write("CMDQ_PROD", self.prod)
            cons = self.smmu.read("CMDQ_CONS")
            self.waiting = (self.prod - cons) % (2 * self.size)
            if not self.waiting or cons == last:
                return
            if not (self.smmu.gerror ^ self.smmu.gerrorn) & 1:
                raise InputOutput("queue", self, text="not consumed")
            last = cons
            where = self.base + 16 * (cons % self.size)
            word = int.from_bytes(self.memory.read(where, 16), "little")
            index = self.issued - self.waiting - self.began
            error = cons >> 24 & 0x7F
            why = self.smmu.check_command(word.to_bytes(16, "little")) if error == 1 else None
            self.refused.append(Refused(index if index >= 0 else None, word, error, why))
            if error != 2:
                self.memory.write(where, SYNC.to_bytes(16, "little"))
            self.smmu.write("GERRORN", self.smmu.gerrorn ^ 1)


# --- entries ---


def fields(record, names):
    """The bits of some fields."""
    return layout.mask(record, *names.split())


S1 = "S1Fmt S1ContextPtr S1CDMax S1DSS S1CIR S1COR S1CSH S1STALLD STRW EATS MEV S2VMID"
S2 = (
    "S2FWB EATS SHCFG MEV S2VMID S2T0SZ S2SL0 S2IR0 S2OR0 S2SH0 S2TG S2PS S2AA64 S2ENDI S2PTW "
    "S2S S2R S2TTB"
)


def ste_used(ste):
    """The bits of an STE that the SMMU reads."""
    read = layout.unpack("STE", ste)
    names = ["V"]
    if read["V"]:
        names += ["Config"]
        if read["Config"] in (5, 7):
            names += S1.split()
            names += ["SHCFG"] * (read["S1DSS"] == 1)
        if read["Config"] in (6, 7):
            names += S2.split()
        if read["Config"] == 4:
            names += ["SHCFG"]
    return layout.mask("STE", *names)


def cd_used(cd):
    """The bits of a CD that the SMMU reads."""
    if not cd >> 31 & 1:
        return 1 << 31
    return ENTRY & ~(fields("CD", "T0SZ TG0 IR0 OR0 SH0 TTB0") if cd >> 14 & 1 else 0)


def ste_safe(old, new):
    """The bits of an STE that may change at any time."""
    eats = fields("STE", "EATS")
    low = eats & -eats
    split = eats ^ low | fields("STE", "S2S")
    return fields("STE", "MEV") | (0 if (old | new) & split else low)


class Writer:
    """An EntryWriter; entries are numbers of 512 bits."""

    def __init__(self, queue, *, safe_bits=True):
        self.queue, self.memory, self.safe_bits = queue, queue.memory, safe_bits
        self.observer = None

    def write_ste(self, address, words, sid):
        """As EntryWriter.write_ste."""
        commands = [layout.pack("CFGI_STE", StreamID=sid, Leaf=1)]
        safe = ste_safe if self.safe_bits else lambda old, new: 0
        update = self.write(address, words, ste_used, safe, commands)
        self.queue.submit([layout.pack("PREFETCH_CONFIG", StreamID=sid)])
        return update

    def write_cd(self, address, words, sids, ssid):
        """As EntryWriter.write_cd."""
        commands = [layout.pack("CFGI_CD", StreamID=sid, SubstreamID=ssid, Leaf=1) for sid in sids]
        return self.write(address, words, cd_used, lambda old, new: 0, commands)

    def write(self, address, words, used, safe, commands):
        """In steps: what is not used, what is, and the rest."""
        now = int.from_bytes(self.memory.read(address, 64), "little")
        target = int.from_bytes(DWORDS.pack(*words), "little")
        now_used = used(now) & ~(safe(now, target) & used(target))
        ahead = now & now_used | target & ~now_used
        critical = [i for i in range(8) if (ahead ^ target) & used(target) & dword(i)]
        others = [i for i in range(8) if i not in critical]
        if not critical:
            steps = [(range(8), target)]
        elif len(critical) == 1:
            steps = [(others, ahead), (critical, target), (range(8), target)]
        else:
            steps = [([0], 0), (range(1, 8), target), ([0], target)]
        syncs, hitless = 0, True
        for indices, wanted in steps:
            changing = [i for i in indices if (now ^ wanted) & dword(i)]
            for i in changing:
                old = DWORDS.unpack(now.to_bytes(64, "little"))
                now = now & ~dword(i) | wanted & dword(i)
                self.memory.write_u64(address + 8 * i, now >> 64 * i & (1 << 64) - 1)
                if self.observer is not None:
                    self.observer(address, i, old)
            if changing:
                self.queue.run(commands)
                syncs += 1
                hitless = hitless and now & dword(0) != 0
        return Update(syncs, hitless)


def dword(i):
    """The bits of a dword in an entry."""
    return (1 << 64) - 1 << 64 * i


# --- ranges ---


def tlb_ranges(first, last, granule_lg2, page_lg2, leaf, ranges):
    """The address fields of the TLBI commands that cover a range; None: the whole tag."""
    size = last - first + 1
    step = 1 << (page_lg2 if leaf else granule_lg2)
    if size >= 1 << 52 or (not ranges and size >= step << granule_lg2 - 3):
        return None
    if not ranges:
        addresses = range(first & -step, last + 1, step)
        return [{"Address": address, "Leaf": int(leaf)} for address in addresses]
    granule = 1 << granule_lg2
    address = first & -granule
    pages = (last - address) // granule + 1
    if not leaf and pages % 32 == 1:
        pages += 1
    found = []
    while pages:
        scale = 0
        while scale < 31 and pages >> scale & 1 == 0:
            scale += 1
        number = pages >> scale & 31 if scale < 31 else min(pages >> scale, 32)
        found.append(
            {
                "Address": address, "Leaf": int(leaf), "Scale": scale, "Num": number - 1,
                "TG": {12: 1, 14: 2, 16: 3}[granule_lg2],
                "TTL": 4 - (page_lg2 - 3) // (granule_lg2 - 3) if leaf else 0,
            }
        )  # fmt: skip
        address += (number << scale) * granule
        pages -= number << scale
    return found


def atc_span(first, last):
    """The smallest aligned power of two of pages of 4 KiB that covers a range."""
    size = 0
    while first >> 12 + size != last >> 12 + size and size < 52:
        size += 1
    return first >> 12 + size << 12 + size if size < 52 else 0, size


def invalidation(key, span, ranges, e2h):
    """The commands of one entry: (name, fields)."""
    kind, number, ssid = key
    first, last, *_ = span
    if kind == ATS_FULL:
        return [("ATC_INV", {"StreamID": number, "Size": 52})]
    if kind == ATS:
        address, size = atc_span(first, last)
        substream = {"SSV": 1, "SubstreamID": ssid} if ssid else {}
        return [("ATC_INV", {"StreamID": number, "Address": address, "Size": size} | substream)]
    told = tlb_ranges(*span, ranges)
    if kind == S2_VMID_S1_CLEAR:
        return [("TLBI_NH_ALL", {"VMID": number})] if told else []
    tag, address, some, whole = "ASID", "Address", "TLBI_NH_VA", "TLBI_NH_ASID"
    if kind == S2_VMID:
        tag, address, some, whole = "VMID", "IPA", "TLBI_S2_IPA", "TLBI_S12_VMALL"
    elif e2h:
        some, whole = "TLBI_EL2_VA", "TLBI_EL2_ASID"
    if told is None:
        return [(whole, {tag: number})]
    return [
        (some, {tag: number} | {address if n == "Address" else n: v for n, v in one.items()})
        for one in told
    ]


def batches(entries, span, ranges, e2h):
    """The commands of an array of one queue, with their CMD_SYNCs."""
    made = []
    for kinds in ((0, 1), (2,), (3, 4)):
        some = [
            layout.pack(name, **values)
            for key in sorted(entries)
            if key[0] in kinds
            for name, values in invalidation(key, span, ranges, e2h)
        ]
        made += [*some, SYNC] if some else []
    return made
