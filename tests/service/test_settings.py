"""Settings, the operating point that follows from them, and the cores there are."""

import dataclasses
import datetime
import json
import logging
import os
import warnings
from contextlib import suppress

import pytest
from prometheus_client import CollectorRegistry
from python_multipart import MultipartParser
from python_multipart.exceptions import MultipartParseError

from model_export.bundle import read_bundle
from service.classifier import Classifier
from service.cores import available_cores
from service.engine import batch_size_for, open_engine
from service.logs import log, set_up
from service.operating_point import choose_operation
from service.profile import PROFILE
from service.settings import DEFAULT_BUNDLE, Settings, SettingsError, read_settings, unknown_variables
from service.warm_up import warm_up_sizes
from tests.tiny import operating_points

EXAMPLES = {
    "bundle": "my/bundle", "host": "0.0.0.0", "port": "8123", "provider": "cpu", "variant": "fp16",
    "workers": "2", "shared_engine": "on", "threads": "3", "max_batch": "7",
    "merge": "off", "engine_thread": "on", "scaled_decode": "false", "rule": "margin",
    "max_queue": "99", "max_images": "5", "max_bytes": "5MiB", "max_inflight_bytes": "64MiB",
    "max_pixels": "1000", "timeout_s": "2.5", "drain_s": "7", "top_k": "3", "max_experts": "2",
    "thresholds": "0.5,0.25", "max_mean_experts": "1.5", "max_accuracy_loss": "0.3", "log_level": "warning",
}  # fmt: skip


def test_a_refused_setting_sends_to_the_help_of_the_command_that_was_called():
    """Both commands take the settings."""
    with pytest.raises(SettingsError, match="see ride-profile --help"):
        read_settings(["--port", "66000"], PROFILE)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_a_setting_is_the_same_on_the_command_line_and_in_the_environment(name, monkeypatch):
    """One name, one meaning; the command line comes first; an empty variable is none."""
    variable, option = f"RIDE_{name.upper()}", f"--{name.replace('_', '-')}"
    usual = getattr(read_settings([]), name)
    given = getattr(read_settings([option, EXAMPLES[name]]), name)
    assert given != usual

    monkeypatch.setenv(variable, EXAMPLES[name])
    assert getattr(read_settings([]), name) == given
    if name not in ("provider", "log_level", "merge", "engine_thread", "rule"):  # their words are checked at once
        monkeypatch.setenv(variable, "nonsense, which the command line hides")
        assert getattr(read_settings([option, EXAMPLES[name]]), name) == given
    monkeypatch.setenv(variable, "")
    assert getattr(read_settings([]), name) == usual


def test_what_nobody_sets_is_usual():
    """The defaults that the README names."""
    settings = read_settings([])

    assert (settings.host, settings.port, settings.provider) == ("127.0.0.1", 8000, "auto")
    assert (settings.max_batch, settings.max_queue, settings.max_images, settings.top_k) == (None, 256, 64, 5)
    assert (settings.max_bytes, settings.max_pixels) == (32 * 2**20, 40_000_000)
    assert (settings.timeout_s, settings.drain_s) == (10, 30)
    assert settings.bundle == DEFAULT_BUNDLE


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "66000"], ["RIDE_PORT (--port) is '66000'", "less than or equal to 65535", "ride-serve --help"]),
        (["--max-batch", "0"], ["RIDE_MAX_BATCH (--max-batch) is '0'", "greater than or equal to 1"]),
        (["--max-bytes", "much"], ["RIDE_MAX_BYTES (--max-bytes) is 'much'"]),
        (["--timeout-s", "nan"], ["RIDE_TIMEOUT_S (--timeout-s) is 'nan'"]),
        (["--timeout-s", "0"], ["RIDE_TIMEOUT_S (--timeout-s) is '0'", "greater than 0"]),
        (["--thresholds", "0.5,1.5"], ["RIDE_THRESHOLDS (--thresholds) is '1.5'"]),
        (["--thresholds", "0.5;0.4"], ["RIDE_THRESHOLDS (--thresholds) is '0.5;0.4'"]),
        (["--max-images", "300"], ["RIDE_MAX_IMAGES is 300, RIDE_MAX_QUEUE is 256", "lower the first or raise"]),
        (["--max-bytes", "600MiB"], ["RIDE_MAX_BYTES is 629145600, RIDE_MAX_INFLIGHT_BYTES is 536870912"]),
        (
            ["--thresholds", "0.5", "--max-mean-experts", "2"],
            ["RIDE_THRESHOLDS and RIDE_MAX_MEAN_EXPERTS both choose the thresholds; give one of them"],
        ),
        (
            ["--max-mean-experts", "2", "--max-accuracy-loss", "1"],
            ["RIDE_MAX_MEAN_EXPERTS and RIDE_MAX_ACCURACY_LOSS both choose the thresholds; give one of them"],
        ),
        (["--top-k", "x", "--threads", "-1"], ["RIDE_TOP_K (--top-k) is 'x'", "RIDE_THREADS (--threads) is '-1'"]),
    ],
)
def test_a_setting_that_cannot_be_is_refused(arguments, words):
    """With its names, its value and what may be; all of them at once."""
    with pytest.raises(SettingsError) as refusal:
        read_settings(arguments)
    for word in words:
        assert word in str(refusal.value)


def test_one_wrong_threshold_is_one_line():
    """And not another one that calls the list too short."""
    with pytest.raises(SettingsError) as refusal:
        read_settings(["--thresholds", "2"])
    assert str(refusal.value).startswith("RIDE_THRESHOLDS (--thresholds) is '2': ")
    assert "\n" not in str(refusal.value)


def test_a_wrong_variable_is_refused_by_its_name(monkeypatch):
    """As on the command line."""
    monkeypatch.setenv("RIDE_MAX_QUEUE", "many")
    with pytest.raises(SettingsError, match=r"RIDE_MAX_QUEUE \(--max-queue\) is 'many'"):
        read_settings([])


def test_an_option_that_does_not_exist_is_refused(capsys):
    """Also one that is only a beginning of another."""
    for option in ("--max-que", "--max_queue", "--quiet"):
        with pytest.raises(SystemExit) as end:
            read_settings([option, "1"])
        assert end.value.code == 2
        assert option in capsys.readouterr().err


def test_a_misspelt_variable_is_noticed(monkeypatch):
    """With the setting that was meant; what only shares the prefix is left alone."""
    monkeypatch.setenv("RIDE_MAX_QUEU", "1")
    monkeypatch.setenv("RIDE_DATA", "somewhere")
    monkeypatch.setenv("RIDE_PORT", "1")

    assert unknown_variables() == ["RIDE_MAX_QUEU is not a setting and has no effect; is RIDE_MAX_QUEUE meant?"]


def test_help_tells_every_setting_its_variable_and_default(capsys):
    """And the consequence of changing it."""
    with pytest.raises(SystemExit) as end:
        read_settings(["--help"])
    text = " ".join(capsys.readouterr().out.split())

    assert end.value.code == 0
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        assert f"[env: RIDE_{name.upper()}" in text
        assert " ".join(field.description.split()) in text
    assert "[env: RIDE_MAX_BYTES, default: 32.0MiB]" in text


@pytest.mark.parametrize(
    ("wish", "thresholds", "expected_mean"),
    [
        ({}, (0.5, 0.5), 1.6),
        ({"thresholds": "0.2"}, (0.2, 0.2), 1.9),
        ({"thresholds": "0.2,0.3"}, (0.2, 0.3), None),
        ({"max_mean_experts": 3}, (0.0, 0.0), 3.0),
        ({"max_mean_experts": 1.95}, (0.2, 0.2), 1.9),
        ({"max_mean_experts": 1.6}, (0.5, 0.5), 1.6),
        ({"max_mean_experts": 1.4}, (1.0, 1.0), 1.0),  # 1.2 experts are no more accurate than 1
        ({"max_mean_experts": 1}, (1.0, 1.0), 1.0),
        ({"max_accuracy_loss": 0}, (0.0, 0.0), 3.0),
        ({"max_accuracy_loss": 0.3}, (0.2, 0.2), 1.9),
        ({"max_accuracy_loss": 0.5}, (0.5, 0.5), 1.6),
        ({"max_accuracy_loss": 4.9}, (0.5, 0.5), 1.6),
        ({"max_accuracy_loss": 100}, (1.0, 1.0), 1.0),
        ({"max_experts": 2}, (0.5, 0.5), None),
    ],
)
def test_the_operating_point_is_the_best_that_keeps_the_operators_limit(tiny_bundle, wish, thresholds, expected_mean):
    """The most accurate for a number of experts; the cheapest for an accuracy; with what calibration found."""
    operation = choose_operation(read_bundle(tiny_bundle).manifest, Settings(**wish))

    assert operation.thresholds == thresholds
    assert operation.max_experts == wish.get("max_experts", 3)
    assert (operation.expected and operation.expected.mean_experts) == expected_mean


@pytest.mark.parametrize(
    ("wish", "threshold"),
    [({}, 0.25), ({"max_mean_experts": 1.95}, 0.1), ({"max_accuracy_loss": 0.3}, 0.1), ({"thresholds": "0.5"}, 0.5)],
)
def test_another_rule_has_its_own_operating_points(make_bundle, wish, threshold):
    """By default that of at most as many experts as the bundle's own rule needs, 1.6, whose thresholds it may share."""
    other = [
        dataclasses.replace(point, thresholds=tuple(value / 2 for value in point.thresholds))
        for point in operating_points(3, "margin")
    ]
    points = sorted((*other, *operating_points(3)), key=lambda point: point.mean_experts)
    manifest = read_bundle(make_bundle()).manifest
    calibration = dataclasses.replace(manifest.calibration, points=tuple(points))
    operation = choose_operation(
        dataclasses.replace(manifest, calibration=calibration), Settings(rule="margin", **wish)
    )

    assert operation.thresholds == (threshold,) * 2
    assert operation.expected in other
    assert operation.modes["fast"] == (0.25, 0.25)


def test_the_bundle_s_own_thresholds_stand_as_they_are(make_bundle):
    """Also where they are no point that a number of experts would choose, as those that were certified may be."""
    manifest = read_bundle(make_bundle(thresholds=(0.8, 0.8))).manifest

    assert choose_operation(manifest, Settings()).thresholds == (0.8, 0.8)
    assert choose_operation(manifest, Settings(max_mean_experts=1.2)).thresholds == (1.0, 1.0)


@pytest.mark.parametrize(("accuracy", "fast"), [(48.0, 1.0), (47.9, 0.8)])
def test_fast_may_lose_two_points(make_bundle, accuracy, fast):
    """Of the accuracy of all experts, which is 50; no more."""
    first, second, *others = operating_points(3)
    points = (
        dataclasses.replace(first, accuracy=dataclasses.replace(first.accuracy, all=accuracy)),
        dataclasses.replace(second, accuracy=dataclasses.replace(second.accuracy, all=48.1)),
        *others,
    )
    manifest = read_bundle(make_bundle()).manifest
    calibration = dataclasses.replace(manifest.calibration, points=points)
    operation = choose_operation(dataclasses.replace(manifest, calibration=calibration), Settings())

    assert operation.modes["fast"] == (fast, fast)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"max_experts": 4}, "RIDE_MAX_EXPERTS is 4, tiny has 3 experts"),
        (
            {"thresholds": "0.5,0.5,0.5"},
            "RIDE_THRESHOLDS has 3 values, tiny has 2 places to stop before the last expert; give one",
        ),
        ({"variant": "int8"}, "RIDE_VARIANT is 'int8', tiny has the variants ['fp32']"),
    ],
)
def test_a_wish_that_the_bundle_cannot_fulfil_stops_the_start(tiny_bundle, wish, message):
    """With what the bundle has."""
    with pytest.raises(SettingsError) as refusal:
        Classifier(read_bundle(tiny_bundle), Settings(**wish), CollectorRegistry(), open_engine)
    assert message in str(refusal.value)


def test_fewer_experts_than_the_thriftiest_point_are_impossible(make_bundle):
    """The message names the nearest that there is."""
    manifest = read_bundle(make_bundle(n_experts=2)).manifest
    points = tuple(point for point in manifest.calibration.points if point.mean_experts > 1.1)
    calibration = type(manifest.calibration)("noise", 1, points, None)
    manifest = type(manifest)(**{**vars(manifest), "calibration": calibration})

    with pytest.raises(SettingsError, match=r"is 1\.1, the thriftiest operating point of tiny needs 1.200"):
        choose_operation(manifest, Settings(max_mean_experts=1.1))


def test_a_rule_that_needs_more_experts_than_the_bundles_own_says_so(make_bundle):
    """`agreement` runs two at least. Nobody has set RIDE_MAX_MEAN_EXPERTS, so that is not what is wrong."""
    manifest = read_bundle(make_bundle()).manifest
    dear = [point for point in operating_points(3, "agreement") if point.mean_experts > 1.6]
    points = sorted((*dear, *operating_points(3)), key=lambda point: point.mean_experts)
    calibration = dataclasses.replace(manifest.calibration, points=tuple(points))
    manifest = dataclasses.replace(manifest, calibration=calibration)

    with pytest.raises(SettingsError, match=r"^RIDE_RULE is agreement, by which .* needs 1\.900 experts"):
        choose_operation(manifest, Settings(rule="agreement"))
    assert choose_operation(manifest, Settings(rule="agreement", max_mean_experts=1.9)).thresholds == (0.2, 0.2)


def test_a_model_of_one_expert_has_one_operating_point(make_bundle):
    """Whatever the wish."""
    manifest = read_bundle(make_bundle(n_experts=1)).manifest
    for wish in ({}, {"max_mean_experts": 1}, {"max_accuracy_loss": 5}, {"thresholds": "0.5"}):
        assert choose_operation(manifest, Settings(**wish)).thresholds == ()


@pytest.fixture
def eight_cores(monkeypatch):
    """Affinity to eight cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "10000 100000"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "6400000 100000"}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000",
          "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 3),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "600000 100000",
          "sys/fs/cgroup/a/b/cpu.max": "400000 100000"}, 4),
        ({"proc/self/cgroup": "0::/../../x\n", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        ({"proc/self/cgroup": "3:cpu,cpuacct:/docker/x\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000"}, 5),
        ({"proc/self/cgroup": "3:cpu,cpuacct:/docker/x\n", "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "300000",
          "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000"}, 3),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)  # fmt: skip
def test_cores_are_those_of_affinity_and_of_every_cgroup_above(tmp_path, eight_cores, files, cores):
    """Version 1 and 2; whole cores, rounded down, at least one."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert available_cores(tmp_path) == cores


def test_affinity_limits_a_larger_quota(tmp_path, monkeypatch):
    """The fewer of both."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})

    assert available_cores(tmp_path) == 1


def test_threads_are_the_settings_or_the_cores(tiny_bundle, monkeypatch):
    """0 is automatic."""
    bundle = read_bundle(tiny_bundle)
    for threads, expected in ((5, 5), (0, available_cores())):
        assert Classifier(bundle, Settings(threads=threads), CollectorRegistry(), open_engine).threads == expected


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (32, [1, 2, 4, 8, 16, 32])])
def test_the_warm_up_covers_all_orders_of_batch_size(limit, sizes):
    """Powers of two, and the largest batch."""
    assert warm_up_sizes(limit, on_gpu=False) == sizes


def test_on_a_gpu_the_warm_up_covers_every_size_that_a_batch_is_filled_up_to():
    """A size that was never run would make the first request that needs it wait, with TensorRT for minutes."""
    sizes = warm_up_sizes(20, on_gpu=True)
    assert sizes == [20, 1, 2, 3, 4, 6, 8, 12, 16]  # the largest first, which TensorRT then builds for
    assert {batch_size_for(size) for size in sizes} == {batch_size_for(rows) for rows in range(1, 21)}


@pytest.mark.usefixtures("_logging_restored")
def test_log_lines_are_json_with_the_stack_trace_inside(capsys):
    """One line per event, whatever is in it."""
    set_up("info")
    log(logging.DEBUG, "unseen")
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        log(logging.ERROR, "failed", error=error, request_id="a", path=DEFAULT_BUNDLE)
    log(logging.ERROR, "odd", path="\udc80", number=10**30)
    warnings.warn_explicit("tag is odd", UserWarning, "TiffImagePlugin.py", 1, module="PIL.TiffImagePlugin")
    with suppress(MultipartParseError):
        MultipartParser(b"boundary").write(b"garbage")  # warns of it, too
    with warnings.catch_warnings(action="always"):
        warnings.warn_explicit("all is odd", UserWarning, "module.py", 1)
    line, odd, warning = capsys.readouterr().err.splitlines()
    found = json.loads(line)
    assert "all is odd" in json.loads(warning)["event"]
    assert (json.loads(odd)["path"], json.loads(odd)["number"]) == ("\udc80", 10**30)
    assert datetime.datetime.fromisoformat(found["time"]).tzinfo is not None

    assert (found["level"], found["event"], found["request_id"], found["path"]) == (
        "error",
        "failed",
        "a",
        str(DEFAULT_BUNDLE),
    )
    assert found["exception"].endswith("ValueError: two\nlines")
    assert found["time"].startswith("20")
