"""How many large groups per second the learner's process takes in: protocol, validation, schedule and buffer.

Sender processes answer real leases with groups of 16 x 4,096 tokens over loopback TCP; the main process runs the
coordinator and draws batches as fast as they come. Prints a table and writes ``groups_per_s`` and ``rss_growth_mb``
(resident memory of the coordinator's process after the last group, minus after the first tenth).

    python -m benchmarks.coordinator --out coordinator.json [--groups 100000]
"""

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a file

from benchmarks.origin import origin, write_result
from dapo_async.config.toml import build_config
from dapo_async.coordinator.coordinator import Coordinator
from dapo_async.coordinator.workers import Incarnation
from dapo_async.data.prompts import Prompt
from dapo_async.learner.step_metrics import rss_bytes
from dapo_async.transport.messages import FROM_LEARNER, FROM_WORKER, Codec, Completion, Group, Hello, Lease, Stop
from dapo_async.transport.sockets import Dialer

SAMPLES, TOKENS, VOCABULARY = 16, 4096, 150_000
CAPACITY = 8  # leases a sender holds


class Prompts:
    """As many equal prompts as anyone wants."""

    num_prompts = 10**9

    def __getitem__(self, n: int) -> Prompt:
        return Prompt(id=str(n), ids=np.zeros(64, dtype=np.int32), truth="0", text="")

    def __len__(self) -> int:
        return self.num_prompts


def send_groups(address: str, name: str) -> None:
    """Answer every lease with the same tokens until told to stop."""
    rng = np.random.default_rng(0)
    token_ids = rng.integers(0, VOCABULARY, SAMPLES * TOKENS, dtype=np.int32)
    logprobs = -rng.random(SAMPLES * TOKENS, dtype=np.float32)
    encoder, decoder = Codec(FROM_WORKER), Codec(FROM_LEARNER)
    with Dialer(address, max_message_bytes=1 << 28) as dialer:
        hello = Hello(worker=name, pid=os.getpid(), host="", engine="benchmark", capacity=CAPACITY, version=0)
        dialer.send(encoder.encode(hello), timeout_s=10.0)
        last_heard = time.monotonic()
        while time.monotonic() - last_heard < 30.0:
            frames = dialer.receive(timeout_s=1.0)
            if frames is None:
                continue
            last_heard = time.monotonic()
            message = decoder.decode(list(frames))
            if isinstance(message, Stop):
                return
            if isinstance(message, Lease):
                spans = [(message.min_version, TOKENS)]
                completions = [
                    Completion(num_tokens=TOKENS, spans=spans, finish="stop", correct=i % 2 == 0)
                    for i in range(SAMPLES)
                ]
                group = Group(
                    lease=message.lease,
                    incarnation=message.incarnation,
                    completions=completions,
                    token_ids=token_ids,
                    logprobs=logprobs,
                )
                dialer.send(encoder.encode(group), timeout_s=10.0)


def measure(num_groups: int, num_senders: int) -> dict[str, float]:
    """Groups per second after the first tenth, and how much memory grew since then."""
    config = build_config(
        {
            "model": {"path": "unused"},
            "data": {"train": "unused"},
            "sampling": {"group_size": SAMPLES, "max_tokens": TOKENS},
            "schedule": {"groups_per_batch": 16, "max_staleness": 4},
            "learner": {"microbatch_tokens": 10**6},
        },
        "benchmark",
    )
    coordinator = Coordinator(
        config,
        Prompts(),  # type: ignore[arg-type]
        vocab_size=VOCABULARY,
        weights_address="tcp://127.0.0.1:1",
        incarnation=Incarnation("benchmark", "0"),
    )
    coordinator.start()
    spawn = multiprocessing.get_context("spawn")
    senders = [spawn.Process(target=send_groups, args=(coordinator.address, f"s{i}")) for i in range(num_senders)]
    for sender in senders:
        sender.start()
    try:
        trained, started, first_rss, first = 0, 0.0, 0, 0
        while trained < num_groups:
            drawn = coordinator.next_batch(lambda cause: None, lambda: False)
            assert drawn is not None  # the prompts never end
            del drawn
            coordinator.announce(coordinator.batch_trained())
            trained += 16
            if not first and trained >= num_groups // 10:
                first, started, first_rss = trained, time.monotonic(), rss_bytes()
        seconds = time.monotonic() - started
        growth = rss_bytes() - first_rss
        assert coordinator.schedule.counts["trained"] == trained
        return {"groups_per_s": (trained - first) / seconds, "rss_growth_mb": growth / 2**20, "groups": trained}
    finally:
        coordinator.close()
        for sender in senders:
            sender.join(timeout=10.0)
            if sender.is_alive():
                sender.kill()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument("--groups", type=int, default=100_000, help="groups to take in")
    parser.add_argument("--senders", type=int, default=4, help="sender processes")
    arguments = parser.parse_args()
    result = measure(arguments.groups, arguments.senders)
    table = Table(title=f"coordinator: groups of {SAMPLES} x {TOKENS} tokens from {arguments.senders} processes")
    for name in ("groups/s", "MB/s", "growth of resident memory, MiB", "groups"):
        table.add_column(name, justify="right")
    bytes_per_group = SAMPLES * TOKENS * 8
    table.add_row(
        f"{result['groups_per_s']:,.0f}",
        f"{result['groups_per_s'] * bytes_per_group / 1e6:,.0f}",
        f"{result['rss_growth_mb']:.1f}",
        f"{result['groups']:,.0f}",
    )
    Console().print(table)
    if arguments.out:
        write_result(arguments.out, result | {"origin": origin(seeds=[0], repeats=1)})


if __name__ == "__main__":
    main()
