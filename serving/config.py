"""How the service is deployed, and every limit it keeps. `/v1/info` shows the limits.

A limit refuses instead of making everyone wait: what is too large for one request would hold the model while other
requests queue behind it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from genescale.platform.errors import SettingsError
from genescale.platform.settings import Secret
from genescale.serving.access.callers import is_loopback
from genescale.serving.jobs.settings import NO_JOBS, JobsConfig

# Shorter keys can be guessed, and a key of blanks is an unset variable.
SHORTEST_KEY = 16


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for; beyond a limit the answer is 413 with the code `limit`."""

    max_body_bytes: int = 32 * 1024 * 1024
    """Bytes of a request's body, counted while they arrive."""
    max_held_bytes: int = 256 * 1024 * 1024
    """Bytes of all bodies that one HTTP process holds at a time (429 beyond)."""
    max_cells: int = 256
    """Cells per request."""
    max_genes_per_cell: int = 65_536
    """Names in `counts`, or ids in `tokens`, of one cell (about what one reference annotation holds)."""
    max_edits: int = 256
    """Edits per request; each is tried on each cell."""
    max_genes_per_edit: int = 64
    """Genes that one edit changes together."""
    max_gene_shifts: int = 256
    """Genes whose own shifts may be asked for: by name, and again as those that moved furthest."""
    max_states: int = 32
    """States toward which movements may be asked for."""
    max_gene_values: int = 2_000_000
    """Numbers that one answer may hold as embeddings of genes."""
    max_classified_genes: int = 65_536
    """Genes whose classes one answer may hold."""
    max_tokens: int = 2_000_000
    """Tokens through the model for one request: the cells, and each cell again for each edit."""
    max_file_bytes: int = 32 * 1024 * 1024
    """Bytes of an h5ad file in a body; 1 refuses every file before it is opened."""
    max_unpacked_bytes: int = 256 * 1024 * 1024
    """Bytes that the matrices and tables of one h5ad file may unpack to."""
    max_listed_genes: int = 50
    """Ignored genes that a response names per cell; all of them are counted."""
    body_timeout_s: float = 30.0
    """Seconds a request's body may take to arrive (408)."""
    deadline_s: float = 60.0
    """Seconds an answer may take once the body is there (504); a request may ask for less."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise SettingsError(f"{name} is {value}.", where="serving limits", fix="Use a number above 0.")
        if self.max_held_bytes < self.max_body_bytes:
            raise SettingsError(
                f"max_held_bytes is {self.max_held_bytes}, below max_body_bytes: the largest body could never be held.",
                where="serving limits",
                fix=f"Use {self.max_body_bytes} or more.",
            )


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """Where the service listens, what it may use, and how it batches and refuses."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free port."""
    replicas: int = 1
    """Copies of the model; each has its own queue and processors."""
    ingress_replicas: int = 1
    """Copies of the HTTP side, which parses, ranks genes and renders answers."""
    num_cpus: float = 1.0
    """Processors per model replica."""
    num_gpus: float = 0.0
    """GPUs per model replica."""
    device: str = "auto"
    attention: str = "auto"
    tokens_per_batch: int = 8_192
    """Token budget of one pass through the model, filled from all waiting requests; others wait as long as it takes."""
    batch_wait_s: float = 0.0
    """Seconds that a free model waits for more passes to share its next one; while it works, passes gather anyway."""
    max_ongoing: int = 16
    """Requests per model replica that are worked on in turns, pass by pass, or together in one."""
    max_queued: int = 32
    """Further requests that may wait; beyond them the answer is 429 with `Retry-After`."""
    retry_after_s: int = 1
    """The longest time that a refusal for want of room asks a caller to wait."""
    api_keys: tuple[Secret, ...] = ()
    """Accepted bearer keys that may ask everything, without limits of their own."""
    keys_file: str = ""
    """File of accepted keys (`genescale serve keys`), on every node that runs an HTTP side; read again when it changes.
    Without keys of either kind everyone may ask, and only on this machine."""
    cache: str = ""
    """Folder on each node for downloaded models; empty means a temporary one."""
    index: str = ""
    """Folder or s3:// address of the reference that /v1/neighbors searches (`genescale index`); empty means none."""
    max_model_bytes: int = 8 * 1024**3
    """Bytes of weights that one replica holds at a time; of several models, the one used longest ago makes room."""
    states: tuple[str, ...] = ()
    """Files of states (`genescale perturb states`) that requests may name; each belongs to the model of its digest."""
    tracking_interval_s: float = 60.0
    """Seconds between measurements of the deployment's run in the tracker; 0 records no run."""
    jobs: JobsConfig = NO_JOBS
    """Work that is answered later: where it is kept, what it may read, how much of it runs."""
    application: str = "genescale"
    """Name of the application in Ray Serve."""
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        _check_at_least(1, {k: getattr(self, k) for k in _COUNTS})
        _check_at_least(
            0,
            {
                "num_gpus": self.num_gpus,
                "batch_wait_s": self.batch_wait_s,
                "max_queued": self.max_queued,
                "tracking_interval_s": self.tracking_interval_s,
            },
        )
        if self.num_cpus <= 0:
            raise SettingsError(f"num_cpus is {self.num_cpus}.", where="serving", fix="Use a number above 0.")
        if not 0 <= self.port <= 65_535:
            raise SettingsError(f"port is {self.port}.", where="serving", fix="Use 1 to 65535, or 0 for a free one.")
        self._check_keys()

    def _check_keys(self) -> None:
        if not self.has_keys and not is_loopback(self.host):
            raise SettingsError(
                f"a service without keys may not listen on '{self.host}'.",
                where="serving",
                fix="Give it keys (--keys-file or --api-key-env), or let it listen on 127.0.0.1.",
            )
        for key in self.api_keys:
            if len(key.reveal().strip()) < SHORTEST_KEY or not key.reveal().isascii():
                raise SettingsError(
                    f"an API key has fewer than {SHORTEST_KEY} ASCII characters.",
                    where="serving",
                    fix="Make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
                )

    @property
    def has_keys(self) -> bool:
        """Whether a key is needed."""
        return bool(self.api_keys or self.keys_file)

    @property
    def max_admitted(self) -> int:
        """Requests that one ingress replica lets in at a time."""
        return self.max_ongoing * self.replicas + self.max_queued


_COUNTS = ("replicas", "ingress_replicas", "tokens_per_batch", "max_ongoing", "max_model_bytes", "retry_after_s")


def _check_at_least(least: float, values: dict[str, float]) -> None:
    for name, value in values.items():
        if value < least:
            raise SettingsError(f"{name} is {value}.", where="serving", fix=f"Use {least} or more.")
