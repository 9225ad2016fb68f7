"""`finetune`: from rows and targets to an adapter."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed
from transformers.integrations import TensorBoardCallback, get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback

from pact_offline.errors import SettingError
from pact_offline.files import write_json
from pact_offline.folders import (
    RUN_FILE,
    kept_if_it_fails,
    output_aside,
    require_place,
    scratch_folder,
)
from pact_offline.models.cpu_dropout import use_fast_dropout
from pact_offline.models.liger import require_liger
from pact_offline.models.load import (
    default_device,
    load_model,
    require_compiler,
    require_trainable_attention,
)
from pact_offline.models.locate import ModelFiles
from pact_offline.models.log_confidences import reads_padding
from pact_offline.models.quantised import require_quantisation
from pact_offline.objectives.registry import objective_named
from pact_offline.own_code import content_of
from pact_offline.provenance import provenance
from pact_offline.rows.contexts import TokenizedExample
from pact_offline.rows.tokenized import TokenizedRows
from pact_offline.settings.stages import FinetuneSettings
from pact_offline.training.arguments import training_arguments
from pact_offline.training.checkpoints import (
    Checkpoints,
    EpochOrder,
    checkpoints_held,
    fingerprint,
    interruption_told,
    require_space,
    step_of,
    tell_of_killed_runs,
)
from pact_offline.training.collator import TargetSource
from pact_offline.training.dataset import as_dataset, memory_mapped
from pact_offline.training.evaluations import (
    EVALUATIONS,
    Evaluations,
    Watch,
    require_whole_policy,
)
from pact_offline.training.gauge import Gauge
from pact_offline.training.inputs import (
    Inputs,
    Paths,
    read_inputs,
    require_what_settings_need,
    rows_per_batch,
)
from pact_offline.training.kernels import take_kernels
from pact_offline.training.live_reference import LiveReference
from pact_offline.training.lora import check_lora_modules
from pact_offline.training.model_card import model_card
from pact_offline.training.policy import prepare_policy, prepare_to_pack
from pact_offline.training.rehearsal import (
    JoinedTargets,
    Rehearsal,
    RehearsedRows,
    weight_beside,
)
from pact_offline.training.saving import save_weights
from pact_offline.training.step_log import STEP_LOG, Journal
from pact_offline.training.summary import (
    count_rows,
    describe_trained,
    remarks,
    trained_parts,
    why_answers_may_not_stop,
    why_nothing_is_held,
)
from pact_offline.training.trainer import PactTrainer, peak_memory_mib
from pact_offline.training.uses import Uses, all_learnt, all_rehearsed

log = logging.getLogger(__name__)

EPOCH_DECAY = 0.85  # of the published script


def finetune(
    model: ModelFiles,
    sources: Sequence[str | Path],
    output: Path,
    settings: FinetuneSettings,
    *,
    targets_path: Path | None = None,
    tokens_path: Path | None = None,
    rehearsal_path: Path | None = None,
    cache_place: str | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train a policy and write it, whole or not at all, to `output`.

    Everything that can be refused is refused before any weight is loaded.

    Args:
        model: the reference that was scored, from which the policy starts.
        sources: its rows.
        output: directory to write.
        settings: of the run.
        targets_path: targets.json of the rows.
        tokens_path: the safety tokens.
        rehearsal_path: targets.json of `pact-offline rehearse`.
        cache_place: the `cache` of `TargetCache.open`.
        watch: asks the policy prompts every `evaluate_steps`.

    Returns:
        what is written to `pact_offline.json`: settings, targets hash, metrics and provenance;
        `holds` says whether the objective adds anything to the loss.

    Raises:
        Interrupted: says what is kept.
    """
    require_place(output)
    objective = objective_named(settings.objective)
    own_content = content_of("objective", settings.objective)
    _require_what_runs_here(str(model.path), settings)
    paths = Paths(targets_path, tokens_path, rehearsal_path, cache_place)
    require_what_settings_need(settings, paths)
    inputs = read_inputs(model, sources, settings, paths)
    chat, rows, tokens, cache, uses, rehearsal = inputs
    counts = count_rows(rows, rows_per_batch(settings), uses)
    unheld = why_nothing_is_held(settings, rows.longest_turn)
    if unheld and objective is not None and objective.replaces_cross_entropy:
        raise SettingError(f"--objective {settings.objective}: expected a loss, found {unheld}")
    checkpoints = _checkpoints(model, output, settings, inputs)
    is_main = is_first_process()
    if is_main:
        unended = why_answers_may_not_stop(str(model.path), chat, rows)
        for line in remarks(
            settings, counts, unheld, unended=unended, is_rehearsed=rehearsal is not None
        ):
            log.warning("%s", line)
        checkpoints.tell() if checkpoints else tell_of_killed_runs(output)
    with (
        checkpoints_held(output, keeps=bool(checkpoints)) if is_main else nullcontext(),
        interruption_told(checkpoints) if is_main else nullcontext(),
        output_aside(output) if is_main else scratch_folder() as aside,
    ):
        targets = _targets(model, inputs, settings)
        weights = torch.from_numpy(tokens.weights) if tokens is not None else None
        policy = prepare_policy(str(model.path), settings)
        if settings.packing:
            prepare_to_pack(policy, settings, model.name)
        trained = trained_parts(policy)
        if is_main:
            require_space(output, trained["parameters"], settings)
            log.info("%s", describe_trained(trained))
        trainer, metrics = train(
            policy,
            chat.tokenizer,
            rows,
            settings,
            aside,
            targets,
            weights,
            checkpoints,
            output,
            uses=uses,
            rehearsal=rehearsal,
            watch=watch,
        )
        facts = {
            "model": model.name,
            "model_identity": model.identity,
            "sources": [*map(str, sources)],
            "targets_sha256": cache.sha256 if cache else None,
            "rehearsal_sha256": rehearsal.targets.sha256 if rehearsal else None,
            "rehearsal_weight": trainer.rehearsal_weight if rehearsal else None,
            "holds": unheld is None,
            "objective_content": own_content,
            "template": chat.template_sha256,
            "settings": settings.model_dump(mode="json"),
            "trained": trained,
            **counts,
            "metrics": metrics,
            "provenance": provenance(),
        }
        gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # by every process
        if not is_main:
            return facts
        with kept_if_it_fails(aside, output):
            save_weights(trainer, gathered, aside, output, model.name)
            chat.tokenizer.save_pretrained(aside)
            (aside / "README.md").write_text(model_card(facts), encoding="utf-8")
            write_json(aside / RUN_FILE, facts)
    return facts


def _checkpoints(
    model: ModelFiles, output: Path, settings: FinetuneSettings, inputs: Inputs
) -> Checkpoints | None:
    if not settings.save_steps:
        return None
    targets = inputs.cache.binding.identity.digest if inputs.cache else None
    tokens = inputs.tokens.digest if inputs.tokens else None
    rehearsed = inputs.rehearsal.digest if inputs.rehearsal else None
    run = fingerprint(settings, model.identity, targets, inputs.rows.digest(), tokens, rehearsed)
    return Checkpoints(output, run)


def is_first_process() -> bool:
    """Of several processes of one run, the first writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def _require_what_runs_here(model: str, settings: FinetuneSettings) -> None:
    check_lora_modules(model, settings)
    if settings.compile:
        require_compiler()
    if settings.liger:
        require_liger(model)
    require_quantisation(settings.load_in)
    require_trainable_attention(settings.attention)
    installed = get_available_reporting_integrations()
    for name in settings.report_to:
        if name not in installed:
            raise SettingError(
                f"--report-to: expected what the Trainer knows and is installed "
                f"({', '.join(installed) or 'nothing'}), found {name!r}"
            )


def _targets(model: ModelFiles, inputs: Inputs, settings: FinetuneSettings) -> TargetSource | None:
    """What the objective reads: the cache, or the reference kept in memory; None: there is none."""
    objective, tokens = objective_named(settings.objective), inputs.tokens
    if objective is None or tokens is None or settings.reference == "cache":
        return None if objective is None else inputs.cache
    return LiveReference(
        load_model(str(model.path), settings.dtype, attention=settings.attention),
        inputs.rows,
        inputs.chat.header_ids,
        tokens.ids,
        whole_vocabulary=objective.needs_vocabulary,
    )


def train(
    policy: Any,
    tokenizer: Any,
    rows: TokenizedRows | Sequence[TokenizedExample],
    settings: FinetuneSettings,
    folder: Path,
    targets: TargetSource | None = None,
    weights: torch.Tensor | None = None,
    checkpoints: Checkpoints | None = None,
    output: Path | None = None,
    *,
    uses: Uses | None = None,
    rehearsal: Rehearsal | None = None,
    watch: Watch | None = None,
) -> tuple[PactTrainer, dict[str, float]]:
    """Train a policy in place; `training.jsonl`, and `evaluations.jsonl`, go to `folder`.

    Args:
        policy: from `prepare_policy`.
        tokenizer: the policy's.
        rows: in the order of `targets`.
        settings: of the run.
        folder: gets the log.
        targets: the cache, or a live reference; None with objective "none".
        weights: float [ids], safety-token weights.
        checkpoints: where they go, and what a killed run of the same settings left.
        output: where the result will be in the end; names the run in TensorBoard and the like.
        uses: what each answer of the rows is for; None: every one is learnt.
        rehearsal: rows that are mixed in and held.
        watch: asks the policy prompts every `evaluate_steps`.

    Returns:
        the trainer, and the metrics of the end of training.
    """
    set_seed(settings.seed)
    use_fast_dropout(policy)
    take_kernels(policy, settings, rows)
    scratch = checkpoints.folder if checkpoints else folder / "trainer"
    scratch.mkdir(parents=True, exist_ok=True)
    arguments = training_arguments(settings, scratch, output.name if output else None)
    resumed = checkpoints.latest() if checkpoints else None
    journal = Journal(scratch / STEP_LOG)
    dataset: Any = memory_mapped(rows) if isinstance(rows, TokenizedRows) else as_dataset(rows)
    if uses is not None:
        dataset = dataset.select(uses.kept_rows)
    rehearsal_weight = 1.0
    if rehearsal is not None and targets is not None and isinstance(rows, TokenizedRows):
        learnt = uses or all_learnt(np.cumsum(rows.turns))
        given = settings.rehearsal_weight
        rehearsal_weight = given or weight_beside(rows, learnt, rehearsal.rows)
        uses = learnt.then(all_rehearsed(np.cumsum(rehearsal.rows.turns)))
        targets = JoinedTargets(targets, len(rows), rehearsal.targets)
        dataset = RehearsedRows(dataset, memory_mapped(rehearsal.rows, first=len(rows)))
    pass_tokens = 1 if reads_padding(policy) else settings.pass_tokens or _default_pass_tokens()
    gauge = Gauge(settings.gap_warns, settings.gap_stops)
    trainer = PactTrainer(
        policy,
        arguments,
        train_dataset=dataset,
        pad_id=pad_id_of(tokenizer),
        objective=settings,
        epoch_decay=EPOCH_DECAY if settings.schedule == "epoch_decay" else None,
        targets=targets,
        weights=weights,
        pass_tokens=pass_tokens,
        packing=settings.packing,
        uses=uses,
        rehearsal_share=settings.rehearsal_share,
        rehearsal_weight=rehearsal_weight,
        callbacks=[journal, gauge, *([EpochOrder(resumed)] if checkpoints else [])],
    )
    if rehearsal_weight != 1 and trainer.is_world_process_zero():
        log.info("a rehearsed step counts %.3g times in the objective", rehearsal_weight)
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None and output:
            callback.logging_dir = str(output.parent / "tensorboard" / output.name)
    evaluations = None
    if watch is not None and settings.evaluate_steps:
        require_whole_policy(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
        evaluations = Evaluations(
            scratch / EVALUATIONS, settings.evaluate_steps, watch, trainer.leave_out
        )
        trainer.add_callback(evaluations)
    started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    finally:
        journal.close()
    seconds = time.monotonic() - started - (evaluations.seconds if evaluations else 0)
    before = step_of(resumed) if resumed else 0
    if trainer.is_world_process_zero():
        shutil.copy(scratch / STEP_LOG, folder / STEP_LOG)
        if evaluations is not None:
            shutil.copy(scratch / EVALUATIONS, folder / EVALUATIONS)
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    return trainer, _final_metrics(trainer, trainer.state.global_step - before, seconds)


def _default_pass_tokens() -> int | None:
    return 1024 if default_device().type == "cpu" else None


def pad_id_of(tokenizer: Any) -> int:
    """The padding id, or 0: padding is masked out everywhere."""
    return int(tokenizer.pad_token_id or 0)


def _final_metrics(trainer: PactTrainer, steps: int, seconds: float) -> dict[str, float]:
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    last = history[-max(1, len(history) // 10) :]
    metrics = {}
    for name in ("cross_entropy", "kl", "confidence_gap", "held_gap"):
        if found := [entry[name] for entry in last if name in entry]:
            metrics[f"final_{name}"] = sum(found) / len(found)
    per_step = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
    rows = steps * per_step * trainer.args.world_size
    metrics |= {
        "optimizer_steps": trainer.state.global_step,
        "seconds": round(seconds, 2),
        "rows_per_second": round(rows / seconds, 3),
    }
    if peak := peak_memory_mib():
        metrics["peak_memory_mib"] = round(peak, 1)
    return metrics
