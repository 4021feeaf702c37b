"""How far images go by default: the exit rule, its thresholds, and what a caller's mode stands for."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from model_export.bundle import Manifest, OperatingPoint, Rule
from service.settings import Settings, SettingsError

Mode = Literal["fast", "balanced", "full"]
MODES: Final = get_args(Mode)
FAST_MAX_LOSS: Final = 2.0  # percentage points that mode=fast may lose against all experts


@dataclass(frozen=True)
class Operation:
    """
    How far images go.

    Attributes:
        rule: what decides after an expert.
        thresholds: one per expert but the last; they hold where a request does not say.
        max_experts: the operator's limit, at most E.
        expected: what calibration measured for exactly this, or None where it was not measured.
        modes: the thresholds that a request may choose by a word; "balanced" is `thresholds`.
    """

    rule: Rule
    thresholds: tuple[float, ...]
    max_experts: int
    expected: OperatingPoint | None
    modes: dict[Mode, tuple[float, ...]]


def choose_operation(manifest: Manifest, settings: Settings) -> Operation:
    """
    Read the operator's wish off the calibration table.

    Raises:
        SettingsError: where no operating point fulfils it; the message gives the nearest that exists.
    """
    n_experts = manifest.n_experts
    max_experts = settings.max_experts or n_experts
    if max_experts > n_experts:
        raise SettingsError(f"RIDE_MAX_EXPERTS is {max_experts}, {manifest.name} has {n_experts} experts")
    rule = settings.rule or manifest.rule
    points = manifest.calibration.of(rule)
    if not points:
        raise SettingsError(
            f"RIDE_RULE is {rule}, {manifest.name} was calibrated for "
            f"{sorted({point.rule for point in manifest.calibration.points})}; export it anew, or choose one of these"
        )
    thresholds = _thresholds(manifest, settings, rule)
    measured = (point for point in points if point.thresholds == thresholds)
    return Operation(
        rule=rule,
        thresholds=thresholds,
        max_experts=max_experts,
        expected=next(measured, None) if max_experts == n_experts else None,
        modes={
            "fast": manifest.calibration.cheapest(rule, FAST_MAX_LOSS).thresholds,
            "balanced": thresholds,
            "full": (0.0,) * (n_experts - 1),
        },
    )


def _thresholds(manifest: Manifest, settings: Settings, rule: Rule) -> tuple[float, ...]:
    if settings.thresholds is not None:
        n_routers = manifest.n_experts - 1
        if len(settings.thresholds) not in (1, n_routers):
            raise SettingsError(
                f"RIDE_THRESHOLDS has {len(settings.thresholds)} values, {manifest.name} has {n_routers} places to "
                "stop before the last expert; give one value for each, or one for all"
            )
        return settings.thresholds * n_routers if len(settings.thresholds) == 1 else settings.thresholds
    calibration, most = manifest.calibration, settings.max_mean_experts
    if settings.max_accuracy_loss is not None:
        return calibration.cheapest(rule, settings.max_accuracy_loss).thresholds
    if most is None and rule == manifest.rule:
        return manifest.thresholds
    if most is None:  # as many as the bundle's own rule needs
        default = manifest.default_point
        most = default.mean_experts if default is not None else float(manifest.n_experts)
    point = calibration.most_accurate(rule, most)
    if point is None:
        least = f"the thriftiest operating point of {manifest.name} needs {calibration.of(rule)[0].mean_experts:.3f}"
        if settings.max_mean_experts is not None:
            raise SettingsError(f"RIDE_MAX_MEAN_EXPERTS is {most}, {least}")
        raise SettingsError(
            f"RIDE_RULE is {rule}, by which {least} experts per image, more than the {most:.3f} of its own rule, "
            f"{manifest.rule}; RIDE_MAX_MEAN_EXPERTS or RIDE_MAX_ACCURACY_LOSS says how many it may need"
        )
    return point.thresholds
