"""What validation says: the rate drops and averaging begins at exactly the right evaluation."""

import re

import jax
import numpy as np
import pytest

from charlstm import config as config_lib
from charlstm.config import Config
from charlstm.config.training import OptimizerConfig
from charlstm.training import plateau

SCORES = [3.0, 2.0, 2.5, 2.0, 1.9, 2.1, 1.9, 1.95, 1.8, 2.0]  # without gain: 0 0 1 2 0 1 2 3 0 1


def told(settings: OptimizerConfig, scores=SCORES) -> list[plateau.PlateauState]:
    """The progress after each evaluation."""
    state, found = jax.tree.map(np.asarray, plateau.start()), []
    for score in scores:
        state = plateau.update(settings, state, score)
        found.append(state)
    return found


def first(found: list[plateau.PlateauState], field: str) -> int | None:
    """The evaluation, from 1 on, after which a field is set."""
    return next((number for number, state in enumerate(found, 1) if getattr(state, field)), None)


def test_a_score_as_good_as_the_best_is_no_gain():
    found = told(OptimizerConfig())
    assert [int(state.patience_count) for state in found] == [0, 0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert [int(state.evaluations) for state in found] == [*range(1, 11)]
    np.testing.assert_array_equal([state.best for state in found], np.minimum.accumulate(np.float32(SCORES)))


@pytest.mark.parametrize(
    ("patience", "latest", "evaluation"),
    [(1, 0, 3), (2, 0, 4), (3, 0, 8), (4, 0, None), (3, 6, 6), (2, 6, 4), (4, 10, 10), (4, 11, None)],
)
def test_the_rate_drops_after_so_many_evaluations_without_gain_or_at_the_latest_one_and_stays(
    patience, latest, evaluation
):
    found = told(OptimizerConfig(schedule="plateau", plateau_patience=patience, plateau_latest=latest))
    assert first(found, "dropped") == evaluation
    assert evaluation is None or all(state.dropped for state in found[evaluation - 1 :])
    assert first(told(OptimizerConfig(plateau_patience=patience, plateau_latest=latest)), "dropped") is None


@pytest.mark.parametrize(
    ("patience", "latest", "evaluation"),
    [(1, 0, 3), (2, 0, 4), (3, 0, 8), (4, 0, None), (3, 6, 6), (2, 6, 4), (4, 10, 10), (4, 11, None), (4, 1, 1)],
)
def test_averaging_begins_after_so_many_evaluations_without_gain_or_at_the_latest_one_and_its_count_goes_on(
    patience, latest, evaluation
):
    settings = OptimizerConfig(average="asgd", average_patience=patience, average_latest=latest)
    assert first(told(settings), "averaged") == evaluation
    ema = OptimizerConfig(average="ema", average_patience=patience, average_latest=latest)
    assert first(told(ema), "averaged") is None
    begun = told(settings)[-1]._replace(averaged=np.int32(40))
    for score in (9.0, 0.1):  # the evaluations 11 and 12
        begun = plateau.update(settings, begun, score)
        assert begun.averaged == 40


def test_what_is_told_keeps_its_types():
    before, after = plateau.start(), told(OptimizerConfig())[-1]
    assert [leaf.dtype for leaf in before] == [leaf.dtype for leaf in after]
    assert all(isinstance(leaf, np.ndarray) and not leaf.shape for leaf in after)


@pytest.mark.parametrize("flags", [{"schedule": "plateau"}, {"average": "asgd"}])
def test_a_run_that_goes_by_validation_and_never_validates_is_refused(flags):
    (name, value), = flags.items()  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(f"{name}={value} goes by validation scores, and with evaluate_ev")):
        config_lib.replace(Config(), evaluate_every=0, **flags)
    assert config_lib.replace(Config(), evaluate_every=0, average="asgd", average_patience=0)
    assert config_lib.replace(Config(), evaluate_every=0, average="ema")


def test_where_a_run_goes_by_validation_what_makes_the_scores_is_held():
    changes = {"evaluate_every": 7, "evaluate_symbols": 0, "eval_chunk": 100, "burn_in": 3, "evaluation_batch_size": 5}
    for flags, held in (({}, []), ({"average": "ema"}, []), ({"schedule": "plateau"}, [*changes])):
        run = config_lib.replace(Config(), **flags)
        forbidden, mutable = config_lib.diff(run, config_lib.replace(run, **changes))
        assert sorted(words.partition(":")[0] for words in forbidden) == sorted(held)
        assert len(forbidden) + len(mutable) == 5
