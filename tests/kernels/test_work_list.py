"""What a plan comes to as tiles and entries."""

from __future__ import annotations

import numpy
import torch

from weft.kernels.plan import PagedAdapter, Span, build_plan
from weft.kernels.work_list import HEADER, ROWS_AT, SCALES_AT, SITES_AT, TILE, Room, WorkList, make_work_list

ONE = PagedAdapter(((1, 2), (4, 6)), 0.5, frozenset([0, 33]))
TWO = PagedAdapter(((7, 8),), 2.0, frozenset([1]))


def work_of(*spans: Span) -> WorkList:
    plan = build_plan(spans, torch.device("cpu"))
    assert plan is not None
    return make_work_list(plan)


def test_rows_that_use_the_same_adapters_share_tiles() -> None:
    work = work_of((1, [(ONE, 1.0)]), (2, []), (20, [(TWO, 1.0)]), (1, [(ONE, -1.0)]))
    assert work.rows[0].tolist() == [0, 23, *[-1] * 14]
    assert work.rows[1].tolist() == list(range(3, 19))
    assert work.rows[2].tolist() == [19, 20, 21, 22, *[-1] * 12]
    assert work.tile.tolist() == [0, 0, 1, 2]
    assert work.bounds.tolist() == [0, 2, 3, 4]


def test_pages_go_in_pairs_an_odd_one_with_page_0() -> None:
    assert work_of((1, [(ONE, 1.0)])).pages.tolist() == [[1, 4], [5, 0]]


def test_each_row_has_its_own_scale() -> None:
    work = work_of((1, [(ONE, 1.0), (TWO, 3.0)]), (2, [(ONE, -1.0), (TWO, 1.0)]))
    assert work.scales[:, :4].tolist() == [[0.5, -0.5, -0.5, 0.0], [0.5, -0.5, -0.5, 0.0], [6.0, 2.0, 2.0, 0.0]]


def test_it_is_laid_out_in_a_room_that_may_be_larger() -> None:
    work = work_of((1, [(ONE, 1.0)]), (1, [(TWO, 1.0)]))
    assert work.room == Room(entries=3, tiles=2, sites=34)
    room = Room(entries=5, tiles=4, sites=70)
    assert room.holds(work.room)
    assert not work.room.holds(room)
    numbers = numpy.full(room.size, -7, numpy.int32)
    assert work.write(numbers, room) == room.entries_at + 3 * room.record
    assert numbers[:2].tolist() == [3, 2]
    entry = numbers[room.entries_at : room.entries_at + room.record]
    assert entry[:3].tolist() == [0, 1, 4]
    assert entry[ROWS_AT : ROWS_AT + 2].tolist() == [0, -1]
    assert entry[SCALES_AT:SITES_AT].view(numpy.float32)[0] == 0.5
    assert entry[SITES_AT:].tolist() == [1, 2, 0]
    tile = numbers[HEADER:]
    assert tile[:3].tolist() == [0, 2, 0]
    assert tile[2 + TILE : 5 + TILE].tolist() == [2, 3, 1]


def test_an_adapter_without_rank_rows_makes_no_entry() -> None:
    work = work_of((2, [(PagedAdapter((), 1.0, frozenset()), 1.0)]))
    assert work.room.entries == 0
    assert work.bounds.tolist() == [0, 0]
    work.write(numpy.zeros(work.room.size, numpy.int32), work.room)
