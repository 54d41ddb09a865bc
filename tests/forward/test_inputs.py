"""Statistics of the Linears' inputs, against hooks on whole forwards."""

import pytest
import torch
from helpers import naive, tiny
from helpers.probes import first_linears, run
from transformers import PreTrainedModel

from absorb_plugin.blocks import find_blocks
from absorb_plugin.forward.inputs import InputStatistics, square_sum, unseen_linears
from absorb_plugin.forward.memory import footprint
from absorb_plugin.forward.run import run_probes


def test_statistics_equal_hooks(any_model: PreTrainedModel) -> None:
    blocks, batch = find_blocks(any_model), tiny.make_batch(padding="right")
    expected = naive.square_sums(any_model, blocks, batch)
    probe = InputStatistics(blocks)
    run(any_model, [batch], probe)
    found = probe.result()
    assert found.keys() == expected.keys() == blocks.linears().keys()
    for name, total in expected.items():
        torch.testing.assert_close(found[name], total, rtol=1e-5, atol=1e-6)


def test_batch_size_changes_nothing(llama: PreTrainedModel) -> None:
    blocks, batch = find_blocks(llama), tiny.make_batch(padding="left")
    whole, single = InputStatistics(blocks), InputStatistics(blocks)
    run(llama, [batch], whole)
    run(llama, [{k: v[i : i + 1] for k, v in batch.items()} for i in (2, 0, 1)], single)
    for name, total in whole.result().items():
        torch.testing.assert_close(single.result()[name], total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "opt", "mpt", "mixtral"])
def test_in_parts_one_visit_for_many_samples(architecture: str) -> None:
    """What memory allows is the number of samples at a time, not that of a batch."""
    # of what an expert gets nothing tells the padding
    padding = None if architecture == "mixtral" else "right"
    model, batch = tiny.make_model(architecture), tiny.make_batch(5, padding=padding)
    blocks = find_blocks(model)
    whole, parts = InputStatistics(blocks), InputStatistics(blocks)
    run(model, [batch], whole)
    need = footprint(model, blocks.modules, [parts.needs], memory=1)
    # what is not chunks of logits has 11 of 16 parts
    states = need.fixed + 5 * need.per_state * 12
    limit = (states + need.inside(12)) * 16 // 11 + 32
    sizes, visits = [], []
    block = blocks.modules[0]
    hooks = [
        block.register_forward_pre_hook(lambda *_: visits.append(1)),
        first_linears(blocks)[blocks.blocks[0].name].register_forward_pre_hook(
            lambda _, args: sizes.append(len(args[0]))
        ),
    ]
    run_probes(model, blocks, [batch], [parts], memory=limit, in_parts=True)
    for hook in hooks:
        hook.remove()
    assert len(visits) == 1 and len(sizes) > 1 and max(sizes) < 5
    for name, total in whole.result().items():
        torch.testing.assert_close(parts.result()[name], total, rtol=1e-4, atol=1e-6)
    # where not even the states fit, batches are cut as well
    again = InputStatistics(blocks)
    run_probes(model, blocks, [batch], [again], memory=1, in_parts=True)
    assert len(visits) == 1
    for name, total in whole.result().items():
        torch.testing.assert_close(again.result()[name], total, rtol=1e-4, atol=1e-6)


def test_a_small_batch_does_not_cut_the_others(llama: PreTrainedModel) -> None:
    blocks, probe, sizes = find_blocks(llama), InputStatistics(find_blocks(llama)), []
    linear = first_linears(blocks)[blocks.blocks[0].name]
    hook = linear.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    batches = [tiny.make_batch(5), tiny.make_batch(1)]
    run_probes(llama, blocks, batches, [probe], memory=2**30, in_parts=True)
    hook.remove()
    assert sizes == [5, 1]


def test_experts_without_tokens_have_none() -> None:
    model = tiny.make_model("qwen3_moe")
    blocks, probe = find_blocks(model), InputStatistics(find_blocks(model))
    run(model, [tiny.make_batch(samples=1, tokens=1)], probe)
    unseen = unseen_linears(blocks, probe.result())
    assert unseen and all(".experts." in name for name in unseen)
    assert not probe.result().keys() & set(unseen)


def test_square_sum_of_many_rows() -> None:
    inputs = torch.randn(2500, 7, dtype=torch.float64)
    counted = torch.rand(2500) < 0.5
    exact = {"rtol": 1e-5, "atol": 0}
    whole = inputs.square().sum(0)
    torch.testing.assert_close(square_sum(inputs).double(), whole, **exact)
    torch.testing.assert_close(
        square_sum(inputs, counted).double(), inputs[counted].square().sum(0), **exact
    )
