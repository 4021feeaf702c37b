"""The bundle: what is written can be read, and whatever is damaged is refused by name."""

import dataclasses
import json
import os
import shutil

import pytest

from model_export.bundle import (
    MAX_VARIANT_LOSS,
    SCHEMA_VERSION,
    BundleError,
    Calibration,
    GraphSpec,
    Risk,
    SplitBounds,
    TensorSpec,
    Variant,
    read_bundle,
    sha256_of,
    split_of,
    write_manifest,
)
from tests.tiny import operating_points, parity, remove_routers


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    """A copy of the tiny bundle, to be damaged."""
    return shutil.copytree(tiny_bundle, tmp_path / "damaged")


def damage(bundle, change):
    """Rewrite the manifest after a change of its JSON."""
    document = json.loads((bundle / "manifest.json").read_text())
    change(document)
    (bundle / "manifest.json").write_text(json.dumps(document))


def at(path, value):
    """A change: put `value` at a path such as "macs.experts.0"; Ellipsis removes what is there."""

    def change(document):
        *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
        for key in parents:
            document = document[key]
        if value is ...:
            del document[last]
        else:
            document[last] = value

    return change


def test_a_bundle_says_what_was_written(tiny_bundle):
    """Counts, splits, paths."""
    bundle = read_bundle(tiny_bundle)
    manifest = bundle.manifest
    graphs = manifest.variants["fp32"].graphs

    assert (manifest.name, manifest.version, manifest.n_experts) == ("tiny", "7", 3)
    assert manifest.splits == ("many", "many", "many", "medium", "medium", "few", "few")
    assert [graph.file for graph in graphs] == [
        "trunk.onnx", "expert_0.onnx", "expert_1.onnx", "expert_2.onnx", "router_0.onnx", "router_1.onnx"
    ]  # fmt: skip
    assert all(sha256_of(bundle.graph_path(graph)) == graph.sha256 for graph in graphs)
    assert read_bundle(str(tiny_bundle)).manifest == manifest


def test_reading_and_writing_gives_the_same_bytes(tiny_bundle, bundle):
    """In any order of the provenance's keys, and with a new line at the end."""
    before = (tiny_bundle / "manifest.json").read_bytes()
    manifest = read_bundle(tiny_bundle).manifest
    turned = dataclasses.replace(manifest, provenance=dict(reversed(manifest.provenance.items())))
    write_manifest(bundle, turned)

    assert (bundle / "manifest.json").read_bytes() == before
    assert before.endswith(b"}\n")
    assert before.count(b"\n") > 100  # one value per line: it can be compared
    assert (bundle / "manifest.json").stat().st_mode & 0o777 == 0o644
    assert not [path for path in bundle.iterdir() if path.name.startswith(".")]


def test_names_in_any_script_stay_as_they_are(make_bundle):
    """Readable in the file, too."""
    classes = ("Äpfel", "苹果", "яблоко", "تفاح", "🍎", 'a"b', "a\\b")
    path = make_bundle(classes=classes)

    assert read_bundle(path).manifest.classes == classes
    assert "苹果" in (path / "manifest.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("count", "split"), [(0, "few"), (19, "few"), (20, "medium"), (100, "medium"), (101, "many"), (10**6, "many")]
)
def test_a_class_belongs_to_the_split_of_its_count(count, split):
    """Many: more than 100; few: fewer than 20."""
    assert split_of(count, SplitBounds(many_above=100, few_below=20)) == split


def test_a_directory_without_a_manifest_is_no_bundle(tmp_path):
    """Missing, a file, empty, or with a pipe in its place, which is not waited for."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "manifest.json")
    for path in (tmp_path / "none", tmp_path / "file", tmp_path, tmp_path / "pipe"):
        with pytest.raises(BundleError) as refusal:
            read_bundle(path)
        assert str(refusal.value).startswith(f"{path}: no manifest.json there; expected a bundle")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not JSON (Expecting value"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "cannot be read ("),
        (b"[" * 100_000, "is not JSON ("),
        (b'{"schema_version": NaN}', "is not JSON (NaN is not a finite number)"),
        (b'{"schema_version": -Infinity}', "is not JSON (-Infinity is not a finite number)"),
        (b'{"provenance": 1e999}', "is not JSON (1e999 is not a finite number"),
        (b'{"macs": ' + b"9" * 5000 + b"}", "is not JSON ("),
        (b'{"rule": "router", "rule": "depth"}', "is not JSON (the key 'rule' is there twice)"),
        (b"[]", "the document: is []; expected an object"),
        (b"null", "the document: is None; expected an object"),
        (b"{}", "is missing; expected the keys"),
        (b'{"schema_version": 1, "new": 1}', "schema_version: is 1; this release reads 2"),
        (b'{"schema_version": 3}', "schema_version: is 3; this release reads 2"),
    ],
)
def test_a_manifest_that_is_no_manifest_is_refused(bundle, content, words):
    """Whatever the bytes."""
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError) as refusal:
        read_bundle(bundle)
    assert "manifest.json: " in str(refusal.value)
    assert words in str(refusal.value)


KEYS = [
    "name", "version", "classes", "class_counts", "split_bounds", "split_bounds.many_above", "input", "input.mean",
    "macs.trunk", "macs.routers", "variants", "variants.fp32.trunk", "variants.fp32.experts.1.sha256",
    "variants.fp32.trunk.inputs.0.shape", "variants.fp32.parity", "variants.fp32.parity.images",
    "variants.fp32.parity.checkpoint_accuracy.few", "variants.fp32.precision", "default_variant", "rule", "thresholds",
    "calibration", "calibration.data", "calibration.points.2.accuracy.few", "calibration.points.2.rule",
    "calibration.risk", "provenance", "schema_version",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_refused(bundle, key):
    """By its path, with the keys that belong there."""
    damage(bundle, at(key, ...))
    with pytest.raises(BundleError) as refusal:
        read_bundle(bundle)
    where = shown(key)
    assert str(refusal.value).startswith(f"manifest.json: {where}: is missing; expected the keys [")


RISK = {
    "max_risk": 0.5, "confidence": 0.95, "images": 50, "loss": -0.1, "upper_bound": 0.4, "variants": {"fp32": 0.4},
    "loss_by_split": {"many": 0.0, "medium": None, "few": 1.2},
}  # fmt: skip


def shown(key):
    """A path as messages write it: numbers in brackets."""
    return "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in key.split(".")).lstrip(".")


@pytest.mark.parametrize(
    "key", ["extra", "macs.total", "variants.fp32.scale", "calibration.points.0.note", "input.crop"]
)
def test_an_unknown_key_is_refused(bundle, key):
    """It may be a misspelt one, or meant for a later release."""
    damage(bundle, at(key, 1))
    with pytest.raises(BundleError) as refusal:
        read_bundle(bundle)
    assert str(refusal.value).startswith(f"manifest.json: {shown(key)}: is not known; expected the keys [")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        # types
        ("name", 3, "name: is 3; expected str"),
        ("name", None, "name: is None; expected str"),
        ("name", "", "name, version: are '' and '7'; expected both to be filled in"),
        ("schema_version", "1", "schema_version: is '1'; expected int"),
        ("schema_version", True, "schema_version: is True; expected int"),
        ("classes", "apple", "classes: is 'apple'; expected a list"),
        ("classes", {"0": "apple"}, "expected a list"),
        ("classes.3", 3, "classes[3]: is 3; expected str"),
        ("class_counts.0", 5.0, "class_counts[0]: is 5.0; expected int"),
        ("class_counts.0", True, "class_counts[0]: is True; expected int"),
        ("class_counts.0", "5", "class_counts[0]: is '5'; expected int"),
        ("macs", [1, 2], "macs: is [1, 2]; expected an object"),
        ("variants", [], "variants: is []; expected an object"),
        ("input.mean", [0.5, 0.5], "input.mean: has 2 entries; expected 3"),
        ("input.mean.1", None, "input.mean[1]: is None; expected float"),
        ("input.fit", "pad", "input.fit: is 'pad'; expected one of ['crop', 'inner_crop', 'stretch']"),
        ("input.interpolation", ["bilinear"], "expected one of ['bilinear', 'bicubic']"),
        ("provenance", [], "provenance: is []; expected an object"),
        ("variants.fp32.trunk.inputs.0.shape.1", "H", "shape[1]: is 'H'; expected int"),
        ("thresholds.0", "0.5", "thresholds[0]: is '0.5'; expected float"),
        ("variants.fp32.precision", "fp8", "precision: is 'fp8'; expected one of ['fp32', 'bf16', 'fp16', 'int8']"),
        ("rule", "entropy", "rule: is 'entropy'; expected one of ['router', 'confidence', 'margin', 'agreement', 'dep"),
        ("calibration.points.1.rule", None, "points[1].rule: is None; expected one of ['router'"),
        ("calibration.risk", [], "calibration.risk: is []; expected an object"),
        ("calibration.risk", RISK, None),
        ("name", "x" * 1000, None),
        ("name", ["x" * 1000], "is ['" + "x" * 55 + "...; expected str"),
        # numbers
        ("class_counts.0", 10**400, "class_counts[0]: is 1000"),
        ("thresholds.0", 10**400, "thresholds[0]: is 1000"),
        ("input.mean.0", -(10**400), "input.mean[0]: is -1000"),
        ("macs.trunk", 2**63, "macs.trunk: is 9223372036854775808; expected"),
        ("macs.experts.1", -1, "macs: holds a negative number"),
        ("macs.routers.1", -1, "macs: holds a negative number"),
        ("class_counts.6", -5, "class_counts: holds -5"),
        ("input.height", 0, "input: size is 0x8; expected at least 1x1"),
        ("input.height", 10**9, "input: size is 1000000000x8; expected at least 1x1 and at most 4096x4096"),
        ("input.width", 4097, "input: size is 8x4097; expected at least 1x1 and at most 4096x4096"),
        ("input.std.0", 0, "input.std: is [0.0, 0.25, 0.3]; expected positive numbers"),
        ("thresholds.1", 1.01, "thresholds: is [0.5, 1.01]; expected values in [0, 1]"),
        ("thresholds.1", -0.01, "thresholds: is [0.5, -0.01]"),
        ("variants.fp32.parity.top1_agreement", 1.1, "parity.top1_agreement: is 1.1; expected a share in [0, 1]"),
        ("variants.fp32.parity.accuracy.few", 29.7, None),
        ("variants.fp32.parity.accuracy.few", 29.69, "is 'fp32', which loses 0.31 points in a split; expected one"),
        ("variants.fp32.parity.accuracy.all", 49, "is 'fp32', which loses 0.50 points in a split"),
        ("calibration.risk", RISK | {"confidence": 1.0}, "risk.confidence: is 1.0; expected a probability in (0, 1)"),
        ("calibration.risk", RISK | {"upper_bound": 0.6}, "calibration.risk.upper_bound: is 0.6; expected at most 0.5"),
        ("calibration.risk", RISK | {"confidence": 0.0}, "risk.confidence: is 0.0; expected a probability in (0, 1)"),
        ("calibration.risk", RISK | {"max_risk": 0, "upper_bound": 0}, None),
        ("calibration.risk", RISK | {"max_risk": -5}, "risk.max_risk: is -5.0; expected percentage points in [0, 100]"),
        ("calibration.risk", RISK | {"max_risk": 101}, "risk.max_risk: is 101.0; expected percentage points in [0, 10"),
        ("calibration.risk", RISK | {"images": 0}, "calibration.risk.images: is 0; expected 1 or more"),
        ("calibration.risk", RISK | {"loss": 5e9}, "risk.loss: is 5000000000.0; expected percentage points in [-1"),
        ("calibration.risk", RISK | {"upper_bound": -101}, "risk.upper_bound: is -101.0; expected percentage points"),
        ("calibration.risk", RISK | {"loss_by_split": {"many": 0, "medium": 0, "few": -101}}, "split.few: is -101.0"),
        ("calibration.risk", RISK | {"variants": {"fp32": 101}}, "calibration.risk.variants.fp32: is 101.0; expected"),
        ("calibration.points.0.accuracy.all", 100.5, "accuracy.all: is 100.5; expected a percentage"),
        ("calibration.points.0.accuracy.few", -1, "accuracy.few: is -1"),
        ("split_bounds.few_below", 102, "split_bounds: few_below is 102 and many_above is 100"),
        ("split_bounds.few_below", 101, None),
        ("split_bounds.few_below", -1, "split_bounds: few_below is -1"),
        # against each other
        ("classes", [], "classes: is empty"),
        ("classes.2", "apple", "classes[2]: is 'apple'; expected a name that no other class has"),
        ("classes.2", "", "classes[2]: is ''"),
        ("classes.6", ..., "class_counts: has 7 entries for 6 classes"),
        ("class_counts.6", ..., "class_counts: has 6 entries for 7 classes"),
        ("macs.experts", [], "macs.experts: is empty"),
        ("macs.experts.2", ..., "macs.routers: has 2 entries; expected 1, one for each expert but the last"),
        ("macs.routers.1", ..., "macs.routers: has 1 entries; expected 2"),
        ("thresholds.1", ..., "thresholds: has 1 entries; expected 2, one for each expert but the last"),
        ("variants.fp32.experts.2", ..., "variants.fp32.experts: has 2 entries; expected 3"),
        ("variants.fp32.routers.1", ..., "variants.fp32.routers: has 1 entries; expected 2"),
        ("default_variant", "int8", "default_variant: is 'int8'; the variants are ['fp32']"),
        ("variants", {}, "default_variant: is 'fp32'; the variants are []"),
        ("variants.fp32.precision", "int8", "variants.fp32.precision: is 'int8'; expected 'fp32', as its name says"),
        # calibration
        ("calibration.risk", RISK | {"variants": {"int8": 0}}, "variants: has 'int8'; the variants are ['fp32']"),
        ("calibration.points", [], "calibration.points: has no point of the rule 'router' whose thresholds are all 0"),
        ("calibration.points.4", ..., "calibration.points: has no point of the rule 'router' whose thresholds are all"),
        ("calibration.points.4.rule", "margin", "points: has no point of the rule 'router' whose thresholds"),
        ("calibration.points.1.rule", "margin", "points: has no point of the rule 'margin' whose thresholds"),
        ("rule", "depth", "calibration.points: has no point of the rule 'depth' whose thresholds are all 0"),
        ("calibration.risk", RISK | {"loss_by_split": {"many": 0.0}}, "loss_by_split: has ['many']; expected ['many"),
        ("calibration.points.1.thresholds.0", 2, "calibration.points[1].thresholds: is [2.0, 0.8]"),
        ("calibration.points.1.thresholds.1", ..., "calibration.points[1].thresholds: has 1 entries; expected 2"),
        ("calibration.points.1.experts_share.1", ..., "points[1].experts_share: has 2 entries; expected 3"),
        ("calibration.points.1.experts_share.1", 0.9, "expected shares that add up to 1"),
        ("calibration.points.1.experts_share", [1.5, -0.5, 0], "expected shares that add up to 1"),
        ("calibration.points.3.mean_experts", 1.05, "points[3].mean_experts: is 1.05; the shares make it 1.9"),
        ("calibration.points.1.mean_macs", -0.5, "points[1].mean_macs: is -0.5; expected more than 0"),
        ("calibration.images", 0, "calibration.images: is 0; expected 1 or more"),
        ("variants.fp32.parity.images", -9, "parity.images: is -9; expected 1 or more"),
        ("variants.fp32.parity.max_abs_logit_difference", -0.5, "is -0.5; expected 0 or more"),
        ("variants.fp32.parity.mean_experts", 0.5, "parity.mean_experts: is 0.5; expected 1 or more"),
        ("calibration.points.3.mean_experts", 3.5, "points[3].mean_experts: is 3.5; expected 1 to 3"),
        ("calibration.points.3.mean_experts", 0.5, "points[3].mean_experts: is 0.5; expected 1 to 3"),
        # tensors
        ("variants.fp32.trunk.inputs.0.name", "image", "fp32.trunk.inputs: are ['image']; expected ['images']"),
        ("variants.fp32.trunk.inputs.0.dtype", "float32", "trunk.onnx: 'images': is float32; expected uint8"),
        ("variants.fp32.trunk.inputs.0.shape", [None, 3, 8, 8], "has shape [None, 3, 8, 8]; expected [None, 8, 8, 3]"),
        ("variants.fp32.trunk.inputs.0.shape", [1, 8, 8, 3], "has shape [1, 8, 8, 3]; expected [None, 8, 8, 3]"),
        ("variants.fp32.trunk.outputs.0.dtype", "int64", "'features': is int64; expected float32 or float16"),
        ("variants.fp32.trunk.outputs.0.shape", [], "has shape []; expected the first axis, and it alone, to be free"),
        ("variants.fp32.trunk.outputs.0.shape", [4, 4], "expected the first axis, and it alone, to be free"),
        ("variants.fp32.trunk.outputs.0.shape", [None, None], "expected the first axis, and it alone, to be free"),
        ("variants.fp32.trunk.outputs", [], "variants.fp32.trunk.outputs: are []; expected ['features']"),
        ("variants.fp32.experts.1.inputs.0.shape", [None, 9], "expert_1.onnx: 'features': has shape [None, 9]"),
        ("variants.fp32.experts.1.inputs.1.shape", [None, 9], "'logits_sum': has shape [None, 9]; expected [None, 7]"),
        ("variants.fp32.experts.1.outputs.0.shape", [None, 100], "'new_logits_sum': has shape [None, 100]"),
        ("variants.fp32.experts.1.outputs.0.dtype", "float16", "'new_logits_sum': is float16; expected float32"),
        ("variants.fp32.routers.0.inputs.0.shape", [None, 6], "router_0.onnx: 'expert_feature': has shape [None, 6]"),
        ("variants.fp32.routers.0.outputs.0.shape", [None, 1], "'score': has shape [None, 1]; expected [None]"),
        ("variants.fp32.routers.0.outputs.0.name", "logit", "routers[0].outputs: are ['logit']; expected ['score']"),
        # files
        ("variants.fp32.trunk.file", "trunk2.onnx", "trunk2.onnx: is missing; manifest.json lists it"),
        ("variants.fp32.trunk.file", "", ": is missing; manifest.json lists it"),
        ("variants.fp32.trunk.file", ".", "is missing"),
        ("variants.fp32.trunk.file", "a\0b", "is missing"),
        ("variants.fp32.trunk.file", "a" * 5000, "cannot be read ("),
        ("variants.fp32.trunk.file", "../damaged/trunk.onnx", "file '../damaged/trunk.onnx' leaves the bundle"),
        ("variants.fp32.trunk.file", "a/../../x", "leaves the bundle"),
        ("variants.fp32.trunk.file", "/etc/passwd", "file '/etc/passwd' leaves the bundle; expected a path inside it"),
        ("variants.fp32.trunk.file", "..\\x", "leaves the bundle"),
        ("variants.fp32.trunk.sha256", "0" * 64, "lists " + "0" * 64 + "; was it copied whole?"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_not_so_is_refused(bundle, key, value, words):
    """With the place, what was found and what was expected."""
    damage(bundle, at(key, value))
    if words is None:
        read_bundle(bundle)
        return
    with pytest.raises(BundleError) as refusal:
        read_bundle(bundle)
    assert words in str(refusal.value)
    assert len(str(refusal.value)) < 700


def test_a_model_without_routers_is_a_bundle(bundle):
    """It has another rule than the router's, in the calibration too; some routers are as wrong as too many."""
    manifest = read_bundle(remove_routers(bundle, "margin")).manifest
    assert (manifest.n_experts, manifest.macs.routers, manifest.variants["fp32"].routers) == (3, (), ())

    points = sorted(operating_points(3) + operating_points(3, "margin"), key=lambda point: point.mean_experts)
    for changed in ({"rule": "router"}, {"calibration": dataclasses.replace(manifest.calibration, points=points)}):
        with pytest.raises(BundleError, match="the rule 'router' has nothing to ask; expected another rule"):
            dataclasses.replace(manifest, **changed)
    with pytest.raises(BundleError, match=r"variants.fp32.routers: has 0 entries; expected 2, as many as macs.routers"):
        dataclasses.replace(manifest, macs=dataclasses.replace(manifest.macs, routers=(12, 12)))


def test_strings_that_cannot_be_written_are_refused(bundle):
    """Half of a surrogate pair is valid JSON, and no answer could hold it."""
    (bundle / "manifest.json").write_text((bundle / "manifest.json").read_text().replace('"apple"', '"\\ud800"'))
    with pytest.raises(BundleError, match="surrogates not allowed"):
        read_bundle(bundle)


def test_a_changed_graph_is_refused_with_both_checksums(bundle):
    """One byte is enough."""
    listed = sha256_of(bundle / "expert_1.onnx")
    content = bytearray((bundle / "expert_1.onnx").read_bytes())
    content[-1] ^= 1
    (bundle / "expert_1.onnx").write_bytes(content)

    with pytest.raises(BundleError) as refusal:
        read_bundle(bundle)
    found = sha256_of(bundle / "expert_1.onnx")
    assert str(refusal.value) == (
        f"expert_1.onnx: has sha256 {found}, manifest.json lists {listed}; was it copied whole?"
    )  # fmt: skip


@pytest.mark.parametrize("directory", [False, True])
def test_a_missing_graph_is_refused(bundle, directory):
    """Also where a directory has its name."""
    (bundle / "router_1.onnx").unlink()
    if directory:
        (bundle / "router_1.onnx").mkdir()
    with pytest.raises(BundleError, match=r"^router_1.onnx: is missing; manifest.json lists it$"):
        read_bundle(bundle)


def test_a_link_out_of_the_bundle_is_refused_and_one_inside_is_not(bundle, tmp_path):
    """Also through a linked directory; a bundle may itself be reached by a link."""
    shutil.move(bundle / "trunk.onnx", tmp_path / "elsewhere.onnx")
    (bundle / "trunk.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(BundleError, match=r"^trunk.onnx: is a link out of the bundle, to .*elsewhere.onnx; expected"):
        read_bundle(bundle)

    (bundle / "sub").symlink_to(tmp_path)
    damage(bundle, at("variants.fp32.trunk.file", "sub/elsewhere.onnx"))
    with pytest.raises(BundleError, match=r"^sub/elsewhere.onnx: is a link out of the bundle"):
        read_bundle(bundle)

    shutil.move(tmp_path / "elsewhere.onnx", bundle / "store.onnx")
    (bundle / "trunk.onnx").unlink()
    (bundle / "trunk.onnx").symlink_to("store.onnx")
    damage(bundle, at("variants.fp32.trunk.file", "trunk.onnx"))
    (tmp_path / "current").symlink_to(bundle)
    assert read_bundle(tmp_path / "current").manifest.name == "tiny"


def test_what_reading_would_refuse_is_not_written(tiny_bundle, bundle):
    """And the manifest that was there stays, with nothing beside it."""
    manifest = read_bundle(tiny_bundle).manifest
    before = sorted((path.name, path.read_bytes()) for path in bundle.iterdir())
    fp32 = manifest.variants["fp32"]
    elsewhere = dataclasses.replace(fp32, trunk=dataclasses.replace(fp32.trunk, file="elsewhere.onnx"))
    for change, words in (
        ({"provenance": {"seed": float("nan")}}, "cannot be written as JSON"),
        ({"provenance": {"seed": object()}}, "cannot be written as JSON"),
        ({"provenance": {"commit": "\ud800"}}, "surrogates not allowed"),
        ({"name": 7}, "name: is 7; expected str"),
        ({"variants": {"fp32": elsewhere}}, "elsewhere.onnx: is missing"),
    ):
        with pytest.raises(BundleError, match=words):
            write_manifest(bundle, dataclasses.replace(manifest, **change))
    assert sorted((path.name, path.read_bytes()) for path in bundle.iterdir()) == before


def test_inconsistent_manifests_cannot_even_be_made(tiny_bundle):
    """The same rules in code as on disk."""
    manifest = read_bundle(tiny_bundle).manifest
    with pytest.raises(BundleError, match="default_variant"):
        dataclasses.replace(manifest, default_variant="int8")
    with pytest.raises(BundleError, match="schema_version: is 3; this release reads 2"):
        dataclasses.replace(manifest, schema_version=SCHEMA_VERSION + 1)
    with pytest.raises(BundleError, match="parity"):
        dataclasses.replace(parity(0.0), top1_agreement=2.0)


def test_an_interrupted_write_leaves_the_old_manifest(tiny_bundle, bundle, monkeypatch):
    """Whole, with nothing beside it."""
    before = sorted((path.name, path.read_bytes()) for path in bundle.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_manifest(bundle, dataclasses.replace(read_bundle(tiny_bundle).manifest, version="8"))
    assert sorted((path.name, path.read_bytes()) for path in bundle.iterdir()) == before


def test_a_variant_lists_its_graphs_in_the_order_in_which_they_run():
    """Trunk, experts, routers."""
    tensor = TensorSpec("x", "float32", (None,))
    graphs = [GraphSpec(f"{number}.onnx", "", (tensor,), (tensor,)) for number in range(4)]
    assert Variant("fp32", graphs[0], (graphs[1], graphs[2]), (graphs[3],), parity(0.0)).graphs == tuple(graphs)


def test_a_variant_is_faithful_as_long_as_no_split_loses_more_than_is_allowed(make_bundle):
    """Such a one may stand in the bundle, but cannot be the default."""
    bundle = read_bundle(make_bundle(losses={"fp32": 0.0, "bf16": MAX_VARIANT_LOSS, "int8": 0.41}))
    manifest = bundle.manifest

    assert {name: variant.faithful for name, variant in manifest.variants.items()} == {
        "fp32": True, "bf16": True, "int8": False
    }  # fmt: skip
    assert manifest.variants["int8"].parity.largest_loss == pytest.approx(0.41)
    with pytest.raises(BundleError, match=r"default_variant: is 'int8', which loses 0\.41 points in a split"):
        dataclasses.replace(manifest, default_variant="int8")


@pytest.mark.parametrize("name", ["x y", "", "fp32\n", "int8/", "ïnt8", "x" * 41])
def test_the_name_of_a_variant_is_a_short_word(make_bundle, name):
    """It is typed as a setting and labels metrics. It need not be its precision."""
    manifest = read_bundle(make_bundle()).manifest
    fp32 = manifest.variants["fp32"]
    with pytest.raises(BundleError, match=r"variants: has '.*; expected 1 to 40 letters, digits, '\.', '_' and '-'"):
        dataclasses.replace(manifest, variants={"fp32": fp32, name: fp32})
    for word in ("INT8_per-channel.2", "x" * 40):
        dataclasses.replace(manifest, variants={"fp32": fp32, word: fp32})


def test_a_variant_that_broke_the_bound_on_the_risk_is_not_served_unasked(make_bundle):
    """However faithful it is otherwise; at the bound it may be."""
    manifest = read_bundle(make_bundle(losses={"fp32": 0.0, "fp16": 0.0, "int8": 0.0})).manifest
    risk = Risk(**RISK | {"variants": {"fp16": 0.5, "int8": 0.51}})
    manifest = dataclasses.replace(manifest, calibration=dataclasses.replace(manifest.calibration, risk=risk))

    assert {name for name in manifest.variants if manifest.may_serve(name)} == {"fp32", "fp16"}


def test_what_a_variant_loses_is_what_the_worst_split_loses():
    """Not all of them together."""
    found = parity(0.2)
    lower = dataclasses.replace(found.accuracy, all=49.4, many=59.75)
    assert dataclasses.replace(found, accuracy=lower).largest_loss == 0.25


def test_points_are_chosen_by_accuracy_then_by_cost():
    """Losses count against all experts, though fewer may be better; among points alike, the cheaper or the better."""

    def point(mean_experts, accuracy, macs):
        first, *_ = operating_points(3)
        right = dataclasses.replace(first.accuracy, all=accuracy)
        return dataclasses.replace(first, accuracy=right, mean_experts=mean_experts, mean_macs=macs)

    points = (point(1, 49, 10), point(1.5, 51, 12), point(1.6, 51, 13), point(1.7, 51.5, 13), point(3, 50, 20))
    table = Calibration("", 100, points, None)

    assert table.cheapest("router", 1.0) == points[0]
    assert table.cheapest("router", 0.9) == points[1]
    assert table.cheapest("router", -1.2) == points[3]
    assert table.most_accurate("router", 1.6) == points[1]
    assert table.most_accurate("router", 3) == points[3]
    equals = Calibration("", 100, (point(1, 49, 10), point(1, 49.5, 10), point(3, 50, 20)), None)
    assert equals.cheapest("router", 1.0).accuracy.all == 49.5


def test_a_loss_of_just_what_is_allowed_is_allowed():
    """54.6 less 0.3 is a little more than 54.3 in floating point."""
    first, *_ = operating_points(3)
    points = tuple(
        dataclasses.replace(first, accuracy=dataclasses.replace(first.accuracy, all=accuracy), mean_experts=used)
        for accuracy, used in ((54.3, 1.0), (54.6, 2.0))
    )
    points = (points[0], dataclasses.replace(points[1], mean_macs=2 * first.mean_macs))
    assert Calibration("", 100, points, None).cheapest("router", 0.3) == points[0]
    assert Calibration("", 100, points, None).cheapest("router", 0.29) == points[1]


def test_a_table_out_of_order_is_refused(make_bundle):
    """Whoever reads it takes its first point for the thriftiest."""
    manifest = read_bundle(make_bundle()).manifest
    points = manifest.calibration.points[::-1]
    with pytest.raises(BundleError, match="is not in the order of mean_experts; expected it to ascend"):
        dataclasses.replace(manifest, calibration=dataclasses.replace(manifest.calibration, points=points))


def test_operating_points_of_several_rules_stand_in_one_table(make_bundle):
    """In the order of their experts, each rule with its own point for all; a rule's are chosen among its own."""
    points = sorted(operating_points(3) + operating_points(3, "depth"), key=lambda point: point.mean_experts)
    calibration = dataclasses.replace(read_bundle(make_bundle()).manifest.calibration, points=tuple(points))
    manifest = read_bundle(make_bundle(calibration=calibration, rule="depth")).manifest

    assert manifest.rule == "depth"
    assert [point.rule for point in manifest.calibration.points[:2]] == ["router", "depth"]
    assert manifest.default_point.rule == manifest.calibration.most_accurate("depth", 3).rule == "depth"
