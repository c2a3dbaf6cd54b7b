"""Pictures of what is inside a model: that they show the numbers they were given."""

import numpy as np
import pytest
from matplotlib import figure

from crossmae_jax import visualize
from crossmae_jax.probing.attention_weights import AttentionMaps, Magnitudes
from crossmae_jax.visualize import canvas


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Keeps the figures that are saved; returns them and a path."""
    figures: list[figure.Figure] = []
    save = canvas.save

    def kept(drawing, path):
        figures.append(drawing)
        return save(drawing, path)

    monkeypatch.setattr(canvas, "save", kept)
    return figures, tmp_path / "new" / "picture.png"


def test_magnitudes_are_bars_per_key_and_shares(drawn):
    figures, path = drawn
    found = Magnitudes(
        visible=np.array([0.2, 0.1]), masked=np.array([0.04, 0.06]), num_visible=50,
        num_masked=147,
    )
    assert visualize.attention_magnitudes(found, path).stat().st_size > 10_000
    left, right = figures[0].axes
    heights = [bar.get_height() for bar in left.patches]
    np.testing.assert_allclose(heights, [0.2, 0.1, 0.04, 0.06])
    shares = np.array([10 / 15.88, 5 / 13.82]) * 100
    np.testing.assert_allclose([bar.get_height() for bar in right.patches], [
        *shares, *(100 - shares)
    ])
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels == [
        "to a visible patch (sum 0.30)", "to a masked patch (sum 0.10)"
    ]
    assert left.get_xlabel() == right.get_xlabel() == "decoder block"
    assert left.get_ylabel() and right.get_ylabel()


def maps():
    """One block of two heads, 2 x 2 patches: patch 3 sees the class token, 0 and 1."""
    weights = np.zeros((1, 1, 2, 2, 3))
    weights[0, 0, :, 0] = [[0.5, 0.5, 0.0], [0.1, 0.3, 0.6]]  # of patch 3
    weights[0, 0, :, 1] = 1 / 3
    return AttentionMaps(weights, np.array([[3, 2]]), np.array([[-1, 0, 1]]))


def test_what_a_patch_attends_to_lies_at_the_keys_places(drawn):
    figures, path = drawn
    mask = np.array([False, False, True, True])
    visualize.attention_of_patch(
        np.zeros((8, 8, 1)), mask, maps(), path, query=3, grid=(2, 2)
    )
    heat = figures[0].axes[1].get_images()[0].get_array()
    np.testing.assert_allclose(heat[0], [0.4, 0.3])
    assert np.ma.getmaskarray(np.ma.masked_invalid(heat))[1].all()
    assert figures[0].axes[1].get_title() == "block 1\nclass token 30 %"
    outline = figures[0].axes[1].patches[0]
    assert outline.get_xy() == (3.5, 3.5)
    with pytest.raises(ValueError, match="query=1 is no query of the decoder"):
        visualize.attention_of_patch(
            np.zeros((8, 8, 1)), mask, maps(), path, query=1, grid=(2, 2)
        )


def test_inter_block_weights_share_one_scale(drawn):
    figures, path = drawn
    first = np.array([[0.1, -0.2, 0.3], [0.0, 0.5, 0.0]])
    visualize.inter_block_weights(
        {"step 1": first, "step 2": -3 * first}, path, maps=(0, 2, 4)
    )
    images = [axes.get_images()[0] for axes in figures[0].axes[:2]]
    np.testing.assert_array_equal(images[0].get_array(), first)
    assert {image.get_clim() for image in images} == {(-1.5, 1.5)}
    ticks = [label.get_text() for label in figures[0].axes[0].get_xticklabels()]
    assert ticks == ["input", "2", "4"]
    assert figures[0].axes[0].get_ylabel() == "decoder block"
    rows = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert rows == ["1", "2"]


def test_one_mixture_for_all_decoder_blocks_is_no_mixture_of_the_first(drawn):
    figures, path = drawn
    visualize.inter_block_weights(
        {"MFF": np.array([[0.2, 0.8]])}, path, maps=(1, 12), blocks=("all",)
    )
    (row,) = figures[0].axes[0].get_yticklabels()
    assert row.get_text() == "all"


def test_a_matrix_of_likeness_is_drawn_from_0_to_1(drawn):
    figures, path = drawn
    visualize.likeness(
        np.array([[1.0, 0.2]]), path, title="CKA", rows="block", columns="other block"
    )
    axes = figures[0].axes[0]
    assert axes.get_images()[0].get_clim() == (0, 1)
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("block", "other block")


def test_a_grid_has_pictures_titles_and_names_where_they_belong(drawn):
    figures, path = drawn
    rows = [[np.full((4, 4, 3), 0.1 * (2 * i + j)) for j in range(2)] for i in range(2)]
    visualize.picture_grid(
        rows, path, columns=["left", "right"], names=["above", "below"],
        caption="what is to be known about these four pictures " * 3,
    )
    cells = figures[0].axes
    found = [axes.get_images()[0].get_array()[0, 0, 0] for axes in cells]
    np.testing.assert_allclose(found, [0, 0.1, 0.2, 0.3], atol=1e-6)
    assert [axes.get_title() for axes in cells] == ["left", "right", "", ""]
    assert [axes.get_ylabel() for axes in cells] == ["above", "", "below", ""]
    assert figures[0].get_supxlabel().count("\n") >= 2  # wrapped


def test_values_and_spreads_have_labelled_axes(drawn):
    figures, path = drawn
    visualize.values_over(
        {"a": ((0, 1), (2.0, 3.0))}, path, title="T", label="rank", axis="block"
    )
    visualize.spread_of(
        np.array([1.0, 2.0, 3.0]), path, marks={"truth": 2.5}, title="T", label="loss"
    )
    curve, histogram = (drawing.axes[0] for drawing in figures)
    assert (curve.get_xlabel(), curve.get_ylabel()) == ("block", "rank")
    np.testing.assert_array_equal(curve.lines[0].get_ydata(), [2, 3])
    assert [line.get_xdata()[0] for line in histogram.lines] == [2.0, 2.5]
    assert histogram.get_xlabel() == "loss"
