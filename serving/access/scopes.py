"""Which key may ask what: one table from addresses to scopes.

An address that stands in no table needs `admin`: a route that somebody forgot to enter is closed, not open. A test asks
every route of the application with no key, a wrong key, each wrong scope and the right one.
"""

from __future__ import annotations

EMBED, PERTURB, CLASSIFY, NEIGHBORS, JOBS = "embed", "perturb", "classify", "neighbors", "jobs"
METRICS = "metrics"
"""For a scraper, which should not hold a key that can do more."""
ADMIN = "admin"
"""Everything, whatever is added later included."""
SCOPES = (EMBED, PERTURB, CLASSIFY, NEIGHBORS, JOBS, METRICS, ADMIN)
ANY_KEY = ""
"""Facts and the interface document: every accepted key may read them."""

# Probes of an orchestrator carry no key; they say nothing but "alive" and "ready".
ALIVE, READY = "/healthz", "/readyz"
OPEN_PATHS = frozenset({ALIVE, READY})
# A browser opens a page before anybody can give it a key. Pages and their files hold no data; what they ask for does.
OPEN_PAGES, OPEN_FILES = frozenset({"/", "/docs"}), "/assets/"
SCOPE_OF_PATH: dict[str, str] = {
    "/v1/embeddings": EMBED,
    "/v1/tokens": EMBED,
    "/v1/perturbations": PERTURB,
    "/v1/classify": CLASSIFY,
    "/v1/neighbors": NEIGHBORS,
    "/v1/reference/map": NEIGHBORS,
    "/v1/reference/examples": NEIGHBORS,
    "/v1/jobs": JOBS,
    "/v1/info": ANY_KEY,
    "/v1/models": ANY_KEY,
    "/openapi.json": ANY_KEY,
    "/metrics": METRICS,
}
SCOPE_BELOW: dict[str, str] = {"/v1/jobs/": JOBS, "/v1/models/": ANY_KEY}
"""Scopes of whole branches, such as one job's address."""
ADMIN_ENDING = "/rollout"
"""What changes the service stands below what tells of it."""


def is_open(path: str) -> bool:
    """Whether everybody may have what is at `path`, without a key."""
    return path in OPEN_PATHS or path in OPEN_PAGES or path.startswith(OPEN_FILES)


def scope_needed(path: str) -> str:
    """The scope that a question to `path` needs: one of SCOPES, or ANY_KEY."""
    if path in SCOPE_OF_PATH:
        return SCOPE_OF_PATH[path]
    if path.endswith(ADMIN_ENDING):
        return ADMIN
    return next((scope for branch, scope in SCOPE_BELOW.items() if path.startswith(branch)), ADMIN)


def allows(scopes: tuple[str, ...], needed: str) -> bool:
    """Whether a key with `scopes` may ask what needs `needed`."""
    return needed == ANY_KEY or needed in scopes or ADMIN in scopes
