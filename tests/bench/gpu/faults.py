"""Planted faults, for rehearsals of the GPU lab: no part of the suite.

Between two green tests: a failure, a hang, a crash, a slow property, a full disk.
"""

import os
import signal
import time

from hypothesis import given
from hypothesis import strategies as st

drawn = []


def test_green_before():
    assert 1 + 1 == 2


def test_fails():
    assert 1 + 1 == 3


def test_hangs():
    time.sleep(600)


def test_crashes():
    os.kill(os.getpid(), signal.SIGSEGV)


@given(st.lists(st.integers(), min_size=3))
def test_slow_property(values):
    """To shrink its failure would take minutes."""
    drawn.append(values)
    time.sleep(0.1)
    assert len(drawn) < 5


def test_slow_property_was_cut_short():
    assert 5 <= len(drawn) <= 12


def test_fills_the_disk():
    with open("/dev/full", "w") as file:
        file.write("x" * 10**6)


def test_green_after():
    assert 2 + 2 == 4
