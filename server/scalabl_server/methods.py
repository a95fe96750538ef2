"""The names of the prediction methods that a request can choose. Their computation is in `batching.jobs`."""

from __future__ import annotations

from typing import Literal

Method = Literal["monte_carlo", "linearized", "control_variate"]
