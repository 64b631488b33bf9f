"""``python -m tests.fuzz layers --cases N --seed S [--start K]``: run one fuzzer."""

import argparse
import faulthandler
import importlib
import importlib.util
import os
import re
import sys
import time
import traceback

FUZZERS = ("layers", "mlp", "ops", "files")
# Between two lines on progress.
SECONDS = 20.0


def main(arguments=None) -> int:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read on import; see tests/conftest.py
    there = [name for name in FUZZERS if importlib.util.find_spec(f"tests.fuzz.{name}")]
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("fuzzer", choices=there)
    parser.add_argument("--cases", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (default: 0)")
    parser.add_argument("--start", type=int, default=0, help="number of the first (default: 0)")
    given = parser.parse_args(arguments)
    run = importlib.import_module(f"tests.fuzz.{given.fuzzer}").run
    fault = search(run, given)
    if fault is None:
        print(f"{given.fuzzer}: {given.cases} cases from seed {given.seed}: no fault")
        return 0
    print(f"{given.fuzzer}: {fault}")
    return 1


def search(run, given) -> str | None:
    """Run all cases, some at a time; the fault and how to see it again, or None."""
    done, size, begun = 0, 1, time.monotonic()
    told = begun
    while done < given.cases:
        first, size = given.start + done, min(size, given.cases - done)
        started = time.monotonic()
        try:
            run(size, given.seed, first)
        except Exception as error:
            traceback.print_exc()
            # A fuzzer says the number of the case; if it does not, all of these are run again.
            number = re.search(r"\bcase (\d+)", str(error))
            again = (int(number[1]), 1) if number else (first, size)
            return (
                f"{error}\nIt comes again with:\n    python -m tests.fuzz {given.fuzzer} "
                f"--seed {given.seed} --start {again[0]} --cases {again[1]}"
            )
        now = time.monotonic()
        done += size
        if now - told > SECONDS:
            told = now
            rate = done / (now - begun)
            print(f"{given.fuzzer}: {done} cases, {rate:.0f} a second", file=sys.stderr, flush=True)
        if now - started < SECONDS / 4:
            size *= 2
    return None


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
