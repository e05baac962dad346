"""`genescale perturb ACTION`: screens, their reports, comparisons of screens, attention, and states."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

ACTIONS: dict[str, tuple[str, str]] = {
    "screen": (
        "genescale.perturbation.screening.screen_command:screen",
        "try edits on the cells of a corpus and test what they do",
    ),
    "report": ("genescale.perturbation.reports.report_command:report", "redo the effects and the report of a screen"),
    "compare": ("genescale.perturbation.statistics.compare_command:compare", "test a screen against a null screen"),
    "attention": (
        "genescale.perturbation.attention.attention_command:attention",
        "measure what the heads of a model look at",
    ),
    "states": ("genescale.perturbation.readouts.states_command:states", "compute and keep the embeddings of states"),
}


def perturb(argv: Sequence[str]) -> int:
    """Run one action; SettingsError for an unknown one."""
    from genescale.platform.errors import SettingsError, did_you_mean

    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = argv
    if name not in ACTIONS:
        hint = did_you_mean(name, ACTIONS) or f"Actions: {', '.join(ACTIONS)}."
        raise SettingsError(f"`genescale perturb` has no action '{name}'.", fix=hint)
    module, function = ACTIONS[name][0].split(":")
    return int(getattr(importlib.import_module(module), function)(rest))


def usage() -> str:
    """The text of `genescale perturb --help`."""
    lines = [f"  {name:<10} {about}" for name, (_, about) in ACTIONS.items()]
    return "\n".join(
        [
            "usage: genescale perturb ACTION [options]",
            "",
            "What happens to these cells when that gene is gone, or comes first?",
            "",
            "actions:",
            *lines,
            "",
            "`genescale perturb ACTION --help` says more.",
        ]
    )
