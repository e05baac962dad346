"""Which settings the next trial draws: a function of the spec, the trial's number and the trials that ended before it.

Optuna does the drawing, with a generator that is seeded anew for each trial. So a sweep that was cut off draws what it
would have drawn, and one that runs a trial at a time always draws the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from genescale.training.sweeps.sweep_spec import TuneSpec, Values, is_whole
from genescale.training.sweeps.trial_records import Trial

if TYPE_CHECKING:
    import optuna

SEEDS_APART = 1_000_003
"""Sweep seeds are so far apart that neighbouring sweeps share no trial's seed."""


class Drawing:
    """Draws the settings of trials."""

    def __init__(self, spec: TuneSpec) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.spec = spec
        self._known: dict[int, optuna.trial.FrozenTrial] = {}

    def sample(self, number: int, trials: Iterable[Trial]) -> dict[str, Any]:
        """The settings of trial `number`; `trials` are those drawn before it, of which the ended ones teach."""
        study = self.study(trials)
        seed = (self.spec.sweep.seed * SEEDS_APART + number) % 2**32
        study.sampler = self._sampler(seed)
        trial = study.ask()
        sample: dict[str, Any] = {}
        for name in self.spec.order:
            if self.spec.active(name, sample):
                sample[name] = _suggested(trial, name, self.spec.search[name])
        return sample

    def study(self, trials: Iterable[Trial]) -> optuna.Study:
        """Optuna's form of the trials that ended, in the order of their numbers; failed ones teach nothing."""
        import optuna

        study = optuna.create_study(direction="maximize", sampler=self._sampler(0))
        ended = sorted((t for t in trials if t.ended and t.score is not None), key=lambda t: t.number)
        for trial in ended:
            if trial.number not in self._known:
                self._known[trial.number] = self._frozen(trial)
        study.add_trials([self._known[trial.number] for trial in ended])
        return study

    def _sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        import optuna

        if self.spec.sweep.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed)

    def _frozen(self, trial: Trial) -> optuna.trial.FrozenTrial:
        import optuna

        states = optuna.trial.TrialState
        state = {"finished": states.COMPLETE, "stopped": states.PRUNED}.get(trial.status, states.FAIL)
        return optuna.trial.create_trial(
            params=dict(trial.sample),
            distributions={name: distribution(name, self.spec.search[name]) for name in trial.sample},
            value=None if state is states.FAIL else trial.score,
            intermediate_values=dict(trial.steps),
            state=state,
        )


def distribution(name: str, values: Values) -> optuna.distributions.BaseDistribution:
    """Optuna's form of the values of one setting."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if values.choices:
        return CategoricalDistribution(values.choices)
    low, high = values.low or 0.0, values.high or 0.0
    if is_whole(name):
        return IntDistribution(int(low), int(high), log=values.log)
    return FloatDistribution(low, high, log=values.log)


def _suggested(trial: optuna.Trial, name: str, values: Values) -> Any:
    if values.choices:
        return trial.suggest_categorical(name, values.choices)
    low, high = values.low or 0.0, values.high or 0.0
    if is_whole(name):
        return trial.suggest_int(name, int(low), int(high), log=values.log)
    return trial.suggest_float(name, low, high, log=values.log)
