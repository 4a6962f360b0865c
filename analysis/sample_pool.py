"""For training on a GPU: samples that worker processes draw, kept on the device, and steps as CUDA graphs."""

import multiprocessing
import queue
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

Source = Callable[[str], Iterator[list[np.ndarray]]]  # of a seed: chunks, the arrays of each equally long
PATIENCE = 180  # seconds to wait for the first samples; worker processes import for half a minute


def deliver(source: Source, seed: str, ready: "multiprocessing.Queue") -> None:
    torch.set_num_threads(1)
    for chunk in source(seed):
        ready.put(chunk)


class Pool:
    """The last `size` samples on the device, replaced as fast as the workers can, drawn from at random."""

    def __init__(self, source: Source, seed: str, workers: int, size: int, device: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "diffusers", "transformers"])  # once, not by every worker
        self.ready = context.Queue(maxsize=4 * workers)
        for rank in range(workers):
            arguments = (source, f"{seed} {rank}", self.ready)
            context.Process(target=deliver, args=arguments, daemon=True).start()
        self.size, self.device, self.added = size, device, 0
        self.kept: list[torch.Tensor] = []

    def refresh(self, chunks: int, timeout: float = 0.0) -> None:
        """Takes in at most so many chunks, none if there are none."""
        for _ in range(chunks):
            try:
                chunk = self.ready.get(timeout=timeout) if timeout else self.ready.get_nowait()
            except queue.Empty:
                if timeout:
                    raise TimeoutError(f"no samples from the workers in {timeout:.0f} s") from None
                return
            parts = [torch.from_numpy(array) for array in chunk]
            if not self.kept:
                self.kept = [p.new_empty(self.size, *p.shape[1:], device=self.device) for p in parts]
            where = (torch.arange(len(parts[0])) + self.added).remainder(self.size).to(self.device)
            for kept, part in zip(self.kept, parts, strict=True):
                kept[where] = part.to(self.device)
            self.added += len(parts[0])

    def draw(self, count: int, chunks: int = 8) -> list[torch.Tensor]:
        while self.added < min(count, self.size):
            self.refresh(1, PATIENCE)
        self.refresh(chunks)
        drawn = torch.randint(min(self.added, self.size), (count,), device=self.device)
        return [kept[drawn] for kept in self.kept]


def captured(
    compute: Callable[..., Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor]
) -> Callable[..., Sequence[torch.Tensor]]:
    """`compute` as one CUDA graph: launched kernel by kernel, so small a model waits for Python.

    The tensors handed out are overwritten by the next call. `compute` must not wait for the device.
    """
    held = [part.clone() for part in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            compute(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = compute(*held)

    def replay(*given: torch.Tensor) -> Sequence[torch.Tensor]:
        for kept, part in zip(held, given, strict=True):
            kept.copy_(part)
        graph.replay()
        return results

    return replay
