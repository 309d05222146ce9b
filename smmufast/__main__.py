"""`python -P -m smmufast`: the same as the command `smmufast`."""

import sys

try:
    from smmufast.cli import main
except KeyboardInterrupt:
    sys.exit(130)

sys.exit(main())
