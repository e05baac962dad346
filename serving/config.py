"""How the service is deployed, and every limit it keeps. `/v1/info` shows the limits.

A limit refuses instead of making everyone wait: what is too large for one request would hold the model while other
requests queue behind it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from genescale.platform.errors import SettingsError
from genescale.platform.settings import Secret

# Shorter keys can be guessed, and a key of blanks is an unset variable.
SHORTEST_KEY = 16


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for; beyond a limit the answer is 413 with the code `limit`."""

    max_body_bytes: int = 32 * 1024 * 1024
    """Bytes of a request's body, counted while they arrive."""
    max_cells: int = 256
    """Cells per request."""
    max_genes_per_cell: int = 65_536
    """Names in `counts`, or ids in `tokens`, of one cell (about what one reference annotation holds)."""
    max_edits: int = 256
    """Edits per request; each is tried on each cell."""
    max_genes_per_edit: int = 64
    """Genes that one edit changes together."""
    max_gene_shifts: int = 256
    """Genes whose own shifts may be asked for."""
    max_classified_genes: int = 65_536
    """Genes whose classes one answer may hold."""
    max_tokens: int = 2_000_000
    """Tokens through the model for one request: the cells, and each cell again for each edit."""
    max_listed_genes: int = 50
    """Ignored genes that a response names per cell; all of them are counted."""
    body_timeout_s: float = 30.0
    """Seconds a request's body may take to arrive (408)."""
    deadline_s: float = 60.0
    """Seconds an answer may take once the body is there (504)."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise SettingsError(f"{name} is {value}.", where="serving limits", fix="Use a number above 0.")


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
    batch_wait_s: float = 0.005
    """Seconds a pass waits for more requests to share it."""
    max_ongoing: int = 16
    """Requests per model replica that are worked on in turns, pass by pass, or together in one."""
    max_queued: int = 32
    """Further requests that may wait; beyond them the answer is 503 with `Retry-After`."""
    retry_after_s: int = 1
    api_keys: tuple[Secret, ...] = ()
    """Accepted bearer keys; none means that everyone may ask."""
    cache: str = ""
    """Folder on each node for downloaded models; empty means a temporary one."""
    application: str = "genescale"
    """Name of the application in Ray Serve."""
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        _check_at_least(1, {k: getattr(self, k) for k in _COUNTS})
        _check_at_least(
            0, {"num_gpus": self.num_gpus, "batch_wait_s": self.batch_wait_s, "max_queued": self.max_queued}
        )
        if self.num_cpus <= 0:
            raise SettingsError(f"num_cpus is {self.num_cpus}.", where="serving", fix="Use a number above 0.")
        if not 0 <= self.port <= 65_535:
            raise SettingsError(f"port is {self.port}.", where="serving", fix="Use 1 to 65535, or 0 for a free one.")
        for key in self.api_keys:
            if len(key.reveal().strip()) < SHORTEST_KEY or not key.reveal().isascii():
                raise SettingsError(
                    f"an API key has fewer than {SHORTEST_KEY} ASCII characters.",
                    where="serving",
                    fix="Make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
                )

    @property
    def max_admitted(self) -> int:
        """Requests that one ingress replica lets in at a time."""
        return self.max_ongoing * self.replicas + self.max_queued


_COUNTS = ("replicas", "ingress_replicas", "tokens_per_batch", "max_ongoing", "retry_after_s")


def _check_at_least(least: float, values: dict[str, float]) -> None:
    for name, value in values.items():
        if value < least:
            raise SettingsError(f"{name} is {value}.", where="serving", fix=f"Use {least} or more.")
