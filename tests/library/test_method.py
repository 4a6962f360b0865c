"""Finding methods and parsing their settings."""

import pytest

from analysis.settings import parse_settings
from h2cache import H2Config, find_method, method_names


def test_methods_are_found_by_file_name():
    assert method_names()[0] == "h2cache"
    assert "none" in method_names()
    assert find_method("h2cache") is H2Config
    for name in method_names():
        assert find_method(name).name == name
    with pytest.raises(ValueError, match=r"unknown method 'nope'.*h2cache"):
        find_method("nope")


def test_settings_take_the_type_of_their_field():
    given = ["tau1=inf", "warmup_steps=3", "max_consecutive_hits=4", "adaptive=true", "reduce=mean"]
    config = H2Config(**parse_settings(H2Config, given))
    assert config == H2Config(
        tau1=float("inf"), warmup_steps=3, max_consecutive_hits=4, adaptive=True, reduce="mean"
    )
    assert parse_settings(H2Config, ["max_consecutive_hits=none"]) == {"max_consecutive_hits": None}


@pytest.mark.parametrize("bad", ["tau3=1", "tau1", "warmup_steps=1.5", "tau1=fast", "adaptive=1"])
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match="cannot set"):
        parse_settings(H2Config, [bad])


@pytest.mark.parametrize(
    "bad",
    [
        {"tau1": -0.1},
        {"tau2": float("nan")},
        {"pool1": 0},
        {"warmup_steps": -1},
        {"max_consecutive_hits": 0},
        {"reduce": "max"},
        {"adaptive_lowest": 0.6},
    ],
)
def test_bad_values_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        H2Config(**bad)
