"""Fitted estimators as files: safetensors, with everything else as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
from torch import Tensor

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.estimators.tables import Array
from maskmoe_kernels.files import claim, replacing

_FORMAT, _VERSION = "maskmoe_kernels.estimators", 2


def write_model(path: str | Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a model in place of what was there; a kill leaves the old file or the new one.

    It may also leave a temporary file, which the next save into the same folder removes.

    Args:
        path: Of the file.
        record: Plain values.
        tensors: Name to tensor.

    Raises:
        OSError: It cannot be written.
    """
    text = json.dumps(record, allow_nan=False)
    metadata = {"format": _FORMAT, "version": str(_VERSION), "model": text}
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    data = safetensors.torch.save(plain, metadata)
    claim(Path(path).parent)
    with replacing(path) as file:
        file.write(data)


def read_model(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`write_model` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        DataError: It is damaged, of another kind, or of a later version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file; save(path) writes one")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise DataError(
            f"{path}: no model of save(), or damaged ({error}); save the model again"
        ) from None
    if metadata.get("format") != _FORMAT:
        raise DataError(f"{path}: a safetensors file, but no estimator; save() of one writes it")
    if metadata.get("version") != str(_VERSION):
        raise DataError(
            f"{path}: version {metadata.get('version')} of the format, and this is version "
            f"{_VERSION}; load it with the maskmoe_kernels that saved it"
        )
    try:
        record = json.loads(metadata["model"])
        if not isinstance(record, dict):
            raise TypeError("the header holds no object")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: its header is damaged ({error}); save the model again") from None
    return record, tensors


def labels_to_json(labels: Array) -> dict[str, Any]:
    """Class labels as plain values.

    Raises:
        ValueError: Labels that are neither text nor numbers nor booleans.
    """
    values = labels.tolist()
    if not all(isinstance(value, (str, int, float, bool)) for value in values):
        raise ValueError(f"classes {values[:5]} cannot be saved; name them by text or numbers")
    return {"dtype": labels.dtype.str if labels.dtype != object else "O", "values": values}


def labels_from_json(record: Mapping[str, Any]) -> Array:
    """The labels that :func:`labels_to_json` described."""
    return np.array(record["values"], dtype=np.dtype(str(record["dtype"])))


def plain_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of an estimator as plain values; a random state that is no number is left out."""
    plain = {}
    for name, value in parameters.items():
        try:
            plain[name] = json.loads(json.dumps(value, default=_plain))
        except TypeError:
            plain[name] = None
        if isinstance(value, Mapping) and any(not isinstance(key, str) for key in value):
            plain[name] = {"pairs": [[_plain_key(key), v] for key, v in value.items()]}
    return plain


def parameters_from_json(record: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that :func:`plain_parameters` described."""
    return {
        name: dict(map(tuple, value["pairs"]))
        if isinstance(value, dict) and [*value] == ["pairs"]
        else value
        for name, value in record.items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (np.ndarray, tuple, set, frozenset)):
        return [*value]
    raise TypeError(type(value).__name__)


def _plain_key(key: Any) -> Any:
    return key.item() if isinstance(key, np.generic) else key
