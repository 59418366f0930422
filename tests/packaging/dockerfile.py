"""A reader of Dockerfiles, as far as the tests of ours need one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    """One instruction with its continuation lines joined: RUN, COPY, ... and what follows the keyword."""

    keyword: str
    value: str


@dataclass
class Stage:
    """What stands between one FROM and the next; `base` is an image or the name of an earlier stage."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def of(self, keyword: str) -> list[str]:
        return [each.value for each in self.instructions if each.keyword == keyword]


def read_instructions(text: str) -> Iterator[Instruction]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        if line.strip():
            keyword, _, value = line.strip().partition(" ")
            yield Instruction(keyword.upper(), value.strip())


def read_stages(text: str) -> list[Stage]:
    """The stages in order; instructions before the first FROM (ARGs) belong to none."""
    stages: list[Stage] = []
    for instruction in read_instructions(text):
        if instruction.keyword == "FROM":
            base, _, name = re.split(r"\s+", f"{instruction.value} AS {len(stages)}")[:3]
            stages.append(Stage(name, base))
        elif stages:
            stages[-1].instructions.append(instruction)
    return stages
