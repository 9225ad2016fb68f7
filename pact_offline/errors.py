"""The errors that pact-offline raises on purpose.

Each is a `PactError`, which the command line turns into one line and exit code 2, and also the
built-in kind that fits, so that library users can catch what they know. Messages name the file,
line or key, what was expected and what was found.
"""


class PactError(Exception):
    """Base of every error that a user can mend."""


class MissingFileError(PactError, FileNotFoundError):
    """A file, directory or model that was named does not exist."""


class InputError(PactError, ValueError):
    """A file exists but does not hold what it should."""


class SettingError(PactError, ValueError):
    """A setting has an unknown name or a value of the wrong kind or range."""


class ModelError(PactError, ValueError):
    """A model or tokenizer cannot be used for what was asked."""


class UnsupportedModelError(ModelError):
    """vLLM does not run a model; transformers may."""


class ScoringError(PactError, RuntimeError):
    """A scorer did not return what it was asked for."""


class StoreError(PactError, ValueError):
    """A store, shard or targets.json is damaged or in another format."""


class DamagedError(StoreError):
    """A shard's bytes are not those that were written; unlike a fault of the place it lies in."""


class MissingTargetError(PactError, LookupError):
    """A context has no stored target."""


class TargetsMismatchError(PactError, ValueError):
    """The targets were made for another model, tokenizer, safety token set or rows."""


class CheckFailedError(PactError, RuntimeError):
    """A product did not pass its own check."""


class TrainingError(PactError, RuntimeError):
    """Training cannot go on."""


class MeasurementError(PactError, RuntimeError):
    """A measurement could not be made."""


class Interrupted(KeyboardInterrupt):
    """A command was stopped by Ctrl-C; its text says what was kept, and where it goes on."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, and the next after a colon; its kind where empty."""
    lines = [stripped for line in str(error).splitlines() if (stripped := line.strip())]
    if not lines:
        return type(error).__name__
    if isinstance(error, KeyError):
        return f"no {lines[0]}"
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
