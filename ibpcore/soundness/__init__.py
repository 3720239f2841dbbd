"""Certificates that hold in spite of rounding; docs/soundness.md derives every inequality.

`arithmetic` is the model of floating point, `rules` what it makes of each layer, `network`
the rules of a model, `margins` their bounds, `verification` radii that are proved.
"""

from ibpcore.soundness.margins import sound_margins
from ibpcore.soundness.network import CLAIMS, SoundNetwork, sound_network
from ibpcore.soundness.verification import verified_radii

__all__ = ["CLAIMS", "SoundNetwork", "sound_margins", "sound_network", "verified_radii"]
