"""What one demo run will do: its choices, the digest that names them, and where its parts live."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from genescale.platform.errors import InputError, SettingsError
from genescale.platform.settings import ClusterSettings, Settings, StorageSettings, TrackingSettings
from genescale.platform.storage import Store, is_remote, join
from genescale.serving.demo.work import WorkFolder, plan_digest

BUCKET = "s3://genescale-demo"
MODEL_NAME = "genescale-demo"
HEAD_NAME = "genescale-demo-cell-type"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The choices of a demo run."""

    atlas: tuple[str, ...] = ()
    """Atlas files: paths, globs or `s3://…`; none means a simulated atlas."""
    vocabulary: str = ""
    """A vocabulary to use; empty means one computed from the atlas."""
    simulation: Mapping[str, Any] = field(default_factory=dict)
    """Values of `SimulateConfig` that differ from its defaults."""
    local: bool = False
    """Plain folders instead of the embedded S3 endpoint."""
    seed: int = 0
    recipe: str = ""
    """Pretraining recipe; empty takes `demo` for a simulated atlas and `small` for a real one."""
    workers: int = 0
    """Training workers; 0 means one per processor, at most two."""
    screen_cells: int = 192
    """Cells of the deletion screen of a real atlas."""
    truth_cells: int = 2_000
    """Cells of the deletion screen of a simulated atlas: its cells are short, and a truth is found in many."""
    screen_genes: int = 12
    """Genes deleted when the atlas comes without a planted truth."""
    label: str = "cell_type"

    def __post_init__(self) -> None:
        for name in ("workers", "seed"):
            if getattr(self, name) < 0:
                raise SettingsError(f"demo.{name} is {getattr(self, name)}.", fix="Use 0 or more.")
        for name in ("screen_cells", "screen_genes", "truth_cells"):
            if getattr(self, name) < 1:
                raise SettingsError(f"demo.{name} is {getattr(self, name)}.", fix="Use at least 1.")

    @property
    def simulated(self) -> bool:
        """True when the atlas is a simulated one, so that there is a truth to compare with."""
        return not self.atlas

    @property
    def chosen_recipe(self) -> str:
        """The recipe that is trained."""
        return self.recipe or ("demo" if self.simulated else "small")

    @property
    def window(self) -> int:
        """Tokens per cell of a vocabulary computed here; a published one brings its own. Simulated cells are short."""
        return 512 if self.simulated else 2_048

    @property
    def training_workers(self) -> int:
        """Training workers to start."""
        return self.workers or min(2, os.cpu_count() or 1)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """A demo run under way: its choices, its folder, and the settings every stage uses."""

    config: DemoConfig
    work: WorkFolder
    settings: Settings
    store: Store
    root: str
    """Address that the atlas, the corpus and all results are written below."""

    def at(self, *parts: str) -> str:
        """An address below `root`."""
        return join(self.root, *parts)

    def made(self, stage: str) -> dict[str, Any]:
        """What a finished stage recorded."""
        made: dict[str, Any] = self.work.stages[stage]["made"]
        return made


def find_sources(config: DemoConfig, outside: Settings) -> tuple[str, ...]:
    """The atlas files that the user's patterns name, read with the user's own settings. InputError when none fits."""
    store = Store(outside.storage)
    found: list[str] = []
    for pattern in config.atlas:
        entries = [entry.uri for entry in store.glob(pattern)] if "*" in pattern else [store.stat(pattern).uri]
        if not entries:
            raise InputError("no file fits this pattern.", where=pattern, fix="Check the path; quote globs.")
        found += entries
    names = [Path(uri).name for uri in found]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise InputError(f"several files are called {', '.join(doubled)}.", fix="Give atlas files distinct names.")
    return tuple(found)


def digest_of(config: DemoConfig, sources: tuple[str, ...], outside: Settings) -> str:
    """Names the run: its choices, the identity of each input file, and the version of Genescale."""
    store = Store(outside.storage)
    inputs = [*sources, *([config.vocabulary] if config.vocabulary else [])]
    identities = [dataclasses.astuple(entry) for uri in inputs for entry in store.list(uri)]
    return plan_digest({"config": dataclasses.asdict(config), "inputs": identities, "genescale": version("genescale")})


def demo_settings(work: WorkFolder, storage: StorageSettings) -> Settings:
    """Settings of the run itself: everything below the work folder."""
    return Settings(
        storage=storage,
        tracking=TrackingSettings(
            uri=f"sqlite:///{work.path / 'mlflow.db'}", artifact_root=str(work.folder("mlartifacts")), experiment="demo"
        ),
        cluster=ClusterSettings(num_cpus=max(2, os.cpu_count() or 1), temp_dir=str(work.path / "ray")),
    )


def settings_file(work: WorkFolder) -> Path:
    """Write the settings with which later commands find what the run made; returns their file."""
    path = work.path / "genescale.toml"
    path.write_text(
        "# Settings of this demo: `genescale COMMAND --settings THIS-FILE`.\n"
        "[tracking]\n"
        f'uri = "sqlite:///{work.path / "mlflow.db"}"\n'
        f'artifact_root = "{work.path / "mlartifacts"}"\n'
        'experiment = "demo"\n',
        encoding="utf-8",
    )
    return path


def folder_of(demo: Demo, address: str) -> str:
    """Where an address of the run is found after it: below `object-storage/` in the work folder."""
    if not is_remote(address):
        return address
    return str(demo.work.path / "object-storage" / address.removeprefix(f"{BUCKET}/"))
