"""Chipmunk: attention and mlp of FLUX computed by a part of their columns, on top of what they gave before.

    h2cache.sparse.sparse(pipe, SparseConfig())         # then h2cache.enable(pipe, ...) on top, if wanted
    h2cache.sparse.dense(pipe)

Source: arXiv 2506.03275 and the authors' code (64d197c). It is no step cache: every step computes every
block, each block by fewer keys and fewer neurons. At full steps a group of neighbouring tokens chooses its
columns and keeps what the others gave; at sparse steps the chosen ones are computed again. So it is a
property of the model, and methods lie on top: steps are counted in each module, so a skipped one keeps its
base. In plain tensors it shows the method and its work; where gathering costs more than multiplying it is
slower than the dense model. Ours: the mlp chooses again right after a full step, random columns are the same
on every device, the bias of the fused projection is added once. Under the plan, whose last step need not run,
what is kept is freed with the next request or by `dense`.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from h2cache.api import denoisers_of
from h2cache.engines import find_engine
from h2cache.engines.base import class_names
from h2cache.memory import Memory
from h2cache.method import check
from h2cache.modules import ModuleDriver, check_divisible
from h2cache.requests import Requests

ATTRIBUTE = "_h2cache_sparse"  # of a transformer
FIRST = 10  # steps in which the mlp chooses its columns each time; later at every second one


@dataclass(frozen=True)
class SparseConfig:
    """Settings; the authors' for FLUX.1-dev at 50 steps are the defaults. Small models want small groups."""

    keep_keys: float = 0.165
    """Share of the keys that a sparse step computes, (0, 1]. Lower: less work, less faithful. 1: dense."""
    keep_neurons: float = 0.3
    """Share of the mlp's neurons that a sparse step computes, (0, 1], those whose input changed most."""
    random: float = 0.05
    """Share of the other neurons that is computed beside them, [0, 1)."""
    full_every: int = 10
    """Every so many computed steps one is full, >= 1. 1: always, that is the dense model, bit for bit."""
    dense_blocks: int = 2
    """First blocks that are left as they are, >= 0."""
    queries: int = 192
    """Tokens of a group in attention, >= 1; about a twentieth of all."""
    tokens: int = 128
    """Tokens of a group in the mlp, >= 1."""
    multiple: int = 112
    """The number of keys is a multiple of it, and at least it, >= 1."""

    def __post_init__(self) -> None:
        for name in ("keep_keys", "keep_neurons"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range (0, 1]: it is a share")
        if not 0 <= self.random < 1:
            raise ValueError(f"random={self.random!r} is out of range [0, 1): it is a share")
        check("full_every", self.full_every, 1, math.inf, "it is a number of steps; 1 switches off")
        check("dense_blocks", self.dense_blocks, 0, math.inf, "it is a number of blocks")
        for name in ("queries", "tokens", "multiple"):
            check(name, getattr(self, name), 1, math.inf, "it is a number of tokens")

    def keys(self, tokens: int) -> int:
        """How many of `tokens` keys a sparse step computes."""
        if self.keep_keys == 1:
            return tokens
        return min(tokens, self.multiple * max(1, round(self.keep_keys * tokens / self.multiple)))

    def neurons(self, hidden: int) -> tuple[int, int]:
        """How many of `hidden` neurons a sparse step computes: chosen, and random."""
        chosen = max(1, round(self.keep_neurons * hidden))
        return chosen, round(self.random * (hidden - chosen))


def grouped(x: Tensor, size: int) -> Tensor:
    """(..., N, C) as (..., groups, size, C), zeros behind the last token."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % size)).unflatten(-2, (-1, size))


@dataclass
class Attention:
    """One attention: A_S(q, k, v) is that of each group to its keys S, and R what is left of the whole."""

    cfg: SparseConfig
    step: int = 0  # of those that it computed
    lse: Tensor | None = None  # of step 0
    keys: Tensor | None = None  # S, (B, heads, groups, t)
    rest: Tensor | None = None  # R

    def __call__(self, dense: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: (B, heads, N, d); dense: the model's own attention to all keys."""
        step, self.step = self.step, self.step + 1
        if step > 1 and step % self.cfg.full_every:
            assert self.rest is not None
            return self.rest + self.part(q, k, v)
        out = dense()
        if step == 0 or self.cfg.full_every == 1:
            self.lse = (q @ k.mT / math.sqrt(q.shape[-1])).logsumexp(-1)
            return out
        if step == 1:
            assert self.lse is not None
            mass = (q @ k.mT / math.sqrt(q.shape[-1]) - self.lse.unsqueeze(-1)).exp()  # (B, heads, N, N)
            columns = grouped(mass, self.cfg.queries).sum(-2)
            self.keys, self.lse = columns.topk(self.cfg.keys(k.shape[-2]), dim=-1).indices, None
        self.rest = out - self.part(q, k, v)
        return out

    def part(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A_S(q, k, v)."""
        assert self.keys is not None
        index = self.keys.flatten(2).unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])
        near = [x.gather(2, index).unflatten(2, self.keys.shape[2:]) for x in (k, v)]  # (B, h, groups, t, d)
        out = F.scaled_dot_product_attention(grouped(q, self.cfg.queries), *near)
        return out.flatten(2, 3)[:, :, : q.shape[2]]


@dataclass
class Mlp:
    """One mlp: P are its neurons, y what they gave, u the mean input of a group's neurons."""

    cfg: SparseConfig
    seed: int
    step: int = 0  # of those that it computed
    neurons: Tensor | None = None  # P, (B, groups, size, hidden)
    given: Tensor | None = None  # y, without a bias, (B, N, C)
    means: Tensor | None = None  # u, (B, groups, hidden)
    columns: Tensor | None = None  # S, (B, groups, m)

    def full(self) -> bool:
        """Whether the coming step is; it counts."""
        step, self.step = self.step, self.step + 1
        return step % self.cfg.full_every == 0

    def learn(self, x: Tensor, hidden: Tensor, up: nn.Linear, down: Tensor) -> None:
        """A full step has given `hidden` (B, N, hidden) of `x` (B, N, C); down: W2."""
        if self.cfg.full_every > 1:
            self.neurons, self.given = grouped(hidden, self.cfg.tokens).clone(), F.linear(hidden, down)
            self.means, self.columns = self._mean(x, up), None

    def update(self, x: Tensor, up: nn.Linear, activation: Callable, down: Tensor) -> Tensor:
        """y at a sparse step."""
        assert self.neurons is not None
        assert self.given is not None
        step = self.step - 1
        if self.columns is None or step < FIRST or step % 2 == 0:
            self._choose(x, up, step)
        columns, count = self.columns, x.shape[1]
        assert columns is not None
        bias = 0 if up.bias is None else up.bias[columns].unsqueeze(2)
        fresh = activation(grouped(x, self.cfg.tokens) @ up.weight[columns].mT + bias)  # (B, groups, size, m)
        index = columns.unsqueeze(2).expand_as(fresh)
        change = (fresh - self.neurons.gather(3, index)) @ down.mT[columns]
        self.neurons.scatter_(3, index, fresh)
        self.given = self.given + change.flatten(1, 2)[:, :count]
        return self.given

    def _choose(self, x: Tensor, up: nn.Linear, step: int) -> None:
        """S: the neurons whose mean input has moved most in each group, and some random ones."""
        now, before = self._mean(x, up), self.means
        assert before is not None
        chosen, drawn = self.cfg.neurons(now.shape[-1])
        columns = (now - before).abs().topk(chosen, dim=-1).indices
        if drawn:
            g = torch.Generator().manual_seed(self.seed + step)  # on the CPU: the same on every device
            lots = torch.rand(now.shape[-1], generator=g).to(now.device).expand_as(now).clone()
            columns = torch.cat([columns, lots.scatter_(-1, columns, -1.0).topk(drawn).indices], dim=-1)
        self.columns, self.means = columns, before.scatter(-1, columns, now.gather(-1, columns))

    def _mean(self, x: Tensor, up: nn.Linear) -> Tensor:
        """The mean of each group's inputs to the neurons: of its tokens first, for that is linear."""
        sums, size = grouped(x, self.cfg.tokens).sum(2), self.cfg.tokens
        counts = [min(size, x.shape[1] - start) for start in range(0, x.shape[1], size)]
        return F.linear(sums / sums.new_tensor(counts)[:, None], up.weight, up.bias)


class _OfKeys(TorchFunctionMode):
    """Within it, the first attention of all tokens among themselves is given to `attention`."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention, self.done = attention, False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dense = partial(function, *args, **kwargs)
        if function is not F.scaled_dot_product_attention or self.done:
            return dense()
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        if given.get("attn_mask") is not None:
            raise ValueError("column-sparse attention cannot mask keys: dense(pipe) switches it off")
        self.done = True
        return self.attention(dense, given["query"], given["key"], given["value"])


def sparse(target: Any, config: SparseConfig | None = None) -> Any:
    """Compute attention and mlp of `target`, a FLUX pipeline or its transformer, by columns; returns it.

    Again: replaces the settings. ValueError for another model, compiled blocks, or layers that are no plain
    `nn.Linear` (LoRA, quantised).
    """
    denoiser, *more = denoisers_of(target)
    if more or "FluxTransformer2DModel" not in class_names(denoiser):
        raise ValueError(f"column sparsity is for FluxTransformer2DModel, not {type(denoiser).__name__}")
    check_divisible(find_engine(denoiser), denoiser)
    made = Sparse(denoiser, target if target is not denoiser else None, config or SparseConfig())
    dense(target)
    vars(denoiser)[ATTRIBUTE] = made
    try:
        made.attach(denoiser)
    except BaseException:
        dense(target)
        raise
    return target


def dense(target: Any) -> Any:
    """Undo `sparse`, exactly; returns `target`. ValueError while a method of modules lies on top."""
    for denoiser in denoisers_of(target):
        made = vars(denoiser).get(ATTRIBUTE)
        if made is not None:
            made.detach()
            del vars(denoiser)[ATTRIBUTE]
    return target


def _refuse_method_on(module: nn.Module) -> None:
    if getattr(module.forward, "__module__", "") == ModuleDriver.__module__:
        raise ValueError(
            "a method that answers for modules is enabled: call h2cache.disable first; it can be enabled on "
            "top"
        )


class _Now(threading.local):
    """The call that is under way, of each thread."""

    memory: Memory | None = None
    back: Tensor | None = None  # the place of each image token in the order of neighbours
    hidden: dict[str, Tensor] = {}  # noqa: RUF012  of the single block at hand; replaced, never changed


def neighbours(ids: Tensor, count: int) -> Tensor | None:
    """The order of image tokens in which 4x4 and 8x8 of a grid follow each other; None: no such grid.

    ids: (N, 3), the rows and columns in the last two. A wait, once a request.
    """
    if ids.ndim != 2 or len(ids) != count:
        return None
    rows, columns = (ids[:, n].tolist() for n in (1, 2))
    height, width = len(set(rows)), len(set(columns))
    if len({*zip(rows, columns, strict=True)}) != count or count != height * width or height % 8 or width % 8:
        return None
    grid = torch.arange(count, device=ids.device).reshape(height // 8, 2, 4, width // 8, 2, 4)
    return grid.permute(0, 3, 1, 4, 2, 5).flatten()


class Sparse:
    """What is put on one transformer."""

    def __init__(self, transformer: Any, pipeline: Any, config: SparseConfig) -> None:
        self.cfg, self.engine, self.now = config, find_engine(transformer), _Now()
        held = weakref.ref(pipeline) if pipeline is not None else lambda: None
        self.requests = Requests(transformer, held, None, self.engine.starts, lambda pipeline: None)
        self.blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        for block in self.blocks:
            for layer in self._linear(block):
                if type(layer) is not nn.Linear:
                    raise ValueError(
                        f"column sparsity needs plain nn.Linear layers, not {type(layer).__name__}: fuse a "
                        "LoRA first, and do not quantise the mlp"
                    )
        self._placed: list[tuple[nn.Module, Callable]] = []
        self._handles: tuple = ()

    def _linear(self, block: Any) -> Iterator[nn.Module]:
        yield from (
            (block.ff.net[0].proj, block.ff.net[2])
            if hasattr(block, "ff")
            else (
                block.proj_mlp,
                block.proj_out,
            )
        )

    def attach(self, transformer: nn.Module) -> None:
        for n, block in enumerate(self.blocks):
            if n < self.cfg.dense_blocks:
                continue
            self._place(block.attn, partial(self._attention, n))
            if hasattr(block, "ff"):
                self._place(block.ff, partial(self._double, n, block.ff))
            else:
                self._place(block.proj_mlp, partial(self._up, n, block))
                self._place(block.proj_out, partial(self._down, n, block))
        self._handles = (
            transformer.register_forward_pre_hook(self._begin, with_kwargs=True),
            transformer.register_forward_hook(self._end, always_call=True),
        )

    def _place(self, module: nn.Module, ours: Callable) -> None:
        own = module.forward
        _refuse_method_on(module)
        forward = partial(self._driven, ours, own)
        vars(module)["forward"] = forward
        self._placed.append((module, forward))

    def _driven(self, ours: Callable, own: Callable, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs) if self.now.memory is None else ours(own, *args, **kwargs)

    def detach(self) -> None:
        for module, _ in self._placed:
            _refuse_method_on(module)
        for module, forward in self._placed:
            if vars(module).get("forward") is forward:
                del module.forward
        for handle in self._handles:
            handle.remove()

    def _begin(self, transformer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
        memory = self.now.memory = self.requests.memory(self.engine.inputs(args, kwargs))
        x, ids = kwargs.get("hidden_states"), kwargs.get("img_ids")
        controlled = any(kwargs.get(f"controlnet_{kind}samples") for kind in ("block_", "single_block_"))
        if x is None or ids is None or controlled or self.cfg.full_every == 1:
            return args, kwargs
        order = memory.state("order", lambda: neighbours(ids, x.shape[1]))
        if order is None:
            return args, kwargs
        self.now.back = order.argsort()
        return args, kwargs | {"hidden_states": x[:, order], "img_ids": ids[order]}

    def _end(self, transformer: Any, args: tuple, output: Any) -> Any:
        now, request = self.now, self.requests.current
        memory, back = now.memory, now.back
        now.memory = now.back = None
        now.hidden = {}
        if memory is None or request is None or output is None:  # the forward raised
            self.requests.forget("the call before was broken off")
            return output
        request.end_step(memory)
        if back is None:
            return output
        if isinstance(output, tuple):
            return (output[0][:, back], *output[1:])
        output.sample = output.sample[:, back]
        return output

    def _state(self, name: str, new: Callable) -> Any:
        assert self.now.memory is not None
        return self.now.memory.state(name, new)

    def _mlp(self, n: int) -> Mlp:
        return self._state(f"mlp {n}", lambda: Mlp(self.cfg, 1000 * n))

    def _attention(self, n: int, own: Callable, *args: Any, **kwargs: Any) -> Any:
        with _OfKeys(self._state(f"attention {n}", lambda: Attention(self.cfg))):
            return own(*args, **kwargs)

    def _double(self, n: int, ff: Any, own: Callable, x: Tensor) -> Tensor:
        mlp, (gelu, _, down) = self._mlp(n), ff.net
        if mlp.full():
            hidden = gelu(x)
            mlp.learn(x, hidden, gelu.proj, down.weight)
            return down(hidden)
        return mlp.update(x, gelu.proj, gelu.gelu, down.weight) + down.bias

    # A single block runs `proj_mlp`, `act_mlp`, then `proj_out` of attention and neurons side by side.

    def _up(self, n: int, block: Any, own: Callable, x: Tensor) -> Tensor:
        mlp = self._mlp(n)
        self.now.hidden = {"x": x}
        if mlp.full():
            return own(x)
        self.now.hidden = {"y": mlp.update(x, block.proj_mlp, block.act_mlp, self._split(block)[1])}
        return x[..., :0]

    def _down(self, n: int, block: Any, own: Callable, joined: Tensor) -> Tensor:
        seen, self.now.hidden = self.now.hidden, {}
        attention, neurons = self._split(block)
        if "y" in seen:
            return F.linear(joined, attention, block.proj_out.bias) + seen["y"]
        mlp, width = self._mlp(n), attention.shape[1]
        mlp.learn(seen["x"], joined[..., width:], block.proj_mlp, neurons)
        return own(joined)

    def _split(self, block: Any) -> tuple[Tensor, Tensor]:
        """The columns of `proj_out` for attention and for the neurons."""
        hidden = block.proj_mlp.out_features
        return block.proj_out.weight.split([block.proj_out.in_features - hidden, hidden], dim=1)
