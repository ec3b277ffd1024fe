"""`LLM`: the engine for Python programs, spelled as vLLM spells it."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from quire.backends.base import Backend
from quire.engine.config import EngineConfig
from quire.engine.core import EngineCore, Progress
from quire.engine.input_processor import InputProcessor, ProcessedRequest, Prompt
from quire.engine.metrics import EngineStats
from quire.engine.output_processor import OutputProcessor
from quire.engine.outputs import RequestOutput
from quire.engine.progress import show_progress
from quire.engine.sampling_params import RequestOutputKind, SamplingParams
from quire.engine.tokenizer import Tokenizer, load_tokenizer
from quire.kernels.errors import InvalidConfigError, InvalidRequestError
from quire.kernels.sampling.rows import SamplingMode
from quire.models.checkpoint import resolve_model

# How long to sleep when requests wait for a batching window to pass and nothing runs, in seconds.
IDLE_SECONDS = 0.001


class LLM:
    """One model, ready to generate.

    Every setting of `quire.engine.config` is a keyword argument. Weights are loaded and every shape is compiled here, with a
    progress bar on a terminal; nothing is compiled afterwards. Streams and calls of `generate` may overlap on one thread,
    never on several. Ctrl-C ends the call that it interrupts, after the step that is being made, and leaves the rest whole.

        llm = LLM("demo")
        outputs = llm.generate(["def fibonacci(n):"], SamplingParams(temperature=0, max_tokens=64))
        print(outputs[0].outputs[0].text)
    """

    def __init__(
        self, model: str = "demo", *, progress: Progress | None = None, backend: Backend | None = None, **settings: Any
    ) -> None:
        """Raises InvalidConfigError, ModelError or BackendError; each says what was wrong and what to do.

        `progress(phase, done, total, what)` replaces the progress bar, `backend` the backend that `device` names.
        """
        config = EngineConfig.from_arguments(model=model, **settings)
        self.config = config
        self.tokenizer = load_tokenizer_of(config)
        with show_progress() as bar:
            self._core = EngineCore(config, progress or bar, backend)
        model_config, resolved = self._core.model, self._core.config
        self._inputs = InputProcessor(
            self.tokenizer,
            vocab_size=model_config.vocab_size,
            max_model_len=resolved.max_model_len,
            eos_token_ids=model_config.eos_token_ids,
            seed=config.model.seed,
            most_sampling=SamplingMode[config.device.sampling.upper()],
        )
        self._outputs = OutputProcessor(self.tokenizer)
        self._inboxes: dict[str, deque[RequestOutput]] = {}
        self._request_numbers = itertools.count()

    @property
    def core(self) -> EngineCore:
        """The engine core, for benchmarks and tests."""
        return self._core

    def stats(self) -> EngineStats:
        """A reading of every gauge and counter."""
        return self._core.stats()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts, all at once, and returns their outputs in order.

        Args:
            prompts: one or several; each a string, {"prompt": str}, {"prompt_token_ids": [...]} or a list of token ids.
            sampling_params: for all, or one for each prompt; the defaults of SamplingParams when left out. Their
                `output_kind` matters to `stream` alone.
            use_tqdm: show a progress bar with tokens per second.
            priority: one number per prompt, low first; needs scheduling_policy="priority".
            cache_salt: requests with different salts never share cached blocks.

        Raises InvalidRequestError for the first prompt that cannot be honoured, before any is run.
        """
        finished: dict[str, RequestOutput] = {}
        requests = self._process(prompts, sampling_params, priority, cache_salt, RequestOutputKind.FINAL_ONLY)
        num_tokens = 0
        with tqdm(total=len(requests), desc="prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
            begin = time.perf_counter()
            for output in self._run(requests):
                finished[output.request_id] = output
                num_tokens += sum(len(choice.token_ids) for choice in output.outputs)
                bar.set_postfix_str(f"{num_tokens / (time.perf_counter() - begin):.1f} output tokens/s", refresh=False)
                bar.update()
        return [finished[request.request_id] for request in requests]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Completes prompts and yields outputs as tokens come, in the kind that each `output_kind` asks for.

        Closing the iterator early aborts what is unfinished.
        """
        requests = self._process(prompts, sampling_params, None, None, None)
        return self._run(requests)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, each a list of {"role", "content"}, with the model's chat template.

        Args:
            add_generation_prompt: end the prompt where the assistant begins to speak.
            continue_final_message: leave the last message open instead, to be gone on with; excludes the former.
            chat_template: a Jinja template in place of the model's own.
            tools: functions that the template may describe to the model, as JSON schemas.
            chat_template_kwargs: what else the template is given, such as {"enable_thinking": False}.
        """
        if self.tokenizer is None:
            raise InvalidRequestError(
                "chat needs a tokenizer with a chat template, and there is none; set tokenizer to a model that has one",
                parameter="messages",
            )
        template_arguments: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template": chat_template,
            "tools": None if tools is None else list(tools),
            **(chat_template_kwargs or {}),
        }
        if not messages:
            raise InvalidRequestError("there are no messages; give at least one", parameter="messages")
        conversations = [messages] if isinstance(messages[0], Mapping) else messages
        prompts = [
            {
                "prompt_token_ids": self.tokenizer.apply_chat_template(
                    conversation,  # type: ignore[arg-type]
                    **template_arguments,
                )
            }
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def _process(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        cache_salt: str | None,
        output_kind: RequestOutputKind | None,
    ) -> list[ProcessedRequest]:
        """Checks every request before the first one runs."""
        many = _as_list(prompts)
        params = _one_each(SamplingParams() if sampling_params is None else sampling_params, len(many))
        if priority is not None and len(priority) != len(many):
            raise InvalidRequestError(
                f"{len(priority)} priorities for {len(many)} prompts; give one for each", parameter="priority"
            )
        if priority is not None and self.config.scheduler.scheduling_policy != "priority":
            raise InvalidRequestError(
                'priority is of no effect in order of arrival; start the engine with scheduling_policy="priority"',
                parameter="priority",
            )
        requests = []
        for idx, (prompt, wanted) in enumerate(zip(many, params, strict=True)):
            kind = output_kind or wanted.output_kind
            requests.append(
                self._inputs.process(
                    str(next(self._request_numbers)),
                    prompt,
                    replace(wanted, output_kind=kind),
                    priority=priority[idx] if priority is not None else 0,
                    cache_salt=cache_salt,
                )
            )
        return requests

    def _run(self, requests: Sequence[ProcessedRequest]) -> Iterator[RequestOutput]:
        """Runs requests to their end; what is left unfinished when the iterator is closed, or fails, is aborted.

        Several of these iterators may be open: a step goes on with the requests of all, and each finds its outputs in its inbox.
        """
        inbox: deque[RequestOutput] = deque()
        num_open = len(requests)
        try:
            with _interrupts_deferred():
                for request in requests:
                    self._outputs.add(request)
                    self._inboxes[request.request_id] = inbox
                    for choice in request.choices:
                        self._core.add_request(choice)
            while num_open:
                if not inbox:
                    self._step()
                while inbox:
                    output = inbox.popleft()
                    num_open -= output.finished
                    yield output
            while self._core.has_work and not self._outputs.num_unfinished:
                self._step()  # read what is in flight: the device is idle when the last caller is done
        finally:
            with _interrupts_deferred():
                for request in requests:
                    _, open_ids = self._outputs.abort(request.request_id)
                    self._inboxes.pop(request.request_id, None)
                    for request_id in open_ids:
                        self._core.abort_request(request_id)

    def _step(self) -> None:
        """One step of the engine; its outputs go to the inboxes of those who asked."""
        assert self._core.has_work, "a request is open and the engine has none"
        with _interrupts_deferred():
            step_outputs = self._core.step()
            outputs, to_abort = self._outputs.process(step_outputs)
            for request_id in to_abort:
                self._core.abort_request(request_id, has_finished=True)
            for output in outputs:
                self._inboxes[output.request_id].append(output)
        if not step_outputs and not self._core.is_busy:
            time.sleep(IDLE_SECONDS)


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Ctrl-C takes effect when the context ends: a step that is given up half-way leaves requests and device in disagreement.

    Python interrupts the main thread alone.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    received: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if received:
            signal.raise_signal(signal.SIGINT)


def load_tokenizer_of(config: EngineConfig) -> Tokenizer | None:
    """The tokenizer; None for random weights of a folder that has none, since such a model has no text anyway."""
    folder = resolve_model(config.model.tokenizer or config.model.model)
    try:
        return load_tokenizer(folder)
    except InvalidConfigError:
        if config.model.load_format == "dummy" and config.model.tokenizer is None:
            return None
        raise


def _as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    many = list(prompts)
    if many and isinstance(many[0], int):
        return [many]
    return many


def _one_each(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    if isinstance(params, (str, Mapping)) or not all(isinstance(one, SamplingParams) for one in params):
        raise InvalidRequestError(
            f"sampling_params is a SamplingParams, or one for each prompt, not {params!r}", parameter="sampling_params"
        )
    if len(params) != count:
        raise InvalidRequestError(
            f"{len(params)} sampling_params for {count} prompts; give one for all, or one for each",
            parameter="sampling_params",
        )
    return list(params)
