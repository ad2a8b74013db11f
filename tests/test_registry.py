"""Adding an algorithm takes one module and one record."""

import itertools
import math
import sys
import types

import numpy as np
import pytest

import fastconv
from fastconv import reference, registry
from fastconv.geometry import ConvGeometry
from fastconv.registry import Algorithm, Buffer
from fastconv.testing import assert_close

# --- an algorithm in fifteen lines: the oracle on lifted arrays --------------------------------------------------


def supports(geometry, direction):
    return (True, "") if geometry.kernel_size[2] % 2 else (False, "the toy has odd kernels only")


def workspace(geometry, direction, limit):
    return {"scratch": Buffer((5,), np.dtype(np.float64))}


def seconds(geometry, direction, threads):
    return 0.0


def _how(g):
    names = ("stride", "padding", "dilation", "groups", "data_format")
    return {name: getattr(g, name) for name in names}


def forward(geometry, x, weight, bias, activation, out, workspace):
    assert workspace["scratch"].shape == (5,)
    out[...] = reference.conv(x, weight, bias, **_how(geometry), activation=activation)


def input_grad(geometry, grad_output, weight, out, workspace):
    out[...] = reference.conv_backward(grad_output, np.zeros(geometry.x_shape), weight, **_how(geometry))[0]


def weight_grad(geometry, grad_output, x, out, workspace):
    out[...] = reference.conv_backward(grad_output, x, np.zeros(geometry.weight_shape), **_how(geometry))[1]


# ---------------------------------------------------------------------------------------------------------------

GEOMETRY = ConvGeometry.create((2, 4, 6, 7), (6, 2, 3, 3), 1, 1, 1, 2)


# A record is known by its fields: another implementation needs another module.
_numbers = itertools.count()


def register_toy(monkeypatch, name="toy", **changes):
    here = sys.modules[__name__]
    module = types.ModuleType(f"toy_module_{next(_numbers)}")
    for function in ("supports", "workspace", "seconds", "forward", "input_grad", "weight_grad"):
        setattr(module, function, changes.get(function, getattr(here, function)))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    registry.register(Algorithm(name, "cpu", module.__name__, changes.get("precision", "highest")))


@pytest.fixture
def toy(monkeypatch):
    register_toy(monkeypatch)
    yield
    registry.unregister("toy", "cpu")


def operands(kernel=3):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 4, 6, 7)), rng.standard_normal((6, 2, kernel, kernel))
    return x, weight, rng.standard_normal(6)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("algorithm", ["toy", "auto"])
def test_a_new_algorithm_is_called_by_name_and_by_auto_when_it_is_fastest(algorithm, data_format):
    x, weight, bias = operands()
    if data_format == "channels_last":
        x = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    how = {"padding": 1, "groups": 2, "data_format": data_format}
    expected = reference.conv(x, weight, bias, **how, activation="relu")
    y = fastconv.conv2d(x, weight, bias, **how, activation="relu", algorithm=algorithm)
    # The very bits of the oracle: no other algorithm has them.
    assert np.array_equal(y, expected)
    grads = fastconv.conv2d_backward(y, x, weight, **how, algorithm=algorithm)
    wanted = reference.conv_backward(y, x, weight, **how)
    assert np.array_equal(grads.input, wanted[0])
    assert np.array_equal(grads.weight, wanted[1])


@pytest.mark.usefixtures("toy")
def test_a_new_algorithm_serves_one_and_three_dimensions_half_types_and_transposed_convolutions():
    x, weight = np.ones((1, 2, 9)), np.ones((3, 2, 3))
    assert np.array_equal(fastconv.conv1d(x, weight, algorithm="toy"), reference.conv(x, weight))
    x, weight = np.ones((1, 2, 3, 4, 5), "float16"), np.ones((3, 2, 1, 2, 3), "float16")
    y = fastconv.conv3d(x, weight, algorithm="toy", padding=1, padding_mode="replicate")
    assert y.dtype == np.float16
    assert_close(y, reference.conv(x, weight, padding=1, padding_mode="replicate"))
    x, weight, _ = operands()
    y = fastconv.conv_transpose2d(x, weight[:4], stride=2, algorithm="toy")
    assert_close(y, reference.conv_transpose(x, weight[:4], stride=2))


@pytest.mark.parametrize(
    ("device", "there", "absent"),
    [("cpu", "direct_small", "implicit_gemm_tf32"), ("cuda", "implicit_gemm_tf32", "direct_small")],
)
def test_the_error_for_an_unknown_name_lists_those_of_the_device(device, there, absent):
    with pytest.raises(fastconv.ArgumentError, match="algorithm must be one of 'auto', 'tune', ") as error:
        registry.named("dirct", device)
    assert repr(there) in str(error.value)
    assert repr(absent) not in str(error.value)


@pytest.mark.usefixtures("toy")
def test_a_new_algorithm_is_listed_and_explained():
    (row,) = [c for c in fastconv.algorithms(GEOMETRY) if c.name == "toy"]
    assert (row.supported, row.reason, row.workspace_bytes, row.seconds, row.chosen) == (True, "", 40, 0.0, True)
    assert sum(c.chosen for c in fastconv.algorithms(GEOMETRY)) == 1
    table = fastconv.explain(GEOMETRY)
    (line,) = [line for line in table.splitlines() if line.startswith("toy ")]
    assert line.split() == ["toy", "40", "B", "0.000", "ms", "-", "<-", "auto"]


@pytest.mark.usefixtures("toy")
def test_what_a_new_algorithm_refuses_is_refused_by_name_and_left_to_others_by_auto():
    x, weight, bias = operands(kernel=2)
    message = "algorithm='toy' cannot compute this forward: toy: the toy has odd kernels only"
    with pytest.raises(fastconv.UnsupportedError, match=message):
        fastconv.conv2d(x, weight, bias, groups=2, algorithm="toy")
    expected = reference.conv(x, weight, bias, groups=2)
    assert_close(fastconv.conv2d(x, weight, bias, groups=2), expected, reduction_length=9)
    even = ConvGeometry.create((2, 4, 6, 7), (6, 2, 2, 2), groups=2)
    (row,) = [c for c in fastconv.algorithms(even) if c.name == "toy"]
    assert (row.supported, row.reason, row.chosen) == (False, "the toy has odd kernels only", False)


def test_a_slow_algorithm_is_not_taken(monkeypatch):
    register_toy(monkeypatch, seconds=lambda geometry, direction, threads: math.inf)
    try:
        assert [c.name for c in fastconv.algorithms(GEOMETRY) if c.chosen] != ["toy"]
    finally:
        registry.unregister("toy", "cpu")


def test_an_algorithm_that_rounds_more_is_left_out_unless_the_precision_allows_it(monkeypatch):
    register_toy(monkeypatch, precision="high")
    try:
        x, weight, bias = (a.astype("float32") for a in operands())
        assert [c.name for c in fastconv.algorithms(GEOMETRY) if c.chosen] != ["toy"]
        assert [c.name for c in fastconv.algorithms(GEOMETRY, precision="high") if c.chosen] == ["toy"]
        assert [c.name for c in fastconv.algorithms(GEOMETRY, precision="medium") if c.chosen] == ["toy"]
        with pytest.raises(fastconv.UnsupportedError, match="keep the promise of precision='high', not of 'highest'"):
            fastconv.conv2d(x, weight, bias, groups=2, algorithm="toy")
        fastconv.conv2d(x, weight, bias, groups=2, algorithm="toy", precision="high")
        with fastconv.options(precision="medium"):
            fastconv.conv2d(x, weight, bias, groups=2, algorithm="toy")
        # The levels are about float32.
        fastconv.conv2d(*operands(), groups=2, algorithm="toy")
    finally:
        registry.unregister("toy", "cpu")


def test_a_family_stands_for_its_variants(monkeypatch):
    names = ("winograd_toy_a", "winograd_toy_b")
    for name, time in zip(names, (2e-9, 1e-9)):
        register_toy(monkeypatch, name, seconds=lambda *_, time=time: time)
    try:
        assert set(names) <= {a.name for a in registry.named("winograd", "cpu")}
        assert {a.family for a in registry.named("winograd", "cpu")} == {"winograd"}
        x, weight, bias = operands()
        y = fastconv.conv2d(x, weight, bias, groups=2, algorithm="winograd", precision="medium")
        assert np.array_equal(y, reference.conv(x, weight, bias, groups=2))
        assert [c.name for c in fastconv.algorithms(GEOMETRY) if c.chosen] == ["winograd_toy_b"]
    finally:
        for name in names:
            registry.unregister(name, "cpu")


def test_after_unregistering_nothing_is_left(monkeypatch):
    register_toy(monkeypatch)
    registry.unregister("toy", "cpu")
    registry.unregister("toy", "cpu")
    assert "toy" not in {a.name for a in registry.on("cpu")}
    x, weight, bias = operands()
    known = r"algorithm must be one of 'auto', 'tune', 'direct', .*, not 'toy'"
    with pytest.raises(fastconv.ArgumentError, match=known):
        fastconv.conv2d(x, weight, bias, groups=2, algorithm="toy")
    fastconv.conv2d(x, weight, bias, groups=2)


def test_a_record_replaces_one_of_the_same_name(monkeypatch):
    register_toy(monkeypatch)
    register_toy(monkeypatch, seconds=lambda *_: 3.0)
    try:
        (record,) = registry.named("toy", "cpu")
        assert record.seconds(GEOMETRY, "forward", 1) == 3.0
        assert len([a for a in registry.on("cpu") if a.name == "toy"]) == 1
    finally:
        registry.unregister("toy", "cpu")


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_a_family_without_an_algorithm_here_is_unsupported_and_not_unknown(family):
    x, weight, bias = operands()
    if registry.named(family, "cpu"):
        pytest.skip(f"the CPU has {family}")
    with pytest.raises(
        fastconv.UnsupportedError, match=f"algorithm='{family}' .* there is no such algorithm on the cpu"
    ):
        fastconv.conv2d(x, weight, bias, groups=2, algorithm=family)


@pytest.mark.parametrize("name", [None, 3, ["direct"]])
def test_an_algorithm_is_named_by_a_string(name):
    x, weight, bias = operands()
    with pytest.raises(fastconv.ArgumentTypeError, match="algorithm must be a string, not"):
        fastconv.conv2d(x, weight, bias, groups=2, algorithm=name)


@pytest.mark.parametrize("record", registry.on("cpu"), ids=lambda r: r.name)
def test_every_record_is_complete(record):
    assert record.family in registry.FAMILIES
    module = record.implementation
    assert module.__doc__
    for name in ("supports", "workspace", "seconds", "forward", "input_grad", "weight_grad"):
        assert getattr(module, name).__doc__, f"{record.name}.{name} has no docstring"
