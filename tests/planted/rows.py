"""Errors of single rows of docs/rules.md, for tests/mutants.py: each takes its rule out.

A sample that was drawn; the name is that of the row.  By file, as in hardware.py.
"""


def of(file, *found):
    return [
        Mutant(name, file, old, new, (f"test_{test}.py", "-k", words))  # noqa: F821
        for name, old, new, test, words in found
    ]


MUTANTS = [
    *of(
        "_engine/stage1.pxd",
        ("s3-13-7-1-1",
         "            leaf.desired = with_access_flag(leaf.d)",
         "            leaf.desired = leaf.d",
         "ats", "a_page_is_marked_dirty_for_a_write_that_is_granted"),
        ("s3-21-1-2-1",
         "not output_fits(address, half, leaf.shift, va)",
         "not output_fits(address, half, leaf.shift, va) or no_translation(leaf.d, leaf.level)",
         "reference", "blocks_are_allowed_at_some_levels"),
        ("v8-15-4-1",
         "    why = half_fault(context, va, upper, access)\n"
         "    if why:\n"
         "        return why\n"
         "    at.table = half.table\n"
         "    at.tables = 0\n"
         "    at.shift = half.shift\n"
         "    why = find_leaf(half, port, FETCH_TT, va & half.index_mask, &at, leaf, simple)\n"
         "    if unlikely(why):\n"
         "        return why",
         "    at.table = half.table\n"
         "    at.tables = 0\n"
         "    at.shift = half.shift\n"
         "    why = find_leaf(half, port, FETCH_TT, va & half.index_mask, &at, leaf, simple)\n"
         "    if why == 0:\n"
         "        why = half_fault(context, va, upper, access)\n"
         "    if unlikely(why):\n"
         "        return why",
         "reference", "e0pd_stops_unprivileged_accesses"),
        ("s5-4-9-b",
         "    if not half.enabled:\n"
         "        return why_of_half(WHY_EPD0, upper)",
         "",
         "reference", "txsz_outside_its_limits_is_c_bad_cd"),
        ("v8-5-2-2-1",
         "    if not simple and context.hd and clean_s1(d):\n"
         "        d = dirty_s1(d)",
         "    if not simple and context.hd and clean_s1(d):\n"
         "        return ((permissions[context.regime * 32 + upper * 16 + leaf_permissions(dirty_s1(d), tables)] & (2 | 16))\n"
         "                | (permissions[context.regime * 32 + upper * 16 + leaf_permissions(d, tables)] & ~<unsigned int>(2 | 16)))",
         "stage2", "dbm_needs_both_enables_and_nothing_else_in_the_way"),
    ),
    *of(
        "_engine/translate.pxd",
        ("v8-16-1",
         "view != NULL and why == 0 and s.kind == KIND_S1",
         "view != NULL and s.kind == KIND_S1",
         "single_rules", "faults_other_than_of_permission_are_not_cached"),
    ),
    *of(
        "_engine/lookup.pxd",
        ("s3-3-2-12",
         "    return cd_output(hw, ipa, kind, address, syndrome)",
         "    return stage2(view, &memo.context, port, ipa, PERM_PR, False, CLASS_CD, &leaf, address, syndrome)",
         "operation", "a_pointer_to_a_context_is_a_physical_address_without_stage_2"),
        ("s3-13-2-3",
         "        why = stage2(view, &memo.context, port, ipa, PERM_PR, False, CLASS_CD, &leaf, address,\n"
         "                     syndrome)",
         "        why = stage2(view, &memo.context, port, ipa, PERM_PR, True, CLASS_CD, &leaf, address,\n"
         "                     syndrome)",
         "operation", "a_context_fetch_sets_the_access_flag_and_never_marks_its_page_dirty"),
        ("s4-3-3-5",
         "fetch8(port, FETCH_L1CD, NO_LEVEL, memo.l1cd_at, &memo.l1cd)",
         "FETCH_OK if view != NULL and memo.l1cd & 1 else fetch8(port, FETCH_L1CD, NO_LEVEL, memo.l1cd_at, &memo.l1cd)",
         "command_meanings", "level_1_context_descriptors_are_read_with_every_cd_that_is_not_cached"),
    ),
    *of(
        "_engine/queue.pxd",
        ("s3-4-3-6",
         "base & (address_mask | 32)",
         "base",
         "queues", "addresses_of_queues_and_messages_are_truncated_to_oas"),
        ("s3-5-3-1",
         "outcome.event == 0 or not core.queues.events.placed",
         "True",
         "queues", "every_face_records"),
        ("s3-5-3-5",
         "    status = ring_put(q, &q.events, &own, record, True, False, &put)",
         "    status = 0",
         "queues", "every_face_records"),
    ),
    *of(
        "features.py",
        ("s6-3-1-3-a",
         '        return self._register("IDR0")',
         '        return self._register("IDR0") & ~layout.mask("IDR0", "COHACC")',
         "registers", "identification_registers_tell_the_features"),
        ("s6-3-1-3-b",
         '        return self._register("IDR0")',
         '        return self._register("IDR0") & ~layout.mask("IDR0", "DORMHINT")',
         "registers", "identification_registers_tell_the_features"),
        ("s6-3-4-8-a",
         '_needs("6.3.4", "pasidtt", "ats", "PASIDs of Translated transactions need ATS")',
         '_needs("6.3.4", "pasidtt", "ssidsize", "PASIDs need SubstreamIDs")',
         "features", "random_registers"),
        ("s6-3-4-8-b",
         '_needs("6.3.4", "pasidtt", "ssidsize", "PASIDs need SubstreamIDs")',
         '_needs("6.3.4", "pasidtt", "ats", "PASIDs need SubstreamIDs")',
         "features", "random_registers"),
        ("s6-3-2-4-a",
         '_brings("6.3.2", "ecmdq", "cohacc", "enhanced command queues need coherent access")',
         '_brings("6.3.2", "ecmdq", "msi", "enhanced command queues need MSIs")',
         "features", "random_registers"),
        ("s6-3-2-4-b",
         '_brings("6.3.2", "ecmdq", "msi", "enhanced command queues need MSIs")',
         '_brings("6.3.2", "ecmdq", "cohacc", "enhanced command queues need coherent access")',
         "features", "random_registers"),
        ("s6-3-2-4-c",
         'lambda f: f["queues_preset"] and f["ecmdq"]',
         "lambda f: False",
         "features", "random_registers"),
        ("s6-3-2-11",
         'lambda f: f["sidsize"] >= 7 and f["st_level"] == 0',
         "lambda f: False",
         "features", "random_registers"),
    ),
    *of(
        "_rules/config.pxd",
        ("s5-4-9-a",
         "not (two and cd_epd0(cd))",
         "True",
         "reference", "txsz_outside_its_limits_is_c_bad_cd"),
        ("s5-4-1-1",
         "two and not cd_epd1(cd)",
         "not cd_epd1(cd)",
         "reference", "single_ttb_worlds_have_no_upper_half"),
        ("s2-2-2",
         "two and not hw.asid16 and cd_asid(cd) >> 8",
         "False",
         "reference", "illegal_cds"),
        ("s5-2-23",
         "1 if ste_s1dss(ste) == STE_S1DSS_SUBSTREAM_0 else 0",
         "0",
         "reference", "substream_rules"),
        ("s5-2-10-a",
         "6 if fmt == 1 else 10 if fmt == 2 else 0",
         "6 if fmt == 1 else 6 if fmt == 2 else 0",
         "reference", "context_table_formats"),
        ("s5-2-10-b",
         "6 if fmt == 1 else 10 if fmt == 2 else 0",
         "10 if fmt == 2 else 0",
         "reference", "context_table_formats"),
        ("s5-4-33-a",
         "cd_mair0(cd) | cd_mair1(cd) << 32",
         "cd_mair0(cd) | cd_mair0(cd) << 32",
         "reference", "mair"),
        ("s5-2-48-b",
         "    context.sh = shareability(context.attr, context.sh)",
         "",
         "reference", "bypass_attributes"),
        ("s5-2-48-c",
         "0 if shcfg == 1 else shcfg",
         "0",
         "reference", "bypass_attributes"),
    ),
    *of(
        "_rules/vmsa.pxd",
        ("v8-6-5-2-1-a",
         "    if code == 1 or not cacheable(nibble):\n"
         "        return 4",
         "",
         "stage2", "types_of_both_stages_combine"),
        ("v8-6-5-2-1-b",
         "weaker(attr >> 4, code >> 2) << 4 | weaker(attr & 15, code & 3)",
         "weaker(attr >> 4, code >> 2) << 4 | weaker(attr & 15, code >> 2)",
         "stage2", "types_of_both_stages_combine"),
        ("v8-6-5-2-1-c",
         "nibble & ~<unsigned int>4 if code == 2 else nibble",
         "nibble",
         "stage2", "types_of_both_stages_combine"),
        ("s5-4-33-b",
         "8 * pte_s1_attrindx(d)",
         "8 * (pte_s1_attrindx(d) & 3)",
         "reference", "mair"),
        ("s5-2-46-a",
         "    if inner == 0:\n"
         "        return 0",
         "",
         "reference", "bypass_attributes"),
        ("s5-2-46-b",
         "memattr if mtcfg else 15",
         "15",
         "reference", "bypass_attributes"),
        ("s5-2-46-c",
         "memattr if mtcfg else 15",
         "memattr",
         "reference", "bypass_attributes"),
    ),
    *of(
        "_engine/ats.pxd",
        ("s3-9-1-3-7",
         "    if not cr0_atschk(hw.cr0):\n"
         "        end_passed(hw, request, outcome)\n"
         "        return 0",
         "",
         "ats", "translated_transactions_are_checked_if_asked"),
        ("s3-9-1-5",
         "TERMINATE_A if translation else recorded_if_asked(hw)",
         "context.terminate if translation else recorded_if_asked(hw)",
         "ats", "a_request_does_not_stall"),
        ("s3-9-1-2-b",
         "pages.first.perm & pages.second.perm",
         "0x3F",
         "ats", "permissions_of_a_page"),
        ("s3-9-1-3-11",
         "    if request.ssid == NO_SSID:\n"
         "        request.access &= ACCESS_WRITE",
         "    request.access &= ACCESS_WRITE",
         "ats", "privilege_and_instruction_come_from_the_pasid_with_pasidtt"),
    ),
    *of(
        "_rules/command.pxd",
        ("s4-4-5",
         "<unsigned int>cr0_vmw(hw.cr0) if hw.vmw else 0",
         "0",
         "commands", "the_vmid_wildcard_masks_low_bits"),
        ("s3-10-2-1-1",
         "    return (CMD_PREFETCH_CONFIG <= op <= CMD_CFGI_VMS_PIDM or op == CMD_RESUME\n"
         "            or op == CMD_STALL_TERM)",
         "    return False",
         "commands", "an_illegal_parameter_is_cerror_ill"),
        ("s4-7-1-4",
         "(cmd_ab(words) or hw.term_model)",
         "cmd_ab(words)",
         "stall", "termination_aborts_or_reads_zero"),
        ("s4-3-4-2",
         "0 if hw.s1p else WHY_CMD_S1P",
         "0 if hw.s1p or op == CMD_CFGI_CD_ALL else WHY_CMD_S1P",
         "commands", "a_command_without_its_feature_is_illegal"),
        ("s4-3-3-3",
         "0 if hw.s1p else WHY_CMD_S1P",
         "0 if hw.s1p or op == CMD_CFGI_CD else WHY_CMD_S1P",
         "commands", "a_command_without_its_feature_is_illegal"),
    ),
    *of(
        "_device/registers.pyx",
        ("s6-3-11-1-2",
         "            if cr0_smmuen(self.core.hw.cr0):\n"
         "                kept = CR1_TABLES",
         "            if cr0_smmuen(self.core.hw.cr0) or self._features.tables_preset:\n"
         "                kept = CR1_TABLES",
         "register_rules", "attributes_of_preset_tables_and_queues_are_kept"),
        ("s6-3-25-1-a",
         'min(config["LOG2SIZE"], self._features.sidsize)',
         "self._features.sidsize",
         "registers", "translation_follows_the_registers"),
        ("s6-3-25-1-b",
         'split_of(config["SPLIT"])',
         "split_of(6)",
         "registers", "translation_follows_the_registers"),
        ("s6-3-25-1-c",
         'config["FMT"] == 1',
         "False",
         "registers", "translation_follows_the_registers"),
        ("s6-2-8-b",
         "self._load(name) & ~(field << shift) | whole << shift",
         "whole << shift",
         "registers", "64_bit_registers_are_two_halves_or_one_access"),
        ("s4-1-3-4",
         "                cerror = CMDQ_CONS_ERR_ABT\n"
         "                effect.why = 0",
         "                cerror = 0\n"
         "                effect.why = 0",
         "command_queue", "a_fetch_that_aborts_stops_the_queue"),
    ),
    *of(
        "_rules/scope.pxd",
        ("s4-4-2-3-2",
         "not inv.leaf",
         "True",
         "single_rules", "tables_in_walk_caches_go_unless_only_leaves_are_named"),
    ),
    *of(
        "_engine/tlb_entries.pxi",
        ("s16-2-2-3",
         "    config_drop(c, cache, slot)\n"
         "    return 1",
         "    config_drop(c, cache, slot)\n"
         "    for slot in range(<int64_t>c.cache[CACHE_TLB].slots):\n"
         "        if c.cache[CACHE_TLB].prints[slot]:\n"
         "            tlb_forget(c, <uint64_t>slot)\n"
         "            cache_drop(&c.cache[CACHE_TLB], <uint64_t>slot)\n"
         "    return 1",
         "single_rules", "controls_of_permissions_count_when_a_page_is_cached"),
    ),
    *of(
        "_engine/batch_rows.pxd",
        ("l-1",
         "            rows.access[i] = load_u8(&batch.access, start + i) & 7",
         "            rows.access[i] = load_u8(&batch.access, start + i) & 3",
         "twin", "over_a_few_systems"),
    ),
]
