"""ScalaBL: Bayesian low-rank adapters in which only r scalars per adapted layer are random.

The package has the method: adapter, posterior draws, one forward pass for K samples, predictive uncertainty, training and
evaluation. The HTTP server is in `scalabl_server`.
"""

__version__ = "0.1.0"
