"""Whether a model answers the question at all: two figures that need no label.

The mass is the probability of the two options together, among all tokens: a model that does not understand the question
gives it to other words. The share of the first option says whether the model always answers the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LEAST_MASS = 0.5
LEAST_SHARE, MOST_SHARE = 0.05, 0.95
ENOUGH = 20
"""From this many answers on, their share is judged; of a few, all may be right to be the same."""

OPTIONS = "gen2embed_options"
"""In the output of a reranker's `forward`: (n, questions, 2) float32, the probabilities of the two options."""


@dataclass(frozen=True)
class Health:
    """What was seen of a model's answers.

    Attributes:
        answers: How many answers were read.
        mass: The mean probability of the two options together, between 0 and 1.
        share: The share of answers in which the first option ("A", "Yes", "True") was the more probable one.
        options: The two options.
    """

    answers: int
    mass: float
    share: float
    options: tuple[str, str]

    @property
    def warning(self) -> str:
        """What is wrong, as one sentence with a remedy; empty if nothing is."""
        first, second = self.options
        if self.mass < LEAST_MASS:
            return (
                f"the model does not answer: it gives {first!r} and {second!r} a probability of {self.mass:.2g} "
                f"together, below {LEAST_MASS}. Do not rely on its scores; try another framing, or another model"
            )
        if self.answers >= ENOUGH and not LEAST_SHARE <= self.share <= MOST_SHARE:
            return (
                f"the model does not decide: {self.share:.1%} of {self.answers} answers are {first!r}, outside "
                f"{LEAST_SHARE:.0%} to {MOST_SHARE:.0%}. Its scores may still order candidates; try mcq-both, another "
                "framing, or another model"
            )
        return ""


def option_probabilities(logits: torch.Tensor, tokens: tuple[int, int]) -> torch.Tensor:
    """Return the probabilities of the two options.

    Args:
        logits: (n, vocabulary), of the position after the question.
        tokens: The tokens of the options, the first one first.

    Returns:
        (n, 2) float32.
    """
    return logits.float().log_softmax(dim=-1)[:, list(tokens)].exp()


class Answers:
    """Collects the answers of many batches.

    Args:
        options: The two options, the first one first.
    """

    def __init__(self, options: tuple[str, str]) -> None:
        """Begin without answers."""
        self._options = options
        self._answers, self._mass, self._first = 0, 0.0, 0

    def add(self, chosen: torch.Tensor) -> None:
        """Add answers.

        Args:
            chosen: (n, 2), the probabilities of the two options.
        """
        self._answers += len(chosen)
        self._mass += float(chosen.double().sum())
        self._first += int((chosen[:, 0] > chosen[:, 1]).sum())

    @property
    def health(self) -> Health | None:
        """The figures; `None` before the first answer."""
        if self._answers == 0:
            return None
        mass, share = self._mass / self._answers, self._first / self._answers
        return Health(self._answers, mass, share, self._options)
