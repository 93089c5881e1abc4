"""Programs that mean what they say: the pre-flight has nothing to object to, whatever suits them."""

from sound import (
    autoencoders,
    autoguides,
    coincidences,
    conjugate,
    factors,
    groups,
    idioms,
    layered,
    mixtures,
    regressions,
    sequences,
    tutorials,
)
from sound.corpus import ESTIMATORS, PROGRAMS, Sound

__all__ = [
    "ESTIMATORS",
    "PROGRAMS",
    "Sound",
    "autoencoders",
    "autoguides",
    "coincidences",
    "conjugate",
    "factors",
    "groups",
    "idioms",
    "layered",
    "mixtures",
    "regressions",
    "sequences",
    "tutorials",
]
