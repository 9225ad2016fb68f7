"""What a run did, in numbers: rows, parameters, and whether it held the policy to anything."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pact_offline.rows.chat import Chat
from pact_offline.rows.describe import end_ids, ends_with
from pact_offline.rows.tokenized import TokenizedRows
from pact_offline.settings.stages import (
    BUILT_IN_OBJECTIVES,
    FinetuneSettings,
    LoraSettings,
    ObjectiveSettings,
)
from pact_offline.training.uses import LEARNT, Uses

_LOOKED_AT = 1000  # rows whose ends are looked at
_OF_ONE_OBJECTIVE = {
    "pact": (
        "gate", "temperature", "alpha", "bias", "gate_temperature", "gate_mass", "window", "tau",
        "boost",
    ),
    "first_tokens": ("betas",),
}  # fmt: skip
_OF_LORA = tuple(name for name in LoraSettings.model_fields if name.startswith("lora_"))


def why_nothing_is_held(settings: ObjectiveSettings, longest: int) -> str | None:
    """Why a run's objective adds nothing to its loss; None where it does hold the policy.

    Args:
        settings: of the objective.
        longest: steps of the longest answer.
    """
    if settings.objective == "none":
        return "--objective none"
    is_constant = settings.kl_schedule == "constant"
    if settings.kl_weight == 0 and (is_constant or settings.kl_weight_end == 0):
        return "--kl-weight is 0 all along"
    if settings.first_weight == 0 and settings.first_steps >= longest:
        return (
            f"--first-weight is 0 for the first {settings.first_steps} steps, and the longest "
            f"response has {longest}"
        )
    return None


def trained_parts(policy: Any) -> dict[str, Any]:
    """How much of a policy is trained.

    Returns:
        `parameters`: those that are trained, `share`: of all, `modules`: by last name, how many
        modules, and parameters of experts, got an adapter; empty where all weights are trained.
    """
    # DeepSpeed may hold a parameter elsewhere, and says how large it is.
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in policy.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    names = [
        *getattr(policy, "targeted_module_names", []),
        *getattr(policy, "targeted_parameter_names", []),
    ]
    return {
        "parameters": trained,
        "share": trained / sum(size for size, _ in sizes),
        "modules": dict(sorted(Counter(name.rpartition(".")[2] for name in names).items())),
    }


def describe_trained(parts: dict[str, Any]) -> str:
    """`trained_parts` in a line."""
    modules = ", ".join(f"{name} ({count})" for name, count in parts["modules"].items())
    share = f"{parts['parameters']:,} parameters, {parts['share']:.2%} of all"
    return f"trains {share}" + (f": adapters on {modules}" if modules else "")


def count_rows(rows: TokenizedRows, per_batch: int, uses: Uses | None = None) -> dict[str, int]:
    """Rows, answers and trained tokens; what is cut, cannot be used, or fills no batch.

    Args:
        rows: tokenized.
        per_batch: rows of a batch, of every process.
        uses: what each answer is for. None: nothing is known of refused ones, and every answer is
            learnt.
    """
    left = len(rows)
    refused = {}
    if uses is not None:
        steps, left = rows.turn_steps, len(uses.kept_rows)
        refused = {
            "turns_refused": int((uses.turns != LEARNT).sum()),
            "tokens_refused": int(steps[uses.turns != LEARNT].sum()),
        }
    return {
        "rows": len(rows),
        "turns": int(rows.turns.sum()),
        "trained_tokens": int(rows.steps.sum()),
        "rows_cut": int(rows.is_cut.sum()),
        "rows_bad": sum(facts.bad for facts in rows.facts),
        "rows_long": sum(facts.long for facts in rows.facts),
        "rows_left_out_per_epoch": left % per_batch,
        **refused,
    }


def why_answers_may_not_stop(model: str, chat: Chat, rows: TokenizedRows) -> str | None:
    """A line where none of the first answers ends with an end of turn that the model knows.

    Args:
        model: its directory.
        chat: its tokenizer and template.
        rows: tokenized; answers that are cut say nothing.
    """
    ends = end_ids(model, chat)
    whole = [row for i in range(min(len(rows), _LOOKED_AT)) if not (row := rows[i]).is_cut]
    if not whole or any(ends_with(row, ends) for row in whole):
        return None
    last = whole[0].ids[whole[0].turns[-1].end - 1]
    known = ", ".join(repr(chat.tokenizer.decode([end])) for end in ends) or "none"
    return (
        f"no answer ends with a token that ends one for the model (known: {known}; the first ends "
        f"with {chat.tokenizer.decode([last])!r}): what is trained here may not learn to stop"
    )


def _unread(settings: FinetuneSettings) -> list[str]:
    """A line for the settings that are not at their defaults and that this run does not read."""
    unread = {"--method full": _OF_LORA} if settings.method == "full" else {}
    if settings.objective in BUILT_IN_OBJECTIVES:
        unread[f"--objective {settings.objective}"] = tuple(
            name
            for objective, names in _OF_ONE_OBJECTIVE.items()
            if objective != settings.objective
            for name in names
        )
    lines = []
    for reader, names in unread.items():
        given = [
            ("--no-" if value is False else "--") + name.replace("_", "-")
            for name in names
            if (value := getattr(settings, name)) != FinetuneSettings.model_fields[name].default
        ]
        if given:
            lines.append(f"{', '.join(given)}: not read with {reader}")
    return lines


def remarks(
    settings: FinetuneSettings,
    counts: dict[str, int],
    unheld: str | None,
    *,
    unended: str | None = None,
    is_rehearsed: bool = False,
) -> list[str]:
    """What a person should know before a run: a line for each thing that may not be meant.

    Args:
        settings: of the run.
        counts: from `count_rows`.
        unheld: from `why_nothing_is_held`.
        unended: from `why_answers_may_not_stop`.
        is_rehearsed: whether rows of the reference's own answers are mixed in.
    """
    rows, left_out = counts["rows"], counts["rows_left_out_per_epoch"]
    lines = [unended] if unended else []
    lines += _unread(settings)
    if unheld and settings.objective != "none":
        lines.append(
            f"--objective {settings.objective} does nothing, and this is plain fine-tuning: "
            f"{unheld}"
        )
    if settings.objective == "pact" and (is_rehearsed or settings.refused_rows == "hold"):
        lines.append(
            "--objective pact is not zero at the reference: rows that are held or rehearsed pull "
            "the policy on to refuse everything; --objective confidence is"
        )
    is_alone = settings.objective == "confidence" and not is_rehearsed and not unheld
    if is_alone and settings.reference == "cache" and settings.rehearsal_share:
        lines.append(
            "nothing is rehearsed: by itself --objective confidence may come to refuse what the "
            "reference answers; --rehearsal takes what `pact-offline rehearse` makes "
            "(--rehearsal-share 0: as meant)"
        )
    each = settings.rehearsal_share / (1 - settings.rehearsal_share)
    if is_rehearsed and settings.epochs * (rows - left_out) * each < 1:
        lines.append(
            f"nothing is rehearsed: --rehearsal-share {settings.rehearsal_share:g} of so few rows "
            "is less than one"
        )
    is_held = settings.refused_rows == "hold" and counts.get("turns_refused")
    if (settings.gap_warns or settings.gap_stops) and not is_rehearsed and not is_held:
        lines.append(
            "--gap-warns and --gap-stops have nothing to read: no row is held or rehearsed"
        )
    if refused := counts.get("turns_refused"):
        share = counts["tokens_refused"] / counts["trained_tokens"]
        done = "held, and not learnt" if settings.refused_rows == "hold" else "left out"
        lines.append(
            f"{refused} of {counts['turns']} answers, {share:.1%} of the steps, would have been "
            f"refused by the reference (above {settings.refused_above:g}): {done}"
        )
    if counts["rows_cut"]:
        lines.append(
            f"{counts['rows_cut']} of {rows} rows are cut at {settings.max_tokens} tokens "
            "(--max-tokens): what follows, the end of an answer or whole answers, is not trained"
        )
    if left_out and settings.row_order == "as_given":
        lines.append(
            f"the last {left_out} of {rows} rows are never trained: they fill no batch "
            "(--batch-size, of every process)"
        )
    elif left_out:
        lines.append(
            f"{left_out} of {rows} rows, drawn anew each time, are left out of each epoch: they "
            "fill no batch (--batch-size, of every process)"
        )
    return lines
