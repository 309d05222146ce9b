"""Errors of the driver's command queue, entry writer and invalidations, for tests/mutants.py."""


def of(file, *found):
    return [Mutant(name, file, old, new, tests) for name, old, new, tests in found]  # noqa: F821


def some(words, file="ring"):
    """Tests of a file by words of their names."""
    return (f"test_{file}.py", "-k", words)


KERNEL = some("commands_are", "kernel_commands")

MUTANTS = [
    *of(
        "_driver/ring.pyx",
        ("ring-a-batch-goes-round-without-its-wrap", "<Py_ssize_t>(self._size - slot)",
         "<Py_ssize_t>self._size", some("random_batches")),
        ("ring-an-error-is-not-acknowledged", 'self._smmu.read("GERRORN") ^ CMDQ_ERR',
         'self._smmu.read("GERRORN")', some("every_refused")),
        ("ring-an-abort-loses-its-command", "error != CMDQ_CONS_ERR_ABT", "True",
         some("aborted_once")),
        ("ring-the-index-is-not-of-the-batch",
         "self.issued - (self.prod - cons & self._mask) - self._began",
         "self.issued - (self.prod - cons & self._mask)", some("index or one_by_one")),
        ("ring-room-is-there-after-an-abort",
         "self._size - (self.prod - <uint32_t>cons & self._mask)", "self._size", some("aborted")),
        ("ring-an-overflow-is-not-noticed",
         "ring.prod != ring.cons or ring.ovflg != ring.ovackflg", "ring.prod != ring.cons",
         some("record_waits")),
        ("ring-an-ste-is-not-prefetched", "            self.queue.push(&commands)",
         "            pass", KERNEL),
        ("writer-split-ats-is-safe", "any_of(old, &STE_EATS_S2S) or any_of(new, &STE_EATS_S2S)",
         "any_of(old, &STE_EATS_S2S)", some("random_entries")),
        ("writer-a-bypassed-substream-has-no-shcfg", "ste_s1dss(ste.words) == STE_S1DSS_BYPASS",
         "False", some("used_bits")),
        ("writer-epd0-uses-ttb0", "CD_NO_TTB0 if cd_epd0(cd.words) else CD_ALL", "CD_ALL",
         some("used_bits")),
        ("writer-what-nobody-reads-waits", "0xFF & ~critical", "0", some("random_entries")),
        ("writer-an-entry-changes-while-it-is-valid", "                ahead.words[0] = 0",
         "                pass", some("random_entries")),
        ("tlbi-a-block-drops-the-whole-tag", "step_lg2 + s.granule_lg2 - 3",
         "2 * s.granule_lg2 - 3", some("blocks", "invalidations")),
        ("tlbi-a-table-is-a-leaf", "    fill_in(&tagged, &LEAF, s.leaf)",
         "    fill_in(&tagged, &LEAF, 1)", some("random_ranges")),
        ("tlbi-one-page-of-a-table-is-one", "not s.leaf and pages & 31 == 1", "False",
         some("random_ranges")),
        ("tlbi-e2h-has-the-opcodes-of-el1", "&TLBI_EL2 if e2h else &TLBI_NH", "&TLBI_NH",
         some("random_ranges")),
        ("tlbi-s12-vmall-needs-nh-all",
         "        if names_tag(s, ranges):  # TLBI_S12_VMALL has done it\n            return 0",
         "        pass", some("stage_2")),
        ("atc-inv-of-a-pasid-has-no-ssv", "                c = ATC_INV_PASID",
         "                c = ATC_INV", some("random_ranges")),
        ("atc-span-is-one-too-small", "bits_of(first >> 12 ^ last >> 12)",
         "bits_of((first >> 12 ^ last >> 12) >> 1)", some("random_ranges")),
    ),
    *of(
        "iommu/smmu/invalidations.py",
        ("invs-stage-1-is-dropped-with-stage-2",
         "((S1_ASID, S2_VMID), (S2_VMID_S1_CLEAR,), (ATS, ATS_FULL))",
         "((S1_ASID, S2_VMID, S2_VMID_S1_CLEAR), (ATS, ATS_FULL))", some("stage_2")),
        ("invs-the-order-is-kept-after-a-change",
         "        self._version += 1\n        return left", "        return left",
         some("what_is_removed", "invalidations")),
    ),
    *of(
        "iommu/smmu/iommu.py",
        ("a-leaf-of-the-stream-table-is-not-told",
         '            self.queue.issue("CFGI_STE", StreamID=sid, Leaf=0)', "            pass", KERNEL),
    ),
    *of(
        "iommu/domain.py",
        ("a-tag-that-others-use-is-flushed",
         "not self.invalidations.remove(iommu.queue, kind, number)",
         "self.invalidations.remove(iommu.queue, kind, number) is not None", KERNEL),
        ("a-tag-is-never-flushed",
         "                self.system.lock.insist(iommu.flush_tag, kind, number)",
         "                pass", KERNEL),
    ),
]
