"""What the learner says to each message of a worker: welcome, leases, acknowledgements, refusals.

Owns the table of workers, what each holds, and the counts of what was dropped; applies every message to the
``Schedule`` and the running evaluation. No thread and no socket: ``hub`` calls it under its lock with what arrived,
and it answers through ``send``.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable

from dapo_async.config.settings import Config
from dapo_async.config.toml import plain
from dapo_async.coordinator.evaluation import EvaluationJob
from dapo_async.coordinator.groups import Answer, Tally, check_claims, training_lease, version_range
from dapo_async.coordinator.workers import Incarnation, Peer, PublishLag
from dapo_async.data.prompts import PromptStream
from dapo_async.errors import ProtocolError
from dapo_async.schedule.schedule import LeaseRecord, Schedule
from dapo_async.transport.messages import (
    FROM_WORKER,
    Ack,
    Beat,
    Cancel,
    Codec,
    Group,
    Hello,
    Kind,
    LearnerBeat,
    Lease,
    Message,
    Refused,
    Reintroduce,
    Released,
    Stop,
    Welcome,
)

log = logging.getLogger(__name__)
MAX_REFUSALS = 5  # in a row; then the worker is told to stop, so that its supervisor reports it


class Reception:
    """See the module. ``send`` returns False if the worker is gone."""

    def __init__(
        self,
        config: Config,
        schedule: Schedule,
        prompts: PromptStream,
        *,
        vocab_size: int,
        weights_address: str,
        incarnation: Incarnation,
        send: Callable[[bytes, Message], bool],
    ) -> None:
        self.config = config
        self.schedule = schedule
        self.prompts = prompts
        self.peers: dict[bytes, Peer] = {}
        self.gone: dict[str, Peer] = {}  # lost and not come back, by name, as long as their process may live
        self.evaluation: EvaluationJob | None = None
        self.num_evaluated = 0  # held-out prompts answered, over all evaluations
        self.tally = Tally()
        self.drops: Counter[str] = Counter()
        self.workers_lost = 0
        self.withdrawn = False  # no training lease is issued any more
        self.lag = PublishLag()
        self._vocab_size = vocab_size
        self._welcome = Welcome(incarnation=incarnation.name, weights_address=weights_address, config=plain(config))
        self._incarnation = incarnation
        self.resumed_version = self.resumed_leases = 0  # of the checkpoint this life began with
        self._asked_who: set[bytes] = set()  # strangers asked since the last heartbeat
        self._codec = Codec(FROM_WORKER)
        self._send = send

    def stop(self, reason: str) -> None:
        """Ask all workers to end."""
        for peer in self.peers.values():
            self._send(peer.identity, Stop(reason=reason))

    def published(self, version: int) -> None:
        """Workers can fetch this version from now on."""
        self.schedule.published = max(self.schedule.published, version)
        self.lag.published(version)

    def ended(self, name: str) -> None:
        """This worker's process is no more."""
        for peer in [p for p in self.peers.values() if p.name == name]:
            self.workers_lost += 1
            self.lose(peer, "its process ended")
        self.gone.pop(name, None)

    def evaluate(self, job: EvaluationJob) -> None:
        """Lease ``job``'s prompts from now on, and those of a former job no more."""
        self.evaluation = job
        for peer in self.peers.values():
            numbers = peer.holds("eval")
            if numbers:
                peer.forget("eval", numbers)
                self._send(peer.identity, Cancel(leases=numbers, kind="eval"))

    def withdraw(self) -> None:
        """Issue no training lease any more, and cancel those that run; they stay in flight."""
        self.withdrawn = True
        running = [record for record in self.schedule.running() if record.worker is not None]
        self.cancel(running)
        for record in running:
            self.schedule.release(str(record.worker), [record.number])

    def receive(self, identity: bytes, frames: list[memoryview]) -> None:
        """Act on one message."""
        try:
            size, limit = sum(frame.nbytes for frame in frames), self.config.network.max_message_mb << 20
            if size > limit:
                raise ProtocolError("oversize", f"the message has {size} bytes, allowed are {limit}")
            message = self._codec.decode(list(frames))
            peer = self.peers.get(identity)
            if isinstance(message, Hello):
                self._greet(identity, message)
            elif peer is None:
                # Once: a learner that comes back finds everything that was sent meanwhile.
                if identity not in self._asked_who:
                    self._asked_who.add(identity)
                    self._send(identity, Reintroduce())
            else:
                peer.last_seen = time.monotonic()
                self._handle(peer, message)
        except ProtocolError as error:
            self._refuse(identity, error)

    def _handle(self, peer: Peer, message: Message) -> None:
        if isinstance(message, Beat):
            peer.version, peer.beat = message.version, message
            self.lag.served(self.peers.values())
            for number in self.evaluation.overtaken(peer) if self.evaluation is not None else ():
                self._take_back(peer, "eval", number)
            for key in peer.mislaid(message.holding, peer.last_seen - self.config.network.silence_s):
                log.warning("worker %s never got lease %s: it is issued again", peer.name, key)
                self._take_back(peer, *key)
        elif isinstance(message, Group):
            self._group(peer, message)
        elif isinstance(message, Released):  # sent by a worker that is ending
            self.lose(peer, message.reason)

    def _greet(self, identity: bytes, hello: Hello) -> None:
        peer = self.peers.get(identity)
        if peer is None or peer.name != hello.worker:
            for other in [p for p in self.peers.values() if p.name == hello.worker or p.identity == identity]:
                beat = LearnerBeat(version=self.schedule.version)
                if other.identity != identity and self._send(other.identity, beat):  # not if its process has ended
                    raise other.name_taken()
                self.lose(other, "another connection took its name")
            peer = self.peers[identity] = Peer(identity, hello, time.monotonic())
            self.gone.pop(peer.name, None)
            if hello.incarnation == self._incarnation.name:
                peer.take("train", self.schedule.reclaim(peer.name, hello.holding), peer.last_seen)
            log.info("worker %s joined from %s", peer.name, hello.host)
        peer.capacity, peer.version, peer.last_seen = hello.capacity, hello.version, time.monotonic()
        self._send(identity, self._welcome)

    def _group(self, peer: Peer, group: Group) -> None:
        peer.forget(group.kind, [group.lease])
        try:
            outcome = self._accept_evaluation(group) if group.kind == "eval" else self._accept(peer, group)
        except ProtocolError as error:
            self.drops[f"refused_{error.reason}"] += 1
            # What was sampled for a former life, or answers a lease that is gone, is no fault of the worker.
            peer.refusals += error.reason not in ("incarnation", "unknown_lease", "too_old")
            self._take_back(peer, group.kind, group.lease)
            log.warning("group %d of worker %s refused: %s", group.lease, peer.name, error)
            self._send(peer.identity, Ack(lease=group.lease, kind=group.kind, outcome="refused", detail=str(error)))
            if peer.refusals >= MAX_REFUSALS:
                self._send(peer.identity, Stop(reason=f"{peer.refusals} groups in a row were refused, last: {error}"))
                self.lose(peer, "its groups were refused again and again")
            return
        peer.refusals = 0
        self.tally.tell_failures(group, peer.name)
        if group.kind == "eval":
            # Before the acknowledgement: without a lease of the evaluation the worker would go on to newer weights.
            self._issue_evaluation(time.monotonic())
        self._send(peer.identity, Ack(lease=group.lease, kind=group.kind, outcome=outcome))

    def _accept(self, peer: Peer, group: Group) -> str:
        record = self.schedule.lease(group.lease)
        oldest, newest = version_range(group)
        if group.incarnation != self._incarnation.name and not (
            group.incarnation.rpartition(".")[0] == self._incarnation.run_id
            and newest <= self.resumed_version
            and group.lease < self.resumed_leases  # later numbers may stand for other prompts in this life
        ):
            raise ProtocolError("incarnation", f"sampled for {group.incarnation}, this is {self._incarnation.name}")
        if record is not None:
            check_claims(
                group,
                num_samples=self.config.sampling.group_size,
                max_tokens=self.config.sampling.max_tokens,
                vocab_size=self._vocab_size,
                newest_version=self.schedule.version,
            )
            if record.worker not in (None, peer.name) and oldest < record.oldest:
                self.drops["duplicate"] += 1  # another worker answers it with newer weights already
                return "duplicate"
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
                self.cancel([record])
        return outcome

    def _accept_evaluation(self, group: Group) -> str:
        job = self.evaluation
        if job is None or group.incarnation != self._incarnation.name or not job.wants(group.lease):
            self.drops["duplicate"] += 1
            return "duplicate"
        job.accept(group, self._vocab_size)
        self.num_evaluated += 1
        return "accepted"

    def issue(self, now: float) -> None:
        """Give leases to workers with room, the emptiest first; evaluation gets what training leaves, and its share."""
        self._issue_training(now)
        self._issue_evaluation(now)

    def _issue_training(self, now: float) -> None:
        waited_for = self.evaluation is not None and self.evaluation.goes_first
        while not (self.withdrawn or waited_for):
            free = [p for p in self.peers.values() if p.num_held["train"] < p.capacity and self._can_train(p)]
            if not free:
                return
            peer = min(free, key=lambda p: p.num_held["train"] / p.capacity)
            record = self.schedule.issue(peer.name, peer.version, now)
            if record is None:
                return
            prompt = self.prompts[record.position]
            lease = training_lease(self.config, self._incarnation.name, prompt, record.number, record.oldest)
            self._give(peer, lease, now)

    def _can_train(self, peer: Peer) -> bool:
        """A worker that evaluates keeps its weights, so what needs newer ones would only wait there."""
        return not peer.num_held["eval"] or self.schedule.next_oldest <= peer.version

    def _issue_evaluation(self, now: float) -> None:
        job, group_size = self.evaluation, self.config.sampling.group_size
        while job is not None and (peer := job.pick(self.peers.values(), self.schedule, group_size)):
            self._give(peer, job.lease(self._incarnation.name, self.config.run.seed), now)

    def _give(self, peer: Peer, lease: Lease, now: float) -> None:
        peer.take(lease.kind, [lease.number], now)
        if not self._send(peer.identity, lease):
            self.lose(peer, "its connection is gone")

    def beat(self, now: float) -> None:
        """Tell all workers that the learner is alive; forget those that have been silent too long."""
        self._asked_who.clear()
        for peer in list(self.peers.values()):
            if now - peer.last_seen > peer.patience_s(self.config):
                self.workers_lost += 1
                self.lose(peer, f"silent for {now - peer.last_seen:.1f} s")
            else:
                self._send(peer.identity, LearnerBeat(version=self.schedule.version))
        for peer in self.gone.values():
            peer.silent_s = now - peer.last_seen

    def cancel(self, records: list[LeaseRecord]) -> None:
        """Tell their workers that nobody waits for these leases any more."""
        for peer in self.peers.values():
            if numbers := [r.number for r in records if r.worker == peer.name]:
                peer.forget("train", numbers)
                self._send(peer.identity, Cancel(leases=numbers))

    def _take_back(self, peer: Peer, kind: Kind, number: int) -> None:
        """This lease is issued again."""
        peer.forget(kind, [number])
        if kind == "train":
            self.schedule.release(peer.name, [number])
        elif self.evaluation is not None:
            self.evaluation.give_back([number])

    def lose(self, peer: Peer, why: str) -> None:
        """Forget a worker; what it held is issued again."""
        self.peers.pop(peer.identity, None)
        self.gone[peer.name] = peer
        again = self.schedule.lose_worker(peer.name)
        if self.evaluation is not None:
            self.evaluation.give_back(peer.holds("eval"))
        log.warning("worker %s is gone (%s); leases issued again: %s", peer.name, why, again or "none")

    def _refuse(self, identity: bytes, error: ProtocolError) -> None:
        self.drops[f"refused_{error.reason}"] += 1
        log.warning("message refused: %s", error)
        self._send(identity, Refused(reason=error.reason, detail=error.detail))
