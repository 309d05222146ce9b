"""Every face gives what the brute-force twin gives, over random systems."""

import os

import twin

COUNT = int(os.environ.get("SMMUFAST_TWIN", "1000000"))


def test_every_face_agrees_with_the_twin():
    assert twin.run(COUNT, os.cpu_count() or 1) >= 2 * COUNT
