"""
Llama 3 8B at 60 % unstructured sparsity, then in FP8, in one recipe.

    python integration/examples/llama3_8b_fp8.py

Every pruned weight stays exactly zero. The checkpoint takes half the space of bfloat16
because of FP8; the zeros save neither space nor time.
"""

from compressed_tensors.offload import dispatch_model
from datasets import load_dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

from absorb_plugin import AbsorptionAllocationModifier

MODEL_ID = "meta-llama/Meta-Llama-3-8B"
DATASET_ID = "mit-han-lab/pile-val-backup"
DATASET_SPLIT = "validation"
NUM_CALIBRATION_SAMPLES = 256
MAX_SEQUENCE_LENGTH = 2048
SAVE_DIR = "Meta-Llama-3-8B-sparse60-FP8"

model = AutoModelForCausalLM.from_pretrained(MODEL_ID, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(MODEL_ID)

ds = load_dataset(DATASET_ID, split=f"{DATASET_SPLIT}[:{NUM_CALIBRATION_SAMPLES}]")

# The allocation stands before the pruner, whose `sparsity` is the budget to share out.
recipe = [
    AbsorptionAllocationModifier(allocator="owl", report_dir=f"{SAVE_DIR}-report"),
    SparseGPTModifier(sparsity=0.6, targets=["Linear"], ignore=["re:.*lm_head"]),
    # Behind the pruner, and not GPTQModifier: that makes pruned weights nonzero again.
    QuantizationModifier(scheme="FP8_DYNAMIC", targets=["Linear"], ignore=["lm_head"]),
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

model.save_pretrained(SAVE_DIR, save_compressed=True)
tokenizer.save_pretrained(SAVE_DIR)
