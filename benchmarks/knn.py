"""Nearest neighbours on a CPU: ``imsvd_core.evaluation.knn``, faiss's flat index, the full matrix.

    pip install faiss-cpu
    python benchmarks/knn.py [--queries 50000] [--gallery 10000] [--features 512] [--rounds 5]
                             [--no-full] [--json PATH]

All search the same random features, normalised by each, with equally many threads
(OMP_NUM_THREADS, the cores by default), in turn; a first round warms up. "plain" is ``(queries @
gallery.T).topk(k)``. A ratio is the median over rounds of one contender's time over faiss's in
the same round; beside it the smallest and the largest. The peak is ru_maxrss of a process of its
own less that of one which holds only the inputs. ``same_neighbors`` is the share of the indices
that faiss finds too: similarities are rounded differently.

At full size (generated features: 50,000 queries, 2048 features, 200 neighbours) one process each,
the whole peak:

* share: one of 8 ranks holds its 160,146 rows of ImageNet's 1,281,167, compares, exchanges with 7
  others (which are played: what they would send is handed over), merges and votes;
* stream: one rank is handed rows as they are generated, 16,384 or 65,536 of them: the peak must
  not grow.

Without ``--json`` nothing is written. Some eight minutes on two cores, most of them at full size.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))  # before torch is loaded

import torch
from torch import Tensor
from torch.nn.functional import normalize

from imsvd_core.evaluation import knn, neighbors
from imsvd_core.results import provenance, write_result
from imsvd_core.system.progress import bar

NEIGHBORS = (20, 200)
FULL = {"queries": 50_000, "features": 2048, "gallery": 160_146, "ranks": 8, "neighbors": 200}
STREAMED = (16_384, 65_536)


def features(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def ours(queries: Tensor, gallery: Tensor, k: int) -> Tensor:
    nearest = neighbors.Neighbors(queries, k)
    nearest.add(gallery)
    return nearest.nearest()[1]


def faiss(queries: Tensor, gallery: Tensor, k: int) -> Tensor:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(normalize(gallery).numpy())
    return torch.from_numpy(index.search(normalize(queries).numpy(), k)[1])


def plain(queries: Tensor, gallery: Tensor, k: int) -> Tensor:
    return (normalize(queries) @ normalize(gallery).T).topk(k).indices


CONTENDERS = {"ours": ours, "faiss": faiss, "plain": plain}


def share() -> None:
    """One of the ranks at full size, from its features to its share's predictions."""
    size, k, rows = FULL["ranks"], FULL["neighbors"], FULL["gallery"]
    gallery = features(rows, FULL["features"], seed=1)
    nearest = neighbors.Neighbors(features(FULL["queries"], FULL["features"], seed=0), k)
    nearest.add(gallery)
    similarity, index = nearest.nearest()
    with (
        mock.patch.multiple(neighbors, world=lambda: (0, size), share=lambda n: range(n // size)),
        mock.patch(
            "torch.distributed.all_to_all_single",
            lambda received, sent, *lengths: received.copy_(sent),
        ),
    ):
        similarity, index = neighbors.merge_over_ranks(similarity, index)
    knn.vote(similarity, index % 1000, 1000, neighbors=NEIGHBORS, temperature=0.07)


def stream(rows: int) -> None:
    """One rank whose gallery is never held."""
    queries = features(FULL["queries"], FULL["features"], seed=0)
    nearest = neighbors.Neighbors(queries, FULL["neighbors"])
    for start in range(0, rows, 512):
        nearest.add(features(512, FULL["features"], seed=start + 1))
    similarity, index = nearest.nearest()
    knn.vote(similarity, index % 1000, 1000, neighbors=NEIGHBORS, temperature=0.07)


def child(args: argparse.Namespace) -> None:
    """Do one piece and print the peak of this process, in bytes."""
    kind, _, number = args.child.partition("-")
    if kind == "share":
        share()
    elif kind == "stream":
        stream(int(number))
    else:
        queries = features(args.queries, args.features, 0)
        gallery = features(args.gallery, args.features, 1)
        if kind != "inputs":
            CONTENDERS[kind](queries, gallery, int(number))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def peak(name: str, args: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--child", name]
    for option in ("queries", "gallery", "features"):
        command += [f"--{option}", str(getattr(args, option))]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, default in (
        ("queries", 50_000),
        ("gallery", 10_000),
        ("features", 512),
        ("rounds", 5),
    ):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--no-full", action="store_true", help="leave the full size out")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    start = time.perf_counter()
    # A child inherits its parent's peak: processes of their own come before this one grows.
    alone = [f"{name}-{k}" for name in CONTENDERS for k in NEIGHBORS]
    full = [] if args.no_full else ["share", *(f"stream-{rows}" for rows in STREAMED)]
    with bar("peaks", len(alone) + 1 + len(full), True) as advance:
        peaks = {name: (peak(name, args), advance(1))[0] for name in ("inputs", *alone, *full)}
    figures = {f"neighbors_{k}": search(k, args, peaks) for k in NEIGHBORS}
    if full:
        figures["full_size"] = {name: {"peak_GB": round(peaks[name] / 1e9, 3)} for name in full}
    setting = {name: getattr(args, name) for name in ("queries", "gallery", "features", "rounds")}
    setting |= {
        "threads": torch.get_num_threads(),
        "full_size": FULL | {"streamed": STREAMED} if full else None,
    }
    print(json.dumps({"setting": setting, "figures": figures}, indent=1))
    if args.json:
        origin = provenance(
            config=setting,
            seed=0,
            device="cpu",
            dataset="random features",
            seconds=time.perf_counter() - start,
        )
        write_result(
            args.json, args.json.stem, {"setting": setting, **figures}, origin, overwrite=True
        )


def search(k: int, args: argparse.Namespace, peaks: dict[str, int]) -> dict[str, object]:
    """Ratios of time, and peaks, at one k."""
    queries = features(args.queries, args.features, 0)
    gallery = features(args.gallery, args.features, 1)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    indices: dict[str, Tensor] = {}
    with bar(f"k = {k}", (args.rounds + 1) * len(CONTENDERS), True) as advance:
        for number in range(args.rounds + 1):
            for name, run in CONTENDERS.items():
                begin = time.perf_counter()
                indices[name] = run(queries, gallery, k)
                if number:
                    seconds[name].append(time.perf_counter() - begin)
                advance(1)
    same = (indices["ours"] == indices["faiss"]).double().mean().item()
    figures: dict[str, object] = {"same_neighbors": round(same, 6)}
    for name in CONTENDERS:
        rounds = zip(seconds[name], seconds["faiss"], strict=True)
        ratios = [contender / faiss_seconds for contender, faiss_seconds in rounds]
        figures[name] = {
            "time_over_faiss": round(statistics.median(ratios), 3),
            "in_one_round": [round(min(ratios), 3), round(max(ratios), 3)],
            "extra_peak_MB": round((peaks[f"{name}-{k}"] - peaks["inputs"]) / 1e6, 1),
        }
    return figures


if __name__ == "__main__":
    main()
