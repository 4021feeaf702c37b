"""Which thresholds are in force: the bundle's, the operator's own, or those that keep the operator's limit."""

from dataclasses import dataclass

from model_export.bundle import Manifest, OperatingPoint
from service.settings import Settings, SettingsError


@dataclass(frozen=True)
class Operation:
    """
    How far images go by default.

    Attributes:
        thresholds: one per router.
        max_experts: the operator's limit, at most E.
        expected: what calibration measured for exactly this, or None where it was not measured.
    """

    thresholds: tuple[float, ...]
    max_experts: int
    expected: OperatingPoint | None


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
    thresholds = _thresholds(manifest, settings)
    measured = (point for point in manifest.calibration.points if point.thresholds == thresholds)
    return Operation(thresholds, max_experts, next(measured, None) if max_experts == n_experts else None)


def _thresholds(manifest: Manifest, settings: Settings) -> tuple[float, ...]:
    points = manifest.calibration.points
    if settings.thresholds is not None:
        n_routers = manifest.n_experts - 1
        if len(settings.thresholds) not in (1, n_routers):
            raise SettingsError(
                f"RIDE_THRESHOLDS has {len(settings.thresholds)} values, {manifest.name} has {n_routers} routers; "
                "give one value for each, or one for all"
            )
        return settings.thresholds * n_routers if len(settings.thresholds) == 1 else settings.thresholds
    if settings.max_mean_experts is not None:
        affordable = [point for point in points if point.mean_experts <= settings.max_mean_experts]
        if not affordable:
            raise SettingsError(
                f"RIDE_MAX_MEAN_EXPERTS is {settings.max_mean_experts}, "
                f"the thriftiest operating point of {manifest.name} needs {points[0].mean_experts:.3f}"
            )
        return max(affordable, key=lambda point: (point.accuracy.all, -point.mean_macs)).thresholds
    if settings.max_accuracy_loss is not None:
        full = next(point for point in points if max(point.thresholds, default=0.0) == 0)
        floor = full.accuracy.all - settings.max_accuracy_loss
        good = [point for point in points if point.accuracy.all >= floor]  # never empty: `full` is one of them
        return min(good, key=lambda point: (point.mean_macs, -point.accuracy.all)).thresholds
    return manifest.thresholds
