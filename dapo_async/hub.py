"""ZeroMQ around ``schedule``: the learner's side of the control socket, in one thread of the learner's process.

It owns the control socket, the table of workers, and the only ``Schedule``. The thread waits for messages
(woken by workers, by ``wake`` and by the heartbeat); the learner waits in ``next_batch``, woken whenever a group
is accepted. One lock guards the schedule. Whatever ends the thread is raised in the learner by ``check``.
"""

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

from dapo_async.channels import Background, Listener
from dapo_async.config import Config
from dapo_async.errors import ProtocolError, StallError
from dapo_async.evaluation import EvaluationJob
from dapo_async.intake import Answer, AnswerStore, Tally, check_claims, lease_seed, plain, version_range
from dapo_async.prompts import PromptStream
from dapo_async.protocol import (
    FROM_LEARNER,
    FROM_WORKER,
    Ack,
    Beat,
    Cancel,
    Codec,
    Group,
    Hello,
    LearnerBeat,
    Lease,
    Message,
    Refused,
    Reintroduce,
    Released,
    Stop,
    Welcome,
)
from dapo_async.schedule import Batch, LeaseRecord, Schedule

log = logging.getLogger(__name__)
MAX_REFUSALS = 5  # in a row; then the worker is told to stop, so that its supervisor reports it


class Peer:
    """A connected worker."""

    def __init__(self, identity: bytes, hello: Hello, now: float) -> None:
        self.identity = identity
        self.name = hello.worker
        self.engine = hello.engine
        self.capacity = hello.capacity
        self.version = hello.version
        self.last_seen = now
        self.leases: set[tuple[str, int]] = set()  # (kind, number) it holds
        self.refusals = 0
        self.beat = Beat(version=hello.version, running=0)


class Drawn(NamedTuple):
    """A batch for the learner."""

    answers: list[Answer]
    version: int
    late: int
    waited_s: dict[str, float]  # seconds by cause: generation, straggler, publish, workers


class Incarnation(NamedTuple):
    """One life of one run: a run that is resumed keeps its ``run_id`` and counts its lives."""

    run_id: str
    life: int

    @property
    def name(self) -> str:
        """How it is written on leases."""
        return f"{self.run_id}.{self.life}"


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
    ) -> None:
        self.config = config
        self.prompts = prompts
        self.schedule = Schedule(config.schedule, len(prompts) if config.data.epochs else None)
        self.tally = Tally()
        self.drops: Counter[str] = Counter()
        self.workers_lost = 0
        self._vocab_size = vocab_size
        self._weights_address = weights_address
        self.incarnation = incarnation.name  # on every lease and group
        self._run_id = incarnation.run_id
        self._resumed_version = 0
        self._store = AnswerStore(prompts)
        self._codec_in, self._codec_out = Codec(FROM_WORKER), Codec(FROM_LEARNER)
        self._peers: dict[bytes, Peer] = {}
        self._evaluation: EvaluationJob | None = None
        self._changed = threading.Condition()
        self._unserved: dict[int, float] = {}  # versions some worker does not serve yet, and when they were published
        self.lag_s: float | None = None  # from publishing the newest version all workers serve until they did
        self._withdrawn = False
        self._stop_reason: str | None = None
        self._closing = False
        network = config.network
        self._listener = Listener(
            network.control, max_message_bytes=network.max_message_mb << 20, insecure=network.insecure
        )
        self._thread = Background("hub", self._serve)

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

    def next_batch(self, tick: Callable[[], None], ended: Callable[[], bool]) -> Drawn | None:
        """Wait for a full batch; None when the prompts are used up or ``ended()``.

        ``tick`` is called about four times a second and may raise. Raises ``StallError`` after
        ``run.stall_timeout_s``, with a report of who is waited for.
        """
        waited: defaultdict[str, float] = defaultdict(float)
        started = last = time.monotonic()
        while not ended():
            self.check()
            tick()
            with self._changed:
                drawn = self.schedule.draw()
                if isinstance(drawn, Batch):
                    self._cancel(drawn.cancelled)
                    answers = [entry.value for entry in drawn.entries]
                    self._listener.wake()
                    return Drawn(answers, drawn.version, drawn.late, dict(waited))
                if drawn.cause == "exhausted":
                    return None
                cause = self._cause(drawn.cause)
                self._changed.wait(timeout=0.25)
            now = time.monotonic()
            waited[cause] += now - last
            last = now
            if now - started > self.config.run.stall_timeout_s:
                raise StallError(self.stall_report(cause, now - started))
        return None

    def batch_trained(self) -> int:
        """The batch has been trained. Returns the new version."""
        with self._changed:
            version = self.schedule.batch_trained()
        self._listener.wake()
        return version

    def published(self, version: int) -> None:
        """Workers can fetch this version from now on."""
        with self._changed:
            self.schedule.published = max(self.schedule.published, version)
            self._unserved[version] = time.monotonic()
        self._listener.wake()

    def withdraw(self) -> None:
        """Stop training leases: none is issued any more, and those that run are cancelled (and stay in flight)."""
        with self._changed:
            self._withdrawn = True
            running = [record for record in self.schedule.running() if record.worker is not None]
            self._cancel(running)
            for record in running:
                self.schedule.release(str(record.worker), [record.number])

    def evaluate(self, job: EvaluationJob) -> None:
        """Have the workers answer ``job``'s prompts, before anything else. One job at a time."""
        with self._changed:
            assert self._evaluation is None or self._evaluation.done, "one evaluation at a time"
            self._evaluation = job
        self._listener.wake()

    def worker_ended(self, name: str) -> None:
        """The supervisor saw this worker end: its leases are issued again at once."""
        with self._changed:
            for peer in [p for p in self._peers.values() if p.name == name]:
                self.workers_lost += 1
                self._lose(peer, "its process ended")
        self._listener.wake()

    def stop_workers(self, reason: str) -> None:
        """Ask all workers, present and future, to end."""
        with self._changed:
            self._stop_reason = reason
        self._listener.wake()

    def peers(self) -> list[Peer]:
        """The connected workers."""
        with self._changed:
            return list(self._peers.values())

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on."""
        with self._changed:
            return {
                "schedule": self.schedule.state(self._store.encode),
                "tally": dict(self.tally.totals),
                "drops": dict(self.drops),
                "workers_lost": self.workers_lost,
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; call before ``start``."""
        self.schedule.restore(state["schedule"], self._store.decode)
        self._resumed_version = self.schedule.version
        self.tally.totals.update(state["tally"])
        self.drops.update(state["drops"])
        self.workers_lost = state["workers_lost"]

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
            for peer in self._peers.values():
                lines.append(
                    f"worker {peer.name}: last heard {now - peer.last_seen:.1f} s ago, weights {peer.version}, "
                    f"{len(peer.leases)} leases, decoding {peer.beat.running}"
                )
            if not self._peers:
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
                if received is not None:
                    self._receive(*received)
                now = time.monotonic()
                if now >= next_beat:
                    self._beat(now)
                    next_beat = now + beat_s
                if self._stop_reason is not None:
                    for peer in self._peers.values():
                        self._send(peer.identity, Stop(reason=self._stop_reason))
                    if closing:
                        return
                else:
                    self._issue(now)

    def _receive(self, identity: bytes, frames: list[memoryview]) -> None:
        try:
            message = self._codec_in.decode(list(frames))
            peer = self._peers.get(identity)
            if isinstance(message, Hello):
                self._welcome(identity, message)
            elif peer is None:
                self._send(identity, Reintroduce())
            else:
                peer.last_seen = time.monotonic()
                self._handle(peer, message)
        except ProtocolError as error:
            self._refuse(identity, error)

    def _handle(self, peer: Peer, message: Message) -> None:
        if isinstance(message, Beat):
            peer.version, peer.beat = message.version, message
            self._note_lag()
        elif isinstance(message, Group):
            self._group(peer, message)
        elif isinstance(message, Released):
            for number in self.schedule.release(peer.name, message.leases):
                peer.leases.discard(("train", number))
            log.info("worker %s gave back leases %s: %s", peer.name, message.leases, message.reason)

    def _welcome(self, identity: bytes, hello: Hello) -> None:
        peer = self._peers.get(identity)
        if peer is None or peer.name != hello.worker:
            for other in [p for p in self._peers.values() if p.name == hello.worker or p.identity == identity]:
                self._lose(other, "another connection took its name")
            peer = self._peers[identity] = Peer(identity, hello, time.monotonic())
            if hello.incarnation == self.incarnation:
                peer.leases = {("train", number) for number in self.schedule.reclaim(peer.name, hello.holding)}
            log.info("worker %s joined from %s", peer.name, hello.host)
        peer.capacity, peer.version, peer.last_seen = hello.capacity, hello.version, time.monotonic()
        self._send(
            identity,
            Welcome(incarnation=self.incarnation, weights_address=self._weights_address, config=plain(self.config)),
        )

    def _group(self, peer: Peer, group: Group) -> None:
        key = (group.kind, group.lease)
        peer.leases.discard(key)
        try:
            outcome = self._accept_evaluation(group) if group.kind == "eval" else self._accept(peer, group)
        except ProtocolError as error:
            self.drops[f"refused_{error.reason}"] += 1
            peer.refusals += 1
            self.schedule.release(peer.name, [group.lease] if group.kind == "train" else [])
            if group.kind == "eval" and self._evaluation is not None:
                self._evaluation.give_back([group.lease])
            log.warning("group %d of worker %s refused: %s", group.lease, peer.name, error)
            self._send(peer.identity, Ack(lease=group.lease, kind=group.kind, outcome="refused", detail=str(error)))
            if peer.refusals >= MAX_REFUSALS:
                self._send(peer.identity, Stop(reason=f"{peer.refusals} groups in a row were refused, last: {error}"))
                self._lose(peer, "its groups were refused again and again")
            return
        peer.refusals = 0
        self._send(peer.identity, Ack(lease=group.lease, kind=group.kind, outcome=outcome))
        self._changed.notify_all()

    def _accept(self, peer: Peer, group: Group) -> str:
        record = self.schedule.lease(group.lease)
        oldest, newest = version_range(group)
        if group.incarnation != self.incarnation and not (
            group.incarnation.rpartition(".")[0] == self._run_id and newest <= self._resumed_version
        ):
            raise ProtocolError("incarnation", f"sampled for {group.incarnation}, this is {self.incarnation}")
        if record is not None:
            check_claims(
                group,
                num_samples=self.config.sampling.group_size,
                max_tokens=self.config.sampling.max_tokens,
                vocab_size=self._vocab_size,
                newest_version=self.schedule.version,
            )
            answer = Answer(group.lease, record.position, self.prompts[record.position], group, peer.name)
            outcome = self.schedule.complete(group.lease, oldest, len(group.token_ids), answer.correct, answer)
        else:
            outcome = self.schedule.complete(group.lease, oldest, 0, [], None)
        if outcome in ("unknown_lease", "too_old"):
            raise ProtocolError(outcome, f"lease {group.lease}, oldest version {oldest}")
        if outcome == "duplicate":
            self.drops["duplicate"] += 1
        else:
            self.tally.add(group, outcome)
            if record is not None and record.worker not in (None, peer.name):
                self._cancel([record])
        return outcome

    def _accept_evaluation(self, group: Group) -> str:
        job = self._evaluation
        if job is None or group.incarnation != self.incarnation or not job.wants(group.lease):
            self.drops["duplicate"] += 1
            return "duplicate"
        check_claims(
            group,
            num_samples=job.samples,
            max_tokens=job.max_tokens,
            vocab_size=self._vocab_size,
            newest_version=self.schedule.version,
        )
        job.add(group)
        return "accepted"

    def _issue(self, now: float) -> None:
        """Give leases to workers with room, evaluation first, the emptiest worker first."""
        while True:
            free = [p for p in self._peers.values() if len(p.leases) < p.capacity]
            if not free:
                return
            peer = min(free, key=lambda p: len(p.leases) / p.capacity)
            lease = self._next_evaluation() or self._next_lease(peer, now)
            if lease is None:
                return
            peer.leases.add((lease.kind, lease.number))
            if not self._send(peer.identity, lease):
                self._lose(peer, "its connection is gone")

    def _next_evaluation(self) -> Lease | None:
        number = self._evaluation.next_lease() if self._evaluation is not None else None
        if number is None or self._evaluation is None:
            return None
        return self._evaluation.lease(number, self.incarnation, self.config.run.seed)

    def _next_lease(self, peer: Peer, now: float) -> Lease | None:
        record = None if self._withdrawn else self.schedule.issue(peer.name, peer.version, now)
        if record is None:
            return None
        prompt, sampling = self.prompts[record.position], self.config.sampling
        return Lease(
            number=record.number,
            incarnation=self.incarnation,
            prompt_id=prompt.id,
            truth=prompt.truth,
            prompt_ids=prompt.ids,
            num_samples=sampling.group_size,
            seed=lease_seed(self.config.run.seed, record.number),
            min_version=record.oldest,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
        )

    def _beat(self, now: float) -> None:
        for peer in list(self._peers.values()):
            # A worker that still loads its model (capacity 0) cannot beat yet.
            patience = self.config.network.silence_s if peer.capacity else self.config.workers.start_timeout_s
            if now - peer.last_seen > patience:
                self.workers_lost += 1
                self._lose(peer, f"silent for {now - peer.last_seen:.1f} s")
            else:
                self._send(peer.identity, LearnerBeat(version=self.schedule.version))

    def _cancel(self, records: list[LeaseRecord]) -> None:
        for peer in self._peers.values():
            numbers = [r.number for r in records if r.worker == peer.name]
            if numbers:
                peer.leases -= {("train", number) for number in numbers}
                self._send(peer.identity, Cancel(leases=numbers))

    def _lose(self, peer: Peer, why: str) -> None:
        """Forget a worker; what it held is issued again."""
        self._peers.pop(peer.identity, None)
        again = self.schedule.lose_worker(peer.name)
        if self._evaluation is not None:
            self._evaluation.give_back([number for kind, number in peer.leases if kind == "eval"])
        log.warning("worker %s is gone (%s); leases issued again: %s", peer.name, why, again or "none")

    def _note_lag(self) -> None:
        served = min((p.version for p in self._peers.values() if p.capacity), default=-1)
        for version in [v for v in self._unserved if v <= served]:
            self.lag_s = time.monotonic() - self._unserved.pop(version)

    def _refuse(self, identity: bytes, error: ProtocolError) -> None:
        self.drops[f"refused_{error.reason}"] += 1
        log.warning("message refused: %s", error)
        self._send(identity, Refused(reason=error.reason, detail=error.detail))

    def _cause(self, cause: str) -> str:
        if not self._peers:
            return "workers"
        if cause == "generation" and not self.schedule.in_flight and self.schedule.admission() == "publish":
            return "publish"
        return cause

    def _send(self, identity: bytes, message: Message) -> bool:
        return self._listener.send(identity, self._codec_out.encode(message))
