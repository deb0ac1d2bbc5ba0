"""Data sets: what is found, what is refused, and what happens without a network."""

import pickle
import socket
import time

import pytest
import torch
from torchvision.io import encode_jpeg, write_png

from imsvd_core import attributes, datasets


@pytest.fixture(autouse=True)
def own_root(tmp_path, monkeypatch):
    monkeypatch.setenv("IMSVD_DATA", str(tmp_path))
    monkeypatch.delenv("IMSVD_DATASET", raising=False)
    monkeypatch.setattr(datasets, "HOSTS", dict.fromkeys(datasets.HOSTS, "no-such-host.invalid"))
    datasets._say_once.cache_clear()
    return tmp_path


def grow_tree(folder, sizes=((8, 8),), per_class=3, splits=("train", "test"), classes=("cat", "dog")):
    generator = torch.Generator().manual_seed(0)
    for split in splits:
        for one in classes:
            (folder / split / one).mkdir(parents=True)
            for number in range(per_class):
                image = torch.randint(256, (3, *sizes[number % len(sizes)]), generator=generator, dtype=torch.uint8)
                write_png(image, str(folder / split / one / f"{number}.png"))
    return folder


def test_a_tree_and_torchvisions_layout_give_the_same_images(own_root, tmp_path_factory):
    tree = grow_tree(own_root / "cifar10", sizes=((32, 32),))
    from_tree = {split: datasets.load("cifar10", split) for split in ("train", "test")}

    other = tmp_path_factory.mktemp("torchvision")
    place = other / "cifar-10-batches-py"
    place.mkdir()
    parts = {f"data_batch_{i}": from_tree["train"].images[i - 1:i + (i == 5)] for i in range(1, 6)}
    labels = {f"data_batch_{i}": from_tree["train"].labels[i - 1:i + (i == 5)].tolist() for i in range(1, 6)}
    parts["test_batch"], labels["test_batch"] = from_tree["test"].images, from_tree["test"].labels.tolist()
    import hashlib
    from unittest.mock import patch

    from torchvision.datasets import CIFAR10

    sums = {}
    for name, images in parts.items():
        content = pickle.dumps({"data": images.flatten(1).numpy(), "labels": labels[name]})
        (place / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    meta = pickle.dumps({"label_names": ["cat", "dog"]})
    (place / "batches.meta").write_bytes(meta)
    with patch.multiple(CIFAR10, train_list=[[n, sums[n]] for n in parts if n != "test_batch"], test_list=[["test_batch", sums["test_batch"]]],
                        meta={"filename": "batches.meta", "key": "label_names", "md5": hashlib.md5(meta).hexdigest()}):
        for split in ("train", "test"):
            ours = datasets.load("cifar10", split, root=other)
            assert torch.equal(ours.images, from_tree[split].images) and torch.equal(ours.labels, from_tree[split].labels)
            assert ours.classes == from_tree[split].classes and ours.title == "CIFAR-10"
    assert tree.exists()


def test_a_half_downloaded_data_set_is_not_taken_for_one(own_root):
    (own_root / "cifar-10-batches-py").mkdir()
    (own_root / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"half")
    assert datasets.resolve() == "attributes"


def test_jpeg_trees_say_so(own_root):
    tree = grow_tree(own_root / "cifar10", sizes=((32, 32),))
    assert datasets.load("cifar10", "train").title == "CIFAR-10"
    for path in (tree / "train").rglob("*.png"):
        path.with_suffix(".jpg").write_bytes(encode_jpeg(torch.zeros(3, 32, 32, dtype=torch.uint8)).numpy().tobytes())
        path.unlink()
    assert datasets.load("cifar10", "train").title == "CIFAR-10 (JPEG)" == datasets.manifest("cifar10")["title"]


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_bad_file_is_named_or_skipped_and_counted(own_root, damage, caplog):
    tree = grow_tree(own_root / "tree", sizes=((32, 32),))
    victim = tree / "train" / "dog" / "1.png"
    victim.write_bytes({"truncated": victim.read_bytes()[:300], "text": b"hello", "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"dog/1\.png.*on_corrupt='skip'"):
        datasets.load("folder:tree", "train")
    data = datasets.load("folder:tree", "train", on_corrupt="skip")
    assert data.skipped == 1 and data.labels.tolist() == [0, 0, 0, 1, 1] and "1.png" in caplog.text


def test_unequal_images_need_a_size_and_keep_their_middle(own_root):
    grow_tree(own_root / "tree", sizes=((8, 8), (12, 20)))
    with pytest.raises(ValueError, match="2 sizes.*pass size="):
        datasets.load("folder:tree", "train")
    assert datasets.load("folder:tree", "train", size=8).images.shape == (6, 3, 8, 8)


def test_folders_that_lack_something_are_named(own_root):
    tree = grow_tree(own_root / "tree", splits=("train", "val"))
    assert len(datasets.load("folder:tree", "test")) == 6
    (tree / "train" / "fox").mkdir()
    with pytest.raises(FileNotFoundError, match="train/fox holds no image"):
        datasets.load("folder:tree", "train")
    with pytest.raises(FileNotFoundError, match="nowhere has no folder test/"):
        datasets.load("folder:nowhere", "test")
    with pytest.raises(ValueError, match="split='val'"):
        datasets.load("folder:tree", "val")
    with pytest.raises(ValueError, match="'mnist' is unknown"):
        datasets.load("mnist")


def test_without_a_network_auto_falls_back_with_one_line(capsys):
    assert [datasets.resolve() for _ in range(3)] == ["attributes"] * 3
    assert capsys.readouterr().out.count("\n") == 1
    with pytest.raises(FileNotFoundError, match="IMSVD_DATA"):
        datasets.load("cifar10")


def test_a_host_that_never_answers_is_given_up_on_within_ten_seconds_and_remembered(monkeypatch):
    monkeypatch.setattr(datasets, "PATIENCE", 0.5)
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: time.sleep(30))
    start = time.perf_counter()
    assert datasets.resolve() == "attributes"
    first = time.perf_counter() - start
    start = time.perf_counter()
    assert datasets.resolve() == "attributes"
    assert first < 2 and time.perf_counter() - start < 0.2


def test_a_download_that_stands_still_is_given_up_on(monkeypatch):
    """A real server that accepts and never sends: torchvision's own download must not wait for it."""
    from torchvision.datasets import CIFAR10

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(datasets, "PATIENCE", 0.5)
        monkeypatch.setattr(datasets, "_unreachable", lambda host: None)
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.getsockname()[1]}/cifar.tar.gz")
        start = time.perf_counter()
        assert datasets.resolve() == "attributes"
    assert time.perf_counter() - start < 5 and socket.getdefaulttimeout() is None


def test_the_environment_chooses_what_auto_means(monkeypatch, own_root):
    grow_tree(own_root / "cifar10", sizes=((32, 32),))
    assert datasets.resolve() == "cifar10"
    monkeypatch.setenv("IMSVD_DATASET", "attributes")
    assert datasets.resolve() == "attributes" == datasets.manifest()["name"]
    assert datasets.resolve("cifar10") == "cifar10"


def test_the_manifest_changes_with_the_files_and_never_downloads(own_root, monkeypatch):
    monkeypatch.setattr(datasets, "_download", lambda *a: pytest.fail("tried to download"))
    assert datasets.manifest()["name"] == "attributes"
    tree = grow_tree(own_root / "cifar10", sizes=((32, 32),))
    before = datasets.manifest()
    assert before == datasets.manifest() and before["files"] == 12
    (tree / "train" / "cat" / "0.png").write_bytes(b"other")
    assert datasets.manifest()["hash"] != before["hash"]


def test_subsets_are_balanced_fixed_and_whole():
    data = datasets.ImageData("x", "x", "train", torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1).expand(60, 3, 2, 2),
                              torch.tensor([0] * 40 + [1] * 15 + [2] * 5), ("a", "b", "c"))
    some = data.subset(30)
    assert some.labels.bincount().tolist() == [13, 12, 5] or sorted(some.labels.bincount().tolist()) == [5, 12, 13]
    assert len(set(some.images[:, 0, 0, 0].tolist())) == 30
    assert torch.equal(some.images, data.subset(30).images) and not torch.equal(some.images, data.subset(30, seed=1).images)
    with pytest.raises(ValueError, match="n=61"):
        data.subset(61)


@pytest.fixture
def small_attributes(monkeypatch):
    monkeypatch.setattr(datasets, "ATTRIBUTES", {"train": 400, "test": 100})
    datasets._attributes.cache_clear()
    yield
    datasets._attributes.cache_clear()


def test_attributes_are_fixed_by_seed_and_split(small_attributes):
    first = datasets.load("attributes", "train")
    datasets._attributes.cache_clear()
    again = datasets.load("attributes", "train")
    assert torch.equal(first.images, again.images) and len(first) == 400
    assert not torch.equal(first.images, datasets.load("attributes", "train", seed=1).images)
    assert not torch.equal(first.images[:100], datasets.load("attributes", "test").images)


def test_the_factors_are_those_of_the_pictures(small_attributes):
    data = datasets.load("attributes", "test")
    drawn = attributes.draw(dict(data.factors))
    assert (drawn.int() - data.images.int()).abs().max() <= 10  # pixel noise alone
    other = dict(data.factors, colour=(data.factors["colour"] + 1) % 8)
    changed = (attributes.draw(other).int() - drawn.int()).abs().amax((1, 2, 3))
    assert (changed > 40).all()
    assert torch.equal(attributes.label(dict(data.factors)), data.labels)
    assert {name: len(values) for name, values in data.factor_values.items()}.items() >= {"shape": 8, "texture": 4}.items()
