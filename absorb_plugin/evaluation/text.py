"""Text in, windows of tokens out: for calibration and for perplexity."""

import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from datasets import Dataset
from loguru import logger

from absorb_plugin.evaluation.documents import SEPARATOR, Document, count_characters

__all__ = ["calibration_samples", "evaluation_windows", "prefix_ids", "token_windows"]

Tokenizer = Any  # PreTrainedTokenizerBase, whose import would cost seconds

# Tokenised in one call: some hundred bytes for each of these characters at a time.
BATCH_CHARACTERS = 1_000_000
# Of a longer text the calibration windows are drawn from its beginning. It is about 5
# million tokens, twenty times what most calibrations take.
CALIBRATION_CHARACTERS = 20_000_000


def prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """
    The special tokens that `tokenizer(text)` puts before a text: BOS for Llama, Gemma
    and OPT, nothing for SmolLM2, Qwen and GPT-NeoX. A model that was trained with BOS
    is not itself without it (its attention sink sits there).
    """
    word, plain = "a", tokenizer("a", add_special_tokens=False)["input_ids"]
    if not plain:  # of a letter that it does not know nothing may be left
        for word in tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens}:
            if plain := tokenizer(word, add_special_tokens=False)["input_ids"]:
                break
    special = tokenizer(word)["input_ids"]
    for start in range(len(special) - len(plain) + 1):
        if special[start : start + len(plain)] == plain:
            return list(special[:start])
    raise ValueError(
        f"{type(tokenizer).__name__} tokenises a text differently with special tokens "
        "than without: cannot tell which tokens belong before a window"
    )


def token_windows(
    documents: Iterable[Document], tokenizer: Tokenizer, length: int
) -> Iterator[list[int]]:
    """
    Tokenise the documents, put them one after the other, and cut without overlap. What
    is left at the end is dropped.

    :param documents: texts or chats; a blank line is put between two of them
    :param length: tokens per window, the prefix of `prefix_ids` included
    :return: windows of exactly `length` tokens, in the order of the text
    :raises ValueError: if `length` leaves no room for text, or a chat cannot be
        rendered
    """
    prefix = prefix_ids(tokenizer)
    step = length - len(prefix)
    if step < 1 or length < 2:
        raise ValueError(f"a window of {length} tokens is too short to hold text")
    rest: list[int] = []
    for texts in _batches(_separated(_rendered(documents, tokenizer, prefix))):
        # verbose=False: that a text is longer than the model's context is the point
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = rest + [token for text in encoded for token in text]
        end = len(tokens) - len(tokens) % step
        for start in range(0, end, step):
            yield prefix + tokens[start : start + step]
        rest = tokens[end:]


def calibration_samples(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    samples: int,
    length: int,
    seed: int = 0,
) -> Dataset:
    """
    Windows from all over the text (its first `CALIBRATION_CHARACTERS`), chosen by
    `seed` alone.

    :param samples: number of windows, N
    :param length: tokens per window, T
    :return: N rows of `input_ids` and `attention_mask`, T tokens each, in text order
    :raises ValueError: if the text has fewer than N windows
    """
    # four bytes a token, where a list of lists takes forty
    tokens = array("i")
    for window in token_windows(_beginning(documents), tokenizer, length):
        tokens.extend(window)
    count = len(tokens) // length
    _check_enough(count, samples, length)
    chosen = sorted(random.Random(seed).sample(range(count), samples))
    windows = [tokens[i * length : (i + 1) * length].tolist() for i in chosen]
    return Dataset.from_dict(
        {"input_ids": windows, "attention_mask": [[1] * length for _ in chosen]}
    )


def evaluation_windows(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    length: int,
    count: int | None = None,
) -> Sequence[Sequence[int]]:
    """
    The first `count` windows of the text, or all of them.

    :raises ValueError: if the text has fewer than `count` windows, or not a single one
    """
    windows = token_windows(documents, tokenizer, length)
    found = [array("i", window) for window in islice(windows, count)]
    _check_enough(len(found), 1 if count is None else count, length)
    return found


def _check_enough(found: int, wanted: int, tokens: int) -> None:
    if wanted < 1:
        raise ValueError(f"at least one window is needed, not {wanted}")
    if found < wanted:
        raise ValueError(
            f"the text is too short: {wanted} windows of {tokens} tokens need "
            f"{wanted * tokens} tokens, and it fills only {found} such windows "
            f"({found * tokens} tokens). Give more text, fewer windows or a smaller "
            "seq_len."
        )


def _beginning(documents: Iterable[Document]) -> Iterator[Document]:
    characters = 0
    for count, document in enumerate(documents):
        if characters >= CALIBRATION_CHARACTERS:
            logger.info(
                f"Calibration windows are drawn from the first {count} documents, "
                f"{characters / 1e6:.0f} million characters"
            )
            return
        yield document
        characters += count_characters(document)


def _rendered(
    documents: Iterable[Document], tokenizer: Tokenizer, prefix: list[int]
) -> Iterator[str]:
    """Chats through the tokenizer's template."""
    for number, document in enumerate(documents, start=1):
        if isinstance(document, str):
            yield document
        else:
            yield _render_chat(document, tokenizer, prefix, number)


def _render_chat(
    turns: list[dict[str, Any]], tokenizer: Tokenizer, prefix: list[int], number: int
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the text holds chats, and the model's tokenizer has no chat template: "
            "give an instruction-tuned model, or write the chats out as text"
        )
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # templates raise what they like
        raise ValueError(
            f"chat {number} does not fit the model's chat template: {error}"
        ) from error
    # every window gets it anyway
    return text.removeprefix(tokenizer.decode(prefix)) if prefix else text


def _separated(texts: Iterable[str]) -> Iterator[str]:
    """With a blank line after each but the last."""
    before: str | None = None
    for text in texts:
        if before is not None:
            yield before + SEPARATOR
        before = text
    if before is not None:
        yield before


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
