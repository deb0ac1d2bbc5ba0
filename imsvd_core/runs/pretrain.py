"""Pretraining: a recipe's method, views and data, and the trainer that takes their steps."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torchvision.models.resnet import ResNet

from imsvd_core.data import FolderImages, Images, open_data
from imsvd_core.data.sources import find_folder, find_home
from imsvd_core.discretization import hardness, joint, soft_discretize
from imsvd_core.distributed import on_rank_0, rank_0_first
from imsvd_core.engine import checkpoints
from imsvd_core.engine.optim import learning_rate
from imsvd_core.engine.order import stream_seed
from imsvd_core.engine.trainer import Progressed, Trainer
from imsvd_core.evaluation import knn
from imsvd_core.evaluation.base import describe, unlabelled
from imsvd_core.evaluation.features import embed, subset
from imsvd_core.evaluation.knn import KNNConfig
from imsvd_core.methods import IMSVD
from imsvd_core.methods.base import TwinMethod
from imsvd_core.networks import NetworkConfig, TwinNetwork
from imsvd_core.recipes import Recipe
from imsvd_core.results import provenance
from imsvd_core.runs.backbones import open_backbone, save_backbone
from imsvd_core.system import signals
from imsvd_core.system.config import from_plain, plain
from imsvd_core.system.devices import PRECISIONS
from imsvd_core.system.foreign import ForeignConfig
from imsvd_core.system.run_folder import RunFolder
from imsvd_core.views import EvalView, Views

log = logging.getLogger(__name__)

SEEN = 128  # rows and columns of the joint matrix that a run keeps for each epoch


class Pretraining:
    """A run: iterate it to train (each step yields where it stands); look at `method`, `knn()`,
    `test_codes()` on the way.

    Args:
        recipe: everything that fixes the run.
        run_dir: config.json, metrics.jsonl, checkpoints/, backbone.safetensors and result.json go
            here; a run that is there already is resumed.
        data: (train, test), to spare loading them twice; by default `recipe.data` is loaded. test
            may be None: then kNN is left out, and codes are those of training images.
        progress: show a progress bar.
        steps: to train, by default those of the recipe's epochs.
        saves: whether checkpoints are written.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_dir: RunFolder | Path | str,
        *,
        data: tuple[Images, Images | None] | None = None,
        progress: bool = True,
        steps: int | None = None,
        saves: bool = True,
    ):
        self.recipe = recipe
        self.gallery, test = data or rank_0_first(lambda: load_data(recipe, progress=progress))
        self.test = self.gallery if test is None else test
        #: why there is no kNN; nothing if there is
        self.unlabelled = unlabelled(self.gallery, test)
        if self.unlabelled:
            log.warning("kNN is left out: %s", self.unlabelled)
        else:
            recipe.knn.check(self.gallery, self.test, "knn")
            recipe.watch.check(self.gallery, self.test, "watch")
        self._judged_on: dict[KNNConfig, list[Any]] = {}
        self.train = subset(self.gallery, recipe.samples, "samples")
        self.views = Views(recipe.views.configs)
        self.eval_view = EvalView(**asdict(recipe.eval_view))
        folder = run_dir.path if isinstance(run_dir, RunFolder) else Path(run_dir)
        _refuse_other_epochs(recipe, folder, len(self.train))
        self.method = build_method(recipe)
        if recipe.init and not checkpoints.paths(folder / "checkpoints"):
            start_from(recipe, self.method)
        self.network = self.method.network
        self.precision = PRECISIONS[recipe.loop.precision]
        self.trainer = Trainer(
            self.method,
            len(self.train),
            recipe.loop,
            recipe.optim,
            run_dir,
            settings=recipe.training_settings() | {"data": self.train.name},
            kind=Recipe,
            progress=progress,
            steps=steps,
            embed_all=self._embed_all,
            saves=saves,
        )
        self.folder, self.device = self.trainer.run, self.trainer.device
        config = {**plain(recipe), "data": self.train.name}
        on_rank_0(self.folder.write)("config.json", config)

    def __iter__(self) -> Iterator[Progressed]:
        order = self.trainer.order.since(self.trainer.step)
        yield from self.trainer.train(self.train.views(order, self.views, device=self.device))

    def _embed_all(self) -> Tensor:
        """Representations (N, features) of the training images, in their order."""
        return embed(
            self.method.backbone,
            self.train,
            self.eval_view,
            device=self.device,
            precision=self.precision,
            ranks=True,
        )

    def knn(self, config: KNNConfig | None = None) -> dict[str, float]:
        """Weighted kNN accuracy of the backbone as it is now, by default by `recipe.knn`. Raises
        ValueError for data without labels or test split."""
        if self.unlabelled:
            raise ValueError(f"kNN cannot be: {self.unlabelled}")
        config = config or self.recipe.knn
        gallery, queries = self.judged_on(config)
        return knn.evaluate(
            self.method.backbone,
            (gallery, queries),
            replace(config, gallery=None, queries=None),
            view=self.eval_view,
            device=self.device,
            precision=self.precision,
        )

    def judged_on(self, config: KNNConfig) -> list[Any]:
        """The gallery and the queries of a kNN, chosen once: where unreadable images are skipped,
        all are decoded to find them."""
        if config not in self._judged_on:
            self._judged_on[config] = config.choose(self.gallery, self.test, ranks=False)
        return self._judged_on[config]

    @on_rank_0
    def watch(self) -> dict[str, float]:
        """Record what accompanies training, unless it is recorded for this step: kNN
        (`recipe.watch`) and hardness.

        Rank 0 does, while the others wait.
        """
        done = self.trainer.records("gallery")
        if done and done[-1]["step"] == self.trainer.step:
            return done[-1]
        figures: dict[str, Any] = {"gallery": 0}
        if not self.unlabelled:
            with signals.interruptible():  # the checkpoint of this step is there
                figures = self.knn(self.recipe.watch)
        if isinstance(self.recipe.method, IMSVD):
            p1, p2 = self.test_codes()
            figures |= asdict(hardness(p1, self.recipe.method.units))
            corner = {"joint": joint(p1, p2)[:SEEN, :SEEN].half().contiguous()}
            name = f"joints/step-{self.trainer.step:09d}.safetensors"
            self.folder.write(name, safetensors.torch.save(corner))
        self.trainer.record(**figures)
        return figures

    @torch.no_grad()
    def test_codes(self, samples: int | None = None) -> tuple[Tensor, Tensor]:
        """Soft codes p1, p2 (samples, D) of two views of test images (`recipe.look` of them):
        always the same. IMSVD only."""
        if not isinstance(self.recipe.method, IMSVD):
            raise ValueError(
                f"method={self.recipe.method.name!r} has no soft codes: test_codes() needs IMSVD"
            )
        seed = stream_seed(self.recipe.loop.seed, "look", 0)
        generator = torch.Generator(self.device).manual_seed(seed)
        images = self.test.subset(min(samples or self.recipe.look, len(self.test)))
        first, second = self.views.views[:2]
        draws: list[Callable[[Tensor, torch.Generator], Tensor]]
        if isinstance(images, FolderImages):
            draws, plan = [first.finish, second.finish], [(0, torch.arange(len(images)))]
            cropped = images.crops(self.views, plan, seed=self.recipe.loop.seed, device=self.device)
            pictures = next(cropped)
        else:
            draws, pictures = [first, second], (images.images.to(self.device),) * 2
        network, method = self.network, self.recipe.method
        was_training = network.training
        network.eval()
        codes = []
        part = max(64, 500 * 32**2 // self.recipe.views.first.size**2)
        for draw, pixels in zip(draws, pictures, strict=True):
            blocks = pixels.split(part)
            logits = torch.cat([network.embed(draw(block, generator)) for block in blocks])
            codes.append(soft_discretize(logits.float(), method.units, method.temperature).cpu())
        network.train(was_training)
        return codes[0], codes[1]

    @on_rank_0
    def finish(self) -> Path:
        """Export the backbone, evaluate it, and write result.json with provenance; returns its
        path.

        Rank 0 does, while the others wait.
        """
        path, backbone = self.folder.path, self.method.backbone
        file, check = path / "backbone.safetensors", self.folder.check
        save_backbone(file, backbone, self.recipe.network, check=check)
        accuracy: dict[str, Any] = {"knn_left_out": self.unlabelled}
        used: Sequence[Any] = (self.train, None)
        if not self.unlabelled:
            with signals.interruptible():
                accuracy = self.knn()
                used = self.judged_on(self.recipe.knn)
        figures = {
            **accuracy,
            "data": describe(self.recipe.eval_view.size, *used),
            "steps": self.trainer.records(),
            "watched": self.trainer.records("gallery"),
        }
        origin = provenance(
            config=self.recipe,
            seed=self.recipe.loop.seed,
            device=self.device,
            dataset=self.train.title,
            seconds=self.trainer.seconds,
            world_size=self.trainer.order.ranks,
        )
        result = {"name": "pretrain", "figures": figures, "provenance": origin}
        self.folder.write("result.json", result)
        return path / "result.json"


def pretrain(recipe: Recipe, run_dir: Path | str, *, progress: bool = True) -> Path:
    """Train `recipe` to its end, resuming what is in `run_dir`; returns the path of result.json.

    Raises `signals.Stopped`, with a checkpoint saved, after SIGTERM or SIGUSR2 (a cluster's
    notice), or when a rank's launcher is gone; `run_folder.Superseded` when a later attempt has
    taken `run_dir` over.
    """
    with signals.handle_stop_signals(), RunFolder(run_dir).on_rank_0() as folder:
        run = Pretraining(recipe, folder, progress=progress)
        if run.trainer.step % run.trainer.order.steps_per_epoch == 0:
            run.watch()  # untrained, or killed between an epoch's end and its record
        for progressed in run:
            if progressed.ends_epoch:
                run.watch()
        run.trainer.refuse_unfinished()
        return run.finish()


def load_data(recipe: Recipe, *, progress: bool = False) -> tuple[Images, Images | None]:
    """The recipe's data set, (train, test); None for a folder's test split that is not there.
    `progress`: a bar while files are decoded.

    Raises ValueError for the layouts of VOC and COCO."""
    name = recipe.data
    open_split = partial(open_data, name, on_corrupt=recipe.on_corrupt, progress=progress)
    train, test = open_split("train"), None
    if not name.startswith(("tree:", "folder:")) or find_home(find_folder(name), "test"):
        test = open_split("test")
    if isinstance(train, Images) and isinstance(test, Images | None):
        return train, test
    raise ValueError(f"data={name!r} is not made for pretraining: give folder:PATH or tree:PATH")


def start_from(recipe: Recipe, method: TwinMethod) -> None:
    """Load the backbone of `recipe.init` into every backbone of the method, a momentum copy's too.

    Raises ValueError for another network than the recipe's, and what `open_backbone` raises.
    """
    network = recipe.network
    foreign = ForeignConfig(recipe.weights_key)
    if Path(str(recipe.init)).is_file():
        foreign = replace(foreign, stem_padding=network.stem_padding, max_pool=network.max_pool)
    given = open_backbone(str(recipe.init), foreign=foreign)
    theirs, ours = given.recipe.network, (network.backbone, network.cifar_stem)
    if (theirs.backbone, theirs.cifar_stem) != ours:
        flag = "cifar-stem" if theirs.cifar_stem else "no-cifar-stem"
        raise ValueError(
            f"init={str(recipe.init)!r} holds {theirs.backbone} with cifar_stem="
            f"{theirs.cifar_stem}, and the recipe trains {ours[0]} with cifar_stem={ours[1]}: "
            f"pass --network.backbone {theirs.backbone} --network.{flag}, or give other weights"
        )
    for module in method.modules():
        if isinstance(module, ResNet):
            module.load_state_dict(given.backbone.state_dict())


def _refuse_other_epochs(recipe: Recipe, folder: Path, samples: int) -> None:
    """Raise ValueError where a run there is of another number of epochs: its schedule was made for
    them."""
    if not (folder / "config.json").exists() or not checkpoints.paths(folder / "checkpoints"):
        return
    before = from_plain(Recipe, json.loads((folder / "config.json").read_text())).loop.epochs
    epochs, per_epoch = recipe.loop.epochs, samples // recipe.loop.batch_size
    if before == epochs:
        return
    last, steps = before * per_epoch - 1, epochs * per_epoch
    rate = learning_rate(recipe.optim, last, last + 1, per_epoch)
    other = learning_rate(recipe.optim, min(last, steps - 1), steps, per_epoch)
    more = max(1, epochs - before)
    raise ValueError(
        f"run_dir={str(folder)!r} holds a run of loop.epochs={before}, not {epochs}: its "
        f"learning rate ends at {rate:.2g} after epoch {before}, where a run of {epochs} would be "
        f"at {other:.2g}, so that to go on would be neither. For a run of {epochs} epochs give "
        f"another --run-dir; to train its backbone for {more} more, on a schedule that starts "
        f"anew, pass --init {folder} --loop.epochs {more} and another --run-dir"
    )


def build_method(recipe: Recipe) -> TwinMethod:
    """A recipe's method, freshly initialised: fixed by its seed, whatever was drawn before."""
    with _seeded_weights(recipe.loop.seed):
        return recipe.method.build(recipe.network)


def build_network(config: NetworkConfig, seed: int) -> TwinNetwork:
    """A freshly initialised network: the one that `build_method` trains under the same seed."""
    with _seeded_weights(seed):
        return TwinNetwork.build(config)


@contextmanager
def _seeded_weights(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "weights", 0))
        yield
