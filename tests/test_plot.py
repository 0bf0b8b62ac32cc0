"""The picture of a parameter shows its contents and marks its frozen entries, whatever its size."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from freezehooks import ParameterChangedError, SpecError, TargetError, UnsupportedParameterError, freeze_entries

pytest.importorskip("matplotlib")

from matplotlib import rc_context  # after the skip
from matplotlib.figure import Figure

from .ranks import on_ranks


def _picture(module: nn.Module, spec: Any, name: str = "weight") -> Figure:
    return freeze_entries(module, spec).plot(name)


def _marks(figure: Figure, sign: str) -> list[tuple[float, float]]:
    (found,) = (c for c in figure.axes[0].collections if c.get_gid() == sign)
    return [(round(float(x), 6), round(float(y), 6)) for x, y in torch.as_tensor(found.get_offsets()).tolist()]


def _cells(figure: Figure) -> Iterator[tuple[tuple[float, float], float]]:
    """Yield the middle of every cell of the first panel, and the number it shows."""
    for image in figure.axes[0].images:
        left, right, bottom, top = image.get_extent()
        numbers = image.get_array()
        assert numbers is not None
        rows, columns = numbers.shape
        for row in range(rows):
            for column in range(columns):
                place = left + (column + 0.5) * (right - left) / columns, top + (row + 0.5) * (bottom - top) / rows
                yield (round(place[0], 6), round(place[1], 6)), float(numbers[row, column])


def _says(figure: Figure) -> str:
    return " ".join(f"{figure.get_suptitle()}\n{figure.get_supxlabel()}".split())


@pytest.mark.parametrize(
    ("module", "spec"),
    [
        (nn.Conv1d(2, 3, 5), "weight[:, :, 2] = 7"),
        (nn.Conv2d(2, 3, 3), "weight[center] = 7"),
        (nn.Conv3d(2, 3, 3), "weight[~cross(3)] = 7"),
        (nn.Conv2d(20, 20, 3, groups=20), "weight[border] = 7"),
        (nn.Conv2d(5, 4, 1), "weight[1, 2] = 7"),
        (nn.Linear(6, 4), "weight[triu(1)] = 7"),
    ],
    ids=["conv1d", "conv2d", "conv3d", "depthwise", "pointwise", "matrix"],
)
def test_the_crosses_lie_on_the_frozen_entries_and_nowhere_else(module: nn.Module, spec: str) -> None:
    figure = _picture(module, spec)
    sevens = {place for place, number in _cells(figure) if number == 7}
    assert {(round(x, 6), round(y, 6)) for x, y in _marks(figure, "x")} == {
        (round(x, 6), round(y, 6)) for x, y in sevens
    }
    assert len(list(_cells(figure))) == module.get_parameter("weight").numel()


def test_kernels_stand_with_outputs_across_and_inputs_down() -> None:
    conv = nn.Conv2d(2, 3, 3)
    figure = _picture(conv, "weight[2, 0, 0, 0] = 7")
    ((x, y),) = _marks(figure, "x")
    assert x > 8  # in the last of three columns of kernels
    assert y < 1  # and in the first row
    axis = figure.axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("output channel", "input channel")
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0", "1", "2"]


def test_a_transposed_convolution_has_its_input_channels_first() -> None:
    axis = _picture(nn.ConvTranspose2d(2, 3, 3), "weight[center] = 0").axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("input channel", "output channel")


def test_one_scale_symmetric_around_0_serves_all_kernels() -> None:
    conv = nn.Conv2d(2, 3, 3)
    figure = _picture(conv, "weight[0, 0, 0, 0] = -7")
    assert {image.get_clim() for image in figure.axes[0].images} == {(-7.0, 7.0)}
    assert len(figure.axes) == 2  # the kernels and the scale
    assert figure.axes[1].get_ylabel() == "value"


def test_a_mark_is_a_sign_with_a_white_rim_and_no_color() -> None:
    figure = _picture(nn.Linear(3, 2), "weight[0] = 1")
    (marks,) = (c for c in figure.axes[0].collections if c.get_gid() == "x")
    assert torch.as_tensor(marks.get_edgecolor()).tolist() == [[0, 0, 0, 1]]
    assert marks.get_path_effects()
    assert "a cross marks a frozen entry" in _says(figure)


def test_the_frozen_panel_of_a_large_matrix_is_grey_and_exact() -> None:
    figure = _picture(nn.Linear(60, 50), "weight[7, 3:5] = 0")
    shares = figure.axes[1].images[0]
    numbers = shares.get_array()
    assert numbers is not None
    assert torch.as_tensor(numbers).nonzero().tolist() == [[7, 3], [7, 4]]
    colors = shares.to_rgba(torch.tensor([0.0, 0.001, 0.5, 0.999, 1.0]).numpy())[:, :3]
    assert (colors[:, :1] == colors).all()  # greys
    assert len({tuple(color) for color in colors}) == 5
    assert colors[0].tolist() == [1, 1, 1]
    assert colors[-1].tolist() == [0, 0, 0]


def test_the_title_says_name_shape_rules_and_counts() -> None:
    conv = nn.Conv2d(2, 3, 3)
    said = _says(_picture(conv, "weight[center] = 0\nweight[0, 0, 0, 0] = 1"))
    assert "weight, 3 x 2 x 3 x 3" in said
    assert "weight[center] = 0; weight[0, 0, 0, 0] = 1" in said
    assert "7 of 54 entries frozen, 47 free" in said


def test_many_kernels_are_sampled_and_the_picture_says_so() -> None:
    figure = _picture(nn.Conv2d(40, 64, 3), "weight[center] = 0")
    assert "showing 192 of 2,560 kernels, evenly spaced" in _says(figure)
    names = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert (names[0], names[-1], len(names)) == ("0", "63", 16)


def test_a_large_matrix_is_binned_and_the_picture_says_so() -> None:
    figure = _picture(nn.Linear(1000, 193), "weight[0] = 0")
    assert "each cell is the entry of largest magnitude of 2 x 6" in _says(figure)
    assert figure.axes[0].get_xlim() == (-0.5, 999.5)


def test_nan_and_inf_are_shown_apart_and_leave_the_scale_alone() -> None:
    layer = nn.Linear(4, 3)
    frozen = freeze_entries(layer, "weight[0] = 5")
    layer.weight.data[1, 2], layer.weight.data[2, 0] = torch.nan, -torch.inf
    figure = frozen.plot("weight")
    assert figure.axes[0].images[0].get_clim() == (-5.0, 5.0)
    assert sorted(_marks(figure, "o")) == [(0.0, 2.0), (2.0, 1.0)]
    assert "yellow or circled: nan or inf, 2 entries of all" in _says(figure)


@pytest.mark.parametrize(
    ("parameter", "rule"),
    [
        (torch.tensor(2.0), "p = 1"),
        (torch.randn(7), "p[2:4] = 0"),
        (torch.randn(1000), "p[2:4] = 0"),
        (torch.zeros(4, 3), "p = 0"),
        (torch.randn(1, 50, 64), "p[:, 0] = 0"),
        (torch.randn(2, 3, 2, 2, 2, 2), "p[0] = 0"),
        (torch.randn(4, 3, dtype=torch.bfloat16), "p[0] = 0"),
        (torch.randn(4, 3, dtype=torch.float16), "p[0] = 0"),
        (torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last), "p[0] = 0"),
    ],
    ids=["scalar", "vector", "long_vector", "all_zero", "positions", "4d_kernel", "bfloat16", "half", "channels_last"],
)
def test_every_shape_and_dtype_can_be_drawn(parameter: Tensor, rule: str, tmp_path: Path) -> None:
    frozen = freeze_entries(nn.ParameterDict({"p": nn.Parameter(parameter)}), rule)
    frozen.plot("p", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_complex_entries_are_drawn_by_magnitude_from_0() -> None:
    layer = nn.Linear(2, 2, dtype=torch.complex64)
    figure = _picture(layer, {"weight": (torch.tensor([[True, False], [False, False]]), 3 + 4j)})
    assert next(_cells(figure))[1] == 5
    assert figure.axes[0].images[0].get_clim() == (0.0, 5.0)
    assert "by their magnitude" in _says(figure)


@pytest.mark.parametrize(
    ("suffix", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml"), ("PNG", b"\x89PNG")]
)
def test_the_suffix_decides_the_format_and_folders_are_made(suffix: str, start: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / f"picture.{suffix}"
    freeze_entries(nn.Linear(3, 2), "weight[0]").plot("weight", str(path))
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["picture.xyz", "picture", "weight.0"])
def test_a_suffix_that_is_no_format_is_refused_and_nothing_is_made(name: str, tmp_path: Path) -> None:
    frozen = freeze_entries(nn.Linear(3, 2), "weight[0]")
    with pytest.raises(
        SpecError, match=rf"must end in the suffix of a picture format, found '{name}'; use one of .*png"
    ):
        frozen.plot("weight", tmp_path / "folder" / name)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(TargetError, match="nothing of `bias` is frozen"):
        freeze_entries(nn.Linear(3, 2), "weight[0]").plot("bias")


def test_a_parameter_without_numbers_is_refused() -> None:
    layer = nn.Linear(3, 2)
    frozen = freeze_entries(layer, "weight[0] = 0")
    layer.to("meta")
    with pytest.raises(UnsupportedParameterError, match="`weight` is on the meta device and has no numbers to draw"):
        frozen.plot("weight")


def test_a_parameter_of_another_shape_is_refused() -> None:
    layer = nn.Linear(3, 2)
    frozen = freeze_entries(layer, "weight[0] = 0")
    frozen.remove()
    layer.weight = nn.Parameter(torch.zeros(5, 3))
    with pytest.raises(ParameterChangedError, match=r"had shape \(2, 3\)"):
        frozen.plot("weight")


def test_a_detached_handle_draws_what_is_there_and_changes_nothing() -> None:
    layer = nn.Linear(3, 2)
    frozen = freeze_entries(layer, "weight[0] = 0")
    frozen.remove()
    layer.weight.data.fill_(3)
    figure = frozen.plot("weight")
    assert {number for _, number in _cells(figure)} == {3.0}
    assert _marks(figure, "x") == [(0.0, 0.0), (1.0, 0.0), (2.0, 0.0)]
    assert bool((layer.weight == 3).all())


def test_a_tied_parameter_says_its_other_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
            self.head.weight = self.embedding.weight

    assert "embedding.weight, 4 x 3, also head.weight" in _says(_picture(Tied(), "head[0]", "head.weight"))


def test_text_that_matplotlib_takes_for_mathematics_is_written_as_it_is() -> None:
    frozen = freeze_entries({"a$_$b": torch.zeros(3, requires_grad=True)}, {"a$_$b": torch.tensor([True, False, True])})
    figure = frozen.plot("a$_$b")
    assert "a$_$b, 3" in _says(figure)
    figure.draw_without_rendering()


def test_drawing_leaves_no_trace_in_pyplot_and_notebooks_show_the_figure() -> None:
    script = (
        "import sys, torch; from freezehooks import freeze_entries\n"
        "figure = freeze_entries(torch.nn.Linear(3, 2), 'weight[0]').plot('weight')\n"
        "assert figure._repr_png_().startswith(b'\\x89PNG')\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "False", done.stderr


def test_without_matplotlib_it_says_what_to_install() -> None:
    script = (
        "import sys, torch; sys.modules['matplotlib'] = None\n"
        "from freezehooks import freeze_entries\n"
        "try:\n    freeze_entries(torch.nn.Linear(3, 2), 'weight[0]').plot('weight')\n"
        "except ModuleNotFoundError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "frozen.plot needs matplotlib: pip install 'freezehooks[plot]'", done.stderr


def _panel(figure: Figure) -> Tensor:
    """Return the shares of frozen entries that the second panel shows."""
    (image,) = figure.axes[1].images
    return torch.as_tensor(image.get_array())


def test_a_few_free_rows_of_thousands_can_be_seen() -> None:
    figure = _picture(nn.Embedding(20_000, 64), "weight[:-3]")
    shown = _panel(figure)
    assert not shown[-2:].any()  # white, two cells high
    assert (shown[:-2] == 1).all()
    assert "rare cells are drawn larger than they are" in _says(figure)


def test_a_few_frozen_entries_of_thousands_can_be_seen() -> None:
    shown = _panel(_picture(nn.Linear(300, 300, bias=False), "weight[150, 100] = 1"))
    assert int((shown == 1).sum()) == 9
    assert int((shown == 0).sum()) == shown.numel() - 9


@pytest.mark.parametrize("spec", ["weight[:100] = 1", "weight = 1", "weight[smallest(0.5)] = 0"])
def test_what_is_not_rare_is_drawn_as_it_is(spec: str) -> None:
    figure = _picture(nn.Linear(300, 300, bias=False), spec)
    assert "rare" not in _says(figure)


# Styles


@pytest.mark.parametrize(("shape", "region"), [((4, 4), "0"), ((2, 4, 3, 3), ":, :, 0")], ids=["matrix", "kernels"])
def test_a_style_turns_no_picture_upside_down_and_draws_no_grid_over_it(shape: tuple[int, ...], region: str) -> None:
    weight = torch.arange(float(math.prod(shape))).view(shape).requires_grad_()
    frozen = freeze_entries({"weight": weight}, f"weight[{region}]")
    with rc_context({"image.origin": "lower", "axes.grid": True}):
        axis = frozen.plot("weight").axes[0]
        assert {image.origin for image in axis.images} == {"upper"}
        assert not any(line.get_visible() for line in axis.get_xgridlines() + axis.get_ygridlines())


def test_a_side_of_one_entry_has_one_tick() -> None:
    frozen = freeze_entries({"weight": torch.ones(1, 60, requires_grad=True)}, "weight[0, 0]")
    figure = frozen.plot("weight")
    figure.canvas.draw()
    low, high = figure.axes[0].get_ylim()[::-1]
    assert [tick for tick in figure.axes[0].get_yticks() if low <= tick <= high] == [0]


def test_numbers_near_the_largest_can_be_drawn() -> None:
    weight = torch.tensor([[-1.7e308, 1.7e308]], dtype=torch.float64, requires_grad=True)
    freeze_entries({"weight": weight}, "weight[0, 0]").plot("weight").canvas.draw()


# What cells and kernels are drawn


def _drawn(numbers: Tensor, spec: Any) -> Figure:
    return freeze_entries({"weight": numbers.clone().requires_grad_()}, spec).plot("weight")


def _first_panel(figure: Figure) -> Tensor:
    numbers: Any = figure.axes[0].images[0].get_array()
    return torch.as_tensor(numbers.filled(torch.nan))


def test_a_cell_is_the_entry_of_largest_magnitude_with_its_sign() -> None:
    numbers = torch.zeros(400, 5)
    numbers[2, 1], numbers[3, 1], numbers[399, 4], numbers[5, 0] = 3.0, -4.0, 2.0, torch.inf
    figure = _drawn(numbers, "weight[:4]")
    assert "each cell is the entry of largest magnitude of 3 x 1" in _says(figure)
    cells = _first_panel(figure)
    assert cells[:2, :2].nan_to_num(nan=99).tolist() == [[0, 3], [99, -4]]
    assert cells[-1, 4] == 2


def test_a_cell_that_is_frozen_in_part_shows_which_share() -> None:
    shown = _panel(_drawn(torch.zeros(400, 5), "weight[:16]"))
    assert shown[:7, 0].tolist() == pytest.approx([1, 1, 1, 1, 1, 1 / 3, 0])


@pytest.mark.parametrize("columns", [49, 193, 400, 1001])
def test_no_cell_is_lost_at_the_edge(columns: int) -> None:
    numbers = torch.arange(columns * 2, dtype=torch.float32).view(2, columns)
    figure = _drawn(numbers, "weight[1, -1]")
    cells, wide = _first_panel(figure), -(-columns // 192)
    assert cells.shape == (2, -(-columns // wide))
    assert cells[1, -1] == numbers.max()
    assert _panel(figure)[1, -1] > 0


def test_sampled_kernels_are_those_of_the_named_channels() -> None:
    numbers = torch.randn(50, 30, 3, 3)
    axis = _drawn(numbers, "weight[center]").axes[0]
    output = int(axis.get_xticklabels()[3].get_text())
    input_ = int(axis.get_yticklabels()[5].get_text())
    (image,) = (image for image in axis.images if tuple(image.get_extent()) == (12, 15, 23, 20))
    assert torch.equal(torch.as_tensor(image.get_array()), numbers[output, input_].double())


def test_rare_cells_grow_to_every_side_but_not_along_a_short_one() -> None:
    shown = _panel(_drawn(torch.zeros(3, 150), "weight[1, 100]"))
    assert shown.nonzero().tolist() == [[1, 99], [1, 100], [1, 101]]


# Ranks


@on_ranks(2)
def test_a_sharded_parameter_shows_what_lies_on_this_rank() -> None:
    layer: Any = fully_shard(nn.Linear(4, 1, bias=False))
    figure = _picture(layer, "weight[0, 1:]")
    assert "3 of 4 entries frozen" in _says(figure)
    if dist.get_rank() == 0:
        assert "this rank's shard: (1, 4), 3 of its entries frozen" in _says(figure)
        assert len(_marks(figure, "x")) == 3
    else:
        assert "this rank has no entries; this rank's shard: (0, 4), 0 of its entries frozen" in _says(figure)
