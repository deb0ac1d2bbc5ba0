"""Weighted kNN: exact, however the gallery is cut or shared; right where the answer is known."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from imsvd_core.data.memory import ImageData
from imsvd_core.evaluation import features, knn, neighbors
from imsvd_core.evaluation.base import Setup
from imsvd_core.evaluation.knn import KNNConfig, vote, weighted_knn
from imsvd_core.evaluation.neighbors import Neighbors, nearest_of
from imsvd_core.views import EvalView


def planted(n, classes, noise, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    features = torch.nn.functional.one_hot(labels, classes) + noise * torch.randn(
        n, classes, generator=generator
    )
    return features, labels


def brute_force(gallery, labels, queries, classes, k, temperature):
    """In float64, one query at a time, by sorting everything."""
    gallery, queries = (
        x.double() / x.double().norm(dim=1, keepdim=True) for x in (gallery, queries)
    )
    predicted = []
    for query in queries:
        similarity = gallery @ query
        votes = [0.0] * classes
        for index in similarity.argsort(descending=True)[:k].tolist():
            votes[labels[index]] += torch.exp(similarity[index] / temperature).item()
        predicted.append(max(range(classes), key=votes.__getitem__))
    return torch.tensor(predicted)


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_equals_a_float64_brute_force_for_any_chunk(chunk):
    gallery, labels = planted(300, 5, 0.8, seed=0)
    queries, _ = planted(90, 5, 0.8, seed=1)
    found = weighted_knn(gallery, labels, queries, 5, neighbors=(1, 20, 200), chunk=chunk)
    for k, predicted in found.items():
        assert torch.equal(predicted, brute_force(gallery, labels, queries, 5, k, 0.07)), k


def test_weights_matter_and_cannot_overflow():
    """Two near neighbours of class 1 outvote three farther ones of class 0 only because votes are
    weighted."""
    angles = torch.tensor([0.0, 0.02, 0.5, 0.5, 0.5])
    gallery = torch.stack([angles.cos(), angles.sin()], 1)
    labels = torch.tensor([1, 1, 0, 0, 0])
    query = torch.tensor([[1.0, 0.0]])
    assert weighted_knn(gallery, labels, query, 2, neighbors=(5,), temperature=0.07)[5].item() == 1
    assert weighted_knn(gallery, labels, query, 2, neighbors=(5,), temperature=100.0)[5].item() == 0
    assert weighted_knn(gallery, labels, query, 2, neighbors=(5,), temperature=1e-4)[5].item() == 1


def test_a_vote_is_the_sum_of_exponentials_written_out():
    """Two near neighbours of class 2, or five farther ones of class 1 and three of class 0; in
    float64, term by term."""
    similarity = torch.tensor(
        [
            [0.95, 0.9, 0.7, 0.68, 0.66, 0.64, 0.62, 0.6, 0.58, 0.5],
            [0.8, 0.75, 0.745, 0.74, 0.73, 0.72, 0.71, 0.7, 0.69, 0.68],
        ]
    )
    labels = torch.tensor([[2, 2, 1, 1, 0, 1, 0, 1, 1, 0], [0, 2, 1, 1, 1, 2, 0, 2, 2, 0]])
    for temperature in (0.03, 0.07, 0.1, 0.2, 0.5, 2.0):
        found = vote(similarity, labels, 3, neighbors=(1, 3, 5, 8, 10), temperature=temperature)
        assert set(found) == {1, 3, 5, 8, 10}
        for k, predicted in found.items():
            for row, near in enumerate(similarity.double()):
                scores = [
                    sum(
                        torch.exp(near[i] / temperature).item()
                        for i in range(k)
                        if labels[row, i] == c
                    )
                    for c in range(3)
                ]
                assert predicted[row] == scores.index(max(scores)), (temperature, k, row)


def test_planted_labels_are_found_and_shuffled_ones_are_chance():
    gallery, labels = planted(4000, 20, 0.1, seed=0)
    queries, truth = planted(500, 20, 0.1, seed=1)
    found = weighted_knn(gallery, labels, queries, 20, neighbors=(20,))[20]
    assert (found == truth).float().mean() > 0.99
    shuffled = labels[torch.randperm(4000, generator=torch.Generator().manual_seed(2))]
    found = weighted_knn(gallery, shuffled, queries, 20, neighbors=(200,))[200]
    assert (
        found == truth
    ).float().mean() < 0.2  # chance is 0.05; all queries of a cluster err alike, so it scatters


def test_memory_does_not_grow_with_gallery_times_queries():
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for item in out if isinstance(out, tuple | list) else (out,):
                largest = max(
                    largest,
                    item.untyped_storage().nbytes() if isinstance(item, torch.Tensor) else 0,
                )
            return out

    gallery, labels = planted(6000, 5, 0.8, seed=0)
    with Watch():
        weighted_knn(gallery, labels, gallery, 5, neighbors=(20,), chunk=200)
    assert largest < 6000 * 6000 * 4 / 100


def test_what_cannot_be_is_refused():
    gallery, labels = planted(10, 2, 0.1, seed=0)
    with pytest.raises(ValueError, match="k = 20 exceeds the gallery of 10"):
        weighted_knn(gallery, labels, gallery, 2, neighbors=(5, 20))
    with pytest.raises(ValueError, match="labels has 9"):
        weighted_knn(gallery, labels[:9], gallery, 2, neighbors=(5,))
    for wrong in ((0,), (), (5, 5)):
        with pytest.raises(ValueError, match="neighbors="):
            KNNConfig(neighbors=wrong)


def test_no_temperature_makes_every_vote_vanish():
    """With similarity 0.7 at best and a tiny temperature, the nearest neighbour still decides:
    class 2, never 0."""
    gallery = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.9, 0.9]])
    found = weighted_knn(
        gallery,
        torch.tensor([2, 1]),
        torch.tensor([[1.0, 0.0, 0.0]]),
        3,
        neighbors=(2,),
        temperature=1e-3,
    )
    assert found[2].tolist() == [2]


def tying(n, seed):
    """Rows of ±1/4: similarities are sixteenths, without any rounding, and most tie."""
    return torch.randint(2, (n, 16), generator=torch.Generator().manual_seed(seed)) / 2.0 - 0.25


def check_nearest(similarity, index, gallery, queries, k):
    """The k largest similarities, in falling order, at different places that have them."""
    all_similarities = queries @ gallery.T
    expected = all_similarities.sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(similarity, expected)
    assert torch.equal(all_similarities.gather(1, index), similarity)
    assert all(len(set(places)) == k for places in index.tolist())


@pytest.mark.parametrize(("chunk", "fed"), [(2, 150), (5, 7), (20, 600), (64, 1), (1000, 64)])
def test_tied_neighbours_are_a_valid_choice_however_the_gallery_is_cut(chunk, fed):
    gallery, queries = tying(600, 0), tying(9, 1)
    for k in (1, 20, 200):
        nearest = Neighbors(queries, k, chunk)
        for part in gallery.split(fed):
            nearest.add(part)
        check_nearest(*nearest.nearest(), gallery, queries, k)


@pytest.mark.parametrize("cuts", [(400, 700), (3, 1097), (550, 550)])
def test_what_two_found_in_their_parts_merges_to_what_one_finds(cuts):
    gallery, queries = tying(1100, 0), tying(33, 1)
    first, second = (Neighbors(queries, 50, 16, start) for start in (0, cuts[0]))
    first.add(gallery[: cuts[0]])
    second.add(gallery[cuts[0] :])
    tables = (torch.cat(parts, 1) for parts in zip(first.nearest(), second.nearest(), strict=True))
    check_nearest(*nearest_of(*tables, 50), gallery, queries, 50)


def test_the_neighbours_and_their_order_are_those_of_sorting_everything():
    """Real numbers, and galleries of several sizes."""
    generator = torch.Generator().manual_seed(0)
    for rows in (83, 84, 85, 500, 1013):
        gallery, queries = (
            torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in (rows, 40)
        )
        similarity = nn.functional.normalize(queries) @ nn.functional.normalize(gallery).T
        found = Neighbors(queries, 20, 200)
        found.add(gallery)
        assert torch.equal(found.nearest()[1], similarity.argsort(descending=True)[:, :20]), rows


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_no_numbers_are_refused(bad):
    gallery, labels = planted(50, 2, 0.1, seed=0)
    spoilt = gallery.index_fill(0, torch.tensor([7]), bad)
    for some, others, name in ((spoilt, gallery, "gallery"), (gallery, spoilt, "queries")):
        with pytest.raises(ValueError, match=f"{name} holds features that are not finite"):
            weighted_knn(some, labels, others, 2, neighbors=(5,))


# The evaluation: images whose pixels are the features

VIEW = EvalView(resize=2, size=2)
CONFIG = KNNConfig(neighbors=(1, 4), chunk=4)


def images(n, seed, classes=3):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    pixels = torch.randint(100, (n, 3, 2, 2), generator=generator)
    pixels[torch.arange(n), labels] += 120
    return ImageData(
        "planted",
        "planted",
        "train" if seed == 0 else "test",
        pixels.to(torch.uint8),
        labels,
        tuple("rgb"),
    )


def evaluate(backbone=None, gallery=103, run_dir=None, precision=None):
    """With `run_dir` as a command does: all ranks share the work, and what is done is kept."""
    backbone, data = backbone or nn.Flatten(), (images(gallery, 0), images(31, 1))
    if run_dir is None:
        return knn.evaluate(backbone, data, CONFIG, view=VIEW, precision=precision)
    return CONFIG.run(backbone, data, Setup(Path(run_dir) / "knn", VIEW, precision=precision))


def _on_rank(gallery: int, run_dir: str, rank: int, size: int) -> tuple:
    shared = evaluate(gallery=gallery, run_dir=run_dir)
    seen = []
    watched = nn.Sequential(nn.Flatten(), nn.Identity())
    watched[1].register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    evaluate(watched, gallery, run_dir)
    alone = evaluate(gallery=gallery) if rank == 0 else None  # the others do not come
    return shared, alone, sum(seen)


@pytest.mark.parametrize("gallery", [103, 4])
def test_ranks_share_the_work_and_find_what_one_process_does(ranks, tmp_path, gallery):
    """Shares of 51 and 52 gallery images, 15 and 16 queries; or of two images, fewer than k."""
    (shared, alone, seen), (other, _, also_seen) = ranks(
        partial(_on_rank, gallery, str(tmp_path / "kept")), 2
    )
    assert shared == other == alone
    assert shared["gallery"] == gallery
    assert (seen, also_seen) == (gallery // 2 + 15, gallery - gallery // 2 + 16)
    assert not list((tmp_path / "kept").iterdir())


def _merged_of_three(rank: int, size: int) -> tuple:
    gallery, queries = tying(100, 0), tying(10, 1)
    nearest = Neighbors(queries, 40, 4, features.share(100).start)
    nearest.add(gallery[features.share(100)])
    return *neighbors.merge_over_ranks(*nearest.nearest()), queries[features.share(10)]


@pytest.mark.slow  # three processes start
def test_each_rank_gets_the_nearest_of_all_ranks_rows_for_its_queries(ranks):
    for similarity, index, queries in ranks(_merged_of_three, 3):
        check_nearest(similarity, index, tying(100, 0), queries, 40)


class Dying(nn.Module):
    """Flattens, until it has seen so many images."""

    def __init__(self, lives: int):
        super().__init__()
        self.lives, self.seen = lives, 0

    def forward(self, x):
        self.seen += len(x)
        if self.seen > self.lives:
            raise KeyboardInterrupt
        return x.flatten(1)


def test_a_killed_evaluation_goes_on_where_it_was_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(neighbors, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(features, "BATCH_SIZE", 5)
    compared = []
    plain = Neighbors._compare
    monkeypatch.setattr(
        Neighbors, "_compare", lambda self: (compared.append(self.next_row), plain(self))
    )
    whole = evaluate(run_dir=None)
    in_one_go = list(compared)
    for lives in (
        # in the queries; in the gallery; not at all
        17,
        70,
        10**6,
    ):
        compared.clear()
        backbone = Dying(lives)
        try:
            found = evaluate(backbone=backbone, run_dir=tmp_path)
        except KeyboardInterrupt:
            assert lives < 10**6
            assert len(list(tmp_path.iterdir())) == 1
    assert found == whole
    assert compared == in_one_go[1:]
    # Blocks of 32 rows or more are full with a whole batch of 5.
    assert backbone.seen == 103 - 35
    assert not list(tmp_path.iterdir())


def test_what_is_kept_belongs_to_backbone_data_and_settings_and_to_one_process(
    tmp_path, monkeypatch
):
    def folder(**settings):
        with pytest.raises(KeyboardInterrupt):
            evaluate(run_dir=tmp_path, **settings)
        return {path.name for path in tmp_path.iterdir()}

    class Scaled(Dying):
        def __init__(self, scale):
            super().__init__(40)
            self.register_buffer("scale", torch.tensor(scale))

    assert len(folder(backbone=Scaled(1.0))) == 1
    assert len(folder(backbone=Scaled(1.0))) == 1
    assert len(folder(backbone=Scaled(2.0))) == 2
    assert len(folder(backbone=Scaled(2.0), gallery=104)) == 3
    assert len(folder(backbone=Scaled(2.0), precision=torch.bfloat16)) == 4


@pytest.mark.slow  # embeds streamed images
def test_streamed_images_are_embedded_from_where_a_share_begins(tmp_path):
    from torchvision.io import write_png

    from imsvd_core.data.tree import open_folder

    for split, there in (("train", images(90, 0)), ("val", images(20, 1))):
        for number, (image, label) in enumerate(
            zip(there.images, there.labels.tolist(), strict=True)
        ):
            home = tmp_path / split / there.classes[label]
            home.mkdir(parents=True, exist_ok=True)
            write_png(image, str(home / f"{number:03}.png"))
    data = tuple(open_folder(f"tree:{tmp_path}", split) for split in ("train", "test"))
    whole = features.embed(nn.Flatten(), data[0], VIEW)
    part = torch.cat(list(features.batches(nn.Flatten(), data[0], VIEW, range(70, 88))))
    assert torch.equal(part, whole[70:88])
    setup = Setup(tmp_path / "kept/knn", VIEW)
    found = KNNConfig(neighbors=(5,)).run(nn.Flatten(), data, setup)
    assert found["knn_5"] > 95
