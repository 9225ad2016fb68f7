"""Training from the cache against plain fine-tuning, a live reference, and the published way."""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pact_offline.errors import MeasurementError
from pact_offline.models.load import default_device, load_model
from pact_offline.models.locate import ModelFiles, locate_model
from pact_offline.objectives.pact import pact
from pact_offline.progress import bar
from pact_offline.rows.chat import chat_of
from pact_offline.rows.contexts import TokenizedExample, response_only_context
from pact_offline.rows.tokenized import tokenized_rows
from pact_offline.safety_tokens.file import SafetyTokens
from pact_offline.settings.stages import FinetuneSettings
from pact_offline.training.finetune import finetune
from pact_offline.training.policy import prepare_policy
from pact_offline.training.trainer import peak_memory_mib

WAYS = {
    "plain": "plain fine-tuning",
    "cache": "PACT from the cache",
    "live": "PACT, live reference, same trainer",
    "published": "PACT, the published way",
}
Found = TypeVar("Found")
_WARM_UP = 2
_PUBLISHED_LENGTH = 512


class _Timed(NamedTuple):
    """Seconds and tokens of each step after the warm-up, and the process's peak memory."""

    seconds: list[float]
    tokens: list[float]
    peak_memory_mib: float


@dataclass(frozen=True)
class TrainingSpeed:
    """One way of training.

    Attributes:
        way: a key of `WAYS`.
        rows_per_second: median over repeats.
        tokens_per_second: real tokens, without padding.
        peak_memory_mib: of the process on a CPU, of the accelerator elsewhere.
        speed_ratio: rows_per_second over plain fine-tuning's; median over pairs of equal steps.
        memory_ratio: peak memory over plain fine-tuning's.
        share_of_limit: of the machine's rate of matrix products in the compute dtype.
    """

    way: str
    rows_per_second: float
    tokens_per_second: float
    peak_memory_mib: float
    speed_ratio: float
    memory_ratio: float
    share_of_limit: float


@dataclass(frozen=True)
class TrainingBench:
    """All ways on one machine.

    Attributes:
        device: what it ran on.
        dtype: compute dtype.
        matrix_gflops: rate of large matrix products in that dtype.
        steps, repeats: measured steps of each run, and runs.
        speeds: one entry a way.
    """

    device: str
    dtype: str
    matrix_gflops: float
    steps: int
    repeats: int
    speeds: list[TrainingSpeed]


def measure_training(
    model: ModelFiles,
    sources: Sequence[str | Path],
    targets: Path,
    tokens_path: Path,
    settings: FinetuneSettings,
    *,
    steps: int,
    repeats: int,
    published_steps: int,
    cache: str | None = None,
) -> TrainingBench:
    """Train some steps in each way, each run by itself (`by_itself`), on the same batches.

    Args:
        model: reference and policy.
        sources: row files.
        targets: their targets.json.
        tokens_path: safety_tokens.json.
        settings: of every run; objective `pact` or `confidence`.
        steps: measured steps of a run, after the warm-up.
        repeats: runs of each way but the published one, in turn.
        published_steps: measured steps of the published way; 0 leaves it out.
        cache: as in `TargetCache.open`.
    """
    runs: dict[str, list[_Timed]] = {way: [] for way in WAYS}
    plan = ["plain", "cache", "live"] * repeats + ["published"] * bool(published_steps)
    with bar("measuring", len(plan), "runs") as progress:
        for way in plan:
            count = published_steps if way == "published" else steps
            rows = [str(source) for source in sources]
            arguments = (way, str(model.path), rows, targets, cache, tokens_path, settings, count)
            # What was compiled stays with a process.
            runs[way].append(by_itself(_run, *arguments, spawn=settings.compile))
            progress.update(1)
    rate = matrix_gflops(settings.dtype)
    # Forward, and gradients of activations; of the weights too where all of them are trained.
    per_token = (4 if settings.method == "lora" else 6) * weights_in_products(model) / 1e9
    plain = runs["plain"]
    speeds = []
    for way, timed in runs.items():
        if not timed:
            continue
        batches = statistics.median(len(t.seconds) / sum(t.seconds) for t in timed)
        tokens = statistics.median(sum(t.tokens) / sum(t.seconds) for t in timed)
        memory = statistics.median(t.peak_memory_mib for t in timed)
        pairs = [
            ours / theirs
            for one, other in zip(plain, timed, strict=False)
            for ours, theirs in zip(one.seconds, other.seconds, strict=False)
        ]
        speeds.append(
            TrainingSpeed(
                way,
                settings.batch_size * settings.gradient_accumulation * batches,
                tokens,
                memory,
                statistics.median(pairs),
                memory and memory / statistics.median(t.peak_memory_mib for t in plain),
                tokens * per_token / rate,
            )
        )
    return TrainingBench(device_name(), settings.dtype, rate, steps, repeats, speeds)


def by_itself(function: Callable[..., Found], *arguments: Any, spawn: bool = False) -> Found:
    """Call what is measured so that peak memory is its own: on a CPU in a process of its own.

    A GPU's peak can be set back, and there a process would take longer to start than to measure.

    Args:
        function, arguments: what is called.
        spawn: take a process on a GPU too.

    Raises:
        MeasurementError: that process was killed.
    """
    if is_gpu := default_device().type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    if spawn or not is_gpu:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
            try:
                return other.submit(function, *arguments).result()
            except BrokenProcessPool:
                raise MeasurementError(
                    f"{arguments[0]}: expected a process that ends by itself, found it killed; "
                    "what it printed is above, and too little memory is the usual reason"
                ) from None
    torch.cuda.reset_peak_memory_stats()
    return function(*arguments)


def _run(
    way: str,
    model: str,
    sources: list[str],
    targets: Path,
    cache: str | None,
    tokens_path: Path,
    settings: FinetuneSettings,
    steps: int,
) -> _Timed:
    if way == "published":
        return _published(model, sources, tokens_path, settings, steps)
    files = locate_model(model)
    rows = len(tokenized_rows(files, sources, settings, lambda: chat_of(model, settings)))
    per_step = settings.batch_size * settings.gradient_accumulation
    whole_steps = rows // per_step
    changes: dict[str, Any] = {"refused_rows": "learn"}  # a live reference holds none
    changes["epochs"] = (steps + _WARM_UP) / whole_steps
    changes["objective"] = "none" if way == "plain" else settings.objective
    changes["reference"] = "live" if way == "live" else "cache"
    with tempfile.TemporaryDirectory() as scratch:
        facts = finetune(
            files,
            sources,
            Path(scratch, "run"),
            settings.model_copy(update=changes),
            targets_path=targets if way == "cache" else None,
            tokens_path=tokens_path,
            cache_place=cache,
        )
        text = Path(scratch, "run", "training.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    seconds = [b["seconds"] - a["seconds"] for a, b in itertools.pairwise(lines)]
    tokens = [line["tokens"] for line in lines[1:]]
    first = _WARM_UP - 1
    return _Timed(seconds[first:], tokens[first:], facts["metrics"].get("peak_memory_mib", 0.0))


def _published(
    model: str, sources: list[str], tokens_path: Path, settings: FinetuneSettings, steps: int
) -> _Timed:
    """Rows padded to 512 tokens, all logits, and two passes of a live reference for each batch."""
    chat, device = chat_of(model, settings), default_device()
    safety = SafetyTokens.load(tokens_path, chat.tokenizer)
    examples = [*tokenized_rows(locate_model(model), sources, settings, lambda: chat)]
    header, size = chat.header_ids, settings.batch_size
    weights = torch.from_numpy(safety.weights).to(device)
    reference = load_model(model, settings.dtype, attention="sdpa")
    policy = prepare_policy(model, settings.model_copy(update={"attention": "sdpa"})).train()
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate)
    seconds, tokens = [], []
    for number in range(steps + 1):
        batch = [examples[(number * size + i) % len(examples)] for i in range(size)]
        started = time.perf_counter()
        loss = _published_loss(policy, reference, batch, header, safety.ids, weights, device)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        tokens.append(float(sum(len(example.ids) for example in batch)))
    return _Timed(seconds[1:], tokens[1:], peak_memory_mib())


def _right_padded(rows: Sequence[Any], length: int, device: torch.device) -> dict[str, Tensor]:
    ids = torch.zeros((len(rows), length), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _published_loss(
    policy: Any,
    reference: Any,
    batch: Sequence[TokenizedExample],
    header: Sequence[int],
    safety_ids: list[int],
    weights: Tensor,
    device: torch.device,
) -> Tensor:
    whole = _right_padded([e.ids for e in batch], _PUBLISHED_LENGTH, device)
    turns = [(number, turn) for number, e in enumerate(batch) for turn in range(len(e.turns))]
    only = [response_only_context(batch[number], header, turn) for number, turn in turns]
    short = _right_padded([c.fed for c in only], max(len(c.fed) for c in only), device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=policy.dtype != torch.float32):
        logits = policy(**whole).logits.float()
        with torch.no_grad():
            full = reference(**whole).logits.float()
            response_only = reference(**short).logits.float()
    parts = []
    for alone, ((number, turn), context) in enumerate(zip(turns, only, strict=True)):
        first, count = batch[number].turns[turn].start - 1, context.steps
        start = context.spans[0][0] - 1
        steps = torch.arange(count, device=device)
        kl = pact(
            logits[number, first : first + count][:, safety_ids],
            full[number, first : first + count][:, safety_ids],
            response_only[alone, start : start + count][:, safety_ids],
            weights,
            steps,
        )
        labels = whole["input_ids"][number, first + 1 : first + 1 + count]
        picked = logits[number].log_softmax(-1)[first : first + count]
        parts.append(kl - picked.gather(-1, labels.unsqueeze(-1)).squeeze(-1))
    return torch.cat(parts).mean()


def matrix_gflops(dtype: str) -> float:
    """Rate of square matrix products here; GFLOP/s, the best of 2 seconds."""
    device = default_device()
    size = 2048 if device.type == "cpu" else 8192  # a GPU is not filled by less
    one, other = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in "ab")
    best, ends = float("inf"), time.perf_counter() + 2
    while time.perf_counter() < ends:
        started = time.perf_counter()
        one @ other
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9


def weights_in_products(model: ModelFiles) -> int:
    """Weights of the linear layers, without the LM head: one product each of a token's pass."""
    loaded = load_model(str(model.path), "bfloat16")
    head = loaded.get_output_embeddings()
    return sum(
        module.weight.numel()
        for module in loaded.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )


def device_name() -> str:
    """What this process computes on."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"CPU, {torch.get_num_threads()} threads"


def training_table(bench: TrainingBench) -> str:
    """Markdown rows of the speeds."""
    lines = [
        f"{bench.device}, {bench.dtype}: {bench.matrix_gflops:,.0f} GFLOP/s in matrix products; "
        f"{bench.repeats} runs of {bench.steps} steps each",
        "",
        "| | rows/s | real tokens/s | peak memory | speed, to plain | memory, to plain "
        "| share of the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {WAYS[one.way]} | {one.rows_per_second:.2f} | {one.tokens_per_second:,.0f} "
        f"| {one.peak_memory_mib:,.0f} MiB | {one.speed_ratio:.3f} | {one.memory_ratio:.2f} "
        f"| {one.share_of_limit:.0%} |"
        for one in bench.speeds
    ]
    return "\n".join(lines)
