"""Launching: compiled kernels on the GPU, through cuda.core, on addresses and the caller's stream.

What does not change between calls is prepared once: the module is loaded, shared memory beyond 48 KB opted in to, the
configuration built and the numbers packed. A call is then one list of addresses and one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from .. import device_arrays
from ..errors import ArgumentError, ArgumentTypeError, MissingDependencyError, UnsupportedError
from . import toolchain
from .architecture import Architecture, on_capability
from .compile import CompiledKernel

# Dynamic shared memory of a block that needs no opting in.
_USUAL_SHARED = 48 * 1024


class CoreDriver:
    """What launching needs of cuda.core; tests put another in its place."""

    def __init__(self) -> None:
        toolchain.import_cuda()
        try:
            from cuda import core
            from cuda.bindings import driver

            (status,) = driver.cuInit(0)
        except (ImportError, RuntimeError) as error:
            raise UnsupportedError(f"no NVIDIA driver can be loaded: {error}") from None
        if int(status):
            raise UnsupportedError(f"the NVIDIA driver does not start: {status.name}")
        self._core, self._driver = core, driver

    def device(self) -> int:
        """Return the number of the current device, and make it current in cuda.core."""
        device = self._core.Device()
        device.set_current()
        return device.device_id

    def capability(self, device: int) -> int:
        """Return ten times the compute capability."""
        major, minor = self._core.Device(device).compute_capability
        return 10 * major + minor

    def name(self, device: int) -> str:
        """Return the name of the GPU's model."""
        return self._core.Device(device).name

    def load(self, cubin: bytes, entry: str) -> Any:
        """Return a kernel of a module that is loaded on the current device."""
        return self._core.ObjectCode.from_cubin(cubin).get_kernel(entry)

    def allow_shared(self, kernel: Any, nbytes: int, device: int) -> None:
        """Let a kernel use so much dynamic shared memory."""
        driver = self._driver
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = driver.cuKernelSetAttribute(
            attribute, nbytes, driver.CUkernel(int(kernel.handle)), driver.CUdevice(device)
        )
        if int(status):
            raise UnsupportedError(f"the device does not give a block {nbytes} bytes of shared memory: {status.name}")

    def configuration(self, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int) -> Any:
        """Return the configuration of a launch."""
        return self._core.LaunchConfig(grid=grid, block=block, shmem_size=shared_bytes)

    def stream(self, handle: int) -> Any:
        """Return a stream of a handle; 0 is the legacy default stream."""
        return self._core.Stream.from_handle(handle) if handle else self._core.LEGACY_DEFAULT_STREAM

    @property
    def launch(self) -> Callable[..., None]:
        """The function of (stream, configuration, kernel, *arguments) that launches."""
        return self._core.launch

    def moment(self, stream: Any) -> Any:
        """Return an event: when the stream has come so far."""
        return stream.record(options=self._core.EventOptions(timing_enabled=True))

    def elapsed(self, first: Any, last: Any) -> float:
        """Wait for an event, and return the seconds from another to it."""
        last.sync()
        return (last - first) * 1e-3


@lru_cache(maxsize=1)
def driver() -> CoreDriver:
    """Return the driver; UnsupportedError says why there is none."""
    return CoreDriver()


class Launcher:
    """A kernel that is ready on one device: call it with a stream and the addresses of its arrays.

    Parameters
    ----------
    compiled : CompiledKernel
    grid, block : tuple of int
    numbers : sequence of NumPy scalars
        What follows the addresses, in the types of the kernel's signature.
    shared_bytes : int
        Dynamic shared memory of each block.
    """

    __slots__ = ("_configuration", "_driver", "_kernel", "_launch", "_numbers")

    def __init__(
        self,
        compiled: CompiledKernel,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        numbers: Sequence[Any] = (),
        shared_bytes: int = 0,
        using: Any = None,
    ) -> None:
        for number in numbers:
            if not isinstance(number, (np.generic, bool)):
                raise ArgumentTypeError(f"numbers must be NumPy scalars, whose size is known, not {number!r}")
        if min(grid, default=0) < 1 or min(block, default=0) < 1:
            raise ArgumentError(f"grid and block must be positive, not {grid} and {block}")
        self._driver = using or driver()
        self._kernel = loaded(self._driver, compiled, shared_bytes)
        self._configuration = self._driver.configuration(grid, block, shared_bytes)
        self._numbers = tuple(numbers)
        self._launch = self._driver.launch

    def __call__(self, stream: Any, *addresses: int) -> None:
        """Launch on a stream of :meth:`stream`; the arrays must live until the stream has come past."""
        self._launch(stream, self._configuration, self._kernel, *addresses, *self._numbers)

    def stream(self, value: Any) -> Any:
        """Return the stream on which the library of an array works at present, as a launch takes it."""
        return _stream(self._driver, device_arrays.stream_handle(value))


def stream(handle: int) -> Any:
    """Return the stream of a handle, as a launch takes it."""
    return _stream(driver(), handle)


def streams() -> Callable[[int], Any]:
    """Return the function that is `stream`, for those who call it often."""
    return partial(_stream, driver())


@lru_cache(maxsize=256)
def _stream(using: Any, handle: int) -> Any:
    return using.stream(handle)


# By driver, machine code, entry and device: one module, however many launchers.
_loaded: dict[tuple[Any, ...], tuple[Any, list[int]]] = {}


def loaded(using: Any, compiled: CompiledKernel, shared_bytes: int) -> Any:
    """Return the kernel on the current device, loaded once, with so much shared memory allowed."""
    target, device = Architecture.named(compiled.architecture), using.device()
    _check_runs(target, using.capability(device))
    if shared_bytes > target.shared_limit:
        raise UnsupportedError(
            f"{compiled.name} needs {shared_bytes} bytes of shared memory; "
            f"{target.name} gives a block {target.shared_limit}"
        )
    key = (id(using), compiled.cubin, compiled.entry, device)
    if key not in _loaded:
        _loaded[key] = using.load(compiled.cubin, compiled.entry), [_USUAL_SHARED]
    kernel, allowed = _loaded[key]
    if shared_bytes > allowed[0]:
        using.allow_shared(kernel, shared_bytes, device)
        allowed[0] = shared_bytes
    return kernel


def _check_runs(target: Architecture, capability: int) -> None:
    """Machine code runs on its own major version from its minor on; with an "a" on nothing but its own."""
    same = target.capability == capability
    later = target.capability // 10 == capability // 10 and target.capability < capability and target.name[-1] != "a"
    if not (same or later):
        raise UnsupportedError(
            f"machine code for {target.name} does not run on a GPU of compute capability {capability / 10}"
        )


def architecture(using: Any = None) -> str:
    """Return the architecture to compile for on the current device."""
    using = using or driver()
    capability = using.capability(using.device())
    found = on_capability(capability)
    if found is None:
        raise UnsupportedError(f"there are no kernels for GPUs of compute capability {capability / 10}")
    return found


def model(name: str) -> str:
    """Return the model of the current GPU if it is of the architecture of this name; empty if not, or without a GPU."""
    try:
        using = driver()
        return using.name(using.device()) if architecture(using) == name else ""
    except (MissingDependencyError, UnsupportedError):
        return ""
