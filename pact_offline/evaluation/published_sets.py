"""Published prompt sets by name: where each is, in what form, and what a right answer to it is.

None is part of this project. Each is read from the hub, or from the file that its repository ships.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["refuse", "answer", "task"]


@dataclass(frozen=True)
class PublishedSet:
    """A published set of prompts.

    Attributes:
        title: as its authors write it.
        kind: what a right answer does.
        hub: where it is on the hub, `hub:NAME[:CONFIG[:SPLIT]]`.
        columns: names of the column with the prompt, in the hub's form and in the files'.
        takes: of these columns, where a row has them, only these values are of this set.
        leaves: and these are not.
        is_bare: its files have a prompt a line and no names of columns.
        count: prompts that it was published with.
        citation: of its paper.
    """

    title: str
    kind: Kind
    hub: str
    columns: tuple[str, ...]
    count: int
    citation: str
    takes: Mapping[str, str] = field(default_factory=dict)
    leaves: Mapping[str, str] = field(default_factory=dict)
    is_bare: bool = False


PUBLISHED_SETS: dict[str, PublishedSet] = {
    "strongreject": PublishedSet(
        "StrongREJECT",
        "refuse",
        "hub:walledai/StrongREJECT",
        ("forbidden_prompt", "prompt"),
        313,
        "Souly et al. 2024, arXiv 2402.10260",
    ),
    "harmbench": PublishedSet(
        "HarmBench (standard)",
        "refuse",
        "hub:walledai/HarmBench:standard",
        ("Behavior", "prompt"),
        200,
        "Mazeika et al. 2024, arXiv 2402.04249",
        takes={"FunctionalCategory": "standard"},
    ),
    "jailbreakbench": PublishedSet(
        "JailbreakBench (harmful)",
        "refuse",
        "hub:JailbreakBench/JBB-Behaviors:behaviors:harmful",
        ("Goal", "goal", "prompt"),
        100,
        "Chao et al. 2024, arXiv 2404.01318",
    ),
    "jailbreakbench-benign": PublishedSet(
        "JailbreakBench (benign)",
        "answer",
        "hub:JailbreakBench/JBB-Behaviors:behaviors:benign",
        ("Goal", "goal", "prompt"),
        100,
        "Chao et al. 2024, arXiv 2404.01318",
    ),
    "advbench": PublishedSet(
        "AdvBench",
        "refuse",
        "hub:walledai/AdvBench",
        ("goal", "prompt"),
        520,
        "Zou et al. 2023, arXiv 2307.15043",
    ),
    "hex-phi": PublishedSet(
        "HEx-PHI",
        "refuse",
        "hub:LLM-Tuning-Safety/HEx-PHI",
        ("instruction", "prompt"),
        300,
        "Qi et al. 2023, arXiv 2310.03693",
        is_bare=True,
    ),
    "xstest-safe": PublishedSet(
        "XSTest (safe)",
        "answer",
        "hub:walledai/XSTest",
        ("prompt",),
        250,
        "Röttger et al. 2023, arXiv 2308.01263",
        takes={"label": "safe"},
        leaves={"type": "contrast_"},
    ),
    "xstest-unsafe": PublishedSet(
        "XSTest (unsafe)",
        "refuse",
        "hub:walledai/XSTest",
        ("prompt",),
        200,
        "Röttger et al. 2023, arXiv 2308.01263",
        takes={"label": "unsafe", "type": "contrast_"},
    ),
    "or-bench-hard": PublishedSet(
        "OR-Bench-Hard-1K",
        "answer",
        "hub:bench-llm/or-bench:or-bench-hard-1k",
        ("prompt",),
        1319,
        "Cui et al. 2024, arXiv 2405.20947",
    ),
}
