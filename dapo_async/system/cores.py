"""Who gets how many of the machine's cores, so that learner and workers do not fight for them.

Owned here: what ``threads = 0`` means, and the sentence about settings that ask for more than there is.

Learner and workers compute at the same time unless ``schedule.max_staleness`` is 0, when they take turns.
"""

import math
import os
from pathlib import Path

import msgspec

from dapo_async.config.settings import Config

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a Linux container: microseconds of processor time, and per how many


def num_cores(quota: Path = QUOTA) -> int:
    """Cores that this process may use, at least 1; in a container with a quota of processor time, what that buys."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        allowed, period = quota.read_text(encoding="ascii").split()
        return cores if allowed == "max" else max(1, min(cores, math.ceil(int(allowed) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no such system, or one that says it in another way
        return cores


def share_cores(config: Config, cores: int) -> Config:
    """``config`` with its threads resolved: 0 becomes an equal share of the cores that are left, at least 1.

    Threads that are given are taken off first. Workers on other machines (``workers.count`` = 0) get the value as if
    there were one here: what they share is not known.
    """
    learner, workers = config.learner.threads, config.workers.threads
    count, turns = max(1, config.workers.count), config.schedule.max_staleness == 0
    if turns:
        learner, workers = learner or cores, workers or cores // count
    elif not learner and not workers:
        learner = workers = cores // (count + 1)
    elif not learner:
        learner = cores - count * workers
    elif not workers:
        workers = (cores - learner) // count
    most = 256  # as config allows
    return msgspec.structs.replace(
        config,
        learner=msgspec.structs.replace(config.learner, threads=min(most, max(1, learner))),
        workers=msgspec.structs.replace(config.workers, threads=min(most, max(1, workers))),
    )


def crowding(config: Config, cores: int) -> str:
    """One sentence if the resolved ``config`` wants more threads at one time than there are ``cores``; else empty."""
    learner, count, each = config.learner.threads, config.workers.count, config.workers.threads
    turns = config.schedule.max_staleness == 0
    wanted = max(learner, count * each) if turns else learner + count * each
    if wanted <= cores:
        return ""
    return (
        f"learner.threads = {learner} and workers.count x workers.threads = {count} x {each} are {wanted} threads at "
        f"one time, for {cores} cores: they will wait for each other; set threads = 0 to share the cores"
    )
