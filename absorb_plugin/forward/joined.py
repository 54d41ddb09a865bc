"""
Weights of which each rank of torch.distributed makes or onloads its rows
(`distributed.row_share`), and which the ranks put together for a block at a time.
"""

from collections.abc import Mapping

import torch
from torch.nn import Linear

from absorb_plugin import distributed
from absorb_plugin.forward.linears import Weights, all_given
from absorb_plugin.forward.resident import own_rows

__all__ = ["joined_own", "joined_rows"]


def joined_rows(
    linears: Mapping[str, Linear], own: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """
    A block's weights; within `distributed.fail_together`.

    :param linears: name -> Linear
    :param own: name -> this rank's rows, the same names on all ranks
    """
    if not own:
        return {}
    rows = [linears[name].out_features for name in own]
    return dict(zip(own, distributed.join_rows([*own.values()], rows), strict=True))


def joined_own(linears: Mapping[str, Linear]) -> Weights:
    """Their own weights, without that any rank onloads all of them."""
    own = {name: own_rows(linear) for name, linear in linears.items()}
    return all_given(joined_rows(linears, own))
