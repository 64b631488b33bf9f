"""Damaged files: each loads as what was saved, or is refused by a ``DataError`` that names it.

A case copies the files of one kind, damages one of them, and reads them as the package does.
Whatever the damage, nothing but ``DataError`` may come: no other exception, no code from the file,
no hang, no more than ``MEMORY`` bytes, and no file may be changed by reading it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import random
import resource
import shutil
import signal
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.movielens import explain
from maskmoe_kernels.experiments.movielens.data.fixed_negatives import read_fixed_negatives
from maskmoe_kernels.experiments.movielens.data.negatives import (
    draw_negatives,
)
from maskmoe_kernels.experiments.movielens.data.reader import read_movielens
from maskmoe_kernels.experiments.movielens.data.split import leave_one_out
from maskmoe_kernels.experiments.shared.report import sealed, write_json
from maskmoe_kernels.experiments.shared.source import TensorSource
from maskmoe_kernels.experiments.shared.trainer import Pace, Run, Trainer
from maskmoe_kernels.experiments.skip.data.columns import LOG_COLUMNS, TRACK_COLUMNS
from maskmoe_kernels.experiments.skip.data.csv_file import CsvFile
from maskmoe_kernels.experiments.skip.data.prepare import prepare
from maskmoe_kernels.experiments.skip.data.sessions import SessionDataset, SessionLoader
from maskmoe_kernels.experiments.skip.data.shards import Shards
from maskmoe_kernels.experiments.skip.generator.causes import Causes
from maskmoe_kernels.experiments.skip.generator.generate import check_settings, generate
from maskmoe_kernels.experiments.skip.generator.settings import GeneratorSettings
from maskmoe_kernels.experiments.skip.models import build
from maskmoe_kernels.experiments.skip.pace import MONITOR
from maskmoe_kernels.experiments.skip.pace import Pace as SkipPace
from maskmoe_kernels.experiments.skip.runs import load
from maskmoe_kernels.experiments.skip.settings import Settings
from maskmoe_kernels.experiments.skip.source import SessionSource
from maskmoe_kernels.experiments.skip.train import train as train_skip
from tests.experiments.movielens.tiny import write_movielens

#: Seconds that reading may take, and bytes that the process may grow by over all cases.
SECONDS, MEMORY = 20, 512 << 20

SETTINGS = Settings("black-box-gru", width=2, layers=1, batch_size=64)
PACE = SkipPace(epochs=1, learning_rate=1e-3)
GENERATED = GeneratorSettings(90, seed=5, tracks=2_000, chunk=45)


@dataclass(frozen=True)
class Kind:
    """Files that are read together.

    Attributes:
        folder: Where they are as they were written.
        files: Those to damage, relative to it.
        read: What the package makes of such a folder.
        exact: Whether the files carry checksums: what loads is then what was saved.
    """

    folder: Path
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    exact: bool = True


# --- The kinds ---------------------------------------------------------------------------


class _Fit:
    """A little regression, trained on tensors or only resumed."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def run(self, path: Path, resume: bool) -> Run:
        x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
        trainer = Trainer(
            self.model,
            TensorSource(lambda epoch: (x, x.sum(1, keepdim=True)), 20),
            lambda batch: nn.functional.mse_loss(self.model(batch[0]), batch[1]),
            lambda: {"NDCG@10": 0.5},
            Pace(epochs=2),
            {"model": "tiny"},
            path,
            monitor="NDCG@10",
        )
        trainer.begin(resume)
        return trainer.run()


def _read_fit(folder: Path) -> Any:
    fit = _Fit()
    run = fit.run(folder / "tiny.pt", resume=True)
    return [run.history, run.best_epoch, run.best, run.state, fit.model.state_dict()]


def _read_run(folder: Path) -> Any:
    model, settings, run = load(folder)
    return [model.state_dict(), vars(settings), run.history, run.best_epoch, run.best, run.state]


def _read_trainer(folder: Path) -> Any:
    model = build(SETTINGS)
    training = SessionDataset(Shards(_made() / "data", "train"), SETTINGS.batch_size, seed=0)
    identity = json.loads((_made() / "identity.json").read_text())
    source = SessionSource(SessionLoader(training), torch.device("cpu"))
    trainer = Trainer(
        model, source, lambda batch: torch.zeros(()), dict, PACE, identity,
        folder / "checkpoint.pt", monitor=MONITOR,
    )  # fmt: skip
    trainer.resume()
    state = [trainer.optimizer.state_dict(), trainer.scheduler.state_dict(), source.state_dict()]
    sums = [trainer.loss_sum, trainer.norm_sum, trainer.samples, trainer.done]
    rest = [*sums, trainer.history, trainer.best]
    return [model.state_dict(), *state, *rest, torch.get_rng_state(), random.getstate()]


def _read_shards(folder: Path) -> Any:
    found = []
    for split in ("train", "valid", "test"):
        shards = Shards(folder, split)
        found += [shards.digest, shards.tracks]
        found += [shards.table(group, None) for group in range(len(shards.sizes))]
    session = shards.table(0, ("session_id",))["session_id"][0].as_py()
    batch, rows = shards.find(session)
    return [*found, batch.first, batch.second, rows]


def _read_causes(folder: Path) -> Any:
    causes = Causes(folder)
    return [causes._digests, causes._causes, causes._decisive]


def _read_movielens(path: Path) -> Any:
    return list(vars(read_movielens(path)).values())


def _read_negatives(folder: Path) -> Any:
    data = read_movielens(_made() / "ml-1m")
    split = leave_one_out(data, 0)
    return [read_fixed_negatives(next(folder.iterdir()), data, split)]


def _read_csv(folder: Path) -> Any:
    for path in folder.iterdir():
        columns = LOG_COLUMNS if path.name.startswith("log") else TRACK_COLUMNS
        for _ in CsvFile(path, columns).blocks(1 << 16):
            pass


def _read_report(folder: Path) -> Any:
    return list(explain._sharpness(None, folder / "x.pt"))


def _read_generation(folder: Path) -> None:
    check_settings(folder, GENERATED)


@cache
def _made() -> Path:
    """All files, as the package writes them."""
    root = Path(tempfile.mkdtemp(prefix="maskmoe-fuzz-"))
    _Fit().run(root / "fit" / "tiny.pt", resume=False)
    generate(root / "csv", GENERATED)
    prepare([root / "csv"], root / "data", row_group=16)
    train_skip(root / "data", root / "run", SETTINGS, PACE)
    saved = torch.load(root / "run" / "checkpoint.pt", weights_only=True)
    (root / "identity.json").write_text(json.dumps(saved["config"]))
    (root / "run" / "report.json").unlink()
    write_movielens(root / "ml-1m")
    (root / "zip").mkdir()
    with zipfile.ZipFile(root / "zip" / "ml-1m.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (root / "ml-1m").iterdir():
            archive.write(path, f"ml-1m/{path.name}")
    _write_negatives(root)
    chosen = {"sharpness": 4.0, "chosen": "max loss 0.01"}
    content = {"models": {"interpretable": {"parameters": 7, **sealed(chosen)}}}
    write_json(root / "report" / "report.json", content)
    for name, files in (("generation", ["generation.json"]), ("plain", ["log_0.csv", "tf_0.csv"])):
        (root / name).mkdir()
        for file in files:
            shutil.copy(root / "csv" / file, root / name)
    (root / "packed").mkdir()
    text = (root / "csv" / "log_0.csv").read_bytes()
    (root / "packed" / "log_0.csv.gz").write_bytes(gzip.compress(text))
    (root / "causes").mkdir()
    shutil.copy(root / "csv" / "causes_0.parquet", root / "causes")
    return root


def _write_negatives(root: Path) -> None:
    data = read_movielens(root / "ml-1m")
    split = leave_one_out(data, 0)
    ids = data.movie_ids[draw_negatives(data, split, 0)]
    test = data.movie_ids[split.test].tolist()
    lines = [
        "\t".join([f"({user},{item})", *map(str, row)])
        for user, item, row in zip(data.user_ids.tolist(), test, ids.tolist(), strict=True)
    ]
    text = ("\n".join(lines) + "\n").encode()
    for name, content in (("tsv", text), ("tsv.gz", gzip.compress(text))):
        (root / name).mkdir()
        (root / name / f"negatives.{name}").write_bytes(content)


@cache
def kinds() -> dict[str, Kind]:
    """Every kind of file that the package reads, by name."""
    root = _made()

    def kind(folder: str, read: Callable[[Path], Any], exact: bool = True) -> Kind:
        files = sorted(p.relative_to(root / folder) for p in (root / folder).rglob("*.*"))
        names = tuple(str(f) for f in files if f.parts[0] != "logs" and f.name not in _UNREAD)
        return Kind(root / folder, names, read, exact)

    return {
        "fit": kind("fit", _read_fit),
        "run": kind("run", _read_run),
        "trainer": kind("run", _read_trainer),
        "shards": kind("data", _read_shards),
        "causes": kind("causes", _read_causes),
        "movielens": kind("ml-1m", _read_movielens, exact=False),
        "zip": kind("zip", _read_movielens),
        "negatives": kind("tsv", _read_negatives, exact=False),
        "negatives.gz": kind("tsv.gz", _read_negatives),
        "csv": kind("plain", _read_csv, exact=False),
        "csv.gz": kind("packed", _read_csv, exact=False),
        "report": kind("report", _read_report),
        "generation": kind("generation", _read_generation),
    }


#: What only ``prepare`` reads, and makes again where it is damaged.
_UNREAD = ("tracks.json", "hash.npy")
#: Kinds none of whose files may be missing; without others, work starts afresh.
_NEEDED = ("run", "shards", "movielens")


# --- The damages -------------------------------------------------------------------------


def flip_bits(data: bytes, draw: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8)) if out else 0):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def zero_sector(data: bytes, draw: random.Random) -> bytes:
    size = draw.choice((512, 4096))
    start = draw.randrange(len(data) // size + 1) * size
    lost = len(data[start : start + size])
    return data[:start] + bytes(lost) + data[start + size :]


def truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def append(data: bytes, draw: random.Random) -> bytes:
    return data + draw.choice((bytes(512), data, draw.randbytes(draw.randrange(1, 600))))


def swap_parts(data: bytes, draw: random.Random) -> bytes:
    size = draw.choice((16, 512, 4096))
    parts = [data[i : i + size] for i in range(0, len(data), size)] or [b""]
    i, j = draw.randrange(len(parts)), draw.randrange(len(parts))
    parts[i], parts[j] = parts[j], parts[i]
    return b"".join(parts)


def another_file(data: bytes, draw: random.Random) -> bytes:
    other = kinds()[draw.choice(list(kinds()))]
    return (other.folder / draw.choice(other.files)).read_bytes()


DAMAGES = (flip_bits, zero_sector, truncate, append, swap_parts, another_file)

#: What may stand where something else is expected.
STRANGE: tuple[Callable[[], Any], ...] = (
    lambda: None, lambda: True, lambda: -1, lambda: 10**30, lambda: 0.5, lambda: float("nan"),
    lambda: "12", lambda: "", list, dict, lambda: [[]], lambda: {"": 0}, lambda: {0: [None]},
)  # fmt: skip


def edit(content: Any, draw: random.Random, strange: Callable[[Any], Any]) -> Any:
    """Change, drop or rename something somewhere in nested dicts and lists, in place."""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        if not keys:
            return content
        key = draw.choice(keys)
        inner = content[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.8:
            content = inner
            continue
        match draw.randrange(4):
            case 0:
                del content[key]
            case 1 if isinstance(content, dict):
                content[f"{key}s"] = content.pop(key)
            case _:
                content[key] = strange(inner)
        return content


def edit_checkpoint(data: bytes, draw: random.Random) -> bytes:
    """Save again what is changed in a key, a value or a type."""
    content = torch.load(io.BytesIO(data), weights_only=True)

    def strange(value: Any) -> Any:
        if not isinstance(value, Tensor) or draw.random() < 0.3:
            return draw.choice((*STRANGE, lambda: torch.zeros(2), lambda: torch.zeros(())))()
        spoiled = value.clone()
        if value.is_floating_point() and value.numel() and draw.random() < 0.5:
            spoiled.view(-1)[draw.randrange(value.numel())] = draw.choice((torch.nan, torch.inf))
            return spoiled
        return draw.choice(
            (spoiled[None], spoiled.double(), spoiled.half(), spoiled.to(torch.int32),
             spoiled.view(-1)[:1].expand(10**9), spoiled.to_sparse())
        )  # fmt: skip

    edit(content, draw, strange)
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def edit_json(data: bytes, draw: random.Random) -> bytes:
    """Write again what is changed in a key, a value or a type; perhaps with a fresh checksum."""
    content = json.loads(data)
    edit(content, draw, lambda value: draw.choice(STRANGE)())
    if draw.random() < 0.5 and "checksum" in content:
        content = sealed(content)
    return json.dumps(content).encode()


class _Code:
    """Makes a folder where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.marker,)


def code(data: bytes, draw: random.Random, marker: Path) -> bytes:
    """A pickle that runs code, alone or in a checkpoint or an array."""
    strange = _Code(marker)
    out = io.BytesIO()
    match draw.randrange(3):
        case 0:
            pickle.dump(strange, out)
        case 1:
            torch.save({"format": 1, "model": strange}, out)
        case _:
            np.save(out, np.array([strange, None], object), allow_pickle=True)
    return out.getvalue()


# --- A case ------------------------------------------------------------------------------


def run(cases: int, seed: int = 0, start: int = 0) -> None:
    """Try so many cases, from number ``start`` on.

    Raises:
        AssertionError: The first fault, with seed and number of its case.
    """
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    expected = {name: digest(kind.read(kind.folder)) for name, kind in kinds().items()}
    for number in range(start, start + cases):
        try:
            _case(random.Random(f"{seed}/{number}"), expected)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise AssertionError(f"files: seed {seed}, case {number}: {error!r}") from error
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown) << 10
    assert grown < MEMORY, f"files: seed {seed}, cases {start} on: {grown:,} bytes more in memory"


def _case(draw: random.Random, expected: dict[str, str]) -> None:
    name = draw.choice(list(kinds()))
    kind = kinds()[name]
    with tempfile.TemporaryDirectory(prefix="maskmoe-fuzz-") as place:
        folder, marker = Path(place) / "files", Path(place) / "marker"
        shutil.copytree(kind.folder, folder)
        target = folder / draw.choice(kind.files)
        damaged, edited = _damage(target, draw, marker, name in _NEEDED)
        before = snapshot(folder)
        found, refusal = None, ""
        try:
            with limited(SECONDS):
                found = digest(kind.read(folder))
        except DataError as error:
            refusal = str(error)
        if found is None:
            # What an edit makes of a manifest may be told of the file that it is about.
            named = target.name in refusal or (edited and str(folder) in refusal)
            assert named, f"{name}, {damaged}: {target.name} is not in {refusal}"
        else:
            same = found == expected[name] or edited or not kind.exact
            assert same, f"{name}: {target.name} loads with another content after {damaged}"
        assert snapshot(folder) == before, f"{name}: reading changed a file"
        assert not marker.exists(), f"{name}: code ran from {target.name}"


def _damage(target: Path, draw: random.Random, marker: Path, needed: bool) -> tuple[str, bool]:
    """Damage a file, or remove one that is needed; how, and whether the new content is whole."""
    data, editor = target.read_bytes(), None
    if target.suffix == ".pt":
        editor = edit_checkpoint
    elif target.suffix == ".json":
        editor = edit_json
    choice = draw.randrange(12)
    if choice < 4 and editor is not None:
        target.write_bytes(editor(data, draw))
        return editor.__name__, True
    if choice == 4:
        target.write_bytes(code(data, draw, marker))
        return "code", False
    if choice == 5 and needed:
        target.unlink()
        return "removal", False
    damage = draw.choice(DAMAGES)
    target.write_bytes(damage(data, draw))
    return damage.__name__, False


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise after so many seconds; random states are left as they were."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"still reading after {seconds} s")

    state, handler = random.getstate(), signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        random.setstate(state)


def digest(value: Any) -> str:
    """Of nested content, bit for bit."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.detach().numpy()
        if isinstance(value, np.ndarray):
            found.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).data)
        elif isinstance(value, pa.Table):
            found.update(repr(value.to_pydict()).encode())
        elif isinstance(value, dict):
            add(list(value.items()))
        elif isinstance(value, list | tuple):
            found.update(f"{len(value)}(".encode())
            for one in value:
                add(one)
        else:
            found.update(repr(value).encode())

    add(value)
    return found.hexdigest()
