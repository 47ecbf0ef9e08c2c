"""Real processes: every ending is noticed, stopping has an order, and no orphan survives."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dapo_async.coordinator.supervisor import MAX_DELAY_S, SERVED_WELL_S, TAIL_LINES, ProcessExit, Supervisor
from dapo_async.errors import WorkerError

LIMIT_S = 60.0
READY = "import signal, sys, time; print('ready', flush=True); "
SLEEP = READY + "time.sleep(600)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP


def python(code: str) -> Callable[[str], list[str]]:
    return lambda name: [sys.executable, "-c", code, name]


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {LIMIT_S} s for {what}"
        time.sleep(0.02)


def wait_for_text(path: Path, text: str) -> str:
    wait_until(lambda: path.exists() and text in path.read_text(), f"{text!r} in {path.name}")
    return path.read_text()


def poll_until_ended(supervisor: Supervisor, count: int = 1) -> list[ProcessExit]:
    ended: list[ProcessExit] = []

    def enough() -> bool:
        ended.extend(supervisor.poll())
        return len(ended) >= count

    wait_until(enough, f"{count} endings")
    return ended


def is_running(pid: int) -> bool:
    """False for zombies as well: who must reap them is not the supervisor's choice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def group_members(group: int) -> list[int]:
    """Living processes of a process group."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group, *_ = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(process_group) == group and state != "Z":
            members.append(int(stat.parent.name))
    return members


def test_exit_code_0_is_an_ending_too(tmp_path: Path) -> None:
    with Supervisor(["w0"], python("print('bye')"), tmp_path) as supervisor:
        pid = supervisor.pids["w0"]
        assert poll_until_ended(supervisor) == [ProcessExit("w0", "w0", pid, "exit code 0", "bye", 0.5)]
        assert supervisor.alive == []


def test_an_ending_shows_the_last_lines_of_the_log(tmp_path: Path) -> None:
    code = "for i in range(100): print('line', i)\nraise RuntimeError('no such luck')"
    with Supervisor(["w0"], python(code), tmp_path, max_restarts=0) as supervisor:
        with pytest.raises(WorkerError) as caught:
            poll_until_ended(supervisor)
        message = str(caught.value)
        assert (
            "worker w0 ended with exit code 1; w0 has now ended 1 times (counted anew once it has run for an hour) and "
            "may be restarted 0 times (workers.max_restarts)"
        ) in message
        assert "RuntimeError: no such luck" in message
        assert str(tmp_path / "w0.log") in message
        assert len(message.splitlines()) == 1 + TAIL_LINES
        assert "line 99" in message
        assert "line 50" not in message


def test_a_signal_is_named(tmp_path: Path) -> None:
    with Supervisor(["w0", "w1"], python(SLEEP), tmp_path) as supervisor:
        os.kill(supervisor.pids["w1"], signal.SIGKILL)
        (ended,) = poll_until_ended(supervisor)
        assert (ended.name, ended.reason) == ("w1", "SIGKILL")
        assert supervisor.alive == ["w0"]


def test_who_is_killed_on_purpose_ends_with_the_reason_and_starts_again(tmp_path: Path) -> None:
    with Supervisor(["w0", "w1"], python(DEAF), tmp_path, restart_delay_s=0.05) as supervisor:
        group = supervisor.pids["w0"]
        os.kill(group, signal.SIGSTOP)
        supervisor.kill("w0", "silent for 9 s")
        supervisor.kill("w0", "silent for 10 s")
        supervisor.kill("a remote worker", "silent for 9 s")
        (ended,) = poll_until_ended(supervisor)
        assert ended[:4] == ("w0", "w0", group, "SIGKILL (silent for 9 s, killed)")
        wait_until(lambda: not group_members(group), "the sentinel's end")
        wait_until(lambda: supervisor.poll() == [] and supervisor.alive == ["w0.1", "w1"], "its restart")
        supervisor.kill("w0", "silent for 11 s")  # its successor has another name
        os.kill(supervisor.pids["w0.1"], signal.SIGKILL)
        assert poll_until_ended(supervisor)[0].reason == "SIGKILL", "the reason was the former process's"


def test_a_command_that_does_not_exist_says_so(tmp_path: Path) -> None:
    with (
        Supervisor(["w0"], lambda name: ["/no/such/program"], tmp_path, max_restarts=0) as supervisor,
        pytest.raises(WorkerError, match="cannot start /no/such/program"),
    ):
        poll_until_ended(supervisor)


def test_restarts_with_a_new_name_and_a_growing_delay_up_to_the_limit(tmp_path: Path) -> None:
    code = "import sys; print('I am', sys.argv[1]); sys.exit(3)"
    supervisor = Supervisor(["w0"], python(code), tmp_path, max_restarts=2, restart_delay_s=0.05)
    with supervisor:
        ended = poll_until_ended(supervisor, 2)
        assert [(e.slot, e.name, e.tail, e.restart_in_s) for e in ended] == [
            ("w0", "w0", "I am w0", 0.05),
            ("w0", "w0.1", "I am w0.1", 0.1),
        ]
        with pytest.raises(
            WorkerError, match=r"(?s)worker w0\.2 ended with exit code 3; w0 has now ended 3 times.*I am w0\.2"
        ):
            poll_until_ended(supervisor)
        assert supervisor.restarts == 2
        assert supervisor.alive == []


def test_a_users_mistake_is_final_at_the_first_start_and_a_passing_trouble_at_a_later_one(tmp_path: Path) -> None:
    """A worker that has run once was started rightly; "no memory on the GPU" may be its predecessor's, still ending."""
    mistaken = Supervisor(["a"], python("import sys; sys.exit(2)"), tmp_path / "one", restart_delay_s=0.01)
    mistaken.start()
    with pytest.raises(WorkerError, match="a has now ended 1 times"):
        poll_until_ended(mistaken)
    mistaken.stop(lambda: None, 0.1)

    code = "import sys; sys.exit({'a': 3, 'a.1': 2, 'a.2': 3}[sys.argv[1]])"
    unlucky = Supervisor(["a"], python(code), tmp_path / "two", max_restarts=2, restart_delay_s=0.01)
    unlucky.start()
    reasons = [poll_until_ended(unlucky)[0].reason for _ in range(2)]
    assert reasons == ["exit code 3", "exit code 2"]
    with pytest.raises(WorkerError, match="ended with exit code 3; a has now ended 3 times"):
        poll_until_ended(unlucky)
    unlucky.stop(lambda: None, 0.1)


def test_a_worker_that_served_for_an_hour_has_all_its_restarts_again(tmp_path: Path) -> None:
    """Four crashes in a week are no broken worker. Names go on counting, so that no log is written twice."""
    now = [1000.0]
    supervisor = Supervisor(["w0"], python(SLEEP), tmp_path, max_restarts=2, restart_delay_s=0.5, clock=lambda: now[0])

    def crash(after_s: float) -> tuple[str, float | None]:
        now[0] += after_s
        os.kill(supervisor.pids["w0" if not supervisor.restarts else f"w0.{supervisor.restarts}"], signal.SIGKILL)
        (ended,) = poll_until_ended(supervisor)
        now[0] += ended.restart_in_s or 0.0
        assert supervisor.poll() == []
        return ended.name, ended.restart_in_s

    with supervisor:
        assert crash(60.0) == ("w0", 0.5)
        assert crash(SERVED_WELL_S - 1) == ("w0.1", 1.0), "not quite an hour"
        assert crash(SERVED_WELL_S) == ("w0.2", 0.5), "without it this would have been the last"
        assert crash(SERVED_WELL_S) == ("w0.3", 0.5)
        assert crash(60.0) == ("w0.4", 1.0)
        with pytest.raises(WorkerError, match=r"worker w0\.5 ended with SIGKILL; w0 has now ended 3 times"):
            crash(60.0)


def test_a_delay_stays_a_number_however_often_a_worker_ends(tmp_path: Path) -> None:
    with Supervisor(["w0"], python("pass"), tmp_path, max_restarts=10**6) as supervisor:
        supervisor._slots[0].num_failures = 5000
        (ended,) = poll_until_ended(supervisor)
        assert ended.restart_in_s == MAX_DELAY_S


def test_who_ends_too_often_is_given_up_as_long_as_another_works(tmp_path: Path) -> None:
    """One bad machine of many must not end the run; the last worker's end does."""
    flag = tmp_path / "flag"
    steady = READY + f"import os\nwhile not os.path.exists({str(flag)!r}): time.sleep(0.02)"
    codes = {"w0": "raise SystemExit('weights do not fit')", "w1": steady}
    command = lambda name: [sys.executable, "-c", codes[name.partition(".")[0]]]  # noqa: E731
    with Supervisor(["w0", "w1"], command, tmp_path, max_restarts=1, restart_delay_s=0.05) as supervisor:
        ended = poll_until_ended(supervisor, 2)
        assert [(one.name, one.restart_in_s, one.tail) for one in ended] == [
            ("w0", 0.05, "weights do not fit"),
            ("w0.1", None, "weights do not fit"),
        ]
        assert (supervisor.given_up, supervisor.alive) == (1, ["w1"])
        flag.touch()
        (first,) = poll_until_ended(supervisor, 1)
        assert first.restart_in_s == 0.05
        with pytest.raises(WorkerError, match=r"worker w1\.1 ended with exit code 0; w1 has now ended 2 times"):
            poll_until_ended(supervisor)


def test_the_last_one_is_given_up_too_if_workers_of_other_machines_are_connected(tmp_path: Path) -> None:
    connected = {"w0", "w1", "far"}  # ours are in it until the coordinator hears that they have ended
    with Supervisor(["w0", "w1"], python("raise SystemExit(3)"), tmp_path, max_restarts=0) as supervisor:
        ended: list[ProcessExit] = []
        wait_until(lambda: ended.extend(supervisor.poll(lambda: connected)) or len(ended) == 2, "both endings")
        assert {(one.name, one.restart_in_s) for one in ended} == {("w0", None), ("w1", None)}
        assert (supervisor.given_up, supervisor.alive) == (2, [])
    with (
        Supervisor(["w0"], python("raise SystemExit(3)"), tmp_path, max_restarts=1) as supervisor,
        pytest.raises(WorkerError, match="w0 has now ended 2 times"),
    ):
        wait_until(lambda: len(supervisor.poll(lambda: {"w0", "w0.1"})) > 1, "both ends")


def test_stop_asks_first_and_needs_no_signal_when_that_is_enough(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    code = READY + f"import os\nwhile not os.path.exists({str(flag)!r}): time.sleep(0.02)"
    supervisor = Supervisor(["w0"], python(code), tmp_path)
    supervisor.start()
    supervisor.stop(flag.touch, grace_s=LIMIT_S)
    assert supervisor.events == ["start w0", "ask", "end w0: exit code 0", "stopped"]


def test_stop_goes_from_asking_to_sigterm_to_sigkill(tmp_path: Path) -> None:
    codes = {"w0": SLEEP, "w1": DEAF}
    supervisor = Supervisor(["w0", "w1"], lambda name: [sys.executable, "-c", codes[name]], tmp_path)
    supervisor.start()
    for name in codes:
        wait_for_text(tmp_path / f"{name}.log", "ready")
    groups = list(supervisor.pids.values())
    supervisor.stop(lambda: None, grace_s=0.5)
    assert supervisor.events == [
        "start w0",
        "start w1",
        "ask",
        "SIGTERM w0",
        "SIGTERM w1",
        "end w0: SIGTERM",
        "SIGKILL w1",
        "end w1: SIGKILL",
        "stopped",
    ]
    assert [group_members(group) for group in groups] == [[], []]


def test_stop_ends_everything_also_when_asking_fails(tmp_path: Path) -> None:
    def ask() -> None:
        raise ConnectionError("the coordinator is gone")

    supervisor = Supervisor(["w0"], python(SLEEP), tmp_path)
    supervisor.start()
    wait_for_text(tmp_path / "w0.log", "ready")
    with pytest.raises(ConnectionError, match="the coordinator is gone"):
        supervisor.stop(ask)
    assert supervisor.events == ["start w0", "ask", "SIGTERM w0", "end w0: SIGTERM", "stopped"]


def test_stop_twice_and_before_start_does_nothing(tmp_path: Path) -> None:
    supervisor = Supervisor(["w0"], python(SLEEP), tmp_path)
    supervisor.stop()
    assert supervisor.events == []
    supervisor.start()
    supervisor.stop()
    events = list(supervisor.events)
    supervisor.stop(lambda: pytest.fail("asked twice"))
    assert supervisor.events == events


def test_no_restart_after_stop(tmp_path: Path) -> None:
    supervisor = Supervisor(["w0"], python("pass"), tmp_path, restart_delay_s=0.0)
    supervisor.start()
    poll_until_ended(supervisor)
    supervisor.stop()
    assert supervisor.poll() == []
    assert supervisor.restarts == 0


GRANDCHILD = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "


def test_what_a_worker_started_dies_with_it(tmp_path: Path) -> None:
    code = GRANDCHILD + "print('pid', p.pid, 'ok', flush=True); import os; os._exit(1)"
    with Supervisor(["w0"], python(code), tmp_path) as supervisor:
        group = supervisor.pids["w0"]
        grandchild = int(wait_for_text(tmp_path / "w0.log", "ok").split()[1])
        poll_until_ended(supervisor)
        wait_until(lambda: not is_running(grandchild), "the grandchild's end")
        wait_until(lambda: not group_members(group), "the end of the group")
        assert not is_running(grandchild)


OWNER = """
import sys, time
from pathlib import Path
from dapo_async.coordinator.supervisor import Supervisor
supervisor = Supervisor(["w0", "w1"], lambda name: [sys.executable, "-c", sys.argv[2]], Path(sys.argv[1]))
supervisor.start()
print(*supervisor.pids.values(), flush=True)
time.sleep(600)
"""


def test_no_orphan_survives_an_owner_killed_with_sigkill(tmp_path: Path) -> None:
    """Not even workers that ignored SIGTERM and never give up the interpreter's lock, nor what they started."""
    code = DEAF.replace(READY, GRANDCHILD + READY).replace("time.sleep(600)", "sum(range(10**12))")
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path), code], stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout is not None
        groups = [int(pid) for pid in owner.stdout.readline().split()]
        for name in ("w0", "w1"):
            wait_for_text(tmp_path / f"{name}.log", "ready")
        # Each group holds the worker, its sentinel and the grandchild, which inherits that SIGTERM is ignored.
        wait_until(lambda: [len(group_members(group)) for group in groups] == [3, 3], "both groups")
        for group in groups:
            os.killpg(group, signal.SIGTERM)
        assert [len(group_members(group)) for group in groups] == [3, 3]
        owner.kill()
        wait_until(lambda: not any(group_members(group) for group in groups), "the end of both groups")
