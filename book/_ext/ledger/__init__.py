"""The formula ledger: every labelled formula names its function and its test, and the test bites.

    python book/_ext/ledger.py               # every label: perturb its function, watch its test
    python book/_ext/ledger.py eq-loss       # one label, with every perturbation
    python book/_ext/ledger.py --json FILE   # and what was found, for machines

A perturbation is a small change of a function: a sign, a factor or an index, at one place of its
source or in its result. Its code object is swapped in place, in a forked process, so that whoever
holds a reference sees the change. The tests are collected once; each perturbation runs them in a
process of its own.
"""

from typing import Any

from ledger.entries import (
    _DEFINITIONS,
    REPOSITORY,
    STATEMENTS,
    Entry,
    Fault,
    Ledger,
    chapters,
    labels_of,
    of_chapter,
    read,
    resolve,
)
from ledger.perturb import KINDS, Perturbation, perturbations
from ledger.run import AT_LEAST, AT_MOST, Job, Trial, check, found, main, markdown, totals

__all__ = [
    "AT_LEAST",
    "AT_MOST",
    "KINDS",
    "REPOSITORY",
    "STATEMENTS",
    "_DEFINITIONS",
    "Entry",
    "Fault",
    "Job",
    "Ledger",
    "Perturbation",
    "Trial",
    "chapters",
    "check",
    "found",
    "labels_of",
    "main",
    "markdown",
    "of_chapter",
    "perturbations",
    "read",
    "resolve",
    "totals",
]


def setup(app: Any) -> dict[str, Any]:
    """{formula-ledger}: the table, for Sphinx."""
    from docutils import nodes
    from docutils.statemachine import StringList
    from sphinx.util import logging
    from sphinx.util.docutils import SphinxDirective

    class FormulaLedger(SphinxDirective):
        def run(self) -> list[nodes.Node]:
            self.env.note_reread()
            what = found()
            for fault in what["faults"]:
                logging.getLogger(__name__).warning(
                    "formula ledger: %s", fault, location=self.get_location()
                )
            block = nodes.container(classes=["imsvd-ledger"])
            self.state.nested_parse(
                StringList(markdown(what), source=""), self.content_offset, block
            )
            return [block]

    app.add_directive("formula-ledger", FormulaLedger)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
