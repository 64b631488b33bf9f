"""``python -m bench``: the table, and a json that says on which machine it was measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from bench.harness import Case, measure
from bench.shapes import FAMILIES
from maskmoe_kernels.experiments.report import machine, write_json


def cases(smoke: bool, families: list[str], widths: list[int], batch: int) -> list[Case]:
    """What to measure; the smoke suite only shows that everything runs."""
    if smoke:
        return [Case("toy3", 16, 256), Case("powerset4", 16, 256)]
    return [Case(family, width, batch) for family in families for width in widths]


def row(result: dict[str, Any], name: str, what: str) -> str:
    """One line: time, rate over present blocks, ratio to the best rival, error."""
    us = result["contenders"][name][what]["us"]
    best = min(c[what]["us"] for n, c in result["contenders"].items() if n != "ours")
    gflops = result["flops"][what] / us / 1e3
    error = max(result["contenders"][name]["error"].values())
    ratio = f"{best / us:5.2f}x best rival" if name == "ours" else " " * 17
    return (
        f"{result['family']:<10} d={result['d']:<4} B={result['B']:<6} {what:<8} {name:<13}"
        f"{us:11.1f} us | {gflops:7.1f} GFLOP/s | {ratio} | error {error:.0e}"
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two tiny shapes: does it run?")
    parser.add_argument(
        "--families", nargs="+", choices=FAMILIES, default=["powerset4", "powerset6"]
    )
    parser.add_argument(
        "--widths", nargs="+", type=int, default=[16, 32, 64], help="units an expert"
    )
    parser.add_argument("--batch", type=int, default=4096, help="rows")
    parser.add_argument("--rounds", type=int, default=20, help="interleaved rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="json to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for case in cases(args.smoke, args.families, args.widths, args.batch):
        result = measure(case, 3 if args.smoke else args.rounds)
        results.append(result)
        for what in ("forward", "step"):
            for name, contender in result["contenders"].items():
                note = f"  ({contender['note']})" if contender["note"] else ""
                print(row(result, name, what) + note, flush=True)
    if args.out is not None:
        write_json(args.out, {"machine": machine(), "threads": args.threads, "results": results})
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
