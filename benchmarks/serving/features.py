"""A model whose shortcuts can be switched off one by one, and the check that methods agree. Timing is not done here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from scalabl.model.posterior import Draws
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.probes import find_shared_work

SAME = 1e-4  # how far probabilities of two methods may be apart

# A feature and those before it -> (shared trunk, last MLP trimmed, first products shared, no padding). Without padding rows
# fan out after the trunk always, which is before the first block where all are adapted.
FEATURES = {
    "one padded batch": (False, False, False, False),
    "+ no padding": (True, False, False, True),
    "+ first products shared": (True, False, True, True),
    "+ last MLP trimmed": (True, True, True, True),
}
BEST = "+ last MLP trimmed"


class SwitchableModel:
    """A model that runs with no more features than it is told."""

    def __init__(self, model: ScalaBLModel) -> None:
        self.model = model
        find_shared_work(model)
        shared = {name: layer.shared_input for name, layer in model.adapted.items()}
        self._possible = model.trunk.verified, model.trunk.trims, shared
        self._packs = model.packs

    def run(self, sequences: Sequence[Sequence[int]], draws: Draws, features: tuple[bool, bool, bool, bool]) -> Tensor:
        """[B, K, C] with no more than these features; those that are not possible stay off."""
        trunk, trims, shared = self._possible
        self.model.trunk.verified, self.model.trunk.trims = trunk and features[0], trims and features[1]
        for name, layer in self.model.adapted.items():
            layer.shared_input = shared[name] and features[2]
        self.model.packs = self._packs and features[3]
        return self.model.logits(TokenBatch.of(sequences), draws)


def largest_difference(passes: Mapping[str, Callable[[], Tensor]], same: float = SAME) -> float:
    """Run every method once; how far any of them is from the last one in a sample's probabilities."""
    probabilities = [run().softmax(-1) for run in passes.values()]
    difference = max(float((one - probabilities[-1]).abs().max()) for one in probabilities)
    assert difference <= same, f"the methods differ by {difference}"
    return difference
