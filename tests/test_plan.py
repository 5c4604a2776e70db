"""When each pass of a step goes forward and backward, written out by hand."""

import pytest

import unloaf
from unloaf.passes import SubnetPass
from unloaf.passes.plan import Plan

# Two stages of three blocks; depths 2-3 say: the first two of the first, all of the second.
STAGES = tuple(unloaf.Stage(name, tuple(f"{name}.{i}" for i in range(3)), (False, True, True)) for name in "ab")


def asked(depths, **options):
    return SubnetPass(unloaf.Subnet.from_depths(STAGES, depths), **options)


def moves(*requests):
    return [str(move) for move in Plan(STAGES, requests).moves()]


def losses(*requests):
    """After which pass the losses of which passes are called."""
    found = [move for move in Plan(STAGES, requests).moves() if move.kind == "forward"]
    return {move.of.number: [ready.number for ready in move.losses] for move in found}


def lines(text):
    return [line.strip() for line in text.split(",")]


def test_a_step_without_subnets():
    assert moves() == ["forward 0", "backward 0"]


def test_one_suffix_is_alive_at_a_time():
    # 2-3, 1-3 and 3-1 each leave the main network alone.
    expected = "forward 0, forward 1, backward 1, forward 2, backward 2, forward 3, backward 3, backward 0"
    assert moves(asked((2, 3)), asked((1, 3)), asked((3, 1))) == lines(expected)


def test_a_pass_waits_for_those_that_branch_off_it():
    # 2-2 and 2-1 are ends inside 2-3; 1-3, asked for in between, leaves the main network.
    expected = "forward 0, forward 1, forward 3, backward 3, forward 4, backward 4, backward 1, forward 2, backward 2"
    assert moves(asked((2, 3)), asked((1, 3)), asked((2, 2)), asked((2, 1))) == lines(f"{expected}, backward 0")


def test_other_inputs_come_after_all_that_share_the_main_network_s():
    # 3-3 on another input shares nothing with the main network, but 3-1 on that input is an end inside it.
    expected = "forward 0, forward 2, backward 2, forward 1, forward 3, backward 3, backward 1, backward 0"
    assert moves(asked((3, 3), side=8), asked((2, 3)), asked((3, 1), side=8)) == lines(expected)


@pytest.mark.parametrize("repeated", [(2, 3), (3, 3)])
def test_the_same_subnet_again_is_no_pass_of_its_own(repeated):
    expected = ["forward 0", *(["forward 1", "backward 1"] if repeated == (2, 3) else []), "backward 0"]
    assert moves(asked(repeated), asked(repeated)) == expected


def test_a_loss_that_reads_later_logits_keeps_its_pass_alive():
    # The first reads the third's logits, so both earlier graphs stay until then; the latest goes backward first.
    requests = asked((2, 3), needs=(2,)), asked((1, 3)), asked((3, 1))
    expected = "forward 0, forward 1, forward 2, backward 2, forward 3, backward 3, backward 1, backward 0"
    assert moves(*requests) == lines(expected)
    assert losses(*requests) == {0: [0], 1: [], 2: [2], 3: [1, 3]}


def test_losses_wait_through_a_chain_of_needs():
    # 0 reads 1, 1 reads 2; 2-1 branches off 2-3, so it goes forward before 1-3 does.
    requests = asked((2, 3), needs=(1,)), asked((1, 3), needs=(2,)), asked((2, 1))
    expected = "forward 0, forward 1, forward 3, backward 3, forward 2, backward 2, backward 1, backward 0"
    assert moves(*requests) == lines(expected)
    assert losses(*requests) == {0: [0], 1: [], 3: [3], 2: [1, 2]}


def test_the_main_network_as_a_student_of_a_subnet():
    requests = asked((3, 3), needs=(1,)), asked((2, 3))
    assert moves(*requests) == lines("forward 0, forward 1, backward 1, backward 0")
    assert losses(*requests) == {0: [], 1: [0, 1]}
