"""What the planner asks of its compiling process and what it is told. Imports nothing heavy."""

from dataclasses import dataclass, field
from typing import Literal

from hvd import documents

Compiler = Literal["cuda", "cpu"]
Stage = Literal["value", "policy"]


@dataclass(frozen=True)
class Request:
    """One program to measure.

    Attributes:
        argv: `--config NAME --dotted.field value ...`.
        device: name in hvd.accelerators.ACCELERATORS.
        limit: bytes of a device; where parameters, optimiser and gradients need more, nothing is compiled.
        enough: bytes; where they need less, nothing is compiled either.
        arguments_only: compile nothing in any case.
    """

    argv: list[str]
    stage: Stage
    device: str
    per_node: int
    nodes: int
    compiler: Compiler
    limit: int
    enough: int = 0
    arguments_only: bool = False

    def needs_compiler(self, least: int) -> bool:
        """Where `least` bytes are needed whatever the compiler does."""
        return not self.arguments_only and self.enough <= least <= self.limit


@dataclass(frozen=True)
class Measurement:
    """Bytes of one device, unless said otherwise.

    Attributes:
        state: the step's arguments by what they are; exact, from shapes and shardings.
        batch: one batch.
        gradients: of the trained parameters in their own type.
        state_total: of the whole state, on all devices that share it.
        parameters, trained: numbers of parameters.
        peak: the compiler's: argument + temp + output that is not donated; 0 = nothing was compiled.
        split: temp by plan_buffers.CATEGORIES; None where the compiler's dump could not be read.
        largest: places of temp: (bytes, category, shape, what computed it).
        flops: of a step, on all devices, as counted from the program's matrix products.
        seconds, rss: what the measurement itself took.
    """

    compiler: Compiler
    state: dict[str, int]
    batch: int
    gradients: int
    state_total: int
    parameters: int
    trained: int
    peak: int = 0
    argument: int = 0
    output: int = 0
    temp: int = 0
    split: dict[str, int] | None = None
    largest: list[tuple[int, str, str, str]] = field(default_factory=list)
    flops: float | None = None
    seconds: float = 0.0
    rss: int = 0

    @classmethod
    def from_json(cls, text: str) -> "Measurement":
        """The inverse of json.dumps(dataclasses.asdict(...)); UserError where the text is not of that form."""
        return documents.decode(text, cls, "a measurement of the planner")

    @property
    def compiled(self) -> bool:
        return self.peak > 0

    @property
    def least(self) -> int:
        """What is needed whatever the compiler does: state, one batch, gradients."""
        return sum(self.state.values()) + self.batch + self.gradients

    def categories(self) -> dict[str, int]:
        """All bytes of the compiler's peak by what they are; they sum up to `peak`."""
        inputs = self.argument - sum(self.state.values())
        split = self.split or {"gradients and temporaries": self.temp}
        parts = self.state | {"batch": inputs} | split
        return parts | {"outputs": self.output} if self.output else parts
