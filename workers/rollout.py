"""The rollout worker: a process that answers leases and never waits for the learner to train.

One thread: it receives, swaps weights between decode steps, starts leases, advances the engine, and sends each
group the moment its last completion has its verdict. It waits only when it has nothing to decode: for leases (the
schedule issues them when it has room), or for weights new enough for the leases it holds (the publisher sends
them). Silence of the learner beyond ``network.learner_timeout_s`` ends it with an error; SIGTERM and SIGINT end it
after the current round, a second one at once.

Made and run by ``start``, the worker's program.
"""

import contextlib
import logging
import time
from collections import defaultdict
from typing import Any

import torch

from dapo_async.config.settings import Config
from dapo_async.config.toml import build_config
from dapo_async.errors import ConfigError, StallError, WeightsError, one_line
from dapo_async.transport.curve import DialerKeys
from dapo_async.transport.messages import (
    Ack,
    Beat,
    Cancel,
    DecodeSums,
    Key,
    Lease,
    Message,
    Refused,
    Reintroduce,
    Released,
    Stop,
    Welcome,
    WorkerPhase,
)
from dapo_async.verify.verifier import Verifier, make_verifier
from dapo_async.weight_sync.subscriber import Subscriber
from workers.assembly import Assembly, request_of, training
from workers.connection import Connection
from workers.engine import Engine
from workers.engines import make_decoder, make_engine

log = logging.getLogger("worker")
Tables = dict[str, dict[str, Any]]
ANSWERS_DEPEND_ON = {
    "model": ("path", "precision"),
    "sampling": ("group_size", "temperature", "max_tokens", "stop_token_ids"),
    "reward": ("verifier", "compare_with", "boxed_fallback", "timeout_s"),
    "workers": ("engine", "kv_cache", "in_flight"),
    "weights": ("dtype",),
}
IDLE_S = 0.5  # how long an idle worker listens before it looks around; messages and weights wake it


class Rollout:
    """See the module."""

    def __init__(self, address: str, name: str, engine: str = "", keys: DialerKeys | None = None) -> None:
        """``engine`` takes the place of the run's ``workers.engine``; with ``keys`` the wire is encrypted."""
        self._address, self._name, self._own_engine, self._keys = address, name, engine, keys
        self._connection = Connection(address, name, keys)
        self._assembly = Assembly()
        self._incarnation = ""
        self._fresh = False  # the weights in service belong to this life of the learner
        self._draining = False  # newer weights have come, and wait until nothing is being decoded
        self._stop_reason: str | None = None
        self._gives_back: str | None = None  # why unanswered leases go back in the end
        self._last_heard = time.monotonic()
        self._next_beat = 0.0
        self._seconds: defaultdict[WorkerPhase, float] = defaultdict(float)
        self._refused_weights, self._refusal, self._decode = 0, "", DecodeSums()  # refused by the engine
        self._told: Tables  # the configuration, as it came
        self._config: Config
        self._engine: Engine
        self._verifier: Verifier
        self._subscriber: Subscriber

    def run(self) -> None:
        """Work until the learner or ``stop`` says stop. Raises ``DapoError`` when that is not how it ends."""
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(self._connection.close)
            if (welcome := self._connection.knock(lambda: self._stop_reason is not None)) is not None:
                self._set_up(welcome, cleanup)
                self._work()
        log.info("ends: %s", self._stop_reason)

    def stop(self, reason: str) -> None:
        """End after the current round, giving unanswered leases back."""
        self._stop_reason = self._gives_back = reason

    def _work(self) -> None:
        while self._stop_reason is None:
            self._receive()
            self._take_weights()
            self._start_leases()
            self._generate()
            self._deliver()
            self._beat()
        if self._gives_back is not None:
            self._connection.send(Released(reason=self._gives_back))

    def _set_up(self, welcome: Welcome, cleanup: contextlib.ExitStack) -> None:
        self._told = welcome.config
        own = {"engine": self._own_engine} if self._own_engine else {}
        tables = welcome.config | {"workers": welcome.config["workers"] | own}
        config = self._config = build_config(tables, f"configuration sent by {self._address}")
        torch.set_num_threads(config.workers.threads)
        self._text_of = make_decoder(config)
        self._verifier = make_verifier(config.reward)
        cleanup.callback(self._verifier.close)
        self._engine = make_engine(config)
        self._engine.on_wait = self._beat
        cleanup.callback(self._engine.close)
        self._capacity = config.workers.capacity(config.sampling.group_size)
        self._subscribe(welcome)
        cleanup.callback(self._subscriber.close)
        self._introduce()
        self._last_heard = time.monotonic()

    def _subscribe(self, welcome: Welcome) -> None:
        network = self._config.network
        self._incarnation = welcome.incarnation
        self._subscriber = Subscriber(
            welcome.weights_address,
            worker=self._name,
            incarnation=welcome.incarnation,
            heartbeat_s=network.heartbeat_s,
            max_message_bytes=network.max_message_mb << 20,
            keys=self._keys,
            on_arrival=self._connection.wake,
        )

    def _introduce(self) -> None:
        """Tell the learner that leases are welcome."""
        self._connection.introduce(
            engine=self._config.workers.engine,
            capacity=self._capacity,
            version=self._engine.version,
            incarnation=self._incarnation,
            holding=training(self._assembly.holding),
        )

    def _rejoin(self, welcome: Welcome) -> None:
        """A learner came back: what is complete is sent again, what is half done belongs to its former life.

        Raises ``ConfigError`` if it came back with other settings for workers: answers were made under the old ones.
        """
        changed = changed_settings(self._told, welcome.config)
        if self._own_engine:
            changed = [name for name in changed if name != "workers.engine"]
        if changed:
            raise ConfigError(
                f"the learner at {self._address} came back with other settings for its workers ({', '.join(changed)}): "
                "start this worker again"
            )
        if welcome.incarnation != self._incarnation:
            for key in self._assembly.unanswered:
                self._forget(key, keep_outbox=True)
            self._incarnation = welcome.incarnation
            self._subscriber.restart(welcome.weights_address, welcome.incarnation)
            self._fresh = False
            outbox = self._assembly.outbox
            log.info("the learner is now %s; sends %d complete groups again", welcome.incarnation, len(outbox))
            for group in outbox.values():
                self._connection.send(group)

    # --- one round ----------------------------------------------------------------------------------------

    def _receive(self) -> None:
        """Take what has arrived; wait a moment only if there is nothing else to do."""
        busy = self._engine.running or self._engine.waiting or self._verifier.pending
        started = time.monotonic()
        for message in self._connection.messages(timeout_s=0.0 if busy else IDLE_S):
            self._last_heard = time.monotonic()
            self._handle(message)
        now = time.monotonic()
        self._seconds["other" if busy else "idle"] += now - started
        if now - self._last_heard > self._config.network.learner_timeout_s:
            raise StallError(f"worker {self._name} heard nothing from the learner for {now - self._last_heard:.0f} s")

    def _handle(self, message: Message) -> None:
        if isinstance(message, Lease):
            if message.incarnation == self._incarnation:
                self._assembly.hold(message)
        elif isinstance(message, Ack):
            self._assembly.acknowledge((message.kind, message.lease))
            if message.outcome == "refused":
                log.warning("group %d refused: %s", message.lease, message.detail)
        elif isinstance(message, Cancel):
            for number in message.leases:
                self._forget((message.kind, number))
        elif isinstance(message, Reintroduce):
            self._introduce()
        elif isinstance(message, Welcome):
            self._rejoin(message)
        elif isinstance(message, Refused):
            log.warning("the learner refused a message: %s: %s", message.reason, message.detail)
        elif isinstance(message, Stop):
            self._stop_reason = message.reason

    def _take_weights(self) -> None:
        # An evaluation is of one version.
        pinned = self._fresh and self._assembly.evaluates(self._engine.version)
        drains = bool((self._engine.running or self._engine.waiting) and not self._config.workers.in_flight)
        self._draining = drains and not pinned and self._subscriber.has_newer
        if pinned or drains or (newest := self._subscriber.newest()) is None:
            return
        started = time.monotonic()
        version, tensors = newest
        try:
            self._engine.swap(version, tensors)
        except WeightsError as error:
            self._refused_weights += 1
            self._refusal = one_line(f"{version}: {error}", 255)
            log.error("weights %d do not fit, version %d stays in service: %s", version, self._engine.version, error)
        else:
            self._fresh, self._refusal = True, ""
        self._next_beat = 0.0  # the learner should know at once
        self._seconds["swap"] += time.monotonic() - started

    def _start_leases(self) -> None:
        """Hand leases to the engine, in order, once its weights are new enough for them."""
        if not self._fresh or self._draining:
            return
        for lease in self._assembly.startable(self._engine.version):
            if not self._config.workers.in_flight and self._engine.running + self._engine.waiting >= self._engine.slots:
                break  # what queued in the engine would only make its end come later
            try:
                self._engine.add(request_of(lease))
            except ValueError as error:
                raise ConfigError(f"the engine cannot serve {lease.kind} lease {lease.lease}: {error}") from None
            self._assembly.start(lease)

    def _generate(self) -> None:
        if not (self._engine.running or self._engine.waiting):
            return
        started, prefill = time.monotonic(), self._engine.prefill_s
        if self._config.workers.step_delay_s:
            time.sleep(self._config.workers.step_delay_s)
        finished = self._engine.step()
        stepped, prefill = time.monotonic(), self._engine.prefill_s - prefill
        self._seconds["prefill"] += prefill
        self._seconds["decode"] += stepped - started - prefill
        self._decode.add(self._engine.running + len(finished), stepped - started - prefill)
        for completion in finished:
            if (truth := self._assembly.finish(completion)) is not None:
                self._verifier.submit((completion.key, completion.index), self._text_of(completion.token_ids), truth)
        self._seconds["verify"] += time.monotonic() - stepped

    def _deliver(self) -> None:
        """Send every group whose last verdict has come."""
        waits_only_for_verdicts = self._verifier.pending and not (self._engine.running or self._engine.waiting)
        started = time.monotonic()
        for place, verdict in self._verifier.poll(0.05 if waits_only_for_verdicts else 0.0):
            if (group := self._assembly.judge(place, verdict)) is not None:
                self._connection.send(group)
        self._seconds["verify"] += time.monotonic() - started

    def _beat(self) -> None:
        if (now := time.monotonic()) < self._next_beat:
            return
        self._subscriber.check()
        self._next_beat = now + self._config.network.heartbeat_s
        for group in self._assembly.overdue(self._config.network.silence_s):
            self._connection.send(group)
        self._connection.send(
            Beat(
                version=self._engine.version,
                running=self._engine.running,
                holding=self._assembly.holding,
                refused_weights=self._refused_weights + self._subscriber.refused,
                refusal=self._refusal,
                seconds=dict(self._seconds),
                decode=self._decode,
            )
        )

    def _forget(self, key: Key, keep_outbox: bool = False) -> None:
        self._engine.cancel(key)
        self._assembly.drop(key, keep_outbox)


def changed_settings(before: Tables, after: Tables) -> list[str]:
    """Settings that answers depend on and that differ between two configurations; by name."""
    return [
        f"{table}.{name}"
        for table, names in ANSWERS_DEPEND_ON.items()
        for name in names
        if before.get(table, {}).get(name) != after.get(table, {}).get(name)
    ]
