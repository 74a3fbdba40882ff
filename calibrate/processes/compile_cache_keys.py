"""Imported by the fork server: the hashes of torch's and Triton's own files.

Both are part of every compile cache's key, and computing them takes 1.5 s of reading. Computed here, every child
inherits them.
"""

from torch._inductor.codecache import torch_key
from torch._inductor.runtime.triton_compat import HAS_TRITON, triton_key

torch_key()
if HAS_TRITON:
    triton_key()
