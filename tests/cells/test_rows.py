import pickle

import numpy as np
import pytest

from tftrain.cells.rows import RowSet


@pytest.mark.parametrize("ids", [[], [0], [5], [4095, 4096, 12288], range(10_000), range(3, 90_000, 7), [10**7]])
def test_slices_of_a_set_are_slices_of_its_sorted_ids(ids):
    ids = np.array(list(ids), np.int64)
    rows = pickle.loads(pickle.dumps(RowSet.of(np.random.default_rng(0).permutation(ids))))
    assert len(rows) == len(ids)
    np.testing.assert_array_equal(rows.all(), ids)
    rng = np.random.default_rng(1)
    for first, stop in np.sort(rng.integers(0, len(ids) + 1, (50, 2)), axis=1):
        np.testing.assert_array_equal(rows.slice(first, stop - first), ids[first:stop])


def test_a_repeated_row_is_refused():
    with pytest.raises(AssertionError, match="unique"):
        RowSet.of(np.array([3, 3]))


def test_a_row_takes_about_a_bit():
    assert len(pickle.dumps(RowSet.of(np.arange(1_000_000)))) < 140_000
