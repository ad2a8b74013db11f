"""State dicts in files: NumPy's .npz, one array per name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError
from .module import Module


def save_weights(model: Module, path: Any) -> None:
    """Write the model's state dict to a .npz file, which appears whole or not at all."""
    path = Path(path)
    # Written under another name first: an interrupted run leaves the file of the last one.
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, **model.state_dict())  # type: ignore[arg-type]
    partial.replace(path)


def load_weights(model: Module, path: Any, strict: bool = True) -> None:
    """Read a file of :func:`save_weights` into a model; errors as `Module.load_state_dict`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            state = {name: file[name] for name in file.files}
    except (ValueError, AttributeError) as error:
        raise ArgumentError(f"{path} is not a file of weights (.npz): {error}") from None
    model.load_state_dict(state, strict)
