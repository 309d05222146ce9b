"""The rules of commands, called from Python one command at a time."""

from libc.stdint cimport uint64_t
from libc.string cimport memset

from smmufast._rules.command cimport *
from smmufast._facts.hw cimport Hw

KINDS = {
    EFFECT_NONE: "NONE", EFFECT_PREFETCH: "PREFETCH", EFFECT_CFGI_STE: "CFGI_STE",
    EFFECT_CFGI_RANGE: "CFGI_RANGE", EFFECT_CFGI_ALL: "CFGI_ALL", EFFECT_CFGI_CD: "CFGI_CD",
    EFFECT_CFGI_CD_ALL: "CFGI_CD_ALL", EFFECT_TLBI: "TLBI", EFFECT_ATC_INV: "ATC_INV",
    EFFECT_PRI_RESP: "PRI_RESP", EFFECT_RESUME: "RESUME", EFFECT_STALL_TERM: "STALL_TERM",
    EFFECT_SYNC: "SYNC",
}


def decode(hardware, command):
    """(CERROR, effect as a dict) of a command, a 128-bit integer; hardware: the fields of Hw."""
    cdef Hw hw
    cdef Effect effect
    cdef uint64_t[2] words
    cdef int cerror
    memset(&hw, 0, sizeof(hw))
    memset(&effect, 0xA5, sizeof(effect))
    hw.cr0 = hardware["cr0"]
    hw.pointer_mask = hardware["pointer_mask"]
    hw.ssidsize = hardware["ssidsize"]
    hw.stall_model = hardware["stall_model"]
    hw.term_model = hardware["term_model"]
    hw.s1p = hardware["s1p"]
    hw.s2p = hardware["s2p"]
    hw.hyp = hardware["hyp"]
    hw.asid16 = hardware["asid16"]
    hw.vmid16 = hardware["vmid16"]
    hw.ds = hardware["ds"]
    hw.ats = hardware["ats"]
    hw.pri = hardware["pri"]
    hw.ril = hardware["ril"]
    hw.vmw = hardware["vmw"]
    hw.sev = hardware["sev"]
    hw.msi = hardware["msi"]
    words[0] = command & 0xFFFFFFFFFFFFFFFF
    words[1] = command >> 64
    with nogil:
        cerror = command_decode(&hw, words, &effect)
    cdef dict found = effect
    found["kind"] = KINDS[found["kind"]]
    return cerror, found
