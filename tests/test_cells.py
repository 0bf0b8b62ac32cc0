"""What a picture is drawn of: the cells of a matrix and the kernels that stand for all; nothing is drawn here."""

from __future__ import annotations

import pytest
import torch

from freezehooks._report.cells import kernels_of, matrix_of, stressed


def test_a_cell_is_the_entry_of_largest_magnitude_with_its_sign() -> None:
    numbers = torch.zeros(400, 5)
    numbers[2, 1], numbers[3, 1], numbers[399, 4], numbers[5, 0] = 3.0, -4.0, 2.0, torch.inf
    frozen = torch.zeros(400, 5, dtype=torch.bool)
    frozen[:4] = True
    matrix = matrix_of(numbers, frozen)
    assert matrix.cell == (3, 1)
    assert matrix.numbers[:2, :2].nan_to_num(nan=99).tolist() == [[0, 3], [99, -4]]
    assert matrix.numbers[-1, 4] == 2
    assert matrix.share[:3, 0].tolist() == pytest.approx([1, 1 / 3, 0])


@pytest.mark.parametrize("columns", [1, 7, 193, 400, 1001])
def test_no_cell_is_lost_at_the_edge(columns: int) -> None:
    numbers = torch.arange(columns * 2, dtype=torch.float32).view(2, columns)
    matrix = matrix_of(numbers, numbers == numbers.max())
    assert matrix.numbers.max() == numbers.max()
    assert len(matrix.numbers[0]) == -(-columns // matrix.cell[1])
    assert matrix.share[1, -1] > 0


def test_sampled_kernels_are_those_of_the_named_channels() -> None:
    numbers = torch.randn(50, 30, 3, 3)
    kernels = kernels_of(numbers, numbers > 0)
    outputs, inputs = kernels.channels
    assert kernels.numbers[3, 5, 0].equal(numbers[outputs[3], inputs[5]].double())
    assert kernels.frozen[3, 5, 0].equal(numbers[outputs[3], inputs[5]] > 0)


def test_rare_cells_grow_to_every_side_but_not_along_a_short_one() -> None:
    share = torch.zeros(3, 200)
    share[1, 100] = 0.2
    grown = torch.zeros(3, 200)
    grown[1, 99:102] = 1
    assert torch.equal(stressed(share), grown)
