"""State of one request: one `Memory` for each guidance branch, one `Slot` in it for each stage.

A request is one pipeline call. Nothing outlives it: see `requests.py` for what begins a new one.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from h2cache.expected import Seen
from h2cache.parallel import Group, Tokens
from h2cache.predictors import Predictor
from h2cache.program import Stage, Stream
from h2cache.records import StepRecord
from h2cache.schedule import TRAINED, Course, Schedule
from h2cache.similarity import difference, magnitude, pooled_summary, sample_mask, settled

State = TypeVar("State")
Kept = TypeVar("Kept", bound=Predictor)


class Slot(Generic[Kept]):
    """The memory of one stage: what was compared last and what the predictor has learnt."""

    def __init__(self, memory: Memory, new_predictor: Callable[[], Kept]) -> None:
        self._memory, self._new_predictor = memory, new_predictor
        self.clear()

    def clear(self) -> None:
        """Forget everything, in place: a method that holds this slot sees it empty."""
        self.predictor = self._new_predictor()
        if isinstance(getattr(self.predictor, "answers", None), Counter):
            self.predictor.answers = self._memory.answers  # type: ignore[attr-defined]  # one count of all
        if hasattr(self.predictor, "total"):
            self.predictor.total = self._memory.total
        self.reference: Tensor | None = None
        self._scale: Tensor | None = None  # magnitude of the reference, once it has been asked for
        self.hits_in_a_row = [0] * self._memory.batch

    def compare(self, current: Tensor, per_sample: bool = True) -> list[float] | None:
        """Relative L1 change of `current` since the reference, per sample, on the host; None without one."""
        memory = self._memory
        if self.reference is None:
            if memory.group is not None:  # another process may have one: it must compute too
                unknown = current.new_full(
                    (memory.batch if per_sample else 1,), math.nan, dtype=torch.float32
                )
                memory.ratio(unknown, unknown)
            return None
        if self._scale is None:
            self._scale = magnitude(self.reference, per_sample)
        values = memory.ratio(difference(self.reference, current, per_sample), self._scale)
        if values is None:  # the read has shown that another request began: the reference is void
            return None
        return values * memory.batch if len(values) < memory.batch else values

    def refer(self, summary: Tensor, kept: Sequence[bool] = ()) -> None:
        """Make `summary` the reference, except for the samples marked in `kept`."""
        if self.reference is not None and any(kept):
            summary = torch.where(sample_mask(kept, summary), self.reference, summary)
        self.reference, self._scale = settled(summary), None

    def count_hits(self, hits: list[bool]) -> None:
        """Note which samples hit, for a limit on hits in a row."""
        self.hits_in_a_row = [n + 1 if hit else 0 for n, hit in zip(self.hits_in_a_row, hits, strict=True)]

    @property
    def bytes_held(self) -> int:
        """Bytes of all tensors that this slot keeps from step to step."""
        return bytes_of([self.reference, self.predictor])


def bytes_of(held: Any) -> int:
    """Bytes of all tensors in `held`, each counted once."""
    found: dict[int, Tensor] = {}
    left = [held]
    while left:
        one = left.pop()
        if isinstance(one, Tensor):
            found[id(one)] = one
        elif isinstance(one, Stream):
            left += one.img, one.txt
        elif isinstance(one, dict):
            left += one.values()
        elif isinstance(one, (list, tuple)):
            left += one
        elif hasattr(one, "outputs_kept"):  # it says which of its parts hold tensors: the others are many
            left.append(one.outputs_kept)
        elif hasattr(one, "__dict__") and not isinstance(one, (type, torch.nn.Module)):
            left += vars(one).values()
    return sum(tensor.nbytes for tensor in found.values())


def _first(values: Tensor) -> Tensor:
    """The first value, as a tensor."""
    return values if values.numel() == 1 else values.reshape(-1)[0]


class Memory:
    """State of one guidance branch of one request."""

    def __init__(
        self,
        request: Request,
        branch: str,
        batch: int,
        targets: slice | None = None,
        guided: bool = False,
        group: Group | None = None,
    ) -> None:
        self._request, self.branch, self.batch = request, branch, batch
        self.group = group  # the processes that draw this picture together; None: this one alone
        self.spread: Tokens | None = None  # over these processes; None: each has all
        self.targets = targets  # the image tokens that are drawn and compared; None: all
        self._guided = guided  # the batch is [cond, uncond], and both halves share each decision
        self.slots: dict[str, Slot[Any]] = {}
        self._states: dict[str, Any] = {}
        self.blocks_run: defaultdict[str, int] = defaultdict(int)  # by stage, in the current step
        self.blocks = 1  # of the whole model, for a method that answers for it
        self.divided = 0  # its first blocks, whose attention and mlp are apart; for a method of modules
        self.bytes_needed: int | None = None  # what the method will keep, computed at the first block
        self._step = -1
        self._timestep: float | None = None  # of the newest step whose timestep has been read
        self._step_length = 1.0  # how far the timestep fell in the step before this one; 1 at the first
        self._pending: Tensor | None = None  # timestep of the current step, not yet read
        self._conditions: tuple = ()

    def state(self, name: str, new: Callable[[], State]) -> State:
        """What a method keeps beside its slots, made by `new()` at the first step; forgotten with them."""
        if name not in self._states:
            self._states[name] = new()
        return self._states[name]

    def shared(self, name: str, new: Callable[[], State]) -> State:
        """What a method keeps for all guidance branches of the request, made by `new()` by the first."""
        if name not in self._request.states:
            self._request.states[name] = new()
        return self._request.states[name]

    @property
    def is_first_branch(self) -> bool:
        """Whether this is the guidance branch that was called first in the request."""
        return next(iter(self._request.memories), self.branch) == self.branch

    def slot(self, stage: str, new_predictor: Callable[[], Kept]) -> Slot[Kept]:
        """The slot of `stage`, made with an empty `new_predictor()` at the first step."""
        if stage not in self.slots:
            self.slots[stage] = Slot(self, new_predictor)
        return self.slots[stage]

    def begin_step(self, timestep: Tensor | float, conditions: tuple) -> None:
        """A forward call begins, at `timestep` (of any shape: one value counts), under some `conditions`.

        On an accelerator the timestep is not read here but together with the first decision of the step; only
        the first step of a branch reads at once, when nothing is under way that the wait could stall.
        """
        if conditions != self._conditions and self._step >= 0:  # a ControlNet or IP-Adapter came or went
            self.clear_slots()
        self._conditions = conditions
        self.blocks_run.clear()
        self._step += 1
        if isinstance(timestep, float):
            self._resolve(timestep)
            return
        if self._step == 0 or timestep.device.type == "cpu":
            self._resolve(_first(timestep).item())  # a wait only at the first step
        else:
            self._pending = _first(timestep.detach()).reshape(1).float()

    def begin_known_step(self, step: int, conditions: tuple) -> None:
        """A forward call begins, at `step` of the request's schedule, under some `conditions`: no wait."""
        if conditions != self._conditions and self._step >= 0:  # a ControlNet or IP-Adapter came or went
            self.clear_slots()
        self._conditions = conditions
        self.blocks_run.clear()
        schedule = self._request.schedule
        assert schedule is not None
        times, now = schedule.timesteps, step + self._request.first
        after = times[now + 1] if now + 1 < len(times) else 0.0
        self._step, self._timestep = step, times[now] / TRAINED
        self._step_length = (times[now] - after) / TRAINED or self._step_length

    @property
    def answers(self) -> Counter[str]:
        """How often which rule answered, where a predictor has several: of the whole request."""
        return self._request.answers

    def computed_a_stage(self, stages: tuple[Stage, ...]) -> bool:
        """Whether all blocks of a stage have run in this step: otherwise nothing more is kept than before."""
        return any(self.blocks_run[stage.name] == len(stage.blocks) for stage in stages)

    @property
    def step(self) -> int:
        """Index of the current step in its request, from 0."""
        if self._pending is not None:
            self._resolve(self._pending.item())  # a wait, for a method that asks before it has measured
        return self._step

    @property
    def course(self) -> Course:
        """The noise levels of the whole pipeline call; RuntimeError where no scheduler is known."""
        if self._request.course is None:
            raise RuntimeError(
                "this method must know the noise levels of a request before it begins, and no scheduler is "
                "known here: enable it on the pipeline, and take the timesteps from pipeline.scheduler"
            )
        return self._request.course

    @property
    def course_step(self) -> int:
        """Index of the current step in `course`, from 0: it goes on from one denoiser to the next."""
        return self.step + self._request.first - self._request.begun

    def expect(self, estimate: Any, note: str) -> None:
        """Note how the fidelity of this request is estimated, and what its user should know."""
        self._request.estimate = estimate
        if note and note not in self._request.said:
            self._request.said.append(note)

    @property
    def total_steps(self) -> int:
        """Number of steps of the request; None when neither a pipeline nor the caller has given it."""
        if self._request.total_steps is None:
            raise RuntimeError(
                "this method must know the number of steps of a request, and neither a pipeline nor the "
                "caller has given it: pass enable(..., steps=N)"
            )
        return self._request.total_steps

    @property
    def step_length(self) -> float:
        """How far the timestep falls in this step, > 0; of a loop of the user's own, in the step before."""
        return self._step_length if self.step or self._request.schedule else 1.0

    def time(self, clock: str) -> float:
        """The time of the current step, rising: its index ("step"), or minus the timestep ("sigma").

        FLUX and other flow models get sigma for a timestep, up to a factor.
        """
        step = self.step
        return float(step) if clock == "step" else -self.timestep

    @property
    def timestep(self) -> float:
        """That of the newest step whose timestep has been read."""
        assert self._timestep is not None, "no step has begun"
        return self._timestep

    def in_warmup(self, steps: int) -> bool:
        """Whether the current step is among the first `steps`."""
        return steps > 0 and self.step < steps

    def in_last(self, steps: int) -> bool:
        """Whether the current step is among the last `steps`."""
        return steps > 0 and self.step >= self.total_steps - steps

    def computes_blindly(self, warmup_steps: int, last_steps: int, states: int) -> bool:
        """Whether this step has nothing to decide, and nothing to learn for later.

        That is so before the last `states` steps of the warm-up, as many as a predictor holds, and among the
        last steps. Answered without a wait, from the count of steps: where that is wrong another request has
        begun, and its first step computes. Several processes always look: so they see if one begins another.
        """
        if self.group is not None:
            return False
        early = self._step < warmup_steps - states
        return early or (last_steps > 0 and self._step >= self.total_steps - last_steps)

    def ratio(self, change: Tensor, size: Tensor) -> list[float] | None:
        """`change` / `size` (n,) on the host, each summed over all tokens; None: a new request began."""
        if self.group is None:
            return self.read(change / size)
        marks = change.new_tensor(self.group.marks(self._step))
        change, size, marks = self.total(torch.cat([change, size, marks])).split([len(change), len(size), 2])
        return self.read(change / size, marks)

    def total(self, values: Tensor) -> Tensor:
        """`values`, sums over the tokens at hand, summed over all processes; only their ratios count."""
        return values if self.group is None else self.group.total(values)

    def pooled(self, features: Tensor, target: int, least: int = 1) -> Tensor:
        """`pooled_summary` of the whole picture; of several processes, the windows that this one counts."""
        if self.spread is None:
            return pooled_summary(features, target, least)
        return self.spread.pooled(features, target, least)

    def read(self, values: Tensor, marks: Tensor | None = None) -> list[float] | None:
        """`values` (n,) on the host, with the timestep in the same copy; None if that shows a new request.

        marks: of all processes, see `Group.marks`. If they are not at the same step, all begin a new request.
        """
        if self._guided and len(values) == self.batch:
            values = values.reshape(2, -1).amax(0).repeat(2)  # NaN stays NaN
        if marks is None and self._pending is None:
            return [values.item()] if values.numel() == 1 else values.tolist()  # the one wait of a decision
        timestep = None if self._pending is None else self._pending.to(values.device)
        parts = [part for part in (values, marks, timestep) if part is not None]
        numbers = torch.cat(parts).tolist()  # the one wait of a decision
        goes_on = timestep is None or self._resolve(numbers[-1])
        count = len(values)
        if (
            self.group is not None
            and marks is not None
            and not self.group.in_step(numbers[count : count + 2])
        ):
            self._begin_anew("the processes were at different steps")
            return None
        return numbers[:count] if goes_on else None

    def _resolve(self, timestep: float) -> bool:
        """Take the current timestep; False, with everything forgotten, if it did not fall: a new request."""
        self._pending = None
        goes_on = self._timestep is None or timestep < self._timestep
        if not goes_on:
            self._begin_anew("the timestep did not fall")
        elif self._timestep is not None:
            self._step_length = self._timestep - timestep
        self._timestep = timestep
        return goes_on

    def _begin_anew(self, reason: str) -> None:
        self._request.restart(reason, keep=self)
        self.clear_slots()
        self._step = 0

    @property
    def is_last_step(self) -> bool:
        """Whether the current step is the request's last, as far as is known without a wait."""
        return self._pending is None and self._step + 1 == self._request.total_steps

    def end_step(self, grew: bool = True) -> None:
        """The forward call has ended; grew: whether more may be kept than before."""
        self._request.end_step(self, grew)

    def release(self) -> None:
        """Free all tensors: the request has ended for this branch."""
        self.slots.clear()
        self._states.clear()

    def clear_slots(self) -> None:
        """Forget what was compared and learnt."""
        self._states.clear()
        for slot in self.slots.values():
            slot.clear()

    def record(
        self, stage: Stage, changes: list[float] | None, thresholds: list[float] | None, outcome: str
    ) -> None:
        """Append the `StepRecord` of one stage at the current step."""
        self._request.records.append(
            StepRecord(
                step=self.step,
                timestep=self.timestep,
                branch=self.branch,
                stage=stage.name,
                measure=None if changes is None else max(changes),
                threshold=None if thresholds is None else min(thresholds),
                outcome=outcome,
                blocks_run=self.blocks_run[stage.name],
                blocks=len(stage.blocks),
            )
        )

    def record_whole(self, outcome: str, seen: Seen | None = None) -> None:
        """Append the record of a step at which a method answered for the whole model, without a wait.

        seen: what an evaluation shows of the forecasts before it, of each picture; `step_records` and
        `summary` read it.
        """
        measure = None if seen is None or seen.error is None else seen.error.amax()
        if seen is not None:
            self._request.seen.append((self.branch, self.course_step, seen))
        run = (self.blocks * (outcome == "miss"), self.blocks)
        record = StepRecord(self._step, self.timestep, self.branch, "model", None, None, outcome, *run)
        record.measure = measure  # type: ignore[assignment]  # a tensor until `step_records` reads it
        self._request.records.append(record)

    def by_picture(self, seen: Seen | None) -> Seen | None:
        """What was seen of each sample of the batch, as that of each picture."""
        both = seen is not None and self._guided and len(seen.change) == self.batch
        return seen.halved() if seen is not None and both else seen

    def record_uncached(self, stages: tuple[Stage, ...]) -> None:
        """Append the records of a step about which nothing is decided: without a wait, for fair baselines."""
        timestep: Any = self.timestep if self._pending is None else self._pending  # `step_records` reads it
        for stage in stages:
            run = self.blocks_run[stage.name], len(stage.blocks)
            record = StepRecord(self._step, timestep, self.branch, stage.name, None, None, "miss", *run)
            self._request.records.append(record)

    def record_stack(
        self, stages: tuple[Stage, ...], changes: list[float] | None, threshold: float, hit: bool
    ) -> None:
        """Append the records of one decision for all `stages`; the first has the measure."""
        for n, stage in enumerate(stages):
            measured = n == 0 and changes is not None
            outcome = ("forced" if n else "hit") if hit else "miss"
            self.record(stage, changes if measured else None, [threshold] if measured else None, outcome)

    @property
    def bytes_held(self) -> int:
        """Bytes of all tensors that this branch keeps from step to step."""
        return bytes_of([*self._states.values(), *((s.reference, s.predictor) for s in self.slots.values())])


class Request:
    """One pipeline call: its branches and the records of its steps."""

    def __init__(self, schedule: Schedule | None, total_steps: int | None, reason: str) -> None:
        self.schedule, self.total_steps = schedule, total_steps  # None: a loop of the user's own
        self.begun = self.first = self.position = 0  # in the schedule: of the pipeline's first step, of
        # this denoiser's first step, and of the newest
        self.course: Course | None = None
        self.controls: tuple[str, ...] = ()  # how far a pipeline's ControlNets act, at each step of `course`
        self.restarts = 0  # how often the user asked for a step from an empty history
        self.edited: int | None = None  # newest position before which a callback put in other latents
        self.seen: list[tuple[str, int, Seen]] = []  # of forecasts: branch, step, and what it showed
        self.estimate: Any = None  # of the fidelity that this means
        self.states: dict[str, Any] = {}  # what the method keeps for all branches
        self.said: list[str] = []  # by the method, what the user should know
        self.answers: Counter[str] = Counter()  # of the predictors, by the rule that gave them
        self.began = time.monotonic_ns()
        self.reason = reason  # why it was begun, for the summary
        self.memories: dict[str, Memory] = {}
        self.signatures: dict[str, tuple] = {}
        self.texts: dict[str, Tensor | None] = {}  # held, so that no other prompt can take their address
        self.latents: dict[str, Tensor | None] = {}  # of the newest step, where there is no schedule
        self.records: list[StepRecord] = []
        self.most_bytes_held = 0

    def end_step(self, memory: Memory, grew: bool = True) -> None:
        """A forward call of a branch has ended: after its last step all that it kept is freed.

        grew: whether more may be kept than before. A branch that is not called any more (guidance that stops
        before the end) is freed with one that comes to its end.
        """
        if grew:
            self.most_bytes_held = max(self.most_bytes_held, self.bytes_held)
        if self.total_steps is not None and memory.is_last_step:
            for branch, other in self.memories.items():
                if other is memory or (self.schedule is not None and other.step + 1 < memory.step):
                    other.release()
                    self.texts.pop(branch, None)
                    self.latents.pop(branch, None)

    def release(self) -> None:
        """Free the tensors of all branches; the records stay."""
        for memory in self.memories.values():
            memory.release()
        self.texts.clear()
        self.latents.clear()

    def restart(self, reason: str, keep: Memory) -> None:
        """Forget all branches but `keep`, and all records."""
        self.reason = reason
        for kept in (self.memories, self.signatures, self.texts, self.latents):
            for branch in [b for b in kept if b != keep.branch]:
                del kept[branch]
        for past in (self.records, self.answers, self.seen, self.states):
            past.clear()

    @property
    def notes(self) -> list[str]:
        """What the user should know."""
        if not self.answers:
            return self.said
        counts = ", ".join(f"{n} by {who}" for who, n in self.answers.most_common())
        return [*self.said, f"forecasts: {counts}"]

    @property
    def bytes_needed(self) -> int:
        """What the method keeps from step to step at most by its own computation, over all branches."""
        return sum(memory.bytes_needed or 0 for memory in self.memories.values())

    @property
    def bytes_held(self) -> int:
        """Bytes of all tensors kept from step to step, over all branches."""
        return sum(memory.bytes_held for memory in self.memories.values())
