"""Predictors on small streams: samples, times, precision, and paying back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from h2cache import predictors, weights
from h2cache.predictors import Forecast, build
from h2cache.program import Stream

POLYNOMIAL = ("taylor", "newton", "hermite", "taylor_scaled")


def stream(seed: int, batch: int = 1, dtype=torch.float32) -> Stream:
    g = torch.Generator().manual_seed(seed)
    return Stream(
        torch.randn(batch, 6, 4, generator=g).to(dtype), torch.randn(batch, 2, 4, generator=g).to(dtype)
    )


def line(at: float, a: Stream, b: Stream) -> Stream:
    return a + b.map(lambda t: t * at)


def close(x: Stream, y: Stream, tolerance: float = 1e-4) -> bool:
    return torch.allclose(x.img, y.img, atol=tolerance) and torch.allclose(x.txt, y.txt, atol=tolerance)


@pytest.mark.parametrize("name", ["taylor", "newton", "dmd"])
def test_a_line_is_continued(name):
    a, b, predictor = stream(0), stream(1), build(name)
    for at in (0.0, 2.0, 5.0):
        predictor.learn(line(at, a, b), at=at)
    for at in (6.0, 9.0):
        assert close(predictor.predict(at), line(at, a, b))
        assert close(predictor.predict(at), line(at, a, b))  # asking twice changes nothing


@pytest.mark.parametrize("name", predictors.NAMES)
def test_one_residual_is_reused_and_a_second_of_the_same_time_replaces_it(name):
    predictor = build(name, order=2)
    predictor.learn(stream(0), at=3.0)
    predictor.learn(stream(1), at=3.0)
    assert close(predictor.predict(7.0), stream(1), 0)


@pytest.mark.parametrize("name", predictors.NAMES)
@pytest.mark.parametrize("repay", [False, True])
def test_states_says_how_much_is_held(name, repay):
    predictor = build(name, order=2, repay=repay)
    for at in range(10):
        predictor.learn(stream(at), at=float(at))
    held = [predictor.residual] if name == "last" and not repay else [*predictor.residuals]
    assert len(held) == predictors.states(name, 2, repay)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([*POLYNOMIAL, "dmd"]),
    st.booleans(),
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=3, max_size=9),
)
def test_a_batch_is_its_samples(name, repay, fates):
    """Two samples that learn at different steps get what each would get alone."""
    together, alone = build(name, 2, repay=repay), [build(name, 2, repay=repay) for _ in range(2)]
    for at, misses in enumerate([(True, True), *fates]):
        now, kept = stream(at, batch=2), [not m for m in misses]
        each = [Stream(now.img[n : n + 1], now.txt[n : n + 1]) for n in range(2)]
        if any(kept):
            both = together.predict(float(at), kept=kept)
            for n in range(2):
                if kept[n]:
                    one = alone[n].predict(float(at))
                    assert torch.allclose(both.img[n : n + 1], one.img, rtol=1e-4, atol=1e-4)
        if not all(kept):
            together.learn(now, kept=kept, at=float(at))
            for n in range(2):
                if misses[n]:
                    alone[n].learn(each[n], at=float(at))


def test_bfloat16_rounds_once():
    exact, rounded = Forecast(weights.last, 3), Forecast(weights.last, 3)
    rule = lambda times, x: [10.0, -19.0, 10.0]  # noqa: E731
    exact.rule = rounded.rule = rule
    for at in range(3):
        r = stream(at, dtype=torch.bfloat16)
        exact.learn(r.map(torch.Tensor.float), at=float(at))
        rounded.learn(r, at=float(at))
    answer = rounded.predict(3.0)
    assert answer.img.dtype == torch.bfloat16
    assert torch.equal(answer.img, exact.predict(3.0).img.to(torch.bfloat16))


def test_learning_copies_nothing():
    predictor, r = build("taylor"), stream(0)
    predictor.learn(r, at=0.0)
    assert predictor.residuals[0].img.data_ptr() == r.img.data_ptr()


# Paying back.


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["last", "taylor", "newton"]), st.lists(st.integers(1, 6), min_size=3, max_size=6))
def test_what_is_repaid_makes_the_sum_that_of_the_interpolation(name, skips):
    """The answers of all stretches but the last add up to the polynomial through their ends."""
    predictor, at, given_, wanted = build(name, order=1, repay=True), 0, None, None
    nodes: list[tuple[float, Stream]] = []
    stretch: list[int] = []
    for skipped in [0, 0, *skips]:
        for _ in range(skipped):
            answer = predictor.predict(float(at))
            given_ = answer if given_ is None else given_ + answer
            stretch.append(at)
            at += 1
        nodes.append((float(at), stream(at)))
        predictor.learn(nodes[-1][1], at=float(at))
        times = [t for t, _ in nodes[-3:]]
        for x in stretch:
            row = weights.newton(times, float(x), 2)
            truth = predictors.weighted_sum([r for _, r in nodes[-3:]], [row])
            wanted = truth if wanted is None else wanted + truth
        stretch = []
        at += 1
    answer = predictor.predict(float(at))
    bare = predictors.weighted_sum(predictor.residuals, predictor.rows(float(at)))
    repaid = given_ + answer - bare
    assert close(repaid, wanted, 1e-2)


def test_a_constant_owes_nothing():
    predictor, r = build("taylor", repay=True), stream(0)
    for at in range(20):
        if at in (0, 3, 4, 5, 11):
            predictor.learn(r, at=float(at))
        else:
            assert close(predictor.predict(float(at), step_length=0.1 * at), r)


def test_repaying_needs_three_residuals():
    with pytest.raises(ValueError, match="history=2"):
        Forecast(weights.last, 2, repay=True)


def test_unknown_predictors_are_named():
    with pytest.raises(ValueError, match=r"predictor='nope'.*taylor"):
        build("nope")
