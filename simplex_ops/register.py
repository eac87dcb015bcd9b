"""Registration: which function answers for each operator under each dispatch key."""

import torch
from torch.utils.flop_counter import register_flop_formula

from simplex_ops import autocast, autograd, cpu, fake, flops, gpu
from simplex_ops.schema import LIBRARY

for _name in ("attn", "attn_backward"):
    torch.library.register_fake(f"simplex::{_name}", getattr(fake, _name), lib=LIBRARY)
    LIBRARY.impl(_name, getattr(autograd, _name), "Autograd")
    LIBRARY.impl(_name, getattr(cpu, _name), "CPU")
    LIBRARY.impl(_name, getattr(gpu, _name), "CompositeExplicitAutograd")  # every other device
    register_flop_formula(getattr(torch.ops.simplex, _name))(getattr(flops, _name))

for _device_type in ("cpu", "cuda", "xpu"):
    _kernel = autocast.autocast_kernel(_device_type)
    LIBRARY.impl("attn", _kernel, f"Autocast{_device_type.upper()}")
