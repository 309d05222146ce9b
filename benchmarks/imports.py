"""Fresh interpreters that import one module."""

import resource
import subprocess
import sys

# The first is the baseline; "sys" costs nothing and shows what the interpreter itself takes.
IMPORTS = ("numpy", "smmufast", "sys")


def import_seconds(module):
    """Start an interpreter that imports a module; return its processor time in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-P", "-c", f"import {module}"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
