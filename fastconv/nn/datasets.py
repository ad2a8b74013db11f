"""Images to train on: MNIST's files, and digits drawn on the spot for when there are none."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError, FastconvError
from ..geometry import integer
from .rng import generator

Split = tuple[np.ndarray, np.ndarray]

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
MNIST_SOURCES = {
    "mnist": "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "fashion-mnist": "https://github.com/zalandoresearch/fashion-mnist/tree/master/data/fashion",
}
_IDX_DTYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


class DataNotFoundError(FastconvError, FileNotFoundError):
    """Files of a data set are not where they were looked for; the message says what goes where."""


def read_idx(path: Any) -> np.ndarray:
    """Read an IDX file, plain or compressed with gzip (LeCun, Cortes & Burges, "The MNIST database").

    Two zero bytes, a type code, the number of dimensions, each as a big-endian 32-bit integer, then the elements.

    Raises
    ------
    ArgumentError
        If the file is not IDX, or is cut short.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (EOFError, OSError, zlib.error) as error:
        raise ArgumentError(f"{path} is damaged: {error}") from None
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_DTYPES:
        raise ArgumentError(f"{path} is not an IDX file: it begins with {data[:4]!r}")
    dtype, rank = np.dtype(_IDX_DTYPES[data[2]]), data[3]
    start = 4 + 4 * rank
    if len(data) < start:
        raise ArgumentError(f"{path} is cut short within its header")
    shape = struct.unpack(f">{rank}I", data[4:start])
    expected = math.prod(shape) * dtype.itemsize
    if len(data) - start != expected:
        raise ArgumentError(f"{path} should hold {expected} bytes of elements {shape}, not {len(data) - start}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def load_mnist(directory: Any) -> tuple[Split, Split]:
    """Read MNIST, or any data set in the same four files, from a directory.

    Parameters
    ----------
    directory : str or path
        With train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte,
        each plain or with .gz behind.

    Returns
    -------
    (x_train, y_train), (x_test, y_test)
        uint8: images (N, 28, 28) and labels (N,).

    Raises
    ------
    DataNotFoundError
        Naming the files that are missing.
    """
    directory = Path(directory)
    paths = [_file(directory, name) for name in MNIST_FILES]
    missing = [name for name, path in zip(MNIST_FILES, paths) if path is None]
    if missing:
        raise DataNotFoundError(f"{directory} lacks {', '.join(missing)} (each may end in .gz)")
    x_train, y_train, x_test, y_test = (read_idx(path) for path in paths)
    for images, labels in ((x_train, y_train), (x_test, y_test)):
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ArgumentError(f"{directory} has images {images.shape} and labels {labels.shape}, which do not fit")
    return (x_train, y_train), (x_test, y_test)


def find_mnist(directory: Any = None, name: str = "mnist") -> Path:
    """Return the directory that holds the four files.

    Parameters
    ----------
    directory : str or path, optional
        Looked at, itself and its subdirectory `name`. Unless given: the environment variable FASTCONV_DATA in the
        same way, then ~/.cache/fastconv.
    name : "mnist" or "fashion-mnist"

    Raises
    ------
    DataNotFoundError
        Saying where it looked and how to get the files.
    """
    if directory is not None:
        roots = [Path(directory).expanduser()]
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastconv"
        roots = [*([Path(os.environ["FASTCONV_DATA"])] if os.environ.get("FASTCONV_DATA") else []), cache]
    # A root's own files may be those of another data set: the subdirectory goes first.
    places = [place for root in roots for place in (root / name, root)]
    for place in places:
        if all(_file(place, file) is not None for file in MNIST_FILES):
            return place
    files = "\n".join(f"  {file}.gz" for file in MNIST_FILES)
    raise DataNotFoundError(
        f"There is no {name} data in {' or '.join(map(str, places))}.\n"
        f"Put these four files (with or without .gz) into {places[0]}:\n{files}\n"
        f"They are at {MNIST_SOURCES.get(name, MNIST_SOURCES['mnist'])}"
    )


def _file(directory: Path, name: str) -> Path | None:
    return next((path for path in (directory / name, directory / f"{name}.gz") if path.is_file()), None)


def _arc(x: float, y: float, width: float, height: float, start: float, end: float) -> list[tuple[float, float]]:
    """Points of an ellipse's arc, angles in degrees clockwise from three o'clock."""
    angles = np.radians(np.linspace(start, end, 9))
    return [(x + width * math.cos(a), y + height * math.sin(a)) for a in angles]


# Strokes of each digit in a box from -1 to 1, y downwards.
_STROKES: tuple[list[list[tuple[float, float]]], ...] = (
    [_arc(0, 0, 0.6, 1, 0, 180), _arc(0, 0, 0.6, 1, 180, 360)],
    [[(-0.35, -0.6), (0.05, -1), (0.05, 1)]],
    [[*_arc(0, -0.45, 0.6, 0.55, 180, 390), (-0.6, 1), (0.65, 1)]],
    [_arc(-0.05, -0.5, 0.55, 0.5, 200, 450), _arc(-0.05, 0.5, 0.65, 0.5, 270, 520)],
    [[(0.25, 1), (0.25, -1), (-0.65, 0.35), (0.65, 0.35)]],
    [[(0.55, -1), (-0.45, -1), (-0.5, -0.1)], _arc(-0.05, 0.35, 0.6, 0.6, 220, 510)],
    [[(0.4, -1), (-0.35, -0.2), (-0.55, 0.4)], _arc(0, 0.45, 0.55, 0.55, 0, 180), _arc(0, 0.45, 0.55, 0.55, 180, 360)],
    [[(-0.6, -1), (0.6, -1), (-0.15, 1)]],
    [
        _arc(0, -0.5, 0.5, 0.48, 0, 180),
        _arc(0, -0.5, 0.5, 0.48, 180, 360),
        _arc(0, 0.48, 0.6, 0.5, 0, 180),
        _arc(0, 0.48, 0.6, 0.5, 180, 360),
    ],
    [[(0.55, -0.4), (0.45, 0.3), (0.1, 1)], _arc(0, -0.45, 0.55, 0.55, 0, 180), _arc(0, -0.45, 0.55, 0.55, 180, 360)],
)


def synthetic_digits(n: int, seed: Any = 0, size: int = 28) -> Split:
    """Draw digits with strokes of random width under random shifts, scales, turns and slants, and noise.

    Parameters
    ----------
    n : int
    seed : int or numpy.random.Generator
    size : int
        Height and width.

    Returns
    -------
    images : uint8 array (n, size, size)
        As MNIST's: strokes of up to 255 on 0.
    labels : uint8 array (n,)

    Examples
    --------
    >>> images, labels = synthetic_digits(100)
    >>> images.shape, images.dtype.name, sorted(set(labels.tolist())) == list(range(10))
    ((100, 28, 28), 'uint8', True)
    """
    n, size = integer("n", n, 0), integer("size", size, 8)
    rng = generator(seed)
    labels = rng.integers(0, 10, n).astype(np.uint8)
    images = np.empty((n, size, size), np.uint8)
    for digit in range(10):
        rows = np.flatnonzero(labels == digit)
        images[rows] = _drawn(_STROKES[digit], len(rows), size, rng)
    return images, labels


def _drawn(strokes: list[list[tuple[float, float]]], n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return n pictures of one digit: brightness falls off with the distance to the nearest stroke."""
    scale = rng.uniform(0.58, 0.75, (n, 1, 2))
    turn, slant = rng.uniform(-0.2, 0.2, n), rng.uniform(-0.25, 0.25, n)
    shift = rng.uniform(-0.15, 0.15, (n, 1, 2))
    c, s = np.cos(turn), np.sin(turn)
    # (N, 2, 2): a slant, then a turn.
    matrix = np.stack([np.stack([c, slant * c - s], 1), np.stack([s, slant * s + c], 1)], 1)
    axis = (np.arange(size) + 0.5) * (2 / size) - 1
    pixels = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(1, -1, 2)
    nearest = np.full((n, size * size), np.inf)
    for stroke in strokes:
        # (N, points, 2)
        points = (np.array(stroke)[None] * scale) @ matrix.transpose(0, 2, 1) + shift
        for a, b in zip(points.swapaxes(0, 1)[:-1], points.swapaxes(0, 1)[1:]):
            np.minimum(nearest, _squared_distance(pixels, a[:, None], b[:, None]), out=nearest)
    width = rng.uniform(0.05, 0.11, (n, 1))
    ink = np.clip(1 - (np.sqrt(nearest) - width) * (size / 2.5), 0, 1) * rng.uniform(0.75, 1, (n, 1))
    noisy = ink + rng.normal(0, 0.06, ink.shape)
    return (np.clip(noisy, 0, 1) * 255).astype(np.uint8).reshape(n, size, size)


def _squared_distance(pixels: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the squared distance of pixels (1, L, 2) to line segments from a to b (N, 1, 2) as (N, L)."""
    along = b - a
    t = ((pixels - a) * along).sum(-1) / np.maximum((along * along).sum(-1), 1e-12)
    gap = pixels - a - np.clip(t, 0, 1)[..., None] * along
    return np.square(gap).sum(-1)
