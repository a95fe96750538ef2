"""The one operation that every posterior sample needs: `subspace_projection`.

Nothing here knows of language models, adapters on disk or HTTP.
"""

from scalabl_kernels.projection import runs_fused, subspace_projection

__all__ = ["runs_fused", "subspace_projection"]
