"""What the chapters say of stored runs: each test bears the sentence that it guards."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
from ledger import of_chapter

from imsvd_core.recipes import recipe
from imsvd_core.results import stored
from imsvd_core.system.config import config_hash

LONG = "cifar10-laptop-40-epochs-seed0"
TOLD = ("USR2 in mid-epoch", "USR2 while it starts", "preempted", "preempted while it starts")
DEATHS = ("node lost, with rank 0", "node lost, without rank 0", "slurmd killed, ranks alive")


def figures(name: str) -> Any:
    return stored(name)["figures"]


def seeds(name: str, key: str) -> list[Any]:
    return [figures(f"cifar10-laptop-{name}-seed{seed}")[key] for seed in range(3)]


# --- 06 Finite batches


@pytest.fixture
def accuracies() -> dict[int, dict[int, float]]:
    """Mean 20-NN accuracy by batch size and units."""
    rows: dict[int, dict[int, list[float]]] = {}
    for run in figures("cifar10-laptop-units-grid")["runs"]:
        of_size = rows.setdefault(run["batch_size"], {})
        of_size.setdefault(run["units"], []).append(run["knn_20"])
    return {
        size: {units: statistics.mean(values) for units, values in of_size.items()}
        for size, of_size in rows.items()
    }


def test_of_all_ends_128_units_in_batches_of_128_alone_stand_above_the_noise_of_two_seeds(
    accuracies: dict[int, dict[int, float]],
) -> None:
    runs = figures("cifar10-laptop-cheaper")["runs"]
    repeated = [run["knn_20"] for run in runs if run["setting"] == "fp32"]
    noise = math.sqrt(2) * statistics.stdev(repeated)
    lost = {
        (size, units): max(of_size.values()) - of_size[units]
        for size, of_size in accuracies.items()
        for units in (min(of_size), max(of_size))
    }
    assert [end for end, points in lost.items() if points > 2 * noise] == [(128, 128)]


def test_the_more_units_the_softer_the_codes() -> None:
    runs = figures("cifar10-laptop-units-grid")["runs"]
    for size in {run["batch_size"] for run in runs}:
        of_size = [run for run in runs if run["batch_size"] == size]
        units = sorted({run["units"] for run in of_size})
        hard = [
            statistics.mean(run["above_90"] for run in of_size if run["units"] == count)
            for count in units
        ]
        assert hard == sorted(hard, reverse=True)


# --- 07 The fast loss


def test_at_the_papers_size_streaming_stays_near_the_bare_products_and_takes_half_the_memory() -> (
    None
):
    kept = figures("benchmark-loss-cpu")
    assert (kept["setting"]["samples"], kept["setting"]["dim"]) == (2048, 8160)
    assert kept["streaming"]["paired_ratio"] < 1.2
    assert kept["full_matrix"]["paired_ratio"] > 1.2
    assert kept["lean_matrix"]["paired_ratio"] > 1.2
    assert kept["streaming"]["extra_peak_MB"] < kept["full_matrix"]["extra_peak_MB"] / 2


def test_bf16_products_and_the_collision_bound_take_less_than_the_exact_loss() -> None:
    kept = figures("benchmark-loss-cpu")
    assert kept["streaming_bf16"]["time_over_fp32_products"] < 0.7
    assert kept["collision"]["paired_ratio"] < 0.9


def test_bf16_ends_within_the_seeds_range_and_a_quarter_of_the_rows_clearly_worse() -> None:
    runs = figures("cifar10-laptop-cheaper")["runs"]

    def of_runs(setting: str, key: str) -> list[float]:
        return [run[key] for run in runs if run["setting"] == setting]

    for key in ("knn_20", "total"):
        exact = of_runs("fp32", key)
        cheap = statistics.mean(of_runs("bf16", key))
        assert min(exact) - 0.01 <= cheap <= max(exact) + 0.01
    assert max(of_runs("quarter", "knn_20")) < min(of_runs("fp32", "knn_20"))
    assert min(of_runs("quarter", "total")) > max(of_runs("fp32", "total")) + 0.3


def test_two_ranks_share_time_and_memory_and_send_what_the_formula_says() -> None:
    shared = figures("benchmark-ranks")
    assert (shared["setting"]["samples"], shared["setting"]["dim"]) == (2048, 8160)
    two = shared["two_ranks"]
    assert two["slower_rank_over_one_process"] < 0.65
    assert two["peak_over_one_process"] <= 1
    assert abs(two["bytes_sent_per_rank"] / two["bytes_by_formula"] - 1) < 0.02
    work = [row["work_times_ranks"] for row in shared["share"].values()]
    assert min(work) > 0.9
    assert max(work) < 1.15
    costs = of_chapter("07-fast-loss", "costs")
    for ranks, row in shared["share"].items():
        assert costs(2048, 8160, int(ranks))["share rows"][1] == row["bytes_sent"]


def test_a_worker_is_spared_its_augmentations_and_most_of_what_is_left_is_decoding() -> None:
    fed = figures("benchmark-input-cpu")
    assert fed["worker"]["ratio"] > 4
    assert 0.5 < fed["decode_share_of_ours"] < 0.8
    assert fed["unfinished_over_pil"] > 3
    assert fed["throughput"]["ratio"] < 1.5


# --- 08 Training


def test_two_epochs_raise_the_accuracy_by_more_than_five_points() -> None:
    watched = seeds("imsvd", "watched")
    after = statistics.mean(run[-1]["knn_20"] for run in watched)
    assert after > 5 + statistics.mean(run[0]["knn_20"] for run in watched)


def test_the_lower_temperature_gains_no_more_than_seeds_differ_among_themselves() -> None:
    low, high = seeds("imsvd", "knn_20"), seeds("temperature-1", "knn_20")
    gain = statistics.mean(a - b for a, b in zip(low, high, strict=True))
    assert 0 < gain < 2 * statistics.stdev(low)


def test_all_that_the_long_run_differs_in_from_the_recipe_is_the_number_of_epochs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the processor of that run had units for bf16
    monkeypatch.setattr("imsvd_core.recipes.base.fast_precision", lambda: "bf16")
    meant = recipe("cifar10", "laptop")
    meant = replace(meant, loop=replace(meant.loop, epochs=40))
    assert stored(LONG)["provenance"]["config_hash"] == config_hash(meant)
    assert figures(LONG)["watched"][-1]["epoch"] == 40


def test_the_long_run_beats_two_epochs_by_ten_points_in_half_precision_too() -> None:
    long = figures(LONG)
    assert abs(long["knn_20"] - long["knn_20_as_kept"]) < 0.3
    assert long["knn_20"] > statistics.mean(seeds("imsvd", "knn_20")) + 10


def test_most_of_the_accuracy_came_in_the_first_half() -> None:
    knn = [line["knn_20"] for line in figures(LONG)["watched"]]
    assert knn[20] - knn[0] > 2 * (knn[-1] - knn[20])


def test_the_codes_hardened_and_then_stopped() -> None:
    course = figures(LONG)["watched"]
    for key in ("above_90", "above_99"):
        assert course[-1][key] > course[1][key]
    assert 0 < course[-1]["above_90"] - course[28]["above_90"] + 0.01 < 0.05


def test_ti_and_de_fell_over_the_long_run() -> None:
    steps = figures(LONG)["steps"]
    for key in ("transform_invariance", "diagonal_entropy"):
        assert steps[-1][key] < steps[0][key] - 0.5


# --- 11 Evaluation


def test_twins_are_recognised_more_often_than_others_even_without_their_twin() -> None:
    twins = figures("evaluations-small")["twins"]
    without = twins["knn_20_of_twins_without"]
    assert twins["knn_20_of_twins"] > without > twins["knn_20_of_others"]
    leak = twins["twins"] / twins["test_images"] * (twins["knn_20_of_twins"] - without)
    assert 0 < leak < 0.3


def test_the_gallery_streams_in_the_same_memory_whatever_its_blocks() -> None:
    full = figures("benchmark-knn-full-size")["full_size"]
    streams = [value["peak_GB"] for name, value in full.items() if name.startswith("stream")]
    assert full["share"]["peak_GB"] < 8
    assert max(streams) - min(streams) < 0.1 * min(streams)


def test_the_detector_learns_ten_pictures_by_heart_and_nothing_of_others() -> None:
    learned = figures("coco-mini-overfit")["overfit"]
    ten, unseen = learned["on_the_ten"], learned["on_the_test_split"]
    assert ten["box_ap50"] > 40
    assert ten["seconds"] < 900
    assert unseen["box_ap50"] < 10


def test_the_full_width_detector_resumes_with_what_was_saved() -> None:
    wide = figures("coco-mini-overfit")["full_width"]
    assert wide["identical"]
    assert wide["resumed_with_what_was_saved"]


def test_a_hundred_pictures_teach_no_detector() -> None:
    runs = figures("evaluations-small")["runs"]
    for name in ("tiny", "tiny-untrained"):
        assert runs[name]["coco-detection-coco:coco-mini"]["box_ap50"] < 5
    assert runs["tiny"]["coco-detection-running-averages"]["box_ap50"] < 5


def test_training_helps_at_home_and_abroad_and_the_network_from_cifar_is_better_at_both() -> None:
    runs = figures("evaluations-small")["runs"]
    data = {"cifar10": "cifar10", "tiny": "folder:tiny-imagenet-40"}

    def knn(key: str, place: str) -> float:
        return runs[key][f"knn-{data[place]}"]["knn_20"]

    def probe(key: str, place: str) -> float:
        return runs[key][f"imagenet-linear-{data[place]}"]["linear"]

    for source in data:
        for place in data:
            assert knn(source, place) > knn(f"{source}-untrained", place) + 3
            assert probe(source, place) > probe(f"{source}-untrained", place) + 3
    abroad = knn("cifar10", "tiny") - knn("cifar10-untrained", "tiny")
    assert knn("cifar10", "cifar10") - knn("cifar10-untrained", "cifar10") > abroad
    assert knn("cifar10", "tiny") > knn("tiny", "tiny")


# --- 14 Jobs that survive, 15 Full scale


def test_two_misfortunes_and_three_attempts_end_at_the_weights_of_the_job_left_alone() -> None:
    record = figures("launch-recorded")
    story = record["disturbed"]
    assert record["identical_weights"] is True
    assert sum(state.startswith("RUNNING") for _, state in story["states"]) == 3
    outcomes = [row["State"] for row in story["accounts"]]
    assert outcomes == ["REQUEUED", "NODE_FAIL", "COMPLETED"]


@pytest.fixture
def faults() -> dict[str, dict[str, Any]]:
    return {row["fault"]: row for row in figures("launch-faults")["faults"]}


def test_an_announced_end_cost_no_step(faults: dict[str, dict[str, Any]]) -> None:
    decoding = {"USR2 while workers decode"} & faults.keys()  # not every recording has it
    for name in (*TOLD, "time limit", *decoding):
        assert faults[name]["outcome"] == "COMPLETED", name
        assert faults[name]["seconds_lost"] == 0, name


def test_an_end_that_was_not_announced_cost_less_than_the_interval_and_the_step_in_progress(
    faults: dict[str, dict[str, Any]],
) -> None:
    for name in DEATHS:
        row = faults[name]
        assert row["outcome"] == "COMPLETED", name
        assert row["seconds_lost"] <= row["save_interval_s"] + row["seconds_per_step"], name


def test_what_was_cancelled_or_failed_is_not_queued_again(
    faults: dict[str, dict[str, Any]],
) -> None:
    assert faults["cancelled"]["outcome"] == "CANCELLED"
    assert faults["its parent fails"]["outcome"] == "CANCELLED"
    assert faults["one rank fails"]["outcome"] == "FAILED"


def test_the_second_call_submitted_three_jobs_and_touched_nothing_else() -> None:
    calls = {row["graph"]: row for row in figures("launch-faults")["graphs"]}
    first, second = calls["first call"], calls["second call"]
    assert (first["done"], first["failed"], first["not_run"]) == (12, 1, 2)
    assert (second["jobs"], second["done"]) == (3, 15)
    assert first["seconds"] + second["seconds"] < 900
