"""The packages depend on each other in one direction only, and serving needs neither torch nor onnx."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("training", "model_export", "service")


def modules(package):
    """Names of all modules of a package."""
    files = [path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py")]
    return sorted(".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files)


def loaded_after(*names):
    """Top-level packages, and modules of ours, that a fresh interpreter has loaded after importing these."""
    code = f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\nprint(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return {name if name.split(".")[0] in PACKAGES else name.split(".")[0] for name in found.stdout.split()}


def imported_by(package):
    """Whatever any module of a package imports, anywhere in its text, also where it does so only when called."""
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_service_loads_neither_torch_nor_onnx_nor_training():
    """All of its modules together; of the rest of the project only the bundle."""
    names = modules("service")
    assert {"service.app", "service.engine", "service.__main__"} <= set(names)
    loaded = loaded_after(*names)

    assert "onnxruntime" in loaded
    assert not loaded & {"torch", "torchvision", "onnx", "onnxscript", "safetensors", "pyarrow", "training"}
    assert {name for name in loaded if name.split(".")[0] == "model_export"} == {"model_export", "model_export.bundle"}


def test_the_bundle_loads_none_of_the_large_packages():
    """Nor anything else of the project."""
    loaded = loaded_after("model_export.bundle")

    assert not loaded & {"torch", "onnx", "onnxruntime", "numpy", "training", "service"}
    assert {name for name in loaded if name.split(".")[0] in PACKAGES} == {"model_export", "model_export.bundle"}


@pytest.mark.parametrize("module", ["service.engine", "model_export.parity", "benchmarks.runtimes"])
def test_onnxruntime_reports_to_nobody(module, tmp_path):
    """Its official builds keep a list of what they ran, to send it to their maker, unless they are told not to."""
    environment = {name: value for name, value in os.environ.items() if name != "CI" and not name.startswith("ORT_")}
    code = f"import {module}, os, time; time.sleep(0.5); print(*map(os.path.realpath, os.scandir('/proc/self/fd')))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment | {"HOME": str(tmp_path)}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip

    assert "/pipe:" in run.stdout
    assert "onnxruntime.db" not in run.stdout
    assert not list(tmp_path.rglob("*onnxruntime*"))


@pytest.mark.parametrize(
    ("package", "never"),
    [
        ("training", {"model_export", "service", "onnx", "onnxruntime"}),
        ("model_export", {"service"}),
        ("service", {"training", "torch", "onnx"}),
    ],
)
def test_no_module_imports_against_the_direction(package, never):
    """Not even inside a function."""
    imported = imported_by(package)

    assert imported
    assert not {name for name in imported if name.split(".")[0] in never}
    if package == "service":
        ours = {name for name in imported if name.split(".")[0] == "model_export"}
        assert all(name.startswith("model_export.bundle") for name in ours)


def test_training_loads_neither_of_the_others():
    """When it runs, too."""
    loaded = loaded_after(*modules("training"))

    assert {name for name in loaded if name.split(".")[0] in ("model_export", "service")} == set()


def test_the_export_loads_nothing_of_the_service():
    """When it runs, too."""
    loaded = loaded_after(*modules("model_export"))

    assert not {name for name in loaded if name.split(".")[0] == "service"}


@pytest.mark.parametrize(
    ("module", "given"), [("training", ["ce-cifar100"]), ("model_export", ["run", "-o", "bundle"])]
)
def test_where_only_the_service_is_installed_the_other_commands_say_what_is_missing(module, given):
    """In a line, not in a traceback."""
    code = f"import sys; sys.modules['torch'] = None; from {module}.__main__ import main; sys.exit(main({given!r}))"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert (told.returncode, told.stdout) == (2, "")
    assert re.fullmatch(r"ride-(train|export): .*torch.*; install the extras? .*'train'.*README.md says\n", told.stderr)
