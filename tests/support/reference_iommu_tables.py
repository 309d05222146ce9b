"""The slow twin of PageTable: a page table of nested dictionaries, page by page.

It imports nothing from the library.  What it refuses, it refuses with the errno of the kernel.
Descriptors come from ptwriter's encoder, which shares no bit position with the library's.

Follows DDI 0487 D8.2 and D8.3, and what docs/domains.md says of map and unmap.
"""

import errno

from ptwriter import leaf_descriptor, stage2_leaf_descriptor, table_descriptor

READ, WRITE, CACHE, NOEXEC, MMIO, PRIV = 1, 2, 4, 8, 16, 32

BLOCKS = {12: {1, 2, 3}, 14: {2, 3}, 16: {2, 3}}
# How many leaves of a level a contiguous hint joins.
RUNS = {
    (12, 1): 16, (12, 2): 16, (12, 3): 16,
    (14, 2): 32, (14, 3): 128,
    (16, 2): 32, (16, 3): 32,
}  # fmt: skip

# Stage 2: the largest T0SZ of a start level with one table, the smallest with 16 side by side, and
# the smallest output size that the level needs.  Level 0 of 16 KiB needs the 52-bit format.
STAGE2 = {
    (12, 0): (24, 16, 44), (12, 1): (33, 21, 0), (12, 2): (42, 30, 0),
    (14, 1): (27, 16, 42), (14, 2): (38, 24, 0), (14, 3): (48, 35, 0),
    (16, 1): (21, 12, 44), (16, 2): (34, 18, 0), (16, 3): (47, 31, 0),
}  # fmt: skip


class RefusedError(Exception):
    """What the kernel returns an errno for."""

    def __init__(self, number):
        super().__init__(errno.errorcode[number])
        self.errno = number


class Leaf:
    """One block or page."""

    def __init__(self, iova, size, pa, prot):
        self.iova = iova
        self.size = size
        self.pa = pa
        self.prot = prot
        self.contiguous = False
        self.clean = False


class Node:
    """One table, or those that stand side by side: entries by index."""

    def __init__(self, level, iova):
        self.level = level
        self.iova = iova
        self.entries = {}
        self.noted = False


class Twin:
    """A page table."""

    KEPT = 64

    def __init__(
        self, *, stage=1, granule=4096, ias=48, oas=48, contiguous=False, dirty=False, fwb=False,
        page_sizes=None,
    ):  # fmt: skip
        self.stage = stage
        self.granule = granule
        self.granule_lg2 = granule.bit_length() - 1
        self.index_bits = self.granule_lg2 - 3
        self.ias = ias
        self.oas = oas
        self.contiguous = contiguous
        self.dirty = dirty
        self.fwb = fwb
        level = 4 - -(-(ias - self.granule_lg2) // self.index_bits)
        while stage == 2 and not self._starts(level):
            level += 1
        self.start = level
        self.levels = BLOCKS[self.granule_lg2] | ({1} if granule == 65536 and oas > 48 else set())
        sizes = {self.size_of(level) for level in self.levels if level >= self.start}
        if page_sizes is not None:
            sizes = {size for size in sizes if size & page_sizes}
        self.sizes = sorted(sizes, reverse=True)
        self.root = Node(self.start, 0)
        self.notes = []

    def _starts(self, level):
        if (self.granule_lg2, level) not in STAGE2:
            return False
        most, least, output = STAGE2[self.granule_lg2, level]
        return least <= 64 - self.ias <= most and self.oas >= output

    # --- geometry ---

    def size_of(self, level):
        """Bytes below one entry."""
        return 1 << self.granule_lg2 + (3 - level) * self.index_bits

    def index(self, iova, level):
        """Of an entry in its table."""
        index = iova // self.size_of(level)
        return index if level == self.start else index % (1 << self.index_bits)

    def level_of(self, size):
        """Where leaves of a size are."""
        return next(level for level in range(4) if self.size_of(level) == size)

    @property
    def root_entries(self):
        return (1 << self.ias) // self.size_of(self.start)

    def span(self, node):
        """First and last address below a table that is not the root."""
        return node.iova, node.iova + self.size_of(node.level - 1) - 1

    # --- looking ---

    def path(self, iova):
        """(tables from the root on, what stands in the last: None or a Leaf)."""
        nodes = [self.root]
        while True:
            found = nodes[-1].entries.get(self.index(iova, nodes[-1].level))
            if not isinstance(found, Node):
                return nodes, found
            nodes.append(found)

    def nodes(self, node=None):
        """Every table."""
        node = node or self.root
        yield node
        for entry in node.entries.values():
            if isinstance(entry, Node):
                yield from self.nodes(entry)

    def leaves(self, node=None):
        """Every leaf, ascending."""
        node = node or self.root
        for _, entry in sorted(node.entries.items()):
            if isinstance(entry, Node):
                yield from self.leaves(entry)
            else:
                yield entry

    def iova_to_phys(self, iova):
        if iova >> self.ias:
            return 0
        leaf = self.path(iova)[1]
        return leaf.pa + iova - leaf.iova if leaf else 0

    @property
    def mapped(self):
        return sum(leaf.size for leaf in self.leaves())

    @property
    def table_bytes(self):
        root = max(64, 8 * self.root_entries)
        return root + (sum(1 for _ in self.nodes()) - 1) * self.granule

    def descriptor(self, leaf):
        """What stands in memory for a leaf."""
        level = self.level_of(leaf.size)
        prot = leaf.prot
        sh = 3 if prot & CACHE else 2
        if self.stage == 1:
            return leaf_descriptor(
                self.granule_lg2, level, leaf.pa,
                attrindx=2 if prot & MMIO else 1 if prot & CACHE else 0,
                ap=(0 if prot & PRIV else 1)
                | (0 if prot & WRITE and not leaf.clean else 2),
                sh=sh, ng=1,
                pxn=int(prot & NOEXEC > 0), uxn=int(prot & NOEXEC > 0),
                dbm=int(self.dirty and prot & WRITE > 0),
                contiguous=int(leaf.contiguous),
            )  # fmt: skip
        write_back = 0b0110 if self.fwb else 0b1111
        return stage2_leaf_descriptor(
            self.granule_lg2, level, leaf.pa,
            memattr=0b0001 if prot & MMIO else write_back if prot & CACHE else 0b0101,
            s2ap=prot & 3, sh=sh, xn=2 if prot & NOEXEC else 0,
            contiguous=int(leaf.contiguous),
        )  # fmt: skip

    def pointer(self, address):
        """What stands in memory for a table."""
        return table_descriptor(self.granule_lg2, address)

    # --- map ---

    def check(self, iova, pa, size, prot):
        """Refuse what the kernel refuses."""
        if (iova | pa | size) % self.sizes[-1]:
            raise RefusedError(errno.EINVAL)
        if iova >= 1 << self.ias or iova + size > 1 << self.ias:
            raise RefusedError(errno.ERANGE)
        if pa >= 1 << self.oas or pa + size > 1 << self.oas:
            raise RefusedError(errno.ERANGE)
        if prot >= 64 or not prot & (READ | WRITE):
            raise RefusedError(errno.EINVAL)

    def pages(self, iova, pa, size, prot):
        """The leaves that map a piece of memory."""
        leaves = []
        while size:
            page = next(
                page for page in self.sizes
                if page <= size and iova % page == 0 and pa % page == 0
            )  # fmt: skip
            leaves.append(Leaf(iova, page, pa, prot))
            iova += page
            pa += page
            size -= page
        if self.contiguous:
            starts = {leaf.iova: i for i, leaf in enumerate(leaves)}
            for leaf in leaves:
                count = RUNS.get((self.granule_lg2, self.level_of(leaf.size)))
                if not count or leaf.iova % (count * leaf.size) or leaf.pa % (count * leaf.size):
                    continue
                i = starts[leaf.iova]
                run = leaves[i : i + count]
                if len(run) == count and all(each.size == leaf.size for each in run):
                    for each in run:
                        each.contiguous = True
        return leaves

    def map(self, iova, pa, size, prot=READ | WRITE):
        self.check(iova, pa, size, prot)
        self.insert(self.pages(iova, pa, size, prot))

    def map_sg(self, iova, segments, prot=READ | WRITE):
        pieces = []
        for pa, size in segments:
            self.check(iova, pa, size, prot)
            if size and pieces and sum(pieces[-1]) == pa:
                pieces[-1] = pieces[-1][0], pieces[-1][1] + size
            elif size:
                pieces.append((pa, size))
        self.check(iova, 0, sum(size for _, size in pieces), prot)
        leaves = []
        at = iova
        for pa, size in pieces:
            leaves += self.pages(at, pa, size, prot)
            at += size
        self.insert(leaves)
        return at - iova

    def insert(self, leaves):
        """Write leaves where no leaf is, or none of them."""
        for leaf in leaves:
            nodes, found = self.path(leaf.iova)
            if found:
                raise RefusedError(errno.EEXIST)
            level = self.level_of(leaf.size)
            if nodes[-1].level >= level:
                node = next(node for node in nodes if node.level == level)
                there = node.entries.get(self.index(leaf.iova, level))
                if isinstance(there, Node) and any(self.leaves(there)):
                    raise RefusedError(errno.EEXIST)
        for leaf in leaves:
            node = self.root
            level = self.level_of(leaf.size)
            while node.level < level:
                index = self.index(leaf.iova, node.level)
                if index not in node.entries:
                    start = leaf.iova - leaf.iova % self.size_of(node.level)
                    node.entries[index] = Node(node.level + 1, start)
                node = node.entries[index]
            node.entries[self.index(leaf.iova, level)] = leaf

    # --- unmap ---

    def unmap(self, iova, size):
        if (iova | size) % self.sizes[-1] or iova >> self.ias or not size:
            return 0
        end = min(iova + size, 1 << self.ias)
        at = iova
        while at < end:
            nodes, leaf = self.path(at)
            if leaf is None:
                self.prune(nodes, iova, end)
                break
            if leaf.iova != at:
                break
            if leaf.contiguous:
                run = RUNS[self.granule_lg2, self.level_of(leaf.size)] * leaf.size
                start = at - at % run
                if start < iova or start + run > -(-end // leaf.size) * leaf.size:
                    for each in range(start, start + run, leaf.size):
                        self.path(each)[1].contiguous = False
            del nodes[-1].entries[self.index(at, nodes[-1].level)]
            at += leaf.size
            self.prune(nodes, iova, max(end, at))
        if len(self.notes) >= self.KEPT:
            self.reclaim()
        return at - iova

    def prune(self, nodes, first, end):
        """Take the empty tables of a path out, from below, that a range covers."""
        for above, node in zip(nodes[-2::-1], nodes[:0:-1], strict=True):
            if node.entries:
                return
            start, last = self.span(node)
            if start < first or last >= end:
                self.note(node)
                return
            del above.entries[self.index(start, above.level)]

    def note(self, node):
        if not node.noted:
            node.noted = True
            self.notes.append((node.iova, node.level))

    def reclaim(self):
        """Take out the empty tables that were noted, and those above that become empty."""
        while self.notes:
            iova, level = self.notes.pop()
            nodes, _ = self.path(iova)
            at = [node for node in nodes if node.level == level]
            if not at:
                continue
            (node,) = at
            node.noted = False
            if node.entries:
                continue
            above = nodes[nodes.index(node) - 1]
            del above.entries[self.index(iova, above.level)]
            if not above.entries and above is not self.root:
                self.note(above)

    # --- dirty state ---

    def write(self, iova):
        """A device wrote, and hardware tracks it."""
        leaf = self.path(iova)[1]
        if leaf and leaf.prot & WRITE:
            leaf.clean = False

    def read_dirty(self, iova, size, *, clear=True):
        if self.stage != 1 or not size or (iova | size) % self.granule:
            raise RefusedError(errno.EINVAL)
        if iova + size > 1 << self.ias:
            raise RefusedError(errno.EINVAL)
        found = []
        seen = []
        for at in range(iova, iova + size, self.granule):
            leaf = self.path(at)[1]
            dirty = bool(leaf and leaf.prot & WRITE and not leaf.clean)
            found.append(dirty)
            if dirty and leaf not in seen[-1:]:
                seen.append(leaf)
        for leaf in seen:
            if clear and iova <= leaf.iova and leaf.iova + leaf.size <= iova + size:
                leaf.clean = True
        return found
