"""The tests of the ledger, run in forks against each perturbation, and the table of what they
caught."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from ledger import entries, perturb
from ledger.entries import REPOSITORY, Fault, Ledger, read, resolve
from ledger.perturb import RESULTS, perturbations

LAUNCHER = Path(__file__).parents[1] / "ledger.py"
AT_MOST = 8  # perturbations of one function
AT_LEAST = 2  # that its test must catch, whatever else crashes
SECONDS = 30.0  # that a perturbed test may take; one that takes longer never ends

# --- tests, run in forks
# ------------------------------------------------------------------------------------------

CAUGHT, SURVIVED, NO_INDEX, BROKEN, ENDLESS = (
    "caught",
    "survived",
    "no index",
    "does not run",
    "never ends",
)


@dataclass
class Trial:
    """What became of one perturbation."""

    function: str
    kind: str
    id: str
    outcome: str
    by: str = ""  #: the test that caught it, or what stopped it


@dataclass
class Job:
    """Functions and the tests that must catch their perturbations; labels may share one."""

    functions: tuple[str, ...]
    tests: tuple[str, ...]
    trials: list[Trial] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def tried(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.outcome in (CAUGHT, SURVIVED, ENDLESS)]

    def caught(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.outcome in (CAUGHT, ENDLESS)]


class Runner:
    """A pytest plug-in that runs, in place of the test session, every job in forks of the
    collecting process."""

    def __init__(self, jobs: Sequence[Job], equivalent: dict[str, dict[str, str]]):
        self.jobs, self.equivalent = jobs, equivalent
        self.failures: list[
            tuple[str, str, bool]
        ] = []  # test, what it said, whether it was the test's own verdict
        self.passed = 0
        self.sound: dict[
            str, str
        ] = {}  # tests that were run unperturbed, and what is wrong with them

    def pytest_runtestloop(self, session: Any) -> bool:
        gc.collect()
        gc.freeze()  # or every fork would copy the pages that its collector touches
        for job in self.jobs:
            items = []
            for test in job.tests:
                found = [
                    item
                    for item in session.items
                    if item.nodeid == test or item.nodeid.startswith(test + "[")
                ]
                items.append(found)
                if test not in self.sound:
                    self.sound[test] = self._unperturbed(test, found)
                if self.sound[test]:
                    job.faults.append(self.sound[test])
            if not job.faults:
                self._perturb(job, [item for found in items for item in found])
        return True

    def _unperturbed(self, test: str, items: list[Any]) -> str:
        if not items:
            return f"there is no test {test}"
        outcome, said = self._run(items)
        return (
            "" if outcome == SURVIVED else f"{test} does not pass without any perturbation: {said}"
        )

    def _perturb(self, job: Job, items: list[Any]) -> None:
        for name in job.functions:
            try:
                function, _ = resolve(name)
                chosen = perturbations(name, tuple(self.equivalent.get(name, ())))
            except Fault as fault:
                job.faults.append(str(fault))
                continue
            for one in chosen:
                if sum(trial.function == name for trial in job.tried()) == AT_MOST:
                    break
                outcome, said = self._run(
                    items, function, one.code, roll=RESULTS["index"] in one.id
                )
                job.trials.append(Trial(name, one.kind, one.id, outcome, said))
                if outcome == SURVIVED:
                    job.faults.append(f"nothing caught in {name}: {one.id}")
            count = sum(trial.function == name and trial.outcome == CAUGHT for trial in job.trials)
            if count < AT_LEAST:
                job.faults.append(
                    f"{count} perturbations of {name} are caught, and {AT_LEAST} must be"
                )
        for test in job.tests:
            if not job.faults and not any(
                trial.by.startswith(test) for trial in job.trials if trial.outcome == CAUGHT
            ):
                job.faults.append(f"{test} catches nothing that those before it do not catch")

    def _run(
        self,
        items: list[Any],
        function: FunctionType | None = None,
        code: CodeType | None = None,
        roll: bool = False,
    ) -> tuple[str, str]:
        """Run items in a fork, with a function's code exchanged, up to the first that fails by its
        own verdict."""
        here, there = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(here)
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            try:
                if function and code:
                    function.__code__ = code
                answer = self._verdict(items, roll)
            except BaseException as error:
                answer = (BROKEN, repr(error)[:200])
            os.write(there, json.dumps(answer).encode())
            os._exit(0)
        os.close(there)
        return _wait(child, here)

    def _verdict(self, items: list[Any], roll: bool) -> tuple[str, str]:
        for item, following in zip(items, [*items[1:], None], strict=False):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failures and self.failures[-1][2]:
                return CAUGHT, self.failures[-1][0]
        if self.failures:
            return BROKEN, "{}: {}".format(*self.failures[0])
        if roll and not perturb._had_an_index:
            return NO_INDEX, "the result is a number"
        return (SURVIVED, "") if self.passed else (BROKEN, f"{items[0].nodeid}: skipped")

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed += report.when == "call" and report.passed

    def pytest_exception_interact(self, node: Any, call: Any, report: Any) -> None:
        """A perturbation counts as caught if the test says so itself, and not if the function no
        longer runs."""
        if call.excinfo is not None:
            kinds = {kind.__name__ for kind in call.excinfo.type.__mro__}
            own = report.when == "call" and bool(
                kinds & {"AssertionError", "Failed", "GradcheckError"}
            )
            self.failures.append(
                (node.nodeid, f"{call.excinfo.typename}: {call.excinfo.value}"[:300], own)
            )


def _wait(child: int, pipe: int) -> tuple[str, str]:
    deadline, pause = time.monotonic() + SECONDS, 0.001
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(pipe)
            return ENDLESS, f"stopped after {SECONDS:g} seconds"
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    with os.fdopen(pipe, "rb") as answer:
        found = answer.read()
    return tuple(json.loads(found)) if found else (BROKEN, "the process died")


# --- the whole ledger
# ---------------------------------------------------------------------------------------------


def check(root: Path = REPOSITORY, only: Sequence[str] = ()) -> tuple[Ledger, dict[str, Job]]:
    """Try every perturbation of the ledger, or of some labels; returns it with each label's job."""
    entries._root = root
    ledger = read(root)
    if strange := set(only) - {entry.label for entry in ledger.entries}:
        raise SystemExit(f"no entry in the ledger: {', '.join(sorted(strange))}")
    jobs: dict[tuple[tuple[str, ...], tuple[str, ...]], Job] = {}
    of_label = {}
    for entry in ledger.entries:
        if not only or entry.label in only:
            of_label[entry.label] = jobs.setdefault(
                (entry.functions, entry.tests), Job(entry.functions, entry.tests)
            )
    named = {name for entry in ledger.entries for name in entry.functions}
    ledger.faults += [
        f"[equivalent] names {name}, which no entry names"
        for name in ledger.equivalent
        if name not in named
    ]
    if jobs:
        os.environ["OMP_NUM_THREADS"] = (
            # for torch, when the tests import it: a process with a pool of threads must not fork
            "1"
        )
        import pytest

        files = sorted({test.split("::")[0] for job in jobs.values() for test in job.tests})
        runner, said = Runner(list(jobs.values()), ledger.equivalent), io.StringIO()
        arguments = [
            *(str(root / file) for file in files if (root / file).exists()),
            f"--rootdir={root}",
            "-q",
            "-s",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:timeout",
            "-W",
            "ignore",
        ]
        with contextlib.redirect_stdout(said), contextlib.chdir(root):
            status = pytest.main(arguments, plugins=[runner])
        if status not in (0, 5):
            ledger.faults.append(f"the tests cannot be collected:\n{said.getvalue()[-4000:]}")
    for label, job in of_label.items():
        ledger.faults += [f"{label}: {fault}" for fault in job.faults]
    return ledger, of_label


def totals(jobs: dict[str, Job]) -> dict[str, int]:
    """Counts over all labels; what labels share counts once."""
    distinct = {id(job): job for job in jobs.values()}.values()
    return {
        "labels": len(jobs),
        "functions": len({name for job in distinct for name in job.functions}),
        "tests": len({name for job in distinct for name in job.tests}),
        "tried": sum(len(job.tried()) for job in distinct),
        "caught": sum(len(job.caught()) for job in distinct),
    }


def found(root: Path = REPOSITORY) -> dict[str, Any]:
    """What the checker finds, from a fresh process, or from the last one if nothing that it reads
    has changed.

    Only a ledger without faults is kept, in _build/ledger.
    """
    digest = hashlib.sha256(sys.version.encode())
    files = [
        path
        for folder, ending in (
            ("imsvd_core", "py"),
            ("tests", "py"),
            ("book", "md"),
            ("book/_ext", "py"),
        )
        for path in (root / folder).rglob(f"*.{ending}")
    ]
    for path in sorted(
        [*files, root / "_toc.yml", root / "book" / "ledger.toml", root / "requirements.txt"]
    ):
        if path.exists():
            digest.update(
                f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest()
            )
    folder = root / "_build" / "ledger"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{digest.hexdigest()[:16]}.json"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the build and the tests may ask at the same time
        if kept.exists():
            return json.loads(kept.read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory() as scratch:
            answer = Path(scratch, "found.json")
            environment = {
                key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")
            }
            done = subprocess.run(
                [sys.executable, str(LAUNCHER), "--root", str(root), "--json", str(answer)],
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment | {"OMP_NUM_THREADS": "1"},
            )
            if not answer.exists():
                raise RuntimeError(
                    f"the formula ledger could not be checked:\n{done.stdout[-4000:]}"
                )
            text = answer.read_text(encoding="utf-8")
        if done.returncode == 0:
            for old in folder.glob("*.json"):
                old.unlink()
            kept.write_text(text, encoding="utf-8")
    return json.loads(text)


def markdown(found: dict[str, Any]) -> list[str]:
    """The ledger's table and its totals, as lines of MyST."""
    counts = found["totals"]
    lines = [
        f"{counts['labels']} formulas and theorems, {counts['functions']} functions, "
        f"{counts['tests']} tests: "
        f"{counts['tried']} perturbations tried, {counts['caught']} caught.",
        "",
        "| Formula | Caught | Computed by | Checked by |",
        "|:--|:--|:--|:--|",
    ]
    for label, job in found["labels"].items():
        kind, of_job = (
            job["kind"],
            Job(job["functions"], job["tests"], [Trial(**trial) for trial in job["trials"]]),
        )
        place = f"Eq. {{eq}}`{label}`" if kind == "equation" else f"{{prf:ref}}`{label}`"
        functions = " ".join(f"`{name.removeprefix('imsvd_core.')}`" for name in of_job.functions)
        tests = "; ".join(
            f"{name.split('::')[-1].removeprefix('test_').replace('_', ' ')} "
            f"(`{Path(name.split('::')[0]).name}`)"
            for name in of_job.tests
        )
        lines.append(
            f"| {place} | {len(of_job.caught())} of {len(of_job.tried())} | {functions} | {tests} |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result for every label; the status is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("label", nargs="*", help="only these, with every perturbation")
    parser.add_argument("--root", type=Path, default=REPOSITORY, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write what was found to this file too")
    chosen = parser.parse_args(arguments)
    ledger, jobs = check(chosen.root.resolve(), chosen.label)
    for label, job in jobs.items():
        print(
            f"{label:34} {len(job.caught()):3} of {len(job.tried()):2} caught   "
            f"{', '.join(job.functions)}"
        )
        for trial in job.trials if chosen.label else []:
            print(f"    {trial.outcome:12} {trial.function}  {trial.id}\n{'':17}{trial.by}")
    counts = totals(jobs)
    print(
        "{labels} labels, {functions} functions, {tests} tests: "
        "{tried} perturbations tried, {caught} caught".format(**counts)
    )
    for fault in ledger.faults:
        print("FAULT", fault)
    if chosen.json:
        kinds = {entry.label: entry.kind for entry in ledger.entries}
        found = {
            "totals": counts,
            "faults": ledger.faults,
            "labels": {label: {"kind": kinds[label], **asdict(job)} for label, job in jobs.items()},
        }
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if ledger.faults else 0
