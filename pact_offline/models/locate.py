"""Where a model's files are: a local directory, or one commit of a hub repository."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pact_offline.errors import MissingFileError, ModelError, first_line
from pact_offline.files import remembered_checksum

_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def looks_like_path(model: str) -> bool:
    """Whether a model name can only be a path (a hub id is NAME or OWNER/NAME)."""
    path = Path(model)
    return path.exists() or path.is_absolute() or model.startswith(".") or model.count("/") > 1


def require_model(model: str) -> None:
    """Refuse a local model path that does not exist or holds no model."""
    if not looks_like_path(model):
        return
    path = Path(model)
    if not path.exists():
        raise MissingFileError(f"{model}: no such model directory")
    if (path / "adapter_config.json").is_file():  # transformers would load it, pickled or not
        raise ModelError(f"{model}: expected a model directory, found an adapter; see --adapter")
    if not (path / "config.json").is_file():
        raise ModelError(f"{model}: expected a model directory with config.json, found none")


def why_not_loaded(error: Exception) -> str:
    """Why transformers could not load something, in one line."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own repository, which is never run"
    return first_line(error)


def files_of(folder: Path) -> list[Path]:
    """The files of a local model that decide what it does, sorted; none where it is no folder."""
    return sorted({file for pattern in _WANTED for file in folder.glob(pattern)})


@dataclass(frozen=True)
class ModelFiles:
    """A model at one fixed state.

    Attributes:
        name: as the user gave it.
        path: local directory with config, tokenizer and safetensors.
        identity: what fixes the weights: hub id and commit, or SHA-256 of config and weight files.
    """

    name: str
    path: Path
    identity: dict[str, str]

    def require_unchanged(self) -> None:
        """Refuse a local model whose files are no longer those that were located.

        Raises:
            ModelError: they are not.
        """
        if "commit" in self.identity:  # a commit stays what it is
            return
        try:
            found = _weight_checksums(self.path)
        except (OSError, ModelError):
            found = {}
        if found != self.identity:
            raise ModelError(
                f"{self.path}: expected its config and weights to stay as they were when this "
                "command began, found others; run it again"
            )


def locate_model(model: str) -> ModelFiles:
    """Find a model's files, fetching them from the hub (safetensors only) where needed.

    Raises:
        MissingFileError: no such directory, or not on the hub and not in its local cache.
        ModelError: the directory holds no safetensors.
    """
    require_model(model)
    if looks_like_path(model):
        path = Path(model)
        return ModelFiles(model, path, _weight_checksums(path))
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(model, allow_patterns=_WANTED))
    except Exception as error:
        raise MissingFileError(
            f"{model}: no such directory, and the hub gave: {first_line(error)}"
        ) from None
    return ModelFiles(model, path, {"hub": model, "commit": path.name})


def _weight_checksums(path: Path) -> dict[str, str]:
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{path}: expected weights as *.safetensors, found none")
    return {file.name: remembered_checksum(file) for file in [path / "config.json", *weights]}
