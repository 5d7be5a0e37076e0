"""The same training on the device and on the host: the same records, events, statistics and weights."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from pandas.api.types import is_float_dtype

import gradwatch
from gradwatch.testing import CapturingSink
from tests.support import device, zoo
from tests.support.options import STATISTICS
from tests.support.places import HOST

STEPS, POISONED = 12, 5
RELATIVE = 1e-6
OF_A_STEP = [
    "micro_batches", "weight", "grad_norm", "grad_norm_clipped", "clip_coef", "clip_threshold",
    "clipped", "outcome", "nonfinite_parameters", "loss", "lr", "loss_scale", "noise_scale",
]  # fmt: skip
OF_AN_EVENT = ["step", "micro_batch", "kind", "parameter", "module", "nan_count", "inf_count"]

SETTINGS = {
    "plain": {},
    "statistics": {"statistics": STATISTICS},
    "clip": {"clip": 0.05},
    "clip of parameters": {"clip": gradwatch.ClipByNorm(0.05, scope="parameter")},
    "clip by value": {"clip": gradwatch.ClipByValue(0.01)},
    "auto": {"clip": "auto"},
    "AGC": {"clip": gradwatch.AdaptiveGradientClip(0.05)},
    "AdaGC": {"clip": gradwatch.AdaGC(warmup=3)},
    "by hand": {"micro_batches": 3},
    "declared": {"micro_batches": 3, "accumulate": 3},
    "managed": {"managed": True, "micro_batches": 3, "accumulate": 3},
    "managed, clip": {"managed": True, "micro_batches": 3, "accumulate": 3, "clip": 0.05},
    "managed, fused": {"managed": True, "fused": True},
    "managed, skip": {"managed": True, "poisoned": POISONED, "on_nonfinite": "skip"},
    "managed, fused, skip": {
        "managed": True, "fused": True, "poisoned": POISONED, "on_nonfinite": "skip",
    },
    "NaN": {"poisoned": POISONED},
    "NaN, statistics": {"poisoned": POISONED, "statistics": STATISTICS},
    "skip": {"poisoned": POISONED, "on_nonfinite": "skip", "statistics": STATISTICS},
    "fused, skip": {
        "poisoned": POISONED, "on_nonfinite": "skip", "fused": True, "statistics": STATISTICS,
    },
    "raise": {"poisoned": POISONED, "on_nonfinite": "raise"},
    "exploding": {"exploding_norm": 1e-3},
    "scaler": {"scaled": True},
    "scaler found": {"scaled": True, "told": False},
    "scaler, fused": {"scaled": True, "fused": True},
    "scaler found, fused": {"scaled": True, "fused": True, "told": False},
    "scaler found, fused, clip": {"scaled": True, "fused": True, "told": False, "clip": 0.05},
    "scaler overflows": {"scaled": True, "poisoned": POISONED, "clip": 0.05},
    "scaler found, overflows": {"scaled": True, "told": False, "poisoned": POISONED},
    "scaler found, fused, overflows": {
        "scaled": True, "told": False, "fused": True, "poisoned": POISONED,
    },
    "spikes": {"skip_spikes": "auto", "fused": True},
}  # fmt: skip
# What there is no count of: by the time that it is known, the gradient is gone.
UNCOUNTED = {
    name for name, setting in SETTINGS.items()
    if "poisoned" in setting and setting.get("on_nonfinite") not in ("skip", "raise")
} | {"fused, skip", "managed, fused, skip"}  # fmt: skip


class _Loop:
    """A loop that does what a setting says."""

    def __init__(
        self, place, *, micro_batches=1, managed=False, fused=False, poisoned=None, scaled=False,
        told=True, **options,
    ):  # fmt: skip
        self.place, self.micro_batches, self.poisoned = place, micro_batches, poisoned
        self.model = place.to(zoo.small())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=fused)
        self.scaler = torch.amp.GradScaler(place.type, 2.0**7, enabled=scaled)
        self.sink = CapturingSink()
        given = {"scaler": self.scaler} if scaled and told else {}
        self.step = self._managed if managed else self._by_hand
        options = {**copy.deepcopy(options), **given, "sinks": [self.sink]}
        self.watching = gradwatch.watch(self.model, self.optimizer, **options)

    def run(self):
        """Trains; returns what there is to compare."""
        with self.place.late(2):
            try:
                with self.watching as watcher:
                    for step in range(STEPS):
                        self.step(watcher, step)
            except gradwatch.NonFiniteGradientError:
                pass
        history = watcher.history
        return {
            "steps": history.steps()[OF_A_STEP],
            "parameters": history.parameters(),
            "events": history.events(),
            "sink": [record.grad_norm for record in self.sink.steps],
            "noise": (watcher.noise_scale.updates, watcher.noise_scale.b_simple),
            "weights": [p.detach().cpu() for p in self.model.parameters()],
        }

    def _loss(self, step, part):
        generator = torch.Generator().manual_seed(1000 * part + step)
        x = self.place.tensor(torch.randn(8, 4, generator=generator))
        bad = step == self.poisoned and part == self.micro_batches - 1
        return self.model(x).square().mean() * (math.nan if bad else 1.0)

    def _by_hand(self, watcher, step):
        for part in range(self.micro_batches):
            self.scaler.scale(self._loss(step, part) / self.micro_batches).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def _managed(self, watcher, step):
        for part in range(self.micro_batches):
            watcher.backward(self._loss(step, part))
            watcher.step()


def _assert_alike(found, expected, columns, relative):
    assert list(found.columns) == list(expected.columns)
    assert len(found) == len(expected)
    for name in columns:
        if is_float_dtype(expected[name].dtype):
            numbers = pytest.approx(expected[name].tolist(), rel=relative, abs=1e-9, nan_ok=True)
            assert found[name].tolist() == numbers, name
        else:
            assert found[name].equals(expected[name]), name


@pytest.mark.parametrize("float64", [True, False], ids=["", "no float64"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_is_recorded_as_on_the_host(name, float64, place):
    """Norms, outcomes, statistics, events, noise scale and weights; also without float64, but for rounding."""
    setting = SETTINGS[name]
    if not float64 and device.NAME not in ("fake", "mini"):
        pytest.skip("the device has float64")
    if not float64 and setting.get("scaled") and not setting.get("fused"):
        pytest.skip("torch.amp.GradScaler itself needs float64, but on MPS, to unscale gradients")
    expected = _Loop(HOST, **setting).run()
    with nullcontext() if float64 else device.no_float64():
        found = _Loop(place, **setting).run()
    relative = RELATIVE if float64 else 1e-4
    _assert_alike(found["steps"], expected["steps"], OF_A_STEP, relative)
    columns = list(expected["parameters"].columns)
    # The ratio is one of differences, and the mean one of a sum that cancels.
    near = [column for column in columns if column not in ("mean", "update_ratio")]
    _assert_alike(found["parameters"], expected["parameters"], near, relative)
    _assert_alike(found["parameters"], expected["parameters"], columns, 1e-3)
    told = [c for c in OF_AN_EVENT if name not in UNCOUNTED or not c.endswith("_count")]
    _assert_alike(found["events"], expected["events"], told, relative)
    assert found["sink"] == pytest.approx(expected["sink"], rel=relative, nan_ok=True)
    assert found["noise"][0] == expected["noise"][0]
    assert found["noise"][1] == pytest.approx(expected["noise"][1], rel=1e-3, nan_ok=True)
    torch.testing.assert_close(
        found["weights"], expected["weights"], rtol=1e-5, atol=1e-6, equal_nan=True
    )
