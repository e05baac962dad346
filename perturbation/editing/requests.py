"""What to do to the genes of a cell: the kinds of edit and a checked request for one.

A request names genes by token and is independent of any cell; `editing.edits.apply` carries it out on one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from genescale.platform.errors import InputError, did_you_mean

Kind = Literal["delete", "overexpress", "inhibit", "activate", "replace"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MOVES_BY_RANK: tuple[Kind, ...] = ("inhibit", "activate")
QUARTILES = (1, 2, 3)


def parse_kind(text: str) -> Kind:
    """The kind of edit that `text` names; InputError, with the nearest kind, for anything else."""
    for kind in KINDS:
        if text == kind:
            return kind
    choices = ", ".join(KINDS)
    raise InputError(f"'{text}' is no kind of edit.", fix=did_you_mean(text, KINDS) or f"Use one of {choices}.")


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """One edit to try on a cell: its kind and the tokens of its genes, edited together.

    Raises InputError when an option does not belong to the kind.
    """

    kind: Kind
    genes: tuple[int, ...]
    refill: bool = False
    """Delete from the uncropped cell, so that the next genes move up into the window."""
    quartiles: int | None = None
    """Rank quartiles (1, 2 or 3) that `inhibit` and `activate` move a gene by; None is 1, unless `rank` is given."""
    rank: int | None = None
    """Rank (0 = first gene) that `inhibit` and `activate` move a gene to, instead of by quartiles."""
    ranks: tuple[int, ...] = ()
    """Rank that `replace` gives each of `genes`, for example its median rank in another state."""

    def __post_init__(self) -> None:
        parse_kind(self.kind)
        if not self.genes:
            raise InputError("an edit needs at least one gene.")
        if self.refill and self.kind != "delete":
            raise InputError("only a deletion can refill the window.", fix="Leave out refill.")
        self._check_move()
        if self.kind == "replace" and len(self.ranks) != len(self.genes):
            raise InputError(
                f"{len(self.ranks)} ranks are given for {len(self.genes)} genes.", fix="Give each gene its new rank."
            )
        if self.ranks and self.kind != "replace":
            raise InputError(f"'{self.kind}' takes no ranks.", fix="Use the kind 'replace', or leave out ranks.")
        if min(self.ranks, default=0) < 0:
            raise InputError(f"rank {min(self.ranks)} does not exist.", fix="The first gene has rank 0.")

    def _check_move(self) -> None:
        moves = self.kind in MOVES_BY_RANK
        for name, value in (("quartiles", self.quartiles), ("rank", self.rank)):
            if value is not None and not moves:
                raise InputError(
                    f"'{self.kind}' takes no {name}.", fix=f"Leave it out, or use {' or '.join(MOVES_BY_RANK)}."
                )
        if self.quartiles is not None and self.rank is not None:
            raise InputError("an edit moves a gene by quartiles or to a rank, not both.", fix="Leave one of them out.")
        if self.quartiles is not None and self.quartiles not in QUARTILES:
            raise InputError(f"a gene cannot move by {self.quartiles} quartiles.", fix="Use 1, 2 or 3.")
        if self.rank is not None and self.rank < 0:
            raise InputError(f"rank {self.rank} does not exist.", fix="The first gene has rank 0.")

    def on(self, genes: tuple[int, ...], ranks: tuple[int, ...] = ()) -> EditRequest:
        """The same edit of other genes; `ranks` are their new ranks when the kind is `replace`."""
        return dataclasses.replace(self, genes=genes, ranks=ranks)


@dataclass(frozen=True, kw_only=True)
class EditOptions:
    """How the genes of a whole screen are edited: an EditRequest without its genes.

    Raises InputError when an option does not belong to the kind.
    """

    kind: Kind = "delete"
    refill: bool = False
    quartiles: int | None = None
    rank: int | None = None
    target_ranks: Mapping[int, int] = field(default_factory=dict)
    """Token to new rank, for `replace`."""

    def __post_init__(self) -> None:
        if self.target_ranks and self.kind != "replace":
            raise InputError(f"'{self.kind}' takes no target ranks.", fix="Use the kind 'replace'.")
        # The checks of a request, made before there is one.
        EditRequest(
            kind=self.kind,
            genes=(0,),
            refill=self.refill,
            quartiles=self.quartiles,
            rank=self.rank,
            ranks=(0,) if self.kind == "replace" else (),
        )

    def has_rank(self, gene: int) -> bool:
        """Whether the kind needs no target rank of `gene`, or knows it."""
        return self.kind != "replace" or gene in self.target_ranks

    def request(self, genes: tuple[int, ...]) -> EditRequest:
        """The edit of `genes` together; InputError when `replace` knows no rank for one of them."""
        if lacking := [gene for gene in genes if not self.has_rank(gene)]:
            raise InputError(
                f"{len(lacking)} of the genes have no rank to be given, the first is token {lacking[0]}.",
                fix="Leave out genes that no cell of the other state has.",
            )
        return EditRequest(
            kind=self.kind,
            genes=genes,
            refill=self.refill,
            quartiles=self.quartiles,
            rank=self.rank,
            ranks=tuple(self.target_ranks[gene] for gene in genes) if self.kind == "replace" else (),
        )
