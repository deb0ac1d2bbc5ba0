"""The grid of chapter 06: short runs for several batch sizes N and numbers of units B, judged by
20-NN.

    python book/studies/units.py RUN_DIR

Every run is the recipe `cifar10-units` with another N, B and seed (the embedding keeps its D, so V
= D / B). Runs that RUN_DIR holds are not run again; the result goes to RUN_DIR/result.json after
every seed.
"""

import json
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from imsvd_core.discretization import hardness
from imsvd_core.methods.imsvd import IMSVD
from imsvd_core.recipes import recipe
from imsvd_core.results import provenance, write_json, write_result
from imsvd_core.runs.pretrain import Pretraining, load_data
from imsvd_core.system.devices import pick_device

BATCH_SIZES = (128, 512)
UNITS = (4, 8, 16, 32, 64, 128)
SEEDS = (0, 1)


def main(run_dir: Path) -> None:
    base = recipe("cifar10-units")
    assert isinstance(base.method, IMSVD)
    data = load_data(base)
    untrained = Pretraining(base, run_dir / "untrained", data=data, progress=False)
    rows: list[dict[str, Any]] = []
    figures = {
        "untrained_knn_20": untrained.knn()["knn_20"],
        "dim": base.network.dim,
        "samples": len(untrained.train),
        "runs": rows,
    }
    for seed, batch_size, units in product(SEEDS, BATCH_SIZES, UNITS):
        path = run_dir / f"batch{batch_size}-units{units}-seed{seed}" / "row.json"
        if not path.exists():
            varied = replace(
                base,
                method=replace(base.method, units=units),
                loop=replace(base.loop, batch_size=batch_size, seed=seed),
            )
            run = Pretraining(varied, path.parent, data=data, progress=False)
            for _ in run:
                pass
            softness = asdict(hardness(run.test_codes()[0], units))
            write_json(
                path,
                {
                    "batch_size": batch_size,
                    "units": units,
                    "seed": seed,
                    "knn_20": run.knn()["knn_20"],
                    **softness,
                    "seconds": run.trainer.seconds,
                },
            )
        rows.append(json.loads(path.read_text()))
        print(rows[-1], flush=True)
        if (batch_size, units) == (BATCH_SIZES[-1], UNITS[-1]):  # a seed is complete
            seconds = sum(row["seconds"] for row in rows)
            origin = provenance(
                config=base,
                seed=SEEDS[0],
                device=pick_device(base.loop.device),
                dataset=data[0].title,
                seconds=seconds,
            )
            write_result(
                run_dir / "result.json",
                "cifar10-laptop-units-grid",
                figures,
                origin,
                overwrite=True,
            )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
