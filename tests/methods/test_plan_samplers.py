"""The plan under every sampler of diffusers: noise levels, exact counts, weights that keep what they must."""

import warnings
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import h2cache
from h2cache.api import last_course
from h2cache.grid import default_steps
from h2cache.outputs import HELD, Outputs
from h2cache.plan import PlanConfig
from h2cache.schedule import Course, Schedule
from tests.helpers.plans import SAMPLERS, STOCHASTIC, Loop, Toy, sampler

FEW = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@cache
def course_of(name: str, steps: int, begin: int = 0, starts: tuple[int, ...] = (0,)) -> Course:
    scheduler, steps = sampler(name), min(steps, 9) if "KDPM2" in name else steps  # whose grid takes long
    scheduler.set_timesteps(steps, **({"mu": 1.0} if "dynamic" in name else {}))
    schedule = Schedule.of(Loop(None, scheduler))
    return schedule.course(begin, len(schedule) - begin, starts)


@pytest.mark.parametrize("name", SAMPLERS)
def test_levels_fall_within_the_unit_interval_and_lengths_add_up(name):
    course = course_of(name, 30)
    assert len(course.levels) == course.steps + 1
    assert course.levels == tuple(sorted(course.levels, reverse=True))
    assert course.levels[0] <= 1
    assert course.levels[-1] >= 0
    assert all(length <= 0 for length in course.lengths)
    assert sum(course.lengths) < -0.5


@pytest.mark.parametrize("name", SAMPLERS)
@FEW
@given(steps=st.integers(1, 100), share=st.floats(0, 1), begin=st.integers(0, 3))
def test_any_number_of_evaluations_is_met_and_what_is_held_suffices(name, steps, share, begin):
    begin = min(begin, steps - 1) * (2 if "Heun" in name or "KDPM2" in name else 1)
    course = course_of(name, steps, begin)
    wanted = 1 + round(share * (course.steps - 1))
    evaluated = PlanConfig(evaluations=wanted, file="none").choose(course).steps
    assert len(evaluated) == wanted
    assert evaluated[0] == 0
    for target in ("sampler", "ode") if course.adds_up else ("sampler",):
        for trust in (None, 1.0, 0.0):
            constant, outputs = answers(course, evaluated, lambda level: 3.0, target, trust)
            assert constant == pytest.approx([3.0] * course.steps, abs=1e-4)  # a constant output is kept
            assert len(outputs.outputs_kept) <= HELD


def answers(
    course: Course,
    evaluated: tuple[int, ...],
    output: Callable[[float], float],
    target: str = "sampler",
    trust: float | None = 1.0,
) -> tuple[list[float], Outputs]:
    """What stands at each step, where the model's output depends on the noise level alone."""
    outputs, given = Outputs(course, evaluated, course.steps, target, trust, 1), []
    for step in range(course.steps):
        assert outputs.skips(step) == (step not in evaluated)
        if outputs.skips(step):
            assert outputs.ready(step)
            given.append(outputs.stand_in(step)[0].item())
        else:
            given.append(output(course.levels[step]))
            outputs.learn(step, [torch.full((1, 1, 1), given[-1], dtype=torch.float32)])
    return given, outputs


@pytest.mark.parametrize("name", ["flow Euler", "flow UniPC", "Euler", "DDIM", "LMS"])
@pytest.mark.parametrize("trust", [1.0, None])
@FEW
@given(steps=st.integers(5, 100), share=st.floats(0.1, 1), slope=st.floats(-3, 3))
def test_an_output_on_a_line_over_the_noise_is_forecast(name, trust, steps, share, slope):
    course = course_of(name, steps)
    evaluated = PlanConfig(evaluations=max(2, round(share * steps)), file="none").choose(course).steps
    given, _ = answers(course, evaluated, lambda level: 2 + slope * level, trust=trust)
    skipped = [q for q in range(course.steps) if q not in evaluated]
    first = next((s for s in evaluated[2:] if s + 1 in skipped), course.steps)  # pays for the guesses before
    settled = min([s for s in evaluated if s > first], default=course.steps)
    for step in skipped:
        if step > settled:
            assert given[step] == pytest.approx(2 + slope * course.levels[step], abs=2e-4)


def test_over_a_gap_the_debt_is_paid_so_that_a_line_ends_where_it_should():
    course = course_of("flow Euler", 30)
    evaluated = PlanConfig(evaluations=8, file="none").choose(course).steps
    given, _ = answers(course, evaluated, lambda level: level)
    end = [b for a, b in pairwise(evaluated) if b - a > 1][1]  # the second gap pays for the first
    added = sum(length * value for length, value in zip(course.lengths[:end], given, strict=False))
    right = sum(length * level for length, level in zip(course.lengths[:end], course.levels, strict=False))
    assert added == pytest.approx(right, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 3])
def test_an_output_that_turns_is_reused_and_not_drawn_out(batch):
    """Image by image: the first of a batch goes on in a line, the others turn back."""
    course = course_of("flow Euler", 40)
    evaluated = (0, 8, 16, 24)
    outputs = Outputs(course, evaluated, course.steps, "sampler", None, batch)
    turns = torch.tensor([1.0, -1.0, -1.0][:batch]).reshape(-1, 1, 1)
    values = [torch.zeros(batch, 1, 4), torch.ones(batch, 1, 4), 1 + turns]
    for step, value in zip(evaluated, values, strict=False):
        outputs.learn(step, [value])
    *_, (owed,) = outputs.outputs_kept
    moved = (outputs.stand_in(20)[0] - owed / sum(course.lengths[17:24]) - values[-1]).abs().amax((1, 2))
    assert moved[0] > 0.1
    assert not moved[1:].any()


@pytest.mark.parametrize(("size", "follows"), [(0.02, True), (2.0, False)])
def test_the_first_line_of_a_flow_is_followed_as_far_as_its_change_is_small(size, follows):
    course = course_of("flow Euler", 40)
    evaluated = (0, 8, 16)
    outputs = Outputs(course, evaluated, course.steps, "sampler", None, 1)
    first = torch.ones(1, 1, 4)
    for step, value in zip(evaluated, (first, (1 + size) * first), strict=False):
        outputs.learn(step, [value])
    *_, (owed,) = outputs.outputs_kept
    moved = outputs.stand_in(12)[0] - owed / sum(course.lengths[9:16]) - (1 + size) * first
    line = size * (course.levels[8] - course.levels[12]) / (course.levels[0] - course.levels[8])
    assert ((moved / line) > 0.8).all() if follows else ((moved / line) < 0.1).all()


@pytest.mark.parametrize(
    ("name", "gap"),
    [("flow Euler", True), ("DDIM", True), ("flow UniPC", False), ("UniPC", False), ("Heun", False)],
)
def test_a_gap_is_left_after_the_last_evaluation_where_that_was_found_to_be_better(name, gap):
    """Few evaluations: of many, the gap is less than a step."""
    course = course_of(name, 40)
    assert (default_steps(course, 3)[-1] < course.steps - 1) == gap
    assert default_steps(course, 30)[-1] == course.steps - 1


def test_of_the_two_steps_of_heun_the_first_is_evaluated():
    course = course_of("flow Heun", 20)
    steps = default_steps(course, 8)
    assert all(course.levels[step] != course.levels[step - 1] for step in steps[1:])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_real_loop_runs_the_model_so_often_and_all_steps_change_nothing(name):
    pipe = Loop(Toy(), sampler(name))
    steps = 14
    uncached = pipe(steps)
    total = len(pipe.transformer.calls)
    assert total == len(pipe.scheduler.timesteps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for count in (1, 2, 5, total - 1, total):
            h2cache.enable(pipe, evaluations=count)
            pipe.transformer.calls.clear()
            drawn = pipe(steps)
            assert len(pipe.transformer.calls) == count
            summary = h2cache.summary(pipe)
            assert len(summary.evaluated) == count
            assert summary.steps == total
            if count == total:
                assert torch.equal(drawn, uncached)
            elif any(
                abs(last_course(pipe).lengths[n]) > 0.01 for n in set(range(total)) - {*summary.evaluated}
            ):
                assert not torch.equal(drawn, uncached)
        assert torch.isfinite(drawn).all()
        h2cache.disable(pipe)
    assert torch.equal(pipe(steps), uncached)


@pytest.mark.parametrize("name", ["flow Euler", "flow Heun", "UniPC", "DDIM", "PNDM", "KDPM2"])
@pytest.mark.parametrize("begin", [1, 6])
def test_image_to_image_begins_in_the_middle(name, begin):
    pipe = Loop(Toy(), sampler(name))
    uncached = pipe(14, begin=begin)
    total = len(pipe.transformer.calls)
    for count in (3, total):
        h2cache.enable(pipe, evaluations=count)
        pipe.transformer.calls.clear()
        drawn = pipe(14, begin=begin)
        assert len(pipe.transformer.calls) == count
    assert torch.equal(drawn, uncached)


@pytest.mark.parametrize("steps", range(1, 31))
def test_every_count_of_every_length(steps):
    pipe = Loop(Toy(), sampler("flow Euler dynamic"))
    for count in range(1, steps + 1, 1 + steps // 6):
        h2cache.enable(pipe, evaluations=count)
        pipe.transformer.calls.clear()
        pipe(steps)
        assert len(pipe.transformer.calls) == count


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_that_draws_noise_is_told_from_one_that_does_not(name):
    assert course_of(name, 10).stochastic == (name in STOCHASTIC)


def test_a_stochastic_sampler_is_warned_of():
    pipe = h2cache.enable(Loop(Toy(), sampler("Euler ancestral")), speedup=4)
    warnings.simplefilter("always", UserWarning)
    with pytest.warns(UserWarning, match="draws fresh noise"):
        pipe(16)
    assert "draws fresh noise" in str(h2cache.summary(pipe))
    h2cache.enable(pipe, evaluations=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe(16)


@pytest.mark.parametrize("name", ["flow Euler", "UniPC", "DDIM zero SNR", "Heun", "EDM Euler"])
def test_a_forecast_is_nearer_than_the_newest_output(name):
    """Payback and line together, on a model whose output bends."""
    pipe = Loop(Toy(), sampler(name))
    right = pipe(40)
    h2cache.enable(pipe, evaluations=len(pipe.transformer.calls) // 4)
    near = (pipe(40) - right).norm()
    course = h2cache.api.last_course(pipe)
    held = {q: max(s for s in h2cache.summary(pipe).evaluated if s <= q) for q in range(course.steps)}
    outputs = {}

    class Repeats(Toy):
        def forward(self, *args, **kwargs):
            step = len(self.calls)
            out = super().forward(*args, **kwargs)
            outputs[step] = out
            return outputs[held[step]]

    assert near < (Loop(Repeats(), sampler(name))(40) - right).norm()
