"""What both clients set up alike: address, headers, time limits and names of the routes that are no questions."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import httpx

from genescale.client.questions import Answer, Question
from genescale.platform.errors import SettingsError
from genescale.platform.settings import Secret

READY = "/readyz"
LONGEST_CONNECT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Connection:
    """How to reach one service; `timeout_s` bounds one try, and the service is told to stop working after it."""

    base_url: str
    api_key: Secret | None
    timeout_s: float
    model: str = ""
    """Name of the model that is asked; empty for the service's first one."""

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise SettingsError(f"timeout_s is {self.timeout_s}.", where="client", fix="Use a number above 0.")

    def options(self) -> dict[str, Any]:
        """Options of an httpx client, synchronous or not."""
        headers = {
            "User-Agent": f"genescale/{_version()}",
            # After this nobody waits for the answer any more.
            "X-Genescale-Deadline-Ms": str(max(1, round(1000 * self.timeout_s))),
        }
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key.reveal()}"
        timeout = httpx.Timeout(self.timeout_s, connect=min(self.timeout_s, LONGEST_CONNECT_S))
        parameters = {"model": self.model} if self.model else None
        return {"base_url": self.base_url, "headers": headers, "timeout": timeout, "params": parameters}


def secret(api_key: str | Secret | None) -> Secret | None:
    """A key that does not show itself."""
    return Secret(api_key) if isinstance(api_key, str) else api_key


def request_of(http: httpx.Client | httpx.AsyncClient, question: Question[Answer]) -> httpx.Request:
    """A question as a request; new for each try, because a request is sent once."""
    return http.build_request(question.method, question.path, content=question.content, headers=dict(question.headers))


def address_of(http: httpx.Client | httpx.AsyncClient, question: Question[Answer]) -> str:
    """Where a question goes, without a password that may stand in the address."""
    if question.path.startswith(("http://", "https://")):
        # A link to storage is a key in itself: only where it leads is told.
        return httpx.URL(question.path).host
    url = http.base_url
    return f"{url.scheme}://{url.netloc.decode('ascii')}{url.path.rstrip('/')}{question.path}"


def _version() -> str:
    try:
        return version("genescale")
    except PackageNotFoundError:
        return "0"
