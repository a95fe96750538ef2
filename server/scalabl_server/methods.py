"""The names of the methods by which an answer is computed. How each computes is in `batching.jobs`."""

from __future__ import annotations

from typing import Literal

Method = Literal["monte_carlo", "linearized", "control_variate"]
