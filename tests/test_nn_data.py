"""Data sets, and the example that trains on them."""

import gzip
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastconv
from fastconv import nn
from fastconv.nn import datasets

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "02_train_mnist.py"


def idx(array):
    code = {"uint8": 8, "int8": 9, "int16": 11, "int32": 12, "float32": 13, "float64": 14}[array.dtype.name]
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_mnist(directory, n=12, compress=True):
    directory.mkdir(parents=True, exist_ok=True)
    x, y = datasets.synthetic_digits(n, seed=0)
    for name in datasets.MNIST_FILES:
        content = idx(x if "images" in name else y)
        path = directory / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(content) if compress else content)
    return x, y


def run_example(*arguments, **environment):
    values = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive", **environment}
    command = [sys.executable, "-W", "error", str(EXAMPLE), *map(str, arguments)]
    return subprocess.run(command, env=values, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "float32", "float64"])
@pytest.mark.parametrize("compress", [True, False])
def test_idx_files_of_every_type_are_read(tmp_path, dtype, compress):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(idx(array)) if compress else idx(array))
    found = datasets.read_idx(path)
    np.testing.assert_array_equal(found, array)
    assert found.dtype == dtype
    assert found.flags.writeable


@pytest.mark.parametrize(("content", "message"), [
    (b"GIF89a", r"file is not an IDX file: it begins with b'GIF8'"),
    (b"", "file is not an IDX file"),
    (b"\0\0\x08\x03\0\0\0\x02", "file is cut short within its header"),
    (idx(np.zeros((2, 3), np.uint8))[:-1], r"file should hold 6 bytes of elements \(2, 3\), not 5"),
    (gzip.compress(b"\0\0\x08\x01" + bytes(200), mtime=0)[:-12], "file is damaged"),
])  # fmt: skip
def test_files_that_are_not_idx_are_refused(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(fastconv.ArgumentError, match=message):
        datasets.read_idx(path)


@pytest.mark.parametrize("compress", [True, False])
def test_mnist_is_read_from_its_four_files(tmp_path, compress):
    x, y = write_mnist(tmp_path, compress=compress)
    (x_train, y_train), (x_test, y_test) = nn.datasets.load_mnist(tmp_path)
    np.testing.assert_array_equal(x_train, x)
    np.testing.assert_array_equal(y_test, y)
    assert x_test.dtype == y_train.dtype == np.uint8


def test_missing_and_mismatched_files_are_named(tmp_path):
    write_mnist(tmp_path, compress=False)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, np.uint8)))
    with pytest.raises(fastconv.ArgumentError, match=r"images \(12, 28, 28\) and labels \(3,\), which do not fit"):
        datasets.load_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").unlink()
    with pytest.raises(datasets.DataNotFoundError, match=r"lacks train-images-idx3-ubyte \(each may end in .gz\)"):
        datasets.load_mnist(tmp_path)


def test_data_is_found_where_it_is_named_in_the_environment_or_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTCONV_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match=r"There is no mnist data(.|\n)*train-labels-idx1-ubyte.gz"):
        datasets.find_mnist()
    write_mnist(tmp_path / "cache" / "fastconv" / "mnist", 2)
    assert datasets.find_mnist() == tmp_path / "cache" / "fastconv" / "mnist"
    write_mnist(tmp_path / "data" / "fashion-mnist", 2)
    monkeypatch.setenv("FASTCONV_DATA", str(tmp_path / "data"))
    assert datasets.find_mnist(name="fashion-mnist") == tmp_path / "data" / "fashion-mnist"
    assert datasets.find_mnist() == tmp_path / "cache" / "fastconv" / "mnist"
    assert datasets.find_mnist(tmp_path / "data" / "fashion-mnist") == tmp_path / "data" / "fashion-mnist"
    with pytest.raises(datasets.DataNotFoundError, match="There is no mnist data"):
        datasets.find_mnist(tmp_path / "data")


def test_drawn_digits_depend_on_their_seed_alone_and_look_like_mnist():
    x, y = datasets.synthetic_digits(300, seed=4)
    again, _ = datasets.synthetic_digits(300, seed=4)
    other, _ = datasets.synthetic_digits(300, seed=5)
    np.testing.assert_array_equal(x, again)
    assert (x != other).any()
    assert x.dtype == y.dtype == np.uint8
    assert set(y) == set(range(10))
    # Strokes on a dark ground: MNIST's mean is 33.
    assert 15 < x.mean() < 60
    assert x[:, 0].mean() < 10
    assert datasets.synthetic_digits(3, seed=0, size=16)[0].shape == (3, 16, 16)
    assert datasets.synthetic_digits(0)[0].shape == (0, 28, 28)


def test_the_example_trains_on_drawn_digits():
    done = run_example("--synthetic", "--limit", 192, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    assert "Total params: 93,322" in done.stdout
    assert re.search(r"epoch 1/1  .* images/s  loss .* accuracy", done.stdout)
    assert re.search(r"Test accuracy 0\.\d{4}, .* on 200 images", done.stdout)
    assert done.stderr == ""


def test_the_example_says_what_to_do_without_data(tmp_path):
    done = run_example("--data", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for part in (*datasets.MNIST_FILES, "nowhere/mnist", "--synthetic", "http"):
        assert part in done.stderr


def test_the_networks_of_the_example_have_the_lectures_parameters():
    import runpy

    example = runpy.run_path(str(EXAMPLE))
    assert nn.summary(example["mnist_network"]("auto", None), (1, 28, 28)).total_params == 93_322
    table = nn.summary(example["fashion_network"]("auto", None), (1, 28, 28))
    assert table.total_params == 1_413_834
    assert [row.output_shape for row in table.rows if row.type == "MaxPool2d"] == [
        (64, 14, 14),
        (128, 7, 7),
        (256, 3, 3),
    ]


@pytest.mark.data
def test_the_example_reaches_its_accuracy_on_a_part_of_mnist():
    directory = os.environ.get("FASTCONV_DATA")
    if not directory:
        pytest.skip("FASTCONV_DATA does not name a directory with mnist/ in it")
    done = run_example("--data", directory, "--limit", 6000, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    accuracy = float(re.search(r"Test accuracy (\S+),", done.stdout)[1])
    assert accuracy > 0.85
