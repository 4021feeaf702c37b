"""How many workers there are, and what each of them gets of the service's cores and limits."""

import sys
from typing import Final

from service.cores import available_cores, has_cuda
from service.settings import GPU_PROVIDERS, Settings, SettingsError

# A limit of the whole service, what one request may take of it, which each worker must be able to grant, and for how
# many such requests there should be room: beside a queue's largest one others need places.
LIMITS: Final = (("max_queue", "max_images", 2), ("max_inflight_bytes", "max_bytes", 1))


MANY_CORES: Final = 4  # from which a GPU's process is relieved of HTTP and decoding


def choose_workers(settings: Settings) -> int:
    """
    Those that the settings want; else one for each core.

    Where a GPU does the work, all cores but the one that feeds it, or a single worker where there are few.
    """
    cores = available_cores()
    if settings.workers or not _on_gpu(settings):
        return settings.workers or cores
    return cores - 1 if cores >= MANY_CORES else 1


def choose_shared_engine(settings: Settings, workers: int) -> bool:
    """Whether one more process runs the graphs for all workers."""
    if settings.shared_engine == "auto":
        return workers > 1 and _on_gpu(settings)
    return settings.shared_engine == "on"


def share_of(settings: Settings, workers: int) -> Settings:
    """
    One worker's settings: its threads, its part of the limits, rounded up.

    A limit that nobody set is stretched where its part would be too small for the largest request.

    Raises:
        SettingsError: where a limit that somebody set is too small to be divided.
    """
    parts: dict[str, int] = {"threads": settings.threads or max(1, available_cores() // workers)}
    for limit, request, times in LIMITS:
        whole, least = getattr(settings, limit), getattr(settings, request)
        part = -(-whole // workers)
        if part < least and limit in settings.model_fields_set:
            raise SettingsError(
                f"RIDE_{limit.upper()} is {whole}, {part} for each of {workers} workers, RIDE_{request.upper()} is "
                f"{least}: a request that large would never be let in; raise the first, lower the second, or set "
                "RIDE_WORKERS to fewer"
            )
        parts[limit] = part if limit in settings.model_fields_set else max(part, times * least)
    return settings.model_copy(update=parts)


def engine_share_of(settings: Settings) -> Settings:
    """The settings of the process that runs the graphs for all workers; how many images wait in it, they see to."""
    return settings.model_copy(update={"threads": settings.threads or available_cores(), "max_queue": sys.maxsize})


def _on_gpu(settings: Settings) -> bool:
    return settings.provider in GPU_PROVIDERS or (settings.provider == "auto" and has_cuda())
