"""The model under evaluation: the reference itself, or what fine-tuning made of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_offline.errors import ModelError, PactError, TargetsMismatchError
from pact_offline.fine_tuned import FineTuned, read_facts
from pact_offline.models.load import load_model
from pact_offline.models.locate import is_same_model
from pact_offline.references import locate_reference
from pact_offline.rows.chat import Chat
from pact_offline.rows.tokenizer import load_tokenizer, tokenizer_fingerprint
from pact_offline.settings.stages import CHAT_ALIKE

log = logging.getLogger(__name__)

# Of what a run says of itself, beside its settings.
_KEPT = (
    "sources", "turns_refused", "tokens_refused", "targets_sha256", "rehearsal_sha256",
    "rehearsal_weight", "metrics",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model, and what was made of it.

    Attributes:
        model: name of the model before fine-tuning.
        identity: its `ModelFiles.identity`.
        folder: a model directory; its tokenizer is used.
        tuned: the adapter, or the whole model that counts instead; None for the model itself.
    """

    model: str
    identity: dict[str, str]
    folder: Path
    tuned: FineTuned | None

    @property
    def run(self) -> dict[str, Any]:
        """Settings and outcome of the fine-tuning run, as far as they are known."""
        facts = self.tuned.facts if self.tuned else None
        if facts is None:
            return {}
        holds = facts.get("holds", facts["settings"].get("objective") != "none")
        kept = {name: facts[name] for name in _KEPT if name in facts}
        return {**facts["settings"], "holds": holds, **kept}

    @property
    def engine_model(self) -> Path:
        """Folder of the weights that an engine loads: the whole model, or the one below an
        adapter."""
        return self.tuned.folder if self.tuned and self.tuned.is_whole else self.folder

    @property
    def engine_adapter(self) -> Path | None:
        """Folder of the adapter on top of it."""
        return self.tuned.folder if self.tuned and not self.tuned.is_whole else None

    @property
    def load_in(self) -> str | None:
        """Bits of the weights below an adapter, where it was trained on few."""
        return self.run.get("load_in") if self.engine_adapter else None

    def check_chat(self, chat: Chat) -> None:
        """Refuse another chat template, or other variables of it, than a run was trained with.

        What `finetune` did not make does not say; but a tokenizer beside it may.

        Raises:
            TargetsMismatchError: it was.
        """
        facts = self.tuned.facts if self.tuned else None
        if self.tuned and facts is None:
            theirs = self.tuned.chat_template
            if theirs is not None and theirs != chat.tokenizer.chat_template:
                log.warning(
                    "%s: the tokenizer there has another chat template than prompts are rendered "
                    "by; --chat-template FILE takes it",
                    self.tuned.folder,
                )
        if facts is None or "template" not in facts:
            return
        known = facts["template"], facts["settings"].get("chat_template_kwargs", {})
        if known != (chat.template_sha256, chat.template_kwargs):
            raise TargetsMismatchError(
                f"{self.tuned and self.tuned.folder}: expected a run with the chat template sha256 "
                f"{chat.template_sha256:.12} and variables {chat.template_kwargs}, found one with "
                f"{known[0]:.12} and {known[1]}; {CHAT_ALIKE}"
            )

    def load(self, dtype: str) -> Any:
        """The model with its adapter; over weights in few bits where it was trained so.

        Raises:
            ModelError, InputError: model or adapter cannot be loaded.
        """
        if self.tuned is None or self.tuned.is_whole:
            return load_model(str(self.engine_model), dtype)
        return self.tuned.added_to(load_model(str(self.folder), dtype, load_in=self.load_in))

    def find_reference(self, name: str) -> Path | None:
        """The folder of the model before fine-tuning; None: it is not there, or is another now.

        Args:
            name: its name in the reference's evaluation; looked up where the subject is a whole
                model that was given without the one that it was made from.
        """
        if self.tuned is None or self.tuned.folder != self.folder:
            return self.folder
        try:
            files = locate_reference(name)
        except PactError:
            return None
        return files.path if is_same_model(files.identity, self.identity) else None


def find_subject(model: str, adapter: Path | None) -> Subject:
    """What `--model` and `--adapter` name; no weights are loaded.

    A model that `finetune` or `merge` wrote is a run of the model that it was made from.

    Raises:
        MissingFileError, ModelError, InputError: model or adapter is not there, or no such thing.
        TargetsMismatchError: the adapter is of another model.
    """
    files = locate_reference(model)
    if adapter is None:
        facts = read_facts(files.path)
        if facts is None:
            return Subject(files.name, files.identity, files.path, None)
        tuned = FineTuned.read(files.path)
        return Subject(facts["model"], facts["model_identity"], files.path, tuned)
    tuned = FineTuned.read(adapter)
    tuned.require_of(files)
    if tuned.is_whole:
        ours, theirs = (load_tokenizer(str(folder)) for folder in (files.path, adapter))
        if tokenizer_fingerprint(ours) != tokenizer_fingerprint(theirs):
            raise ModelError(f"{adapter}: expected the vocabulary of {model}, found another")
    return Subject(files.name, files.identity, files.path, tuned)
