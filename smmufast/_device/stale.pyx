# cython: binding=False, embedsignature=True, embedsignature.format=clinic
# cython: language_level=3
"""What caches and ATCs hold and the tables in memory no longer give: what Smmu.stale() finds.

Not architectural: a look-up again, in caches of its own.  Section: IHI 0070 3.17 (what an entry
is tagged with), 3.9.1 (ATS).

A translation or a table is asked for first as the (StreamID, SubstreamID) that filled it would.
If that gives something else, whoever else has the same tags (VMID, ASID, StreamWorld) is asked: at
first the substreams of that stream, then every stream.  An entry that one of them gives is right.
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from smmufast._engine.ats cimport AtsAnswer, AtsAsk, ats_answer
from smmufast._engine.cached cimport lookup_cached, translate_known_cached, view_open
from smmufast._rules.config cimport STAGE1_BYPASS
from smmufast._engine.contexts cimport (
    TAG_TABLE, ContextWalk, Tags, context_tags, contexts_next, contexts_open,
)
from smmufast._engine.core cimport Core
from smmufast._engine.memory cimport Port, Ram, look_for_signals, port_open, raise_port
from smmufast._device.smmu cimport Smmu
from smmufast._engine.tlb cimport Caches, tlb_key
from smmufast._rules.scope cimport KEY_GLOBAL, global_key
from smmufast._engine.chain cimport CLASS_IN, Leaf, Syndrome, View
from smmufast._engine.stage2 cimport stage2
from smmufast._engine.lookup cimport Memo
from smmufast._engine.translate cimport open_paths
from smmufast._facts.types cimport NO_SSID, Outcome, Request
from smmufast._facts.why cimport WHY_S2_INVALID

from operator import itemgetter

from smmufast import layout
from smmufast._engine.tlb import KINDS as _KINDS
from smmufast._engine.tlb import StaleEntry
from smmufast.faults import Perm
from smmufast.why import Why

open_paths()

cdef object tag_in = itemgetter(2)

cdef enum:
    CONTEXTS = 1024         # that differ and have the same tags: more are not asked
    ASK = 64                # look-ups that it counts to ask one context for one entry
    HINTS = 4096


# --- words ---

cdef object shown(value):
    """A field's value, in hexadecimal where it is a number."""
    if isinstance(value, str) or value is None:
        return str(value)
    if isinstance(value, bytes):
        return f"0x{int.from_bytes(value, 'little'):x}"
    if isinstance(value, Perm):
        return f"{int(value):#x} ({value.name or 'none'})"
    return f"{int(value):#x}"


cdef list fields_of(str name, entry):
    """The fields of an entry and their values; of an STE and a CD those of the record."""
    if name in ("ste", "cd"):
        return list(layout.unpack(name.upper(), entry.data).items())
    return list(zip(entry._fields, entry, strict=True))


cdef str differences(str name, entry, now):
    """Field by field, what the tables give now and what is cached."""
    pairs = zip(fields_of(name, entry), fields_of(name, now), strict=True)
    found = []
    for (field, a), (_, b) in pairs:
        if a != b:
            found.append(f"{field}: {shown(b)} now, {shown(a)} cached")
    return ", ".join(found)


cdef str pair_text(uint32_t sid, uint32_t ssid):
    return f"sid {sid:#x}" + ("" if ssid == NO_SSID else f", ssid {ssid:#x}")


cdef str reason_text(int why):
    """What a look-up gives instead of the entry."""
    if not why:
        return "another entry"
    reason = Why(why)
    name = "an abort" if reason.event is None else reason.event.name
    return f"{name} ({reason.sentence()})"


# --- one entry ---

cdef uint64_t tag_of(Caches caches, str name, entry) except? 0:
    """What an entry is tagged with, as context_tags() says it."""
    cdef unsigned int kind = _KINDS.index(entry.kind)
    cdef unsigned int world = entry.world
    cdef uint16_t vmid = entry.vmid
    cdef uint16_t asid = entry.asid
    cdef uint64_t key
    if name != "tlb":
        return TAG_TABLE | tlb_key(caches.c, kind, world, vmid, asid, 0)
    key = tlb_key(caches.c, kind, world, vmid, asid, entry.aset)
    if entry.is_global and caches.c.key_mask[kind][world] & KEY_GLOBAL:
        key = global_key(key)
    return key


cdef bint has_tag(const Tags* tags, uint64_t tag) noexcept:
    return tag in (tags.own, tags.any_asid, tags.table, tags.second, tags.second_table)


cdef bint answers(str name, entry, other):
    """Whether an entry found again is for what the cached one is for."""
    if name in ("ste", "cd"):
        return True
    return other.start <= entry.start < other.start + (1 << other.lg2) and other.kind == entry.kind


@cython.final
@cython.auto_pickle(False)
cdef class _Look:
    """One look at what an Smmu has cached: dry, without its caches and without injected errors."""

    cdef Smmu smmu
    cdef Caches caches
    cdef Ram ram
    cdef uint64_t left     # look-ups that may still be made
    cdef set cut           # tags that more contexts have than are asked

    def __cinit__(self, Smmu smmu, lookups):
        self.smmu = smmu
        self.left = lookups
        self.cut = set()
        self.caches = smmu._caches

    cdef void _open(self, Port* port) noexcept:
        """A port that changes nothing and meets no injected error."""
        self.ram = self.smmu.core.ram[0]
        self.ram.n_injections = 0
        port_open(port, &self.ram, NULL)
        port.dry = True

    cdef int _fill(self, Caches fresh, str name, entry, uint32_t sid, uint32_t ssid,
                   Tags* tags) except -1:
        """Fill caches with what a transaction finds where an entry was: 0, or the fault."""
        cdef Core core = self.smmu.core  # but for the caches
        cdef Memo memo
        cdef Syndrome syndrome
        cdef View view
        cdef Port port
        cdef Leaf leaf
        cdef Request request
        cdef Outcome outcome
        cdef uint64_t address = 0
        cdef unsigned int access, allowed
        cdef int why
        core.caches = fresh.c
        memset(tags, 0, sizeof(Tags))
        memset(&request, 0, sizeof(request))
        request.sid = sid
        request.ssid = ssid
        self._open(&port)
        view_open(&view, &core, &request)
        memo.whole = False
        why = lookup_cached(&core.hw, &port, &view, &memo, &syndrome)
        if name == "cd" and entry.ssid == 0 and (
                why > 0 or why == 0 and memo.index == STAGE1_BYPASS):
            view.ssid = 0  # a CD 0 may be that of no substream, or of SubstreamID 0
            why = lookup_cached(&core.hw, &port, &view, &memo, &syndrome)
        # stage 2 is the STE's alone, whatever becomes of the CD
        if why == 0 or why > 0 and memo.context.second.on:
            context_tags(self.caches.c, &memo.context,
                         why == 0 and memo.index != STAGE1_BYPASS, tags)
        if name not in ("ste", "cd") and (
                why == 0 or why > 0 and entry.kind == "stage 2" and memo.context.second.on):
            request.iova = entry.start
            allowed = 0x3F if name != "tlb" else int(entry.perm1 & entry.perm2)
            if entry.kind == "stage 2":
                view.stage2_only = True
                why = WHY_S2_INVALID
                if memo.context.second.on:
                    why = stage2(&view, &memo.context, &port, request.iova, allowed & -allowed,
                                 False, CLASS_IN, &leaf, &address, &syndrome)
            else:
                for access in (2, 3, 6, 0, 1, 4):  # privileged first: E0PD lets them walk
                    if memo.context.need[access] & allowed:
                        request.access = access
                        break
                why = translate_known_cached(&core.hw, &port, &view, &request, &memo, &outcome)
                if why == 0:
                    why = outcome.why
        if why < 0:
            raise_port(&port)
        return why

    cdef tuple again(self, str name, entry, uint32_t sid, uint32_t ssid, uint64_t tag):
        """(whether a pair gives the entry, whether it has its tag, what it gives, its fault)."""
        cdef Caches fresh = Caches(
            ste=(1, 1), cd=(1, 1), tlb=(1, 4), walk1=(1, 8), walk2=(1, 64),
            nested=self.caches.nested)
        cdef Tags tags
        cdef int why
        now = None
        look_for_signals()
        why = self._fill(fresh, name, entry, sid, ssid, &tags)
        if name not in ("ste", "cd") and not has_tag(&tags, tag):
            return False, False, None, why
        for other in getattr(fresh, name):
            other = other._replace(sid=entry.sid)
            if name != "ste":
                other = other._replace(ssid=entry.ssid)
            if name == "tlb":
                # marked dirty on behalf of another entry: no invalidation is due
                other = other._replace(
                    clean1=entry.clean1 or other.clean1, clean2=entry.clean2 or other.clean2)
                if other.is_global and entry.is_global:
                    other = other._replace(asid=entry.asid)  # no tag
            if other == entry:
                return True, True, other, why
            if answers(name, entry, other) and (now is None or other.lg2 == entry.lg2):
                now = other
        return False, True, now, why

    cdef bint spend(self) noexcept:
        """Whether one more context may be asked, or kept to be asked."""
        if self.left < ASK:
            self.left = 0
            return False
        self.left -= ASK
        return True

    cdef dict sharing(self, set tags, uint64_t first, uint64_t end):
        """The pairs of some StreamIDs that have tags, by tag; one of those that are alike."""
        cdef ContextWalk walk
        cdef Port port
        cdef Tags found
        cdef uint8_t[HINTS] hints
        cdef uint64_t tag
        cdef uint64_t[5] each
        cdef int i, status
        cdef dict pairs = {}
        cdef set seen = set()
        memset(hints, 0, sizeof(hints))
        for one in tags:
            pairs[one] = []
            tag = one
            hints[tag * <uint64_t>0x9E3779B97F4A7C15ULL >> 52] = 1
        self._open(&port)
        contexts_open(&walk, first, end, self.left)
        while True:
            with nogil:
                status = contexts_next(&self.smmu.core.hw, &port, &walk)
            self.left = walk.left
            if status < 0:
                raise_port(&port)
            look_for_signals()
            if status == 0:
                if self.left == 0:
                    self.cut |= tags
                return pairs
            context_tags(self.caches.c, &walk.memo.context, walk.stage1, &found)
            each = [found.own, found.any_asid, found.table, found.second, found.second_table]
            for i in range(5):
                tag = each[i]
                if not tag or not hints[tag * <uint64_t>0x9E3779B97F4A7C15ULL >> 52]:
                    continue
                if tag not in pairs or tag in self.cut:
                    continue
                # what translations depend on, as it lies in memory
                alike = tag, PyBytes_FromStringAndSize(<char*>&walk.memo.ste[1], 24), (
                    PyBytes_FromStringAndSize(<char*>walk.memo.cd, 64) if i < 3 else None)
                if alike in seen:
                    continue
                if len(pairs[tag]) >= CONTEXTS or not self.spend():
                    self.cut.add(tag)
                    continue
                seen.add(alike)
                pairs[tag].append((walk.sid, walk.ssid))
            walk.left = self.left

    cdef list keep(self, list waiting, dict pairs):
        """Those of the entries that wait which none of the pairs gives."""
        cdef list left = []
        for one in waiting:
            name, entry, tag, shared, now, why = one
            for sid, ssid in pairs.get(tag, ()):
                if (sid, ssid) == (entry.sid, entry.ssid):
                    continue
                if not self.spend():
                    self.cut.add(tag)
                    left.append((name, entry, tag, shared, now, why))
                    break
                same, has, other, fault = self.again(name, entry, sid, ssid, tag)
                if same:
                    break
                if has and not shared:  # the pair that filled it is another's now
                    shared, now, why = (sid, ssid), other, fault
            else:
                left.append((name, entry, tag, shared, now, why))
        return left

    cdef list caches_stale(self):
        """The entries of the caches that nobody gives."""
        cdef list entries = [], waiting = [], found = []
        cdef uint64_t tag = 0
        cdef dict streams = {}, order = {}
        for cache in (self.caches.ste, self.caches.cd, self.caches.tlb, self.caches.walk1,
                      self.caches.walk2):
            if cache is not None:
                for entry in cache:
                    order[id(entry)] = len(entries)
                    entries.append((cache.name, entry))
        for name, entry in entries:
            own = name not in ("ste", "cd")
            ssid = entry.ssid if own or name == "cd" and entry.ssid else <uint32_t>NO_SSID
            tag = tag_of(self.caches, name, entry) if own else 0
            same, has, now, why = self.again(name, entry, entry.sid, ssid, tag)
            if same:
                continue
            shared = (entry.sid, ssid) if has else None
            if own:
                waiting.append((name, entry, tag, shared, now, why))
            else:
                found.append((name, entry, tag, shared, now, why))
        for one in waiting:
            streams.setdefault(one[1].sid, []).append(one)
        waiting = []
        for sid, mine in streams.items():
            waiting += self.keep(mine, self.sharing(set(map(tag_in, mine)), sid, sid + 1))
        if waiting:
            pairs = self.sharing(set(map(tag_in, waiting)), 0,
                                 <uint64_t>1 << self.smmu.core.hw.log2size)
            waiting = self.keep(waiting, pairs)
        found = sorted(found + waiting, key=lambda one: order[id(one[1])])
        entries = []
        for name, entry, tag, shared, now, why in found:
            text = self.told(name, entry, shared, now, why)
            sure = name in ("ste", "cd") or tag not in self.cut
            if not sure:
                text += "; of those with its tags some were not asked"
            entries.append(StaleEntry(name, entry, now, text, sure))
        return entries

    cdef str told(self, str name, entry, shared, now, int why):
        if now is not None:
            return differences(name, entry, now)
        if shared is not None:
            return f"{pair_text(shared[0], shared[1])} gives {reason_text(why)} now"
        tags = f"vmid {entry.vmid:#x}"
        if entry.kind != "stage 2" and not getattr(entry, "is_global", False):
            tags += f", asid {entry.asid:#x}"
        return f"nobody has its tags now ({tags}, {entry.world.name})"

    # --- ATCs ---

    cdef object ask(self, device, held):
        """The answer to the request that an entry of an ATC is from."""
        cdef Request request
        cdef AtsAsk ask
        cdef AtsAnswer answer
        cdef Port port
        cdef int status
        memset(&request, 0, sizeof(request))
        request.sid = held.sid
        request.ssid = NO_SSID if held.ssid is None else held.ssid
        request.iova = held.start
        self.smmu._ats_open(&request, &ask, not held.write, held.execute, held.priv,
                            getattr(device, "stu", 4096))
        look_for_signals()
        self._open(&port)
        status = ats_answer(&self.smmu.core.hw, &port, NULL, &request, &ask, &answer)
        if status:
            raise_port(&port)
        return self.smmu._ats_response(&request, &ask, &answer)

    cdef list atc_stale(self, device):
        """The entries of one ATC that a request would not get."""
        cdef list found = []
        for held in device.held():
            response = self.ask(device, held)
            now = None
            if response.address is not None:
                now = held._replace(
                    start=held.start & -response.size, size=response.size,
                    address=response.address, read=response.read, write=response.write,
                    execute=response.execute, ipa=response.ipa)
            if now is not None and contains(now, held):
                continue
            if now is not None:
                text = differences("atc", held, now)
            elif response.status != "success" or response.fault is not None:
                fault = response.event or response.fault
                text = f"a request gets {response.status} now" + (
                    "" if fault is None else f" ({fault.name})")
            else:
                text = "a request is granted nothing now"
            found.append(StaleEntry("atc", held, now, text))
        return found


cdef bint contains(now, held):
    """A new answer gives all that an ATC holds: the same bytes, and no permission less."""
    within = held.start - now.start
    return (now.size >= held.size and now.address + within == held.address
            and now.ipa == held.ipa and now.read >= held.read and now.write >= held.write
            and now.execute >= held.execute)


def look(Smmu smmu not None, *, lookups=1 << 22):
    """Look for what is stale in the caches of an Smmu, and in the ATCs of its devices.

    `lookups` STEs and CDs at most are read to find contexts that share tags; to note one, and to
    ask it for one entry, counts as ASK of them.
    """
    cdef _Look one = _Look(smmu, lookups)
    cdef list found = []
    smmu.core.ram.users += 1
    try:
        if one.caches is not None:
            found = one.caches_stale()
        for device in list(smmu.devices.values()):
            if hasattr(device, "held"):
                found += one.atc_stale(device)
    finally:
        smmu.core.ram.users -= 1
    return found
