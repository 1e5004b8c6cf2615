"""The compiled kernels: found in the wheel or the cache, else built at first use; loaded once a process.

    cpu_library()   None: torch.ops.vqkernels_C is there; else one line that says why not
    cuda_library()  the same for its CUDA implementations
    build()         what ``vqkernels build`` does;  describe()  what ``vqkernels info`` shows

Importing this module does nothing. setup.py runs it as a file of its own for ``cpu_sources`` and ``CPU_FLAGS``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

JIT_FLAGS = [
    "-std=c++20",  # torch >= 2.13's headers want it
    "-O3",
    "-ffp-contract=off",  # error-free sums and products must stay as written; where fma is wanted it is called
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the stable ABI of torch 2.10: one library for every later torch
]
CPU_FLAGS = [*JIT_FLAGS, "-DVQKERNELS_PYTHON_MODULE", "-DPy_LIMITED_API=0x030A0000"]  # inside a wheel
CUDA_FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
SHOWN_LINES = 12  # of a failed build's output

_PACKAGE = Path(__file__).resolve().parent
_lock = threading.RLock()
_results: dict[str, BuildReport] = {}


class BuildReport(NamedTuple):
    """What became of one library."""

    name: str  # "cpu" or "cuda"
    path: Path | None = None
    reason: str | None = None  # why it is not there
    built: bool = False  # compiled by this very call
    seconds: float = 0.0
    warn: bool = False  # the reason is a surprise, not a choice


# ------------------------------------------------------------------------------------------- sources


def source_root() -> Path:
    """The folder csrc: beside the modules in a wheel, one floor up in a checkout.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    for root in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (root / "registration.cpp").is_file():
            return root
    raise FileNotFoundError(f"csrc: expected beside or above {_PACKAGE}")


def cpu_sources(root: str | Path | None = None) -> list[Path]:
    """The translation units of the CPU library, registration first."""
    base = source_root() if root is None else Path(root)
    return [base / "registration.cpp", *sorted((base / "cpu").glob("*.cpp"))]


def cuda_sources(root: str | Path | None = None) -> list[Path]:
    """The translation units of the CUDA library."""
    base = source_root() if root is None else Path(root)
    return sorted((base / "cuda").glob("*.cu"))


# --------------------------------------------------------------------------------------------- cache


def cache_folder() -> Path:
    """$VQKERNELS_CACHE, else ~/.cache/vqkernels."""
    return Path(os.environ.get("VQKERNELS_CACHE") or Path.home() / ".cache" / "vqkernels")


def _key(name: str, flags: list[str], architecture: str) -> str:
    """Names a library by all that goes into it. A compiler's version does not: the ABI is torch's stable one."""
    import torch

    digest = hashlib.sha256()
    for part in (name, *flags, torch.__version__, architecture, os.environ.get("CXX", ""), sys.platform):
        digest.update(part.encode() + b"\0")
    root = source_root()
    folders = [root, root / name]
    for path in sorted(path for folder in folders for path in folder.glob("*.*")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


@contextlib.contextmanager
def _only_one_builds(lock: Path) -> Iterator[None]:
    """Processes that build the same library wait for the first; the kernel frees the lock of one that dies."""
    try:
        import fcntl
    except ImportError:  # without it several may build; the rename below keeps that safe
        yield
        return
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _find_or_build(name: str, key: str, compile_into: Callable[[str, Path], Path]) -> tuple[Path, bool]:
    """The library's path in the cache and whether this call built it."""
    library = f"vqkernels_{name}"
    folder = cache_folder() / f"{name}-{key}"
    final = folder / f"{library}.so"
    if final.is_file():
        return final, False
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one_builds(cache_folder() / f"{name}-{key}.lock"):
        if final.is_file():
            return final, False
        scratch = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
        try:
            os.replace(compile_into(library, scratch), final)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return final, True


# ------------------------------------------------------------------------------------------ building


@contextlib.contextmanager
def _build_environment(**variables: str) -> Iterator[None]:
    """PATH with the ninja of this Python's environment, and ``variables``, for as long as a build runs."""
    before = {key: os.environ.get(key) for key in ("PATH", *variables)}
    folders = [before["PATH"] or "", str(Path(sys.executable).parent)]
    with contextlib.suppress(ImportError):
        import ninja

        folders.append(str(ninja.BIN_DIR))
    os.environ.update(variables, PATH=os.pathsep.join(folders))
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)


def _missing_compiler() -> str | None:
    compiler = os.environ.get("CXX") or "c++"
    return None if shutil.which(compiler.split()[0]) else f"no C++ compiler: {compiler!r} is not on PATH"


def _last_lines(error: BaseException) -> str:
    """What the build said, without the command lines that ninja repeats."""
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() and not line.startswith(("FAILED", "ninja:"))]
    return "\n".join((telling or lines)[-SHOWN_LINES:]) or type(error).__name__


def _product(folder: Path) -> Path:
    return next(folder.glob("*.so"))  # torch renames a library that one process builds twice


def _compile_cpu(library: str, folder: Path) -> Path:
    """Builds and, because torch's builder does so, loads the library."""
    from torch.utils import cpp_extension

    with _build_environment():
        cpp_extension.load(
            library,
            [str(path) for path in cpu_sources()],
            extra_cflags=JIT_FLAGS,
            extra_ldflags=["-Wl,--as-needed"] if sys.platform == "linux" else None,
            build_directory=str(folder),
            is_python_module=False,
        )
    return _product(folder)


def _cuda_home() -> Path | None:
    """The CUDA toolkit: $CUDA_HOME, nvcc on PATH, the usual place, or NVIDIA's Python packages."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent]
    places += [str(path) for path in sorted(Path("/usr/local").glob("cuda*"))]
    places += [str(path) for base in sys.path for path in sorted(Path(base).glob("nvidia/cu[0-9]*"), reverse=True)]
    homes = [Path(place) for place in places if place]
    return next((home for home in homes if (home / "include" / "cuda_runtime.h").is_file()), None)


def _runtime_link(home: Path, folder: Path) -> list[str]:
    """Linker flags that find libcudart where a package brings only its versioned name."""
    found = sorted((home / "lib").glob("libcudart.so.*"))
    if not found or (home / "lib" / "libcudart.so").exists():
        return []
    (folder / "libcudart.so").symlink_to(found[-1])
    return [f"-L{folder}"]


def _cuda_target() -> tuple[str, list[str]]:
    """Of the first device: the architecture as torch's builder names it, and nvcc's flags."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    if (major, minor) == (9, 0):  # Hopper's own instructions are in sm_90a alone
        return "9.0a", [*CUDA_FLAGS, "-DVQKERNELS_SM90A"]
    return f"{major}.{minor}", CUDA_FLAGS


def _compile_cuda(library: str, folder: Path) -> Path:
    from torch.utils import cpp_extension

    home = _cuda_home()
    if home is None:
        raise FileNotFoundError("no CUDA toolkit: set CUDA_HOME, or pip install 'vqkernels[nvcc]'")
    architecture, flags = _cuda_target()
    cpp_extension.CUDA_HOME = str(home)  # read once, when torch's module was imported
    with _build_environment(CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST=architecture):
        cpp_extension.load(
            library,
            [str(path) for path in cuda_sources()],
            extra_cflags=JIT_FLAGS,
            extra_cuda_cflags=flags,
            extra_ldflags=_runtime_link(home, folder),
            build_directory=str(folder),
            with_cuda=True,
            is_python_module=False,
        )
    return _product(folder)


# ------------------------------------------------------------------------------------------- loading


def _prebuilt() -> Path | None:
    return next(iter(sorted(_PACKAGE.glob("_C*.so"))), None)


def _load_cpu() -> tuple[Path, bool]:
    import torch

    prebuilt = _prebuilt()
    if prebuilt is not None:
        torch.ops.load_library(prebuilt)
        return prebuilt, False
    path, built = _find_or_build("cpu", _key("cpu", JIT_FLAGS, platform.machine()), _checked(_compile_cpu))
    if not built:
        torch.ops.load_library(path)
    return path, built


def _load_cuda() -> tuple[Path, bool]:
    import torch

    architecture, flags = _cuda_target()
    key = _key("cuda", flags, f"{architecture} {torch.version.cuda}")
    path, built = _find_or_build("cuda", key, _checked(_compile_cuda))
    if not built:
        torch.ops.load_library(path)
    return path, built


def _checked(compile_into: Callable[[str, Path], Path]) -> Callable[[str, Path], Path]:
    def checked(library: str, folder: Path) -> Path:
        missing = _missing_compiler()
        if missing is not None:
            raise FileNotFoundError(missing)
        return compile_into(library, folder)

    return checked


def _attempt(name: str, load: Callable[[], tuple[Path, bool]]) -> BuildReport:
    """Loads or builds; any failure at all becomes a reason, since other backends can take over."""
    start = time.perf_counter()
    try:
        path, built = load()
    except Exception as error:
        return BuildReport(name, reason=_last_lines(error), seconds=time.perf_counter() - start, warn=True)
    return BuildReport(name, path, None, built, time.perf_counter() - start)


def _not_wanted(name: str) -> BuildReport | None:
    """Reasons that are no failure."""
    if os.environ.get("VQKERNELS_DISABLE_COMPILED", "") not in ("", "0"):
        return BuildReport(name, reason="VQKERNELS_DISABLE_COMPILED is set")
    if name == "cuda":
        import torch

        if not torch.cuda.is_available():
            return BuildReport(name, reason="torch sees no CUDA device")
        if not cuda_sources():
            return BuildReport(name, reason="no CUDA sources")
    return None


def _report(name: str) -> BuildReport:
    """The library's state, made once a process."""
    unwanted = _not_wanted(name)
    if unwanted is not None:
        return unwanted
    if name == "cuda":  # the operators are declared by the CPU library
        cpu = _report("cpu")
        if cpu.reason is not None:
            return cpu._replace(name=name)
    with _lock:
        if name not in _results:
            _results[name] = _attempt(name, _load_cpu if name == "cpu" else _load_cuda)
            _warn(_results[name])
        return _results[name]


def _warn(report: BuildReport) -> None:
    if report.warn:
        message = f"vqkernels: compiled {report.name} kernels are not available, others are used: {report.reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def cpu_library() -> str | None:
    """Makes torch.ops.vqkernels_C available on CPU tensors; None, or why that cannot be. Never raises."""
    return _report("cpu").reason


def cuda_library() -> str | None:
    """Makes torch.ops.vqkernels_C available on CUDA tensors; None, or why that cannot be. Never raises."""
    return _report("cuda").reason


def library_path(name: str = "cpu") -> Path:
    """The file of the loaded library, "cpu" or "cuda".

    Raises:
        RuntimeError: there is none; the message says why.
    """
    report = _report(name)
    if report.path is None:
        raise RuntimeError(report.reason)
    return report.path


# ----------------------------------------------------------------------------------- command line's


def build(cuda: bool | None = None) -> list[BuildReport]:
    """Builds what is not built yet: the CPU library, and the CUDA one if asked for (None: where a device is)."""
    import torch

    wanted = torch.cuda.is_available() if cuda is None else cuda
    return [_report("cpu"), *([_report("cuda")] if wanted else [])]


def instruction_set() -> str | None:
    """The instruction set that the CPU kernels use in this process, once they are loaded."""
    import ctypes

    report = _results.get("cpu")
    if report is None or report.path is None:
        return None
    name = ctypes.CDLL(str(report.path)).vqkernels_instruction_set
    name.restype = ctypes.c_char_p
    return name().decode()


def _compiler_version() -> str:
    if _missing_compiler() is not None:
        return "none found"
    command = (os.environ.get("CXX") or "c++").split()
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or ["unknown"])[0]


def _state(name: str) -> str:
    unwanted = _not_wanted(name)
    report = unwanted or _results.get(name)
    if report is None:
        return "not loaded yet; built at first use"
    return f"loaded from {report.path}" if report.reason is None else f"not available: {report.reason}"


def describe() -> dict[str, str]:
    """What is there, without building anything: one line a topic."""
    home = _cuda_home()
    prebuilt = _prebuilt()
    return {
        "compiled cpu": _state("cpu"),
        "instruction set": instruction_set() or "chosen when the library is loaded",
        "compiled cuda": _state("cuda"),
        "prebuilt": str(prebuilt) if prebuilt else "no",
        "cache": str(cache_folder()),
        "compiler": _compiler_version(),
        "CUDA toolkit": str(home) if home else "none found",
    }
