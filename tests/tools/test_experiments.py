"""The experiments: their laws at toy size, what a stopped run leaves, and their intervals."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import typer
from typer.testing import CliRunner

from tools.experiments import __main__ as command
from tools.experiments import cost, hops, intervals, lines, match3, plots, report, updates
from tools.experiments.hops import Hops
from tools.experiments.model import Model, Shape, trained_parameters
from tools.experiments.train import Setting, Training, train

CPU = torch.device("cpu")
TOY = Hops(2, nodes=6)
app = typer.Typer()
app.command()(command.main)


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("heads", [1, 2])
def test_an_ordinary_layer_is_scaled_dot_product_attention(heads):
    layer = Model(Shape(("ordinary",), 8, heads), (6,), 2).blocks[0].attention
    x = torch.randn(2, 5, 8, generator=generator())
    q, k, v = (
        p(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for p in (layer.q_proj, layer.k1_proj, layer.v1_proj)
    )
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.out_proj(expected))


def test_training_from_the_frozen_zero_start_is_training_ordinary_attention():
    training = Training(steps=30, batch=16, evaluate_every=10)
    weights = {}
    for kind in ("ordinary", "frozen"):
        model, _ = train([Setting(TOY, Shape((kind,), 16), training, 0)], CPU)
        weights[kind] = model.state_dict()
        assert not weights[kind]["blocks.0.attention.k2_proj.weight"].any()
    torch.testing.assert_close(weights["frozen"], weights["ordinary"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [4, 50, 333])
def test_the_rate_is_one_cycle(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for rate in updates.one_cycle(2e-3, steps):
        assert rate == pytest.approx(schedule.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        if schedule.last_epoch < steps - 1:
            schedule.step()


@pytest.mark.parametrize("kind", ["ordinary", "2-simplicial"])
def test_runs_of_a_stack_train_as_they_would_alone(kind):
    training = Training(30, batch=16, evaluate_every=10)
    shape = Shape((kind, "2-simplicial"), 16, 2)
    settings = [Setting(Hops(n, nodes=6), shape, training, seed) for n, seed in ((2, 0), (3, 1))]
    together, results = train(settings, CPU)
    for n, setting in enumerate(settings):
        alone, (result,) = train([setting], CPU)
        for name, weight in alone.state_dict().items():
            in_stack = together.state_dict()[name][n]
            torch.testing.assert_close(in_stack, weight, rtol=1e-3, atol=1e-4)
        assert results[n]["parameters"] == trained_parameters(shape, (6, 6), 6)
        assert results[n]["accuracy"] == pytest.approx(result["accuracy"], abs=0.01)


def test_a_run_of_a_stack_ends_where_it_has_learned():
    shape, training = (
        Shape(("ordinary",), 16),
        Training(300, batch=32, learning_rate=1e-2, evaluate_every=25),
    )
    settings = [Setting(Hops(hops, nodes=4), shape, training, 0) for hops in (1, 2)]
    _, results = train(settings, CPU)
    assert [result["learned"] for result in results] == [True, False]
    assert all(accuracy >= 0.99 for _, accuracy in results[0]["curve"][-3:])
    assert results[0]["steps"] == results[0]["curve"][-1][0] < 300 == results[1]["steps"]


class DrawnOnCpu(Hops):
    """The same batches on every device, and in every call."""

    def draw(self, batch, generator):
        own = torch.Generator().manual_seed(generator.initial_seed())
        return tuple(part.to(generator.device) for part in super().draw(batch, own))


class Constant(DrawnOnCpu):
    """A task that is learned in a few steps."""

    def draw(self, batch, generator):
        tokens, classes = super().draw(batch, generator)
        return tokens, torch.zeros_like(classes)


# The first two end after three evaluations, the others at the cap, alone in the stack.
EARLY_AND_LATE = [
    Setting(task(2, nodes=6), Shape(("2-simplicial",), 16), Training(40, 8, 1e-2, 5), seed)
    for task in (Constant, DrawnOnCpu)
    for seed in (0, 1)
]


def test_runs_that_ended_leave_their_stack_and_the_others_go_on_as_they_would_alone():
    left = []
    rest, results = train(
        EARLY_AND_LATE, CPU, leave=lambda n, result: left.append((n, result["steps"]))
    )
    assert [n for n, _ in left] == [0, 1, 2, 3]
    assert max(steps for _, steps in left[:2]) < 40 == left[2][1] == left[3][1]
    for n in (2, 3):
        alone, (result,) = train([EARLY_AND_LATE[n]], CPU)
        for name, weight in alone.state_dict().items():
            in_stack = rest.state_dict()[name]
            assert len(in_stack) == 2
            torch.testing.assert_close(in_stack[n - 2], weight, rtol=1e-2, atol=1e-3)
        accuracies = zip(results[n]["curve"], result["curve"], strict=True)
        assert all(a == pytest.approx(b, abs=0.02) for a, b in accuracies)


@pytest.mark.gpu
def test_captured_updates_go_on_where_runs_leave_their_stack():
    weights = [
        train(EARLY_AND_LATE, device)[0].cpu().state_dict()
        for device in (CPU, torch.device("cuda"))
    ]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_captured_updates_are_those_of_a_cpu():
    shape, training = Shape(("2-simplicial",), 16), Training(12, batch=8, evaluate_every=5)
    runs = [Setting(DrawnOnCpu(2, nodes=6), shape, training, seed) for seed in range(3)]
    weights = [train(runs, device)[0].cpu().state_dict() for device in (CPU, torch.device("cuda"))]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-2, atol=1e-4)


def test_a_2_simplicial_layer_leaves_the_zero_start():
    shape = Shape(("2-simplicial",), 16)
    model, _ = train([Setting(TOY, shape, Training(5, batch=8), 0)], CPU)
    assert model.blocks[0].attention.k2_proj.weight.any()


@pytest.mark.parametrize("graph", ["permutation", "function"])
def test_hops_are_steps_along_the_edges(graph):
    edges, reached = Hops(2, nodes=7, graph=graph).draw(3, generator())
    for row, ends in zip(edges.tolist(), reached.tolist(), strict=True):
        target = dict(row)
        assert sorted(target) == list(range(7))
        assert ends == [target[target[node]] for _, node in row]


def test_reach_multiplies_the_power_that_each_layer_adds():
    assert hops.reach(("ordinary",) * 3) == 7
    assert hops.reach(("2-simplicial",) * 2) == 8
    assert hops.reach(("2-simplicial", "ordinary")) == 5


@pytest.mark.parametrize(("kind", "base"), [("ordinary", 3), ("2-simplicial", 5)])
def test_looking_both_ways_multiplies_what_is_known_in_a_row(kind, base):
    assert [hops.reach_both_ways((kind,) * n) for n in (1, 2, 3)] == [
        (base**n - 1) // 2 for n in (1, 2, 3)
    ]
    assert hops.reach_both_ways(("2-simplicial", "ordinary")) == 7


def test_the_wider_ordinary_model_has_as_many_parameters():
    for depth, heads in ((1, 1), (2, 4), (3, 4)):
        shape = Shape(("2-simplicial",) * depth, 64, heads)
        sizes = [
            trained_parameters(s, TOY.fields, TOY.classes)
            for s in (shape, hops.widened(shape, TOY))
        ]
        assert abs(sizes[1] / sizes[0] - 1) < 0.06


@pytest.mark.parametrize("form", ["trilinear", "determinant"])
@pytest.mark.parametrize(("modulus", "length"), [(2, 3), (5, 4), (37, 8), (137, 32)])
def test_one_head_of_width_7_computes_match3_exactly(form, modulus, length):
    numbers = torch.randint(modulus, (200, length), generator=generator())
    if modulus**length < 1000:
        numbers = torch.cartesian_prod(*[torch.arange(modulus)] * length)
    head = match3.constructed(modulus, length, form=form)
    assert head.head_dim == 7
    assert head.num_heads == 1
    out = head(match3.constructed_input(numbers, modulus))[:, :-1, 0]
    assert torch.equal(out > 0.5, match3.has_match(numbers, modulus))


def test_has_match_is_its_definition():
    numbers = torch.randint(11, (20, 5), generator=generator())
    for row, found in zip(numbers.tolist(), match3.has_match(numbers, 11).tolist(), strict=True):
        assert found == [any((x + y + z) % 11 == 0 for y in row for z in row) for x in row]


def test_match3_trains_a_few_steps():
    setting = next(s for _, s in match3.settings(1, quick=True))
    short = replace(setting, training=Training(3, batch=4))
    assert train([short], CPU)[1][0]["steps"] == 3


def test_cost_times_both_layers():
    setting = next(s for _, s in cost.settings(1, quick=True))
    result = cost.measure(setting, CPU, lambda step, accuracy: None)
    assert result["ordinary"]["ms"] > 0
    assert result["2-simplicial"]["ms"] > 0
    more = 2 * setting.width * setting.width * setting.kv_heads // setting.heads
    assert result["2-simplicial"]["parameters"] - result["ordinary"]["parameters"] == more


def _timeless(file):
    read = lines.read(file)
    for line in read:
        del line["environment"]["date"], line["result"]["seconds"]
    return read


def test_a_stopped_run_goes_on_and_gives_the_same_lines(tmp_path, monkeypatch):
    training = Training(4, batch=4, evaluate_every=2)
    rows = [(TOY, Shape((kind,), 8), training) for kind in ("ordinary", "2-simplicial")]
    monkeypatch.setattr(hops, "_QUICK", {"quick": lambda: rows})

    def run(folder, *more):
        arguments = ["hops", "--quick", "--seeds", "2", "--results", str(folder), *more]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output

    run(tmp_path / "whole")
    whole = tmp_path / "whole" / "hops.jsonl"
    stopped = tmp_path / "stopped" / "hops.jsonl"
    stopped.parent.mkdir()
    stopped.write_bytes(whole.read_bytes()[: len(whole.read_bytes()) * 2 // 3])  # killed: torn
    run(stopped.parent)
    assert len(_timeless(whole)) == 4
    assert _timeless(stopped) == _timeless(whole)
    before = stopped.read_bytes()
    run(stopped.parent)
    assert stopped.read_bytes() == before
    run(tmp_path / "shards", "--shard", "0/2")
    run(tmp_path / "shards", "--shard", "0/1")
    assert len(lines.read(tmp_path / "shards" / "hops.jsonl")) == 4


def test_intervals_are_those_of_the_tables():
    for freedom, expected in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert intervals.t_quantile(freedom) == pytest.approx(expected, abs=1e-3)
    assert intervals.of_share(5, 5) == pytest.approx((0.4782, 1.0), abs=1e-4)
    assert intervals.of_share(1, 3) == pytest.approx((0.0084, 0.9057), abs=1e-4)
    assert intervals.of_mean([0.5], least=0, most=1) is None


def test_the_committed_report_is_that_of_the_committed_lines():
    read = report.read_all(lines.RESULTS)
    assert (lines.RESULTS.parent / "RESULTS.md").read_text() == report.text(read)


def test_the_map_is_drawn(tmp_path):
    cells = {(1, 1): 1.0, (1, 2): 0.3, (2, 1): 1.0, (2, 2): 0.9}
    arms = {"ordinary": cells, "2-simplicial": cells}
    plots.heat_map(arms, tmp_path / "map.png", title="map")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_marks_what_refutes_the_expectation():
    shape = {"layers": ["ordinary"], "width": 8, "heads": 1, "w1": None, "w2": None}
    line = {
        "part": "one-layer",
        "setting": {
            "task": {"hops": 2, "nodes": 6, "graph": "permutation"},
            "shape": shape,
            "training": {"steps": 9},
            "seed": 0,
        },
        "result": {
            "accuracy": 1.0, "learned": True, "steps": 5, "parameters": 9, "majority": 0.2,
            "seconds": 6.0,
        },
        "environment": {
            "device": "x", "torch": "2", "triton": "3", "date": "2026-01-01T", "commit": "abc",
        },
    }  # fmt: skip
    said = report.text({"hops": [line]})
    assert "out of reach; refuted |" in said
    assert "[one seed]" in said
    frozen = copy.deepcopy(line)
    frozen["setting"]["shape"]["layers"], frozen["result"]["accuracy"] = ["frozen"], 0.75
    assert "ordinary one does | -0.250 [one seed]: one seed |" in report.text(
        {"hops": [line, frozen]}
    )
    line["setting"]["shape"] |= {"layers": ["ordinary"] * 2, "heads": 4}
    line["setting"]["task"]["hops"] = 4
    said = report.text({"hops": [line]})
    assert "out of reach; refuted; in reach looking back |" in said
    assert "1 of 1 runs" in said
    assert "0 stopped at their cap" in said


def match3_line(kind, width, seed, accuracy, *, part="width", learned=False):
    shape = {"layers": [kind], "width": width, "heads": 1, "w1": None, "w2": None}
    return {
        "part": part,
        "setting": {
            "task": {"modulus": 11, "length": 4}, "shape": shape, "training": {"steps": 9},
            "seed": seed,
        },
        "result": {
            "accuracy": accuracy, "learned": learned, "steps": 9, "parameters": 9,
            "majority": 0.6, "seconds": 6.0, "curve": [(9, accuracy)],
        },
        "environment": {
            "device": "x", "torch": "2", "triton": "3", "date": "2026-01-01T", "commit": "abc",
        },
    }  # fmt: skip


def test_the_report_says_at_which_width_each_kind_succeeds(tmp_path):
    runs = [
        match3_line(kind, width, seed, accuracy, part=part, learned=accuracy > 0.99)
        for width, part in ((16, "width"), (64, "pilot"))
        for kind, accuracy in (("ordinary", 0.7), ("2-simplicial", 0.9 if width < 64 else 0.995))
        for seed in range(2)
    ]
    said = report.text({"match3": runs})
    expected = "2-simplicial at 64 of 16, 64; ordinary at none of 16, 64"
    assert f"4 numbers mod 11, the least width at which all seeds learned: {expected}" in said
    assert "| 11 | 4 | 1 | 16 | 2 | +0.200 [+0.200, +0.200] |" in said
    runs[-1]["result"]["learned"] = False
    assert "2-simplicial at none of 16, 64" in report.text({"match3": runs})
    report.report_match3.draw(runs, tmp_path)
    assert (tmp_path / "match3.png").read_bytes().startswith(b"\x89PNG")


def test_every_experiment_has_a_section_and_what_has_not_run_is_said():
    said = report.text({})
    for name in report.NAMES:
        assert f"## {name}\n\nNot run.\n" in said
    assert "match3 (pilot, modulus, length, heads, width, width-of-four)" in said


@pytest.mark.parametrize("file", sorted(lines.RESULTS.parent.glob("*.png")), ids=lambda f: f.name)
def test_figures_are_small_and_named_by_the_report(file):
    assert file.stat().st_size < 100_000
    assert f"]({file.name})" in (lines.RESULTS.parent / "RESULTS.md").read_text()
