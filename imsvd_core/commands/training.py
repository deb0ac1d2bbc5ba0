"""`imsvd pretrain`, `evaluate` and `bench`: a recipe and its backbone."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro
from rich.console import Console

from imsvd_core.commands.common import ranks, show_result
from imsvd_core.commands.settings import parse
from imsvd_core.commands.words import peek
from imsvd_core.data.sources import OnCorrupt
from imsvd_core.distributed import world
from imsvd_core.recipes import (
    EvaluationRecipe,
    EvalViewConfig,
    Recipe,
    Scale,
    current_scale,
    evaluation,
    recipe,
)
from imsvd_core.results import provenance, write_result
from imsvd_core.runs import evaluate as evaluations
from imsvd_core.runs import pretrain as training
from imsvd_core.runs.backbones import TrainedBackbone, open_backbone
from imsvd_core.runs.bench import bench_step
from imsvd_core.system import signals
from imsvd_core.system.devices import pick_device
from imsvd_core.system.foreign import ForeignConfig

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class PretrainCommand:
    """Train a recipe.

    Leaves config.json, metrics.jsonl, checkpoints/, backbone.safetensors and result.json."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    run_dir: Path | None = None
    """Folder of the run; runs/RECIPE-SCALE-seedSEED by default. A run found there is resumed."""
    scale: Scale = "laptop"
    """Which version of the recipe the other settings start from; IMSVD_SCALE by default."""
    progress: bool = True


@dataclass(frozen=True)
class EvaluateCommand(Generic[Settings]):
    """Judge a backbone; the settings start from the run's own (knn, linear) or from the paper's.

    NAME.json is written into the run's folder (NAME-DATA.json for data other than the
    evaluation's)."""

    run: tyro.conf.Positional[Path]
    """Folder of a finished run, or a file of anybody's weights of a ResNet (.pth, .pt, .ckpt, .pkl,
    .safetensors)."""
    config: Annotated[Settings, tyro.conf.arg(name="")]
    foreign: Annotated[ForeignConfig, tyro.conf.arg(name="")] = field(default_factory=ForeignConfig)
    eval_view: EvalViewConfig = field(default_factory=EvalViewConfig)
    data: str = "auto"
    """Data set: those of `imsvd pretrain`; voc:PATH and coco:PATH for VOC's and COCO's layouts."""
    scale: Scale = "laptop"
    """Which version of the evaluation the settings start from; IMSVD_SCALE by default."""
    device: str | None = None
    """auto, cuda, mps or cpu; by default that of the settings."""
    on_corrupt: OnCorrupt = "error"
    """An unreadable image file ends the evaluation, or is passed over."""
    out: Path | None = None
    """Folder of the result; the run's own by default, runs/FILE for a file of weights."""
    progress: bool = True
    overwrite: bool = False
    """Replace the result that is there, if any, and do anew all that has led to it."""


@dataclass(frozen=True)
class BenchStepCommand:
    """Time whole training steps of a recipe on the device at hand.

    Gives hours for 100 epochs and peak memory (Table IV)."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    scale: Scale = "laptop"
    """Which version of the recipe the other settings start from; IMSVD_SCALE by default."""
    steps: int = 20
    """Steps that are timed."""
    warmup: int = 3
    """Steps before them that are not."""
    json: Path | None = None
    """Also write the figures to this file."""
    progress: bool = True


def pretrain(argv: Sequence[str]) -> Path:
    """Train a recipe."""
    with ranks(peek(argv, "--loop.device")):
        command = parse_pretraining(argv, "imsvd pretrain")
        return show_result(
            training.pretrain(command.recipe, command.run_dir, progress=command.progress)
        )


def parse_pretraining(argv: Sequence[str], prog: str) -> Any:
    """The settings, with their run folder."""
    command = _parse_recipe(argv, PretrainCommand, prog)
    name = f"{argv[0]}-{command.scale}-seed{command.recipe.loop.seed}"
    return replace(command, run_dir=command.run_dir or Path("runs") / name)


def _parse_recipe(argv: Sequence[str], kind: type, prog: str) -> Any:
    """A command whose settings start from the recipe that its first word names."""
    scale = current_scale(peek(argv, "--scale"))
    return parse(
        kind,
        argv[1:],
        prog=f"{prog} {argv[0]}",
        default=kind(recipe(argv[0], scale), scale=scale),
        config=(tyro.conf.AvoidSubcommands,),
    )


def evaluate(argv: Sequence[str]) -> Path:
    """Judge a backbone."""
    with ranks(peek(argv, "--device") or peek(argv, "--loop.device")):
        command, trained, default = parse_evaluation(argv, "imsvd evaluate")
        return show_result(
            evaluations.evaluate(
                argv[0],
                trained,
                EvaluationRecipe(command.config, command.data, command.eval_view),
                default_data=default.data,
                device=command.device,
                on_corrupt=command.on_corrupt,
                progress=command.progress,
                overwrite=command.overwrite,
            )
        )


def parse_evaluation(
    argv: Sequence[str], prog: str
) -> tuple[Any, TrainedBackbone, EvaluationRecipe]:
    """The settings, the backbone that they are to judge, and the settings by default."""
    name, rest = argv[0], argv[1:]
    scale = current_scale(peek(rest, "--scale"))

    def parse_with(run: Any, default: EvaluationRecipe) -> Any:
        # The class is known only when this runs.
        kind: Any = EvaluateCommand[type(default.config)]  # type: ignore[misc]
        start = EvaluateCommand(
            run, default.config, eval_view=default.eval_view, data=default.data, scale=scale
        )
        return parse(kind, rest, prog=f"{prog} {name}", default=start)

    command = parse_with(tyro.MISSING, evaluation(name, scale))
    # The backbone decides from what the other settings start.
    trained = open_backbone(command.run, scale, command.foreign)
    default = evaluation(name, scale, trained.recipe, trained.view)
    command = parse_with(command.run, default)
    return command, replace(trained, folder=command.out or trained.folder), default


def bench(argv: Sequence[str]) -> None:
    """Time training steps."""
    with ranks(peek(argv, "--loop.device")):
        command = _parse_recipe(argv[1:], BenchStepCommand, "imsvd bench step")
        start, timed = time.perf_counter(), command.recipe
        with signals.handle_stop_signals():
            figures = bench_step(
                timed, steps=command.steps, warmup=command.warmup, progress=command.progress
            )
        if world()[0] == 0:
            Console().print(figures)
            if command.json:
                origin = provenance(
                    config=timed,
                    seed=timed.loop.seed,
                    device=pick_device(timed.loop.device),
                    dataset=figures["data"],
                    seconds=time.perf_counter() - start,
                    world_size=figures["ranks"],
                )
                name = f"bench-step-{argv[1]}"
                write_result(command.json, name, figures, origin, overwrite=True)
