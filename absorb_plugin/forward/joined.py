"""
Weights of which each rank of torch.distributed makes or onloads its rows
(`distributed.row_share`), and which the ranks put together for a block at a time.
"""

import time
from collections.abc import Callable, Mapping

import torch
from loguru import logger
from torch.nn import Linear

from absorb_plugin import distributed
from absorb_plugin.forward.linears import Weights, all_given
from absorb_plugin.forward.resident import own_rows

__all__ = ["joined_before_made", "joined_own", "joined_rows"]

# Rows and columns of matrices that are joined and masked, to compare, and how many a
# block has, before which the ranks wait for each other.
TRIED, MATRICES = 8192, 4
# Times that each is timed.
TIMES = 3


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


def joined_before_made(device: torch.device, dtype: torch.dtype) -> bool:
    """
    By the clock: whether the others' rows of matrices come sooner than these are masked
    here, as they do over NVLink, and over PCIe do not. The same on all ranks; within
    `distributed.fail_together`.

    :param device: an accelerator; on a CPU nothing is timed, and it is so
    """
    if device.type == "cpu":
        return True
    try:
        whole = torch.ones(TRIED, TRIED, dtype=dtype, device=device)
        own = [whole[distributed.row_share(TRIED)]] * MATRICES

        def mask() -> None:
            for _ in range(MATRICES):
                torch.mul(whole, whole.abs().float() > 2.0)

        def join() -> None:
            distributed.join_rows(own, [TRIED] * MATRICES)

        took = min(_seconds(mask, device) for _ in range(TIMES))
        joined = min(_seconds(join, device) for _ in range(TIMES))
        ahead = distributed.meet(took - joined)
    except torch.OutOfMemoryError as error:
        logger.info(f"{device} has no room to try how soon rows come from other ranks")
        distributed.tell_out_of_memory(str(error))
        return False
    except distributed.OtherRankFailed as error:
        if not error.again:
            raise
        return False
    return min(ahead) >= 0  # on the rank that it serves least


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    torch.accelerator.synchronize(device)
    start = time.perf_counter()
    run()
    torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def joined_own(linears: Mapping[str, Linear]) -> Weights:
    """Their own weights, without that any rank onloads all of them."""
    own = {name: own_rows(linear) for name, linear in linears.items()}
    return all_given(joined_rows(linears, own))
