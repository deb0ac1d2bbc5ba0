"""Commands of many settings: read by tyro, and shown in parts, first what people change first."""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any

import tyro

#: Of groups other than the command's own.
FIRST = ("loop.epochs", "loop.batch-size", "loop.seed", "loop.device", "loop.precision", "optim.lr")


def parse(kind: Any, argv: Sequence[str], **options: Any) -> Any:
    """`tyro.cli`, with `--help` for what is changed first, `--help GROUP` and `--help-all`."""
    asked = next((place for place, word in enumerate(argv) if word in ("-h", "--help")), None)
    if asked is None:
        return tyro.cli(
            kind, args=["--help" if word == "--help-all" else word for word in argv], **options
        )
    whole = io.TextIOWrapper(io.BytesIO(), "utf-8")  # for which tyro draws its boxes
    with contextlib.redirect_stdout(whole), contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], **options)
    whole.seek(0)
    print(_part(whole.read(), next(iter(argv[asked + 1 :]), "").strip("-")))
    raise SystemExit(0)


def _part(text: str, group: str) -> str:
    """Of a help in boxes, one group's or what is changed first. Raises ValueError naming the
    groups."""
    boxes = {
        title.removesuffix("options").strip(): re.sub(r"│ (.*?) *│", r"\1", body)
        for title, body in re.findall(r"╭─ (.*?) ─+╮\n(.*?)╰─+╯", text, re.DOTALL)
    }
    own = [boxes.pop(title) for title in ("positional arguments", "") if title in boxes]
    groups = list(dict.fromkeys(title.split(".")[0] for title in boxes))
    if group:
        if group.split(".")[0] not in groups:
            raise ValueError(f"--help {group} is no group of settings; {', '.join(groups)} are")
        return "\n".join(body for title, body in boxes.items() if title.startswith(group))
    settings = re.split(r"\n(?=--)", "\n".join(boxes.values()))
    first = [row.rstrip() for row in settings if re.match(rf"--({'|'.join(FIRST)}) ", row)]
    others = f"--help-all shows every setting, --help GROUP those of one: {', '.join(groups)}"
    return "\n".join([text[: text.index("╭")], "".join(own).rstrip(), *first, "", others])
