"""Memory that is used again: never while somebody can see it, and never without bound."""

import gc
import threading

import numpy as np
import pytest

import fastconv
from fastconv import blocks


@pytest.fixture(autouse=True)
def nothing_waits():
    blocks.release()
    yield
    blocks.release()


def place(array):
    return array.__array_interface__["data"][0]


def test_a_block_is_taken_again_when_its_last_view_is_gone():
    first = blocks.take(1 << 20)
    at, view = place(first), first[100:200].view(np.float32)
    del first
    gc.collect()
    assert blocks.waiting() == 0, "a view still sees it"
    assert place(blocks.take(1 << 20)) != at
    del view
    again = blocks.take((1 << 20) - 5)
    assert place(again) == at
    assert again.size == (1 << 20) - 5


@pytest.mark.parametrize("nbytes", [1, 63, 64, 65, 1000, (1 << 17) + 1, 3 << 20])
def test_a_block_begins_a_cache_line_and_is_as_long_as_asked(nbytes):
    block = blocks.take(nbytes)
    assert place(block) % blocks.ALIGNMENT == 0
    assert block.shape == (nbytes,)
    assert block.flags.writeable
    block[:] = 7
    del block
    assert nbytes <= blocks.waiting() <= nbytes * 9 / 8 + 3 * blocks.ALIGNMENT


def test_what_waits_is_bounded(monkeypatch):
    monkeypatch.setattr(blocks, "MOST_BYTES", 10 << 20)
    held = [blocks.take(3 << 20) for _ in range(8)]
    while held:
        held.pop()
        assert blocks.waiting() <= 10 << 20
    del_me = blocks.take(11 << 20)
    before = blocks.waiting()
    del del_me
    assert blocks.waiting() == before, "larger than all that may wait"


def test_results_that_are_kept_keep_their_values():
    x, w = np.ones((4, 8, 64, 64), np.float32), np.ones((8, 8, 3, 3), np.float32)
    kept = [fastconv.conv2d(x * i, w, padding=1) for i in range(6)]
    places = {place(y) for y in kept}
    assert len(places) == 6
    assert [y[0, 0, 5, 5] for y in kept] == [72.0 * i for i in range(6)]
    del kept
    assert place(fastconv.conv2d(x, w, padding=1)) in places


def test_threads_never_share_a_block():
    wrong = []

    def work(number):
        for _ in range(300):
            block = blocks.take(1 << 16)
            block[:] = number
            if not (block == number).all():
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
