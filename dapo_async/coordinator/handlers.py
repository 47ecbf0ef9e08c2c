"""What the learner says to each message of a worker: welcome, leases, acknowledgements, refusals.

Owns the table of workers, what each holds, and the counts of what was dropped; applies every message to the
``Schedule`` and the running evaluation. No thread and no socket: ``coordinator`` calls it under its lock with what
arrived, and it answers through ``send``.
"""

import logging
import math
import re
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping

from dapo_async.config.settings import Config
from dapo_async.config.toml import plain
from dapo_async.coordinator.evaluation import EvaluationJob
from dapo_async.coordinator.groups import RolloutGroup, Tally, check_claims, training_lease, version_range
from dapo_async.coordinator.patience import Patience
from dapo_async.coordinator.workers import ConnectedWorker, Incarnation, PublishLag
from dapo_async.data.prompts import PromptStream
from dapo_async.errors import ProtocolError, one_line
from dapo_async.schedule.deadlines import LeaseRecord
from dapo_async.schedule.schedule import Schedule
from dapo_async.transport.messages import (
    FROM_WORKER,
    NAME_TAKEN,
    Ack,
    AckOutcome,
    Beat,
    Cancel,
    Codec,
    Group,
    Hello,
    Key,
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
RESTART = re.compile(r"\.\d+$")  # what the name of a restarted worker ends with
MAX_REFUSALS = 5  # in a row; then the worker is told to stop, so that its supervisor reports it


class Handlers:
    """See the module. ``send`` returns False if the worker is gone; ``clock`` is in seconds."""

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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.schedule = schedule
        self.prompts = prompts
        self.workers: dict[bytes, ConnectedWorker] = {}
        self.gone: dict[str, ConnectedWorker] = {}  # lost and not come back, by name, as long as their process may live
        self.evaluation: EvaluationJob | None = None
        self.counts: Counter[str] = Counter()  # over the whole run, through resumes
        self.tally = Tally(self.counts)
        self.withdrawn = False  # no training lease is issued any more
        self.lag = PublishLag()
        self._vocab_size = vocab_size
        self._welcome = Welcome(incarnation=incarnation.name, weights_address=weights_address, config=plain(config))
        self._incarnation = incarnation
        self._resumed_version = self._resumed_leases = 0  # of the checkpoint this life began with
        self._asked_who: set[bytes] = set()  # strangers asked since the last heartbeat
        self._given: defaultdict[Key, set[str]] = defaultdict(set)  # who has been given each unanswered lease
        self._reserved: dict[str, str] = {}
        self._refused_at: dict[int, float] = {}  # of training leases that are unanswered still
        self._patience = Patience(config.network.silence_s)
        self._codec = Codec(FROM_WORKER)
        self._send = send
        self._clock = clock

    def reserve(self, names: Iterable[str], proof: str) -> None:
        """These names, and those of their restarts (``w0.1``), are of workers that can say ``proof``."""
        self._reserved |= dict.fromkeys(names, proof)

    def resume(self, counts: Mapping[str, int]) -> None:
        """This life goes on with a schedule that has been restored, and with these counts."""
        self.counts.update(counts)
        self._resumed_version, self._resumed_leases = self.schedule.version, self.schedule.leased

    def stop(self, reason: str) -> None:
        """Ask all workers to end."""
        for worker in self.workers.values():
            self._send(worker.identity, Stop(reason=reason))

    def published(self, version: int) -> None:
        """Workers can fetch this version from now on."""
        self.schedule.published = max(self.schedule.published, version)
        self.lag.published(version)

    def ended(self, name: str) -> None:
        """This worker's process is no more."""
        for worker in [w for w in self.workers.values() if w.name == name]:
            self.counts["workers_lost"] += 1
            self.lose(worker, "its process ended")
        self.gone.pop(name, None)

    def evaluate(self, job: EvaluationJob) -> None:
        """Lease ``job``'s prompts from now on, and those of a former job no more."""
        self.evaluation = job
        for key in [key for key in self._given if key[0] == "eval"]:
            del self._given[key]
        for worker in self.workers.values():
            leases = worker.holds("eval")
            if leases:
                worker.forget("eval", leases)
                self._send(worker.identity, Cancel(leases=leases, kind="eval"))

    def withdraw(self) -> None:
        """Issue no training lease any more, and cancel those that run; they stay in flight."""
        self.withdrawn = True
        running = [record for record in self.schedule.running() if record.worker is not None]
        self.cancel(running)
        for record in running:
            self.schedule.release(str(record.worker), [record.lease])

    def receive(self, identity: bytes, frames: list[memoryview]) -> None:
        """Act on one message."""
        worker = self.workers.get(identity)
        try:
            size, limit = sum(frame.nbytes for frame in frames), self.config.network.max_message_mb << 20
            if size > limit:
                raise ProtocolError("oversize", f"the message has {size} bytes, allowed are {limit}")
            message = self._codec.decode(list(frames))
            if isinstance(message, Hello):
                self._greet(identity, message)
            elif worker is None:
                # Once: a learner that comes back finds everything that was sent meanwhile.
                if identity not in self._asked_who:
                    self._asked_who.add(identity)
                    self._send(identity, Reintroduce())
            else:
                worker.last_seen = self._clock()
                self._handle(worker, message)
        except ProtocolError as error:
            if worker is not None and error.key in worker.leases:  # a group of its that could not even be decoded
                worker.last_seen = self._clock()
                self._refuse_group(worker, *error.key, error)
            else:
                self._refuse(identity, error)

    def _handle(self, worker: ConnectedWorker, message: Message) -> None:
        if isinstance(message, Beat):
            if message.refusal and message.refusal != worker.beat.refusal:
                log.error("worker %s refuses weights %s", worker.name, message.refusal)
            worker.version, worker.beat = message.version, message
            worker.look_at_clock(worker.last_seen)
            if message.refusal:
                self._take_back_what_waits(worker)
            if not any(kind == "train" for kind, _ in message.holding):
                worker.suspected = False  # nothing is left that it could answer
            self.lag.served(self.workers.values())
            for lease in self.evaluation.overtaken(worker) if self.evaluation is not None else ():
                self._take_back(worker, "eval", lease)
            for key in worker.mislaid(message.holding, worker.last_seen - self.config.network.silence_s):
                log.warning("worker %s never got lease %s: it is issued again", worker.name, key)
                self._take_back(worker, *key)
        elif isinstance(message, Group):
            self._group(worker, message)
        elif isinstance(message, Released):  # sent by a worker that is ending
            self.lose(worker, one_line(message.reason))

    def _greet(self, identity: bytes, hello: Hello) -> None:
        worker = self.workers.get(identity)
        proof = self._reserved.get(RESTART.sub("", hello.worker))
        if proof is not None and not secrets.compare_digest(proof.encode(), hello.proof.encode()):
            raise ProtocolError(
                NAME_TAKEN,
                f"{hello.worker} is a name of the learner's own workers: choose another --name",
            )
        if worker is None or worker.name != hello.worker:
            for other in [w for w in self.workers.values() if w.name == hello.worker or w.identity == identity]:
                if other.identity != identity and self._send(
                    other.identity, LearnerBeat()
                ):  # not if its process has ended
                    raise other.name_taken()
                self.lose(other, "another connection took its name")
            worker = self.workers[identity] = ConnectedWorker(identity, hello, self._clock())
            self.gone.pop(worker.name, None)
            if hello.incarnation == self._incarnation.name:
                self._take_again(worker, hello.holding)
            log.info("worker %s joined from %s (%s)", worker.name, hello.host, hello.engine or "loading")
        worker.capacity, worker.version, worker.last_seen = hello.capacity, hello.version, self._clock()
        self._send(identity, self._welcome)

    def _take_again(self, worker: ConnectedWorker, leases: Iterable[int]) -> None:
        """A worker that was lost still works on these leases; it gets back those that wait for a worker."""
        records = [self.schedule.record(lease) for lease in self.schedule.reclaim(worker.name, leases)]
        worker.take("train", {r.lease: r.min_version for r in records if r is not None}, worker.last_seen)
        for key in worker.leases:
            self._given[key].add(worker.name)

    def _group(self, worker: ConnectedWorker, group: Group) -> None:
        key, now = (group.kind, group.lease), self._clock()
        try:
            outcome = self._accept_evaluation(worker, group) if group.kind == "eval" else self._accept(worker, group)
        except ProtocolError as error:
            self._refuse_group(worker, *key, error)
            return
        self._patience.answered(worker, key, now)
        worker.forget(group.kind, [group.lease])
        worker.refusals, worker.suspected = 0, False
        if group.kind == "eval" or self.schedule.record(group.lease) is None:
            self._given.pop(key, None)  # settled
            self._refused_at.pop(group.lease, None)
        self.tally.tell_failures(group, worker.name)
        if group.kind == "eval":
            # Before the acknowledgement: without a lease of the evaluation the worker would go on to newer weights.
            self._issue_evaluation(now)
        self._send(worker.identity, Ack(lease=group.lease, kind=group.kind, outcome=outcome))

    def _refuse_group(self, worker: ConnectedWorker, kind: Kind, lease: int, error: ProtocolError) -> None:
        """The worker drops the group, its lease is issued again, to another worker if there is one with room."""
        self.counts[f"refused_{error.reason}"] += 1
        # What was sampled for a former life, or answers a lease that is gone, is no fault of the worker.
        worker.refusals += error.reason not in ("incarnation", "unknown_lease", "too_old")
        self._take_back(worker, kind, lease)
        if kind == "train":
            self._refused_at[lease] = self._clock()
        log.warning("group %d of worker %s refused: %s", lease, worker.name, error)
        self._send(worker.identity, Ack(lease=lease, kind=kind, outcome="refused", detail=str(error)))
        if worker.refusals >= MAX_REFUSALS:
            reason = f"{worker.refusals} groups in a row were refused, last: {error}"
            self._send(worker.identity, Stop(reason=reason))
            self.lose(worker, "its groups were refused again and again")

    def _accept(self, worker: ConnectedWorker, group: Group) -> AckOutcome:
        record = self.schedule.record(group.lease)
        oldest, newest = version_range(group)
        if group.incarnation != self._incarnation.name and not (
            group.incarnation.rpartition(".")[0] == self._incarnation.run_id
            and newest <= self._resumed_version
            and group.lease < self._resumed_leases  # later numbers may stand for other prompts in this life
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
            self._check_holder(worker, group, record)
            if record.worker not in (None, worker.name) and oldest < record.min_version:
                self.counts["duplicate"] += 1  # another worker answers it with newer weights already
                return "duplicate"
            rollout = RolloutGroup(group.lease, record.position, self.prompts[record.position], group, worker.name)
            outcome = self.schedule.complete(group.lease, oldest, len(group.token_ids), rollout.correct, rollout)
        else:
            outcome = self.schedule.complete(group.lease, oldest, 0, [], None)
        if outcome == "unknown_lease" or outcome == "too_old":
            raise ProtocolError(outcome, f"lease {group.lease}, oldest version {oldest}")
        if outcome != "duplicate":
            self.tally.add(group, outcome)
            if record is not None and record.worker not in (None, worker.name):
                self.cancel([record])
        return outcome

    def _check_holder(self, worker: ConnectedWorker, group: Group, record: LeaseRecord) -> None:
        """A group counts from whoever has been given its lease, the first that comes; from others it does not.

        Who worked for a former life of this run may deliver what it had then. Raises ``ProtocolError``.
        """
        of_former_life = group.incarnation != self._incarnation.name
        if not of_former_life and worker.name not in self._given["train", record.lease]:
            raise ProtocolError("not_holder", f"lease {record.lease} was never given to worker {worker.name}")

    def _accept_evaluation(self, worker: ConnectedWorker, group: Group) -> AckOutcome:
        job = self.evaluation
        if job is None or group.incarnation != self._incarnation.name or not job.wants(group.lease):
            self.counts["duplicate"] += 1
            return "duplicate"
        if worker.name not in self._given["eval", group.lease]:
            raise ProtocolError("not_holder", f"held-out lease {group.lease} was never given to worker {worker.name}")
        job.accept(group, self._vocab_size)
        self.counts["evaluated"] += 1
        return "accepted"

    def issue(self, now: float) -> None:
        """Give leases to workers with room, the emptiest first; evaluation gets what training leaves, and its share."""
        self._issue_training(now)
        self._issue_evaluation(now)

    def _issue_training(self, now: float) -> None:
        waited_for = self.evaluation is not None and self.evaluation.goes_first
        while not (self.withdrawn or waited_for):
            free = [w for w in self.workers.values() if w.num_held["train"] < w.capacity and self._can_train(w)]
            free = self._others_than_before(free, now)
            if not free:
                return
            worker = min(free, key=lambda w: w.num_held["train"] / w.capacity)
            record = self.schedule.issue(worker.name, worker.version, now)
            if record is None:
                return
            prompt = self.prompts[record.position]
            lease = training_lease(self.config, self._incarnation.name, prompt, record)
            self._give(worker, lease, now)

    def _others_than_before(self, free: list[ConnectedWorker], now: float) -> list[ConnectedWorker]:
        """Those of the ``free`` workers that have not had the next lease before; all of them if all have.

        A lease whose answer was refused waits a while for another worker to have room.
        """
        if (lease := self.schedule.next_again) is None:
            return free
        had = self._given.get(("train", lease), set())
        if others := [w for w in free if w.name not in had]:
            return others
        could = any(w.capacity and w.name not in had and not w.suspected for w in self.workers.values())
        waits_s = now - self._refused_at.get(lease, -math.inf)
        return [] if could and waits_s < self.config.network.silence_s else free

    def _can_train(self, worker: ConnectedWorker) -> bool:
        """One that leaves its leases unanswered gets no more. One that evaluates or refuses weights keeps those it has:
        what needs newer ones would only wait there."""
        keeps = worker.num_held["eval"] or worker.beat.refusal
        return not worker.suspected and not (keeps and self.schedule.next_min_version > worker.version)

    def _issue_evaluation(self, now: float) -> None:
        job, group_size = self.evaluation, self.config.sampling.group_size
        while job is not None and (worker := job.pick(self.workers.values(), self.schedule, group_size)):
            self._give(worker, job.lease(self._incarnation.name, self.config.run.seed), now)

    def _give(self, worker: ConnectedWorker, lease: Lease, now: float) -> None:
        worker.take(lease.kind, {lease.lease: lease.min_version}, now)
        self._given[lease.kind, lease.lease].add(worker.name)
        if not self._send(worker.identity, lease):
            self.lose(worker, "its connection is gone")

    def refusals(self) -> list[str]:
        """Why no worker can serve what is published, one reason per worker; empty: one can, or may be able to yet."""
        able = [worker for worker in self.workers.values() if worker.capacity]
        if len(able) < len(self.workers):
            return []  # who loads its model still may be able to
        behind = [worker for worker in able if worker.beat.refusal and worker.version < self.schedule.published]
        return [f"{worker.name} refuses {worker.beat.refusal}" for worker in behind] if len(behind) == len(able) else []

    def beat(self, now: float) -> None:
        """Tell all workers that the learner is alive; forget those that have been silent too long."""
        self._asked_who.clear()
        for worker in list(self.workers.values()):
            if now - worker.last_seen > worker.patience_s(self.config):
                self.counts["workers_lost"] += 1
                self.lose(worker, f"silent for {now - worker.last_seen:.1f} s")
            else:
                self._send(worker.identity, LearnerBeat())
        for worker in self.gone.values():
            worker.silent_s = now - worker.last_seen
        self._forget_settled()
        self._look_for_suspects(now)

    def _forget_settled(self) -> None:
        """Leases that expired or were cancelled are never answered."""
        for lease in [lease for kind, lease in self._given if kind == "train" and self.schedule.record(lease) is None]:
            del self._given["train", lease]
        for lease in [lease for lease in self._refused_at if self.schedule.record(lease) is None]:
            del self._refused_at[lease]

    def _look_for_suspects(self, now: float) -> None:
        """What a worker leaves unanswered for far longer than usual goes to a second one."""
        served = max((worker.version for worker in self.workers.values() if worker.capacity), default=-1)
        evaluates = self.evaluation is not None and not self.evaluation.done
        for worker in self.workers.values():
            if evaluates or self.withdrawn:
                worker.restart_clocks(now)
                continue
            worker.look_at_clock(now, served)
            others = [w for w in self.workers.values() if w is not worker and w.capacity]
            for lease in self._patience.suspects(worker, now) if others else ():
                worker.give_up("train", lease)
                if self.schedule.suspect(worker.name, lease):
                    if not worker.suspected:
                        log.warning(
                            "worker %s beats, but has not answered lease %d for over %.0f s, longer than leases take "
                            "here: it goes to another worker, and %s gets none until it answers one",
                            worker.name, lease, self._patience.limit_s, worker.name,
                        )  # fmt: skip
                    worker.suspected = True

    def cancel(self, records: list[LeaseRecord]) -> None:
        """Tell their workers that nobody waits for these leases any more."""
        for worker in self.workers.values():
            if leases := [r.lease for r in records if r.worker == worker.name]:
                worker.forget("train", leases)
                self._send(worker.identity, Cancel(leases=leases))

    def _take_back_what_waits(self, worker: ConnectedWorker) -> None:
        """It refuses the weights for which these leases wait: others answer them."""
        waiting = [lease for lease in worker.holds("train") if worker.min_versions["train", lease] > worker.version]
        for lease in waiting:
            self._take_back(worker, "train", lease)
        if waiting:
            self._send(worker.identity, Cancel(leases=waiting))

    def _take_back(self, worker: ConnectedWorker, kind: Kind, lease: int) -> None:
        """This lease is issued again."""
        worker.forget(kind, [lease])
        if kind == "train":
            self.schedule.release(worker.name, [lease])
        elif self.evaluation is not None:
            self.evaluation.give_back([lease])

    def lose(self, worker: ConnectedWorker, why: str) -> None:
        """Forget a worker; what it held is issued again."""
        self.workers.pop(worker.identity, None)
        self.gone[worker.name] = worker
        again = self.schedule.lose_worker(worker.name)
        if self.evaluation is not None:
            self.evaluation.give_back(worker.holds("eval"))
        log.warning("worker %s is gone (%s); leases issued again: %s", worker.name, why, again or "none")

    def _refuse(self, identity: bytes, error: ProtocolError) -> None:
        self.counts[f"refused_{error.reason}"] += 1
        log.warning("message refused: %s", error)
        self._send(identity, Refused(reason=error.reason, detail=error.detail))
