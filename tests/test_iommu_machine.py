"""Systems driven at random: after each step every translation is what a dictionary says.

Two SMMUs with caches, devices with and without PASIDs, ATS and stalls, paging domains of both
stages, processes; attach, replace, detach, bind, unbind, map, unmap, exit, fault.  No cache entry
is stale after a step, and no PASID, ASID, VMID or table page is leaked.
"""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from smmufast import Caches
from smmufast.iommu import (
    AUX,
    BLOCKED,
    IDENTITY,
    AddressSpace,
    AttachHandle,
    Busy,
    InvalidArgument,
    IommuError,
    System,
)

RAM = 0x1_0000_0000
PAGE = 0x1000
IOVAS = [0, 0x1000, 0x1F_F000, 0x20_0000, 0x40_0000_0000, 0x7FFF_FFFF_F000]
PASIDS = [1, 2, 15]
pages = st.sampled_from(IOVAS)
frames = st.integers(0, 255).map(lambda n: RAM + n * PAGE)
numbers = st.integers(0, 7)


class Machine(RuleBasedStateMachine):
    """A system of today's profile, beside the model: dictionaries of pages."""

    @initialize(seed=st.integers(0, 3))
    def start(self, seed):
        caches = [Caches.server, Caches.small][seed & 1]
        self.system = System(2, caches=caches)
        self.base = self.system.pages.in_use
        make = self.system.device
        self.devices = [
            make(1, pasid_bits=4), make([2, 3], pasid_bits=4, ats=True),
            make(4), make(1, iommu=1, pasid_bits=4, stall=True), make(9, iommu=1),
        ]  # fmt: skip
        self.domains = []  # (domain, its pages)
        self.spaces = []  # (space, its pages)
        self.main = {device: (BLOCKED, None) for device in self.devices}
        self.at = {}  # (device, pasid): (domain or Bond, its pages)

    def pick(self, things, number):
        return things[number % len(things)]

    # --- domains ---

    @precondition(lambda self: len(self.domains) < 5)
    @rule(number=numbers, stage=st.sampled_from([1, 1, 2]))
    def new_domain(self, number, stage):
        device = self.pick(self.devices, number)
        self.domains.append((device.paging_domain(stage=stage), {}))

    @precondition(lambda self: self.domains)
    @rule(number=numbers, iova=pages, pa=frames, count=st.sampled_from([1, 1, 3, 512]))
    def map(self, number, iova, pa, count):
        domain, model = self.pick(self.domains, number)
        if iova + count * PAGE > 1 << 48:
            count = 1
        wanted = {iova + n * PAGE: pa + n * PAGE for n in range(count)}
        try:
            domain.map(iova, pa, count * PAGE)
        except IommuError:
            assert wanted.keys() & model.keys()
        else:
            assert not wanted.keys() & model.keys()
            model.update(wanted)

    @precondition(lambda self: self.domains)
    @rule(number=numbers, iova=pages, count=st.sampled_from([1, 1, 3, 512]))
    def unmap(self, number, iova, count):
        domain, model = self.pick(self.domains, number)
        done = domain.unmap(iova, count * PAGE)
        assert done % PAGE == 0
        for n in range(done // PAGE):
            del model[iova + n * PAGE]
        if done < count * PAGE:
            assert iova + done not in model

    @precondition(lambda self: self.domains)
    @rule(number=numbers)
    def free_domain(self, number):
        pair = self.pick(self.domains, number)
        used = any(held[0] is pair[0] for held in (*self.main.values(), *self.at.values()))
        try:
            pair[0].free()
        except Busy:
            assert used
        else:
            assert not used
            self.domains.remove(pair)

    # --- devices ---

    @rule(device=numbers, number=numbers)
    def replace(self, device, number):
        device = self.pick(self.devices, device)
        if number >= len(self.domains):
            target = (IDENTITY, None) if number % 2 else (BLOCKED, None)
        else:
            target = self.domains[number]
        try:
            device.replace(target[0])
        except (Busy, InvalidArgument):
            foreign = getattr(target[0], "iommu", device.iommu) is not device.iommu
            assert foreign or (target[0].stage == 2 and device.pasids_in_use)
        else:
            self.main[device] = target

    @precondition(lambda self: self.domains)
    @rule(device=numbers, number=numbers, pasid=st.sampled_from(PASIDS), replace=st.booleans())
    def set_pasid(self, device, number, pasid, replace):
        device = self.pick(self.devices, device)
        target = self.pick(self.domains, number)
        try:
            if replace:
                device.replace_pasid(target[0], pasid, AttachHandle())
            else:
                device.attach_pasid(target[0], pasid)
        except (Busy, InvalidArgument):
            held = (device, pasid) in self.at
            assert (
                not device.max_pasids
                or held != replace
                or target[0].iommu is not device.iommu
                or target[0].stage != 1
                or self.main[device][0].stage == 2
                or isinstance(self.at[device, pasid][0], AddressSpace)
            )
        else:
            self.at[device, pasid] = target

    @precondition(lambda self: self.at)
    @rule(number=numbers)
    def clear_pasid(self, number):
        device, pasid = self.pick(sorted(self.at, key=lambda at: (id(at[0]), at[1])), number)
        held, _ = self.at[device, pasid]
        if isinstance(held, AddressSpace):
            held.bonds[[b.device for b in held.bonds].index(device)].unbind(force=True)
        else:
            device.detach_pasid(held, pasid)
        del self.at[device, pasid]

    @rule(device=numbers)
    def release_and_probe(self, device):
        index = device % len(self.devices)
        device = self.devices[index]
        iommu = device.iommu.number
        device.release()
        self.system.probe(device, iommu)
        self.main[device] = (BLOCKED, None)
        self.at = {at: held for at, held in self.at.items() if at[0] is not device}

    # --- processes ---

    @precondition(lambda self: len(self.spaces) < 3)
    @rule(lazy=st.booleans())
    def new_process(self, lazy):
        model = {}

        def handler(fault):
            page = fault.iova & -PAGE
            if page in model or page >= 1 << 47:
                return False
            space.table.map(page, RAM + (page >> 12 & 0xFF) * PAGE, PAGE)
            model[page] = RAM + (page >> 12 & 0xFF) * PAGE
            return True

        space = AddressSpace.of(self.system, handler=handler if lazy else None)
        self.spaces.append((space, model))

    @precondition(lambda self: self.spaces)
    @rule(device=numbers, number=numbers)
    def bind(self, device, number):
        device = self.pick(self.devices, device)
        space, model = self.pick(self.spaces, number)
        try:
            bond = device.bind(space)
        except IommuError:
            assert (
                space.exited
                or not device.max_pasids
                or self.main[device][0].stage == 2
                or (device, space.pasid) in self.at
                or (not space.pasid and any((device, p) in self.at for p in PASIDS))
            )
        else:
            self.at[device, bond.pasid] = (space, model)

    @precondition(lambda self: self.spaces)
    @rule(number=numbers, iova=pages, pa=frames)
    def process_maps(self, number, iova, pa):
        space, model = self.pick(self.spaces, number)
        if iova not in model:
            space.table.map(iova, pa, PAGE)
            model[iova] = pa

    @precondition(lambda self: self.spaces)
    @rule(number=numbers, iova=pages)
    def process_unmaps(self, number, iova):
        space, model = self.pick(self.spaces, number)
        assert space.table.unmap(iova, PAGE) == (PAGE if iova in model else 0)
        model.pop(iova, None)

    @precondition(lambda self: self.spaces)
    @rule(number=numbers)
    def process_exits(self, number):
        pair = self.pick(self.spaces, number)
        pair[0].exit()
        pair[1].clear()
        self.spaces.remove(pair)
        self.dead = [*getattr(self, "dead", ()), pair[0]]

    # --- what must hold ---

    def expected(self, held, iova):
        domain, model = held
        if domain is IDENTITY:
            return iova
        if model is None or getattr(domain, "exited", False):
            return None
        pa = model.get(iova & -PAGE)
        return None if pa is None else pa + iova % PAGE

    @invariant()
    def translations_agree_with_the_model(self):
        if not hasattr(self, "system"):
            return
        for device in self.devices:
            for iova in (0x10, 0x1FF_008, 0x20_0FFF, 0x7FFF_FFFF_F800):
                held = self.main[device]
                for sid in device.sids:
                    result = device.translate(iova, sid=sid)
                    assert result.pa == self.expected(held, iova), (device, result)
            for pasid in PASIDS if device.max_pasids else ():
                held = self.at.get((device, pasid), (BLOCKED, None))
                for iova in (0x10, 0x1FF_008, 0x20_0FFF):
                    result = device.translate(iova, pasid=pasid, write=True)
                    assert result.pa == self.expected(held, iova), (device, pasid, result)

    @invariant()
    def nothing_is_stale(self):
        if hasattr(self, "system"):
            assert self.system.stale() == []
            assert all(iommu.smmu.stalls == [] for iommu in self.system.iommus)

    @invariant()
    def nothing_is_leaked(self):
        if not hasattr(self, "system"):
            return
        system = self.system
        sva = [domain for space, _ in self.spaces for domain in space.domains.values()]
        sva += [domain for space in getattr(self, "dead", ()) for domain in space.domains.values()]
        ones = [domain for domain, _ in self.domains if domain.stage == 1]
        assert len(system.asids) == len(ones) + len(sva)
        twos = [domain for domain, _ in self.domains if domain.stage == 2]
        assert sum(len(iommu.vmids) for iommu in system.iommus) == len(twos)
        alive = {space.pasid for space, _ in self.spaces} | {
            space.pasid for space in getattr(self, "dead", ())
        }
        assert len(system.pasids) == len(alive - {0})

    def teardown(self):
        if not hasattr(self, "system"):
            return
        for device in self.devices:
            device.release()
        for domain, _ in self.domains:
            domain.free()
        for space in [*(space for space, _ in self.spaces), *getattr(self, "dead", ())]:
            space.exit()
            space.table.close()
        system = self.system
        assert (len(system.asids), len(system.pasids)) == (0, 0)
        # the leaves of the stream tables stay, one for each SMMU
        assert system.pages.in_use == self.base + 2 * 64 * 256
        assert system.stale() == []


Machine.TestCase.settings = settings(
    max_examples=20, stateful_step_count=30, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
TestMachine = Machine.TestCase


class AuxMachine(RuleBasedStateMachine):
    """The old profile: auxiliary domains under main domains that two devices share."""

    @initialize()
    def start(self):
        self.system = System(profile=AUX, caches=Caches.server)
        self.devices = [self.system.device(sid, pasid_bits=3, ats=sid == 2) for sid in (1, 2, 3)]
        self.mains = []
        for group in (self.devices[:2], self.devices[2:]):
            main = self.system.paging_domain()
            for device in group:
                device.attach(main)
                device.enable_feature("AUX")
            main.map(0x1000, RAM, PAGE)
            self.mains.append(main)
        self.aux = []  # (domain, its pages)
        self.attached = {device: [] for device in self.devices}

    @precondition(lambda self: len(self.aux) < 6)
    @rule()
    def new(self):
        self.aux.append((self.system.paging_domain(), {}))

    @precondition(lambda self: self.aux)
    @rule(device=numbers, number=numbers)
    def attach(self, device, number):
        device = self.devices[device % 3]
        domain, _ = self.aux[number % len(self.aux)]
        try:
            device.attach_aux(domain)
        except InvalidArgument:
            full = not domain.aux_pasid and len(self.system.pasids) == 7
            assert full or domain.parent is not device.domain
        except Busy:
            assert domain in self.attached[device]
        else:
            self.attached[device].append(domain)

    @rule(device=numbers, number=numbers)
    def detach(self, device, number):
        device = self.devices[device % 3]
        mine = self.attached[device]
        if mine:
            device.detach_aux(mine.pop(number % len(mine)))

    @precondition(lambda self: self.aux)
    @rule(number=numbers, iova=pages, pa=frames)
    def change(self, number, iova, pa):
        domain, model = self.aux[number % len(self.aux)]
        if not domain.aux_pasid:
            return
        if iova in model:
            assert domain.unmap(iova, PAGE) == PAGE
            del model[iova]
        else:
            domain.map(iova, pa, PAGE)
            model[iova] = pa

    @precondition(lambda self: self.aux)
    @rule(number=numbers)
    def free(self, number):
        pair = self.aux[number % len(self.aux)]
        used = any(pair[0] in mine for mine in self.attached.values())
        try:
            pair[0].free()
        except Busy:
            assert used
        else:
            assert not used
            self.aux.remove(pair)

    @invariant()
    def every_pasid_is_one_domain_and_the_main_domains_stay(self):
        if not hasattr(self, "system"):
            return
        live = {}
        for device, mine in self.attached.items():
            for domain in mine:
                live[device.domain, domain.aux_pasid] = domain
        models = {domain: model for domain, model in self.aux}
        for device in self.devices:
            assert device.translate(0x1008).pa == RAM + 8
            for pasid in range(1, 8):
                domain = live.get((device.domain, pasid))
                for iova in (0, 0x1000, 0x20_0000):
                    pa = models[domain].get(iova) if domain else None
                    assert device.translate(iova, pasid=pasid).pa == pa
                    if pa is not None and device.ats_enabled:
                        assert device.access(iova, pasid=pasid).pa == pa
        assert self.system.stale() == []
        owners = [domain for domain, _ in self.aux if domain.aux_pasid]
        assert len(self.system.pasids) == len(owners)
        assert len(self.system.asids) == len(owners) + 2


AuxMachine.TestCase.settings = settings(
    max_examples=12, stateful_step_count=30, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
TestAuxMachine = AuxMachine.TestCase
