"""Whether the graphs on disk say the same as the checkpoint, image by image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnxruntime

from model_export.bundle import BundleError, Graphs, GraphSpec, Parity, Precision, Rule
from model_export.calibrate import accuracy_of, rule_scores
from model_export.half import rounding
from model_export.openvino_core import openvino_core
from training.evaluate import Predictions, count_not_finite, mean_logits, route

MAX_LOGIT_DIFFERENCE = 1e-3
MAX_RELATIVE_DIFFERENCE = 1e-5  # of the largest logit; fp32 rounds what is above 16,384 by more than 1e-3
TIE = 1e-3  # a score closer than this to its threshold may fall either way, as two logits closer than `tolerance`
BATCH = 64

Graph = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


def run_variant(directory: Path, variant: Graphs, images: np.ndarray, n_classes: int) -> Predictions:
    """
    Every expert and router of a variant on every image, on the CPU: bf16 with OpenVINO, all others with onnxruntime,
    fp16 as a GPU rounds it.

    Args:
        images: (N, H, W, 3), uint8.

    Returns:
        As of the checkpoint; `labels` are empty.
    """
    trunk = _open(directory, variant.trunk, variant.precision)
    experts = [_open(directory, expert, variant.precision) for expert in variant.experts]
    routers = [_open(directory, router, variant.precision) for router in variant.routers]
    logits, scores = [], []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        (features,) = trunk({"images": batch})
        sums = [np.zeros((len(batch), n_classes), np.float32)]
        asked = []
        for index, expert in enumerate(experts):
            logits_sum, expert_feature = expert({"features": features, "logits_sum": sums[-1]})
            sums.append(logits_sum)
            if index < len(routers):
                inputs = {"expert_feature": expert_feature, "logits_sum": logits_sum}
                asked.append(routers[index](inputs)[0])
        with np.errstate(invalid="ignore"):  # infinity less infinity; it is for the caller to see
            logits.append(np.diff(np.stack(sums), axis=0))
        scores.append(np.stack(asked) if asked else np.empty((0, len(batch)), np.float32))
    return Predictions(np.concatenate(logits, axis=1), np.concatenate(scores, axis=1), np.empty(0, np.int64))


def compare(
    checkpoint: Predictions, graphs: Predictions, rule: Rule, thresholds: tuple[float, ...],
    class_counts: Sequence[int], name: str,
) -> Parity:  # fmt: skip
    """
    The largest difference of the mean logits after any number of experts, how often answers agree, how right they are.

    Images whose score is closer than 1e-3 to its threshold, or whose two best logits are closer to each other than
    `tolerance`, count as agreeing either way.

    Args:
        checkpoint: with the labels.
        rule, thresholds: of the routing that is compared.
        name: of the variant, for the message.

    Raises:
        BundleError: where a graph gives NaN or infinity.
    """
    if unusable := count_not_finite(graphs):
        raise BundleError(
            f"variant {name}: NaN or infinity for {unusable} of {graphs.expert_logits.shape[1]} images; "
            "nothing was written"
        )
    n_experts, n_images, _ = checkpoint.expert_logits.shape
    difference = 0.0
    for count in range(1, n_experts + 1):
        used = np.full(n_images, count)
        pair = (mean_logits(side.expert_logits, used) for side in (checkpoint, graphs))
        difference = max(difference, float(np.abs(np.subtract(*pair)).max()))

    sides = (checkpoint, graphs)
    scores = [rule_scores(rule, side.expert_logits, side.router_scores) for side in sides]
    by_checkpoint, by_graphs = (route(values, thresholds) for values in scores)  # (N,), experts used
    near, tie = _parted_by_a_hair(scores[0], scores[1], thresholds), tolerance(checkpoint)
    if rule == "agreement":  # whose scores jump where the best class of one expert or of several changes
        sums = np.cumsum(checkpoint.expert_logits, axis=0)
        near |= (_lead(checkpoint.expert_logits) < tie).any(axis=0) | (_lead(sums) < tie).any(axis=0)

    expected, found = (mean_logits(side.expert_logits, by_checkpoint) for side in sides)
    same_top1 = (expected.argmax(axis=1) == found.argmax(axis=1)) | (_lead(expected) < tie)
    before, after = (
        accuracy_of(replace(side, labels=checkpoint.labels), used, class_counts)
        for side, used in zip(sides, (by_checkpoint, by_graphs), strict=True)
    )
    same_experts = (by_checkpoint == by_graphs) | near
    return Parity(
        images=n_images, max_abs_logit_difference=float(f"{difference:.3g}"),
        top1_agreement=float(same_top1.mean()), experts_used_agreement=float(same_experts.mean()),
        accuracy=after, checkpoint_accuracy=before,
        mean_experts=round(float(by_graphs.mean()), 5), checkpoint_mean_experts=round(float(by_checkpoint.mean()), 5),
    )  # fmt: skip


def tolerance(checkpoint: Predictions) -> float:
    """
    How far a logit may be from the checkpoint's: 1e-3, or 1e-5 of the largest where that is more.

    Those of linear classifiers grow to hundreds of thousands where the statistics of batch norms are of a few steps.
    """
    return max(MAX_LOGIT_DIFFERENCE, MAX_RELATIVE_DIFFERENCE * float(np.abs(checkpoint.expert_logits).max()))


def _parted_by_a_hair(scores: np.ndarray, others: np.ndarray, thresholds: tuple[float, ...]) -> np.ndarray:
    """(N,), bool: where the first different decision of the two (E - 1, N) is one that `scores` takes just so."""
    limits = np.asarray(thresholds, np.float64)[:, None]
    differ, close = (scores >= limits) != (others >= limits), np.abs(scores - limits) < TIE
    parted = np.zeros(scores.shape[1], bool)
    for router in reversed(range(len(limits))):
        parted = np.where(differ[router], close[router], parted)
    return parted


def _lead(logits: np.ndarray) -> np.ndarray:
    """How far the best class lies before the second: (..., C) -> (...)."""
    best_two = np.sort(logits, axis=-1)[..., -2:]
    return cast(np.ndarray, best_two[..., 1] - best_two[..., 0])


def require(parity: Parity, name: str, limit: float = MAX_LOGIT_DIFFERENCE) -> None:
    """
    Refuse a variant that is no longer the checkpoint's model.

    Args:
        limit: of the difference of logits; see `tolerance`.

    Raises:
        BundleError: with what differs, and by how much.
    """
    if parity.max_abs_logit_difference > limit:
        raise BundleError(
            f"variant {name}: logits differ from the checkpoint's by up to {parity.max_abs_logit_difference:g} on "
            f"{parity.images} images, the limit is {limit:g}; nothing was written"
        )
    for what in ("top1_agreement", "experts_used_agreement"):
        share = getattr(parity, what)
        if share < 1:
            wrong = round((1 - share) * parity.images)
            raise BundleError(f"variant {name}: {what} fails on {wrong} of {parity.images} images; nothing was written")


def _open(directory: Path, graph: GraphSpec, precision: Precision) -> Graph:
    """A graph as a function of its inputs by name, giving its outputs in their order."""
    file = directory / graph.file
    if precision != "bf16":
        content = rounding(onnx.load(file)).SerializeToString() if precision == "fp16" else file
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        return lambda inputs: cast(list[np.ndarray], session.run(None, inputs))
    compiled = openvino_core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    names = [tensor.name for tensor in graph.outputs]

    def run(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        outputs = compiled(inputs)
        return [outputs[name] for name in names]

    return run
