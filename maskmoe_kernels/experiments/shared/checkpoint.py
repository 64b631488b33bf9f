"""Checkpoints: written atomically, and verified before they are used.

A checkpoint is torch's zip archive. torch writes a CRC-32 of each record but does not verify it;
:func:`load_checkpoint` does. It refuses whatever :func:`save_checkpoint` does not write, so that a
file of unknown origin can neither run code nor take more memory than its own size.
"""

from __future__ import annotations

import math
import os
import pickletools
import random
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.structure import Spec, check
from maskmoe_kernels.files import replacing

CHECKPOINT_FORMAT = 1

#: A plain value: no tensor and no container.
PLAIN: Spec = (None, bool, int, float, str)
_TENSORS = {str: Tensor}
# What training changes in the state of a scheduler; the rest are its settings.
_MOVING = {"best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr"}
#: What every checkpoint holds; callers check the keys that they add.
_COMMON: Spec = {
    "config": {str: PLAIN},
    "model": _TENSORS,
    "best": (None, {"epoch": int, "metrics": {str: float}, "model": _TENSORS}),
}
#: Experiment -> the command that reads its checkpoints.
_READERS = {
    "movielens": "maskmoe movielens explain --checkpoint {path}",
    "skip": "maskmoe skip explain --run {folder}",
}
#: All globals that a pickle of tensors and plain values names.
_GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"} | {
    f"torch {kind}Storage"
    for kind in ("BFloat16", "Bool", "Byte", "Double", "Float", "Half", "Int", "Long", "Short")
}
# Errors of torch where keys, types or shapes are not those of the model.
_MISFIT = (
    AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


def save_checkpoint(obj: dict[str, Any], path: Path) -> None:
    """``torch.save``, with the guarantees of :func:`replacing`."""
    with replacing(path) as file:
        torch.save(obj, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load and verify a checkpoint that :func:`save_checkpoint` wrote.

    Raises:
        DataError: Missing, damaged, of another format, or without the keys of one.
    """
    fail = failing(path)
    if not path.exists():
        raise DataError(f"{path}: no such checkpoint; train a model first")
    try:
        if not path.is_file():
            raise ValueError("not a file")
        with path.open("rb") as file:
            _verify(file)
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(
            f"{path}: not a readable checkpoint ({type(error).__name__}: {_line(error)}); it may "
            "be damaged or another kind of file. Restore a copy of it, or train again"
        ) from error
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if not isinstance(found, int) or found != CHECKPOINT_FORMAT:
        raise DataError(
            f"{path}: expected a checkpoint of format {CHECKPOINT_FORMAT}; train again with this "
            "version"
        )
    check(checkpoint, _COMMON, fail)
    result: dict[str, Any] = checkpoint
    return result


def check_experiment(path: Path, config: dict[str, Any], experiment: str) -> None:
    """Check that a checkpoint is of this experiment.

    Args:
        path: Of the checkpoint, for the error.
        config: Its config. That of an experiment other than MovieLens names it.
        experiment: A key of ``_READERS``.

    Raises:
        DataError: It is of another one; the message names the command that reads it.
    """
    own = config.get("experiment", "movielens")
    if own != experiment:
        reader = _READERS.get(str(own))
        remedy = f"`{reader}` reads it" if reader else "this version does not know it"
        raise DataError(
            f"{path}: is a checkpoint of `maskmoe {own}`, expected one of `maskmoe {experiment}`; "
            + remedy.format(path=path, folder=path.parent)
        )


def failing(path: Path) -> Callable[[str], DataError]:
    """A function from what is wrong with the content of a checkpoint to the error about it."""
    return lambda what: DataError(
        f"{path}: {what}; the checkpoint is damaged or of another version. Restore a copy of it, "
        "start again with --overwrite, or train into another --out folder"
    )


def check_progress(path: Path, saved: dict[str, Any], monitor: str) -> None:
    """Check that the history and the best epoch of a checkpoint agree.

    Args:
        path: Of the checkpoint, for the error.
        saved: Its content, from :func:`load_checkpoint`.
        monitor: The metric by which the best epoch was chosen.

    Raises:
        DataError: They do not agree.
    """
    fail, best = failing(path), saved["best"]
    check(saved, {"history": [{"epoch": int, str: float}]}, fail)
    epochs = [record["epoch"] for record in saved["history"]]
    if epochs != list(range(1, len(epochs) + 1)):
        raise fail(f"expected the epochs 1, 2, ... in history, got {epochs[:9]}")
    if best is None:
        if epochs:
            raise fail(f"expected the best of {len(epochs)} epochs, got none")
        return
    if best["epoch"] not in epochs:
        raise fail(f"expected best.epoch to be one of {len(epochs)} epochs, got {best['epoch']}")
    check(best["metrics"], {monitor: float}, fail, "best.metrics")


def restore_model(path: Path, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load ``weights``, which stand in the checkpoint at ``path``.

    Raises:
        DataError: They are not this model's, in name, type or shape, or are not finite.
    """
    own, fail = model.state_dict(), failing(path)
    for name, value in weights.items():
        if name in own and value.dtype != own[name].dtype:
            raise fail(f"expected the weight {name} to be {own[name].dtype}, got {value.dtype}")
        # A view may claim more elements than it has bytes.
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise fail(f"expected the weight {name} to be stored whole, got a view of a part")
        if bad := int((~value.isfinite()).sum()):
            got = f"{bad} of {value.numel()} that are not"
            raise fail(f"expected finite numbers in the weight {name}, got {got}")
    with restoring(path, "weights"):
        model.load_state_dict(weights)


def restore_optimizer(
    path: Path, optimizer: torch.optim.Optimizer, model: nn.Module, saved: Any
) -> None:
    """Load the state of an optimizer of the same parameters; its learning rate comes with it.

    Args:
        path: Of the checkpoint, for the error.
        optimizer: Of the parameters of ``model``.
        model: Names the parameters in the error.
        saved: The state.

    Raises:
        DataError: It is of other parameters, or of another optimizer.
    """
    fail = failing(path)
    check(saved, {"state": {int: _TENSORS}, "param_groups": [{str: object}]}, fail, "optimizer")
    fresh, groups = optimizer.state_dict()["param_groups"], saved["param_groups"]
    if len(groups) != len(fresh):
        raise fail(f"expected {len(fresh)} optimizer.param_groups, got {len(groups)}")
    for i, (group, own) in enumerate(zip(groups, fresh, strict=True)):
        check(group, {"lr": float, "params": [int]}, fail, f"optimizer.param_groups[{i}]")
        for key in own.keys() - {"lr"}:
            # What a later torch added is missing, and torch fills it in.
            if key in group and group[key] != own[key]:
                name = f"optimizer.param_groups[{i}].{key}"
                raise fail(f"expected {name} to be {own[key]!r}, got {group[key]!r}")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [
        (names[id(p)], tuple(p.shape)) for group in optimizer.param_groups for p in group["params"]
    ]
    for number, state in saved["state"].items():
        _check_moments(state, number, parameters, fail)
    with restoring(path, "optimizer state"):
        optimizer.load_state_dict(saved)


def _check_moments(
    state: dict[str, Tensor],
    number: int,
    parameters: list[tuple[str, tuple[int, ...]]],
    fail: Callable[[str], DataError],
) -> None:
    """Check that Adam's averages have the shape and type of the parameter of this number.

    Args:
        state: Adam's, of the parameter.
        number: Of the parameter.
        parameters: Name and shape of each.
        fail: Makes the error.
    """
    name = f"optimizer.state.{number}"
    if not 0 <= number < len(parameters):
        raise fail(f"expected {name} to be of one of {len(parameters)} parameters")
    parameter, shape = parameters[number]
    for key, own in (("step", ()), ("exp_avg", shape), ("exp_avg_sq", shape)):
        check(state, {key: Tensor}, fail, name)
        value = state[key]
        if tuple(value.shape) != own or not value.is_floating_point():
            raise fail(
                f"expected {name}.{key} to be floating point and {own} for the parameter "
                f"{parameter} {shape}, got {value.dtype} {tuple(value.shape)}: this state is of "
                "another layer, so a layer was swapped or its size changed"
            )
        # An average of squares may be infinite: its weight no longer changes, but is finite.
        if bool(value.isnan().any()):
            raise fail(f"expected numbers in {name}.{key}, got NaN")


def restore_scheduler(path: Path, scheduler: ReduceLROnPlateau, saved: dict[str, Any]) -> None:
    """Load the state of a scheduler of the same settings.

    Raises:
        DataError: It is of other settings, or incomplete.
    """
    own, fail = scheduler.state_dict(), failing(path)
    check(saved, {key: type(own[key]) for key in _MOVING - {"best"}}, fail, "scheduler")
    best = saved.get("best")  # infinite until the first validation
    if not isinstance(best, float) or math.isnan(best):
        raise fail(f"expected scheduler.best to be a number, got {best!r}")
    known = {key: saved[key] for key in own if key in saved}
    with restoring(path, "learning rate's schedule"):
        for key in known.keys() - _MOVING:
            if known[key] != own[key]:
                got = f"{own[key]!r}, got {known[key]!r}"
                raise fail(f"expected scheduler.{key} to be {got}")
        scheduler.load_state_dict(known)


def random_state(device: torch.device) -> dict[str, Any]:
    """States of the random generators of torch, of ``device`` and of Python."""
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
        "python": [version, list(words), gauss],
    }


def restore_random_state(path: Path, device: torch.device, saved: dict[str, Any]) -> None:
    """Set the generators to what :func:`random_state` found.

    Raises:
        DataError: It is the state of other generators.
    """
    with restoring(path, "random states"):
        torch.set_rng_state(saved["torch"])
        for state in saved["cuda"]:
            torch.cuda.set_rng_state(state, device)
        version, words, gauss = saved["python"]
        random.setstate((version, tuple(words), gauss))


@contextmanager
def restoring(path: Path, what: str) -> Iterator[None]:
    """Turn errors of this block into one that says which part of the checkpoint does not fit.

    Raises:
        DataError: The block failed; the message names ``path`` and ``what``.
    """
    try:
        yield
    except DataError:
        raise
    except _MISFIT as error:
        raise DataError(
            f"{path}: its {what} do not fit this model; it was trained on other data or by "
            f"another version ({type(error).__name__}: {_line(error)}). Use another --out folder"
        ) from error


def _verify(file: IO[bytes]) -> None:
    """Read a whole archive, and compare each record with its checksum.

    Raises:
        BadZipFile: It is damaged, or not as torch writes it.
    """
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        plain = all(record.compress_type == zipfile.ZIP_STORED for record in records)
        once = len({record.filename for record in records}) == len(records)
        if not plain or not once or sum(record.file_size for record in records) > size:
            raise zipfile.BadZipFile("its records are not those of a checkpoint")
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"bad checksum of the record {damaged}")
        for name in archive.namelist():
            if name.endswith(".pkl"):
                _check_pickle(archive.read(name))


def _check_pickle(data: bytes) -> None:
    for operation, argument, _ in pickletools.genops(data):
        if operation.name == "GLOBAL" and argument not in _GLOBALS:
            raise zipfile.BadZipFile(f"it asks for {argument}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
