"""Recipes: the committed ones build, and what is wrong with others is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fastl2o
from fastl2o import meta
from fastl2o.meta.recipe import (
    RecipeError,
    build_trainer,
    load_recipe,
    parse_recipe,
    recipe_names,
)

GOOD = """
name = "tiny"
outer_steps = 6
seed = 3
timescales = [2, 50]
[rule]
family = "lstm"
hidden_size = 3
num_layers = 1
[[tasks]]
kind = "quadratic"
dim = 3
weight = 2
[[tasks]]
kind = "mlp"
data = "digits"
hidden = [4]
init_scale = "torch"
scaling = 3
convex = 2
convex_scaling = 1.0
[estimator]
unroll = 3
objective = "log"
[trainer]
horizon = [[0, 6], [3, [4, 9]]]
runs = 2
clip_grad = 1
[optimizer]
name = "adamw"
lr = 3e-3
betas = [0.9, 0.99]
[schedule]
kind = "linear"
final = 0.1
[validation]
every = 2
runs = 2
horizon = 5
[[validation.tasks]]
kind = "quadratic"
[imitation]
probability = 0.5
betas = [0.95, 0.9]
decay = 3.0
relative = true
own_path = 0.25
coordinates = 3
[card]
task = "a test"
"""


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A file of MNIST's form, for recipes that need one."""
    arrays = {}
    for part, count in (("train", 40), ("test", 10)):
        arrays[f"{part}_images"] = np.zeros((count, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(count, dtype=np.uint8) % 10
    np.savez(tmp_path / "mnist.npz", **arrays)
    return tmp_path / "mnist.npz"


@pytest.mark.parametrize(
    "name",
    [
        "lstm-quadratic-start",
        "lstm-quadratic-middle",
        "lstm-quadratic",
        "lstm-mnist-start",
        "lstm-mnist-middle",
        "lstm-mnist-late",
        "lstm-mnist-muon",
        "lstm-mnist",
        "rnnprop-mnist",
        "rnnprop",
        "lstm-start",
        "lstm-middle",
        "lstm",
        "hierarchical-small-start",
        "hierarchical-small-middle",
        "hierarchical-small-late",
        "hierarchical-small",
        "hierarchical",
    ],
)
def test_committed_recipes_build(name: str, mnist: Path) -> None:
    assert name in recipe_names()
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    trainer = build_trainer(recipe, data=mnist)
    assert trainer.validation is not None
    # The last validation is at the last outer step, so that no training is in vain.
    assert recipe.outer_steps % trainer.validation.every == 0
    again = build_trainer(name, data=mnist)
    assert torch.equal(trainer.rule.flat_parameters(), again.rule.flat_parameters())


def test_a_recipe_sets_everything() -> None:
    trainer = build_trainer(parse_recipe(GOOD), progress=False)
    assert trainer.seed == 3
    assert trainer.rule.config()["hidden_size"] == 3
    expected = fastl2o.LSTMRule(3, 1)
    expected.reset_parameters(torch.Generator().manual_seed(3))
    assert not torch.equal(trainer.rule.layers[0].bias, expected.layers[0].bias)
    assert torch.equal(trainer.rule.layers[0].weight_ih, expected.layers[0].weight_ih)
    assert [type(task).__name__ for task in trainer.tasks] == ["Quadratic", "WithConvex"]
    assert trainer.estimator.config()["objective"] == "log"
    assert trainer.horizon == meta.Curriculum(((0, 6), (3, (4, 9))))
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert trainer.optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    assert trainer.schedule == meta.LRSchedule("linear", total=6, final=0.1)
    assert trainer.validation is not None
    assert trainer.validation.seed == 3
    assert repr(trainer.validation.tasks[0]) == repr(meta.tasks.Quadratic())
    assert trainer.imitation == meta.Imitation(0.5, 0.01, (0.95, 0.9), 3.0, True, 0.25, 3)
    assert trainer.fit(6).best_step is not None


def test_an_ensemble_stands_for_its_tasks() -> None:
    table = """
    name = "small"
    outer_steps = 1
    [rule]
    family = "hierarchical"
    param_size = 3
    [[tasks]]
    kind = "ensemble"
    families = ["bowl", "norm"]
    weight = 2.0
    [[tasks]]
    kind = "quadratic"
    """
    trainer = build_trainer(parse_recipe(table), progress=False)
    assert len(trainer.tasks) == 8 + 6 + 1
    expected = torch.tensor([1 / 8] * 8 + [1 / 6] * 6 + [1.0])
    torch.testing.assert_close(trainer._starter.weights, expected)
    slow = build_trainer(parse_recipe(f"timescales = [90, 90]\n{table}"), progress=False).rule
    kept = slow.global_gru.gates_bias.detach()[20:].sigmoid()
    torch.testing.assert_close(kept[:10], torch.full((10,), 1 - 1 / 90))
    with pytest.raises(RecipeError, match=r"timescales: .*low"):
        build_trainer(parse_recipe(f"timescales = [1, 9]\n{table}"))
    both = f'start = "hierarchical-small"\ntimescales = [2, 9]\n{table}'
    with pytest.raises(RecipeError, match=r"timescales: .*leave timescales or start out"):
        build_trainer(parse_recipe(both))
    with pytest.raises(RecipeError, match=r"tasks\[0\]: families must be a list of some of quadr"):
        build_trainer(parse_recipe(table.replace('"bowl"', '"ball"')))
    with pytest.raises(RecipeError, match=r"unknown key 'tasks\[0\].familys'"):
        parse_recipe(table.replace("families", "familys"))


def test_a_recipe_continues_from_another_rule(tmp_path: Path) -> None:
    first = build_trainer(parse_recipe(GOOD)).rule
    with torch.no_grad():
        first.readout.bias.fill_(0.25)
    file = str(tmp_path / "first.safetensors")
    first.save(file)
    second = GOOD.replace("timescales = [2, 50]\n", "")
    rule = build_trainer(parse_recipe(f"start = {file!r}\n" + second)).rule
    assert torch.equal(rule.flat_parameters(), first.flat_parameters())
    other = second.replace("hidden_size = 3", "hidden_size = 4")
    with pytest.raises(RecipeError, match=r"start: .* but \[rule\] asks for .*hidden_size=4"):
        build_trainer(parse_recipe(f"start = {file!r}\n" + other))
    gone = "start = 'gone.safetensors'\n" + second
    with pytest.raises(FileNotFoundError, match=r"^mine\.toml, start: there is no rule file gone"):
        build_trainer(parse_recipe(gone, "mine.toml"))


def test_recipe_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    assert load_recipe(path) == parse_recipe(GOOD)
    path.write_text(GOOD.replace("dim = 3", "dim = 0"))
    with pytest.raises(RecipeError, match=r"mine\.toml, tasks\[0\]: dim must be") as caught:
        build_trainer(path)
    assert str(caught.value).startswith(str(path))
    with pytest.raises(FileNotFoundError, match=r"no recipe 'lstm-mnits'.*lstm-mnist"):
        load_recipe("lstm-mnits")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "tiny"', 'name = "tiny', "not valid TOML"),
        ('name = "tiny"', "", "'name' is missing"),
        ("seed = 3", "sede = 3", "unknown key 'sede'; did you mean 'seed'"),
        ("seed = 3", "seed = -3", "seed must be"),
        ("seed = 3", "seed = true", "seed must be an integer, got True"),
        ("outer_steps = 6", "outer_steps = 0", "outer_steps must be an int of at least 1, got 0"),
        (
            "final = 0.1",
            "final = 0.1\nwarmup = 7",
            r"schedule\.warmup must be at most outer_steps = 6, .*; got 7",
        ),
        ("outer_steps = 6", "outer_steps = 6.5", "outer_steps must be an integer, got 6.5"),
        (
            'family = "lstm"',
            'family = "gru"',
            "rule.family must be one of hierarchical, lstm, rnnprop",
        ),
        ("hidden_size = 3", "hiden_size = 3", "'rule.hiden_size'; did you mean 'hidden_size'"),
        ("unroll = 3", "unrol = 3", "'estimator.unrol'; did you mean 'unroll'"),
        (
            "unroll = 3",
            'unroll = "3"',
            "estimator.unroll must be an integer, or \"horizon\" .*; got '3'",
        ),
        ('kind = "mlp"', 'kind = "cnn"', r"tasks\[1\].kind must be one of quadratic, mlp"),
        ("dim = 3", "hidden = [3]", r"unknown key 'tasks\[0\].hidden'"),
        ('name = "adamw"', 'name = "lion"', "optimizer.name must be one of adam, "),
        ("betas = [0.9, 0.99]", "momentum = 0.9", "unknown key 'optimizer.momentum'"),
        ("runs = 2\nclip", 'runs = "2"\nclip', "trainer.runs must be an integer"),
        ("betas = [0.9, 0.99]", "betas = [0.9]", "optimizer.betas must be a list of two"),
        ("seed = 3", f"seed = {2**70}", "seed must be below"),
        ("timescales = [2, 50]", "timescales = [2]", "timescales must be .shortest, longest."),
        ('name = "tiny"', 'name = "a/b"', "name is that of the rule's file"),
        ('name = "tiny"', 'name = ""', "name is that of the rule's file"),
        ("[card]", "[card]\nday = 1979-05-27", "card holds what a rule file cannot"),
        ("[card]", "[card]\nscore = nan", "card holds what a rule file cannot"),
        ("[card]", "[cart]", "unknown key 'cart'; did you mean 'card'"),
        ('[[validation.tasks]]\nkind = "quadratic"', "tasks = []", "validation.tasks is empty"),
        ('[[validation.tasks]]\nkind = "quadratic"', "tasks = [1]", "must be a table"),
    ],
)
def test_bad_recipes(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe(GOOD.replace(old, new, 1), "mine.toml")
    assert str(caught.value).startswith("mine.toml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("hidden_size = 3", "hidden_size = 0", "rule: .*hidden_size"),
        ("hidden_size = 3", 'hidden_size = "3"', "rule: .*hidden_size"),
        ("dim = 3", "dim = 0", r"tasks\[0\]: dim must be"),
        ("hidden = [4]", "hidden = [0]", r"tasks\[1\]: hidden must be"),
        ("convex = 2\n", "", "convex_scaling needs convex"),
        ("scaling = 3", "scaling = -3", r"tasks\[1\]: scaling must be a finite number"),
        ("convex = 2", "convex = 0", r"tasks\[1\]: convex must be an int of at least 1, got 0"),
        ("convex_scaling = 1.0", "convex_scaling = -1", r"tasks\[1\]: convex_scaling must be"),
        ("dim = 3", "noise = -1.0", r"tasks\[0\]: noise must be a finite number"),
        ("dim = 3", "sparse = 2.0", r"tasks\[0\]: sparse must be a finite number"),
        ("dim = 3", "tensor_scaling = -1", r"tasks\[0\]: tensor_scaling must be"),
        ("dim = 3", "batch_sizes = [2, 4]", r"tasks\[0\]: batch_sizes: task must have a batch_s"),
        ("convex = 2", "convex = 2\nbatch_sizes = [4, 2]", r"tasks\[1\]: batch_sizes \(low, high"),
        ('objective = "log"', 'objective = "mean"', "estimator: objective must be one of"),
        ("[0, 6]", "[1, 6]", r"trainer\.horizon: stages must be"),
        ("runs = 2\nclip", "runs = 0\nclip", "trainer: runs must be"),
        ("lr = 3e-3", "lr = -1", "optimizer: lr must be a finite number"),
        ("lr = 3e-3", "lr = inf", "optimizer: lr must be a finite number"),
        ('kind = "linear"', 'kind = "step"', "schedule: kind must be one of"),
        ("every = 2", "every = 0", "validation: every must be"),
        ("probability = 0.5", "probability = 1.5", "imitation: probability must be"),
        ("betas = [0.95", "betas = [1.5", "imitation: betas must be"),
        ("timescales = [2", "timescales = [1", "timescales: .*low"),
        ("weight = 2", "weight = 0", r"tasks\[0\]: weight must be a finite number above 0, got 0"),
    ],
)
def test_impossible_values(old: str, new: str, message: str) -> None:
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    for recipe, named in (
        (parse_recipe(text), "recipe 'tiny'"),
        (parse_recipe(text, "mine.toml"), "mine.toml"),
    ):
        with pytest.raises(RecipeError, match=message) as caught:
            build_trainer(recipe)
        assert str(caught.value).startswith(f"{named}, ")


def test_missing_data_names_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(meta.tasks.DATA_VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match=r"recipe 'lstm-mnist', tasks\[0\]: .*not set"):
        build_trainer("lstm-mnist")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        build_trainer("lstm-mnist", data=tmp_path / "nowhere.npz")
