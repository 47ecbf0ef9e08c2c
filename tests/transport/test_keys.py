"""Folders of keys: what is made, who may read it, what is refused, and who is admitted."""

import errno
import os
import stat
from pathlib import Path

import pytest

from dapo_async.cli import main
from dapo_async.errors import ConfigError
from dapo_async.transport import keys as keys_module
from dapo_async.transport.curve import new_pair, public_of
from dapo_async.transport.keys import LearnerKeys, make_keys, worker_keys
from tests import ROOT


def files(folder: Path) -> dict[str, int]:
    """Every file below ``folder``, and its mode."""
    return {
        str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture
def made(tmp_path: Path) -> Path:
    before = os.umask(0)  # the widest: the modes are not the umask's doing
    try:
        make_keys(tmp_path / "keys", "worker")
    finally:
        os.umask(before)
    return tmp_path / "keys"


def test_a_folder_for_each_side(made: Path) -> None:
    assert {path.stat().st_mode & 0o777 for path in [made, *made.rglob("*")] if path.is_dir()} == {0o700}
    assert files(made) == {
        "learner/learner.secret": 0o600,
        "learner/workers/worker.public": 0o644,
        "worker/worker.secret": 0o600,
        "worker/learner.public": 0o644,
    }
    learner, worker = LearnerKeys(str(made / "learner")).for_listeners, worker_keys(str(made / "worker"))
    assert worker.listener == learner.own.public == public_of(learner.own.secret)
    assert learner.admits(worker.own.public)
    assert not learner.admits(learner.own.public)
    assert not learner.admits(b"")


def test_more_workers_have_keys_of_their_own_and_one_can_be_locked_out(made: Path) -> None:
    make_keys(made, "lab")
    learner = LearnerKeys(str(made / "learner")).for_listeners
    first, second = worker_keys(str(made / "worker")), worker_keys(str(made / "lab"))
    assert first.own != second.own
    assert first.listener == second.listener
    assert learner.admits(first.own.public)
    assert learner.admits(second.own.public)
    (made / "learner" / "workers" / "worker.public").unlink()
    assert not learner.admits(first.own.public)
    assert learner.admits(second.own.public)


def test_nothing_is_ever_overwritten(made: Path) -> None:
    before = {name: (made / name).read_bytes() for name in files(made)}
    with pytest.raises(ConfigError, match=r"worker exists; nothing was changed\. .*--worker NAME"):
        make_keys(made, "worker")
    (made / "worker" / "worker.secret").rename(made / "moved")
    (made / "worker" / "learner.public").unlink()
    (made / "worker").rmdir()
    with pytest.raises(ConfigError, match=r"worker\.public exists"):
        make_keys(made, "worker")
    assert (made / "learner" / "learner.secret").read_bytes() == before["learner/learner.secret"]


@pytest.mark.parametrize("name", ["learner", "", "../up", "a/b", ".hidden", "x" * 101])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="letters, digits, dots, dashes"):
        make_keys(tmp_path / "keys", name)
    assert not (tmp_path / "keys").exists()


def test_a_broken_entry_of_the_list_admits_nobody_and_is_told_once(
    made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (made / "learner" / "workers" / "broken.public").write_text("not a key\n")
    learner, worker = LearnerKeys(str(made / "learner")).for_listeners, worker_keys(str(made / "worker"))
    for _ in range(2):
        assert learner.admits(worker.own.public)
        assert not learner.admits(b"not a key")
    assert [record.getMessage().split("/")[-1] for record in caplog.records] == [
        "broken.public admits nobody: holds no key"
    ]


def test_a_list_that_cannot_be_read_for_a_moment_is_taken_as_it_was(
    made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A network disk that stumbles neither ends the coordinator's thread nor keeps a worker out."""
    learner, worker = LearnerKeys(str(made / "learner")).for_listeners, worker_keys(str(made / "worker"))
    assert learner.admits(worker.own.public)

    def stumble(*_arguments: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(keys_module, "REREAD_S", 0.0)
    for method in ("read_bytes", "iterdir"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, stumble)
            assert learner.admits(worker.own.public)
            assert not learner.admits(b"other")
    assert "taken as it was" in caplog.text
    assert "the list is taken as it was" in caplog.text


def test_a_thousand_handshakes_read_the_list_once_and_a_change_counts_at_once(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "REREAD_S", 3600.0)
    read: list[Path] = []
    read_key = keys_module._key
    monkeypatch.setattr(keys_module, "_key", lambda path: read.append(path) or read_key(path))
    learner = LearnerKeys(str(made / "learner")).for_listeners
    worker = worker_keys(str(made / "worker"))
    read.clear()
    for number in range(1000):
        assert not learner.admits(b"stranger %d" % number)
    assert len(read) == 1  # one file stands on the list
    make_keys(made, "late")
    assert learner.admits(worker_keys(str(made / "late")).own.public)
    (made / "learner" / "workers" / "worker.public").unlink()
    assert not learner.admits(worker.own.public)


def test_a_list_whose_contents_change_is_read_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = LearnerKeys(str(made / "learner")).for_listeners
    make_keys(made, "other")
    listed = made / "learner" / "workers" / "worker.public"
    worker, other = worker_keys(str(made / "worker")), worker_keys(str(made / "other"))
    (made / "learner" / "workers" / "other.public").unlink()
    assert not learner.admits(other.own.public)
    listed.write_bytes(other.own.public)  # no file has come or gone
    monkeypatch.setattr(keys_module, "REREAD_S", 0.0)
    assert learner.admits(other.own.public)
    assert not learner.admits(worker.own.public)


def test_a_public_key_of_the_right_letters_that_stands_for_nothing_is_none(made: Path) -> None:
    (made / "worker" / "learner.public").write_bytes(b"#" * 40)
    with pytest.raises(ConfigError, match=r"learner\.public is missing or no key"):
        worker_keys(str(made / "worker"))


def test_the_learners_own_workers_get_keys_for_as_long_as_they_need_them(made: Path) -> None:
    keys, other = LearnerKeys(str(made / "learner")), LearnerKeys(str(made / "learner"))
    with keys.for_local_workers(made) as folder:
        local = worker_keys(str(folder))
        assert files(folder)["worker.secret"] == 0o600
        assert local.listener == keys.for_listeners.own.public
        assert keys.for_listeners.admits(local.own.public)
        assert not other.for_listeners.admits(local.own.public)
    assert not folder.exists()


def spoil_secret(made: Path) -> None:
    (made / "learner" / "learner.secret").write_text("x" * 39)


def open_secret(made: Path) -> None:
    (made / "learner" / "learner.secret").chmod(0o640)


def remove_secret(made: Path) -> None:
    (made / "learner" / "learner.secret").unlink()


def open_list(made: Path) -> None:
    (made / "learner" / "workers").chmod(0o775)


def open_folder(made: Path) -> None:
    (made / "learner").chmod(0o777)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_secret, "learner.secret: holds no key; make keys with: dapo-async keys"),
        (open_secret, r"can be read by other users \(mode 640\): chmod 600 it"),
        (remove_secret, "learner.secret: No such file or directory; make keys"),
        (open_list, r"workers can be written by other users \(mode 775\): chmod 700 it"),
        (open_folder, r"learner can be written by other users \(mode 777\)"),
    ],
)
def test_a_learner_without_a_proper_secret_is_refused(made: Path, spoil: object, told: str) -> None:
    assert callable(spoil)
    spoil(made)
    with pytest.raises(ConfigError, match=told):
        LearnerKeys(str(made / "learner"))


def test_the_wrong_side_s_folder_is_refused(made: Path) -> None:
    with pytest.raises(ConfigError, match="is a worker's folder; name the learner's"):
        LearnerKeys(str(made / "worker"))
    with pytest.raises(ConfigError, match="is the learner's folder, which stays there"):
        worker_keys(str(made / "learner"))
    (made / "worker" / "learner.public").write_bytes(new_pair().public[:20])
    with pytest.raises(ConfigError, match=r"learner\.public is missing or no key"):
        worker_keys(str(made / "worker"))


def test_the_command_makes_them_and_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "keys"
    assert main(["keys", str(folder)]) == 0
    told = capsys.readouterr().out
    assert f"--set network.keys={folder}/learner" in told
    assert f"--keys {folder}/worker" in told
    assert main(["keys", str(folder)]) == 2
    assert "exists; nothing was changed" in capsys.readouterr().err
    assert main(["keys", str(folder), "--worker", "lab"]) == 0
    (tmp_path / "file").write_text("")
    assert main(["keys", str(tmp_path / "file")]) == 2
    assert "cannot write keys" in capsys.readouterr().err


def test_check_reads_the_keys(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "quickstart.toml")
    wide = ["network.control=tcp://0.0.0.0:*", "network.weights=tcp://0.0.0.0:*"]

    def check(*settings: str) -> int:
        return main(["check", config, *[part for setting in settings for part in ("--set", setting)]])

    assert check(*wide, f"network.keys={made}/learner") == 0
    capsys.readouterr()
    assert check(*wide) == 2
    assert "make keys with dapo-async keys and set network.keys" in capsys.readouterr().err
    assert check(f"network.keys={made}/worker") == 2
    assert "is a worker's folder" in capsys.readouterr().err
    assert check(f"network.keys={made}/learner", "network.insecure=true") == 2
    assert "set one of them" in capsys.readouterr().err
