"""The CUDA driver API, for what torch does not offer: registering foreign host memory and copying from it.

Its errors, unlike the runtime's, do not stick to the thread. Knows no slots and no streams of its own.
Source: CUDA driver API, context management and memory management; cuda.bindings 12.9 to 13.x.
"""

from bisect import bisect_right
from importlib import import_module
from types import ModuleType
from typing import Final

from promoe.errors import Unavailable

REGISTER_PORTABLE_AND_MAPPED: Final = 3
"""CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP."""


class CudaDriver:
    """One GPU's primary context, which torch computes in too.

    Raises:
        Unavailable: the bindings are not installed, or the driver does not answer.
    """

    def __init__(self, device_index: int) -> None:
        try:
            self._api: ModuleType = import_module("cuda.bindings.driver")
        except ImportError as error:
            raise Unavailable(
                f"The package cuda-bindings, which comes with torch's CUDA wheels, cannot be used: {error}."
            ) from error
        self._call("cuInit", 0)
        # Retained for good: torch keeps the context for the life of the process, too.
        self._context = self._call("cuDevicePrimaryCtxRetain", self._call("cuDeviceGet", device_index))

    def enter_thread(self) -> None:
        """Makes the context current in the calling thread; driver calls fail without one.

        `torch.cuda.set_device` does not do it: where the device is the current one already, it calls nothing.
        """
        self._call("cuCtxSetCurrent", self._context)

    def register(self, address: int, nbytes: int) -> None:
        """Page-locks a range for every context of this process. Raises Unavailable."""
        self._call("cuMemHostRegister", address, nbytes, REGISTER_PORTABLE_AND_MAPPED)

    def unregister(self, address: int) -> None:
        """Undoes `register`. Raises Unavailable."""
        self._call("cuMemHostUnregister", address)

    def copy_to_device(self, destination_address: int, source_address: int, nbytes: int, stream: int) -> None:
        """Queues a copy; the driver itself translates host addresses of registered memory. Raises Unavailable."""
        self._call("cuMemcpyHtoDAsync", destination_address, source_address, nbytes, stream)

    def _call(self, name: str, *arguments: object) -> object:
        """The call's result, if it has one."""
        error, *results = getattr(self._api, name)(*arguments)
        if int(error) != 0:
            raise Unavailable(f"The CUDA driver refused {name}: {error.name}.")
        return results[0] if results else None


class RegisteredRanges:
    """Which host memory is registered. Changed by one thread; others may ask at any time."""

    def __init__(self) -> None:
        self._nbytes: dict[int, int] = {}
        self._sorted: tuple[tuple[int, int], ...] = ()

    def add(self, address: int, nbytes: int) -> None:
        """A range that overlaps no other."""
        self._nbytes[address] = nbytes
        self._publish()

    def remove(self, address: int) -> bool:
        """False where no range starts at the address."""
        known = self._nbytes.pop(address, None) is not None
        self._publish()
        return known

    def covers(self, address: int, nbytes: int) -> bool:
        """True when one range holds all the bytes: a copy across two registrations is invalid."""
        ranges = self._sorted
        place = bisect_right(ranges, address, key=lambda entry: entry[0]) - 1
        if place < 0:
            return False
        start, end = ranges[place]
        return start <= address and address + nbytes <= end

    def _publish(self) -> None:
        self._sorted = tuple(sorted((start, start + nbytes) for start, nbytes in self._nbytes.items()))
