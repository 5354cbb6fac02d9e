"""What every command's JSON is made of."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Number: TypeAlias = int | float
Basis: TypeAlias = Literal["exact", "datasheet", "measured", "fitted", "modelled", "assumed"]


class Out(BaseModel):
    """A JSON object with these keys and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Command(Out):
    """What every command's output begins with."""

    schema_: Literal["isoflop/1"] = Field(alias="schema")
    command: str


class Interval(Out):
    low: float
    high: float
    level: float


class Node(Out):
    """One number of a breakdown: a branch has children per copy, a leaf a formula."""

    name: str
    unit: str
    value: Number
    basis: list[Basis]
    times: Number | None = None
    interval: Interval | None = None
    source: str | None = None
    children: list[Node] | None = None
    formula: str | None = None
    numbers: str | None = None
