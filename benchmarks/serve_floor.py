"""The floor that Ray Serve itself sets: an endpoint that takes a body, does nothing, and answers with given bytes."""

from __future__ import annotations

import sys

import ray
from ray import cloudpickle, serve
from starlette.requests import Request
from starlette.responses import Response

NAME = "floor"


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=256)
class Floor:
    """Holds the answer."""

    def __init__(self, answer: bytes, media_type: str) -> None:
        self._answer, self._media_type = answer, media_type

    async def __call__(self, request: Request) -> Response:
        await request.body()
        return Response(self._answer, media_type=self._media_type)


def lay(path: str, answer: bytes, media_type: str) -> None:
    """Deploy it beside whatever is served, behind the same proxy.

    By a process of its own: who deploys holds a handle, and would be told on its terminal when Serve stops.
    """
    # Ray's workers cannot import what lies beside a script.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    layer = ray.remote(num_cpus=0)(_Layer).remote()
    ray.get(layer.lay.remote(path, answer, media_type))
    ray.kill(layer)


class _Layer:
    def lay(self, path: str, answer: bytes, media_type: str) -> None:
        serve.run(Floor.bind(answer, media_type), name=NAME, route_prefix=path)  # type: ignore[attr-defined]
