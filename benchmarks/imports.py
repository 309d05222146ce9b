"""Fresh interpreters that import one module."""

import resource
import subprocess
import sys

# The first is the baseline; "sys" costs nothing and shows what the interpreter itself takes.
IMPORTS = ("numpy", "smmufast", "sys")


def children_seconds():
    """Return the processor time in seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def fresh_import(module):
    """Start an interpreter that imports a module, and wait for its end."""
    subprocess.run([sys.executable, "-P", "-c", f"import {module}"], check=True)
