"""GradientMonitor(accumulate=): the policy decides, and the Trainer's number follows it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LearningRateMonitor,
    StochasticWeightAveraging,
)
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from gradwatch import AccumulateByNoiseScale
from gradwatch_lightning import GradientMonitor

# Lightning 2.4 runs the batch after which the checkpoint was written once more, and counts it twice.
resumes_exactly = pytest.mark.skipif(
    not hasattr(_TrainingEpochLoop, "restarted_on_train_batch_end"),
    reason="this Lightning resumes one batch too early",
)


class Numbers(Callback):
    """The number that Lightning divides each loss by, one per batch."""

    def __init__(self):
        self.divisors = []
        self.starts = []

    def on_train_start(self, trainer, pl_module):
        self.starts.append(trainer.accumulate_grad_batches)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.divisors.append(trainer.accumulate_grad_batches)


class Save(Callback):
    """Writes a checkpoint after so many batches of the first epoch."""

    def __init__(self, path, batches):
        self.path, self.batches = path, batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx + 1) == (0, self.batches):
            trainer.save_checkpoint(self.path)


class Follow:
    """A policy of the user's own: a list of numbers, each for one window, the last for all others."""

    def __init__(self, *numbers, lr_factor=1.0):
        self.numbers = numbers
        self.micro_batches = numbers[0]
        self.most = max(numbers)
        self.lr_factor = lr_factor

    def looks_at(self, step):
        return False

    def decide(self, step, noise):
        self.micro_batches = self.numbers[min(step, len(self.numbers) - 1)]
        return self.micro_batches

    def state_dict(self):
        return {"micro_batches": self.micro_batches}

    def load_state_dict(self, state):
        self.micro_batches = state["micro_batches"]


class Resumable:
    """Batches that a run resumed in the middle of an epoch goes on with, where the other stopped."""

    def __init__(self, loader):
        self.batches = list(loader)
        self.done = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.done %= len(self.batches)
        while self.done < len(self.batches):
            self.done += 1
            yield self.batches[self.done - 1]

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


def checked(net):
    """Makes a module that compares the gradient of each window with that of its batches at once."""

    class Checked(net):
        def __init__(self, *args):
            super().__init__(*args)
            self.window, self.off, self.sizes = [], [], []

        def training_step(self, batch, batch_idx):
            self.window.append(batch)
            return super().training_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer):
            twins = {
                n: p.detach().clone().requires_grad_() for n, p in self.body.named_parameters()
            }
            losses = [
                (functional_call(self.body, twins, (x,)) - y).square().mean()
                for x, y in self.window
            ]
            wanted = torch.autograd.grad(torch.stack(losses).mean(), list(twins.values()))
            pairs = zip(wanted, self.body.parameters(), strict=True)
            self.off.append(max(float((w - p.grad).abs().max()) for w, p in pairs))
            self.sizes.append(len(self.window))
            self.window = []

    return Checked()


def known_noise(kit, noise_scale, batches, batch_size=4, size=64):
    """Makes a module and batches whose gradients are draws around a known one."""

    class Known(kit.Net):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(size // 2))] * 1)
            self.more = torch.nn.Parameter(torch.zeros(size // 2))

        def loss(self, batch):
            return (torch.cat([self.body[0], self.more]) * batch[0]).sum(1).mean()

        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    generator = torch.Generator().manual_seed(5)
    gradient = torch.randn(size, generator=generator)
    noise = torch.randn(batches * batch_size, size, generator=generator)
    draws = gradient / gradient.norm() + noise * math.sqrt(noise_scale / size)
    return Known(), DataLoader(TensorDataset(draws), batch_size=batch_size)


def test_a_schedule_is_followed(kit):
    """{0: 2, 2: 4, 3: 1} gives two windows of 2, one of 4, and windows of 1 from then on."""
    monitor, numbers = GradientMonitor(accumulate={0: 2, 2: 4, 3: 1}), Numbers()
    trainer = kit.trainer(monitor, numbers)

    trainer.fit(kit.Net(), kit.loader(10))

    assert monitor.history.steps().micro_batches.tolist() == [2, 2, 4, 1, 1]
    assert numbers.divisors == [2] * 4 + [4] * 4 + [1] * 2
    assert [(e.kind, e.step, e.value) for e in monitor.events] == [
        ("accumulate", 3, 4.0),
        ("accumulate", 4, 1.0),
    ]
    assert trainer.accumulate_grad_batches == 1


def test_a_function_of_the_step_is_followed(kit):
    """A callable is asked before each window."""
    monitor = GradientMonitor(accumulate=lambda step: 1 if step < 4 else 2)

    kit.trainer(monitor).fit(kit.Net(), kit.loader(8))

    assert monitor.history.steps().micro_batches.tolist() == [1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("policy", "windows"),
    [
        ({0: 2, 1: 4}, [2, 2, 4, 4, 4]),  # after 2 batches no window of 4 can begin, after 4 it can
        ({0: 3, 1: 4}, [3, 3, 3, 3, 4]),
        ({0: 4, 1: 2, 2: 8}, [4, 2, 2, 8]),
        (Follow(1, 4, 2, 3), [1, 1, 2, 2, 3, 3, 3]),
    ],
)
def test_every_full_window_is_the_mean_over_its_batches(kit, policy, windows):
    """A number waits for a batch that is divisible by it: no loss is divided by another number than its window has."""
    module, monitor, numbers = checked(kit.Net), GradientMonitor(accumulate=policy), Numbers()

    kit.trainer(monitor, numbers).fit(module, kit.loader(sum(windows)))

    assert monitor.history.steps().micro_batches.tolist() == windows
    assert module.sizes == windows
    assert max(module.off) < 1e-6
    assert numbers.divisors == [size for size in windows for _ in range(size)]


def test_the_end_of_an_epoch_lets_any_number_begin(kit):
    """7 batches by 2 end with a window of 1; the next epoch begins with the new number at once."""
    monitor, numbers = GradientMonitor(accumulate={0: 2, 4: 3}), Numbers()

    kit.trainer(monitor, numbers, max_epochs=2).fit(kit.Net(), kit.loader(7))

    assert monitor.history.steps().micro_batches.tolist() == [2, 2, 2, 1, 3, 3, 1]
    assert numbers.divisors == [2] * 7 + [3] * 7


def test_limit_train_batches_ends_an_epoch(kit):
    """The last batch that limit_train_batches allows is the end of an epoch too."""
    monitor = GradientMonitor(accumulate={0: 2, 3: 3})
    options = {"max_epochs": 2, "limit_train_batches": 5}

    kit.trainer(monitor, **options).fit(kit.Net(), kit.loader(7))

    assert monitor.history.steps().micro_batches.tolist() == [2, 2, 1, 3, 2]


def test_validation_between_the_batches_changes_nothing(kit):
    """Lightning clears gradients before a validation between two windows, and never within one."""
    module, monitor = checked(kit.Net), GradientMonitor(accumulate={0: 2, 1: 4, 3: 1})
    options = {"val_check_interval": 1, "num_sanity_val_steps": 0}

    kit.trainer(monitor, **options).fit(module, kit.loader(10), kit.loader(1))

    assert module.sizes == monitor.history.steps().micro_batches.tolist() == [2, 2, 4, 1, 1]
    assert max(module.off) < 1e-6


def test_a_step_that_the_scaler_leaves_out_counts_as_a_step(kit):
    """An overflow ends its window too; Lightning's windows stay whole."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    monitor, numbers = GradientMonitor(accumulate={0: 2, 1: 4}), Numbers()

    kit.trainer(monitor, numbers, plugins=[plugin]).fit(kit.Net(), kit.loader(12, poison=1))

    steps = monitor.history.steps()
    assert steps.outcome.tolist() == ["skipped_scaler", "applied", "applied", "applied"]
    assert steps.micro_batches.tolist() == [2, 2, 4, 4]
    assert numbers.divisors == [2] * 4 + [4] * 8


def test_weights_are_those_of_the_trainers_own_accumulation(kit):
    """accumulate={0: 2} trains bit for bit what Trainer(accumulate_grad_batches=2) trains."""
    ours, theirs = kit.Net(), kit.Net()

    kit.trainer(GradientMonitor(accumulate={0: 2})).fit(ours, kit.loader(7))
    kit.trainer(accumulate_grad_batches=2).fit(theirs, kit.loader(7))

    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_auto_follows_the_noise_scale(kit):
    """With a noise scale of 12 micro-batches the number grows from 2, one factor of two at a time, to 8 or 16."""
    policy = AccumulateByNoiseScale(min=2, max=32, every=5, min_updates=20)
    module, batches = known_noise(kit, noise_scale=48.0, batches=800)
    monitor, numbers = GradientMonitor(accumulate=policy, buffer_size=4096), Numbers()

    kit.trainer(monitor, numbers).fit(module, batches)

    noise, steps = monitor.noise_scale, monitor.history.steps()
    assert noise.valid
    assert noise.b_simple == pytest.approx(12.0, rel=0.2)
    assert numbers.divisors[0] == 2
    assert numbers.divisors[-1] in (8, 16)
    assert steps.micro_batches.iloc[-2] == numbers.divisors[-1]
    changes = [event for event in monitor.events if event.kind == "accumulate"]
    assert [event.value for event in changes[:2]] == [4.0, 8.0]
    assert "noise scale" in changes[0].message


def test_auto_by_name(kit):
    """accumulate="auto" begins with two micro-batches per step."""
    monitor = GradientMonitor(accumulate="auto")

    kit.trainer(monitor).fit(kit.Net(), kit.loader(6))

    assert monitor.history.steps().micro_batches.tolist() == [2, 2, 2]
    assert monitor.noise_scale.updates == 3
    assert "20 windows are needed" in monitor.noise_scale.reason


def test_the_learning_rate_follows_during_the_step_only(kit):
    """scale_lr changes the rate of the step; the scheduler and LearningRateMonitor see their own."""

    class Scheduled(kit.Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    plain, scaled = kit.CapturingLogger(), kit.CapturingLogger()
    without, monitor = (
        GradientMonitor(accumulate=Follow(2, lr_factor=factor)) for factor in (1.0, 4.0)
    )
    for one, logger in ((without, plain), (monitor, scaled)):
        rates = LearningRateMonitor(logging_interval="step")
        trainer = kit.trainer(one, rates, logger=logger)
        trainer.fit(Scheduled(), kit.loader(6))

    assert without.history.steps().lr.tolist() == pytest.approx([0.1, 0.05, 0.025])
    assert monitor.history.steps().lr.tolist() == pytest.approx([0.4, 0.2, 0.1])
    assert scaled.of("lr-SGD") == plain.of("lr-SGD")
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0125)


def test_an_error_in_the_step_leaves_the_learning_rate(kit):
    """What raises while the rate is scaled, inside the closure, leaves it as the user had set it."""

    class Raises(kit.Net):
        def on_before_optimizer_step(self, optimizer):
            raise RuntimeError(f"at a rate of {optimizer.param_groups[0]['lr']}")

    trainer = kit.trainer(GradientMonitor(accumulate=Follow(2, lr_factor=4.0)))
    with pytest.raises(RuntimeError, match=r"at a rate of 0\.2"):
        trainer.fit(Raises(), kit.loader(2))

    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05
    assert trainer.accumulate_grad_batches == 1


def test_changes_and_the_batch_are_logged(kit):
    """micro_batches is logged at each step while the monitor accumulates."""
    monitor, logger = GradientMonitor(accumulate={0: 1, 2: 2}), kit.CapturingLogger()

    kit.trainer(monitor, logger=logger).fit(kit.Net(), kit.loader(6))

    assert logger.of("gradwatch/micro_batches") == [(0, 1), (1, 1), (2, 2), (3, 2)]


def test_estimated_stepping_batches_goes_by_the_first_number(kit):
    """Eight batches by two are four steps, as configure_optimizers is told."""
    told = []

    class Asks(kit.Net):
        def configure_optimizers(self):
            told.append(self.trainer.estimated_stepping_batches)
            return super().configure_optimizers()

    kit.trainer(GradientMonitor(accumulate={0: 2})).fit(Asks(), kit.loader(8))

    assert told == [4]


def test_another_callback_may_take_the_number_over(kit):
    """A number that someone else has set is left alone, until it is the monitor's again."""

    class TakesOver(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            trainer.accumulate_grad_batches = 3 if trainer.current_epoch == 1 else 2

    monitor, numbers = GradientMonitor(accumulate={0: 2, 4: 1}), Numbers()
    kit.trainer(monitor, TakesOver(), numbers, max_epochs=3).fit(kit.Net(), kit.loader(6))

    assert numbers.divisors == [2] * 6 + [3] * 6 + [2] * 2 + [1] * 4


def test_stochastic_weight_averaging_works(kit):
    """StochasticWeightAveraging has it for its last epoch; the monitor does not touch it there."""

    class Normed(kit.Net):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Sequential(
                torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1)
            )

    monitor, numbers = GradientMonitor(accumulate={0: 2}), Numbers()
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    trainer = kit.trainer(monitor, averaging, numbers, max_epochs=2)

    trainer.fit(Normed(), kit.loader(4))

    assert monitor.history.steps().micro_batches.tolist()[:4] == [2, 2, 2, 2]
    assert numbers.divisors == [2] * 8 + [5] * 4


# -- a second life ---------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [{0: 2, 3: 4}, Follow(2, 2, 2, 4)])
def test_a_fit_resumed_after_an_epoch_goes_on_with_its_number(kit, tmp_path, policy):
    """The resumed run uses the number of the run before from its first window on."""
    trainer = kit.trainer(GradientMonitor(accumulate=copy.deepcopy(policy)))
    trainer.fit(kit.Net(), kit.loader(8))
    trainer.save_checkpoint(tmp_path / "epoch.ckpt")

    resumed, numbers = GradientMonitor(accumulate=policy), Numbers()
    kit.trainer(resumed, numbers, max_epochs=2).fit(
        kit.Net(), kit.loader(8), ckpt_path=tmp_path / "epoch.ckpt"
    )

    assert numbers.starts == [4]
    assert resumed.history.steps().micro_batches.tolist() == [4, 4]
    assert [event.kind for event in resumed.events] == []


@resumes_exactly
@pytest.mark.parametrize(("batches", "steps_done"), [(2, 1), (4, 2), (8, 3), (10, 4)])
def test_a_fit_resumed_in_the_middle_of_an_epoch_has_the_same_windows(
    kit, tmp_path, batches, steps_done
):
    """A checkpoint of any step, also one whose next number still waits, gives the rest of the uninterrupted run."""
    policy, whole = {0: 2, 1: 4, 3: 2}, []
    for path in (None, tmp_path / "middle.ckpt"):
        monitor = GradientMonitor(accumulate=policy)
        trainer = kit.trainer(monitor, Save(tmp_path / "middle.ckpt", batches), max_epochs=2)
        trainer.fit(kit.Net(), Resumable(kit.loader(14)), ckpt_path=path)
        whole.append(monitor.history.steps())

    expected, steps = whole[0].iloc[steps_done:], whole[1]
    assert whole[0].micro_batches.tolist() == [2, 2, 4, 2, 2, 2, *[2] * 7]
    assert steps.micro_batches.tolist() == expected.micro_batches.tolist()
    assert list(steps.index) == list(expected.index)
    assert steps.grad_norm.tolist() == expected.grad_norm.tolist()
    assert steps.noise_scale.tolist() == pytest.approx(expected.noise_scale.tolist(), nan_ok=True)


@resumes_exactly
def test_a_fit_resumed_in_the_middle_of_a_window_says_what_was_lost(kit, tmp_path):
    """A checkpoint between two steps goes on with its number; the gradients of its window are a dropped event."""
    save = Save(tmp_path / "middle.ckpt", 5)
    kit.trainer(GradientMonitor(accumulate={0: 4}), save).fit(kit.Net(), Resumable(kit.loader(12)))
    resumed, numbers = GradientMonitor(accumulate={0: 4}), Numbers()
    with pytest.warns(UserWarning, match="micro-batch"):
        kit.trainer(resumed, numbers).fit(
            kit.Net(), Resumable(kit.loader(12)), ckpt_path=tmp_path / "middle.ckpt"
        )

    assert numbers.starts == [4]
    assert resumed.history.steps().micro_batches.tolist() == [3, 4]
    assert [event.kind for event in resumed.events] == ["dropped"]


def test_a_second_fit_with_a_new_trainer_begins_anew(kit):
    """A monitor that is used again begins with its first number; a Trainer that goes on keeps its own."""
    monitor, numbers = GradientMonitor(accumulate=Follow(2, 2, 4)), Numbers()
    trainer = kit.trainer(monitor, numbers)
    trainer.fit(kit.Net(), kit.loader(8))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(kit.Net(), kit.loader(8))
    kit.trainer(monitor, numbers).fit(kit.Net(), kit.loader(8))

    assert numbers.starts == [2, 4, 2]
    assert monitor.history.steps().micro_batches.tolist() == [2, 2, 4]


def test_a_copy_begins_anew(kit):
    """A deepcopy of a monitor has a policy of its own, at its first number."""
    monitor = GradientMonitor(accumulate=Follow(2, 4))
    kit.trainer(monitor).fit(kit.Net(), kit.loader(4))
    twin = copy.deepcopy(monitor)
    kit.trainer(twin).fit(kit.Net(), kit.loader(4))

    assert twin.history.steps().micro_batches.tolist() == [2, 2]


# -- conflicts -------------------------------------------------------------------------------------


def test_two_numbers_are_refused(kit):
    """accumulate= and Trainer(accumulate_grad_batches=) together are refused, and the Trainer keeps its own."""
    monitor = GradientMonitor(accumulate="auto")
    kit.trainer(monitor).fit(kit.Net(), kit.loader(2))
    trainer, numbers = kit.trainer(monitor, accumulate_grad_batches=4), Numbers()

    with pytest.raises(ValueError, match="would both decide how many") as caught:
        trainer.fit(kit.Net(), kit.loader(2))

    text = str(caught.value)
    assert "GradientMonitor(accumulate=AccumulateByNoiseScale(min=2" in text
    assert "Trainer(accumulate_grad_batches=4)" in text
    assert "leave accumulate out of GradientMonitor" in text
    assert "remove accumulate_grad_batches" in text
    assert trainer.accumulate_grad_batches == 4
    assert numbers.divisors == []


def test_a_scheduler_of_lightnings_is_refused(kit):
    """GradientAccumulationScheduler is the other owner of the number."""
    monitor, scheduler = GradientMonitor(accumulate={0: 2}), GradientAccumulationScheduler({1: 2})

    with pytest.raises(
        ValueError, match=r"a GradientAccumulationScheduler would both.*remove that"
    ):
        kit.trainer(monitor, scheduler).fit(kit.Net(), kit.loader(2))


def test_manual_optimization_is_refused(kit):
    """In manual optimization the Trainer accumulates nothing."""
    with pytest.raises(ValueError, match="Gan sets automatic_optimization = False") as caught:
        kit.trainer(GradientMonitor(accumulate={0: 2})).fit(kit.Gan(), kit.loader(2))

    assert "Leave accumulate out" in str(caught.value)


def test_a_strategy_that_accumulates_by_itself_is_refused(kit):
    """A strategy as DeepSpeed's was told its number when it was set up."""

    class Accumulates(SingleDeviceStrategy):
        @property
        def handles_gradient_accumulation(self):
            return True

    trainer = kit.trainer(GradientMonitor(accumulate={0: 2}), strategy=Accumulates("cpu"))
    with pytest.raises(ValueError, match="but Accumulates accumulates by itself"):
        trainer.fit(kit.Net(), kit.loader(2))


def test_a_policy_that_would_blind_itself_is_refused(kit):
    """min=1 on one process would never see a noise scale again."""
    policy = AccumulateByNoiseScale(min=1)

    with pytest.raises(ValueError, match="Write min=2"):
        kit.trainer(GradientMonitor(accumulate=policy)).fit(kit.Net(), kit.loader(2))
