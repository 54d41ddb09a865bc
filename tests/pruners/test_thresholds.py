"""Thresholds of masks against sorted copies of the scores."""

from collections.abc import Iterator

import pytest
import torch

from absorb_plugin.forward import chunks
from absorb_plugin.forward.chunks import row_chunks
from absorb_plugin.pruners import thresholds
from absorb_plugin.pruners.thresholds import (
    global_threshold,
    row_quantiles,
    row_thresholds,
    thresholds_between,
)


def scores(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator)


@pytest.fixture(params=[1, 3, 2**20])
def rows_at_a_time(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * 11 * request.param)
    yield


@pytest.mark.parametrize("counts", [[4], [11], [1, 6, 11], [6, 2, 6], [0, 5], [0], []])
@pytest.mark.usefixtures("rows_at_a_time")
def test_rows(counts: list[int]) -> None:
    given = scores(7, 11)
    ranked = torch.cat([torch.full((7, 1), -torch.inf), given.sort(dim=1).values], 1)
    assert torch.equal(row_thresholds(given, counts), ranked[:, counts])


def test_scores_are_left_as_they_are() -> None:
    given = scores(5, 9)
    before = given.clone()
    row_thresholds(given, [3])
    row_thresholds(given, [3, 5])
    global_threshold(given, 7)
    assert torch.equal(given, before)


def test_rows_that_are_not_contiguous() -> None:
    given = scores(11, 7).t()
    expected = given.contiguous().sort(dim=1).values[:, [2, 8]]
    assert torch.equal(row_thresholds(given, [3, 9]), expected)


def test_equal_scores() -> None:
    given = torch.zeros(2, 6)
    assert torch.equal(
        row_thresholds(given, [0, 3]), torch.tensor([[-torch.inf, 0]] * 2)
    )


@pytest.mark.parametrize("count", [-1, 12])
def test_count_out_of_range(count: int) -> None:
    with pytest.raises(ValueError, match=rf"\[{count}\] are not in 0 … 11"):
        row_thresholds(scores(2, 11), [1, count])


@pytest.mark.parametrize("rank", [0, 17, 34])
@pytest.mark.parametrize("shape", [(35,), (5, 7), (7, 5, 1)])
def test_whole_tensor(rank: int, shape: tuple[int, ...]) -> None:
    given = scores(5, 7).view(shape)
    expected = given.flatten().sort().values[rank]
    assert torch.equal(global_threshold(given, rank), expected)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.9999])
@pytest.mark.parametrize("kind", ["normal", "equal", "few", "infinite", "nan"])
def test_where_to_look_in_a_large_tensor(kind: str, share: float) -> None:
    """A sample tells; what is picked has the score of the rank at its place."""
    size = thresholds.SAMPLED_FROM
    given = torch.randn(size, generator=torch.Generator().manual_seed(0)).square()
    if kind == "equal":
        given[: size // 2] = 0.5
    elif kind == "few":
        given = (4 * given).floor()
    elif kind == "infinite":
        given[::7] = torch.inf
    elif kind == "nan":
        given[::1001] = torch.nan
    rank = int(share * (size - 1))
    picked, place = thresholds._near(given, rank)
    expected = given.sort().values[rank]
    if expected.isnan() or place >= len(picked):
        assert kind == "nan"
    else:
        assert torch.equal(picked.sort().values[place], expected)
        assert len(picked) < size / 16 or kind != "normal"


@pytest.mark.parametrize("rank", [-1, 35])
def test_rank_out_of_range(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} is not in 0 … 34"):
        global_threshold(scores(5, 7), rank)


def test_chunks_cover_all_rows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 100)
    rows = [list(range(7))[chunk] for chunk in row_chunks(scores(7, 10))]
    assert rows == [[0, 1], [2, 3], [4, 5], [6]]


def test_a_row_longer_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 8)
    assert len(list(row_chunks(scores(3, 10)))) == 3


@pytest.mark.parametrize("columns", [7, 64, 100, 1000])
@pytest.mark.usefixtures("rows_at_a_time")
def test_between_quantiles_the_same_is_found(columns: int) -> None:
    given = scores(5, columns)
    known = row_quantiles(given)
    counts = [0, 1, columns // 3, columns // 2, columns - 1, columns]
    found = thresholds_between(given, known, counts)
    assert torch.equal(found, row_thresholds(given, counts))


def test_equal_scores_on_both_sides_of_a_quantile() -> None:
    given = scores(6, 500).mul(40).round()  # a few values, again and again
    counts = list(range(0, 501, 7))
    found = thresholds_between(given, row_quantiles(given), counts)
    assert torch.equal(found, row_thresholds(given, counts))


def test_as_many_equal_scores_beyond_both_quantiles() -> None:
    """Their number is right, and they are others."""
    values = [0, 1, 1, 2, 2, 5, *range(6, 128)]
    given = torch.tensor([values], dtype=torch.float32)
    found = thresholds_between(given, row_quantiles(given), [3])
    assert found.item() == row_thresholds(given, [3]).item() == 1


def test_rows_are_not_ranked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    given, seen = scores(4, 6400), []
    known, smallest = row_quantiles(given), thresholds._smallest

    def note(these: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        seen.append(these.shape[1])
        return smallest(these, counts)

    monkeypatch.setattr(thresholds, "_smallest", note)
    thresholds_between(given, known, [1234, 3210])
    assert seen == [100, 100]
