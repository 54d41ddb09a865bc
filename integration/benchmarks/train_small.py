"""
Train a small byte-level model in minutes, for the benchmarks: a second architecture
with trained weights where no hub can be reached.

    python integration/benchmarks/train_small.py --text TEXT --out DIRECTORY \
        [--architecture gpt_neox|qwen3] [--minutes 6] [--seed 0]

It is a weak model (a few million tokens of training), which its perplexity per byte
shows; its use is that its blocks differ as those of a trained model do.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from absorb_plugin.evaluation.documents import read_text

BLOCKS, WIDTH, TOKENS, BATCH = 8, 128, 128, 16


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    vocabulary["<|endoftext|>"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", model_max_length=512
    )


def make_model(architecture: str, vocabulary: int) -> PreTrainedModel:
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": vocabulary - 1,
        "eos_token_id": vocabulary - 1,
    }
    if architecture == "gpt_neox":
        config = GPTNeoXConfig(**shape, intermediate_size=4 * WIDTH)
        return GPTNeoXForCausalLM(config)
    config = Qwen3Config(
        **shape, intermediate_size=3 * WIDTH, num_key_value_heads=2, head_dim=32
    )
    return Qwen3ForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--architecture", default="gpt_neox", choices=["gpt_neox", "qwen3"]
    )
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = make_tokenizer()
    ids = torch.tensor(tokenizer("\n\n".join(read_text(options.text))).input_ids)
    model = make_model(options.architecture, len(tokenizer)).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1
    )
    begin, step, mean = time.monotonic(), 0, math.log(len(tokenizer))
    while (done := (time.monotonic() - begin) / (60 * options.minutes)) < 1:
        # short warm-up, then linearly to zero; the clock decides, not a step count
        rate = 2e-3 * min(1.0, (step + 1) / 50) * (1 - done)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(ids) - TOKENS, (BATCH,))
        batch = torch.stack([ids[start : start + TOKENS] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean += 0.02 * (loss.item() - mean)
        step += 1
        if step % 100 == 0:
            print(f"step {step}, {done:.0%}, loss {mean:.3f} nats per byte", flush=True)
    model.eval().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"{step * BATCH * TOKENS} tokens, loss {mean:.3f}, saved to {options.out}")


if __name__ == "__main__":
    main()
