"""Compile the Hopper forward for sm_90 without a GPU: python -m tools.hopper_compile 64 8 1."""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from csrc_free.hopper.forward import forward_kernel as kernel
from csrc_free.hopper.serve import Config


def compiled(group: int) -> dict[str, int]:
    """Return registers, bytes of spills and bytes of shared memory for one group size."""
    config = Config(64 // group, group)

    def layout(shape):
        return gl.NVMMASharedLayout.get_default_for(shape, gl.bfloat16)

    q, key = [1, 1, group, config.positions, 128], [1, 1, config.block_n, 128]
    constants = {
        "HAS_BIAS": False, "P": config.positions, "G": group, "D": 128,
        "BLOCK_N": config.block_n, "TILES": config.tiles, "Q_ROWS": layout([64, 128]),
    }  # fmt: skip
    types = dict.fromkeys(constants, "constexpr")
    types |= dict.fromkeys(("k_narrow", "v_narrow", "out"), "*bf16") | {"lse": "*fp32"}
    types |= dict.fromkeys(("log2_scale", "k_narrow_bias", "v_narrow_bias"), "fp32")
    for name, block in (("q", q), ("k_wide", key), ("v_wide", key)):
        types[name] = f"tensordesc<bf16{block},{layout(block)!r}>"
    names = kernel.arg_names
    signature = {name: types.get(name, "i32") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name.startswith("stride")
    }
    source = GluonASTSource(
        fn=kernel, signature=signature, attrs=aligned,
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )  # fmt: skip
    options = {"num_warps": 4, "maxnreg": config.max_registers}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptxas = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        ptx = pathlib.Path(folder) / "forward.ptx"
        ptx.write_text(made.asm["ptx"])
        command = [ptxas, "-v", "--gpu-name=sm_90a", ptx, "-o", ptx.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {
        "registers": r"Used (\d+) registers",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
    }
    numbers = {name: int(re.search(rule, said).group(1)) for name, rule in found.items()}
    return {"group": group, **numbers, "shared": made.metadata.shared}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        sys.stdout.write(json.dumps(compiled(int(argument))) + "\n")
