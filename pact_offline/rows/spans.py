"""Where the answers of a conversation lie among its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pact_offline.errors import InputError
from pact_offline.rows.chat import Chat, Conversation
from pact_offline.rows.dropped import MARKER, left_out, said_by
from pact_offline.rows.generation_prompt import before_mark, common_start
from pact_offline.rows.pieces import Piece, encode, encode_apart, token_at
from pact_offline.rows.rendered import rendered_already
from pact_offline.rows.row import THOUGHTS, Message, Row, has_answer

Turns = Literal["all", "last"]


class Turn(NamedTuple):
    """An answer among the tokens of its conversation.

    Attributes:
        header: the first token after the assistant header, where a model begins to generate.
        start: the first token that is trained: `header` or `first`.
        first: the first token of the answer's own text, its step 0; what a template puts before
            (an empty thought, a channel marker) lies between header and first.
        end: after its last token, the end of turn.
    """

    header: int
    start: int
    first: int
    end: int


class Spans(NamedTuple):
    """A conversation's token ids, and its answers among them.

    Attributes:
        ids: until the last trained token.
        turns: the trained answers, in order.
        unread: keys of trained answers with a thought that the template leaves out.
    """

    ids: list[int]
    turns: list[Turn]
    unread: frozenset[str] = frozenset()


@dataclass
class _Place:
    """An answer in the rendered text, in characters."""

    header: int
    own: int
    end: int


@dataclass
class _Rendered:
    row: Row
    turns: list[int]
    text: str
    before: dict[int, str | None]
    until: dict[int, str | None]


def trained_turns(row: Row, turns: Turns) -> list[int]:
    """Positions of the messages of a row that are trained."""
    answers = [i for i in row.answers if i not in row.not_trained and has_answer(row.messages[i])]
    return answers if turns == "all" else answers[-1:]


def find_spans(
    chat: Chat, rows: Sequence[Row], turns: Turns = "all", *, train_scaffold: bool = False
) -> list[Spans | InputError]:
    """Tokenize conversations up to their last trained answer, and find the answers.

    What a template renders is one text, tokenized at once; but where a token would reach over the
    place at which a model begins to generate, what is before and after are tokenized one after the
    other, as a model would see and write them.

    Args:
        chat: template and tokenizer.
        rows: with an answer to train each.
        turns: which answers.
        train_scaffold: count what the template puts before an answer as response.

    Returns:
        for each row its spans; of one that cannot be used, why.
    """
    chosen = [trained_turns(row, turns) for row in rows]
    rendered = _render(chat, rows, chosen)
    found: list[Spans | InputError | None] = []
    located: list[tuple[_Rendered, int, list[_Place]]] = []
    for index, item in enumerate(rendered):
        places = item if isinstance(item, InputError) else _places(chat, item)
        if isinstance(places, InputError):
            found.append(InputError(f"{rows[index].origin}: {places}"))
            continue
        assert isinstance(item, _Rendered)
        found.append(None)
        located.append((item, index, places))
    encoded = encode(chat.tokenizer, [item.text for item, _, _ in located])
    for (item, index, places), whole in zip(located, encoded, strict=True):
        spans = _tokens(chat.tokenizer, item.text, places, whole, train_scaffold)
        spans = spans._replace(unread=_thoughts_left_out(item, places))
        if all(1 <= turn.start < turn.end for turn in spans.turns):
            found[index] = spans
        else:
            found[index] = InputError(
                f"{rows[index].origin}: expected an answer with tokens of its own and one before "
                "them, found none"
            )
    return [item for item in found if item is not None]


def _render(
    chat: Chat, rows: Sequence[Row], chosen: Sequence[list[int]]
) -> list[_Rendered | InputError]:
    """Each conversation until its last trained answer, before each answer, and until each."""
    wholes = [
        Conversation(row.messages[: turns[-1] + 1], row.tools)
        for row, turns in zip(rows, chosen, strict=True)
    ]
    before = [(r, t) for r, turns in enumerate(chosen) for t in turns]
    until = [(r, t) for r, turns in enumerate(chosen) for t in turns[:-1]]
    texts = chat.render_all(
        [*wholes, *(Conversation(rows[r].messages[: t + 1], rows[r].tools) for r, t in until)],
        generation_prompt=False,
    )
    prompts = chat.render_all(
        [Conversation(rows[r].messages[:t], rows[r].tools) for r, t in before],
        generation_prompt=True,
    )
    found: list[_Rendered | InputError] = []
    for row, turns, text in zip(rows, chosen, texts, strict=False):
        if isinstance(text, InputError):
            found.append(text)
        elif problem := _changed(chat, row, turns[-1], text):
            found.append(problem)
        else:
            found.append(_Rendered(row, turns, text, {}, {turns[-1]: text}))
    for pairs, parts, name in ((before, prompts, "before"), (until, texts[len(rows) :], "until")):
        for (r, t), part in zip(pairs, parts, strict=True):
            item = found[r]
            if isinstance(item, _Rendered):
                getattr(item, name)[t] = part if isinstance(part, str) else None
    return found


def _changed(chat: Chat, row: Row, last: int, text: str) -> InputError | None:
    """A message up to a row's last trained answer that its text does not hold, or holds twice."""
    answer = row.messages[last]

    def render(messages: Sequence[Message]) -> str:
        return chat.render([*messages, answer], generation_prompt=False, tools=row.tools)

    dropped = left_out(row.messages[:last], text, render, [answer], is_merged=chat.is_merged)
    return dropped or rendered_already(row.messages[: last + 1], chat.opening, chat.ends)


def _places(chat: Chat, item: _Rendered) -> list[_Place] | InputError:
    places = []
    for turn in item.turns:
        message = item.row.messages[turn]
        place = _place(chat, item, turn)
        for what, said in said_by(message):
            if place is None or said not in item.text[place.own : place.end]:
                return InputError(
                    f"messages[{turn}].{what}: expected in what the chat template renders, found "
                    "that it leaves this out or changes it (--chat-template FILE takes another)"
                )
        if place is None:
            continue
        before, behind = item.text[: place.own], item.text[place.own :]
        for i, earlier in enumerate(item.row.messages[:turn]):
            if earlier["role"] not in ("system", "developer"):
                continue
            if any(said in behind and said not in before for _, said in said_by(earlier)):
                return InputError(
                    f"messages[{i}]: expected before the answer in what the chat template renders, "
                    "found that it stands behind (--turns last trains the last answer alone, "
                    "--system-role merge puts it before what the user says first)"
                )
        places.append(place)
    return places


def _thoughts_left_out(item: _Rendered, places: Sequence[_Place]) -> frozenset[str]:
    """Keys of answers whose thought is not among what is trained."""
    found = set()
    for turn, place in zip(item.turns, places, strict=True):
        message = item.row.messages[turn]
        thoughts = {f"messages[].{key}": message.get(key) for key in THOUGHTS}
        said, closes, _ = message["content"].partition("</think>")
        thoughts["messages[].content (<think>)"] = said.partition("<think>")[2] if closes else None
        for key, thought in thoughts.items():
            if thought and str(thought).strip() not in item.text[place.header : place.end]:
                found.add(key)
    return frozenset(found)


def _place(chat: Chat, item: _Rendered, turn: int) -> _Place | None:
    """Where an answer lies in the text; None if the template drops it."""
    text, message = item.text, item.row.messages[turn]
    before, until = item.before.get(turn), _until(chat, item, turn)
    header = len(before) if before and text.startswith(before) else None
    if header is not None and until and text.startswith(until) and len(message) == 2:
        for content in (message["content"], message["content"].strip()):
            behind = text[header + len(content) : len(until)]
            if text.startswith(content, header) and content.strip() not in behind:
                end = _with_mark(text, header, len(until), chat.marks)
                return _Place(header, header, end)  # else it may be what is put before it
    marker = _marker(text)
    for variant in _variants(message, marker):
        try:
            other, alone = (
                chat.render(
                    [*item.row.messages[:turn], variant, *after],
                    generation_prompt=False,
                    tools=item.row.tools,
                )
                for after in (item.row.messages[turn + 1 : item.turns[-1] + 1], ())
            )
        except InputError:
            continue
        if marker not in other:
            continue
        own = before_mark(text, min(common_start(text, other), other.find(marker)), chat.marks)
        if (thought := _thought_at(chat, item, turn, marker)) is not None:
            own = min(own, thought)  # a mark that opens a thought may begin as the thought does
        shared = common_start(text, until or "")
        if until and (shared == len(until) or _holds(text[own:shared], message)):
            end = shared
        else:
            behind = other.rpartition(marker)[2]
            if not text.endswith(behind):
                continue
            end = len(text) - len(behind)
            end += common_start(text[end:], alone.rpartition(marker)[2])
        end = _with_mark(text, own, before_mark(text, end, chat.marks), chat.marks)
        return _Place(own if header is None else min(header, own), own, end)
    if header is not None and until and text.startswith(until):
        return _Place(header, header, len(until))
    return None


def _thought_at(chat: Chat, item: _Rendered, turn: int, marker: str) -> int | None:
    """Where an answer's thought begins, in characters; None where it has none of its own."""
    message = item.row.messages[turn]
    key = next((key for key in THOUGHTS if message.get(key)), None)
    if key is None:
        return None
    messages = list(item.row.messages[: item.turns[-1] + 1])
    messages[turn] = {**message, key: marker}
    try:
        other = chat.render(messages, generation_prompt=False, tools=item.row.tools)
    except InputError:
        return None
    at = other.find(marker)
    return at if 0 <= at == common_start(item.text[:at], other) else None


def _until(chat: Chat, item: _Rendered, turn: int) -> str | None:
    """The conversation until an answer ends, without a thought that the template then drops."""
    until, message = item.until.get(turn), item.row.messages[turn]
    if not until or item.text.startswith(until) or not set(THOUGHTS) & set(message):
        return until
    kept = {key: part for key, part in message.items() if key not in THOUGHTS}
    try:
        messages = [*item.row.messages[:turn], kept]
        other = chat.render(messages, generation_prompt=False, tools=item.row.tools)
    except InputError:
        return until
    return max(until, other, key=lambda rendered: common_start(item.text, rendered))


def _with_mark(text: str, own: int, end: int, marks: Sequence[str]) -> int:
    """Where an answer ends that no mark ends: behind the mark that follows where a turn does."""
    if text[own:end].rstrip().endswith(tuple(marks)):
        return end
    behind = end + len(text[end:]) - len(text[end:].lstrip())
    mark = next((mark for mark in marks if text.startswith(mark, behind)), "")
    return behind + len(mark) if mark else end


def _holds(text: str, message: Message) -> bool:
    return all(said in text for _, said in said_by(message)) and bool(text)


def _marker(text: str) -> str:
    """A marker that a conversation does not hold itself."""
    marker = MARKER
    while marker in text:
        marker += MARKER[-1]
    return marker


def _variants(message: Message, marker: str) -> list[Message]:
    """The message with a marker for its text, and with nothing else.

    Templates that read the calls alone drop the first, templates that want a call before a tool's
    answer refuse the second. Where the calls are all that is said, they begin the answer.
    """
    plain = {"role": "assistant", "content": marker}
    kept = {key: part for key, part in message.items() if key not in THOUGHTS}
    variants = [{**kept, "content": marker}, plain] if len(kept) > 2 else [plain]
    return variants if message["content"].strip() else variants[::-1]


def _tokens(
    tokenizer: Any, text: str, places: list[_Place], whole: Any, train_scaffold: bool
) -> Spans:
    cuts: list[int] = []
    if whole is not None:
        ids, pieces = list(whole.ids), [Piece(0, whole, 0, 0)]
        cuts = [at for place in places for at in _cuts(place, whole, text)]
    else:
        cuts = [at for place in places for at in (place.header, place.end)]
    if cuts or whole is None:
        ids, pieces = encode_apart(tokenizer, text, sorted({0, *cuts}))
    found = []
    for place in places:
        end = token_at(pieces, place.end, len(ids)) if place.end < len(text) else len(ids)
        header = token_at(pieces, place.header, end)
        first = max(header, token_at(pieces, place.own, end))
        found.append(Turn(header, header if train_scaffold else first, first, end))
    return Spans(ids[: found[-1].end], found)


def _cuts(place: _Place, whole: Any, text: str) -> list[int]:
    """Where a text has to be tokenized apart: where a token reaches over a place's bounds.

    A space that a template writes before an answer is one token with its first word, as it is when
    a model generates it.
    """
    found = []
    for at in {place.header, place.own}:
        token = whole.char_to_token(at)
        if token is None:
            continue
        start = whole.token_to_chars(token)[0]
        if start < at and (at == place.header or text[start:at].strip(" ")):
            found.append(at)
    return found
