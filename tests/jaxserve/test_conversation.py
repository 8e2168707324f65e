import builtins
import json
from contextlib import closing

import pytest

from jaxserve.conversation import COMMANDS, Conversation, Piece, read_messages, typed
from jaxserve.parallel.errors import RequestError

SYSTEM, HI, HELLO = (
    {"role": role, "content": text} for role, text in [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")]
)


def hello(messages):
    for piece in ("Hel", "lo"):
        yield Piece(piece)


def refuse(messages):
    yield Piece("Hel")
    raise RequestError("too long")


def test_question_and_answer_join_the_messages_of_which_the_speaker_sees_all_before():
    seen = []

    def speak(messages):
        seen.extend(messages)
        yield from hello(messages)

    conversation = Conversation([SYSTEM])
    assert [piece.text for piece in conversation.ask("Hi", speak)] == ["Hel", "lo"]
    assert (seen, conversation.messages) == ([SYSTEM, HI], [SYSTEM, HI, HELLO])


def test_of_an_answer_that_is_stopped_what_came_stays():
    conversation = Conversation()
    with closing(conversation.ask("Hi", hello)) as pieces:
        next(pieces)
    assert conversation.messages == [HI, HELLO | {"content": "Hel"}]


def test_an_answer_that_is_interrupted_stays_as_far_as_it_came():
    def speak(messages):
        yield Piece("Hel")
        raise KeyboardInterrupt

    conversation = Conversation()
    with pytest.raises(KeyboardInterrupt):
        list(conversation.ask("Hi", speak))
    assert conversation.messages == [HI, HELLO | {"content": "Hel"}]


def test_a_question_that_can_not_be_answered_leaves_no_trace():
    conversation = Conversation([HI, HELLO])
    with pytest.raises(RequestError, match="too long"):
        list(conversation.ask("More", refuse))
    assert conversation.messages == [HI, HELLO]
    unanswered = Conversation([HI])
    with pytest.raises(RequestError, match="too long"):
        list(unanswered.ask("More", refuse))
    assert unanswered.messages == [HI]


def test_a_new_conversation_keeps_what_the_system_says():
    conversation = Conversation([SYSTEM, HI, HELLO])
    assert conversation.command("/new") == "started again"
    assert conversation.messages == [SYSTEM]


def test_what_the_system_says_can_be_changed_at_any_time():
    conversation = Conversation([SYSTEM, HI])
    conversation.command("/system  Answer in verse. ")
    assert conversation.messages == [SYSTEM | {"content": "Answer in verse."}, HI]
    conversation.command("/system")
    assert conversation.messages == [HI]


def test_what_is_saved_can_be_read_again(tmp_path):
    path = tmp_path / "messages.json"
    said = Conversation([SYSTEM, HI | {"content": "Grüße"}]).command(f"/save {path}")
    assert said == f"2 messages are in {path}"
    assert read_messages(path) == [SYSTEM, HI | {"content": "Grüße"}]
    assert "Grüße" in path.read_text(encoding="utf-8")


def test_help_lists_every_command():
    assert [line.split("  ")[0] for line in Conversation().command("/help").splitlines()] == list(COMMANDS)


@pytest.mark.parametrize("line", ["/", "/neu", "/new x", "/save", "/exit now"])
def test_what_is_no_command_is_told(line):
    with pytest.raises(RequestError, match=f"'{line}' is no command; there are /new, /system TEXT"):
        Conversation([HI]).command(line)


def test_a_file_that_can_not_be_written_is_told(tmp_path):
    with pytest.raises(RequestError, match="can't be written"):
        Conversation([HI]).command(f"/save {tmp_path}")


@pytest.mark.parametrize("content", ["{", "3", '[{"role": "user"}]', '[{"role": "user", "content": null}]', '["Hi"]'])
def test_a_file_that_holds_no_messages_is_refused(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(RequestError, match=r"a.json holds no messages \(.*\); name a file that /save wrote"):
        read_messages(tmp_path / "a.json")


def test_messages_of_other_kinds_are_json(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([HI | {"name": "Ada"}]))
    assert read_messages(tmp_path / "a.json") == [HI | {"name": "Ada"}]


def typing(monkeypatch, *events):
    """Has `input` give these, or raise them; the prompts that it showed."""
    prompts, left = [], list(events)

    def read(prompt=""):
        prompts.append(prompt)
        event = left.pop(0) if left else EOFError()
        if isinstance(event, str):
            return event
        raise event

    monkeypatch.setattr(builtins, "input", read)
    return prompts


def test_a_line_that_ends_with_a_backslash_goes_on_in_the_next(monkeypatch):
    prompts = typing(monkeypatch, "one", "", "a \\", "b\\", "c", "  ")
    assert list(typed(people=True)) == ["one", "a \nb\nc"]
    assert prompts == ["> ", "> ", "> ", "… ", "… ", "> ", "> "]


def test_ctrl_c_gives_up_what_was_typed_and_ends_a_pipe(monkeypatch):
    typing(monkeypatch, "a\\", KeyboardInterrupt(), "b")
    assert list(typed(people=True)) == ["b"]
    typing(monkeypatch, KeyboardInterrupt(), "b")
    with pytest.raises(KeyboardInterrupt):
        list(typed(people=False))


def test_a_pipe_is_given_no_prompts(monkeypatch):
    prompts = typing(monkeypatch, "a\\", "b")
    assert (list(typed(people=False)), set(prompts)) == (["a\nb"], {""})
