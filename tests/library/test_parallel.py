"""Two processes that draw one picture: the decisions of one, and its picture."""

import json

import pytest
import torch

pytest.importorskip("diffusers", minversion="0.42")  # context and tensor parallelism as they are there
if not torch.distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

from tests.helpers import two_processes
from tests.helpers.served import ended, started

SECONDS = (
    240  # for all cases, on a busy machine; one collective that hangs ends after 20 (`two_processes.py`)
)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("parallel")
    logs = [folder / f"{rank}.log" for rank in range(2)]
    processes = [started(two_processes.main, rank, folder, log=log) for rank, log in enumerate(logs)]
    assert ended(processes, SECONDS) == [0, 0], "\n".join(log.read_text()[-2000:] for log in logs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def pictures(found) -> dict[str, list[dict]]:
    """By case, of each process: the picture's difference, and what was decided alone and together."""
    return {name: [f[name] for f in found] for name, case in found[0].items() if isinstance(case, dict)}


def test_every_method_decides_the_same_on_both_processes_as_on_one(pictures):
    for name, (first, second) in pictures.items():
        assert first["together"] == second["together"] == first["alone"], name
        assert first["measures"] == second["measures"], name
        alone = first["measures alone"]  # one process does not look where nothing is to be decided
        assert {at: first["measures"][at] for at in alone} == pytest.approx(alone, rel=1e-4), name


def test_the_picture_is_that_of_one_process(pictures):
    for name, cases in pictures.items():
        assert max(case["difference"] for case in cases) < 1e-5, name


def test_decisions_were_made_and_not_all_alike(pictures):
    for name, (case, _) in pictures.items():
        decided = {outcome != "miss" for *_, outcome, _ in case["together"]}
        never = name.endswith((" at 0", " at 1", ", none"))
        assert decided == ({False} if never else {False, True}), name


def test_at_zero_the_picture_is_the_uncached_one_bit_for_bit(found):
    same = [value for case in found for name, value in case.items() if name.startswith("uncached")]
    assert same
    assert all(same)


def test_if_one_process_forgets_both_start_afresh(found):
    fresh = [[0, "miss"], [1, "forced"], [2, "forced"]]
    assert [case["doubting"] for case in found] == [fresh * 2, fresh * 2]
    warming = [[n, "miss"] for n in range(3)]
    assert [case["doubting in the warm-up"] for case in found] == [warming * 2, warming * 2]


def test_windows_over_shares_of_different_sizes_sum_up_to_those_of_one_process(found):
    assert max(case["uneven"] for case in found) < 1e-6


def test_guidance_branches_on_two_processes_need_no_agreement(found):
    assert max(case["branches"] for case in found) < 1e-5


def test_what_cannot_be_right_is_refused_with_a_reason(found):
    for case in found:
        assert "clusters of all tokens" in case["clusters"]
        assert "context parallelism" in case["clusters"]
        assert "spread over processes" in case["FSDP"]
        assert "speedup=5" in case["FSDP"]
