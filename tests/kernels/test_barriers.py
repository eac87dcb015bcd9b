"""What one thread of a program stores, another may load only after a barrier."""

import re

import pytest

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget

from tools.compiled import registers


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", ["backward_pairs_kernel llama-mqa", "backward_keys_kernel gqa8-2k"]
)
def test_sums_kept_in_memory_are_stored_before_a_barrier_that_the_next_turn_comes_after(name):
    compiled = registers.launches("sm_90")[name].compile(GPUTarget("cuda", 90, 32))
    lines = compiled.asm["ttgir"].splitlines()
    loads = [n for n, line in enumerate(lines) if re.search(r"\btt\.load\b", line)]
    stores = [n for n, line in enumerate(lines) if re.search(r"\btt\.store\b", line)]
    barriers = [n for n, line in enumerate(lines) if re.search(r"\b(gpu|ttg)\.barrier\b", line)]
    assert any(load < stores[-1] for load in loads)
    # In the loop that the last store is in, the turn ends with a barrier.
    depth = len(lines[stores[-1]]) - len(lines[stores[-1]].lstrip())
    end = next(
        n for n, line in enumerate(lines) if n > stores[-1]
        and len(line) - len(line.lstrip()) < depth and "}" in line
    )  # fmt: skip
    assert any(stores[-1] < barrier < end for barrier in barriers)
