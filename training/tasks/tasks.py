"""Ready tasks: the questions of the published evaluation, each a TOML file that one command runs on the user's cells.

    genescale finetune MODEL --task dosage-sensitivity --corpus URI --genes FILE

A task file says what is asked, who published the lists, what was found with them and how, which cells it needs, how the
user's file of gene lists is read (`[genes]`), and the settings of the fit (`[finetune]`, keys of `FinetuneConfig`).
`[as_published]` holds the published setting where it differs: it trains part of the encoder, and so takes a GPU.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genescale.platform.errors import SettingsError, did_you_mean
from genescale.platform.settings import build, read_toml
from genescale.training.labels.gene_lists import ListAddress

if TYPE_CHECKING:
    from genescale.training.fitting.config import FinetuneConfig

# Beside this file, in the wheel as in the repository. `importlib.resources` cannot list a folder without `__init__.py`
# in an editable install.
TASKS = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class GeneColumns:
    """Which of the user's gene lists a task reads."""

    section: str
    """Section of a JSON file with several tasks' lists."""
    classes: tuple[str, ...] = ()
    """Classes in the file, in the order that they get; for two, the second is the one that is looked for."""
    without: tuple[str, ...] = ()
    """Genes that are left out, such as those that the published lists have in both classes."""


@dataclass(frozen=True, kw_only=True)
class ReadyTask:
    """A question with everything but the model, the cells and the lists."""

    title: str
    question: str
    """What is asked, in one sentence."""
    lists: str
    """Who made the labels."""
    published: str
    """What was found with them, in which setting, and where that is written."""
    cells: str
    """Which cells the question needs."""
    name: str = ""
    genes: GeneColumns | None = None
    """None for a task whose labels stand in the corpus."""
    finetune: Mapping[str, Any] = field(default_factory=dict)
    """Settings that differ from the defaults of `FinetuneConfig`."""
    as_published: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of the published run."""

    def gene_address(self, uri: str) -> str:
        """The user's file with this task's section and classes; an address that says `#…` itself stays as it is.

        Only JSON files have sections: another file holds the lists of this one question, under whatever class names.
        """
        if self.genes is None:
            raise SettingsError(
                f"the labels of '{self.name}' stand in the corpus.", where="genes", fix="Leave --genes out."
            )
        if "#" in uri:
            return uri
        if not uri.lower().removesuffix(".gz").endswith(".json"):
            return str(ListAddress(uris=ListAddress.parse(uri).uris, without=self.genes.without))
        columns = self.genes
        return str(ListAddress(uris=(uri,), section=columns.section, classes=columns.classes, without=columns.without))

    def values(
        self, *, genes: str = "", as_published: bool = False, changes: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Values of `FinetuneConfig`; `genes`: address of the user's lists; `changes` win over the task."""
        if self.genes is not None and not genes:
            raise SettingsError(
                f"the task '{self.name}' needs gene lists.", where="genes", fix=f"Give --genes FILE: {self.lists}"
            )
        chosen = {"genes": self.gene_address(genes)} if genes else {}
        return {**self.finetune, **(self.as_published if as_published else {}), **chosen, **(changes or {})}

    def config(
        self, *, genes: str = "", as_published: bool = False, changes: Mapping[str, Any] | None = None
    ) -> FinetuneConfig:
        """The checked config of one run; SettingsError when lists are missing, or a change is out of range."""
        from genescale.training.fitting.config import FinetuneConfig

        values = self.values(genes=genes, as_published=as_published, changes=changes)
        return build(FinetuneConfig, values, where=f"task {self.name}")

    def text(self, width: int = 120) -> str:
        """The task for a terminal that is `width` columns wide."""
        rows = (
            ("question", self.question),
            ("labels", self.lists),
            ("cells", self.cells),
            ("published", self.published),
        )
        lines = [
            textwrap.fill(
                value,
                max(width, 40),
                initial_indent=f"  {name:<9}  ",
                subsequent_indent=" " * 13,
                break_long_words=False,
                break_on_hyphens=False,
            )
            for name, value in rows
        ]
        return "\n".join([f"{self.name}: {self.title}", *lines])


def task_names() -> list[str]:
    """Names of the tasks that come with Genescale."""
    return sorted(file.stem for file in TASKS.glob("*.toml"))


def list_tasks() -> list[ReadyTask]:
    """The tasks that come with Genescale, by name."""
    return [load_task(name) for name in task_names()]


def load_task(name_or_path: str) -> ReadyTask:
    """A task by name, or from a TOML file of the same form.

    Raises SettingsError for a task that is not there, an unknown key, or settings that are no `FinetuneConfig`.
    """
    known = task_names()
    path = TASKS / f"{name_or_path}.toml" if name_or_path in known else Path(name_or_path)
    if name_or_path not in known and path.suffix != ".toml":
        hint = did_you_mean(name_or_path, known) or f"Tasks: {', '.join(known)}."
        raise SettingsError(f"no task '{name_or_path}'.", where="--task", fix=f"{hint} A file must end with .toml.")
    task = build(ReadyTask, {"name": path.stem, **read_toml(path)}, where=str(path.name))
    _check_settings(task)
    return task


def _check_settings(task: ReadyTask) -> None:
    """Find a mistake in a task file when it is read, not when its lists have been found."""
    stands_in = "lists.json" if task.genes is not None else ""
    for as_published in (False, True):
        task.config(genes=stands_in, as_published=as_published)


def task_table(tasks: Sequence[ReadyTask]) -> list[tuple[str, str, str]]:
    """Name, unit and title of each task, for a list in a terminal."""
    return [(task.name, str(task.finetune.get("unit", "cells")), task.title) for task in tasks]
