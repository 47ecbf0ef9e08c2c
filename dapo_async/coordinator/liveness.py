"""Keeps this machine's workers working: kills those that hang, and tells the coordinator who has ended.

The coordinator hears who is silent, the supervisor owns the processes, and neither knows the other.
What becomes of the leases of a worker that is gone: ``Handlers.lose``, ``Schedule.lose_worker``.
"""

import logging

from dapo_async.coordinator.coordinator import Coordinator
from dapo_async.coordinator.supervisor import Supervisor

log = logging.getLogger(__name__)


def look_after(supervisor: Supervisor, coordinator: Coordinator) -> None:
    """Notice every ending, and end what hangs, so that it starts again. Raises ``WorkerError`` when the last one is
    given up and no worker of another machine is connected; if those leave later, it is a stall like any other.

    A worker that was lost has as long to come back as one may take to start: it may only be slow. And no longer than
    leaves a run with this one worker half of its patience for the restart. One that still loads its model cannot beat,
    and starting over would not make it faster: it is left alone.
    """
    limits = coordinator.config
    grace_s = min(limits.workers.start_timeout_s, limits.run.stall_timeout_s / 2)
    for name, worker in coordinator.gone().items():
        if worker.capacity and worker.silent_s > worker.patience_s(limits) + grace_s:
            supervisor.kill(name, f"silent for {worker.silent_s:.0f} s")
    for ended in supervisor.poll(lambda: [worker.name for worker in coordinator.workers()]):
        coordinator.worker_ended(ended.name)
        if ended.restart_in_s is None:
            then = f"is given up (workers still connected: {len(coordinator.workers())})"
        else:
            then = f"starts again in {ended.restart_in_s:.1f} s"
        log.warning("worker %s ended with %s and %s; its last lines:\n%s", ended.name, ended.reason, then, ended.tail)
