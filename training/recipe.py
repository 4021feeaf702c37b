"""What a training is: one frozen record, carried whole by every checkpoint."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from training.errors import TrainingError

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Decoding = Literal["auto", "resident", "streamed"]


class RecipeError(TrainingError, ValueError):
    """A recipe field that does not exist, or a value that it cannot take."""


class Range(NamedTuple):
    """The least and the largest value that a field takes; both are allowed."""

    low: float
    high: float


Seed = Annotated[int, Range(0, 2**32 - 1)]
Epochs = Annotated[int, Range(1, 100_000)]
ExtraEpochs = Annotated[int, Range(0, 10_000)]  # of a warm-up or a stage that may be left out
BatchSize = Annotated[int, Range(1, 65_536)]
LearningRate = Annotated[float, Range(1e-9, 100)]
WeightDecay = Annotated[float, Range(0, 1)]
AveragingFactor = Annotated[float, Range(0, 1 - 1e-9)]  # of a geometric series
LossWeight = Annotated[float, Range(0, 1000)]
LogitTau = Annotated[float, Range(-10, 10)]
Scale = Annotated[float, Range(1e-3, 1e3)]  # of logits; a temperature
Share = Annotated[float, Range(0, 1)]


NO_EFFECT_FIELDS = ("evaluate_every", "workers", "decoding")  # `decoding`: what "auto" chose at first stays
# Where images lie, which may change where a digest tells that they are the same.
PLACE_FIELDS = ("data", "image_root")
# Methods whose step does more with a batch than pass it through one network once.
SINGLE_PROCESS_METHODS = ("bbn", "oltr", "lfme", "m2m")


@dataclass(frozen=True)
class Recipe:
    """
    Everything that decides the outcome of a training. Epochs count from 0; shares are of `epochs`.

    Attributes:
        name: of the recipe; names the run directory and the exported model.
        method: "ride", "single", "shike", "sade", "ace", "bbn", "oltr", "lfme" or "m2m" (training/methods).
        loss: of each expert on its own: "ce", "focal", "sigmoid_focal" (a question of its own for each class, as in
            arXiv:1901.05555), "ldam", "balanced_softmax" or "logit_adjusted".
        data: "cifar10", "cifar100", or a directory: with list files such as train.txt, with train*.parquet, or of class
            directories.
        train_list, val_list, test_list: list files below `data`; None: those there, such as train.txt.
        image_root: directory that the paths in list files start from; None: `data`.
        decoding: "resident": all images are decoded once and stay in memory; "streamed": worker processes decode each
            when it is needed; "auto": streamed where all would take more than a quarter of the free memory, and always
            with crop="resized".
        workers: processes that decode; None: one for each processor.
        profile: how the training set is thinned: "exp" or "step" (a subset of a balanced set), "natural" (not).
        imbalance: largest over smallest class size under "exp" and "step".
        n_max: size of the largest class under "exp" and "step"; None: the size of class 0. Under "natural": at most
            so many images of each class count, the set's own test images apart; None: all.
        subset_order: which images a class keeps: "shuffled" by `subset_seed` (LDAM, RIDE) or the "first" in the file
            (SHIKE's public code; no recipe here), where its order says nothing about them.
        subset_seed: of the draw; also of the held-out share of a natural set.
        holdout_per_class: at most so many images per class, of those the subset leaves out, are kept for calibration.
        holdout_share, test_share: of each class of a "natural" set; the latter only where the set has no test images.
        image_size: side of the square network input, pixels.
        mean, std: per channel (R, G, B), pixels in [0, 1]; None: measured on the training images.
        backbone: of training/models/backbones.py: CIFAR ResNets, ResNets, ResNeXts (32x4d), Swin transformers.
        pretrained: weights that trunk and experts start from: "torchvision" for its own or a file with torchvision's
            names (.pth, .safetensors), where widths allow, or the directory of a finished run of the same network; read
            again when a run is resumed; None: fresh ones.
        share_stage3: the experts have the third of four stages in common too (ResNets and ResNeXts).
        drop_path: share of images for which the last Swin block is skipped in training; it grows from 0 at the first.
        n_experts: 1 to 6.
        reduced: 3/4 of the width in the experts, as in RIDE's tables.
        classifier: "cosine" (scale `cosine_scale`, no bias) or "linear" (with bias).
        epochs: of the experts' stage.
        batch_size: images in a step, of all processes and parts together.
        lr: of the experts' stage, where warm-up ends and `schedule` begins.
        features_lr_factor: of the learning rate of all layers but the classifiers to theirs, in that stage; less than 1
            where they are pre-trained.
        weight_decay: of the experts' stage; SGD's is part of the gradient, AdamW's is not.
        warmup_epochs: lr·(1 + e)/warmup_epochs while e < warmup_epochs; half of a stage (or cycle) at most. SHIKE's
            own warm-up, under method "shike", begins at a lower rate.
        warmup_start: share of lr at e = 0, from which it grows evenly to lr at e = warmup_epochs; None: as above.
        schedule: what follows the warm-up: "step", or "cosine" to `lr_min` after the last epoch.
        lr_min: under "cosine", where it ends.
        cycles: under "cosine", how often it falls, over equal numbers of epochs; only the first has the warm-up (SGDR,
            arXiv:1608.03983).
        optimiser: of the experts: "sgd" (`momentum`, `nesterov`) or "adamw" (0.9, 0.999; no decay of biases and norms).
        clip_norm: length to which longer gradients of the experts are scaled down; None: never.
        lr_drops, lr_drop_factor: under "step", lr is multiplied by the factor at each of these shares of `epochs`.
        crop: "padded": random crop of the zero-padded image; "resized": a random part of 8 % of the area or more, at
            random proportions, scaled to the input, as for large images.
        crop_interpolation: of "resized".
        crop_padding: under "padded", pixels of zero padding; 0 turns the crop off.
        flip: left and right change sides, in half of the views.
        rotation: random rotation of up to ± so many degrees; 0 turns it off.
        auto_augment: AutoAugment with its 25 sub-policies for CIFAR-10, after crop, flip and rotation.
        colour_jitter: brightness, contrast and saturation times 1 ± up to so much; 0 turns it off.
        rand_augment: RandAugment of two operations at magnitude 9 of 10, as Swin transformers are trained.
        random_erasing: probability that a rectangle becomes noise.
        mixup, cutmix: α of the share in which the experts see images mixed in pairs; 0 turns it off.
        label_smoothing: part of the experts' labels that is spread evenly over all classes.
        test_fit: of held-out, test and served images: "crop" scales the shorter side to image_size and takes the
            centre; "inner_crop" scales it to 8/7 of that first, as 256 is of 224.
        cutout: side of a square, pixels, that is blackened at a random place, last of all; 0 turns it off.
        max_margin: LDAM margin of the rarest class, in units of the cosine.
        focal_gamma: exponent of the focal losses.
        logit_tau: weight of the log frequencies that "logit_adjusted" adds to the logits; "balanced_softmax" has 1.
        deferred_from: share of `epochs` from which class weights and temperatures apply; None: never.
        effective_beta: β of the effective-number class weights.
        diversity_weight: λ; negative: experts are paid for disagreeing (RIDE); positive: for agreeing (mutual
            distillation); 0 turns the term off.
        diversity_form: "mean": each expert against the mean logits (RIDE's code); "pairwise": every expert against
            every other, with the temperatures of the paper.
        diversity_mean: the diversity is divided by the number of experts (RIDE with Swin transformers), not summed.
        diversity_gamma: γ in (0, 1), how far class temperatures depart from 1.
        collaborative: every expert's loss is computed on the mean logits (ablation).
        expert_taus: under "logit_adjusted", a `logit_tau` for each expert of its own; empty: `logit_tau` for all.
        reversed_tau: τ of SADE's third expert, the weight of the frequencies in reversed order.
        teacher: run directory of a finished training whose mean logits the experts learn from, or several, separated
            by commas, whose mean logits are averaged; empty: none.
        distill_each: every expert learns from the teacher on its own; else the mean of their logits does.
        distill_temperature, distill_weight: of that term.
        loss_times_experts: the whole loss is multiplied by the number of experts, as RIDE's code does when it distils.
        depth_fusion: SHIKE's network: the trunk has two stages, and each expert multiplies the features of its own last
            stage by those of a shallow branch.
        transfer_weight, mutual_weight: of SHIKE's dynamic knowledge transfer, and of its experts' mutual distillation.
        group_shares: ACE's class groups, one for each expert after the first: the share of the classes, by number, that
            it has, the rarest ones; descending. Empty under other methods.
        group_lr_scaling: an expert's learning rate is proportional to the training images of its group.
        group_stop_gradient: only the first expert trains the trunk.
        complementary_weight: of the logits of classes outside an expert's group.
        complementary_form: those logits "squared", summed and averaged over the group's images; or the "length" of all
            of the batch as one vector, divided by the number of such classes.
        group_norm_power: an expert's logits are multiplied by this power of the first expert's mean row length over its
            own; 0 leaves them as they are.
        group_norm_rows: which rows of the classifier that mean is over: those of the expert's "own" group, or "all".
        group_answer: for a class, the mean over the experts whose "group" has it; or over "all", where those whose
            group has not say 0.
        first_stage: a finished run of the recipe of which this one's first stage is the whole: its weights are taken
            and the stage is not trained again; None: it is trained.
        retrain_epochs: of a stage after the experts' in which the classifiers alone change; 0: there is none.
        retrain: what that stage does: "crt" trains fresh classifiers, "lws" one scale for each class's logit; in closed
            form, with retrain_epochs=1, "tau_norm" normalises the weights and "ncm" takes the nearest class mean.
        retrain_loss: of that stage under "crt" and "lws", one of those of `loss`.
        retrain_lr, retrain_sampler: of that stage; after its warm-up it follows the cosine to 0.
        retrain_warmup_epochs, retrain_batch_size, retrain_weight_decay: of that stage, which has SGD; None: as before
            it, but a weight decay of 5e-4 after AdamW.
        tau: exponent of "tau_norm"; None: the best of 0, 0.1 .. 2 on the held-out images.
        ncm_features: of "ncm": as they are ("un"), of unit length ("l2n"), less their mean and of unit length ("cl2n"),
            or what is "best" on the held-out images.
        oltr_epochs, oltr_lr, oltr_weight_decay: of OLTR's second stage; lr drops to a tenth after each third of it.
        oltr_classifier_lr: of its classifier with the memory's selectors; features and centroids have `oltr_lr`.
        oltr_centroid_weight: of the loss that draws features to their class's centroid in the memory.
        oltr_repel_weight, oltr_margin: within that loss, of the term that keeps other centroids at the squared distance
            `oltr_margin`.
        oltr_reach: numerator of an image's reach; the denominator is its distance to the nearest centroid.
        oltr_scale: of the cosine classifier.
        lfme_epochs, lfme_lr, lfme_weight_decay: of each teacher; cosine schedule.
        lfme_batch_size: of the teacher of the many classes; that of the medium ones has half as large batches, that of
            the few ones a quarter.
        lfme_temperature: of the distillation.
        lfme_threshold: share of a teacher's accuracy that the student must reach before its weight falls from 1.
        m2m_from: share of `epochs` from which minority images are generated, on class-balanced batches.
        m2m_beta: a seed image of class k0 is taken for class k with probability 1 − β^(n_k0 − n_k).
        m2m_lambda: weight of the trained network's logit of the seed's class while an image is generated.
        m2m_gamma: probability of its new class that a generated image must reach.
        m2m_steps, m2m_step_size, m2m_noise: gradient steps, their length, and the longest noise that they start from;
            Euclidean lengths over the pixels in [0, 1] of an image.
        router_epochs, router_batch_size, router_lr, router_weight_decay: of the routers' stage, which has SGD.
        router_hidden: size of a router's hidden layer.
        router_top_k: how many of the largest mean logits a router sees; at most the number of classes are used.
        router_shared: the routers share their output layer (RIDE's code); else each has its own.
        router_positive_weight: weight of "another expert would help" in the router's loss.
        seed: of initial weights, order and augmentation.
        precision: "bf16" autocast, "fp16" autocast with loss scaling (on CUDA only), "fp32", or "auto": bf16 where the
            device has bf16 units.
        accumulate: a batch goes through the network in so many parts, each computed again for its gradient, so that
            memory holds one part. The loss sees the whole batch; batch norms see one part at a time.
        ema_decay: d of the average of weights and batch-norm statistics that is evaluated and exported,
            average ← d·average + (1 − d)·weights after every step; None: the last weights.
        compile: use torch.compile.
        evaluate_every: epochs between evaluations on the test images while training; they decide nothing.
    """

    name: str
    method: Literal["ride", "single", "shike", "sade", "ace", "bbn", "oltr", "lfme", "m2m"]
    loss: Literal["ce", "focal", "sigmoid_focal", "ldam", "balanced_softmax", "logit_adjusted"] = "ce"

    # the images
    data: str = "cifar100"
    train_list: str | None = None
    val_list: str | None = None
    test_list: str | None = None
    image_root: str | None = None
    decoding: Decoding = "auto"
    workers: Annotated[int, Range(0, 1024)] | None = None
    profile: Literal["exp", "step", "natural"] = "exp"
    imbalance: Annotated[float, Range(1, math.inf)] = 100.0
    n_max: Annotated[int, Range(1, math.inf)] | None = None
    subset_order: Literal["shuffled", "first"] = "shuffled"
    subset_seed: Seed = 0
    holdout_per_class: Annotated[int, Range(1, math.inf)] = 100
    holdout_share: Annotated[float, Range(0.01, 0.5)] = 0.1
    test_share: Annotated[float, Range(0.01, 0.5)] = 0.1
    image_size: Annotated[int, Range(8, 1024)] = 32
    mean: tuple[float, float, float] | None = CIFAR_MEAN
    std: tuple[float, float, float] | None = CIFAR_STD

    # the network
    backbone: Literal[
        "resnet20_cifar", "resnet32_cifar", "resnet44_cifar", "resnet56_cifar",
        "resnet10", "resnet50", "resnet101", "resnet152", "resnext50", "resnext101", "swin_t", "swin_s",
    ] = "resnet32_cifar"  # fmt: skip
    pretrained: str | None = None
    share_stage3: bool = False
    drop_path: Annotated[float, Range(0, 0.99)] = 0.0
    n_experts: Annotated[int, Range(1, 6)] = 1
    reduced: bool = False
    classifier: Literal["cosine", "linear"] = "cosine"
    cosine_scale: Scale = 30.0

    # the experts' stage: its length, and the optimiser
    epochs: Epochs = 200
    batch_size: BatchSize = 128
    lr: LearningRate = 0.1
    features_lr_factor: Share = 1.0
    momentum: Annotated[float, Range(0, 0.9999)] = 0.9
    nesterov: bool = False
    weight_decay: WeightDecay = 2e-4
    warmup_epochs: ExtraEpochs = 5
    warmup_start: Share | None = None
    schedule: Literal["step", "cosine"] = "step"
    lr_min: Annotated[float, Range(0, 100)] = 0.0
    cycles: Annotated[int, Range(1, 100)] = 1
    optimiser: Literal["sgd", "adamw"] = "sgd"
    clip_norm: Annotated[float, Range(1e-6, 1e6)] | None = None
    lr_drops: tuple[float, ...] = (0.8, 0.9)
    lr_drop_factor: Annotated[float, Range(1e-9, 1)] = 0.01

    # the views of an image
    crop: Literal["padded", "resized"] = "padded"
    crop_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    crop_padding: Annotated[int, Range(0, 256)] = 4
    flip: bool = True
    rotation: Annotated[float, Range(0, 180)] = 0.0
    auto_augment: bool = False
    colour_jitter: Share = 0.0
    rand_augment: bool = False
    random_erasing: Share = 0.0
    mixup: Annotated[float, Range(0, 100)] = 0.0
    cutmix: Annotated[float, Range(0, 100)] = 0.0
    label_smoothing: Annotated[float, Range(0, 0.99)] = 0.0
    test_fit: Literal["crop", "inner_crop"] = "crop"
    cutout: Annotated[int, Range(0, 1024)] = 0

    # losses of an expert
    max_margin: Annotated[float, Range(0, 2)] = 0.5
    focal_gamma: Annotated[float, Range(0, 100)] = 1.0
    logit_tau: LogitTau = 1.0
    deferred_from: Share | None = None
    effective_beta: AveragingFactor = 0.9999

    # what experts have to do with each other
    diversity_weight: Annotated[float, Range(-100, 100)] = 0.0
    diversity_form: Literal["mean", "pairwise"] = "mean"
    diversity_mean: bool = False
    diversity_gamma: Annotated[float, Range(0, 0.999)] = 0.05
    collaborative: bool = False
    expert_taus: tuple[LogitTau, ...] = ()
    reversed_tau: Annotated[float, Range(0, 100)] = 2.0

    # distillation from finished runs
    teacher: str = ""
    distill_each: bool = False
    distill_temperature: Scale = 1.5
    distill_weight: LossWeight = 1.0
    loss_times_experts: bool = False

    # SHIKE
    depth_fusion: bool = False
    transfer_weight: LossWeight = 10.0
    mutual_weight: LossWeight = 1.0

    # ACE
    group_shares: tuple[float, ...] = ()
    group_lr_scaling: bool = True
    group_stop_gradient: bool = True
    complementary_weight: LossWeight = 1.0
    complementary_form: Literal["squared", "length"] = "squared"
    group_norm_power: Annotated[float, Range(-4, 4)] = 1.0
    group_norm_rows: Literal["own", "all"] = "own"
    group_answer: Literal["group", "all"] = "group"

    # classifiers that are trained once more
    retrain_epochs: ExtraEpochs = 0
    retrain_loss: Literal["ce", "focal", "ldam", "balanced_softmax", "logit_adjusted"] = "balanced_softmax"
    retrain_lr: LearningRate = 0.1
    retrain_sampler: Literal["shuffled", "class_balanced", "class_aware"] = "shuffled"
    first_stage: str | None = None
    retrain: Literal["crt", "lws", "tau_norm", "ncm"] = "crt"
    retrain_warmup_epochs: ExtraEpochs | None = None
    retrain_batch_size: BatchSize | None = None
    retrain_weight_decay: WeightDecay | None = None
    tau: Annotated[float, Range(0, 10)] | None = None
    ncm_features: Literal["best", "un", "l2n", "cl2n"] = "best"

    # OLTR
    oltr_epochs: Epochs = 60
    oltr_lr: LearningRate = 0.01
    oltr_classifier_lr: LearningRate = 0.1
    oltr_weight_decay: WeightDecay = 5e-4
    oltr_centroid_weight: Annotated[float, Range(0, 100)] = 0.01
    oltr_repel_weight: Annotated[float, Range(0, 100)] = 0.01
    oltr_margin: Annotated[float, Range(0, 1e6)] = 10.0
    oltr_reach: Annotated[float, Range(1e-6, 1e6)] = 10.0
    oltr_scale: Scale = 16.0

    # LFME
    lfme_epochs: Epochs = 120
    lfme_batch_size: BatchSize = 128
    lfme_lr: LearningRate = 0.1
    lfme_weight_decay: WeightDecay = 5e-4
    lfme_temperature: Scale = 2.0
    lfme_threshold: Annotated[float, Range(0, 0.999)] = 0.3

    # M2m
    m2m_from: Share = 0.8
    m2m_beta: AveragingFactor = 0.999
    m2m_lambda: Annotated[float, Range(0, 1000)] = 0.5
    m2m_gamma: Share = 0.9
    m2m_steps: Annotated[int, Range(1, 10_000)] = 10
    m2m_step_size: Annotated[float, Range(1e-6, 1000)] = 0.1
    m2m_noise: Annotated[float, Range(0, 1000)] = 0.5

    # the routers
    router_epochs: ExtraEpochs = 5
    router_batch_size: BatchSize = 512
    router_lr: LearningRate = 0.01
    router_weight_decay: WeightDecay = 5e-4
    router_top_k: Annotated[int, Range(1, 100_000)] = 30
    router_hidden: Annotated[int, Range(1, 65_536)] = 16
    router_shared: bool = True
    router_positive_weight: Annotated[float, Range(1e-6, 1e6)] = 100.0

    # how it is run
    seed: Seed = 0
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    accumulate: Annotated[int, Range(1, 65_536)] = 1
    ema_decay: AveragingFactor | None = None
    compile: bool = True
    evaluate_every: Epochs = 20

    def __post_init__(self) -> None:
        self._check_values()
        self._refuse_backbones()
        self._refuse_views()
        self._refuse_schedules()
        self._refuse_experts()
        self._refuse_groups()
        self._refuse_losses()
        self._refuse_stages()
        self._refuse_networks()

    def _check_values(self) -> None:
        """Each field by itself."""
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise RecipeError(
                f"name={self.name!r}: names a directory; must be of letters, digits, '_', '-' and '.', "
                "and begin with one of the first three"
            )
        for field, (low, high) in _ranges().items():
            value = getattr(self, field)
            numbers = value if isinstance(value, tuple) else () if value is None else (value,)
            if not all(low <= number <= high for number in numbers):
                raise RecipeError(f"{field}={value}: must be from {low} to {high}")
        for field, hint in typing.get_type_hints(Recipe).items():
            choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else None
            if choices and getattr(self, field) not in choices:
                raise RecipeError(f"{field}={getattr(self, field)!r}: must be one of {', '.join(choices)}")
        if list(self.lr_drops) != sorted(self.lr_drops) or not all(0 < share < 1 for share in self.lr_drops):
            raise RecipeError(f"lr_drops={self.lr_drops}: must be ascending shares of the epochs between 0 and 1")
        if (self.mean is None) != (self.std is None):
            raise RecipeError("mean and std: give both, or neither to measure them on the training images")
        for field in ("mean", "std"):
            value = getattr(self, field)
            if value is not None and not (len(value) == 3 and all(map(math.isfinite, value))):
                raise RecipeError(f"{field}={value}: must be three numbers, one per channel")
        if self.std is not None and min(self.std) <= 0:
            raise RecipeError(f"std={self.std}: must be positive")

    def _refuse_backbones(self) -> None:
        """What a backbone does not have."""
        swin, cifar = self.backbone.startswith("swin"), self.backbone.endswith("_cifar")
        if self.pretrained == "torchvision" and cifar:
            raise RecipeError(f"pretrained=torchvision: it has no {self.backbone}; name a run of ours or a file")
        if self.share_stage3 and (swin or cifar):
            raise RecipeError(f"share_stage3=True: only ResNets of four stages can, not {self.backbone}; take false")
        if self.drop_path and not swin:
            raise RecipeError(
                f"drop_path={self.drop_path:g}: only Swin transformers have it, not {self.backbone}; take 0"
            )

    def _refuse_views(self) -> None:
        """Augmentations that do not go together."""
        resized_only = {name: getattr(self, name) for name in ("colour_jitter", "rand_augment", "random_erasing")}
        padded_only = {"auto_augment": self.auto_augment, "cutout": self.cutout}
        for field, value in (resized_only if self.crop == "padded" else padded_only).items():
            if value:
                raise RecipeError(f"{field}={value}: not with crop={self.crop!r}, which has other views")

    def _refuse_schedules(self) -> None:
        """What a schedule, or batches of these sizes, cannot do."""
        if self.warmup_start is not None and (self.schedule != "step" or self.method == "shike"):
            raise RecipeError(
                f"warmup_start={self.warmup_start:g}: only schedule='step' has it, not SHIKE's own; take none"
            )
        if self.nesterov and not self.momentum:
            raise RecipeError("momentum=0: Nesterov's momentum must be above 0; or take nesterov=false")
        if self.lr_min > self.lr:
            raise RecipeError(f"lr_min={self.lr_min:g}: must be lr={self.lr:g} at most")
        if self.lr_min and (self.schedule != "cosine" or self.method == "shike"):
            raise RecipeError(f"lr_min={self.lr_min:g}: only schedule='cosine' ends there, SHIKE's own at 0; take 0")
        if self.cycles > 1 and (self.schedule != "cosine" or self.method == "shike"):
            raise RecipeError(f"cycles={self.cycles}: only schedule='cosine' has more than one, not SHIKE's; take 1")
        if self.epochs % self.cycles:
            raise RecipeError(f"cycles={self.cycles}: must divide epochs={self.epochs}")
        if self.accumulate > self.batch_size:
            raise RecipeError(f"accumulate={self.accumulate}: must be at most batch_size={self.batch_size}")

    def _refuse_experts(self) -> None:
        """What a method does not do with its experts."""
        if self.method in ("single", *SINGLE_PROCESS_METHODS) and self.n_experts != 1:
            raise RecipeError(f"n_experts={self.n_experts}: method {self.method!r} trains one expert")
        if self.method in ("shike", "ace") and self.n_experts < 2:
            raise RecipeError(f"n_experts={self.n_experts}: method {self.method!r} needs two experts or more")
        if self.method == "sade" and self.n_experts != 3:
            raise RecipeError(f"n_experts={self.n_experts}: method 'sade' has three; 'ride' with expert_taus has any")
        if self.method == "sade" and self.loss in ("balanced_softmax", "logit_adjusted", "sigmoid_focal"):
            raise RecipeError(f"loss={self.loss!r}: method 'sade' adds frequencies itself; take ce, focal or ldam")
        if self.expert_taus and len(self.expert_taus) != self.n_experts:
            raise RecipeError(
                f"expert_taus={self.expert_taus}: must be {self.n_experts}, one for each expert, or empty"
            )
        if self.expert_taus and (self.loss != "logit_adjusted" or self.method not in ("ride", "shike")):
            raise RecipeError("expert_taus: only for loss='logit_adjusted' under method 'ride' or 'shike'")
        if self.teacher and self.method != "ride":
            raise RecipeError(f"teacher={self.teacher!r}: only method 'ride' distils")
        if self.distill_each and not self.teacher:
            raise RecipeError("distill_each=True: there is no teacher to learn from; name a run, or take false")
        if self.method != "ride" and (self.diversity_weight or self.collaborative or self.loss_times_experts):
            raise RecipeError(
                "diversity_weight, collaborative and loss_times_experts: only for method 'ride', "
                f"this is {self.method!r}; take 0 and false"
            )
        if self.n_experts == 1 and self.diversity_weight:
            raise RecipeError(f"diversity_weight={self.diversity_weight:g}: one expert cannot disagree; take 0")
        if self.method in ("bbn", "oltr", "lfme") and self.deferred_from is not None:
            raise RecipeError(
                f"deferred_from={self.deferred_from:g}: method {self.method!r} has no such epoch; take none"
            )

    def _refuse_losses(self) -> None:
        """What a loss cannot be combined with."""
        if self.loss in ("focal", "sigmoid_focal") and (self.mixup or self.cutmix or self.label_smoothing):
            raise RecipeError(f"loss={self.loss!r}: mixup, cutmix and label_smoothing need a cross-entropy; take 0")
        if self.loss == "ldam" and self.classifier != "cosine":
            raise RecipeError("classifier='linear': the margins of LDAM need the cosine classifier")
        if self.loss == "sigmoid_focal" and self.classifier != "linear":
            raise RecipeError("classifier='cosine': loss 'sigmoid_focal' begins at a bias, which the linear one has")

    def _refuse_networks(self) -> None:
        """What a method's own network or loss cannot be combined with."""
        if (self.method == "shike" or self.depth_fusion) and self.backbone != "resnet32_cifar":
            raise RecipeError(f"backbone={self.backbone!r}: depth fusion is built for resnet32_cifar")
        if self.method == "ace" and self.backbone.startswith("swin"):
            raise RecipeError(
                f"backbone={self.backbone!r}: all experts share its last norm, which method 'ace' cannot train"
            )
        if self.method in ("bbn", "oltr") and self.backbone.startswith("swin"):
            raise RecipeError(f"backbone={self.backbone!r}: method {self.method!r} is built for ResNets and ResNeXts")
        if self.pretrained is not None and self.method in ("bbn", "lfme", "m2m"):
            raise RecipeError(
                f"pretrained={self.pretrained}: method {self.method!r} has layers or networks besides, "
                "which would begin afresh; take none"
            )
        if self.method in ("bbn", "oltr") and self.depth_fusion:
            raise RecipeError(f"depth_fusion=true: method {self.method!r} takes the last layers apart; take false")
        for field in ("mixup", "cutmix", "label_smoothing"):
            if getattr(self, field) and self.method not in ("ride", "single"):
                raise RecipeError(f"{field}={getattr(self, field):g}: only methods 'ride' and 'single' can; take 0")
        if self.method in SINGLE_PROCESS_METHODS and self.accumulate > 1:
            raise RecipeError(f"accumulate={self.accumulate}: method {self.method!r} needs its batches whole; take 1")
        if self.method in SINGLE_PROCESS_METHODS and (self.optimiser != "sgd" or self.clip_norm is not None):
            raise RecipeError(
                f"optimiser={self.optimiser!r}, clip_norm={self.clip_norm}: method {self.method!r} needs 'sgd' and none"
            )

    def _refuse_groups(self) -> None:
        """ACE's class groups, and what it cannot do besides."""
        shares, wanted = self.group_shares, self.n_experts - 1 if self.method == "ace" else 0
        if len(shares) != wanted or list(shares) != sorted(shares, reverse=True) or not all(0 < s < 1 for s in shares):
            raise RecipeError(
                f"group_shares={shares}: method {self.method!r} with {self.n_experts} experts needs {wanted} of them, "
                "descending, between 0 and 1"
            )
        if self.method == "ace" and self.retrain_epochs:
            raise RecipeError(
                f"retrain_epochs={self.retrain_epochs}: method 'ace' has class groups and retrains none; take 0"
            )
        if self.method == "ace" and self.group_norm_power and self.classifier == "cosine":
            raise RecipeError("classifier='cosine': has no lengths to scale by; take linear or group_norm_power=0")

    def _refuse_stages(self) -> None:
        """What the stages besides the experts' cannot do."""
        if self.retrain_epochs:
            if self.method in SINGLE_PROCESS_METHODS:
                raise RecipeError(
                    f"retrain_epochs={self.retrain_epochs}: method {self.method!r} has no such stage; take 0"
                )
            if self.retrain in ("tau_norm", "ncm") and self.retrain_epochs != 1:
                raise RecipeError(
                    f"retrain_epochs={self.retrain_epochs}: retrain={self.retrain!r} has a closed form; take 1"
                )
            if self.retrain != "crt" and self.classifier != "linear":
                raise RecipeError(f"classifier={self.classifier!r}: retrain={self.retrain!r} needs the linear one")
            if self.retrain in ("crt", "lws") and self.retrain_loss == "ldam" and self.classifier != "cosine":
                raise RecipeError("retrain_loss='ldam': the margins of LDAM need the cosine classifier")
        if self.method in ("bbn", "oltr", "lfme") and (self.classifier, self.loss) != ("linear", "ce"):
            raise RecipeError(
                f"classifier={self.classifier!r}, loss={self.loss!r}: method {self.method!r} has the linear classifier "
                "and loss 'ce'"
            )
        if self.method == "m2m" and not 0 < self.epoch_of(self.m2m_from) < self.epochs:
            raise RecipeError(
                f"m2m_from={self.m2m_from}: of epochs={self.epochs}, one at least must lie before it and one after"
            )
        if self.first_stage is not None and self.method in ("bbn", "lfme"):
            raise RecipeError(
                f"first_stage={self.first_stage}: method {self.method!r} has no stage that a run can replace"
            )

    def stage_epochs(self) -> dict[str, int]:
        """The stages that this recipe trains, in order, and their epochs."""
        if self.method == "oltr":
            return {"experts": self.epochs, "centroids": 1, "memory": self.oltr_epochs}
        if self.method == "lfme":
            return {**dict.fromkeys(("many", "medium", "few"), self.lfme_epochs), "experts": self.epochs}
        if self.method == "m2m":
            begin = self.epoch_of(self.m2m_from)
            return {"generator": self.epochs, "experts": begin, "translated": self.epochs - begin}
        stages = {"experts": self.epochs}
        if self.retrain_epochs:
            stages["classifiers"] = self.retrain_epochs
        if self.n_experts > 1 and self.router_epochs:
            stages["routers"] = self.router_epochs
        return stages

    def missing_for(self, field: str) -> str | None:
        """What this recipe lacks for `field` to have an effect; None where it has one."""
        return next((need for names, need, met in _NEEDS if field in names and not met(self)), None)

    def losses(self) -> set[str]:
        """The individual losses of its stages."""
        retrained = self.retrain_epochs and self.retrain in ("crt", "lws")
        return {self.loss, self.retrain_loss} if retrained else {self.loss}

    def epoch_of(self, share: float) -> int:
        """The epoch, from 0, at which `share` of the training is done."""
        return round(share * self.epochs)

    def differences(self, other: Recipe, ignored: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
        """Field to the values here and there where they differ, less fields whose names begin with one of `ignored`."""
        pairs = {name: (value, getattr(other, name)) for name, value in vars(self).items()}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and not name.startswith(ignored)}

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; `from_dict` takes it back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """
        The recipe that a checkpoint carries.

        Raises:
            RecipeError: for unknown fields or impossible values.
        """
        _refuse_unknown(values)
        fields: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
        return cls(**fields)

    def override(self, settings: dict[str, str]) -> Recipe:
        """
        This recipe with fields replaced by values as a command line gives them.

        Args:
            settings: field to text; tuples are comma-separated, None is "none".

        Raises:
            RecipeError: for unknown fields, text that is not of the field's type, impossible values.
        """
        _refuse_unknown(settings)
        hints = typing.get_type_hints(Recipe)
        return dataclasses.replace(self, **{key: _parse(key, text, hints[key]) for key, text in settings.items()})

    def with_images_at(self, data: str | None, settings: dict[str, str]) -> Recipe:
        """
        The recipe of a run whose images may lie elsewhere now.

        Args:
            data: None: where they were.
            settings: `image_root` at most, as a command line gives it.

        Raises:
            RecipeError: for any other field.
        """
        for name in settings.keys() - {"image_root"}:
            raise RecipeError(f"--set {name}: the recipe of a run is fixed, but for where its images lie: image_root")
        return self.override(settings | ({} if data is None else {"data": data}))


def _named(*prefixes: str) -> tuple[str, ...]:
    """The fields whose names begin with one of these."""
    return tuple(field.name for field in dataclasses.fields(Recipe) if field.name.startswith(prefixes))


# Fields that count only together with another one; what that is, in words, and whether a recipe has it.
_NEEDS: tuple[tuple[tuple[str, ...], str, Callable[[Recipe], bool]], ...] = (
    (("transfer_weight", "mutual_weight"), "method='shike'", lambda recipe: recipe.method == "shike"),
    (("reversed_tau",), "method='sade'", lambda recipe: recipe.method == "sade"),
    (_named("group_", "complementary_"), "method='ace'", lambda recipe: recipe.method == "ace"),
    (_named("oltr_"), "method='oltr'", lambda recipe: recipe.method == "oltr"),
    (_named("lfme_"), "method='lfme'", lambda recipe: recipe.method == "lfme"),
    (_named("m2m_"), "method='m2m'", lambda recipe: recipe.method == "m2m"),
    (("distill_temperature", "distill_weight"), "a teacher", lambda recipe: bool(recipe.teacher)),
    (
        ("diversity_form", "diversity_mean", "diversity_gamma"),
        "a diversity_weight",
        lambda recipe: bool(recipe.diversity_weight),
    ),
    (
        ("collaborative", "loss_times_experts", "distill_each"),
        "two experts or more",
        lambda recipe: recipe.n_experts > 1,
    ),
    (("router_shared",), "three experts or more", lambda recipe: recipe.n_experts > 2),
    (("tau",), "retrain='tau_norm'", lambda recipe: recipe.retrain == "tau_norm"),
    (("ncm_features",), "retrain='ncm'", lambda recipe: recipe.retrain == "ncm"),
    (
        (*(name for name in _named("retrain") if name != "retrain_epochs"), "tau", "ncm_features"),
        "retrain_epochs",
        lambda recipe: bool(recipe.retrain_epochs),
    ),
    (
        tuple(name for name in _named("router_") if name != "router_epochs"),
        "routers to train, and router_epochs",
        lambda recipe: "routers" in recipe.stage_epochs(),
    ),
    (
        ("features_lr_factor",),
        "another method than 'bbn' or 'lfme', or 'ace' with group_lr_scaling",
        lambda recipe: (
            recipe.method not in ("bbn", "lfme") and not (recipe.method == "ace" and recipe.group_lr_scaling)
        ),
    ),
    (("max_margin",), "loss='ldam'", lambda recipe: "ldam" in recipe.losses()),
    (("focal_gamma",), "a focal loss", lambda recipe: bool({"focal", "sigmoid_focal"} & recipe.losses())),
    (("logit_tau",), "loss='logit_adjusted'", lambda recipe: "logit_adjusted" in recipe.losses()),
    (
        ("logit_tau",),
        "an empty expert_taus",
        lambda recipe: (
            not recipe.expert_taus or (recipe.retrain_epochs > 0 and recipe.retrain_loss == "logit_adjusted")
        ),
    ),
    (("effective_beta", "diversity_gamma"), "deferred_from", lambda recipe: recipe.deferred_from is not None),
    (
        ("lr_drops", "lr_drop_factor"),
        "schedule='step'",
        lambda recipe: recipe.schedule == "step",
    ),
    (("warmup_start",), "warmup_epochs", lambda recipe: bool(recipe.warmup_epochs)),
    (
        ("momentum", "nesterov"),
        "optimiser='sgd'",
        lambda recipe: recipe.optimiser == "sgd" or (recipe.retrain_epochs > 0 and recipe.retrain in ("crt", "lws")),
    ),
    (("cosine_scale",), "classifier='cosine'", lambda recipe: recipe.classifier == "cosine"),
    (("router_epochs",), "several experts", lambda recipe: recipe.n_experts > 1),
    (("crop_padding",), "crop='padded'", lambda recipe: recipe.crop == "padded"),
    (("crop_interpolation",), "crop='resized'", lambda recipe: recipe.crop == "resized"),
    (("group_norm_rows",), "a group_norm_power", lambda recipe: bool(recipe.group_norm_power)),
    (("complementary_form",), "a complementary_weight", lambda recipe: bool(recipe.complementary_weight)),
    (
        ("image_root", "train_list", "val_list", "test_list"),
        "images of your own",
        lambda recipe: recipe.data not in ("cifar10", "cifar100"),
    ),
    (
        tuple(name for name in _named("retrain_") if name != "retrain_epochs"),
        "retrain='crt' or 'lws'",
        lambda recipe: recipe.retrain in ("crt", "lws"),
    ),
    (
        ("imbalance", "holdout_per_class", "subset_order"),
        "profile='exp' or 'step'",
        lambda recipe: recipe.profile != "natural",
    ),
    (("holdout_share", "test_share"), "profile='natural'", lambda recipe: recipe.profile == "natural"),
)


def refuse_without_effect(recipes: Sequence[Recipe], settings: Mapping[str, str]) -> None:
    """
    Refuse settings that change none of the recipes that they were given for.

    Args:
        settings: field to text.

    Raises:
        RecipeError: says what they lack.
    """
    for field, text in settings.items():
        missing = [recipe.missing_for(field) for recipe in recipes]
        if missing and all(missing):
            names = " or ".join(recipe.name for recipe in recipes)
            raise RecipeError(f"--set {field}={text}: has no effect on {names} without {missing[0]}; leave it out")


def parse_settings(texts: Sequence[str]) -> dict[str, str]:
    """
    Field to text, of arguments FIELD=VALUE.

    Raises:
        RecipeError: for one without a field or an equals sign.
    """
    pairs = [text.partition("=") for text in texts]
    for text, (field, separator, _) in zip(texts, pairs, strict=True):
        if not (field and separator):
            raise RecipeError(f"--set {text}: must be field=value")
    return {field: value for field, _, value in pairs}


@functools.cache
def _ranges() -> dict[str, Range]:
    """The range of each field that has one, from its annotation."""
    hints = typing.get_type_hints(Recipe, include_extras=True)
    return {
        field: found
        for field, hint in hints.items()
        for annotated in (hint, *typing.get_args(hint))  # the field's, or that of a tuple's members, or beside None
        for found in getattr(annotated, "__metadata__", ())
    }


def _refuse_unknown(settings: dict[str, Any]) -> None:
    valid = [field.name for field in dataclasses.fields(Recipe)]
    for key in settings:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, cutoff=0.5)
            meant = f"did you mean {' or '.join(near)}? " if near else ""
            raise RecipeError(f"{key}: no such recipe field; {meant}ride-train --help lists them all")


def _parse(key: str, text: str, hint: Any) -> Any:
    """`text` as a value of the type `hint`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if text.lower() == "none":
            return None
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    origin = typing.get_origin(hint)
    if origin is Literal:
        return text
    if origin is tuple:
        return tuple(_parse(key, part, float) for part in text.split(",") if part.strip())
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise RecipeError(f"{key}={text}: must be true or false")
        return text.lower() == "true"
    try:
        return hint(text)
    except ValueError:
        raise RecipeError(f"{key}={text}: must be {'a whole number' if hint is int else 'a number'}") from None
