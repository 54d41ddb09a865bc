"""Runs probes: every rank its share, within the memory, and each measurement once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from compressed_tensors.offload import get_execution_device
from loguru import logger
from torch.nn import Module

from absorb_plugin import distributed
from absorb_plugin.blocks import BlockMap
from absorb_plugin.cache import ProfileCache
from absorb_plugin.calibration import join_samples, pad_to_batch
from absorb_plugin.devices import computes_on_cpu, dtype_of, is_offloaded
from absorb_plugin.forward.joined import joined_before_made
from absorb_plugin.forward.memory import block_bytes, footprint, limit_by_machine
from absorb_plugin.forward.probe import Needs, Probe
from absorb_plugin.forward.resident import kept_onloaded, spare
from absorb_plugin.forward.run import run_probes
from absorb_plugin.language_model import language_model

__all__ = ["ProbeRunner"]

# Of the memory that pruned weights may take which ranks put together block by block.
SHARE_TO_JOIN = 0.25


class ProbeRunner:
    """
    :param model: the model, wrapped or not; its weights are not touched
    :param blocks: all decoder blocks
    :param memory: bytes that a probe may take beside the model, or "auto"
    :param cache: directory of measurements, or None

    Attributes:
        joins_rows: whether the ranks of torch.distributed each make some rows of every
            masked weight, and put them together block by block
        out_of_memory: whether a probe had to give back what it may do without
    """

    out_of_memory = False

    def __init__(
        self,
        model: Module,
        blocks: BlockMap,
        memory: int | Literal["auto"],
        cache: str | None = None,
    ) -> None:
        self._free_to_choose = memory == "auto"
        self._model, self._blocks = language_model(model), blocks
        if memory == "auto":
            memory = limit_by_machine(self._model, blocks.modules)
        self._memory = memory
        self.joins_rows = self._joins_own = False
        if distributed.ranks() > 1:
            with distributed.fail_together():
                self._decide_to_join()
        self.cache = None if cache is None else ProfileCache(cache, self._model)

    def _decide_to_join(self) -> None:
        """
        Where a block's pruned weights, twice, are a small part of the memory; and where
        a rank gets them sooner than it would make them, as it does if it had to onload
        the whole.
        """
        size = block_bytes(self._model, self._blocks.modules)
        room = 2 * size <= self._memory * SHARE_TO_JOIN
        away = any(map(is_offloaded, self._blocks.linears().values()))
        found = distributed.meet((room, away))
        if all(room for room, _ in found):
            self._joins_own = all(away for _, away in found)
            device = torch.device(get_execution_device(self._model))
            quick = self._joins_own or joined_before_made(device, dtype_of(self._model))
            self.joins_rows = quick

    @contextmanager
    def kept_onloaded(self) -> Iterator[None]:
        """
        Within the context blocks stay on the device, where it has room for them; probes
        then make do with half of the memory, unless it is the user's number.
        """
        before = self._memory
        less = before // 2 if self._free_to_choose else before
        rows = self._blocks.linears().values() if self.joins_rows else ()
        with kept_onloaded(self._model, self._blocks.modules, less, rows) as kept:
            self._memory = less if kept else before
            try:
                yield
            finally:
                self._memory = before

    def spare(self, needs: Needs, samples: Sequence[dict]) -> int:
        """
        Bytes on an accelerator that neither kept blocks nor a probe of all samples at
        once ask for; none if that passes the limit, and takes what room there is.
        """
        if not self.has_room(needs, samples):
            return 0
        return spare(self._model, self._blocks.modules, self._memory)

    def has_room(self, needs: Needs, samples: Sequence[dict]) -> bool:
        """
        Whether a probe of all samples at once is within the limit, and that one of an
        accelerator: a host's caches are small, and launches cost it nothing.
        """
        if computes_on_cpu(self._model):
            return False
        need = footprint(self._model, self._blocks.modules, [needs], self._memory)
        longest = max(sample["input_ids"].shape[1] for sample in samples)
        return need.whole(len(samples), longest) <= self._memory

    def run(
        self,
        what: str,
        samples: Sequence[dict],
        probe: Probe,
        *,
        in_parts: bool = False,
    ) -> Any:
        """
        Under torch.distributed every rank runs its share of the samples.

        :param what: is measured, for messages and the cache
        :param samples: batches of one, the same on all ranks
        :param in_parts: as of `run_probes`
        :return: the probe's result, the same on all ranks
        """
        tokens = sum(sample["input_ids"].numel() for sample in samples)
        logger.info(f"{what}: {len(samples)} samples, {tokens} tokens")
        mine = probe.share(samples)
        probe.idle = not mine
        # judges and what prunes are in step anyway; their own weights come whole where
        # the model is on the device
        joined = probe.own_weights and self._joins_own
        if joined:
            probe.in_step = True
        shortest = min(samples, key=lambda sample: sample["input_ids"].shape[1])

        def measure() -> None:
            whole = probe.needs.single_batch and mine
            run_probes(
                self._model,
                self._blocks,
                [pad_to_batch(mine)] if whole else join_samples(mine),
                [probe],
                memory=self._memory,
                in_parts=in_parts,
                placeholder=shortest,
                joined=joined,
                description=what,
            )

        with distributed.fail_together():
            if self.cache is None or not probe.state:
                measure()
            else:
                # in step, what a rank measures is of the others' samples too
                seen = samples if probe.in_step else mine
                self.cache.load_or_run(what, seen, probe, self._memory, measure)
        return probe.result()
