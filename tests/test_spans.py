"""Where the answers of a conversation lie among its tokens, for every chat template there is."""

import copy
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trl
from conftest import write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import SENTENCES, TEMPLATE, make_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from pact_offline.errors import InputError, MissingFileError, ModelError
from pact_offline.rows.chat import MARKER, Chat, chat_of
from pact_offline.rows.chat import chat_with as prepared
from pact_offline.rows.contexts import Context, contexts_of
from pact_offline.rows.forms import parse_row
from pact_offline.rows.read import read_rows
from pact_offline.rows.row import Row
from pact_offline.rows.spans import Spans, find_spans
from pact_offline.rows.tokenize import LongRowError, tokenize, tokenize_all
from pact_offline.rows.tokenizer import load_tokenizer
from pact_offline.settings.stages import ChatSettings, RowSettings

TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
}
# What the templates write around the turns, and their tokenizers hold as tokens of their own.
MARKS = sorted(
    {mark for text in TEMPLATES.values() for mark in re.findall(r"<[|｜]?[/\w▁]+[|｜]?>", text)}
)
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
MERGE = ChatSettings(system_role="merge")
MESSAGES = [{"role": "user", "content": "Is it here?"}, {"role": "assistant", "content": "Yes."}]


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    pad, begin, end = SPECIAL
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=begin, eos_token=end
    )
    found.add_special_tokens({"additional_special_tokens": [*MARKS]})
    found.chat_template = TEMPLATE
    return found


def trained(tokenizer: Tokenizer, size: int, alphabet: Sequence[str] = ()) -> None:
    more = ["a\n\nb\n\nc\n\nd\n\n\ne\n\n\nf\n \n g  h   i"] * 4
    tokenizer.train_from_iterator(
        [*SENTENCES * 4, *more],
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=SPECIAL,
            initial_alphabet=[*alphabet],
            show_progress=False,
        ),
    )


def newlines_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, of which runs of newlines become one token, as Qwen and Llama 3 have it."""
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trained(tokenizer, 420, pre_tokenizers.ByteLevel.alphabet())
    return wrapped(tokenizer)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Words with the space before them, and one before the first; other characters as bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained(tokenizer, 300)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = model["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(merge) for merge in model["merges"]]
    found = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    found.add_special_tokens(SPECIAL)
    found.pre_tokenizer = tokenizer.pre_tokenizer
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return wrapped(found)


TOKENIZERS = {
    "bytes": cache(make_tokenizer),
    "newlines": cache(newlines_tokenizer),
    "sentencepiece": cache(sentencepiece_tokenizer),
}


def chat_with(template: str = TEMPLATE, kind: str = "newlines", **variables: Any) -> Chat:
    tokenizer = copy.copy(TOKENIZERS[kind]())
    tokenizer.chat_template = template
    return Chat(tokenizer, variables)


def row_of(value: Any) -> Row:
    return parse_row({"messages": value} if isinstance(value, list) else value, "rows.jsonl:1")


def decoded(chat: Chat, ids: Sequence[int]) -> str:
    return chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def spans_of(chat: Chat, value: Any, turns: Any = "all", **options: Any) -> Spans:
    found = find_spans(chat, [row_of(value)], turns, **options)[0]
    if isinstance(found, InputError):
        raise found
    return found


def answers_of(chat: Chat, value: Any, turns: Any = "all") -> list[str]:
    """What is trained of a conversation."""
    spans = spans_of(chat, value, turns)
    return [decoded(chat, spans.ids[turn.start : turn.end]) for turn in spans.turns]


def said(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    """A conversation: what the user and the assistant say in turn."""
    first = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant")
    return [*first, *({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))]


# Which answers, and where they begin and end


def test_examples_split_where_the_response_starts(rows_file: Path) -> None:
    chat = chat_with()
    row = read_rows(rows_file)[0]
    example = tokenize_all([row], chat, RowSettings())[0]
    assert example.ids[: example.response_start].tolist() == chat.prompt_ids(row)
    assert decoded(chat, example.ids[example.response_start :]) == "Billing<|im_end|>\n"
    assert example.steps == len(example.ids) - example.response_start


def test_every_answer_is_trained_or_the_last() -> None:
    chat = chat_with()
    messages = said("One?", "1", "Two?", "2", "Three?", "3", system="Count.")
    assert answers_of(chat, messages) == [f"{i}<|im_end|>\n" for i in "123"]
    assert answers_of(chat, messages, "last") == ["3<|im_end|>\n"]
    all_turns, last = spans_of(chat, messages), spans_of(chat, messages, "last")
    assert all_turns.ids == last.ids
    assert all_turns.turns[-1:] == last.turns


def test_answers_that_are_not_to_be_learnt_stay_in_the_prompt() -> None:
    chat = chat_with()
    messages = said("One?", "1", "Two?", "2", "Three?", "3")
    messages[3]["weight"] = 0
    assert answers_of(chat, messages) == ["1<|im_end|>\n", "3<|im_end|>\n"]
    spans = spans_of(chat, messages)
    assert decoded(chat, spans.ids) == chat.render(row_of(messages).messages,
                                                   generation_prompt=False)  # fmt: skip
    messages[5]["weight"] = 0
    last = spans_of(chat, messages, "last")
    assert decoded(chat, last.ids).endswith("One?<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n")


def test_nothing_behind_the_last_answer_is_tokenized() -> None:
    chat = chat_with()
    whole = said("One?", "1", "Thanks!")
    assert spans_of(chat, whole) == spans_of(chat, whole[:2])


def test_an_answer_of_no_text_is_not_trained() -> None:
    assert answers_of(chat_with(), said("One?", " ", "Two?", "2")) == ["2<|im_end|>\n"]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("answer", ["\nYes", "\n\nYes", " Yes", "  \n Yes", "\tYes"])
def test_header_and_answer_are_tokenized_one_after_the_other(answer: str, kind: str) -> None:
    """As they are generated; tokenized at once, the newline of one may join that of the other."""
    chat = chat_with(kind=kind)
    messages = said("Where?", answer)
    prompt = chat.ids_of(chat.render(messages[:1], generation_prompt=True))
    spans = spans_of(chat, messages)
    assert spans.ids[: spans.turns[0].header] == prompt
    behind = decoded(chat, spans.ids[spans.turns[0].first :])
    assert behind == f"{answer}<|im_end|>\n"
    assert decoded(chat, spans.ids).lstrip() == chat.render(messages, generation_prompt=False)


EMPTY_THOUGHT = TEMPLATE.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}",
)


def test_what_a_template_puts_before_an_answer_is_trained_only_if_asked_for() -> None:
    chat = chat_with(EMPTY_THOUGHT)
    messages = said("One?", "1", "How do I pick a lock?", "I'm sorry")
    first, last = spans_of(chat, messages).turns
    ids = spans_of(chat, messages).ids
    assert decoded(chat, ids[last.header : last.first]) == "<think>\n\n</think>\n\n"
    assert decoded(chat, ids[last.first : last.end]) == "I'm sorry<|im_end|>\n"
    assert (first.header, last.start) == (first.first, last.first)
    whole = spans_of(chat, messages, train_scaffold=True)
    assert whole.ids == ids
    assert [turn.start for turn in whole.turns] == [first.header, last.header]
    assert [turn.first for turn in whole.turns] == [first.first, last.first]


def test_an_answer_may_look_like_what_is_put_before_it() -> None:
    chat = chat_with(EMPTY_THOUGHT)
    for answer in ("<", "<think>", "\n", "</think>\n\n<"):
        spans = spans_of(chat, said("Which sign?", f"{answer}x"))
        first = spans.turns[0].first
        assert decoded(chat, spans.ids[:first]).endswith("</think>\n\n"), answer
    spans = spans_of(chat, said("Less or more?", "<"))
    assert decoded(chat, spans.ids[spans.turns[0].first :]) == "<<|im_end|>\n"


@pytest.mark.parametrize("answer", ["Yes", MARKER])
def test_a_conversation_may_hold_the_marker_that_finds_its_answers(answer: str) -> None:
    chat = chat_with(EMPTY_THOUGHT)
    messages = said(MARKER, f"A {MARKER}", f"{MARKER}Z{MARKER[:-1]}", answer)
    assert answers_of(chat, messages) == [f"A {MARKER}<|im_end|>\n", f"{answer}<|im_end|>\n"]


def test_equal_texts_are_told_apart() -> None:
    chat = chat_with(EMPTY_THOUGHT)
    spans = spans_of(chat, said("assistant", "assistant", "assistant", "assistant"))
    assert answers_of(chat, said(*["assistant"] * 4)) == ["assistant<|im_end|>\n"] * 2
    before = "<|im_start|>user\nassistant<|im_end|>\n<|im_start|>assistant\n"
    assert decoded(chat, spans.ids[: spans.turns[0].first]) == before


BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
END_OF_TEXT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = (
    "{% for m in messages %}{{ m['role'].upper() }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "pieces"),
    [
        # no header of its own: the space belongs to the answer's first word
        (BRACKETS, ["[INST] One? [/INST]", "", " Shipping<|im_end|>",
                    "[INST] Two? [/INST]", "", " Billing<|im_end|>"]),
        # an end of text wherever no answer is to be generated
        (END_OF_TEXT, ["<|user|>\nOne?<|end|>\n<|assistant|>\n", "", "Shipping<|end|>\n",
                       "<|user|>\nTwo?<|end|>\n<|assistant|>\n", "", "Billing<|end|>\n<|im_end|>"]),
        # nothing ends an answer but the next turn's role; the newline is not in the header
        (NO_END, ["<|user|>\nOne?<|assistant|>", "\n", "Shipping<|user|>",
                  "\nTwo?<|assistant|>", "\n", "Billing"]),
        # no token but words
        (WORDS, ["USER: One?\nASSISTANT: ", "", "Shipping\n",
                 "USER: Two?\nASSISTANT: ", "", "Billing\n"]),
        # an end of text behind the last turn alone, which begins as the next turn does
        (TEMPLATES["phi3"], ["<|user|>\nOne?<|end|>\n<|assistant|>\n", "", "Shipping<|end|>\n",
                             "<|user|>\nTwo?<|end|>\n<|assistant|>\n", "",
                             "Billing<|end|>\n<|im_end|>"]),
        # GPT-OSS ends answers by <|end|>, and the last by <|return|>, which begins alike
        (TEMPLATES["gptoss"].rpartition("Render messages #}")[2].replace("loop_", ""),
         ["<|start|>user<|message|>One?<|end|><|start|>assistant", "<|channel|>final<|message|>",
          "Shipping<|end|>", "<|start|>user<|message|>Two?<|end|><|start|>assistant",
          "<|channel|>final<|message|>", "Billing<|return|>"]),
    ],
)  # fmt: skip
def test_turns_may_begin_and_end_in_other_ways(template: str, pieces: list[str]) -> None:
    chat = chat_with(template)
    spans = spans_of(chat, said("One?", "Shipping", "Two?", "Billing"))
    places = [0, *(place for turn in spans.turns for place in (turn.header, turn.first, turn.end))]
    found = [spans.ids[a:b] for a, b in pairwise(places)]
    assert [decoded(chat, ids) for ids in found] == pieces


ALWAYS = (  # in short: Llama 3's first template, GLM-Edge's, Command-R7B's, …, Command-A's
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}",
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}<|assistant|>",
    "{% for m in messages %}<|start|>{% if m.role == 'user' %}user{{ m.content }}{% else %}"
    "assistant<|channel|>{{ m.content }}<|return|>{% endif %}<|end|>{% endfor %}"
    "<|start|>assistant<think></think>",
    "{% for m in messages %}{{ m.role.upper() }}: {{ m.content }}\n{% endfor %}ASSISTANT: ",
    "{% for m in messages %}<|start|>{% if m.role != 'user' %}assistant<|channel|>"
    "{{ m.content }}{% else %}user{{ m.content }}{% endif %}<|end|>{% endfor %}"
    "<|start|>assistant{% if add_generation_prompt %}<|channel|>{% endif %}",
)


@pytest.mark.parametrize(
    ("template", "header", "inner", "last"),
    [
        (ALWAYS[0], "<|im_start|>assistant\n", "<|im_end|>", "<|im_end|>"),
        (ALWAYS[1], "<|assistant|>", "<|user|>", ""),
        (ALWAYS[2], "<|start|>assistant<think></think>", "<|return|><|end|>", "<|return|><|end|>"),
        (ALWAYS[3], "ASSISTANT: ", "\n", "\n"),
        (ALWAYS[4], "<|start|>assistant<|channel|>", "<|end|>", "<|end|>"),
    ],
)
def test_a_generation_prompt_that_is_written_unasked_is_no_end_of_an_answer(
    template: str, header: str, inner: str, last: str
) -> None:
    chat = chat_with(template)
    assert decoded(chat, chat.header_ids) == header
    for system in (None, "Be kind."):
        messages = said("One?", "Shipping", "Two?", "Billing", system=system)
        assert answers_of(chat, messages) == [f"Shipping{inner}", f"Billing{last}"]
    prompt = decoded(chat, chat.prompt_ids(row_of(MESSAGES)))
    assert prompt.endswith(header)
    assert prompt.count(header) == 1


EACH = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def test_what_a_template_writes_behind_a_conversation_is_no_part_of_an_answer() -> None:
    chat = chat_with(
        EACH + "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|im_start|>note\n"
        "This chat was exported.<|im_end|>\n{% endif %}"
    )
    messages = said("One?", "Shipping", "Two?", "Billing", system=None)
    assert answers_of(chat, messages) == ["Shipping<|im_end|>\n", "Billing<|im_end|>\n"]


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ eos_token }}"
         "{% if add_generation_prompt %}assistant: {% endif %}", "user: One?\nassistant: "),
        ("{% for m in messages %}{{ m.content }}  {% endfor %}{{ eos_token }}", "One?  "),
    ],
)  # fmt: skip
def test_an_end_that_a_template_writes_always_stands_before_no_answer(
    template: str, prompt: str
) -> None:
    chat = chat_with(template)
    asked = said("One?", system=None)
    assert chat.render(asked, generation_prompt=True) == prompt
    assert answers_of(chat, said("One?", "Shipping", system=None))[0].endswith("<|im_end|>")


def test_a_system_message_that_stands_behind_the_answer_is_refused() -> None:
    turns = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    chat = chat_with(
        f"{{% for m in messages if m.role != 'system' %}}{turns}{{% endfor %}}"
        f"{{% for m in messages if m.role == 'system' %}}{turns}{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (found,) = find_spans(chat, [Row(tuple(said("One?", "Shipping", system="Be kind.")))])
    assert isinstance(found, InputError)
    assert "messages[0]: expected before the answer in what the chat template" in str(found)


@pytest.mark.parametrize(
    ("template", "header"),
    [
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
         "<|im_start|>assistant\n"),
        ("{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}{% else %}"
         "{{ '\nAssistant: ' + m.content + eos_token }}{% endif %}{% endfor %}", "\nAssistant:"),
    ],
)  # fmt: skip
def test_a_prompt_has_the_header_that_the_template_writes_before_answers_alone(
    template: str, header: str
) -> None:
    chat = chat_with(template)
    row = row_of(said("One?", "Shipping", "Two?", "Billing"))
    assert decoded(chat, chat.prompt_ids(row)).endswith(header)
    assert decoded(chat, chat.header_ids) == header
    example = tokenize_all([row], chat, RowSettings(scaffold="response"))[0]
    for context in contexts_of(example, chat.header_ids):
        text = decoded(chat, context.ids)
        assert text.count(header) == len(context.spans)
        assert "ssistant" not in decoded(chat, context.labels)
    assert answers_of(chat, said("One?", "Shipping"))[0].strip().startswith("Shipping<|im_end|>")


def test_a_turn_that_ends_where_another_follows_ends_there() -> None:
    """Apertus, Apriel and GLM-4 write no end of the last answer."""
    for end in ("<|end|>", "\n<|end|>\n", "<|user|>"):
        chat = chat_with(
            "{% for m in messages %}{% if m.role == 'user' %}{{ '' if loop.first else end }}"
            "<|im_start|>{{ m.content }}<|assistant|>\n{% else %}{{ m.content }}{% endif %}"
            "{% endfor %}", end=end,
        )  # fmt: skip
        found = answers_of(chat, said("One?", "Shipping", "Two?", "Billing"))
        assert found == [f"Shipping{end.rstrip()}", "Billing"]


def test_a_space_of_sentencepiece_is_there_once() -> None:
    chat = chat_with(WORDS, "sentencepiece")
    spans = spans_of(chat, said("One?", "Yes", "Two?", "No"))
    assert decoded(chat, spans.ids) == " USER: One?\nASSISTANT: Yes\nUSER: Two?\nASSISTANT: No\n"
    assert answers_of(chat, said("One?", "Yes", "Two?", "No")) == ["Yes\n", "No\n"]
    brackets = chat_with(BRACKETS, "sentencepiece")
    assert answers_of(brackets, said("One?", "Shipping")) == [" Shipping<|im_end|>"]


def test_a_tokenizer_without_offsets_will_do() -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = WORDS
    chat = Chat(tokenizer)
    assert not tokenizer.is_fast
    messages = said("One?", "日本", "Two?", " é")
    assert answers_of(chat, messages) == ["日本\n", " é\n"]
    ids = spans_of(chat, messages).ids
    assert decoded(chat, ids) == chat.render(messages, generation_prompt=False)


def test_settings_that_a_tokenizer_was_saved_with_neither_cut_nor_pad() -> None:
    tokenizer = copy.deepcopy(TOKENIZERS["newlines"]())
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=200)
    rows = [row_of(said("One?", "1")), row_of(said("How many are there?", "Twelve"))]
    found = find_spans(Chat(tokenizer), rows)
    assert found == find_spans(chat_with(), rows)


# Tools and thoughts

CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"number": 7}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks up a parcel.",
        "parameters": {"type": "object", "properties": {"number": {"type": "integer"}}},
    },
}


def with_tools(**call: Any) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": "Where is it?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], **call},
        {"role": "tool", "content": "On its way", "name": "look_up"},
        {"role": "assistant", "content": "It comes."},
    ]
    return {"messages": messages, "tools": [TOOL]}


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "gemma4", "gptoss", "glm4moe", "llama3_1"])
def test_calls_of_tools_are_answers_and_what_tools_say_is_none(name: str) -> None:
    chat = chat_with(TEMPLATES[name])
    spans = spans_of(chat, with_tools())
    text = decoded(chat, spans.ids)
    assert "Looks up a parcel." in text[: text.index("Where is it?")]
    assert "On its way" in text
    call, answer = answers_of(chat, with_tools())
    assert "look_up" in call
    assert "7" in call
    assert "It comes." in answer
    for part in (call, answer):
        assert not {"Where", "On its way", "Looks up"} & {*re.findall("[A-Z][a-z]+[a-z ]*", part)}


def test_a_thought_that_a_template_drops_leaves_the_call_where_it_is() -> None:
    """Once the user has gone on, such templates render an answer as they did not before."""
    for name in ("gemma4", "gemma4_v5", "qwen3"):
        value = with_tools(reasoning_content="I should look.")
        value["messages"] += said("Thanks!", "Good day.")
        call, answer, last = answers_of(chat_with(TEMPLATES[name]), value)
        assert ("look_up" in call, "On its way" in call) == (True, False)
        assert ("It comes." in answer, "Good day." in last) == (True, True)


def test_a_thought_that_a_template_renders_is_trained() -> None:
    messages = said("One?", "1")
    messages[1]["reasoning_content"] = "Easy."
    answer = answers_of(chat_with(TEMPLATES["qwen3"]), messages)[0]
    assert answer == "Easy.\n</think>\n\n1<|im_end|>\n"


def test_arguments_reach_templates_that_want_text() -> None:
    template = TEMPLATE.replace(
        "{{ m['content'] }}",
        "{{ m['content'] }}{% for call in m['tool_calls'] or [] %}{{ call['function']['name'] + "
        "call['function']['arguments'] }}{% endfor %}",
    )
    call = answers_of(chat_with(template), with_tools())[0]
    assert call == 'look_up{"number": 7}<|im_end|>\n'


# What a template refuses, drops or alters


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (TEMPLATE + "{% if messages[1:] %}{{ raise_exception('no such role here') }}{% endif %}",
         said("a", "b"),
         "expected a conversation that the chat template takes, found: no such role here"),
        (TEMPLATES["gemma"], said("a", "b", system="Be kind."),
         "expected a conversation that the chat template takes, found: System role not supported"),
        ("{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}",
         said("a", "b", system="Be kind."), "messages[0].content: expected in what the chat "
         "template renders, found that it leaves this message of system out or changes it"),
        (TEMPLATES["qwen3"], [{"role": "wizard", "content": "Abra"}, *said("a", "b")],
         "messages[0].content: expected in what the chat template renders, found that it leaves "
         "this message of wizard out or changes it"),
        ("{% for m in messages[-2:] %}{{ m['content'] }}{% endfor %}", said("Who?", "b", "c", "d"),
         "messages[0].content: expected in what the chat template renders"),
        (TEMPLATE.replace("m['content']", "m['content'] if loop.first else m['content'][:4]"),
         said("Who?", "A long answer"),
         "messages[1].content: expected in what the chat template renders, found that it leaves "
         "this out or changes it"),
        ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}\n{% endfor %}",
         said("Who?", "Me"), "messages[1].content: expected in what the chat template renders"),
        (TEMPLATE, with_tools(), "messages[1].tool_calls: expected in what the chat template"),
    ],
)  # fmt: skip
def test_a_conversation_that_would_not_be_whole_is_refused(
    template: str, messages: Any, expected: str
) -> None:
    good = row_of(said("Who?", "Me"))
    found = find_spans(chat_with(template), [row_of(messages), good])[0]
    assert isinstance(found, InputError)
    assert str(found).startswith(f"rows.jsonl:1: {expected}")
    assert str(found).splitlines() == [str(found)]


@pytest.mark.parametrize("role", ["tool", "function", "ipython"])
@pytest.mark.parametrize(
    "result", ['{"number": 7}', "7", "Look it up"], ids=["json", "number", "words"]
)
def test_a_result_that_a_template_drops_is_missed_though_its_words_stand_elsewhere(
    role: str, result: str
) -> None:
    template = TEMPLATE.replace(
        "{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}"
    )
    assert template != TEMPLATE
    messages = [
        {"role": "user", "content": "Look it up: number 7?"},
        {"role": "assistant", "content": "look_up(number: 7)"},
        {"role": role, "content": result, "name": "look_up"},
        {"role": "assistant", "content": "Look it up? I did: number 7 comes."},
    ]
    found = find_spans(chat_with(template), [row_of(messages)])[0]
    assert "messages[2].content: expected in what the chat template renders" in str(found)
    assert isinstance(find_spans(chat_with(TEMPLATE), [row_of(messages)])[0], Spans)


def test_thoughts_that_a_template_leaves_out_of_an_answer_are_told() -> None:
    messages = said("2+2?", "<think>\nTwo and two.\n</think>\n\n4")
    found, kept = (
        find_spans(chat_with(TEMPLATES[name]), [row_of(messages)])[0]
        for name in ("deepseek_r1_distill", "qwen3")
    )
    assert found.unread == {"messages[].content (<think>)"}
    assert kept.unread == frozenset()
    messages = said("2+2?", "4")
    messages[1]["reasoning_content"] = "Two and two."
    (found,) = find_spans(chat_with(TEMPLATES["gemma4"]), [row_of(messages)])
    assert found.unread == {"messages[].reasoning_content"}


def test_a_thought_that_begins_as_its_mark_does_is_trained_whole() -> None:
    messages = said("2+2?", "4")
    messages[1]["reasoning_content"] = "<b>two</b> and two"
    chat = chat_with(TEMPLATES["glm4moe"])
    spans = spans_of(chat, messages)
    (turn,) = spans.turns
    assert decoded(chat, spans.ids[turn.first :]).startswith("<b>two</b> and two")
    assert decoded(chat, spans.ids[: turn.first]).endswith("<think>")


def test_an_answer_begins_before_a_mark_and_not_within_it() -> None:
    """<think> and </think> begin alike: Laguna, GLM-4.7 and Spark write one of them."""
    chat = chat_with(
        TEMPLATE.replace("{{ m['content'] }}",
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
        "{% elif m.role == 'assistant' %}</think>{% endif %}{{ m['content'] }}")
    )  # fmt: skip
    messages = said("2+2?", "4", "3+3?", "6")
    messages[3]["reasoning_content"] = "Three and three."
    assert answers_of(chat, messages) == [
        "4<|im_end|>\n", "<think>Three and three.</think>6<|im_end|>\n"
    ]  # fmt: skip
    spans = spans_of(chat, messages)
    assert spans.ids[spans.turns[1].first] == chat.ids_of("<think>")[0]


def test_one_row_that_is_refused_leaves_the_others_as_they_are() -> None:
    chat = chat_with(TEMPLATES["gemma"])
    rows = [row_of(said("a", "b")), row_of(said("a", "b", system="S")), row_of(said("c", "d"))]
    first, refused, last = find_spans(chat, rows)
    assert isinstance(refused, InputError)
    assert [first, last] == [find_spans(chat, [row])[0] for row in (rows[0], rows[2])]


def test_a_template_may_want_parts() -> None:
    parts = TEMPLATE.replace(
        "{{ m['content'] }}",
        "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
        "{% endif %}{% endfor %}",
    )
    messages = said("One?", "1", "Two?", "2", system="Count.")
    assert spans_of(chat_with(parts), messages) == spans_of(chat_with(), messages)


def test_a_template_that_renders_no_text_is_refused() -> None:
    with pytest.raises(ModelError, match="renders what a user says, found: 'Hello' for it"):
        spans_of(chat_with("Hello"), MESSAGES)
    with pytest.raises(ModelError, match="renders what a user says, found: "):
        spans_of(chat_with(TEMPLATE.replace("m['content']", "m['content'][:4]")), MESSAGES)


def test_a_template_that_wants_to_be_told_something_is_refused_with_what_tells_it() -> None:
    wants = TEMPLATE + "{% if rule + 'x' %}{% endif %}"
    with pytest.raises(ModelError, match=r"'rule' is undefined \(--chat-template-kwargs sets .*, "
                       r"--chat-template FILE takes another\)$"):  # fmt: skip
        spans_of(chat_with(wants), MESSAGES)
    assert spans_of(chat_with(wants, rule=""), MESSAGES) == spans_of(chat_with(), MESSAGES)


# The chat template


def test_the_header_is_what_stands_between_prompt_and_answer() -> None:
    for template, header in (
        (TEMPLATE, "<|im_start|>assistant\n"),
        (BRACKETS, " [/INST]"),
        (NO_END, "<|assistant|>"),
        (WORDS, "ASSISTANT: "),
        (END_OF_TEXT, "<|assistant|>\n"),
    ):
        chat = chat_with(template)
        assert decoded(chat, chat.header_ids) == header


BARE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def test_where_a_template_has_no_header_it_is_what_follows_a_user_or_begins_a_text() -> None:
    after = BARE.replace("{{ m['content'] }}", "{% if m.role != 'user' %} =>{% endif %}"
                         "{{ m['content'] }}")  # fmt: skip
    for template, header in ((after, " =>"), (BARE, "<|im_start|>")):
        chat = chat_with(template)
        assert decoded(chat, chat.header_ids) == header
        assert answers_of(chat, said("One?", "Shipping"))[0].strip() == "Shipping"
    bare = newlines_tokenizer()
    bare.chat_template, bare.bos_token = BARE, None
    with pytest.raises(ModelError, match="--assistant-header says what it is"):
        print(Chat(bare).header_ids)
    set_by_hand = Chat(bare, None, "A: ")
    assert decoded(set_by_hand, set_by_hand.header_ids) == "A: "
    assert set_by_hand.template_sha256 != chat.template_sha256


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_system_message_is_rendered_or_the_setting_that_mends_it_is_named(name: str) -> None:
    chat = chat_with(TEMPLATES[name])
    messages = said("One?", "Shipping", "Two?", "Returns", system="Be kind.")
    found = find_spans(chat, [row_of(messages)])[0]
    if isinstance(found, InputError):
        assert name.startswith("gemma")
        assert "--system-role merge puts the system message before what the user says" in str(found)
    merged = prepared(copy.copy(chat.tokenizer), ChatSettings(system_role="merge"))
    assert answers_of(merged, messages)[-1].strip().startswith("Returns")
    text = merged.render(messages, generation_prompt=False)
    assert text == chat_with(TEMPLATES[name]).render(
        said("Be kind.\n\nOne?", "Shipping", "Two?", "Returns"), generation_prompt=False
    )
    assert merged.template_sha256 != chat.template_sha256
    twice = prepared(merged.tokenizer, ChatSettings(system_role="merge"))
    assert twice.render(messages, generation_prompt=False) == text


def test_a_system_message_of_the_last_turn_alone_is_missed_with_what_mends_it() -> None:
    """Mistral 7B v0.3 and Nemo write it into what the user says last, until an answer follows."""
    chat = chat_with(
        "{% if messages[0].role == 'system' %}{% set rule = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
        "{% if m.role == 'user' %}[INST] {% if loop.last %}{{ rule }}{% endif %}{{ m.content }}"
        "[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    messages = said("One?", "Shipping", system="Be kind.")
    missed = r"messages\[0\]\.content: .* leaves this message of system out .*"
    with pytest.raises(InputError, match=missed + r"\(--system-role merge puts the system message"):
        spans_of(chat, messages)
    merged = prepared(copy.copy(chat.tokenizer), MERGE)
    assert answers_of(merged, messages) == [" Shipping<|im_end|>"]
    deaf = chat_with(
        TEMPLATE.replace("for m in messages", "for m in messages if m.content != 'Two?'")
    )
    with pytest.raises(InputError, match=r"this message of user out or changes it$"):
        spans_of(deaf, said("One?", "Shipping", "Two?", "Returns", system="Be kind."))


@pytest.mark.parametrize("template", [
    "{% if messages | length > 2 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    + TEMPLATE,
    TEMPLATE.replace("for m in messages", "for m in messages if 'One?' not in m.content"),
])  # fmt: skip
def test_what_merges_already_is_not_told_to_merge(template: str) -> None:
    """A template that refuses other turns, and one that leaves out what the user says."""
    tokenizer = copy.copy(TOKENIZERS["newlines"]())
    tokenizer.chat_template = template
    merged = prepared(tokenizer, MERGE)
    messages = said("One?", "Shipping", "Two?", "Returns", system="Be kind.")
    with pytest.raises(InputError, match=r"alternate \(--chat-template FILE|out or changes it$"):
        spans_of(merged, messages)
    with pytest.raises(InputError, match=r"alternate \(--chat-template FILE|out or changes it$"):
        merged.prompt_ids(row_of(messages))


def test_every_named_template_merges_the_system_message(tmp_path: Path) -> None:
    """Command-R and Hermes 3 have several templates, of which transformers takes one by name."""
    refuses = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    tokenizer = copy.copy(TOKENIZERS["newlines"]())
    tokenizer.chat_template = {"default": refuses + TEMPLATE, "tool_use": refuses + WORDS}
    tokenizer.save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    messages, tools = said("One?", "Shipping", system="Be kind."), [{"type": "function"}]
    with pytest.raises(InputError, match="--system-role merge puts"):
        Chat(copy.copy(tokenizer)).render(messages, generation_prompt=False)
    merged = prepared(prepared(tokenizer, MERGE).tokenizer, MERGE)  # twice is once
    for called, template in ((None, TEMPLATE), (tools, WORDS)):
        assert merged.render(messages, generation_prompt=False, tools=called) == chat_with(
            template
        ).render(said("Be kind.\n\nOne?", "Shipping"), generation_prompt=False)


def test_a_tokenizer_without_a_chat_template_is_refused(
    aligned: Path, tmp_path: Path, rows_file: Path, tokens_file: Path, fails: Callable[..., str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in aligned.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="expected a tokenizer with a chat template, found none"):
        Chat(load_tokenizer(str(bare)))
    words = ["score", "--model", bare, "--rows", rows_file, "--safety-tokens", tokens_file]
    words += ["--cache", tmp_path / "cache", "-o", tmp_path / "targets.json"]
    assert "expected a tokenizer with a chat template, found none" in fails(*words)
    assert not (tmp_path / "targets.json").exists()


def test_a_template_of_a_file_takes_the_place_of_the_models(aligned: Path, tmp_path: Path) -> None:
    (tmp_path / "words.jinja").write_text(WORDS)
    chat = chat_of(str(aligned), ChatSettings(chat_template=str(tmp_path / "words.jinja")))
    assert chat.render(MESSAGES, generation_prompt=False) == "USER: Is it here?\nASSISTANT: Yes.\n"
    assert chat.template_sha256 != chat_of(str(aligned), ChatSettings()).template_sha256
    with pytest.raises(MissingFileError, match=r"gone\.jinja: no such file"):
        chat_of(str(aligned), ChatSettings(chat_template=str(tmp_path / "gone.jinja")))


def test_a_template_may_be_in_json_as_processors_ship_it(aligned: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat_template.json"
    settings = ChatSettings(chat_template=str(file))
    file.write_text(json.dumps({"chat_template": WORDS}))
    assert chat_of(str(aligned), settings).tokenizer.chat_template == WORDS
    named = [{"name": "default", "template": WORDS}]
    for value, found in (({"template": WORDS}, "none"), ({"chat_template": named}, "list"),
                         (WORDS, "none"), (None, "none")):  # fmt: skip
        file.write_text(json.dumps(value))
        expected = (
            rf"json: expected a chat template as text at the key chat_template, found {found}$"
        )
        with pytest.raises(InputError, match=expected):
            chat_of(str(aligned), settings)
    file.write_text(WORDS)
    with pytest.raises(InputError, match=r"chat_template\.json:1: expected JSON, found"):
        chat_of(str(aligned), settings)


def test_variables_reach_the_template() -> None:
    template = TEMPLATE + "{% if add_generation_prompt and quiet %}<think>{% endif %}"
    for variables, end in (({"quiet": True}, "assistant\n<think>"), ({}, "assistant\n")):
        chat = chat_with(template, **variables)
        assert decoded(chat, chat.header_ids).endswith(end)


def test_a_date_in_the_template_is_no_days() -> None:
    """Else a context would be another one tomorrow, and never be known again."""
    chat = chat_with("{{ strftime_now('%d %b %Y') }}" + TEMPLATE)
    ids = chat.prompt_ids(row_of([{"role": "user", "content": "Hello"}, MESSAGES[1]]))
    assert decoded(chat, ids).startswith("26 Jul 2024")


def test_a_prompt_that_the_template_refuses_is_named_by_its_line() -> None:
    row = row_of(said("Hi", "Yes", system="Be kind."))
    said_of_it = r"^rows\.jsonl:1: .*: System role not supported \(--system-role merge"
    with pytest.raises(InputError, match=said_of_it):
        chat_with(TEMPLATES["gemma"]).prompt_ids(row)


# Contexts


def test_contexts_hold_the_row_and_each_answer_alone() -> None:
    chat = chat_with()
    messages = said("Where is it?", "Shipping", "And now?", "Returns, I think")
    example = tokenize_all([row_of(messages)], chat, RowSettings())[0]
    full, first, second = contexts_of(example, chat.header_ids)
    assert full.ids.tolist() == example.ids.tolist()
    assert full.fed.tolist() == example.ids[:-1].tolist()
    assert decoded(chat, first.ids) == "<|im_start|>assistant\nShipping<|im_end|>\n"
    assert decoded(chat, second.ids) == "<|im_start|>assistant\nReturns, I think<|im_end|>\n"
    assert decoded(chat, full.labels) == "Shipping<|im_end|>\nReturns, I think<|im_end|>\n"
    assert [*full.labels] == [*first.labels, *second.labels]
    assert full.positions.tolist() == example.trained.tolist()
    assert full.steps == first.steps + second.steps == example.steps
    assert example.step_numbers.tolist() == [*range(first.steps), *range(second.steps)]
    assert [context.kind for context in (full, first)] == ["full", "response_only"]


def test_what_is_put_before_an_answer_is_in_its_context_and_has_no_number() -> None:
    chat, row = chat_with(EMPTY_THOUGHT), row_of(said("Where is it?", "Shipping"))
    texts = []
    for scaffold in ("prompt", "response"):
        example = tokenize_all([row], chat, RowSettings(scaffold=scaffold))[0]
        only = contexts_of(example, chat.header_ids)[1]
        assert decoded(chat, only.ids) == (
            "<|im_start|>assistant\n<think>\n\n</think>\n\nShipping<|im_end|>\n"
        )
        texts.append(decoded(chat, only.labels))
        own = chat.tokenizer.decode(only.labels[example.step_numbers >= 0])
        assert own == "Shipping<|im_end|>\n"
    assert texts == ["Shipping<|im_end|>\n", "<think>\n\n</think>\n\nShipping<|im_end|>\n"]


def test_keys_depend_on_kind_ids_and_spans_alone(rows_file: Path) -> None:
    chat = chat_with()
    example = tokenize_all(read_rows(rows_file), chat, RowSettings())[0]
    full, only = contexts_of(example, chat.header_ids)
    again = Context("full", np.array(full.ids.tolist(), dtype=np.int64), full.spans)
    assert again.key == full.key == full.key_bytes.hex()
    assert len(full.key) == 32
    changed = full.ids.copy()
    changed[0] += 1
    ((start, end),) = full.spans
    others = [
        Context("response_only", full.ids, full.spans),
        Context("full", full.ids, ((start - 1, end),)),
        Context("full", full.ids, ((start, end - 1),)),
        Context("full", full.ids, ((start, start + 1), (start + 1, end))),
        Context("full", changed, full.spans),
        only,
    ]
    assert full.key not in {other.key for other in others}
    assert len({other.key for other in others}) == 6


def test_a_key_stays_what_it_was() -> None:
    """Stores outlive this program: another way to make keys would make all of them worthless."""
    ids = np.array([1, 5, 2, 7, 8], dtype=np.int32)
    assert Context("full", ids, ((1, 3), (4, 5))).key == "35c7feb79def8becb0a19549697f6603"
    assert Context("response_only", ids, ((2, 5),)).key == "7595b4598efac8653db047fa83953118"


# Rows that are too long

LONG = said("Where is my parcel?", "Shipping, and soon", "And the other one?", "Returns, I think")


def test_a_row_is_cut_and_refused_when_nothing_is_left(rows_file: Path) -> None:
    chat, rows = chat_with(), read_rows(rows_file)
    whole = tokenize_all(rows[2:3], chat, RowSettings())[0]
    assert not whole.is_cut
    cut = tokenize_all(rows[2:3], chat, RowSettings(max_tokens=whole.response_start + 2))[0]
    assert (cut.steps, cut.is_cut) == (2, True)
    assert cut.ids.tolist() == whole.ids[: whole.response_start + 2].tolist()
    refused = tokenize(rows[2:3], chat, RowSettings(max_tokens=whole.response_start))[0]
    assert isinstance(refused, LongRowError)
    start = whole.response_start
    assert str(refused).endswith(
        f"rows.jsonl:3: expected a response within {start} tokens, found a prompt of {start}; "
        "raise --max-tokens, shorten the row, or set --long-rows"
    )
    with pytest.raises(LongRowError):
        tokenize_all(rows[2:3], chat, RowSettings(max_tokens=start))


def test_answers_beyond_the_most_tokens_are_left_out() -> None:
    chat, row = chat_with(), row_of(LONG)
    whole = tokenize_all([row], chat, RowSettings())[0]
    first, second = whole.turns
    for limit, turns in (
        (second.end, [first, second]),
        (second.start + 1, [first, second._replace(end=second.start + 1)]),
        (second.start, [first]),
        (first.end, [first]),
        (first.start + 1, [first._replace(end=first.start + 1)]),
    ):
        cut = tokenize_all([row], chat, RowSettings(max_tokens=limit))[0]
        assert [*cut.turns] == turns
        assert cut.ids.tolist() == whole.ids[: turns[-1].end].tolist()
        assert cut.is_cut == (limit < len(whole.ids))


def test_a_prompt_may_be_cut_at_its_beginning() -> None:
    chat, row = chat_with(), row_of(said("Where is it? " * 40, "Shipping, and soon"))
    whole = tokenize_all([row], chat, RowSettings())[0]
    response, header = whole.ids[whole.response_start :], chat.header_ids
    cut = tokenize_all([row], chat, RowSettings(max_tokens=40, long_rows="cut"))[0]
    assert cut.ids.tolist() == whole.ids[-40:].tolist()
    assert cut.ids[cut.response_start :].tolist() == response.tolist()
    assert cut.is_cut
    # no room for the whole answer: the header stays, and the answer is cut
    least = len(header) + 3
    cut = tokenize_all([row], chat, RowSettings(max_tokens=least, long_rows="cut"))[0]
    assert cut.ids.tolist() == [*header, *response[:3]]
    assert cut.steps == 3


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.integers(2, 90),
    st.sampled_from(["refuse", "cut", "drop"]),
    st.sampled_from(["all", "last"]),
    st.sampled_from(["prompt", "response"]),
)
def test_a_cut_row_is_part_of_the_row(limit: int, long: Any, turns: Any, scaffold: Any) -> None:
    chat, row = chat_with(EMPTY_THOUGHT), row_of(LONG)
    options = {"turns": turns, "scaffold": scaffold, "long_rows": long}
    whole = tokenize_all([row], chat, RowSettings(**options))[0]
    found = tokenize([row], chat, RowSettings(**options, max_tokens=limit))[0]
    if isinstance(found, InputError):
        assert (isinstance(found, LongRowError), long == "cut") == (True, False)
        assert whole.response_start >= limit
        return
    assert 0 < found.response_start < len(found.ids) <= limit
    assert found.turns[-1].end == len(found.ids)
    assert found.is_cut == (len(whole.ids) > limit)
    text, part = whole.ids.tolist(), found.ids.tolist()
    at = whole.response_start - found.response_start
    assert text[at : at + len(part)] == part
    for turn, own in zip(found.turns, whole.turns, strict=False):
        assert (turn.start, turn.first) == (own.start - at, max(own.first - at, 0))
        assert 0 <= turn.header <= turn.start < turn.end <= own.end - at
    for context in contexts_of(found, chat.header_ids):
        assert [*context.labels] == [*context.ids[context.positions]]
        assert context.spans[0][0] > 0


# Any conversation, in every template that trl ships

SPACES = st.sampled_from(["", "", " ", "  ", "\n", "\n\n", " \n", "\n ", "\t", "\r\n"])
LETTERS = st.one_of(
    st.sampled_from(list(" \n.,:'\"\\{}[]<|>#é日🙂\u0301\u2028\u00a0")),
    st.characters(exclude_categories=["Cs"]),
)


def texts(word: str) -> st.SearchStrategy[str]:
    """Any text with a word in it that nobody else says."""
    around = st.text(LETTERS, max_size=3)
    return st.tuples(SPACES, around, st.just(word), around, SPACES).map("".join)


@st.composite
def conversations(draw: Any) -> list[dict[str, Any]]:
    turns = draw(st.integers(1, 4))
    words = [word for i in range(turns) for word in (f"Ask{i}", f"Say{i}")]
    system = draw(st.none() | texts("Rule"))
    return said(*(draw(texts(word)) for word in words), system=system)


def plain(text: str, kind: str) -> str:
    """A text as it is decoded: SentencePiece begins it with a space, and writes spaces as ▁."""
    return text.replace("▁", " ").lstrip(" ") if kind == "sentencepiece" else text


def is_altered(chat: Chat, messages: list[dict[str, Any]]) -> bool:
    """Whether a template refuses a conversation, or does not say all of it."""
    try:
        text = chat.render(messages, generation_prompt=False)
    except InputError:
        return True
    return not all(message["content"].strip() in text for message in messages)


def kept_of(chat: Chat, messages: list[dict[str, Any]], index: int) -> str:
    """What is left of a message where the template strips it: the least that renders the same."""

    def rendered(content: str) -> str:
        changed = [*messages[:index], {**messages[index], "content": content}]
        return chat.render([*changed, *messages[index + 1 :]], generation_prompt=False)

    text = messages[index]["content"]
    ways = (str.strip, str.lstrip, str.rstrip)
    shorter = {way(text, spaces) for way in ways for spaces in (None, "\n")} - {text}
    whole = rendered(text) if shorter else ""
    return min([text, *(part for part in shorter if rendered(part) == whole)], key=len)


def check_spans(chat: Chat, messages: list[dict[str, Any]], kind: str, turns: Any) -> None:
    row = row_of(messages)
    found = find_spans(chat, [row], turns)[0]
    if isinstance(found, InputError):
        line = str(found)
        assert (line.splitlines(), line[:14]) == ([line], "rows.jsonl:1: ")
        assert is_altered(chat, messages)
        return
    text = chat.render(messages, generation_prompt=False)
    assert plain(decoded(chat, found.ids), kind) == plain(text, kind)
    wanted = row.answers if turns == "all" else row.answers[-1:]
    end = 0
    for turn, index in zip(found.turns, wanted, strict=True):
        assert end <= turn.header <= turn.start == turn.first < turn.end <= len(found.ids)
        end = turn.end
        own = plain(decoded(chat, found.ids[turn.first : turn.end]), kind)
        answer = plain(kept_of(chat, messages, index), kind)
        assert answer in own
        assert own.lstrip().startswith(answer.lstrip())
        number = row.answers.index(index)
        assert set(re.findall(r"Ask\d|Say\d|Rule", own)) == {f"Say{number}"}
        before = decoded(chat, found.ids[: turn.first])
        assert f"Ask{number}" in before
        assert f"Say{number}" not in before


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_is_given_back_exactly(name: str) -> None:
    chats = {kind: chat_with(TEMPLATES[name], kind) for kind in TOKENIZERS}

    @settings(
        max_examples=6,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(conversations(), st.sampled_from(["all", "all", "last"]))
    def check(messages: list[dict[str, Any]], turns: Any) -> None:
        for kind, chat in chats.items():
            check_spans(chat, messages, kind, turns)

    check()
    for chat in chats.values():  # a template that refused all of them would have shown nothing
        assert len(spans_of(chat, said("Ask0", "Say0", "Ask1", "Say1")).turns) == 2


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(conversations())
def test_a_conversation_has_the_same_keys_in_every_form(messages: list[dict[str, Any]]) -> None:
    turns = [message for message in messages if message["role"] != "system"]
    beside = {"system": messages[0]["content"]} if len(turns) < len(messages) else {}
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
    pairs = [[turns[i]["content"], turns[i + 1]["content"]] for i in range(0, len(turns), 2)]
    last = {"messages": [{**message, "weight": 0} for message in messages[:-1]] + messages[-1:]}
    alike = [
        [
            {"messages": messages},
            {"messages": turns, **beside},
            {"conversations": sharegpt},
            {"messages": json.dumps(messages)},
            {"instruction": pairs[-1][0], "output": pairs[-1][1], "history": pairs[:-1], **beside},
            {
                "messages": [
                    {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]}
                    for m in messages
                ]
            },
        ],
        [
            last,
            {"prompt": messages[:-1], "completion": messages[-1:]},
            {"prompt": messages[:-1], "response": messages[-1]["content"]},
            {"prompt": turns[:-1], "completion": turns[-1:], **beside},
        ],
    ]
    for kind in TOKENIZERS:
        chat = chat_with(kind=kind)
        for values in alike:
            examples = tokenize_all([row_of(value) for value in values], chat, RowSettings())
            keys = {
                tuple(context.key for context in contexts_of(example, chat.header_ids))
                for example in examples
            }
            assert len(keys) == 1
        by_setting = tokenize_all([row_of(messages)], chat, RowSettings(turns="last"))[0]
        assert tuple(c.key for c in contexts_of(by_setting, chat.header_ids)) in keys


def test_rows_of_a_file_have_the_keys_of_their_conversations(tmp_path: Path) -> None:
    chat = chat_with()
    rows = [{"messages": MESSAGES}, {"prompt": "Is it here?", "completion": "Yes."}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    one, other = tokenize_all(read_rows(path), chat, RowSettings())
    assert [c.key for c in contexts_of(one, chat.header_ids)] == [
        c.key for c in contexts_of(other, chat.header_ids)
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"prompt": "Hi", "completion": "Shipping<|im_end|>\n"},
         "messages[1].content: expected an answer without its end of turn, which the chat template "
         "writes, found '<|im_end|>' at its end; take it out"),
        ({"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
          "completion": "Shipping"},
         "messages[0].content: expected what one message says, found a conversation as one text, "
         "which ends in '<|im_start|>assistant'; write its turns as a list of messages"),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": " Shipping"},
         "messages[0].content: expected what one message says, found a conversation as one text, "
         "which ends in 'Assistant:'; write its turns as a list of messages"),
    ],
)  # fmt: skip
def test_what_was_rendered_before_is_not_rendered_again(value: Any, expected: str) -> None:
    found = find_spans(chat_with(), [row_of(value)])[0]
    assert isinstance(found, InputError)
    assert str(found).partition(": ")[2] == expected


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "What does <|im_end|> mean?", "response": "<|im_end|> ends a turn."},
        {"prompt": "Translate:\nHuman: Hi", "response": "Assistant: Hi"},
        {"prompt": "Who says this?\n\nAssistant:", "response": "It does."},
    ],
)
def test_a_text_may_speak_of_turns(value: Any) -> None:
    assert isinstance(find_spans(chat_with(), [row_of(value)])[0], Spans)
