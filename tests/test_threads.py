"""Many Python threads at once, every threading layer, forks and spawns; each in a process of its own."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
from support import ALGORITHMS, normal, per_group, promise, run_python, tbb_directory

import fastconv
from fastconv import config

MODULES = {"omp": "omppool", "tbb": "tbbpool", "workqueue": "workqueue"}


def layer_is_installed(name):
    if name == "tbb" and tbb_directory():
        return True
    try:
        importlib.import_module(f"numba.np.ufunc.{MODULES[name]}")
    except ImportError:
        return False
    return True


@pytest.fixture(params=MODULES)
def layer(request):
    if not layer_is_installed(request.param):
        pytest.skip(f"Numba's threading layer {request.param} is not installed")
    return request.param


def run_under(layer, call, timeout=240, **environment):
    """Run one of the functions below in another process, under a threading layer."""
    paths = [tbb_directory() or "", os.environ.get("LD_LIBRARY_PATH", "")]
    printed = run_python(
        f"import test_threads as there; there.{call}; there.finish()",
        timeout=timeout,
        NUMBA_THREADING_LAYER=layer,
        LD_LIBRARY_PATH=os.pathsep.join(filter(None, paths)),
        **environment,
    )
    assert printed.endswith(f"done under {layer}\n"), printed


def finish():
    import numba

    print("done under", numba.threading_layer(), flush=True)


# --- what runs over there --------------------------------------------------------------------------------------


def work(algorithms=ALGORITHMS):
    """Results of every kind of call, as bytes: they must be the same bits wherever they are computed."""
    found = []
    for data_format in ("channels_first", "channels_last"):
        x = normal("x", shape=(3, 8, 13, 12), dtype="float32")
        if data_format == "channels_last":
            x = np.ascontiguousarray(np.moveaxis(x, 1, -1))
        bias = normal("b", shape=(8,), dtype="float32")
        for algorithm in algorithms:
            c = per_group(algorithm, 4)
            weight = normal("w", shape=(8, c, 3, 3), dtype="float32")
            how = {"padding": 1, "groups": 8 // c, "data_format": data_format, "algorithm": algorithm}
            how["precision"] = promise(algorithm)
            y = fastconv.conv2d(x, weight, bias, activation="tanh", **how)
            found += [y, *fastconv.conv2d_backward(y, x, weight, **how)]
        how = {"data_format": data_format}
        y, where = fastconv.max_pool2d(x, 3, 2, 1, return_indices=True, **how)
        found += [y, where, fastconv.max_pool2d_backward(y, where, x.shape, **how)]
        y = fastconv.avg_pool2d(x, 3, 2, 1, **how)
        found += [y, fastconv.avg_pool2d_backward(y, x.shape, 3, 2, 1, **how)]
    return [np.ascontiguousarray(a).tobytes() for a in found]


def together(count, task):
    """Run a task in many threads that start at once; return what each returned."""
    barrier, results, errors = threading.Barrier(count), [None] * count, []

    def body(i):
        barrier.wait()
        try:
            results[i] = task(i)
        except BaseException as error:
            errors.append(error)

    crowd = [threading.Thread(target=body, args=(i,), daemon=True) for i in range(count)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join(200)
    assert not any(thread.is_alive() for thread in crowd), "a thread hangs"
    if errors:
        raise errors[0]
    return results


def eight_threads():
    alone = work()
    assert all(found == alone for _ in range(3) for found in together(8, lambda i: work())), "other bits"
    assert work() == alone


def eight_threads_that_come_first():
    crowd = together(8, lambda i: work())
    alone = work()
    assert all(found == alone for found in crowd), "other bits"


def eight_threads_with_options():
    def task(i):
        with fastconv.options(threads=1 + i % 2, poison=i % 3 == 0):
            first = work()
            assert work() == first
            assert config.threads == 1 + i % 2
            return first

    results = together(8, task)
    assert all(results[i] == results[i % 2] for i in range(8)), "other bits"


def close_to(found, expected):
    """Equal but for the order of sums: a child computes on one thread."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert len(a) == len(b)
        left, right = np.frombuffer(a, "float32"), np.frombuffer(b, "float32")
        if np.array_equal(np.frombuffer(a, "int32"), np.frombuffer(b, "int32")):
            continue
        assert np.abs(left - right).max() <= 1e-4 * np.abs(right).max(), "other numbers"


def wait_for(pid, seconds):
    """Return a child's exit status, or kill it and raise."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"the child gave no answer in {seconds} s")


@contextlib.contextmanager
def forking_allowed():
    import warnings

    with warnings.catch_warnings():
        # Python 3.12 warns of any fork while threads run; that it works is what is tested here.
        warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
        yield


def fork_after_use():
    before = work()
    for _ in range(2):
        with forking_allowed():
            pid = os.fork()
        if pid == 0:
            status = 1
            try:
                close_to(work(), before)
                # A second level, and Python threads in the child.
                grandchild = os.fork()
                if grandchild == 0:
                    close_to(work(("direct",)), work(("direct",)))
                    os._exit(0)
                assert wait_for(grandchild, 60) == 0
                together(4, lambda i: close_to(work(), before))
                status = 0
            finally:
                os._exit(status)
        assert wait_for(pid, 120) == 0, "the child failed"
        assert work() == before


def fork_before_use():
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    assert wait_for(pid, 120) == 0
    work()


def fork_while_other_threads_compute():
    before, stop = work(), threading.Event()

    def busy():
        while not stop.is_set():
            work(("direct", "im2col"))

    crowd = [threading.Thread(target=busy, daemon=True) for _ in range(2)]
    for thread in crowd:
        thread.start()
    try:
        for _ in range(3):
            with forking_allowed():
                pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    close_to(work(("direct",)), before_direct)
                    status = 0
                finally:
                    os._exit(status)
            assert wait_for(pid, 120) == 0, "the child failed"
    finally:
        stop.set()
        for thread in crowd:
            thread.join(60)
    assert work() == before


before_direct: list = []


def pool_of_processes(method):
    before = work()
    context = multiprocessing.get_context(method)
    with forking_allowed(), context.Pool(2) as pool:
        for found in pool.map_async(work, [ALGORITHMS] * 4).get(150):
            close_to(found, before)
    assert work() == before


def threads_are_honoured():
    import numba

    from fastconv.cpu import threads

    seen = []
    launch = threads.launch

    def watched(dispatcher, args):
        def call(*args):
            seen.append(numba.get_num_threads())
            return dispatcher(*args)

        return launch(call, args)

    threads.launch = watched
    most = numba.config.NUMBA_NUM_THREADS
    for wanted, used in ((None, most), (1, 1), (2, min(2, most)), (10**6, most)):
        seen.clear()
        with fastconv.options(threads=wanted):
            assert threads.count() == used
            work()
        assert seen, "no kernel ran"
        assert set(seen) == {used}, f"threads={wanted}: {seen}"
    # What the caller asked Numba for holds outside and is not lost.
    numba.set_num_threads(1)
    with fastconv.options(threads=2):
        work()
    assert numba.get_num_threads() == 1


# --- the tests -------------------------------------------------------------------------------------------------


def test_eight_threads_compute_the_same_bits_as_one(layer):
    run_under(layer, "eight_threads()")


def test_the_first_calls_of_a_process_may_come_from_many_threads(layer):
    run_under(layer, "eight_threads_that_come_first()")


def test_options_of_one_thread_do_not_reach_another(layer):
    run_under(layer, "eight_threads_with_options()")


def test_the_option_threads_is_honoured(layer):
    run_under(layer, "threads_are_honoured()")


def test_the_environment_sets_the_number_of_threads():
    script = "from fastconv.cpu import threads; print(threads.count())"
    assert run_python(script, FASTCONV_THREADS="1") == "1\n"


def test_the_threads_of_openmp_are_loaded_by_the_first_kernel():
    # PyTorch may be imported in between, whose pool then serves both.
    script = """
import os, sys
import numpy as np
import fastconv.nn
from fastconv.cpu import threads
assert threads.count() >= 1
assert "numba.np.ufunc.omppool" not in sys.modules
fastconv.conv2d(np.ones((4, 8, 32, 32), "float32"), np.ones((8, 8, 3, 3), "float32"))
print(threads.layer(), "numba.np.ufunc.omppool" in sys.modules, "GOMP_SPINCOUNT" in os.environ)
"""
    assert run_python(script, NUMBA_THREADING_LAYER="omp") == "omp True False\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
class TestFork:
    def test_a_child_computes_what_its_parent_did(self, layer):
        run_under(layer, "fork_after_use()")

    def test_a_fork_before_the_first_call_is_like_none(self, layer):
        run_under(layer, "fork_before_use()")

    def test_a_fork_while_other_threads_compute(self, layer):
        run_under(layer, "before_direct.extend(there.work(('direct',))); there.fork_while_other_threads_compute()")

    def test_a_pool_of_forked_processes(self, layer):
        run_under(layer, "pool_of_processes('fork')")


def test_a_pool_of_spawned_processes(layer):
    run_under(layer, "pool_of_processes('spawn')")


@pytest.mark.skipif(sys.platform != "linux", reason="the start method forkserver is tried on Linux only")
def test_a_pool_of_processes_of_a_server():
    run_under("omp", "pool_of_processes('forkserver')")
