"""What each method will keep is told before anything runs."""

import pytest

from analysis import cache_memory


def test_memory_is_told_before_the_run(capsys):
    assert cache_memory.main(["--set", "taylorseer:order=2", "--free-gib", "5"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "3648.0 MiB" in lines["taylorseer"]
    assert "does not fit" not in lines["taylorseer"]
    assert "5472.0 MiB  does not fit" in lines["taylorseer:order=2"]
    with pytest.raises(SystemExit):
        cache_memory.main(["--set", "taylorseer:order=9"])


def test_what_is_in_memory_is_what_is_counted(capsys):
    """Byte for byte, but for latents that the pipeline holds too."""
    assert cache_memory.main(["--check", "flux", "hunyuan_video", "--set", "speca:granularity=stage"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    same = {
        (family, method)
        for family, method, _, counted, alive, *_ in rows
        if abs(int(counted) - int(alive)) < 64
    }
    for family in ("flux", "hunyuan_video"):
        names = {"h2cache", "block_cache", "taylorseer", "hicache", "clusca", "speca:granularity=stage"}
        assert {(family, name) for name in names} <= same
    assert {family for family, *_ in rows} == {"flux", "hunyuan_video"}


def test_a_table_of_all_families(capsys):
    assert cache_memory.main(["--models"]) == 0
    lines = {
        line.split(" | ")[0]: line.strip(" |").split(" | ") for line in capsys.readouterr().out.splitlines()
    }
    assert lines["| taylorseer"][1] == "3648.0"  # FLUX.1
    assert lines["| taylorseer"][-1] == "-"  # Inf-DiT does not divide into modules
    assert lines["| h2cache"][-1] == "1280.0"  # two residuals of 640 MiB


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (["--width", "0"], "--width: 0: a whole number from 1"),
        (["--out-channels", "0"], "--out-channels: 0: a whole"),
        (["--double", "0", "--single", "0"], "one block at least"),
        (["--free-gib", "-1"], "--free-gib: -1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(capsys, broken, message):
    with pytest.raises(SystemExit):
        cache_memory.main(broken)
    assert message in capsys.readouterr().err
