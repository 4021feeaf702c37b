"""The checkpoints that RIDE's authors publish: same answers as theirs, and nothing in a file is ever run."""

import os
import pickle
import re
import shutil
import struct
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from model_export.__main__ import main
from model_export.authors import read_published
from model_export.bundle import read_bundle
from model_export.parity import run_variant
from model_export.torch_file import TorchFileError, open_torch_file
from tests.model_export.published import every_expert, make_routers_differ, routed, save, state_dict
from training.checkpoint import CheckpointError
from training.data.sets import Images
from training.evaluate import mean_logits, predict, route
from training.recipe import RecipeError
from training.recipes import RECIPES

SMALL = ["--set", "profile=natural", "--set", "image_size=16", "--set", "holdout_share=0.3"]


def noise(count, size, seed=0):
    """(B, H, W, 3), uint8, of which some images are darker than others."""
    generator = torch.Generator().manual_seed(seed)
    bright = torch.randint(40, 256, (count, 1, 1, 3), generator=generator)
    return (torch.rand(count, size, size, 3, generator=generator) * bright).to(torch.uint8)


@pytest.mark.parametrize(
    ("arch", "n_experts", "n_classes", "tensors"),
    [("ResNet32Model", 3, 100, 429), ("ResNet32EAModel", 3, 100, 435),
     ("ResNet50EAModel", 3, 40, 675), ("ResNeXt50EAModel", 2, 40, 498)],
)  # fmt: skip
def test_a_published_file_gives_the_authors_answers(arch, n_experts, n_classes, tensors, tmp_path):
    """As many tensors as published; the logits of every expert, the routers' decisions and the experts used."""
    state = state_dict(arch, n_experts, n_classes)
    assert len(state) == tensors
    images = noise(24, 32)
    if "EA" in arch:
        make_routers_differ(arch, state, images)
    published = read_published(save(tmp_path / "model.pth", arch, state), {})

    logits, asked = every_expert(arch, state, images)
    found = predict(published.model, Images(images, torch.zeros(24, dtype=torch.int64)))
    np.testing.assert_allclose(found.expert_logits, logits.numpy(), atol=2e-4)
    assert (published.arch, published.epoch, published.recipe.reduced) == (arch, 200, True)
    if "EA" not in arch:
        assert published.model.routers is None
        return
    answers, used = routed(logits, asked)
    ours = route(found.router_scores, (0.5,) * (n_experts - 1))
    np.testing.assert_allclose(found.router_scores, torch.sigmoid(asked).numpy(), atol=2e-4)
    assert ours.tolist() == used.tolist()
    assert set(used.tolist()) == set(range(1, n_experts + 1))
    np.testing.assert_allclose(mean_logits(found.expert_logits, ours), answers.numpy(), atol=2e-4)


@pytest.mark.parametrize(
    ("arch", "shape", "prefix"),
    [
        ("ResNet32EAModel", {"n_experts": 2, "n_classes": 40, "reduced": False}, ""),
        ("ResNet32EAModel", {"n_experts": 4, "n_classes": 40, "cosine": False, "top_k": 20, "n_hidden": 8}, "module."),
        ("ResNet32Model", {"n_experts": 6, "n_classes": 48}, "module."),
        ("ResNet32Model", {"n_experts": 2, "n_classes": 48, "cosine": False}, ""),
        ("ResNet10Model", {"n_experts": 2, "n_classes": 40}, "module."),
        ("ResNet10EAModel", {"n_experts": 3, "n_classes": 40, "reduced": False}, ""),
    ],
)
def test_width_heads_and_routers_are_read_off_the_shapes(arch, shape, prefix, tmp_path):
    """Full or reduced, cosine or linear (with as many classes as features, too), on one or several devices."""
    state = state_dict(arch, **shape)
    file = save(tmp_path / "model.pth", arch, {prefix + name: tensor for name, tensor in state.items()})
    published = read_published(file, {})

    recipe, images = published.recipe, noise(6, 32)
    expected = (shape["n_experts"], shape.get("reduced", True), "cosine" if shape.get("cosine", True) else "linear")
    assert (recipe.n_experts, recipe.reduced, recipe.classifier) == expected
    assert ("cosine_scale" in published.assumed) == (recipe.classifier == "cosine")
    logits, asked = every_expert(arch, state, images)
    with torch.no_grad():
        outputs = published.model.net(images)
        np.testing.assert_allclose(outputs.expert_logits, logits, atol=1e-3)
        if "EA" in arch:
            assert (recipe.router_top_k, recipe.router_hidden) == (shape.get("top_k", 30), shape.get("n_hidden", 16))
            np.testing.assert_allclose(published.model.routers(outputs), asked, atol=1e-3)


def test_the_format_before_torch_1_6_is_read_too(tmp_path):
    """Every tensor the same."""
    state = state_dict("ResNet32EAModel", 2, 40)
    old, new = (
        read_published(save(tmp_path / f"{stream}.pth", "ResNet32EAModel", state, stream=stream), {}).model.state_dict()
        for stream in (True, False)
    )
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickles_is_read(protocol, tmp_path):
    """Tensors, parameters, what is there twice, and a tuple that holds a list that holds it."""
    twice, around = torch.arange(4.0), []
    around.append((around, 1, 2, 3))
    content = {"twice": [twice, twice], "parameter": torch.nn.Parameter(twice + 1), "set": {5}, "around": around[0]}
    content["none"] = torch.empty(0, 3)
    torch.save(content, tmp_path / "model.pth", pickle_protocol=protocol)

    with open_torch_file(tmp_path / "model.pth") as opened:
        found = opened.content
        assert [opened.tensor(tensor).tolist() for tensor in found["twice"]] == [[0, 1, 2, 3]] * 2
        assert opened.tensor(found["parameter"]).tolist() == [1, 2, 3, 4]
        assert opened.tensor(found["none"]).shape == (0, 3)
        assert found["around"][0][0] is found["around"]
        assert found.keys() == content.keys()


def test_half_precision_and_views_are_read_as_the_numbers_they_stand_for(tmp_path):
    """A file of fp16 weights, of which one is a transposed part of a larger storage."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in state_dict("ResNet32Model", 2, 40).items()}
    whole = torch.randn(100, 60).half()
    state["backbone.linears.1.weight"] = whole[7:47, 5:53].T
    model = read_published(save(tmp_path / "model.pth", "ResNet32Model", state), {}).model

    assert torch.equal(model.net.experts[1].classifier.weight, whole[7:47, 5:53].float())


def test_what_the_file_does_not_say_is_taken_from_the_caller(tmp_path):
    """Normalisation and scale move the answers; what the file does say cannot be set, nor what trains."""
    state, images = state_dict("ResNet32Model", 2, 40), noise(4, 32)
    file = save(tmp_path / "model.pth", "ResNet32Model", state)
    with torch.no_grad():
        usual = read_published(file, {}).model.net(images).expert_logits
        halved = read_published(file, {"cosine_scale": "15"}).model.net(images).expert_logits
        shifted = read_published(file, {"mean": "0,0,0", "std": "1,1,1"}).model.net(images).expert_logits
    assert torch.allclose(usual, 2 * halved)
    assert not torch.allclose(usual, shifted, atol=0.1)
    for settings in ({"n_experts": "3"}, {"lr": "1"}, {"colour": "blue"}):
        with pytest.raises(RecipeError, match=r"cannot be set for a published checkpoint; what can is data, profile"):
            read_published(file, settings)
    with pytest.raises(RecipeError, match="mean and std: must be the numbers that the published model"):
        read_published(file, {"mean": "none", "std": "none"})


def renamed(state, old, new):
    return {name.replace(old, new): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: s | {"backbone.layer2s.1.3.bn2.bias": torch.zeros(25)},
         "tensor backbone.layer2s.1.3.bn2.bias is (25,); ResNet32EAModel with 2 experts has (24,)"),
        (lambda s: {k: v for k, v in s.items() if k != "backbone.layer1.4.conv2.weight"},
         "tensor backbone.layer1.4.conv2.weight is missing; ResNet32EAModel with 2 experts has (16, 16, 3, 3)"),
        (lambda s: s | {"backbone.layer1.5.conv1.weight": torch.zeros(1, 2)},
         "tensor backbone.layer1.5.conv1.weight is (1, 2); ResNet32EAModel with 2 experts has no such"),
        (lambda s: renamed(s, "layer2s.1", "layer2s.2"), "backbone.layer2s.1.0.conv1.weight is missing"),
        (lambda s: renamed(s, "backbone.", ""), "tensor conv1.weight is unexpected; all names begin with backbone."),
        (lambda s: {"module." + k if "bn1" in k else k: v for k, v in s.items()}, "module.backbone.bn1.weight is unex"),
        (lambda s: renamed(s, "linears.1", "linears.7"), "backbone.linears.E.weight of 1 experts; read are 2 to 6"),
        (lambda s: s | {"backbone.linears.0.weight": torch.zeros(47, 40)},
         "backbone.linears.0.weight is (47, 40); ResNet32EAModel has (48, 40), or (64, 40) at full width"),
        (lambda s: s | {"backbone.linears.0.weight": torch.zeros(48)}, "linears.0.weight is (48,); expected a matrix"),
        (lambda s: s | {"backbone.linears.0.weight": torch.zeros(48, 0)}, "weight is (48, 0); expected a matrix"),
        (lambda s: s | {"backbone.linears.1.weight": torch.zeros(40, 48)},
         "backbone.linears.1.weight is (40, 48); ResNet32EAModel with 2 experts has (48, 40)"),
        (lambda s: s | {"backbone.expert_help_pred_fc.weight": torch.zeros(1, 57)},
         "expert_help_pred_fc.weight takes 57 values, 16 of them hidden ones; that leaves 41 of the logits of 40"),
        (lambda s: s | {"backbone.expert_help_pred_fc.weight": torch.zeros(1, 16)}, "leaves 0 of the logits of 40"),
        (lambda s: {k: v for k, v in s.items() if "pred_fc" not in k}, "expert_help_pred_fc.weight is missing"),
        (lambda s: s | {"backbone.expert_help_pred_hidden_fcs.0.weight": torch.zeros(16, 64)},
         "expert_help_pred_hidden_fcs.0.weight is (16, 64); ResNet32EAModel has (16, 48)"),
        (lambda s: s | {"backbone.bn1.weight": torch.full((16,), torch.nan)}, "bn1.weight holds values that are not"),
        (lambda s: s | {"backbone.bn1.bias": torch.full((16,), -torch.inf)}, "bn1.bias holds values that are not"),
        (lambda s: s | {"backbone.bn1.weight": torch.full((16,), 1e300, dtype=torch.float64)},
         "bn1.weight holds values that are not finite in torch.float32"),
        (lambda s: s | {"backbone.bn1.weight": torch.ones(16, dtype=torch.int32)}, "bn1.weight is of torch.int32, not"),
        (lambda s: s | {"backbone.bn1.weight": torch.ones(1).expand(16)}, "(16,) is larger than what is stored"),
        (lambda s: s | {"backbone.linears.0.weight": torch.ones(1, 1).expand(48, 10**12)}, "larger than what is"),
        (lambda s: s | {"backbone.bn1.weight": [1.0] * 16}, "backbone.bn1.weight is no tensor"),
        (lambda s: {}, "the state_dict is empty"),
    ],
)  # fmt: skip
def test_a_file_of_another_network_is_refused_with_the_first_difference(spoil, words, tmp_path):
    """Which tensor, and both shapes."""
    file = save(tmp_path / "model.pth", "ResNet32EAModel", spoil(state_dict("ResNet32EAModel", 2, 40)))
    with pytest.raises(CheckpointError) as refusal:
        read_published(file, {})
    assert str(refusal.value).startswith(f"{file}: ")
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds no dictionary"),
        ({"epoch": 1, "state_dict": {}, "notes": ""}, "field arch is missing; the file has epoch, state_dict, notes"),
        ({"arch": "ResNet32Model", "state_dict": {}}, "the field epoch is missing; the file has arch, state_dict"),
        ({"arch": "ResNet32Model", "epoch": 1}, "the field state_dict is missing"),
        ({}, "the field arch is missing; the file has none"),
        ({"arch": "ResNet32Model", "epoch": "1", "state_dict": {}}, "the field epoch is no int"),
        ({"arch": "ResNet32Model", "epoch": 1, "state_dict": []}, "the field state_dict is no dict"),
        ({"arch": "VGG16", "epoch": 1, "state_dict": {"backbone.x": torch.zeros(1)}},
         "arch is 'VGG16'; read are ResNet32, ResNet10, ResNet50, ResNeXt50, each with Model or EAModel behind"),
        ({"arch": "ResNet32EAModelX", "epoch": 1, "state_dict": {"backbone.x": torch.zeros(1)}}, "arch is 'ResNet32EA"),
        ({"arch": "ResNet32Model", "epoch": 1, "state_dict": {"backbone.x": torch.zeros(1)}}, "of 0 experts"),
    ],
)  # fmt: skip
def test_a_file_without_what_a_checkpoint_has_is_refused(content, words, tmp_path):
    """Which field is missing or of another kind."""
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(CheckpointError) as refusal:
        read_published(tmp_path / "model.pth", {})
    assert words in str(refusal.value)


class Attack:
    """Pickles as a call of `function`; what it would do shows on the disk."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


def attacks(canary):
    """Calls that would each make the file `canary`."""
    system, code = Attack(os.system, f"touch {canary}"), f"open({str(canary)!r}, 'w').close()"
    return {
        "system": system,
        "eval": Attack(eval, code),
        "exec": Attack(exec, code),
        "nested": {"a": [("b", {"c": [Attack(eval, code)]})]},
        "argument": Attack(dict, [("x", system)]),
        "getattr": Attack(getattr, Attack(__import__, "os"), "system"),
        "state": Attack(torch.nn.Linear, 1, 1, state={"forward": system, "__dict__": Attack(eval, code)}),
        "slots": Attack(torch.nn.Linear, 1, 1, state=(None, {"__call__": system})),
        "rebuild": Attack(torch._utils._rebuild_parameter, system, True, {}),
        "partial": Attack(pickle.loads, pickle.dumps(system)),
    }


@pytest.mark.parametrize("where", ["config", "extra", "criterion"])
@pytest.mark.parametrize("stream", [False, True], ids=["zip", "stream"])
@pytest.mark.parametrize("attack", attacks(""))
def test_code_in_a_file_is_never_run(attack, stream, where, tmp_path):
    """Calls of functions beside the weights become inert, and the file is read; torch's own loader would run them."""
    canary = tmp_path / "canary"
    evil = attacks(canary)[attack]
    file = tmp_path / "model.pth"
    torch.save({"arch": "ResNet32Model", "epoch": 3, "state_dict": {}, where: evil}, file,
               _use_new_zipfile_serialization=not stream)  # fmt: skip
    with open_torch_file(file) as opened:
        assert opened.content["arch"] == "ResNet32Model"
    with pytest.raises(CheckpointError, match="the state_dict is empty"):
        read_published(file, {})
    assert not canary.exists()


def test_a_state_dict_that_is_a_call_is_refused(tmp_path):
    """It stays what it is: no dictionary."""
    canary = tmp_path / "canary"
    torch.save({"arch": "ResNet32Model", "epoch": 3, "state_dict": attacks(canary)["eval"]}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="the field state_dict is no dict"):
        read_published(tmp_path / "model.pth", {})
    state = {"backbone.conv1.weight": attacks(canary)["system"]}
    torch.save({"arch": "ResNet32Model", "epoch": 3, "state_dict": state}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"backbone\.conv1\.weight is no tensor"):
        read_published(tmp_path / "model.pth", {})
    assert not canary.exists()


def test_no_module_that_a_file_names_is_imported(tmp_path, monkeypatch):
    """Neither one that exists nor one that does not."""
    (tmp_path / "parse_config.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()\nclass ConfigParser: 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    file = save(tmp_path / "model.pth", "ResNet32Model", state_dict("ResNet32Model", 2, 40))
    before = set(sys.modules)
    read_published(file, {})
    assert "parse_config" not in set(sys.modules) - before
    assert not (tmp_path / "canary").exists()


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def identity(kind=b"FloatStorage", key=b"0", numel=b"K\x04", more=b""):
    """The opcodes of a persistent id."""
    name = struct.pack("<I", len(key)) + key
    return b"(X\x07\x00\x00\x00storagectorch\n" + kind + b"\nX" + name + b"X\x03\x00\x00\x00cpu" + numel + more + b"tQ"


def tensor(offset=b"K\x00", shape=b"K\x02K\x02\x86", strides=b"K\x02K\x01\x86", **storage):
    """The opcodes of a 2x2 tensor in a storage of four numbers."""
    return TENSOR + b"(" + identity(**storage) + offset + shape + strides + b"\x89Ntr"[:-1] + b"R"


@pytest.mark.parametrize(
    ("opcodes", "words"),
    [
        (tensor(offset=b"K\x01"), "a tensor of shape (2, 2) that reaches number 4 of storage '0', which holds 4"),
        (tensor(offset=b"J\xff\xff\xff\xff"), "whose offset, shape or strides cannot be"),
        (tensor(shape=b"K\x02\x85"), "whose offset, shape or strides cannot be"),
        (tensor(shape=b"\x88K\x02\x86"), "whose offset, shape or strides cannot be"),
        (tensor(shape=b"(" + 9 * b"K\x01" + b"t", strides=b"(" + 9 * b"K\x01" + b"t"), "shape or strides cannot be"),
        (tensor(numel=b"\x8a\x09" + bytes(8) + b"\x01"), "storage '0' is said to hold 18446744073709551616 numbers"),
        (tensor(strides=b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"), "that reaches number 4294967294 of storage"),
        (tensor(numel=b"J\xff\xff\xff\xff"), "storage '0' is said to hold -1 numbers"),
        (tensor(kind=b"QInt8Storage"), "is a torch.QInt8Storage; read are BFloat16Storage, BoolStorage"),
        (tensor(more=b"K\x01K\x02\x86"), "holds storages that are parts of others"),
        (tensor() + b"0" + tensor(numel=b"K\x05"), "storage '0' has two sizes or types"),
        (TENSOR + b"K\x01\x85R", "a tensor without storage, offset, shape and strides"),
        (b"K\x01Q", "has a persistent id that names no storage"),
        (b"K\x01e", "is no pickle, or a damaged one"),
        (b"P0\n", "opcode PERSID is none that torch.save writes"),
        (b"\x82\x01", "opcode EXT1 is none that torch.save writes"),
        (b"h\x07", "is no pickle, or a damaged one (KeyError"),
        (b"\x86", "is no pickle, or a damaged one (IndexError"),
        (b"K\x01K\x02e", "is no pickle, or a damaged one (IndexError"),
        (b"K\x01K\x02a", "is no pickle, or a damaged one (TypeError: a int where list is expected"),
        (b"}](K\x01es", "is no pickle, or a damaged one"),
        (b"}]K\x01s", "a dictionary has a key that is a list"),
        (b"}cos\nsystem\nK\x01s", "a dictionary has a key that is a Global"),
        (b"}\x8a\x09\x01\x00\x00\x00\x00\x00\x00\x00\x01K\x01s", "a dictionary has a key that is a int"),
        (b"I" + b"9" * 5000 + b"\n", "is no pickle, or a damaged one (ValueError"),
        (b"X\xff\xff\xff\x7fabc", "is no pickle, or a damaged one (ValueError"),
        (b"\xff", "is no pickle, or a damaged one (ValueError"),
    ],
)
def test_pickles_that_torch_never_writes_are_refused(opcodes, words, tmp_path):
    """By the pickle's own interpreter, with a reason and no traceback of its own."""
    file = tmp_path / "model.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02" + opcodes + b".")
        archive.writestr("model/data/0", bytes(16))
    with pytest.raises(TorchFileError) as refusal, open_torch_file(file):
        pass
    assert str(refusal.value).startswith(f"{file}: ")
    assert words in str(refusal.value)


def test_a_tensor_larger_than_its_file_is_refused(tmp_path):
    """Before a network of its size is built, which no memory would hold."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value: int) -> bytes:
        return b"\x8a\x08" + value.to_bytes(8, "little")

    shape, strides = number(48) + number(10**12) + b"\x86", number(1) + number(48) + b"\x86"
    head = tensor(shape=shape, strides=strides, numel=number(48 * 10**12))
    state = b"}" + text("backbone.linears.0.weight") + head + b"s" + text("backbone.linears.1.weight") + head + b"s"
    fields = {"arch": text("ResNet32Model"), "epoch": b"K\x01", "state_dict": state}
    content = b"".join(text(name) + value + b"s" for name, value in fields.items())
    file = archive_of(tmp_path / "model.pth", **{"data.pkl": b"\x80\x02}" + content + b"."})
    with pytest.raises(CheckpointError, match=r"of shape \(48, 1000000000000\) is larger than what is stored"):
        read_published(file, {})


def test_nesting_of_any_depth_is_no_matter(tmp_path):
    """A hundred thousand lists in lists, and a list that doubles forty times."""
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        bomb = b"]q\x00" + b"(h\x00h\x00lq\x00" * 40
        archive.writestr("model/data.pkl", b"\x80\x02(" + b"(" * 100_000 + b"l" * 100_000 + bomb + b"l.")
    with open_torch_file(tmp_path / "model.pth") as opened:
        assert isinstance(opened.content, list)


def archive_of(file, **entries):
    """A zip archive with the opcodes of one good tensor, and its entries replaced (None: left out)."""
    content = {"data.pkl": b"\x80\x02" + tensor() + b".", "data/0": bytes(range(16)), "byteorder": b"little"}
    with zipfile.ZipFile(file, "w") as archive:
        for name, value in (content | entries).items():
            if value is not None:
                archive.writestr(f"model/{name}", value)
    return file


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"data/0": bytes(12)}, "data/0 has 12 bytes, its tensors say 16"),
        ({"data/0": bytes(20)}, "data/0 has 20 bytes, its tensors say 16"),
        ({"data/0": None}, "data/0 is missing in the archive"),
        ({"data.pkl": None}, "is a zip archive, but not torch's"),
        ({"byteorder": b"big"}, "was written on a big-endian machine"),
        ({"constants.pkl": b"x"}, "is a TorchScript program"),
    ],
)
def test_storages_that_do_not_fit_are_refused(entries, words, tmp_path):
    """Too short, too long, absent; and archives of another kind."""
    with pytest.raises(TorchFileError) as refusal, open_torch_file(archive_of(tmp_path / "m.pth", **entries)) as opened:
        opened.tensor(opened.content)
    assert words in str(refusal.value)
    with open_torch_file(archive_of(tmp_path / "good.pth")) as opened:
        expected = np.frombuffer(bytes(range(16)), np.float32).reshape(2, 2)
        np.testing.assert_array_equal(opened.tensor(opened.content).numpy(), expected)


def test_compressed_and_damaged_archives_are_refused(tmp_path):
    """A bomb of zeros is never unpacked; a flipped bit is noticed; two entries of one name are not chosen from."""
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", bytes(2**24))
    with pytest.raises(TorchFileError, match=r"data\.pkl is compressed or encrypted"), open_torch_file(bomb):
        pass

    locked = archive_of(tmp_path / "locked.pth")
    content = bytearray(locked.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    locked.write_bytes(content)
    with pytest.raises(TorchFileError, match=r"data\.pkl is compressed or encrypted"), open_torch_file(locked):
        pass

    large = archive_of(tmp_path / "large.pth", **{"data.pkl": bytes(2**21 + 1)})
    with pytest.raises(TorchFileError, match="said to have 2097153 bytes, too many"), open_torch_file(large):
        pass

    damaged = archive_of(tmp_path / "damaged.pth")
    content = bytearray(damaged.read_bytes())
    content[content.index(bytes(range(16)))] ^= 1
    damaged.write_bytes(content)
    with open_torch_file(damaged) as opened, pytest.raises(TorchFileError, match="Bad CRC-32"):
        opened.tensor(opened.content)

    short = archive_of(tmp_path / "short.pth", **{"data/0": bytes(12)})
    content = bytearray(short.read_bytes())
    size_at = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1) + 24
    content[size_at] = 16  # and 12 when packed
    short.write_bytes(content)
    with open_torch_file(short) as opened, pytest.raises(TorchFileError, match="storage '0' is cut short"):
        opened.tensor(opened.content)

    twice = archive_of(tmp_path / "twice.pth")
    with zipfile.ZipFile(twice, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("model/data/0", bytes(16))
    with pytest.raises(TorchFileError, match="no name twice"), open_torch_file(twice):
        pass


@pytest.mark.parametrize("stream", [False, True], ids=["zip", "stream"])
def test_a_pickle_larger_than_any_checkpoint_s_is_refused(stream, tmp_path):
    """Empty dictionaries take far more memory than bytes; 1,200 tensors and what an optimiser has of each are read."""
    file = tmp_path / "model.pth"
    torch.save([{} for _ in range(400_000)], file, _use_new_zipfile_serialization=not stream)
    with pytest.raises(TorchFileError, match=r"bytes, too many|is no pickle"), open_torch_file(file):
        pass

    tensors = {f"module.backbone.layer4s.{index}.2.bn3.running_mean": torch.zeros(1) for index in range(1200)}
    moments = {index: {"exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)} for index in range(1200)}
    torch.save({"state_dict": tensors, "optimizer": moments}, file, _use_new_zipfile_serialization=not stream)
    with open_torch_file(file) as opened:
        assert len(opened.content["state_dict"]) == len(opened.content["optimizer"]) == 1200


def test_a_file_cut_anywhere_is_refused(tmp_path):
    """Both formats."""
    for stream in (False, True):
        whole = tmp_path / "whole.pth"
        torch.save({"a": torch.ones(40), "b": torch.ones(40)}, whole, _use_new_zipfile_serialization=not stream)
        content = whole.read_bytes()
        for length in (0, 1, 3, 50, len(content) // 2, len(content) - 100, len(content) - 1):
            (tmp_path / "cut.pth").write_bytes(content[:length])
            with pytest.raises(TorchFileError, match=r"cut\.pth: "), open_torch_file(tmp_path / "cut.pth"):
                pass


@pytest.mark.parametrize(
    ("pattern", "replacement", "words"),
    [
        (rb"M\xe9\x03\.", b"M\xea\x03.", "is a pickle, but none of torch.save"),  # the version, 1001
        (rb"(little_endianq.)\x88", b"\\1\x89", "was written on a big-endian machine"),
        (rb"\x28(\0{7}\0\0\x80\x3f)", b"'\\1", "storage .* has 39 numbers, its tensors say 40"),
    ],
)
def test_streams_that_do_not_fit_are_refused(pattern, replacement, words, tmp_path):
    """Of another version or byte order, or whose storages are of another size."""
    torch.save({"a": torch.ones(40)}, tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    content, changes = re.subn(pattern, replacement, (tmp_path / "model.pth").read_bytes())
    (tmp_path / "model.pth").write_bytes(content)
    assert changes == 1
    with pytest.raises(TorchFileError, match=words), open_torch_file(tmp_path / "model.pth"):
        pass


def test_other_files_are_refused_with_what_they_are(tmp_path):
    """A tar archive, a plain pickle, text, a directory, nothing."""
    (tmp_path / "notes.txt").write_text("none of this")
    with tarfile.open(tmp_path / "old.tar", "w") as archive:
        archive.add(tmp_path / "notes.txt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": 1}))
    for name, words in {"old.tar": "is a tar archive", "plain.pkl": "is a pickle, but none of torch.save",
                        "notes.txt": "it begins with the bytes b'none'", "gone": "cannot be read"}.items():  # fmt: skip
        with pytest.raises(TorchFileError, match=words), open_torch_file(tmp_path / name):
            pass


def test_a_tar_archive_is_known_by_its_first_bytes_alone(tmp_path):
    """Nothing is unpacked to find one, and headers that lead to further headers are not followed."""
    (tmp_path / "notes.txt").write_text("none of this")
    for packing in ("gz", "bz2", "xz"):
        with tarfile.open(tmp_path / f"old.{packing}", f"w:{packing}") as archive:
            archive.add(tmp_path / "notes.txt")
    chained = tarfile.TarInfo("././@LongLink")
    chained.type, chained.size = tarfile.GNUTYPE_LONGNAME, 1
    (tmp_path / "chain.tar").write_bytes((chained.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(512, b"\0")) * 3000)
    for name, words in {"old.gz": "it begins with the bytes", "old.bz2": "it begins with the bytes",
                        "old.xz": "it begins with the bytes", "chain.tar": "is a tar archive"}.items():  # fmt: skip
        with pytest.raises(TorchFileError, match=words), open_torch_file(tmp_path / name):
            pass


@pytest.fixture(scope="module")
def routed_file(tmp_path_factory):
    """A published model of two experts and three classes with a router, and its state dict."""
    state = state_dict("ResNet32EAModel", 2, 3, top_k=3)
    make_routers_differ("ResNet32EAModel", state, noise(40, 16))
    return save(tmp_path_factory.mktemp("published") / "ride2.pth", "ResNet32EAModel", state), state


@pytest.fixture(scope="module")
def image_set(image_folder, tmp_path_factory):
    """A natural set with test images of its own."""
    root = tmp_path_factory.mktemp("sets") / "natural"
    for part in ("train", "test"):
        shutil.copytree(image_folder, root / part)
    return root


def test_a_published_model_with_routers_becomes_a_bundle(routed_file, image_set, tmp_path, capsys):
    """
    Its graphs give the authors' logits and use as many experts; the published threshold is the default. Of a natural
    set the authors held nothing back: the counts are those of the training, and held-out figures said to be too good.
    """
    file, state = routed_file
    target = tmp_path / "bundle"
    assert main([str(file), "-o", str(target), "--data", str(image_set), "--variants", "fp32", *SMALL]) == 0
    manifest, printed = read_bundle(target).manifest, capsys.readouterr().out

    images = noise(40, 16)
    logits, asked = every_expert("ResNet32EAModel", state, images)
    answers, used = routed(logits, asked)
    found = run_variant(target, manifest.variants["fp32"], images.numpy(), 3)
    ours = route(found.router_scores, manifest.thresholds)
    assert (manifest.name, manifest.rule, manifest.thresholds) == ("ride2", "router", (0.5,))
    assert ours.tolist() == used.tolist()
    assert set(ours.tolist()) == {1, 2}
    np.testing.assert_allclose(mean_logits(found.expert_logits, ours), answers.numpy(), atol=1e-3)

    published = manifest.provenance["published"]
    assert (published["file"], published["arch"], published["epoch"]) == ("ride2.pth", "ResNet32EAModel", 200)
    assert (published["assumed"]["cosine_scale"], published["assumed"]["image_size"]) == (30, 16)
    assert "lr" not in manifest.provenance["recipe"]
    assert "ride2.pth: ResNet32EAModel after epoch 200; it does not say:" in printed
    assert "cosine_scale=30.0" in printed
    assert "mean=0.4914,0.4822,0.4465" in printed
    assert manifest.class_counts == (30, 12, 8)
    assert published["assumed"]["data"] == "natural"  # and not where it lies: the service shows it
    assert manifest.calibration.data.endswith("which the published model was trained on: accuracies are too high")


def test_no_risk_is_certified_on_images_that_the_published_model_was_trained_on(
    routed_file, image_set, tmp_path, capsys
):
    """A share of a natural set's training images; on validation images of the set's own it is."""
    file, target = routed_file[0], tmp_path / "bundle"
    risk = ["--max-risk", "60", "--risk-confidence", "0.8", "--variants", "fp32"]
    assert main([str(file), "-o", str(target), "--data", str(image_set), *SMALL, *risk]) == 2
    assert (
        f"--max-risk 60: the held-out images are a share of the training images of {image_set}, with which {file} "
        "was trained, so that nothing is certified for others; take --max-accuracy-loss, or --data that has validation "
        "and test images of its own"
    ) in capsys.readouterr().err
    assert not target.exists()

    for part in ("train", "val", "test"):
        shutil.copytree(image_set / "train", tmp_path / "parted" / part)
    parted = ["--data", str(tmp_path / "parted"), "--set", "profile=natural", "--set", "image_size=16"]
    assert main([str(file), "-o", str(target), *parted, *risk]) == 0
    calibration = read_bundle(target).manifest.calibration
    assert (calibration.data, calibration.risk.max_risk) == ("the set's own validation images", 60)


def test_a_stage_1_model_becomes_a_bundle_without_routers(image_set, tmp_path, capsys):
    """It exits by confidence, or another rule that needs no router; asking for the router's is refused."""
    state = state_dict("ResNet32Model", 2, 3)
    file = save(tmp_path / "stage1.pth", "ResNet32Model", state)
    usual = [str(file), "-o", str(tmp_path / "bundle"), "--data", str(image_set), "--variants", "fp32", *SMALL]
    assert main([*usual, "--rule", "router"]) == 2
    assert "has no routers; the other rules need none" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()

    assert main([*usual, "--max-mean-experts", "1"]) == 0
    manifest = read_bundle(tmp_path / "bundle").manifest
    assert (manifest.rule, manifest.macs.routers, manifest.variants["fp32"].routers) == ("confidence", (), ())
    assert {point.rule for point in manifest.calibration.points} == {"confidence", "margin", "agreement", "depth"}
    assert manifest.variants["fp32"].parity.mean_experts == 1
    assert not list((tmp_path / "bundle").glob("router*"))
    images = noise(8, 16)
    found = run_variant(tmp_path / "bundle", manifest.variants["fp32"], images.numpy(), 3)
    np.testing.assert_allclose(found.expert_logits, every_expert("ResNet32Model", state, images)[0], atol=1e-3)


def test_the_command_refuses_what_cannot_be(routed_file, run, image_folder, tmp_path, capsys):
    """No data, data of other classes, settings of a run, settings that are none: exit status 2 and a sentence."""
    file, out = str(routed_file[0]), ["-o", str(tmp_path / "bundle")]
    for part in ("train", "test"):
        for label in "ab":
            shutil.copytree(image_folder / "class 0", tmp_path / "two" / part / label)
    for arguments, words in (
        ([file, *out], "no data named; give --data cifar100"),
        ([file, *out, "--data", str(tmp_path / "two"), *SMALL], f"has 2 classes, the classifiers in {file} 3"),
        (
            [file, *out, "--data", str(image_folder), *SMALL],
            "has no test images of its own, and all others may be",
        ),
        ([file, *out, "--set", "mean"], "--set mean: must be field=value"),
        ([file, *out, "--set", "lr=1"], "lr: cannot be set for a published checkpoint"),
        ([str(run), *out, "--set", "imbalance=50"], "--set imbalance: the recipe of a run is fixed"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_the_published_subset_of_cifar_is_the_default(tmp_path):
    """And for the larger nets a natural profile with ImageNet's size and normalisation."""
    cifar = save(tmp_path / "cifar.pth", "ResNet32Model", state_dict("ResNet32Model", 2, 40))
    assumed, trained = read_published(cifar, {"data": "cifar100"}).assumed, RECIPES["ride-cifar100"].to_dict()
    assert assumed == {name: trained[name] for name in assumed}

    large = save(tmp_path / "large.pth", "ResNet10Model", state_dict("ResNet10Model", 2, 40))
    assumed = read_published(large, {}).assumed
    assert (assumed["profile"], assumed["mean"]) == ("natural", [0.485, 0.456, 0.406])
    assert (assumed["image_size"], assumed["test_fit"]) == (224, "inner_crop")  # the middle 224 of 256 pixels
    assert "imbalance" not in assumed


def test_a_file_with_any_byte_changed_is_read_or_refused(tmp_path):
    """Never another error: 500 random changes to the structure of a file."""
    good = save(tmp_path / "good.pth", "ResNet32Model", {"backbone.bn1.weight": torch.ones(16)}, stream=True)
    content, generator, read = good.read_bytes(), np.random.default_rng(0), 0
    for _ in range(500):
        changed = bytearray(content)
        for position in generator.integers(0, len(content), generator.integers(1, 4)):
            changed[position] = generator.integers(0, 256)
        (tmp_path / "changed.pth").write_bytes(changed)
        try:
            with open_torch_file(tmp_path / "changed.pth"):
                read += 1
        except TorchFileError:
            pass
    assert 0 < read < 500
