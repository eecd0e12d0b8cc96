"""Where image tokens lie in the picture that is shown."""

from __future__ import annotations

from autotune.sights import NOWHERE, boxes


def test_one_grid_covers_the_picture_row_by_row() -> None:
    assert boxes(((2, 2),), by_picture=False) == [
        (0.0, 0.0, 0.5, 0.5),
        (0.5, 0.0, 0.5, 0.5),
        (0.0, 0.5, 0.5, 0.5),
        (0.5, 0.5, 0.5, 0.5),
    ]


def test_a_stitched_picture_lies_under_its_whole_view_and_its_newlines_nowhere() -> None:
    whole, stitched = boxes(((1, 1), (2, 3)), by_picture=True)[:1], boxes(((1, 1), (2, 3)), by_picture=True)[1:]
    assert whole == [(0.0, 0.0, 1.0, 1.0)]
    assert [box == NOWHERE for box in stitched] == [False, False, True] * 2
    assert stitched[4] == (0.5, 0.5, 0.5, 0.5)


def test_of_tiles_only_the_thumbnail_is_known_to_lie_anywhere() -> None:
    found = boxes(((1, 2), (1, 2), (1, 2)), by_picture=False)
    assert found[:4] == [NOWHERE] * 4
    assert found[4:] == [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 0.5, 1.0)]


def test_a_picture_that_is_not_tiled_has_one_newline() -> None:
    assert boxes(((1, 2), (1, 1)), by_picture=True)[-1] == NOWHERE
