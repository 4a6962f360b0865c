"""Processes that draw one picture together: diffusers' context parallelism, and tensor parallelism.

With context parallelism each process has some of the tokens; with tensor parallelism it has all of them and
some of the weights. Both communicate inside every block, so all must run the same blocks. They decide on
sums over all of them, in one all-reduce before the one copy to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from h2cache.engines.base import Engine, class_names
from h2cache.similarity import average, pooling_window

_SHARDED = "FullyShardedDataParallel", "FSDPModule"  # PyTorch's first and second way
STREAM, TEXT = "hidden_states", "encoder_hidden_states"  # as diffusers' plans name them
_ALIKE = 64  # step numbers are compared modulo this, so that sums of their squares are exact in float32


@dataclass(frozen=True)
class Group:
    """The processes that draw one picture.

    divided: its tokens are divided among them; otherwise each process has them all.
    """

    processes: Any  # a torch.distributed.ProcessGroup, which not every build of torch has
    divided: bool

    @staticmethod
    def of(denoiser: nn.Module) -> Group | None:
        """The processes that run `denoiser` together; None: this one alone."""
        if not _many():
            return None
        config = getattr(denoiser, "_parallel_config", None)
        context = getattr(config, "context_parallel_config", None)
        if context is not None:
            return Group(context._flattened_mesh.get_group(), divided=True)
        tensor = getattr(config, "tensor_parallel_config", None)
        if tensor is not None:
            return Group(tensor._mesh.get_group(), divided=False)
        meshes = _meshes(denoiser)
        if not meshes or _classes(denoiser).intersection(_SHARDED):
            return None
        return Group(meshes[0].get_group(), divided=False)

    @property
    def size(self) -> int:
        """How many processes have a part of the tokens."""
        return dist.get_world_size(self.processes) if self.divided else 1

    @property
    def ranks(self) -> set[int]:
        """The processes, numbered through the whole run."""
        return set(dist.get_process_group_ranks(self.processes))

    def total(self, values: Tensor) -> Tensor:
        """The sum of all processes' `values`, the same on each. Only ratios of such sums mean anything."""
        whole = getattr(values, "full_tensor", None)  # inside a block that tensor parallelism divides
        total = values.clone() if whole is None else whole()
        dist.all_reduce(total, group=self.processes)
        return total

    def marks(self, step: int) -> list[float]:
        """What says, added up over all processes, whether they are at the same step; see `in_step`."""
        return [step % _ALIKE, (step % _ALIKE) ** 2]

    def in_step(self, total: list[float]) -> bool:
        """Whether all processes were at the same step: the variance of their marks is zero."""
        return len(self.ranks) * total[1] == total[0] ** 2

    @property
    def rank(self) -> int:
        """This process's number in the group, from 0."""
        return dist.get_rank(self.processes) if self.divided else 0

    def part(self, count: int, rank: int | None = None) -> range:
        """Which of `count` tokens process `rank` has, as diffusers divides them; None: this one."""
        rank, (least, more) = self.rank if rank is None else rank, divmod(count, self.size)
        start = rank * least + min(rank, more)
        return range(start, start + least + (rank < more))


@dataclass
class Tokens:
    """Which tokens of a picture each process of `group` has.

    image, text: how many all have together. drawn: the image tokens that are compared; None: all.
    """

    group: Group
    image: int
    text: int
    drawn: slice | None

    @property
    def targets(self) -> slice | None:
        """Those of this process's image tokens that are drawn; None: all."""
        if self.drawn is None:
            return None
        start, drawn = self.group.part(self.image).start, self._drawn(self.group.rank)
        return slice(drawn.start - start, drawn.stop - start)

    def pooled(self, features: Tensor, target: int, least: int = 1) -> Tensor:
        """This process's part of the `pooled_summary` of all tokens, where `features` has its own.

        A window over tokens of several processes is summed over all, which takes an all-reduce; the first
        process keeps it, so that it counts once.
        """
        rank, joint = self.group.rank, features.shape[1] > len(self._drawn(self.group.rank))
        runs = [self._compared(rank, joint) for rank in range(self.group.size)]
        if sum(map(len, runs[rank])) != features.shape[1]:
            raise RuntimeError(
                f"process {rank} compares {features.shape[1]} tokens and should have {runs[rank]} of "
                f"{self.image} image and {self.text} text tokens: use the transformer's own _cp_plan"
            )
        k = pooling_window(total := sum(map(len, chain(*runs))), target, least)
        if k <= 1:
            return features
        ends = {end for run in chain(*runs) for end in (run.start, run.stop)}
        shared = sorted({end // k for end in ends if end % k and end // k < total // k})
        pieces = features.split([len(run) for run in runs[rank]], dim=1)
        own = list(zip(runs[rank], pieces, strict=True))
        windows = [piece[:, _inside(run, k, total)] for run, piece in own]
        summaries = [average(piece, k) for piece in windows if piece.shape[1]]
        if shared:
            sums = torch.stack([_sum_of(*own[0], n, k) + _sum_of(*own[1], n, k) for n in shared], 1)
            together = self.group.total(average(sums, 1, k) / k)
            summaries.append(together[:, : None if rank == 0 else 0].to(features.dtype))
        return torch.cat(summaries, 1) if summaries else features[:, :0]

    def _drawn(self, rank: int) -> range:
        """Those of process `rank`'s image tokens that are drawn, numbered through all."""
        own, drawn = self.group.part(self.image, rank), range(self.image)[self.drawn or slice(None)]
        start = min(max(drawn.start, own.start), own.stop)
        return range(start, max(min(drawn.stop, own.stop), start))

    def _compared(self, rank: int, joint: bool) -> list[range]:
        """The tokens that process `rank` compares, numbered as in one process: text first, where `joint`."""
        text, drawn = self.text if joint else 0, self._drawn(rank)
        moved = text - range(self.image)[self.drawn or slice(None)].start
        if not drawn:
            return [self.group.part(text, rank), range(0)]
        return [self.group.part(text, rank), range(drawn.start + moved, drawn.stop + moved)]


def _inside(run: range, k: int, total: int) -> slice:
    """Which tokens of `run` are in windows of `k` that are wholly in it; at the end of all, none is begun."""
    start, stop = -(-run.start // k) * k, min(run.stop, total) // k * k
    return slice(start - run.start, max(start, stop) - run.start)


def _sum_of(run: range, piece: Tensor, window: int, k: int) -> Tensor:
    """The sum of the tokens of `run`, which are in `piece` (B, tokens, C), that lie in a window: (B, C)."""
    start, stop = max(window * k, run.start), min(window * k + k, run.stop)
    return piece[:, start - run.start : max(start, stop) - run.start].sum(1, dtype=torch.float32)


Cut = Callable[..., tuple[tuple, dict]]  # (module, *args, **kwargs) to the arguments of this process's tokens


def cut_at(module: nn.Module, name: str) -> Cut | None:
    """What divides argument `name` of `module` among the processes as it is called; None: nothing does."""
    registry = getattr(module, "_diffusers_hook", None)
    for hook in getattr(registry, "hooks", {}).values():
        divided = getattr(hook, "metadata", ())
        if "ContextParallelSplitHook" in class_names(hook) and name in divided:
            return hook.pre_forward
    return None


def check_together(transformer: nn.Module, engine: Engine, undivided: str) -> None:
    """ValueError, with what to do, if processes that run `transformer` together cannot decide as one.

    undivided: why a method needs all tokens in one process; empty: it does not.
    """
    if not _many():
        return
    group = Group.of(transformer)
    spread = {rank for mesh in _meshes(transformer) for rank in mesh.mesh.flatten().tolist()}
    if spread - (group.ranks if group else set()) or _SHARDED[0] in _classes(transformer):
        raise ValueError(
            "the weights are spread over processes that draw different pictures (FSDP): one would skip a "
            "block in which another waits for it. Use the plan, which skips whole steps, the same on all: "
            "h2cache.enable(pipe, speedup=5)"
        )
    if group is None or not group.divided:
        return
    if undivided:
        raise ValueError(f"{undivided}, and context parallelism divides them among processes")
    if not isinstance(getattr(transformer, engine.cuts[0].blocks), nn.ModuleList):
        raise ValueError(
            f"{engine.name} has its blocks behind one call, which context parallelism cannot divide"
        )
    first = first_block(transformer, engine)
    for name in [STREAM, TEXT] if any(cut.joint for cut in engine.cuts) else [STREAM]:
        if cut_at(transformer, name) is None and cut_at(first, name) is None:
            raise ValueError(
                f"context parallelism divides {name} neither at the transformer nor at its first block, so "
                "it is unknown which tokens a process has: use the transformer's own _cp_plan"
            )


def first_block(transformer: nn.Module, engine: Engine) -> nn.Module:
    """The first block that `transformer` runs."""
    return getattr(transformer, engine.cuts[0].blocks)[0]


def _many() -> bool:
    return dist.is_available() and dist.is_initialized()


def _classes(model: nn.Module) -> set[str]:
    return set().union(*(class_names(module) for module in model.modules()))


def _meshes(model: nn.Module) -> list[Any]:
    """The device meshes that weights of `model` are spread over."""
    spread: list[Any] = [p for p in model.parameters() if "DTensor" in class_names(p)]
    return list({parameter.device_mesh: None for parameter in spread})
