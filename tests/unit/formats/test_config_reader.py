"""One section of a configuration: each key by its type, all problems at once, and no key passed over."""

import pytest

from bitgrain.errors import BitgrainError, ConfigError, ConflictingConfigError, ManyProblemsError
from bitgrain.formats.config_reader import ConfigReader


def problem_of(values, read):
    """The one problem that a reading notes."""
    reader = ConfigReader(values, "section")
    read(reader)
    (problem,) = reader.problems
    return problem


@pytest.mark.parametrize(
    ("value", "read", "needed"),
    [
        ("4", lambda r: r.integer("key"), "an integer"),
        (True, lambda r: r.integer("key"), "an integer"),
        (5, lambda r: r.integer("key", allowed=(8, 4)), "one of 4, 8"),
        (9, lambda r: r.integer("key", allowed=range(1, 9)), "an integer in [1, 8]"),
        (0, lambda r: r.integer("key", minimum=1), "an integer"),
        (float("nan"), lambda r: r.number("key"), "a number > 0"),
        (-2, lambda r: r.group_size("key", default=128), "-1 for one group per row"),
        (1, lambda r: r.flag("key"), "true or false"),
        (3, lambda r: r.text("key", default=""), "a text"),
        ("c", lambda r: r.choice("key", {"a": 1, "b": 2, "": 0}, ""), "one of a, b"),
        ([3], lambda r: r.names("key"), "a list of names"),
        (["a", None], lambda r: r.names("key"), "a list of names"),
        ([128], lambda r: r.block("key"), "two positive integers"),
        ([128, 0], lambda r: r.block("key"), "two positive integers"),
        ([1.5, 2], lambda r: r.block("key"), "two positive integers"),
        ([], lambda r: r.section("key", "an object of rules"), "an object of rules"),
        (2, lambda r: r.need("key", lambda v: v == 1, "1", "set it to 1"), "1"),
    ],
    ids=lambda v: "" if callable(v) else repr(v),
)
def test_wrong_value_is_one_problem_that_names_the_key(value, read, needed):
    problem = problem_of({"key": value}, read)
    assert isinstance(problem, ConfigError) and problem.where == "section.key" and needed in problem.needed


def test_right_values_are_returned_and_leave_no_problem():
    reader = ConfigReader({"n": 4, "x": 0.5, "g": -1, "f": False, "t": "GEMM", "c": True, "l": ["a", ["b"]], "b": "128x64", "s": {"k": 1}, "m": None})
    assert (reader.integer("n"), reader.number("x"), reader.group_size("g", default=1), reader.flag("f")) == (4, 0.5, -1, False)
    assert (reader.text("t", default=""), reader.choice("c", {"true": "yes", "": "no"}, "")) == ("gemm", "yes")
    assert (reader.names("l"), reader.block("b"), reader.section("s", "an object")) == (("a", "b"), (128, 64), {"k": 1})
    assert (reader.integer("m", default=7), reader.flag("m"), reader.block("m"), reader.names("m")) == (7, None, None, ())
    reader.finish()


def test_missing_key_without_default_is_a_problem():
    assert problem_of({"bits": None}, lambda r: r.integer("bits")).found == "absent"


def test_spellings_of_one_setting_must_agree():
    agreeing = ConfigReader({"group_size": 64, "q_group_size": 64})
    assert agreeing.group_size("group_size", "q_group_size", default=128) == 64
    agreeing.finish()
    problem = problem_of({"group_size": 64, "q_group_size": 32}, lambda r: r.group_size("group_size", "q_group_size", default=128))
    assert isinstance(problem, ConflictingConfigError) and "q_group_size" in problem.where


def test_all_problems_and_unknown_keys_come_at_once():
    reader = ConfigReader({"bits": "x", "sym": 3, "group_sise": 1, "zzz": 2, "nothing": None, "empty": {}, "none": []})
    reader.integer("bits")
    reader.flag("sym")
    reader.skip(["group_size"])
    with pytest.raises(ManyProblemsError) as caught:
        reader.finish()
    assert [p.where for p in caught.value.problems] == ["quantization_config.bits", "quantization_config.sym", "quantization_config"]
    assert caught.value.problems[-1].found == "unknown keys: group_sise (nearest known: group_size), zzz"


def test_collected_error_is_noted_and_reading_goes_on():
    def refuse():
        raise ConfigError("inner", "this", "that", "do so")

    reader = ConfigReader({})
    assert (reader.collect(refuse), reader.collect(lambda: 5)) == (None, 5)
    with pytest.raises(BitgrainError, match="inner: this"):
        reader.finish()
