"""Which calibration samples serve what: decided once, and printed in the report."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from loguru import logger

from absorb_plugin import distributed
from absorb_plugin.calibration import (
    Batch,
    count_tokens,
    cut_tokens,
    evenly_spaced,
    has_media,
    interleaved,
    sample_key,
    single_samples,
    sort_samples,
    token_mask,
)
from absorb_plugin.settings import Effort

__all__ = ["SampleSplit", "SampleUse"]

# Tokens of a window to prune by, where those of the judges are too few in all: many,
# because a first token's activations are like no other's.
PRUNING_WINDOW = 512
# Of so many samples there are enough for a share of their own for the last comparison.
APART = 4
# Of small sets the search and the last comparison hold out one sample in so many: what
# is held out measures nothing, and few samples to measure cost more than few to judge.
SEARCH_SHARE, CONFIRM_SHARE = 8, 6


@dataclass(frozen=True)
class SampleUse:
    """
    What calibration samples serve.

    :param use: "statistics", "signal", "search", "confirm" or "pruning"
    :param samples: batches of one
    """

    use: str
    samples: list[dict]

    @property
    def tokens(self) -> int:
        """Tokens that are no padding, of all samples."""
        return sum(map(count_tokens, self.samples))


class SampleSplit:
    """
    Samples that judge are held out, at even distances, and serve nothing else: those of
    the search judge its rounds, those of the confirmation the last comparison. All
    others measure. Signals and judges see windows from anywhere in a sample, not its
    beginning, which chat templates and system prompts make alike.

    What is held out once is held out with all its copies.

    With fewer than four samples the confirmation shares those of the search.

    Under torch.distributed every rank holds all samples and makes the same choices.

    :param batches: the same on all ranks
    :param effort: how many samples serve what, and how many of their tokens
    :param judged: whether allocations are judged, so that samples are held out
    :param by_loss: whether anything needs a token to predict
    :param pruning_tokens: that the pruner's own arithmetic should see; None where
        nothing asks for it
    :raises ValueError: if samples are to be held out and there is but one
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        effort: Effort,
        *,
        judged: bool,
        by_loss: bool,
        pruning_tokens: int | None = None,
    ) -> None:
        self._effort, self._rounds, self._prunings = effort, 0, 0
        self._signal: list[dict] = []  # of the first round
        samples = sort_samples(single_samples(batches, by_loss))
        check_alike(samples)
        self._first = _same_first_token(samples)
        search: list[dict] = []
        confirm: list[dict] = []
        distinct = _distinct(samples)
        alike = len(distinct) == 1 < len(samples)  # then nothing is there to leak
        if judged:
            search, confirm = _held_out(samples if alike else distinct, effort)
        which: Callable[[dict], object] = id if alike else _content
        out = set(map(which, [*search, *confirm]))
        self._measuring = [sample for sample in samples if which(sample) not in out]
        self.statistics = evenly_spaced(self._measuring, effort.statistics)
        self._pruning_tokens = pruning_tokens or 0
        self.pruning = [] if pruning_tokens is None else self.next_pruning()
        self.search = self._judged(search, effort.search, "search")
        # in one batch with those, and shorter ones would be padded to their length
        least = max(map(count_tokens, self.pruning), default=0)
        confirm = self._judged(confirm, effort.confirm, "confirm", least)
        self.confirm = confirm or self.search
        longest = max(map(count_tokens, self.confirm), default=0)
        if self.pruning and longest > least:
            # in that batch they would be padded, and experts would see it
            self.pruning = self._pruning_windows(len(self.pruning), longest)

    @property
    def judging(self) -> int:
        """How many different samples the last comparison has."""
        return len(set(map(_content, self.confirm)))

    def next_signal(self) -> list[dict]:
        """Other samples in every round, as far as there are any, and other windows."""
        count = _enough(self._measuring, self._effort.signal, self._effort.tokens)
        start, order = self._rounds * count, interleaved(self._measuring)
        chosen = [order[(start + i) % len(order)] for i in range(count)]
        self._rounds += 1
        windows = self._windows(chosen, f"signal {self._rounds}")
        self._signal = self._signal or windows
        return windows

    def signal_tokens(self, rounds: int) -> int:
        """Different tokens that so many rounds of a signal see, about."""
        most = rounds * self._effort.signal * self._effort.tokens
        return min(most, SampleUse("", self._measuring).tokens)

    def next_pruning(self) -> list[dict]:
        """
        What the pruner's own arithmetic prunes by, other samples every time as far as
        there are any: windows as the judges see, or more and longer ones where these
        have too few tokens.
        """
        wanted = self._effort.confirm or self._effort.signal
        count = _enough(self._measuring, wanted, self._effort.tokens)
        self._prunings += 1
        windows = self._pruning_windows(count, self._effort.tokens)
        longest = max(map(count_tokens, self._measuring))
        length = max(self._effort.tokens, PRUNING_WINDOW)
        while SampleUse("", windows).tokens < self._pruning_tokens:
            count = _enough(self._measuring, self._pruning_tokens / length, length)
            windows = self._pruning_windows(count, length)
            if length >= longest:
                break
            length *= 2
        # those that were picked may be the shorter ones
        while (
            count < len(self._measuring)
            and SampleUse("", windows).tokens < self._pruning_tokens
        ):
            count += 1
            windows = self._pruning_windows(count, length)
        return windows

    def _pruning_windows(self, count: int, length: int) -> list[dict]:
        """Of so many samples, at even distances, of the turn that it is."""
        start = (self._prunings - 1) % len(self._measuring)
        order = self._measuring[start:] + self._measuring[:start]
        chosen = evenly_spaced(order, count)
        return self._windows(chosen, f"pruning {self._prunings}", length)

    def _judged(
        self, samples: list[dict], wanted: int, salt: str, least: int = 0
    ) -> list[dict]:
        """
        Of fewer samples than wanted longer windows, so that tokens are as many.

        :param least: tokens of a window
        """
        each = math.ceil(self._effort.tokens * wanted / max(1, len(samples)))
        return self._windows(samples, salt, max(each, self._effort.tokens, least))

    def in_turn(self) -> list[dict]:
        """All that are not held out, whole, the first few spread over the text."""
        return interleaved(self._measuring)

    def shortest(self) -> dict:
        """One sample, cut, to try the model on."""
        return self._windows(self._measuring[-1:], "check")[0]

    def uses(self) -> list[SampleUse]:
        """For the report; of the signal's samples, those of the first round."""
        held_out = {"search": self.search, "confirm": self.confirm}
        measuring = {
            "statistics": self.statistics,
            "signal": self._signal,
            "pruning": self.pruning,
        }
        uses = measuring | held_out
        return [SampleUse(use, samples) for use, samples in uses.items() if samples]

    def _windows(
        self, samples: Iterable[dict], salt: str, length: int | None = None
    ) -> list[dict]:
        length = length or self._effort.tokens
        return [cut_tokens(sample, length, salt, self._first) for sample in samples]


def _enough(samples: Sequence[dict], wanted: float, length: int) -> int:
    """
    How many samples have as many tokens as the wanted windows of such a length: more
    where samples are shorter, all where even they are too few.
    """
    tokens = sum(min(length, count_tokens(sample)) for sample in samples)
    count = math.ceil(wanted * length * len(samples) / tokens)
    return min(count, len(samples))


def _held_out(samples: Sequence[dict], effort: Effort) -> tuple[list[dict], list[dict]]:
    """Samples of the search and of the confirmation, none in both."""
    count = len(samples)
    if count < 2:
        raise ValueError(
            "strength='auto' holds calibration samples out to judge by, and there is "
            "but one: raise num_calibration_samples, or give strength as a number (0.1 "
            "is a good start)"
        )
    search = _enough(samples, effort.search, effort.tokens)
    confirm = _enough(samples, effort.confirm, effort.tokens)
    if count < APART:
        return evenly_spaced(samples, min(search, count // 2)), []
    # two at least, for a standard error, unless that is half of the samples
    least = min(2, count // 4)
    search = min(search, max(least, count // SEARCH_SHARE))
    if not effort.confirm:
        return evenly_spaced(samples, search), []
    confirm = min(confirm, max(least, count // CONFIRM_SHARE))
    chosen = evenly_spaced(samples, search + confirm)
    # taken in turn: samples are sorted by length, and both shall see all lengths
    by_turn = {
        id(chosen[(2 * i + 1) * len(chosen) // (2 * confirm)]) for i in range(confirm)
    }
    return (
        [sample for sample in chosen if id(sample) not in by_turn],
        [sample for sample in chosen if id(sample) in by_turn],
    )


def _distinct(samples: Sequence[dict]) -> Sequence[dict]:
    """One of each, in their order."""
    distinct = list({_content(sample): sample for sample in samples}.values())
    if len(distinct) < len(samples):
        logger.warning(
            f"{len(samples) - len(distinct)} of {len(samples)} calibration samples are "
            "copies of others, and tell nothing new"
        )
    return distinct


def _content(sample: dict) -> object:
    """The same of copies; of images, which may differ where words do not, of itself."""
    return id(sample) if has_media(sample) else sample_key(sample)


def _same_first_token(samples: Sequence[Batch]) -> bool:
    """Whether all samples begin alike, as they do where a tokenizer adds BOS."""
    firsts = {
        int(sample["input_ids"][0, int(token_mask(sample)[0].int().argmax())])
        for sample in samples
    }
    return len(samples) > 1 and len(firsts) == 1


def check_alike(samples: Sequence[Batch]) -> None:
    """:raises ValueError: unless all ranks hold the same samples"""
    mine = [sample_key(sample) for sample in samples]
    if any(other != mine for other in distributed.gather(mine)):
        raise ValueError(
            "the ranks of torch.distributed were given different calibration samples: "
            "pass what absorb_plugin.calibration.read_batches(loader) returns, which "
            "collects those of all ranks"
        )
