"""`python -m promoe.cli.launch PARENT_PID MODULE ARG…`: runs a module that dies with its parent.

The kernel kills this process when the thread that started it ends, however that came to be (prctl(2),
PR_SET_PDEATHSIG), so that a supervisor that was killed leaves nothing behind. It is done here, after exec, because
`preexec_fn` is unsafe in a process with threads.
"""

import ctypes
import os
import runpy
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def die_with_parent(parent_pid: int) -> None:
    """Asks the kernel for it; exits at once when the parent is gone already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        sys.exit(1)


def main() -> None:
    """Becomes the module."""
    parent_pid, module, *arguments = sys.argv[1:]
    die_with_parent(int(parent_pid))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
