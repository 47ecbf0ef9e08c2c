"""The worker's program: ``python -m workers.start --connect ADDRESS --name NAME``; the rest comes with ``Welcome``.

``dapo-async work`` becomes it, and the supervisor starts it. PyTorch is loaded only after signals are in order: until
the worker can give leases back it has none, and Ctrl-C ends it at once. ``multiprocessing`` imports this module first
thing in every process that vLLM spawns, so each of them follows its parent's end before it does anything else.
"""

import argparse
import logging
import os
import platform
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

from dapo_async.errors import DapoError  # hides, as any import of dapo_async, what vLLM could not import
from dapo_async.transport.keys import worker_keys
from workers.parent import follow_parent

if TYPE_CHECKING:
    from workers.rollout import Rollout

log = logging.getLogger("worker")
PARENT = "DAPO_ASYNC_PARENT"  # names the parent's process to what it starts


def main(argv: list[str] | None = None) -> int:
    """Command line. Exit codes: 0 asked to stop, 1 trouble, 2 the user's mistake."""
    parser = argparse.ArgumentParser(prog="workers.start", description="A rollout worker of dapo-async.")
    parser.add_argument("--connect", required=True, help="control address of the learner, tcp://host:port")
    parser.add_argument("--name", default=f"{platform.node()}-{os.getpid()}", help="its name, and no other's")
    parser.add_argument("--engine", default="", help="torch or vllm; default: the run's")
    parser.add_argument("--keys", default="", help="folder of this worker's keys, if the learner encrypts")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    from workers.rollout import Rollout

    try:
        keys = worker_keys(arguments.keys) if arguments.keys else None
        rollout = Rollout(arguments.connect, arguments.name, arguments.engine, keys)
        _stop_on_signals(rollout)
        rollout.run()
    except DapoError as error:
        log.error("%s", error)
        return error.exit_code
    return 0


def _stop_on_signals(rollout: "Rollout") -> None:
    def handle(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # who asks twice does not want to wait
        rollout.stop(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


if __name__ == "__mp_main__":  # a process that multiprocessing spawned
    follow_parent(int(os.environ[PARENT]))
if __name__ in ("__main__", "__mp_main__"):
    os.environ[PARENT] = str(os.getpid())
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while modules load
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # ``dapo-async work`` held it back until here
    sys.exit(main())
