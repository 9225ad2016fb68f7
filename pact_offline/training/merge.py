"""`merge`: an adapter and its model become one model."""

from __future__ import annotations

import logging
from pathlib import Path

from pact_offline.errors import InputError
from pact_offline.files import write_json
from pact_offline.fine_tuned import FineTuned
from pact_offline.folders import RUN_FILE, output_aside
from pact_offline.models.locate import ModelFiles
from pact_offline.references import save_merged
from pact_offline.settings.stages import Dtype
from pact_offline.training.model_card import model_card

log = logging.getLogger(__name__)


def merge(model: ModelFiles, adapter: Path, output: Path, dtype: Dtype) -> None:
    """Add an adapter to its model in fp32, and write the result in `dtype`.

    Raises:
        MissingFileError, InputError: not an adapter of `finetune`.
        TargetsMismatchError: the adapter is of another model.
    """
    tuned = FineTuned.read(adapter)
    if tuned.facts is None:
        found = "a model" if tuned.is_whole else "an adapter"
        raise InputError(
            f"{adapter}: expected an adapter from `pact-offline finetune`, or a model that it "
            f"trained in full, found {found} with none of its {RUN_FILE}"
        )
    tuned.require_of(model)
    if (load_in := tuned.facts["settings"].get("load_in")) is not None:
        log.warning(
            "%s was trained over weights in %s; merged into the full ones it is nearly what was "
            "trained, and not the same",
            adapter,
            load_in,
        )
    with output_aside(output) as aside:
        save_merged(model, tuned, aside, dtype)
        settings = {**tuned.facts["settings"], "method": "full"}  # what the card says it is now
        card = model_card({**tuned.facts, "settings": settings})
        (aside / "README.md").write_text(card, encoding="utf-8")
        write_json(aside / RUN_FILE, {**tuned.facts, "merged_from": str(adapter)})
