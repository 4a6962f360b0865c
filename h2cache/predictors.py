"""What stands in for skipped work. Pure maths on streams of tokens: no model, no decision.

A predictor learns a residual at every computed step and answers at the skipped ones. `at` is the time of the
step, rising: its index, or -sigma. Samples of a batch may learn at different steps: those marked in `kept` at
`learn` keep what they had.

`Forecast` is a weighted sum of the last residuals; the rules are in `weights.py`. With `repay` it also pays
back what it got wrong. That is ours: an Euler sampler adds up the model's outputs, so the errors of a
skipped stretch add up too; as soon as the next step is computed, the polynomial through both ends says what
the stretch should have been, and the difference is added to the next stand-in. It needs no tensor besides
the stored residuals: weights are added to weights.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from h2cache import weights
from h2cache.program import Stream
from h2cache.similarity import sample_mask, settled


class Predictor(Protocol):
    """What a stage's slot keeps: it learns residuals of computed steps and answers at the skipped ones."""

    def learn(self, residual: Stream, at: float = 0.0, kept: Sequence[bool] = ()) -> None:
        """Keep what was just computed at time `at`, but for the samples marked in `kept`."""

    def predict(self, at: float = 0.0, kept: Sequence[bool] = (), step_length: float = 1.0) -> Stream:
        """The stand-in for the skipped blocks at time `at`, of which the samples in `kept` make use."""


class LastResidual:
    """The residual of the last computed step, unchanged (H2-Cache, Block Cache, TeaCache)."""

    def __init__(self) -> None:
        self.residual: Stream | None = None

    def learn(self, residual: Stream, at: float = 0.0, kept: Sequence[bool] = ()) -> None:
        """Keep what was just computed, but for the samples marked in `kept`: they keep what they had."""
        if self.residual is not None and any(kept):
            residual = residual.map(
                lambda new, old: torch.where(sample_mask(kept, new), old, new), self.residual
            )
        self.residual = residual.map(settled)

    def predict(self, at: float = 0.0, kept: Sequence[bool] = (), step_length: float = 1.0) -> Stream:
        """The stand-in for the skipped blocks, to be added to the head's fresh output."""
        assert self.residual is not None, "nothing has been learnt"
        return self.residual


@dataclass
class _Debt:
    """One sample's answers since its last computed step, and what it owes for those before it."""

    answers: list[tuple[float, float, dict[float, float]]]  # (time, length of the step, weight of each time)
    owed: dict[float, float]  # length times weight, of each stored time


class Forecast:
    """A weighted sum of the residuals of the last `history` computed steps.

    rule: (times, x) -> weights. repay: see the top of the file; it interpolates through the newest three
    residuals, so `history` must be at least 3.
    Accumulates in float32 and rounds once: weights of +-10 cancel, partial sums in bf16 do not survive it.
    """

    def __init__(
        self, rule: Callable[[weights.Times, float], list[float]], history: int, repay: bool = False
    ) -> None:
        if repay and history < 3:
            raise ValueError(f"history={history}: repaying needs three residuals")
        self.rule, self.history, self.repay = rule, history, repay
        self.residuals: list[Stream] = []  # oldest first
        self.times: list[list[float]] = []  # of each sample; aligned with `residuals` at the newest end
        self._debts: list[_Debt] = []

    def learn(self, residual: Stream, at: float = 0.0, kept: Sequence[bool] = ()) -> None:
        """Store a computed residual with its time; a second one of the same time replaces the first."""
        residual = residual.map(settled)
        batch = residual.img.shape[0]
        if not self.times:
            self.times = [[] for _ in range(batch)]
            self._debts = [_Debt([], {}) for _ in range(batch)]
        learns = [not k for k in kept] if any(kept) else [True] * batch
        again = bool(self.residuals) and all(
            t[-1:] == [at] for t, f in zip(self.times, learns, strict=True) if f
        )
        shifted = self.residuals if again else [*self.residuals, residual]
        shifted = [*shifted[:-1], residual]
        if not all(learns) and self.residuals:
            olds = self.residuals if again else [self.residuals[0], *self.residuals]
            mask = partial(sample_mask, list(kept))
            shifted = [
                new.map(lambda n, o: torch.where(mask(n), o, n), old)
                for new, old in zip(shifted, olds, strict=True)
            ]
        self.residuals = shifted[-self.history :]
        for times, debt, fresh in zip(self.times, self._debts, learns, strict=True):
            if fresh:
                if not again:
                    times.append(at)
                self._settle(times, debt)

    def _settle(self, times: list[float], debt: _Debt) -> None:
        """After `learn`: work out what the answers since the last computed step got wrong; drop old times."""
        for x, length, given in debt.answers:
            for time, better in zip(times, weights.newton(times, x, 2), strict=True):
                debt.owed[time] = debt.owed.get(time, 0.0) + length * (better - given.get(time, 0.0))
        debt.answers.clear()
        while len(times) > self.history:
            dropped = debt.owed.pop(times.pop(0), 0.0)
            if dropped:  # what is owed must still add up to nothing, else a constant would not be kept
                debt.owed[times[0]] = debt.owed.get(times[0], 0.0) + dropped

    def predict(self, at: float = 0.0, kept: Sequence[bool] = (), step_length: float = 1.0) -> Stream:
        """The forecast for time `at`, of which the samples in `kept` (none marked: all) make use.

        step_length: how far the sampler goes in a step here, in any unit that stays the same.
        """
        rows = self.rows(at)
        if self.repay:
            for n, (times, debt) in enumerate(zip(self.times, self._debts, strict=True)):
                if any(kept) and not kept[n]:
                    continue
                debt.answers.append((at, step_length, dict(zip(times, rows[n], strict=True))))
                rows[n] = [
                    w + debt.owed.get(t, 0.0) / step_length for w, t in zip(rows[n], times, strict=True)
                ]
                debt.owed.clear()
        return weighted_sum(self.residuals, rows)

    def rows(self, at: float) -> list[list[float]]:
        """The weights of the bare forecast for time `at`, of each sample."""
        return [self.weigh(n, times, at) for n, times in enumerate(self.times)]

    def weigh(self, sample: int, times: list[float], at: float) -> list[float]:
        """The weights of one sample."""
        return self.rule(times, at)


def weighted_sum(residuals: list[Stream], rows: list[list[float]]) -> Stream:
    """sum_j w_j R_j with a row of weights for each sample, summed in float32, in the residuals' own dtype.

    A row may be shorter than the list: it belongs to the newest residuals.
    """
    parts = [[t for t in (r.img, r.txt) if t is not None] for r in residuals]
    img, *txt = combine(parts, factors(rows, len(residuals), parts[0][0]))
    return Stream(img, txt[0] if txt else None)


def factors(rows: Sequence[Sequence[float]], states: int, like: Tensor) -> list[float | Tensor]:
    """What to multiply each of `states` stored tensors by: numbers where all rows agree, else (B, 1, 1)."""
    rows = [[0.0] * (states - len(row)) + list(row) for row in rows]
    if all(row == rows[0] for row in rows):
        return [*rows[0]]
    columns = torch.tensor(rows, dtype=torch.float32, device=like.device).T  # (states, B)
    return [column.view(-1, *[1] * (like.ndim - 1)) for column in columns]


def combine(snapshots: Sequence[Sequence[Tensor]], factors: Sequence[float | Tensor]) -> list[Tensor]:
    """sum_j f_j * snapshots[j], part by part, all parts at once where the factors are numbers."""
    total: list[Tensor] | None = None
    for parts, factor in zip(snapshots, factors, strict=True):
        if isinstance(factor, float) and factor == 0.0:
            continue
        wide = [p.float() for p in parts]
        if total is None:
            total = [p * factor for p in wide]
        elif isinstance(factor, float):
            torch._foreach_add_(total, wide, alpha=factor)
        else:
            torch._foreach_add_(total, [p * factor for p in wide])
    if total is None:
        return [torch.zeros_like(p) for p in snapshots[-1]]
    return [t.to(p.dtype) for t, p in zip(total, snapshots[-1], strict=True)]


class Modes(Forecast):
    """Dynamic mode decomposition: exact on sums of exponentials, whose number it finds itself.

    Costs `history` joint states and, at the first answer after a computed step, a wait for its dot products.
    """

    def __init__(self, history: int = 6, repay: bool = False) -> None:
        super().__init__(weights.last, history, repay)
        self._dots: list[dict[tuple[float, float], float]] = []  # <R_i, R_j> by times, of each sample
        self._who: dict[int, str] = {}  # answered last, by sample
        self._unread: deque[tuple[Tensor, list[list[float]]]] = deque(maxlen=history)  # products, and whose
        self.answers: Counter[str] = Counter()  # who answered how often: "dmd", "taylor" or "reuse"
        self.total: Callable[[Tensor], Tensor] = lambda dots: dots  # sums them over processes, up to a factor

    def learn(self, residual: Stream, at: float = 0.0, kept: Sequence[bool] = ()) -> None:
        super().learn(residual, at, kept)
        dots = torch.stack([_dots(old, self.residuals[-1]) for old in self.residuals], 1)  # (B, history)
        self._unread.append((dots, [list(times) for times in self.times]))  # of older ones nothing is held

    def _read(self) -> None:
        if not self._unread:
            return
        columns = self.total(torch.cat([dots for dots, _ in self._unread], 1)).tolist()  # a wait
        self._dots = self._dots or [{} for _ in columns]
        start = 0
        for table, then in self._unread:
            stop = start + table.shape[1]
            for row, times, dots in zip(columns, then, self._dots, strict=True):
                for value, time in zip(row[stop - len(times) : stop], times, strict=True):
                    dots[time, times[-1]] = value
            start = stop
        self._unread.clear()
        for times, dots in zip(self.times, self._dots, strict=True):
            for a, b in [pair for pair in dots if pair[0] not in times]:
                del dots[a, b]

    def weigh(self, sample: int, times: list[float], at: float) -> list[float]:
        self._read()
        dots = self._dots[sample]
        gram = np.array([[dots[min(a, b), max(a, b)] for b in times] for a in times])
        row, self._who[sample] = weights.dmd(times, at, gram)
        return row

    def predict(self, at: float = 0.0, kept: Sequence[bool] = (), step_length: float = 1.0) -> Stream:
        forecast = super().predict(at, kept, step_length)
        self.answers.update(who for n, who in self._who.items() if not any(kept) or kept[n])
        return forecast


def _dots(a: Stream, b: Stream) -> Tensor:
    """<a, b> of each sample, (B,) float64: the Gram matrix squares the spread."""
    total = (a.img.float() * b.img.float()).sum(-1, dtype=torch.float64).sum(-1)
    if a.txt is None or b.txt is None:
        return total
    return total + (a.txt.float() * b.txt.float()).sum(-1, dtype=torch.float64).sum(-1)


NAMES = ("last", "taylor", "newton", "hermite", "taylor_scaled", "dmd")


def states(name: str, order: int, repay: bool = False) -> int:
    """How many residuals of a stage the predictor `name` holds."""
    fixed = {"last": 1, "dmd": 6}.get(name, order + 1)
    return max(fixed, 3) if repay else fixed


def build(name: str, order: int = 1, sigma: float = 0.5, repay: bool = False) -> Predictor:
    """A new, empty predictor.

    order: of the polynomial, for taylor, newton, hermite and taylor_scaled. sigma: HiCache's contraction.
    repay: pay back forecasting errors.
    """
    if name not in NAMES:
        raise ValueError(f"predictor={name!r} is unknown: choose one of {', '.join(NAMES)}")
    history = states(name, order, repay)
    if name == "dmd":
        return Modes(history, repay)
    if name == "last":
        return Forecast(weights.last, history, repay) if repay else LastResidual()
    rule = getattr(weights, name)
    if name in ("hermite", "taylor_scaled"):
        rule = partial(rule, sigma=sigma)
    return Forecast(partial(rule, order=order), history, repay)
