"""The command line: ride-profile, how long each graph takes here."""

import logging
import sys
from collections.abc import Sequence
from typing import Final

from model_export.bundle import BundleError, read_bundle
from service.cascade import NotFiniteError
from service.engine import EngineError, open_engine
from service.logs import log, set_up
from service.operating_point import choose_operation
from service.settings import Command, SettingsError, read_settings, unknown_variables
from service.shares import choose_shared_engine, choose_workers, engine_share_of, share_of
from service.warm_up import choose_variant, warm_up

PROFILE: Final = Command(
    "ride-profile",
    "Run every graph of a bundle as ride-serve would with the same settings, print how long each takes, and end. With "
    "TensorRT this builds its engines and keeps them on disk, so that ride-serve finds them there.",
    ("ride-profile", "ride-profile --bundle my-bundle --provider tensorrt"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where the engine fails, 2 for the caller's mistakes."""
    try:
        settings = read_settings(arguments, PROFILE)
        set_up(settings.log_level)
        for line in unknown_variables():
            log(logging.WARNING, "unknown_variable", message=line)
        bundle = read_bundle(settings.bundle)
        workers = choose_workers(settings)
        shared = choose_shared_engine(settings, workers)
        share = engine_share_of(settings) if shared else share_of(settings, workers)
        rule = choose_operation(bundle.manifest, share).rule
        choose_variant(bundle.manifest, share)
    except (SettingsError, BundleError) as error:
        print(f"ride-profile: {error}", file=sys.stderr)
        return 2
    try:
        engine = open_engine(bundle, share.variant, provider=share.provider, threads=share.threads)
        times = warm_up(engine, bundle.manifest, share, rule).profile.measured
    except (BundleError, EngineError, NotFiniteError) as error:
        print(f"ride-profile: {error}", file=sys.stderr)
        return 1
    manifest = bundle.manifest
    print(
        f"{manifest.name} {manifest.version}, variant {engine.variant}, provider {engine.provider}, threads "
        f"{share.threads}; milliseconds of one batch, the shortest of several runs, experts with their routers\n"
    )
    print("| images | " + " | ".join(times) + " |")
    print("| --- |" + " --- |" * len(times))
    for size in sorted(times["trunk"]):
        print(f"| {size} | " + " | ".join(f"{1000 * stage[size]:.3f}" for stage in times.values()) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
