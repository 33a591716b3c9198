"""The doctor on GPUs, through the driver's own library: nothing of torch is imported."""

import ctypes
import importlib.metadata

from promoe.cli.diagnosis import Finding, ok, warn
from promoe.cli.quantity import format_nbytes


class _Driver:
    """libcuda.so.1, initialised."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        code = self._library.cuInit(0)
        if code != 0:
            raise OSError(code, f"cuInit failed with CUDA error {code}")

    def version(self) -> str:
        """The newest CUDA version that the driver serves."""
        number = ctypes.c_int()
        self._library.cuDriverGetVersion(ctypes.byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    def devices(self) -> list[str]:
        """Name and memory of each GPU."""
        count = ctypes.c_int()
        self._library.cuDeviceGetCount(ctypes.byref(count))
        found = []
        for device in range(count.value):
            name = ctypes.create_string_buffer(256)
            nbytes = ctypes.c_size_t()
            self._library.cuDeviceGetName(name, len(name), device)
            self._library.cuDeviceTotalMem_v2(ctypes.byref(nbytes), device)
            found.append(f"{name.value.decode(errors='replace')}, {format_nbytes(nbytes.value)}")
        return found


def check_gpu() -> list[Finding]:
    """Driver, devices, and whether the installed packages can use them. No GPU is fine: models run on the CPU."""
    try:
        driver = _Driver()
    except OSError as error:
        return [ok("gpu driver", f"none ({error}); models run on the CPU")]
    devices = driver.devices()
    if not devices:
        return [
            warn(
                "gpu driver",
                f"CUDA {driver.version()}, but no GPU is visible",
                "look at CUDA_VISIBLE_DEVICES, or start the container with --gpus all",
            )
        ]
    major = driver.version().partition(".")[0]
    return [
        ok("gpu driver", f"CUDA {driver.version()}"),
        ok("gpu", "; ".join(devices)),
        _check_torch_build(),
        _check_bindings(major),
    ]


def _check_torch_build() -> Finding:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return warn("torch build", "torch is not installed", "pip install torch")
    if version.endswith("+cpu"):
        return warn(
            "torch build", f"{version} cannot use the GPU", "install torch's CUDA build, as PyTorch's install page says"
        )
    return ok("torch build", version)


def _check_bindings(cuda_major: str) -> Finding:
    try:
        version = importlib.metadata.version("cuda-bindings")
    except importlib.metadata.PackageNotFoundError:
        return warn(
            "cuda bindings",
            "not installed; the GPU cannot be used without them",
            f"pip install 'cuda-bindings=={cuda_major}.*' (the extra cuda{cuda_major} does)",
        )
    return ok("cuda bindings", version)
