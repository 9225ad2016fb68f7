"""Make train, test and validation.jsonl, the appointment messages, from pieces.yaml.

A message tells when somebody is expected, with whom and what for, and half of them name another day
or time beside it. The answer is one line: day, time, what, with whom. It is free text and no label,
and is right when it is that line. Every draw comes from a seeded generator, so each run writes the
same bytes. Run it as `python data/appointments/make_appointments.py`.
"""

import json
import random
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
INSTRUCTION = "Write this as one line: day time, what, with whom."
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
SIZES = {"train": 400, "test": 200, "validation": 120}


def make_rows(
    pieces: dict[str, dict[str, list[str]]], split: str, rng: random.Random
) -> list[dict[str, str]]:
    """Return the rows of one split, no two with one message, every text as often as the others."""
    texts = pieces["texts"][split]
    rows: dict[str, str] = {}
    while len(rows) < SIZES[split]:
        text = texts[len(rows) % len(texts)]
        day, old_day = rng.sample(DAYS, 2)
        hour, old_hour = rng.sample(range(8, 19), 2)
        minutes, old_minutes = rng.choices(("00", "15", "30", "45"), k=2)
        what, who = rng.choice(pieces["what"][split]), rng.choice(pieces["who"][split])
        time = f"{hour}:{minutes}"
        message = text.format(
            what=what,
            who=who,
            day=day,
            time=time,
            old_day=old_day,
            old_time=f"{old_hour}:{old_minutes}",
        )
        rows[message] = f"{day} {time}, {what}, with {who}"
    shuffled = rng.sample(sorted(rows), len(rows))
    return [{"instruction": INSTRUCTION, "input": text, "output": rows[text]} for text in shuffled]


def main() -> None:
    """Write all splits next to this script."""
    pieces = yaml.safe_load((HERE / "pieces.yaml").read_text(encoding="utf-8"))
    for seed, split in enumerate(SIZES, start=1):
        rows = make_rows(pieces, split, random.Random(seed))
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (HERE / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
