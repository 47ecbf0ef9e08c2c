"""Verdicts: the published strings of DAPO's check, the sums, and a user's function that misbehaves in every way."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dapo_async.config.settings import Reward
from dapo_async.errors import ConfigError, WorkerError
from dapo_async.verify.child import Ask, Child, Load, Loaded, Reply
from dapo_async.verify.dapo_math import check_answer, last_boxed, normalise
from dapo_async.verify.verifier import InlineVerifier, Verdict, Verifier, check_verifier, make_verifier
from tests import ROOT

VECTORS = json.loads((ROOT / "tests/data/dapo_vectors.json").read_text())["verifier_math_dapo"]
DEADLINE_S = 60.0

USER_MODULE = """
import os, re, subprocess, sys, time
import numpy as np

class Nasty(Exception):
    def __str__(self):
        raise RuntimeError("no text")

def score(text, truth):
    if text == "pid":
        return True, str(os.getpid())
    if text == "raise":
        raise ValueError("cannot judge this")
    if text == "raise without a text":
        raise Nasty
    if text == "sys.exit":
        sys.exit(0)
    if text == "os._exit":
        os._exit(7)
    if text == "segfault":
        os.kill(os.getpid(), 11)
    if text == "close everything":
        os.closerange(0, 100)
    if text == "fork and return twice":
        os.fork()
    if text.startswith("loop") and truth.startswith("/"):
        open(truth, "w").close()  # it has begun
    if text == "loop":
        while True:
            pass
    if text == "loop in C":
        re.match("(a+)+$", "a" * 100 + "b")  # never lets go of the interpreter
    if text == "sleep with a helper":
        helper = subprocess.Popen(["sleep", "90"])
        open(truth, "w").write(str(helper.pid))
        time.sleep(1000)
    if text == "noise":
        for _ in range(2000):
            print("noise" * 20)
            sys.stderr.write("more noise")
        sys.stdout.buffer.write(bytes(range(256)))
        sys.stdout.flush()
        os.write(1, b"raw")
        input_is_empty = sys.stdin is None or sys.stdin.read() == ""
        return input_is_empty, "x" * 10_000
    if text.startswith("return "):
        return eval(text.removeprefix("return "))
    return text == truth
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an importable module with the function ``score``."""
    (tmp_path / "my_rewards.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_rewards"


@pytest.fixture
def verifier(user_module: str) -> Iterator[Verifier]:
    made = make_verifier(Reward(verifier=f"{user_module}:score", timeout_s=1.5))
    yield made
    made.close()


def judge(verifier: Verifier, text: str, truth: str = "truth") -> Verdict:
    verifier.submit("key", text, truth)
    deadline = time.monotonic() + DEADLINE_S
    while not (done := verifier.poll(timeout_s=1.0)):
        assert time.monotonic() < deadline, f"no verdict on {text!r}"
    [(key, verdict)] = done
    assert key == "key"
    return verdict


def wait_for_end(pid: int) -> None:
    """Until the process is gone, or a zombie that nobody reaps."""
    deadline = time.monotonic() + DEADLINE_S
    stat = Path(f"/proc/{pid}/stat")
    while time.monotonic() < deadline:
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except OSError:
            return
        time.sleep(0.02)
    pytest.fail(f"process {pid} still runs")


# --- DAPO's check ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("boxed_fallback", [False, True])
@pytest.mark.parametrize("vector", VECTORS, ids=range(len(VECTORS)))
def test_dapo_math_gives_the_published_verdicts(vector: dict, boxed_fallback: bool) -> None:
    expected = vector["verl_since_bf48903d" if boxed_fallback else "dapo_repo_and_verl_before_2026-08-14"]
    verdict = judge(make_verifier(Reward(boxed_fallback=boxed_fallback)), vector["solution"], vector["ground_truth"])
    assert verdict == Verdict(expected["acc"], expected["pred"], "ok")


def test_there_are_32_published_strings() -> None:
    assert len(VECTORS) == 32


@pytest.mark.parametrize(
    ("answer", "spelling"),
    [
        ("a mean of $x = 3$, or so", "3,orso"),  # what follows the last "=", its "$" then unmatched
        ("$12$ apples or $13$", "12"),  # the first $...$ alone
        (r"\frac12", r"\frac{1}{2}"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"5\text{}^2", "5"),
        (r"90^\circ", "90"),
        (r"3\;\mbox{m}", "3"),
        ("1,000,000", "1000000"),
        ("1,2,x", "1,2,x"),
    ],
)
def test_normalised_spelling(answer: str, spelling: str) -> None:
    assert normalise(answer) == spelling


def test_only_the_last_300_and_100_characters_count() -> None:
    answer = "Answer: 7\n"
    assert check_answer(answer + "." * (300 - len(answer)), "7") == (True, "7")
    assert check_answer(answer + "." * (301 - len(answer)), "7") == (False, "[INVALID]")
    boxed = r"\boxed{7}"
    assert check_answer(boxed + "." * (100 - len(boxed)), "7", True) == (True, "7")
    assert check_answer(boxed + "." * (101 - len(boxed)), "7", True) == (False, "[INVALID]")


@pytest.mark.parametrize(
    ("text", "content"),
    [(r"\boxed{1} \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"\boxed{1} \boxed{2", None), ("boxed{1}", None)],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


# --- the other built-in checks ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "truth", "correct", "predicted"),
    [
        ("3+5=8;8-2=6;#6", "6", True, "6"),
        ("#6", "6", True, "6"),
        ("#6", " 6\n", True, "6"),
        ("3+5=9;#6", "6", True, "6"),  # only the final answer counts
        ("#0", "0", True, "0"),
        ("#7", "6", False, "7"),
        ("#66", "6", False, "66"),
        ("6", "6", False, ""),
        ("", "6", False, ""),
        ("#", "6", False, ""),
        ("#5#6", "6", False, "6"),
        ("#6#", "6", False, ""),
        ("#6 ", "6", False, "6 "),
        ("#6\n", "6", False, "6\n"),
        ("#06", "6", False, "06"),
        ("#+6", "6", False, "+6"),
        ("#6;", "6", False, "6;"),
        ("#٦", "6", False, "٦"),
    ],
)
def test_sums(text: str, truth: str, correct: bool, predicted: str) -> None:
    assert judge(make_verifier(Reward(verifier="sums")), text, truth) == Verdict(correct, predicted, "ok")


def test_exact_ignores_surrounding_white_space_only() -> None:
    exact = make_verifier(Reward(verifier="exact"))
    assert judge(exact, " a b\n", "a b") == Verdict(True, "a b", "ok")
    assert judge(exact, "a  b", "a b") == Verdict(False, "a  b", "ok")
    assert judge(exact, "x" * 1000, "y").predicted == "x" * 500


def test_built_in_checks_answer_in_order_and_start_nothing() -> None:
    threads = threading.active_count()
    exact = make_verifier(Reward(verifier="exact"))
    for key in range(3):
        exact.submit(key, str(key), "1")
    assert exact.pending == 3
    assert exact.poll() == [(key, Verdict(key == 1, str(key), "ok")) for key in range(3)]
    assert (exact.pending, exact.poll(timeout_s=10.0)) == (0, [])
    assert threading.active_count() == threads
    exact.close()


def test_a_built_in_check_that_raises_costs_its_own_verdict(caplog: pytest.LogCaptureFixture) -> None:
    def inverse(text: str, truth: str) -> tuple[bool, str]:
        return float(truth) == 1 / float(text), text

    verifier = InlineVerifier(inverse, "inverse")
    with caplog.at_level(logging.WARNING):
        for key, text in enumerate(["4", "0", "2"]):
            verifier.submit(key, text, "0.25")
    assert verifier.pending == 3
    assert verifier.poll() == [(0, Verdict(True, "4")), (1, Verdict(False, "", "error")), (2, Verdict(False, "2"))]
    [record] = caplog.records
    assert record.getMessage() == (
        "verifier inverse: ZeroDivisionError: float division by zero; counted as wrong "
        "(truth '0.25', text ending in '0')"
    )


# --- the user's function ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("raise", Verdict(False, "", "error")),
        ("raise without a text", Verdict(False, "", "error")),
        ("sys.exit", Verdict(False, "", "error")),
        ("os._exit", Verdict(False, "", "error")),
        ("segfault", Verdict(False, "", "error")),
        ("close everything", Verdict(False, "", "error")),
        ("loop", Verdict(False, "", "timeout")),
        ("loop in C", Verdict(False, "", "timeout")),
        ("noise", Verdict(True, "x" * 500, "ok")),
        ("fork and return twice", Verdict(False, "", "ok")),
    ],
)
def test_whatever_the_function_does_the_next_submission_is_judged(
    verifier: Verifier, text: str, expected: Verdict
) -> None:
    assert judge(verifier, text) == expected
    assert judge(verifier, "truth") == Verdict(True, "", "ok")
    assert judge(verifier, "lie") == Verdict(False, "", "ok")


def test_what_the_function_may_return(verifier: Verifier) -> None:
    for text, expected in {
        "True": Verdict(True, "", "ok"),
        "1.0": Verdict(True, "", "ok"),
        "0": Verdict(False, "", "ok"),
        "np.float32(1)": Verdict(True, "", "ok"),
        "np.int64(0)": Verdict(False, "", "ok"),
        "np.bool_(False)": Verdict(False, "", "ok"),
        "np.array(1)": Verdict(True, "", "ok"),
        "(True, 'seen')": Verdict(True, "seen", "ok"),
        "(np.bool_(True), 'seen')": Verdict(True, "seen", "ok"),
        "(1, 'seen')": Verdict(True, "seen", "ok"),
        "(False, '\\ud800')": Verdict(False, "?", "ok"),
        "0.1": Verdict(False, "", "error"),
        "0.999": Verdict(False, "", "error"),
        "-1.0": Verdict(False, "", "error"),
        "2": Verdict(False, "", "error"),
        "np.float32(0.5)": Verdict(False, "", "error"),
        "(0.5, 'seen')": Verdict(False, "", "error"),
        "None": Verdict(False, "", "error"),
        "'yes'": Verdict(False, "", "error"),
        "float('nan')": Verdict(False, "", "error"),
        "1 + 2j": Verdict(False, "", "error"),
        "(True, 5)": Verdict(False, "", "error"),
        "(True, 'seen', 1)": Verdict(False, "", "error"),
        "{'score': 1.0}": Verdict(False, "", "error"),
        "np.ones(3)": Verdict(False, "", "error"),
        "10**400": Verdict(False, "", "error"),
    }.items():
        assert judge(verifier, f"return {text}") == expected, text


@pytest.mark.parametrize("returned", ["0.1", "np.float64(-1)", "np.ones(3)", "(0.5, 'half')", "None"])
def test_a_graded_reward_is_refused_and_the_log_says_what_would_be_right(
    verifier: Verifier, caplog: pytest.LogCaptureFixture, returned: str
) -> None:
    with caplog.at_level(logging.WARNING):
        judge(verifier, f"return {returned}")
    [record] = caplog.records
    shown = {"np.float64(-1)": "np.float64(-1.0)", "np.ones(3)": "array([1., 1., 1.])"}.get(returned, returned)
    assert record.getMessage().startswith(
        f"verifier my_rewards:score: TypeError: returned {shown}: answers are right or wrong, and there are no graded "
        "rewards; a verifier returns a bool, 1 or 0, or (bool, str); counted as wrong "
    )


def test_one_verdict_per_submission_across_restarts(verifier: Verifier) -> None:
    texts = ["truth", "os._exit", "raise", "lie", "fork and return twice", "truth"] * 2
    for key, text in enumerate(texts):
        verifier.submit(key, text, "truth")
    done: list[tuple[object, Verdict]] = []
    deadline = time.monotonic() + DEADLINE_S
    while verifier.pending and time.monotonic() < deadline:
        assert verifier.pending == len(texts) - len(done)
        done += verifier.poll(timeout_s=1.0)
    assert [key for key, _ in done] == list(range(len(texts)))
    expected = {"truth": (True, "ok"), "os._exit": (False, "error"), "raise": (False, "error")}
    assert [(v.correct, v.status) for _, v in done] == [expected.get(text, (False, "ok")) for text in texts]
    assert verifier.poll() == []


def test_what_the_function_prints_goes_to_standard_error(capfd: pytest.CaptureFixture, user_module: str) -> None:
    verifier = make_verifier(Reward(verifier=f"{user_module}:score"))
    judge(verifier, "noise")
    verifier.close()
    captured = capfd.readouterr()
    assert (captured.out, captured.err.count("more noise")) == ("", 2000)


def test_large_and_odd_texts_arrive_whole(verifier: Verifier) -> None:
    text = "é\0\n" * 500_000
    assert judge(verifier, text, text).correct
    assert not judge(verifier, text, text[:-1]).correct
    assert judge(verifier, "\ud800", "?").correct  # what UTF-8 cannot carry is replaced


def test_neither_poll_nor_close_waits_for_a_function_that_hangs(user_module: str) -> None:
    verifier = make_verifier(Reward(verifier=f"{user_module}:score", timeout_s=1000.0))
    verifier.submit("key", "loop", "")
    assert (verifier.poll(), verifier.pending) == ([], 1)
    verifier.close()  # the check that every test passes finds the thread and the child if they stay
    assert (verifier.poll(timeout_s=5.0), verifier.pending) == ([], 0)


def test_misbehaviour_is_logged_shortened(verifier: Verifier, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        judge(verifier, "raise", "T" * 5000)
        judge(verifier, "os._exit")
        judge(verifier, "truth")
    first, second = (record.getMessage() for record in caplog.records)
    assert first == (
        "verifier my_rewards:score: ValueError: cannot judge this; counted as wrong "
        f"(truth {'T' * 200!r}, text ending in 'raise')"
    )
    assert "ended the process with exit code 7" in second


def test_of_many_failures_the_first_are_logged_and_then_every_thousandth(
    verifier: Verifier, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for key in range(2001):
            verifier.submit(key, "raise", str(key))
        done = []
        deadline = time.monotonic() + DEADLINE_S
        while verifier.pending and time.monotonic() < deadline:
            done += verifier.poll(timeout_s=1.0)
    assert len(done) == 2001
    told = [record.getMessage() for record in caplog.records]
    failures = [int(text.partition("truth '")[2].partition("'")[0]) for text in told if "counted as wrong" in text]
    assert failures == [*range(20), 999, 1999]
    assert [text for text in told if "counted as wrong" not in text] == [
        f"verifier my_rewards:score failed {number} times; only every thousandth is told now"
        for number in (20, 1000, 2000)
    ]


def test_a_timeout_ends_what_the_function_started(verifier: Verifier, tmp_path: Path) -> None:
    note = tmp_path / "helper.pid"
    assert judge(verifier, "sleep with a helper", str(note)).status == "timeout"
    wait_for_end(int(note.read_text()))


def test_close_ends_the_child_and_may_be_repeated(verifier: Verifier) -> None:
    pid = int(judge(verifier, "pid").predicted)
    verifier.close()
    verifier.close()
    assert not Path(f"/proc/{pid}").exists()


def test_poll_says_when_verdicts_can_never_come(verifier: Verifier) -> None:
    verifier.close()
    verifier.submit("key", "truth", "truth")
    with pytest.raises(WorkerError, match="ended with work pending"):
        verifier.poll()


@pytest.mark.parametrize("doing", ["nothing", "loop", "loop in C"])
def test_the_child_dies_with_a_killed_owner(user_module: str, tmp_path: Path, doing: str) -> None:
    begun = tmp_path / "begun"
    owner = f"""
        import sys, time
        sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]
        from dapo_async.config.settings import Reward
        from dapo_async.verify.verifier import make_verifier
        verifier = make_verifier(Reward(verifier="my_rewards:score", timeout_s=1000.0))
        verifier.submit(0, "pid", "")
        print(verifier.poll(timeout_s={DEADLINE_S})[0][1].predicted, flush=True)
        verifier.submit(0, {doing!r}, {str(begun)!r})
        time.sleep(1000)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(owner)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        deadline = time.monotonic() + DEADLINE_S
        while doing != "nothing" and not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)
        assert Path(f"/proc/{pid}").exists()
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=DEADLINE_S)
    wait_for_end(pid)


def test_the_child_ends_in_the_midst_of_a_loop_when_its_owner_hangs_up(user_module: str) -> None:
    child = Child(threading.Event())
    try:
        assert child.exchange(Load(user_module, "score", sys.path), Loaded, DEADLINE_S).error == ""
        with pytest.raises(TimeoutError):
            child.exchange(Ask("loop", ""), Reply, 0.2)
        child._socket.close()
        assert child._process.wait(timeout=DEADLINE_S) == 0
    finally:
        child.kill()


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["maths", "a:b:c", "my module:score", "m:", ":f", "m:f()", "m..n:f"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_verifier(Reward(verifier=name))
    assert str(caught.value) == (
        f'reward.verifier = "{name}": must be sums, dapo_math, exact, math_verify, or module:function of your own, '
        'for example "my_rewards:judge"'
    )


def test_a_missing_module_is_named_with_the_places_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_verifier(Reward(verifier="nowhere.to_be_found:score"))
    message = str(caught.value)
    assert message.startswith(
        f'reward.verifier = "nowhere.to_be_found:score": there is no module "nowhere" in {os.getcwd()}, '
    )
    assert str(tmp_path) in message


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("", 'module "broken" ({file}) has no function "score"'),
        ("score = 5", 'module "broken" ({file}) has no function "score"'),
        (
            "import not_installed",
            "importing module \"broken\" failed with ModuleNotFoundError: No module named 'not_installed'",
        ),
        ("raise SystemExit(3)", 'importing module "broken" failed with SystemExit: 3'),
        ("import os; os._exit(3)", 'importing module "broken" ended the process with exit code 3'),
        ("import os; os.kill(os.getpid(), 9)", 'importing module "broken" ended the process by signal 9'),
    ],
)
def test_a_function_that_cannot_be_had_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, problem: str
) -> None:
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        make_verifier(Reward(verifier="broken:score"))
    assert str(caught.value) == f'reward.verifier = "broken:score": {problem.format(file=tmp_path / "broken.py")}'


def test_check_verifier_accepts_and_leaves_nothing(user_module: str) -> None:
    check_verifier(Reward(verifier=f"{user_module}:score"))
    check_verifier(Reward(verifier="sums"))


def test_the_working_directory_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").write_text("def score(text, truth):\n    return True\n")
    monkeypatch.chdir(tmp_path)
    check_verifier(Reward(verifier="only_here:score"))


def test_contract_modules_do_not_import_torch() -> None:
    program = (
        "import sys, dapo_async.verify.verifier; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=DEADLINE_S, check=False)
    assert finished.returncode == 0
