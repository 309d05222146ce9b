"""Caches against the set of answers that the invalidations permit.

Run as a program for long comparisons::

    python -P tests/permitted.py 10000000 --jobs 2

``--without TLBI_NH_ASID`` keeps a command from the SMMU, to see that it is missed.

A program is random stores to STEs, CDs and tables of both stages, random commands, and
translations over several streams, ASIDs, VMIDs and StreamWorlds, by an SMMU with caches of random
geometry: one by one, in batches, and as walks whose fetches the host makes while software goes on.

The model knows nothing of caches.  It remembers every value that a structure has had, and every
command: an answer is permitted when it follows from values of which none is older than what the
commands before the last CMD_SYNC have covered (IHI 0070 3.21, 4.3, 4.4).  Where every older value
is covered, only the present answer is permitted.

An older value can be had until a command covers it that came after it was replaced, and what was
made of it (a table that it named, a translation) until a command covers that, which came after it
could be made for the last time.  A command is complete at the next CMD_SYNC.

The model allows too much in two ways: values of different times are combined freely, and a walk
that was overtaken, and begins again, may have read what it had read before.
"""

import argparse
import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # python -P leaves this folder out
    sys.path[:0] = [str(Path(__file__).resolve().parent / name) for name in ("", "support")]

import numpy as np
import ptwriter

from smmufast import ACTIONS, NO_SUBSTREAM, Caches, Features, Memory, Smmu, layout
from smmufast._engine.tlb import NESTED, POLICIES

PROGRAM = 1500  # steps of one program
FOREVER = 1 << 62
STREAMS, SUBSTREAMS = 6, 4
ROOTS = 3  # of stage 1
ASIDS = (1, 2)
NESTED_VMIDS, LONE_VMIDS = (4, 5, 8), (6, 9)  # a tag does not say whether there is a stage 2
VMIDS = NESTED_VMIDS + LONE_VMIDS

# Physical memory.  The stage-1 tables are there twice: stage 2 may put a page of them elsewhere.
STES, CDS = 0x10_0000, 0x20_0000
TABLES, COPY = 0x40_0000, 0x60_0000
SECOND = 0x80_0000
DATA = 0x400_0000  # IPAs or addresses of pages
PAGE, BLOCK, GIB = 1 << 12, 1 << 21, 1 << 30
SPAN = {1: GIB, 2: BLOCK, 3: PAGE}

# Pages of stage-1 tables, and of stage-2 tables: (level, number) to an offset.
S1_PAGES = {
    **{(1, n): n * PAGE for n in range(ROOTS)},
    **{(2, n): (8 + n) * PAGE for n in range(3)},
    **{(3, n): (16 + n) * PAGE for n in range(4)},
}
S2_PAGES = {
    **{(1, n): n * PAGE for n in range(2)},
    **{(2, n): (8 + n) * PAGE for n in range(2)},
    **{(3, n): (16 + n) * PAGE for n in range(6)},
}
INDEX1, INDEX2, INDEX3 = (0, 1), (32, 33), (0, 1, 2)  # of the addresses that are used
ADDRESSES = [
    a * GIB + b * BLOCK + c * PAGE for a, b, c in itertools.product(INDEX1, INDEX2, INDEX3)
]


class Ste(NamedTuple):
    """What an STE says: "bad", "abort", "bypass", or stages."""

    kind: str
    stage1: bool = False
    stage2: bool = False
    world: str = "NS"
    vmid: int = 0
    root: int = 0  # of stage 2


class Cd(NamedTuple):
    """What a CD says."""

    valid: bool
    asid: int = 0
    root: int = 0


class Pte(NamedTuple):
    """What a descriptor says: "none", "table", or "leaf"."""

    kind: str
    address: int = 0
    write: bool = True
    ng: bool = True
    af: bool = True

    @property
    def cached(self):
        """A translation that it gives may be cached; that there is none may not."""
        return self.kind == "leaf" and self.af


class Request(NamedTuple):
    """One transaction; 0 is that without a SubstreamID, which has CD 0 (S1DSS)."""

    sid: int
    ssid: int
    va: int
    write: bool


class Value:
    """What a place has held from one step to another."""

    __slots__ = ("end", "start", "what")

    def __init__(self, what, start):
        self.what = what
        self.start = start
        self.end = FOREVER


# ------------------------------------------------------------------------------------------------
# Commands


class Command:
    """A command: what it covers; `issue` and `complete` are steps."""

    __slots__ = ("complete", "fields", "issue", "mask", "name")

    def __init__(self, name, fields, issue, mask):
        self.name = name
        self.fields = fields
        self.issue = issue
        self.complete = None
        self.mask = mask  # VMID bits that count: CR0.VMW

    def spans(self, address, size):
        """Whether the addresses of the command meet `size` bytes around an address."""
        first = self.fields["Address"]
        last = first + PAGE - 1
        if self.fields.get("TG"):
            last = first + (self.fields["NUM"] + 1 << self.fields["SCALE"]) * PAGE - 1
        start = address & -size
        return start <= last and first < start + size

    def vmid(self, vmid):
        return not (self.fields["VMID"] ^ vmid) & self.mask

    def at_leaf(self, address, level):
        ttl = self.fields.get("TTL", 0)
        return ttl in (0, level) and self.spans(address, SPAN[level])

    def at_table(self, address, level):
        """A descriptor of a level that names a table, on the way of an address."""
        ttl = self.fields.get("TTL", 0)
        reached = ttl == 0 or level < ttl
        return not self.fields["Leaf"] and reached and self.spans(address, SPAN[level])

    def stage1(self, tag, table, address, level, ng=True):
        """Whether it covers what stage 1 has cached of an address: a leaf or a table."""
        world, vmid, asid = tag
        name = self.name
        at = self.at_table if table else self.at_leaf
        if world == "NS":
            if name == "TLBI_NSNH_ALL":
                return True
            if name in ("TLBI_NH_ALL", "TLBI_S12_VMALL"):
                return self.vmid(vmid)
            if name == "TLBI_NH_ASID":
                return self.vmid(vmid) and ng and self.fields["ASID"] == asid
            if name == "TLBI_NH_VAA":
                return self.vmid(vmid) and at(address, level)
            if name == "TLBI_NH_VA":
                same = not ng or self.fields["ASID"] == asid
                return self.vmid(vmid) and same and at(address, level)
            return False
        if name == "TLBI_EL2_ALL":
            return True
        if name == "TLBI_EL2_ASID":
            return world == "E2H" and ng and self.fields["ASID"] == asid
        if name == "TLBI_EL2_VAA":
            return at(address, level)
        if name == "TLBI_EL2_VA":
            same = world == "EL2" or not ng or self.fields["ASID"] == asid
            return same and at(address, level)
        return False

    def stage2(self, vmid, table, ipa, level):
        """Whether it covers what stage 2 alone has cached of an IPA."""
        if self.name == "TLBI_NSNH_ALL":
            return True
        if self.name == "TLBI_S12_VMALL":
            return self.vmid(vmid)
        if self.name == "TLBI_S2_IPA":
            return self.vmid(vmid) and (self.at_table if table else self.at_leaf)(ipa, level)
        return False

    def ste(self, sid):
        if self.name == "CFGI_ALL":
            return True
        if self.name == "CFGI_STE_RANGE":
            low = (2 << self.fields["Range"]) - 1
            return (self.fields["StreamID"] ^ sid) & ~low == 0
        return self.name == "CFGI_STE" and self.fields["StreamID"] == sid

    def cd(self, sid, ssid):
        if self.ste(sid):
            return True
        if self.name in ("CFGI_CD", "CFGI_CD_ALL") and self.fields["StreamID"] == sid:
            return self.name == "CFGI_CD_ALL" or self.fields["SubstreamID"] == ssid
        return False


# ------------------------------------------------------------------------------------------------
# The model


class Until(NamedTuple):
    """How long something could be had: up to a step, and which commands ended it then."""

    step: int
    closers: frozenset = frozenset()


ALWAYS = Until(FOREVER)


def earlier(*times):
    """How long all of them could be had."""
    step = min(one.step for one in times)
    return Until(step, frozenset().union(*(one.closers for one in times if one.step == step)))


class Model:
    """What places hold and have held, what commands have covered, and what follows."""

    def __init__(self):
        self.now = 0
        self.began = FOREVER  # the walk that is under way, which has what it has read
        self.places = {}
        self.commands = []  # complete ones
        self.pending = []
        self.known = {}  # what was worked out since the last change of these

    def store(self, place, what):
        self.known.clear()
        values = self.places.setdefault(place, [])
        if values:
            values[-1].end = self.now
        values.append(Value(what, self.now))

    def present(self, place):
        return self.places[place][-1].what

    def sync(self):
        for command in self.pending:
            command.complete = self.now
        self.commands += self.pending
        self.pending = []
        self.known.clear()

    def read_since(self, step):
        """Permit also what was not cached and has been replaced after a step."""
        self.began = step
        self.known.clear()

    def forget(self):
        """Everything was covered: older values and commands do not matter any more."""
        for values in self.places.values():
            del values[:-1]
        self.commands.clear()
        self.known.clear()

    # --- what is there now ---

    def answer(self, request):
        """The answer that memory gives now."""
        ste = self.present(("ste", request.sid))
        if not ste.stage1 and (answer := self.untranslated(ste, request)) is not None:
            return answer
        va = ipa = request.va
        if ste.stage1:
            cd = self.present(("cd", request.sid, request.ssid))
            if not cd.valid:
                return "C_BAD_CD"
            table = TABLES + S1_PAGES[1, cd.root]
            for level in (1, 2, 3):
                at = table + (va // SPAN[level] & 511) * 8
                if ste.stage2:
                    at = self.second(ste.root, at, False)
                    if isinstance(at, str):
                        return at
                pte = self.present(at)
                if pte.kind != "table":
                    break
                table = pte.address
            ipa = self.leaf(pte, level, va, request.write)
        if ste.stage2 and not isinstance(ipa, str):
            ipa = self.second(ste.root, ipa, request.write)
        return ipa

    @staticmethod
    def untranslated(ste, request):
        """The answer of an STE without stage 1, as far as it needs no table; None: stage 2's."""
        if ste.kind in ("bad", "abort"):
            return {"bad": "C_BAD_STE", "abort": "abort"}[ste.kind]
        if request.ssid:
            return "C_BAD_SUBSTREAMID"
        return request.va if ste.kind == "bypass" else None

    @staticmethod
    def leaf(pte, level, address, write):
        """What a descriptor that names no table gives: an address or a fault."""
        if pte.kind == "none":
            return "F_TRANSLATION"
        if not pte.af:
            return "F_ACCESS"
        if write and not pte.write:
            return "F_PERMISSION"
        return pte.address + address % SPAN[level]

    def second(self, root, ipa, write):
        table = SECOND + S2_PAGES[1, root]
        for level in (1, 2, 3):
            pte = self.present(table + (ipa // SPAN[level] & 511) * 8)
            if pte.kind != "table":
                return self.leaf(pte, level, ipa, write)
            table = pte.address
        raise AssertionError("a table at level 3")

    # --- what may be there still ---

    def kept(self, until, covers):
        """How long a copy of something could be had: as long as that, and until a command.

        A copy could be made up to then.  A command covers it that was issued later, or that ended
        the other and covers both.
        """
        if until.step == FOREVER:
            return until
        ending = [
            one for one in self.commands
            if (one.issue >= until.step or one in until.closers) and covers(one)
        ]  # fmt: skip
        if not ending:
            return ALWAYS
        step = min(one.complete for one in ending)
        return Until(step, frozenset(one for one in ending if one.complete == step))

    def ste_until(self, sid, value):
        return self.kept(Until(value.end), lambda c: c.ste(sid))

    def cd_until(self, sid, ssid, value):
        return self.kept(Until(value.end), lambda c: c.cd(sid, ssid))

    def permitted(self, request):
        """The answers that are permitted, each once or more."""
        sid, ssid = request.sid, request.ssid
        for value in self.places["ste", sid]:
            ste = value.what
            if self.ste_until(sid, value) != ALWAYS:
                continue
            if not ste.stage1:
                answer = self.untranslated(ste, request)
                yield from self.alone(ste, request) if answer is None else (answer,)
                continue
            for second in self.places["cd", sid, ssid]:
                if self.cd_until(sid, ssid, second) == ALWAYS:
                    yield from self.both(ste, second.what, request)

    def alone(self, ste, request):
        """Stage 2 alone."""
        for pte, level, until in self.walk2(ste, request.va):
            if until == ALWAYS:
                yield self.leaf(pte, level, request.va, request.write)

    def both(self, ste, cd, request):
        """Stage 1, alone or with stage 2."""
        if not cd.valid:
            yield "C_BAD_CD"
            return
        va = request.va
        mine = tag_of(ste, cd)
        for (tag, root), since in self.roots1(mine, cd.root):
            for pte, level, until in self.walk1(ste, tag, TABLES + S1_PAGES[1, root], since, va):
                if tag != mine and (pte.ng or not pte.cached):
                    continue  # of another ASID only what is global is found
                given = self.leaf(pte, level, va, request.write)
                if isinstance(given, str) or not ste.stage2:
                    if until == ALWAYS:
                        yield given
                    continue

                def covers(c, tag=tag, pte=pte, level=level):
                    return c.stage1(tag, False, va, level, pte.ng)

                for outer, outer_level, through in self.walk2(ste, given):
                    whole = earlier(until, through)
                    if outer.cached:
                        whole = self.kept(whole, covers)
                    if whole == ALWAYS:
                        yield self.leaf(outer, outer_level, given, request.write)

    def once(self, key, work):
        """What some work gives, as long as nothing changes."""
        if key not in self.known:
            self.known[key] = list(work())
        return self.known[key]

    def configurations(self):
        """(STE, CD or None, how long) of every pair that ever was."""
        return self.once("configurations", self.every_configuration)

    def every_configuration(self):
        for sid in range(STREAMS):
            for first in self.places["ste", sid]:
                if first.what.kind != "ok":
                    continue
                until = self.ste_until(sid, first)
                yield first.what, None, until
                for ssid in range(SUBSTREAMS) if first.what.stage1 else ():
                    for second in self.places["cd", sid, ssid]:
                        if second.what.valid:
                            yield first.what, second.what, earlier(
                                until, self.cd_until(sid, ssid, second)
                            )

    def roots1(self, tag, root):
        """((tag, root), how long) of the stage-1 tables whose translations a tag may find."""
        found = {((tag, root), ALWAYS)}
        for ste, cd, until in self.configurations():
            if cd is not None and tag_of(ste, cd)[:2] == tag[:2]:
                found.add(((tag_of(ste, cd), cd.root), until))
        return found

    def roots2(self, ste):
        """(root, how long) of the stage-2 tables whose translations a VMID may find."""
        found = {(ste.root, ALWAYS)}
        for other, cd, until in self.configurations():
            if cd is None and other.stage2 and other.vmid == ste.vmid:
                found.add((other.root, until))
        return found

    def walk1(self, ste, tag, table, since, va, level=1):
        """(descriptor that names no table, its level, how long) of stage 1."""
        at = table + (va // SPAN[level] & 511) * 8
        for pa, placed in self.where(ste, at):
            known = earlier(since, placed)
            if isinstance(pa, str):
                yield Pte("none"), level, known
                continue
            for value in self.places[pa]:
                pte = value.what
                until = earlier(known, Until(value.end))
                if pte.kind == "table":
                    until = self.kept(until, lambda c: c.stage1(tag, True, va, level))
                    yield from self.walk1(ste, tag, pte.address, until, va, level + 1)
                    continue
                if pte.cached:
                    until = self.kept(
                        until, lambda c, ng=pte.ng: c.stage1(tag, False, va, level, ng)
                    )
                elif value.end > self.began:
                    until = known
                yield pte, level, until

    def where(self, ste, at):
        """(address, how long) where a descriptor of stage 1 may lie; a fault of stage 2."""
        if not ste.stage2:
            return ((at, ALWAYS),)
        return self.once(("where", ste.vmid, ste.root, at), lambda: {
            (self.leaf(pte, level, at, False), until) for pte, level, until in self.walk2(ste, at)
        })  # fmt: skip

    def walk2(self, ste, ipa):
        """As walk1, of stage 2."""
        return self.once((ste.vmid, ste.root, ipa), lambda: self.walk2_roots(ste, ipa))

    def walk2_roots(self, ste, ipa):
        for root, until in self.roots2(ste):
            yield from self.walk2_from(ste.vmid, SECOND + S2_PAGES[1, root], until, ipa, 1)

    def walk2_from(self, vmid, table, since, ipa, level):
        for value in self.places[table + (ipa // SPAN[level] & 511) * 8]:
            pte = value.what
            until = earlier(since, Until(value.end))
            if pte.kind == "table":
                until = self.kept(until, lambda c: c.stage2(vmid, True, ipa, level))
                yield from self.walk2_from(vmid, pte.address, until, ipa, level + 1)
                continue
            if pte.cached:
                until = self.kept(until, lambda c: c.stage2(vmid, False, ipa, level))
            elif value.end > self.began:
                until = since
            yield pte, level, until


def tag_of(ste, cd):
    """(StreamWorld, VMID, ASID) of what a CD's tables give."""
    if ste.world == "NS":
        return "NS", ste.vmid, cd.asid
    return ste.world, None, cd.asid if ste.world == "E2H" else None


# ------------------------------------------------------------------------------------------------
# The program


class System:
    """An SMMU with caches, and the model of what it may answer."""

    def __init__(self, seed, without=None):
        self.rng = rng = random.Random(seed)
        self.without = without  # a command that does not reach the SMMU
        self.memory = Memory()
        self.memory.add_private(0, 1 << 32)
        self.model = Model()
        self.world = rng.choice(("EL2", "E2H"))
        self.vmw = rng.choice((0, 0, 1, 2, 3))
        registers = {
            "strtab_base": STES, "strtab_base_cfg": 3, "cr0": 0b101 | self.vmw << 6,
            "cr2": 0b10 | (self.world == "E2H"),
        }  # fmt: skip
        features = Features(oas=5, httu=0, stall_model=1)
        self.smmu = Smmu(self.memory, features, caches=random_caches(rng), **registers)
        self.bare = Smmu(self.memory, features, **registers)
        self.places = []
        for level, number in S1_PAGES:
            for base in (TABLES, COPY):
                for index in {1: INDEX1, 2: INDEX2, 3: INDEX3}[level]:
                    at = base + S1_PAGES[level, number] + 8 * index
                    self.place(at, 1, level)
        self.second_tables()
        for sid in range(STREAMS):
            self.place(("ste", sid))
            for ssid in range(SUBSTREAMS):
                self.place(("cd", sid, ssid))
        self.counts = collections.Counter()
        self.recent = collections.deque(maxlen=4)
        self.hot = collections.deque(maxlen=4)  # addresses that commands named

    def place(self, at, *what):
        self.places.append((at, *what))
        self.write(at, self.draw(at, *what, filled=True))

    def second_tables(self):
        """Stage 2: what is not drawn at random is where it is."""
        for number in range(2):
            root = SECOND + S2_PAGES[1, number]
            self.places += [(root, 2, 1), (root + 8, 2, 1)]
            self.write(root, Pte("table", SECOND + S2_PAGES[2, number]))
            self.write(root + 8, Pte("leaf", GIB))
            table = SECOND + S2_PAGES[2, number]
            for index in (0, 1):  # STEs and CDs
                self.write(table + 8 * index, Pte("leaf", index * BLOCK))
            for index in (2, 32, 33):
                self.places.append((table + 8 * index, 2, 2))
                self.write(table + 8 * index, self.draw(table + 8 * index, 2, 2, filled=True))
        for number in range(6):
            table = SECOND + S2_PAGES[3, number]
            for index in self.lower(number):
                at = table + 8 * index
                self.places.append((at, 2, 3))
                self.write(at, self.draw(at, 2, 3, filled=True))

    @staticmethod
    def lower(number):
        """Indices of a stage-2 table of level 3: of pages of tables, or of data."""
        if number < 2:
            return sorted({offset // PAGE for offset in S1_PAGES.values()})
        return range(6)

    # --- values ---

    def draw(self, at, stage=0, level=0, filled=False):
        """A value for a place; filled: one that leads on, mostly."""
        rng = self.rng
        if isinstance(at, tuple):
            return self.draw_ste() if at[0] == "ste" else self.draw_cd()
        chance = rng.random() * (0.8 if filled else 1)
        if stage == 1:
            if level < 3 and chance < 0.75:
                number = rng.randrange(3 if level == 1 else 4)
                return Pte("table", TABLES + S1_PAGES[level + 1, number])
            if chance > 0.9:
                return Pte("none")
            address = rng.randrange(6) * PAGE + DATA
            if level == 2:
                address = DATA + rng.randrange(2) * BLOCK
            elif level == 1:
                address = rng.choice((0, GIB))
            ng = rng.random() < 0.8
            return Pte("leaf", address, rng.random() < 0.7, ng, filled or rng.random() < 0.9)
        return self.draw_second(at, level, chance)

    def draw_second(self, at, level, chance):
        rng = self.rng
        write = rng.random() < 0.7
        if level == 1:
            if at % PAGE == 0:  # the way to the CDs stays
                return Pte("table", SECOND + S2_PAGES[2, rng.randrange(2)])
            if chance > 0.9:
                return Pte("none")
            return Pte("leaf", rng.choice((GIB, 2 * GIB)), write)
        if level == 2:
            index = at % PAGE // 8
            if index == 2:
                return Pte("table", SECOND + S2_PAGES[3, rng.randrange(2)])
            if chance < 0.6:
                return Pte("table", SECOND + S2_PAGES[3, 2 + rng.randrange(4)])
            if chance > 0.9:
                return Pte("none")
            return Pte("leaf", DATA + rng.randrange(4) * BLOCK, write)
        index = at % PAGE // 8
        if (at - SECOND) // PAGE - 16 < 2:  # a page of tables: itself or its copy
            return Pte("leaf", (TABLES if chance < 0.6 else COPY) + index * PAGE, write)
        if chance > 0.9:
            return Pte("none")
        return Pte("leaf", 2 * DATA + rng.randrange(8) * PAGE, write)

    def draw_ste(self):
        rng = self.rng
        chance = rng.random()
        if chance < 0.1:
            return Ste(rng.choice(("bad", "abort", "bypass")))
        vmid, root = rng.choice(NESTED_VMIDS), rng.randrange(2)
        if chance < 0.4:
            return Ste("ok", stage1=True, vmid=rng.choice(LONE_VMIDS))
        if chance < 0.55:
            return Ste("ok", stage1=True, world=self.world)
        return Ste("ok", stage1=chance < 0.85, stage2=True, vmid=vmid, root=root)

    def draw_cd(self):
        rng = self.rng
        return Cd(rng.random() < 0.93, rng.choice(ASIDS), rng.randrange(ROOTS))

    def write(self, at, what):
        """Store a value, in memory and in the model."""
        self.model.store(at, what)
        if isinstance(at, int):
            self.memory.write_u64(at, encode_pte(at, what))
        elif at[0] == "ste":
            self.memory.write(STES + 64 * at[1], encode_ste(at[1], what))
        else:
            _, sid, ssid = at
            self.memory.write(CDS + PAGE * sid + 64 * ssid, encode_cd(what))

    # --- steps ---

    def step(self):
        """One store, command, translation, or batch of translations; how many steps that were."""
        self.model.now += 1
        chance = self.rng.random()
        if chance < 0.14:
            self.change()
        elif chance < 0.3:
            name = self.random_command()
            self.command(name, **self.fields_of(name))
        elif chance < 0.36:
            self.cover(self.rng.choice(self.recent) if self.recent else None)
        elif chance < 0.41:
            self.sync()
        elif chance < 0.42:
            self.everything()
        elif chance < 0.47:
            return self.batch()
        elif chance < 0.5:
            self.walk()
        else:
            request = self.request()
            self.check(request, answer_of(self.smmu.translate(
                request.sid, request.va, ssid=request.ssid or None, write=request.write,
            )))  # fmt: skip
        return 1

    def request(self):
        rng = self.rng
        sid = rng.randrange(STREAMS)
        va = rng.choice(self.hot if self.hot and rng.random() < 0.5 else ADDRESSES)
        return Request(sid, rng.randrange(SUBSTREAMS), va, rng.random() < 0.3)

    def change(self):
        at, *what = self.rng.choice(self.places)
        self.write(at, self.draw(at, *what))
        self.recent.append((at, *what))

    def command(self, name, **fields):
        """Issue a command; it is complete at the next CMD_SYNC."""
        given = {"IPA" if name == "TLBI_S2_IPA" and n == "Address" else n: value
                 for n, value in fields.items()}  # fmt: skip
        if name != self.without:
            self.smmu.command(name, **given)
        mask = 0xFFFF & ~((1 << self.vmw) - 1)
        self.model.pending.append(Command(name, fields, self.model.now, mask))
        self.model.now += 1
        self.counts["commands"] += 1

    def sync(self):
        self.smmu.sync()
        self.model.sync()

    def everything(self):
        """Configuration first: what it gives may be cached again until it is gone."""
        self.command("CFGI_ALL")
        self.sync()
        self.model.now += 1
        for name in ("TLBI_NSNH_ALL", "TLBI_EL2_ALL"):
            self.command(name)
        self.sync()
        self.model.forget()

    def random_command(self):
        rng = self.rng
        return rng.choice((
            "TLBI_NH_ALL", "TLBI_NH_ASID", "TLBI_NH_VA", "TLBI_NH_VA", "TLBI_NH_VAA",
            "TLBI_EL2_ALL", "TLBI_EL2_ASID", "TLBI_EL2_VA", "TLBI_EL2_VAA", "TLBI_S12_VMALL",
            "TLBI_S2_IPA", "TLBI_S2_IPA", "TLBI_NSNH_ALL", "CFGI_STE", "CFGI_STE_RANGE", "CFGI_CD",
            "CFGI_CD_ALL",
        ))  # fmt: skip

    def fields_of(self, name, **known):
        """Fields of a command, at random but for those that are known."""
        rng = self.rng
        fields = {}
        if name in ("TLBI_NH_ALL", "TLBI_NH_ASID", "TLBI_NH_VA", "TLBI_NH_VAA", "TLBI_S12_VMALL",
                    "TLBI_S2_IPA"):  # fmt: skip
            fields["VMID"] = rng.choice(VMIDS)
        if name in ("TLBI_NH_ASID", "TLBI_NH_VA", "TLBI_EL2_ASID", "TLBI_EL2_VA"):
            fields["ASID"] = rng.choice(ASIDS)
        if name.endswith(("_VA", "_VAA", "_IPA")):
            fields |= self.range_of(name, known.pop("address", None), known.pop("leaf", None))
        if name.startswith("CFGI_") and name != "CFGI_ALL":
            fields["StreamID"] = rng.randrange(STREAMS)
        if name == "CFGI_STE_RANGE":
            fields["Range"] = rng.randrange(3)
        if name == "CFGI_CD":
            fields["SubstreamID"] = rng.randrange(SUBSTREAMS)
        if name in ("CFGI_STE", "CFGI_CD"):
            fields["Leaf"] = rng.randrange(2)
        return fields | known

    def range_of(self, name, address, leaf):
        rng = self.rng
        if address is None:
            address = rng.choice(ADDRESSES)
            if name == "TLBI_S2_IPA":
                address = rng.choice((0, GIB, TABLES + 8 * PAGE, DATA, DATA + 2 * PAGE, 2 * DATA))
        fields = {"Address": address & -PAGE, "Leaf": rng.randrange(2) if leaf is None else leaf}
        if rng.random() < 0.3 and leaf is None:
            fields |= {"TG": 1, "TTL": rng.randrange(4), "NUM": rng.randrange(8),
                       "SCALE": rng.choice((0, 0, 4, 9))}  # fmt: skip
            if fields["TTL"] in (1, 2):
                fields["Address"] &= -SPAN[fields["TTL"]]
            if fields["NUM"] == fields["SCALE"] == fields["TTL"] == 0:
                fields["NUM"] = 1
        return fields

    def cover(self, place):
        """Invalidate as a change of a place requires: all of it, in order."""
        if place is None:
            return
        rng = self.rng
        at, *what = place
        if isinstance(at, tuple):
            if at[0] == "ste":
                self.command("CFGI_STE", StreamID=at[1], Leaf=1)
            else:
                self.command("CFGI_CD", StreamID=at[1], SubstreamID=at[2], Leaf=1)
            self.sync()
            self.model.now += 1
            self.flush()
            return
        stage, level = what
        if stage == 2:
            vmid = rng.choice(NESTED_VMIDS)
            if rng.random() < 0.5:
                self.command("TLBI_S12_VMALL", VMID=vmid)
            else:
                ipa = rng.choice((TABLES, DATA, DATA)) + at % PAGE // 8 * PAGE
                leaf = int(level == 3 and rng.random() < 0.5)
                name = "TLBI_S2_IPA"
                self.command(name, **self.fields_of(name, address=ipa, leaf=leaf, VMID=vmid))
                self.hot.extend({ipa}.intersection(ADDRESSES))
                self.sync()
                self.model.now += 1
                self.command("TLBI_NH_ALL", VMID=vmid)
            self.sync()
            return
        ste, cd = self.context()
        if rng.random() < 0.3:
            self.flush()
            return
        for va in rng.sample(ADDRESSES, rng.choice((1, 2, 6))):
            if ste.world == "NS":
                name = rng.choice(("TLBI_NH_VA", "TLBI_NH_VAA"))
                known = {"VMID": ste.vmid}
            else:
                name, known = rng.choice(("TLBI_EL2_VA", "TLBI_EL2_VAA")), {}
            if name.endswith("_VA"):
                known["ASID"] = cd.asid
            self.command(name, **self.fields_of(name, address=va, leaf=0, **known))
            self.hot.append(va)
        self.sync()

    def context(self):
        """The STE and the CD of a substream that translates, or of any."""
        pairs = [
            (self.model.present(("ste", sid)), self.model.present(("cd", sid, ssid)))
            for sid in range(STREAMS) for ssid in range(SUBSTREAMS)
        ]  # fmt: skip
        good = [(ste, cd) for ste, cd in pairs if ste.stage1 and cd.valid]
        return self.rng.choice(good or pairs)

    def flush(self):
        """All of one context."""
        rng = self.rng
        ste, cd = self.context()
        if ste.world != "NS":
            name = rng.choice(("TLBI_EL2_ASID", "TLBI_EL2_ALL"))
            self.command(name, **({"ASID": cd.asid} if name == "TLBI_EL2_ASID" else {}))
        elif rng.random() < 0.6:
            self.command("TLBI_NH_ASID", VMID=ste.vmid, ASID=cd.asid)
        else:
            name = rng.choice(("TLBI_S12_VMALL", "TLBI_NH_ALL"))
            self.command(name, VMID=ste.vmid)
        self.sync()

    def walk(self):
        """A walk whose fetches the host makes, while software goes on."""
        request = self.request()
        began = self.model.now
        walk = self.smmu.start_walk(
            request.sid, request.va, ssid=request.ssid or None, write=request.write
        )
        while (fetch := walk.request) is not None:
            data = self.memory.read(fetch.address, fetch.size)
            chance = self.rng.random()
            if chance < 0.08:
                self.model.now += 1
                self.change()
            elif chance < 0.14:
                name = self.random_command()
                self.command(name, **self.fields_of(name))
            elif chance < 0.18:
                self.model.now += 1
                self.sync()
            if walk.request == fetch:  # else it was overtaken, and begins again
                walk.supply(data)
        self.counts["walks"] += 1
        self.model.read_since(began)
        self.check(request, answer_of(walk.result))
        self.model.read_since(FOREVER)

    def batch(self):
        requests = [self.request() for _ in range(self.rng.choice((4, 20, 40)))]
        found = self.smmu.translate_batch(
            np.array([r.sid for r in requests], "u4"), np.array([r.va for r in requests], "u8"),
            ssid=np.array([r.ssid or NO_SUBSTREAM for r in requests], "u4"),
            write=np.array([r.write for r in requests], "?"),
            columns=("pa", "action", "fault"),
        )  # fmt: skip
        for i, request in enumerate(requests):
            self.check(request, answer_of_row(found, i))
        return len(requests)

    def check(self, request, found):
        """The answer is that of memory now, or another one that is permitted."""
        self.counts["translations"] += 1
        expected = self.model.answer(request)
        if self.counts["translations"] % 64 == 0:
            bare = answer_of(self.bare.translate(
                request.sid, request.va, ssid=request.ssid or None, write=request.write,
            ))  # fmt: skip
            assert bare == expected, f"{request}: {shown(bare)}, the model {shown(expected)}"
        if found == expected:
            return
        self.counts["old"] += 1
        if self.counts["old"] % 64 and found in self.model.permitted(request):
            return
        permitted = set(self.model.permitted(request))
        assert expected in permitted, f"{request}: the model permits not even {shown(expected)}"
        assert found in permitted, (
            f"{request}: {shown(found)}; memory gives {shown(expected)}, permitted are "
            f"{sorted(map(shown, permitted))}"
        )


def random_caches(rng):
    """Caches of random geometry; large ones keep what small ones lose."""

    def geometry():
        ways = rng.choice((1, 2, 4, 4, 8))
        return rng.choice((1, 4, 16, 64)), ways, rng.choice(POLICIES), rng.getrandbits(32)

    names = ("ste", "cd", "tlb", "walk1", "walk2")
    given = {name: geometry() for name in names if rng.random() < 0.9}
    if rng.random() < 0.5:
        given = dict.fromkeys(names, (64, 4))
    return Caches(**given, nested=rng.choice(NESTED))


def shown(answer):
    return answer if isinstance(answer, str) else hex(answer)


def answer_of(result):
    if result:
        return result.pa
    return "abort" if result.fault is None else result.fault.name


def answer_of_row(found, i):
    if ACTIONS[found["action"][i]] in ("ok", "bypass"):
        return int(found["pa"][i])
    number = int(found["fault"][i])
    return NAMES[number] if number else "abort"


# ------------------------------------------------------------------------------------------------
# Bytes


def encode_pte(at, pte):
    if pte.kind == "none":
        return 0
    if pte.kind == "table":
        return ptwriter.table_descriptor(12, pte.address)
    if at >= SECOND:
        level = 1 if at < SECOND + S2_PAGES[2, 0] else 2 if at < SECOND + S2_PAGES[3, 0] else 3
        return ptwriter.stage2_leaf_descriptor(
            12, level, pte.address, s2ap=3 if pte.write else 1, memattr=15, af=int(pte.af)
        )
    offset = (at - TABLES) % (COPY - TABLES)
    level = 1 if offset < S1_PAGES[2, 0] else 2 if offset < S1_PAGES[3, 0] else 3
    return ptwriter.leaf_descriptor(
        12, level, pte.address, attrindx=1, ap=1 if pte.write else 3, af=int(pte.af),
        ng=int(pte.ng),
    )  # fmt: skip


def encode_ste(sid, ste):
    if ste.kind != "ok":
        return ptwriter.encode_ste(
            v=int(ste.kind != "bad"), config=4 if ste.kind == "bypass" else 0
        )
    fields = {"v": 1, "config": 4 | ste.stage2 << 1 | ste.stage1, "s2vmid": ste.vmid}
    if ste.stage1:
        fields |= {"s1contextptr": CDS + PAGE * sid, "s1cdmax": 2, "s1dss": 2}
        fields["strw"] = 0 if ste.world == "NS" else 2
    if ste.stage2:
        fields |= {"s2aa64": 1, "s2t0sz": 25, "s2sl0": 1, "s2ps": 5, "s2r": 1,
                   "s2ttb": SECOND + S2_PAGES[1, ste.root]}  # fmt: skip
    return ptwriter.encode_ste(**fields)


def encode_cd(cd):
    return ptwriter.encode_cd(
        v=int(cd.valid), aa64=1, a=1, r=1, ips=5, t0sz=25, epd1=1, asid=cd.asid,
        ttb0=TABLES + S1_PAGES[1, cd.root], mair=0xFF00,
    )  # fmt: skip


NAMES = {event.value: event.name for event in layout.Event}


# ------------------------------------------------------------------------------------------------
# Runs


def run(seed, steps=PROGRAM, without=None):
    """One program: counts of what it did; AssertionError for an answer that is not permitted."""
    system = System(seed, without)
    done = 0
    while done < steps:
        try:
            done += system.step()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, step {system.model.now}: {error}") from error
    system.counts["steps"] = done
    return system.counts


def compare(total, seed=0, jobs=1, without=None):
    """Programs until that many steps are done, in several processes."""
    counts = collections.Counter()
    seeds = itertools.count(seed)
    context = multiprocessing.get_context("spawn")
    if jobs == 1:
        while counts["steps"] < total:
            counts += run(next(seeds), without=without)
            yield counts
        return
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        waiting = {pool.submit(run, next(seeds), PROGRAM, without) for _ in range(4 * jobs)}
        while counts["steps"] < total:
            done, waiting = concurrent.futures.wait(
                waiting, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for one in done:
                counts += one.result()
                waiting.add(pool.submit(run, next(seeds), PROGRAM, without))
            yield counts
        for one in waiting:
            one.cancel()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", type=int, nargs="?", default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--without", help="a command that does not reach the SMMU")
    options = parser.parse_args()
    started = told = time.monotonic()
    for counts in compare(options.steps, options.seed, options.jobs, options.without):
        if time.monotonic() > told + 60:
            told = time.monotonic()
            print(f"{counts['steps']:,} steps ...", flush=True)
    print(
        f"{counts['steps']:,} steps from seed {options.seed}: {counts['translations']:,} "
        f"translations, {counts['old']:,} of them by older values that were permitted, "
        f"{counts['commands']:,} commands; none was wrong, {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
