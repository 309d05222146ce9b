"""The benchmarks run, agree with each other, and compile their baselines as the library is."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from project import ROOT

BENCHMARKS = ROOT / "benchmarks"

pytestmark = pytest.mark.slow


def run(*arguments, **environment):
    """Run Python from the repository's root; return its output."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_pytest(*arguments):
    """Run pytest over the benchmarks."""
    return run(
        *("-P", "-m", "pytest", "benchmarks", "-o", "python_files=bench_*.py", "-o", "addopts="),
        *("-q", "-p", "no:cacheprovider", *arguments),
    )


def test_every_run_of_every_question_agrees_with_its_baseline():
    output = run_pytest("--benchmark-disable")
    last = output.strip().splitlines()[-1]
    found = re.fullmatch(r"(\d+) passed in .*", last)  # nothing skipped, deselected or warned about
    assert found, output
    sizes = {
        f"array, {order}, {size} pages"
        for order in ("random", "sequential")
        for size in ("1 K", "64 K", "1 M", "16 M")
    }
    collected = run_pytest("--collect-only", "--import-mode=importlib")
    names = [line for line in collected.splitlines() if "::" in line]
    assert len(names) == int(found[1])
    for group in sizes:
        assert sum(f"[{group}: " in name for name in names) == 4, group


def run_script(code):
    """Run code that imports from benchmarks/; return its output."""
    path = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return run("-P", "-c", code, PYTHONPATH=os.pathsep.join(path))


def test_a_run_that_disagrees_is_refused():
    code = """
import numpy as np
import questions
from workload import Out
reference = Out.empty(4)
out = Out.empty(4)
def call():
    out.pa[:] = 1
questions.checked(call, out, reference, 4)
reference.event[3] = 16
try:
    questions.checked(call, out, reference, 4)
except AssertionError as error:
    print(error)
"""
    assert run_script(code) == "a run disagrees with the plain C walk\n"


def test_nested_baselines_and_the_library_agree_on_spoilt_tables():
    code = """
import baseline, numpy as np, questions, workload
module = baseline.load("_nested", "baseline_nested")
met = set()
for seed in range(20):
    image = workload.NestedImage(9)
    rng = np.random.default_rng(seed)
    workload.spoil(image, rng, int(rng.integers(1, 300)))
    baselines = workload.NestedBaselines(module, image.words)
    smmu = questions.smmu(image, workload.STRTAB_NESTED)
    for sid, first in ((workload.NESTED_SID, workload.IOVA_BASE),
                       (workload.STAGE2_SID, workload.DATA_IPA)):
        iova = image.random(60, seed) - np.uint64(workload.IOVA_BASE - first)
        for mode in range(8):
            access = {"write": mode & 1 > 0, "priv": mode & 2 > 0, "instr": mode & 4 > 0}
            out = workload.check_nested_agreement(baselines, iova, sid, **access)
            found = smmu.translate_batch(sid, iova, **access)
            for name, column in out.columns().items():
                assert np.array_equal(found[name], column), (seed, sid, access, name)
            met |= set(out.event.tolist())
print(sorted(met))
"""
    assert run_script(code) == "[0, 11, 16, 18, 19]\n"


# What limits/ asks of a table: valid, a table or a page, the access flag, the write permission.
SPOIL = """
import numpy as np, bench_limits, questions, workload
from workload import Out

def spoil(image, rng, first, spared=()):
    found = np.setdiff1d(first + np.flatnonzero(image.words[first:]), spared)
    for at in rng.choice(found, len(found) // 8, replace=False):
        image.words[at] ^= np.uint64(1 << int(rng.choice([0, 7, 10])))

met = set()
def compare(walks, names, smmu, sid, iova):
    for write in (False, True):
        for n in (len(iova), 1, 24, 25, 49, 128, 129):
            wanted = Out.empty(n)
            smmu.translate_batch(sid, iova[:n], write=write, out=wanted.columns())
            met.update(wanted.event.tolist())
            for name in names:
                out = Out.empty(n)
                passed = getattr(walks, name)(iova[:n], *out.arrays(), write)
                assert out.same(wanted), (name, n, write)
                assert passed == (wanted.action == 0).sum(), (name, n, write)

strange = np.array([1 << 48, 1 << 55, (1 << 64) - 1, 0xFFFF << 48, 0], np.uint64)
"""


def test_the_walks_of_the_limits_agree_with_the_library_on_spoilt_tables():
    code = f"""
{SPOIL}
names = [name for name in bench_limits.KERNELS.values() if name not in ("bare", "ceiling")]
if not bench_limits.vectors():
    names.remove("vector")
shapes = {{shape for depth in bench_limits.DEPTHS.values() for shape in depth.values()}}
images = [workload.Image(12), workload.SparseImage(9)]
images += [workload.Image(14, *shape) for shape in sorted(shapes)]
for seed, image in enumerate(images):
    rng = np.random.default_rng(seed)
    spoil(image, rng, workload.TRANSLATION_TABLES // 8 + (4096 if seed == 1 else 0))
    iova = image.partly_unmapped(1000, seed)
    iova[rng.random(1000) < 0.05] = rng.choice(strange)
    iova[::97] = np.uint64(1 << image.input_lg2)
    smmu = questions.smmu(image, workload.STRTAB_LINEAR)
    compare(bench_limits.table(image), names, smmu, workload.SID, iova)
    assert met >= {{0, 16, 18, 19}}, (seed, met)
    met.clear()
print(len(images))
"""
    assert run_script(code) == "8\n"


def test_the_nested_walks_of_the_limits_agree_with_the_library_on_spoilt_tables():
    code = f"""
{SPOIL}
for seed in range(6):
    image = workload.NestedImage(11)
    rng = np.random.default_rng(seed)
    spoil(image, rng, image.guest // 8 + 8, image.leading)
    iova = np.concatenate([image.random(600, seed), strange])
    iova[rng.random(len(iova)) < 0.1] += np.uint64(image.pages << 12)
    smmu = questions.smmu(image, workload.STRTAB_NESTED)
    names = ["plain", "reuse", "cached"]
    compare(bench_limits.nested_table(image), names, smmu, workload.NESTED_SID, iova)
print(sorted(met))
"""
    assert run_script(code) == "[0, 16, 18, 19]\n"


def test_the_bitmap_of_the_limits_gives_free_ids_in_order():
    code = """
import numpy as np, bench_limits
rng = np.random.default_rng(1)
for _ in range(10):
    bits, every = bench_limits.module().Bitmap(), np.zeros(1 << 20, np.uint32)
    assert bits.bulk(every) == 1 << 20 and np.array_equal(every, np.arange(1 << 20))
    free = np.zeros(1 << 20, bool)
    for first in rng.integers(0, (1 << 20) - 6000, rng.integers(1, 300)).tolist():
        free[first : first + int(rng.integers(1, 6000))] = True
    free = np.flatnonzero(free).astype(np.uint32)
    bits.free_each(free)
    found, n, got = [], 0, 0
    while got == n:
        n = int(rng.integers(1, 9000))
        out = np.zeros(n, np.uint32)
        got = (bits.bulk if rng.random() < 0.8 else bits.alloc_each)(out)
        found.append(out[:got])
    assert np.array_equal(np.concatenate(found), free)
    assert bits.pairs(1) == bits.pairs_in(1, 0, (1 << 20) - 1) == -1
    chosen = rng.choice(1 << 20, 50, replace=False).astype(np.uint32)
    bits.free_each(chosen)
    for low, high in rng.integers(0, 1 << 20, (500, 2)).tolist():
        within = chosen[(chosen >= low) & (chosen <= high)]
        assert bits.pairs_in(1, low, high) == (int(within.min()) if len(within) else -1)
print("same")
"""
    assert run_script(code) == "same\n"


def test_the_report_has_a_row_for_what_is_asked_and_says_what_is_left_out():
    asked = ("--only=stage 1 alone", "--largest=1K", "--rounds=7")
    lines = run("-P", "benchmarks/limits/report.py", *asked).splitlines()
    (row,) = (line for line in lines if line.startswith("| nested"))
    figures = r"\| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+–[\d.]+ \| 3 \| (met|\*\*not met\*\*) \|"
    assert re.search(figures, row), row
    assert "Cython" in lines[0] and "gcc" in lines[0].lower()
    from smmufast import Smmu

    threads = "threads" in inspect.signature(Smmu.translate_batch).parameters
    assert any(line.startswith("Left out: two threads") for line in lines) != threads


def test_builds_are_compared_in_pairs():
    import smmufast

    build = str(Path(smmufast.__file__).resolve().parent.parent)
    asked = ("--only=PASID free", "--starts=1", "--rounds=3")
    last = run("-P", "benchmarks/compare.py", build, build, *asked).splitlines()[-1]
    found = re.fullmatch(r"\| PASID free\(\) \| .+ \| .+ \| (.+) \| (.+) \| (.+) \|", last)
    low, middle, high = (float(figure) for figure in found.groups())
    assert low <= middle <= high
    assert 0.1 < middle < 10  # one build, measured twice


def test_what_is_no_build_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "benchmarks/compare.py", tmp_path, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"{tmp_path}: neither bin/python nor smmufast is in it" in done.stderr


def test_instruction_counts_are_compared_under_the_same_versions_only(tmp_path):
    code = f"""
import json, pathlib, instructions
file = pathlib.Path({str(tmp_path)!r}) / "counts.json"
def judge(key, write=False, **counts):
    return instructions.judge(key, counts, file, write)
print("first", judge("A", walk=100.0, map=10.0))
print("within", judge("A", walk=102.9, map=9.71), judge("A", walk=97.1))
print("beyond", judge("A", walk=103.1, map=10.0), judge("A", walk=96.9))
print("other", judge("B", walk=500.0))
print("more", judge("A", walk=100.0, pa=7.0))
print("written", judge("A", True, map=20.0), judge("A", map=20.1))
print(json.dumps(json.loads(file.read_text())))
"""
    lines = run_script(code).splitlines()
    status = [line for line in lines if re.match(r"[a-z]+ \d", line)]
    assert status == ["first 0", "within 0 0", "beyond 1 1", "other 0", "more 0", "written 0 0"]
    assert "| walk | 100 | 103.1 | 1.031 | **beyond** |" in lines
    assert lines[-1] == '{"A": {"map": 20.0, "pa": 7.0, "walk": 100.0}, "B": {"walk": 500.0}}'


def test_instructions_are_counted(tmp_path):
    file = tmp_path / "counts.json"
    command = ("-P", "benchmarks/instructions.py", f"--file={file}", "--only=PASID free")
    without = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | {"PATH": ""}, capture_output=True
    )
    assert (without.returncode, file.exists()) == (2, False)
    assert b"valgrind is not installed" in without.stderr
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")
    run(*command)
    ((key, counts),) = json.loads(file.read_text()).items()
    assert re.fullmatch(r"(GCC|clang) [\d.]+, Cython ([\d.]+|unknown), CPython [\d.]+", key)
    assert 50 < counts["PASID free()"] < 5000
    assert "| 1.0" in run(*command)  # again, beside what was kept


def test_a_batch_leaves_the_caches_as_its_requests_one_by_one():
    code = """
import numpy as np, questions, workload
from smmufast import Caches

def system(seed, nested, caches):
    image = (workload.NestedImage if nested else workload.Image)(9)
    if nested:
        rng = np.random.default_rng(seed)
        workload.spoil(image, rng, int(rng.integers(0, 60)))
    strtab = workload.STRTAB_NESTED if nested else workload.STRTAB_LINEAR
    return image, questions.smmu(image, strtab, caches=Caches(ste=(2, 2), cd=(2, 2), **caches))

odd = np.array([0, 1 << 55, 0xFFFF << 48, (1 << 64) - 1, 1 << 52], np.uint64)
hits = 0
for seed in range(48):
    rng = np.random.default_rng(seed)
    n = 200
    nested = seed % 2
    ways = (4, 4, 2, 8)[seed // 8 % 4]
    policy = ("lru", "plru", "fifo", "random")[seed // 2 % 4]
    caches = {"tlb": (int(rng.choice([4, 64])), ways, policy), "walk1": (4, 4), "walk2": (4, 4),
              "nested": ("combined", "split")[seed // 16 % 2]}
    (image, by_batch), (_, by_one) = (system(seed, nested, caches) for _ in range(2))
    iova = image.random(n, seed)
    sid = np.repeat(rng.integers(0, 3, n // 20), 20).astype(np.uint32)
    if nested:
        inputs = iova - np.uint64(workload.IOVA_BASE - workload.DATA_IPA)
        iova = np.where(sid == workload.STAGE2_SID, inputs, iova)
    strange = rng.random(n) < 0.05
    iova[strange] = rng.choice(odd, strange.sum())
    for sids, write in ((int(sid[0]), False), (int(sid[0]), True), (sid, rng.random(n) < 0.3)):
        found = by_batch.translate_batch(sids, iova, write=write)
        rows = zip(np.broadcast_to(sids, n).tolist(), iova.tolist(),
                   np.broadcast_to(write, n).tolist(), found, strict=True)
        for stream, address, writes, row in rows:
            one = by_one.translate(stream, address, write=writes)
            event = one.event.number if one.event else 0
            assert (one.pa or 0, event) == (row["pa"], row["event"]), (seed, one, row)
        assert by_batch.caches.__getstate__() == by_one.caches.__getstate__(), seed
    hits += by_batch.caches.tlb.hits
print(hits > 2000)
"""
    assert run_script(code) == "True\n"


def test_the_table_has_a_row_for_every_run(tmp_path):
    file = tmp_path / "table.md"
    printed = run("benchmarks/table.py", "--rounds=7", "--only=PASID look-up", f"--markdown={file}")
    assert file.read_text(encoding="utf-8") == printed
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5
    assert rows[2][0] == "| PASID look-up; per call"
    for row in rows[3:]:
        assert re.fullmatch(r"(\*\*)?\d+\.\d\d(\*\*)? \(\d+\.\d\d–\d+\.\d\d\)", row[4]), row


def test_costs_at_scale_are_tabled_and_drawn(tmp_path):
    things = ("streams", "devices", "pasids", "pages", "domains")
    output = run(
        *("benchmarks/scale.py", "--most", "1024", "--svg", tmp_path / "plot.svg"),
        *(word for thing in things for word in ("--only", thing)),
        *("--markdown", tmp_path / "table.md"),
    )
    assert output.endswith((tmp_path / "table.md").read_text())
    lines = output.splitlines()
    for thing in ("streams", "devices", "PASIDs on one device", "paging domains"):
        assert f"| {thing} | 10^2 | 10^3 |" in lines
    assert "| mapped 4K pages | 2^10 |" in lines
    cells = [line.split(" | ") for line in lines if re.match(r"\| (translation|map|attach) ", line)]
    assert len(cells) == 6
    for cell in (cell for row in cells for cell in row[1:]):
        assert re.fullmatch(r"[0-9.]+ (ns|µs|ms)( \|)?", cell), cell
    drawn = ElementTree.parse(tmp_path / "plot.svg").getroot()
    texts = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    for line in ("streams: translation", "mapped 4K pages: map", "paging domains: replace"):
        assert line in texts
    circles = len(list(drawn.iter("{http://www.w3.org/2000/svg}circle")))
    assert circles == 2 * (1 + 3 + 3 + 2) + 3  # two sizes of each line, one of those of pages


def test_a_long_trace_is_measured_in_a_process_that_stays_small():
    code = """
import json
import scale
found = scale.requests(1 << 21)  # 32 MiB
print(json.dumps(found))
"""
    found = json.loads(run_script(code))
    assert found["a request"] > 0
    assert 0 <= found["peak growth"] < 8 << 20


def test_the_memory_of_domains_is_printed():
    printed = run("benchmarks/domain_memory.py", "--counts", "100", "2000")
    rows = [re.findall(r"[\d.]+", line) for line in printed.splitlines()[2:]]
    assert [row[0] for row in rows] == ["100", "2000"]
    host, tables = (float(figure) for figure in rows[1][1:])
    assert 4 < tables < host < 40  # KiB: a first table of 4 KiB, and what the host keeps
