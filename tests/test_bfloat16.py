"""Split precision: operations on tiles, every case in every direction on emulated AMX, the code for real AMX."""

import re

import numpy as np
import pytest
from support import (
    BFLOAT16,
    DIRECTIONS,
    FIRST,
    LAST,
    LAYOUTS,
    check_conv,
    conv_problem,
    normal,
    op,
    promise,
    rng,
    run_python,
    whole,
)

import fastconv
from fastconv import config, registry, selection
from fastconv.cpu import simd, simd_bfloat16, units
from fastconv.cpu.compile import task
from fastconv.cpu.memory import address
from fastconv.cpu.simd import integers
from fastconv.cpu.simd_bfloat16 import EMULATED, PLANES, VECTORS
from fastconv.testing import CONV_CASES, ConvCase, assert_close, rms_error

ALGORITHMS = ("implicit_gemm_bf16x6", "implicit_gemm_bf16x3", "implicit_gemm_bf16")
PROMISES = {"highest": 1e-6, "high": 2e-5, "medium": 5e-3}
SAPPHIRE_RAPIDS = ",".join(
    f"+{name}"
    for name in (
        "sse4.2", "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "avx512f", "avx512bw", "avx512dq", "avx512vl",
        "avx512cd", "avx512bf16", "amx-tile", "amx-bf16",
    )
)  # fmt: skip
CASE = {case.name: case for case in CONV_CASES}

every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
has_vectors = "avx512bf16" in simd.cpu_features()


@pytest.fixture
def emulated():
    """Let split precision run on any CPU, in poisoned memory."""
    with fastconv.options(amx="emulated", poison=True):
        yield


# --- operations on tiles ---------------------------------------------------------------------------------------


def planes_of(values, count):
    """Return the planes of an array, as bfloat16: what is not finite leaves no rest."""
    planes, rest = [], values.astype("float32")
    for _ in range(count):
        planes.append(rest.astype(BFLOAT16))
        with np.errstate(invalid="ignore"):
            rest = np.where(np.isfinite(planes[0].astype("float32")), rest - planes[-1].astype("float32"), 0)
        rest = rest.astype("float32")
    return planes


def operations(products):
    NP = PLANES[products]

    @task
    def split(arguments, chunk):
        _, source, count, target, found = integers(arguments, 0, 5)
        simd.store(8, found, float(simd_bfloat16.split(NP, source, count, target, 64, 64 * NP)))

    @task
    def interleave(arguments, chunk):
        _, source, target, found = integers(arguments, 0, 4)
        simd.store(8, found, float(simd_bfloat16.interleave(NP, source, target)))

    return split, interleave


@pytest.mark.parametrize("products", PLANES)
@pytest.mark.parametrize("count", [1, 31, 32, 33, 75])
def test_numbers_are_split_into_planes_that_add_up(products, count):
    NP = PLANES[products]
    x = (normal("split", shape=(count,)) * 10.0 ** rng("split").integers(-6, 7, count)).astype("float32")
    target, found = np.full((-(-count // 32), NP, 32), 7, BFLOAT16), np.ones(1)
    operations(products)[0](1, address(x), count, address(target), address(found))
    expected = [np.pad(plane, (0, -count % 32)).reshape(-1, 32) for plane in planes_of(x, NP)]
    assert np.array_equal(target, np.stack(expected, 1))
    assert found[0] == 0
    if products == 6:
        assert np.array_equal(target.astype("float32").sum(1).ravel()[:count], x)


@pytest.mark.parametrize("products", PLANES)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, np.finfo("float32").max])
def test_what_is_not_finite_has_one_plane_and_is_reported(products, value):
    NP = PLANES[products]
    x, target, found = np.ones(40, "float32"), np.zeros((2, NP, 32), BFLOAT16), np.zeros(1)
    x[37] = value
    operations(products)[0](1, address(x), 40, address(target), address(found))
    assert found[0] == 1
    rounded = np.float32(value).astype(BFLOAT16)
    np.testing.assert_array_equal(*(number.astype("float32") for number in (target[1, 0, 5], rounded)))
    assert (target[1, 1:] == 0).all()


def test_subnormal_numbers_are_zero_in_planes():
    x = np.float32([1e-39, -1e-39, 1.2e-38, 3e38])
    target, found = np.ones((1, 1, 32), BFLOAT16), np.zeros(1)
    operations(1)[0](1, address(x), 4, address(target), address(found))
    assert np.array_equal(target[0, 0, :4], np.where(abs(x) < 1e-38, 0, x).astype(BFLOAT16))
    assert np.signbit(target[0, 0, 1])


@pytest.mark.parametrize("products", PLANES)
def test_rows_are_interleaved_in_pairs(products):
    NP = PLANES[products]
    x, target = normal("rows", shape=(32, 32), dtype="float32"), np.zeros((NP, 2, 16, 16, 2), BFLOAT16)
    operations(products)[1](1, address(x), address(target), address(np.zeros(1)))
    for plane, expected in zip(target, planes_of(x, NP)):
        assert np.array_equal(plane, expected.reshape(16, 2, 2, 16).transpose(2, 0, 3, 1))


def flushed(x):
    return np.where(np.abs(x) < np.finfo("float32").tiny, np.copysign(0, x), x).astype("float32")


def fused(a, b, c):
    """Multiply and add with one rounding: a product of bfloat16 is exact in float64, and so is nearly every sum."""
    return flushed((a.astype("float64") * b + c).astype("float32"))


def tdpbf16ps(c, a, b):
    """Return C + A B as the instruction computes it: A (rows, 16, 2), B (16, columns, 2)."""
    sums = [np.zeros(c.shape, "float32") for _ in range(2)]
    for k in range(16):
        for i in range(2):
            x, y = (flushed(v.astype("float32")) for v in (a[:, k, i, None], b[None, k, :, i]))
            sums[i] = fused(x, y, sums[i])
    return flushed(flushed(c) + flushed(sums[0] + sums[1]))


def multiply(unit, rows):
    @task
    def run(arguments, chunk):
        _, a, offsets, steps, b, out, held, add = integers(arguments, 0, 8)
        simd_bfloat16.multiply_planes(
            unit, 1, rows, a, a + held * 64, 64, 64, offsets, steps, b, out, out + held * 128, 128, held, add, 0, 0
        )

    return run


@pytest.mark.parametrize("scale", [1, 1e-19])
@pytest.mark.parametrize("held", [16, 11, 1])
@pytest.mark.parametrize("add", [0, 1])
def test_emulated_tiles_compute_what_the_instruction_does_bit_for_bit(scale, held, add):
    a = (normal("a", shape=(2, 2 * held, 16, 2)) * scale).astype(BFLOAT16)
    b = (normal("b", shape=(2, 2, 16, 16, 2)) * scale).astype(BFLOAT16)
    out = np.ones((2 * held, 32), "float32") * np.float32(scale) ** 2
    before, offsets = out.copy(), np.array([0, a[0].nbytes])
    multiply(EMULATED, 16)(1, address(a), address(offsets), 2, address(b), address(out), held, add)
    expected = np.zeros_like(out)
    for step in range(2):
        for column in range(2):
            part = np.s_[:, 16 * column : 16 * column + 16]
            expected[part] = tdpbf16ps(expected[part], a[step], b[step, column])
    assert np.array_equal(out, before + expected if add else expected)
    # Products of tiny numbers: some are flushed, and some not.
    assert (expected == 0).any() == (scale < 1)
    assert expected.any()


@pytest.mark.skipif(not has_vectors, reason="needs AVX512-BF16")
@pytest.mark.parametrize("rows", [14, 8])
def test_vectors_compute_the_same_products(rows):
    a, b = whole("a", shape=(2, 32, 16, 2), dtype=BFLOAT16), whole("b", shape=(2, 2, 16, 16, 2), dtype=BFLOAT16)
    results, offsets = [], np.array([0, a[0].nbytes])
    for unit, literal in ((EMULATED, 16), (VECTORS, rows)):
        results.append(np.zeros((32, 32), "float32"))
        run = multiply(unit, literal)
        run(1, address(a), address(offsets), 2, address(b), address(results[-1]), 16, 0)
    assert np.array_equal(results[0][:rows], results[1][:rows])
    assert (results[1][rows:] == 0).all()


# --- convolutions ----------------------------------------------------------------------------------------------

# Edges of tiles, blocks, chains and panels that the table's cases do not reach.
MORE = (
    ConvCase("33 channels and filters", (2, 33, 9, 10), (33, 33, 3, 3), padding=1),
    ConvCase("64 channels, two panels and a bit", (1, 64, 14, 14), (70, 64, 3, 3), padding=1),
    ConvCase("small images together", (9, 32, 4, 4), (32, 32, 3, 3), padding=1),
    ConvCase("one pixel each", (5, 96, 1, 1), (40, 96, 1, 1)),
    ConvCase("1x1 stride 2, 64 channels", (2, 64, 9, 11), (32, 64, 1, 1), stride=2),
    ConvCase("groups of 40 channels", (1, 80, 7, 9), (66, 40, 3, 3), padding=1, groups=2),
    ConvCase("stride 2, 40 channels", (2, 40, 13, 15), (36, 40, 3, 3), stride=2, padding=1),
    ConvCase("stride 3x2, dilation 1x3", (1, 36, 11, 12), (21, 36, 3, 2), (3, 2), 2, (1, 3)),
    ConvCase("more than a chain", (1, 640, 5, 5), (3, 640, 3, 3), padding=1),
    ConvCase("chains over tiles that overlap", (1, 5200, 1, 17), (3, 5200, 1, 1)),
    ConvCase("large image", (1, 32, 61, 67), (32, 32, 3, 3), padding=1),
    ConvCase("3d of 32 channels", (1, 32, 4, 5, 6), (34, 32, 3, 3, 2), (2, 1, 2), 1),
)


@every_algorithm
@pytest.mark.parametrize("case", CONV_CASES + MORE, ids=str)
def test_every_case_on_emulated_tiles(algorithm, case, emulated):
    for layout in LAYOUTS if case in MORE else (FIRST, LAST):
        check_conv(conv_problem(case, "float32"), layout, algorithm)


@pytest.mark.skipif(not has_vectors, reason="needs AVX512-BF16")
@pytest.mark.parametrize("case", MORE, ids=str)
def test_edges_on_vectors(case, poisoned):
    for layout in (FIRST, LAST):
        check_conv(conv_problem(case, "float32"), layout, "implicit_gemm_bf16")


def representable(*key, shape, dtype):
    return normal(*key, shape=shape).astype(BFLOAT16).astype(dtype)


@pytest.mark.parametrize("case", CONV_CASES + MORE, ids=str)
def test_operands_that_are_bfloat16_lose_nothing(case, emulated):
    p, name = conv_problem(case, "float32", representable), "conv{}d"
    if p.geometry().is_empty:
        pytest.skip("there is nothing to compute")
    how = {**p.how, "algorithm": "implicit_gemm_bf16", "precision": "medium"}
    y = op(name, case.spatial_dims)(p.x, p.weight, p.bias, **how)
    assert_close(y, p.y, reduction_length=p.lengths["forward"])
    grads = op(name + "_backward", case.spatial_dims)(p.grad, p.x, p.weight, needs=["input", "weight"], **how)
    assert_close(grads.input, p.grads[0], reduction_length=p.lengths["input_grad"])
    assert_close(grads.weight, p.grads[1], reduction_length=p.lengths["weight_grad"])


@every_algorithm
@pytest.mark.parametrize("case", MORE, ids=str)
def test_whole_numbers_come_out_exact(algorithm, case, emulated):
    p = conv_problem(case, "float32", whole)
    how = {**p.how, "algorithm": algorithm, "precision": promise(algorithm)}
    assert np.array_equal(op("conv{}d", case.spatial_dims)(p.x, p.weight, p.bias, **how), p.y)
    grads = op("conv{}d_backward", case.spatial_dims)(p.grad, p.x, p.weight, needs=["input", "weight"], **how)
    assert np.array_equal(grads.input, p.grads[0])
    assert np.array_equal(grads.weight, p.grads[1])


GEOMETRIES = (
    ConvCase("3x3, 64 channels", (2, 64, 16, 16), (64, 64, 3, 3), padding=1),
    ConvCase("3x3, 512 channels", (1, 512, 7, 7), (32, 512, 3, 3), padding=1),
    ConvCase("3x3 stride 2", (1, 128, 15, 15), (64, 128, 3, 3), stride=2, padding=1),
    ConvCase("1x1, 2048 channels", (2, 2048, 7, 7), (32, 2048, 1, 1)),
    ConvCase("first layer 7x7", (1, 3, 64, 64), (64, 3, 7, 7), stride=2, padding=3),
    ConvCase("groups", (1, 64, 12, 12), (64, 16, 3, 3), padding=1, groups=4),
    ConvCase("many pixels", (2, 32, 96, 96), (32, 32, 3, 3), padding=1),
    ConvCase("longest reduction", (1, 2048, 5, 5), (8, 2048, 3, 3), padding=1),
)


@every_algorithm
@pytest.mark.parametrize("make", [normal, lambda *key, **how: np.abs(normal(*key, **how))], ids=["normal", "positive"])
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
def test_the_promise_of_each_precision_is_kept(algorithm, case, make, emulated):
    x, weight = make("x", shape=case.x_shape, dtype="float32"), normal("w", shape=case.weight_shape, dtype="float32")
    how = {"stride": case.stride, "padding": case.padding, "groups": case.groups}
    y = exact_conv(x, weight, how)
    grad = make("grad", shape=y.shape, dtype="float32")
    how |= {"algorithm": algorithm, "precision": promise(algorithm)}
    most = PROMISES[promise(algorithm)]
    assert rms_error(fastconv.conv2d(x, weight, **how), y) <= most
    grads = fastconv.conv2d_backward(grad, x, weight, needs=["input", "weight"], **how)
    exact = {**how, "algorithm": "im2col", "precision": "highest"}
    expected = fastconv.conv2d_backward(*(a.astype("float64") for a in (grad, x, weight)), **exact)
    assert rms_error(grads.input, expected.input) <= most
    assert rms_error(grads.weight, expected.weight) <= most


def exact_conv(x, weight, how):
    return fastconv.conv2d(x.astype("float64"), weight.astype("float64"), algorithm="im2col", **how)


# --- numbers that are not finite, or tiny ----------------------------------------------------------------------


@every_algorithm
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
def test_an_infinity_comes_out_where_direct_arithmetic_puts_it(algorithm, value, layout, emulated):
    case = CASE["3x3"]
    p = conv_problem(case, "float32")
    how = {**p.how, "data_format": layout.data_format, "precision": promise(algorithm)}
    for which in ("x", "weight", "grad"):
        arrays = {"x": p.x.copy(), "weight": p.weight.copy(), "grad": p.grad.copy()}
        arrays[which][1, 2, 1, 1] = value
        # Numbers that are their own first plane: the others are zero.
        arrays["weight" if which == "x" else "x"][0, 0] = 1
        x, grad = layout.put(arrays["x"]), layout.put(arrays["grad"])
        results = []
        for name in (algorithm, "direct"):
            y = fastconv.conv2d(x, arrays["weight"], p.bias, algorithm=name, **how)
            grads = fastconv.conv2d_backward(grad, x, arrays["weight"], algorithm=name, **how)
            results.append((y, *grads))
        for actual, expected in zip(*results):
            np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected), str(which))
            np.testing.assert_array_equal(np.isposinf(actual), np.isposinf(expected), str(which))
            np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected), str(which))


@every_algorithm
def test_finite_numbers_that_bfloat16_has_not_give_finite_results(algorithm, emulated):
    x, weight = np.full((1, 4, 4, 4), np.finfo("float32").max), np.full((8, 4, 3, 3), np.float32(1e-3))
    y = fastconv.conv2d(x, weight, padding=1, algorithm=algorithm, precision=promise(algorithm))
    np.testing.assert_allclose(y, fastconv.conv2d(x, weight, padding=1, algorithm="direct"), rtol=1e-5)


@every_algorithm
@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
def test_neighbours_are_not_read_beyond_the_channels_of_a_group(algorithm, layout, emulated):
    # Ten channels a group: the other 22 of a block belong to the next.
    x, weight = normal("x", shape=(2, 30, 7, 8), dtype="float32"), normal("w", shape=(6, 10, 3, 3), dtype="float32")
    x[:, 10:20] = np.nan
    how = {"groups": 3, "padding": 1, "data_format": layout.data_format}
    y = fastconv.conv2d(layout.put(x), weight, algorithm=algorithm, precision=promise(algorithm), **how)
    assert np.array_equal(np.isnan(layout.back(y)).all(axis=(0, 2, 3)), [False, False, True, True, False, False])
    assert np.isfinite(layout.back(y)[:, [0, 1, 4, 5]]).all()


@every_algorithm
def test_tiny_magnitudes_lose_precision_and_then_vanish(algorithm, emulated):
    x, weight = normal("x", shape=(1, 32, 6, 6), dtype="float32"), normal("w", shape=(8, 32, 3, 3), dtype="float32")
    how = {"algorithm": algorithm, "precision": promise(algorithm)}
    expected = exact_conv(x, weight, {})
    # As documented: from 1e-30 on nothing is lost; results near 1e-39 are zero.
    small = fastconv.conv2d(x * np.float32(1e-29), weight, **how)
    assert rms_error(small.astype("float64") * 1e29, expected) <= PROMISES[promise(algorithm)]
    assert (fastconv.conv2d(x * np.float32(1e-20), weight * np.float32(1e-20), **how) == 0).all()


# --- what may be used where ------------------------------------------------------------------------------------


def support(algorithm, dtype="float32", direction="forward"):
    (record,) = registry.named(algorithm, "cpu")
    geometry = fastconv.ConvGeometry.create((1, 32, 8, 8), (32, 32, 3, 3), dtype=dtype)
    return record.supports(selection.lifted(geometry, "channels_first"), direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_only_float32_is_split(direction, emulated):
    for algorithm in ALGORITHMS:
        assert support(algorithm, "float32", direction).ok
        assert "float64" in support(algorithm, "float64", direction).reason


def test_the_option_forces_amx_off_and_says_so():
    with fastconv.options(amx="off"):
        for algorithm in ALGORITHMS[:2]:
            assert support(algorithm) == (False, "the option amx is off")
            # Refused with that reason, in every direction.
            check_conv(conv_problem(CASE["3x3"], "float32"), FIRST, algorithm)
        assert support(ALGORITHMS[2]).ok == has_vectors


def test_a_cpu_without_amx_is_named_as_the_reason(monkeypatch):
    monkeypatch.setattr(units, "cpu_features", lambda: frozenset({"avx2"}))
    monkeypatch.setattr(units, "instruction_set", lambda: "avx2")
    units.why_no_amx.cache_clear()
    try:
        assert "has no amx-tile and amx-bf16" in support(ALGORITHMS[0]).reason
        assert "no AVX512-BF16 either" in support(ALGORITHMS[2]).reason
    finally:
        units.why_no_amx.cache_clear()


def test_a_kernel_that_refuses_the_tile_registers_is_named_as_the_reason(monkeypatch):
    # Only Linux on such a CPU grants it: elsewhere the call fails, or is another one's number.
    monkeypatch.setattr(units, "cpu_features", lambda: frozenset({"amx-tile", "amx-bf16"}))
    monkeypatch.setattr(units, "_REQUEST_PERMISSION", -1)
    monkeypatch.setattr(units.sys, "platform", "linux")
    units.why_no_amx.cache_clear()
    try:
        assert "the kernel refuses AMX's tile registers" in units.why_no_amx()
    finally:
        units.why_no_amx.cache_clear()


CHECKED = """
import numpy as np
import fastconv
from fastconv.cpu import simd, simd_bfloat16, units

right = simd_bfloat16._EmulatedTiles.multiply
if {wrong}:
    simd_bfloat16._EmulatedTiles.multiply = lambda self, c, a, b: right(self, c, a, 6)
# Emulated tiles take the place of AMX.
units.AMX = simd_bfloat16.EMULATED
units.cpu_features = lambda: frozenset({{"amx-tile", "amx-bf16"}})
units._why_no_permission = lambda: ""
ones = np.ones((1, 32, 6, 6), "float32")
assert (fastconv.conv2d(ones, np.ones((8, 32, 3, 3), "float32")) == 288).all()
for candidate in fastconv.algorithms(fastconv.ConvGeometry.create((1, 32, 6, 6), (8, 32, 3, 3))):
    if candidate.name == "implicit_gemm_bf16x6":
        print(candidate.supported, candidate.reason)
print([note for note in fastconv.show_config(mode="dicts")["off"] if "bf16x6" in note])
with fastconv.options(amx="off"):
    print(units.unit(6))
"""


@pytest.mark.parametrize("wrong", [False, True])
def test_tiles_are_used_only_after_they_have_multiplied_rightly(wrong, tmp_path):
    printed = run_python(CHECKED.format(wrong=wrong), NUMBA_CACHE_DIR=str(tmp_path)).splitlines()
    if wrong:
        reason = "tiles of 16 rows multiply whole numbers wrongly on this machine"
        assert printed[0].startswith(f"False {reason}")
        assert reason in printed[1]
    else:
        assert printed[:2] == ["True ", "[]"]
    assert printed[2] == "(None, 'the option amx is off')"


def test_emulated_tiles_are_never_chosen_for_their_speed(emulated):
    geometry = fastconv.ConvGeometry.create((8, 64, 56, 56), (64, 64, 3, 3), padding=1)
    for precision in config.PRECISIONS:
        chosen = [c.name for c in fastconv.algorithms(geometry, precision=precision) if c.chosen]
        assert chosen
        assert chosen[0] not in ALGORITHMS


# --- code for AMX, which this machine need not have ------------------------------------------------------------

CROSS_COMPILED = """
from fastconv.cpu import bfloat16_grads, bfloat16_tasks
from fastconv.cpu.simd_bfloat16 import AMX

products = {products}
tasks = (*bfloat16_tasks.tasks(AMX, products, 16), *bfloat16_grads.grad_tasks(AMX, products, 16))
for task in tasks:
    print("TASK", task.function.__name__)
    print(task.compiled._library.get_asm_str())
"""


@pytest.mark.parametrize(("products", "loads"), [(1, 4), (3, 8), (6, 14)])
def test_the_code_for_amx_loads_each_tile_once_and_spills_nothing(products, loads, tmp_path):
    printed = run_python(
        CROSS_COMPILED.format(products=products),
        NUMBA_CPU_NAME="sapphirerapids", NUMBA_CPU_FEATURES=SAPPHIRE_RAPIDS, NUMBA_CACHE_DIR=str(tmp_path),
    )  # fmt: skip
    codes = dict(part.split("\n", 1) for part in printed.split("TASK ")[1:])
    assert set(codes) == {"pack", "gather", "reduce", "unpack"}
    for name in ("gather", "reduce"):
        code = codes[name]
        # LLVM may copy them to several paths, none of which is a loop over products.
        assert all(re.search(rf"\t{word}\b", code) for word in ("ldtilecfg", "tilerelease"))
        loops = [block for block in re.split(r"\n\.L\w+:", code) if "tdpbf16ps" in block]
        assert loops
        for loop in loops:
            assert len(re.findall(r"\ttileloadd\b", loop)) == loads
            assert len(re.findall(r"\ttdpbf16ps\b", loop)) == 4 * products
            assert not re.search("tilestored|ldtilecfg|tilerelease", loop)
            assert "%rsp" not in loop
    assert "vcvtneps2bf16" in codes["gather"]


WITHOUT_BF16_INSTRUCTIONS = """
import test_bfloat16 as tests
from fastconv.cpu import simd, simd_bfloat16

assert "avx512bf16" not in simd.cpu_features() and simd.instruction_set() == {expected!r}
tests.test_subnormal_numbers_are_zero_in_planes()
for products in simd_bfloat16.PLANES:
    tests.test_numbers_are_split_into_planes_that_add_up(products, 75)
    for value in (tests.np.inf, tests.np.nan, tests.np.finfo("float32").max):
        tests.test_what_is_not_finite_has_one_plane_and_is_reported(products, value)
tests.test_emulated_tiles_compute_what_the_instruction_does_bit_for_bit(1, 11, 0)
with tests.fastconv.options(amx="emulated"):
    tests.check_conv(tests.conv_problem(tests.MORE[0], "float32"), tests.LAST, "implicit_gemm_bf16x6")
print("done")
"""


@pytest.mark.skipif("avx2" not in simd.cpu_features(), reason="needs AVX2")
def test_other_instruction_sets_split_and_emulate_alike():
    features = "+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2"
    printed = run_python(
        WITHOUT_BF16_INSTRUCTIONS.format(expected="avx2"), NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES=features
    )
    assert printed == "done\n"


@pytest.mark.parametrize("where", ["after", "before"])
@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
@every_algorithm
def test_split_convolutions_stay_inside_their_arrays(algorithm, layout, where):
    call = f"sweep_convolutions({algorithm!r}, {layout.name!r}, {where!r})"
    printed = run_python(f"import test_guard_pages as sweeps; sweeps.{call}", FASTCONV_AMX="emulated")
    assert printed.endswith("done\n"), printed
