"""What the README tells a stranger to type works, and what it says comes back does come back."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prometheus_client import CollectorRegistry

from model_export.bundle import read_bundle
from service.metrics import Metrics
from service.operating_point import choose_operation
from service.settings import DEFAULT_BUNDLE, Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent


def commands(program: str) -> list[str]:
    """The README's console lines that run `program`, without comments, environment settings kept."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    lines = [
        line[2:].split(" #")[0].strip() for block in blocks for line in block.splitlines() if line.startswith("$ ")
    ]
    return [line for line in lines if program in line.split()]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`ride-serve` with the bundle that ships, on a free port; its address."""
    log = tmp_path_factory.mktemp("log") / "log"
    with log.open("w") as file:
        process = subprocess.Popen([BIN / "ride-serve", "--port", "0"], stderr=file)
    try:
        deadline = time.monotonic() + 60
        while '"ready"' not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "not ready after a minute"
            time.sleep(0.05)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        yield next(line["url"] for line in lines if line["event"] == "listening")
    finally:
        process.terminate()
        assert process.wait(timeout=30) == 0


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """Three classes of noise, of 40, 20 and 10 images."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name, count in (("a", 40), ("b", 20), ("c", 10)):
        (root / name).mkdir()
        for index in range(count):
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / name / f"{index}.png")
    return root


def without_clock(answer: dict[str, object]) -> dict[str, object]:
    """An answer less its request id and its milliseconds."""
    results = [{key: value for key, value in result.items() if key != "latency_ms"} for result in answer["results"]]
    return {"model": answer["model"], "results": results}


def test_the_first_screen_shows_the_real_answer(server):
    """The curl command on the shipped picture prints what the README prints, but for rounding by another processor."""
    (command,) = commands("curl")
    command = command.replace("localhost:8000", server.removeprefix("http://"))
    printed = subprocess.run(shlex.split(command), cwd=ROOT, capture_output=True, check=True).stdout
    shown = re.search(r"^\$ curl.*?\n(\{.*?)```", README, re.DOTALL | re.MULTILINE).group(1)

    found, expected = without_clock(json.loads(printed)), without_clock(json.loads(shown))
    for result, wanted in zip(found["results"], expected["results"], strict=True):
        for prediction, other in zip(result["predictions"], wanted["predictions"], strict=True):
            assert prediction.pop("probability") == pytest.approx(other.pop("probability"), abs=0.01)
        assert result.pop("router_scores") == pytest.approx(wanted.pop("router_scores"), abs=0.02)
    assert found == expected


def test_the_three_commands_lead_from_images_to_a_service(tiny_folder, tmp_path):
    """ride-train, ride-export, ride-serve as the README gives them, on a small folder and with --smoke."""
    train, export, serve = (
        next(line for line in commands(program) if "mine" in line)
        for program in ("ride-train", "ride-export", "ride-serve")
    )
    train = train.replace("path/to/images", str(tiny_folder)) + " --smoke"
    for command in (train, export):
        subprocess.run(
            [BIN / shlex.split(command)[0], *shlex.split(command)[1:]], cwd=tmp_path, check=True, capture_output=True
        )
    name, *arguments = shlex.split(serve)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([BIN / name, *arguments, "--port", "0"], cwd=tmp_path, stderr=log)
    try:
        while '"ready"' not in (text := (tmp_path / "log").read_text()):
            assert process.poll() is None, text
            time.sleep(0.05)
        url = next(line["url"] for line in map(json.loads, text.splitlines()) if line["event"] == "listening")
        picture = next(tiny_folder.glob("*/*.png")).read_bytes()
        with urllib.request.urlopen(urllib.request.Request(f"{url}/classify", data=picture)) as answer:
            assert json.load(answer)["results"][0]["predictions"][0]["label"] in ("a", "b", "c")
    finally:
        process.terminate()
        assert process.wait(timeout=30) == 0


@pytest.mark.parametrize("line", commands("ride-train") + commands("ride-export") + commands("ride-serve"))
def test_every_option_in_the_readme_exists(line):
    """The command's help knows it."""
    words = [word for word in shlex.split(line) if "=" not in word or word.startswith("-")]
    program, *arguments = words[next(i for i, word in enumerate(words) if word.startswith("ride-")) :]
    help_text = subprocess.run([BIN / program, "--help"], capture_output=True, text=True, check=True).stdout
    for option in (argument for argument in arguments if argument.startswith("-")):
        assert re.search(rf"(^|[\s\[]){re.escape(option)}\b", help_text, re.MULTILINE), option


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^\$ make (\w+)", README, re.MULTILINE))))
def test_every_make_target_in_the_readme_exists(target):
    """`make -n` finds it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True, env=environment)


def test_every_link_in_the_readme_leads_somewhere():
    """Files that it names are in the repository."""
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_metrics_table_names_every_metric():
    """No metric of the service is missing from the README, and none there is made up."""
    manifest = read_bundle(DEFAULT_BUNDLE).manifest
    registry = CollectorRegistry()
    metrics = Metrics(registry, manifest, choose_operation(manifest, Settings()), lambda: 0, 1)
    metrics.engine_started(variant="fp32", provider="cpu", onnxruntime="1")
    made = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in registry.collect()
        if family.name.startswith("ride_")
    }
    assert made == set(re.findall(r"`(ride_\w+)`", README))
