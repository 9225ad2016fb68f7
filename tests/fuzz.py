"""Odd input for every command: options, rows, JSON and YAML files, models and places to write.

`python tests/fuzz.py --count 10000 --seed 0` prints, for each command, how many inputs it took and
how many it refused; anything but exit code 0, 1 or 2, a line that is not one, or something that a
refused command has left behind is a finding. No model is run: what would load one ends there, and
counts as taken.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import shutil
import signal
import stat
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import click
from click.testing import CliRunner, Result

from pact_offline.cli import cli
from pact_offline.errors import ModelError, PactError

REACHED = "here the work would begin"
_SECONDS = 60

# Of each command, arguments that it takes. Files and folders are those of `Inputs`.
COMMANDS: dict[str, str] = {
    "tokens": "--aligned model --base base --refusals rows.jsonl -o OUT.json",
    "rows": "conversations.jsonl rows.csv rows.parquet --model model --show 1",
    "tokens --from-list": "--aligned model --from-list list.json -o OUT.json",
    "score": "--model model --rows rows.jsonl --safety-tokens tokens.json --cache cache "
    "-o OUT.json --backend transformers --config settings.yaml",
    "finetune": "--model model --rows rows.jsonl --targets targets.json "
    "--safety-tokens tokens.json -o OUT --config settings.yaml --batch-size 2",
    "finetune --rehearsal": "--model model --rows rows.jsonl --targets targets.json "
    "--safety-tokens tokens.json --rehearsal rehearsal.json --objective confidence --refused-rows "
    "hold --refused-above 0.01 --rehearsal-share 0.4 -o OUT --batch-size 2",
    "screen": "targets.json --safety-tokens tokens.json --above 0.01 -o OUT.jsonl",
    "rehearse": "--model model --prompts prompts.jsonl --safety-tokens tokens.json --cache cache "
    "-o OUT.json --backend transformers --answer-tokens 3",
    "modules": "--model model --lora-modules q_proj --lora-first-layer 1",
    "merge": "--model model --adapter adapter -o OUT",
    "safe-lora": "--model model --base base --adapter adapter -o OUT --threshold 0.5",
    "evaluate": "--name run --model model --harmful prompts.jsonl --borderline prompts.jsonl "
    "--benign prompts.jsonl --task rows.jsonl --safety-tokens tokens.json --max-new-tokens 2 "
    "--reference evaluation --answers OUT.answers --backend transformers -o OUT",
    "answer": "--model model --adapter adapter --harmful prompts.jsonl --task rows.jsonl "
    "--max-new-tokens 2 --backend transformers --answers OUT",
    "evaluate --set": "--name run --model model --set advbench=published.csv --set "
    "jokes:answer=prompts.jsonl --set quiz:task=rows.jsonl --prefill 1,3 --task-scores "
    "quiz=contains --max-new-tokens 2 --backend transformers -o OUT",
    "report": "metrics.json --safety-tokens tokens.json --benchmarks benchmarks "
    "--config-file settings.yaml --title Page --screening screen.json --adapters runs "
    "--compare metrics.json -o OUT.html",
    "demo extract": "-o OUT",
    "demo align": "--base model --refusals rows.jsonl --benign prompts.jsonl "
    "--harmful-check prompts.jsonl --benign-check prompts.jsonl --task-check prompts.jsonl -o OUT",
    "demo aligned": "--base model --adapter adapter -o OUT",
    "cache ls": "cache",
    "cache show": "targets.json 3 --safety-tokens tokens.json --rows rows.jsonl --model model",
    "cache verify": "targets.json",
    "cache verify --repair": "cache --repair",
    "cache audit": "targets.json --model model --rows rows.jsonl --safety-tokens tokens.json",
    "cache digest": "targets.json",
    "cache gc": "cache --yes --older-than 0",
    "cache references": "--remove --yes --older-than 30",
    "bench equality": "--model model --rows rows.jsonl --targets targets.json "
    "--safety-tokens tokens.json --batch-size 2",
    "bench cache": "--steps 64 --targets targets.json --policy targets.json "
    "--safety-tokens tokens.json",
    "bench train": "--model model --rows rows.jsonl --targets targets.json "
    "--safety-tokens tokens.json --batch-size 2",
    "bench score": "--model model --rows rows.jsonl --safety-tokens tokens.json",
    "bench rows": "--model model --rows rows.jsonl --safety-tokens tokens.json --count 1000",
}

_DIGITS = "9" * 5000
# As they stand in JSON.
ODD_VALUES = [
    "null", "true", "false", "0", "-1", "1", "1.5", "-0.0", "1e400", "-1e400", "NaN", "Infinity",
    "-Infinity", _DIGITS, f"-{_DIGITS}", "9" * 4000, "1e308", "5e-324", str(2**31), str(2**32),
    str(2**63), str(-(2**63) - 1), str(2**64), '""', '" "', '"a"', '"0"', '"-1"', '"../.."', '"/"',
    '"\\u0000"', '"\\ud800"', '"\\u2028"', '"a\\nb"', '"\\u001b[31m"', '"é"', f'"{"a" * 5000}"',
    f'"{"0" * 32}"', f'"{"f" * 64}"', '"memory://a"', '"file:///"', '"hub:a/b"', '"NaN"', "[]",
    "{}", "[[]]", "[null]", "[1, 2]", '["a"]', '{"a": 1}', '{"a": {"b": []}}', "[NaN]",
    "[" * 100_000, '{"a":' * 100_000, "[" * 500 + "]" * 500, "'a'", "01", "1_000", "", "//",
]  # fmt: skip
ODD_TEXTS = [
    "", " ", "0", "-1", "1", "2", "1.5", "nan", "inf", "-inf", "1e400", "1e-400", _DIGITS,
    str(2**31), str(2**32), str(2**63), str(-(2**70)), "0x10", "1_0", "٣", "²", "true", "none",
    "a", "A", "a b", "é", "\0", "a\0b", "\ud800", "\udcff", "a\nb", "\x1b[31m", "\u2028", "😀",
    "x" * 300, "x/" * 3000, "y" * 100_000, ",", "a,,b", "--", "-", "=", "%s", "{}", "$HOME", "~",
    "a=b", "prompt=response", "prompt=prompt,response=a.b", "messages=a,role=b,content=c",
    '{"a": 1}', "[1]", "{", "enable_thinking=false", "messages=NaN",
    "1/1", "2/3", f"1/{_DIGITS}", "hub:", "hub:a", "hub:a/b", "hub:a/b:c", "hub:a@b", "hub:../..",
    "a+b", "model+adapter", "model+", "+adapter", "a@b", "a@", "@", "a@b@c", "a/b+c@d",
    "memory://a", "memory://", "file://", "file:///", "nosuch://a", "://", "::", "a::b", "zip://a::b",
    "file.py:f", "none.py:f", "float32", "uint8", "pact", "vllm", "auto", "full", "live", "eager",
    "linear",
]  # fmt: skip
ODD_PLACES = [
    ".", "..", "/", "./", "//", "../..", "here.txt", "here.txt/a", "here.txt/a/b", "folder",
    "folder/", "folder/a", "empty", "fifo", "fifo/a", "loop", "loop/a", "dangling", "closed/a",
    "/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem", "/proc/a", "/sys/a", "nowhere",
    "nowhere/a/b", "model", "base", "adapter", "evaluation", "cache", "benchmarks", "rows.jsonl",
    "tokens.json", "targets.json", "metrics.json", "list.json", "settings.yaml", "rows.parquet",
    "rows.csv", "conversations.jsonl", "rehearsal.json", "rehearsal.answers.jsonl", "screen.json",
    "runs", "broken.parquet", "here.parquet", "model/config.json", "z" * 255, "z" * 256, ".hidden",
    "-o",
]  # fmt: skip
ODD_YAML = [
    "", "a", "- 1", "{}", "1: 2", "null: 1", "? [1, 2]\n: 3", "? {a: b}\n: c", "max_tokens: ~",
    "!!python/object:os.system {}", "max_tokens: !!python/name:os.system", "!!binary a",
    "!!set {a}", "dtype: !!binary YQ==", "seed: !!int a", "seed: !!int ''", "gate: !!bool a",
    "epochs: !!float a",
    "title: !!timestamp a", "seed: 2020-13-45", "seed: 2020-01-01", "&a [*a]", "a: &a {b: *a}",
    "lora_modules: &a [*a]", "lora_modules: &a\n- *a", "b: *a", "a: 1\na: 2", "<<: 1", "<<: {a: 1}",
    "{<<: [{a: 1}]}", "--- a\n--- b", "%YAML 9.9\n---\na: 1", "\ta: 1", "a: [", 'a: "\\ud800"',
    'lora_modules: ["\\ud800"]', 'objective: "a\\0b"', 'guard: "\\0"', "seed: 0x" + "f" * 5000,
    f"seed: {_DIGITS}", "seed: 1:30:00", "epochs: .inf", "epochs: .nan", "epochs: -.inf",
    "epochs: 1.0e+400", "learning_rate: 1e400", "max_tokens: 1e3", "max_tokens: [1]",
    "max_tokens: {a: 1}", "max_tokens: true", "max_tokens: 1.5", f"max_tokens: {2**40}",
    "batch_size: 99999999999999999999", "lora_modules: a", "lora_modules: []", "lora_modules: [1]",
    "lora_modules: [[a]]", "lora_modules: {a: 1}", "report_to: [nothing]", "objective: 1",
    "objective: nowhere.py:f", "objective: /dev/zero.py:f", "objective: [", "{" * 100_000,
    "a: " + "[" * 5000 + "]" * 5000, "a: !b c", "!a", "@", "`", "a: |\n  b", "\ufeffseed: 1",
    "\n".join(["a0: &a0 [1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]),
]  # fmt: skip
_SPLIT = re.compile(r"\s+")


@dataclass
class Case:
    """One input: a command, its arguments, and what stands in the files it names."""

    command: str
    arguments: list[str]
    changes: list[str] = field(default_factory=list)


@dataclass
class Tally:
    """What came of the inputs: how many by command and outcome, and each finding in words."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Markdown rows, one a command."""
        total = Counter[str]()
        for counts in self.counts.values():
            total += counts
        rows = [*sorted(self.counts.items()), ("all", total)]
        return "\n".join(
            ["| command | inputs | taken | refused |", "|---|---|---|---|"]
            + [f"| {n} | {c.total()} | {c['taken']} | {c['refused']} |" for n, c in rows]
        )


def _quietly(*arguments: Any) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if result.exit_code:
        raise RuntimeError(f"{arguments}: {result.output}") from result.exception
    return result


def make_inputs(folder: Path) -> None:
    """Small files and models that the commands take, and things that are no files."""
    from tiny import make_model

    from pact_offline.rows.tokenizer import load_tokenizer

    rows = [{"prompt": f"Where is parcel {i}?", "response": "Billing" * (i + 1)} for i in range(4)]
    lines = {"rows": rows, "prompts": [{"prompt": row["prompt"]} for row in rows]}
    for name, values in lines.items():
        text = "".join(json.dumps(value) + "\n" for value in values)
        (folder / f"{name}.jsonl").write_text(text)
    model = make_model(folder / "model", seed=1)
    make_model(folder / "base", seed=2)
    words = load_tokenizer(str(model))
    chosen = [words.decode([i]) for i in (40, 70, 75)]
    (folder / "list.json").write_text(json.dumps([*chosen[:2], [chosen[2], 0.5], 80]))
    said = [
        {"role": "system", "content": "Be kind."},
        {"from": "human", "value": "Where?"},
        {"role": "assistant", "content": [{"type": "text", "text": "There."}], "weight": 0},
        {"role": "user", "content": "And that?"},
        {"role": "assistant", "content": "Here.", "tool_calls": [{"function": {"name": "a"}}]},
    ]
    others = [
        {"messages": said, "tools": "[]", "id": 1},
        {"conversations": said[1:3], "system": "Be kind."},
        {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
        {"question": "a", "context": "b", "answer": "c"},
    ]
    lines = "".join(json.dumps(value) + "\n" for value in others)
    (folder / "conversations.jsonl").write_text(lines)
    (folder / "rows.csv").write_text('prompt,response\n"a\nb",c\nd,e\n')
    (folder / "published.csv").write_text("goal,target\nHow?,Sure\nWhy?,Sure\n")
    (folder / "settings.yaml").write_text("max_tokens: 64\n")
    with inside(folder):
        _quietly("tokens", "--aligned", "model", "--from-list", "list.json", "-o", "tokens.json")
        _quietly(
            "score", "--model", "model", "--rows", "rows.jsonl", "--safety-tokens", "tokens.json",
            "--cache", "cache", "-o", "targets.json", "--backend", "transformers",
            "--max-tokens", 64,
        )  # fmt: skip
        _quietly(
            "finetune", "--model", "model", "--rows", "rows.jsonl", "--objective", "none",
            "--epochs", 1, "--batch-size", 2, "-o", "adapter",
        )  # fmt: skip
        _quietly(
            "evaluate", "--name", "reference", "--model", "model", "--harmful", "prompts.jsonl",
            "--borderline", "prompts.jsonl", "--benign", "prompts.jsonl", "--task", "rows.jsonl",
            "--safety-tokens", "tokens.json", "--max-new-tokens", 2, "-o", "evaluation",
            "--backend", "transformers",
        )  # fmt: skip
        shutil.copy("evaluation/metrics.json", "metrics.json")
        _quietly(
            "rehearse", "--model", "model", "--prompts", "prompts.jsonl", "--safety-tokens",
            "tokens.json", "--cache", "cache", "-o", "rehearsal.json", "--backend", "transformers",
        )  # fmt: skip
        found = _quietly("screen", "targets.json", "--safety-tokens", "tokens.json", "--json")
        Path("screen.json").write_text(found.stdout)
        shutil.copytree("adapter", "runs/reference")
        _odd_places()


def _odd_places() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["a", "b"], "response": ["c", "d"]}), "rows.parquet")
    Path("broken.parquet").write_bytes(Path("rows.parquet").read_bytes()[:-9])
    Path("here.parquet").mkdir()
    Path("here.txt").write_text("here")
    Path("file.py").write_text("def f(x):\n    return x\n")
    for name in ("folder", "empty", "benchmarks"):
        Path(name).mkdir()
    Path("folder", "file").write_text("not ours")
    Path("benchmarks", "tokens.tsv").write_text("s\tmax_rss\n1.5\t100\n")
    os.mkfifo("fifo")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class Draw:
    """Random cases, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def case(self, command: str) -> Case:
        """A case in the current folder, whose files it changes."""
        case = Case(command, _SPLIT.split(COMMANDS[command]))
        for _ in range(self._random.choice([1, 1, 2])):
            change = self._random.choice(
                [self._odd_option, self._odd_option, self._odd_file, self._odd_file, self._dropped]
            )
            change(case)
        return case

    def _text(self) -> str:
        kind = self._random.random()
        if kind < 0.5:
            return self._random.choice(ODD_TEXTS)
        if kind < 0.9:
            return self._random.choice(ODD_PLACES)
        return "".join(
            chr(self._random.randrange(1, 0x300)) for _ in range(self._random.randrange(9))
        )

    def _odd_option(self, case: Case) -> None:
        """Another value of an argument that is there, or one more option."""
        text = self._text()
        values = [
            at
            for at, argument in enumerate(case.arguments)
            if not argument.startswith("-") or argument == "-"
        ]
        params = [p for p in command_of(case.command).params if isinstance(p, click.Option)]
        if values and (not params or self._random.random() < 0.5):
            at = self._random.choice(values)
            case.changes.append(f"{case.arguments[at]!r:.60} is {text!r:.60}")
            case.arguments[at] = text
            return
        if not params:
            case.arguments.append(text)
            return
        option = self._random.choice(params)
        name = self._random.choice([*option.opts, *option.secondary_opts])
        given = [name] if option.is_flag else [name, text]
        case.changes.append(f"one more {' '.join(given)!r:.80}")
        case.arguments += given

    def _dropped(self, case: Case) -> None:
        at = self._random.randrange(len(case.arguments) or 1)
        count = self._random.choice([1, 2])
        case.changes.append(f"without {case.arguments[at : at + count]!r:.60}")
        del case.arguments[at : at + count]

    def _odd_file(self, case: Case) -> None:
        """One of the named files, or one in a named folder, holds or is something else."""
        named = [Path(a) for a in case.arguments if re.fullmatch(r"[a-z]{1,20}(\.[a-z]{1,9})?", a)]
        named += [keys for n in named for keys in Path().glob(f"{n.stem}-*.arrow")]
        files = [
            f
            for n in named
            for f in (n, *sorted(n.rglob("*")))
            if f.is_file() and not f.is_symlink()
        ]
        if not files:
            return self._odd_option(case)
        file = self._random.choice(files)
        how = self._random.choice(
            [self._odd_value, self._odd_value, self._odd_value, self._odd_bytes, self._no_file]
        )
        if file.suffix == ".yaml":
            how = self._odd_yaml
        case.changes.append(f"{file}: {how(file)}")
        return None

    def _odd_yaml(self, file: Path) -> str:
        text = self._random.choice(ODD_YAML)
        _rewrite(file, text.encode())
        return f"{text!r:.80}"

    def _no_file(self, file: Path) -> str:
        file.unlink()
        what = self._random.choice(["nothing", "folder", "fifo", "loop", "device", "empty"])
        if what == "folder":
            file.mkdir()
        elif what == "fifo":
            os.mkfifo(file)
        elif what == "loop":
            file.symlink_to(file.name)
        elif what == "device":
            file.symlink_to("/dev/zero")
        elif what == "empty":
            file.write_bytes(b"")
        return what

    def _odd_bytes(self, file: Path) -> str:
        data = bytearray(file.read_bytes())
        what = self._random.choice(["cut", "flipped", "mark", "utf-16", "nul", "latin", "twice"])
        place = self._random.randrange(len(data) or 1)
        if what == "cut":
            del data[place:]
        elif what == "flipped" and data:
            data[place] ^= 1 << self._random.randrange(8)
        elif what == "mark":
            data[:0] = b"\xef\xbb\xbf"
        elif what == "utf-16":
            data = bytearray(data.decode("latin-1").encode("utf-16"))
        elif what in ("nul", "latin"):
            data[place:place] = b"\0" if what == "nul" else b"\xe9"
        elif what == "twice":
            data *= 2
        _rewrite(file, data)
        return f"{what} at {place}"

    def _odd_value(self, file: Path) -> str:
        """An odd value somewhere in a JSON file, or in one line of such."""
        text = file.read_text(encoding="latin-1")
        parts = text.split("\n") if file.suffix == ".jsonl" else [text]
        at = self._random.randrange(max(1, len([part for part in parts if part])))
        try:
            value = json.loads(parts[at])
        except (ValueError, RecursionError):
            return self._odd_bytes(file)
        odd, marker = self._random.choice(ODD_VALUES), "odd-value-here"
        value, place = self._replaced(value, marker)
        parts[at] = json.dumps(value).replace(f'"{marker}"', odd)
        _rewrite(file, "\n".join(parts).encode())
        return f"{place} is {odd:.40}"

    def _replaced(self, value: Any, marker: str, place: str = "") -> tuple[Any, str]:
        """The value with something in it replaced, dropped or added, and where."""
        if isinstance(value, dict | list) and value and self._random.random() < 0.85:
            keys = list(value) if isinstance(value, dict) else list(range(len(value)))
            key = self._random.choice(keys)
            kind = self._random.random()
            if kind < 0.08:
                del value[key]
                return value, f"{place}.{key} is gone, and"
            if kind < 0.16 and isinstance(value, dict):
                value[self._random.choice(["", "a", "\ud800", "a\nb", "é", "k" * 5000])] = marker
                return value, f"one more in {place}"
            if kind < 0.24 and isinstance(value, list):
                value.insert(self._random.randrange(len(value)), marker)
                return value, f"one more in {place}"
            value[key], found = self._replaced(value[key], marker, f"{place}.{str(key)[:40]}")
            return value, found
        return marker, place


def _rewrite(file: Path, data: bytes | bytearray) -> None:
    file.unlink()  # its bytes are other cases' too
    file.write_bytes(data)


def all_commands(
    group: click.Group = cli, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """The words of every command."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from all_commands(command, (*prefix, name))
        else:
            yield (*prefix, name)


def command_of(words: str) -> click.Command:
    """The command of some words; options among them do not count."""
    command: click.Command = cli
    for word in words.split():
        if isinstance(command, click.Group) and word in command.commands:
            command = command.commands[word]
    return command


def _stop(*args: Any, **kwargs: Any) -> NoReturn:
    raise ModelError(REACHED)


def _no_package(*args: Any) -> NoReturn:
    raise PackageNotFoundError(REACHED)


@contextmanager
def no_work() -> Iterator[None]:
    """What would load a model, start an engine or measure fails."""
    stopped = [
        "transformers.AutoModelForCausalLM.from_pretrained",
        "pact_offline.bench.cache.measure_encodings",
        "pact_offline.bench.cache.measure_reading",
        "pact_offline.bench.train.ProcessPoolExecutor",
        "pact_offline.bench.rows.ProcessPoolExecutor",
    ]
    with ExitStack() as stack:
        for name in stopped:
            stack.enter_context(patch(name, _stop))
        stack.enter_context(patch("pact_offline.demo.distribution", _no_package))
        stack.enter_context(patch("pact_offline.models.backends.find_spec", lambda name: None))
        for name in ("huggingface_hub.constants", "datasets.config"):
            stack.enter_context(patch(f"{name}.HF_HUB_OFFLINE", True))
        yield


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def late(*args: Any) -> NoReturn:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(case: Case, verbose: bool) -> tuple[str, str]:
    """Run a case: "taken", "refused" or "found", with what was found."""
    words = [word for word in case.command.split() if not word.startswith("--")]
    arguments = [*["-v"] * verbose, *words, *case.arguments]
    before = _tree()
    try:
        with _at_most(_SECONDS):
            result = CliRunner().invoke(cli, arguments)
    except BaseException as error:  # a library's panic is no Exception
        return "found", "".join(traceback.format_exception(error)[-6:])
    error = result.exception
    if isinstance(error, PactError) and verbose:
        said, code = str(error), 2
    elif error is not None and not isinstance(error, SystemExit):
        return "found", "".join(traceback.format_exception(error)[-6:])
    else:
        said, code = result.stderr, result.exit_code
        lines = [line for line in said.splitlines() if line.startswith(("pact-offline:", "Error:"))]
        if code == 2 and len(lines) != 1:
            return "found", f"expected one line, found {said!r:.500}"
    if code not in (0, 1, 2):
        return "found", f"exit code {code}: {said!r:.500}"
    if code == 2 and (left := _tree() - before):
        return "found", f"refused ({said!r:.200}), and left {sorted(left)[0]}"
    return ("taken" if code != 2 or REACHED in said or "the package" in said else "refused"), ""


def _tree() -> set[str]:
    """Every file here; a folder without one is nothing half-written."""
    return {
        f"{folder}/{name}"
        for folder, _, names in os.walk(".")
        if not folder.endswith("__pycache__")
        for name in names
    }


def run(
    count: int, seed: int, made: Path, scratch: Path, found: Callable[[str], object] = id
) -> Tally:
    """Run some inputs, in turn over all commands.

    Args:
        count: how many.
        seed: of the draw; the same cases for the same number.
        made: holds what `make_inputs` makes.
        scratch: a folder that is not there, to work in.
        found: called with each finding.
    """
    tally = Tally()
    with no_work():
        for number, command in zip(range(count), itertools.cycle(COMMANDS), strict=False):
            copy_inputs(made, scratch)
            Path(scratch, "closed").mkdir(mode=0)
            with inside(scratch):
                case = Draw(seed * 1_000_003 + number).case(command)
                kind, text = outcome(case, verbose=bool(number % 2))
            Path(scratch, "closed").chmod(0o700)
            shutil.rmtree(scratch)
            tally.counts.setdefault(command, Counter())[kind] += 1
            if kind == "found":
                tally.findings.append(
                    f"{number}: pact-offline {command}: {'; '.join(case.changes)}\n{text}"
                )
                found(tally.findings[-1])
    return tally


def copy_inputs(made: Path, scratch: Path) -> None:
    """What `make_inputs` made, once more."""
    shutil.copytree(made, scratch, symlinks=True, copy_function=_linked)


def _linked(source: str, target: str) -> str:
    if stat.S_ISFIFO(os.lstat(source).st_mode):
        os.mkfifo(target)
    elif Path(source).is_symlink():
        Path(target).symlink_to(Path(source).readlink())
    else:
        os.link(source, target)
    return target


def main() -> None:
    """Print the counts, and every finding; exit 1 where there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = name
        (folder / "made").mkdir()
        make_inputs(folder / "made")
        say = partial(print, flush=True)
        tally = run(options.count, options.seed, folder / "made", folder / "scratch", say)
    print(tally.table())
    sys.exit(bool(tally.findings))


if __name__ == "__main__":
    main()
