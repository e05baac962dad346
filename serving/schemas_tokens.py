"""What `/v1/tokens` accepts and answers: part of the HTTP contract in `schemas.py`."""

from __future__ import annotations

from pydantic import Field

from genescale.serving.schemas import Answered, Asked, CellFacts, Cells, FileFacts, Provenance, Timings


class TokensOptions(Asked):
    """What to say of the cells of a request: all of it that is no cell."""

    beyond_window: bool = Field(
        False, description="Also the genes that fall out of the model's window, in `tokens`, `genes` and `symbols`."
    )


class TokensAsked(TokensOptions):
    """Cells to rank and tokenise as the model would take them."""

    cells: Cells


class TokenisedCell(CellFacts):
    """One cell as the model takes it. Its genes stand in rank order, the most characteristic first."""

    tokens: list[int] = Field(
        description="With <cls> and <eos> where the model has them; as `tokens` of a cell they ask for the same cell."
    )
    genes: list[str] = Field(description="Gene ids, without <cls> and <eos>.")
    symbols: list[str] = Field(description="Of each of `genes`; the gene id where no symbol is known.")


class TokensFacts(Answered):
    """What an answer says of all its cells."""

    provenance: Provenance
    window: int = Field(description="Tokens that the model takes of one cell, <cls> and <eos> included.")
    file: FileFacts | None = Field(description="Of cells that came in a file; null otherwise.")
    timings_ms: Timings


class TokensAnswered(TokensFacts):
    """Tokens, in the order of the request."""

    cells: list[TokenisedCell]
