"""The plan under every sampler of diffusers: noise levels, exact counts, weights that keep what they must."""

import warnings
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import h2cache
from h2cache.plan import HELD, PlanConfig, stand_ins
from h2cache.schedule import Course, Schedule
from tests.helpers.plans import SAMPLERS, STOCHASTIC, Loop, Toy, sampler

FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MOST_WEIGHT = 100.0  # 70 was seen, of Karras steps in large gaps; further out bfloat16 would show


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
    check_table(course, evaluated, "sampler")
    if course.adds_up:
        check_table(course, evaluated, "ode")


def check_table(course: Course, evaluated: tuple[int, ...], target: str) -> None:
    table, errors = stand_ins(course, evaluated, course.steps, target)
    assert sorted(table) == [q for q in range(course.steps) if q not in evaluated]
    for step, weights in table.items():
        held = [s for s in evaluated if s < step][-HELD:]
        assert weights.keys() <= set(held)
        assert sum(weights.values()) == pytest.approx(1)  # a constant output is kept
        if target == "sampler":
            assert max(map(abs, weights.values())) < MOST_WEIGHT
    for step, weights in errors.items():
        assert weights.keys() <= {s for s in evaluated if s <= step}
        assert sum(weights.values()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["flow Euler", "flow UniPC", "Euler", "DDIM", "LMS"])
@FEW
@given(steps=st.integers(5, 100), share=st.floats(0.1, 1), slope=st.floats(-3, 3))
def test_an_output_on_a_line_over_the_noise_is_forecast_exactly(name, steps, share, slope):
    course = course_of(name, steps)
    evaluated = PlanConfig(evaluations=max(2, round(share * steps)), file="none").choose(course).steps
    table, _ = stand_ins(course, evaluated, course.steps, "sampler")
    paid = next((s for s in evaluated[1:] if s + 1 in table), course.steps)  # for the constant before it
    settled = min([s for s in evaluated if s > paid], default=course.steps)
    for step, weights in table.items():
        if step > settled:
            said = sum(w * (2 + slope * course.levels[s]) for s, w in weights.items())
            assert said == pytest.approx(2 + slope * course.levels[step], abs=1e-6)


def test_over_a_gap_the_debt_is_paid_so_that_a_line_ends_where_it_should():
    course = course_of("flow Euler", 30)
    evaluated = PlanConfig(evaluations=8, file="none").choose(course).steps
    table, _ = stand_ins(course, evaluated, course.steps, "sampler")
    gaps = [b for a, b in pairwise(evaluated) if b - a > 1]
    end = gaps[1]  # the constant of the first gap is paid for in the second

    def added(output) -> float:
        return sum(course.lengths[q] * output(q) for q in range(end))

    said = added(lambda q: sum(w * course.levels[s] for s, w in table.get(q, {q: 1.0}).items()))
    assert said == pytest.approx(added(lambda q: course.levels[q]), abs=1e-9)


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
            assert torch.equal(drawn, uncached) == (count == total)
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
