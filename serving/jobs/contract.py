"""What the routes of jobs accept and answer, as strict models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, RootModel

from genescale.serving.jobs.sources import LONGEST_ADDRESS
from genescale.serving.schemas import Answered, Asked, Layer, ModelFacts, Pooling
from genescale.serving.schemas_perturb import PerturbationsAsked

Address = Annotated[str, Field(min_length=1, max_length=LONGEST_ADDRESS)]
Section = dict[str, Any]


class ScreenJobAsked(Asked):
    """Edits of cells of a corpus. The sections are those of `genescale perturb screen`, without `compute`."""

    kind: Literal["screen"]
    corpus: Address = Field(description="A corpus below a place that jobs may read, also as `URI@VERSION`.")
    edits: Section = Field(description="What is tried on each cell.", examples=[{"genes": ["GATA4", "TBX5"]}])
    cells: Section = Field({}, description="Which cells are edited.", examples=[{"where": "cell_type = 'fibroblast'"}])
    readouts: Section = Field({}, description="How an edited cell is compared with the unedited one.")
    two_pass: Section | None = Field(None, description="Score every gene cheaply first, and delete only a part.")


class EmbedJobAsked(Asked):
    """Embeddings of every cell of a corpus or of an atlas file."""

    kind: Literal["embed"]
    source: Address = Field(
        description="A corpus (also `URI@VERSION`) or an atlas file with raw counts, such as an .h5ad, below a place "
        "that jobs may read."
    )
    layer: Layer = "second_to_last"
    pooling: Pooling = "mean_genes"


class PerturbationsJobAsked(PerturbationsAsked):
    """What `/v1/perturbations` takes, in a size that is answered later."""

    kind: Literal["perturbations"]


class JobAsked(
    RootModel[
        Annotated[
            ScreenJobAsked | EmbedJobAsked | PerturbationsJobAsked,
            Field(discriminator="kind"),
        ]
    ]
):
    """A job: which kind of work, and what it needs."""


class JobProgress(Answered):
    """How far a job is."""

    done: int
    total: int | None = Field(description="null while nobody knows.")
    unit: str = Field(description="What is counted, such as `cells`.")
    note: str = Field(description="A remark, such as the time left.")


class JobError(Answered):
    """Why a job failed, in the words of every error of this service."""

    code: str
    message: str
    details: dict[str, Any]


class JobFile(Answered):
    """A file of a result."""

    name: str
    bytes: int
    url: str = Field(description="Where it is had, on this service.")


class JobAnswered(Answered):
    """A job as it stands."""

    id: str
    kind: Literal["screen", "embed", "perturbations"]
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    cancelling: bool = Field(description="Whether its end was asked for.")
    model: ModelFacts
    created: str = Field(description="ISO time with a time zone, as all times here.")
    started: str | None
    ended: str | None
    deleted: str | None = Field(description="When the job and its result will be deleted.")
    progress: JobProgress
    error: JobError | None
    run: str | None = Field(description="Of the experiment tracker, where the job is tracked.")
    attempt: int = Field(description="0 until it began; higher than 1 when it went on after an interruption.")
    url: str = Field(description="Where to ask how it stands, on this service.")
    result: str | None = Field(description="Where its main file is had, once it succeeded.")
    files: list[JobFile] = Field(description="Everything that came of it.")


class JobsAnswered(Answered):
    """Jobs, the newest first."""

    jobs: list[JobAnswered]
    next: str | None = Field(description="Value of `before` for the next page; null on the last one.")


class JobLinkAnswered(Answered):
    """Where a file of a result is had without a key, for a short time; the same as in `Location`."""

    url: str
    expires: str
