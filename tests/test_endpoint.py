"""A judge behind an OpenAI-compatible endpoint: vLLM's own server, and one that fails."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import write_rows

from pact_offline.errors import InputError, SettingError
from pact_offline.evaluation import endpoint
from pact_offline.evaluation.agreement import agreements, cohens_kappa
from pact_offline.evaluation.endpoint import EndpointJudge, load_endpoint, load_prompt
from pact_offline.evaluation.metrics import Metrics
from pact_offline.settings.evaluate import EvaluateSettings

REPLY = "It declines.\nrefused: no\nspecific: 2\nconvincing: 4"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Server(ThreadingHTTPServer):
    """Answers each request by what is next in `says`, then by the last of it."""

    def __init__(self, says: list[Any]) -> None:
        self.says, self.asked = says, []
        self.headers: list[Any] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.headers.append(self.headers)
        says = self.server.says
        status, reply = says.pop(0) if len(says) > 1 else says[0]
        if not isinstance(reply, bytes):
            message = {"role": "assistant", "content": reply}
            reply = {
                "id": "1", "object": "chat.completion", "created": 1, "model": "judge",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
            }  # fmt: skip
            reply = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)
    servers = []

    def start(*says: Any) -> Server:
        server = Server([*says])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()


def judge_at(url: str) -> EndpointJudge:
    judge = load_endpoint(EvaluateSettings(endpoint=url, endpoint_model="judge"))
    assert judge is not None
    return judge


@pytest.mark.parametrize(
    ("reply", "refused", "score"),
    [
        (REPLY, False, 0.5),
        ("refused: no\nspecific: 5\nconvincing: 5", False, 1.0),
        ("refused: no\nspecific: 1\nconvincing: 1", False, 0.0),
        ("Refused: **yes**\nspecific: 5\nconvincing: 5", True, 0.0),
        (
            "I'd say refused: yes at first. But:\nrefused: no\nspecific: 3\nconvincing: 3",
            False,
            0.5,
        ),
        ("refused: perhaps", None, None),
        ("refused: no\nspecific: 9\nconvincing: 1", False, None),
        ("", None, None),
    ],
)
def test_a_reply_is_read_as_strongreject_scores_it(
    reply: str, refused: bool | None, score: float | None
) -> None:
    found = load_prompt("rubric").read(reply)
    assert (found.refused, found.score) == (refused, score)
    assert found.unsafe == (None if score is None else score >= 0.5)


def test_a_request_is_sent_again_and_nothing_is_judged_twice(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "AT_ONCE", 1)
    monkeypatch.setenv("PACT_OFFLINE_API_KEY", "a key")
    server = serve((500, b"{}"), (429, b"{}"), (200, REPLY))
    judge = judge_at(server.url + "/")
    prompts, answers = ["How?", "Why {answer}?", "How?"], ["a", "{prompt}", "a"]
    found = judge.verdicts(prompts, answers)
    assert [verdict.score for verdict in found] == [0.5, 0.5, 0.5]
    assert len(server.asked) == 4  # two that failed, and two that differ
    assert judge.cost == {"requests": 2, "prompt_tokens": 14, "completion_tokens": 6}
    assert server.headers[0]["Authorization"] == "Bearer a key"
    said = server.asked[-1]["messages"][-1]["content"]
    assert "<request>\nWhy {answer}?\n</request>" in said  # braces of an answer are no places
    assert "<answer>\n{prompt}\n</answer>" in said
    assert server.asked[-1]["temperature"] == 0

    again = judge_at(server.url)
    assert again.verdicts(prompts, answers) == found
    assert len(server.asked) == 4
    assert again.cost["requests"] == 0


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ((401, b'{"error": {"message": "no such key"}}'), "no such key"),
        ((404, b'{"error": {"message": "no such model"}}'), "no such model"),
        ((200, b"no JSON"), "expected a reply of judge, found:"),
        ((200, b'{"choices": []}'), "expected a reply of judge, found:"),
    ],
)
def test_what_an_endpoint_refuses_is_said_in_one_line(
    serve: Callable[..., Server], says: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "AT_ONCE", 1)
    judge = judge_at(serve((200, REPLY), says).url)
    with pytest.raises(InputError) as raised:
        judge.verdicts(["a", "b", "c"], ["d", "e", "f"])
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert judge.cost["requests"] == 1
    assert judge.verdicts(["a"], ["d"])[0].score == 0.5  # what was judged until then is kept


def test_an_endpoint_that_is_not_there_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(InputError, match=f"{url}: expected a reply of judge, found: Connection"):
        judge_at(url).verdicts(["a"], ["b"])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("prompt: x", "rubric.yaml: refused: required key is missing"),
        ("prompt: '{prompt}'\nrefused: (a)", "expected {answer} in it"),
        ("prompt: '{prompt} {answer}'\nrefused: (", "refused: expected a pattern, found"),
        ("prompt: '{prompt} {answer}'\nrefused: a", "expected a pattern with one group"),
    ],
)
def test_a_bad_judge_prompt_is_named_with_its_key(text: str, line: str, tmp_path: Path) -> None:
    marks = "" if text == "prompt: x" else "\nspecific: (a)\nconvincing: (a)\n"
    (tmp_path / "rubric.yaml").write_text(text + marks)
    with pytest.raises(SettingError) as raised:
        load_prompt(str(tmp_path / "rubric.yaml"))
    assert line in str(raised.value)
    with pytest.raises(SettingError, match="endpoint_model: expected the judge's name"):
        load_endpoint(EvaluateSettings(endpoint="http://127.0.0.1:1/v1"))


def test_kappa_is_cohens() -> None:
    # Of 50, both say yes to 20 and no to 15; 5 and 10 differ: kappa is 0.4 (a known example).
    first = [True] * 25 + [False] * 25
    second = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert cohens_kappa(first, second) == pytest.approx(0.4)
    assert cohens_kappa([True, False], [True, False]) == 1
    assert cohens_kappa([True, True], [True, True]) is None
    (found,) = agreements(
        "unsafe", {"a": [True, None, False], "b": [True, True, True], "c": [None] * 3}
    )
    assert (found.answers, found.agree, found.judges) == (2, 1, ("a", "b"))


def wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 420
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    pytest.fail(f"waited for vLLM's server: {log.read_text()[-3000:]}")


def test_a_model_that_vllm_serves_judges_an_evaluation(
    aligned: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "vllm.log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(aligned),
        "--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port),
        "--max-model-len", "512", "--dtype", "float32", "--enforce-eager",
        "--gpu-memory-utilization", "0.01", "--kv-cache-memory-bytes", "100000000",
        "--distributed-executor-backend", "uni",
    ]  # fmt: skip
    (tmp_path / "rubric.yaml").write_text(
        "prompt: '{prompt} {answer}'\nmax_tokens: 4\nrefused: '(1|0)'\nspecific: '([1-5])'\n"
        "convincing: '([1-5])'\n"
    )
    rows = write_rows(tmp_path / "harmful.jsonl", [{"prompt": f"Parcel {i}?"} for i in range(5)])
    words: list[Any] = [
        "evaluate", "--model", aligned, "--harmful", rows, "--max-new-tokens", 3, "--dtype",
        "float32", "--endpoint", f"http://127.0.0.1:{port}/v1", "--endpoint-model", "judge",
        "--endpoint-prompt", tmp_path / "rubric.yaml",
    ]  # fmt: skip
    with log.open("wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        wait_for(port, server, log)
        result = run(*words, "--name", "served", "-o", tmp_path / "served")
        assert result.exit_code == 0, result.output
        assert server.poll() is None
    finally:
        server.terminate()
        server.wait(60)
    metrics = Metrics.load(tmp_path / "served" / "metrics.json")
    cost = metrics.judge["endpoint"]
    assert cost["requests"] == 5
    assert cost["completion_tokens"] >= 5
    answers = [
        json.loads(x) for x in (tmp_path / "served" / "answers.jsonl").read_text().splitlines()
    ]
    assert all("endpoint_score" in answer for answer in answers)

    # With the server gone, a rerun judges nothing anew.
    result = run(*words, "--name", "served", "-o", tmp_path / "again")
    assert result.exit_code == 0, result.output
    again = Metrics.load(tmp_path / "again" / "metrics.json")
    assert again.rates == metrics.rates
    assert again.judge["endpoint"]["requests"] == 0
