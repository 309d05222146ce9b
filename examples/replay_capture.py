"""Translate every access that a capture holds and compare; the capture may be named."""

import sys
from pathlib import Path

from smmufast.capture import Capture
from smmufast.replay import replay


def main() -> int:
    """Replay the capture and return 1 if something differs."""
    path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "linux-7.3-4k-s1"
    capture = Capture.load(path)
    print(capture, "left out:", capture.masked or "nothing")

    configuration = capture[0]
    smmu = configuration.smmu()
    first = configuration.requests[0]
    print(smmu.translate(int(first["sid"]), int(first["iova"])))

    found = replay(capture)
    for sid, tally in found.streams.items():
        print(f"stream {sid:#5x}: {tally.agreeing} of {tally.requests} agree")
    for difference in found.differences:
        print("differs:", difference.reasons)
    return 1 if found.total.differing else 0


if __name__ == "__main__":
    sys.exit(main())
