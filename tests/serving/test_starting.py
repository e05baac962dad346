"""A service that cannot come up says why, soon, and leaves nothing."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from genescale.platform.errors import ClusterError
from genescale.platform.settings import Settings
from genescale.serving.config import ServingConfig

if TYPE_CHECKING:
    from genescale.platform.bundle import Bundle

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture
def settings(settings_for: Callable[[Path], Settings], tmp_path: Path) -> Settings:
    return settings_for(tmp_path)


@pytest.mark.parametrize(
    "asked", [{"num_cpus": 2.0}, {"replicas": 2}, {"num_gpus": 1.0}], ids=["processors", "replicas", "gpus"]
)
def test_more_than_this_machine_has_is_refused_and_not_waited_for(
    bundle: Bundle, settings: Settings, asked: dict[str, float]
) -> None:
    from genescale.serving.app import service

    config = ServingConfig(port=0, **asked)  # type: ignore[arg-type]
    with pytest.raises(ClusterError, match="Ray has"), service(bundle, config, settings):
        pytest.fail("it came up")


def test_an_address_in_use_is_named_and_nothing_is_left(bundle: Bundle, settings: Settings) -> None:
    from ray import serve

    from genescale.serving.app import service

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ClusterError, match=rf"bind to address '127\.0\.0\.1:{port}'") as caught,
            service(bundle, ServingConfig(port=port), settings),
        ):
            pytest.fail("it came up")
    assert "Traceback" not in str(caught.value)
    assert not serve.status().proxies
