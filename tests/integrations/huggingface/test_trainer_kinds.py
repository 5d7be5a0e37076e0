"""GradientMonitorCallback in Trainers of other libraries: TRL's four, PEFT, Seq2Seq, searches."""

from __future__ import annotations

from contextlib import suppress

import pytest

pytest.importorskip("transformers", reason="NOT TESTED: the Trainer (transformers is missing)")

import numpy as np
import torch
from transformers import (
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

import gradwatch
from gradwatch_huggingface import GradientMonitorCallback
from tests.integrations.huggingface.trainer_runs import (
    WARNINGS,
    Texts,
    arguments,
    is_clean,
    rows_of,
    same_weights,
    small_model,
)

pytestmark = [pytest.mark.filterwarnings(one) for one in WARNINGS]
# TRL and PEFT still ask for what Transformers has deprecated.
OF_TRL = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

GIVEN = {
    "per_device_train_batch_size": 2,
    "max_steps": 4,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
}
TRL_GIVEN = {**GIVEN, "bf16": False, "gradient_checkpointing": False}
WORDS = [f"w{number}" for number in range(61)]
TEXTS = [" ".join(WORDS[(i * 7 + j * 3) % 61] for j in range(8)) for i in range(16)]


def tokenizer():
    """Makes a tokenizer of whole words."""
    tokenizers = pytest.importorskip("tokenizers")
    known = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def data(**columns):
    """Makes a data set."""
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


def adapters(name):
    """Returns the settings of LoRA, or nothing."""
    if name == "whole":
        return None
    peft = pytest.importorskip("peft", reason="NOT TESTED: PEFT (peft is missing)")
    return peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def check(trainer, monitor):
    """Trains, and compares the records with the Trainer's rows."""
    trainer.train()
    steps = monitor.history.steps()
    assert is_clean(trainer)
    assert steps["micro_batches"].tolist() == [2] * 4
    assert [row["grad_norm"] for row in rows_of(trainer)] == steps["grad_norm"].tolist()
    assert [row["gradwatch/grad_norm"] for row in rows_of(trainer)] == steps["grad_norm"].tolist()
    np.testing.assert_allclose(
        [row["loss"] for row in rows_of(trainer)], steps["loss"], rtol=1e-5, atol=1e-7
    )
    assert not monitor.events


def trl():
    """Returns TRL."""
    return pytest.importorskip("trl", reason="NOT TESTED: TRL (trl is missing)")


@OF_TRL
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "lora"])
@pytest.mark.parametrize("options", [{}, {"explain": True}], ids=["watched", "explained"])
def test_sft(tmp_path, kind, options):
    """SFTTrainer: the same weights as without, and adapters under the names of the base model."""
    given = {"args": trl().SFTConfig(output_dir=str(tmp_path), **TRL_GIVEN)}
    given |= {"processing_class": tokenizer(), "train_dataset": data(text=TEXTS)}
    made = []
    monitor = GradientMonitorCallback(**options)
    for callbacks in ([monitor], []):
        torch.manual_seed(3)
        made.append(
            trl().SFTTrainer(
                small_model(), callbacks=callbacks, peft_config=adapters(kind), **given
            )
        )
        if callbacks:
            check(made[0], monitor)
        else:
            made[1].train()

    assert same_weights(*made)
    names = set(monitor.history.parameters()["parameter"])
    if kind == "lora":
        base = {name for name, _ in made[0].model.get_base_model().named_parameters()}
        assert names < base
        assert "model.layers.0.self_attn.q_proj.lora_A.default.weight" in names
    else:
        assert names == {name for name, _ in small_model().named_parameters()}


@OF_TRL
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_dpo(tmp_path, kind):
    """DPOTrainer: the reference model is not watched."""
    saved = tmp_path / "model"
    small_model().save_pretrained(saved)
    tokenizer().save_pretrained(saved)
    monitor = GradientMonitorCallback(explain=True)
    trainer = trl().DPOTrainer(
        str(saved),
        args=trl().DPOConfig(output_dir=str(tmp_path), **TRL_GIVEN),
        train_dataset=data(
            prompt=[f"{text} " for text in TEXTS],
            chosen=TEXTS[::-1],
            rejected=TEXTS[3:] + TEXTS[:3],
        ),
        processing_class=tokenizer(),
        callbacks=[monitor],
        peft_config=adapters(kind),
    )
    check(trainer, monitor)
    names = set(monitor.history.parameters()["parameter"])
    assert not [name for name in names if name.startswith(("ref", "base_model"))]


@OF_TRL
@pytest.mark.slow
def test_reward(tmp_path):
    """RewardTrainer."""
    monitor = GradientMonitorCallback(explain=True)
    trainer = trl().RewardTrainer(
        small_model(LlamaForSequenceClassification, num_labels=1, pad_token_id=0, loss_type=None),
        args=trl().RewardConfig(output_dir=str(tmp_path), **TRL_GIVEN),
        train_dataset=data(chosen=TEXTS[::-1], rejected=TEXTS[3:] + TEXTS[:3]),
        processing_class=tokenizer(),
        callbacks=[monitor],
    )
    check(trainer, monitor)


@OF_TRL
@pytest.mark.slow
def test_grpo(tmp_path):
    """GRPOTrainer, which makes completions in its training_step()."""

    def reward(completions, **given):
        return [float(len(set(one.split()))) for one in completions]

    monitor = GradientMonitorCallback(explain=True)
    trainer = trl().GRPOTrainer(
        small_model(),
        reward_funcs=reward,
        args=trl().GRPOConfig(
            output_dir=str(tmp_path), num_generations=2, max_completion_length=8, **TRL_GIVEN
        ),
        train_dataset=data(prompt=TEXTS),
        processing_class=tokenizer(),
        callbacks=[monitor],
    )
    check(trainer, monitor)


def test_seq2seq(tmp_path):
    """Seq2SeqTrainer, and an evaluation that generates."""
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    monitor = GradientMonitorCallback()
    trainer = Seq2SeqTrainer(
        T5ForConditionalGeneration(config),
        Seq2SeqTrainingArguments(
            str(tmp_path), predict_with_generate=True, generation_max_length=4, **GIVEN
        ),
        train_dataset=Texts(),
        eval_dataset=Texts(4),
        callbacks=[monitor],
    )
    check(trainer, monitor)
    trainer.evaluate()
    assert len(monitor.history.steps()) == 4


def test_each_trial_of_a_search_has_a_watcher_and_a_folder(tmp_path, monkeypatch):
    """A search of three trials, of which the second is cut off, with a backend made by hand."""
    search = pytest.importorskip("transformers.hyperparameter_search")
    pytest.importorskip("pyarrow", reason="NOT TESTED: run folders (pyarrow is missing)")
    seen = []

    class Trial(dict):
        params = number = property(lambda self: self["number"])

    class ByHand(search.OptunaBackend):
        def run(self, trainer, n_trials, direction, **given):
            for number, rate in enumerate((1e-3, 1e-1, 1e-2)):
                trainer.stop_at = 3 if number == 1 else 0
                with suppress(InterruptedError):
                    trainer.train(trial=Trial(number=number, rate=rate))
                seen.append((monitor.watcher, monitor.history.steps()["grad_norm"].tolist()))
                assert is_clean(trainer)

        @staticmethod
        def is_available():
            return True

    class Cut(Trainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == self.stop_at != 0:
                raise InterruptedError
            return super().training_step(*args, **kwargs)

    def made():  # without the arguments of small_model(), of which the first would be the trial
        return small_model()

    known = search.ALL_HYPERPARAMETER_SEARCH_BACKENDS
    (optuna,) = [one for one in known if one.value == "optuna"]
    monkeypatch.setitem(known, optuna, ByHand)
    monitor = GradientMonitorCallback(run_dir=tmp_path / "kept")
    trainer = Cut(
        args=arguments(tmp_path),
        model_init=made,
        train_dataset=Texts(),
        callbacks=[monitor],
    )

    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial["rate"]}, backend="optuna", n_trials=3
    )

    assert len({id(watcher) for watcher, _ in seen}) == 3
    assert [len(norms) for _, norms in seen] == [6, 3, 6]
    kept = [gradwatch.load(tmp_path / "kept" / f"run-{number}").steps() for number in range(3)]
    assert [one["grad_norm"].tolist() for one in kept] == [norms for _, norms in seen]
