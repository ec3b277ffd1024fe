"""Every error that quire raises on purpose.

    QuireError
    ├── InvalidRequestError (ValueError)     a prompt or a sampling parameter that cannot be honoured
    ├── InvalidConfigError (ValueError)      an engine setting, or a combination of settings, that cannot work
    ├── ModelError                           a checkpoint that cannot be used
    │   ├── UnsupportedModelError            architecture, quantization or feature that is not implemented
    │   └── CheckpointError                  a tensor missing, left over, or of the wrong shape
    ├── BackendError                         a device that is absent or cannot do what was asked
    │   └── KernelUnavailableError           an implementation asked for by name that cannot run here
    ├── NkiError                             an NKI kernel that breaks a rule of the hardware, found by the emulator
    ├── OutOfBlocksError                     the KV cache cannot hold even one request
    ├── EngineDeadError                      the engine failed earlier and takes no more work
    ├── NotServingError                      the server takes no request now: it is starting, or about to stop
    ├── QueueFullError                       more requests or prompt tokens wait than the server was told to hold
    └── RequestTimeoutError                  a request took longer than it was given

The tree stands on the lowest floor because every floor raises from it; users import it from `quire.engine`.
A message says what was wrong, the value, and the remedy.
"""


class QuireError(Exception):
    """The root: catch this to catch whatever quire raises on purpose."""


class InvalidRequestError(QuireError, ValueError):
    """A request that cannot be honoured. `parameter` names the offending field, so that a server can say which."""

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class InvalidConfigError(QuireError, ValueError):
    """An engine setting, or a combination of settings, that cannot work."""


class ModelError(QuireError):
    """A checkpoint that cannot be used."""


class UnsupportedModelError(ModelError):
    """An architecture, quantization or feature of a checkpoint that is not implemented."""


class CheckpointError(ModelError):
    """A checkpoint whose tensors do not match what its config promises."""


class BackendError(QuireError):
    """A device that is absent, or that cannot do what was asked."""


class KernelUnavailableError(BackendError):
    """An implementation that was asked for by name and cannot run here."""


class NkiError(QuireError):
    """An NKI kernel that breaks a rule of the hardware. `rule` names it, `place` is the kernel's line as file:line."""

    def __init__(self, message: str, *, rule: str, generation: str, place: str) -> None:
        super().__init__(f"{place}: {rule} ({generation}): {message}")
        self.rule = rule
        self.generation = generation
        self.place = place


class OutOfBlocksError(QuireError):
    """The KV cache cannot hold even one request."""


class EngineDeadError(QuireError):
    """The engine failed earlier and takes no more work."""


class NotServingError(QuireError):
    """The server takes no request now: it is starting, draining, or was stopped while the request ran."""


class QueueFullError(QuireError):
    """More requests or prompt tokens wait than the server was told to hold. `retry_after` is when to try again, in seconds."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestTimeoutError(QuireError):
    """A request took longer than it was given."""
