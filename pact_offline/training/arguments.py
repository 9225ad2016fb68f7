"""The settings of a run, in the words of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from pact_offline.settings.stages import FinetuneSettings

_SAMPLING = {"by_length": "group_by_length", "random": "random", "as_given": "sequential"}


def training_arguments(
    settings: FinetuneSettings, folder: Path, name: str | None = None
) -> TrainingArguments:
    """The Trainer's arguments that the settings stand for."""
    schedule = "constant" if settings.schedule == "epoch_decay" else settings.schedule
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.dtype == "bfloat16",
        train_sampling_strategy=_SAMPLING[settings.row_order],
        length_column_name="length",
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a diverging run must be seen
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=max(1, settings.save_steps),
        save_total_limit=2,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        report_to=list(settings.report_to),
        run_name=name,
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        lr_scheduler_type=schedule,
    )
    # One device a process: the Trainer would split a batch by rows, also what is not one row each.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments
