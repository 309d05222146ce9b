"""`python -P -m smmufast`: the same as the command `smmufast`."""

import sys

from smmufast.cli import main

sys.exit(main())
