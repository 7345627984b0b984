"""Settings of the propagation."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class PropagationConfig:
    """Settings of the propagation; the defaults are those of the paper's text.

    Attributes:
        phi0: initial threshold of the positives [cosine].
        psi0: initial threshold of the negatives [cosine]; it may exceed phi0, then nothing is ambiguous.
        steps: number T of moves of the proxy, 0 or more.
        sigma_pos: divides the movement before it lowers phi (Eq. 3), above 0.
        sigma_amb: divides the movement before it raises psi (Eq. 5), above 0.
        trustworthy_positives: positives around the propagated proxy (TPS); off = above phi0 around the
            anchor.
        ambiguity_excluded: negatives below psi only (ANS); off = every patch that is not a positive.
    """

    phi0: float = 0.55
    psi0: float = 0.15
    steps: int = 2
    sigma_pos: float = 3.0
    sigma_amb: float = 4.0
    trustworthy_positives: bool = True
    ambiguity_excluded: bool = True

    def __post_init__(self) -> None:
        for name in ("phi0", "psi0"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(
                    f"PropagationConfig: {name} is {getattr(self, name)!r}; give a finite cosine"
                )
        for name in ("sigma_pos", "sigma_amb"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"PropagationConfig: {name} is {getattr(self, name)!r}; give a number above 0"
                )
        if not isinstance(self.steps, int) or self.steps < 0:
            raise ValueError(f"PropagationConfig: steps is {self.steps!r}; give a whole number, 0 or more")

    def as_floats(self) -> list[float]:
        """The settings as a list, the form in which they pass through registered ops."""
        switches = [float(self.trustworthy_positives), float(self.ambiguity_excluded)]
        numbers = [self.phi0, self.psi0, self.steps, self.sigma_pos, self.sigma_amb]
        return [float(number) for number in numbers] + switches

    @classmethod
    def from_floats(cls, values: list[float]) -> "PropagationConfig":
        """Inverse of :meth:`as_floats`."""
        phi0, psi0, steps, sigma_pos, sigma_amb, trustworthy, excluded = values
        return cls(phi0, psi0, int(steps), sigma_pos, sigma_amb, bool(trustworthy), bool(excluded))
