"""A tiny model with real maths: its bundle, made with onnx.helper alone, and the same model in plain numpy."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from model_export.bundle import (
    Accuracy,
    Calibration,
    GraphSpec,
    InputSpec,
    Macs,
    Manifest,
    OperatingPoint,
    Parity,
    Precision,
    Rule,
    SplitBounds,
    TensorSpec,
    Variant,
    read_bundle,
    sha256_of,
    write_manifest,
)

SIZE = 8
CLASSES = ("apple", "bear", "cloud", "dolphin", "elm", "forest", "girl")
COUNTS = (500, 240, 101, 100, 20, 19, 5)
BOUNDS = SplitBounds(many_above=100, few_below=20)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PATCH, CHANNELS, FEATURES = 2, 4, 5
MACS = {"trunk": 768, "expert": 355, "router": 12}

# An image that has this colour all over makes the trunk give NaN for it, fail for its whole batch, or take long.
NAN_COLOUR, FAILING_COLOUR, SLOW_COLOUR = (255, 0, 255), (255, 255, 0), (0, 255, 255)


def plain(colour: tuple[int, int, int]) -> np.ndarray:
    """An image of one colour, (H, W, 3)."""
    return np.full((SIZE, SIZE, 3), colour, np.uint8)


def noise(count: int, seed: int = 0) -> np.ndarray:
    """Random images, (B, H, W, 3); different ones exit at different experts."""
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Expected:
    """What one image should be answered with; probabilities of all classes, in their order."""

    probabilities: np.ndarray
    experts_used: int
    exit_reason: str
    router_scores: list[float]


class TinyModel:
    """Weights from a seed, and the answer for one image alone, in double precision."""

    def __init__(self, n_experts: int = 3, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        n_pixels, n_features = PATCH * PATCH * 3, CHANNELS * (SIZE // PATCH) ** 2
        self.n_experts = n_experts
        self.trunk_weight = random.normal(0, 0.5, (n_pixels, CHANNELS)).astype(np.float32)
        self.expert_weights = random.normal(0, 0.3, (n_experts, n_features, FEATURES)).astype(np.float32)
        self.class_weights = random.normal(0, 1, (n_experts, FEATURES, len(CLASSES))).astype(np.float32)
        self.router_weights = random.normal(0, 1, (n_experts - 1, FEATURES + len(CLASSES))).astype(np.float32)
        self.router_biases = np.zeros(n_experts - 1, np.float32)
        samples = noise(200, seed=1)
        for router in range(n_experts - 1):  # half of the images below 0.5, half above, well spread
            asked = np.array([self._experts(image)[1][router] for image in samples])
            self.router_weights[router] *= 2 / asked.std()
            self.router_biases[router] = -2 * np.median(asked) / asked.std()

    def answer(self, image: np.ndarray, thresholds: tuple[float, ...], max_experts: int | None = None) -> Expected:
        """Run experts one after another, as the bundle's contract says."""
        logits_sums, asked = self._experts(image)
        scores = [1 / (1 + np.exp(-value)) for value in asked]
        used, reason = self.n_experts, "last"
        for router, score in enumerate(scores):
            if score < thresholds[router] or router + 1 == max_experts:
                used, reason = router + 1, "confident" if score < thresholds[router] else "budget"
                break
        logits = logits_sums[used - 1] / used
        exponentials = np.exp(logits - logits.max())
        return Expected(exponentials / exponentials.sum(), used, reason, scores[:used])

    def _experts(self, image: np.ndarray) -> tuple[list[np.ndarray], list[float]]:
        """The sum of the logits after each expert, and each router's value before its sigmoid."""
        side = SIZE // PATCH
        scaled = (image / 255 - np.array(MEAN)) / np.array(STD)
        patches = scaled.reshape(side, PATCH, side, PATCH, 3).transpose(0, 2, 4, 1, 3).reshape(side, side, -1)
        features = np.maximum(patches @ self.trunk_weight.astype(float), 0).transpose(2, 0, 1).ravel()
        total, sums, asked = np.zeros(len(CLASSES)), [], []
        for expert in range(self.n_experts):
            expert_feature = np.tanh(features @ self.expert_weights[expert].astype(float))
            total = total + expert_feature @ self.class_weights[expert].astype(float)
            sums.append(total)
            if expert < self.n_experts - 1:
                inputs = np.concatenate([expert_feature, total])
                asked.append(float(inputs @ self.router_weights[expert] + self.router_biases[expert]))
        return sums, asked


def write_bundle(
    directory: Path,
    model: TinyModel,
    *,
    slow_turns: int = 20_000,
    losses: Mapping[Precision, float] = MappingProxyType({"fp32": 0.0}),
    **fields: object,
) -> Path:
    """
    Write the bundle of a model.

    Args:
        slow_turns: how long a SLOW_COLOUR image takes, in small matrix products, one after another.
        losses: the variants, by their precision, which is their name too, and the points of accuracy that each is said
            to lose on few; all have the same graphs. More than 0.3 makes a variant unfaithful.
        fields: of the manifest, in place of the usual ones.
    """
    directory.mkdir(parents=True, exist_ok=True)
    experts, routers = range(model.n_experts), range(model.n_experts - 1)
    n_classes, side = len(CLASSES), SIZE // PATCH
    features = TensorSpec("features", "float32", (None, CHANNELS, side, side))
    logits_sum, expert_feature = (
        TensorSpec(name, "float32", (None, size)) for name, size in (("logits_sum", n_classes), ("expert_feature", 5))
    )
    new_logits_sum = TensorSpec("new_logits_sum", "float32", (None, n_classes))
    images, score = TensorSpec("images", "uint8", (None, SIZE, SIZE, 3)), TensorSpec("score", "float32", (None,))
    fp32 = Variant(
        precision="fp32",
        trunk=_save(directory, "trunk.onnx", *_trunk(model, slow_turns), [images], [features]),
        experts=tuple(
            _save(directory, f"expert_{expert}.onnx", *_expert(model, expert), [features, logits_sum],
                  [new_logits_sum, expert_feature])
            for expert in experts
        ),
        routers=tuple(
            _save(directory, f"router_{router}.onnx", *_router(model, router), [expert_feature, logits_sum], [score])
            for router in routers
        ),
        parity=parity(0.0),
    )  # fmt: skip
    variants = {name: replace(fp32, precision=name, parity=parity(loss)) for name, loss in losses.items()}
    usual = {
        "name": "tiny", "version": "7", "classes": CLASSES, "class_counts": COUNTS, "split_bounds": BOUNDS,
        "input": InputSpec(SIZE, SIZE, "crop", "bilinear", MEAN, STD),
        "macs": Macs(MACS["trunk"], (MACS["expert"],) * len(experts), (MACS["router"],) * len(routers)),
        "variants": variants, "default_variant": "fp32", "rule": "router", "thresholds": (0.5,) * len(routers),
        "calibration": Calibration("noise, for tests", 100, operating_points(model.n_experts), risk=None),
        "provenance": {"recipe": {"name": "tiny"}, "seed": 0},
    }  # fmt: skip
    write_manifest(directory, Manifest(**usual | fields))
    return directory


def remove_routers(directory: Path, rule: Rule) -> Path:
    """Make the bundle that of a model without routers, which exits by another rule."""
    manifest = read_bundle(directory).manifest
    variants = {name: replace(variant, routers=()) for name, variant in manifest.variants.items()}
    points = operating_points(manifest.n_experts, rule)
    changed = replace(
        manifest, rule=rule, variants=variants, macs=replace(manifest.macs, routers=()),
        calibration=replace(manifest.calibration, points=points),
    )  # fmt: skip
    for file in directory.glob("router_*.onnx"):
        file.unlink()
    write_manifest(directory, changed)
    return directory


def parity(loss: float) -> Parity:
    """Of a variant that loses so many points of accuracy on few."""
    checkpoint = Accuracy(all=49.5, many=60.0, medium=None, few=30.0)
    return Parity(
        images=100, max_abs_logit_difference=1e-6, top1_agreement=1.0, experts_used_agreement=1.0,
        accuracy=replace(checkpoint, few=30.0 - loss), checkpoint_accuracy=checkpoint,
        mean_experts=1.6, checkpoint_mean_experts=1.6,
    )  # fmt: skip


def operating_points(n_experts: int, rule: Rule = "router") -> tuple[OperatingPoint, ...]:
    """A calibration table: the more experts, the more accurate, but for the first step up, which gains nothing."""
    full = MACS["trunk"] + n_experts * MACS["expert"] + (n_experts - 1) * MACS["router"]
    rows = [(0.0, float(n_experts), 50.0)]
    if n_experts > 1:
        rows = [(1.0, 1.0, 45.0), (0.8, 1.2, 45.0), (0.5, 1.6, 49.5), (0.2, 1.9, 49.8), *rows]
    return tuple(
        OperatingPoint(
            rule=rule,
            thresholds=(threshold,) * (n_experts - 1),
            accuracy=Accuracy(all=accuracy, many=60.0, medium=None, few=30.0),
            mean_experts=mean,
            mean_macs=full * mean / n_experts,
            experts_share=_shares(mean, n_experts),
        )
        for threshold, mean, accuracy in rows
    )


def _shares(mean: float, n_experts: int) -> tuple[float, ...]:
    """So many images with one expert and so many with all that the mean comes out."""
    last = (mean - 1) / (n_experts - 1) if n_experts > 1 else 0.0
    return (1 - last, *(0.0,) * (n_experts - 2), last)[:n_experts]


def _save(directory, file, nodes, constants, inputs, outputs) -> GraphSpec:
    """Write one graph; the batch axis is called N."""
    types = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}

    def described(tensor: TensorSpec) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(tensor.name, types[tensor.dtype], ["N", *tensor.shape[1:]])

    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, file.removesuffix(".onnx"), list(map(described, inputs)),
                              list(map(described, outputs)), weights)  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), directory / file)
    return GraphSpec(file, sha256_of(directory / file), tuple(inputs), tuple(outputs))


def _trunk(model: TinyModel, slow_turns: int):
    """One convolution; and what the marked colours do, which adds exactly 0 to every other image's features."""
    node = helper.make_node
    constants = {
        "white": np.float32(255), "mean": np.array(MEAN, np.float32), "std": np.array(STD, np.float32),
        "weight": model.trunk_weight.T.reshape(CHANNELS, 3, PATCH, PATCH).copy(),
        "pixel_axes": np.array([1, 2, 3]), "column": np.array([-1, 1, 1, 1]), "nought": np.float32(0),
        "row_axis": np.array([0]), "only_row": np.zeros(1, np.float32), "turns": np.int64(slow_turns),
        "always": np.array(True), "square": np.eye(32, dtype=np.float32),
    }  # fmt: skip
    nodes = [
        node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        node("Div", ["pixels", "white"], ["shares"]),
        node("Sub", ["shares", "mean"], ["centred"]),
        node("Div", ["centred", "std"], ["scaled"]),
        node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        node("Conv", ["planes", "weight"], ["convolved"], kernel_shape=[PATCH, PATCH], strides=[PATCH, PATCH]),
        node("Relu", ["convolved"], ["rectified"]),
    ]
    for name, colour in (("nan", NAN_COLOUR), ("failing", FAILING_COLOUR), ("slow", SLOW_COLOUR)):
        constants[f"{name}_colour"] = np.array(colour, np.float32)
        nodes += [
            node("Sub", ["pixels", f"{name}_colour"], [f"{name}_difference"]),
            node("Abs", [f"{name}_difference"], [f"{name}_distances"]),
            node("ReduceSum", [f"{name}_distances", "pixel_axes"], [f"{name}_distance"], keepdims=0),
            node("Equal", [f"{name}_distance", "nought"], [f"is_{name}"]),
        ]
    turn = helper.make_graph(
        [node("MatMul", ["state", "square"], ["next"]), node("Identity", ["go_on"], ["still"])], "turn",
        [helper.make_tensor_value_info("turn", TensorProto.INT64, []),
         helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
         helper.make_tensor_value_info("state", TensorProto.FLOAT, [32, 32])],
        [helper.make_tensor_value_info("still", TensorProto.BOOL, []),
         helper.make_tensor_value_info("next", TensorProto.FLOAT, [32, 32])],
    )  # fmt: skip
    nodes += [
        node("Reciprocal", ["nan_distance"], ["infinite_if_nan"]),
        node("Mul", ["infinite_if_nan", "nought"], ["nan_if_nan"]),
        node("Cast", ["is_failing"], ["failing_row"], to=TensorProto.INT64),  # there is only row 0
        node("Gather", ["only_row", "failing_row"], ["noughts"]),
        node("Cast", ["is_slow"], ["slow_ones"], to=TensorProto.INT64),
        node("ReduceSum", ["slow_ones", "row_axis"], ["slow_rows"], keepdims=0),
        node("Mul", ["slow_rows", "turns"], ["all_turns"]),
        node("Loop", ["all_turns", "always", "square"], ["turned"], body=turn),
        node("ReduceMax", ["turned"], ["one"], keepdims=0),
        node("Mul", ["one", "nought"], ["slow_nought"]),
        node("Sum", ["nan_if_nan", "noughts", "slow_nought"], ["added"]),
        node("Reshape", ["added", "column"], ["added_column"]),
        node("Add", ["rectified", "added_column"], ["features"]),
    ]
    return nodes, constants


def _expert(model: TinyModel, expert: int):
    node = helper.make_node
    constants = {"hidden": model.expert_weights[expert], "classes": model.class_weights[expert]}
    nodes = [
        node("Flatten", ["features"], ["flat"]),
        node("MatMul", ["flat", "hidden"], ["inner"]),
        node("Tanh", ["inner"], ["expert_feature"]),
        node("MatMul", ["expert_feature", "classes"], ["logits"]),
        node("Add", ["logits_sum", "logits"], ["new_logits_sum"]),
    ]
    return nodes, constants


def _router(model: TinyModel, router: int):
    node = helper.make_node
    constants = {
        "weight": model.router_weights[router][:, None], "bias": model.router_biases[router], "flat": np.array([-1])
    }  # fmt: skip
    nodes = [
        node("Concat", ["expert_feature", "logits_sum"], ["both"], axis=1),
        node("MatMul", ["both", "weight"], ["product"]),
        node("Add", ["product", "bias"], ["asked"]),
        node("Sigmoid", ["asked"], ["column"]),
        node("Reshape", ["column", "flat"], ["score"]),
    ]
    return nodes, constants
