"""Scoring: this project's scorers against what a script would do, on one machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pact_offline.bench.train import by_itself, device_name, matrix_gflops, weights_in_products
from pact_offline.models.load import load_model
from pact_offline.models.locate import ModelFiles
from pact_offline.progress import bar
from pact_offline.rows.chat import chat_of
from pact_offline.rows.contexts import Context, contexts_of
from pact_offline.rows.tokenized import tokenized_rows
from pact_offline.safety_tokens.file import SafetyTokens
from pact_offline.scoring.backends import make_scorer
from pact_offline.settings.stages import ScoreSettings
from pact_offline.training.trainer import peak_memory_mib

WAYS = {
    "vllm": "this project, vLLM",
    "vllm_compiled": "this project, vLLM, compiled",
    "transformers": "this project, transformers",
    "prompt_logprobs": "vLLM `prompt_logprobs`",
    "script": "row by row, all logits",
}
_SCRIPT_ROWS = 32
_WARM_UP = 32
_PASSES = 3


class _Job(NamedTuple):
    """What a way is measured on; goes to a process of its own."""

    model: str
    rows: list[list[Context]]
    safety_ids: list[int]
    settings: ScoreSettings


class _Timed(NamedTuple):
    start_seconds: float
    seconds: float
    rows: int
    tokens: int
    peak_memory_mib: float


@dataclass(frozen=True)
class ScoringSpeed:
    """One way of scoring.

    Attributes:
        way: a key of `WAYS`.
        start_seconds: loading the model, starting the engine, first requests; in no rate.
        rows_per_second: rows of the dataset.
        tokens_per_second: tokens that the model saw; equal contexts once, where a way shares them.
        share_of_limit: of the machine's rate of matrix products, without the LM head.
        peak_memory_mib: of the process on a CPU, of the accelerator elsewhere; without the other
            processes of tensor parallelism.
    """

    way: str
    start_seconds: float
    rows_per_second: float
    tokens_per_second: float
    share_of_limit: float
    peak_memory_mib: float


@dataclass(frozen=True)
class ScoringBench:
    """All ways on one machine.

    Attributes:
        device: what it ran on.
        dtype: compute dtype.
        matrix_gflops: rate of large matrix products in that dtype.
        rows, contexts, tokens: of the dataset; distinct contexts and their tokens.
        speeds: one entry a way.
    """

    device: str
    dtype: str
    matrix_gflops: float
    rows: int
    contexts: int
    tokens: int
    speeds: list[ScoringSpeed]


def measure_scoring(
    model: ModelFiles, sources: Sequence[str | Path], tokens_path: Path, settings: ScoreSettings
) -> ScoringBench:
    """Score a dataset in each way, each by itself (`bench.train.by_itself`).

    Args:
        model: reference model.
        sources: row files.
        tokens_path: safety_tokens.json.
        settings: dtype, batch and memory.
    """
    chat = chat_of(str(model.path), settings)
    safety = SafetyTokens.load(tokens_path, chat.tokenizer)
    examples = tokenized_rows(model, sources, settings, lambda: chat)
    rows = [contexts_of(example, chat.header_ids) for example in examples]
    job = _Job(str(model.path), rows, safety.ids, settings)
    ways = [way for way in WAYS if find_spec("vllm") or way in ("transformers", "script")]
    timed = {}
    with bar("measuring", len(ways), "ways") as progress:
        for way in ways:
            is_engine = way not in ("transformers", "script")
            timed[way] = by_itself(_run, way, job, spawn=is_engine)
            progress.update(1)
    rate = matrix_gflops(settings.dtype)
    per_token = 2 * weights_in_products(model) / 1e9
    distinct = _distinct(rows)
    return ScoringBench(
        device_name(), settings.dtype, rate, len(rows), len(distinct),
        sum(len(context.fed) for context in distinct),
        [
            ScoringSpeed(
                way,
                found.start_seconds,
                found.rows / found.seconds,
                found.tokens / found.seconds,
                found.tokens / found.seconds * per_token / rate,
                found.peak_memory_mib,
            )
            for way, found in timed.items()
        ],
    )  # fmt: skip


def _distinct(rows: Sequence[Sequence[Context]]) -> list[Context]:
    return list({context.key: context for some in rows for context in some}.values())


def _run(way: str, job: _Job) -> _Timed:
    return {"script": _script, "prompt_logprobs": _prompt_logprobs}.get(way, _scorer)(way, job)


def _scorer(way: str, job: _Job) -> _Timed:
    contexts, started = _distinct(job.rows), time.perf_counter()
    longest = max(len(context.ids) for context in contexts)
    backend, _, compiled = way.partition("_")
    settings = job.settings.model_copy(update={"compile": bool(compiled)})
    scorer = make_scorer(backend, Path(job.model), job.safety_ids, longest, settings)
    with closing(scorer):
        return _timed(job, contexts, started, lambda some: sum(1 for _ in scorer.score(some)))


def _timed(
    job: _Job, contexts: list[Context], started: float, score: Callable[[list[Context]], Any]
) -> _Timed:
    """Median of some passes, after a warm-up that counts as part of the start."""
    score(contexts[:_WARM_UP])
    ready, seconds = time.perf_counter(), []
    for _ in range(_PASSES):
        before = time.perf_counter()
        score(contexts)
        seconds.append(time.perf_counter() - before)
    tokens = sum(len(context.fed) for context in contexts)
    return _Timed(
        ready - started, statistics.median(seconds), len(job.rows), tokens, peak_memory_mib()
    )


def _prompt_logprobs(way: str, job: _Job) -> _Timed:
    """The likeliest 50 ids of every token: what vLLM's own option gives."""
    from pact_offline.models.vllm_engine import prepare_environment

    prepare_environment()
    import vllm

    contexts, started = _distinct(job.rows), time.perf_counter()
    engine = vllm.LLM(
        model=job.model,
        dtype=job.settings.dtype,
        max_model_len=max(len(context.ids) for context in contexts) + 1,
        max_num_batched_tokens=job.settings.batch_tokens,
        max_num_seqs=128,
        max_logprobs=50,
        gpu_memory_utilization=job.settings.gpu_memory_utilization or 0.4,
        enable_prefix_caching=False,
        enforce_eager=True,
        trust_remote_code=False,
        load_format="safetensors",
        disable_log_stats=True,
    )
    options = vllm.SamplingParams(prompt_logprobs=50, max_tokens=1, flat_logprobs=True)

    def score(some: list[Context]) -> None:
        prompts: list[Any] = [{"prompt_token_ids": context.fed.tolist()} for context in some]
        engine.generate(prompts, options, use_tqdm=False)

    found = _timed(job, contexts, started, score)
    engine.llm_engine.engine_core.shutdown()
    return found


@torch.inference_mode()
def _script(way: str, job: _Job) -> _Timed:
    """Both contexts of each row alone, logits and log-softmax of every token."""
    started = time.perf_counter()
    model = load_model(job.model, job.settings.dtype, attention="sdpa")  # a script's default

    def score(some: list[Context]) -> None:
        for context in some:
            ids = torch.tensor(context.fed[None]).long().to(model.device)
            logits = model(ids).logits.float().log_softmax(-1)
            logits[0, context.positions - 1][:, job.safety_ids].cpu()

    rows = job.rows[:_SCRIPT_ROWS]
    contexts = [context for some in rows for context in some]
    return _timed(job._replace(rows=rows), contexts, started, score)


def scoring_table(bench: ScoringBench) -> str:
    """Markdown rows of the speeds."""
    first = bench.speeds[0]
    lines = [
        f"{bench.device}, {bench.dtype}: {bench.matrix_gflops:,.0f} GFLOP/s in matrix products; "
        f"{bench.rows} rows, {bench.contexts} distinct contexts, {bench.tokens:,} tokens",
        "",
        "| | start | rows/s | tokens/s | share of the limit | peak memory "
        "| rows/s of the first, to this |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {WAYS[one.way]} | {one.start_seconds:.0f} s | {one.rows_per_second:.1f} "
        f"| {one.tokens_per_second:,.0f} | {one.share_of_limit:.0%} "
        f"| {one.peak_memory_mib:,.0f} MiB | {first.rows_per_second / one.rows_per_second:.2f} |"
        for one in bench.speeds
    ]
    return "\n".join(lines)
