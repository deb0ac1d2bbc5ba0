"""Data sets: what is found and drawn, what is said when neither network nor files are there."""

import hashlib
import http.server
import pickle
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, FashionMNIST

from imsvd_core.data import attributes, download, sources
from imsvd_core.data import memory as datasets
from imsvd_core.data.decoding import decode
from imsvd_core.data.memory import ImageData

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No data set chosen from outside, and a process that has neither tried to download nor said a
    word.
    """
    monkeypatch.delenv("IMSVD_DATASET", raising=False)
    sources.say_once.cache_clear()
    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No name is resolved; returns the list of the names that were asked for."""
    asked: list[str] = []

    def no_name(host: str, *rest: object, **more: object) -> None:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    return asked


@pytest.fixture
def silent_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A host that accepts every connection and never says a word; CIFAR-10 is published there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/cifar-10-python.tar.gz"
        monkeypatch.setattr(CIFAR10, "url", url)
        yield url


def pixels(n: int, height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def save(folder: Path, images: np.ndarray, suffix: str = "png") -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i:04}.{suffix}" for i in range(len(images))]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    return files


def tree(root: Path, suffix: str = "png", each: int = 2) -> Path:
    """A small cifar10 tree with `each` pictures in every class."""
    for s, split in enumerate(("train", "test")):
        for c, name in enumerate(CLASSES):
            save(root / "cifar10" / split / name, pixels(each, seed=10 * s + c), suffix)
    return root


def published(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same pictures in torchvision's own layout, and checksums to go with them."""
    base = root / CIFAR10.base_folder
    base.mkdir(parents=True)

    def write(name: str, content: dict) -> list[str]:
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    def batch(name: str, split: int, classes: range) -> list[str]:
        images = np.concatenate([pixels(2, seed=10 * split + c) for c in classes])
        return write(
            name,
            {
                "data": images.transpose(0, 3, 1, 2).reshape(-1, 3072),
                "labels": [c for c in classes for _ in range(2)],
            },
        )

    monkeypatch.setattr(
        CIFAR10,
        "train_list",
        [batch("data_batch_1", 0, range(5)), batch("data_batch_2", 0, range(5, 10))],
    )
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch", 1, range(10))])
    name, md5 = write("batches.meta", {"label_names": list(CLASSES)})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return root


# --- files
# --------------------------------------------------------------------------------------------------


def test_a_tree_and_torchvisions_layout_give_the_same_tensors(tmp_path, monkeypatch):
    published(tmp_path / "layout", monkeypatch)
    published(tmp_path / "below" / "cifar10", monkeypatch)
    tree(tmp_path / "tree")
    for split in ("train", "test"):
        one, other, below = (
            datasets.load("cifar10", split, root=tmp_path / place)
            for place in ("tree", "layout", "below")
        )
        assert one.images.shape == (20, 3, 32, 32)
        assert one.images.dtype == torch.uint8
        assert torch.equal(
            one.images,
            torch.from_numpy(
                np.concatenate([pixels(2, seed=c + 10 * (split == "test")) for c in range(10)])
            ).permute(0, 3, 1, 2),
        )
        for layout in (other, below):
            assert torch.equal(one.images, layout.images)
            assert torch.equal(one.labels, layout.labels)
            assert one.classes == layout.classes == CLASSES
            assert one.title == layout.title == "CIFAR-10"
            assert one.images.is_contiguous()
            assert layout.images.is_contiguous()


def test_a_jpeg_tree_is_called_one_and_has_the_pixels_of_pillow(tmp_path):
    tree(tmp_path, "jpg")
    data = datasets.load("auto", "test", root=tmp_path)
    assert data.name == "cifar10"
    assert data.title == "CIFAR-10 (JPEG)" == sources.title(root=tmp_path)
    with Image.open(tmp_path / "cifar10/test/bird/0001.jpg") as picture:
        assert np.array_equal(data.images[5].permute(1, 2, 0), np.asarray(picture))


def test_fashion_mnist_is_padded_and_repeated_in_three_channels(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    grey = pixels(7)[:, :28, :28, 0]
    for stem, _ in FashionMNIST.resources:
        content = grey if "images" in stem else np.arange(7, dtype=np.uint8)
        magic = bytes([0, 0, 8, content.ndim]) + b"".join(
            n.to_bytes(4, "big") for n in content.shape
        )
        (raw / stem.removesuffix(".gz")).write_bytes(magic + content.tobytes())
    data = datasets.load("fashion-mnist", root=tmp_path)
    assert data.images.shape == (7, 3, 32, 32)
    assert data.labels.tolist() == list(range(7))
    assert np.array_equal(data.images[3, 1, 2:30, 2:30], grey[3])
    assert data.images[3, :, :2].max() == 0


def test_a_folder_of_unequal_images_cannot_be_loaded(tmp_path):
    save(tmp_path / "mine/train/a", pixels(1, 40, 80))
    save(tmp_path / "mine/train/b", pixels(1, 50, 40))
    save(tmp_path / "mine/val/a", pixels(1, 40, 80))
    save(tmp_path / "mine/val/b", pixels(1, 40, 80, seed=1))
    with pytest.raises(ValueError, match=r"\(40, 80\) in .*0000\.png and \(50, 40\).*tree:PATH"):
        datasets.load("folder:mine", root=tmp_path)
    for name in ("folder:mine", f"folder:{tmp_path / 'mine'}"):
        data = datasets.load(name, "test", root=tmp_path)
        assert data.images.shape == (2, 3, 40, 80)
        assert data.title == "mine"
        assert data.name == name
        assert data.classes == ("a", "b")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("kind", ["truncated", "empty", "no image", "a tenth short"])
def test_a_broken_image_is_named_or_skipped_and_counted(tmp_path, suffix, kind, caplog):
    for split in ("train", "test"):
        for name in ("a", "b"):
            save(tmp_path / "mine" / split / name, pixels(5), suffix)
    broken = tmp_path / f"mine/train/a/0003.{suffix}"
    content = broken.read_bytes()
    broken.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "empty": b"",
            "no image": b"<html>404</html>",
            "a tenth short": content[: -len(content) // 10],
        }[kind]
    )
    with pytest.raises(ValueError, match=f"a/0003.{suffix} cannot be read.*on_corrupt='skip'"):
        datasets.load("folder:mine", root=tmp_path)
    data = datasets.load("folder:mine", root=tmp_path, on_corrupt="skip")
    assert (len(data), data.skipped, data.labels.tolist()) == (9, 1, [0] * 4 + [1] * 5)
    assert str(broken) in caplog.text


def test_a_changed_byte_of_a_png_never_passes_for_other_pixels(tmp_path):
    (file,) = save(tmp_path, pixels(1))
    content, whole = file.read_bytes(), decode(str(file))
    for place in range(0, len(content), 13):
        file.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
        try:
            changed = decode(str(file))
        except ValueError as error:
            changed, message = whole, str(error)
            assert "0000.png" in message
        assert torch.equal(changed, whole), place


def test_a_tree_that_cannot_be_used_is_refused_with_its_path(tmp_path):
    def attempt(
        match: str, split: str = "train", error: type[Exception] = ValueError, **settings
    ) -> None:
        with pytest.raises(error, match=match):
            datasets.load("folder:mine", split, root=tmp_path, **settings)

    home = tmp_path / "mine"
    attempt("mine is not a folder", error=FileNotFoundError)
    home.mkdir()
    attempt("split 'train' is not there: make .*mine/train", error=FileNotFoundError)
    (home / "train").mkdir()
    attempt("mine/train holds no class folder")
    (home / "train" / "a").mkdir()
    attempt("mine/train/a holds no")
    save(home / "train" / "a", pixels(2))
    attempt("mine/test or val, one folder a class", "test", FileNotFoundError)
    (home / "train/a/0000.png").write_bytes(b"")
    (home / "train/a/0001.png").write_bytes(b"")
    attempt("holds no image that can be read, of 2 files", on_corrupt="skip")
    save(home / "train" / "a", pixels(2))
    save(home / "val" / "b", pixels(2))
    attempt(r"differ in classes \(a, b\)")
    attempt("split is 'validation'", "validation")
    attempt("on_corrupt is 'ignore'", on_corrupt="ignore")
    with pytest.raises(
        ValueError, match=r"'cifar' is unknown: choose auto, cifar10, .*folder:PATH"
    ):
        datasets.load("cifar")


def test_the_root_and_the_meaning_of_auto_come_from_the_environment(tmp_path, monkeypatch, offline):
    monkeypatch.setenv("IMSVD_DATA", str(tree(tmp_path)))
    assert sources.data_root() == tmp_path
    assert sources.resolve() == "cifar10"
    monkeypatch.setenv("IMSVD_DATASET", "attributes")
    assert sources.resolve() == "attributes"
    assert datasets.manifest().startswith("attributes")
    assert sources.resolve("cifar10") == "cifar10"
    monkeypatch.setenv("IMSVD_DATASET", "imagenet")
    with pytest.raises(ValueError, match="'imagenet' is unknown"):
        sources.resolve()
    monkeypatch.delenv("IMSVD_DATA")
    assert sources.data_root() == Path("~/.cache/imsvd").expanduser()


# --- the drawn data set and subsets
# -------------------------------------------------------------------------


def test_attributes_are_the_same_at_every_load_and_differ_by_split(monkeypatch):
    assert datasets.ATTRIBUTES_SIZES == {"train": 20_000, "test": 4_000}
    monkeypatch.setattr(datasets, "ATTRIBUTES_SIZES", {"train": 600, "test": 600})
    one = datasets.load("attributes", "train")
    assert one.images.shape == (600, 3, 32, 32)
    assert one.factors.keys() > attributes.FACTORS.keys()
    assert torch.equal(one.images, datasets.load("attributes", "train").images)
    other = datasets.load("attributes", "test")
    assert (one.images != other.images).flatten(1).any(1).all()


def test_a_subset_is_balanced_deterministic_and_takes_its_factors_along():
    labels = torch.tensor([0] * 50 + [1] * 50 + [2] * 4)
    images = torch.arange(104, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    data = ImageData(
        "x", "x", "train", images, labels, ("a", "b", "c"), {"place": torch.arange(104)}
    )
    part = data.subset(31)
    assert sorted(part.labels.bincount().tolist()) == [4, 13, 14]
    assert torch.equal(part.factors["place"], part.images[:, 0, 0, 0].long())
    assert torch.equal(labels[part.factors["place"]], part.labels)
    assert torch.equal(part.images, data.subset(31).images)
    assert not torch.equal(part.factors["place"], data.subset(31, seed=1).factors["place"])
    assert len(data.subset(104)) == 104
    for n in (0, 105):
        with pytest.raises(ValueError, match=f"n is {n}: take 1 to 104"):
            data.subset(n)


def test_image_data_refuses_tensors_that_do_not_fit():
    images, labels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"images are torch\.float32"):
        ImageData("x", "x", "train", images.float(), labels, ("a",))
    with pytest.raises(ValueError, match=r"labels are torch.int64 \(3,\): give torch.int64 \(4,\)"):
        ImageData("x", "x", "train", images, labels[:3], ("a",))
    assert (
        ImageData("x", "x", "train", images, labels, ("a",)).to("meta").images.device.type == "meta"
    )


# --- no network
# ---------------------------------------------------------------------------------------------


def test_auto_falls_back_with_one_line_that_names_the_download_and_asks_no_network(
    tmp_path, offline, capfd
):
    assert [sources.resolve("auto", tmp_path) for _ in range(3)] == ["attributes"] * 3
    out, err = capfd.readouterr()
    assert out.count("\n") == 1
    assert not err
    assert "attributes (drawn)" in out
    assert str(tmp_path) in out
    assert "imsvd data get cifar10" in out
    assert not offline
    tree(tmp_path)  # data that have come in the meantime are taken at once
    assert sources.resolve("auto", tmp_path) == "cifar10"


def test_an_explicit_cifar10_that_cannot_be_had_says_what_to_put_where(tmp_path, offline):
    remedy = r"Name or service not known.*Put .*cifar-10-batches-py.*cifar10/\{train,test\}/<class>"
    with pytest.raises(FileNotFoundError, match=remedy):
        datasets.load("cifar10", root=tmp_path)
    assert len(offline) == 1


def test_a_root_that_cannot_be_written_is_a_reason_and_not_a_crash(tmp_path, offline):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(download.DownloadError, match="Not a directory"):
        download.get("cifar10", tmp_path / "file" / "root")
    assert not offline


@pytest.mark.slow  # waits for a host that stays silent
def test_a_silent_host_is_given_up_within_ten_seconds(tmp_path, silent_host):
    start = time.monotonic()  # the real limits: the one test here that must wait for them
    with pytest.raises(download.DownloadError):
        download.get("cifar10", tmp_path)
    assert time.monotonic() - start < 8


def test_a_name_server_that_never_answers_is_given_up(tmp_path, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(download, "PROBE_SECONDS", 0.5)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait(60) and [])
    start = time.monotonic()
    with pytest.raises(download.DownloadError, match=r"no answer from https://www\.cs\.toronto"):
        download.get("cifar10", tmp_path)
    assert time.monotonic() - start < 3
    released.set()


def test_a_download_that_stalls_or_is_cut_short_is_given_up_and_leaves_nothing(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(download, "STALL_SECONDS", 0.5)
    stalled: list[socket.socket] = []

    def serve(server: socket.socket, cut: bool) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connection.recv(65536)
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 100000\r\n\r\n" + bytes(9000))
            connection.close() if cut else stalled.append(connection)

    for cut in (False, True):
        root = tmp_path / f"cut-{cut}"
        with socket.create_server(("127.0.0.1", 0)) as server:
            url = f"http://127.0.0.1:{server.getsockname()[1]}/cifar-10-python.tar.gz"
            monkeypatch.setattr(CIFAR10, "url", url)
            threading.Thread(target=serve, args=(server, cut), daemon=True).start()
            start = time.monotonic()
            with pytest.raises(download.DownloadError):
                download.get("cifar10", root)
            assert time.monotonic() - start < 4
            server.shutdown(socket.SHUT_RDWR)
        assert not list(root.iterdir())
        assert socket.getdefaulttimeout() is None
    for connection in stalled:
        connection.close()


def test_a_whole_download_is_taken_and_a_wrong_one_is_not(tmp_path, monkeypatch):
    source = published(tmp_path / "source", monkeypatch)
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(source / CIFAR10.base_folder, CIFAR10.base_folder)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    root = tmp_path / "root"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
        with pytest.raises(download.DownloadError):
            download.get("cifar10", root)
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
        assert len(datasets.load("cifar10", root=root)) == 20
        server.shutdown()
    assert sources.resolve("auto", root) == "cifar10"
    assert download.get("cifar10", root).folder == root  # there already: nothing is asked for
    assert [path.name for path in root.iterdir()] == [CIFAR10.base_folder]  # and no archive


def test_what_is_not_published_cannot_be_downloaded(tmp_path):
    with pytest.raises(ValueError, match="data set 'attributes' cannot be downloaded"):
        download.get("attributes", tmp_path)


def test_half_a_torchvision_layout_is_never_taken_for_the_data_set(tmp_path, monkeypatch, offline):
    root = published(tmp_path, monkeypatch)
    assert sources.resolve("auto", root) == "cifar10"
    batch = root / CIFAR10.base_folder / "data_batch_2"
    whole = batch.read_bytes()
    batch.write_bytes(whole[:-100])
    assert sources.resolve("auto", root) == "attributes"
    batch.unlink()
    assert sources.resolve("auto", root) == "attributes"
    batch.write_bytes(whole)
    assert sources.resolve("auto", root) == "cifar10"


# --- the manifest
# -------------------------------------------------------------------------------------------


def test_the_manifest_follows_names_and_sizes_and_needs_no_network(tmp_path, offline, capfd):
    assert datasets.manifest("auto", tmp_path) == datasets.manifest("attributes")
    assert datasets.manifest("cifar10", tmp_path) == "cifar10 absent"
    seen = [datasets.manifest("auto", tree(tmp_path))]
    assert seen[0].startswith("cifar10 40 files ")
    assert (
        datasets.manifest("auto", tree(tmp_path / "elsewhere")) == seen[0]
    )  # the place does not matter
    file = tmp_path / "cifar10/train/cat/0001.png"
    file.write_bytes(file.read_bytes() + b"\0")
    seen.append(datasets.manifest("auto", tmp_path))
    file.rename(file.with_name("0002.png"))
    seen.append(datasets.manifest("auto", tmp_path))
    seen.append(datasets.manifest(f"folder:{tmp_path / 'cifar10'}", tmp_path))
    assert len(set(seen)) == 4
    assert sources.title("folder:cifar10", tmp_path) == "cifar10"
    assert sources.title("auto", tmp_path) == "CIFAR-10"
    assert not offline
    assert capfd.readouterr() == ("", "")
