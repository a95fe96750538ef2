"""The low-rank operation of the adapted layers, `subspace_projection`, as a Triton kernel and in plain torch.

Language models and adapters are in `scalabl`, the server in `scalabl_server`.
"""

from scalabl_kernels.projection import runs_fused, subspace_projection

__all__ = ["runs_fused", "subspace_projection"]
