"""Where a model's files are: a local directory, or one commit of a hub repository."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_offline.errors import (
    InputError,
    MissingFileError,
    ModelError,
    UnsupportedModelError,
    first_line,
)
from pact_offline.files import read_json, remembered_checksum, status_of

_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
# The same weights again, in other layouts: `original/`, `onnx/`, and Mistral's own.
_UNWANTED = ["*/*", "consolidated*.safetensors"]
_WEIGHTS = "model.safetensors"


def looks_like_path(model: str) -> bool:
    """Whether a model name can only be a path (a hub id is NAME or OWNER/NAME, and @REVISION).

    Raises:
        InputError: the system cannot say, as of a name that is too long.
    """
    path, name = Path(model), model.partition("@")[0]
    return (
        status_of(path) is not None
        or path.is_absolute()
        or model.startswith(".")
        or name.count("/") > 1
    )


def hub_name(model: str) -> tuple[str, str | None]:
    """Repository, and revision where one is named, of a hub id.

    Raises:
        InputError: it names an empty one.
    """
    name, at, revision = model.partition("@")
    if at and not revision:
        raise InputError(f"{model}: expected NAME@REVISION, found no revision")
    return name, revision or None


def split_adapter(model: str) -> tuple[str, str | None]:
    """Model and adapter of MODEL+ADAPTER; the model alone of any other name.

    Raises:
        MissingFileError: there is no such adapter.
    """
    name, plus, adapter = model.rpartition("+")
    if not plus or not name or status_of(Path(model)) is not None:
        return model, None
    if status_of(Path(adapter)) is None or not Path(adapter).is_dir():
        raise MissingFileError(f"{model}: no such adapter directory: {adapter}")
    return name, adapter


def require_model(model: str) -> None:
    """Refuse a local model path that does not exist or holds no model, or broken settings of one.

    Raises:
        MissingFileError, ModelError: names the file.
    """
    model, _ = split_adapter(model)
    if not looks_like_path(model):
        return
    path = Path(model)
    if not path.exists():
        raise MissingFileError(f"{model}: no such model directory")
    if (path / "adapter_config.json").is_file():  # transformers would load it, pickled or not
        raise ModelError(f"{model}: expected a model directory, found an adapter; see --adapter")
    if not (path / "config.json").is_file():
        raise ModelError(f"{model}: expected a model directory with config.json, found none")
    _require_own_attention(_read_object(path / "config.json"), path / "config.json")
    if (path / "generation_config.json").is_file():  # transformers goes on without a broken one
        _read_object(path / "generation_config.json")


def _require_own_attention(config: dict[str, Any], place: Path) -> None:
    """Refuse a model that names a kernel of the hub: transformers would fetch and run it."""
    for key, value in config.items():
        if isinstance(value, dict):
            _require_own_attention(value, place)
        elif key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            raise ModelError(
                f"{place}: {key}: expected an implementation of transformers, found {value!r:.60}, "
                "code of a repository, which is never run; remove it, --attention says what is used"
            )


def require_safetensors(folder: Path) -> None:
    """Refuse a model whose weights transformers would not take from safetensors in its directory.

    transformers opens whatever an index or config.json names, pickles among it.

    Raises:
        ModelError: names the file.
    """
    config, index = folder / "config.json", folder / f"{_WEIGHTS}.index.json"
    if (named := _read_object(config).get("transformers_weights")) is not None:
        raise ModelError(
            f"{config}: transformers_weights: expected none, as weights are read from {_WEIGHTS}, "
            f"found {named!r:.60}"
        )
    if (folder / _WEIGHTS).is_file():
        return
    if not index.is_file():
        raise ModelError(f"{folder}: expected weights as {_WEIGHTS} or {index.name}, found neither")
    shards = _read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(
            f"{index}: weight_map: expected a file of each weight, found {shards!r:.60}"
        )
    for weight, shard in shards.items():
        if not (isinstance(shard, str) and shard.endswith(".safetensors") and "/" not in shard):
            raise ModelError(
                f"{index}: weight_map: {weight}: expected a file *.safetensors of this directory, "
                f"found {shard!r:.60}"
            )
        if not (folder / shard).is_file():
            raise ModelError(f"{index}: weight_map: {weight}: no such file: {shard}")


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = read_json(file)
    except InputError as error:
        raise ModelError(str(error)) from None
    if not isinstance(value, dict):
        raise ModelError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def why_not_loaded(error: Exception, folder: Path | None = None) -> str:
    """Why transformers could not load something, in one line; names a file of `folder` that is no
    JSON object."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own repository, which is never run"
    if "ignore_mismatched_sizes" in str(error):
        return "weights of other shapes than config.json's"
    if "instantiate the backend tokenizer" in str(error):  # and lists, line by line, what of
        return "none of the files that one is made of (tokenizer.json, or SentencePiece's)"
    for file in sorted(folder.glob("*.json")) if folder else ():
        try:
            _read_object(file)
        except ModelError as broken:
            return str(broken)
    return first_line(error)


# Of these a config counts the positions after stretching already, as vLLM reads it.
_POSITIONS_STRETCHED = {"llama3", "longrope", "su", "mrope"}


def positions_of(folder: Path) -> int | None:
    """The most tokens that a model in a directory can place; None where its config tells none."""
    config = _read_object(folder / "config.json")
    config = config.get("text_config") or config
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    scaling = scaling if isinstance(scaling, dict) else {}
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor", 1)
    if kind == "yarn":
        positions = scaling.get("original_max_position_embeddings", positions)
    elif kind in _POSITIONS_STRETCHED or str(config.get("model_type")).startswith("gemma3"):
        factor = 1
    if not isinstance(positions, int) or not isinstance(factor, int | float) or positions <= 0:
        return None
    return int(positions * max(1, factor))


def vocabulary_of(folder: Path) -> int | None:
    """The tokens that a model in a directory has; None where its config tells none."""
    config = _read_object(folder / "config.json")
    size = (config.get("text_config") or config).get("vocab_size")
    return size if isinstance(size, int) and size > 0 else None


def files_of(folder: Path) -> list[Path]:
    """The files of a local model that decide what it does, sorted; none where it is no folder."""
    return sorted({file for pattern in _WANTED for file in folder.glob(pattern)})


@dataclass(frozen=True)
class ModelFiles:
    """A model at one fixed state.

    Attributes:
        name: as the user gave it.
        path: local directory with config, tokenizer and safetensors.
        identity: what fixes the weights: hub id and commit, or SHA-256 of config and weight files;
            and of an adapter that was added up.
        checksums: of the files at `path`, where they are not the identity.
    """

    name: str
    path: Path
    identity: dict[str, str]
    checksums: dict[str, str] | None = None

    def require_unchanged(self) -> None:
        """Refuse a local model whose files are no longer those that were located.

        Raises:
            ModelError: they are not.
        """
        if self.checksums is None and "commit" in self.identity:  # a commit stays what it is
            return
        try:
            found = weight_checksums(self.path)
        except (OSError, ModelError):
            found = {}
        if found != (self.checksums or self.identity):
            raise ModelError(
                f"{self.path}: expected its config and weights to stay as they were when this "
                "command began, found others; run it again"
            )


def is_same_model(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two identities (`ModelFiles.identity`) are of the same weights.

    The hub gives a repository by its former name too, and by a name in other letters; a commit is
    of one repository's files alone.
    """
    return _fixed(one) == _fixed(other)


def _fixed(identity: Mapping[str, str]) -> dict[str, str]:
    return {
        key: value for key, value in identity.items() if key != "hub" or "commit" not in identity
    }


def locate_model(model: str) -> ModelFiles:
    """Find a model's files, fetching them from the hub (safetensors only) where needed.

    Args:
        model: a directory, or a hub id, with @REVISION (a branch, a tag or a commit) behind it
            where it is not to be the repository's main branch.

    Raises:
        MissingFileError: no such directory, or not on the hub and not in its local cache.
        ModelError: it has no weights as safetensors, or names others.
    """
    require_model(model)
    if looks_like_path(model):
        path = Path(model)
        return ModelFiles(model, path, weight_checksums(path))
    name, revision = hub_name(model)
    path = _snapshot(model, name, revision)
    require_model(str(path))
    require_safetensors(path)
    return ModelFiles(model, path, {"hub": name, "commit": path.name})


def _snapshot(model: str, name: str, revision: str | None) -> Path:
    """The folder of one commit of a repository, with all that is wanted of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
            )
        )
    except GatedRepoError:
        reason = (
            "the hub gives it only to who has accepted its terms there, and has logged in here "
            "(hf auth login)"
        )
    except RevisionNotFoundError:
        reason = f"the hub has no revision {revision!r} of it"
    except RepositoryNotFoundError:
        reason = "the hub has none of this name, or none for all to see (then: hf auth login)"
    except Exception as error:
        if (path := _loadable_snapshot(name, revision)) is not None:
            return path
        reason = f"the hub gave: {first_line(error)}"
    raise MissingFileError(f"{model}: no such directory, and {reason}")


def _loadable_snapshot(name: str, revision: str | None) -> Path | None:
    """The folder in the local cache, if a model can be loaded of it.

    Another tool may have fetched fewer files than are wanted here, such as none of a tokenizer that
    a model does not have.
    """
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # it is no name of the hub
        return None
    if not isinstance(config, str):
        return None
    path = Path(config).parent
    try:
        require_safetensors(path)
    except ModelError:
        return None
    return path


def weight_checksums(path: Path) -> dict[str, str]:
    """SHA-256 of a local model's config and of the weight files that transformers reads, by name.

    Others beside them, as of an optimizer or in Mistral's own layout, are not part of the model.
    """
    require_safetensors(path)
    names = ["config.json", *sorted(_weight_files(path))]
    return {name: remembered_checksum(path / name) for name in names}


def require_no_other_weights(path: Path) -> None:
    """Refuse a model beside whose weights lie others: vLLM reads every file, or an index first.

    Raises:
        UnsupportedModelError: names one of them.
    """
    names = _weight_files(path)
    others = {file.name for file in path.glob("*.safetensors")} - names
    if names == {_WEIGHTS} and others:  # of files in an index vLLM reads no other
        raise UnsupportedModelError(
            f"{path}: expected no weights beside {_WEIGHTS}, as vLLM would read them too, found "
            f"{min(others)}; use --backend transformers"
        )


def _weight_files(path: Path) -> set[str]:
    if (path / _WEIGHTS).is_file():  # it goes before an index
        return {_WEIGHTS}
    return {*_read_object(path / f"{_WEIGHTS}.index.json")["weight_map"].values()}
