"""Which images an epoch visits, and how often."""

import pytest
import torch

from training.data.samplers import (
    batch_sizes,
    class_aware,
    class_balanced,
    of_classes,
    reversed_frequency,
    uniform_and_reversed,
)

COUNTS = (400, 80, 20)
LABELS = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))[torch.randperm(500)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def shares(order):
    """Of the classes among the drawn images, from many epochs."""
    return (torch.bincount(LABELS[order], minlength=3) / len(order)).tolist()


def over_epochs(sampler, epochs=40):
    return torch.cat([sampler(LABELS, seeded(seed)) for seed in range(epochs)])


@pytest.mark.parametrize("sampler", [class_balanced, class_aware])
def test_balanced_samplers_draw_classes_alike_and_images_within_a_class_alike(sampler):
    """N draws; a class's images differ by one pass at most."""
    order = sampler(LABELS, seeded())

    assert len(order) == len(LABELS)
    assert shares(over_epochs(sampler)) == pytest.approx([1 / 3] * 3, abs=0.02)
    rare = torch.bincount(order, minlength=500)[LABELS == 2]
    assert rare.max() - rare.min() <= 1


@pytest.mark.parametrize("sampler", [class_balanced, class_aware])
def test_a_class_that_is_used_up_comes_again_in_another_order(sampler):
    """All twenty images of the rare class, then all of them once more, reshuffled."""
    order = sampler(LABELS, seeded())
    first, second = order[LABELS[order] == 2][:40].view(2, 20)

    assert torch.equal(first.sort().values, second.sort().values)
    assert not torch.equal(first, second)
    assert not torch.equal(first, first.sort().values)


def test_class_aware_sampling_takes_four_images_of_each_class_before_any_class_comes_again():
    """Class after class in a fresh order, four images each."""
    labels = LABELS[class_aware(LABELS, seeded())][:480].view(-1, 4)

    assert torch.equal(labels, labels[:, :1].expand(-1, 4))
    passes = labels[:, 0].view(-1, 3)
    assert torch.equal(passes.sort(dim=1).values, torch.arange(3).expand(len(passes), 3))
    assert len(passes.unique(dim=0)) > 1


def test_reversed_frequencies_are_inverse_to_class_sizes():
    """P(c) is proportional to n_max/n_c: 1 to 5 to 20 here; any image of a class is as likely as another."""
    order = over_epochs(reversed_frequency)

    assert shares(order) == pytest.approx([1 / 26, 5 / 26, 20 / 26], abs=0.01)
    drawn = torch.bincount(order, minlength=500)[LABELS == 2]
    assert drawn.sum() / len(drawn) == pytest.approx(drawn.float().mean())
    assert drawn.min() > 0.8 * drawn.float().mean()
    frequent = torch.bincount(order, minlength=500)[LABELS == 1]
    assert 0.5 * frequent.float().mean() < frequent.min() <= frequent.max() < 1.6 * frequent.float().mean()


def test_bbn_batches_are_half_uniform_and_half_reversed():
    """The uniform halves together hold an image once at most; those left over make no batch of their own."""
    order = over_epochs(uniform_and_reversed(64), epochs=1)
    batches = order.split(64)

    assert [len(batch) for batch in batches] == [64] * (500 // 32)
    uniform = torch.cat([batch[:32] for batch in batches])
    rare = torch.cat([batch[32:] for batch in batches])
    assert len(uniform.unique()) == len(uniform)
    assert shares(rare) == pytest.approx([1 / 26, 5 / 26, 20 / 26], abs=0.07)


def test_too_few_images_for_a_bbn_batch_make_a_short_one():
    """In halves, too."""
    order = uniform_and_reversed(2000)(LABELS, seeded())

    assert torch.equal(order[:500].sort().values, torch.arange(500))
    assert shares(order[500:]) == pytest.approx([1 / 26, 5 / 26, 20 / 26], abs=0.07)


def test_a_teacher_sees_the_images_of_its_classes_once():
    """And no others."""
    order = of_classes([0, 2])(LABELS, seeded())

    assert torch.equal(order.sort().values, torch.nonzero(LABELS != 1).flatten())
    assert not torch.equal(order, order.sort().values)


@pytest.mark.parametrize("sampler", [class_aware, reversed_frequency, uniform_and_reversed(64), of_classes([0, 1])])
def test_an_order_is_decided_by_its_seed(sampler):
    """The same seed, the same order; another seed, another one."""
    assert torch.equal(sampler(LABELS, seeded(1)), sampler(LABELS, seeded(1)))
    assert not torch.equal(sampler(LABELS, seeded(1)), sampler(LABELS, seeded(2)))


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [1]), (3, [3]), (4, [4]), (5, [5]), (6, [4, 2]), (8, [4, 4]), (9, [4, 5]), (0, [])]
)
def test_no_image_is_left_for_a_batch_of_its_own(count, sizes):
    """Nor lost: it joins the batch before, where there is one."""
    assert batch_sizes(count, 4) == sizes
