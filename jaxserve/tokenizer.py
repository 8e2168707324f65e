"""Text to token ids and back, as a checkpoint's `tokenizer.json` says; back also piece by piece, while ids come in."""

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxserve.chat import choose_template, read_templates, render_chat
from jaxserve.parallel.errors import CheckpointError, RequestError


class Tokenizer:
    """A checkpoint's tokenizer. Immutable, so threads may share it; a `TextStream` belongs to one request.

    vocab_size: one more than the largest id. A model's embedding may have more rows; their ids decode to nothing.
    bos_id, eos_ids: the token that opens a text, if there is one, and those that end what a model says.
    added, special: the texts that are a token wherever they stand, and those of them that `skip_special_tokens` skips.
    special_tokens: by name, as chat templates use them: `{"bos_token": "<s>", …}`.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        eos_ids: Sequence[int] = (),
        add_bos: bool = False,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        """Takes `backend` over. `add_bos`: encoded text opens with `bos_token` even if `tokenizer.json` adds none.

        Raises CheckpointError if a named token is not in the vocabulary, or ids can't be decoded one after another.
        """
        backend.no_truncation()  # a tokenizer.json saved after training may cut or pad every prompt
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1
        self.bos_id = self._named("bos_token")
        eos_id = self._named("eos_token")
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*eos_ids, *([] if eos_id is None else [eos_id])]))
        added = backend.get_added_tokens_decoder().values()
        self.added = frozenset(token.content for token in added)
        self.special = frozenset(token.content for token in added if token.special)
        self._prepends_bos = add_bos and self.bos_id is not None and backend.encode("").ids[:1] != [self.bos_id]
        self._decoder = backend.decoder
        self._decoder_kinds = _checked_kinds(self._decoder)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Reads `tokenizer.json` and, where they exist, the files of settings and chat templates beside it.

        Raises CheckpointError that names the file.
        """
        backend = _read_backend(folder)
        config = _read_json(folder / "tokenizer_config.json")
        eos = _read_json(folder / "generation_config.json").get("eos_token_id")
        return cls(
            backend,
            special_tokens=_contents(_read_json(folder / "special_tokens_map.json") | config),
            eos_ids=eos if isinstance(eos, list) else [] if eos is None else [eos],
            add_bos=bool(config.get("add_bos_token")),
            chat_templates=read_templates(folder, config),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. Where it has the name of a special token, that token stands, whoever wrote it."""
        # As a batch: for one text the library holds Python's lock, and a long text would stop all other threads.
        try:
            (found,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError:  # how the library says that a str is not valid Unicode
            raise RequestError("the text has half of a surrogate pair, which no UTF-8 can hold; remove it") from None
        ids = found.ids
        return [self.bos_id, *ids] if add_special_tokens and self._prepends_bos and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, ids without a token become nothing."""
        try:
            return self._backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0]  # see `encode`
        except OverflowError:
            raise RequestError(
                f"token ids must be from 0 to {self.vocab_size - 1}; got {min(ids)} to {max(ids)}"
            ) from None

    def apply_chat_template(
        self,
        messages: Any,
        *,
        tools: Any = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids of the prompt that the chat template makes; see `render_chat`. BOS is there if the template writes it.

        `chat_template_kwargs` are the template's own variables, such as `enable_thinking`.
        """
        text = render_chat(
            choose_template(self.chat_templates, tools),
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **self.special_tokens | _own_variables(chat_template_kwargs),
        )
        return self.encode(text, add_special_tokens=False)

    def id_to_token(self, id: int) -> str | None:
        """The vocabulary's spelling of a token (`Ġthe`, `▁the`, `<0x0A>`); None if there is none."""
        return self._backend.id_to_token(id)

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 of a token, of which several may make a character; nothing if there is no such token."""
        token = self.id_to_token(id) or ""
        if "ByteLevel" in self._decoder_kinds:
            return _bytes(token)
        if _BYTE.fullmatch(token):
            return bytes([int(token[3:5].replace("+", "0"), 16)])
        return _continue(self._decoder, [token]).encode()

    def to_json(self) -> str:
        """The content of a `tokenizer.json`, for libraries that read one."""
        return self._backend.to_str()

    def stream(self, skip_special_tokens: bool = True) -> "TextStream":
        """For one request: its text while its ids come in."""
        return TextStream(self, skip_special_tokens)

    def _named(self, name: str) -> int | None:
        content = self.special_tokens.get(name)
        if content is None:
            return None
        id = self._backend.token_to_id(content)
        if id is None:
            raise CheckpointError(
                f"tokenizer_config.json names {content!r} as {name}, but tokenizer.json has no such token; "
                "they are not of the same model, fetch both again"
            )
        return id


def _own_variables(said: Any) -> dict[str, Any]:
    """`chat_template_kwargs`, without which there are none; RequestError if it names what has an option."""
    if not isinstance(said, Mapping | None) or not all(isinstance(name, str) for name in said or ()):
        raise RequestError(f"chat_template_kwargs must be a dict of the template's variables; got {said!r}")
    options = {"messages", "tools", "add_generation_prompt", "continue_final_message"}
    if taken := sorted(options.intersection(said or ())):
        raise RequestError(f"chat_template_kwargs has {taken[0]!r}, which is an option of its own; give it as that")
    return dict(said or {})


class TextStream:
    """The text of ids that come in pieces. All that `push` and `finish` return, joined, is `decode` of all the ids.

    What is returned is final. Held back is only what later ids may change: of byte-level tokens, the up to three bytes
    of a character's beginning; of SentencePiece's, the byte tokens at the end, for one bad byte spoils its whole run
    (`<0xE2><0x82>…`, an emoji or two). Work is linear in the ids, whatever they are.
    """

    # Not tokenizers' DecodeStream (0.23): it decodes again and again whatever ends in U+FFFD, never gives that at the
    # end, and with byte fallback emits characters that a bad byte after them spoils, after which it fails.

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._token = tokenizer.id_to_token
        self._skipped = tokenizer.special if skip_special_tokens else frozenset()
        self._text = _ByteText() if "ByteLevel" in tokenizer._decoder_kinds else _PieceText(tokenizer._decoder)

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` make final, possibly none."""
        tokens = (self._token(id) for id in ids)
        return self._text.push([token for token in tokens if token is not None and token not in self._skipped])

    def finish(self) -> str:
        """The text still held back; a character that was never completed is U+FFFD. Nothing may be pushed after."""
        return self._text.finish()


class _ByteText:
    """Byte-level tokens (GPT-2's): each is bytes, whatever its neighbours are."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: list[str]) -> str:
        text = self._utf8.decode(b"".join(map(_bytes, tokens)))
        held, _ = self._utf8.getstate()
        if held[:1] == b"\xed" and held[1:] >= b"\xa0":  # no character begins so, yet Python waits for a third byte
            text += self.finish()
        return text

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _PieceText:
    """SentencePiece's tokens: pieces of text, of which the first may lose a space, and runs of single bytes."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._held: list[str] = []
        self._settled = 0  # of the held tokens, those that no byte can join any more
        self._begun = False

    def push(self, tokens: list[str]) -> str:
        for token in tokens:
            self._held.append(token)
            if not _BYTE.fullmatch(token):
                self._settled = len(self._held)
        return self._take(self._settled)

    def finish(self) -> str:
        return self._take(len(self._held))

    def _take(self, count: int) -> str:
        tokens = self._held[:count]
        text = _continue(self._decoder, tokens) if self._begun else self._decoder.decode(tokens)
        if text or self._begun:  # before there is text, the next token may still be the one that loses its space
            self._begun, self._settled = True, 0
            del self._held[:count]
        return text


def _continue(decoder: Any, tokens: list[str]) -> str:
    """The text of `tokens` that follow others."""
    return decoder.decode(["x", *tokens])[1:]


_BYTE = re.compile("<0x[0-9A-Fa-f+][0-9A-Fa-f]>")
"""A byte token, as the library reads it: `<0x+A>` is one."""


def _byte_characters() -> dict[str, int]:
    """GPT-2's spelling of the bytes: each as itself if that is printable in Latin-1, else as one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTE_OF = _byte_characters()


def _bytes(token: str) -> bytes:
    """The bytes of a byte-level token; of an added token with other characters (`<｜end｜>`), its UTF-8."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


def _checked_kinds(decoder: Any) -> list[str]:
    """The kinds of a decoder's steps; CheckpointError if `TextStream` doesn't know them to work from left to right."""
    steps = _steps(json.loads(decoder.__getstate__())) if decoder else []
    kinds = [step["type"] for step in steps]
    pieces = {"Replace", "ByteFallback", "Strip", "Metaspace", "Fuse"}
    joined = steps[kinds.index("Fuse") :] if "Fuse" in kinds else []
    local = all(step["type"] == "Fuse" or step["type"] == "Strip" and not step["stop"] for step in joined)
    if kinds != ["ByteLevel"] and not (kinds and pieces.issuperset(kinds) and local and decoder.decode(["x"]) == "x"):
        raise CheckpointError(
            f"tokenizer.json has a decoder of {' + '.join(kinds) or 'no kind'}, which is not supported; supported: "
            f"ByteLevel, or {', '.join(sorted(pieces))} with nothing after Fuse but Strip at the start"
        )
    return kinds


def _steps(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for inner in spec["decoders"] for step in _steps(inner)] if spec["type"] == "Sequence" else [spec]


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        others = [name for name in _OTHER_FORMS if (folder / name).is_file()]
        raise CheckpointError(
            f"{folder} has no tokenizer.json, the only form of tokenizer that is supported"
            + "".join(f"; it has {name}: {_OTHER_FORMS[name]}" for name in others[:1])
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path} is not a tokenizer ({error}); fetch it again, or update tokenizers") from None


_CONVERT = "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes tokenizer.json"
_OTHER_FORMS = {
    "tiktoken.model": "transformers.convert_slow_tokenizer.TikTokenConverter makes a tokenizer.json of it, given the "
    "pattern in the folder's tokenization_*.py",
    "tokenizer.model": _CONVERT,
    "vocab.json": _CONVERT,
}


def _read_json(path: Path) -> dict[str, Any]:
    """The content of `path`, an object; an empty one if the file doesn't exist."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object; fetch it again")
    return content


def _contents(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that `settings` name, each written as a string or as `{"content": …}`."""
    named = {name: value for name, value in settings.items() if name.endswith("_token")}
    named = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: value for name, value in named.items() if isinstance(value, str)}
