"""The notes of the ranks: who made a NaN that the first rank saw after the reduction."""

import time
from datetime import datetime, timezone

from gradwatch.record.events import CAME_WITH_REDUCTION
from gradwatch.record.folder.ranks import MOST_LINES, RankLog, RankNotes
from gradwatch.record.records import Event

MESSAGE = "NaN in the gradient of a."


def _event(step=5, rank=-1, kind="nan"):
    message = MESSAGE + (CAME_WITH_REDUCTION if rank < 0 else "")
    return Event(step, 1, kind, "a", "", 1.0, rank, message, 1, 0, "SGD")


def _session(number, seconds):
    started = datetime.fromtimestamp(time.time() + seconds, timezone.utc)
    return {"session": number, "started": started.isoformat(timespec="seconds")}


def test_an_event_gets_the_rank_that_noted_it(tmp_path):
    """The lowest of them, in the number and in the message."""
    for rank in (3, 1):
        RankLog(tmp_path, rank).note([_event(rank=rank)])
    notes = RankNotes(tmp_path, [_session(1, -60)])
    event = notes.traced(1, _event())
    assert (event.rank, event.message) == (1, f"{MESSAGE} It came from rank 1.")
    assert notes.traced(1, _event(step=6)).rank == -1
    assert notes.traced(1, _event(rank=0)).rank == 0


def test_notes_of_an_earlier_run_in_the_folder_do_not_count(tmp_path):
    """Steps are counted from 1 again, so the time says whose they are."""
    RankLog(tmp_path, 1).note([_event(rank=1)])
    notes = RankNotes(tmp_path, [_session(1, -3600), _session(2, 3600)])
    assert notes.traced(1, _event()).rank == 1
    assert notes.traced(2, _event()).rank == -1


def test_only_what_this_rank_made_is_noted(tmp_path):
    """Not what came with the reduction, and no event of another kind."""
    RankLog(tmp_path, 1).note([_event(), _event(rank=1, kind="exploding")])
    assert not (tmp_path / "ranks").exists()


def test_broken_lines_and_folders_are_left_out(tmp_path):
    """A line that was cut off by a kill, other content, and sessions without a time."""
    RankLog(tmp_path, 1).note([_event(rank=1)])
    with (tmp_path / "ranks" / "1.jsonl").open("ab") as file:
        file.write(
            b'[1]\n{"time": 1}\n{"time": 1.0, "rank": "x", "optimizer": "SGD", "step": 1}\n{"ti'
        )
    assert RankNotes(tmp_path, [_session(1, -60)]).traced(1, _event()).rank == 1
    assert RankNotes(tmp_path, [{"session": 1}]).traced(1, _event()).rank == -1
    assert RankNotes(tmp_path / "none", [_session(1, -60)]).traced(1, _event()).rank == -1


def test_a_disk_that_fails_costs_only_the_notes(tmp_path):
    """The training is not told."""
    (tmp_path / "ranks").write_text("in the way")
    RankLog(tmp_path, 1).note([_event(rank=1)])
    assert (tmp_path / "ranks").read_text() == "in the way"


def test_a_run_whose_every_step_is_bad_writes_a_bounded_file(tmp_path):
    """The first thousand are noted."""
    log = RankLog(tmp_path, 1)
    for step in range(MOST_LINES + 5):
        log.note([_event(step=step, rank=1)])
    assert len((tmp_path / "ranks" / "1.jsonl").read_text().splitlines()) == MOST_LINES


def test_notes_can_wait_for_the_first_step(tmp_path):
    """Nothing is made before; then all are there, with the time at which they were noted."""
    log = RankLog(tmp_path / "run", 1, waits=True)
    log.note([_event(rank=1)])
    assert list(tmp_path.iterdir()) == []
    log.begin()
    log.note([_event(step=6, rank=1)])
    notes = RankNotes(tmp_path / "run", [_session(1, -60)])
    assert [notes.traced(1, _event(step=step)).rank for step in (5, 6)] == [1, 1]
