"""A small log of one's own: its schema, random events, and files of every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
from pyarrow import csv

TEXT = """
name = "shop"

[sessions]
by = "inactivity"
gap = "30 minutes"
shortest = 2
longest = 40

[events]
files = "visits*"
user = "who"
item = "what"
time = "when"
label = "left"

[events.columns]
who = { kind = "id" }
what = { kind = "id" }
when = { kind = "time", unit = "ms" }
left = { kind = "flag" }
price = { kind = "number", low = 0, high = 100 }
device = { kind = "name", names = ["phone", "desk"] }

[items]
files = "goods*"
key = "what"

[items.columns]
what = { kind = "id" }
weight = { kind = "number", low = 0, high = 10, log = "1p" }
shelf = { kind = "name", names = ["top", "middle", "low"] }

[relations.wanted]
files = "wanted*"
user = "who"
item = "what"
since = "since"

[relations.wanted.columns]
who = { kind = "id" }
what = { kind = "id" }
since = { kind = "time", unit = "ms" }

[past]
user_rate = { kind = "rate", of = "user" }
item_rate = { kind = "rate", of = "item" }
pair_rate = { kind = "discounted_rate", of = "pair", half_life = "2 hours" }
decayed = { kind = "discounted_rate", of = "user", half_life = "1 day" }
sold = { kind = "count", of = "item", window = "90 minutes" }
seen = { kind = "count", of = "pair" }
wanted = { kind = "relation", relation = "wanted" }

[groups.given]
halves = "A"
features = ["left", { of = "place", divide = 10 }, { of = "device", as = "one_hot" }]

[groups.past]
halves = "AB"
features = [
  "past.user_rate",
  "past.item_rate",
  "past.pair_rate",
  "past.decayed",
  "past.sold",
  "past.seen",
  "past.wanted",
]

[groups.goods]
halves = "AB"
features = ["item.weight", "item.shelf", { of = "when", as = "weekday", name = "day" }]

[groups.who]
halves = "AB"
features = [{ of = "user", as = "embedding", width = 3 }]

[experts]
given = ["given"]
past = ["past"]
who = ["who"]
all = ["given", "past", "goods", "who"]

[words]
false = "stayed"
true = "left"
"""
START = 1_767_600_000_000  # a Monday
MINUTE = 60_000


def draw_events(count: int = 400, users: int = 7, items: int = 9, seed: int = 0) -> dict[str, Any]:
    """Columns of random events, in no order; some at the same instant."""
    random = np.random.default_rng(seed)
    user = random.integers(0, users, count)
    time = np.zeros(count, np.int64)
    for u in range(users):
        at = (user == u).nonzero()[0]
        pauses = random.choice([0, 1, 5, 20, 40, 300], len(at)) * MINUTE
        time[at] = START + np.cumsum(pauses)
    # An item of a user once at a time.
    item = (np.arange(count) + random.integers(0, items, count)) % items
    kept = np.unique(np.stack([user, item, time]), axis=1, return_index=True)[1]
    kept = random.permutation(kept)
    return {
        "who": [f"u{u}" for u in user[kept]],
        "what": [f"i{i}" for i in item[kept]],
        "when": time[kept],
        "left": random.random(len(kept)) < 0.5,
        "price": np.round(random.random(len(kept)) * 100, 3),
        "device": [("phone", "desk")[k] for k in random.integers(0, 2, len(kept))],
    }


def write_log(folder: Path, events: dict[str, Any], ending: str = "csv", files: int = 1) -> Path:
    """Write events, items and a relation as files of one format."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(events)
    for k in range(files):
        part = table.slice(k * len(table) // files, (k + 1) * len(table) // files
                           - k * len(table) // files)  # fmt: skip
        write_table(part, folder / f"visits_{k}.{ending}")
    items = [f"i{k}" for k in range(9)]
    shelf = [("top", "middle", "low")[k % 3] for k in range(9)]
    write_table(
        pa.table({"what": items, "weight": np.linspace(0, 9, 9), "shelf": shelf}),
        folder / f"goods.{ending}",
    )
    wanted = {"who": ["u0", "u1", "u0"], "what": ["i1", "i2", "i3"]}
    since = np.array([START + 100 * MINUTE, START - 1, START + 10**10])
    write_table(pa.table(wanted | {"since": since}), folder / f"wanted.{ending}")
    return folder


def write_table(table: Any, path: Path) -> None:
    """Write a table as csv, parquet or arrow, by its name."""
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".arrow":
        feather.write_feather(table, path, compression="uncompressed")
    else:
        csv.write_csv(table, path, csv.WriteOptions(quoting_style="needed"))
        text = path.read_text().replace('"', "")
        path.write_text(text)
