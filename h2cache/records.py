"""What every step leaves behind, and the summary of a run."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

HIT, FORCED, MISS = "hit", "forced", "miss"


@dataclass(slots=True)
class StepRecord:
    """One stage at one step of one branch."""

    step: int  # from 0, within the request
    timestep: float  # noise level as the scheduler has it, 1 .. 0; in a loop of the user's own as it came
    branch: str  # guidance branch: "cond", "uncond", or "call 0", "call 1" where the pipeline gives no names
    stage: str
    measure: float | None  # relative change; the largest of a batch; None: nothing to compare, or forced
    threshold: float | None  # that it was compared with; the smallest of a batch
    outcome: str  # "hit", "forced" (hit without a look) or "miss"; a batch that disagrees is a miss
    blocks_run: int  # executed in this stage
    blocks: int  # in this stage

    def to_dict(self) -> dict:
        """As plain JSON values: what is not finite, which JSON does not know, as text ("inf")."""
        values = asdict(self)
        return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


@dataclass(frozen=True)
class StageSummary:
    """One stage over a request."""

    stage: str
    steps: int
    hits: int  # forced ones included
    forced: int
    blocks_run: int
    blocks: int
    percentiles: tuple[float, ...] | None  # 5, 25, 50, 75, 95 % of the measures
    thresholds: tuple[float, ...] | None  # that would have let 25, 50, 75 % of the measured steps hit
    not_finite: int = 0  # measures that are no number to compare with


@dataclass(frozen=True)
class Summary:
    """A request in numbers; `str()` is the table."""

    method: str
    stages: tuple[StageSummary, ...]
    steps: int
    branches: tuple[str, ...]
    bytes_held: int  # at most, by this request
    bytes_needed: int  # by computation before the first block ran, at most
    started_because: str
    expected_psnr: tuple[float, ...] | None = None  # of each picture against the uncached one, dB
    expected_error: float | None = None  # root mean square of that expectation, dB
    reuses: bool = True  # False: a control, which reuses nothing by intent
    bytes_of_all: int = 0  # held at this moment, by the requests of all threads
    notes: tuple[str, ...] = ()  # what the user should know
    evaluated: tuple[int, ...] = ()  # steps at which some of the model ran
    gap_errors: tuple[float, ...] = ()  # of a method that forecasts outputs, in the first guidance branch

    @property
    def blocks_run(self) -> int:
        return sum(s.blocks_run for s in self.stages)

    @property
    def blocks(self) -> int:
        return sum(s.blocks for s in self.stages)

    @property
    def block_ratio(self) -> float:
        """How many times fewer blocks were executed than without a cache."""
        return self.blocks / self.blocks_run if self.blocks_run else 1.0

    @property
    def hits(self) -> dict[str, int]:
        return {s.stage: s.hits for s in self.stages}

    @property
    def warning(self) -> str | None:
        """What the user should know about a run in which nothing was reused."""
        if not self.stages:
            return "no step has been recorded: run the pipeline once, then ask for the summary"
        if not all(map(math.isfinite, self.gap_errors)):
            return "the model's outputs are not finite: try another dtype, as bfloat16 for float16"
        if any(s.hits for s in self.stages) or not self.reuses:
            return None
        if self._whole:
            why = "; ".join(self.notes) or "the settings ask for as many evaluations as there are steps"
            return f"nothing was skipped: every step was evaluated; {why}"
        if self.steps < 2:
            return (
                f"nothing was reused: every step began a new request (last reason: {self.started_because}); "
                "is the text embedding made again at each step?"
            )
        if lost := sum(s.not_finite for s in self.stages):
            return f"nothing was reused: {lost} measures are not finite, so are the model's hidden states"
        measured = [s.percentiles[0] for s in self.stages if s.percentiles]
        if not measured:
            return (
                "nothing was reused: the settings compute every step, or something that makes what is kept "
                "void (a ControlNet, the scale of a LoRA) came or went at every step"
            )
        return (
            f"nothing was reused: the smallest changes are about {min(measured):.3f}; "
            "raise the thresholds above that, see the last columns"
        )

    @property
    def _whole(self) -> bool:
        """Whether the method answered for the whole model."""
        return [s.stage for s in self.stages] == ["model"]

    def _whole_lines(self) -> list[str]:
        steps = self.evaluated
        lines = [
            f"{self.method}: {len(steps)} of {self.steps} steps evaluated, {self.block_ratio:.2f}x fewer; "
            f"{len(self.branches)} branch(es); {self.bytes_held / 2**20:.2f} MiB held",
            f"evaluated: {' '.join(map(str, steps))}",
        ]
        if self.gap_errors:
            lines.append("error of each gap: " + " ".join(f"{e:.2g}" for e in self.gap_errors))
        if self.expected_psnr:
            each = ", ".join(f"{psnr:.1f}" for psnr in self.expected_psnr)
            lines.append(f"expected PSNR {each} dB, +- {self.expected_error:.1f}")
        lines += self._further_lines
        return lines + ([f"warning: {self.warning}"] if self.warning else [])

    @property
    def _further_lines(self) -> list[str]:
        lines = [f"note: {note}" for note in self.notes]
        if self.bytes_of_all:
            lines.append(f"held at this moment, by all threads: {self.bytes_of_all / 2**20:.2f} MiB")
        return lines

    def __str__(self) -> str:
        if not self.stages:
            return f"{self.method}: {self.warning}"
        if self._whole:
            return "\n".join(self._whole_lines())
        lines = [
            f"{'stage':<11}{'steps':>6}{'hits':>6}{'forced':>8}{'blocks run':>13}   change 5/25/50/75/95 %"
        ]
        for s in self.stages:
            changes = "/".join(f"{p:.3f}" for p in s.percentiles) if s.percentiles else "-"
            blocks = f"{s.blocks_run} of {s.blocks}"
            lines.append(f"{s.stage:<11}{s.steps:>6}{s.hits:>6}{s.forced:>8}{blocks:>13}   {changes}")
            if s.thresholds:
                a, b, c = (f"{t:.3f}" for t in s.thresholds)
                lines.append(f"{'':<11}thresholds for about 25/50/75 % hits: {a}/{b}/{c}")
        lines.append(
            f"{self.method}: {self.blocks_run} of {self.blocks} blocks executed, "
            f"{self.block_ratio:.2f}x fewer; {len(self.branches)} branch(es); "
            f"{self.bytes_held / 2**20:.2f} MiB held"
        )
        lines += self._further_lines
        if self.warning:
            lines.append(f"warning: {self.warning}")
        return "\n".join(lines)


def summarise(
    method: str,
    records: list[StepRecord],
    bytes_held: int,
    bytes_needed: int,
    started_because: str,
    **further: Any,
) -> Summary:
    """Sum up the records of one request; `further` fields of `Summary` as they are."""
    names, whole = list(dict.fromkeys(r.stage for r in records)), [r for r in records if r.stage == "model"]
    return Summary(
        method=method,
        stages=tuple(_stage_summary(name, [r for r in records if r.stage == name]) for name in names),
        steps=1 + max((r.step for r in records), default=-1),
        branches=tuple(dict.fromkeys(r.branch for r in records)),
        bytes_held=bytes_held,
        bytes_needed=bytes_needed,
        started_because=started_because,
        evaluated=tuple(sorted({r.step for r in records if r.blocks_run})),
        gap_errors=tuple(r.measure for r in whole if r.measure is not None and r.branch == whole[0].branch),
        **further,
    )


def _stage_summary(name: str, records: list[StepRecord]) -> StageSummary:
    given = [r.measure for r in records if r.measure is not None]
    measures = [measure for measure in given if math.isfinite(measure)]
    many = len(measures) >= 2
    grid = statistics.quantiles(measures, n=20, method="inclusive") if many else []  # 5 %, 10 %, ... 95 %
    return StageSummary(
        stage=name,
        steps=len(records),
        hits=sum(r.outcome in (HIT, FORCED) for r in records),
        forced=sum(r.outcome == FORCED for r in records),
        blocks_run=sum(r.blocks_run for r in records),
        blocks=sum(r.blocks for r in records),
        percentiles=tuple(grid[i] for i in (0, 4, 9, 14, 18)) if many else None,
        thresholds=tuple(grid[i] for i in (4, 9, 14)) if many else None,
        not_finite=len(given) - len(measures),
    )
