"""The part of a student's steps that one network of one expert makes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Consecutive steps of one expert by one network of the teacher's pipeline.

    An expert of a teacher with two networks has two of them, where steps lie on both sides of their boundary.

    Attributes:
        name: of what is written of it: the expert's, with the network's part where the expert has two.
        phase: the expert's index.
        component: the network's part of the teacher's pipeline.
        times: of its steps, falling; where the last of them ends is not among them.
    """

    name: str
    phase: int
    component: str
    times: tuple[float, ...]
