"""`DistillationLoss`: a student learns the similarities within a batch of texts from a teacher (UniME, stage 1).

After arXiv 2504.17432, "textual discriminative knowledge distillation". For a batch of n texts, the similarities of
each text to the others, divided by τ, become a distribution (a softmax over the row), once for the student's vectors
and once for the teacher's. The loss is the mean over rows of the Kullback-Leibler divergence between the two.

The paper leaves three things open; `docs/guides/unime.md` argues for the defaults here:

- `tau`: it names no value.
- `direction`: as printed, the student is the first argument, KL(student ‖ teacher). Distillation usually is
  KL(teacher ‖ student), and its code was never published.
- `diagonal`: it does not say whether the similarity of a text to itself, which is always 1, belongs to the row.

Cost: the two matrices of similarities, `mini_batch_size` rows at a time; the model runs as in `SahaLoss`, with cached
gradients, so that memory follows the mini-batch and the batch can be as large as the paper's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import all_gather, all_gather_with_grad, get_rank
from torch import Tensor

from gen2embed_mteb.errors import Gen2EmbedError
from trainers.loss.saha_loss import SahaLoss

Direction = Literal["teacher-student", "student-teacher"]
DIRECTIONS: tuple[Direction, ...] = ("teacher-student", "student-teacher")
TAU = 0.05


class Teacher(Protocol):
    """Rows of vectors by number; an array of shape (N, d) is one."""

    def __getitem__(self, numbers: npt.NDArray[np.int64], /) -> npt.NDArray[np.floating[Any]]:
        """Return the vectors of n numbers, (n, d)."""


class DistillationLoss(SahaLoss):
    """The divergence between the similarities of a student and of a teacher, with cached gradients.

    Takes (text) or (text, text, …) with a label: the row of the teacher's vectors for each of the texts. All texts of
    all columns and of all processes form one batch. Equal texts must have equal labels.

    Args:
        model: The student.
        teacher: (N, d) vectors of the teacher, of any norm but 0; an array, which may be memory-mapped.
        tau: The temperature of both softmaxes.
        direction: `teacher-student`, KL(teacher ‖ student), or `student-teacher`, KL(student ‖ teacher).
        diagonal: Whether the similarity of a text to itself, and to equal texts of the batch, belongs to its row.
        options: `mini_batch_size`, `mini_batch_num_tokens`, `gather_across_devices`, `share_prefix` and
            `show_progress_bar` of `SahaLoss`.

    Raises:
        Gen2EmbedError: `tau` is not positive, or the direction is unknown.
    """

    compares_candidates = False

    def __init__(
        self,
        model: SentenceTransformer,
        teacher: Teacher,
        *,
        tau: float = TAU,
        direction: Direction = "teacher-student",
        diagonal: bool = False,
        **options: Any,
    ) -> None:
        if not 0 < tau < float("inf"):
            raise Gen2EmbedError(f"tau is {tau}; pass a positive number, such as {TAU}")
        if direction not in DIRECTIONS:
            raise Gen2EmbedError(f"direction is {direction!r}; known: {', '.join(DIRECTIONS)}")
        super().__init__(model, scale=1 / tau, mask_equal_positives=False, **options)
        self._teacher = teacher
        self.direction = direction
        self.diagonal = diagonal

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Return the loss of a batch.

        Args:
            sentence_features: One dict of features a column, B rows each.
            labels: (B, columns) int64 rows of the teacher's vectors; (B,) if there is one column.

        Returns:
            A scalar; its backward pass runs the model again, mini-batch by mini-batch.

        Raises:
            Gen2EmbedError: There are no labels, or not one for each text.
        """
        features = self.columns_of(sentence_features)
        if labels is None or labels.numel() != labels.shape[0] * len(features):
            shape = "none" if labels is None else tuple(labels.shape)
            raise Gen2EmbedError(
                f"labels are {shape}, for {len(features)} columns of texts; pass a column 'label' with the row of the "
                "teacher's vectors for each text"
            )
        return self.forward_cached(features, labels.reshape(-1, len(features)))

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Return the loss of a batch, computed `mini_batch_size` rows at a time; the base class calls it.

        Args:
            reps: For each column its embeddings, mini-batch by mini-batch.
            labels: (B, columns) int64 rows of the teacher's vectors.
            with_backward: Whether gradients are propagated to `reps`.

        Returns:
            A scalar.
        """
        if labels is None:
            raise TypeError("labels are None; `forward` checks them")
        columns = [torch.cat(column) for column in reps]
        texts, gathered, numbers, first = torch.cat(columns), columns, labels, 0
        if self.gather_across_devices:
            gathered = [all_gather_with_grad(column) for column in columns]
            numbers = all_gather(labels)
            first = get_rank() * len(labels)
        students = torch.cat(gathered)  # the first column of all processes, then the second, …
        teachers = self._vectors(numbers.T.flatten(), students.device)
        own = torch.cat([torch.arange(len(labels)) + first + place * len(numbers) for place in range(len(columns))])
        own, numbers = own.to(students.device), numbers.T.flatten().to(students.device)
        losses: list[Tensor] = []
        for rows in torch.arange(len(texts), device=students.device).split(self.mini_batch_size):
            scores = self.similarity_fct(texts[rows], students) * self.scale
            targets = self.similarity_fct(teachers[own[rows]], teachers) * self.scale
            part = self._divergence(scores, targets, self._left_out(numbers, own[rows])).sum() / len(texts)
            if with_backward:
                part.backward()
                part = part.detach()
            losses.append(part)
        return sum(losses[1:], losses[0])

    def _vectors(self, numbers: Tensor, device: torch.device) -> Tensor:
        found = self._teacher[numbers.cpu().numpy()]
        return torch.from_numpy(np.ascontiguousarray(found, dtype=np.float32)).to(device)

    def _left_out(self, numbers: Tensor, own: Tensor) -> Tensor:
        """Return which entries of some rows do not count, (rows, texts) bool."""
        if self.diagonal:
            return torch.zeros(len(own), len(numbers), dtype=torch.bool, device=own.device)
        equal = numbers[own, None] == numbers
        # A text without others keeps itself: two distributions over one text do not differ.
        each = torch.arange(len(own), device=own.device)
        equal[each, own] = ~equal.all(dim=1)
        return equal

    def _divergence(self, scores: Tensor, targets: Tensor, left_out: Tensor) -> Tensor:
        """Return the divergence of each row, (rows,)."""
        student, teacher = (
            one.masked_fill(left_out, -torch.inf).log_softmax(dim=1).masked_fill(left_out, 0.0)
            for one in (scores, targets)
        )
        first, second = (teacher, student) if self.direction == "teacher-student" else (student, teacher)
        weights = first.exp().masked_fill(left_out, 0.0)
        return (weights * (first - second)).sum(dim=1)

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, for model cards."""
        named = ("mini_batch_size", "mini_batch_num_tokens", "gather_across_devices")
        return {
            **{name: getattr(self, name) for name in named},
            **{"tau": self.temperature, "direction": self.direction, "diagonal": self.diagonal},
        }
