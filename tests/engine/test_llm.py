"""`LLM` as its users call it, on the bundled model: text, stops, streams, chat, and what is refused."""

import pytest

from quire.engine import (
    LLM,
    EngineDeadError,
    InvalidConfigError,
    InvalidRequestError,
    RequestOutputKind,
    SamplingParams,
)
from quire.engine.sampling_params import bad_words_token_ids
from tests.engine.engines import FewShapesBackend, check_idle, demo_engine, tiny_folder

PROMPT = "def read_file(path):\n"
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return demo_engine()


def _text(llm: LLM, prompt: object, params: SamplingParams) -> str:
    return llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].text


def test_text_is_the_decoded_tokens(llm: LLM) -> None:
    output = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0]
    assert output.prompt == PROMPT
    assert output.finished
    assert output.outputs[0].finish_reason == "length"
    assert len(output.outputs[0].token_ids) == 24
    both = llm.tokenizer.decode([*output.prompt_token_ids, *output.outputs[0].token_ids])
    assert both == PROMPT + output.outputs[0].text
    assert output.outputs[0].text.strip()
    check_idle(llm)


def test_a_prompt_may_be_written_in_every_way(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPT)
    expected = _text(llm, PROMPT, GREEDY)
    for prompt in ([PROMPT], {"prompt": PROMPT}, {"prompt_token_ids": ids}, ids, [ids], [{"prompt_token_ids": ids}]):
        assert _text(llm, prompt, GREEDY) == expected


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [f"x{idx} = " for idx in range(7)]
    params = [SamplingParams(temperature=0.0, max_tokens=1 + (idx * 5) % 7) for idx in range(7)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [p.max_tokens for p in params]


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    whole = _text(llm, PROMPT, GREEDY)
    middle = len(whole) // 2
    stop = whole[middle : middle + 3]
    cut = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=24, stop=[stop]), use_tqdm=False)[0].outputs[
        0
    ]
    assert cut.text == whole[: whole.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert len(cut.token_ids) < 24
    kept = SamplingParams(temperature=0.0, max_tokens=24, stop=[stop], include_stop_str_in_output=True)
    assert _text(llm, PROMPT, kept) == whole[: whole.index(stop)] + stop
    check_idle(llm)


def test_a_stop_token_ends_the_tokens_with_it(llm: LLM) -> None:
    token_ids = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    stop = next(token for token in token_ids[3:] if token not in token_ids[:3])
    params = SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=[stop])
    output = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0]
    assert output.token_ids == token_ids[: token_ids.index(stop) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_deltas_of_a_stream_join_to_the_whole(llm: LLM) -> None:
    prompts = [PROMPT, "# é ü 漢字 🙂\nname = '", "class A:"]
    params = SamplingParams(temperature=0.8, seed=4, max_tokens=30, n=2, output_kind=RequestOutputKind.DELTA)
    texts: dict[tuple[str, int], str] = {}
    tokens: dict[tuple[str, int], list[int]] = {}
    for output in llm.stream(prompts, params):
        for choice in output.outputs:
            key = (output.prompt, choice.index)
            texts[key] = texts.get(key, "") + choice.text
            tokens.setdefault(key, []).extend(choice.token_ids)
    final = llm.generate(prompts, SamplingParams(temperature=0.8, seed=4, max_tokens=30, n=2), use_tqdm=False)
    assert texts == {(o.prompt, c.index): c.text for o in final for c in o.outputs}
    assert tokens == {(o.prompt, c.index): c.token_ids for o in final for c in o.outputs}
    check_idle(llm)


def test_logprobs_name_their_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5, logprobs=2, prompt_logprobs=1)
    output = llm.generate(PROMPT, params, use_tqdm=False)[0]
    choice = output.outputs[0]
    assert len(choice.logprobs) == 5
    for token_id, entry in zip(choice.token_ids, choice.logprobs, strict=True):
        assert entry[token_id].decoded_token == llm.tokenizer.token_text(token_id)
        # Greedy: the chosen token is the most likely one, and both are the same number.
        assert entry[token_id].logprob == max(found.logprob for found in entry.values())
    assert choice.cumulative_logprob == pytest.approx(
        sum(e[t].logprob for e, t in zip(choice.logprobs, choice.token_ids, strict=True))
    )
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)


def test_bad_words_and_allowed_tokens_hold(llm: LLM) -> None:
    token_ids = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    word = next(text for token in token_ids if (text := llm.tokenizer.token_text(token).strip()).isalpha())
    params = SamplingParams(temperature=0.0, max_tokens=24, bad_words=[word])
    found = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].token_ids
    assert found != token_ids
    for sequence in bad_words_token_ids(params, llm.tokenizer):
        places = range(len(found) - len(sequence) + 1)
        assert not any(tuple(found[place : place + len(sequence)]) == sequence for place in places)
    allowed = llm.tokenizer.encode("abc() :\n")
    params = SamplingParams(temperature=1.0, seed=0, max_tokens=24, allowed_token_ids=allowed)
    assert set(llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].token_ids) <= set(allowed)


def test_a_seed_decides_and_its_absence_does_not_repeat(llm: LLM) -> None:
    seeded = SamplingParams(temperature=1.0, seed=9, max_tokens=20)
    assert _text(llm, PROMPT, seeded) == _text(llm, PROMPT, seeded)
    free = SamplingParams(temperature=1.0, max_tokens=20)
    assert len({_text(llm, PROMPT, free) for _ in range(4)}) == 4


def test_chat_uses_the_models_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What does os.path.join do?"}]
    one = llm.chat(messages, GREEDY, use_tqdm=False)
    assert one[0].prompt_token_ids == llm.tokenizer.apply_chat_template(messages)
    two = llm.chat([messages, messages], GREEDY, use_tqdm=False)
    assert [output.outputs[0].text for output in two] == [one[0].outputs[0].text] * 2


def test_a_refused_prompt_costs_the_others_nothing(llm: LLM) -> None:
    before = llm.stats().num_steps
    for bad, part in (
        ([PROMPT, ""], "empty"),
        ([PROMPT, "x " * 300], "max_model_len is 256"),
        ([PROMPT, [1, 99999999]], "outside the vocabulary"),
        ([PROMPT, [1, "a"]], "whole numbers"),
        ([PROMPT, {"prompt": PROMPT, "prompt_token_ids": [1]}], "exactly one key"),
        ([PROMPT, 3.5], "not float"),
    ):
        with pytest.raises(InvalidRequestError, match=part):
            llm.generate(bad, GREEDY, use_tqdm=False)
    assert llm.stats().num_steps == before
    check_idle(llm)
    assert _text(llm, PROMPT, GREEDY)


def test_counts_that_do_not_match_are_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="2 sampling_params for 1 prompts"):
        llm.generate([PROMPT], [GREEDY, GREEDY], use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="1 priorities for 2 prompts"):
        llm.generate([PROMPT, PROMPT], GREEDY, priority=[1], use_tqdm=False)


def test_a_request_for_more_sampling_than_was_compiled_is_refused() -> None:
    llm = LLM(str(tiny_folder()), load_format="dummy", sampling="greedy", max_num_seqs=2, max_model_len=64)
    greedy = SamplingParams(temperature=0.0, max_tokens=3, detokenize=False)
    assert len(llm.generate([[5, 6, 7]], greedy, use_tqdm=False)[0].outputs[0].token_ids) == 3
    with pytest.raises(InvalidRequestError, match="needs random sampling"):
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, detokenize=False), use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="needs full sampling"):
        llm.generate([[5, 6, 7]], SamplingParams(temperature=0.0, prompt_logprobs=1, detokenize=False), use_tqdm=False)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"max_model_length": 5}, "unknown setting max_model_length"),
        ({"dtype": "int4"}, "is not one of auto"),
        ({"max_num_seqs": 0}, "at least 1"),
        ({"max_model_len": 100_000}, "beyond the 256 positions"),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 16}, "raise it to 40"),
        ({"num_kv_blocks": 4}, "usable blocks"),
        ({"memory_utilization": 2.0}, "at most 1"),
        ({"enable_prefix_caching": "yes"}, "True or False"),
        ({"kernels": "paged_attention"}, "op=name"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_remedy(settings: dict, part: str) -> None:
    with pytest.raises(InvalidConfigError, match=part):
        LLM(str(tiny_folder()), load_format="dummy", **settings)


def test_an_engine_that_failed_says_so_ever_after() -> None:
    llm = LLM(str(tiny_folder()), load_format="dummy", backend=FewShapesBackend(), max_num_seqs=1, max_model_len=64)
    llm.core.runner.programs.clear()
    params = SamplingParams(temperature=0.0, max_tokens=3, detokenize=False)
    with pytest.raises(KeyError):
        llm.generate([[5, 6]], params, use_tqdm=False)
    with pytest.raises(EngineDeadError, match="start a new one"):
        llm.generate([[5, 6]], params, use_tqdm=False)
