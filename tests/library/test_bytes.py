"""What H2-Cache keeps from step to step, in bytes: the specification's formula, small and at full size."""

import pytest
import torch
from h2cache.baselines.taylorseer import TaylorSeerConfig

import h2cache
from analysis.tiny_families import FAMILIES
from h2cache import H2Config
from h2cache.engines import find_engine
from h2cache.engines.base import lay_out
from h2cache.memory import Memory, Request
from h2cache.method import Shape
from h2cache.predictors import LastResidual
from h2cache.program import Stream
from h2cache.room import require_room
from h2cache.similarity import pooled_summary
from tests.helpers.families import recorded

OFF = H2Config(tau1=0.0, tau2=0.0)
KINDS = [name for name in FAMILIES if name == "flux" or not name.startswith("flux_")]


def pooled(tokens: int, width: int, target: int) -> int:
    k = max(1, tokens // target)
    return (tokens // k) * (width // k)


def elements(
    img: int, txt: int, width: int, joint: bool, drawn: int | None = None, pools: tuple = (2048, 384)
) -> int:
    """ref1, res1_img, res1_txt, ref2, res2 of one sample; I, S and C of the specification.

    joint: the detail check looks at text tokens too. drawn: image tokens that are compared, by default all.
    """
    drawn = img if drawn is None else drawn
    references = pooled(drawn, width, pools[0]) + pooled(drawn + txt * joint, width, pools[1])
    return references + 2 * (img + txt) * width


@pytest.mark.parametrize("family", KINDS)
def test_bytes_held_are_those_of_the_formula(family):
    """The most that the request kept at once, over all branches: reckoned from what went into the model."""
    case = recorded(family)
    model = case.transformers[0]
    engine = find_engine(model)
    cut, joint = engine.cuts[0], lay_out(engine, model, None)[0][1].joint
    streams: list[Stream] = []  # before the first block, of each call
    drawn: list[slice | None] = []
    hooks = (
        model.register_forward_pre_hook(
            lambda _, args, kwargs: drawn.append(engine.inputs(args, kwargs).targets()), with_kwargs=True
        ),
        getattr(model, cut.blocks)[0].register_forward_pre_hook(
            lambda _, args, kwargs: streams.append(cut.form.read_input(args, kwargs, 0)), with_kwargs=True
        ),
    )
    h2cache.enable(case.target, OFF)
    case.run()
    for hook in hooks:
        hook.remove()
    kept = []
    for x, targets in zip(streams, drawn, strict=True):
        tokens = 0 if x.txt is None else x.txt.shape[1]  # branches may differ in length
        numbers = elements(x.img.shape[1], tokens, x.img.shape[2], joint, targets and targets.stop)
        if family == "sd3":  # its last block returns no text
            numbers -= tokens * x.img.shape[2]
        kept.append(x.img.shape[0] * numbers * x.img.element_size())
    expected = max(sum(kept[n : n + case.branches]) for n in range(0, len(kept), case.branches))
    assert h2cache.summary(case.target).bytes_held == expected > 0
    assert h2cache.summary(case.target).bytes_of_all == 0  # it has ended
    h2cache.disable(case.target)


MIB = 2**20


@pytest.mark.parametrize(
    ("img", "txt", "width", "joint", "mib"),
    [
        (4096, 512, 3072, True, 60),  # FLUX.1-dev 1024x1024; the specification's figure
        (4096, 512, 6144, True, 120),  # FLUX.2 dev 1024x1024
        (6889, 512, 3072, False, 89),  # Qwen-Image 1328x1328, a prompt of 512 tokens
        (4096, 1128, 3584, False, 79),  # HunyuanImage-2.1 2048x2048
        (256, 0, 1152, False, 2.25),  # DiT-XL/2 256x256, one of both halves
        (75600, 0, 5120, False, 1477),  # Wan 14B 720x1280, 81 frames
        (118800, 256, 3072, False, 1395),  # HunyuanVideo 720x1280, 129 frames
    ],
)
def test_bytes_at_full_size_without_the_memory(img, txt, width, joint, mib):
    """The very slots and predictors, on a device that keeps shapes only."""
    memory = Memory(Request(None, None, "test"), "cond", batch=1)
    x = torch.empty(1, img, width, dtype=torch.bfloat16, device="meta")
    text = torch.empty(1, txt, width, dtype=torch.bfloat16, device="meta") if txt else None
    for stage, pool, both in (("structure", 2048, False), ("detail", 384, joint)):
        residual = Stream(x, text)
        slot = memory.slot(stage, LastResidual)
        slot.refer(pooled_summary(residual.joint if both else x.clone(), pool), kept=[False])
        slot.predictor.learn(residual.map(torch.clone), kept=[False])
    assert memory.bytes_held == 2 * elements(img, txt, width, joint)
    assert memory.bytes_held / MIB == pytest.approx(mib, rel=0.03)


@pytest.mark.parametrize(
    ("img", "txt", "joint", "mib"), [(4096, 512, True, 105), (118800, 256, False, 2.7 * 1024)]
)
def test_full_references_as_the_specification_counts_them(img, txt, joint, mib):
    """What the authors keep, of FLUX.1-dev and of HunyuanVideo at 720p: ours are pooled, and half of it."""
    whole = 2 * elements(img, txt, 3072, joint, pools=(10**9, 10**9))
    assert whole / MIB == pytest.approx(mib, rel=0.02)
    assert whole == 2 * 3072 * (2 * img + txt + 2 * (txt + img) - (0 if joint else txt))


HUNYUAN_VIDEO_720P = Shape(blocks=(20, 40), img=118800, txt=256, width=3072, out=16)


def test_modules_of_hunyuan_video_at_720p_are_refused_with_the_figure():
    with pytest.raises(MemoryError, match=r'taylorseer keeps 108\.8 GiB.*80\.0 GiB.*granularity="stage"'):
        require_room(TaylorSeerConfig(), HUNYUAN_VIDEO_720P, 80 * 2**30)
    stages = require_room(TaylorSeerConfig(granularity="stage"), HUNYUAN_VIDEO_720P, 80 * 2**30)
    assert stages == 2 * 2 * (118800 + 256) * 3072 * 2


def test_what_does_not_fit_is_refused_before_the_first_block_and_leaves_nothing(monkeypatch):
    case = recorded("hunyuan_video")
    expected = case.uncached()
    blocks = []
    hook = case.transformers[0].transformer_blocks[0].register_forward_pre_hook(lambda *_: blocks.append(1))
    h2cache.enable(case.target, TaylorSeerConfig(interval=1))
    with monkeypatch.context() as small:
        small.setattr("h2cache.attachment.free_bytes", lambda device: 1000)
        with pytest.raises(MemoryError, match="taylorseer keeps"):
            case.run()
    assert not blocks
    hook.remove()
    for a, b in zip(expected, case.run(), strict=True):
        assert torch.equal(a, b)
    h2cache.disable(case.target)
