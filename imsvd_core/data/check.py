"""Are the large data sets, which nobody downloads in passing, in their places and whole? And how to
put them there.

`check` compares a data root with what its publishers say, reads as much of every file as is asked
for, and leaves a stamp in the root, which `checked` finds again. Counts: ImageNet's are of
Russakovsky et al. (2015), Places205's of Zhou et al. (2014), VOC's of its development kit of 2007,
COCO's of its release of 2017.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from rich.progress import Progress

from imsvd_core.data import sources
from imsvd_core.data.decoding import decode as decode_image
from imsvd_core.data.decoding import open_image
from imsvd_core.data.voc import base_of as voc_base
from imsvd_core.data.workers import share_of_cores
from imsvd_core.system.files import atomic_write

Decode = Literal["none", "header", "full"]
STAMP = ".imsvd-checked.json"
LISTS = "ImageSets/Main"  # of VOC
SHOWN = 10  # examples of each problem
UNPACK, PREPARE = "unpack the archives again", "prepare the data root as told below"
JPEG_END, PNG_END = b"\xff\xd9", b"IEND\xaeB`\x82"

IMAGENET_HELP = """\
From ImageNet's site (it asks for registration) put ILSVRC2012_img_train.tar,
ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz into {root};
torchvision unpacks them, val into class folders too:
  python -c 'from torchvision.datasets import ImageNet as I; [
    I("{root}", s) for s in ("train", "val")]'
That gives {root}/train/<wnid>/*.JPEG and {root}/val/<wnid>/*.JPEG."""
PLACES_HELP = """\
From the Places database's site at MIT unpack imagesPlaces205_resize.tar.gz and
trainvalsplit_places205.zip into {root}; then link the images of both lists into class folders:
  cd {root} && python - <<'END'
  import os
  for split in ("train", "val"):
      for line in open(f"trainvalsplit_places205/{{split}}_places205.csv"):
          path = line.split()[0]
          letter, *place, name = path.split("/")
          os.makedirs(home := f"{{split}}/" + "_".join(place), exist_ok=True)
          os.link("data/vision/torralba/deeplearning/images256/" + path, f"{{home}}/{{name}}")
  END
That gives {root}/train/<place>/*.jpg and {root}/val/<place>/*.jpg."""
VOC_HELP = """\
torchvision downloads and unpacks the archives of the VOC challenge's site:
  python -c 'from torchvision.datasets import VOCDetection as V; [
    V("{root}", "2007", s, True) for s in ("trainval", "test")]'
That gives JPEGImages, Annotations and ImageSets in {root}/VOCdevkit/VOC2007,
of both splits together."""
COCO_HELP = """\
From COCO's site unpack train2017.zip, val2017.zip and annotations_trainval2017.zip into {root}.
That gives {root}/train2017/*.jpg, {root}/val2017/*.jpg and
{root}/annotations/instances_*2017.json."""


@dataclass
class Problem:
    """One kind of fault, how often it was met, and what to do about it."""

    what: str
    remedy: str
    count: int = 0
    first: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What was found in a data root."""

    name: str
    root: str
    decode: Decode  # how much of each file was read
    found: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def add(self, kind: str, example: str, remedy: str) -> None:
        """Note one more fault of a kind."""
        same = next((problem for problem in self.problems if problem.what == kind), None)
        if same is None:
            self.problems.append(same := Problem(kind, remedy))
        same.count += 1
        same.first += [example] if same.count <= SHOWN else []

    def expect(self, name: str, number: int, expected: int) -> None:
        """Note a number, and where it is not the expected one a fault."""
        self.found[name] = number
        if number != expected:
            self.add(
                "wrong count",
                f"{name}: {number:,}, expected {expected:,}",
                f"{UNPACK}; of a subset say what it holds (--classes, --counts)",
            )

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {number:,}" for name, number in self.found.items())
        lines = [f"{self.name} in {self.root}: {numbers}"]
        for problem in self.problems:
            rest = f"\n    and {problem.count - SHOWN:,} more" if problem.count > SHOWN else ""
            examples = "\n    ".join(problem.first) + rest
            lines.append(
                f"  {problem.what} ({problem.count:,}):\n    {examples}\n    → {problem.remedy}"
            )
        looked = {
            "none": "files not opened",
            "header": "both ends of every file read",
            "full": "every file decoded",
        }
        return "\n".join(
            [*lines, f"  {'all is well' if self.ok else 'not ready'} ({looked[self.decode]})"]
        )


Track = Callable[
    ..., Iterable
]  # (items, description=...): the items, with a bar that shows how many are done


@dataclass(frozen=True)
class Spec:
    """What a data root must hold. `inspect` notes what is wrong in a report and returns the images'
    paths.
    """

    title: str
    counts: Mapping[str, int]  # images of each split
    classes: int
    help: str
    inspect: Callable[[Path, Spec, Report, Track], list[str]]
    class_name: str = r".+"  # regular expression
    balanced: tuple[str, ...] = ()  # splits in which all classes have equally many images


def _inspect_tree(root: Path, spec: Spec, report: Report, track: Track) -> list[str]:
    """ROOT/<split>/<class>/<image>, the same classes in every split."""
    files: list[str] = []
    classes: dict[str, list[str]] = {}
    for split, expected in spec.counts.items():
        home = root / split
        if not home.is_dir():
            report.add("missing folder", str(home), PREPARE)
            continue
        classes[split] = _class_folders(home, spec, report)
        members = {
            name: [f"{home}/{name}/{file}" for file, _ in sources.scan(home / name)]
            for name in track(classes[split], description=f"listing {split}")
        }
        report.expect(f"{split} classes", len(members), spec.classes)
        report.expect(f"{split} images", sum(map(len, members.values())), expected)
        share, balanced = expected // spec.classes, split in spec.balanced
        for name, images in members.items():
            if not images or (balanced and len(images) != share):
                count = f"{share:,}" if balanced else "some"
                example = f"{home / name}: {len(images):,} images, expected {count}"
                report.add("class of the wrong size", example, UNPACK)
            files += images
    for split, names in classes.items():
        for name in sorted(set().union(*classes.values()) - set(names)):
            remedy = f"{UNPACK}: every split needs every class"
            report.add("missing class", str(root / split / name), remedy)
    return files


def _class_folders(home: Path, spec: Spec, report: Report) -> list[str]:
    """The names of the class folders in `home`, and a problem for everything else."""
    if loose := [entry.name for entry in os.scandir(home) if sources.is_image(entry.name)]:
        example = f"{len(loose):,} in {home}, first {min(loose)}"
        remedy = f"move each into {home}/<class>/, as told below"
        report.add("images outside class folders", example, remedy)
    names = sources.class_names(home)
    classes = [name for name in names if re.fullmatch(spec.class_name, name)]
    for name in names:
        if name not in classes:
            remedy = "move it out of the data root"
            report.add("folder that is no class", str(home / name), remedy)
    return classes


def _inspect_voc(root: Path, spec: Spec, report: Report, track: Track) -> list[str]:
    """JPEGImages, Annotations and ImageSets/Main: lists of each split, and of each class in it."""
    base = voc_base(root)
    stems = {}
    for folder, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml"), (LISTS, "txt")):
        if not (base / folder).is_dir():
            report.add("missing folder", str(base / folder), PREPARE)
        stems[folder] = {path.stem for path in (base / folder).glob(f"*.{suffix}")}
    images, annotations, lists = stems.values()
    classes = {name.removesuffix("_trainval") for name in lists if name.endswith("_trainval")}
    report.expect("classes", len(classes), spec.classes)
    splits: dict[str, set[str]] = {}
    for split, expected in spec.counts.items():
        lines = _lines(base / LISTS / f"{split}.txt", report) if split in lists else []
        members = [stem for stem, *_ in lines]
        report.expect(f"{split} images", len(members), expected)
        for name in sorted(classes):
            _inspect_list(base / LISTS / f"{name}_{split}.txt", members, report)
        splits[split] = set(members)
        for stem in members:
            if stem not in images:
                report.add("missing image", str(base / f"JPEGImages/{stem}.jpg"), UNPACK)
            if stem not in annotations:
                report.add("missing annotation", str(base / f"Annotations/{stem}.xml"), UNPACK)
    for stem in sorted(splits.get("trainval", set()) & splits.get("test", set())):
        example = f"{stem}, in {base / LISTS}/trainval.txt and test.txt"
        report.add("image of both splits", example, UNPACK)
    for stem in sorted(annotations - images):
        report.add("annotation without image", str(base / f"Annotations/{stem}.xml"), UNPACK)
    for stem in track(sorted(annotations), description="annotations"):
        _inspect_annotation(base / f"Annotations/{stem}.xml", classes, report)
    return [str(base / f"JPEGImages/{stem}.jpg") for stem in sorted(images)]


def _inspect_list(file: Path, members: list[str], report: Report) -> None:
    """The list of one class in one split: its members, each with a label."""
    if not file.exists():
        report.add("missing list", str(file), UNPACK)
        return
    lines = _lines(file, report)
    if [stem for stem, *_ in lines] != members:
        report.add("list of other images", str(file), UNPACK)
    if unlabelled := [line for line in lines if line[1:] not in (["-1"], ["0"], ["1"])]:
        line = " ".join(unlabelled[0])
        example = f"{file} says {line!r}: a stem and -1, 0 or 1 belong there"
        report.add("list without labels", example, UNPACK)


def _inspect_annotation(file: Path, classes: set[str], report: Report) -> None:
    """What stands in one image: objects of the known classes."""
    try:
        names = {name.text for name in ElementTree.parse(file).iterfind("object/name")}
    # A folder, an unknown encoding, no XML.
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        report.add("unreadable annotation", f"{file} ({type(error).__name__}: {error})", UNPACK)
        return
    for name in sorted(map(str, names - classes)):
        report.add("unknown class", f"{name} in {file}", UNPACK)


def _lines(file: Path, report: Report) -> list[list[str]]:
    """The words of each line that has any; none, and a problem, where the list cannot be read."""
    try:
        return [line.split() for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        report.add("unreadable list", f"{file} ({type(error).__name__}: {error})", UNPACK)
        return []


def _inspect_coco(root: Path, spec: Spec, report: Report, track: Track) -> list[str]:
    """<split>2017/*.jpg and annotations/instances_<split>2017.json, of the same images."""
    files = []
    for split, expected in spec.counts.items():
        home, listing = root / f"{split}2017", root / f"annotations/instances_{split}2017.json"
        missing = [] if home.is_dir() else [home]
        missing += [] if listing.is_file() else [listing]
        for place in missing:
            report.add("missing folder or file", str(place), PREPARE)
        if missing:
            continue
        names = {file for file, _ in sources.scan(home)}
        files += [f"{home}/{name}" for name in sorted(names)]
        report.expect(f"{split} images", len(names), expected)
        try:
            content = json.loads(listing.read_text())
            listed = {image["id"]: image["file_name"] for image in content["images"]}
            named = {image["file_name"] for image in content["images"]}
            ids = Counter(image["id"] for image in content["images"])
            categories = {category["id"] for category in content["categories"]}
            orphans = [
                box["id"]
                for box in content["annotations"]
                if box["image_id"] not in listed or box["category_id"] not in categories
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            report.add(
                "unreadable annotation", f"{listing} ({type(error).__name__}: {error})", UNPACK
            )
            continue
        report.found[f"{split} objects"] = len(content["annotations"])
        report.expect(f"{split} categories", len(categories), spec.classes)
        for number, times in ids.items():
            if times > 1:
                report.add(
                    "image listed twice",
                    f"{number} is the id of {times} images in {listing}",
                    UNPACK,
                )
        for name in sorted(named - names, key=str):
            report.add("missing image", f"{home / name}, which {listing.name} lists", UNPACK)
        for name in sorted(names - named):
            report.add(
                "image without annotation",
                f"{home / name}, which {listing.name} does not list",
                f"if it was added, move it out of the data root; else {UNPACK}",
            )
        for number in orphans:
            report.add("annotation of nothing known", f"{number} in {listing}", UNPACK)
    return files


SPECS = {
    "imagenet": Spec(
        "ImageNet (ILSVRC 2012)",
        {"train": 1_281_167, "val": 50_000},
        1000,
        IMAGENET_HELP,
        _inspect_tree,
        class_name=r"n\d{8}",
        balanced=("val",),
    ),
    "places205": Spec(
        "Places205",
        {"train": 2_448_873, "val": 20_500},
        205,
        PLACES_HELP,
        _inspect_tree,
        balanced=("val",),
    ),
    "voc07": Spec(
        "PASCAL VOC 2007", {"trainval": 5_011, "test": 4_952}, 20, VOC_HELP, _inspect_voc
    ),
    "coco": Spec("COCO 2017", {"train": 118_287, "val": 5_000}, 80, COCO_HELP, _inspect_coco),
}


def find_spec(name: str) -> Spec:
    """The data set's spec. Raises ValueError for an unknown name."""
    if name not in SPECS:
        raise ValueError(f"data set {name!r} is unknown: choose {', '.join(SPECS)}")
    return SPECS[name]


def how_to(spec: Spec, root: Path | str) -> str:
    return f"How to prepare {spec.title}:\n" + spec.help.format(root=root)


def check(
    name: str,
    root: Path | str,
    *,
    decode: Decode = "header",
    workers: int | None = None,
    spec: Spec | None = None,
    progress: bool = False,
) -> Report:
    """Verify a data root and leave the report in it as a stamp, if it can be written there.

    Args:
        name: one of `SPECS`.
        decode: of every image read nothing, its two ends ("header": finds what is cut short or no
            image), or all ("full": finds what cannot be decoded too). Neither sees a JPEG damaged
            inside: libjpeg fills in grey.
        workers: threads that read; by default as many as cores.
        spec: what to expect of a subset, say; by default what was published.
        progress: show bars.

    Raises ValueError for an unknown name or setting, FileNotFoundError, with how to prepare one,
    for a missing root.
    """
    spec = spec or find_spec(name)
    if decode not in ("none", "header", "full") or (workers is not None and workers < 1):
        raise ValueError(
            f"decode is {decode!r} and workers {workers}: choose none, header or full, and 1 or "
            "more"
        )
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder.\n{how_to(spec, root)}")
    report = Report(name, str(root.resolve()), decode)
    with Progress(disable=not progress, transient=True) as bars:
        files = spec.inspect(root, spec, report, bars.track)
        if decode != "none":
            parts = [files[start : start + 64] for start in range(0, len(files), 64)]
            with ThreadPoolExecutor(workers or share_of_cores()) as pool:
                examined = pool.map(lambda part: list(_examine(part, decode)), parts)
                for faults in bars.track(
                    examined, total=len(parts), description="images, 64 at a time"
                ):
                    for fault in faults:
                        report.add("unreadable image", fault, UNPACK)
    try:
        with atomic_write(root / STAMP) as file:
            file.write(json.dumps(asdict(report), indent=2).encode() + b"\n")
    except OSError:
        pass  # others' data may be read-only; then every launch will have to ask
    return report


def checked(name: str, root: Path | str) -> Report | None:
    """The report that the last `check` of this data set left in the root, or None."""
    try:
        stamp = json.loads((Path(root).expanduser() / STAMP).read_text())
        report = Report(
            **stamp | {"problems": [Problem(**problem) for problem in stamp["problems"]]}
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return report if report.name == name else None


def _examine(files: list[str], decode: Decode) -> Iterator[str]:
    """What is wrong with each of these image files that cannot be read."""
    for file in files:
        try:
            decode_image(file) if decode == "full" else _look_at_both_ends(file)
        except Exception as error:  # a broken file makes Pillow raise nearly anything
            yield f"{file} ({' '.join(str(error.__cause__ or error).split())})"


def _look_at_both_ends(file: str) -> None:
    with open(file, "rb") as content:
        open_image(content)
        content.seek(0)
        end = JPEG_END if content.read(2) == b"\xff\xd8" else PNG_END
        content.seek(-len(end), os.SEEK_END)
        if content.read() != end:  # cut short, or some camera wrote on: read on to tell
            decode_image(file)
