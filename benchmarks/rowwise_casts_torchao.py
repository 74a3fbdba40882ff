"""torchao's casts of the rowwise recipe: as they are, compiled by Inductor, and compiled under one of its settings.

In: a bf16 operand (M, K). Out: its row form, data (M, K) with scales (M, 1), its column form, data (K, M) with scales
(1, K), or both. Only `compile_cast` asks for a compiler; benchmarks/rowwise_casts.py times what it returns.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from torchao.float8.config import ScalingGranularity
from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
from torchao.float8.float8_training_tensor import LinearMMConfig
from triton.errors import TritonError

Cast = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]

SETTINGS: tuple[Mapping[str, object], ...] = (
    {"triton.tile_reductions": True},
    {"triton.prefer_nd_tiling": True},
    {"triton.tile_reductions": True, "triton.prefer_nd_tiling": True},
    {"triton.max_tiles": 3},
    {"triton.max_tiles": 1},
    {"loop_ordering_after_fusion": False},
    {"loop_ordering_after_fusion": True},
    {"max_autotune_pointwise": True},
    {"coordinate_descent_tuning": True},
    {"triton.coalesce_tiling_analysis": False},
    {"triton.mix_order_reduction": False},
    {"triton.cooperative_reductions": True},
    {"split_reductions": False},
    {"triton.persistent_reductions": False},
    {"triton.multi_kernel": 1},
    {"aggressive_fusion": True},
    {"combo_kernels": True},
    {"triton.tiling_prevents_reduction_fusion": False},
    {"triton.use_tensor_descriptor": True, "assume_aligned_inputs": True},
)
"""Each is tried alone. What is on by default is turned off here."""
TOGETHER: Mapping[str, object] = {
    "triton.tile_reductions": True,
    "max_autotune_pointwise": True,
    "coordinate_descent_tuning": True,
}
COMPILER_ERRORS = (TritonError, RuntimeError, AssertionError, NotImplementedError, ValueError, TypeError, KeyError)
"""What a setting that Inductor cannot follow raises. Its own exceptions are RuntimeErrors."""
KERNEL = re.compile(r"@triton\.jit\n(def .*?)\n'''", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledCast:
    """A cast that Inductor compiled. kernels: the source of its Triton kernels, without the settings it notes there."""

    cast: Cast
    compiling_s: float
    kernels: tuple[str, ...]


def torchao_forms(form: str, *, powers_of_two: bool) -> Cast:
    """torchao's own cast to the form "row", "column" or "both", for one operand."""

    def along(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        cast = hp_tensor_to_float8_dynamic(
            x,
            torch.float8_e4m3fn,
            LinearMMConfig(),
            scaling_granularity=ScalingGranularity.AXISWISE,
            axiswise_dim=dim,
            round_scales_to_power_of_2=powers_of_two,
        )
        return cast._data, cast._scale

    def rows(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return along(x, -1)

    def columns(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        data, scale = along(x, 0)
        return data.t().contiguous(), scale

    def both(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return *rows(x), *columns(x)

    return {"row": rows, "column": columns, "both": both}[form]


def compile_cast(
    form: str, x: torch.Tensor, setting: Mapping[str, Any] | None = None, *, powers_of_two: bool = True
) -> CompiledCast:
    """Compile for this operand alone and run once, which includes Inductor's tuning."""
    torch._dynamo.reset()
    cast = torch.compile(torchao_forms(form, powers_of_two=powers_of_two), dynamic=False, fullgraph=True)
    start = time.perf_counter()
    with inductor_config.patch(dict(setting or {})):
        _, codes = run_and_get_code(cast, x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
    kernels = tuple(kernel for code in codes for kernel in KERNEL.findall(code))
    return CompiledCast(cast=cast, compiling_s=time.perf_counter() - start, kernels=kernels)


def unknown_to_torch(setting: Mapping[str, object]) -> tuple[str, ...]:
    """The names in a setting that this release's Inductor does not have."""
    known = inductor_config.get_config_copy()
    return tuple(name for name in setting if name not in known)


def already_default(setting: Mapping[str, object]) -> bool:
    known = inductor_config.get_config_copy()
    return all(known[name] == value for name, value in setting.items())


def describe_setting(setting: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in setting.items()) or "default"
