"""Random lives of systems: after each call every access gets what a model says.

A life is a system, some devices, and calls that come in any order: domains, PASIDs, processes,
shares, guests, groups, resets, hot-plug, and faults that are in flight while things change hands.
The model is a few dictionaries: who is attached where, and which pages each address space has.
After a call, accesses of devices (through ATCs, caches, page requests and stalls) give the model's
answer, a refused call has changed nothing, and `check` finds nothing inconsistent.

Each step draws from a generator of its own, so that a life stays what it is without some of its
steps: `shrink` leaves out what a failure does not need.

    python -P tests/lives.py --steps 100000
    python -P tests/lives.py --seed 17 --shrink
"""

import argparse
import copy
import pickle
import random
import re
import sys
import warnings
from pathlib import Path

if __name__ == "__main__":  # python -P leaves this folder out
    sys.path[:0] = [str(Path(__file__).resolve().parent / name) for name in ("", "support")]

from medium import Medium

from smmufast import Caches, Features, layout
from smmufast.faults import AtsFault
from smmufast.iommu import (
    AUX,
    BLOCKED,
    IDENTITY,
    NOW,
    AddressSpace,
    AttachHandle,
    Cpu,
    Device,
    InvalidArgument,
    IommuError,
    System,
    Viommu,
)

RAM = 0x1_0000_0000
PAGE = 0x1000
TOP = 0x7FFF_FFFF_F000
IOVAS = (0, 0x1000, 0x2000, 0x1F_F000, 0x20_0000, 0x40_0000_0000, TOP)
BLOCK_PAGES = 512
STEPS = 120
# of a guest: what it has for itself, and where its stage 1 leads to
GUEST_OWN = 0x6000_0000
GUEST_OUT = 0x6800_0000
FLYING = 0x50_0000_0000  # faults in flight have pages of their own


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


class Wrong(AssertionError):  # noqa: N818
    """A life went wrong."""


class Thrown(Exception):  # noqa: N818
    """What a callback of the host raises."""


class Refused(Exception):  # noqa: N818
    """What the memory raises."""


TABLES, TABLES_SIZE = 1 << 38, 1 << 24


def medium():
    """Memory of tables that refuses one store, behind memory that is plain."""
    made = Medium(TABLES, TABLES_SIZE, Refused)
    made.memory.add_private(0, TABLES)
    return made


class Space:
    """An address space: a domain or a process, and the pages that it should have."""

    def __init__(self, name, thing, lazy, process=False):
        self.name, self.thing, self.lazy, self.process = name, thing, lazy, process
        self.pages = {}
        self.blocks = {}  # addresses of pages of 2 MiB, which go as a whole
        self.bonds = {}  # of a process, by device
        self.gone = False

    @property
    def table(self):
        return self.thing.table if self.process else self.thing

    def pa(self, iova):
        frame = self.pages.get(iova & -PAGE)
        return None if frame is None else frame + iova % PAGE

    def __repr__(self):
        return self.name


class Guest:
    """A guest's SMMU and its stage 1, which puts the first 2 MiB at `out`; or its bypass."""

    def __init__(self, name, viommu, host):
        self.name, self.viommu, self.host = name, viommu, host
        self.out = GUEST_OUT

    def __repr__(self):
        return self.name


class Nested:
    """What a guest's STE makes of a device: stage 1 or bypass."""

    def __init__(self, name, guest, domain, stage1):
        self.name, self.guest, self.thing, self.stage1 = name, guest, domain, stage1

    def pa(self, iova):
        if not self.stage1:
            return self.guest.host.pa(iova)
        return self.guest.host.pa(self.guest.out + iova) if iova < 1 << 21 else None

    def __repr__(self):
        return self.name


class Whole:
    """IDENTITY or BLOCKED: each is one object, also after a copy."""

    lazy = False
    known = {}  # noqa: RUF012

    def __new__(cls, name, thing):
        return cls.known.setdefault(name, super().__new__(cls))

    def __init__(self, name, thing):
        self.name, self.thing = name, thing

    def __reduce__(self):
        return Whole, (self.name, self.thing)

    def pa(self, iova):
        return iova if self.thing is IDENTITY else None

    def __repr__(self):
        return self.name


BLOCK, SAME = Whole("BLOCKED", BLOCKED), Whole("IDENTITY", IDENTITY)


class Life:
    """One system, driven at random."""

    def __init__(self, seed, without=(), lost=None):
        self.seed = seed
        self.lost = lost  # a command that no SMMU hears
        self.without = without
        self.log = []
        self.step = -1
        rng = self.rng = random.Random(f"{seed}")
        self.aux = bool(seed & 1)
        self.model = rng.choice([0, 0, 0, 1, 0 if "forced stalls" in without else 2])
        self.wide = bool(rng.randrange(2))
        features = Features.full().replace(
            stall_model=self.model, sidsize=10 if self.wide else 6, asid16=rng.randrange(2),
            ril=rng.randrange(2), cmdqs=rng.choice([1, 2, 19]), eventqs=rng.choice([1, 19, 19]),
            priqs=rng.choice([1, 19, 19]),
        )  # fmt: skip
        self.features = features
        kind = rng.choice(["blocked", "blocked", "identity", "paging"])
        if kind == "paging" and "default domains" in without:
            kind = "blocked"
        caches = rng.choice([None, Caches.small, Caches.server, Caches.server])
        count = rng.choice([1, 1, 2])
        self.medium = None if rng.randrange(4) or "refusals" in without else medium()
        where = {} if self.medium is None else {
            "memory": self.medium.memory, "pages": (TABLES, TABLES_SIZE)}  # fmt: skip
        self.system = System(
            count, **where, features=features, profile=AUX if self.aux else NOW, caches=caches,
            default_domain=kind, e2h=not rng.randrange(4),
            cpu=Cpu(asid_bits=16 if features.asid16 else 8),
        )  # fmt: skip
        self.say(
            f"System({count}, profile={self.system.profile.name}, default_domain={kind!r}, "
            f"caches={getattr(caches, '__name__', None)}, stall_model={self.model}, "
            f"sidsize={features.sidsize}, ril={features.ril}, e2h={self.system.e2h}, "
            f"cmdqs={features.cmdqs}, eventqs={features.eventqs}, priqs={features.priqs}, "
            f"refusals={self.medium is not None})"
        )
        for iommu in self.system.iommus if lost else ():
            lose(iommu.queue, lost)
        self.start_pages = self.system.pages.in_use
        self.devices, self.away = [], []
        self.main, self.at, self.reset, self.defaults = {}, {}, {}, {}
        self.picked = {}  # PASIDs that were chosen by hand: whose they are
        self.spaces, self.guests, self.nested, self.shares = [], [], [], []
        self.dead = []  # processes that ended, and are bound or have a table
        self.names, self.numbers = {}, {}
        self.flying = {}  # page of a fault: whose it is
        self.partial = []
        self.accessing = None
        self.callback = None
        self.busy = 0  # handlers that are running
        self.refuse = None  # stores of the next call before the one that is refused
        self.throws = 0  # one in so many callbacks raises; 0: none
        self.called = 0  # callbacks
        self.result = None
        bits = 3
        self.kinds = [
            dict(pasid_bits=bits), dict(pasid_bits=bits, ats=True),
            dict(pasid_bits=bits, ats=True, pri=True), dict(pasid_bits=bits, stall=True),
            dict(), dict(pasid_bits=11), dict(ats=True), dict(pasid_bits=bits, coherent=False),
            dict(pasids=5), dict(direct=((0x2000, PAGE),)),
            dict(pasid_bits=bits, two=True, ats=True),
        ]  # fmt: skip
        self.pasids = [1, 2, 3, 4, 7]
        self.freed = []
        for _ in range(rng.choice([2, 3])):
            self.plug()

    # --- names and the log ---

    def say(self, text):
        self.log.append(f"{self.step:4} {'    ' * getattr(self, 'busy', 0)}{text}")

    def call_it(self, prefix, thing):
        self.numbers[prefix] = self.numbers.get(prefix, 0) + 1
        self.names[thing] = name = f"{prefix}{self.numbers[prefix]}"
        return name

    def name(self, thing):
        return self.names.get(thing) or getattr(thing, "name", None) or repr(thing)

    def wrong(self, what):
        raise Wrong(what)

    def pick(self, things):
        things = list(things)
        return self.rng.choice(things) if things else None

    # --- calls ---

    def do(self, text, call, *args, must=None, **more):
        """Make a call; whether it was accepted.  A refused one has changed nothing.

        `must`: True if it has to be accepted, False if it has to be refused.
        """
        self.say(text)
        place = len(self.log) - 1
        before, flying = self.picture(), bool(self.flying or self.partial)
        self.result = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if self.medium is not None:
                    self.medium.left, self.refuse = self.refuse, None
                self.result = call(*args, **more)
        except Thrown:
            self.log[place] += "    # a callback raises: it is done"
        except Refused:
            done = before != self.picture()
            self.log[place] += f"    # a store is refused: {'done' if done else 'not done'}"
            if must is False:
                self.wrong(f"begun, and must not be: {text}")
            return done
        except IommuError as error:
            self.log[place] += f"    # {type(error).__name__}: {error}"
            if must is True:
                self.wrong(f"refused, and must not be: {text}: {type(error).__name__}: {error}")
            after = self.picture()
            for key in before.keys() | after.keys():
                if before.get(key) != after.get(key) and not (flying and key == "pages"):
                    self.wrong(f"refused, and changed {key}: {text}: {error}\n"
                               f"{before.get(key)}\n{after.get(key)}")  # fmt: skip
            return False
        except Wrong:
            raise
        except Exception as error:
            self.wrong(f"broke: {text}: {type(error).__name__}: {error}")
        finally:
            if self.medium is not None:
                self.medium.left = None
        if must is False:
            self.wrong(f"accepted, and must not be: {text}")
        return True

    def picture(self):
        """What a refused call must leave as it was."""
        system = self.system
        memory = system.memory
        seen = {
            "pages": (system.pages.in_use, system.pages.blocks), "pasids": list(system.pasids),
            "asids": list(system.asids),
        }  # fmt: skip
        for iommu in system.iommus:
            seen["vmids", iommu.number] = list(iommu.vmids)
            seen["devices", iommu.number] = sorted(
                (sid, self.name(device)) for sid, device in iommu.devices.items()
            )
        for device in self.devices:
            if device._group is None:
                continue  # it was released, and then something raised
            name, group = self.name(device), device.group
            table = device.master.table
            cds = {}
            for ssid in (0, *self.pasids) if table is not None else ():
                where = table.address(ssid) if ssid < 1 << table.s1cdmax else None
                cds[ssid] = where if where is None else memory.read(where, 64)
            seen["stes", name] = [memory.read(device.iommu.ste_address(s), 64) for s in device.sids]
            seen["cds", name] = cds
            seen["device", name] = (
                device.domain, device.ats_enabled, device.pasid_enabled, dict(device.aux),
                dict(device.enabled_features), list(device.shares),
            )  # fmt: skip
            seen["group", name] = (
                group.domain, group.default, dict(group.pasids), group.resetting,
                list(group.devices),
            )  # fmt: skip
        for space in self.spaces:
            thing, table = space.thing, space.table
            if space.process:
                seen["process", space.name] = thing.pasid, thing.exited, list(thing.bonds)
            if table.ready:
                seen["table", space.name] = (table.mapped, *map(table.iova_to_phys, IOVAS))
            if not space.process:
                seen["domain", space.name] = thing.asid, thing.vmid, thing.freed
        return seen

    # --- callbacks ---

    def throw(self, *_):
        """Raise now and then, in whatever the system calls."""
        self.called += 1
        if self.throws and self.called % self.throws == 0:
            raise Thrown

    def disturb(self):
        """Let callbacks raise from now on, or no more."""
        self.throws = self.pick([0, 0, 1, 2, 3, 7])
        self.say(f"callbacks raise: one in {self.throws}" if self.throws else "no callback raises")
        self.hear()

    def hear(self):
        """Be called by the system, wherever it calls."""
        throw = self.throw if self.throws else None
        self.system.on_fault = throw
        for iommu in self.system.iommus:
            iommu.writer.observer = throw
        for device in self.devices:
            device.mm_exit = throw

    def refused(self):
        """A store is refused in the middle of a call."""
        if self.medium is None:
            return
        self.refuse = self.rng.choice([0, 1, 2, 3, 4, 5, 7, 9, 12, 16, 24])
        self.say(f"store {self.refuse} of a call will be refused")
        more = ["aux_feature", "aux_domain", "aux_domain"] if self.aux else ["pasid"] * 3
        getattr(self, self.pick([*self.REFUSED, *more]))()
        self.refuse = None

    # --- copies ---

    def go_on(self):
        """Save the system, and go on with what was made of that."""
        if self.busy or self.lost is not None:
            return
        self.result = None
        kept = {name: value for name, value in vars(self).items() if name not in self.OUTSIDE}
        system, more = self.system, {}
        how = self.pick(["in place"] if self.medium is not None else [
            "deepcopy", "pickle", "in place", "out of band"])  # fmt: skip
        self.say(f"system goes on, {how}")
        system.life = kept
        try:
            if how == "deepcopy":
                made = copy.deepcopy(system)
            elif how == "pickle":
                made = pickle.loads(pickle.dumps(system))
            else:
                memory = system.memory
                more["classes"] = [Space, Guest, Nested, Whole]
                state = system.save()
                made = System.restore(state, memory if how == "in place" else memory.copy(), **more)
        except Exception as error:
            self.wrong(f"cannot be saved: {type(error).__name__}: {error}")
        finally:
            del system.life
        found = made.check()
        if found:
            self.wrong("check: of what was saved: " + "; ".join(map(str, found)))
        vars(self).update(made.life)
        del made.life
        self.system = made
        for space in [*self.spaces, *self.dead]:
            if space.lazy and space.process:
                space.thing.handler = self.handler(space)
            elif space.lazy:
                space.thing.iopf = self.handler(space)
        self.hear()

    OUTSIDE = ("log", "rng", "system", "medium", "callback", "without", "result")

    # --- the model ---

    def group(self, device):
        return device.group

    def reach(self, device, pasid):
        """What an access meets, and whether it may as well be blocked."""
        group = device.group
        if group in self.reset:
            return BLOCK, False
        main = self.main[group]
        if not pasid:
            return main, False
        if not device.max_pasids or pasid >= device.max_pasids:
            return BLOCK, False
        if not self.aux:
            return self.at[group].get(pasid, BLOCK), False
        if not isinstance(main, Space) or main.thing.stage != 1:
            return BLOCK, False
        own = self.at[group].get(pasid)
        if own is not None:
            return own, False
        # the CD table is the main domain's: what is attached on one is reached by all
        for other in self.at:
            if other is not group and self.main[other] is main and pasid in self.at[other]:
                return self.at[other][pasid], True
        for other in self.devices:
            if self.main[other.group] is main:
                for domain in other.aux.values():
                    if domain.aux_pasid == pasid:
                        return next(s for s in self.spaces if s.thing is domain), True
        return BLOCK, False

    def holders(self, space):
        """Who is attached to an address space: (group, PASID)."""
        found = [(g, 0) for g, m in self.main.items() if self.under(m) is space]
        return found + [(g, p) for g, at in self.at.items() for p, s in at.items() if s is space]

    def under(self, target):
        return target.guest.host if isinstance(target, Nested) else target

    # --- faults ---

    def handler(self, space):
        def answer(fault):
            return self.asked(space, fault)

        return answer

    def asked(self, space, fault):
        """A handler is asked for a page: only the owner's, and only for a device that is there."""
        page = fault.iova & -PAGE
        who = f"{self.name(fault.device)} pasid {fault.pasid} at {fault.iova:#x}"
        self.say(f"  ({space.name} is asked: {who})")
        if page in self.flying:
            owner = self.flying.pop(page)
            if owner is None:  # asked for before anybody was attached
                owner = self.reach(fault.device, fault.pasid)[0]
            if owner is not space:
                self.wrong(f"a handler sees somebody else's fault: {space} that of {owner}: {who}")
        elif self.accessing is None:
            self.wrong(f"a handler sees a fault that nobody made: {space}: {who}")
        elif self.accessing[0] is not fault.device or (self.accessing[1] or 0) != (
            fault.pasid or 0
        ):
            self.wrong(f"a handler sees a fault of another device: {space}: {who}")
        elif self.reach(fault.device, fault.pasid)[0] is not space and not self.changed:
            self.wrong(f"a handler sees a fault that is not its own: {space}: {who}")
        if self.callback is not None and not self.busy:
            rng, self.callback = self.callback, None
            kept, self.rng = self.rng, rng
            self.busy += 1
            self.changed = True
            try:
                getattr(self, self.pick(self.CALLBACKS))()
            finally:
                self.busy -= 1
                self.rng = kept
        self.throw()
        if space.gone or space.lazy != "maps" or page in space.pages:
            return page in space.pages
        try:
            space.table.map(page, RAM + PAGE, PAGE)
        except IommuError:
            return False
        space.pages[page] = RAM + PAGE
        return True

    changed = False

    def stalls(self, device):
        return self.model == 2 or (self.model == 0 and device.stall)

    # --- accesses ---

    def probe_access(self, device, pasid, iova, through_atc, write=False):
        """One access, compared with the model."""
        target, maybe = self.reach(device, pasid)
        self.accessing = device, pasid
        self.changed = False
        text = f"{self.name(device)}.{'access' if through_atc else 'translate'}({iova:#x}, {pasid})"
        owner = self.under(target)
        mapped = target.pa(iova) is not None
        ats = device.ats_enabled and through_atc
        may_ask = (
            isinstance(target, Space)
            and target.lazy == "maps"
            and not (target.process and target.gone)
            and not maybe
        )
        asks = device.pri_supported and all(atc.pri_enabled for atc in device.atcs)
        resolved = may_ask and (asks if ats else self.stalls(device) and (
            target.thing.stage == 1 if not target.process else True))  # fmt: skip
        try:
            number = self.rng.randrange(len(device.sids))
            if through_atc and number:
                result = device.atcs[number].access(iova, ssid=pasid, write=write)
            elif through_atc:
                result = device.access(iova, pasid=pasid, write=write)
            else:
                result = device.translate(iova, pasid=pasid, write=write, sid=device.sids[number])
            pa = result.pa
        except AtsFault:
            pa = None
        except Thrown:
            return
        except IommuError as error:
            if pasid and not device.pasid_enabled:
                return
            else:
                self.wrong(f"access broke: {text}: {type(error).__name__}: {error}")
        finally:
            self.accessing = None
        if device not in self.devices:
            return  # a handler took it away
        target, maybe = self.reach(device, pasid)
        wanted = target.pa(iova)
        good = pa == wanted or (pa is None and (maybe or self.changed))
        if not good:
            self.wrong(f"reaches {shown(pa)}, not {shown(wanted)} ({target} of {owner}): {text}")
        if not mapped and resolved and pa is None and not self.changed and not self.flying:
            self.wrong(f"was not resolved: {text}")

    def look(self, pairs, faults):
        """Some accesses at mapped and, with `faults`, at unmapped addresses."""
        rng = self.rng
        for device, pasid in pairs:
            target, _ = self.reach(device, pasid)
            host = self.under(target)
            good = [iova for iova in self.candidates(target) if target.pa(iova) is not None]
            bad = [iova for iova in self.candidates(target) if target.pa(iova) is None]
            for some in (good, bad if faults else []):
                if some:
                    iova = rng.choice(some) + 8 * rng.randrange(512)
                    faces = [False, True] if device.ats_enabled else [False]
                    rng.shuffle(faces)
                    for face in faces:
                        self.probe_access(device, pasid, iova, face, bool(rng.randrange(2)))
            assert host is not None

    def candidates(self, target):
        extra = list(self.under(target).pages)[:4] if hasattr(self.under(target), "pages") else []
        return dict.fromkeys([*IOVAS, *extra])

    def all_pairs(self):
        return [
            (device, pasid)
            for device in self.devices
            for pasid in (None, *[p for p in self.pasids if p < device.max_pasids])
        ]

    def verify(self, everything=False):
        """What must hold after a step."""
        found = self.system.check()
        if found:
            self.wrong("check: " + "\n".join(f"{f.kind}: {f}" for f in found))
        pairs = self.all_pairs()
        if not everything:
            pairs = self.rng.sample(pairs, min(6, len(pairs)))
        waiting = bool(self.flying or self.partial)
        self.look(pairs, everything or not waiting or not self.rng.randrange(3))
        if everything:
            self.serve()

    def serve(self):
        """Answer everything that waits."""
        self.accessing = None
        try:
            self.system.service()
        except Thrown:
            pass
        except Wrong:
            raise
        except Exception as error:
            self.wrong(f"service broke: {type(error).__name__}: {error}")
        waiting = {one[3] for one in self.partial}
        self.flying = {page: owner for page, owner in self.flying.items() if page in waiting}
        for iommu in self.system.iommus:
            if iommu.smmu.stalls:
                self.wrong(f"stalls are left: {iommu.smmu.stalls}")
        for device in self.devices:
            for atc in device.atcs:
                if atc.outstanding:
                    self.wrong(f"page requests are left: {atc.outstanding}")

    # --- devices come and go ---

    def plug(self):
        """A new device, or one that was there before."""
        if len(self.devices) >= 6:
            return
        old = self.pick(self.away) if self.rng.randrange(2) else None
        groups = [g for g in self.main if g.devices]
        group = self.pick(groups) if groups and not self.rng.randrange(3) else None
        if "joining" in self.without:
            group = None
        if old is not None:
            device, number, group = old[0], old[1], old[2]
            kind = None
        else:
            kind = self.pick(self.kinds)
            if group is not None and "odd members" in self.without:
                first = group.devices[0]
                kind = {"pasid_bits": 3 if first.max_pasids else 0, "stall": first.stall}
            sid = self.numbers.get("d", 0) + 1
            if sid > 60:
                return
            if self.wide:
                sid *= 16  # leaves of the stream table
            number = self.rng.randrange(len(self.system.iommus))
            if group is not None:
                number = group.devices[0].iommu.number
            kind = dict(kind)
            two = kind.pop("two", False) or not self.rng.randrange(4)
            device = Device([sid, sid + 1] if two and self.wide else sid, group=group, **kind)
        name = self.names.get(device) or self.call_it("d", device)
        joins = group is not None and bool(group.devices)
        must = None if joins else True
        text = f"{name} = device(sid={device.sids}, iommu={number}, {kind}"
        text += f", group of {self.name(group.devices[0])})" if joins else ")"
        if not self.do(text, self.system.probe, device, number, must=must):
            if old is None:
                self.away.append((device, number, group))
            return
        if old is not None:
            self.away.remove(old)
        self.devices.append(device)
        self.hear()
        group = device.group
        if len(group.devices) == 1:
            self.defaults.pop(group, None)
            self.main[group], self.at[group] = self.default(group), {}

    def default(self, group):
        """The default domain that a group got with its first device."""
        if group not in self.defaults:
            self.defaults[group] = self.new_default(group)
        return self.defaults[group]

    def new_default(self, group):
        if group.default in (IDENTITY, BLOCKED):
            return SAME if group.default is IDENTITY else BLOCK
        space = Space(f"default of {self.name(group.devices[0])}", group.default, None)
        for base, size in group.devices[0].direct:
            space.pages.update({base + n: base + n for n in range(0, size, PAGE)})
        return space

    def unplug(self):
        """A device goes; what it was attached to stays for the others of its group."""
        device = self.pick(self.devices)
        if device is None or (len(self.devices) < 2 and not self.ending):
            return
        number, group = device.iommu.number, device.group
        for pasid in [pasid for pasid, one in self.picked.items() if one is device]:
            self.unpick(pasid)
        if not self.do(f"{self.name(device)}.release()", device.release, must=True):
            return
        self.devices.remove(device)
        self.away.append((device, number, group if device._wanted_group is not None else None))
        self.shares = [s for s in self.shares if s[0].parent is not device]
        for space in [*self.spaces, *self.dead]:
            kept = [(one, bond) for one, bond in space.bonds.items() if bond.references]
            space.bonds = {one: bond for one, bond in kept if one is not device}
        self.reset.pop(group, None)
        if group.devices:
            # bonds of the device are gone, and what PASIDs nobody can use
            for pasid in list(self.at[group]):
                if pasid not in group.pasids:
                    del self.at[group][pasid]
        else:
            del self.main[group], self.at[group]

    ending = False

    def reset_device(self):
        """A reset begins or ends."""
        if self.reset and self.rng.randrange(2):
            group = self.pick(self.reset)
            device = self.pick(group.devices)
            if self.do(f"{self.name(device)}.reset_done()", device.reset_done, must=True):
                self.reset.pop(group, None)
            return
        device = self.pick(self.devices)
        group = device.group
        must = None if self.aux else len(group.devices) == 1 and group not in self.reset
        if self.do(f"{self.name(device)}.reset_prepare()", device.reset_prepare, must=must):
            self.reset[group] = None

    # --- address spaces ---

    def new_domain(self):
        if sum(not s.process for s in self.spaces) >= 6:
            return None
        device = self.pick(self.devices)
        lazy = self.pick([None, "maps", "refuses"])
        stage = 1 if self.rng.randrange(4) else 2
        if self.aux and (self.rng.randrange(8) or "ready domains" in self.without):
            text, call, more = "system.paging_domain()", self.system.paging_domain, {}
        elif stage == 2 and self.rng.randrange(2):
            text, call = "paging_domain(nest_parent=True)", device.paging_domain
            more = {"nest_parent": True}
        else:
            text, call = f"{self.name(device)}.paging_domain(stage={stage})", device.paging_domain
            more = {"stage": stage}
        domain = call(**more)
        space = Space("", domain, lazy)
        space.name = self.call_it("x", space)
        self.names[domain] = space.name
        if lazy:
            domain.iopf = self.handler(space)
        self.spaces.append(space)
        self.say(f"{space.name} = {text}; iopf {lazy}")
        return space

    def domains(self):
        return [space for space in self.spaces if not space.process]

    def map(self):
        space = self.pick(self.spaces)
        if space is None or space.gone:
            return
        iova = self.pick([*IOVAS, GUEST_OUT, GUEST_OUT + PAGE])
        count = self.pick([1, 1, 1, 3, 16, BLOCK_PAGES])
        if iova >= GUEST_OWN:
            count = min(count, 16)  # a guest's tables are near
        pa = RAM + PAGE * self.rng.randrange(256)
        if count == BLOCK_PAGES and self.rng.randrange(2):
            pa &= -PAGE * BLOCK_PAGES
        wanted = {iova + n * PAGE: pa + n * PAGE for n in range(count)}
        unready = not space.process and space.thing.iommu is None
        must = not unready and not wanted.keys() & space.pages.keys()
        text = f"{space}.map({iova:#x}, {pa:#x}, {count} pages)"
        if self.do(text, space.table.map, iova, pa, count * PAGE, must=must):
            space.pages.update(wanted)
            if count == BLOCK_PAGES and not (iova | pa) % (BLOCK_PAGES * PAGE):
                space.blocks[iova] = None

    def unmap(self):
        space = self.pick(self.spaces)
        if space is None or space.gone:
            return
        iova = self.pick([*IOVAS, *list(space.pages)[:3], GUEST_OUT])
        count = self.pick([1, 1, 1, 3, 16, BLOCK_PAGES])
        if GUEST_OWN <= iova < GUEST_OUT:
            return
        if self.do(f"{space}.unmap({iova:#x}, {count} pages)", space.table.unmap, iova,
                   count * PAGE, must=True):  # fmt: skip
            done = self.result
            for n in range(done // PAGE):
                if space.pages.pop(iova + n * PAGE, None) is None:
                    self.wrong(f"unmapped what was not there: {space} {iova + n * PAGE:#x}")
            space.blocks = {base: None for base in space.blocks if base in space.pages}
            end = iova + done
            inside = end % (BLOCK_PAGES * PAGE) and end & -BLOCK_PAGES * PAGE in space.blocks
            if done < count * PAGE and end in space.pages and not inside:
                self.wrong(f"did not unmap {end:#x} of {space}")

    def free_domain(self):
        space = self.pick(self.domains())
        if space is None:
            return
        used = bool(self.holders(space))
        children = self.aux and bool(getattr(space.thing, "children", None))
        must = None if children else not used
        if self.do(f"{space}.free()", space.thing.free, must=must):
            self.freed = [*self.freed[-3:], space.thing]
            self.drop_space(space)

    def use_freed(self):
        """A freed domain is refused everywhere."""
        domain, device = self.pick(self.freed), self.pick(self.devices)
        if domain is None:
            return
        name, call, more = self.pick([
            ("attach", device.attach, ()), ("replace", device.replace, ()),
            ("group.attach", device.group.attach, ()), ("group.set", device.group.set, ()),
            ("attach_pasid", device.attach_pasid, (2,)), ("attach_aux", device.attach_aux, ()),
            ("mediated().attach", device.mediated().attach, ()), ("map", self.map_freed, ()),
        ])  # fmt: skip
        if name == "group.set" and "group.set" in self.without:
            return
        self.do(f"{self.name(device)}.{name}({self.name(domain)}, which was freed)", call, domain,
                *more, must=False)  # fmt: skip

    def map_freed(self, domain):
        domain.map(0, RAM, PAGE)

    def claim(self):
        group = self.pick(self.main)
        name = self.name(group.devices[0])
        if group.owner is not None:
            same = self.aux or group.domain is group.default or group.default is BLOCKED
            must = None if same else group not in self.reset
            if self.do(f"{name}.group.release()", group.release, must=must):
                self.main[group] = self.default(group)
            return
        direct = any(device.direct for device in group.devices)
        free = group.domain is group.default and not self.at[group] and group not in self.reset
        must = None if self.aux or direct or group.default is BLOCKED else free
        if self.do(f"{name}.group.claim()", group.claim, SAME, must=must):
            self.main[group] = BLOCK

    def drop_space(self, space):
        space.gone = True
        self.spaces.remove(space)
        self.guests = [guest for guest in self.guests if guest.host is not space]
        self.nested = [nested for nested in self.nested if nested.guest.host is not space]

    def change_asid(self):
        space = self.pick(s for s in self.domains() if s.thing.asid)
        if space is not None:
            self.do(f"{space}.change_asid()", space.thing.change_asid, must=True)

    def enforce(self):
        space = self.pick(self.domains())
        if space is not None and not self.rng.randrange(3):
            self.do(f"{space}.enforce_cache_coherency()", space.thing.enforce_cache_coherency)

    # --- main domains ---

    def targets(self):
        return [BLOCK, SAME, *self.domains(), *self.nested]

    def beyond_guests(self, group, target):
        """A guest cannot invalidate the ATCs of a device with several StreamIDs."""
        return isinstance(target, Nested) and any(d.ats and len(d.sids) > 1 for d in group.devices)

    def can_attach(self, group, target):
        """Whether the main domain may be attached; None: the model does not know."""
        if group in self.reset:
            return False
        if target is BLOCK or target is SAME:
            direct = target is BLOCK and any(device.direct for device in group.devices)
            return not direct and (None if self.aux else True)
        iommu = group.devices[0].iommu
        domain = self.under(target).thing
        if domain.iommu is not None and domain.iommu is not iommu:
            return False
        if (isinstance(target, Nested) or domain.stage == 2) and self.at[group]:
            return False
        if domain.coherent_only and not all(d.coherent for d in group.devices):
            return None if isinstance(target, Nested) else False
        return None if self.aux else True

    def set_main(self, group, target):
        """A device of a group has another main domain; a guest forgets what it had cached."""
        old, self.main[group] = self.main[group], target
        if isinstance(old, Nested) and old.stage1 and old.guest in self.guests:
            word = layout.pack("TLBI_NH_ALL")
            self.do(f"{old.guest} invalidates", old.guest.viommu.invalidate,
                    [(word & (1 << 64) - 1, word >> 64)], must=True)  # fmt: skip

    def replace_main(self, device, target):
        if self.beyond_guests(device.group, target):
            return
        must = None if target is self.main[device.group] else self.can_attach(device.group, target)
        if self.do(f"{self.name(device)}.replace({target})", device.replace, target.thing,
                   must=must):  # fmt: skip
            self.set_main(device.group, target)

    def attach(self):
        group = self.pick(self.main)
        targets = self.targets()
        if self.rng.randrange(4):
            targets = targets[2:] or targets
        target = self.pick(targets)
        device = self.pick(group.devices)
        if self.beyond_guests(group, target):
            return
        name = self.name(device)
        how = self.pick(["attach", "replace", "replace", "group"])
        current = self.main[group]
        free = group.domain is group.default or group.domain is BLOCKED
        must = self.can_attach(group, target)
        if target is current:
            must = None
        if how == "replace":
            self.replace_main(device, target)
            return
        if how == "attach":
            if len(group.devices) > 1 or not free:
                must = False
            done = self.do(f"{name}.attach({target})", device.attach, target.thing, must=must)
        else:
            must = must if free else False
            done = self.do(f"{name}.group.attach({target})", group.attach, target.thing, must=must)
        if done:
            self.set_main(group, target)

    def detach(self):
        group = self.pick(self.main)
        target = self.main[group]
        device = self.pick(group.devices)
        must = None if self.aux or group.default is BLOCKED else group not in self.reset
        direct = any(one.direct for one in group.devices)
        if direct or target is BLOCK or target.thing is group.default:
            must = None
        if self.do(f"{self.name(device)}.group.detach({target})", group.detach, target.thing,
                   must=must):  # fmt: skip
            self.set_main(group, BLOCK if group.owner is not None else self.default(group))

    # --- PASIDs ---

    def pasid(self):
        group = self.pick(self.main)
        device = self.pick(group.devices)
        space = self.pick(self.domains())
        pasid = self.pick(self.pasids)
        if space is None:
            return
        held = pasid in self.at[group] and self.rng.randrange(2)
        if held and self.shared(group, pasid) and "robbed shares" in self.without:
            return
        if held and self.rng.randrange(2):
            self.detach_one(device, pasid)
        elif held:
            self.replace_one(device, pasid, space)
        else:
            self.attach_pasid(device, space, pasid)

    def detach_one(self, device, pasid):
        group = device.group
        held = self.at[group][pasid]
        must = None if held.process or self.shared(group, pasid) else group not in self.reset
        if self.do(f"{self.name(device)}.detach_pasid({held}, {pasid})", device.detach_pasid,
                   group.at(pasid), pasid, must=must):  # fmt: skip
            del self.at[group][pasid]

    def replace_one(self, device, pasid, space):
        group = device.group
        must = self.can_have_pasid(group, space, pasid)
        if self.at[group][pasid].process or self.shared(group, pasid):
            must = None
        if self.do(f"{self.name(device)}.replace_pasid({space}, {pasid})", device.replace_pasid,
                   space.thing, pasid, AttachHandle(), must=must):  # fmt: skip
            self.at[group][pasid] = space

    def attach_pasid(self, device, space, pasid):
        group = device.group
        must = self.can_have_pasid(group, space, pasid)
        must = False if pasid in self.at[group] else must
        if self.do(f"{self.name(device)}.attach_pasid({space}, {pasid})", device.attach_pasid,
                   space.thing, pasid, must=must):  # fmt: skip
            self.at[group][pasid] = space

    def can_have_pasid(self, group, space, pasid):
        members = [device for device in group.devices if device.max_pasids]
        if group in self.reset or not members or min(d.max_pasids for d in members) <= pasid:
            return False
        domain = space.thing
        if domain.stage != 1 or domain.iommu is not members[0].iommu:
            return False
        if isinstance(self.main[group], Nested) or self.main[group].thing.stage > 1:
            return False
        return not domain.coherent_only or all(d.coherent for d in members)

    def pick_pasid(self):
        """A driver takes a PASID for itself, or gives it back."""
        if self.picked and self.rng.randrange(2):
            self.unpick(self.pick(self.picked))
            return
        device = self.pick(self.devices)
        most = min((one.max_pasids for one in device.group.devices if one.max_pasids), default=0)
        must = bool(device.max_pasids and self.free_pasid(most)) and not self.aux
        if self.do(f"{self.name(device)}.alloc_pasid()", device.alloc_pasid, must=must):
            self.say(f"  (it is {self.result})")
            self.picked[self.result] = device

    def unpick(self, pasid):
        device = self.picked[pasid]
        if self.do(f"{self.name(device)}.free_pasid({pasid})", device.free_pasid, pasid, must=True):
            del self.picked[pasid]

    def switch_pasids(self):
        """The driver of a device switches its PASIDs off and on."""
        device = self.pick(self.devices)
        name = self.name(device)
        if device.pasid_enabled:
            must = not device.ats_enabled and not any(device.master.attachments)
            self.do(f"{name}.disable_pasid()", device.disable_pasid, must=must)
        else:
            must = not device.ats_enabled
            self.do(f"{name}.enable_pasid()", device.enable_pasid, must=must)

    def add_smmu(self):
        """One more SMMU."""
        if len(self.system.iommus) >= 3:
            return
        before = self.system.pages.in_use
        features = self.features.replace(ssidsize=self.pick([20, 20, 2, 0]))
        caches = self.pick([None, Caches.small, Caches.server])
        text = (f"system.add_iommu(ssidsize={features.ssidsize}, "
                f"caches={getattr(caches, '__name__', None)})")  # fmt: skip
        if self.do(text, self.system.add_iommu, features, caches=caches, must=True):
            self.start_pages += self.system.pages.in_use - before
            if self.lost is not None:
                lose(self.system.iommus[-1].queue, self.lost)
            self.hear()

    def shared(self, group, pasid):
        return any(share.parent.group is group and share.pasid == pasid for share, _ in self.shares)

    # --- mediated shares ---

    def share(self):
        if self.shares and self.rng.randrange(2):
            self.end_share(self.pick(self.shares))
            return
        device, space = self.pick(self.devices), self.pick(self.domains())
        if space is None:
            return
        share = device.mediated()
        name = self.call_it("m", share)
        text = f"{name} = {self.name(device)}.mediated(); {name}.attach({space})"
        # two shares of a parent may be of one domain
        twice = any(one.parent is device and held is space for one, held in self.shares)
        must = True if twice and device.group not in self.reset and self.room(device) else None
        if must and "two shares of a domain" in self.without:
            return
        if self.do(text, share.attach, space.thing, must=must):
            self.shares.append((share, space))
            self.at[device.group][share.pasid] = space

    def room(self, device):
        """Whether a share finds a PASID; the AUX profile needs no other one."""
        if "hand-picked PASIDs" in self.without:
            return False
        most = min(one.max_pasids for one in device.group.devices if one.max_pasids)
        return self.aux or self.free_pasid(most)

    def free_pasid(self, most):
        """Whether nobody has, or attached, some PASID below."""
        held = {pasid for at in self.at.values() for pasid in at}
        return any(p not in self.system.pasids and p not in held for p in range(1, most))

    def end_share(self, pair):
        share, _ = pair
        group, pasid = share.parent.group, share.pasid
        must = True if group not in self.reset else None
        if self.do(f"{self.name(share)}.detach()", share.detach, must=must):
            self.shares.remove(pair)
            if self.aux:
                self.forget_aux(group)
            else:
                self.at[group].pop(pasid, None)

    # --- processes ---

    def new_process(self):
        if sum(s.process for s in self.spaces) >= 3:
            return None
        lazy = self.pick([None, "maps", "maps", "refuses"])
        space = Space("", None, lazy, process=True)
        asid = self.pick([None, None, 1, 2]) if self.aux else None
        if asid and any(s.thing.asid == asid for s in [*self.spaces, *self.dead] if s.process):
            asid = None
        space.thing = AddressSpace.of(
            self.system, asid=asid, handler=self.handler(space) if lazy else None
        )
        space.name = self.call_it("p", space)
        self.names[space.thing] = space.name
        self.spaces.append(space)
        self.say(f"{space.name} = AddressSpace.of(system, asid={asid}); handler {lazy}")
        return space

    def processes(self):
        return [space for space in self.spaces if space.process]

    def bind(self):
        able = [device for device in self.devices if device.max_pasids]
        if self.aux and self.rng.randrange(4):
            able = [device for device in able if "SVA" in device.enabled_features]
        space, device = self.pick(self.processes()), self.pick(able or self.devices)
        if space is not None:
            self.bind_one(device, space)

    def bind_one(self, device, space):
        group = device.group
        must = None
        if not self.aux and device.max_pasids and group not in self.reset:
            main = self.main[group]
            paged = not isinstance(main, Nested) and main.thing.stage < 2
            pasid = space.thing.pasid
            free = pasid and pasid not in self.at[group] and all(
                pasid < d.max_pasids for d in group.devices if d.max_pasids
            )  # fmt: skip
            if not pasid and "hand-picked PASIDs" not in self.without:
                most = min(d.max_pasids for d in group.devices if d.max_pasids)
                free = self.free_pasid(most)
            must = True if device in space.bonds or (paged and free) else None
            if self.stalls(device) and len(device.sids) > 1:
                must = None
        if self.do(f"{self.name(device)}.bind({space})", device.bind, space.thing, must=must):
            space.bonds[device] = self.result or group.attachment(space.thing.pasid).handle
            self.at[group][space.thing.pasid] = space

    def unbind(self):
        space = self.pick(s for s in [*self.spaces, *self.dead] if s.bonds)
        if space is None:
            return
        self.end_bond(space, self.pick(space.bonds), bool(self.rng.randrange(2)))

    def end_bond(self, space, device, force):
        bond, group, pasid = space.bonds[device], device.group, space.thing.pasid
        must = group not in self.reset or None
        if self.do(f"{self.name(device)} unbinds {space}, force={force}", bond.unbind, force=force,
                   must=must) and not bond.references:  # fmt: skip
            # the devices of a group share it
            space.bonds = {one: held for one, held in space.bonds.items() if held is not bond}
            self.at[group].pop(pasid, None)
            self.bury()

    def bury(self):
        for space in list(self.dead):
            if not space.bonds:
                space.thing.table.close()
                self.dead.remove(space)

    def exit(self):
        space = self.pick(self.processes())
        if space is not None:
            self.end_process(space)

    def end_process(self, space):
        if self.do(f"{space}.exit()", space.thing.exit, must=True):
            space.gone = True
            space.pages.clear()
            self.spaces.remove(space)
            self.dead.append(space)
            self.bury()

    def close_table(self):
        """Take the tables of a process away while it is bound: never."""
        space = self.pick(s for s in self.processes() if s.bonds)
        if space is None:
            return
        text, call = self.pick([
            ("close()", space.thing.table.close), ("ready = False", self.unready),
        ])  # fmt: skip
        self.do(f"{space}.table.{text}", call, *[space] * (call == self.unready), must=False)

    def unready(self, space):
        space.thing.table.ready = False

    def copy_process(self):
        """A bound process, and a domain, are not copied by halves."""
        space = self.pick(s for s in self.spaces if s.bonds or not s.process)
        if space is not None:
            self.do(f"copy.copy({space})", copied, space.thing, must=False)

    # --- guests ---

    def new_guest(self):
        hosts = [guest.host for guest in self.guests]
        hosts += [s for s in self.domains() if s.thing.nest_parent]
        host = self.pick(hosts)
        if len(self.guests) >= 3:
            return
        if host is None:
            device = self.pick(self.devices)
            domain = device.paging_domain(nest_parent=True)
            host = Space("", domain, None)
            host.name = self.call_it("x", host)
            self.names[domain] = host.name
            self.spaces.append(host)
            self.say(f"{host.name} = {self.name(device)}.paging_domain(nest_parent=True)")
        if self.rng.randrange(2) and not host.pages:
            for out in (GUEST_OUT, GUEST_OUT + 16 * PAGE):
                pa = RAM + PAGE * self.rng.randrange(256)
                host.thing.map(out, pa, 16 * PAGE)
                host.pages.update({out + n * PAGE: pa + n * PAGE for n in range(16)})
            self.say(f"{host.name} maps {GUEST_OUT:#x}")
        guest = Guest("", Viommu(host.thing), host)
        guest.name = self.call_it("v", guest)
        number = self.numbers["v"] % 64
        guest.own = GUEST_OWN + 0x10000 * number
        guest.ram = RAM + 0x1000_0000 + 0x10000 * number
        guest.out = GUEST_OUT + PAGE * 16 * (number % 2)
        wanted = {guest.own + n * PAGE: guest.ram + n * PAGE for n in range(4)}
        if wanted.keys() & host.pages.keys():
            return
        host.thing.map(guest.own, guest.ram, 4 * PAGE)
        host.pages.update(wanted)
        self.guests.append(guest)
        own = guest.own
        self.record("CD", guest.ram, V=1, AA64=1, A=1, R=1, T0SZ=25, TG0=0, IPS=5, EPD1=1, ASID=1,
                    TTB0=own + PAGE, MAIR0=0xFF, S=int(self.model == 2))  # fmt: skip
        self.record("PTE_S1_TABLE", guest.ram + PAGE, Valid=1, Type=1, Addr_4K=own + 2 * PAGE)
        self.record("PTE_S1_TABLE", guest.ram + 2 * PAGE, Valid=1, Type=1, Addr_4K=own + 3 * PAGE)
        self.guest_pages(guest)
        self.say(f"{guest} = Viommu({host}); its tables at {own:#x}, pages from {guest.out:#x} on")

    def record(self, name, address, **fields):
        data = layout.to_bytes(name, layout.pack(name, **fields))
        self.system.memory.write(address, data)

    def guest_pages(self, guest):
        for n in range(512):
            self.record("PTE_S1", guest.ram + 3 * PAGE + 8 * n, Valid=1, Type=1, AF=1, AP=1, SH=3,
                        nG=1, Addr_4K=guest.out + n * PAGE)  # fmt: skip

    def nest(self):
        guest = self.pick(self.guests)
        if guest is None or len(self.nested) >= 5:
            return
        stage1 = bool(self.rng.randrange(2))
        eats = self.rng.randrange(2)
        if not stage1 and "ATS of guests that bypass" in self.without:
            eats = 0
        fields = {"V": 1, "Config": 5 if stage1 else 4, "EATS": eats}
        if stage1:
            fields["S1ContextPtr"] = guest.own
        word = layout.pack("STE", **fields)
        domain = guest.viommu.domain((word & (1 << 64) - 1, word >> 64 & (1 << 64) - 1))
        nested = Nested("", guest, domain, stage1)
        nested.name = self.call_it("n", nested)
        self.names[domain] = nested.name
        self.nested.append(nested)
        self.say(f"{nested} = {guest}.domain({'stage 1' if stage1 else 'bypass'}, EATS={eats})")
        near = [d for d in self.devices if d.iommu is guest.host.thing.iommu]
        if near and self.rng.randrange(4):
            self.replace_main(self.pick(near), nested)

    def guest_changes(self):
        """A guest moves its pages, and says so with its own commands."""
        guest = self.pick(self.guests)
        if guest is None:
            return
        guest.out = GUEST_OUT + PAGE * 16 * self.rng.randrange(2)
        self.guest_pages(guest)
        words = [layout.pack(self.pick(["TLBI_NH_ALL", "TLBI_NH_ASID"]))]
        if words[0] & 0xFF == layout.pack("TLBI_NH_ASID") & 0xFF:
            words = [layout.pack("TLBI_NH_ASID", ASID=1)]
        for device in self.devices:
            main = self.main[device.group]
            if isinstance(main, Nested) and main.guest is guest and len(device.sids) == 1:
                vsid = device.sid + 0x100
                if guest.viommu.devices.get(vsid) is not device:
                    guest.viommu.devices.pop(vsid, None)
                    guest.viommu.add(vsid, device)
                words.append(layout.pack("ATC_INV", StreamID=vsid, Size=52))
        pairs = [(word & (1 << 64) - 1, word >> 64) for word in words]
        self.do(f"{guest} has its pages at {guest.out:#x}; invalidates", guest.viommu.invalidate,
                pairs, must=True)  # fmt: skip

    # --- auxiliary domains ---

    def aux_feature(self):
        able = [device for device in self.devices if device.max_pasids]
        device = self.pick(able or self.devices)
        feature = self.pick(["AUX", "AUX", "SVA", "IOPF"])
        name = self.name(device)
        how = self.pick(["enable"] * 6 + ["disable", "init"] + ["shutdown"] * bool(self.busy))
        if not self.rng.randrange(20):
            how = "shutdown"
        if how == "enable":
            if feature == "SVA" and device.has_feature("IOPF"):
                self.do(f"{name}.enable_feature('IOPF')", device.enable_feature, "IOPF")
            self.do(f"{name}.enable_feature({feature!r})", device.enable_feature, feature)
        elif how == "disable":
            self.do(f"{name}.disable_feature({feature!r})", device.disable_feature, feature)
        elif how == "init":
            features = ["AUX", "IOPF"] if device.has_feature("IOPF") else ["AUX"]
            self.do(f"{name}.init({features})", device.init, features)
        else:
            must = None if device.group in self.reset else True
            if self.do(f"{name}.shutdown()", device.shutdown, must=must):
                self.shares = [s for s in self.shares if s[0].parent is not device]
                for space in [*self.spaces, *self.dead]:
                    if space.bonds.pop(device, None) is not None:
                        at = self.at[device.group]
                        self.at[device.group] = {p: s for p, s in at.items() if s is not space}
                self.forget_aux(device.group)
                self.bury()

    def forget_aux(self, group):
        """Auxiliary domains that no device of a group has any more."""
        left = {pasid for device in group.devices for pasid in device.aux}
        for pasid, space in list(self.at[group].items()):
            if not space.process and pasid not in left:
                del self.at[group][pasid]

    def aux_domain(self):
        device = self.pick([d for d in self.devices if "AUX" in d.enabled_features] or self.devices)
        if device.aux and self.rng.randrange(2):
            self.end_aux(device, self.pick(device.aux.values()))
            return
        self.attach_one(device, self.pick(self.domains()))

    def end_aux(self, device, domain):
        held = any(s.parent is device and s.domain is domain for s, _ in self.shares)
        must = None if held or device.group in self.reset else True
        if self.do(f"{self.name(device)}.detach_aux({self.name(domain)})", device.detach_aux,
                   domain, must=must):  # fmt: skip
            self.forget_aux(device.group)

    def attach_one(self, device, space):
        if space is not None and self.do(
            f"{self.name(device)}.attach_aux({space})", device.attach_aux, space.thing
        ):
            self.at[device.group][space.thing.aux_pasid] = space

    # --- faults in flight ---

    def fly(self):
        """A fault that nobody has answered yet: a stall, a page request, part of a group."""
        owned = [pair for pair in self.all_pairs() if isinstance(self.reach(*pair)[0], Space)]
        able = [(d, p) for d, p in owned if d.pri_supported or self.stalls(d)]
        some = [things for things in (able, able, able, owned, self.all_pairs()) if things]
        device, pasid = self.pick(self.pick(some))
        target, _ = self.reach(device, pasid)
        page = FLYING + PAGE * len(self.log)
        owner = target if isinstance(target, Space) else None
        smmu = device.iommu.smmu
        where = f"{page:#x}, pasid={pasid}) of {target}"
        self.accessing = None
        if device.ats_enabled and device.pri_supported:
            atc = device.atcs[0]
            last = bool(self.rng.randrange(3))
            self.flying[page] = owner
            if last:
                self.say(f"{self.name(device)} requests a page ({where}")
                if len(atc.outstanding) < 30:
                    atc.request_page(page, ssid=pasid)
            else:
                group = 400 + self.rng.randrange(3)
                self.say(f"{self.name(device)} requests a page of group {group}, not the last "
                         f"({where}")  # fmt: skip
                smmu.page_request(device.sid, page, ssid=pasid, read=True, last=False,
                                  prg_index=group)  # fmt: skip
                self.partial.append((device, pasid, group, page))
        else:
            self.flying[page] = owner
            self.say(f"{self.name(device)} accesses ({where}")
            smmu.translate(device.sid, page, ssid=pasid)
        return device, pasid, owner

    def overtake(self):
        """Things change hands while a fault waits."""
        device, pasid, owner = self.fly()
        if self.rng.randrange(3) and owner is not None:
            self.hand_over(device, pasid, owner)
        else:
            for _ in range(self.rng.choice([1, 2, 2])):
                getattr(self, self.pick(self.CHANGES))()
        if self.partial and self.rng.randrange(2):
            self.end_group()
        self.service()

    def hand_over(self, device, pasid, space):
        """What a device, or one of its PASIDs, is attached to goes, and something else comes."""
        group, aux = device.group, self.aux
        if group in self.reset or (aux and self.at[group].get(pasid) is not space):
            return
        others = [s for s in self.domains() if s is not space and s.thing.stage == 1]
        if pasid is None:
            self.replace_main(device, self.pick([*others, *self.targets()]))
            return
        share = next((one for one in self.shares
                      if one[0].parent is device and one[0].pasid == pasid), None)  # fmt: skip
        if space.process:
            holder = next((d for d in group.devices if d in space.bonds), device)
            if self.rng.randrange(2) and space in self.spaces:
                self.end_process(space)
            if holder in space.bonds:
                self.end_bond(space, holder, True)
            if space in self.spaces:
                self.end_process(space)
        elif share is not None:
            self.end_share(share)
        elif aux:
            if device.aux.get(pasid) is space.thing:
                self.end_aux(device, space.thing)
                if not self.holders(space):
                    self.do(f"{space}.free()", space.thing.free, must=True)
                    self.drop_space(space)
        else:
            other = self.pick(others)
            if other is not None and self.rng.randrange(2):
                self.replace_one(device, pasid, other)
                return
            self.detach_one(device, pasid)
        if self.rng.randrange(2) or not others:
            process = self.new_process()
            if process is not None:
                self.bind_one(device, process)
        elif aux:
            self.attach_one(device, self.new_domain())
        else:
            self.attach_pasid(device, self.pick(others), pasid)

    def end_group(self):
        """The last request of a group comes, and not a word before the service."""
        one = self.pick(self.partial)
        if one is None:
            return
        self.partial.remove(one)
        device, pasid, group, _ = one
        if device not in self.devices:
            return
        target, _ = self.reach(device, pasid)
        page = FLYING + PAGE * len(self.log)
        self.flying[page] = target if isinstance(target, Space) else None
        self.say(f"{self.name(device)} requests the last page of group {group} ({page:#x}, "
                 f"pasid={pasid}) of {target}")  # fmt: skip
        device.iommu.smmu.page_request(device.sid, page, ssid=pasid, read=True, last=True,
                                       prg_index=group)  # fmt: skip

    def service(self):
        self.say("service()")
        self.serve()

    def ask_again(self):
        device = self.pick(self.devices)
        for atc in device.atcs:
            atc.pri_enabled = device.pri_supported

    def call_back(self):
        """A fault whose handler changes the system."""
        lazy = [
            (device, pasid)
            for device, pasid in self.all_pairs()
            if isinstance(self.reach(device, pasid)[0], Space) and self.reach(device, pasid)[0].lazy
        ]
        pair = self.pick(lazy)
        if pair is None:
            return
        self.serve()
        self.partial.clear()
        device, pasid = pair
        self.callback = random.Random(self.rng.random())
        page = FLYING + PAGE * len(self.log)
        self.say(f"{self.name(device)} accesses ({page:#x}, pasid={pasid}); the handler calls back")
        self.probe_access(device, pasid, page, bool(device.ats_enabled and self.rng.randrange(2)))
        self.callback = None

    def more(self):
        aux = [self.aux_feature, self.aux_domain, self.aux_domain]
        self.pick(aux if self.aux else [self.pasid])()

    def space_ops(self):
        self.pick([self.new_domain, self.new_process, self.new_guest, self.nest, self.nest])()

    BOTH = (
        "plug", "unplug", "reset_device", "new_domain", "space_ops", "map", "map", "unmap",
        "free_domain", "change_asid", "enforce", "attach", "attach", "attach", "detach", "share",
        "share", "new_process", "bind", "bind", "bind", "unbind", "exit", "close_table", "fly",
        "overtake", "overtake", "overtake", "overtake", "end_group", "service", "ask_again",
        "call_back", "nest", "guest_changes", "guest_changes", "claim", "use_freed",
        "copy_process", "go_on", "disturb", "refused", "refused", "refused", "pick_pasid",
        "switch_pasids", "add_smmu",
    )  # fmt: skip
    REFUSED = (
        "plug", "unplug", "reset_device", "free_domain", "change_asid", "attach", "attach",
        "detach", "share", "bind", "unbind", "exit", "nest", "claim",
    )  # fmt: skip
    CHANGES = (
        "attach", "detach", "unbind", "exit", "share", "bind", "end_group", "unplug", "plug",
        "reset_device", "free_domain", "more", "more", "more",
    )  # fmt: skip
    CALLBACKS = (
        "unplug", "reset_device", "unmap", "map", "attach", "detach", "unbind", "exit", "share",
        "free_domain", "bind", "plug",
    )  # fmt: skip

    # --- a life ---

    def run(self, steps):
        """Live through the numbered steps, and die."""
        more = ("aux_feature",) * 4 + ("aux_domain",) * 5 if self.aux else ("pasid",) * 5
        names = [name for name in self.BOTH + more if name not in self.without]
        for step in steps:
            self.step = step
            self.rng = random.Random(f"{self.seed} {step}")
            getattr(self, self.rng.choice(names))()
            if self.ripe():
                self.verify(step % 20 == 19)
        self.step += 1
        self.verify(True)
        self.end()

    def ripe(self):
        return True

    def end(self):
        """Everything is released; nothing is left."""
        self.throws = 0
        self.hear()
        self.ending = True
        self.partial.clear()
        for device in list(self.devices):
            if device.group in self.reset and self.rng.randrange(2):
                self.reset.pop(device.group, None)
                self.do(f"{self.name(device)}.reset_done()", device.reset_done, must=True)
        while self.devices:
            self.unplug()
        for space in self.spaces:
            if space.process:
                self.do(f"{space}.exit()", space.thing.exit, must=True)
                space.thing.table.close()
        self.bury()
        mains = [space for space in self.domains() if getattr(space.thing, "children", None)]
        for space in [*(s for s in self.domains() if s not in mains), *mains]:
            self.do(f"{space}.free()", space.thing.free, must=True)
        system = self.system
        left = {
            "dead processes": self.dead, "PASIDs": list(system.pasids),
            "ASIDs": list(system.asids),
            "VMIDs": [n for iommu in system.iommus for n in iommu.vmids],
            "stalls": [s for iommu in system.iommus for s in iommu.smmu.stalls],
        }  # fmt: skip
        self.spaces.clear()
        for what, things in left.items():
            if things:
                self.wrong(f"left at the end: {what}: {things}")
        found = system.check()
        if found:
            self.wrong("check at the end: " + "\n".join(f"{f.kind}: {f}" for f in found))
        leaves = sum(64 << 8 for iommu in system.iommus for _ in iommu._leaves)
        if system.pages.in_use != self.start_pages + leaves:
            self.wrong(f"left at the end: pages: {system.pages.in_use - self.start_pages - leaves}")


def copied(thing):
    """Copy something; a refusal is one whatever its class."""
    try:
        return copy.copy(thing)
    except TypeError as error:
        raise InvalidArgument("thing", thing, text=str(error)) from error


def shown(address):
    return "nothing" if address is None else f"{address:#x}"


def live(seed, steps=range(STEPS), without=(), lost=None):
    """One life; raises Wrong with its calls."""
    life = None
    try:
        life = Life(seed, without, lost)
        life.run(steps)
    except Exception as error:
        what = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
        log = "\n".join(life.log[-40:]) if life is not None else ""
        wrong = Wrong(f"seed {seed}: {what}\n{log}")
        wrong.what, wrong.life = what, life
        raise wrong from error
    return life


def kind_of(wrong):
    """What two failures have in common if they are one: words, without names and numbers."""
    head, _, rest = wrong.what.split("\n")[0].partition(": ")
    if head.startswith("check"):
        return f"{head}: {rest.split(':')[0]}"
    head = re.sub(r"\(.*", "", re.sub(r"0x[0-9a-f]+|\d", "", head))
    call = re.search(r"\.(\w+)\(", rest)
    error = re.search(r"([A-Z]\w+): ", rest)
    return " ".join([head, *([call[1]] if call else []), *([error[1]] if error else [])])


def shrink(seed, steps, kind, without=()):
    """Leave out steps that a failure does not need."""
    steps = list(steps)
    size = max(len(steps) // 2, 1)
    while True:
        start, smaller = 0, False
        while start < len(steps):
            less = steps[:start] + steps[start + size :]
            try:
                live(seed, less, without)
            except Wrong as wrong:
                if kind_of(wrong) == kind:
                    steps, smaller = less, True
                    continue
            start += size
        if size == 1 and not smaller:
            return steps
        size = max(size // 2, 1) if not smaller or size > 1 else 1


def main():
    parser = argparse.ArgumentParser(description="Random lives of systems.")
    parser.add_argument("--steps", type=int, default=10_000, help="how many, in lives of 120")
    parser.add_argument("--seed", type=int, help="one life")
    parser.add_argument("--first", type=int, default=0, help="seed of the first life")
    parser.add_argument("--shrink", action="store_true", help="leave out what is not needed")
    parser.add_argument("--all", action="store_true", help="go on after a failure, list kinds")
    parser.add_argument("--without", nargs="*", default=(), help="calls to leave out")
    args = parser.parse_args()
    seeds = [args.seed] if args.seed is not None else range(
        args.first, args.first + -(-args.steps // STEPS))  # fmt: skip
    kinds = {}
    for seed in seeds:
        try:
            live(seed, without=args.without)
        except Wrong as wrong:
            kind = kind_of(wrong)
            kinds.setdefault(kind, []).append(seed)
            if len(kinds[kind]) == 1 and args.shrink:
                done = [s for s in range(STEPS) if s <= wrong.life.step] if wrong.life else []
                steps = shrink(seed, done, kind, args.without)
                try:
                    live(seed, steps, args.without)
                except Wrong as smaller:
                    wrong = smaller
                print(f"steps {steps}")
            if len(kinds[kind]) == 1:
                print(wrong, flush=True)
                print("-" * 80)
            if not args.all:
                break
    for kind, found in sorted(kinds.items(), key=lambda one: -len(one[1])):
        print(f"{len(found):5} {kind}   seeds {found[:8]}")
    print(f"{len(list(seeds))} lives, {sum(map(len, kinds.values()))} failed")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
