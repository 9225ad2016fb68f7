"""Make train, test and validation.jsonl, the support-message data set, from pieces.yaml.

A message is one core text (a problem that belongs to one queue), now and then with an opening
before it, a context sentence of no queue before or after it, and a closing. The pools of the three
splits share no piece and every draw comes from a seeded generator, so each run writes the same
bytes. Run it as `python data/support/make.py`.
"""

import json
import random
import re
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
QUEUES = ("Billing", "Shipping", "Returns", "Technical", "Account", "Sales")
INSTRUCTION = f"Which queue: {', '.join(QUEUES[:-1])} or {QUEUES[-1]}?"
SHARES = {"openings": 0.40, "contexts": 0.45, "closings": 0.30}
SIZES = {"train": 600, "test": 200, "validation": 120}
SLOT = re.compile(r"\{(.*?)\}")
DRAWN = {"order", "amount"}  # slots that are drawn here and have no list in pieces.yaml
TRIES = 100


def check(pieces: dict[str, Any]) -> None:
    """Raise ValueError when a piece stands in two pools or names an unknown slot."""
    pools = [pieces[kind] for kind in SHARES] + [pieces["cores"][queue] for queue in QUEUES]
    seen: set[str] = set()
    for split in SIZES:
        of_split = {text for pool in pools for text in pool[split]}
        if shared := seen & of_split:
            raise ValueError(f"these pieces stand in two pools: {sorted(shared)}")
        seen |= of_split
    for text in sorted(seen):
        if unknown := set(SLOT.findall(text)) - set(pieces["slots"]) - DRAWN:
            raise ValueError(f"unknown slots {sorted(unknown)} in the piece {text!r}")


def make_message(pieces: dict[str, Any], split: str, core: str, rng: random.Random) -> str:
    """Return the core with randomly chosen optional pieces around it, all slots filled."""
    extra = {
        kind: rng.choice(pieces[kind][split]) if rng.random() < share else ""
        for kind, share in SHARES.items()
    }
    body = [extra["contexts"], core] if rng.random() < 0.5 else [core, extra["contexts"]]
    values = {slot: str(rng.choice(choices)) for slot, choices in pieces["slots"].items()}
    values["order"] = str(rng.randrange(100_000, 1_000_000))
    values["amount"] = f"{rng.randrange(20, 250)}.{rng.choice(('00', '50', '90', '95', '99'))}"
    text = " ".join(part for part in (extra["openings"], *body, extra["closings"]) if part)
    return SLOT.sub(lambda match: values[match.group(1)], text)


def make_rows(pieces: dict[str, Any], split: str, count: int, seed: int) -> list[dict[str, str]]:
    """Return `count` shuffled rows of one split, balanced over queues and over core texts."""
    check(pieces)
    rng = random.Random(seed)
    messages: dict[str, str] = {}
    for number, queue in enumerate(QUEUES):
        cores: list[str] = list(pieces["cores"][queue][split])
        rng.shuffle(cores)
        for turn in range(count // len(QUEUES) + (number < count % len(QUEUES))):
            for _ in range(TRIES):
                text = make_message(pieces, split, cores[turn % len(cores)], rng)
                if text not in messages:
                    break
            else:
                raise ValueError(f"too few pieces for {count} different messages in {split!r}")
            messages[text] = queue
    rows = [
        {"instruction": INSTRUCTION, "input": text, "output": queue}
        for text, queue in messages.items()
    ]
    rng.shuffle(rows)
    return rows


def main() -> None:
    """Write all splits next to this script."""
    pieces = yaml.safe_load((HERE / "pieces.yaml").read_text(encoding="utf-8"))
    for seed, (split, count) in enumerate(SIZES.items(), start=1):
        rows = make_rows(pieces, split, count, seed)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (HERE / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
