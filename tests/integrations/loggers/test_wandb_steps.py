"""Where rows of ours go: none of the user's is lost by them, and all of ours are there at the end."""

import random

import pytest

pytest.importorskip("wandb", reason="NOT TESTED: the rows of WandbSink, without wandb")

from gradwatch_loggers.wandb_steps import RunSteps
from tests.support.wandb_runs import Keeps, rows, run_in

OURS, HIS = "gradwatch/x", "his"


class Both:
    """A run of W&B with rows of ours, and the same run without them."""

    def __init__(self, live=None, step=0, log=None):
        self.alone, self.kept = Keeps(step), Keeps(step)
        self.steps = RunSteps(log or self.kept.log, lambda: self.kept.step, live)
        self.raised = []
        self.steps.shifted = lambda step, raised: self.raised.append((step, raised))
        self.logged = self.added = 0

    def add(self):
        """One step of the training."""
        self.added += 1
        self.steps.add("gradwatch/step", self.added, {OURS: self.added / 3})

    def log(self, step=None, commit=None):
        """One row of the user's."""
        self.logged += 1
        data = {f"{HIS}{self.logged}": self.logged}
        self.alone.log(data, step, commit)
        ours, number = self.steps.before(step, commit)
        self.kept.log({**ours, **data}, number, commit)
        if ours:
            self.steps.rows.drop_first()
        self.steps.after(number, commit, bool(ours))

    def end(self):
        """The run ends."""
        self.steps.write()
        self.alone.close(0)
        self.kept.close(0)

    def his(self, run):
        """What is left of the user's rows, by row."""
        found = [{key: row[key] for key in row if key.startswith(HIS)} for row in run.rows]
        return list(filter(None, found))

    def steps_of_his(self, run):
        return [row["_step"] for row in run.rows if any(key.startswith(HIS) for key in row)]

    def ours(self):
        return [(row["gradwatch/step"], row[OURS]) for row in self.kept.rows if OURS in row]


def explicit(start, stride=1, factor=1):
    """The user counts the steps himself."""

    def log(both, step):
        if step % stride == 0:
            both.log(step=start + step * factor)

    return log


def every(stride, **arguments):
    """The user leaves the step to W&B."""

    def log(both, step):
        if step % stride == 0:
            both.log(**arguments)

    return log


def twice(both, step):
    """The same step again, for the accuracy."""
    both.log(step=step)
    both.log(step=step)


def in_parts(both, step):
    """A row in two parts."""
    both.log(commit=False)
    both.log()


def committed(both, step):
    """The row is closed at once."""
    both.log(step=step, commit=True)


def backwards(both, step):
    """All but the first row are dropped by W&B."""
    both.log(step=40 - step)


def by_epochs(both, step):
    """The user counts slower than the optimizer."""
    if step % 10 == 0:
        both.log(step=step // 10)


COUNTED = {
    "from 1": explicit(0),
    "from 0": explicit(-1),
    "from 1000": explicit(1_000),
    "every 10th": explicit(0, stride=10),
    "samples": explicit(0, factor=32),
    "epochs": by_epochs,
    "twice": twice,
    "committed": committed,
    "backwards": backwards,
    "nothing": lambda both, step: None,
}
UNCOUNTED = {
    "each step": every(1),
    "every 10th": every(10),
    "in parts": in_parts,
    "never committed": every(1, commit=False),
}


@pytest.mark.parametrize("logs_first", [True, False], ids=["before the step", "after it"])
@pytest.mark.parametrize("start", [0, 500])
@pytest.mark.parametrize("how", COUNTED)
def test_who_counts_himself_keeps_his_rows_and_their_steps(how, start, logs_first):
    """They are what they are without us; all of ours are there, in order."""
    both = Both(step=start)
    for step in range(1, 31):
        if logs_first:
            COUNTED[how](both, step)
        both.add()
        if not logs_first:
            COUNTED[how](both, step)
    both.end()
    assert both.his(both.kept) == both.his(both.alone)
    assert both.steps_of_his(both.kept) == both.steps_of_his(both.alone)
    assert both.ours() == [(step, step / 3) for step in range(1, 31)]
    assert both.raised == []


@pytest.mark.parametrize("live", [None, True, False])
@pytest.mark.parametrize("how", UNCOUNTED)
def test_who_leaves_the_step_to_wandb_keeps_his_rows(how, live):
    """They are what they are without us, in the same order; all of ours are there, in order."""
    both = Both(live)
    for step in range(1, 31):
        both.add()
        UNCOUNTED[how](both, step)
    both.end()
    assert both.his(both.kept) == both.his(both.alone)
    assert both.ours() == [(step, step / 3) for step in range(1, 31)]


@pytest.mark.parametrize("how", ["from 1", "from 0", "from 1000", "every 10th", "samples", "twice"])
def test_who_counts_steps_sees_ours_at_once(how):
    """After his row none of ours waits that came before it."""
    both = Both()
    for step in range(1, 31):
        both.add()
        COUNTED[how](both, step)
        if step % 10 == 0:
            assert len(both.steps.rows) == 0


def test_rows_stand_at_the_step_that_they_have():
    """Where the user counts the optimizer's steps from 1, the step of W&B is that of ours."""
    both = Both()
    for step in range(1, 31):
        both.add()
        COUNTED["every 10th"](both, step)
    both.end()
    found = [(row["_step"], row["gradwatch/step"]) for row in both.kept.rows if OURS in row]
    assert found == [(step, step) for step in range(1, 31)]


def test_who_never_counts_sees_ours_at_once_after_his_second_row():
    """Of those that find no place in his rows, at most the newest waits."""
    both = Both()
    for step in range(1, 41):
        both.add()
        UNCOUNTED["every 10th"](both, step)
        if step > 20:
            assert len(both.steps.rows) <= 1


def test_nothing_is_written_before_it_is_known_how_the_user_counts():
    """Unless he says that he does not."""
    for live, waiting in ((None, 30), (False, 30), (True, 1)):
        both = Both(live)
        for _ in range(30):
            both.add()
        assert len(both.steps.rows) == waiting


def test_a_step_that_comes_late_is_raised():
    """Who counts after all loses no row; the distances between his steps stay."""
    both = Both()
    for step in range(1, 31):
        both.add()
        if step % 10 == 0:
            both.log()
    for step in (3, 3, 4, 9, 200):
        both.add()
        both.log(step=step)
    both.end()
    assert both.his(both.kept) == both.his(both.alone)
    debt = both.raised[0][1] - 3
    assert debt > 0
    assert [pair for pair in both.raised if pair[1] - pair[0] != debt] == []
    assert both.steps_of_his(both.kept)[-1] == 200
    assert both.ours() == [(step, step / 3) for step in range(1, 36)]


def test_another_process_may_raise_the_step(monkeypatch):
    """W&B is asked for it, so that none of ours goes into a row that is dropped."""
    monkeypatch.setattr("gradwatch_loggers.wandb_steps.LOOK_SECONDS", 0.0)
    both = Both()
    for step in range(1, 31):
        both.add()
        both.kept.log({"other": step}, step=2 * step)  # which we do not see
        both.log(step=step)
    both.end()
    assert both.ours() == [(step, step / 3) for step in range(1, 31)]


def test_a_row_that_is_not_taken_is_not_lost():
    """It is written with the next one, and what came meanwhile can be passed again."""
    broken = []

    def log(data, step=None, commit=None):
        if broken:
            raise ConnectionError("gone")
        both.kept.log(data, step, commit)

    both = Both(live=True, log=log)
    both.add()
    broken.append(True)
    with pytest.raises(ConnectionError):
        both.add()
    broken.clear()
    both.added -= 1
    both.add()
    both.end()
    assert both.ours() == [(1, 1 / 3), (2, 2 / 3)]


def wild(chance, both):
    """Anything that a user may do at one step."""
    for _ in range(chance.randint(0, 2)):
        step = chance.choice([None, None, both.added, both.added // 4, both.added * 2, 7])
        both.log(step=step, commit=chance.choice([None, None, None, False, True]))


@pytest.mark.parametrize("live", [None, True, False])
def test_whatever_the_user_logs_his_rows_are_the_same(live):
    """In 600 runs of any logs whatever: what is in one row without us is in one row with us."""
    for seed in range(200):
        chance, both = random.Random(seed), Both(live, step=seed % 3 * 100)
        for _ in range(chance.randint(1, 40)):
            both.add()
            wild(chance, both)
        both.end()
        assert both.his(both.kept) == both.his(both.alone), seed
        assert both.ours() == [(step, step / 3) for step in range(1, both.added + 1)], seed


def test_wandb_keeps_what_these_tests_say(tmp_path):
    """The rows of a real run are those of the model of W&B that the tests above stand on."""
    chance, model = random.Random(0), Keeps()
    with run_in(tmp_path) as run:
        for number in range(200):
            step = chance.choice([None, None, number, number // 2])
            commit = chance.choice([None, None, False, True])
            run.log({f"k{number}": number}, step=step, commit=commit)
            model.log({f"k{number}": number}, step, commit)
        model.close(0)
    found = [{key: row[key] for key in row if not key.startswith("_")} for row in rows(tmp_path)]
    assert found == [{key: row[key] for key in row if key != "_step"} for row in model.rows]
    assert [row["_step"] for row in rows(tmp_path)] == [row["_step"] for row in model.rows]
