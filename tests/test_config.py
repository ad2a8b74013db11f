"""Options: a block before a value assigned, before the environment, before the default."""

import asyncio
import contextlib
import threading

import numpy as np
import pytest
from support import run_python

import fastconv
from fastconv import config, registry
from fastconv.errors import ArgumentError, ArgumentTypeError

EXAMPLES = {
    "algorithm": ("direct", "direct"),
    "precision": ("medium", "medium"),
    "workspace_limit": ("4096", 4096),
    "threads": ("1", 1),
    "poison": ("1", True),
    "amx": ("no", "off"),
}


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """Start from the defaults, and leave them."""
    for option in config.DEFAULTS:
        monkeypatch.delenv(f"FASTCONV_{option.upper()}", raising=False)
    yield
    for option in config.DEFAULTS:
        with contextlib.suppress(AttributeError):
            delattr(config, option)


def test_every_option_has_an_example_here():
    assert set(EXAMPLES) == set(config.DEFAULTS)


@pytest.mark.parametrize("option", EXAMPLES)
def test_the_nearest_value_holds(option, monkeypatch):
    text, value = EXAMPLES[option]
    default = config.DEFAULTS[option]
    assert getattr(config, option) == config.get(option) == default
    monkeypatch.setenv(f"FASTCONV_{option.upper()}", text)
    assert getattr(config, option) == value
    setattr(config, option, default)
    assert getattr(config, option) == default
    with fastconv.options(**{option: value}):
        assert getattr(config, option) == value
        with fastconv.options(**{option: default}):
            assert getattr(config, option) == default
        assert getattr(config, option) == value
    assert getattr(config, option) == default
    delattr(config, option)
    assert getattr(config, option) == value
    monkeypatch.delenv(f"FASTCONV_{option.upper()}")
    assert getattr(config, option) == default


def test_several_integers_are_no_integer():
    with pytest.raises(ArgumentTypeError, match="threads must be an integer, not array"):
        fastconv.options(threads=np.array([1, 2])).__enter__()


def test_a_block_ends_with_an_error_too():
    with pytest.raises(KeyError, match="inside"), fastconv.options(threads=1):
        raise KeyError("inside")
    assert config.threads is None


def test_blocks_add_up():
    with fastconv.options(threads=1), fastconv.options(precision="high"):
        assert (config.threads, config.precision) == (1, "high")


def test_a_block_holds_in_its_own_thread_only():
    seen = []
    with fastconv.options(threads=1):
        thread = threading.Thread(target=lambda: seen.append(config.threads))
        thread.start()
        thread.join()
    assert seen == [None]


def test_an_assigned_value_holds_in_every_thread():
    config.precision = "medium"
    seen = []
    thread = threading.Thread(target=lambda: seen.append(config.precision))
    thread.start()
    thread.join()
    assert seen == ["medium"]


def test_a_block_holds_in_its_own_task_only():
    async def task(threads, ready, other):
        with fastconv.options(threads=threads):
            ready.set()
            await other.wait()
            return config.threads

    async def both():
        a, b = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(task(1, a, b), task(2, b, a))

    assert asyncio.run(both()) == [1, 2]


WRONG = [
    ("algorithm", "wino", ArgumentError, "algorithm must be one of 'auto', 'tune', 'direct', .*'fft', .* not 'wino'"),
    ("algorithm", 3, ArgumentTypeError, "algorithm must be a string, not 3"),
    ("precision", "exact", ArgumentError, "precision must be one of 'highest', 'high', 'medium', not 'exact'"),
    ("precision", 1, ArgumentTypeError, "precision must be one of 'highest', 'high', 'medium', not 1"),
    ("workspace_limit", -1, ArgumentError, "workspace_limit must be at least 0, not -1"),
    ("workspace_limit", 1.5, ArgumentTypeError, "workspace_limit must be an integer, not 1.5"),
    ("workspace_limit", None, ArgumentTypeError, "workspace_limit must be an integer, not None"),
    ("threads", 0, ArgumentError, "threads must be at least 1, not 0"),
    ("threads", True, ArgumentTypeError, "threads must be an integer, not True"),
    ("threads", "two", ArgumentTypeError, "threads must be an integer, not 'two'"),
    ("poison", 1, ArgumentTypeError, "poison must be True or False, not 1"),
]


@pytest.mark.parametrize(("option", "value", "error", "message"), WRONG)
def test_a_wrong_value_is_refused_at_once(option, value, error, message):
    with pytest.raises(error, match=message):
        setattr(config, option, value)
    with pytest.raises(error, match=message), fastconv.options(**{option: value}):
        pass
    assert getattr(config, option) == config.DEFAULTS[option]


def test_an_unknown_option_is_refused():
    with pytest.raises(ArgumentError, match="unknown option 'speed'; the options are algorithm, precision, "):
        fastconv.options(speed=11).__enter__()
    with pytest.raises(AttributeError, match="no attribute 'speed'"):
        _ = config.speed


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("threads", "many", "FASTCONV_THREADS must be an integer, not 'many'"),
        ("threads", "0", "FASTCONV_THREADS must be at least 1, not 0"),
        ("workspace_limit", "1GB", "FASTCONV_WORKSPACE_LIMIT must be an integer, not '1GB'"),
        ("precision", "exact", "FASTCONV_PRECISION must be one of"),
        ("algorithm", "wino", "FASTCONV_ALGORITHM must be one of 'auto', .* not 'wino'"),
        ("poison", "perhaps", "FASTCONV_POISON must be one of 1, true, .* not 'perhaps'"),
    ],
)
def test_a_wrong_environment_variable_is_named(option, text, message, monkeypatch):
    monkeypatch.setenv(f"FASTCONV_{option.upper()}", text)
    with pytest.raises(ArgumentError, match=message):
        config.get(option)


def test_a_wrong_environment_variable_is_told_at_import():
    script = """
import sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastconv
print(*(w.message for w in caught), sep="\\n")
print("numba" in sys.modules)
"""
    printed = run_python(script, FASTCONV_ALGORITHM="wino", FASTCONV_PRECISION="high").splitlines()
    assert printed[0].startswith("FASTCONV_ALGORITHM must be one of 'auto', ")
    assert printed[0].endswith("not 'wino'; calls that depend on it will fail")
    assert printed[1:] == ["False"]


def test_names_that_a_device_knows_or_that_were_registered_are_options():
    with fastconv.options(algorithm="implicit_gemm_tf32x3"), pytest.raises(ArgumentError, match="must be one of"):
        config.algorithm = "odd"
    registry.register(registry.Algorithm("odd", "cpu", "odd"))
    try:
        config.algorithm = "odd"
    finally:
        registry.unregister("odd", "cpu")


@pytest.mark.parametrize(("text", "value"), [("1", True), ("true", True), ("0", False), ("No", False), ("", False)])
def test_poison_may_be_switched_by_the_environment(text, value, monkeypatch):
    monkeypatch.setenv("FASTCONV_POISON", text)
    assert config.poison is value


def test_the_environment_reaches_the_calls():
    script = """
import numpy as np, fastconv
print(fastconv.config.algorithm, fastconv.config.workspace_limit, fastconv.config.precision)
x, w = np.ones((1, 1, 5, 5), np.int8), np.ones((1, 1, 3, 3), np.int8)
try:
    fastconv.conv2d(x, w)
except fastconv.UnsupportedError as error:
    print("refused", "'im2col'" in str(error))
"""
    printed = run_python(
        script, FASTCONV_ALGORITHM="im2col", FASTCONV_WORKSPACE_LIMIT="12345", FASTCONV_PRECISION="high"
    )
    assert printed == "im2col 12345 high\nrefused True\n"


def test_poison_fills_fresh_memory():
    from fastconv import arrays

    with fastconv.options(poison=True):
        assert np.isnan(arrays.empty((3,), np.float32)).all()
        assert (arrays.empty((3,), np.int32) > 2**29).all()


def test_the_options_are_listed():
    assert set(config.DEFAULTS) <= set(dir(config))


@pytest.mark.parametrize(
    ("name", "hint"), [("presicion", "did you mean 'precision'"), ("speed", "there are algorithm,")]
)
def test_an_option_that_does_not_exist_is_not_taken_for_one(name, hint):
    with pytest.raises(AttributeError, match=f"there is no option '{name}'; {hint}"):
        setattr(config, name, "high")
