"""ScalaBL: Bayesian low-rank adapters whose only stochastic parameters are r scalars per adapted layer.

The method: adapter, posterior draws, one forward pass for K samples, predictive uncertainty, training and evaluation.
Nothing here knows of HTTP.
"""

__version__ = "0.1.0"
