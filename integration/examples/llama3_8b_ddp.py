"""
Llama 3 8B at 60 % unstructured sparsity, calibrated on several GPUs.

    torchrun --nproc-per-node 4 integration/examples/llama3_8b_ddp.py

Each process reads its share of the calibration samples; the weights are in main memory
once, for all processes. What is measured is reduced over them, so the result is that of
one process with all samples, up to the order of sums.
"""

import torch
from compressed_tensors.distributed import init_dist, is_source_process
from compressed_tensors.offload import dispatch_model, load_offloaded_model
from datasets import load_dataset
from llmcompressor import oneshot
from llmcompressor.datasets.utils import get_rank_partition
from llmcompressor.modifiers.pruning import SparseGPTModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

from absorb_plugin import AbsorptionAllocationModifier

MODEL_ID = "meta-llama/Meta-Llama-3-8B"
DATASET_ID = "mit-han-lab/pile-val-backup"
DATASET_SPLIT = "validation"
NUM_CALIBRATION_SAMPLES = 256
MAX_SEQUENCE_LENGTH = 2048
SAVE_DIR = "Meta-Llama-3-8B-sparse60-ddp"

init_dist()
with load_offloaded_model():
    model = AutoModelForCausalLM.from_pretrained(
        MODEL_ID, dtype="auto", device_map="auto_offload"
    )
tokenizer = AutoTokenizer.from_pretrained(MODEL_ID)

ds = load_dataset(
    DATASET_ID, split=get_rank_partition(DATASET_SPLIT, NUM_CALIBRATION_SAMPLES)
)

# The allocation stands before the pruner, whose `sparsity` is the budget to share out.
recipe = [
    AbsorptionAllocationModifier(allocator="owl", report_dir=f"{SAVE_DIR}-report"),
    SparseGPTModifier(sparsity=0.6, targets=["Linear"], ignore=["re:.*lm_head"]),
]

oneshot(
    model=model,
    tokenizer=tokenizer,
    dataset=ds,
    recipe=recipe,
    num_calibration_samples=NUM_CALIBRATION_SAMPLES,
    max_seq_length=MAX_SEQUENCE_LENGTH,
)

# Does it still write sentences?
dispatch_model(model)
sample = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
output = model.generate(
    input_ids=sample["input_ids"],
    attention_mask=sample["attention_mask"],
    max_new_tokens=32,
)
if is_source_process():
    print(tokenizer.decode(output[0]))

model.save_pretrained(SAVE_DIR)  # the first process alone writes
if is_source_process():
    tokenizer.save_pretrained(SAVE_DIR)

torch.distributed.destroy_process_group()
