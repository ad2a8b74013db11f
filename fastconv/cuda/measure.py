"""Times of convolutions on the current GPU, for tuning: between two events on its stream, with nothing else there.

Arrays are allocated by CuPy, or by PyTorch where there is no CuPy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from .. import device_arrays
from . import launch, run


def timed(
    choices: Collection[Any], direction: str, operands: Mapping[str, np.ndarray]
) -> dict[str, Callable[[], float]]:
    """Return for each choice of an algorithm a function that computes, waits, and returns the seconds it took."""
    library = device_arrays.gpu_library()
    with library.current():
        given = {name: library.adopt(name, library.from_host(array)) for name, array in operands.items()}
        like = {"forward": "grad_output", "input_grad": "x", "weight_grad": "weight"}[direction]
        given["out"] = library.empty(operands[like].shape, operands[like].dtype)
    return {choice.algorithm.name: _timed(choice, direction, library, given) for choice in choices}


def _timed(choice: Any, direction: str, library: Any, given: Mapping[str, Any]) -> Callable[[], float]:
    driver = launch.driver()

    def call() -> float:
        with library.current():
            stream = launch.stream(library.stream())
            start = driver.moment(stream)
            run.compute(choice, direction, library, given, None)
            return driver.elapsed(start, driver.moment(stream))

    return call
