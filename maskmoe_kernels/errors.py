"""The errors this library raises on bad input; each message says what to do next."""

from __future__ import annotations


class LayoutError(ValueError):
    """A family, a layout or a tensor meant for one does not fit."""


class BackendError(RuntimeError):
    """A named backend or transform cannot run here; the message gives reason and remedy."""


class DataError(ValueError):
    """A data file is damaged or not in its official format; the message gives file and line."""
