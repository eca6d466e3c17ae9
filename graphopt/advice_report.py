"""What `graphopt advise` says, as data with a published schema."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from graphopt.advice_machine import Situation
from graphopt.report import Environment, Row, Versioned

Verdict = Literal["do", "try", "unsure", "refuse"]


class Figure(Row):
    """A ratio to the original, and how it is known."""

    value: float
    low: float = Field(description="measured: the interval of the median; estimated: the range that the assumption allows")
    high: float
    basis: Literal["measured", "estimated"]
    of: str = Field(description="what was measured, or what the estimate rests on")


class Quality(Row):
    """The result against the original on rows that it was not calibrated with."""

    rows: int
    agreement: float | None = Field(description="share of rows with the same argmax; null: outputs have none")
    sqnr_db: float | None = Field(description="of the output that moved most; null: no error at all")
    metric: str | None = Field(description="null: the rows have no labels")
    original: float | None
    result: float | None
    lost: int | None
    won: int | None
    p_value: float | None


class Advice(Row):
    """One technique."""

    technique: str
    what: str
    passes: str | None = Field(description="what was carried out, or would be; null: not a pass of graphopt")
    speed: Figure | None = Field(description="the original's latency over the result's; null: not known, `why` says why")
    size: Figure | None = Field(description="bytes of the result's file over the original's")
    quality: Quality | None = Field(description="null: there were no rows to measure it on")
    risk: str = Field(description="to quality")
    needs: str
    verdict: Verdict = Field(
        description="do: it pays, and quality is known to hold; try: it pays, quality must be measured; "
        "unsure: the figures do not decide; refuse: it does not pay, or costs too much quality"
    )
    why: str
    commands: list[str]


class AdviceReport(Versioned):
    """What `graphopt advise` found; the best first."""

    environment: Environment
    model: str
    target: str
    here: bool = Field(description="whether the target is this machine, so that what is measured counts")
    data: str
    slack: float = Field(description="quality that may be lost")
    seconds: float
    situation: Situation | None = Field(description="null: the model could not be profiled, see the warnings")
    noise: Figure | None = Field(description="the original against itself: what the machine's noise makes of a ratio of 1")
    advice: list[Advice]
    warnings: list[str]
