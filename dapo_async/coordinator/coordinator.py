"""ZeroMQ around ``schedule``: the learner's side of the control socket, in one thread of the learner's process.

It owns the control socket, the only ``Schedule`` and the ``Reception`` that acts on messages. The thread waits for
messages (woken by workers, by the learner's calls and by the heartbeat); the learner waits in ``next_batch``, woken
whenever a message has been handled. One lock guards all three. Whatever ends the thread is raised by ``check``.
"""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

from dapo_async.config.settings import Config
from dapo_async.coordinator.evaluation import EvaluationJob
from dapo_async.coordinator.groups import Answer, AnswerStore
from dapo_async.coordinator.handlers import Reception
from dapo_async.coordinator.progress import BatchWait, Came, News
from dapo_async.coordinator.workers import Incarnation, Peer
from dapo_async.data.prompts import PromptStream
from dapo_async.errors import StallError
from dapo_async.schedule.schedule import Batch, Schedule
from dapo_async.system.background import Background
from dapo_async.transport.curve import ListenerKeys
from dapo_async.transport.messages import FROM_LEARNER, Codec, Message
from dapo_async.transport.sockets import Listener

THREAD = "hub"


class Drawn(NamedTuple):
    """A batch for the learner."""

    answers: list[Answer]
    version: int
    late: int
    waited_s: dict[str, float]  # seconds by cause: generation, straggler, publish, workers


class Hub:
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
        self.reception = Reception(
            config,
            self.schedule,
            prompts,
            vocab_size=vocab_size,
            weights_address=weights_address,
            incarnation=incarnation,
            send=self._send,
        )
        self._store = AnswerStore(prompts)
        self._codec = Codec(FROM_LEARNER)
        self._changed = threading.Condition()
        self._outbox: deque[tuple[bytes, Message]] = deque()  # from other threads
        self._wait = BatchWait(config.schedule)
        self.disconnects = 0  # connections that ended, as the socket counts them
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
        """Raise ``DapoError`` if the thread ended."""
        self._thread.check()

    def next_batch(self, tick: Callable[[str], None], ended: Callable[[], bool]) -> Drawn | None:
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
                    self._wait.batch_drawn(self._totals())
                    self.reception.cancel(drawn.cancelled)
                    answers = [entry.value for entry in drawn.entries]
                    self._listener.wake()
                    return Drawn(answers, drawn.version, drawn.late, dict(waited))
                if drawn.cause == "exhausted":
                    return None
                if drawn.cause == "generation":  # a straggler may be waited for while others are filtered
                    self._wait.check(self._totals())
                cause = self._cause(drawn.cause)
                self._changed.wait(timeout=0.25)
            now = time.monotonic()
            waited[cause] += now - last
            last = now
            if self._arrived() != arrived:
                heard, arrived = now, self._arrived()
            if now - heard > self.config.run.stall_timeout_s:
                raise StallError(self.stall_report(cause, now - heard))
        return None

    def news(self) -> News | None:
        """What came since the last batch, if it is time to tell; for a learner that waits."""
        with self._changed:
            return self._wait.news(self._totals(), time.monotonic())

    def came(self) -> Came:
        """What came since the last batch."""
        with self._changed:
            return self._wait.came(self._totals())

    def batch_trained(self) -> int:
        """The batch has been trained. Returns the new version."""
        with self._changed:
            version = self.schedule.batch_trained()
        self._listener.wake()
        return version

    def published(self, version: int) -> None:
        """Workers can fetch this version from now on."""
        with self._changed:
            self.reception.published(version)
        self._listener.wake()

    def withdraw(self) -> None:
        """Issue no training lease any more, and cancel those that run; they stay in flight."""
        with self._changed:
            self.reception.withdraw()

    def evaluate(self, job: EvaluationJob) -> None:
        """Have the workers answer ``job``'s prompts. A job still running is given up."""
        with self._changed:
            self.reception.evaluate(job)
        self._listener.wake()

    def worker_ended(self, name: str) -> None:
        """The supervisor saw this worker end: its leases are issued again at once."""
        with self._changed:
            self.reception.ended(name)
        self._listener.wake()

    def stop_workers(self, reason: str) -> None:
        """Ask all workers, present and future, to end."""
        with self._changed:
            self._stop_reason = reason
        self._listener.wake()

    def peers(self) -> list[Peer]:
        """The connected workers."""
        with self._changed:
            return list(self.reception.peers.values())

    def gone(self) -> dict[str, Peer]:
        """Workers that were lost and have not come back, by name."""
        with self._changed:
            return dict(self.reception.gone)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on."""
        with self._changed:
            return {
                "schedule": self.schedule.state(self._store.encode),
                "tally": dict(self.reception.tally.totals),
                "drops": dict(self.reception.drops),
                "workers_lost": self.reception.workers_lost,
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, for which ``deadlines.check_room`` has found room; call before ``start``."""
        self.schedule.restore(state["schedule"], self._store.decode)
        self.reception.resumed_version = self.schedule.version
        self.reception.resumed_leases = self.schedule.leased
        self.reception.tally.totals.update(state["tally"])
        self.reception.drops.update(state["drops"])
        self.reception.workers_lost = state["workers_lost"]
        self._wait.batch_drawn(self._totals())

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
                lines.append(f"lease {record.number} with {record.worker or 'nobody'} {age}")
            lines.extend(peer.standing(now) for peer in self.reception.peers.values())
            if not self.reception.peers:
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
                    self.reception.receive(*received)
                    self._changed.notify_all()
                now = time.monotonic()
                if now >= next_beat:
                    self._beat(now, now - next_beat)
                    next_beat = now + beat_s
                if self._stop_reason is not None:
                    self.reception.stop(self._stop_reason)
                    if closing:
                        return
                else:
                    self.reception.issue(now)

    def _beat(self, now: float, late_s: float) -> None:
        if late_s > self.config.network.heartbeat_s:  # this process stood still, and heard nobody meanwhile
            for peer in [*self.reception.peers.values(), *self.reception.gone.values()]:
                peer.last_seen += late_s
        self.reception.beat(now)
        self.disconnects = self._listener.disconnects()

    def _arrived(self) -> int:
        """Groups of any kind: while an evaluation goes on, nothing has stalled."""
        return self.reception.tally.totals["groups"] + self.reception.num_evaluated

    def _totals(self) -> dict[str, int]:
        return {**self.reception.tally.totals, **self.schedule.settled}

    def _cause(self, cause: str) -> str:
        if not self.reception.peers:
            return "workers"
        if cause == "generation" and not self.schedule.in_flight and self.schedule.admission() == "publish":
            return "publish"
        return cause

    def _send(self, identity: bytes, message: Message) -> bool:
        """Send, or leave the message for the thread that owns the socket. Called with the lock held."""
        if threading.current_thread().name != THREAD:
            self._outbox.append((identity, message))
            self._listener.wake()
            return True
        return self._listener.send(identity, self._codec.encode(message))
