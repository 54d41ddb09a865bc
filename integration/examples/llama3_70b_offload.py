"""
Llama 3 70B at 60 % unstructured sparsity, on one GPU, offloaded.

    python integration/examples/llama3_70b_offload.py

Of the 140 GB of weights as much as fits stays in main memory and the rest on disk.
Every step, ours included, brings one decoder block at a time to the GPU.
"""

from compressed_tensors.offload import dispatch_model, load_offloaded_model
from datasets import load_dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

from absorb_plugin import AbsorptionAllocationModifier

MODEL_ID = "meta-llama/Meta-Llama-3-70B"
DATASET_ID = "mit-han-lab/pile-val-backup"
DATASET_SPLIT = "validation"
NUM_CALIBRATION_SAMPLES = 256
MAX_SEQUENCE_LENGTH = 2048
SAVE_DIR = "Meta-Llama-3-70B-sparse60"

with load_offloaded_model():
    model = AutoModelForCausalLM.from_pretrained(
        MODEL_ID, dtype="auto", device_map="auto_offload"
    )
tokenizer = AutoTokenizer.from_pretrained(MODEL_ID)

ds = load_dataset(DATASET_ID, split=f"{DATASET_SPLIT}[:{NUM_CALIBRATION_SAMPLES}]")

# The allocation stands before the pruner, whose `sparsity` is the budget to share out.
recipe = [
    AbsorptionAllocationModifier(allocator="owl", report_dir=f"{SAVE_DIR}-report"),
    SparseGPTModifier(
        sparsity=0.6,
        targets=["Linear"],
        ignore=["re:.*lm_head"],
        offload_hessians=True,  # that of one down_proj takes 3.3 GB
    ),
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
print(tokenizer.decode(output[0]))

model.save_pretrained(SAVE_DIR)
tokenizer.save_pretrained(SAVE_DIR)
