"""Weighted kNN: exact, chunked, and right where the answer is known."""

import pytest
import torch

from imsvd_core.evaluation.knn import KNNConfig, weighted_knn


def planted(n, classes, noise, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    features = torch.nn.functional.one_hot(labels, classes) + noise * torch.randn(n, classes, generator=generator)
    return features, labels


def brute_force(gallery, labels, queries, classes, k, temperature):
    """In float64, one query at a time, by sorting everything."""
    gallery, queries = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (gallery, queries))
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
    """Two near neighbours of class 1 outvote three farther ones of class 0 only because votes are weighted."""
    angles = torch.tensor([0.0, 0.02, 0.5, 0.5, 0.5])
    gallery = torch.stack([angles.cos(), angles.sin()], 1)
    labels = torch.tensor([1, 1, 0, 0, 0])
    query = torch.tensor([[1.0, 0.0]])
    assert weighted_knn(gallery, labels, query, 2, neighbors=(5,), temperature=0.07)[5].item() == 1
    assert weighted_knn(gallery, labels, query, 2, neighbors=(5,), temperature=100.0)[5].item() == 0
    assert weighted_knn(gallery, labels, query, 2, neighbors=(5,), temperature=1e-4)[5].item() == 1


def test_planted_labels_are_found_and_shuffled_ones_are_chance():
    gallery, labels = planted(4000, 20, 0.1, seed=0)
    queries, truth = planted(500, 20, 0.1, seed=1)
    found = weighted_knn(gallery, labels, queries, 20, neighbors=(20,))[20]
    assert (found == truth).float().mean() > 0.99
    shuffled = labels[torch.randperm(4000, generator=torch.Generator().manual_seed(2))]
    found = weighted_knn(gallery, shuffled, queries, 20, neighbors=(200,))[200]
    assert (found == truth).float().mean() < 0.2  # chance is 0.05; all queries of a cluster err alike, so it scatters


def test_memory_does_not_grow_with_gallery_times_queries():
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for item in out if isinstance(out, tuple | list) else (out,):
                largest = max(largest, item.untyped_storage().nbytes())
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
    """With similarity 0.7 at best and a tiny temperature, the nearest neighbour still decides: class 2, never 0."""
    gallery = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.9, 0.9]])
    found = weighted_knn(gallery, torch.tensor([2, 1]), torch.tensor([[1.0, 0.0, 0.0]]), 3, neighbors=(2,), temperature=1e-3)
    assert found[2].tolist() == [2]
