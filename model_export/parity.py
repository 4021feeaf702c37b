"""Whether the graphs on disk say the same as the checkpoint, image by image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from model_export.bundle import BundleError, GraphSpec, Parity, Variant
from training.evaluate import Predictions, mean_logits, route

MAX_LOGIT_DIFFERENCE = 1e-3
TIE = 1e-3  # two logits, or a score and its threshold, closer than this may fall either way
BATCH = 64


def run_variant(directory: Path, variant: Variant, images: np.ndarray, n_classes: int) -> Predictions:
    """
    Every expert and router of a variant on every image, with onnxruntime on the CPU.

    Args:
        images: (N, H, W, 3), uint8.

    Returns:
        As of the checkpoint; `labels` are empty.
    """
    trunk, *others = [_open(directory, graph) for graph in variant.graphs]
    experts, routers = others[: len(variant.experts)], others[len(variant.experts) :]
    logits, scores = [], []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        (features,) = trunk.run(None, {"images": batch})
        sums = [np.zeros((len(batch), n_classes), np.float32)]
        asked = []
        for index, expert in enumerate(experts):
            logits_sum, expert_feature = expert.run(None, {"features": features, "logits_sum": sums[-1]})
            sums.append(logits_sum)
            if index < len(routers):
                inputs = {"expert_feature": expert_feature, "logits_sum": logits_sum}
                asked.append(routers[index].run(None, inputs)[0])
        logits.append(np.diff(np.stack(sums), axis=0))
        scores.append(np.stack(asked) if asked else np.empty((0, len(batch)), np.float32))
    return Predictions(np.concatenate(logits, axis=1), np.concatenate(scores, axis=1), np.empty(0, np.int64))


def compare(checkpoint: Predictions, graphs: Predictions, thresholds: tuple[float, ...]) -> Parity:
    """
    The largest difference of the mean logits after any number of experts, and how often the answers agree.

    Images whose two best logits, or router score and threshold, are closer than 1e-3 count as agreeing either way.
    """
    n_experts, n_images, _ = checkpoint.expert_logits.shape
    difference = 0.0
    for count in range(1, n_experts + 1):
        used = np.full(n_images, count)
        pair = (mean_logits(side.expert_logits, used) for side in (checkpoint, graphs))
        difference = max(difference, float(np.abs(np.subtract(*pair)).max()))

    theirs, ours = (route(side.router_scores, thresholds) for side in (checkpoint, graphs))
    near = np.abs(checkpoint.router_scores - np.asarray(thresholds, np.float32)[:, None]) < TIE
    same_experts = (theirs == ours) | near.any(axis=0)

    expected, found = (mean_logits(side.expert_logits, theirs) for side in (checkpoint, graphs))
    best_two = np.sort(expected, axis=1)[:, -2:]
    same_top1 = (expected.argmax(axis=1) == found.argmax(axis=1)) | (best_two[:, 1] - best_two[:, 0] < TIE)
    return Parity(
        images=n_images, max_abs_logit_difference=float(f"{difference:.3g}"),
        top1_agreement=float(same_top1.mean()), experts_used_agreement=float(same_experts.mean()),
    )  # fmt: skip


def require(parity: Parity, name: str) -> None:
    """
    Raises:
        BundleError: where a variant is not the checkpoint's model any more.
    """
    if parity.max_abs_logit_difference > MAX_LOGIT_DIFFERENCE:
        raise BundleError(
            f"variant {name}: logits differ from the checkpoint's by up to {parity.max_abs_logit_difference:g} on "
            f"{parity.images} images, the limit is {MAX_LOGIT_DIFFERENCE:g}; nothing was written"
        )
    for what in ("top1_agreement", "experts_used_agreement"):
        share = getattr(parity, what)
        if share < 1:
            wrong = round((1 - share) * parity.images)
            raise BundleError(f"variant {name}: {what} fails on {wrong} of {parity.images} images; nothing was written")


def _open(directory: Path, graph: GraphSpec) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(directory / graph.file, providers=["CPUExecutionProvider"])
