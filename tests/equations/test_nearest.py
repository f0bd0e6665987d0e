"""Exact nearest neighbors against a sort of all cosines in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_ssl.evals import nearest
from dino_ssl.evals.nearest import top_k
from dino_ssl.search.items import Shards
from dino_ssl.search.nearest import neighbors


def oracle(queries: torch.Tensor, rows: torch.Tensor, k: int) -> torch.Tensor:
    """Rows by descending cosine, equal ones by number."""
    cosines = (F.normalize(queries.double(), dim=1) @ F.normalize(rows.double(), dim=1).T).round(decimals=12)
    return cosines.argsort(dim=1, descending=True, stable=True)[:, :k]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_it_is_a_stable_sort_of_all_cosines(data: st.DataObject) -> None:
    """Few different rows of 0, 1 and -1: most cosines are equal, and float32 computes them exactly enough to tie."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    distinct = np.eye(4)[rng.integers(0, 4, 3)] * rng.choice([-1, 1], (3, 1))
    rows = torch.from_numpy(distinct).float()[rng.integers(0, 3, data.draw(st.integers(1, 150)))]
    queries, k = torch.from_numpy(np.eye(4, dtype=np.float32)[rng.integers(0, 4, 3)]), data.draw(st.integers(1, 12))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "GROUP_COLUMNS", data.draw(st.integers(1, 4)))
        cosines, found = top_k(queries, rows, k, block_rows=data.draw(st.integers(1, 151)))
    assert torch.equal(found, oracle(queries, rows, k))
    assert torch.equal(cosines, (queries @ rows.T).gather(1, found))


@pytest.mark.parametrize("block_rows", [5, 64, 1000])
def test_float16_unit_rows_in_shards_are_searched_as_one_array(block_rows: int, monkeypatch) -> None:
    monkeypatch.setattr(nearest, "CACHE_ROWS", 7)
    monkeypatch.setattr(nearest, "GROUP_COLUMNS", 7)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 8)).astype(np.float32)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    queries = torch.from_numpy(rng.normal(size=(20, 8)))
    shards = Shards([rows[:120], rows[120:121], rows[121:]])
    cosines, found = top_k(queries, shards, 9, unit=True, block_rows=block_rows)
    expected = F.normalize(queries, dim=1) @ torch.from_numpy(rows).double().T
    assert torch.equal(found, expected.topk(9).indices)
    torch.testing.assert_close(cosines.double(), expected.topk(9).values, rtol=0, atol=1e-6)


def test_excluded_rows_come_last_with_the_cosine_minus_infinity() -> None:
    rows = torch.eye(4)
    cosines, found = top_k(torch.ones(1, 4), rows, 3, where=np.array([False, True, False, True]), block_rows=3)
    assert found[0, :2].tolist() == [1, 3]
    assert cosines[0, 2] == -torch.inf


def test_neighbors_are_the_nearest_other_rows(monkeypatch) -> None:
    monkeypatch.setattr("dino_ssl.search.nearest.QUERY_ROWS", 8)
    rows = np.random.default_rng(1).normal(size=(21, 5)).astype(np.float32)
    rows[3:9] = rows[3]  # six copies, more than k
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines, found = neighbors(rows, 4)
    exact = rows @ rows.T
    np.fill_diagonal(exact, -2)
    np.testing.assert_allclose(cosines, -np.sort(-exact, axis=1)[:, :4], atol=1e-6)
    assert not (found == torch.arange(21)[:, None]).any()
    assert neighbors(rows[:1], 4)[0].shape == (1, 0)


def test_shards_are_indexed_as_one_array() -> None:
    whole = np.random.default_rng(2).normal(size=(20, 3)).astype(np.float16)
    shards = Shards([whole[:6], whole[6:7], whole[7:]])
    mask = whole[:, 0] > 0
    for rows in (slice(None), slice(2, 6), slice(5, 9), slice(-3, None), slice(1, 19, 4), [3, 19, 3, -1], mask, 7):
        np.testing.assert_array_equal(shards[rows], whole[rows])
    assert (shards.shape, len(shards), shards.dtype) == (whole.shape, 20, whole.dtype)
    np.testing.assert_array_equal(np.asarray(shards), whole)
