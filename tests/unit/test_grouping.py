import pytest

from bitgrain.grouping import merged_name, pattern_of, ranges


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("model.layers.12.mlp.down_proj", "model.layers.*.mlp.down_proj"),
        ("model.layers.0.mlp.experts.7.w2", "model.layers.*.mlp.experts.*.w2"),
        ("h.3", "h.*"),
        ("lm_head", "lm_head"),
        ("block2.fc1", "block2.fc1"),
    ],
)
def test_indices_become_stars_and_digits_in_words_stay(name, pattern):
    assert pattern_of(name) == pattern


@pytest.mark.parametrize(("numbers", "text"), [([7, 0, 1, 2, 3, 1], "0-3,7"), ([5], "5"), ([2, 4, 6], "2,4,6"), ([], ""), ([9, 10], "9-10")])
def test_ranges_join_neighbours(numbers, text):
    assert ranges(numbers) == text


def test_merged_name_shows_the_range_of_each_index():
    names = [f"layers.{i}.experts.{e}.w1" for i in (0, 1, 3) for e in range(4)]
    assert merged_name(names) == "layers.0-1,3.experts.0-3.w1"
    assert merged_name(["layers.5.mlp"]) == "layers.5.mlp"
