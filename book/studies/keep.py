"""Keep a finished run in the book: its result, its backbone in half precision, its joint matrices.

    python book/studies/keep.py RUN_DIR NAME

writes results/NAME.json, NAME.safetensors and NAME-joints.safetensors beside the chapters. Half
precision halves the file; what it does to the accuracy is measured and kept with the other figures.
"""

import sys
from pathlib import Path

import safetensors.torch
import torch

from imsvd_core.evaluation import knn
from imsvd_core.results import STORE, read_result, write_json
from imsvd_core.runs.backbones import load_backbone, load_run, save_backbone
from imsvd_core.runs.pretrain import load_data
from imsvd_core.system.devices import PRECISIONS
from imsvd_core.system.files import atomic_write
from imsvd_core.views import EvalView


def main(run_dir: Path, name: str, store: Path = STORE) -> None:
    result = read_result(run_dir / "result.json")
    config, backbone = load_run(run_dir)
    save_backbone(store / f"{name}.safetensors", backbone, config.network, torch.float16)

    view = EvalView(**vars(config.eval_view))
    train, test = load_data(config)
    assert test is not None
    kept = knn.evaluate(
        load_backbone(store / f"{name}.safetensors"),
        (train, test),
        config.knn,
        view=view,
        precision=PRECISIONS[config.loop.precision],
    )
    figures = result["figures"] | {
        f"{key}_as_kept": value for key, value in kept.items() if key.startswith("knn")
    }
    write_json(store / f"{name}.json", result | {"name": name, "figures": figures})

    paths = sorted((run_dir / "joints").glob("step-*.safetensors"))
    joints = {path.stem: safetensors.torch.load_file(path)["joint"] for path in paths}
    with atomic_write(store / f"{name}-joints.safetensors") as file:
        file.write(safetensors.torch.save(joints))
    print({key: figures[key] for key in figures if key.startswith("knn")})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2])
