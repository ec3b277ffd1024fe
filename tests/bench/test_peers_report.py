"""Figures out of token times, medians and ratios out of figures, and what people are shown of them."""

import json

import pytest

from quire.bench.peers.chart import write_chart
from quire.bench.peers.report import Figure, summarize, table
from quire.bench.peers.workload import (
    DEFAULT_CASES,
    Case,
    Requests,
    decode_rate,
    max_model_len,
    max_num_seqs,
    num_kv_tokens,
)
from quire.kernels.errors import InvalidConfigError
from quire.server.cli import main

CASES = tuple(map(Case.parse, DEFAULT_CASES))


def record(engine, case, round_number, value=None, **more):
    base = {"benchmark": "peers", "shape": "tiny", "engine": engine, "version": "1", "runs": "so", "threads": 2}
    return {**base, "round": round_number, "case": case, **({} if value is None else {"value": value}), **more}


RECORDS = [
    record("quire", "decode-8", 1, 90.0, other_load=0.01, quiet=True, first_tokens=[1, 2]),
    record("vllm", "decode-8", 1, 50.0, other_load=0.5, quiet=False, first_tokens=[1, 2]),
    record("llama.cpp", "decode-8", 1, 40.0, first_tokens=[1, 3]),
    record("quire", "decode-8", 2, 110.0),
    record("vllm", "decode-8", 2, 52.0),
    record("quire", "ready-warm", 1, 3.0),
    record("vllm", "ready-warm", 1, 60.0),
    record("llama.cpp", "ready-warm", 1, 1.5),
    record("openvino", None, 0, error="not installed in /somewhere"),
    record("vllm", "mixed-64", 1, error="no answer within 9 s"),
]


def test_decoding_is_timed_from_the_last_first_token_to_the_first_last_one():
    early, late = [0.0, 1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0, 6.0]
    assert decode_rate([early, late]) == 4 / 2.0  # the tokens at 3 and 4 of both, in the 2 s from 2 to 4
    assert decode_rate([early]) == 1.0
    with pytest.raises(ValueError, match="at no moment"):
        decode_rate([[0.0, 1.0], [1.0, 2.0]])


def test_prefill_and_mixed_count_their_tokens_over_the_whole_run():
    requests = Requests(((1,) * 100, (1,) * 20), (2, 1))
    assert Case.parse("prefill-100").figure(Requests(((1,) * 100,), (1,)), [[0.5]]) == 200.0
    assert Case.parse("mixed-2").figure(requests, [[0.5, 1.5], [1.0]]) == 2.0


@pytest.mark.parametrize("times", [[[0.5], [1.0]], [[0.5, 1.0, 1.5], [1.0]]])
def test_an_output_of_another_length_than_asked_for_is_no_figure(times):
    with pytest.raises(ValueError, match="where 2 were asked for"):
        Case.parse("mixed-2").figure(Requests(((1,), (1,)), (2, 1)), times)


def test_everybody_gets_the_same_requests_and_warms_up_on_others():
    for case in CASES:
        if case.has_requests:
            requests = case.requests(1000)
            assert requests == case.requests(1000)
            assert not set(requests.prompts) & set(case.warm_up(1000).prompts)
            assert all(3 <= token_id < 1000 for prompt in requests.prompts for token_id in prompt)


def test_the_mixed_workload_is_what_the_description_says():
    requests = Case.parse("mixed-64").requests(49_152)
    lens = [len(prompt) for prompt in requests.prompts]
    assert len(lens) == 64
    assert min(lens) >= 16
    assert max(lens) <= 512
    assert sum(lens) > 12_000
    assert min(requests.output_lens) >= 16
    assert max(requests.output_lens) <= 256


def test_every_request_fits_what_engines_are_given():
    for case in CASES:
        if case.has_requests:
            requests = case.requests(1000)
            longest = max(len(p) + n for p, n in zip(requests.prompts, requests.output_lens, strict=True))
            assert longest <= max_model_len([case])
            assert min(len(requests.prompts), max_num_seqs([case])) * longest <= num_kv_tokens([case])


@pytest.mark.parametrize("name", ["decode", "decode-0", "decode-x", "ready", "sing-3", ""])
def test_what_is_no_case_is_refused(name):
    with pytest.raises(InvalidConfigError, match="is none of"):
        Case.parse(name)


def test_figures_are_medians_with_their_bounds():
    summary = summarize(RECORDS)
    assert summary.figures["quire", "decode-8"] == Figure(100.0, 90.0, 110.0, 2)
    assert summary.figures["quire", "decode-8"].spread == pytest.approx(0.2)
    assert summary.engines == ("quire", "vllm", "openvino", "llama.cpp")


def test_a_ratio_above_one_is_better_whichever_way_is_up():
    summary = summarize(RECORDS)
    decode, ready = Case.parse("decode-8"), Case.parse("ready-warm")
    assert summary.best_peer(decode)[0] == "vllm"
    assert summary.ratio("quire", decode) == pytest.approx(100 / 51)
    assert summary.best_peer(ready)[0] == "llama.cpp"
    assert summary.ratio("quire", ready) == pytest.approx(0.5)
    assert summary.ratio("quire", Case.parse("mixed-64")) is None


def test_engines_that_ran_something_else_show_in_their_first_tokens():
    assert summarize(RECORDS).agreement == {"quire": 1.0, "vllm": 1.0, "llama.cpp": 0.5}


def test_the_table_has_every_figure_and_every_reason_for_none():
    text = table(summarize(RECORDS))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["", "quire", "vLLM", "OpenVINO", "llama.cpp", "quire / best peer"]
    decode = next(row for row in rows if row[0].startswith("decode, 8"))
    assert decode[1:] == ["100 (90..110)", "51 (50..52)", "", "40 (40..40)", "1.96 (vLLM)"]
    assert "left out: OpenVINO: not installed in /somewhere" in text
    assert "left out: vLLM, mixed-64: no answer within 9 s" in text
    assert "at most 50.0 % of the machine; 1 measurements began before it was quiet" in text


def test_an_earlier_run_is_read_back_and_drawn(tmp_path, capsys):
    path, chart = tmp_path / "runs.jsonl", tmp_path / "chart.png"
    path.write_text("".join(json.dumps(line) + "\n" for line in RECORDS))
    assert main(["bench", "peers", "--read", str(path), "--chart", str(chart)]) == 0
    assert capsys.readouterr().out.strip() == table(summarize(RECORDS)).strip()
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_a_chart_of_quire_with_several_arguments_is_drawn(tmp_path):
    more = [record("quire quantization=int8", case.name, 1, 3.0) for case in CASES]
    write_chart(summarize([*RECORDS, *more]), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000


def test_a_file_of_something_else_is_refused(tmp_path, capsys):
    path = tmp_path / "other.jsonl"
    path.write_text('{"benchmark": "offline"}\n')
    assert main(["bench", "peers", "--read", str(path)]) == 2
    assert "does not hold JSON lines of quire bench peers" in capsys.readouterr().err
