"""ZeroMQ around ``schedule``: the learner's side of the control socket, in one thread of the learner's process.

It owns the control socket, the only ``Schedule`` and the ``Handlers`` that acts on messages. The thread waits for
messages (woken by workers, by the learner's calls and by the heartbeat); the learner waits in ``next_batch``, woken
whenever a message has been handled. One lock guards all three. Whatever ends the thread is raised by ``check``.
"""

import secrets
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dapo_async.config.settings import Config
from dapo_async.coordinator.evaluation import EvaluationJob
from dapo_async.coordinator.groups import GroupLengths, GroupStore, RolloutGroup
from dapo_async.coordinator.handlers import Handlers
from dapo_async.coordinator.progress import Arrivals, BatchWait, WaitReport
from dapo_async.coordinator.workers import ConnectedWorker, Incarnation
from dapo_async.data.prompts import PromptStream
from dapo_async.errors import StallError, WeightsError
from dapo_async.schedule.schedule import Batch, Schedule
from dapo_async.system.background import Background
from dapo_async.transport.curve import ListenerKeys
from dapo_async.transport.messages import FROM_LEARNER, PROOF, Codec, Message
from dapo_async.transport.sockets import Listener

THREAD = "coordinator"


class TrainBatch(NamedTuple):
    """A batch for the learner."""

    groups: list[RolloutGroup]
    version: int
    late: int
    waited_s: dict[str, float]  # seconds by cause: generation, straggler, publish, workers


class CoordinatorStatus(NamedTuple):
    """How it stands at one moment."""

    version: int
    leased: int  # since the start of the run
    in_flight: int  # leases
    buffered: int  # groups, the batch that is being trained included
    buffered_tokens: int
    capacity: int  # groups that may be outstanding
    workers: list[ConnectedWorker]
    disconnects: int  # connections that ended in this life, as the socket counts them
    publish_lag_s: float | None  # from the newest publication that all workers have come to serve until they did


class Coordinator:
    """See the module. Methods may be called from any thread."""

    def __init__(
        self,
        config: Config,
        prompts: PromptStream,
        *,
        vocab_size: int,
        weights_address: str,
        incarnation: Incarnation,
        keys: ListenerKeys | None = None,
    ) -> None:
        self.config = config
        self.prompts = prompts
        self.schedule = Schedule(config.schedule, len(prompts) if config.data.epochs else None)
        self.handlers = Handlers(
            config,
            self.schedule,
            prompts,
            vocab_size=vocab_size,
            weights_address=weights_address,
            incarnation=incarnation,
            send=self._send,
        )
        self._store = GroupStore(prompts)
        self._codec = Codec(FROM_LEARNER)
        self._changed = threading.Condition()
        self._outbox: deque[tuple[bytes, Message]] = deque()  # from other threads
        self._wait = BatchWait(config.schedule)
        self._disconnects = 0
        self._stop_reason: str | None = None
        self._closing = False
        network = config.network
        self._listener = Listener(
            # Twice the limit, so that what is moderately too large is still read, refused and counted.
            network.control,
            max_message_bytes=network.max_message_mb << 21,
            insecure=network.insecure,
            keys=keys,
            count_disconnects=True,
        )
        self._thread = Background(THREAD, self._serve)

    # --- the learner's side -------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Where workers connect."""
        return self._listener.address

    def start(self) -> None:
        """Begin to serve workers."""
        self._thread.start()

    def check(self) -> None:
        """Raise ``DapoError`` if the thread ended, ``WeightsError`` if every connected worker refuses the weights."""
        self._thread.check()
        with self._changed:
            refusals = self.handlers.refusals()
        if refusals:
            raise WeightsError(f"no worker can serve what the learner published: {'; '.join(refusals[:5])}")

    def next_batch(self, tick: Callable[[str], None], ended: Callable[[], bool]) -> TrainBatch | None:
        """Wait for a full batch; None when the prompts are used up or ``ended()``.

        ``tick`` is called about four times a second with what is waited for, and may raise. Raises ``StallError``
        when no group has arrived for ``run.stall_timeout_s``, with a report of who is waited for, and when groups
        arrive but ``schedule.max_filtered_batches`` are filtered and no batch forms.
        """
        waited: defaultdict[str, float] = defaultdict(float)
        cause, arrived = "", self._arrived()
        heard = last = time.monotonic()
        self._wait.begin(heard)
        while not ended():
            self.check()
            tick(cause)
            with self._changed:
                drawn = self.schedule.draw()
                if isinstance(drawn, Batch):
                    self._wait.batch_drawn(self._counts())
                    self.handlers.cancel(drawn.cancelled)
                    groups = [entry.value for entry in drawn.entries]
                    self._listener.wake()
                    return TrainBatch(groups, drawn.version, drawn.late, dict(waited))
                if drawn.cause == "exhausted":
                    return None
                if drawn.cause == "generation":  # a straggler may be waited for while others are filtered
                    self._wait.check(self._counts())
                cause = self.schedule.cause_of(drawn, bool(self.handlers.workers))
                self._changed.wait(timeout=0.25)
            now = time.monotonic()
            waited[cause] += now - last
            last = now
            if self._arrived() != arrived:
                heard, arrived = now, self._arrived()
            if now - heard > self.config.run.stall_timeout_s:
                raise StallError(self.stall_report(cause, now - heard))
        return None

    @property
    def version(self) -> int:
        """Batches trained so far."""
        return self.schedule.version

    @property
    def published(self) -> int:
        """Newest version that workers can fetch."""
        return self.schedule.published

    def status(self) -> CoordinatorStatus:
        """How everything stands now."""
        with self._changed:
            schedule = self.schedule
            return CoordinatorStatus(
                version=schedule.version,
                leased=schedule.leased,
                in_flight=schedule.in_flight,
                buffered=schedule.buffered,
                buffered_tokens=schedule.buffered_tokens,
                capacity=schedule.capacity,
                workers=list(self.handlers.workers.values()),
                disconnects=self._disconnects,
                publish_lag_s=self.handlers.lag.seconds,
            )

    def counts(self) -> Counter[str]:
        """What has happened since the start of the run, through resumes: groups, tokens, leases, refusals, losses."""
        with self._changed:
            return self._counts()

    def take_lengths(self) -> list[GroupLengths]:
        """The groups that arrived since the last call, filtered ones included; of very many, the newest."""
        with self._changed:
            return self.handlers.tally.take_lengths()

    def report(self) -> WaitReport | None:
        """What came since the last batch, if it is time to tell; for a learner that waits."""
        with self._changed:
            return self._wait.report(self._counts(), time.monotonic())

    def arrivals(self) -> Arrivals:
        """What came since the last batch."""
        with self._changed:
            return self._wait.arrivals(self._counts())

    def batch_trained(self) -> int:
        """The batch has been trained. Returns the new version."""
        with self._changed:
            version = self.schedule.batch_trained()
        self._listener.wake()
        return version

    def announce(self, version: int) -> None:
        """Workers can fetch this version from now on."""
        with self._changed:
            self.handlers.published(version)
        self._listener.wake()

    def withdraw(self) -> None:
        """Issue no training lease any more, and cancel those that run; they stay in flight."""
        with self._changed:
            self.handlers.withdraw()

    def evaluate(self, job: EvaluationJob) -> None:
        """Have the workers answer ``job``'s prompts. A job still running is given up."""
        with self._changed:
            self.handlers.evaluate(job)
        self._listener.wake()

    def worker_ended(self, name: str) -> None:
        """The supervisor saw this worker end: its leases are issued again at once."""
        with self._changed:
            self.handlers.ended(name)
        self._listener.wake()

    def reserve(self, names: Sequence[str]) -> dict[str, str]:
        """Keep these names for workers that this process starts. Returns the environment that they need for it."""
        proof = secrets.token_hex(16)
        with self._changed:
            self.handlers.reserve(names, proof)
        return {PROOF: proof}

    def stop_workers(self, reason: str) -> None:
        """Ask all workers, present and future, to end."""
        with self._changed:
            self._stop_reason = reason
        self._listener.wake()

    def workers(self) -> list[ConnectedWorker]:
        """The connected workers."""
        with self._changed:
            return list(self.handlers.workers.values())

    def gone(self) -> dict[str, ConnectedWorker]:
        """Workers that were lost and have not come back, by name."""
        with self._changed:
            return dict(self.handlers.gone)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on."""
        with self._changed:
            return {"schedule": self.schedule.state(self._store.encode), "counts": dict(self.handlers.counts)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, for which ``deadlines.check_room`` has found room; call before ``start``."""
        self.schedule.restore(state["schedule"], self._store.decode)
        self.handlers.resume(_counts_of(state))
        self._wait.batch_drawn(self._counts())

    def stall_report(self, cause: str, waited_s: float) -> str:
        """Who waits for what, on one screen."""
        now = time.monotonic()
        with self._changed:
            running = list(self.schedule.running())
            lines = [
                f"the learner waited {waited_s:.0f} s for a batch ({cause}), longer than run.stall_timeout_s",
                f"version {self.schedule.version}, published {self.schedule.published}, "
                f"in flight {self.schedule.in_flight}, buffered {self.schedule.buffered} "
                f"of {self.schedule.batch_size} needed, admission {self.schedule.admission()}",
            ]
            for record in running[:5]:
                age = f"for {now - record.issued_at:.0f} s" if record.worker else "waiting for a worker"
                lines.append(f"lease {record.lease} with {record.worker or 'nobody'} {age}")
            lines.extend(worker.standing(now) for worker in self.handlers.workers.values())
            if not self.handlers.workers:
                lines.append("no worker is connected")
        return "\n  ".join(lines)

    def close(self) -> None:
        """Tell the workers to stop, end the thread, close the socket."""
        self.stop_workers(self._stop_reason or "the learner has ended")
        self._closing = True
        self._listener.wake()
        try:
            self._thread.join(timeout_s=10.0)
        finally:
            self._listener.close()

    # --- the thread ---------------------------------------------------------------------------------------

    def _serve(self) -> None:
        beat_s = self.config.network.heartbeat_s
        next_beat = time.monotonic()
        while True:
            closing = self._closing
            received = None if closing else self._listener.receive(max(0.0, next_beat - time.monotonic()))
            with self._changed:
                while self._outbox:
                    self._send(*self._outbox.popleft())
                if received is not None:
                    self.handlers.receive(*received)
                    self._changed.notify_all()
                now = time.monotonic()
                if now >= next_beat:
                    self._beat(now, now - next_beat)
                    next_beat = now + beat_s
                if self._stop_reason is not None:
                    self.handlers.stop(self._stop_reason)
                    if closing:
                        return
                else:
                    self.handlers.issue(now)

    def _beat(self, now: float, late_s: float) -> None:
        if late_s > self.config.network.heartbeat_s:  # this process stood still, and heard nobody meanwhile
            for worker in [*self.handlers.workers.values(), *self.handlers.gone.values()]:
                worker.forgive(late_s)
        self.handlers.beat(now)
        self._disconnects = self._listener.disconnects()

    def _arrived(self) -> int:
        """Groups of any kind: while an evaluation goes on, nothing has stalled."""
        return self.handlers.counts["groups"] + self.handlers.counts["evaluated"]

    def _counts(self) -> Counter[str]:
        counts = self.handlers.counts.copy()
        counts.update(self.schedule.counts)
        return counts

    def _send(self, identity: bytes, message: Message) -> bool:
        """Send, or leave the message for the thread that owns the socket. Called with the lock held."""
        if threading.current_thread().name != THREAD:
            self._outbox.append((identity, message))
            self._listener.wake()
            return True
        return self._listener.send(identity, self._codec.encode(message))


def _counts_of(state: dict[str, Any]) -> dict[str, int]:
    """The counts of a checkpoint. Older ones keep them in three places, and count duplicates twice."""
    if "counts" in state:
        return dict(state["counts"])
    drops = {name: count for name, count in state["drops"].items() if name != "duplicate"}
    return {**state["tally"], **drops, "workers_lost": state["workers_lost"]}
