"""Stage by stage: which images stop where, by every rule and in any company."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_export.calibrate import rule_scores
from service.cascade import AbandonedError, Cascade, Job, NotFiniteError, softmax
from service.schedule import Profile, Schedule

N_IMAGES, N_EXPERTS, N_CLASSES = 30, 4, 6
RNG = np.random.default_rng(5)
LOGITS = RNG.normal(size=(N_EXPERTS, N_IMAGES, N_CLASSES)).astype(np.float32) * 2
SCORES = RNG.random((N_EXPERTS - 1, N_IMAGES)).astype(np.float32)
RULES = ("router", "confidence", "margin", "agreement", "depth")


class TableEngine:
    """Experts and routers that read their answers off a table; an image's one pixel is its row."""

    def __init__(self):
        self.runs = []

    def trunk(self, images):
        self.runs.append(("trunk", len(images)))
        return images[:, 0, 0, 0].astype(np.int64)

    def expert(self, index, features, logits_sum):
        self.runs.append((f"expert_{index}", len(features)))
        assert len(features) == len(logits_sum)
        return logits_sum + LOGITS[index, features], features

    def router(self, index, expert_feature, logits_sum):
        return SCORES[index, expert_feature]

    def take(self, features, rows):
        return features[rows]

    def join(self, features):
        return np.concatenate(features)


class TableEngineOfOneClass(TableEngine):
    """Says the first class only."""

    def expert(self, index, features, logits_sum):
        return logits_sum + LOGITS[index, features, :1], features


class NullObserver:
    """Ignores every step."""

    def batch_done(self, report):
        pass


class Noting:
    """Keeps what it is told."""

    def __init__(self):
        self.reports = []

    def batch_done(self, report):
        self.reports.append(report)


class AtWill(Schedule):
    """Merges, and lets fresh images pass where the test says so."""

    def __init__(self, max_batch, decisions):
        super().__init__(max_batch, merges=True)
        self._decisions = decisions

    def fresh_first(self, expert, survivors, waiting):
        return min(waiting, self.max_batch) if self._decisions and self._decisions.pop() else 0


def cascade(rule="router", schedule=None, engine=None, observer=None):
    return Cascade(
        engine or TableEngine(), n_experts=N_EXPERTS, n_classes=N_CLASSES, rule=rule,
        schedule=schedule or Schedule(64), observer=observer or NullObserver(),
    )  # fmt: skip


def job(row, thresholds=(0.5, 0.5, 0.5), max_experts=N_EXPERTS, min_confidence=0.0):
    return Job(np.full((1, 1, 3), row, np.uint8), thresholds, max_experts, min_confidence, N_CLASSES, 0.0)


def expected(rule, row, thresholds, max_experts, min_confidence):
    """Experts used, why, and the probabilities of one image, one expert after the other."""
    scores = rule_scores(rule, LOGITS, SCORES)[:, row]
    for used in range(1, N_EXPERTS + 1):
        exponentials = np.exp(LOGITS[:used, row].mean(axis=0, dtype=np.float64))
        probabilities = exponentials / exponentials.sum()
        if used == N_EXPERTS:
            return used, "last", probabilities
        if scores[used - 1] < np.float32(thresholds[used - 1]) and probabilities.max() >= np.float32(min_confidence):
            return used, "confident", probabilities
        if used == max_experts:
            return used, "budget", probabilities
    raise AssertionError


def assert_answers(outcome, rule, wish):
    used, reason, probabilities = expected(rule, *wish)
    assert (outcome.experts_used, outcome.exit_reason) == (used, reason)
    np.testing.assert_allclose(np.array(outcome.probabilities)[np.argsort(outcome.classes)], probabilities, atol=1e-6)
    known = min(used, N_EXPERTS - 1)
    np.testing.assert_allclose(outcome.router_scores, rule_scores(rule, LOGITS, SCORES)[:known, wish[0]], atol=1e-6)
    assert len(outcome.experts_s) == used


WISHES = st.tuples(
    st.integers(0, N_IMAGES - 1),
    st.tuples(*[st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])] * (N_EXPERTS - 1)),
    st.integers(1, N_EXPERTS),
    st.sampled_from([0.0, 0.0, 0.4, 0.9, 1.0]),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rule=st.sampled_from(RULES),
    wishes=st.lists(WISHES, min_size=1, max_size=25),
    max_batch=st.integers(1, 9),
    decisions=st.lists(st.booleans(), max_size=40),
)
def test_an_answer_depends_neither_on_company_nor_on_policy(rule, wishes, max_batch, decisions):
    """Whatever rule, thresholds and limits, and however survivors of different batches wait for each other and meet."""
    engine = TableEngine()
    work = cascade(rule, AtWill(max_batch, decisions), engine)
    jobs = {job(*wish): wish for wish in wishes}
    waiting, outcomes = list(jobs), {}
    while waiting or work.busy:
        fresh = work.wants(len(waiting)) if waiting else 0
        finished = work.step(waiting[:fresh])
        waiting = waiting[fresh:]
        assert not outcomes.keys() & dict(finished).keys()
        outcomes.update(finished)

    assert outcomes.keys() == jobs.keys()
    for one, wish in jobs.items():
        assert_answers(outcomes[one], rule, wish)
    assert max(count for _, count in engine.runs) <= max_batch


class Clockwork(TableEngine):
    """The trunk takes a second, the experts 10, 100, 1000 and 10,000."""

    now = 1000

    def trunk(self, images):
        self.now += 1
        return super().trunk(images)

    def expert(self, index, features, logits_sum):
        self.now += 10 ** (index + 1)
        return super().expert(index, features, logits_sum)


def test_an_answer_tells_the_times_of_its_own_image(monkeypatch):
    """How long it waited, then each step that it was in; the metrics get the same, by stage."""
    engine, watch = Clockwork(), Noting()
    clock = SimpleNamespace(perf_counter=lambda: engine.now, monotonic=lambda: engine.now)
    monkeypatch.setattr("service.cascade.time", clock)
    hard, easy = job(0, (0, 0, 0)), job(1, (1, 1, 1))
    hard.queued_at, easy.queued_at = 993, 996
    outcomes = cascade(engine=engine, observer=watch).run([hard, easy])

    assert [(one.queue_s, one.trunk_s, one.experts_s) for one in outcomes] == [
        (7, 1, [10, 100, 1000, 10_000]), (4, 1, [10])
    ]  # fmt: skip
    assert watch.reports[0].waits == [7, 4]
    assert [stage for report in watch.reports for stage in report.stages] == [
        ("trunk", 2, 1), ("expert_0", 2, 10), ("expert_1", 1, 100), ("expert_2", 1, 1000), ("expert_3", 1, 10_000)
    ]  # fmt: skip


def test_the_finished_are_answered_before_the_others_go_on():
    """An easy image does not wait for the hard ones of its batch."""
    work = cascade()
    easy, hard = job(0, thresholds=(1, 1, 1)), job(1, thresholds=(0, 0, 0))

    assert [one for one, _ in work.step([easy, hard])] == [easy]
    assert work.busy
    assert work.step([]) == work.step([]) == []
    assert [one for one, _ in work.step([])] == [hard]
    assert not work.busy


def test_an_image_that_nobody_waits_for_leaves_between_two_experts():
    """The others go on without it; alone, it runs nothing any more."""
    engine = TableEngine()
    work = cascade(engine=engine)
    kept, left = job(0, (0, 0, 0)), job(1, (0, 0, 0))
    assert work.step([kept, left]) == []
    left.abandoned = True
    ((gone, error),) = work.step([])
    assert (gone, type(error)) == (left, AbandonedError)
    kept.abandoned = True
    assert [type(error) for _, error in work.step([])] == [AbandonedError]

    assert engine.runs == [("trunk", 2), ("expert_0", 2), ("expert_1", 1)]
    assert not work.busy


def test_what_an_engine_raises_is_the_fate_of_those_in_the_step():
    """Also of survivors of several batches that met in it; nobody is forgotten."""
    engine = TableEngine()
    work = cascade(schedule=AtWill(8, [True]), engine=engine)
    first, second, third = (job(row, (0, 0, 0)) for row in range(3))
    assert work.step([first]) == []
    assert work.wants(1) == 1
    assert work.step([second]) == []
    engine.expert = lambda *_: 1 / 0
    fates = dict(work.step([]))
    assert {one: type(error) for one, error in fates.items()} == dict.fromkeys((first, second), ZeroDivisionError)
    assert [type(error) for _, error in work.step([third])] == [ZeroDivisionError]
    assert not work.busy


@pytest.mark.parametrize("batches", [1, 2])
def test_whoever_had_left_when_the_engine_raises_is_told_of_too(batches):
    """Once, as a job that nobody waits for; the others of its step get the error."""
    engine = TableEngine()
    work = cascade(schedule=AtWill(8, [True] * (batches - 1)), engine=engine)
    stays, leaves, third = (job(row, (0, 0, 0)) for row in range(3))
    assert work.step([stays, leaves]) == []
    if batches == 2:
        assert work.wants(1) == 1
        assert work.step([third]) == []
    leaves.abandoned = True
    engine.expert = lambda *_: 1 / 0

    fates = work.step([])

    others = (stays, third)[:batches]
    told = {one: type(error) for one, error in fates}
    assert told == {leaves: AbandonedError, **dict.fromkeys(others, ZeroDivisionError)}
    assert len(fates) == len(told)
    assert not work.busy


@pytest.mark.parametrize("rule", RULES)
def test_nan_is_the_fate_of_its_image_alone(rule):
    """By whatever rule the others stop."""
    engine = TableEngine()
    usual = engine.expert
    engine.expert = lambda index, features, logits_sum: (
        np.where(features[:, None] == 2, np.nan, usual(index, features, logits_sum)[0]), features,
    )  # fmt: skip
    wishes = [(row, (0.3, 0.5, 0.5), N_EXPERTS, 0.3) for row in range(5)]
    outcomes = cascade(rule, engine=engine).run([job(*wish) for wish in wishes])

    for wish, outcome in zip(wishes, outcomes, strict=True):
        if wish[0] == 2:
            assert isinstance(outcome, NotFiniteError)
        else:
            assert_answers(outcome, rule, wish)


def test_a_score_that_is_nan_is_the_fate_of_its_image_alone():
    """It is lower than no threshold and higher than none, and would spoil the histogram of scores for ever."""
    engine, watch = TableEngine(), Noting()
    engine.router = lambda index, rows, _: np.where(rows == 1, np.float32(np.nan), SCORES[index, rows])
    sound, broken = cascade(engine=engine, observer=watch).run([job(0, (1, 1, 1)), job(1, (1, 1, 1))])

    assert_answers(sound, "router", (0, (1, 1, 1), N_EXPERTS, 0.0))
    assert isinstance(broken, NotFiniteError)
    assert watch.reports[0].router_scores == [(0, [SCORES[0, 0]])]


def test_logits_of_any_size_become_probabilities():
    """Those of linear classifiers grow to hundreds of thousands; 32-bit exponentials overflow at 89."""
    found = softmax(np.array([[1e5, -1e5, 1e5], [-1e5, -1e5, 0]], np.float32))

    assert found.tolist() == [[0.5, 0, 0.5], [0, 0, 1]]


def test_the_only_class_leads_by_all_there_is():
    """A model of one class has no second one; nothing goes on where the margin decides."""
    (outcome,) = Cascade(
        TableEngineOfOneClass(), n_experts=N_EXPERTS, n_classes=1, rule="margin", schedule=Schedule(1),
        observer=NullObserver(),
    ).run([Job(np.zeros((1, 1, 3), np.uint8), (0.5,) * (N_EXPERTS - 1), N_EXPERTS, 0.0, 1, 0.0)])  # fmt: skip

    assert (outcome.experts_used, outcome.probabilities, outcome.router_scores) == (1, [1.0], [0.0])


def test_an_image_that_is_as_sure_as_it_must_be_stops():
    """The next expert runs below `min_confidence`, not at it."""
    engine = TableEngine()
    engine.expert = lambda index, features, logits_sum: (logits_sum + np.array([100, 0, 0, 0, 0, 0]), features)
    (outcome,) = cascade(engine=engine).run([job(0, (1, 1, 1), min_confidence=1.0)])

    assert (outcome.probabilities[0], outcome.experts_used, outcome.exit_reason) == (1.0, 1, "confident")


def profile(base, per_image):
    """Stages that take `base` seconds and `per_image` for each image."""
    times = {size: base + per_image * size for size in (1, 64)}
    return Profile(dict.fromkeys(["trunk", *(f"expert_{expert}" for expert in range(N_EXPERTS))], times))


@pytest.mark.parametrize(
    ("base", "per_image", "waiting", "fresh"),
    [
        (1e-3, 0, 64, 64),  # a stage takes as long for 64 as for 1, and many wait: run together
        (1e-3, 0, 8, 0),  # too few are behind to gain from the device's time
        (1e-3, 0, 0, 0),
        (0, 1e-3, 64, 0),  # time grows with the images: there is nothing to gain
    ],
)
def test_survivors_wait_for_company_where_that_lowers_the_mean_latency(base, per_image, waiting, fresh):
    """S * waiting > T * survivors: with 12 survivors of 4 stages that take a millisecond."""
    schedule = Schedule(64, merges=True, profile=profile(base, per_image), reach=(1.0, 0.5, 0.3, 0.2))

    assert schedule.fresh_first(1, 12, waiting) == fresh
    assert Schedule(64).fresh_first(1, 12, waiting) == 0


UNEVEN = Profile({
    "trunk": {8: 3.0}, "expert_0": {8: 1.0}, "expert_1": {1: 0.5, 8: 4.0}, "expert_2": {1: 10.0, 5: 10.0, 8: 22.0}
})  # fmt: skip


@pytest.mark.parametrize(
    ("survivors", "waiting", "fresh"),
    [
        (3, 10, 0), (3, 11, 8),  # t(3) + t(4) - t(7) = 10 + 10 - 18 = 2 for each that waits, 7 for each survivor
        (6, 21, 0), (6, 22, 8),  # there is room for two more only: 14 + 10 - 22 = 2
        (8, 99, 0),  # or for none
        (3, 4, 4),  # of as few as wait, two come so far, sooner: 10 + 10 - 10 saved by each, for 3 + 1 + 1.5 seconds
    ],
)  # fmt: skip
def test_what_waiting_costs_and_saves_follows_the_profile(survivors, waiting, fresh):
    """Before expert 2: of eight fresh images, the most there can be, four will come so far, after 3 + 1 + 3 seconds."""
    schedule = Schedule(8, merges=True, profile=UNEVEN, reach=(1.0, 0.75, 0.5))

    assert schedule.fresh_first(2, survivors, waiting) == fresh


def test_survivors_let_one_batch_pass_and_no_more():
    """However many wait: those that came furthest run as soon as the others have caught up."""
    work = cascade(schedule=AtWill(2, [True] * 20))
    old, new = job(0, (0, 0, 0)), job(1, (0, 0, 0))
    work.step([old])
    work.step([])  # now before expert 2
    assert work.wants(1) == 1
    work.step([new])
    assert work.wants(5) == 0
    work.step([])
    assert work.wants(5) == 0
    assert work.step([]) == []
    assert work.wants(5) == 2  # they have caught up: the next batch may pass
    assert {one for one, _ in work.step([])} == {old, new}


def test_it_is_those_whose_turn_it_is_that_the_schedule_weighs():
    """Those that came furthest, and where nobody is let pass, they go on."""
    weighed = []

    class Weighing(AtWill):
        def fresh_first(self, expert, survivors, waiting):
            weighed.append((expert, survivors))
            return super().fresh_first(expert, survivors, waiting)

    engine = TableEngine()
    work = cascade(schedule=Weighing(2, [True]), engine=engine)
    work.step([job(0, (0, 0, 0)), job(1, (0, 0, 0))])
    assert work.wants(1) == 1
    work.step([job(2, (0, 0, 0))])
    work.step([])  # there is no room for three: the first two go on alone
    assert work.wants(1) == 0
    work.step([])

    assert weighed == [(1, 2), (2, 2)]
    assert engine.runs[-1] == ("expert_2", 2)


def test_survivors_that_meet_are_no_larger_a_batch_than_others():
    """Of three batches that shrank to a half while they waited, two run together."""
    engine = TableEngine()
    work = cascade(schedule=AtWill(4, [True, True]), engine=engine)
    batches = [[job(row, (0, row % 2, 0)) for row in range(first, first + 4)] for first in (0, 4, 8)]
    work.step(batches[0])
    assert work.wants(4) == 4
    work.step(batches[1])
    work.step([])  # the first batch; there is no room for the second
    assert work.wants(4) == 4
    for fresh in (batches[2], [], [], []):
        work.step(fresh)

    assert engine.runs[-3:] == [("expert_1", 4), ("expert_1", 4), ("expert_2", 4)]


@pytest.mark.parametrize("max_experts", [2, 3])
def test_nobody_waits_for_ever_while_fresh_images_keep_coming(max_experts):
    """Survivors of two batches do not fit into one, and whoever may let another batch pass does."""
    running = cascade(schedule=AtWill(4, [True] * 1000))
    begun, ages = {}, []
    for step in range(60):
        fresh = [job(row, (0, 0, 0), max_experts) for row in range(running.wants(8))]
        begun |= dict.fromkeys(fresh, step)
        ages += [step - begun.pop(done) for done, _ in running.step(fresh)]

    assert len(ages) > 4 * 60 / (max_experts + 1)
    assert max([*ages, *(60 - step for step in begun.values())]) <= 3 * max_experts


def test_a_profile_reads_between_its_measurements():
    """Linear between sizes."""
    measured = Profile({"trunk": {1: 1.0, 3: 2.0}, "expert_0": {1: 4.0, 3: 12.0}, "expert_1": {1: 7.0, 3: 7.0}})

    assert [measured.seconds("trunk", images) for images in (0, 1, 2, 3)] == [0, 1, 1.5, 2]
    assert measured.longest_step(1) == 7
    assert measured.longest_step(3) == 2 + 12
