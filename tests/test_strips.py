"""Moving pixels: transposes in registers, strips, blocks and panels, against NumPy."""

from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest

from fastconv.cpu.compile import task
from fastconv.cpu.memory import address
from fastconv.cpu.simd import integers, tile_for, transpose_block
from fastconv.cpu.strips import pack_table, strips

SIZES = {4: np.float32, 8: np.float64}


@lru_cache(maxsize=4)
def tasks(itemsize):
    tile = tile_for(itemsize)
    LANES, SIZE = tile.lanes, itemsize
    _, copy_, _, emit_, pack_, unpack_ = strips(tile, itemsize)

    @task
    def transpose(arguments, chunk):
        _, source, source_row, rows, columns, target, target_row = integers(arguments, 0, 7)
        transpose_block(LANES, SIZE, source, source_row, rows, columns, target, target_row)

    @task
    def copy(arguments, chunk):
        _, target, pixel, source, count, C, channel, step = integers(arguments, 0, 8)
        copy_(target, pixel, source, count, C, channel, step)

    @task
    def emit(arguments, chunk):
        _, block, target, channel, step, used, count = integers(arguments, 0, 7)
        emit_(block, target, channel, step, used, count)

    @task
    def pack(arguments, chunk):
        _, panel, weight, filter_, channel, inner, taps, used = integers(arguments, 0, 8)
        table, transposed = integers(arguments, 8, 2)
        pack_(panel, weight, filter_, channel, inner, taps, used, table, transposed)

    @task
    def unpack(arguments, chunk):
        _, panel, weight, filter_, channel, C, taps, used = integers(arguments, 0, 8)
        unpack_(panel, weight, filter_, channel, C, taps, used)

    return tile, SimpleNamespace(transpose=transpose, copy=copy, emit=emit, pack=pack, unpack=unpack)


every_size = pytest.mark.parametrize("itemsize", SIZES)


def numbers(itemsize, *shape):
    return np.arange(1, 1 + np.prod(shape), dtype=SIZES[itemsize]).reshape(shape)


@every_size
def test_part_of_a_block_changes_rows_with_columns_and_nothing_else(itemsize):
    tile, run = tasks(itemsize)
    lanes = tile.lanes
    source = numbers(itemsize, lanes, lanes + 3)
    for rows in (1, lanes // 2, lanes - 1, lanes, lanes + 5):
        for columns in (1, lanes // 2, lanes, lanes + 2):
            target = np.full((lanes + 1, lanes + 2), -1, source.dtype)
            run.transpose(1, address(source), source.strides[0], rows, columns, address(target), target.strides[0])
            expected = np.full_like(target, -1)
            i, j = min(rows, lanes), min(columns, lanes)
            expected[:j, :i] = source[:i, :j].T
            np.testing.assert_array_equal(target, expected)


@every_size
@pytest.mark.parametrize("channels", [1, 3, 4, 17, 32])
@pytest.mark.parametrize("step", [1, 2])
def test_pixels_with_channels_first_become_channels_last(itemsize, channels, step):
    _, run = tasks(itemsize)
    source = numbers(itemsize, channels, 37 * step)
    target = np.full((38, channels), -1, source.dtype)
    run.copy(1, address(target), target.strides[0], address(source), 37, channels, source.strides[0], step * itemsize)
    np.testing.assert_array_equal(target[:37], source[:, ::step].T)
    assert (target[37] == -1).all()


@every_size
@pytest.mark.parametrize("last", [False, True])
def test_a_block_is_written_as_far_as_it_is_used(itemsize, last):
    tile, run = tasks(itemsize)
    block = numbers(itemsize, 21, tile.width)
    for used in (1, 5, tile.width - 1, tile.width):
        target = np.full((22, tile.width + 1) if last else (tile.width + 1, 22), -1, block.dtype)
        row, column = target.strides
        run.emit(1, address(block), address(target), *((column, row) if last else (row, column)), used, 21)
        seen = target if last else target.T
        np.testing.assert_array_equal(seen[:21, :used], block[:, :used])
        assert (seen[21:] == -1).all()
        assert (seen[:, used:] == -1).all()


@every_size
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("taps", [1, 6, 49])
def test_a_panel_holds_the_taps_asked_for_in_their_order(itemsize, transposed, taps):
    tile, run = tasks(itemsize)
    filters, channels = (7, 11) if transposed else (11, 7)
    order = list(range(taps))[::-1][: max(taps - 2, 1)]
    weight = numbers(itemsize, filters, channels, taps)
    inner, used = (filters, channels) if transposed else (channels, filters)
    panel = np.full((len(order), inner, tile.width), -1, weight.dtype)
    table = pack_table(inner, taps, order, tile.width, itemsize, transposed)
    run.pack(
        1, address(panel), address(weight), *weight.strides[:2], inner, taps, used, address(table), transposed
    )  # fmt: skip
    expected = weight[:, :, order].transpose((2, 0, 1) if transposed else (2, 1, 0))
    np.testing.assert_array_equal(panel[..., :used], expected)
    assert (panel[..., used:] == 0).all()


@every_size
@pytest.mark.parametrize("taps", [1, 6, 49])
def test_a_panel_of_a_gradient_goes_back_to_its_place(itemsize, taps):
    tile, run = tasks(itemsize)
    panel = numbers(itemsize, taps, 7, tile.width)
    for used in (1, tile.lanes + 1, tile.width):
        weight = np.full((used + 1, 7, taps), -1, panel.dtype)
        run.unpack(1, address(panel), address(weight), *weight.strides[:2], 7, taps, used)
        np.testing.assert_array_equal(weight[:used], panel[..., :used].transpose(2, 1, 0))
        assert (weight[used] == -1).all()
