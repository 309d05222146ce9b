"""The documentation site: ``python -P -m sphinx -W -b html docs docs/_build``.

The package must be installed, for the reference is made of its docstrings.
"""

import re

from sphinx import addnodes

import smmufast

project = "smmufast"
author = "The smmufast authors"
copyright = "The smmufast authors"
version = release = smmufast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "py:obj"  # what stands in single backticks in a docstring

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

# Members stand in the order of the source, where there is one: compiled classes have theirs.
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say types, dtypes and units
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
napoleon_google_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_param = False  # or arguments that share a description would repeat it
napoleon_use_rtype = False
maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"smmufast {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

FIELDS = {"Parameters", "Attributes", "Returns", "Yields", "Raises"}


def separate_prose(app, what, name, obj, options, lines):
    """Give a paragraph behind a list of fields a section of its own.

    The docstrings go on with prose or an example behind their parameters, which napoleon would take
    for more parameters.
    """
    section, made = None, []
    if what in ("attribute", "data", "property"):
        made.append("\\")  # nothing, or napoleon takes what stands before a colon for a type
    for number, line in enumerate(lines):
        above = lines[number - 1] if number else ""
        below = lines[number + 1] if number + 1 < len(lines) else ""
        if re.fullmatch(r"-{3,}", below):
            if (section, line) == ("Notes", "Notes"):
                lines[number + 1] = ""  # the prose was given this section already
                continue
            section = line
        elif (
            section in FIELDS and line and line[0] != " " and not above
            and not below.startswith(" ") and " : " not in line
        ):  # fmt: skip
            section = "Examples" if line.startswith(">>>") else "Notes"
            made += [section, "-" * len(section)]
        made.append(line)
    parts = re.split(r"(`+[^`]+`+|^ *>>>.*$)", "\n".join(made), flags=re.MULTILINE)
    parts[::2] = [re.sub(r"(\w)_(?!\w)", r"\1\\_", part) for part in parts[::2]]  # CMD_: no link
    lines[:] = "".join(parts).split("\n")


def skip_fields(app, what, name, obj, skip, options):
    """Leave out the fields of a named tuple: its docstring tells of them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def link_classes_alone(app, doctree):
    """Link classes and full names alone: a word such as `path` is an argument."""
    for node in list(doctree.findall(addnodes.pending_xref)):
        is_name = re.fullmatch(r"(smmufast\.|[A-Z]\w*[a-z]).*", node.get("reftarget", ""))
        if node.get("refdomain") == "py" and not is_name:
            node.replace_self(node.children)


def setup(app):
    """Connect what this file adds; napoleon comes behind `separate_prose`."""
    app.connect("autodoc-process-docstring", separate_prose, priority=400)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("doctree-read", link_classes_alone)
