"""Loads the model of a finished run from its folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.checkpoint import (
    check_experiment,
    check_progress,
    failing,
    load_checkpoint,
    restore_model,
    restoring,
)
from maskmoe_kernels.experiments.shared.structure import check
from maskmoe_kernels.experiments.shared.trainer import Run
from maskmoe_kernels.experiments.skip.models import build
from maskmoe_kernels.experiments.skip.pace import MONITOR
from maskmoe_kernels.experiments.skip.schema.parse import parse_schema
from maskmoe_kernels.experiments.skip.schema.schema import Schema
from maskmoe_kernels.experiments.skip.settings import Settings
from maskmoe_kernels.models.sessions import SessionExperts, SessionModel

#: Files in the folder of a run.
CHECKPOINT, REPORT = "checkpoint.pt", "report.json"
#: The value of ``experiment`` in a checkpoint's config.
EXPERIMENT = "skip"


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[SessionModel, Settings, Run]:
    """Load the model of a run with its best weights.

    Args:
        folder: ``out`` of :func:`train`, or the checkpoint in it.
        device: Where to put the model.
    Returns:
        The model in evaluation mode, its settings, and the run.
    Raises:
        DataError: There is no checkpoint, it is damaged, has no finished epoch, or is of another
            experiment or version.
    """
    path = folder / CHECKPOINT if folder.is_dir() else folder
    if folder.is_dir() and not path.exists():
        path = min(folder.glob("*.pt"), default=path)  # of another experiment: it says so below
    saved = load_checkpoint(path)
    config = saved["config"]
    check_experiment(path, config, EXPERIMENT)
    if saved["best"] is None:
        raise DataError(f"{path}: no epoch is finished yet; let `maskmoe skip train` go on")
    check_progress(path, saved, MONITOR)
    best = saved["best"]
    settings = _settings_of(path, config, best["model"])
    with restoring(path, "settings"):
        schema = parse_schema(config["schema"], f"{path} (its schema)")
        model = build(settings, schema, config["users"])
    restore_model(path, model, best["model"])
    run = Run(saved["history"], best["epoch"], best["metrics"], best["model"])
    return model.to(device).eval(), settings, run


def check_schema(path: Path, model: SessionModel, schema: Schema) -> None:
    """Check that a run is of sessions with these groups and experts.

    Raises:
        DataError: It is of others.
    """
    groups = schema.first_groups, schema.second_groups
    widths = tuple(sum(group.values()) for group in groups)
    same = (model.first_features, model.second_features) == widths
    if isinstance(model, SessionExperts):
        same &= (model.first_groups, model.second_groups) == groups
        same &= model.family.groups == schema.family.groups
        same &= model.family.subsets == schema.family.subsets
    if not same:
        raise DataError(
            f"{path}: expected a run with the groups and experts of the schema {schema.name!r} of "
            "the data, got one with others. Name the data that it was trained on."
        )


def _settings_of(path: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Settings:
    """The settings in a checkpoint's config.

    Raises:
        DataError: They are invalid, or too large for the weights in the checkpoint.
    """
    kinds = get_type_hints(Settings)
    check(config, kinds | {"schema": str, "users": int}, failing(path), "config")
    with restoring(path, "settings"):
        settings = Settings(**{name: config[name] for name in kinds})
    rows = weights.get("users.table.weight", torch.empty(1, 0)).shape[0]
    if config["users"] != rows:
        raise failing(path)(f"expected config.users of {rows}, got {config['users']}")
    # Every layer has a square matrix. Refuse larger settings before they allocate memory.
    most = math.isqrt(sum(value.numel() for value in weights.values()))
    for name in ("width", "heads", "layers"):
        if not 1 <= getattr(settings, name) <= most:
            got = f"{getattr(settings, name)} for so few weights"
            raise failing(path)(f"expected config.{name} of 1 to {most}, got {got}")
    return settings
