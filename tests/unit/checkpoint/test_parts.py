"""Parts of stored tensors: views with headers of their own, and the account of each part."""

import pytest
import torch

from bitgrain.checkpoint.headers import TensorHeader
from bitgrain.checkpoint.ledger import Ledger
from bitgrain.checkpoint.parts import Cut, Flatten, Pick, Transpose, divide, join, part_of, whole
from bitgrain.errors import ManyProblemsError, MissingTensorError, UnexpectedTensorError

STORED = torch.arange(3 * 8 * 2 * 5).view(3, 8, 2, 5)


def header(name="stack", shape=(3, 8, 2, 5), dtype="I64", start=100):
    return TensorHeader(name, dtype, tuple(shape), "a.safetensors", start, start + 8 * int(torch.tensor(shape).prod()))


@pytest.mark.parametrize(
    ("steps", "want"),
    [
        ((Pick(0, 2),), STORED[2]),
        ((Pick(1, 7),), STORED[:, 7]),
        ((Cut(1, 1, 8, 2),), STORED[:, 1::2]),
        ((Cut(0, 1, 3),), STORED[1:3]),
        ((Transpose(),), STORED.mT),
        ((Flatten(2),), STORED.flatten(2)),
        ((Pick(0, 1), Flatten(1), Cut(0, 0, 8, 2)), STORED[1].flatten(1)[0::2]),
        ((Pick(0, 1), Flatten(1), Transpose(), Cut(0, 5, 10)), STORED[1].flatten(1).T[5:]),
    ],
)
def test_part_has_the_values_and_the_header_of_its_share(steps, want):
    part = part_of(header(), "one", *steps)
    assert torch.equal(part.of(STORED), want)
    assert (part.header.name, part.header.dtype, part.header.shape) == ("one", "I64", tuple(want.shape))
    assert part.header.nbytes == 8 * want.numel() and part.source == "stack"


def test_part_is_a_view_of_the_stored_tensor():
    part = part_of(header(), "one", Pick(0, 1), Cut(0, 1, 8, 2), Transpose()).of(STORED)
    assert part.untyped_storage().data_ptr() == STORED.untyped_storage().data_ptr()


@pytest.mark.parametrize("step", [Pick(0, 3), Pick(0, -1), Cut(1, 0, 9), Cut(1, 8, 8), Cut(1, 5, 4)])
def test_step_that_does_not_fit_is_refused(step):
    with pytest.raises(IndexError):
        part_of(header(), "one", step)


def test_division_keeps_the_stored_order_and_leaves_the_rest_whole():
    first, stack, last = header("first"), header(), header("last")
    halves = [part_of(stack, f"half{i}", Cut(1, i, 8, 2)) for i in (0, 1)]
    parts = divide({h.name: h for h in (first, stack, last)}, {"stack": halves})
    assert list(parts) == ["first", "half0", "half1", "last"]
    assert parts["last"] == whole(last) and parts["last"].of(STORED) is STORED


def test_part_that_is_stored_twice_is_one_error_with_both_places():
    stack, alone = header(), header("one.weight")
    with pytest.raises(UnexpectedTensorError) as caught:
        divide({"stack": stack, "one.weight": alone}, {"stack": [part_of(stack, "one.weight", Pick(0, 1))]})
    assert "a.safetensors: one.weight" in str(caught.value) and "stack" in str(caught.value)


def test_many_parts_that_are_stored_twice_are_one_error_per_pair_of_tensors():
    stacks = {name: header(name) for name in ("a", "b", "c")}
    parts = {name: [part_of(h, f"expert{i}", Pick(1, i)) for i in range(8)] for name, h in stacks.items()}
    with pytest.raises(ManyProblemsError) as caught:
        divide(stacks, parts)
    assert [p.where for p in caught.value.problems] == ["a.safetensors: b", "a.safetensors: c"]
    assert "expert0, expert1, expert2 and 5 more" in str(caught.value)


# --- the account -------------------------------------------------------------------------------------------------------------
def test_ledger_closes_when_every_part_was_consumed():
    ledger = Ledger(["stack", "other"], {}, {"stack": ["a", "b", "c"]})
    for part in ("a", "b", "c"):
        ledger.consume("stack", f"module {part}", part)
    ledger.consume("other", "module")
    ledger.close("checkpoint")


def test_ledger_names_each_part_that_nothing_consumed():
    ledger = Ledger(["stack"], {}, {"stack": ["a", "b", "c"]})
    ledger.consume("stack", "module b", "b")
    with pytest.raises(ManyProblemsError) as caught:
        ledger.close("checkpoint")
    assert [p.where for p in caught.value.problems] == ["a", "c"]


def test_ledger_refuses_a_part_that_is_not_there():
    ledger = Ledger(["stack"], {}, {"stack": ["a"]})
    with pytest.raises(MissingTensorError, match="expert 7"):
        ledger.consume("stack", "module", "expert 7")


def test_ledger_refuses_a_second_consumer_of_one_part_and_of_no_other():
    ledger = Ledger(["stack"], {}, {"stack": ["a", "b"]})
    ledger.consume("stack", "first", "a")
    ledger.consume("stack", "first", "a")  # read again by the same module
    ledger.consume("stack", "second", "b")
    with pytest.raises(UnexpectedTensorError, match="a: consumed by first and again by second"):
        ledger.consume("stack", "second", "a")


def test_divisions_of_different_tensors_are_joined_and_a_doubled_part_is_noticed():
    stack, single, other = header("s", (2, 3)), header("m.0", (3,)), header("o", (4,))
    tensors = {h.name: h for h in (stack, single, other)}
    first = divide({"s": stack}, {"s": [part_of(stack, "m.1", Pick(0, 1))]})
    joined = join(tensors, first, divide({"m.0": single}, {}))
    assert list(joined) == ["m.1", "m.0", "o"] and joined["m.1"].source == "s"
    doubled = divide({"s": stack}, {"s": [part_of(stack, "m.0", Pick(0, 0))]})
    with pytest.raises(UnexpectedTensorError, match=r"m\.0"):
        join(tensors, doubled, divide({"m.0": single}, {}))
