"""The cross-entropy, in chunks of whatever size."""

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.probes import place, run
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from absorb_plugin.forward import head
from absorb_plugin.forward.loss import check_predicted
from absorb_plugin.judges import MaskedLoss
from absorb_plugin.pruners import Wanda


def test_cross_entropy_in_chunks(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, totals = tiny.make_batch(padding="right"), []
    where = place(llama, batch)
    for chunk in (head.CHUNK_BYTES, 4 * tiny.VOCABULARY * 3 * 4, 1):
        monkeypatch.setattr(head, "CHUNK_BYTES", chunk)
        dense = [where.flat(0.0)]
        judge = MaskedLoss(where.blocks, where.masks(Wanda()), dense)
        run(llama, [batch], judge)
        totals.append(judge.result()[0][0])
    with torch.no_grad():
        logits = llama(**batch).logits
    for sample, used in enumerate((12, 10, 8)):
        ids = batch["input_ids"][sample, 1:used]
        expected = cross_entropy(logits[sample, : used - 1], ids, reduction="sum")
        np.testing.assert_allclose(
            [total[sample] for total in totals], expected.item(), rtol=1e-5
        )


def test_no_token_to_predict_is_said() -> None:
    assert check_predicted(3) == 3
    with pytest.raises(ValueError, match="no token to predict"):
        check_predicted(0)
