"""Rows that the reference would have refused: found in the cache, held or left out in training."""

import csv
import dataclasses
import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import Result
from examples import examples_of

from pact_offline.cache.refused import turns_of
from pact_offline.cache.screen import Screening
from pact_offline.cache.targets import TargetCache
from pact_offline.models.load import load_model
from pact_offline.objectives.confidence import confidence
from pact_offline.rows.chat import Chat
from pact_offline.rows.files import values_of
from pact_offline.rows.subset import Subset, write_subsets
from pact_offline.rows.tokenized import tokenized_by
from pact_offline.rows.tokenizer import load_tokenizer
from pact_offline.safety_tokens.file import SafetyTokens
from pact_offline.settings.stages import FinetuneSettings, RowSettings
from pact_offline.training.collator import ResponseCollator
from pact_offline.training.dataset import memory_mapped
from pact_offline.training.loss import batch_loss
from pact_offline.training.uses import DROPPED, HELD, LEARNT, Uses, uses_of


def by_hand(
    model: Path, examples: Any, ids: list[int], weights: np.ndarray
) -> list[tuple[float, float]]:
    """Share at step 0 and loss of each turn, from a model in memory."""
    reference = load_model(str(model), "float32", device=torch.device("cpu"))
    kept = torch.tensor([i for i, w in zip(ids, weights, strict=True) if w > 0])
    found = []
    for example in examples:
        whole = torch.tensor(example.ids[None]).long()
        with torch.no_grad():
            chances = reference(whole).logits[0].log_softmax(-1)
        for turn in example.turns:
            own = [-float(chances[at - 1, whole[0, at]]) for at in range(turn.start, turn.end)]
            share = float(chances[turn.first - 1, kept].exp().sum())
            found.append((share, sum(own) / len(own)))
    return found


def middle(shares: np.ndarray) -> float:
    """A threshold with turns on both sides."""
    ordered = np.sort(shares)
    return float(ordered[len(ordered) // 2 - 1 : len(ordered) // 2 + 1].mean())


def score(run: Callable[..., Result], model: Path, rows: Any, tokens: Path, folder: Path) -> Path:
    path = folder / "targets.json"
    given = [part for one in rows for part in ("--rows", one)]
    result = run(
        "score", "--model", model, *given, "--safety-tokens", tokens, "--cache", folder / "cache",
        "--backend", "transformers", "--dtype", "float32", "--stored-dtype", "float32", "-o", path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return path


def test_what_the_reference_would_have_refused_is_read_from_the_cache(
    conversations: Path, aligned: Path, tokens_file: Path, targets: Path
) -> None:  # fmt: skip
    tokens, cache = SafetyTokens.load(tokens_file), TargetCache.open(targets)
    found = turns_of(cache, tokens.weights)
    examples = examples_of(aligned, conversations)
    expected = by_hand(aligned, examples, tokens.ids, tokens.weights)
    assert len(found.shares) == sum(len(example.turns) for example in examples)
    np.testing.assert_allclose(found.shares, [share for share, _ in expected], rtol=1e-4)
    np.testing.assert_allclose(found.losses, [loss for _, loss in expected], rtol=1e-4)
    turns = [turn for example in examples for turn in example.turns]
    assert found.steps.tolist() == [turn.end - turn.start for turn in turns]
    rows = [row for row, example in enumerate(examples) for _ in example.turns]
    assert found.rows.tolist() == rows


def test_step_0_is_that_of_the_answers_own_text(
    rows_file: Path, aligned: Path, tokens_file: Path, run: Callable[..., Result], tmp_path: Path
) -> None:
    """A thought that a template writes is trained, and says nothing of a refusal."""
    template = tmp_path / "template.jinja"
    tokenizer = load_tokenizer(str(aligned))
    text = tokenizer.chat_template.replace(
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}",
        "<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' %}<think>\n</think>\n{% endif %}{{ m['content'] }}",
    )
    template.write_text(text)
    tokens = json.loads(tokens_file.read_text())
    tokens["provenance"] = {}
    options = ["--chat-template", template, "--scaffold", "response"]
    found = tmp_path / "tokens.json"
    result = run(
        "tokens", "--aligned", aligned, "--from-list", write_list(tmp_path), "-o", found,
        "--chat-template", template,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    result = run(
        "score", "--model", aligned, "--rows", rows_file, "--safety-tokens", found, "--cache",
        tmp_path / "c", "--backend", "transformers", "--dtype", "float32", "--stored-dtype",
        "float32", "-o", tmp_path / "t.json", *options,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    tokenizer.chat_template = text
    settings = RowSettings(scaffold="response", chat_template=str(template))
    rows = tokenized_by(Chat(tokenizer), [rows_file], settings)
    assert all(turn.first > turn.start for example in rows for turn in example.turns)
    loaded = SafetyTokens.load(found)
    shares = turns_of(TargetCache.open(tmp_path / "t.json"), loaded.weights).shares
    expected = by_hand(aligned, rows, loaded.ids, loaded.weights)
    np.testing.assert_allclose(shares, [share for share, _ in expected], rtol=1e-4)


def write_list(folder: Path) -> Path:
    path = folder / "list.json"
    path.write_text(json.dumps(["I", "Sure", "How"]))
    return path


@pytest.mark.parametrize("refused", ["hold", "drop"])
def test_refused_answers_are_held_or_left_out(
    refused: Any, conversations: Path, aligned: Path, base: Path, tokens_file: Path, targets: Path
) -> None:  # fmt: skip
    """The loss of every batch equals one that is written out turn by turn."""
    tokens, cache = SafetyTokens.load(tokens_file), TargetCache.open(targets)
    found = turns_of(cache, tokens.weights)
    settings = FinetuneSettings(
        objective="confidence", kl_weight=1.5, refused_rows=refused,
        refused_above=middle(found.shares),
    )  # fmt: skip
    uses = uses_of(found, settings)
    refused_turns = found.shares > settings.refused_above
    assert 0 < refused_turns.sum() < len(refused_turns)
    chat = Chat(load_tokenizer(str(aligned)))
    rows = tokenized_by(chat, [conversations], RowSettings())
    dataset = memory_mapped(rows).select(uses.kept_rows)
    assert len(dataset) < len(rows) if refused == "drop" else len(dataset) == len(rows)
    collate = ResponseCollator(0, cache, uses=uses, response_only=False)
    policy = load_model(str(base), "float32", device=torch.device("cpu"))
    weights = torch.from_numpy(tokens.weights)
    ids = torch.tensor(tokens.ids)

    batch = collate([dataset[i] for i in range(len(dataset))])
    parts = batch_loss(policy, batch, ids, weights, settings)

    cross_entropy, kl, gaps, learnt, steps = 0.0, 0.0, [0.0, 0.0], 0, 0
    at = 0
    for index, example in enumerate(rows):
        values, place = cache[index].full, 0
        for turn in example.turns:
            count = turn.end - turn.start
            target = torch.from_numpy(np.array(values[place : place + count]))
            place += count
            is_refused, at = bool(refused_turns[at]), at + 1
            if is_refused and refused == "drop":
                continue
            whole = torch.tensor(example.ids[None]).long()
            chances = policy(whole).logits[0, turn.start - 1 : turn.end - 1].log_softmax(-1)
            ours = chances[:, ids]
            kl += confidence(ours, target, None, weights, torch.arange(count)).sum().item()
            gap = (ours.exp() - target.exp()).abs().sum().item()
            gaps[is_refused] += gap
            steps += count
            if not is_refused:
                own = whole[0, turn.start : turn.end]
                cross_entropy -= chances.gather(1, own[:, None]).sum().item()
                learnt += count
    assert (parts.steps, parts.learnt) == (steps, learnt)
    assert parts.cross_entropy.item() == pytest.approx(cross_entropy, rel=1e-4)
    assert parts.kl.item() == pytest.approx(kl, rel=1e-3)
    assert parts.confidence_gap.item() == pytest.approx(gaps[0], rel=1e-4)
    assert parts.held_gap.item() == pytest.approx(gaps[1], rel=1e-4, abs=1e-6)
    mean = cross_entropy / learnt + 1.5 * kl / steps
    assert (parts.loss / parts.steps).item() == pytest.approx(mean, rel=1e-3)


def test_an_answer_that_is_left_out_reads_no_target_of_another(
    conversations: Path, aligned: Path, targets: Path
) -> None:  # fmt: skip
    """Of a row with three answers, the last, the first or the middle one goes."""
    cache = TargetCache.open(targets)
    chat = Chat(load_tokenizer(str(aligned)))
    rows = tokenized_by(chat, [conversations], RowSettings())
    row = next(index for index in range(len(rows)) if len(rows[index].turns) == 3)
    dataset = memory_mapped(rows)
    ends = np.cumsum(rows.turns)
    first = int(ends[row] - 3)
    for left_out in range(3):
        turns = np.full(int(ends[-1]), LEARNT, np.int8)
        turns[first + left_out] = DROPPED
        turns[first + (left_out + 1) % 3] = HELD
        batch = ResponseCollator(0, cache, uses=Uses(turns, ends))([dataset[row]])
        labels = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
        kept = [t for number, t in enumerate(rows[row].turns) if number != left_out]
        own = np.concatenate([rows[row].ids[turn.start : turn.end] for turn in kept])
        assert labels.tolist() == own.tolist()
        steps = [turn.end - turn.start for turn in rows[row].turns]
        parts = np.split(cache[row].full, np.cumsum(steps)[:-1])
        expected = np.concatenate([part for i, part in enumerate(parts) if i != left_out])
        np.testing.assert_array_equal(batch["target_full"].numpy(), expected)
        assert len(batch["target_response_only"]) == len(labels) == len(batch["is_learnt"])
        held = steps[(left_out + 1) % 3]
        assert int((~batch["is_learnt"]).sum()) == held


def trained(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "training.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("refused", ["hold", "drop"])
def test_a_run_tells_of_refused_rows_and_logs_their_gap_apart(
    refused: str, command: list[Any], run: Callable[..., Result], tmp_path: Path, targets: Path,
    tokens_file: Path,
) -> None:  # fmt: skip
    tokens = SafetyTokens.load(tokens_file)
    found = turns_of(TargetCache.open(targets), tokens.weights)
    above = middle(found.shares)
    count = int((found.shares > above).sum())
    output = tmp_path / "adapter"
    result = run(
        *command, "--objective", "confidence", "--refused-rows", refused, "--refused-above", above,
        "--batch-size", 2, "--epochs", 1, "-o", output,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    facts = json.loads((output / "pact_offline.json").read_text())
    assert facts["turns_refused"] == count
    assert facts["tokens_refused"] == int(found.steps[found.shares > above].sum())
    share = facts["tokens_refused"] / facts["trained_tokens"]
    done = "held, and not learnt" if refused == "hold" else "left out"
    said = f"{count} of 12 answers, {share:.1%} of the steps, would have been refused"
    assert any(said in line and done in line for line in result.stderr.splitlines())
    card = (output / "README.md").read_text()
    assert f"{count} of 12 answers, which the reference would have refused, are {done}" in card
    assert any("held_gap" in step for step in trained(output)) == (refused == "hold")
    steps = 6 if refused == "hold" else (12 - count) // 2
    assert facts["metrics"]["optimizer_steps"] == steps


def test_rows_that_are_all_refused_are_all_held_and_pull_at_nothing(
    command: list[Any], run: Callable[..., Result], tmp_path: Path
) -> None:  # fmt: skip
    """The policy starts as the reference: nothing is learnt, and the objective is 0."""
    output = tmp_path / "adapter"
    result = run(
        *command, "--objective", "confidence", "--refused-rows", "hold", "--refused-above", 0,
        "--epochs", 1, "-o", output,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    metrics = json.loads((output / "pact_offline.json").read_text())["metrics"]
    assert not {"final_cross_entropy", "final_confidence_gap"} & metrics.keys()
    for step in trained(output):
        assert not {"cross_entropy", "confidence_gap", "kl_ratio"} & step.keys()
        assert step["loss"] == pytest.approx(0, abs=1e-3)  # Adam makes steps of rounding errors
        assert step["held_gap"] == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--objective", "none", "--refused-rows", "hold"], "expected an objective that holds"),
        (["--refused-rows", "drop", "--refused-above", 0], "found 0 without 12 refused ones"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: list[Any], said: str, command: list[Any], fails: Callable[..., str], tmp_path: Path
) -> None:  # fmt: skip
    assert said in fails(*command, *options, "-o", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_plain_finetuning_can_leave_refused_rows_out(
    command: list[Any], run: Callable[..., Result], fails: Callable[..., str], tmp_path: Path,
    targets: Path, tokens_file: Path,
) -> None:  # fmt: skip
    tokens = SafetyTokens.load(tokens_file)
    above = middle(turns_of(TargetCache.open(targets), tokens.weights).shares)
    options = ["--objective", "none", "--refused-rows", "drop", "--refused-above", above]
    result = run(*command, *options, "--batch-size", 2, "-o", tmp_path / "adapter")
    assert result.exit_code == 0, result.output
    assert "kl" not in trained(tmp_path / "adapter")[0]
    at = command.index("--targets")
    without = [*command[:at], *command[at + 2 :]]
    assert "--refused-rows drop: expected --targets" in fails(
        *without, *options, "-o", tmp_path / "other"
    )


def test_screen_lists_the_rows_by_how_likely_a_refusal_was(
    rows_file: Path, tokens_file: Path, targets: Path, run: Callable[..., Result]
) -> None:  # fmt: skip
    tokens = SafetyTokens.load(tokens_file)
    found = turns_of(TargetCache.open(targets), tokens.weights)
    above = middle(found.shares)
    count = int((found.shares > above).sum())
    command = ["screen", targets, "--safety-tokens", tokens_file, "--above", above]
    result = json.loads(run(*command, "--json").stdout)
    assert (result["rows"], result["turns"], result["refused_turns"]) == (12, 12, count)
    assert sum(result["histogram"]) == 12
    shares = [turn["share"] for turn in result["top"]]
    assert shares == sorted(shares, reverse=True)
    np.testing.assert_allclose(shares, np.sort(found.shares)[::-1], atol=1e-6)
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    for turn in result["top"]:
        assert turn["origin"] == f"{rows_file}:{turn['row'] + 1}"
        assert turn["prompt"] == rows[turn["row"]]["prompt"][:120]
        assert turn["answer"] == rows[turn["row"]]["response"][:120]
    table = list(csv.DictReader(io.StringIO(run(*command, "--csv", "--top", 3).stdout)))
    assert [float(line["share"]) for line in table] == shares[:3]
    shown = run(*command, "--top", 2).stdout
    assert f"{count} of 12 answers, in {count} of 12 rows, would have been refused" in shown
    assert shown.count(f"{rows_file.name}:") == 2


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_screening_fits_the_terminal(
    width: int, aligned: Path, tokens_file: Path, tmp_path: Path, run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also with a long path, letters of two columns, and line breaks in cells and names."""
    rows = tmp_path / "some\nrows.jsonl"
    said = [{"prompt": "日本 | “語”\x1b[31m\n" * 20, "response": f"Answer\n{i}"} for i in range(3)]
    rows.write_text("".join(json.dumps(one) + "\n" for one in said))
    path = score(run, aligned, [rows], tokens_file, tmp_path)
    monkeypatch.setenv("COLUMNS", str(width))
    lines = run("screen", path, "--safety-tokens", tokens_file).stdout.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith(" share"))
    assert len(lines) == head + 4
    assert sorted(re.findall(r"rows\.jsonl:(\d) ", "\n".join(lines[head:]))) == ["1", "2", "3"]
    starts = {_columns_of(line[: line.index("Answer")]) for line in lines[head + 1 :]}
    assert starts == {lines[head].index("answer")}
    assert max(map(_columns_of, lines[: head - 2])) <= width
    assert max(map(_columns_of, lines[head:])) <= max(width, 50)
    assert "\x1b" not in "".join(lines)


def _columns_of(text: str) -> int:
    return sum(2 if letter in "日本語" else 1 for letter in text)


def test_the_other_rows_of_a_dataset_of_the_hub_are_written_as_parquet(
    rows_file: Path, aligned: Path, tokens_file: Path, run: Callable[..., Result],
    fails: Callable[..., str], tmp_path: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    typed = pa.Table.from_pylist([{**row, "at": i} for i, row in enumerate(rows)])
    typed = typed.set_column(2, "at", typed["at"].cast(pa.timestamp("us")))
    pq.write_table(typed, folder / "train.parquet")
    path = score(run, aligned, [f"hub:{folder}"], tokens_file, tmp_path)
    shares = turns_of(TargetCache.open(path), SafetyTokens.load(tokens_file).weights).shares
    above = middle(shares)
    command = ["screen", path, "--safety-tokens", tokens_file, "--above", above]
    command += ["--rows", f"hub:{folder}", "-o"]
    kept = tmp_path / "kept.parquet"
    result = run(*command, kept)
    assert result.exit_code == 0, result.output
    assert f"{kept}: {int((shares <= above).sum())} of 12 rows" in result.stderr
    assert pq.read_table(kept).equals(typed.filter(pa.array(shares <= above)))
    assert "expected a name that ends in .parquet" in fails(*command, tmp_path / "kept.jsonl")


def test_screen_writes_the_other_rows_as_they_stand(
    rows_file: Path, tokens_file: Path, targets: Path, run: Callable[..., Result],
    fails: Callable[..., str], tmp_path: Path,
) -> None:  # fmt: skip
    tokens = SafetyTokens.load(tokens_file)
    found = turns_of(TargetCache.open(targets), tokens.weights)
    above = middle(found.shares)
    command = ["screen", targets, "--safety-tokens", tokens_file, "--above", above]
    kept = tmp_path / f"kept{rows_file.suffix}"
    assert run(*command, "-o", kept).exit_code == 0
    lines = rows_file.read_text().splitlines()
    assert kept.read_text().splitlines() == [
        line for line, share in zip(lines, found.shares, strict=True) if share <= above
    ]
    assert "expected a name that ends in" in fails(*command, "-o", tmp_path / "kept.csv")
    rows_file.write_text(rows_file.read_text() + "\n")
    assert "has changed since it was scored; nothing is written" in fails(*command, "-o", kept)
    shown = run(*command)
    assert shown.exit_code == 0
    assert "?" in shown.stdout  # what the rows say is not shown, as they are others now


def test_screening_rows_of_several_sources(
    rows_file: Path, aligned: Path, tokens_file: Path, run: Callable[..., Result],
    fails: Callable[..., str], tmp_path: Path,
) -> None:  # fmt: skip
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(rows[:5]))  # all in one line
    path = score(run, aligned, [rows_file, other], tokens_file, tmp_path)
    tokens = SafetyTokens.load(tokens_file)
    top = Screening(TargetCache.open(path), tokens.weights).top()
    assert len(top) == 17
    for turn in top:
        assert turn.answer == rows[turn.row % 12]["response"][:120]
    command = ["screen", path, "--safety-tokens", tokens_file, "--above", top[8].share]
    kept = [tmp_path / "kept.jsonl", tmp_path / "kept.json"]
    assert f"expected a file for each source ({rows_file}, {other}), found 1" in fails(
        *command, "-o", kept[0]
    )
    for twice in (kept[0], rows_file):  # nothing is written over
        said = fails(*command, "-o", twice, "-o", kept[0] if twice == kept[0] else kept[1])
        assert f"-o: expected a file of its own, found {twice} again" in said
    assert run(*command, "-o", kept[0], "-o", kept[1]).exit_code == 0
    refused = {turn.row for turn in top if turn.share > top[8].share}
    assert [json.loads(line) for line in kept[0].read_text().splitlines()] == [
        row for number, row in enumerate(rows) if number not in refused
    ]
    assert json.loads(kept[1].read_text()) == [
        row for number, row in enumerate(rows[:5], start=12) if number not in refused
    ]


def test_rows_that_have_moved_are_named_and_those_of_the_hub_too(
    rows_file: Path, targets: Path, tokens_file: Path, run: Callable[..., Result],
    fails: Callable[..., str], tmp_path: Path,
) -> None:  # fmt: skip
    command = ["screen", targets, "--safety-tokens", tokens_file, "--top", 1]
    moved = rows_file.rename(tmp_path / "moved.jsonl")
    assert "no such file: the beginnings of its rows are not shown" in run(*command).stderr
    assert f"{moved.name}:" in run(*command, "--rows", moved).stdout
    assert "?" not in run(*command, "--rows", moved, "--csv").stdout
    said = fails(*command, "--rows", moved, "--rows", moved)
    assert f"expected the 1 sources that were scored ({rows_file}), found 2" in said
    value = json.loads(targets.read_text())
    value["rows"][0] |= {"source": "hub:somebody/rows", "sha256": None}
    targets.write_text(json.dumps(value))
    result = run(*command)  # asks no hub
    assert result.exit_code == 0
    assert "hub:somebody/rows: is read only if it is named, with --rows" in result.stderr


def test_another_targets_file_or_tokens_end_in_one_line(
    targets: Path, tokens_file: Path, fails: Callable[..., str], tmp_path: Path, aligned: Path,
    run: Callable[..., Result],
) -> None:  # fmt: skip
    others = tmp_path / "others.json"
    run("tokens", "--aligned", aligned, "--from-list", write_list(tmp_path), "-o", others)
    assert "safety ids" in fails("screen", targets, "--safety-tokens", others)
    assert "no such file" in fails("screen", tmp_path / "none", "--safety-tokens", tokens_file)


ROWS = [{"prompt": f"Question {i}, with a “quote”?", "response": f"Answer\n{i}"} for i in range(7)]


def as_csv(rows: list[dict[str, str]], newline: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "response"], lineterminator=newline)
    writer.writeheader()
    writer.writerows(rows)
    return b"\xef\xbb\xbf" + text.getvalue().encode()


def as_arrow(rows: list[dict[str, str]], new: Any) -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def as_parquet(rows: list[dict[str, str]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


LINES = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
FILES = {
    "rows.jsonl": LINES,
    "rows.jsonl.gz": gzip.compress(LINES),
    "rows.json": json.dumps(ROWS).encode(),
    "rows.csv": as_csv(ROWS, "\r\n"),
    "rows.tsv": as_csv(ROWS, "\n").replace(b"prompt,response", b"prompt\tresponse"),
    "rows.parquet": as_parquet(ROWS),
    "rows.arrow": as_arrow(ROWS, pa.ipc.new_file),
    "stream.arrow": as_arrow(ROWS, pa.ipc.new_stream),
}


@pytest.mark.parametrize("name", FILES)
def test_some_rows_of_a_file_are_written_in_its_format(name: str, tmp_path: Path) -> None:
    source = tmp_path / name
    source.write_bytes(FILES[name])
    if name == "rows.tsv":
        text = io.StringIO()
        writer = csv.DictWriter(text, ["prompt", "response"], delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(ROWS)
        source.write_text(text.getvalue())
    kept = np.array([True, False, True, True, False, False, True])
    for suffix in ("", ".gz", ".zst"):
        output = tmp_path / f"kept-{name.removesuffix('.gz')}{suffix}"
        write_subsets([Subset(str(source), kept, output)])
        found = [value.value for value in values_of(str(output))]
        assert found == [row for row, is_kept in zip(ROWS, kept, strict=True) if is_kept]
    assert (output.read_bytes()[:4]) == b"\x28\xb5\x2f\xfd"


def test_targets_that_do_not_say_what_was_scored_are_refused(
    targets: Path, tokens_file: Path, fails: Callable[..., str]
) -> None:
    value = json.loads(targets.read_text())
    for odd in ({}, "rows.jsonl", {"source": 3}):
        targets.write_text(json.dumps(value | {"rows": [odd]}))
        line = fails("screen", targets, "--safety-tokens", tokens_file)
        assert "rows.0: expected an object with a source, found" in line


def test_tokens_of_no_weight_find_nothing_and_are_refused(
    command: list[Any], tokens_file: Path, targets: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    """Not a screening that says that nothing would have been refused."""
    tokens = SafetyTokens.load(tokens_file)
    weightless = [dataclasses.replace(one, direction=-0.5) for one in tokens.tokens]
    dataclasses.replace(tokens, tokens=tuple(weightless)).save(tokens_file)
    expected = "safety tokens: expected one with a weight above 0"
    assert expected in fails("screen", targets, "--safety-tokens", tokens_file)
    words = ["--no-safety-weights", "--refused-rows", "drop", "-o", tmp_path / "adapter"]
    assert expected in fails(*command, *words)
