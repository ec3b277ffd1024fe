"""What crosses the socket arrives as it was sent."""

import gc
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.engine.request import EngineCoreRequest
from quire.engine.sampling_params import SamplingParams
from quire.engine.step_data import DraftRound, EngineCoreOutput, TokenLogprobs
from quire.kernels.errors import EngineDeadError, InvalidRequestError, OutOfBlocksError
from quire.server.engine_process import set_aside_what_stays
from quire.server.messages import (
    Outputs,
    Submit,
    TokenOutput,
    decode_from_engine,
    decode_to_engine,
    error_of,
    frame,
)

params = st.builds(
    SamplingParams,
    temperature=st.floats(0.01, 2),
    top_p=st.floats(0.1, 1),
    top_k=st.integers(-1, 50),
    seed=st.none() | st.integers(0, 2**64 - 1),
    stop=st.lists(st.text(min_size=1), max_size=3),
    stop_token_ids=st.lists(st.integers(0, 50), max_size=3),
    bad_words=st.lists(st.text(min_size=1), max_size=3),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 100), st.floats(-100, 100)),
    allowed_token_ids=st.none() | st.lists(st.integers(0, 100), min_size=1),
    logprobs=st.none() | st.integers(0, 20),
    max_tokens=st.none() | st.integers(1, 100),
)
tokens = st.integers(0, 2**31 - 1)
logprobs = st.builds(
    TokenLogprobs,
    st.floats(-1e30, 0),
    st.integers(1, 1000),
    st.lists(tokens).map(tuple),
    st.lists(st.floats(-1e30, 0)).map(tuple),
)
outputs = st.builds(
    EngineCoreOutput,
    st.text(),
    st.lists(tokens),
    st.none() | st.lists(logprobs),
    st.none() | st.lists(logprobs),
    st.sampled_from([None, "stop", "length", "abort"]),
    st.none() | tokens,
    tokens,
    tokens,
    st.none() | st.floats(0, 1e9),
    st.lists(st.builds(DraftRound, st.integers(0, 16), st.integers(0, 16))),
)


def through(message, decode):
    """A message after a journey over the socket."""
    raw = frame(message)
    (length,) = struct.unpack("<I", raw[:4])
    assert length == len(raw) - 4
    return decode(raw[4:])


@given(params, st.lists(tokens, min_size=1), st.none() | st.text(), st.integers(-9, 9))
def test_request_arrives_as_it_was_sent(params, prompt, salt, priority):
    request = EngineCoreRequest("r1", tuple(prompt), params, 1.5, (0, 1), ((1, 2), (3,)), priority, salt)
    assert through(Submit.of(request), decode_to_engine).request() == EngineCoreRequest(
        "r1",
        tuple(prompt),
        SamplingParams(**{**vars(params), "output_kind": _delta()}),
        1.5,
        (0, 1),
        ((1, 2), (3,)),
        priority,
        salt,
    )


def _delta():
    from quire.engine.sampling_params import RequestOutputKind

    return RequestOutputKind.DELTA


@given(st.lists(outputs, max_size=3))
def test_outputs_arrive_as_they_were_sent(sent):
    message = through(Outputs([TokenOutput.of(output) for output in sent], 7), decode_from_engine)
    assert [wire.output() for wire in message.outputs] == sent
    assert message.num_step_tokens == 7


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("InvalidRequestError", InvalidRequestError),
        ("OutOfBlocksError", OutOfBlocksError),
        ("ZeroDivisionError", EngineDeadError),
        ("annotations", EngineDeadError),
    ],
)
def test_error_keeps_its_class_where_quire_has_one(name, kind):
    error = error_of(name, "what was wrong", "prompt")
    assert type(error) is kind
    assert "what was wrong" in str(error)
    assert getattr(error, "parameter", "prompt") == "prompt"


def test_what_is_there_at_the_start_is_not_looked_through_again() -> None:
    kept = [[] for _ in range(1000)]
    before = gc.get_freeze_count()
    try:
        set_aside_what_stays()
        assert gc.get_freeze_count() >= before + len(kept)
        assert not any(thing is kept[0] for thing in gc.get_objects())
    finally:
        gc.unfreeze()
