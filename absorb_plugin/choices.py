"""What the recipe's fields come to for a model, and what to warn of."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from loguru import logger

from absorb_plugin.blocks import MUCH, BlockMap
from absorb_plugin.calibration import Batch, count_tokens, padding_share
from absorb_plugin.forward.inputs import unseen_linears
from absorb_plugin.groups import Groups, linear_sizes
from absorb_plugin.limits import bounds_of
from absorb_plugin.pruners import MaskPruner, Pruner
from absorb_plugin.sample_split import SampleSplit
from absorb_plugin.search.budget import Budget
from absorb_plugin.search.rows import Rows
from absorb_plugin.settings import LEAST_SAMPLES, AllocationSettings
from absorb_plugin.signals import SIGNALS, Signal

__all__ = [
    "budget_of",
    "check_judges",
    "choose_level",
    "choose_signal",
    "needs_loss",
    "needs_text",
    "unseen",
    "warn_of_few_tokens",
    "warn_of_granularity",
    "warn_of_other_weights",
    "warn_of_padding",
    "widest",
]

# Up to so many blocks the response of each takes no more passes than the gradient.
RESPONSE_BLOCKS = 6
# Share of padding that is told: pruners prune by it, and we judge without.
PADDED = 0.01
# Allocators whose authors rank blocks.
BLOCKWISE = ("owl", "dlp", "alpha_pruning")


def choose_signal(
    settings: AllocationSettings, blocks: BlockMap, pruner: Pruner
) -> Signal:
    """
    :raises ValueError: naming a signal or an argument that there is not
    """
    name = settings.signal
    if name == "auto":
        few = choose_level(settings) == "block" and len(blocks) <= RESPONSE_BLOCKS
        name = "response" if few else "gradient"
        if not isinstance(pruner, MaskPruner):  # masks do not know what it repairs
            name = "pruner"
    if name not in SIGNALS:
        raise ValueError(f"signal={name!r}: choose auto or one of {list(SIGNALS)}")
    return SIGNALS[name].made_with(settings.signal_args)


def needs_loss(settings: AllocationSettings, signal: Signal) -> bool:
    """Whether next-token loss is measured."""
    if settings.strength == "auto":
        return True
    return settings.strength != 0 and signal.by_loss


def needs_text(settings: AllocationSettings) -> bool:
    """Whether the model has to be run at all; some allocators look at weights alone."""
    observed = settings.base_allocator().needs in ("activations", "gram")
    return observed or settings.strength != 0


def choose_level(settings: AllocationSettings) -> str:
    """What `level: auto` stands for: what won in docs/benchmarks.md."""
    return "linear" if settings.level == "auto" else settings.level


def budget_of(
    blocks: BlockMap, sparsity: float, settings: AllocationSettings, pruner: Pruner
) -> Budget:
    """
    :param pruner: that will prune
    :raises ValueError: if max_sparsity and limits leave it out of reach
    """
    low, high = bounds_of(blocks, settings.limits, settings.max_sparsity)
    if settings.max_loss_increase is not None:  # it is but the most
        sizes = linear_sizes(blocks)
        most = float(sizes @ high / sizes.sum())
        sparsity = min(sparsity, most)
    cap = Budget.of(linear_sizes(blocks), sparsity, settings.max_sparsity)
    budget = cap.within(low, high)
    # elsewhere Linears stay equal, and a number's step exactly as long as it says
    fine = settings.strength == "auto" and choose_level(settings) == "linear"
    if not (fine and pruner.whole_rows):
        return budget
    columns = [linear.in_features for linear in blocks.linears().values()]
    groups = Groups.at("linear", blocks).of
    return replace(budget, rows=Rows(np.array(columns, dtype=np.float64), groups))


def check_judges(settings: AllocationSettings, samples: SampleSplit) -> None:
    """:raises ValueError: if a loss is to be kept that one sample alone would judge"""
    bound = settings.max_loss_increase
    if bound is not None and samples.judging < 2:
        raise ValueError(
            f"max_loss_increase={bound:g} is held with a margin of one standard "
            "error, and there is but one sample to judge by, which has none: give "
            f"{LEAST_SAMPLES} calibration samples or more that are not the same"
        )


def warn_of_few_tokens(
    pruner: Pruner, blocks: BlockMap, batches: Sequence[Batch]
) -> None:
    """A Hessian of too few tokens makes a pruner that uses it worse than masks."""
    tokens = sum(map(count_tokens, batches))
    wanted = pruner.tokens_per_column * widest(blocks)
    if tokens < wanted:
        logger.warning(
            f"{pruner.modifier.__name__} prunes by {tokens} calibration tokens, and "
            f"the widest Linear has {widest(blocks)} columns: with fewer than {wanted} "
            "tokens it can be worse than Wanda. Raise num_calibration_samples or "
            "max_seq_length"
        )


def warn_of_granularity(settings: AllocationSettings) -> None:
    """Of what is known to end badly, though it can be asked for."""
    if settings.granularity == "linear" and settings.allocator in BLOCKWISE:
        logger.warning(
            f"granularity: linear has {settings.allocator} rank single Linears: in "
            "published results before Wanda and SparseGPT models collapse by that. Use "
            "granularity: block; level: linear corrects every Linear by the loss"
        )


def warn_of_padding(settings: AllocationSettings, batches: Sequence[Batch]) -> None:
    """
    llm-compressor's pruners count what padding puts into a Linear, and we do not.

    :raises ValueError: if a bound on the loss is to be kept by weights that are not
        those that will be made
    """
    share = padding_share(batches)
    if share <= PADDED:
        return
    told = (
        f"{share:.0%} of the calibration set is padding. llm-compressor's pruners "
        "prune by it as by any token, our losses leave it out"
    )
    remedy = (
        "Do not pad: tokenise without padding, with batch_size=1 or "
        'data_collator="truncation"'
    )
    if settings.max_loss_increase is not None:
        raise ValueError(
            f"max_loss_increase={settings.max_loss_increase}: {told}, so the bound "
            f"would be of another model than the one that is made. {remedy}"
        )
    logger.warning(
        f"{told}: the pruned model will be worse than the losses in log and report "
        f"say. {remedy}"
    )


def warn_of_other_weights(blocks: BlockMap) -> None:
    """Where much of the blocks is in no Linear, a sparsity of these says little."""
    other = blocks.other_weights()
    if (share := sum(other.values())) > MUCH:
        logger.warning(
            f"{share:.0%} of the weights of the blocks are in no Linear "
            f"({', '.join(other)}), and no pruner of llm-compressor takes them: they "
            "stay dense, and the sparsity is that of the Linears"
        )


def widest(blocks: BlockMap) -> int:
    """Columns of the widest Linear that will be pruned."""
    return max(linear.in_features for linear in blocks.linears().values())


def unseen(blocks: BlockMap, statistics: Mapping[str, torch.Tensor]) -> list[str]:
    """Linears that saw no token, of which a warning tells."""
    found = unseen_linears(blocks, statistics)
    if found:
        logger.warning(
            f"{len(found)} of {len(blocks.linears())} Linears saw no token of the "
            f"statistics' calibration samples ({found[0]} …): "
            "experts that were never chosen, or Linears that the block does not "
            "call. If the pruner has no token for them either, the latter stay "
            "dense, and of the former Wanda zeroes the first columns and "
            "SparseGPT every weight. For experts use more samples, or "
            "oneshot(moe_calibrate_all_experts=True); profile.json lists them"
        )
    return found
