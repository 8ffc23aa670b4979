"""Bin packing: every item in one bin, and few enough bins."""

import hypothesis
from hypothesis import strategies as st

from megatron_dagger.training.data.bin_packing import best_fit_decreasing, pack_bins, subset_sum_fit


@hypothesis.given(st.lists(st.integers(1, 50), max_size=60))
def test_best_fit_puts_everything_in_few_enough_bins(lengths):
    bins = best_fit_decreasing(lengths, 50)
    assert sorted(i for items in bins for i in items) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in items) for items in bins]
    assert all(load <= 50 for load in loads)
    assert len(bins) <= 11 / 9 * max(1, -(-sum(lengths) // 50)) * 2 + 1
    if len(bins) > 1:
        assert sorted(loads)[0] + sorted(loads)[1] > 50  # else the two would be one bin


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.lists(st.integers(1, 50), max_size=60), st.integers(0, 50))
def test_subset_sum_fit_packs_everything_and_the_better_packing_is_returned(lengths, slack):
    bins = subset_sum_fit(lengths, 50, slack)
    assert sorted(i for items in bins for i in items) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in items) <= 50 for items in bins)
    assert len(pack_bins(lengths, 50)) <= len(best_fit_decreasing(lengths, 50))


def test_a_bin_is_filled_by_several_items_if_the_longest_fitting_item_would_waste_space():
    lengths = [29, 44, 31, 17, 43, 25]
    assert best_fit_decreasing(lengths, 100) == [(1, 4), (2, 0, 5), (3,)]
    assert pack_bins(lengths, 100) == [(1, 2, 5), (4, 0, 3)]
