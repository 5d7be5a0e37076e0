"""A small language model, its data, and a Trainer without noise, for the tests of the callback."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from tests.support.float64 import gradient_norm

WORDS = 64
BEFORE_5 = int(transformers.__version__.split(".")[0]) < 5

# What the libraries themselves warn about; everything else is an error.
WARNINGS = (
    r"ignore:.*is an Enum subclass",
    r"ignore:.*pin_memory",
)


def small_model(kind=LlamaForCausalLM, **config):
    """Makes the same small model each time."""
    sizes = {
        "vocab_size": WORDS,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "loss_type": "ForCausalLM",
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(LlamaConfig(**{**sizes, **config}))


class Texts(Dataset):
    """Sequences of 12 tokens, of which up to 7 count for nothing; ``bad`` of them begin with 0."""

    def __init__(self, count=40, bad=()):
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(1, WORDS, (count, 12), generator=generator)
        for index in bad:
            self.tokens[index, 0] = 0
        self.labels = self.tokens.clone()
        for index in range(count):
            self.labels[index, : index % 8] = -100

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def arguments(folder, **changes):
    """Returns arguments that log every step, and save and report nothing."""
    given = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**given, **changes})


def trained(folder, *callbacks, kind=Trainer, model=None, data=None, resume=None, **changes):
    """Trains, and returns the Trainer."""
    one = kind(
        small_model() if model is None else model,
        arguments(folder, **changes),
        train_dataset=data or Texts(),
        eval_dataset=Texts(4),
        callbacks=list(callbacks),
    )
    one.train(resume_from_checkpoint=resume)
    return one


def rows_of(trainer):
    """Lists the rows that a Trainer has logged of its training."""
    return [row for row in trainer.state.log_history if "loss" in row]


def has_their_losses(trainer, steps):
    """Asserts that the losses that a Trainer has logged are those of `history.steps()`."""
    rounds = {"atol": 5.1e-5} if BEFORE_5 else {"rtol": 1e-6}  # to 4 places
    logged = [row["loss"] for row in rows_of(trainer)]
    np.testing.assert_allclose(logged, steps["loss"], **{"rtol": 0, **rounds})


def has_their_norms(trainer, steps):
    """Asserts that the norms that a Trainer has logged are those of `history.steps()`."""
    logged = [row["grad_norm"] for row in rows_of(trainer) if "grad_norm" in row]
    # One that does not clip logged no norm.
    missing = BEFORE_5 and not logged and not trainer.args.max_grad_norm
    assert missing or logged == steps["grad_norm"].tolist()


def is_clean(trainer):
    """Whether a Trainer, its model and its optimizer are as if nothing had ever watched them."""
    methods = {"log", "training_step", "compute_loss", "_run_epoch", "_finalize_training"}
    methods |= {"_evaluate", "get_batch_samples", "_maybe_log_save_evaluate"}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    optimizer = trainer.optimizer.optimizer
    return (
        methods.isdisjoint(vars(trainer))
        and "save_to_json" not in vars(trainer.state)
        and "on_epoch_begin" not in vars(trainer.callback_handler)
        and not any(getattr(one, name) for one in trainer.model.modules() for name in hooks)
        and not any(p._post_accumulate_grad_hooks for p in trainer.model.parameters())
        and not optimizer._optimizer_step_pre_hooks
        and not optimizer._optimizer_step_post_hooks
    )


def same_weights(left, right):
    """Whether two Trainers have bit-identical weights."""
    return all(
        torch.equal(a, b)
        for a, b in zip(left.model.parameters(), right.model.parameters(), strict=True)
    )


class Reference(TrainerCallback):
    """The norms of each step before and after the Trainer's clip, in float64, and its losses.

    Attributes:
        before: Norm before the clip of each step.
        after: Norm after it.
        micro_batches: Micro-batches of each step.
        losses: Sum of the losses of each step.
    """

    def __init__(self):
        self.before, self.after, self.micro_batches, self.losses = [], [], [], []
        self._open = []

    def follow(self, trainer):
        """Looks at what a Trainer does, from its constructor on."""
        clip, step = trainer.accelerator.clip_grad_norm_, trainer.training_step

        def clip_grad_norm_(*args, **kwargs):
            if len(self.before) == len(self.after):
                self.before.append(gradient_norm(trainer.model))
            return clip(*args, **kwargs)

        def training_step(*args, **kwargs):
            loss = step(*args, **kwargs)
            self._open.append(float(loss))
            return loss

        trainer.accelerator.clip_grad_norm_ = clip_grad_norm_
        trainer.training_step = training_step

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.after.append(gradient_norm(model))
        self.micro_batches.append(len(self._open))
        self.losses.append(sum(self._open))
        self._open = []
