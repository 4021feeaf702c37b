"""The service's settings: one name each, on the command line, in the environment and here."""

import argparse
import difflib
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, get_args, get_origin

from pydantic import BeforeValidator, ByteSize, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from model_export.bundle import Rule
from service import __version__

PREFIX: Final = "RIDE_"
METAVARS: Final = {
    "bundle": "DIR", "host": "ADDRESS", "variant": "NAME", "thresholds": "T,T", "scaled_decode": "true|false",
}  # fmt: skip
DEFAULT_BUNDLE: Final = Path(__file__).parent / "default_bundle"

Provider = Literal["auto", "cpu", "openvino", "cuda", "tensorrt"]
GPU_PROVIDERS: Final = ("cuda", "tensorrt")


@dataclass(frozen=True)
class Command:
    """What --help says of a command that takes the settings."""

    name: str
    description: str
    examples: tuple[str, ...]


SERVE: Final = Command(
    "ride-serve",
    "Serve a bundle: POST /classify answers images, easy ones after one expert, hard ones after more.",
    ("ride-serve", "ride-serve --bundle my-bundle --host 0.0.0.0 --max-mean-experts 1.5"),
)


class SettingsError(ValueError):
    """A setting that cannot be: names it, its value and what would do."""


def _split_numbers(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


Share = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseSettings):
    """Everything an operator may choose. The descriptions are the help text, so they tell the consequence."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, env_ignore_empty=True)

    bundle: Path = Field(
        DEFAULT_BUNDLE, description="Directory that ride-export wrote. Checked whole before anything is served."
    )
    host: str = Field(
        "127.0.0.1",
        description="Address to listen on. 0.0.0.0 lets other machines in; there is no login, so put a proxy in front.",
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on. 0 takes a free one and logs it.")
    provider: Provider = Field(
        "auto",
        description="What runs the graphs. auto takes CUDA where it works, else the CPU provider of onnxruntime; the "
        "others refuse to start where they do not work.",
    )
    variant: str | None = Field(
        None,
        description="Precision variant of the bundle, such as fp32. Without it, the fastest that this provider and "
        "processor are good at and that lost at most 0.3 points in any split when it was exported.",
    )
    workers: int = Field(
        0,
        ge=0,
        le=1024,
        description="Processes that answer requests. 0 takes one for each core that there is (affinity and cgroup "
        "quota); on a GPU one less, or one alone where there are fewer than four cores. On the CPU, one per core "
        "answers the most images per second; fewer need less memory. max-queue and max-inflight-bytes are totals, "
        "divided among the workers.",
    )
    shared_engine: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether the workers leave the graphs to one more process, in which images of all of them run "
        "together, instead of each having its own. auto: on a GPU with several workers, where one process could not "
        "speak HTTP and decode as fast as the GPU computes. On the CPU it costs a hand-over and gains nothing.",
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="Threads of one graph, and of decoding, in each worker. 0 divides the cores among the workers. "
        "More than that makes every image slower.",
    )
    max_batch: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Images that run together at most. Without it, 16 on the CPU and 24 in int8, where more gain "
        "nothing; 64 on a GPU, where a larger batch answers more images per second and makes each wait for all of it.",
    )
    merge: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether images of one batch that need another expert may wait for those of the next batch and run "
        "together. auto: on a GPU; the CPU gains nothing by it.",
    )
    engine_thread: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether graphs run in a thread of their own, instead of in the one that speaks HTTP. auto: where "
        "a step of a full batch takes more than 25 ms, or on a GPU. off saves the hand-over, and lets /healthz wait "
        "for a step.",
    )
    scaled_decode: bool = Field(
        True,
        description="Decode a JPEG that is at least 14 times as large as the model's input at a half, quarter or "
        "eighth of its size. About twice as fast for photographs; changes pixels slightly.",
    )
    max_queue: int = Field(
        256,
        ge=1,
        description="Images that may wait at once, divided among the workers. One more is refused with 429. A longer "
        "queue loses fewer requests in a burst and makes each wait longer: N / (images per second) is the wait at "
        "worst. However few they are, one that would wait for more than half of timeout-s is refused, too. Unless it "
        "is set, each worker has room for twice max-images at least, however many there are.",
    )
    max_images: int = Field(
        64,
        ge=1,
        description="Images in one request. More are refused with 413. At most max-queue, or none could be let in.",
    )
    max_bytes: ByteSize = Field(
        ByteSize(32 * 1024**2),
        ge=1,
        description="Size of one request's body, such as 32MiB. More is refused with 413 while it arrives.",
    )
    max_inflight_bytes: ByteSize = Field(
        ByteSize(512 * 1024**2),
        ge=1,
        description="Bodies of all requests together that are held in memory, such as 512MiB, divided among the "
        "workers. One that does not fit is refused with 429. Unless it is set, each worker has max-bytes at least. "
        "Decoding needs memory beside it: up to 14 bytes per pixel of max-pixels for each thread.",
    )
    max_pixels: int = Field(
        40_000_000,
        ge=1,
        description="Width x height of one image by its header, of a WebP three fifths of it. More is refused with "
        "413, before decoding: a small file can hold a huge picture.",
    )
    timeout_s: float = Field(
        10.0,
        gt=0,
        le=3600,
        description="Seconds from the end of a request's headers to its answer, upload included. Then 504. The headers "
        "may take 10 s before that.",
    )
    drain_s: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="Seconds that accepted requests have to finish after SIGTERM. Should exceed timeout-s and stay "
        "below the grace period of whatever stops the service (docker stop: 10 by default).",
    )
    top_k: int = Field(5, ge=1, description="Classes in an answer where the request does not say.")
    max_experts: int | None = Field(
        None, ge=1, description="Experts per image at most, whatever a request asks for. Fewer cost less and err more."
    )
    rule: Rule | None = Field(
        None,
        description="What decides after an expert whether the next one runs: the learned router, the highest "
        "probability, its distance to the second, the experts' agreement, or a fixed number. Without it, the bundle's. "
        "Another than the bundle's gets the thresholds that are most accurate with no more experts per image than the "
        "bundle's own need.",
    )
    thresholds: Annotated[tuple[Share, ...] | None, NoDecode, BeforeValidator(_split_numbers)] = Field(
        None,
        min_length=1,
        description="Scores of the rule from which the next expert runs, such as 0.5,0.4: one after each expert but "
        "the last, or one for all. 0 always goes on. Without this, max-mean-experts and max-accuracy-loss, the default "
        "of the bundle.",
    )
    max_mean_experts: float | None = Field(
        None,
        ge=1,
        description="Take the most accurate operating point of the bundle's table that needs at most so many experts "
        "per image.",
    )
    max_accuracy_loss: float | None = Field(
        None,
        ge=0,
        le=100,
        description="Take the cheapest operating point of the bundle's table that loses at most so many percentage "
        "points against all experts.",
    )
    log_level: Literal["info", "warning", "error"] = Field(
        "info",
        description="Least severe line to log. warning still shows every refused request; error only our failures.",
    )

    @model_validator(mode="after")
    def _check_together(self) -> "Settings":
        if self.max_images > self.max_queue:
            raise ValueError(
                f"{PREFIX}MAX_IMAGES is {self.max_images}, {PREFIX}MAX_QUEUE is {self.max_queue}: "
                "a request that large would never be let in; lower the first or raise the second"
            )
        if self.max_bytes > self.max_inflight_bytes:
            raise ValueError(
                f"{PREFIX}MAX_BYTES is {self.max_bytes}, {PREFIX}MAX_INFLIGHT_BYTES is {self.max_inflight_bytes}: "
                "a request that large would never be let in; lower the first or raise the second"
            )
        names = [
            f"{PREFIX}{name.upper()}"
            for name in ("thresholds", "max_mean_experts", "max_accuracy_loss")
            if getattr(self, name) is not None
        ]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} both choose the thresholds; give one of them")
        return self


def read_settings(arguments: Sequence[str] | None = None, command: Command = SERVE) -> Settings:
    """
    Settings from the command line (None: this process's), then the environment, then the defaults.

    Raises:
        SettingsError: naming each setting that cannot be.
        SystemExit: after --help or --version, and for an option that does not exist.
    """
    given = vars(_parser(command).parse_args(arguments))
    try:
        return Settings(**given)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(problem, command) for problem in _causes(error.errors()))) from None


def unknown_variables() -> list[str]:
    """A line for each environment variable that looks like a setting and is none, such as a misspelt one."""
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    lines = []
    for name in sorted(os.environ):
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if name.startswith(PREFIX) and name not in known and close:
            lines.append(f"{name} is not a setting and has no effect; is {close[0]} meant?")
    return lines


def _causes(problems: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Without those of a whole list of which an item cannot be: pydantic finds it too short then."""
    items = {problem["loc"][0] for problem in problems if len(problem["loc"]) > 1}
    return [problem for problem in problems if len(problem["loc"]) != 1 or problem["loc"][0] not in items]


def _explain(problem: ErrorDetails, command: Command) -> str:
    if not problem["loc"]:
        return problem["msg"].removeprefix("Value error, ")
    name = str(problem["loc"][0])
    option = f"{PREFIX}{name.upper()} (--{name.replace('_', '-')})"
    return f"{option} is {problem['input']!r}: {problem['msg']}; see {command.name} --help"


def _choices(annotation: object) -> tuple[str, ...] | None:
    """The words of a Literal, or of a Literal | None."""
    literal = next((kind for kind in (annotation, *get_args(annotation)) if get_origin(kind) is Literal), None)
    return get_args(literal) if literal is not None else None


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width)


def _parser(command: Command) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command.name,
        description=textwrap.fill(command.description, 100),
        epilog="examples:\n  " + "\n  ".join(command.examples),
        formatter_class=lambda prog: _HelpFormatter(prog, max_help_position=24, width=100),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{command.name} {__version__}")
    for name, field in Settings.model_fields.items():
        default = "the one that ships with the package" if name == "bundle" else field.default
        if isinstance(default, ByteSize):
            default = default.human_readable()
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            metavar=None if (choices := _choices(field.annotation)) else METAVARS.get(name, "N"),
            choices=choices,
            help=f"{field.description} [env: {PREFIX}{name.upper()}"
            + (f", default: {default}]" if default is not None else "]"),
        )
    return parser
