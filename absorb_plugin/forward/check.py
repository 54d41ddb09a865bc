"""
What every probe presumes of a model, checked once before anything is measured: that the
hidden state passes each block once and in order, that nothing happens between blocks,
that a block keeps no state from one call to the next, where losses are measured that no
token sees those after it, and where the pruner's own arithmetic judges that blocks can
be given a part of the samples.
"""

from contextlib import ExitStack

import torch
from loguru import logger
from torch.nn import Linear, Module

from absorb_plugin._llmcompressor import linear_experts
from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch, token_mask
from absorb_plugin.forward.head import OutputHead
from absorb_plugin.forward.linears import ignore_entry, watched_inputs
from absorb_plugin.forward.probe import Needs, Probe, RunBlock
from absorb_plugin.forward.run import run_probes
from absorb_plugin.groups import EXPERT
from absorb_plugin.language_model import REMEDY, WITHOUT_FORWARD
from absorb_plugin.mistakes import in_one_line

__all__ = ["check_forward"]

# Largest relative difference between equal computations, whose parts may be summed in
# another order. A cache or a second stack makes one of order 1.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
COARSE = 5e-2
# Tokens whose hidden states are compared, and whose logits.
SKETCHED = 4
COMPARED = 16

# What tells of the device or the machine, not of the model.
MACHINE = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", MemoryError))

IF_EXPERTS = (
    "If so, the Linears that llm-compressor made of its experts do not, and it cannot "
    "prune this model, with or without AbsorptionAllocationModifier"
)
BASE_ALONE = "strength: 0, which keeps the base allocation and runs no block twice"
INSTEAD = f"Use {BASE_ALONE}"


def check_forward(
    model: Module,
    blocks: BlockMap,
    sample: Batch,
    *,
    by_loss: bool,
    by_slope: bool = False,
    by_part: bool = False,
) -> None:
    """
    Two forwards of one sample.

    :param sample: a batch of one
    :param by_loss: whether next-token losses will be measured
    :param by_slope: whether blocks will be run backward
    :param by_part: whether blocks will be given some of a batch's samples
    :raises ValueError: naming the block and what it does
    """
    calls, chain = _LinearCalls(blocks), _ChainCheck(blocks, by_loss, by_slope)
    try:
        run_probes(
            model, blocks, [sample, sample], [calls, chain], description="Checking"
        )
    except (RuntimeError, TypeError, KeyError, IndexError, AttributeError) as error:
        if isinstance(error, MACHINE) or "can't allocate memory" in str(error):
            raise
        told = in_one_line(error)
        raise ValueError(
            f"model: its forward fails on one calibration sample of {[*sample]} "
            f"({told}). Does the model take such a batch by itself? "
            f"{IF_EXPERTS if linear_experts(model) else WITHOUT_FORWARD}"
        ) from error
    calls.result()
    if by_part:
        other = {**sample, "input_ids": sample["input_ids"].roll(1, dims=1)}
        two = {name: torch.cat([rows, other[name]]) for name, rows in sample.items()}
        run_probes(model, blocks, [two], [_PartCheck(blocks)], description="Checking")


class _LinearCalls(Probe):
    """How the blocks call the Linears that are to be pruned."""

    def __init__(self, blocks: BlockMap) -> None:
        self._blocks = blocks
        self._called: set[str] = set()
        self._in_force = ExitStack()

    def enter(self, index: int, block: Module) -> None:
        watched = self._blocks.blocks[index]
        self._own = {watched.full_name(k): x for k, x in watched.linears.items()}
        self._in_force.enter_context(watched_inputs(self._own, self._note))

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> None:
        self.close()

    def close(self) -> None:
        self._in_force.close()

    def result(self) -> None:
        """Warn of those that are never called: their weight is used past them."""
        linears = self._blocks.linears()
        passed = [
            name
            for name in linears
            if name not in self._called and not EXPERT.search(name)
        ]
        if passed:
            logger.warning(
                f"{len(passed)} Linears are never called as modules ({passed[0]} …): "
                "the block uses their weights in another way, so llm-compressor sees "
                "no input of theirs and leaves them dense, while the sparsity counts "
                f"them. Name them in `ignore`, as {ignore_entry(passed[0])!r}"
            )

    def _note(self, name: str, x: torch.Tensor) -> None:
        first = name not in self._called
        self._called.add(name)
        if first and x.numel():
            _check_linear(name, self._own[name], x)


def _check_linear(name: str, module: Linear, x: torch.Tensor) -> None:
    """:raises ValueError: if it computes something else than its weight times x"""
    found = module.forward(x)
    try:
        expected = torch.nn.functional.linear(x, module.weight, module.bias)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # it makes other dtypes of them first, say
        told = " ".join(str(error).split())
    else:
        difference = relative(found, expected)
        if not difference > 4 * tolerance(expected):  # NaN is told elsewhere
            return
        told = f"difference {difference:.2g}"
    raise ValueError(
        f"targets: {name} ({type(module).__name__}) computes something else than its "
        f"weight times its input ({told}), as an adapter within a Linear does, and we "
        "would measure another model. Merge it into the weight, or name the Linear in "
        f"`ignore`, as {ignore_entry(name)!r}"
    )


class _ChainCheck(Probe):
    """
    In the first forward a hidden state of its own, the tokens shifted, runs along as
    those of all probes do; in the second the model's own pass takes it. Both must give
    the same after every block.
    """

    def __init__(self, blocks: BlockMap, by_loss: bool, by_slope: bool = False) -> None:
        self._blocks, self._by_loss, self._by_slope = blocks, by_loss, by_slope
        self.wants_logits = by_loss
        self._sketches: list[torch.Tensor] = []
        self._forwards = 0
        self._changes_before = 0.0

    @property
    def needs(self) -> Needs:
        return Needs(trajectories=2)

    def start(self, batch: Batch) -> None:
        self._forwards += 1
        self._order: list[int] = []
        self._last_token = int(token_mask(batch)[0].nonzero().max())
        self._shifted: torch.Tensor | None = None
        self._future: torch.Tensor | None = None

    def enter(self, index: int, block: Module) -> None:
        self._order.append(index)

    def redirect(self, index: int, before: torch.Tensor) -> torch.Tensor | None:
        first = self._forwards > 1 and len(self._order) == 1
        return shifted(before) if first else None

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> None:
        if self._forwards > 1:
            self._compare(index, after)
            return
        if self._shifted is None or self._future is None:
            self._shifted, self._future = shifted(before), self._changed(before)
        self._shifted = self._again(index, run, self._shifted, self._by_slope)
        self._future = self._again(index, run, self._future)
        self._sketches.append(sketch(self._shifted))
        self._after = after

    def _again(
        self, index: int, run: RunBlock, hidden: torch.Tensor, by_slope: bool = False
    ) -> torch.Tensor:
        """:param by_slope: whether what comes out must know where it came from"""
        try:
            with torch.set_grad_enabled(by_slope):
                found = run(hidden.detach().requires_grad_(by_slope))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, IndexError) as error:
            said = f"cannot run again on another hidden state ({error})"
        else:
            if found.requires_grad or not by_slope:
                return found.detach()
            said = "runs without gradients, as under torch.no_grad in its own code"
        block = self._blocks.blocks[index]
        instead = f"Use signal: response, or {BASE_ALONE}" if by_slope else INSTEAD
        raise ValueError(
            f"model: block {block.name} ({type(block.module).__name__}) {said}. "
            f"{instead}"
        )

    def finish(self, batch: Batch, head: OutputHead) -> None:
        if self._forwards > 1:  # the chain is sound
            self._check_future()
            return
        self._check_order()
        if self._by_loss:
            self._check_head(batch, head)
            self._changes_before = self._seen_future()

    def _check_head(self, batch: Batch, head: OutputHead) -> None:
        count = min(COMPARED, batch["input_ids"].shape[1])
        try:
            found = head.logits(batch["input_ids"], self._after, 0, count)
        except (ValueError, torch.OutOfMemoryError):
            raise  # it says what is missing
        except Exception as error:  # of the model's own code, whatever it is
            told = in_one_line(error)
            raise ValueError(
                "model: its output head cannot be run by itself on what the last block "
                f"puts out ({told}), so there is no loss to judge by. {INSTEAD}"
            ) from error
        own, wanted = head.own, (1, batch["input_ids"].shape[1])
        if own is None or own.shape[:2] != wanted or found.shape[1] != count:
            shape = None if own is None else tuple(own.shape)
            raise ValueError(
                f"model: of {wanted[1]} tokens it returns logits of shape {shape}, not "
                f"of every token, so there is no next-token loss to judge by. {REMEDY}"
            )
        difference = relative(found, own[:, :count])
        if difference > 4 * tolerance(self._after):
            raise ValueError(
                "model: its output head makes other logits of what the last block puts "
                f"out than the model itself (difference {difference:.2g}): it takes "
                "something else too, as the outputs of other blocks, so our losses "
                f"would be those of another model. {INSTEAD}"
            )

    def _changed(self, before: torch.Tensor) -> torch.Tensor:
        """The same but for the last token."""
        changed = before.clone()
        changed[:, self._last_token] = before[:, 0].flip(-1)
        return changed

    def _check_order(self) -> None:
        if self._order == list(range(len(self._blocks))):
            return
        names = [block.name for block in self._blocks.blocks]
        skipped = sorted(set(range(len(names))) - set(self._order))
        instead = INSTEAD
        if skipped:
            told, instead = f"does not run block {names[skipped[0]]}", WITHOUT_FORWARD
        elif len(self._order) > len(names):
            twice = next(i for i in self._order if self._order.count(i) > 1)
            told = (
                f"runs block {names[twice]} {self._order.count(twice)} times in one "
                "forward"
            )
        else:
            told = "runs its blocks in another order than it holds them"
        raise ValueError(
            f"model: it {told}, and absorption is defined for a single chain of "
            f"blocks. {instead}"
        )

    def _seen_future(self) -> float:
        """How much a change of the last token changes those before it."""
        assert self._future is not None
        earlier = slice(0, self._last_token)
        return relative(self._future[:, earlier], self._after[:, earlier])

    def result(self) -> None:
        """Nothing: what is wrong is raised while it runs."""

    def _check_future(self) -> None:
        if self._changes_before > tolerance(self._after):
            raise ValueError(
                "model: tokens see those after them (an encoder, a diffusion model, a "
                "prefix), so next-token loss, by which strength='auto' and most "
                "signals judge, means nothing there. A decoder that is causal in eager "
                f'attention alone loads with attn_implementation="eager". {REMEDY}'
            )

    def _compare(self, index: int, after: torch.Tensor) -> None:
        difference = relative(sketch(after), self._sketches[len(self._order) - 1])
        if difference > tolerance(after):
            block = self._blocks.blocks[index]
            raise ValueError(
                f"model: block {block.name} ({type(block.module).__name__}) does not "
                f"give the same when it runs again (difference {difference:.2g}): it, "
                "or what lies before it, keeps a state such as a cache, draws random "
                "numbers, or takes something else than the hidden state of the block "
                f"before. {INSTEAD}"
            )


class _PartCheck(Probe):
    """Of two samples the second by itself."""

    def __init__(self, blocks: BlockMap) -> None:
        self._blocks = blocks

    @property
    def needs(self) -> Needs:
        return Needs(trajectories=1, single_batch=True)

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> None:
        second = slice(1, 2)
        try:
            alone, expected = run.of_samples(second)(before[second]), after[second]
            most = 4 * tolerance(after)  # routers may part ways over a last digit
            if alone.shape == expected.shape and relative(alone, expected) <= most:
                return
            told = "the second of two comes out otherwise"
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError) as error:
            told = str(error)
        block = self._blocks.blocks[index]
        raise ValueError(
            f"model: block {block.name} ({type(block.module).__name__}) cannot run "
            f"some samples of a batch without the others ({told}). Set "
            "confirm_samples: 0 and signal: gradient, which run whole batches only"
        )

    def result(self) -> None:
        """Nothing: what is wrong is raised while it runs."""


def shifted(hidden: torch.Tensor) -> torch.Tensor:
    """Every token with the hidden state of another one."""
    return hidden.roll(max(1, hidden.shape[1] // 2), dims=1)


def sketch(hidden: torch.Tensor) -> torch.Tensor:
    """A few tokens' hidden states, the last one's among them: float32, on the CPU."""
    step = max(1, hidden.shape[1] // SKETCHED)
    return hidden.flip(1)[:, ::step].float().cpu()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    scale = expected.float().norm().item()
    return (found.float() - expected.float()).norm().item() / scale if scale else 0.0


def tolerance(hidden: torch.Tensor) -> float:
    return TOLERANCE.get(hidden.dtype, COARSE)
