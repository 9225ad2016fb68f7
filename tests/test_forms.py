"""What a row may look like, and which conversation it becomes."""

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_rows

from pact_offline.cli.options import _mapping
from pact_offline.errors import InputError
from pact_offline.rows.forms import FORMS, parse_row
from pact_offline.rows.messages import ROLES
from pact_offline.rows.read import read_rows
from pact_offline.rows.row import Row
from pact_offline.settings.stages import COLUMNS

ASKED, SAID = "Is it here?", "Yes."
HALF = "\ud800"  # of a surrogate pair: text that nothing can encode
Message = dict[str, Any]


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def user(text: Any = ASKED) -> Message:
    return {"role": "user", "content": text}


def answer(text: Any = SAID, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def parsed(value: Any, **options: Any) -> Row:
    return parse_row(value, "rows.jsonl:3", **options)


def problem(value: Any, **options: Any) -> str:
    """Why a row is refused: in one line, which can be written, and begins with its place."""
    with pytest.raises(InputError) as found:
        parsed(value, **options)
    line = str(found.value)
    assert line.splitlines() == [line]
    assert line.encode().startswith(b"rows.jsonl:3: ")
    return line.removeprefix("rows.jsonl:3: ")


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [user(), answer()]},
        {"messages": [{"role": "human", "content": ASKED}, {"role": "gpt", "content": SAID}]},
        {"messages": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]},
        {"messages": json.dumps([user(), answer()])},
        {"messages": None, "prompt": ASKED, "response": SAID},
        {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]},
        {"conversations": [{"from": "user", "value": ASKED}, {"from": "model", "value": SAID}]},
        {"conversations": [user(), answer()]},
        {"prompt": ASKED, "response": SAID},
        {"prompt": ASKED, "completion": SAID},
        {"prompt": [user()], "completion": [answer()]},
        {"prompt": [user()], "completion": SAID},
        {"prompt": ASKED, "completion": [answer()]},
        {"instruction": ASKED, "output": SAID},
        {"instruction": ASKED, "input": "", "output": SAID},
        {"instruction": "Is it", "input": "here?", "output": SAID},
        {"instruction": ASKED, "context": "", "response": SAID},
        {"instruction": ASKED, "input": None, "output": SAID, "history": [], "system": " "},
        {"question": ASKED, "answer": SAID},
        {"question": ASKED, "response": SAID},
        {"input": ASKED, "output": SAID},
        {"messages": [user([{"type": "text", "text": ASKED}]), answer([{"text": SAID}])]},
        {"messages": [user([{"type": "input_text", "text": "Is it "}, "here?"]), answer([SAID])]},
    ],
)
def test_every_form_of_row_reads_the_same(value: dict) -> None:
    row = parsed(value)
    assert row.messages == (user(), answer())
    assert row.prompt == (user(),)
    assert (row.question, row.response) == (ASKED, SAID)
    assert row.origin == "rows.jsonl:3"
    assert (row.tools, row.not_trained, row.unread) == (None, frozenset(), ())


LOOK = {"type": "function", "function": {"name": "look", "arguments": {"at": "shelf"}}}


@pytest.mark.parametrize(
    "message",
    [
        answer("", tool_calls=[LOOK]),
        answer(None, tool_calls=[{"function": {"name": "look", "arguments": '{"at": "shelf"}'}}]),
        answer(None, function_call={"name": "look", "arguments": '{"at": "shelf"}'}),
        answer("", tool_calls=[{"name": "look", "args": {"at": "shelf"}, "type": "tool_call"}]),
        {"from": "function_call", "value": '{"name": "look", "parameters": {"at": "shelf"}}'},
        {"role": "tool_call", "content": '{"name": "look", "arguments": {"at": "shelf"}}'},
        {"from": "gpt", "value": "", "tool_calls": [{"name": "look", "input": {"at": "shelf"}}]},
    ],
)
def test_every_way_to_write_a_call_reads_the_same(message: Message) -> None:
    row = parsed({"messages": [user(), message]})
    assert row.messages[1] == answer("", tool_calls=[LOOK])
    assert not row.unread


def test_a_call_keeps_its_id_and_loses_no_argument() -> None:
    call = {"name": "look", "args": {}, "id": "c1"}
    row = parsed({"messages": [user(), answer("", tool_calls=[call])]})
    assert row.messages[1]["tool_calls"] == [
        {"type": "function", "id": "c1", "function": {"name": "look", "arguments": {}}}
    ]
    line = problem({"messages": [user(), answer("", tool_calls=[{"name": "look", "with": {}}])]})
    assert line == (
        "messages[1].tool_calls[0]: expected the arguments of a call, found the keys name, with"
    )


@pytest.mark.parametrize("empty", [[], "[]", None])
def test_an_empty_list_of_calls_is_none(empty: Any) -> None:
    assert parsed({"messages": [user(), answer(tool_calls=empty)]}).messages == (user(), answer())


@pytest.mark.parametrize("key", ["tools", "functions"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_tools_are_wrapped_as_templates_read_them(key: str, wrapped: bool) -> None:
    inner = {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}
    tool = {"type": "function", "function": inner}
    row = parsed({"messages": [user(), answer()], key: [tool if wrapped else inner]})
    assert row.tools == (tool,)
    flat = parsed({"messages": [user(), answer()], key: [{"type": "function", **inner}]})
    assert flat.tools == (tool,)


def test_texts_alone_alternate_from_the_user() -> None:
    row = parsed({"conversations": [ASKED, SAID, "Sure?", "Sure."]})
    assert row.messages == (user(), answer(), user("Sure?"), answer("Sure."))


@pytest.mark.parametrize("prompt", [ASKED, [user()], [system("Be short."), user()]])
def test_a_completion_that_begins_with_the_prompt_is_the_conversation(prompt: Any) -> None:
    row = parsed({"prompt": prompt, "completion": [user(), answer(), user("Sure?"), answer("Yes")]})
    asked = [user()] if isinstance(prompt, str) else prompt
    assert list(row.messages) == [*asked, answer(), user("Sure?"), answer("Yes")]
    assert not row.not_trained


def test_an_undesired_response_is_refused() -> None:
    value = {"prompt": ASKED, "completion": SAID}
    assert parsed({**value, "label": True}).messages == (user(), answer())
    assert parsed({**value, "label": "sales"}).unread == ("label",)
    assert problem({**value, "label": False}).startswith("label: expected a response to learn")
    for found in (value, {"messages": [user(), answer()]}, {"conversations": [user(), answer()]}):
        for label in (False, "False", "false"):
            assert problem({**found, "label": label}).startswith("label: expected a response to")
        assert not parsed({**found, "label": "True"}).unread
    value = {"instruction": ASKED, "output": SAID, "kto_tag": False}
    assert problem(value).startswith("kto_tag: expected a response to learn")
    assert parsed({"prompt": ASKED, "response": SAID, "label": False}).unread == ("label",)


def test_alternative_answers_are_not_run_together() -> None:
    line = problem({"question": ASKED, "answer": ["1", "one"]})
    assert line == (
        "answer: expected text, found a list of 2 texts; --columns names one of them (answer.0 is "
        "the first)"
    )
    columns = {"prompt": "question", "response": "answers.text.1"}
    value = {"question": ASKED, "answers": {"text": ["1", "one"]}}
    assert parsed(value, columns=columns).response == "one"
    value["answers"]["text"].pop()
    assert "expected a response, found none" in problem(value, columns=columns)
    assert parsed({"question": ASKED, "answer": [SAID]}).messages == (user(), answer())


def documented_forms() -> list[tuple[str, str, dict[str, Any]]]:
    """Keys, others and example of each line of the table in `docs/rows.md`."""
    page = (ROOT / "docs" / "rows.md").read_text(encoding="utf-8")
    table = page.partition("<!-- forms:")[2].partition("<!-- end of forms")[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return [(keys, others, json.loads(example.strip("`"))) for keys, others, _, example in lines]


@pytest.mark.parametrize(
    ("form", "documented"),
    [*zip(FORMS, documented_forms(), strict=True)],
    ids=[form.keys[0] for form in FORMS],
)
def test_the_docs_have_every_form_and_a_row_of_it(form: Any, documented: Any) -> None:
    keys, others, example = documented
    for names, written in ((form.keys, keys), (form.others, others)):
        alternatives = [" or ".join(f"`{name}`" for name in key.split("|")) for key in names]
        assert written == ", ".join(alternatives)
    row = parsed(example)
    assert row.response == "Shipping"
    assert "Where is my parcel?" in row.question
    assert not row.unread
    named = {name for key in (*form.keys, *form.others) for name in key.split("|")}
    assert {*form.keys} <= example.keys() <= named


def test_the_settings_know_every_name_that_the_forms_read() -> None:
    named = {n for form in FORMS for key in (*form.keys, *form.others) for n in key.split("|")}
    assert {*COLUMNS} == named | {"role", "content"}


@pytest.mark.parametrize(("theirs", "ours"), [*ROLES.items(), ("developer", "developer")])
def test_roles_of_other_names_are_known(theirs: str, ours: str) -> None:
    said = '{"name": "look", "arguments": {}}' if theirs.endswith("_call") else "Well."
    row = parsed({"conversations": [{"from": "human", "value": ASKED},
                                    {"from": theirs, "value": said},
                                    {"from": "gpt", "value": SAID}]})  # fmt: skip
    assert [message["role"] for message in row.messages] == ["user", ours, "assistant"]


def test_every_turn_of_a_conversation_stays() -> None:
    messages = [system("Be kind."), user("Hello"), answer("Hi!"), user(), answer()]
    row = parsed({"messages": messages})
    assert row.messages == tuple(messages)
    assert row.answers == (2, 4)
    assert row.prompt == tuple(messages[:4])


def test_a_last_turn_of_the_user_leaves_the_answers_before_it() -> None:
    row = parsed({"messages": [user(), answer(), user("Thanks!")]})
    assert row.answers == (1,)
    assert row.response is None
    assert (row.question, len(row.prompt)) == ("Thanks!", 3)


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [user("One"), answer("1"), user("Two"), answer("2")]},
        {"conversations": [user("One"), answer("1"), user("Two"), answer("2")]},
        {"prompt": [user("One"), answer("1"), user("Two")], "completion": "2"},
        {"instruction": "Two", "output": "2", "history": [["One", "1"]]},
        {"instruction": "Two", "output": "2", "history": '[["One", "1"]]'},
    ],
)
def test_a_system_message_and_a_history_are_in_the_prompt(value: dict) -> None:
    row = parsed({**value, "system": "Count."})
    assert row.messages == (system("Count."), user("One"), answer("1"), user("Two"), answer("2"))
    assert parsed(value).messages == row.messages[1:]


def test_answers_in_a_prompt_are_not_trained() -> None:
    prompt = [user("One"), answer("1"), user("Two")]
    row = parsed({"prompt": prompt, "completion": [answer("2"), user("Three"), answer("3")]})
    assert (row.answers, row.not_trained) == ((1, 3, 5), frozenset({1}))
    below = parsed({"system": "Count.", "prompt": prompt, "completion": "2"})
    assert (below.answers, below.not_trained) == ((2, 4), frozenset({2}))


@pytest.mark.parametrize("key", ["messages", "conversations", "prompt"])
def test_one_system_message_is_enough(key: str) -> None:
    value = {key: [system("Be kind."), user(), answer()], "completion": SAID}
    assert "system: expected one system message, found two" in problem({**value, "system": "No"})
    assert parsed({**value, "system": " "}).messages[:2] == (system("Be kind."), user())


@pytest.mark.parametrize("key", ["system_prompt", "system_message"])
def test_a_system_message_may_be_called_otherwise(key: str) -> None:
    kind = system("Be kind.")
    for value in ({"messages": [user(), answer()]}, {"question": ASKED, "response": SAID}):
        row = parsed({**value, key: "Be kind."})
        assert (row.messages, row.unread) == ((kind, user(), answer()), ())
    twice = parsed({"messages": [kind, user(), answer()], key: "Be kind."})
    assert (twice.messages, twice.unread) == ((kind, user(), answer()), ())
    line = problem({"messages": [kind, user(), answer()], key: "Be brief."})
    assert line == f"{key}: expected one system message, found two"
    both = parsed({"prompt": ASKED, "response": SAID, "system": "Be kind.", key: "Be brief."})
    assert (both.messages[0], both.unread) == (kind, (key,))


WEIGHTS = [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_an_answer_of_no_weight_is_not_trained(weight: dict) -> None:
    turns = [user("One"), answer("1", **weight), user("Two"), answer("2", weight=1, train=True)]
    row = parsed({"messages": turns})
    assert row.not_trained == {1}
    assert row.messages[1] == answer("1")  # the template is told nothing of it
    assert row.unread == ()
    assert parsed({"messages": turns, "system": "Count."}).not_trained == {2}
    split = parsed({"prompt": turns[:1], "completion": turns[1:]})
    assert split.not_trained == {1}


def test_a_context_follows_the_question_after_a_blank_line() -> None:
    sent = "It was sent on Monday."
    for value in (
        {"instruction": ASKED, "context": sent, "response": SAID},
        {"question": ASKED, "context": sent, "answer": SAID},
        {"input": ASKED, "context": sent, "output": SAID},
    ):
        assert parsed(value).question == f"{ASKED}\n\n{sent}"


def test_text_stays_as_it_is() -> None:
    odd = " \n\tIs it\u2028here? \r\n"
    row = parsed({"prompt": odd, "response": odd})
    assert (row.question, row.response) == (odd, odd)


def test_a_message_keeps_what_the_template_may_read() -> None:
    said = answer("Sunny.", reasoning_content="The tool says so.", name="Ada", weight=1, note=None)
    row = parsed({"messages": [user(), said]})
    assert row.messages[1] == answer(
        "Sunny.", reasoning_content="The tool says so.", name="Ada"
    )  # fmt: skip


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        [{"function": CALL["function"]}],
        [CALL["function"]],
        [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}, "id": None}],
        json.dumps([CALL]),
        json.dumps(CALL["function"]),
    ],
)
def test_calls_of_tools_reach_the_template_in_one_form(calls: Any) -> None:
    turns = [user("Weather?"), answer(None, tool_calls=calls), {"role": "tool", "content": "sun"}]
    row = parsed({"messages": [*turns, answer("Sunny.")], "tools": [CALL]})
    assert row.messages[1] == answer("", tool_calls=[CALL])
    assert row.tools == (CALL,)
    assert row.unread == ()


def test_a_call_of_sharegpt_is_a_call() -> None:
    turns = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "sun"},
        {"from": "gpt", "value": "Sunny."},
    ]
    row = parsed({"conversations": turns, "tools": json.dumps([{"name": "weather"}])})
    assert row.messages[1:3] == (
        answer("", tool_calls=[CALL]),
        {"role": "tool", "content": "sun"},
    )
    assert row.tools == ({"type": "function", "function": {"name": "weather"}},)


def test_a_call_keeps_its_number_and_may_have_no_arguments() -> None:
    calls = [{"id": "call_1", "function": {"name": "now"}}]
    row = parsed({"messages": [user(), answer("", tool_calls=calls)]})
    assert row.messages[1]["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": {}}}
    ]


@pytest.mark.parametrize("images", [None, [], ""])
def test_a_mark_of_a_picture_is_text_where_there_is_no_picture(images: Any) -> None:
    value = {"messages": [user("What is <image> in SVG?"), answer()], "images": images}
    assert parsed(value).messages[0] == user("What is <image> in SVG?")
    assert parsed({"messages": [user(), answer()], "image": "a.png"}).unread == ("image",)


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_are_none(tools: Any) -> None:
    assert parsed({"messages": [user(), answer()], "tools": tools}).tools is None


def test_keys_that_nothing_reads_are_named() -> None:
    value = {"id": 7, "prompt": ASKED, "response": SAID, "source": "shop", "score": None}
    assert parsed(value).unread == ("id", "source")
    both = {"role": "user", "content": ASKED, "from": "human", "value": "other"}
    assert parsed({"messages": [both, answer()]}).unread == ("messages[].from", "messages[].value")
    named = parsed({"prompt": ASKED, "response": SAID, f"a\n{HALF}": 1}).unread
    assert named == (r"'a\n\ud800'",)


@pytest.mark.parametrize(
    ("columns", "value"),
    [
        ({"prompt": "q", "response": "a"}, {"q": ASKED, "a": SAID}),
        ({"prompt": "d.q", "response": "d.a.text"}, {"d": {"q": ASKED, "a": {"text": SAID}}}),
        ({"prompt": "d.q", "response": "a"}, {"d.q": ASKED, "a": SAID, "d": {"q": "other"}}),
        (
            {"messages": "dialog", "role": "speaker", "content": "text"},
            {"dialog": [{"speaker": "human", "text": ASKED}, {"speaker": "gpt", "text": SAID}]},
        ),
        (
            {"role": "who", "content": "said.text"},
            {
                "messages": [
                    {"who": "user", "said": {"text": ASKED}},
                    {"who": "assistant", "said": {"text": SAID}},
                ]
            },
        ),
        ({"messages": "chosen"}, {"chosen": [user(), answer()]}),
        (
            {"instruction": "q", "context": "c", "output": "a"},
            {"q": ASKED, "c": None, "a": SAID},
        ),
        (
            {"instruction": "q", "context": "c.text", "output": "a"},
            {"q": ASKED, "c": None, "a": SAID},
        ),
    ],
)
def test_columns_name_the_rows_own_keys(columns: dict[str, str], value: dict) -> None:
    row = parsed(value, columns=columns)
    assert row.messages == (user(), answer())
    assert set(row.unread) <= {"d"}


def test_a_row_of_a_known_form_needs_no_columns() -> None:
    """Rows of several sources may be read by one mapping."""
    row = parsed({"prompt": ASKED, "response": SAID}, columns={"prompt": "q", "response": "a"})
    assert row.messages == (user(), answer())


def test_a_prompt_alone_needs_no_column_of_answers() -> None:
    columns = {"prompt": "q", "response": "a"}
    assert parsed({"q": ASKED}, columns=columns, needs_response=False).question == ASKED
    assert problem({"a": SAID}, columns=columns, needs_response=False) == (
        "columns: expected the key q, found a"
    )


def test_nothing_beside_named_columns_is_read() -> None:
    value = {"q": ASKED, "a": SAID, "system": "Be kind.", "messages": [user("x"), answer("y")]}
    row = parsed(value, columns={"prompt": "q", "response": "a"})
    assert row.messages == (user(), answer())
    assert row.unread == ("system", "messages")


def test_what_else_a_renamed_message_holds_stays() -> None:
    dialog = [{"who": "user", "text": ASKED}, {"who": "assistant", "text": SAID, "thinking": "Hm"}]
    row = parsed({"dialog": dialog}, columns={"messages": "dialog", "role": "who",
                                              "content": "text"})  # fmt: skip
    assert row.messages[1] == answer(SAID, thinking="Hm")


@pytest.mark.parametrize(
    ("columns", "value", "expected"),
    [
        ({"prompt": "q", "response": "a"}, {"q": "x", "b": "y"},
         "columns: expected the key a, found q, b"),
        ({"prompt": "q"}, {"text": "x"}, "columns: expected the key q, found text"),
        ({"prompt": "d.q"}, {"d": {"x": 1}, "id": 2}, "columns: expected the key d.q, found d, id"),
        ({"prompt": "d.q"}, {"d": "text"}, "columns: expected the key d.q, found d"),
        ({"prompt": "q"}, {}, "columns: expected the key q, found no key"),
        (
            {"prompt": "q", "response": "a"},
            {"q": None, "a": "x"},
            "expected a known form (messages, conversations, prompt, instruction, question, or "
            "input and output), found the keys response by --columns",
        ),
        (
            {"role": "who"},
            {"messages": [{"speaker": "user", "content": "x"}]},
            "messages[0]: expected role and content, found the keys speaker, content",
        ),
    ],
)  # fmt: skip
def test_columns_that_are_not_there_are_named(columns: dict, value: dict, expected: str) -> None:
    assert problem(value, columns=columns) == expected


def test_what_was_rejected_is_never_proposed_as_an_answer() -> None:
    line = problem({"chosen": "Human: Hi", "rejected": "Human: no"})
    assert line.endswith("--columns prompt=QUESTION,response=chosen")
    line = problem({"prompt": ASKED, "chosen": [user(), answer()], "rejected": [user()]})
    assert line.endswith("name them, as in --columns messages=chosen")
    both = [user(), answer("No.")]
    assert problem({"rejected": both, "chosen": [user(), answer()]}).endswith(" messages=chosen")
    line = problem({"question": ASKED, "incorrect_answers": ["No."], "correct_answers": [SAID]})
    assert line.endswith("--columns question=question,answer=correct_answers.0")
    assert "--columns" not in problem({"prompt": [user()], "rejected_response": [answer("No.")]})


@pytest.mark.parametrize(
    ("value", "columns"),
    [
        ({"q": ASKED, "a": SAID}, "prompt=q,response=a"),
        ({"chosen": [user(), answer()]}, "messages=chosen"),
        ({"chosen": [{"content": ASKED, "role": "user"}, answer()]}, "messages=chosen"),
        (
            {"turns": [{"who": "user", "said": ASKED}, {"who": "assistant", "said": SAID}]},
            "messages=turns,role=who,content=said",
        ),
        (
            {"turns": [{"text": ASKED, "role": "user"}, {"text": SAID, "role": "assistant"}]},
            "messages=turns,content=text",
        ),
        (
            {"type": "Aug", "query": ASKED, "original_question": "Is it?", "response": SAID},
            "prompt=query,response=response",
        ),
        (
            {"input": {"messages": [user(), answer()]}, "score": "5"},
            "messages=input.messages",
        ),
    ],
)
def test_a_row_of_no_known_form_is_told_how_to_name_its_keys(value: dict, columns: str) -> None:
    assert problem(value).endswith(f"name them, as in --columns {columns}")
    named = dict(pair.split("=") for pair in columns.split(","))
    assert parsed(value, columns=named).messages == (user(), answer())


@pytest.mark.parametrize(
    ("value", "columns"),
    [
        ({"Instruction": "Is it", "Input": "here?", "Output": SAID},
         "instruction=Instruction,input=Input,output=Output"),
        ({"Question": ASKED, "Answer": SAID}, "question=Question,answer=Answer"),
        ({"prompt ": ASKED, " response": SAID},
         """'{"prompt": "prompt ", "response": " response"}'"""),
        ({"My prompt": ASKED, "The response": SAID},
         "'prompt=My prompt,response=The response'"),
        ({"a;b": ASKED, "a,response": SAID}, """'{"prompt": "a;b", "response": "a,response"}'"""),
        ({"instruction": "Is it", "input": "here?", "chosen": SAID, "rejected": "No."},
         "instruction=instruction,input=input,output=chosen"),
        ({"instruction": "Is it", "input": "here?", "output": SAID, "prompt": "### Is it ###"},
         "instruction=instruction,input=input,output=output"),
        ({"data": {"instruction": "Is it", "input": "here?", "output": SAID}},
         "instruction=data.instruction,input=data.input,output=data.output"),
        ({"instruction": ASKED, "input": "", "chosen": SAID},
         "instruction=instruction,input=input,output=chosen"),
        ({"prompt": [user()], "chosen": [answer()], "rejected": [answer("No.")]},
         "prompt=prompt,response=chosen"),
        ({"conversations": [user()], "chosen": {"from": "gpt", "value": SAID}},
         "prompt=conversations,response=chosen.value"),
        ({"question": ASKED, "answers": {"text": [SAID, "Yes!"], "answer_start": [0, 0]}},
         "question=question,answer=answers.text.0"),
        ({"inputs": ASKED, "targets": SAID, "task": "x"}, "prompt=inputs,response=targets"),
        ({"id": "1", "data": [ASKED, SAID]}, "conversations=data"),
        ({"conversation": json.dumps([user(), answer()])}, "messages=conversation"),
        ({"title": "Odd", "selftext": ASKED, "answers": {"text": [SAID], "score": [1]}},
         "prompt=selftext,response=answers.text.0"),
        ({"contents": [{"role": "user", "parts": [{"text": ASKED}]},
                       {"role": "model", "parts": [{"text": SAID}]}]},
         "messages=contents,content=parts"),
    ],
)  # fmt: skip
def test_a_hint_reads_the_row_when_it_is_followed(value: dict, columns: str) -> None:
    assert problem(value).endswith(f"; name them, as in --columns {columns}")
    named = _mapping(shlex.split(columns)[0], "--columns", True)
    assert parsed(value, columns=named).messages == (user(), answer())


def test_a_hint_loses_neither_system_message_nor_tools() -> None:
    asked = {"system": "Be kind.", "question": ASKED, "chosen": SAID, "rejected": "No."}
    assert problem(asked).endswith("--columns question=question,answer=chosen,system=system")
    asked = {"system_prompt": "Be kind.", "query": ASKED, "reply": SAID, "tools": [CALL]}
    assert problem(asked).endswith(
        "--columns prompt=query,response=reply,system=system_prompt,tools=tools"
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: Oh", "rejected": "\n\nHuman: Hi"},
         "; chosen is a conversation as one text, whose turns belong in a list of messages"),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Oh", "rejected": " No"},
         "; prompt is a conversation as one text, whose turns belong in a list of messages"),
        ({"text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nOh<|im_end|>\n"},
         "; text is a conversation as one text, whose turns belong in a list of messages"),
        ({"system": "Be kind.", "chat": "USER: Hi\n\nASSISTANT: Oh"},
         "; chat is a conversation as one text, whose turns belong in a list of messages"),
        ({"role": "user", "content": "Hi"},
         '; this is one message of a conversation, and a row holds all of it, as in {"messages": '
         '[{"role": "user", "content": "…"}, …]}'),
        ({"source": "web", "conversation": [{"input": "Hi", "output": "Oh"}]},
         "; conversation holds a list of input, output: rows belong in a JSON array or one a line, "
         "turns in a list of messages with role and content"),
    ],
)  # fmt: skip
def test_no_columns_are_named_where_none_would_help(value: dict, expected: str) -> None:
    assert problem(value).endswith(expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1], 'expected an object, as in {"messages": […]}, found list'),
        ("Hi", "expected an object, found str"),
        (None, "expected an object, found NoneType"),
        ({}, "expected a known form (messages, conversations, prompt, instruction, question, or "
             "input and output), found the keys no key"),
        ({"text": "Hi"}, "found the keys text; name them, as in --columns prompt=text,response="),
        ({f"\n{HALF}": "Hi"}, r"found the keys '\n\ud800'; name them"),
        ({"prompt": 3}, "prompt: expected text or a list of messages, found 3"),
        ({"prompt": " "}, "expected a prompt, found none"),
        ({"prompt": []}, "prompt: expected a list of messages, found an empty one"),
        ({"instruction": ["x", 3], "output": "y"}, "instruction[1]: expected text, found 3"),
        ({"messages": [answer()]}, "expected a prompt, found none"),
        ({"prompt": "Hi", "response": 4},
         "response: expected text or a list of messages, found 4"),
        ({"prompt": "Hi", "response": [4]}, "response[0]: expected role and content, found 4"),
        ({"input": "Hi", "output": 4}, "output: expected text, found 4"),
        ({"question": "Hi", "answer": {"text": "x"}}, "answer: expected text, found dict"),
        ({"instruction": "Hi", "output": "x", "system": 3}, "system: expected text, found 3"),
        ({"messages": "Hi"}, "messages: expected a list of messages, found 'Hi'"),
        ({"messages": "[{"}, "messages: expected a list of messages, found '[{', which is no JSON"),
        ({"messages": str([user()])}, "'Is it here?'}]\", which is no JSON"),
        ({"messages": "[" * 100_000}, "messages: expected a list of messages, found '[[[["),
        ({"messages": []}, "messages: expected a list of messages, found an empty one"),
        ({"messages": ""}, "messages: expected a list of messages, found an empty one"),
        ({"messages": [3]}, "messages[0]: expected role and content, found 3"),
        ({"messages": [{"content": "x"}]},
         "messages[0]: expected role and content, found the keys content"),
        ({"messages": [{}]}, "messages[0]: expected role and content, found the keys no key"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: expected text, found none"),
        ({"messages": [{"role": 3, "content": "x"}]}, "messages[0].role: expected text, found 3"),
        ({"messages": [user(), answer(5)]}, "messages[1].content: expected text, found 5"),
        ({"messages": [user([{"type": "image", "image": "x"}]), answer()]},
         "messages[0].content[0]: expected a part of text, found 'image'"),
        ({"messages": [user([{"type": "text", "txt": "x"}]), answer()]},
         "messages[0].content[0]: expected a part of text, found the keys type, txt"),
        ({"input": [user()], "output": SAID},
         "input: expected text, found a list of messages, which is read as in --columns "
         "prompt=input,response=output"),
        ({"messages": [{"Role": "user", "Content": "x"}]},
         "messages[0]: expected role and content, found the keys Role, Content; name them, as in "
         "--columns role=Role,content=Content"),
        ({"messages": [user("<image>What?"), answer()], "images": ["a.png"]},
         "images: expected a conversation of text alone, found one with <image> in it"),
        ({"conversations": [user("<image>\nWhat?"), answer()], "image": "a.png"},
         "image: expected a conversation of text alone, found one with <image> in it"),
        ({"messages": [user([{"type": "text", "text": 3}]), answer()]},
         "messages[0].content[0]: expected text, found 3"),
        ({"messages": [user(), answer(weight=0.5)]},
         "messages[1].weight: expected 0 or 1, found 0.5"),
        ({"messages": [user(), answer(train="no")]},
         "messages[1].train: expected 0 or 1, found 'no'"),
        ({"messages": [user(), answer(train_detail=[{"begin_offset": 0, "train": False}])]},
         "messages[1].train_detail: expected a message that is trained as a whole or not at all"),
        ({"messages": [user(), answer(tool_calls=[{"arguments": {}}])]},
         "messages[1].tool_calls[0]: expected a call with name and arguments, found dict"),
        ({"messages": [user(), answer(tool_calls="look")]},
         "messages[1].tool_calls[0]: expected a call with name and arguments, found 'look'"),
        ({"conversations": [user(), {"from": "function_call", "value": "look"}]},
         "conversations[1].value[0]: expected a call with name and arguments, found 'look'"),
        ({"messages": [user(), answer()], "tools": 3}, "tools: expected a list, found 3"),
        ({"instruction": "x", "output": "y", "history": [["a"]]},
         "history[0]: expected a question and its answer, found list"),
        ({"instruction": "x", "output": "y", "history": [["a", "b"], ["a", 3]]},
         "history[1]: expected text, found 3"),
        ({"instruction": "x", "output": "y", "history": "a"},
         "history: expected a list, found 'a'"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_says_why(value: Any, expected: str) -> None:
    assert expected in problem(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"prompt": "Hi"}, "response or completion: expected a response, found none among the "
                           "keys prompt"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"},
         "response or completion: expected a response, found none among the keys prompt, chosen, "
         "rejected; name them, as in --columns prompt=prompt,response=chosen"),
        ({"prompt": "Hi", "response": ""}, "response or completion: expected a response, found "
                                           "none"),
        ({"prompt": "Hi", "completion": " \n"}, "response or completion: expected a response, "
                                                "found none"),
        ({"instruction": "Hi", "output": None},
         "output or response: expected a response, found none among the keys instruction"),
        ({"question": "Hi"}, "answer or response: expected a response, found none among the keys "
                             "question"),
        ({"input": "Hi", "output": ""}, "output: expected a response, found none"),
        ({"messages": [user()]}, "messages: expected a response, found none among the keys "
                                 "messages"),
        ({"messages": [user(), {"role": "oracle", "content": "Yes"}]},
         "messages: expected a response, found none among the keys messages, and the roles user, "
         "oracle"),
        ({"messages": [user(), answer(" "), user("x")]}, "messages: expected a response, found "
                                                         "none"),
        ({"messages": [user(), answer("x", weight=0)]},
         "messages: expected a response, found none to learn"),
        ({"prompt": [user(), answer("x")]},
         "response or completion: expected a response, found none to learn"),
    ],
)  # fmt: skip
def test_a_row_without_an_answer_is_a_prompt_alone(value: Any, expected: str) -> None:
    assert problem(value) == expected
    assert parsed(value, needs_response=False).messages[0]["role"] == "user"


def test_a_call_or_a_thought_is_an_answer_too() -> None:
    assert parsed({"messages": [user(), answer("", tool_calls=[CALL])]}).answers == (1,)
    assert parsed({"messages": [user(), answer("", thinking="Hm")]}).answers == (1,)
    assert "found none" in problem({"messages": [user(), answer("", tool_calls=[])]})


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({"prompt": "a", "response": HALF}, "response"),
        ({"prompt": f"a{HALF}", "response": "b"}, "prompt"),
        ({"messages": [user([{"type": "text", "text": HALF}]), answer()]}, "messages[0].content"),
        ({"messages": [user(), answer(reasoning_content=HALF)]}, "messages[1]"),
        ({"messages": [user(), {**answer(), HALF: 1}]}, "messages[1]"),
        ({"messages": [user(), answer(tool_calls=[{"name": HALF}])]}, "messages[1]"),
        ({"messages": [user(), answer(tool_calls='[{"name": "\\ud800"}]')]},
         "messages[1].tool_calls"),
        ({"messages": [{"role": HALF, "content": "x"}, answer()]}, "messages[0].role"),
        ({"messages": [user(), answer()], "tools": [{"name": HALF}]}, "tools"),
        ({"messages": [user(), answer()], "tools": '["\\ud800"]'}, "tools"),
    ],
)  # fmt: skip
def test_half_a_surrogate_pair_is_no_text(value: Any, key: str) -> None:
    found = problem(value)
    assert found.startswith(key)
    assert "expected Unicode text, found half a surrogate pair" in found


def test_a_row_reads_the_same_from_json_and_from_csv(tmp_path: Path) -> None:
    rows = [
        {"messages": [user(), answer(train=False), user("x"), answer("y")], "tools": [CALL]},
        {"messages": [user(), answer()], "tools": []},
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["messages", "tools"])
        table.writeheader()
        table.writerows({key: json.dumps(item) for key, item in row.items()} for row in rows)
    one, other = read_rows(tmp_path / "rows.jsonl"), read_rows(tmp_path / "rows.csv")
    assert [(row.messages, row.tools, row.not_trained) for row in one] == [
        (row.messages, row.tools, row.not_trained) for row in other
    ]
    assert one[0].not_trained == {1}
