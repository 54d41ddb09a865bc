"""
Let a model write its own calibration and evaluation text, for models trained on text
that is not at hand (the TinyStories models, for example).

    python integration/benchmarks/sample_text.py MODEL --out CALIBRATION.jsonl \
        --seed 0 [--documents 96] [--tokens 256]
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    start = torch.full((options.documents, 1), model.config.bos_token_id)
    written = model.generate(
        start, do_sample=True, max_length=options.tokens, pad_token_id=start[0, 0]
    )
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    options.out.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


if __name__ == "__main__":
    main()
