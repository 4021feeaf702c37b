"""Image sets, long-tailed subsets, augmentation, sampling."""

import io
import json
import re
import warnings
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from tests.service.test_images import SIZE, chunk, deep_png, grey_png_of_4_bits, grey_tiff, transparent_chunk
from training.data.augment import augment, transform
from training.data.images import read_image
from training.data.longtail import SPLITS, class_counts, draw_subset, split_of
from training.data.samplers import class_balanced, shuffled
from training.data.sets import DataError, Images, channel_statistics, load_data
from training.data.sources import open_set
from training.recipe import Recipe


def png(colour: tuple[int, int, int], size: int = 8) -> bytes:
    """A PNG of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


def recipe_for(data: object, **fields: object) -> Recipe:
    """A recipe that reads `data` as it is."""
    return Recipe(
        **{"name": "t", "method": "single", "data": str(data), "profile": "natural", "image_size": 8, **fields}
    )


@pytest.fixture
def colours(tmp_path):
    """Class folders: 12 red, 6 green, 3 blue images."""
    for name, colour, count in (("red", (255, 0, 0), 12), ("green", (0, 255, 0), 6), ("blue", (0, 0, 255), 3)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(count):
            (tmp_path / "set" / name / f"{index}.png").write_bytes(png(colour))
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("n_max", "classes", "factor", "total", "smallest", "splits"),
    [
        (500, 100, 10, 19_573, 50, [69, 31, 0]), (500, 100, 50, 12_608, 10, [41, 41, 18]),
        (500, 100, 100, 10_847, 5, [35, 35, 30]), (500, 100, 200, 9_502, 2, [30, 31, 39]),
        (5000, 10, 10, 20_431, 500, None), (5000, 10, 50, 13_996, 100, None),
        (5000, 10, 100, 12_406, 50, None), (5000, 10, 200, 11_203, 25, None), (300, 100, 100, 6_486, 3, [24, 35, 41]),
    ],
)  # fmt: skip
def test_class_counts_are_the_published_ones(n_max, classes, factor, total, smallest, splits):
    """Sizes of the exponential profile, free of the rounding trap of ratios raised to powers."""
    counts = class_counts(n_max, factor, classes)

    assert (sum(counts), min(counts)) == (total, smallest)
    if splits is not None:
        assert [sum(split_of(count) == name for count in counts) for name in SPLITS] == splits


def test_more_than_100_images_are_many_and_fewer_than_20_few():
    """RIDE's bounds, which belong to medium."""
    assert [split_of(count) for count in (101, 100, 20, 19)] == ["many", "medium", "medium", "few"]


def test_step_profile_has_two_sizes():
    """The first half of the classes is full, the second has 1/factor."""
    assert class_counts(49, 49, 10)[-1] == 1  # not ⌊0.999…⌋
    assert class_counts(500, 100, 6, "step") == [500, 500, 500, 5, 5, 5]
    assert class_counts(500, 100, 5, "step") == [500, 500, 5, 5, 5]


def test_impossible_factor_is_refused():
    """No class may be left empty."""
    with pytest.raises(ValueError, match="factor can be 50 at most"):
        class_counts(50, 100, 10)


def test_shuffled_draw_is_that_of_ldam():
    """The same images as code that seeds NumPy's global generator and shuffles class after class."""
    labels = np.random.default_rng(5).integers(0, 4, 400)
    counts = [60, 30, 9, 2]
    np.random.seed(0)
    expected = []
    for label, count in enumerate(counts):
        indices = np.where(labels == label)[0]
        np.random.shuffle(indices)
        expected += indices[:count].tolist()

    assert draw_subset(labels, counts, seed=0).tolist() == expected


def test_first_draw_keeps_file_order():
    """SHIKE's and M2m's subset."""
    assert draw_subset(np.array([1, 0, 1, 0, 1]), [1, 2], 0, "first").tolist() == [1, 0, 2]


def test_transform_is_crop_then_flip_then_rotation():
    """Against torchvision on Pillow images; a pixel centre on the border of two pixels may fall either way."""
    from torchvision.transforms import functional

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (32, 32, 32, 3), generator=generator, dtype=torch.uint8)
    shift_y, shift_x = (torch.randint(-4, 5, (32,), generator=generator) for _ in range(2))
    mirrored = torch.rand(32, generator=generator) < 0.5
    degrees = torch.rand(32, generator=generator) * 30 - 15

    found = transform(images, shift_y, shift_x, mirrored, torch.deg2rad(degrees))

    wrong = 0
    for row in range(32):
        image = functional.pad(Image.fromarray(images[row].numpy()), 4)
        image = functional.crop(image, 4 + int(shift_y[row]), 4 + int(shift_x[row]), 32, 32)
        image = functional.hflip(image) if mirrored[row] else image
        image = functional.rotate(image, float(degrees[row]))
        wrong += int((np.asarray(image) != found[row].numpy()).any(axis=-1).sum())
    assert wrong <= 32  # of 32,768


def test_augmentation_can_be_turned_off():
    """Without crop, flip and rotation the images come back as they are."""
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    same = augment(images, torch.Generator().manual_seed(1), crop_padding=0, flip=False, rotation=0)
    assert torch.equal(same, images)


def test_augmentation_follows_its_seed():
    """One seed, one result; another seed, another."""
    images = torch.randint(0, 256, (16, 8, 8, 3), dtype=torch.uint8)
    first, again, other = (
        augment(images, torch.Generator().manual_seed(seed), crop_padding=2, flip=True, rotation=15)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def augmented(images, **changes):
    """The images, augmented by `changes` alone."""
    nothing = {"crop_padding": 0, "flip": False, "rotation": 0}
    return augment(images, torch.Generator().manual_seed(0), **nothing | changes)


def test_shifts_flips_and_turns_are_drawn_evenly():
    """Every shift of up to the padding, to both sides; half are mirrored; angles reach the bound in both directions."""
    places = np.stack([*np.indices((51, 51)), np.zeros((51, 51))], axis=-1).astype(np.uint8)  # a pixel says where it is
    images = torch.from_numpy(places).expand(1500, 51, 51, 3)

    shifts = Counter(map(tuple, augmented(images, crop_padding=2)[:, 25, 25, :2].tolist()))
    assert set(shifts) == {(y, x) for y in range(23, 28) for x in range(23, 28)}
    assert min(shifts.values()) > 30  # of 60
    mirrored = augmented(images, flip=True)[:, 0, 0]
    assert mirrored.unique(dim=0).tolist() == [[0, 0, 0], [0, 50, 0]]
    assert (mirrored[:, 1] == 50).float().mean().item() == pytest.approx(0.5, abs=0.05)
    moved = augmented(images, rotation=15)[:, 25, 50, 0].numpy() - 25.0  # 25 sin(angle), rounded
    angles = np.rad2deg(np.arcsin(moved / 25))
    assert [angles.min(), angles.mean(), angles.max()] == pytest.approx([-15, 0, 15], abs=2)


def test_cutout_blackens_a_square_about_any_pixel():
    """Cut by the border, as Cutout has it: every row and column is the centre as often; all else stays."""
    cut = augmented(torch.full((6000, 12, 12, 3), 200, dtype=torch.uint8), cutout=4)
    black = (cut == 0).all(dim=-1)
    rows, columns = black.any(dim=2), black.any(dim=1)

    assert torch.equal(black, rows.unsqueeze(2) & columns.unsqueeze(1))
    assert (cut[~black] == 200).all()
    for covered in (rows, columns):
        spans = Counter(map(tuple, covered.tolist()))
        assert set(spans) == {tuple(centre - 2 <= place < centre + 2 for place in range(12)) for centre in range(12)}
        assert min(spans.values()) > 400  # of 500
    assert len(torch.cat([rows, columns], dim=1).unique(dim=0)) == 12 * 12


def test_auto_augment_moves_grey_into_some_images_and_cutout_comes_last():
    """A policy for each image, from its generator alone; what moves in is 128, and no policy touches the hole."""
    white = torch.full((300, 16, 16, 3), 255, dtype=torch.uint8)
    before = torch.get_rng_state()
    seen = augmented(white, auto_augment=True)
    grey, left = ((seen == shade).all(dim=-1).flatten(1).any(dim=1) for shade in (128, 255))

    assert 0.1 < (grey & left).float().mean() < 0.9
    assert torch.equal(seen, augmented(white, auto_augment=True))
    assert torch.equal(before, torch.get_rng_state())
    holes = (augmented(white, auto_augment=True, cutout=8) == 0).all(dim=-1).flatten(1).sum(dim=1)
    assert (holes >= 16).all()


def test_shuffled_visits_every_image_once():
    """Instance-balanced: a permutation."""
    assert sorted(shuffled(torch.zeros(50), torch.Generator()).tolist()) == list(range(50))


def test_class_balanced_draws_classes_evenly_and_images_of_a_class_evenly():
    """A class of 5 images is drawn as often as one of 500, each of its images equally often, give or take one round."""
    labels = torch.tensor([0] * 500 + [1] * 95 + [2] * 5)
    order = class_balanced(labels, torch.Generator().manual_seed(0))

    drawn = torch.bincount(labels[order], minlength=3)
    rare = torch.bincount(order, minlength=600)[595:]
    assert len(order) == 600
    assert drawn.min() > 160
    assert int(rare.max() - rare.min()) <= 1
    assert rare.sum() == drawn[2]


def test_folder_is_read_and_split_by_class(colours):
    """Classes in alphabetical order; a share of each is tested and held out, but a class keeps its last two images."""
    data = load_data(recipe_for(colours, holdout_share=0.2, test_share=0.2))

    assert data.classes == ("blue", "green", "red")
    assert data.counts == (2, 4, 8)
    assert [len(part) for part in (data.train, data.heldout, data.test)] == [14, 3, 4]
    assert data.train.pixels[data.train.labels == 2].unique(dim=0).shape[0] == 1
    assert data.train.pixels[-1, 0, 0].tolist() == [255, 0, 0]


def test_folder_with_train_and_test_keeps_its_test_images(colours, tmp_path):
    """Where the set has test images of its own, none are taken from training."""
    (tmp_path / "own").mkdir()
    colours.rename(tmp_path / "own" / "train")
    for name in ("red", "green", "blue"):
        (tmp_path / "own" / "test" / name).mkdir(parents=True)
        (tmp_path / "own" / "test" / name / "x.png").write_bytes(png((1, 2, 3)))

    data = load_data(recipe_for(tmp_path / "own"))

    assert len(data.test) == 3
    assert len(data.train) + len(data.heldout) == 21


def write_parquet(directory, struct: bool, names: list[str] | None) -> None:
    """20 training and 4 test images of two classes, as bytes or as the struct of Hugging Face."""
    for part, count in (("train", 20), ("test", 4)):
        images = [png((row, 10 * (row % 2), 0)) for row in range(count)]
        table = pyarrow.table({
            "image": [{"bytes": image, "path": None} for image in images] if struct else images,
            "label": [row % 2 for row in range(count)],
        })  # fmt: skip
        if names:
            features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        pyarrow.parquet.write_table(table, directory / f"{part}-00000-of-00001.parquet")


@pytest.mark.parametrize("struct", [False, True])
@pytest.mark.parametrize("names", [None, ["cat", "dog"]])
def test_parquet_is_read_as_bytes_or_struct(tmp_path, struct, names):
    """Both layouts give the same pixels; class names come from the schema where it has them."""
    write_parquet(tmp_path, struct, names)
    data = load_data(recipe_for(tmp_path, profile="exp", imbalance=5))

    assert data.classes == (("cat", "dog") if names else ("class 0", "class 1"))
    assert data.counts == (10, 2)
    assert data.test.pixels[3, 0, 0].tolist() == [3, 10, 0]
    assert len(data.heldout) == 8
    assert "none for" in data.heldout_note


def test_parquet_files_are_known_in_any_case_and_by_other_words(tmp_path):
    """As directories are; a file that begins with no such word is nobody's."""
    write_parquet(tmp_path, struct=False, names=None)
    for old, new in (("train-00000-of-00001", "Training"), ("test-00000-of-00001", "Valid")):
        (tmp_path / f"{old}.parquet").rename(tmp_path / f"{new}.Parquet")
    (tmp_path / "extra.parquet").write_bytes(b"")
    opened = open_set(recipe_for(tmp_path))

    assert {part: len(source) for part, source in opened.parts().items()} == {"train": 20, "test": 4}


def test_an_image_root_needs_list_files(colours, tmp_path):
    """Else it would change nothing, and nobody would know."""
    write_parquet(tmp_path, struct=False, names=None)
    for directory in (tmp_path, colours):
        with pytest.raises(DataError, match=f"image_root={colours}: {directory} has no list files"):
            open_set(recipe_for(directory, image_root=str(colours)))


@pytest.mark.parametrize("other", ["test-00000-of-00001", "train-2", "val"])
@pytest.mark.parametrize("names", [["dog", "cat"], ["cat", "dog", "owl"]])
def test_parquet_files_must_name_their_classes_alike(tmp_path, other, names):
    """The same labels would mean other classes; a file without names follows."""
    write_parquet(tmp_path, struct=False, names=["cat", "dog"])
    table = pyarrow.parquet.read_table(tmp_path / "test-00000-of-00001.parquet")
    pyarrow.parquet.write_table(table.replace_schema_metadata(None), tmp_path / f"{other}.parquet")
    assert open_set(recipe_for(tmp_path)).classes == ["cat", "dog"]
    (tmp_path / "classes.txt").write_text("feline\ncanine\n")  # beside them, it counts
    assert open_set(recipe_for(tmp_path)).classes == ["feline", "canine"]
    (tmp_path / "classes.txt").unlink()

    features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pyarrow.parquet.write_table(table, tmp_path / f"{other}.parquet")
    differing = "class 0 'cat', .* 'dog'" if names[0] == "dog" else "class 2 None, .* 'owl'"
    with pytest.raises(DataError, match=rf"train-0.*names {differing}; write all with the same class names"):
        open_set(recipe_for(tmp_path))


def test_held_out_images_are_those_the_subset_leaves_out(tmp_path):
    """No held-out image is also trained on."""
    write_parquet(tmp_path, struct=False, names=None)
    data = load_data(recipe_for(tmp_path, profile="exp", imbalance=5))

    red = {int(part.pixels[row, 0, 0, 0]) for part in (data.train,) for row in range(len(part))}
    held = {int(data.heldout.pixels[row, 0, 0, 0]) for row in range(len(data.heldout))}
    assert len(red) == 12
    assert not red & held


def test_unreadable_images_are_named_all_at_once(colours):
    """A training does not stop at the first of many."""
    (colours / "red" / "0.png").write_bytes(b"no image")
    (colours / "green" / "1.png").write_bytes(png((0, 0, 0))[:40])

    with pytest.raises(DataError, match=r"(?s)unreadable \(2\): images cannot be read.*(0|1)\.png.*(0|1)\.png"):
        load_data(recipe_for(colours))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: root / "absent", "no such directory"),
        (lambda root: (root / "empty").mkdir() or root / "empty", "0 class directories"),
        (lambda root: (root / "one" / "a").mkdir(parents=True) or root / "one", "1 class directories"),
        (
            lambda root: [(root / "void" / n).mkdir(parents=True) for n in "ab"] and root / "void",
            r"(?s)empty class \(2\): classes have no images.*no images in .*void/a\n.*void/b",
        ),
    ],
)
def test_sets_that_cannot_be_used_are_refused_by_name(tmp_path, prepare, message):
    """The message says which directory and what is wrong with it."""
    with pytest.raises(DataError, match=message):
        load_data(recipe_for(prepare(tmp_path)))


def test_parquet_shards_may_differ_in_all_but_the_meaning(tmp_path):
    """In the order and kinds of their columns, and in columns that nobody reads."""
    first, second = b"first", b"second"
    shards = (
        {"image": pyarrow.array([first], pyarrow.binary()), "label": pyarrow.array([1], pyarrow.int8())},
        {
            "label": pyarrow.array([0], pyarrow.int64()),
            "note": ["x"],
            "img": pyarrow.array([{"bytes": second, "path": "a"}]),
        },
    )
    for number, shard in enumerate(shards):
        pyarrow.parquet.write_table(pyarrow.table(shard), tmp_path / f"train-{number}.parquet")
    train = open_set(recipe_for(tmp_path)).train
    assert [train.images.read(row) for row in range(2)] == [first, second]
    assert train.labels.tolist() == [1, 0]


def test_a_part_of_a_parquet_set_without_rows_is_refused(tmp_path):
    """There would be no figures on it, and no test images of others in its place."""
    write_parquet(tmp_path, struct=False, names=None)
    test = tmp_path / "test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(test).slice(0, 0), test)
    with pytest.raises(DataError, match=f"{tmp_path}: no rows in {test.name}"):
        open_set(recipe_for(tmp_path))


def test_a_parquet_shard_that_does_not_fit_is_named(tmp_path):
    """Not the one that is read first."""
    write_parquet(tmp_path, struct=False, names=None)
    pyarrow.parquet.write_table(pyarrow.table({"image": [b""], "name": ["cat"]}), tmp_path / "train-2.parquet")
    with pytest.raises(DataError, match=r"train-2\.parquet: columns image, name; one of them must be named label"):
        open_set(recipe_for(tmp_path))


def test_parquet_without_known_columns_is_refused(tmp_path):
    """The message lists the columns found and the names wanted."""
    pyarrow.parquet.write_table(pyarrow.table({"picture": [b""], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="columns picture, label; one of them must be named image or img"):
        load_data(recipe_for(tmp_path))


@pytest.mark.parametrize(
    ("images", "kind"),
    [
        (["a.png", "b.png"], "string"),
        ([{"path": "a.png"}, {"path": "b.png"}], "struct<path: string>"),
        ([{"bytes": "a", "path": "a.png"}, None], "struct<bytes: string, path: string>"),
        ([[1, 2], [3]], "list<"),
    ],
)
def test_parquet_images_that_are_no_bytes_are_refused(tmp_path, images, kind):
    """The message names the column, what it holds and what it should."""
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": [0, 1]}), tmp_path / "train.parquet")
    wanted = re.escape(f"train.parquet: column image holds {kind}") + ".*; image files are wanted as binary, or as"
    with pytest.raises(DataError, match=wanted):
        open_set(recipe_for(tmp_path))


@pytest.mark.parametrize(
    "kind", [pyarrow.large_binary(), pyarrow.binary_view(), pyarrow.dictionary(pyarrow.int32(), pyarrow.binary())]
)
@pytest.mark.parametrize("label", [pyarrow.uint8(), pyarrow.uint64(), pyarrow.int16()])
def test_parquet_columns_may_be_of_any_kind_of_bytes_and_whole_numbers(tmp_path, kind, label):
    """Writers differ."""
    images = [png((n, n, n)) for n in range(8)]
    table = pyarrow.table({"image": pyarrow.array(images).cast(kind), "label": pyarrow.array([0, 1] * 4, label)})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")

    found = open_set(recipe_for(tmp_path))
    assert found.train.labels.tolist() == [0, 1] * 4
    assert [found.train.images.read(n) for n in range(8)] == images


@pytest.mark.parametrize("size", [16, 32, 48])
@pytest.mark.parametrize("test_fit", ["crop", "inner_crop"])
def test_cifar_is_fitted_to_the_size_wherever_it_comes_from(tmp_path, monkeypatch, size, test_fit):
    """Arrays from torchvision become the same pixels as parquet rows."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)

    class Downloaded:
        def __init__(self, root: object, train: bool, download: bool) -> None:
            self.data, self.targets = (pixels, [0, 1] * 20) if train else (pixels[:4], [0, 1] * 2)
            self.classes = ["class 0", "class 1"]

    (tmp_path / "cifar10").mkdir()
    for part, rows in (("train", pixels), ("test", pixels[:4])):
        images = [io.BytesIO() for _ in rows]
        for row, buffer in zip(rows, images, strict=True):
            Image.fromarray(row).save(buffer, "PNG")
        table = pyarrow.table({"image": [each.getvalue() for each in images], "label": [0, 1] * (len(rows) // 2)})
        pyarrow.parquet.write_table(table, tmp_path / "cifar10" / f"{part}.parquet")
    recipe = recipe_for("cifar10", image_size=size, test_fit=test_fit, decoding="resident")
    monkeypatch.setenv("RIDE_DATA", str(tmp_path))
    stored = load_data(recipe)
    monkeypatch.delenv("RIDE_DATA")
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Downloaded)
    downloaded = load_data(recipe)

    assert downloaded.train.pixels.shape[1:] == (size, size, 3)
    for part in ("train", "heldout", "test"):
        assert getattr(downloaded, part).pixels.equal(getattr(stored, part).pixels)


def test_channel_statistics_are_of_the_training_images(colours):
    """Mean and deviation per channel of pixels in [0, 1]."""
    data = load_data(recipe_for(colours, holdout_share=0.2, test_share=0.2))
    mean, std = channel_statistics(data.train)

    assert mean == pytest.approx((8 / 14, 4 / 14, 2 / 14), abs=1e-4)
    assert std[0] == pytest.approx((8 / 14 * 6 / 14) ** 0.5, abs=1e-3)


def test_a_channel_that_is_the_same_everywhere_is_not_scaled():
    """A deviation of 0 would make every number of the network NaN: images of one fluorescent dye are green alone."""
    pixels = torch.zeros(6, 4, 4, 3, dtype=torch.uint8)
    pixels[:3, ..., 1], pixels[..., 2] = 255, 255
    mean, std = channel_statistics(Images(pixels, torch.zeros(6, dtype=torch.long)))

    assert mean == (0, 0.5, 1)
    assert std == (1, pytest.approx(0.5, abs=0.01), 1)


def odd_images() -> dict[str, bytes]:
    """Images in every mode and format that both training and service take, none of them square."""
    generator = np.random.default_rng(0)
    colour = Image.fromarray(generator.integers(0, 256, (23, 37, 3), dtype=np.uint8))
    alpha = colour.copy()
    alpha.putalpha(Image.fromarray(generator.integers(0, 256, (23, 37), dtype=np.uint8)))
    turned = Image.Exif()
    turned[0x0112] = 6
    grey16 = Image.fromarray(generator.integers(0, 32_768, (23, 37)).astype(np.uint16))
    colour16 = generator.integers(0, 65_536, (23, 37, 3)).astype(np.uint16)
    cases = {
        "JPEG": (colour, {"quality": 90}), "JPEG turned": (colour, {"exif": turned}),
        "JPEG CMYK": (colour.convert("CMYK"), {}),
        "PNG": (colour, {}), "PNG alpha": (alpha, {}), "PNG grey": (colour.convert("L"), {}),
        "PNG 16 bit": (grey16, {}),
        "PNG 16 bit transparent": (grey16, {"transparency": int(np.asarray(grey16)[11, 18])}),
        "PNG palette": (colour.convert("P"), {"transparency": 3}), "WEBP": (colour, {"lossless": True}),
        "GIF": (colour.convert("P"), {}), "BMP": (colour, {}), "TIFF": (colour, {}),
        "TIFF turned": (colour, {"exif": turned}),
        "PNG bit": (colour.convert("1"), {}), "PNG bit transparent": (colour.convert("1"), {"transparency": 0}),
    }  # fmt: skip
    encoded = {}
    for name, (image, options) in cases.items():
        buffer = io.BytesIO()
        image.save(buffer, name.split()[0], **options)
        encoded[name] = buffer.getvalue()
    shades = generator.integers(0, 4096, (SIZE, SIZE))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    end = encoded["PNG"].index(b"IEND") - 4
    behind = encoded["PNG"][:end] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp) + encoded["PNG"][end:]
    return encoded | {
        "TIFF 12 bit": grey_tiff(shades, 12, 1),
        "TIFF negative": grey_tiff(shades, 16, 0),
        "PNG XMP behind": behind,
        "PNG 4 bit transparent": grey_png_of_4_bits(),
        "PNG 16 bit colour transparent": deep_png(colour16, 2, transparent_chunk(*map(int, colour16[11, 18]))),
    }


@pytest.mark.parametrize("how", ["crop", "inner_crop"])
@pytest.mark.parametrize(("name", "encoded"), odd_images().items(), ids=odd_images().keys())
def test_training_and_service_see_the_same_pixels(name, encoded, how):
    """The two decoders are separate so that neither package imports the other; they must not differ by one bit."""
    from model_export.bundle import InputSpec
    from service.images import decode

    spec = InputSpec(16, 16, how, "bilinear", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(read_image(encoded, 16, how), decode(encoded, spec, 10**6))
