"""
The bundle: the directory that training's export writes and the service reads, and the only thing they share.

`manifest.json` says what the ONNX graphs beside it cannot: classes, sizes, costs, thresholds and where they come from.
Everything is checked on reading and on writing; behind that line it may be trusted.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import tempfile
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
LARGEST_INTEGER = 2**53  # that every reader of JSON can hold
LARGEST_SIDE = 4096  # of the input, pixels
VARIANT_NAME = re.compile(r"[A-Za-z0-9._-]{1,40}")

RISK_CONFIDENCE = 0.95  # of --max-risk, unless told otherwise
MAX_VARIANT_LOSS = 0.3  # percentage points in any split; a variant that loses more is not used unless it is asked for

Split = Literal["many", "medium", "few"]
SPLITS: tuple[Split, ...] = get_args(Split)
Precision = Literal["fp32", "bf16", "fp16", "int8"]
Rule = Literal["router", "confidence", "margin", "agreement", "depth"]


class BundleError(ValueError):
    """A bundle that cannot be trusted: names the file, what was found and what was expected."""


def _fail(where: str, problem: str) -> BundleError:
    return BundleError(f"{MANIFEST}: {where}: {problem}")


@dataclass(frozen=True)
class SplitBounds:
    """Training images per class: more than `many_above` is *many*, fewer than `few_below` is *few*, else *medium*."""

    many_above: int
    few_below: int

    def __post_init__(self) -> None:
        if not 0 <= self.few_below <= self.many_above + 1:
            raise _fail(
                "split_bounds",
                f"few_below is {self.few_below} and many_above is {self.many_above}; "
                "expected 0 <= few_below <= many_above + 1, so that no class is both",
            )


@dataclass(frozen=True)
class InputSpec:
    """
    How an image of any size becomes the trunk's input.

    Attributes:
        fit: "crop" scales the shorter side and takes the centre; "inner_crop" scales it to 8/7 of the input first, as
            256 is of 224; "stretch" ignores the aspect ratio.
        interpolation: the antialiased Pillow filter.
        mean, std: per channel (R, G, B) for pixels in [0, 1]; applied in the trunk's graph, recorded here to be read.
    """

    height: int
    width: int
    fit: Literal["crop", "inner_crop", "stretch"]
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if not (1 <= self.height <= LARGEST_SIDE and 1 <= self.width <= LARGEST_SIDE):
            raise _fail(
                "input",
                f"size is {self.height}x{self.width}; expected at least 1x1 and at most {LARGEST_SIDE}x{LARGEST_SIDE}",
            )
        if min(self.std) <= 0:
            raise _fail("input.std", f"is {list(self.std)}; expected positive numbers")


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates per image of each graph."""

    trunk: int
    experts: tuple[int, ...]
    routers: tuple[int, ...]

    def __post_init__(self) -> None:
        if min((self.trunk, *self.experts, *self.routers)) < 0:
            raise _fail("macs", "holds a negative number; expected counts")


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph; None in the shape is the free batch axis."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX file: its path inside the bundle, its checksum (hexadecimal) and what goes in and out."""

    file: str
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy in percent; None for a split that has no class."""

    all: float
    many: float | None
    medium: float | None
    few: float | None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not 0 <= value <= 100:
                raise _fail(f"accuracy.{name}", f"is {value}; expected a percentage in [0, 100]")


@dataclass(frozen=True)
class Parity:
    """
    How close a variant comes to its checkpoint on held-out images, at the default rule and thresholds.

    Attributes:
        top1_agreement: share of the images, in [0, 1], whose class is the checkpoint's, after as many experts as the
            checkpoint uses.
        experts_used_agreement: share of the images that use as many experts.
        accuracy: of the variant; of the checkpoint it is `checkpoint_accuracy`.
        mean_experts: of the variant; of the checkpoint it is `checkpoint_mean_experts`.
    """

    images: int
    max_abs_logit_difference: float
    top1_agreement: float
    experts_used_agreement: float
    accuracy: Accuracy
    checkpoint_accuracy: Accuracy
    mean_experts: float
    checkpoint_mean_experts: float

    def __post_init__(self) -> None:
        for name in ("top1_agreement", "experts_used_agreement"):
            if not 0 <= getattr(self, name) <= 1:
                raise _fail(f"parity.{name}", f"is {getattr(self, name)}; expected a share in [0, 1]")
        for name, least in (
            ("images", 1), ("max_abs_logit_difference", 0), ("mean_experts", 1), ("checkpoint_mean_experts", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise _fail(f"parity.{name}", f"is {getattr(self, name)}; expected {least} or more")

    @property
    def losses(self) -> dict[str, float]:
        """Percentage points of accuracy lost against the checkpoint: "all", and each split that has classes."""
        before, after = dataclasses.asdict(self.checkpoint_accuracy), dataclasses.asdict(self.accuracy)
        return {
            name: round(before[name] - after[name], 6)  # 30 - 29.7 is more than 0.3 in floating point
            for name in before
            if None not in (before[name], after[name])
        }

    @property
    def largest_loss(self) -> float:
        """Of `losses`."""
        return max(self.losses.values())


@dataclass(frozen=True)
class Graphs:
    """
    The files of one precision of the model: trunk, E experts, E - 1 routers or none.

    Attributes:
        precision: what the graphs are computed in. bf16 has the files of fp32: the runtime rounds (OpenVINO).
        experts: each makes `new_logits_sum` of `logits_sum`, as an ONNX graph's output cannot have an input's name.
        routers: none where the model was trained without; another rule than "router" then decides.
    """

    precision: Precision
    trunk: GraphSpec
    experts: tuple[GraphSpec, ...]
    routers: tuple[GraphSpec, ...]

    @property
    def graphs(self) -> tuple[GraphSpec, ...]:
        """All graphs, in the order in which they run."""
        return (self.trunk, *self.experts, *self.routers)


@dataclass(frozen=True)
class Variant(Graphs):
    """Graphs, and how close they come to the checkpoint."""

    parity: Parity

    @property
    def faithful(self) -> bool:
        """Whether it loses so little in every split that it may be used without being asked for."""
        return self.parity.largest_loss <= MAX_VARIANT_LOSS


@dataclass(frozen=True)
class OperatingPoint:
    """
    What one choice of rule and thresholds gave on held-out images.

    Attributes:
        rule: what the score after an expert is. "router": the learned router's; "confidence": 1 - the highest
            probability; "margin": 1 - the difference of the two highest; "agreement": the share of the experts so far
            whose own best class is not the best class of their mean, 1 after the first; "depth": 0.5.
        thresholds: one per expert but the last; the next expert runs where score >= threshold.
        mean_macs: multiply-accumulates per image, trunk, experts and routers together.
        experts_share: share of images that 1, 2, ... E experts answered.
    """

    rule: Rule
    thresholds: tuple[float, ...]
    accuracy: Accuracy
    mean_experts: float
    mean_macs: float
    experts_share: tuple[float, ...]


@dataclass(frozen=True)
class Risk:
    """
    A bound on what early exit loses against running all experts, on images that did not help to choose the thresholds.

    Attributes:
        max_risk: percentage points of accuracy that may be lost at most.
        confidence: probability with which the bound holds, in (0, 1).
        images: held-out images that the bound was tested on.
        loss: percentage points lost on them; negative where early exit was better.
        upper_bound: on `loss`, at that confidence; at most `max_risk`.
        loss_by_split: many, medium, few, on the same images.
        variants: the bound of each variant, against all experts of the checkpoint; where it is above `max_risk`, the
            variant is not used unless it is asked for.
    """

    max_risk: float
    confidence: float
    images: int
    loss: float
    upper_bound: float
    loss_by_split: Mapping[str, float | None]
    variants: Mapping[str, float]

    def __post_init__(self) -> None:
        if not 0 <= self.max_risk <= 100:
            raise _fail("calibration.risk.max_risk", f"is {self.max_risk}; expected percentage points in [0, 100]")
        if not 0 < self.confidence < 1:
            raise _fail("calibration.risk.confidence", f"is {self.confidence}; expected a probability in (0, 1)")
        if self.images < 1:
            raise _fail("calibration.risk.images", f"is {self.images}; expected 1 or more")
        if self.upper_bound > self.max_risk:
            raise _fail("calibration.risk.upper_bound", f"is {self.upper_bound}; expected at most {self.max_risk}")
        if set(self.loss_by_split) != set(SPLITS):
            raise _fail("calibration.risk.loss_by_split", f"has {sorted(self.loss_by_split)}; expected {list(SPLITS)}")
        losses = {"loss": self.loss, "upper_bound": self.upper_bound}
        losses |= {f"loss_by_split.{name}": loss for name, loss in self.loss_by_split.items() if loss is not None}
        losses |= {f"variants.{name}": bound for name, bound in self.variants.items()}
        for name, loss in losses.items():
            if not -100 <= loss <= 100:
                raise _fail(f"calibration.risk.{name}", f"is {loss}; expected percentage points in [-100, 100]")


@dataclass(frozen=True)
class Calibration:
    """
    Operating points of one or more rules, all in the order of their mean number of experts.

    Attributes:
        data: which images they were measured on.
        risk: how the default was chosen, where it was by its risk.
    """

    data: str
    images: int
    points: tuple[OperatingPoint, ...]
    risk: Risk | None

    def of(self, rule: Rule) -> list[OperatingPoint]:
        """The points of one rule, the thriftiest first."""
        return [point for point in self.points if point.rule == rule]

    def most_accurate(self, rule: Rule, max_mean_experts: float) -> OperatingPoint | None:
        """Of a rule's points with at most so many experts per image; None where even the thriftiest needs more."""
        affordable = [point for point in self.of(rule) if point.mean_experts <= max_mean_experts]
        return max(affordable, key=lambda point: (point.accuracy.all, -point.mean_macs), default=None)

    def cheapest(self, rule: Rule, max_accuracy_loss: float) -> OperatingPoint:
        """
        Of a rule's points whose accuracy over all classes is within so many percentage points of all experts'.

        Raises:
            ValueError: where the rule has no points.
        """
        points = self.of(rule)
        full = max(points, key=lambda point: (point.mean_experts, point.accuracy.all))
        losses = [round(full.accuracy.all - point.accuracy.all, 6) for point in points]  # 54.6 - 0.3 is more than 54.3
        good = [point for point, loss in zip(points, losses, strict=True) if loss <= max_accuracy_loss]
        return min(good, key=lambda point: (point.mean_macs, -point.accuracy.all))


@dataclass(frozen=True)
class Manifest:
    """
    What a bundle says about itself that its graphs cannot. C classes, E experts.

    Attributes:
        classes: C names, in the order of the logits.
        class_counts: C numbers of training images, same order.
        variants: by their names, of up to 40 letters, digits, ".", "_" and "-"; one named fp32 is computed in fp32.
        rule, thresholds: the default operating point; E - 1 thresholds in [0, 1].
        provenance: recipe, seed, commit, data and test figures, for people to read.
    """

    name: str
    version: str
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    split_bounds: SplitBounds
    input: InputSpec
    macs: Macs
    variants: Mapping[str, Variant]
    default_variant: str
    rule: Rule
    thresholds: tuple[float, ...]
    calibration: Calibration
    provenance: Mapping[str, Any]
    schema_version: int = SCHEMA_VERSION

    @property
    def n_experts(self) -> int:
        """E, the number of experts."""
        return len(self.macs.experts)

    @property
    def splits(self) -> tuple[Split, ...]:
        """The split of each class, in the order of the logits."""
        return tuple(split_of(count, self.split_bounds) for count in self.class_counts)

    @property
    def default_point(self) -> OperatingPoint | None:
        """What calibration measured at the default rule and thresholds; None where it did not."""
        points = (point for point in self.calibration.of(self.rule) if point.thresholds == self.thresholds)
        return next(points, None)

    def may_serve(self, variant: str) -> bool:
        """Whether a variant loses so little that it may be used without being asked for."""
        risk = self.calibration.risk
        return self.variants[variant].faithful and (risk is None or risk.variants.get(variant, 0.0) <= risk.max_risk)

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise _fail("schema_version", f"is {self.schema_version}; this release reads {SCHEMA_VERSION}")
        if not self.name or not self.version:
            raise _fail("name, version", f"are {self.name!r} and {self.version!r}; expected both to be filled in")
        self._check_classes()
        self._check_experts()
        self._check_variant_names()
        self._check_calibration()
        if self.default_variant not in self.variants:
            raise _fail("default_variant", f"is {self.default_variant!r}; the variants are {sorted(self.variants)}")
        default = self.variants[self.default_variant]
        if not default.faithful:
            raise _fail(
                "default_variant",
                f"is {self.default_variant!r}, which loses {default.parity.largest_loss:.2f} points in a split; "
                f"expected one that loses at most {MAX_VARIANT_LOSS}",
            )
        for name, variant in self.variants.items():
            self._check_graphs(f"variants.{name}", variant)

    def _check_classes(self) -> None:
        if not self.classes:
            raise _fail("classes", "is empty; expected at least one name")
        if len(self.class_counts) != len(self.classes):
            raise _fail("class_counts", f"has {len(self.class_counts)} entries for {len(self.classes)} classes")
        seen: set[str] = set()
        for index, name in enumerate(self.classes):
            if not name or name in seen:
                raise _fail(f"classes[{index}]", f"is {name!r}; expected a name that no other class has")
            seen.add(name)
        if min(self.class_counts) < 0:
            raise _fail("class_counts", f"holds {min(self.class_counts)}; expected counts")

    def _check_experts(self) -> None:
        n_experts = self.n_experts
        if n_experts < 1:
            raise _fail("macs.experts", "is empty; expected at least one expert")
        if self.macs.routers:
            _check_length("macs.routers", self.macs.routers, n_experts - 1, "one for each expert but the last")
        _check_thresholds("thresholds", self.thresholds, n_experts)

    def _check_variant_names(self) -> None:
        for name, variant in self.variants.items():
            if not VARIANT_NAME.fullmatch(name):
                raise _fail("variants", f"has {_shown(name)}; expected 1 to 40 letters, digits, '.', '_' and '-'")
            if name == "fp32" and variant.precision != "fp32":
                raise _fail("variants.fp32.precision", f"is {variant.precision!r}; expected 'fp32', as its name says")

    def _check_calibration(self) -> None:
        n_experts, points, risk = self.n_experts, self.calibration.points, self.calibration.risk
        if self.calibration.images < 1:
            raise _fail("calibration.images", f"is {self.calibration.images}; expected 1 or more")
        for index, point in enumerate(points):
            where = f"calibration.points[{index}]"
            _check_thresholds(f"{where}.thresholds", point.thresholds, n_experts)
            _check_length(f"{where}.experts_share", point.experts_share, n_experts, "one for each expert")
            if not 1 <= point.mean_experts <= n_experts:
                raise _fail(f"{where}.mean_experts", f"is {point.mean_experts}; expected 1 to {n_experts}")
            if min(point.experts_share) < 0 or abs(sum(point.experts_share) - 1) > 1e-3:
                raise _fail(
                    f"{where}.experts_share", f"is {list(point.experts_share)}; expected shares that add up to 1"
                )
            mean = sum(count * share for count, share in enumerate(point.experts_share, 1))
            if abs(mean - point.mean_experts) > 1e-3:
                raise _fail(f"{where}.mean_experts", f"is {point.mean_experts}; the shares make it {mean:.4g}")
            if point.mean_macs <= 0:
                raise _fail(f"{where}.mean_macs", f"is {point.mean_macs}; expected more than 0")
        if n_experts > 1 and not self.macs.routers and "router" in (self.rule, *(point.rule for point in points)):
            raise _fail("macs.routers", "is empty, so that the rule 'router' has nothing to ask; expected another rule")
        complete = {point.rule for point in points if max(point.thresholds, default=0.0) == 0}
        for rule in (self.rule, *(point.rule for point in points)):
            if rule not in complete:
                raise _fail(
                    "calibration.points",
                    f"has no point of the rule {rule!r} whose thresholds are all 0, where every expert runs",
                )
        means = [point.mean_experts for point in points]
        if means != sorted(means):
            raise _fail("calibration.points", "is not in the order of mean_experts; expected it to ascend")
        if risk is not None and (strange := risk.variants.keys() - self.variants):
            problem = f"has {_shown(min(strange))}; the variants are {sorted(self.variants)}"
            raise _fail("calibration.risk.variants", problem)

    def _check_graphs(self, where: str, variant: Variant) -> None:
        n_experts, n_classes = self.n_experts, len(self.classes)
        _check_length(f"{where}.experts", variant.experts, n_experts, "as many as macs.experts")
        _check_length(f"{where}.routers", variant.routers, len(self.macs.routers), "as many as macs.routers")
        logits = (None, n_classes)
        _check_tensors(
            f"{where}.trunk",
            variant.trunk,
            inputs={"images": ("uint8", (None, self.input.height, self.input.width, 3))},
            outputs={"features": (None, None)},
        )
        features = variant.trunk.outputs[0]
        for index, expert in enumerate(variant.experts):
            _check_tensors(
                f"{where}.experts[{index}]",
                expert,
                inputs={"features": (features.dtype, features.shape), "logits_sum": ("float32", logits)},
                outputs={"new_logits_sum": ("float32", logits), "expert_feature": (None, None)},
            )
        for index, router in enumerate(variant.routers):
            expert_feature = variant.experts[index].outputs[1]
            _check_tensors(
                f"{where}.routers[{index}]",
                router,
                inputs={
                    "expert_feature": (expert_feature.dtype, expert_feature.shape),
                    "logits_sum": ("float32", logits),
                },
                outputs={"score": ("float32", (None,))},
            )


@dataclass(frozen=True)
class Bundle:
    """A checked bundle on disk: each graph of its manifest is there, inside the directory, with the right checksum."""

    path: Path
    manifest: Manifest

    def graph_path(self, graph: GraphSpec) -> Path:
        """Where a graph's file lies."""
        return self.path / graph.file

    def read_graph(self, graph: GraphSpec) -> bytes:
        """
        What is in a graph's file, which may have been replaced since the manifest was read.

        Raises:
            BundleError: where it was, or is gone.
        """
        try:
            content = self.graph_path(graph).read_bytes()
        except OSError as error:
            raise BundleError(f"{graph.file}: cannot be read any more ({error.strerror}); start anew") from error
        if hashlib.sha256(content).hexdigest() != graph.sha256:
            raise BundleError(f"{graph.file}: is another file than {MANIFEST} was read with; start anew")
        return content


def split_of(count: int, bounds: SplitBounds) -> Split:
    """The split of a class with `count` training images."""
    if count > bounds.many_above:
        return "many"
    return "few" if count < bounds.few_below else "medium"


def sha256_of(path: Path) -> str:
    """Checksum of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bundle(path: Path | str) -> Bundle:
    """
    Read a bundle's manifest and check it and the graphs it names.

    Raises:
        BundleError: for anything that is missing, unknown, inconsistent or damaged.
    """
    directory = Path(path)
    try:
        if not (directory / MANIFEST).is_file():  # a pipe would be waited for
            raise BundleError(
                f"{directory}: no {MANIFEST} there; expected a bundle, the directory that ride-export writes"
            )
        text = (directory / MANIFEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{directory / MANIFEST}: cannot be read ({error})") from error
    try:
        document = json.loads(text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_object)
        json.dumps(document, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, yet nothing to be sent on
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{directory / MANIFEST}: is not JSON ({error})") from error
    found = document.get("schema_version") if isinstance(document, dict) else None
    if type(found) is int and found != SCHEMA_VERSION:
        raise _fail("schema_version", f"is {found}; this release reads {SCHEMA_VERSION}")
    bundle = Bundle(directory, _build(Manifest, document, ""))
    _check_files(directory, bundle.manifest)
    return bundle


def write_manifest(path: Path | str, manifest: Manifest) -> None:
    """
    Write a manifest into the bundle's directory `path`: the same bytes for the same manifest, and all of them or none.

    Raises:
        BundleError: for what `read_bundle` would refuse, the graphs' files included.
    """
    directory = Path(path)
    document = dataclasses.asdict(manifest)
    try:
        text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        content = text.encode()
    except (TypeError, ValueError) as error:
        raise BundleError(f"{MANIFEST}: cannot be written as JSON ({error})") from error
    _build(Manifest, json.loads(text), "")
    _check_files(directory, manifest)
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{MANIFEST}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, directory / MANIFEST)
    except BaseException:
        os.unlink(temporary)
        raise


def _check_files(directory: Path, manifest: Manifest) -> None:
    for variant in manifest.variants.values():
        for graph in variant.graphs:
            try:
                _check_file(directory, graph)
            except OSError as error:
                raise BundleError(f"{graph.file[:200]}: cannot be read ({error.strerror})") from error


def _check_file(directory: Path, graph: GraphSpec) -> None:
    """A graph's file is inside the bundle, links resolved, and is the one the manifest was written for."""
    relative = Path(graph.file)
    if relative.is_absolute() or ".." in relative.parts or "\\" in graph.file:
        raise BundleError(f"{MANIFEST}: file {graph.file!r} leaves the bundle; expected a path inside it")
    path = directory / relative
    if not path.is_file():
        raise BundleError(f"{graph.file}: is missing; {MANIFEST} lists it")
    if not path.resolve().is_relative_to(directory.resolve()):
        raise BundleError(f"{graph.file}: is a link out of the bundle, to {path.resolve()}; expected a file inside it")
    found = sha256_of(path)
    if found != graph.sha256:
        raise BundleError(f"{graph.file}: has sha256 {found}, {MANIFEST} lists {graph.sha256}; was it copied whole?")


def _check_length(where: str, values: Sequence[object], expected: int, why: str) -> None:
    if len(values) != expected:
        raise _fail(where, f"has {len(values)} entries; expected {expected}, {why}")


def _check_thresholds(where: str, thresholds: tuple[float, ...], n_experts: int) -> None:
    _check_length(where, thresholds, n_experts - 1, "one for each expert but the last")
    if any(not 0 <= threshold <= 1 for threshold in thresholds):
        raise _fail(where, f"is {list(thresholds)}; expected values in [0, 1]")


_Expected = Mapping[str, tuple[str | None, tuple[int | None, ...] | None]]  # name -> dtype, shape; None: any


def _check_tensors(where: str, graph: GraphSpec, inputs: _Expected, outputs: _Expected) -> None:
    """A graph's tensors have these names, in this order, with these types and shapes, the batch axis first and free."""
    for kind, found, expected in (("inputs", graph.inputs, inputs), ("outputs", graph.outputs, outputs)):
        names = [tensor.name for tensor in found]
        if names != list(expected):
            raise _fail(f"{where}.{kind}", f"are {names}; expected {list(expected)}")
        for tensor, (dtype, shape) in zip(found, expected.values(), strict=True):
            at = f"{where}.{kind}: {graph.file}: {tensor.name!r}"
            if tensor.dtype != dtype and (dtype or tensor.dtype not in ("float32", "float16")):
                raise _fail(at, f"is {tensor.dtype}; expected {dtype or 'float32 or float16'}")
            if shape is not None and tensor.shape != shape:
                raise _fail(at, f"has shape {list(tensor.shape)}; expected {list(shape)}")
            if len(tensor.shape) < 1 or tensor.shape[0] is not None or None in tensor.shape[1:]:
                raise _fail(at, f"has shape {list(tensor.shape)}; expected the first axis, and it alone, to be free")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # NaN and Infinity are Python's own addition to JSON; 1e999 is JSON
        raise ValueError(f"{text} is not a finite number")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:  # which of them counts, readers of JSON do not agree on
            raise ValueError(f"the key {_shown(key)} is there twice")
        found[key] = value
    return found


def _build(kind: Any, value: Any, where: str) -> Any:
    """Turn JSON into `kind` (a dataclass, tuple, mapping or plain type), refusing whatever does not fit it exactly."""
    origin = get_origin(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    if origin in (Union, types.UnionType):
        inner = next(option for option in get_args(kind) if option is not types.NoneType)
        return None if value is None else _build(inner, value, where)
    if origin is Literal:
        if value not in get_args(kind):
            raise _fail(where, f"is {value!r}; expected one of {list(get_args(kind))}")
        return value
    if origin is tuple:
        items = get_args(kind)
        if not isinstance(value, list):
            raise _fail(where, f"is {_shown(value)}; expected a list")
        if items[-1] is not Ellipsis and len(value) != len(items):
            raise _fail(where, f"has {len(value)} entries; expected {len(items)}")
        return tuple(_build(items[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _fail(where, f"is {_shown(value)}; expected an object")
        return {key: _build(get_args(kind)[1], item, f"{where}.{key}") for key, item in value.items()}
    return _build_plain(kind, value, where)


def _build_plain(kind: type, value: Any, where: str) -> Any:
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or isinstance(value, bool):
        raise _fail(where, f"is {_shown(value)}; expected {kind.__name__}")
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise _fail(where, f"is {_shown(value)}; expected at most {LARGEST_INTEGER}, in size")
    return kind(value)


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _fail(where or "the document", f"is {_shown(value)}; expected an object")
    hints = get_type_hints(kind)
    for problem, keys in (("is missing", hints.keys() - value), ("is not known", value.keys() - hints)):
        if keys:
            raise _fail(f"{where}.{min(keys)}".lstrip("."), f"{problem}; expected the keys {sorted(hints)}")
    return kind(**{key: _build(hint, value[key], f"{where}.{key}".lstrip(".")) for key, hint in hints.items()})


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
