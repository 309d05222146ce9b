"""Where things are, for every test: no file counts the folders above it."""

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
#: Captures of others; they need not be there.
CAPTURES = Path(os.environ.get("SMMUFAST_CAPTURES") or ROOT.parent / "shared" / "captures")
