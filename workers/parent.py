"""Child processes of a worker end with it, however it ends."""

import ctypes
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def follow_parent(parent: int) -> None:
    """End with process ``parent``, which started this one; and leave Ctrl-C at a terminal to it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit("the worker has ended")  # before this could be asked for
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
