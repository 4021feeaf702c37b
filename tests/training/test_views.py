"""What training and evaluation see of large images, and images and labels that are mixed."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from training.data import views
from training.data.mixing import Mixing
from training.methods.individual import IndividualLoss
from training.recipe import Recipe, RecipeError
from training.recipes import RECIPES

SWIN = dataclasses.replace(RECIPES["ride-swin-t"], image_size=32)
IMAGENET = dataclasses.replace(RECIPES["ride-imagenet-lt-r50"], image_size=32)
PLAIN = dataclasses.replace(IMAGENET, colour_jitter=0.0, flip=False)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photograph() -> Image.Image:
    """60x90, brightness growing to the right, colour to the bottom."""
    row, column = np.mgrid[0:60, 0:90]
    return Image.fromarray(np.stack([2 * column, 3 * row, 0 * row + 90], axis=2).astype(np.uint8))


@pytest.mark.parametrize("recipe", [IMAGENET, SWIN, RECIPES["ride-cifar100"]], ids=lambda recipe: recipe.name)
def test_a_view_follows_its_generator_alone(recipe):
    """The same seed, the same bytes, whatever was drawn elsewhere; another seed, another view."""
    torch.manual_seed(1)
    first = views.train_view(photograph(), recipe, seeded())
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = views.train_view(photograph(), recipe, seeded())
    assert torch.equal(torch.get_rng_state(), state)
    others = [views.train_view(photograph(), recipe, seeded(seed)) for seed in range(1, 6)]

    assert (first.shape, first.dtype) == ((32, 32, 3), np.uint8)
    assert (first == again).all()
    assert not any((first == other).all() for other in others)


def test_a_resized_crop_shows_a_part_of_the_image_at_its_own_scale():
    """8 to 100 % of the area: seen from the ramp's slope, which is steeper the more the view holds."""
    slopes = []
    for seed in range(200):
        view = views.train_view(photograph(), PLAIN, seeded(seed)).astype(float)
        slopes.append([np.diff(view[..., 0].mean(axis=0)).mean() / 2, np.diff(view[..., 1].mean(axis=1)).mean() / 3])
    width, height = 32 * np.array(slopes).T  # of the part, in the image's pixels
    share = width * height / (60 * 90)

    assert 0.05 < share.min() < 0.15
    assert 0.7 < share.max() < 1.0  # of 0.89, what the most extreme proportions leave of this image
    assert np.log(width / height).std() > 0.1


def test_colour_jitter_and_flip_do_what_they_say():
    """Brightness, by up to ±40 %, contrast and saturation change; half of the views are mirrored."""
    grey = Image.new("RGB", (60, 60), (100, 100, 100))
    brightness = [views.train_view(grey, IMAGENET, seeded(seed)).mean() for seed in range(60)]
    assert 58 <= min(brightness) < 75 < 125 < max(brightness) <= 142

    halves = Image.new("RGB", (60, 60), (30, 30, 30))
    halves.paste((120, 60, 60), (0, 0, 30, 60))
    contrasts, saturations = [], []  # neither depends on the brightness
    for seed in range(60):
        view = views.train_view(halves, dataclasses.replace(PLAIN, colour_jitter=0.4), seeded(seed)).astype(float)
        light, dark = view[16, 0], view[16, -1]
        if light[0] > light[1] and dark[0] == dark[1]:  # the view has some of either half
            contrasts.append(light.mean() / dark.mean())
            saturations.append((light[0] - light[1]) / (light.mean() - dark.mean()))
    assert len(contrasts) > 20
    assert np.std(contrasts) > 0.3
    assert np.std(saturations) > 0.1

    flipped = dataclasses.replace(PLAIN, flip=True)
    rising = [views.train_view(photograph(), flipped, seeded(seed))[0, :, 0].astype(int) for seed in range(100)]
    assert 30 < sum(row[-1] > row[0] for row in rising) < 70


def test_a_resized_crop_may_be_turned():
    """What comes in at the corners is black."""
    grey = Image.new("RGB", (60, 60), (100, 100, 100))
    turned = dataclasses.replace(PLAIN, rotation=15.0)
    corners = [views.train_view(grey, turned, seeded(seed))[0, 0, 0] for seed in range(20)]

    assert sum(corner == 0 for corner in corners) > 10
    assert views.train_view(grey, PLAIN, seeded()).min() == 100


@pytest.mark.parametrize(("interpolation", "overshoots"), [("bilinear", False), ("bicubic", True)])
def test_a_resized_crop_is_scaled_by_the_filter_of_the_recipe(interpolation, overshoots):
    """A bicubic one goes beyond the two shades of an edge."""
    edge = Image.new("RGB", (60, 60), (60, 60, 60))
    edge.paste((200, 200, 200), (0, 0, 30, 60))
    recipe = dataclasses.replace(PLAIN, crop_interpolation=interpolation)
    seen = np.stack([views.train_view(edge, recipe, seeded(seed)) for seed in range(20)])

    assert (seen.min() < 60, seen.max() > 200) == (overshoots, overshoots)


def test_erasing_puts_noise_into_a_rectangle_and_leaves_the_rest():
    """Of the share of the images that the recipe names; mean colour and deviation are those of the normalisation."""
    recipe = dataclasses.replace(PLAIN, random_erasing=0.5, mean=(0.85, 0.5, 0.15), std=(0.1, 0.1, 0.1))
    grey = Image.new("RGB", (60, 60), (10, 20, 30))
    seen = [views.train_view(grey, recipe, seeded(seed)) for seed in range(200)]
    holes = [(view != (10, 20, 30)).any(axis=2) for view in seen]
    erased = [(view, hole) for view, hole in zip(seen, holes, strict=True) if hole.any()]

    assert 70 < len(erased) < 130
    boxes = []
    for _, hole in erased:
        rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
        box = hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.mean() > 0.95  # a noise pixel may have the image's colour
        boxes.append((box.size / hole.size, box.shape[1] / box.shape[0]))
    shares, proportions = np.array(boxes).T
    assert 0.01 < shares.min() < 0.05 < 0.25 < shares.max() < 0.36
    assert proportions.min() < 0.5 < 2 < proportions.max()
    noise = np.concatenate([view[hole] for view, hole in erased])
    assert noise.mean(axis=0) == pytest.approx(255 * np.array(recipe.mean), abs=3)
    assert noise.std(axis=0) == pytest.approx(255 * np.array(recipe.std), abs=3)


def test_rand_augment_changes_three_quarters_of_the_images():
    """Two operations with probability 1/2 each, of which one in fourteen is the identity."""
    recipe = dataclasses.replace(PLAIN, rand_augment=True)
    changed = 0
    for seed in range(150):
        with_it, without = (views.train_view(photograph(), r, seeded(seed)) for r in (recipe, PLAIN))
        changed += not (with_it == without).all()

    assert 85 < changed < 130


def test_rand_augment_is_nearly_as_strong_as_can_be(monkeypatch):
    """Magnitude 9 ± 0.5 of 10, which is 27 ± 1.5 of torchvision's 30; what moves in has the mean colour."""
    asked = []

    def record(operations, strength, bins, interpolation, fill):
        asked.append((operations, strength, bins, fill))
        return lambda image: image

    monkeypatch.setattr(views.v2, "RandAugment", record)
    recipe = dataclasses.replace(PLAIN, rand_augment=True, mean=(0.2, 0.4, 0.6))
    for seed in range(300):
        views.train_view(photograph(), recipe, seeded(seed))

    strengths = [strength for _, strength, _, _ in asked]
    assert np.mean(strengths) == pytest.approx(27, abs=0.3)
    assert np.std(strengths) == pytest.approx(1.5, abs=0.3)
    assert {(operations, bins, *fill) for operations, _, bins, fill in asked} == {(1, 31, 51, 102, 153)}
    assert 250 < len(asked) < 350


def test_the_inner_crop_is_resizing_to_256_and_cutting_out_224():
    """To within what a filter does differently when it is applied before the cut."""
    recipe = dataclasses.replace(IMAGENET, image_size=28)
    expected = photograph().resize((48, 32), Image.Resampling.BILINEAR).crop((10, 2, 38, 30))

    found = views.evaluation_view(photograph(), recipe)

    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 2
    whole = views.evaluation_view(photograph(), dataclasses.replace(recipe, test_fit="crop"))
    assert np.abs(whole.astype(int) - np.asarray(expected)).max() > 5


def test_a_decoded_batch_has_the_views_of_an_image_that_is_decoded_on_the_way():
    """Padded crops; the seed decides."""
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    recipe = RECIPES["ride-cifar100"]
    seen = views.train_views(images, recipe, seeded())
    assert (seen.shape, seen.dtype) == (images.shape, torch.uint8)
    assert torch.equal(seen, views.train_views(images, recipe, seeded()))
    alone = views.train_view(Image.fromarray(images[0].numpy()), recipe, seeded())
    assert torch.equal(views.train_views(images[:1], recipe, seeded())[0], torch.from_numpy(alone))


LABELS = torch.tensor([0, 1, 2, 2])
FLAT = torch.tensor([10, 20, 30, 40]).view(4, 1, 1, 1).expand(4, 16, 16, 3).to(torch.uint8)


def test_targets_say_how_much_of_each_image_there_is():
    """Mixup and CutMix alike: the mean brightness of a mixed image is that of its parts by their shares."""
    for mixing in (Mixing(3, 0.8, 0, 0), Mixing(3, 0, 1.0, 0)):
        shares = set()
        for seed in range(20):
            images, targets = mixing(FLAT, LABELS, seeded(seed))
            share = float(targets[0, 0])
            shares.add(round(share, 3))
            expected = share * FLAT.float() + (1 - share) * FLAT.flip(0).float()
            assert images.float().mean(dim=(1, 2, 3)) == pytest.approx(expected.mean(dim=(1, 2, 3)), abs=0.6)
            torch.testing.assert_close(targets[0], torch.tensor([share, 0, 1 - share]))
            torch.testing.assert_close(targets[3], torch.tensor([1 - share, 0, share]))
        assert len(shares) > 10


def test_a_mixup_is_flat_and_a_cutmix_has_two_colours():
    """Each kind changes pixels as its paper says; both on, either happens as often as the other."""
    assert Mixing(3, 0.8, 0, 0)(FLAT, LABELS, seeded(3))[0][0].unique().numel() == 1
    cut = 0
    for seed in range(200):
        images, _ = Mixing(3, 0.8, 1.0, 0)(FLAT, LABELS, seeded(seed))
        cut += set(images[0].unique().tolist()) <= {10, 40}
    assert 75 < cut < 130  # half of them, and mixups whose share rounds to all or nothing


def test_a_cutmix_takes_the_area_that_its_share_leaves():
    """
    Under Beta(1, 1) the side s has s² uniform, and a uniform centre leaves s − s²/4 of it within the border.

    So the mean area is E[(s − s²/4)²] = 1/2 − 1/5 + 1/48.
    """
    images = FLAT[:, :1, :1].expand(4, 64, 64, 3)
    taken = [1 - float(Mixing(3, 0, 1.0, 0)(images, LABELS, seeded(seed))[1][0, 0]) for seed in range(400)]

    assert np.mean(taken) == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.04)


def test_small_alphas_leave_most_images_almost_alone():
    """Shares follow Beta(α, α), of variance 1/(4 · (2α + 1)), and mixed pixels are rounded to the nearest."""
    shares = []
    for seed in range(300):
        images, targets = Mixing(3, 0.1, 0, 0)(FLAT, LABELS, seeded(seed))
        shares.append(float(targets[0, 0]))
        assert images[0, 0, 0, 0] == pytest.approx(10 * shares[-1] + 40 * (1 - shares[-1]), abs=0.501)

    assert np.var(shares) == pytest.approx(1 / 4.8, abs=0.03)


def test_mixed_labels_are_smoothed_too():
    """0.1 over three classes: a class that is in neither image has a thirtieth."""
    for mixing in (Mixing(3, 0.8, 0, 0.1), Mixing(3, 0, 1.0, 0.1)):
        _, targets = mixing(FLAT, LABELS, seeded())

        assert targets[0, 1].item() == pytest.approx(1 / 30)
        assert targets.sum(dim=1).tolist() == pytest.approx([1] * 4)


def test_smoothing_alone_leaves_the_images():
    """0.1 spread over three classes."""
    images, targets = Mixing(3, 0, 0, 0.1)(FLAT, LABELS, seeded())

    assert images is FLAT
    torch.testing.assert_close(targets[1], torch.tensor([0.1, 2.8, 0.1]) / 3 + torch.tensor([0.0, 0.0, 0.0]))


@pytest.mark.parametrize("loss", ["ce", "ldam", "balanced_softmax", "logit_adjusted"])
@pytest.mark.parametrize("epoch", [0, 9])
def test_one_hot_targets_give_the_loss_of_the_labels(loss, epoch):
    """Before and after class weights apply; margins are in place already."""
    recipe = Recipe(name="test", method="ride", loss=loss, epochs=10, deferred_from=0.8)
    individual = IndividualLoss(loss, recipe, [50, 20, 5])
    logits = torch.randn(4, 3, generator=seeded())
    one_hot = torch.nn.functional.one_hot(LABELS, 3).float()

    soft, hard = (individual(logits, LABELS, epoch, targets) for targets in (one_hot, None))

    torch.testing.assert_close(soft, hard)


def test_margins_and_weights_of_mixed_images_follow_their_own_labels():
    """Worked by hand for LDAM with class weights: the target is soft, the lowered logit and the weight are not."""
    recipe = Recipe(name="test", method="ride", loss="ldam", epochs=10, deferred_from=0.8)
    individual = IndividualLoss("ldam", recipe, [50, 20, 5])
    logits, targets = (
        torch.randn(4, 3, generator=seeded()),
        torch.softmax(torch.randn(4, 3, generator=seeded(1)), dim=1),
    )
    lowered = logits.clone()
    for image, label in enumerate(LABELS):
        lowered[image, label] -= 30 * individual.margins[label]
    each = -(targets * torch.log_softmax(lowered, dim=1)).sum(dim=1)
    weights = individual.class_weights[LABELS]

    torch.testing.assert_close(individual(logits, LABELS, 9, targets), (weights * each).sum() / weights.sum())


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"colour_jitter": 0.4}, "colour_jitter=0.4: not with crop='padded'"),
     ({"crop": "resized", "auto_augment": True}, "auto_augment=True: not with crop='resized'"),
     ({"loss": "focal", "mixup": 0.8}, "loss='focal': mixup, cutmix and label_smoothing need a cross-entropy"),
     ({"lr": 0.1, "lr_min": 0.2}, "lr_min=0.2: must be lr=0.1 at most"),
     ({"cycles": 2}, "cycles=2: only schedule='cosine' has more than one"),
     ({"cycles": 3, "schedule": "cosine", "epochs": 100}, "cycles=3: must divide epochs=100"),
     ({"clip_norm": 0.0}, "clip_norm=0.0: must be from"),
     ({"test_fit": "stretch"}, "test_fit='stretch': must be one of crop, inner_crop")],
)  # fmt: skip
def test_impossible_views_are_refused(fields, message):
    """Each names the field, the value and what is possible."""
    with pytest.raises(RecipeError, match=message):
        Recipe(name="test", method="ride", **fields)
