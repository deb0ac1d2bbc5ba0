"""Are the large data sets, which nobody downloads in passing, in their places and whole? And how to
put them there.

`check` compares a data root with what its publishers say, reads as much of every file as is asked
for, and leaves a stamp in the root, which `checked` finds again. Counts: ImageNet's are of
Russakovsky et al. (2015), Places205's of Zhou et al. (2014), VOC's of its development kit of 2007,
COCO's of its release of 2017.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args
from xml.etree import ElementTree

from imsvd_core.data import sources, voc
from imsvd_core.data.decoding import JPEG_START, open_image
from imsvd_core.data.decoding import decode as decode_image
from imsvd_core.data.tree import open_folder
from imsvd_core.data.workers import in_threads
from imsvd_core.system.files import atomic_write

Decode = Literal["none", "header", "full"]
STAMP = ".imsvd-checked.json"
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

TREE_HELP = """\
Put the images into {root}/train/<class>/ and {root}/test/<class>/ (or val),
or, for pretraining alone, into {root} or {root}/train."""


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
    remedy: str = UNPACK  # unless a fault has its own

    @property
    def ok(self) -> bool:
        return not self.problems

    def add(self, kind: str, examples: Iterable[str], remedy: str = "") -> None:
        """Note faults of one kind; none where there is no example."""
        for example in examples:
            problem = next((problem for problem in self.problems if problem.what == kind), None)
            if problem is None:
                problem = Problem(kind, remedy or self.remedy)
                self.problems.append(problem)
            problem.count += 1
            if problem.count <= SHOWN:
                problem.first.append(example)

    def expect(self, name: str, number: int, expected: int | None) -> None:
        """Note a number, and where it is not the expected one, if any is, a fault."""
        self.found[name] = number
        if expected is not None and number != expected:
            example = f"{name}: {number:,}, expected {expected:,}"
            remedy = f"{UNPACK}; of a subset say what it holds (--classes, --counts)"
            self.add("wrong count", [example], remedy)

    def pass_over(self, split: str, reasons: Iterable[tuple[str, int]]) -> None:
        """Note what a reader leaves out of a split, which is no fault."""
        for reason, count in reasons:
            self.found[f"{split} passed over: {reason}"] = count

    @contextmanager
    def reading(self, kind: str, file: Path) -> Iterator[None]:
        """Note as a fault what stops the reading of a file."""
        try:
            yield
        # A missing file, a folder, another content, an unknown encoding, no XML.
        except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
            self.add(kind, [f"{file} ({type(error).__name__}: {error})"])

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {number:,}" for name, number in self.found.items())
        lines = [f"{self.name} in {self.root}: {numbers}"]
        for problem in self.problems:
            lines.append(f"  {problem.what} ({problem.count:,}):")
            lines += [f"    {example}" for example in problem.first]
            if problem.count > SHOWN:
                lines.append(f"    and {problem.count - SHOWN:,} more")
            lines.append(f"    → {problem.remedy}")
        state = "all is well" if self.ok else "not ready"
        return "\n".join([*lines, f"  {state} (read of every file: {self.decode})"])


@dataclass(frozen=True)
class Spec:
    """What a data root must hold. `inspect` notes what is wrong in a report and returns the images'
    paths.
    """

    title: str
    counts: Mapping[str, int | None]  # images of each split, if published
    classes: int | None
    help: str
    inspect: Callable[[Path, "Spec", Report], list[str]]
    class_name: str = r".+"  # regular expression
    remedy: str = UNPACK


def _inspect_tree(root: Path, spec: Spec, report: Report) -> list[str]:
    """ROOT/<split>/<class>/<image>, the same classes in every split, in val of equal size."""
    trees: dict[str, dict[str, list[str]]] = {}
    for split, expected in spec.counts.items():
        home, share = root / split, (expected or 0) // (spec.classes or 1)
        if not home.is_dir():
            report.add("missing folder", [str(home)], PREPARE)
            continue
        loose = (f"{home}/{name}" for name in sorted(os.listdir(home)) if sources.is_image(name))
        remedy = f"move it into {home}/<class>/, as told below"
        report.add("image outside class folders", loose, remedy)
        names = sources.class_names(home)
        strange = [name for name in names if not re.fullmatch(spec.class_name, name)]
        remedy = "move it out of the data root"
        report.add("folder that is no class", (f"{home}/{name}" for name in strange), remedy)
        tree = trees[split] = {
            name: [f"{home}/{name}/{file}" for file in sources.scan(home / name)]
            for name in names
            if name not in strange
        }
        report.expect(f"{split} classes", len(tree), spec.classes)
        report.expect(f"{split} images", sum(map(len, tree.values())), expected)
        unequal = (
            f"{home}/{name}: {len(files):,} images, expected {share:,}"
            for name, files in tree.items()
            if not files or (split == "val" and len(files) != share)
        )
        report.add("class of the wrong size", unequal)
    classes = set().union(*trees.values())
    for split, tree in trees.items():
        missing = (f"{root}/{split}/{name}" for name in sorted(classes - tree.keys()))
        report.add("missing class", missing, f"{UNPACK}: every split needs every class")
    return [file for tree in trees.values() for files in tree.values() for file in files]


def _inspect_voc(root: Path, spec: Spec, report: Report) -> list[str]:
    """JPEGImages, Annotations and ImageSets/Main: a list of each class in each split."""
    base = voc.base_of(root)
    published = spec.classes is not None  # one's own need no annotations beside the lists
    if published and not (base / "Annotations").is_dir():
        report.add("missing folder", [f"{base}/Annotations"], PREPARE)
    images = {path.stem for path in base.glob("JPEGImages/*.jpg")}
    annotations = {path.stem for path in base.glob("Annotations/*.xml")}
    classes: set[str] = set()
    splits: list[set[str]] = []
    for split, name in voc.LISTS.items():
        with report.reading("unusable lists", base / "ImageSets/Main"):
            data = voc.open_voc(f"voc:{root.absolute()}", split)
            report.expect(f"{name} classes", len(data.classes), spec.classes)
            report.expect(f"{name} images", len(data), spec.counts[name])
            classes.update(data.classes)
            splits.append(set(data.stems))
            lacking = int((~(data.labels == 1).any(0)).sum())
            report.pass_over(name, [("classes without a positive", lacking)] if lacking else [])
    listed = set().union(*splits)
    report.add("missing image", sorted(listed - images))
    if published:
        report.add("missing annotation", sorted(listed - annotations))
        report.add("annotation without image", sorted(annotations - images))
    elif unlisted := len(images - listed):
        report.pass_over("images", [("in no list", unlisted)])
    if len(splits) == 2:
        report.add("image of both splits", sorted(splits[0] & splits[1]))
    for stem in sorted(annotations if published else ()):
        file = base / f"Annotations/{stem}.xml"
        with report.reading("unreadable annotation", file):
            names = {name.text for name in ElementTree.parse(file).iterfind("object/name")}
            unknown = sorted(map(str, names - classes))
            report.add("unknown class", (f"{name} in {file}" for name in unknown))
    return [f"{base}/JPEGImages/{stem}.jpg" for stem in sorted(images)]


def _inspect_coco(root: Path, spec: Spec, report: Report) -> list[str]:
    """<split>2017/*.jpg and annotations/instances_<split>2017.json, of the same images."""
    from imsvd_core.data.coco import faults, open_coco, read_listing  # pycocotools is slow

    files = []
    for split, expected in spec.counts.items():
        home, listing = root / f"{split}2017", root / f"annotations/instances_{split}2017.json"
        purpose: sources.Split = "train" if split == "train" else "test"
        if not (home.is_dir() and listing.is_file()):
            report.add("missing folder or file", [f"{home} or {listing}"], PREPARE)
            continue
        names = set(sources.scan(home))
        files += [f"{home}/{name}" for name in sorted(names)]
        report.expect(f"{split} images", len(names), expected)
        with report.reading("unreadable annotation", listing):
            tables = read_listing(listing)
            images, categories = tables["images"], {repr(c.get("id")) for c in tables["categories"]}
            report.found[f"{split} objects"] = len(tables["annotations"])
            report.expect(f"{split} categories", len(categories), spec.classes)
            named = {str(image.get("file_name")) for image in images}
            report.add("missing image", (f"{home}/{name}" for name in sorted(named - names)))
            extra = (f"{home}/{name}" for name in sorted(names - named))
            if expected is None:
                unlisted = len(names - named)
                report.pass_over(split, [("images not listed", unlisted)] if unlisted else [])
            else:
                remedy = f"if it was added, move it out of the data root; else {UNPACK}"
                report.add("image without annotation", extra, remedy)
            wrong = list(faults(tables, purpose))
            for kind, fault in wrong:
                report.add(
                    kind, [f"{fault} in {listing}"], f"correct the listing, or {spec.remedy}"
                )
            if not wrong:
                data = open_coco(f"coco:{root.absolute()}", purpose)
                report.pass_over(split, data.passed_over)
                if purpose == "test":
                    lost = data.lost()
                    missed = -(-100 * len(lost) // len(tables["annotations"]))
                    report.found[f"{split} truth against itself in percent"] = 100 - missed
                    report.add(
                        "object that scoring misses",
                        (f"annotation {name} in {listing}" for name in lost),
                        "give it a mask that covers pixels, or remove it",
                    )
    return files


def _inspect_own(root: Path, spec: Spec, report: Report) -> list[str]:
    """A folder of images as `open_data` reads it, of which only a training split must be there."""
    files = []
    for split in sources.SPLITS:
        if split == "test" and not sources.find_home(root, split):
            report.found["test images"] = 0
            continue
        with report.reading("unusable folder", root):
            data = open_folder(f"tree:{root.absolute()}", split)
            name = split if data.home == root else data.home.name
            report.expect(f"{name} classes", len(data.classes), spec.classes)
            report.expect(f"{name} images", len(data), spec.counts.get(name))
            report.pass_over(name, data.passed_over)
            files += [str(data.file(place)) for place in range(len(data))]
    return files


SPECS = {
    "imagenet": Spec(
        "ImageNet (ILSVRC 2012)",
        {"train": 1_281_167, "val": 50_000},
        1000,
        IMAGENET_HELP,
        _inspect_tree,
        class_name=r"n\d{8}",
    ),
    "places205": Spec(
        "Places205",
        {"train": 2_448_873, "val": 20_500},
        205,
        PLACES_HELP,
        _inspect_tree,
    ),
    "voc07": Spec(
        "PASCAL VOC 2007", {"trainval": 5_011, "test": 4_952}, 20, VOC_HELP, _inspect_voc
    ),
    "coco": Spec("COCO 2017", {"train": 118_287, "val": 5_000}, 80, COCO_HELP, _inspect_coco),
}


CORRECT = "correct or remove it"
TREE = Spec("a folder of images", {}, None, TREE_HELP, _inspect_own, remedy=CORRECT)
SCHEMES = {
    "folder": TREE,
    "tree": TREE,
    "voc": replace(SPECS["voc07"], counts=dict.fromkeys(("trainval", "test")), classes=None),
    "coco": replace(SPECS["coco"], counts=dict.fromkeys(("train", "val")), classes=None),
}
"""Anybody's data, without published counts, by the scheme of what `open_data` takes."""


def find_spec(name: str) -> Spec:
    """The data set's spec; of SCHEME:PATH the scheme's. Raises ValueError for an unknown name."""
    scheme, colon, _ = name.partition(":")
    known = SCHEMES if colon else SPECS
    if scheme not in known:
        names = [*SPECS, *(f"{scheme}:PATH" for scheme in SCHEMES)]
        raise ValueError(f"data set {name!r} is unknown: choose {', '.join(names)}")
    return known[scheme]


def how_to(spec: Spec, root: Path | str) -> str:
    return f"How to prepare {spec.title}:\n" + spec.help.format(root=root)


def check(
    name: str,
    root: Path | str | None = None,
    *,
    decode: Decode = "header",
    workers: int | None = None,
    spec: Spec | None = None,
    progress: bool = False,
) -> Report:
    """Verify a data root and leave the report in it as a stamp, or in the user's cache if it cannot
    be written there.

    Args:
        name: one of `SPECS`, or folder:PATH, tree:PATH, voc:PATH or coco:PATH for anybody's data,
            which are judged as `open_data` will and compared with no published counts.
        root: of SCHEME:PATH it is PATH by default; of others the folder NAME in the data root.
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
    if decode not in get_args(Decode):
        raise ValueError(f"decode is {decode!r}: choose none, header or full")
    root = Path(root or sources.data_root() / name[name.find(":") + 1 :]).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder.\n{how_to(spec, root)}")
    report = Report(name, str(root.resolve()), decode, remedy=spec.remedy)
    files = spec.inspect(root, spec, report)
    if decode != "none":
        faults = in_threads(partial(_fault, decode), files, "images", workers, progress)
        report.add("unreadable image", filter(None, faults))
    if name not in SPECS:  # a stamp is for launches on published data
        return report
    content = json.dumps(asdict(report), indent=2).encode() + b"\n"
    for stamp in (root / STAMP, _own_stamp(name, root)):
        with suppress(OSError):  # others' data may be read-only
            with atomic_write(stamp) as file:
                file.write(content)
            break
    return report


def checked(name: str, root: Path | str) -> Report | None:
    """The report that the last `check` of this data set left in the root or, where that could not
    be written, in the user's cache; None if there is none."""
    root = Path(root).expanduser()
    for place in (_own_stamp(name, root), root / STAMP):
        with suppress(OSError, ValueError, KeyError, TypeError):
            stamp = json.loads(place.read_text())
            stamp["problems"] = [Problem(**problem) for problem in stamp["problems"]]
            report = Report(**stamp)
            if report.name == name:
                return report
    return None


def _own_stamp(name: str, root: Path) -> Path:
    """The file in the user's cache for a root of this path and these contents: its folders' names
    and times, to the depth of classes."""
    home = voc.base_of(root.resolve())
    facts = [f"{name} in {home}"]
    with suppress(OSError):
        for path in sorted((*home.glob("*"), *home.glob("*/*"))):
            if path.name != STAMP:
                facts.append(f"{path} {path.stat().st_mtime_ns}")
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "imsvd" / "checked" / f"{digest}.json"


def _fault(decode: Decode, file: str) -> str | None:
    """What is wrong with an image file, if it cannot be read."""
    try:
        if decode == "full" or not _ends_well(file):
            decode_image(file)
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        return f"{file} ({' '.join(str(error.__cause__ or error).split())})"
    return None


def _ends_well(file: str) -> bool:
    """Whether both ends are an image's; else it is cut short, or some camera wrote on."""
    with open(file, "rb") as content:
        open_image(content)
        content.seek(0)
        end = JPEG_END if content.read(2) == JPEG_START else PNG_END
        content.seek(-len(end), os.SEEK_END)
        return content.read() == end
