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
        category: name of the column with a prompt's category.
        files: of a set that is shipped as several files, with a prompt a line and no names of
            columns: the name of each, and its category.
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
    category: str = "category"
    files: Mapping[str, str] = field(default_factory=dict)


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
        category="SemanticCategory",
    ),
    "jailbreakbench": PublishedSet(
        "JailbreakBench (harmful)",
        "refuse",
        "hub:JailbreakBench/JBB-Behaviors:behaviors:harmful",
        ("Goal", "goal", "prompt"),
        100,
        "Chao et al. 2024, arXiv 2404.01318",
        category="Category",
    ),
    "jailbreakbench-benign": PublishedSet(
        "JailbreakBench (benign)",
        "answer",
        "hub:JailbreakBench/JBB-Behaviors:behaviors:benign",
        ("Goal", "goal", "prompt"),
        100,
        "Chao et al. 2024, arXiv 2404.01318",
        category="Category",
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
        files={
            "category_1.csv": "illegal activity",
            "category_3.csv": "hate, harassment and violence",
            "category_4.csv": "malware",
            "category_5.csv": "physical harm",
            "category_6.csv": "economic harm",
            "category_7.csv": "fraud and deception",
            "category_8.csv": "adult content",
            "category_9.csv": "political campaigning",
            "category_10.csv": "privacy violation",
            "category_11.csv": "tailored financial advice",
        },
    ),
    "xstest-safe": PublishedSet(
        "XSTest (safe)",
        "answer",
        "hub:walledai/XSTest:test",
        ("prompt",),
        250,
        "Röttger et al. 2023, arXiv 2308.01263",
        takes={"label": "safe"},
        leaves={"type": "contrast_"},
        category="type",
    ),
    "xstest-unsafe": PublishedSet(
        "XSTest (unsafe)",
        "refuse",
        "hub:walledai/XSTest:test",
        ("prompt",),
        200,
        "Röttger et al. 2023, arXiv 2308.01263",
        takes={"label": "unsafe", "type": "contrast_"},
        category="type",
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
