"""Whole files, and folders that one process at a time may write to: of two attempts at the same
work, the later."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imsvd_core.engine import checkpoints
from imsvd_core.engine.metrics import Metrics
from imsvd_core.system import run_folder
from imsvd_core.system.run_folder import ATTEMPT, RunFolder, Superseded

WRITER = """
import sys
from imsvd_core.system.run_folder import RunFolder, Superseded
run = RunFolder(sys.argv[1])
run.acquire()
print("held", flush=True)
for line in sys.stdin:
    try:
        run.write("checkpoints/newest", line.encode())
        print("written", flush=True)
    except Superseded as error:
        print(error, flush=True)
        run.release()
"""


class Writer:
    """Another process that holds `folder` as `attempt`, and lets go when it is superseded."""

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
    writers = []

    def make(attempt):
        writers.append(Writer(tmp_path, attempt))
        return writers[-1]

    yield make
    for other in writers:
        other.process.kill()
        other.process.communicate()


def test_a_later_attempt_takes_a_folder_over_and_the_earlier_one_cannot_write_any_more(
    writer, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_folder, "HANDOVER_SECONDS", 0.2)
    earlier = writer("2026-01-01T00:00:00#000000")
    assert earlier.write("earlier") == "written"
    monkeypatch.setenv(ATTEMPT, "2026-01-01T00:00:00#000001")
    # the earlier one does not let go in time: its node hangs, say
    with RunFolder(tmp_path) as run:
        run.write("checkpoints/newest", b"later")
        assert "has been taken over by process" in earlier.write("earlier again")
        assert (tmp_path / "checkpoints" / "newest").read_bytes() == b"later"
        assert not list(tmp_path.rglob("*.part"))
        run.check()


@pytest.mark.parametrize(
    ("attempt", "earlier", "error", "message"),
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
def test_who_may_not_take_a_folder_over(
    writer, tmp_path, monkeypatch, attempt, earlier, error, message
):
    other = writer(earlier)
    if attempt:
        monkeypatch.setenv(ATTEMPT, attempt)
    with pytest.raises(error, match=message):
        RunFolder(tmp_path).acquire()
    assert other.write("still mine") == "written"


def test_an_attempt_that_comes_after_a_later_one_has_ended_is_refused_too(tmp_path, monkeypatch):
    monkeypatch.setenv(ATTEMPT, "2026-01-01T00:00:00#000002")
    with RunFolder(tmp_path):
        pass
    monkeypatch.setenv(ATTEMPT, "2026-01-01T00:00:00#000001")
    with pytest.raises(Superseded, match="belongs to a later attempt"):
        RunFolder(tmp_path).acquire()


def _has_no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


def test_without_locks_the_token_alone_keeps_two_processes_apart(writer, tmp_path, monkeypatch):
    first = writer(None)
    monkeypatch.setattr(run_folder.fcntl, "lockf", _has_no_locks)
    with RunFolder(tmp_path) as run:
        assert "has been taken over by process" in first.write("mine")
        run.check()


def test_a_lock_ends_with_its_block_and_is_not_kept_by_a_forked_worker_that_lives_on(
    writer, tmp_path
):
    with RunFolder(tmp_path):
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
    try:
        assert writer(None).write("free") == "written"
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_the_outermost_of_nested_blocks_lets_go(writer, tmp_path):
    with RunFolder(tmp_path) as run:
        with run:
            run.write("result.json", {"knn": 81.2})
        with pytest.raises(AssertionError):
            writer(None)
        run.check()
    assert json.loads((tmp_path / "result.json").read_text()) == {"knn": 81.2}
    assert writer(None).write("free") == "written"


def test_an_earlier_attempt_that_falls_asleep_while_it_takes_a_folder_does_not_keep_it(
    tmp_path, monkeypatch
):
    monkeypatch.setenv(ATTEMPT, "2026-01-01T00:00:00#000000")
    leave, later = RunFolder._leave_token, []

    def sleepy(self):
        if not later:
            monkeypatch.setenv(ATTEMPT, "2026-01-01T00:00:00#000001")
            later.append(RunFolder(tmp_path))
            # begins, and has the folder, before the first wakes up
            later[0].acquire()
        leave(self)

    monkeypatch.setattr(RunFolder, "_leave_token", sleepy)
    with RunFolder(tmp_path) as earlier:
        later[0].check()
        with pytest.raises(Superseded):
            earlier.check()
        later[0].check()
        later[0].release()


def test_a_superseded_attempt_does_not_tidy_up_what_its_successor_is_writing(tmp_path, monkeypatch):
    monkeypatch.setenv(ATTEMPT, "2026-01-01T00:00:00#000000")
    with RunFolder(tmp_path) as earlier:
        checkpoints.save(earlier, 1, {})
        monkeypatch.setenv(ATTEMPT, "2026-01-01T00:00:00#000001")
        with RunFolder(tmp_path):
            half = tmp_path / "checkpoints" / ".step-000000002.pt.x.part"
            half.touch()
            with pytest.raises(Superseded):
                checkpoints.save(earlier, 1, {})
    assert half.exists()


def test_a_superseded_attempt_neither_empties_nor_lengthens_the_record(tmp_path, monkeypatch):
    monkeypatch.setenv(ATTEMPT, "2026-01-01T00:00:00#000000")
    with RunFolder(tmp_path) as earlier:
        metrics = Metrics(earlier)
        metrics.append(1, 0.5, {"loss": 1.0})
        monkeypatch.setenv(ATTEMPT, "2026-01-01T00:00:00#000001")
        with RunFolder(tmp_path):
            for write in (
                lambda: metrics.append(2, 1.0, {"loss": 0.5}),
                lambda: metrics.forget_after(0),
            ):
                with pytest.raises(Superseded):
                    write()
    assert [line["step"] for line in metrics.lines("loss")] == [1]


def test_a_file_system_that_stumbles_is_asked_again(tmp_path, monkeypatch):
    run, read, failures = RunFolder(tmp_path), Path.read_text, [OSError("stale"), OSError("stale")]

    def stumbling(path, *args, **kwargs):
        if failures:
            raise failures.pop()
        return read(path, *args, **kwargs)

    with run:
        monkeypatch.setattr(Path, "read_text", stumbling)
        monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: None)
        run.check()
        assert not failures
        monkeypatch.setattr(
            Path, "read_text", lambda path: (_ for _ in ()).throw(OSError("gone for good"))
        )
        with pytest.raises(OSError, match="gone for good"):
            run.check()


def test_a_folder_that_was_removed_is_not_made_again(tmp_path):
    with RunFolder(tmp_path) as run:
        (tmp_path / run_folder.TOKEN).unlink()
        with pytest.raises(Superseded, match="has been removed"):
            run.write("result.json", b"{}")
    assert not (tmp_path / "result.json").exists()
