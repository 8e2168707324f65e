import functools
import itertools
import json
import threading
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxserve.parallel.errors import CheckpointError, RequestError
from jaxserve.tokenizer import Tokenizer

TEXT = "The cat sat on the mat. Größe über alles: 你好，世界！ 今日は 👩‍🚀 👨‍👩‍👧 🇩🇪 👍🏽 नमस्ते e\u0301 the the cat"
SPECIAL = ["<s>", "</s>"]


def byte_level() -> tokenizers.Tokenizer:
    """Like GPT-2, Qwen and DeepSeek; of `<｜a b｜>` not all, of `<é>` all characters are also spellings of a byte."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "<｜a b｜>", "<é>")])
    return backend


def pieces(decoder: decoders.Decoder) -> tokenizers.Tokenizer:
    """Like SentencePiece with byte fallback; `<0x+A>` is what its reader takes for a byte, `<0xZZ>` is not."""
    tokens = [
        *SPECIAL,
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        *sorted(set("The cat saton世界é")),
        "▁▁",
        "▁t",
        "x▁",
    ]
    tokens += ["�", "<0x+A>", "<0xZZ>", "<0xe4>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<s>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoder
    backend.add_special_tokens(SPECIAL)
    return backend


LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
BACKENDS = {
    "byte level": byte_level(),
    "byte level in a sequence": byte_level(),
    "llama": pieces(decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)])),
    "two spaces stripped": pieces(decoders.Sequence([*LLAMA, decoders.Strip(" ", 2, 0)])),
    "gemma": pieces(decoders.Sequence(LLAMA)),
    "metaspace": pieces(decoders.Metaspace()),
    "metaspace without prefix": pieces(decoders.Metaspace(prepend_scheme="never")),
    "metaspace after bytes": pieces(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
}
BACKENDS["byte level in a sequence"].decoder = decoders.Sequence([decoders.ByteLevel()])
TOKENIZERS = {name: Tokenizer(backend) for name, backend in BACKENDS.items()}
BYTE_LEVEL, LLAMA_LIKE = TOKENIZERS["byte level"], TOKENIZERS["llama"]
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


@functools.cache
def vocabulary(tokenizer: Tokenizer) -> dict[str | None, int]:
    return {tokenizer.id_to_token(i): i for i in range(tokenizer.vocab_size)}


def ids_of(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    return [vocabulary(tokenizer)[token] for token in tokens]


def streamed(tokenizer: Tokenizer, pushes: list[list[int]], skip: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens=skip)
    return [*(stream.push(ids) for ids in pushes), stream.finish()]


# -- streams --


@every_tokenizer
@given(data=st.data(), skip=st.booleans())
def test_a_stream_of_any_ids_in_any_pieces_is_their_decoding(tokenizer, data, skip):
    id = st.integers(0, tokenizer.vocab_size + 1)  # ids without a token too
    pushes = data.draw(st.lists(st.lists(id, max_size=6), max_size=12))
    assert "".join(streamed(tokenizer, pushes, skip)) == tokenizer.decode(sum(pushes, []), skip)


CHARACTERS = [list("ðŁĳ©"), list("ðŁĳ"), ["Ġ"], list("âĤ¬"), ["â"], ["<s>"], ["a"], ["<think>"], ["<é>"], ["<｜a b｜>"]]
BYTES = [[f"<0x{byte:02X}>" for byte in text] for text in ("👩".encode(), b"\xf0\x9f", b"\xff", "▁".encode(), b" ")]
PIECES = [*BYTES, ["▁"], ["▁▁"], ["▁t"], ["<s>"], ["c"], ["�"], ["<0x+A>"], ["<0xZZ>"]]


@every_tokenizer
@given(data=st.data())
def test_a_stream_with_many_bytes_and_spaces_is_its_decoding(tokenizer, data):
    """Characters whole, cut and spoiled, beside spaces and special tokens: what random ids rarely are."""
    snippets = CHARACTERS if "Ġ" in vocabulary(tokenizer) else PIECES
    ids = ids_of(tokenizer, *sum(data.draw(st.lists(st.sampled_from(snippets), max_size=8)), []))
    assert "".join(streamed(tokenizer, [[i] for i in ids])) == tokenizer.decode(ids)


@every_tokenizer
@given(text=st.text(alphabet=st.one_of(st.sampled_from(TEXT), st.characters(exclude_categories=["Cs"]))))
@example(text="👩‍🚀👨‍👩‍👧🇩🇪👍🏽 e\u0301")
@example(text="  two leading spaces")
def test_a_text_streams_one_id_at_a_time(tokenizer, text):
    ids = tokenizer.encode(text)
    parts = streamed(tokenizer, [[i] for i in ids], skip=False)
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=False)
    assert "�" in text or all("�" not in part for part in parts)


def test_every_malformed_utf8_streams_as_it_decodes():
    """Three bytes, or F0 or F4 and three, that are each the least, the greatest or a special one of their kind."""
    kinds = bytes.fromhex("41 80 8f 90 9f a0 bf c1 c2 e0 e1 ed f0 f4 f5")
    beyond_latin = map(chr, range(256, 512))  # how GPT-2 spells bytes that can't be printed
    spelling = [chr(b) if chr(b).isprintable() and b != 32 else next(beyond_latin) for b in range(256)]
    threes = [bytes(three) for three in itertools.product(kinds, repeat=3)]
    text = b"-".join([*threes, *(b"\xf0" + three for three in threes), *(b"\xf4" + three for three in threes)])
    ids = ids_of(BYTE_LEVEL, *(spelling[byte] for byte in text))
    assert BYTE_LEVEL.decode(ids) == text.decode(errors="replace")
    assert "".join(streamed(BYTE_LEVEL, [[i] for i in ids])) == text.decode(errors="replace")


@given(ids=st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=20))
@example(ids=ids_of(BYTE_LEVEL, "í", "¡"))  # the first two bytes of a surrogate
def test_a_byte_level_stream_holds_back_nothing_but_an_unfinished_character(ids):
    stream, given_out = BYTE_LEVEL.stream(), ""
    for n, id in enumerate(ids, 1):
        given_out += stream.push([id])
        assert BYTE_LEVEL.decode(ids[:n]).removeprefix(given_out) in ("", "�")


@given(ids=st.lists(st.integers(0, LLAMA_LIKE.vocab_size - 1), max_size=20))
def test_a_piece_stream_holds_back_nothing_but_the_bytes_at_the_end(ids):
    stream, given_out = LLAMA_LIKE.stream(), ""
    for n, id in enumerate(ids, 1):
        given_out += stream.push([id])
        if not (LLAMA_LIKE.id_to_token(id) or "").startswith("<"):
            assert given_out == LLAMA_LIKE.decode(ids[:n])


def test_the_parts_of_a_token_that_ends_within_a_character_come_at_once():
    ids = [BYTE_LEVEL.encode("a")[0], *ids_of(BYTE_LEVEL, "â", "Ĥ", "¬", "b")]  # a, the three bytes of €, b
    assert streamed(BYTE_LEVEL, [[i] for i in ids]) == ["a", "", "", "€", "b", ""]


def test_a_character_cut_by_the_end_is_the_replacement_character():
    assert streamed(BYTE_LEVEL, [ids_of(BYTE_LEVEL, "â", "Ĥ")]) == ["", "�"]
    assert streamed(LLAMA_LIKE, [ids_of(LLAMA_LIKE, "<0xE2>", "<0x82>")]) == ["", "��"]


def test_one_bad_byte_spoils_its_run_so_the_run_waits():
    ids = ids_of(LLAMA_LIKE, "c", "<0xC3>", "<0xA9>", "<0xFF>", "a", "<0xC3>", "<0xA9>", "t")
    assert streamed(LLAMA_LIKE, [[i] for i in ids]) == ["c", "", "", "", "���a", "", "", "ét", ""]


def test_only_the_first_space_of_all_is_lost():
    ids = ids_of(LLAMA_LIKE, "<s>", "▁", "▁t", "▁t")
    assert streamed(LLAMA_LIKE, [[i] for i in ids]) == ["", "", " t", " t", ""]


def test_special_tokens_are_skipped_or_shown():
    ids = ids_of(BYTE_LEVEL, "<s>", "a", "<think>", "</s>")
    assert "".join(streamed(BYTE_LEVEL, [ids])) == "a<think>"
    assert "".join(streamed(BYTE_LEVEL, [ids], skip=False)) == "<s>a<think></s>"


def test_the_texts_that_are_a_token_wherever_they_stand_are_known():
    tokenizer = Tokenizer(byte_level())
    assert tokenizer.special == set(SPECIAL)
    assert tokenizer.added == {*SPECIAL, "<think>", "<｜a b｜>", "<é>"}


def test_streams_of_one_tokenizer_do_not_know_each_other():
    a, b = BYTE_LEVEL.stream(), BYTE_LEVEL.stream()
    first, *rest = ids_of(BYTE_LEVEL, "â", "Ĥ", "¬")
    assert (a.push([first]), b.push(rest), a.push(rest)) == ("", "��", "€")


# -- tokens and text --


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_the_ids_of_a_text_decode_to_it(text):
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text)) == text


def test_an_id_without_a_token_is_nothing():
    id = BYTE_LEVEL.vocab_size + 5
    assert (BYTE_LEVEL.id_to_token(id), BYTE_LEVEL.decode([id])) == (None, "")


def test_the_vocabulary_size_counts_the_gaps():
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 7}, []))
    backend.decoder = decoders.ByteLevel()
    assert Tokenizer(backend).vocab_size == 8


def test_text_that_is_no_unicode_is_refused():
    with pytest.raises(RequestError, match="half of a surrogate pair"):
        BYTE_LEVEL.encode("a\ud800")


def test_ids_that_cannot_be_are_refused():
    with pytest.raises(RequestError, match=f"from 0 to {BYTE_LEVEL.vocab_size - 1}; got -1 to 3"):
        BYTE_LEVEL.decode([3, -1])


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (None, "no kind"),
        (decoders.WordPiece(), "WordPiece"),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]), r"Fuse \+ Replace"),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]), r"Fuse \+ Strip"),
        (decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]), r"ByteLevel \+ Fuse"),
    ],
)
def test_a_decoder_that_looks_ahead_is_refused(decoder, named):
    backend = byte_level()
    backend.decoder = decoder
    with pytest.raises(
        CheckpointError, match=f"a decoder of {named}, which is not supported; supported: ByteLevel, or"
    ):
        Tokenizer(backend)


# -- folders --


def write(folder: Path, backend: tokenizers.Tokenizer | None = None, **files: object) -> Path:
    """A model folder of `tokenizer.json` and `NAME.json` for each of `files`."""
    (backend or byte_level()).save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def with_template(single: str) -> tokenizers.Tokenizer:
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    return backend


def test_a_tokenizer_json_is_enough(tmp_path):
    tokenizer = Tokenizer.from_folder(write(tmp_path))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.chat_templates) == (None, (), {})


def test_special_tokens_are_strings_or_objects_and_the_config_wins(tmp_path):
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}
    others = {"eos_token": "<think>", "unk_token": "<think>"}
    tokenizer = Tokenizer.from_folder(write(tmp_path, tokenizer_config=config, special_tokens_map=others))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (1,))
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<think>"}


@pytest.mark.parametrize(("said", "ids"), [(5, (5, 1)), ([7, 1, 5, 7], (7, 1, 5)), (None, (1,))])
def test_ends_are_those_of_generation_and_of_the_tokenizer_once_each(tmp_path, said, ids):
    folder = write(tmp_path, tokenizer_config={"eos_token": "</s>"}, generation_config={"eos_token_id": said})
    assert Tokenizer.from_folder(folder).eos_ids == ids


@pytest.mark.parametrize("single", [None, "$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("add", [True, False, None])
def test_a_text_opens_with_bos_once_if_either_file_asks_for_it(tmp_path, single, add):
    backend = with_template(single) if single else byte_level()
    config = {"bos_token": "<s>", "add_bos_token": add}
    tokenizer = Tokenizer.from_folder(write(tmp_path, backend, tokenizer_config=config))
    plain = byte_level().encode("the cat").ids
    tail = [1] if single and single.endswith("</s>") else []
    assert tokenizer.encode("the cat") == [0] * bool(add or (single and "<s>" in single)) + plain + tail
    assert tokenizer.encode("the cat", add_special_tokens=False) == plain


def test_prompts_are_neither_cut_nor_padded(tmp_path):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=100)
    tokenizer = Tokenizer.from_folder(write(tmp_path, backend))
    assert tokenizer.encode(TEXT) == byte_level().encode(TEXT).ids


def test_a_chat_has_the_bos_its_template_writes_and_no_other(tmp_path):
    template = "{{ bos_token }}{{ messages[0].content }}{% if add_generation_prompt %}<think>{% endif %}{{ x }}"
    config = {"bos_token": "<s>", "add_bos_token": True, "chat_template": template}
    tokenizer = Tokenizer.from_folder(write(tmp_path, with_template("<s> $A"), tokenizer_config=config))
    messages = [{"role": "user", "content": "the cat"}]
    think, cat = ids_of(tokenizer, "<think>"), tokenizer.encode("the cat", add_special_tokens=False)
    assert tokenizer.apply_chat_template(messages) == [0, *cat, *think]
    own = {"x": "</s>"}
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False, chat_template_kwargs=own)
    assert ids == [0, *cat, 1]


def test_a_chat_may_go_on_with_its_last_message(tmp_path):
    config = {"chat_template": "{% for m in messages %}{{ m.content }}</s>{% endfor %}"}
    tokenizer = Tokenizer.from_folder(write(tmp_path, tokenizer_config=config))
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False, continue_final_message=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the</s>cat"


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    template = {"chat_template": "{{ template }}{{ messages[0].content }}"}
    return Tokenizer.from_folder(write(tmp_path_factory.mktemp("chatty"), tokenizer_config=template))


def test_a_misspelt_option_of_a_chat_is_no_variable_of_its_template(chatty):
    with pytest.raises(TypeError, match="add_generation_promt"):
        chatty.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_promt=False)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"tools": []}, "has 'tools', which is an option of its own"),
        ({"x": 1, "messages": []}, "has 'messages', which is an option of its own"),
        ("thinking", "must be a dict of the template's variables; got 'thinking'"),
        ({1: 2}, "must be a dict of the template's variables"),
    ],
)
def test_variables_of_a_template_are_a_dict_without_the_names_of_options(chatty, said, message):
    with pytest.raises(RequestError, match=f"chat_template_kwargs {message}"):
        chatty.apply_chat_template([{"role": "user", "content": "hi"}], chat_template_kwargs=said)


def test_a_variable_of_a_template_may_have_any_other_name(chatty):
    ids = chatty.apply_chat_template([{"role": "user", "content": "cat"}], chat_template_kwargs={"template": "the "})
    assert chatty.decode(ids) == "the cat"


def test_a_model_without_a_template_refuses_chats(tmp_path):
    with pytest.raises(RequestError, match="no default chat template"):
        Tokenizer.from_folder(write(tmp_path)).apply_chat_template([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (None, "no tokenizer.json, the only form of tokenizer that is supported$"),
        ("tiktoken.model", "it has tiktoken.model: transformers.*TikTokenConverter"),
        ("tokenizer.model", "it has tokenizer.model: transformers.*save_pretrained"),
        ("vocab.json", "it has vocab.json: transformers.*save_pretrained"),
    ],
)
def test_a_folder_without_tokenizer_json_is_told_how_to_get_one(tmp_path, file, said):
    if file:
        (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=said):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"type": "Unknown"}}'])
def test_a_damaged_tokenizer_json_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="tokenizer.json is not a tokenizer .*fetch it again"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(("content", "said"), [("{", "is not JSON"), ("[]", "holds a list, not an object")])
def test_a_damaged_settings_file_is_named(tmp_path, name, content, said):
    write(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{name} {said}"):
        Tokenizer.from_folder(tmp_path)


def test_a_named_token_that_the_vocabulary_lacks_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="names '<eot>' as eos_token, but tokenizer.json has no such token"):
        Tokenizer.from_folder(write(tmp_path, tokenizer_config={"eos_token": "<eot>"}))


@pytest.mark.parametrize("kind", ["text", "ids"])
def test_other_threads_go_on_while_much_is_encoded_or_decoded(kind):
    tokenizer, over, turns = Tokenizer(byte_level()), threading.Event(), 0

    def work():
        if kind == "text":
            tokenizer.encode("a" * 2_000_000)
        else:
            tokenizer.decode([5] * 2_000_000)
        over.set()

    worker = threading.Thread(target=work)
    worker.start()
    while not over.wait(0.001):
        turns += 1
    worker.join()
    assert turns > 10
