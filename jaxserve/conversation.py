"""A conversation: its messages, the commands that change them, and answers as they come."""

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from jaxserve.parallel.errors import JaxserveError, RequestError

Message = Mapping[str, Any]


class Piece(NamedTuple):
    """What came of an answer."""

    text: str
    thoughts: str = ""  # that came before it; no part of the answer
    cut: bool = False  # it ends here for want of tokens


Speak = Callable[[Sequence[Message]], Generator[Piece, None, None]]
"""Answers messages, piece by piece, until it is closed."""

COMMANDS = {
    "/new": "start again; what the system says stays",
    "/system TEXT": "say how to answer; without a text, nothing",
    "/save FILE": "write the messages to a file, as JSON",
    "/help": "show this",
    "/exit": "end; Ctrl-D does too",
}


class Conversation:
    """What was said so far."""

    def __init__(self, messages: Sequence[Message] = ()):
        self.messages = [dict(message) for message in messages]

    def ask(self, text: str, speak: Speak) -> Generator[Piece, None, None]:
        """Yields the answer. Of one that is stopped, what came stays; a question that can't be answered goes."""
        asked, said, failed = [*self.messages, {"role": "user", "content": text}], [], False
        try:
            with closing(speak(asked)) as pieces:
                for piece in pieces:
                    said.append(piece.text)
                    yield piece
        except JaxserveError:
            failed = True
            raise
        finally:
            if not failed:
                self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]

    def command(self, line: str) -> str:
        """Does what a line like `/system Be brief.` says, and tells what it did. RequestError for what is none."""
        name, _, rest = line.partition(" ")
        if name == "/new" and not rest:
            self.messages = [message for message in self.messages if message["role"] == "system"]
            return "started again"
        if name == "/system":
            return self._system(rest.strip())
        if name == "/save" and rest.strip():
            return self._save(Path(rest.strip()).expanduser())
        if name == "/help" and not rest:
            return "\n".join(f"{usage:14}{meaning}" for usage, meaning in COMMANDS.items())
        raise RequestError(f"{line!r} is no command; there are {', '.join(COMMANDS)}. Text may begin with a space")

    def _system(self, text: str) -> str:
        self.messages = [message for message in self.messages if message["role"] != "system"]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})
        return "the system says so from now on" if text else "the system says nothing"

    def _save(self, path: Path) -> str:
        try:
            path.write_text(json.dumps(self.messages, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise RequestError(f"{path} can't be written: {error}") from None
        return f"{len(self.messages)} messages are in {path}"


def read_messages(path: Path) -> list[Message]:
    """What `/save` wrote; RequestError if it is something else."""
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(message["role"], str) and isinstance(message["content"], str) for message in messages):
            return messages
        reason = "a role or content is no text"
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise RequestError(f"{path} holds no messages ({reason}); name a file that /save wrote")


def typed(people: bool) -> Iterator[str]:
    """The lines of standard input, with prompts for people. One that ends with a backslash goes on in the next."""
    read = input if people else lambda prompt: input()
    while True:
        try:
            line = read("> ")
            while line.endswith("\\"):
                line = line[:-1] + "\n" + read("… ")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not people:
                raise
            print()  # the line is given up, as in a shell
            continue
        if line.strip():
            yield line
