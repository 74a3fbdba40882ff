"""Compiles a cast along columns, replaced if FP8GATE_CASTS is 1, and prints where its graph came from.

tests/test_casts_compiled.py starts it in processes that share Inductor's cache. It prints how often the cache had the
graph, how often it did not, and how often an operator of fp8gate ran. Nothing but `enable_if_asked` may load these.
"""

from __future__ import annotations

import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from fp8gate import casts

SIZE = 4096  # squared, the least number of elements that is replaced


def cast(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    amax = x.abs().amax(0, keepdim=True)
    scale = (448.0 / amax.double().clamp(min=1e-12)).float()
    return (x.float() * scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).t().contiguous(), scale


def main() -> None:
    casts.enable_if_asked()
    x = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(27)).bfloat16()
    compiled = torch.compile(cast, dynamic=False)
    compiled(x)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        data, scale = compiled(x)
    expected, expected_scale = cast(x)
    assert torch.equal(data.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, expected_scale)
    operators = sum(event.count for event in profiled.key_averages() if event.key.startswith("fp8gate::"))
    print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"], operators)


if __name__ == "__main__":
    main()
