"""The command, in a process of its own or in this one."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import smmufast
from smmufast.cli import main

HOME = Path(smmufast.__file__).resolve().parent.parent
SCRIPT = Path(sys.executable).with_name("smmufast")
COMMAND = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-P", "-m", "smmufast"]


def start(*arguments, **more):
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | more
    # whoever started the tests in the background made them, and what they start, ignore SIGINT
    more.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    # the package that is tested, wherever it was built
    environment = os.environ | {"PYTHONPATH": str(HOME), "COLUMNS": "120"}
    return subprocess.Popen([*COMMAND, *map(str, arguments)], env=environment, **more)


def run(*arguments, status=0, given=None):
    """Its output, or what it says of bad input; `given` is its standard input, text or bytes.

    It runs in this process: to start another one takes longer than most commands do.
    """
    given = given.encode() if isinstance(given, str) else given or b""
    streams = [io.TextIOWrapper(io.BytesIO(data), "utf-8") for data in (given, b"", b"")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "120")
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            patch.setattr(sys, name, stream)
        try:
            code = main([*map(str, arguments)])
        except SystemExit as end:  # of argparse
            code = end.code
    for stream in streams[1:]:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode() for stream in streams[1:])
    assert code == status, (code, out, err)
    return out if status != 2 else err


def run_json(*arguments, status=0):
    return json.loads(run(*arguments, "--json", status=status))
