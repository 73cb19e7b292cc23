"""What each setting touches is said once, and caches, sweeps and checkpoints derive from it what they depend on."""

from __future__ import annotations

from fmp_core.settings import (
    FIELDS,
    PRESETS,
    Settings,
    Stage,
    deciding_inversion,
    deciding_ranking,
    deciding_result,
    training_settings,
)


def test_every_setting_says_what_it_touches():
    for name, field in FIELDS.items():
        stages, decides = field.metadata["stages"], field.metadata["decides"]
        assert stages and all(isinstance(stage, Stage) for stage in stages), name
        if set(stages) & {Stage.NAMING, Stage.RUN, Stage.OUTPUT, Stage.NO_EFFECT}:
            assert not decides, name


def test_what_is_not_asked_of_the_numbers_decides_nothing():
    free = {"wait", "report", "tensorboard", "log", "log_level", "quiet", "save_folder", "defense_name", "fresh", "preset"}
    free |= {"frequency_save", "checkpoint_save", "chunk", "memory", "record_root", "dataset_path", "num_workers", "pin_memory"}
    assert not free & {*deciding_result(), *deciding_ranking(Settings()), *deciding_inversion()}


def test_scores_depend_on_what_ranking_sees():
    ranking = deciding_ranking(Settings())
    assert {"eps", "frg_steps", "alpha", "frg_samples", "dtype", "ratio", "index", "random_seed", "mean", "std"} <= set(ranking)
    assert not {"p", "scope", "selection", "budget", "lr", "epochs", "test_images", "frequency_test"} & set(ranking)
    assert {"p", "scope"} <= set(deciding_ranking(Settings(ranking="racing")))


def test_inverted_triggers_depend_on_what_the_search_sees():
    assert set(deciding_inversion()) == {"ratio", "index", "random_seed", "mean", "std", "dtype"}


def test_results_and_the_state_of_fine_tuning_depend_on_all_that_made_them():
    state = {
        "eps",
        "p",
        "scope",
        "selection",
        "lr",
        "wd",
        "amp",
        "masked",
        "unlearn",
        "distill",
        "interpolate",
        "frequency_test",
        "test_images",
    }
    assert state <= set(deciding_result())


def test_what_a_preset_sets_decides():
    assert {name for sets in PRESETS.values() for name in sets} <= set(deciding_result())


def test_make_record_trains_with_these_settings():
    names = "device random_seed epochs batch_size lr lr_scheduler steplr_stepsize steplr_gamma steplr_milestones sgd_momentum"
    assert list(training_settings()) == [*names.split(), "wd", "amp"]
