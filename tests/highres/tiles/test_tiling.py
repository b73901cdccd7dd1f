"""Where tiles lie, what they weigh, and how a stripe of them is merged."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitfast.errors import InputTypeError, InputValueError
from vitfast.highres.tiles.blending import (
    Blend,
    StripeMerger,
    WeightedMean,
)
from vitfast.highres.tiles.tiling import (
    Axis,
    Box,
    check_overlap,
    check_tile,
    round_up,
    starts_of,
    window_of,
)

BLENDS = st.sampled_from([Blend("cosine"), Blend("average")])
SHARES = st.floats(0, 0.95)
EXAMPLES = settings(max_examples=25, deadline=None)


@st.composite
def axes(draw) -> Axis:
    multiple = draw(st.sampled_from([1, 2, 4, 14, 16]))
    ratio = draw(st.sampled_from([Fraction(1, multiple), Fraction(1), Fraction(2)]))
    length = draw(st.integers(1, 40 * multiple))
    window = window_of(length, multiple * draw(st.integers(1, 12)), multiple)
    return Axis(length, window, starts_of(length, window, draw(SHARES), multiple), ratio)


@given(
    length=st.integers(1, 3000),
    tiles=st.integers(1, 40),
    multiple=st.sampled_from([1, 4, 14, 16, 32]),
    overlap=SHARES,
)
@EXAMPLES
def test_tiles_cover_the_image_on_multiples_and_share_what_was_asked(
    length, tiles, multiple, overlap
):
    window = window_of(length, tiles * multiple, multiple)
    starts = starts_of(length, window, overlap, multiple)
    assert starts[0] == 0 and starts[-1] + window == round_up(length, multiple)
    assert all(s % multiple == 0 for s in starts)
    for before, after in zip(starts, starts[1:], strict=False):
        assert before < after
        assert window - (after - before) >= overlap * window - 1e-6 or after - before == multiple


def test_a_fixed_window_larger_than_the_image_is_one_tile():
    assert starts_of(100, 224, 0.1, 16) == (0,)


def test_no_more_tiles_than_needed():
    assert starts_of(1000, 256, 0, 1) == (0, 256, 512, 744)
    assert starts_of(1024, 512, 0.1, 16) == (0, 448, 512)
    assert starts_of(512, 512, 0.5, 16) == (0,)
    assert starts_of(30, 10, 0.9, 1) == tuple(range(21))  # 10 * (1 - 0.9) is not quite 1


@given(axes())
@EXAMPLES
def test_bands_are_the_output_in_order_and_know_their_tiles(axis):
    bands = [axis.band(t) for t in range(len(axis.starts))]
    assert bands[0][0] == 0 and bands[-1][1] == axis.total
    assert all(a[1] == b[0] for a, b in zip(bands, bands[1:], strict=False))
    for number, (low, high) in enumerate(bands):
        assert low < high
        covering = {
            t
            for t in range(len(axis.starts))
            if set(range(low, high)) & set(range(axis.first(t), axis.first(t) + axis.cells))
        }
        assert set(axis.contributors(number)) == covering
        assert max(covering) <= number  # nothing that comes later changes it


@given(axes(), st.sampled_from([None, 0]))
@EXAMPLES
def test_cosine_weights_add_up_to_one_where_two_tiles_meet(axis, margin):
    size = axis.first(len(axis.starts) - 1) + axis.cells
    total, covered = torch.zeros(size), torch.zeros(size)
    for t in range(len(axis.starts)):
        weight = Blend(margin=margin).weights(axis, t)
        assert weight.dtype == torch.float32 and weight.min() > 0 and weight.max() <= 1
        total[axis.first(t) : axis.first(t) + axis.cells] += weight
        covered[axis.first(t) : axis.first(t) + axis.cells] += 1
    assert covered.min() >= 1
    # A tile fades to its neighbours only: where it meets none but them, there is no gap.
    two = covered <= 2
    if covered.max() <= 2:
        torch.testing.assert_close(total[two], torch.ones(int(two.sum())), rtol=0, atol=1e-6)
    assert total[0] > 0 and total[-1] > 0


def test_a_cosine_is_raised_and_full_at_the_images_edges():
    axis = Axis(20, 8, (0, 4, 8, 12), Fraction(1))
    ones, ramp = torch.ones(4), torch.sin(torch.pi / 2 * (torch.arange(4) + 0.5) / 4) ** 2
    pure = Blend("cosine", margin=0)
    torch.testing.assert_close(pure.weights(axis, 0), torch.cat([ones, ramp.flip(0)]))
    torch.testing.assert_close(pure.weights(axis, 1), torch.cat([ramp, ramp.flip(0)]))
    torch.testing.assert_close(pure.weights(axis, 3), torch.cat([ramp, ones]))
    assert Blend("average").weights(axis, 1).eq(1).all()


@pytest.mark.parametrize("margin", [None, 1])
def test_a_margin_does_not_count_unless_alone(margin):
    axis = Axis(12, 8, (0, 4), Fraction(1))
    ramp = torch.sin(torch.pi / 2 * torch.tensor([0.25, 0.75])) ** 2
    least, ones = torch.tensor([2.0**-24]), torch.ones(5)
    weights = Blend("cosine", margin).weights(axis, 0)
    torch.testing.assert_close(weights, torch.cat([ones, ramp.flip(0), least]), rtol=1e-6, atol=0)
    wide = Blend("cosine", 2).weights(axis, 1)  # both margins meet: a cut
    assert torch.equal(wide, torch.cat([least, least, ones, ones[:1]]))
    assert torch.equal(Blend("average", 2).weights(axis, 1), wide)


def test_a_margin_larger_than_the_overlap():
    with pytest.raises(InputValueError, match="margin=3 takes an overlap of twice that.* 4 pixels"):
        Blend(margin=3).check(Axis(12, 8, (0, 4), Fraction(1)))
    Blend(margin=2).check(Axis(12, 8, (0, 4), Fraction(1)))
    Blend(margin=3).check(Axis(8, 8, (0,), Fraction(1)))


@given(axes(), BLENDS)
@EXAMPLES
def test_areas_add_up_to_the_image(axis, blend):
    areas = blend.areas(axis)
    assert areas.min() > 0
    torch.testing.assert_close(areas.sum().item(), float(axis.total))


@given(axes(), axes(), BLENDS)
@EXAMPLES
def test_tiles_of_any_field_give_it_back_to_the_last_bit(rows, columns, blend):
    width = columns.first(len(columns.starts) - 1) + columns.cells
    field = torch.randn(2, rows.first(len(rows.starts) - 1) + rows.cells, width) * 1e3
    merger = StripeMerger(2, rows, columns, blend)
    bands = []
    for r in range(len(rows.starts)):
        for c in range(len(columns.starts)):
            top, left = rows.first(r), columns.first(c)
            merger.add(r, c, field[:, top : top + rows.cells, left : left + columns.cells])
        bands.append(merger.band(r))
    assert torch.equal(torch.cat(bands, 1), field[:, : rows.total, : columns.total])


@given(axes(), axes(), BLENDS)
@EXAMPLES
def test_tiles_that_differ_are_weighed(rows, columns, blend):
    height = rows.first(len(rows.starts) - 1) + rows.cells
    width = columns.first(len(columns.starts) - 1) + columns.cells
    total, weights = torch.zeros(height, width).double(), torch.zeros(height, width).double()
    merger = StripeMerger(1, rows, columns, blend)
    bands = []
    for r in range(len(rows.starts)):
        for c in range(len(columns.starts)):
            values = torch.randn(1, rows.cells, columns.cells)
            weight = torch.outer(blend.weights(rows, r), blend.weights(columns, c))
            at = (
                slice(rows.first(r), rows.first(r) + rows.cells),
                slice(columns.first(c), columns.first(c) + columns.cells),
            )
            total[at] += values[0].double() * weight
            weights[at] += weight
            merger.add(r, c, values)
        bands.append(merger.band(r))
    expected = (total / weights)[: rows.total, : columns.total].float()
    torch.testing.assert_close(torch.cat(bands, 1)[0], expected, rtol=1e-4, atol=1e-5)


def test_what_no_tile_gave_is_nan():
    rows, columns = Axis(8, 8, (0,), Fraction(1)), Axis(12, 8, (0, 4), Fraction(1))
    merger = StripeMerger(1, rows, columns, Blend())
    merger.add(0, 1, torch.ones(1, 8, 8))
    band = merger.band(0)
    assert band[..., :4].isnan().all() and band[..., 4:].eq(1).all()


def test_a_mean_of_equal_values_is_that_value():
    mean = WeightedMean((3,), (), torch.float32)
    values = torch.tensor([0.1, -3.3, -torch.inf])
    for weight in (0.3, 1e-6, 0.7, 5.0):
        mean.add(values, torch.tensor(weight))
    assert torch.equal(mean.mean, values)


@pytest.mark.parametrize("tile", [0, -16, (512, 0)])
def test_a_tile_below_one_pixel(tile):
    with pytest.raises(InputValueError, match="below 1 pixel"):
        check_tile(tile)


@pytest.mark.parametrize("tile", [512.0, "512", (1, 2, 3), True, None])
def test_a_tile_that_is_no_number_of_pixels(tile):
    with pytest.raises(InputTypeError, match="tile is pixels"):
        check_tile(tile)


@pytest.mark.parametrize("overlap", [1, 1.0, 64, -0.1, float("nan")])
def test_an_overlap_that_is_no_share(overlap):
    with pytest.raises(InputValueError, match="from 0 to below 1"):
        check_overlap(overlap)


def test_an_overlap_that_is_no_number():
    with pytest.raises(InputTypeError, match="share of the tile"):
        check_overlap("10%")


def test_a_tile_below_the_models_patch():
    with pytest.raises(InputValueError, match="tile=8 is less than the 16 pixels"):
        window_of(100, 8, 16)


def test_a_box_reads_as_rows_and_columns():
    assert str(Box(0, 16, 32, 48)) == "rows 0:32, columns 16:48"
