"""Text from tokens as they come, and the stop strings in it. One `IncrementalDetokenizer` per output choice.

Owns the text of one choice: what of it is certain, and what of that may be shown. Knows nothing of tokens that stop,
of lengths, or of other choices.

Why not `tokenizers.decoders.DecodeStream`: it raises where a run of byte tokens turns out not to be UTF-8, it cannot
be flushed, and it waits for a token that ends with a character, which may never come.
"""

from collections.abc import Sequence

from quire.engine.sampling_params import SamplingParams
from quire.engine.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what decoders give for bytes that are not, or not yet, a character
MAX_WINDOW = 8  # tokens decoded at once, those of an unfinished character apart, before the oldest are let go
RESYNC_TOKENS = 8  # how many are kept where no token ends with a character: enough bytes to hold a whole one
MAX_UNFINISHED = 16  # more U+FFFD in a row will not become characters: byte tokens that may fill a window less 8 + 3
PROMPT_TAILS = (4, 8, 16, 32)  # how much of a prompt's end to try as the context of the first token


class _TokenStream:
    """The text that each token adds, as soon as no later token can change it.

    A window of the last tokens is decoded again with each new one; `_shown` is the part of the window's text that was
    given out. Decoders look back at most a few tokens (an unfinished character, the space before the first word), so
    a window that begins at least one whole token before what is new gives what decoding everything would give.

        tokens   ... | a   b   c | d        a..c decoded before; `_clean` is 3: the text after c ended with a character
        window       | a   b   c   d |      text = decode(a..d) = _shown + what d adds + perhaps an unfinished tail
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window = self._context_window(context)
        text = self._decode(self._window)
        self._shown = _settled(text)
        self._clean = len(self._window)
        self._unfinished_context = text[len(self._shown) :]

    def step(self, token_id: int) -> str:
        """The text that is certain now and was not before."""
        if self._has_no_text(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        settled = _settled(text)
        if settled.startswith(self._shown):
            new = settled[len(self._shown) :]
            self._shown = settled
        elif self._shown.startswith(settled):
            new = ""  # a run of byte tokens is unfinished, and decodes to nothing but U+FFFD until it is whole
        else:
            new, text = self._restart()
        self._let_go(text)
        return self._without_context(new)

    def flush(self) -> str:
        """The rest: bytes that never became a character, as the U+FFFD that decoders show for them."""
        text = self._decode(self._window)
        rest = text[len(self._shown) :] if text.startswith(self._shown) else self._decode(self._window[self._clean :])
        self._window, self._shown, self._clean = [], "", 0
        return self._without_context(rest)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def _has_no_text(self, token_id: int) -> bool:
        """Whether decoders leave the token out, so that the window need not hold it."""
        if self._skip_special_tokens and token_id in self._tokenizer.all_special_ids:
            return True
        return self._tokenizer.id_to_token(token_id) is None

    def _context_window(self, context: Sequence[int]) -> list[int]:
        tail: list[int] = []
        for length in PROMPT_TAILS:
            tail = [token_id for token_id in context[-length:] if not self._has_no_text(token_id)]
            text = self._decode(tail)
            # A tail that begins inside a character could spoil the run of byte tokens that goes on into the output.
            if text and not text.startswith(UNFINISHED):
                break
        return tail

    def _without_context(self, new: str) -> str:
        """A character that the prompt began is shown if the output completes it; bytes left over are the prompt's."""
        if new:
            new, self._unfinished_context = new.removeprefix(self._unfinished_context), ""
        return new

    def _restart(self) -> tuple[str, str]:
        """Go on after the last whole character: byte tokens that completed one were followed by bytes that cannot.

        Decoders with byte tokens then take the whole run as invalid, what was shown of it included. Gives what is
        settled of the text of the tokens since, and that text.
        """
        self._window = self._window[self._clean :]
        self._clean = 0
        text = self._decode(self._window)
        self._shown = _settled(text)
        return self._shown, text

    def _let_go(self, text: str) -> None:
        """Forget old tokens, keeping enough that what is kept decodes as it did inside the whole."""
        is_clean = not text.endswith(UNFINISHED)
        start = self._clean if is_clean else len(self._window) - RESYNC_TOKENS
        settled = _settled(text)
        # Where more was shown, a run of byte tokens is unfinished, and its beginning is still needed.
        if len(self._window) > MAX_WINDOW and start > 0 and self._shown == settled:
            kept_text = self._decode(self._window[start:])
            if _is_aligned(kept_text, text):
                self._window = self._window[start:]
                self._clean = 0
                self._shown = kept_text[: len(kept_text) - (len(text) - len(settled))]
        if is_clean:
            self._clean = len(self._window)


def _unfinished_length(text: str) -> int:
    return len(text) - len(text.rstrip(UNFINISHED))


def _settled(text: str) -> str:
    """`text` without the characters at its end that further tokens may change."""
    length = _unfinished_length(text)
    if length > MAX_UNFINISHED:
        length = 1
    return text[: len(text) - length]


def _is_aligned(kept_text: str, text: str) -> bool:
    """Whether the settled part of the kept tokens' text ends where that of the whole window's text does.

    UTF-8 finds its step again after one whole character, so that from there on both texts are the same.
    """
    unfinished = _unfinished_length(text)
    if unfinished > MAX_UNFINISHED:
        return kept_text.endswith(UNFINISHED)
    return len(kept_text) > unfinished == _unfinished_length(kept_text)


class IncrementalDetokenizer:
    """The text of one output choice as its tokens come, cut where a stop string is found.

    The stop string that counts is the one that is complete first in the text; of two that are complete with the same
    character, the longer. It is looked for in the text of the output alone, and only in what the tokens after the
    first `min_tokens` complete (as in vLLM). The result does not depend on how the tokens were split over calls.

    A token that ends the output (end of sequence, `stop_token_ids`) is given here only if its text is wanted, which
    in vLLM is the case with `include_stop_str_in_output` alone.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int] = ()) -> None:
        """`prompt_token_ids` decide whether the first token's leading space is shown, as when all is decoded."""
        self._tokenizer = tokenizer
        self._params = params
        self._stream = _TokenStream(tokenizer, params.skip_special_tokens, prompt_token_ids)
        self._longest_stop = max(map(len, params.stop), default=0)
        self._pieces: list[str] = []
        self._tail = ""  # the end of the text, as long as the longest stop string
        self._num_chars = 0
        self._num_emitted_chars = 0
        self._num_tokens = 0
        self._after_added_token = False
        self._finished = False
        self.stop_reason: str | None = None
        """The stop string that was found."""

    @property
    def text(self) -> str:
        """All text that is certain so far, held-back text included."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def append(self, new_token_ids: Sequence[int]) -> int:
        """Take tokens up to the one that completes a stop string, and say how many were taken.

        Fewer than given means that `stop_reason` is set and the rest do not belong to the output; it may also be set
        with all taken. Nothing may be appended after a stop or after `finish`.
        """
        assert not self._finished, "append after the end of the output"
        if not self._params.detokenize:
            return len(new_token_ids)
        for num_taken, token_id in enumerate(new_token_ids, start=1):
            self._num_tokens += 1
            if self._grow(self._token_piece(token_id)):
                return num_taken
        return len(new_token_ids)

    def delta(self) -> str:
        """The text that may be shown and was not before: what may yet be the beginning of a stop string is held back.

        The deltas of an output, the one after `finish` included, join to `text`.
        """
        end = self._num_chars - self._num_held_chars()
        if end <= self._num_emitted_chars:
            return ""
        new = self.text[self._num_emitted_chars : end]
        self._num_emitted_chars = end
        return new

    def finish(self) -> None:
        """No token follows: an unfinished character is shown as U+FFFD, and nothing is held back any more.

        May set `stop_reason`, where what was unfinished completes a stop string.
        """
        if not self._finished and self._params.detokenize:
            self._grow(self._stream.flush())
        self._finished = True

    def _token_piece(self, token_id: int) -> str:
        piece = self._stream.step(token_id)
        is_added = token_id in self._tokenizer.added_token_ids
        if is_added and self._after_added_token and not self._params.spaces_between_special_tokens:
            piece = piece.lstrip(" ") if piece.strip(" ") == self._tokenizer.id_to_token(token_id) else piece
        self._after_added_token = is_added
        return piece

    def _grow(self, piece: str) -> bool:
        """Add certain text; whether that completed a stop string, at which the text is cut."""
        if not piece:
            return False
        stop, start = (None, 0)
        if self._num_tokens > self._params.min_tokens:
            stop, start = self._find_stop(piece)
        self._pieces.append(piece)
        self._num_chars += len(piece)
        if self._longest_stop:
            self._tail = (self._tail + piece)[-self._longest_stop :]
        if stop is None:
            return False
        self._num_chars = start + (len(stop) if self._params.include_stop_str_in_output else 0)
        self._pieces = [self.text[: self._num_chars]]
        self.stop_reason = stop
        self._finished = True
        return True

    def _find_stop(self, piece: str) -> tuple[str | None, int]:
        """The stop string that is complete first within `piece`, and where in the whole text it begins."""
        text = self._tail + piece
        first: tuple[int, int] | None = None  # end, start, within `text`
        found: str | None = None
        for stop in self._params.stop:
            start = text.find(stop, max(0, len(self._tail) - len(stop) + 1))
            if start >= 0 and (first is None or (start + len(stop), start) < first):
                first, found = (start + len(stop), start), stop
        return found, self._num_chars - len(self._tail) + (first[1] if first else 0)

    def _num_held_chars(self) -> int:
        """The longest end of the text that is the beginning of a stop string: no match to come begins before it."""
        if self._finished or self._params.include_stop_str_in_output:
            return 0
        for length in range(min(self._longest_stop - 1, len(self._tail)), 0, -1):
            end = self._tail[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._params.stop):
                return length
        return 0
