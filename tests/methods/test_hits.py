"""What a hit gives: the stream before the skipped blocks, plus what they changed when last computed.

The expectation comes from plain hooks on the blocks themselves and knows nothing of the library. A block that
did not run counts with what it changed in the last call of its branch in which it ran; what the model itself
adds between blocks (ControlNet, VACE) counts fresh, from a run without a cache.
"""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
import torch
from h2cache.baselines.block_cache import BlockCacheConfig
from h2cache.baselines.magcache import MagCacheConfig
from h2cache.baselines.teacache import TeaCacheConfig
from torch import Tensor, nn

import h2cache
from h2cache import H2Config
from tests.helpers.families import FLUX, RECORDED, STEPS, Case, flux_case, recorded, refused_by
from tests.helpers.nunchaku_double import NunchakuFluxTransformerBlocks
from tests.helpers.toys import make_inputs

INF, LINE = float("inf"), (0.0, 0.0, 0.0, 1.0, 0.0)
CONFIGS = {  # each computes more than one step, so that it shows which one is reused
    "h2cache": H2Config(tau1=INF, tau2=INF, max_consecutive_hits=1),
    "h2cache, detail hits": H2Config(tau1=0.0, tau2=INF, warmup_steps=2),
    "h2cache, structure hits": H2Config(tau1=INF, tau2=0.0, warmup_steps=2, force_detail_hit=False),
    "block_cache": BlockCacheConfig(threshold=INF, warmup_steps=2),
    "teacache": TeaCacheConfig(threshold=INF, coefficients=LINE, warmup_steps=2, last_steps=0),
    "magcache": MagCacheConfig(ratios=(1.0, 1.0), threshold=INF, retention=0.4, max_consecutive_hits=9),
}
HITS = {name: {True} for name in CONFIGS} | {  # whether it is the end of the model where skipped blocks show
    "h2cache": {False, True},
    "h2cache, structure hits": {False},
}
MODELS = ("random", "nunchaku V1", "nunchaku V2", *RECORDED[:-1])  # not Inf-DiT: its layers are not called
PAIRS = [(n, m) for m in MODELS for n, config in CONFIGS.items() if config.name not in refused_by(m)]

Streams = dict[str, Tensor]  # "img" and, where the blocks change it, "txt"


@dataclass
class Seen:
    """What the blocks of a model were given and gave in one call; the last `before` is behind all blocks."""

    model: nn.Module
    before: dict[int, Streams] = field(default_factory=dict)
    after: dict[int, Streams] = field(default_factory=dict)


@dataclass(eq=False)
class Changing(Case):
    """A FLUX transformer alone, whose latents change from step to step as if nothing were cached."""

    def run(self, branch: int | None = None) -> list[Tensor]:
        outputs = []
        for n in range(STEPS):
            inputs = self.inputs | {"hidden_states": make_inputs(seed=n)["hidden_states"]}
            with torch.no_grad(), self.target.cache_context("cond"):
                outputs.append(self.target(**inputs | {"timestep": torch.tensor([1 - n / STEPS])}).sample)
        return outputs


def blocks_of(model: nn.Module) -> list[nn.Module]:
    lists = ("transformer_blocks", "blocks", "layers", "single_transformer_blocks")
    blocks = [block for name in lists for block in getattr(model, name, ())]
    if isinstance(blocks[0], NunchakuFluxTransformerBlocks):  # V1 has all of them behind one
        return [*blocks[0].m.double, *blocks[0].m.single]
    return blocks


def behind_the_blocks(model: nn.Module) -> nn.Module:
    """The module that is given the image tokens, and those alone, when all blocks are through."""
    return model.norm_out if hasattr(model, "norm_out") else next(iter(model.all_final_layer.values()))


def streams(img: Tensor, txt: Tensor | None, text: int) -> Streams:
    """text: number of text tokens that blocks of one joined tensor have in front."""
    if txt is None and text:
        img, txt = img[:, text:], img[:, :text]
    return {"img": img} if txt is None else {"img": img, "txt": txt}


def watched(model: nn.Module, calls: list[Seen]) -> ExitStack:
    """Add to `calls` what each call of `model` shows, until the stack is closed."""
    stack, blocks = ExitStack(), blocks_of(model)
    text = 0

    def begins(*_) -> None:
        nonlocal text
        calls.append(Seen(model))
        text = 0

    def ran(number: int) -> Callable:
        def note(block: nn.Module, args: tuple, kwargs: dict, out: Tensor | tuple) -> None:
            nonlocal text
            img, txt = [*inspect.signature(block.forward).bind(*args, **kwargs).arguments.values()][:2]
            if isinstance(out, tuple) and not txt.shape[1]:  # nunchaku's single blocks, of no text
                out = max(out, key=Tensor.numel)
            if isinstance(out, Tensor):  # one tensor: all tokens, or text comes in by cross-attention
                calls[-1].before[number] = streams(img, None, text)
                calls[-1].after[number] = streams(out, None, text)
                return
            assert img.shape[1] != txt.shape[1], "the two could not be told apart"
            text = txt.shape[1]
            outs = {tensor.shape[1]: tensor for tensor in out if tensor is not None}
            calls[-1].before[number] = streams(img, txt, 0)
            calls[-1].after[number] = streams(outs[img.shape[1]], outs.get(text), 0)

        return note

    def ends(_, args: tuple) -> None:
        calls[-1].before[len(blocks)] = {"img": args[0]}

    hooks = [model.register_forward_pre_hook(begins)]
    hooks += [b.register_forward_hook(ran(n), with_kwargs=True) for n, b in enumerate(blocks)]
    hooks.append(behind_the_blocks(model).register_forward_pre_hook(ends))
    for hook in hooks:
        stack.callback(hook.remove)
    return stack


def run(case: Case) -> list[Seen]:
    """What each call of a run shows."""
    calls: list[Seen] = []
    with ExitStack() as stack:
        for model in case.transformers:
            stack.enter_context(watched(model, calls))
        case.run()
    return calls


def plus(*terms: Streams) -> Streams:
    """The sum, of the streams that all terms have."""
    common = set.intersection(*map(set, terms))
    return {name: sum(term[name] for term in terms) for name in common}


def less(a: Streams, b: Streams) -> Streams:
    return {name: a[name] - b[name] for name in a.keys() & b.keys()}


@pytest.mark.parametrize(("method", "model"), PAIRS)
def test_a_hit_adds_what_the_skipped_blocks_changed_when_last_computed(method, model):
    case = Changing(flux_case(model).target, make_inputs()) if model in FLUX else recorded(model)
    fresh = run(case)
    h2cache.enable(case.target, CONFIGS[method], steps=STEPS if model in FLUX else None)
    try:
        cached = run(case)
    finally:
        h2cache.disable(case.target)
    changes: dict[tuple, Streams] = {}  # by model, branch and block: in the last call in which it ran
    compared = set()  # whether it is the end of the model, and the name of the stream
    for number, (seen, uncached) in enumerate(zip(cached, fresh, strict=True)):
        branch, end = number % case.branches, len(blocks_of(seen.model))
        expected = uncached.before[0]  # what comes before the blocks is the same in both runs
        for block in range(end):
            if block in seen.after:
                expected = seen.after[block]
                changes[seen.model, branch, block] = less(seen.after[block], seen.before[block])
            else:
                expected = plus(expected, changes[seen.model, branch, block])
            if block + 1 == end and block in seen.after:
                break
            expected = plus(expected, less(uncached.before[block + 1], uncached.after[block]))
            if block not in seen.after and block + 1 in seen.before:  # skipped, and seen what comes of it
                for name, tensor in seen.before[block + 1].items():
                    torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
                    compared.add((block + 1 == end, name))
    assert {at_the_end for at_the_end, _ in compared} == HITS[method]
    assert {name for at_the_end, name in compared if not at_the_end} in (set(), set(fresh[0].after[0]))
