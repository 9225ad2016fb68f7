"""The reference's own answers to prompts, scored: what a fine-tuning rehearses."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pact_offline.cache.identity import compute_name
from pact_offline.cache.targets import answers_place
from pact_offline.errors import InputError, PactError, UnsupportedModelError
from pact_offline.files import read_json, sha256_file, write_json, written_aside
from pact_offline.models.backends import ANSWERS_VERSION, choose_backend, engine_name
from pact_offline.models.locate import ModelFiles
from pact_offline.progress import bar
from pact_offline.rows.chat import Chat, chat_of
from pact_offline.rows.describe import end_ids
from pact_offline.rows.files import checksum_of
from pact_offline.rows.positions import Positions
from pact_offline.rows.read import read_rows
from pact_offline.rows.row import Row
from pact_offline.scoring.fill import ScoreSummary
from pact_offline.scoring.score import score
from pact_offline.settings.stages import (
    AnswerSettings,
    RehearseSettings,
    ScoreSettings,
)

log = logging.getLogger(__name__)

_BATCH = 32


def rehearse(
    model: ModelFiles,
    sources: Sequence[str],
    tokens_path: Path,
    cache: str,
    settings: RehearseSettings,
    output: Path,
) -> ScoreSummary:
    """Let the reference answer prompts, write the answers as rows, and score them.

    Args:
        model: the reference model.
        sources: files of prompts; answers in them are not read.
        tokens_path: the safety tokens.
        cache: directory or URL of stores.
        settings: of the answers and of scoring.
        output: targets.json to write; the rows lie beside it.

    Raises:
        InputError: prompts that cannot be used, or none is answered.
        UnsupportedModelError: vLLM was asked for, and refuses the model.
    """
    chat = chat_of(str(model.path), settings)
    read = [row for source in sources for row in _prompts(source, settings)]
    asked = [(row, chat.prompt_ids(row)) for row in read]
    rows, prompts = _that_fit(model, asked, settings, len(chat.header_ids))
    place = answers_place(output)
    made_of = _made_of(model, chat, rows, prompts, settings)
    if _are_known(place, made_of):
        log.info("%s: the answers are known", place)
    else:
        _write(place, rows, _answers(model, chat, prompts, settings), made_of)
    values = settings.model_dump(include={*ScoreSettings.model_fields})
    scored = ScoreSettings.model_validate({**values, "columns": {}, "turns": "last"})
    made = {
        "prompts": [{"source": source, "sha256": checksum_of(source)} for source in sources],
        **settings.model_dump(include={*AnswerSettings.model_fields}),
    }
    return score(
        model, [place], tokens_path, cache, scored, output=output, made_from={"rehearsal": made}
    )


def _that_fit(
    model: ModelFiles,
    asked: Sequence[tuple[Row, list[int]]],
    settings: RehearseSettings,
    header: int,
) -> tuple[list[Row], list[list[int]]]:
    """Refuse, cut or leave out, before anything is written, prompts of which no answer could be
    scored.

    Args:
        model: the reference.
        asked: rows and the token ids of their prompts.
        settings: `long_rows` says which; of one that is cut, as in scoring, the end is asked.
        header: tokens of the assistant header.
    """
    positions, limit = Positions(model.path), settings.max_tokens
    fitting = []
    for row, ids in asked:
        if len(ids) >= limit:
            if settings.long_rows == "drop":
                continue
            if settings.long_rows == "refuse":
                raise InputError(
                    f"{row.origin}: expected a prompt of less than {limit} tokens, found "
                    f"{len(ids)}; raise --max-tokens, shorten it, or set --long-rows"
                )
            ids = ids[-min(limit - 1, max(header, limit - settings.answer_tokens)) :]
        positions.require(ids, row.origin, settings.answer_tokens)
        fitting.append((row, ids))
    if not fitting:
        raise InputError(
            f"{asked[0][0].origin}: expected a prompt of less than {settings.max_tokens} tokens, "
            f"found none among {len(asked)}; raise --max-tokens"
        )
    if left_out := len(asked) - len(fitting):
        log.warning(
            "%d of %d prompts have %d tokens or more (--max-tokens), and are left out",
            left_out,
            len(asked),
            settings.max_tokens,
        )
    return [row for row, _ in fitting], [ids for _, ids in fitting]


def _made_of(
    model: ModelFiles,
    chat: Chat,
    rows: Sequence[Row],
    prompts: Sequence[Sequence[int]],
    settings: RehearseSettings,
) -> dict[str, Any]:
    """What decides the answers."""
    pairs = zip(rows, prompts, strict=True)
    asked = json.dumps([[_as_row(row, ""), ids] for row, ids in pairs])
    return {
        "model": model.identity,
        "template": [chat.template_sha256, chat.template_kwargs],
        "prompts": hashlib.sha256(asked.encode()).hexdigest(),
        "answer_tokens": settings.answer_tokens,
        "engine": [
            engine_name(choose_backend(settings.backend, settings.load_in)[0]),
            compute_name(settings.dtype, settings.load_in),
            ANSWERS_VERSION,
        ],
    }


def _are_known(place: Path, made_of: dict[str, Any]) -> bool:
    """Whether answers are there that were made of the same, by a run that was killed, or whose
    targets are gone."""
    try:
        found = read_json(_facts_place(place))
        return bool(found == {"made_of": made_of, "sha256": sha256_file(place)})
    except (PactError, OSError):
        return False


def _facts_place(answers: Path) -> Path:
    return answers.with_suffix(".json")


def _write(
    place: Path, rows: Sequence[Row], answers: Sequence[str], made_of: dict[str, Any]
) -> None:
    """Write the answers as rows, then what they were made of."""
    said = [pair for pair in zip(rows, answers, strict=True) if pair[1]]
    if not said:
        raise InputError(f"{rows[0].origin}: expected an answer to a prompt, found none to any")
    if len(said) < len(rows):
        left_out = len(rows) - len(said)
        log.warning("%d of %d prompts got no answer, and are left out", left_out, len(rows))
    lines = [json.dumps(_as_row(row, answer), ensure_ascii=False) for row, answer in said]
    with written_aside(place) as aside:
        aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    write_json(_facts_place(place), {"made_of": made_of, "sha256": sha256_file(place)})


def _prompts(source: str, settings: RehearseSettings) -> list[Row]:
    rows = read_rows(
        source, needs_response=False, columns=settings.columns, bad_rows=settings.bad_rows
    )
    if settings.per_file is None or settings.per_file >= len(rows):
        return rows
    return [rows[number * len(rows) // settings.per_file] for number in range(settings.per_file)]


def _as_row(row: Row, answer: str) -> dict[str, Any]:
    tools = {} if row.tools is None else {"tools": [*row.tools]}
    return {"messages": [*row.prompt, {"role": "assistant", "content": answer}], **tools}


def _answers(
    model: ModelFiles, chat: Chat, prompts: Sequence[Sequence[int]], settings: RehearseSettings
) -> list[str]:
    """The text of each answer; empty where the model says nothing."""
    backend, _ = choose_backend(settings.backend, settings.load_in)
    texts = None
    with bar("answering", len(prompts), "prompts") as progress:
        if backend == "vllm":
            try:
                texts = _by_vllm(model, chat, prompts, settings, progress.update)
            except UnsupportedModelError as refusal:
                if settings.backend == "vllm":
                    raise
                log.warning("%s, as --backend auto does now", refusal)
        if texts is None:
            texts = _by_transformers(model, chat, prompts, settings, progress.update)
    return [text.rstrip("\ufffd").strip() for text in texts]  # a letter may be cut in half


def _by_vllm(
    model: ModelFiles,
    chat: Chat,
    prompts: Sequence[Sequence[int]],
    settings: RehearseSettings,
    progress: Callable[[int], object],
) -> list[str]:
    from pact_offline.models.vllm_answers import VllmAnswers

    ends = end_ids(str(model.path), chat)
    texts = [""] * len(prompts)
    with VllmAnswers(
        model.path,
        longest=max(map(len, prompts)) + settings.answer_tokens,
        prompts=len(prompts),
        dtype=settings.dtype,
        batch_tokens=settings.batch_tokens,
        tensor_parallel_size=settings.tensor_parallel_size,
        gpu_memory_utilization=settings.gpu_memory_utilization,
    ) as engine:
        for number, ids in engine.answer(prompts, ends, settings.answer_tokens):
            texts[number] = chat.tokenizer.decode(ids, skip_special_tokens=True)
            progress(1)
    return texts


def _by_transformers(
    model: ModelFiles,
    chat: Chat,
    prompts: Sequence[Sequence[int]],
    settings: RehearseSettings,
    progress: Callable[[int], object],
) -> list[str]:
    from pact_offline.models.generate import generate
    from pact_offline.models.load import load_model

    return generate(
        load_model(str(model.path), settings.dtype, load_in=settings.load_in),
        chat.tokenizer,
        prompts,
        max_new_tokens=settings.answer_tokens,
        batch_size=_BATCH,
        end_of_turn=chat.end_of_turn,
        progress=progress,
    )
