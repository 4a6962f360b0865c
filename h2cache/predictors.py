"""What stands in for skipped work. Pure maths on streams of tokens: no model, no decision."""

import torch

from h2cache.similarity import sample_mask
from h2cache.stages import Stream


class LastResidual:
    """The residual of the last computed step, unchanged (H2-Cache, Block Cache, TeaCache)."""

    def __init__(self) -> None:
        self.residual: Stream | None = None

    def learn(self, residual: Stream, kept: list[bool]) -> None:
        """Keep what was just computed, but for the samples marked in `kept`: they keep what they had."""
        if self.residual is not None and any(kept):
            residual = residual.map(
                lambda new, old: torch.where(sample_mask(kept, new), old, new), self.residual
            )
        self.residual = residual.map(torch.Tensor.detach)

    def predict(self) -> Stream:
        """The stand-in for the skipped blocks, to be added to the head's fresh output."""
        return self.residual
