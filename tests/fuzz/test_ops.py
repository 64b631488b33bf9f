"""A bounded run of the fuzzer of ops, and proof that it tells a crash, a hang and poison."""

import os
import signal
import time

import pytest

from tests.fuzz import ops


@pytest.fixture(autouse=True)
def _compiled_ops_only(monkeypatch):
    monkeypatch.setattr(ops, "SLOW", 0.0)


@pytest.mark.parametrize("seed", [1, 2])
def test_some_hundred_cases(seed):
    ops.run(250, seed)


def plant(monkeypatch, fault):
    """Has ``fault`` in place of a call whose plan is not the one that an honest call brings."""
    honest = {id(call["plan"]) for name, call in ops.linear_calls()}
    real = ops.called

    def called(name, arguments):
        plan = arguments.get("plan")
        return real(name, arguments) if plan is None or id(plan) in honest else fault(arguments)

    monkeypatch.setattr(ops, "called", called)


def test_a_crash_has_a_number(monkeypatch):
    plant(monkeypatch, lambda _: os.kill(os.getpid(), signal.SIGSEGV))
    with pytest.raises(ops.Fault, match=r"case (\d+) of seed 3: killed by SIGSEGV") as found:
        ops.run(200, 3)
    number = int(str(found.value).split()[1])
    ops.run(number, 3)
    with pytest.raises(ops.Fault, match=f"case {number} of seed 3"):
        ops.run(1, 3, number)


def test_a_call_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(ops, "SECONDS", 1)
    plant(monkeypatch, lambda _: time.sleep(60))
    with pytest.raises(ops.Fault, match="killed by SIGALRM"):
        ops.run(200, 4)


def test_poison_is_found(monkeypatch):
    """As when one tampered plan was compiled under the id of an honest one."""

    def poison(arguments):
        arguments["weight"].mul_(2)
        return []

    plant(monkeypatch, poison)
    with pytest.raises(ops.Fault, match="changed an honest call"):
        ops.run(200, 5)
