"""Systems driven at random: after each step every translation is what a dictionary says.

Two SMMUs with caches, devices with and without PASIDs, ATS and stalls, paging domains of both
stages, processes; attach, replace, detach, bind, unbind, map, unmap, exit, fault.  No cache entry
is stale after a step, and no PASID, ASID, VMID or table page is leaked.
"""

import pytest
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
    NoSpace,
    System,
    Viommu,
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
        self.guests = []  # nested domains over some of them
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

    @precondition(lambda self: len(self.domains) < 5)
    @rule(number=numbers)
    def new_host(self, number):
        """A stage-2 domain under a guest's stage 1, which the guest bypasses: a pair of domains."""
        device = self.pick(self.devices, number)
        host, model = device.paging_domain(nest_parent=True), {}
        self.domains.append((host, model))
        self.guests.append((Viommu(host).domain((0b1001, 0)), model))

    @precondition(lambda self: self.guests)
    @rule(device=numbers, number=numbers)
    def replace_by_guest(self, device, number):
        device = self.pick(self.devices, device)
        target = self.pick(self.guests, number)
        try:
            device.replace(target[0])
        except (Busy, InvalidArgument):
            assert target[0].iommu is not device.iommu or device.pasids_in_use
        else:
            self.main[device] = target

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
        used = any(
            pair[0] in (held[0], getattr(held[0], "parent", None))
            for held in (*self.main.values(), *self.at.values())
        )
        try:
            pair[0].free()
        except Busy:
            assert used
        else:
            assert not used
            self.domains.remove(pair)
            self.guests = [guest for guest in self.guests if guest[0].parent is not pair[0]]

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
                or self.main[device][0].stage > 1
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
    def reset(self, device):
        device = self.pick(self.devices, device)
        device.reset_prepare()
        for pasid in (None, *(PASIDS if device.max_pasids else ())):
            assert not device.translate(0x10, pasid=pasid)
        device.reset_done()

    @precondition(lambda self: self.domains)
    @rule(number=numbers)
    def change_asid(self, number):
        domain, _ = self.pick(self.domains, number)
        if domain.stage == 1:
            old = domain.asid
            domain.change_asid()
            assert domain.asid != old

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
                or self.main[device][0].stage > 1
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
        viommus = sum(len(domain.viommus) for domain in twos)
        assert sum(len(iommu.vmids) for iommu in system.iommus) == len(twos) + viommus
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
    max_examples=40, stateful_step_count=40, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
TestMachine = Machine.TestCase


class AuxMachine(RuleBasedStateMachine):
    """The old profile: two SMMUs, auxiliary domains and processes under shared main domains."""

    @initialize(seed=st.integers(0, 1))
    def start(self, seed):
        caches = [Caches.server, Caches.small][seed]
        self.system = System(2, profile=AUX, caches=caches)
        self.base = self.system.pages.in_use
        make = self.system.device
        self.devices = [
            make(1, pasid_bits=3), make(2, pasid_bits=3, ats=True),
            make(3, pasid_bits=3, stall=True), make(1, pasid_bits=3, iommu=1),
        ]  # fmt: skip
        self.mains = []
        for group in (self.devices[:2], self.devices[2:3], self.devices[3:]):
            main = self.system.paging_domain()
            for device in group:
                device.attach(main)
                for feature in ("AUX", "IOPF", "SVA"):
                    if device.has_feature(feature):
                        device.enable_feature(feature)
            main.map(0x1000, RAM, PAGE)
            self.mains.append(main)
        self.aux = []  # (domain, its pages)
        self.spaces = []  # (space, its pages)
        self.attached = {device: [] for device in self.devices}
        self.bonds = {}  # (device, space): Bond

    def pick(self, things, number):
        return things[number % len(things)]

    @precondition(lambda self: len(self.aux) < 6)
    @rule()
    def new(self):
        self.aux.append((self.system.paging_domain(), {}))

    @precondition(lambda self: self.aux)
    @rule(device=numbers, number=numbers)
    def attach(self, device, number):
        device = self.pick(self.devices, device)
        domain, _ = self.pick(self.aux, number)
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
        device = self.pick(self.devices, device)
        mine = self.attached[device]
        if mine:
            device.detach_aux(mine.pop(number % len(mine)))

    @precondition(lambda self: self.aux)
    @rule(number=numbers, iova=pages, pa=frames)
    def change(self, number, iova, pa):
        domain, model = self.pick(self.aux, number)
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
        pair = self.pick(self.aux, number)
        used = any(pair[0] in mine for mine in self.attached.values())
        try:
            pair[0].free()
        except Busy:
            assert used
        else:
            assert not used
            self.aux.remove(pair)

    # --- processes ---

    @precondition(lambda self: len(self.spaces) < 3)
    @rule(lazy=st.booleans(), shared=st.booleans())
    def new_process(self, lazy, shared):
        """Lazy: its pages are mapped at faults; shared: under the processors' ASID (F47)."""
        model = {}

        def handler(fault):
            page = fault.iova & -PAGE
            if page in model:
                return False
            space.table.map(page, RAM + PAGE, PAGE)
            model[page] = RAM + PAGE
            return True

        taken = {space.asid for space, _ in self.spaces}
        asid = next(n for n in range(1, 9) if n not in taken) if shared else None
        space = AddressSpace.of(self.system, asid=asid, handler=handler if lazy else None)
        self.spaces.append((space, model))

    @precondition(lambda self: self.spaces)
    @rule(device=numbers, number=numbers)
    def bind(self, device, number):
        device = self.pick(self.devices, device)
        space, _ = self.pick(self.spaces, number)
        try:
            bond = device.bind(space)
        except InvalidArgument:
            # the ASID is that of another process, which took one of the driver's
            assert space.asid in self.system.asids and (device, space) not in self.bonds
        except NoSpace:
            assert not space.pasid and len(self.system.pasids) == 7
        else:
            assert self.bonds.setdefault((device, space), bond) is bond

    @precondition(lambda self: self.bonds)
    @rule(number=numbers, force=st.booleans())
    def unbind(self, number, force):
        at = self.pick(list(self.bonds), number)
        bond = self.bonds[at]
        bond.unbind(force=force)
        if not bond.references:
            del self.bonds[at]

    @precondition(lambda self: self.spaces)
    @rule(number=numbers, iova=pages, pa=frames)
    def process_changes(self, number, iova, pa):
        space, model = self.pick(self.spaces, number)
        if iova in model:
            assert space.table.unmap(iova, PAGE) == PAGE
            del model[iova]
        else:
            space.table.map(iova, pa, PAGE)
            model[iova] = pa

    @precondition(lambda self: self.spaces)
    @rule(number=numbers)
    def process_ends(self, number):
        space, _ = pair = self.pick(self.spaces, number)
        space.exit()
        for at, bond in list(self.bonds.items()):
            if at[1] is space:
                assert not at[0].translate(0x1000, pasid=space.pasid)
                bond.unbind(force=True)
                del self.bonds[at]
        space.table.close()
        self.spaces.remove(pair)
        assert space.pasid == 0

    # --- what must hold ---

    def live(self):
        """{(main domain, PASID): pages} of what CDs hold."""
        models = dict(self.aux)
        found = {}
        for device, mine in self.attached.items():
            for domain in mine:
                found[device.domain, domain.aux_pasid] = models[domain], False
        spaces = dict(self.spaces)
        for device, space in self.bonds:
            found[device.domain, space.pasid] = spaces[space], True
        return found

    @invariant()
    def every_pasid_is_one_domain_and_the_main_domains_stay(self):
        if not hasattr(self, "system"):
            return
        live = self.live()
        for device in self.devices:
            assert device.translate(0x1008).pa == RAM + 8
            for pasid in range(1, 8):
                model, process = live.get((device.domain, pasid), ({}, False))
                for iova in (0, 0x1000, 0x20_0000):
                    # a fault of a process may map the page first
                    found = device.translate(iova, pasid=pasid).pa
                    assert found == model.get(iova)
                    bound = not process or any(
                        one is device and space.pasid == pasid for one, space in self.bonds
                    )
                    if found is not None and device.ats_enabled and bound:
                        assert device.access(iova, pasid=pasid).pa == found
        assert self.system.stale() == []

    @invariant()
    def nothing_is_leaked(self):
        if not hasattr(self, "system"):
            return
        owners = [domain for domain, _ in self.aux if domain.aux_pasid]
        processes = [space for space, _ in self.spaces if space.pasid]
        assert set(self.system.pasids) == {
            *(domain.aux_pasid for domain in owners), *(space.pasid for space in processes)
        }  # fmt: skip
        asids = {domain.asid for domain in (*owners, *self.mains)}
        asids |= {domain.asid for space, _ in self.spaces for domain in space.domains.values()}
        assert set(self.system.asids) == asids
        assert all(iommu.smmu.stalls == [] for iommu in self.system.iommus)

    def teardown(self):
        if not hasattr(self, "system"):
            return
        for device in self.devices:
            device.release()
        for domain, _ in self.aux:
            domain.free()
        for main in self.mains:
            main.free()
        for space, _ in self.spaces:
            space.exit()
            space.table.close()
        system = self.system
        assert (len(system.asids), len(system.pasids)) == (0, 0)
        # the leaves of the stream tables stay, one for each SMMU
        assert system.pages.in_use == self.base + 2 * 64 * 256
        assert system.stale() == []


AuxMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
TestAuxMachine = pytest.mark.slow(AuxMachine.TestCase)
