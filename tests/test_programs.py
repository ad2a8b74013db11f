"""Programs: a recorded call does what Python would, wherever the arrays lie, and what cannot be recorded is not."""

import gc
import os
import sys
import threading

import numpy as np
import pytest
from numba import prange
from support import normal

import fastconv
from fastconv import arrays, calls, config, registry, selection
from fastconv.cpu import implicit_gemm, memory, programs, run, workspace
from fastconv.cpu.compile import kernel, task
from fastconv.cpu.memory import address
from fastconv.cpu.simd import integer, load, store
from fastconv.geometry import DATA_FORMATS, DIRECTIONS
from fastconv.testing import CONV_CASES

IN_TASKS = [a.name for a in registry.on("cpu") if getattr(a.implementation, "IN_TASKS", False)]
# No gradient reaches some pixels, and Python writes their zeros.
SKIPS_PIXELS = {"input_grad"}


@pytest.fixture(autouse=True)
def nothing_known():
    """Start and leave without prepared calls."""
    calls.known.clear()
    yield
    calls.known.clear()


@task
def double(arguments, chunk):
    """Write twice the first number of one array to another."""
    x, y = integer(arguments, 1), integer(arguments, 2)
    store(8, y + 8 * chunk, 2 * load(8, x + 8 * chunk))


@kernel
def fill(y):
    """Write ones."""
    for i in prange(len(y)):
        y[i] = 1


def record(function):
    """Return the program of a function of two arrays of 20 numbers."""
    return programs.record(function, [((20,), np.dtype(np.float64))] * 2, result=1, whole=2)


# --- the case table --------------------------------------------------------------------------------------------


def recorded(case, direction, data_format, algorithm, dtype="float32"):
    """Return (choice, the recorded call, shapes of its factors, bias and result), or None if it is not supported."""
    geometry = fastconv.ConvGeometry.create(
        case.x_shape, case.weight_shape, case.stride, case.padding, case.dilation, case.groups, dtype=dtype
    )
    if geometry.is_empty or case.padding_mode != "zeros":
        return None
    lifted = selection.lifted(geometry, data_format)
    implementation = registry.named(algorithm, "cpu")[0]
    if not implementation.supports(lifted, direction).ok:
        return None
    choice = selection.choose(geometry, direction, data_format, "cpu", algorithm, implementation.precision)
    return choice, run._recorded(choice, direction, "relu" if direction == "forward" else None)


@pytest.mark.parametrize("algorithm", IN_TASKS)
@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_case_is_recorded_and_gives_the_same_bits(algorithm, data_format, direction, poisoned):
    count = without = 0
    for case in CONV_CASES:
        found = recorded(case, direction, data_format, algorithm)
        if found is None:
            continue
        choice, program = found
        function = run.lifted_call(choice, direction, "relu" if direction == "forward" else None)
        shapes = program._shapes
        for seed, has_bias in enumerate((True, False, True) if direction == "forward" else (False, False)):
            a, b, bias = (normal("p", case, seed, i, shape=s, dtype="float32") for i, s in enumerate(shapes[:3]))
            expected, result = (arrays.empty(shapes[3], np.float32) for _ in range(2))
            function(a, b, bias if has_bias else None, expected)
            if program(a, b, bias if has_bias else None, result):
                assert result.tobytes() == expected.tobytes(), case
                count += 1
            else:
                without += 1
    assert count > 20
    assert without == 0 or direction in SKIPS_PIXELS
    assert without <= count / 4


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("algorithm", IN_TASKS)
def test_a_program_holds_the_tables_that_its_tasks_read(algorithm, direction):
    every = (recorded(case, direction, "channels_first", algorithm) for case in CONV_CASES)
    _, program = next(found for found in every if found is not None)
    a, b = (normal("p", i, shape=s, dtype="float32") for i, s in enumerate(program._shapes[:2]))
    before, after = (np.empty(program._shapes[3], np.float32) for _ in range(2))
    assert program(a, b, None, before)
    # Whoever else holds them forgets them, and their memory is written over.
    for module in [m for name, m in sys.modules.items() if name.startswith("fastconv.cpu")]:
        for value in vars(module).values():
            if hasattr(value, "cache_clear") and value.__module__.startswith("fastconv.cpu"):
                value.cache_clear()
    gc.collect()
    litter = [np.full(size, -1, np.int64) for size in range(1, 2000, 7)]
    assert program(a, b, None, after)
    assert litter
    assert after.tobytes() == before.tobytes()


def test_results_that_do_not_begin_a_cache_line_are_right_too():
    x, w = normal("x", shape=(1, 64, 192, 192), dtype="float32"), normal("w", shape=(64, 64, 3, 3), dtype="float32")
    x_last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    choice = selection.choose(
        fastconv.ConvGeometry.create(x.shape, w.shape, padding=1, dtype="float32"),
        "forward", "channels_last", "cpu", "implicit_gemm", "highest",
    )  # fmt: skip
    program = run._recorded(choice, "forward", None)
    room = np.empty(x_last.nbytes // 4 + 32, np.float32)
    at = -address(room) % 64 // 4
    results = [room[at + shift :][: x_last.size].reshape(x_last.shape) for shift in (0, 4)]
    assert program.program(False).aligned
    assert program(x_last, w, None, results[0])
    first = results[0].copy()
    # Nontemporal stores want whole cache lines: the program is not for this one.
    assert not program(x_last, w, None, results[1])
    run.lifted_call(choice, "forward", None)(x_last, w, None, results[1])
    assert results[1].tobytes() == first.tobytes()


def test_threads_and_workspace_are_those_of_the_call():
    x, w = normal("x", shape=(2, 8, 20, 20), dtype="float32"), normal("w", shape=(8, 8, 3, 3), dtype="float32")
    with config.options(threads=1):
        one = [fastconv.conv2d(x, w, algorithm="winograd_f2x3") for _ in range(3)]
    two = [fastconv.conv2d(x, w, algorithm="winograd_f2x3") for _ in range(3)]
    with config.options(poison=True):
        poisoned = [fastconv.conv2d(x, w, algorithm="winograd_f2x3") for _ in range(3)]
    assert len({y.tobytes() for y in (*one, *two, *poisoned)}) == 1


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("count", [3, workspace.KEPT_BYTES])
def test_every_buffer_of_a_workspace_begins_a_cache_line(count, poison):
    buffers = {name: registry.Buffer((n,), np.dtype(np.uint8)) for name, n in (("a", 5), ("b", count), ("c", 7))}
    layout = workspace.layout_of(buffers)
    with config.options(poison=poison), workspace.lend_addresses(layout) as places:
        assert [place % 64 for place in places] == [0, 0, 0]
        ends = [place + b.nbytes for place, b in zip(places, buffers.values())]
        assert all(end <= place for end, place in zip(ends, places[1:]))


def test_threads_record_and_run_side_by_side():
    x = normal("x", shape=(2, 8, 20, 20), dtype="float32")
    weights = [normal("w", i, shape=(8 + i, 8, 3, 3), dtype="float32") for i in range(8)]
    expected = [fastconv.conv2d(x, w, algorithm="implicit_gemm") for w in weights]
    calls.known.clear()
    wrong = []

    def work(order):
        for i in order:
            if fastconv.conv2d(x, weights[i], algorithm="implicit_gemm").tobytes() != expected[i].tobytes():
                wrong.append(i)

    order = [i % 8 for i in range(80)]
    workers = [threading.Thread(target=work, args=(order[shift:] + order[:shift],)) for shift in (0, 3, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def interrupted(monkeypatch, intrude):
    """Record a convolution, and call a function the first time that its algorithm takes an address."""
    x, w = normal("x", shape=(1, 8, 12, 12), dtype="float32"), normal("w", shape=(8, 8, 3, 3), dtype="float32")
    original, calls_made = implicit_gemm._aligned, []

    def aligned(place):
        if programs._lock.locked() and not calls_made:
            calls_made.append(1)
            intrude(x, w)
        return original(place)

    monkeypatch.setattr(implicit_gemm, "_aligned", aligned)
    results = [fastconv.conv2d(x, w, algorithm="implicit_gemm") for _ in range(3)]
    assert calls_made
    assert len({y.tobytes() for y in results}) == 1


@pytest.mark.parametrize("times", [1, 3])
def test_a_signal_s_handler_computes_while_a_call_is_recorded(times, monkeypatch):
    found, other = [], normal("other", shape=(4, 8, 3, 3), dtype="float32")

    def intrude(x, w):
        found.extend(fastconv.conv2d(x, other, algorithm="implicit_gemm") for _ in range(times))

    interrupted(monkeypatch, intrude)
    x = normal("x", shape=(1, 8, 12, 12), dtype="float32")
    assert {y.tobytes() for y in found} == {fastconv.conv2d(x, other, algorithm="implicit_gemm").tobytes()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_while_a_call_is_recorded_records_anew(monkeypatch):
    status = []

    def intrude(x, w):
        child = os.fork()
        if child == 0:
            calls.known.clear()
            bits = {fastconv.conv2d(x, w[:4].copy(), algorithm="implicit_gemm").tobytes() for _ in range(3)}
            free = not programs._lock.locked() and memory.addressed is None
            os._exit(0 if len(bits) == 1 and free else 1)
        status.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    interrupted(monkeypatch, intrude)
    assert status == [0]


def test_without_memory_to_record_in_a_call_is_carried_out(monkeypatch):
    def refuse(*args):
        raise MemoryError

    monkeypatch.setattr(programs, "_moves", refuse)
    x, w = normal("x", shape=(1, 8, 12, 12), dtype="float32"), normal("w", shape=(8, 8, 3, 3), dtype="float32")
    assert len({fastconv.conv2d(x, w, algorithm="implicit_gemm").tobytes() for _ in range(3)}) == 1


# --- what can be recorded --------------------------------------------------------------------------------------


def test_addresses_move_with_their_arrays():
    def function(operands):
        x, y = operands
        double(3, address(x) + 8 * 2, address(y) + 8)
        double(1, address(y) + 8, address(y))

    program = record(function)
    assert (program.steps, len(program.moves), program.aligned) == (2, 4, False)
    for _ in range(2):
        x, y = np.arange(20.0), np.zeros(20)
        program.run(address(x), address(y))
        assert y[:5].tolist() == [8, 4, 6, 8, 0]


def test_no_task_at_all_is_a_program_too():
    record(lambda operands: None).run(0, 0)


def test_what_python_writes_or_a_kernel_does_is_in_no_program():
    assert record(lambda operands: operands[1].fill(0)) is None
    assert record(lambda operands: np.add(operands[0], 1, out=operands[1])) is None
    assert record(lambda operands: fill(operands[1])) is None


def test_numbers_made_of_addresses_are_in_no_program():
    assert record(lambda operands: double(1, address(operands[0]) * 2, address(operands[1]))) is None
    assert record(lambda operands: double(1 + address(operands[0]) % 7, 0, 0)) is None
    # A table that each call makes anew.
    assert record(lambda operands: double(1, address(np.ones(20)), address(operands[1]))) is None


def test_numbers_that_say_how_an_array_lies_hold_for_such_arrays():
    assert record(lambda operands: double(1, address(operands[1]), address(operands[1]) % 64)).aligned
    assert record(lambda operands: double(1, address(operands[1]), address(operands[0]) % 64)) is None


def test_an_error_is_the_caller_s_and_leaves_nothing_behind():
    def function(operands):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        record(function)
    y = np.zeros(3)
    fill(y)
    assert y.tolist() == [1, 1, 1]
