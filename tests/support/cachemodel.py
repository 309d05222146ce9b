"""Caches as lists: slow, obvious, and without anything of the library but its entries."""

from dataclasses import dataclass, field

NS_EL1, EL2, EL2_E2H = 0, 1, 2
MASK64 = (1 << 64) - 1
COUNTERS = ("hits", "misses", "fills", "evictions", "replacements", "invalidations")


class Generator:
    """The generator of the random policy: xorshift64, started by one step of splitmix64."""

    def __init__(self, seed):
        z = (seed + 0x9E3779B97F4A7C15) & MASK64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK64
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK64
        self.state = z ^ z >> 31 or 1

    def below(self, n):
        """The next number below n."""
        x = self.state
        x ^= x << 13 & MASK64
        x ^= x >> 7
        x ^= x << 17 & MASK64
        self.state = x
        return (x >> 32) * n >> 32


class Tree:
    """Tree pseudo-LRU of one set: each half remembers which of its halves is older."""

    def __init__(self, ways):
        self.half = ways // 2
        self.older = 0
        self.halves = [Tree(self.half), Tree(self.half)] if self.half else None

    def use(self, way):
        """Point away from a way."""
        if self.halves:
            which, rest = divmod(way, self.half)
            self.older = 1 - which
            self.halves[which].use(rest)

    def victim(self):
        """The way that is pointed at."""
        if not self.halves:
            return 0
        return self.older * self.half + self.halves[self.older].victim()


@dataclass
class Slot:
    """An entry: what identifies it, and what it holds."""

    tag: object
    value: object


@dataclass
class Sets:
    """A set-associative cache."""

    sets: int
    ways: int
    policy: str = "lru"
    seed: int = 0
    counters: dict = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))

    def __post_init__(self):
        self.rows = [[None] * self.ways for _ in range(self.sets)]
        self.queues = [[] for _ in range(self.sets)]  # of LRU and FIFO: the next victim is first
        self.trees = [Tree(self.ways) for _ in range(self.sets)]
        self.generator = Generator(self.seed)

    def live(self):
        """Every entry, by slot."""
        return [slot.value for row in self.rows for slot in row if slot]

    def find(self, index, tag):
        """The way that holds a tag."""
        ways = [way for way, slot in enumerate(self.rows[index]) if slot and slot.tag == tag]
        assert len(ways) < 2
        return ways[0] if ways else None

    def use(self, index, way, filled=False):
        """Tell the replacement of a hit or a fill."""
        if filled or self.policy == "lru":
            if way in self.queues[index]:
                self.queues[index].remove(way)
            self.queues[index].append(way)
        if self.policy == "plru":
            self.trees[index].use(way)

    def lookup(self, index, tag):
        """The value of a tag or None, counted."""
        way = self.find(index, tag)
        self.counters["misses" if way is None else "hits"] += 1
        if way is None:
            return None
        self.use(index, way)
        return self.rows[index][way].value

    def drop(self, index, way, counter):
        """Empty a way."""
        assert self.rows[index][way]
        self.rows[index][way] = None
        self.queues[index].remove(way)
        self.counters[counter] += 1

    def drop_where(self, condition, counter):
        """Drop the values that fulfil a condition; how many."""
        found = [
            (index, way)
            for index, row in enumerate(self.rows)
            for way, slot in enumerate(row)
            if slot and condition(slot.value)
        ]
        for index, way in found:
            self.drop(index, way, counter)
        return len(found)

    def fill(self, index, tag, value):
        """Put a value in, for the first empty way or for a victim; return what gave way."""
        old = self.find(index, tag)
        if old is not None:
            self.drop(index, old, "replacements")
        row = self.rows[index]
        gone = None
        if None in row:
            way = row.index(None)
        else:
            way = {
                "lru": lambda: self.queues[index][0],
                "fifo": lambda: self.queues[index][0],
                "plru": self.trees[index].victim,
                "random": lambda: self.generator.below(self.ways),
            }[self.policy]()
            gone = row[way].value
            self.drop(index, way, "evictions")
        row[way] = Slot(tag, value)
        self.use(index, way, filled=True)
        self.counters["fills"] += 1
        return gone


# --- tags (IHI 0070, 3.17) ---


def has_vmid(entry):
    """Whether entries of this kind and world are of one VMID."""
    return entry.world == NS_EL1


def has_asid(entry):
    """Whether entries of this kind and world are of one ASID, unless they are global."""
    return entry.kind != "stage 2" and entry.world != EL2


def last(entry):
    """The last input address of an entry."""
    return entry.start + (1 << entry.lg2) - 1


def aset(entry):
    """The ASID set of an entry; tables are cached without."""
    return getattr(entry, "aset", 0)


def answers(entry, kind, world, vmid, asid, set_, address, is_global):
    """Whether an entry answers a request; is_global: of the entry, if that counts."""
    return (
        entry.kind == kind
        and entry.world == world
        and (not has_vmid(entry) or entry.vmid == vmid)
        and (not has_asid(entry) or is_global or entry.asid == asid)
        and (not has_asid(entry) or aset(entry) == set_)
        and entry.start <= address <= last(entry)
    )


def rivals(a, b):
    """Whether there is a request that both of two translations answer."""
    return (
        a.kind == b.kind
        and a.world == b.world
        and (not has_vmid(a) or a.vmid == b.vmid)
        and (not has_asid(a) or a.is_global or b.is_global or a.asid == b.asid)
        and (not has_asid(a) or aset(a) == aset(b))
        and a.start <= last(b)
        and b.start <= last(a)
    )


# --- commands (IHI 0070, 4.4) ---

BY_ADDRESS = {"TLBI_NH_VA", "TLBI_NH_VAA", "TLBI_EL2_VA", "TLBI_EL2_VAA", "TLBI_S2_IPA"}
COMMANDS = (
    *("TLBI_NH_ALL", "TLBI_NH_ASID", "TLBI_NH_VA", "TLBI_NH_VAA", "TLBI_EL2_ALL"),
    *("TLBI_EL2_ASID", "TLBI_EL2_VA", "TLBI_EL2_VAA", "TLBI_S12_VMALL", "TLBI_S2_IPA"),
    "TLBI_NSNH_ALL",
)


@dataclass(frozen=True)
class Tlbi:
    """A command with its arguments, as Caches.tlbi takes them."""

    op: str
    vmid: int = 0
    asid: int = 0
    address: int | None = None
    last: int | None = None
    leaf: bool = False
    granule: int = 0
    level: int = 0
    vmid_mask: int = 0xFFFF

    def tagged(self, entry, is_global):
        """Whether the command is about the tags of an entry."""
        stage1 = entry.kind != "stage 2"
        vmid = (entry.vmid ^ self.vmid) & self.vmid_mask == 0
        ns, el2, e2h = (entry.world == world for world in (NS_EL1, EL2, EL2_E2H))
        mine = not is_global and entry.asid == self.asid
        return {
            "TLBI_NH_ALL": ns and stage1 and vmid,
            "TLBI_NH_ASID": ns and stage1 and vmid and mine,
            "TLBI_NH_VA": ns and stage1 and vmid and (mine or is_global),
            "TLBI_NH_VAA": ns and stage1 and vmid,
            "TLBI_EL2_ALL": el2 or e2h,
            "TLBI_EL2_ASID": e2h and mine,
            "TLBI_EL2_VA": el2 or (e2h and (mine or is_global)),
            "TLBI_EL2_VAA": el2 or e2h,
            "TLBI_S12_VMALL": ns and vmid,
            "TLBI_S2_IPA": ns and entry.kind == "stage 2" and vmid,
            "TLBI_NSNH_ALL": ns,
        }[self.op]

    def reaches(self, first, end):
        """Whether the command is about one of some addresses."""
        if self.op not in BY_ADDRESS or self.address is None:
            return True
        return first <= (self.address if self.last is None else self.last) and self.address <= end

    def hits(self, entry):
        """Whether a translation must go."""
        by_address = self.op in BY_ADDRESS
        second = entry.kind == "stage 2"
        granule = entry.granule_s2 if second else entry.granule_s1
        level = entry.level_s2 if second else entry.level_s1
        if by_address and self.granule and self.granule != granule:
            return False
        if by_address and self.level and self.level != level:
            return False
        # software knows the whole page of its own stage, of which an entry may be a part
        lg2 = max(entry.lg2, entry.lg2_s2 if second else entry.lg2_s1)
        first = entry.start >> lg2 << lg2
        return self.tagged(entry, entry.is_global) and self.reaches(first, first + (1 << lg2) - 1)

    def hits_table(self, table):
        """Whether a table in a walk cache must go."""
        if self.op in BY_ADDRESS and (self.leaf or self.granule not in (0, table.granule)):
            return False
        return self.tagged(table, False) and self.reaches(table.start, last(table))


class Model:
    """All caches of an SMMU; each is a Sets, or None."""

    def __init__(self, ste=None, cd=None, tlb=None, walk1=None, walk2=None):
        self.ste, self.cd, self.tlb, self.walk1, self.walk2 = (
            None if geometry is None else Sets(*geometry)
            for geometry in (ste, cd, tlb, walk1, walk2)
        )

    def named(self):
        """The caches that there are, by name."""
        names = ("ste", "cd", "tlb", "walk1", "walk2")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    # TLB

    def lookup(self, address, kind, world, vmid, asid, set_):
        """The translation that answers, or None."""
        request = (kind, world, vmid, asid, set_, address)
        found = [e for e in self.tlb.live() if answers(e, *request, e.is_global)]
        assert len(found) < 2, found
        if not found:
            self.tlb.counters["misses"] += 1
            return None
        (entry,) = found
        return self.tlb.lookup((entry.start >> entry.lg2) % self.tlb.sets, entry)

    def fill(self, entry):
        """Put a translation in."""
        self.tlb.drop_where(lambda other: rivals(other, entry), "replacements")
        self.tlb.fill((entry.start >> entry.lg2) % self.tlb.sets, entry, entry)

    # walk caches

    def walk(self, kind):
        """The walk cache of a kind."""
        return self.walk2 if kind == "stage 2" else self.walk1

    def lookup_walk(self, address, kind, world, vmid, asid):
        """The table that translates least."""
        cache = self.walk(kind)
        request = (kind, world, vmid, asid, 0, address)
        found = [e for e in cache.live() if answers(e, *request, False)]
        if not found:
            cache.counters["misses"] += 1
            return None
        table = min(found, key=lambda e: e.lg2)
        return cache.lookup((table.start >> table.lg2) % cache.sets, self.table_tag(table))

    @staticmethod
    def table_tag(table):
        """What makes two tables the same."""
        return (
            *(table.start, table.lg2, table.kind, table.world),
            *(has_vmid(table) and table.vmid, has_asid(table) and table.asid),
        )

    def fill_walk(self, table):
        """Put a table in."""
        cache = self.walk(table.kind)
        cache.fill((table.start >> table.lg2) % cache.sets, self.table_tag(table), table)

    # commands

    def tlbi(self, command):
        """How many entries a command drops."""
        dropped = self.tlb.drop_where(command.hits, "invalidations") if self.tlb else 0
        for cache in (self.walk1, self.walk2):
            if cache:
                dropped += cache.drop_where(command.hits_table, "invalidations")
        return dropped

    def cfgi(self, sids, ssid=None, stes=True):
        """Drop the CDs of some StreamIDs, all or one, and their STEs."""
        dropped = self.cd.drop_where(
            lambda cd: cd.sid in sids and ssid in (None, cd.ssid), "invalidations"
        )
        if stes:
            dropped += self.ste.drop_where(lambda ste: ste.sid in sids, "invalidations")
        return dropped
