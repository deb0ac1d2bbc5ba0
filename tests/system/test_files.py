"""Whole files, and folders that one process at a time may write to: of two attempts at the same work, the later."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from imsvd_core.engine import checkpoints
from imsvd_core.system import files
from imsvd_core.system.files import ATTEMPT, Superseded, atomic_write, hold

WRITER = """
import sys
from imsvd_core.system.files import Superseded, atomic_write, hold
held = hold(sys.argv[1])
print("held", flush=True)
for line in sys.stdin:
    try:
        with atomic_write(sys.argv[1] + "/checkpoints/newest") as file:
            file.write(line.encode())
        print("written", flush=True)
    except Superseded as error:
        print(error, flush=True)
        del held
"""


class Writer:
    """Another process that holds `folder` as `attempt`; it lets go when it finds itself superseded."""

    def __init__(self, folder, attempt):
        environment = {key: value for key, value in os.environ.items() if key != ATTEMPT}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | ({ATTEMPT: attempt} if attempt else {}),
        )
        assert self.process.stdout.readline() == "held\n"

    def write(self, text):
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@pytest.fixture
def writer(tmp_path):
    made = []

    def make(attempt):
        made.append(Writer(tmp_path, attempt))
        return made[-1]

    yield make
    for one in made:
        one.process.kill()
        one.process.communicate()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fcntl")
def test_a_later_attempt_takes_a_folder_over_and_the_earlier_one_cannot_write_any_more(
    writer, tmp_path, monkeypatch
):
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    earlier = writer("2026-01-01T00:00:00#000000")
    assert earlier.write("earlier") == "written"
    monkeypatch.setenv(ATTEMPT, "2026-01-01T00:00:00#000001")
    held = hold(tmp_path)  # the earlier one does not let go in time: its node hangs, say
    with atomic_write(tmp_path / "checkpoints" / "newest") as file:
        file.write(b"later")
    assert "has been taken over by process" in earlier.write("earlier again")
    assert (tmp_path / "checkpoints" / "newest").read_bytes() == b"later"
    assert not list(tmp_path.rglob("*.part"))
    held.check()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fcntl")
@pytest.mark.parametrize(
    ("mine", "theirs", "error", "words"),
    [
        (
            "2026-01-01T00:00:00#000000",
            "2026-01-01T00:00:00#000001",
            Superseded,
            "belongs to a later attempt",
        ),
        (
            "2026-01-01T00:00:00#000001",
            "2026-01-01T00:00:00#000001",
            ValueError,
            "is in use by process",
        ),
        ("2026-01-01T00:00:00#000000", None, ValueError, "is in use by process"),
        (None, "2026-01-01T00:00:00#000000", ValueError, "is in use by process"),
    ],
)
def test_who_may_not_take_a_folder_over(writer, tmp_path, monkeypatch, mine, theirs, error, words):
    other = writer(theirs)
    if mine:
        monkeypatch.setenv(ATTEMPT, mine)
    with pytest.raises(error, match=words):
        hold(tmp_path)
    assert other.write("still mine") == "written"


def test_an_attempt_that_comes_after_a_later_one_has_ended_is_refused_too(tmp_path, monkeypatch):
    monkeypatch.setenv(ATTEMPT, "2026-01-01T00:00:00#000002")
    hold(tmp_path)  # let go at once
    monkeypatch.setenv(ATTEMPT, "2026-01-01T00:00:00#000001")
    with pytest.raises(Superseded, match="belongs to a later attempt"):
        hold(tmp_path)


def test_without_locks_the_token_alone_keeps_two_processes_apart(writer, tmp_path, monkeypatch):
    first = writer(None)
    monkeypatch.setattr(files, "fcntl", None)
    held = hold(tmp_path)
    assert "has been taken over by process" in first.write("mine")
    held.check()


def test_an_earlier_attempt_that_falls_asleep_while_it_takes_a_folder_does_not_keep_it(
    tmp_path, monkeypatch
):
    monkeypatch.setenv(ATTEMPT, "2026-01-01T00:00:00#000000")
    leave, later = files.Hold._leave_token, []

    def sleepy(self):
        if not later:
            monkeypatch.setenv(ATTEMPT, "2026-01-01T00:00:00#000001")
            later.append(None)
            later[0] = files.Hold(tmp_path)  # begins, and has the folder, before the first wakes up
        leave(self)

    monkeypatch.setattr(files.Hold, "_leave_token", sleepy)
    earlier = files.Hold(tmp_path)
    later[0].check()
    with pytest.raises(Superseded):
        earlier.check()
    later[0].check()


def test_a_superseded_attempt_does_not_tidy_up_what_its_successor_is_writing(tmp_path, monkeypatch):
    monkeypatch.setenv(ATTEMPT, "2026-01-01T00:00:00#000000")
    earlier = hold(tmp_path)
    checkpoints.save(tmp_path / "checkpoints", 1, {})
    monkeypatch.setenv(ATTEMPT, "2026-01-01T00:00:00#000001")
    files.Hold(tmp_path)
    half = tmp_path / "checkpoints" / ".step-000000002.pt.x.part"
    half.touch()
    with pytest.raises(Superseded):
        checkpoints.save(tmp_path / "checkpoints", 1, {})
    assert half.exists() and earlier


def test_a_file_system_that_stumbles_is_asked_again(tmp_path, monkeypatch):
    held, read, failures = hold(tmp_path), Path.read_text, [OSError("stale"), OSError("stale")]

    def stumbling(path, *args, **kwargs):
        if failures:
            raise failures.pop()
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", stumbling)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    held.check()
    assert not failures
    monkeypatch.setattr(
        Path, "read_text", lambda path: (_ for _ in ()).throw(OSError("gone for good"))
    )
    with pytest.raises(OSError, match="gone for good"):
        held.check()


def test_a_folder_that_was_removed_is_not_made_again(tmp_path):
    held = hold(tmp_path)
    (tmp_path / files.TOKEN).unlink()
    with (
        pytest.raises(Superseded, match="has been removed"),
        atomic_write(tmp_path / "result.json") as file,
    ):
        file.write(b"{}")
    assert held and not (tmp_path / "result.json").exists()
