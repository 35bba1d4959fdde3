"""Compile what the launchers would launch, for GPUs that need not be there, and read its resources.

Run as a program of its own, without TRITON_INTERPRET; prints one JSON object a launch.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssm_fast.kernels.recurrence import Plan, plan

CUOBJDUMP = triton.knobs.nvidia.cuobjdump.path
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.bool: "i1",
}


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((args, options))


def compile_launch(kernel, args, options, capability):
    """The resources that one launch needs on a GPU of ``capability``."""
    names = kernel.arg_names
    compile_options = {
        k: options[k] for k in ("num_warps", "enable_fp_fusion", "num_stages") if k in options
    }
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k in names}
    signature, constants, attributes = {}, {}, {}
    annotations = inspect.get_annotations(kernel.fn)
    for i, name in enumerate(names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif value is None or "constexpr" in str(annotations.get(name, "")):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=compile_options)
    return {"shared": compiled.metadata.shared} | resources(compiled.asm["cubin"])


def resources(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(
        r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text
    ).groups()
    return {"registers": int(registers), "spilled": int(stack) + int(local)}


def problem(op, dtype, N, B, T, G=2):
    """Arguments of ``op``; of sizes other than N, only whether strides need 64 bits matters."""

    def real(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, rstd = real(G, B, T, N), real(G, B, T)
    A, weight, s0 = real(G, N, N), real(G, N), real(G, B, N)
    reset, flag = (torch.empty(s, dtype=torch.bool, device="meta") for s in ((G, B, T), (B, T, N)))
    return {
        "dense_scan": (x, A, s0, reset, False),
        "norm_scan": (x, A, weight, weight, s0, reset, 1e-5, True),
        "norm_scan_tangent": (x, x, A, weight, x, rstd, s0, reset),
        "norm_scan_adjoint": (x, x, A, weight, x, rstd, reset),
        "linear_scan": (real(B, T, N), real(B, T, N), real(B, N), False, False),
        "gae": (*[real(B, T, N)] * 3, flag, flag, 0.99, 0.95),
        "discounted_returns": (*[real(B, T, N)] * 2, flag, flag, 0.99),
        "output_norm": (x, weight, weight, x, 1e-5, True, True),
        "output_norm_grad": (x, x, weight, weight, rstd, rstd, True),
    }[op]


MODULES = {
    "norm_scan_tangent": "norm_scan",
    "norm_scan_adjoint": "norm_scan",
    "discounted_returns": "gae",
    "output_norm_grad": "output_norm",
}


def launches(op, dtype, N, B, T, *chosen):
    """The launches of one call of ``op``, by the plan ``chosen`` or its own."""
    module = importlib.import_module(f"ssm_fast.kernels.{MODULES.get(op, op)}")
    if chosen:
        module.plan = lambda *_: Plan(*chosen)
    elif hasattr(module, "plan"):
        module.plan = plan
    recorders = {
        name: Recorder(value)
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.JITFunction) and name.endswith("kernel")
    }
    for name, recorder in recorders.items():
        setattr(module, name, recorder)
    getattr(module, op)(*problem(op, dtype, N, B, T))
    for name, recorder in recorders.items():
        setattr(module, name, recorder.kernel)
    return [(r.kernel, *launch) for r in recorders.values() for launch in r.launches]


def main(cases):
    for case in cases:
        op, dtype, N, B, T, capability, *chosen = case
        for kernel, args, options in launches(op, getattr(torch, dtype), N, B, T, *chosen):
            print(json.dumps({"case": case} | compile_launch(kernel, args, options, capability)))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
