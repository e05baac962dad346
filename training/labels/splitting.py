"""Folds: every way to say which cells or genes train a head, choose its best epoch, and measure it.

    random     stratified by label; with folds, every unit is tested once
    grouped    no group (donor, dataset) stands in two parts; labels and sizes are spread as near as groups allow
    balanced   grouped, and attributes (sex, age) are spread alike: the best of many trials, with its tests
    lists      the ids of each part are given

With folds, each fold's test part is tested once, and its validation part is taken from what is left for training. The
same seed gives the same folds in whatever order the units come: they are ordered by id first.

Axis suffixes: `u` units (cells or genes), `g` groups, `c` classes, `p` parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from genescale.platform.errors import InputError, SettingsError
from genescale.training.labels.assignment import nearest_assignment
from genescale.training.labels.balance import (
    BALANCED_P,
    BalanceTest,
    balance_test,
    balanced_assignment,
    group_attributes,
)
from genescale.training.labels.listed_parts import ListedParts, listed_split
from genescale.training.labels.splits import PARTS, Split, check_fractions, random_split, split_of

Method = Literal["random", "grouped", "balanced", "lists"]
NUMBER_STRATA = 5
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class SplitRequest:
    """How units are to be split."""

    method: Method = "grouped"
    fractions: tuple[float, ...] = (0.8, 0.1, 0.1)
    """Train, validation, test. With folds the test part is one of them, and the first two divide the rest."""
    folds: int = 0
    """Cross-validation with so many folds; 0 means one split."""
    seed: int = 0
    group: str = ""
    """Name of what is kept together, for messages and for lists that name groups."""
    trials: int = 500
    """Seeded assignments that are tried at most; method `balanced`."""
    listed: ListedParts | None = None
    """Which ids stand in which part; method `lists`."""
    unit: Literal["cells", "genes"] = "cells"

    def __post_init__(self) -> None:
        check_fractions(self.fractions)
        if self.method not in get_args(Method):
            raise SettingsError(f"'{self.method}' is no way to split.", where="split", fix=f"Use one of {Method}.")
        if self.folds == 1 or self.folds < 0:
            raise SettingsError(f"{self.folds} fold(s).", where="folds", fix="Use 0 for one split, or 2 or more.")
        if self.trials < 1 or self.seed < 0:
            raise SettingsError("trials must be 1 or more, and seed 0 or more.", where="split")
        if (self.method == "lists") != (self.listed is not None):
            raise SettingsError("the split 'lists' and lists of ids come together.", where="split", fix="Give both.")
        if self.method == "lists" and self.folds:
            raise SettingsError("lists say which unit stands where.", where="folds", fix="Set folds = 0.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Units:
    """Cells or genes to split, row by row."""

    ids_u: npt.NDArray[Any]
    """Texts, each once."""
    labels_u: npt.NDArray[Any]
    """What parts are stratified by: texts or codes; floats are cut into five classes of equal size."""
    groups_u: npt.NDArray[Any] | None = None
    """Texts; None, or all empty, where there are none."""
    attributes: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    """Columns to balance: texts, or floats."""
    classes: tuple[str, ...] = ()
    """Names of the classes, for messages, where labels are codes; the code -1 says that a unit has no label."""

    def take(self, order: npt.NDArray[np.int64]) -> Units:
        """The units at these positions."""
        return Units(
            ids_u=self.ids_u[order],
            labels_u=self.labels_u[order],
            groups_u=None if self.groups_u is None else self.groups_u[order],
            attributes={name: values_u[order] for name, values_u in self.attributes.items()},
            classes=self.classes,
        )

    @property
    def strata_u(self) -> npt.NDArray[np.int64]:
        """int64 codes of the classes that parts are stratified by."""
        values_u = np.asarray(self.labels_u)
        if values_u.dtype.kind == "f":
            edges = np.nanquantile(values_u, np.linspace(0, 1, NUMBER_STRATA + 1)[1:-1])
            values_u = np.where(np.isnan(values_u), -1, np.searchsorted(edges, values_u))
        return np.unique(values_u, return_inverse=True)[1].astype(np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Folds:
    """Splits of one set of units; with several, the test parts hold every unit once."""

    splits: tuple[Split, ...]
    method: str
    seed: int = 0
    statistics: tuple[BalanceTest, ...] = ()
    """Of each attribute over the parts, or over the test parts of all folds; method `balanced`."""
    tried: int = 0
    """Assignments that the best was chosen from; method `balanced`."""
    notes: tuple[str, ...] = ()
    """What a reader of the report should know."""

    @property
    def balanced(self) -> bool:
        """Whether every tested attribute meets the published criterion; True where none was tested."""
        return all(test.balanced for test in self.statistics)

    def to_dict(self) -> dict[str, Any]:
        """Method, sizes of the parts, tests and notes, as plain values for JSON."""
        return {
            "method": self.method,
            "seed": self.seed,
            "folds": [{name: len(part) for name, part in split.parts().items()} for split in self.splits],
            "balanced": self.balanced,
            "tried": self.tried,
            "statistics": [test.to_dict() for test in self.statistics],
            "notes": list(self.notes),
        }


def make_folds(request: SplitRequest, units: Units) -> Folds:
    """Split units as asked for.

    Raises InputError when an id stands there twice, or when there are too few units, groups or members of a class.
    """
    ids_u = np.asarray(units.ids_u).astype(str)
    order = np.argsort(ids_u, kind="stable")
    _refuse_repeats(ids_u[order], request)
    if request.method == "lists":
        assert request.listed is not None
        groups_u = None if units.groups_u is None else np.asarray(units.groups_u)[order]
        split, notes = listed_split(
            request.listed, ids_u[order], groups_u, request.group, units.take(order).strata_u, request
        )
        return _restored(Folds(splits=(split,), method="lists", seed=request.seed, notes=notes), order)
    makers = {"random": _random, "grouped": _grouped, "balanced": _balanced}
    return _restored(makers[request.method](request, units.take(order)), order)


def _refuse_repeats(ids_u: npt.NDArray[Any], request: SplitRequest) -> None:
    repeated = np.unique(ids_u[1:][ids_u[1:] == ids_u[:-1]])
    if len(repeated):
        raise InputError(
            f"{len(repeated)} of the {request.unit} stand there twice, for example {', '.join(repeated[:_SHOWN])}: one "
            "copy could train what the other measures.",
            where="split",
            fix="Merge them, or give each an id of its own.",
        )


def _restored(folds: Folds, order: npt.NDArray[np.int64]) -> Folds:
    """The folds with positions in the order in which the units were given."""
    splits = tuple(
        Split(**{name: np.sort(order[part]).astype(np.int64) for name, part in split.parts().items()})
        for split in folds.splits
    )
    return Folds(**{**vars(folds), "splits": splits})


def _random(request: SplitRequest, units: Units) -> Folds:
    strata_u = units.strata_u
    if not request.folds:
        split = random_split(strata_u.astype(str).tolist(), request.fractions, request.seed)
        return Folds(splits=(split,), method="random", seed=request.seed)
    _refuse_small_classes(request, units)
    draws = np.random.default_rng(request.seed)
    fold_u = _dealt(strata_u, request.folds, draws)
    share = _validation_share(request)
    splits = []
    for fold in range(request.folds):
        part_u = np.where(fold_u == fold, PARTS.index("test"), PARTS.index("train"))
        rest = np.flatnonzero(fold_u != fold)
        part_u[rest[_chosen(strata_u[rest], share, draws)]] = PARTS.index("validation")
        splits.append(_checked(split_of(part_u), request))
    return Folds(splits=tuple(splits), method=f"random, {request.folds} folds", seed=request.seed)


def _refuse_small_classes(request: SplitRequest, units: Units) -> None:
    n_units = len(units.ids_u)
    if n_units < request.folds:
        raise InputError(
            f"{n_units} {request.unit} cannot fill {request.folds} folds.", where="folds", fix="Use fewer folds."
        )
    labels_u = np.asarray(units.labels_u)
    if labels_u.dtype.kind == "f":
        return
    names, counts = np.unique(labels_u[labels_u != -1] if units.classes else labels_u, return_counts=True)
    if counts.min() < request.folds:
        smallest = names[counts.argmin()]
        shown = units.classes[smallest] if units.classes else smallest
        raise InputError(
            f"class '{shown}' has {counts.min()} {request.unit}, fewer than the {request.folds} folds.",
            where="folds",
            fix="Use fewer folds, or leave rare classes out (min_cells_per_class).",
        )


def _dealt(strata_u: npt.NDArray[np.int64], folds: int, draws: np.random.Generator) -> npt.NDArray[np.int64]:
    """Fold of each unit; sizes, and the members of each class, differ by one at most: dealt like cards, by class."""
    shuffled = draws.permutation(len(strata_u))
    by_class = shuffled[np.argsort(strata_u[shuffled], kind="stable")]
    fold_u = np.empty(len(strata_u), dtype=np.int64)
    fold_u[by_class] = np.arange(len(by_class)) % folds
    return fold_u


def _chosen(strata_u: npt.NDArray[np.int64], share: float, draws: np.random.Generator) -> npt.NDArray[np.int64]:
    """Positions of about `share` of the units, of each class within one unit of its share.

    A class of at least two gives at least one, so that every class is both trained and validated.
    """
    shuffled = draws.permutation(len(strata_u))
    by_class = shuffled[np.argsort(strata_u[shuffled], kind="stable")]
    passed = np.floor(share * np.arange(len(by_class) + 1) + 1e-9)
    chosen = by_class[np.diff(passed) > 0].tolist()
    for code in np.unique(strata_u):
        members = by_class[strata_u[by_class] == code]
        taken = set(members.tolist()) & set(chosen)
        if not taken and len(members) > 1:
            chosen.append(int(members[0]))
        elif len(taken) == len(members) > 1:
            chosen.remove(int(members[0]))
    return np.array(sorted(chosen), dtype=np.int64)


def _validation_share(request: SplitRequest) -> float:
    """Validation units among those that are not tested."""
    return request.fractions[1] / (request.fractions[0] + request.fractions[1])


def _checked(split: Split, request: SplitRequest) -> Split:
    empty = [name for name, part in split.parts().items() if not len(part)]
    if empty:
        raise InputError(
            f"no {request.unit} are left for the {' and the '.join(empty)} part.",
            where="split",
            fix="Use more of them, fewer folds, or other fractions.",
        )
    return split


@dataclass(frozen=True, kw_only=True, eq=False)
class _Grouping:
    """Groups of the units with the classes they hold."""

    group_u: npt.NDArray[np.int64]
    counts_gc: npt.NDArray[np.float64]

    @classmethod
    def of(cls, request: SplitRequest, units: Units, least: int) -> _Grouping:
        """InputError unless each unit has a group and there are `least` of them."""
        groups_u = None if units.groups_u is None else np.asarray(units.groups_u).astype(str)
        if groups_u is None or (groups_u == "").any():
            without = len(units.ids_u) if groups_u is None else int((groups_u == "").sum())
            raise InputError(
                f"{without:,} of {len(units.ids_u):,} {request.unit} have no group.",
                where=f"{request.method} split",
                fix="Name a column that every cell has, or split at random (a weaker test).",
            )
        names_g, group_u = np.unique(groups_u, return_inverse=True)
        if len(names_g) < least:
            asked = (
                f"{request.folds} folds and their validation parts" if request.folds else "train, validation and test"
            )
            raise InputError(
                f"{len(names_g)} group(s) ({', '.join(names_g[:_SHOWN])}) cannot fill {asked}.",
                where=f"{request.method} split by {request.group or 'group'}",
                fix=f"Group by a column with at least {least} values, or split at random (a weaker test).",
            )
        counts_gc = np.zeros((len(names_g), int(units.strata_u.max()) + 1))
        np.add.at(counts_gc, (group_u, units.strata_u), 1)
        return cls(group_u=group_u.astype(np.int64), counts_gc=counts_gc)


def _grouped(request: SplitRequest, units: Units) -> Folds:
    grouping = _Grouping.of(request, units, least=max(request.folds, len(PARTS)))
    draws = np.random.default_rng(request.seed)
    part_g = nearest_assignment(grouping.counts_gc, _part_fractions(request), draws)
    splits = _group_splits(request, grouping, part_g, draws)
    return Folds(splits=splits, method=_group_method(request), seed=request.seed)


def _balanced(request: SplitRequest, units: Units) -> Folds:
    if not units.attributes:
        raise InputError("a balanced split needs attributes.", where="balance", fix="Name columns such as sex or age.")
    has_groups = units.groups_u is not None and (np.asarray(units.groups_u) != "").any()
    grouped = units if has_groups else Units(**{**vars(units), "groups_u": units.ids_u})
    grouping = _Grouping.of(request, grouped, least=max(request.folds, len(PARTS)))
    attributes_g = group_attributes(units.attributes, grouping.group_u, len(grouping.counts_gc))
    draws, fractions_p = np.random.default_rng(request.seed), _part_fractions(request)
    part_g, tried = balanced_assignment(
        grouping.counts_gc, fractions_p, attributes_g, trials=request.trials, generator=draws
    )
    names = [f"fold {fold}" for fold in range(request.folds)] if request.folds else list(PARTS)
    counted = "groups" if has_groups else "units"
    statistics = tuple(balance_test(name, values, part_g, names, counted) for name, values in attributes_g.items())
    return Folds(
        splits=_group_splits(request, grouping, part_g, draws),
        method=_group_method(request),
        seed=request.seed,
        statistics=statistics,
        tried=tried,
        notes=_balance_notes(statistics, tried),
    )


def _balance_notes(statistics: tuple[BalanceTest, ...], tried: int) -> tuple[str, ...]:
    worst = min(statistics, key=lambda test: test.p_value)
    if worst.balanced:
        return (f"The best of {tried} splits: every attribute has p of at least {worst.p_value:.3g}.",)
    return tuple(
        f"Unbalanced even in the best of {tried} splits: {test.attribute} differs between the parts "
        f"({test.test} {test.statistic:.3g}, p {test.p_value:.2g} below {BALANCED_P})."
        for test in statistics
        if not test.balanced
    )


def _group_method(request: SplitRequest) -> str:
    text = f"{request.method} by {request.group}" if request.group else request.method
    return f"{text}, {request.folds} folds" if request.folds else text


def _part_fractions(request: SplitRequest) -> npt.NDArray[np.float64]:
    return np.full(request.folds, 1 / request.folds) if request.folds else check_fractions(request.fractions)


def _group_splits(
    request: SplitRequest, grouping: _Grouping, part_g: npt.NDArray[np.int64], draws: np.random.Generator
) -> tuple[Split, ...]:
    """The one split that `part_g` is, or one for each fold in it, with a validation part of whole groups."""
    if not request.folds:
        return (_checked(split_of(part_g[grouping.group_u]), request),)
    share = _validation_share(request)
    splits = []
    for fold in range(request.folds):
        rest_g = np.flatnonzero(part_g != fold)
        if len(rest_g) < 2:
            raise InputError(
                f"fold {fold} leaves one group for train and validation.",
                where=f"{request.method} split",
                fix="Use more groups.",
            )
        fold_part_g = np.full(len(part_g), PARTS.index("test"))
        fold_part_g[rest_g] = nearest_assignment(grouping.counts_gc[rest_g], np.array([1 - share, share]), draws)
        splits.append(_checked(split_of(fold_part_g[grouping.group_u]), request))
    return tuple(splits)
