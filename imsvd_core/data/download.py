"""Downloads of published photographs, verified, given up soon where there is no network."""

import os
import socket
import tempfile
import threading
import urllib.request
from pathlib import Path

from imsvd_core.data.sources import PUBLISHED, TITLES, Place, Root, data_root, find, layout

PROBE_SECONDS = 5.0  #: for the first byte; silent for longer, a host counts as out of reach
STALL_SECONDS = 10.0  #: of silence end a download that had begun


class DownloadError(FileNotFoundError):
    """A data set could not be downloaded; the message says why, and what else can be done."""


def get(name: str, root: Root = None) -> Place:
    """Download `name` through torchvision, which verifies its checksum and shows a bar.

    The files go to the data root only when all are whole: a download that is cut short leaves
    nothing to be found. Nothing is done where the data set is there already. Returns where it is.
    Raises ValueError for a name that is not published; DownloadError within ten seconds where there
    is no network.
    """
    root = data_root(root)
    if place := find(name, root):
        return place
    if name not in PUBLISHED:
        raise ValueError(f"data set {name!r} cannot be downloaded: choose {', '.join(PUBLISHED)}")
    published, files = PUBLISHED[name], list(layout(name))
    resources = getattr(published, "resources", None)  # of Fashion-MNIST, which has several files
    url = published.mirrors[0] + resources[0][0] if resources else published.url
    timeout = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as folder:
            _probe(url)
            print(f"Downloading {TITLES[name]} to {root}", flush=True)
            socket.setdefaulttimeout(STALL_SECONDS)  # torchvision sets none of its own
            published(folder, download=True)
            for file in files:
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(folder, file), root / file)
    except Exception as error:  # urllib, http, ssl, tarfile and torchvision each have their own
        reason = " ".join(f"{type(error).__name__}: {getattr(error, 'reason', error)}".split())
        raise DownloadError(
            f"{TITLES[name]} is not under {root} and could not be downloaded ({reason}). Put "
            f"torchvision's {files[0].parent} there, or images as "
            f"{root / name}/{{train,test}}/<class>/*.png or *.jpg; IMSVD_DATA names another data "
            "root, and the data set 'attributes' needs no files"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return Place(root, tree=False)


def _probe(url: str) -> None:
    """Ask for the first byte of `url`, through whatever proxy is set; raise what is wrong, in
    PROBE_SECONDS.

    The name server's patience cannot be set, and a host has several addresses that each time out in
    turn: so one deadline stands over all, and a thread that misses it is left behind.
    """
    errors: list[Exception] = [
        TimeoutError(f"no answer from {url} within {PROBE_SECONDS:g} seconds")
    ]

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=PROBE_SECONDS) as response:
                response.read(1)
            errors.clear()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if errors:
        raise errors[-1]
