"""Names in a quantizer's configuration, in the spelling that the tensors have."""

from bitgrain.formats.spellings import missing_spelling, respelled

FILES = ["language_model.model.layers.0.mlp.up_proj.weight", "language_model.lm_head.weight", "vision_tower.x.weight"]
MEMORY = ["model.language_model.layers.0.mlp.up_proj.weight", "lm_head.weight"]


def test_spelling_that_no_tensor_has_is_the_missing_one():
    assert missing_spelling(FILES) == ("model.language_model", "language_model.model")
    assert missing_spelling(MEMORY) == ("language_model.model", "model.language_model")
    assert missing_spelling(["model.layers.0.mlp.up_proj.weight"]) is None
    assert missing_spelling(FILES + MEMORY) is None


def test_names_change_as_values_as_keys_and_inside_patterns():
    section = {
        "ignore": ["lm_head", "model.language_model.layers.1", r"re:^model\.language_model\.layers\.2.*", "model.vision_tower"],
        "overrides": {"model.language_model.layers.3.mlp": {"bits": 8, "sym": True, "of": None}},
    }
    before = repr(section)
    assert respelled(section, FILES) == {
        "ignore": ["lm_head", "language_model.model.layers.1", r"re:^language_model\.model\.layers\.2.*", "model.vision_tower"],
        "overrides": {"language_model.model.layers.3.mlp": {"bits": 8, "sym": True, "of": None}},
    }
    assert repr(section) == before
    assert respelled(section, MEMORY) == section
    assert respelled(None, FILES) is None
