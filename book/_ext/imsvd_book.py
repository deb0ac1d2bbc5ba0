"""What this book asks of Sphinx beyond its ready-made extensions.

* One data set for all chapters, resolved before the first of them runs, and named on every page
  that computes. * An execution cache keyed on all that a cell can depend on: jupyter-cache alone
  knows a chapter's own code, and would publish yesterday's numbers after a change in `imsvd_core`.
* Every script on our own pages: MathJax is copied out of its wheel, and Thebe, which has no use
here, is left out. * Chapter numbers that follow the file names, so that "Eq. (4.2)" stays true
while chapters are added. * Chapters that are planned stand greyed in the sidebar. * The labels
{here}, {stored} and {quoted}, which say where a number comes from, and the table of stored results.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from docutils import nodes
from listings import narrow_included
from pybtex.plugin import register_plugin
from pybtex.style.formatting.plain import Style as Plain
from pybtex.style.labels import BaseLabelStyle
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.environment.collectors.toctree import TocTreeCollector
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

import imsvd_core
from imsvd_core.data import memory as datasets
from imsvd_core.data import sources

logger = logging.getLogger(__name__)
REPOSITORY = Path(__file__).resolve().parents[2]
KEPT_CACHES = 4  # two scales on two data sets; older ones are removed


# --- one data set, one cache
# --------------------------------------------------------------------------------------


def prepare(app: Sphinx, config: Config) -> None:
    """Choose scale and data set, hand both to the kernels, and point the execution cache at their
    key."""
    os.environ.setdefault("IMSVD_SCALE", "laptop")
    scale = os.environ["IMSVD_SCALE"]
    name = sources.resolve(os.environ.get("IMSVD_DATASET", "auto"))
    os.environ["IMSVD_DATASET"] = name
    kit = str(Path(__file__).parent)  # the cells import kit.py
    os.environ["PYTHONPATH"] = os.pathsep.join([kit, *filter(None, [os.environ.get("PYTHONPATH")])])
    config.imsvd_run = {"scale": scale, "dataset": name, "title": sources.title(name)}
    logger.info(
        "The chapters run at scale %r on the data set %s.", scale, config.imsvd_run["title"]
    )

    key = cache_key(
        what_cells_depend_on(Path(app.srcdir)), scale, sys.version, datasets.manifest(name)
    )
    caches = Path(app.outdir).parent / "cache"
    config.nb_execution_cache_path = str(caches / key)
    (caches / key).mkdir(parents=True, exist_ok=True)
    os.utime(caches / key)
    prune(caches)


def what_cells_depend_on(book: Path) -> list[Path]:
    """Return the files that a cell may read or import."""
    package = Path(imsvd_core.__file__).parent
    sources = [path for pattern in ("*.py", "*.js") for path in package.rglob(pattern)]
    kit, requirements = Path(__file__).with_name("kit.py"), REPOSITORY / "requirements.txt"
    return [*sources, *book.joinpath("results").rglob("*.*"), kit, requirements]


def cache_key(files: Iterable[Path], *values: Any) -> str:
    """Hash files and values: all that can change what a cell prints, its own code aside, which
    jupyter-cache compares."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    for path in sorted(files):
        digest.update(f"{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def prune(caches: Path) -> None:
    """Keep the caches used last."""
    newest_first = sorted(caches.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in newest_first[KEPT_CACHES:]:
        shutil.rmtree(folder)


def say_what_ran(
    app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: nodes.document
) -> None:
    """End every page that computes with the scale and the data set that it ran at."""
    computes = doctree is not None and any(
        node.get("nb_element") == "cell_code" for node in doctree.findall(nodes.container)
    )
    if computes:
        run = app.config.imsvd_run
        context["body"] += (
            f'<p class="imsvd-run">This page was executed at scale '
            f"<code>{html.escape(run['scale'])}</code>"
            f" on the data set {html.escape(run['title'])}.</p>\n"
        )


def write_run(app: Sphinx, error: Exception | None) -> None:
    """Leave beside the pages, for machines, what they ran on."""
    if error is None and app.builder.format == "html":
        Path(app.outdir, "run.json").write_text(json.dumps(app.config.imsvd_run, indent=2) + "\n")


# --- scripts of our own
# -------------------------------------------------------------------------------------------


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Copy MathJax, one file with its fonts drawn as paths, from the wheel that bundles it."""
    if error is None and app.builder.format == "html":
        source = files("sphinx-mathjax-offline") / "static" / "mathjax" / "tex-svg.js"
        target = Path(app.outdir, "_static", "mathjax")
        target.mkdir(parents=True, exist_ok=True)
        target.joinpath("tex-svg.js").write_bytes(source.read_bytes())


def silence_thebe(app: Sphinx, config: Config) -> None:
    """Take back what jupyter-book adds to every page, asked or not: Thebe's script, twice, which is
    an error in it."""
    for listeners in app.events.listeners.values():
        for listener in list(listeners):
            if getattr(listener.handler, "__name__", "") in (
                "init_thebe_core",
                "update_thebe_context",
            ):
                app.disconnect(listener.id)


# --- the bibliography
# ----------------------------------------------------------------------------------------------


class AuthorYear(BaseLabelStyle):
    """Labels of the list as the text cites: Bardes et al., 2022."""

    def format_labels(self, sorted_entries: Iterable[Any]) -> Iterator[str]:
        """Yield the label of each entry."""
        for entry in sorted_entries:
            people = entry.persons["author"]
            names = [
                " ".join(map(str, one.rich_prelast_names + one.rich_last_names)) for one in people
            ]
            who = " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
            yield f"{who}, {entry.fields['year']}"


class Bibliography(Plain):
    """Pybtex's plain style with these labels."""

    default_label_style = AuthorYear


def say_list_items(
    app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: nodes.document
) -> None:
    """Call the entries of the bibliography what they are to a screen reader: items of a list."""
    deprecated, current = 'role="doc-biblioentry"', 'role="listitem"'
    context["body"] = context.get("body", "").replace(deprecated, current)


# --- chapter numbers
# ----------------------------------------------------------------------------------------------


def number_by_file(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Give a chapter the number that its file has (04-the-loss is chapter 4), and its figures and
    equations too."""
    for docname, numbers in env.toc_secnumbers.items():
        match = re.match(r"(\d+)-", docname.rsplit("/", 1)[-1])
        if not match:
            continue
        chapter = int(match[1])
        for anchor, number in numbers.items():
            numbers[anchor] = (chapter, *number[1:]) if number else number
        for node in [*env.tocs[docname].findall(nodes.reference), env.titles[docname]]:
            if node.get("secnumber"):
                node["secnumber"] = [chapter, *node["secnumber"][1:]]
    TocTreeCollector().assign_figure_numbers(
        env
    )  # a function of the section numbers, which have just changed
    return list(env.toc_secnumbers)


def grey_what_is_planned(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Mark the links to pages whose header says `planned: true`; the style sheet greys them."""
    for docname, metadata in env.metadata.items():
        if metadata.get("planned"):
            for link in env.tocs[docname].findall(nodes.reference):
                link["classes"] = ["imsvd-planned"]
    return []


# --- where a number comes from
# ------------------------------------------------------------------------------------


class Here(SphinxRole):
    """{here}`what it depends on`: computed on this page."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        return [_badge("here", "computed here", self.text)], []


class Stored(SphinxRole):
    """{stored}`name`: from the run stored as results/name.json, which the label offers for
    download."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        target = addnodes.download_reference(
            "",
            "",
            refdoc=self.env.docname,
            reftarget=f"/results/{self.text}.json",
            reftype="download",
        )
        target += _badge("stored", "stored run", self.text)
        return [target], []


class Quoted(SphinxRole):
    """{quoted}`Table II`: quoted from the paper, and from where in it."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        return [_badge("quoted", "from the paper", self.text)], []


def _badge(kind: str, label: str, text: str) -> nodes.inline:
    return nodes.inline("", f"{label}: {text}", classes=["imsvd-badge", f"imsvd-badge-{kind}"])


class StoredResults(SphinxDirective):
    """{stored-results}: every stored result with its figures and its provenance, from
    results/*.json."""

    HEAD = ("Result", "Figures", "Where it comes from")

    def run(self) -> list[nodes.Node]:
        folder = Path(self.env.srcdir, "results")
        self.env.note_reread()  # new files have no line in any page that could announce them
        paths = sorted(folder.glob("*.json"))
        if not paths:
            return [nodes.paragraph("", "No result is stored yet.")]
        table = nodes.table(classes=["imsvd-results"])
        group = nodes.tgroup(cols=len(self.HEAD))
        group += [nodes.colspec(colwidth=1) for _ in self.HEAD]
        group += nodes.thead("", _row([nodes.paragraph("", text) for text in self.HEAD]))
        group += nodes.tbody("", *[self._result(path) for path in paths])
        table += group
        return [table]

    def _result(self, path: Path) -> nodes.row:
        result = json.loads(path.read_text(encoding="utf-8"))
        link = addnodes.download_reference(
            "", "", refdoc=self.env.docname, reftarget=f"/results/{path.name}", reftype="download"
        )
        link += nodes.literal("", result.get("name", path.stem))
        return _row(
            [
                nodes.paragraph("", "", link),
                _pairs(result["figures"]),
                _pairs(result["provenance"]),
            ]
        )


def _row(cells: list[nodes.Node]) -> nodes.row:
    return nodes.row("", *[nodes.entry("", cell) for cell in cells])


def _pairs(values: dict[str, Any]) -> nodes.Node:
    """A small list of names and values; long values (a curve) only say how long they are."""
    block = nodes.bullet_list(classes=["imsvd-pairs"])
    for name, value in values.items():
        if isinstance(value, list | dict) and (
            len(value) > 4 or any(isinstance(one, dict) for one in value)
        ):
            value = f"{len(value)} values"
        line = nodes.paragraph("", "", nodes.inline("", f"{name}: "))
        line += nodes.literal("", _short(value))
        block += nodes.list_item("", line)
    return block


def _short(value: Any) -> str:
    """A number with four digits, and so within lists and dicts."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register all of the above."""
    app.add_config_value("imsvd_run", {}, "env", dict)
    app.connect("config-inited", prepare, priority=400)
    app.connect("config-inited", silence_thebe)
    app.connect("html-page-context", say_what_ran)
    app.connect("html-page-context", say_list_items)
    app.connect("doctree-read", narrow_included)
    app.connect("build-finished", write_run)
    app.connect("build-finished", copy_mathjax)
    app.connect(
        "env-get-updated", number_by_file, priority=600
    )  # after Sphinx's own numbering, at 500
    app.connect("env-get-updated", grey_what_is_planned)
    register_plugin("pybtex.style.formatting", "imsvd", Bibliography)
    app.add_role("here", Here())
    app.add_role("stored", Stored())
    app.add_role("quoted", Quoted())
    app.add_directive("stored-results", StoredResults)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
