"""Imported by the process that workers are forked from: the hashes of torch's and Triton's own files.

Both go into every compile cache's key and take 1.5 s of reading; computed here, all workers inherit them.
"""

from torch._inductor.codecache import torch_key
from torch._inductor.runtime.triton_compat import HAS_TRITON, triton_key

torch_key()
if HAS_TRITON:
    triton_key()
