"""Gene lists as a person names them: genes separated by commas, or a file of lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from genescale.perturbation.attention.list_shares import NamedGenes
from genescale.perturbation.editing.edit_sets import read_sets
from genescale.platform.errors import InputError
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary

TYPED = "genes"
"""Name of a list that was typed in."""
_FILE_SIGNS = ("/", "#", ".json", ".gmt", ".csv", ".tsv", ".txt", ".list", ".genes", ".gz")


def named_lists(text: str, vocabulary: Vocabulary, store: Store) -> tuple[NamedGenes, ...]:
    """The lists that `text` names: `A,B,C` (ids, symbols or aliases) or an address of lists; none for an empty text.

    Raises UnknownGeneError for a typed gene that the vocabulary lacks, and InputError for a file's list of which it
    holds no gene; the other names of a file that it lacks are kept in `outside`.
    """
    if not text.strip():
        return ()
    if _is_address(text, vocabulary):
        return of_lists(read_sets(text, store), vocabulary, where=text)
    tokens = {vocabulary.token(name) for name in text.split(",") if name.strip()}
    return (NamedGenes(name=TYPED, tokens=tuple(sorted(tokens))),)


def of_lists(lists: Mapping[str, Sequence[str]], vocabulary: Vocabulary, *, where: str) -> tuple[NamedGenes, ...]:
    """Lists in memory, `{name: [genes]}`, as `named_lists` answers a file."""
    found = []
    for name, genes in lists.items():
        tokens = {gene: vocabulary.find(gene) for gene in genes}
        inside = {token for token in tokens.values() if token is not None}
        if not inside:
            raise InputError(
                f"no gene of '{name}' is in the vocabulary.",
                where=where,
                fix="Give Ensembl ids or symbols of its genes, or choose lists with '#:NAME,NAME'.",
            )
        outside = tuple(gene for gene, token in tokens.items() if token is None)
        found.append(NamedGenes(name=name, tokens=tuple(sorted(inside)), outside=outside))
    return tuple(found)


def _is_address(text: str, vocabulary: Vocabulary) -> bool:
    """Whether a text is an address: nothing in it is a gene, and it looks like a file (symbols may hold dots)."""
    if any(vocabulary.find(name) is not None for name in text.split(",")):
        return False
    return any(sign in text.lower() for sign in _FILE_SIGNS)
