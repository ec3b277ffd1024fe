"""Streamed text is the decoded text, whatever the chunks; stop strings are where `str.find` finds them."""

from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from quire.engine.detokenizer import IncrementalDetokenizer
from quire.engine.sampling_params import SamplingParams
from quire.engine.tokenizer import Tokenizer
from tests.engine.small_tokenizers import TEXT, byte_fallback, byte_level, wrapped

TOKENIZERS = {"byte_level": byte_level, "byte_fallback": byte_fallback}
both_tokenizers = pytest.mark.parametrize("tokenizer", [make() for make in TOKENIZERS.values()], ids=TOKENIZERS)
texts = st.text(st.sampled_from(sorted(set(TEXT)) + ["\ufffd", "é", "한", "𝄞", "\n"]), max_size=40)
cuts = st.lists(st.integers(0, 60), max_size=8)
FIRST_BYTE = 3  # the id of <0x00> in the byte-fallback tokenizer


def chunks(token_ids: list[int], cut_positions: list[int]) -> list[list[int]]:
    edges = sorted({0, len(token_ids), *(cut for cut in cut_positions if cut < len(token_ids))})
    return [token_ids[start:end] for start, end in pairwise(edges)]


def detokenizer(tokenizer: Tokenizer, prompt: list[int] = [], **params: object) -> IncrementalDetokenizer:  # noqa: B006
    return IncrementalDetokenizer(tokenizer, SamplingParams(**params), prompt)


def stream(
    detokenizer: IncrementalDetokenizer,
    token_ids: list[int],
    cut_positions: list[int] = [],  # noqa: B006
) -> tuple[list[str], int]:
    """The deltas, the one after `finish` last, and how many tokens were taken."""
    deltas, num_taken = [], 0
    for chunk in chunks(token_ids, cut_positions):
        num_chunk_taken = detokenizer.append(chunk)
        num_taken += num_chunk_taken
        deltas.append(detokenizer.delta())
        if detokenizer.stop_reason is not None:
            break
        assert num_chunk_taken == len(chunk)
    detokenizer.finish()
    return [*deltas, detokenizer.delta()], num_taken


def singly(token_ids: list[int]) -> list[int]:
    return list(range(len(token_ids)))


def decode_after(tokenizer: Tokenizer, prompt: list[int], token_ids: list[int], skip: bool = True) -> str:
    whole = tokenizer.decode(prompt + token_ids, skip_special_tokens=skip)
    return whole[len(tokenizer.decode(prompt, skip_special_tokens=skip)) :]


@given(st.lists(st.integers(0, byte_level().vocab_size + 2), max_size=60), texts, cuts, st.booleans())
def test_any_byte_level_tokens_stream_to_their_decoded_text(token_ids, prompt_text, cut_positions, skip):
    tokenizer = byte_level()
    prompt = tokenizer.encode(prompt_text)
    streamed = detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    deltas, num_taken = stream(streamed, token_ids, cut_positions)
    assert "".join(deltas) == streamed.text == decode_after(tokenizer, prompt, token_ids, skip)
    assert num_taken == len(token_ids)


def characters_or_pieces() -> st.SearchStrategy[list[int]]:
    """Ids of the byte-fallback tokenizer whose byte tokens make whole characters, special and unknown ids among them."""
    first_piece = FIRST_BYTE + 256
    pieces = st.integers(first_piece, byte_fallback().vocab_size + 2).map(lambda token_id: [token_id])
    special = st.sampled_from([[0], [1], [2]])
    characters = st.sampled_from(" é你🙂한a").map(lambda c: [FIRST_BYTE + byte for byte in c.encode()])
    return st.lists(pieces | characters | characters | special, max_size=25).map(
        lambda groups: [*chain.from_iterable(groups)]
    )


@given(characters_or_pieces(), texts, cuts, st.booleans())
def test_valid_byte_fallback_tokens_stream_to_their_decoded_text(token_ids, prompt_text, cut_positions, skip):
    tokenizer = byte_fallback()
    prompt = tokenizer.encode(prompt_text)
    streamed = detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    deltas, _ = stream(streamed, token_ids, cut_positions)
    assert "".join(deltas) == streamed.text == decode_after(tokenizer, prompt, token_ids, skip)


@both_tokenizers
@given(data=st.data())
def test_a_replacement_character_is_never_shown_for_text_that_is_valid_in_the_end(tokenizer, data):
    text = data.draw(texts).replace("\ufffd", "")
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    streamed = detokenizer(tokenizer, tokenizer.encode("hello"))
    deltas, _ = stream(streamed, token_ids, singly(token_ids))
    assert "\ufffd" not in "".join(deltas)
    assert deltas[-1] == ""
    assert all(text_so_far.isascii() or "\ufffd" not in text_so_far for text_so_far in deltas)
    assert "".join(deltas) == decode_after(tokenizer, tokenizer.encode("hello"), token_ids)


@both_tokenizers
def test_a_character_is_shown_with_the_token_that_completes_it(tokenizer):
    token_ids = tokenizer.encode("hello 한한", add_special_tokens=False)  # not in either vocabulary: three tokens each
    streamed = detokenizer(tokenizer)
    deltas, _ = stream(streamed, token_ids, singly(token_ids))
    assert deltas[-7:] == ["", "", "한", "", "", "한", ""]


@given(st.lists(st.integers(FIRST_BYTE + 0x80, byte_fallback().vocab_size - 1), max_size=60), cuts)
def test_invalid_byte_tokens_never_swallow_the_text_around_them(token_ids, cut_positions):
    tokenizer = byte_fallback()
    streamed = detokenizer(tokenizer)
    deltas, _ = stream(streamed, token_ids, cut_positions)

    def ascii_part(text: str) -> str:
        return "".join(character for character in text if character.isascii())

    assert "".join(deltas) == streamed.text
    assert ascii_part(streamed.text) == ascii_part(tokenizer.decode(token_ids))


def test_bytes_that_spoil_a_run_leave_the_characters_shown_before_it():
    tokenizer = byte_fallback()
    run = [FIRST_BYTE + byte for byte in "你".encode() + b"\xff"]
    streamed = detokenizer(tokenizer)
    deltas, _ = stream(streamed, [*run, *tokenizer.encode("o", add_special_tokens=False)], singly(run))
    assert "".join(deltas) == streamed.text == "你\ufffd o"


def test_bytes_left_over_leave_the_characters_shown_before_them():
    streamed = detokenizer(byte_fallback())
    run = [FIRST_BYTE + byte for byte in "你".encode() + b"\xe4"]
    deltas, _ = stream(streamed, run, singly(run))
    assert "".join(deltas) == streamed.text == "你\ufffd"


@both_tokenizers
def test_bytes_left_over_at_the_end_are_shown_as_the_decoder_shows_them(tokenizer):
    token_ids = tokenizer.encode("한", add_special_tokens=False)[:-1]
    streamed = detokenizer(tokenizer)
    assert streamed.append(token_ids) == len(token_ids)
    assert streamed.delta() == ""
    streamed.finish()
    assert streamed.delta() == tokenizer.decode(token_ids) != ""


def test_a_character_begun_by_the_prompt_is_shown_whole():
    for tokenizer in (byte_level(), byte_fallback()):
        *prompt, last = tokenizer.encode("hello 한", add_special_tokens=False)
        streamed = detokenizer(tokenizer, prompt)
        stream(streamed, [last])
        assert streamed.text == "한"


def test_the_space_before_the_first_word_follows_the_prompt():
    tokenizer = byte_fallback()
    world = tokenizer.encode("world", add_special_tokens=False)
    for prompt, expected in (("hello", " world"), ("", "world"), ("<s>", "world"), ("hello</s>", " world")):
        streamed = detokenizer(tokenizer, tokenizer.encode(prompt, add_special_tokens=False) if prompt else [])
        stream(streamed, world)
        assert streamed.text == expected, prompt


@pytest.mark.parametrize(
    "pattern",
    [b"\xe3\x83\xb3\xe3\x83", b"\xff", b"\xe4", b"\x80\x80\xe4\xbd", "你".encode(), b"a", "🙂".encode()],
    ids=["straddling", "invalid", "unfinished", "mixed", "wide", "ascii", "wider"],
)
@both_tokenizers
def test_the_window_stays_small_and_the_text_right_however_long_the_pattern_repeats(tokenizer, pattern):
    is_fallback = tokenizer is byte_fallback()
    first = FIRST_BYTE if is_fallback else 0
    alphabet = {tokenizer.id_to_token(i): i for i in range(tokenizer.vocab_size)}
    byte_ids = [first + b for b in range(256)] if is_fallback else byte_level_ids(alphabet)
    token_ids = [byte_ids[byte] for byte in pattern] * 200
    streamed = detokenizer(tokenizer, tokenizer.encode("hello"))
    longest, longest_delay = 0, 0
    for num_tokens, token_id in enumerate(token_ids, start=1):
        streamed.append([token_id])
        longest = max(longest, len(streamed._stream._window))
        longest_delay = max(longest_delay, num_tokens - len(streamed.text.encode(errors="replace")))
    streamed.finish()
    assert longest <= 40
    assert longest_delay <= 40
    if not is_fallback:
        assert streamed.text == decode_after(tokenizer, tokenizer.encode("hello"), token_ids)


@both_tokenizers
def test_tokens_without_text_are_not_kept(tokenizer):
    streamed = detokenizer(tokenizer, tokenizer.encode("hello"))
    for token_id in (tokenizer.eos_token_id, tokenizer.vocab_size):
        streamed.append([token_id] * 100)
        assert len(streamed._stream._window) <= 10
    streamed.append(tokenizer.encode(" 你", add_special_tokens=False))
    assert streamed.text.endswith(" 你")


def byte_level_ids(alphabet: dict[str, int]) -> list[int]:
    """The id of each single-byte token of the byte-level tokenizer."""
    from tokenizers import pre_tokenizers

    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    names = {byte: chr(byte) for byte in printable}
    for shift, byte in enumerate(byte for byte in range(256) if byte not in names):
        names[byte] = chr(256 + shift)
    assert set(names.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return [alphabet[names[byte]] for byte in range(256)]


def first_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """The stop string that `str.find` shows to be complete first, the longer of two: end, start, string."""
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    return min(found) if found else None


stop_lists = st.lists(st.text("ab好", min_size=1, max_size=4), min_size=1, max_size=3)


@both_tokenizers
@given(data=st.data())
def test_stop_strings_are_found_as_in_the_whole_text_whatever_the_chunks(tokenizer, data):
    text = data.draw(st.text("ab好", max_size=30))
    stops, include = data.draw(stop_lists), data.draw(st.booleans())
    cut_positions = data.draw(cuts)
    prompt, token_ids = tokenizer.encode("hello"), tokenizer.encode(text, add_special_tokens=False)
    whole = decode_after(tokenizer, prompt, token_ids)
    streamed = detokenizer(tokenizer, prompt, stop=stops, include_stop_str_in_output=include)
    deltas, num_taken = stream(streamed, token_ids, cut_positions)
    assert "".join(deltas) == streamed.text
    match = first_stop(whole, stops)
    if match is None:
        assert (streamed.stop_reason, streamed.text, num_taken) == (None, whole, len(token_ids))
        return
    end, start, stop = match
    assert streamed.stop_reason == stop
    assert streamed.text == (whole[:end] if include else whole[:start])
    lengths = [len(decode_after(tokenizer, prompt, token_ids[:n]).rstrip("\ufffd")) for n in range(len(token_ids) + 1)]
    assert num_taken == min(n for n, length in enumerate(lengths) if length >= end)


@given(st.text("ab", min_size=1, max_size=30), stop_lists, st.integers(0, 30), cuts)
def test_a_stop_string_completed_within_min_tokens_does_not_stop(text, stops, min_tokens, cut_positions):
    tokenizer = byte_level()
    token_ids = [tokenizer.encode(character)[0] for character in text]  # one character a token
    streamed = detokenizer(tokenizer, stop=stops, min_tokens=min_tokens, max_tokens=None)
    _, num_taken = stream(streamed, token_ids, cut_positions)
    ends = [
        (start + len(stop), start, stop)
        for stop in stops
        for start in range(len(text))
        if text.startswith(stop, start) and start + len(stop) > min_tokens
    ]
    if ends:
        end, start, stop = min(ends)
        assert (streamed.stop_reason, streamed.text, num_taken) == (stop, text[:start], end)
    else:
        assert (streamed.stop_reason, streamed.text, num_taken) == (None, text, len(text))


def test_text_that_may_begin_a_stop_string_is_held_back_until_decided():
    tokenizer = byte_level()
    streamed = detokenizer(tokenizer, stop=["END", "NO!"])
    shown = []
    for character in "aENxENO?EN":
        streamed.append(tokenizer.encode(character))
        shown.append(streamed.delta())
    assert shown == ["a", "", "", "ENx", "", "", "E", "NO?", "", ""]
    streamed.finish()
    assert streamed.delta() == "EN"
    assert streamed.delta() == ""


def test_a_stop_string_that_did_not_count_is_not_held_back():
    tokenizer = byte_level()
    streamed = detokenizer(tokenizer, stop=["ab", "xyz"], min_tokens=2)
    streamed.append([tokenizer.encode(character)[0] for character in "ab"])
    assert streamed.delta() == "ab"


@given(st.text("ab", max_size=20), stop_lists)
def test_text_that_was_shown_is_never_taken_back(text, stops):
    tokenizer = byte_level()
    streamed = detokenizer(tokenizer, stop=stops)
    deltas, _ = stream(streamed, [tokenizer.encode(character)[0] for character in text], singly(list(text)))
    match = first_stop(text, stops)
    assert "".join(deltas) == (text[: match[1]] if match else text)


def test_tokens_after_the_stop_in_one_call_are_not_taken():
    tokenizer = byte_level()
    token_ids = [tokenizer.encode(character)[0] for character in "ab.cd"]
    streamed = detokenizer(tokenizer, stop=".")
    assert streamed.append(token_ids) == 3
    assert (streamed.text, streamed.stop_reason) == ("ab", ".")
    with pytest.raises(AssertionError):
        streamed.append(token_ids)


def test_a_stop_string_completed_by_the_last_unfinished_bytes_is_found():
    tokenizer = byte_level()
    streamed = detokenizer(tokenizer, stop="\ufffd")
    streamed.append(tokenizer.encode("a\ufffd"))
    assert streamed.stop_reason is None
    streamed.finish()
    assert (streamed.text, streamed.stop_reason) == ("a", "\ufffd")


def test_a_stop_string_in_the_prompt_does_not_stop():
    tokenizer = byte_level()
    streamed = detokenizer(tokenizer, tokenizer.encode("stop sto"), stop="stop")
    stream(streamed, tokenizer.encode("p"))
    assert (streamed.text, streamed.stop_reason) == ("p", None)


def test_without_detokenize_there_is_no_text_and_every_token_is_taken():
    tokenizer = byte_level()
    streamed = detokenizer(tokenizer, detokenize=False)
    assert stream(streamed, tokenizer.encode("hello")) == (["", ""], len(tokenizer.encode("hello")))
    assert streamed.text == ""


def test_special_tokens_are_left_out_or_shown_as_asked():
    tokenizer = byte_level()
    token_ids = tokenizer.encode("a<s>b<tool>c</s>")
    for skip, expected in ((True, "ab<tool>c"), (False, "a<s>b<tool>c</s>")):
        streamed = detokenizer(tokenizer, skip_special_tokens=skip)
        stream(streamed, token_ids)
        assert streamed.text == expected


def test_spaces_between_special_tokens_are_shown_or_not_as_asked():
    vocab = {"[UNK]": 0, "<s>": 1, "</s>": 2, "a": 3, "##b": 4}
    backend = Backend(models.WordPiece(vocab, unk_token="[UNK]"))  # its decoder puts a space before every token
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    backend.add_special_tokens(["<s>", "</s>"])
    for spaces, expected in ((True, "ab <s> </s> <s> a a"), (False, "ab <s></s><s> a a")):
        streamed = detokenizer(wrapped(backend), skip_special_tokens=False, spaces_between_special_tokens=spaces)
        stream(streamed, [3, 4, 1, 2, 1, 3, 3])
        assert streamed.text == expected
