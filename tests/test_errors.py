"""Kinds of errors: fastconv's own, and at the same time what a Python user would catch."""

import pickle

import numpy as np
import pytest

import fastconv
from fastconv import errors

KINDS = {
    "ArgumentError": ValueError,
    "ShapeError": ValueError,
    "ArgumentTypeError": TypeError,
    "DTypeError": TypeError,
    "UnsupportedError": NotImplementedError,
    "WorkspaceLimitError": MemoryError,
    "MissingDependencyError": ImportError,
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_also_the_built_in_one(name):
    kind = getattr(errors, name)
    assert kind is getattr(fastconv, name)
    assert issubclass(kind, errors.FastconvError)
    assert issubclass(kind, KINDS[name])
    assert kind.__doc__


def test_every_kind_is_public():
    kinds = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, Exception)}
    assert kinds == {"FastconvError", *KINDS}
    assert kinds <= set(fastconv.__all__)


X, W = np.ones((1, 2, 5, 5), "float32"), np.ones((3, 2, 3, 3), "float32")
RAISED = [
    (fastconv.ShapeError, ValueError, "x of shape", lambda: fastconv.conv2d(X[:, :1], W)),
    (fastconv.ArgumentError, ValueError, "stride must be at least 1, not 0", lambda: fastconv.conv2d(X, W, stride=0)),
    (fastconv.ArgumentTypeError, TypeError, "groups must be an integer", lambda: fastconv.conv2d(X, W, groups=1.0)),
    (fastconv.DTypeError, TypeError, "x must have dtype", lambda: fastconv.conv2d(X.astype("c8"), W)),
    (
        fastconv.UnsupportedError,
        NotImplementedError,
        "algorithm='im2col' cannot compute this forward: im2col: BLAS has no product of int32",
        lambda: fastconv.conv2d(X.astype("int8"), W.astype("int8"), algorithm="im2col"),
    ),
]


@pytest.mark.parametrize(("kind", "built_in", "message", "call"), RAISED, ids=[r[0].__name__ for r in RAISED])
def test_an_operation_raises_the_kind_that_fits(kind, built_in, message, call):
    with pytest.raises(built_in, match=message) as caught:
        call()
    assert type(caught.value) is kind


def test_a_workspace_error_keeps_its_numbers():
    error = errors.WorkspaceLimitError("too much", 7, 5)
    assert (error.needed, error.limit, str(error)) == (7, 5, "too much")
    again = pickle.loads(pickle.dumps(error))
    assert (again.needed, again.limit, str(again)) == (7, 5, "too much")


def test_an_attribute_that_is_not_there_is_named():
    with pytest.raises(AttributeError, match="module 'fastconv' has no attribute 'conv4d'"):
        _ = fastconv.conv4d


def test_every_public_name_is_there():
    assert len(set(fastconv.__all__)) == len(fastconv.__all__)
    for name in fastconv.__all__:
        assert getattr(fastconv, name) is not None
        assert name in dir(fastconv)


def test_arrays_in_the_wrong_place_are_shown_by_their_shape():
    x, w = np.ones((2, 3, 8, 8), np.float32), np.ones((4, 3, 3, 3), np.float32)
    with pytest.raises(fastconv.ArgumentTypeError, match=r"x_shape must be .*, not an array of shape \(2, 3, 8, 8\)$"):
        fastconv.plan_conv2d(x, w)
    with pytest.raises(fastconv.ArgumentTypeError, match=r"stride must be .*, not an array of shape \(4, 3, 3, 3\)$"):
        fastconv.conv2d(x, w, stride=w)


def test_the_wrong_memory_format_is_named():
    x, w = np.ones((2, 3, 8, 8), np.float32), np.ones((4, 3, 3, 3), np.float32)
    with pytest.raises(fastconv.ShapeError, match="with data_format='channels_last' has 8 channels, but weight of"):
        fastconv.conv2d(x, w, data_format="channels_last")
