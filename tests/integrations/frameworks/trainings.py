"""A small training in each framework, with a place for the watcher, and a batch that may be bad.

Frameworks are imported by the training that needs them.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import gradwatch

ROWS, BATCH, BAD_ROW = 88, 8, 30  # the bad row is example 6 of batch 4


@dataclass
class Watching:
    """Watches a training, or not.

    Attributes:
        watches: Whether it is watched.
        options: Those of `gradwatch.watch()`.
        folder: For what the framework writes.
        watcher: The watcher.
        scale: Returns the loss scale; a training that has one sets it.
    """

    watches: bool
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)
    watcher: gradwatch.Watcher | None = None
    scale: Callable[[], float] = lambda: 1.0

    def begin(self, model: Any, optimizer: Any = None) -> None:
        """Begin to watch."""
        if self.watches:
            self.watcher = gradwatch.watch(model, optimizer, **self.options).attach()

    def scale_now(self) -> float:
        """Return the loss scale of the training."""
        return self.scale()

    def end(self) -> None:
        """End it."""
        if self.watcher is not None:
            self.watcher.close()

    @contextmanager
    def block(self, model: Any, optimizer: Any = None) -> Iterator[None]:
        """Watch in a block."""
        self.begin(model, optimizer)
        yield
        self.end()


def net() -> nn.Sequential:
    """Return a perceptron with dropout, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))


def data(bad: bool = False) -> tuple[Tensor, Tensor]:
    """Return inputs ``[88, 4]`` and their sums, one input of which may be NaN."""
    x = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(1))
    y = x.sum(1, keepdim=True)
    if bad:
        x[BAD_ROW, 1] = math.nan
    return x, y


def batches(bad: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Return the data in batches of 8."""
    x, y = data(bad)
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


# -- ignite ----------------------------------------------------------------------------------------


def ignite(
    watching: Watching, bad: bool = False, accumulate: int = 1, scaled: bool = False
) -> nn.Module:
    """Its own update function."""
    from ignite.engine import create_supervised_trainer

    model, amp = net(), {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if scaled:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        watching.scale, amp = scaler.get_scale, {"amp_mode": "amp", "scaler": scaler}
    trainer = create_supervised_trainer(
        model, optimizer, mse_loss, gradient_accumulation_steps=accumulate, **amp
    )
    with watching.block(model, optimizer):
        trainer.run(batches(bad), max_epochs=2)
    return model


def ignite_engine(watching: Watching, bad: bool = False, notes: bool = False) -> nn.Module:
    """One of the user's, which clips."""
    from ignite.engine import Engine

    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def update(engine: Any, batch: Any) -> float:
        model.train()
        optimizer.zero_grad()
        x, y = batch
        loss = mse_loss(model(x), y)
        loss.backward()
        if notes and watching.watcher is not None:
            watching.watcher.note_loss(loss, divisor=None)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        return loss.item()

    with watching.block(model, optimizer):
        Engine(update).run(batches(bad), max_epochs=2)
    return model


# -- skorch ----------------------------------------------------------------------------------------


def skorch(watching: Watching, bad: bool = False, clip: float | None = None) -> nn.Module:
    """A closure for each step."""
    from skorch import NeuralNetRegressor
    from skorch.callbacks import Callback, GradientNormClipping

    class Gradients(Callback):
        def on_train_begin(self, net: Any, **kwargs: Any) -> None:
            watching.begin(net.module_, net.optimizer_)

        def on_train_end(self, net: Any, **kwargs: Any) -> None:
            watching.end()

    regressor = NeuralNetRegressor(
        net(),
        max_epochs=2,
        lr=0.05,
        batch_size=BATCH,
        train_split=None,
        callbacks=[GradientNormClipping(clip), Gradients()],
        verbose=0,
    )
    torch.manual_seed(0)
    regressor.fit(*data(bad))
    model: nn.Module = regressor.module_
    return model


# -- Stable-Baselines3 -----------------------------------------------------------------------------


def stable_baselines3(watching: Watching, bad: bool = False, algorithm: str = "PPO") -> nn.Module:
    """Steps that are clipped (PPO, A2C, DQN), or of several optimizers (SAC, TD3)."""
    import gymnasium
    import stable_baselines3

    class Line(gymnasium.Env):  # type: ignore[misc]
        """Two numbers that want to be zero."""

        observation_space = gymnasium.spaces.Box(-5, 5, (2,))
        action_space: Any = gymnasium.spaces.Box(-1, 1, (1,))
        steps = 0

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            self.at, self.time = np.float32([1, -1]), 0
            return self.at, {}

        def step(self, action: Any) -> Any:
            self.steps += 1
            self.time += 1
            self.at = np.float32(0.9 * self.at + 0.1 * float(np.ravel(action)[0]))
            # Into the second of four collections.
            reward = math.nan if bad and self.steps == 100 else -float(np.abs(self.at).sum())
            return self.at, reward, False, self.time >= 20, {}

    environment, few = Line(), {"learning_starts": 20, "batch_size": 8}
    if algorithm == "DQN":
        environment.action_space = gymnasium.spaces.Discrete(2)
    settings = {"PPO": {"n_steps": 64, "batch_size": 16, "n_epochs": 2}, "A2C": {}}
    kind = getattr(stable_baselines3, algorithm)
    policy = {"net_arch": [8]}
    model = kind(
        "MlpPolicy",
        environment,
        seed=0,
        device="cpu",
        policy_kwargs=policy,
        **settings.get(algorithm, few),
    )
    with watching.block(model.policy):
        model.learn(256 if algorithm == "PPO" else 60)
    module: nn.Module = model.policy
    return module


# -- Composer --------------------------------------------------------------------------------------


def composer(
    watching: Watching, bad: bool = False, kind: str = "", size: int | None = None
) -> nn.Module:
    """Micro-batches in a closure, and several ways to clip."""
    from composer import Callback, Trainer
    from composer.algorithms import SAM, GradientClipping
    from composer.models import ComposerModel

    class Gradients(Callback):  # type: ignore[misc]
        def fit_start(self, state: Any, logger: Any) -> None:
            watching.begin(state.model, list(state.optimizers))

        def fit_end(self, state: Any, logger: Any) -> None:
            watching.end()

    class Net(ComposerModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, batch: Any) -> Tensor:
            output: Tensor = self.net(batch[0])
            return output

        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return mse_loss(outputs, batch[1])

    model = Net()
    limit = 0.5 if kind == "norm" else 0.05
    clips = [GradientClipping(clipping_type=kind, clipping_threshold=limit)]
    trainer = Trainer(
        model=model,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.05),
        train_dataloader=torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*data(bad)), batch_size=BATCH
        ),
        max_duration="2ep",
        device_train_microbatch_size=size,
        algorithms=[SAM()] if kind == "sam" else clips if kind else [],
        callbacks=[Gradients()],
        device="cpu",
        progress_bar=False,
        seed=0,
    )
    trainer.fit()
    trainer.close()
    return model


# -- timm ------------------------------------------------------------------------------------------


def timm(
    watching: Watching,
    bad: bool = False,
    accumulate: int = 1,
    scaled: bool = False,
    clip: float = 1.0,
    mode: str = "norm",
    optimizer: str = "sgd",
) -> nn.Module:
    """The loop of its training script."""
    import timm
    from timm.models import model_parameters
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    stepped = create_optimizer_v2(model, opt=optimizer, lr=0.05, weight_decay=1e-4)
    average = ModelEmaV3(model, decay=0.9)
    scaler = NativeScaler(device="cpu") if scaled else None
    if scaler is not None:
        watching.scale = scaler._scaler.get_scale
    draw = torch.Generator().manual_seed(1)
    with watching.block(model, stepped):
        for number in range(1, 9):
            images = torch.randn(4, 3, 32, 32, generator=draw)
            labels = torch.randint(5, (4,), generator=draw)
            if bad and number == 4:
                images[2, 0, 3, 3] = math.inf
            steps = number % accumulate == 0 or number == 8
            with torch.autocast("cpu", torch.bfloat16, enabled=scaled):
                loss = nn.functional.cross_entropy(model(images), labels) / accumulate
            parameters = model_parameters(model, exclude_head="agc" in mode)
            if scaler is not None:
                limits = {"clip_grad": clip, "clip_mode": mode, "parameters": parameters}
                scaler(loss, stepped, need_update=steps, **limits)
            else:
                loss.backward()
                if steps:
                    dispatch_clip_grad(parameters, clip, mode=mode)
                    stepped.step()
            if steps:
                average.update(model)
                stepped.zero_grad()
    return nn.ModuleList([model, average.module])


# -- ultralytics -----------------------------------------------------------------------------------


def pictures(folder: Path) -> Path:
    """Write fourteen pictures of noise with a square in each, and return what describes them."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 2)):
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True)
        for index in range(count):
            picture = draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            picture[16:40, 16:40] = 255 * (index % 2)
            Image.fromarray(picture).save(folder / "images" / part / f"{index}.png")
            label = folder / "labels" / part / f"{index}.txt"
            label.write_text(f"{index % 2} 0.45 0.45 0.4 0.4\n")
    described = folder / "data.yaml"
    described.write_text(
        f"path: {folder}\ntrain: images/train\nval: images/val\nnames: {{0: black, 1: white}}\n"
    )
    return described


def ultralytics(watching: Watching, bad: bool = False, nominal: int = 2) -> nn.Module:
    """Warm-up, accumulation and a clip of 10."""
    os.environ["YOLO_OFFLINE"] = "True"
    from ultralytics import YOLO

    kept, model, seen = nn.ModuleList(), YOLO("yolo11n.yaml"), []

    def poison(trainer: Any) -> None:
        seen.append(trainer.epoch)
        if len(seen) == 5:
            prepare = trainer.preprocess_batch

            def prepare_once(batch: Any) -> Any:
                trainer.preprocess_batch = prepare
                batch = prepare(batch)
                batch["img"][1, 0, 5, 5] = math.nan
                return batch

            trainer.preprocess_batch = prepare_once

    def end(trainer: Any) -> None:
        watching.end()
        kept.extend([trainer.model, trainer.ema.ema])

    if bad:
        model.add_callback("on_train_batch_start", poison)
    model.add_callback("on_train_start", lambda t: watching.begin(t.model, t.optimizer))
    model.add_callback("on_train_end", end)
    described = watching.folder / "data" / "data.yaml"
    model.train(
        data=str(described if described.exists() else pictures(described.parent)),
        epochs=2,
        imgsz=64,
        batch=2,
        nbs=nominal,
        device="cpu",
        workers=0,
        plots=False,
        val=False,
        verbose=False,
        project=str(watching.folder / "runs"),
        exist_ok=True,
        optimizer="SGD",
        lr0=0.01,
        mosaic=0.0,
    )
    return kept


# -- mmengine --------------------------------------------------------------------------------------


def mmengine(watching: Watching, bad: bool = False, **wrapper: Any) -> nn.Module:
    """Losses and steps behind an `OptimWrapper`."""
    from mmengine.hooks import Hook
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class GradientsHook(Hook):  # type: ignore[misc]
        def before_train(self, runner: Any) -> None:
            watching.begin(runner.model, runner.optim_wrapper.optimizer)

        def after_train(self, runner: Any) -> None:
            watching.end()

    class Net(BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, inputs: Tensor, targets: Tensor, mode: str = "tensor") -> Any:
            outputs = self.net(inputs)
            if mode != "loss":
                return outputs
            return {
                "loss_square": mse_loss(outputs, targets),
                "loss_size": outputs.square().mean() / 10,
            }

    runner = Runner(
        model=Net(),
        work_dir=str(watching.folder / "work"),
        train_dataloader={
            "dataset": torch.utils.data.TensorDataset(*data(bad)),
            "batch_size": BATCH,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "collate_fn": {"type": "default_collate"},
        },
        train_cfg={"by_epoch": True, "max_epochs": 2},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.05}, **wrapper},
        custom_hooks=[GradientsHook()],
        randomness={"seed": 0},
        log_level="ERROR",
    )
    module: nn.Module = runner.train()
    return module
