"""Pretraining: a recipe's method, views, network and data put into the loop."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from imsvd_core.data import memory as datasets
from imsvd_core.data.tree import FolderImages, open_folder
from imsvd_core.discretization import hardness, joint, soft_discretize
from imsvd_core.distributed import on_rank_0, rank_0_first, world
from imsvd_core.engine.trainer import Batches, Loop, Progressed, stream_seed
from imsvd_core.evaluation import knn
from imsvd_core.methods import IMSVD
from imsvd_core.networks import NetworkConfig, TwinNetwork
from imsvd_core.recipes import Recipe
from imsvd_core.results import provenance, write_json, write_result
from imsvd_core.runs.backbones import save_backbone
from imsvd_core.system import signals
from imsvd_core.system.config import plain
from imsvd_core.system.devices import PRECISIONS, pick_device
from imsvd_core.system.files import atomic_write, hold
from imsvd_core.views import EvalView, TwoViews

Images = datasets.ImageData | FolderImages
SEEN = 128  # rows and columns of the joint matrix that a run keeps for each epoch


class Pretraining:
    """A run: iterate it to train (each step yields where it stands); look at `network`, `knn()`, `look()` on the way.

    Args:
        recipe: everything that fixes the run.
        run_dir: config.json, metrics.jsonl, checkpoints/, backbone.safetensors and result.json go here; a run that
            is there already is resumed.
        data: (train, test), to spare loading them twice; by default `recipe.data` is loaded.
        progress: show a progress bar.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path | str,
        *,
        data: tuple[Images, Images] | None = None,
        progress: bool = True,
    ):
        self.recipe, self.run_dir = recipe, Path(run_dir)
        self.device = pick_device(recipe.loop.device)
        train, self.test = data or rank_0_first(
            lambda: load_data(recipe, progress=progress and world()[0] == 0)
        )  # the first may download
        self.gallery = train
        self.train = train if recipe.samples is None else train.subset(recipe.samples)
        self.network = build_network(recipe.network, recipe.loop.seed)
        self.method = recipe.method.build(recipe.network.dim).to(self.device)
        self.views = TwoViews(recipe.views)
        self.eval_view = EvalView(**asdict(recipe.eval_view))
        for name in ("knn", "watch"):
            getattr(recipe, name).check(self.gallery, self.test, name)
        free = (
            "knn",
            "watch",
            "look",
            "linear",
            "eval_view",  # they judge the run, and may change after it
            "on_corrupt",
        )  # a run that a spoilt file ended may go on without that file
        settings = {name: value for name, value in plain(recipe).items() if name not in free} | {
            "data": self.train.name
        }
        batches, self._two_views = self._source()
        self.loop = Loop(
            self._step,
            {"network": self.network},
            len(self.train),
            recipe.loop,
            recipe.optim,
            self.run_dir,
            batches=batches,
            objective=self.method,
            settings=settings,
            progress=progress,
        )
        on_rank_0(write_json)(
            self.run_dir / "config.json", {**plain(recipe), "data": self.train.name}
        )

    def __iter__(self) -> Iterator[Progressed]:
        yield from self.loop

    def _source(self) -> tuple[Batches, Callable[..., tuple[Tensor, Tensor]]]:
        """What the loop's plan is turned into, and what makes two views of that."""
        if isinstance(self.train, FolderImages):  # two crops of each image, made by workers
            crops = partial(
                self.train.two_crops, self.views, seed=self.recipe.loop.seed, device=self.device
            )
            return crops, lambda batch, generator: self.views.finish(batch, generator)
        images = self.train.images.to(self.device)
        return lambda plan: (images[indices.to(images.device)] for _, indices in plan), self.views

    def _step(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x1, x2 = self._two_views(batch, generator)
        z1, z2 = self.network(x1, x2)
        return z1, z2

    @property
    def precision(self) -> torch.dtype | None:
        return PRECISIONS[self.recipe.loop.precision]

    def knn(self) -> dict[str, float]:
        """Weighted kNN accuracy of the backbone as it is now (`recipe.knn`)."""
        return knn.evaluate(
            self.network.backbone,
            (self.gallery, self.test),
            self.recipe.knn,
            view=self.eval_view,
            device=self.device,
            precision=self.precision,
        )

    @on_rank_0
    def watch(self) -> dict[str, float]:
        """Record what accompanies training, unless it is recorded for this step: kNN (`recipe.watch`) and hardness.

        Rank 0 does, while the others wait.
        """
        done = self.loop.records("gallery")
        if done and done[-1]["step"] == self.loop.step:
            return done[-1]
        with signals.interruptible():  # the checkpoint of this step is there
            figures = knn.evaluate(
                self.network.backbone,
                (self.gallery, self.test),
                self.recipe.watch,
                view=self.eval_view,
                device=self.device,
                precision=self.precision,
            )
        if isinstance(self.recipe.method, IMSVD):
            p1, p2 = self.look()
            figures |= asdict(hardness(p1, self.recipe.method.units))
            with atomic_write(
                self.run_dir / "joints" / f"step-{self.loop.step:09d}.safetensors"
            ) as file:
                file.write(
                    safetensors.torch.save(
                        {"joint": joint(p1, p2)[:SEEN, :SEEN].half().contiguous()}
                    )
                )
        self.loop.record(**figures)
        return figures

    @torch.no_grad()
    def look(self, samples: int | None = None) -> tuple[Tensor, Tensor]:
        """Soft codes p1, p2 (samples, D) of two views of test images (`recipe.look` of them): always the same. IMSVD only."""
        if not isinstance(self.recipe.method, IMSVD):
            raise ValueError(
                f"method={self.recipe.method.name!r} has no soft codes: look() needs IMSVD"
            )
        generator = torch.Generator(self.device).manual_seed(
            stream_seed(self.recipe.loop.seed, "look", 0)
        )
        images = self.test.subset(min(samples or self.recipe.look, len(self.test)))
        if isinstance(images, FolderImages):
            plan = [(0, torch.arange(len(images)))]
            crops = next(
                images.two_crops(self.views, plan, seed=self.recipe.loop.seed, device=self.device)
            )
            apply = self.views.first.finish, self.views.second.finish
        else:
            crops = [images.images.to(self.device)] * 2
            apply = self.views.first, self.views.second
        was_training = self.network.training
        self.network.eval()
        codes = []
        part = max(64, 500 * 32**2 // self.recipe.views.first.size**2)
        for view, seen in zip(apply, crops):
            logits = torch.cat(
                [self.network.embed(view(some, generator)) for some in seen.split(part)]
            )
            codes.append(
                soft_discretize(
                    logits.float(), self.recipe.method.units, self.recipe.method.temperature
                ).cpu()
            )
        self.network.train(was_training)
        return codes[0], codes[1]

    @on_rank_0
    def finish(self) -> Path:
        """Export the backbone, evaluate it, and write result.json with provenance; returns its path.

        Rank 0 does, while the others wait.
        """
        held = hold(self.run_dir)  # until its result is written
        save_backbone(
            self.run_dir / "backbone.safetensors", self.network.backbone, self.recipe.network
        )
        with signals.interruptible():
            accuracy = self.knn()
        figures = {
            **accuracy,
            "steps": self.loop.records(),
            "watched": self.loop.records("gallery"),
        }
        origin = provenance(
            config=self.recipe,
            seed=self.recipe.loop.seed,
            device=self.device,
            dataset=self.train.title,
            seconds=self.loop.seconds,
            world_size=self.loop.ranks,
        )
        held.check()
        return write_result(
            self.run_dir / "result.json", "pretrain", figures, origin, overwrite=True
        )


def pretrain(recipe: Recipe, run_dir: Path | str, *, progress: bool = True) -> Path:
    """Train `recipe` to its end, resuming what is in `run_dir`; returns the path of result.json.

    Raises `signals.Stopped`, with a checkpoint saved, after SIGTERM or SIGUSR2 (a cluster's notice), or when a rank's
    launcher is gone; `files.Superseded` when a later attempt has taken `run_dir` over.
    """
    with signals.heed():
        run = Pretraining(recipe, run_dir, progress=progress)
        if (
            run.loop.step % run.loop.steps_per_epoch == 0
        ):  # untrained, or killed between an epoch's end and its record
            run.watch()
        for progressed in run:
            if progressed.ends_epoch:
                run.watch()
        run.loop.refuse_unfinished()
        return run.finish()


def load_data(recipe: Recipe, *, progress: bool = False) -> tuple[Images, Images]:
    """The recipe's data set: (train, test), in memory or, for tree:PATH, as files to be streamed. `progress`: of decoding."""
    load = (
        open_folder
        if recipe.data.startswith("tree:")
        else partial(datasets.load, progress=progress)
    )
    train, test = (
        load(recipe.data, split, on_corrupt=recipe.on_corrupt) for split in ("train", "test")
    )
    return train, test


def build_network(config: NetworkConfig, seed: int) -> TwinNetwork:
    """A freshly initialised network: the same for the same seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "weights", 0))
        return TwinNetwork.build(config)
