"""Errors of the driver half, for tests/mutants.py; `Mutant` comes from there.

By file: (name, old text, new text, arguments of pytest).  Each invalidation that the driver half
sends is missing once, and each rule of order is broken once.
"""

def of(file, *found):
    return [Mutant("driver-" + name, file, old, new, tests) for name, old, new, tests in found]  # noqa: F821


def some(words, *files):
    """Tests by words of their names: of test_iommu_orders.py, and of others."""
    return (*(f"test_{file}.py" for file in files or ("iommu_orders",)), "-k", f"({words}) and not slow")


MUTANTS = [
    *of(
        "iommu/smmu/master.py",
        # the order of an attach (F67)
        ("attach-knows-the-new-domain-late",
         "            new.link()\n"
         "            undo.add(new.unlink)\n"
         "            if self.ats_enabled:\n"
         "                undo.add(self.iommu.system.lock.defer, self._flush_atcs)\n"
         "            # 2. ATS goes off before an STE that refuses it\n"
         "            undo.add(setattr, self, \"ats_enabled\", self.ats_enabled)\n"
         "            if self.ats_enabled and not ats:\n"
         "                self._ats_off()\n"
         "            # 3. CD, then STE\n"
         "            self._write(domain, table, ats, undo)",
         "            if self.ats_enabled and not ats:\n"
         "                self._ats_off()\n"
         "            self._write(domain, table, ats, undo)\n"
         "            new.link()",
         some("f67", "iommu_domains")),
        ("attach-forgets-the-old-domain-early",
         "            self._write(domain, table, ats, undo)\n"
         "            # 4. ATS comes on with empty ATCs, or they are emptied",
         "            old.unlink()\n"
         "            self._write(domain, table, ats, undo)\n"
         "            old.link()",
         some("f67", "iommu_domains")),
        ("ats-goes-off-after-the-ste",
         "            if self.ats_enabled and not ats:\n"
         "                self._ats_off()\n"
         "            # 3. CD, then STE\n"
         "            self._write(domain, table, ats, undo)",
         "            self._write(domain, table, ats, undo)\n"
         "            if self.ats_enabled and not ats:\n"
         "                self._ats_off()",
         some("f67", "iommu_domains")),
        ("ats-comes-on-before-the-atc-is-empty",
         "            self._flush_atcs()\n            self.ats_enabled = True",
         "            self.ats_enabled = True",
         some("warm_atc or f67 or reset_empties", "iommu_orders", "iommu_domains")),
        ("ats-comes-on-before-the-ste",
         "            self._write(domain, table, ats, undo)\n"
         "            # 4. ATS comes on with empty ATCs, or they are emptied\n"
         "            self._ats_on(ats)",
         "            self._ats_on(ats)\n"
         "            self._write(domain, table, ats, undo)",
         some("f67 or warm_atc", "iommu_domains", "iommu_orders")),
        ("ats-goes-off-with-a-full-atc", "        for atc in self.atcs:\n            atc.clear()", "",
         some("f67 or warm_atc", "iommu_domains", "iommu_orders")),
        ("attach-takes-nothing-of-the-atc-back",
         "            if self.ats_enabled:\n"
         "                undo.add(self.iommu.system.lock.defer, self._flush_atcs)", "",
         some("rolled_back_attach")),
        ("main-faults-go-to-the-next-domain",
         "        self.drain(None if isinstance(old.domain, NestedDomain) else 0)", "",
         some("main_domain or guest")),
        ("faults-of-a-guests-pasids-stay", "None if isinstance(old.domain, NestedDomain) else 0",
         "0", some("guests_stalls")),
        ("faults-are-read-after-the-domain-changed",
         "        self.drain(None if isinstance(old.domain, NestedDomain) else 0)\n"
         "        self.attachments[0] = new",
         "        self.attachments[0] = new\n"
         "        self.drain(None if isinstance(old.domain, NestedDomain) else 0)",
         some("own_events")),
        ("a-guest-has-no-events-of-its-pasids", "not ssid or isinstance(self.domain, NestedDomain)",
         "not ssid", some("own_events")),
        ("main-domain-is-not-left", "        self._left(old)", "", some("refused")),
        # what has ATS, and what stalls
        ("ats-with-a-forced-stall",
         "        if domain.stage > 1 and self.iommu.stall_force:\n"
         "            return False  # S2S=1 is forced, and excludes EATS (IHI 0070 5.2)", "",
         some("stall_model")),
        ("a-guest-that-wants-no-ats-has-it", "not isinstance(domain, NestedDomain) or domain.ats",
         "True", some("stall_model")),
        ("forced-stalls-are-not-seen", "iommu.can_stall and (device.stall or iommu.stall_force)",
         "iommu.can_stall and device.stall", some("stall_model")),
        # PASIDs
        ("stage-2-under-pasids", "domain.stage == 2 and used", "False",
         some("f10 or f25", "iommu_domains")),
        ("a-guest-under-pasids",
         "            if used:\n"
         "                raise Busy(\n"
         "                    \"device\", device, text=\"device has PASIDs attached: its CD table is ours\"\n"
         "                )", "",
         some("f10 or f25 or carries", "iommu_domains", "iommu_orders")),
        ("pasids-under-a-guest",
         "        if main.stage > 1:\n            raise InvalidArgument(\n"
         "                \"device\", device, text=f\"device has {main!r}: there is no CD table of ours\"\n"
         "            )", "",
         some("f25 or carries", "iommu_domains", "iommu_orders")),
        ("incoherent-devices-may-attach", "domain.coherent_only and not self.coherent", "False",
         some("coherence")),
        ("direct-memory-may-be-blocked", "domain is BLOCKED and device.direct", "False",
         some("f14", "iommu_domains")),
        ("first-pasid-without-a-table-in-the-ste",
         "                if first and self.domain.kind in _PLAIN:  # F26: its STE had no CD table\n"
         "                    self._write_ste(self._ste(self.domain, table, self.has_ats), undo)", "",
         some("f26", "iommu_domains")),
        ("a-replaced-pasid-stays-in-the-atc",
         "                    for master in table.masters:\n"
         "                        master.flush_atc(ssid)", "",
         some("warm_atc")),
        ("a-replaced-pasid-keeps-its-faults",
         "            for master in table.masters:\n"
         "                master.drain(ssid)\n"
         "            table.forget(ssid, before)",
         "            table.forget(ssid, before)", some("replaced_pasid")),
        ("a-detached-pasid-stays-in-atcs", "            table.flush_atcs(ssid)", "",
         some("warm_atc or every_device_of_a_table")),
        ("a-detached-pasid-keeps-its-faults",
         "            for master in table.masters:\n"
         "                master.drain(ssid)\n"
         "            table.forget(ssid, domain)",
         "            table.forget(ssid, domain)", some("next_domain or next_one")),
        ("what-others-have-stays-in-the-atc",
         "            lock.insist(self.flush_atc, ssid)  # other devices of the main domain have it",
         "            pass", some("leaves_is_not_in_its_atc")),
        ("the-first-to-leave-takes-the-cd",
         "len(table.masters) > 1 and domain.shares_cd(old)", "False",
         some("leaves_is_not_in_its_atc or f19", "iommu_orders", "iommu_aux")),
        ("the-last-pasid-leaves-the-table",
         "            lock.insist(self._plain_ste)", "            pass", some("f26", "iommu_domains")),
        ("the-last-pasid-leaves-the-atc",
         "            self._flush_atcs()\n            self._ats_off()",
         "            self._ats_off()", some("last_pasid")),
        ("the-last-pasid-leaves-ats-on",
         "        if self.ats_enabled:\n            self._flush_atcs()\n            self._ats_off()", "",
         some("last_pasid")),
        # ATCs
        ("a-guests-pasids-stay-in-the-atc",
         "        if isinstance(self.domain, NestedDomain):\n            self.flush_guest_atcs()", "",
         some("guests_atc")),
        ("an-atc-is-told-later",
         "            for sid in self.sids:\n"
         "                self.iommu.invalidate_atc(sid, ssid)\n"
         "            self.iommu.queue.sync()",
         "            for sid in self.sids:\n                self.iommu.invalidate_atc(sid, ssid)",
         some("warm_atc or every_device_of_a_table or leaves_is_not_in_its_atc")),
        ("a-device-in-reset-is-told",
         "        if self.has_ats and not self.blocked:\n"
         "            for sid in self.sids:\n"
         "                domain.invalidations.remove(self.iommu.queue, kind, sid, ssid)",
         "        pass", some("reset_empties or refused")),
        ("a-reset-keeps-its-faults", "        self.drain(None)", "", some("reset_empties")),
        ("a-reset-leaves-ats-on",
         "            if self.ats_enabled:\n                self._ats_off()\n"
         "            self._write_ste(entry.ste_abort(), undo)",
         "            self._write_ste(entry.ste_abort(), undo)", some("reset_empties")),
        ("a-reset-ends-with-the-atc-as-it-was",
         "            self._write_ste(self._ste(self.domain, table, ats), undo)\n"
         "            self._ats_on(ats)",
         "            self._write_ste(self._ste(self.domain, table, ats), undo)\n"
         "            self.ats_enabled = ats", some("reset_empties")),
        ("a-reset-ends-without-its-atc-being-known",
         "                self.enter_atcs(domain, ssid, kind)\n"
         "                undo.add(self.leave_atcs, domain, ssid, kind)",
         "                pass", some("reset_empties")),
    ),
    *of(
        "iommu/smmu/cdtable.py",
        ("a-new-leaf-is-not-told", "        iommu.invalidate_cd(self.sids(), ssid, leaf=False)", "",
         some("new_leaves")),
        ("a-leaf-that-goes-is-not-told",
         "            self.iommu.invalidate_cd(self.sids(), ssid, leaf=False)", "", some("new_leaves")),
        ("a-leaf-that-goes-is-still-pointed-to",
         "            self.iommu.store(self.base + 8 * index, 0)", "", some("new_leaves")),
        ("one-stream-is-told-of-a-cd",
         "        return tuple(sid for master in self.masters for sid in master.sids)",
         "        return self.masters[0].sids", some("every_device_of_a_table or f19", "iommu_orders",
                                                    "iommu_aux")),
        ("one-atc-is-told-of-a-cd",
         "        for master in self.masters:\n            lock.insist(master.flush_atc, ssid)",
         "        for master in self.masters[:1]:\n            lock.insist(master.flush_atc, ssid)",
         some("every_device_of_a_table")),
        ("a-rolled-back-cd-stays-in-atcs", "        undo.add(self.flush_atcs, ssid)", "",
         some("rolled_back")),
        ("an-old-cd-is-not-put-back",
         "            self.cds[ssid] = domain\n            self.write(ssid, domain.cd(self.stall))",
         "            self.cds[ssid] = domain",
         some("rolled_back or refused")),
        ("an-atc-is-not-known-to-the-domain",
         "        for master in self.masters:\n"
         "            master.enter_atcs(domain, ssid)\n"
         "            undo.add(master.leave_atcs, domain, ssid)\n"
         "        undo.add(self.flush_atcs, ssid)",
         "        for master in self.masters[:1]:\n"
         "            master.enter_atcs(domain, ssid)",
         some("every_device_of_a_table")),
        ("whoever-joins-is-not-known-to-the-domains",
         "        for ssid, domain in self.cds.items():\n"
         "            master.enter_atcs(domain, ssid)\n"
         "            undo.add(master.leave_atcs, domain, ssid)",
         "        pass", some("joins", "iommu_orders", "iommu_aux")),
        ("the-tables-leaves-are-lost",
         "        for leaf in (*self.leaves.values(), *self.spare.values()):\n"
         "            pages.free(leaf, 64 << LEAF_LG2)",
         "        pass", some("plugging or wide_tables")),
    ),
    *of(
        "iommu/domain.py",
        ("a-tag-is-not-dropped",
         "                self.system.lock.insist(iommu.flush_tag, kind, number)",
         "                pass", some("a_tag_is_forgotten")),
        ("an-attached-domain-is-not-active", "        self.active = True", "", some("warm_atc")),
        ("what-is-unmapped-stays",
         "        self.invalidations.invalidate(first, last, self.granule_lg2, page_lg2, not tables)\n"
         "        self._flush_guests()",
         "        self._flush_guests()", some("warm_atc or two_guests")),
        ("a-guests-cds-stay", "                    queue.issue(\"CFGI_CD_ALL\", StreamID=sid)",
         "                    pass", some("guests_cds")),
        ("a-guests-atc-stays-when-the-host-unmaps", "                master.flush_guest_atcs()", "",
         some("guests_atc")),
        ("guests-are-told-later",
         "            queue.sync()", "", some("guests_cds or guests_atc")),
        ("a-guest-has-its-parents-vmid",
         "self.parent.vmid if self.viommu is None else self.viommu.vmid", "self.parent.vmid",
         some("two_guests")),
        ("the-host-forgets-the-guests-vmid",
         "        \"\"\"Both stages are cached under the guest's VMID.\"\"\"\n"
         "        return ((S2_VMID, self.vmid), (S2_VMID_S1_CLEAR, self.vmid))",
         "        return ((S2_VMID, self.parent.vmid), (S2_VMID_S1_CLEAR, self.parent.vmid))",
         some("host_takes")),
        ("the-host-leaves-the-guests-stage-1",
         "        \"\"\"Both stages are cached under the guest's VMID.\"\"\"\n"
         "        return ((S2_VMID, self.vmid), (S2_VMID_S1_CLEAR, self.vmid))",
         "        return ((S2_VMID, self.vmid),)", some("host_takes")),
        ("bypass-with-eats-has-ats", "entry.eats(words) == 1 and entry.ste_config(words[0]) == 5",
         "entry.eats(words) == 1", some("stall_model")),
        ("the-old-asid-is-not-dropped",
         "            self.system.lock.insist(iommu.flush_asid, old)", "",
         some("asid_that_a_domain_left")),
        ("the-new-asid-is-not-told",
         "                    self.invalidations.insert(iommu.queue, S1_ASID, new)",
         "                    self.invalidations.insert(iommu.queue, S1_ASID, old)",
         some("asid_that_a_domain_left")),
        ("a-cd-keeps-the-old-asid",
         "                for table, ssid in tables:\n                    table.rewrite(ssid)", "",
         some("asid_that_a_domain_left or f47", "iommu_orders", "iommu_domains")),
        ("a-new-asid-is-not-taken-back", "                undo.add(self._retag, old)", "",
         some("refused")),
        ("a-domain-in-use-is-freed", "self.users or self.children", "self.children",
         some("taken_away_by_nobody or two_shares")),
        ("a-parent-is-freed", "self.users or self.children", "self.users",
         some("f19", "iommu_aux")),
        ("a-freed-domain-is-a-domain",
         "    if getattr(value, \"freed\", False):\n"
         "        raise InvalidArgument(\"domain\", value, text=\"domain was freed\")", "",
         some("a_freed_domain")),
        ("a-closed-guest-is-not-freed",
         "self.parent.freed or (self.viommu is not None and not self.viommu.vmid)",
         "self.parent.freed", some("a_freed_domain")),
        ("guests-outlive-their-parent",
         "            for viommu in self.viommus:\n                viommu.close()", "",
         some("two_guests")),
        ("domains-can-be-copied",
         "        raise WrongType(\"domain\", self, text=f\"{self!r} is part of a system: it has no copies\")",
         "        return object.__reduce_ex__(self, protocol)", some("copies_of_domains")),
        ("a-copy-of-identity-is-another", "        return self.kind.upper()",
         "        return object.__reduce_ex__(self, protocol)", some("constant")),
    ),
    *of(
        "iommu/smmu/iommu.py",
        ("boot-without-cfgi-all", "        self.queue.issue(\"CFGI_ALL\", StreamID=0)", "",
         some("before_the_boot")),
        ("boot-without-tlbi-el2-all", "            self.queue.issue(\"TLBI_EL2_ALL\")",
         "            pass", some("before_the_boot")),
        ("boot-without-tlbi-nsnh-all", "        self.queue.issue(\"TLBI_NSNH_ALL\")", "",
         some("before_the_boot")),
        ("boot-without-its-sync", "        self.queue.sync()\n        self._start_ring(\"EVENTQ\")",
         "        self._start_ring(\"EVENTQ\")", some("boot_is_complete")),
        ("a-new-stream-leaf-is-not-told",
         "            self.queue.issue(\"CFGI_STE\", StreamID=sid, Leaf=0)", "", some("new_leaves")),
        ("a-pasid-is-told-of-no-pasid",
         "            self.queue.issue(\"ATC_INV\", StreamID=sid, SubstreamID=pasid, SSV=1, Size=52)",
         "            self.queue.issue(\"ATC_INV\", StreamID=sid, Size=52)",
         some("warm_atc or every_device_of_a_table")),
        ("cfgi-cd-of-one-stream",
         "        if words:\n            self.queue.run(words)",
         "        self.queue.run(words[:1])", some("new_leaves")),
        ("a-tag-is-never-dropped", "        self.queue.drop(kind, number)", "",
         some("a_tag_is_forgotten")),
        ("an-asid-is-never-dropped", "        self.queue.drop(S1_ASID, asid)", "",
         some("asid_that_a_domain_left")),
        ("a-drain-takes-other-pasids", "sid in sids and ssid in (None, pasid or 0)", "sid in sids",
         some("replaced_pasid")),
        ("a-drain-takes-other-streams", "sid in sids and ssid in (None, pasid or 0)",
         "ssid in (None, pasid or 0)", some("other_devices")),
        ("halves-of-groups-stay",
         "                del self.page_requests[key]  # of a group whose last request has not come",
         "                pass", some("next_one or in_flight or guests_stalls")),
        ("halves-of-other-pasids-go", "ssid in (None, key[1] or 0)", "True", some("replaced_pasid")),
        ("a-drained-fault-is-not-answered",
         "                    self.system.lock.insist(answer, self, record, \"invalid\")",
         "                    pass", some("next_domain")),
        ("a-drained-fault-is-answered-again", "                    record.answered = True", "",
         some("next_domain or main_domain")),
    ),
    *of(
        "iommu/sva.py",
        ("a-dead-process-keeps-its-cd", "                    lock.insist(table.rewrite, ssid)",
         "                    pass", some("dead_process")),
        ("a-dead-process-stays-cached",
         "                lock.insist(domain.invalidations.invalidate_all)",
         "                pass", some("dead_process")),
        ("what-a-process-unmaps-stays",
         "        self.space._invalidate(first, last, page_lg2, not tables)", "",
         some("f35", "iommu_sva")),
        ("the-tables-of-a-process-may-go",
         "        if self.space.bonds:\n"
         "            raise Busy(\"table\", self, text=f\"{self.space!r}: its tables are in use\")", "",
         some("tables_of_a_bound")),
        ("processes-can-be-copied",
         "        raise WrongType(\"space\", self, text=f\"{self!r} is one thing: it has no copies\")",
         "        return object.__reduce_ex__(self, protocol)", some("tables_of_a_bound")),
        ("a-bond-is-detached-by-others",
         "        raise Busy(\"pasid\", pasid, text=f\"pasid {pasid:#x} is bound to {self.space!r}\")",
         "        pass", some("taken_from_a_process")),
        ("a-bond-outlives-its-device",
         "            self.device.system.lock.insist(partial(self._unbind, leaving=True))",
         "            pass", some("plugging or joins")),
        ("domains-of-a-process-stay",
         "        if not domain.users:\n            domain.free()\n            del space.domains[iommu]",
         "        pass", some("a_tag_is_forgotten or plugging")),
        ("a-dead-process-is-bound-again",
         "            if space.exited:\n"
         "                raise InvalidArgument(\"space\", space, text=\"space has ended\")\n"
         "            held.handle.references += 1",
         "            held.handle.references += 1", some("exited_process")),
    ),
    *of(
        "iommu/group.py",
        ("the-first-of-a-group-keep-the-new-domain", "                undo.add(master.attach, old)",
         "", some("all_devices_or_on_none or refused")),
        ("the-first-of-a-group-keep-the-pasid",
         "            if before is None:\n"
         "                undo.add(master.detach_pasid, pasid)\n"
         "            else:\n"
         "                undo.add(master.set_pasid, before.domain, pasid, before.handle)", "",
         some("all_devices_or_on_none or refused")),
        ("the-first-of-a-group-keep-the-leaf", "                undo.add(master.drop_leaf, pasid)",
         "                pass", some("new_leaves")),
        ("the-default-domain-stays", "            default.free()", "            pass",
         some("8_bits_of_asids or plugging")),
        ("a-group-in-reset-changes", "                self.check_reset()\n                self._set(domain)",
         "                self._set(domain)", some("being_reset")),
        ("a-group-in-reset-is-joined-by-pasids",
         "domain is None and not leaving", "False",
         some("being_reset")),
    ),
    *of(
        "iommu/system.py",
        ("a-group-in-reset-is-joined",
         "            if group is not None:\n                group.check_reset()", "",
         some("being_reset")),
        ("whoever-joins-has-no-pasids",
         "            master.set_pasid(one.domain, pasid, one.handle)\n"
         "            undo.add(master.detach_pasid, pasid)", "            pass", some("joins")),
    ),
    *of(
        "iommu/mediated.py",
        ("one-share-ends-all", "len(handle.members) == 1", "True", some("two_shares")),
        ("a-share-is-detached-by-others",
         "        raise Busy(\n"
         "            \"pasid\", pasid, text=f\"pasid {pasid:#x} is that of {len(self.members)} mediated devices\"\n"
         "        )", "        pass", some("taken_away_by_nobody")),
        ("a-share-outlives-its-parent",
         "                device.system.lock.insist(partial(share._detach, leaving=True))",
         "                pass", some("ends_with_its_parent")),
        ("a-share-ends-with-any-device",
         "            if share.parent is device:\n"
         "                device.system.lock.insist(partial(share._detach, leaving=True))",
         "            device.system.lock.insist(partial(share._detach, leaving=True))",
         some("another_leaves")),
        ("a-share-keeps-its-pasid", "                system.give_pasid(pasid)", "",
         some("taken_away_by_nobody or ends_with_its_parent")),
    ),
    *of(
        "iommu/profile.py",
        ("stalls-beside-others", "table.stall != master.stall", "False",
         some("never_share_a_table")),
        ("widths-beside-others", "table.s1cdmax != master.ssid_bits", "False",
         some("joins or unused", "iommu_orders", "iommu_hostile")),
        ("a-main-domain-under-auxiliary-ones",
         "        if device.aux:\n"
         "            raise Busy(\"device\", device, text=\"device has auxiliary domains under its main domain\")",
         "", some("f19 or f18", "iommu_aux")),
        ("a-profile-is-another-after-a-copy",
         "        \"\"\"A profile is one object, also after a copy.\"\"\"\n        return self.name",
         "        return object.__reduce_ex__(self, 2)", some("constant")),
    ),
    *of(
        "iommu/aux.py",
        ("a-domain-is-attached-twice",
         "        if domain.aux_pasid in device.aux:\n"
         "            raise Busy(\"domain\", domain, text=\"domain is attached to this device\")", "",
         some("taken_away_by_nobody or f18", "iommu_orders", "iommu_aux")),
        ("aux-leaves-pasids-off", "        device.enable_pasid()  # S1: if necessary", "        pass",
         some("pasids_are_off")),
        ("a-shutdown-leaves-auxiliary-domains",
         "            lock.insist(device.master.detach_pasid, pasid)", "            pass",
         some("next_domain or its_end")),
        ("a-shutdown-leaves-bonds", "                lock.defer(one.handle.release, device)",
         "                pass", some("its_end")),
        ("a-share-is-taken-by-detach-aux",
         "        if handle is not None:\n            handle.check_detach(pasid)", "",
         some("taken_away_by_nobody")),
    ),
    *of(
        "iommu/nested.py",
        ("a-device-is-taken-from-its-guest",
         "            if self._owns(device.domain):\n"
         "                raise Busy(\"vsid\", vsid, text=f\"{device!r} is attached to the guest's domain\")",
         "", some("not_taken_from_a_guest")),
        ("a-guest-in-use-ends",
         "                if self._owns(one.domain):\n"
         "                    raise Busy(\"viommu\", self, text=f\"{one.master.device!r} is attached\")",
         "                pass", some("two_guests")),
        ("a-guests-vmid-is-never-free", "            self.iommu.vmids.free(self.vmid)", "",
         some("two_guests")),
        ("a-guests-commands-have-its-own-vmid", "layout.unpack(name, word) | {\"VMID\": vmid}",
         "layout.unpack(name, word)", some("two_guests or real_numbers")),
        ("a-guests-all-is-everybodys", "layout.pack(\"TLBI_NH_ALL\", VMID=vmid)",
         "layout.pack(\"TLBI_NH_ALL\")", some("two_guests")),
        ("a-guests-commands-have-its-own-stream", "            fields[\"StreamID\"] = device.sid", "",
         some("real_numbers")),
        ("a-guests-commands-are-done-later", "                    queue.run(done)",
         "                    queue.submit()", some("real_numbers")),
        ("a-guests-events-have-our-stream", "layout.unpack(\"EVENT\", record) | {\"StreamID\": vsid}",
         "layout.unpack(\"EVENT\", record)", some("own_events")),
        ("a-released-device-stays-the-guests",
         "        for vsid in [vsid for vsid, one in self.devices.items() if one is device]:\n"
         "            del self.devices[vsid]", "        pass", some("not_taken_from_a_guest")),
    ),
    *of(
        "iommu/fault.py",
        ("a-fault-goes-to-whoever-has-the-pasid",
         "    if fault.device.domain_at(fault.pasid or 0) is not domain:\n"
         "        return \"invalid\"  # it changed hands since the record was taken", "",
         some("while_it_is_asked")),
        ("a-drained-request-is-asked",
         "    if record.answered or is_stop_marker(record):\n        return",
         "    if is_stop_marker(record):\n        return", some("next_one or in_flight")),
        ("requests-of-unknown-streams-pile-up",
         "record.device is not None and waiting < MOST_WAITING", "waiting < MOST_WAITING",
         some("pile_up")),
        ("requests-pile-up", "record.device is not None and waiting < MOST_WAITING",
         "record.device is not None", some("pile_up")),
        ("a-guest-gets-the-hosts-events",
         "not stalled and not fields[\"S2\"] and isinstance(record.domain, NestedDomain)",
         "not stalled and isinstance(record.domain, NestedDomain)", some("own_events")),
        ("a-dead-process-is-asked", "fault.pasid is None or domain.space.exited",
         "fault.pasid is None", some("nobody_answer")),
    ),
    *of(
        "iommu/device.py",
        ("a-released-device-keeps-its-faults", "            lock.insist(master.drain, None)", "",
         some("leaves_nothing_in_flight")),
        ("a-released-device-is-still-there", "            master.iommu.forget(self)", "",
         some("plugging")),
        ("a-release-goes-on-whatever-is-left",
         "            if any(master.attachments):\n                return", "",
         some("memory_keeps")),
        ("a-member-in-reset-is-alone", "group.resetting or len(group.devices) != 1",
         "group.resetting", some("being_reset")),
        ("pasids-go-off-under-domains",
         "        if any(self.master.attachments):\n"
         "            raise Busy(\"device\", self, text=\"device has PASIDs attached\")", "",
         some("pasids_are_off")),
        ("a-device-sends-pasids-that-are-off", "self.pasids and not self.pasid_enabled", "False",
         some("pasids_are_off")),
        ("devices-can-be-copied",
         "        raise WrongType(\"device\", self, text=f\"{self!r} is part of a system: it has no copies\")",
         "        return object.__reduce_ex__(self, protocol)", some("tables_of_a_bound")),
    ),
    *of(
        "iommu/smmu/entry.py",
        ("a-guest-floods-the-host",
         "    two = _words(\"STE\", V=1, Config=7, MEV=1, **_stage2(table, vmid, stall and not ats, features))",
         "    two = _words(\"STE\", V=1, Config=7, **_stage2(table, vmid, stall and not ats, features))",
         some("merges_events")),
    ),
    *of(
        "iommu/smmu/invalidations.py",
        ("atcs-are-told-first",
         "((S1_ASID, S2_VMID), (S2_VMID_S1_CLEAR,), (ATS, ATS_FULL))",
         "((ATS, ATS_FULL), (S1_ASID, S2_VMID), (S2_VMID_S1_CLEAR,))",
         some("tlbs_are_told")),
        ("one-entry-is-told",
         "            rows = [key for key, users in self._rows() if users]",
         "            rows = [key for key, users in self._rows() if users][:1]",
         some("warm_atc or every_device_of_a_table")),
    ),
    *of(
        "_driver/ring.pyx",
        ("what-is-stuck-is-freed", "                error.__dict__[\"stuck\"] = True",
         "                pass", some("stays_as_it_is")),
        ("nothing-is-taken-back", "                call(*arguments)", "                pass",
         some("refused or rolled_back")),
        ("an-ste-is-not-told", "        batch_add(&commands, &c)\n        update = self._write(address, words, True, &commands)",
         "        update = self._write(address, words, True, &commands)", some("main_domain or next_main or warm_atc")),
        ("a-cd-is-not-told",
         "                place(\"CFGI_CD\", \"StreamID\", &c, &STREAM_ID, sid)\n"
         "                batch_add(&commands, &c)",
         "                place(\"CFGI_CD\", \"StreamID\", &c, &STREAM_ID, sid)",
         some("warm_atc or every_device_of_a_table or f27", "iommu_orders", "iommu_domains")),
        ("nothing-is-synced",
         "        batch_add(b, &SYNC)\n        try:\n            self.push(b, 1)\n        finally:\n"
         "            b.count -= 1",
         "        self.push(b, 1)", some("tlbs_are_told")),
        ("an-atc-is-told-of-one-page", "            size = atc_size(s.first, s.last)",
         "            size = 0", some("larger_than_a_page")),
        ("an-atc-is-told-of-no-pasid",
         "            if ssid:\n"
         "                c = ATC_INV_PASID\n"
         "                fill_in(&c, &SUBSTREAM_ID, ssid)", "",
         some("reset_empties or every_device_of_a_table")),
        ("stage-1-through-a-dropped-page-stays",
         "        c = TLBI_NH_ALL\n        fill_in(&c, &VMID, number)\n        return batch_add(b, &c)",
         "        return 0", some("host_takes")),
        ("e2h-is-told-as-el1", "&TLBI_S2 if kind == KIND_S2_VMID else &TLBI_EL2 if e2h else &TLBI_NH",
         "&TLBI_S2 if kind == KIND_S2_VMID else &TLBI_NH", some("a_tag_is_forgotten")),
        ("an-entry-changes-under-the-reader",
         "                self._step(address, 1, &now, &ahead, commands, &syncs, &hitless)\n"
         "                self._step(address, 0xFE, &now, &target, commands, &syncs, &hitless)\n"
         "                self._step(address, 1, &now, &target, commands, &syncs, &hitless)",
         "                self._step(address, 0xFF, &now, &target, commands, &syncs, &hitless)",
         some("f44", "iommu_domains")),
    ),
]
