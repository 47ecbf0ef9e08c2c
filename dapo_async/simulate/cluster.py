"""What a simulation is given and what it answers: the machines and their speed, and what a run did on them.

``run_facts`` measures a ``Cluster``, ``simulate`` turns it into an ``Outcome``, ``plan`` compares outcomes.
"""

from msgspec import Struct


class Cluster(Struct, frozen=True, kw_only=True):
    """Machines and how fast they are. Times in seconds."""

    workers: int = 1
    slots: int = 64  # completions decoded at the same time per worker
    prefetch_groups: int = 2  # leases a worker holds beyond those that fill its slots
    step_s: float  # a of a decode step of n completions: a + b * n
    step_row_s: float  # b
    group_s: float = 0.0  # a worker's pause per group: reading the prompt, judging in its own thread
    verdict_s: float = 0.0  # from a group's last token until its verdicts are there, without holding up the worker
    train_batch_s: float = 0.0  # a learner's time per batch
    train_token_s: float = 0.0  # and per completion token of it
    learners: float = 1.0  # a factor on the learner's speed
    publish_s: float = 0.0  # the learner's own time per push
    push_s: float = 0.0  # from the push until the weights are at the workers
    swap_s: float = 0.0  # a worker's pause per swap
    push_every: int = 1
    mtbf_s: float = 0.0  # mean time between failures of one worker; 0: none fails
    restart_s: float = 60.0


class Outcome(Struct, kw_only=True):
    """What a simulated run did after its warm-up."""

    seconds: float  # virtual
    batches: int
    groups_per_s: float  # trained
    tokens_per_s: float  # trained
    generated_tokens_per_s: float
    learner: dict[str, float]  # shares of its time: train, publish, wait_CAUSE
    workers: dict[str, float]  # shares of all workers' time: decode, group, swap, idle, down
    running_mean: float  # completions per decode step
    staleness: dict[int, int]  # groups trained, by staleness
    trained_generated_ratio: float  # mean length trained over mean length accepted
    late: int
    reissued: int
    account: dict[str, int]  # leased, in_flight, buffered, settled, of the whole run
    events: int  # of the simulation, of the whole run
