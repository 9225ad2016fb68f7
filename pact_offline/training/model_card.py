"""The model card that goes with an adapter."""

from __future__ import annotations

from typing import Any


def model_card(facts: dict[str, Any]) -> str:
    """README.md of an adapter or model directory, in the hub's form."""
    settings, metrics = facts["settings"], facts["metrics"]
    objective = settings["objective"]
    what = {
        "none": "plain supervised fine-tuning",
        "pact": "supervised fine-tuning with the PACT objective (arXiv 2603.07445)",
        "confidence": "supervised fine-tuning with confidences on safety tokens held to the "
        "reference model's",
    }.get(objective, f"supervised fine-tuning with the objective {objective}")
    if objective != "none" and not facts.get("holds", True):
        what = f"plain supervised fine-tuning: the objective {objective} was given and did nothing"
    if "safe_lora" in facts:
        what += ", then projected by Safe LoRA (arXiv 2405.16833)"
    rows = f"{facts['rows']} rows"
    if cut := facts.get("rows_cut"):
        rows += f", {cut} of them with a cut response"
    if left_out := facts.get("rows_left_out_per_epoch"):
        rows += f", {left_out} of them left out of each epoch"
    if refused := facts.get("turns_refused"):
        done = "held, and not learnt" if settings["refused_rows"] == "hold" else "left out"
        rows += (
            f"; {refused} of {facts['turns']} answers, which the reference would have refused, are "
            f"{done}"
        )
    if facts.get("rehearsal_sha256"):
        share = settings["rehearsal_share"]
        rows += f"; beside them, the reference's own answers are rehearsed, {share:.1%} of a batch"
        if (weight := facts.get("rehearsal_weight", 1)) != 1:
            rows += f", and a step of them counts {weight:.3g} times in the objective"
    lines = [
        "---",
        f"base_model: {facts['model']}",
        "library_name: peft" if settings["method"] == "lora" else "library_name: transformers",
        "tags: [pact-offline]",
        "---",
        "",
        "# Fine-tuned with pact-offline",
        "",
        f"{what[0].upper()}{what[1:]}, on {rows}.",
        "",
        f"- fine-tuned from: `{facts['model']}`",
        f"- sha256 of targets.json: `{facts['targets_sha256']}`",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in settings.items()),
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {name} | {value:.6g} |" for name, value in metrics.items()),
        "",
    ]
    return "\n".join(lines)
