"""Stopping a running service without losing a request: no new ones first, then the end of those that were begun."""

from __future__ import annotations

import time

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from genescale.platform.log import get_logger

# The HTTP side answers this itself, whatever its model does.
CALL_TIMEOUT_S = 10.0
ASK_EVERY_S = 0.1
log = get_logger(__name__)


class Drainer:
    """`drain` in a process of its own, which is there from the start and ends before Serve does.

    Who once held a handle listens to Serve's controller for as long as it lives, and when Serve stops, Ray tells the
    terminal of that process that the call failed. Starting a process takes seconds, and a stop has to be told at once.
    """

    def __init__(self) -> None:
        self._actor = ray.remote(num_cpus=0)(_Drainer).remote()

    def drain(self, application: str, *, timeout_s: float) -> int:
        """As the function `drain`; once."""
        try:
            left: int = ray.get(self._actor.drain.remote(application, timeout_s))
        except RayError:
            return drain(application, timeout_s=timeout_s)
        ray.kill(self._actor)
        return left


class _Drainer:
    def drain(self, application: str, timeout_s: float) -> int:
        return drain(application, timeout_s=timeout_s)


def drain(application: str, *, timeout_s: float) -> int:
    """Tell every HTTP process of a Serve application to take no more requests, and wait for those it has.

    Returns how many were not finished after `timeout_s`, 0 when all were. A process that cannot be asked is not waited
    for: what stops it afterwards waits for its requests again.
    """
    until_s = time.monotonic() + timeout_s
    try:
        handle = serve.get_app_handle(application)
        while (left := _tell_and_ask(handle)) and time.monotonic() < until_s:
            time.sleep(ASK_EVERY_S)
    except (RayError, RayServeException, TimeoutError) as error:
        log.warning("the HTTP processes could not be told to stop: %s", type(error).__name__)
        return 0
    if left:
        log.warning("%d requests were not finished within %g s of the stop", left, timeout_s)
    return left


def _tell_and_ask(handle: DeploymentHandle) -> int:
    """Requests in work; telling a process again that it drains changes nothing."""
    answers = handle.broadcast("drain").results(timeout_s=CALL_TIMEOUT_S, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, Exception):
            log.warning("an HTTP process could not be told to stop: %s", type(answer).__name__)
    return sum(answer for answer in answers if isinstance(answer, int))
