"""How much each searched setting decides the score of a trial.

Method: functional ANOVA over a random forest that predicts the score from the settings (Hutter, Hoos and Leyton-Brown,
An efficient approach for assessing hyperparameter importance, ICML 2014), as Optuna computes it with scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from genescale.training.sweeps.sampling import Drawing, distribution
from genescale.training.sweeps.sweep_spec import TuneSpec
from genescale.training.sweeps.trial_records import Trial

METHOD = "functional ANOVA over a random forest (Hutter et al., 2014; Optuna's fANOVA with scikit-learn)"
FEWEST_TRIALS = 8
"""Of fewer scored trials nothing is said."""


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Shares of the variance of scores by setting, largest first, with sum 1; empty with the reason in `why_not`."""

    shares: tuple[tuple[str, float], ...] = ()
    trials: int = 0
    left_out: tuple[str, ...] = ()
    """Settings that only some trials draw: they cannot be compared with the others."""
    why_not: str = ""


def importance(spec: TuneSpec, trials: Sequence[Trial]) -> Importance:
    """The importance of the settings that every trial draws, from the trials with a score (stopped ones too)."""
    import optuna

    scored = [trial for trial in trials if trial.score is not None and trial.status != "failed"]
    names = [name for name in spec.order if not spec.search[name].when]
    left_out = tuple(name for name in spec.order if spec.search[name].when)
    varied = [name for name in names if len({trial.sample[name] for trial in scored}) > 1]
    if len(scored) < FEWEST_TRIALS:
        why_not = f"{len(scored)} trials have a score, and fewer than {FEWEST_TRIALS} say nothing."
    elif len({trial.score for trial in scored}) < 2:
        why_not = "all trials have the same score."
    elif not varied:
        why_not = "all trials drew the same values."
    else:
        Drawing(spec)
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
        # Stopped trials count with the score they had: leaving them out would look at the good half only.
        for trial in scored:
            study.add_trial(
                optuna.trial.create_trial(
                    params={name: trial.sample[name] for name in varied},
                    distributions={name: distribution(name, spec.search[name]) for name in varied},
                    value=trial.score,
                )
            )
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        shares = tuple(sorted(((name, float(share)) for name, share in found.items()), key=lambda pair: -pair[1]))
        return Importance(shares=shares, trials=len(scored), left_out=left_out)
    return Importance(trials=len(scored), left_out=left_out, why_not=why_not)
