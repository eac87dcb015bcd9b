"""Check and time the Hopper forward against float64 and cuDNN: python -m tools.hopper_check."""

import random
import statistics
import sys
import time

import torch

from csrc_free.hopper.serve import choose, launch, why_not
from csrc_free.launch import device_of
from csrc_free.portable.forward import attn_forward
from csrc_free.problem import problem_of


def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def inputs(batch, heads, kv, seq, m1, m2, *, is_transposed=False):
    def make(h, n):
        if is_transposed:
            return torch.randn(batch, n, h, 128, device="cuda", dtype=torch.bfloat16).transpose(
                1, 2
            )
        return torch.randn(batch, h, n, 128, device="cuda", dtype=torch.bfloat16)

    return [make(heads, seq), make(kv, m1), make(kv, m2), make(kv, m1), make(kv, m2)]


def reach(w, causal):
    w = 2**30 if w is None else w - 1
    return (w, 0 if causal else w)


def exact(q, k1, k2, v1, v2, r1, r2, scale, kb, vb):
    group = q.shape[1] // k1.shape[1]
    q, k1, k2, v1, v2 = (t.double() for t in (q, k1, k2, v1, v2))
    k1, k2, v1, v2 = (t.repeat_interleave(group, 1) for t in (k1, k2 + kb, v1, v2 + vb))
    m, n = max(k1.shape[2], k2.shape[2]), q.shape[2]
    p = torch.arange(n, device="cuda")[:, None] + m - n

    def band(keys, r):
        j = torch.arange(keys, device="cuda")[None] + m - keys
        return (p - r[0] <= j) & (j <= p + r[1])

    b1, b2 = band(k1.shape[2], r1), band(k2.shape[2], r2)
    out, lse = [], []
    for i in range(n):
        s = torch.einsum("bhd,bhjd,bhkd->bhjk", q[:, :, i], k1, k2) * scale
        s = s.masked_fill(~(b1[i][:, None] & b2[i][None]), -torch.inf)
        z = s.flatten(2).logsumexp(2)
        w = torch.exp(s - z.masked_fill(z == -torch.inf, 0)[..., None, None])
        out.append(torch.einsum("bhjk,bhjd,bhkd->bhd", w, v1, v2))
        lse.append(z)
    return torch.stack(out, 2), torch.stack(lse, 2)


def both(x, r1, r2, scale, kb, vb):
    q, k1, k2, v1, v2 = x
    pr = problem_of(q, k1, k2, v1, v2, r1, r2, scale, "trilinear", kb, vb, None, None)
    reason = why_not(pr, device_of(q.device))
    out = torch.full_like(q, torch.nan)
    lse = torch.full(q.shape[:3], torch.nan, device="cuda")
    po, pl = out.clone(), lse.clone()
    if reason is not None:
        return reason, None, None, None, None
    launch(pr, choose(pr.traits()), out, lse)
    attn_forward(q, k1, k2, v1, v2, reach1=r1, reach2=r2, scale=scale, form="trilinear", k2_bias=kb,
                 v2_bias=vb, kv_bounds=None, q_start=None, out=po, lse=pl)  # fmt: skip
    torch.cuda.synchronize()
    return None, out, lse, po, pl


def error(a, b):
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a.double() - b.double()).abs()).nan_to_num(nan=9e99).max().item()


def fuzz(seconds):
    stop, count, bad = time.time() + seconds, 0, []
    worst = [0.0, 0.0]
    while time.time() < stop:
        r = random.Random(count)
        torch.manual_seed(count)
        group, kv = r.choice([1, 2, 4, 8, 16, 32, 64]), r.choice([1, 2])
        n = r.choice([1, 3, 17, 64, 65, 100])
        m1 = r.choice([1, 5, 64, 70, 129, 300])
        m2 = r.choice([1, 5, m1, m1])
        w1, w2 = r.choice([1, 7, 64, 90, 257, None]), r.choice([1, 2, 5, 32])
        causal, scale = r.random() < 0.7, r.choice([1, 1, 8, 30, 100, 1000])
        kb, vb = r.choice([(0.0, 0.0), (1.0, 0.5)])
        x = inputs(r.choice([1, 2]), group * kv, kv, n, m1, m2, is_transposed=r.random() < 0.5)
        x[0] *= scale
        trick = r.choice(["", "", "const", "outlier", "big v", "late"])
        if trick == "const":
            x[0].fill_(0.5), x[1].fill_(0.5)
        elif trick == "outlier":
            x[1][:, :, m1 // 2] *= 20
        elif trick == "big v":
            x[3] *= 1e30
        elif trick == "late":
            x[1][:, :, m1 // 2 :] *= 0.01
        a = (reach(w1, causal), reach(w2, causal), 128**-0.5, kb, vb)
        reason, out, lse, po, pl = both(x, *a)
        count += 1
        if reason:
            continue
        eo, el = exact(*x, *a)
        top = max(eo.abs().max().item(), 1e-30)
        e, ep, l, lp = error(out, eo) / top, error(po, eo) / top, error(lse, el), error(pl, el)
        ok = e <= 2 * ep + 8e-3 and l <= 2 * lp + 1e-3 * (
            1 + el.nan_to_num(neginf=0).abs().max().item()
        )
        worst = [max(worst[0], e - ep), max(worst[1], l - lp)]
        if not ok:
            bad.append((count - 1, group, kv, n, m1, m2, w1, w2, causal, scale, kb, trick,
                        f"{e:.1e} {ep:.1e} {l:.1e} {lp:.1e}"))  # fmt: skip
    say("fuzz", count, "cases; failures", len(bad), "worst excess", worst)
    for b in bad[:25]:
        say("  ", *b)


def timed(f, repeats=3):
    f()
    a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    a.record()
    for _ in range(repeats):
        f()
    b.record()
    torch.cuda.synchronize()
    return a.elapsed_time(b) / repeats


def bench(heads, kv):
    x = inputs(4, heads, kv, 4096, 4096, 4096)
    pr = problem_of(*x, (511, 0), (31, 0), 128**-0.5, "trilinear", 0.0, 0.0, None, None)
    out, lse = torch.empty_like(x[0]), torch.empty(x[0].shape[:3], device="cuda")
    kk = torch.randn(4, heads, 16384, 128, device="cuda", dtype=torch.bfloat16)
    flops = 4 * 4 * heads * 4096 * 128 * 512 * 32
    rates = {"hopper": [], "portable": [], "cudnn": []}

    def sdpa(q=x[0], kk=kk):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(q, kk, kk)

    calls = {
        "hopper": lambda: launch(pr, choose(pr.traits()), out, lse),
        "portable": lambda: attn_forward(
            *x, reach1=(511, 0), reach2=(31, 0), scale=128**-0.5, form="trilinear",
            k2_bias=0.0, v2_bias=0.0, kv_bounds=None, q_start=None, out=out, lse=lse),
        "cudnn": sdpa,
    }  # fmt: skip
    for _ in range(5):
        for name, call in calls.items():
            rates[name].append(flops / timed(call) / 1e9)
    med = {k: round(statistics.median(v)) for k, v in rates.items()}
    say(
        f"G {heads // kv} H{heads}/{kv}",
        med,
        "of cuDNN",
        round(med["hopper"] / med["cudnn"], 3),
    )


if __name__ == "__main__":
    say(torch.cuda.get_device_name(), torch.__version__, time.strftime("%F %T"))
    fuzz(110)
    for shape in ((64, 1), (64, 8), (32, 8), (16, 16)):
        bench(*shape)
