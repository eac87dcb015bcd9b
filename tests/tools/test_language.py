"""`language`: equal FLOPs, text that is held out, runs that go on, and the fit to sizes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import lowering
from tools.experiments import __main__ as command
from tools.experiments import language, lines, report, scaling, text
from tools.experiments.language import ARMS, Setting, Size

CPU = torch.device("cpu")
TOY = Size(4, 16, 2, 1, 4e-3, batch=4, seq=16, w1=8, w2=2, evaluations=2, held_out_batches=2)
app = typer.Typer()
app.command()(command.main)


@pytest.fixture
def folder(tmp_path):
    """Make 64 files of unlike content, and what must not be read."""
    root = tmp_path / "packages"
    for n in range(64):
        file = root / f"package{n % 3}" / f"module{n}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"[{n}]" + f"value = {n}\n" * 20)
    (root / "package0" / "copy.py").write_text("[7]" + "value = 7\n" * 20)
    (root / "package0" / "table.py").write_text("x" * (text.LARGEST + 1))
    for name in ("__pycache__", "site-packages"):
        (root / name).mkdir()
        (root / name / "other.py").write_text("not read")
    (root / "data.bin").write_text("not read")
    return root


@pytest.fixture
def toy(folder, monkeypatch):
    """Let the experiment read the folder, and run models as they are, not compiled."""
    read = text.load([folder])
    monkeypatch.setattr(language, "_text", lambda device: read)

    def eager(size, arm, device):
        model = language.build(size, arm, 0)
        return model, model

    monkeypatch.setattr(language, "_compiled", eager)
    return read


def test_held_out_files_are_never_trained_on(folder, toy, monkeypatch):
    seen = []
    draw = text.Blocks.draw

    def watched(blocks, batch):
        seen.append(draw(blocks, batch))
        return seen[-1]

    monkeypatch.setattr(text.Blocks, "draw", watched)
    language.measure(Setting(TOY, "ordinary", 40 * 64, 0), CPU, lambda step, loss: None)
    trained = b"".join(bytes(row.tolist()) for batch in seen for row in batch)
    held_out = [n for n in range(64) if f"[{n}]".encode() in bytes(toy.held_out.tolist())]
    assert held_out
    assert not any(f"value = {n}\n".encode() in trained for n in held_out)
    assert sum(f"value = {n}\n".encode() in trained for n in range(64)) > 32


def test_each_file_is_in_one_part_and_a_copy_in_none(folder, toy):
    whole = bytes(toy.training.tolist()) + b"\0" + bytes(toy.held_out.tolist())
    assert len(whole.split(b"\0")) == 64
    assert b"not read" not in whole
    assert b"xxx" not in whole
    assert toy.listing["files"] == 64
    assert sum(toy.listing["packages"].values()) == len(whole) - 63
    assert text.load([folder]).listing == toy.listing


def test_the_digest_is_of_names_and_contents(folder, toy):
    (folder / "package1" / "module1.py").write_text("another")
    assert text.load([folder]).listing["digest"] != toy.listing["digest"]


def test_too_little_text_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="found 0 files"):
        text.load([tmp_path])


def test_a_pass_has_each_byte_as_a_target_once():
    whole = torch.arange(101, dtype=torch.uint8)
    blocks = text.Blocks(whole, 10, seed=3)
    first = blocks.draw(10)
    assert sorted(first[:, 1:].flatten().tolist()) == list(range(1, 101))
    assert (first.diff(dim=1) == 1).all()
    assert not torch.equal(blocks.draw(10), first)
    assert torch.equal(text.Blocks(whole, 10, seed=3).draw(10), first)


@pytest.mark.parametrize("part", language.PARTS)
def test_all_arms_train_on_equal_flops(part):
    of_part = [s for p, s in language.settings(1, quick=False) if p == part]
    assert [s.arm for s in of_part] == list(ARMS)
    flops = [
        language.flops_per_token(s.size, s.arm) * language.steps(s) * s.size.batch * s.size.seq
        for s in of_part
    ]
    assert max(flops) < 1.01 * min(flops)
    with torch.device("meta"):
        model = language.build(of_part[0].size, "ordinary", 0)
    wanted = {"1M": 1e6, "4M": 4e6, "16M": 16e6}[part]
    assert 0.8 * wanted < sum(p.numel() for p in model.parameters()) < 1.2 * wanted


def test_flops_are_those_that_a_step_takes():
    model = language.build(TOY, "2-simplicial", 0)
    tokens = torch.zeros(TOY.batch, TOY.seq, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False).logits.sum().backward()
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    ours = counted["simplex.attn"] + counted["simplex.attn_backward"]
    ordinary = 3 * 3.5 * TOY.batch * language._attention_flops(TOY, None, 1)
    expected = TOY.batch * TOY.seq * language.flops_per_token(TOY, "2-simplicial")
    assert counted["aten.mm"] + ours + ordinary == expected


def test_arms_start_from_one_model_and_the_windowed_one_keeps_its_start(toy):
    tokens = torch.arange(TOY.seq)[None]
    models = {arm: language.build(TOY, arm, 5) for arm in ARMS}
    logits = {arm: model(input_ids=tokens).logits for arm, model in models.items()}
    torch.testing.assert_close(logits["2-simplicial"], logits["windowed"])
    assert not torch.allclose(logits["ordinary"], logits["windowed"])
    unseen = language.build(replace(TOY, w1=TOY.seq), "windowed", 5)
    torch.testing.assert_close(unseen(input_ids=tokens).logits, logits["ordinary"])
    kept = {n for n, p in models["windowed"].named_parameters() if not p.requires_grad}
    assert {name.rpartition("self_attn.")[2] for name in kept} == {
        "simplex_k2.weight",
        "simplex_v2.weight",
    }


def _timeless(file):
    read = lines.read(file)
    for line in read:
        del line["environment"]["date"]
        del line["result"]["seconds"], line["result"]["tokens_per_second"]
    return read


def test_a_stopped_run_goes_on_and_gives_the_same_lines(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(language, "_QUICK", {"quick": (TOY, 8 * 64)})

    def run(into):
        arguments = ["language", "--quick", "--seeds", "2", "--results", str(into)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output

    run(tmp_path / "whole")
    whole = tmp_path / "whole" / "language.jsonl"
    stopped = tmp_path / "stopped" / "language.jsonl"
    stopped.parent.mkdir()
    stopped.write_bytes(whole.read_bytes()[: len(whole.read_bytes()) * 2 // 3])
    run(stopped.parent)
    assert len(_timeless(whole)) == 6
    assert _timeless(stopped) == _timeless(whole)
    first, *_, last = lines.read(whole)[0]["result"]["curve"]
    assert last[1] < first[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arm", [pytest.param("ordinary", marks=pytest.mark.long), *(a for a in ARMS if a != "ordinary")]
)
def test_the_compiled_model_is_rewritten_and_learns(folder, arm, monkeypatch):
    read = text.load([folder])
    monkeypatch.setattr(language, "_text", lambda device: read)
    result = language.measure(Setting(TOY, arm, 40 * 64, 0), CPU, lambda step, loss: None)
    assert result["loss"] < result["curve"][0][1]
    if arm != "ordinary":
        (rewritten,) = lowering.last_report().rewritten
        assert rewritten.module == "model.layers.3.self_attn"


def synthetic(noise, *, sizes=5, seeds=5, seed=0):
    drawn = np.random.default_rng(seed)
    law = {1e6 * 4**n: 1.1 + 30.0 * (1e6 * 4**n) ** -0.3 for n in range(sizes)}
    return {n: (loss + drawn.normal(0, noise, seeds)).tolist() for n, loss in law.items()}


def test_the_fit_finds_the_law_of_a_synthetic_curve():
    fit = scaling.fit(synthetic(0.0))
    assert fit[:3] == pytest.approx((1.1, 30.0, 0.3), rel=1e-3)
    assert fit.r2 == pytest.approx(1.0, abs=1e-6)
    assert fit(2e6) == pytest.approx(1.1 + 30.0 * 2e6**-0.3, rel=1e-4)
    assert max(map(abs, fit.residuals.values())) < 1e-4


def test_the_fit_s_intervals_hold_the_law_and_widen_with_the_noise():
    inside, widths = 0, {}
    for noise in (0.001, 0.01):
        fits = [scaling.fit(synthetic(noise, seed=s)) for s in range(20)]
        inside += sum(f.alpha_interval.low <= 0.3 <= f.alpha_interval.high for f in fits)
        inside += sum(f.floor_interval.low <= 1.1 <= f.floor_interval.high for f in fits)
        widths[noise] = np.mean([f.alpha_interval.high - f.alpha_interval.low for f in fits])
    assert inside > 0.75 * 80
    assert widths[0.01] > 4 * widths[0.001]


def test_a_fit_of_few_sizes_is_refused():
    with pytest.raises(ValueError, match="a fit needs 5 sizes with runs, got 4"):
        scaling.fit(synthetic(0.01, sizes=4))


def made(size, parameters, arm, seed, loss):
    environment = {
        "device": "x", "torch": "2", "triton": "3", "date": "2026-01-01T", "commit": "abc",
    }  # fmt: skip
    result = {
        "loss": loss, "parameters": parameters, "tokens": 9, "flops": 1e15, "passes": 0.1,
        "tokens_per_second": 3, "curve": [(9, loss)],
        "text": {
            "digest": "d", "files": 2, "training_bytes": 8, "held_out_bytes": 1, "packages": {},
        },
    }  # fmt: skip
    setting = {"arm": arm, "seed": seed}
    return {"part": size, "setting": setting, "result": result, "environment": environment}


def test_the_report_pairs_runs_by_seed_and_fits_five_sizes_alone():
    runs = [
        made(f"{n:.0f}", n, arm, seed, loss + (arm != "ordinary") * (0.01 + 0.001 * seed))
        for n, losses in synthetic(0.2, seeds=3).items()
        for seed, loss in enumerate(losses)
        for arm in ("ordinary", "2-simplicial")
    ]
    said = report.text({"language": runs})
    expected = "| 1000000 | 2-simplicial − ordinary | 3 | +0.0110 [+0.0085, +0.0135] "
    assert expected + "| +0.0100 to +0.0120 | above zero |" in said
    assert "| arm | E [95%] |" in said
    runs[-1]["result"]["text"] = {**runs[-1]["result"]["text"], "digest": "another"}
    assert "| 256000000 | 2-simplicial − ordinary | 2 |" in report.text({"language": runs})
    few = report.text({"language": [run for run in runs if len(run["part"]) < 9]})
    assert "not fitted: 4 sizes ran, 5 are needed" in few
    assert "| arm | E [95%] |" not in few
