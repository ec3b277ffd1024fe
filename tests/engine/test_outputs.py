"""What comes back is plain, frozen data that crosses a process boundary unchanged."""

import dataclasses
import pickle

import pytest

from quire.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput

CHOICE = CompletionOutput(
    index=0,
    text=" world",
    token_ids=[7],
    cumulative_logprob=-0.5,
    logprobs=[{7: Logprob(-0.5, rank=1, decoded_token=" world")}],
    finish_reason="stop",
    stop_reason=7,
)
OUTPUT = RequestOutput(
    request_id="0",
    prompt="hello",
    prompt_token_ids=[5, 6],
    outputs=[CHOICE],
    finished=True,
    prompt_logprobs=[None, {6: Logprob(-1.0)}],
    num_cached_tokens=1,
    metrics=RequestMetrics(arrival_time=1.0, finished_time=2.0),
)


@pytest.mark.parametrize(
    "value", [OUTPUT, CHOICE, OUTPUT.metrics, Logprob(0.0)], ids=lambda value: type(value).__name__
)
def test_an_output_cannot_be_changed_and_survives_a_process_boundary(value):
    assert pickle.loads(pickle.dumps(value)) == value
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)


@pytest.mark.parametrize(("reason", "finished"), [(None, False), ("stop", True), ("length", True), ("abort", True)])
def test_a_choice_is_finished_when_it_has_a_reason(reason, finished):
    assert dataclasses.replace(CHOICE, finish_reason=reason).finished() is finished


def test_what_was_not_asked_for_is_none():
    choice = CompletionOutput(index=0, text="", token_ids=[])
    output = RequestOutput(request_id="0", prompt=None, prompt_token_ids=[5], outputs=[choice], finished=False)
    assert (choice.logprobs, choice.cumulative_logprob, choice.finish_reason, choice.stop_reason) == (None,) * 4
    assert (output.prompt_logprobs, output.metrics, output.num_cached_tokens) == (None, None, 0)
