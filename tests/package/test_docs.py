"""The pages of docs/: their programs run, they have every public name, and Sphinx builds them."""

import argparse
import contextlib
import importlib
import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from project import ROOT

import smmufast
import smmufast.iommu
from smmufast import cli

DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
HOME = Path(smmufast.__file__).resolve().parent.parent
SHOWN = r"^```$(?:\n\n^```text$\n(.*?)^```$)?"  # the end of a block, and what stands behind it
PUBLIC = (
    "ats", "capture", "cli", "decode", "dumps", "errors", "explain", "faults", "features", "iommu",
    "layout", "mappings", "replay", "streams", "trace", "traffic", "why",
)  # fmt: skip


def blocks(page, language):
    """(text, what it prints or None) of each block of a language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}$\n(.+?){SHOWN}", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page",
    [page for page in (ROOT / "README.md", *PAGES) if blocks(page, "python")],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_programs_of_a_page_run_and_print_what_it_shows(page, tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names = {}
    for code, shown in blocks(page, "python"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        if shown:
            assert printed.getvalue() == shown, code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_whatever_a_page_shows_is_printed_by_the_block_before(page):
    shown = [text for language in ("python", "sh") for _, text in blocks(page, language) if text]
    assert page.read_text(encoding="utf-8").count("\n```text\n") == len(shown)
    for code, text in blocks(page, "sh"):  # test_cli.py runs these
        assert not text or re.fullmatch(r"smmufast .+\n", code)


def test_every_picture_is_shown_and_says_what_it_shows():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    pictures = sorted((DOCS / "pictures").glob("*.svg"))
    assert len(pictures) > 6
    for picture in pictures:
        title = ElementTree.parse(picture).find("{http://www.w3.org/2000/svg}title")
        assert title is not None and title.text, picture
        assert f"(pictures/{picture.name})" in text, picture


# --- the reference ---


def described():
    """The full name of everything that the reference describes."""
    names = set()
    for page in (DOCS / "reference").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        names |= set(re.findall(r"^\.\. (?:auto\w+|py:data):: (\S+)", text, re.MULTILINE))
        for module, members in re.findall(
            r"^\.\. automodule:: (\S+)\n   :members: (.+)", text, re.MULTILINE
        ):
            names |= {f"{module}.{name}" for name in members.split(", ")}
    return names


@pytest.mark.parametrize("package", [smmufast, smmufast.iommu], ids=lambda it: it.__name__)
def test_the_reference_describes_every_public_name(package):
    wanted = {f"{package.__name__}.{name}" for name in package.__all__}
    assert wanted - described() == set()


@pytest.mark.parametrize("name", PUBLIC)
def test_the_reference_describes_what_a_public_module_offers(name):
    module = importlib.import_module(f"smmufast.{name}")
    here = described()
    for key in getattr(module, "__all__", ()):
        homes = (module.__name__, "smmufast", "smmufast.iommu")
        assert any(f"{home}.{key}" in here for home in homes), key


def test_what_the_reference_describes_exists():
    for name in described():
        home, _, key = name.rpartition(".")
        if home:
            module = importlib.import_module(home)
            assert hasattr(module, key) or importlib.util.find_spec(name), name


def test_the_command_is_described_with_every_option_and_no_other():
    page = (DOCS / "reference" / "command.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^## (\w+)\n(.+?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    (commands,) = (
        action.choices
        for action in cli._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    assert set(commands) == {name for name in parts if f"`smmufast {name}" in parts[name]}
    for name, parser in commands.items():
        options = {text for action in parser._actions for text in action.option_strings}
        options -= {"-h", "--help", "--json"}  # of every command
        assert set(re.findall(r"--[a-z][\w-]*", parts[name])) == options, name


def test_the_glossary_has_a_word_once_and_in_order():
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    rows = [re.findall(r"^\| ([^|]+?) \| .+ \|$", part, re.MULTILINE) for part in text.split("##")]
    tables = [[word.casefold() for word in words if word != "word"] for words in rows]
    words = [word for table in tables for word in table]
    assert len(words) == len(set(words)) > 80
    assert all(table == sorted(table) for table in tables)


# --- the site ---


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    for needed in ("sphinx", "myst_parser", "furo"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is missing: install the extra 'docs' to build the site")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html",
         "-d", tmp_path / "doctrees", DOCS, tmp_path / "site"],
        env=os.environ | {"PYTHONPATH": str(HOME)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    reference = "".join(
        page.read_text(encoding="utf-8") for page in (tmp_path / "site/reference").glob("*.html")
    )
    for package in (smmufast, smmufast.iommu):
        for name in package.__all__:
            assert f'id="{package.__name__}.{name}"' in reference, name
