"""What people meet at a prompt: completion, help, signatures."""

import ast
import copy
import enum
import html
import html.parser
import importlib
import inspect
import pydoc
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import small
import stalls
from project import ROOT

import smmufast
from smmufast import Memory, Smmu, _html, decode, layout, mappings, replay, trace, traffic
from smmufast.iommu import PageFault, Report, System

HOME = Path(smmufast.__file__).resolve().parent.parent
MODULES = ("ats", "capture", "cli", "decode", "dumps", "errors", "explain", "faults", "features",
           "iommu", "layout", "mappings", "replay", "streams", "trace", "traffic",
           "why")  # fmt: skip


def in_a_new_process(code):
    """What code prints in a process that has imported nothing yet."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env={"PYTHONPATH": str(HOME)}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_every_public_module_is_completed_before_it_is_imported():
    code = "import smmufast; print(*dir(smmufast))"
    names = in_a_new_process(code).split()
    assert set(MODULES) | set(smmufast.__all__) <= set(names)
    assert names == sorted(names)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_loads_when_it_is_named(name):
    code = f"import smmufast; print(smmufast.{name}.__name__)"
    assert in_a_new_process(code) == f"smmufast.{name}"


def test_completion_imports_nothing():
    code = "import sys, smmufast; dir(smmufast); print('numpy' in sys.modules)"
    assert in_a_new_process(code) == "False"


def test_names_that_there_are_not_are_told():
    with pytest.raises(AttributeError, match="module 'smmufast' has no attribute 'Smu'"):
        _ = smmufast.Smu


def public(name):
    """The public functions and classes of a module that are written in Python, and methods."""
    module = importlib.import_module(f"smmufast.{name}")
    for attribute in getattr(module, "__all__", ()):
        value = getattr(module, attribute)
        home = inspect.getmodule(value)
        if not callable(value) or not str(getattr(home, "__file__", "")).endswith(".py"):
            continue
        # that of a builtin exception is known from Python 3.13 on
        builtin = inspect.isclass(value) and issubclass(value, BaseException)
        if not builtin or "__init__" in vars(value):
            yield attribute, value
        if inspect.isclass(value):
            for method in vars(value):
                if not method.startswith("_") and callable(getattr(value, method)):
                    yield method, getattr(value, method)


@pytest.mark.parametrize("name", MODULES)
def test_signatures_and_help_are_there(name):
    for attribute, value in public(name):
        assert str(inspect.signature(value)).startswith("("), attribute
        assert attribute in pydoc.render_doc(value)


def home_of(cls):
    """The module in which a class is written, also of one that names the package instead."""
    if cls.__module__ != "smmufast":
        return cls.__module__
    return next(f"smmufast.{home}" for home, names in smmufast._HOMES.items()
                if cls.__name__ in names)  # fmt: skip


def is_compiled(cls):
    return home_of(cls).startswith("smmufast._")


def compiled():
    """The public classes that are compiled."""
    for module in (smmufast, smmufast.iommu):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) and is_compiled(value):
                yield value


def test_there_are_compiled_classes():
    assert {"Smmu", "Memory", "Caches", "PageTable", "PasidAllocator", "MemoryRegion"} <= {
        cls.__name__ for cls in compiled()
    }


def source(cls, suffix):
    """The text of the module of a class, and of the parts that it includes."""
    path = ROOT / (home_of(cls).replace(".", "/") + suffix)
    parts = [path, *(path.parent.glob(f"{path.stem}_*.pxi") if suffix == ".pyx" else ())]
    return "".join(part.read_text() for part in parts)


def parameters(text):
    """(name, kind, default) of each of the arguments between a def's parentheses, without self."""
    names = {}
    exec(f"def made({text}): pass", names)
    return of_signature(inspect.signature(names["made"]))[1:]


def of_signature(signature):
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


def stub_of(cls):
    """What the stub of a class has in it."""
    (found,) = (
        node for node in ast.parse(source(cls, ".pyi")).body
        if isinstance(node, ast.ClassDef) and node.name == cls.__name__
    )  # fmt: skip
    return found.body


def arguments(method):
    """What `parameters` tells of a method in a stub."""
    for node in ast.walk(method.args):
        if isinstance(node, ast.arg):
            node.annotation = None
    return parameters(ast.unparse(method.args))


def of_stub(cls):
    """The arguments of a class, as its stub has them: fields of a tuple, __new__ or __init__."""
    for base in cls.__mro__[:-1]:
        if base.__module__ == "builtins":
            continue
        body = stub_of(base)
        if issubclass(base, tuple):
            given = [node for node in body if isinstance(node, ast.AnnAssign)]
            return parameters(", ".join(["self", *(
                node.target.id + ("" if node.value is None else f"={ast.unparse(node.value)}")
                for node in given
            )]))  # fmt: skip
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name in ("__new__", "__init__"):
                return arguments(node)
    return []


def of_source(cls):
    """The arguments of a class, as its __cinit__ or __init__ has them."""
    for base in cls.__mro__[:-1]:
        body = re.split(rf"^cdef class {base.__name__}\b", source(base, ".pyx"), flags=re.M)[1]
        body = re.split(r"^(?:cdef|cpdef|class|def|@)\b", body, maxsplit=1, flags=re.M)[0]
        # a __cinit__ of self alone stands beside an __init__ that takes the arguments
        made = re.findall(r"^    def __c?init__\((.*?)\):", body, re.M | re.S)
        if made:
            # without C types
            return parameters(
                re.sub(r"\b[A-Z]\w* (\w+)( not None)?", r"\1", max(made, key=len))
            )  # fmt: skip
    return []


@pytest.mark.parametrize("cls", list(compiled()), ids=lambda cls: cls.__name__)
def test_compiled_classes_have_the_signature_of_their_stub(cls):
    assert of_signature(inspect.signature(cls)) == of_stub(cls)
    assert "--" not in inspect.getdoc(cls).splitlines()[:3]
    assert f"class {cls.__name__}" in pydoc.plain(pydoc.render_doc(cls))


@pytest.mark.parametrize("cls", [
    cls for cls in compiled() if not issubclass(cls, (tuple, Exception))  # are no cdef classes
], ids=lambda cls: cls.__name__)  # fmt: skip
def test_compiled_classes_have_the_signature_of_their_source(cls):
    assert of_signature(inspect.signature(cls)) == of_source(cls)


def methods():
    """The public methods of the compiled classes and of what they inherit from."""
    for cls in dict.fromkeys(base for one in compiled() for base in one.__mro__):
        if cls.__module__.startswith("smmufast"):
            for name, value in vars(cls).items():
                if name[0] != "_" and callable(value):
                    yield pytest.param(cls, name, id=f"{cls.__name__}.{name}")


@pytest.mark.parametrize(("cls", "name"), list(methods()))
def test_compiled_methods_have_the_signature_of_their_stub(cls, name):
    method = getattr(cls, name)
    found = of_signature(inspect.signature(method))
    if getattr(method, "__self__", None) is not cls:  # no class method
        del found[0]  # self
    stubs = [
        arguments(node) for node in stub_of(cls)
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]  # fmt: skip
    if len(stubs) == 1:
        assert stubs == [found]
    # each overload leaves some out and needs some that have a default; together they are all
    of_name = {one: (one, kind, default) for one, kind, default in found}
    for stub in stubs:
        assert [(one, kind) for one, kind, _ in stub] == [
            (one, kind) for one, kind, _ in found if one in [name for name, _, _ in stub]
        ]
        for argument in stub:
            assert argument[2] is inspect.Parameter.empty or argument == of_name[argument[0]]
    assert {argument for stub in stubs for argument in stub} >= set(found)


def test_there_are_compiled_methods():
    found = {param.id for param in methods()}
    assert {"Smmu.translate", "Registers.restore", "Memory.add_callback", "Gather.sync"} <= found


def test_help_of_the_package_names_what_it_has():
    text = pydoc.plain(pydoc.render_doc(smmufast))
    for name in ("class Smmu", "class Memory", "class Capture", "class Features", "get_include"):
        assert name in text


# --- notebooks ---

SCRIPT = "<script>alert(1)</script>"

# Public classes that a notebook shows by their repr, and why.
BY_REPR = {
    "one short line says all of it": (
        "AttachHandle", "Bond", "Budget", "ContextRun", "Contradiction", "Cpu", "Field", "Geometry",
        "MemoryRegion", "PageAnswer", "PasidNotice", "PasidPolicy", "Profile", "RegisterWarning",
        "Run", "StreamTable", "Tally", "Transaction",
    ),
    "an object to call, whose repr says how full it is": (
        "AddressSpace", "DmaMapper", "Domain", "Gather", "Group", "Iommu", "IovaAllocator",
        "Mediated", "NestedDomain", "PageTable", "Pages", "PagingDomain", "PasidAllocator",
        "PasidBackend", "PasidSet", "PasidSpace", "Viommu", "VirtualCommand",
    ),
    "a part of a capture, which `replay` compares": (
        "Batch", "Configuration", "Expected", "Filling", "Queue",
    ),
    "`layout.format` shows it with a value": ("Record",),
    "a part of traffic, a line": ("Step",),
    "a row of `Mappings`": ("MappedRange",),
    "it is there while something is recorded": ("Recorder",),
}  # fmt: skip


def public_classes():
    """The public classes, without exceptions, which have a traceback, and enumerations, which
    admit no method of that name.
    """
    for module in (smmufast, *(importlib.import_module(f"smmufast.{name}") for name in MODULES)):
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isclass(value) and not issubclass(value, (BaseException, enum.Enum)):
                yield value


def recording(memory):
    """The path of a recording of nothing."""
    path = Path(tempfile.mkdtemp()) / "traffic"
    with traffic.Recorder(path, Smmu(memory, cr0=0)):
        pass
    return path


def samples():
    """A value of each class that has a table or a picture, or several."""
    memory = Memory()
    memory.add(small.build(), small.BASE)
    smmu = Smmu(memory, caches=smmufast.Caches.small(), **small.registers())
    failed = smmu.translate(small.INVALID, 5, trace=True)
    yield from (smmu, memory, smmu.caches, failed, failed.fault, failed.fetches[0])
    yield smmu.translate(small.STAGE1, small.RW)
    yield Smmu(memory, caches=smmufast.Caches(), **small.registers()).caches
    yield smmu.translate_range(small.STAGE1, small.RW, 0x1800)
    yield smmu.translate_range(small.STAGE1, small.RO, 0x2000)
    walk = smmu.start_walk(small.STAGE1, small.BLOCK)
    yield copy.copy(walk)
    while (fetch := walk.request) is not None:
        walk.supply(memory.read(fetch.address, fetch.size))
    yield walk
    walk = smmu.start_walk(small.STAGE1, small.RW)
    walk.close()
    yield walk
    yield smmufast.Invalidated(SCRIPT, True, False, sids=(1, 2))
    yield smmufast.StaleEntry("tlb", (1, SCRIPT), None, SCRIPT)
    yield stalls.stall(stalls.system()[0])
    device = smmufast.AtsDevice(smmu, small.STAGE1)
    yield device
    yield smmu.ats_request(small.STAGE1, small.RW)
    yield smmufast.PageRequest(
        1, 2, 3, 4, read=True, write=False, execute=False, priv=False
    )  # fmt: skip
    yield smmufast.Features(ats=0)
    usual = smmufast.Features()
    no_ats = usual.idr0 & ~layout.mask("IDR0", "ATS")
    contradictory = smmufast.Features.from_idr(no_ats, usual.idr1, usual.idr3, usual.idr5, 3)
    assert contradictory.contradictions
    yield contradictory
    capture = smmufast.Capture.load(ROOT / "examples" / "linux-7.3-4k-s1")
    capture.path += f"/{SCRIPT}\udcff"
    yield capture
    configuration = capture[0]
    yield replay.Difference(
        configuration, 0, [SCRIPT], configuration.expected[0], failed, smmu
    )  # fmt: skip
    yield replay.Replay(capture, streams={1: replay.Tally()}, causes={SCRIPT: replay.Tally()})
    yield replay.QueueReplay(SCRIPT, differences=[SCRIPT] * 1000)
    yield mappings.mappings(smmu, small.STAGE1)
    recorded = traffic.Traffic(recording(memory))
    recorded.path += f"/{SCRIPT}"
    yield recorded
    yield traffic.replay(recording(memory))
    yield traffic.Divergence(traffic.Step(7, "O", (SCRIPT,)), SCRIPT, failed, SCRIPT)
    yield trace.TraceSummary(5, {"ok": 5}, {SCRIPT: 5}, 1.0)
    yield decode.Decoded("event", SCRIPT, SCRIPT, meaning=(SCRIPT,) * 1000)
    system = System()
    one = system.device(9, pasid_bits=4)
    domain = one.paging_domain()
    one.attach(domain)
    domain.map(0x1000, 0x8000_0000, 0x3000)
    yield from (system, one, smmufast.iommu.Device(3))
    yield PageFault(one, 1, 0x1000, True, False, False, False, 1, True)
    yield Report(
        SCRIPT, 9, None, 0x1000, one, False, 0, True, False, False, None, 0, bytes(32)
    )  # fmt: skip
    yield smmufast.Event(b"\xff" * 32)


class Page(html.parser.HTMLParser):
    """A fragment of HTML: its text, if every tag is one of ours and is closed."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.text = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert tag in ("table", "caption", "thead", "tbody", "tr", "th", "td", "br", "pre")
        assert [name for name, _ in attrs] in ([], ["colspan"])  # no colours, no code
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        assert self.open
        self.text.append(data)


def test_every_public_class_has_a_table_or_is_named_with_a_reason():
    without = {cls.__name__ for cls in public_classes() if not hasattr(cls, "_repr_html_")}
    named = [name for names in BY_REPR.values() for name in names]
    assert sorted(without) == sorted(named)


def test_what_a_notebook_shows_is_whole_short_and_escaped():
    shown = set()
    for value in samples():
        shown.add(type(value))
        text = value._repr_html_()
        assert len(text) < 30_000
        page = Page(text)
        text.encode()  # as a notebook sends it
        assert SCRIPT not in text
        if SCRIPT in str(vars(value) if hasattr(value, "__dict__") else value):
            assert SCRIPT in "".join(page.text)
    with_table = {cls for cls in public_classes() if hasattr(cls, "_repr_html_")}
    assert with_table <= shown


def test_a_result_is_a_table_of_all_that_it_says():
    memory = Memory()
    memory.add(small.build(), small.BASE)
    smmu = Smmu(memory, **small.registers())
    rows = {
        "sid": "0x1", "ssid": "None", "iova": "0x1234", "write": "False", "action": "ok",
        "pa": "0x40001234", "ipa": "None", "stage": "1", "fault": "None", "event": "None",
        "why": "None", "level": "3", "page_lg2": "12", "page_size": "0x1000",
        "perm": "UR|UW|UX|PR|PW", "perm_s1": "UR|UW|UX|PR|PW", "attr": "0xff",
        "memory_type": "Normal-iWB-RA-WA-oWB-RA-WA", "shareability": "0", "asid": "7",
        "vmid": "0", "stag": "None", "is_global": "True", "contiguous": "False",
        "fetches": "None",
    }  # fmt: skip
    body = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows.items())
    assert smmu.translate(small.STAGE1, 0x1234)._repr_html_() == (
        "<table><caption>Result</caption><thead><tr><th>field</th><th>value</th></tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )
    traced = smmu.translate(small.INVALID, 5, trace=True)._repr_html_()
    assert "<caption>Result</caption>" in traced
    assert "<td>&lt;Event C_BAD_STE sid=0x4&gt;</td>" in traced
    assert "<td>STE_V (S5.2-1): the stream table entry has V=0</td>" in traced
    assert "<td>kind=STE level=None address=0x80000100 size=0x40 data=0" in traced


def test_a_million_segments_are_a_few_rows_and_what_ended_them():
    memory = Memory()
    memory.add(small.build(), small.BASE)
    smmu = Smmu(memory, **small.registers())
    few = smmu.translate_range(small.STAGE1, small.RO, 0x2000)
    make, (array, result) = few.__reduce__()
    many = make(array.repeat(1_000_000), result)
    text = many._repr_html_()
    row = "<tr><td>0x2000</td><td>0x40005000</td><td>0x1000</td></tr>"
    assert text.count(row) == _html.MOST_ROWS
    assert '<td colspan="3">… 999,980 more</td>' in text
    assert "<caption>then</caption>" in text and "F_ACCESS" in text
    assert "more" not in few._repr_html_()


def test_long_values_say_how_much_is_left_out():
    memory = Memory()
    for i in range(25):
        memory.add(bytes(16), i << 12)
    assert '<td colspan="4">… 5 more</td>' in memory._repr_html_()
    read = smmufast.Fetch("STE", None, 0, 150, bytes(150))._repr_html_()
    assert f"<td>{f'{0:016x} ' * 12}{0:08x}… 50 more bytes</td>" in read  # by dwords
    text = smmufast.StaleEntry("tlb", (), None, "x" * 250)._repr_html_()
    assert f"<td>{'x' * 200}… 50 more characters</td>" in text
    assert _html.lines("\n" * 99) == f"<pre>{chr(10) * 99}</pre>"
    assert _html.lines("\n" * 100).endswith("\n… 1 more lines</pre>")


def test_no_control_character_and_no_half_of_a_surrogate_gets_through():
    text = _html.table("\0", [("\x1b[31m", "a\tb\nc"), ("\udcff", "\u202e\"'&")])
    assert "<caption>\\x00</caption>" in text and "<td>a\\tb<br>c</td>" in text
    assert "<th>\\x1b[31m</th>" in text
    assert "<th>\\udcff</th><td>\\u202e&quot;&#x27;&amp;</td>" in text


def test_a_device_is_its_picture():
    system = System()
    device = system.device(9)
    domain = device.paging_domain()
    device.attach(domain)
    domain.map(0x1000, 0x8000_0000, 0x1000)
    assert html.unescape(device._repr_html_()) == f"<pre>{device!r}\n{device.draw()}</pre>"
    assert html.unescape(system._repr_html_()) == f"<pre>{system!r}\n{system.draw()}</pre>"
    for page in range(0, 256, 2):
        domain.map(page << 27, 0x8000_0000, 0x1000)
    lines = html.unescape(device._repr_html_()).splitlines()
    assert len(lines) == _html.MOST_LINES
    assert lines[-1] == "… more is left out: a picture has 98 lines at most</pre>"
    assert smmufast.iommu.Device(3)._repr_html_() == "<pre>&lt;Device sid 0x3, not probed&gt;</pre>"


def test_a_picture_of_many_devices_has_an_end():
    system = System()
    for sid in range(150):
        system.device(sid)
    assert len(system.draw().splitlines()) == 150
    assert len(system._repr_html_().splitlines()) == _html.MOST_LINES


def test_to_look_at_a_walk_does_not_take_a_step():
    memory = Memory()
    memory.add(small.build(), small.BASE)
    smmu = Smmu(memory, **small.registers())
    walk = smmu.start_walk(small.STAGE1, small.RW)
    walk.supply(memory.read(walk.request.address, 64))
    before = walk._repr_html_()
    assert before.startswith("<table><caption>Walk at</caption>") and "<td>CD</td>" in before
    smmu.write("CR0", 0)  # lets it start again, which finds the SMMU disabled
    assert walk._repr_html_() == before
    assert walk.result.action == "disabled"
    assert walk._repr_html_().startswith("<table><caption>Result</caption>")


def test_tables_are_loaded_when_one_is_shown():
    code = (
        "import sys, smmufast, smmufast.iommu; smmufast.Smmu; smmufast.Capture; smmufast.replay\n"
        "print('smmufast._html' in sys.modules)\n"
        "smmufast.Features()._repr_html_()\n"
        "print('smmufast._html' in sys.modules)"
    )
    assert in_a_new_process(code).split() == ["False", "True"]
