"""The laws of what callers read, on hand-made outputs of the core: no engine, no device, no compiled program."""

import signal
from collections.abc import Iterator, Sequence

import pytest

from quire.engine.config import EngineConfig
from quire.engine.core import EngineCore
from quire.engine.input_processor import InputProcessor, ProcessedRequest
from quire.engine.llm import LLM
from quire.engine.output_processor import OutputProcessor
from quire.engine.outputs import RequestOutput
from quire.engine.sampling_params import RequestOutputKind, SamplingParams
from quire.engine.step_data import EngineCoreOutput, TokenLogprobs
from quire.kernels.errors import InvalidConfigError, InvalidRequestError
from tests.engine.small_tokenizers import byte_level

TEXT = "hello world, hello there."
EOS = 1
KINDS = list(RequestOutputKind)


def _inputs(vocab_size: int = 400) -> InputProcessor:
    return InputProcessor(byte_level(), vocab_size=vocab_size, max_model_len=64, eos_token_ids=(EOS,), seed=0)


def _request(request_id: str = "r", prompt: object = (40, 41, 42), **params: object) -> ProcessedRequest:
    wanted = {"temperature": 1.0, "max_tokens": 30, **params}
    return _inputs().process(request_id, prompt, SamplingParams(**wanted))


def _letters(text: str) -> list[int]:
    """One token per character, so that a text can be cut anywhere."""
    return [byte_level().encode(character)[0] for character in text]


class Feed:
    """An output processor and all that came out of it."""

    def __init__(self, *requests: ProcessedRequest) -> None:
        self.processor = OutputProcessor(byte_level())
        self.outputs: list[RequestOutput] = []
        self.aborted: list[str] = []
        for request in requests:
            self.processor.add(request)

    def __call__(self, *outputs: EngineCoreOutput) -> list[RequestOutput]:
        made, to_abort = self.processor.process(outputs)
        self.outputs += made
        self.aborted += to_abort
        return made


def _entry(logprob: float, *top_ids: int) -> TokenLogprobs:
    return TokenLogprobs(logprob, 1, top_ids, tuple(-1.0 - rank for rank in range(len(top_ids))))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_output_adds_up_to_the_same(kind: RequestOutputKind) -> None:
    feed = Feed(_request(output_kind=kind))
    token_ids = _letters(TEXT)
    for token_id in token_ids[:-1]:
        feed(EngineCoreOutput("r", [token_id]))
    feed(EngineCoreOutput("r", token_ids[-1:], finish_reason="length"))
    is_delta = kind is RequestOutputKind.DELTA
    parts = [output.outputs[0] for output in feed.outputs]
    assert "".join(part.text for part in parts) == TEXT if is_delta else parts[-1].text == TEXT
    assert [t for part in parts for t in part.token_ids] == token_ids if is_delta else parts[-1].token_ids == token_ids
    assert len(feed.outputs) == (1 if kind is RequestOutputKind.FINAL_ONLY else len(token_ids))
    assert [output.finished for output in feed.outputs] == [False] * (len(feed.outputs) - 1) + [True]
    assert feed.processor.num_unfinished == 0


@pytest.mark.parametrize("kind", [RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA])
def test_text_that_was_shown_is_never_taken_back(kind: RequestOutputKind) -> None:
    feed = Feed(_request(stop=["world"], output_kind=kind))
    shown = ""
    for token_id in _letters("a worm, a world of worms"):
        for output in feed(EngineCoreOutput("r", [token_id])):
            text = output.outputs[0].text
            now = shown + text if kind is RequestOutputKind.DELTA else text
            assert now.startswith(shown)
            shown = now
    assert shown == "a worm, a "
    assert feed.outputs[-1].outputs[0].stop_reason == "world"
    assert feed.aborted == ["r"]


def test_a_stop_string_ends_exactly_the_choice_that_has_it() -> None:
    feed = Feed(_request(n=3, stop=["wo"]))
    texts = ["hello", "hwold", "hello"]
    for columns in zip(*map(_letters, texts), strict=True):
        feed(*(EngineCoreOutput(f"r#{idx}", [token_id]) for idx, token_id in enumerate(columns)))
    assert feed.aborted == ["r#1"]
    assert not feed.outputs[-1].finished
    (last,) = feed(*(EngineCoreOutput(f"r#{idx}", [EOS], finish_reason="stop") for idx in range(3)))
    assert last.finished
    assert [choice.text for choice in last.outputs] == ["hello", "h", "hello"]
    assert [choice.stop_reason for choice in last.outputs] == [None, "wo", None]
    assert [len(choice.token_ids) for choice in last.outputs] == [6, 3, 6]
    assert feed.processor.num_unfinished == 0


def test_a_stop_string_that_the_last_token_completes_needs_no_abort() -> None:
    feed = Feed(_request(stop=["wo"]))
    feed(EngineCoreOutput("r", _letters("hw")))
    (last,) = feed(EngineCoreOutput("r", _letters("o"), finish_reason="length"))
    assert (last.outputs[0].text, last.outputs[0].finish_reason) == ("h", "stop")
    assert feed.aborted == []


def test_tokens_and_logprobs_after_a_stop_string_are_dropped() -> None:
    feed = Feed(_request(stop=["wo"], logprobs=0))
    token_ids = _letters("hworld")
    (last,) = feed(EngineCoreOutput("r", token_ids, logprobs=[_entry(-float(idx)) for idx in range(6)]))
    assert last.outputs[0].token_ids == token_ids[:3]
    assert len(last.outputs[0].logprobs) == 3
    assert last.outputs[0].cumulative_logprob == -3.0
    assert feed(EngineCoreOutput("r", _letters("x"))) == [], "a token on its way when the stop string was found"


def test_choices_end_independently_and_deltas_hold_only_those_with_something_new() -> None:
    feed = Feed(_request(n=2, output_kind=RequestOutputKind.DELTA))
    a, b, c = _letters("abc")
    feed(EngineCoreOutput("r#0", [a], finish_reason="length"), EngineCoreOutput("r#1", [b]))
    feed(EngineCoreOutput("r#1", [c], finish_reason="length"))
    found = [[(part.index, part.text, part.finish_reason) for part in output.outputs] for output in feed.outputs]
    assert found == [[(0, "a", "length"), (1, "b", None)], [(1, "c", "length")]]
    assert [output.finished for output in feed.outputs] == [False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_an_abort_ends_what_is_open_and_keeps_what_has_ended(kind: RequestOutputKind) -> None:
    feed = Feed(_request(n=3, output_kind=kind), _request("other"))
    a, b = _letters("ab")
    feed(EngineCoreOutput("r#1", [a], finish_reason="length"), EngineCoreOutput("r#2", [b]))
    last, open_ids = feed.processor.abort("r")
    assert open_ids == ["r#0", "r#2"]
    assert last.finished
    ends = {choice.index: choice.finish_reason for choice in last.outputs}
    assert ends == (
        {0: "abort", 2: "abort"} if kind is RequestOutputKind.DELTA else {0: "abort", 1: "length", 2: "abort"}
    )
    assert feed.processor.abort("r") == (None, [])
    assert feed(EngineCoreOutput("r#2", [b])) == []
    assert feed.processor.num_unfinished == 1, "the other request is untouched"


def test_an_id_in_use_is_refused_and_its_owner_goes_on() -> None:
    feed = Feed(_request("r", n=2))
    for taken in ("r", "r#1"):
        with pytest.raises(InvalidRequestError, match="in use"):
            feed.processor.add(_request(taken))
    (output,) = feed(EngineCoreOutput("r#1", _letters("a")))
    assert output.outputs[1].text == "a"


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_logprobs_come_whole_and_where_outputs_are_deltas_once(kind: RequestOutputKind) -> None:
    feed = Feed(_request(n=2, prompt_logprobs=1, output_kind=kind, detokenize=False))
    assert feed(EngineCoreOutput("r#0", [], prompt_logprobs=[_entry(-1.0, 41)])) == [], "a part of the prompt"
    feed(EngineCoreOutput("r#1", [50]))  # its prompt was in the cache
    feed(EngineCoreOutput("r#0", [51], prompt_logprobs=[_entry(-2.0, 43)]))
    feed(*(EngineCoreOutput(f"r#{idx}", [52], finish_reason="length") for idx in range(2)))
    found = [output.prompt_logprobs for output in feed.outputs]
    whole = found[-2 if kind is RequestOutputKind.DELTA else -1]
    assert (
        found
        == {
            RequestOutputKind.FINAL_ONLY: [whole],
            RequestOutputKind.CUMULATIVE: [None, whole, whole],
            RequestOutputKind.DELTA: [None, whole, None],
        }[kind]
    )
    assert whole[0] is None
    assert [{token: entry.logprob for token, entry in found.items()} for found in whole[1:]] == [
        {41: -1.0},
        {42: -2.0, 43: -1.0},
    ]
    assert whole[1][41].decoded_token is None, "no text was asked for"


def test_one_choice_computes_the_prompt_logprobs_of_all() -> None:
    request = _request(n=3, prompt_logprobs=2)
    assert [choice.params.prompt_logprobs for choice in request.choices] == [2, None, None]


def test_what_the_choices_find_of_each_other_does_not_count_as_cached() -> None:
    feed = Feed(_request(n=2))
    a = _letters("a")
    (output,) = feed(EngineCoreOutput("r#0", a, num_cached_tokens=0), EngineCoreOutput("r#1", a, num_cached_tokens=2))
    assert output.num_cached_tokens == 0


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"params": SamplingParams(allowed_token_ids=[EOS], min_tokens=1)}, "has no other"),
        ({"params": SamplingParams(allowed_token_ids=_letters("a"), bad_words=["a"])}, "bans every token"),
        ({"cache_salt": "\ud800"}, "cache_salt"),
        ({"cache_salt": 5}, "cache_salt"),
        ({"priority": float("nan")}, "whole number"),
        ({"priority": 10**400}, "whole number"),
        ({"prompt": {"prompt_token_ids": "text"}}, "a list of token ids, not str"),
    ],
)
def test_what_would_fail_later_is_refused_when_it_is_asked(arguments: dict, part: str) -> None:
    wanted = {"prompt": [40], "params": SamplingParams(), **arguments}
    with pytest.raises(InvalidRequestError, match=part):
        _inputs().process("r", wanted.pop("prompt"), wanted.pop("params"), **wanted)


@pytest.mark.parametrize("name", ["batching_window", "priority_seconds", "memory_utilization"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_a_setting_that_is_no_finite_number_is_refused(name: str, value: float) -> None:
    with pytest.raises(InvalidConfigError, match=name):
        EngineConfig.from_arguments(**{name: value})


class OneTokenCore:
    """As much of an engine core as `LLM` needs: every step gives every request its next letter, a, b, c, ..."""

    is_busy = True

    def __init__(self) -> None:
        self.open: dict[str, list[int]] = {}
        self.num_steps = 0
        self.interrupt_at: int | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.open)

    def add_request(self, request: object) -> None:
        self.open[request.request_id] = _letters("abcdefghijklmnopqrstuvwxyz"[: request.params.max_tokens])

    def abort_request(self, request_id: str) -> bool:
        return self.open.pop(request_id, None) is not None

    def step(self) -> Sequence[EngineCoreOutput]:
        self.num_steps += 1
        if self.num_steps == self.interrupt_at:
            signal.raise_signal(signal.SIGINT)
        outputs = []
        for request_id, letters in list(self.open.items()):
            token_id = letters.pop(0)
            outputs.append(EngineCoreOutput(request_id, [token_id], finish_reason=None if letters else "length"))
            if not letters:
                del self.open[request_id]
        return outputs


@pytest.fixture
def llm() -> Iterator[LLM]:
    """An `LLM` around `OneTokenCore`."""
    llm = LLM.__new__(LLM)
    vars(llm).update(
        _core=OneTokenCore(),
        _inputs=_inputs(),
        _outputs=OutputProcessor(byte_level()),
        _inboxes={},
        _request_numbers=iter(map(str, range(100))),
        config=EngineConfig.from_arguments(),
        tokenizer=byte_level(),
    )
    yield llm
    assert not llm.core.open
    assert not llm._inboxes
    assert llm._outputs.num_unfinished == 0


def _delta(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, output_kind=RequestOutputKind.DELTA)


def test_streams_and_generate_may_overlap(llm: LLM) -> None:
    first, second = llm.stream([40], _delta(9)), llm.stream([40], _delta(5))
    text = next(first).outputs[0].text + next(first).outputs[0].text
    other = next(second).outputs[0].text
    assert llm.generate([41], _delta(7), use_tqdm=False)[0].outputs[0].text == "abcdefg"
    assert text + "".join(output.outputs[0].text for output in first) == "abcdefghi"
    assert other + "".join(output.outputs[0].text for output in second) == "abcde"


def test_closing_a_stream_ends_it_and_no_other(llm: LLM) -> None:
    first, second = llm.stream([[40], [41]], _delta(9)), llm.stream([40], _delta(5))
    text = next(second).outputs[0].text
    next(first)
    first.close()
    assert text + "".join(output.outputs[0].text for output in second) == "abcde"


def test_an_interrupt_ends_one_call_after_its_step_and_the_others_go_on(llm: LLM) -> None:
    stream = llm.stream([40], _delta(9))
    text = next(stream).outputs[0].text
    llm.core.interrupt_at = 3
    with pytest.raises(KeyboardInterrupt):
        llm.generate([41], _delta(9), use_tqdm=False)
    assert llm.core.num_steps == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert text + "".join(output.outputs[0].text for output in stream) == "abcdefghi"
    assert llm.generate([41], _delta(3), use_tqdm=False)[0].outputs[0].text == "abc"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"sampling_params": []}, "0 sampling_params for 1 prompts"),
        ({"sampling_params": {"max_tokens": 5}}, "is a SamplingParams"),
        ({"sampling_params": [None]}, "is a SamplingParams"),
        ({"priority": [1]}, "scheduling_policy"),
    ],
)
def test_arguments_that_would_count_for_nothing_are_refused(llm: LLM, arguments: dict, part: str) -> None:
    with pytest.raises(InvalidRequestError, match=part):
        llm.generate([[40]], use_tqdm=False, **arguments)


def test_a_misspelt_argument_of_chat_is_not_taken_for_the_templates(llm: LLM) -> None:
    with pytest.raises(TypeError, match="max_tokens"):
        llm.chat([{"role": "user", "content": "hello"}], max_tokens=5)


def test_chat_gives_the_template_what_it_is_given(llm: LLM) -> None:
    template = "{{ messages[0]['content'] }}|{{ style }}|{{ tools | length }}|{{ add_generation_prompt }}"
    output = llm.chat(
        [{"role": "user", "content": "hello"}],
        SamplingParams(max_tokens=2),
        use_tqdm=False,
        add_generation_prompt=False,
        chat_template=template,
        tools=({"type": "function", "function": {"name": "f", "parameters": {}}},),
        chat_template_kwargs={"style": "plain"},
    )[0]
    assert byte_level().decode(output.prompt_token_ids) == "hello|plain|1|False"


def test_the_small_core_has_no_method_that_the_real_one_lacks() -> None:
    names = {name for name in vars(OneTokenCore) if not name.startswith("_")}
    assert names <= set(vars(EngineCore))
