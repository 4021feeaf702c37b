"""docker-compose.yml, the Dockerfile and what they have to agree on with the service."""

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
PROVIDERS = ("cpu", "cuda")
SERVICES = ("classifier", "prometheus", "grafana")
PINNED = re.compile(r":v?\d+\.\d+(\.\d+)?(-[a-z0-9.-]+)?$")


def service(name: str, provider: str = "cpu") -> dict[str, Any]:
    """A service as compose sees it, its `extends` followed."""
    own = COMPOSE["services"][name]
    if "extends" not in own:
        return own
    file = own["extends"]["file"].replace("${RIDE_PROVIDER:-cuda}", provider)
    base = yaml.safe_load((ROOT / file).read_text())["services"][own["extends"]["service"]]
    assert not set(base) & set(own), (
        "a key in both places would be merged, differently by different versions of compose"
    )
    return {**base, **own}


def test_compose_has_the_three_services():
    """Their names are addresses in docker/prometheus.yml and in Grafana's data source."""
    assert set(COMPOSE["services"]) == set(SERVICES)


@pytest.mark.parametrize("name", SERVICES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_containers_can_do_little(name, provider):
    """Read-only root, no capabilities, no new privileges, a memory limit; with either provider."""
    definition = service(name, provider)
    assert definition["read_only"] is True
    assert definition["cap_drop"] == ["ALL"]
    assert definition["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"(\$\{\w+:-)?\d+[mg]\}?", definition["mem_limit"])


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_ready_made_images_are_pinned_and_run_as_a_user(name):
    """`latest` would be another program tomorrow; root is not needed."""
    definition = service(name)
    assert PINNED.search(definition["image"])
    assert int(definition["user"].split(":")[0]) > 0


def test_serving_image_is_pinned_and_runs_as_a_user():
    """Its base images have fixed tags and its last USER is numeric, so that orchestrators can see it is not root."""
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert len(bases) == 2
    assert all(PINNED.search(base) for base in bases)
    assert int(re.findall(r"^USER (\d+):\d+$", DOCKERFILE, re.MULTILINE)[-1]) > 0
    assert "torch" not in re.sub(r"^#.*$", "", DOCKERFILE, flags=re.MULTILINE)


def test_only_the_cuda_variant_asks_for_a_gpu():
    """RIDE_PROVIDER=cpu starts on a machine without the NVIDIA runtime."""
    assert "deploy" not in service("classifier", "cpu")
    (device,) = service("classifier", "cuda")["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]


def test_every_setting_can_be_given_to_the_container():
    """Under its own name. Where to listen and the bundle's place inside are the container's business."""
    given = {entry.split("=")[0] for entry in service("classifier")["environment"]}
    settings = {f"RIDE_{name.upper()}" for name in Settings.model_fields}
    assert given == settings - {"RIDE_HOST", "RIDE_PORT"}
    assert "RIDE_HOST=0.0.0.0" in DOCKERFILE
    assert "RIDE_PORT=8000" in DOCKERFILE


def test_a_stop_leaves_time_to_drain():
    """The container is killed only after the service has had RIDE_DRAIN_S for accepted images."""
    grace = re.fullmatch(r"\$\{STOP_GRACE_PERIOD:-(\d+)s\}", service("classifier")["stop_grace_period"])
    assert float(grace[1]) > Settings.model_fields["drain_s"].default


def test_a_mistyped_bundle_directory_is_refused():
    """Docker would make an empty one; the mount says that it must not, and that nothing is written to it."""
    (bundle,) = service("classifier")["volumes"]
    assert bundle["read_only"] is True
    assert bundle["bind"]["create_host_path"] is False


def test_monitoring_finds_the_services_by_name():
    """Prometheus scrapes classifier:8000, Grafana asks prometheus:9090."""
    prometheus = yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["classifier:8000"]}]
    provisioning = ROOT / "docker" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"


def test_mounted_files_exist_and_the_home_dashboard_is_among_them():
    """Docker would make an empty directory of a file that is not there."""
    mounts = [mount.split(":") for name in ("prometheus", "grafana") for mount in service(name)["volumes"]]
    inside = {target: ROOT / source for source, target, *_ in mounts if source.startswith("./")}
    assert all(path.exists() for path in inside.values())
    home = re.search(
        r"^default_home_dashboard_path = (\S+)$", inside["/etc/grafana/grafana.ini"].read_text(), re.MULTILINE
    )
    assert home
    directory, _, file = home[1].rpartition("/")
    assert (inside[directory] / file).exists()
    assert (
        yaml.safe_load((inside["/etc/grafana/provisioning"] / "dashboards" / "ride.yml").read_text())["providers"][0][
            "options"
        ]["path"]
        == directory
    )


def test_the_builder_gets_what_the_dockerfile_copies():
    """.dockerignore lets in exactly the sources that COPY names; training data, runs and .git stay outside."""
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(name for names in copies for name in names.split()) == sorted(allowed)
    assert not any(fnmatch(name, pattern) for name in (".git", "runs", "tests", ".venv") for pattern in allowed)


def test_building_for_a_gpu_without_one_says_what_to_do():
    """The check runs before anything is fetched, and names the word that runs on the CPU."""
    check = re.search(r"^RUN (if \[ .+?fi)$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert check
    script = (
        check[1].replace("\\\n", "").replace("/proc/driver/nvidia", "/nowhere").replace("/proc/misc", "/nowhere/misc")
    )
    environment = {"PROVIDER": "cuda", "CHECK_DRIVER": "yes", "PATH": "/usr/bin:/bin"}
    refused = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "RIDE_PROVIDER=cpu docker compose up" in refused.stderr
    for allowed in ({"PROVIDER": "cpu"}, {"CHECK_DRIVER": "no"}):
        subprocess.run(["sh", "-c", script], env=environment | allowed, check=True)


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024", 1),
        ("NVIDIA UNIX Open Kernel Module for x86_64  575.64.03  Release Build  (dvs-builder)", 1),
        ("NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)", 0),
        ("something else altogether", 0),
    ],
)
def test_building_for_a_gpu_with_an_old_driver_says_what_to_do(tmp_path, version, status):
    """Before anything is fetched; a version that cannot be read is let pass."""
    checks = re.findall(r"^RUN (if \[ .+?\n    fi)$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    (tmp_path / "version").write_text(f"NVRM version: {version}\nGCC version:  gcc version 12.2.0\n")
    script = checks[1].replace("\\\n", "").replace("/proc/driver/nvidia", str(tmp_path))
    environment = {"PROVIDER": "cuda", "CHECK_DRIVER": "yes", "PATH": "/usr/bin:/bin"}
    found = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == status
    assert ("RIDE_PROVIDER=cpu docker compose up" in found.stderr) == bool(status)
