"""The text picture of a layout, character by character."""

import textwrap

import pytest
import torch

from maskmoe_kernels import BlockLayout, LayoutError, SubsetFamily
from maskmoe_kernels.layout.draw import draw_layout


def picture(text: str) -> str:
    return textwrap.dedent(text).strip("\n")


def test_hidden_layout_shows_what_is_routed():
    family = SubsetFamily.powerset({"x1": 1, "x2": 1})
    drawn = draw_layout(family.hidden_layout(16, 16), family.names, family.names)
    assert drawn == picture(
        """
        48 outputs x 48 inputs: 3 x 3 blocks, 5 present, density 0.556

                     x1  x2  x1+x2
        name   size  16  16     16
        x1       16   █   ·      ·
        x2       16   ·   █      ·
        x1+x2    16   ░   ░      █

        █ present, gradient to the input routed   ░ present, gradient stopped   · absent
        """
    )


def test_ragged_input_layout():
    family = SubsetFamily(
        {"user": 64, "item": 8}, {"user": ["user"], "both": ["user", "item"], "prior": []}
    )
    assert draw_layout(family.input_layout([128, 7, 1]), family.names, list(family.groups)) == (
        picture(
            """
            136 outputs x 72 inputs: 3 x 2 blocks, 3 present, density 0.888

                         user  item
            name   size    64     8
            user    128     █     ·
            both      7     █     █
            prior     1     ·     ·

            █ present   · absent
            """
        )
    )


def test_large_layouts_say_what_is_left_out():
    present = torch.eye(100, dtype=torch.bool)
    drawn = draw_layout(BlockLayout([2] * 100, [3] * 100, present), max_blocks=5)
    assert drawn == picture(
        """
        200 outputs x 300 inputs: 100 x 100 blocks, 100 present, density 0.010

                    0 1 2 … 98 99
        name  size  3 3 3    3  3
        0        2  █ · · …  ·  ·
        1        2  · █ · …  ·  ·
        2        2  · · █ …  ·  ·
        …           … … … …  …  …
        98       2  · · · …  █  ·
        99       2  · · · …  ·  █

        █ present   · absent
        … 95 of 100 row blocks are not drawn
        … 95 of 100 column blocks are not drawn
        """
    )


def test_columns_that_do_not_fit_are_numbered_downwards():
    names = [f"a rather long name {k}" for k in range(12)]
    layout = BlockLayout([1], [4] * 11 + [9], torch.tensor([[True] * 11 + [False]]))
    assert draw_layout(layout, ["row"], names) == picture(
        """
        1 outputs x 53 inputs: 1 x 12 blocks, 11 present, density 0.830

                                        1 1
        name  size  0 1 2 3 4 5 6 7 8 9 0 1
        row      1  █ █ █ █ █ █ █ █ █ █ █ ·

        columns: 0 a rather long name 0 (4), 1 a rather long name 1 (4), 2 a rather long name 2 (4),
        3 a rather long name 3 (4), 4 a rather long name 4 (4), 5 a rather long name 5 (4),
        6 a rather long name 6 (4), 7 a rather long name 7 (4), 8 a rather long name 8 (4),
        9 a rather long name 9 (4), 10 a rather long name 10 (4), 11 a rather long name 11 (9)

        █ present   · absent
        """
    )


def test_interleaved_masks_say_so():
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[::2, ::2] = mask[1::2, 1::2] = True
    last = draw_layout(BlockLayout.from_mask(mask)).splitlines()[-1]
    assert last == "interleaved: the units of a block do not all lie side by side"


@pytest.mark.parametrize("most", [2, 3, 40])
def test_every_line_fits_a_page(most):
    family = SubsetFamily.powerset({f"group {k}": k + 1 for k in range(6)})
    drawn = draw_layout(family.hidden_layout(8, 8), family.names, family.names, max_blocks=most)
    body = [line for line in drawn.splitlines() if line.startswith("group")]
    assert len(body) == most
    assert max(map(len, drawn.splitlines())) <= 120


def test_wrong_arguments_say_what_was_expected():
    layout = BlockLayout([1, 1], [1], torch.ones(2, 1, dtype=torch.bool))
    with pytest.raises(LayoutError, match="row_names must hold 2 names, got 1"):
        draw_layout(layout, ["only one"])
    with pytest.raises(LayoutError, match="max_blocks must be at least 2, got 1"):
        draw_layout(layout, max_blocks=1)


@pytest.mark.parametrize("count", [10, 11, 100, 101])
def test_numbers_above_columns_are_whole(count):
    """Names that do not fit a line stand below, by numbers that read downwards."""
    names = [f"a name of some length {c}" for c in range(count)]
    layout = BlockLayout([1], [1] * count, torch.ones(1, count, dtype=torch.bool))
    lines = draw_layout(layout, col_names=names, max_blocks=count).splitlines()
    (row,) = (k for k, line in enumerate(lines) if line.startswith("0 "))
    places = [place for place, sign in enumerate(lines[row]) if sign == "█"]
    above = [line.ljust(len(lines[row])) for line in lines[2:row]]
    read = ["".join(line[place] for line in above).strip() for place in places]
    assert read == [str(c) for c in range(count)]
