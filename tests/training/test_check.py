"""What is wrong with a set is found before the first epoch and told all at once; sets of list files."""

import dataclasses
import errno
import io
import os
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from training.__main__ import main
from training.data.check import check_data, examine
from training.data.report import ERRORS, WARNINGS, DataError, Report
from training.data.sets import load_data, summary_of
from training.data.sources import open_set
from training.recipe import Recipe


def image(seed: int, size: int = 12) -> bytes:
    """A PNG of noise, another for each seed."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def recipe_for(data: Path, **fields: object) -> Recipe:
    """A recipe that reads `data` as it is."""
    return Recipe(
        name="t", method="single", data=str(data), profile="natural", image_size=8, workers=0,
        **fields,
    )  # fmt: skip


def write_lists(root: Path, prefix: str = "", **lists: dict[str, int]) -> Path:
    """train.txt and so on from {path: label}, and an image for every path that is not there yet."""
    for part, entries in lists.items():
        for path in entries:
            file = root / path
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(image(zlib.crc32(path.encode())))
        text = "".join(f"{prefix}{path} {label}\n" for path, label in entries.items())
        (root / f"Set_LT_{part}.txt").write_text(text)
    return root


def entries(directory: str, *counts: int) -> dict[str, int]:
    """So many images of each class."""
    return {f"{directory}/c{label}/{i}.png": label for label, count in enumerate(counts) for i in range(count)}


@pytest.fixture
def listed(tmp_path):
    """A set as the large ones are published: 8, 4 and 2 training images, 2 validation and 3 test images a class."""
    return write_lists(
        tmp_path / "set", train=entries("images", 8, 4, 2), val=entries("val", 2, 2, 2), test=entries("test", 3, 3, 3)
    )


def test_list_files_give_the_three_parts(listed):
    """The lists' own parts, order and labels; classes are named by their directories."""
    data = load_data(recipe_for(listed))

    assert data.classes == ("c0", "c1", "c2")
    assert data.counts == (8, 4, 2)
    assert [len(part) for part in (data.train, data.heldout, data.test)] == [14, 6, 9]
    assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.heldout_note == "the set's own validation images"
    assert not data.report.findings


def test_listed_classes_are_named_by_directories_that_they_have_to_themselves(tmp_path):
    """Neither where one has two of them, nor where two have directories of one name."""
    apart = {"x/owl/0.png": 0, "x/owl/1.png": 0, "x/emu/0.png": 1}
    for case, (changed, names) in enumerate((
        ({}, ["owl", "emu"]), ({"x/jay/2.png": 0}, ["class 0", "class 1"]),
        ({"x/emu/0.png": None, "y/owl/0.png": 1}, ["class 0", "class 1"]),
    )):  # fmt: skip
        lines = {path: label for path, label in (apart | changed).items() if label is not None}
        assert list(open_set(recipe_for(write_lists(tmp_path / str(case), train=lines))).classes) == names


@pytest.mark.parametrize("label", [100, 10**20])
def test_a_stray_label_of_any_size_is_out_of_range(listed, label):
    """It does not make as many classes."""
    with (listed / "Set_LT_train.txt").open("a") as file:
        file.write(f"images/c0/7.png {label}\n")
    findings = check_data(recipe_for(listed)).findings

    assert len(findings["label out of range"]) == 1
    assert findings["label out of range"][0].endswith(", there are 3 classes")
    assert "empty class" not in findings


@pytest.mark.parametrize("same_lists", [True, False])
def test_validation_images_that_are_the_test_images_leave_the_held_out_share_to_training(tmp_path, same_lists):
    """As iNaturalist 2018 is used, whether its validation list stands there once or twice."""
    test = entries("val", 3, 3)
    write_lists(tmp_path, train=entries("images", 10, 5), val=test, **({"test": test} if same_lists else {}))

    data = load_data(recipe_for(tmp_path, holdout_share=0.2))

    assert [len(part) for part in (data.train, data.heldout, data.test)] == [12, 3, 6]


@pytest.mark.parametrize(
    ("prefix", "moved_to"), [("", "."), ("data_256/", "."), ("", "photos"), ("train/x/", "photos")]
)
def test_leading_directories_of_list_files_may_differ(tmp_path, prefix, moved_to):
    """Lists of one repository fit the directories of another."""
    root = write_lists(tmp_path / "lists", prefix, train=entries("images", 4, 4), test=entries("images", 1, 1))
    for part in ("train", "test"):  # one image of a class is in both, which is not the point here
        text = (root / f"Set_LT_{part}.txt").read_text().splitlines()
        kept = [line for line in text if ("/0.png" in line) == (part == "test")]
        (root / f"Set_LT_{part}.txt").write_text("\n".join(kept))
    target = tmp_path / "root" / moved_to
    target.mkdir(parents=True)
    (root / "images").rename(target / "images")

    data = load_data(recipe_for(root, image_root=str(tmp_path / "root"), holdout_share=0.4))

    assert [len(part) for part in (data.train, data.heldout, data.test)] == [4, 2, 2]


@pytest.mark.parametrize("n_missing", [1, 6])
def test_an_image_that_is_missing_is_not_taken_from_another_tree(listed, n_missing):
    """Even where one beside it has a file of the same name for every line."""
    shutil.copytree(listed / "images", listed / "backup" / "images")
    for index in range(n_missing):
        (listed / f"images/c0/{index}.png").unlink()

    missing = check_data(recipe_for(listed)).findings["missing"]
    assert missing == [f"{listed}/images/c0/{index}.png" for index in range(n_missing)]


def test_a_listed_path_may_be_spelled_in_several_ways(listed):
    """It is one file, which may not be trained on and tested as well."""
    (listed / "Set_LT_test.txt").write_text("./images//c0/0.png 0\nimages/./c1/0.png 1\ntest/c2/0.png 2\n")

    assert check_data(recipe_for(listed)).findings["file in two parts"] == [
        f"{listed}/images/c{label}/0.png: class 'c{label}' (train), class 'c{label}' (test)" for label in (0, 1)
    ]


def test_paths_may_hold_spaces(tmp_path):
    """The last one stands before the label."""
    root = write_lists(tmp_path, train={f"my photos/owl {n}.png": n % 2 for n in range(4)})
    found = check_data(recipe_for(root)).findings

    assert not {"missing", "malformed"} & found.keys()


def test_the_first_images_of_a_list_may_be_missing(tmp_path):
    """As of a download that goes on; the others show where they lie."""
    root = write_lists(tmp_path, "old/", train=entries("images", 30, 30))
    shutil.rmtree(root / "images" / "c0")

    assert len(check_data(recipe_for(root)).findings["missing"]) == 30


def test_a_byte_order_mark_is_no_part_of_a_path_or_name(listed):
    """As some editors write it, before the first line."""
    for name, text in (("Set_LT_train.txt", None), ("classes.txt", "crane\nheron\nibis\n")):
        file = listed / name
        file.write_text(text or file.read_text(), encoding="utf-8-sig")
    data = load_data(recipe_for(listed))

    assert (data.classes, data.counts) == (("crane", "heron", "ibis"), (8, 4, 2))


def test_class_names_that_are_no_text_are_refused_by_file(listed):
    """As a spreadsheet in Latin-1 writes them."""
    (listed / "classes.txt").write_bytes("grèbe\nheron\nibis\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"classes.txt: cannot be read as text: .* byte 0xe8"):
        open_set(recipe_for(listed))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_root": "/nowhere"}, "image_root=/nowhere: no such directory"),
        ({"image_root": "elsewhere"}, r"Set_LT_train.txt: none of its images is below .*; the first would be .*/0.png"),
        ({"train_list": "x.txt"}, "x.txt: no such list file"),
    ],
)
def test_lists_that_lead_nowhere_are_refused(listed, fields, message, monkeypatch):
    """The message says which list and where it looked."""
    (listed / "elsewhere").mkdir()
    monkeypatch.chdir(listed)
    with pytest.raises(DataError, match=message):
        load_data(recipe_for(listed, **fields))


def test_two_lists_that_could_be_meant_are_refused(listed):
    """The message names the field that decides."""
    (listed / "other_train.txt").write_text("a 0\n")
    with pytest.raises(DataError, match=r"Set_LT_train.txt, other_train.txt could all be meant; set train_list"):
        load_data(recipe_for(listed))
    assert load_data(recipe_for(listed, train_list="Set_LT_train.txt")).counts == (8, 4, 2)


@pytest.mark.parametrize("name", ["latest.txt", "constraints.txt", "Eval.txt"])
def test_a_text_that_has_the_word_within_another_is_no_list(listed, tmp_path, name):
    """Neither in a folder set nor beside lists."""
    root = fill(tmp_path / "folders", {"a": "0.png 1.png", "b": "0.png 1.png"})
    for home in (root, listed):
        (home / name).write_text("anything\n")
    found = open_set(recipe_for(root))

    assert (found.classes, "not taken" in found.report.findings) == (["a", "b"], False)
    assert load_data(recipe_for(listed)).counts == (8, 4, 2)


@pytest.mark.parametrize("names", [["test.txt"], ["LT_val.txt"], ["test-1.txt", "test-2.txt"]])
def test_lists_without_one_for_training_are_told_and_not_taken(tmp_path, names):
    """The directory is what else it is."""
    root = fill(tmp_path, {"a": "0.png 1.png", "b": "0.png 1.png"})
    for name in names:
        (root / name).write_text("anything\n")
    found = open_set(recipe_for(root))

    assert found.classes == ["a", "b"]
    assert found.report.findings["not taken"] == [f"{root / name}: no list for training is beside it" for name in names]


@pytest.mark.parametrize("name", ["README-train.txt", "train.v2.txt", "Training_LT.txt", "lt train2018.txt"])
def test_list_files_have_the_part_in_their_names_as_a_word(listed, name):
    """Wherever it stands."""
    (listed / "Set_LT_train.txt").rename(listed / name)
    assert load_data(recipe_for(listed)).counts == (8, 4, 2)


def test_a_named_list_needs_one_for_training(tmp_path):
    """The message says what to set."""
    root = fill(tmp_path, {"a": "0.png"})
    (root / "mine.txt").write_text("a/0.png 0\n")
    with pytest.raises(DataError, match=r"mine.txt, but no list for training such as train.txt; set train_list"):
        open_set(recipe_for(root, test_list="mine.txt"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/photos/a.png 0\n/photos/b.png 1\n", "none of its 2 lines .*; train.txt line 1: '/photos/a.png' leaves"),
        ("\na.png,0\n", r"; train.txt line 2: 'a.png,0' is not a path, a space, a whole number$"),
        ("", "none of its 0 lines is a path below the root, a space, a label$"),
    ],
)
def test_a_list_in_which_no_line_fits_is_refused(tmp_path, text, message):
    """The message says of the first what is wrong with it."""
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        open_set(recipe_for(tmp_path))


def spoil(root: Path) -> None:
    """One of everything that can be wrong with a set of list files."""
    (root / "images/c0/0.png").unlink()
    (root / "images/c0/1.png").write_bytes(b"no image")
    (root / "images/c0/2.png").write_bytes(image(1)[:200])  # its header is whole
    (root / "images/c1/9.png").write_bytes((root / "images/c0/3.png").read_bytes())
    (root / "test/c2/0.png").write_bytes((root / "images/c0/4.png").read_bytes())
    (root / "images/c0/9.png").write_bytes((root / "images/c0/5.png").read_bytes())
    (root / "images/c2/1.png").unlink()
    train = (root / "Set_LT_train.txt").read_text().replace("images/c2/1.png 2\n", "")
    train += "images/c1/9.png 1\nimages/c0/9.png 0\nimages/c0/6.png 1\ntest/c0/1.png 0\n"
    train += "images/c1/1.png 7\nimages/c1/2.png -1\nno label\n../outside.png 1\nimages/c1/3.png 4\n"
    (root / "Set_LT_train.txt").write_text(train)


def test_a_label_of_thousands_of_digits_is_told(listed):
    """More than Python takes for a number."""
    with (listed / "Set_LT_train.txt").open("a") as lines:
        lines.write("images/c1/3.png " + 5000 * "1" + "\n")

    assert "is not a path, a space, a whole number" in check_data(recipe_for(listed)).findings["malformed"][0]


EXPECTED = {
    "missing": "images/c0/0.png",
    "unreadable": "images/c0/2.png: not a readable image",
    "malformed": "line 20: 'no label' is not a path, a space, a whole number",
    "label out of range": "images/c1/2.png has label -1, there are 8 classes",
    "empty class": "no training images of label 3",
    "file in two classes": "images/c0/6.png: class 'class 0' (train), class 'class 1' (train)",
    "file in two parts": "test/c0/1.png: class 'class 0' (train), class 'class 0' (test)",
    "class with one image": "images/c2/0.png",
    "image in two classes": "images/c1/9.png: class 'class 1' (train)",
    "image in two parts": "test/c2/0.png: class 'class 2' (test)",
    "image twice": "images/c0/9.png: class 'class 0' (train)",
}


def test_everything_wrong_is_told_at_once(listed, tmp_path, capsys):
    """Every kind there is, in one message on standard error, and no run directory: nothing was trained."""
    spoil(listed)
    of_others = {"class without such images", "not taken", "not taken for an image", "nothing held out", "sorted"}
    assert EXPECTED.keys() | of_others == ERRORS.keys() | WARNINGS.keys()

    assert main(["ride-own", "--data", str(listed), "--set", "workers=0", "--out", str(tmp_path / "run")]) == 2

    told = capsys.readouterr().err
    for kind, what in EXPECTED.items():
        assert f": {kind} (" in told
        assert what in told
    assert "unreadable (2): images" in told
    assert not (tmp_path / "run").exists()


def test_headers_alone_find_all_but_damage_further_in(listed):
    """The quick look misses the truncated image and nothing else; its duplicates are equal in all bytes."""
    spoil(listed)
    quick, whole = check_data(recipe_for(listed), decode=False), check_data(recipe_for(listed))

    assert len(whole.findings["unreadable"]) == 2
    kinds = ("file in two classes", "file in two parts", "image in two classes", "image in two parts", "image twice")
    assert [len(whole.findings[kind]) for kind in kinds] == [4, 1, 2, 1, 1]  # a file listed twice is no copy of itself
    assert len(quick.findings["unreadable"]) == 1
    assert quick.findings | {"unreadable": []} == whole.findings | {"unreadable": []}


def test_files_of_one_size_and_equal_ends_are_not_taken_for_the_same(listed):
    """The quick look compares the ends of files; equal ones are then read whole."""
    for label in (0, 1):
        buffer = io.BytesIO()
        pixels = np.full((80, 80, 3), 9, np.uint8)
        pixels[40, 40] = label
        Image.fromarray(pixels).save(buffer, "BMP")
        (listed / f"images/c{label}/0.png").write_bytes(buffer.getvalue())

    assert not check_data(recipe_for(listed), decode=False).findings


def test_an_image_may_have_two_hundred_million_pixels(tmp_path):
    """Whatever Pillow holds for too many; the headers alone say how many there are."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    root = fill(tmp_path, {"a": "0.png", "b": "0.png"})
    for label, width in (("a", 20_000), ("b", 20_001)):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 10_000, 1, 0, 0, 0, 0))
        (root / label / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))

    too_large = "not a readable image: 20001x10000 is more than 200,000,000 pixels; scale it down"
    assert check_data(recipe_for(root), decode=False).findings["unreadable"] == [f"{root}/b/0.png: {too_large}"]


@pytest.mark.parametrize("depth", ["bytes", "headers", "pixels"])
def test_what_is_no_regular_file_is_not_opened(tmp_path, monkeypatch, depth):
    """A pipe, say, would keep whoever reads it waiting; here it is a socket."""
    root = fill(tmp_path, {"a": "0.png", "b": "0.png"})
    monkeypatch.chdir(root / "a")  # its name may not be long
    with socket.socket(socket.AF_UNIX) as odd:
        odd.bind("1.png")
    image_set = open_set(recipe_for(root))
    examine(image_set, depth, workers=0)

    assert f"{root}/a/1.png: not a regular file" in image_set.report.findings["unreadable"]


def test_worker_processes_find_the_same(listed, monkeypatch):
    """In the same order."""
    spoil(listed)
    alone = check_data(recipe_for(listed))
    monkeypatch.setattr("training.data.check.IN_PROCESS", 0)
    shared = check_data(Recipe(**vars(recipe_for(listed)) | {"workers": 2}))

    assert shared.findings == alone.findings


def test_a_report_shows_twenty_of_each_kind():
    """And how many there are."""
    report = Report()
    report.add_all("missing", (f"file {i}" for i in range(33)))
    report.add_all("image twice", ["a, b"])

    lines = str(report).splitlines()
    assert lines[0].startswith("error: missing (33): images are not there")
    assert lines[20:22] == ["  file 19", "  and 13 more"]
    assert lines[22].startswith("warning: image twice (1): ")


def test_warnings_do_not_stop_a_training_and_are_recorded(listed, tmp_path, capsys):
    """They are printed, and counted in results.json."""
    (listed / "images/c0/1.png").write_bytes((listed / "images/c0/0.png").read_bytes())
    settings = ["epochs=1", "router_epochs=1", "compile=false", "image_size=8", "workers=0"]
    overrides = [part for each in settings for part in ("--set", each)]

    assert main(["ride-own", "--data", str(listed), *overrides, "--out", str(tmp_path / "run")]) == 0

    assert "warning: image twice (1): images are there twice" in capsys.readouterr().err
    assert '"findings": {\n   "image twice": 1' in (tmp_path / "run" / "results.json").read_text()


def test_gaps_and_nulls_of_a_parquet_set_are_told_at_once(tmp_path):
    """Rows with null or no bytes, without label, labels that leave a class empty, labels past the names."""
    table = pyarrow.table({
        "image": [image(0), None, image(2), image(3), image(4), b""], "label": [0, 0, None, 2, 9, 0],
    })  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")

    with pytest.raises(DataError) as refused:
        load_data(recipe_for(tmp_path))

    rows = ("row 1 has no image bytes", "row 5 has no image bytes", "row 2 has no label", "row 4 has label 9")
    for what in (*rows, "label 1 (b)"):
        assert what in str(refused.value)
    assert str(refused.value).count("row 2") == 1


def test_classes_that_a_part_of_a_parquet_set_lacks_are_told(tmp_path):
    """The figures on it leave them out."""
    for part, labels in (("train", [0, 0, 1, 1, 2, 2]), ("test", [0, 2])):
        offset = 10 * len(labels)
        table = pyarrow.table({"image": [image(offset + i) for i in range(len(labels))], "label": labels})
        pyarrow.parquet.write_table(table, tmp_path / f"{part}.parquet")

    told = check_data(recipe_for(tmp_path)).findings["class without such images"]
    assert told == ["no test images of label 1 (class 1)"]


def test_a_folder_with_validation_images_keeps_them_for_holding_out(tmp_path):
    """train/, val/ and test/ are used as they are; a set with val/ alone is tested on it."""
    for part, directory in enumerate(("train", "val", "test")):
        for label in range(2):
            for index in range(3):
                file = tmp_path / directory / f"c{label}" / f"{index}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(image(100 * part + 10 * label + index))
    whole = load_data(recipe_for(tmp_path))
    assert [len(part) for part in (whole.train, whole.heldout, whole.test)] == [6, 6, 6]

    (tmp_path / "test").rename(tmp_path / "put-away")
    tested = load_data(recipe_for(tmp_path))
    assert [len(part) for part in (tested.train, tested.heldout, tested.test)] == [4, 2, 6]
    assert tested.test.pixels.equal(whole.heldout.pixels)


def test_directories_of_parts_are_known_in_any_case_and_by_other_words(tmp_path):
    """What lies beside them and is none is told."""
    for names in (("Train", "Valid", "TEST"), ("training", "Validation", "Testing")):
        root = tmp_path / names[0]
        fill(root, {f"{part}/{label}": "0.png 1.png 2.png" for part in (*names, "extra") for label in "ab"})
        found = open_set(recipe_for(root))

        assert {part: Path(source.images.name(0)).parent.parent.name for part, source in found.parts().items()} == dict(
            zip(("train", "heldout", "test"), names, strict=True)
        )
        assert found.report.findings == {"not taken": [f"{root}/extra: neither training, validation nor test images"]}


def test_of_two_directories_for_a_part_one_is_not_taken(tmp_path):
    """Its images would be gone without a word."""
    root = fill(tmp_path, {f"{part}/{label}": "0.png" for part in ("train", "val", "heldout") for label in "ab"})
    report = open_set(recipe_for(root)).report

    assert report.findings == {"not taken": [f"{root}/heldout: neither training, validation nor test images"]}


@pytest.mark.parametrize("parts", [("val", "Test"), ("train/training", "train/testing")])
def test_parts_are_not_taken_for_classes(tmp_path, parts):
    """A classifier of validation against test images would train well."""
    root = fill(tmp_path, {f"{part}/{label}": "0.png 1.png 2.png 3.png" for part in parts for label in "ab"})
    with pytest.raises(DataError, match=r"directories .* are named like parts of a set, not like classes; name a"):
        open_set(recipe_for(root))


def test_a_class_named_train_is_taken_for_a_part_and_the_way_out_is_told(tmp_path):
    """Which works."""
    root = fill(tmp_path / "set", dict.fromkeys(("Train", "Bus", "Car"), "0.png 1.png"))
    with pytest.raises(DataError, match=r"Train: 0 class directories; .* is a class itself, move all classes into"):
        open_set(recipe_for(root))

    (tmp_path / "whole").mkdir()
    root.rename(tmp_path / "whole" / "train")
    assert open_set(recipe_for(tmp_path / "whole")).classes == ["Bus", "Car", "Train"]


def fill(root: Path, files: dict[str, str]) -> Path:
    """Images of these names in these directories, no two alike."""
    seed = 0
    for where, names in files.items():
        (root / where).mkdir(parents=True, exist_ok=True)
        for name in names.split():
            (root / where / name).write_bytes(image(seed := seed + 1))
    return root


def test_linked_directories_are_followed_once_and_never_in_circles(tmp_path):
    """As a set is put together of several disks; a broken link is a missing image."""
    root = fill(tmp_path / "set", {"a": "0.png", "b/deeper": "0.png 1.png"})
    fill(tmp_path / "elsewhere", {"more/deep": "7.png 8.png", "c": "9.png"})
    for link, target in (
        ("a/linked", tmp_path / "elsewhere" / "more"), ("a/again", tmp_path / "elsewhere" / "more" / "deep"),
        ("c", tmp_path / "elsewhere" / "c"), ("b/deeper/up", ".."), ("b/root", root), ("b/self", "self"),
        ("b/2.png", root / "gone.png"),
    ):  # fmt: skip
        (root / link).symlink_to(target)
    found = open_set(recipe_for(root))

    assert [str(Path(path).relative_to(root)) for path in found.train.images.paths] == [
        "a/0.png", "a/again/7.png", "a/again/8.png", "b/2.png", "b/deeper/0.png", "b/deeper/1.png", "c/9.png",
    ]  # fmt: skip
    assert check_data(recipe_for(root)).findings["missing"] == [f"{root}/b/2.png"]


@pytest.mark.parametrize("link", ["c", "test"])
@pytest.mark.parametrize("home", ["", "train/"])
def test_a_directory_on_a_disk_that_is_not_there_is_an_error(tmp_path, link, home):
    """A class, or the test images, would be gone without a word."""
    root = fill(tmp_path / "set", {f"{home}a": "0.png 1.png 2.png", f"{home}b": "0.png 1.png 2.png"})
    place = root / (f"{home}{link}" if link == "c" else link)
    place.symlink_to("/nowhere/disk")

    with pytest.raises(DataError, match=rf"(?s)missing \(1\): .*{place}: leads nowhere"):
        load_data(recipe_for(root))


def test_a_directory_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    """Its images would be gone without a word."""
    root = fill(tmp_path, {"a": "0.png 1.png", "a/closed": "2.png", "b": "0.png 1.png"})
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=rf"(?s)unreadable \(1\): .*{root}/a/closed: Permission denied"):
        load_data(recipe_for(root))


def test_class_directories_whose_names_are_not_utf_8_are_refused(tmp_path):
    """A bundle could not hold them."""
    root = fill(tmp_path, {os.fsdecode(b"caf\xe9"): "0.png 1.png", "b": "0.png 1.png"})
    with pytest.raises(DataError, match=r"names of classes are not UTF-8: 'caf\\udce9'; rename the directory$"):
        open_set(recipe_for(root))


def test_image_files_whose_names_are_not_utf_8_can_be_told(tmp_path):
    """On an output that takes nothing else."""
    root = fill(tmp_path, {"a": "0.png 1.png", "b": "0.png 1.png"})
    Path(root, "a", os.fsdecode(b"\xe9.png")).write_bytes(b"no image")
    command = [sys.executable, "-m", "training", "check", str(root), "--set", "workers=0"]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, capture_output=True, text=True, env=strict, check=False)

    assert (done.returncode, done.stderr) == (2, "")
    assert rf"{root}/a/\udce9.png: not a readable image" in done.stdout


def test_files_beside_the_images_are_told_and_hidden_ones_are_none(tmp_path):
    """What systems leave between one's images is no image; what may be one by mistake is counted by its ending."""
    root = fill(tmp_path, {
        "a": "0.png 1.JFIF 2.heic 3.heic 4 .5.png", "b": "0.png 1.jpe 2.png", "b/deeper": "0.webp",
        "b/.ipynb_checkpoints": "7.png", "__MACOSX/a": "0.png", ".": "stray.png",
    })  # fmt: skip

    found = open_set(recipe_for(root))

    assert found.classes == ["a", "b"]
    assert np.bincount(found.train.labels).tolist() == [2, 4]
    assert found.report.findings["not taken for an image"] == [f"{root}: 1 *.png", f"{root}/a: 2 *.heic, 1 no ending"]
    assert summary_of(found, None) == (
        "2 classes; 6 training images; from 4 (b) to 2 (a) training images, 0 classes many, 0 classes medium, "
        "2 classes few"
    )


def test_the_summary_leaves_out_labels_that_are_no_class(tmp_path, capsys):
    """They are told as errors below it."""
    table = pyarrow.table({"image": [image(n) for n in range(5)], "label": [0, 0, 1, -1, 9]})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    (tmp_path / "classes.txt").write_text("a\nb\n")

    assert main(["check", str(tmp_path)]) == 2
    told = capsys.readouterr().out
    assert "2 classes; 5 training images; from 2 (a) to 1 (b) training images" in told
    assert "label out of range (2)" in told


def test_rare_classes_may_have_no_test_images(tmp_path):
    """Labels stay those of training; a class that was not trained is refused."""
    train = {f"train/{name}": "0.png 1.png" for name in "abc"}
    root = fill(tmp_path, train | {"test/a": "5.png", "test/c": "6.png"})
    found = open_set(recipe_for(root))

    assert found.test.labels.tolist() == [0, 2]
    assert found.report.counts() == {"class without such images": 1}
    (root / "test" / "d").mkdir()
    with pytest.raises(DataError, match="test: classes without training images: d"):
        open_set(recipe_for(root))


@pytest.mark.parametrize("part", ["test", "val"])
def test_a_part_without_any_image_of_a_class_is_as_if_it_were_not_there(tmp_path, part):
    """Such as a test/ of unlabelled images: others are drawn in its place, and that is told."""
    names = " ".join(f"{n}.png" for n in range(10))
    root = fill(tmp_path, {"train/a": names, "train/b": names, part: "0.png 1.png"})
    data = load_data(recipe_for(root))

    assert [len(images) for images in (data.train, data.heldout, data.test)] == [16, 2, 2]
    assert data.report.findings["not taken"] == [f"{root}/{part}: no images in directories named like the classes"]
    assert data.report.findings.keys() == {"not taken"}


@pytest.mark.parametrize(
    ("third", "shown"), [("crane", "'crane'"), ("crane\nmaillot\nmaillot", "'crane', 'maillot'"), ("\nibis", "''")]
)
def test_classes_without_a_name_of_their_own_are_refused_before_the_training(listed, third, shown):
    """
    ImageNet has two cranes. A bundle could not hold them, and a run's classes cannot be changed any more. A blank line
    is a name, too: without it all names below would belong to other labels.
    """
    (listed / "classes.txt").write_text(f"crane\nheron\n{third}\n")
    with pytest.raises(DataError, match=rf"set: classes without a name of their own: {shown}; give"):
        open_set(recipe_for(listed))


def test_a_last_class_with_one_image_is_told(tmp_path):
    """In sets sorted by size the rarest class comes last."""
    root = fill(tmp_path, {"a": "0.png 1.png", "b": "0.png"})
    assert check_data(recipe_for(root)).findings == {"class with one image": [f"b: {root}/b/0.png"]}


def test_classes_too_small_for_a_drawn_part_are_told(tmp_path):
    """The figures on that part leave them out."""
    root = fill(tmp_path, {"a2": "0.png 1.png", "b3": "0.png 1.png 2.png", "c4": "0.png 1.png 2.png 3.png"})
    data = load_data(recipe_for(root))

    assert data.report.findings["class without such images"] == [
        "a2: 2 are too few to draw test images", "a2: 2 are too few to draw held-out images",
        "b3: 3 are too few to draw held-out images",
    ]  # fmt: skip
    assert data.heldout_note == "10% of each class's training images, seed 0; none for 2 of 3 classes"


@pytest.mark.parametrize(("own_test", "test_share", "least"), [(False, 0.1, 4), (False, 0.4, 5), (True, 0.1, 3)])
def test_a_set_too_small_to_hold_out_any_image_is_refused(tmp_path, own_test, test_share, least):
    """The message says how many would do; more, where test images are drawn first."""
    test = dict.fromkeys(("test/a", "test/b"), "0.png") if own_test else {}
    for size in (least, least - 1):
        names = " ".join(f"{n}.png" for n in range(size))
        fill(tmp_path / str(size), test | dict.fromkeys(("train/a", "train/b"), names))

    assert len(load_data(recipe_for(tmp_path / str(least), test_share=test_share)).heldout) == 2
    with pytest.raises(DataError, match=f"no images are left for the held-out.*\n  classes need {least} or more each"):
        load_data(recipe_for(tmp_path / str(least - 1), test_share=test_share))


@pytest.mark.parametrize(
    ("size", "told"),
    [
        (3, "2 classes; 4 training images, 0 held-out images, 2 test images; from 2 (a) to 2 (a) training images"),
        (20, "2 classes; 32 training images, 4 held-out images, 4 test images; from 16 (a) to 16 (a) training images"),
    ],
)
def test_a_check_shares_the_images_out_as_a_training_does(tmp_path, capsys, size, told):
    """A set of which nothing would be held out is refused, and what is set aside is not counted as training images."""
    names = " ".join(f"{n}.png" for n in range(size))
    status = main(["check", str(fill(tmp_path, {"a": names, "b": names}))])

    found = capsys.readouterr().out
    assert f"{told}, 0 classes many, 0 classes medium, 2 classes few" in found
    assert ("error: nothing held out (1)" in found, status) == ((True, 2) if size == 3 else (False, 0))


def test_a_profile_that_takes_every_image_is_refused(tmp_path):
    """The message says what to lower: the classes are large enough."""
    names = " ".join(f"{n}.png" for n in range(5))
    root = fill(tmp_path, {"train/a": names, "train/b": names, "test/a": "0.png", "test/b": "1.png"})
    whole = dataclasses.replace(recipe_for(root, imbalance=1.0), profile="exp")
    message = r"for the held-out set,.*\n  profile=exp takes all with imbalance=1; lower n_max \(5\)"
    with pytest.raises(DataError, match=message):
        load_data(whole)
    assert len(load_data(dataclasses.replace(whole, n_max=4)).heldout) == 2

    with pytest.raises(DataError, match="\n  classes need 3 or more each, n_max=2 leaves fewer"):
        load_data(recipe_for(root, n_max=2))


def test_a_smoke_run_takes_few_images_of_a_natural_set_too(tmp_path):
    """At most n_max of each class, held-out and test images among them; the same ones every time."""
    root = fill(tmp_path, {"a": " ".join(f"{n}.png" for n in range(60)), "b": " ".join(f"{n}.png" for n in range(8))})
    data, again = (load_data(recipe_for(root, n_max=20, holdout_share=0.25, test_share=0.25)) for _ in range(2))

    assert (len(data.train) + len(data.heldout) + len(data.test), data.counts) == (28, (11, 4))
    assert data.digest == again.digest != load_data(recipe_for(root, n_max=21)).digest


def test_the_digest_is_of_the_images_wherever_they_lie(tmp_path):
    """And however deeply they were looked at; another order or another image is another set."""
    root = fill(tmp_path / "one", {"a": "0.png 1.png 2.png 3.png", "b": "0.png 1.png 2.png 3.png"})
    digest = load_data(recipe_for(root)).digest
    (tmp_path / "other").mkdir()
    moved = root.rename(tmp_path / "other" / "place")

    assert load_data(recipe_for(moved, decoding="streamed")).digest == digest
    assert load_data(recipe_for(moved, decoding="streamed"), checked=True).digest == digest
    trained_on = sorted(moved.rglob("*.png"))[0:8]
    digests = set()
    for file in trained_on:  # some are held out or tested, and no training image
        before = file.read_bytes()
        file.write_bytes(image(100))
        digests.add(load_data(recipe_for(moved)).digest)
        file.write_bytes(before)
    assert len(digests) == 5
    assert digest in digests


def test_the_first_images_of_a_sorted_set_are_told(tmp_path):
    """They may be all of a kind; drawn ones are not."""
    train = {f"train/{name}": "0.png 1.png 2.png 3.png" for name in "ab"}
    root = fill(tmp_path, train | {"test/a": "0.png", "test/b": "0.png"})
    of = {order: load_data(dataclasses.replace(
        recipe_for(root, n_max=2, imbalance=1.0, subset_order=order), profile="exp",
    )).report.counts() for order in ("first", "shuffled")}  # fmt: skip

    assert of == {"first": {"sorted": 1}, "shuffled": {}}


def test_random_crops_need_the_images_in_their_own_size(tmp_path):
    """Resident ones have lost their borders."""
    root = fill(tmp_path, {"a": "0.png 1.png 2.png", "b": "0.png 1.png 2.png"})
    with pytest.raises(DataError, match="decoding=resident: keeps images in the input's size, crop=resized needs"):
        load_data(recipe_for(root, crop="resized", decoding="resident"))
