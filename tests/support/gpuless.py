"""torch.compile for an H100 that is not there: nothing runs, all else is as it would be.

Inductor writes its code for sm_90; Triton compiles it, down to the binary, where that is asked for.
"""

import contextlib
import dataclasses
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, warp_size=32,
    total_memory=80 << 30, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20, gcnArchName="", uuid="0", is_integrated=0, is_multi_gpu_board=0,
    pci_bus_id=0, clock_rate=1980000, memory_clock_rate=2619000, memory_bus_width=5120,
)  # fmt: skip
INDUCTOR = {
    "compile_threads": 1,
    "force_disable_caches": True,
    "use_static_cuda_launcher": False,  # it keeps no binary to look at
}


@dataclasses.dataclass
class Compiled:
    """What was compiled: the wrappers' sources, and the kernels in the order they were built."""

    wrappers: list[str] = dataclasses.field(default_factory=list)
    kernels: list[Any] = dataclasses.field(default_factory=list)


def compiled_for_gpu(
    function: Callable[..., Any],
    *makes: Callable[[], tuple[Any, ...]],
    to_binary: bool = False,
    dynamic: bool | None = None,
    **inductor: Any,
) -> Compiled:
    """Compile a function for the inputs that each of `makes` makes on a device called cuda.

    They are made in a fake mode, where tensors have no memory. `inductor` has Inductor's options.
    Raises where Inductor could not tell what a kernel writes to, and took it for all it is given.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses.fake_tensor import FakeTensorMode

    found = Compiled()

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compile_fx(gm, inputs)
        return gm.forward  # fake inputs go through the graph as it was

    torch._dynamo.reset()
    with (
        _every_kernel_analysed(),
        pretended_gpu(found, to_binary=to_binary),
        config.patch({**INDUCTOR, **inductor}),
        torch.no_grad(),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        run = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
        for make in makes:
            run(*make())
    torch._dynamo.reset()
    return found


class _Unanalysed(logging.Handler):
    """Notes what Dynamo says of kernels that it could not analyse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "identify_mutated_tensors" in record.getMessage():
            self.said.append(record.getMessage())


@contextlib.contextmanager
def _every_kernel_analysed() -> Iterator[None]:
    logger, handler = logging.getLogger("torch._dynamo"), _Unanalysed()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    assert not handler.said, handler.said[0]


@contextlib.contextmanager
def pretended_gpu(found: Compiled, *, to_binary: bool) -> Iterator[None]:
    from torch._dynamo import device_interface
    from torch._inductor import graph
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from torch._subclasses import fake_tensor

    def same(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    asked = {
        "device_count": 1, "current_device": 0, "get_device_properties": PROPERTIES,
        "set_device": None, "synchronize": None, "is_bf16_supported": True, "is_available": True,
    }  # fmt: skip
    more = {
        "get_device_capability": (9, 0), "get_device_name": PROPERTIES.name, "_lazy_init": None,
        "is_initialized": True, "_exchange_device": 0, "_maybe_exchange_device": 0,
        "_get_device_properties": PROPERTIES, "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None, "is_current_stream_capturing": False,
        "current_stream": types.SimpleNamespace(
            cuda_stream=0, stream_id=0, device_index=0, device_type=1
        ),
    }  # fmt: skip
    interface = {"exchange_device": 0, "maybe_exchange_device": 0, "get_raw_stream": 0}

    def note(kernel: Any, *_args: Any, **_options: Any) -> None:
        found.kernels.append(kernel)

    with contextlib.ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            if hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, value))

        for name, value in {**asked, **more}.items():
            put(torch.cuda, name, same(value))
        for name, value in {**asked, **interface}.items():
            put(device_interface.CudaInterface, name, staticmethod(same(value)))
        for name in ("_cuda_getDevice", "_cuda_getCurrentRawStream", "_cuda_exchangeDevice",
                     "_cuda_maybeExchangeDevice"):  # fmt: skip
            stack.enter_context(mock.patch.object(torch._C, name, same(0), create=True))
        put(torch.cuda.graphs, "is_current_stream_capturing", same(False))
        put(torch.accelerator, "is_available", same(False))
        put(fake_tensor, "init_gpu_context", same(None))
        put(joint_graph, "lazy_init", same(None))  # its patterns are made of real tensors
        put(triton_helpers, "set_driver_to_gpu", same(None))
        last_step = "_make_launchers" if to_binary else "precompile"
        put(triton_heuristics.CachingAutotuner, last_step, note)
        put(graph.GraphLowering, "save_output_code", staticmethod(found.wrappers.append))
        # The methods ask for a device before they dispatch.
        put(torch.Tensor, "copy_", _copy)
        put(torch.Tensor, "contiguous", _contiguous)
        put(torch.Tensor, "__invert__", _invert)
        stack.enter_context(_pretended_driver())
        yield


def _copy(to: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.copy_.default(to, values)


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def _invert(tensor: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.bitwise_not.default(tensor)


@contextlib.contextmanager
def _pretended_driver() -> Iterator[None]:
    from torch.utils import _triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from csrc_free import traits

    properties = {
        "max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32,
        "max_num_regs": 65536, "sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1,
    }  # fmt: skip

    class Hopper:
        utils = types.SimpleNamespace(get_device_properties=lambda device: properties)
        launcher_cls = None

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: object = None) -> int:
            return 0

        def get_device_capability(self, device: object = None) -> tuple[int, int]:
            return 9, 0

        def get_device_interface(self) -> Any:
            return torch.cuda

        def get_benchmarker(self) -> None:
            return None

    def forget() -> None:
        traits.device_of.cache_clear()
        for function in vars(_triton).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()

    forget()
    try:
        with mock.patch.object(driver, "_active", Hopper()):
            yield
    finally:
        forget()
