"""Registration: which function answers for each operator under each dispatch key."""

import torch

from simplex_ops.contract.schema import LIBRARY
from simplex_ops.devices import cpu, gpu
from simplex_ops.rules import autocast, autograd, counting, fake, layouts

for _name in ("attn", "attn_backward"):
    torch.library.register_fake(f"simplex::{_name}", getattr(fake, _name), lib=LIBRARY)
    LIBRARY.impl(_name, getattr(autograd, _name), "Autograd")
    LIBRARY.impl(_name, getattr(cpu, _name), "CPU")
    LIBRARY.impl(_name, getattr(gpu, _name), "CompositeExplicitAutograd")  # every other device

for _key in layouts.KEYS:
    LIBRARY.impl("attn", layouts.attn, _key)

counting.register_formulas()

for _device_type in ("cpu", "cuda", "xpu"):
    _kernel = autocast.autocast_kernel(_device_type)
    LIBRARY.impl("attn", _kernel, f"Autocast{_device_type.upper()}")
