"""Where things are, for every test: no file counts the folders above it."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
