"""What depends on the machine that runs a script: compiler, memory, locks on folders, signals."""

import ctypes
import errno
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


VECTOR_FLAGS = ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mavx512vnni")
VECTOR_FLAGS += ("-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8")


def can_compile() -> bool:
    """Whether torch.compile works on this CPU: it needs a C++ compiler, OpenMP and Python's
    headers. Takes 0.1 s."""
    compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
    compiler = next((name for name in compilers if name and shutil.which(name)), None)
    if compiler is None:
        return False
    command = [compiler, "-fsyntax-only", "-I", sysconfig.get_paths()["include"], "-x", "c++"]

    def compiles(*flags: str) -> bool:
        source = b"#include <omp.h>\n#include <Python.h>\n"
        done = subprocess.run([*command, *flags, "-"], input=source, capture_output=True)
        return done.returncode == 0

    # torch compiles and loads six libraries, in 9 seconds, to see whether the compiler knows the
    # CPU's vector instructions. It need not if the compiler knows all of them.
    if platform.machine() in ("x86_64", "AMD64") and compiles(*VECTOR_FLAGS):
        os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
        return True
    return compiles()


def keep_memory() -> None:
    """Ask glibc to keep freed memory. Page faults are otherwise a third of a meta-step on a CPU."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def facts(device: torch.device) -> dict[str, Any]:
    """The device's name, and the most memory that this process needed so far: on its GPU, or else
    in all (None on Windows)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return {"device": name, "peak_memory_mb": torch.cuda.max_memory_allocated(device) / 2**20}
    name = f"{torch.get_num_threads()} CPU threads"
    try:
        import resource
    except ImportError:
        return {"device": name, "peak_memory_mb": None}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes
    return {"device": name, "peak_memory_mb": peak * unit / 2**20}


def sentence(error: Exception) -> str | None:
    """What a user reads of a full or read-only disk, a file that cannot be read, or too little
    memory; else None."""
    if isinstance(error, OSError):
        return f"{error.filename or 'A file'}: {error.strerror or error}."
    words = ("allocate memory", "Storage size calculation overflowed")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(w in str(error) for w in words):
        return f"There is not enough memory; choose smaller sizes ({str(error).partition('. ')[0]})."
    return None


_locks: list[int] = []


def lock(folder: Path) -> None:
    """Make a folder and keep other processes from writing to it until `release`, or until this
    process ends.

    Raises OSError, and leaves no folder that was not there, if it cannot be made; BlockingIOError
    if another process has locked it. Without a lock on Windows, and on file systems that have none.
    """
    if not str(folder).isprintable():  # TensorBoard takes no name that is not UTF-8
        raise OSError(errno.EINVAL, "it has characters that cannot be printed", ascii(str(folder)))
    made = [path for path in folder.parents if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        for path in made:
            with suppress(OSError):  # not made, or another process uses it
                path.rmdir()
        raise

    if fcntl is None:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        reason = "another process is writing to it"
        raise BlockingIOError(error.errno, reason, str(folder)) from error
    except OSError:
        pass
    _locks.append(handle)


def release() -> None:
    """Release all folders that `lock` holds, and leave torch.distributed."""
    while _locks:
        os.close(_locks.pop())
    if dist.is_initialized():
        dist.destroy_process_group()


def end_other_ranks() -> None:
    """End this process at once if it is one of torchrun's but rank 0.

    The others are done while rank 0 meta-tests. Python's own end aborted about one in fifty of
    them, while a thread of the backend was still freeing tensors.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def run_as_script(main: Callable[[], None], script: str, user_errors: tuple[type[Exception], ...]) -> None:
    """main(), with one sentence and exit code 1 for a user's mistake, a full disk, Ctrl-C and
    SIGTERM. script: its file's name."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(os, "register_at_fork"):  # environments' processes end at SIGTERM without a word
        os.register_at_fork(after_in_child=partial(signal.signal, signal.SIGTERM, signal.SIG_DFL))
    try:
        main()
    except user_errors as error:
        sys.exit(f"{script}: {error}".replace("\n", " "))
    except (OSError, MemoryError, RuntimeError) as error:
        if not (reason := sentence(error)):
            raise
        sys.exit(f"{script}: {reason}")
    except KeyboardInterrupt:
        how = "continue with --resume and the run's folder, or the same command and --run-name."
        sys.exit(f"\n{script}: stopped; {how}")
    finally:
        release()
    end_other_ranks()
