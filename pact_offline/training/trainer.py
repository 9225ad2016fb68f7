"""A transformers Trainer whose loss holds the policy to the reference's confidences."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from pact_offline.errors import SettingError
from pact_offline.machine import peak_resident_mib
from pact_offline.objectives.registry import (
    kl_weight_at,
    objective_named,
    weights_in_use,
)
from pact_offline.settings.stages import ObjectiveSettings
from pact_offline.training.collator import PassCollator, ResponseCollator, TargetSource
from pact_offline.training.loss import BatchLoss, batch_loss
from pact_offline.training.rehearsal import RehearsalSampler, RehearsedRows
from pact_offline.training.uses import Uses


def peak_memory_mib() -> float:
    """Peak memory of this process so far: on the accelerator, else resident; MiB, 0: unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_resident_mib()


class PactTrainer(Trainer):  # type: ignore[misc]
    """Supervised fine-tuning plus an objective, with no reference model in memory.

    The loss is cross-entropy + kl_weight * objective, each as a mean over response steps of the
    (accumulated, multi-process) batch: the one over those that are learnt, the other over all,
    where a rehearsed step may count more than once. The LM head runs on response columns only. An
    objective may stand in place of the cross-entropy.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        train_dataset: Any,
        pad_id: int,
        objective: ObjectiveSettings,
        epoch_decay: float | None = None,
        targets: TargetSource | None = None,
        weights: Tensor | None = None,
        pass_tokens: int | None = None,
        packing: bool = False,
        uses: Uses | None = None,
        rehearsal_share: float = 0,
        rehearsal_weight: float = 1,
        **extra: Any,
    ) -> None:
        """Prepare training.

        Args:
            model: policy, whose forward takes `logits_to_keep`.
            args: transformers training arguments; `remove_unused_columns` is switched off.
            train_dataset: items as `ResponseCollator` reads them, or `RehearsedRows`.
            pad_id: token id of padding.
            objective: which regulariser, its weight and shape; "none" needs no targets.
            epoch_decay: multiply the learning rate by this after each epoch, in place of the
                schedule in `args`.
            targets: the cache (or a live reference), read by `train_dataset`'s `index`.
            weights: float [ids], safety-token weights.
            pass_tokens: tokens, with padding, of a forward and backward pass; a batch of more takes
                several. None: no limit; nor is there one where weights are sharded, since every
                process has to run the same number of passes.
            packing: the rows of a pass are one after the other, with no padding.
            uses: what each answer is for, by the items' `index`; None: every one is learnt.
            rehearsal_share: of a batch's rows that are rehearsed, with `RehearsedRows`.
            rehearsal_weight: how often a rehearsed step counts in the objective.
            extra: for transformers' Trainer.
        """
        args.remove_unused_columns = False
        self._settings = objective
        self._rehearsal_share = rehearsal_share
        self.rehearsal_weight = rehearsal_weight
        self._learnt_in_batch: Tensor | int | None = None
        self._epoch_decay = epoch_decay
        self._objective = objective_named(objective.objective)
        if self._objective is not None and (targets is None or weights is None):
            raise SettingError(
                f"objective {objective.objective}: expected targets and weights, found none"
            )
        collator = ResponseCollator(
            pad_id,
            targets if self._objective else None,
            response_only=bool(
                self._objective and self._objective.needs_response_only and objective.gate
            ),
            labels=bool(self._objective and self._objective.needs_labels),
            uses=uses,
            rehearsal_weight=rehearsal_weight,
            packed=packing,
        )
        passes = PassCollator(collator, pass_tokens)
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, data_collator=passes, **extra
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            passes.pass_tokens = None
        self.model_accepts_loss_kwargs = True  # the loss is divided by all steps of the batch
        device = self.args.device
        self._safety_ids: Tensor | None = None
        self._weights: Tensor | None = None
        if targets is not None and weights is not None:
            self._safety_ids = torch.tensor(targets.safety_ids, device=device)
            self._weights = weights_in_use(weights, objective).to(device)
        self._sums: dict[str, Tensor | float] = {}
        self._logged = time.monotonic()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        is_rehearsed = isinstance(dataset, RehearsedRows)
        sampler = super()._get_train_sampler(dataset.rows if is_rehearsed else dataset)
        if hasattr(sampler, "lengths"):  # a column that would be looked up for every row
            sampler.lengths = [int(length) for length in sampler.lengths[:]]
        if is_rehearsed:
            count, seed = len(dataset.rehearsed), self.args.data_seed or self.args.seed
            return RehearsalSampler(sampler, count, self._rehearsal_share, seed)
        return sampler

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> Tensor | int | None:
        """All response steps; those that are learnt are kept beside."""
        steps: Tensor | int | None = super()._get_num_items_in_batch(batch_samples, device)
        self._learnt_in_batch = steps
        if batch_samples and "is_learnt" in batch_samples[0]:
            learnt = torch.stack([batch["is_learnt"].sum() for batch in batch_samples]).sum()
            learnt = learnt.to(device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                learnt = self.accelerator.gather(learnt).sum()
            self._learnt_in_batch = learnt.clamp(min=1)
        return steps

    def training_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward of one micro-batch, pass by pass; the loss, detached."""
        *others, last = inputs["passes"]
        total: Tensor = torch.zeros((), device=self.args.device)
        for part in others:
            with self.accelerator.no_sync(model):
                total += super().training_step(model, part, num_items_in_batch)
        total += super().training_step(model, last, num_items_in_batch)
        return total

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The Trainer's estimate, over the passes."""
        return sum(super(PactTrainer, self).floating_point_ops(one) for one in inputs["passes"])

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one pass as its share of the whole batch's mean; in evaluation, of all."""
        parts = [self._loss_of_pass(model, one) for one in inputs.get("passes", [inputs])]
        steps: Tensor | int | None = num_items_in_batch
        learnt = self._learnt_in_batch
        if steps is None or learnt is None:
            steps = sum(part.steps for part in parts)
            learnt = max(1, sum(part.learnt for part in parts))
        loss: Any = 0
        if self._objective is None or not self._objective.replaces_cross_entropy:
            loss = sum(part.cross_entropy for part in parts) / learnt
        if self._objective is not None:
            loss = loss + self._kl_weight() * sum(part.kl for part in parts) / steps
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP takes the mean over processes
        return (loss, {}) if return_outputs else loss

    def _loss_of_pass(self, model: Any, batch: dict[str, Tensor]) -> BatchLoss:
        kl_weight = self._kl_weight()
        parts = batch_loss(model, batch, self._safety_ids, self._weights, self._settings, kl_weight)
        if model.training:
            self._count("cross_entropy", parts.cross_entropy.detach())
            self._count("kl", parts.kl.detach())
            self._count("kl_weight", kl_weight * parts.steps)
            self._count("gap", parts.confidence_gap)
            self._count("held_gap", parts.held_gap)
            self._count("steps", parts.steps)
            self._count("learnt", parts.learnt)
            is_packed = "attention_mask" not in batch
            rows = (batch["position_ids"] == 0).sum() if is_packed else len(batch["labels"])
            fed = batch["input_ids"].numel() if is_packed else batch["attention_mask"].sum()
            self._count("tokens", fed + rows)
        return parts

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The published schedule where `epoch_decay` is set, else the one in `args`."""
        scheduler: Any = self.lr_scheduler  # type: ignore[has-type]
        if self._epoch_decay is None or scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        per_epoch = max(1, round(num_training_steps / self.args.num_train_epochs))
        self.lr_scheduler = torch.optim.lr_scheduler.StepLR(
            optimizer or self.optimizer, per_epoch, self._epoch_decay
        )
        return self.lr_scheduler

    def leave_out(self, seconds: float) -> None:
        """Take time that was not spent on training out of the rate that is logged next."""
        self._logged += seconds

    def _kl_weight(self) -> float:
        last = max(1, self.state.max_steps - 1)
        return kl_weight_at(self.state.global_step / last, self._settings)

    def _count(self, name: str, value: Tensor | float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value

    def _summed_over_processes(self) -> dict[str, float]:
        names = sorted(self._sums)
        device = self.args.device
        values = [torch.as_tensor(self._sums[n], device=device).double() for n in names]
        total = self.accelerator.reduce(torch.stack(values), "sum")
        return dict(zip(names, total.tolist(), strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the loss is made of since the last log, as means over response steps.

        What is a mean over no step is left out.
        """
        if "loss" in logs and self._sums:
            sums = self._summed_over_processes()
            steps, learnt, now = max(1, sums["steps"]), sums["learnt"], time.monotonic()
            held = sums["steps"] - learnt
            if learnt:
                logs["cross_entropy"] = sums["cross_entropy"] / learnt
            if self._objective is not None:
                logs["kl"] = sums["kl"] / steps
                logs["kl_weight"] = sums["kl_weight"] / steps
                if logs.get("cross_entropy"):
                    logs["kl_ratio"] = logs["kl"] / logs["cross_entropy"]
                if learnt:
                    logs["confidence_gap"] = sums["gap"] / learnt
                if held:
                    logs["held_gap"] = sums["held_gap"] / held
            logs["tokens"] = sums["tokens"]
            logs["tokens_per_second"] = round(sums["tokens"] / (now - self._logged), 1)
            if peak := peak_memory_mib():
                logs["peak_memory_mib"] = round(peak, 1)
            self._sums, self._logged = {}, now
        super().log(logs, start_time)
