"""Slow twins of PasidSpace, IdSpace and IovaAllocator: one record for each ID, and searches."""

from collections import Counter

from smmufast.errors import (
    AccessDenied,
    Busy,
    Exists,
    InvalidArgument,
    NoDevice,
    NoEntry,
    NoSpace,
    PasidOverflow,
    TryAgain,
)

ORDER = ["CPU", "IOMMU", "DEVICE"]


class SpaceTwin:
    """PASIDs as docs/domains.md part 4 tells it; sets, backends and notifiers by their names.

    `told` collects (notifier, change, pasid, spid, set, data).
    """

    def __init__(self, policy="per device", smmus=()):
        self.policy = policy
        self.smmus = list(smmus)
        self.fixed = None
        self.ids = {}  # pasid: {"set", "data", "refs", "pending", "spid"}
        self.sets = {}  # name: {"kind", "token", "quota"}
        self.capacity = 1 << 20
        self.installed = False
        self.reserved = 0
        self.picks = Counter()
        self.notifiers = []  # (order, who, set or None, mm or None)
        self.told = []
        self.backends = []  # [(name, functions, backend), ...]
        self.lost = 0

    # --- policy ---

    def limit(self):
        if self.fixed is None:
            self.fixed = 1 << 20
            if self.policy != "per device":
                for smmu in self.smmus:
                    if smmu > 1:
                        self.fixed = min(self.fixed, smmu)
                    elif self.policy == "system wide, every SMMU":
                        self.fixed = 1
        return self.fixed

    def off(self):
        """Whether the policy may take all PASIDs from a device."""
        return self.policy == "system wide, strict" or self.limit() == 1

    def max_pasids(self, device):
        if device < 0:
            raise InvalidArgument("device_max_pasids")
        if self.policy == "system wide, strict" and device < self.limit():
            return 0
        usable = [pasid for pasid in (device, self.limit())]
        return min(usable) if min(usable) > 1 else 0

    def check(self, pasid, device):
        if self.off() and self.max_pasids(device) == 0:
            raise NoDevice("device_max_pasids")
        if pasid >= self.max_pasids(device):
            raise PasidOverflow("pasid")

    def device_range(self, device, low=0, high=0):
        most = self.max_pasids(device)
        if most == 0:
            if self.off():
                raise NoDevice("device_max_pasids")
            raise NoSpace("device_max_pasids")
        if low < 0 or high < 0:
            raise InvalidArgument("min_pasid")
        wanted = [p for p in range(1, most) if p >= low and (p <= high or high == 0)]
        if not wanted:
            raise InvalidArgument("min_pasid")
        return wanted[0], wanted[-1]

    # --- IDs ---

    def members(self, name):
        return [pasid for pasid in sorted(self.ids) if self.ids[pasid]["set"] == name]

    def available(self):
        quotas = sum(one["quota"] for one in self.sets.values())
        return self.capacity - self.reserved - quotas - len(self.members(None))

    def left(self, name):
        if name is None:
            return self.available()
        self.alive(name)
        return self.sets[name]["quota"] - len(self.members(name))

    def alloc(self, low=1, high=None, name=None, data=None):
        if low < 1 or (high is not None and high < low):
            raise InvalidArgument("min")
        if self.left(name) < 1:
            raise NoSpace("count")
        last = self.limit() - 1
        if self.backends:
            pasid = self.ask(low, last if high is None else high)
        else:
            last = last if high is None else min(last, high)
            free = [
                pasid for pasid in range(low, last + 1)
                if pasid not in self.ids and not self.picks[pasid]
            ]  # fmt: skip
            if not free:
                raise NoSpace("pasid")
            pasid = free[0]
        record = {"set": name, "data": data, "refs": 1, "pending": False, "spid": None}
        self.ids[pasid] = record
        self.tell("ALLOC", pasid)
        return pasid

    def ask(self, low, high):
        """Ask the backend until it gives what nobody picked; give the others back then."""
        backend, others = self.backends[0][2], []
        while True:
            pasid = backend.alloc(low, high)
            if pasid is None or pasid in self.ids or not self.picks[pasid] or pasid in others:
                break
            others.append(pasid)
        bad = pasid is not None and (
            pasid in self.ids or not 1 <= pasid < 1 << 20 or self.picks[pasid] > 0
        )
        for each in [pasid] * bad + others:
            backend.free(each)
        if bad or pasid is None:
            raise NoSpace("pasid")
        return pasid

    def pick(self, pasid):
        if not 1 <= pasid < 1 << 20:
            raise InvalidArgument("pasid")
        self.picks[pasid] += 1

    def unpick(self, pasid):
        if not self.picks[pasid]:
            raise NoEntry("pasid")
        self.picks[pasid] -= 1

    def alloc_many(self, count, low=1, high=None, name=None, data=None):
        if count < 0 or low < 1 or (high is not None and high < low):
            raise InvalidArgument("count")
        if self.left(name) < count:
            raise NoSpace("count")
        before = [dict(self.ids), list(self.told)]
        try:
            return [self.alloc(low, high, name, data) for _ in range(count)]
        except NoSpace:
            for pasid in self.ids:
                if pasid not in before[0] and self.backends:
                    self.backends[0][2].free(pasid)
            self.ids, self.told = before
            raise

    def look(self, pasid, name=None):
        if pasid not in self.ids:
            raise NoEntry("pasid")
        if name is not None and self.ids[pasid]["set"] != name:
            raise AccessDenied("pasid")
        return self.ids[pasid]

    def free(self, pasid, name=None):
        self.look(pasid, name)
        self.tell_free(self.start_free([pasid]))
        return pasid not in self.ids

    def free_many(self, pasids, name=None):
        for i, pasid in enumerate(pasids):
            self.look(pasid, name)
            if pasid in pasids[:i]:
                raise InvalidArgument("pasids")
        self.tell_free(self.start_free(pasids))

    def free_all(self, name):
        self.tell_free(self.start_free(self.members(name)))

    def start_free(self, pasids):
        held = []
        for pasid in pasids:
            record = self.ids[pasid]
            if record["pending"]:
                continue
            if record["refs"] == 1:
                self.drop(pasid)
            else:
                held.append(pasid)
        for pasid in held:
            self.ids[pasid]["refs"] -= 1
            self.ids[pasid]["pending"] = True
        return held

    def tell_free(self, held):
        for pasid in held:
            self.tell("FREE", pasid)

    def drop(self, pasid):
        if self.backends:
            self.backends[0][2].free(pasid)
        name = self.ids.pop(pasid)["set"]
        if name is not None and not self.members(name):
            self.end(name)

    def find(self, pasid, name=None):
        return self.look(pasid, name)["data"]

    def set_data(self, pasid, data):
        self.look(pasid)["data"] = data

    def get(self, pasid, name=None):
        if pasid not in self.ids:
            raise InvalidArgument("pasid")
        if self.ids[pasid]["pending"]:
            raise Busy("pasid")
        self.look(pasid, name)["refs"] += 1

    def put(self, pasid, name=None):
        if pasid not in self.ids or (name is not None and self.ids[pasid]["set"] != name):
            return False
        self.ids[pasid]["refs"] -= 1
        if self.ids[pasid]["refs"]:
            return False
        self.drop(pasid)
        return True

    def state(self, pasid):
        if pasid not in self.ids:
            return "FREE"
        if self.ids[pasid]["pending"]:
            return "FREE_PENDING"
        return "IDLE" if self.ids[pasid]["refs"] == 1 else "ACTIVE"

    # --- sets ---

    def alive(self, name):
        if name not in self.sets:
            raise InvalidArgument("pasid_set")

    def end(self, name):
        del self.sets[name]
        self.notifiers = [known for known in self.notifiers if known[2] != name]

    def install_capacity(self, total):
        if self.installed:
            return
        if not 1 <= total <= 1 << 20 or total < self.capacity - self.available():
            raise InvalidArgument("total")
        self.capacity = total
        self.installed = True

    def amount(self, count):
        if count < 0:
            raise InvalidArgument("count")
        if count > self.available():
            raise NoSpace("count")
        return count if count else self.available()

    def reserve(self, count):
        count = self.amount(count)
        self.reserved += count
        return count

    def cancel(self, count):
        if count < 0 or count > self.reserved:
            raise InvalidArgument("count")
        self.reserved -= count
        return self.available()

    def new_set(self, name, token, kind, quota):
        if kind == "MM" and token is None:
            raise InvalidArgument("token")
        if kind == "NULL" and token is not None:
            raise InvalidArgument("token")
        if kind == "MM" and self.find_mm_set(token) is not None:
            raise Exists("token")
        quota = self.amount(quota)
        if quota == 0:
            raise NoSpace("quota")
        self.sets[name] = {"kind": kind, "token": token, "quota": quota}

    def adjust(self, name, quota):
        self.alive(name)
        if quota <= 0 or quota < len(self.members(name)):
            raise InvalidArgument("quota")
        if quota - self.sets[name]["quota"] > self.available():
            raise NoSpace("quota")
        self.sets[name]["quota"] = quota

    def set_free(self, name):
        self.alive(name)
        if self.members(name):
            raise Busy("pasid_set")
        self.end(name)

    def find_set(self, pasid):
        return self.look(pasid)["set"]

    def find_mm_set(self, token):
        for name, one in self.sets.items():
            if one["kind"] == "MM" and one["token"] == token:
                return name
        return None

    # --- guests' numbers ---

    def attach_spid(self, pasid, spid):
        if not 0 <= spid < (1 << 32) - 1:
            raise InvalidArgument("spid")
        record = self.look(pasid)
        if record["set"] is None or record["spid"] is not None:
            raise InvalidArgument("pasid")
        for other in self.members(record["set"]):
            if self.ids[other]["spid"] == spid:
                raise InvalidArgument("spid")
        record["spid"] = spid
        self.tell("BIND", pasid)

    def detach_spid(self, pasid):
        record = self.look(pasid)
        if record["spid"] is None:
            raise NoEntry("pasid")
        self.tell("UNBIND", pasid)
        record["spid"] = None

    def find_spid(self, name, spid, get=False):
        for pasid in self.members(name):
            if self.ids[pasid]["spid"] == spid:
                if get:
                    self.get(pasid)
                return pasid
        raise NoEntry("spid")

    # --- notifiers ---

    def register(self, who, order, name=None, mm=None):
        if name is not None:
            self.alive(name)
        for _, known, *where in self.notifiers:
            if (known, *where) == (who, name, mm):
                raise Exists("notifier") if mm is None else Busy("notifier")
        if mm is not None:
            owner = self.find_mm_set(mm)
            if owner is not None and self.members(owner):
                raise Busy("mm")
        self.notifiers.append((order, who, name, mm))

    def unregister(self, who, name=None, mm=None):
        if name is not None:
            self.alive(name)
        found = [known for known in self.notifiers if known[1:] == (who, name, mm)]
        if not found:
            raise NoEntry("notifier")
        self.notifiers.remove(found[0])

    def notify(self, pasid, change):
        if pasid not in self.ids or change in ("ALLOC", "FREE"):
            raise InvalidArgument("change")
        self.tell(change, pasid)

    def tell(self, change, pasid):
        record = self.ids[pasid]
        name = record["set"]
        for order in ORDER:
            for place, who, of_set, of_mm in self.notifiers:
                if place != order:
                    continue
                if of_set is not None and of_set != name:
                    continue
                if of_mm is not None and (
                    name is None
                    or self.sets[name]["kind"] != "MM"
                    or self.sets[name]["token"] != of_mm
                ):
                    continue
                self.told.append((who, change, pasid, record["spid"], name, record["data"]))

    # --- backends ---

    def register_backend(self, name, functions, backend):
        if any(known[0] == name for known in self.backends):
            raise Exists("backend")
        if not self.backends and self.ids:
            raise TryAgain("backend")
        # Those that share stand behind each other: the first of a kind keeps its place.
        place = len(self.backends)
        for i, known in enumerate(self.backends):
            if known[1] == functions:
                place = i + 1
        self.backends.insert(place, (name, functions, backend))

    def unregister_backend(self, name):
        found = [known for known in self.backends if known[0] == name]
        if not found:
            return
        active = self.backends[0][1]
        self.backends.remove(found[0])
        if found[0][1] == active and not any(known[1] == active for known in self.backends):
            self.lost += len(self.ids)
            for owner in {record["set"] for record in self.ids.values()} - {None}:
                self.end(owner)
            self.ids = {}


class IdTwin:
    """Numbers from 1 on, in a dictionary."""

    def __init__(self, bits):
        self.last = 2**bits - 1
        self.taken = {}

    def alloc(self, data=None):
        for number in range(1, self.last + 1):
            if number not in self.taken:
                self.taken[number] = data
                return number
        raise Busy("id")

    def narrow(self, bits):
        if any(number >= 2**bits for number in self.taken):
            raise Busy("id")
        self.last = min(self.last, 2**bits - 1)

    def widen(self, bits):
        self.last = max(self.last, 2**bits - 1)

    def claim(self, number, data=None):
        if not 1 <= number <= self.last:
            raise InvalidArgument("id")
        if number in self.taken:
            raise Busy("id")
        self.taken[number] = data

    def free(self, number):
        if number not in self.taken:
            raise NoEntry("id")
        del self.taken[number]

    def find(self, number):
        if number not in self.taken:
            raise NoEntry("id")
        return self.taken[number]


class IovaTwin:
    """A set of free granules; every aligned place is tried from the top."""

    def __init__(self, first, last, granule, align_limit=None):
        self.granule = granule
        self.free_granules = set(range(first // granule, (last + 1) // granule))
        self.reserved_granules = set()
        self.last = last
        self.align_limit = align_limit
        self.taken = {}

    def alloc(self, size, align=None, limit=None):
        if size < 1:
            raise InvalidArgument("size")
        n = -(-size // self.granule)
        if align is None:
            align = self.granule
            while align < n * self.granule:
                align *= 2
            if self.align_limit is not None:
                align = max(min(align, self.align_limit), self.granule)
        elif align not in [2**bit for bit in range(64)]:
            raise InvalidArgument("align")
        step = max(align // self.granule, 1)
        last = self.last if limit is None else min(limit, self.last)
        for at in range(last // self.granule, -1, -1):
            granules = set(range(at, at + n))
            if at % step or (at + n) * self.granule - 1 > last:
                continue
            if granules <= self.free_granules:
                self.free_granules -= granules
                self.taken[at * self.granule] = n * self.granule
                return at * self.granule
        raise NoSpace("size")

    def free(self, iova, size):
        if size < 1:
            raise InvalidArgument("size")
        n = -(-size // self.granule)
        if self.taken.get(iova) != n * self.granule:
            raise InvalidArgument("iova")
        del self.taken[iova]
        self.free_granules |= set(range(iova // self.granule, iova // self.granule + n))

    def reserve(self, first, last):
        granules = set(range(first // self.granule, last // self.granule + 1))
        if last < first or not granules <= self.free_granules | self.reserved_granules:
            raise InvalidArgument("first")
        self.free_granules -= granules
        self.reserved_granules |= granules

    @property
    def reserved(self):
        found = []
        for granule in sorted(self.reserved_granules):
            first = granule * self.granule
            if found and found[-1][1] == first - 1:
                first = found.pop()[0]
            found.append((first, (granule + 1) * self.granule - 1))
        return found
