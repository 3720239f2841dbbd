"""The names in `ibpcore.choices` are those of the dictionaries that hold what they stand for."""

import pytest

from ibpcore import choices
from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification.certificates import UNCHECKED
from ibpcore.certification.soundness.network import CLAIMS
from ibpcore.data.sources import DATASETS, STANDARD_RADII
from ibpcore.interop.importing.normalizations import KNOWN_DATASETS, SOURCES
from ibpcore.nn.architectures import ARCHITECTURES
from ibpcore.nn.initialization import INITIALIZATIONS
from ibpcore.roots import SOLVERS
from ibpcore.training.methods import METHODS
from ibpcore.training.presets import METHOD_PRESETS, PRESETS
from ibpcore.training.schedules import LEARNING_RATES, SCHEDULES

DICTIONARIES = {
    "ARCHITECTURES": ARCHITECTURES,
    "BOUNDS": BOUNDS,
    "CLAIMS": {UNCHECKED: None, **CLAIMS},
    "DATASETS": DATASETS,
    "INITIALIZATIONS": INITIALIZATIONS,
    "KNOWN_DATASETS": KNOWN_DATASETS,
    "LEARNING_RATES": LEARNING_RATES,
    "METHODS": METHODS,
    "SCHEDULES": SCHEDULES,
    "SOLVERS": SOLVERS,
    "SOURCES": SOURCES,
}


@pytest.mark.parametrize("name", DICTIONARIES)
def test_names_are_the_keys_of_a_dictionary(name):
    assert getattr(choices, name) == tuple(DICTIONARIES[name])


def test_every_data_set_and_method_has_a_preset():
    assert set(choices.DATASETS) == set(PRESETS) == set(STANDARD_RADII)
    assert set(choices.METHODS) == set(METHOD_PRESETS)
