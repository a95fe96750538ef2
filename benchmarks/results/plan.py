"""Which trainings the study consists of. How one is carried out is in `execute`, what it measured in `saved`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from scalabl.training.recipe import TrainingConfig

STEPS = {"train": 600, "few": 200}
SEEDS = (0, 1, 2)
Method = Literal["base", "lora", "dropout", "scalabl"]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        rows: `train` or `few`.
        recipe: what differs from the study's recipe.
        prior_std: of ScalaBL's prior.
        report: what is evaluated: the test set and the queries outside, or (in the sweep) the validation sets alone.
    """

    name: str
    method: Method
    rows: str = "train"
    seed: int = 0
    recipe: tuple[tuple[str, Any], ...] = ()
    prior_std: float = 1.0
    report: Literal["test", "validation"] = "test"

    @property
    def training(self) -> TrainingConfig:
        """The whole recipe."""
        steps = STEPS[self.rows]
        common = {"max_steps": steps, "eval_steps": steps // 4, "eval_samples": 8, "seed": self.seed, "novelty": False}
        return TrainingConfig.model_validate(common | dict(self.recipe))

    @property
    def plan(self) -> dict[str, Any]:
        """All of the above, for the file of its scores."""
        return {"run": dataclasses.asdict(self), "training": self.training.model_dump(mode="json")}


PUBLISHED = (("recipe", "published"),)


def peer_runs() -> list[Run]:
    """The table's trainings that do not follow from the sweep."""
    runs = [Run("base", "base")]
    for seed in SEEDS:
        for rows in ("train", "few"):
            of = {"rows": rows, "seed": seed}
            runs += [
                Run(f"{rows}-lora-{seed}", "lora", **of),
                Run(f"{rows}-published-{seed}", "scalabl", recipe=PUBLISHED, **of),
                Run(f"{rows}-dropout-{seed}", "dropout", **of),
            ]
    return runs


def our_runs() -> list[Run]:
    """The table's trainings by the defaults that follow from the sweep."""
    return [Run(f"{rows}-scalabl-{seed}", "scalabl", rows, seed) for seed in SEEDS for rows in ("train", "few")]


def sweep_runs() -> list[Run]:
    """KL direction, its weight, sigma's start and the prior, one seed each, judged on the validation rows."""
    cells: dict[str, dict[str, Any]] = {
        "q_p, β = 1": {},
        "q_p, β = 0.1": {"kl_weight": 0.1},
        "q_p, β = 10": {"kl_weight": 10.0},
        "p_q, β = 1": {"kl_direction": "p_q"},
        "p_q, β = 0.1": {"kl_direction": "p_q", "kl_weight": 0.1},
        "q_p, β = 1, σ starts at 0.5": {"std_init": 0.5},
        "q_p, β = 1, σ learns like μ": {"sigma_learning_rate": 2e-3},
        "published, SGD 0.2": {"recipe": "published"},
        "published, SGD 0.02": {"recipe": "published", "kl_learning_rate": 0.02},
    }
    runs = [
        Run(f"sweep {name}", "scalabl", recipe=tuple(changes.items()), report="validation")
        for name, changes in cells.items()
    ]
    return [*runs, Run("sweep q_p, β = 1, prior 0.3", "scalabl", prior_std=0.3, report="validation")]
