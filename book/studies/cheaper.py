"""What cheaper losses do to a short training (chapter 07): bf16 products, and a quarter of the
block rows at a time.

    python book/studies/cheaper.py RUN_DIR

Every run is the recipe `cifar10-units` with one setting changed and another seed. Runs that RUN_DIR
holds are not run again; the result goes to RUN_DIR/result.json.
"""

import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from imsvd_core.loss import cross_joint_entropy
from imsvd_core.methods.imsvd import IMSVD
from imsvd_core.recipes import recipe
from imsvd_core.results import provenance, write_json, write_result
from imsvd_core.runs.pretrain import Pretraining, load_data
from imsvd_core.system.devices import pick_device

SEEDS = (0, 1, 2)


def main(run_dir: Path) -> None:
    base = recipe("cifar10-units")
    method = base.method
    assert isinstance(method, IMSVD)
    units = method.units
    assert isinstance(units, int)
    data = load_data(base)
    variables = base.network.dim // units
    rows: list[dict[str, Any]] = []
    changed: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16": {"products": "bf16"},
        "quarter": {"sampled_variables": variables // 4},
    }
    for seed, (name, settings) in product(SEEDS, changed.items()):
        path = run_dir / f"{name}-seed{seed}" / "row.json"
        if not path.exists():
            varied = replace(
                base, method=replace(method, **settings), loop=replace(base.loop, seed=seed)
            )
            run = Pretraining(varied, path.parent, data=data, progress=False)
            for _ in run:
                pass
            write_json(
                path,
                {
                    "setting": name,
                    "seed": seed,
                    "knn_20": run.knn()["knn_20"],
                    "seconds": run.trainer.seconds,
                    **exact_terms(run, units),
                },
            )
        rows.append(json.loads(path.read_text()))
        print(rows[-1], flush=True)
    origin = provenance(
        config=base,
        seed=SEEDS[0],
        device=pick_device(base.loop.device),
        dataset=data[0].title,
        seconds=sum(row["seconds"] for row in rows),
    )
    figures = {"variables": variables, "samples": base.samples, "runs": rows}
    write_result(run_dir / "result.json", "cifar10-laptop-cheaper", figures, origin, overwrite=True)


def exact_terms(run: Pretraining, units: int) -> dict[str, float]:
    """The loss of test images, by the textbook version whatever the run was trained with."""
    z1, z2 = (p.clamp_min(1e-30).log() for p in run.test_codes())  # whose codes are p
    terms = cross_joint_entropy(z1, z2, units)._asdict()
    return {name: value.item() for name, value in terms.items()}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
