"""The tokenizer's face: what it encodes it decodes, and what it cannot do it says, with the remedy."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from quire.engine.tokenizer import load_tokenizer
from quire.kernels.errors import InvalidConfigError, InvalidRequestError
from tests.engine.small_tokenizers import (
    CHAT_TEMPLATE,
    TEXT,
    byte_fallback,
    byte_fallback_backend,
    byte_level,
    byte_level_backend,
    save,
    saved_and_loaded,
    wrapped,
)

BACKENDS = {"byte_level": byte_level_backend, "byte_fallback": byte_fallback_backend}
both_tokenizers = pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()], ids=BACKENDS)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    return saved_and_loaded(byte_level_backend(), tmp_path_factory.mktemp("chat"), CHAT_TEMPLATE)


@both_tokenizers
@given(text=st.text(max_size=30))
def test_decoding_what_was_encoded_gives_the_text(tokenizer, text):
    text = text.replace("▁", "")  # SentencePiece's own sign for a space
    for special in ("<s>", "</s>", "<unk>"):
        text = text.replace(special, "")
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("make", BACKENDS.values(), ids=BACKENDS)
def test_a_tokenizer_read_from_a_folder_is_the_one_that_was_saved(make, tmp_path):
    backend = make()
    tokenizer = saved_and_loaded(backend, tmp_path)
    assert tokenizer.encode(TEXT, add_special_tokens=False) == backend.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.eos_token_id == backend.token_to_id("</s>")
    assert tokenizer.vocab_size == backend.get_vocab_size()
    assert tokenizer.all_special_ids == {backend.token_to_id(t) for t in ("<unk>", "<s>", "</s>")} - {None}
    assert tokenizer.all_special_ids <= tokenizer.added_token_ids


def test_the_vocabulary_size_is_one_more_than_the_largest_id():
    backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1, "a": 9}, unk_token="<s>"))
    assert wrapped(backend).vocab_size == 10


@both_tokenizers
@pytest.mark.parametrize("text", ["half \ud83d", None, 3, b"hello"])
def test_what_is_no_unicode_text_is_refused(tokenizer, text):
    with pytest.raises(InvalidRequestError) as caught:
        tokenizer.encode(text)
    assert caught.value.parameter == "prompt"


def test_truncation_and_padding_of_the_training_do_not_apply_to_prompts(tmp_path):
    backend = byte_level_backend()
    expected = backend.encode(TEXT).ids
    backend.enable_truncation(4)
    backend.enable_padding(length=500)
    assert saved_and_loaded(backend, tmp_path).encode(TEXT) == expected


@both_tokenizers
def test_special_tokens_are_decoded_only_when_asked_for(tokenizer):
    token_ids = tokenizer.encode("<s>hello</s>", add_special_tokens=False)
    assert tokenizer.decode(token_ids, skip_special_tokens=True).strip() == "hello"
    assert "</s>" in tokenizer.decode(token_ids, skip_special_tokens=False)


@both_tokenizers
def test_token_texts_join_to_the_text_where_no_token_splits_a_character(tokenizer):
    text = "hello there world"
    joined = "".join(tokenizer.token_text(token_id) for token_id in tokenizer.encode(text, add_special_tokens=False))
    assert joined.removeprefix(" ") == text


def test_the_text_of_a_token_keeps_its_space_and_shows_part_of_a_character_as_a_replacement():
    tokenizer = byte_fallback()
    assert tokenizer.token_text(tokenizer.encode("w", add_special_tokens=False)[0]) == " w"
    assert tokenizer.token_text(tokenizer.encode("한", add_special_tokens=False)[-1]) == "\ufffd"
    assert tokenizer.token_text(tokenizer.eos_token_id) == "</s>"
    assert tokenizer.token_text(10**6) == tokenizer.token_text(tokenizer.vocab_size) == ""


@both_tokenizers
def test_an_id_outside_the_vocabulary_has_no_token(tokenizer):
    assert tokenizer.id_to_token(tokenizer.vocab_size - 1) is not None
    assert tokenizer.id_to_token(tokenizer.vocab_size) is None
    assert tokenizer.id_to_token(-1) is None


def test_a_conversation_becomes_the_tokens_of_its_template(chat_tokenizer):
    messages = [{"role": "system", "content": "be kind"}, *HELLO]
    expected = "<s>system: be kind</s><s>user: hello</s>"
    assert chat_tokenizer.has_chat_template
    for add_generation_prompt, end in ((True, "<s>assistant:"), (False, "")):
        token_ids = chat_tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
        assert token_ids == chat_tokenizer.encode(expected + end, add_special_tokens=False)
        assert chat_tokenizer.eos_token_id in token_ids


def test_text_parts_are_joined_with_newlines(chat_tokenizer):
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]
    joined = chat_tokenizer.apply_chat_template([{"role": "user", "content": "hello\nworld"}])
    assert chat_tokenizer.apply_chat_template([{"role": "user", "content": parts}]) == joined


def test_a_template_given_with_the_call_is_used(chat_tokenizer):
    for tokenizer in (chat_tokenizer, byte_level()):
        token_ids = tokenizer.apply_chat_template(HELLO, chat_template="{{ messages[0]['content'] + name }}", name="!")
        assert tokenizer.decode(token_ids) == "hello!"


def test_a_model_without_a_chat_template_says_what_to_do():
    with pytest.raises(InvalidRequestError, match=r"no chat template.*Pass chat_template") as caught:
        byte_level().apply_chat_template(HELLO)
    assert caught.value.parameter == "messages"


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ("hello", "must be a list"),
        ([], "at least one"),
        (None, "must be a list"),
        (["hello"], r"messages\[0\]"),
        ([*HELLO, {"content": "hello"}], r"messages\[1\].*'role'"),
        ([{"role": 3, "content": "hello"}], "'role'"),
        ([{"role": "", "content": "hello"}], "'role'"),
        ([{"role": "user"}], "no 'content'"),
        ([{"role": "user", "content": None}], "no 'content'"),
        ([{"role": "user", "content": 3}], "string or a list of text parts, got 3"),
        ([{"role": "user", "content": ["hello"]}], "only text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x" * 200}]}], "only text"),
        ([{"role": "nobody", "content": "hello"}], "template refused.*unknown role nobody"),
    ],
)
def test_malformed_messages_are_refused_with_their_position(chat_tokenizer, messages, complaint):
    with pytest.raises(InvalidRequestError, match=complaint) as caught:
        chat_tokenizer.apply_chat_template(messages)
    assert caught.value.parameter == "messages"
    assert len(str(caught.value)) < 400


def test_a_message_of_tool_calls_needs_no_content(chat_tokenizer):
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    assert chat_tokenizer.apply_chat_template(messages)


def test_a_folder_without_a_tokenizer_is_refused_with_the_files_it_needs(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InvalidConfigError, match=r"no tokenizer in .*tokenizer\.json"):
            load_tokenizer(folder)


@pytest.mark.parametrize("content", ["", '{"broken":', "{}", '{"version": "1.0", "model": {"type": "NoSuchModel"}}'])
def test_a_broken_tokenizer_file_is_refused_with_its_folder(tmp_path, content):
    save(byte_level_backend(), tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InvalidConfigError, match="cannot be read") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
